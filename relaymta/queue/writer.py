"""The queue's group commit: what becomes of messages, outcomes with their DSNs, and operators' changes (disk/writer.py: how
they come together).

When it fails:
  - bodies can't be written or synced: no new message of the group is accepted; outcomes are committed without them;
  - the transaction fails: nothing of the group is accepted, the environment is opened again, outcomes are tried again
    (in groups of ten) until they are committed. Meanwhile `stalled` is set and delivery pauses, because a message that
    can't be deleted would be sent twice;
  - a task raises: all of it is undone, and the rest of the group is committed;
  - an outcome contradicts the store (its message has left the queue): it alone is refused (`Outcome.refused`).
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.folders import remove_file
from relaymta.disk.ident import IdSource
from relaymta.disk.operations import Move, Task, refuse
from relaymta.disk.segments import HOT, Segments
from relaymta.disk.writer import GroupWriter
from relaymta.errors import StoreError
from relaymta.proto.envelope import SUCCESS, Attempt, Body, Placement
from relaymta.queue.change import Change
from relaymta.queue.dsns import Dsns
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.group import Assign, Committed, Operation
from relaymta.queue.journal import Journal
from relaymta.queue.outcomes import Outcomes, put_rows, restore_rows
from relaymta.queue.store import Store

__all__ = ["Writer", "said_nothing"]

SMALL_GROUP = 10  # deletes at a full map: larger groups fail
RETRY_SECONDS, RETRY_MOST = 0.2, 3.0  # between two attempts to commit outcomes: each writes the bodies of their DSNs again


def said_nothing(entry: Entry) -> Attempt:
    """The attempt of a deliverer that does not say what its peers have said."""
    return Attempt(wall_ms(), SUCCESS, "final", "", 0, "", "")


class Writer(GroupWriter[Operation, Committed, Change]):
    """Owns the queue's write side.

    `assign(envelope, attempts)`: the queues of a message's recipients. `hostname`: the reporting MTA of DSNs. `sign(data)`:
    header fields to prepend to a DSN's message data; `said(entry)`: as of the queue.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: Store,
        segments: Segments,
        clock: ShardClock,
        ids: IdSource,
        *,
        hostname: str,
        max_age_ms: int,
        ballast: Path,
        assign: Assign,
        on_commit: Callable[[Committed], None],
        sign: Callable[[bytes], bytes] = lambda data: b"",
        said: Callable[[Entry], Attempt] = said_nothing,
    ) -> None:
        super().__init__(
            loop, store, segments, clock, begin=self._change, on_commit=on_commit, unawaited=Outcome, name="queue-writer"
        )  # fmt: skip
        self._store = store
        self.journal: Journal | None = None  # set before the start, or by the thread itself
        self._ballast = ballast
        self.dsns = Dsns(segments, clock, ids, hostname, max_age_ms, assign, sign)
        self._outcomes = Outcomes(store, segments, self.dsns, assign, said)

    # All that follows runs on the thread

    def _commit(self, batch: list[Operation]) -> Committed:
        group = Committed([])
        group.add(batch)
        self._try(group)
        for put in group.puts:
            if put.error is not None and put.data is None:  # its file has no message, and the client is told to try again
                remove_file(self._segments.next_path(put.ident) if put.replaces else self._segments.big_path(put.ident))
        return group

    def _try(self, group: Committed) -> None:
        puts = group.puts
        for outcome in group.outcomes:
            if not outcome.success:
                self._outcomes.plan(outcome)
        moves = group.moves
        error = self._write_bodies(group, puts, moves)
        if error is not None:
            refuse([*puts, *moves], error)
            puts, moves = [], []
            error = self._write_bodies(group, puts, moves)
        if error is None:
            error = self._record(puts, group.outcomes, group.tasks, moves)
            if error is None:
                self.stalled = False
                return
        refuse([*puts, *moves, *group.tasks], error)
        self._insist(group)

    def _insist(self, group: Committed) -> None:
        """Commit outcomes whose group failed: in small groups, again and again, on a full disk with the room of the ballast."""
        left = group.outcomes
        self._store.spare = True  # until the disk is looked at again
        self.stalled = bool(left)  # else `_reopen` may have set it, and no group would come that ends it
        most, pause = SMALL_GROUP, RETRY_SECONDS
        while left:
            part = left[:most]
            for outcome in part:
                outcome.moved = None  # no copies: they need room
            self._contradicted = False
            error = self._write_bodies(Committed(part), [], [])
            if error is None:
                error = self._record([], part, [], [])
            if error is None:
                left, most, pause = left[len(part) :], SMALL_GROUP, RETRY_SECONDS
            elif not self._contradicted:
                remove_file(self._ballast)
                time.sleep(pause)
                pause = min(2 * pause, RETRY_MOST)
            elif len(part) > 1:
                most = 1  # one of them contradicts the store: find it
            else:
                part[0].refused = str(error)
                self._outcomes.discard(part[0])
                left, most = left[1:], SMALL_GROUP
        self.stalled = False

    def _write_bodies(self, group: Committed, puts: list[Put], moves: list[Move]) -> StoreError | None:
        """Append and sync the bodies of `puts`, of the outcomes' messages, and of those that move to cold segments."""

        def stage() -> None:
            segments = self._segments
            for put in puts:
                if put.data is not None:
                    envelope = put.envelope
                    envelope.body = segments.append(put.ident, put.data, envelope.size, HOT)
            for outcome in group.outcomes:
                if outcome.dsn is not None or outcome.moved is not None or outcome.sent:
                    self._outcomes.write(outcome)

        return self._append(group, stage, moves)

    def _record(self, puts: list[Put], outcomes: list[Outcome], tasks: list[Task], moves: list[Move]) -> StoreError | None:
        """Commit these operations in one LMDB transaction; the error when it failed (then nothing of them is committed)."""

        journal = self.journal

        def fill(change: Change, now: int) -> None:
            if journal is not None:
                journal.accepted(puts)
            change.now = now
            self._inline(change, [put for put in puts if put.fresh], now)
            for put in puts:
                if put.replaces:
                    self._outcomes.replace(change, put, now)
                elif put.restored is not None:
                    restore_rows(change, put)
                elif not put.fresh:
                    put_rows(change, put, now)
                if put.request is not None:
                    change.keep_request(put, now)
            for outcome in outcomes:
                self._outcomes.record(change, outcome, now)
                if journal is not None and not outcome.gone:
                    journal.ended(outcome)
                    journal.accepted(outcome.puts)
            for task in tasks:
                self._run_task(change, task)
            for move in moves:
                self._relocate(change, move)
            for _, body in self._outcomes.freed:
                if body.segment:
                    self._segments.release(body)

        error = self._transact(fill)
        if error is None:
            self._outcomes.settle()
        elif journal is not None:
            journal.forget(self._store.journal_rows())
        self._outcomes.forget()
        return error

    def _change(self) -> Change:
        return Change(self._store, self.journal)

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
        move.places = [placement.queue for placement in envelope.placements]

    def _run_task(self, change: Change, task: Task) -> None:
        freed = len(self._outcomes.freed)
        super()._run_task(change, task)
        if task.error is not None:
            del self._outcomes.freed[freed:]

    def free_body(self, ident: int, body: Body | None) -> None:
        """Free a body in the group under way, in which its message ends."""
        self._outcomes.free_body(ident, body)
