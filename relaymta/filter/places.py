"""How many messages one filter is asked about at once, by all workers together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from relaymta.shm import Limits

__all__ = ["Places"]

LOOK_EVERY = 0.01  # seconds, while messages wait: other workers do not say that they have given a place back


class Places:
    """The places at a filter, as one worker takes them: in the order in which its messages came. Used on the loop alone.
    `waiting`: how many messages wait, changed by `take` and `_next`."""

    def __init__(
        self, name: str, most: int, limits: Limits, loop: asyncio.AbstractEventLoop, changed: Callable[[], None] = lambda: None
    ) -> None:
        """`changed()` is called whenever `waiting` is another one."""
        self._changed = changed
        self._key = f"filter {name}"
        self._most = most
        self._limits = limits
        self._loop = loop
        self._queue: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many messages wait for a place."""
        return len(self._queue)

    def take_now(self) -> bool:
        """Take a place that is free, if nobody waits for it: it lasts until `give`."""
        return not self._queue and self._limits.take(self._key, self._most)

    async def take(self) -> None:
        """Wait for a place. Cancelled: there is none."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._queue.append(turn)
        self._look_later()
        self._changed()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # `_next` has met it already
                    self._queue.remove(turn)
            else:  # it came in the same turn of the loop
                self.give()
            raise
        finally:
            self._changed()

    def give(self) -> None:
        """Give a place back."""
        self._limits.give(self._key)
        self._next()

    def _next(self) -> None:
        while self._queue:
            if self._queue[0].cancelled():
                self._queue.popleft()
            elif self._limits.take(self._key, self._most):
                self._queue.popleft().set_result(None)
            else:
                return

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_EVERY, self._look)

    def _look(self) -> None:
        self._timer = None
        self._next()
        if self._queue:
            self._look_later()
