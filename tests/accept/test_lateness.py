"""Load shedding: when the event loop counts as overloaded, and that this is logged once at its beginning and once at its end."""

import pytest

from relaymta.accept.lateness import BEAT, OWN_SECONDS, Lateness


class Loop:
    """A loop's clock, and what is logged."""

    def __init__(self) -> None:
        self.time = 100.0
        self.logged: list[str] = []
        self.lateness = Lateness(lambda: self.time, self.logged.append)

    def beat(self, lag: float = 0.0, most: float = 0.1) -> bool:
        self.time += BEAT + lag
        self.lateness.beat(most)
        return self.lateness.shedding


@pytest.mark.parametrize(
    ("lags", "shedding"),
    [
        ([0.2] * 2, False), ([0.2] * 3, True), ([5.0], False), ([0.09] * 50, False), ([0.2, *[0.0] * 40, 0.2, 0.2], True),
        ([0.2, 0.2, *[0.0] * 100, 0.2], False),
    ],
)  # fmt: skip
def test_three_late_beats_within_five_seconds(lags, shedding):
    loop = Loop()
    assert [loop.beat(lag) for lag in lags][-1] is shedding


def test_the_beginning_and_the_end_are_logged_once():
    loop = Loop()
    for _ in range(10):
        loop.beat(0.25)
        loop.lateness.turned_away += 3
    for _ in range(200):
        loop.beat()
    assert loop.logged == [
        "load shedding begins, new clients get 421: the event loop was later than intake.shed_lag (0.1 s) 3 times in 5 s, the "
        "last time by 0.25 s",
        "load shedding ends: 24 clients got 421 in 7 s",
    ]
    assert [loop.beat(0.25) for _ in range(3)] == [False, False, True] and len(loop.logged) == 3


@pytest.mark.parametrize("inside", [True, False], ids=["ends between beats", "is under way at the beat"])
def test_a_stall_of_our_own_making_is_not_load(inside):
    """A reload that keeps the loop busy for a second, many times in a row, each time in front of or around a beat."""
    loop = Loop()
    for _ in range(20):
        with loop.lateness.own_work():
            loop.time += 1
            if inside:
                loop.beat()
        loop.beat()
        loop.beat()
    assert not loop.lateness.shedding and not loop.logged


def test_the_supervisors_part_of_a_reload_is_not_load_either():
    loop = Loop()
    for _ in range(20):
        assert not loop.beat(0.3) and not loop.beat(0.3)
        with loop.lateness.own_work():
            loop.time += 1
        loop.beat()


def test_load_during_our_own_work_is_found_after_it():
    loop = Loop()
    with loop.lateness.own_work():
        loop.beat(0.3)
    assert [loop.beat(0.3) for _ in range(4)] == [False, False, False, True], "the first is the end of our own work"


def test_own_work_that_does_not_end_hides_no_load():
    loop = Loop()
    with loop.lateness.own_work():
        assert not any(loop.beat(1) for _ in range(int(OWN_SECONDS) - 2))
        assert any(loop.beat(1) for _ in range(6))


def test_own_work_does_not_end_load_shedding_either():
    loop = Loop()
    for _ in range(3):
        loop.beat(0.3)
    with loop.lateness.own_work():
        assert all(loop.beat() for _ in range(200))


def test_it_can_be_switched_off():
    loop = Loop()
    assert loop.beat(1) is loop.beat(1) is False and loop.beat(1) is True
    assert loop.beat(1, 0) is False
    assert not any(loop.beat(1, 0) for _ in range(10))
