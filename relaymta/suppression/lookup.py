"""The list as a worker sees it: whether a recipient is in it, at RCPT. One that cannot be read refuses nobody."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from relaymta.disk.tree import obstacle
from relaymta.suppression.entries import MAP_SIZE, READERS_MOST, TABLES, Entry, read

__all__ = ["Lookup"]

_FAILURES: Final = (lmdb.Error, msgspec.DecodeError, ValueError, OSError)


class Lookup:
    """`find` is for the event loop; `refresh`, which blocks, for a thread: about once a second, and the first time before any
    mail is taken. `warn(text)`: called by either, once until it is all right again."""

    def __init__(self, path: Path, warn: Callable[[str], object]) -> None:
        self._file = path / "data.mdb"
        self._warn = warn
        self._open: tuple[Any, dict[str, Any]] | None = None
        self._identity = (0, 0)  # of the file that is open: device and inode
        self._failures = 0  # of `refresh`, in a row
        self._warned = False
        self._lock = threading.Lock()  # only one thread opens

    def find(self, application: str, address: str, now: float) -> Entry | None:
        """The entry that refuses mail of an application for an address (as of `compared`) at `now` (seconds UTC): its own, else
        that about all mail. None: there is none, or the list cannot be read. It never raises."""
        opened = self._open
        if opened is None:
            return None
        env, tables = opened
        try:
            with env.begin() as txn:
                if application:
                    found = read(txn, tables, application, address)
                    if found is not None and found.holds(now):
                        return found
                found = read(txn, tables, "", address)
            return found if found is not None and found.holds(now) else None
        except _FAILURES as error:
            self._failed(str(error))
            return None

    def refresh(self) -> Callable[[], None]:
        """See to it that the file that is read is the one that is there. What is to be called on the event loop afterwards: it
        closes the one before, of which no `find` is under way then."""
        with self._lock:
            try:
                why, closing = self._refreshed()
            except _FAILURES as error:
                why, closing = str(error), None
            self._failures = self._failures + 1 if why else 0
            if not why:
                self._warned = False
            elif self._failures > 1:  # not yet when it is just being made, or exchanged
                self._failed(why)
            return closing if closing is not None else _nothing

    def _refreshed(self) -> tuple[str, Callable[[], None] | None]:
        """(Why there is nothing to read, "": there is; what closes the one before)."""
        before = self._open
        try:
            there = os.stat(self._file)
        except FileNotFoundError:
            self._open, self._identity = None, (0, 0)
            return f"{self._file} is not there", before and before[0].close
        if before is not None and (there.st_dev, there.st_ino) == self._identity:
            return "", None
        self._open, self._identity = None, (0, 0)
        closing = before and before[0].close
        why = obstacle(self._file)
        if why:
            return f"{self._file} is damaged: {why}", closing
        self._ahead()
        self._open = self._opened()
        self._identity = there.st_dev, there.st_ino
        return "", closing

    def _opened(self) -> tuple[Any, dict[str, Any]]:
        env = lmdb.open(
            str(self._file.parent), map_size=MAP_SIZE, max_dbs=len(TABLES), max_readers=READERS_MOST, readonly=True, create=False
        )
        try:
            return env, {name: env.open_db(name.encode(), create=False) for name in TABLES}
        except BaseException:
            env.close()
            raise

    def _ahead(self) -> None:
        """Have the kernel read the file: what `find` needs is in memory then."""
        descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def _failed(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"the suppression list cannot be read, and refuses nobody meanwhile: {why}")

    def close(self) -> None:
        """Read nothing more."""
        opened, self._open = self._open, None
        if opened is not None:
            opened[0].close()


def _nothing() -> None:
    pass
