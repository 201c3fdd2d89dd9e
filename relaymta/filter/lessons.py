"""Lessons: messages that people have judged, for the filters that learn from them.

A bounded queue: texts wait in it, of which so many a second are shown to all filters, so that a folder that is moved to Junk
does not keep a filter from its mail. Each text is a lesson once, also when it comes again in another copy (`key_of`). Who has
learned what is remembered by `Memory`, for the whole machine.

State: `_octets` by `put` and `_run`; `_free_at` by `_run` alone. A cancelled `put` leaves nothing behind; `close` forgets what
waits.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from relaymta.errors import redacted
from relaymta.filter.judgement import FilterFailure, Learner, Text
from relaymta.proto.dkim import by_name, split_fields
from relaymta.proto.header import header_end

__all__ = ["KEY", "Lesson", "Lessons", "Memory", "key_of"]

A_SECOND = 5.0  # lessons
WAITING = 16  # texts
OCTETS = 64 << 20  # of texts that wait; one more than that is taken where none waits
KEY = 16  # octets of a key
_NAMES = (b"from", b"to", b"cc", b"date", b"subject", b"message-id")  # what is the same in all copies of a message


class Lesson(NamedTuple):
    """What a filter makes of a text. `done`: "learned" or "known already"; or `error`, why not."""

    filter: str
    done: str
    error: str


class Memory(Protocol):
    """Which texts filters have learned."""

    async def known(self, keys: list[bytes], spam: bool) -> list[bool]:
        """Of each key, whether it was last learned as this."""

    async def learned(self, key: bytes, spam: bool) -> None:
        """A filter has learned it."""


def key_of(name: str, data: bytes) -> bytes:
    """What is remembered of a text that the filter of this name has learned: the same for all copies of it, which differ in the
    fields of their way."""
    end = header_end(data)
    found = by_name(split_fields(data[:end]))
    made = blake2b(name.encode() + b"\0", digest_size=KEY)
    for field in (field for wanted in _NAMES for field in found.get(wanted, ())):
        made.update(field + b"\r\n")
    made.update(b"\0")
    made.update(memoryview(data)[end:])
    return made.digest()


class _Waiting(NamedTuple):
    data: bytes
    spam: bool
    done: Callable[[list[Lesson]], None]


class Lessons:
    """For these filters, by their names. `seconds`: for one of them, by name. Used on one event loop."""

    def __init__(self, learners: Mapping[str, Learner], seconds: Mapping[str, float], memory: Memory) -> None:
        self._learners = learners
        self._seconds = seconds
        self._memory = memory
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(WAITING)
        self._octets = 0
        self._room = asyncio.Event()  # there may be some again
        self._free_at = 0.0  # loop time
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def put(self, data: bytes, spam: bool, done: Callable[[list[Lesson]], None]) -> None:
        """Wait for room, and put a text into the queue, which is spam or is none. `done(lessons)` is called with what all
        filters make of it."""
        while self._queue.full() or (self._octets and self._octets + len(data) > OCTETS):
            self._room.clear()
            await self._ending(self._room.wait())
        if self._running.done():
            self._running.result()
        self._octets += len(data)  # from here on nothing is awaited: it is in the queue, or the caller was cancelled before
        self._queue.put_nowait(_Waiting(data, spam, done))

    async def finished(self) -> None:
        """Wait until no text waits. What `done` has raised."""
        await self._ending(self._queue.join())

    async def _ending(self, waiting: Coroutine[Any, Any, object]) -> None:
        """Wait for what happens while lessons go on; what has ended them is raised."""
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait({task, self._running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if self._running.done():
            self._running.result()
        task.result()

    def close(self) -> None:
        """End: what waits is not learned."""
        self._running.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            data, spam, done = await self._queue.get()
            self._room.set()
            try:
                keys = [key_of(name, data) for name in self._learners]
                known = await self._memory.known(keys, spam)
                if not all(known):
                    await asyncio.sleep(self._free_at - loop.time())
                    self._free_at = loop.time() + 1 / A_SECOND
                done(await asyncio.gather(*map(self._teach, self._learners, keys, known, [data] * len(keys), [spam] * len(keys))))
            finally:
                self._queue.task_done()
                self._octets -= len(data)
                self._room.set()

    async def _teach(self, name: str, key: bytes, known: bool, data: bytes, spam: bool) -> Lesson:
        if known:
            return Lesson(name, "known already", "")
        end = header_end(data)
        try:
            async with asyncio.timeout(self._seconds[name]):
                done = await self._learners[name].learn(Text(data[:end], data[end:]), spam)
        except TimeoutError:
            return Lesson(name, "", f"no answer in {self._seconds[name]:g} s")
        except FilterFailure as failure:
            return Lesson(name, "", str(failure))
        except Exception as error:  # a defect of ours: the others are taught all the same
            return Lesson(name, "", redacted(f"{type(error).__name__}: {error}"))
        await self._memory.learned(key, spam)
        return Lesson(name, done, "")
