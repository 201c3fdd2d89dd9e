"""What sessions of users change in a shard, by tasks of its writer. What concerns many messages is done in slices, so that the
commits of others stay short: each slice is seen by others before the next, and has a MODSEQ of its own, above all that was told
before.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from relaymta.disk.clock import wall_ms
from relaymta.disk.environment import Shut
from relaymta.disk.ident import IdSource
from relaymta.disk.operations import Task
from relaymta.disk.readers import Readers
from relaymta.errors import RelayError, StoreError
from relaymta.proto.imap_records import load, values
from relaymta.store import names, scripts, unfinished
from relaymta.store.asked import Copied, Partial, Stored
from relaymta.store.change import MISSING, MOVING, Change, Limits, Refusal
from relaymta.store.rows import INBOX, MailboxState, MailShard
from relaymta.store.writer import Step

__all__ = ["SLICE", "SessionChanges", "joined"]

SLICE = 1000  # messages that one transaction changes
FEW = 50  # that come or go in a transaction together with those of others
RECENT_SECONDS = 1.0  # until it is written which messages are \\Recent to nobody any more
AGAIN_SECONDS = 5.0  # until what could not be taken back is tried again

T = TypeVar("T")


class SessionChanges:
    """The base of shard.Shard. Each method raises Refusal (nothing has changed), StoreError or StoreFull (of what is done in
    slices, some may have been)."""

    rows: MailShard
    readers: Readers
    _ids: IdSource

    def __init__(self) -> None:
        self._closing = False
        self._begun: set[asyncio.Task[Any]] = set()  # what is done to its end, also where the caller is cancelled
        self._turn = asyncio.Lock()  # held while more than FEW come or go: whoever else wants that waits
        self._left: set[tuple[int, int]] = set()  # users and numbers of what is to be taken back
        self._taking_back: asyncio.Task[None] | None = None
        self._recent: dict[int, int] = {}  # by mailbox: up to which UID sessions were told, where that is not written yet
        self._writing_recent: asyncio.Task[None] | None = None

    async def task(self, run: Callable[[Change], T], kind: type[Task] = Task) -> T:
        """As of Shard."""
        raise NotImplementedError

    async def _slice(self, messages: int, run: Callable[[Change], T]) -> T:
        """As `task`, for a slice in which so many messages come or go. One large slice is in a group, however many sessions ask
        for such at once, so that its commit stays short for those who file a message meanwhile."""
        if messages <= FEW:
            return await self.task(run)
        async with self._turn:
            return await self.task(run)

    def _check_room(self) -> None:
        """StoreFull while there is no more room than is kept for deletes."""
        raise NotImplementedError

    async def _whole(self, operation: Coroutine[Any, Any, T]) -> T:
        """The result of an operation that is done to its end, also where the caller is cancelled."""
        task = asyncio.get_running_loop().create_task(operation)
        self._begun.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._begun.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be there any more who wants to know

    async def _end_changes(self) -> None:
        """Wait for what is done to its end, which is refused further transactions now; the next start takes it back."""
        await asyncio.gather(*self._begun, return_exceptions=True)
        for task in (self._taking_back, self._writing_recent):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    # Messages

    async def store_flags(
        self, user: int, mailbox: int, uids: list[int], how: str, flags: int, keywords: list[str], unchanged_since: int | None
    ) -> Stored:
        """As `Change.store_flags`."""

        def run(part: list[int], change: Change) -> Stored:
            return change.store_flags(user, mailbox, part, how, flags, keywords, unchanged_since)

        parts = [await self.task(partial(run, part), Step) for part in _slices(uids)]
        if len(parts) == 1:
            return parts[0]
        modified = [uid for part in parts for uid in part.modified]
        before, after = b"".join(part.before for part in parts), b"".join(part.after for part in parts)
        return Stored(before, after, modified, parts[-1].keywords)

    async def expunge(self, user: int, mailbox: int, uids: list[int], marked: bool = False) -> None:
        """As `Change.expunge`."""

        def run(part: list[int], change: Change) -> int:
            return change.expunge(user, mailbox, part, marked)

        for part in _slices(uids):
            await self._slice(len(part), partial(run, part))

    async def claim_recent(self, user: int, mailbox: int, behind: int, until: int, keep: bool) -> int:
        """A session is told of the messages with UIDs below `until`: the first UID of those that no session was told of before,
        which are \\Recent to this one alone (RFC 3501 2.3.2); `until`: there are none. `behind`: only where they begin with this
        UID (0: wherever); `keep`: it only asks. It is written a while later: after a crash some are \\Recent once more."""
        try:
            state = self._state(mailbox)
        except Shut:
            state = await self.readers.run(self._state, mailbox)
        if state is None:
            raise Refusal(MISSING, "there is no such mailbox")
        first = min(max(state.recent, self._recent.get(mailbox, 0)), until)
        if behind and first != behind:
            return until
        if not keep and first < until:
            self._recent[mailbox] = until
            if self._writing_recent is None:
                self._writing_recent = asyncio.get_running_loop().create_task(self._write_recent_later())
        return first

    def _state(self, mailbox: int) -> MailboxState | None:
        with self.rows.reading() as txn:
            return self.rows.state(txn, mailbox)

    async def _write_recent_later(self) -> None:
        await asyncio.sleep(RECENT_SECONDS)
        self._writing_recent = None
        await self._write_recent()

    async def _write_recent(self) -> None:
        claimed = dict(self._recent)

        def run(change: Change) -> None:
            for mailbox, until in claimed.items():
                with suppress(Refusal):  # it has been deleted
                    state = change.state(mailbox)
                    state.recent = max(state.recent, until)

        try:
            await self.task(run)
        except StoreError:  # it is not forgotten: else others would be told the same
            if self._writing_recent is None and not self._closing:
                self._writing_recent = asyncio.get_running_loop().create_task(self._write_recent_later())
            return
        for mailbox, until in claimed.items():
            if self._recent.get(mailbox) == until:
                del self._recent[mailbox]

    async def copy(self, user: int, mailbox: int, uids: list[int], name: str, limits: Limits, move: bool) -> Copied:
        """COPY or MOVE messages (UIDs in order; those that are gone are left out) to a mailbox of the user's. The copies have the
        same dates, flags and keywords. COPY is all or nothing. MOVE asks for no quota; each slice is all or nothing: Partial when
        it was stopped behind the first. MISSING: there is no mailbox `name`."""
        if move:
            return await self._move(user, mailbox, uids, lambda change: change.mailbox(user, name).mailbox)
        self._check_room()
        if len(uids) > SLICE:
            return await self._copy_many(user, mailbox, uids, name, limits)

        def run(change: Change) -> Copied:
            change.owner(user)
            return change.copy(user, mailbox, uids, change.mailbox(user, name).mailbox, wall_ms(), limits)

        return await self._slice(len(uids), run)

    async def _copy_many(self, user: int, mailbox: int, uids: list[int], name: str, limits: Limits) -> Copied:
        messages, octets = await self.readers.run(self._counted, mailbox, uids)
        async with self._undertaking(user, name, limits, messages, octets) as (number, target):

            def run(part: list[int], change: Change) -> Copied:
                before = change.owner(user).octets
                copied = change.copy(user, mailbox, part, target, wall_ms())
                unfinished.filed(change, user, number, copied.copies, change.owner(user).octets - before)
                return copied

            parts = [await self._slice(len(part), partial(run, part)) for part in _slices(uids)]
        return joined(parts)

    def _counted(self, mailbox: int, uids: list[int]) -> tuple[int, int]:
        """Reader thread: how many messages of these are there, and their octets."""
        sizes: list[int] = []
        for part in _slices(uids):
            with self.rows.reading() as txn:
                found = (self.rows.message(txn, mailbox, uid) for uid in part)
                sizes += [message.size for message in found if message is not None]
        return len(sizes), sum(sizes)

    async def _move(self, user: int, mailbox: int, uids: list[int], find: Callable[[Change], int]) -> Copied:
        """Move messages; `find` gets the mailbox that they are moved to, in the transaction of the first slice."""
        target = 0

        def run(part: list[int], change: Change) -> Copied:
            return change.copy(user, mailbox, part, target or find(change), wall_ms(), move=True)

        parts: list[Copied] = []
        for part in _slices(uids):
            try:
                parts.append(await self._slice(len(part), partial(run, part)))
            except (Refusal, StoreError) as error:
                raise _stopped(error, parts) from None
            target = parts[0].mailbox
        return joined(parts)

    # Names

    async def create(self, user: int, name: str, special: str = "") -> None:
        """As `names.create`."""
        await self.task(lambda change: names.create(change, user, name, special))

    async def delete(self, user: int, name: str) -> None:
        """Remove a mailbox; what is below it stays. It is there for nobody any more; its messages go in slices."""
        await self._whole(self._delete(user, name))

    async def _delete(self, user: int, name: str) -> None:
        number = await self._slice(SLICE, lambda change: names.delete(change, user, name, SLICE))
        if number:
            self._take_back(user, number)

    async def rename(self, user: int, old: str, new: str) -> None:
        """As `names.rename`. INBOX stays, and what is below it: its messages are moved to the new mailbox (RFC 9051 6.3.6);
        Partial when that was stopped behind the first slice."""
        if old != INBOX:
            await self.task(lambda change: names.rename(change, user, old, new))
            return
        mailbox, uids = await self.readers.run(self._inbox, user)
        await self._move(user, mailbox, uids, lambda change: names.create(change, user, new).mailbox)

    def _inbox(self, user: int) -> tuple[int, list[int]]:
        """Reader thread: a user's INBOX and its UIDs."""
        with self.rows.reading() as txn:
            row = self.rows.mailbox(txn, user, INBOX)
            if row is None:
                raise Refusal(MISSING, "no such user")
            return row.mailbox, [*values(load([block for _, block in self.rows.index(txn, row.mailbox).blocks()]))]

    async def subscribe(self, user: int, name: str, subscribed: bool) -> None:
        """As `names.subscribe`."""
        await self.task(lambda change: names.subscribe(change, user, name, subscribed))

    # Sieve

    async def put_script(self, user: int, name: str, text: bytes) -> None:
        """As `scripts.put`. Refusal with INVALID, too: the script does not compile."""
        await self.readers.run(_check, text)
        await self._scripts(user, lambda change: scripts.put(change.shard, change.txn, user, name, text))

    async def activate_script(self, user: int, name: str) -> None:
        """As `scripts.activate`."""
        await self._scripts(user, lambda change: scripts.activate(change.shard, change.txn, user, name))

    async def remove_script(self, user: int, name: str) -> None:
        """As `scripts.remove`."""
        await self._scripts(user, lambda change: scripts.remove(change.shard, change.txn, user, name))

    async def rename_script(self, user: int, old: str, new: str) -> None:
        """As `scripts.rename`."""
        await self._scripts(user, lambda change: scripts.rename(change.shard, change.txn, user, old, new))

    async def remember_reply(self, user: int, key: bytes, until: int, now: int, claimant: bytes) -> bool:
        """As `scripts.remember_reply`."""

        def remember(change: Change) -> bool:
            return scripts.remember_reply(change.shard, change.txn, user, key, until, now, claimant)

        return await self._scripts(user, remember)

    async def _scripts(self, user: int, run: Callable[[Change], T]) -> T:
        def changed(change: Change) -> T:
            change.owner(user)
            change.scripted.add(user)
            return run(change)

        return await self.task(changed)

    # What has not come to its end

    @asynccontextmanager
    async def _undertaking(
        self, user: int, name: str, limits: Limits, messages: int, octets: int
    ) -> AsyncIterator[tuple[int, int]]:
        """Within it, messages are filed in slices (`unfinished.filed`): (its number, the mailbox's id). When it is left by an
        exception, they are taken back."""
        number = self._ids.next()
        try:
            yield number, await self.task(lambda change: unfinished.begin(change, user, number, name, limits, messages, octets))
            await self.task(lambda change: unfinished.end(change, user, number))
        except Exception:
            await self._settled(user, number)
            raise
        except BaseException:
            self._take_back(user, number)
            raise

    async def _end(self, user: int, number: int) -> None:
        while not await self._slice(SLICE, lambda change: unfinished.take_back(change, user, number, SLICE)):
            pass

    async def _settled(self, user: int, number: int) -> None:
        """Take it back now, or, where that fails, later."""
        try:
            await self._end(user, number)
        except BaseException as error:
            self._take_back(user, number)
            if not isinstance(error, StoreError):
                raise

    def _take_back(self, user: int, number: int) -> None:
        """Take back what a user has begun under a number, in the background."""
        self._left.add((user, number))
        if self._taking_back is None and not self._closing:
            self._taking_back = asyncio.get_running_loop().create_task(self._take_all_back())

    async def _take_all_back(self) -> None:
        try:
            while self._left:
                failed = 0
                for user, number in [*self._left]:
                    try:
                        await self._end(user, number)
                        self._left.discard((user, number))
                    except Exception as error:  # also a defect: the others are taken back all the same
                        failed += 1
                        if not isinstance(error, RelayError):
                            asyncio.get_running_loop().call_exception_handler(
                                {"message": "what a user had begun could not be taken back", "exception": error}
                            )
                if failed:
                    await asyncio.sleep(AGAIN_SECONDS)
        finally:
            self._taking_back = None

    def _unfinished(self, user: int | None = None) -> list[tuple[int, int]]:
        """Reader thread: what has not come to its end; of a user, that which files messages."""
        with self.rows.reading() as txn:
            found = list(self.rows.unfinished(txn, user))
        return [(owner, number) for owner, number, row in found if user is None or not row.removed]

    async def _take_back_all(self) -> None:
        """At the start: take back what had been begun."""
        for user, number in await self.readers.run(self._unfinished):
            self._take_back(user, number)

    async def freeze(self, user: int, frozen: bool = True) -> None:
        """As `Change.freeze`. What is being filed for the user in slices is taken back before this returns."""
        await self.task(lambda change: change.freeze(user, frozen))
        if frozen:
            for owner, number in await self.readers.run(self._unfinished, user):
                await self._end(owner, number)

    async def purge(self, user: int) -> int:
        """Remove a user and all mail, in slices; a UIDVALIDITY as of `Change.purge`. What a cancellation leaves is removed by the
        next call."""
        while not (found := await self._slice(SLICE, lambda change: change.purge(user, SLICE))):
            pass
        return found


def _check(text: bytes) -> None:
    """Reader thread: whether a script can be kept. Refusal."""
    scripts.check_size(len(text))
    scripts.check(text)


def _slices(uids: list[int]) -> Iterator[list[int]]:
    """One at least: an operation that concerns no message is asked for, too."""
    return (uids[start : start + SLICE] for start in range(0, len(uids) or 1, SLICE))


def joined(parts: list[Copied]) -> Copied:
    """What the slices of one operation (one at least) have copied."""
    sources, copies = ([uid for part in parts for uid in getattr(part, which)] for which in ("sources", "copies"))
    return Copied(parts[0].mailbox, parts[0].uidvalidity, sources, copies)


def _stopped(error: Refusal | StoreError, parts: list[Copied]) -> Exception:
    """What is raised when a slice behind these has failed."""
    if not any(part.sources for part in parts):
        return error
    return Partial(error.code if isinstance(error, Refusal) else MOVING, str(error), joined(parts))
