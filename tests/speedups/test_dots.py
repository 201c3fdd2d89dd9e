"""Dot-stuffing: for any message data in any split, only its end ends it, and the receiver gets what was sent."""

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
MESSAGES = st.lists(st.sampled_from(ATOMS), max_size=40).map(b"".join)
LINES = st.lists(st.sampled_from([b"", b".", b"..", b".x", b"x.", b"a b"]), max_size=20).map(
    lambda lines: b"".join(line + b"\r\n" for line in lines)
)
CUTS = st.lists(st.integers(0, 900), max_size=8)


def stuffed(stuffer_class: type, message: bytes, cuts: list[int]) -> bytes:
    stuffer = stuffer_class()
    return b"".join(stuffer.feed(piece) for piece in pieces(message, cuts)) + stuffer.end()


@pytest.mark.parametrize("stuffer_class", STUFFERS)
@given(message=MESSAGES, cuts=CUTS)
def test_nothing_in_message_data_ends_it(stuffer_class, message, cuts):
    """Not by RFC 5321, and not by any of the ends with a bare CR or LF that some receivers accept."""
    wire = stuffed(stuffer_class, message, cuts)
    assert wire == stuffed(stuffer_class, message, []), "however it is cut"
    ends = [match.end() for match in re.finditer(rb"(?=(?:\A|[\r\n])\.[\r\n])", b"\r\n" + wire)]
    assert ends == [len(wire) - 2], "the only one is ours"
    assert wire.endswith(b"\r\n.\r\n") or wire == b".\r\n"
    assert re.sub(rb"(\A|(?<=[\r\n]))\.\.", b".", wire)[: len(message)] == message


@pytest.mark.parametrize("stuffer_class", STUFFERS)
@given(message=LINES, cuts=CUTS)
def test_the_receiver_gets_what_was_sent(stuffer_class, message, cuts):
    assert oracle.unstuff(stuffed(stuffer_class, message, cuts)) == (message, b"")


@pytest.mark.parametrize("stuffer_class", STUFFERS)
def test_what_need_not_be_stuffed_is_not_copied(stuffer_class):
    message = b"Subject: a.b\r\n\r\nno dot. at the beginning\r\n"
    assert stuffer_class().feed(message) is message


@pytest.mark.parametrize("size", [1, 126, 127, 128, 129, 255, 256, 257])
def test_a_dot_at_every_place_of_a_block(size):
    message = b"x" * size + b"\r\n.\r\n"
    assert b"".join(stuff([message])) == b"x" * size + b"\r\n..\r\n.\r\n"
