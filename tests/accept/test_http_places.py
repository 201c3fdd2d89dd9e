"""Places for work of which only so much is done at the same time: one fewer of one owner, turns of the owners, and a bound on how
long one waits."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from relaymta.accept.http.places import Full, Places


class Work:
    """Work that ends when it is told to. `began`: in order."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.began: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, *names: str) -> None:
        """One for each name, whose first letter is the owner."""
        for name in names:
            self.ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._one(name))

    async def _one(self, name: str) -> None:
        async with self.places.place(name[0]):
            self.began.append(name)
            await self.ends[name].wait()

    async def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()
            await self.tasks[name]
        await turn()


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def working(count: int, patience: float = 600.0):
    found = Work(Places(count, patience))
    yield found
    for name in found.ends:
        found.ends[name].set()
    await asyncio.gather(*found.tasks.values(), return_exceptions=True)
    assert found.places.free == count and not found.places._taken and not found.places._waiting


async def test_one_owner_leaves_a_place_for_others():
    async with working(3) as work:
        work.add("a1", "a2", "a3", "a4", "b1")
        await turn()
        assert work.began == ["a1", "a2", "b1"]
        await work.end("b1")
        assert work.began == ["a1", "a2", "b1"]  # it is not for a


async def test_those_who_wait_have_turns_of_their_owners():
    async with working(2) as work:
        work.add("a1", "b1")
        await turn()
        work.add("a2", "a3", "a4", "b2", "b3", "c1")
        await turn()
        for name in ("a1", "b1", "a2", "b2", "c1", "a3", "b3", "a4"):
            assert work.began[-1] in ("b1", name) or name in work.began
            await work.end(name)
        assert work.began == ["a1", "b1", "a2", "b2", "c1", "a3", "b3", "a4"]


async def test_one_place_is_for_anybody():
    async with working(1) as work:
        work.add("a1", "a2")
        await turn()
        await work.end("a1")
        assert work.began == ["a1", "a2"]


async def test_who_waits_gives_up():
    async with working(2, 0.02) as work:
        work.add("a1", "a2", "a3")
        for name in ("a2", "a3"):
            with pytest.raises(Full):
                await work.tasks[name]
        assert not work.places._waiting


async def test_nothing_is_lost_when_somebody_who_waits_is_cancelled():
    for steps in range(6):
        async with working(1) as work:
            work.add("a1")
            await turn()
            work.add("b1", "c1")
            await turn()
            work.ends["a1"].set()
            for _ in range(steps):
                await asyncio.sleep(0)
            work.tasks["b1"].cancel()
            await turn()
            assert work.began[-1] == "c1"
