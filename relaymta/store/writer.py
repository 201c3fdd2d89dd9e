"""The mailboxes' group commit (disk/writer.py: how operations come together): messages that are filed, and every other change as
a Task.

When it fails: nothing of the group has happened, and each operation is told so. But where it failed since the disk or the map is
full, its tasks are run again in small groups, with the room of the ballast: those that expunge make room. Where a message cannot
be filed because of a defect, or contradicts the store, the group is committed without it, and so with a step. A message that only
some of its mailboxes take is filed in those.
"""

import asyncio
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.folders import remove_file
from relaymta.disk.operations import Group, Move, Task, refuse
from relaymta.disk.segments import HOT, Segments
from relaymta.disk.writer import GroupWriter
from relaymta.errors import StoreError, StoreFull
from relaymta.proto.envelope import Body
from relaymta.store import names
from relaymta.store.change import LIMIT, NO_LIMITS, Change, Filed, Limits, Refusal
from relaymta.store.collected import Kept
from relaymta.store.noted import NOTHING, Noted
from relaymta.store.rows import ANY_ATTEMPT, INBOX, KEYWORDS_MOST, MailShard, MessageRow, ObjectRow

__all__ = ["File", "Filings", "Forget", "MailWriter", "Place", "Result", "Step", "Target", "Together", "prefix_of"]


SMALL_GROUP = 10  # tasks at a full disk or map: larger groups fail


class Place(msgspec.Struct, array_like=True, frozen=True):
    """A mailbox of a user's, by its name, and the flags that a message gets there. `create`: it is created if missing."""

    name: str = INBOX
    flags: int = 0
    keywords: list[str] = []
    create: bool = False


class Target(msgspec.Struct, array_like=True, frozen=True):
    """One mailbox that a message is for. `prefix`: header fields of this copy; `date`: INTERNALDATE (ms, wall clock; 0: now);
    `limits`: the user's quota; `once`: queue id, recipient and user, so that it is filed once however often it is asked for, and
    `attempt`: by which; `place`: as of `Change.file`; `saved`: when it came into the mailbox (ms, wall clock; 0: now); `places`:
    where a Sieve script files it, instead of all that this says of one mailbox: in each of them, or (there is no room) in none. A
    place that cannot be had is INBOX then; none: it is filed nowhere."""

    user: int
    name: str = INBOX
    prefix: bytes = b""
    flags: int = 0
    keywords: list[str] = []
    date: int = 0
    limits: Limits = Limits()
    create: bool = False
    once: tuple[int, int, int] | None = None
    place: tuple[int, int] | None = None
    saved: int = 0
    places: list[Place] | None = None
    attempt: int = ANY_ATTEMPT


def prefix_of(sender: str, address: str) -> bytes:
    """The header fields of one copy: from whom (RFC 5321 4.4), and for which address it came."""
    return f"Return-Path: <{sender}>\r\nDelivered-To: {address}\r\n".encode()


class Result(msgspec.Struct, array_like=True, frozen=True):
    """What became of a message for one target: `filed`; or `code` and `text` say why it is refused; neither when it had been
    filed before. `copies`: in how many mailboxes it is; `filled`: per cent of the user's quota that are used now."""

    filed: Filed | None = None
    code: str = ""
    text: str = ""
    copies: int = 0
    filled: int = 0


_BEFORE = Result()


class File:
    """A message to file: `data` in pieces, once for all `targets`, or (None) `body` of `size` octets, a large one that has been
    written, or (None, too) the data of the object `ident`, which is there. `noted`: of its data. `done(file)` is called on the
    loop; `results`: one for each target; `error`: why nothing is filed."""

    __slots__ = ("body", "data", "done", "error", "ident", "noted", "results", "size", "targets")

    def __init__(
        self,
        ident: int,
        data: list[bytes] | None,
        targets: list[Target],
        done: "Callable[[File], None] | None" = None,
        body: Body | None = None,
        noted: Noted = NOTHING,
    ) -> None:
        self.ident = ident
        self.data = data
        self.size = sum(map(len, data)) if data is not None else body.length if body is not None else 0
        self.targets = targets
        self.done = done
        self.body = body
        self.noted = noted
        self.results: list[Result] = []
        self.error: StoreError | None = None


class Forget:
    """The queue has ended these recipients of a message: that it was filed need not be remembered any longer. Nobody waits for
    it."""

    __slots__ = ("queue_id", "recipients")

    def __init__(self, queue_id: int, recipients: list[int]) -> None:
        self.queue_id = queue_id
        self.recipients = recipients


class Together(Task):
    """Messages that are filed by one change, or none of them: `run(change)` finds the `files` (without targets) written."""

    __slots__ = ("files",)

    def __init__(self, files: list[File], run: Callable[[Change], Any], done: Callable[[Task], None] | None = None) -> None:
        super().__init__(run, done)
        self.files = files


class Step(Task):
    """A task that is one method of Change, which is refused before it has changed anything: it needs no part of the transaction,
    to be undone alone."""

    __slots__ = ()


Operation = File | Forget | Together | Step | Task | Move


