"""The SMTP parser: equal to its oracle and to its interpreted twin, for any split of any input."""

import importlib.util
from importlib.machinery import SourceFileLoader
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import relaymta._speedups as speedups
from relaymta._speedups import smtp as compiled
from tests.speedups import oracle

COMMAND, BAD, DATA, END = 0, 1, 2, 3
FOREIGN = 4
BARE_LF, BARE_CR, NUL, EIGHT_BIT, LONG_LINE = 1, 2, 4, 8, 16


def interpreted_twin(name: str) -> ModuleType:
    """A kernel's source, run by the interpreter."""
    path = Path(speedups.__file__).parent / f"{name}.py"
    loader = SourceFileLoader(f"{name}_interpreted", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


PARSERS = [pytest.param(compiled.Parser, id="compiled"), pytest.param(interpreted_twin("smtp").Parser, id="interpreted")]
WIRE = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"..", b"a", b"\0", b"\xe9", b"\r\n.\r\n", b"\r\n..", b"x" * 30, b"\n.\r\n"]),
    max_size=40,
).map(b"".join)
CUTS = st.lists(st.integers(0, 600), max_size=8)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c for c in cuts if c < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def data_run(parser_class: type, wire: bytes, cuts: list[int], normalize: bool = False) -> tuple[bytes, bool, int, int, int]:
    parser = parser_class(512, 20, normalize)
    parser.data()
    message, ended = b"", False
    for piece in pieces(wire, cuts):
        for event in parser.feed(piece):
            if event[0] == DATA:
                message += event[1]
            else:
                ended = True
    return message, ended, parser.size, parser.flags, parser.waiting()


def command_run(parser_class: type, data: bytes, cuts: list[int], limit: int = 40) -> list[tuple]:
    parser = parser_class(limit, 998, False)
    parser.commands()
    events = []
    for piece in pieces(data, cuts):
        found = parser.feed(piece)
        while True:
            events += found
            if found and found[-1][:2] == (BAD, FOREIGN):
                return events
            if parser.mode == 0:
                parser.commands()
            if not parser.runnable():
                break
            found = parser.feed(b"")
            if not found:
                break
    return events


@pytest.mark.parametrize("parser_class", PARSERS)
@given(wire=WIRE, cuts=CUTS)
@example(wire=b".\r\nQUIT\r\n", cuts=[1, 2])
@example(wire=b"a\r\n.\r\r\n.\r\n", cuts=[4, 5])
@example(wire=b"..\r\n.\r\n", cuts=[])
def test_message_data_equals_the_oracle_in_any_split(parser_class, wire, cuts):
    message, ended, size, flags, waiting = data_run(parser_class, wire, cuts)
    expected = oracle.unstuff(wire)
    assert ended == (expected is not None)
    if expected is not None:
        assert message == expected[0]
        assert waiting == len(expected[1])
        lf, cr = oracle.bare(message)
        assert bool(flags & BARE_LF) == lf
        assert bool(flags & BARE_CR) == cr
        assert bool(flags & NUL) == (b"\0" in message)
        assert bool(flags & EIGHT_BIT) == (b"\xe9" in message)
    assert size == len(message)
    assert (message, ended, size, flags, waiting) == data_run(parser_class, wire, [])


@pytest.mark.parametrize("parser_class", PARSERS)
@given(wire=WIRE, cuts=CUTS)
def test_normalized_message_data_has_no_bare_cr_or_lf(parser_class, wire, cuts):
    message, ended, _, _, _ = data_run(parser_class, wire, cuts, normalize=True)
    expected = oracle.unstuff(wire)
    assert ended == (expected is not None)
    if expected is not None:
        assert message == oracle.normalize(expected[0])
        assert oracle.bare(message) == (False, False)


