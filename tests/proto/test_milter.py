"""What a milter is told, and what its answers mean: any split of them means the same, and what makes no sense is an error."""

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relaymta.proto.edits import EDITS_MOST, Append, Change, Insert, edited
from relaymta.proto.milter import ACTIONS, VERSION, Conversation, MilterError, Piece, Progress, Said, smtp_reply
from tests.speedups.test_smtp import pieces

LEADSPC, NR_ALL = 0x100000, 0x80 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x40000 | 0x80000
HEAD = b"A:x\r\nB: y\r\nC:  z\r\nD:\tt\r\nE: f\r\n\tg\r\nF:\xff\r\n\r\n"


def frame(letter: bytes, data: bytes = b"") -> bytes:
    return (len(data) + 1).to_bytes(4, "big") + letter + data


def frames(octets: bytes) -> list[tuple[str, bytes]]:
    found = []
    while octets:
        length = int.from_bytes(octets[:4], "big")
        found.append((chr(octets[4]), octets[5 : 4 + length]))
        octets = octets[4 + length :]
    return found


def terms(version: int = VERSION, actions: int = ACTIONS, steps: int = LEADSPC, more: bytes = b"") -> bytes:
    return frame(b"O", b"".join(number.to_bytes(4, "big") for number in (version, actions, steps)) + more)


def agreed(**given: Any) -> Conversation:
    one = Conversation()
    one.negotiate()
    assert one.feed(terms(**given)) == [] and one.error is None and not one.due
    return one


def shown(one: Conversation, head: bytes = HEAD, body: bytes = b"body\r\n") -> bytes:
    """All of a session with one message."""
    told = {"i": "ID"}
    parts = [
        one.connect("[192.0.2.1]", "192.0.2.1", 0, {"j": "relay.example"}), one.helo("client", {}),
        one.mail("a@b", ("SIZE=1",), told), one.rcpt("c@d", (), {"{rcpt_addr}": "c@d"}), one.data(told),
        *one.header(head, told), *one.body(body), one.end(told),
    ]  # fmt: skip
    return b"".join(parts)


def test_what_is_offered_and_what_is_told():
    one = Conversation()
    assert one.negotiate() == frame(b"O", b"\0\0\0\6\0\0\1\xff\0\x1f\xff\xff") and list(one.due) == ["O"]
    one.feed(terms())
    found = frames(shown(one))
    assert found[:3] == [("D", b"Cj\0relay.example\0"), ("C", b"[192.0.2.1]\x004\0\x00192.0.2.1\0"), ("H", b"client\0")]
    assert found[3:8] == [
        ("D", b"Mi\0ID\0"), ("M", b"<a@b>\0SIZE=1\0"), ("D", b"R{rcpt_addr}\0c@d\0"), ("R", b"<c@d>\0"), ("D", b"Ti\0ID\0"),
    ]  # fmt: skip
    fields = [data for letter, data in found if letter == "L"]
    assert fields == [b"A\0x\0", b"B\0 y\0", b"C\0  z\0", b"D\0\tt\0", b"E\0 f\n\tg\0", b"F\0\xff\0"]
    assert found[-4:] == [("N", b""), ("B", b"body\r\n"), ("D", b"Ei\0ID\0"), ("E", b"")]
    assert "".join(one.due) == "CHMRTLLLLLLNBE"
    assert frames(one.connect("h.example", "2001:db8::1", 25, {})) == [("C", b"h.example\x006\0\x192001:db8::1\0")]
    assert frames(one.connect("x", "", 25, {})) == [("C", b"x\0U")]


def test_what_is_not_wanted_is_not_told_but_for_its_macros():
    one = agreed(steps=0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x200)
    assert [letter for letter, _ in frames(shown(one))] == ["D", "D", "D", "D", "D", "E"] and list(one.due) == ["E"]
    one = agreed(steps=NR_ALL)
    assert len(frames(shown(one))) == 20 and list(one.due) == ["E"]
    one = agreed(version=2, steps=0)
    assert "T" not in [letter for letter, _ in frames(shown(one))], "version 2 does not know it"


