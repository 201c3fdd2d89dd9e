"""Site states hold for their duration, whatever the wall clock does, and survive a restart."""

import errno
import time

import pytest

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


def test_site_states_survive_a_restart(tmp_path):
    store = Store(tmp_path / "node")
    names = ["s", "x" * 600, "x" * 599 + "y"]
    store.write([state(name) for name in names] + [state("gone", kind=DEAD)], [])
    store.write([], [state("gone", kind=DEAD)])
    store.close()
    again = Store(tmp_path / "node")
    assert sorted(one.site for one in again.load()) == sorted(names)
    again.close()


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
