"""Places for work of which only so much is done at the same time."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Full", "Places"]


class Full(Exception):
    """No place has become free in time."""


class Places:
    """`count` places, of which one owner has all but one at most: so another one's work begins at once, however much the first
    has. Those who wait get a free place in turns of their owners, and give up after `patience` seconds."""

    def __init__(self, count: int, patience: float) -> None:
        self.free = count
        self._most = max(1, count - 1)
        self._patience = patience
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by owner; whose turn is next is in front

    @asynccontextmanager
    async def place(self, owner: str) -> AsyncIterator[None]:
        """A place, while it is entered. Full."""
        come = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(come)
        self._next()
        try:
            if not come.done():
                async with asyncio.timeout(self._patience):
                    await come
        except BaseException as error:
            self._left(owner, come)
            if isinstance(error, TimeoutError):
                raise Full from None
            raise
        try:
            yield
        finally:
            self._give(owner)

    def _left(self, owner: str, come: "asyncio.Future[None]") -> None:
        """Who has waited does so no more."""
        if not come.cancelled():  # a place has come at the same time
            self._give(owner)
            return
        queue = self._waiting.get(owner, deque())
        if come in queue:
            queue.remove(come)
        if not queue:
            self._waiting.pop(owner, None)

    def _give(self, owner: str) -> None:
        self.free += 1
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]
        self._next()

    def _next(self) -> None:
        while self.free:
            owner = next((one for one in self._waiting if self._taken.get(one, 0) < self._most), None)
            if owner is None:
                return
            queue = self._waiting.pop(owner)
            come = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind the others
            if not come.cancelled():
                self.free -= 1
                self._taken[owner] = self._taken.get(owner, 0) + 1
                come.set_result(None)
