"""What an IMAP session does with much input, with commands behind those that wait, and with hostile clients."""

import time
import tracemalloc

import pytest

from relaymta.proto.access_session import KEPT
from relaymta.proto.imap_server import ENOUGH, ServerSession
from relaymta.proto.imap_session import CANCELLED, COMMAND, COMMANDS, FIRST_LIMIT, FIRST_LITERAL, LIMIT, MESSAGE
from relaymta.proto.imap_words import TAG_MOST
from tests.support.imap import CLEAR, LOGIN, caller
from tests.support.prove import in_prove


def test_the_work_of_one_call_is_bounded():
    session = caller().session
    replies = [session.receive(b"1 CAPABILITY\r\n" * 1000)]
    while session.behind:
        replies.append(session.receive(b""))
    assert [one.count(b" OK ") for one in replies] == [ENOUGH] * 15 + [40]


def test_what_is_kept_is_bounded():
    session = ServerSession("mx.example", CLEAR)
    session.receive(LOGIN)
    session.keep(b"1 NOOP\r\n" * (KEPT // 8))
    assert not session.closing
    session.keep(b"1 NOOP\r\n")
    assert session.closing and session.waiting() == 0 and session.state == COMMANDS and session.claim is None
    session = caller().session
    out = session.receive(b"1 ID NIL\r\n" * (2 * KEPT // 10))
    assert out.count(b" OK ") == ENOUGH and out.endswith(
        b"* BYE Too many commands were sent without waiting for their responses\r\n"
    )


def test_octets_that_are_kept_one_by_one():
    session = ServerSession("mx.example", CLEAR)
    session.receive(LOGIN)
    for octet in b"1 CAPABILITY\r\n" * 50_000:
        session.receive(bytes((octet,)))
    session.checked(b"235 2.7.0 x\r\n")
    replies = 0
    while session.behind:
        replies += session.receive(b"").count(b" OK ")
    assert replies == 50_000


@pytest.mark.parametrize(("login", "limit"), [(False, FIRST_LIMIT), (True, LIMIT)], ids=["before login", "logged in"])
def test_the_longest_command(login, limit):
    made = caller(login=login)
    for octets in (limit - 2, limit - 1):
        said = made.feed(b"1 NOOP" + b"x" * (octets - 6) + b"\r\n")
        assert said.startswith(b"1 BAD expected a command" if octets + 2 == limit else b"1 BAD Command too long")


@pytest.mark.parametrize("plus", [b"", b"+"])
@pytest.mark.parametrize(
    ("login", "line", "most"),
    [
        (False, b"1 LOGIN {%d%b}\r\n", FIRST_LITERAL),
        (True, b"1 ID ({%d%b}\r\n", LIMIT - 15),
        (True, b"1 SELECT {%d%b}\r\n", LIMIT - 18),
    ],
)
def test_the_longest_literal(login, line, most, plus):
    made = caller(login=login)
    size = most - len(plus) * login  # as an octet of the command, the plus counts
    assert made.feed(line % (size, plus)) == (b"" if plus else b"+ Ready for the literal\r\n")
    assert made.feed(b"x" * size + b"\r\n").count(b"1 ") == 1
    assert made.feed(line % (size + 1, plus)) == (b"" if plus else b"1 BAD The literal is too large\r\n")
    assert made.feed(b"x" * (size + 1) + b"\r\n" if plus else b"2 NOOP\r\n").startswith(
        b"1 BAD The literal is too large\r\n" if plus else b"2 OK"
    )


@pytest.mark.parametrize("piece", [b"\n", b"(", b"{", *in_prove(b"x", b"\r", b'"', b"\0", b"1,")])
def test_a_megabyte_without_an_end_octet_by_octet(piece):
    made = caller()
    line = piece * (1_000_000 // len(piece))
    most = 0
    for at in range(len(line)):
        assert made.session.receive(line[at : at + 1]) == b""
        if at % 1000 == 0:
            most = max(most, made.session.waiting())
    assert most <= LIMIT + 1
    assert made.feed(b"\r\n1 NOOP\r\n") == b"* BAD Command too long\r\n1 OK NOOP completed\r\n"


@pytest.mark.parametrize("front", [b"1 SEARCH ", b"1 FETCH 1 (", b"1 LIST (", b"1 ID (", b"1 STORE 1 FLAGS ", b"1 ", b""])
@pytest.mark.parametrize(
    "piece", [b"(", b")", b"NOT ", b"OR ", b"(SEEN ", b'"" ', b"BODY[", b"] ", b"1:*,", b"\\ ", b"[", b'"a" NIL ', b"$ "]
)
def test_a_command_of_one_thing_again_and_again(front, piece):
    made = caller(selected=True)
    said = made.feed(front + piece * ((LIMIT - 40) // len(piece)) + b"\r\n2 NOOP\r\n")
    assert said.count(b"\r\n") == 2 and said.endswith(b"2 OK NOOP completed\r\n") and len(said) < 300


def test_sequence_sets():
    made = caller(selected=True)
    for count in (1000, 6000, 13_000, 40_000):
        numbers = b",".join(b"%d:%d" % (2 * number, 2 * number - 7) for number in range(5, count))
        said = made.feed(b"1 FETCH " + numbers + b" UID\r\n")
        if len(numbers) > LIMIT:
            assert said == b"1 BAD Command too long\r\n"
        else:
            assert said == b"1 OK FETCH completed\r\n" and made.commands[-1].arguments.numbers.ranges == ((3, 2 * count - 2),)


def test_half_literals():
    """Thirty sessions that announce as much as they may, and send half of it: memory for what has come, no more."""
    tracemalloc.start()
    try:
        sessions = []
        for _ in range(30):
            session = ServerSession("mx.example", CLEAR)
            assert session.receive(b"1 LOGIN {%d}\r\n" % FIRST_LITERAL).startswith(b"+")
            assert session.receive(b"x" * (FIRST_LITERAL // 2)) == b""
            sessions.append(session)
        assert tracemalloc.get_traced_memory()[0] / 30 < 12_000
    finally:
        tracemalloc.stop()


def test_a_session_that_waits_is_small():
    made = [caller(selected=True) for _ in range(10)]
    for one in made:
        one.feed(b"1 FETCH 1:100 (UID FLAGS BODY.PEEK[HEADER.FIELDS (Subject)])\r\n")
        one.feed(b"x" * 60_000 + b"\r\n")
    tracemalloc.start()
    try:
        more = []
        for _ in range(10):
            session = ServerSession("mx.example", CLEAR)
            session.receive(LOGIN)
            session.checked(b"235 2.7.0 x\r\n")
            session.receive(b"1 SELECT x\r\n")
            session.done("OK", "x")
            session.receive(b"2 FETCH 1 (" + b"UID " * 15_000)
            session.receive(b"UID)\r\n")
            session.done("OK", "x")
            session.receive(b"3 IDLE\r\n")
            more.append(session)
        assert tracemalloc.get_traced_memory()[0] / 10 < 4000
    finally:
        tracemalloc.stop()


def test_messages_are_not_collected():
    session = caller().session
    session.receive(b"1 APPEND x {50000000}\r\n")
    session.go_ahead()
    tracemalloc.start()
    try:
        octets = 0
        while session.state == MESSAGE:
            assert session.receive(b"x" * 65_536) == b""
            octets += sum(map(len, session.take()))
        assert octets == 50_000_000 and tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    session.taken()
    assert session.receive(b"\r\n") == b"" and session.state == CANCELLED
    assert session.cancelled().startswith(b"1 BAD expected the end of the command") and session.errors == 1


def test_literals_that_are_sent_unasked_are_dropped_up_to_a_bound():
    made = caller()
    assert made.feed(b"1 FOO {1000000+}\r\n") == b""
    for _ in range(10):
        assert made.feed(b"x" * 100_000) == b"" and made.session.waiting() == 0
    assert made.feed(b" {40000+}\r\n" + b"\r\n" * 20_000 + b"\r\n2 NOOP\r\n") == (
        b'1 BAD expected a command at "FOO"\r\n2 OK NOOP completed\r\n'
    )
    said = made.feed(b"1 FOO {1000000+}\r\n" + b"x" * 1_000_000 + b" {100000+}\r\n")
    assert said.startswith(b'1 BAD expected a command at "FOO"\r\n* BYE ') and made.session.closing


def test_the_longest_tag():
    made = caller()
    tag = b"t" * TAG_MOST
    assert made.feed(tag + b" NOOP\r\n") == tag + b" OK NOOP completed\r\n"
    assert made.feed(tag + b"t NOOP\r\n") == b'* BAD expected a tag of at most 64 octets at "' + b"t" * 40 + b'"\r\n'
    assert made.feed(tag + b"t NOOP \0\r\n") == b"* BAD A control character in a command\r\n"


def test_time_is_no_more_than_the_octets_are_worth():
    """A command of 64 KB of the most costly kind takes milliseconds, not seconds."""
    made = caller(selected=True)
    began = time.thread_time()
    for line in (
        b"1 SEARCH " + b"OR SEEN " * 8000, b"1 SEARCH " + b"(" * 60_000, b"1 FETCH 1 (" + b"BODY[1.2.3] " * 5000 + b"UID)",
        b"1 STORE 1 FLAGS (" + b"a " * 32_000 + b"b)", b'1 LIST "" (' + b"%*" * 30_000 + b")",
        b"1 FETCH " + b"1,2:9," * 10_000 + b"* UID",
    ):  # fmt: skip
        made.feed(line + b"\r\n")
    assert time.thread_time() - began < 2 and made.session.state in (COMMANDS, COMMAND)
