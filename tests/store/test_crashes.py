"""What the end of the process leaves between two slices of COPY, MOVE, APPEND, DELETE and RENAME: nothing is lost, and what was
to be all or nothing is so when the shard has been opened again."""

import asyncio
import shutil

import pytest

from relaymta.errors import StoreError
from relaymta.store.asked import Message
from relaymta.store.directory import Directory, User
from relaymta.store.repair import repair
from relaymta.store.rows import INBOX
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from tests.store.sessions import ANY, Failing, described, filed, rows, settled, text, unfinished, used
from tests.store.test_shard import Bench


class Crashing:
    """Leaves a copy of the shard in front of each task of it, as a crash would leave it, and one behind all."""

    def __init__(self, shard, folder):
        self.shard, self.folder = shard, folder
        self.tasks = Failing(shard, before=self.leave)

    async def leave(self, number):
        shutil.copytree(self.shard.path.parent, self.folder / f"left-{number}")

    async def opened(self):
        """Each of them, opened, when all that was unfinished has come to its end."""
        await self.leave(self.tasks.count + 1)
        for number in range(1, self.tasks.count + 2):
            again = Bench(self.folder / f"left-{number}")
            async with again:
                assert list(contradictions(again.shard.rows, again.shard.segments)) == []
                await settled(again.shard)
                yield again


async def test_a_copy_is_all_or_nothing_after_a_crash(bench, memory_path, small_slices):
    await filed(bench, 8)
    crashing = Crashing(bench.shard, memory_path)
    await bench.shard.copy(1, bench.mailbox(1)[0], list(range(1, 9)), "Sent", ANY, False)
    found = [(len(again.messages(1)), len(again.messages(1, "Sent")), used(again.shard)[0]) async for again in crashing.opened()]
    assert found == [(8, 0, 8)] * 5 + [(8, 8, 16)]


async def test_an_append_is_all_or_nothing_after_a_crash(bench, memory_path, small_slices):
    crashing = Crashing(bench.shard, memory_path)
    await bench.shard.append(1, INBOX, [Message(b"x" * 1_200_000), *(Message(text(size)) for size in range(7))], ANY)
    found = []
    async for again in crashing.opened():
        large = len(list(again.shard.segments.big_files()))
        found.append((len(again.messages(1)), used(again.shard)[0], large))
        await again.shard.stop()  # what is taken back leaves no file that nothing points at
        again.shard = Shard(again.folder, 0)
        await again.shard.start()
    assert found == [(0, 0, 0)] * 5 + [(8, 8, 1)]


async def test_a_move_loses_nothing_by_a_crash(bench, memory_path, small_slices):
    await filed(bench, 8)
    crashing = Crashing(bench.shard, memory_path)
    await bench.shard.copy(1, bench.mailbox(1)[0], list(range(1, 9)), "Sent", ANY, True)
    found = []
    async for again in crashing.opened():
        here, there = again.messages(1), again.messages(1, "Sent")
        assert sorted(data for *_, data in here + there) == [text(number) for number in range(1, 9)]
        found.append(len(there))
    assert found == [0, 3, 6, 8]


async def test_a_renaming_of_inbox_loses_nothing_by_a_crash(bench, memory_path, small_slices):
    await filed(bench, 8)
    crashing = Crashing(bench.shard, memory_path)
    await bench.shard.rename(1, INBOX, "old/mail")
    found = []
    async for again in crashing.opened():
        there = again.messages(1, "old/mail") if "old/mail" in rows(again) else []
        assert sorted(data for *_, data in again.messages(1) + there) == [text(number) for number in range(1, 9)]
        found.append(len(there))
    assert found == [0, 3, 6, 8]


async def test_a_mailbox_that_is_removed_is_gone_after_a_crash(bench, memory_path, small_slices):
    await filed(bench, 20)
    await bench.shard.copy(1, bench.mailbox(1)[0], list(range(1, 21)), "Sent", ANY, True)
    crashing = Crashing(bench.shard, memory_path)
    await bench.shard.delete(1, "Sent")
    await settled(bench.shard)
    assert crashing.tasks.count > 5
    found = []
    async for again in crashing.opened():
        gone = not rows(again)["Sent"][0]
        found.append(gone)
        assert used(again.shard) == ((0, 0) if gone else (20, sum(range(1, 21)) + 20 * len(text(0)) + 11))
        assert len(described(again.shard)) == (0 if gone else 20)
    assert found == [False] + [True] * crashing.tasks.count


async def test_repair_leaves_what_is_unfinished_to_be_taken_back(memory_path, small_slices):
    directory = Directory(memory_path / "directory", writable=True)
    directory.add(User(1, "alice@local.example", 0))
    directory.close()
    async with Bench(memory_path) as bench:
        await bench.user(1, "Sent", "Trash")
        await filed(bench, 8)
        await filed(bench, 30, "Trash")
        allowed = 1

        async def stop(number):
            if number > allowed:
                raise StoreError("no disk")

        failing = Failing(bench.shard, before=stop)
        await bench.shard.delete(1, "Trash")
        while failing.count < 2:
            await asyncio.sleep(0.001)
        allowed = failing.count + 2  # the reserve, and a slice
        with pytest.raises(StoreError):
            await bench.shard.copy(1, bench.mailbox(1)[0], list(range(1, 9)), "Sent", ANY, False)
        assert [(row.removed, row.uids, row.messages) for *_, row in unfinished(bench.shard)] == [
            (True, [], 0),
            (False, [(1, 3)], 5),
        ]

        def damage(change):
            change.user(1).octets += 77
            change.state(bench.mailbox(1)[0]).messages = 5

        failing._before = None
        await bench.shard.task(damage)
        assert len(list(contradictions(bench.shard.rows))) == 2
        await bench.shard.stop()
        assert list(repair(memory_path)) == ["shard 0: 2 of 2 contradictions corrected"]
        await bench.__aenter__()
        await settled(bench.shard)
        assert len(bench.messages(1)) == 8 and bench.messages(1, "Sent") == [] and used(bench.shard)[0] == 8
        assert len(described(bench.shard)) == 8
