"""The kernels of a mailbox's index: equal to their oracle, compiled and interpreted."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta._speedups import records, uids
from tests.speedups import index
from tests.speedups.index import Rec
from tests.speedups.test_smtp import interpreted_twin

FORMS = [
    pytest.param((records, uids), id="compiled"),
    pytest.param((interpreted_twin("records"), interpreted_twin("uids")), id="interpreted"),
]
LAST = 0xFFFFFFFF
UIDS = st.one_of(st.integers(1, 40), st.integers(1, LAST), st.just(LAST))
FLAGS = st.one_of(st.integers(0, 63), st.sampled_from([1 << 63, (1 << 64) - 1]))
MODSEQS = st.one_of(st.integers(1, 30), st.just((1 << 63) - 1))
RECORDS = st.lists(st.builds(Rec, UIDS, FLAGS, MODSEQS), max_size=30, unique_by=lambda one: one.uid).map(sorted)
SETS = st.lists(UIDS, max_size=30, unique=True).map(sorted)
NAMES = [b"\\Seen", b"\\Answered", b"\\Flagged", b"\\Deleted", b"\\Draft", b"$Junk"]


def ranges_of(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending, disjoint ranges, whose ends are these numbers."""
    return list(zip(numbers[::2], numbers[1::2], strict=False))


def blocks_of(found: list[Rec], size: int) -> list[bytes]:
    return [index.pack(found[at : at + size]) for at in range(0, len(found), size)]


@pytest.mark.parametrize("form", FORMS)
@given(found=RECORDS, size=st.integers(1, 9), every=FLAGS, none=FLAGS, modseq=MODSEQS)
def test_blocks_equal_the_oracle(form, found, size, every, none, modseq):
    kernel, _ = form
    blocks = blocks_of(found, size)
    matching = [one.uid for one in found if one.flags & every == every and not one.flags & none]
    assert kernel.load(blocks) == index.pack32([one.uid for one in found])
    assert kernel.count(blocks, every, none) == len(matching)
    assert kernel.first(blocks, every, none) == (matching[0] if matching else 0)
    assert kernel.changed(blocks, modseq) == index.pack([one for one in found if one.modseq > modseq])
    assert kernel.highest(index.pack(found)) == max([one.modseq for one in found], default=0)


@pytest.mark.parametrize("form", FORMS)
@given(found=RECORDS, every=FLAGS, some=FLAGS, none=FLAGS, modseq=MODSEQS, ends=SETS)
def test_bitmaps_equal_the_oracle(form, found, every, some, none, modseq, ends):
    kernel, _ = form
    packed, ranges = index.pack(found), ranges_of(ends)
    wanted = [
        one.flags & every == every and not one.flags & none and (not some or bool(one.flags & some)) and one.modseq >= modseq
        for one in found
    ]
    bitmap = kernel.select(packed, every, some, none, modseq)
    assert (index.bits(bitmap, len(found)), bitmap) == (wanted, index.bitmap(wanted))
    inside = [any(first <= one.uid <= last for first, last in ranges) for one in found]
    packed_ranges = index.pack32([end for pair in ranges for end in pair])
    assert kernel.within(packed, packed_ranges) == index.bitmap(inside)
    assert kernel.chosen(packed, packed_ranges) == index.pack([one for one, bit in zip(found, inside, strict=True) if bit])
    assert kernel.chosen(packed + b"rest", packed_ranges) == kernel.chosen(packed, packed_ranges)
    assert kernel.pick(packed, bitmap) == index.pack([one for one, bit in zip(found, wanted, strict=True) if bit])


@pytest.mark.parametrize("form", FORMS)
@given(found=RECORDS, changes=RECORDS)
def test_two_runs_of_records_equal_the_oracle(form, found, changes):
    kernel, _ = form
    both = {one.uid: one for one in [*found, *changes]}
    assert kernel.merged(index.pack(found), index.pack(changes)) == index.pack(sorted(both.values()))
    told = {(one.uid, one.modseq) for one in changes}
    assert kernel.untold(index.pack(found), index.pack(changes)) == index.pack(
        [one for one in found if (one.uid, one.modseq) not in told]
    )


