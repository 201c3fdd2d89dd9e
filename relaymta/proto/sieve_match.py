"""How Sieve compares strings (RFC 5228 2.7, RFC 5231, comparators of RFC 4790 9), and what a run may cost.

`:matches` finds the place of each piece between two `*` once, from left to right, so that wildcards match as little as possible
(RFC 5229 3.2) and nothing is tried twice: linear in the text, or with `?` in the text times the pieces between them. All that is
compared is counted by a Meter, whatever pattern and text are.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from relaymta.proto.sieve_program import Match
from relaymta.proto.sieve_strings import MATCHES_MOST, clipped

__all__ = ["EACH", "OCTETS_MOST", "STEPS_MOST", "Meter", "Pattern", "RunError", "compare"]

STEPS_MOST: Final = 10_000  # commands and tests of a run
OCTETS_MOST: Final = 1 << 27  # that a run compares, each comparison counted as EACH more
EACH: Final = 1024
PIECE_COST: Final = 128  # octets that are compared in the time in which a piece of a pattern is compiled, or looked for

_WILDCARD = re.compile(rb"\\(?P<escaped>.)|(?P<wildcard>[*?])|(?P<octets>[^\\*?]++|\\)", re.S)
_DIGITS = re.compile(rb"[0-9]*+")
_TRUE: Final[dict[str, Callable[[Any, Any], bool]]] = {  # by kind, or by relation
    "contains": operator.contains, "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le,
    "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


class RunError(Exception):
    """A script cannot be run any further; str() says why."""


class Meter:
    """What a run has cost so far; it ends by RunError when that is too much."""

    def __init__(self) -> None:
        self._steps = STEPS_MOST
        self._octets = OCTETS_MOST

    def step(self) -> None:
        """Count a command or a test."""
        self._steps -= 1
        if self._steps < 0:
            raise RunError(f"more than {STEPS_MOST} commands and tests")

    def spend(self, octets: int) -> None:
        """Count octets that are looked at."""
        self._octets -= octets
        if self._octets < 0:
            raise RunError("too much has to be compared")


class _Piece(NamedTuple):
    """What is between two `*`. `literals`: (offset, octets) of what is not `?`; `longest`: the index of the longest of them."""

    length: int
    literals: list[tuple[int, bytes]]
    longest: int

    def at(self, text: bytes, start: int) -> bool:
        """Whether the text has it here."""
        return all(text.startswith(octets, start + offset) for offset, octets in self.literals)

    def find(self, text: bytes, start: int, end: int, meter: Meter) -> int:
        """Where the text has it first, within [start:end]; -1: nowhere."""
        if not self.literals:
            return start if start + self.length <= end else -1
        offset, octets = self.literals[self.longest]
        each = EACH + PIECE_COST * len(self.literals)
        end -= self.length - offset - len(octets)
        at = start + offset
        while True:
            found = text.find(octets, at, end) if at < end else -1
            meter.spend(each + (end if found < 0 else found) - at)
            if found < 0 or self.at(text, found - offset):
                return found - offset if found >= 0 else -1
            at = found + 1


class Pattern:
    """A pattern of `:matches`, in which `*` is any octets, `?` one, and what is behind a backslash stands for itself."""

    def __init__(self, pattern: bytes) -> None:
        self._pieces: list[_Piece] = []
        self._wildcards: list[tuple[int, int]] = []  # (piece, offset in it), of `*`: offset -1 of the piece behind it
        literals: list[tuple[int, list[bytes]]] = []
        length, joins = 0, False
        for match in _WILDCARD.finditer(pattern):
            if match["wildcard"] == b"*":
                self._add(length, literals)
                self._wildcards.append((len(self._pieces), -1))
                literals, length, joins = [], 0, False
            elif match["wildcard"]:
                self._wildcards.append((len(self._pieces), length))
                length, joins = length + 1, False
            else:
                octets = match["escaped"] or match["octets"]
                if not joins:
                    literals.append((length, []))
                literals[-1][1].append(octets)
                length, joins = length + len(octets), True
        self._add(length, literals)

    def _add(self, length: int, parts: list[tuple[int, list[bytes]]]) -> None:
        literals = [(offset, b"".join(octets)) for offset, octets in parts]
        longest = max(range(len(literals)), key=lambda place: len(literals[place][1]), default=0)
        self._pieces.append(_Piece(length, literals, longest))

    def match(self, text: bytes, meter: Meter) -> list[int] | None:
        """Where each piece is in the text, which is matched whole; None: it does not match."""
        first, last = self._pieces[0], self._pieces[-1]
        meter.spend(EACH)
        tail = len(text) - last.length
        if len(self._pieces) == 1:
            return [0] if not tail and first.at(text, 0) else None
        if tail < first.length or not first.at(text, 0) or not last.at(text, tail):
            return None
        starts, at = [0], first.length
        for piece in self._pieces[1:-1]:
            found = piece.find(text, at, tail, meter)
            if found < 0:
                return None
            starts.append(found)
            at = found + piece.length
        return [*starts, tail]

    def groups(self, text: bytes, starts: list[int]) -> tuple[bytes, ...]:
        """All of the text, and what each wildcard stands for; MATCHES_MOST of them, each clipped."""
        found = [clipped(text)]
        for number, offset in self._wildcards[:MATCHES_MOST]:
            start = starts[number] + offset
            if offset < 0:
                before = number - 1
                found.append(clipped(text[starts[before] + self._pieces[before].length : starts[number]]))
            else:
                found.append(text[start : start + 1])
        return tuple(found)


def _numeric(text: bytes) -> tuple[bool, int, bytes]:
    """The order of i;ascii-numeric (RFC 4790 9.1): the number that the text begins with; infinity without one."""
    match = _DIGITS.match(text)
    digits = match[0] if match is not None else b""
    if not digits:
        return True, 0, b""
    digits = digits.lstrip(b"0")
    return False, len(digits), digits


_FOLDED: Final[dict[str, Callable[[bytes], Any]]] = {
    "i;octet": lambda text: text, "i;ascii-casemap": bytes.upper, "i;ascii-numeric": _numeric
}  # fmt: skip


def compare(match: Match, values: Iterable[bytes], keys: Sequence[bytes], meter: Meter) -> tuple[bytes, ...] | None:
    """Whether one of the values matches one of the keys: None if not; for `:matches` what the match variables are, else ()."""
    fold: Callable[[bytes], Any] = _FOLDED[match.comparator]
    if match.kind == "matches":
        return _wildcards(values, [_compiled(fold(key), meter) for key in keys], fold, meter)
    folded = [fold(key) for key in keys]
    if match.kind == "is":
        return _equal(values, frozenset(folded), fold, meter)
    related = _TRUE[match.relation or match.kind]
    every = match.kind == "contains"
    for value in values:
        meter.spend(EACH + len(value))
        form = fold(value)
        for key in folded:
            meter.spend(EACH + len(value) * every)
            if related(form, key):
                return ()
    return None


def _compiled(key: bytes, meter: Meter) -> Pattern:
    meter.spend(EACH + PIECE_COST * (key.count(b"*") + key.count(b"?") + key.count(b"\\")))
    return Pattern(key)


def _equal(values: Iterable[bytes], keys: frozenset[Any], fold: Callable[[bytes], Any], meter: Meter) -> tuple[bytes, ...] | None:
    for value in values:
        meter.spend(EACH + len(value))
        if fold(value) in keys:
            return ()
    return None


def _wildcards(
    values: Iterable[bytes], patterns: list[Pattern], fold: Callable[[bytes], bytes], meter: Meter
) -> tuple[bytes, ...] | None:
    for value in values:
        meter.spend(EACH + len(value))
        form = fold(value)
        for pattern in patterns:
            starts = pattern.match(form, meter)
            if starts is not None:
                return pattern.groups(value, starts)
    return None