def test_one_space_is_left_out_unless_it_was_agreed_that_none_is():
    one = agreed(steps=0)
    fields = [data for letter, data in frames(shown(one)) if letter == "L"]
    assert fields == [b"A\0x\0", b"B\0y\0", b"C\0 z\0", b"D\0\tt\0", b"E\0f\n\tg\0", b"F\0\xff\0"]


def test_the_macros_that_a_filter_asks_for_are_those_that_it_is_told():
    asks = (2).to_bytes(4, "big") + b"i mail_addr {auth_type}\0" + (0).to_bytes(4, "big") + b"\0"
    one = agreed(more=asks)
    assert one.terms is not None and one.terms.macros == {"M": {"i", "{mail_addr}", "{auth_type}"}, "C": frozenset()}
    told = {"i": "ID", "{mail_addr}": "a@b", "{mail_host}": "b", "{auth_type}": ""}
    assert frames(one.mail("a@b", (), told))[0] == ("D", b"Mi\0ID\0{mail_addr}\0a@b\0")
    assert frames(one.connect("x", "192.0.2.1", 0, {"j": "x"}))[0][0] == "C"
    for wrong in (b"\0", (2).to_bytes(4, "big"), (0).to_bytes(4, "big") + b"i"):
        broken = Conversation()
        broken.negotiate()
        assert broken.feed(terms(more=wrong)) == [] and broken.error is not None


def test_long_fields_are_not_shown_and_long_bodies_in_pieces():
    """libmilter closes the connection for a frame of more than 65,535 octets."""
    one = agreed()
    head = b"A: x\r\nLong: %b\r\nEdge: %b\r\n\r\n" % (b"y" * 65_530, b"z" * (65_535 - 6 - 1))
    found = frames(b"".join(one.header(head, {})))
    assert [data[:5] for letter, data in found if letter == "L"] == [b"A\0 x\0", b"Edge\0"] and one.unshown == 1
    assert max(len(data) for _, data in found) == 65_535
    octets = bytes(range(256)) * 600
    found = frames(b"".join(one.body(octets)))
    assert b"".join(data for _, data in found) == octets and max(len(data) for _, data in found) == 65_535
    assert frames(one.helo("x" * 70_000, {})) == [] and "".join(one.due) == "LLNBBB"


@pytest.mark.parametrize("at, left", [(0, [1, 3, 4]), (1, [1, 3, 4]), (2, [1, 2, 3]), (3, [1, 2, 3, 4])])
def test_a_field_that_was_not_shown_is_not_counted_and_not_changed(at, left):
    """Else a long field in front of a forged one would save that from a filter that removes it."""
    long = b"y\r\n " * 30_000
    head = b"".join(b"X-Forged: %d%b\r\n" % (n, long if n in (1, 3) else b"") for n in range(1, 5)) + b"\r\n"
    one = agreed()
    one.mail("a@b.example", (), {})
    one.header(head, {})
    one.due.clear()
    one.end({})
    one.feed(frame(b"m", at.to_bytes(4, "big") + b"x-forged\0\0") + frame(b"c"))
    assert [int(octets[:1]) for octets in edited(head, one.changes.edits).header.split(b"X-Forged: ")[1:]] == left
    one.mail("a@b.example", (), {})
    one.header(b"X-Forged: 1\r\n\r\n", {})
    one.due.clear()
    one.end({})
    one.feed(frame(b"m", (1).to_bytes(4, "big") + b"X-Forged\0\0") + frame(b"c"))
    assert one.changes.edits[0].instance == 1


TEXTS = st.lists(
    st.tuples(st.from_regex(rb"\A[!-9;-~]{1,8}\Z"), st.lists(st.binary(max_size=9), min_size=1, max_size=3)), max_size=5
)


