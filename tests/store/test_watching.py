"""Who is told that a mailbox has changed, and what sessions change, where another process owns the shard."""

import asyncio
import socket

import pytest

from relaymta.control import Channel, Late
from relaymta.errors import StoreError, StoreFull
from relaymta.store.asked import Copied, Message, Partial
from relaymta.store.change import MISSING, OVERQUOTA, Limits, Refusal
from relaymta.store.directory import Directory
from relaymta.store.mailboxes import OF_PEERS, OWNERS_MOST, Mailboxes
from relaymta.store.rows import INBOX, SEEN
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target

ANY = Limits()


class Process:
    """The mailboxes of a process (all of them are one process here), and its channels."""

    def __init__(self, folder, own):
        self.folder = folder
        self.mailboxes = Mailboxes(folder, own)
        self.channels = []

    def join(self, other):
        """A channel to another process; its other end."""
        here, there = socket.socketpair()
        self._open(here, other)
        other._open(there, self)

    def _open(self, sock, other):
        mine = self.mailboxes
        channel = Channel(sock, lambda op, args, _: mine.asked_by(channel, op, args), lambda: mine.leave(channel))
        self.channels.append(channel)
        mine.reach(list(other.mailboxes.shards), channel)

    def close(self):
        for channel in self.channels:
            channel.close()


@pytest.fixture
async def started(tmp_path, monkeypatch):
    """Starts processes, which own these shards; the users are 1, 2, ... in shards 0, 1, ..."""
    directory = Directory(tmp_path / "mail/directory", writable=True)  # it is opened once in a process
    monkeypatch.setattr("relaymta.store.mailboxes.Directory", lambda *given, **named: directory)
    begun = []

    async def start(*owned):
        found = [Process(tmp_path, own) for own in owned]
        begun.extend(found)
        for process in found:
            await process.mailboxes.start()
            for number, shard in process.mailboxes.shards.items():
                with shard.rows.reading() as txn:
                    known = shard.rows.user(txn, number + 1)
                if known is None:
                    await process.mailboxes.add_user(number, number + 1, [("Sent", "")], 1)
        return found

    yield start
    for process in begun:
        process.close()
        for shard in process.mailboxes.shards.values():
            if not shard._closing:
                assert list(contradictions(shard.rows, shard.segments)) == []
                await shard.stop()
    directory.close()


async def news(told, count=1):
    """Wait until so many notices have come, and a little longer."""
    async with asyncio.timeout(10):
        while len(told) < count:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.03)
    found = [*told]
    told.clear()
    return found


def box(process, shard, name=INBOX):
    with process.mailboxes.shards[shard].rows.reading() as txn:
        return process.mailboxes.shards[shard].rows.mailbox(txn, shard + 1, name).mailbox


async def test_a_session_is_told_of_every_commit_once(started):
    (here,) = await started([0])
    mailboxes, inbox, told, others = here.mailboxes, box(here, 0), [], []
    stop = mailboxes.watch(0, inbox, told.append)
    again = mailboxes.watch(0, inbox, told.append)
    mailboxes.watch(0, box(here, 0, "Sent"), others.append)
    await asyncio.gather(*(mailboxes.change(0, "append", 1, INBOX, [Message(b"x")], ANY) for _ in range(20)))
    modseqs = await news(told)
    assert modseqs[-2:] == [21, 21] and len(modseqs) <= 6, "those of one group are told together"
    stop()
    stop()  # once more changes nothing
    await mailboxes.change(0, "store_flags", 1, inbox, [1, 2], "+", SEEN, [], None)
    assert await news(told) == [22]
    await mailboxes.change(0, "store_flags", 1, inbox, [1, 2], "+", SEEN, [], None)  # nothing changes
    await mailboxes.change(0, "claim_recent", 1, inbox, 0, 21, False)
    again()
    await mailboxes.change(0, "expunge", 1, inbox, [1], False)
    await asyncio.sleep(0.05)
    assert told == others == []


async def test_one_who_fails_does_not_keep_others_from_being_told(started):
    (here,) = await started([0])
    told, failures = [], []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))

    def failing(modseq):
        stop()
        raise ZeroDivisionError

    stop = here.mailboxes.watch(0, box(here, 0), failing)
    here.mailboxes.watch(0, box(here, 0), told.append)
    await here.mailboxes.change(0, "append", 1, INBOX, [Message(b"x")], ANY)
    assert await news(told) == [2]
    assert [type(error) for error in failures] == [ZeroDivisionError]


async def test_a_mailbox_that_is_removed_is_told(started):
    (here,) = await started([0])
    told = []
    here.mailboxes.watch(0, box(here, 0, "Sent"), told.append)
    await here.mailboxes.change(0, "delete", 1, "Sent")
    assert await news(told) == [2]