@pytest.mark.parametrize("parser_class", PARSERS)
@given(
    data=st.lists(
        st.sampled_from(
            [
                b"EHLO x\r\n",
                b"mail FROM:<a@b>\r\n",
                b"DATA\r\n",
                b"NOOP\r",
                b"\n",
                b"\r\n",
                b"a" * 45,
                b"QUIT\r\n",
                b"\0\r\n",
                b"NOOP x HTTP/1.1\r\n",
                b"a HTTP/1.1",
                b"\x16\x03",
            ]
        ),
        max_size=12,
    ).map(b"".join),
    cuts=CUTS,
)
def test_commands_do_not_depend_on_the_split(parser_class, data, cuts):
    events = command_run(parser_class, data, cuts)
    assert events == command_run(parser_class, data, list(range(len(data))))
    lines = oracle.commands_of(data, 40)
    assert len(events) == len(lines)
    for event, line in zip(events, lines, strict=True):
        if event[:2] == (BAD, FOREIGN):
            assert line is lines[-1] and (not line[:1].isalpha() or b" HTTP/" in line)
        elif event[0] == BAD:
            assert len(line) + 2 > 40 or b"\r" in line or b"\n" in line or b"\0" in line
            assert event[2] == line[:32]
        elif event[1]:
            assert line[:4].upper() == event[1].to_bytes(4, "big")
            assert event[2] == line[5:]
        else:
            assert event[2] == line


@pytest.mark.parametrize("parser_class", PARSERS)
@given(data=WIRE, cuts=CUTS, octets=st.integers(0, 300))
def test_chunks_are_passed_unchanged(parser_class, data, cuts, octets):
    parser = parser_class(512, 998, False)
    parser.chunk(octets, True)
    message, ended = b"", parser.runnable() and parser.feed(b"") == [(END,)]
    for piece in pieces(data, cuts):
        for event in parser.feed(piece):
            if event[0] == DATA:
                message += event[1]
            else:
                ended = True
    assert message == data[:octets]
    assert ended == (len(data) >= octets)
    lf, cr = oracle.bare(message[:-1] if message.endswith(b"\r") else message)
    assert bool(parser.flags & BARE_LF) == lf
    assert bool(parser.flags & BARE_CR) == cr


@pytest.mark.parametrize("parser_class", PARSERS)
def test_data_holds_the_parser(parser_class):
    parser = parser_class(512, 998, False)
    parser.commands()
    events = parser.feed(b"DATA\r\nsubject: x\r\n.\r\n")
    assert [e[0] for e in events] == [COMMAND]
    assert parser.waiting() == 15
    parser.data()
    assert parser.feed(b"") == [(DATA, b"subject: x\r\n"), (END,)]


@pytest.mark.parametrize("parser_class", PARSERS)
@given(data=WIRE, cuts=CUTS)
@example(data=b"dGVz\r\nQUIT\r\n", cuts=[2])
@example(data=b"\r\nQUIT\r\n", cuts=[])
def test_a_raw_line_is_passed_unchanged_and_holds(parser_class, data, cuts):
    parser = parser_class(40, 998, False)
    parser.line()
    events = [event for piece in pieces(data, cuts) for event in parser.feed(piece)]
    lines, _ = oracle.lines_of(data)
    if not lines:
        assert events == []
        return
    (event,) = events
    if len(lines[0]) + 2 > 40 or any(octet in lines[0] for octet in b"\r\n\0"):
        assert event[0] == BAD
    else:
        assert event == (COMMAND, 0, lines[0])
    assert parser.mode == 0
    parser.commands()
    assert parser.feed(b"NOOP\r\n") or parser.mode == 1  # what is behind it are commands again


@pytest.mark.parametrize("parser_class", PARSERS)
def test_an_endless_command_takes_no_memory(parser_class):
    parser = parser_class(512, 998, False)
    parser.commands()
    for _ in range(1000):
        assert parser.feed(b"x" * 1000) == []
        assert parser.waiting() <= 1
    assert parser.feed(b"\r\nNOOP\r\n")[0] == (BAD, 1, b"x" * 32)


@pytest.mark.parametrize("parser_class", PARSERS)
@pytest.mark.parametrize(("length", "long"), [(998, False), (999, True)])
def test_long_lines_are_noted(parser_class, length, long):
    for cuts in ([], [500], [length - 1, length], [length + 1]):
        parser = parser_class(512, 998, False)
        parser.data()
        for piece in pieces(b"y" * length + b"\r\n.\r\n", cuts):
            parser.feed(piece)
        assert bool(parser.flags & LONG_LINE) == long
