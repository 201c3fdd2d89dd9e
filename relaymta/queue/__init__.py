"""3. It is safe on disk: one shard of the queue. Nothing outside this package uses LMDB or segments.

submit()  stores a message, calls back when it is durable   finish()  records the outcome of an attempt
start()   begins to offer entries for delivery              task()    runs an operator's change in the group commit
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from relaymta.errors import SpoolBusy, StoreError
from relaymta.proto.envelope import HELD, PERMANENT, TRANSIENT, Attempt, Body, Envelope, Placement, QueueName
from relaymta.queue import inspect, listing
from relaymta.queue.clock import QueueClock, wall_ms
from relaymta.queue.compact import Compactor
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.fresh import MOST_RECIPIENTS
from relaymta.queue.ident import IdSource, format_id, parse_id
from relaymta.queue.inspect import Filter, Totals
from relaymta.queue.schedule import Schedule, retry_delay
from relaymta.queue.segments import FRAME, BigBody, Segments, segment_size_for
from relaymta.queue.store import SCHEMA, Change, QueueRow, Store
from relaymta.queue.writer import Assign, Committed, Task, Writer

__all__ = [
    "BigBody", "Committed", "Entry", "Events", "Filter", "Outcome", "Put", "Queue", "QueueSettings", "Totals", "format_id",
    "parse_id", "wall_ms",
]  # fmt: skip

T = TypeVar("T")
BALLAST_LEAST, BALLAST_MOST = 512 << 10, 4 << 20
FLOOR_SHARE = 10  # per cent of the file system
FLOOR_MOST = 2 << 30
RESUMED_GRACE_MS = 86_400_000
MAP_SHARE = 90  # per cent of LMDB's map
TICK = 0.05  # seconds
TOGETHER = 200  # messages of an operator's change in one group commit, so that incoming mail waits for few
SLOW_SHARE = 4
SLOWEST = 1.0  # seconds that a 250 is delayed just before the disk is full
STREAM_PIECE = 256 * 1024
PARK_AGAIN = 1.0  # seconds until a park that the disk refused is tried again
SWEEP_TICKS = 12_000  # ten minutes
MATERIALIZE_MS = 5_000  # fresh mail that has not left after so long gets rows of its own


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """One shard's settings. Ages and delays in milliseconds; `window` in entries, `window_bytes` in octets of message data."""

    hostname: str
    max_age_ms: int = 5 * 86_400_000
    first_retry_ms: int = 60_000
    window: int = 10_000
    window_bytes: int = 32 << 20


class Events:
    """Callbacks for logging and metrics; each is called on the loop, after the commit."""

    def queued(self, put: Put) -> None:
        """A message is durable."""

    def ended(self, outcome: Outcome) -> None:
        """An attempt's outcome is durable."""

    def committed(self, group: Committed) -> None:
        """A group was committed."""

    def refused(self, entry: Entry, why: str) -> None:
        """An outcome of `entry` was not recorded, because it contradicts the store: a defect. `why`: for the log."""

    def failed(self, what: str) -> None:
        """A change of the queue was undone because of a defect. `what`: for the log."""


