"""The figures of a run: as JSON, as the rows of a table, and beside those of earlier runs."""

import json
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relaymta import __version__
from relaymta.bench.ledger import State
from relaymta.bench.trial import Run, machine, times_of
from relaymta.errors import RelayError

__all__ = ["MEASURES", "ReportError", "compared", "figures", "first_figures", "read", "report", "verdict"]

VERSION = 1  # of the form of the file
POINTS = 120  # of a plot, at most

# What the table shows: name, where it is in the figures, how it is written; whether less is better.
MEASURES: list[tuple[str, tuple[str, ...], str, bool]] = [
    ("messages accepted", ("ledger", "accepted"), "{:,.0f}", False),
    ("accepted, messages a second", ("rate", "accepted"), "{:,.0f}", False),
    ("at the sink, messages a second", ("rate", "arrived"), "{:,.0f}", False),
    ("250 after the final dot, p50 ms", ("latency_ms", "reply", "p50"), "{:,.1f}", True),
    ("... p95", ("latency_ms", "reply", "p95"), "{:,.1f}", True),
    ("... p99", ("latency_ms", "reply", "p99"), "{:,.1f}", True),
    ("250 after the message was due, p50 ms", ("latency_ms", "accepted", "p50"), "{:,.1f}", True),
    ("... p95", ("latency_ms", "accepted", "p95"), "{:,.1f}", True),
    ("... p99", ("latency_ms", "accepted", "p99"), "{:,.1f}", True),
    ("at the sink after it was due, p50 ms", ("latency_ms", "arrived", "p50"), "{:,.1f}", True),
    ("... p95", ("latency_ms", "arrived", "p95"), "{:,.1f}", True),
    ("... p99", ("latency_ms", "arrived", "p99"), "{:,.1f}", True),
    ("CPU of the relay, s for 1,000 messages", ("cpu", "relay_per_1000"), "{:,.3f}", True),
    ("memory of the relay, MB", ("memory_mb",), "{:,.0f}", True),
    ("syncs a message", ("syncs_per_message",), "{:,.3f}", True),
    ("messages on a connection", ("per_connection",), "{:,.1f}", False),
    ("CPU of the generator, us a message", ("cpu", "generator_us"), "{:,.0f}", True),
    ("... of a core", ("cpu", "generator_share"), "{:.0%}", True),
    ("refused (5xx; 4xx before the final dot)", ("refused",), "{:,.0f}", True),
    ("not sent: no connection", ("ledger", "unsent"), "{:,.0f}", True),
    ("in doubt: no 250 after the final dot", ("ledger", "in_doubt"), "{:,.0f}", True),
    ("lost", ("ledger", "lost"), "{:,.0f}", True),
    ("altered", ("ledger", "altered"), "{:,.0f}", True),
    ("duplicated", ("ledger", "duplicated"), "{:,.0f}", True),
    ("repeated, since the sink did not answer", ("ledger", "repeated"), "{:,.0f}", True),
    ("still in the queue", ("ledger", "queued"), "{:,.0f}", True),
]


class ReportError(RelayError):
    """A file that is no report."""


def _percentiles(values: "array[float]") -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": ordered[-1] * 1000}


def figures(found: Run) -> dict[str, Any]:
    """All figures of a run."""
    account, accepted = found.account, found.account.accepted
    elapsed, whole = max(1e-9, found.loaded - found.began), max(1e-9, found.ended - found.began)
    setup = found.setup
    return {
        "name": found.name, "version": found.version, "durability": found.durability, "disk": found.disk,
        "load": setup.load.as_json(), "load_in_words": setup.load.sentence(),
        "profile": setup.profile.stem if setup.profile else "", "ended": found.why or "all sent",
        "seconds": {"load": elapsed, "until_arrived": whole},
        "rate": {
            "accepted": accepted / elapsed,
            "arrived": account.arrived / setup.load.recipients / whole if account.checked else None,
        },
        "latency_ms": {name: _percentiles(values) for name, values in times_of(found).items()},
        "cpu": {
            "relay_per_1000": None if found.relay_cpu is None or not accepted else found.relay_cpu / accepted * 1000,
            "generator_us": found.generator_cpu / len(found.sent) * 1e6 if len(found.sent) else None,
            "generator_share": found.generator_cpu / elapsed, "sink_share": found.sink_cpu / elapsed,
        },
        "memory_mb": None if found.memory is None else found.memory / 1e6,
        "syncs_per_message": None if found.syncs is None or not accepted else found.syncs / accepted,
        "per_connection": len(found.sent) / max(1, found.connections),
        "refused": account.rejected + account.deferred,
        "ledger": account.as_json(),
        "replies": {reply.decode("latin-1"): count for reply, count in found.sent.replies.items()},
        "failures": found.failures, "sink": found.sink, "limits": found.limits, "series": _series(found),
    }  # fmt: skip


