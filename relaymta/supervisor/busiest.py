"""The busiest sites of the machine, for /metrics."""

import asyncio
from heapq import nlargest
from typing import Any

from relaymta.control import Channel, Refused
from relaymta.supervisor.slots import Slots

__all__ = ["busiest"]

SECONDS = 0.8  # for a worker's answer, of each of two


async def busiest(slots: Slots, most: int) -> list[dict[str, Any]]:
    """The `most` sites for which most messages wait (then: with most connections): one row for each, with the sums of all workers
    that answer. All sites of all workers are compared: one may be the busiest though it is it for no worker."""
    loads: dict[str, list[int]] = {}
    for load in await _of_all(slots, None):
        for key, waiting, connections in load:
            known = loads.setdefault(key, [0, 0])
            known[0] += waiting
            known[1] += connections
    shown = nlargest(most, loads, key=loads.__getitem__)
    rows: dict[str, dict[str, Any]] = {}
    for found in await _of_all(slots, shown):
        for row in found:
            known_row = rows.setdefault(row["pool"], dict.fromkeys(row, 0) | {"pool": row["pool"]})
            for name, value in row.items():
                if name != "pool":
                    known_row[name] += value
    return [rows[key] for key in shown if key in rows]


async def _of_all(slots: Slots, names: list[str] | None) -> list[Any]:
    found = await asyncio.gather(*(_of_one(channel, names) for _, channel in slots.ready()))
    return [rows for rows in found if rows]


async def _of_one(channel: Channel, names: list[str] | None) -> Any:
    try:
        async with asyncio.timeout(SECONDS):
            return await channel.ask("busy", names=names)
    except (ConnectionError, Refused, TimeoutError):
        return []
