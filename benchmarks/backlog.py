"""A backlog has no lasting cost: `python -m benchmarks.backlog [--messages N] [--spread SECONDS]`.

Loads N messages of 4 kB into a spool, next attempts spread at random, then measures with the running relay: time from start to
the first banner, memory of the worker beside an empty one's, `queue summary`, `queue list --json` of everything; drains; and
compares CPU per message of fresh mail before and after.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.run import Load, Relaymta, Sink, cpu_seconds, measure
from relaymta.disk.segments import COLD
from relaymta.proto.envelope import Envelope, Placement, QueueName
from relaymta.queue import Events, Null, Queue, QueueSettings, wall_ms
from relaymta.queue.change import Change
from tests.support.daemon import wait_for

MESSAGE = b"Received: from x\r\nSubject: backlog\r\n\r\n" + b"x" * 4050 + b"\r\n"

BACKLOG = QueueName("smarthost", "")


async def fill(spool: Path, messages: int, spread: float, shard: int = 0, name: QueueName = BACKLOG) -> None:
    """Put messages into a shard as if each had been deferred once."""
    queue = Queue(spool, shard, QueueSettings("bench"), lambda envelope, attempts: [(name, None)], Null(), Events())
    await queue.start()
    queue.entries.paused = True

    def slice_of(change: Change) -> None:
        row = change.row(name)
        now = queue.clock.now()
        for _ in range(1000):
            ident = queue.ident()
            envelope = Envelope("a@b.example", ["c@d.example"], len(MESSAGE), 0, wall_ms(), queue.deadline(), "127.0.0.1", "x",
                                name.application, name.priority)  # fmt: skip
            envelope.body = queue.segments.append(ident, [MESSAGE], len(MESSAGE), COLD)
            envelope.placements = [Placement(row.number, now + 15_000 + int(random.random() * spread * 1000), 1)]
            change.put(ident, envelope, [row])
            row.deferred += 1
        queue.segments.write()
        queue.segments.sync()

    for _ in range(messages // 1000):
        await queue.writer.task(slice_of)
    await queue.stop()


def anonymous(pid: int) -> int:
    """RssAnon of a process, kB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def worker_of(relay: Relaymta) -> int:
    return int(subprocess.run(["pgrep", "-P", str(relay.root)], capture_output=True, text=True, check=True).stdout.split()[0])


def timed_cli(spool: Path, *arguments: str) -> tuple[float, bytes]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "relaymta", *arguments, "--spool", str(spool)], capture_output=True, check=True)
    return time.monotonic() - began, done.stdout


def start_timed(folder: Path, sink: int) -> tuple[Relaymta, float]:
    """A relay on the folder's spool, and the seconds from exec to its first 220."""
    made = Relaymta.__new__(Relaymta)
    began = time.monotonic()
    banner: list[float] = []

    original = Relaymta._ready

    def ready(self: Relaymta) -> bool:
        if not banner:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                    if sock.recv(3) == b"220":
                        banner.append(time.monotonic() - began)
            except OSError:
                return False
        return original(self)

    Relaymta._ready = ready  # type: ignore[method-assign]
    try:
        made.__init__(folder, sink)  # type: ignore[misc]
    finally:
        Relaymta._ready = original  # type: ignore[method-assign]
    return made, banner[0]


def run(messages: int, spread: float) -> dict[str, object]:
    """Fill, start, measure, drain, measure again."""
    found: dict[str, object] = {"messages": messages, "spread": spread}
    fresh = Load("fresh", 20_000)
    sink = Sink()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        relay, found["start empty s"] = start_timed(folder, sink.port)
        measure(relay, Load("warm", 2000))
        empty = anonymous(worker_of(relay))
        found["cpu before us"] = measure(relay, fresh)["cpu_us"]
        relay.close()
        began = time.monotonic()
        uvloop.run(fill(folder / "spool", messages, spread))
        found["load s"] = time.monotonic() - began
        relay, found["start full s"] = start_timed(folder, sink.port)
        time.sleep(3)
        found["summary s"], _ = timed_cli(folder / "spool", "queue", "summary", "--json")
        size = (folder / "spool/shard-0/lmdb/data.mdb").stat().st_size
        found["list s"], text = timed_cli(folder / "spool", "queue", "list", "--json")
        found["listed"] = text.count(b"\n")
        found["map grown by listing, MB"] = ((folder / "spool/shard-0/lmdb/data.mdb").stat().st_size - size) / 1e6
        found["worker RssAnon over an empty one's, MB"] = (anonymous(worker_of(relay)) - empty) / 1000
        spent = cpu_seconds(relay.root)
        start = relay.delivered()
        wait_for(lambda: relay.counter("relaymta_queue_messages") == 0, spread + 600, "the backlog to drain")
        found["drain cpu us"] = (cpu_seconds(relay.root) - spent) / max(1, relay.delivered() - start) * 1e6
        found["most RssAnon over an empty one's while draining, MB"] = (anonymous(worker_of(relay)) - empty) / 1000
        found["cpu after us"] = measure(relay, fresh)["cpu_us"]
        found["segments left, MB"] = relay.counter("relaymta_segment_octets") / 1e6
        relay.close()
    sink.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--spread", type=float, default=300.0)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.messages, arguments.spread), indent=1))


if __name__ == "__main__":
    main()
