"""The program that test_power_cut.py traces: the owner of a shard of mailboxes, which reports on standard output what it asks
for and what is acknowledged."""

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from relaymta.disk import compact
from relaymta.store.shard import Shard
from tests.store.workload import Work, use_small_slices

ENOUGH = 100  # bodies that moved


def tell(*fact: Any) -> None:
    os.write(1, json.dumps(fact).encode() + b"\n")


async def main(folder: Path, groups: int, seed: int) -> None:
    """`groups` groups of operations, and more until enough bodies have moved."""
    compact.SPARE = 0
    use_small_slices()
    compact.SLICE_BYTES = 1 << 14
    shard = Shard(folder, 0)
    shard.segments.size = 1 << 17  # so that segments change and are used again; `big_limit` stays as it is
    moves = 0
    relocate = shard._compactor._moved

    def moved(move: Any) -> None:
        nonlocal moves
        moves += move.error is None and move.body is not None
        relocate(move)

    shard._compactor._moved = moved  # type: ignore[method-assign]
    await shard.start()
    work = Work(shard, random.Random(seed), tell)
    work.large = 0.0
    for user in range(3):
        await work.add_user(user)
    for number in range(20 * groups):
        if number >= groups:
            if moves > ENOUGH:
                break
            await asyncio.sleep(0.01)  # let the thread that reads the bodies to move catch up
        work.large = 0.0 if number % 10 else 1.0
        await work.some(1 if work.large else work.chance.randint(1, 8))
        shard._compactor.tick()
    assert not work.refused
    tell("moved", moves)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
