"""What the writer keeps of rows in memory while groups fail at any step: after each it is what the shard has."""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relaymta.disk.transaction import Transaction
from relaymta.errors import StoreError
from relaymta.store import names, scripts
from relaymta.store.asked import Message
from relaymta.store.carry import CarriedScripts, CarriedUser
from relaymta.store.change import Change, Limits, Refusal
from relaymta.store.rows import DELETED, INBOX, KEYWORDS_MOST, SEEN
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Place, Step, Target
from tests.conftest import PROVE
from tests.store.sessions import ANY, assert_kept, settled

NAMES = [INBOX, "Sent", "A", "A/B", "C"]
USERS = [1, 2, 3]
FEW = Limits(messages=6)

_user = st.sampled_from(USERS)
_name = st.sampled_from(NAMES)
_uids = st.sets(st.integers(1, 9), max_size=5).map(sorted)
_words = st.sampled_from([[], ["one"], ["two", "ONE"], ["x" * 300]])
_limits = st.sampled_from([ANY, FEW])
OPERATIONS = st.one_of(
    st.tuples(st.just("file"), _user, _name, st.booleans(), _words, _limits),
    st.tuples(st.just("file"), _user, _name, st.booleans(), _words, _limits),
    st.tuples(st.just("places"), _user, _name, _name, _words, _limits),
    st.tuples(st.just("store"), _user, _name, _uids, st.sampled_from(["+", "-", ""]), _words),
    st.tuples(st.just("store"), _user, _name, _uids, st.sampled_from(["+", "-", ""]), _words),
    st.tuples(st.just("copy"), _user, _name, _name, _uids, st.booleans(), _limits),
    st.tuples(st.just("expunge"), _user, _name, _uids),
    st.tuples(st.just("append"), _user, _name, st.integers(1, 4), _limits),
    st.tuples(st.sampled_from(["create", "delete"]), _user, _name),
    st.tuples(st.just("rename"), _user, _name, _name),
    st.tuples(st.just("subscribe"), _user, _name, st.booleans()),
    st.tuples(st.just("freeze"), _user, st.booleans()),
    st.tuples(st.sampled_from(["purge", "add", "take", "script", "defect", "undone"]), _user),
)
ERRORS = [lmdb.DiskError, lmdb.MapFullError, lmdb.Error]
FAULTS = st.one_of(
    st.none(),
    st.none(),
    st.tuples(st.just("put"), st.integers(1, 40), st.sampled_from(ERRORS)),
    st.tuples(st.sampled_from(["commit", "committed", "sync"]), st.just(1), st.sampled_from(ERRORS)),
)
GROUPS = st.lists(st.tuples(st.lists(OPERATIONS, min_size=1, max_size=8), FAULTS), min_size=4, max_size=20)


class Faulty:
    """A transaction whose `number`-th put fails, or its commit: before it is written, or (`committed`) behind it."""

    def __init__(self, txn: Any, faults: "Faults") -> None:
        self.txn, self._faults = txn, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self.txn, name)

    def put(self, *arguments: Any, **more: Any) -> Any:
        self._faults.meet("put")
        return self.txn.put(*arguments, **more)

    def commit(self) -> None:
        self._faults.meet("commit")
        self.txn.commit()
        self._faults.meet("committed")


class Faults:
    """The next fault of a shard; the writer's kept rows are compared with the shard behind each group."""

    def __init__(self, shard: Shard) -> None:
        self.next: Any = None
        self.wrong: list[BaseException] = []
        writer, begin, commit = shard.writer, shard.writer._begin, shard.writer._commit
        sync = shard.segments.sync

        def begun() -> Change:
            change = begin()
            change.txn = Faulty(change.txn, self)
            return change

        def committed(batch: Any) -> Any:
            group = commit(batch)
            try:
                assert_kept(shard)
            except BaseException as error:
                self.wrong.append(error)
            return group

        def synced() -> int:
            self.meet("sync")
            return sync()

        writer._begin, writer._commit, shard.segments.sync = begun, committed, synced  # type: ignore[method-assign]

    def meet(self, where: str) -> None:
        if self.next is not None and self.next[0] == where:
            place, left, error = self.next
            self.next = (place, left - 1, error) if left > 1 else None
            if self.next is None:
                raise error("a fault") if where != "sync" else OSError(5, "a fault")


