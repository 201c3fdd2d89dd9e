"""What a cancellation, or an error that nobody expects, leaves behind in delivery: nothing that is taken, nothing that waits."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.config import Config
from relaymta.errors import StoreError
from relaymta.log import Log
from relaymta.metrics import Counters
from relaymta.node import HOLD, LEARNED, Fact, Facts
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
    """What the dispatcher asks of its queue, noted down."""

    def __init__(self) -> None:
        self.time = 1_000_000
        self.clock = SimpleNamespace(now=lambda: self.time, wall=lambda moment: moment)
        self.writer = SimpleNamespace(stalled=False)
        self.returned: list[Entry] = []
        self.finished: list[tuple[Entry, Any, int]] = []
        self.parked: dict[int, int] = {}
        self.changes: list[Callable[[], Any]] = []  # what changing messages comes to, one after the other

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

    async def release_ordered(self, still: Any) -> int:
        return 0

    async def read_texts(self, entries: list[Entry]) -> Any:
        raise OSError(5, "the disk is gone")


@pytest.fixture
async def made(tmp_path):
    settings = {
        "listener": [{"address": "127.0.0.1:1"}],
        "route": [{"hosts": ["127.0.0.1:1"], "recipient_domain": ["smart.test"]}],
    }
    config, shared = Config.model_validate(settings), Shared.create()
    dispatcher = Dispatcher(
        config, RouteTable(config), shared.limits(0, 1), shared.rates(1), shared.flying(0), Counters(shared.counters(0)),
        Log(str(tmp_path / "log"), 0), SimpleNamespace(now=lambda: 0.0), set(), Facts(), lambda fact, key: None,
    )  # fmt: skip
    dispatcher.queue = FakeQueue()
    yield dispatcher
    dispatcher._timer.cancel()
    for task in list(dispatcher._tasks):
        task.cancel()
    await asyncio.gather(*dispatcher._tasks, return_exceptions=True)


def entry(number: int, domain: str = "d.test", application: str = "", text: list[bytes] | None = None) -> Entry:
    envelope = Envelope(
        sender="a@b.test", recipients=[f"c@{domain}"], size=1, flags=0, arrived=0, deadline=0, application=application
    )
    envelope.body = Body(1, 1, 1, 1)
    route = "127.0.0.1:1" if domain == "smart.test" else "mx"
    name = QueueName(route, "" if domain == "smart.test" else domain, application)
    return Entry(number, envelope, name, 1 + len(application), 0, 0, None, True, text)


def taken(dispatcher: Dispatcher) -> int:
    return dispatcher.room._limits.taken("out")


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_look_up_that_is_cancelled_gives_its_mail_back(made):
    made.sites.find = lambda name: asyncio.sleep(60)
    waiting = [entry(1), entry(2)]
    for one in waiting:
        made.offer(one)
    await turns()
    for task in list(made._tasks):
        task.cancel()
    await turns()
    assert (made._asking, made.queue.returned) == ({}, waiting)
    assert made._lookups._value == 200


async def test_look_ups_of_a_domain_for_many_tenants_are_one_failure(made):
    answers = [asyncio.get_running_loop().create_future() for _ in range(3)]
    left = list(answers)
    made.sites.find = lambda name: left.pop(0)
    for number, answer in enumerate(answers):
        made.offer(entry(number, application="x" * number))
        await turns()
        del answer
    await asyncio.sleep(0.01)
    for answer in answers:
        answer.set_exception(NoRoute(False, "4.4.3", "DNS failed"))
        await turns()
        await asyncio.sleep(0.01)
    failures, until = made.nowhere(entry(9).name)
    assert failures == 1
    assert len(made.queue.finished) == 1 and len(made.queue.returned) == 2
    assert set(made.queue.parked.values()) == {until}


@pytest.mark.parametrize("how", ["cancelled", "unexpected", "refused"])
async def test_a_connection_that_is_not_opened_gives_its_place_back(made, how):
    async def opened(site: Any, source: Any, timeout: float = 0.0) -> Any:
        if how == "cancelled":
            await asyncio.sleep(60)
        raise ConnectFailed("connect", "refused") if how == "refused" else ZeroDivisionError

    made.opener.open = opened
    for number in range(8):
        made.offer(entry(number, "smart.test", text=[b"x"]))
    (pool,) = made.pools.values()
    assert (pool.connecting, taken(made)) == (5, 5)
    await turns()
    for task in list(made._tasks):
        task.cancel()
    await turns()
    assert (pool.connecting, taken(made)) == (0, 0)
    assert pool.failures == (0 if how == "cancelled" else 1)


async def test_attempts_that_began_before_the_site_was_known_to_be_up_or_down_tell_nothing(made):
    """Five at once, of which one fails; then one gets through; then the others fail, too; then one that began afterwards."""
    doors = [asyncio.get_running_loop().create_future() for _ in range(7)]
    left = list(doors)
    made.opener.open = lambda site, source, timeout=0.0: left.pop(0)
    for number in range(5):
        made.offer(entry(number, "smart.test", text=[b"x"]))
    await turns()
    (pool,) = made.pools.values()
    await asyncio.sleep(0.01)
    doors[0].set_exception(ConnectFailed("connect", "refused"))
    await turns()
    assert pool.failures == 1
    until = pool.down_until
    doors[1].set_exception(ConnectFailed("connect", "refused"))
    await turns()
    assert (pool.failures, pool.down_until) == (1, until)
    await asyncio.sleep(0.01)
    made.decisions._dead_elsewhere(pool, None)  # another worker has got through
    for door in doors[2:5]:
        door.set_exception(ConnectFailed("connect", "refused"))
        await turns()
    assert (pool.failures, pool.down_until) == (0, 0)
    await asyncio.sleep(0.01)
    made.offer(entry(9, "smart.test", text=[b"x"]))
    await turns()
    doors[5].set_exception(ConnectFailed("connect", "refused"))
    await turns()
    assert pool.failures == 1


async def test_texts_that_cannot_be_read_are_read_again(made):
    pool = _pool(made)
    pool.ready.push(entry(1, "smart.test"))
    made._load(pool)
    await turns()
    assert not pool.loading
    assert len(pool.ready) == 1


def _pool(dispatcher: Dispatcher) -> Pool:
    one = entry(0, "smart.test")
    site = dispatcher.sites.known(one.name)
    assert site is not None
    return dispatcher._pool(site, one)


@pytest.mark.parametrize("how", ["cancelled", "unexpected"])
async def test_mail_for_which_another_host_is_sought_is_not_left_in_flight(made, how):
    async def peers(site: Any) -> list[Peer]:
        if how == "cancelled":
            await asyncio.sleep(60)
        raise ZeroDivisionError

    made.opener.peers = peers
    one = entry(1, "smart.test", text=[b"x"])
    made._spawn(made._try_elsewhere(_pool(made), one, "h", ("5.6.3", "8-bit")))
    await turns()
    for task in list(made._tasks):
        task.cancel()
    await turns()
    assert made.queue.returned == ([one] if how == "cancelled" else [])
    assert [results[0].kind for _, results, _ in made.queue.finished] == ([] if how == "cancelled" else ["transient"])


async def test_a_host_that_hangs_up_behind_its_greeting_bounces_nothing(made):
    """Another host may take the message; it was only gone when we looked."""

    async def peers(site: Any) -> list[Peer]:
        return [Peer("other", "127.0.0.1", 1)]

    async def to(site: Any, peer: Peer, source: Any, timeout: float = 0.0) -> Any:
        return SimpleNamespace(ended=True, core=SimpleNamespace(features=None))

    made.opener.peers, made.opener.to = peers, to
    await made._try_elsewhere(_pool(made), entry(1, "smart.test"), "h", ("5.6.3", "8-bit"))
    assert [results[0].kind for _, results, _ in made.queue.finished] == ["transient"]
    assert taken(made) == 0


async def test_an_order_that_could_not_be_obeyed_is_obeyed_later(made):
    def full() -> Any:
        raise StoreError("the disk is full")

    now = wall_ms()
    made._facts.learn(Fact(HOLD, "recipient_domain=smart.test", "", now, now + 60_000, "operator", "wait"))
    made.orders.refresh()
    made.queue.changes = [full]
    for number in range(2):
        made.offer(entry(number, "smart.test"))
        await turns()
    assert made.orders._to_hold == []
    assert not made.orders._holding


async def test_connections_that_stand_still_together_halve_the_window_once(made):
    pool = _pool(made)
    pool.window = 16.0
    for _ in range(5):
        pool.timed_out(since=100.0, now=400.0)
    assert pool.window == 8.0
    pool.timed_out(since=401.0, now=700.0)
    assert pool.window == 4.0


async def test_many_suspects_of_a_site_that_is_down(made):
    """What was in flight when a worker was killed: one is charged with the attempt, the others go back, however many they are."""
    count = 500
    made._suspects.update(range(1, count + 1))
    entries = [entry(n, "smart.test") for n in range(1, count + 1)]
    for one in entries:
        made.offer(one)
    assert made._alone is entries[0] and len(made._lineup) == count - 1
    pool = next(iter(made.pools.values()))
    made._site_failed(pool, ConnectFailed("connect", "refused"))
    (first, _, _) = made.queue.finished[0]
    made.landed(first)
    assert made._alone is None and made._lineup == []
    assert len(made.queue.returned) == count - 1


@pytest.mark.parametrize(
    ("said", "before", "kept"),
    [(None, 1.0, False), (None, 60.0, True), (Said(421, b"4.7.0 too fast", "connect"), 1.0, True)],
    ids=["a farewell", "long before", "it is there, and says no"],
)
async def test_what_a_host_says_while_it_goes_down_is_no_rate(made, said, before, kept):
    """421 to a message teaches a rate; not where the host is gone some seconds later, or the mail of an outage would creep."""
    made.offer(entry(1, "smart.test"))
    pool = next(iter(made.pools.values()))
    pool.learn("rate", 1.5, "421 4.3.2 shutting down", made.loop.time() - before + HOLD_SECONDS)
    made.decisions.learned(pool, "rate")
    made._site_failed(pool, ConnectFailed("connect", "refused", said=said))
    assert ("rate" in pool.learned) == kept
    assert (made.decisions.facts.get(LEARNED, pool.shape.key, "rate") is not None) == kept
