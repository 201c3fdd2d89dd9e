"""The group commit: one thread that makes all pending operations durable together, then posts the results to the loop.

A group is: bodies appended to segments and synced, then one LMDB transaction with everything else. Invariant: nothing in it is
acknowledged before both have returned. What is submitted meanwhile is in the next group. A single operation never waits: when no
group is under way it is committed at the end of the loop's iteration. But a group costs as much CPU as several messages, so
  - behind a group of several, the next one is delayed a little, until as many have come again: who has been answered goes on;
  - operations that nobody waits for are delayed a few milliseconds to be committed together with one that somebody does.

This is the skeleton; a store derives its writer from it, and says what its operations do and what becomes of them when a group
fails. After a failed transaction the environment is opened again. A task that raises is undone alone.
"""

import asyncio
import os
import queue as queues
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import lmdb

from relaymta.disk.clock import ShardClock
from relaymta.disk.environment import Environment
from relaymta.disk.operations import Group, Move, Task
from relaymta.disk.segments import COLD, Segments
from relaymta.disk.transaction import Transaction
from relaymta.errors import StoreError, StoreFull, store_error

__all__ = ["GroupWriter"]

GROUP_LIMIT = 1000
# Pairs of runs side by side, 50 clients with 4 kB: 178 us of CPU a message without, 162 with gathering (5,600 and 6,000
# messages a second); 200 kB: 609 without, 565 us with delayed outcomes alone, 540 with both.
GATHER_LEAST, GATHER_MOST = 4, 64
GATHER_SECONDS = 0.001
EXPECTED_SECONDS = 0.002  # behind a group, for which those who have been answered are expected to go on
UNAWAITED_SECONDS = 0.003


O = TypeVar("O")  # noqa: E741  an operation
G = TypeVar("G", bound=Group)
C = TypeVar("C", bound=Transaction)
T = TypeVar("T")


