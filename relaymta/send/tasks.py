"""Background tasks of one worker's delivery, and what an error that nobody expected becomes."""

import asyncio
import traceback
from collections.abc import Coroutine

from relaymta.errors import StoreError, redacted
from relaymta.log import Log

__all__ = ["Tasks"]


class Tasks:
    """Owns the tasks that run: only `spawn` adds one, and it leaves when it ends. An error that ends a task is logged."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Log) -> None:
        self._loop = loop
        self._log = log
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run a coroutine in the background."""
        task = self._loop.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, StoreError):
            self._log.event("warning", text=f"store: {error}")
        elif isinstance(error, Exception):
            self.unexpected(error)

    def unexpected(self, error: Exception) -> tuple[str, str]:
        """Log an internal error with its source line; returns (public reason, detail for the log). It must not strand mail: the
        caller defers it as for any other failure."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"internal error: {type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        self._log.event("warning", text=redacted(text))
        return "internal error", text

    async def cancel(self) -> None:
        """Cancel all tasks; returns when they have ended."""
        await asyncio.sleep(0)  # each has begun then: one that is cancelled before would not give back what it was spawned with
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
