"""What tests without an event loop need of one."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


@contextmanager
def in_thread(served: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """What an asynchronous context manager gives, on an event loop in a thread of its own. Tasks that are left are cancelled."""
    entered = Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]]()

    async def run() -> None:
        try:
            async with served as found:
                stop = asyncio.Event()
                entered.set_result((found, asyncio.get_running_loop(), stop))
                await stop.wait()
        except Exception as error:
            if entered.done():
                raise
            entered.set_exception(error)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    found, loop, stop = entered.result()
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
