"""Cost of parsers on hostile input: for each in tests/support/parsers.py the CPU time per octet of its worst input, at 1 kB and
at 128 kB, and the time of the longest call. `python -m benchmarks.hostile [NAME]` prints the table of docs/security.md; exit
status 1 when an octet costs more than twice as much at 128 kB.
"""

import sys
import time
from typing import NamedTuple

from tests.support.parsers import PARSERS, Parser

SHORT, LONG = 1024, 131_072
BETWEEN = (4000, 10_000, 16_000, 20_000)  # just below limits, where a call may take longer than at LONG
LEAST_SECONDS, REPEATS = 0.002, 5
RATIO = 2.0


class Cost(NamedTuple):
    """One parser with its worst input: nanoseconds per octet, and milliseconds of the longest call."""

    what: str
    short: float
    long: float
    call: float

    @property
    def ratio(self) -> float:
        return self.long / self.short


def seconds(parser: Parser, data: bytes) -> float:
    """CPU time of a call, the least of several."""
    return parser.seconds(data, LEAST_SECONDS, REPEATS, time.process_time)


def cost(parser: Parser, what: str) -> Cost:
    """The cost of one input."""
    short, long = parser.worst[what](SHORT), parser.worst[what](LONG)
    call = seconds(parser, long)
    held = [parser.worst[what](size) for size in BETWEEN]
    longest = max(seconds(parser, data) for data in [*held, long] if not parser.refused(data))
    return Cost(what, seconds(parser, short) / len(short) * 1e9, call / len(long) * 1e9, longest * 1e3)


def costs(parser: Parser) -> list[Cost]:
    """The cost of all inputs of a parser; a ratio that is too high is measured twice more."""
    found = []
    for what in parser.worst:
        one = cost(parser, what)
        for _ in range(2):
            if one.ratio > RATIO:
                one = min(one, cost(parser, what), key=lambda one: one.ratio)
        found.append(one)
    return found


def main() -> int:
    """Print the table; exit status 1 when a parser is not linear."""
    wrong = []
    print("| parser | reads no more than | worst input | ns an octet at 1 kB | at 128 kB | x | ms a call |")
    print("|---|---|---|---|---|---|---|")
    for parser in PARSERS:
        if len(sys.argv) > 1 and sys.argv[1] not in parser.name:
            continue
        found = costs(parser)
        wrong += [f"{parser.name}: {one.what}: {one.ratio:.1f}" for one in found if one.ratio > RATIO]
        worst = max(found, key=lambda one: one.ratio)
        longest = max(one.call for one in found)
        figures = (f"{worst.short:.1f}", f"{worst.long:.1f}", f"{worst.ratio:.2f}", f"{longest:.1f}")
        print("| " + " | ".join([f"`{parser.name}`", parser.limit or "-", worst.what, *figures]) + " |", flush=True)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