class GroupWriter(Generic[O, G, C]):
    """Owns a store's write side. `submit`, `task` and `close` are called on the loop, and so is `on_commit(group)`; `_commit` and
    what it calls run on the thread.

    `begin()`: a new transaction. `unawaited`: the type of operations that nobody waits for. `stalled`: what has to be recorded
    cannot be; `last_error`: why."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        environment: Environment,
        segments: Segments,
        clock: ShardClock,
        *,
        begin: Callable[[], C],
        on_commit: Callable[[G], None],
        unawaited: type[Any],
        name: str,
    ) -> None:
        self._loop = loop
        self._environment = environment
        self._segments = segments
        self._clock = clock
        self._begin = begin
        self._on_commit = on_commit
        self._unawaited = unawaited
        self._pending: list[O] = []
        self._awaited = 0  # how many of them a caller waits for
        self._busy = False  # a group is under way, or about to begin
        self._under_way = 0  # how many a caller waits for in the group that is under way, or was last
        self._expected = 0  # how many will be pending soon, when those who have been answered by it go on,
        self._expected_until = 0.0  # and until when (loop time)
        self._gathering: asyncio.TimerHandle | None = None  # when the next group begins without them
        self._timer: asyncio.TimerHandle | None = None  # when operations that nobody waits for and that came alone are committed
        self._inbox: queues.SimpleQueue[list[O] | None] = queues.SimpleQueue()
        self.stalled = False
        self.last_error = ""
        self._contradicted = False  # the last transaction failed because an operation contradicts the store, not by the disk
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, operation: O) -> None:
        """Add an operation to the next group."""
        self._pending.append(operation)
        awaited = type(operation) is not self._unawaited
        self._awaited += awaited
        if self._busy:
            if self._gathering is not None and self._awaited >= self._expected:
                self._gathering.cancel()
                self._begin_soon()
        elif awaited:
            self._gather()
        else:
            self._delay_unawaited()

    def _gather(self) -> None:
        """Begin the next group: now, or when those are there who are expected."""
        self._busy = True
        if self._expected >= GATHER_LEAST and self._awaited < self._expected and self._loop.time() < self._expected_until:
            self._gathering = self._loop.call_later(GATHER_SECONDS, self._begin_soon)
        else:
            self._begin_soon()

    def _begin_soon(self) -> None:
        """At the end of this loop iteration, so that all that it submits is in one group."""
        self._gathering = None
        self._loop.call_soon(self._hand_over)

    def _delay_unawaited(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(UNAWAITED_SECONDS, self._waited)

    def _waited(self) -> None:
        self._timer = None
        if self._pending and not self._busy:
            self._busy = True
            self._hand_over()

    def _hand_over(self) -> None:
        """Give the pending operations, at most GROUP_LIMIT, to the thread as one group."""
        self._under_way = self._awaited
        if len(self._pending) <= GROUP_LIMIT:
            batch, self._pending, self._awaited = self._pending, [], 0
        else:
            batch, self._pending = self._pending[:GROUP_LIMIT], self._pending[GROUP_LIMIT:]
            self._awaited = sum(type(operation) is not self._unawaited for operation in self._pending)
        self._inbox.put(batch)

    def _posted(self, group: G) -> None:
        """On the loop, after a group: report it, then begin the next one."""
        self._expected = min(self._under_way + self._awaited, GATHER_MOST)
        self._expected_until = self._loop.time() + EXPECTED_SECONDS
        try:
            self._on_commit(group)
        finally:  # an exception there must not stop the commits
            if self._awaited:
                self._gather()
            else:
                self._busy = False
                if self._pending:
                    self._delay_unawaited()

    async def task(self, run: Callable[[C], T], kind: Callable[..., Task] = Task) -> T:
        """Run `run(transaction)` in a group and return its result once that is durable. Raises what `run` raised, or StoreError
        when the commit failed. `kind`: of a task that the store has."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(task: Task) -> None:
            if not future.done():
                if task.error is not None:
                    future.set_exception(task.error)
                else:
                    future.set_result(task.result)

        self.submit(kind(run, done))  # type: ignore[arg-type]  # every store's operations include Task
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
            while (batch := self._inbox.get()) is not None:
                began = time.monotonic()
                group = self._commit(batch)
                group.seconds = time.monotonic() - began
                self._loop.call_soon_threadsafe(self._posted, group)
        except BaseException:  # a defect: nothing can be stored without this thread, so let the supervisor start another worker
            traceback.print_exc()
            os._exit(70)

    def _commit(self, batch: list[O]) -> G:
        """Write one group; what fails of it has its `error` set when this returns."""
        raise NotImplementedError

    def _append(self, group: Group, stage: Callable[[], None], moves: list[Move]) -> StoreError | None:
        """Write and sync the bodies that `stage()` appends to segments, and the copies of `moves`; the error when they could not
        be (then none of them may be committed)."""
        try:
            stage()
            for move in moves:
                move.body = self._segments.append(move.ident, [move.data], move.was.length, COLD)
            self._segments.write()
            group.syncs += self._segments.sync()
        except (OSError, StoreError) as failure:
            self._segments.forget()
            return self._explain(failure)
        return None

    def _transact(self, fill: Callable[[C, int], None]) -> StoreError | None:
        """Commit one LMDB transaction: what `fill(transaction, now)` writes into it, and the rows of the segments that the group
        has changed. The error when it failed: then nothing of it is committed, and the environment has been opened again."""
        change = None
        segments = self._segments
        try:
            change = self._begin()
            now = self._clock.now()
            fill(change, now)
            for number in segments.doomed():
                change.drop_segment(number)
            for number, row in segments.rows():
                change.segment(number, row)
            change.finish(now)
        except (lmdb.Error, StoreError, OSError) as failure:
            segments.forget()
            if change is not None:
                change.abort()
            self._contradicted = isinstance(failure, StoreError)
            self._reopen(failure)
            return self._explain(failure)
        segments.unlink()
        segments.settle()
        return None

    def _reopen(self, failure: Exception) -> None:
        """Open LMDB again after a failed write, which may leave its state in memory wrong (MapFullError does not)."""
        if isinstance(failure, lmdb.MapFullError):
            return
        while True:
            try:
                self._environment.reopen()
                return
            except (lmdb.Error, OSError) as error:
                self.last_error = str(error)
                self.stalled = True
                time.sleep(0.5)

    def _explain(self, failure: Exception) -> StoreError:
        self.last_error = str(failure)
        full = isinstance(failure, lmdb.MapFullError) or (isinstance(failure, lmdb.Error) and self._environment.is_cramped())
        return StoreFull(str(failure)) if full else store_error(failure)

    def _run_task(self, change: C, task: Task) -> None:
        """Run a task; when it raises, undo what it has written, and go on with the group."""

        def run() -> None:
            task.result = task.run(change)

        error = self._attempt(change, run)
        if error is not None:
            where = traceback.extract_tb(error.__traceback__)[-1]
            task.error, task.mistake = error, f"{where.filename.rpartition('/')[2]}:{where.lineno}"

    @staticmethod
    def _attempt(change: C, run: Callable[[], None]) -> Exception | None:
        """Do something as a part of a transaction, which is undone when `run` raises; what that was, a defect as a rule: it
        fails this part, not the group. What the disk or LMDB refuses is raised."""
        change.begin_part()
        try:
            run()
            change.settle()  # what cannot be written fails here
        except (lmdb.Error, OSError):
            raise
        except Exception as error:
            change.undo_part()
            return error
        change.keep_part()
        return None