class Queue:
    """One shard in `spool`. `assign(envelope, attempts)` names the queues of a message's recipients after that many attempts;
    `offer(entry)` takes an entry to deliver; `awake(name)`: whether a queue's mail would be delivered at once;
    `sign(data)`: header fields to prepend to a DSN's message data, called on the writer thread.
    SpoolBusy when another process owns the shard."""

    def __init__(
        self,
        spool: Path,
        shard: int,
        settings: QueueSettings,
        assign: Assign,
        offer: Callable[[Entry], None],
        events: Events,
        awake: Callable[[QueueName], bool] = lambda name: True,
        sign: Callable[[bytes], bytes] = lambda data: b"",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self.assign = assign
        self._events = events
        self._awake = awake
        self._promised = 0  # inlined messages that are not committed yet: each has room in the window
        self._materializing: set[int] = set()  # to be submitted to the writer at the end of this loop iteration
        self._operators = asyncio.Lock()  # one operator's change at a time
        self._changes: set[asyncio.Task[Any]] = set()  # operators' changes under way or waiting for the lock
        self.path = spool / f"shard-{shard}"
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        self.store = Store(self.path / "lmdb")
        self.clock = QueueClock(self.store.meta(b"seen"))
        self._ids = IdSource(shard, self.store.meta(b"highest"), self.clock.now)
        bodies = self.path / "bodies"
        bodies.mkdir(mode=0o700, exist_ok=True)
        self.segments = Segments(bodies, segment_size_for(self.path))
        self.segments.load(self.store.segments())
        self._ballast = self.path / "ballast"
        self._readers = ThreadPoolExecutor(2, "queue-reader")
        self.writer = Writer(
            self._loop,
            self.store,
            self.segments,
            self.clock,
            self._ids,
            hostname=settings.hostname,
            max_age_ms=settings.max_age_ms,
            ballast=self._ballast,
            assign=assign,
            on_commit=self._committed,
            sign=sign,
        )
        window = {"window": settings.window, "window_bytes": settings.window_bytes}
        self.schedule = Schedule(self.store, self.clock, self._read, offer, **window)
        self.compactor = Compactor(self.store, self.segments, self.writer, self._read)
        self.full = False
        self.room = 1 << 62  # octets until `full`, when the disk was last checked
        self.pressure = 0.0  # 0: room enough; up to 1 as the last quarter of a floor of room is used up
        self.brim = False  # half of the floor is used up, too: nothing is written that can be spared
        self.quarantined = False  # whether start() found its culprit here
        self._floor = FLOOR_MOST
        self._taken = 0  # octets stored since the disk was last checked
        self._ticks = 0
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, culprit: int = 0) -> None:
        """Begin to commit and to offer. Returns when the shard is ready to take mail. `culprit`: the id of a message to
        quarantine first (0: none)."""
        self.writer.start()
        if culprit:
            self.quarantined = await self.writer.task(lambda change: inspect.quarantine(change, self.store, culprit))
        if self.store.meta(b"schema") != SCHEMA:  # not written again, so that an existing shard starts on a full disk
            await self.writer.task(lambda change: change.set_meta(b"schema", SCHEMA))
        await self._loop.run_in_executor(self._readers, self._housekeep)
        await self.read(self._remove_orphans)
        astray = await self.read(self._astray)
        if astray:
            await self.writer.task(partial(self._rehouse, astray))
        if not self.schedule.add_fresh(await self.read(self._left_behind)):
            self._materialize(self.store.fresh.came_by(self.clock.now()))
        self._tick()

    def _left_behind(self) -> list[Entry]:
        """Reader thread: the entries of the messages that were still inlined when the previous process ended."""
        with self.store.env.begin() as txn:
            return [entry for ident, _ in self.store.fresh.live() for entry in self.schedule.load(txn, ident)]

    def _astray(self) -> list[int]:
        """Reader thread: inlined messages whose queue does not exist any more, or whose queue's number was given to another
        queue: earlier versions could sweep a queue with inlined mail and use its number again."""
        found = []
        with self.store.env.begin() as txn:
            for ident, envelope in self.store.fresh.live():
                names = [name for name, _ in self.assign(envelope, 0)]
                rows = [self.store.queue(txn, placement.queue) for placement in envelope.placements]
                if any(row is None or not (row.moved or row.name in names) for row in rows):
                    found.append(ident)
        return found

    def _remove_orphans(self) -> None:
        """Reader thread, before mail is accepted: remove large bodies without a message. A process that was killed leaves them
        while it receives one, or between the commit that ended a message and the unlink."""
        with self.store.env.begin() as txn:
            for ident, path in self.segments.big_files():
                envelope = self.store.envelope(txn, ident)
                if envelope is None or envelope.body is None or envelope.body.segment:
                    path.unlink(missing_ok=True)

    def _rehouse(self, idents: list[int], change: Change) -> None:
        """Writer thread: put the messages that `_astray` found into the queues that `assign` names."""
        for ident in idents:
            envelope = self.store.fresh.get(ident)
            if envelope is not None:
                change.rehouse(ident, envelope, self.assign(envelope, 0), self.clock.now())

    async def stop(self) -> None:
        """Commit what is pending and close."""
        if self._timer is not None:
            self._timer.cancel()
        self.schedule.paused = True
        await asyncio.gather(*self._changes, return_exceptions=True)
        if len(self.store.fresh):
            self._materialize(self.store.fresh.came_by(self.clock.now()))
        self._ask_materialize()
        await self.writer.close()
        await self._loop.run_in_executor(None, lambda: self._readers.shutdown(wait=True))
        self.segments.close()
        self.store.close()
        os.close(self._lock)

    # Taking mail

    def ident(self) -> int:
        """A new message id."""
        return self._ids.next()

    def deadline(self) -> int:
        """When a message accepted now is given up."""
        return self.clock.now() + self._settings.max_age_ms

    @property
    def big_limit(self) -> int:
        """Octets above which message data has to be streamed into a `BigBody`."""
        return self.segments.big_limit

    def big_body(self, ident: int, room: int = 0) -> BigBody:
        """A file for a large body, with `room` octets reserved in front of it. Blocks: call it on a thread."""
        return BigBody(self.segments.big_path(ident), ident, room)

    def delay(self, flow: float) -> float:
        """Seconds to delay a 250: `flow` while message data arrives faster than it leaves, up to SLOWEST as the disk fills."""
        return max(self.pressure * SLOWEST, flow if self.schedule.crowded else 0.0)

    def submit(
        self,
        ident: int,
        envelope: Envelope,
        data: list[bytes] | Body,
        done: Callable[[StoreError | None], None],
    ) -> None:
        """Store a message, `data` in pieces or as the `Body` of a finished `BigBody`. `done(None)` is called on the loop when it
        is durable, `done(error)` when it could not be stored."""
        names = self.assign(envelope, 0)
        fresh = len(names) == 1 and self._inlines(envelope, names[0][0])
        self._promised += fresh
        if isinstance(data, Body):
            envelope.body = data
            self.writer.submit(Put(ident, envelope, names, None, done, fresh))
        else:
            self.writer.submit(Put(ident, envelope, names, data, done, fresh))

    def _inlines(self, envelope: Envelope, name: QueueName) -> bool:
        """Whether a message will be tried at once, so that it needs no rows of its own."""
        return (
            not envelope.flags & HELD
            and self._awake(name)
            and self.schedule.room(self._promised)
            and len(envelope.recipients) <= MOST_RECIPIENTS
            and self._settings.max_age_ms > 2 * MATERIALIZE_MS  # an inlined message has no expiry row
        )

    # Outcomes

    def finish(self, entry: Entry, results: dict[int, Attempt] | None, retry_after_ms: int = 0) -> None:
        """Record the outcome of an attempt. `results`: an Attempt by index for each recipient of the entry (one without was not
        tried, and is deferred like one that failed temporarily); None: all were delivered.

        Recipients that failed temporarily are tried again after `retry_after_ms` (0: the schedule's own delay); they fail
        permanently when the message's deadline has passed. The entry stays in flight until the outcome is durable.
        Invariant: an entry ends once. A second outcome, or one of an entry that was put back, is refused (`Events.refused`).
        """
        if entry.ending or self.schedule.get(entry.ident, entry.queue) is not entry:
            self._events.refused(entry, "the entry has an outcome already" if entry.ending else "the entry is not in flight")
            return
        entry.ending = True
        if results is None:
            self.writer.submit(Outcome(entry))
            return
        now = self.clock.now()
        deadline = entry.envelope.deadline
        expired = now >= deadline
        failed: list[tuple[str, Attempt, bool]] = []
        final: dict[int, Attempt] = {}
        for index, attempt in results.items():
            kept = attempt
            if attempt.kind == PERMANENT:
                failed.append((entry.envelope.recipients[index], attempt, False))
            elif attempt.kind == TRANSIENT and expired:
                kept = msgspec.structs.replace(attempt, kind=PERMANENT)
                failed.append((entry.envelope.recipients[index], kept, True))
            final[index] = kept
        delay = retry_after_ms or retry_delay(entry.attempts + 1, self._settings.first_retry_ms)
        retry_at = max(now + 1, min(now + delay, deadline))
        self.writer.submit(Outcome(entry, final, retry_at, self._name_now(entry), failed, expired))

    def _name_now(self, entry: Entry) -> QueueName:
        """The queue in which an entry's recipients wait after this attempt: routes may have changed."""
        names = self.assign(entry.envelope, entry.attempts + 1)
        first = entry.indexes[0] if entry.indexes else 0
        for name, indexes in names:
            if indexes is None or first in indexes:
                return name
        return entry.name

    def put_back(self, entry: Entry) -> None:
        """Return an entry that was not tried to the queue on disk: a scan finds it once its queue is awake."""
        self.schedule.put_back(entry)
        if self.store.fresh.get(entry.ident) is not None:
            self._materialize([entry.ident])

    def skip(self, queue: int) -> None:
        """Exclude a queue from scans: enough of it is in memory."""
        self.schedule.skip.add(queue)

    def skip_no_longer(self, queues: Iterable[int]) -> None:
        """Include these queues in scans again."""
        self.schedule.skip.difference_update(queues)
        self.schedule.wake()

    def _materialize(self, idents: Iterable[int]) -> None:
        """Give inlined messages rows of their own, so that scans find them: one task at the end of this loop iteration."""
        if not self._materializing:
            self._loop.call_soon(self._ask_materialize)
        self._materializing.update(idents)

    def _ask_materialize(self) -> None:
        if self._materializing:
            idents, self._materializing = self._materializing, set()
            self.writer.submit(Task(lambda change: change.materialize(*idents), self._materialized))

    def _materialized(self, task: Task) -> None:
        self.schedule.wake()

    def park(self, queue: int, until: int) -> None:
        """Exclude a queue from scans until a time of the queue's clock, ms (0: wake it now). Repeated while the disk refuses."""

        def run(change: Change) -> None:
            change.park(queue, until)

        def done(task: Task) -> None:
            if task.error is not None and not task.mistake:  # the disk refused: the caller relies on it
                self._loop.call_later(PARK_AGAIN, self.park, queue, until)
            self.schedule.wake_at(until or self.clock.now())

        self.writer.submit(Task(run, done))

    # Reading bodies

    async def read_data(self, entries: list[Entry]) -> list[list[bytes] | StoreError]:
        """The message data of entries in pieces, verified, from memory or disk; StoreError in place of one that is damaged or
        gone."""
        found: list[list[bytes] | StoreError] = []
        bodies = [entry.envelope.body for entry in entries]
        results = await self._loop.run_in_executor(self._readers, self._read_bodies, entries, bodies)
        for entry, body, result in zip(entries, bodies, results, strict=True):
            if isinstance(result, StoreError) and entry.envelope.body != body:  # compaction moved it meanwhile
                found += await self.read_data([entry])
            else:
                found.append(result)
        return found

    def _read_bodies(self, entries: list[Entry], bodies: list[Body | None]) -> list[list[bytes] | StoreError]:
        found: list[list[bytes] | StoreError] = []
        for entry, body in zip(entries, bodies, strict=True):
            try:
                if body is None:
                    raise StoreError(f"message {format_id(entry.ident)} has no body")
                found.append(entry.data if entry.data is not None else [self.segments.read(entry.ident, body)])
            except StoreError as error:
                found.append(error)
        return found

    async def stream_data(self, entry: Entry) -> AsyncIterator[bytes]:
        """The message data of a large message (its body is a file of its own), piece by piece, verified before the first one.
        StoreError when it is damaged or gone."""
        ident, body = entry.ident, entry.envelope.body
        if body is None or body.segment:
            raise StoreError(f"message {format_id(ident)} has no file of its own")
        opening = self._loop.run_in_executor(self._readers, self.segments.open_big, ident, body)
        try:
            descriptor = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread still opens the file: close it then
            opening.add_done_callback(_close_opened)
            raise
        try:
            offset = body.offset + FRAME.size
            while piece := await self.read(os.pread, descriptor, STREAM_PIECE, offset):
                offset += len(piece)
                yield piece
        finally:
            os.close(descriptor)

    async def task(self, run: Callable[[Change], T]) -> T:
        """Run an operator's change on the writer thread; its result once it is durable. StoreError when the commit failed."""
        result = await self.writer.task(run)
        self.schedule.wake()
        return result

    async def change_messages(self, verb: str, idents: list[int], word: str = "") -> tuple[int, int]:
        """Change messages, at most 1,000: flush, hold, policy (hold until no hold policy applies), release, release policy (only
        what a policy holds), delete, bounce (`word`: the reason) or reroute (`word`: the route). (changed, skipped because in
        flight, ending or being changed.) A cancelled caller does not stop the change."""
        return await self._by_operator(lambda: self._change(verb, idents, word))

    async def _by_operator(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run an operator's change after those before it, to completion even when the caller is cancelled. No scan begins, and
        none that is under way is used, while one runs."""

        async def run() -> T:
            async with self._operators:
                self.schedule.changing += 1
                try:
                    return await change()
                finally:
                    self.schedule.changing -= 1
                    self.schedule.wake()

        task = self._loop.create_task(run())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    async def _change(self, verb: str, idents: list[int], word: str) -> tuple[int, int]:
        claimed = self.schedule.claim(idents)
        try:
            wanted = [ident for ident in dict.fromkeys(idents) if ident in claimed]
            parts = [wanted[start : start + TOGETHER] for start in range(0, len(wanted), TOGETHER)]
            if verb == "bounce":
                changed = sum([await self._bounce(part, word) for part in parts])
            else:
                changed = sum([await self.writer.task(partial(self._apply, verb, part, word)) for part in parts])
        finally:
            self.schedule.release_claim(claimed)
        return changed, len(set(idents)) - len(claimed)

    def _apply(self, verb: str, idents: list[int], word: str, change: Change) -> int:
        if verb == "reroute":
            return inspect.reroute(change, self.store, self.clock, self.assign, idents, word)
        return inspect.apply(verb, change, self.store, self.writer, self.clock, self._settings.max_age_ms, idents)

    async def move_queues(
        self, chosen: Filter, at_site: Callable[[QueueName, str], bool], rename: Callable[[QueueName], QueueName], dry_run: bool
    ) -> tuple[int, int]:
        """Move all mail of the queues that match `chosen` (`whole_queues`) to the route that `rename` names, due now, in one
        group commit: (messages, of them in flight, which follow when they are deferred). `dry_run`: only count."""
        if dry_run:
            rows, inlined = await self.read(self._chosen, chosen, at_site)
            return sum(row.messages for row in rows) + len(inlined), 0
        return await self._by_operator(lambda: self._move_queues(chosen, at_site, rename))

    def _chosen(self, chosen: Filter, at_site: Callable[[QueueName, str], bool]) -> tuple[list[QueueRow], list[int]]:
        """Reader thread: the queues that match, and the ids of the inlined messages in them."""
        rows = inspect.chosen_queues(self.store, chosen, at_site)
        numbers = {row.number for row in rows}
        return rows, [i for i, envelope in self.store.fresh.live() if any(p.queue in numbers for p in envelope.placements)]

    async def _move_queues(
        self, chosen: Filter, at_site: Callable[[QueueName, str], bool], rename: Callable[[QueueName], QueueName]
    ) -> tuple[int, int]:
        rows, inlined = await self.read(self._chosen, chosen, at_site)
        if not rows:
            return 0, 0
        numbers = {row.number for row in rows}
        in_flight = self.schedule.withdraw_queues(numbers, rename(rows[0].name).route)

        def run(change: Change) -> int:
            change.materialize(*inlined)
            return inspect.move(change, rows, rename)

        try:
            return await self.writer.task(run), in_flight
        finally:
            self.schedule.queues_changed(numbers)

    async def _bounce(self, idents: list[int], reason: str) -> int:
        """Fail the pending recipients of messages that this change has claimed, with a DSN to each sender; how many messages."""

        def load() -> list[Entry]:
            fresh = dict(self.store.fresh.live())  # before the transaction, so that one materialized meanwhile is not missed
            with self.store.env.begin() as txn:
                return [entry for ident in idents for entry in self.schedule.load(txn, ident, fresh)]

        mark = self.schedule.begin_reading()
        try:
            entries = await self.read(load)
            attempt = Attempt(wall_ms(), PERMANENT, "queue", "", 0, "5.7.1", reason)
            for entry in entries:
                self.schedule.adopt(entry)
                self.finish(entry, dict.fromkeys((index for index, _ in entry.recipients), attempt))
        finally:
            self.schedule.end_reading(mark)
        await self.writer.task(lambda change: None)  # committed after their outcomes
        return len({entry.ident for entry in entries})

    async def wake_queues(self, numbers: Iterable[int] | None = None) -> None:
        """Wake all queues (or these): what is due in them is tried now."""

        def run(change: Change) -> None:
            rows = self.store.queues(change.txn) if numbers is None else map(partial(self.store.queue, change.txn), numbers)
            for row in list(rows):
                if row is not None and (row.not_before or numbers is not None):  # None: swept meanwhile
                    change.park(row.number, 0)

        await self.writer.task(run)
        self.schedule.wake()

    # Queries

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(*args)` on a reader thread and return its result."""
        return await self._loop.run_in_executor(self._readers, function, *args)

    async def summary(self) -> list[dict[str, Any]]:
        """One row for each queue that holds mail, as `inspect.summary` makes them."""
        return await self.read(inspect.summary, self.store, self.clock)

    async def page(self, chosen: Filter, after: int, at_site: Callable[[QueueName, str], bool]) -> dict[str, Any]:
        """The next messages above id `after`, as `listing.page` returns them. `at_site(name, site)`: whether a queue's mail is
        delivered to a site. Without `chosen.until` only the messages that exist now match, not what is accepted or generated
        while the pages are read: pass the answer's "until" with each further page."""
        chosen = chosen if chosen.until else replace(chosen, until=self._ids.next())
        rows = await self.read(inspect.chosen_queues, self.store, chosen, at_site) if chosen.by_queue else None
        return await self.read(listing.page, self.store, self.clock, self.schedule, chosen, after, rows)

    async def shape(self) -> list[dict[str, Any]]:
        """How old the mail in each queue is, as `inspect.shape` makes it."""
        return await self.read(inspect.shape, self.store)

    async def names(self) -> list[QueueName]:
        """The names of all queues."""
        return await self.read(inspect.names, self.store)

    async def release_policy_held(self, still: Callable[[Envelope, list[QueueName]], bool]) -> int:
        """Release the messages that a hold policy held, but for those that `still(envelope, queues)` one applies to; how many."""
        after, released = (0, 0), 0
        while True:
            found, after = await self.read(inspect.policy_held, self.store, after)
            idents = [ident for ident, envelope, names in found if not still(envelope, names)]
            if idents:
                released += (await self.change_messages("release policy", idents))[0]
            if after == (0, 0):
                return released

    async def message(self, ident: int) -> dict[str, Any] | None:
        """Everything about one message, as `listing.message` makes it; None when it is not in this shard."""
        return await self.read(listing.message, self.store, self.clock, self.schedule, ident)

    async def places(self, ident: int) -> list[tuple[QueueName, Placement]]:
        """The queues in which a message waits, each with its placement."""
        return await self.read(inspect.places, self.store, self.clock, ident)

    async def raw(self, ident: int) -> bytes | None:
        """A message's data, verified; None when it is not in this shard. StoreError when it is damaged."""
        return await self.read(inspect.raw, self.store, self.segments, ident)

    def watch_totals(self, then: Callable[[inspect.Totals], None]) -> None:
        """Count the shard's messages and octets on a reader thread, then call `then(totals)` on the loop."""
        self.schedule.reading(lambda: inspect.totals(self.store, self.segments, self.clock), lambda totals, mark: then(totals))

    # After the commit

    def _committed(self, group: Committed) -> None:
        """On the loop: answer whoever waits for the group, offer what it stored, drop the entries whose outcomes it recorded."""
        for put in group.puts:
            self._promised -= put.fresh
            if put.error is None:
                self._events.queued(put)
            if put.done is not None:
                put.done(put.error)
            if put.envelope.flags & HELD:
                continue
            if put.error is None and not self.schedule.add_fresh(_entries(put)) and put.fresh:
                self._materialize([put.ident])
        for move in group.moves:
            if move.body is not None and move.error is None:
                self.schedule.moved(move.ident, move.queues, move.body)
            move.done(move)
        for outcome in group.outcomes:
            if outcome.refused:
                self._events.refused(outcome.entry, outcome.refused)
                if outcome.gone:  # else it stays in flight: what cannot be recorded is not tried again
                    self.schedule.remove(outcome.entry)
                continue
            self._events.ended(outcome)
            self.schedule.remove(outcome.entry, outcome.retry_at)
            if not outcome.entry.sole:
                self.schedule.wake()  # other recipients may have been deferred to this queue meanwhile
            if outcome.dsn is not None:
                self._events.queued(outcome.dsn)
                self.schedule.add_fresh(_entries(outcome.dsn))
        for task in group.tasks:
            if task.mistake:
                self._events.failed(f"{type(task.error).__name__}: {task.error} ({task.mistake})")
            if task.done is not None:
                task.done(task)
        self._events.committed(group)
        self._taken += sum(put.envelope.size for put in group.puts)
        if self._taken > self._floor // 4:  # do not wait for the next periodic check
            self._taken = 0
            self.schedule.reading(self._housekeep, self._expire)

    # Periodic work

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)  # first, so that an exception below does not stop the ticks
        self._ticks += 1
        if not self.writer.stalled:
            self.schedule.tick()
            self.compactor.tick()
        if self._ticks % SWEEP_TICKS == 0:
            self.writer.submit(Task(lambda change: change.sweep()))
        if self._ticks % 20 == 0:
            self.schedule.reading(self._housekeep, self._expire)
            late = self.clock.now() - MATERIALIZE_MS
            if 0 < self.store.fresh.oldest() <= late:
                self._materialize(self.store.fresh.came_by(late))

    def _read(self, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `function` on a reader thread, then `then(result)`, or `then(exception)` when it raised, on the loop."""

        def done(future: "asyncio.Future[Any]") -> None:
            if not future.cancelled():
                then(future.exception() or future.result())

        try:
            self._loop.run_in_executor(self._readers, function).add_done_callback(done)
        except RuntimeError:  # shutting down
            return

    def _housekeep(self) -> list[tuple[Entry, dict[int, Attempt]]]:
        """Reader thread, each second: check the room on the disk and in LMDB's map, and find what is overdue."""
        stats = os.statvfs(self.path)
        total, free = stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail
        used, size = self.store.used()
        floor = self._floor = min(total * FLOOR_SHARE // 100, FLOOR_MOST)
        self.room = max(0, free - floor)
        slow = floor // SLOW_SHARE
        self.pressure = 1 - min(self.room, slow) / slow if slow else 0.0
        self.brim = free < floor // 2
        self.full = free < floor or used * 100 > size * MAP_SHARE
        ballast = max(BALLAST_LEAST, min(total // 64, BALLAST_MOST))
        if not self._ballast.exists() and free > 2 * floor + ballast:
            _write_ballast(self._ballast, ballast)
        return self._overdue()

    def _overdue(self) -> list[tuple[Entry, dict[int, Attempt]]]:
        """Reader thread: entries of messages past their deadline, with the last attempt at each pending recipient.

        After a stop or a jump of the clock of an hour or more, each message is tried once before it expires: for a day only
        the outcome of an attempt expires it.
        """
        now = self.clock.now()
        if self.clock.resumed and now < self.clock.resumed + RESUMED_GRACE_MS:
            return []
        found: list[tuple[Entry, dict[int, Attempt]]] = []
        with self.store.env.begin() as txn:
            for deadline, ident in self.store.expiries(txn):
                if deadline > now or len(found) >= 200:
                    break
                for entry in self.schedule.load(txn, ident):
                    states = self.store.recipient_states(txn, ident)
                    last = {i: s.attempts[-1] for i, s in states.items() if s.attempts}
                    found.append((entry, last))
        return found

    def _expire(self, overdue: list[tuple[Entry, dict[int, Attempt]]], mark: int) -> None:
        """On the loop: expire messages past their deadline, in the window or on disk. What is in flight expires with its outcome,
        what is claimed by an operator's change with a later check."""
        for loaded, last in overdue:
            entry = self.schedule.seize(loaded, mark)
            if entry is None:
                continue
            never = Attempt(wall_ms(), TRANSIENT, "queue", "", 0, "4.4.7", "the message expired before it was tried")
            results = {index: msgspec.structs.replace(last.get(index, never), kind=TRANSIENT) for index, _ in entry.recipients}
            self.finish(entry, results)


def _entries(put: Put) -> list[Entry]:
    """The entries of a message that was just committed, one for each of its placements."""
    placements = put.envelope.placements
    if len(placements) == 1:
        only, name = placements[0], put.names[0][0]
        return [Entry(put.ident, put.envelope, name, only.queue, only.due, 0, None, True, put.data)]
    return [
        Entry(put.ident, put.envelope, name, placement.queue, placement.due, 0, indexes, False, put.data)
        for placement, (name, indexes) in zip(placements, put.names, strict=True)
    ]


def _close_opened(opening: "asyncio.Future[int]") -> None:
    """Close the descriptor that a reader thread opened after its caller was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


def _write_ballast(path: Path, size: int) -> None:
    """Reserve `size` octets of disk, which the writer releases when the disk is too full to record outcomes."""
    try:
        path.write_bytes(b"\0" * size)
    except OSError:
        path.unlink(missing_ok=True)


def _lock(path: Path) -> int:
    """Lock the shard in `path` until the returned descriptor is closed. SpoolBusy when another process has it locked."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise SpoolBusy(f"{path} is in use by another relaymta") from None
    return descriptor
