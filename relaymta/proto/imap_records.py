"""The index of a mailbox, packed, as the store keeps it and sessions read it.

A *record* is 24 octets: UID, flags and MODSEQ of a message. A *block* is a run of records in the order of their UIDs; a list of
blocks is a mailbox, or a part of one. Packed UIDs take 4 octets each, ranges of them (first, last) 8, both ascending. All of it
is little-endian.
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from relaymta._speedups.records import (
    apply,
    changed,
    chosen,
    count,
    first,
    highest,
    lines,
    load,
    merged,
    pick,
    select,
    untold,
    within,
)
from relaymta._speedups.uids import cut, lower, minus, numbers, runs

__all__ = [
    "LAST_UID",
    "RECORD",
    "RECORD_SIZE",
    "apply",
    "changed",
    "chosen",
    "count",
    "cut",
    "first",
    "formatted",
    "highest",
    "joined",
    "lines",
    "load",
    "lower",
    "merged",
    "minus",
    "numbers",
    "packed",
    "pairs",
    "pick",
    "ranges_of",
    "runs",
    "select",
    "slices",
    "union",
    "untold",
    "values",
    "within",
]  # fmt: skip

LAST_UID = 0xFFFFFFFF
RECORD = struct.Struct("<IIQQ")  # UID, unused, flags, MODSEQ
RECORD_SIZE = RECORD.size
RANGE = struct.Struct("<II")  # first and last
SLICE = 4096  # records of one piece of a reply: some 200 KB


def packed(uids: Iterable[int]) -> bytes:
    """UIDs, in ascending order, packed."""
    listed = list(uids)
    return struct.pack(f"<{len(listed)}I", *listed)


def values(uids: bytes) -> "array[int]":
    """Packed UIDs or numbers."""
    return _little(array("I", uids))


def _little(numbers: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pairs(ranges: bytes) -> Iterator[tuple[int, int]]:
    """Packed ranges."""
    return struct.iter_unpack("<II", ranges)


def ranges_of(found: Iterable[tuple[int, int]]) -> bytes:
    """Ranges (first at most last, in any order, which may overlap), packed."""
    if isinstance(found, tuple) and len(found) == 1:
        return RANGE.pack(*found[0])
    ends, highest = array("I"), -1
    for low, high in sorted(found):
        if low > highest + 1 or not ends:
            ends.append(low)
            ends.append(high)
        elif high > highest:
            ends[-1] = high
        else:
            continue
        highest = high
    return _little(ends).tobytes()


def union(one: bytes, other: bytes) -> bytes:
    """The packed UIDs of both."""
    if not one or not other:
        return one or other
    return packed(sorted({*values(one), *values(other)}))


def formatted(ranges: bytes) -> bytes:
    """Packed ranges as a sequence set (RFC 9051 9): b"1:3,5"."""
    return b",".join(b"%d" % low if low == high else b"%d:%d" % (low, high) for low, high in pairs(ranges))


def joined(parts: Sequence[bytes]) -> bytes:
    """The records of all parts; of those with the same UID, that of the last part. In n log n, however many parts there are."""
    parts = [part for part in parts if part]
    ends = [values(load([part[:RECORD_SIZE], part[-RECORD_SIZE:]])) for part in parts]
    if all(before[1] < after[0] for before, after in pairwise(ends)):
        return b"".join(parts)
    while len(parts) > 1:
        parts = [merged(parts[at], b"".join(parts[at + 1 : at + 2])) for at in range(0, len(parts), 2)]
    return parts[0]


def slices(records: bytes) -> Iterator[bytes]:
    """Records in pieces whose FETCH responses are not too long for one reply."""
    size = SLICE * RECORD_SIZE
    return (records[at : at + size] for at in range(0, len(records), size))
