"""The POP3 session against a naive model of a maildrop, however its input is cut, and its messages as poplib reads them."""

import io
import poplib
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pop3 import LOGIN, Caller, caller

MESSAGES = st.lists(st.sampled_from([b".", b"..", b"a", b"\r\n", b"\r\n", b"\r\n.", b"\n", b"\r", b"\xff"]), max_size=12).map(
    b"".join
)
NUMBERS = st.integers(0, 5)
PIECES = st.integers(1, 20)


def commands():
    """A command of the TRANSACTION state, as its words."""
    alone = st.sampled_from(["LIST", "UIDL", "STAT", "RSET", "NOOP", "WHAT"]).map(lambda verb: (verb,))
    of_one = st.tuples(st.sampled_from(["LIST", "UIDL", "RETR", "DELE", "EXPUNGE"]), NUMBERS)
    return st.one_of(alone, of_one, of_one, st.tuples(st.just("TOP"), NUMBERS, NUMBERS))


class Model:
    """A maildrop as a list of messages. `answer` is the whole reply to a command."""

    def __init__(self, messages: list[bytes]) -> None:
        self.messages = messages
        self.marked = [False] * len(messages)
        self.expunged = [False] * len(messages)
        self.retrieved: set[int] = set()

    def left(self) -> list[int]:
        return [number for number, marked in enumerate(self.marked, 1) if not marked]

    def octets(self) -> int:
        return sum(len(self.messages[number - 1]) for number in self.left())

    def described(self) -> str:
        count = len(self.left())
        return f"{count} message{'s' * (count != 1)} ({self.octets()} octets)"

    def answer(self, verb: str, *arguments: int) -> bytes:
        if verb in ("WHAT", "NOOP"):
            return b"-ERR Unknown command\r\n" if verb == "WHAT" else b"+OK Nothing done\r\n"
        if verb == "STAT":
            return f"+OK {len(self.left())} {self.octets()}\r\n".encode()
        if verb == "RSET":
            self.marked = [False] * len(self.messages)
            return f"+OK {self.described()}\r\n".encode()
        if not arguments:
            head = self.described() if verb == "LIST" else self.described().partition(" (")[0]
            lines = [f"+OK {head}", *(f"{number} {self.of(verb, number)}" for number in self.left()), ".", ""]
            return "\r\n".join(lines).encode()
        return self.about(verb, *arguments)

    def of(self, verb: str, number: int) -> str:
        return str(len(self.messages[number - 1])) if verb == "LIST" else f"7.{number * 10}"

    def about(self, verb: str, number: int, lines: int = 0) -> bytes:
        if not 1 <= number <= len(self.messages):
            return f"-ERR No such message; there are {len(self.messages)}\r\n".encode()
        if self.marked[number - 1]:
            return f"-ERR Message {number} has been deleted\r\n".encode()
        if verb == "DELE":
            self.marked[number - 1] = True
            return f"+OK Message {number} deleted\r\n".encode()
        if verb in ("LIST", "UIDL"):
            return f"+OK {number} {self.of(verb, number)}\r\n".encode()
        if self.expunged[number - 1]:
            return b"-ERR This message has been deleted by another client\r\n"
        message = self.messages[number - 1]
        if verb == "TOP":
            return b"+OK Top of the message follows\r\n" + stuffed(top(message, lines))
        self.retrieved.add(number * 10)
        return b"+OK %d octets\r\n" % len(message) + stuffed(message)


def top(message: bytes, count: int) -> bytes:
    lines = re.findall(rb"[^\n]*\n|[^\n]+", message)
    header = next((at + 1 for at, line in enumerate(lines) if line in (b"\n", b"\r\n")), len(lines))
    return b"".join(lines[: header + count])


def stuffed(message: bytes) -> bytes:
    data = re.sub(rb"(?<![^\r\n])\.", b"..", message)
    return data + (b".\r\n" if not data or data.endswith(b"\r\n") else b"\r\n.\r\n")


