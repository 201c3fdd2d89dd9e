"""One write transaction of a shard's LMDB environment. The counts and wake times of the queues that it touches are collected and
written once, by `finish`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from relaymta.disk.clock import wall_ms
from relaymta.disk.journal import Written
from relaymta.disk.transaction import Transaction
from relaymta.proto.envelope import (
    CLASSES,
    HELD,
    POLICY_HELD,
    QUARANTINED,
    UNSEEN,
    Attempt,
    Envelope,
    Placement,
    Quarantine,
    QueueName,
    RecipientState,
    decode_envelope,
    encode,
)
from relaymta.queue import receipts
from relaymta.queue.ages import add, remove
from relaymta.queue.entry import Put
from relaymta.queue.journal import JOURNAL, Journal
from relaymta.queue.store import (
    DUE,
    EXPIRY,
    HELD_KEY,
    ID,
    NUMBER,
    QUARANTINE_KEY,
    QUARANTINE_ROW,
    RECIPIENT,
    SCHEMA_UNSEEN,
    UNSEEN_KEY,
    WAKE,
    QueueRow,
    Store,
    key_of,
)

__all__ = ["Change"]

NOBODY: Mapping[int, Attempt] = MappingProxyType({})


class Change(Transaction):
    """One write transaction, used on one thread: methods, then `finish`, or `abort` after an exception."""

    def __init__(self, store: Store, journal: Journal | None = None) -> None:
        """`journal`: where events are noted; None: nowhere."""
        super().__init__(store)
        self._store = store
        self.journal = journal
        self._touched: set[int] = set()  # queues whose rows are to be written
        self._named: set[int] = set()  # queues whose rows may have been created here
        self._written: set[int] = set()  # queues whose rows were written before a part
        self._before: tuple[dict[Any, int], int, int] = ({}, 0, 0)  # what `undo_part` restores
        self._fresh = store.fresh
        self.highest = 0
        self.now = 0  # ms of the queue's clock, of the group

    def row(self, name: QueueName) -> QueueRow:
        """The row of the queue of this name, created when there is none."""
        row = self._store.row_for(self.txn, name)
        self._named.add(row.number)
        return row

    def envelope(self, ident: int) -> Envelope | None:
        """A message's envelope as this transaction has it: None when the transaction itself has ended it, too."""
        raw = self.txn.get(ID.pack(ident), db=self._tables["message"])
        if raw is not None:
            return decode_envelope(raw)
        return None if self._fresh.is_ending(ident) else self._fresh.get(ident)

    def inline(self, members: list[tuple[int, Envelope]], now: int) -> None:
        """Add new messages, by id, as inlined ones; their envelopes have their placements. `now`: ms of the queue's clock."""
        self._fresh.add(members, now)
        self.highest = max(self.highest, members[-1][0])

    def end_inlined(self, ident: int) -> bool:
        """Remove an inlined message; False when it is not inlined."""
        return self._fresh.end(ident) is not None

    def materialize(self, *idents: int) -> None:
        """Give inlined messages rows of their own; others are left alone. StoreError when the queue of one has no row."""
        for ident in idents:
            envelope = self._fresh.get(ident)
            if envelope is None:
                continue
            # Before the inlined form ends, since this may raise: a message always has one of the two forms.
            rows = [self._store.row_numbered(self.txn, placement.queue) for placement in envelope.placements]
            if self._fresh.end(ident) is not None:
                self.put(ident, envelope, rows)

    def rehouse(self, ident: int, envelope: Envelope, names: list[tuple[QueueName, list[int] | None]], now: int) -> None:
        """Give an inlined message rows of its own, due now, in these queues instead of those in which it waited."""
        rows = [self.row(name) for name, _ in names]
        placements = [Placement(row.number, now, 0, indexes) for row, (_, indexes) in zip(rows, names, strict=True)]
        if self._fresh.end(ident) is not None:
            self.put(ident, msgspec.structs.replace(envelope, placements=placements), rows)

    def put(self, ident: int, envelope: Envelope, rows: list[QueueRow]) -> None:
        """Add a message with rows of its own: due, or unseen. `rows`: the queue's row of each of its placements."""
        tables, put, unseen = self._tables, self.txn.put, envelope.flags & UNSEEN
        put(ID.pack(ident), encode(envelope), db=tables["message"])
        for placement, row in zip(envelope.placements, rows, strict=True):
            if unseen:
                row.unseen += 1
            else:
                put(DUE.pack(placement.queue, placement.due, ident), b"", db=tables["due"])
            row.messages += 1
            row.bytes += envelope.size
            add(row.ages, envelope.arrived)
            self._touched.add(row.number)
        put(EXPIRY.pack(envelope.deadline, ident), b"", db=tables["expiry"])
        if unseen:
            self._await(ident, envelope)
        if envelope.unseen is not None:  # also of one that is held, and unseen when it is released
            self.set_meta(b"schema", SCHEMA_UNSEEN)  # a version that does not know what that is must not open the shard any more
        if ident > self.highest:
            self.highest = ident

    def restore(self, ident: int, envelope: Envelope, states: list[RecipientState]) -> None:
        """Add a message as it was elsewhere, held, unseen or due, with its recipients' states; and note that it was imported."""
        self.replace(ident, envelope)
        for placement in envelope.placements:
            self.place(ident, envelope, placement)
        self.restore_marks(ident, envelope)
        for index, state in enumerate(states):
            if state.attempts or state.state:
                self.set_recipient(ident, index, state)
        self.highest = max(self.highest, ident)
        self.txn.delete(ID.pack(ident), db=self._tables["receipt"])  # of its end here, when it was exported
        self.txn.put(ID.pack(ident), wall_ms().to_bytes(8, "big"), db=self._tables["imported"])

    def restore_marks(self, ident: int, envelope: Envelope) -> None:
        """Write all rows of a message but its own, those of its placements and those of its recipients."""
        if not envelope.flags & HELD:
            self.txn.put(EXPIRY.pack(envelope.deadline, ident), b"", db=self._tables["expiry"])
        elif envelope.quarantine is not None:
            self._quarantine(ident, envelope, envelope.quarantine)
        if envelope.flags & UNSEEN:
            self._await(ident, envelope)
        if envelope.unseen is not None:
            self.set_meta(b"schema", SCHEMA_UNSEEN)

    def touch(self, number: int) -> None:
        """A queue's row, which the caller has changed, is to be written."""
        self._touched.add(number)

    def forget_imported(self, ident: int) -> None:
        """It may be imported again."""
        self.txn.delete(ID.pack(ident), db=self._tables["imported"])

    def replace(self, ident: int, envelope: Envelope) -> None:
        """Write a message's envelope again."""
        self.txn.put(ID.pack(ident), encode(envelope), db=self._tables["message"])

    def keep_request(self, put: Put, now: int) -> None:
        """Remember that a message was accepted under an idempotency key."""
        request = put.request
        assert request is not None
        kept = receipts.Kept(
            request.content, put.ident, put.envelope.arrived, request.recipients, request.refused, now + request.keep
        )
        receipts.keep_request(self.txn, self._tables, request, kept)

    def keep_receipt(self, ident: int, envelope: Envelope, delivered: Mapping[int, Attempt] = NOBODY) -> None:
        """Keep how a message ends that leaves the queue in this transaction, where its envelope asks for that. `delivered`:
        recipients whom the last attempt has reached, if that is not in their histories."""
        if not envelope.receipt or self._store.spare:
            return
        now = wall_ms()
        states = self._store.recipient_states(self.txn, ident)
        row = receipts.Receipt(
            envelope.user, envelope.application, envelope.sender, envelope.message_id, envelope.tags, envelope.arrived, now,
            receipts.states_of(envelope, states, now, delivered), envelope.client, self.now + envelope.receipt,
        )  # fmt: skip
        receipts.keep_receipt(self.txn, self._tables, ident, row)

    def forget(self, now: int) -> int:
        """As `receipts.forget`."""
        return receipts.forget(self.txn, self._tables, now)

    def finish_message(self, ident: int, envelope: Envelope, histories: bool, receipt: bool = True) -> bool:
        """Remove a message from every table. `histories`: recipient rows may exist; `receipt`: it leaves the queue, and how it
        has ended is to be kept (`keep_receipt`). False, and nothing is changed, when it has no row (any more)."""
        tables, delete = self._tables, self.txn.delete
        if not delete(ID.pack(ident), db=tables["message"]):
            return False
        if receipt and envelope.receipt:
            self.keep_receipt(ident, envelope)
        for placement in envelope.placements:
            self.unplace(ident, envelope, placement)
        if not envelope.flags & HELD:
            delete(EXPIRY.pack(envelope.deadline, ident), db=tables["expiry"])
        if envelope.flags & UNSEEN:
            self._await_no_more(ident, envelope)
        if envelope.quarantine is not None:
            self.forget_quarantined(ident, envelope.quarantine.judged)
        if histories:
            cursor = self.txn.cursor(db=tables["recipient"])
            prefix = ID.pack(ident)
            while cursor.set_range(prefix) and cursor.key()[:8] == prefix:
                cursor.delete()
        return True

    def unplace(self, ident: int, envelope: Envelope, placement: Placement) -> None:
        """Remove a message from one queue. The envelope is written by the caller."""
        row = self._store.row_numbered(self.txn, placement.queue)
        row.messages -= 1
        row.bytes -= envelope.size
        remove(row.ages, envelope.arrived)
        if placement.attempts:
            row.deferred -= 1
        if envelope.flags & HELD:
            row.held -= 1
            self.txn.delete(HELD_KEY.pack(placement.queue, ident), db=self._tables["held"])
        elif envelope.flags & UNSEEN:
            row.unseen -= 1
        else:
            self.txn.delete(DUE.pack(placement.queue, placement.due, ident), db=self._tables["due"])
        self._touched.add(placement.queue)

    def place(self, ident: int, envelope: Envelope, placement: Placement) -> None:
        """Add a message to one queue. The envelope, with this placement, is written by the caller."""
        row = self._store.row_numbered(self.txn, placement.queue)
        row.messages += 1
        row.bytes += envelope.size
        add(row.ages, envelope.arrived)
        if placement.attempts:
            row.deferred += 1
        if envelope.flags & HELD:
            row.held += 1
            self.txn.put(HELD_KEY.pack(placement.queue, ident), b"", db=self._tables["held"])
        elif envelope.flags & UNSEEN:
            row.unseen += 1
        else:
            self.txn.put(DUE.pack(placement.queue, placement.due, ident), b"", db=self._tables["due"])
        self._touched.add(placement.queue)

    def set_recipient(self, ident: int, index: int, state: RecipientState) -> None:
        """Write one recipient's history."""
        self.txn.put(RECIPIENT.pack(ident, index), encode(state), db=self._tables["recipient"])

    def hold(self, ident: int, envelope: Envelope, why: str, flags: int = HELD) -> None:
        """Hold a message: it is neither due nor expires; and it is in the quarantine, where its envelope says why. `why`: as of
        `Envelope.held_for`; `flags`: HELD, and QUARANTINED or POLICY_HELD. One that is held already is left alone."""
        if not envelope.flags & HELD:
            placements = envelope.placements
            for placement in placements:
                self.unplace(ident, envelope, placement)
            self.txn.delete(EXPIRY.pack(envelope.deadline, ident), db=self._tables["expiry"])
            if envelope.flags & UNSEEN:
                self._await_no_more(ident, envelope)
                envelope.flags &= ~UNSEEN
            envelope.flags |= flags
            envelope.held_for = why
            for placement in placements:
                self.place(ident, envelope, placement)
            if envelope.quarantine is not None:
                self._quarantine(ident, envelope, envelope.quarantine)
            self.replace(ident, envelope)
            self.tell("held", ident, envelope)

    def _quarantine(self, ident: int, envelope: Envelope, why: Quarantine) -> None:
        key = QUARANTINE_KEY.pack(why.judged, ident)
        self.txn.put(key, QUARANTINE_ROW.pack(why.since, envelope.size), db=self._tables["quarantine"])
        if why.judged:
            self.set_meta(b"quarantine", self._store.meta_in(self.txn, b"quarantine") + envelope.size)

    def forget_quarantined(self, ident: int, judged: bool) -> None:
        """Remove a message's row from the quarantine, whatever else there is of it: an older version may have ended it."""
        raw = self.txn.pop(QUARANTINE_KEY.pack(judged, ident), db=self._tables["quarantine"])
        if raw is not None and judged:
            octets = self._store.meta_in(self.txn, b"quarantine") - QUARANTINE_ROW.unpack(raw)[1]
            self.set_meta(b"quarantine", max(octets, 0))

    def release(self, ident: int, envelope: Envelope, now: int, deadline: int) -> None:
        """Release a held message: it is due now, or at its time, or first seen by the filters that have not looked at it, and has
        a new deadline (both ms of the queue's clock)."""
        if envelope.flags & HELD:
            for placement in envelope.placements:
                self.unplace(ident, envelope, placement)
            envelope.flags &= ~(HELD | QUARANTINED | POLICY_HELD)
            if envelope.unseen is not None:
                envelope.flags |= UNSEEN
                self._await(ident, envelope)
            if envelope.quarantine is not None:
                self.forget_quarantined(ident, envelope.quarantine.judged)
                envelope.quarantine = None
            envelope.held_for = ""
            envelope.deadline = deadline = deadline + max(0, envelope.not_before - now)
            for placement in envelope.placements:
                placement.due = max(now, envelope.not_before)
                self.place(ident, envelope, placement)
            self.txn.put(EXPIRY.pack(deadline, ident), b"", db=self._tables["expiry"])
            self.replace(ident, envelope)
            self.tell("released", ident, envelope)

    def tell(self, kind: str, ident: int, envelope: Envelope, reason: str = "") -> None:
        """Note in the journal, if there is one: as of `Journal.changed`."""
        if self.journal is not None:
            self.journal.changed(kind, ident, envelope, reason)

    def seen(self, ident: int, envelope: Envelope, now: int) -> None:
        """All filters have looked at an unseen message, and let it pass: it is due now (ms of the queue's clock), or at its
        time."""
        placements = envelope.placements
        for placement in placements:
            self.unplace(ident, envelope, placement)
        self._await_no_more(ident, envelope)
        envelope.flags &= ~UNSEEN
        envelope.unseen = None
        for placement in placements:
            placement.due = max(now, envelope.not_before)
            self.place(ident, envelope, placement)
        self.replace(ident, envelope)

    def unseen_by(self, ident: int, envelope: Envelope, left: list[str]) -> None:
        """Of the filters that are to look at an unseen message, these have not yet."""
        assert envelope.unseen is not None
        envelope.unseen = msgspec.structs.replace(envelope.unseen, filters=left)
        self._await(ident, envelope)
        self.replace(ident, envelope)

    def _await(self, ident: int, envelope: Envelope) -> None:
        """Filters are to look at a message."""
        unseen = envelope.unseen
        assert unseen is not None
        self.txn.put(_unseen_key(ident, envelope), encode((unseen.trusted, unseen.filters)), db=self._tables["unseen"])

    def _await_no_more(self, ident: int, envelope: Envelope) -> None:
        self.txn.delete(_unseen_key(ident, envelope), db=self._tables["unseen"])

    def move(self, number: int, name: QueueName) -> int:
        """Move all mail of a queue, due now, to the route in `name`, by renaming the queue. How many messages it holds; 0 when
        there is no such queue (any more)."""
        if self._store.queue(self.txn, number) is None:
            return 0
        row = self._store.row_numbered(self.txn, number)
        self._store.rename(self.txn, row, name)
        row.not_before = 0
        self._touched.add(number)
        return row.messages

    def park(self, number: int, not_before: int) -> None:
        """Exclude a queue from scans until `not_before` (0: wake it), whatever is due in it. One that was swept is ignored."""
        if self._store.queue(self.txn, number) is None:
            return
        row = self._store.row_numbered(self.txn, number)
        row.not_before = not_before
        self._touched.add(number)

    def sweep(self) -> int:
        """Delete queues that hold no mail, so that memory does not grow with the number of domains ever used; how many.

        Queue rows do not count inlined mail, so queues with inlined mail, committed or added by this transaction, are kept."""
        waiting = self._fresh.queues()
        empty = [
            row
            for row in self._store.queues(self.txn)
            if row.number not in waiting and not self._store.row_numbered(self.txn, row.number).messages
        ]
        for row in empty:
            self._settle_queue(row.number)
            if not row.moved:
                self.txn.delete(key_of(row.name), db=self._tables["queue"])
            self.txn.delete(b"q" + NUMBER.pack(row.number), db=self._tables["queue"])
            self._touched.discard(row.number)
        self._store.forget({row.number for row in empty})
        return len(empty)

    def set_meta(self, key: bytes, value: int) -> None:
        """Write a number in meta."""
        self.txn.put(key, str(value).encode(), db=self._tables["meta"])

    def finish(self, now: int) -> None:
        """Write what was collected, and commit. lmdb.Error: nothing of it is committed (then call `abort`)."""
        for number in self._touched:
            self._settle_queue(number)
        if self.highest:
            self.set_meta(b"highest", self.highest)
        self.set_meta(b"seen", now)
        if self.journal is not None:
            self._write_journal(self.journal.write(now))
        number = self._store.keep_number(self.txn)
        self._fresh.write(self.txn)
        self.txn.commit()
        if self.journal is not None:
            self.journal.files.settle()
        self._fresh.settle()
        self._store.number_kept(number)

    def _write_journal(self, written: Written | None) -> None:
        if written is not None:
            meta = self._tables["meta"]
            self.txn.put(JOURNAL, written.end, db=meta)
            for key, value in written.put:
                self.txn.put(JOURNAL + key, value, db=meta)
            for key in written.deleted:
                self.txn.delete(JOURNAL + key, db=meta)

    # A part: a nested transaction

    def begin_part(self) -> None:
        """Begin a nested transaction, which `keep_part` or `undo_part` ends."""
        for number in self._touched:
            self._settle_queue(number)  # so that what is undone can be read again as it was
        self._written |= self._touched | self._named
        self._touched, self._named = set(), set()
        self._before = self._fresh.ending(), self.highest, self.journal.mark() if self.journal is not None else 0
        super().begin_part()

    def undo_part(self) -> None:
        """Undo all changes of the part."""
        super().undo_part()
        self._store.forget(self._touched | self._named)
        self._touched, self._named = set(), set()
        ending, self.highest, mark = self._before
        self._fresh.end_only(ending)
        if self.journal is not None:
            self.journal.undo(mark)

    def _settle_queue(self, number: int) -> None:
        """Write a queue's row, and its wake row by the time of its first due row."""
        row = self._store.row_numbered(self.txn, number)
        cursor = self.txn.cursor(db=self._tables["due"])
        prefix = NUMBER.pack(number)
        wake = 0
        if cursor.set_range(prefix):
            key = cursor.key()
            if key[:4] == prefix:
                wake = max(0 if row.moved else DUE.unpack(key)[1], row.not_before, 1)
        if wake != row.wake:
            if row.wake:
                self.txn.delete(WAKE.pack(row.wake, number), db=self._tables["wake"])
            if wake:
                self.txn.put(WAKE.pack(wake, number), b"", db=self._tables["wake"])
            row.wake = wake
        self.txn.put(b"q" + prefix, encode(row), db=self._tables["queue"])

    def abort(self) -> None:
        """Undo the whole transaction."""
        super().abort()
        self._fresh.forget()
        self._store.forget(self._touched | self._named | self._written)


def _unseen_key(ident: int, envelope: Envelope) -> bytes:
    return UNSEEN_KEY.pack(CLASSES.get(envelope.priority, CLASSES["normal"]), ident)
