"""The connection of a POP3 client at mailboxes of its process: what it holds, what it answers, its deadlines."""

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from relaymta.accept.line import BLOCKED, COMMITTING, OUTPUT_SECONDS, UNSENT
from relaymta.control import Refused
from relaymta.errors import StoreError
from relaymta.proto import pop3_reply as reply
from relaymta.proto.pop3_server import Offers, ServerSession
from relaymta.store.change import MISSING, Refusal
from relaymta.store.writer import Target
from relaymta.view.access import SLICE, Access
from relaymta.view.connection import LOGIN_SECONDS
from relaymta.view.pop3 import IDLE_SECONDS, Pop3Connection
from tests.store.test_recipients import Bench

MESSAGE = b"Subject: x\r\n\r\n" + (b"y" * 70 + b"\r\n") * 7000


class Transport:
    """One that holds what is written until `read`, as TLS does."""

    def __init__(self) -> None:
        self.connection: Any = None
        self.unsent = self.said = b""
        self.most = 0
        self.closing = False

    def write(self, data: bytes) -> None:
        self.unsent += data
        self.most = max(self.most, len(self.unsent))
        if len(self.unsent) > UNSENT and not self.connection.waits & BLOCKED:
            self.connection.pause_writing()

    def read(self) -> None:
        self.said, self.unsent = self.said + self.unsent, b""
        if self.connection.waits & BLOCKED:
            self.connection.resume_writing()

    def get_extra_info(self, name: str) -> Any:
        return SimpleNamespace(session_reused=False, version=lambda: "TLSv1.3") if name == "ssl_object" else None

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.closing = True

    def ignore(self, *given: int) -> None:
        pass

    pause_reading = resume_reading = set_write_buffer_limits = set_read_buffer_limits = ignore


