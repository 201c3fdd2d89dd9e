"""The messages of a shard by id: what `queue list` prints, and the ids that operators' verbs are applied to.

A million messages are listed in seconds, so each row is encoded once, as a line of JSON, and passed on unchanged.
"""

import time
from collections.abc import Iterator
from heapq import merge
from typing import Any

import msgspec

from relaymta.control.filters import Filter
from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.ident import format_id
from relaymta.proto.envelope import HELD, QUARANTINED, SUCCESS, UNSEEN, Attempt, Envelope, Quarantine, RecipientState
from relaymta.queue.lifecycle import ENDING, IN_FLIGHT, Lifecycle
from relaymta.queue.store import QueueRow, Store

__all__ = ["message", "page"]

PAGE_ROWS = 1000
PAGE_OCTETS = 8 << 20  # a row has all of a message's recipients
PAGE_SECONDS = 0.05
CLOCK_EVERY = 64  # messages between two checks of the clock

_encode = msgspec.json.Encoder().encode


class Recipient(msgspec.Struct):
    """One recipient; `last`: the result of its last attempt, "" when there was none."""

    address: str
    state: str = "pending"
    last: str = ""


class Quarantined(msgspec.Struct):
    """As of envelope.Quarantine; times are seconds since 1970 UTC; `until`: when it is deleted, 0: not by itself, or
    (`judged`) that is not known, since no daemon runs."""

    by: str
    reason: str
    score: float | None
    subject: str
    since: float
    until: float
    judged: bool


class Row(msgspec.Struct):
    """One message as `queue list --json` prints it. Times are seconds since 1970 UTC, 0: never. `state`: "queued" (not yet
    tried), "in flight", "deferred" (tried, and to be tried again), "unseen" (filters have not looked at it), "held" or
    "quarantined"; `next`: when it is due and its queue does not sleep any more; `held_for`: why it is held ("": it is not, or an
    older version has held it); `unseen`: the filters that have not looked at it; `quarantine`: why it is there, None: it is
    not."""

    id: str
    state: str
    sender: str
    recipients: list[Recipient]
    size: int
    arrived: float
    client: str
    application: str
    queues: list[str]
    attempts: int
    next: float
    expires: float
    held_for: str
    unseen: list[str]
    quarantine: Quarantined | None


class _Reader:
    """Makes rows within one transaction."""

    def __init__(self, store: Store, txn: Any, clock: ShardClock, entries: Lifecycle | None, keep_ms: int) -> None:
        """`keep_ms`: for how long mail is in the quarantine, 0: not known."""
        self._keep_ms = keep_ms
        self._store = store
        self._txn = txn
        self._now = clock.now()
        self._behind = wall_ms() - self._now  # how far the queue's clock is behind the wall clock
        self._entries = entries
        self._queues: dict[int, tuple[str, bool, int]] = {}
        self._histories = store.histories(txn)

    def _queue(self, number: int) -> tuple[str, bool, int]:
        """A queue's name, whether all mail in it is due, and until when it sleeps (queue clock, 0: it does not)."""
        found = self._queues.get(number)
        if found is None:
            row = self._store.queue(self._txn, number)
            found = self._queues[number] = ("?", False, 0) if row is None else (str(row.name), row.moved, row.not_before)
        return found

    def row(self, ident: int, envelope: Envelope) -> Row:
        """The row of one message."""
        flags, placements, behind = envelope.flags, envelope.placements, self._behind
        queues, attempts, due, in_flight = [], 0, 0, False
        for placement in placements:
            name, moved, not_before = self._queue(placement.queue)
            queues.append(name)
            attempts = max(attempts, placement.attempts)
            at = max(min(placement.due, self._now) if moved else placement.due, not_before)
            due = min(due, at) if due else at
            if self._entries is not None:
                entry = self._entries.get(ident, placement.queue)
                in_flight = in_flight or (entry is not None and entry.state in (IN_FLIGHT, ENDING))
        scheduled = not flags & HELD
        return Row(
            format_id(ident),
            "in flight" if in_flight else _state(flags, attempts),
            envelope.sender,
            self._recipients(envelope, self._histories.of(ident)),
            envelope.size,
            envelope.arrived / 1000,
            envelope.client,
            envelope.application,
            queues,
            attempts,
            (due + behind) / 1000 if scheduled and placements and not flags & UNSEEN else 0,
            (envelope.deadline + behind) / 1000 if scheduled else 0,
            envelope.held_for,
            [] if envelope.unseen is None else envelope.unseen.filters,
            None if envelope.quarantine is None else self._quarantined(envelope.quarantine),
        )

    def _quarantined(self, why: Quarantine) -> Quarantined:
        since = why.since + self._behind
        until = (since + self._keep_ms) / 1000 if why.judged and self._keep_ms else 0
        return Quarantined(why.by, why.reason, why.score, why.subject, since / 1000, until, why.judged)

    def _recipients(self, envelope: Envelope, states: dict[int, RecipientState]) -> list[Recipient]:
        if not states:
            return [Recipient(address) for address in envelope.recipients]
        found = []
        for index, address in enumerate(envelope.recipients):
            known = states.get(index)
            if known is None:
                found.append(Recipient(address))
            else:
                last = str(known.attempts[-1]) if known.attempts else ""
                found.append(Recipient(address, ("pending", "delivered", "failed")[known.state], last))
        return found


