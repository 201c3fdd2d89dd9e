"""Facts of the machine: they hold as long as they were to hold, whatever the wall clock does, and survive a restart."""

import errno
import time

import pytest

from relaymta import node
from relaymta.errors import StoreError
from relaymta.node import DEAD, SUSPENDED, Fact, Facts, Store


def fact(site: str = "s", about: str = "", seconds: float = 60, since: float = 0, kind: str = SUSPENDED) -> Fact:
    now = int((time.time() + since) * 1000)
    return Fact(kind, site, about, now, now + int(seconds * 1000), "operator", "told to")


def test_a_suspension_is_for_a_site_a_tenant_or_a_tenant_at_a_site():
    facts = Facts([fact("one"), fact("", "bulk"), fact("two", "shop")])
    assert facts.suspension("one", "anybody") is not None
    assert facts.suspension("three", "bulk") is not None
    assert facts.suspension("two", "shop") is not None
    assert facts.suspension("two", "other") is None
    assert facts.suspension("three", "") is None


@pytest.fixture
def passed(monkeypatch):
    """The clocks stand still; the milliseconds that have passed by both."""
    passed = [0]
    wall, boot = time.time_ns(), node._boot()
    monkeypatch.setattr(time, "time", lambda: wall / 1e9)
    monkeypatch.setattr(node, "_wall", lambda: wall // 1_000_000 + passed[0])
    monkeypatch.setattr(node, "_boot", lambda: boot + passed[0])
    return passed


def test_facts_expire(passed):
    facts = Facts([fact("past", since=-100), fact("short", seconds=0.05), fact("long")])
    assert {one.site for one in facts} == {"short", "long"}
    passed[0] = 51
    assert {one.site for one in facts} == {"long"}
    assert {one.site for one in facts.sweep()} == {"past", "short"}
    assert 59_940 < facts.left(fact("long")) < 59_960


def test_a_fact_from_the_future_holds_no_longer_than_it_was_to(passed):
    """The wall clock went back an hour across a restart."""
    facts = Facts([fact("s", since=3600, seconds=60)])
    assert facts.left(fact("s")) == 60_000


def test_facts_are_bounded_and_those_that_end_first_go(monkeypatch):
    monkeypatch.setattr(node, "MOST", 10)
    facts = Facts()
    for number in range(30):
        facts.learn(fact(str(number), seconds=60 + number))
    assert sorted(int(one.site) for one in facts) == list(range(20, 30))


def test_facts_survive_a_restart(tmp_path):
    store = Store(tmp_path / "node")
    names = ["s", "x" * 600, "x" * 599 + "y"]
    store.write([fact(name) for name in names] + [fact("gone", kind=DEAD)], [])
    store.write([], [fact("gone", kind=DEAD)])
    store.close()
    again = Store(tmp_path / "node")
    assert sorted(one.site for one in again.load()) == sorted(names)
    again.close()


def test_what_is_no_store_is_said(tmp_path):
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
