"""The group commit: one thread that makes everything durable that has piled up, then posts the results back.

A group is: bodies appended to segments and synced, then one LMDB transaction with everything else (new messages,
outcomes with their DSNs, operators' changes). Nothing in it is acknowledged before both have returned. What arrives
meanwhile rides in the next group. Whoever comes alone never waits: a message that finds no group under way is committed at
once. But a group costs as much as several messages, so
  - behind a group, when some but not many have piled up, a moment is waited for more;
  - outcomes, for which nobody waits, stay for a few milliseconds for a message to ride with.

When it fails:
  - bodies can't be written or synced: no new message of the group is accepted; outcomes are committed without them;
  - the transaction fails: nothing of the group is accepted, the environment is opened again, outcomes are tried again
    (in groups of ten when the map is full) until they are in. Meanwhile `stalled` is set and delivery pauses, because a
    message that can't be deleted would be sent twice;
  - a task raises: it is undone as a whole, and the rest of the group goes on;
  - an outcome contradicts what the store holds (its message has ended): it alone is refused, and said so.
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
from relaymta.proto.dsn import failure_notice
from relaymta.proto.envelope import (
    ATTEMPTS_KEPT,
    DELIVERED,
    FAILED,
    HELD,
    NOTICE,
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
# Pairs of runs side by side, 50 clients with 4 kB: 178 us of CPU a message without, 162 with the gathering (5,600 and 6,000
# messages a second); 200 kB: 609 and 565 us with the outcomes' waiting alone, 540 with both.
GATHER_LEAST, GATHER_MOST = 4, 64
GATHER_SECONDS = 0.001
OUTCOMES_SECONDS = 0.003
SMALL_GROUP = 10  # deletes at a full map: larger groups fail
T = TypeVar("T")
Assign = Callable[[Envelope, int], list[tuple[QueueName, list[int] | None]]]


class Task:
    """A change by an operator or the queue itself: `run(change)` on the writer thread, all of it or nothing, then `done(task)` on
    the loop. `error`: why nothing of it happened; `mistake`: where, when it was not the disk's doing."""

    __slots__ = ("done", "error", "mistake", "result", "run")

    def __init__(self, run: Callable[[Change], Any], done: "Callable[[Task], None] | None" = None) -> None:
        self.run = run
        self.done = done
        self.result: Any = None
        self.error: Exception | None = None
        self.mistake = ""


