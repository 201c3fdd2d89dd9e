"""The mailboxes' shard alone: `python -m benchmarks.filing [--messages N]`: CPU of a message filed (us), durable, by the size of
the group; no network, no queue. Messages of 4 kB for users at random; all threads of the process are counted."""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.lmtp_source import messages_of
from relaymta.store.change import Change
from relaymta.store.shard import Shard
from relaymta.store.writer import Target

__all__ = ["GROUPS", "run"]

GROUPS = (1, 8, 64, 200)
USERS = 1000
PREFIX = b"Return-Path: <sender@far.example>\r\nDelivered-To: u123@local.example\r\n"


def add_users(change: Change) -> None:
    for user in range(USERS):
        change.add_user(user, [("Sent", "\\Sent"), ("Trash", "\\Trash")], 1_700_000_000)


async def group(shard: Shard, size: int, recipients: int, first: int, texts: list[bytes], chance: random.Random) -> None:
    """File `size` messages together, each for so many users."""

    def targets(number: int) -> list[Target]:
        users = chance.sample(range(USERS), recipients)
        return [Target(user, prefix=PREFIX, once=(number, place, user)) for place, user in enumerate(users)]

    calls = (shard.file([texts[number % len(texts)]], targets(number)) for number in range(first, first + size))
    for results in await asyncio.gather(*calls):
        assert all(result.filed is not None for result in results)
    for number in range(first, first + size):
        shard.forget(number, list(range(recipients)))


async def measured(shard: Shard, size: int, messages: int, recipients: int, first: int) -> dict[str, float]:
    """Groups of one size: CPU and rate."""
    texts, chance = messages_of(4096), random.Random(size)
    groups = max(1, messages // size)
    spent, began = time.process_time(), time.monotonic()
    for number in range(groups):
        await group(shard, size, recipients, first + number * size, texts, chance)
    spent, wall, count = time.process_time() - spent, time.monotonic() - began, groups * size * recipients
    return {"messages": groups * size, "cpu us": spent / count * 1e6, "rate": count / wall}


async def run(messages: int) -> dict[str, dict[str, float]]:
    """All sizes of groups, and one of messages for 20 users each (there, by recipient)."""
    sys.setswitchinterval(0.0001)  # as a worker has it
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shard = Shard(Path(folder), 0)
        await shard.start()
        try:
            await shard.task(add_users)
            first = 1 << 40
            await measured(shard, 200, min(messages, 2 * USERS), 1, first)  # warm-up: most users have mail
            for size in GROUPS:
                first += 1 << 30
                found[f"groups of {size}"] = await measured(shard, size, min(messages, 500 * size), 1, first)
            found["groups of 8, 20 recipients each"] = await measured(shard, 8, messages // 20, 20, first + (1 << 30))
        finally:
            await shard.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000, help="of each size of groups, at most (default: 10000)")
    print(json.dumps(uvloop.run(run(parser.parse_args().messages)), indent=1))


if __name__ == "__main__":
    main()
