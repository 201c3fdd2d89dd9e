"""Messages in mbox and Maildir++: each comes back as it was, also from what other programs write, whatever is in it."""

import io
import mailbox
import os
import socket
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto.mailbox_name import problem
from relaymta.store import maildir, mbox
from relaymta.store.formats import FLAGS, MOST, Broken, Stored, atoms, from_disk, to_disk
from tests.support.prove import in_prove

DATE = 1795816123  # Fri Nov 27 21:48:43 2026
ENVELOPE = b"From a@b.test Fri Nov 27 21:48:43 2026"
MARK = b"X-Relaymta-Export: mboxrd"
INTERNAL = b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA"
ALL = list(FLAGS)
PLAIN = b"From: a@b.test\r\nSubject: x\r\n\r\nHello\r\n"

MESSAGES = {
    "plain": PLAIN,
    "nothing": b"",
    "an empty line": b"\r\n",
    "no body": b"Subject: x\r\n",
    "an empty body": b"Subject: x\r\n\r\n",
    "no header": b"Hello\r\nworld\r\n",
    "a continuation first": b" Hello\r\n\tworld\r\n",
    "no final line end": b"Subject: x\r\n\r\nHello",
    "no line end": b"Hello",
    "a final CR": b"Subject: x\r\n\r\nHello\r",
    "many empty lines at the end": b"Subject: x\r\n\r\n\r\n\r\n\r\n",
    "From_ at the beginning": b"From here\r\n\r\nFrom there\r\n",
    "From_ in the middle": b"Subject: x\r\n\r\nFrom \r\n\r\nFrom me\r\nFrom",
    "From_ in the header": b"Subject: x\r\nFrom me\r\n\r\n",
    "quoted From_": b">From a\r\n\r\n>From b\r\n>>From c\r\n>>>>From \r\n> From d\r\n>Frome\r\n",
    "envelope lines": b"\r\n".join([ENVELOPE, b"", ENVELOPE, ENVELOPE, b"", b"", b">" + ENVELOPE, b""]),
    "8-bit and NUL": bytes(range(14, 256)) * 3 + b"\0\0\r\n\0",
    "bare CR and LF": b"Subject: x\r\n\r\na\rb\nc\r\r\nFrom d\nFrom e\rFrom f\r\n\n\r",
    "bare CR": b"Subject: x\rFrom y\r\rFrom z",
    "bare LF last": b"Subject: x\r\n\r\nHello\n",
    "state of its own": b"Status: D\r\nX-Status: D\r\nX-Keywords: own\r\nContent-Length: 3\r\nX-UID: 7\r\n\r\nHello\r\n",
    "only state": b"Status: R",
    "a mark of its own": b"Status: R\r\nX-Status: F\r\nX-Keywords: own\r\n" + MARK + b", no line end\r\n\r\nHello\r\n",
    "only marks": (MARK + b"\r\n") * 3,
    "state of a file": b"X-IMAP: 1 2\r\n" + INTERNAL + b"\r\n\r\n",
    "a Return-Path": b"Return-Path: <x@y.test>\r\n" + PLAIN,
    "a long Return-Path": b"Return-Path: <" + b"x" * 2000 + b">\r\n" + PLAIN,
    "a long line": b"Subject: x\r\n\r\n" + b"From " * 30_000 + b"\r\nFrom y\r\n",
}
TOKENS = [
    b"\r\n", b"\r\n", b"\n", b"\r", b"From ", b"From", b">", b" ", b"x", b"\0", b"\xff", b"\r\n\r\n", b"\r\nFrom ", ENVELOPE,
    b"Status: R\r\n", b"X-Status: ADFT\r\n", b"X-Keywords: own\r\n", b"Content-Length: 5\r\n", MARK, b", no line end",
    *(b"%b\r\n" % line for line in (ENVELOPE, MARK, b"X-IMAP: 1 2", INTERNAL)),
]  # fmt: skip
data = st.one_of(st.lists(st.sampled_from(TOKENS), max_size=25).map(b"".join), st.binary(max_size=60))
keyword = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='(){%*"\\]'), min_size=1, max_size=12)
stored = st.builds(
    Stored,
    data,
    st.one_of(st.integers(-62135596800, 253402300799), st.integers(0, 2**31), st.just(DATE)).map(float),
    st.sets(st.sampled_from(FLAGS)).map(lambda chosen: [flag for flag in FLAGS if flag in chosen]),
    st.lists(keyword, max_size=4).map(atoms),
)


def comes_back(one: Stored) -> Stored:
    """What of a message is expected after export and import: bare LF and no CRLF at all is the one exception."""
    lost = b"\n" in one.data and b"\r\n" not in one.data
    return Stored(one.data.replace(b"\n", b"\r\n") if lost else one.data, one.date, one.flags, one.keywords)


def mbox_of(*messages: Stored) -> bytes:
    file = io.BytesIO()
    for one in messages:
        mbox.write(file, one)
    return file.getvalue()


def read_mbox(text: bytes, most: int = MOST) -> list[Stored | Broken]:
    return list(mbox.read(io.BytesIO(text), most))


