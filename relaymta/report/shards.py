"""The journal of one shard, followed up to what its owner has committed."""

from pathlib import Path

import msgspec

from relaymta.disk.environment import Environment
from relaymta.disk.journal import End, Found, JournalReader, Piece, Rows
from relaymta.errors import StoreError
from relaymta.queue.journal import JOURNAL, Record, decode_records

__all__ = ["Shard", "records_of"]


class Shard:
    """`number`: the shard's. All methods block, and may be called on any thread. StoreError, OSError: it cannot be read now."""

    def __init__(self, spool: Path, number: int) -> None:
        self.number = number
        self._path = spool / f"shard-{number}"
        self._environment: Environment | None = None
        self.reader = JournalReader(self._path / "journal")
        self.known = End()  # where it ended when somebody looked last
        self._synced = 0, 0

    def open(self) -> None:
        """Open the store, once its owner has made it. On one thread at a time."""
        if self._environment is None:
            if not (self._path / "lmdb" / "data.mdb").exists():
                raise StoreError(f"{self._path}: there is no store yet")
            self._environment = Environment(self._path / "lmdb", ("meta",), readonly=True)
        if not self._environment.complete():
            raise StoreError(f"{self._path}: there is no store yet")

    def end(self) -> End:
        """Where what is committed ends. After `open`."""
        environment = self._environment
        assert environment is not None
        with environment.reading() as txn:
            row = txn.get(JOURNAL, db=environment.tables["meta"])
        self.known, self._synced = End.of(row), Rows(row).synced
        return self.known

    def read(self, place: End, most: int) -> Piece:
        """As `JournalReader.read`, up to the committed end."""
        return self.reader.read(place, self.end(), most, self._synced)

    def from_time(self, moment: int) -> End:
        """The first place of the last file that begins before a time (ms UTC): what happened since then is behind it, unless it
        is there no more."""
        end = self.end()
        starts = self.reader.starts(end)
        found = starts[0] if starts else end
        for start in starts:
            first = self.reader.read(start, end, 1).records
            if first and (records := records_of(first[0])):
                if records[0].time >= moment:
                    break  # a later one may begin before it only since the clock was set back
                found = start
        return found

    def close(self) -> None:
        """Nobody reads any more."""
        if self._environment is not None:
            self._environment.close()


def records_of(found: Found) -> list[Record]:
    """The records in a frame; none: a newer version has written it in a form that is not known here."""
    try:
        return decode_records(found.record)
    except msgspec.MsgspecError:
        return []
