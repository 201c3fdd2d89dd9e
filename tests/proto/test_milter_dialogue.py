"""A milter's dialogue as a whole: sessions of several messages, held against a plain account of what is owed to whom; and what a
filter's answers may cost."""

import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relaymta.proto.edits import Append
from relaymta.proto.milter import (
    ACTIONS,
    ADDRESS_MOST,
    CHANGES_MOST,
    FRAME_MOST,
    LISTS_MOST,
    PARAMETERS_MOST,
    STEPS,
    Changes,
    Conversation,
    Piece,
    Progress,
    Said,
    smtp_reply,
)
from tests.proto.test_milter import CONTINUE, agreed, frame, frames, shown, terms
from tests.speedups.test_smtp import pieces

# The bits of the steps, as libmilter's mfdef.h has them: that an event is not told, and that it is not answered.
NOT_TOLD = {"C": 0, "H": 1, "M": 2, "R": 3, "B": 4, "L": 5, "N": 6, "U": 8, "T": 9}
NOT_ANSWERED = {"L": 7, "C": 12, "H": 13, "M": 14, "R": 15, "T": 16, "U": 17, "N": 18, "B": 19}
FIRST_VERSION = {"U": 3, "T": 4}


def at_the_end(actions: int = ACTIONS, steps: int = 0x100000) -> Conversation:
    """All but the end of the message is answered."""
    one = agreed(actions=actions, steps=steps)
    shown(one)
    one.feed(CONTINUE * (len(one.due) - 1))
    assert list(one.due) == ["E"] and one.last is None
    return one


# Sessions


class Word(NamedTuple):
    """An answer: its frame, and what it is taken for."""

    octets: bytes
    word: str
    reply: bytes = b""


GO_ON = Word(frame(b"c"), "continue")
WORDS = [
    GO_ON, Word(frame(b"c", b"not looked at"), "continue"),
    Word(frame(b"a"), "accept"), Word(frame(b"r"), "reject"), Word(frame(b"t"), "tempfail"), Word(frame(b"4"), "shutdown"),
    Word(frame(b"f"), "conn_fail"), Word(frame(b"d"), "discard"),
    Word(frame(b"y", b"550 5.1.1 no\0"), "reject", b"550 5.1.1 no\r\n"),
    Word(frame(b"y", b"451 later\0"), "tempfail", b"451 4.7.1 later\r\n"),
]  # fmt: skip
CHANGES = [frame(b"h", b"X\0 y\0"), frame(b"b", b"text"), frame(b"p"), frame(b"q", b"why\0")]
EVENTS: dict[str, Callable[[Conversation], bytes]] = {
    "C": lambda one: one.connect("h.example", "192.0.2.1", 25, {"j": "us"}),
    "H": lambda one: one.helo("c", {}),
    "U": lambda one: one.unknown(b"NONSENSE"),
    "M": lambda one: one.mail("a@b.example", (), {"i": "1"}),
    "R": lambda one: one.rcpt("c@d.example", (), {}),
    "T": lambda one: one.data({"i": "1"}),
    "L": lambda one: b"".join(one.header(b"A: b\r\nC: d\r\n\r\n", {"i": "1"})),  # two of them, and N
    "B": lambda one: b"".join(one.body(b"text\r\n")),
    "E": lambda one: one.end({"i": "1"}),
}
MESSAGES = st.lists(st.sampled_from(["MRTLBE", "MRRRTLBBE", "MRE", "MRLE", "MRURTLBBBBE"]), min_size=1, max_size=3)
ALL_STEPS = [0, STEPS & ~0x37F, 0x100000, *(1 << bit for bit in (*NOT_TOLD.values(), *NOT_ANSWERED.values()))]


class Account:
    """What a filter of these steps is told, in letters, and what it owes and says: step by step, without any of the code that is
    tested."""

    def __init__(self, version: int, steps: int) -> None:
        self.version, self.steps = version, steps
        self.told, self.due = "", list[str]()
        self.events, self.last, self.over = list[Any](), None, False

    def tell(self, event: str) -> None:
        for letter in "LLN" if event == "L" else event:
            if self.version < FIRST_VERSION.get(letter, 0):
                continue
            bit = NOT_TOLD.get(letter)
            wanted = bit is None or not self.steps >> bit & 1
            macros = letter in "CMT" or letter == "E" or (letter == "N" and wanted)
            self.told += "D" * macros + letter * wanted
            nr = NOT_ANSWERED.get(letter)
            if wanted and (nr is None or not self.steps >> nr & 1):
                self.due.append(letter)

    def answer(self, one: Word) -> None:
        event = self.due.pop(0)
        said = Said(event, one.word, one.reply)
        if one.word == "continue":
            if event in "RE":
                self.events.append(said)
            self.over = event == "E"
        else:
            self.events.append(said)
            self.over = not (event in "RU" and one.word in ("reject", "tempfail"))
        if self.over:
            self.last = said


