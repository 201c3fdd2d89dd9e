"""The group commit: one thread that makes all pending operations durable together, then posts the results to the loop.

A group is: bodies appended to segments and synced, then one LMDB transaction with everything else (new messages, outcomes
with their DSNs, operators' changes). Invariant: nothing in it is acknowledged before both have returned. What is submitted
meanwhile is in the next group. A single message never waits: when no group is under way it is committed at the end of the
loop's iteration. But a group costs as much CPU as several messages, so
  - after a group, when a few operations are pending, the next one is delayed a little to collect more;
  - outcomes, for which no client waits, are delayed a few milliseconds to be committed together with a message.

When it fails:
  - bodies can't be written or synced: no new message of the group is accepted; outcomes are committed without them;
  - the transaction fails: nothing of the group is accepted, the environment is opened again, outcomes are tried again
    (in groups of ten) until they are committed. Meanwhile `stalled` is set and delivery pauses, because a message that
    can't be deleted would be sent twice;
  - a task raises: all of it is undone, and the rest of the group is committed;
  - an outcome contradicts the store (its message has left the queue): it alone is refused (`Outcome.refused`).
"""

import asyncio
import os
import queue as queues
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import msgspec

from relaymta.errors import StoreError, StoreFull, store_error
from relaymta.proto.dsn import failure_dsn
from relaymta.proto.envelope import (
    ATTEMPTS_KEPT,
    DELIVERED,
    DSN,
    FAILED,
    HELD,
    PENDING,
    PERMANENT,
    SMTPUTF8,
    SUCCESS,
    Body,
    Envelope,
    Placement,
    QueueName,
    RecipientState,
)
from relaymta.proto.header import header_end
from relaymta.queue.clock import QueueClock, wall_ms
from relaymta.queue.entry import Entry, Move, Outcome, Put
from relaymta.queue.ident import IdSource, format_id
from relaymta.queue.segments import COLD, HOT, BigBody, Segments
from relaymta.queue.store import Change, Store

__all__ = ["Committed", "Task", "Writer"]

GROUP_LIMIT = 1000
# Pairs of runs side by side, 50 clients with 4 kB: 178 us of CPU a message without, 162 with gathering (5,600 and 6,000
# messages a second); 200 kB: 609 without, 565 us with delayed outcomes alone, 540 with both.
GATHER_LEAST, GATHER_MOST = 4, 64
GATHER_SECONDS = 0.001
OUTCOMES_SECONDS = 0.003
SMALL_GROUP = 10  # deletes at a full map: larger groups fail
T = TypeVar("T")
Assign = Callable[[Envelope, int], list[tuple[QueueName, list[int] | None]]]


class Task:
    """A change by an operator or the queue itself: `run(change)` on the writer thread, all of it or nothing, then `done(task)` on
    the loop. `error`: why it was undone; `mistake`: file and line where `run` raised it ("": the commit failed)."""

    __slots__ = ("done", "error", "mistake", "result", "run")

    def __init__(self, run: Callable[[Change], Any], done: "Callable[[Task], None] | None" = None) -> None:
        self.run = run
        self.done = done
        self.result: Any = None
        self.error: Exception | None = None
        self.mistake = ""


class Committed:
    """The operations of one group, with their results; passed to `on_commit`."""

    __slots__ = ("moves", "outcomes", "puts", "syncs", "tasks")

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.puts: list[Put] = []
        self.outcomes = outcomes
        self.tasks: list[Task] = []
        self.moves: list[Move] = []
        self.syncs = 0


Operation = Put | Outcome | Task | Move


def _refuse(operations: "list[Put | Move | Task]", error: StoreError | None) -> None:
    for operation in operations:
        operation.error = error