class Committed:
    """What one group came to; handed to the loop."""

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
    """Owns the store's write side. `submit` and `flush` are called on the loop; `on_commit(Committed)` is called there.

    `assign(envelope, attempts)`: the queues of a notice's recipient. `hostname` names us in notices. `sign(text)`: fields that
    go in front of a notice.
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
        sign: Callable[[bytes], bytes] = lambda text: b"",
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
        self._awaited = 0  # of them: no outcomes, so somebody waits for them
        self._busy = False  # a group is under way, or about to be
        self._timer: asyncio.TimerHandle | None = None  # at which outcomes have waited long enough
        self._inbox: queues.SimpleQueue[list[Operation] | None] = queues.SimpleQueue()
        self.stalled = False
        self.last_error = ""
        self._freed: list[tuple[int, Body]] = []  # bodies whose messages end in the group under way
        self._contradicted = False  # the last transaction failed by what an outcome or move said, not by the disk
        self._thread = threading.Thread(target=self._run, name="queue-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        """Let an operation ride in the next group."""
        self._pending.append(operation)
        awaited = type(operation) is not Outcome
        self._awaited += awaited
        if self._busy:
            return
        if awaited:
            self._busy = True
            # At the end of this loop iteration, so that all that this iteration reads rides together.
            self._loop.call_soon(self._hand_over)
        else:
            self._wait_for_company()

    def _wait_for_company(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(OUTCOMES_SECONDS, self._waited)

    def _waited(self) -> None:
        self._timer = None
        if self._pending and not self._busy:
            self._busy = True
            self._hand_over()

    def _hand_over(self) -> None:
        if len(self._pending) <= GROUP_LIMIT:
            batch, self._pending, self._awaited = self._pending, [], 0
        else:
            batch, self._pending = self._pending[:GROUP_LIMIT], self._pending[GROUP_LIMIT:]
            self._awaited = sum(type(operation) is not Outcome for operation in self._pending)
        self._inbox.put(batch)

    def _posted(self, committed: Committed) -> None:
        try:
            self._on_commit(committed)
        finally:  # whatever goes wrong there, commits go on
            if not self._awaited:
                self._busy = False
                if self._pending:
                    self._wait_for_company()
            elif GATHER_LEAST <= len(self._pending) < GATHER_MOST:
                self._loop.call_later(GATHER_SECONDS, self._hand_over)
            else:
                self._hand_over()

    async def task(self, run: Callable[[Change], T]) -> T:
        """Run `run(change)` in a group and give its result once that is durable. StoreError when it cannot be."""
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
        except BaseException:  # a defect of ours: without this thread nothing is safe, so end the process and start anew
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
        """The store refuses outcomes: try until it takes them, in small groups, with what room can be made."""
        left = group.outcomes
        if not left:
            return
        self.stalled = True
        most = SMALL_GROUP
        while left:
            part = left[:most]
            for outcome in part:
                outcome.moved = None  # no copies now: they take room
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
                most = 1  # one of them can never be recorded: find it
            else:
                part[0].refused = str(error)
                left, most = left[1:], SMALL_GROUP
        self.stalled = False

    def _write_bodies(self, group: Committed, puts: list[Put], moves: list[Move]) -> StoreError | None:
        """Append and sync the bodies of `puts`, of notices and of moves to cold segments."""
        segments = self._segments
        try:
            for put in puts:
                if put.text is not None:
                    envelope = put.envelope
                    envelope.body = segments.append(put.ident, put.text, envelope.size, HOT)
            for outcome in group.outcomes:
                if outcome.notice is not None:
                    self._place_notice(outcome.notice)
                if outcome.moved is not None:
                    self._move(outcome)
            for move in moves:
                move.body = segments.append(move.ident, [move.text], move.was.length, COLD)
            segments.write()
            group.syncs += segments.sync()
        except (OSError, StoreError) as failure:
            segments.forget()
            return self._explain(failure)
        return None

    def _place_notice(self, notice: Put) -> None:
        """A notice about very many recipients is a large body as any other."""
        segments, text, size = self._segments, notice.text or [], notice.envelope.size
        if size <= segments.big_limit:
            notice.envelope.body = segments.append(notice.ident, text, size, HOT)
            return
        path = segments.big_path(notice.ident)
        path.unlink(missing_ok=True)  # of a group that failed
        file = BigBody(path, notice.ident)
        try:
            file.write(text)
            notice.envelope.body = file.finish([])
        except BaseException:
            file.discard()
            raise

    def _transact(self, puts: list[Put], outcomes: list[Outcome], tasks: list[Task], moves: list[Move]) -> StoreError | None:
        """One LMDB transaction with everything."""
        change = None
        segments = self._segments
        try:
            change = self._store.change()
            now = self._clock.now()
            self._fold(change, [put for put in puts if put.fresh], now)
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
        """After a failed write of LMDB's, nothing short of opening it again is trusted."""
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

    def _fold(self, change: Change, puts: list[Put], now: int) -> None:
        """Messages that are about to be delivered."""
        for put in puts:
            put.envelope.placements = [Placement(change.row(put.names[0][0]).number, now)]
        if puts:
            change.fold([(put.ident, put.envelope) for put in puts], now)

    def _put(self, change: Change, put: Put, now: int) -> None:
        envelope = put.envelope
        if envelope.flags & HELD:  # on arrival: the rows of a held message are made from those of another
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
        """Point a message at the copy of its body; where it ended or moved meanwhile, the copy is dropped."""
        change.unfold(move.ident)
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
        except Exception as error:  # the caller's mistake is the caller's answer, not the group's failure
            change.undo_part()
            del self._freed[freed:]
            where = traceback.extract_tb(error.__traceback__)[-1]
            task.error, task.mistake = error, f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        else:
            change.keep_part()

    # Outcomes

    def _plan(self, outcome: Outcome) -> None:
        """Before the group is written: the notice an outcome causes, and the move of its body to a cold segment."""
        entry = outcome.entry
        envelope = entry.envelope
        deferred = any(a.kind not in (SUCCESS, PERMANENT) for a in outcome.results.values())
        body = envelope.body
        if deferred and entry.attempts == 0 and entry.sole and body is not None and body.segment:
            outcome.moved = body
        if outcome.failed and envelope.sender and outcome.notice is None:
            outcome.notice = self._any_notice(entry, outcome.failed)

    def _text(self, entry: Entry) -> list[bytes]:
        if entry.text is not None:
            return entry.text
        body = entry.envelope.body
        if body is None:
            raise StoreError(f"message {format_id(entry.ident)} has no body")
        return [self._segments.read(entry.ident, body)]

    def _move(self, outcome: Outcome) -> None:
        """Stage a copy of a straggler's body in a cold segment, so that it does not hold its hot one. One that cannot be read
        stays where it is: that is no reason to refuse the others of the group."""
        envelope = outcome.entry.envelope
        try:
            text = self._text(outcome.entry)
        except StoreError:
            outcome.moved = None
            return
        outcome.moved = self._segments.append(outcome.entry.ident, text, envelope.size, COLD)

    def _any_notice(self, entry: Entry, failed: list[tuple[str, Any, bool]]) -> Put | None:
        """The notice, or where what others wrote makes us stumble a plain one: a mistake of ours there must not end the thread,
        again and again, with all mail behind it."""
        for plain in (False, True):
            try:
                return self._notice(entry, failed, plain)
            except Exception:
                traceback.print_exc()
        return None  # the event `bounced` says that there is none

    def _notice(self, entry: Entry, failed: list[tuple[str, Any, bool]], plain: bool) -> Put:
        """`plain`: without the original header and our signatures."""
        envelope = entry.envelope
        header = b""
        if not plain:
            try:
                start = b"".join(self._text(entry))[: 128 * 1024]
                header = start[: header_end(start)]
            except StoreError:
                pass
        ident = self._ids.next()
        text = failure_notice(
            envelope,
            failed,
            header,
            hostname=self._hostname,
            ident=format_id(ident),
            original_ident=format_id(entry.ident),
            seconds=wall_ms() // 1000,
        )
        text = text if plain else self._sign(text) + text
        notice = Envelope(
            sender="",
            recipients=[envelope.sender],
            size=len(text),
            flags=NOTICE | (envelope.flags & SMTPUTF8),
            arrived=wall_ms(),
            deadline=self._clock.now() + self._max_age_ms,
            application=envelope.application,
        )
        return Put(ident, notice, self._assign(notice, 0), [text], None)

    def _finish(self, change: Change, outcome: Outcome, now: int) -> None:
        """Apply an outcome; its message goes when no recipient is left."""
        entry = outcome.entry
        if outcome.success and entry.sole:
            histories = entry.attempts > 0 or entry.indexes is not None  # of others that waited elsewhere, too
            if change.end_folded(entry.ident) or change.finish_message(entry.ident, entry.envelope, histories):
                self.free_body(entry.ident, entry.envelope.body)
            else:
                self._ended_before(outcome)
            return
        change.unfold(entry.ident)
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
        if joined:  # while these were in flight, others of the message came to wait in their queue
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
        if outcome.notice is not None:
            self._put(change, outcome.notice, now)

    def _ended_before(self, outcome: Outcome) -> None:
        """Nobody ends a message twice: the second outcome changes nothing, and what it was to put on disk is given back."""
        outcome.refused, outcome.gone = "it had ended before", True
        if outcome.notice is not None:
            self.free_body(outcome.notice.ident, outcome.notice.envelope.body)
            outcome.notice = None
        if outcome.moved is not None:
            self.free_body(outcome.entry.ident, outcome.moved)
            outcome.moved = None

    def _wait(self, change: Change, ident: int, envelope: Envelope, places: list[Placement], new: Placement) -> None:
        """Let recipients wait in a queue. Where some of their message wait there already one row serves both, due when the later
        of them are."""
        same = next((place for place in places if place.queue == new.queue), None)
        if same is not None:
            change.unplace(ident, envelope, same)
            places.remove(same)
            new.indexes = sorted({*(new.indexes or []), *(same.indexes or [])})
            new.due = max(new.due, same.due)
        places.append(new)
        change.place(ident, envelope, new)

    def _record(self, change: Change, outcome: Outcome) -> list[int]:
        """Write the recipients' histories; the indexes of those still pending."""
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
        """The message with this body ends in the group under way."""
        if body is not None:
            self._freed.append((ident, body))
