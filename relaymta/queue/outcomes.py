"""Outcomes on the writer thread: what they write (planned before the group's bodies are written), and their rows."""

from collections.abc import Callable

import msgspec

from relaymta.disk.big import BigBody
from relaymta.disk.folders import remove_file
from relaymta.disk.segments import COLD, HOT, Segments
from relaymta.errors import StoreError
from relaymta.ident import format_id
from relaymta.proto.envelope import (
    ATTEMPTS_KEPT,
    DELIVERED,
    FAILED,
    HELD,
    PENDING,
    PERMANENT,
    SUCCESS,
    UNSEEN,
    Attempt,
    Body,
    Envelope,
    Placement,
    RecipientState,
    shortened,
)
from relaymta.queue.change import Change
from relaymta.queue.dsns import Dsns, data_of
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.group import Assign
from relaymta.queue.store import Store

__all__ = ["Outcomes", "put_rows", "restore_rows"]


class Outcomes:
    """Records outcomes in the transaction under way. `freed`: the bodies whose messages end in it; `followed`: the messages
    whose large body is another one from then on. `assign`, `said`: as of the queue."""

    def __init__(self, store: Store, segments: Segments, dsns: Dsns, assign: Assign, said: Callable[[Entry], Attempt]) -> None:
        self._said = said
        self._store = store
        self._segments = segments
        self._dsns = dsns
        self._assign = assign
        self.freed: list[tuple[int, Body]] = []
        self.followed: list[int] = []

    def plan(self, outcome: Outcome) -> None:
        """Before the group is written: make an outcome's DSN, and plan the copy of a deferred body to a cold segment."""
        entry = outcome.entry
        envelope = entry.envelope
        deferred = any(a.kind not in (SUCCESS, PERMANENT) for a in outcome.results.values())
        body = envelope.body
        if deferred and entry.attempts == 0 and entry.sole and body is not None and body.segment:
            outcome.moved = body
        if outcome.failed and envelope.sender and outcome.dsn is None:
            outcome.dsn = self._dsns.make(entry, outcome.failed)

    def write(self, outcome: Outcome) -> None:
        """Stage the bodies that an outcome writes: those of its messages, and the copy of a deferred one."""
        for put in outcome.puts:
            self._place(put)
        if outcome.moved is not None:
            self._move(outcome)

    def _place(self, put: Put) -> None:
        """Write the body of a message that an outcome adds, where it is not there; that of a DSN about very many recipients is a
        large one."""
        segments, data, size = self._segments, put.data, put.envelope.size
        if data is None:
            return
        if size <= segments.big_limit:
            put.envelope.body = segments.append(put.ident, data, size, HOT)
            return
        path = segments.big_path(put.ident)
        remove_file(path)  # of a group that failed
        file = BigBody(path, put.ident)
        try:
            file.write(data)
            put.envelope.body = file.finish([])
        except BaseException:
            file.discard()
            raise

    def _move(self, outcome: Outcome) -> None:
        """Stage a copy of a deferred message's body in a cold segment, so that its hot segment is freed. A body that cannot be
        read stays where it is: the group does not fail because of it."""
        envelope = outcome.entry.envelope
        try:
            data = data_of(self._segments, outcome.entry)
        except StoreError:
            outcome.moved = None
            return
        outcome.moved = self._segments.append(outcome.entry.ident, data, envelope.size, COLD)

    def record(self, change: Change, outcome: Outcome, now: int) -> None:
        """Record an outcome; its message is removed when no recipient is pending in any queue."""
        entry = outcome.entry
        if outcome.success and entry.sole:
            histories = entry.attempts > 0 or entry.indexes is not None  # of recipients in other queues, too
            if entry.envelope.receipt:
                self._keep_receipt(change, outcome)
            if change.end_inlined(entry.ident) or change.finish_message(entry.ident, entry.envelope, histories, False):
                self.free_body(entry.ident, entry.envelope.body)
                for put in outcome.sent:
                    put_rows(change, put, now)
            else:
                self._ended_before(outcome)
            return
        change.materialize(entry.ident)
        envelope = change.envelope(entry.ident)
        placement = None if envelope is None else next((p for p in envelope.placements if p.queue == entry.queue), None)
        if envelope is None or placement is None:
            self._ended_before(outcome)
            return
        envelope = msgspec.structs.replace(envelope)
        row = self._store.row_numbered(change.txn, entry.queue)
        if row.moved:  # the last move counts, whatever route an earlier one has given the message
            envelope.route = row.name.route
        else:  # in flight while its queue was moved, and recorded before
            envelope.route = envelope.route or entry.envelope.route
        pending = self._record(change, outcome)
        change.unplace(entry.ident, envelope, placement)
        others = [p for p in envelope.placements if p is not placement]
        joined = sorted(set(placement.indexes or []) - {index for index, _ in entry.recipients})
        if joined:  # while these were in flight, other recipients of the message were deferred to their queue
            left = Placement(placement.queue, placement.due, placement.attempts, joined)
            self._wait(change, entry.ident, envelope, others, left)
        if pending:
            waits = change.row(outcome.name or entry.name)
            again = Placement(waits.number, max(outcome.retry_at, now), entry.attempts + 1, pending)
            self._wait(change, entry.ident, envelope, others, again)
        envelope.placements = others
        outcome.stays = bool(others)
        if not others:
            change.finish_message(entry.ident, envelope, histories=True)
            self.free_body(entry.ident, envelope.body)
        else:
            if outcome.moved is not None and envelope.body is not None and outcome.moved != envelope.body:
                self._segments.release(envelope.body)
                envelope.body = outcome.moved
            change.replace(entry.ident, envelope)
        for put in outcome.puts:
            put_rows(change, put, now)

    def _keep_receipt(self, change: Change, outcome: Outcome) -> None:
        """All recipients of a message have ended, those of this outcome by being delivered, unless it had left before."""
        entry = outcome.entry
        if change.envelope(entry.ident) is not None:
            change.keep_receipt(
                entry.ident, entry.envelope, dict.fromkeys((index for index, _ in entry.recipients), self._said(entry))
            )

    def _ended_before(self, outcome: Outcome) -> None:
        """Refuse an outcome whose message has left the queue: it changes nothing, and the bodies written for it are freed."""
        outcome.refused, outcome.gone = "the message had left the queue before", True
        for put in outcome.puts:
            self.free_body(put.ident, put.envelope.body)
        outcome.dsn = None
        if outcome.moved is not None:
            self.free_body(outcome.entry.ident, outcome.moved)
            outcome.moved = None

    def _wait(self, change: Change, ident: int, envelope: Envelope, places: list[Placement], new: Placement) -> None:
        """Add the placement `new` to `places` and to its queue. When the message has one in that queue already, they are joined,
        due at the later time of the two, and with the attempts of that with more: by these the store knows what it was given in
        an attempt whose outcome is recorded."""
        same = next((place for place in places if place.queue == new.queue), None)
        if same is not None:
            change.unplace(ident, envelope, same)
            places.remove(same)
            new.indexes = sorted({*(new.indexes or []), *(same.indexes or [])})
            new.due, new.attempts = max(new.due, same.due), max(new.attempts, same.attempts)
        places.append(new)
        change.place(ident, envelope, new)

    def _record(self, change: Change, outcome: Outcome) -> list[int]:
        """Write the states of the entry's recipients; the indexes of those still pending."""
        entry = outcome.entry
        states = self._store.recipient_states(change.txn, entry.ident) if entry.attempts else {}
        pending = []
        for index, _ in entry.recipients:
            state = states.get(index) or RecipientState()
            attempt = outcome.results.get(index)
            if attempt is not None:
                state.attempts = [*map(shortened, state.attempts), attempt][-ATTEMPTS_KEPT:]
                state.state = {SUCCESS: DELIVERED, PERMANENT: FAILED}.get(attempt.kind, PENDING)
            elif outcome.success:
                state.state = DELIVERED
                if entry.envelope.receipt:
                    state.attempts = [*map(shortened, state.attempts), self._said(entry)][-ATTEMPTS_KEPT:]
            change.set_recipient(entry.ident, index, state)
            if state.state == PENDING:
                pending.append(index)
        return pending

    def discard(self, outcome: Outcome) -> None:
        """An outcome was not recorded: remove what is in files of their own for it."""
        for put in outcome.puts:
            if put.envelope.body is not None and not put.envelope.body.segment:
                self._segments.remove_big(put.ident)
        outcome.dsn = None

    def replace(self, change: Change, put: Put, now: int) -> None:
        """Put a message in place of the unseen one of its id."""
        before, body = change.envelope(put.ident), put.envelope.body
        if before is None or not before.flags & UNSEEN:
            put.error = StoreError(f"message {format_id(put.ident)} had left the queue before")
            if body is not None and body.segment:
                self.free_body(put.ident, body)
            return
        rows = [self._store.row_numbered(change.txn, placement.queue) for placement in before.placements]
        moved = next((row.name.route for row in rows if row.moved), "")
        if moved:  # which only the row of its queue says
            put.envelope.route = moved
            put.names = self._assign(put.envelope, 0)
        change.finish_message(put.ident, before, histories=True, receipt=False)  # of recipients that have ended
        if body is not None and not body.segment:
            self.followed.append(put.ident)
        if before.body is not None and (before.body.segment or put.ident not in self.followed):
            self.free_body(put.ident, before.body)
        put_rows(change, put, now)

    def settle(self) -> None:
        """The transaction was committed: remove and rename files."""
        for ident in self.followed:
            self._segments.take_place(ident)
        for ident, body in self.freed:
            if not body.segment:
                self._segments.remove_big(ident)

    def forget(self) -> None:
        """The transaction is over."""
        self.freed.clear()
        self.followed.clear()

    def free_body(self, ident: int, body: Body | None) -> None:
        """Free a body in the group under way, in which its message ends."""
        if body is not None:
            self.freed.append((ident, body))


