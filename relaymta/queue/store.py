"""One shard's LMDB environment: the tables, and the changes that a group commit makes to them.

    message    id                     Envelope (with its placements: the keys of its due rows)
    recipient  id, n                  RecipientState; no row before the first outcome that leaves the message in the queue
    due        queue, time, id        one row per message and queue, of messages that are not held
    wake       time, queue            one row per queue that has a due row
    expiry     deadline, id           every message that is not held
    held       queue, id              every held or quarantined message
    fresh, ended                      inlined messages, which have none of the rows above: see fresh.py
    queue      "n" name | "q" number  the number | QueueRow
    segment    number                 SegmentRow
    meta       word                   schema, last committed time ("seen"), highest id, highest queue number ("queues")

Keys are big-endian, so that every query is a prefix scan. A `Change` is one write transaction under way; the counts and wake
times of the queues that it touches are collected and written once, by `finish`.
"""

import os
import struct
from collections.abc import Iterator
from heapq import merge
from operator import itemgetter
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from relaymta.errors import StoreError
from relaymta.proto.envelope import (
    HELD,
    POLICY_HELD,
    QUARANTINED,
    Envelope,
    Placement,
    QueueName,
    RecipientState,
    decode_envelope,
    decode_recipient,
    encode,
)
from relaymta.queue.ages import add, remove
from relaymta.queue.fresh import Fresh
from relaymta.queue.segments import SegmentRow

__all__ = ["Change", "Histories", "QueueRow", "Store"]

SCHEMA = 2
MAP_SIZE = 64 << 30  # sparse: costs address space only

_ID = struct.Struct(">Q")
_RECIPIENT = struct.Struct(">QH")
_DUE = struct.Struct(">IQQ")
_WAKE = struct.Struct(">QI")
_EXPIRY = struct.Struct(">QQ")
_HELD = struct.Struct(">IQ")
_NUMBER = struct.Struct(">I")

_TABLES = ("message", "recipient", "due", "wake", "expiry", "held", "queue", "segment", "meta", "fresh", "ended")

_decode_segment = msgspec.msgpack.Decoder(SegmentRow).decode


class QueueRow(msgspec.Struct, array_like=True):
    """A queue's row in LMDB: its name and counts, `wake`: when it is scanned next (0: never, nothing is due), `not_before`: until
    when it is parked. Times are ms of the queue's clock."""

    number: int
    name: QueueName
    messages: int = 0
    bytes: int = 0
    deferred: int = 0
    held: int = 0
    wake: int = 0
    not_before: int = 0
    ages: list[list[int]] = []
    moved: bool = False  # to another route, by an operator: all mail in it is due, and none is added


_decode_queue = msgspec.msgpack.Decoder(QueueRow).decode


