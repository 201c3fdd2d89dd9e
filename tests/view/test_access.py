"""What sessions ask of the mailboxes: messages in pieces, without descriptors between them; what is left of some messages."""

import asyncio
import os
import threading
from functools import partial

import msgspec
import pytest

from relaymta.disk.environment import Shut
from relaymta.errors import StoreError
from relaymta.proto.managesieve_server import Asked
from relaymta.store.change import Refusal
from relaymta.store.writer import Target
from relaymta.view import access as module
from relaymta.view import managesieve, reading
from relaymta.view.access import SLICE, Access
from tests.store.test_recipients import Bench

LARGE = b"Subject: x\r\n\r\n" + b"y" * 70 * 40_000


@pytest.fixture
async def kept(tmp_path):
    """The mailboxes, those who ask, a user, and the id of INBOX once there are messages in it."""
    async with Bench(tmp_path) as bench:
        ident = await bench.user("a")
        access = Access(bench.mailboxes)
        yield bench, access, access.user("a@a.example"), ident
        access.close()


async def filed(bench, ident, *messages):
    own = bench.mailboxes.shards[0]
    for one in await asyncio.gather(*(own.file([data], [Target(ident, prefix=b"P: p\r\n")]) for data in messages)):
        assert one[0].filed is not None


def opened(folder):
    """The files of large messages that this process has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [link for link in links if link.startswith(str(folder)) and "/big/" in link]


@pytest.mark.parametrize("size", [0, 10, SLICE, 900_000, len(LARGE)])
async def test_a_message_comes_in_small_pieces(kept, size):
    bench, access, user, ident = kept
    await filed(bench, ident, LARGE[:size])
    inbox = await access.inbox(user)
    for whole in (True, False):
        pieces = [piece async for piece in access.message(user, inbox.mailbox, inbox.uids[0], whole)]
        assert b"".join(pieces) == b"P: p\r\n" + LARGE[:size]
        assert max(map(len, pieces)) <= SLICE


async def test_no_descriptor_is_held_between_the_pieces(kept, tmp_path):
    bench, access, user, ident = kept
    await filed(bench, ident, LARGE)
    inbox = await access.inbox(user)
    reading = access.message(user, inbox.mailbox, inbox.uids[0])
    got = 0
    while got < len(LARGE):
        got += len(await anext(reading))
        assert not opened(tmp_path)
    await reading.aclose()


async def test_a_damaged_large_message_is_noticed_before_its_first_piece(kept, tmp_path):
    bench, access, user, ident = kept
    await filed(bench, ident, LARGE)
    inbox = await access.inbox(user)
    (path,) = (tmp_path / "mail/shard-0/bodies/big").iterdir()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(StoreError, match="checksum"):
        await anext(access.message(user, inbox.mailbox, inbox.uids[0]))
    top = access.message(user, inbox.mailbox, inbox.uids[0], whole=False)  # reads no more than it needs
    assert b"".join([await anext(top), await anext(top)]).startswith(b"P: p\r\nSubject: x")
    await top.aclose()
    with path.open("r+b") as file:
        file.write(b"!")
    with pytest.raises(StoreError, match="not where its row says"):
        await anext(access.message(user, inbox.mailbox, inbox.uids[0], whole=False))
    path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        await anext(access.message(user, inbox.mailbox, inbox.uids[0], whole=False))


async def test_a_large_message_that_goes_while_it_is_sent_is_an_error(kept, tmp_path):
    bench, access, user, ident = kept
    await filed(bench, ident, LARGE)
    inbox = await access.inbox(user)
    reading = access.message(user, inbox.mailbox, inbox.uids[0])
    await anext(reading)
    (path,) = (tmp_path / "mail/shard-0/bodies/big").iterdir()
    path.unlink()
    with pytest.raises(StoreError, match="cannot read the body"):
        [piece async for piece in reading]


async def test_what_is_left_is_counted_in_pages(kept, monkeypatch):
    bench, access, user, ident = kept
    monkeypatch.setattr(module, "PAGE", 7)
    await filed(bench, ident, *[b"x"] * 50)
    inbox = await access.inbox(user)
    await access.expunge(user, inbox.mailbox, inbox.uids[10:20])
    rows, begun = bench.mailboxes.shards[0].rows, []
    reading = rows.reading
    monkeypatch.setattr(rows, "reading", lambda *given: begun.append(1) or reading(*given))
    monkeypatch.setattr(type(rows.index(None, 0)), "get", None)  # one pass
    assert await access.left(user, inbox.mailbox, inbox.uids[5:40]) == 25
    assert len(begun) == 5
    assert await access.left(user, inbox.mailbox, inbox.uids[10:20]) == 0
    assert await access.left(user, inbox.mailbox, inbox.uids[::2]) == 20


async def test_of_a_mailbox_that_is_gone_nothing_is_said_to_be_removed(kept):
    bench, access, user, ident = kept
    await filed(bench, ident, b"x")
    inbox = await access.inbox(user)
    await bench.mailboxes.shards[0].purge(ident)
    with pytest.raises(Refusal):
        await access.left(user, inbox.mailbox, inbox.uids)
    with pytest.raises(Refusal):
        await access.expunge(user, inbox.mailbox, inbox.uids)


@pytest.mark.parametrize("times", [1, 2])
async def test_what_was_read_of_a_user_who_is_moved_meanwhile_is_refused(kept, monkeypatch, times):
    """Also when the user is back: the maildrop and the scripts are whole, or are not told."""
    bench, access, user, ident = kept
    await filed(bench, ident, b"one", b"two")
    await bench.mailboxes.change_script(0, ident, "put_script", ["name", b"keep;"])
    asked = Asked("get", "name")

    async def read():
        return [
            await access.inbox(user),
            await managesieve._list(access, user, asked),
            await managesieve._get(access, user, asked),
        ]

    assert [len(found) for found in await read()] == [4, 1, 5]
    read_ = access.read

    async def moved_meanwhile(*of_whom_and_what):
        found = await read_(of_whom_and_what[-1])
        bench.directory.update(ident, lambda row: msgspec.structs.replace(row, shard=times % 2, moves=row.moves + times))
        return found

    monkeypatch.setattr(access, "read", moved_meanwhile)
    monkeypatch.setattr(access, "work", moved_meanwhile)
    monkeypatch.setattr(module, "RECORDS_ON_LOOP", 0)
    for call in (access.inbox(user), managesieve._list(access, user, asked), managesieve._get(access, user, asked)):
        with pytest.raises(StoreError, match="has been moved"):
            await call


async def test_while_the_store_is_opened_again_nothing_is_read_on_the_loop(kept, monkeypatch):
    """A read there fails at once; what can wait does so on a thread, and has its result when the store is open."""
    monkeypatch.setattr("relaymta.disk.environment.READ_PATIENCE", 60.0)
    bench, access, user, ident = kept
    await filed(bench, ident, b"one")
    inbox = await access.inbox(user)
    shard, rows = access.shard(user), bench.mailboxes.shards[0].rows
    read = partial(reading.raw_state, shard, inbox.mailbox)
    right = access.read_here(read)
    threads = []

    def look(most=0):
        found = read()
        threads.append(threading.current_thread() is not threading.main_thread())
        return found

    with rows._gate:
        rows._shut = True
    try:
        with pytest.raises(Shut):
            access.read_here(look)
        assert bench.mailboxes.used(0, ident) is None, "nobody waits for that"
        waiting = [asyncio.create_task(one) for one in (access.read_little(look), access.read_some(look))]
        claim = asyncio.create_task(bench.mailboxes.shards[0].claim_recent(ident, inbox.mailbox, 0, 2, True))
        for _ in range(20):
            await asyncio.sleep(0.002)  # the loop is free
        assert threads == [] and not any(task.done() for task in (*waiting, claim))
    finally:
        with rows._gate:
            rows._shut = False
            rows._gate.notify_all()
    assert [await task for task in waiting] == [right] * 2 and threads == [True] * 2
    assert await claim == 1
    assert await access.read_little(look) == right and threads.pop() is False


async def test_another_user_of_the_address_or_one_who_was_moved_has_not_stayed(kept):
    _, access, user, ident = kept
    assert access.stayed(user) == user
    for other in ({"ident": ident + 1}, {"moves": 1}, {"address": "nobody@a.example"}):
        before = msgspec.structs.replace(user, **other)
        assert access.stayed(before) is None
        with pytest.raises(StoreError, match="has been moved"):
            access.check_stayed(before)
