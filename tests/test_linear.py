"""Untrusted input is parsed in linear time, whatever it is: for each parser and each of its worst inputs, the CPU time at four
times the length, with a margin so wide that only another order of growth exceeds it."""

import time

import pytest

from tests.support.parsers import PARSERS, Parser

LONG, BRIEF, TIMES = 32_768, 4000, 4  # octets: of most, and of what is a part of more
MARGIN = 2.25  # a square is at 4, what sorts at 1.2
LEAST_SECONDS, REPEATS, TRIES = 0.0005, 3, 20


def least_seconds(parser: Parser, data: bytes, repeats: int) -> float:
    """CPU time of a call: the least of several measurements, each of as many calls as the clock resolves."""
    return parser.seconds(data, LEAST_SECONDS, repeats, time.thread_time)


def growth(parser: Parser, what: str, octets: int, repeats: int = REPEATS) -> float:
    """How much more time an octet takes at TIMES the length: 1 where it is linear, TIMES where it is square. `repeats`: of the
    longer one; what disturbs it makes the growth too large, and is measured again."""
    short, long = parser.worst[what](octets // TIMES), parser.worst[what](octets)
    return (least_seconds(parser, long, repeats) / len(long)) / (least_seconds(parser, short, REPEATS) / len(short))


def least_growth(parser: Parser, what: str, octets: int) -> float:
    """The least `growth` of several measurements; the first that is within MARGIN."""
    found = [growth(parser, what, octets, 1)]
    while found[-1] > MARGIN and len(found) < TRIES:
        time.sleep(0.02)  # what shares the processor's caches at this moment is gone at another
        found.append(growth(parser, what, octets))
    return min(found)


@pytest.mark.parametrize(
    ("parser", "what"), [pytest.param(one, what, id=f"{one.name}: {what}") for one in PARSERS for what in one.worst]
)
def test_time_grows_no_faster_than_the_input(parser, what):
    for octets in sorted({BRIEF, min(LONG, parser.most or LONG)}):
        least = least_growth(parser, what, octets)
        if least > MARGIN and octets * TIMES <= (parser.most or octets * TIMES):
            # What fits into a cache, or not, is a step at one length: an octet then costs the same again at all greater ones.
            least = least_growth(parser, what, octets * TIMES)
        assert least <= MARGIN, octets


def test_a_square_would_be_seen():
    def square(data: bytes) -> int:
        return sum(data.count(b"a", start) for start in range(0, len(data), 64))

    parser = Parser("square", square, {"a": lambda n: b"a" * n})
    assert any(growth(parser, "a", LONG) > MARGIN for _ in range(4))


def test_all_of_them_are_listed(request):
    page = (request.config.rootpath / "docs" / "security.md").read_text()
    assert [one.name for one in PARSERS if f"`{one.name}`" not in page] == []
