"""Who may keep much in memory: large results of SORT and THREAD take some hundred octets a message while they are made."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

__all__ = ["FEW", "Turns"]

FEW = 20_000  # messages: so many are arranged at any time


class Turns:
    """Large results are made one after another, in the order in which they are asked for; a user who asks for several at a time
    waits with one of them, so that others do not wait for all."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._of: WeakValueDictionary[int, asyncio.Lock] = (
            WeakValueDictionary()
        )  # by user: held by who has a turn, or waits for it

    @asynccontextmanager
    async def taken(self, user: int, messages: int) -> AsyncIterator[None]:
        """Within it a result of so many messages is made for a user."""
        if messages <= FEW:
            yield
            return
        async with self._of.setdefault(user, asyncio.Lock()), self._turn:
            yield
