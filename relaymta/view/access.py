"""What the sessions of users ask of the mailboxes: who a user is, what a mailbox has now, a message in pieces. Changes go to the
owner of the user's shard; everything is read here, on reader threads.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

import lmdb

from relaymta.disk.environment import Shut
from relaymta.disk.segments import FRAME, Corrupt, check_frame, open_verified
from relaymta.errors import StoreError
from relaymta.proto.address import comparable
from relaymta.proto.envelope import Body
from relaymta.proto.imap_records import RECORD
from relaymta.proto.imap_uids import Shared
from relaymta.store.change import MISSING, Refusal
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.reading import Readable, body_of, pages
from relaymta.store.rows import INBOX, SEEN, MessageRow, ObjectRow, UserRow
from relaymta.view.reading import TooMuch, records

__all__ = ["Access", "Inbox", "OpenSession"]

THREADS, SEARCHERS, WORKERS = 4, 2, 1  # that read, that search, and for what takes long
ARRANGED = 1  # SORT and THREAD commands of large mailboxes at a time: each has some hundred octets of every message in memory
FEW = 20_000  # messages of a mailbox that is sorted at any time
PIECE = 256 << 10  # octets of a large message that are read together
SLICE = 64 << 10  # octets that are sent together: what TLS has been given it keeps, encrypted, until the client reads
PAGE = 2000  # index records of one read transaction
RECORDS_ON_LOOP = 5000  # index records that are read on the loop: some 0.1 ms
RECORDS_MOST = 1 << 40
ROW = 20  # how many index records are read while a message's row is
LIGHT = 256 << 10  # octets of a message that are read and verified on the loop, where they are in memory
CLAIMED_MOST = 10_000  # mailboxes

T = TypeVar("T")


class Inbox(NamedTuple):
    """A snapshot of a user's INBOX: the messages in the order of their UIDs, with their sizes in octets."""

    mailbox: int
    uidvalidity: int
    uids: list[int]
    sizes: list[int]


class OpenSession(Protocol):
    """The session of a user who has logged in. `owner`: the user's id; `gone`: it has ended, or is about to."""

    @property
    def owner(self) -> int: ...

    @property
    def gone(self) -> bool: ...

    def shown(self) -> dict[str, Any]:
        """What operators see of it."""

    def disconnect(self) -> None:
        """End it: at once, or once the command under way has ended."""