class Filings(Group):
    """The operations of one group. `touched`: the MODSEQ of each mailbox that it has changed; `scripted`: users whose Sieve
    scripts may have changed, also where that failed."""

    __slots__ = ("files", "forgotten", "scripted", "together", "touched")

    def __init__(self) -> None:
        super().__init__()
        self.files: list[File] = []
        self.together: list[Together] = []
        self.forgotten: list[Forget] = []
        self.touched: dict[int, int] = {}
        self.scripted: set[int] = set()

    def _lists(self) -> dict[type, list[Any]]:
        return super()._lists() | {
            File: self.files,
            Forget: self.forgotten,
            Together: self.together,
            Step: self.tasks,
        }

    def every_file(self) -> list[File]:
        """All messages of the group."""
        return [*self.files, *(file for together in self.together for file in together.files)]


class MailWriter(GroupWriter[Operation, Filings, Change]):
    """Owns the write side of one shard of mailboxes. `ballast`: a file that is removed when there is no room for tasks."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        shard: MailShard,
        segments: Segments,
        clock: ShardClock,
        ballast: Path,
        on_commit: Callable[[Filings], None],
    ) -> None:
        self.kept = Kept()
        begin = partial(Change, shard, self.kept)
        super().__init__(loop, shard, segments, clock, begin=begin, on_commit=on_commit, unawaited=Forget, name="mail-writer")
        self._ballast = ballast
        self._mistaken = False  # in the transaction under way, a message could not be filed
        self._touched: dict[int, int] = {}  # by the transaction under way
        self._scripted: set[int] = set()  # by it, too
        self._freed: list[tuple[int, Body]] = []  # bodies that nothing points at once the group under way is committed

    # All that follows runs on the thread

    def _commit(self, batch: list[Operation]) -> Filings:
        group = Filings()
        group.add(batch)
        error = self._try(group, apart=False)
        if self._mistaken:
            refuse([*group.files, *group.together, *group.moves, *group.tasks], None)
            error = self._try(group, apart=True)
        if isinstance(error, StoreFull):
            self._insist(group)
        self._remove_large(group)
        self.stalled = False
        return group

    def _try(self, group: Filings, apart: bool) -> StoreError | None:
        """Write a group; the error when its transaction failed. `apart`: as of `_fill`."""
        files, together, moves = group.files, group.together, group.moves
        error = self._append(group, partial(self._stage, group.every_file()), moves)
        if error is not None:
            refuse([*files, *together, *moves], error)
            files, together, moves = [], [], []
        error = self._record(group, files, together, group.forgotten, group.tasks, moves, apart)
        if error is not None:
            refuse([*files, *together, *moves, *group.tasks], error)
        return error

    def _remove_large(self, group: Filings) -> None:
        """Remove the files of large messages that have not been filed."""
        failed = [file for file in group.files if file.error is not None]
        failed += [file for one in group.together if one.error is not None for file in one.files]
        for file in failed:
            if file.data is None and file.body is not None:
                self._segments.remove_big(file.ident)

    def _insist(self, group: Filings) -> None:
        """Run the tasks of a group that found no room again, with that of the ballast, a few at a time."""
        remove_file(self._ballast)
        forgotten = group.forgotten
        for start in range(0, len(group.tasks), SMALL_GROUP):
            tasks = group.tasks[start : start + SMALL_GROUP]
            refuse(tasks, None)
            error = self._record(group, [], [], forgotten, tasks, [], apart=True)
            if error is None:
                forgotten = []
            else:
                refuse(tasks, error)

    def _record(
        self,
        group: Filings,
        files: list[File],
        together: list[Together],
        forgotten: list[Forget],
        tasks: list[Task],
        moves: list[Move],
        apart: bool = False,
    ) -> StoreError | None:
        """Commit these operations of a group in one transaction; the error when it failed: then nothing of them is committed."""
        self._mistaken = False
        error = self._transact(partial(self._fill, files, together, forgotten, tasks, moves, apart))
        group.scripted |= self._scripted
        if error is None:
            group.touched |= self._touched
            for ident, body in self._freed:
                if not body.segment:
                    self._segments.remove_big(ident)
        return error

    def _stage(self, files: list[File]) -> None:
        for file in files:
            if file.data is not None:
                file.body = self._segments.append(file.ident, file.data, file.size, HOT)

    def _fill(
        self,
        files: list[File],
        together: list[Together],
        forgotten: list[Forget],
        tasks: list[Task],
        moves: list[Move],
        apart: bool,
        change: Change,
        now: int,
    ) -> None:
        """`apart`: each message, and each step, is a part of the transaction, which is undone where it fails."""
        wall = wall_ms()
        self._scripted = change.scripted
        self._freed.clear()
        for file in files:
            if apart:
                self._file_apart(change, file, now, wall)
            else:
                self._with_others(self._file, change, file, now, wall)
        self._with_others(change.settle_records)
        for one in together:
            self._run_task(change, one)
            if one.error is not None:
                self._freed += [(file.ident, file.body) for file in one.files if file.body is not None]
        for ended in forgotten:  # behind what was asked for before
            for recipient in ended.recipients:
                change.forget_done(ended.queue_id, recipient)
        for task in tasks:
            if apart or type(task) is not Step:
                self._run_task(change, task)
            else:
                self._with_others(_step, change, task)
        for move in moves:
            assert move.body is not None
            if change.relocate(move.ident, move.was, move.body):
                self._segments.release(move.was)
            else:
                self._segments.release(move.body)
                move.body = None
        self._freed += change.freed
        for _, body in self._freed:
            if body.segment:
                self._segments.release(body)
        self._touched = change.touched

    def _with_others(self, run: Callable[..., None], *arguments: Any) -> None:
        """Do something that is no part of its own. What fails by a defect takes the transaction with it, which is written again
        then, with each as a part."""
        try:
            run(*arguments)
        except (lmdb.Error, OSError):
            raise
        except Exception as error:
            self._mistaken = True
            raise StoreError(repr(error)) from error

    def _file_apart(self, change: Change, file: File, now: int, wall: int) -> None:
        error = self._attempt(change, partial(self._file, change, file, now, wall))
        if error is not None:
            traceback.print_exception(error)
            file.error = StoreError(f"the message cannot be filed: {error!r}")
            if file.body is not None:
                self._freed.append((file.ident, file.body))

    def _file(self, change: Change, file: File, now: int, wall: int) -> None:
        """File a message in those of its mailboxes that take it."""
        file.results.clear()
        there = file.data is None and file.body is None
        if there:
            try:
                file.size = change.size(file.ident)
            except Refusal as refusal:
                file.results += [Result(None, refusal.code, str(refusal))] * len(file.targets)
                return
        filed = 0
        for target in file.targets:
            result = self._file_in(change, file, target, wall)
            file.results.append(result)
            filed += result.copies
            if target.once is not None and not result.code and result is not _BEFORE:
                change.done(*target.once, now, target.attempt)
        if there:
            change.refer(file.ident, filed)
        elif file.body is not None and filed:
            change.put_object(file.ident, ObjectRow(filed, file.body, *file.noted))
        elif file.body is not None:
            self._freed.append((file.ident, file.body))

    def _file_in(self, change: Change, file: File, target: Target, wall: int) -> Result:
        if target.once is not None and change.is_done(*target.once):
            return _BEFORE
        size, saved = file.size + len(target.prefix), target.saved or wall
        row = MessageRow(file.ident, target.date or wall, saved, size, target.prefix)
        try:
            if target.places is not None:
                return self._file_in_places(change, row, target, target.places)
            if target.create:
                change.check_room(change.owner(target.user), target.limits, 1, size)
                _check_keywords(target.keywords)
                _create(change, target.user, target.name)
            filed = change.file(target.user, target.name, row, target.flags, target.keywords, target.limits, target.place)
            return Result(filed, copies=1, filled=_filled(change, target))
        except Refusal as refusal:
            return Result(None, refusal.code, str(refusal))

    def _file_in_places(self, change: Change, row: MessageRow, target: Target, places: list[Place]) -> Result:
        """File a message where a Sieve script wants it: nothing that has been asked of one mailbox may lose it."""
        owner = change.owner(target.user)
        if places:  # else it needs no room, also where more is used than there may be
            change.check_room(owner, target.limits, len(places), row.size * len(places))
        found = [self._file_at(change, row, target.user, one) for one in places]
        if None in found and not any(one.name == INBOX for one in places):
            found.append(self._file_at(change, row, target.user, Place()))
        taken = [one for one in found if one is not None]
        if places and not taken:
            raise Refusal(LIMIT, "no mailbox takes it")
        return Result(taken[0] if taken else None, copies=len(taken), filled=_filled(change, target))

    def _file_at(self, change: Change, row: MessageRow, user: int, place: Place) -> Filed | None:
        """None: the mailbox cannot take it."""
        for keywords in (place.keywords, []):
            try:
                _check_keywords(keywords)
                if place.create:
                    _create(change, user, place.name)
                return change.file(user, place.name, row, place.flags, keywords, NO_LIMITS)
            except Refusal as refusal:
                if refusal.code != LIMIT or not keywords:
                    break
        return None


def _step(change: Change, step: Step) -> None:
    try:
        step.result = step.run(change)
    except Refusal as refusal:
        step.error = refusal


def _create(change: Change, user: int, name: str) -> None:
    """Create a mailbox if it is missing, with its parents, as CREATE does, and subscribe it. Refusal: there is none of them."""
    row = change.shard.mailbox(change.txn, user, name)
    if row is None or not row.mailbox:
        names.create(change, user, name)
        names.subscribe(change, user, name, True)


def _check_keywords(keywords: list[str]) -> None:
    if len(keywords) > KEYWORDS_MOST:
        raise Refusal(LIMIT, f"{KEYWORDS_MOST} keywords are the most that a message may have")


def _filled(change: Change, target: Target) -> int:
    limits, owner = target.limits, change.user(target.user)
    octets = owner.octets * 100 // limits.octets if limits.octets else 0
    return max(octets, owner.messages * 100 // limits.messages if limits.messages else 0)