def _series(found: Run) -> dict[str, Any]:
    """What happened when: for each step of `step` seconds, messages a second and milliseconds."""
    sent, first = found.sent, found.account.first
    step = max(0.25, (found.ended - found.began) / POINTS)
    count = min(POINTS + 1, int((found.ended - found.began) / step) + 1)
    accepted, arrived, refused = ([0] * count for _ in range(3))
    replies: list[array[float]] = [array("d") for _ in range(count)]
    ends: list[array[float]] = [array("d") for _ in range(count)]
    for serial, state in enumerate(sent.states):
        due = sent.intended[serial]
        if state == State.ACCEPTED:
            place = min(count - 1, int((sent.answered[serial] - found.began) / step))
            accepted[place] += 1
            replies[place].append(sent.answered[serial] - due)
            if first[serial]:
                place = max(0, min(count - 1, int((first[serial] - found.began) / step)))
                arrived[place] += 1
                ends[place].append(first[serial] - due)
        else:
            refused[max(0, min(count - 1, int((due - found.began) / step)))] += 1

    def shown(values: list["array[float]"], which: str) -> list[float | None]:
        return [_percentiles(one).get(which) for one in values]

    return {
        "step": step,
        "accepted": [one / step for one in accepted],
        "arrived": [one / step for one in arrived],
        "not accepted": [one / step for one in refused],
        **{f"accepted {which}": shown(replies, which) for which in ("p50", "p99")},
        **{f"arrived {which}": shown(ends, which) for which in ("p50", "p99")},
    }


def report(runs: Sequence[dict[str, Any]], interrupted: bool = False) -> dict[str, Any]:
    """The whole report."""
    return {
        "relaymta bench": VERSION, "version": __version__, "at": time.time(), "machine": machine(), "interrupted": interrupted,
        "runs": list(runs),
    }  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """A report from a file. OSError, ReportError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["relaymta bench"] != VERSION or not all(isinstance(one["name"], str) for one in found["runs"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise ReportError(f"{path}: not a report of `relaymta bench --json`") from None
    return found  # type: ignore[no-any-return]


def value(run: dict[str, Any], place: Sequence[str]) -> float | None:
    """A figure; None where it was not measured."""
    inner: Any = run
    for part in place:
        inner = inner.get(part) if isinstance(inner, dict) else None
    return float(inner) if isinstance(inner, int | float) and not isinstance(inner, bool) else None


def compared(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a table: a column for each run, and, behind each but the first, how many times the first one's that
    is."""
    columns = ["", names[0], *(word for name in names[1:] for word in (name, "ratio"))]
    rows = []
    for title, place, shape, _ in MEASURES:
        values = [value(run, place) for run in runs]
        if all(one is None for one in values) or (place[-1] in ("unsent", "queued", "repeated") and not any(values)):
            continue
        row = [title]
        for number, one in enumerate(values):
            row.append("-" if one is None else shape.format(one))
            if number:
                row.append(f"{one / values[0]:.2f} x" if one is not None and values[0] else "-")
        rows.append(row)
    return columns, rows


def first_figures(run: dict[str, Any]) -> str:
    """The figures of a run in a line, for who waits for the others."""
    reply, cpu = run["latency_ms"]["reply"], run["cpu"]["relay_per_1000"]
    parts = [f"{run['rate']['accepted']:,.0f} messages a second"]
    parts += [f"250 in {reply['p50']:.1f} ms (p99 {reply['p99']:.1f})"] if reply else []
    parts += [f"{cpu * 1000:,.0f} us CPU a message"] if cpu is not None else []
    return f"{run['name']}: {', '.join(parts)}"


def verdict(run: dict[str, Any]) -> list[str]:
    """What the ledger says, in sentences; the first is whether all is well."""
    ledger = run["ledger"]
    if not ledger["checked"]:
        return [f"{run['name']}: without a sink nothing could be compared"]
    if ledger["sound"]:
        come = f"{ledger['arrived']:,} of {ledger['expected']:,} copies have arrived"
        first = f"{run['name']}: nothing lost, altered or duplicated: {come}"
        lines = [first + (f", {ledger['queued']:,} are in the queue" if ledger["queued"] else "")]
    else:
        bad = [f"{ledger[kind]:,} {kind}" for kind in ("lost", "altered", "duplicated") if ledger[kind]]
        lines = [f"{run['name']}: {', '.join(bad)} of {ledger['expected']:,} copies"]
        if ledger["lost"] and not ledger["queue_known"]:
            lines.append(
                "  (what is in the relay's queue is not known: lost may be what it has not delivered yet; --grace waits longer)"
            )
        lines += [f"  {kind}: {one}" for kind in ("lost", "altered", "duplicated") for one in ledger["examples"].get(kind, [])]
    return lines
