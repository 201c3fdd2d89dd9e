"""A message on its way through the filters: what the next one is shown, and what is stored."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.filter.judgement import Mail, NewEnvelope, Text
from relaymta.filter.revision import Revision
from relaymta.proto.edits import MOST, Append, Change, Edit, Insert, edited, shown

RESULTS = b"Authentication-Results: relay.example; spf=pass\r\n"
HEADER = b"From: a\r\nSubject: x\r\nTo: b\r\n\r\n"


def revision(header: bytes = HEADER, results: bytes = RESULTS, recipients: Any = ("c@d.example",)) -> Revision:
    text = Text(results + header, b"body\r\n")
    return Revision(Mail("ID", "a@b.example", recipients, "192.0.2.1", "h", "", "", text), results)


def test_positions_are_those_of_the_message_as_it_is_delivered_in_which_what_is_above_is_one_field():
    """`i 0` above all, `i 1` right below our fields, `i n` below the client's field n - 1."""
    for at, above, header in (
        (0, b"X: y\r\n" + RESULTS, HEADER),
        (1, RESULTS, b"X: y\r\n" + HEADER),
        (2, RESULTS, b"From: a\r\nX: y\r\nSubject: x\r\nTo: b\r\n\r\n"),
        (9, RESULTS, b"From: a\r\nSubject: x\r\nTo: b\r\nX: y\r\n\r\n"),
    ):
        one = revision()
        assert one.edit([Insert(at, b"X", b" y")]) == 0
        assert (one.above, one.header) == (above, header)
        assert one.mail.text.head == above + header


def test_fields_are_counted_as_they_are_shown_ours_above_included():
    """A filter that is shown two results removes the second one: that of the client."""
    one = revision(b"Authentication-Results: else.example; x\r\n" + HEADER)
    assert one.edit([Change(b"authentication-results", 2, b"")]) == 0
    assert (one.above, one.header) == (RESULTS, HEADER)
    assert one.edit([Change(b"Authentication-Results", 1, b" ours; none")]) == 0
    assert one.above == b"Authentication-Results: ours; none\r\n"
    assert one.edit([Change(b"Authentication-Results", 1, b"")]) == 0
    assert (one.above, one.header) == (b"", HEADER)


def test_the_next_filter_counts_what_the_one_before_it_has_added():
    one = revision()
    one.edit([Insert(0, b"A", b" 1"), Append(b"B", b" 2")])
    one.edit([Change(b"A", 1, b" 3"), Change(b"B", 1, b""), Insert(1, b"C", b" 4")])
    assert (one.above, one.header) == (b"A: 3\r\n" + RESULTS, b"C: 4\r\n" + HEADER)


def test_all_filters_together_have_the_room_of_one_and_tags_their_own():
    one = revision()
    big = Append(b"X", b" " + b"y" * 900)
    dropped = sum(one.edit([big] * 30) for _ in range(4))
    assert dropped > 0 and len(one.header) <= len(HEADER) + MOST
    assert one.edit([Append(b"T", b" tag")], 100) == 0 and b"\r\nT: tag\r\n" in one.header


class Body:
    """As of NewBody."""

    eight_bit = False

    def __init__(self) -> None:
        self.octets = 3
        self.discarded = 0

    def discard(self) -> None:
        self.discarded += 1

    def text(self, head: bytes) -> Text:
        return Text(head, b"new")


@pytest.mark.parametrize("results", [b"", RESULTS])
@pytest.mark.parametrize(
    ("header", "edits", "ends"),
    [
        (b"Subject: x\r\n", [], b"Subject: x\r\n\r\n"),
        (b"Subject: x\r\nno field\r\n", [], b"Subject: x\r\nno field\r\n\r\n"),
        (b"Subject: x\r\n", [Change(b"Subject", 1, b"")], b"\r\n"),
        (b"Subject: x\r\n", [Append(b"X", b" 1")], b"Subject: x\r\nX: 1\r\n\r\n"),
        (b"\r\n", [], b"\r\n"),
        (b"\r\n", [Append(b"X", b" 1")], b"X: 1\r\n\r\n"),
        (HEADER, [], HEADER),
    ],
)
def test_a_new_body_is_behind_an_empty_line_whatever_was_there(results: bytes, header: bytes, edits: list[Edit], ends: bytes):
    """Whether the header is changed before it is there, or behind that."""
    for before in (True, False):
        one = revision(header, results)
        one.edit(edits if before else [])
        one.rewrite(Body())  # type: ignore[arg-type]
        one.edit([] if before else edits)
        assert one.header == ends and one.mail.text.head == results + ends
        one.rewrite(Body())  # type: ignore[arg-type]
        assert one.header == ends