class Writer:
    """Owns the store's write side. `submit`, `task` and `close` are called on the loop, and so is `on_commit(Committed)`.

    `assign(envelope, attempts)`: the queues of a DSN's recipient. `hostname`: the reporting MTA of DSNs. `sign(data)`: header
    fields to prepend to a DSN's message data.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: Store,
        segments: Segments,
        clock: QueueClock,
        ids: IdSource,
        *,
        hostname: str,
        max_age_ms: int,
        ballast: Path,
        assign: Assign,
        on_commit: Callable[[Committed], None],
        sign: Callable[[bytes], bytes] = lambda data: b"",
    ) -> None:
        self._loop = loop
        self._store = store
        self._segments = segments
        self._clock = clock
        self._ids = ids
        self._hostname = hostname
        self._max_age_ms = max_age_ms
        self._ballast = ballast
        self._assign = assign
        self._on_commit = on_commit
        self._sign = sign
        self._pending: list[Operation] = []
        self._awaited = 0  # how many of them are no outcomes, so that a caller waits for them
        self._busy = False  # a group is under way, or about to begin
        self._timer: asyncio.TimerHandle | None = None  # when outcomes that came alone are committed
        self._inbox: queues.SimpleQueue[list[Operation] | None] = queues.SimpleQueue()
        self.stalled = False
        self.last_error = ""
        self._freed: list[tuple[int, Body]] = []  # bodies whose messages end in the group under way
        self._contradicted = False  # the last transaction failed because an operation contradicts the store, not by the disk
        self._thread = threading.Thread(target=self._run, name="queue-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        """Add an operation to the next group."""
        self._pending.append(operation)
        awaited = type(operation) is not Outcome
        self._awaited += awaited
        if self._busy:
            return
        if awaited:
            self._busy = True
            # At the end of this loop iteration, so that all that it submits is in one group.
            self._loop.call_soon(self._hand_over)
        else:
            self._delay_outcomes()

    def _delay_outcomes(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(OUTCOMES_SECONDS, self._waited)

    def _waited(self) -> None:
        self._timer = None
        if self._pending and not self._busy:
            self._busy = True
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the pending operations, at most GROUP_LIMIT, to the thread as one group."""
        if len(self._pending) <= GROUP_LIMIT:
            batch, self._pending, self._awaited = self._pending, [], 0
        else:
            batch, self._pending = self._pending[:GROUP_LIMIT], self._pending[GROUP_LIMIT:]
            self._awaited = sum(type(operation) is not Outcome for operation in self._pending)
        self._inbox.put(batch)

    def _posted(self, committed: Committed) -> None:
        """On the loop, after a group: report it, then begin the next one."""
        try:
            self._on_commit(committed)
        finally:  # an exception there must not stop the commits
            if not self._awaited:
                self._busy = False
                if self._pending:
                    self._delay_outcomes()
            elif GATHER_LEAST <= len(self._pending) < GATHER_MOST:
                self._loop.call_later(GATHER_SECONDS, self._hand_over)
            else:
                self._hand_over()

    async def task(self, run: Callable[[Change], T]) -> T:
        """Run `run(change)` in a group and return its result once that is durable. Raises what `run` raised, or StoreError when
        the commit failed."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(task: Task) -> None:
            if not future.done():
                if task.error is not None:
                    future.set_exception(task.error)
                else:
                    future.set_result(task.result)

        self.submit(Task(run, done))
        return await future

    async def close(self) -> None:
        """Commit what is pending, then end the thread."""
        while (self._busy or self._pending) and self._thread.is_alive():
            await asyncio.sleep(0.01)
        self._inbox.put(None)
        await self._loop.run_in_executor(None, self._thread.join)

    # The thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:  # a defect: nothing can be stored without this thread, so let the supervisor start another worker
            traceback.print_exc()
            os._exit(70)

    def _serve(self) -> None:
        while (batch := self._inbox.get()) is not None:
            committed = Committed([])
            for operation in batch:
                if type(operation) is Put:
                    committed.puts.append(operation)
                elif type(operation) is Outcome:
                    committed.outcomes.append(operation)
                elif type(operation) is Task:
                    committed.tasks.append(operation)
                else:
                    committed.moves.append(operation)  # type: ignore[arg-type]
            self._commit(committed)
            self._loop.call_soon_threadsafe(self._posted, committed)

    def _commit(self, group: Committed) -> None:
        """Write one group; what fails of it has its `error` set when this returns."""
        puts = group.puts
        for outcome in group.outcomes:
            if not outcome.success:
                self._plan(outcome)
        moves = group.moves
        error = self._write_bodies(group, puts, moves)
        if error is not None:
            _refuse([*puts, *moves], error)
            puts, moves = [], []
            error = self._write_bodies(group, puts, moves)
        if error is None:
            error = self._transact(puts, group.outcomes, group.tasks, moves)
            if error is None:
                self.stalled = False
                return
        _refuse([*puts, *moves, *group.tasks], error)
        self._insist(group)

    def _insist(self, group: Committed) -> None:
        """Commit outcomes whose group failed: in small groups, again and again, on a full disk with the room of the ballast."""
        left = group.outcomes
        if not left:
            return
        self.stalled = True
        most = SMALL_GROUP
        while left:
            part = left[:most]
            for outcome in part:
                outcome.moved = None  # no copies: they need room
            self._contradicted = False
            error = self._write_bodies(Committed(part), [], [])
            if error is None:
                error = self._transact([], part, [], [])
            if error is None:
                left, most = left[len(part) :], SMALL_GROUP
            elif not self._contradicted:
                self._ballast.unlink(missing_ok=True)
                time.sleep(0.2)
            elif len(part) > 1:
                most = 1  # one of them contradicts the store: find it
            else:
                part[0].refused = str(error)
                left, most = left[1:], SMALL_GROUP
        self.stalled = False

    def _write_bodies(self, group: Committed, puts: list[Put], moves: list[Move]) -> StoreError | None:
        """Append and sync the bodies of `puts`, of the outcomes' DSNs, and of those that move to cold segments."""
        segments = self._segments
        try:
            for put in puts:
                if put.data is not None:
                    envelope = put.envelope
                    envelope.body = segments.append(put.ident, put.data, envelope.size, HOT)
            for outcome in group.outcomes:
                if outcome.dsn is not None:
                    self._place_dsn(outcome.dsn)
                if outcome.moved is not None:
                    self._move(outcome)
            for move in moves:
                move.body = segments.append(move.ident, [move.data], move.was.length, COLD)
            segments.write()
            group.syncs += segments.sync()
        except (OSError, StoreError) as failure:
            segments.forget()
            return self._explain(failure)
        return None

    def _place_dsn(self, dsn: Put) -> None:
        """Write a DSN's body; that of a DSN about very many recipients is a large one."""
        segments, data, size = self._segments, dsn.data or [], dsn.envelope.size
        if size <= segments.big_limit:
            dsn.envelope.body = segments.append(dsn.ident, data, size, HOT)
            return
        path = segments.big_path(dsn.ident)
        path.unlink(missing_ok=True)  # of a group that failed
        file = BigBody(path, dsn.ident)
        try:
            file.write(data)
            dsn.envelope.body = file.finish([])
        except BaseException:
            file.discard()
            raise

    def _transact(self, puts: list[Put], outcomes: list[Outcome], tasks: list[Task], moves: list[Move]) -> StoreError | None:
        """Commit these operations in one LMDB transaction; the error when it failed (then nothing of them is committed)."""
        change = None
        segments = self._segments
        try:
            change = self._store.change()
            now = self._clock.now()
            self._inline(change, [put for put in puts if put.fresh], now)
            for put in puts:
                if not put.fresh:
                    self._put(change, put, now)
            for outcome in outcomes:
                self._finish(change, outcome, now)
            for task in tasks:
                self._run_task(change, task)
            for move in moves:
                self._relocate(change, move)
            for _, body in self._freed:
                if body.segment:
                    segments.release(body)
            doomed = segments.doomed()
            for number in doomed:
                change.drop_segment(number)
            for number, row in segments.rows():
                change.segment(number, row)
            change.finish(now)
        except (lmdb.Error, StoreError, OSError) as failure:
            self._freed.clear()
            segments.forget()
            if change is not None:
                change.abort()
            self._contradicted = isinstance(failure, StoreError)
            self._reopen(failure)
            return self._explain(failure)
        segments.unlink()
        segments.settle()
        for ident, body in self._freed:
            if not body.segment:
                segments.big_path(ident).unlink(missing_ok=True)
        self._freed.clear()
        return None

    def _reopen(self, failure: Exception) -> None:
        """Open LMDB again after a failed write, which may leave its state in memory wrong (MapFullError does not)."""
        if isinstance(failure, lmdb.MapFullError):
            return
        while True:
            try:
                self._store.reopen()
                return
            except (lmdb.Error, OSError) as error:
                self.last_error = str(error)
                self.stalled = True
                time.sleep(0.5)

    def _explain(self, failure: Exception) -> StoreError:
        self.last_error = str(failure)
        return StoreFull(str(failure)) if isinstance(failure, lmdb.MapFullError) else store_error(failure)

    def _inline(self, change: Change, puts: list[Put], now: int) -> None:
        """Add messages that are delivered at once."""
        for put in puts:
            put.envelope.placements = [Placement(change.row(put.names[0][0]).number, now)]
        if puts:
            change.inline([(put.ident, put.envelope) for put in puts], now)

    def _put(self, change: Change, put: Put, now: int) -> None:
        """Add a message with rows of its own, due now or held."""
        envelope = put.envelope
        if envelope.flags & HELD:  # held on arrival: `hold` needs the rows of a message that is not held
            envelope.flags &= ~HELD
            self._put(change, put, now)
            change.hold(put.ident, envelope)
            return
        if len(put.names) == 1:
            row = change.row(put.names[0][0])
            envelope.placements = [Placement(row.number, now)]
            change.put(put.ident, envelope, [row])
            return
        rows = [change.row(name) for name, _ in put.names]
        envelope.placements = [Placement(row.number, now, 0, indexes) for row, (_, indexes) in zip(rows, put.names, strict=True)]
        change.put(put.ident, envelope, rows)

    def _relocate(self, change: Change, move: Move) -> None:
        """Point a message's row at the copy of its body; when it ended or its body moved meanwhile, the copy is dropped."""
        change.materialize(move.ident)
        envelope = self._store.envelope(change.txn, move.ident)
        assert move.body is not None
        if envelope is None or envelope.body != move.was:
            self._segments.release(move.body)
            move.body = None
            return
        self._segments.release(move.was)
        envelope.body = move.body
        change.replace(move.ident, envelope)
        move.queues = [placement.queue for placement in envelope.placements]

    def _run_task(self, change: Change, task: Task) -> None:
        freed = len(self._freed)
        change.begin_part()
        try:
            task.result = task.run(change)
        except (lmdb.Error, OSError):
            raise
        except Exception as error:  # a defect in `run` fails the task, not the group
            change.undo_part()
            del self._freed[freed:]
            where = traceback.extract_tb(error.__traceback__)[-1]
            task.error, task.mistake = error, f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        else:
            change.keep_part()

    # Outcomes

    def _plan(self, outcome: Outcome) -> None:
        """Before the group is written: make an outcome's DSN, and plan the copy of a deferred body to a cold segment."""
        entry = outcome.entry
        envelope = entry.envelope
        deferred = any(a.kind not in (SUCCESS, PERMANENT) for a in outcome.results.values())
        body = envelope.body
        if deferred and entry.attempts == 0 and entry.sole and body is not None and body.segment:
            outcome.moved = body
        if outcome.failed and envelope.sender and outcome.dsn is None:
            outcome.dsn = self._any_dsn(entry, outcome.failed)

    def _data(self, entry: Entry) -> list[bytes]:
        """An entry's message data, from memory or disk. StoreError when it cannot be read."""
        if entry.data is not None:
            return entry.data
        body = entry.envelope.body
        if body is None:
            raise StoreError(f"message {format_id(entry.ident)} has no body")
        return [self._segments.read(entry.ident, body)]

    def _move(self, outcome: Outcome) -> None:
        """Stage a copy of a deferred message's body in a cold segment, so that its hot segment is freed. A body that cannot be
        read stays where it is: the group does not fail because of it."""
        envelope = outcome.entry.envelope
        try:
            data = self._data(outcome.entry)
        except StoreError:
            outcome.moved = None
            return
        outcome.moved = self._segments.append(outcome.entry.ident, data, envelope.size, COLD)

    def _any_dsn(self, entry: Entry, failed: list[tuple[str, Any, bool]]) -> Put | None:
        """The DSN about `failed` recipients; a plain one when an exception is raised while the original header is handled or the
        DSN is signed. A defect there must not end the thread each time it starts, and stop all mail."""
        for plain in (False, True):
            try:
                return self._dsn(entry, failed, plain)
            except Exception:
                traceback.print_exc()
        return None  # the event `bounced` is logged without a DSN

    def _dsn(self, entry: Entry, failed: list[tuple[str, Any, bool]], plain: bool) -> Put:
        """Make the DSN about `failed` recipients. `plain`: without the original header and without signatures."""
        envelope = entry.envelope
        header = b""
        if not plain:
            try:
                start = b"".join(self._data(entry))[: 128 * 1024]
                header = start[: header_end(start)]
            except StoreError:
                pass
        ident = self._ids.next()
        data = failure_dsn(
            envelope,
            failed,
            header,
            hostname=self._hostname,
            ident=format_id(ident),
            original_ident=format_id(entry.ident),
            seconds=wall_ms() // 1000,
        )
        data = data if plain else self._sign(data) + data
        dsn = Envelope(
            sender="",
            recipients=[envelope.sender],
            size=len(data),
            flags=DSN | (envelope.flags & SMTPUTF8),
            arrived=wall_ms(),
            deadline=self._clock.now() + self._max_age_ms,
            application=envelope.application,
        )
        return Put(ident, dsn, self._assign(dsn, 0), [data], None)

    def _finish(self, change: Change, outcome: Outcome, now: int) -> None:
        """Record an outcome; its message is removed when no recipient is pending in any queue."""
        entry = outcome.entry
        if outcome.success and entry.sole:
            histories = entry.attempts > 0 or entry.indexes is not None  # of recipients in other queues, too
            if change.end_inlined(entry.ident) or change.finish_message(entry.ident, entry.envelope, histories):
                self.free_body(entry.ident, entry.envelope.body)
            else:
                self._ended_before(outcome)
            return
        change.materialize(entry.ident)
        envelope = self._store.envelope(change.txn, entry.ident)
        placement = None if envelope is None else next((p for p in envelope.placements if p.queue == entry.queue), None)
        if envelope is None or placement is None:
            self._ended_before(outcome)
            return
        envelope = msgspec.structs.replace(envelope)
        envelope.route = envelope.route or entry.envelope.route
        pending = self._record(change, outcome)
        change.unplace(entry.ident, envelope, placement)
        others = [p for p in envelope.placements if p is not placement]
        joined = sorted(set(placement.indexes or []) - {index for index, _ in entry.recipients})
        if joined:  # while these were in flight, other recipients of the message were deferred to their queue
            left = Placement(placement.queue, placement.due, placement.attempts, joined)
            self._wait(change, entry.ident, envelope, others, left)
        if pending:
            row = change.row(outcome.name or entry.name)
            again = Placement(row.number, max(outcome.retry_at, now), entry.attempts + 1, pending)
            self._wait(change, entry.ident, envelope, others, again)
        envelope.placements = others
        if not others:
            change.finish_message(entry.ident, envelope, histories=True)
            self.free_body(entry.ident, envelope.body)
        else:
            if outcome.moved is not None and envelope.body is not None and outcome.moved != envelope.body:
                self._segments.release(envelope.body)
                envelope.body = outcome.moved
            change.replace(entry.ident, envelope)
        if outcome.dsn is not None:
            self._put(change, outcome.dsn, now)

    def _ended_before(self, outcome: Outcome) -> None:
        """Refuse an outcome whose message has left the queue: it changes nothing, and the bodies written for it are freed."""
        outcome.refused, outcome.gone = "the message had left the queue before", True
        if outcome.dsn is not None:
            self.free_body(outcome.dsn.ident, outcome.dsn.envelope.body)
            outcome.dsn = None
        if outcome.moved is not None:
            self.free_body(outcome.entry.ident, outcome.moved)
            outcome.moved = None

    def _wait(self, change: Change, ident: int, envelope: Envelope, places: list[Placement], new: Placement) -> None:
        """Add the placement `new` to `places` and to its queue. When the message has one in that queue already, they are joined,
        due at the later time of the two."""
        same = next((place for place in places if place.queue == new.queue), None)
        if same is not None:
            change.unplace(ident, envelope, same)
            places.remove(same)
            new.indexes = sorted({*(new.indexes or []), *(same.indexes or [])})
            new.due = max(new.due, same.due)
        places.append(new)
        change.place(ident, envelope, new)

    def _record(self, change: Change, outcome: Outcome) -> list[int]:
        """Write the states of the entry's recipients; the indexes of those still pending."""
        entry = outcome.entry
        states = self._store.recipient_states(change.txn, entry.ident) if entry.attempts else {}
        pending = []
        for index, _ in entry.recipients:
            state = states.get(index) or RecipientState()
            attempt = outcome.results.get(index)
            if attempt is not None:
                state.attempts = [*state.attempts, attempt][-ATTEMPTS_KEPT:]
                state.state = {SUCCESS: DELIVERED, PERMANENT: FAILED}.get(attempt.kind, PENDING)
            elif outcome.success:
                state.state = DELIVERED
            change.set_recipient(entry.ident, index, state)
            if state.state == PENDING:
                pending.append(index)
        return pending

    def free_body(self, ident: int, body: Body | None) -> None:
        """Free a body in the group under way, in which its message ends."""
        if body is not None:
            self._freed.append((ident, body))
