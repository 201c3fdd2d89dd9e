"""Decisions about sites that the machine publishes: applied to the pools that they are about, and to these only."""

import time
from types import SimpleNamespace

import pytest

from relaymta.log import Log
from relaymta.node import DEAD, LEARNED, SLOW, SUSPENDED, SiteState, SiteStates
from relaymta.send.decisions import Decisions


class Pools(dict):
    """Pools that say when somebody goes through all of them."""

    gone_through = 0

    def values(self):
        self.gone_through += 1
        return super().values()

    __iter__ = items = None


class FakePool:
    """What decisions read and call of a pool."""

    def __init__(self, key: str, shape: str) -> None:
        self.key, self.shape = key, SimpleNamespace(key=shape)
        self.sessions, self.down_until, self.slow_until = [], 0, 0.0
        self.learned: dict[str, float] = {}
        self.calls: list[str] = []

    def down(self, failures, until, reason, now, probed):
        self.down_until = until
        self.calls.append("down")

    def up(self, now):
        self.down_until = 0
        self.calls.append("up")

    def slow_down(self, *args):
        self.calls.append("slow")

    def learn(self, limit, value, reply, until):
        self.learned[limit] = value
        self.calls.append("learn")


@pytest.fixture
def made(tmp_path):
    """Decisions and pools: 300 sites with a limit of their own, each with two sources."""
    pools = Pools()
    back: list[str] = []
    log = Log(str(tmp_path / "log"), 0)
    decisions = Decisions(
        SiteStates(), lambda state, key: None, log, pools, time.monotonic, lambda: time.time_ns() // 1_000_000,
        lambda pool, until, tenant: back.append(pool.key), lambda: back.append("wake"), lambda pool: None,
    )  # fmt: skip
    for number in range(300):
        for source in ("", " from one"):
            pool = pools[f"s{number}{source}"] = FakePool(f"s{number}{source}", f"limit {number}")
            decisions.recall(pool)
    yield SimpleNamespace(decisions=decisions, pools=pools, back=back)
    log.close()


def publish(made: SimpleNamespace, kind: str, site: str, about: str = "", gone: bool = False) -> list[str]:
    """Publish a state as another worker learned it, or its removal; the pools that were called."""
    now = time.time_ns() // 1_000_000
    state = None if gone else SiteState(kind, site, about, now, now + 60_000, "automatic", "", "", 2.0)
    if state is not None:
        made.decisions.states.learn(state)
    made.pools.gone_through = 0
    made.back.clear()
    for key in list(dict.keys(made.pools)):
        made.pools[key].calls.clear()
    made.decisions.changed(state, (kind, site, about))
    return [pool.key for pool in dict.values(made.pools) if pool.calls or pool.key in made.back]


@pytest.mark.parametrize(
    ("kind", "site", "about", "concerned"),
    [
        (DEAD, "s7 from one", "", ["s7 from one"]),
        (SLOW, "limit 7", "", ["s7", "s7 from one"]),
        (LEARNED, "limit 7", "rate", ["s7", "s7 from one"]),
        (SUSPENDED, "limit 7", "", ["s7", "s7 from one"]),
        (SUSPENDED, "limit 7", "shop", ["s7", "s7 from one"]),
        (DEAD, "unknown", "", []),
        (SLOW, "unknown", "", []),
    ],
)
def test_a_state_costs_what_the_pools_cost_that_it_is_about(made, kind, site, about, concerned):
    assert publish(made, kind, site, about) == concerned
    assert not made.pools.gone_through
    publish(made, kind, site, about, gone=True)
    assert not made.pools.gone_through
    assert not any(made.pools[key].learned or made.pools[key].down_until for key in concerned)


def test_a_suspended_tenant_is_suspended_at_all_sites(made):
    assert len(publish(made, SUSPENDED, "", "shop")) == 600


def test_pools_that_are_gone_are_not_remembered(made):
    for number in range(10_000):
        pool = FakePool(f"x{number}", f"gone {number}")
        made.pools[pool.key] = pool
        made.decisions.recall(pool)
        del made.pools[pool.key]
    assert len(made.decisions._by_shape) <= 300 + 2 * 600 + 1001
    assert publish(made, SLOW, "limit 7") == ["s7", "s7 from one"]
    assert publish(made, SLOW, "gone 9999") == []
