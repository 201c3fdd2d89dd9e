"""What looking costs: `python -m benchmarks.watched [--pairs N] [--messages N] [--json FILE]`.

One relay under full load, in turn with and without those who look: a scrape of /metrics every five seconds (Prometheus: 15), the
administrator's page in a browser (its figures every five seconds, as it asks for them, and the page itself), and a trace of one
client that sends a message ten times a second. Each pair is two bursts of the same load one after the other; the first of them
is the watched one in every other pair.

rate  messages a second, watched beside not; the median of the pairs, with the quartiles. The bursts share the machine with
      smtp-source, smtp-sink and the lookers themselves
cpu   CPU of the relay's processes per message, in the same way; that of the page's process and of the supervisor included
idle  what the lookers cost a relay that does nothing else: CPU seconds of its processes a second. As a share of the machine's
      it says what the ratios, which are noisier than what they measure, can hardly show
"""

import argparse
import contextlib
import http.client
import json
import os
import smtplib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.run import Load, Relaymta, Sink
from relaymta.bench.processes import cpu_seconds
from tests.support.daemon import free_port, wait_for

SCRAPE, PAGE, TRICKLE = 5.0, 5.0, 0.1  # seconds between two of them
CLIENT = "127.0.0.9"  # whom the trace follows
WARM_UP = 2  # pairs before it counts
IDLE_SECONDS = 20


class Page:
    """A browser at the page: logged in, it asks for the figures every five seconds, and for the page each minute."""

    def __init__(self, relay: Relaymta, port: int) -> None:
        self.port = port
        token = json.loads(relay.cli("token", "create", "--name", "page", "--scope", "read", "--json"))["token"]
        answer = self._asked("POST", "/login", urlencode({"token": token}))
        self.cookie = str(answer.getheader("Set-Cookie")).partition(";")[0]
        self.asked = 0

    def look(self) -> None:
        """Ask once; AssertionError when it is not shown."""
        path = "/now" if self.asked % 12 else "/"
        answer = self._asked("GET", path, cookie=self.cookie)
        assert answer.status == 200, (answer.status, path)
        self.asked += 1

    def _asked(self, method: str, path: str, body: str = "", cookie: str = "") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        form = "application/x-www-form-urlencoded"
        headers = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": form, "Cookie": cookie}
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer


class Trickle:
    """The client that is traced: a session, and a message now and then."""

    def __init__(self, port: int) -> None:
        self.session = smtplib.SMTP("127.0.0.1", port, source_address=(CLIENT, 0))

    def look(self) -> None:
        """One message more."""
        self.session.sendmail("a@b.example", ["c@d.example"], b"Subject: traced\r\n\r\nhello\r\n")


def every(seconds: float, work: Callable[[], Any], done: threading.Event) -> threading.Thread:
    """Do it at once, and so often until the event."""

    def run() -> None:
        while True:
            work()
            if done.wait(seconds):
                return

    thread = threading.Thread(target=run)
    thread.start()
    return thread


class Looked:
    """A relay, and those who look at it."""

    def __init__(self, folder: Path) -> None:
        self.sink = Sink()
        admin = free_port()
        self.relay = Relaymta(folder, self.sink.port, settings=(f"admin.listen=127.0.0.1:{admin}",))
        self.page, self.trickle = Page(self.relay, admin), Trickle(self.relay.port)
        self.folder = folder
        self.lines = self.scrapes = self.octets = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """All of them look."""
        done, found = threading.Event(), self.folder / "trace"
        command = [sys.executable, "-m", "relaymta", "trace", "in", "--client", CLIENT, "--spool", str(self.relay.spool)]
        with found.open("wb") as file:
            trace = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        wait_for(lambda: self._traced(found), 30, "the trace")
        looking = [every(SCRAPE, self._scrape, done), every(PAGE, self.page.look, done), every(TRICKLE, self.trickle.look, done)]
        try:
            yield
        finally:
            done.set()
            for thread in looking:
                thread.join()
            trace.terminate()
            trace.wait(30)
            self.lines += found.read_bytes().count(b"\n")

    def _traced(self, found: Path) -> bool:
        self.trickle.look()
        return found.stat().st_size > 0

    def _scrape(self) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.relay.metrics}/metrics", timeout=30) as answer:
            self.octets = len(answer.read())
        self.scrapes += 1

    def burst(self, load: Load, watched: bool) -> tuple[float, float]:
        """Messages a second, and CPU seconds of the relay's processes per message."""
        with self.watched() if watched else contextlib.nullcontext():
            before, expected = cpu_seconds(self.relay.root), self.relay.delivered() + load.messages
            began = time.monotonic()
            subprocess.run(load.command(self.relay.port), check=True, timeout=600)
            took = time.monotonic() - began
            wait_for(lambda: self.relay.delivered() >= expected, 300, load.name)
            spent = cpu_seconds(self.relay.root) - before
        return load.messages / took, spent / load.messages

    def idle(self) -> float:
        """CPU seconds a second that the lookers cost, and nothing else is done."""
        spent = []
        for watched in (True, False):
            with self.watched() if watched else contextlib.nullcontext():
                before = cpu_seconds(self.relay.root)
                time.sleep(IDLE_SECONDS)
                spent.append((cpu_seconds(self.relay.root) - before) / IDLE_SECONDS)
        return spent[0] - spent[1]

    def close(self) -> None:
        self.trickle.session.close()
        self.relay.close()
        self.sink.close()


def middle(values: list[float]) -> dict[str, float]:
    """The median, with the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "lower": round(low, 4), "upper": round(high, 4)}


def run(messages: int, pairs: int) -> dict[str, Any]:
    """The pairs of one relay."""
    load = Load("sessions reused, 4 kB", messages)
    with tempfile.TemporaryDirectory() as name:
        looked = Looked(Path(name))
        rows = []
        try:
            for number in range(-WARM_UP, pairs):
                order = (True, False) if number % 2 else (False, True)
                found = {watched: looked.burst(load, watched) for watched in order}
                if number >= 0:
                    rows.append(found)
            idle = looked.idle()
            looking = {
                "idle": idle, "idle, share of the machine": idle / (os.cpu_count() or 1), "scrapes": looked.scrapes,
                "octets of a scrape": looked.octets, "asked of the page": looked.page.asked, "lines of the trace": looked.lines,
            }  # fmt: skip
        finally:
            looked.close()
    return {
        "pairs": pairs, "messages of a burst": messages, "rate, not watched": statistics.median(row[False][0] for row in rows),
        "cpu us, not watched": statistics.median(row[False][1] for row in rows) * 1e6,
        "rate": middle([row[True][0] / row[False][0] for row in rows]),
        "cpu": middle([row[True][1] / row[False][1] for row in rows]),
    } | looking  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="default: 30")
    parser.add_argument("--messages", type=int, default=30_000, help="of a burst (default: 30,000)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file, too")
    options = parser.parse_args()
    found = json.dumps(run(options.messages, options.pairs), indent=1)
    print(found)
    if options.json:
        Path(options.json).write_text(found)


if __name__ == "__main__":
    main()
