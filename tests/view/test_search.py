"""SEARCH of a mailbox in a store: what people see is found, in slices; messages that go meanwhile, and large ones."""

import asyncio
import base64
import contextlib
import datetime
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relaymta.disk.segments import segment_file
from relaymta.proto import mime
from relaymta.proto.imap_command import Search
from relaymta.proto.imap_found import Found
from relaymta.proto.imap_program import Batch, Program, Stage
from relaymta.proto.imap_records import load, values
from relaymta.proto.imap_uids import Shared
from relaymta.proto.imap_view import Mailbox, View
from relaymta.proto.imap_words import Refused
from relaymta.proto.mime import Description
from relaymta.proto.mime_text import PIECE
from relaymta.store.rows import SEEN
from relaymta.store.writer import Target
from relaymta.view import reading, search
from relaymta.view.access import SEARCHERS, Access
from relaymta.view.fetch import email_id
from relaymta.view.reading import Message
from relaymta.view.selected import Selected
from tests.proto.test_imap_grammar import parsed
from tests.store import test_recipients
from tests.store.test_shard import Bench

NOW = 1_700_000_000_000


class Box:
    """A user's INBOX in a shard, and a session that has selected it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.shard = bench, bench.shard
        self.view: View | None = None

    async def file(self, *messages: bytes, **options) -> None:
        given = {"prefix": b"Delivered-To: me@local.example\r\n", "date": NOW} | options
        for data in messages:
            (result,) = await self.bench.file(data, Target(1, **given))
            assert result.filed is not None

    def select(self) -> None:
        self.number, state = self.bench.mailbox(1)
        uids = load([reading.after(self.shard, self.number, 0, 10_000)])
        self.view = View(Shared(), 1, Mailbox(state.uidvalidity, state.uidnext, state.modseq, state.keywords), uids)

    def slices(self, key) -> list[bytes]:
        """What each slice of a search finds."""
        if self.view is None:
            self.select()
        program, found, behind = Program(key, self.view, NOW + 1000), [], 0
        while behind is not None:
            matching, after = search.searched(self.shard, self.number, program, behind)
            assert after is None or after > behind or program.turns.over
            found.append(matching)
            behind = after
        return found

    def search(self, line: str) -> list[int]:
        """The UIDs that SEARCH finds."""
        found = Found()
        for one in self.slices(parsed(f"SEARCH {line}").key):
            found.add(one)
        return values(found.uids()).tolist()

    def messages(self, stage: Stage) -> list[Message]:
        records = reading.after(self.shard, self.number, 0, 10_000)
        return [
            search._message(*rows) for rows in search._rows(self.shard, self.number, Batch(records), stage) if rows is not None
        ]


@pytest.fixture
async def box(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        yield Box(bench)


ALL = (
    # 1: encoded words in a row, which divide a character
    "From: =?iso-8859-1?q?J=FCrgen?= <j@far.example>\r\nTo: me@local.example\r\nSubject: =?utf-8?b?R3LDvMOf?=\r\n"
    " =?utf-8?q?e_aus?= Zürich\r\nDate: Fri, 27 Nov 2026 23:30:00 -0800\r\nMessage-ID: <1@far.example>\r\n\r\nplain\r\n".encode(),
    # 2: quoted-printable, broken amid a word and a character
    b"Subject: second\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
    b"a word that is bro=\r\nken, gr=C3=\r\n=BCn, stra=C3=9Fe\r\n",
    # 3: base64, HTML with an entity
    b"Subject: third\r\nContent-Type: text/html\r\nContent-Transfer-Encoding: base64\r\n\r\nPHA+Y2FmJmVhY3V0ZTsgbm9pcjwvcD4=\r\n",
    # 4: ISO-8859-1, without an encoding
    b"Subject: fourth\r\nList-Id: <list.far.example>\r\nContent-Type: text/plain; charset=ISO-8859-1\r\n\r\nM\xf6we\r\n",
    # 5: an attachment that is no text, and a message
    b"Subject: fifth\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: application/pdf; name=plan.pdf\r\n"
    b"\r\nunseen\r\n--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\nattached\r\n--b--\r\n",
)  # fmt: skip
SEARCHES = {
    'SUBJECT "grüße aus zürich"': [1], 'SUBJECT "GRÜSSE"': [1], "SUBJECT utf-8": [], 'FROM "jürgen"': [1],
    'FROM "JÜRGEN <j@far.example>"': [1], "TO me@local": [1], "BODY broken": [2], 'BODY "GRÜN, STRASSE"': [2], "BODY noir": [3],
    "BODY caf&eacute;": [3], 'BODY "café"': [], 'BODY "MÖWE"': [4], "BODY unseen": [], "BODY attached": [5], "BODY inner": [],
    "TEXT inner": [5], "TEXT plan.pdf": [5], 'TEXT "zürich"': [1], "TEXT me@local.example": [1, 2, 3, 4, 5],
    "HEADER List-Id FAR.example": [4], 'HEADER list-id ""': [4], "HEADER Delivered-To me": [1, 2, 3, 4, 5],
    'HEADER Message-ID "<1@FAR"': [1], 'HEADER Subject ""': [1, 2, 3, 4, 5], 'HEADER X ""': [], 'BODY ""': [1, 2, 3, 4, 5],
    "OR BODY broken SUBJECT third": [2, 3], "NOT OR BODY broken (SUBJECT third NOT BODY x)": [1, 4, 5],
    "OR (SUBJECT second NOT BODY broken) NOT TEXT subject": [], "CHARSET US-ASCII BODY broken": [2],
    'CHARSET UTF-8 BODY "möwe"': [4], "SENTON 27-Nov-2026": [1], "SENTSINCE 28-Nov-2026": [],
    "NOT SENTBEFORE 1-Jan-2030": [2, 3, 4, 5], "2:4 NOT SUBJECT third": [2, 4], "UID 1,5 TEXT subject": [1, 5],
}  # fmt: skip


async def test_13_search_finds_what_people_see(box):
    """Case 13 (MailKit 348, wildduck 562): RFC 9051 6.4.4."""
    await box.file(*ALL)
    assert {line: box.search(line) for line in SEARCHES} == SEARCHES
    with pytest.raises(Refused) as refused:
        parsed("SEARCH CHARSET KOI8-R BODY x")
    assert refused.value.code == b"BADCHARSET (US-ASCII UTF-8)"


async def test_13_returned_and_saved_results(box):
    """RFC 9051 6.4.4, 6.4.4.1: UID SEARCH with RETURN (MIN COUNT), SAVE and `$`."""
    await box.file(*ALL)
    box.select()

    def answer(line: str) -> bytes:
        asked = parsed(line)
        assert isinstance(asked, Search) and asked.returns is not None
        found = Found(asked.returns)
        for one in box.slices(asked.key):
            found.add(one)
        found.save(box.view)
        return b"".join(found.esearch(b"a", box.view, asked.uid, asked.modseq))

    assert answer("UID SEARCH RETURN (MIN COUNT) TEXT subject NOT 1") == b'* ESEARCH (TAG "a") UID MIN 2 COUNT 4\r\n'
    assert answer("UID SEARCH RETURN (SAVE) BODY o") == b""
    assert values(box.view.saved).tolist() == [2, 3]
    assert answer('UID SEARCH RETURN (ALL) $ NOT BODY "möwe" NOT BODY noir') == b'* ESEARCH (TAG "a") UID ALL 2\r\n'


async def test_what_a_row_says(box):
    day = 86_400_000
    await box.file(b"x" * 100, date=NOW - day, flags=SEEN)
    await box.file(b"x" * 200, b"x" * 200)
    today = datetime.datetime.fromtimestamp(NOW / 1000, datetime.UTC).strftime("%d-%b-%Y")
    assert [message.row.size for message in select(box).messages(Stage.BODY)] == [132, 232, 232]
    idents = [email_id(message.object, message.row) for message in box.messages(Stage.ENVELOPE)]
    assert idents[1] == idents[2] != idents[0]
    for line, uids in {
        "LARGER 132": [2, 3], "SMALLER 133": [1], f"ON {today}": [2, 3], f"BEFORE {today}": [1], "YOUNGER 3600": [2, 3],
        "OLDER 3600": [1], f"SAVEDSINCE {today}": [1, 2, 3], f"SAVEDBEFORE {today}": [], f"EMAILID {idents[0]}": [1],
        f"EMAILID {idents[1]}": [2, 3], "EMAILID x": [], "THREADID x": [], "UNSEEN": [2, 3], "UNSEEN SMALLER 1000 BODY x": [2, 3],
    }.items():  # fmt: skip
        assert box.search(line) == uids, line


def select(box: Box) -> Box:
    box.select()
    return box


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[None]:
    path.rename(path.with_suffix(".gone"))
    yield
    path.with_suffix(".gone").rename(path)


@contextlib.contextmanager
def damaged(path: Path, offset: int) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(before[:offset] + b"damage" + before[offset + 6 :])
    yield
    path.write_bytes(before)


def large(first: bytes, last: bytes) -> bytes:
    return b"Subject: large\r\nX-A: b\r\n\r\n" + first + b"\r\n" + b"some words\r\n" * 200_000 + last + b"\r\n"


async def test_a_large_message_is_searched_in_its_file(box):
    await box.file(large(b"begins", b"ends here"), large(b"", b""))
    select(box)
    assert [one.object.body.segment for one in box.messages(Stage.BODY)] == [0, 0]
    for line in "BODY begins", 'TEXT "ends here"', "TEXT begins", "BODY {12+}\r\nwords\r\nends ":
        assert box.search(line) == [1]
    for line in "SUBJECT large", "HEADER X-A b", 'TEXT "x-a: b"', 'BODY "some words"', "TEXT local.example":
        assert box.search(line) == [1, 2]
    assert box.search("BODY subject") == []
    with renamed(box.shard.path / "bodies" / "big"):
        assert box.search("BODY begins") == box.search("HEADER X-A b") == []
        assert box.search("SUBJECT large") == [1, 2]


async def test_a_message_without_a_description(box):
    """It has too many parts for one to be kept."""
    parts = b"".join(b"--b\r\nContent-Type: text/plain; name=n%d\r\n\r\nx\r\n" % number for number in range(3000))
    head = b"Subject: many\r\nX-A: b\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
    await box.file(head + parts, head + parts * 8)
    assert [one.object.described for one in select(box).messages(Stage.BODY)] == [None, None]
    for line in "SUBJECT many", "HEADER X-A b", "BODY x", "TEXT n2999":
        assert box.search(line) == [1, 2]
    assert box.search("BODY n2999") == box.search('HEADER name ""') == []


async def test_messages_that_go_meanwhile_are_left_out(box):
    await box.file(b"Subject: a\r\n\r\nx", b"Subject: a\r\n\r\nx", b"Subject: a\r\n\r\nx")
    records = reading.after(select(box).shard, box.number, 0, 10)
    await box.shard.task(lambda change: change.expunge(1, box.number, [2]))
    for stage in Stage.ROW, Stage.ENVELOPE, Stage.HEADER, Stage.BODY:
        first, rest = search.bring(box.shard, box.number, Batch(records), stage)
        assert (list(first.uids), len(first.data(stage)), len(rest)) == ([1, 3], 2, 0)
    assert box.search("BODY x") == [1, 3]


async def test_a_body_that_was_moved_is_found(box):
    await box.file(b"Subject: a\r\n\r\nneedle", b"Subject: b\r\n\r\nneedle")
    one, other = select(box).messages(Stage.BODY)
    moved = other._replace(object=one.object)
    assert search._data(box.shard, moved) == b"Subject: b\r\n\r\nneedle"
    await box.shard.task(lambda change: change.expunge(1, box.number, [2]))
    assert search._data(box.shard, moved) is None


async def test_damage_hides_a_message_from_its_text_alone(box):
    await box.file(b"Subject: a\r\n\r\nneedle", b"Subject: a\r\n\r\nneedle")
    one, _ = select(box).messages(Stage.BODY)
    body = one.object.body
    with damaged(segment_file(box.shard.path / "bodies", body.segment), body.offset + 40):
        assert box.search("BODY needle") == [2]
        assert box.search("SUBJECT a") == [1, 2]


async def test_slices(box, monkeypatch):
    """However little is searched at a time, each slice comes to an end of its own, and all together find the same."""
    await box.file(*(ALL[number % 5] for number in range(60)))
    select(box)
    keys = [parsed(f"SEARCH {line}").key for line in SEARCHES]
    whole = [b"".join(box.slices(key)) for key in keys]
    for together, room in ((1, 1), (7, 400), (7, 2000)):
        monkeypatch.setattr(search, "MILLISECONDS", 0)
        monkeypatch.setattr(search, "TOGETHER", together)
        monkeypatch.setattr(search, "ROOM", room)
        for key, found in zip(keys, whole, strict=True):
            assert b"".join(box.slices(key)) == found
        assert len(box.slices(parsed("SEARCH BODY broken").key)) > 60 // together
    monkeypatch.setattr(search, "RECORDS", 1)
    assert [b"".join(box.slices(key)) for key in keys] == whole


LONG = {
    "8bit": b"some words, f\xfcr jedermann\r\n" * 50_000,
    "base64": base64.encodebytes(b"some words, f\xfcr jedermann\r\n" * 40_000),
    "quoted-printable": b"some words, f=FCr jeder=\r\nmann\r\n" * 50_000,
}


@pytest.mark.parametrize("encoding", LONG)
async def test_a_large_message_is_searched_in_many_slices(box, monkeypatch, encoding):
    """A slice has one step of one message, and the next goes on behind it."""
    head = f"Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n".encode()
    last = {"8bit": b"needle", "base64": base64.encodebytes(b"needle"), "quoted-printable": b"nee=\r\ndle"}[encoding]
    await box.file(b"\r\nneedle", head + LONG[encoding], head + LONG[encoding] + last, b"\r\nneedle")
    select(box)
    monkeypatch.setattr(search, "MILLISECONDS", 0)
    read, steps = search._File.read, []
    monkeypatch.setattr(search._File, "read", lambda self, *where: (steps.append(where), read(self, *where))[1])
    for line, found in (("BODY needle", [1, 3, 4]), ("NOT TEXT needle", [2]), ("BODY missing OR BODY needle BODY some", [])):
        steps.clear()
        slices = box.slices(parsed(f"SEARCH {line}").key)
        assert [uid for one in slices for uid in values(load([one]))] == found, line
        assert len(slices) > 2 * len(LONG[encoding]) // PIECE
        pieces = [(start, end) for start, end in steps if end - start == PIECE]
        assert len(pieces) == len({*pieces}) * 2  # of both messages each once
        assert all(end - start <= PIECE for start, end in steps)


async def test_a_file_that_ends_early_is_searched_up_to_there(box):
    await box.file(b"\r\n" + LONG["8bit"][: 80 * PIECE] + b"needle" + b"x" * 2 * PIECE)
    select(box)
    (path,) = (box.shard.path / "bodies" / "big").iterdir()
    octets = path.read_bytes()
    assert box.search("BODY needle") == [1]
    path.write_bytes(octets[: 100 - PIECE])
    assert box.search("BODY needle") == [1] and box.search("BODY missing") == []
    path.write_bytes(octets)


async def test_a_message_that_has_to_be_described_is_described_once(box, monkeypatch):
    part = b"--b\r\nContent-Type: text/plain; name=" + b"n" * 100 + b"\r\n\r\nsome words\r\n"
    await box.file(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 9000)
    select(box)
    (message,) = box.messages(Stage.BODY)
    assert message.object.described is None and not message.object.body.segment
    monkeypatch.setattr(search, "MILLISECONDS", 0)
    described, done = search.described_of, []
    monkeypatch.setattr(search, "described_of", lambda *given: (done.append(given), described(*given))[1])
    assert len(box.slices(parsed("SEARCH SUBJECT x BODY needle").key)) == 2
    assert len(box.slices(parsed("SEARCH NOT SUBJECT x BODY needle").key)) > 9000
    assert len(done) == 2


async def test_one_large_message_is_described_at_a_time(box, monkeypatch):
    """All of it is in memory meanwhile."""
    part = b"--b\r\nContent-Type: text/plain; name=" + b"n" * 100 + b"\r\n\r\nsome words\r\n"
    await box.file(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 9000)
    select(box)
    (message,) = box.messages(Stage.BODY)
    describe, now, most = mime.describe, [], []

    def counted(data: bytes) -> Description:
        now.append(data)
        most.append(len(now))
        try:
            return describe(data)
        finally:
            now.pop()

    monkeypatch.setattr(mime, "describe", counted)
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: search.described_of(box.shard, message), range(12)))
    assert most == [1] * 12 and all(len(one.parts) == len(found[0].parts) > 9000 for one in found)


async def test_others_have_their_turns_amid_a_large_message(tmp_path, monkeypatch):
    """Between two slices of one user's there is one of each other user at most, and one on each other thread."""
    monkeypatch.setattr(search, "MILLISECONDS", 0)
    async with test_recipients.Bench(tmp_path) as bench:
        access, own, programs = Access(bench.mailboxes), bench.mailboxes.shards[0], {}
        for name in "abcd":
            ident = await bench.user(name)
            await own.file([b"\r\n" + (LONG["8bit"] if name != "d" else b"words")], [Target(ident)])
            options = {"read_only": True, "rev2": True, "condstore": False, "qresync": False}
            selected, _ = await Selected.open(access, access.user(f"{name}@a.example"), "INBOX", **options)
            programs[name] = selected, Program(parsed("SEARCH BODY needle").key, selected.view, search.now_ms())
        turns, searched = [], search.searched
        names = {program: name for name, (_, program) in programs.items()}
        monkeypatch.setattr(search, "searched", lambda *given: (turns.append(names[given[2]]), searched(*given))[1])

        async def find(name: str) -> None:
            behind = 0
            while behind is not None:
                _, behind = await search.slice_of(access, *programs[name], behind)

        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            many = [group.create_task(find(name)) for name in "abc"]
            while len(turns) < 20:
                await asyncio.sleep(0)
            before = len(turns)
            await find("d")
            assert not any(one.done() for one in many)
        assert turns[before:].count("d") + turns[:before].count("d") == 2
        assert [*turns[before:], "d"].index("d") <= len(programs) + SEARCHERS
        assert {name: turns.count(name) for name in "abc"} == dict.fromkeys("abc", turns.count("a"))
        access.close()


