"""Delivery after a cancellation or an unexpected error: no connection stays counted, and no entry stays in flight."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.config import Config
from relaymta.errors import StoreError
from relaymta.log import Log
from relaymta.metrics import THROTTLES, Counters
from relaymta.node import BOUNCE, HOLD, LEARNED, SUSPENDED, SiteState, SiteStates
from relaymta.proto.envelope import TRANSIENT, Attempt, Body, Envelope, QueueName
from relaymta.proto.smtp_client import Mail, Said
from relaymta.queue import Entry, wall_ms
from relaymta.queue.lifecycle import CLAIMED, IN_FLIGHT, ON_DISK, WAITING
from relaymta.route.mx import Hosts, NoRoute
from relaymta.route.shaping import Limit
from relaymta.route.sites import Site
from relaymta.route.table import RouteTable
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.connections import THROTTLED
from relaymta.send.dispatch import Dispatcher
from relaymta.send.oauth import Tokens
from relaymta.send.outcomes import IN_DOUBT
from relaymta.send.pool import HOLD_SECONDS, Pool
from relaymta.send.session import Link
from relaymta.send.trail import Trail
from relaymta.shm import Shared


class FakeQueue:
    """Records the calls that the dispatcher makes to its queue."""

    def __init__(self) -> None:
        self.time = 1_000_000
        self.clock = SimpleNamespace(now=lambda: self.time, wall=lambda moment: moment)
        self.stalled = False
        self.returned: list[Entry] = []
        self.finished: list[tuple[Entry, Any, int]] = []
        self.parked: dict[int, int] = {}
        self.held: list[list[int]] = []  # ids of each `change_messages`
        self.held_by: dict[int, str] = {}  # the policies of all of them
        self.entries: list[Entry] = []  # that it claims
        self.releases = 0  # how often mail of hold policies that ended was asked for
        self.changes: list[Callable[[], Any]] = []  # results of `change_messages`, in order

    def begin(self, entry: Entry) -> bool:
        if not entry.waiting:
            return False
        entry.state = IN_FLIGHT
        return True

    def again(self, entry: Entry) -> None:
        entry.state = WAITING

    def put_back(self, entry: Entry) -> None:
        entry.state = ON_DISK
        self.returned.append(entry)

    def finish(self, entry: Entry, results: Any, retry_after: int = 0) -> None:
        self.finished.append((entry, results, retry_after))

    def park(self, queue: int, until: int) -> None:
        self.parked[queue] = until

    def skip_no_longer(self, queues: Any) -> None:
        pass

    async def wake_queues(self, numbers: Any = None) -> None:
        for number in numbers or list(self.parked):
            self.parked.pop(number, None)

    async def change_messages(self, verb: str, chosen: Callable[[], list[int]], names: Any) -> tuple[int, int]:
        idents = chosen()
        self.held += [idents] if idents else []
        self.held_by |= names
        if self.changes:
            return self.changes.pop(0)()
        for one in self.entries:
            if one.ident in idents:
                one.state = CLAIMED
        return len(idents), 0

    async def release_policy_held(self, still: Any) -> int:
        self.releases += 1
        return 0

    async def read(self, entries: list[Entry]) -> Any:
        raise OSError(5, "the disk is gone")


SETTINGS = {
    "listener": [{"address": "127.0.0.1:1"}],
    "route": [{"hosts": ["127.0.0.1:2"], "recipient_domain": ["smart.test"]}],
}


@pytest.fixture
async def made(tmp_path):
    config, shared = Config.model_validate(SETTINGS), Shared.create()
    dispatcher = Dispatcher(
        config, RouteTable(config), shared.limits(0, 1), shared.rates(1), shared.in_flight(0), Counters(shared.counters(0)),
        Log(str(tmp_path / "log"), 0), SimpleNamespace(now=lambda: 0.0), {}, SiteStates(), lambda state, key: None,
        Tokens(None),
    )  # fmt: skip
    dispatcher.queue = FakeQueue()
    yield dispatcher
    dispatcher._timer.cancel()
    for task in list(dispatcher.tasks._running):
        task.cancel()
    await asyncio.gather(*dispatcher.tasks._running, return_exceptions=True)


def entry(number: int, domain: str = "d.test", application: str = "", data: list[bytes] | None = None) -> Entry:
    envelope = Envelope(
        sender="a@b.test", recipients=[f"c@{domain}"], size=1, flags=0, arrived=0, deadline=0, application=application
    )
    envelope.body = Body(1, 1, 1, 1)
    route = "127.0.0.1:2" if domain == "smart.test" else "mx"
    name = QueueName(route, "" if domain == "smart.test" else domain, application)
    made = Entry(number, envelope, name, 1 + len(application), 0, 0, None, True, data)
    made.state = WAITING
    return made


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
    for task in list(made.tasks._running):
        task.cancel()
    await ticks()
    assert (made.lookups._waiting, made.queue.returned) == ({}, waiting)
    assert made.lookups._room._value == 200


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
    failures, until = made.lookups.unresolved(entry(9).name)
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
    for task in list(made.tasks._running):
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
    made.connections.loading.load(pool)
    await ticks()
    assert not pool.loading
    assert len(pool.ready) == 1


def _pool(dispatcher: Dispatcher) -> Pool:
    one = entry(0, "smart.test")
    site = dispatcher.sites.known(one.name)
    assert site is not None
    return dispatcher.connections.pool(site, None)


@pytest.mark.parametrize("how", ["cancelled", "unexpected"])
async def test_an_entry_for_which_another_host_is_tried_is_not_left_in_flight(made, how):
    async def peers(site: Any) -> list[Peer]:
        if how == "cancelled":
            await asyncio.sleep(60)
        raise ZeroDivisionError

    made.opener.peers = peers
    one = entry(1, "smart.test", data=[b"x"])
    made.tasks.spawn(made.connections.elsewhere.deliver(_pool(made), one, "h", ("5.6.3", "8-bit")))
    await ticks()
    for task in list(made.tasks._running):
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
    await made.connections.elsewhere.deliver(_pool(made), entry(1, "smart.test"), "h", ("5.6.3", "8-bit"))
    assert [results[0].kind for _, results, _ in made.queue.finished] == ["transient"]
    assert taken(made) == 0


async def test_a_policy_that_could_not_be_applied_is_applied_later(made):
    def full() -> Any:
        raise StoreError("the disk is full")

    now = wall_ms()
    made.decisions.states.learn(SiteState(HOLD, "recipient_domain=smart.test", "", now, now + 60_000, "operator", "wait"))
    made.policies.refresh()
    made.queue.changes = [full]
    for number in range(2):
        made.queue.entries.append(entry(number, "smart.test"))
        made.offer(made.queue.entries[-1])
        await ticks()
    assert made.queue.held == [[0], [1]]
    made.policies.tick()
    await ticks()
    assert made.queue.held == [[0], [1], [0]]
    assert made.queue.held_by == dict.fromkeys((0, 1), "recipient_domain=smart.test")
    assert made.queue.returned == [], "what is put back would be offered again at once, and again"
    assert made.policies._to_hold == []
    assert not made.policies._holding


def _policy(made: Dispatcher, seconds: int = 60) -> SiteState:
    now = wall_ms()
    policy = SiteState(HOLD, "recipient_domain=smart.test", "", now, now + 1000 * seconds, "operator", "wait")
    made.decisions.states.learn(policy)
    made.site_state_changed(policy, policy.key)
    return policy


def _remove(made: Dispatcher, policy: SiteState) -> None:
    made.decisions.states.forget(*policy.key)
    made.site_state_changed(None, policy.key)


def _slow_changes(made: Dispatcher) -> asyncio.Event:
    """Let the queue's changes of messages wait for this event."""
    over = asyncio.Event()

    async def slowly(verb: str, chosen: Callable[[], list[int]], names: Any) -> tuple[int, int]:
        idents = chosen()
        made.queue.held += [idents] if idents else []
        await over.wait()
        return len(idents), 0

    made.queue.change_messages = slowly
    return over