def _state(flags: int, attempts: int) -> str:
    """The state of a message that is not in flight. Held, it may also be quarantined; deferred: it has been tried; unseen: it
    waits for filters."""
    if flags & QUARANTINED:
        return "quarantined"
    return "held" if flags & HELD else "unseen" if flags & UNSEEN else "deferred" if attempts else "queued"


def page(
    store: Store, clock: ShardClock, entries: Lifecycle | None, chosen: Filter, after: int, queues: list[QueueRow] | None,
    keep_ms: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The next messages above id `after`: `{"lines", "ids", "after", "until"}`, a line of JSON for each (see `Row`), `after` 0
    when there are no more. `queues`: only messages in these (None: in any); `keep_ms`: as of `_Reader`."""
    lines: list[bytes] = []
    idents: list[int] = []
    octets = 0
    until = time.monotonic() + PAGE_SECONDS
    fresh = store.fresh.live()
    numbers = None if queues is None else {row.number for row in queues}
    everything = chosen == Filter(until=chosen.until)
    last = chosen.until or 1 << 64
    with store.reading() as txn:
        reader = _Reader(store, txn, clock, entries, keep_ms)
        start = chosen.ident - 1 if chosen.ident else after
        found = _quarantine(store, txn, start) if chosen.quarantined else store.idents(txn, start, fresh)
        for seen, (ident, envelope) in enumerate(found, 1):
            if ident > last or (chosen.ident and ident != chosen.ident):
                break
            after = ident
            if everything or (
                (numbers is None or any(p.queue in numbers for p in envelope.placements)) and chosen.matches(ident, envelope)
            ):
                lines.append(_encode(reader.row(ident, envelope)))
                idents.append(ident)
                octets += len(lines[-1])
            if octets > PAGE_OCTETS or (seen % CLOCK_EVERY == 0 and (len(lines) >= PAGE_ROWS or time.monotonic() > until)):
                return {"lines": _joined(lines), "ids": idents, "after": after, "until": chosen.until}
    return {"lines": _joined(lines), "ids": idents, "after": 0, "until": chosen.until}


def _quarantine(store: Store, txn: Any, after: int) -> Iterator[tuple[int, Envelope]]:
    """As Store.idents, of what is in the quarantine."""
    for ident, *_ in merge(store.quarantined(txn, True, after), store.quarantined(txn, False, after)):
        envelope = store.envelope(txn, ident)
        if envelope is not None:
            yield ident, envelope


def _joined(lines: list[bytes]) -> bytes:
    return b"\n".join([*lines, b""])


def message(store: Store, clock: ShardClock, entries: Lifecycle | None, ident: int, keep_ms: int = 0) -> dict[str, Any] | None:
    """Everything about one message, as `Row` and its recipients' attempts; None when it is not in this shard. `keep_ms`: as of
    `_Reader`."""
    with store.reading() as txn:
        envelope = store.envelope(txn, ident)
        if envelope is None:
            return None
        found: dict[str, Any] = msgspec.to_builtins(_Reader(store, txn, clock, entries, keep_ms).row(ident, envelope))
        for index, state in store.recipient_states(txn, ident).items():
            found["recipients"][index]["attempts"] = [_attempt(a) for a in state.attempts]
        found["helo"], found["user"] = envelope.helo, envelope.user
        found["headers"], found["listener"], found["forwarded"] = envelope.headers, envelope.listener, envelope.forwarded
        return found


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "time": attempt.time / 1000,
        "result": attempt.kind,
        "phase": attempt.phase,
        "cause": attempt.because if attempt.kind != SUCCESS else "",
        "peer": attempt.peer,
        "reply": attempt.cause,
    }
