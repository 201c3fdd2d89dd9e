"""What a POP3 session does with much input, with commands behind those that wait, and with hostile clients."""

import pytest

from relaymta.proto import pop3_reply, reply
from relaymta.proto.access_session import ERRORS, KEPT
from relaymta.proto.pop3_maildrop import SLICE, Maildrop
from relaymta.proto.pop3_server import ENOUGH, ENOUGH_OCTETS, ServerSession
from relaymta.proto.pop3_session import CLAIMED, COMMANDS, OPENING, SENDING
from tests.support.pop3 import CLEAR, LOGIN, caller
from tests.support.prove import in_prove

MESSAGE = b"Subject: a\r\n\r\none\r\ntwo\r\n"


def test_pipelined_commands_wait_for_the_caller():
    session = ServerSession("mx.example", CLEAR)
    assert session.receive(LOGIN + b"STAT\r\n") == pop3_reply.SEND_PASSWORD
    assert session.state == CLAIMED and not session.behind
    assert session.receive(b"RETR 1\r\nSTA") == b"" and session.receive(b"T\r\n") == b""
    assert session.checked(reply.LOGGED_IN) == b"" and session.state == OPENING and not session.behind
    assert session.opened(Maildrop(1, [5], [24])) == b"+OK 1 message (24 octets)\r\n" and session.behind
    assert session.receive(b"") == b"+OK 1 24\r\n" and session.state == SENDING and not session.behind
    assert session.piece(MESSAGE) + session.sent() == b"+OK 24 octets\r\n" + MESSAGE + b".\r\n" and session.behind
    assert session.receive(b"") == b"+OK 1 24\r\n" and not session.behind
    for nothing in (session.checked(reply.LOGGED_IN), session.opened(Maildrop(1, [], [])), session.piece(b"a"), session.sent()):
        assert nothing == b""  # none of these is waited for
    session.tls_started()
    assert not session.secure and len(session.maildrop) == 1


def test_the_work_of_one_call_is_bounded():
    made = caller(MESSAGE)
    replies = [made.session.receive(b"NOOP\r\n" * 1000)]
    while made.session.behind:
        replies.append(made.session.receive(b""))
    assert [one.count(b"+OK") for one in replies] == [ENOUGH] * 15 + [40]
    session = ServerSession("mx.example", CLEAR)
    session.receive(LOGIN)
    session.checked(reply.LOGGED_IN)
    count = 100_000
    session.opened(Maildrop(2**32 - 1, range(1, count + 1), [10**9] * count))
    for command, line in (b"LIST", b"%d 1000000000\r\n"), (b"UIDL", b"%d 4294967295.%d\r\n"):
        replies = [session.receive(command + b"\r\nNOOP\r\n")]
        while session.behind:
            replies.append(session.receive(b""))
        assert len(replies) > 5 and max(map(len, replies)) < ENOUGH_OCTETS + SLICE * 32 < 100_000
        lines = b"".join(line % ((number,) * line.count(b"%d")) for number in range(1, count + 1))
        assert b"".join(replies).split(b"\r\n", 1)[1] == lines + b".\r\n" + pop3_reply.NOOP


def test_where_nothing_else_may_be_written():
    session = caller(*[MESSAGE] * (100 * SLICE)).session
    session.receive(b"LIST\r\nRETR 1\r\n")
    assert session.behind and session.within_reply
    while session.behind:
        session.receive(b"")
    assert session.state == SENDING and not session.within_reply
    session.piece(b"")
    assert session.within_reply
    session.sent()
    assert not session.within_reply


def test_what_is_kept_is_bounded():
    session = ServerSession("mx.example", CLEAR)
    session.receive(LOGIN)
    session.keep(b"NOOP\r\n" * (KEPT // 6))
    assert not session.closing
    session.keep(b"NOOP\r\n")
    assert session.closing and session.waiting() <= KEPT and session.state == COMMANDS and session.claim is None
    made = caller()
    assert made.feed(b"NOOP\r\n" * (2 * KEPT // 6)) == pop3_reply.NOOP * ENOUGH + pop3_reply.TOO_MUCH_SENT


def test_twenty_errors_close():
    made = caller(MESSAGE)
    out = made.feed(b"RETR 99\r\n" * 100 + b"WHAT\r\n" * ERRORS + b"NOOP\r\n")
    assert out.endswith(pop3_reply.UNKNOWN_COMMAND + pop3_reply.TOO_MANY_ERRORS)
    assert out.count(b"\r\n") == 100 + ERRORS + 1 and made.session.closing and made.feed(b"NOOP\r\n") == b""


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"Host: mx.example", b"SSH-2.0-x", b"POST /" + b"x" * 20000])
def test_another_protocol(line):
    made = caller(login=False)
    assert made.feed(line + b"\r\n" + LOGIN) == pop3_reply.NOT_POP3
    assert made.session.foreign and made.session.closing


def test_the_longest_command():
    made = caller(login=False)
    assert made.feed(b"USER " + b"x" * 248 + b"\r\n") == pop3_reply.SEND_PASSWORD
    assert made.feed(b"USER " + b"x" * 249 + b"\r\n") == pop3_reply.LINE_TOO_LONG


@pytest.mark.parametrize("line", [b"\n" * 1_000_000, b"NOOP \n" * 170_000, *in_prove(b"x" * 1_000_000, b"\r" * 1_000_000)])
def test_a_long_line_in_pieces_of_one_octet(line):
    made = caller(MESSAGE)
    most = 0
    for octet in line:
        assert made.session.receive(bytes((octet,))) == b""
        most = max(most, made.session.waiting())
    assert made.feed(b"\r\nNOOP\r\n") == pop3_reply.LINE_TOO_LONG + pop3_reply.NOOP
    assert most <= 12290


def test_octets_that_are_kept_one_by_one():
    session = ServerSession("mx.example", CLEAR)
    session.receive(LOGIN)
    for octet in b"NOOP\r\n" * 100_000:
        session.receive(bytes((octet,)))
    session.checked(reply.LOGGED_IN)
    session.opened(Maildrop(1, [], []))
    replies = 0
    while session.behind:
        replies += session.receive(b"").count(b"+OK")
    assert replies == 100_000


def test_a_maildrop_with_a_size_too_few():
    with pytest.raises(ValueError, match="each message"):
        Maildrop(1, [1, 2], [3])
