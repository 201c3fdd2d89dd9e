"""One shard's LMDB environment: the tables, and how they are read.

    message    id                     Envelope (with its placements: the keys of its due rows)
    recipient  id, n                  RecipientState; no row before the first outcome that leaves the message in the queue
    due        queue, time, id        one row per message and queue, of messages that are not held
    wake       time, queue            one row per queue that has a due row
    expiry     deadline, id           every message that is not held
    held       queue, id              every held or quarantined message
    unseen     class, id              every message that is not due, nor held, since filters have not looked at it: which
    quarantine judged, id             every held message that is in the quarantine: since when, and its octets
    imported   id                     every message that was imported, also when it has left: when, ms of the wall clock
    request, receipt, forget          what applications can ask, and what was handed in before: see receipts.py
    fresh, ended                      inlined messages, which have none of the rows above: see fresh.py
    queue      "n" name | "q" number  the number | QueueRow
    segment    number                 SegmentRow
    meta       word                   schema, last committed time ("seen"), highest id, highest queue number ("queues"), octets
                                      of judged mail in the quarantine ("quarantine"), where the journal ends ("journal")

Keys are big-endian, so that every query is a prefix scan. What a group commit changes: change.py.
"""

import struct
from collections.abc import Iterator
from hashlib import sha256
from heapq import merge
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec

from relaymta.disk.environment import CURE, MAP_SIZE, Environment
from relaymta.disk.journal import Rows
from relaymta.errors import StoreError
from relaymta.proto.envelope import (
    Body,
    Envelope,
    QueueName,
    RecipientState,
    decode_envelope,
    decode_recipient,
    encode,
)
from relaymta.queue.fresh import Fresh
from relaymta.queue.journal import JOURNAL

__all__ = ["Histories", "QueueRow", "Store", "key_of"]

SCHEMA = 2  # of a new shard
SCHEMA_UNSEEN = 3  # of one in which there has been a message that filters had not looked at: older versions take none for seen

LONGEST_KEY = 511  # octets, of LMDB

ID = struct.Struct(">Q")
RECIPIENT = struct.Struct(">QH")
DUE = struct.Struct(">IQQ")
WAKE = struct.Struct(">QI")
EXPIRY = struct.Struct(">QQ")
HELD_KEY = struct.Struct(">IQ")
UNSEEN_KEY = struct.Struct(">BQ")
QUARANTINE_KEY = struct.Struct(">BQ")
QUARANTINE_ROW = struct.Struct(">QQ")
NUMBER = struct.Struct(">I")

_TABLES = (
    "message", "recipient", "due", "wake", "expiry", "held", "queue", "segment", "meta", "fresh", "ended", "unseen", "quarantine",
    "imported", "request", "receipt", "forget",
)  # fmt: skip


class QueueRow(msgspec.Struct, array_like=True):
    """A queue's row in LMDB: its name and counts, `wake`: when it is scanned next (0: never, nothing is due), `not_before`: until
    when it is parked. Times are ms of the queue's clock. `unseen`: messages that filters have not looked at."""

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
    unseen: int = 0


_decode_queue = msgspec.msgpack.Decoder(QueueRow).decode
_decode_awaited = msgspec.msgpack.Decoder(tuple[bool, list[str]]).decode


def key_of(name: QueueName) -> bytes:
    """The key of a queue's name: the name itself, or its digest where LMDB has no room for it. Nothing that a client or an
    operator can choose as a domain or an application may make a commit fail."""
    found = b"n" + encode(name)
    return found if len(found) <= LONGEST_KEY else b"n#" + sha256(found).digest()


