"""Words of IMAP commands: dates with times, and sets of numbers against a naive reading."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.imap_command import STAR
from relaymta.proto.imap_words import Refused, Words


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("01-Jan-1970 00:00:00 +0000", 0), (" 1-jan-1970 01:30:00 +0130", 0), ("31-Dec-1969 22:00:00 -0200", 0),
        ("31-Dec-2016 23:59:60 +0000", 1483228799), ("29-Feb-2024 12:00:00 +0000", 1709208000),
        ("30-Feb-2024 12:00:00 +0000", None), ("1-Jan-2024 12:00:00 +0000", None), ("01-Jan-2024 24:00:00 +0000", None),
        ("01-Jan-2024 12:60:00 +0000", None), ("01-Jan-2024 12:00:61 +0000", None), ("01-Jan-2024 12:00:00 +0060", None),
        ("01-Foo-2024 12:00:00 +0000", None), ("01-Jan-0000 12:00:00 +0000", None), ("01-Jan-2024 12:00:00 0000", None),
    ],
)  # fmt: skip
def test_dates_with_times(text, seconds):
    words = Words(b'"', [text.encode()])
    if seconds is not None:
        assert words.date_time() == seconds
        return
    with pytest.raises(Refused, match="expected a date and time"):
        words.date_time()


RANGES = st.lists(
    st.tuples(*[st.one_of(st.integers(1, 30), st.just("*"), st.sampled_from([STAR, STAR - 1]))] * 2).map(
        lambda pair: f"{pair[0]}:{pair[1]}" if pair[0] != pair[1] else f"{pair[0]}"
    ),
    min_size=1,
    max_size=8,
)


@given(RANGES, st.integers(1, 40))
def test_a_set_has_the_numbers_that_it_names(ranges, largest):
    """Naively: each range on its own, `*` replaced."""
    found = Words(b"a", [",".join(ranges).encode()]).numbers()
    expected: set[int] = set()
    for one in ranges:
        low, _, high = one.replace("*", str(largest)).partition(":")
        low, high = sorted((int(low), int(high or low)))
        if "*" in one:  # no more than there are
            high = largest
        expected |= {n for n in (*range(1, 51), STAR - 1, STAR) if low <= n <= high}
    resolved = found.resolved(largest)
    assert found.saved is False
    assert {n for n in (*range(1, 51), STAR - 1, STAR) if any(low <= n <= high for low, high in resolved)} == expected
    assert all(low <= high for low, high in resolved)
    assert all(high + 1 < low for (_, high), (low, _) in zip(found.ranges, found.ranges[1:], strict=False))


@given(st.one_of(st.from_regex(rb"[0-9]{1,11}", fullmatch=True), st.binary(max_size=12)))
def test_one_number_is_read_as_in_a_set_of_several(value):
    """Most sets are one number, for which there is a shorter way."""

    def read(text: bytes) -> object:
        try:
            return Words(b"a", [text]).numbers(saved=False)
        except Refused:
            return None

    if not re.search(rb"[,:*]", value):
        assert read(value) == read(value + b"," + value)


@pytest.mark.parametrize("word", [b"fetch", b"x" * 40, b"a*", b"", "ß".encode(), b"a]"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_keyword_is_an_atom_whether_it_has_been_seen_before_or_not(word, times):
    for _ in range(times):
        if re.fullmatch(rb"[a-z]+", word):
            assert Words(b"a", [word]).keyword("a word") == word.decode().upper()
            continue
        with pytest.raises(Refused, match="expected a word"):
            Words(b"a", [word]).keyword("a word")


def test_a_name_is_decoded_as_the_session_says_whatever_another_has_said_of_it():
    for _ in range(2):
        assert Words(b"a", [b"Entw&APw-rfe"]).mailbox() == "Entw\u00fcrfe"
        assert Words(b"a", [b"Entw&APw-rfe"], utf8=True).mailbox() == "Entw&APw-rfe"
        with pytest.raises(Refused, match="UTF-7"):
            Words(b"a", [b"A&B"]).mailbox()
        assert Words(b"a", [b"A&B"], utf8=True).mailbox() == "A&B"
