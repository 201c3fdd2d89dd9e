"""A stream hands the events of one shard to one consumer: in order, the next batch only when the one before was taken, and each
until it is. Its place is written when a batch was taken; so each event comes at least once. What is dropped is counted once at
most: the place behind it is written before.

A batch that a consumer does not take is handed to it again: after a second, then after up to five minutes, with jitter, or when
it has asked for; but for events that are older than it wants them by then, which are dropped. What other streams do does not
depend on it: there is one for each consumer and shard.
"""

import asyncio
import contextlib
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from relaymta.disk.journal import End, Found
from relaymta.errors import RelayError
from relaymta.queue.journal import Record, events_of
from relaymta.report import places
from relaymta.report.shards import Shard, records_of

__all__ = ["Consumer", "NotTaken", "Pace", "Stream"]

POLL = 0.2  # seconds between looks at a journal in which there was nothing new, and to gather what comes
READ = 1 << 20  # octets of a journal that are read at once
OCTETS_MOST = 1 << 20  # of the events of a batch, as JSON; one event may have more
FIRST, MOST = 1.0, 300.0  # seconds of back-off
FEW = 800  # octets of an event in the journal, on average in its frame
SAVE_SECONDS = 5.0  # for a place behind events that the consumer does not want
LACKING = "were there no more, or could not be written or read"


class NotTaken(RelayError):
    """A consumer has not taken a batch. str(): why; `after`: seconds after which it wants to be asked again, 0: it does not say;
    `gone`: it does not want to be asked any more."""

    def __init__(self, why: str, after: float = 0.0, gone: bool = False) -> None:
        super().__init__(why)
        self.after = after
        self.gone = gone


