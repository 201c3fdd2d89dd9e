"""The reader threads of a shard: everything that reads its files runs on them, never on the loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["Readers"]

THREADS = 2
T = TypeVar("T")


class Readers:
    """Runs functions on the reader threads. All methods are called on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._threads = ThreadPoolExecutor(THREADS, name)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(*args)` on a reader thread and return its result."""
        return await self._loop.run_in_executor(self._threads, function, *args)

    def submit(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """As `run`, but the function runs to its end even when nobody awaits it."""
        return self._loop.run_in_executor(self._threads, function, *args)

    def start(self, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `function`, then `then(result)` on the loop, or `then(exception)` when it raised."""

        def done(future: "asyncio.Future[Any]") -> None:
            if not future.cancelled():
                then(future.exception() or future.result())

        try:
            self._loop.run_in_executor(self._threads, function).add_done_callback(done)
        except RuntimeError:  # shutting down
            return

    async def close(self) -> None:
        """Wait for what is being read, and end the threads."""
        await self._loop.run_in_executor(None, lambda: self._threads.shutdown(wait=True))