async def test_mail_of_a_policy_that_began_and_ended_within_a_tick_is_released(made):
    made.policies.tick()
    await ticks()
    assert made.queue.releases == 1, "what an earlier process held"
    policy = _policy(made)
    made.queue.entries.append(entry(1, "smart.test"))
    made.offer(made.queue.entries[0])
    await ticks()
    assert made.queue.held == [[1]]
    _remove(made, policy)
    for expected in (2, 2):
        made.policies.tick()
        await ticks()
        assert made.queue.releases == expected


async def test_mail_that_waits_to_be_held_is_not_held_when_its_policy_ended(made):
    """An earlier change was under way until then, and a tick has released what the policy held."""
    first, second = entry(1, "smart.test"), entry(2, "smart.test")
    over = _slow_changes(made)
    policy = _policy(made)
    made.offer(first)
    await ticks()
    made.offer(second)
    _remove(made, policy)
    made.policies.tick()
    over.set()
    await ticks()
    assert made.queue.held == [[1]]
    assert made.queue.returned == [second]
    for _ in range(3):
        made.policies.tick()
        await ticks()
    assert made.queue.releases == 2, "once at the tick that came before the change was committed, once after it"


async def test_a_hold_that_fails_half_way_while_its_policy_ends_is_checked(made):
    """The disk refuses the second part of the change: the first is held."""
    over = asyncio.Event()

    async def fails(verb: str, chosen: Callable[[], list[int]], names: Any) -> tuple[int, int]:
        await over.wait()
        raise StoreError("the disk is full")

    made.queue.change_messages = fails
    policy = _policy(made)
    made.offer(entry(1, "smart.test"))
    await ticks()
    _remove(made, policy)
    made.policies.tick()
    await ticks()
    assert made.queue.releases == 1
    over.set()
    await ticks()
    made.policies.tick()
    await ticks()
    assert made.queue.releases == 2


