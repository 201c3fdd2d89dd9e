"""What takes long, one at a time: users who are moved to another shard or removed.

Each step of a move is safe to end at, and is begun again after a restart, by what the directory says:

    moving = target           the user is frozen where it is; its copy in the target is removed and made anew
    shard = moving = target   the copy is complete, and all see it; what other shards have of the user is removed
    moving = -1               done
    deleted = REMOVING        all of the user is removed, last the row of the directory

A shard notes what it has filed of a message in the queue until the queue has ended that. Where the queue or the shard was killed
before it was told so, the note is removed here: when the message is in no shard of the queue any more, nobody asks for it.
"""

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from relaymta.errors import RelayError
from relaymta.queue.presence import ended
from relaymta.store.directory import REMOVING, Directory, User

__all__ = ["KEPT_DAYS", "REMOVING", "Upkeep"]

KEPT_DAYS = 7  # a deleted user, who may come back
LOOK_SECONDS = 600.0  # between two looks for what is to be done
FIRST_SECONDS = 5.0  # from the start, and after a failure
AGAIN_SECONDS = 60.0  # after one that a further attempt may not mend
STALE_SECONDS = 86400.0
NOTES_SECONDS = 86400.0  # between two looks for notes of messages that have ended
STAGED = re.compile(r"backup-\d+")
LONG = 24 * 3600.0  # seconds for which a worker may copy or remove a user, or copy a shard
PAGE = 1000

Owner = Callable[..., Awaitable[Any]]


