"""A client that comes back (RFC 7162 3.2.5, 3.2.6)."""

from random import Random

import pytest

from relaymta.proto.imap_command import Qresync
from relaymta.proto.imap_records import load, pairs, ranges_of
from relaymta.proto.imap_resync import resync, vanished_earlier
from relaymta.proto.imap_uids import Shared, Uids
from relaymta.proto.imap_view import Mailbox, View
from tests.proto.imap_model import SAVED, STAR, Store, members, numbers
from tests.speedups.index import Rec, pack, pack32


def view_of(uids: list[int], uidnext: int, modseq: int = 9) -> View:
    return View(Shared(), "box", Mailbox(7, uidnext, modseq), pack32(uids), condstore=True, qresync=True)


def known_as(uidvalidity: int, modseq: int, uids=None, sample=(), matching=()) -> Qresync:
    """The parameter of SELECT, of ranges."""
    had = (numbers(sample), numbers(matching)) if sample else (None, None)
    return Qresync(uidvalidity, modseq, None if uids is None else numbers(uids), *had)


def lines(view: View, known: Qresync, records: bytes = b"", expunged=()) -> list[bytes]:
    return b"".join(resync(view, known, records, expunged)).split(b"\r\n")[:-1]


EVERY_THIRD = list(range(3, 30013, 3))  # the RFC's example
SAMPLE = ([5000, 7500, 9000, *range(9990, 10000)], [15000, 22500, 27000, *range(29970, 30000, 3)])


def test_the_example_with_matching_numbers():
    """RFC 7162 3.2.5.2: the server remembers no expunges."""
    view = view_of(EVERY_THIRD, 30013)
    without = lines(view, known_as(7, 1, [(1, 29997)]), expunged=None)
    gone = [uid for line in without for uid in members(line.removeprefix(b"* VANISHED (EARLIER) "))]
    assert gone == [uid for uid in range(1, 29998) if uid % 3]
    assert all(len(line) < 10_000 for line in without)
    sample, matching = ([(one, one) for one in part] for part in SAMPLE)
    assert lines(view, known_as(7, 1, [(1, 29997)], sample, matching), expunged=None) == []
    assert lines(view, known_as(7, 1, [(1, 30000)], sample, matching), expunged=None) == [b"* VANISHED (EARLIER) 29998:29999"]
    ranges = known_as(7, 1, [(1, 29997)], [(5000, 5000), (9990, 9999)], [(15000, 15000), (29970, 29979)])
    assert lines(view, ranges, expunged=None)[0].startswith(
        b"* VANISHED (EARLIER) 29971:29972,"
    )  # only the first of the range is right


def test_another_uidvalidity_says_nothing():
    view = view_of([1, 2], 4)
    assert lines(view, known_as(8, 1), pack([Rec(1, 1, 9)]), [(3, 3)]) == []


def test_flags_and_expunges_of_what_is_known():
    view = view_of([2, 4, 5], 8)
    records = pack([Rec(2, 1, 5), Rec(4, 0, 6), Rec(5, 1, 7)])
    assert lines(view, known_as(7, 4), records, [(6, 7), (1, 1)]) == [
        b"* VANISHED (EARLIER) 1,6:7", b"* 1 FETCH (UID 2 FLAGS (\\Seen) MODSEQ (5))", b"* 2 FETCH (UID 4 FLAGS () MODSEQ (6))",
        b"* 3 FETCH (UID 5 FLAGS (\\Seen) MODSEQ (7))",
    ]  # fmt: skip
    assert lines(view, known_as(7, 4, [(6, 3)]), records, [(6, 7), (1, 1)]) == [
        b"* VANISHED (EARLIER) 6", b"* 2 FETCH (UID 4 FLAGS () MODSEQ (6))", b"* 3 FETCH (UID 5 FLAGS (\\Seen) MODSEQ (7))",
    ]  # fmt: skip


def test_a_uid_that_was_never_used_has_not_vanished():
    assert lines(view_of([2], 3), known_as(7, 1, [(1, 0xFFFFFFFF)]), expunged=None) == [b"* VANISHED (EARLIER) 1"]
    assert lines(view_of([], 1), known_as(7, 1), expunged=None) == []