@given(TEXTS, st.binary(max_size=300))
def test_header_and_body_put_together_are_what_came(fields: list[tuple[bytes, list[bytes]]], body: bytes):
    """Case 4: body chunks that had the header in them as well."""
    clean = [(name, [line.translate(None, b"\0\r\n") for line in lines]) for name, lines in fields]
    head = b"".join(name + b":" + b"\r\n ".join(lines) + b"\r\n" for name, lines in clean) + b"\r\n"
    one = agreed()
    found = frames(b"".join([*one.header(head, {}), *one.body(body)]))
    put = b"".join(b"%b:%b\r\n" % tuple(data.split(b"\0")[:2]) for letter, data in found if letter == "L").replace(
        b"\n ", b"\r\n "
    )
    assert put.replace(b"\r\r", b"\r") + b"\r\n" == head
    assert b"".join(data for letter, data in found if letter == "B") == body


CONTINUE = frame(b"c")
CHANGES = [
    frame(b"h", b"X-A\0 1\0"), frame(b"i", b"\0\0\0\0X-B\x002\0"), frame(b"m", b"\0\0\0\1A\0\0"), frame(b"b", b"new\n"),
    frame(b"+", b"<e@f.example>\0"), frame(b"2", b"<g@h.example>\0NOTIFY=NEVER\0"), frame(b"-", b"c@d.example\0"),
    frame(b"e", b"<>\0"), frame(b"q", b"be\x07cause\0"), frame(b"p"),
]  # fmt: skip


def test_changes_come_with_the_end_of_the_message_alone():
    one = agreed()
    shown(one)
    before = len(one.due) - 1
    events = one.feed(CONTINUE * before + b"".join(CHANGES) + CONTINUE)
    assert events == [Said("R", "continue"), Piece(b"new\n"), Progress(), Said("E", "continue")] and one.error is None
    found = one.changes
    assert found.edits == [Append(b"X-A", b" 1"), Insert(0, b"X-B", b" 2"), Change(b"A", 1, b"")]
    assert found.added == [("e@f.example", ""), ("g@h.example", "NOTIFY=NEVER")] and found.removed == ["c@d.example"]
    assert (found.sender, found.quarantine, found.replaced, found.dropped) == (("", ""), "be\\x07cause", True, 0)
    for change in CHANGES[:-1]:
        early = agreed()
        shown(early)
        assert early.feed(change) == [] and early.error is not None
        unasked = agreed(actions=0)
        shown(unasked)
        unasked.feed(CONTINUE * before)
        assert unasked.feed(change) == [] and unasked.error is not None and "has not asked" in str(unasked.error)


@pytest.mark.parametrize("wrong", [
    frame(b"+", b"no address\0"), frame(b"+", b"<a@b>\r\nRCPT TO:<x@y>\0"), frame(b"+", b"postmaster\0"), frame(b"e", b"<a@b\0"),
    frame(b"+", "<ä@b.example>\0".encode()), frame(b"-", b"\0"),
])  # fmt: skip
def test_addresses_are_those_of_the_dialogue_or_dropped(wrong):
    one = agreed()
    shown(one)
    one.feed(CONTINUE * (len(one.due) - 1) + wrong + CONTINUE)
    assert one.error is None and one.changes.dropped == 1 and one.last == Said("E", "continue")
    assert not one.changes.added and not one.changes.removed and one.changes.sender is None


def test_changes_without_end_are_dropped_and_cost_no_memory():
    one = agreed()
    shown(one)
    one.feed(CONTINUE * (len(one.due) - 1))
    one.feed(frame(b"h", b"X\0y\0") * 5000 + frame(b"+", b"<a@b.example>\0") * 500 + frame(b"-", b"<a@b.example>\0") * 5000)
    found = one.changes
    assert (len(found.edits), len(found.added), len(found.removed)) == (EDITS_MOST, 100, 1000)
    one.feed(frame(b"h", b"X\0" + b"y" * 60_000 + b"\0") * 100)
    assert found.dropped == 5000 - EDITS_MOST + 400 + 4000 + 100 and one.error is None


