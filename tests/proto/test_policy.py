"""What a policy service is asked, and what its replies mean."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta.proto.edits import Insert, edited
from relaymta.proto.header import header_end
from relaymta.proto.policy import BEGINNING, REPLY_MOST, WORD_MOST, WORDS, Action, Replies, field, recipient, refusal, request
from tests.speedups.test_smtp import pieces

REFUSALS = ("REJECT", "5xx", "DEFER", "DEFER_IF_PERMIT", "DEFER_IF_REJECT", "4xx")


def run(parts: list[bytes]) -> tuple[list[Action], str]:
    """The replies in what comes in pieces, and what follows them that is none."""
    one = Replies()
    found: list[Action] = []
    for part in parts:
        found += one.feed(part)
        assert len(one._buffer) <= REPLY_MOST
    if one.error is not None:
        assert one.feed(b"action=OK\n\n") == [] and not one.begun
    return found, str(one.error or "")


def said(value: bytes) -> Action:
    """What `action=` with this value means."""
    ((action,), error) = run([b"action=" + value + b"\n\n"])
    assert not error
    return action


def test_what_is_asked():
    assert request([("request", "smtpd_access_policy"), ("sender", ""), ("recipient", "ä=@x")]) == (
        b"request=smtpd_access_policy\nsender=\nrecipient=\xc3\xa4=@x\n\n"
    )
    assert request([]) == b"\n"


@given(st.lists(st.tuples(st.sampled_from(["sender", "helo_name"]), st.text(st.characters(), max_size=20)), max_size=5))
@example([("sender", "a\nclient_address=127.0.0.1\n\n"), ("helo_name", "\r\n\0\udcff\ud800")])
def test_no_value_makes_a_line_of_its_own(attributes: list[tuple[str, str]]):
    octets = request(attributes)
    assert octets.endswith(b"\n\n") or octets == b"\n"
    assert octets.count(b"\n") == len(attributes) + 1 and b"\r" not in octets and b"\0" not in octets
    lines = octets.decode().split("\n")[:-2]
    assert [line.partition("=")[0] for line in lines] == [name for name, _ in attributes]


ACTIONS = [
    (b"OK", Action("OK")),
    (b"ok whatever", Action("OK", text="whatever")),
    (b"permit", Action("OK")),
    (b"250", Action("OK")),
    (b"1136023200", Action("OK")),
    (b"450", Action("4xx", 450)),
    (b"", Action("DUNNO")),
    (b" \t ", Action("DUNNO")),
    (b"DUNNO", Action("DUNNO")),
    (b"dunno", Action("DUNNO")),
    (b"REJECT", Action("REJECT")),
    (b"reject  not you ", Action("REJECT", text="not you")),
    (b"Reject 5.1.1 not you", Action("REJECT", 0, "5.1.1", "not you")),
    (b"REJECT 5.1.1", Action("REJECT", 0, "5.1.1")),
    (b"REJECT 4.1.1 not you", Action("REJECT", text="not you")),
    (b"REJECT 5.1.1000 not you", Action("REJECT", text="5.1.1000 not you")),
    (b"REJECT 5.1.1x", Action("REJECT", text="5.1.1x")),
    (b"DEFER", Action("DEFER")),
    (b"defer 4.2.0 later", Action("DEFER", 0, "4.2.0", "later")),
    (b"DEFER_IF_PERMIT Greylisted, see http://x/", Action("DEFER_IF_PERMIT", text="Greylisted, see http://x/")),
    (b"Defer_If_Reject 4.3.0\tlater", Action("DEFER_IF_REJECT", 0, "4.3.0", "later")),
    (b"550 5.7.1 no", Action("5xx", 550, "5.7.1", "no")),
    (b"550 4.7.1 no", Action("5xx", 550, "", "no")),
    (b"554 no", Action("5xx", 554, "", "no")),
    (b"450 4.7.1 later", Action("4xx", 450, "4.7.1", "later")),
    (b"421", Action("4xx", 421)),
    (b"599 no", Action("5xx", 599, "", "no")),
    (b"5550 no", Action("5550", text="no")),
    (b"250 fine", Action("250", text="fine")),
    ("٤٥٠ later".encode(), Action("٤٥٠", text="later")),
    (b"4xx later", Action("4XX", text="later")),
    (b"5xx", Action("5XX")),
    (b"HOLD 4.1.1 look at it", Action("HOLD", text="4.1.1 look at it")),
    (b"DISCARD away", Action("DISCARD", text="away")),
    (b"prepend Received-SPF: None (no SPF)", Action("PREPEND", text="Received-SPF: None (no SPF)")),
    (b"WARN look", Action("WARN", text="look")),
    (b"INFO look", Action("INFO", text="look")),
    (b"REDIRECT a@b.example", Action("REDIRECT", text="a@b.example")),
    (b"FILTER smtp:[127.0.0.1]:10025", Action("FILTER", text="smtp:[127.0.0.1]:10025")),
    (b"BCC a@b.example", Action("BCC", text="a@b.example")),
    (b"reject_unauth_destination", Action("reject_unauth_destination")),
    ("ﬁlter x".encode(), Action("ﬁlter", text="x")),
    (b"FOO\x1b[2J bar\0\xff", Action("FOO\\x1b[2J", text="bar\\x00\ufffd")),
    (b"X" * 100, Action("X" * WORD_MOST)),
    (b"=OK", Action("=OK")),
]  # fmt: skip


@pytest.mark.parametrize(("value", "action"), ACTIONS, ids=[ascii(value[:40]) for value, _ in ACTIONS])
def test_actions(value, action):
    assert said(value) == action
    assert (action.word in WORDS) == (action.word not in (
        "5550", "250", "٤٥٠", "4XX", "5XX", "reject_unauth_destination", "ﬁlter", "FOO\\x1b[2J", "X" * WORD_MOST, "=OK",
    ))  # fmt: skip


REPLIES = [
    (b"action=OK\n\n", ["OK"], ""),
    (b"action=OK\r\n\r\n", ["OK"], ""),
    (b"a=b\naction=HOLD\naction=OK\nactions=x\n\n", ["HOLD"], ""),
    (b"Action=OK\n\n", [], "leaves out its action"),
    (b"action=OK\n\naction=DUNNO\n\nactio", ["OK", "DUNNO"], ""),
    (b"action=OK\n\n\n", ["OK"], "leaves out its action"),
    (b"\naction=OK\n\n", [], "leaves out its action"),
    (b"\r\n", [], "leaves out its action"),
    (b"UNKNOWN COMMAND\naction=OK\n\n", [], "begins with 'UNKNOWN COMMAND'"),
    (b"220 mx.example ESMTP a=b\r\n", [], "begins with '220 mx.example ESMTP a=b'"),
    (b"HTTP/1.1 400 Bad Request\r\n", [], "begins with 'HTTP/1.1 400 Bad Request'"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", [], "begins with 'SSH-2.0-OpenSSH_9.2'"),
    (b"action=OK\n* OK IMAP\n\n", [], "begins with '* OK IMAP'"),
    (b"action =OK\n\n", [], "begins with 'action =OK'"),
    (b"=OK\n\n", [], "begins with '=OK'"),
    (b"J\0\0\0\n8.0\0", [], "begins with 'J\\x00\\x00\\x00'"),
    (b"\xff\x1b[2J" + b"x" * 100 + b"\n", [], "begins with '\ufffd\\x1b[2J" + "x" * (BEGINNING - 5) + "'"),
    (b"UNKNOWN COMMAND", [], ""),
    (b"\0" * (REPLY_MOST + 1), [], "has no end, and begins with '" + "\\x00" * BEGINNING + "'"),
    (b"a=" + b"x" * REPLY_MOST + b"\naction=OK\n\n", [], "has no end, and begins with 'a=" + "x" * (BEGINNING - 2) + "'"),
    (b"a=b\n" * 5000 + b"action=OK\n\n", [], "has no end, and begins with '" + "a=b\\n" * 16 + "'"),
]  # fmt: skip


@pytest.mark.parametrize(("octets", "words", "error"), REPLIES, ids=[ascii(octets[:30]) for octets, _, _ in REPLIES])
def test_replies(octets, words, error):
    for parts in ([octets], [octets[at : at + 1] for at in range(len(octets))], [octets[:7], octets[7:]]):
        actions, why = run(parts)
        assert [one.word for one in actions] == words and why == error


def test_the_longest_of_all():
    octets = b"a=" + b"b" * (REPLY_MOST - 14) + b"\naction=OK\n\n"
    octets = octets.replace(b"b", b"", len(octets) - REPLY_MOST)
    assert len(octets) == REPLY_MOST and run([octets * 3]) == ([Action("OK")] * 3, "")
    assert run([octets, b"a" + octets]) == ([Action("OK")], "has no end, and begins with 'aa=" + "b" * 61 + "'")


LINES = st.sampled_from([
    b"action=", b"OK", b"REJECT 5.1.1 no", b"PREPEND X: y", b"450 later", b"\n", b"\n\n", b"\r\n", b"a=b\n", b"220 x\n",
    b"\0", b"\xff", b"=", b"x" * 9000, b"action=OK\n\n",
])  # fmt: skip


@given(st.lists(LINES, max_size=12).map(b"".join), st.lists(st.integers(0, 30_000), max_size=6))
def test_any_split_gives_the_same(octets: bytes, cuts: list[int]):
    found = run([octets])
    assert found == run(pieces(octets, cuts)) == run([octets[at : at + 1] for at in range(len(octets))])
    for action in found[0]:
        assert action.text.isprintable() and len(action.text) <= REPLY_MOST and action.word.isprintable()
        assert action.code == 0 or (action.word == f"{action.code // 100}xx" and 400 <= action.code < 600)


def test_what_has_begun():
    one = Replies()
    assert one.begun == b""
    one.feed(b"action=OK\n\nact")
    assert one.begun == b"act"
    one.feed(b"x" * 100)
    assert one.begun == b"act" + b"x" * (BEGINNING - 3)


# Refusals

REPLIED = [
    (Action("REJECT"), b"554 5.7.1 <a@b.example>: Recipient address rejected: Access denied\r\n", b"554 5.7.1 Access denied\r\n"),
    (Action("REJECT", 0, "5.1.1", "no"), b"554 5.1.1 <a@b.example>: Recipient address rejected: no\r\n", b"554 5.1.1 no\r\n"),
    (Action("5xx", 550, "", "no"), b"550 5.7.1 <a@b.example>: Recipient address rejected: no\r\n", b"550 5.7.1 no\r\n"),
    (Action("5xx", 599), None, b"554 5.7.1 Access denied\r\n"),
    (Action("DEFER"), None, b"450 4.7.1 Access denied\r\n"),
    (Action("DEFER_IF_PERMIT", text="later"), b"450 4.7.1 <a@b.example>: Recipient address rejected: later\r\n",
     b"450 4.7.1 later\r\n"),
    (Action("DEFER_IF_REJECT", 0, "4.3.0", "later"), None, b"450 4.3.0 later\r\n"),
    (Action("4xx", 451, "4.3.5", "later"), None, b"451 4.3.5 later\r\n"),
    (Action("4xx", 421, "", "go"), None, b"421 4.7.1 go\r\n"),
    (Action("4xx", 490, "", "go"), None, b"450 4.7.1 go\r\n"),
    (Action("REJECT", text="ä\\x1b"), None, b"554 5.7.1 ?\\x1b\r\n"),
]  # fmt: skip


@pytest.mark.parametrize(("action", "to_recipient", "to_message"), REPLIED)
def test_refusals(action, to_recipient, to_message):
    assert refusal(action, None) == to_message
    assert to_recipient is None or refusal(action, "a@b.example") == to_recipient


@given(st.sampled_from(REFUSALS), st.binary(max_size=3000).filter(lambda octets: b"\n" not in octets), st.text(max_size=600))
@example("REJECT", b"x" * 15_000, "a" * 600)
@example("REJECT", b"5.1.1 \x85\xe2\x80\xa8250 ok", "a\r\nb")
def test_a_refusal_is_one_line(word: str, text: bytes, address: str):
    action = said({"5xx": b"550", "4xx": b"450"}.get(word, word.encode()) + b" " + text)
    for answer in (refusal(action, None), refusal(action, address)):
        assert re.fullmatch(rb"[45]\d\d ([45])\.[\d.]+ [!-~][ -~]*\r\n", answer) and len(answer) <= 512
        assert answer[:1] == answer[4:5] == (b"5" if word in ("REJECT", "5xx") else b"4")


# Changes

FIELDS = [
    ("X-A: b", Insert(0, b"X-A", b" b")),
    ("X-A:b:  c ", Insert(0, b"X-A", b" b:  c")),
    ("X-A : b", Insert(0, b"X-A", b" b")),
    ("X-A: ä", Insert(0, b"X-A", b" \xc3\xa4")),
    ("X-A:", None), ("X-A", None), (": b", None), ("", None), ("X A: b", None), ("ä: b", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "found"), FIELDS)
def test_a_field_in_front(text, found):
    assert field(text) == found


@given(st.binary(max_size=300).filter(lambda octets: b"\n" not in octets))
@example(b"X: a\r\r\rX-Evil: 1")
@example(b"X: \x0bX-Evil: 1\xe2\x80\xa8Y: 1")
@example(b"X: " + b"w " * 4000)
@example(b"X: " + b"w" * 8000)
def test_a_field_is_one_field(text: bytes):
    found = field(said(b"PREPEND " + text).text)
    if found is not None:
        header = b"A: b\r\n\r\n"
        above, below, dropped = edited(header, [found])
        whole = above + below
        assert whole.endswith(header) and header_end(whole) == len(whole)
        lines = whole[: -len(header)].split(b"\r\n")
        assert dropped or all(line[:1] in (b" ", b"\t") for line in lines[1:-1])
        assert dropped or whole.startswith(found.name + b": ")


ADDRESSES = [
    ("a@b.example", "a@b.example"), ("<a@b.example>", "a@b.example"), (" a@B.example ", "a@B.example"),
    ('"a b"@b.example', '"a b"@b.example'), ("a", None), ("postmaster", None), ("", None), ("<>", None), ("a@b.example x", None),
    ("<a@b.example> NOTIFY=NEVER", None), ("a@b.example>", "a@b.example"), ("ä@b.example", None), ("a@b..example", None),
    ("a" * 2000 + "@b.example", None), ("a@b.example, c@d.example", None), ("a\\x00@b.example\\n", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "address"), ADDRESSES)
def test_addresses(text, address):
    assert recipient(text) == address
