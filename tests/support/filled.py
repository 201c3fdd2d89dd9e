"""A spool with mail in it, made without a relay; and what its queue has, to compare it with another one."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from relaymta.disk.shards import shard_numbers
from relaymta.ident import format_id
from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue import Events, Null, Queue, QueueSettings, offline, wall_ms

__all__ = ["Letter", "assign", "fill", "histories", "listed", "opened"]

Letter = tuple[str, Sequence[str], bytes]  # sender, recipients, message data


def assign(envelope: Envelope, attempts: int) -> list[tuple[QueueName, list[int] | None]]:
    """A queue for each domain, of the route "mx"."""
    groups: dict[str, list[int]] = {}
    for index, address in enumerate(envelope.recipients):
        groups.setdefault(address.rpartition("@")[2], []).append(index)
    return [
        (QueueName(envelope.route or "mx", domain), indexes if len(groups) > 1 else None) for domain, indexes in groups.items()
    ]


async def opened(spool: Path, number: int = 0) -> Queue:
    """A shard that tries nothing."""
    queue = Queue(spool, number, QueueSettings("relay.example"), assign, Null(), Events())
    await queue.start_idle()
    return queue


async def _put(queue: Queue, letters: Iterable[Letter]) -> list[int]:
    idents, loop, asked = [], asyncio.get_running_loop(), []
    for sender, to, data in letters:
        ident, done = queue.ident(), loop.create_future()
        envelope = Envelope(sender, list(to), len(data), 0, wall_ms(), queue.deadline(), "127.0.0.1", "client.example")
        if len(data) > queue.big_limit:
            big = queue.big_body(ident)
            big.write([data])
            queue.submit(ident, envelope, big.finish([]), done.set_result)
        else:
            queue.submit(ident, envelope, [data], done.set_result)
        idents.append(ident)
        asked.append(done)
    assert not any(await asyncio.gather(*asked))
    return idents


def fill(spool: Path, letters: Iterable[Letter], shard: int = 0) -> list[str]:
    """Put messages into a shard; their ids."""

    async def run() -> list[int]:
        queue = await opened(spool, shard)
        try:
            return await _put(queue, letters)
        finally:
            await queue.stop()

    return [format_id(ident) for ident in asyncio.run(run())]


def listed(spool: Path) -> list[dict[str, Any]]:
    """What `queue list --json` shows of a stopped queue, by id."""
    found = []
    for number in shard_numbers(spool):
        after = 0
        while True:
            page = offline.answer(spool, "page", shard=number, after=after, chosen={})
            found += [json.loads(line) for line in page["lines"].splitlines()]
            after = page["after"]
            if not after:
                break
    return sorted(found, key=lambda row: row["id"])


def histories(spool: Path) -> list[tuple[dict[str, Any], bytes]]:
    """All that there is of each message, and its data."""
    return [
        (offline.answer(spool, "message", ident=row["id"]), b"".join(offline.answer(spool, "raw", ident=row["id"])))
        for row in listed(spool)
    ]