async def test_the_owner_tells_another_process(started):
    here, there = await started([0], [1])
    here.join(there)
    inbox, told, own = box(there, 1), [], []
    stop = here.mailboxes.watch(1, inbox, told.append)
    assert await news(told) == [0], "the owner has begun to tell"
    another = here.mailboxes.watch(1, inbox, told.append)
    there.mailboxes.watch(1, inbox, own.append)
    await there.mailboxes.change(1, "append", 2, INBOX, [Message(b"x")], ANY)
    assert await news(told, 2) == [2, 2]
    await here.mailboxes.change(1, "append", 2, INBOX, [Message(b"x")], ANY)
    assert await news(told, 2) == [3, 3]
    assert own == [2, 3]
    stop()
    await here.mailboxes.change(1, "append", 2, INBOX, [Message(b"x")], ANY)
    assert await news(told) == [4]
    another()
    await here.mailboxes.change(1, "append", 2, INBOX, [Message(b"x")], ANY)
    await asyncio.sleep(0.05)
    assert told == [] and not any(there.mailboxes._watches._elsewhere.values())


async def test_a_new_owner_is_told_what_is_watched(started):
    here, there = await started([0], [1])
    inbox, told = box(there, 1), []
    here.mailboxes.watch(1, inbox, told.append)  # nobody owns the shard yet
    await asyncio.sleep(0.03)
    assert told == []
    here.join(there)
    assert await news(told) == [0]
    there.close()
    await asyncio.sleep(0.03)
    assert there.mailboxes._watches._elsewhere == {}, "it forgets those who are gone"
    await there.mailboxes.shards[1].stop()
    (successor,) = await started([1])
    here.join(successor)
    assert await news(told) == [0], "it may have missed something"
    await successor.mailboxes.change(1, "append", 2, INBOX, [Message(b"x")], ANY)
    assert await news(told) == [2]


async def test_what_another_process_owns_is_changed_there(started):
    here, there = await started([0], [1])
    here.join(there)
    change, inbox = here.mailboxes.change, box(there, 1)
    filed = await change(1, "append", 2, INBOX, [Message(b"one", SEEN, ["$Work"], 1000), Message(b"two")], Limits(0, 5))
    assert filed == Copied(inbox, 1, [], [1, 2])
    stored = await change(1, "store_flags", 2, inbox, [1, 2, 7], "+", SEEN, ["$work"], 3)
    assert stored.keywords == ["$Work"] and stored.before != stored.after and stored.modified == []
    again = await there.mailboxes.change(1, "store_flags", 2, inbox, [1, 2], "+", SEEN, ["$WORK"], None)
    assert again.before == again.after == stored.after
    await change(1, "create", 2, "a/b", "")
    assert await change(1, "copy", 2, inbox, [1, 2], "a/b", ANY, False) == Copied(box(there, 1, "a/b"), 4, [1, 2], [1, 2])
    await change(1, "rename", 2, "a", "c")
    await change(1, "subscribe", 2, "c/b", True)
    assert [await change(1, "claim_recent", 2, inbox, 0, 3, False) for _ in range(2)] == [1, 3]
    await change(1, "expunge", 2, inbox, [1])
    await change(1, "delete", 2, "c/b")
    with there.mailboxes.shards[1].rows.reading() as txn:
        rows = {row.name: row for row in there.mailboxes.shards[1].rows.mailboxes(txn, 2)}
        state = there.mailboxes.shards[1].rows.state(txn, inbox)
    assert rows.keys() == {INBOX, "Sent", "c", "c/b"} and not rows["c/b"].mailbox
    assert state.messages == 1


async def test_errors_of_another_process_are_as_ones_own(started, monkeypatch):
    here, there = await started([0], [1])
    here.join(there)
    change, inbox = here.mailboxes.change, box(there, 1)
    with pytest.raises(Refusal) as refused:
        await change(1, "append", 2, "nowhere", [Message(b"x")], ANY)
    assert refused.value.code == MISSING
    with pytest.raises(Refusal) as refused:
        await change(1, "append", 2, INBOX, [Message(b"x")] * 2, Limits(messages=1))
    assert refused.value.code == OVERQUOTA
    there.mailboxes.shards[1].disk.full = True
    with pytest.raises(StoreFull):
        await change(1, "append", 2, INBOX, [Message(b"x")], ANY)
    there.mailboxes.shards[1].disk.full = False
    monkeypatch.setattr("relaymta.store.sessions.SLICE", 2)
    await change(1, "append", 2, INBOX, [Message(b"x")] * 5, ANY)
    owner = there.mailboxes.shards[1]
    task, calls = owner.task, []

    async def failing(run, *kind):
        calls.append(run)
        if len(calls) == 2:
            raise Refusal(OVERQUOTA, "no")
        return await task(run, *kind)

    monkeypatch.setattr(owner, "task", failing)
    with pytest.raises(Partial) as stopped:
        await change(1, "copy", 2, inbox, [1, 2, 3, 4, 5], "Sent", ANY, True)
    assert (stopped.value.code, stopped.value.copied) == (OVERQUOTA, Copied(box(there, 1, "Sent"), 2, [1, 2], [1, 2]))


