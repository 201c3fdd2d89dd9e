"""The table of greylisting: what one process finds in it, what several that are stopped or killed do to each other, its file."""

import mmap
import multiprocessing
import os
import signal
import struct
import time
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta import node
from relaymta._speedups.cells import Cells
from relaymta._speedups.pairs import Pairs
from relaymta.node import keep_table, kept_table
from relaymta.shm import Shared
from relaymta.triplets import PROBES, ROWS, Triplets
from tests.conftest import PROVE
from tests.support.prove import in_prove
from tests.test_shm_interleaved import FOREVER, WORKERS, Crew, Steps, schedules

SECRET = b"s" * 32
OLD = 100  # seconds after which a triplet is stale here
TIMES = st.integers(0, (1 << 32) - 1)


def stale(first: int, last: int, wall: int) -> bool:
    return last < wall - OLD


def never(first: int, last: int, wall: int) -> bool:
    return False


def pairs(rows: int) -> Pairs:
    return Pairs(mmap.mmap(-1, 16 * (rows + 1)), 0, rows)


def table(rows: int = 64, when=never, secret: bytes = SECRET) -> Triplets:
    return Triplets(pairs(rows), secret, when)


# One process


def test_a_triplet_is_found_as_it_was_put():
    triplets = table()
    key = triplets.key("192.0.2.0/24", "a@b.example", "c@d.example")
    assert triplets.get(key) == (0, 0)
    assert triplets.put(key, (0, 0), (5, 5)) and triplets.get(key) == (5, 5)
    assert not triplets.put(key, (0, 0), (6, 6)), "another worker has put it meanwhile"
    assert not triplets.put(key, (5, 4), (5, 9)), "another worker has changed it meanwhile"
    assert triplets.put(key, (5, 5), (5, 9)) and triplets.get(key) == (5, 9)
    assert not triplets.put(triplets.key("x"), (5, 9), (5, 10)) and triplets.get(triplets.key("x")) == (0, 0)
    assert triplets.rows_used() == 1 and triplets.evicted == 0


@given(TIMES, TIMES)
def test_times_have_32_bits(first, last):
    triplets = table(8)
    if first or last:
        assert triplets.put(1, (0, 0), (first, last)) and triplets.get(1) == (first, last)
        assert triplets.put(1, (first, last), (last, first)) and triplets.get(1) == (last, first)


@pytest.mark.parametrize("times", [(0, 0), (-1, 5), (5, -1), (1 << 32, 5), (5, 1 << 32)])
def test_other_times_are_not_put(times):
    triplets = table(8)
    with pytest.raises(ValueError, match="time"):
        triplets.put(1, (0, 0), times)
    assert triplets.put(1, (0, 0), (5, 5))
    with pytest.raises(ValueError, match="time"):
        triplets.put(1, (5, 5), times)
    assert triplets.get(1) == (5, 5) and triplets.rows_used() == 1


texts = st.lists(st.text(st.characters(exclude_categories=())), max_size=4)


@given(texts, texts)
def test_a_key_is_that_of_its_parts_alone(one, other):
    triplets = table(1)
    assert 0 < triplets.key(*one) < 1 << 63
    assert (triplets.key(*one) == triplets.key(*other)) == (one == other)
    assert triplets.key(*one) == table(1).key(*one) != table(1, secret=b"t" * 32).key(*one)


def test_parts_are_not_joined():
    triplets = table(1)
    parts = [(), ("",), ("", ""), ("ab",), ("a", "b"), ("a\0b",), ("a", "", "b"), ("1:a", "b"), ("1:a1:b",), ("1:a", "1:b")]
    assert len({triplets.key(*some) for some in parts}) == len(parts)


operations = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 60), st.sampled_from(["insert", "update", "wrong", "get"])), max_size=60
)


