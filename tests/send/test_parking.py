"""Queues that sleep, and how they are woken."""

import asyncio

import pytest

from relaymta.errors import StoreError
from relaymta.send.parking import Parking


class Queue:
    """Counts how often all queues are woken; `fails`: the disk refuses that."""

    def __init__(self) -> None:
        self.woken = 0
        self.fails = False
        self.go = asyncio.Event()

    async def wake_queues(self, queues: set[int] | None = None) -> None:
        self.woken += 1
        await self.go.wait()
        if self.fails:
            raise StoreError("full")


async def made() -> tuple[Parking, Queue, list[asyncio.Task[None]]]:
    tasks: list[asyncio.Task[None]] = []
    parking = Parking(None, lambda run: tasks.append(asyncio.ensure_future(run)), lambda entry: None)  # type: ignore[arg-type]
    parking.queue = queue = Queue()  # type: ignore[assignment]
    return parking, queue, tasks


async def test_a_thousand_wakes_at_once_are_two():
    parking, queue, tasks = await made()
    for _ in range(1000):
        parking.wake()
    await asyncio.sleep(0)
    assert queue.woken == 1
    parking.wake()  # what was put to sleep meanwhile is woken by another one, behind this
    queue.go.set()
    await asyncio.gather(*tasks)
    parking.tick()
    await asyncio.gather(*tasks)
    parking.tick()
    await asyncio.gather(*tasks)
    assert queue.woken == 2


@pytest.mark.parametrize("how", ["refused", "cancelled", "cancelled before it began"])
async def test_a_wake_that_failed_is_repeated(how):
    parking, queue, tasks = await made()
    parking.wake()
    if how == "cancelled before it began":
        tasks.pop().cancel()
        parking.wake()
    await asyncio.sleep(0)
    queue.fails = True
    if how == "cancelled":
        tasks[0].cancel()
    queue.go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    queue.fails = False
    for _ in range(3):
        parking.tick()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert queue.woken == 2
