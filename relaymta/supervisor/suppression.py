"""The suppression list as the supervisor keeps it: what operators change, hard bounces, and the end of expired entries. All of
it on one thread of its own: another process may have the lock for writers."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from relaymta.config import Config
from relaymta.suppression import FOLDER, Changed, Counts, Entry, Page, Suppressions, Suppressor, Terms

__all__ = ["Suppressing"]

T = TypeVar("T")
LOOK_SECONDS = 5.0  # between two pieces of a sweep, and until a list that was moved away is made anew
SWEPT_TOGETHER = 10_000  # entries that are looked at in a piece: a hundredth of a second
STOP_SECONDS = 5.0  # for what is under way, at the end
PASS_SECONDS = 900.0  # between two sweeps of all
_NONE = Counts(0, 0, 0, {})


class Suppressing:
    """`config()`: the configuration in use; `warn(text)`: something is wrong. `counts`: of the last look; `left_out`: how many
    entries there was no room for."""

    def __init__(self, config: Callable[[], Config], warn: Callable[[str], object]) -> None:
        self._config = config
        self._warn = warn
        self._thread = _Thread()
        self._entries: Suppressions | None = None  # the thread's
        self._suppressor: Suppressor | None = None  # the thread's
        self._looking: asyncio.Task[None] | None = None
        self._after = b""  # the thread's: where the sweep goes on
        self._next_pass = 0.0  # the thread's, of the monotonic clock
        self._failing = False
        self.counts = _NONE
        self.left_out = 0

    def start(self) -> None:
        """Make the list, where it is used and not there yet, and sweep it from now on. Blocks."""
        self._looked()
        self._looking = asyncio.get_running_loop().create_task(self._look())

    def configured(self) -> None:
        """A reload has replaced the configuration: have a look now."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def stop(self) -> None:
        """Close the list."""
        if self._looking is not None:
            self._looking.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._on_thread(self._close)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await self._thread.done(work)

    def _close(self) -> None:
        if self._entries is not None:
            self._entries.close()
            self._entries = None

    def _opened(self) -> Suppressions:
        """The list that is there now, or a new one. StoreError."""
        if self._entries is not None and self._entries.replaced:
            self._close()
        if self._entries is None:
            self._entries = Suppressions(Path(self._config().spool) / FOLDER, self._config().suppression.entries)
        return self._entries

    @property
    def _is_there(self) -> bool:
        return (Path(self._config().spool) / FOLDER / "data.mdb").exists()

    @property
    def lasting(self) -> dict[str, int]:
        """For how many seconds an entry counts, by its reason; 0, or none: for ever."""
        table = self._config().suppression
        return {"hard-bounce": int(table.hard_bounce_expires), "complaint": int(table.complaint_expires)}

    # What operators ask

    async def put(self, entries: list[Entry]) -> Changed:
        """As `Suppressions.put`. StoreError."""
        changed = await self._on_thread(lambda: self._opened().put(entries))
        if changed.left_out:
            self.left_out += changed.left_out
            self._warn(f"the suppression list is full: {changed.left_out} entries were not added (suppression.entries)")
        return changed

    async def take(self, events: list[dict[str, Any]]) -> None:
        """Take what has become of mail: see `Suppressor.take`. StoreError."""
        if self._config().suppression.enabled:
            self.left_out += (await self._on_thread(lambda: self._take(events))).left_out

    def _take(self, events: list[dict[str, Any]]) -> Changed:
        table, lasting = self._config().suppression, self.lasting
        terms = Terms(table.hard_bounces, table.complaints, lasting["hard-bounce"], lasting["complaint"])
        if self._suppressor is None:
            self._suppressor = Suppressor(self._opened, terms, self._warn)
        self._suppressor.terms = terms
        return self._suppressor.take(events)

    async def remove(self, addresses: list[str], application: str | None) -> int:
        """As `Suppressions.remove`. StoreError."""
        return await self._on_thread(lambda: self._opened().remove(addresses, application) if self._is_there else 0)

    async def find(self, address: str) -> list[Entry]:
        """As `Suppressions.find`. StoreError."""
        return await self._on_thread(lambda: self._opened().find(address) if self._is_there else [])

    async def page(self, after: bytes, most: int, application: str | None, prefix: str, reason: str) -> Page:
        """As `Suppressions.page`. StoreError."""
        return await self._on_thread(
            lambda: self._opened().page(after, most, application, prefix, reason) if self._is_there else Page([], b"")
        )

    async def count(self) -> Counts:
        """As `Suppressions.counts`. StoreError."""
        most = self._config().suppression.entries
        return await self._on_thread(lambda: self._opened().counts() if self._is_there else _NONE._replace(most=most))

    # What is done meanwhile

    async def _look(self) -> None:
        while True:
            await self._on_thread(self._looked)
            await asyncio.sleep(LOOK_SECONDS)

    def _looked(self) -> None:
        """Where the list is used: see to it that it is there, count, and look at some of its entries: is one expired?"""
        table = self._config().suppression
        if not table.enabled:
            self.counts = _NONE
            return
        try:
            entries = self._opened()
            entries.limit(table.entries)
            entries.forget_dead_readers()
            if self._after or time.monotonic() >= self._next_pass:
                _, self._after = entries.sweep(self._after, time.time(), SWEPT_TOGETHER)
                self._next_pass = time.monotonic() + PASS_SECONDS
            self.counts = entries.counts()
            self._failing = False
        except Exception as error:  # also a row that is damaged: the loop goes on
            if not self._failing:
                self._warn(f"the suppression list: {error}")
            self._failing = True


class _Thread:
    """A thread on which things are done one after the other. The end of the process does not wait for it: a writer elsewhere may
    have been stopped with the lock."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._started = False

    def done(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """The result of `work()`."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="suppression", daemon=True).start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def answer(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as failure:
                error = failure
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(answer, result, error)

        self._queue.put(run)
        return future

    def _run(self) -> None:
        while True:
            self._queue.get()()
