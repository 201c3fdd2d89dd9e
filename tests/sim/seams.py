"""Where a simulation takes the place of the system: time, disk, threads, chance, and the sizes that it makes small.

Names of modules are replaced (`os`, `time`, `threading` ... as a module of relaymta sees them), so nothing in relaymta knows.
"""

import contextlib
import errno
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import lmdb

import relaymta.disk.segments
import relaymta.dns
import relaymta.send.connect
import relaymta.send.opener
import relaymta.worker
from relaymta.disk.environment import Environment
from relaymta.disk.segments import Segment
from relaymta.disk.writer import GroupWriter
from relaymta.proto.smtp_client import ClientSession
from relaymta.queue.change import Change
from relaymta.queue.entry import Outcome
from relaymta.queue.fresh import Fresh
from relaymta.queue.store import Store
from relaymta.send.dispatch import Dispatcher
from relaymta.send.session import Session
from tests.sim.stage import Condition, Executor, Inbox, Stage, Thread

__all__ = ["Clock", "Disk", "seams"]

BOOT = 5_000_000  # seconds since boot at the beginning
WALL = 1_700_000_000  # seconds since 1970

# Sizes that are made small, so that each bound is reached by a few messages.
SMALL: dict[str, dict[str, float]] = {
    "relaymta.queue": {
        "TICK": 0.2, "CHECK_TICKS": 5, "FAILED_OFFER_MS": 3000, "SWEEP_TICKS": 40, "MATERIALIZE_MS": 3000, "TOGETHER": 2,
        "STREAM_PIECE": 1024, "SMALL_GROUP": 2, "PAGE_ROWS": 3, "CLOCK_EVERY": 1, "POLICY_HELD_TOGETHER": 3, "KEPT_LEFT": 4,
        "ROW_OCTETS": 500, "SCAN_QUEUES": 4,
    },
    "relaymta.disk": {
        "GROUP_LIMIT": 8, "GATHER_LEAST": 2, "GATHER_MOST": 4, "SPARE": 0, "SLICE_FRAMES": 2, "PAUSE_TICKS": 4, "IDLE_TICKS": 1,
        "BALLAST_LEAST": 1024, "BALLAST_MOST": 2048,
    },
    "relaymta.send": {"TOGETHER": 3, "CROWDED": 6, "AT_A_TIME": 2, "FORGET_MS": 60_000},
}  # fmt: skip
# And those of the disk, drawn by each run: octets of a segment, and how many empty ones are kept.
SEGMENTS = (8192, 8192, 2048)
FREE_MOST = (2, 1, 0)