@contextmanager
def parts_of_faulty() -> Iterator[None]:
    """Parts of a faulty transaction are faulty."""
    begin = Transaction.begin_part

    def begin_part(self: Transaction) -> None:
        whole, self.txn = self.txn, self.txn.txn
        begin(self)
        self._whole, self.txn = whole, Faulty(self.txn, whole._faults)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "begin_part", begin_part)
        yield


class World:
    """What may be asked of a shard, whatever becomes of it."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.texts = 0
        self.keywords: list[tuple[list[str], list[str]]] = []

    def _text(self) -> bytes:
        self.texts += 1
        return b"Subject: %d\r\n\r\n" % self.texts

    def _mailbox(self, user: int, name: str) -> int:
        with self.shard.rows.reading() as txn:
            row = self.shard.rows.mailbox(txn, user, name)
        return row.mailbox if row is not None else 12345

    async def file(self, user: int, name: str, create: bool, words: list[str], limits: Limits) -> None:
        await self.shard.file([self._text()], [Target(user, name, keywords=words, create=create, limits=limits)])

    async def places(self, user: int, name: str, other: str, words: list[str], limits: Limits) -> None:
        places = [Place(name, SEEN, words, create=True), Place(other, DELETED)]
        await self.shard.file([self._text()], [Target(user, places=places, limits=limits), Target(2)])

    async def store(self, user: int, name: str, uids: list[int], how: str, words: list[str]) -> None:
        stored = await self.shard.store_flags(user, self._mailbox(user, name), uids, how, SEEN | DELETED, words, None)
        self.keywords.append((stored.keywords, list(stored.keywords)))

    async def copy(self, user: int, name: str, other: str, uids: list[int], move: bool, limits: Limits) -> None:
        await self.shard.copy(user, self._mailbox(user, name), uids, other, limits, move)

    async def expunge(self, user: int, name: str, uids: list[int]) -> None:
        mailbox = self._mailbox(user, name)
        await self.shard.task(lambda change: change.expunge(user, mailbox, uids))

    async def append(self, user: int, name: str, count: int, limits: Limits) -> None:
        await self.shard.append(user, name, [Message(self._text()) for _ in range(count)], limits)

    async def create(self, user: int, name: str) -> None:
        await self.shard.create(user, name)

    async def delete(self, user: int, name: str) -> None:
        await self.shard.delete(user, name)

    async def rename(self, user: int, old: str, new: str) -> None:
        await self.shard.rename(user, old, new)

    async def subscribe(self, user: int, name: str, subscribed: bool) -> None:
        await self.shard.subscribe(user, name, subscribed)

    async def freeze(self, user: int, frozen: bool) -> None:
        await self.shard.freeze(user, frozen)

    async def purge(self, user: int) -> None:
        await self.shard.purge(user)

    async def add(self, user: int) -> None:
        await self.shard.task(lambda change: change.add_user(user, [("Sent", "")], 1000))

    async def take(self, user: int) -> None:
        await self.shard.take(user, CarriedUser(2000))
        await self.shard.take(user, CarriedScripts([("a", b"keep;", user == 1)], []))
        await self.shard.task(lambda change: change.create_mailbox(user, INBOX))

    async def script(self, user: int) -> None:
        self.shard.has_script(user)
        self.texts += 1
        await self.shard.put_script(user, "a", b"keep;")
        await self.shard.activate_script(user, "a" if self.texts % 2 else "")

    async def defect(self, user: int) -> None:
        mailbox = self._mailbox(user, INBOX)

        def run(change: Change) -> None:
            change.store_flags(user, mailbox, [1, 2], "+", SEEN, ["defect"], None)
            raise ZeroDivisionError

        await self.shard.task(run, Step)

    async def undone(self, user: int) -> None:
        def run(change: Change) -> None:
            names.rename(change, user, "Sent", "C")
            change.mailbox(user, "C")
            change.freeze(user)
            change.create_mailbox(user, "new")
            change.mailbox(user, "new")
            names.delete(change, user, "C", 100)
            raise ZeroDivisionError

        await self.shard.task(run)

    def check(self) -> None:
        """What was remembered of scripts is right; lists that were given away are as they were."""
        with self.shard.rows.reading() as txn:
            active = {user: scripts.active_ident(self.shard.rows, txn, user) > 0 for user in USERS}
        assert {user: self.shard.has_script(user) for user in USERS} == active
        assert all(now == then for now, then in self.keywords)


@given(GROUPS)
@settings(max_examples=400 if PROVE else 25, deadline=None, suppress_health_check=list(HealthCheck))
async def test_rows_in_memory_are_those_of_the_shard_whatever_fails(memory_path, groups):
    with tempfile.TemporaryDirectory(dir=memory_path) as folder, parts_of_faulty():
        shard = Shard(Path(folder), 0)
        faults, world = Faults(shard), World(shard)
        await shard.start()
        await world.add(1)
        await world.add(2)
        for operations, fault in groups:
            faults.next = fault
            asked = [getattr(world, what)(*arguments) for what, *arguments in operations]
            for error in await asyncio.gather(*asked, return_exceptions=True):
                assert error is None or isinstance(error, StoreError | Refusal | ZeroDivisionError), repr(error)
            faults.next = None
            assert faults.wrong == []
            world.check()
        await settled(shard)
        found = list(contradictions(shard.rows, shard.segments))
        await shard.stop()
        if any(fault is not None and fault[0] == "committed" for _, fault in groups):
            found = [one for one in found if not one.startswith("segment")]  # LMDB takes such a commit back, but not here
        assert found == [] and faults.wrong == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 1, 1, 1, 2, 9]),
            st.sampled_from(["full", "full", INBOX, "gone"]),
            st.sets(st.integers(1, 6), max_size=6).map(sorted),
            st.sampled_from(["+", "-", ""]),
            st.lists(st.sampled_from(["new", "k1", "K1", "other", "new", "x" * 300, "\ud800"]), max_size=3),
            st.sampled_from([None, None, 3, 1 << 60]),
        ),
        min_size=6,
        max_size=30,
    )
)
@settings(max_examples=400 if PROVE else 25, deadline=None, suppress_health_check=list(HealthCheck))
async def test_flags_that_are_refused_have_changed_nothing(memory_path, asked):
    """`store_flags` is a Step: what it has changed before it is refused would be committed."""
    with tempfile.TemporaryDirectory(dir=memory_path) as folder:
        shard = Shard(Path(folder), 0)
        await shard.start()
        await shard.task(lambda change: change.add_user(1, [("full", "")], 1000))
        await shard.task(lambda change: change.add_user(2, [], 1000))
        for name, words in ((INBOX, []), ("full", [f"k{number}" for number in range(KEYWORDS_MOST)])):
            for _ in range(4):
                await shard.file([b"x"], [Target(1, name, keywords=words)])
        await shard.freeze(2)
        await shard.store_flags(1, 1, [1, 2], "+", SEEN, [], None)

        def all_rows() -> dict[str, list[tuple[bytes, bytes]]]:
            with shard.rows.reading() as txn:
                return {name: list(txn.cursor(db=shard.rows.tables[name])) for name in ("mail", "user", "mailbox", "object")}

        with shard.rows.reading() as txn:
            mailboxes = {row.name: row.mailbox for row in shard.rows.mailboxes(txn, 1)}
        for user, name, uids, how, words, since in asked:
            before = all_rows()
            try:
                await shard.store_flags(user, mailboxes.get(name, 99), uids, how, SEEN, words, since)
            except (Refusal, UnicodeEncodeError):
                assert all_rows() == before
            assert_kept(shard)
        await shard.stop()