class Oracle:
    """One run of rows, naively."""

    def __init__(self, rows: int) -> None:
        self.rows: list[tuple[int, int, int]] = [(0, 0, 0)] * rows  # last, first, key
        self.evicted = 0

    def get(self, key: int) -> tuple[int, int]:
        return next(((first, last) for last, first, there in self.rows if there == key), (0, 0))

    def put(self, key: int, was: tuple[int, int], now: tuple[int, int]) -> bool:
        if self.get(key) != was:
            return False
        held = [there for _, _, there in self.rows]
        wanted = key if was != (0, 0) else 0
        if wanted in held:
            row = held.index(wanted)
        else:
            rows = range(len(held))
            row = next((row for row in rows if self.rows[row][0] < now[1] - OLD), -1)
            if row < 0:
                row = min(rows, key=lambda row: (*self.rows[row][:2], row))
                self.evicted += 1
        self.rows[row] = (now[1], now[0], key)
        return True


@given(st.integers(1, 8), operations)
def test_any_operations_do_what_the_oracle_does(rows, steps):
    triplets, oracle, wall = table(rows, stale), Oracle(rows), 1000
    for key, passed, what in steps:
        wall += passed
        known = oracle.get(key)
        assert triplets.get(key) == known
        was = {"insert": (0, 0), "update": known, "wrong": (1, 1), "get": None}[what]
        if was is not None:
            now = (known[0] or wall, wall)
            assert triplets.put(key, was, now) == oracle.put(key, was, now)
        assert triplets.evicted == oracle.evicted
        assert triplets.rows_used() == sum(1 for *_, there in oracle.rows if there)
    assert {key: triplets.get(key) for key in range(1, 13)} == {key: oracle.get(key) for key in range(1, 13)}


@given(st.integers(1, 40), st.lists(st.integers(1, (1 << 63) - 1), unique=True, max_size=60))
def test_what_is_forgotten_was_evicted(rows, keys):
    there = pairs(rows)
    triplets = Triplets(there, SECRET, never)
    for at, key in enumerate(keys, 1):
        assert triplets.put(key, (0, 0), (at, at + 5)) and triplets.get(key) == (at, at + 5)
    found = [triplets.get(key) for key in keys]
    assert all(times in ((0, 0), (at, at + 5)) for at, times in enumerate(found, 1))
    assert found.count((0, 0)) == triplets.evicted
    assert triplets.rows_used() == len(keys) - triplets.evicted <= there.rows <= rows


def test_keys_of_one_place_have_as_many_rows_as_are_probed():
    triplets = table(1024)
    runs = 1024 // 8
    keys = [3 + 5 * (1 << 31) * runs + (n << 40) * runs for n in range(PROBES + 2)]  # the same two runs for all
    for at, key in enumerate(keys, 1):
        assert triplets.put(key, (0, 0), (at, at))
    assert [key for key in keys if triplets.get(key) == (0, 0)] == keys[:2] and triplets.evicted == 2


def test_a_stale_triplet_loses_its_row_before_one_that_is_not():
    triplets = table(3, lambda first, last, wall: first == last and last < wall - OLD)
    for key, times in ((1, (1, 500)), (2, (700, 700)), (3, (2, 600))):
        assert triplets.put(key, (0, 0), times)
    assert triplets.put(4, (0, 0), (801, 801))
    assert [triplets.get(key) for key in (1, 2, 3, 4)] == [(1, 500), (0, 0), (2, 600), (801, 801)] and triplets.evicted == 0
    assert triplets.put(5, (0, 0), (802, 802))
    assert [triplets.get(key) for key in (1, 3, 4, 5)] == [(0, 0), (2, 600), (801, 801), (802, 802)] and triplets.evicted == 1


def test_few_are_forgotten_before_the_table_is_full():
    triplets = table(1 << 12)
    for number in range(int(0.9 * (1 << 12))):
        assert triplets.put(triplets.key(str(number)), (0, 0), (1, 1))
    assert triplets.evicted < 0.02 * (1 << 12)


# The mapping


