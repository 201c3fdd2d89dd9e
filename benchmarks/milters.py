"""The same milter behind relaymta and behind Postfix: `python -m benchmarks.milters [--messages N] [--json FILE]`, as root.

"null": null_milter.c, which wants to see everything and changes nothing; "clamav": clamav-milter with clamd and two signatures.
Each is asked by Postfix with its defaults, by relaymta as the dialogue goes (`stage = "mail"`) and behind the final dot
("message"). What is told: messages a second, CPU of the relay a message, and the time from the final dot to the reply (ms) of one
client that sends meanwhile.
"""

import argparse
import json
import os
import smtplib
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.filters import null_milter
from benchmarks.run import Load, Postfix, Relaymta, Sink, measure
from tests.support.clamd import clamd
from tests.support.milters import clamav_milter

WARM_UP = 200


class Probe(threading.Thread):
    """A client with one message after the other, until it is stopped: how long each waits for the reply to its final dot."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.waited: list[float] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=60) as client:
            client.ehlo()
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self.stopped.wait(0.02):
                client.mail("a@b.example")
                client.rcpt("c@d.example")
                client.putcmd("data")
                client.getreply()
                client.send(b"Subject: x\r\n\r\nhello\r\n")
                began = time.perf_counter()
                client.send(b".\r\n")
                client.getreply()
                self.waited.append((time.perf_counter() - began) * 1000)


def through(relay: Relaymta | Postfix, load: Load) -> dict[str, float]:
    """One load, and what a client beside it sees."""
    try:
        measure(relay, Load("warm-up", WARM_UP, load.size, load.reuse))
        probe = Probe(relay.port)
        probe.start()
        found = measure(relay, load)
        probe.stopped.set()
        probe.join(60)
        waits = sorted(probe.waited)
        return found | {"p50": statistics.median(waits), "p99": waits[int(len(waits) * 0.99)]}
    finally:
        relay.close()


def sides(address: str) -> dict[str, Any]:
    """What makes each relay with this milter ("" for none), by name."""
    found: dict[str, Any] = {}
    milters = f"smtpd_milters={address}\n" if address else ""
    found["Postfix"] = lambda folder, sink: Postfix(folder, sink, milters)
    for stage in ("mail", "message"):
        keys = f'name="one",type="milter",address=["{address.removeprefix("inet:")}"],stage="{stage}",timeout="60s"'
        settings = (f"filter=[{{{keys}}}]",) if address else ()
        found[f"relaymta, {stage}"] = lambda folder, sink, given=settings: Relaymta(folder, sink, settings=given)
    return found


@contextmanager
def _clamav() -> Iterator[str]:
    with clamd() as scanner, clamav_milter(scanner.address) as one:
        one.path.chmod(0o666)
        yield one.address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=3000, help="of each load (default: 3000)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    arguments = parser.parse_args()
    if sys.platform != "linux" or os.geteuid():
        sys.exit("it reads /proc, and starts Postfix as root")
    rows = []
    for what, run in (("none", None), ("null", null_milter), ("clamav", _clamav)):
        with run() if run is not None else _nothing() as address:
            for name, make in sides(address).items():
                for reuse in (True, False):
                    load = Load("sessions reused" if reuse else "one connection a message", arguments.messages, reuse=reuse)
                    with tempfile.TemporaryDirectory() as folder:
                        sink = Sink()
                        try:
                            found = through(make(Path(folder), sink.port), load)
                        finally:
                            sink.close()
                    rows.append({"milter": what, "relay": name, "load": load.name} | found)
                    print(
                        f"{what}, {name}, {load.name}: {found['rate']:.0f} messages/s, {found['cpu_us']:.0f} us; dot to reply "
                        f"{found['p50']:.1f} ms, p99 {found['p99']:.1f}", flush=True,
                    )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


@contextmanager
def _nothing() -> Iterator[str]:
    yield ""


if __name__ == "__main__":
    main()
