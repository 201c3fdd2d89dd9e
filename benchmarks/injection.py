"""Mail by HTTP beside mail by SMTP: `python -m benchmarks.injection [--messages N] [--rounds N] [--json FILE]`.

One relay with one worker takes the same message of 4 KB by SMTP, with a connection each, and as JSON by HTTP, over connections
that stay; beside it a bare aiohttp server takes the same JSON and does nothing. The three have bursts of as many messages in
turn. What counts is the CPU of their processes a message: that of HTTP over the sum of the other two, the median of the rounds.
The messages go on to a sink, and what that costs the relay is in its figures.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks.run import Sink
from tests.support.daemon import free_port, wait_for
from tests.support.injecting import Injecting

CLIENTS = 16
TEXT = "Hello, this is one of the lines of text that this mail is made of\n" * 60
BODY = json.dumps(
    {"from": "Shop <shop@example.com>", "to": ["a@example.org"], "subject": "Your order 1234", "text": TEXT}
).encode()
MAIL = "From: Shop <shop@example.com>\nTo: a@example.org\nSubject: Your order 1234\n\n" + TEXT
BARE = """
import sys, uvloop
from aiohttp import web
async def answer(request):
    await request.read()
    return web.json_response({"id": "1M8MZJS770000"}, status=202)
app = web.Application()
app.router.add_post("/v1/messages", answer)
uvloop.install()
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
"""


async def by_smtp(port: int, count: int) -> None:
    """So many messages, with a connection each."""
    data = MAIL.replace("\n", "\r\n").encode() + b".\r\n"
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readline()
        writer.write(b"EHLO client.example\r\n")
        while (await reader.readline())[3:4] == b"-":
            pass
        for command in (b"MAIL FROM:<shop@example.com>\r\n", b"RCPT TO:<a@example.org>\r\n", b"DATA\r\n", data, b"QUIT\r\n"):
            writer.write(command)
            answer = await reader.readline()
            assert answer[:1] in b"23", answer
        writer.close()


async def by_http(port: int, count: int) -> None:
    """So many messages on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for _ in range(count):
        writer.write(head % len(BODY) + BODY)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 202 " in answer, answer
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.partition(b":")[2]))
    writer.close()


def spent(pids: list[int]) -> int:
    """CPU of the threads of processes (ns)."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


async def _burst(send: Callable[[int, int], Coroutine[Any, Any, None]], port: int, messages: int) -> None:
    await asyncio.gather(*(send(port, messages // CLIENTS) for _ in range(CLIENTS)))


def measure(messages: int, rounds: int) -> dict[str, Any]:
    """CPU a message (us) of each, round by round, and the ratios."""
    messages -= messages % CLIENTS
    rows: list[dict[str, float]] = []
    sink, port = Sink(), free_port()
    bare = subprocess.Popen([sys.executable, "-c", BARE, str(port)])
    try:
        with tempfile.TemporaryDirectory() as folder, Injecting(Path(folder), f"127.0.0.1:{sink.port}") as relay:
            pids, delivered = relay.worker_pids(), 0
            for number in range(-1, rounds):  # the first one is a warm-up
                row = {}
                for name, send, at, who in (
                    ("smtp", by_smtp, relay.port, pids), ("http", by_http, relay.http, pids), ("bare", by_http, port, [bare.pid]),
                ):  # fmt: skip
                    before = spent(who)
                    asyncio.run(_burst(send, at, messages))
                    if name != "bare":
                        delivered += messages
                        sample = 'relaymta_recipients_total{result="delivered"}'
                        wait_for(lambda: relay.metric(sample) >= delivered, 300, name)  # noqa: B023
                    row[name] = (spent(who) - before) / messages / 1000
                row["ratio"] = row["http"] / (row["smtp"] + row["bare"])
                if number >= 0:
                    rows.append(row)
    finally:
        bare.kill()
        bare.wait()
        sink.close()
    return {"messages": messages, "rounds": rows} | {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.messages, options.rounds)
    bare, ratio = found["bare"], found["ratio"]
    print(f"CPU a message of {len(MAIL):,} octets: SMTP, a connection each, {found['smtp']:.0f} us, HTTP {found['http']:.0f} us,")
    print(f"a bare aiohttp request {bare:.0f} us; HTTP / (SMTP + bare): {ratio:.2f}")
    print("ratios of the rounds: " + ", ".join(f"{row['ratio']:.2f}" for row in found["rounds"]))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