class Clock:
    """The `time` module: the loop's time, and how far the wall clock and CLOCK_BOOTTIME are from it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.wall = float(WALL)
        self.boot = float(BOOT)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return self.wall + self._stage.now

    def time_ns(self) -> int:
        return int((self.wall + self._stage.now) * 1_000_000) * 1000

    def monotonic(self) -> float:
        return self._stage.now

    perf_counter = monotonic

    def clock_gettime_ns(self, which: int) -> int:
        return int((self.boot + self._stage.now) * 1_000_000) * 1000

    def sleep(self, seconds: float) -> None:
        self._stage.pause(seconds)


class Disk:
    """The faults of one worker's disk: a share of `kind` ("write", "sync", "read", "commit", "begin") fails; each sync takes
    `slow` seconds."""

    def __init__(self) -> None:
        self.slow = 0.0
        self.faults: dict[str, float] = {}
        self.full = False


class System:
    """The `os` module of `queue/` and `disk/`."""

    def __init__(self, stage: Stage, disk: Callable[[], Disk]) -> None:
        self._stage = stage
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _point(self, kind: str) -> None:
        self._stage.perhaps_pause()
        if kind == "sync" and self._disk().slow:
            self._stage.pause(self._disk().slow)
        self.may_fail(kind)

    def may_fail(self, kind: str) -> None:
        share = self._disk().faults.get(kind, 0.0)
        if share and self._stage.random.random() < share:
            raise OSError(self._stage.random.choice((errno.EIO, errno.ENOSPC)), f"simulated: {kind}")

    def pread(self, descriptor: int, octets: int, offset: int) -> bytes:
        self._point("read")
        return os.pread(descriptor, octets, offset)

    def pwritev(self, descriptor: int, buffers: list[bytes], offset: int) -> int:
        self._point("write")
        return os.pwritev(descriptor, buffers, offset)

    def write(self, descriptor: int, octets: bytes) -> int:
        self._point("write")
        return os.write(descriptor, octets)

    def pwrite(self, descriptor: int, octets: bytes, offset: int) -> int:
        self._point("write")
        return os.pwrite(descriptor, octets, offset)

    def fdatasync(self, descriptor: int) -> None:
        self._point("sync")

    def fsync(self, descriptor: int) -> None:
        self._point("sync")

    def statvfs(self, path: Any) -> os.statvfs_result:
        self._stage.perhaps_pause()
        blocks = 1 << 20
        return os.statvfs_result((4096, 4096, blocks, blocks, 10 if self._disk().full else blocks // 2, 0, 0, 0, 0, 255))

    def _exit(self, code: int) -> None:
        error = sys.exc_info()[1]
        process = self._stage.process
        if process is None or not process.dead:
            self._stage.failures.append(f"the writer thread ended: {type(error).__name__}: {error}")


class _LmdbEnvironment:
    """An LMDB environment: a reader pauses before and after its transaction begins."""

    def __init__(self, stage: Stage, env: Any) -> None:
        self._stage = stage
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self, *args: Any, **options: Any) -> Any:
        if options.get("parent") is None:
            self._stage.perhaps_pause()
        txn = self._env.begin(*args, **options)
        if not options:
            self._stage.perhaps_pause()
        return txn


class _Lmdb:
    """The `lmdb` module: without syncs."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(lmdb, name)

    def open(self, path: str, **options: Any) -> _LmdbEnvironment:
        return _LmdbEnvironment(self._stage, lmdb.open(path, **(options | {"sync": False, "metasync": False})))


class _Threading:
    """The `threading` module of `queue/` and `disk/`."""

    Lock = contextlib.nullcontext

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def Condition(self, lock: object = None) -> Condition:
        return Condition(self._stage)

    def Thread(self, target: Callable[[], None], name: str = "", daemon: bool = False) -> Thread:
        return Thread(self._stage, target)


class _Traceback:
    """The `traceback` module of the writer: what it prints when a process is killed is not of interest."""

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)

    def print_exc(self) -> None:
        pass


class _Queues:
    """The `queue` module of the writer."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def SimpleQueue(self) -> Inbox:
        return Inbox(self._stage)

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class _Patches:
    """Replaced attributes, to be restored."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def restore(self) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)


def _modules(prefix: str = "relaymta") -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name == prefix or name.startswith(prefix + ".")]


@contextlib.contextmanager
def seams(world: Any) -> Iterator[None]:
    """Put the simulation in place while the block runs. `world`: a World."""
    patches = _Patches()
    try:
        _modules_of(world, patches)
        _methods(world, patches)
        yield
    finally:
        patches.restore()


