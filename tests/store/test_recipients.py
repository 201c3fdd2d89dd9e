"""Who gets a message, at RCPT and by LMTP: users, aliases, quotas, also of users whose shard another process owns."""

import asyncio
import random
from itertools import product

import msgspec
import pytest

from relaymta.config.mailboxes import Mailboxes as Settings
from relaymta.errors import StoreError
from relaymta.proto.said import Reply
from relaymta.store import others
from relaymta.store.deliver import FULL, REFUSED, UNKNOWN, Delivery, Landed
from relaymta.store.directory import Directory, User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.recipients import Recipients
from relaymta.store.rows import UserRow
from relaymta.store.shard import Shard
from relaymta.store.watching import Watches
from tests.support.daemon import PATIENCE

FILED = Reply(250, "2.1.5", "filed")


class Outbox:
    """Messages that are sent, as they are. `dropped`: those that are not sent after all."""

    def __init__(self):
        self.dropped = []

    async def make(self, messages):
        return list(messages)

    def drop(self, made):
        self.dropped += made


class Bench:
    """The mailboxes of a process that owns shard 0, and shard 1 of another."""

    def __init__(self, folder):
        self.folder = folder
        self.settings = Settings()
        self.counted = []

    async def __aenter__(self):
        self.directory = Directory(self.folder / "mail/directory", writable=True)
        self.other = Shard(self.folder / "mail", 1)
        await self.other.start()
        self.mailboxes = Mailboxes.__new__(Mailboxes)  # the directory is opened once in a process
        self.mailboxes.directory = self.directory
        self.mailboxes.shards = {0: Shard(self.folder / "mail", 0)}
        self.mailboxes._others = Foreign({1: self.other})
        self.mailboxes._peers = {1: Channel(self.other)}
        self.mailboxes._changed = asyncio.Event()
        self.mailboxes._watches = Watches()
        await self.mailboxes.shards[0].start()
        self.known = Recipients(self.mailboxes, lambda: self.settings)
        self.delivery = Delivery(self.mailboxes, lambda: self.settings, self.counted.append)
        return self

    async def __aexit__(self, *error):
        await self.mailboxes.shards[0].stop()
        await self.other.stop()
        self.directory.close()

    async def user(self, name, shard=0, **fields):
        ident = self.directory.next_ident()
        self.directory.add(User(ident, f"{name}@a.example", shard, **fields))
        own = self.mailboxes.shards.get(shard, self.other)
        await own.task(lambda change: change.add_user(ident, [], 1))
        return ident

    def alias(self, address, targets):
        self.directory.set_alias(address, targets, lambda target: target.endswith("@a.example"), "+")

    async def file(self, data, *names, sender="s@x.example"):
        return await self.delivery.deliver_now(sender, [f"{name}@a.example" for name in names], [data])


class Foreign:
    def __init__(self, shards):
        self.shards = shards

    def shard(self, number):
        return self.shards.get(number)


class Channel:
    def __init__(self, shard):
        self.shard = shard

    async def ask(self, op, descriptors=None, seconds=None, /, *, shard, data, targets):
        return [[list(one.filed) if one.filed else None, one.code, one.text] for one in await self.shard.file([data], targets)]


async def test_a_full_user_is_refused_at_rcpt_and_an_alias_when_all_are_full(tmp_path):
    async with Bench(tmp_path) as bench:
        for number, shard in enumerate((0, 1)):
            await bench.user(f"small{number}", shard, octets=1000)
            await bench.user(f"few{number}", shard, messages=1)
            await bench.user(f"any{number}", shard)
        await bench.user("off", disabled=True)
        bench.alias("small@a.example", ["small0@a.example", "small1@a.example"])
        bench.alias("mixed@a.example", ["off@a.example", "small1@a.example"])
        bench.alias("far@a.example", ["small0@a.example", "x@far.example"])

        def said(name, size):
            return bench.known.refusal(f"{name}@a.example", size)

        for number in (0, 1):
            assert [said(f"small{number}", size) for size in (0, 1000, 1001)] == [None, None, FULL]
            assert said(f"few{number}", 1 << 40) is None and said(f"any{number}", 1 << 40) is None
        assert said("small", 1001) == said("mixed", 1001) == FULL and said("far", 1001) is None
        await bench.file(b"x" * 900, "small0", "few0", "few1")
        assert [said("small0", size) for size in (0, 10, 100)] == [None, None, FULL]
        assert said("small", 100) is None  # small1 has room
        assert said("few0", 0) == said("few1", 0) == FULL
        bench.settings = Settings(over_quota="refuse")
        assert said("few0", 0) == REFUSED and said("off", 0).enhanced == "5.2.1" and said("none", 0) == UNKNOWN
        bench.settings = Settings(quota=100)
        assert said("any0", 101).code == 452 and said("small0", 10) is None  # the user's own quota comes first


