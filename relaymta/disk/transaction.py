"""One write transaction of a shard, with what every store has in it: segments, and parts that can be undone."""

from typing import Any

from relaymta.disk.environment import SEGMENT, Environment
from relaymta.disk.segments import SegmentRow
from relaymta.proto.envelope import encode

__all__ = ["Transaction"]


class Transaction:
    """Used on one thread: methods, then `finish`, or `abort` after an exception. A store derives from it, and writes what it has
    collected before it calls `begin_part` or commits."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._tables = environment.tables
        self.txn = environment.env.begin(write=True)
        self._whole: Any = None  # the transaction, while `txn` is a part of it

    def segment(self, number: int, row: SegmentRow) -> None:
        """Write a segment's row."""
        self.txn.put(SEGMENT.pack(number), encode(row), db=self._tables["segment"])

    def drop_segment(self, number: int) -> None:
        """Delete a segment's row."""
        self.txn.delete(SEGMENT.pack(number), db=self._tables["segment"])

    def settle(self) -> None:
        """Write what has been collected so far."""

    def begin_part(self) -> None:
        """Begin a nested transaction, which `keep_part` or `undo_part` ends."""
        self._whole, self.txn = self.txn, self._environment.env.begin(write=True, parent=self.txn)

    def keep_part(self) -> None:
        """Keep the part: it is committed if the whole transaction is."""
        self.txn.commit()
        self.txn, self._whole = self._whole, None

    def undo_part(self) -> None:
        """Undo all changes of the part."""
        self.txn.abort()
        self.txn, self._whole = self._whole, None

    def finish(self, now: int) -> None:
        """Write what was collected, and commit (`now`: ms of the shard's clock). lmdb.Error: nothing of it is committed (then
        call `abort`)."""
        raise NotImplementedError

    def abort(self) -> None:
        """Undo the whole transaction."""
        if self._whole is not None:
            self.txn.abort()
            self.txn = self._whole
        self.txn.abort()
