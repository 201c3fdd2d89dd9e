"""The program that test_clock.py runs with tests/support/shifted_clock.c: the wall clock is set while a shard of mailboxes is
open, and between two openings; what it gives out goes up all the same."""

import asyncio
import os
import sys
import time
from pathlib import Path

from relaymta.store.rows import INBOX
from relaymta.store.shard import Shard
from relaymta.store.writer import Target

YEAR = 365 * 86_400
SHIFTS = [0, YEAR, -YEAR, 0, 10 * YEAR, -10 * YEAR]


class Watched:
    """A shard; what it has given out last: UID, MODSEQ, UIDVALIDITY, object id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.real = time.time()
        self.boxes = 0
        self.last = (0, 0, 0, 0)
        self.stamps: list[int] = []

    async def open(self) -> None:
        self.shard = Shard(self.folder, 0)
        await self.shard.start()

    def set(self, seconds: int) -> None:
        fresh = self.folder / "shift.new"
        fresh.write_text(str(seconds))
        fresh.replace(os.environ["CLOCK_SHIFT"])
        assert abs(time.time() - self.real - seconds) < 600, "the shift is not in effect"

    async def work(self, shift: int) -> None:
        """File a message in INBOX, and one in a new mailbox."""
        shard, rows = self.shard, self.shard.rows
        self.stamps.append(shard.clock.now())  # before the commit, whose time is what a restart goes on from
        (result,) = await shard.file([b"x"], [Target(1, once=(self.boxes, 0, 1))])
        (again,) = await shard.file([b"x"], [Target(1, once=(self.boxes, 0, 1))])
        assert result.filed is not None and again.filed is None and not again.code
        self.boxes += 1
        (created,) = await shard.file([b"y"], [Target(1, str(self.boxes), create=True)])
        assert created.filed is not None
        with rows.reading() as txn:
            row = rows.message(txn, result.filed.mailbox, result.filed.uid)
        assert row is not None and abs(row.date / 1000 - self.real - shift) < 600, "INTERNALDATE is that of the wall clock"
        found = (result.filed.uid, result.filed.modseq, created.filed.uidvalidity, row.object)
        assert all(new > old for new, old in zip(found, self.last, strict=True)), (found, self.last)
        self.last = found


async def main(folder: Path) -> None:
    watched = Watched(folder)
    watched.set(0)
    await watched.open()
    await watched.shard.task(lambda change: change.add_user(1, [], int(time.time())))
    for shift in SHIFTS:
        watched.set(shift)
        for _ in range(3):
            await watched.work(shift)
    for shift in SHIFTS:
        await watched.shard.stop()
        watched.set(shift)
        await watched.open()
        for _ in range(3):
            await watched.work(shift)
    await watched.shard.stop()
    assert watched.stamps == sorted(watched.stamps), "the shard's clock went back"
    watched.set(-10 * YEAR)
    await watched.open()
    with watched.shard.rows.reading() as txn:
        box = watched.shard.rows.mailbox(txn, 1, INBOX)
        assert box is not None
        assert [uid for uid, _ in watched.shard.rows.messages(txn, box.mailbox)] == list(range(1, 6 * len(SHIFTS) + 1))
    await watched.shard.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
