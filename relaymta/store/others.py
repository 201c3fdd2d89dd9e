"""The shards that other processes own, as this one may read them."""

import time
from pathlib import Path

import lmdb

from relaymta.errors import StoreError
from relaymta.store.reading import ShardReader

__all__ = ["ReadOnly"]

AGAIN = 5.0  # seconds until a shard that could not be opened, or has no table yet, is looked at again
INFINITE = float("inf")


class ReadOnly:
    """Shards in `folder` (SPOOL/mail), each opened when it is first asked for. Used on one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, ShardReader] = {}
        self._not_before: dict[int, float] = {}  # monotonic seconds; INFINITE: it is open, with all tables

    def shard(self, number: int) -> ShardReader | None:
        """A shard; None when it is not there, or cannot be read now."""
        found = self._open.get(number)
        if time.monotonic() < self._not_before.get(number, 0.0):
            return found
        if found is not None:
            self._not_before[number] = INFINITE if found.rows.complete() else time.monotonic() + AGAIN
            return found
        path = self._folder / f"shard-{number}"
        try:
            if (path / "lmdb" / "data.mdb").exists():
                found = self._open[number] = ShardReader(path)
        except (lmdb.Error, OSError, StoreError):
            found = None
        if found is None:
            self._not_before[number] = time.monotonic() + AGAIN
        return found

    def close(self) -> None:
        """Close all of them."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()
