"""Limits and rates shared by processes."""

import multiprocessing
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.shm import RATE_ROWS, Rates, Shared

START = 1_000_000_000_000  # nanoseconds


def test_a_rate_holds_for_all_processes():
    """Three processes take as fast as they can for a second: a rate of 200/s gives 200 units, and the burst. The clock advances
    by 20 us at each reading."""
    shared = Shared.create()
    context = multiprocessing.get_context("fork")
    clock = context.Value("q", START)

    def look(which: int) -> int:
        with clock.get_lock():
            clock.value += 20_000
            return clock.value

    def take(descriptor: int, result) -> None:
        time.clock_gettime_ns = look  # in this process alone
        rates = Shared(descriptor).rates(3)
        count = 0
        while clock.value < START + 1_000_000_000:
            if not rates.take("key", 200, 5):
                count += 1
        result.put(count)

    result = context.Queue()
    os.set_inheritable(shared.descriptor, True)
    processes = [context.Process(target=take, args=(shared.descriptor, result)) for _ in range(3)]
    for process in processes:
        process.start()
    counts = [result.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert 204 <= sum(counts) <= 206


class Clock:
    """CLOCK_BOOTTIME, set by the test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = START
        patch.setattr(time, "clock_gettime_ns", lambda which: self.now)


@given(st.floats(0.1, 1000), st.integers(1, 5))
def test_the_wait_is_exact(per_second, burst):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        rates = Shared.create().rates(1)
        for _ in range(burst):
            assert rates.take("k", per_second, burst) == 0
        wait = rates.take("k", per_second, burst)
        assert 1 / per_second - 10e-6 <= wait <= 1 / per_second
        assert rates.take("other", per_second) == 0
        clock.now += int(wait * 1e9) - 2_000
        assert rates.take("k", per_second, burst) > 0, "two microseconds too early"
        clock.now += 3_000
        assert rates.take("k", per_second, burst) == 0


@given(st.integers(1, 5), st.integers(1, 4))
def test_units_that_are_given_back_can_be_taken_again(burst, back):
    rates = Shared.create().rates(1)
    for _ in range(burst):
        assert rates.take("k", 0.001, burst) == 0
    assert rates.take("k", 0.001, burst) > 0
    for _ in range(back):
        rates.give("k", 0.001)
    for _ in range(min(back, burst)):
        assert rates.take("k", 0.001, burst) == 0
    assert rates.take("k", 0.001, burst) > 0, "units that were not in use are not given back"
    rates.give("never taken", 0.001)
    assert rates.take("never taken", 0.001) == 0 < rates.take("never taken", 0.001)


def test_without_a_free_row_each_worker_uses_its_share(monkeypatch):
    Clock(monkeypatch)
    shared = Shared.create()
    rates = shared.rates(2)
    for number in range(3 * RATE_ROWS):
        rates.take(f"k{number}", 1)
    assert rates.overflows > 0
    crowded: Rates = rates
    key = next(f"k{n}" for n in range(3 * RATE_ROWS) if crowded._own.get(f"k{n}"))
    assert crowded.take(key, 1) == 2, "half the rate"


def test_waiting_workers_are_visible_until_they_die():
    shared = Shared.create()
    first, second = shared.limits(0, 2), shared.limits(1, 2)
    assert first.waiting("site") == 0
    second.wait("site", 2)
    assert first.waiting("site") == 2
    assert second.waiting("site") == 0, "one's own wait does not count"
    shared.clear_limits(1)
    assert first.waiting("site") == 0
    second.wait("site", 3)
    second.wait("site", 0)
    assert first.waiting("site") == 0


def test_counters_by_name_are_those_of_all_workers_and_stay_with_the_name():
    shared = Shared.create()
    one, other = shared.named(0), shared.named(1)
    for named, n in ((one, 2), (other, 3)):
        named.own().add(named.row("virus") + 5, n)
        named.own().add(named.row("spam") + 6, 10 * n)
    assert sorted(row[5] for row in shared.named().of("virus")) == [2, 3]
    assert sum(row[6] for row in shared.named().of("spam")) == 50 and shared.named().of("none") == []
    assert one.row("virus") == other.row("virus") == shared.named(0).row("virus")
    rows = {one.row(f"name{n}") for n in range(1000)}
    assert -1 in rows and one.row("virus") == other.row("virus") >= 0  # the table is full, and nobody loses a row
    shared.clear_limits(0)
    assert sum(row[5] for row in shared.named().of("virus")) == 5  # counters outlive their worker


def test_what_was_cleared_is_not_given_back_once_more():
    """A worker that has outlived its supervisor gives back what another program's supervisor has cleared."""
    shared = Shared.create()
    orphan = shared.limits(0, 1)
    assert orphan.take("site", 2) and orphan.take("site", 2)
    shared.clear_limits(0)
    orphan.give("site")
    orphan.give("site")
    limits = shared.limits(0, 1)
    assert [limits.take("site", 2) for _ in range(3)] == [True, True, False]
