"""Messages that are in the queue before filters have looked at them: whoever asks the filters gets them here.

They are in no queue's schedule: nobody offers one to delivery before `passed` or `replaced` is committed. Who has one taken has
claimed it (lifecycle.py): operators' changes and expiry leave it alone until `Taken.release`, and, if its caller was cancelled,
until what was to come of it is committed or refused. What was read before the claim may be outdated, so the row and the message
data are read after it.
"""

import asyncio
import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import NamedTuple

import msgspec

from relaymta.disk.big import BigBody, opened_again
from relaymta.disk.clock import ShardClock
from relaymta.disk.operations import Task
from relaymta.disk.segments import FRAME, Segments
from relaymta.errors import StoreError
from relaymta.proto.envelope import UNSEEN, Body, Envelope, Quarantine
from relaymta.queue.big import BigBodies
from relaymta.queue.change import Change
from relaymta.queue.entry import Entry, Put
from relaymta.queue.group import Assign
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.readers import Readers
from relaymta.queue.schedule import Schedule
from relaymta.queue.store import Store
from relaymta.queue.writer import Writer

__all__ = ["FIRST", "Page", "Taken", "UnseenMail"]

FIRST = (0, 0)  # before all of them
PAGE = 5000  # rows that are read at once
Down = tuple[frozenset[str], frozenset[str]]


class Page(NamedTuple):
    """`idents`: messages that can be looked at now; `after`: where the next page begins, FIRST: there is none; `empty`: there are
    no unseen messages at all."""

    idents: list[int]
    after: tuple[int, int]
    empty: bool