class Store(Environment):
    """The environment in `path`; `readonly`: while no daemon runs, or beside
    it; `locked`: as of Environment. All methods that write belong to the writer thread."""

    def __init__(self, path: Path, map_size: int = MAP_SIZE, readonly: bool = False, locked: bool = True) -> None:
        self._queues: dict[QueueName, QueueRow] = {}
        self._by_number: dict[int, QueueRow] = {}
        self.spare = False  # nothing is to be written that can be spared, such as receipts
        self._last_number = 0  # the highest number ever given to a queue, failed transactions included; 0: not read yet
        self._kept_number = 0  # the one that is committed in meta
        super().__init__(path, _TABLES, map_size, readonly, locked)

    def _opened(self, txn: Any) -> None:
        """StoreError when a newer version wrote the shard."""
        self._queues.clear()
        self._by_number.clear()
        schema = self.meta_in(txn, b"schema")
        if schema > SCHEMA_UNSEEN:
            raise StoreError(f"{self._path} was written by a newer relaymta (schema {schema}, not {SCHEMA_UNSEEN})")
        fresh = Fresh(self.tables["fresh"], self.tables["ended"])
        try:
            fresh.load(txn, self.meta_in(txn, b"seen"))
        except msgspec.MsgspecError as error:
            raise StoreError(f"{self._path}: a row of its newest messages cannot be read: {error}: {CURE}") from None
        self.fresh = fresh  # when it is complete, since other threads read it

    def journal_rows(self) -> Rows:
        """What there is of the journal, as it is committed. On the writer's thread, too, but not within a transaction."""
        with self.env.begin() as txn:
            return self.journal_rows_in(txn)

    def journal_rows_in(self, txn: Any) -> Rows:
        """As `journal_rows`, in the caller's transaction."""
        tail = []
        cursor = txn.cursor(db=self.tables["meta"])
        if cursor.set_range(JOURNAL + b"\0"):
            for key, value in cursor:
                if not key.startswith(JOURNAL):
                    break
                tail.append((key[len(JOURNAL) :], value))
        return Rows(txn.get(JOURNAL, db=self.tables["meta"]), tail)

    # Reading (any thread; the transaction is the caller's)

    def envelope(self, txn: Any, ident: int) -> Envelope | None:
        """A message's envelope, inlined or not; None when it is not in this shard."""
        raw = txn.get(ID.pack(ident), db=self.tables["message"])
        return self.fresh.get(ident) if raw is None else decode_envelope(raw)

    def points_at(self, txn: Any, ident: int, body: Body) -> bool:
        """Whether a message's row points at this body."""
        envelope = self.envelope(txn, ident)
        return envelope is not None and envelope.body == body

    def recipient_states(self, txn: Any, ident: int) -> dict[int, RecipientState]:
        """The recipients that have a history, by index."""
        return Histories(txn.cursor(db=self.tables["recipient"])).of(ident)

    def histories(self, txn: Any) -> "Histories":
        """A reader of what `recipient_states` returns, for many messages."""
        return Histories(txn.cursor(db=self.tables["recipient"]))

    def queue(self, txn: Any, number: int) -> QueueRow | None:
        """A queue's row as the transaction sees it; None when there is no such queue."""
        raw = txn.get(b"q" + NUMBER.pack(number), db=self.tables["queue"])
        return None if raw is None else _decode_queue(raw)

    def queue_number(self, txn: Any, name: QueueName) -> int:
        """A queue's number, 0 when there is no such queue."""
        raw = txn.get(key_of(name), db=self.tables["queue"])
        return 0 if raw is None else NUMBER.unpack(raw)[0]

    def queues(self, txn: Any, after: int = 0) -> Iterator[QueueRow]:
        """All queues with a number above `after`, in order."""
        cursor = txn.cursor(db=self.tables["queue"])
        if cursor.set_range(b"q" + NUMBER.pack(after + 1)):
            for key, value in cursor:
                if key[:1] != b"q":
                    return
                yield _decode_queue(value)

    def wakes(self, txn: Any, start: tuple[int, int] = (0, 0)) -> Iterator[tuple[int, int]]:
        """(time, queue number) from `start` on, the earliest first."""
        cursor = txn.cursor(db=self.tables["wake"])
        if cursor.set_range(WAKE.pack(*start)):
            for key, _ in cursor:
                yield WAKE.unpack(key)

    def due(self, txn: Any, queue: int) -> Iterator[tuple[int, int]]:
        """(time, id) of a queue's messages, the earliest first."""
        cursor = txn.cursor(db=self.tables["due"])
        prefix = NUMBER.pack(queue)
        if cursor.set_range(prefix):
            for key, _ in cursor:
                if key[:4] != prefix:
                    return
                _, moment, ident = DUE.unpack(key)
                yield moment, ident

    def held(self, txn: Any, queue: int, after: int = 0) -> Iterator[int]:
        """The ids of a queue's held messages, above `after`."""
        cursor = txn.cursor(db=self.tables["held"])
        prefix = NUMBER.pack(queue)
        if cursor.set_range(HELD_KEY.pack(queue, after + 1)):
            for key, _ in cursor:
                if key[:4] != prefix:
                    return
                yield HELD_KEY.unpack(key)[1]

    def unseen(self, txn: Any, after: tuple[int, int] = (0, 0)) -> Iterator[tuple[tuple[int, int], tuple[bool, list[str]]]]:
        """((class, id), (whether its client may relay, names of filters)) of the messages that filters have not looked at, above
        `after`: by class, and in it the oldest first."""
        if "unseen" not in self.tables:  # read only, and an older version wrote it
            return
        cursor = txn.cursor(db=self.tables["unseen"])
        if cursor.set_range(UNSEEN_KEY.pack(after[0], after[1] + 1)):
            for key, value in cursor:
                yield UNSEEN_KEY.unpack(key), _decode_awaited(value)

    def quarantined(self, txn: Any, judged: bool, after: int = 0) -> Iterator[tuple[int, int, int]]:
        """(id, since when, octets) of the messages in the quarantine that were judged, or of the others, above the id `after`."""
        if "quarantine" not in self.tables:  # read only, and an older version wrote it
            return
        cursor = txn.cursor(db=self.tables["quarantine"])
        if cursor.set_range(QUARANTINE_KEY.pack(judged, after + 1)):
            for key, value in cursor:
                found, ident = QUARANTINE_KEY.unpack(key)
                if found != judged:
                    return
                yield ident, *QUARANTINE_ROW.unpack(value)

    def expiries(self, txn: Any, after: tuple[int, int] = (0, 0)) -> Iterator[tuple[int, int]]:
        """(deadline, id) of all messages that are not held, the earliest first, above `after`."""
        cursor = txn.cursor(db=self.tables["expiry"])
        if cursor.set_range(EXPIRY.pack(*after)):
            yield from (pair for key, _ in cursor if (pair := EXPIRY.unpack(key)) > after)

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
        if cursor.set_range(ID.pack(after + 1)):
            for key, value in cursor:
                yield ID.unpack(key)[0], decode_envelope(value)

    # Writing

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
            self._last_number = max(self.meta_in(txn, b"queues"), self._highest_number(txn))
        self._last_number += 1  # never used again: entries, parked queues and moves name a queue by its number
        row = QueueRow(self._last_number, name)
        txn.put(key_of(name), NUMBER.pack(row.number), db=self.tables["queue"])
        txn.put(b"q" + NUMBER.pack(row.number), encode(row), db=self.tables["queue"])
        return row

    def _highest_number(self, txn: Any) -> int:
        cursor = txn.cursor(db=self.tables["queue"])
        if (cursor.set_range(b"r") and cursor.prev()) or cursor.last():
            key = cursor.key()
            return int(NUMBER.unpack(key[1:])[0]) if key[:1] == b"q" else 0
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
            txn.delete(key_of(row.name), db=self.tables["queue"])
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
        prefix, cursor = ID.pack(ident), self._cursor
        if self._next < prefix or prefix <= self._asked:
            self._next = cursor.key()[:8] if cursor.set_range(prefix) else b"\xff" * 8
        while self._next == prefix and cursor.key()[:8] == prefix:
            found[RECIPIENT.unpack(cursor.key())[1]] = decode_recipient(cursor.value())
            if not cursor.next():
                break
        if found:
            self._next = cursor.key()[:8] or b"\xff" * 8
        self._asked = prefix
        return found