def test_memory_that_was_never_used_costs_nothing():
    shared = Shared.create()
    triplets = shared.triplets(SECRET, never)
    assert triplets.rows_used() == 0
    assert triplets.restore(triplets.dump()) is None
    assert os.fstat(shared.descriptor).st_blocks * 512 <= 4096, "one page, which says that none is used"
    for number in range(100):
        assert triplets.put(triplets.key(str(number)), (0, 0), (1, 1))
    assert os.fstat(shared.descriptor).st_blocks * 512 <= 202 * 4096


def test_a_million_are_within_20_mb_and_apart_from_the_rest_of_the_mapping():
    assert ROWS >= 1_000_000 and 16 * (ROWS + 1) <= 20_000_000
    shared = Shared.create()
    one, other = shared.triplets(SECRET, never), Shared(os.dup(shared.descriptor)).triplets(SECRET, never)
    key = one.key("a", "b", "c")
    assert one.put(key, (0, 0), (3, 4)) and other.get(key) == (3, 4)
    shared.named(0).own().add(256 * 32 - 1, 7)
    shared.clear_limits(0)
    assert other.put(key, (3, 4), (3, 5)) and one.get(key) == (3, 5) and one.rows_used() == other.rows_used() == 1


@pytest.mark.parametrize("place", [(-16, 1), (0, 0), (0, -1), (0, 8), (8, 1), (112, 1), (1 << 62, 1), (0, 1 << 60), (144, 1)])
def test_pairs_lie_within_their_buffer_and_are_aligned(place):
    memory = mmap.mmap(-1, 4096)
    with pytest.raises(ValueError, match="pairs"):
        Pairs(memory, 4096 - 128 + place[0] if place[0] >= 0 else place[0], place[1])
    assert Pairs(memory, 4096 - 128, 7).rows == 7


def test_rows_that_are_not_there():
    there = pairs(8)
    for row in (-1, 8, 1 << 40):
        with pytest.raises(IndexError):
            there.get(row)
        with pytest.raises(IndexError):
            there.swap(row, 0, 0, 1, 1)
    with pytest.raises(IndexError):
        there.load(b"", -1)
    there.load(b"x" * 16, 1 << 40)
    assert there.used() == 0


def test_the_number_of_rows_in_use_follows_each_swap():
    there = pairs(8)
    swaps = [(0, 0, 0, 1, 1), (0, 0, 0, 2, 2), (0, 1, 1, 2, 2), (1, 0, 0, 3, 3), (0, 2, 2, 0, 0)]
    for swap, done, used in zip(swaps, [True, False, True, True, True], [1, 1, 1, 2, 1], strict=True):
        assert there.swap(*swap) == done
        assert there.used() == used


# Several processes


class Rows(Steps):
    """The pairs, an operation of which is one step of the calling worker."""

    def __init__(self, there: Pairs) -> None:
        self._cells = there  # type: ignore[assignment]
        self.turn = lambda: None


KEYS = [1, 2, 3]
programs = st.tuples(*[st.lists(st.tuples(st.sampled_from(KEYS), st.booleans()), max_size=4)] * WORKERS)


def triplets_are_kept(rows: int, schedule, works) -> list[int]:
    """Each worker puts keys, as new ones or with other times. All times are different, so each that is found tells who has put
    it. Returns how many steps each worker took."""
    there = pairs(rows)
    steps = Rows(there)
    crew_triplets = [Triplets(steps, SECRET, stale) for _ in range(WORKERS)]  # type: ignore[arg-type]
    clock = [1000]
    put: dict[int, set[tuple[int, int]]] = defaultdict(set)  # also by one that died at it

    def attempt(triplets: Triplets, key: int, fresh: bool) -> None:
        was = (0, 0) if fresh else triplets.get(key)
        assert was == (0, 0) or was in put[key], "times that were put for another key, or not at all"
        clock[0] += 30
        now = (was[0] or clock[0], clock[0])
        put[key].add(now)
        if not triplets.put(key, was, now):
            put[key].discard(now)
        elif rows == 64:
            assert triplets.get(key) != (0, 0), "there is room for all"

    def work(number: int) -> None:
        for key, fresh in works[number]:
            attempt(crew_triplets[number], key, fresh)

    for key in KEYS[:rows]:
        attempt(crew_triplets[0], key, True)
    crew = Crew(steps, schedule, lambda number: None)
    crew.run([lambda n=n: work(n) for n in range(WORKERS)])
    last = Triplets(there, SECRET, stale)
    held = [there.get(row) for row in range(there.rows)]
    assert there.used() == sum(1 for key, _ in held if key)
    assert all((value >> 32, value & 0xFFFFFFFF) in put[key] for key, value in held if key)
    for key in KEYS:
        attempt(last, key, False)
        assert last.get(key) == max(put[key], key=lambda times: times[1]), "a worker that died is in nobody's way"
    return crew.steps


