"""The reasons that /readyz gives."""

import asyncio

import pytest

from relaymta.metrics import Counters
from relaymta.shm import Shared
from relaymta.supervisor.readiness import reasons
from relaymta.supervisor.slots import Slot, Slots, State


class Relay:
    """The slots of a relay, without processes."""

    def __init__(self, count: int) -> None:
        self.stopping = asyncio.Event()
        self.shared = Shared.create()
        self.slots = Slots(self.shared, print, self.stopping, lambda slot: {}, self.handle)
        for number in range(count):
            slot = Slot(number, [], [number])
            slot.enter(State.STARTING)
            slot.enter(State.READY)
            self.slots.add(slot)

    async def handle(self, op, args, descriptors):
        pass

    def gauge(self, number: int, name: str, value: int) -> None:
        Counters(self.shared.counters(number)).gauge(name, value)

    def reasons(self) -> list[dict[str, str]]:
        return reasons(self.slots, self.shared, self.stopping)


@pytest.mark.parametrize(
    ("gauge", "not_yet", "value", "what", "text"),
    [
        ("relaymta_store_full", 0, 1, "disk", "the disk or the LMDB map is too full to accept mail"),
        ("relaymta_store_stalled", 0, 1, "store", "the store cannot commit: mail is refused and delivery pauses"),
        ("relaymta_memory_pressure", 1, 2, "memory", "memory is used up: mail is temporarily rejected"),
    ],
)
def test_a_gauge_of_any_worker_is_a_reason_while_it_is_set(gauge, not_yet, value, what, text):
    relay = Relay(3)
    assert relay.reasons() == []
    relay.gauge(1, gauge, not_yet)
    assert relay.reasons() == []
    relay.gauge(1, gauge, value)
    assert relay.reasons() == [{"what": what, "text": f"{text} (worker 1)"}]
    relay.gauge(2, gauge, value)
    assert relay.reasons() == [{"what": what, "text": f"{text} (workers 1, 2)"}]
    relay.gauge(1, gauge, not_yet)
    relay.gauge(2, gauge, not_yet)
    assert relay.reasons() == []


def test_workers_that_are_not_ready_are_named_as_health_names_them_beside_what_else_there_is():
    relay = Relay(2)
    next(iter(relay.slots)).enter(State.LATE)
    relay.gauge(1, "relaymta_store_full", 1)
    assert [reason["what"] for reason in relay.reasons()] == ["workers", "disk"]
    assert relay.reasons()[0]["text"] == relay.slots.health() == "workers not ready: 0 (late)"


def test_before_the_first_worker_and_while_it_stops_it_is_not_ready():
    assert Relay(0).reasons() == [{"what": "workers", "text": "no worker has been started yet"}]
    relay = Relay(1)
    relay.gauge(0, "relaymta_store_full", 1)
    relay.stopping.set()
    assert [reason["what"] for reason in relay.reasons()] == ["stopping"]
