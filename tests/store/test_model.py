"""A shard of mailboxes against dicts: any changes of one owner, refused ones among them, bodies that move, and crashes, after
which a copy of the files is opened. After each opening, all that is in the shard is compared."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relaymta.disk import compact
from relaymta.proto.imap_records import RECORD
from relaymta.store import appending, sessions
from relaymta.store.asked import Message
from relaymta.store.change import CANNOT, EXISTS, MISSING, OVERQUOTA, Change, Limits, Refusal
from relaymta.store.rows import DELETED, INBOX, SEEN, UserRow
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target
from tests.conftest import PROVE
from tests.store.model import SLICE, Box, User
from tests.store.sessions import assert_kept, settled

NAMES = [INBOX, "Sent", "A/B", f"{'x' * 250}/{'x' * 250}1", f"{'x' * 250}/{'x' * 250}2"]
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
_names = st.sampled_from(["Sent", "A", "A/B", "A/B/C", "D", "D/B", INBOX])
_uids = st.sets(st.integers(1, 12), max_size=10).map(sorted)
_flags = st.sampled_from([0, SEEN, DELETED, SEEN | DELETED])
_words = st.sampled_from([[], ["$Work"], ["$work", "Later"], ["later"]])
_since = st.one_of(st.none(), st.none(), st.integers(1, 12))
_appended = st.tuples(st.sampled_from([*SIZES, LARGE]), _flags, _words)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("file"), st.lists(_filing, min_size=1, max_size=6)),
        st.tuples(st.just("file"), st.lists(_filing, min_size=1, max_size=6)),
        st.tuples(st.just("large"), _filing),
        st.tuples(st.just("once"), st.lists(_which, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["again", "forget", "add user", "remove user"]), _which),
        st.tuples(st.just("expunge"), st.tuples(_place, st.sets(st.integers(1, 12), max_size=8))),
        st.tuples(st.just("create"), _place),
        st.tuples(st.just("fail"), _filing),
        st.tuples(st.just("store"), st.tuples(_place, _uids, st.sampled_from(["+", "-", ""]), _flags, _words, _since)),
        st.tuples(st.just("store"), st.tuples(_place, _uids, st.sampled_from(["+", "-", ""]), _flags, _words, _since)),
        st.tuples(st.just("copy"), st.tuples(_place, _uids, _names, st.booleans(), st.booleans())),
        st.tuples(st.just("copy"), st.tuples(_place, _uids, _names, st.booleans(), st.booleans())),
        st.tuples(st.just("append"), st.tuples(_place, st.lists(_appended, min_size=1, max_size=8), st.booleans())),
        st.tuples(st.just("rename"), st.tuples(_which, _names, _names)),
        st.tuples(st.just("subscribe"), st.tuples(_which, _names, st.booleans())),
        st.tuples(st.sampled_from(["create tree", "delete"]), _place),
        st.tuples(st.sampled_from(["compact", "crash", "restart"]), st.none()),
    ),
    min_size=10,
    max_size=40,
)


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
        await settled(self.shard)
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
        await settled(self.shard)
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
        elif user is None or (target.name not in user.boxes and not target.create):
            assert result.code == MISSING
        elif target.limits.messages and user.messages >= target.limits.messages:
            assert result.code == OVERQUOTA
        else:
            if target.name not in user.boxes:
                user.create_with_parents(target.name)
                user.subscribed.add(target.name)
            box = user.boxes[target.name]
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

    async def _refused(self, code: str, call: Awaitable[Any]) -> None:
        with pytest.raises(Refusal) as refused:
            await call
        assert refused.value.code == code

    async def create(self, place: tuple[int, str]) -> None:
        number, name = self._user(place[0]), place[1]
        user = self.users.get(number)
        change = lambda change: change.create_mailbox(number, name)  # noqa: E731
        if user is None or name in user.boxes:
            await self._refused(EXISTS if user else MISSING, self.shard.task(change))
        else:
            await self.shard.task(change)
            user.create(name, subscribed=False)

    async def expunge(self, what: tuple[tuple[int, str], set[int]]) -> None:
        number, name, uids = self._user(what[0][0]), what[0][1], sorted(what[1])
        box = self.users[number].boxes.get(name) if self.users else None
        if box is not None:
            with self.shard.rows.reading() as txn:
                row = self.shard.rows.mailbox(txn, number, name)
            assert row is not None
            assert await self.shard.task(lambda change: change.expunge(number, row.mailbox, uids)) == box.expunge(uids)

    # What sessions change

    def _box(self, place: tuple[int, str]) -> tuple[int, Box | None, int]:
        """A user, a mailbox of the user's and its id, if it is there."""
        number, name = self._user(place[0]), place[1]
        box = self.users[number].boxes.get(name) if self.users else None
        with self.shard.rows.reading() as txn:
            row = self.shard.rows.mailbox(txn, number, name)
        return number, box, row.mailbox if row is not None else 0

    async def store(self, what: Any) -> None:
        place, uids, how, flags, keywords, since = what
        number, box, mailbox = self._box(place)
        if box is None:
            return
        before = {uid: (old, modseq) for uid, (old, _, modseq) in box.messages.items()}
        stored = await self.shard.store_flags(number, mailbox, uids, how, flags, keywords, since)
        applied, modified = box.store(uids, how, flags, keywords, since)
        assert stored.modified == modified and stored.keywords == box.keywords
        assert _unpacked(stored.before) == [(uid, *before[uid]) for uid in applied]
        assert _unpacked(stored.after) == [(uid, box.messages[uid][0], box.messages[uid][2]) for uid in applied]

    async def copy(self, what: Any) -> None:
        place, uids, name, move, quota = what
        number, box, mailbox = self._box(place)
        if box is None:
            return
        user, count = self.users[number], sum(uid in box.messages for uid in uids)
        call = self.shard.copy(number, mailbox, uids, name, Limits(messages=QUOTA) if quota else Limits(), move)
        if name not in user.boxes:
            await self._refused(MISSING, call)
        elif quota and not move and count and user.messages + count > QUOTA:
            await self._refused(OVERQUOTA, call)
        else:
            copied = await call
            assert (copied.sources, copied.copies) == box.copy(uids, user.boxes[name], move)

    async def append(self, what: Any) -> None:
        place, messages, quota = what
        number, box, mailbox = self._box(place)
        if not self.users:
            return
        found = [Message(self._text(size), flags, keywords) for size, flags, keywords in messages]
        limits = Limits(messages=QUOTA) if quota else Limits()
        call = self.shard.append(number, place[1], found, limits)
        full = quota and self.users[number].messages + len(found) > QUOTA
        if box is None or full:
            await self._refused(OVERQUOTA if box is not None else MISSING, call)
            return
        copied = await call
        assert (copied.mailbox, copied.uidvalidity, copied.sources) == (mailbox, box.uidvalidity, [])
        assert copied.copies == [box.add(message.flags, message.keywords, message.data)[0] for message in found]

    async def create_tree(self, place: tuple[int, str]) -> None:
        number, name = self._user(place[0]), place[1]
        user = self.users.get(number)
        if user is None or name in user.boxes:
            await self._refused(EXISTS if user else MISSING, self.shard.create(number, name))
        else:
            await self.shard.create(number, name)
            user.create_with_parents(name)

    async def delete(self, place: tuple[int, str]) -> None:
        number, box, _ = self._box(place)
        call = self.shard.delete(number, place[1])
        if box is None or place[1] == INBOX:
            await self._refused(CANNOT if box else MISSING, call)
        else:
            await call
            del self.users[number].boxes[place[1]]

    async def rename(self, what: tuple[int, str, str]) -> None:
        which, old, new = what
        number = self._user(which)
        if not self.users:
            return
        call = self.shard.rename(number, old, new)
        problem = self.users[number].rename(old, new)
        if problem:
            await self._refused({"missing": MISSING, "exists": EXISTS, "within": CANNOT}[problem], call)
        else:
            await call

    async def subscribe(self, what: tuple[int, str, bool]) -> None:
        which, name, subscribed = what
        number = self._user(which)
        if self.users:
            await self.shard.subscribe(number, name, subscribed)
            self.users[number].subscribed ^= {name} if (name in self.users[number].subscribed) != subscribed else set()

    async def fail(self, filing: Any) -> None:
        """A task that changes much, and fails then, in one group with a message."""

        def run(change: Change) -> None:
            for number in self.users:
                for row in list(self.shard.rows.mailboxes(change.txn, number)):
                    if row.mailbox:
                        uids = [record.uid for record in self.shard.rows.index(change.txn, row.mailbox)]
                        change.expunge(number, row.mailbox, uids)
                        change.abandon(number, row.mailbox)
                        change.remove_name(number, row.name)
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
        assert_kept(shard)
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
                    texts |= {text.partition(b"\r\n")[2] or text for _, text, _ in box.messages.values()}
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
        records = {record.uid: (record.flags, record.modseq) for record in rows.index(txn, mailbox)}
        assert records == {uid: (bits, modseq) for uid, (bits, _, modseq) in box.messages.items()}
        found = dict(rows.messages(txn, mailbox))
        for uid, (_, text, _) in box.messages.items():
            row, stored = found[uid], rows.object(txn, found[uid].object)
            assert stored is not None and row.prefix + shard.segments.read(row.object, stored.body) == text
            assert row.size == len(text)
        expunged = [
            (modseq, [uid for first, last in runs for uid in range(first, last + 1)])
            for modseq, runs in rows.expunged(txn, mailbox)
        ]
        assert expunged == box.expunged
        return sum(len(text) for _, text, _ in box.messages.values())


def _unpacked(packed: bytes) -> list[tuple[int, int, int]]:
    return [(uid, flags, modseq) for uid, _, flags, modseq in RECORD.iter_unpack(packed)]


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
    before = sessions.SLICE
    sessions.SLICE = appending.SLICE = SLICE
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
        sessions.SLICE = appending.SLICE = before
        shutil.rmtree(folder)
