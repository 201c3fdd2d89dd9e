"""What takes long, one at a time: users who are moved to another shard or removed, and backups.

Each step of a move is safe to end at, and is begun again after a restart, by what the directory says:

    moving = target           the user is frozen where it is; its copy in the target is removed and made anew
    shard = moving = target   the copy is complete, and all see it; what other shards have of the user is removed
    moving = -1               done
    deleted = REMOVING        all of the user is removed, last the row of the directory
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from relaymta.errors import RelayError
from relaymta.store.directory import Directory, User

__all__ = ["KEPT_DAYS", "REMOVING", "Upkeep"]

KEPT_DAYS = 7  # a deleted user, who may come back
REMOVING = 1  # User.deleted of one who does not come back
LOOK_SECONDS = 600.0  # between two looks for what is to be done
FIRST_SECONDS = 5.0  # from the start, and after a failure
LONG = 24 * 3600.0  # seconds for which a worker may copy or remove a user, or copy a shard
PAGE = 1000

Owner = Callable[..., Awaitable[Any]]


class Upkeep:
    """`owner(op, seconds, shard=..., ...)`: the answer of the worker that has a shard; `folder`: the mailboxes' in the spool."""

    def __init__(self, directory: Directory, owner: Owner, folder: Path, shards: int) -> None:
        self._directory = directory
        self._owner = owner
        self._folder = folder
        self._shards = shards
        self._steady = asyncio.Lock()  # held by whatever copies or removes
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
                await self._all()
                seconds = LOOK_SECONDS
            except (RelayError, OSError):  # a worker was not ready
                seconds = FIRST_SECONDS

    async def _all(self) -> None:
        expired = (time.time() - KEPT_DAYS * 86400) * 1000
        page = await asyncio.to_thread(self._directory.users, 0, PAGE)
        while page:
            for user in page:
                if user.deleted and user.deleted < expired:
                    await self._remove_expired(user.ident, expired)
                elif user.moving >= 0:
                    await self._carry(user.ident)
            page = await asyncio.to_thread(self._directory.users, page[-1].ident, PAGE)

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

    async def delete(self, address: str, now: bool) -> User:
        """Delete a user: nobody can send mail to the user or log in any more. `now`: the mail is removed at once, else after
        KEPT_DAYS. NoSuch; RelayError: an alias leads to the user, or the user is being moved."""
        user = await asyncio.to_thread(self._directory.known, address)
        leading = await asyncio.to_thread(self._directory.leading_to, user.ident)
        if leading:
            raise RelayError(f"{', '.join(leading)} would lead to nobody: change it first (`relaymta mailbox alias`)")

        def change(row: User) -> User:
            if row.moving >= 0:
                raise RelayError(f"{row.address} is being moved to shard {row.moving}; try again")
            since = row.deleted or time.time_ns() // 1_000_000
            return msgspec.structs.replace(row, deleted=REMOVING if now else since)

        user = await self._update(user.ident, change)
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
            for shard in range(self._shards):
                await self._owner("mail_purge", LONG, shard=shard, user=ident)
            await asyncio.to_thread(self._directory.remove, ident)

    # Moves

    async def move(self, address: str, shard: int) -> User:
        """Move a user, with all mail, to another shard; until it has ended, mail for the user is deferred. NoSuch, RelayError."""
        user = await asyncio.to_thread(self._directory.known, address)
        if not 0 <= shard < self._shards:
            raise RelayError(f"there is no shard {shard} (there are 0 to {self._shards - 1})")

        def change(row: User) -> User:
            if row.deleted:
                raise RelayError(f"{row.address} is deleted")
            if row.moving not in (-1, shard):
                raise RelayError(f"{row.address} is being moved to shard {row.moving}; try again")
            if row.shard == shard and row.moving < 0:
                raise RelayError(f"{row.address} is in shard {shard}")
            return msgspec.structs.replace(row, moving=shard)

        return await self._carry((await self._update(user.ident, change)).ident) or user

    async def _carry(self, ident: int) -> User | None:
        async with self._until_done():
            user = await asyncio.to_thread(self._directory.user, ident)
            if user is None or user.moving < 0:
                return user
            if user.moving != user.shard:
                await self._owner("mail_freeze", shard=user.shard, user=ident)
                await self._owner("mail_purge", LONG, shard=user.moving, user=ident)
                await self._owner("mail_carry", LONG, shard=user.shard, user=ident, target=user.moving)
                user = await self._update(ident, lambda row: msgspec.structs.replace(row, shard=row.moving))
            for shard in range(self._shards):
                if shard != user.shard:
                    await self._owner("mail_purge", LONG, shard=shard, user=ident)
            return await self._update(ident, lambda row: msgspec.structs.replace(row, moving=-1))

    # Backups

    async def back_up(self) -> str:
        """Copy all mailboxes, each shard as it is at one moment, to a folder in the spool, whose path is returned. RelayError."""
        async with self._steady:
            await asyncio.to_thread(self._remove_stale_backups)
            folder = self._folder / f"backup-{time.time_ns()}"
            try:
                # First: a user is added to a shard before the directory, and removed after it.
                await asyncio.to_thread(self._directory.copy, folder / "directory")
                for shard in range(self._shards):
                    await self._owner("mail_back_up", LONG, shard=shard, folder=str((folder / f"shard-{shard}").absolute()))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return str(folder.absolute())

    def _remove_stale_backups(self) -> None:
        for folder in self._folder.glob("backup-*"):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
