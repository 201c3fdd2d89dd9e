"""Dot-stuffing: whatever the text is and however it is cut, it ends where it ends, and the receiver sees what it was."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta._speedups.dots import Stuffer
from relaymta.proto.smtp_client import stuff
from tests.speedups import oracle
from tests.speedups.test_smtp import interpreted_twin, pieces

STUFFERS = [pytest.param(Stuffer, id="compiled"), pytest.param(interpreted_twin("dots").Stuffer, id="interpreted")]
ATOMS = [b"\r", b"\n", b"\r\n", b".", b"..", b"a", b"\0", b"\r\n.\r\n", b"\n.\n", b"\r.\r", b"\n.\r\n", b"\r\n.\n", b"x" * 300]
TEXTS = st.lists(st.sampled_from(ATOMS), max_size=40).map(b"".join)
LINES = st.lists(st.sampled_from([b"", b".", b"..", b".x", b"x.", b"a b"]), max_size=20).map(
    lambda lines: b"".join(line + b"\r\n" for line in lines)
)
CUTS = st.lists(st.integers(0, 900), max_size=8)


def stuffed(stuffer_class: type, text: bytes, cuts: list[int]) -> bytes:
    stuffer = stuffer_class()
    return b"".join(stuffer.feed(piece) for piece in pieces(text, cuts)) + stuffer.end()


@pytest.mark.parametrize("stuffer_class", STUFFERS)
@given(text=TEXTS, cuts=CUTS)
def test_nothing_in_a_text_ends_it(stuffer_class, text, cuts):
    """Not by RFC 5321, and not by any of the ends with a bare CR or LF that some receivers see."""
    wire = stuffed(stuffer_class, text, cuts)
    assert wire == stuffed(stuffer_class, text, []), "however it is cut"
    ends = [match.end() for match in re.finditer(rb"(?=(?:\A|[\r\n])\.[\r\n])", b"\r\n" + wire)]
    assert ends == [len(wire) - 2], "the only one is ours"
    assert wire.endswith(b"\r\n.\r\n") or wire == b".\r\n"
    assert re.sub(rb"(\A|(?<=[\r\n]))\.\.", b".", wire)[: len(text)] == text


@pytest.mark.parametrize("stuffer_class", STUFFERS)
@given(text=LINES, cuts=CUTS)
def test_the_receiver_sees_what_it_was(stuffer_class, text, cuts):
    assert oracle.unstuff(stuffed(stuffer_class, text, cuts)) == (text, b"")


@pytest.mark.parametrize("stuffer_class", STUFFERS)
def test_what_need_not_be_stuffed_is_not_copied(stuffer_class):
    text = b"Subject: a.b\r\n\r\nno dot. at the beginning\r\n"
    assert stuffer_class().feed(text) is text


@pytest.mark.parametrize("size", [1, 126, 127, 128, 129, 255, 256, 257])
def test_a_dot_at_every_place_of_a_block(size):
    text = b"x" * size + b"\r\n.\r\n"
    assert b"".join(stuff([text])) == b"x" * size + b"\r\n..\r\n.\r\n"