class Consumer:
    """Who takes events. `name`: by which its places are kept; `batch`: events that it takes at once; `retry_ms`: the age at which
    an event that it does not take is dropped, 0: never; `follows`: whether it wants any now: it lacks none else."""

    name = ""
    batch = 500
    retry_ms = 0
    follows = True

    def wants(self, event: dict[str, Any]) -> bool:
        """Whether it wants to know of an event. On any thread."""
        return True

    async def take(self, events: list[dict[str, Any]]) -> None:
        """Take events, of one shard and in their order; they were taken when this returns. NotTaken, or another exception: they
        come again."""
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing comes any more."""


class Pace:
    """When a consumer is asked again that has failed: of all its streams together. `failures`: one after the other; `why`: the
    last one, "": it has not failed since it took anything; `gone`: it is not asked again."""

    def __init__(self, told: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        """`told(text)` logs a warning."""
        self._told, self._now = told, now
        self.failures = 0
        self.why = ""
        self.gone = False
        self.until = 0.0
        self._failed = 0.0
        self._changed = asyncio.Event()

    async def turn(self) -> float:
        """Wait until it may be asked; the time then, for `failed`."""
        while self.gone or (left := self.until - self._now()) > 0:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), None if self.gone else left)
            except TimeoutError:
                pass
        return self._now()

    def failed(self, error: Exception, began: float) -> None:
        """It has not taken a batch, which was given to it at `began`."""
        why = _why(error)
        if not self.failures:
            self._told(f"it does not take events: {why}; they are sent again")
        if not self.failures or began >= self._failed:  # else another stream has failed at the same time
            self.failures += 1
            self._failed = self._now()
        pause = min(FIRST * 2.0 ** min(self.failures - 1, 20), MOST) * random.uniform(0.75, 1.25)
        after = error.after if isinstance(error, NotTaken) else 0.0
        self.why, self.until = why, max(self.until, self._now() + max(pause, after))
        if isinstance(error, NotTaken) and error.gone and not self.gone:
            self.gone = True
            self._told(f"{why}: nothing is sent to it before a reload, or before a test of it succeeds")

    def revive(self) -> None:
        """It may be asked again, if it was gone."""
        if self.gone:
            self.gone, self.until = False, 0.0
            self._changed.set()

    def succeeded(self) -> None:
        """It has taken a batch."""
        if self.failures:
            self._told("it takes events again")
        self.failures, self.why, self.until, self.gone = 0, "", 0.0, False
        self._changed.set()


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


class Batch(NamedTuple):
    """Events, when each happened (ms UTC) and where it is, and the place behind all of them; how many others were dropped
    `before` the first of them, and how many behind it. (Where there are no events: all `before`.)"""

    events: list[dict[str, Any]]
    times: list[int]
    places: list[End]
    place: End
    before: int = 0
    behind: int = 0

    def place_of(self, at: int) -> End:
        """Where an event is; behind the last: where the batch ends."""
        return self.places[at] if at < len(self.places) else self.place


class Tally:
    """What was counted of a consumer: events that were `delivered`, and `dropped`."""

    def __init__(self) -> None:
        self.delivered = self.dropped = 0


class Stream:
    """`file`: of its place; `warn(text)` logs; `until`: where a replay ends, None: it does not end; `only`: the events that it is
    about; `began`: when the replay did, ms UTC: no event is taken for older; `fresh`: a consumer without a place begins with the
    oldest event that there is, else with what happens from now on."""

    def __init__(
        self, consumer: Consumer, shard: Shard, file: Path, pace: Pace, tally: Tally, threads: Executor,
        warn: Callable[[str], None], until: End | None = None, only: Callable[[dict[str, Any]], bool] = lambda event: True,
        began: int = 0, fresh: bool = False,
    ) -> None:  # fmt: skip
        self.consumer = consumer
        self.shard = shard
        self.place = End()
        self.waits_since = 0  # ms UTC: when the first event happened that it has and that is not taken; 0: it has none
        self._file, self._pace, self._tally, self._threads, self._warn = file, pace, tally, threads, warn
        self._until, self._only, self._began, self._fresh = until, only, began, fresh
        self._saved = 0.0  # when its place was written, and which
        self._kept = End()
        self._writing = threading.Lock()
        self._turn = self._written = 0  # writes of its place: those that were begun, and the last one that was made
        self._trouble = ""
        self._more = False
        self._unread = 0  # events that `_next` could not show, and has not said so yet

    @property
    def behind(self) -> int:
        """How many events of the journal it has not come to."""
        return max(0, (self._until or self.shard.known).number - self.place.number)

    async def run(self) -> None:
        """Hand over, until this is cancelled, or a replay is at its end. Its place is kept then."""
        await self._begin()
        try:
            await self._follow()
        finally:
            # Else the next configuration would be asked once more whether it wants what this one did not want.
            with contextlib.suppress(OSError):
                self._write(self._turn + 1, self.place)

    async def _follow(self) -> None:
        while self._until is None or self.place.number < self._until.number:
            try:
                batch = await self._run(self._next)
            except Exception as error:  # StoreError, OSError; LMDB's, or a defect, which must not end the stream and say nothing
                self._say(f"{_why(error)}: its events wait")
                await asyncio.sleep(FIRST)
                continue
            self._trouble = ""
            if batch.before:
                await self._drop(batch.before, LACKING, batch.place_of(0))
            if batch.events:
                await self._hand_over(batch)
            if batch.behind:
                await self._drop(batch.behind, LACKING, batch.place)
            self.place = batch.place
            if self.place != self._kept:
                await self._save(bool(batch.events))
            self.waits_since = 0
            if not self._more:
                await asyncio.sleep(POLL)

    async def _run(self, what: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, what, *arguments)

    async def _begin(self) -> None:
        """Find its place."""
        while True:
            try:
                self.place = self._kept = await self._run(self._first)
                return
            except Exception as error:  # as in `run`
                self._say(f"{_why(error)}: its events wait")
                await asyncio.sleep(FIRST)

    def _first(self) -> End:
        """On a thread."""
        end, found = self.shard.end(), places.load(self._file)
        if found is None:
            oldest = self.shard.reader.oldest() if self._fresh or self._file.exists() else End()
            found = oldest if oldest.file else end
            places.save(self._file, found)
        return found

    def _next(self) -> Batch:
        """On a thread: the next events, as many as there are for one batch."""
        piece, self._unread = self.shard.read(self.place, READ), 0
        found = Batch([], [], [], piece.place)
        octets, before, dropped, place = 0, 0, 0, piece.start
        limit = self._until.number if self._until is not None else 1 << 63
        gaps = deque(sorted(piece.gaps.items()))  # several may follow each other

        def lacking(number: int) -> int:
            """How many events are not there before a number, and were not counted; of a replay up to its end."""
            count = 0
            while gaps and gaps[0][0] <= number:
                behind, gap = gaps.popleft()
                count += max(0, gap - max(0, behind - limit))
            return count

        def ended(where: End, more: bool) -> Batch:
            rest, self._more = dropped + self._unread, more
            return found._replace(place=where, before=before if found.events else rest, behind=rest if found.events else 0)

        for record in piece.records:
            dropped += lacking(record.number)
            if record.number >= limit:
                return ended(self._until or piece.place, False)
            for taken, event, moment, size in self._of(record, place):
                if found.events and (octets + size > OCTETS_MOST or len(found.events) >= self.consumer.batch):
                    return ended(record.place(taken), True)
                if not found.events:
                    before, dropped, self._unread = dropped + self._unread, 0, 0
                octets += size
                found.events.append(event)
                found.times.append(moment)
                found.places.append(record.place(taken))
            place = record.place(record.events)
        dropped += lacking(piece.place.number)  # behind the last record
        # Where it stays, as at a damaged end that may yet be mended, it is not looked at again at once.
        return ended(piece.place, piece.place.number < self.shard.known.number and piece.place != self.place)

    def _of(self, found: Found, place: End) -> Iterator[tuple[int, dict[str, Any], int, int]]:
        """The events in a frame from a place on that the consumer wants: (how many are before it, event, ms UTC, octets of its
        JSON: where they are few, a guess that is rather too high). What cannot be shown as events, such as what a newer version
        has written, is counted."""
        few = len(found.record) // found.events < FEW
        wants, only, taken = self.consumer.wants, self._only, -1
        records = records_of(found)
        if not records:
            self._unread += found.number + found.events - max(place.number, found.number)
        for record in records:
            if found.number + taken + len(record.parties) < place.number:
                taken += len(record.parties)
                continue
            for event in self._shown(found.number + taken + 1, record, place.number):
                taken += 1
                if event is not None and found.number + taken >= place.number and only(event) and wants(event):
                    yield taken, event, record.time, FEW * 2 if few else len(msgspec.json.encode(event))

    def _shown(self, number: int, record: Record, least: int) -> Iterator[dict[str, Any] | None]:
        """The events of a record whose first has this number; None: cannot be shown. Those before `least` are not counted."""
        behind, found = number + len(record.parties), events_of(number, record)
        while number < behind:
            try:
                event = next(found)
            except Exception:  # a defect, which must not come again and again
                traceback.print_exc()
                self._unread += behind - max(number, least)
                yield from [None] * (behind - number)
                return
            yield event
            number += 1

    async def _hand_over(self, batch: Batch) -> None:
        """Until it is taken, or all of it is too old. (An event that is too old waits for those before it: a place has one side
        where all was taken or dropped.)"""
        at, times = 0, batch.times
        while at < len(times):
            self.waits_since = times[at]
            began = await self._pace.turn()
            try:
                await self.consumer.take(batch.events[at:])
            except Exception as error:  # NotTaken, or a defect of a consumer, which must not end the stream
                self._pace.failed(error, began)
            else:
                self._pace.succeeded()
                self._tally.delivered += len(times) - at
                return
            oldest = time.time_ns() // 1_000_000 - self.consumer.retry_ms if self.consumer.retry_ms else 0
            first = at
            while at < len(times) and max(times[at], self._began) < oldest:
                at += 1
            if at > first:
                await self._drop(at - first, "were not taken for too long", batch.place_of(at))

    async def _drop(self, count: int, why: str, behind: End) -> None:
        """Count events that were dropped: when it is written that they are behind, so that they are not counted again."""
        self.place = behind
        try:
            await self._save(True)
        finally:  # also when this is cancelled: the place is written then by `run`
            if self.consumer.follows:
                self._tally.dropped += count
                self._warn(f"{count} events of shard {self.shard.number} {why}: they are dropped")

    def _say(self, trouble: str) -> None:
        """Warn of a trouble once."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._warn(trouble)

    async def _save(self, taken: bool) -> None:
        now = time.monotonic()
        if taken or now - self._saved > SAVE_SECONDS:
            self._saved = now
            self._turn += 1
            try:
                await self._run(self._write, self._turn, self.place)
            except OSError as error:
                self._say(f"its place cannot be written: {error.strerror or error}: events are sent again after a restart")

    def _write(self, turn: int, place: End) -> None:
        """On any thread: one that was cancelled may still be at it, or come later. OSError."""
        with self._writing:
            if turn > self._written and place != self._kept:
                places.save(self._file, place)
                self._kept, self._written = place, turn
