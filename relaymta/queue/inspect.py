"""What operators read and change in a shard: reads are short transactions, resumed by key; changes are at most 1,000 messages
inside a group commit. Messages in flight are not changed."""

import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from relaymta.control.filters import Filter
from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.segments import Segments
from relaymta.ident import stamp_of
from relaymta.proto.envelope import (
    BY_CRASHES,
    BY_CRASHES_UNSEEN,
    BY_EXPIRY,
    BY_OPERATOR,
    BY_POLICY,
    CLASSES,
    HELD,
    POLICY_HELD,
    QUARANTINED,
    UNSEEN,
    Envelope,
    Placement,
    QueueName,
    held_because,
)
from relaymta.queue.ages import add, columns
from relaymta.queue.change import Change
from relaymta.queue.expiry import RESUMED_GRACE_MS
from relaymta.queue.exported import print_of
from relaymta.queue.group import Assign
from relaymta.queue.quarantine import Left, not_judged
from relaymta.queue.store import QueueRow, Store
from relaymta.queue.writer import Writer

__all__ = [
    "VERBS",
    "Totals",
    "apply",
    "chosen_queues",
    "names",
    "places",
    "policy_held",
    "quarantine",
    "reroute",
    "shape",
    "summary",
    "totals",
]  # fmt: skip

POLICY_HELD_TOGETHER = 1000
# Told of what has become of a message that an operator, a policy or expiry has changed: how, its id, and its envelope (as it
# was, of one that is deleted).
Told = Callable[[str, int, Envelope], None]
# What has come of a message in the quarantine, by the verb; and which verbs delete.
LEAVES = {
    "release": "released", "delete": "deleted", "delete quarantined": "deleted", "quarantine expired": "expired",
    "quarantine displaced": "displaced",
}  # fmt: skip
HOW = {
    "delete": "deleted",
    "policy": "held",
    "hold": "held",
    "unseen expired": "held",
    "release": "released",
    "release policy": "released",
}  # what becomes of all others
DELETES = ("delete", "delete quarantined", "quarantine expired", "quarantine displaced")
QUARANTINE_ENDS = ("quarantine expired", "quarantine displaced", "quarantine stale")
HELD_SEEN = 200  # messages among which the oldest one that is not held is looked for
VERBS = (  # policy: hold, for a hold policy
    "flush", "hold", "release", "delete", "bounce", "reroute", "policy", "release quarantined", "delete quarantined",
)  # fmt: skip


def summary(store: Store, clock: ShardClock) -> list[dict[str, Any]]:
    """One row for each queue that holds mail. "next": when it is scanned next, seconds since 1970 UTC (0: nothing is due)."""
    rows = []
    now = clock.now()
    inlined = _inlined(store)
    with store.reading() as txn:
        for row in store.queues(txn):
            messages, octets = inlined.get(row.number, (0, 0))
            row.messages += messages
            row.bytes += octets
            if messages and not row.wake:
                row.wake = now
            if row.messages:
                rows.append(
                    {
                        "queue": str(row.name),
                        "messages": row.messages,
                        "bytes": row.bytes,
                        "deferred": row.deferred,
                        "held": row.held,
                        "unseen": row.unseen,
                        "next": clock.wall(row.wake) / 1000 if row.wake > now else (0 if not row.wake else time.time()),
                        "parked": row.not_before > now,
                    }
                )
    return rows


def _inlined(store: Store) -> dict[int, tuple[int, int]]:
    """(messages, octets) of inlined mail by queue number."""
    found: dict[int, tuple[int, int]] = {}
    for _, envelope in store.fresh.live():
        for placement in envelope.placements:
            messages, octets = found.get(placement.queue, (0, 0))
            found[placement.queue] = (messages + 1, octets + envelope.size)
    return found


def places(store: Store, clock: ShardClock, ident: int) -> list[tuple[QueueName, Placement]]:
    """The queues in which a message waits, each with its placement (`due`: now, where the whole queue was moved)."""
    with store.reading() as txn:
        envelope = store.envelope(txn, ident)
        if envelope is None:
            return []
        found = []
        for placement in envelope.placements:
            row = store.queue(txn, placement.queue)
            if row is not None:
                placement.due = min(placement.due, clock.now()) if row.moved else placement.due
                found.append((row.name, placement))
        return found


def chosen_queues(store: Store, chosen: Filter, at_site: Callable[[QueueName, str], bool]) -> list[QueueRow]:
    """The queues that match a filter. `at_site(name, site)`: whether a queue's mail is delivered to a site."""
    with store.reading() as txn:
        return [
            row for row in store.queues(txn) if chosen.waits_in(row.name) and (not chosen.site or at_site(row.name, chosen.site))
        ]


def names(store: Store) -> list[QueueName]:
    """The names of all queues."""
    with store.reading() as txn:
        return [row.name for row in store.queues(txn)]