def test_what_the_client_has_a_number_for_is_not_earlier():
    """UID FETCH (CHANGEDSINCE VANISHED) while an expunge is held back: `advance` tells of it."""
    store = Store()
    for _ in range(3):
        store.deliver()
    view = view_of([1, 2, 3], 4, store.modseq)
    store.expunge([2])
    list(view.advance(store.since(view.modseq), may_expunge=False))
    for expunged in (store.gone(0), None):
        assert list(vanished_earlier(view, numbers([(1, 3)]), expunged)) == []
    assert b"".join(view.advance(store.since(view.modseq), may_expunge=True)).startswith(b"* VANISHED 2\r\n")
    for expunged in (store.gone(0), None):
        assert list(vanished_earlier(view, numbers([(1, 3)]), expunged)) == [b"* VANISHED (EARLIER) 2\r\n"]


def test_star_is_what_there_ever_was():
    """UID FETCH 1:* (CHANGEDSINCE VANISHED): what was expunged at the end has vanished, too."""
    view = view_of([2, 5], 9)
    for ranges, said in (
        ([(1, STAR)], [b"* VANISHED (EARLIER) 1,3:4,6:8\r\n"]), ([(7, STAR)], [b"* VANISHED (EARLIER) 7:8\r\n"]),
        ([(STAR, STAR)], [b"* VANISHED (EARLIER) 8\r\n"]), ([(20, STAR)], [b"* VANISHED (EARLIER) 8\r\n"]), ([(9, 20)], []),
    ):  # fmt: skip
        assert list(vanished_earlier(view, numbers(ranges), None)) == said
    view.saved = pack32([2])
    assert list(vanished_earlier(view, SAVED, None)) == []
    assert list(vanished_earlier(view_of([], 1), numbers([(1, STAR)]), None)) == []


def test_four_billion_numbers_cost_nothing():
    view = view_of(EVERY_THIRD, 30013)
    most = [(1, 0xFFFFFFFF)]
    assert len(lines(view, known_as(7, 1, most, most, most), expunged=None)) > 10  # none matches
    view = view_of(list(range(1, 1001)), 1003)
    assert lines(view, known_as(7, 1, most, most, most), expunged=None) == [b"* VANISHED (EARLIER) 1001:1002"]


def ranges_at_random(random: Random, asked: list[int]) -> list[tuple[int, int]]:
    """Numbers as ranges, some of which could be one."""
    found: list[tuple[int, int]] = []
    for number in asked:
        if found and found[-1][1] + 1 == number and random.random() < 0.7:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_samples_equal_the_oracle(seed):
    random = Random(seed)
    uids = sorted(random.sample(range(1, 30), random.randint(1, 20)))
    had = sorted({*uids, *random.sample(range(1, 30), random.randint(0, 6))}) if random.random() < 0.8 else list(range(5, 35))
    sample = sorted(random.sample(range(len(had)), random.randint(0, len(had))))
    asked, matching = [at + 1 for at in sample], [had[at] for at in sample]
    right = [uid for number, uid in zip(asked, matching, strict=True) if number <= len(uids) and uids[number - 1] == uid]
    known = known_as(7, 1, None, ranges_at_random(random, asked), ranges_at_random(random, matching))
    told = lines(view_of(uids, 40), known, expunged=None)
    said = [uid for line in told for uid in members(line.removeprefix(b"* VANISHED (EARLIER) "))]
    assert said == [uid for uid in range(max(right, default=0) + 1, 40) if uid not in uids]


@pytest.mark.parametrize("seed", range(100))
def test_equal_to_sets(seed):
    random = Random(seed)
    uids = sorted(random.sample(range(1, 40), random.randint(0, 20)))
    wanted = sorted(random.sample(range(1, 45), random.randint(1, 30)))
    view = view_of(uids, 40)
    known = known_as(7, 1, [(uid, uid) for uid in wanted])
    said = [uid for line in lines(view, known, expunged=None) for uid in members(line.removeprefix(b"* VANISHED (EARLIER) "))]
    assert said == [uid for uid in wanted if uid < 40 and uid not in uids]
    gone = [uid for uid in range(1, 40) if uid not in uids and random.random() < 0.5]
    random.shuffle(gone)
    told = lines(view, known, expunged=[(uid, uid) for uid in gone])
    said = [uid for line in told for uid in members(line.removeprefix(b"* VANISHED (EARLIER) "))]
    assert said == sorted(set(gone) & set(wanted))


def test_ranges_are_joined():
    assert list(pairs(ranges_of([(5, 7), (1, 2), (3, 3), (6, 9), (12, 12)]))) == [(1, 3), (5, 9), (12, 12)]
    assert load([]) == Uids(b"").data == b""