NAMES = st.sampled_from([b"From", b"X-A", b"Subject", b"Authentication-Results"])
VALUES = st.sampled_from([b"", b" 1", b" two\n three", b"x\r\nX-Evil: 1", b"\0:\r\n", b" " + b"w " * 600])
EDITS = st.lists(
    st.builds(Insert, st.integers(0, 6), NAMES, VALUES)
    | st.builds(Append, NAMES, VALUES)
    | st.builds(Change, NAMES, st.integers(0, 3), VALUES),
    max_size=6,
)


@given(st.lists(EDITS, max_size=3), st.sampled_from([b"", RESULTS, RESULTS + b"Received-SPF: pass\r\n"]))
def test_a_field_with_nothing_above_is_changed_as_if_there_were_no_revision(rounds: list[list[Edit]], results: bytes):
    """Without anything above, it is `edited`; whatever is above, no octet gets lost between the two parts."""
    one = revision(results=results)
    whole = results + HEADER
    for edits in rounds:
        one.edit(edits)
        unplaced = [edit for edit in edits if not isinstance(edit, Insert)]
        if len(unplaced) == len(edits):
            whole = b"".join(edited(whole, edits)[:2])
        else:
            whole = one.above + one.header
        assert sorted(shown(one.above + one.header)) == sorted(shown(whole))
        assert one.mail.text.head == one.above + one.header
        assert one.header.endswith(b"\r\n\r\n") or one.header == b"\r\n"
        assert not one.above or one.above.endswith(b"\r\n")
        assert b"\0" not in one.above + one.header and b"\r\nX-Evil" not in b"\r\n" + one.above + one.header


def test_the_envelope():
    one = revision(recipients=["c@d.example", "C@D.example", "e@f.example"])
    one.readdress(NewEnvelope(["g@h.example", "E@f.example"], ["c@d.EXAMPLE"], "x@y.example"))
    assert (one.sender, one.recipients) == ("x@y.example", ["e@f.example", "g@h.example"])
    assert (one.mail.sender, one.mail.recipients) == ("x@y.example", ["e@f.example", "g@h.example"])
    one.readdress(NewEnvelope([], ["e@f.example", "g@h.example"]))
    assert (one.sender, one.recipients) == ("x@y.example", [])


def test_one_recipient_instead_of_all():
    one = revision(recipients=["c@d.example", "e@f.example"])
    one.readdress(NewEnvelope(only="x@y.example"))
    assert one.recipients == one.mail.recipients == ["x@y.example"] and one.sender is None
    one.readdress(NewEnvelope(["b@c.example", "X@y.example"], ["g@h.example"]))
    assert one.recipients == ["x@y.example", "b@c.example"]
    one.readdress(NewEnvelope(["z@y.example"], ["b@c.example"], only="c@d.example"))
    assert one.recipients == ["c@d.example", "z@y.example"]
    one.readdress(NewEnvelope(removed=["C@d.example"], only="c@d.example", sender=""))
    assert one.recipients == one.mail.recipients == [] and one.sender == ""


async def test_a_body_that_another_one_replaces_is_discarded_and_the_next_filter_sees_the_last():
    one, first, second = revision(), Body(), Body()
    one.rewrite(first)  # type: ignore[arg-type]
    one.edit([Append(b"X", b" y")])
    one.rewrite(second)  # type: ignore[arg-type]
    shown_now = b"".join([piece async for piece in one.mail.text.pieces()])
    assert shown_now.endswith(b"X: y\r\n\r\nnew") and (first.discarded, second.discarded) == (1, 0)
    one.discard()
    one.discard()
    assert second.discarded == 1
