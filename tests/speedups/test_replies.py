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


def oracle(data: bytes) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
    """The replies, and what the end of the connection adds to them."""
    found: list[tuple[int, bytes]] = []
    lines: list[bytes] = []
    code = 0
    whole = data.split(b"\n")
    for number, line in enumerate(whole):
        last = number == len(whole) - 1
        if last and not line:
            break
        before = len(found)
        line = line.removesuffix(b"\r") if not last else line
        match = re.fullmatch(rb"([2-5]\d\d)([ -]?)(.*)", line, re.S)
        if match is None and not code:
            return (found, []) if last else ([*found, (0, line)], [])
        code = code or int(match[1])  # type: ignore[index]
        if line:
            lines.append(match[3] if match is not None else line)
        if match is not None and match[2] != b"-":
            found.append((code, b"\n".join(lines)))
            lines, code = [], 0
        if last and len(found) > before:
            return found[:-1], found[-1:]
    return found, [(code, b"\n".join(lines))] if code else []


@pytest.mark.parametrize("parser_class", PARSERS)
@given(data=REPLIES, cuts=st.lists(st.integers(0, 100), max_size=6))
def test_replies_equal_the_oracle_in_any_split(parser_class, data, cuts):
    replies = parser_class(4096, 100)
    found = [reply for piece in pieces(data, cuts) for reply in replies.feed(piece)]
    assert (found, replies.end()) == oracle(data)


@pytest.mark.parametrize("parser_class", PARSERS)
@given(data=REPLIES, cuts=st.lists(st.integers(0, 100), max_size=6))
def test_lines_that_are_cut_are_the_same_in_any_split(parser_class, data, cuts):
    whole, split = parser_class(5, 3), parser_class(5, 3)
    assert whole.feed(data) == [reply for piece in pieces(data, cuts) for reply in split.feed(piece)]
    assert whole.end() == split.end()


TABLE = [  # RFC 5321 4.2.1: the code decides
    (b"250\r\n", [(250, b"")]),
    (b"250ok\r\n", [(250, b"ok")]),
    (b"2502.0.0 ok\r\n", [(250, b"2.0.0 ok")]),
    (b"250\tok\r\n", [(250, b"\tok")]),
    (b"550:no\r\n", [(550, b":no")]),
    (b"250-a\r\n550 b\r\n", [(250, b"a\nb")]),
    (b"451-a\r\n250 b\r\n", [(451, b"a\nb")]),
    (b"250-a\r\n\r\n250 b\r\n", [(250, b"a\nb")]),
    (b"250-a\r\nb without a code\r\n250 c\r\n", [(250, b"a\nb without a code\nc")]),
    (b"250-a\r\n250\r\n", [(250, b"a\n")]),
    (b"250 \xff\xfe\r\n", [(250, b"\xff\xfe")]),
    (b"250 " + b"x" * 5000 + b"\r\n", [(250, b"x" * 100)]),
    (b"250-" + b"x" * 5000 + b"\r\n250 b\r\n", [(250, b"x" * 100 + b"\nb")]),
    (b"250-x\r\n" * 50 + b"250 b\r\n", [(250, b"\n".join([b"x"] * 10))]),
    (b"\r\n", [(0, b"")]),
    (b"hello\r\n", [(0, b"hello")]),
    (b" 250 ok\r\n", [(0, b" 250 ok")]),
    (b"25 ok\r\n", [(0, b"25 ok")]),
    (b"150 ok\r\n", [(0, b"150 ok")]),
    (b"650 ok\r\n", [(0, b"650 ok")]),
    (b"2x0 ok\r\n", [(0, b"2x0 ok")]),
]


@pytest.mark.parametrize("parser_class", PARSERS)
@pytest.mark.parametrize(("data", "found"), TABLE, ids=range(len(TABLE)))
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_first_code_decides(parser_class, data, found, size):
    replies = parser_class(100, 10)
    split = [data[start : start + size] for start in range(0, len(data), size)]
    assert [reply for piece in split for reply in replies.feed(piece)] == found


@pytest.mark.parametrize("parser_class", PARSERS)
@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"250 " + b"x" * 70_000, 250),
        (b"550-" + b"x" * 70_000, 550),
        (b"250-x\r\n" * 10_000, 250),
        (b"250-x\r\n" + b"no code\r\n" * 10_000, 250),
        (b"x" * 70_000, 0),
    ],
)
def test_a_reply_without_end_has_its_code_and_ends_the_session(parser_class, data, code, size):
    replies = parser_class(100, 10)
    found = [reply for start in range(0, len(data), size) for reply in replies.feed(data[start : start + size])]
    assert [number for number, _ in found] == ([code, 0] if code else [0])
    assert all(len(text) <= 1010 for _, text in found)
    assert replies.broken
    assert replies.feed(b"250 ok\r\n") == [] == replies.end()
