"""The bounds of docs/mailboxes.md, each from both sides: the most that is taken, and the exact reply to one octet or item more.

(Commands and literals: test_imap_hostile.py. Search keys and their nesting, fields of ID: test_imap_grammar.py. Names:
test_mailbox_name.py. ManageSieve and POP3: test_managesieve.py, test_pop3_hostile.py. Scripts: test_sieve.py, test_sieve_run.py.)
"""

import pytest

from relaymta.proto import mailbox_name, mime
from relaymta.proto.managesieve_reply import LITERAL_TOO_LONG, SCRIPT_TOO_LONG
from tests.proto.test_managesieve import Caller as SieveCaller
from tests.support.imap import caller

OK = {name: b"1 OK %b completed\r\n" % name for name in (b"SEARCH", b"SORT", b"THREAD", b"FETCH", b"LIST", b"STORE")}
LIMIT = b"1 NO [LIMIT] %b\r\n"
KEYS, NESTED, CRITERIA = b"more than 500 search keys", b"search keys nested deeper than 20", b"more than 20 sort criteria"


def command(front: bytes, one: bytes, count: int, last: bytes = b"") -> bytes:
    return b"1 " + front + one * count + last + b"\r\n"


@pytest.mark.parametrize(
    ("front", "one", "most", "last", "beyond"),
    [
        (b"SEARCH", b" SEEN", 500, b"", LIMIT % KEYS),
        (b"SORT (DATE) UTF-8", b" SEEN", 500, b"", LIMIT % KEYS),
        (b"THREAD REFERENCES UTF-8", b" SEEN", 500, b"", LIMIT % KEYS),
        (b"SEARCH ", b"NOT ", 20, b"SEEN", LIMIT % NESTED),
        (b"SORT (DATE) UTF-8 ", b"NOT ", 20, b"SEEN", LIMIT % NESTED),
        (b"THREAD REFERENCES UTF-8 ", b"NOT ", 20, b"SEEN", LIMIT % NESTED),
        (b"SORT (DATE", b" DATE", 19, b") UTF-8 ALL", LIMIT % CRITERIA),
        (b"FETCH 1 BODY[1", b".1", 99, b"]", b'1 BAD expected a section at "BODY[1.1.'),
    ],
)  # fmt: skip
def test_arguments_of_commands(front, one, most, last, beyond):
    made = caller(selected=True)
    assert made.feed(command(front, one, most, last)) == OK[front.split()[0]]
    said = made.feed(command(front, one, most + 1, last))
    assert said.startswith(beyond) and said.count(b"\r\n") == 1 and len(made.commands) == 1


def test_parentheses():
    """Within one another; the key in them is one level more."""
    made = caller(selected=True)
    assert made.feed(b"1 SEARCH " + b"(" * 19 + b"SEEN" + b")" * 19 + b"\r\n") == OK[b"SEARCH"]
    assert made.feed(b"1 SEARCH " + b"(" * 20 + b"SEEN" + b")" * 20 + b"\r\n") == OK[b"SEARCH"]
    said = made.feed(b"1 SEARCH " + b"(" * 21 + b"SEEN" + b")" * 21 + b"\r\n")
    assert said == b"1 BAD Parentheses are nested too deeply\r\n" and len(made.commands) == 2


@pytest.mark.parametrize("octets", [1, 4096, 262_144])
def test_a_refused_literal_that_was_sent_unasked(octets):
    """A megabyte of them is read, in one or in several literals; with one octet more the connection is closed."""
    made, most = caller(), 1 << 20
    first = b"1 FOO {%d+}\r\n%b" % (octets, b"x" * octets)
    rest = most - octets
    assert made.feed(first + b" {%d+}\r\n" % rest + b"x" * rest + b"\r\n2 NOOP\r\n") == (
        b'1 BAD expected a command at "FOO"\r\n2 OK NOOP completed\r\n'
    )
    said = made.feed(first + b" {%d+}\r\n" % (rest + 1))
    assert said == b'1 BAD expected a command at "FOO"\r\n* BYE A literal that is too large was sent unasked\r\n'
    assert made.session.closing


