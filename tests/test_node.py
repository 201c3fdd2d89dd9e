"""Site states hold for their duration, whatever the wall clock does, and survive a restart."""

import errno
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta import node
from relaymta.errors import StoreError
from relaymta.node import DEAD, SUSPENDED, SiteState, SiteStates, Store


def state(site: str = "s", about: str = "", seconds: float = 60, since: float = 0, kind: str = SUSPENDED) -> SiteState:
    now = int((time.time() + since) * 1000)
    return SiteState(kind, site, about, now, now + int(seconds * 1000), "operator", "maintenance")


def test_a_suspension_is_for_a_site_a_tenant_or_a_tenant_at_a_site():
    states = SiteStates([state("one"), state("", "bulk"), state("two", "shop")])
    assert states.suspension("one", "anybody") is not None
    assert states.suspension("three", "bulk") is not None
    assert states.suspension("two", "shop") is not None
    assert states.suspension("two", "other") is None
    assert states.suspension("three", "") is None


@pytest.fixture
def passed(monkeypatch):
    """Both clocks are frozen; the milliseconds by which they are ahead."""
    passed = [0]
    wall, boot = time.time_ns(), node._boot()
    monkeypatch.setattr(time, "time", lambda: wall / 1e9)
    monkeypatch.setattr(node, "_wall", lambda: wall // 1_000_000 + passed[0])
    monkeypatch.setattr(node, "_boot", lambda: boot + passed[0])
    return passed


def test_site_states_expire(passed):
    states = SiteStates([state("past", since=-100), state("short", seconds=0.05), state("long")])
    assert {one.site for one in states} == {"short", "long"}
    passed[0] = 51
    assert {one.site for one in states} == {"long"}
    assert {one.site for one in states.sweep()} == {"past", "short"}
    assert 59_940 < states.left(state("long")) < 59_960


def test_a_site_state_from_the_future_holds_for_its_own_duration(passed):
    """The wall clock was set back an hour across a restart."""
    states = SiteStates([state("s", since=3600, seconds=60)])
    assert states.left(state("s")) == 60_000


def test_site_states_are_bounded_and_those_that_end_first_are_dropped(monkeypatch):
    monkeypatch.setattr(node, "MOST", 10)
    states = SiteStates()
    for number in range(30):
        states.learn(state(str(number), seconds=60 + number))
    assert sorted(int(one.site) for one in states) == list(range(20, 30))


def test_who_stores_the_states_hears_of_those_that_are_dropped(monkeypatch):
    monkeypatch.setattr(node, "MOST", 10)
    states = SiteStates(state(str(number), seconds=60 + number) for number in range(10))
    assert states.learn(state("5", seconds=600)) == [], "it replaces one"
    assert [one.site for one in states.learn(state("more", seconds=100))] == ["0"]
    assert [one.site for one in states.learn(state("first", seconds=1))] == ["first"]


@given(
    st.lists(st.tuples(st.sampled_from(["learn", "learn", "learn", "forget", "sweep", "pass"]), st.integers(0, 9)), max_size=60)
)
def test_states_are_those_of_a_plain_model(steps):
    """`model`: key -> (state, end); what ends first is dropped beyond six."""
    with pytest.MonkeyPatch.context() as patch:
        now = [1_000_000]
        patch.setattr(node, "_boot", lambda: now[0])
        patch.setattr(node, "_wall", lambda: now[0])
        patch.setattr(node, "MOST", 6)
        states = SiteStates()
        model: dict[tuple[str, str, str], tuple[SiteState, int]] = {}
        for serial, (verb, number) in enumerate(steps):
            kind, site = (DEAD if number % 2 else SUSPENDED), str(number)
            if verb == "learn":
                end = now[0] + 1000 * (serial * 7 % 50) + serial
                one = SiteState(kind, site, "", now[0], end, "operator", "")
                model[one.key] = (one, end)
                dropped = [key for key, _ in sorted(model.items(), key=lambda pair: pair[1][1])[: max(0, len(model) - 6)]]
                assert states.learn(one) == [model.pop(key)[0] for key in dropped]
            elif verb == "forget":
                assert states.forget(kind, site, "") == model.pop((kind, site, ""), (None, 0))[0]
            elif verb == "pass":
                now[0] += 10_000
            else:
                ended = [key for key, (_, end) in sorted(model.items(), key=lambda pair: pair[1][1]) if end <= now[0]]
                assert states.sweep() == [model.pop(key)[0] for key in ended]
            kept = [one for one, end in model.values() if end > now[0]]
            assert sorted(states, key=lambda one: one.key) == sorted(kept, key=lambda one: one.key)
            assert [one for one in kept if one.kind == DEAD] == sorted(
                states.of(DEAD), key=lambda one: list(model).index(one.key)
            )
            assert len(states._ends) <= 2 * len(model) + 1001


def test_a_state_costs_the_same_however_many_there_are(monkeypatch):
    """The CPU time of learning states beyond MOST, at 16 times as many."""

    def seconds(most: int) -> float:
        monkeypatch.setattr(node, "MOST", most)
        states = SiteStates(state(str(number), seconds=60 + number) for number in range(most))
        more = [state(f"more {number}", seconds=10**6 + number) for number in range(50)]
        began = time.thread_time()
        for one in more:
            states.learn(one)
        return time.thread_time() - began

    assert min(seconds(16_000) for _ in range(4)) < 6 * max(seconds(1000) for _ in range(4))


def test_site_states_survive_a_restart(tmp_path):
    store = Store(tmp_path / "node")
    names = ["s", "x" * 600, "x" * 599 + "y"]
    store.write([state(name) for name in names] + [state("gone", kind=DEAD)], [])
    store.write([], [state("gone", kind=DEAD)])
    store.close()
    again = Store(tmp_path / "node")
    assert sorted(one.site for one in again.load()) == sorted(names)
    again.close()


def test_what_was_forgotten_after_it_was_learned_is_not_stored(tmp_path):
    """The changes of one commit."""
    store = Store(tmp_path / "node")
    was, gone, again = state("gone"), state("gone"), state("again")
    store.write([was, gone, again], [gone, again])
    assert store.load() == []
    fresh = state("again", seconds=70)
    store.write([again, fresh], [again])
    assert store.load() == [fresh]
    store.close()


def test_a_path_that_cannot_be_a_store_is_an_error(tmp_path):
    (tmp_path / "node").write_text("not a folder")
    with pytest.raises(StoreError, match="node"):
        Store(tmp_path / "node")


@pytest.mark.parametrize("left", [None, b""])
def test_the_secret_is_made_once_and_is_never_empty(tmp_path, monkeypatch, left):
    if left is not None:
        (tmp_path / "secret").write_bytes(left)
    with monkeypatch.context() as full:

        def refuse(count: int) -> bytes:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(node.os, "urandom", refuse)
        with pytest.raises(OSError):
            node.keep_secret(tmp_path)
    node.keep_secret(tmp_path)
    made = (tmp_path / "secret").read_bytes()
    node.keep_secret(tmp_path)
    assert (
        len(made) == 32 and (tmp_path / "secret").read_bytes() == made and (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    )