WORDS = {b"a": "accept", b"r": "reject", b"t": "tempfail", b"d": "discard", b"4": "shutdown", b"f": "conn_fail"}


@pytest.mark.parametrize("letter", WORDS)
@pytest.mark.parametrize("at", range(14))
def test_each_word_at_each_event(at, letter):
    """A last word ends the message; at RCPT a refusal is that recipient's; what was told behind it may stay unanswered."""
    one = agreed()
    shown(one)
    event = one.due[at]
    events = one.feed(CONTINUE * at + frame(letter))
    if event in "CH" and letter == b"d":
        assert one.error is not None
        return
    assert events[-1] == Said(event, WORDS[letter]) and one.error is None
    if event == "R" and letter in (b"r", b"t"):
        assert one.last is None and not one.spent and len(one.due) == 10
        one.feed(CONTINUE * 10)
        assert one.last == Said("E", "continue")
        return
    assert one.last == Said(event, WORDS[letter]) and one.spent == (event != "E")
    if one.spent:
        assert one.feed(CONTINUE * 20 + b"\0\0\0\0rubbish") == [] and one.error is None, "nobody listens any more"


@pytest.mark.parametrize("wrong", [
    b"\0\0\0\0", b"UNKNOWN COMMAND", b"\x7f\xff\xff\xff", b"\0\x10\0\2", frame(b"z"), frame(b"O", b"x" * 12), frame(b"s"),
    frame(b"\xff"), frame(b"+", b"<a@b>"), frame(b"2", b"<a@b>\0NOTIFY=NEVER"),
    frame(b"h", b"X\0no end"), frame(b"i", b"\0\0"), frame(b"m", b"\0\0\0\1X"), frame(b"l", b"x\0"),
])  # fmt: skip
@pytest.mark.parametrize("at", [0, 3, 13])
def test_what_makes_no_sense(wrong, at):
    one = agreed()
    shown(one)
    one.feed(CONTINUE * at)
    assert one.feed(wrong) == [] and isinstance(one.error, MilterError) and str(one.error).isprintable()
    assert one.feed(CONTINUE) == []


def test_an_answer_that_nobody_waits_for_is_not_taken_for_the_next_ones():
    one = agreed()
    shown(one)
    events = one.feed(CONTINUE * (len(one.due) + 1))
    assert events[-1] == Said("E", "continue") and one.error is not None


@pytest.mark.parametrize("given", [
    {"version": 1}, {"version": 7}, {"actions": 0x200}, {"steps": 0x200000}, {"steps": 0x80000000},
])  # fmt: skip
def test_terms_that_were_not_offered(given):
    one = Conversation()
    one.negotiate()
    assert one.feed(terms(**given)) == [] and one.error is not None and str(one.error).startswith("wants ")


def test_another_protocol_is_told_by_its_first_octets():
    one = Conversation()
    one.negotiate()
    assert one.feed(b"UNKNOWN COMMAND\0") == [] and str(one.error) == "begins with 'UNKNOWN COMMAND\\x00'"
    late = Conversation()
    late.negotiate()
    assert late.feed(CONTINUE) == [] and late.error is not None


def test_no_more_of_a_body_than_is_wanted():
    one = agreed(steps=0x400)
    one.mail("a@b", (), {})
    one.feed(CONTINUE)
    assert one.body(b"x") and one.feed(frame(b"s")) == [] and one.body(b"y") == []
    assert one.end({}) == frame(b"E") and one.feed(CONTINUE) == [Said("E", "continue")]
    one.abort()
    one.mail("a@b", (), {})
    assert one.body(b"x"), "of the next message again"


