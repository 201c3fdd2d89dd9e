"""APPEND in dialogues: one message and many, with and without UTF8, refused and broken off; and any split of a long dialogue."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Append, Appended
from relaymta.proto.imap_session import COMMANDS, LITERAL, MESSAGE
from tests.speedups.test_smtp import pieces
from tests.support.imap import caller, client

UTF8 = "Subject: ü\r\n\r\n".encode()


@pytest.mark.parametrize("plus", [b"", b"+"])
@pytest.mark.parametrize("tilde", [b"", b"~"])
@pytest.mark.parametrize(
    ("before", "flags", "date"),
    [(b"", (), None), (b"(\\Seen) ", ("\\Seen",), None), (b'(\\seen x) "01-Feb-1994 21:52:25 -0800" ', ("\\Seen", "x"),
     760168345), (b'" 1-Feb-1994 21:52:25 +0000" ', (), 760139545)],
)  # fmt: skip
def test_append_utf8(plus, tilde, before, flags, date):
    """RFC 6855 4: as Thunderbird says it."""
    made = caller(first=b"e ENABLE UTF8=ACCEPT\r\n")
    wire = b'1 APPEND "%b" %bUTF8 (%b{%d%b}\r\n' % ("Entwürfe".encode(), before, tilde, len(UTF8), plus)
    assert made.feed(wire) == (b"" if plus else b"+ Ready for the message\r\n")
    assert made.feed(UTF8 + b")\r\n") == b"1 OK APPEND completed\r\n"
    assert made.messages == [(Append("Entwürfe", 0, flags, date, len(UTF8), True, bool(tilde), bool(plus)), UTF8)]
    assert made.feed(b"2 SELECT a\r\n3 SEARCH CHARSET UTF-8 ALL\r\n").endswith(
        b'3 BAD expected no CHARSET after ENABLE UTF8=ACCEPT (RFC 6855 3) at "CHARSET"\r\n'
    )


def test_append_utf8_without_its_end():
    made = caller(first=b"e ENABLE UTF8=ACCEPT\r\n")
    assert made.feed(b"1 APPEND x UTF8 (~{1+}\r\na\r\n") == b'1 BAD expected ")" at the end\r\n' and not made.messages
    assert made.feed(b"2 APPEND x UTF8 (~{1+}\r\na {1+}\r\nb)\r\n") == b'2 BAD expected ")" at " "\r\n'
    assert made.feed(b"3 APPEND x UTF8 (~{1+}\r\na) {1+}\r\nb)\r\n").startswith(b"3 BAD expected the end")


def test_the_largest_message():
    made = caller(append_limit=100)
    assert made.feed(b"1 APPEND x {100+}\r\n" + b"x" * 100 + b"\r\n") == b"1 OK APPEND completed\r\n"


def test_append_utf8_is_not_there_without_enable():
    """But a plain APPEND of a header in UTF-8 is taken."""
    made = caller()
    assert b"1 BAD expected ENABLE UTF8=ACCEPT" in made.feed(b"1 APPEND x UTF8 (~{%d+}\r\n" % len(UTF8) + UTF8 + b")\r\n")
    assert made.feed(b"2 APPEND x {%d+}\r\n" % len(UTF8) + UTF8 + b"\r\n") == b"2 OK APPEND completed\r\n"
    assert [message for _, message in made.messages] == [UTF8]


def test_append_asks_before_the_message():
    session = caller().session
    assert session.receive(b"1 APPEND Sent (\\Seen) {10}\r\n") == b"" and session.state == LITERAL
    assert session.append == Append("Sent", 0, ("\\Seen",), None, 10)
    assert session.go_ahead() == b"+ Ready for the message\r\n" and session.state == MESSAGE
    assert session.receive(b"abc") == b"" and session.take() == [b"abc"] and session.parser.left == 7
    assert session.receive(b"defghij\r\n2 NOOP\r\n") == b"" and session.take() == [b"defghij"]
    session.taken()
    assert session.behind and session.receive(b"") == b"" and session.command == ("1", "APPEND", Appended("Sent", 1))
    assert session.done("OK", "Filed", response.appenduid(7, [(3, 3)])) == b"1 OK [APPENDUID 7 3] Filed\r\n"
    assert session.behind and session.receive(b"") == b"" and session.command.name == "NOOP"


def test_many_messages_in_one_append():
    """RFC 3502; the name of the mailbox is a literal too."""
    made = client(caller())
    made.greeting()
    tag = made.start(b"APPEND {4}")
    assert made.finish(tag).last.tag == "+"
    made.send(b"Sent {1+}\r\na (x) {2+}\r\nbc {3}\r\n")
    assert made.finish(tag).last.text == "Ready for the message"
    made.send(b"def\r\n")
    assert made.finish(tag).status == "OK"


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (b"1 APPEND x {1+}\r\na b\r\n", b'1 BAD expected the end of the command at " "\r\n'),
        (b"1 APPEND x {1+}\r\na)\r\n", b'1 BAD expected the end of the command at ")"\r\n'),
        (b"1 APPEND x {1+}\r\na {0}\r\n", b"1 NO [CANNOT] The message is empty: APPEND is cancelled (RFC 3502 6.3.11)\r\n"),
        (b"1 APPEND x {1+}\r\na {0+}\r\n\r\n", b"1 NO [CANNOT] The message is empty: APPEND is cancelled (RFC 3502 6.3.11)\r\n"),
        (b"1 APPEND x {1+}\r\na {101+}\r\n" + b"x" * 101 + b"\r\n", b"1 NO [TOOBIG] The message is larger than 100 octets\r\n"),
        (b"1 APPEND x {1+}\r\na (\\x {3+}\r\nabc {2+}\r\nde\r\n", b"1 BAD expected a flag at the end"),
        (b"1 APPEND x {1+}\r\na \0\r\n", b"1 BAD A control character in a command\r\n"),
        (b"1 APPEND x {1+}\r\na " + b"x" * 70_000 + b"\r\n", b"1 BAD Command too long\r\n"),
        (b"1 APPEND x {1+}\r\na y {2000000+}\r\n", b"1 BAD expected a message as a literal"),
    ],
)
def test_an_append_that_does_not_come_to_its_end(wire, said):
    for step in (1, len(wire)):
        made = caller(append_limit=100)
        out = b"".join(made.feed(wire[at : at + step]) for at in range(0, len(wire), step))
        assert out.startswith(said) and out.count(b"\r\n") == 1 + made.session.closing
        assert made.messages == [] and made._coming == [] and not made.commands and not made.session.appending
        assert made.session.closing == (b"2000000" in wire)
        if not made.session.closing:
            assert made.feed(b"2 APPEND x {1+}\r\na\r\n") == b"2 OK APPEND completed\r\n" and len(made.messages) == 1


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (b"1 APPEND x\r\n", b"1 BAD expected a space at the end\r\n"),
        (b"1 APPEND x (a)\r\n", b"1 BAD expected a space at the end\r\n"),
        (b"1 APPEND x (a) \r\n", b"1 BAD expected a message as a literal at the end\r\n"),
        (b"1 APPEND\r\n", b"1 BAD expected a space at the end\r\n"),
        (b"1 APPEND \r\n", b"1 BAD expected a message as a literal at the end\r\n"),
        (b'1 APPEND x "abc"\r\n', b"1 BAD expected a date and time"),
        (b'1 APPEND x "31-Feb-1994 00:00:00 +0000" {1}\r\n', b"1 BAD expected a date and time that exist"),
        (b"1 APPEND x (\\Recent) {1}\r\n", b"1 BAD expected a flag"),
        (b"1 APPEND x{1}\r\n", b"1 BAD expected a space at the end\r\n"),
        (b"1 APPEND x {0}\r\n", b"1 NO [CANNOT] The message is empty"),
        (b"1 APPEND x {99999999999}\r\n", b"1 NO [TOOBIG] "),
        (b"1 APPEND &x {1}\r\n", b"1 NO [CANNOT] the name is not modified UTF-7"),
        (b"1 APPEND {4}\r\nSent\r\n", b"+ Ready for the literal\r\n1 BAD expected a space at the end\r\n"),
    ],
)
def test_an_append_without_a_message(wire, said):
    made = caller()
    out = made.feed(wire)
    assert out.startswith(said) and not made.messages and made.feed(b"2 NOOP\r\n") == b"2 OK NOOP completed\r\n"


def test_a_message_that_the_caller_refuses():
    made = caller()
    made.admit = lambda append: "Over quota" if append.octets > 5 else ""
    assert made.feed(b"1 APPEND x {6}\r\n2 NOOP\r\n") == b"1 NO Over quota\r\n2 OK NOOP completed\r\n"
    assert made.feed(b"3 APPEND x {6+}\r\n123456 {2+}\r\nab\r\n4 NOOP\r\n") == b"3 NO Over quota\r\n4 OK NOOP completed\r\n"
    assert made.feed(b"5 APPEND x {1+}\r\na {6+}\r\n123") == b"" and made._coming == []
    assert made.feed(b"456\r\n") == b"5 NO Over quota\r\n" and not made.messages and not made.session.behind
    out = made.feed(b"6 APPEND x {1048577+}\r\n")
    assert out.startswith(b"6 NO Over quota\r\n* BYE ") and made.session.closing


def test_a_message_that_is_refused_while_it_comes():
    for plus in (b"", b"+"):
        session = caller().session
        session.receive(b"1 APPEND x {5" + plus + b"}\r\n")
        session.go_ahead()
        session.receive(b"ab")
        assert session.refuse("No space", response.OVERQUOTA) == b"" and session.state == COMMANDS and session.take() == []
        assert session.receive(b"cde {2+}\r\nxy\r\n2 NOOP\r\n") == b"1 NO [OVERQUOTA] No space\r\n"
        session.done("OK", "x")
        session.receive(b"1 APPEND x {1+}\r\na")
        session.go_ahead()
        assert session.receive(b"") == b"" and session.refuse("No space") == b""
        assert session.receive(b"\r\n3 NOOP\r\n") == b"1 NO No space\r\n" and session.command.tag == "3"


def test_the_end_of_the_connection_within_an_append():
    session = caller().session
    session.receive(b"1 APPEND x {5}\r\n")
    session.go_ahead()
    session.receive(b"ab")
    session.close()
    assert session.take() == [] and session.append is None and session.state == COMMANDS and session.receive(b"cde\r\n") == b""
    assert session.go_ahead() == session.refuse("x") == session.cancelled() == b"" and not session.behind


def test_binary_messages():
    made = caller()
    assert made.feed(b"1 APPEND x ~{3+}\r\na\0b\r\n").startswith(b"1 OK") and made.messages[0][0].binary
    assert made.messages[0][1] == b"a\0b"


# Any split of what a client says

TALK = b"\r\n".join((
    b"1 CAPABILITY", b"2 LOGIN {3+}", b'bob "secret"', b"3 ENABLE IMAP4rev2 UTF8=ACCEPT", b"4 SELECT x", b"5 FETCH foo FLAGS",
    b"6 FOO {3+}", b"a", b" {2}", b"7 APPEND x (a) {5+}", b"hello UTF8 (~{3+}", b"abc) {2+}", b"xy", b"8 IDLE", b"DONE",
    b"9 IDLE", b"1 NOOP {3+}", b"abc x", b"1 APPEND x {3+}", b"abc y", b'2 LIST "" {2+}', b"%* RETURN (STATUS (UNSEEN))",
    b"3 APPEND x {2000+}", b"r" * 2000, b'4 UID SEARCH SUBJECT "a \\"b\\""', b"5 LOGOUT", b"",
))  # fmt: skip


def _talk(cuts: list[int], slow: bool) -> tuple:
    made = caller(login=False, append_limit=1000)
    out = []
    for piece in pieces(TALK, cuts):
        out.append(made.session.receive(piece))
        if not slow:
            out.append(made.run())
    out.append(made.run())
    return b"".join(out), made.commands, made.messages


@given(st.lists(st.integers(0, len(TALK)), max_size=12), st.booleans())
def test_any_split_of_a_dialogue_is_the_same(cuts, slow):
    whole = _talk([], False)
    assert _talk(cuts, slow) == whole
    assert whole[0].endswith(b"5 OK Bye\r\n") and len(whole[2]) == 3 and whole[0].count(b" BAD ") == 4


def test_octet_by_octet():
    assert _talk(list(range(len(TALK))), False) == _talk([], False)
