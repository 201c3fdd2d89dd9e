"""The program that test_faults.py runs: the owner of a shard of mailboxes, which works on while its calls fail.

FOLDER sweep KIND ROW SHARE: each call in turn fails, by tests/support/failing_calls.c; FOLDER work: what fails is up to strace,
which is attached from "ready" to "worked"."""

import asyncio
import ctypes
import errno
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from relaymta.disk import compact, environment
from relaymta.disk.segments import SegmentRow
from relaymta.store.shard import Shard
from tests.conftest import PROVE
from tests.store.ledger import Ledger
from tests.store.workload import Work, use_small_slices

NOT_MADE, MADE, SHORT = 0, 1, 2  # kinds of failing_calls.c
MISSES = 8  # rounds without a failure that end a sweep
COPIES = 10  # rounds between two looks at what a crash would leave
ROUNDS = 100 if PROVE else 20


def failing_calls() -> ctypes.CDLL:
    """The functions of failing_calls.c, which this process has preloaded."""
    calls = ctypes.CDLL(None)
    calls.failed_call.restype, calls.failed_calls.restype = ctypes.c_char_p, ctypes.c_long
    calls.fail_calls.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return calls


def _live(row: SegmentRow) -> tuple[int, int]:
    return row.live, row.live_bytes


class Owner:
    """A shard, and rounds of work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger()
        self.failed: Counter[str] = Counter()

    async def __aenter__(self) -> "Owner":
        compact.SPARE = 0
        use_small_slices()
        shard = self.shard = Shard(self.folder / "mail", 0)
        shard.segments.size = 1 << 15
        await shard.start()
        self.work = Work(shard, random.Random(1), self.ledger.tell, large=0.0)
        await self.work.add_user(1)
        await self.work.add_user(2)
        await self._round()
        self._opened = self._descriptors()
        return self

    async def __aexit__(self, kind: object, *error: object) -> None:
        if kind is None:
            await self._until_it_works()
            assert self._descriptors() == self._opened, _open_files()
            await self.shard.stop()
            await self._crash()

    async def sweep(self, kind: int, error: int, row: int, share: int) -> None:
        """Let the first call of a round fail, then the second, and so on (or each `share`-th), with the `row - 1` behind it,
        until rounds, which differ, have no more."""
        calls = failing_calls()
        number, missed = 1, 0
        while missed < MISSES:
            calls.fail_calls(number, row, error, kind)
            try:
                await self._round()
            finally:
                hit, name = calls.failed_calls(), calls.failed_call().decode()
                calls.fail_calls(0, 0, 0, 0)
            missed = 0 if hit else missed + 1
            if hit:
                self.failed[name.removesuffix("64")] += 1
                await self._check(f"{name}, number {number}, kind {kind}")
                if self.failed.total() % COPIES == 0:
                    await self._crash()
            number += share

    async def many(self) -> None:
        """Rounds in which strace lets calls fail."""
        for number in range(ROUNDS):
            await self._round()
            await self._check(f"round {number}", patience=5)

    async def _round(self) -> None:
        """One operation of each kind, alone and then together."""
        work, shard = self.work, self.shard
        work.large = 1.0
        await work.file()
        work.large = 0.0
        await work.file()
        await work.some(4)
        await work.file_once()
        await work.create()
        await work.remove()
        await work.append()
        await work.copy()
        await asyncio.gather(work.expunge(), work.expunge(), work.expunge(), work.file(), work.forget())
        shard._compactor._pause = 0
        shard._compactor.tick()
        await shard.readers.run(shard.disk.check)

    async def _check(self, where: str, patience: int = 1) -> None:
        """The shard works, and holds what was acknowledged."""
        try:
            await self._until_it_works(patience)
            self.ledger.check(self.shard)
            self._compare_segments()
        except Exception as error:
            error.add_note(where)
            raise

    async def _until_it_works(self, patience: int = 1) -> None:
        """File a message; it may be refused `patience - 1` times."""
        acknowledged = self.work.acknowledged
        for _ in range(patience):
            await asyncio.wait_for(self.work.file(), 60)
            if self.work.acknowledged > acknowledged:
                return
        raise AssertionError(f"the shard does not work any more: {self.work.refused[-1]}")

    def _descriptors(self) -> int:
        """How many are open, without those of the segments, which come and go."""
        return len(_open_files()) - len(self.shard.segments._segments)

    def _compare_segments(self) -> None:
        """What the owner knows of the segments is what is committed, once nothing is being committed in the background."""
        known, until = self.shard.segments._segments, time.monotonic() + 5
        while True:
            rows = self.shard.rows.segments()
            wrong = [(number, row, known[number].row) for number, row in rows.items() if _live(row) != _live(known[number].row)]
            if not wrong:
                return
            assert time.monotonic() < until, wrong
            time.sleep(0.01)

    async def _crash(self) -> None:
        """A copy of the files, opened, holds what was acknowledged, and no file that nothing points at."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "mail", copy)
        again = Shard(copy, 0)
        await again.start()
        self.ledger.check(again)
        with again.rows.reading() as txn:
            large = {ident for ident, row in again.rows.objects(txn) if not row.body.segment}
        assert {ident for ident, _ in again.segments.big_files()} == large, "files that nothing points at"
        await again.stop()


def _open_files() -> list[str]:
    return [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]


async def main(folder: Path, what: str, *numbers: int) -> None:
    async with Owner(folder) as owner:
        if what == "sweep":
            kind, row, share = numbers
            for error in (errno.EIO, errno.ENOSPC):
                await owner.sweep(kind, error, row, share)
        else:
            print("ready", flush=True)
            sys.stdin.readline()
            await owner.many()
            print("worked", flush=True)
            sys.stdin.readline()
    print(json.dumps({"failed": owner.failed, "refused": len(owner.work.refused), "filed": owner.work.acknowledged}))


if __name__ == "__main__":
    environment._on_loop = lambda: False  # what looks at the shard here runs on the loop, and waits while it is opened again
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