async def test_mail_that_somebody_else_has_taken_is_not_held(made):
    """It was given to another route, to which the policy does not apply, while it waited for an earlier change."""
    first, second = entry(1, "smart.test"), entry(2, "smart.test")
    over = _slow_changes(made)
    _policy(made)
    made.offer(first)
    await ticks()
    made.offer(second)
    second.state = ON_DISK
    over.set()
    await ticks()
    assert made.queue.held == [[1]] and made.queue.returned == []


async def test_mail_that_an_earlier_change_takes_is_not_held(made):
    """The hold waits for its turn behind a reroute."""
    found, turn = [], asyncio.Event()

    async def in_turn(verb: str, chosen: Callable[[], list[int]], names: Any) -> tuple[int, int]:
        await turn.wait()
        found.append(chosen())
        return 0, 0

    made.queue.change_messages = in_turn
    _policy(made)
    rerouted, other = entry(1, "smart.test"), entry(2, "smart.test")
    made.offer(rerouted)
    made.offer(other)
    await ticks()
    rerouted.state = ON_DISK
    turn.set()
    await ticks()
    assert found == [[2]] and made.queue.returned == []


async def test_held_mail_is_checked_by_one_at_a_time(made):
    over = asyncio.Event()

    async def slowly(still: Any) -> int:
        made.queue.releases += 1
        await over.wait()
        return 0

    made.queue.release_policy_held = slowly
    for _ in range(3):
        made.policies.held("a policy that ended")
        made.policies.tick()
        await ticks()
    assert made.queue.releases == 1
    over.set()
    await ticks()
    for _ in range(3):
        made.policies.tick()
        await ticks()
    assert made.queue.releases == 2


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
    made.recovery.left.update(dict.fromkeys(range(1, count + 1), False))
    entries = [entry(n, "smart.test") for n in range(1, count + 1)]
    for one in entries:
        made.offer(one)
    assert list(made.recovery._probing.values()) == entries[:1] and len(made.recovery._waiting) == count - 1
    pool = next(iter(made.pools.values()))
    made.connections._site_failed(pool, ConnectFailed("connect", "refused"))
    (first, _, _) = made.queue.finished[0]
    made.landed(first)
    assert made.recovery._probing == {} and made.recovery._waiting == []
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
    made.connections._site_failed(pool, ConnectFailed("connect", "refused", said=said))
    assert ("rate" in pool.learned) == kept
    assert (made.decisions.states.get(LEARNED, pool.shape.key, "rate") is not None) == kept