@given(st.sampled_from([1, 2, 3, 64]), schedules, programs)
def test_any_interleaving_keeps_triplets_apart(rows, schedule, works):
    triplets_are_kept(rows, schedule, works)


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize(
    ("rows", "works"),
    [
        (1, ([(1, False)], [(2, True)], [])),  # one changes a triplet while another gives the row to its own
        (1, ([(2, True)], [(3, True)], [(1, False)])),
        (2, ([(3, True)], [(3, True)], [(3, False)])),  # two give a row to the same key
        (64, ([(3, True), (3, False)], [(3, True), (3, False)], [])),
    ],
)
def test_every_place_of_two_interruptions(rows, works, dies):
    """One worker stops (or dies) at any step, another one at any step after that, then each goes on to its end."""
    steps, every = triplets_are_kept(rows, [], works), 1 if PROVE else 2
    for first in range(1, steps[0] + 3):
        for second in range(1 + first % every, steps[1] + 3, every):
            triplets_are_kept(rows, [(0, -first if dies else first), (1, second), (2, second), (0, FOREVER)], works)


def test_a_row_that_changes_hands_while_it_is_read_is_read_again():
    there = pairs(1)
    moved: list[int] = []

    class Moving:
        def find(self, key: int) -> int:
            row = there.find(key)
            if not moved:
                moved.append(row)
                there.swap(0, 1, 5, 2, 6)
            return row

        def get(self, row: int) -> tuple[int, int]:
            return there.get(row)

    there.swap(0, 0, 0, 1, 5)
    assert Triplets(Moving(), SECRET, never).get(1) == (0, 0) and moved == [0]  # type: ignore[arg-type]


def test_a_triplet_that_is_seen_again_just_before_it_is_evicted_keeps_its_row():
    there = pairs(2)

    class Busy:
        """Another worker changes the oldest row after each of the first looks at all rows."""

        looks = 0

        def __getattr__(self, name: str):
            return getattr(there, name)

        def near(self, key: int) -> list[tuple[int, int, int, int]]:
            found = there.near(key)
            if self.looks < 3:
                last, first, row, other = min(found)
                assert there.swap(row, other, first << 32 | last, other, first << 32 | 20 + self.looks)
            self.looks += 1
            return found

    triplets = Triplets(Busy(), SECRET, never)  # type: ignore[arg-type]
    assert triplets.put(1, (0, 0), (5, 5)) and triplets.put(2, (0, 0), (6, 6))
    assert triplets.put(3, (0, 0), (30, 30)) and triplets.evicted == 1
    assert [triplets.get(key) for key in (1, 2, 3)] == [(5, 22), (0, 0), (30, 30)]


def test_a_worker_that_meets_another_at_every_try_is_told():
    there = pairs(1)

    class Hostile:
        """Another worker has every free row at once."""

        def __getattr__(self, name: str):
            return getattr(there, name)

        def swap(self, *args: int) -> bool:
            return False

    assert not Triplets(Hostile(), SECRET, never).put(1, (0, 0), (5, 5))  # type: ignore[arg-type]
    assert there.used() == 0


