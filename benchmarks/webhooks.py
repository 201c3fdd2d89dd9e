"""What webhooks cost mail, and whether all events arrive: `python -m benchmarks.webhooks [--pairs N] [--events N] [--json FILE]`.

cost     two relays, one of which has a webhook: the same load in turn, in bursts; each pair is one burst through each, the one
         and the other first. The ratios (with / without) are medians of the pairs, with the quartiles: of messages a second
         until all were delivered, of CPU per message of the workers, and of the relay's whole tree of processes, that of the one
         that reports included. The consumer, smtp-source and smtp-sink share the machine.
trouble  a relay of two workers takes `--events` / 2 messages while its consumer answers 500 for a minute, then is dead for
         another, and a worker is killed every ten seconds. Then all events have to be there: each message's in order, each
         shard's numbers without a gap, and one end for each message that was acknowledged.
"""

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import signal
import smtplib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.run import Load, Relaymta, Sink
from relaymta.bench.processes import cpu_seconds
from relaymta.ident import parse_id, shard_of
from tests.support.daemon import free_port, wait_for

WARM_UP = 2  # pairs before it counts
TROUBLE_SECONDS = 60.0  # of 500, and of being dead
KILL_SECONDS = 10.0
CLIENTS = 4


async def consume(port: int, ledger: str) -> None:
    """Take events, and write a line for each; answer 500 while there is the file LEDGER.fail."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                good = not os.path.exists(ledger + ".fail")  # noqa: ASYNC240
                if good:
                    file.writelines(f"{one['id']} {one['event']} {one['recipient']}\n" for one in json.loads(body)["events"])
                    file.flush()
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % (b"200 OK" if good else b"500 No"))

    with open(ledger, "a") as file:  # noqa: ASYNC230 (once, before it serves)
        server = await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 22)
        await server.serve_forever()


class Consumer:
    """A process that takes events."""

    def __init__(self, folder: Path) -> None:
        self.port, self.ledger = free_port(), folder / "events"
        secret = folder / "webhook-secret"
        secret.write_text("whsec_" + base64.b64encode(os.urandom(32)).decode())
        self.setting = f'webhook=[{{name="consumer", url="http://127.0.0.1:{self.port}/", secret_file="{secret}", private=true}}]'
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.webhooks", "--consume", str(self.port), "--ledger", str(self.ledger)]
        self.process = subprocess.Popen(command)

    def fail(self, failing: bool) -> None:
        """Answer 500, or not any more."""
        mark = Path(f"{self.ledger}.fail")
        mark.touch() if failing else mark.unlink()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def events(self) -> list[list[str]]:
        """(id, event, recipient) of each event, once, in the order in which they came first."""
        rows = (line.split() for line in self.ledger.read_text().splitlines())
        return list({row[0]: row for row in rows if len(row) == 3}.values())


# What it costs


class Side:
    """A relay, and the sink behind it."""

    def __init__(self, folder: Path, consumer: Consumer | None) -> None:
        folder.mkdir()
        self.sink = Sink()
        self.relay = Relaymta(folder, self.sink.port, settings=(consumer.setting,) if consumer is not None else ())
        self.workers = [int(row["pid"]) for row in json.loads(self.relay.cli("status", "--json"))["workers"]]

    def burst(self, load: Load) -> tuple[float, float, float]:
        """(messages a second, CPU of the workers per message in us, CPU of all of its processes)."""

        def spent() -> tuple[float, float]:
            return sum(map(cpu_seconds, self.workers)), cpu_seconds(self.relay.root)

        before, expected, began = spent(), self.relay.delivered() + load.messages, time.monotonic()
        subprocess.run(load.command(self.relay.port), check=True, timeout=600)
        wait_for(lambda: self.relay.delivered() >= expected, 300, load.name)
        seconds = time.monotonic() - began
        time.sleep(1.0)  # the last events are sent
        own, whole = (1e6 * (now - then) / load.messages for now, then in zip(spent(), before, strict=True))
        return load.messages / seconds, own, whole

    def close(self) -> None:
        self.relay.close()
        self.sink.close()


def cost(folder: Path, pairs: int, messages: int) -> dict[str, Any]:
    """The pairs, and the median ratios."""
    consumer = Consumer(folder)
    sides = [Side(folder / "with", consumer), Side(folder / "without", None)]
    load = Load("sessions reused, 4 kB", messages)
    rows = []
    try:
        for number in range(-WARM_UP, pairs):
            found = {side: side.burst(load) for side in (sides if number % 2 else sides[::-1])}
            if number >= 0:
                rows.append([found[side] for side in sides])
    finally:
        for side in sides:
            side.close()
        consumer.kill()
    told = {"rate": 0, "workers": 1, "all": 2}
    ratios = {name: [with_[at] / without[at] for with_, without in rows] for name, at in told.items()}
    figures = {name: [statistics.median(row[side][at] for row in rows) for side in (0, 1)] for name, at in told.items()}
    return {"pairs": rows, "figures": figures, "ratios": {name: statistics.quantiles(one, n=4) for name, one in ratios.items()}}


# Whether all arrives


class Mail:
    """Clients that send messages, each to a recipient of its own, and note which were acknowledged."""

    def __init__(self, port: int, messages: int) -> None:
        self.port, self.messages = port, messages
        self.acked: list[str] = []
        self._numbers = itertools.count()
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        text = b"Subject: x\r\n\r\n" + b"x" * 2000 + b"\r\n"
        while True:
            with contextlib.suppress(OSError, smtplib.SMTPException), smtplib.SMTP("127.0.0.1", self.port, timeout=60) as client:
                while len(self.acked) < self.messages:
                    to = f"r{next(self._numbers)}@d.example"
                    client.sendmail("a@b.example", [to], text)
                    self.acked.append(to)
                return

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def trouble(folder: Path, events: int, seconds: float) -> dict[str, Any]:
    """Run it; what came. AssertionError where an event is missing, comes out of order, or is made up."""
    consumer, sink = Consumer(folder), Sink()
    relay = Relaymta(folder, sink.port, workers=2, settings=(consumer.setting,))
    chosen, kills, began = random.Random(1), 0, time.monotonic()
    consumer.fail(True)
    try:
        mail = Mail(relay.port, events // 2)
        while (passed := time.monotonic() - began) < 2 * seconds:
            if passed > seconds and consumer.process.poll() is None:
                consumer.fail(False)
                consumer.kill()
            time.sleep(min(KILL_SECONDS, 2 * seconds - passed))
            ready = [row["pid"] for row in json.loads(relay.cli("status", "--json"))["workers"] if row["ready"]]
            os.kill(chosen.choice(ready), signal.SIGKILL)
            kills += 1
        behind = json.loads(relay.cli("webhook", "list", "--json"))["lag_events"]
        consumer.start()
        again = time.monotonic()
        mail.join()
        wait_for(lambda: relay.cli("queue", "summary", "--json") == "", 600, "the queue to be empty")
        wait_for(lambda: json.loads(relay.cli("webhook", "list", "--json"))["lag_events"] == 0, 600, "the events")
        caught_up = time.monotonic() - again
        found = consumer.events()
    finally:
        relay.close()
        sink.close()
        consumer.kill()
    checked(found, set(mail.acked))
    return {"events": len(found), "acknowledged": len(mail.acked), "kills": kills, "behind": behind, "seconds": caught_up}


def checked(found: list[list[str]], acked: set[str]) -> None:
    """AssertionError where an event is missing, out of order, or made up."""
    numbers: dict[int, int] = {}
    words: dict[str, list[str]] = {}
    for ident, event, recipient in found:
        message, _, number = ident.partition("-")
        shard = shard_of(parse_id(message))
        assert int(number) == numbers.get(shard, 0), f"{ident}: not the next one of its shard"
        numbers[shard] = int(number) + 1
        words.setdefault(recipient, []).append(event)
    assert acked <= words.keys(), "an acknowledged message has no event"
    wrong = {to: told for to, told in words.items() if not (told[0] == "accepted" and told[-1] == "delivered")}
    assert not wrong, f"{len(wrong)} messages: {next(iter(wrong.items()))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of bursts (default: 20)")
    parser.add_argument("--messages", type=int, default=6000, help="messages of a burst (default: 6000)")
    parser.add_argument("--events", type=int, default=100_000, help="events in trouble (default: 100000)")
    parser.add_argument("--seconds", type=float, default=TROUBLE_SECONDS, help="of each trouble (default: 60)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    parser.add_argument("--consume", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ledger", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.consume:
        asyncio.run(consume(arguments.consume, arguments.ledger))
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.pairs:
            result["cost"] = found = cost(Path(folder), arguments.pairs, arguments.messages)
            for name, (low, middle, high) in found["ratios"].items():
                one, other = found["figures"][name]
                print(f"{name}: {one:,.0f} with, {other:,.0f} without, ratio {middle:.3f} (quartiles {low:.3f} and {high:.3f})")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.events:
            result["trouble"] = row = trouble(Path(folder), arguments.events, arguments.seconds)
            print(
                f"trouble: {row['events']:,} events, all in order, after {row['kills']} kills; {row['behind']:,} behind at its "
                f"end, none {row['seconds']:.0f} s later (mail had gone on meanwhile)"
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
