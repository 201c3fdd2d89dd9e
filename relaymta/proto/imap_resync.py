"""What a client that comes back has missed: the QRESYNC parameter of SELECT, and VANISHED of UID FETCH (RFC 7162 3.2.5,
3.2.6)."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from relaymta.proto.imap_records import LAST_UID, formatted, pairs, pick, ranges_of, runs, within
from relaymta.proto.imap_uids import Ranges, Uids
from relaymta.proto.imap_view import View

__all__ = ["Known", "Mismatched", "resync", "vanished_earlier"]

LINE_RANGES = 400  # of one response: some 8 kB at most


class Mismatched(ValueError):
    """Message numbers and UIDs of the sequence match data are not as many, or not in ascending order: BAD."""


class Known(NamedTuple):
    """The QRESYNC parameter of SELECT or EXAMINE: what the client knew. `uids`: of which it wants to hear (None: of all);
    `numbers` and `matching`: message numbers and the UIDs that they had. None of them has "*"."""

    uidvalidity: int
    modseq: int
    uids: Ranges | None = None
    numbers: Ranges = ()
    matching: Ranges = ()


def resync(view: View, known: Known, records: bytes, expunged: Iterable[tuple[int, int]] | None) -> Iterator[bytes]:
    """The untagged responses that follow those of SELECT: VANISHED (EARLIER), then FETCH of changed flags; nothing when
    UIDVALIDITY is another one. `records`: with a MODSEQ above `known.modseq`; `expunged`: UIDs above it (first, last), in any
    order; None when the store does not remember all of them. Mismatched."""
    sampled = _last_match(view.uids, known.numbers, known.matching)
    if known.uidvalidity != view.uidvalidity:
        return iter(())
    wanted = ranges_of(_sorted(known.uids if known.uids is not None else [(1, LAST_UID)]))
    changed = pick(records, within(records, wanted))
    return chain(vanished_earlier(view, wanted, expunged, sampled), view.lines(changed, modseq=True))


def vanished_earlier(view: View, wanted: bytes, expunged: Iterable[tuple[int, int]] | None, sampled: int = 0) -> Iterator[bytes]:
    """VANISHED (EARLIER) of those UIDs of packed ranges that were expunged, as of `resync`. When the store does not remember all
    that were, these are all UIDs above `sampled` without a message. Messages that the client still has numbers for are not named:
    `advance` tells of them, in a VANISHED of its own (3.2.10)."""
    low, high = 1 if expunged is not None else sampled + 1, view.uidnext - 1
    gone = _both(pairs(wanted), [(low, high)] if low <= high else [])
    if expunged is not None:
        gone = _both(gone, pairs(ranges_of(expunged)))
    found = ranges_of(_without(gone, pairs(runs(view.uids.data))))
    size = 8 * LINE_RANGES
    return (b"* VANISHED (EARLIER) %s\r\n" % formatted(found[at : at + size]) for at in range(0, len(found), size))


def _sorted(ranges: Ranges) -> Iterator[tuple[int, int]]:
    return ((min(pair), max(pair)) for pair in ranges)


def _both(one: Iterable[tuple[int, int]], other: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is in ranges of both; each is ascending and disjoint."""
    rest = iter(other)
    second = next(rest, None)
    for low, high in one:
        while second is not None and second[0] <= high:
            if second[1] >= low:
                yield max(low, second[0]), min(high, second[1])
            if second[1] > high:
                break
            second = next(rest, None)


def _without(one: Iterable[tuple[int, int]], other: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is in ranges of the first and not of the second; each is ascending and disjoint."""
    rest = iter(other)
    second = next(rest, None)
    for first, high in one:
        low = first
        while second is not None and second[0] <= high:
            if second[0] > low:
                yield low, second[0] - 1
            low = max(low, second[1] + 1)
            if second[1] > high:
                break
            second = next(rest, None)
        if low <= high:
            yield low, high


def _last_match(uids: Uids, numbers: Ranges, matching: Ranges) -> int:
    """The highest UID of the sequence match data that has the number that is said; 0: none has. All expunges below it are known
    to the client (3.2.5.2). Ranges are never expanded: a client may name four billion numbers."""
    found = 0
    for number, uid, length in _aligned(numbers, matching):
        length = min(length, len(uids) - number + 1)
        if length < 1:
            continue
        ahead = bisect_right(range(length), 0, key=lambda at: uids.uid(number + at) - (uid + at))
        if ahead and uids.uid(number + ahead - 1) == uid + ahead - 1:
            found = uid + ahead - 1
    return found


def _aligned(numbers: Ranges, matching: Ranges) -> Iterator[tuple[int, int, int]]:
    """(message number, UID, length) of runs in which both go up by one."""
    for ranges in (numbers, matching):
        ends = [end for low, high in ranges for end in (low - 1, high)]
        if ends != sorted(ends):
            raise Mismatched("not in ascending order")
    if sum(high - low + 1 for low, high in numbers) != sum(high - low + 1 for low, high in matching):
        raise Mismatched("not as many message numbers as UIDs")
    return _runs(list(numbers), list(matching))


def _runs(numbers: list[tuple[int, int]], matching: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    at = other = skipped = passed = 0
    while at < len(numbers):
        number, uid = numbers[at][0] + skipped, matching[other][0] + passed
        length = min(numbers[at][1] - number, matching[other][1] - uid) + 1
        yield number, uid, length
        skipped, passed = skipped + length, passed + length
        if number + length > numbers[at][1]:
            at, skipped = at + 1, 0
        if uid + length > matching[other][1]:
            other, passed = other + 1, 0
