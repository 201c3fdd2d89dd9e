"""Habits: against an account of every single thing that was done, and what each check makes of them."""

import random
from collections import Counter

import msgspec
import pytest
import xxhash

from relaymta.config import Abuse
from relaymta.filter import habits
from relaymta.filter.habits import DAY, HOUR, Figures, Habit, Seen, finding

START = 1_800_000_000 // HOUR * HOUR
NET = "192.0.2.0/24"
NOTHING = Figures(0, 0, 0, 0, 0, 0, 0, (), {})


def domains(*numbers: int) -> bytes:
    return b"".join(xxhash.xxh3_64_digest(b"%d.example" % number) for number in numbers)


def seen(recipients: int = 0, at: str = NET, **more) -> Seen:
    return Seen("user=ann", recipients, networks={at: recipients} if recipients else {}, **more)


def check(watch: str, **keys) -> Abuse:
    return Abuse.model_validate({"name": "x", "watch": watch} | ({"rule": "r"} if watch == "rule" else {}) | keys)


class Naive:
    """All that was done, with its time."""

    def __init__(self, began: int) -> None:
        self.began = self.now = began
        self.all: list[tuple[int, Seen]] = []

    def note(self, one: Seen, now: int) -> None:
        self.now = max(self.now, now)
        self.all.append((self.now, one))

    def figures(self, now: int) -> Figures:
        now = self.now = max(self.now, now)
        hour, oldest = now // HOUR, now // 60 - 60
        lately = [(when, one) for when, one in self.all if when // 60 > oldest]
        hours, spread = Counter[int](), dict[int, set[bytes]]()
        for when, one in self.all:
            hours[when // HOUR] += one.recipients
            spread.setdefault(when // HOUR, set()).update(one.domains[at : at + 8] for at in range(0, len(one.domains), 8))
        kept = [at for at in hours if hour - 168 <= at < hour]
        results = [bad for _, one in self.all for bad in [0] * (one.ended - one.failed) + [1] * one.failed][-200:]
        first: dict[str, int] = {}
        elsewhere = 0
        for when, one in self.all:
            for network, count in one.networks.items():
                first.setdefault(network, when)
                new = first[network] > max(when - DAY, self.began + DAY)
                elsewhere += count if new and when // 60 > oldest else 0
        rules = Counter[str]()
        for _, one in lately:
            rules.update(one.rules)
        return Figures(
            sum(one.recipients for _, one in lately), max((hours[at] for at in kept if at < hour - 1), default=0),
            len(spread.get(hour, ())), max((len(spread[at]) for at in kept), default=0), sum(results), len(results), elsewhere,
            tuple(sorted(network for network, at in first.items() if at > max(now - DAY, self.began + DAY))), dict(rules),
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_against_all_that_was_done(seed):
    rng = random.Random(seed)
    now = START + rng.randrange(HOUR)
    habit, naive = Habit(now, now), Naive(now)
    for _ in range(300):
        now += rng.choice([1, 1, 7, 59, 600, 1800, 3599, 3600, 7200, 40_000]) if rng.random() < 0.97 else -rng.randrange(9000)
        ended = rng.choice([0, 0, 1, 5, 50])
        one = Seen(
            "user=ann", rng.choice([0, 1, 3, 400]), domains(*rng.sample(range(60), rng.randrange(6))), rng.randint(0, ended),
            ended, {f"192.0.{rng.randrange(9)}.0/24": rng.randrange(1, 9)} if rng.random() < 0.3 else {},
            {rng.choice("rs"): rng.randrange(1, 4)} if rng.random() < 0.2 else {},
        )  # fmt: skip
        habit.note(one, now)
        naive.note(one, now)
        if rng.random() < 0.2:
            habit = msgspec.msgpack.decode(msgspec.msgpack.encode(habit), type=Habit)
        found, expected = habit.figures(now), naive.figures(now)
        assert found._replace(new=tuple(sorted(found.new))) == expected


def test_what_is_stored_is_bounded(monkeypatch):
    rng, now = random.Random(1), START
    habit = Habit(now, now)
    for number in range(30_000):
        now += rng.randrange(400)
        one = seen(
            3, f"10.{number >> 8 & 255}.{number & 255}.0/24", domains=domains(*range(number, number + 9)), ended=9, failed=1
        )
        habit.note(one, now)
    assert len(habit.networks) <= habits.NETWORKS and len(habit.hours) <= 169 and len(habit.minutes) <= 60
    assert len(msgspec.msgpack.encode(habit)) < 20_000


def test_sudden_volume_is_above_its_own_busiest_hour_and_a_floor():
    habit, volume = Habit(START, START), check("volume")
    for hour in range(30):
        habit.note(seen(60 + hour % 3), START + hour * HOUR)
    now = START + 30 * HOUR
    for _ in range(5):
        habit.note(seen(62), now)
        assert not finding(volume, habit.figures(now)).above
    habit.note(seen(1), now)
    found = finding(volume, habit.figures(now))
    assert found.above and found.limit == 5 * 62
    assert found.text == "311 recipients within an hour; its busiest hour of 7 days had 62"
    habit.pardon(now)
    assert not finding(volume, habit.figures(now)).above
    habit.note(seen(311 * 4), now)
    assert not finding(volume, habit.figures(now)).above, "that is usual now"
    habit.note(seen(1), now)
    assert finding(volume, habit.figures(now)).above


def test_two_halves_of_two_clock_hours_are_one_hour():
    habit = Habit(START, START)
    habit.note(seen(150), START + HOUR - 60)
    habit.note(seen(150), START + HOUR + 60)
    assert finding(check("volume"), habit.figures(START + HOUR + 60)).above
    assert not finding(check("volume"), habit.figures(START + 2 * HOUR + 120)).above


@pytest.mark.parametrize("jump", [5 * HOUR, 2 * DAY, 365 * DAY])
def test_a_clock_that_was_wrong_and_is_set_right(jump):
    """Else an hour would last for as long as it was ahead."""
    habit = Habit(START, START)
    for hour in range(168):
        habit.note(seen(60), START + hour * HOUR)
    now = START + 168 * HOUR
    habit.note(seen(60, "203.0.113.0/24"), now + jump)
    for hour in range(60):
        habit.note(seen(60), now + hour * HOUR)
        found = habit.figures(now + hour * HOUR)
        assert found.recipients == 60 and not finding(check("volume", floor=100), found).above
    assert found.busiest == 60


def test_who_has_sent_nothing_before_has_the_floor():
    habit = Habit(START, START)
    habit.note(seen(199), START)
    assert not finding(check("volume"), habit.figures(START)).above
    habit.note(seen(1), START)
    found = finding(check("volume"), habit.figures(START))
    assert found.above and "it has sent nothing before" in found.text
    assert not finding(check("volume", floor=201), habit.figures(START)).above


def test_new_networks_count_only_for_who_was_there_before():
    habit, network = Habit(START, START), check("network")
    habit.note(seen(500), START)
    habit.note(seen(500, "198.51.100.0/24"), START + HOUR)
    assert not finding(network, habit.figures(START + HOUR)).above, "its first day"
    later = START + 3 * DAY
    habit.note(seen(500), later)
    assert not finding(network, habit.figures(later)).above
    habit.note(seen(49, "203.0.113.0/24"), later)
    assert not finding(network, habit.figures(later)).above
    habit.note(seen(1, "203.0.113.0/24"), later)
    found = finding(network, habit.figures(later))
    assert found.above and "203.0.113.0/24" in found.text
    habit.pardon(later)
    habit.note(seen(500, "203.0.113.0/24"), later)
    assert not finding(network, habit.figures(later)).above


@pytest.mark.parametrize(("failed", "ended", "above"), [
    (0, 0, False), (49, 49, False), (5, 50, False), (6, 50, True), (20, 200, False), (21, 200, True), (200, 200, True),
    (1000, 1000, True), (20, 4000, False),
])  # fmt: skip
def test_a_share_of_failures(failed, ended, above):
    habit = Habit(START, START)
    habit.note(seen(1, ended=ended - failed), START)
    habit.note(seen(1, ended=failed, failed=failed), START)
    assert finding(check("failures"), habit.figures(START)).above == above
    habit.pardon(START)
    assert not finding(check("failures"), habit.figures(START)).above


def test_spread_and_rules():
    habit = Habit(START - HOUR, START - HOUR)
    habit.note(seen(10, domains=domains(*range(9))), START - HOUR)
    habit.note(seen(10, domains=domains(*range(49))), START)
    assert not finding(check("spread"), habit.figures(START)).above
    habit.note(seen(10, domains=domains(*range(40, 60))), START)
    assert finding(check("spread"), habit.figures(START)).above
    assert not finding(check("spread", factor=10), habit.figures(START)).above
    assert not finding(check("rule"), habit.figures(START)).above
    habit.note(seen(1, rules={"other": 5}), START)
    assert not finding(check("rule"), habit.figures(START)).above
    habit.note(seen(1, rules={"r": 2}), START)
    assert finding(check("rule"), habit.figures(START)).above and not finding(check("rule", floor=3), habit.figures(START)).above
    assert not finding(check("rule"), habit.figures(START + HOUR)).above
    assert not any(finding(check(watch), NOTHING).above for watch in ("volume", "spread", "failures", "network", "rule"))
