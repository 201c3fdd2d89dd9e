"""What IMAP sessions are told when something fails amid a command, and what a command may take of others: nothing is said to have
failed that was done, and nothing is lost that was to be told."""

import asyncio
import re
import threading

import pytest
from msgspec.structs import replace

from relaymta.accept.turns import Turns
from relaymta.errors import StoreError
from relaymta.proto.imap_response import UNKNOWN_CTE
from relaymta.store import noted
from relaymta.store.change import MISSING, Limits, Refusal
from relaymta.store.writer import Target
from relaymta.view import fetch, imap_messages, sort
from relaymta.view.access import SLICE
from relaymta.view.selected import Selected
from tests.store.test_recipients import Bench
from tests.view.test_imap import Desk

SMALL = b"Subject: x\r\n\r\nb\r\n"
ODD = b"Subject: odd\r\nMIME-Version: 1.0\r\nContent-Type: text/plain\r\nContent-Transfer-Encoding: x-foo\r\n\r\nb\r\n"


class Room(Desk):
    """A desk whose user gets mail by `file`."""

    async def file(self, *messages: bytes) -> None:
        own, user = self.access._mailboxes.shards[0], self.access.user("a@a.example")
        assert user is not None
        for one in messages:
            await own.file([one], [Target(user.ident)])

    async def told(self, command: bytes) -> bytes:
        """The reply to a command, by a client that reads it piece by piece."""
        self.made.data_received(b"x %b\r\n" % command)
        while not re.search(rb"^x [^\r\n]*\r\n\Z", self.transport.said[-200:], re.M):
            self.transport.read()
            await asyncio.sleep(0.0005)
            await self.settled()
        return self.heard()


