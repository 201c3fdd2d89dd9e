"""3. It is safe on disk: one shard of the queue. Nothing outside this package uses LMDB or segments.

submit()  stores a message, calls back when it is durable   finish()  records the outcome of an attempt
start()   begins to offer entries for delivery              task()    runs an operator's change in the group commit

`Queue` is the face. What a deliverer uses of it: delivery.py. Who may do what with a message, and when: lifecycle.py.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from relaymta.control.filters import Filter
from relaymta.disk.big import BigBody, BigFile
from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.compact import Compactor
from relaymta.disk.folders import make_folder
from relaymta.disk.ident import IdSource
from relaymta.disk.journal import Rows, remove_journal
from relaymta.disk.lock import OWNER_SECONDS, lock
from relaymta.disk.operations import Task
from relaymta.disk.room import Disk
from relaymta.disk.segments import Segments, segment_size_for
from relaymta.errors import StoreError
from relaymta.ident import format_id, parse_id
from relaymta.proto.envelope import HELD, UNSEEN, Attempt, Body, Envelope, QueueName
from relaymta.queue.big import BigBodies
from relaymta.queue.bodies import Bodies
from relaymta.queue.change import Change
from relaymta.queue.changes import Changes
from relaymta.queue.delivery import Deliverer, Null
from relaymta.queue.ends import Ends
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.events import Events, QueueSettings
from relaymta.queue.expiry import Expiry, Overdue
from relaymta.queue.fresh import MOST_RECIPIENTS
from relaymta.queue.group import Assign, Committed
from relaymta.queue.importing import Importing
from relaymta.queue.inspect import Totals
from relaymta.queue.journal import NUMBERED, Journal, JournalSettings
from relaymta.queue.lifecycle import AGAIN, Lifecycle, fire, refusal
from relaymta.queue.opening import Opening
from relaymta.queue.quarantine import Keeper
from relaymta.queue.readers import Readers
from relaymta.queue.receipts import Kept, Request, digest_of, due_to_forget
from relaymta.queue.replies import Replies
from relaymta.queue.schedule import Schedule
from relaymta.queue.shards import Known, Shards
from relaymta.queue.store import Store
from relaymta.queue.unseen import UnseenMail
from relaymta.queue.view import View
from relaymta.queue.writer import Writer, said_nothing

__all__ = [
    "BigBody", "Committed", "Deliverer", "Entry", "Events", "Filter", "Kept", "Known", "Null", "Outcome", "Put", "Queue",
    "QueueSettings", "Request", "Shards", "Totals", "digest_of", "format_id", "parse_id", "wall_ms",
]  # fmt: skip

T = TypeVar("T")
TICK = 0.05  # seconds
SLOWEST = 1.0  # seconds that a 250 is delayed just before the disk is full
FAILED_OFFER_MS = 60_000  # a queue sleeps so long after the deliverer raised an exception over an entry of it
SWEEP_TICKS = 12_000  # ten minutes
CHECK_TICKS = 20
JOURNAL_TICKS = 1200  # a minute
FORGET_TICKS = 1200  # a minute
RECEIPTS_SHARE = 0.5  # of the map; above it receipts, and then idempotency keys, are forgotten before their time
FOREVER = 1 << 62
MATERIALIZE_MS = 5_000  # fresh mail that has not left after so long gets rows of its own


class Queue:
    """One shard in `spool`. `assign(envelope, attempts)` names the queues of a message's recipients after that many attempts;
    `sign(data)`: header fields to prepend to the data of a message of our own, a DSN for one; `said(entry)`: the attempt by which
    all recipients of an entry were delivered. Both are called on any thread.
    SpoolBusy when another process owns the shard."""

    def __init__(
        self,
        spool: Path,
        shard: int,
        settings: QueueSettings,
        assign: Assign,
        deliverer: Deliverer,
        events: Events,
        sign: Callable[[bytes], bytes] = lambda data: b"",
        said: Callable[[Entry], Attempt] = said_nothing,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self.assign, self.sign = assign, sign
        self._events = events
        self._awake = deliverer.awake
        self._kept_journal: Journal | None = None  # also while none is kept
        self._materializing: set[int] = set()  # to be submitted to the writer at the end of this loop iteration
        self.path = spool / f"shard-{shard}"
        make_folder(self.path)
        self._lock = lock(self.path, OWNER_SECONDS)
        self.store = Store(self.path / "lmdb")
        self.clock = ShardClock(self.store.meta(b"seen"))
        self._ids = IdSource(shard, self.store.meta(b"highest"), self.clock.now)
        bodies = self.path / "bodies"
        make_folder(bodies)
        self.segments = Segments(bodies, segment_size_for(self.path))
        self.segments.load(self.store.segments())
        self._big = BigBodies(self.segments, self.store)
        self.disk = Disk(self.path, self.store.used)
        self.entries = Lifecycle(deliverer.offer, self._offer_failed, settings.window, settings.window_bytes)
        self._readers = Readers(self._loop, self.entries)
        self.writer = Writer(
            self._loop,
            self.store,
            self.segments,
            self.clock,
            self._ids,
            hostname=settings.hostname,
            max_age_ms=settings.max_age_ms,
            ballast=self.disk.ballast,
            assign=assign,
            on_commit=self._committed,
            sign=sign,
            said=said,
        )
        self.writer.journal = self._journal(settings.journal, self.store.journal_rows())
        self.schedule = Schedule(self.store, self.clock, self._readers, self.entries)
        self._replies = Replies(events, self.entries, self.schedule, self._big, self._materialize, lambda: self.unseen.noticed())
        self.ends = Ends(self.writer, self.clock, settings, assign, events, self._big)
        self.begin, self.finish = self.entries.begin, self.ends.finish
        self.compactor = Compactor(self.store, self.segments, self.writer, self.store.points_at, self._readers.start)
        self.unseen = UnseenMail(
            self.store, self.segments, self._big, self.clock, self.writer, self._readers, self.schedule, self.entries, assign
        )
        self._expiry = Expiry(self.store, self.clock, self.schedule, self.entries, self.ends, self._hold_expired)
        self._opening = Opening(self.store, self._big, self.clock, self.writer, self._readers, self.schedule, assign)
        self.quarantined = False  # whether start() found its culprit here
        self._taken = self._ticks = 0  # octets stored since the disk was last checked; and ticks
        self._timer: asyncio.TimerHandle | None = None
        self._show(assign, settings)

    def _show(self, assign: Assign, settings: QueueSettings) -> None:
        """What operators read and change, and what delivery reads of messages: methods of their own objects."""
        self._changes = Changes(
            self._loop,
            self.store,
            self.clock,
            self.writer,
            self._readers,
            self.schedule,
            self.entries,
            self.ends,
            assign,
            settings.max_age_ms,
            lambda: self.unseen.noticed(),
            self._replies.left_quarantine,
            self._replies.changed,
            self._replies.moved,
        )
        self.change_messages, self.move_queues = self._changes.change_messages, self._changes.move_queues
        self.release_policy_held, self.wake_queues = self._changes.release_policy_held, self._changes.wake_queues
        self.park, self.delete_unchanged = self._changes.park, self._changes.delete_unchanged
        self.importing = Importing(
            self.store, self.clock, self._ids, self.writer, self._readers, self._big, self.segments.big_limit, assign, self.disk
        )
        self.quarantine = Keeper(self.store, self.clock, self._readers, self._changes.begin, settings.quarantine_ms)
        view = View(self.store, self.segments, self.clock, self._ids, self._readers, self.entries, self.quarantine)
        self.summary, self.page, self.shape, self.names = view.summary, view.page, view.shape, view.names
        self.message, self.places, self.raw, self.watch_totals = view.message, view.places, view.raw, view.watch_totals
        self.subjects, self.records = view.subjects, view.records
        data = Bodies(self.segments, self._readers, self.entries)
        self.read, self.stream = data.read, data.stream

    async def start(self, culprit: int = 0) -> None:
        """Begin to commit and to offer. Returns when the shard is ready to take mail. `culprit`: the id of a message to
        quarantine first (0: none)."""
        if self._settings.journal is None:  # nobody reads what there is of one
            kept, folder = self._kept_journal, self.path / "journal"
            await self._readers.run(kept.files.remove if kept is not None else lambda: remove_journal(folder))
        self.writer.start()
        if culprit:
            self.quarantined = await self._opening.quarantine(culprit)
        await self._readers.run(self._housekeep)
        if not self.entries.add_fresh(await self._opening.put_in_order()):
            self._materialize(self.store.fresh.came_by(self.clock.now()))
        self._tick()

    async def start_idle(self) -> None:
        """As `start`, for operators' changes while no daemon runs: nothing is offered, nothing expires, nothing is swept."""
        self.entries.paused = True
        self.writer.start()
        await self._opening.put_in_order()

    async def stop(self) -> None:
        """Commit what is pending and close."""
        if self._timer is not None:
            self._timer.cancel()
        self.entries.paused = True
        await self._changes.finished()
        if len(self.store.fresh):
            self._materialize(self.store.fresh.came_by(self.clock.now()))
        self._ask_materialize()
        await self.writer.close()
        await self._readers.close()
        if self._kept_journal is not None:
            self._kept_journal.files.close()
        self.segments.close()
        self.store.close()
        os.close(self._lock)

    def reconfigure(self, settings: QueueSettings) -> None:
        """Apply new settings, but for `hostname`: `max_age_ms` to mail accepted or released from now on, `first_retry_ms` to
        attempts that end from now on. A smaller window takes effect as entries leave it."""
        self._settings = self.ends.settings = settings
        self._changes.max_age_ms = self.writer.dsns.max_age_ms = settings.max_age_ms
        self.quarantine.keep_ms = settings.quarantine_ms
        self.entries.resize(settings.window, settings.window_bytes)
        self.schedule.wake()
        if settings.journal is not None or self.writer.journal is not None:
            self.writer.submit(Task(lambda change: self._keep_journal(change, settings.journal)))

    # The journal

    def _journal(self, settings: JournalSettings | None, rows: Rows) -> Journal | None:
        """The journal of events; None: there is to be none, and never was. (Where there was one, somebody may come back who was
        told: events are numbered.) `rows`: of the store."""
        if settings is None and not rows.end and self._kept_journal is None:
            return None
        settings = settings or NUMBERED
        if self._kept_journal is None:
            folder, brim = self.path / "journal", lambda: self.disk.brim
            self._kept_journal = Journal.opened(folder, rows, self.clock, settings, brim)
        self._kept_journal.files.configure(*settings)
        return self._kept_journal

    def _keep_journal(self, change: Change, settings: JournalSettings | None) -> None:
        """Writer thread: keep a journal, with these bounds, or none, from the next group on at the latest. What there is of one
        stays until the next start."""
        rows = self.store.journal_rows_in(change.txn)
        self.writer.journal = self._journal(settings, rows)

    def _sweep_journal(self) -> None:
        """On the loop, each second: have old files of the journal removed; and one where mail needs the room."""
        journal, spare = self.writer.journal, not self.disk.room
        if journal is not None and self._settings.journal is not None and (spare or self._ticks % JOURNAL_TICKS == 0):
            self.writer.submit(Task(lambda change: journal.files.sweep(self.clock.now(), spare)))

    async def complained(self, ident: int, envelope: Envelope, addresses: list[str], more: dict[str, Any]) -> None:
        """Note that recipients have complained of a message: as of `Journal.complained`. StoreError."""

        def run(change: Change) -> None:
            if change.journal is not None:
                change.journal.complained(ident, envelope, addresses, more)

        await self.writer.task(run)

    @property
    def full(self) -> bool:
        """Whether no mail is taken, for lack of room."""
        return self.disk.full

    @property
    def room(self) -> int:
        """Octets of room until `full`."""
        return self.disk.room

    @property
    def pressure(self) -> float:
        """0 while there is room enough, up to 1 just before `full`."""
        return self.disk.pressure

    @property
    def brim(self) -> bool:
        """Whether nothing is to be written that can be spared."""
        return self.disk.brim

    @property
    def reserve(self) -> int:
        """Octets of room until `brim`, for mail that makes room elsewhere in the queue."""
        return self.disk.reserve

    @property
    def stalled(self) -> bool:
        """Whether the disk refuses outcomes: nothing is to be tried, since it would be tried again."""
        return self.writer.stalled

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

    def big_file(self, entry: Entry) -> BigFile | None:
        """Where a large message's data lies until the entry is ended; None for any other. StoreError: it cannot be looked at."""
        body = entry.envelope.body
        if body is None or body.segment:
            return None
        try:
            return BigFile(str(self.segments.body_path(entry.ident, body)), entry.ident, body)
        except OSError as error:
            raise StoreError(f"cannot read the body of {entry.ident:016x}: {error}") from error

    def big_body(self, ident: int, room: int = 0) -> BigBody:
        """A file for a large body, with `room` octets reserved in front of it. Blocks: call it on a thread."""
        return self._big.make(ident, room)

    def become(self, file: BigBody, ident: int) -> None:
        """The file of a large body, made for an id of its own (`ident()`), is that of message `ident` from now on, whose former
        one, if it had any, was discarded. Before it is finished, and before `submit`. Blocks, too. OSError."""
        self._big.become(file, ident)

    def delay(self, flow: float) -> float:
        """Seconds to delay a 250: `flow` while message data arrives faster than it leaves, up to SLOWEST as the disk fills."""
        return max(self.disk.pressure * SLOWEST, flow if self.entries.crowded else 0.0)

    def submit(
        self,
        ident: int,
        envelope: Envelope,
        data: list[bytes] | Body,
        done: Callable[[StoreError | None], None],
        request: Request | None = None,
        began: float = 0.0,
    ) -> None:
        """Store a message, `data` in pieces or as the `Body` of a finished `BigBody`. `done(None)` is called on the loop when it
        is durable, `done(error)` when it could not be stored. `request`, `began`: as of Put."""
        names = self.assign(envelope, 0)
        fresh = len(names) == 1 and self._inlines(envelope, names[0][0])
        self._replies.promised += fresh
        pieces: list[bytes] | None
        if isinstance(data, Body):
            envelope.body, pieces = data, None
            self._big.submitted(ident)
        else:
            pieces = data
        self.writer.submit(Put(ident, envelope, names, pieces, done, fresh, request=request, began=began))

    def _inlines(self, envelope: Envelope, name: QueueName) -> bool:
        """Whether a message will be tried at once, so that it needs no rows of its own."""
        return (
            not envelope.flags & (HELD | UNSEEN)
            and not envelope.not_before
            and self._awake(name)
            and self.entries.fresh + self._replies.promised < self.entries.half  # there is room in the window
            and not self.entries.paused
            and len(envelope.recipients) <= MOST_RECIPIENTS
            and self._settings.max_age_ms > 2 * MATERIALIZE_MS  # an inlined message has no expiry row
        )

    # Entries

    def again(self, entry: Entry) -> None:
        """An attempt reached no peer: the entry is waiting again, with the deliverer."""
        why = refusal(entry, AGAIN)
        if why:
            self._events.refused(entry, why)
        else:
            fire(entry, AGAIN)

    def put_back(self, entry: Entry) -> None:
        """Return an entry that was not tried to the queue on disk: a scan finds it once its queue is awake. One that somebody
        else has claimed is left alone."""
        why = self.entries.put_back(entry)
        if why:
            self._events.refused(entry, why)
            return
        self.schedule.wake()
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

    async def task(self, run: Callable[[Change], T]) -> T:
        """Run an operator's change on the writer thread; its result once it is durable. StoreError when the commit failed."""
        result = await self.writer.task(run)
        self.schedule.wake()
        return result

    # After the commit

    def _committed(self, group: Committed) -> None:
        self._replies.committed(group)
        self._taken += sum(put.envelope.size for put in group.puts)
        if self._taken > self.disk.floor // 4:  # do not wait for the next periodic check
            self._taken = 0
            self._readers.read_rows(self._housekeep, self._expiry.expire)

    def _offer_failed(self, entry: Entry, error: Exception) -> None:
        """The deliverer raised an exception over an entry, which was put back: its queue sleeps a while."""
        self._replies.raised(error)
        if self.store.fresh.get(entry.ident) is not None:
            self._materialize([entry.ident])
        self.park(entry.queue, self.clock.now() + FAILED_OFFER_MS)

    def _hold_expired(self, idents: list[int]) -> None:
        """Unseen messages have expired, and there is to be no DSN."""
        self._changes.begin("unseen expired", idents)

    # Periodic work

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)  # first, so that an exception below does not stop the ticks
        self._ticks += 1
        if not self.writer.stalled:
            self.schedule.tick()
            self.compactor.tick()
        if self._ticks % SWEEP_TICKS == 0:
            self.writer.submit(Task(lambda change: change.sweep()))
            self._readers.start(self._big.sweep, lambda result: None)
            self._readers.start(self.store.forget_dead_readers, lambda result: None)
        if self._ticks % FORGET_TICKS == 0:
            self._readers.start(self._is_due_to_forget, self._forget)
        if self._ticks % CHECK_TICKS == 0:
            self._look_at_receipts()
            self._sweep_journal()
            self._readers.read_rows(self._housekeep, self._expiry.expire)
            self.quarantine.tick()
            late = self.clock.now() - MATERIALIZE_MS
            if 0 < self.store.fresh.oldest() <= late:
                self._materialize(self.store.fresh.came_by(late))

    def _look_at_receipts(self) -> None:
        """Receipts are kept while there is room: mail goes first. Above their share the oldest are forgotten early."""
        much = self.disk.map_used > RECEIPTS_SHARE
        self.store.spare = much or self.disk.brim or self.writer.stalled
        if much and not self.writer.stalled:
            self.writer.submit(Task(lambda change: change.forget(FOREVER)))

    def _is_due_to_forget(self) -> bool:
        """Reader thread: whether there are receipts that are kept no longer."""
        with self.store.reading() as txn:
            return due_to_forget(txn, self.store.tables, self.clock.now())

    def _forget(self, due: Any) -> None:
        """On the loop: remove them, in groups, so that mail waits for few. `due`: what `_is_due_to_forget` has found, an
        exception that it has raised, or what the group before has removed."""
        if due and not isinstance(due, Exception) and not self.writer.stalled:
            now = self.clock.now()
            done = lambda task: self._forget(0 if task.error is not None else task.result)  # noqa: E731
            self.writer.submit(Task(lambda change: change.forget(now), done))

    def _housekeep(self) -> list[Overdue]:
        """Reader thread, each second: check the disk, and find what is overdue."""
        self.disk.check()
        return self._expiry.overdue()
