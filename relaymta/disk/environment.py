"""A shard's LMDB environment: opened, read by any thread, and opened again after a failed commit."""

import asyncio
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from relaymta.disk.folders import make_folder, sync_folder
from relaymta.disk.segments import SegmentRow
from relaymta.disk.tree import obstacle
from relaymta.errors import StoreError

__all__ = ["CURE", "MAP_SIZE", "MOVE", "SEGMENT", "Environment", "Shut"]

MAP_SIZE = 64 << 30  # sparse: costs address space only
READ_PATIENCE = 1.0  # seconds that a read waits while the environment is opened again
TABLES_MOST = 32  # of an environment: more than any store has
READERS_MOST = 1024  # threads of all processes that read at once: of each worker, and of commands
MOVE = "move this folder away and restore it, or start without it"
CURE = f"{MOVE} (`relaymta fsck` says more)"
CRAMPED = 1 << 20  # octets that are left
SEGMENT = struct.Struct(">I")  # a segment's key

_decode_segment = msgspec.msgpack.Decoder(SegmentRow).decode


class Shut(StoreError):
    """The environment is being opened again."""


class Reading:
    """A read transaction within `with`."""

    __slots__ = ("_environment", "_patience", "_txn")

    def __init__(self, environment: "Environment", patience: float) -> None:
        self._environment = environment
        self._patience = patience

    def __enter__(self) -> Any:
        environment = self._environment
        with environment._lock:
            if environment._shut:
                environment._wait(self._patience)
            environment._inside += 1
        try:
            self._txn = environment.env.begin()
        except BaseException:
            environment._leave()
            raise
        return self._txn

    def __exit__(self, *error: object) -> None:
        self._txn.abort()  # a transaction that has only read
        self._environment._leave()


class Environment:
    """The environment in `path`, with these tables, "segment" and "meta" among them. `readonly`: by another process than the
    owner's; `locked`: it is registered as a reader, without which nobody else may write meanwhile. A store derives from it, and
    overrides `_opened`. Two states, changed by `reopen` alone: open, or shut (no read may begin)."""

    def __init__(
        self, path: Path, tables: tuple[str, ...], map_size: int = MAP_SIZE, readonly: bool = False, locked: bool = True
    ) -> None:
        self._path = path
        self._names = tables
        self._map_size = map_size
        self._readonly = readonly
        self._locked = locked
        self._lock = threading.Lock()
        self._gate = threading.Condition(self._lock)
        self._inside = 0  # read transactions under way, by the gate
        self._shut = False  # the environment is closed, or about to be
        self._check()
        try:
            self._open()
        except lmdb.Error as error:
            raise StoreError(f"{path / 'data.mdb'} cannot be opened: {error}: {CURE}") from None

    def _check(self) -> None:
        """StoreError when the file is damaged so that LMDB would end the process. Not of one that another process may write."""
        file = self._path / "data.mdb"
        if not self._readonly and file.exists():
            why = obstacle(file)
            if why:
                raise StoreError(f"{file} is damaged: {why}: {CURE}")

    def _open(self) -> None:
        created = not (self._path / "data.mdb").exists()
        make_folder(self._path)
        self.env = lmdb.open(
            str(self._path),
            map_size=self._map_size,
            max_dbs=TABLES_MOST,
            max_readers=READERS_MOST,
            sync=True,
            metasync=True,
            mode=0o600,
            readonly=self._readonly,
            lock=self._locked,
        )
        if self._locked:
            self.env.reader_check()
        if not self._readonly:
            # Where the last owner was killed just behind a commit, and others have the file open still, what it has committed is
            # not seen before the mutex of writers was taken once.
            self.env.begin(write=True).abort()
        self.tables: dict[str, Any] = {}
        self.complete()
        with self.env.begin() as txn:
            self._opened(txn)
        if created:
            sync_folder(self._path)

    def complete(self) -> bool:
        """Open the tables that are not open; whether all are. Only where the environment is read may one be missing: an older
        version wrote it, and its owner adds the table. Not within a transaction of this thread."""
        for name in self._names:
            if name not in self.tables:
                try:
                    self.tables[name] = self.env.open_db(name.encode(), create=not self._readonly)
                except lmdb.NotFoundError:
                    if not self._readonly:
                        raise
        return len(self.tables) == len(self._names)

    def _opened(self, txn: Any) -> None:
        """Called each time that the environment has been opened: a store reads anew what it keeps in memory of the tables. What
        this raises is raised by the constructor or `reopen`."""

    def reopen(self) -> None:
        """Writer thread: close and open again after a failed commit, when no other thread reads. The state is that of the last
        commit that returned. When it raises, it has to be called again, and nobody can read until then."""
        with self._gate:
            self._shut = True
            self._gate.wait_for(lambda: not self._inside)
        self.env.close()
        self._open()
        with self._gate:
            self._shut = False
            self._gate.notify_all()

    def reading(self, patience: float = READ_PATIENCE) -> "Reading":
        """A read transaction, on any thread but the writer's; not within another one. While it is under way the environment stays
        open. Shut when the environment is not opened again within `patience` seconds after a failed commit; on an event loop, at
        once: others must not wait for it."""
        return Reading(self, patience)

    def _wait(self, patience: float) -> None:
        """Within the gate: wait until the environment has been opened again. Shut."""
        if _on_loop() or not self._gate.wait_for(lambda: not self._shut, patience):
            raise Shut("the store could not be opened again after a failed commit")

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._shut and not self._inside:
                self._gate.notify_all()

    def meta(self, key: bytes) -> int:
        """A number in meta; 0 when there is none."""
        with self.reading() as txn:
            return self.meta_in(txn, key)

    def meta_in(self, txn: Any, key: bytes) -> int:
        """As `meta`, in the caller's transaction."""
        raw = txn.get(key, db=self.tables["meta"])
        return int(raw) if raw else 0

    def segments(self) -> dict[int, SegmentRow]:
        """All segment rows, by number."""
        with self.reading() as txn:
            return dict(self.segment_rows(txn))

    def segment_rows(self, txn: Any) -> Iterator[tuple[int, SegmentRow]]:
        """(number, row) of each segment."""
        for key, value in txn.cursor(db=self.tables["segment"]):
            yield SEGMENT.unpack(key)[0], _decode_segment(value)

    def is_cramped(self) -> bool:
        """Whether the file system is full: LMDB reports what was written in part as an I/O error."""
        stats = os.statvfs(self._path)
        return stats.f_bavail * stats.f_frsize < CRAMPED

    def forget_dead_readers(self) -> None:
        """Let go of what processes that were killed while they read would have seen still: else LMDB uses no page again that was
        there then, and its file grows."""
        with self.reading():
            self.env.reader_check()

    def readers_behind(self) -> list[str]:
        """Who reads a state from before the last commit now: a line each, which is another one for each transaction."""
        with self.reading() as txn:
            last = self.env.info()["last_txnid"]
            lines = self.env.readers().splitlines()[1:]
            own = txn.id()
        return [line for line in lines if (fields := line.split())[-1] != "-" and int(fields[-1]) < min(last, own)]

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def used(self) -> tuple[int, int]:
        """(octets of the map's pages that hold rows, the map's size). Freed pages, which LMDB uses again, do not count."""
        with self.reading() as txn:
            tables = [txn.stat(table) for table in self.tables.values()]
            pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in tables)
            return pages * tables[0]["psize"], self.env.info()["map_size"]


def _on_loop() -> bool:
    """Whether the thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
