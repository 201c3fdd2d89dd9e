"""`relaymta top`: what the relay does now, on one screen."""

import contextlib
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from relaymta import control
from relaymta.cli.console import Section, is_screen, say_json, say_sections, screen
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, loaded
from relaymta.cli.peer import as_json, daemon, given, lasting, seconds_of, size, until
from relaymta.errors import RelayError

__all__ = ["top"]

RATES = ("accepted", "delivered", "deferred", "bounced", "expired", "rejected", "connections", "refused", "sessions")
MINUTE = 60.0
FIRST = 1.0  # seconds between the two looks at the counters of which the first rates are made
SITES_SHARE = 10  # sites are asked for, of which there may be many, in at most one tenth of the time
ORDERS = ("backlog", "rate", "name")


class Sample(NamedTuple):
    """The answers of one moment (monotonic seconds)."""

    at: float
    status: dict[str, Any]
    activity: dict[str, Any]


@click.command()
@click.option("--interval", default="2s", callback=given, metavar="DURATION", help="Between two looks; default 2s.")
@click.option("--once", is_flag=True, help="Show it once, and end.")
@as_json
@configured
def top(read: Configuration, interval: str, once: bool, as_json: bool) -> None:
    """Watch the relay: rates, the queue, workers and sites, as they are now.

    On a terminal: q ends it, s sorts the sites in another way, p pauses. Elsewhere it writes on, until Ctrl-C."""
    seconds = seconds_of("--interval", interval, least=0.2)
    daemon(read)  # or it ends here
    view = View(read.control_path() or loaded(read, ANY_LISTENER).control_path)
    on_screen = not (once or as_json) and is_screen()
    view.look(True)
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(min(seconds, FIRST))
        if on_screen:
            _watch(view, seconds)
            return
        while True:
            view.look(True)
            if once and view.why:
                fail(69, view.why)
            if as_json:
                say_json(view.value())
            else:
                say_sections(view.sections())
            if once:
                return
            time.sleep(seconds)


def _watch(view: "View", seconds: float) -> None:
    """On the terminal, until q or Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the terminal is left as it was
    signal.signal(signal.SIGWINCH, lambda *_: None)  # ends the wait for a key: the new size is used at once
    with screen() as show, _keys() as pressed:
        while True:
            view.look()
            show(view.sections())
            at = time.monotonic() + seconds
            while (left := at - time.monotonic()) > 0:
                key = pressed(left)
                if key == "q":
                    return
                if key == "p":
                    view.paused = not view.paused
                elif key == "s":
                    view.order = ORDERS[(ORDERS.index(view.order) + 1) % len(ORDERS)]
                show(view.sections())


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key, and returns it; "": none was pressed, or the terminal has another size."""
    if not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([number, reader], [], [], seconds)
        if reader in ready:
            os.read(reader, 512)
        return os.read(number, 1).decode("ascii", "replace").lower() if number in ready else ""

    try:
        tty.setcbreak(number)
        yield pressed
    finally:
        signal.set_wakeup_fd(-1)
        termios.tcsetattr(number, termios.TCSADRAIN, before)
        os.close(reader)
        os.close(writer)


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