def write_maildir(root: Path, *messages: Stored, name: str = "INBOX") -> None:
    with maildir.Writer(root, name) as writer:
        for number, one in enumerate(messages):
            writer.write(f"{number}", one)


def read_maildir(root: Path, name: str = "INBOX") -> list[Stored | Broken]:
    return [one for _, one in maildir.read(maildir.folder_of(root, name))]


def in_order(messages: list[Stored]) -> list[Stored]:
    """As a Maildir has them: by date; keywords by their numbers, which is the order in which the mailbox came to have them."""
    numbers: dict[str, str] = {}
    for word in (word for one in messages for word in one.keywords):
        numbers.setdefault(word.lower(), word)
    places = list(numbers)
    found = []
    for one in sorted(messages, key=lambda one: one.date):
        words = sorted((word.lower() for word in one.keywords), key=places.index)
        found.append(Stored(one.data, one.date, one.flags, [numbers[word] for word in words]))
    return found


# Line ends


@pytest.mark.parametrize("what", MESSAGES)
def test_line_ends_of_a_file(what):
    text = MESSAGES[what]
    assert from_disk(to_disk(text)) == text
    if text.count(b"\r") == text.count(b"\n") == text.count(b"\r\n"):
        assert b"\r" not in to_disk(text)
    else:
        assert to_disk(text) == text


# Round trips


@pytest.mark.parametrize("what", MESSAGES)
def test_a_message_comes_back_from_an_mbox(what):
    for flags, keywords in (([], []), (ALL, ["$Forwarded", "work"]), (["\\Seen"], ["a"])):
        one = Stored(MESSAGES[what], float(DATE), flags, keywords)
        other = Stored(PLAIN, 0.0)
        assert read_mbox(mbox_of(one)) == [one]
        assert read_mbox(mbox_of(other, one, one, other)) == [other, one, one, other]


@pytest.mark.parametrize("what", MESSAGES)
def test_a_message_comes_back_from_a_maildir(tmp_path, what):
    one = Stored(MESSAGES[what], float(DATE), ALL, ["$Forwarded", "work"])
    bare = Stored(MESSAGES[what], float(DATE))
    write_maildir(tmp_path, bare, one)
    assert read_maildir(tmp_path) == [bare, one]


@given(st.lists(stored, max_size=5))
def test_any_messages_come_back_from_an_mbox(messages):
    assert read_mbox(mbox_of(*messages)) == [comes_back(one) for one in messages]


@settings(max_examples=60)
@given(st.lists(stored, max_size=3))
def test_any_messages_come_back_from_a_maildir(tmp_path_factory, messages):
    root = tmp_path_factory.mktemp("maildir")
    write_maildir(root, *messages)
    assert read_maildir(root) == in_order([comes_back(one) for one in messages])


def test_a_fraction_of_a_second_is_dropped(tmp_path):
    one = Stored(PLAIN, DATE + 0.9)
    write_maildir(tmp_path, one)
    for found in (read_mbox(mbox_of(one)), read_maildir(tmp_path)):
        assert found == [Stored(PLAIN, float(DATE))]


def test_what_is_no_keyword_is_refused(tmp_path):
    for words in (["a b"], ["a\nX: y"], ["ä"], [""], ["\\Seen"], ["a", "A"]):
        file = io.BytesIO()
        with pytest.raises(ValueError):
            mbox.write(file, Stored(PLAIN, 0, [], words))
        assert file.getvalue() == b""
        with maildir.Writer(tmp_path, "INBOX") as writer, pytest.raises(ValueError):
            writer.write("1", Stored(PLAIN, 0, [], words))
    assert read_maildir(tmp_path) == []


# mbox of other programs


@pytest.mark.parametrize(
    ("date", "offset"),
    [
        (b"Fri Nov 27 21:48:43 2026", 0), (b"Fri Nov 27 21:48:43 2026 +0100", 1), (b"Fri Nov 27 21:48:43 +0100 2026", 1),
        (b"Fri Nov 27 21:48:43 EST 2026", -5), (b"Fri Nov 27 21:48:43 2026 -0330", -3.5), (b"Fri Nov 27 21:48:43 GMT 2026", 0),
        (b"Fri Nov 27 21:48:43 26", 0), (b"Fri Nov 27 21:48:43 2026 remote from host", 0), (b"Fri Nov 27 21:48:43 XYZ 2026", 0),
        (b"Fri Nov 27 21:48:43 MET DST 2026", 1), (b"Fri Nov 27 21:48:43 2026\r", 0), (b"Fri Nov 27 21:48:43 2026   ", 0),
    ],
)  # fmt: skip
def test_envelope_dates(date, offset):
    for sender in (b"a@b.test", b"-", b'"a b"@c.test', b"", b"Mon Jan 1", b"a  b"):
        text = b"From " + sender + b" " + date + b"\nSubject: x\n\nHello\n"
        assert read_mbox(text) == [Stored(b"Subject: x\r\n\r\nHello\r\n", DATE - offset * 3600)]