@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGES, max_size=4), st.lists(commands(), max_size=18), PIECES, st.booleans())
def test_random_commands(messages, script, piece, quits):
    model, made = Model(messages), caller(*messages, piece=piece)
    for verb, *numbers in script:
        if verb == "EXPUNGE":
            if 1 <= numbers[0] <= len(messages):
                made.mailbox.messages.pop(10 * numbers[0], None)
                model.expunged[numbers[0] - 1] = True
            continue
        line = " ".join([verb, *map(str, numbers)])
        assert made.feed(line.encode() + b"\r\n") == model.answer(verb, *numbers)
    if quits:
        assert made.feed(b"QUIT\r\n").startswith(b"+OK ")
    made.drop()
    gone = {
        number for number in range(1, len(messages) + 1) if model.expunged[number - 1] or (quits and model.marked[number - 1])
    }
    assert set(made.mailbox.messages) == {10 * number for number in range(1, len(messages) + 1) if number not in gone}
    assert made.mailbox.seen == model.retrieved and made.mailbox.session is None


LINES = st.sampled_from(
    [
        *(b"LIST", b"UIDL 1", b"STAT", b"RETR 1", b"RETR 2", b"TOP 2 1", b"DELE 1", b"RSET", b"NOOP", b"CAPA", b"QUIT", b"STLS"),
        *(b"USER bob", b"PASS secret", b"PASS wrong", b"AUTH PLAIN AGJvYgBzZWNyZXQ=", b"AUTH PLAIN", b"AGJvYgBzZWNyZXQ=", b"*"),
        *(b"UTF8", b"", b"what", b"x" * 300, b"x" * 13000, b"NOOP\nNOOP", b"NOOP\r", b"NO\0OP", b"\xff", b"GET / HTTP/1.1"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(LINES, max_size=12), st.booleans(), st.lists(st.integers(0, 400), max_size=20), st.booleans())
def test_any_split_of_the_input(lines, login, cuts, slow):
    data = LOGIN * login + b"".join(line + b"\r\n" for line in lines)
    whole = caller(b"A: b\r\n\r\n.\r\n1\r\n", b"c", login=False)
    expected = whole.feed(data)
    made = caller(b"A: b\r\n\r\n.\r\n1\r\n", b"c", login=False, piece=1)
    out, at = b"", 0
    for cut in [*cuts, len(data)]:
        out += made.session.receive(data[at : at + cut])
        out += b"" if slow else made.run()  # slow: much arrives while the caller is busy
        at += cut
    out += made.run()
    assert out == expected
    assert state_of(made) == state_of(whole)


def state_of(made: Caller):
    session = made.session
    maildrop = session.maildrop
    marked = (maildrop.count, maildrop.retrieved, maildrop.deleted) if maildrop is not None else None
    return session.state, session.closing, session.errors, session.utf8, marked, made.claims, made.mailbox.messages


def read_by_poplib(octets: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a multi-line reply, and what is left behind it."""
    client = poplib.POP3.__new__(poplib.POP3)
    client._debugging, client.file = 0, io.BytesIO(octets)
    return client._getlongresp()[1], client.file.read()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"", b".", b"..", b". a", b"a.", b"a"]), max_size=10), PIECES, st.booleans())
def test_poplib_gets_the_message_that_was_there(lines, piece, whole):
    message = b"\r\n".join(lines) + b"\r\n" * (whole and bool(lines))
    sent = caller(message, piece=piece).feed(b"RETR 1\r\n")
    found, rest = read_by_poplib(sent)
    assert rest == b"" and sent.endswith(b"\r\n.\r\n")
    expected = message if message.endswith(b"\r\n") or not message else message + b"\r\n"
    assert b"".join(line + b"\r\n" for line in found) == expected


@settings(max_examples=300, deadline=None)
@given(MESSAGES, PIECES)
def test_no_message_ends_itself(message, piece):
    _, rest = read_by_poplib(caller(message, piece=piece).feed(b"RETR 1\r\n") + b"+OK behind\r\n")
    assert rest == b"+OK behind\r\n"
