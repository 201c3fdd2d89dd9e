"""A shard of mailboxes against dicts: any changes of one owner, refused ones among them, bodies that move, and crashes, after
which a copy of the files is opened. After each opening, all that is in the shard is compared."""

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relaymta.disk import compact
from relaymta.store.change import CANNOT, EXISTS, MISSING, OVERQUOTA, Change, Limits, Refusal
from relaymta.store.rows import DELETED, INBOX, SEEN, SYSTEM_FLAGS, UserRow
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target
from tests.conftest import PROVE

NAMES = [INBOX, "Sent", "A/B", "x" * 500 + "1", "x" * 500 + "2"]
SIZES = [0, 10, 700, 3000]
LARGE = 10_000
QUOTA = 4  # messages, for those that have one

_which = st.integers(0, 9)
_place = st.tuples(_which, st.sampled_from(NAMES))
_filing = st.tuples(
    st.lists(_place, min_size=1, max_size=4),
    st.sampled_from(SIZES),
    st.sampled_from([0, SEEN, DELETED, SEEN | DELETED]),
    st.sampled_from([[], ["$Work"], ["$work", "Later"]]),
    st.booleans(),  # create what is missing
    st.booleans(),  # with a quota
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("file"), st.lists(_filing, min_size=1, max_size=6)),
        st.tuples(st.just("file"), st.lists(_filing, min_size=1, max_size=6)),
        st.tuples(st.just("large"), _filing),
        st.tuples(st.just("once"), st.lists(_which, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["again", "forget", "add user", "remove user"]), _which),
        st.tuples(st.just("expunge"), st.tuples(_place, st.sets(st.integers(1, 12), max_size=8))),
        st.tuples(st.sampled_from(["create", "remove"]), _place),
        st.tuples(st.just("fail"), _filing),
        st.tuples(st.sampled_from(["compact", "crash", "restart"]), st.none()),
    ),
    min_size=10,
    max_size=40,
)


@dataclass
class Box:
    uidvalidity: int
    uidnext: int = 1
    modseq: int = 1
    keywords: list[str] = field(default_factory=list)
    messages: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # UID: flags, text
    expunged: list[tuple[int, list[int]]] = field(default_factory=list)  # MODSEQ, UIDs

    def add(self, flags: int, keywords: list[str], text: bytes) -> tuple[int, int]:
        for word in keywords:
            if word.lower() not in map(str.lower, self.keywords):
                self.keywords.append(word)
            flags |= 1 << SYSTEM_FLAGS + list(map(str.lower, self.keywords)).index(word.lower())
        self.messages[self.uidnext] = flags, text
        self.uidnext, self.modseq = self.uidnext + 1, self.modseq + 1
        return self.uidnext - 1, self.modseq

    def expunge(self, uids: list[int]) -> int:
        there = [uid for uid in uids if self.messages.pop(uid, None) is not None]
        if there:
            self.modseq += 1
            self.expunged.append((self.modseq, there))
        return self.modseq if there else 0


@dataclass
class User:
    uidvalidity: int  # of the next mailbox
    boxes: dict[str, Box] = field(default_factory=dict)
    subscribed: set[str] = field(default_factory=set)  # names without a mailbox

    def create(self, name: str, subscribed: bool) -> Box:
        box = self.boxes[name] = Box(self.uidvalidity)
        self.uidvalidity += 1
        if subscribed:
            self.subscribed.add(name)
        return box

    @property
    def messages(self) -> int:
        return sum(len(box.messages) for box in self.boxes.values())