def shape(store: Store) -> list[dict[str, Any]]:
    """The age of the mail in each queue: `{"queue", "messages", "ages"}`, ages as `ages.columns` makes them. Reads one row for
    each queue, however much mail it holds."""
    now = wall_ms()
    fresh: dict[int, list[int]] = {}
    for _, envelope in store.fresh.live():
        for placement in envelope.placements:
            fresh.setdefault(placement.queue, []).append(envelope.arrived)
    rows = []
    with store.reading() as txn:
        for row in store.queues(txn):
            arrivals = fresh.get(row.number, [])
            for arrived in arrivals:
                add(row.ages, arrived)
            messages = row.messages + len(arrivals)
            if messages:
                rows.append({"queue": str(row.name), "messages": messages, "ages": columns(row.ages, now, messages)})
    return rows


def policy_held(
    store: Store, after: tuple[int, int], most: int = POLICY_HELD_TOGETHER
) -> tuple[list[tuple[int, Envelope, list[QueueName]]], tuple[int, int]]:
    """The next messages behind (queue, id) `after` that a hold policy holds, with their queues; and the `after` of the next call
    ((0, 0): there are no more)."""
    found: list[tuple[int, Envelope, list[QueueName]]] = []
    first, behind = after
    with store.reading() as txn:
        for row in store.queues(txn, max(0, first - 1)):
            for ident in store.held(txn, row.number, behind if row.number == first else 0) if row.held else ():
                envelope = store.envelope(txn, ident)
                if envelope is not None and envelope.flags & POLICY_HELD:
                    numbers = [placement.queue for placement in envelope.placements]
                    waits_in = [one.name for number in numbers if (one := store.queue(txn, number)) is not None]
                    found.append((ident, envelope, waits_in))
                if len(found) >= most:
                    return found, (row.number, ident)
    return found, (0, 0)


class Totals(NamedTuple):
    """A shard's counts. `overdue`: seconds since a message was to expire that is still there (0: none is); `oldest`: age of the
    oldest message that is not held, seconds; `unseen`: messages that filters have not looked at, and the age of the oldest of
    them; `oldest_held`: of those held. Ages are by the shard's clock."""

    messages: int
    octets: int
    deferred: int
    held: int
    overdue: float
    segment_octets: int
    segment_live: int
    oldest: float = 0.0
    unseen: int = 0
    oldest_unseen: float = 0.0
    oldest_held: float = 0.0


def totals(store: Store, segments: Segments, clock: ShardClock) -> Totals:
    """Count the messages and octets of a shard, from its queue rows and inlined mail."""
    fresh = store.fresh.live()
    messages, octets, deferred, held = len(fresh), sum(envelope.size for _, envelope in fresh), 0, 0
    oldest_held = 0
    with store.reading() as txn:
        for row in store.queues(txn):
            messages += row.messages
            octets += row.bytes
            deferred += row.deferred
            held += row.held
            ident = next(iter(store.held(txn, row.number, 0)), 0) if row.held else 0
            oldest_held = min(ident, oldest_held) or ident or oldest_held
        first = next(store.expiries(txn), None)
        waiting = (ident for ident, envelope in islice(store.idents(txn, 0, fresh), HELD_SEEN) if not envelope.flags & HELD)
        oldest = next(waiting, 0)  # ids are in the order of arrival
        if not oldest and first is not None:  # so much is held: deadlines are nearly in the same order
            oldest = first[1]
        unseen, oldest_unseen = _unseen(store, txn)
    now = clock.now()
    ages = [max(0, now - stamp_of(ident)) / 1000 if ident else 0.0 for ident in (oldest, oldest_unseen, oldest_held)]
    lenient = clock.resumed + RESUMED_GRACE_MS if clock.resumed else 0
    overdue = 0.0 if first is None else max(0.0, (now - max(first[0], lenient)) / 1000)
    files, live, _ = segments.usage()
    return Totals(messages, octets, deferred, held, overdue, files, live, ages[0], unseen, ages[1], ages[2])


def _unseen(store: Store, txn: Any) -> tuple[int, int]:
    """How many messages filters have not looked at, and the id of the oldest; 0: there is none."""
    count, idents = int(txn.stat(db=store.tables["unseen"])["entries"]), list[int]()
    for priority in CLASSES.values() if count else ():
        (found, ident), _ = next(store.unseen(txn, (priority, 0)), ((-1, 0), []))
        idents += [ident] if found == priority else []
    return count, min(idents, default=0)


def reroute(
    change: Change, store: Store, clock: ShardClock, assign: Assign, idents: list[int], route: str,
    told: Told = lambda how, ident, envelope: None,
) -> int:  # fmt: skip
    """Writer thread, inside a group commit: move these messages, none of which is in memory, to `route`, due now; how many it
    changed. Their bodies stay where they are."""
    changed, now = 0, clock.now()
    for ident in idents:
        change.materialize(ident)
        envelope = change.envelope(ident)
        if envelope is None:
            continue
        places = list(envelope.placements)
        for placement in places:
            change.unplace(ident, envelope, placement)
        attempts = max(placement.attempts for placement in places)
        pending = sorted({i for p in places for i in (range(len(envelope.recipients)) if p.indexes is None else p.indexes)})
        envelope.route = route
        envelope.placements = []
        for name, indexes in assign(envelope, attempts):
            own = pending if indexes is None else [index for index in indexes if index in pending]
            if own:
                placement = Placement(change.row(name).number, now, attempts, own)
                envelope.placements.append(placement)
                change.place(ident, envelope, placement)
        change.replace(ident, envelope)
        told("rerouted", ident, envelope)
        changed += 1
    return changed