def put_rows(change: Change, put: Put, now: int) -> None:
    """Add a message with rows of its own: due now, or when it is to be tried first, held, or unseen."""
    envelope = put.envelope
    if envelope.flags & HELD:  # held on arrival: `hold` needs the rows of a message that is not held
        envelope.flags &= ~HELD
        put_rows(change, put, now)
        change.hold(put.ident, envelope, envelope.held_for)
        return
    due = max(now, envelope.not_before)
    if len(put.names) == 1:
        row = change.row(put.names[0][0])
        envelope.placements = [Placement(row.number, due)]
        change.put(put.ident, envelope, [row])
        return
    rows = [change.row(name) for name, _ in put.names]
    envelope.placements = [Placement(row.number, due, 0, indexes) for row, (_, indexes) in zip(rows, put.names, strict=True)]
    change.put(put.ident, envelope, rows)


def restore_rows(change: Change, put: Put) -> None:
    """Writer thread: add a message that was imported, with its history. StoreError when its id is there."""
    assert put.restored is not None
    placements, states = put.restored
    if change.envelope(put.ident) is not None:
        raise StoreError(f"message {format_id(put.ident)} is there already")
    rows = [change.row(name) for name, _ in put.names]
    for placement, row in zip(placements, rows, strict=True):
        placement.queue = row.number
    put.envelope.placements = placements
    change.restore(put.ident, put.envelope, states)
