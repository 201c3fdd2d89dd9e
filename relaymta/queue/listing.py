"""The messages of a shard, one after the other: what `queue list` prints and from what operators' verbs choose.

A million of them are listed in seconds, so rows are written as lines of JSON here, once, and handed on as they are.
"""

import time
from typing import Any

import msgspec

from relaymta.proto.envelope import HELD, QUARANTINED, Attempt, Envelope, RecipientState
from relaymta.queue.clock import QueueClock, wall_ms
from relaymta.queue.ident import format_id
from relaymta.queue.inspect import Filter
from relaymta.queue.schedule import Schedule
from relaymta.queue.store import QueueRow, Store

__all__ = ["message", "page"]

PAGE_ROWS = 1000
PAGE_SECONDS = 0.05
LOOKED_AT = 64  # messages between two looks at the clock

_encode = msgspec.json.Encoder().encode


class Recipient(msgspec.Struct):
    """One recipient; `last`: what was said at the last attempt, "" when there was none."""

    address: str
    state: str = "pending"
    last: str = ""


class Row(msgspec.Struct):
    """One message as `queue list --json` prints it. Times are seconds since 1970 UTC, 0: never."""

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


class _Reader:
    """Makes rows, within one transaction."""

    def __init__(self, store: Store, txn: Any, clock: QueueClock, schedule: Schedule | None) -> None:
        self._store = store
        self._txn = txn
        self._now = clock.now()
        self._behind = wall_ms() - self._now  # the queue's clock is behind the wall's
        self._schedule = schedule
        self._queues: dict[int, tuple[str, bool]] = {}
        self._histories = store.histories(txn)

    def _queue(self, number: int) -> tuple[str, bool]:
        """A queue's name, and whether all in it is due."""
        found = self._queues.get(number)
        if found is None:
            row = self._store.queue(self._txn, number)
            found = self._queues[number] = ("?", False) if row is None else (str(row.name), row.moved)
        return found

    def row(self, ident: int, envelope: Envelope) -> Row:
        """One message."""
        flags, placements, behind = envelope.flags, envelope.placements, self._behind
        state = "quarantined" if flags & QUARANTINED else "held" if flags & HELD else "queued"
        queues, attempts, due, flying = [], 0, 0, False
        for placement in placements:
            name, moved = self._queue(placement.queue)
            queues.append(name)
            attempts = max(attempts, placement.attempts)
            at = min(placement.due, self._now) if moved else placement.due
            due = min(due, at) if due else at
            if self._schedule is not None:
                entry = self._schedule.get(ident, placement.queue)
                flying = flying or (entry is not None and entry.flying)
        scheduled = state == "queued"
        return Row(
            format_id(ident),
            "in flight" if flying else state,
            envelope.sender,
            self._recipients(envelope, self._histories.of(ident)),
            envelope.size,
            envelope.arrived / 1000,
            envelope.client,
            envelope.application,
            queues,
            attempts,
            (due + behind) / 1000 if scheduled and placements else 0,
            (envelope.deadline + behind) / 1000 if scheduled else 0,
        )

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


def page(
    store: Store, clock: QueueClock, schedule: Schedule | None, chosen: Filter, after: int, queues: list[QueueRow] | None
) -> dict[str, Any]:
    """The next messages behind id `after`: `{"lines", "ids", "after", "until"}`, a line of JSON for each (see `Row`), `after` 0
    when there are no more. `queues`: those in which they wait (None: any)."""
    lines: list[bytes] = []
    idents: list[int] = []
    until = time.monotonic() + PAGE_SECONDS
    fresh = store.fresh.live()
    meant = None if queues is None else {row.number for row in queues}
    everything = chosen == Filter(until=chosen.until)
    last = chosen.until or 1 << 64
    with store.env.begin() as txn:
        reader = _Reader(store, txn, clock, schedule)
        start = chosen.ident - 1 if chosen.ident else after
        for seen, (ident, envelope) in enumerate(store.idents(txn, start, fresh), 1):
            if ident > last or (chosen.ident and ident != chosen.ident):
                break
            after = ident
            if everything or (
                (meant is None or any(p.queue in meant for p in envelope.placements)) and chosen.matches(ident, envelope)
            ):
                lines.append(_encode(reader.row(ident, envelope)))
                idents.append(ident)
            if seen % LOOKED_AT == 0 and (len(lines) >= PAGE_ROWS or time.monotonic() > until):
                return {"lines": _joined(lines), "ids": idents, "after": after, "until": chosen.until}
    return {"lines": _joined(lines), "ids": idents, "after": 0, "until": chosen.until}


def _joined(lines: list[bytes]) -> bytes:
    return b"\n".join([*lines, b""])


def message(store: Store, clock: QueueClock, schedule: Schedule | None, ident: int) -> dict[str, Any] | None:
    """Everything about one message, its recipients' attempts included; None when it is not here."""
    with store.env.begin() as txn:
        envelope = store.envelope(txn, ident)
        if envelope is None:
            return None
        found: dict[str, Any] = msgspec.to_builtins(_Reader(store, txn, clock, schedule).row(ident, envelope))
        for index, state in store.recipient_states(txn, ident).items():
            found["recipients"][index]["attempts"] = [_attempt(a) for a in state.attempts]
        found["helo"], found["user"] = envelope.helo, envelope.user
        found["headers"] = envelope.headers
        return found


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "time": attempt.time / 1000,
        "result": attempt.kind,
        "phase": attempt.phase,
        "peer": attempt.peer,
        "reply": attempt.cause,
    }