async def test_a_reload_while_messages_are_probed(made):
    """What is put back lets the next one be probed, in a pool of the new configuration."""
    made.recovery.left.update(dict.fromkeys(range(1, 4), False))
    entries = [entry(n, "smart.test") for n in range(1, 4)]
    for one in entries:
        made.offer(one)
    made.reconfigure(Config.model_validate(SETTINGS), made.routes)
    assert made.queue.returned == entries[:1]
    assert list(made.recovery._probing.values()) == entries[1:2]
    assert [one for pool in made.pools.values() for one in pool.ready] == entries[1:2], "not in a pool that is no longer used"


async def test_what_cannot_be_held_is_tried_less_and_less_often_and_holds_up_nothing(made):
    """An entry of the same message is in flight, so that the change skips it."""
    now = wall_ms()
    made.decisions.states.learn(SiteState(HOLD, "recipient_domain=smart.test", "", now, now + 60_000, "operator", "wait"))
    made.policies.refresh()
    stuck, other = entry(0, "smart.test"), entry(1, "smart.test")
    made.offer(stuck)
    for _ in range(20):
        await ticks()
        made.policies.tick()
    assert 3 <= len(made.queue.held) <= 6
    made.queue.entries.append(other)
    made.offer(other)
    await ticks()
    assert made.queue.held[-1] == [1] and not other.waiting
    made.decisions.states.forget(HOLD, "recipient_domain=smart.test", "")
    made.policies.tick()
    assert made.queue.returned == [stuck], "the policy ended"


def _session(**core: Any) -> SimpleNamespace:
    its = SimpleNamespace(not_sent=False, waits=0.0, **core)
    return SimpleNamespace(
        core=its, closed_by_peer=True, peer="h", place="127.0.0.1:2", cause="", fell_back=False, our_fault=False,
        link=Link(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "by_peer", "reached", "doubt"),
    [
        (None, True, "data", True),
        (None, False, "data", True),
        (Said(421, b"4.3.2 shutting down", "final"), True, "data", False),
        (None, True, "", False),  # BDAT behind the envelope, to a connection that the peer had closed
        (None, False, "", True),  # the peer had it all, and is silent
    ],
    ids=["lost", "timed out", "421", "BDAT on a closed connection", "BDAT, then silence"],
)
async def test_what_is_in_doubt(made, said, by_peer, reached, doubt):
    one = entry(1, "smart.test")
    one.state = IN_FLIGHT
    mail = Mail(one, "a@b.test", [(0, "c@smart.test")], [b"x"], 1, False, False)
    mail.data_sent, mail.reached, mail.asked = True, reached, mail.recipients
    session = _session(last_said=said, messages=3, awaiting="final")
    session.closed_by_peer = by_peer
    counted = made.outcomes._counters.cells.get(IN_DOUBT)
    attempt = made.outcomes.lost(_pool(made), session, mail, "connection lost")
    assert attempt == (reached != "")
    assert made.outcomes._counters.cells.get(IN_DOUBT) - counted == doubt
    for _, results, _ in made.queue.finished:
        assert ("in doubt" in results[0].text) == doubt


async def test_a_message_that_waits_again_is_not_marked_as_in_flight(made):
    """An operator may delete it meanwhile, and nobody would remove the mark."""
    one, pool = entry(1, "smart.test"), _pool(made)
    one.state = IN_FLIGHT
    made.connections._marks.add(1)
    made.connections._again(pool, Mail(one, "a@b.test", [(0, "c@smart.test")], [b"x"], 1, False, False))
    assert list(pool.ready) == [one] and one.waiting
    assert made.connections._marks.take() == ([], 0)