class Store:
    """The environment in `path`; `readonly`: while no daemon runs. All methods that write belong to the writer thread."""

    def __init__(self, path: Path, map_size: int = MAP_SIZE, readonly: bool = False) -> None:
        self._path = path
        self._map_size = map_size
        self._readonly = readonly
        self._queues: dict[QueueName, QueueRow] = {}
        self._by_number: dict[int, QueueRow] = {}
        self._last_number = 0  # the highest number ever given to a queue, failed transactions included; 0: not read yet
        self._kept_number = 0  # the one that is committed in meta
        self._open()

    def _open(self) -> None:
        created = not (self._path / "data.mdb").exists()
        if created:
            self._path.mkdir(mode=0o700, exist_ok=True)
        self.env = lmdb.open(
            str(self._path),
            map_size=self._map_size,
            max_dbs=16,
            max_readers=64,
            sync=True,
            metasync=True,
            mode=0o600,
            readonly=self._readonly,
        )
        self.env.reader_check()
        self.tables: dict[str, Any] = {name: self.env.open_db(name.encode(), create=not self._readonly) for name in _TABLES}
        if self.meta(b"schema") > SCHEMA:
            raise StoreError(f"{self._path} was written by a newer relaymta (schema {self.meta(b'schema')}, not {SCHEMA})")
        self.fresh = Fresh(self.tables["fresh"], self.tables["ended"])
        with self.env.begin() as txn:
            self.fresh.load(txn, self.meta(b"seen"))
        if created:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def reopen(self) -> None:
        """Close and open again after a failed commit: the state is that of the last commit that returned."""
        self.env.close()
        self._queues.clear()
        self._by_number.clear()
        self._open()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    # Reading (any thread; the transaction is the caller's)

    def meta(self, key: bytes) -> int:
        """A number in meta; 0 when there is none."""
        with self.env.begin() as txn:
            raw = txn.get(key, db=self.tables["meta"])
        return int(raw) if raw else 0

    def segments(self) -> dict[int, SegmentRow]:
        """All segment rows, by number."""
        with self.env.begin() as txn:
            return {_NUMBER.unpack(key)[0]: _decode_segment(value) for key, value in txn.cursor(db=self.tables["segment"])}

    def envelope(self, txn: Any, ident: int) -> Envelope | None:
        """A message's envelope, inlined or not; None when it is not in this shard."""
        raw = txn.get(_ID.pack(ident), db=self.tables["message"])
        return self.fresh.get(ident) if raw is None else decode_envelope(raw)

    def recipient_states(self, txn: Any, ident: int) -> dict[int, RecipientState]:
        """The recipients that have a history, by index."""
        return Histories(txn.cursor(db=self.tables["recipient"])).of(ident)

    def histories(self, txn: Any) -> "Histories":
        """A reader of what `recipient_states` returns, for many messages."""
        return Histories(txn.cursor(db=self.tables["recipient"]))

    def queue(self, txn: Any, number: int) -> QueueRow | None:
        """A queue's row as the transaction sees it; None when there is no such queue."""
        raw = txn.get(b"q" + _NUMBER.pack(number), db=self.tables["queue"])
        return None if raw is None else _decode_queue(raw)

    def queue_number(self, txn: Any, name: QueueName) -> int:
        """A queue's number, 0 when there is no such queue."""
        raw = txn.get(b"n" + encode(name), db=self.tables["queue"])
        return 0 if raw is None else _NUMBER.unpack(raw)[0]

    def queues(self, txn: Any, after: int = 0) -> Iterator[QueueRow]:
        """All queues with a number above `after`, in order."""
        cursor = txn.cursor(db=self.tables["queue"])
        if cursor.set_range(b"q" + _NUMBER.pack(after + 1)):
            for key, value in cursor:
                if key[:1] != b"q":
                    return
                yield _decode_queue(value)

    def wakes(self, txn: Any) -> Iterator[tuple[int, int]]:
        """(time, queue number), the earliest first."""
        for key, _ in txn.cursor(db=self.tables["wake"]):
            yield _WAKE.unpack(key)

    def due(self, txn: Any, queue: int) -> Iterator[tuple[int, int]]:
        """(time, id) of a queue's messages, the earliest first."""
        cursor = txn.cursor(db=self.tables["due"])
        prefix = _NUMBER.pack(queue)
        if cursor.set_range(prefix):
            for key, _ in cursor:
                if key[:4] != prefix:
                    return
                _, moment, ident = _DUE.unpack(key)
                yield moment, ident

    def held(self, txn: Any, queue: int, after: int = 0) -> Iterator[int]:
        """The ids of a queue's held messages, above `after`."""
        cursor = txn.cursor(db=self.tables["held"])
        prefix = _NUMBER.pack(queue)
        if cursor.set_range(_HELD.pack(queue, after + 1)):
            for key, _ in cursor:
                if key[:4] != prefix:
                    return
                yield _HELD.unpack(key)[1]

    def expiries(self, txn: Any) -> Iterator[tuple[int, int]]:
        """(deadline, id) of all messages that are not held, the earliest first."""
        for key, _ in txn.cursor(db=self.tables["expiry"]):
            yield _EXPIRY.unpack(key)

    def idents(self, txn: Any, after: int, fresh: list[tuple[int, Envelope]]) -> Iterator[tuple[int, Envelope]]:
        """All messages by id, above `after`. `fresh`: the inlined ones, as `fresh.live()` returned them before `txn` began, so
        that one that is materialized meanwhile is not missed."""
        inlined = (pair for pair in fresh if pair[0] > after)
        last = after
        for ident, envelope in merge(self._rows(txn, after), inlined, key=itemgetter(0)):
            if ident != last:
                yield ident, envelope
            last = ident

    def _rows(self, txn: Any, after: int) -> Iterator[tuple[int, Envelope]]:
        cursor = txn.cursor(db=self.tables["message"])
        if cursor.set_range(_ID.pack(after + 1)):
            for key, value in cursor:
                yield _ID.unpack(key)[0], decode_envelope(value)

    def used(self) -> tuple[int, int]:
        """(octets of the map in use up to the last page, the map's size)."""
        info = self.env.info()
        return (info["last_pgno"] + 1) * self.env.stat()["psize"], info["map_size"]

    # Writing

    def change(self) -> "Change":
        """Begin a write transaction."""
        return Change(self)

    def row_for(self, txn: Any, name: QueueName) -> QueueRow:
        """A queue's row, created (in the transaction under way) when there is none."""
        row = self._queues.get(name)
        if row is None:
            number = self.queue_number(txn, name)
            found = self.queue(txn, number) if number else None
            row = found if found is not None else self._new_queue(txn, name)
            self._queues[name] = self._by_number[row.number] = row
        return row

    def _new_queue(self, txn: Any, name: QueueName) -> QueueRow:
        if not self._last_number:
            kept = txn.get(b"queues", db=self.tables["meta"])
            self._last_number = max(int(kept) if kept else 0, self._highest_number(txn))
        self._last_number += 1  # never used again: entries, parked queues and moves name a queue by its number
        row = QueueRow(self._last_number, name)
        txn.put(b"n" + encode(name), _NUMBER.pack(row.number), db=self.tables["queue"])
        txn.put(b"q" + _NUMBER.pack(row.number), encode(row), db=self.tables["queue"])
        return row

    def _highest_number(self, txn: Any) -> int:
        cursor = txn.cursor(db=self.tables["queue"])
        if (cursor.set_range(b"r") and cursor.prev()) or cursor.last():
            key = cursor.key()
            return int(_NUMBER.unpack(key[1:])[0]) if key[:1] == b"q" else 0
        return 0

    def row_numbered(self, txn: Any, number: int) -> QueueRow:
        """The row of a queue by its number. StoreError when there is no such queue."""
        row = self._by_number.get(number)
        if row is None:
            row = self.queue(txn, number)
            if row is None:
                raise StoreError(f"queue number {number} has no row")
            self._by_number[number] = row
            if not row.moved:
                self._queues[row.name] = row
        return row

    def forget(self, rows: "set[int]") -> None:
        """Drop the cached rows of these queues: the transaction that changed them failed, or they were deleted."""
        for number in rows:
            row = self._by_number.pop(number, None)
            if row is not None and self._queues.get(row.name) is row:
                del self._queues[row.name]

    def keep_number(self, txn: Any) -> int:
        """Write the highest queue number in the transaction under way, when it has changed since the last commit; the number."""
        if self._last_number != self._kept_number:
            txn.put(b"queues", str(self._last_number).encode(), db=self.tables["meta"])
        return self._last_number

    def number_kept(self, number: int) -> None:
        """Note that the transaction in which `keep_number` wrote this number has been committed."""
        self._kept_number = number

    def rename(self, txn: Any, row: QueueRow, name: QueueName) -> None:
        """Rename a queue so that no new mail is assigned to it (in the transaction under way, which also writes its row)."""
        if not row.moved:
            txn.delete(b"n" + encode(row.name), db=self.tables["queue"])
            self._queues.pop(row.name, None)
        row.name = name
        row.moved = True


