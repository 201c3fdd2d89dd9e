"""The connection of an IMAP client at mailboxes of its process: what it holds, what it answers, its deadlines."""

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.accept.line import BLOCKED, CHECKING, COMMITTING, OUTPUT_SECONDS, SPILLING
from relaymta.auth.identity import Identity
from relaymta.errors import StoreError
from relaymta.proto import reply
from relaymta.proto.imap_server import Offers, ServerSession
from relaymta.proto.imap_verbs import VERBS
from relaymta.reservation import Reservation
from relaymta.store.writer import Target
from relaymta.view import imap_messages
from relaymta.view.access import SLICE, Access
from relaymta.view.imap import COMMANDS, ROWS, SILENCE_SECONDS, STILL_HERE_SECONDS, ImapConnection
from tests.store.test_recipients import Bench
from tests.support.imap_grammar import responses
from tests.view.test_pop3 import Seats, Transport

MESSAGE = b"Subject: x\r\n\r\n" + (b"y" * 70 + b"\r\n") * 7000


class Files:
    """The queue's folder of large messages, and what it says of the disk."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.full, self.room = False, 1 << 40

    def ident(self):
        self.count += 1
        return self.count

    def big_body(self, ident):
        from relaymta.disk.big import BigBody

        return BigBody(self.folder / f"{ident:016x}", ident)


class Desk:
    """A connection of the user a, who has logged in, at the mailboxes of a bench."""

    def __init__(self, bench: Bench, folder) -> None:
        self.time, self.warned, self.tasks = 0.0, [], set()
        self.access = Access(bench.mailboxes)
        bench.mailboxes.shards[0]._told = partial(bench.mailboxes._told, 0)
        self.files = Files(folder)
        counters = SimpleNamespace(add=lambda *given: None, observe=lambda *given: None)
        intake = SimpleNamespace(
            hostname="mx.example", draining=False, counters=counters, queue=self.files,
            log=SimpleNamespace(event=lambda name, **fields: self.warned.append(fields.get("text", name))),
        )  # fmt: skip
        endpoint = SimpleNamespace(offers=lambda *given: Offers(mechanisms=("PLAIN",), clear=True), keys=None)
        loop, self.limits = asyncio.get_running_loop(), Seats()
        config = SimpleNamespace(
            imap=SimpleNamespace(hide=[]), limits=SimpleNamespace(message_size=50 << 20, sessions_per_user=100),
            mailboxes=SimpleNamespace(quota=0, messages=0),
        )  # fmt: skip
        self.admission: Any = SimpleNamespace(
            now=lambda: self.time, time=0.0, stressed=False, intake=intake, endpoint=endpoint, limits=self.limits, loop=loop,
            turns=SimpleNamespace(wait=loop.call_soon), connections=set(), spawn=self.spawn, config=config,
            file=lambda: Reservation(lambda: None),
        )  # fmt: skip
        self.transport = Transport()
        self.made = self.transport.connection = ImapConnection(self.access, self.admission, None)  # type: ignore[arg-type]
        client = SimpleNamespace(address="192.0.2.1", trusted=True)
        self.made.rights = SimpleNamespace(
            user="a@a.example", client=client, asks_client=frozenset(), end=int, detach=int, log_out=int
        )  # type: ignore[assignment]
        self.made.transport = self.transport  # type: ignore[assignment]
        self.session: ServerSession = self.made.begin_session(self.made.rights, False)  # type: ignore[arg-type, assignment]
        self.made.session = self.session
        self.session.receive(b"l LOGIN a x\r\n")
        assert self.made.admit_login() is None
        self.made.advance(self.session, self.session.checked(reply.LOGGED_IN))
        self.heard()

    def spawn(self, task):
        self.tasks.add(asyncio.ensure_future(task))

    async def say(self, octets: bytes) -> bytes:
        """What is said to these octets, when all has been done."""
        self.made.data_received(octets)
        await self.settled()
        return self.heard()

    async def settled(self):
        for _ in range(5):  # what is behind is parsed in turns of its own
            while self.made.waits & (COMMITTING | SPILLING) and not self.made.waits & BLOCKED:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)

    def heard(self) -> bytes:
        """What was written since the last time."""
        self.transport.read()
        said, self.transport.said = self.transport.said, b""
        responses(said, self.session.utf8, self.session.rev2)
        return said


@pytest.fixture
async def desk(tmp_path):
    async with Bench(tmp_path) as bench:
        ident = await bench.user("a")
        own = bench.mailboxes.shards[0]
        await asyncio.gather(*(own.file([MESSAGE], [Target(ident)]) for _ in range(3)))
        (tmp_path / "large").mkdir()
        desk = Desk(bench, tmp_path / "large")
        yield desk
        desk.made.connection_lost(None)
        await asyncio.gather(*desk.tasks)
        desk.access.close()
        assert not list((tmp_path / "large").iterdir()) and not desk.access.open


async def test_a_client_that_does_not_read_has_one_slice_of_what_it_asked_for(desk):
    await desk.say(b"1 SELECT INBOX\r\n")
    desk.made.data_received(b"2 FETCH 1:* BODY.PEEK[]\r\n")
    said = b""
    for _ in range(200):
        await desk.settled()
        desk.transport.read()
        if b"2 OK" in desk.transport.said:
            break
    said = desk.transport.said
    assert said.count(b"y" * 70) == 21000 and said.endswith(b"2 OK Fetched\r\n")
    assert desk.transport.most < 2.2 * SLICE


async def test_a_session_is_disconnected_once_nothing_is_under_way(desk):
    bye = b"* BYE [UNAVAILABLE] The session has ended; log in again\r\n"
    assert list(desk.access.open) == [desk.made] and desk.made.owner == desk.made._user.ident
    desk.made.waits |= SPILLING  # a thread writes a part of an APPEND
    desk.made.disconnect()
    desk.made.check(desk.time)
    assert desk.heard() == b"" and not desk.made.gone
    desk.made.waits &= ~SPILLING
    desk.made.check(desk.time)
    assert desk.heard() == bye and desk.made.gone and not desk.access.open


async def test_a_reply_that_is_delayed_is_told_to_one_who_is_disconnected(desk):
    desk.made.waits |= CHECKING  # too many errors
    desk.made.delayed = b"9 BAD wrong\r\n"
    desk.made.disconnect()
    assert desk.heard().startswith(b"9 BAD wrong\r\n* BYE [UNAVAILABLE]") and desk.made.gone


async def test_octets_that_come_while_a_reply_is_written_are_parsed_behind_it(desk):
    await desk.say(b"1 SELECT INBOX\r\n")
    desk.made.data_received(b"2 FETCH 1 BODY.PEEK[]\r\n")
    await desk.settled()
    assert desk.made.waits & BLOCKED
    desk.made.data_received(b"3 NOOP\r\n4 UNSELECT\r\n")
    for _ in range(100):
        desk.transport.read()
        await asyncio.sleep(0.001)
        await desk.settled()
    assert desk.transport.said.endswith(b"2 OK Fetched\r\n3 OK Done\r\n4 OK Unselected\r\n")


async def test_a_defect_in_one_command_is_said_and_the_session_goes_on(desk, monkeypatch):
    async def broken(reader, command):
        await reader.tell([b"* 1 EXISTS\r\n"])
        raise ValueError("ours")

    monkeypatch.setitem(ROWS, "NAMESPACE", ROWS["NAMESPACE"]._replace(run=broken))
    assert await desk.say(b"1 NAMESPACE\r\n") == b"1 NO [SERVERBUG] Internal error; it has been logged\r\n"
    assert "ValueError: ours (test_imap.py:" in desk.warned[-1]
    assert await desk.say(b"2 NOOP\r\n") == b"2 OK Done\r\n"


async def test_a_login_whose_user_cannot_be_looked_up_is_answered(desk, monkeypatch):
    def broken(name):
        raise StoreError("cannot read")

    async def check(claim, *client):
        return Identity("a"), reply.LOGGED_IN

    monkeypatch.setattr(desk.access, "user", broken)
    desk.admission.endpoint.logins = SimpleNamespace(check=check)
    desk.made.rights.log_in, desk.made.rights.client.behind = lambda identity: None, ""
    reader, desk.made._reader = desk.made._reader, None
    desk.made.session = desk.session = desk.made.begin_session(desk.made.rights, False)
    said = await desk.say(b"1 LOGIN a x\r\n2 NOOP\r\n")
    assert said.startswith(b"1 NO [UNAVAILABLE]") and said.count(b"2 OK") == 1
    assert desk.warned[-1] == "a login attempt could not be checked: StoreError: cannot read"
    desk.made._reader = reader


async def test_a_defect_in_the_parser_of_a_command_is_said_and_the_session_goes_on(desk, monkeypatch):
    def broken(words):
        raise ValueError("ours")

    monkeypatch.setitem(VERBS, "STATUS", VERBS["STATUS"]._replace(parse=broken))
    said = b"1 NO [SERVERBUG] Internal error; it has been logged\r\n2 OK Done\r\n"
    assert await desk.say(b"1 STATUS INBOX (MESSAGES)\r\n2 NOOP\r\n") == said
    assert "ValueError: ours (test_imap.py:" in desk.warned[-1]
    monkeypatch.setattr(ServerSession, "_literal", broken)
    assert (await desk.say(b"3 STATUS {5+}\r\nINBOX (MESSAGES)\r\n4 NOOP\r\n")).endswith(b"4 OK Done\r\n")


async def test_a_hundred_pipelined_commands_are_answered_in_order(desk):
    desk.made.data_received(b"0 SELECT INBOX\r\n" + b"".join(b"%d FETCH 1 FLAGS\r\n" % number for number in range(1, 101)))
    said = b""
    while b"100 OK" not in said:
        await asyncio.sleep(0)
        await desk.settled()
        said += desk.heard()
    tags = [one.tag for one in responses(said) if one.tag != "*"]
    assert tags == [str(number) for number in range(101)]


async def test_idle_tells_what_is_new_and_that_the_server_is_there(desk):
    await desk.say(b"1 SELECT INBOX\r\n")
    assert await desk.say(b"2 IDLE\r\n") == b"+ idling\r\n"
    user = desk.access.user("a@a.example")
    own = desk.access._mailboxes.shards[0]
    await own.file([b"Subject: new\r\n\r\n"], [Target(user.ident)])
    await asyncio.sleep(0.01)
    assert desk.heard() == b"* 4 EXISTS\r\n* 4 RECENT\r\n"
    desk.time += STILL_HERE_SECONDS + 1
    desk.made.check(desk.time)
    assert desk.heard() == b"* OK Still here\r\n"
    desk.made.check(desk.time)
    assert desk.heard() == b""
    assert await desk.say(b"done\r\n") == b"2 OK Done\r\n"
    await own.file([b"Subject: newer\r\n\r\n"], [Target(user.ident)])
    await asyncio.sleep(0.01)
    assert desk.heard() == b""  # nobody asks
    assert await desk.say(b"3 NOOP\r\n") == b"* 5 EXISTS\r\n* 5 RECENT\r\n3 OK Done\r\n"


async def test_a_change_while_idle_cannot_be_told_is_told_later(desk):
    await desk.say(b"1 SELECT INBOX\r\n")
    await desk.say(b"2 IDLE\r\n")
    desk.made.pause_writing()
    user = desk.access.user("a@a.example")
    await desk.access._mailboxes.shards[0].file([b"Subject: new\r\n\r\n"], [Target(user.ident)])
    await asyncio.sleep(0.01)
    assert desk.heard() == b""
    desk.made.resume_writing()
    await desk.settled()
    assert desk.heard().startswith(b"* 4 EXISTS\r\n")


async def test_silence_is_answered_by_bye(desk):
    desk.time = SILENCE_SECONDS - 1
    desk.made.check(desk.time)
    assert not desk.transport.closing
    desk.time += 2
    desk.made.check(desk.time)
    assert desk.heard().startswith(b"* BYE ") and desk.transport.closing


async def test_a_relay_that_stops_says_bye(desk):
    desk.admission.intake.draining = True
    desk.made.check(0.0)
    assert desk.heard().startswith(b"* BYE [UNAVAILABLE] ") and desk.transport.closing


async def test_a_client_that_reads_nothing_for_long_is_cut_off(desk):
    await desk.say(b"1 SELECT INBOX\r\n")
    desk.time = 1.0
    desk.made.data_received(b"2 FETCH 1:* BODY.PEEK[]\r\n")
    await desk.settled()
    desk.transport.abort = desk.transport.close
    desk.made.check(OUTPUT_SECONDS + 2.0)
    assert desk.transport.closing


@pytest.mark.parametrize("size", [100, 300_000])
async def test_append_in_memory_and_in_a_file(desk, size):
    text = b"Subject: a\r\n\r\n" + b"z" * (size - 14)
    announced = b"1 APPEND INBOX (\\Seen kw) {%d}\r\n" % size
    assert await desk.say(announced) == b"+ Ready for the message\r\n"
    for at in range(0, size, 65536):
        await desk.say(text[at : at + 65536])
    assert b"1 OK [APPENDUID " in await desk.say(b"\r\n")
    await desk.say(b"2 SELECT INBOX\r\n")
    desk.made.data_received(b"3 FETCH 4 (FLAGS BODY.PEEK[])\r\n")
    said = b""
    while b"3 OK" not in said:
        await asyncio.sleep(0.001)
        desk.transport.read()
        said = desk.transport.said
    desk.transport.said = b""
    found = responses(said)[0].data
    assert found["BODY[]"] == text and set(found["FLAGS"]) >= {"\\Seen", "kw"}


async def test_append_asks_for_room_on_the_disk_before_the_message_comes(desk):
    full = b"There is no room for mail now; try again later\r\n"
    desk.files.room = 20
    assert await desk.say(b"1 APPEND INBOX {20}\r\n") == b"+ Ready for the message\r\n"
    assert await desk.say(b"Subject: x\r\n\r\n123456 {1}\r\n") == b"1 NO [UNAVAILABLE] " + full  # of both
    assert await desk.say(b"2 APPEND INBOX {21}\r\n3 APPEND INBOX {21+}\r\n" + b"x" * 21 + b"\r\n4 NOOP\r\n") == (
        b"2 NO [UNAVAILABLE] " + full + b"3 NO [UNAVAILABLE] " + full + b"4 OK Done\r\n"
    )
    desk.files.full = True
    assert await desk.say(b"5 APPEND INBOX {1}\r\n") == b"5 NO [UNAVAILABLE] " + full


async def test_an_append_that_does_not_come_to_its_end_leaves_nothing(desk):
    await desk.say(b"1 APPEND INBOX {300000}\r\n")
    await desk.say(b"x" * 200_000)
    await desk.say(b"x" * 100_000 + b" {300000}\r\n")  # another message
    await desk.say(b"y" * 100_000)
    # the fixture looks for files when the connection is lost


async def test_a_command_of_a_user_who_is_gone_ends_the_session(desk, monkeypatch):
    monkeypatch.setattr(desk.access, "user", lambda name: None)
    failed, bye, end = (await desk.say(b"1 NOOP\r\n")).split(b"\r\n")
    assert failed.startswith(b"1 NO [UNAVAILABLE] ") and bye.startswith(b"* BYE [UNAVAILABLE] ") and not end
    assert desk.transport.closing


def test_every_verb_is_executed():
    from relaymta.proto.imap_verbs import VERBS

    answered = {"CAPABILITY", "LOGOUT", "ID", "STARTTLS", "AUTHENTICATE", "LOGIN", "ENABLE"}
    assert set(COMMANDS) == set(VERBS) - answered
    assert imap_messages.COMMANDS
