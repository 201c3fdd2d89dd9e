"""A shard of mailboxes on a disk of 24 MB that fills up: mail is refused by StoreFull, what was filed can be read, messages are
expunged without a free octet, and mail is filed again when there is room."""

import asyncio
import contextlib
import gc
import os
import random
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from relaymta.errors import StoreError, StoreFull
from relaymta.store.rows import INBOX
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")

USERS = 4


@pytest.fixture
def mount(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


class Small:
    """A shard on the small disk; the text of each message that was filed, by user and UID."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.chance = random.Random(1)
        self.filed: dict[tuple[int, int], bytes] = {}
        self.box: dict[int, int] = {}

    async def __aenter__(self) -> "Small":
        await self.open()
        for user in range(USERS):
            await self.shard.task(lambda change, user=user: change.add_user(user, [], 1))
            with self.shard.rows.reading() as txn:
                self.box[user] = self.shard.rows.mailbox(txn, user, INBOX).mailbox
        return self

    async def open(self) -> None:
        self.shard = Shard(self.mount, 0)
        await self.shard.start()

    async def __aexit__(self, *error: object) -> None:
        await self.shard.stop()

    async def file(self, size: int) -> None:
        data, user = self.chance.randbytes(size), self.chance.randrange(USERS)
        (result,) = await self.shard.file([data], [Target(user)])
        assert result.filed is not None
        self.filed[user, result.filed.uid] = data

    async def fill(self, size: int, floor: bool = True) -> StoreError:
        """File messages until one is refused; why. `floor`: the floor is looked at, as the shard does each second."""
        while True:
            try:
                await self.file(size)
            except StoreError as error:
                return error
            if floor:
                await self.shard.readers.run(self.shard.disk.check)

    def use_up(self) -> None:
        """Another program takes all that is left."""
        with contextlib.suppress(OSError), (self.mount / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass

    async def expunge(self, user: int, count: int) -> None:
        uids = sorted(uid for owner, uid in self.filed if owner == user)[:count]
        assert await self.shard.task(lambda change: change.expunge(user, self.box[user], uids))
        for uid in uids:
            del self.filed[user, uid]

    def check(self) -> None:
        """All that was filed and not expunged can be read, and there is nothing else."""
        shard = self.shard
        assert list(contradictions(shard.rows, shard.segments)) == []
        with shard.rows.reading() as txn:
            rows = {(user, uid): row for user, box in self.box.items() for uid, row in shard.rows.messages(txn, box)}
        assert rows.keys() == self.filed.keys()
        assert all(shard.data(row) == self.filed[place] for place, row in rows.items())


async def test_mail_is_refused_and_expunged_on_a_full_disk(mount):
    async with Small(mount) as small:
        error = await small.fill(20_000)
        assert isinstance(error, StoreFull) and len(small.filed) > 500
        small.check()
        await small.expunge(0, 20)
        small.use_up()
        small.shard.disk.full = False  # not looked at since
        assert isinstance(await small.fill(20_000, floor=False), StoreFull)
        assert isinstance(await small.fill(2_000_000, floor=False), StoreFull)
        for user in range(USERS):
            while any(owner == user for owner, _ in small.filed):
                await small.expunge(user, 40)
            small.check()
        (mount / "filler").unlink()
        await small.shard.readers.run(small.shard.disk.check)
        assert isinstance(await small.fill(20_000), StoreFull) and len(small.filed) > 400
        small.check()
        await small.shard.stop()
        await small.open()
        small.check()


async def test_a_shard_is_opened_and_expunged_without_a_free_octet(mount):
    async with Small(mount) as small:
        await small.fill(5000)
        await small.shard.stop()
        small.use_up()
        await small.open()
        while left := sorted({user for user, _ in small.filed}):
            await asyncio.gather(*(small.expunge(user, 1000) for user in left))
        small.check()


@pytest.mark.parametrize("size", [3000, 1_500_000])
@pytest.mark.parametrize("known", [True, False], ids=["at the floor", "without a free octet"])
async def test_refused_mail_costs_nothing(mount, size, known):
    async with Small(mount) as small:
        await small.fill(20_000)
        small.use_up()
        tracemalloc.start()
        for _ in range(20):
            small.shard.disk.full = known
            await small.fill(size, floor=False)
        names, descriptors = sorted(mount.rglob("*")), len(os.listdir("/proc/self/fd"))
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            small.shard.disk.full = known
            assert isinstance(await small.fill(size, floor=False), StoreFull)
        for _ in range(100):  # a thread that has just refused one may still hold it
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            if after - before < 50_000:
                break
            await asyncio.sleep(0.05)
        tracemalloc.stop()
        assert after - before < 50_000
        assert (sorted(mount.rglob("*")), len(os.listdir("/proc/self/fd"))) == (names, descriptors)
        small.check()