@settings(max_examples=300, deadline=None)
@given(MESSAGES, st.integers(0, STEPS), st.sampled_from([2, 3, 4, 6]), st.booleans(), st.data())
@example(["MRTLBE"], STEPS & ~0x37F, 6, True, None)
@example(["MRTLBE"], 0, 6, False, None)
def test_sessions(messages: list[str], steps: int, version: int, lockstep: bool, data: st.DataObject | None):
    """Told at once or one by one, in whatever pieces the answers come: each is that of the oldest event that is due."""

    def draw(strategy: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return otherwise if data is None else data.draw(strategy)

    one, account = agreed(version=version, steps=steps), Account(version, steps)

    def exchange() -> None:
        wire, went_on = b"", True
        while account.due and went_on:
            word = draw(st.sampled_from([GO_ON] * 20 + WORDS), GO_ON)
            if word.word == "discard" and account.due[0] in "CH":
                word = GO_ON
            if account.due[0] == "E":
                wire += b"".join(draw(st.lists(st.sampled_from(CHANGES), max_size=3), CHANGES))
            account.answer(word)
            wire += word.octets
            went_on = not account.over
        heard = [
            event for piece in pieces(wire, draw(st.lists(st.integers(0, 99), max_size=5), [3, 7])) for event in one.feed(piece)
        ]
        assert [event for event in heard if isinstance(event, Said)] == account.events and one.error is None
        account.events.clear()
        assert list(one.due) == account.due and one.last == account.last
        assert one.spent == bool(account.over and account.due)

    for number, letters in enumerate(messages):
        for event in ("CH" if number == 0 else "") + letters:
            if event == "M":
                account.last = None
            account.told = ""
            found = EVENTS[event](one)
            if one.last is not None and event == "B":
                assert found == b"", "no more of the body is wanted"
                continue
            account.tell(event)
            assert "".join(letter for letter, _ in frames(found)) == account.told
            if lockstep or event == "E":
                exchange()
                if account.over:
                    break
        if account.over and (one.spent or (account.last is not None and account.last.event in "CH")):
            return  # this connection is done with
        assert not one.due and one.last == account.last
        assert one.abort() == frame(b"A") and one.last is None
        account.last, account.over = None, False
    assert one.quit() == frame(b"Q")


def test_no_body_behind_a_last_word():
    one = agreed()
    one.mail("a@b", (), {})
    assert one.feed(frame(b"a")) == [Said("M", "accept")] and not one.spent and one.body(b"text") == []


def test_the_next_message_begins_anew():
    one = at_the_end()
    one.feed(frame(b"h", b"X\0 y\0") + frame(b"q", b"why\0") + frame(b"b", b"z") + frame(b"r"))
    assert one.last == Said("E", "reject") and one.changes.replaced and one.changes.quarantine == "why"
    one.abort()
    one.mail("a@b", (), {})
    assert one.last is None and not one.changes.edits and one.changes.quarantine is None and not one.changes.replaced
    with pytest.raises(AssertionError):
        one.abort()


def test_versions_that_do_not_know_an_event_are_told_nothing_of_it():
    told = {"i": "ID"}
    assert [agreed(version=version).data(told) == b"" for version in (2, 3, 4, 6)] == [True, True, False, False]
    assert [agreed(version=version).unknown(b"X") == b"" for version in (2, 3, 4, 6)] == [True, False, False, False]
    unwanted = agreed(steps=0x200)
    assert frames(unwanted.data(told)) == [("D", b"Ti\0ID\0")] and not unwanted.due, "but its macros, if it knows the event"


def test_no_macro_without_a_name_or_a_value():
    one = agreed()
    told = {"": "x", "i": "", "j": "a\0b", "{mail_addr}": "a@b"}
    assert frames(one.mail("a@b", (), told)) == [("D", b"M{mail_addr}\0a@b\0"), ("M", b"<a@b>\0")]
    assert frames(one.mail("", (), {"i": "x" * 70_000})) == [("M", b"<>\0")]


def test_what_is_carried_of_a_field():
    """A NUL ends it; a fold is a line feed; of spaces one is left out at most."""
    head = b"A: x\0y\r\nB:\r\n folded\r\n\tand more\r\nC : z\r\nD:\r\nno field\r\n\r\n"
    assert [data for letter, data in frames(b"".join(agreed().header(head, {}))) if letter == "L"] == [
        b"A\0 x\0", b"B\0\n folded\n\tand more\0", b"C\0 z\0", b"D\0\0",
    ]  # fmt: skip
    assert [data for letter, data in frames(b"".join(agreed(steps=0).header(head, {}))) if letter == "L"] == [
        b"A\0x\0", b"B\0\n folded\n\tand more\0", b"C\0z\0", b"D\0\0",
    ]  # fmt: skip
    assert agreed(steps=0x60).header(head, {}) == [] and agreed().unknown(b"a\0b" * 40_000)[4:5] == b"U"


# Lists of macros


def test_lists_of_macros():
    """The last one of an event counts; others than we know of are none; names may have braces, blanks or commas."""
    more = b"\0\0\0\2i\0" + b"\0\0\0\7x\0" + b"\xff\xff\xff\xffx\0" + b"\0\0\0\2 auth_type,{mail_addr}  j {} \0" + b"\0\0\0\5i\0"
    one = agreed(more=more)
    assert one.terms is not None and one.terms.macros == {"M": {"{auth_type}", "{mail_addr}", "j"}, "E": {"i"}}
    assert frames(one.end({"i": "1", "j": "2"})) == [("D", b"Ei\x001\0"), ("E", b"")]
    assert frames(one.mail("a", (), {"i": "1", "j": "2"}))[0] == ("D", b"Mj\x002\0")
    too_long = Conversation()
    too_long.negotiate()
    assert too_long.feed(terms(more=bytes(4) + b"i " * LISTS_MOST + b"\0")) == [] and "octets" in str(too_long.error)
    assert frames(one.data({"i": "1", "j": "2"}))[0] == ("D", b"Ti\x001\0j\x002\0"), "it has not said which"


# Replies


@pytest.mark.parametrize(("text", "word", "reply"), [
    (b"451 one\r\n550 two", "tempfail", b"451-4.7.1 one\r\n451 4.7.1 two\r\n"),
    (b"451 4.3.2 one\ntwo", "tempfail", b"451-4.3.2 one\r\n451 4.3.2 two\r\n"),
    (b"450 4.3.2 one\n450 4.3.2 two\r\n", "tempfail", b"450-4.3.2 one\r\n450 4.3.2 two\r\n"),
    (b"one\n451 two", "reject", b"550-5.7.1 one\r\n550 5.7.1 two\r\n"),
    (b"499 x", "reject", b"550 5.7.1 499 x\r\n"),
    (b"5500 x", "reject", b"550 5.7.1 5500 x\r\n"),
    (b"550 5.7.1", "reject", b"550 5.7.1 Refused\r\n"),
    (b"550 5.7.1.1 x", "reject", b"550 5.7.1 5.7.1.1 x\r\n"),
    (b"550-%%%%s %d", "reject", b"550 5.7.1 %%s %d\r\n"),
])  # fmt: skip
def test_replies_whose_codes_make_no_sense_are_as_lasting_as_their_first_line(text, word, reply):
    assert smtp_reply(text) == (word, reply)
    one = at_the_end()
    assert one.feed(frame(b"y", text + b"\0behind it")) == [Said("E", word, reply)] and one.last == Said("E", word, reply)


def test_a_last_text_may_have_no_nul():
    """Postfix reads a reply and a reason without it."""
    one = at_the_end()
    assert one.feed(frame(b"q", b"why") + frame(b"y", b"550 5.1.1 no")) == [Said("E", "reject", b"550 5.1.1 no\r\n")]
    assert one.changes.quarantine == "why" and one.error is None


def test_refusals_of_an_unknown_command_are_of_that_alone():
    for letter, word in ((b"r", "reject"), (b"t", "tempfail")):
        one = agreed()
        one.mail("a@b", (), {})
        one.unknown(b"XYZ")
        one.rcpt("a@b", (), {})
        assert one.feed(CONTINUE + frame(letter) + CONTINUE) == [Said("U", word), Said("R", "continue")]
        assert one.last is None and not one.spent and not one.due


def test_discard_without_a_message_is_not_taken_for_an_answer():
    for event in range(2):
        one = agreed()
        shown(one)
        assert one.feed(CONTINUE * event + frame(b"d")) == [] and "discards" in str(one.error) and one.last is None


def test_what_it_wants_beyond_the_offer_is_named():
    for given_terms, words in (
        ({"version": 7}, "version 7"), ({"actions": 0x3FF}, "actions 0x200"), ({"steps": 0x30000001}, "steps 0x30000000"),
        ({"version": 1, "actions": 0x201}, "version 1, actions 0x200"),
    ):  # fmt: skip
        one = Conversation()
        one.negotiate()
        assert one.feed(terms(**given_terms)) == [] and str(one.error).startswith(f"wants {words}, beyond version 2 to 6,")


# Changes

ALLOWED = [
    (b"h", b"X\0y\0", 0x1), (b"i", b"\0\0\0\0X\0y\0", 0x1), (b"i", b"\0\0\0\0X\0y\0", 0x10), (b"m", b"\0\0\0\1X\0y\0", 0x10),
    (b"b", b"text", 0x2), (b"+", b"<a@b.example>\0", 0x4), (b"2", b"<a@b.example>\0", 0x80), (b"-", b"<a@b.example>\0", 0x8),
    (b"e", b"<a@b.example>\0", 0x40), (b"q", b"why\0", 0x20),
]  # fmt: skip


@pytest.mark.parametrize(("letter", "data", "action"), ALLOWED)
def test_each_change_by_the_action_that_allows_it(letter, data, action):
    """The bits are those of SMFIF_ADDHDRS ... SMFIF_ADDRCPT_PAR."""
    allowed = at_the_end(actions=action)
    allowed.feed(frame(letter, data) + CONTINUE)
    assert allowed.error is None and allowed.last is not None and allowed.changes != Changes()
    others = ACTIONS & ~sum({bit for one, _, bit in ALLOWED if one == letter})
    refused = at_the_end(actions=others)
    assert refused.feed(frame(letter, data)) == [] and "has not asked" in str(refused.error) and refused.changes == Changes()


def test_addresses_with_anything_else_are_dropped():
    one = at_the_end()
    wrong = [
        (b"+", b"<a@b.example> NOTIFY=NEVER\0"), (b"+", b"a@b.example> x\0"), (b"+", b"\0"), (b"+", b"<>\0"),
        (b"+", b"a@b\xff\0"),
        (b"+", b"<a@b.example" + b">" * ADDRESS_MOST + b"\0"), (b"2", b"a@b.example\0NOTIFY=\0"),
        (b"2", b"a@b.example\0NOTIFY=NEVER\r\nRCPT TO:<x@y.example>\0"), (b"2", b"a@b.example\0X=\xc3\xa4\0"),
        (b"2", b"a@b.example\0" + b"X" * (PARAMETERS_MOST + 1) + b"\0"), (b"-", b"<>\0"), (b"-", b"a@b c@d\0"),
        (b"e", b"\0"), (b"e", b"<a@b.example> SIZE=1\0"), (b"e", "<ä@b.example>\0".encode()), (b"e", b"<>\0=\0"),
    ]  # fmt: skip
    for number, (letter, data) in enumerate(wrong, 1):
        assert one.feed(frame(letter, data)) == [] and one.error is None and one.changes.dropped == number, data
    assert (one.changes.added, one.changes.removed, one.changes.sender) == ([], [], None)
    right = [
        (b"+", b"a@b.example\0"), (b"+", b' <"a b"@b.example> \0'), (b"2", b"<c@d.example>\0 NOTIFY=NEVER \r\n ORCPT=rfc822;x\0"),
        (b"2", b"e@f.example\0\0"), (b"2", b"g@h.example\0"), (b"-", b"postmaster\0"), (b"-", "ä@b.example\0".encode()),
        (b"e", b"<>\0RET=HDRS ENVID=x\0"),
    ]  # fmt: skip
    one.feed(b"".join(frame(letter, data) for letter, data in right))
    assert one.error is None and one.changes.dropped == len(wrong)
    assert one.changes.added == [
        ("a@b.example", ""), ('"a b"@b.example', ""), ("c@d.example", "NOTIFY=NEVER ORCPT=rfc822;x"), ("e@f.example", ""),
        ("g@h.example", ""),
    ]  # fmt: skip
    assert one.changes.removed == ["postmaster", "ä@b.example"] and one.changes.sender == ("", "RET=HDRS ENVID=x")


def test_a_change_that_is_too_large_leaves_the_others_and_quarantine_is_never_dropped():
    one = at_the_end()
    one.feed(frame(b"h", b"X\0" + b"y" * CHANGES_MOST + b"\0") + frame(b"h", b"X\0 y\0"))
    assert one.changes.edits == [Append(b"X", b" y")] and one.changes.dropped == 1
    one.feed(frame(b"h", b"X\0" + b"y" * (CHANGES_MOST - 100) + b"\0") * 2 + frame(b"h", b"X\0 " + b"z" * 100 + b"\0"))
    assert one.changes.dropped == 3
    one.feed(frame(b"q", b"first\0") + frame(b"q", b"\xffx" * 500_000 + b"\0"))
    assert one.changes.quarantine == "\ufffdx" * 100 and one.changes.dropped == 3 and one.error is None
    one.feed(frame(b"q", b"\0"))
    assert one.changes.quarantine == "", "held, without a reason"


def test_a_new_body_may_be_empty_and_is_not_kept():
    one = at_the_end()
    assert one.feed(frame(b"b")) == [] and one.changes.replaced
    piece = b"x" * (FRAME_MOST - 1)
    assert one.feed(frame(b"b", piece)) == [Piece(piece)] and not one._buffer
    refused = at_the_end(actions=ACTIONS & ~2)
    assert refused.feed(frame(b"b", b"x")) == [] and refused.error is not None and not refused.changes.replaced


# What it costs


def test_a_frame_that_is_too_long_is_known_by_its_length():
    for octets in (bytes(4), (FRAME_MOST + 1).to_bytes(4), b"\x55\x4e\x4b\x4e", b"\xff" * 4):
        one = at_the_end()
        assert [one.feed(octets[at : at + 1]) for at in range(3)] == [[], [], []] and one.error is None
        assert one.feed(octets[3:]) == [] and str(one.error).startswith("begins with '") and not one._buffer
        assert one.feed(b"x" * 100_000) == [] and not one._buffer
    one = at_the_end()
    assert one.feed(FRAME_MOST.to_bytes(4)) == [] and one.error is None


def test_what_came_before_nonsense_is_told_and_nothing_behind_it():
    one = agreed()
    shown(one)
    events = one.feed(CONTINUE * 4 + frame(b"p") + b"\0\0\0\0" + CONTINUE * 9)
    assert events == [Said("R", "continue"), Progress()] and one.error is not None and one.due[0] == "T" and one.last is None


INSANE = [
    frame(b"h", b"X-%d\0\0") * 4000, frame(b"m", b"\0\0\0\1X\0y\0") * 4000, frame(b"-", b"a@b.example\0") * 4000,
    frame(b"2", b"a@b.example\0" + b"X=y " * 200 + b"\0") * 1000, frame(b"h", b"X\0" + b"\n" * 5000 + b"\0") * 100,
    frame(b"e", b"a@b.example\0" + b"X=y " * 250 + b"\0") * 500, frame(b"q", b"\x01" * 100_000 + b"\0") * 5,
    frame(b"h", b"\0" + b"y" * 60_000 + b"\0") * 20, frame(b"+", b"<" * 1000 + b"\0") * 1000,
]  # fmt: skip


def test_no_filter_costs_much_memory():
    """All changes that are kept of one message, and terms as long as they may be: below 2 MB."""
    one = at_the_end()
    wire = b"".join(INSANE)
    parts = [wire[at : at + 65536] for at in range(0, len(wire), 65536)]
    names = b" ".join(b"%x" % number for number in range(0x1000, 0x4000))
    answer = terms(more=bytes(4) + names[: LISTS_MOST - 5] + b"\0")
    tracemalloc.start()
    try:
        for part in parts:
            one.feed(part)
        kept = tracemalloc.get_traced_memory()[0]
        other = Conversation()
        other.negotiate()
        other.feed(answer)
        assert smtp_reply(b"550\n" * 250_000)[1].count(b"\n") == 20
        more = tracemalloc.get_traced_memory()[0] - kept
        peak = tracemalloc.get_traced_memory()[1] - kept
    finally:
        tracemalloc.stop()
    assert one.error is None and one.changes.dropped > 9000 and len(one.changes.removed) <= 1000
    assert other.error is None and other.terms is not None and len(other.terms.macros["C"]) > 3000
    assert kept < 2_000_000 and more < 1_000_000 and peak < 5_000_000, (kept, more, peak)


@given(st.binary(max_size=40), st.sampled_from([b"h", b"i", b"m", b"+", b"2", b"-", b"e", b"q", b"b"]))
def test_whatever_a_change_has_only_a_protocol_error_comes_of_it(data: bytes, letter: bytes):
    one = at_the_end()
    one.feed(frame(letter, data) + CONTINUE)
    assert (one.error is None) == (one.last is not None) and (one.error is None or str(one.error).isprintable())
    for text in (*(x for pair in one.changes.added for x in pair), *one.changes.removed, *(one.changes.sender or ())):
        assert text.isprintable()