@pytest.mark.parametrize("plus", [b"", b"+"])
def test_the_largest_message_of_append(plus):
    """APPENDLIMIT; a larger one is refused before it comes, or read and dropped."""
    made = caller(append_limit=1000)
    assert b" APPENDLIMIT=1000" in made.feed(b"0 CAPABILITY\r\n")
    assert made.feed(b"1 APPEND x {1000%b}\r\n" % plus).startswith(b"" if plus else b"+ ")
    assert made.feed(b"x" * 1000 + b"\r\n") == b"1 OK APPEND completed\r\n"
    said = made.feed(b"1 APPEND x {1001%b}\r\n" % plus + (b"x" * 1001 + b"\r\n" if plus else b""))
    assert said == b"1 NO [TOOBIG] The message is larger than 1000 octets\r\n" and len(made.messages) == 1
    assert made.feed(b"2 NOOP\r\n") == b"2 OK NOOP completed\r\n"


def test_a_response_of_authenticate():
    """12288 octets (RFC 4954 4)."""
    for octets, said in ((12_288, b"1 BAD Malformed authentication response\r\n"), (12_289, b"1 BAD Line too long\r\n")):
        made = caller(login=False)
        assert made.feed(b"1 AUTHENTICATE PLAIN\r\n") == b"+ \r\n"
        assert made.feed(b"A" * octets + b"\r\n") == said


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("a" * 255, "a" * 256, "a level of the name has more than 255 octets"),
        ("é" * 127 + "a", "é" * 128, "a level of the name has more than 255 octets"),
        ("/".join(["a" * 249] * 4) + "b", "/".join(["a" * 249] * 4) + "bc", "the name has more than 1000 octets"),
        ("/".join("a" * 20), "/".join("a" * 21), "the name has more than 20 levels"),
        ("\x7e", "\x7f", "the name has a control character"),
        ("\xa0", "\x9f", "the name has a control character"),
        ("a/b", "a//b", "a level of the name is empty"),
        ("a", "", "the name is empty"),
        ("\xe9", "e\u0301", "the name is not in Unicode normalization form C"),
    ],
)
def test_names_of_mailboxes(good, bad, says):
    assert mailbox_name.problem(good) is None and mailbox_name.problem(bad) == says


def multipart(count: int) -> bytes:
    return b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * count + b"--b--\r\n"


def nested(depth: int) -> bytes:
    """A text within so many messages."""
    return b"Content-Type: message/rfc822\r\n\r\n" * depth + b"Subject: innermost\r\n\r\nx\r\n"


def test_parts_of_a_message():
    """The 10,000th is opaque, and has in it whatever is behind it."""
    for count, texts, opaque in ((9_998, 9_998, b""), (9_999, 9_998, b"10"), (10_000, 9_998, b"20"), (20_000, 9_998, b"100020")):
        structure = mime.describe(multipart(count)).structure
        assert structure.count(b'("text" "plain"') == texts
        assert (b'("application" "octet-stream" NIL NIL NIL "7bit" %b ' % opaque in structure) is bool(opaque)
        assert structure.count(b'"octet-stream"') == bool(opaque)


def test_depth_of_a_message():
    for depth, opaque in ((100, 0), (101, 1)):
        structure = mime.describe(nested(depth)).structure
        assert structure.count(b'("message" "rfc822"') == 100 and structure.count(b'"octet-stream"') == opaque
        assert (b"innermost" in structure) is not bool(opaque)


def test_octets_of_a_header():
    """The fields that begin in its first megabyte are read."""
    for before, read in (((1 << 20) - 1, True), (1 << 20, False)):
        described = mime.describe(b"X: " + b"x" * (before - 5) + b"\r\nSubject: found\r\n\r\nb\r\n")
        assert (b'"found"' in described.envelope) is read


def test_a_script_that_is_too_long():
    """Of ManageSieve: it is read up to a megabyte, beyond that the connection is closed."""
    for octets, said in ((1 << 20, SCRIPT_TOO_LONG), ((1 << 20) + 1, LITERAL_TOO_LONG)):
        made = SieveCaller()
        answer = made.feed(b'PUTSCRIPT "a" {%d+}\r\n%b\r\n' % (octets, b"#" * octets))
        assert answer == said and made.session.closing == (octets > 1 << 20)
