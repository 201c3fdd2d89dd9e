"""The reply parser: any split gives the same replies; nothing grows without bound."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta._speedups.replies import Replies
from tests.speedups.test_smtp import interpreted_twin, pieces

PARSERS = [pytest.param(Replies, id="compiled"), pytest.param(interpreted_twin("replies").Replies, id="interpreted")]

REPLIES = st.lists(
    st.sampled_from(
        [
            b"250 ok\r\n",
            b"250-a\r\n",
            b"250\r\n",
            b"354 go\n",
            b"55",
            b"421 4.3.2 bye\r\n",
            b"\r\n",
            b"999 x\r\n",
            b"250-",
            b"550 ",
        ]
    ),
    max_size=15,
).map(b"".join)


def oracle(data: bytes) -> list[tuple[int, bytes]]:
    found, lines, code = [], [], 0
    for line in data.split(b"\n")[:-1]:
        line = line.removesuffix(b"\r")
        match = re.fullmatch(rb"([2-5]\d\d)(?:([ -])(.*))?", line, re.S)
        if match is None or (lines and int(match[1]) != code):
            return [*found, (0, line)]
        code = int(match[1])
        lines.append(match[3] or b"")
        if match[2] != b"-":
            found.append((code, b"\n".join(lines)))
            lines = []
    return found


@pytest.mark.parametrize("parser_class", PARSERS)
@given(data=REPLIES, cuts=st.lists(st.integers(0, 100), max_size=6))
def test_replies_equal_the_oracle_in_any_split(parser_class, data, cuts):
    replies = parser_class(4096, 100)
    found = [reply for piece in pieces(data, cuts) for reply in replies.feed(piece)]
    assert found == oracle(data)


@pytest.mark.parametrize("parser_class", PARSERS)
def test_endless_lines_and_replies_end_the_session(parser_class):
    replies = parser_class(100, 10)
    assert replies.feed(b"250 " + b"x" * 200)[0][0] == 0
    assert replies.broken
    many = parser_class(100, 10)
    assert many.feed(b"250-x\r\n" * 11)[-1][0] == 0
    assert many.feed(b"250 ok\r\n") == []