class World:
    """A shard and its model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.openings = folder, 0
        self.left: list[Shard] = []  # by crashes
        self.users: dict[int, User] = {}
        self.done: set[tuple[int, int, int]] = set()
        self.asked: list[tuple[int, list[int]]] = []  # queue ids, and the users of their recipients
        self.texts = self.added = 0

    async def open(self) -> None:
        self.openings += 1
        self.shard = Shard(self.folder / str(self.openings), 0)
        self.shard.segments.size = 1 << 13
        self.shard.segments.big_limit = LARGE // 2
        await self.shard.start()
        self.check()

    async def restart(self, _: None) -> None:
        await self.shard.stop()
        self.openings -= 1
        await self.open()

    async def crash(self, _: None) -> None:
        """Leave the shard as it is, and go on with a copy."""
        while self.shard.writer._busy or self.shard.writer._pending:
            await asyncio.sleep(0.001)
        shutil.copytree(self.shard.path.parent, self.folder / str(self.openings + 1))
        self.left.append(self.shard)
        await self.open()

    async def end(self) -> None:
        self.check()
        for shard in (self.shard, *self.left):
            await shard.stop()

    async def compact(self, _: None) -> None:
        """Move what is in the emptiest segment."""
        compactor = self.shard._compactor
        compactor._pause = 0
        compactor.tick()
        while compactor._busy:
            await asyncio.sleep(0.001)

    # Mail

    def _user(self, which: int) -> int:
        return sorted(self.users)[which % len(self.users)] if self.users else 0

    def _text(self, size: int) -> bytes:
        self.texts += 1
        return b"%d " % self.texts + b"x" * size

    async def file(self, filings: list[Any]) -> None:
        """Several messages at once."""
        specs = [(self._text(size), self._targets(*rest, places)) for places, size, *rest in filings]
        results = await asyncio.gather(*(self.shard.file([text], targets) for text, targets in specs))
        for (text, targets), found in zip(specs, results, strict=True):
            for target, result in zip(targets, found, strict=True):
                self._compare(target, result, text)

    async def large(self, filing: Any) -> None:
        places, _, *rest = filing
        await self.file([(places, LARGE, *rest)])

    def _targets(self, flags: int, keywords: list[str], create: bool, quota: bool, places: list[tuple[int, str]]) -> list[Target]:
        limits = Limits(messages=QUOTA) if quota else Limits()
        return [
            Target(user, name, b"To: %d\r\n" % user, flags, keywords, 0, limits, create)
            for user, name in ((self._user(which), name) for which, name in places)
        ]

    def _compare(self, target: Target, result: Any, text: bytes) -> None:
        """What became of a message for one target, and what should have."""
        user = self.users.get(target.user)
        if target.once in self.done:
            assert (result.filed, result.code) == (None, "")
        elif user is None:
            assert result.code == MISSING
        elif target.limits.messages and user.messages >= target.limits.messages:
            assert result.code == OVERQUOTA
        elif target.name not in user.boxes and not target.create:
            assert result.code == MISSING
        else:
            box = user.boxes.get(target.name) or user.create(target.name, subscribed=True)
            uid, modseq = box.add(target.flags, target.keywords, target.prefix + text)
            assert result.filed is not None and result.filed[1:] == (box.uidvalidity, uid, modseq)
            if target.once is not None:
                self.done.add(target.once)

    async def once(self, which: list[int]) -> None:
        """A message of the queue."""
        self.asked.append((len(self.asked) + 1, [self._user(one) for one in which]))
        await self.again(len(self.asked) - 1)

    async def again(self, which: int) -> None:
        if self.asked:
            queue_id, users = self.asked[which % len(self.asked)]
            text, targets = self._text(5), [Target(user, once=(queue_id, n, user)) for n, user in enumerate(users)]
            for target, result in zip(targets, await self.shard.file([text], targets), strict=True):
                self._compare(target, result, text)

    async def forget(self, which: int) -> None:
        if self.asked:
            queue_id, users = self.asked[which % len(self.asked)]
            self.shard.forget(queue_id, list(range(len(users))))
            await self.shard.task(lambda change: None)
            self.done = {row for row in self.done if row[0] != queue_id}

    # Changes

    async def add_user(self, _: int) -> None:
        self.added += 1
        user = self.users[self.added] = User(1000 * self.added)
        await self.shard.task(lambda change: change.add_user(self.added, [("Sent", "\\Sent")], 1000 * self.added))
        for name in (INBOX, "Sent"):
            user.create(name, subscribed=True)

    async def remove_user(self, which: int) -> None:
        number = self._user(which)

        await self.shard.purge(number)  # of a user who is not there, nothing
        self.users.pop(number, None)

    async def _refused(self, code: str, change: Any) -> None:
        with pytest.raises(Refusal) as refused:
            await self.shard.task(change)
        assert refused.value.code == code

    async def create(self, place: tuple[int, str]) -> None:
        number, name = self._user(place[0]), place[1]
        user = self.users.get(number)
        change = lambda change: change.create_mailbox(number, name)  # noqa: E731
        if user is None or name in user.boxes:
            await self._refused(EXISTS if user else MISSING, change)
        else:
            await self.shard.task(change)
            user.create(name, subscribed=False)

    async def remove(self, place: tuple[int, str]) -> None:
        """Remove a mailbox: refused while it has messages."""
        number, name = self._user(place[0]), place[1]
        box = self.users[number].boxes.get(name) if self.users else None
        change = lambda change: change.remove_mailbox(number, name)  # noqa: E731
        if box is None or box.messages:
            await self._refused(CANNOT if box else MISSING, change)
        else:
            await self.shard.task(change)
            del self.users[number].boxes[name]

    async def expunge(self, what: tuple[tuple[int, str], set[int]]) -> None:
        number, name, uids = self._user(what[0][0]), what[0][1], sorted(what[1])
        box = self.users[number].boxes.get(name) if self.users else None
        if box is not None:
            with self.shard.rows.reading() as txn:
                row = self.shard.rows.mailbox(txn, number, name)
            assert row is not None
            assert await self.shard.task(lambda change: change.expunge(number, row.mailbox, uids)) == box.expunge(uids)

    async def fail(self, filing: Any) -> None:
        """A task that changes much, and fails then, in one group with a message."""

        def run(change: Change) -> None:
            for number in self.users:
                for row in list(self.shard.rows.mailboxes(change.txn, number)):
                    if row.mailbox:
                        uids = [record.uid for record in self.shard.rows.index(change.txn, row.mailbox)]
                        change.expunge(number, row.mailbox, uids)
                        change.remove_mailbox(number, row.name)
                change.create_mailbox(number, "new")
            raise ZeroDivisionError

        places, size, *rest = filing
        text, targets = self._text(size), self._targets(*rest, places)
        found, failed = await asyncio.gather(self.shard.file([text], targets), self.shard.task(run), return_exceptions=True)
        assert isinstance(failed, ZeroDivisionError)
        for target, result in zip(targets, found, strict=True):
            self._compare(target, result, text)

    # Comparing

    def check(self) -> None:
        """All of the shard is as the model says."""
        shard, rows = self.shard, self.shard.rows
        assert list(contradictions(rows, shard.segments)) == []
        texts = set()
        with rows.reading() as txn:
            assert [number for number, _ in rows.users(txn)] == sorted(self.users)
            assert set(self._done(txn)) == self.done
            for number, user in self.users.items():
                found = {row.name: row for row in rows.mailboxes(txn, number)}
                assert {name for name, row in found.items() if row.mailbox} == user.boxes.keys()
                assert {name for name, row in found.items() if row.subscribed} == user.subscribed
                octets = 0
                for name, box in user.boxes.items():
                    octets += self._check_box(txn, found[name].mailbox, box)
                    texts |= {text.partition(b"\r\n")[2] or text for _, text in box.messages.values()}
                assert rows.user(txn, number) == UserRow(octets, user.messages, user.uidvalidity)
            objects = list(rows.objects(txn))
        assert len(objects) == len(texts)
        assert {ident for ident, _ in shard.segments.big_files()} == {ident for ident, row in objects if not row.body.segment}

    def _done(self, txn: Any) -> list[tuple[int, int, int]]:
        every = [(queue_id, n, user) for queue_id, users in self.asked for n, user in enumerate(users)]
        found = [row for row in every if self.shard.rows.is_done(txn, *row)]
        assert txn.stat(self.shard.rows.tables["done"])["entries"] == len(found)
        return found

    def _check_box(self, txn: Any, mailbox: int, box: Box) -> int:
        """Compare a mailbox; the octets of its messages."""
        shard, rows = self.shard, self.shard.rows
        state = rows.state(txn, mailbox)
        assert state is not None
        assert (state.uidvalidity, state.uidnext, state.modseq) == (box.uidvalidity, box.uidnext, box.modseq)
        assert state.keywords == box.keywords
        flags = {record.uid: record.flags for record in rows.index(txn, mailbox)}
        assert flags == {uid: bits for uid, (bits, _) in box.messages.items()}
        found = dict(rows.messages(txn, mailbox))
        for uid, (_, text) in box.messages.items():
            row, stored = found[uid], rows.object(txn, found[uid].object)
            assert stored is not None and row.prefix + shard.segments.read(row.object, stored.body) == text
            assert row.size == len(text)
        expunged = [
            (modseq, [uid for first, last in runs for uid in range(first, last + 1)])
            for modseq, runs in rows.expunged(txn, mailbox)
        ]
        assert expunged == box.expunged
        return sum(len(text) for _, text in box.messages.values())


@given(STEPS)
@settings(
    max_examples=400 if PROVE else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
async def test_a_shard_is_what_dicts_say(memory_path, steps):
    folder = Path(tempfile.mkdtemp(dir=memory_path))
    world = World(folder)
    spare, compact.SPARE = compact.SPARE, 0
    try:
        await world.open()
        for _ in range(2):
            await world.add_user(0)
        for what, about in steps:
            await getattr(world, what.replace(" ", "_"))(about)
        await world.crash(None)
        await world.end()
    finally:
        compact.SPARE = spare
        shutil.rmtree(folder)
