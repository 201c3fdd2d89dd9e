"""A snapshot of a shard of the queue, while its owner goes on: as `hot_copy` makes it, then verified."""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from relaymta.disk import hot_copy
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.queue.store import Store
from relaymta.queue.verify import is_sound

__all__ = ["begin", "check", "copy_shard", "remove_stale"]

_MADE = re.compile(r"snapshot-\d+")


def copy_shard(shard: Path, folder: Path) -> None:
    """Copy the shard in `shard`, whether a daemon has it or not, as it is at one moment, into `folder`, which is made: files get
    second names there, so it is on the same file system. Blocks. StoreError."""
    source = _opened(shard / "lmdb", os.path.exists(shard / "lmdb" / "lock.mdb"))
    try:
        hot_copy.copy_shard(source, shard / "bodies", folder, lambda path: _opened(path, False), _named)
    finally:
        source.close()


def begin(spool: Path) -> tuple[Path, int]:
    """A folder for a snapshot, in the spool, and a descriptor: nobody takes it for stale before that is closed. OSError."""
    made = spool / f"snapshot-{time.time_ns()}"
    made.mkdir(mode=0o700)
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return made, descriptor


def remove_stale(spool: Path) -> None:
    """Remove what a command that was killed has left in the spool: it keeps the room of segments."""
    for made in spool.glob("snapshot-*"):
        with contextlib.suppress(OSError):
            if _MADE.fullmatch(made.name):
                _remove_unlocked(made)


def _remove_unlocked(made: Path) -> None:
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: it is being made
        shutil.rmtree(made)
    finally:
        os.close(descriptor)


def _opened(path: Path, locked: bool) -> Store:
    """`locked`: registered as a reader; else nobody may write meanwhile."""
    try:
        return Store(path, readonly=True, locked=locked)
    except lmdb.Error as error:
        raise StoreError(f"{path}: {error}") from None


def _named(copy: Store, txn: Any) -> Iterator[tuple[int, Body]]:
    for ident, envelope in copy.idents(txn, 0, copy.fresh.live()):
        if envelope.body is not None:
            yield ident, envelope.body


def check(folder: Path) -> int:
    """How many messages a shard of a snapshot has, all of which are complete. Blocks. StoreError says what is wrong."""
    copy = _opened(folder / "lmdb", False)
    try:
        wrong = is_sound(copy, folder / "bodies")
        if wrong:
            raise StoreError(f"the snapshot is not complete: {wrong}")
        with copy.reading() as txn:
            return int(txn.stat(copy.tables["message"])["entries"]) + len(copy.fresh)
    finally:
        copy.close()