@pytest.mark.parametrize(
    "line",
    [
        b"From a", b"From ", b"From a@b.test today", b"From a Fri Nov 27 21:48:43", b"From a Fri Foo 27 21:48:43 2026", b"From:",
        b"From a Fri Nov 32 21:48:43 2026", b"From a Fri Nov 27 24:48:43 2026", b"From a Fri Nov 27 21:60:43 2026", b"from a Fri",
        b"From a Fri Nov 27 21:48:43 0000", b"From a Fri Nov 27 21:48:43 20266", b"From a Fri Nov 27 21:48:43 2026 and more",
        b" " + ENVELOPE, b"From " + b"x" * 1000 + b" Fri Nov 27 21:48:43 2026",
    ],
)  # fmt: skip
def test_what_is_no_envelope_line_is_text(line):
    text = b"Subject: x\n\nHello\n\n" + line + b"\nHello\n"
    assert read_mbox(ENVELOPE + b"\n" + text + b"\n") == [Stored(text.replace(b"\n", b"\r\n"), DATE)]


FOREIGN = [
    (b"Status: RO\n", ["\\Seen"], []),
    (b"Status: O\nX-Status: AF\n", ["\\Answered", "\\Flagged"], []),
    (b"Status: r\n", ["\\Answered"], []),
    (b"X-Status: DT\nX-Keywords: $Label1 work  \nX-UID: 7\nStatus: R\n", ["\\Seen", "\\Deleted", "\\Draft"], ["$Label1", "work"]),
    (b"X-IMAPbase: 1795816123 17 $Forwarded work\nX-Keywords: work\n  home Work\n", [], ["work", "home"]),
    (b"STATUS : R\nContent-Length: 6\nLines: 1\n", ["\\Seen"], []),
    (b"X-Keywords: \xe4 (a a\\b ok\nX-Status:\nStatus:\n", [], ["ok"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "flags", "keywords"), FOREIGN)
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_state_that_others_have_written(fields, flags, keywords, ends):
    for text in (fields + b"Subject: x\n\nHello\n", b"Subject: x\n" + fields + b"\nHello\n"):
        file = (ENVELOPE + b"\n" + text + b"\n" + ENVELOPE + b"\n\nStatus: RO\n\n").replace(b"\n", ends)
        assert read_mbox(file) == [
            Stored(b"Subject: x\r\n\r\nHello\r\n", DATE, flags, keywords), Stored(b"\r\nStatus: RO\r\n", DATE),
        ]  # fmt: skip


def test_a_content_length_that_is_wrong_is_not_believed():
    text = (
        ENVELOPE + b"\nSubject: 1\nContent-Length: %d\nStatus: RO\n\n>From me\nFrom you\n\n" + ENVELOPE + b"\nSubject: 2\n\n2\n\n"
    )
    for length in (0, 17, 18, 19, 20, 40, 10**6, 10**12):
        assert read_mbox(text % length) == [
            Stored(b"Subject: 1\r\n\r\nFrom me\r\nFrom you\r\n", DATE, ["\\Seen"]), Stored(b"Subject: 2\r\n\r\n2\r\n", DATE),
        ]  # fmt: skip


def of_length(body: bytes, length: int) -> bytes:
    return ENVELOPE + b"\nContent-Length: %d\n\n%b\n" % (length, body)


def test_the_content_length_of_dovecot_says_where_a_body_ends():
    body = b"1\n" + ENVELOPE + b"\n2\n\n" + ENVELOPE + b"\n\n3\n"
    plain = Stored(b"\r\n" + body.replace(b"\n", b"\r\n"), DATE)
    one, other = of_length(body, len(body)), of_length(b"4\n", 2)
    assert read_mbox(one) == read_mbox(of_length(body, len(body) - 1)) == [plain]
    assert read_mbox(other + one + one + other) == [Stored(b"\r\n4\r\n", DATE), plain, plain, Stored(b"\r\n4\r\n", DATE)]
    pieces = [Stored(b"\r\n1\r\n", DATE), Stored(b"2\r\n", DATE), Stored(b"\r\n3\r\n", DATE)]
    for length in (2, len(body) - 2, len(body) + 2, 10**9):  # the second is not believed after the first
        split = read_mbox(of_length(body, length) + one)
        assert split == [*pieces, *pieces] if length > 2 else split == [*pieces, plain]
    long = read_mbox(one + of_length(body + b"x" * 200, len(body) + 200) + b"Hello\n", 200)
    assert long == [plain, *pieces[:2], Broken("line 19", "a message of more than 200 octets")]
    ends = read_mbox(of_length(body, len(body)).rstrip() + b"\n\n" + b"x" * 200, 200)
    assert ends == [*pieces[:2], Broken("line 8", "a message of more than 200 octets")]


def test_where_an_envelope_line_is_not_quoted_nothing_is():
    body = b">From me\n" + ENVELOPE + b"\n"
    assert read_mbox(of_length(body, len(body))) == [Stored(b"\r\n" + body.replace(b"\n", b"\r\n"), DATE)]
    assert read_mbox(of_length(body[:9], 9)) == [Stored(b"\r\nFrom me\r\n", DATE)]


def test_a_content_length_in_the_body_says_nothing():
    text = b"no field\r\nContent-Length: 1000\r\n\r\n" + ENVELOPE + b"\r\n"
    messages = [Stored(text, DATE), Stored(b"Content-Length: 1000\r\n\r\n1", DATE), Stored(PLAIN, DATE)]
    assert read_mbox(mbox_of(*messages)) == messages
    assert len(read_mbox((ENVELOPE + b"\nno field\nContent-Length: 1000\n\n") * 2)) == 2


def test_the_state_of_a_file_is_no_message():
    internal = INTERNAL + b"\nX-IMAP: 1795816123 0000000002 work\nStatus: RO\n\nText\n\n"
    assert read_mbox(ENVELOPE + b"\n" + internal + ENVELOPE + b"\n" + internal) == [
        Stored(INTERNAL + b"\r\n\r\nText\r\n", DATE, ["\\Seen"])
    ]


def test_a_program_that_changes_flags_changes_no_message():
    """mutt takes Status: and X-Status: out and writes them at the end of the header; others change them in their places."""
    text = b"Subject: x\r\n\r\nHello"
    ours = mbox_of(Stored(text, float(DATE), [], ["work"]))
    status, keywords = b"Status: O\nX-Status: \n", b"X-Keywords: work\n"
    assert status + keywords in ours
    changed = Stored(text, float(DATE), ["\\Seen", "\\Answered"], ["work"])
    assert read_mbox(ours.replace(status, b"Status: RO\nX-Status: A\n")) == [changed]
    moved = ours.replace(status, b"").replace(b"x\n\n", b"x\nStatus: RO\nX-Status: A\nContent-Length: 6\nLines: 1\n\n")
    assert read_mbox(moved) == [changed]
    assert read_mbox(ours.replace(b"\n", b"\r\n").replace(b"O\r\nX-Status: ", b"RO\r\nX-Status: A")) == [changed]


MUTT = b"""From MAILER-DAEMON Fri Nov 27 21:48:43 2026
X-Keywords: work
X-Relaymta-Export: mboxrd, no line end
X-Relaymta-Status: RO
X-Relaymta-X-Status: D
Subject: x
Status: O
X-Status: AF
Content-Length: 6
Lines: 1

Hello

"""
DOVECOT = b"""From MAILER-DAEMON Fri Nov 27 21:48:43 2026
Status: O
X-Status: AF
X-Relaymta-Export: mboxrd, no line end
X-Relaymta-Status: RO
X-Relaymta-X-Status: D
Subject: x
X-IMAPbase: 1795817372 0000000004 work
X-UID: 1
X-Keywords: work

Hello

"""


@pytest.mark.parametrize("text", [MUTT, DOVECOT], ids=["mutt", "Dovecot"])
def test_what_others_have_made_of_ours(text):
    """As mutt 2.2 and Dovecot 2.3 wrote it when a flag of our message was changed."""
    one = Stored(b"Status: RO\r\nX-Status: D\r\nSubject: x\r\n\r\nHello", DATE, ["\\Answered", "\\Flagged"], ["work"])
    assert read_mbox(text) == [one]
    assert mbox_of(one).replace(b"\nStatus: O\nX-Status: AF", b"").startswith(MUTT.partition(b"\nStatus:")[0])


def test_python_reads_our_mbox_and_we_read_pythons(tmp_path):
    path = tmp_path / "mbox"
    path.write_bytes(mbox_of(Stored(PLAIN, DATE, ["\\Seen", "\\Flagged"]), *(Stored(text, DATE) for text in MESSAGES.values())))
    with closing(mailbox.mbox(path)) as box:
        assert len(box) == 1 + len(MESSAGES)
        first = box[0]
        assert (first.get_flags(), first["Subject"], first.get_payload()) == ("ROF", "x", "Hello\n")
        assert time.strptime(first.get_from().partition(" ")[2]) == (*time.gmtime(DATE)[:8], -1)
        assert [one.get_flags() for one in box][1:] == ["O"] * len(MESSAGES)
    again = tmp_path / "again"
    with closing(mailbox.mbox(again)) as box:
        for flags, body in (("", "From me\n"), ("RO", ">From you\n"), ("RAFD", "From there\n\nFrom\n")):
            one = mailbox.mboxMessage(f"Subject: x\n\n{body}".encode())
            one.set_flags(flags)
            one.set_from("a@b.test", time.gmtime(DATE))
            box.add(one)
    assert [(one.data, one.date, one.flags) for one in read_mbox(again.read_bytes())] == [
        (b"Subject: x\r\n\r\nFrom me\r\n", DATE, []),
        (b"Subject: x\r\n\r\nFrom you\r\n", DATE, ["\\Seen"]),  # Python does not quote it a second time
        (b"Subject: x\r\n\r\nFrom there\r\n\r\nFrom\r\n", DATE, ["\\Seen", "\\Answered", "\\Flagged", "\\Deleted"]),
    ]


# What is broken


def test_a_file_that_is_no_mbox_is_named_by_its_line():
    reason = "no mbox: there is no envelope line (From sender date) here"
    assert read_mbox(b"") == read_mbox(b"\n\r\n\n") == []
    assert read_mbox(b"Hello\n") == [Broken("line 1", reason)]
    assert read_mbox(b"\n\nFrom me\n\n" + ENVELOPE + b"\n\nHello") == [Broken("line 3", reason), Stored(b"\r\nHello", DATE)]
    assert read_mbox(b"\n" + ENVELOPE + b"\n\nHello\n\n") == [Stored(b"\r\nHello\r\n", DATE)]


def test_a_message_that_is_too_long_is_named_and_the_others_are_read():
    one = ENVELOPE + b"\n\n%b\n\n"
    text = one % b"1" + one % (b"2" * 100) + one % b"3" + one % (b"4" * 98) + one % (b"5\n" * 100)
    assert read_mbox(text, 100) == [
        Stored(b"\r\n1\r\n", DATE), Broken("line 5", "a message of more than 100 octets"), Stored(b"\r\n3\r\n", DATE),
        Stored(b"\r\n" + b"4" * 98 + b"\r\n", DATE), Broken("line 17", "a message of more than 100 octets"),
    ]  # fmt: skip


class Endless(io.RawIOBase):
    """A file that is made while it is read: a front, and a piece again and again."""

    def __init__(self, front: bytes, piece: bytes, times: int) -> None:
        self._left = iter([front or piece, *[piece] * (times - (not front))])
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        self._rest = self._rest or next(self._left, b"")
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


LONG = mbox_of(Stored(PLAIN + b"Hello, hello, hello, hello, hello\r\n" * 1000, DATE, ["\\Seen"]))
HOSTILE = {
    "many messages": (LONG, LONG, 599, MOST, 600),
    "50 MB without a line end": (ENVELOPE + b"\n\n", b"x" * 2**16, 800, 2**20, 1),
    "NULs": (ENVELOPE + b"\n\n", b"\0" * 2**16, 800, 2**20, 1),
    "no mbox": (b"x", b"x" * 2**16, 800, 2**20, 1),
    "a million times From_": (ENVELOPE + b"\n\n", b"From \n" * 10_000, 100, 2**20, 1),
    "From_ that is read": (ENVELOPE + b"\n\n", b"From \n" * 10_000, 50, MOST, 1),
    "envelope lines": (ENVELOPE + b"\n", (ENVELOPE + b"\n") * 10_000, 20, MOST, 200_001),
    "lengths": (b"", (ENVELOPE + b"\nContent-Length: 1000000000\n\n") * 1000, 100, 2**20, 100_000),
    "dates": (ENVELOPE + b"\n\n", (b"From " + ENVELOPE[15:-4] * 40 + b"\n") * 1000, 10, MOST, 1),
    "quotes": (ENVELOPE + b"\n\n", b">" * 2**16, 100, MOST, 1),
    "quotes and an end": (ENVELOPE + b"\n\nFrom ", b">" * 2**16, 100, MOST, 1),
    "empty lines": (ENVELOPE + b"\nA:\n ", b"\n" * 2**16, 20, MOST, 1),
    "folds": (ENVELOPE + b"\nStatus: ", b"R\n " * 2**14, 40, MOST, 1),
    "keywords": (ENVELOPE + b"\nX-Keywords: ", b"a " * 2**14, 100, MOST, 1),
    "fields": (ENVELOPE + b"\n", b"Status: R\n" * 2**12, 100, MOST, 1),
    "blanks": (ENVELOPE + b"\n", b"Status" + b" " * 2**16, 100, MOST, 1),
}


ALIKE = ("NULs", "quotes and an end", "blanks")


@pytest.mark.parametrize("what", [what for what in HOSTILE if what not in ALIKE] + in_prove(*ALIKE))
def test_time_is_linear_and_memory_bounded(what):
    front, piece, times, most, found = HOSTILE[what]

    def seconds(part):
        begun = time.process_time()
        assert sum(1 for _ in mbox.read(io.BufferedReader(Endless(front, piece, part)), most)) == found or part < times
        return time.process_time() - begun

    for _ in range(6):  # what runs beside takes the caches away now and then
        if seconds(times) < 10 * seconds(times // 4) + 0.1:  # a square is at 16
            return
    pytest.fail("the time is not linear")


@pytest.mark.parametrize("what", ["many messages", "50 MB without a line end", "no mbox", "a million times From_"])
def test_memory_is_bounded(what):
    front, piece, times, most, _ = HOSTILE[what]
    tracemalloc.start()
    try:
        for _ in mbox.read(io.BufferedReader(Endless(front, piece, times // 4)), most):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# Maildir: names of mailboxes

NAMES = {
    "INBOX": "",
    "Sent": ".Sent",
    "Sent/2024": ".Sent.2024",
    "INBOX/Sub": ".INBOX.Sub",
    "Entwürfe/台北": ".Entw&APw-rfe.&U,BTFw-",
    "AT&T": ".AT&-T",
    "v1.2/a.b.c": ".v1&AC4-2.a&AC4-b&AC4-c",
    "ä.": ".&AOQ-&AC4-",
    "./..": ".&AC4-.&AC4-&AC4-",
    "&AC4-": ".&-AC4-",
    "a b~$": ".a b~$",
}
level = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(".&-AC4é台")), min_size=1, max_size=12)
names = st.lists(level, min_size=1, max_size=4).map("/".join).filter(lambda name: problem(name) is None)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_mailboxes_are_names_of_folders(tmp_path, name):
    assert maildir.folder_of(tmp_path, name) == tmp_path / NAMES[name]
    write_maildir(tmp_path, Stored(PLAIN, DATE), name=name)
    assert (name, tmp_path / NAMES[name]) in maildir.folders(tmp_path)
    assert (tmp_path / NAMES[name] / "maildirfolder").exists() == (name != "INBOX")


@settings(max_examples=60)
@given(st.lists(names, max_size=5, unique=True))
def test_all_names_come_back(tmp_path_factory, chosen):
    root = tmp_path_factory.mktemp("maildir")
    for name in chosen:
        maildir.Writer(root, name).close()
    found = maildir.folders(root)
    assert {name for name, _ in found} - {"INBOX"} == set(chosen) - {"INBOX"}
    assert {(name, maildir.folder_of(root, name)) for name in chosen} <= set(found)


def test_a_name_that_is_too_long_for_a_folder(tmp_path):
    chosen = ["/".join(["台北" * 20] * 8), "/".join(["台北" * 20] * 7 + ["x"]), "x" * 255, "." * 200]
    assert [problem(name) for name in chosen] == [None] * 4
    for number, name in enumerate(chosen):
        write_maildir(tmp_path, Stored(b"%d" % number, DATE), name=name)
        write_maildir(tmp_path, Stored(b"%d" % number, DATE), name=name)
    found = maildir.folders(tmp_path)
    assert {name for name, _ in found} == set(chosen)
    assert all(len(path.name) <= 255 for _, path in found)
    assert [read_maildir(tmp_path, name)[0].data for name in chosen] == [b"0", b"1", b"2", b"3"]


def test_names_that_others_have_written(tmp_path):
    there = {
        ".Entwürfe": "Entwürfe", ".e\u0301": "é", ".AT&T": "AT&T", ".&AOQALg-": "ä.", ".Sent.a&AC4-b": "Sent/a.b",
        ".&U,BTFw": "&U,BTFw",
    }  # fmt: skip
    for name in there:
        (tmp_path / name / "new").mkdir(parents=True)
    for name in (".git", "plain/cur", ".file/tmp"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".link").symlink_to(tmp_path / ".git")
    assert {path.name: name for name, path in maildir.folders(tmp_path)} == there
    assert maildir.folders(tmp_path / ".git") == []


def test_folders_that_cannot_be_mailboxes_are_named(tmp_path):
    root = tmp_path / "root"
    for name in ("..x", ".a..b", ".a&AC8-b", ".a*", ".a\x1b[1m", b".\xff".decode(errors="surrogateescape"), "../outside"):
        (root / name / "cur").mkdir(parents=True)
    (root / ".away").symlink_to(tmp_path / "outside")
    found = {path.place: path.reason for _, path in maildir.folders(root)}
    assert found == {
        "..x": "a level of the name is empty", ".a..b": "a level of the name is empty", ".a*": "the name has a wildcard (* or %)",
        ".a&AC8-b": "a level of the name has a slash", ".a\\x1b[1m": "the name has a control character",
        ".\\udcff": "the name is not UTF-8", ".away": "a symbolic link",
    }  # fmt: skip
    with pytest.raises(FileNotFoundError):
        maildir.folders(tmp_path / "nothing")
    for name in ("", "a//b", "a*"):
        with pytest.raises(ValueError):
            maildir.Writer(root, name)


# Maildir: flags, dates, order


def put(path: Path, data: bytes = b"x", mtime: float = DATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (mtime, mtime))


def test_flags_in_names(tmp_path):
    keywords = "0 $Forwarded\n1 work\n2 a(b\n25 last\n26 more\nx y\n-1 z\n999999 far\n3\n1 again\n"
    put(tmp_path / "dovecot-keywords", keywords.encode())
    there = {
        "cur/1.a:2,": ([], []),
        "cur/2.a:2,DFRST": (ALL, []),
        "cur/3.a:2,PS": (["\\Seen"], ["$Forwarded"]),
        "cur/4.a:2,Sabcdz": (["\\Seen"], ["$Forwarded", "work", "last"]),
        "cur/5.a,S=1,W=2:2,T": (["\\Deleted"], []),
        "cur/6.a:2,PXa,junk": ([], ["$Forwarded"]),
        "cur/7.a:1,S": ([], []),
        "cur/8.a!2,S": (["\\Seen"], []),
        "cur/9.a.relaymta,K=1:2,b": ([], ["work", "more"]),
        "new/10.a": ([], []),
    }
    for name in there:
        put(tmp_path / name)
    assert {name: (one.flags, one.keywords) for name, one in maildir.read(tmp_path)} == there


def test_keywords_are_in_the_names_and_in_the_file(tmp_path):
    first = [f"k{number}" for number in range(30)]
    write_maildir(tmp_path, Stored(PLAIN, DATE, [], first), Stored(PLAIN, DATE, ["\\Draft", "\\Seen"], ["K2", "k27", "new"]))
    assert sorted(os.listdir(tmp_path / "cur")) == [
        f"{DATE}.0.relaymta,K=f:2,abcdefghijklmnopqrstuvwxyz", f"{DATE}.1.relaymta,K=12:2,DSc",
    ]  # fmt: skip
    assert (tmp_path / "dovecot-keywords").read_text() == "".join(f"{n} {word}\n" for n, word in enumerate([*first, "new"]))
    assert [one.keywords for one in read_maildir(tmp_path)] == [first, ["k2", "k27", "new"]]


def test_dates(tmp_path):
    future = int(time.time()) + 10**6
    for name, mtime in (
        ("1.a", DATE), ("1000.a", 0), ("1001.a", -5), (f"{DATE}.b", future), ("x", future), ("x:2,S", 5.9),
        ("12345678901234.a", 7),
    ):  # fmt: skip
        put(tmp_path / "cur" / name, mtime=min(mtime, time.time() + 2 * 86400) if name == "x" else mtime)
    found = {name: one.date for name, one in maildir.read(tmp_path)}
    assert found.pop("cur/x") > time.time()
    assert found == {
        "cur/1.a": DATE, "cur/1000.a": 1000, "cur/1001.a": 1001, f"cur/{DATE}.b": DATE, "cur/x:2,S": 5, "cur/12345678901234.a": 7,
    }  # fmt: skip


def test_the_order_is_that_of_the_seconds_whatever_the_flags(tmp_path):
    order = [
        "cur/a:2,S", "cur/999999999.a:2,", "new/1000000000.M5P1.h", "cur/1000000000.M40P1.h:2,FS", "cur/1000000000.M41P1.h:2,",
        "cur/1000000001.2.relaymta,K=1:2,a", "cur/1000000001.10.relaymta:2,",
    ]  # fmt: skip
    for name in sorted(order):
        put(tmp_path / name)
    put(tmp_path / "cur/.hidden")
    put(tmp_path / "tmp/1.a")
    assert [name for name, _ in maildir.read(tmp_path)] == order


# Maildir: what is broken


def test_what_is_no_message_is_named_and_the_others_are_read(tmp_path):
    root = tmp_path / "root"
    put(tmp_path / "outside")
    put(root / "new/1.a", PLAIN)
    put(root / "cur/2.a:2,S", b"x" * 101)
    put(root / "cur/3.a:2,S", PLAIN)
    os.mkfifo(root / "cur/4.fifo")
    (root / "cur/5.folder").mkdir()
    (root / "cur/6.link").symlink_to(tmp_path / "outside")
    (root / "cur/7.gone").symlink_to("nothing")
    (root / "cur/8.\x1b[1m").mkdir()
    with closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(str(root / "cur/9.socket"))
    os.mkfifo(root / "dovecot-keywords")
    found = dict(maildir.read(root, 100))
    assert {name for name, one in found.items() if isinstance(one, Stored)} == {"new/1.a", "cur/3.a:2,S"}
    assert {one.place: one.reason for one in found.values() if isinstance(one, Broken)} == {
        "cur/2.a:2,S": "more than 100 octets", "cur/4.fifo": "a fifo", "cur/5.folder": "a directory",
        "cur/6.link": "a symbolic link", "cur/7.gone": "a symbolic link", "cur/8.\\x1b[1m": "a directory",
        "cur/9.socket": "a socket", "dovecot-keywords": "a fifo",
    }  # fmt: skip


def test_directories_that_are_none_are_named(tmp_path):
    (tmp_path / "a/new").mkdir(parents=True)
    put(tmp_path / "a/new/1.a", PLAIN)
    (tmp_path / "a/cur").symlink_to(tmp_path)
    assert list(maildir.read(tmp_path / "a")) == [
        ("cur", Broken("cur", "no directory, or a symbolic link")), ("new/1.a", Stored(PLAIN, DATE)),
    ]  # fmt: skip
    with pytest.raises(OSError), maildir.Writer(tmp_path / "a", "INBOX"):
        pass
    assert list(maildir.read(tmp_path)) == []
    with pytest.raises(OSError):
        next(maildir.read(tmp_path / "b"))


def test_a_message_that_goes_meanwhile_is_named(tmp_path):
    for number in range(3):
        put(tmp_path / f"cur/{number}.a", PLAIN)
    found = []
    for name, one in maildir.read(tmp_path):
        found.append((name, one))
        (tmp_path / "cur/1.a").unlink(missing_ok=True)
    assert [one for _, one in found] == [Stored(PLAIN, DATE), Broken("cur/1.a", "No such file or directory"), Stored(PLAIN, DATE)]


def test_no_descriptor_is_left_open(tmp_path):
    for number in range(3):
        put(tmp_path / f"cur/{number}.a", PLAIN)
    before = os.listdir("/proc/self/fd")
    found = maildir.read(tmp_path)
    next(found)
    found.close()
    with pytest.raises(OSError):
        maildir.Writer(tmp_path / "cur/1.a", "Sent")
    (tmp_path / ".Sent").mkdir()
    (tmp_path / ".Sent/cur").symlink_to(tmp_path)
    with pytest.raises(OSError):
        maildir.Writer(tmp_path, "Sent")
    write_maildir(tmp_path, Stored(PLAIN, DATE))
    maildir.folders(tmp_path)
    assert os.listdir("/proc/self/fd") == before


# Maildir: an export that is interrupted


def test_what_is_there_is_not_written_again(tmp_path):
    with maildir.Writer(tmp_path, "Sent") as writer:
        assert writer.write("7-1", Stored(PLAIN, DATE, ["\\Seen"], ["a"])) and "7-1" in writer
        assert not writer.write("7-1", Stored(b"other", DATE + 1))
    folder = tmp_path / ".Sent"
    os.rename(folder / f"cur/{DATE}.7-1.relaymta:2,Sa", folder / f"cur/{DATE}.7-1.relaymta:2,FSa")  # a client was there
    (folder / f"tmp/{DATE}.7-2.relaymta").write_bytes(b"half")
    with maildir.Writer(tmp_path, "Sent") as writer:
        assert "7-1" in writer and "7-2" not in writer and "7" not in writer
        assert not writer.write("7-1", Stored(b"other", DATE))
        assert writer.write("7-2", Stored(PLAIN, DATE, [], ["b"]))
    assert [(one.flags, one.keywords) for one in read_maildir(tmp_path, "Sent")] == [
        (["\\Seen", "\\Flagged"], ["a"]),
        ([], ["b"]),
    ]
    assert os.listdir(folder / "tmp") == []


@pytest.mark.parametrize("key", ["", "a/b", "a.b", "a:2,S", "a,b", "..", "ä", "x" * 101, "a\n"])
def test_a_key_is_no_path(tmp_path, key):
    with maildir.Writer(tmp_path, "INBOX") as writer, pytest.raises(ValueError):
        writer.write(key, Stored(PLAIN, DATE))


def test_each_step_that_fails_leaves_only_whole_messages(tmp_path, monkeypatch):
    """Whichever call to the system is the last one, what is in cur/ can be read, and the next export ends what it began."""
    messages = [Stored(PLAIN * (number + 1), DATE + number, ["\\Seen"], [f"k{number}"]) for number in range(3)]
    calls = 0

    def failing(function, most):
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls > most:
                raise OSError(28, "No space left on device")
            return function(*arguments, **named)

        return call

    for most in range(100):
        root, calls = tmp_path / str(most), 0
        with monkeypatch.context() as patch:
            for name in ("open", "write", "rename", "fsync", "utime", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name), most))
            try:
                write_maildir(root, *messages, name="Sent/2024")
                whole = True
            except OSError:
                whole = False
        if (root / ".Sent.2024").exists():
            found = read_maildir(root, "Sent/2024")
            assert found == messages[: len(found)]
        write_maildir(root, *messages, name="Sent/2024")
        assert read_maildir(root, "Sent/2024") == messages
        assert os.listdir(root / ".Sent.2024/tmp") == []
        if whole:
            break
    assert whole and most > 30


def test_all_is_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    write_maildir(tmp_path / "root", Stored(PLAIN, DATE, [], ["a"]), name="Sent")
    folder = tmp_path / "root/.Sent"
    files = [folder / "tmp" / name for name in ("maildirfolder", "dovecot-keywords", f"{DATE}.0.relaymta")]
    assert synced == [str(path) for path in (*files, folder / "cur", folder, tmp_path / "root", tmp_path)]


# Maildir: others read it


def test_python_reads_our_maildir(tmp_path):
    write_maildir(tmp_path, Stored(PLAIN, DATE, ALL), Stored(MESSAGES["8-bit and NUL"], DATE))
    write_maildir(tmp_path, Stored(PLAIN, DATE, ["\\Seen"]), name="Sent/2024")
    box = mailbox.Maildir(tmp_path, create=False)
    assert box.list_folders() == ["Sent.2024"]
    assert sorted((one.get_flags(), one.get_subdir()) for one in box) == [("", "cur"), ("DFRST", "cur")]
    (one,) = box.get_folder("Sent.2024")
    assert (one.get_flags(), one["Subject"], one.get_payload(), one.get_date()) == ("S", "x", "Hello\n", one.get_date())


def test_we_read_pythons_maildir(tmp_path):
    box = mailbox.Maildir(tmp_path / "root", create=True)
    one = mailbox.MaildirMessage(to_disk(PLAIN))
    one.set_subdir("cur")
    one.set_flags("FRS")
    one.set_date(DATE)
    box.add_folder("Sent.2024").add(one)
    box.add(to_disk(PLAIN))
    found = dict(maildir.folders(tmp_path / "root"))
    assert [one.flags for _, one in maildir.read(found["INBOX"])] == [[]]
    assert [one for _, one in maildir.read(found["Sent/2024"])] == [Stored(PLAIN, DATE, ["\\Seen", "\\Answered", "\\Flagged"])]