@pytest.mark.parametrize("what", ["hold policy", "bounce policy", "suspension", "nothing"])
async def test_a_free_retry_meets_what_was_decided_meanwhile(made, what):
    """The connection was reused, and lost before the message was attempted."""
    pool, now = _pool(made), wall_ms()
    made.opener.open = lambda *args: asyncio.sleep(60)
    one = entry(1, "smart.test", data=[b"x"])
    one.state = IN_FLIGHT
    kind = {"hold policy": HOLD, "bounce policy": BOUNCE, "suspension": SUSPENDED}.get(what)
    if kind is not None:
        site = pool.shape.key if kind == SUSPENDED else "recipient_domain=smart.test"
        state = SiteState(kind, site, "", now, now + 60_000, "operator", "no")
        made.decisions.states.learn(state)
        made.site_state_changed(state, state.key)
    made.connections._again(pool, Mail(one, "a@b.test", [(0, "c@smart.test")], [b"x"], 1, False, False))
    await ticks()
    assert list(pool.ready) == ([one] if what == "nothing" else [])
    assert (made.queue.held == [[1]]) == (what == "hold policy")
    assert [done for done, _, _ in made.queue.finished] == ([one] if what == "bounce policy" else [])
    assert made.queue.returned == ([one] if what == "suspension" else [])


async def test_a_message_that_loses_reused_connections_leaves_nothing_behind(made):
    """The count ends with the entry; the dispatcher keeps none."""
    session = _session(last_said=None, messages=3, awaiting="mail")
    one = entry(1, "smart.test")
    one.state = IN_FLIGHT
    mail = Mail(one, "a@b.test", [(0, "c@smart.test")], [b"x"], 1, False, False)
    assert [made.outcomes.lost(_pool(made), session, mail, "lost") for _ in range(4)] == [False, False, False, True]
    assert not [name for name, value in vars(made.outcomes).items() if isinstance(value, dict | list | set)]


@pytest.mark.parametrize(
    ("failure", "fault"),
    [
        (ConnectFailed("connect", "Connection refused"), "network"),
        (ConnectFailed("connect", "busy", said=Said(421, b"4.3.2 busy", "connect")), "peer"),
        (ConnectFailed("starttls", "TLS failed"), "peer"),
        (ConnectFailed("auth", "logging in failed", said=Said(535, b"5.7.8 no", "auth")), "us"),
        (NoRoute(False, "4.4.3", "DNS failed"), "dns"),
    ],
)
async def test_whose_fault_it_is_that_a_site_is_down_is_logged(made, failure, fault):
    logged: list[dict[str, Any]] = []
    made.decisions._log = SimpleNamespace(event=lambda event, **fields: logged.append(fields))
    made.connections._site_failed(_pool(made), failure)
    assert [fields["fault"] for fields in logged] == [fault]


async def test_a_reload_during_a_lookup_leaves_no_site_of_the_old_configuration(made):
    """A pool keeps its site's route: TLS, credentials and sources would stay those from before the reload."""
    answer = asyncio.get_running_loop().create_future()
    old = made.sites.find = lambda name: answer
    made.offer(entry(1))
    await ticks()
    config = Config.model_validate(SETTINGS | {"route": [{"name": "mx", "tls": "encrypt"}]})
    made.reconfigure(config, RouteTable(config))
    assert made.sites.find is not old
    after = Site("mx/mail.d.test", made.routes.routes[0], Hosts(((0, "mail.d.test"),), 60.0))
    made.sites.find = lambda name: asyncio.sleep(0, after)
    made.opener.open = lambda *args: asyncio.sleep(60)
    before = RouteTable(Config.model_validate(SETTINGS)).routes[-1]
    answer.set_result(Site("mx/mail.d.test", before, Hosts(((0, "mail.d.test"),), 60.0)))
    await ticks(10)
    assert [pool.site.route.tls for pool in made.pools.values()] == ["encrypt"]


async def test_an_attempt_to_connect_from_before_a_reload_counts_no_failure_of_its_own(made):
    """It is of the same wave as the one that the new configuration has made: one outage, one failure."""
    answers: list[asyncio.Future[Any]] = []

    def opens(*args: Any) -> Any:
        answers.append(made.loop.create_future())
        return answers[-1]

    made.opener.open = opens
    down: list[str] = []
    made.decisions.dead = lambda pool, *args: down.append(pool.key)
    one = entry(1, "smart.test")
    made.offer(one)
    await ticks()
    config = Config.model_validate(SETTINGS)
    made.reconfigure(config, RouteTable(config))
    assert made.queue.returned == [one]
    again = entry(1, "smart.test")
    made.offer(again)
    await ticks()
    first, second = answers
    second.set_exception(ConnectFailed("connect", "timed out"))
    await ticks()
    assert [finished for finished, _, _ in made.queue.finished] == [again]
    first.set_exception(ConnectFailed("connect", "timed out"))
    await ticks()
    (pool,) = made.pools.values()
    assert (len(down), pool.failures, taken(made)) == (1, 1, 0)


