"""How Sieve compares strings: against regular expressions as an oracle, and what it may cost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.sieve_match import OCTETS_MOST, STEPS_MOST, Meter, Pattern, RunError, compare
from relaymta.proto.sieve_program import Match


def groups(pattern: bytes, text: bytes) -> tuple[bytes, ...] | None:
    """All of the text, and what wildcards stand for; None: no match."""
    one = Pattern(pattern)
    starts = one.match(text, Meter())
    return None if starts is None else one.groups(text, starts)


def oracle(pattern: bytes, text: bytes) -> tuple[bytes, ...] | None:
    """The same by a regular expression."""
    parts = []
    for escaped, wildcard, octet in re.findall(rb"(?s)\\(.)|([*?])|(.)", pattern):
        parts.append({b"*": b"(.*?)", b"?": b"(.)"}.get(wildcard) or re.escape(escaped or octet))
    match = re.compile(b"(?s)" + b"".join(parts) + rb"\Z").match(text)
    return None if match is None else (text, *match.groups())[:33]


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (b"[*] *", b"[acme-users] [fwd] version 1.0 is out", (b"acme-users", b"[fwd] version 1.0 is out")),  # RFC 5229 3.2
        (b"coyote@**.com", b"coyote@ACME.Example.com", (b"", b"ACME.Example")),
        (b"*pending*", b"a pending pending", (b"a ", b" pending")),
        (b"\\*\\?\\\\*", b"*?\\x", (b"x",)),
        (b"a\\", b"a\\", ()),
        (b"?*?", b"ab", (b"a", b"", b"b")),
        (b"", b"", ()),
        (b"*a?c*", b"xaacabc", (b"xa", b"c", b"abc")[:0] or (b"x", b"a", b"abc")),
    ],
)
def test_wildcards_stand_for_as_little_as_possible(pattern: bytes, text: bytes, found: tuple[bytes, ...]) -> None:
    assert groups(pattern, text) == (text, *found)


@given(st.text("ab*?\\", max_size=12), st.text("ab\\*", max_size=16))
def test_patterns_match_as_regular_expressions_do(pattern: str, text: str) -> None:
    assert groups(pattern.encode(), text.encode()) == oracle(pattern.encode(), text.encode())


@given(st.lists(st.sampled_from(["*", "?", "a", "b", "ab", "ba?"]), max_size=50), st.text("ab", max_size=60))
def test_long_patterns_match_as_regular_expressions_do(pattern: list[str], text: str) -> None:
    found = groups("".join(pattern).encode(), text.encode())
    assert (found is None) == (_naive("".join(pattern), text) is False)


def _naive(pattern: str, text: str) -> bool:
    """Whether a pattern matches, by all places in it at once."""
    places = {0}
    for character in [*text, ""]:
        for place in sorted(places):
            while pattern[place : place + 1] == "*":
                place += 1
                places.add(place)
        if character:
            places = {place for place in places if pattern[place : place + 1] == "*"} | {
                place + 1 for place in places if pattern[place : place + 1] in ("?", character)
            }
    return len(pattern) in places


@pytest.mark.parametrize(
    ("comparator", "kind", "relation", "value", "key", "expected"),
    [
        ("i;octet", "is", "", b"A", b"a", False),
        ("i;ascii-casemap", "is", "", b"A\xc3\x84", b"a\xc3\x84", True),
        ("i;ascii-casemap", "is", "", "Ä".encode(), "ä".encode(), False),
        ("i;ascii-casemap", "contains", "", b"xABy", b"ab", True),
        ("i;ascii-casemap", "value", "lt", b"_", b"a", False),  # as in upper case (RFC 4790 9.2)
        ("i;octet", "value", "lt", b"_", b"a", True),
        ("i;ascii-numeric", "is", "", b"007x", b"7", True),
        ("i;ascii-numeric", "is", "", b"x", b"y", True),  # both are infinite (RFC 4790 9.1)
        ("i;ascii-numeric", "value", "gt", b"x", b"9" * 100000, True),
        ("i;ascii-numeric", "value", "gt", b"1" + b"0" * 100000, b"9" * 100000, True),
        ("i;ascii-numeric", "value", "ge", b"10", b"9", True),
        ("i;ascii-casemap", "value", "ge", b"10", b"9", False),
        ("i;ascii-numeric", "value", "ne", b"10", b"10", False),
        ("i;ascii-numeric", "value", "le", b"0", b"00", True),
        ("i;ascii-numeric", "value", "eq", b"-1", b"-2", True),
    ],
)
def test_comparators(comparator: str, kind: str, relation: str, value: bytes, key: bytes, expected: bool) -> None:
    assert (compare(Match(kind, relation, comparator, ()), [value], [key], Meter()) is not None) is expected


def spent(run: object) -> int:
    """How many octets are counted."""
    meter = Meter()
    run(meter)  # type: ignore[operator]
    return OCTETS_MOST - meter._octets


@pytest.mark.parametrize("pattern", [b"*a*a*a*a*a*b", b"*" * 1000 + b"b", b"*aaaaaaaaab*", b"*a?a?a?b*", b"?" * 500 + b"*b"])
def test_the_time_of_a_pattern_is_linear_in_the_text(pattern: bytes) -> None:
    def counted(size: int) -> int:
        return spent(lambda meter: Pattern(pattern).match(b"a" * size, meter))

    assert counted(20000) <= 2.2 * counted(10000) + 2048


def test_a_run_may_not_cost_too_much() -> None:
    match = Match("contains", "", "i;octet", ())
    with pytest.raises(RunError, match="too much"):
        compare(match, [b"x" * 100_000] * 1000, [b"a", b"b"], Meter())
    with pytest.raises(RunError, match="too much"):
        compare(match._replace(kind="value", relation="eq"), [b""] * 1000, [b"a"] * 1000, Meter())
    with pytest.raises(RunError, match="too much"):  # what looks like the longest piece is everywhere, and never it
        compare(match._replace(kind="matches"), [b"a" * 300_000], [b"*a?a?a?b*"], Meter())
    with pytest.raises(RunError, match="too much"):  # each place costs a look at all of its pieces
        compare(match._replace(kind="matches"), [b"a" * 20_000], [b"*" + b"a?" * 2000 + b"b*"], Meter())
    with pytest.raises(RunError, match="too much"):  # patterns that are made of variables
        compare(match._replace(kind="matches"), [b""], [b"?*" * 30_000] * 20, Meter())
    meter = Meter()
    for _ in range(STEPS_MOST):
        meter.step()
    with pytest.raises(RunError, match="more than 10000 commands"):
        meter.step()