async def test_what_cannot_be_read_is_no_refusal(tmp_path):
    async with Bench(tmp_path) as bench:
        user = await bench.user("a", messages=1)
        far = await bench.user("b", 1, messages=1)
        await bench.file(b"x", "a", "b")
        assert bench.mailboxes.used(0, user).messages == 1 and bench.mailboxes.used(1, far).messages == 1
        assert bench.mailboxes.used(0, 999) is None and bench.mailboxes.used(7, user) is None
        rows = bench.other.rows
        rows._shut = True  # as while it is opened again after a failed commit: nothing waits for that
        assert bench.mailboxes.used(1, far) is None and bench.known.refusal("b@a.example", 0) is None
        rows._shut = False
        assert bench.known.refusal("b@a.example", 0) == FULL


async def test_the_shard_of_another_process_is_opened_when_it_is_there(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(others.time, "monotonic", lambda: now)
    seen = others.ReadOnly(tmp_path)
    assert seen.shard(3) is None and not list(tmp_path.iterdir())
    shard = Shard(tmp_path, 3)
    await shard.start()
    await shard.task(lambda change: change.add_user(1, [], 1))
    await shard.stop()
    assert seen.shard(3) is None  # not looked for at every recipient
    now = others.AGAIN
    found = seen.shard(3)
    with found.rows.reading() as txn:
        assert isinstance(found.rows.user(txn, 1), UserRow)
    assert seen.shard(3) is found
    seen.close()
    (tmp_path / "shard-4/lmdb").mkdir(parents=True)
    (tmp_path / "shard-4/lmdb/data.mdb").write_bytes(b"rubbish" * 1000)
    assert seen.shard(4) is None


async def test_each_recipient_has_what_became_of_it_there(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user("alice")
        await bench.user("bob", 1)
        await bench.user("full", octets=10)
        await bench.user("off", disabled=True)
        bench.alias("both@a.example", ["alice@a.example", "bob@a.example", "off@a.example"])
        bench.alias("some@a.example", ["bob@a.example", "full@a.example"])
        bench.alias("away@a.example", ["x@far.example"])
        bench.alias("mixed@a.example", ["full@a.example", "x@far.example"])
        alice, bob, full = "alice@a.example", "bob@a.example", "full@a.example"
        found = await bench.file(b"x" * 20, "alice", "none", "off", "both", "some", "away", "mixed", "full", "alice")
        assert found == [
            Landed(FILED, [alice], []),
            Landed(UNKNOWN, [], []),
            Landed(Reply(550, "5.2.1", "the mailbox is disabled"), [], []),
            Landed(FILED, [alice, bob], []),
            Landed(FILED, [bob], [full]),
            Landed(FILED, [], ["x@far.example"]),
            Landed(FILED, [], ["x@far.example", full]),
            Landed(FULL, [], []),
            Landed(FILED, [alice], []),
        ]
        assert sorted(bench.counted) == ["filed"] * 4 + ["full"] * 3
        assert bench.mailboxes.used(0, 1).messages == 2  # by name and by the alias, and once for the name that was given twice
        bench.settings = Settings(over_quota="refuse")
        found = await bench.file(b"x" * 20, "some", "mixed", "full")
        assert found == [Landed(REFUSED, [bob], []), Landed(REFUSED, [], ["x@far.example"]), Landed(REFUSED, [], [])]


async def test_at_the_end_what_is_being_filed_is_waited_for_but_not_for_ever(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user("alice")
        await bench.user("bob", 1)
        ended = []
        await bench.delivery.end(1)
        bench.delivery.file("", ["alice@a.example"], [b"x"], ended.append)
        await bench.delivery.end(5)
        assert ended == [[Landed(FILED, ["alice@a.example"], [])]]
        bench.mailboxes._peers.clear()  # the owner of bob's shard is gone
        bench.delivery.file("", ["bob@a.example"], [b"x"], ended.append)
        await bench.delivery.end(0.05)
        assert isinstance(ended[1], StoreError) and not bench.delivery._tasks


async def test_the_end_waits_once_for_what_is_filed_with_and_without_a_task(tmp_path, monkeypatch):
    waited, wait = [], asyncio.wait

    def noted(tasks, timeout=None):
        waited.append(timeout)
        return wait(tasks, timeout=timeout)

    async with Bench(tmp_path) as bench:
        monkeypatch.setattr(asyncio, "wait", noted)
        bench.delivery._submitted = 1  # as of a disk that does not answer
        task = bench.delivery._begin(asyncio.sleep(3600))
        await bench.delivery.end(0.2)
        assert task.cancelled() and waited[0] < 0.1


async def test_filing_without_a_task_is_as_with_one(tmp_path):
    """Messages of LMTP clients for one shard of this process are filed by `submit`; what becomes of them is the same."""
    async with Bench(tmp_path) as bench:
        for name in ("alice", "bob"):
            await bench.user(name)
        await bench.user("small", messages=1)
        await bench.user("off", disabled=True)
        bench.alias("mixed@a.example", ["alice@a.example", "x@far.example"])
        bench.alias("two@a.example", ["bob@a.example", "small@a.example"])
        shard, said, found = bench.mailboxes.shards[0], [], []
        names = ["alice", "bob", "alice", "small", "off", "nobody", "mixed", "two"]
        addresses = [f"{name}@a.example" for name in names]
        await bench.file(b"x", "small")
        expected = await bench.file(b"x" * 20, *names)
        bench.delivery.file("s@x.example", addresses, [b"x" * 10, b"x" * 10], said.append)
        assert not said and not bench.delivery._tasks
        await bench.delivery.end(PATIENCE)
        assert said == [expected]
        with shard.rows.reading() as txn:
            for user in (1, 2):
                state = shard.rows.state(txn, shard.rows.mailbox(txn, user, "INBOX").mailbox)
                found.append(state.messages)
        assert found == [4, 4], "by each way once for the name and once for the alias"
        shard.disk.full = True
        bench.delivery.file("", addresses[:2], [b"x"], said.append)
        assert len(said) == 1, "not within the call"
        await bench.delivery.end(PATIENCE)
        assert [one.reply.enhanced for one in said[1]] == ["4.3.1"] * 2
        shard.disk.full = False
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(bench.delivery, "_count", lambda result: 1 / 0)
            bench.delivery.file("", addresses[:1], [b"x"], said.append)
            await bench.delivery.end(PATIENCE)
        assert isinstance(said[2], ZeroDivisionError), "the client is answered, whatever goes wrong"
        large = [b"x" * (shard.segments.big_limit + 1)]
        bench.delivery.file("", addresses[:1], large, said.append)
        assert bench.delivery._tasks, "a large one is written on a thread"
        await bench.delivery.end(PATIENCE)
        assert said[3][0].reply == FILED


async def test_filing_ends_with_one_call_whatever_happens(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user("alice")
        await bench.user("bob", 1)
        ended = []
        bench.delivery.file("", ["alice@a.example"], [b"x"], ended.append)
        bench.delivery.file("", ["bob@a.example"], [b"y"], ended.append)
        (cancelled,) = bench.delivery._tasks
        cancelled.cancel()
        while len(ended) < 2:
            await asyncio.sleep(0.01)
        assert sorted(map(type, ended), key=str) == sorted((list, StoreError), key=str) and not bench.delivery._tasks


@pytest.mark.parametrize(("first", "second", "elsewhere"), list(product("FTP", "FTP", (False, True))))
async def test_an_alias_of_two_loses_nothing_and_doubles_nothing(tmp_path, first, second, elsewhere):
    """F: filed, T: not now, P: never. When the client is told to try again, nobody must have it."""
    from relaymta.store.deliver import _Way

    replies = {"F": FILED, "T": FULL, "P": REFUSED}
    users = [User(1, "a", 0), User(2, "b", 0)]
    found = _Way(FILED, users, ["x@far"] if elsewhere else []).landed([replies[first], replies[second]])
    results = dict(zip("ab", first + second, strict=True))
    assert found.users == [name for name in "ab" if results[name] == "F"]
    if found.reply.code == 452:
        assert not found.users and not found.rest and set(results.values()) == {"T"}
    else:
        assert found.rest == ["x@far"] * elsewhere + [name for name in "ab" if results[name] == "T"]
        assert found.reply == (REFUSED if "P" in results.values() else FILED)


class Down:
    """The channel to an owner who answers nothing."""

    async def ask(self, *request, **args):
        raise StoreError("not now")


async def test_of_an_alias_one_refused_for_good_does_not_lose_the_mail_of_another_who_cannot_have_it_now(tmp_path):
    """By way of the queue: it is asked for again while one has to wait, and nobody has it twice."""
    async with Bench(tmp_path) as bench:
        waits, has = await bench.user("waits", 1), await bench.user("has")
        await bench.user("full", octets=1)
        bench.settings = Settings(over_quota="refuse")
        bench.alias("team@a.example", ["has@a.example", "full@a.example", "waits@a.example"])

        async def deliver():
            return (await bench.delivery.deliver(1, 0, "s@x.example", [(0, "team@a.example")], [b"x"], Outbox()))[0][0]

        channels, bench.mailboxes._peers = bench.mailboxes._peers, {1: Down()}
        assert (await deliver()).code == 451
        bench.mailboxes._peers = channels
        assert await deliver() == REFUSED  # once nobody is waited for
        assert bench.mailboxes.used(1, waits).messages == bench.mailboxes.used(0, has).messages == 1


async def test_what_is_not_remembered_is_not_asked_for_again_at_the_successor(tmp_path):
    """The owner commits a message of an LMTP client and ends before it has answered."""
    async with Bench(tmp_path) as bench:
        user, peers = await bench.user("a", 1), bench.mailboxes._peers
        before = peers[1]

        class Dies:
            async def ask(self, *request, **args):
                await before.ask(*request, **args)
                peers[1] = before  # its successor
                raise ConnectionError("the owner has ended")

        peers[1] = Dies()
        assert [landed.reply.code for landed in await bench.file(b"x", "a")] == [451]
        assert bench.mailboxes.used(1, user).messages == 1
        peers[1] = Dies()
        replies, _, _ = await bench.delivery.deliver(
            1, 0, "", [(0, "a@a.example")], [b"x"], Outbox()
        )  # the queue's is remembered
        assert replies == {0: FILED} and bench.mailboxes.used(1, user).messages == 2


async def test_who_logs_in_is_looked_up_again_when_the_directory_has_changed(tmp_path):
    class Version:
        changes = 0

        def get(self, index):
            return self.changes

        def add(self, index, n):
            self.changes += n
            return self.changes

    async with Bench(tmp_path) as bench:
        ident = await bench.user("a", secret="one")
        directory, looked, owner = bench.directory, [], bench.directory.owner
        directory._version = Version()
        directory.owner = lambda address: looked.append(address) or owner(address)
        assert [bench.known.login(name).secret for name in ("a@a.example", "A@A.example", "a@a.example")] == ["one"] * 3
        assert looked == ["a@a.example"]
        directory.update(ident, lambda row: msgspec.structs.replace(row, secret="two", disabled=True))
        now = bench.known.login("a@a.example")
        assert (now.secret, now.active) == ("two", False)
        assert bench.known.login("b@a.example") is None and bench.known.login("b@a.example") is None
        await bench.user("b")
        assert bench.known.login("b@a.example").active and looked[-3:] == ["b@a.example"] * 3


KINDS = ["any", "any", "few", "few", "off", "frozen", "gone", "far"]


class Ways:
    """A delivery that files with a task, and one without, each for users of its own of the same kinds."""

    def __init__(self, bench):
        self.bench = bench
        self.names = {way: [f"{way}-{number}-{kind}" for number, kind in enumerate(KINDS)] for way in ("task", "none")}

    async def begin(self):
        for names in self.names.values():
            for name, kind in zip(names, KINDS, strict=True):
                fields = {"messages": 3} if kind == "few" else {"disabled": True} if kind == "off" else {}
                ident = await self.bench.user(name, int(kind == "far"), **fields)
                own = self.bench.mailboxes.shards[0]
                if kind == "frozen":
                    await own.freeze(ident)
                elif kind == "gone":
                    await own.purge(ident)

    def addresses(self, way, wanted):
        """`wanted`: numbers of users; tuples are aliases of them, "x" is elsewhere, "?" nobody."""
        return [self._address(way, one) for one in wanted]

    def _address(self, way, one):
        if isinstance(one, int):
            return f"{self.names[way][one]}@a.example"
        if isinstance(one, str):
            return f"{one}@far.example" if one == "x" else "nobody@a.example"
        address = f"{way}-{'-'.join(map(str, one))}@a.example"
        if self.bench.directory.find(address) is None:
            self.bench.alias(address, self.addresses(way, one))
        return address

    def plain(self, way, landed):
        """What has become of a message, without the names of the way."""
        return [
            (one.reply, [user.removeprefix(way) for user in one.users], [rest.removeprefix(way) for rest in one.rest])
            for one in landed
        ]

    def count(self, way):
        """The messages of each user of this process."""
        owned = [name for name, kind in zip(self.names[way], KINDS, strict=True) if kind != "far"]
        rows = [self.bench.mailboxes.used(0, self.bench.directory.named(f"{name}@a.example").ident) for name in owned]
        return [row and row.messages for row in rows]


async def test_any_recipients_have_the_same_replies_with_and_without_a_task(tmp_path):
    draw = random.Random(5)
    async with Bench(tmp_path) as bench:
        ways, shard, without, replies = Ways(bench), bench.mailboxes.shards[0], [], set()
        await ways.begin()
        shard.disk.check = lambda: None  # else the shard itself says each second that there is room
        for _ in range(150):
            size = draw.choice([1, 1, 2, 3, 20])
            kinds = draw.choice([[0, 1, 2, 3], [*range(7)], [*range(8)]])
            wanted = [
                draw.choice([*kinds, *kinds, (0, 1), (0, 2), (2, 3), (1, 5), (5, 6), (4, 0), (0, "x"), (5, "x"), (3, "x"), "?"])
                for _ in range(size)
            ]
            bench.settings = Settings(over_quota=draw.choice(["defer", "refuse"]))
            shard.disk.full = draw.random() < 0.1
            failing = draw.random() < 0.1
            with pytest.MonkeyPatch.context() as patched:
                if failing:
                    patched.setattr(shard.segments, "sync", lambda: no_sync())
                expected = await bench.delivery.deliver_now("s@x.example", ways.addresses("task", wanted), [b"x" * 9])
                said = []
                bench.delivery.file("s@x.example", ways.addresses("none", wanted), [b"x" * 4, b"x" * 5], said.append)
                without.append(not bench.delivery._tasks)
                assert not said
                await bench.delivery.end(PATIENCE)
            assert [ways.plain("none", one) for one in said] == [ways.plain("task", expected)], wanted
            assert ways.count("none") == ways.count("task"), wanted
            replies |= {one.reply.enhanced for one in expected}
        assert sum(without) > 50 and not all(without)
        assert replies == {"2.1.5", "4.2.0", "4.2.2", "4.3.0", "4.3.1", "5.1.1", "5.2.1", "5.2.2"}


def no_sync():
    raise OSError(5, "a fault")