REPLIES = [
    (b"550 5.7.1 no", "reject", b"550 5.7.1 no\r\n"),
    (b"451 later", "tempfail", b"451 4.7.1 later\r\n"),
    (b"421 4.3.2 bye", "tempfail", b"421 4.3.2 bye\r\n"),
    (b"550-5.1.1 one\r\n550 5.1.1 two 100%%", "reject", b"550-5.1.1 one\r\n550 5.1.1 two 100%\r\n"),
    (b"550 one\r\n451 two", "reject", b"550-5.7.1 one\r\n550 5.7.1 two\r\n"),
    (b"250 ok", "reject", b"550 5.7.1 250 ok\r\n"),
    (b"", "reject", b"550 5.7.1 Refused\r\n"),
    (b"550", "reject", b"550 5.7.1 Refused\r\n"),
    (b"554 4.7.1 x", "reject", b"554 5.7.1 x\r\n"),
    (b"550 5.7.1 a\r250 b", "reject", b"550 5.7.1 a?250 b\r\n"),
    ("550 5.7.1 nää".encode(), "reject", b"550 5.7.1 n????\r\n"),
]


@pytest.mark.parametrize("text, word, reply", REPLIES)
def test_replies_in_a_filters_words(text, word, reply):
    assert smtp_reply(text) == (word, reply)


@given(
    st.binary(max_size=80)
    | st.lists(st.sampled_from([b"550", b"451", b" ", b"-", b"\r\n", b"\n", b"\r", b"%%", b"5.7.1", b"x" * 600])).map(b"".join)
)
@example(b"550 " + b"\r\n550 x" * 50)
def test_whatever_a_filter_says_is_a_correct_reply_or_none(text: bytes):
    word, reply = smtp_reply(text)
    lines = reply.split(b"\r\n")
    assert lines.pop() == b"" and 0 < len(lines) <= 20 and all(len(line) <= 510 for line in lines)
    code = lines[0][:3]
    assert code[:1] == (b"5" if word == "reject" else b"4")
    forms = [re.fullmatch(rb"([45][0-5][0-9])([ -])([45])\.\d{1,3}\.\d{1,3} [!-~][ -~]*", line) for line in lines]
    assert all(form is not None and form[1] == code and form[3] == code[:1] for form in forms), reply
    assert [form[2] for form in forms if form is not None] == [b"-"] * (len(lines) - 1) + [b" "]


ANSWERS = st.lists(
    st.sampled_from(
        [CONTINUE, *CHANGES, *(frame(letter) for letter in WORDS), frame(b"s"), b"\0", b"\0\0\0\0", frame(b"c", b"x")]
    )
    | st.builds(frame, st.sampled_from([b"y", b"h", b"m", b"+", b"b", b"z"]), st.binary(max_size=12)),
    max_size=20,
)


@settings(max_examples=300)
@given(st.integers(0, 14), ANSWERS, st.data(), st.sampled_from([LEADSPC, 0, NR_ALL]))
def test_any_split_means_the_same(first: int, answers: list[bytes], data: st.DataObject, steps: int):
    wire = CONTINUE * first + b"".join(answers)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=8))

    def run(parts: list[bytes]) -> tuple[Any, ...]:
        one = agreed(steps=steps)
        shown(one)
        events = [event for part in parts for event in one.feed(part)]
        return events, one.changes, one.last, one.spent, list(one.due), one.error is None

    assert run([wire]) == run(pieces(wire, cuts)) == run([bytes([octet]) for octet in wire])


@given(st.binary(max_size=20), st.binary(max_size=60))
def test_what_a_filter_adds_never_becomes_another_field(name: bytes, value: bytes):
    one = agreed()
    shown(one)
    one.feed(CONTINUE * (len(one.due) - 1) + frame(b"h", name + b"\0" + value + b"\0") + CONTINUE)
    header = b"".join(edited(b"Subject: x\r\n\r\n", one.changes.edits)[:2])
    assert header.endswith(b"\r\n\r\n") and header.count(b"\r\n\r\n") == 1
    lines = header[:-4].replace(b"\r\n\t", b"\0").replace(b"\r\n ", b"\0").split(b"\r\n")
    assert len(lines) <= 2 and all(re.match(rb"[!-9;-~]+:", line) for line in lines), header
