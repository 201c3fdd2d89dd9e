"""A relay under a modest load and every kind of disturbance: `python -m benchmarks.soak [--minutes N] [--rate N]`.

Two workers deliver to 2,000 domains on 200 MX sites. A share of the mail is deferred, rejected, or never accepted. Meanwhile
operators hold, release, flush, bounce, delete and suspend; the configuration is reloaded; the queue sweeps every minute; a worker
is killed every minute (in the second half always the same one, so that the other's memory can be compared over a long time).

Prints a table, and exits with 1 when a condition does not hold: every acknowledged message was delivered, bounced or deleted;
what was delivered twice was in doubt; the queue's counts are what is in it, and 0 at the end; memory and descriptors do not grow.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from relaymta import control
from relaymta.memory import anonymous
from tests.support.daemon import Relay, free_port
from tests.support.resolver import nameserver_with
from tests.support.source import Source

DOMAINS, SITES, WORKERS, CLIENTS = 2000, 200, 2, 10
SIZE = 4096
KINDS = {"x": 84, "later": 8, "no": 4, "never-bounced": 2, "never-deleted": 2}  # local parts, and their shares in per cent
OPERATOR_SECONDS, SAMPLE_SECONDS, KILL_SECONDS, RELOAD_SECONDS = 3.0, 5.0, 60.0, 20.0
SWEEP_TICKS = 60 * 20
CALL_SECONDS = 60.0  # that a request or a command of the CLI may take
DRAIN_SECONDS = 300.0
DEATH_SECONDS = 10.0  # what was delivered so long before a worker's death may not have been recorded
GROWTH, LEAST_OCTETS, LEAST_DESCRIPTORS = 0.1, 8 << 20, 40  # that is not a leak: a share, or so much
SETTLE_SECONDS = 300.0  # of a process, until it has its caches, pools and connections

# The worker of this relay sweeps every minute; there is no setting for it.
_RELAY = f"""
import relaymta.control
was = relaymta.control.program
def program(module, *arguments):
    *command, boot, argument = was(module, *arguments)
    if module == "relaymta.worker":
        sweep = "import relaymta.queue; assert relaymta.queue.SWEEP_TICKS; relaymta.queue.SWEEP_TICKS = {SWEEP_TICKS}; "
        boot = boot.replace("from relaymta.worker", sweep + "from relaymta.worker")
        assert sweep in boot
    return [*command, boot, argument]
relaymta.control.program = program
from relaymta.cli import main
main()
"""


class SweepingRelay(Relay):
    """A relay whose workers sweep every minute."""

    def command(self) -> list[str]:
        found = super().command()
        place = found.index("-m")
        return [*found[:place], "-c", _RELAY, *found[place + 2 :]]

    def ask(self, op: str, **args: Any) -> Any:
        """A request by the control socket."""
        return control.ask(self.spool / "control.sock", op, **args)

    def sample(self, name: str) -> float:
        """The sum of a metric's samples."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=CALL_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


class PacedSource(Source):
    """Sends `rate` messages a second to the domains. `recipient`: of each message."""

    def __init__(self, port: Callable[[], int], rate: float) -> None:
        super().__init__(port, CLIENTS, SIZE)
        self.recipient: dict[str, str] = {}
        self._interval = CLIENTS / rate

    async def pause(self) -> None:
        await asyncio.sleep(random.uniform(0, 2 * self._interval))

    def envelope(self, ident: str) -> tuple[str, str]:
        local = random.choices(list(KINDS), list(KINDS.values()))[0]
        kind, _, verb = local.partition("-")
        domain = f"{verb}.test" if verb else f"d{random.randrange(DOMAINS)}.test"
        self.recipient[ident] = f"{kind}-{ident}@{domain}"
        return f"from-{ident}@d{random.randrange(DOMAINS)}.test", self.recipient[ident]


@dataclass(frozen=True)
class Sample:
    """A process at a moment: anonymous memory (octets), descriptors, and when it was seen first."""

    memory: int
    descriptors: int
    since: float


