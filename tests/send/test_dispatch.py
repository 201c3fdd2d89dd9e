"""Delivery after a cancellation or an unexpected error: no connection stays counted, and no entry stays in flight."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.config import Config
from relaymta.errors import StoreError
from relaymta.log import Log
from relaymta.metrics import Counters
from relaymta.node import HOLD, LEARNED, SiteState, SiteStates
from relaymta.proto.envelope import Body, Envelope, QueueName
from relaymta.proto.smtp_client import Said
from relaymta.queue import Entry, wall_ms
from relaymta.route.mx import NoRoute
from relaymta.route.table import RouteTable
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.dispatch import Dispatcher
from relaymta.send.pool import HOLD_SECONDS, Pool
from relaymta.shm import Shared


class FakeQueue:
    """Records the calls that the dispatcher makes to its queue."""

    def __init__(self) -> None:
        self.time = 1_000_000
        self.clock = SimpleNamespace(now=lambda: self.time, wall=lambda moment: moment)
        self.writer = SimpleNamespace(stalled=False)
        self.returned: list[Entry] = []
        self.finished: list[tuple[Entry, Any, int]] = []
        self.parked: dict[int, int] = {}
        self.changes: list[Callable[[], Any]] = []  # results of `change_messages`, in order

    def put_back(self, entry: Entry) -> None:
        entry.cancelled = True
        self.returned.append(entry)

    def finish(self, entry: Entry, results: Any, retry_after: int = 0) -> None:
        self.finished.append((entry, results, retry_after))

    def park(self, queue: int, until: int) -> None:
        self.parked[queue] = until

    async def wake_queues(self, numbers: Any = None) -> None:
        for number in numbers or list(self.parked):
            self.parked.pop(number, None)

    async def change_messages(self, verb: str, idents: list[int]) -> tuple[int, int]:
        return self.changes.pop(0)() if self.changes else (len(idents), 0)

    async def release_policy_held(self, still: Any) -> int:
        return 0

    async def read_data(self, entries: list[Entry]) -> Any:
        raise OSError(5, "the disk is gone")


@pytest.fixture
async def made(tmp_path):
    settings = {
        "listener": [{"address": "127.0.0.1:1"}],
        "route": [{"hosts": ["127.0.0.1:1"], "recipient_domain": ["smart.test"]}],
    }
    config, shared = Config.model_validate(settings), Shared.create()
    dispatcher = Dispatcher(
        config, RouteTable(config), shared.limits(0, 1), shared.rates(1), shared.in_flight(0), Counters(shared.counters(0)),
        Log(str(tmp_path / "log"), 0), SimpleNamespace(now=lambda: 0.0), set(), SiteStates(), lambda state, key: None,
    )  # fmt: skip
    dispatcher.queue = FakeQueue()
    yield dispatcher
    dispatcher._timer.cancel()
    for task in list(dispatcher._tasks):
        task.cancel()
    await asyncio.gather(*dispatcher._tasks, return_exceptions=True)


def entry(number: int, domain: str = "d.test", application: str = "", data: list[bytes] | None = None) -> Entry:
    envelope = Envelope(
        sender="a@b.test", recipients=[f"c@{domain}"], size=1, flags=0, arrived=0, deadline=0, application=application
    )
    envelope.body = Body(1, 1, 1, 1)
    route = "127.0.0.1:1" if domain == "smart.test" else "mx"
    name = QueueName(route, "" if domain == "smart.test" else domain, application)
    return Entry(number, envelope, name, 1 + len(application), 0, 0, None, True, data)


def taken(dispatcher: Dispatcher) -> int:
    return dispatcher.room._limits.taken("out")


async def ticks(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_cancelled_lookup_puts_its_entries_back(made):
    made.sites.find = lambda name: asyncio.sleep(60)
    waiting = [entry(1), entry(2)]
    for one in waiting:
        made.offer(one)
    await ticks()
    for task in list(made._tasks):
        task.cancel()
    await ticks()
    assert (made._asking, made.queue.returned) == ({}, waiting)
    assert made._lookups._value == 200


async def test_lookups_of_a_domain_for_many_tenants_are_one_failure(made):
    answers = [asyncio.get_running_loop().create_future() for _ in range(3)]
    left = list(answers)
    made.sites.find = lambda name: left.pop(0)
    for number, answer in enumerate(answers):
        made.offer(entry(number, application="x" * number))
        await ticks()
        del answer
    await asyncio.sleep(0.01)
    for answer in answers:
        answer.set_exception(NoRoute(False, "4.4.3", "DNS failed"))
        await ticks()
        await asyncio.sleep(0.01)
    failures, until = made.unresolved(entry(9).name)
    assert failures == 1
    assert len(made.queue.finished) == 1 and len(made.queue.returned) == 2
    assert set(made.queue.parked.values()) == {until}


@pytest.mark.parametrize("how", ["cancelled", "unexpected", "refused"])
async def test_a_connection_that_is_not_opened_is_not_counted(made, how):
    async def opened(site: Any, source: Any, timeout: float = 0.0) -> Any:
        if how == "cancelled":
            await asyncio.sleep(60)
        raise ConnectFailed("connect", "refused") if how == "refused" else ZeroDivisionError

    made.opener.open = opened
    for number in range(8):
        made.offer(entry(number, "smart.test", data=[b"x"]))
    (pool,) = made.pools.values()
    assert (pool.connecting, taken(made)) == (5, 5)
    await ticks()
    for task in list(made._tasks):
        task.cancel()
    await ticks()
    assert (pool.connecting, taken(made)) == (0, 0)
    assert pool.failures == (0 if how == "cancelled" else 1)


async def test_attempts_that_began_before_the_site_was_found_up_or_down_do_not_count(made):
    """Five at once, of which one fails; then one succeeds; then the others fail, too; then one that began afterwards."""
    attempts = [asyncio.get_running_loop().create_future() for _ in range(7)]
    left = list(attempts)
    made.opener.open = lambda site, source, timeout=0.0: left.pop(0)
    for number in range(5):
        made.offer(entry(number, "smart.test", data=[b"x"]))
    await ticks()
    (pool,) = made.pools.values()
    await asyncio.sleep(0.01)
    attempts[0].set_exception(ConnectFailed("connect", "refused"))
    await ticks()
    assert pool.failures == 1
    until = pool.down_until
    attempts[1].set_exception(ConnectFailed("connect", "refused"))
    await ticks()
    assert (pool.failures, pool.down_until) == (1, until)
    await asyncio.sleep(0.01)
    made.decisions._dead_elsewhere(pool, None)  # another worker has connected
    for attempt in attempts[2:5]:
        attempt.set_exception(ConnectFailed("connect", "refused"))
        await ticks()
    assert (pool.failures, pool.down_until) == (0, 0)
    await asyncio.sleep(0.01)
    made.offer(entry(9, "smart.test", data=[b"x"]))
    await ticks()
    attempts[5].set_exception(ConnectFailed("connect", "refused"))
    await ticks()
    assert pool.failures == 1


async def test_message_data_that_could_not_be_read_is_read_again(made):
    pool = _pool(made)
    pool.ready.push(entry(1, "smart.test"))
    made._load(pool)
    await ticks()
    assert not pool.loading
    assert len(pool.ready) == 1


def _pool(dispatcher: Dispatcher) -> Pool:
    one = entry(0, "smart.test")
    site = dispatcher.sites.known(one.name)
    assert site is not None
    return dispatcher._pool(site, one)


@pytest.mark.parametrize("how", ["cancelled", "unexpected"])
async def test_an_entry_for_which_another_host_is_tried_is_not_left_in_flight(made, how):
    async def peers(site: Any) -> list[Peer]:
        if how == "cancelled":
            await asyncio.sleep(60)
        raise ZeroDivisionError

    made.opener.peers = peers
    one = entry(1, "smart.test", data=[b"x"])
    made._spawn(made._try_elsewhere(_pool(made), one, "h", ("5.6.3", "8-bit")))
    await ticks()
    for task in list(made._tasks):
        task.cancel()
    await ticks()
    assert made.queue.returned == ([one] if how == "cancelled" else [])
    assert [results[0].kind for _, results, _ in made.queue.finished] == ([] if how == "cancelled" else ["transient"])


async def test_a_host_that_closes_after_its_greeting_bounces_nothing(made):
    """Another host may accept the message; it was not reachable now."""

    async def peers(site: Any) -> list[Peer]:
        return [Peer("other", "127.0.0.1", 1)]

    async def to(site: Any, peer: Peer, source: Any, timeout: float = 0.0) -> Any:
        return SimpleNamespace(ended=True, core=SimpleNamespace(features=None))

    made.opener.peers, made.opener.to = peers, to
    await made._try_elsewhere(_pool(made), entry(1, "smart.test"), "h", ("5.6.3", "8-bit"))
    assert [results[0].kind for _, results, _ in made.queue.finished] == ["transient"]
    assert taken(made) == 0


async def test_a_policy_that_could_not_be_applied_is_applied_later(made):
    def full() -> Any:
        raise StoreError("the disk is full")

    now = wall_ms()
    made._states.learn(SiteState(HOLD, "recipient_domain=smart.test", "", now, now + 60_000, "operator", "wait"))
    made.policies.refresh()
    made.queue.changes = [full]
    for number in range(2):
        made.offer(entry(number, "smart.test"))
        await ticks()
    assert made.policies._to_hold == []
    assert not made.policies._holding


async def test_connections_that_stall_together_halve_the_window_once(made):
    pool = _pool(made)
    pool.window = 16.0
    for _ in range(5):
        pool.timed_out(since=100.0, now=400.0)
    assert pool.window == 8.0
    pool.timed_out(since=401.0, now=700.0)
    assert pool.window == 4.0


async def test_many_probed_entries_for_a_site_that_is_down(made):
    """Messages in flight when a worker was killed: one is charged with the attempt, the others are put back."""
    count = 500
    made._probed.update(range(1, count + 1))
    entries = [entry(n, "smart.test") for n in range(1, count + 1)]
    for one in entries:
        made.offer(one)
    assert made._probing is entries[0] and len(made._to_probe) == count - 1
    pool = next(iter(made.pools.values()))
    made._site_failed(pool, ConnectFailed("connect", "refused"))
    (first, _, _) = made.queue.finished[0]
    made.landed(first)
    assert made._probing is None and made._to_probe == []
    assert len(made.queue.returned) == count - 1


@pytest.mark.parametrize(
    ("said", "before", "kept"),
    [(None, 1.0, False), (None, 60.0, True), (Said(421, b"4.7.0 too fast", "connect"), 1.0, True)],
    ids=["shutdown", "long before", "reachable, and replies 421"],
)
async def test_421_from_a_host_that_shuts_down_is_no_rate_limit(made, said, before, kept):
    """A rate is learned from 421 to a message, but not where the host is down seconds later, or its mail would then be slow."""
    made.offer(entry(1, "smart.test"))
    pool = next(iter(made.pools.values()))
    pool.learn("rate", 1.5, "421 4.3.2 shutting down", made.loop.time() - before + HOLD_SECONDS)
    made.decisions.learned(pool, "rate")
    made._site_failed(pool, ConnectFailed("connect", "refused", said=said))
    assert ("rate" in pool.learned) == kept
    assert (made.decisions.states.get(LEARNED, pool.shape.key, "rate") is not None) == kept
