"""Names of mailboxes as LIST sees them: INBOX in any case, and patterns, against a naive matcher."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.mailbox_list import Pattern, canonical


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inbox", "INBOX"),
        ("iNbOx/x", "INBOX/x"),
        ("inbox/Inbox", "INBOX/Inbox"),
        ("inboxes", "inboxes"),
        ("a/inbox", "a/inbox"),
        ("INBOX", "INBOX"),
        ("", ""),
        ("inbox%", "inbox%"),
        ("u\u0308", "\xfc"),
        ("\u0131nbox", "\u0131nbox"),
    ],
)
def test_inbox_in_any_case(name, expected):
    """RFC 9051 5.1 (greenmail 399)."""
    assert canonical(name) == expected == canonical(expected)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*", ["a", "a/b", "INBOX"], []),
        ("%", ["a", "INBOX"], ["a/b", "INBOX/x"]),
        ("", [""], ["a"]),
        ("inbox", ["INBOX"], ["INBOX/x"]),
        ("inbox/%", ["INBOX/x"], ["INBOX", "INBOX/x/y"]),
        ("in%", ["INBOX", "in", "int"], ["INBOX/x"]),
        ("in*X", ["INBOX", "INBOX/X"], ["INBOX/x", "inbX/x"]),
        ("iNbOx*", ["INBOX", "INBOX/x"], ["inbox2"]),
        ("%X", ["INBOX", "xX"], ["x"]),
        ("*x", ["INBOX", "a/x"], ["X"]),
        ("a*", ["a", "ab", "a/b"], ["b", "A"]),
        ("a/%", ["a/b", "a/"], ["a", "a/b/c"]),
        ("%/%", ["a/b"], ["a", "a/b/c"]),
        ("*/b", ["a/b", "a/c/b"], ["b"]),
        ("a%b*c", ["abc", "axbyc", "ab/c"], ["a/bc", "ab"]),
        ("%%", ["a"], ["a/b"]),
        ("%*%", ["a", "a/b"], []),
        ("ü%", ["ü", "üx"], ["u"]),
        ("[a]*", ["[a]b"], ["ab"]),
        ("a.c", ["a.c"], ["abc"]),
    ],
)
def test_patterns(pattern, matching, others):
    found = Pattern(pattern)
    assert [name for name in [*matching, *others] if found.matches(name)] == matching


def naive(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] in "*%":
        return naive(pattern[1:], name) or (name[:1] not in ("", "/" * (pattern[0] == "%")) and naive(pattern, name[1:]))
    return name[:1] == pattern[0] and naive(pattern[1:], name[1:])


@given(st.text("ab/*%", max_size=8), st.text("ab/", max_size=8))
def test_a_pattern_matches_what_a_naive_matcher_does(pattern, name):
    assert Pattern(pattern).matches(name) == naive(pattern, name)


def test_long_patterns():
    assert Pattern("a*" * 1000).matches("a" * 1000) and not Pattern("*a" * 1000 + "b").matches("a" * 1000)
    assert Pattern("*a" * 1000 + "*").matches("a" * 1000) and not Pattern("*a" * 1000 + "*b").matches("a" * 999 + "b")
    assert not Pattern("a%b" * 50_000).matches("a" * 1000)
    assert Pattern("*%" * 50_000).matches("a/b")