async def test_new_messages_have_no_number_yet(box):
    await box.file(b"Subject: a\r\n\r\nx")
    select(box)
    await box.file(b"Subject: a\r\n\r\nx")
    assert box.search("SUBJECT a") == box.search("ALL") == [1]


async def test_on_the_loop_and_on_threads(tmp_path):
    async with test_recipients.Bench(tmp_path) as bench:
        ident = await bench.user("a")
        access = Access(bench.mailboxes)
        user = access.user("a@a.example")
        own = bench.mailboxes.shards[0]
        await asyncio.gather(*(own.file([b"Subject: x\r\n\r\nneedle"], [Target(ident)]) for _ in range(3)))
        options = {"read_only": True, "rev2": True, "condstore": False, "qresync": False}
        selected, _ = await Selected.open(access, user, "INBOX", **options)
        for line in "ALL", "BODY needle", "SUBJECT x":
            program = Program(parsed(f"SEARCH {line}").key, selected.view, search.now_ms())
            matching, behind = await search.slice_of(access, selected, program, 0)
            assert (values(load([matching])).tolist(), behind) == ([1, 2, 3], 3)
            assert await search.slice_of(access, selected, program, behind) == (b"", None)
        access.close()


async def test_no_more_is_searched_on_the_loop_than_takes_little_time(tmp_path, monkeypatch):
    """Each key may have to decode all of what is brought together: what is too much is searched on a thread."""
    looked, bring = [], search.bring

    def noted(*given, **named):
        first, rest = bring(*given, **named)
        stored = first.envelopes.messages if first.envelopes is not None else []
        looked.append((threading.current_thread() is threading.main_thread(), sum(len(row) for _, row, _ in stored)))
        return first, rest

    monkeypatch.setattr(search, "bring", noted)
    async with test_recipients.Bench(tmp_path) as bench:
        access, own = Access(bench.mailboxes), bench.mailboxes.shards[0]
        options = {"read_only": True, "rev2": True, "condstore": False, "qresync": False}
        words = {"short": b"words", "some": "wörter ".encode() * 100, "long": "wörter ".encode() * 1200}
        for name, subject in words.items():
            ident = await bench.user(name)
            await asyncio.gather(*(own.file([b"Subject: %b\r\n\r\n" % subject], [Target(ident)]) for _ in range(30)))
        several = " ".join(f"NOT SUBJECT a{number}" for number in range(100))
        here = {}
        for name in words:
            selected, _ = await Selected.open(access, access.user(f"{name}@a.example"), "INBOX", **options)
            for line in "NOT SUBJECT needle", "NOT SENTON 1-Jan-2020", several, several.replace("SUBJECT a", "LARGER 99999"):
                program, found, behind = Program(parsed(f"SEARCH {line}").key, selected.view, search.now_ms()), 0, 0
                looked.clear()
                while behind is not None:
                    matching, behind = await search.slice_of(access, selected, program, behind)
                    found += len(values(load([matching])))
                assert found == 30
                here.setdefault(name, []).append(looked[0][0])
                assert all(octets * line.count("NOT") < 2 * 8192 for on_loop, octets in looked if on_loop)
        assert here == {"short": [True, True, False, False], "some": [True, True, False, False], "long": [False] * 4}
        access.close()