class Taken:
    """An unseen message that the caller has claimed. `envelope`: without recipients that have ended before; `data`: its message
    data, or, of a large one, b"", and `piece` reads it."""

    def __init__(self, ident: int, envelope: Envelope, data: bytes, descriptor: int, readers: Readers, end: Callable[[], None]):
        self.ident = ident
        self.envelope = envelope
        self.data = data
        self._descriptor = descriptor
        self._readers = readers
        self._end = end
        self._commit: asyncio.Future[None] | None = None  # of what has come of it last

    @property
    def is_large(self) -> bool:
        """Whether its message data is in a file of its own."""
        return self._descriptor >= 0

    async def piece(self, at: int, most: int) -> bytes:
        """Octets of a large message. OSError."""
        body = self.envelope.body
        assert body is not None
        most = max(min(most, body.length - at), 0)
        return await self._readers.run(os.pread, self._descriptor, most, body.offset + FRAME.size + at)

    def lend(self, at: int) -> tuple[int, int]:
        """A further descriptor to read a large message from, and where in that it is from `at` on. On a thread. OSError."""
        body = self.envelope.body
        assert body is not None
        return opened_again(self._descriptor), body.offset + FRAME.size + at

    def release(self) -> None:
        """The caller has done with it, whatever that was. Further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        end, self._end = self._end, lambda: None
        if self._commit is None or self._commit.done():
            end()
        else:  # its caller was cancelled
            self._commit.add_done_callback(lambda commit: (commit.exception(), end()))

    async def committed(self, commit: "asyncio.Future[None]") -> None:
        """Wait for a commit of it, which goes on when the caller is cancelled, and until whose end it stays claimed."""
        self._commit = commit
        await asyncio.shield(commit)


class UnseenMail:
    """The unseen messages of one shard. All methods are called on the loop, but `big_body` and `become`. `noticed`: called when
    there may be one."""

    def __init__(
        self, store: Store, segments: Segments, big: BigBodies, clock: ShardClock, writer: Writer, readers: Readers,
        schedule: Schedule, entries: Lifecycle, assign: Assign,
    ) -> None:  # fmt: skip
        self._store = store
        self._segments = segments
        self._big = big
        self._clock = clock
        self._writer = writer
        self._readers = readers
        self._schedule = schedule
        self._entries = entries
        self._assign = assign
        self.noticed: Callable[[], None] = lambda: None

    async def page(self, after: tuple[int, int], most: int, busy: set[int], down: Down) -> Page:
        """Up to `most` messages above `after`, by class and age; not those that are `busy`, nor those for which nothing can be
        done while filters are `down`: the names of those that mail of clients that may not relay, and that may, waits for.
        StoreError."""
        return await self._readers.run(self._page, after, most, set(busy), down)

    def _page(self, after: tuple[int, int], most: int, busy: set[int], down: Down) -> Page:
        """Reader thread."""
        found, last, seen = list[int](), after, 0
        with self._store.reading() as txn:
            for last, (trusted, names) in islice(self._store.unseen(txn, after), PAGE):
                seen += 1
                if last[1] not in busy and not (names and down[trusted].issuperset(names)):
                    found.append(last[1])
                    if len(found) >= most:
                        return Page(found, last, False)
        return Page(found, FIRST if seen < PAGE else last, not seen and after == FIRST)

    async def exist(self) -> bool:
        """Whether there are any. StoreError."""
        return not (await self.page(FIRST, 1, set(), (frozenset(), frozenset()))).empty

    async def take(self, ident: int) -> Taken | None:
        """Claim a message and read it. None: somebody else has it, or it is not unseen any more. StoreError: it cannot be
        read."""
        if not self._entries.claim([ident]):
            return None
        reading = self._readers.submit(self._read, ident)
        try:
            found = await asyncio.shield(reading)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):  # the thread may still open a file
                reading.add_done_callback(_close_opened)
            self._let_go(ident)
            raise
        if found is None:
            self._let_go(ident)
            return None
        return Taken(ident, *found, self._readers, partial(self._let_go, ident))

    def _let_go(self, ident: int) -> None:
        self._entries.release_claim({ident})

    def _read(self, ident: int) -> tuple[Envelope, bytes, int] | None:
        """Reader thread: its envelope, data, and descriptor (-1: none)."""
        body: Body | None = None
        while True:
            with self._store.reading() as txn:
                envelope = self._store.envelope(txn, ident)
            if envelope is None or not envelope.flags & UNSEEN or envelope.body is None:
                return None
            last, body = body, envelope.body
            _leave_out_ended(envelope)
            try:
                if body.segment:
                    return envelope, self._segments.read(ident, body), -1
                return envelope, b"", self._segments.open_big(ident, body)
            except StoreError:
                if last == body:
                    raise  # else it may have been moved meanwhile: read its row again

    # What comes of it. Each returns when that is durable. StoreError: nothing has changed.

    async def passed(self, taken: Taken) -> None:
        """All filters have let it pass as it is: it is due now. It is released, and offered to delivery as a new message is."""
        ident, store, found = taken.ident, self._store, list[Entry]()

        def see(change: Change, envelope: Envelope) -> None:
            change.seen(ident, envelope, self._clock.now())
            places, data = envelope.placements, None if taken.is_large else [taken.data]
            for place in places:
                name, sole = store.row_numbered(change.txn, place.queue).name, len(places) == 1
                found.append(Entry(ident, envelope, name, place.queue, place.due, place.attempts, place.indexes, sole, data))

        await self._changed(taken, see)
        taken.release()
        if not self._entries.add_fresh(found):
            self._schedule.wake()

    async def held(self, taken: Taken, why: str, quarantine: Quarantine, left: list[str] | None) -> None:
        """Filters hold it as it is; `left`: those that have not looked at it yet, None: what it waits for it still does; `why`:
        as of `Envelope.held_for`."""

        def hold(change: Change, envelope: Envelope) -> None:
            if left is not None:
                _leave(envelope, left)
            envelope.quarantine = quarantine
            change.hold(taken.ident, envelope, why)

        await self._changed(taken, hold)

    async def waits(self, taken: Taken, left: list[str]) -> None:
        """These filters have not looked at it yet."""
        await self._changed(taken, lambda change, envelope: change.unseen_by(taken.ident, envelope, left))

    async def dropped(self, taken: Taken) -> None:
        """Filters discard it."""

        def drop(change: Change, envelope: Envelope) -> None:
            change.tell("bounced", taken.ident, envelope, "discarded")
            change.finish_message(taken.ident, envelope, histories=True)
            self._writer.free_body(taken.ident, envelope.body)

        await self._changed(taken, drop)

    async def _changed(self, taken: Taken, make: Callable[[Change, Envelope], None]) -> None:
        commit: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def run(change: Change) -> None:
            envelope = change.envelope(taken.ident)
            if envelope is not None and envelope.flags & UNSEEN:
                make(change, envelope)

        self._writer.submit(Task(run, lambda task: _settle(commit, task.error)))
        await taken.committed(commit)

    async def replaced(self, taken: Taken, envelope: Envelope, data: list[bytes] | Body) -> None:
        """It has this envelope and this data from now on: `data` in pieces, or of a finished file of `big_body`. It is due now,
        held, or unseen, as the envelope's flags say; and released."""
        commit: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: StoreError | None) -> None:
            _settle(commit, error)
            if error is None:
                taken.release()  # before it is offered

        put = Put(taken.ident, envelope, self._assign(envelope, 0), None, done, replaces=True)
        if isinstance(data, Body):
            envelope.body = data
            self._big.submitted(taken.ident)
        else:
            put.data = data
        self._writer.submit(put)
        await taken.committed(commit)

    def big_body(self, taken: Taken, ident: int, room: int) -> BigBody:
        """A file for what a message may have from now on, with `room` octets reserved in front of it, and an id of its own
        (`Queue.ident()`). Blocks: call it on a thread."""
        body = taken.envelope.body
        assert body is not None
        return self._big.make(ident, room, (1 if body.segment else body.generation) + 1)

    def become(self, taken: Taken, file: BigBody) -> None:
        """The message has what is in the file from now on: before it is finished. Blocks, too. OSError: it has not."""
        assert taken.envelope.body is not None
        self._big.follow(file, taken.ident, taken.envelope.body)

    def fits(self, octets: int) -> bool:
        """Whether so much message data needs no file of its own."""
        return octets <= self._segments.big_limit


def _settle(commit: "asyncio.Future[None]", error: Exception | None) -> None:
    if error is not None:
        commit.set_exception(error)
    else:
        commit.set_result(None)


def _leave_out_ended(envelope: Envelope) -> None:
    """Some recipients of a message may have been bounced, and the others not when the process ended."""
    everyone = envelope.recipients
    pending = {i for p in envelope.placements for i in (range(len(everyone)) if p.indexes is None else p.indexes)}
    if len(pending) < len(everyone):
        envelope.recipients = [address for index, address in enumerate(everyone) if index in pending]


def _leave(envelope: Envelope, left: list[str]) -> None:
    """These filters have not looked at it yet."""
    unseen = envelope.unseen
    assert unseen is not None
    envelope.unseen = msgspec.structs.replace(unseen, filters=left) if left else None


def _close_opened(reading: "asyncio.Future[tuple[Envelope, bytes, int] | None]") -> None:
    """Close the descriptor that a reader thread opened after its caller was cancelled."""
    if not reading.cancelled() and reading.exception() is None:
        found = reading.result()
        if found is not None and found[2] >= 0:
            os.close(found[2])