class Access:
    """Used on the loop; what reads files runs on threads. `shared`: the UIDs of mailboxes that sessions have selected;
    `sessions`, `open`: changed by `connection.py` alone."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = mailboxes
        self._threads = ThreadPoolExecutor(THREADS, "view-reader")
        self._searchers = ThreadPoolExecutor(SEARCHERS, "view-search")
        self._workers = ThreadPoolExecutor(WORKERS, "view-work")
        self.shared = Shared()
        self.sessions: Counter[str] = Counter()  # that have logged in, by protocol
        self.open: dict[OpenSession, None] = {}  # these, in the order of their logins
        self._turns: WeakValueDictionary[tuple[str, int], asyncio.Lock] = WeakValueDictionary()
        self._arranged = asyncio.Semaphore(ARRANGED)
        self._claimed: dict[tuple[int, int], int] = {}  # up to which UID messages of a mailbox are \\Recent to nobody any more

    def close(self) -> None:
        """End the threads, once they have read what they read."""
        self._threads.shutdown(wait=False)
        self._searchers.shutdown(wait=False)
        self._workers.shutdown(wait=False)

    def user(self, name: str) -> User | None:
        """The user who has logged in; None when no mail of such a user is kept here, or the user may not log in. A catch-all is
        nobody's name."""
        found = None if comparable(name).startswith("@") else self._mailboxes.directory.owner(name)
        return found[0] if found is not None and not (found[0].disabled or found[0].deleted) else None

    def stayed(self, user: User) -> User | None:
        """The user as the directory has it now; None: that is another one, may not be here any more, or has been moved since
        `user` was looked up."""
        now = self.user(user.address)
        return now if now is not None and (now.ident, now.moves) == (user.ident, user.moves) else None

    def check_stayed(self, user: User) -> None:
        """Behind what was read of a user. StoreError where the user has not `stayed`: some of it may have been gone already."""
        if self.stayed(user) is None:
            raise StoreError(f"{user.address} has been moved")

    def shard(self, user: User) -> Readable:
        """The shard in which a user's mail is. StoreError: it cannot be read now."""
        return self._mailboxes.reading(user.shard)

    def read_here(self, function: Callable[[], T]) -> T:
        """The result of a function that reads little, on the loop. As `read`."""
        try:
            return function()
        except lmdb.Error as error:
            raise StoreError(str(error)) from None

    async def read_little(self, function: Callable[[], T]) -> T:
        """As `read_here`; where the store is being opened again, as `read`."""
        try:
            return self.read_here(function)
        except Shut:
            return await self.read(function)

    async def read_some(self, function: Callable[[int], T], user: User | None = None) -> T:
        """The result of a function that reads index records, as of reading.py: on the loop where they are few. As `read`; or,
        for a user, as `work`."""
        try:
            return function(RECORDS_ON_LOOP)
        except (TooMuch, Shut):
            everything = partial(function, RECORDS_MOST)
            return await (self.read(everything) if user is None else self.work(user, everything))
        except lmdb.Error as error:
            raise StoreError(str(error)) from None

    async def read(self, function: Callable[[], T]) -> T:
        """The result of a function that reads much, on a reader thread. StoreError where LMDB fails, and what it raises."""
        return await self._run(self._threads, function)

    async def work(self, user: User, function: Callable[[], T]) -> T:
        """As `read`, of what takes long: not on the threads that all readers wait for, and one of a user at a time."""
        async with self._turn("work", user):
            return await self._run(self._workers, function)

    async def search(self, user: User, function: Callable[[], T]) -> T:
        """As `read`, for a slice of a user's SEARCH: on threads of their own, so that nobody waits for them to read a message,
        and one of each user at a time, so that others wait for one of the user's searches, however many there are."""
        async with self._turn("search", user):
            return await self._run(self._searchers, function)

    @asynccontextmanager
    async def arranging(self, user: User, messages: int) -> AsyncIterator[None]:
        """While a SORT or THREAD of a mailbox of so many messages collects them: of large ones ARRANGED at a time, and one of
        each user."""
        if messages <= FEW:
            yield
            return
        async with self._turn("arrange", user), self._arranged:
            yield

    def _turn(self, what: str, user: User) -> asyncio.Lock:
        """What a user does one at a time; kept while it is held or waited for."""
        return self._turns.setdefault((what, user.ident), asyncio.Lock())

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, function)
        except lmdb.Error as error:
            raise StoreError(str(error)) from None

    async def inbox(self, user: User) -> Inbox:
        """The user's INBOX as it is now. StoreError, Refusal."""
        shard = self.shard(user)
        found = await self.read_some(lambda most: _inbox(shard, user.ident, most), user)
        self.check_stayed(user)
        return found

    async def left(self, user: User, mailbox: int, uids: list[int]) -> int:
        """How many of these messages (one at least, UIDs in order) are there. StoreError; Refusal: the mailbox is gone."""
        shard = self.shard(user)
        return await self.work(user, lambda: _left(shard, mailbox, uids))

    async def message(self, user: User, mailbox: int, uid: int, whole: bool = True) -> AsyncGenerator[bytes, None]:
        """A message in pieces of SLICE octets: a large one is not in memory as a whole, and no descriptor is held between the
        pieces. `whole`: all of it is wanted, so that it is verified first. Refusal when it is gone, StoreError when it cannot be
        read: both before the first piece; a large one's file that ends early, or is gone meanwhile: StoreError."""
        shard = self.shard(user)
        found = await self.read_little(lambda: _found_now(shard, mailbox, uid))
        if found is None:
            found = await self.read(lambda: _found(shard, mailbox, uid, whole))
        for piece in _slices(found.data):
            yield piece
        place, left = found.start, found.length
        while left:
            data = await self.read(lambda: _read_at(found.path, min(PIECE, left), place))  # noqa: B023
            if not data:
                raise StoreError("a message ends early")
            place, left = place + len(data), left - len(data)
            for piece in _slices(data):
                yield piece

    async def expunge(self, user: User, mailbox: int, uids: list[int]) -> None:
        """Remove messages. Errors as of `Mailboxes.change`."""
        await self.change(user, "expunge", mailbox, uids)

    async def unseen(self, user: User, mailbox: int, uids: list[int]) -> list[int]:
        """Those of these messages (UIDs in order) that are there and do not have \\Seen. StoreError."""
        shard = self.shard(user)
        return await self.read_some(lambda most: _unseen(shard, mailbox, uids, most))

    async def see(self, user: User, mailbox: int, uids: list[int]) -> None:
        """Set \\Seen. Errors as of `Mailboxes.change`."""
        await self.change(user, "store_flags", mailbox, uids, "+", SEEN, [], None)

    async def change(self, user: User, what: str, *args: Any) -> Any:
        """What an IMAP session changes (`store.mailboxes.CHANGES`), by the owner of the user's shard. Errors as of
        `Mailboxes.change`."""
        if user.shard not in self._mailboxes.shards:
            await asyncio.sleep(0)  # what waits for a peer with a time-out has to be a task (accept/eager.py)
        return await self._mailboxes.change(user.shard, what, user.ident, *args)

    @property
    def version(self) -> int:
        """As of Directory."""
        return self._mailboxes.directory.version

    def used(self, user: User) -> UserRow:
        """What a user has used. StoreError."""
        found = self._mailboxes.used(user.shard, user.ident)
        if found is None:
            raise StoreError("the quota cannot be read now")
        return found

    def watch(self, user: User, mailbox: int, told: Callable[[int], None]) -> Callable[[], None]:
        """As `Mailboxes.watch`."""
        return self._mailboxes.watch(user.shard, mailbox, told)

    async def claim_recent(self, user: User, mailbox: int, behind: int, until: int, keep: bool = False) -> int:
        """As `Shard.claim_recent`, without asking the owner for messages of which a session of this process was told."""
        key = user.shard, mailbox
        if self._claimed.get(key, 0) >= until:
            return until
        first: int = await self.change(user, "claim_recent", mailbox, behind, until, keep)
        if not keep and (first < until or not behind):
            if len(self._claimed) >= CLAIMED_MOST:
                self._claimed.clear()
            self._claimed[key] = until
        return first


