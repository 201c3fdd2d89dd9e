"""What is said to clamd, and what its replies mean."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta.proto.clamd import (
    BEGINNING,
    END,
    INSTREAM,
    LONGEST,
    MAIL,
    PING,
    SHOWN,
    START,
    VERSION,
    ClamdError,
    Replies,
    Reply,
    length,
    stream,
)
from tests.speedups.test_smtp import pieces

ASKED = 5


def run(parts: list[bytes], asked: int = ASKED) -> tuple[list[Reply], bool]:
    """The replies in what comes in pieces, and whether something else follows them."""
    one = Replies()
    for number in range(asked):
        assert one.asked() == number + 1
    found: list[Reply] = []
    for at, part in enumerate(parts):
        try:
            for reply in one.feed(part):
                found += [reply]
        except ClamdError as error:
            assert str(error)
            for more in (b"", *parts[at + 1 :], b"1: PONG\0"):  # nothing is read after that
                with pytest.raises(ClamdError):
                    list(one.feed(more))
            return found, True
    return found, False


def test_what_is_sent():
    assert START == b"zIDSESSION\0" and PING == b"zPING\0" and VERSION == b"zVERSION\0"
    assert INSTREAM == b"zINSTREAM\0" and END == b"\0\0\0\0" and length(b"x" * 65536) == b"\0\1\0\0"
    assert stream([b"A: b\r\n\r\n", b"text"]) == b"zINSTREAM\0\0\0\0\x1aFrom relaymta\nA: b\r\n\r\ntext\0\0\0\0"
    assert stream([]) == INSTREAM + length(MAIL) + MAIL + END


REPLIES = [
    (b"stream: OK", "OK", ""),
    (b"stream: Eicar-Test-Signature.UNOFFICIAL FOUND", "FOUND", "Eicar-Test-Signature.UNOFFICIAL"),
    (b"stream: Eicar-Test-Signature(44d88612fea8a8f36de82e1278abb02f:68) FOUND", "FOUND",
     "Eicar-Test-Signature(44d88612fea8a8f36de82e1278abb02f:68)"),
    (b"stream: OK FOUND", "FOUND", "OK"),
    (b"stream: FOUND FOUND", "FOUND", "FOUND"),
    (b"stream: an ERROR FOUND", "FOUND", "an ERROR"),
    (b"stream: a\x1b[2J\xff FOUND", "FOUND", "a\\x1b[2J\ufffd"),
    (b"stream: " + b"x" * 900 + b" FOUND", "FOUND", "x" * SHOWN),
    (b"PONG", "PONG", ""),
    (b"ClamAV 1.4.6/27000/Mon Jan  1 00:00:00 2026", "VERSION", "ClamAV 1.4.6/27000/Mon Jan  1 00:00:00 2026"),
    (b"INSTREAM size limit exceeded. ERROR", "OVERSIZE", "INSTREAM size limit exceeded."),
    (b"stream: Can't open file or directory ERROR", "ERROR", "stream: Can't open file or directory"),
    (b"stream: OK ERROR", "ERROR", "stream: OK"),
    (b"Command invalid inside IDSESSION. ERROR", "ERROR", "Command invalid inside IDSESSION."),
    (b"ERROR", "ERROR", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "word", "shown"), REPLIES)
def test_replies(text, word, shown):
    wire = b"3: " + text + b"\0"
    assert run([wire]) == ([Reply(3, word, shown)], False)
    assert run([wire[at : at + 1] for at in range(len(wire))]) == ([Reply(3, word, shown)], False)
    assert run([wire[:-1]]) == ([], False)


def test_replies_to_several_commands_may_come_in_any_order():
    assert run([b"2: PONG\x001: stream: OK\x005: PONG\0"]) == ([Reply(2, "PONG"), Reply(1, "OK"), Reply(5, "PONG")], False)


NO_REPLIES = {
    "without a number": b"stream: OK\0",
    "without a number, its beginning": b"s",
    "what clamd says before it closes an idle connection": b"COMMAND READ TIMED OUT\n",
    "the n form": b"1: stream: OK\n",
    "the n form, with a NUL behind it": b"1: stream: OK\n\0",
    "with a carriage return": b"1: stream: OK\r\0",
    "an unknown word": b"1: stream: FINE\0",
    "no word": b"1: \0",
    "no name": b"1: stream:  FOUND\0",
    "no name at all": b"1: stream: FOUND\0",
    "another name of the text": b"1: /tmp/x: OK\0",
    "a blank behind it": b"1: stream: OK \0",
    "in small letters": b"1: stream: ok\0",
    "half a word": b"1: stream: BADERROR\0",
    "nothing": b"\0",
    "a number nobody asked": b"6: stream: OK\0",
    "number 0": b"0: stream: OK\0",
    "a negative number": b"-1: stream: OK\0",
    "a long number": b"00000000001: stream: OK\0",
    "other digits": "\u0661: stream: OK\0".encode(),
    "no blank": b"1:stream: OK\0",
    "an SMTP server": b"220 mail.example ESMTP\r\n",
    "a POP3 server": b"+OK ready\r\n",
    "an HTTP server": b"HTTP/1.1 400 Bad Request\r\n",
    "a frame": b"\0\0\0\5c",
    "a long reply": b"1: " + b"x" * (LONGEST - 2) + b"\0",
    "a long reply without an end": b"1: " + b"x" * (LONGEST - 2),
}


@pytest.mark.parametrize("wire", NO_REPLIES.values(), ids=NO_REPLIES)
def test_what_is_no_reply(wire):
    assert run([wire]) == ([], True)
    assert run([wire[at : at + 1] for at in range(len(wire))]) == ([], True)
    assert run([b"2: PONG\0" + wire]) == ([Reply(2, "PONG")], True)


def test_a_second_reply_to_a_command_is_none():
    assert run([b"1: stream: OK\0" * 2]) == ([Reply(1, "OK")], True)
    assert run([b"1: PONG\0"], asked=0) == ([], True)


def test_the_longest_reply():
    wire = b"1: " + b"x" * (LONGEST - len(b"1:  ERROR")) + b" ERROR"
    assert len(wire) == LONGEST and run([wire + b"\0"]) == run([wire, b"\0"]) == ([Reply(1, "ERROR", "x" * SHOWN)], False)


def test_how_it_begins_is_told():
    with pytest.raises(ClamdError) as raised:
        list(Replies().feed(b"220 mail\x1b.example\xff" + b"x" * 1000))
    assert str(raised.value) == "begins with '220 mail\\x1b.example\ufffd" + "x" * (BEGINNING - 18) + "'"


def test_a_flood_is_not_kept():
    one = Replies()
    one.asked()
    assert list(one.feed(b"1: " + b"x" * (LONGEST - 3))) == [] and one.begun
    for _ in range(2):
        with pytest.raises(ClamdError):
            list(one.feed(b"x" * 1_000_000))
        assert not one.begun


PARTS = [*(b"%d: %b\0" % (number, text) for number in range(1, 7) for text, _, _ in REPLIES[:4] + REPLIES[8:11]),
         *NO_REPLIES.values(), b"\0", b"1", b": ", b"stream: ", b" FOUND", b" ERROR\0", b"\n"]  # fmt: skip


@given(
    st.lists(st.sampled_from(PARTS), max_size=8).map(b"".join) | st.binary(max_size=60), st.lists(st.integers(0, 600), max_size=8)
)
@example(b"1: stream: OK\x002: x", [3, 14])
def test_any_split_gives_the_same(wire, cuts):
    assert run(pieces(wire, cuts)) == run([wire]) == run([wire[at : at + 1] for at in range(len(wire))])
