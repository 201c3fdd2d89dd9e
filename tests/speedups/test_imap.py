"""The parser of IMAP commands: equal to its oracle and to its interpreted twin, for any split of any input."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta._speedups import imap as compiled
from tests.speedups import imap_oracle as oracle
from tests.speedups.test_smtp import interpreted_twin, pieces

BARE, CONTROL, QUOTED, BRACE, NESTED = 2, 3, 4, 5, 6
LIMIT = 120
PARSERS = [pytest.param(compiled.Parser, id="compiled"), pytest.param(interpreted_twin("imap").Parser, id="interpreted")]
WIRE = st.lists(
    st.sampled_from(
        [b"a", b" ", b"(", b")", b'"', b"\\", b"\r", b"\n", b"\r\n", b"\0", b"\xe9", b"{", b"}", b"{3}\r\n", b"{0}\r\n",
         b"~{2+}\r\n", b"{4+}\r\n", b"{120+}\r\n", b"{1048577+}\r\n", b"{1234567890123456789+}\r\n", b"a APPEND x ", b"a NONE ",
         b"abc", b"x" * 30, b'"a\\"b\\\\"', b"a FETCH 1 (FLAGS)\r\n", b"((((((((((", b"\x7f", b"\t"]
    ),
    max_size=30,
).map(b"".join)  # fmt: skip
CUTS = st.lists(st.integers(0, 600), max_size=8)


def run(parser_class: type, wire: bytes, cuts: list[int], limit: int = LIMIT) -> list[tuple]:
    """All events; pieces of a literal that is streamed are joined, as is why a command is BAD where the oracle does not say."""
    parser = parser_class(limit, 100)
    found: list[tuple] = []
    for piece in pieces(wire, cuts):
        parser.keep(piece)
        while (event := parser.event()) is not None:
            found.append(event)
            if event[0] == oracle.LITERAL:
                found[-1] = (*event[:5], tuple(event[5]))
                getattr(parser, oracle.answer(event[4], event[5], parser.fits()))()
            elif event[0] == oracle.COMMAND:
                found[-1] = (*event[:2], tuple(event[2]))
            elif event[0] == oracle.BAD and event[1] in (BARE, CONTROL, QUOTED, BRACE, NESTED):
                found[-1] = (oracle.BAD, oracle.WRONG, event[2])
            elif event[0] == oracle.PIECE and found[-2][0] == oracle.PIECE:
                found[-2:] = [(oracle.PIECE, found[-2][1] + event[1])]
    return found


@pytest.mark.parametrize("parser_class", PARSERS)
@given(wire=WIRE, cuts=CUTS)
@example(wire=b"a APPEND x {3}\r\nabc {2+}\r\nde\r\n", cuts=[17, 18])
@example(wire=b"x" * 200 + b"{4+}\r\na\r\nb\r\na\r\n", cuts=[150, 203, 205, 206])
@example(wire=b"a NONE {4+}\r\nabcd x {3}\r\na b\r\n", cuts=[])
@example(wire=b"a" * 40 + b"{1234567890123456789+}\r\na\r\n", cuts=[])
def test_any_split_gives_what_the_oracle_says(parser_class, wire, cuts):
    assert run(parser_class, wire, cuts) == oracle.events(wire, LIMIT)
    assert run(parser_class, wire, list(range(len(wire)))) == oracle.events(wire, LIMIT)


@pytest.mark.parametrize("parser_class", PARSERS)
@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"a \n", BARE), (b"a \rb", BARE), (b'a "\n"', BARE), (b"a \0", CONTROL), (b"a b\x7f", CONTROL), (b"a\tb", CONTROL),
        (b'a "\0"', CONTROL), (b'a "b', QUOTED), (b'a "b\\', QUOTED), (b'a "\\b"', QUOTED), (b"a b{", BRACE), (b"a {x}", BRACE),
        (b"a {}", BRACE), (b"a {3-}", BRACE), (b"a {3} ", BRACE), (b"a " + b"(" * 21, NESTED), (b"x" * LIMIT, oracle.TOO_LONG),
        (b"a {1234567890123456789}", BRACE),
    ],
)  # fmt: skip
def test_why_a_command_is_none(parser_class, line, why):
    parser = parser_class(LIMIT, 100)
    parser.keep(line + b"\r\nb\r\n")
    assert parser.event() == (oracle.BAD, why, line[:80])
    assert parser.event() == (oracle.COMMAND, b"a", [b"b"])
    assert parser.event() is None and parser.waiting() == 0


@pytest.mark.parametrize("parser_class", PARSERS)
def test_lines_that_are_no_commands(parser_class):
    parser = parser_class(LIMIT, 100)
    for line, event in (
        (b"abc {3}", (5, b"abc {3}")), (b"", (5, b"")), (b"a\nb", (1, BARE, b"")), (b"x" * 98, (5, b"x" * 98)),
        (b"x" * 99, (1, oracle.TOO_LONG, b"")), (b"x" * 1000, (1, oracle.TOO_LONG, b"")),
    ):  # fmt: skip
        for step in (1, 2000):
            parser.line()
            wire = line + b"\r\n"
            found = []
            for at in range(0, len(wire), step):
                parser.keep(wire[at : at + step])
                found.append(parser.event())
            assert found[-1] == event and set(found[:-1]) <= {None}
    parser.keep(b"a\r\n")
    assert parser.event() == (oracle.COMMAND, b"a", [b"a"])


@pytest.mark.parametrize("parser_class", PARSERS)
def test_a_refusal_within_a_message_and_behind_it(parser_class):
    parser = parser_class(LIMIT, 100)
    for sent in (b"a APPEND x {5+}\r\nab", b"a APPEND x {2+}\r\nab"):
        parser.keep(sent)
        assert parser.event()[0] == oracle.LITERAL
        parser.stream()
        assert parser.event() == (oracle.PIECE, b"ab")
        if sent.endswith(b"{2+}\r\nab"):
            assert parser.event() == (oracle.END,)
        parser.refuse()
        assert parser.event() is None
        parser.keep((b"cde" if b"{5" in sent else b"") + b" {3+}\r\nabc\r\nb\r\n")
        assert parser.event() == (oracle.BAD, oracle.REFUSED, sent[:-4])
        assert parser.event() == (oracle.COMMAND, b"a", [b"b"])


@pytest.mark.parametrize("parser_class", PARSERS)
def test_nothing_is_parsed_behind_a_literal_that_is_endless(parser_class):
    parser = parser_class(LIMIT, 100)
    parser.keep(b"a {9999999+}\r\n")
    parser.event()
    parser.refuse()
    assert parser.event() == (oracle.BAD, oracle.ENDLESS, b"a {9999999+}")
    parser.keep(b"x" * 100_000)
    assert parser.event() is None and parser.waiting() == 0
