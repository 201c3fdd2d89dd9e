"""Random work of the owner of a shard of mailboxes, which tells a ledger what it asks for and what it was answered."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from relaymta.disk.segments import MEGABYTE
from relaymta.errors import StoreError
from relaymta.store import appending, names, sessions
from relaymta.store.asked import Copied, Message, Partial
from relaymta.store.change import Change, Limits, Refusal
from relaymta.store.rows import DELETED, INBOX, SEEN
from relaymta.store.shard import Shard
from relaymta.store.writer import Result, Target
from tests.store.ledger import digest_of

__all__ = ["Work", "use_small_slices"]

NAMES = [INBOX, "Sent", "Archive/2026", "/".join(["n" * 200] * 3)]
SIZES = [10, 300, 3000, 6000]
LARGE = MEGABYTE + 5000
SLICE = 4


def use_small_slices() -> None:
    """In a process of its own: what concerns many messages is done a few at a time."""
    sessions.SLICE = appending.SLICE = SLICE
    sessions.AGAIN_SECONDS = 0.05


class Work:
    """`tell(word, ...)`: a fact (ledger.py). `large`: the share of messages with a file of their own. StoreErrors are counted in
    `refused`; every other exception is a defect."""

    def __init__(self, shard: Shard, chance: random.Random, tell: Callable[..., None], large: float = 0.02) -> None:
        self.shard = shard
        self.chance = chance
        self.tell = tell
        self.large = large
        self.users: list[int] = []
        self.refused: list[StoreError] = []
        self.acknowledged = 0
        self._known: dict[tuple[int, int], str] = {}  # the digest of each (mailbox, UID) that was acknowledged
        self._asked: list[tuple[int, list[tuple[int, str]]]] = []  # queue ids, and the places of their recipients

    async def some(self, count: int) -> None:
        """So many operations at once."""
        verbs = self.chance.choices(
            [self.file, self.file_once, self.append, self.copy, self.expunge, self.create, self.remove, self.forget],
            [10, 4, 2, 4, 6, 1, 1, 1],
            k=count,
        )  # fmt: skip
        await asyncio.gather(*(verb() for verb in verbs))

    async def _done(self, change: Callable[[Change], Any]) -> Any:
        """The result of a task; None when it was refused."""
        try:
            found = await self.shard.task(change)
        except Refusal:
            return None
        except StoreError as error:
            self.refused.append(error)
            return None
        self.acknowledged += 1
        return found

    async def add_user(self, user: int) -> None:
        """Add a user with INBOX."""
        added = await self._done(lambda change: change.add_user(user, [], 1_700_000_000) or True)
        if added:
            self.users.append(user)
            self._tell_mailbox(user, INBOX)

    def _tell_mailbox(self, user: int, name: str) -> None:
        rows = self.shard.rows
        with rows.reading() as txn:
            row = rows.mailbox(txn, user, name)
            state = rows.state(txn, row.mailbox) if row is not None and row.mailbox else None
        if row is not None and state is not None:  # it may have been removed by now
            self.tell("mailbox", user, name, row.mailbox, state.uidvalidity)

    def _data(self) -> bytes:
        size = LARGE if self.chance.random() < self.large else self.chance.choice(SIZES)
        return self.chance.randbytes(size)

    def _places(self) -> list[tuple[int, str]]:
        return [(self.chance.choice(self.users), self.chance.choice(NAMES)) for _ in range(self.chance.randint(1, 4))]

    async def file(self) -> None:
        """File a message in some mailboxes; those that are missing are created half of the time."""
        places = self._places()
        create = self.chance.random() < 0.5
        targets = [
            Target(user, name, prefix=b"X-User: %d\r\n" % user, flags=self.chance.choice((0, SEEN, DELETED)), create=create)
            for user, name in places
        ]
        await self._file(self._data(), targets)

    async def file_once(self) -> None:
        """File a message of the queue, or ask for one again that was asked for before."""
        if self._asked and self.chance.random() < 0.3:
            queue_id, places = self.chance.choice(self._asked)
        else:
            queue_id, places = self.chance.getrandbits(60), [(user, INBOX) for user, _ in self._places()]
            self._asked.append((queue_id, places))
        targets = [Target(user, name, once=(queue_id, place, user)) for place, (user, name) in enumerate(places)]
        await self._file(random.Random(queue_id).randbytes(200), targets)

    async def _file(self, data: bytes, targets: list[Target]) -> list[Result]:
        digest = digest_of(data)
        self.tell("offered", [digest])
        try:
            results = await self.shard.file([data[:100], data[100:]], targets)
        except StoreError as error:
            self.refused.append(error)
            return []
        self.acknowledged += 1
        for target, result in zip(targets, results, strict=True):
            if result.filed is not None:
                self._filed(target.user, target.name, list(result.filed), digest)
            if target.once is not None and not result.code:
                self.tell("done", *target.once)
        return results

    def _filed(self, user: int, name: str, place: list[int], digest: str) -> None:
        mailbox, _, uid, _ = place
        self._known[mailbox, uid] = digest
        self.tell("filed", user, name, place, digest)

    async def append(self) -> None:
        """Append a few messages to a mailbox, all or none."""
        found = self._some_mailbox()
        if found is None:
            return
        user, name, _ = found
        messages = [Message(self._data()) for _ in range(self.chance.randint(2, 2 * SLICE))]
        digests = [digest_of(message.data) for message in messages if isinstance(message.data, bytes)]
        self.tell("offered", digests)
        appended = await self._moved(self.shard.append(user, name, messages, Limits()))
        if appended is not None:
            for uid, digest in zip(appended.copies, digests, strict=True):
                self._filed(user, name, [appended.mailbox, appended.uidvalidity, uid, 0], digest)

    async def copy(self) -> None:
        """Copy or move some messages to another mailbox, or the same."""
        found = self._some_mailbox()
        if found is None:
            return
        user, _, mailbox = found
        name, move = self.chance.choice(NAMES), self.chance.random() < 0.6
        with self.shard.rows.reading() as txn:
            uids = [record.uid for record in self.shard.rows.index(txn, mailbox)]
        known = [uid for uid in uids if (mailbox, uid) in self._known]
        uids = sorted(self.chance.sample(known, min(len(known), self.chance.randint(1, 3 * SLICE))))
        if move:
            self.tell("expunged?", mailbox, uids)
        copied = await self._moved(self.shard.copy(user, mailbox, uids, name, Limits(), move))
        if copied is not None:
            for source, uid in zip(copied.sources, copied.copies, strict=True):
                self._filed(user, name, [copied.mailbox, copied.uidvalidity, uid, 0], self._known[mailbox, source])
            if move:
                self.tell("expunged", mailbox, copied.sources, 0)

    async def _moved(self, call: Awaitable[Copied]) -> Copied | None:
        """The result of a copy, or of the part of a move that was done; None when it was refused."""
        try:
            copied = await call
        except Partial as stopped:
            return stopped.copied
        except Refusal:
            return None
        except StoreError as error:
            self.refused.append(error)
            return None
        self.acknowledged += 1
        return copied

    async def expunge(self) -> None:
        """Expunge half of a mailbox's messages."""
        found = self._some_mailbox()
        if found is None:
            return
        user, _, mailbox = found
        with self.shard.rows.reading() as txn:
            uids = [record.uid for record in self.shard.rows.index(txn, mailbox) if self.chance.random() < 0.5]
        self.tell("expunged?", mailbox, uids)
        modseq = await self._done(lambda change: change.expunge(user, mailbox, uids))
        if modseq is not None:
            self.tell("expunged", mailbox, uids, modseq)

    def _some_mailbox(self) -> tuple[int, str, int] | None:
        user, name = self.chance.choice(self.users), self.chance.choice(NAMES)
        with self.shard.rows.reading() as txn:
            row = self.shard.rows.mailbox(txn, user, name)
        return (user, name, row.mailbox) if row is not None and row.mailbox else None

    async def create(self) -> None:
        """Create a mailbox, unless it is there."""
        user, name = self.chance.choice(self.users), self.chance.choice(NAMES)
        if await self._done(lambda change: change.create_mailbox(user, name)) is not None:
            self._tell_mailbox(user, name)

    async def remove(self) -> None:
        """Remove a mailbox that is not INBOX, with all that is in it."""
        found = self._some_mailbox()
        if found is None or found[1] == INBOX:
            return
        user, name, mailbox = found

        def run(change: Change) -> bool:
            row = self.shard.rows.mailbox(change.txn, user, name)
            if row is None or row.mailbox != mailbox:
                return False
            assert not names.delete(change, user, name, 1 << 30)
            return True

        self.tell("removed?", mailbox)
        if await self._done(run):
            self.tell("removed", mailbox)

    async def forget(self) -> None:
        """The queue has ended a message that it had asked for."""
        if self._asked:
            queue_id, places = self._asked.pop(self.chance.randrange(len(self._asked)))
            self.tell("forgotten?", queue_id)
            self.shard.forget(queue_id, list(range(len(places))))