def count_up(memory: mmap.mmap, count: int) -> None:
    """Raise both halves of a pair `count` times."""
    there = Pairs(memory, 0, 1)
    while count:
        key, value = there.get(0)
        if key != value:
            os._exit(1)
        count -= there.swap(0, key, value, key + 1, value + 1)
    os._exit(0)


def test_both_halves_of_a_pair_change_at_one_time():
    memory, each = mmap.mmap(-1, 4096), 50_000
    children = [multiprocessing.get_context("fork").Process(target=count_up, args=(memory, each), daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert Pairs(memory, 0, 1).get(0) == (2 * each, 2 * each) and Pairs(memory, 0, 1).used() == 1


def first_of(key: int) -> int:
    return key * 2_654_435_761 & 0x7FFFFFFF or 1


def hammer(memory: mmap.mmap, rows: int, seed: int) -> None:
    """Put and find keys, of which there are more than rows, until the last cell is set. Ends with 1 when something is wrong."""
    there, stop = Pairs(memory, 0, rows), Cells(memory, 16 * (rows + 1), 2)
    triplets, number = Triplets(there, SECRET, never), seed
    while not stop.get(0):
        number = (number * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        key = 1 + (number >> 33) % (2 * rows)
        was = triplets.get(key)
        if was != (0, 0) and was[0] != first_of(key):
            os._exit(1)
        triplets.put(key, was, (first_of(key), 1 + (number >> 40)))
        stop.add(1, 1)
    os._exit(0)


@pytest.mark.parametrize("rows", [8, *in_prove(64)])
def test_processes_that_are_killed_leave_no_times_to_another_key(rows):
    memory = mmap.mmap(-1, 4096)
    context, stop, kills = multiprocessing.get_context("fork"), Cells(memory, 16 * (rows + 1), 2), 20
    children = [context.Process(target=hammer, args=(memory, rows, seed), daemon=True) for seed in range(3)]
    for child in children:
        child.start()
    for killed in range(kills):
        seen, deadline = stop.get(1), time.monotonic() + 30
        while stop.get(1) < seen + 500 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.get(1) >= seen + 500, "the others go on"
        victim = children.pop(0)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        children.append(context.Process(target=hammer, args=(memory, rows, 100 + killed), daemon=True))
        children[-1].start()
    stop.set(0, 1)
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 3
    there = Pairs(memory, 0, rows)
    held = [there.get(row) for row in range(rows)]
    assert all(value >> 32 == first_of(key) for key, value in held if key)
    assert abs(there.used() - sum(1 for key, _ in held if key)) <= kills


# Its file


def filled(count: int, rows: int = 256) -> Triplets:
    triplets = table(rows)
    for number in range(1, count + 1):
        assert triplets.put(triplets.key(str(number)), (0, 0), (number, 4_000_000_000 + number))
    return triplets


def content(triplets: Triplets, count: int) -> list[tuple[int, int]]:
    return [triplets.get(triplets.key(str(number))) for number in range(1, count + 1)]


@given(st.integers(0, 400))
def test_a_dump_is_restored_as_it_was(count):
    before, after = filled(count), table(256)
    octets = before.dump()
    assert len(octets) == 8 + 16 * before.rows_used()
    after.restore(octets)
    assert content(after, count) == content(before, count) and after.rows_used() == before.rows_used()
    assert after.dump() == octets


def test_what_is_known_already_stays_as_it_is():
    octets, after = filled(3).dump(), table(256)
    key = after.key("2")
    assert after.put(key, (0, 0), (9, 9))
    after.restore(octets)
    after.restore(octets)
    assert after.get(key) == (9, 9) and after.rows_used() == 3


def test_of_those_that_have_no_room_the_ones_that_were_seen_last_stay():
    octets, after = filled(100).dump(), table(8)
    after.restore(octets)
    assert after.rows_used() == 8
    assert [bool(last) for _, last in content(after, 100)] == [False] * 92 + [True] * 8


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_other_octets_restore_nothing_that_cannot_be_used(octets, marked, whole):
    triplets = table(16)
    if whole:
        octets += bytes(-len(octets) % 16)
    triplets.restore((triplets.dump() if marked else b"") + octets)
    assert triplets.rows_used() == len(triplets.dump()) // 16 <= 12
    if not marked and not octets.startswith(triplets.dump()[:8]):
        assert triplets.rows_used() == 0


def test_octets_of_another_secret_or_half_of_them_restore_nothing():
    octets, triplets = filled(5).dump(), table(256)
    for wrong in (octets[:-1], octets + b"x", octets[8:], octets[:8][::-1] + octets[8:], b"", octets[:7]):
        triplets.restore(wrong)
        assert triplets.rows_used() == 0
    other = table(256, secret=b"other")
    other.restore(octets)
    assert other.rows_used() == 0
    triplets.restore(octets[:8] + bytes(64) + struct.pack("=Qq", 1 << 63, 5) + octets[8:])
    assert triplets.rows_used() == 5, "no keys and times of 0"


def test_triplets_are_kept_across_a_start(tmp_path):
    assert kept_table(tmp_path, "triplets") == b""
    before = filled(50)
    for _ in range(2):
        keep_table(tmp_path, "triplets", before.dump())
    after = table(256)
    after.restore(kept_table(tmp_path, "triplets"))
    assert content(after, 50) == content(before, 50)
    keep_table(tmp_path, "triplets", table().dump())
    assert kept_table(tmp_path, "triplets") == table().dump()
    assert [path.name for path in tmp_path.iterdir()] == ["triplets"] and (tmp_path / "triplets").stat().st_mode & 0o777 == 0o600


def test_half_of_a_file_is_as_none(tmp_path):
    octets, file = filled(20).dump(), tmp_path / "triplets"
    keep_table(tmp_path, "triplets", octets)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert kept_table(tmp_path, "triplets") == b""
        file.write_bytes(whole[:size] + bytes(len(whole) - size))  # a file system that had its size before its octets
        assert kept_table(tmp_path, "triplets") in (b"", octets)
    file.write_bytes(whole + b"x")
    assert kept_table(tmp_path, "triplets") == b""
    file.write_bytes(whole)
    assert kept_table(tmp_path, "triplets") == octets


@given(st.data())
def test_a_file_with_one_wrong_bit_is_as_none(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.mkdir(exist_ok=True)
    keep_table(path, "triplets", filled(5).dump())
    wrong = bytearray((path / "triplets").read_bytes())
    at = data.draw(st.integers(0, 8 * len(wrong) - 1))
    wrong[at // 8] ^= 1 << at % 8
    (path / "triplets").write_bytes(wrong)
    assert kept_table(path, "triplets") == b""


@pytest.mark.parametrize("foreign", [b"", b"triplets", b"x" * 1000, b"triplets\1\0\0\0" + b"\xff" * 100, bytes(4096)])
def test_a_foreign_file_is_as_none(tmp_path, foreign):
    (tmp_path / "triplets").write_bytes(foreign)
    assert kept_table(tmp_path, "triplets") == b""


def test_a_folder_in_its_place_is_as_none(tmp_path):
    (tmp_path / "triplets").mkdir()
    assert kept_table(tmp_path, "triplets") == b""
    with pytest.raises(OSError, match="directory"):
        keep_table(tmp_path, "triplets", b"x")


def test_its_octets_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[tuple[int, bool]] = []
    monkeypatch.setattr(node.os, "fsync", lambda fd: done.append((os.fstat(fd).st_size, (tmp_path / "triplets").exists())))
    keep_table(tmp_path, "triplets", b"x" * 100)
    assert done == [((tmp_path / "triplets").stat().st_size, False)]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_leaves_what_was_kept_before(small_disk):
    before = filled(20).dump()
    keep_table(small_disk, "triplets", before)
    used = os.statvfs(small_disk).f_bfree
    with pytest.raises(OSError, match="No space left"):
        keep_table(small_disk, "triplets", b"x" * (1 << 20))
    assert kept_table(small_disk, "triplets") == before and os.statvfs(small_disk).f_bfree == used
