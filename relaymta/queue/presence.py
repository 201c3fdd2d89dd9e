"""Which messages the queue does not have any more, whoever owns its shards."""

from collections.abc import Iterable
from pathlib import Path

import lmdb

from relaymta.disk.shards import shard_numbers
from relaymta.errors import StoreError
from relaymta.queue.store import Store

__all__ = ["ended"]


def ended(spool: Path, idents: Iterable[int]) -> list[int]:
    """Those messages that have been in the queue and are in none of its shards now; ids are not given twice, so none of them
    comes back. In a process that owns no shard of the queue. Blocks. StoreError when a shard cannot be read."""
    left = set(idents)
    for number in shard_numbers(spool):
        path = spool / f"shard-{number}" / "lmdb"
        if left and (path / "data.mdb").exists():
            left -= _there(path, left)
    return sorted(left)


def _there(path: Path, idents: set[int]) -> set[int]:
    try:
        store = Store(path, readonly=True)
        try:
            with store.reading() as txn:
                return {ident for ident in idents if store.envelope(txn, ident) is not None}
        finally:
            store.close()
    except (lmdb.Error, KeyError, OSError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