def _modules_of(world: Any, patches: _Patches) -> None:
    stage: Stage = world.stage
    disk = lambda: world.disk_of(stage.process)  # noqa: E731
    system, found = System(stage, disk), set()
    segment = stage.random.choice(SEGMENTS)
    patches.set(relaymta.disk.segments, "FREE_MOST", stage.random.choice(FREE_MOST))
    world.system = system
    everywhere: dict[int, Any] = {id(time): world.clock, id(random): world.random}
    on_disk: dict[int, Any] = {
        id(os): system,
        id(lmdb): _Lmdb(stage),
        id(traceback): _Traceback(),
        id(sys.modules["threading"]): _Threading(stage),
        id(sys.modules["queue"]): _Queues(stage),
        id(sys.modules["concurrent.futures"].ThreadPoolExecutor): Executor,
        id(relaymta.disk.segments.segment_size_for): lambda path: segment,
    }
    over: dict[int, Any] = {
        id(relaymta.send.connect.connect): world.network.connect,
        id(relaymta.send.opener._greets): world.network.greets,
        id(relaymta.dns._OnLoop): world.network.resolver,
    }
    for module in _modules():
        stored = module.__name__.startswith(("relaymta.queue", "relaymta.disk"))
        for name, value in list(vars(module).items()):
            replaced = everywhere.get(id(value)) or over.get(id(value)) or (on_disk.get(id(value)) if stored else None)
            if replaced is not None:
                patches.set(module, name, replaced)
            for package, sizes in SMALL.items():
                if name in sizes and type(value) in (int, float) and module.__name__.startswith(package):
                    patches.set(module, name, sizes[name])
                    found.add((package, name))
    missing = {(package, name) for package, sizes in SMALL.items() for name in sizes} - found
    assert not missing, f"not found in relaymta: {missing}"


def _methods(world: Any, patches: _Patches) -> None:
    stage: Stage = world.stage
    finish, envelope, settle, begin = Change.finish, Store.envelope, Fresh.settle, ClientSession.begin
    reopen, submit = Environment.reopen, GroupWriter.submit

    def finished(change: Change, now: int) -> None:
        stage.perhaps_pause()
        share = world.disk_of(stage.process).faults.get("commit", 0.0)
        if share and stage.random.random() < share:
            kind = stage.random.choice((lmdb.MapFullError, lmdb.DiskError, lmdb.Error))
            raise kind("simulated: commit")
        process = stage.process
        if process is not None:
            process.committing = True
        try:
            finish(change, now)
        finally:
            if process is not None:
                process.committing = False

    def read(store: Store, txn: Any, ident: int) -> Any:
        stage.perhaps_pause()
        return envelope(store, txn, ident)

    def settled(fresh: Fresh) -> None:
        stage.perhaps_pause()
        settle(fresh)

    def began(session: ClientSession, mail: Any) -> None:
        world.began(session, mail)
        begin(session, mail)

    patches.set(Change, "finish", finished)

    def submitted(writer: GroupWriter[Any, Any, Any], operation: Any) -> None:
        if isinstance(operation, Outcome):
            world.finished(operation.entry, None if operation.success else operation.results)
        submit(writer, operation)

    offer = Dispatcher.offer

    def offered(dispatcher: Dispatcher, entry: Any) -> None:
        world.offered(entry)
        offer(dispatcher, entry)

    patches.set(Dispatcher, "offer", offered)

    def reopened(store: Environment) -> None:
        process = stage.process
        if process is not None:
            process.committing = True  # what is inlined is read again
        try:
            reopen(store)
        finally:
            if process is not None:
                process.committing = False

    patches.set(Store, "envelope", read)
    patches.set(Environment, "reopen", reopened)
    patches.set(GroupWriter, "submit", submitted)
    patches.set(Fresh, "settle", settled)
    patches.set(ClientSession, "begin", began)
    # The order of sets of these must not depend on where they lie in memory.
    for kind in (Segment, Session):
        serial = iter(range(1, 1 << 40))
        serials: dict[int, int] = {}
        _hashed(kind, patches, serials, serial)


def _hashed(kind: Any, patches: _Patches, serials: dict[int, int], serial: Iterator[int]) -> None:
    init = kind.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        serials[id(self)] = next(serial)
        init(self, *args, **options)

    patches.set(kind, "__init__", made)
    _set_new(patches, kind, "__hash__", lambda self: serials[id(self)])


def _set_new(patches: _Patches, owner: Any, name: str, value: Any) -> None:
    if name in owner.__dict__:
        patches.set(owner, name, value)
        return
    patches._before.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)