class Upkeep:
    """`owner(op, seconds, shard=..., ...)`: the answer of the worker that has a shard; `folder`: the mailboxes' in the spool."""

    def __init__(
        self, directory: Directory, owner: Owner, folder: Path, shards: int, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self._warn = warn
        self._directory = directory
        self._owner = owner
        self._folder = folder
        self._shards = shards
        self._steady = asyncio.Lock()  # held by whatever copies or removes
        self._begun = directory.highest()  # ids of users above this one are given by this process
        self._swept = False
        self._noted_at = -NOTES_SECONDS  # when notes were looked through (monotonic clock)
        self._failed = asyncio.Event()  # something that an operator has begun has to go on
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look, now and then, for what is to be done."""
        self._looking = asyncio.get_running_loop().create_task(self._look())

    def stop(self) -> None:
        """End that; what is under way goes on after the next start."""
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        await asyncio.to_thread(self._remove_stale_backups)
        seconds = FIRST_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._failed.wait()
            if self._failed.is_set():
                self._failed.clear()
                await asyncio.sleep(FIRST_SECONDS)
            try:
                if not self._swept:
                    await self._sweep()
                if time.monotonic() - self._noted_at > NOTES_SECONDS:
                    await self._forget_ended()
                seconds = LOOK_SECONDS if await self._all() else AGAIN_SECONDS
            except Exception as error:
                seconds = FIRST_SECONDS  # a worker was not ready
                if not isinstance(error, (RelayError, OSError)):
                    self._warn(f"the mailboxes' upkeep failed: {type(error).__name__}: {error}")

    async def _all(self) -> bool:
        """Do what is to be done; whether all of it is. What fails for one user is done for the others."""
        expired, good = (time.time() - KEPT_DAYS * 86400) * 1000, True
        page = await asyncio.to_thread(self._directory.users, 0, PAGE)
        while page:
            for user in page:
                try:
                    if user.deleted and user.deleted < expired:
                        await self._remove_expired(user.ident, expired)
                    elif user.moving >= 0:
                        await self._carry(user.ident)
                except (RelayError, OSError) as error:
                    good = False
                    what = "removed" if user.deleted else f"moved to shard {user.moving}"
                    self._warn(f"{user.address} cannot be {what}: {error}")
            page = await asyncio.to_thread(self._directory.users, page[-1].ident, PAGE)
        self._failed.clear()
        return good

    async def _sweep(self) -> None:
        """Remove users that the directory does not know: a restore, or the creation of a user, was interrupted."""
        for shard in range(self._shards):
            after = 0
            while there := await self._owner("mail_users", shard=shard, after=after, most=PAGE):
                after = there[-1]
                known = await asyncio.to_thread(self._directory.known_idents, there)
                for ident in there:
                    if ident <= self._begun and ident not in known:
                        async with self._steady:
                            await self._owner("mail_purge", LONG, shard=shard, user=ident)
        self._swept = True

    async def _forget_ended(self) -> None:
        """Remove notes of what was filed of messages that the queue has ended. They are read first, and then the queue, which has
        had each of these messages before."""
        for shard in range(self._shards):
            after = 0
            while noted := await self._owner("mail_done", shard=shard, after=after):
                gone = await asyncio.to_thread(ended, self._folder.parent, noted)
                if gone:
                    await self._owner("mail_ended", shard=shard, queue_ids=gone)
                after = noted[-1]
        self._noted_at = time.monotonic()

    async def _update(self, ident: int, change: Callable[[User], User]) -> User:
        return await asyncio.to_thread(self._directory.update, ident, change)

    @contextlib.asynccontextmanager
    async def _until_done(self) -> AsyncIterator[None]:
        """One at a time; what fails is looked for soon."""
        try:
            async with self._steady:
                yield
        except BaseException:
            self._failed.set()
            raise

    # Removal

    async def delete(self, address: str, now: bool, separator: str) -> User:
        """Delete a user: nobody can send mail to the user or log in any more. `now`: the mail is removed at once, else after
        KEPT_DAYS. Errors as of `Directory.delete`."""
        since = REMOVING if now else time.time_ns() // 1_000_000
        user = await asyncio.to_thread(self._directory.delete, address, since, separator)
        if now:
            await self._remove(user.ident)
        return user

    async def _remove_expired(self, ident: int, expired: float) -> None:
        def change(row: User) -> User:
            return msgspec.structs.replace(row, deleted=REMOVING) if 0 < row.deleted < expired else row

        if (await self._update(ident, change)).deleted == REMOVING:
            await self._remove(ident)

    async def _remove(self, ident: int) -> None:
        async with self._until_done():
            highest = [await self._owner("mail_purge", LONG, shard=shard, user=ident) for shard in range(self._shards)]
            await asyncio.to_thread(self._directory.raise_uidvalidity, max(highest))
            await asyncio.to_thread(self._directory.remove, ident)

    # Moves

    async def move(self, address: str, shard: int) -> User:
        """Move a user, with all mail, to another shard; until it has ended, mail for the user is deferred. Nothing happens
        to one who is there already. NoSuch, RelayError."""
        user = await asyncio.to_thread(self._directory.known, address)
        if not 0 <= shard < self._shards:
            raise RelayError(f"there is no shard {shard} (there are 0 to {self._shards - 1})")

        if user.moving not in (-1, user.shard) and user.shard == shard:
            return await self._move_back(user.ident)

        def change(row: User) -> User:
            if row.deleted:
                raise RelayError(f"{row.address} is deleted")
            if row.moving not in (-1, shard):
                raise RelayError(f"{row.address} is being moved to shard {row.moving}; try again, or move the user back")
            if row.shard == shard and row.moving < 0:
                return row
            return msgspec.structs.replace(row, moving=shard)

        return await self._carry((await self._update(user.ident, change)).ident) or user

    async def _move_back(self, ident: int) -> User:
        """Give up a move whose copy is not complete: the user stays, and may be changed again."""
        async with self._steady:
            user = await asyncio.to_thread(self._directory.user, ident)
            if user is None or user.moving in (-1, user.shard):
                raise RelayError("the move has ended meanwhile")
            await self._owner("mail_purge", LONG, shard=user.moving, user=ident)
            await self._owner("mail_freeze", shard=user.shard, user=ident, frozen=False)
            return await self._update(ident, lambda row: msgspec.structs.replace(row, moving=-1))

    async def _carry(self, ident: int) -> User | None:
        async with self._until_done():
            user = await asyncio.to_thread(self._directory.user, ident)
            if user is None or user.moving < 0:
                return user
            if user.moving != user.shard:
                await self._owner("mail_freeze", shard=user.shard, user=ident)
                await self._owner("mail_purge", LONG, shard=user.moving, user=ident)
                await self._owner("mail_carry", LONG, shard=user.shard, user=ident, target=user.moving)
                user = await self._update(ident, lambda row: msgspec.structs.replace(row, shard=row.moving, moves=row.moves + 1))
            for shard in range(self._shards):
                if shard != user.shard:
                    await self._owner("mail_purge", LONG, shard=shard, user=ident)
            return await self._update(ident, lambda row: msgspec.structs.replace(row, moving=-1))

    def _remove_stale_backups(self) -> None:
        """Remove what the end of `relaymta mailbox backup` should have removed: it keeps segments from being used again."""
        for folder in self._folder.glob("backup-*"):
            with contextlib.suppress(OSError):
                if STAGED.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(folder)
