"""The age distribution of a queue's mail, counted without reading the queue."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from relaymta.queue.ages import COLUMNS, KEPT, SPAN_MS, add, columns, remove

DAYS = st.integers(0, 5 * 86_400_000)


@given(st.lists(st.tuples(st.booleans(), DAYS)))
def test_what_came_and_left_is_counted_right_and_within_bounds(steps):
    ages: list[list[int]] = []
    waiting: list[int] = []
    for arrives, moment in steps:
        if arrives or not waiting:
            add(ages, moment)
            waiting.append(moment)
        else:
            remove(ages, waiting.pop(moment % len(waiting)))
        assert sum(count for _, _, count in ages) == len(waiting)
        assert len(ages) <= KEPT
        assert all(first <= last and count > 0 for first, last, count in ages)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(ages))
    assert sum(columns(ages, 6 * 86_400_000, len(waiting))) == len(waiting)


def test_columns_count_new_mail_to_the_span_and_old_mail_approximately():
    now = 10 * 86_400_000
    ages: list[list[int]] = []
    minutes = [n * 3 for n in range(2400)]  # five days, a message each three minutes
    for age in reversed(minutes):
        add(ages, now - age * 60_000)
    found = columns(ages, now, len(minutes))
    wanted = Counter(next((i for i, limit in enumerate(COLUMNS) if age <= limit), len(COLUMNS)) for age in minutes)
    assert sum(found) == len(minutes)
    for number in range(len(found)):
        assert abs(found[number] - wanted[number]) <= max(2 * SPAN_MS / 180_000, 0.35 * wanted[number]), (found, wanted)


def test_what_was_never_counted_is_in_the_last_column():
    assert columns([], 0, 3)[-1] == 3
    ages: list[list[int]] = []
    remove(ages, 5)
    assert ages == []
