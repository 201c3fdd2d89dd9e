"""The tables of limits and rates, used by several workers whose every step is interleaved as hypothesis likes, some of which die.

Each worker is a thread that stops before every operation on a cell, until the test gives it the turn.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta import shm
from relaymta._speedups.cells import Cells
from relaymta.shm import RATE_ROW, ROW, SLOTS, Limits, Rates
from tests.conftest import PROVE

WORKERS = 3
FOREVER = 10_000  # steps
KEYS = ["a", "b", "c"]
SECOND = 1_000_000_000


class Killed(BaseException):
    """The worker dies at this step."""


class Steps:
    """The cells, an operation of which is one step of the calling worker. Outside of a worker they are ordinary."""

    def __init__(self, cells: Cells) -> None:
        self.count = cells.count
        self._cells = cells
        self.turn: Callable[[], None] = lambda: None

    def __getattr__(self, name: str):
        def step(*args: int):
            self.turn()
            return getattr(self._cells, name)(*args)

        return step

    def total(self, first: int, count: int) -> int:
        return sum(self.get(cell) for cell in range(first, first + WORKERS + 1))

    def highest(self, first: int, count: int, but: int) -> int:
        return max([0, *(self.get(cell) for cell in range(first, first + WORKERS + 1) if cell != but)])


class Crew:
    """Runs one function of each worker, in the order of `schedule`: (worker, how many steps; it dies after them if negative)."""

    def __init__(self, cells: Steps, schedule: Iterable[tuple[int, int]], died: Callable[[int], None]) -> None:
        self._cells, self._schedule, self._died = cells, schedule, died
        self._go = [threading.Semaphore(0) for _ in range(WORKERS)]
        self._stopped = threading.Semaphore(0)
        self._alive = set(range(WORKERS))
        self._kill = -1
        self.errors: list[BaseException] = []
        self.steps = [0] * WORKERS

    def run(self, works: list[Callable[[], None]]) -> None:
        mine = threading.local()

        def turn() -> None:
            number = getattr(mine, "number", -1)
            if number >= 0:
                self._stopped.release()
                self._go[number].acquire()
                if number == self._kill:
                    raise Killed

        def body(number: int, work: Callable[[], None]) -> None:
            self._go[number].acquire()
            mine.number = number
            try:
                work()
            except Killed:
                mine.number = -1
                self._died(number)
            except BaseException as error:  # it is raised in the test's thread
                self.errors.append(error)
            self._alive.discard(number)
            self._stopped.release()

        self._cells.turn = turn
        threads = [threading.Thread(target=body, args=pair, daemon=True) for pair in enumerate(works)]
        for thread in threads:
            thread.start()
        for number, steps in (*self._schedule, *((number, FOREVER) for number in range(WORKERS))):
            for _ in range(abs(steps)):
                self._step(number)
            if steps < 0:
                self._kill = number
                self._step(number)
        for thread in threads:
            thread.join()
        self._cells.turn = lambda: None
        if self.errors:
            raise self.errors[0]

    def _step(self, number: int) -> None:
        if number in self._alive:
            self.steps[number] += 1
            self._go[number].release()
            self._stopped.acquire()


Programs = Sequence[Sequence[tuple[str, bool]]]  # of each worker: keys, and whether it takes a unit of it or does something else
schedules = st.lists(
    st.tuples(st.integers(0, WORKERS - 1), st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(-40, -1))), max_size=12
)
programs = st.tuples(*[st.lists(st.tuples(st.sampled_from(KEYS), st.booleans()), max_size=4)] * WORKERS)


def check_keys(cells: Steps, width: int) -> None:
    """No key has two rows, and nobody is changing one."""
    found = Counter(cells.get(row) for row in range(0, cells.count, width))
    del found[0]
    assert all(count == 1 and not key & shm._CHANGING for key, count in found.items())


def by_row(limits: Limits, key: str, most: int) -> bool:
    """Take a unit; whether it was taken from the limit of all workers."""
    before = limits.overflows
    return limits.take(key, most) and limits.overflows == before


def limits_are_kept(rows: int, most: int, schedule: Iterable[tuple[int, int]], works: Programs) -> list[int]:
    """All rows were used and are idle. Each worker takes units and gives some back; those that it has at the end are held still
    when another one tries to take some. Returns how many steps each worker took."""
    cells = Steps(Cells(bytearray(8 * rows * ROW), 0, rows * ROW))
    crew_limits = [Limits(cells, number, WORKERS) for number in range(WORKERS)]
    for key in KEYS[:rows]:
        assert by_row(crew_limits[0], key, most)
        crew_limits[0].give(key)
    held: list[list[str]] = [[] for _ in range(WORKERS)]

    def died(number: int) -> None:
        held[number].clear()
        crew_limits[number]._fallback.clear()
        shm._clear_units(cells, number)
        shm._undo_changes(cells, ROW, number)

    def work(number: int) -> None:
        limits = crew_limits[number]
        for key, takes in works[number]:
            if takes and by_row(limits, key, most):
                held[number].append(key)
                assert sum(one.count(key) for one in held) <= most
            elif not takes and held[number]:
                give(number, held[number].pop())

    def give(number: int, key: str) -> None:
        for _ in range(crew_limits[number]._fallback.get(key, 0) + 1):  # units without a row are given back first
            crew_limits[number].give(key)

    crew = Crew(cells, schedule, died)
    crew.run([lambda n=n: work(n) for n in range(WORKERS)])
    last = Limits(cells, WORKERS, WORKERS)
    for key in KEYS:
        assert last.taken(key) == sum(one.count(key) for one in held), "units are counted by their key's row"
        if last.taken(key) == most:
            assert not by_row(last, key, most)
    last._fallback.clear()
    for number, keys in enumerate(held):
        crew_limits[number]._fallback.clear()
        for key in keys:
            crew_limits[number].give(key)
    units = [cells.get(row + 1 + slot) for row in range(0, cells.count, ROW) for slot in range(SLOTS)]
    assert not any(units), "units that nobody holds"
    for key in KEYS:
        assert [by_row(last, key, most) for _ in range(most + 1)] == [True] * most + [False]
        for _ in range(most):
            last.give(key)
    check_keys(cells, ROW)
    return crew.steps


def rates_are_kept(rows: int, burst: int, schedule: Iterable[tuple[int, int]], works: Programs) -> list[int]:
    """All rows were used and are idle. One unit becomes available in 1000 s; now and then 3000 s pass, which makes rows idle."""
    clock = [10**6 * SECOND]
    cells = Steps(Cells(bytearray(8 * rows * RATE_ROW), 0, rows * RATE_ROW))
    began: list[tuple[str, int]] = []

    def take(rates: Rates, key: str) -> None:
        before, now = rates.overflows, clock[0]
        if not rates.take(key, 0.001, burst) and rates.overflows == before:
            began.append((key, now))
            assert began.count((key, clock[0])) <= burst

    def work(number: int) -> None:
        for key, takes in works[number]:
            if takes:
                take(crew_rates[number], key)
            else:
                clock[0] += 3000 * SECOND

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "clock_gettime_ns", lambda which: clock[0])
        crew_rates = [Rates(cells, WORKERS, number) for number in range(WORKERS)]
        for key in KEYS[:rows]:
            take(crew_rates[0], key)
        clock[0] += 10_000 * SECOND
        crew = Crew(cells, schedule, lambda number: shm._undo_changes(cells, RATE_ROW, number))
        crew.run([lambda n=n: work(n) for n in range(WORKERS)])
        last = Rates(cells, WORKERS, WORKERS)
        for key in KEYS * burst:
            take(last, key)
        for key in KEYS:
            clock[0] += 10_000 * SECOND
            before = last.overflows
            assert [bool(last.take(key, 0.001, burst)) for _ in range(burst + 1)] == [False] * burst + [True]
            assert last.overflows == before
    check_keys(cells, RATE_ROW)
    return crew.steps


@pytest.mark.parametrize("kept", [limits_are_kept, rates_are_kept])
@given(st.integers(1, 3), st.integers(1, 2), schedules, programs)
def test_any_interleaving_keeps_what_is_shared(kept, rows, most, schedule, works):
    kept(rows, most, schedule, works)


@pytest.mark.parametrize("kept", [limits_are_kept, rates_are_kept])
@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize(
    ("rows", "works"),
    [
        (1, ([("a", True)], [("b", True)], [])),  # one takes a unit of an idle row while another gives the row to its key
        (2, ([("c", True)], [("c", True)], [])),  # two give a row to the same key
        (2, ([("a", True)], [("c", True)], [])),
        (2, ([("b", True)], [("c", True)], [("c", True)])),
    ],
)
def test_every_place_of_two_interruptions(kept, rows, works, dies):
    """One worker stops (or dies) at any step, another one at any step after that, then each goes on to its end. Every second pair
    of steps, in a chequer, where not all are asked for."""
    steps, every = kept(rows, 1, [], works), 1 if PROVE else 2
    for first in range(1, steps[0] + 3):
        for second in range(1 + first % every, steps[1] + 3, every):
            kept(rows, 1, [(0, -first if dies else first), (1, second), (2, second), (0, FOREVER)], works)