class _Found(NamedTuple):
    """A message: its data; of a large one the prefix, its file, and where in that the rest begins and how long it is."""

    data: bytes
    path: Path = Path()
    start: int = 0
    length: int = 0


def _inbox(shard: Readable, user: int, most: int) -> Inbox:
    """TooMuch: there are more messages than may be looked up there, each of which has a row of its own."""
    with shard.rows.reading() as txn:
        row = shard.rows.mailbox(txn, user, INBOX)
        state = shard.rows.state(txn, row.mailbox) if row is not None else None
    if row is None or state is None:
        raise Refusal(MISSING, "there is no INBOX")
    if state.messages * ROW > most:
        raise TooMuch
    found = [(record.uid, message.size) for page in pages(shard.rows, row.mailbox) for record, message in page]
    return Inbox(row.mailbox, state.uidvalidity, [uid for uid, _ in found], [size for _, size in found])


def _left(shard: Readable, mailbox: int, uids: list[int]) -> int:
    wanted, count, after = set(uids), 0, uids[0] - 1
    while True:
        with shard.rows.reading() as txn:
            if shard.rows.state(txn, mailbox) is None:
                raise Refusal(MISSING, "the mailbox is gone")
            page = list(islice(shard.rows.index(txn, mailbox).range(after + 1, uids[-1]), PAGE))
        if not page:
            return count
        count += sum(record.uid in wanted for record in page)
        after = page[-1].uid


def _slices(data: bytes) -> Iterator[bytes]:
    return (data[start : start + SLICE] for start in range(0, len(data), SLICE))


def _unseen(shard: Readable, mailbox: int, uids: list[int], most: int) -> list[int]:
    if len(uids) * ROW > most:
        raise TooMuch
    ranges = b"".join(uid.to_bytes(4, "little") * 2 for uid in uids)
    return [uid for uid, _, flags, _ in RECORD.iter_unpack(records(shard, mailbox, ranges)) if not flags & SEEN]


def _there(shard: Readable, mailbox: int, uid: int) -> tuple[MessageRow, ObjectRow]:
    """The rows of a message. Refusal when it is gone."""
    with shard.rows.reading() as txn:
        message = shard.rows.message(txn, mailbox, uid)
        row = shard.rows.object(txn, message.object) if message is not None else None
    if message is None or row is None:
        raise Refusal(MISSING, "the message has been expunged")
    return message, row


def _found_now(shard: Readable, mailbox: int, uid: int) -> _Found | None:
    """As `_found`, on the loop; None where something would have to be waited for, or take long."""
    message, row = _there(shard, mailbox, uid)
    if not row.body.segment or row.body.length > LIGHT:
        return None
    data = shard.bodies.read_now(message.object, row.body)
    return None if data is None else _Found(message.prefix + data if message.prefix else data)


def _found(shard: Readable, mailbox: int, uid: int, whole: bool) -> _Found:
    message, row = _there(shard, mailbox, uid)
    if row.body.segment:
        return _Found(message.prefix + body_of(shard.rows, shard.bodies, message.object))
    path = shard.bodies.big_path(message.object)
    if whole:
        os.close(open_verified(path, message.object, row.body))
    else:
        _check_header(path, message.object, row.body)
    return _Found(message.prefix, path, row.body.offset + FRAME.size, row.body.length)


def _check_header(path: Path, ident: int, body: Body) -> None:
    """As `open_verified`, without reading the data. Corrupt, StoreError."""
    raw = _read_at(path, FRAME.size, body.offset)
    if len(raw) != FRAME.size:
        raise Corrupt(f"the body of {ident:016x} is cut short")
    check_frame(raw, ident, body, body.length, FRAME.unpack(raw)[-1])


def _read_at(path: Path, size: int, place: int) -> bytes:
    """Octets of a file that is open only meanwhile: a client that does not read its message holds no descriptor. StoreError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, size, place)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(f"cannot read the body of {path.name}: {error}") from error
