"""What a client that comes back has missed: the QRESYNC parameter of SELECT, and VANISHED of UID FETCH (RFC 7162 3.2.5,
3.2.6)."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from relaymta.proto.imap_command import Numbers, Qresync
from relaymta.proto.imap_records import LAST_UID, chosen, formatted, pairs, ranges_of, runs
from relaymta.proto.imap_uids import Uids
from relaymta.proto.imap_view import View

__all__ = ["resync", "vanished_earlier"]

LINE_RANGES = 400  # of one response: some 8 kB at most

Ranges = Sequence[tuple[int, int]]


def resync(view: View, known: Qresync, records: bytes, expunged: Iterable[tuple[int, int]] | None) -> Iterator[bytes]:
    """The untagged responses that follow those of SELECT: VANISHED (EARLIER), then FETCH of changed flags; nothing when
    UIDVALIDITY is another one. `records`: with a MODSEQ above `known.modseq`; `expunged`: UIDs above it (first, last), in any
    order; None when the store does not remember all of them."""
    if known.uidvalidity != view.uidvalidity:
        return iter(())
    sampled = 0
    if known.numbers is not None and known.at is not None:
        sampled = _last_match(view.uids, known.numbers.ranges, known.at.ranges)
    wanted = ranges_of(known.uids.ranges if known.uids is not None else [(1, LAST_UID)])
    changed = chosen(records, wanted)
    return chain(_vanished(view, wanted, expunged, sampled), view.lines(changed, modseq=True))


def vanished_earlier(view: View, chosen: Numbers, expunged: Iterable[tuple[int, int]] | None) -> Iterator[bytes]:
    """VANISHED (EARLIER) of UID FETCH (VANISHED): those of a set of UIDs that were expunged (as of `resync`). "*" is the highest
    UID that there ever was, or what was expunged at the end would not be in `1:*`."""
    ranges = view.ranges(chosen, by_uid=True) if chosen.saved else ranges_of(chosen.resolved(view.uidnext - 1))
    return _vanished(view, ranges, expunged)


def _vanished(view: View, wanted: bytes, expunged: Iterable[tuple[int, int]] | None, sampled: int = 0) -> Iterator[bytes]:
    """When the store does not remember all that were expunged, these are all UIDs above `sampled` without a message. Messages
    that the client still has numbers for are not named: `advance` tells of them, in a VANISHED of its own (3.2.10)."""
    low, high = 1 if expunged is not None else sampled + 1, view.uidnext - 1
    gone = _both(pairs(wanted), [(low, high)] if low <= high else [])
    if expunged is not None:
        gone = _both(gone, pairs(ranges_of(expunged)))
    found = ranges_of(_without(gone, pairs(runs(view.uids.data))))
    size = 8 * LINE_RANGES
    return (b"* VANISHED (EARLIER) %s\r\n" % formatted(found[at : at + size]) for at in range(0, len(found), size))


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
    """(message number, UID, length) of runs in which both go up by one. There are as many numbers as UIDs."""
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