class Seats:
    """Limits of which each is one."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def take(self, key: str, most: int) -> bool:
        free = key not in self.taken
        self.taken.add(key)
        return free

    def give(self, key: str) -> None:
        self.taken.discard(key)


class Desk:
    """A connection of the user a, who logs in with `PASS`, at the mailboxes of a bench."""

    def __init__(self, bench: Bench) -> None:
        self.time, self.warned, self.tasks = 0.0, [], set()
        self.access = Access(bench.mailboxes)
        intake = SimpleNamespace(
            hostname="mx.example", draining=False, counters=SimpleNamespace(add=lambda *given: None),
            log=SimpleNamespace(event=lambda name, **fields: self.warned.append(fields.get("text", name))),
        )  # fmt: skip
        endpoint = SimpleNamespace(offers=lambda *given: Offers(mechanisms=("PLAIN",), clear=True), keys=None)
        loop, self.limits = asyncio.get_running_loop(), Seats()
        self.admission: Any = SimpleNamespace(
            now=lambda: self.time, time=0.0, stressed=False, intake=intake, endpoint=endpoint, limits=self.limits, loop=loop,
            turns=SimpleNamespace(wait=loop.call_soon), connections=set(), spawn=self.spawn,
        )  # fmt: skip
        self.transport = Transport()
        self.made = self.transport.connection = Pop3Connection(self.access, self.admission, None)  # type: ignore[arg-type]
        client = SimpleNamespace(address="192.0.2.1", trusted=True)
        self.made.rights = SimpleNamespace(user="a@a.example", client=client, end=int, detach=int, log_out=int)  # type: ignore[assignment]
        self.made.transport = self.transport  # type: ignore[assignment]
        self.session: ServerSession = self.made.begin_session(self.made.rights, False)  # type: ignore[arg-type, assignment]
        self.made.session = self.session

    def spawn(self, task):
        self.tasks.add(asyncio.ensure_future(task))

    async def log_in(self):
        self.session.receive(b"USER a@a.example\r\nPASS x\r\n")
        self.made.advance(self.session, self.session.checked(b"235 2.7.0 ok\r\n"))
        await self.settled()

    async def say(self, octets):
        self.made.data_received(octets)
        await self.settled()

    async def settled(self):
        while self.made.waits & COMMITTING and not self.made.waits & BLOCKED:
            await asyncio.sleep(0.001)


@pytest.fixture
async def desk(tmp_path):
    async with Bench(tmp_path) as bench:
        ident = await bench.user("a")
        own = bench.mailboxes.shards[0]
        await asyncio.gather(*(own.file([MESSAGE], [Target(ident)]) for _ in range(3)))
        desk = Desk(bench)
        yield desk
        await asyncio.gather(*desk.tasks)
        desk.access.close()


async def test_a_client_that_does_not_read_has_one_slice_of_a_message(desk):
    await desk.log_in()
    await desk.say(b"RETR 1\r\n")
    for _ in range(100):
        if b"\r\n.\r\n" in desk.transport.unsent:
            break
        await asyncio.sleep(0.001)
        desk.transport.read()
        await asyncio.sleep(0)
        await desk.settled()
    desk.transport.read()
    assert desk.transport.said.count(b"y" * 70) == 7000 and desk.transport.said.endswith(b"\r\n.\r\n")
    assert desk.transport.most < 1.2 * SLICE


async def test_after_stls_replies_can_be_written(desk):
    desk.made.pause_writing()  # by the replies before STLS, in the same segment
    desk.made._secured(desk.transport)
    assert not desk.made.waits and desk.made._writable.is_set()


async def test_a_disconnect_before_a_message_is_sent_is_no_defect(desk):
    await desk.log_in()
    desk.made.data_received(b"RETR 1\r\n")
    desk.made.connection_lost(None)
    await asyncio.gather(*desk.tasks)
    assert desk.warned == ["session"] and not desk.limits.taken


async def test_the_maildrop_is_free_before_the_client_has_the_reply_of_quit(desk):
    await desk.log_in()
    assert desk.limits.taken
    write, held = desk.transport.write, []
    desk.transport.write = lambda data: held.append(set(desk.limits.taken)) or write(data)
    await desk.say(b"DELE 1\r\nQUIT\r\n")
    assert desk.transport.unsent.endswith(b"+OK 1 message deleted; bye\r\n") and held[-1] == set()


@pytest.mark.parametrize(
    ("error", "removed"),
    [
        (Refusal(MISSING, "the user has been moved"), False),
        (Refused("the user has been moved"), False),
        (StoreError("it may have been committed"), True),
        (ConnectionError("the owner has ended"), True),
    ],
)
@pytest.mark.parametrize("gone", [False, True])
async def test_quit_says_that_messages_are_removed_only_where_they_are(desk, monkeypatch, error, removed, gone):
    """`gone`: the user's mail is not in this shard any more, so that nothing of what is asked for is seen there."""
    await desk.log_in()
    expunge = desk.access.expunge

    async def failing(user, mailbox, uids):
        if removed:
            await expunge(user, mailbox, uids)
        if gone:
            await desk.access._mailboxes.shards[0].purge(user.ident)
        raise error

    async def nothing(*given):
        return 0

    monkeypatch.setattr(desk.access, "expunge", failing)
    if not removed:  # nothing need be asked then: what is not seen here may be elsewhere
        monkeypatch.setattr(desk.access, "left", nothing)
    await desk.say(b"DELE 1\r\nDELE 3\r\nQUIT\r\n")
    done = desk.transport.unsent.endswith(b"+OK 2 messages deleted; bye\r\n")
    assert done == (removed and not gone) and (done or desk.transport.unsent.endswith(reply.NOT_REMOVED))
    assert not desk.limits.taken


@pytest.mark.parametrize("asked", [b"", b"QUIT\r\n", b"RETR 2\r\n"])
@pytest.mark.parametrize("change", [{"disabled": True}, {"deleted": 1}, {"shard": 1, "moves": 1}, {"moves": 2}])
async def test_the_session_of_a_user_who_may_not_be_here_ends_and_removes_nothing(desk, change, asked):
    await desk.log_in()
    await desk.say(b"DELE 1\r\n")
    desk.made.check(desk.time)
    await asyncio.sleep(0)
    assert not desk.transport.closing
    directory = desk.access._mailboxes.directory
    user = directory.owner("a@a.example")[0]
    directory.update(user.ident, lambda row: msgspec.structs.replace(row, **change))
    if asked:
        await desk.say(asked)
    else:
        desk.made.check(desk.time)
        await asyncio.sleep(0)
    desk.transport.read()
    assert desk.transport.said.endswith(reply.DISMISSED) and desk.transport.closing
    directory.update(user.ident, lambda row: user)
    assert desk.access._mailboxes.used(0, user.ident).messages == 3


async def test_the_time_for_a_login_is_that_from_the_greeting_whatever_is_said(desk):
    def closes(after):
        desk.made.active_at = desk.time = after  # a command just now
        desk.made.check(desk.time)
        return desk.transport.closing

    assert not closes(LOGIN_SECONDS - 1)
    desk.made.secured("")
    assert not closes(LOGIN_SECONDS + 1) and not closes(2 * LOGIN_SECONDS - 2)
    assert closes(2 * LOGIN_SECONDS)