class Histories:
    """Reads the recipients' histories of many messages. Cheapest in the order of their ids: one without costs a comparison."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._next = bytes(8)  # the first eight octets of the key at the cursor
        self._asked = bytes(8)

    def of(self, ident: int) -> dict[int, RecipientState]:
        """The recipients that have a history, by index."""
        found: dict[int, RecipientState] = {}
        prefix, cursor = _ID.pack(ident), self._cursor
        if self._next < prefix or prefix <= self._asked:
            self._next = cursor.key()[:8] if cursor.set_range(prefix) else b"\xff" * 8
        while self._next == prefix and cursor.key()[:8] == prefix:
            found[_RECIPIENT.unpack(cursor.key())[1]] = decode_recipient(cursor.value())
            if not cursor.next():
                break
        if found:
            self._next = cursor.key()[:8] or b"\xff" * 8
        self._asked = prefix
        return found


class Change:
    """One write transaction, used on one thread: methods, then `finish`, or `abort` after an exception."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tables = store.tables
        self.txn = store.env.begin(write=True)
        self._touched: set[int] = set()  # queues whose rows are to be written
        self._named: set[int] = set()  # queues whose rows may have been created here
        self._written: set[int] = set()  # queues whose rows were written before a part
        self._whole: Any = None  # the transaction, while `txn` is a part of it
        self._before: tuple[dict[Any, int], int] = ({}, 0)  # what `undo_part` restores
        self._fresh = store.fresh
        self.highest = 0

    def row(self, name: QueueName) -> QueueRow:
        """The row of the queue of this name, created when there is none."""
        row = self._store.row_for(self.txn, name)
        self._named.add(row.number)
        return row

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
        """Add a message with rows of its own. `rows`: the queue's row of each of its placements."""
        tables, put = self._tables, self.txn.put
        put(_ID.pack(ident), encode(envelope), db=tables["message"])
        for placement, row in zip(envelope.placements, rows, strict=True):
            put(_DUE.pack(placement.queue, placement.due, ident), b"", db=tables["due"])
            row.messages += 1
            row.bytes += envelope.size
            add(row.ages, envelope.arrived)
            self._touched.add(row.number)
        put(_EXPIRY.pack(envelope.deadline, ident), b"", db=tables["expiry"])
        if ident > self.highest:
            self.highest = ident

    def replace(self, ident: int, envelope: Envelope) -> None:
        """Write a message's envelope again."""
        self.txn.put(_ID.pack(ident), encode(envelope), db=self._tables["message"])

    def finish_message(self, ident: int, envelope: Envelope, histories: bool) -> bool:
        """Remove a message from every table. `histories`: recipient rows may exist. False, and nothing is changed, when it has no
        row (any more)."""
        tables, delete = self._tables, self.txn.delete
        if not delete(_ID.pack(ident), db=tables["message"]):
            return False
        for placement in envelope.placements:
            self.unplace(ident, envelope, placement)
        if not envelope.flags & HELD:
            delete(_EXPIRY.pack(envelope.deadline, ident), db=tables["expiry"])
        if histories:
            cursor = self.txn.cursor(db=tables["recipient"])
            prefix = _ID.pack(ident)
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
            self.txn.delete(_HELD.pack(placement.queue, ident), db=self._tables["held"])
        else:
            self.txn.delete(_DUE.pack(placement.queue, placement.due, ident), db=self._tables["due"])
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
            self.txn.put(_HELD.pack(placement.queue, ident), b"", db=self._tables["held"])
        else:
            self.txn.put(_DUE.pack(placement.queue, placement.due, ident), b"", db=self._tables["due"])
        self._touched.add(placement.queue)

    def set_recipient(self, ident: int, index: int, state: RecipientState) -> None:
        """Write one recipient's history."""
        self.txn.put(_RECIPIENT.pack(ident, index), encode(state), db=self._tables["recipient"])

    def hold(self, ident: int, envelope: Envelope, flags: int = HELD) -> None:
        """Hold a message: it is neither due nor expires. `flags`: HELD, and QUARANTINED or POLICY_HELD. One that is held already
        is left alone."""
        if not envelope.flags & HELD:
            placements = envelope.placements
            for placement in placements:
                self.unplace(ident, envelope, placement)
            self.txn.delete(_EXPIRY.pack(envelope.deadline, ident), db=self._tables["expiry"])
            envelope.flags |= flags
            for placement in placements:
                self.place(ident, envelope, placement)
            self.replace(ident, envelope)

    def release(self, ident: int, envelope: Envelope, now: int, deadline: int) -> None:
        """Release a held message: it is due now and has a new deadline (both ms of the queue's clock)."""
        if envelope.flags & HELD:
            for placement in envelope.placements:
                self.unplace(ident, envelope, placement)
            envelope.flags &= ~(HELD | QUARANTINED | POLICY_HELD)
            envelope.deadline = deadline
            for placement in envelope.placements:
                placement.due = now
                self.place(ident, envelope, placement)
            self.txn.put(_EXPIRY.pack(deadline, ident), b"", db=self._tables["expiry"])
            self.replace(ident, envelope)

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
                self.txn.delete(b"n" + encode(row.name), db=self._tables["queue"])
            self.txn.delete(b"q" + _NUMBER.pack(row.number), db=self._tables["queue"])
            self._touched.discard(row.number)
        self._store.forget({row.number for row in empty})
        return len(empty)

    def segment(self, number: int, row: SegmentRow) -> None:
        """Write a segment's row."""
        self.txn.put(_NUMBER.pack(number), encode(row), db=self._tables["segment"])

    def drop_segment(self, number: int) -> None:
        """Delete a segment's row."""
        self.txn.delete(_NUMBER.pack(number), db=self._tables["segment"])

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
        number = self._store.keep_number(self.txn)
        self._fresh.write(self.txn)
        self.txn.commit()
        self._fresh.settle()
        self._store.number_kept(number)

    # A part: a nested transaction

    def begin_part(self) -> None:
        """Begin a nested transaction, which `keep_part` or `undo_part` ends."""
        for number in self._touched:
            self._settle_queue(number)  # so that what is undone can be read again as it was
        self._written |= self._touched | self._named
        self._touched, self._named = set(), set()
        self._before = self._fresh.ending(), self.highest
        self._whole, self.txn = self.txn, self._store.env.begin(write=True, parent=self.txn)

    def keep_part(self) -> None:
        """Keep the part: it is committed if the whole transaction is."""
        self.txn.commit()
        self.txn, self._whole = self._whole, None

    def undo_part(self) -> None:
        """Undo all changes of the part."""
        self.txn.abort()
        self.txn, self._whole = self._whole, None
        self._store.forget(self._touched | self._named)
        self._touched, self._named = set(), set()
        ending, self.highest = self._before
        self._fresh.end_only(ending)

    def _settle_queue(self, number: int) -> None:
        """Write a queue's row, and its wake row by the time of its first due row."""
        row = self._store.row_numbered(self.txn, number)
        cursor = self.txn.cursor(db=self._tables["due"])
        prefix = _NUMBER.pack(number)
        wake = 0
        if cursor.set_range(prefix):
            key = cursor.key()
            if key[:4] == prefix:
                wake = max(0 if row.moved else _DUE.unpack(key)[1], row.not_before, 1)
        if wake != row.wake:
            if row.wake:
                self.txn.delete(_WAKE.pack(row.wake, number), db=self._tables["wake"])
            if wake:
                self.txn.put(_WAKE.pack(wake, number), b"", db=self._tables["wake"])
            row.wake = wake
        self.txn.put(b"q" + prefix, encode(row), db=self._tables["queue"])

    def abort(self) -> None:
        """Undo the whole transaction."""
        if self._whole is not None:
            self.txn.abort()
            self.txn = self._whole
        self.txn.abort()
        self._fresh.forget()
        self._store.forget(self._touched | self._named | self._written)
