"""The program that test_order.py traces: files messages one by one, and says so."""

import asyncio
import os
import sys
from pathlib import Path

from relaymta.disk.segments import MEGABYTE
from relaymta.store.change import Change
from relaymta.store.shard import Shard
from relaymta.store.writer import Target


async def main(folder: Path) -> None:
    shard = Shard(folder, 0)
    await shard.start()
    for user in (1, 2):
        await shard.task(lambda change, user=user: change.add_user(user, [], 1))  # type: ignore[misc]
    for size in (100, 4000, 0, 2 * MEGABYTE, 30_000):
        await shard.file([b"x" * size], [Target(1), Target(2)])
        os.write(1, b"filed %d\n" % size)

    def expunge(change: Change) -> int:
        row = shard.rows.mailbox(change.txn, 1, "INBOX")
        assert row is not None
        return change.expunge(1, row.mailbox, [1, 2, 3])

    await shard.task(expunge)
    os.write(1, b"expunged\n")
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