async def test_what_may_not_be_done_twice_is_not_asked_of_a_successor(started):
    here, there = await started([0], [1])
    here.join(there)
    inbox = box(there, 1)
    await here.mailboxes.change(1, "append", 2, INBOX, [Message(b"x")] * 3, ANY)
    stuck = asyncio.Event()

    async def never(op, args, descriptors):
        stuck.set()
        await asyncio.sleep(60)

    async def meets_its_end(*asked):
        """Ask an owner who ends before it answers; then there is a successor."""
        stuck.clear()
        ours, theirs = socket.socketpair()
        channel, dead = Channel(ours, None, lambda: None), Channel(theirs, never, lambda: None)
        here.mailboxes.reach([1], channel)
        task = asyncio.create_task(here.mailboxes.change(1, *asked))
        await stuck.wait()
        dead.close()
        await asyncio.sleep(0.02)
        here.join(there)
        return await task

    for asked in (
        ("append", 2, INBOX, [Message(b"x")], ANY),
        ("copy", 2, inbox, [1], "Sent", ANY, False),
        ("copy", 2, inbox, [1], "Sent", ANY, True),
        ("store_flags", 2, inbox, [1], "+", SEEN, [], 2),
        ("create", 2, "x", ""),
        ("delete", 2, "Sent"),
        ("rename", 2, "Sent", "y"),
    ):
        with pytest.raises(ConnectionError):
            await meets_its_end(*asked)
    stored = await meets_its_end("store_flags", 2, inbox, [1], "+", SEEN, [], None)
    assert stored.before != stored.after
    await meets_its_end("expunge", 2, inbox, [1])
    await meets_its_end("subscribe", 2, "x", True)
    assert await meets_its_end("claim_recent", 2, inbox, 0, 3, False) == 1


async def test_what_is_asked_of_nobody_waits_for_an_owner(started, monkeypatch):
    """Also what may not be done twice: nobody was asked for it yet."""
    here, there = await started([0], [1])
    inbox = box(there, 1)
    asked = [
        asyncio.create_task(here.mailboxes.change(1, *one))
        for one in (
            ("append", 2, INBOX, [Message(b"x")], ANY),
            ("create", 2, "new", ""),
            ("subscribe", 2, "other", True),
            ("store_flags", 2, inbox, [1], "+", SEEN, [], 1),
        )
    ]
    filing = asyncio.create_task(here.mailboxes.file([b"y"], [(1, Target(2))]))
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in (*asked, filing))
    here.join(there)
    assert (await asked[0]).copies and (await filing)[0].filed
    await asyncio.gather(*asked)
    with there.mailboxes.shards[1].rows.reading() as txn:
        rows = {row.name: row for row in there.mailboxes.shards[1].rows.mailboxes(txn, 2)}
        state = there.mailboxes.shards[1].rows.state(txn, inbox)
    assert rows.keys() == {INBOX, "Sent", "new", "other"} and state.messages == 2, "each once"


async def test_an_owner_is_not_waited_for_without_end(started, monkeypatch):
    here, _ = await started([0], [1])
    monkeypatch.setattr("relaymta.store.mailboxes.REPLACED_SECONDS", 0.05)
    with pytest.raises(ConnectionError, match="nobody owns shard 1"):
        await here.mailboxes.change(1, "subscribe", 2, "x", True)
    (result,) = await here.mailboxes.file([b"y"], [(1, Target(2, once=(1, 0, 2)))])
    assert isinstance(result, StoreError)
    asked = []

    async def ends(op, args, descriptors):
        asked.append(op)
        dead.pop().close()
        successor()

    dead = []

    def successor():
        ours, theirs = socket.socketpair()
        channel = Channel(ours, None, lambda: None)
        dead.append(Channel(theirs, ends, lambda: None))
        here.mailboxes.reach([1], channel)

    successor()
    with pytest.raises(ConnectionError, match="end one after another"):
        await here.mailboxes.change(1, "subscribe", 2, "x", True)
    assert len(asked) == OWNERS_MOST
    dead.pop().close()


async def test_an_owner_that_does_not_answer_is_not_asked_again(started, monkeypatch):
    """It may do it still, also where there is another owner by now."""
    here, there = await started([0], [1])
    here.join(there)
    monkeypatch.setattr("relaymta.store.mailboxes.OWNER_SECONDS", 0.05)
    monkeypatch.setattr("relaymta.store.mailboxes.CHANGE_SECONDS", 0.05)
    asked = []

    async def slow(*given, **named):
        asked.append(given)
        await asyncio.sleep(0.2)

    monkeypatch.setitem(OF_PEERS, "mail_change", slow)
    change = asyncio.create_task(here.mailboxes.change(1, "subscribe", 2, "x", True))
    await asyncio.sleep(0.1)
    here.join(there)
    with pytest.raises(Late):
        await change
    assert len(asked) == 1
