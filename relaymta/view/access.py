"""What the sessions of users ask of the mailboxes: who a user is, what a mailbox has now, a message in pieces. Changes go to the
owner of the user's shard; everything is read here, on reader threads.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import lmdb

from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.store.change import MISSING, Refusal
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.reading import Readable, body_of, pages
from relaymta.store.rows import INBOX, SEEN

__all__ = ["Access", "Inbox"]

THREADS = 4
PIECE = 256 << 10  # octets of a large message that are read together

T = TypeVar("T")


class Inbox(NamedTuple):
    """A snapshot of a user's INBOX: the messages in the order of their UIDs, with their sizes in octets."""

    mailbox: int
    uidvalidity: int
    uids: list[int]
    sizes: list[int]


class Access:
    """Used on the loop; what reads files runs on threads."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = mailboxes
        self._threads = ThreadPoolExecutor(THREADS, "view-reader")

    def close(self) -> None:
        """End the threads, once they have read what they read."""
        self._threads.shutdown(wait=False)

    def user(self, name: str) -> User | None:
        """The user who has logged in; None when no mail of such a user is kept here, or the user may not log in."""
        found = self._mailboxes.directory.owner(name)
        return found[0] if found is not None and not (found[0].disabled or found[0].deleted) else None

    def _shard(self, user: User) -> Readable:
        found = self._mailboxes.readable(user.shard)
        if found is None:
            raise StoreError(f"shard {user.shard} of the mailboxes cannot be read now")
        return found

    async def _read(self, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except lmdb.Error as error:
            raise StoreError(str(error)) from None

    async def inbox(self, user: User) -> Inbox:
        """The user's INBOX as it is now. StoreError, Refusal."""
        shard = self._shard(user)
        return await self._read(lambda: _inbox(shard, user.ident))

    async def left(self, user: User, mailbox: int, uids: list[int]) -> int:
        """How many of these messages are there. StoreError."""
        shard = self._shard(user)

        def count() -> int:
            with shard.rows.reading() as txn:
                index = shard.rows.index(txn, mailbox)
                return sum(index.get(uid) is not None for uid in uids)

        return await self._read(count)

    async def message(self, user: User, mailbox: int, uid: int) -> AsyncGenerator[bytes, None]:
        """A message in pieces: a large one is not in memory as a whole. Refusal when it is gone, StoreError when it cannot be
        read: both before the first piece; a large one's file that ends early: StoreError."""
        shard = self._shard(user)
        opening = asyncio.ensure_future(self._read(lambda: _opened(shard, mailbox, uid)))
        try:
            opened = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread still opens the file: close it then
            opening.add_done_callback(_close_opened)
            raise
        if opened.descriptor < 0:
            yield opened.prefix + opened.data
            return
        try:
            yield opened.prefix
            place, left = opened.start, opened.length
            while left:
                piece = await self._read(lambda: os.pread(opened.descriptor, min(PIECE, left), place))  # noqa: B023
                if not piece:
                    raise StoreError("a message ends early")
                place, left = place + len(piece), left - len(piece)
                yield piece
        finally:
            os.close(opened.descriptor)

    async def expunge(self, user: User, mailbox: int, uids: list[int]) -> None:
        """Remove messages. Errors as of `Mailboxes.change`."""
        await self._mailboxes.change(user.shard, "expunge", user.ident, mailbox, uids)

    async def see(self, user: User, mailbox: int, uids: list[int]) -> None:
        """Set \\Seen. Errors as of `Mailboxes.change`."""
        await self._mailboxes.change(user.shard, "flags", user.ident, mailbox, uids, add=SEEN, remove=0)


def _close_opened(opening: "asyncio.Future[_Opened]") -> None:
    if not opening.cancelled() and opening.exception() is None and opening.result().descriptor >= 0:
        os.close(opening.result().descriptor)


class _Opened(NamedTuple):
    """A message: its data, or (a large one) the descriptor of its file, where it begins and how long it is."""

    prefix: bytes
    data: bytes = b""
    descriptor: int = -1
    start: int = 0
    length: int = 0


def _inbox(shard: Readable, user: int) -> Inbox:
    with shard.rows.reading() as txn:
        row = shard.rows.mailbox(txn, user, INBOX)
        state = shard.rows.state(txn, row.mailbox) if row is not None else None
    if row is None or state is None:
        raise Refusal(MISSING, "there is no INBOX")
    found = [(record.uid, message.size) for page in pages(shard.rows, row.mailbox) for record, message in page]
    return Inbox(row.mailbox, state.uidvalidity, [uid for uid, _ in found], [size for _, size in found])


def _opened(shard: Readable, mailbox: int, uid: int) -> _Opened:
    with shard.rows.reading() as txn:
        message = shard.rows.message(txn, mailbox, uid)
        row = shard.rows.object(txn, message.object) if message is not None else None
    if message is None or row is None:
        raise Refusal(MISSING, "the message has been expunged")
    if row.body.segment:
        return _Opened(message.prefix, body_of(shard.rows, shard.bodies, message.object))
    descriptor = shard.bodies.open_big(message.object, row.body)
    return _Opened(message.prefix, b"", descriptor, row.body.offset + FRAME.size, row.body.length)