async def test_one_who_has_logged_in_has_the_time_of_rfc_1939(desk):
    await desk.log_in()
    for seconds in (LOGIN_SECONDS * 2, IDLE_SECONDS, IDLE_SECONDS + 1):
        desk.time = desk.made.active_at + seconds
        desk.made.check(desk.time)
        assert desk.transport.closing == (seconds > IDLE_SECONDS)
    assert IDLE_SECONDS > OUTPUT_SECONDS


async def small(desk, *messages):
    """Messages of a line each, behind those that are there."""
    own = desk.access._mailboxes.shards[0]
    ident = desk.access._mailboxes.directory.owner("a@a.example")[0].ident
    await asyncio.gather(*(own.file([message], [Target(ident)]) for message in messages))


async def drained(desk, end):
    """Read until the replies end so."""
    while not desk.transport.said.endswith(end):
        await asyncio.sleep(0)
        desk.transport.read()


async def test_pipelined_commands_do_not_call_each_other(desk):
    """None of them waits for anything."""
    await small(desk, b"x\r\n")
    await desk.log_in()
    desk.made.data_received(b"RETR 4\r\n" * 3000 + b"DELE 4\r\nQUIT\r\n")
    await drained(desk, b"+OK 1 message deleted; bye\r\n")
    assert desk.transport.said.count(b"+OK 3 octets\r\nx\r\n.\r\n") == 3000 and desk.access._mailboxes.used(0, 1).messages == 3


async def test_a_message_in_the_page_cache_needs_no_task(desk):
    await small(desk, b"x\r\n")
    await desk.log_in()
    tasks = len(desk.tasks)
    desk.made.data_received(b"RETR 4\r\n")
    assert desk.transport.unsent.endswith(b"+OK 3 octets\r\nx\r\n.\r\n") and len(desk.tasks) == tasks


@pytest.mark.parametrize("error", [Refusal(MISSING, "the message has been expunged"), StoreError("cannot be read")])
@pytest.mark.parametrize("moved", [False, True])
async def test_of_a_user_who_has_been_moved_meanwhile_no_message_is_said_to_be_gone(desk, monkeypatch, error, moved):
    await desk.log_in()
    directory = desk.access._mailboxes.directory

    def read(*given):
        if moved:
            directory.update(1, lambda row: msgspec.structs.replace(row, moves=row.moves + 1))
        raise error

    monkeypatch.setattr("relaymta.view.access._found_now", read)
    await desk.say(b"RETR 1\r\n")
    said = reply.MESSAGE_GONE if isinstance(error, Refusal) else reply.MESSAGE_UNAVAILABLE
    assert desk.transport.unsent.endswith(reply.DISMISSED if moved else said) and desk.transport.closing == moved


async def test_a_message_whose_client_goes_amid_it_is_not_seen(desk):
    """The transport knows of it (a write has failed) before the connection is told."""
    await desk.log_in()
    desk.transport.write = lambda data: desk.transport.close()  # type: ignore[method-assign]
    desk.made.data_received(b"RETR 1\r\n")
    await asyncio.gather(*desk.tasks)
    assert desk.session.maildrop is not None and not desk.session.maildrop.retrieved and not desk.warned


async def test_a_defect_behind_the_end_of_a_session_keeps_no_seat(desk, monkeypatch):
    async def broken(*given):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(desk.access, "unseen", broken)
    await desk.log_in()
    desk.session.maildrop.retrieved.add(1)
    desk.made.connection_lost(None)
    assert not desk.limits.taken and "ZeroDivisionError: ours (test_pop3.py:" in desk.warned[-1]


async def test_the_owner_is_asked_for_messages_that_are_not_seen_alone(desk, monkeypatch):
    asked, see = [], desk.access.see

    async def saw(user, mailbox, uids):
        asked.append(uids)
        await see(user, mailbox, uids)

    monkeypatch.setattr(desk.access, "see", saw)
    for numbers in ([2], [1, 2], [1, 2]):
        await desk.log_in()
        for number in numbers:
            desk.session.maildrop.retrieved.add(number)
        desk.made.connection_lost(None)
        await asyncio.gather(*desk.tasks)
        desk.made._seat = None
        desk.limits.taken.clear()
        desk.session = desk.made.session = desk.made.begin_session(desk.made.rights, False)
        desk.made.transport = desk.transport
    assert asked == [[2], [1]]
