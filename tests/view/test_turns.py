"""Large results are made one after another; no user keeps others waiting with more than one of them."""

import asyncio

from relaymta.view.turns import FEW, Turns


async def test_one_at_a_time_and_users_in_turn():
    turns, made, under_way = Turns(), [], set()

    async def make(user: int, number: int, messages: int = FEW + 1) -> None:
        async with turns.taken(user, messages):
            under_way.add((user, number))
            assert len(under_way) == 1 or messages <= FEW
            await asyncio.sleep(0)
            under_way.remove((user, number))
            made.append((user, number))

    asked = [asyncio.create_task(make(1, number)) for number in range(5)]
    asked += [asyncio.create_task(make(2, number)) for number in range(2)]
    await asyncio.sleep(0)
    await make(3, 0, FEW)
    assert made.index((3, 0)) <= 1, "a small one waits for nobody"
    await asyncio.gather(*asked)
    users = [user for user, _ in made if user != 3]
    assert users[:3] == [1, 2, 1] and len(users) == 7


async def test_who_gives_up_keeps_nobody_waiting():
    turns = Turns()
    async with turns.taken(1, FEW + 1):
        waiting = [asyncio.create_task(taken(turns, user)) for user in (1, 2)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    async with asyncio.timeout(5), turns.taken(1, FEW + 1):
        pass


async def taken(turns: Turns, user: int) -> None:
    async with turns.taken(user, FEW + 1):
        raise AssertionError