async def test_a_policy_added_during_a_lookup_applies_to_what_waits_for_it(made):
    answer = asyncio.get_running_loop().create_future()
    made.sites.find = lambda name: answer
    one = entry(1)
    made.queue.entries = [one]
    made.offer(one)
    await ticks()
    now = wall_ms()
    policy = SiteState(HOLD, "recipient_domain=d.test", "", now, now + 60_000, "operator", "why")
    made.decisions.states.learn(policy)
    made.site_state_changed(policy, policy.key)
    answer.set_result(Site("mx/mail.d.test", made.routes.routes[-1], Hosts(((0, "mail.d.test"),), 60.0)))
    await ticks(10)
    assert (made.pools, made.queue.held) == ({}, [[1]])


async def test_queues_that_the_disk_did_not_let_wake_are_woken_later(made):
    """Else the mail of a site that an operator has resumed sleeps until its suspension would have ended."""
    made.queue.parked[1] = 9_000_000
    wake, refusals = made.queue.wake_queues, [StoreError("the disk is full")]

    async def refused(numbers: Any = None) -> None:
        if refusals:
            raise refusals.pop()
        await wake(numbers)

    made.queue.wake_queues = refused
    made.site_state_changed(None, (SUSPENDED, "mx/mail.d.test", ""))
    await ticks()
    assert made.queue.parked
    made._timer.cancel()
    made._tick()
    await ticks()
    assert not made.queue.parked


async def test_this_host_among_the_hosts_of_a_site_keeps_no_message_from_the_others(made):
    """A peer that cannot accept a message: the others are tried, though one of them is this host."""
    pool = _pool(made)
    one, tried = entry(1, "smart.test", data=[b"x"]), []

    async def to(site: Any, peer: Peer, source: Any, timeout: float = 0.0) -> Any:
        tried.append(peer.name)
        if peer.name == "us":
            raise NoRoute(True, "5.4.6", "us is this host: mail to it would loop")
        raise ConnectFailed("connect", "refused")

    async def peers(site: Any) -> list[Peer]:
        return [Peer("us", "127.0.0.1", 25), Peer("other", "192.0.2.1", 25)]

    made.opener.to, made.opener.peers = to, peers
    one.state = IN_FLIGHT
    await made.connections.elsewhere.deliver(pool, one, "unfit", ("5.6.3", "no 8BITMIME"))
    assert tried == ["us", "other"]
    assert made.queue.finished[0][1][0].kind == TRANSIENT
    assert taken(made) == 0


async def test_hosts_that_are_silent_take_no_connections_from_those_that_answer(made):
    """Of the messages that a host refuses for now one at a time tries the next host, while there is no connection to that."""
    trying: list[str] = []

    async def peers(site: Any) -> list[Peer]:
        return [Peer("silent", "192.0.2.1", 25)]

    async def to(site: Any, peer: Peer, source: Any, timeout: float = 0.0) -> Any:
        trying.append(peer.name)
        await asyncio.sleep(0.05)
        raise ConnectFailed("connect", "timed out")

    made.opener.to, made.opener.peers = to, peers
    pool, waiting = _pool(made), [entry(number, "smart.test") for number in range(1, 9)]
    for one in waiting:
        one.state = IN_FLIGHT
    await asyncio.gather(*(made.connections.elsewhere.deliver(pool, one, "h", ("5.6.3", "8-bit")) for one in waiting))
    assert trying == ["silent"] and taken(made) == 0
    results = [results[0] for _, results, _ in made.queue.finished]
    assert [one.kind for one in results] == [TRANSIENT] * 8 and {one.text for one in results} == {"timed out"}


