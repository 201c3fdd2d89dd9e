"""Which sites /metrics shows: few, for long, and with counters that never fall."""

import random

from relaymta.metrics import OTHER, SITES_SHOWN
from relaymta.supervisor import activity as module
from relaymta.supervisor.activity import Activity
from tests.conftest import PROVE


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(most: int = 2) -> tuple[Activity, Clock]:
    clock = Clock()
    return Activity(clock, most), clock


async def minutes(activity: Activity, clock: Clock, count: int, **counts: int) -> None:
    """So many minutes in each of which so many attempts at sites succeed."""
    for _ in range(count):
        await activity.note([(site, [n, 0, 0]) for site, n in counts.items()])
        clock.now += 61
    await activity.note([])


async def test_the_first_sites_are_shown_at_once_and_others_are_counted_together():
    activity, _ = made()
    await activity.note([("a", [1, 2, 3]), ("b", [4, 0, 0]), ("c", [0, 0, 7]), ("", [1, 0, 0])])
    assert activity.totals() == {"a": (1, 2, 3), "b": (4, 0, 0), OTHER: (1, 0, 7)}


async def test_a_route_called_other_is_one_of_the_others():
    activity, _ = made()
    await activity.note([(OTHER, [1, 0, 0]), ("a", [1, 0, 0])])
    assert activity.totals() == {"a": (1, 0, 0), OTHER: (1, 0, 0)}


async def test_a_site_that_is_far_more_active_takes_the_place_of_the_least_active_and_one_that_is_little_more_does_not():
    activity, clock = made()
    await activity.note([("a", [10, 0, 0]), ("b", [10, 0, 0])])
    await minutes(activity, clock, 30, a=10, b=10, c=15)
    assert activity.shown == ["a", "b"]
    await minutes(activity, clock, 60, a=10, b=9, c=40)
    assert sorted(activity.shown) == ["a", "c"]


async def test_who_has_just_come_stays():
    activity, clock = made(1)
    await activity.note([("a", [1, 0, 0])])
    await minutes(activity, clock, int(module.STAY // 61) - 1, b=1000)
    assert activity.shown == ["a"]
    await minutes(activity, clock, 3, b=1000)
    assert activity.shown == ["b"]


async def test_a_site_with_a_backlog_that_nobody_takes_is_shown():
    activity, clock = made(1)
    await activity.note([("a", [10, 0, 0])])
    for _ in range(20):
        clock.now += 61
        activity.loads([("stuck", 500)])
    assert activity.shown == ["stuck"]


async def test_a_counter_never_falls_and_no_attempt_is_lost_or_counted_twice():
    """Sites come and go at random; each attempt is in exactly one series, also in those that are not shown now."""
    draw = random.Random(7)
    activity, clock = made(5)
    highest: dict[str, int] = {}
    done = 0
    for _ in range(3000):
        for _ in range(5):
            site, count = f"s{int(draw.paretovariate(0.7)) % 40}", draw.randint(1, 30)
            done += count
            await activity.note([(site, [count, 0, 0])])
        clock.now += draw.choice([5, 70, 1000])
        for site, (delivered, _, _) in activity.totals().items():
            assert delivered >= highest.get(site, 0), site
            highest[site] = delivered
    assert len(highest) > 15, "some have come"
    # What a site had when it left is in its counter still.
    assert sum(row[0] for row in activity._counts.values()) + activity.totals()[OTHER][0] == done


async def test_few_new_names_a_day_whatever_comes():
    """200,000 domains, of which each minute others are the most active."""
    activity, clock = made(SITES_SHOWN)
    seen: set[str] = set()
    minutes = 24 * 60 if PROVE else 8 * 60
    for minute in range(minutes):
        first = minute * 139
        await activity.note([(f"mx/{(first + n) % 200_000}.example", [200 - n, 0, 0]) for n in range(150)])
        clock.now += 60
        seen |= activity.totals().keys()
    assert len(activity.totals()) == SITES_SHOWN + 1
    assert SITES_SHOWN < len(seen) <= SITES_SHOWN + 1 + module.SWAPS * minutes
    assert len(activity._score) <= 2 * module.CANDIDATES + SITES_SHOWN
    assert len(activity._counts) <= module.KEPT + SITES_SHOWN