def counted(desk: Room, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is done where what takes long is, from now on."""
    work, beside = desk.access.work, list[object]()

    async def noted(user, function):
        beside.append(function)
        return await work(user, function)

    monkeypatch.setattr(desk.access, "work", noted)
    return beside


@pytest.fixture
async def desk(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user("a")
        (tmp_path / "large").mkdir()
        desk = Room(bench, tmp_path / "large")
        yield desk
        desk.made.connection_lost(None)
        await asyncio.gather(*desk.tasks)
        desk.access.close()


async def test_seen_is_set_for_messages_alone_whose_sections_can_be_made(desk):
    await desk.file(SMALL, ODD, SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    said = await desk.say(b"2 FETCH 1:* (BINARY[1])\r\n")
    assert said.count(b"BINARY[1] {3}\r\nb\r\n") == 2 and b"* 2 FETCH" not in said
    assert said.count(b"\\Seen") == 2 and b"2 NO [%b]" % UNKNOWN_CTE in said
    flags = await desk.say(b"3 FETCH 1:* FLAGS\r\n")
    assert re.findall(rb"\* (\d) FETCH \(UID . FLAGS \([^)]*\\Seen", flags) == [b"1", b"3"]


async def test_what_came_behind_a_fetch_that_has_failed_is_told_by_the_next_command(desk):
    """A FETCH reads the mailbox's state with its messages: that is old when the next command looks for news."""
    await desk.file(ODD)
    await desk.say(b"1 SELECT INBOX\r\n")
    await desk.say(b"2 NOOP\r\n")
    assert b"3 NO [%b]" % UNKNOWN_CTE in await desk.say(b"3 UID FETCH 1 BINARY.PEEK[1]\r\n")
    await desk.file(SMALL)
    assert b"* 2 EXISTS" in await desk.say(b"4 NOOP\r\n")


async def test_what_comes_while_a_fetch_waits_for_messages_is_told_at_its_end(desk, monkeypatch):
    await desk.file(SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    await desk.say(b"2 NOOP\r\n")
    read = desk.access.read

    async def late(function):
        await desk.file(SMALL)
        return await read(function)

    monkeypatch.setattr(imap_messages, "text_now", lambda shard, message: None)
    monkeypatch.setattr(desk.access, "read", late)
    said = await desk.say(b"3 UID FETCH 1 BODY.PEEK[]\r\n")
    assert b"BODY[] {" in said and b"* 2 EXISTS" in said, said


async def test_a_plan_is_that_of_what_the_session_has_enabled(desk):
    """Sessions share what is known of a FETCH like theirs."""
    await desk.file(SMALL, SMALL, SMALL)
    await desk.say(b"1 EXAMINE INBOX\r\n")
    assert b"\\Seen" not in await desk.say(b"2 UID FETCH 1 BODY[]\r\n")
    await desk.say(b"3 SELECT INBOX\r\n")
    assert b"\\Seen" in await desk.say(b"4 UID FETCH 1 BODY[]\r\n")
    await desk.say(b"5 ENABLE CONDSTORE\r\n")
    assert re.search(rb"\* 2 FETCH \(UID 2 FLAGS \([^)]*\\Seen[^)]*\) MODSEQ \(", await desk.say(b"6 UID FETCH 2 BODY[]\r\n"))


async def test_idle_speaks_as_the_client_has_enabled_before_it(desk):
    await desk.file(SMALL, SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    await desk.say(b"2 ENABLE QRESYNC\r\n")
    assert b"HIGHESTMODSEQ" in await desk.say(b"3 IDLE\r\n") + await later(desk)
    user, own = desk.access.user("a@a.example"), desk.access._mailboxes.shards[0]
    mailbox = desk.made._reader.selected.mailbox
    await own.store_flags(user.ident, mailbox, [2], "+", 4, [], None)
    await own.expunge(user.ident, mailbox, [1])
    said = await later(desk)
    assert b"MODSEQ (" in said and b"* VANISHED 1\r\n" in said and b"EXPUNGE" not in said
    await desk.say(b"DONE\r\n")


async def later(desk: Room) -> bytes:
    await asyncio.sleep(0.05)
    await desk.settled()
    return desk.heard()


async def test_a_change_of_an_old_message_is_told_whatever_comes_with_it(desk):
    """Copies of one COPY, then a STORE of an old and of a new message, between two looks."""
    user, own = desk.access.user("a@a.example"), desk.access._mailboxes.shards[0]
    await asyncio.gather(*(own.file([SMALL], [Target(user.ident)]) for _ in range(200)))
    await own.create(user.ident, "other", "")
    for _ in range(2):
        await own.file([SMALL], [Target(user.ident, "other")])
    await desk.say(b"1 SELECT other\r\n")
    other = desk.made._reader.selected.mailbox
    await desk.say(b"2 SELECT INBOX\r\n")
    inbox = desk.made._reader.selected.mailbox
    await own.copy(user.ident, other, [1, 2], "INBOX", Limits(), False)
    await own.store_flags(user.ident, inbox, [1, 202], "+", 4, [], None)
    said = await desk.say(b"3 NOOP\r\n")
    assert b"* 202 EXISTS" in said and re.search(rb"\* 1 FETCH \([^\r]*\\Flagged", said), said


async def test_so_many_sections_of_a_large_header_are_refused_and_some_are_made_beside_the_loop(desk, monkeypatch):
    await desk.file(b"".join(b"A%d: x\r\n" % (number % 10) for number in range(50_000)) + b"\r\nx\r\n")
    await desk.say(b"1 SELECT INBOX\r\n")
    many = b" ".join(b"BODY.PEEK[HEADER.FIELDS (X%d)]" % number for number in range(1000))
    assert (await desk.say(b"2 FETCH 1 (%b)\r\n" % many)).startswith(b"2 NO [LIMIT]")
    beside = counted(desk, monkeypatch)
    some = b" ".join(b"BODY.PEEK[HEADER.FIELDS (X%d)]" % number for number in range(20))
    said = await desk.say(b"3 FETCH 1 (%b)\r\n" % some)
    assert said.count(b"HEADER.FIELDS (X") == 20 and b"3 OK" in said and len(beside) >= 20


async def test_a_part_is_decoded_once_for_many_pieces_of_it_which_are_told_as_the_client_reads(desk, monkeypatch):
    text = b"MIME-Version: 1.0\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    await desk.file(text + b"eHh4\r\n" * 30_000, text + b"eHh4\r\n" * 400_000)
    await desk.say(b"1 SELECT INBOX\r\n")
    decoded, decode = [], fetch.Sections._decode
    monkeypatch.setattr(fetch.Sections, "_decode", lambda self, path: decoded.append(path) or decode(self, path))
    for number, pieces, octets in ((1, 100, 80_000), (2, 8, 1_000_000)):
        asked = b" ".join(b"BINARY.PEEK[1]<%d.%d>" % (place, octets) for place in range(pieces))
        said = await desk.told(b"FETCH %d (%b)" % (number, asked))
        assert said.count(b"{%d}" % octets) == pieces and len(decoded) == number
        assert desk.transport.most < octets + 4 * SLICE


async def test_a_very_large_message_is_told_to_its_end(desk, monkeypatch):
    monkeypatch.setattr(fetch, "DESCRIBED_MOST", 2_000_000)
    monkeypatch.setattr(noted, "SCANNED_MOST", 2_000_000)
    text = (b"y" * 98 + b"\r\n") * 25_000 + b"end"
    parts = b"\r\n--b\r\n\r\none\r\n--b\r\n\r\n" + text
    message = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + parts
    await desk.file(message)
    await desk.say(b"1 SELECT INBOX\r\n")
    for asked, whole in (
        (b"BODY.PEEK[]", message),
        (b"RFC822", message),
        (b"BODY.PEEK[TEXT]", parts),
        (b"BODY.PEEK[2]", text),
        (b"BINARY.PEEK[2]", text),
    ):
        said = await desk.told(b"FETCH 1 " + asked)
        assert b"{%d}\r\n%b" % (len(whole), whole) in said, asked


# What fails behind a command, or amid it


def failing(error):
    async def fails(*given, **named):
        raise error

    return fails


async def test_what_a_command_has_done_is_said_though_the_news_behind_it_fail(desk, monkeypatch):
    await desk.file(SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    with monkeypatch.context() as owner_is_gone:
        owner_is_gone.setattr(desk.access, "claim_recent", failing(ConnectionError("the owner is gone")))
        said = await desk.say(b"2 APPEND INBOX {17+}\r\n%b\r\n" % SMALL)
        assert said.startswith(b"2 OK [APPENDUID ") and "the owner is gone" in desk.warned[-1]
    assert b"* 2 EXISTS" in await desk.say(b"3 NOOP\r\n")


@pytest.mark.parametrize("error", [StoreError("no"), ConnectionError("gone")])
async def test_news_in_idle_that_cannot_be_told_are_told_a_moment_later(desk, monkeypatch, error):
    await desk.file(SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    await desk.say(b"2 IDLE\r\n")
    with monkeypatch.context() as owner_is_gone:
        owner_is_gone.setattr(desk.access, "claim_recent", failing(error))
        await desk.file(SMALL)
        assert await later(desk) == b"" and ": IDLE: " in desk.warned[-1]
    desk.made.check(desk.time)
    assert b"* 2 EXISTS" in await later(desk)
    desk.made.check(desk.time)
    assert await later(desk) == b""
    assert await desk.say(b"DONE\r\n") == b"2 OK Done\r\n"


async def test_a_select_that_fails_selects_nothing(desk, monkeypatch):
    await desk.file(SMALL)
    await desk.say(b"1 ENABLE QRESYNC\r\n")
    said = await desk.say(b"2 SELECT INBOX\r\n")
    uidvalidity = re.search(rb"UIDVALIDITY (\d+)", said)
    assert uidvalidity is not None
    with monkeypatch.context() as broken:
        broken.setattr(Selected, "since", failing(StoreError("no")))
        said = await desk.say(b"3 SELECT INBOX (QRESYNC (%b 1))\r\n" % uidvalidity[1])
        assert b"3 NO [UNAVAILABLE]" in said
    await desk.file(SMALL)
    assert await desk.say(b"4 NOOP\r\n") == b"4 OK Done\r\n"
    assert b"4 BAD" in await desk.say(b"4 FETCH 1 UID\r\n")


async def test_list_goes_on_where_the_status_of_one_mailbox_cannot_be_had(desk, monkeypatch):
    for name in (b"a", b"b"):
        await desk.say(b"1 CREATE %b\r\n" % name)
        await desk.say(b"1 APPEND %b {17+}\r\n%b\r\n" % (name, SMALL))
    monkeypatch.setattr(desk.access, "claim_recent", failing(Refusal(MISSING, "there is no such mailbox")))
    said = await desk.say(b'2 LIST "" "*" RETURN (STATUS (RECENT))\r\n')
    assert said.count(b"* LIST ") == 3 and b"2 OK" in said


# What a client takes of others


async def test_a_message_that_has_come_holds_no_descriptor_and_small_ones_no_file_of_their_own(desk):
    places = []

    class Place:
        def __init__(self):
            self.held = 1
            places.append(self)

        def give_back(self):
            self.held = 0

    desk.admission.file = Place
    many = b"".join(b" {17+}\r\n%b" % SMALL for _ in range(20))
    full = b"".join(b" {%d+}\r\n%b" % (256 << 10, b"x" * (256 << 10)) for _ in range(4))
    octets = b"1 APPEND INBOX" + full + many + b" {300000+}\r\n" + b"y" * 299_999
    for start in range(0, len(octets), 1 << 16):
        assert await desk.say(octets[start : start + (1 << 16)]) == b""
    for _ in range(1000):
        if len(places) == 21 and not places[19].held:
            break
        await desk.settled()
    assert [one.held for one in places] == [0] * 20 + [1]
    assert b"1 OK [APPENDUID " in await desk.say(b"y\r\n")
    assert not any(one.held for one in places)
    own = desk.access._mailboxes.shards[0]
    assert list(own.segments.big_files()) == []
    await desk.say(b"2 APPEND INBOX {300000}\r\n")
    assert b"2 OK [APPENDUID " in await desk.say(b"y" * 300_000 + b"\r\n")
    assert list(own.segments.big_files()) == []
    await desk.say(b"3 SELECT INBOX\r\n")
    assert (await desk.told(b"FETCH 25:26 BODY.PEEK[]")).count(b"y" * 300_000) == 2


async def test_what_takes_long_in_a_large_mailbox_is_worked_out_beside_the_loop(desk, monkeypatch):
    monkeypatch.setattr("relaymta.view.reader.RECORDS_ON_LOOP", 2)
    await desk.file(SMALL, SMALL, SMALL, SMALL)
    await desk.say(b"1 ENABLE QRESYNC\r\n")
    said = await desk.say(b"2 SELECT INBOX\r\n")
    uidvalidity = re.search(rb"UIDVALIDITY (\d+)", said)
    assert uidvalidity is not None
    await desk.say(b"3 UID STORE 2 +FLAGS.SILENT (\\Deleted)\r\n")
    await desk.say(b"3 EXPUNGE\r\n")
    said = await desk.say(b"4 SELECT INBOX (QRESYNC (%b 5))\r\n" % uidvalidity[1])
    assert b"* VANISHED (EARLIER) 2\r\n" in said
    said = await desk.say(b"5 UID FETCH 1:* (FLAGS) (CHANGEDSINCE 1 VANISHED)\r\n")
    assert b"* VANISHED (EARLIER) 2\r\n" in said and said.count(b" FETCH ") == 3


async def test_a_store_of_very_many_is_done_in_parts(desk, monkeypatch):
    monkeypatch.setattr("relaymta.view.imap_messages.STORED_TOGETHER", 2)
    asked, change = [], desk.access.change
    monkeypatch.setattr(desk.access, "change", lambda user, what, *args: asked.append(args[1]) or change(user, what, *args))
    await desk.file(SMALL, SMALL, SMALL, SMALL, SMALL)
    await desk.say(b"1 SELECT INBOX (CONDSTORE)\r\n")
    since = await desk.say(b"2 FETCH 1:3 (MODSEQ)\r\n")
    asked.clear()
    said = await desk.say(b"3 STORE 1:5 +FLAGS (x \\Seen)\r\n")
    assert asked == [[1, 2], [3, 4], [5]] and said.count(b"* FLAGS (") == 1 and b"3 OK Stored\r\n" in said
    told = re.findall(rb"\* (\d+) FETCH \(UID \d+ FLAGS \(([^)]*)\)", said)
    assert [(number, b"x" in flags.split()) for number, flags in told] == [(b"%d" % number, True) for number in range(1, 6)]
    highest = max(map(int, re.findall(rb"MODSEQ \((\d+)\)", since)))
    said = await desk.say(b"4 STORE 1:5 (UNCHANGEDSINCE %d) -FLAGS.SILENT (x)\r\n" % highest)
    assert b"4 OK [MODIFIED 1:5] " in said and b" FETCH (" not in said
    assert await desk.say(b"5 NOOP\r\n") == b"5 OK Done\r\n"


async def test_select_tells_no_change_that_is_newer_than_one_that_it_does_not_tell(desk, monkeypatch):
    await desk.file(SMALL, SMALL, SMALL)
    await desk.say(b"1 ENABLE QRESYNC\r\n")
    said = await desk.say(b"2 SELECT INBOX\r\n")
    uidvalidity = re.search(rb"UIDVALIDITY (\d+)", said)
    assert uidvalidity is not None
    user, own, since = desk.access.user("a@a.example"), desk.access._mailboxes.shards[0], Selected.since

    async def meanwhile(self, modseq):
        await own.expunge(user.ident, self.mailbox, [1])
        await own.store_flags(user.ident, self.mailbox, [2], "+", 4, [], None)
        return await since(self, modseq)

    with monkeypatch.context() as others:
        others.setattr(Selected, "since", meanwhile)
        said = await desk.say(b"3 SELECT INBOX (QRESYNC (%b 1))\r\n" % uidvalidity[1])
    highest = re.search(rb"HIGHESTMODSEQ (\d+)", said)
    assert highest is not None
    assert max(map(int, re.findall(rb"MODSEQ \((\d+)\)", said))) <= int(highest[1])
    said = await desk.say(b"4 NOOP\r\n")
    assert b"* VANISHED 1\r\n" in said and b"\\Flagged" in said


async def test_a_user_without_a_quota_has_no_quota_root(desk):
    assert await desk.say(b"1 GETQUOTAROOT INBOX\r\n") == b'* QUOTAROOT "INBOX"\r\n1 OK That is the quota\r\n'
    assert (await desk.say(b"2 GETQUOTA a@a.example\r\n")).startswith(b"2 NO [NONEXISTENT]")


async def test_body_of_many_parts_is_made_beside_the_loop(desk, monkeypatch):
    part = b"--b\r\n\r\nx\r\n"
    await desk.file(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 500 + b"--b--\r\n", SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    beside = counted(desk, monkeypatch)
    assert (await desk.say(b"2 FETCH 1:* (UID BODY)\r\n")).count(b"FETCH (UID") == 2 and len(beside) == 1


@pytest.mark.parametrize("items", [b"ENVELOPE", b"BODYSTRUCTURE", b"PREVIEW", b"BODY.PEEK[2.MIME]", b"BODY.PEEK[HEADER]"])
async def test_a_message_that_takes_long_to_describe_is_read_by_itself_and_not_where_all_read(desk, monkeypatch, items):
    """It is not described: what is kept of it would be too much. The others are read together, in front of it and behind it."""
    large = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * 9000 + b"--b--\r\n"
    await desk.file(SMALL, SMALL, large, SMALL, large, large)
    await desk.say(b"1 SELECT INBOX\r\n")
    beside, read = counted(desk, monkeypatch), imap_messages._read
    found = []

    def seen(selected, ranges, plan, heavy=False):
        one = read(selected, ranges, plan, heavy)
        found.append((heavy, one.count))
        return one

    monkeypatch.setattr(imap_messages, "_read", seen)
    assert (await desk.told(b"FETCH 1:* (%b)" % items)).count(b" FETCH (") == 6
    assert found == [(False, 2), (True, 1), (False, 1), (True, 1), (True, 1)]
    assert len(beside) >= 3


async def test_many_sections_of_a_small_message_of_many_parts_are_found_not_where_all_read(desk, monkeypatch):
    """Its description was not kept either: each section is looked for among all parts."""
    parts = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 4000 + b"--b--\r\n"
    assert len(parts) < fetch.LIGHT_DESCRIBED
    await desk.file(parts, SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    found, read = list[tuple[bool, int]](), imap_messages._read

    def seen(selected, ranges, plan, heavy=False):
        one = read(selected, ranges, plan, heavy)
        found.append((heavy, one.count))
        return one

    monkeypatch.setattr(imap_messages, "_read", seen)
    assert b"PREVIEW" in await desk.told(b"FETCH 1:* (PREVIEW)")
    some = b" ".join(b"BODY.PEEK[%d.MIME]" % (4000 - number) for number in range(20))
    assert (await desk.told(b"FETCH 1:* (%b)" % some)).count(b".MIME]") == 40
    assert found == [(False, 2), (True, 1)]  # the last one on the loop


@pytest.mark.parametrize("left", [0, 50, 600_000])
async def test_a_large_message_whose_file_ends_early_is_not_described_as_if_it_were_whole(desk, left):
    part = b"--b\r\nContent-Type: text/plain; name=" + b"n" * 100 + b"\r\n\r\nsome words\r\n"
    await desk.file(b"Subject: x\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 9000, SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    assert desk.made._reader.selected is not None
    (path,) = (desk.made._reader.selected.shard.path / "bodies" / "big").iterdir()
    path.write_bytes(path.read_bytes()[:left])
    for items in (b"ENVELOPE", b"BODYSTRUCTURE", b"BODY.PEEK[HEADER]"):
        said = await desk.told(b"FETCH 1:* (%b)" % items)
        assert b"* 1 FETCH" not in said and b"* 2 FETCH (" in said, items
        assert said.endswith(b"x NO [UNAVAILABLE] Some of the messages cannot be read now\r\n")


async def test_while_one_users_long_work_is_done_others_read(desk):
    """However many there are, and the user's own light reads."""
    access, user, going, over = desk.access, desk.access.user("a@a.example"), threading.Event(), threading.Event()

    def long() -> None:
        going.set()
        over.wait(30)

    work = [asyncio.create_task(access.work(user, long)) for _ in range(8)]
    while not going.is_set():
        await asyncio.sleep(0.001)
    assert await access.read(lambda: "read") == "read" and await access.search(user, lambda: "found") == "found"
    over.set()
    await asyncio.gather(*work)


async def test_sessions_with_long_commands_take_turns_however_many_they_are():
    """In each turn of the loop one of them goes on."""
    loop = asyncio.get_running_loop()
    turns, steps, iterations = Turns(loop), list[int](), [0]

    def count() -> None:
        iterations[0] += 1
        loop.call_soon(count)

    async def session(number: int) -> None:
        for _ in range(5):
            await turns.turn()
            steps.append(iterations[0])

    count()
    tasks = [asyncio.create_task(session(number)) for number in range(10)]
    cancelled = asyncio.create_task(session(10))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert len(steps) == 50 and len(set(steps)) == 50


async def test_a_thread_of_messages_that_refer_to_too_many_is_refused(desk, monkeypatch):
    refers = b"Message-ID: <%d@x>\r\nReferences:" + b"".join(b" <%d.%%d@x>" % one for one in range(4)) + b"\r\n\r\nb\r\n"
    await desk.file(*[refers % (number, *[number] * 4) for number in range(3)])
    await desk.say(b"1 SELECT INBOX\r\n")
    assert b"(1)" in await desk.told(b"THREAD REFERENCES UTF-8 1")
    monkeypatch.setattr(sort, "NODES_MOST", 14)
    said = await desk.told(b"THREAD REFERENCES UTF-8 ALL")
    assert said.startswith(b"x NO [LIMIT] ") and b"THREAD (" in await desk.told(b"THREAD REFERENCES UTF-8 1:2")
    assert b"THREAD (" in await desk.told(b"THREAD ORDEREDSUBJECT UTF-8 ALL")


async def moved(desk: Room, back: bool) -> None:
    """The user is in another shard now, or is back in this one."""
    own, user = desk.access._mailboxes.shards[0], desk.access.user("a@a.example")
    await own.purge(user.ident)
    if back:
        await own.task(lambda change: change.add_user(user.ident, [("Sent", "")], 1_700_000_000))
    moves = user.moves + 1 + back
    desk.access._mailboxes.directory.update(user.ident, lambda row: replace(row, shard=int(not back), moves=moves))


@pytest.mark.parametrize("back", [False, True])
async def test_a_mailbox_whose_user_is_moved_amid_a_command_has_not_been_deleted(desk, monkeypatch, back):
    """What the command has done is said; the next one is refused, and the session ends."""
    await desk.file(SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    change = desk.access.change

    async def moved_behind(*asked):
        found = await change(*asked)
        await moved(desk, back)
        return found

    monkeypatch.setattr(desk.access, "change", moved_behind)
    said = await desk.say(b"2 UID STORE 1 +FLAGS.SILENT (\\Flagged)\r\n")
    assert said == b"2 OK Stored\r\n"
    said = await desk.say(b"3 NOOP\r\n")
    assert re.fullmatch(rb"3 NO \[UNAVAILABLE\] .*\r\n\* BYE \[UNAVAILABLE\] .*\r\n", said), said


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("command", [b"CLOSE", b"EXPUNGE", b"UID SEARCH DELETED", b"FETCH 1:* (FLAGS)", b"SELECT Sent"])
async def test_a_command_is_refused_whose_user_is_moved_before_it_has_looked(desk, monkeypatch, command, back):
    """CLOSE would say that the marked messages are gone, the others that there are none."""
    await desk.file(SMALL)
    await desk.say(b"1 SELECT INBOX\r\n")
    await desk.say(b"2 UID STORE 1 +FLAGS.SILENT (\\Deleted)\r\n")
    reads = {name: getattr(desk.access, name) for name in ("read_some", "read_little", "read", "search")}
    done = []

    def moving(read):
        async def run(function):
            if not done:
                done.append(read)
                await moved(desk, back)
            return await read(function)

        return run

    for name, read in reads.items():
        monkeypatch.setattr(desk.access, name, moving(read))
    said = await desk.say(b"3 %b\r\n" % command)
    assert done and re.search(rb"^3 NO \[UNAVAILABLE\] ", said, re.MULTILINE) and b"deleted" not in said, said