async def test_what_was_accepted_is_recorded_when_a_stop_comes_before_the_next_host_is_asked(made):
    one = entry(1, "smart.test")
    one.state = IN_FLIGHT
    trail = Trail()
    attempt = Attempt(0, TRANSIENT, "rcpt", "h", 450, "4.2.1", "later")
    trail.add("h", {0: attempt}, set(), 0, ("", 0, "", ""))
    assert made.connections.elsewhere.go_on(_pool(made), one, trail)
    await made.tasks.cancel()  # in the same iteration of the loop
    assert [finished for finished, _, _ in made.queue.finished] == [one]


def throttled(made: Dispatcher) -> dict[str, int]:
    """After one more tick: the seconds for which each limit has held mail."""
    made.connections.tick(made.loop.time(), made.queue.time)
    found = {limit: made.connections._counters.cells.get(THROTTLED[limit]) for limit in THROTTLES}
    return {limit: seconds for limit, seconds in found.items() if seconds}


def waits(made: Dispatcher, count: int, **limits: float) -> Pool:
    """A pool with these limits, no connection of which is opened, and so much mail that is offered for it."""

    async def opened(site: Any, source: Any, timeout: float = 0.0) -> Any:
        await asyncio.sleep(60)

    made.opener.open = opened
    pool = _pool(made)
    pool.shape = replace(pool.shape, **{name: Limit(value, "test") for name, value in limits.items()})
    pool.window = min(pool.window, pool.shape.connections.value)
    for number in range(count):
        made.offer(entry(number, "smart.test", data=[b"x"]))
    return pool


@pytest.mark.parametrize(
    ("limits", "machine", "limit"),
    [
        ({"connections": 3}, 100, "connections"),
        ({"connections": 100}, 100, "learned"),  # the window: as many as the site has accepted so far
        ({"connections": 100}, 2, "machine"),
        ({"connection_rate": 1 / 3600}, 100, "connection_rate"),
    ],
)
async def test_mail_that_waits_for_a_limit_counts_by_it_each_second(made, limits, machine, limit):
    made.room.connections = machine
    waits(made, 8, **limits)
    assert [throttled(made) for _ in range(2)] == [{limit: 1}, {limit: 2}]


async def test_what_other_workers_use_of_a_sites_connections_is_the_same_limit(made):
    pool = waits(made, 0, connections=4)
    pool.window = 100.0
    while made.room._limits.take(f"site {pool.shape.key}", 4):
        pass
    waits(made, 1, connections=4)
    assert throttled(made) == {"connections": 1}


async def test_a_connection_that_is_there_at_last_is_waited_for_no_longer(made):
    made.room.connections = 0
    pool = waits(made, 1)
    assert throttled(made) == {"machine": 1} and pool.waiting
    made.room.connections = 1
    assert throttled(made) == {"machine": 1} and pool.connecting == 1


@pytest.mark.parametrize(("rate", "resumes", "limit"), [(1 / 3600, 0.0, "rate"), (0, 3600.0, "learned")])
async def test_mail_that_waits_for_a_rate_counts_until_the_rate_allows_it(made, rate, resumes, limit):
    pool = waits(made, 0, rate=rate)
    pool.resume_at = resumes and made.loop.time() + resumes  # the site has just replied 421
    assert made.room.take_message(pool) == (not resumes)
    pool.ready.push(entry(1, "smart.test", data=[b"x"]))
    assert not made.room.take_message(pool)
    assert [throttled(made) for _ in range(2)] == [{limit: 1}, {limit: 2}]
    pool.pumping_at, pool.connecting, pool.opening_since = 0.0, 1, made.loop.time()
    assert throttled(made) == {limit: 2}


async def test_mail_that_waits_for_no_limit_does_not_count(made):
    """A connection is being opened for it; or nothing waits; or the disk is what holds it."""
    waits(made, 3)
    assert throttled(made) == {}
    made.queue.stalled = True
    waits(made, 8)
    assert throttled(made) == {}
    made.queue.stalled = False
    assert throttled(made) == {"learned": 1}
    _pool(made).ready.take_all()
    assert throttled(made) == {"learned": 1}
