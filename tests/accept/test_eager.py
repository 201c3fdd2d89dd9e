"""Coroutines that are begun at once: what waits goes on as a task, as if it had been one from the start."""

import asyncio

import pytest

from relaymta.accept.eager import begin


class Spawned:
    def __init__(self):
        self.tasks = []

    def __call__(self, coroutine):
        self.tasks.append(asyncio.ensure_future(coroutine))


async def test_what_does_not_wait_needs_no_task():
    done, spawned = [], Spawned()

    async def work():
        done.append(1)

    begin(work(), spawned)
    assert done == [1] and not spawned.tasks


@pytest.mark.parametrize("ready", [False, True])
async def test_what_waits_goes_on_as_a_task(ready):
    future, done, spawned = asyncio.get_running_loop().create_future(), [], Spawned()

    async def work():
        done.append("begun")
        done.append(await future)
        await asyncio.sleep(0)
        async with asyncio.timeout(10):  # which has to know its task
            await asyncio.sleep(0.001)
        done.append("ended")

    begin(work(), spawned)
    assert done == ["begun"] and len(spawned.tasks) == 1
    if not ready:
        await asyncio.sleep(0.001)
    future.set_result("waited")
    await asyncio.gather(*spawned.tasks)
    assert done == ["begun", "waited", "ended"]


async def test_errors_and_cancellations_reach_it_where_it_waits():
    spawned, seen = Spawned(), []

    async def work(future):
        try:
            await future
        except (ValueError, asyncio.CancelledError) as error:
            seen.append(type(error))
            raise

    failing, hanging = (asyncio.get_running_loop().create_future() for _ in range(2))
    begin(work(failing), spawned)
    begin(work(hanging), spawned)
    failing.set_exception(ValueError())
    await asyncio.sleep(0)
    spawned.tasks[1].cancel()
    found = await asyncio.gather(*spawned.tasks, return_exceptions=True)
    assert [type(one) for one in found] == seen == [ValueError, asyncio.CancelledError]


async def test_an_error_before_the_first_wait_is_the_callers():
    async def work():
        raise ValueError

    with pytest.raises(ValueError):
        begin(work(), Spawned())