@dataclass
class Soak:
    """One run, and what was seen in it. Times are time.monotonic()."""

    relay: SweepingRelay
    source: PacedSource
    until: float
    began: float = field(default_factory=time.monotonic)
    kills: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[tuple[float, dict[str, "Sample"]]] = field(default_factory=list)
    in_doubt: float = 0.0
    others: list[tuple[float, int]] = field(default_factory=list)  # descriptors of the workers that are no connections
    _since: dict[int, float] = field(default_factory=dict)

    def half(self) -> float:
        """When the second half begins."""
        return (self.began + self.until) / 2

    def attempt(self, what: str, call: Callable[[], object]) -> None:
        """Something that an operator does. That it fails while a worker is replaced is no fault; that it takes too long is."""
        began = time.monotonic()
        try:
            call()
            self.done[what] += 1
        except (subprocess.CalledProcessError, control.Refused, OSError) as error:
            near = any(began - 5 < kill < time.monotonic() + 5 for kill in self.kills)
            self.done[what + " (failed)"] += 1
            if not near:
                text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
                self.faults.append(f"{what}: {text.strip()[-300:]}")
        except subprocess.TimeoutExpired:
            self.faults.append(f"{what}: no answer in time")
        if time.monotonic() - began > CALL_SECONDS:
            self.faults.append(f"{what} took {time.monotonic() - began:.0f} s")

    # The disturbances, each in a thread

    def operate(self) -> None:
        """One verb after the other, over and over."""
        cli = self.relay.cli
        some = f"d{random.randrange(DOMAINS)}.test"
        verbs: list[tuple[str, ...]] = [
            ("queue", "hold", "--domain", "bounced.test"),
            ("queue", "delete", "--domain", "deleted.test"),
            ("policy", "hold", "--domain", some, "--for", "20s"),
            ("queue", "flush", "--all"),
            ("queue", "release", "--all"),
            ("queue", "bounce", "--domain", "bounced.test"),
            ("queue", "hold", "--all"),
            ("queue", "summary"),
            ("queue", "release", "--all"),
            ("queue", "list", "--held"),
            ("shaping", "active"),
        ]
        for verb in verbs:
            if self._over(OPERATOR_SECONDS):
                return
            self.attempt(" ".join(verb[:2]), lambda verb=verb: cli(*verb))  # type: ignore[misc]
        names = [row["site"] for row in self.relay.sites()[:50]]
        if names:
            name = random.choice(names)
            self.attempt("site suspend", lambda: cli("site", "suspend", name, "--for", "10s"))

    def _over(self, pause: float) -> bool:
        """Wait; whether the time is over."""
        time.sleep(min(pause, max(0.0, self.until - time.monotonic())))
        return time.monotonic() >= self.until

    def kill(self) -> None:
        """kill -9 of a worker."""
        if self._over(KILL_SECONDS * random.uniform(0.8, 1.2)):
            return
        number = WORKERS - 1 if time.monotonic() > self.half() else random.randrange(WORKERS)
        pids = self.pids()
        if f"worker {number}" in pids:
            self.kills.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[f"worker {number}"], signal.SIGKILL)
            self.done["kill -9"] += 1

    def reload(self) -> None:
        """Read the configuration again."""
        if not self._over(RELOAD_SECONDS):
            self.attempt("reload", lambda: self.relay.ask("reload"))

    def look(self) -> None:
        """Note memory and descriptors."""
        if self._over(SAMPLE_SECONDS):
            return
        found, now = {}, time.monotonic()
        for name, pid in self.pids().items():
            with contextlib.suppress(OSError):
                since = self._since.setdefault(pid, now)
                found[name] = Sample(anonymous(pid), len(os.listdir(f"/proc/{pid}/fd")), since)
        self.samples.append((now, found))
        with contextlib.suppress(OSError):
            self.in_doubt = max(self.in_doubt, self.relay.sample("relaymta_in_doubt_total"))
            connections = self.relay.sample("relaymta_sessions ") + self.relay.sample("relaymta_connections ")
            workers = [one for name, one in found.items() if name != "supervisor" and one.since < now - SAMPLE_SECONDS]
            if len(workers) == WORKERS:
                self.others.append((now, int(sum(one.descriptors for one in workers) - connections)))

    def pids(self) -> dict[str, int]:
        """The relay's processes by name."""
        try:
            status = self.relay.ask("status")
        except (OSError, control.Refused):
            return {}
        ready = {f"worker {row['worker']}": row["pid"] for row in status["workers"] if row["ready"] and "pid" in row}
        return {"supervisor": status["pid"]} | ready

    def run(self) -> None:
        """All of it until the time is over."""

        def over_and_over(act: Callable[[], None]) -> None:
            while time.monotonic() < self.until:
                try:
                    act()
                except Exception as error:  # the table says it, and the run fails
                    self.faults.append(f"{act.__name__}: {type(error).__name__}: {error}")
                    time.sleep(1)

        acts = (self.operate, self.kill, self.reload, self.look)
        threads = [threading.Thread(target=over_and_over, args=(act,), daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        uvloop.run(self.source.run(lambda: time.monotonic() >= self.until))
        for thread in threads:
            thread.join(2 * CALL_SECONDS)
            if thread.is_alive():
                self.faults.append("a disturbance does not end")

    # The end

    def counted(self) -> tuple[int, int]:
        """With all mail held: (messages by the queue's counts, messages that are listed)."""
        until = time.monotonic() + DRAIN_SECONDS
        self.relay.cli("queue", "hold", "--all")
        while time.monotonic() < until:
            summary, listed = sum(row["messages"] for row in self.relay.ask("summary")), self.relay.cli("queue", "list", "--json")
            again = sum(row["messages"] for row in self.relay.ask("summary"))
            if summary == again:  # nothing changed meanwhile
                return summary, len(listed.stdout.splitlines())
            time.sleep(0.5)
            self.relay.cli("queue", "hold", "--all")
        return -1, 0

    def drain(self) -> tuple[float, float]:
        """Let all mail end; (messages by `queue summary`, by the metric) that are left."""
        until = time.monotonic() + DRAIN_SECONDS
        left = 1
        while left and time.monotonic() < until:
            for verb in (("delete", "--domain", "deleted.test"), ("bounce", "--domain", "bounced.test"), ("release", "--all"),
                         ("flush", "--all")):  # fmt: skip
                self.attempt("drain", functools.partial(self.relay.cli, "queue", *verb))
            time.sleep(2)
            left = sum(row["messages"] for row in self.relay.ask("summary"))
        time.sleep(3)
        self.in_doubt = self.relay.sample("relaymta_in_doubt_total")
        return left, self.relay.sample("relaymta_queue_messages")


def growth(points: list[tuple[float, int]]) -> tuple[float, float]:
    """(mean, how much the line of least squares rises from the first point to the last)."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y, slope * (points[-1][0] - points[0][0])


def account(soak: Soak, records: list[tuple[str, str, list[str], float]]) -> Iterator[tuple[str, object, bool]]:
    """(What, value, whether the condition holds) for the ledger."""
    source = soak.source
    delivered: dict[str, list[float]] = {}
    notified: dict[str, list[float]] = {}
    digests: dict[str, str] = {}
    for ident, digest, to, at in records:
        local = to[0].partition("@")[0]
        if local.startswith("from-"):
            notified.setdefault(local.removeprefix("from-"), []).append(at)
        else:
            delivered.setdefault(ident, []).append(at)
            digests[ident] = digest
    acknowledged = source.acknowledged
    deleted = {ident for ident in acknowledged if source.recipient[ident].endswith("@deleted.test")}
    lost = [ident for ident in acknowledged if ident not in delivered and ident not in notified and ident not in deleted]
    altered = [ident for ident, digest in acknowledged.items() if digests.get(ident, digest) != digest]
    wrong = [ident for ident in delivered if ident in notified]
    doubled = [times for where in (delivered, notified) for times in where.values() if len(times) > 1]
    unexplained = [times for times in doubled if not any(times[0] - 1 < kill < times[0] + DEATH_SECONDS for kill in soak.kills)]
    yield "messages acknowledged", len(acknowledged), bool(acknowledged)
    yield "... delivered", len(set(delivered) & set(acknowledged)), True
    yield "... bounced, with a DSN", len(set(notified) & set(acknowledged)), True
    yield "... deleted by an operator, at most", len(deleted), True
    yield "... lost", len(lost), not lost
    yield "... altered", len(altered), not altered
    yield "... delivered and bounced", len(wrong), not wrong
    yield "... delivered twice", len(doubled), True
    yield "... of these not at a worker's death; in doubt", (len(unexplained), soak.in_doubt), len(unexplained) <= soak.in_doubt
    yield "refused, failed connections", (source.refused, source.failed_connects), True
    yield "slowest banner (s)", f"{source.slowest_banner:.1f}", source.slowest_banner < CALL_SECONDS


def flat(soak: Soak) -> Iterator[tuple[str, object, bool]]:
    """The same for memory and descriptors, over the second half, of each process that is not new. What must not rise of the
    workers are their descriptors beside the connections: how many of these there are follows from what the sites accept, and
    from the load of the machine."""
    for name in sorted({name for _, found in soak.samples for name in found}):
        settled = [
            (at, found[name])
            for at, found in soak.samples
            if at > soak.half() and name in found and at > found[name].since + SETTLE_SECONDS
        ]
        yield rise(f"{name}: anonymous memory (MB)", [(at, one.memory) for at, one in settled], LEAST_OCTETS, 1 << 20)
        what, seen, good = rise(f"{name}: descriptors", [(at, one.descriptors) for at, one in settled], LEAST_DESCRIPTORS, 1)
        yield what, seen, good or name != "supervisor"
    others = [point for point in soak.others if point[0] > soak.half()]
    yield rise("workers: descriptors beside connections", others, LEAST_DESCRIPTORS, 1)


def rise(what: str, points: list[tuple[float, int]], least: int, unit: int) -> tuple[str, object, bool]:
    """A row: the mean of a measure, and its rise, which must not exceed `least` and GROWTH of the mean."""
    if len(points) < 6:
        return what, "no process is old enough", True
    mean, more = growth(points)
    return f"{what}, and its rise", f"{mean / unit:.1f} {more / unit:+.1f}", more <= max(least, GROWTH * mean)


def soaked(minutes: float, rate: float) -> list[tuple[str, object, bool]]:
    """The whole run."""
    records = [f"d{n}.test. MX 10 mx{n % SITES}.pool{n % SITES}.test." for n in range(DOMAINS)]
    records += [f"mx{n}.pool{n}.test. A 127.0.{1 + n // 250}.{1 + n % 250}" for n in range(SITES)]
    records += [f"{name}.test. A 127.0.9.{n + 1}" for n, name in enumerate(("bounced", "deleted"))]
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        taken = folder / "taken"
        peer = subprocess.Popen([sys.executable, "-m", "benchmarks.soak_peer", str(port), str(taken)])
        try:
            with nameserver_with(folder, records) as nameserver:
                settings = (f'delivery.nameservers=["{nameserver}"]', f"delivery.port={port}", "delivery.first_retry=5",
                            'site=[{hosts=[".test"],connections=5}]')  # fmt: skip
                with SweepingRelay(folder, None, *settings, workers=WORKERS) as relay:
                    soak = Soak(relay, PacedSource(lambda: relay.port, rate), time.monotonic() + 60 * minutes)
                    soak.run()
                    counted, listed = soak.counted()
                    left, gauge = soak.drain()
                    restarts = [event["text"] for event in relay.events("warning") if "quarantined" in event["text"]]
                    stores = [event for event in relay.events("store") if event["state"] != "ok"]
                    status = relay.stop()
                    offline = sum(
                        json.loads(row)["messages"] for row in relay.cli("queue", "summary", "--json").stdout.splitlines()
                    )
        finally:
            peer.terminate()
            peer.wait()
        seen = [json.loads(line) for line in taken.read_text().splitlines()]
    return [
        *account(soak, seen),
        ("held at the end: by the counts, by the list", (counted, listed), counted == listed),
        ("left after the drain: by `queue summary`, the metric, offline", (left, gauge, offline), not (left or gauge or offline)),
        ("quarantined; spool slow, full or stalled", (len(restarts), len(stores)), True),
        ("exit status", status, status == 0),
        *flat(soak),
        *((f"done: {what}", count, True) for what, count in sorted(soak.done.items())),
        *(("FAULT", text, False) for text in soak.faults[:20]),
        *((("FAULT", f"and {len(soak.faults) - 20} more", False),) if len(soak.faults) > 20 else ()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=50.0, help="messages a second")
    given = parser.parse_args()
    signal.alarm(int(60 * given.minutes + 3 * DRAIN_SECONDS))  # whatever hangs
    rows = soaked(given.minutes, given.rate)
    for what, value, good in rows:
        print(f"{what:70} {value!s:>24} {'' if good else '  <-- FAILS'}")
    sys.exit(0 if all(good for *_, good in rows) else 1)


if __name__ == "__main__":
    main()
