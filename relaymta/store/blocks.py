"""The index records of a mailbox: UID, flags and MODSEQ of each message, in blocks of at most 80, in the order of their UIDs.

A block is a run of records of 24 octets under the key of its first UID. SELECT, FLAGS, CHANGEDSINCE and UNSEEN read nothing else.
Values stay below 2 kB, so LMDB needs no overflow pages; emptied blocks go, and small neighbours join.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

from relaymta.errors import StoreError
from relaymta.proto.imap_records import LAST_UID, RECORD, chosen, merged, packed, runs

__all__ = ["LAST_UID", "MOST", "RECORD", "Blocks", "Chosen", "Record"]

MOST = 80
SMALL = MOST // 4  # a block with fewer records is joined with the next when both fit into one

KEY = struct.Struct(">QBI")
KIND = 1


class Record(NamedTuple):
    """One message in the index. `flags`: bits (rows.py)."""

    uid: int
    flags: int
    modseq: int


class Chosen(NamedTuple):
    """Some messages of a block, by their records: `key` and `block` are the block as it is."""

    key: bytes
    block: bytes
    records: bytes


def records_of(block: bytes) -> list[Record]:
    """The records of a block."""
    return [Record(uid, flags, modseq) for uid, _, flags, modseq in RECORD.iter_unpack(block)]


def _last_of(block: bytes) -> int:
    return int(RECORD.unpack_from(block, len(block) - RECORD.size)[0])


def _pack(record: Record) -> bytes:
    return RECORD.pack(record.uid, 0, record.flags, record.modseq)


class Blocks:
    """The blocks of one mailbox in a transaction; what is changed here, only in a write transaction."""

    def __init__(self, txn: Any, table: Any, mailbox: int) -> None:
        self._txn = txn
        self._table = table
        self._mailbox = mailbox
        self._prefix = KEY.pack(mailbox, KIND, 0)[:9]

    def __iter__(self) -> Iterator[Record]:
        for _, block in self.blocks():
            yield from records_of(block)

    def blocks(self, first: int = 1) -> Iterator[tuple[int, bytes]]:
        """(first UID, octets) of each block, from the one on that holds UID `first` or, when none does, the next one."""
        cursor = self._txn.cursor(db=self._table)
        if not self._seek(cursor, first) and not cursor.set_range(KEY.pack(self._mailbox, KIND, first)):
            return
        for key, block in cursor:
            if key[:9] != self._prefix:
                return
            yield KEY.unpack(key)[2], block

    def _seek(self, cursor: Any, uid: int) -> bool:
        """Put the cursor on the last block whose first UID is at most `uid`; False when there is none."""
        key = self._prefix + uid.to_bytes(4, "big")
        found = cursor.set_range(key)
        if found and cursor.key() == key:
            return True
        found = cursor.prev() if found else cursor.last()
        return bool(found) and cursor.key()[:9] == self._prefix

    def block(self, uid: int) -> bytes:
        """The block in which a message is, if it is there; none where no block can have it."""
        cursor = self._txn.cursor(db=self._table)
        return cursor.value() if self._seek(cursor, uid) else b""

    def get(self, uid: int) -> Record | None:
        """A message's record; None when it is not in the mailbox."""
        cursor = self._txn.cursor(db=self._table)
        if not self._seek(cursor, uid):
            return None
        records = records_of(cursor.value())
        place = bisect_left(records, (uid,))
        return records[place] if place < len(records) and records[place].uid == uid else None

    def range(self, first: int, last: int) -> Iterator[Record]:
        """The records with UIDs from `first` to `last`."""
        for start, block in self.blocks(first):
            if start > last:
                return
            for record in records_of(block):
                if first <= record.uid <= last:
                    yield record

    def choose(self, uids: list[int]) -> list[Chosen]:
        """The messages with these UIDs (in order) that are there, by their blocks."""
        found, done = [], 0
        cursor = self._txn.cursor(db=self._table)
        while done < len(uids):
            if not self._seek(cursor, uids[done]) and not cursor.set_range(KEY.pack(self._mailbox, KIND, uids[done])):
                break
            if cursor.key()[:9] != self._prefix:
                break
            key, block = cursor.item()
            end = bisect_right(uids, _last_of(block), done)
            if end > done:
                records = chosen(block, runs(packed(uids[done:end])))
                if records:
                    found.append(Chosen(key, block, records))
                done = end
            elif cursor.next() and cursor.key()[:9] == self._prefix:  # the UID is between two blocks
                done = bisect_left(uids, KEY.unpack(cursor.key())[2], done)
            else:
                break
        return found

    def extend(self, records: bytes) -> None:
        """Add messages, by their records, whose UIDs are higher than all that are there."""
        cursor = self._txn.cursor(db=self._table)
        start = 0
        if self._seek(cursor, LAST_UID):
            key, block = cursor.item()
            uid = RECORD.unpack_from(records)[0]
            if _last_of(block) >= uid:
                raise StoreError(f"UID {uid} of mailbox {self._mailbox} is not the highest")
            start = max(MOST * RECORD.size - len(block), 0)
            if start:
                self._txn.put(key, block + records[:start], db=self._table)
        for begin in range(start, len(records), MOST * RECORD.size):
            block = records[begin : begin + MOST * RECORD.size]
            self._txn.put(KEY.pack(self._mailbox, KIND, RECORD.unpack_from(block)[0]), block, db=self._table)

    def replace(self, chosen: Chosen, records: bytes) -> None:
        """Write messages that were chosen anew, by their records; nothing else has changed since."""
        self._txn.put(chosen.key, merged(chosen.block, records), db=self._table)

    def remove(self, uids: list[int]) -> None:
        """Remove messages that are there; `uids` in order."""
        cursor, done = self._txn.cursor(db=self._table), 0
        while done < len(uids):
            if not self._seek(cursor, uids[done]):
                raise KeyError(uids[done])
            key, block = cursor.item()
            records = records_of(block)
            end = bisect_right(uids, records[-1].uid, done)
            gone = set(uids[done:end])
            missing = gone - {record.uid for record in records}
            if missing or not gone:
                raise KeyError(min(missing, default=uids[done]))
            self._write(key, [record for record in records if record.uid not in gone])
            done = end

    def write_all(self, records: list[Record]) -> None:
        """Write the index anew."""
        cursor = self._txn.cursor(db=self._table)
        while cursor.set_range(self._prefix) and cursor.key()[:9] == self._prefix:
            cursor.delete()
        for start in range(0, len(records), MOST):
            block = records[start : start + MOST]
            self._txn.put(KEY.pack(self._mailbox, KIND, block[0].uid), b"".join(map(_pack, block)), db=self._table)

    def _write(self, key: bytes, records: list[Record]) -> None:
        """Write what is left of a block; one that has become small is joined with its neighbours where both fit into one."""
        first = KEY.pack(self._mailbox, KIND, records[0].uid) if records else b""
        if key != first:
            self._txn.delete(key, db=self._table)
        if not records:
            return
        if len(records) < SMALL:
            before, behind = self._neighbour(first, back=True), self._neighbour(first, back=False)
            for other, both in ((before, [*before, *records]), (behind, [*records, *behind])):
                if other and len(both) <= MOST:
                    self._txn.delete(KEY.pack(self._mailbox, KIND, other[0].uid), db=self._table)
                    self._txn.delete(first, db=self._table)
                    first, records = KEY.pack(self._mailbox, KIND, both[0].uid), both
                    break
        self._txn.put(first, b"".join(map(_pack, records)), db=self._table)

    def _neighbour(self, key: bytes, back: bool) -> list[Record]:
        """The records of the block in front of `key` or behind it; none when there is no such block."""
        cursor = self._txn.cursor(db=self._table)
        if cursor.set_range(key):
            if back:
                found = cursor.prev()
            else:
                found = cursor.key() != key or cursor.next()
        else:
            found = back and cursor.last()
        return records_of(cursor.value()) if found and cursor.key()[:9] == self._prefix else []
