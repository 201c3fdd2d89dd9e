"""Fair scheduling among clients that sent more than is parsed in one turn of the loop."""

import asyncio
from collections import deque
from collections.abc import Callable

__all__ = ["Turns"]


class Turns:
    """Runs one waiting callback in each turn of the loop, in order. So other clients are delayed by one callback at most, however
    many wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on()` after all that wait already."""
        self._waiting.append(go_on)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        go_on = self._waiting.popleft()
        if self._waiting:
            self._loop.call_soon(self._next)
        go_on()

    async def turn(self) -> None:
        """Go on in a turn of one's own, behind all that wait already."""
        come = self._loop.create_future()
        self.wait(lambda: None if come.done() else come.set_result(None))
        await come
