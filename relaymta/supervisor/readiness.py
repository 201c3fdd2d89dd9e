"""Whether the relay takes mail now, and why it does not: the answer of /readyz."""

import asyncio

from relaymta.metrics import Counters
from relaymta.shm import Shared
from relaymta.supervisor.slots import Slots

__all__ = ["GAUGES", "reasons"]

# What is wrong -> the gauge of a worker that says so, from which value on, and what that means. Overload (load shedding, limits
# of connections) is no reason: the others would be overloaded next.
GAUGES = {
    "disk": ("relaymta_store_full", 1, "the disk or the LMDB map is too full to accept mail"),
    "store": ("relaymta_store_stalled", 1, "the store cannot commit: mail is refused and delivery pauses"),
    "memory": ("relaymta_memory_pressure", 2, "memory is used up: mail is temporarily rejected"),
}


def reasons(slots: Slots, shared: Shared, stopping: asyncio.Event) -> list[dict[str, str]]:
    """Why no mail should be sent here now, `what` for programs ("stopping", "workers", "disk", "store", "memory") and `text` for
    operators; none: the relay is ready. While it is stopping that is all there is to say."""
    if stopping.is_set():
        return [{"what": "stopping", "text": "the relay is stopping: its ports are closed"}]
    found = []
    if wrong := slots.health() if len(slots) else "no worker has been started yet":
        found.append({"what": "workers", "text": wrong})
    counters = {slot.number: Counters(shared.counters(slot.number)) for slot in slots}
    for what, (gauge, least, text) in GAUGES.items():
        if numbers := [str(number) for number, one in counters.items() if one.reading(gauge) >= least]:
            found.append({"what": what, "text": f"{text} (worker{'s' * (len(numbers) > 1)} {', '.join(numbers)})"})
    return found
