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
from typing import TypeVar

import lmdb

from relaymta.errors import StoreError, StoreFull, store_error
from relaymta.proto.envelope import (
    Body,
    Placement,
)
from relaymta.queue.change import Change
from relaymta.queue.clock import QueueClock
from relaymta.queue.dsns import Dsns
from relaymta.queue.entry import Move, Outcome, Put
from relaymta.queue.group import Assign, Committed, Operation, Task
from relaymta.queue.ident import IdSource
from relaymta.queue.outcomes import Outcomes, put_rows
from relaymta.queue.segments import COLD, HOT, Segments
from relaymta.queue.store import Store

__all__ = ["Writer"]

GROUP_LIMIT = 1000
# Pairs of runs side by side, 50 clients with 4 kB: 178 us of CPU a message without, 162 with gathering (5,600 and 6,000
# messages a second); 200 kB: 609 without, 565 us with delayed outcomes alone, 540 with both.
GATHER_LEAST, GATHER_MOST = 4, 64
GATHER_SECONDS = 0.001
OUTCOMES_SECONDS = 0.003
SMALL_GROUP = 10  # deletes at a full map: larger groups fail
RETRY_SECONDS, RETRY_MOST = 0.2, 3.0  # between two attempts to commit outcomes: each writes the bodies of their DSNs again
T = TypeVar("T")


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
        self._ballast = ballast
        self._on_commit = on_commit
        self.dsns = Dsns(segments, clock, ids, hostname, max_age_ms, assign, sign)
        self._outcomes = Outcomes(store, segments, self.dsns)
        self._pending: list[Operation] = []
        self._awaited = 0  # how many of them are no outcomes, so that a caller waits for them
        self._busy = False  # a group is under way, or about to begin
        self._timer: asyncio.TimerHandle | None = None  # when outcomes that came alone are committed
        self._inbox: queues.SimpleQueue[list[Operation] | None] = queues.SimpleQueue()
        self.stalled = False
        self.last_error = ""
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
        self._try(group)
        for put in group.puts:
            if put.error is not None and put.data is None:  # its file has no message, and the client is told to try again
                self._segments.big_path(put.ident).unlink(missing_ok=True)

    def _try(self, group: Committed) -> None:
        puts = group.puts
        for outcome in group.outcomes:
            if not outcome.success:
                self._outcomes.plan(outcome)
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
        self.stalled = bool(left)  # else `_reopen` may have set it, and no group would come that ends it
        most, pause = SMALL_GROUP, RETRY_SECONDS
        while left:
            part = left[:most]
            for outcome in part:
                outcome.moved = None  # no copies: they need room
            self._contradicted = False
            error = self._write_bodies(Committed(part), [], [])
            if error is None:
                error = self._transact([], part, [], [])
            if error is None:
                left, most, pause = left[len(part) :], SMALL_GROUP, RETRY_SECONDS
            elif not self._contradicted:
                self._ballast.unlink(missing_ok=True)
                time.sleep(pause)
                pause = min(2 * pause, RETRY_MOST)
            elif len(part) > 1:
                most = 1  # one of them contradicts the store: find it
            else:
                part[0].refused = str(error)
                self._outcomes.discard_dsn(part[0])
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
                if outcome.dsn is not None or outcome.moved is not None:
                    self._outcomes.write(outcome)
            for move in moves:
                move.body = segments.append(move.ident, [move.data], move.was.length, COLD)
            segments.write()
            group.syncs += segments.sync()
        except (OSError, StoreError) as failure:
            segments.forget()
            return self._explain(failure)
        return None

    def _transact(self, puts: list[Put], outcomes: list[Outcome], tasks: list[Task], moves: list[Move]) -> StoreError | None:
        """Commit these operations in one LMDB transaction; the error when it failed (then nothing of them is committed)."""
        change = None
        segments = self._segments
        try:
            change = Change(self._store)
            now = self._clock.now()
            self._inline(change, [put for put in puts if put.fresh], now)
            for put in puts:
                if not put.fresh:
                    put_rows(change, put, now)
            for outcome in outcomes:
                self._outcomes.record(change, outcome, now)
            for task in tasks:
                self._run_task(change, task)
            for move in moves:
                self._relocate(change, move)
            for _, body in self._outcomes.freed:
                if body.segment:
                    segments.release(body)
            doomed = segments.doomed()
            for number in doomed:
                change.drop_segment(number)
            for number, row in segments.rows():
                change.segment(number, row)
            change.finish(now)
        except (lmdb.Error, StoreError, OSError) as failure:
            self._outcomes.freed.clear()
            segments.forget()
            if change is not None:
                change.abort()
            self._contradicted = isinstance(failure, StoreError)
            self._reopen(failure)
            return self._explain(failure)
        segments.unlink()
        segments.settle()
        for ident, body in self._outcomes.freed:
            if not body.segment:
                segments.big_path(ident).unlink(missing_ok=True)
        self._outcomes.freed.clear()
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

    def _relocate(self, change: Change, move: Move) -> None:
        """Point a message's row at the copy of its body; when it ended or its body moved meanwhile, the copy is dropped."""
        change.materialize(move.ident)
        envelope = change.envelope(move.ident)
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
        freed = len(self._outcomes.freed)
        change.begin_part()
        try:
            task.result = task.run(change)
        except (lmdb.Error, OSError):
            raise
        except Exception as error:  # a defect in `run` fails the task, not the group
            change.undo_part()
            del self._outcomes.freed[freed:]
            where = traceback.extract_tb(error.__traceback__)[-1]
            task.error, task.mistake = error, f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        else:
            change.keep_part()

    def free_body(self, ident: int, body: Body | None) -> None:
        """Free a body in the group under way, in which its message ends."""
        self._outcomes.free_body(ident, body)
