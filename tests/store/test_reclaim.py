"""What is removed gives its room back while more comes, on disk and in LMDB; also where a process that was reading is killed."""

import asyncio
import random
from itertools import count

import pytest

from relaymta.store.rows import INBOX
from relaymta.store.sessions import FEW
from relaymta.store.writer import Target
from tests.conftest import PROVE
from tests.store.test_shard import Bench
from tests.support.dead_reader import is_forgotten

MESSAGES = 1_000_000 if PROVE else 25_000
BOXES, KEPT, TOGETHER = 8, 500, 250
SEGMENT = 1 << 20  # octets


def message(number: int, chance: random.Random) -> bytes:
    return b"Subject: %d\r\n\r\n%s\r\n" % (number, b"x" * chance.choice((100, 1000, 4000)))


@pytest.mark.timeout(3600)
async def test_messages_that_come_and_go_leave_nothing(memory_path, monkeypatch):
    monkeypatch.setattr("relaymta.store.shard.segment_size_for", lambda path: SEGMENT)
    chance, serial = random.Random(1), count()
    async with Bench(memory_path / "mail") as bench:
        for user in range(1, BOXES + 1):
            await bench.user(user, "Sent")
        shard, uids = bench.shard, {user: list[int]() for user in range(1, BOXES + 1)}
        with shard.rows.reading() as txn:
            boxes = {user: shard.rows.mailbox(txn, user, INBOX).mailbox for user in uids}

        async def deliver(user: int) -> None:
            (result,) = await shard.file([message(next(serial), chance)], [Target(user)])
            uids[user].append(result.filed.uid)

        async def remove(user: int) -> None:
            gone = sorted(chance.sample(uids[user], len(uids[user]) - KEPT))
            uids[user] = [*set(uids[user]).difference(gone)]
            await shard.expunge(user, boxes[user], gone)

        path = shard.path / "lmdb/data.mdb"
        while next(serial) < MESSAGES:
            await asyncio.gather(*(deliver(user) for user in uids for _ in range(TOGETHER)))
            await asyncio.gather(*(remove(user) for user in uids if len(uids[user]) > KEPT))
            async with asyncio.timeout(60):  # what is moved is moved between the commits: here these come one after the other
                while shard.segments.usage()[0] > 2 * shard.segments.usage()[1] + 16 * SEGMENT:
                    await asyncio.sleep(0.05)
            assert path.stat().st_size <= 2 * shard.rows.used()[0] + (8 << 20)
        for user in uids:
            await shard.expunge(user, boxes[user], sorted(uids[user]))
        assert shard.segments.usage()[1] == 0
        with shard.rows.reading() as txn:
            assert list(shard.rows.objects(txn)) == [] and [row.octets for _, row in shard.rows.users(txn)] == [0] * BOXES


async def test_a_reader_that_was_killed_pins_nothing(memory_path, monkeypatch):
    """Without a look at who is alive, no page that it could have read is used again: the file grows with each commit."""
    monkeypatch.setattr("relaymta.store.shard.READERS_TICKS", 2)
    async with Bench(memory_path / "mail") as bench:
        await bench.user(1, "Sent")
        await is_forgotten(bench.shard.rows.env, bench.shard.path / "lmdb")
        await bench.file(b"Subject: x\r\n\r\n", Target(1))


@pytest.mark.parametrize("count, together", [(FEW, True), (FEW + 1, False)])
async def test_one_large_slice_is_in_a_group_however_many_ask(bench, monkeypatch, count, together):
    shard, sizes = bench.shard, list[int]()
    for user in range(2, 8):
        await bench.user(user)
    for _ in range(count):
        await bench.file(b"Subject: x\r\n\r\n", *(Target(user) for user in range(2, 8)))
    boxes = {user: bench.mailbox(user)[0] for user in range(2, 8)}
    posted = shard.writer._on_commit
    monkeypatch.setattr(shard.writer, "_on_commit", lambda group: sizes.append(len(group.tasks)) or posted(group))
    await asyncio.gather(*(shard.expunge(user, box, list(range(1, count + 1))) for user, box in boxes.items()))
    assert (max(sizes) > 1) is together and sum(sizes) == 6
