"""Packed UIDs, ranges and records, as sessions handle them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.imap_records import LAST_UID, formatted, joined, packed, pairs, ranges_of, runs, slices, union, values
from tests.speedups.index import Rec, pack, pack32, unpack, unpack32

UIDS = st.lists(st.one_of(st.integers(1, 40), st.just(LAST_UID)), max_size=20, unique=True).map(sorted)
ENDS = st.integers(0, 40)


@given(found=st.lists(st.tuples(ENDS, ENDS).map(lambda ends: (min(ends), max(ends))), max_size=12))
def test_ranges_are_ascending_and_disjoint(found):
    members = {uid for low, high in found for uid in range(low, high + 1)}
    ranges = list(pairs(ranges_of(iter(found))))
    assert [uid for low, high in ranges for uid in range(low, high + 1)] == sorted(members)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(ranges))


@given(one=UIDS, other=UIDS)
def test_sets_of_uids(one, other):
    assert unpack32(union(pack32(one), pack32(other))) == sorted({*one, *other})
    assert list(values(pack32(one))) == one
    assert packed(one) == pack32(one)
    said = formatted(runs(pack32(one))).decode()
    ranges = [part.split(":") for part in said.split(",") if part]
    assert [uid for ends in ranges for uid in range(int(ends[0]), int(ends[-1]) + 1)] == one


@given(
    parts=st.lists(
        st.lists(st.builds(Rec, st.integers(1, 30), st.just(0), st.integers(1, 9)), max_size=6, unique_by=lambda one: one.uid)
    )
)
def test_parts_are_joined_and_the_last_one_counts(parts):
    both = {one.uid: one for part in parts for one in part}
    assert unpack(joined([pack(sorted(part)) for part in parts])) == sorted(both.values())


def test_slices_are_all_of_it():
    records = pack([Rec(uid, 0, uid) for uid in range(1, 10_001)])
    assert b"".join(slices(records)) == records
    assert len(list(slices(records))) == 3
    assert list(slices(b"")) == []