@pytest.mark.parametrize("form", FORMS)
@given(found=RECORDS, keep=FLAGS, add=FLAGS, modseq=MODSEQS)
def test_flags_that_are_stored_equal_the_oracle(form, found, keep, add, modseq):
    kernel, _ = form
    after = []
    for one in found:
        flags = one.flags & keep | add
        after.append(one if flags == one.flags else Rec(one.uid, flags, modseq))
    assert kernel.apply(index.pack(found), keep, add, modseq) == index.pack(after)
    assert kernel.apply(index.pack(found) + b"cut", keep, add, modseq) == index.pack(after)


@pytest.mark.parametrize("form", FORMS)
@given(
    found=RECORDS,
    more=SETS,
    names=st.integers(0, 6),
    recent=UIDS,
    until=st.one_of(UIDS, st.just(LAST + 1)),
    items=st.integers(0, 3),
)
def test_fetch_lines_equal_the_oracle(form, found, more, names, recent, until, items):
    kernel, _ = form
    numbered = sorted({*more, *[one.uid for one in found if one.flags & 3]})
    lines = kernel.lines(index.pack(found), index.pack32(numbered), NAMES[:names], recent, until, items)
    assert lines == index.lines(found, numbered, NAMES[:names], recent, until, items)


@pytest.mark.parametrize("form", FORMS)
@given(one=SETS, other=SETS, uid=UIDS)
def test_uids_equal_the_oracle(form, one, other, uid):
    _, kernel = form
    packed, ranges = index.pack32(one), ranges_of(other)
    assert kernel.lower(packed, uid) == len([here for here in one if here < uid])
    inside = [here for here in one if any(first <= here <= last for first, last in ranges)]
    assert kernel.cut(packed, index.pack32([end for pair in ranges for end in pair])) == index.pack32(inside)
    assert kernel.minus(packed, index.pack32(other)) == index.pack32([here for here in one if here not in other])
    found = [one.index(here) + 1 for here in other if here in one]
    assert kernel.numbers(packed, index.pack32(other)) == index.pack32(found)
    assert kernel.runs(packed) == index.pack32([end for pair in index.runs(one) for end in pair])


@pytest.mark.parametrize("form", FORMS)
def test_a_last_record_that_is_cut_is_ignored(form):
    kernel, numbers = form
    packed = index.pack([Rec(1, 1, 1), Rec(2, 0, 2)])
    assert kernel.load([packed[:40]]) == index.pack32([1])
    assert kernel.count([packed[:40]], 0, 0) == 1
    assert kernel.changed([packed[:40]], 0) == packed[:24]
    assert kernel.lines(packed[:40], index.pack32([1, 2]), [], LAST, LAST, 2) == b"* 1 FETCH (UID 1 MODSEQ (1))\r\n"
    assert numbers.runs(index.pack32([1, 2])[:7]) == index.pack32([1, 1])


def test_a_long_list_of_flags_fits():
    names = [b"$" + b"k" * 200] * 64
    found = [Rec(uid, (1 << 64) - 1, (1 << 63) - 1) for uid in range(LAST - 99, LAST + 1)]
    numbered = [one.uid for one in found]
    lines = records.lines(index.pack(found), index.pack32(numbered), names, 1, LAST, 3)
    assert lines == index.lines(found, numbered, names, 1, LAST, 3)


def best_of(call, repeats: int = 5) -> float:
    """The least CPU time of a call, in ms."""
    took = []
    for _ in range(repeats):
        began = time.thread_time()
        call()
        took.append(time.thread_time() - began)
    return min(took) * 1000


def test_a_mailbox_of_100_000_is_fast():
    found = [Rec(uid, uid % 3 and 1, uid) for uid in range(1, 100_001)]
    blocks = blocks_of(found, 80)
    whole, numbered = b"".join(blocks), records.load(blocks)
    slices = [whole[at : at + 24 * 4096] for at in range(0, len(whole), 24 * 4096)]
    assert best_of(lambda: records.load(blocks)) < 10  # 0.3
    assert best_of(lambda: records.changed(blocks, 100_000)) < 5  # 0.2
    assert best_of(lambda: [records.lines(part, numbered, NAMES, LAST, LAST, 1) for part in slices]) < 50  # 3 to 5
