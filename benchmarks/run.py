"""Speed of the relay beside its peers, in one run: `python -m benchmarks.run [--json FILE] [--scale X]`."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaymta.bench import peers
from relaymta.bench.processes import cpu_seconds
from tests.support.daemon import free_port, wait_for

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
TRIALS = 3


@dataclass(frozen=True)
class Load:
    """One run of smtp-source."""

    name: str
    messages: int
    size: int = 4096
    reuse: bool = True
    recipients: int = 1
    to: str = "c@d.example"

    def command(self, port: int) -> list[str]:
        flags = ["-d"] if self.reuse else []
        return [
            _program("smtp-source"), *flags, "-s", "50", "-m", str(self.messages), "-l", str(self.size),
            "-r", str(self.recipients), "-f", "a@b.example", "-t", self.to, f"127.0.0.1:{port}",
        ]  # fmt: skip


def _program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        sys.exit(f"{name} is missing: apt-get install postfix")
    return found


class Sink:
    """smtp-sink with `flags`."""

    def __init__(self, *flags: str, port: int = 0) -> None:
        self.port = port or free_port()
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [_program("smtp-sink"), *user, *flags, "-c", f"127.0.0.1:{self.port}", "1000"], stdout=subprocess.DEVNULL
        )
        time.sleep(0.3)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class Relaymta:
    """The relay with its default configuration and the smart host at port `sink` (0: `flags` say where mail goes);
    `delivered()` counts recipients."""

    name = "relaymta"

    def __init__(
        self,
        folder: Path,
        sink: int,
        workers: int = 1,
        settings: tuple[str, ...] = (),
        flags: tuple[str, ...] = (),
        listener: str = "",
        python: str = sys.executable,
    ) -> None:
        """`listener`: keys of its listener, as TOML. `python`: the interpreter with which this, or another, build runs."""
        self.port, self.metrics = free_port(), free_port()
        self.spool = folder / "spool"
        command = [
            python, "-P", "-m", "relaymta", "serve", "--spool", str(self.spool),
            "--set", f'listener=[{{address="127.0.0.1:{self.port}"{listener}}}]',
            "--workers", str(workers), "--set", f"metrics.listen=127.0.0.1:{self.metrics}",
            "--set", f"log.file={folder / 'relay.log'}", "--set", "hostname=relay.example", *flags,
            *(["--smarthost", f"127.0.0.1:{sink}"] if sink else []),
        ]  # fmt: skip
        for setting in settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(command, cwd=folder)  # nothing is imported from here
        self.root = self.process.pid
        wait_for(self._ready, 30, "the relay")

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            sys.exit("the relay has ended at its start")
        try:
            return (
                self.counter("relaymta_build_info") > 0
                and urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/health").status == 200
            )
        except OSError:
            return False

    def cli(self, *arguments: str) -> str:
        """What a command of the relay's CLI prints."""
        command = [sys.executable, "-m", "relaymta", *arguments, "--spool", str(self.spool)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def counter(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10).read().decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def delivered(self) -> float:
        return self.counter('relaymta_recipients_total{result="delivered"}')

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Postfix(peers.Postfix):
    """A private Postfix instance with its defaults, relaying to the sink. `settings`: more lines of its main.cf."""

    def __init__(self, folder: Path, sink: int, settings: str = "") -> None:
        super().__init__(folder, peers.Plan(peers.Load(), sink), settings)


def measure(relay: Relaymta | Postfix, load: Load) -> dict[str, float]:
    """One load through a relay: rate of acceptance, CPU per message once all is delivered."""
    before, start = cpu_seconds(relay.root), relay.delivered()
    began = time.monotonic()
    subprocess.run(load.command(relay.port), check=True, timeout=600)
    accepted = time.monotonic() - began
    expected = start + load.messages * load.recipients
    wait_for(lambda: relay.delivered() >= expected, 300, f"{load.name} through {relay.name}")
    ended = time.monotonic() - began
    spent = cpu_seconds(relay.root) - before
    return {"rate": load.messages / accepted, "end to end": load.messages / ended, "cpu_us": spent / load.messages * 1e6}


def direct(load: Load) -> dict[str, float]:
    """smtp-source straight to smtp-sink: what the two of them spend."""
    sink = Sink()
    try:
        before = os.times()
        sink_before = cpu_seconds(sink.process.pid)
        began = time.monotonic()
        subprocess.run(load.command(sink.port), check=True, timeout=600)
        wall = time.monotonic() - began
        after = os.times()
        source = after.children_user + after.children_system - before.children_user - before.children_system
        return {
            "rate": load.messages / wall,
            "cpu_us": (source + cpu_seconds(sink.process.pid) - sink_before) / load.messages * 1e6,
        }
    finally:
        sink.close()


def through(make: Callable[[Path, int], Relaymta | Postfix], load: Load) -> dict[str, float]:
    """One load through a fresh relay."""
    with tempfile.TemporaryDirectory() as folder:
        sink = Sink()
        try:
            relay = make(Path(folder), sink.port)
            try:
                warm = Load("warm-up", min(1000, load.messages), load.size, load.reuse)
                measure(relay, warm)
                return measure(relay, load)
            finally:
                relay.close()
        finally:
            sink.close()


def accept_only(load: Load) -> dict[str, float]:
    """One load into a relay whose smart host is down: everything stays in the queue."""
    with tempfile.TemporaryDirectory() as folder:
        relay = Relaymta(Path(folder), free_port())
        try:
            before, began = cpu_seconds(relay.root), time.monotonic()
            subprocess.run(load.command(relay.port), check=True, timeout=600)
            wall = time.monotonic() - began
            return {"rate": load.messages / wall, "cpu_us": (cpu_seconds(relay.root) - before) / load.messages * 1e6}
        finally:
            relay.close()


def beside(load: Load) -> dict[str, Any]:
    """One load through the bare peers, the relay and Postfix, one after the other."""
    row: dict[str, Any] = {"load": load.name, "messages": load.messages}
    row |= {"direct": direct(load), "relaymta": through(Relaymta, load)}
    if shutil.which("postfix", path=PATH) and os.geteuid() == 0:
        few = Load(load.name, max(200, load.messages // 10), load.size, load.reuse, load.recipients)
        row["Postfix"] = through(Postfix, few)
    return row


def workers_beside(load: Load) -> dict[str, Any]:
    """One load through one worker and through two."""
    row: dict[str, Any] = {"load": load.name, "messages": load.messages, "one worker": through(Relaymta, load)}
    return row | {"relaymta": through(lambda f, s: Relaymta(f, s, 2), load)}


def middle(trial: Callable[[], dict[str, Any]], peer: str) -> dict[str, Any]:
    """The middle one of TRIALS trials, by the relay's CPU beside a peer's: a machine that is shared is slow at times."""
    rows = [trial() for _ in range(TRIALS)]
    ratios = [row["relaymta"]["cpu_us"] / row[peer]["cpu_us"] for row in rows]
    found = rows[ratios.index(sorted(ratios)[TRIALS // 2])] | {"CPU ratio of each trial": ratios}
    print(json.dumps(found), flush=True)
    return found


def run(scale: float) -> list[dict[str, Any]]:
    """All loads."""
    loads = [
        Load("sessions reused, 4 kB", int(40_000 * scale)),
        Load("one connection a message, 4 kB", int(20_000 * scale), reuse=False),
        Load("200 kB", int(4_000 * scale), 200_000),
        Load("50 recipients, 4 kB", int(4_000 * scale), recipients=50),
    ]
    rows = [middle(lambda load=load: beside(load), "direct") for load in loads]  # type: ignore[misc]
    two = Load("sessions reused, 4 kB, two workers", int(40_000 * scale))
    rows.append(middle(lambda: workers_beside(two), "one worker"))
    only = Load("accepted only, sessions reused, 4 kB", int(40_000 * scale))
    rows.append({"load": only.name, "messages": only.messages, "relaymta": accept_only(only)})
    print(json.dumps(rows[-1]), flush=True)
    return rows


def ledger(seconds: float) -> dict[str, float]:
    """The ledger run."""
    command = [sys.executable, "-m", "benchmarks.ledger", "--seconds", str(seconds)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of messages")
    arguments = parser.parse_args()
    found = {"rows": run(arguments.scale), "ledger": ledger(20 * arguments.scale)}
    from benchmarks.report import tables

    print(tables(found))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
