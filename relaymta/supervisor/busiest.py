"""The sites that /metrics shows, with the sums of all workers."""

import asyncio
from typing import Any

from relaymta.control import Channel, Refused
from relaymta.supervisor.activity import Activity
from relaymta.supervisor.slots import Slots

__all__ = ["busiest"]

SECONDS = 0.8  # for a worker's answer, of each of two


async def busiest(slots: Slots, activity: Activity) -> list[dict[str, Any]]:
    """A row for each site that is shown and that a worker knows, with the sums of all workers that answer. All sites of all
    workers are compared (`Activity.loads`): one may be the busiest though it is it for no worker."""
    loads: dict[str, int] = {}
    for load in await _of_all(slots, None):
        for key, waiting, connections in load:
            loads[key] = loads.get(key, 0) + waiting + connections
    activity.loads(sorted(loads.items(), key=lambda pair: -pair[1]))
    shown = activity.shown
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