def move(change: Change, rows: list[QueueRow], rename: Callable[[QueueName], QueueName]) -> int:
    """Writer thread, inside a group commit: move all messages of these queues, none of which is in memory, to the route that
    `rename` names, due now; how many. Only the queues' rows are written, not those of their messages."""
    return sum(change.move(row.number, rename(row.name)) for row in rows)


def apply(
    verb: str,
    change: Change,
    store: Store,
    writer: Writer,
    clock: ShardClock,
    max_age_ms: int,
    idents: list[int],
    policies: str | Mapping[int, str] = "",
    left: Left = lambda ident, envelope, how, to: None,
    told: Told = lambda how, ident, envelope: None,
) -> int:
    """Writer thread, inside a group commit: apply `verb` to these messages, none of which is in memory; how many it changed.
    `policies`: the name of the hold policy that holds them ("": not known), or that of each message; `left`: told of those that
    leave the quarantine, `told` of all others that are held, released or deleted."""
    changed = 0
    now = clock.now()
    for ident in idents:
        change.materialize(ident)
        envelope = change.envelope(ident)
        kept = envelope.quarantine if envelope is not None else None
        if verb in QUARANTINE_ENDS and (kept is None or not kept.judged):
            for judged in (True, False) if kept is None else ():  # an older version has ended or released it
                change.forget_quarantined(ident, judged)
            continue
        if envelope is None or (verb == "delete quarantined" and kept is None):
            continue
        if kept is not None and verb in LEAVES:
            left(ident, msgspec.structs.replace(envelope), LEAVES[verb], [])
        if verb in DELETES:
            change.tell("bounced", ident, envelope, verb if verb in QUARANTINE_ENDS else "deleted")
            change.finish_message(ident, envelope, histories=True)
            writer.free_body(ident, envelope.body)
        elif verb == "policy" and not envelope.flags & HELD:
            name = policies if isinstance(policies, str) else policies.get(ident, "")
            change.hold(ident, envelope, held_because(f"{BY_POLICY} {name}".rstrip()), HELD | POLICY_HELD)
        elif verb == "hold" and not envelope.flags & HELD:
            change.hold(ident, envelope, BY_OPERATOR)
        elif verb == "hold" and envelope.flags & POLICY_HELD:  # from now on held until it is released
            envelope.flags &= ~POLICY_HELD
            envelope.held_for = BY_OPERATOR
            change.replace(ident, envelope)
        elif (verb == "release" and envelope.flags & HELD) or (verb == "release policy" and envelope.flags & POLICY_HELD):
            change.release(ident, envelope, now, now + max_age_ms)
        elif verb == "unseen expired" and envelope.flags & UNSEEN and envelope.deadline <= now:  # it may have been released since
            envelope.quarantine = not_judged(envelope, now, BY_EXPIRY)
            change.hold(ident, envelope, BY_EXPIRY)
        elif verb == "flush" and not envelope.flags & (HELD | UNSEEN):
            for placement in envelope.placements:
                if placement.due > now:
                    change.unplace(ident, envelope, placement)
                    placement.due = now
                    change.place(ident, envelope, placement)
            change.replace(ident, envelope)
        else:
            continue
        changed += 1
        if verb in HOW and not (kept is not None and verb in LEAVES):  # else `left` has told of it
            told(HOW[verb], ident, envelope)
    return changed


def delete_unchanged(
    change: Change, store: Store, writer: Writer, prints: Mapping[int, str]
) -> dict[int, tuple[str, Envelope | None]]:
    """Writer thread, inside a group commit: delete those of these messages, none of which is in memory, that are as they were
    exported; what has become of each, and the envelope of one that was deleted."""
    found: dict[int, tuple[str, Envelope | None]] = {}
    for ident, known in prints.items():
        change.materialize(ident)
        envelope = change.envelope(ident)
        if envelope is None:
            found[ident] = "gone", None
        elif print_of(store, change.txn, ident, envelope) != known:
            found[ident] = "changed", None
        else:
            change.finish_message(ident, envelope, histories=True)
            change.forget_imported(ident)
            writer.free_body(ident, envelope.body)
            found[ident] = "deleted", envelope
    return found


def quarantine(change: Change, store: Store, ident: int, now: int) -> bool:
    """Writer thread, inside a group commit: hold a message whose delivery, or for which filters, ended a worker; False when it is
    not in this shard. `now`: ms of the queue's clock."""
    change.materialize(ident)
    envelope = change.envelope(ident)
    if envelope is None:
        return False
    why = BY_CRASHES_UNSEEN if envelope.flags & UNSEEN else BY_CRASHES
    envelope.quarantine = not_judged(envelope, now, why)
    change.hold(ident, envelope, why, HELD | QUARANTINED)
    return True