class View:
    """What was seen of a relay, and how it is shown. `why`: it does not answer now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples: deque[Sample] = deque()
        self._sites: list[dict[str, Any]] = []
        self._states: list[dict[str, Any]] = []
        self._sites_at = 0.0
        self.why = ""
        self.order = ORDERS[0]
        self.paused = False

    def look(self, sites: bool = False) -> None:
        """Ask the relay; `sites`: in any case for these, too."""
        if self.paused:
            return
        now = time.monotonic()
        try:
            sample = Sample(now, control.ask(self._path, "status"), control.ask(self._path, "activity"))
            if sites or now >= self._sites_at:
                self._sites, self._states = control.ask(self._path, "sites"), control.ask(self._path, "site_states")
                self._sites_at = now + SITES_SHARE * (time.monotonic() - now)
        except (OSError, RelayError) as error:
            self.why = f"the relay is not running, or does not answer: {error}"
            self._samples.clear()
            return
        self.why = ""
        if self._samples and self._samples[-1].status["pid"] != sample.status["pid"]:
            self._samples.clear()  # it was started anew
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].at < now - MINUTE:
            self._samples.popleft()

    # What it comes to

    def _rate(self, name: str, first: Sample) -> float:
        last = self._samples[-1]
        seconds = last.at - first.at
        count = last.activity["counts"][name] - first.activity["counts"][name]
        return round(max(0.0, count / seconds), 2) if seconds > 0 else 0.0

    def _mean(self, name: str) -> float | None:
        """The mean time (s) of the last minute; None: nothing was timed."""
        (many, total), (before, its) = (one.activity["times"][name] for one in (self._samples[-1], self._samples[0]))
        return round((total - its) / (many - before) / 1000, 4) if many > before else None

    def value(self) -> dict[str, Any]:
        """All of it, for programs; {"running": False, "why": ...} without a relay."""
        if self.why or not self._samples:
            return {"time": time.time(), "running": False, "why": self.why}
        first, last = self._samples[0], self._samples[-1]
        before = self._samples[-2] if len(self._samples) > 1 else last
        status, gauges = last.status, last.activity["gauges"]
        messages, deferred, held = (gauges[f"relaymta_queue_{name}"] for name in ("messages", "deferred", "held"))
        unseen = gauges["relaymta_unseen"]
        return {
            "time": time.time(), "running": True, "version": status["version"], "pid": status["pid"], "uptime": status["uptime"],
            "stopping": status["stopping"],
            "rates": {name: {"now": self._rate(name, before), "minute": self._rate(name, first)} for name in RATES},
            "accept_seconds": self._mean("accept"), "delivery_seconds": self._mean("delivery"),
            "queue": {
                "messages": messages, "octets": gauges["relaymta_queue_octets"],
                "ready": max(0, messages - deferred - held - unseen), "deferred": deferred, "held": held, "unseen": unseen,
                "in_flight": sum(worker.get("in flight", 0) for worker in status["workers"]),
                "quarantine": gauges["relaymta_quarantine_messages"], "oldest_seconds": gauges["relaymta_oldest_message_seconds"],
            },
            "connections": {"in": gauges["relaymta_connections"], "out": gauges["relaymta_sessions"]},
            "workers": [self._worker(worker, before, last) for worker in status["workers"]],
            "sites": [self._site(row) for row in self._in_order()],
        }  # fmt: skip

    def _worker(self, row: dict[str, Any], before: Sample, last: Sample) -> dict[str, Any]:
        """A worker; what it says of itself is None where it does not answer. `cpu`: per cent of one processor."""
        was = next((one for one in before.status["workers"] if one.get("pid") == row.get("pid")), row)
        seconds, cpu = last.at - before.at, None
        if "cpu" in row and "cpu" in was and seconds > 0:
            cpu = round(100 * max(0.0, row["cpu"] - was["cpu"]) / seconds, 1)
        return {key: row[key] for key in ("worker", "state", "restarts")} | {
            "pid": row.get("pid"), "cpu": cpu, "rss": row.get("rss"), "lag": row.get("lag"), "messages": row.get("messages"),
            "connections": row.get("connections"), "in_flight": row.get("in flight"), "shards": row.get("shards"),
            "full": row.get("full"), "stalled": row.get("stalled"),
        }  # fmt: skip

    def _in_order(self) -> list[dict[str, Any]]:
        keys = {
            "backlog": lambda row: (-(row["waiting"] + row["in flight"] + row["deferred"]), row["pool"]),
            "rate": lambda row: (-row["rate"], row["pool"]),
            "name": lambda row: row["pool"],
        }
        return sorted(self._sites, key=keys[self.order])

    def _site(self, row: dict[str, Any]) -> dict[str, Any]:
        """A site, and why its mail waits, where something is known."""
        state, why, ends = row["state"], row["reason"], row["until"]
        for found in self._states:
            if found["site"] in (row["site"], row["pool"]) and found["kind"] == "suspended" and not found["about"]:
                state, why, ends = "suspended", found["reason"], found["until"]
        if not why:
            limits = (limit["origin"] for limit in row["limits"].values() if limit["origin"].startswith(("learned", "slowed")))
            why = next(limits, "")
        return {
            "site": row["pool"], "counted_as": row["site"], "state": state, "waiting": row["waiting"],
            "in_flight": row["in flight"], "deferred": row["deferred"], "connections": row["connections"],
            "opening": row["opening"], "rate": row["rate"], "why": why, "until": ends,
        }  # fmt: skip

    # As people read it

    def sections(self) -> list[Section]:
        """The parts of the screen."""
        found = self.value()
        if not found["running"]:
            return [Section([self.why or "waiting", "It is looked for until it is there."])]
        sites = [_site_cells(site) for site in found["sites"]]
        columns = [f"site (by {self.order})", "state", "waiting", "deferred", "flight", "conns", "rate", "why"]
        rates = [[what, *(f"{found['rates'][name][key]:.1f}" for name in RATES)] for what, key in _TIMES.items()]
        return [
            Section(self._head(found)),
            Section(columns=["rate/s", *(_SHORT.get(name, name) for name in RATES)], rows=rates),
            Section(columns=_WORKER, rows=[_worker_cells(worker) for worker in found["workers"]]),
            Section(columns=columns, rows=sites) if sites else Section(["no site has mail or connections now"]),
        ]

    def _head(self, found: dict[str, Any]) -> list[str]:
        queue, connections = found["queue"], found["connections"]
        stops = ", it is stopping" if found["stopping"] else ""
        paused = ", paused (p goes on)" if self.paused else ""
        oldest = f", the oldest {lasting(queue['oldest_seconds'])}" if queue["oldest_seconds"] else ""
        means = [
            f"; {what} {_brief(mean)}"
            for what, mean in (("250 after", found["accept_seconds"]), ("delivered after", found["delivery_seconds"]))
            if mean is not None
        ]
        return [
            f"relaymta {found['version']}, pid {found['pid']}, up {lasting(found['uptime'])}{stops}{paused}",
            f"{queue['messages']} messages in the queue ({size(queue['octets'])}){oldest}",
            f"{queue['ready']} ready, {queue['in_flight']} in flight, {queue['deferred']} deferred, {queue['held']} held, "
            f"{queue['quarantine']} in quarantine, {queue['unseen']} unseen",
            f"connections: {connections['in']} in, {connections['out']} out{''.join(means)}",
        ]


_TIMES = {"now": "now", "1 min": "minute"}
_SHORT = {"connections": "conns", "sessions": "out"}
_WORKER = ["worker", "state", "pid", "cpu", "memory", "lag", "messages", "conns", "flight"]


def _worker_cells(worker: dict[str, Any]) -> list[str]:
    cpu, memory, lag = worker["cpu"], worker["rss"], worker["lag"]
    return [
        str(worker["worker"]), _state(worker), _shown(worker["pid"]), "-" if cpu is None else f"{cpu:.0f}%",
        "-" if memory is None else size(memory), "-" if lag is None else _brief(lag),
        *(_shown(worker[name]) for name in ("messages", "connections", "in_flight")),
    ]  # fmt: skip


def _site_cells(site: dict[str, Any]) -> list[str]:
    ends = f" ({until(site['until'])})" if site["until"] and site["why"] else ""
    return [
        site["site"], site["state"], *(str(site[name]) for name in ("waiting", "deferred", "in_flight", "connections")),
        f"{site['rate']:.0f}/s", f"{site['why']}{ends}",
    ]  # fmt: skip


def _state(worker: dict[str, Any]) -> str:
    return "full" if worker["full"] else "stalled" if worker["stalled"] else str(worker["state"])


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _brief(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 60 else lasting(seconds)
