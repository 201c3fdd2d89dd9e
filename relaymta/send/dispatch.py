"""Delivery: entries offered by the queue wait in their site's ready list, are sent over its sessions, and end as outcomes.

An entry that was in flight when a worker died is probed first (recovery.py). One that a policy matches leaves delivery here
(policies.py). Its site is known, or looked up (lookups.py). Where the site is down or suspended, it is put back and its queue
sleeps (parking.py). Else it is given to a session now or later (connections.py), and its attempt becomes an outcome
(outcomes.py), which the queue records. Each of these objects owns a part of the state; the dispatcher has none but the
configuration, and wires them.

Where no host of a site can be reached, one message is charged with the attempt, the others are put back untried and their queues
sleep; all of them remain due, so that they are offered again as soon as a background probe finds the site up. (What counts as
one failure of a site: pool.py.)
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from relaymta.config import Config, Source
from relaymta.dns import Resolver
from relaymta.log import Log
from relaymta.metrics import Counters
from relaymta.node import BOUNCE, HOLD, SiteState, SiteStates
from relaymta.proto.envelope import TRANSIENT, QueueName
from relaymta.proto.smtp_client import ClientSession
from relaymta.queue import Entry, Queue
from relaymta.route.ourselves import Ourselves
from relaymta.route.shaping import Shaping
from relaymta.route.sites import Site, Sites
from relaymta.route.staging import Redirection
from relaymta.route.table import RouteTable
from relaymta.send import trust
from relaymta.send.connections import Connections
from relaymta.send.decisions import Decisions, Publish
from relaymta.send.local import Local, Store
from relaymta.send.lookups import Lookups
from relaymta.send.oauth import Tokens
from relaymta.send.opener import Opener, Sources, hosts_of
from relaymta.send.outcomes import Outcomes
from relaymta.send.parking import Parking
from relaymta.send.policies import Policies
from relaymta.send.pool import CROWDED, Pool, pool_key
from relaymta.send.recovery import Recovery
from relaymta.send.room import Room
from relaymta.send.session import Session
from relaymta.send.sessions import Sessions
from relaymta.send.tasks import Tasks
from relaymta.send.timing import MarkedStages
from relaymta.send.view import SiteView, View, position, seen
from relaymta.shm import InFlight, Limits, Rates
from relaymta.trace import Tracer

__all__ = ["Dispatcher"]

TICK = 1.0  # seconds


class Dispatcher:
    """All delivery of one worker. The queue passes entries in with `offer`."""

    def __init__(
        self,
        config: Config,
        routes: RouteTable,
        limits: Limits,
        rates: Rates,
        in_flight: InFlight,
        counters: Counters,
        log: Log,
        resolver: Resolver,
        probed: dict[int, bool],
        states: SiteStates,
        publish: Publish,
        tokens: Tokens,
    ) -> None:
        """`probed`: ids that were in flight when the previous worker of this slot died, and whether each is to be probed alone.
        `states`: the machine's site states; `publish(state, key)` sends a new state to all workers (None: the one with `key` is
        removed). `tokens`: for hosts that require OAuth 2.0."""
        loop = self.loop = asyncio.get_running_loop()
        self._log = log
        self._resolver = resolver
        self._queue: Queue | None = None
        self.pools: dict[str, Pool] = {}  # changed by `Connections` only
        self.tasks = Tasks(loop, log)
        self.room = Room(limits, rates, config.delivery.connections, self._pump_in, loop.time)
        self.recovery = Recovery(in_flight, probed, self.offer)
        self.parking = Parking(self.room, self.tasks.spawn, self.recovery.landed)
        self.decisions = Decisions(
            states, publish, log, self.pools, loop.time, self._clock, self.parking.send_back, self.parking.wake,
            self.parking.wake_pool,
        )  # fmt: skip
        self.counters = counters
        self.outcomes = Outcomes(counters, self.decisions, self.parking)
        self.landed = self.recovery.landed  # called when an entry's outcome is durable
        self.local = Local(self.outcomes, in_flight, self.tasks, counters, log)
        self.lookups = Lookups(self.outcomes, self.parking, self.tasks, self._found, loop.time)
        self.opener = Opener(config, resolver, log, tokens, self._make, self.outcomes.stages.took, trust.counts(counters))
        self.sessions = Sessions(
            loop, self.pools, self.room, self.opener, self.decisions, self.parking, self.tasks, counters
        )  # fmt: skip
        self.connections = Connections(
            loop, self.pools, self.room, self.opener, self.sessions, self.decisions, self.outcomes, self.parking, in_flight,
            self.tasks, counters, log, self.offer, lambda: bool(self.policies),
        )  # fmt: skip
        self.policies = Policies(
            states, self._its_queue, self.parking.put_back, self.recovery.landed, self.outcomes.bounce, self.tasks.spawn
        )  # fmt: skip
        self._configure(config, routes)
        self._timer = loop.call_later(TICK, self._tick)

    def _configure(self, config: Config, routes: RouteTable) -> None:
        self.routes = routes
        self._keeps = any(route.is_local for route in routes.routes)
        self.shaping = Shaping(config)
        self.sites = Sites(routes, self._resolver, Ourselves.of(config).names, self._resolver.now)
        self._sources = Sources(config, self._log)
        self._staging = Redirection(config.staging.redirect, config.staging.allow) if config.staging.redirect else None
        self.opener.reconfigure(config)
        self.room.connections = config.delivery.connections
        self.outcomes.configure(self.shaping.rule)
        self.lookups.configure(self.sites, int(config.delivery.first_retry * 1000))
        self.connections.configure(config, self.shaping)

    def keep_mail(self, store: Store) -> None:
        """Deliver into mailboxes, too; called before `landed` is given to anybody."""
        self.local.store = store

        def landed(entry: Entry) -> None:
            self.recovery.landed(entry)
            self.local.landed(entry)

        self.landed = landed

    def refused(self, entry: Entry) -> None:
        """Called when an entry's outcome could not be recorded."""
        self.recovery.landed(entry)
        self.local.refused(entry)

    @property
    def queue(self) -> Queue | None:
        """The queue that entries come from; set once, before the first one is offered."""
        return self._queue

    @queue.setter
    def queue(self, queue: Queue) -> None:
        self._queue = queue
        for part in (self.parking, self.outcomes, self.local, self.lookups, self.connections, self.connections.loading):
            part.queue = queue

    def _its_queue(self) -> Queue:
        assert self._queue is not None
        return self._queue

    def _clock(self) -> int:
        return self._its_queue().clock.now()

    # Entries arrive

    def awake(self, name: QueueName) -> bool:
        """Whether mail of a queue would be tried immediately."""
        site = self.sites.known(name)
        if self.connections.draining or site is None or site.route.sources or (self._keeps and site.route.is_local):
            return not self.connections.draining
        pool = self.pools.get(site.key)
        if pool is None:
            return self.decisions.states.suspension(self.shaping.shape(site).key, name.application) is None
        return len(pool.ready) < CROWDED and not self.decisions.asleep(pool, name.application)

    def offer(self, entry: Entry) -> None:
        """Take an entry to deliver."""
        if self.connections.draining:
            self.parking.put_back(entry)
        elif not (self.recovery.left and self.recovery.takes(entry)) and not (self.policies and self.policies.apply(entry)):
            site = self.sites.known(entry.name)
            if site is not None:
                self._arrive(site, entry)
            else:
                self.lookups.look_up(entry)

    def _found(self, site: Site, entry: Entry) -> None:
        """An entry's site was looked up; a policy may have been added meanwhile."""
        if not (self.policies and self.policies.apply(entry)):
            self._arrive(site, entry)

    def _arrive(self, site: Site, entry: Entry) -> None:
        """Accept an entry whose site is known: deliver it, or put it back."""
        if self._staging is not None and not all(self._staging.allows(address) for _, address in entry.recipients):
            # It was queued before staging was switched on: it stays in the queue.
            why = "staging: not sent to real recipients (staging.redirect)"
            self.outcomes.charge(entry, TRANSIENT, "route", "", 0, "4.7.1", why)
            return
        if self._keeps and site.route.is_local:
            self.local.deliver(entry)
            return
        source = None
        if site.route.sources:
            source = self._sources.choose(site.route, f"{entry.envelope.sender}\0{entry.name.domain}")
        pool = self.connections.pool(site, source)
        until = self.decisions.asleep(pool, entry.name.application)
        if until:
            self.parking.put_back(entry)
            self.parking.park_for(pool, entry.queue, until)
        elif len(pool.ready) >= CROWDED and entry.name.priority != "express":
            # One slow site must not fill the window that all sites share.
            self.connections.skip(pool, entry.queue)
            self.parking.put_back(entry)
        else:
            self.connections.give(pool, entry)

    def sleeps_until(self, queue: int) -> int:
        """Until when a queue sleeps (queue clock); 0 when it does not."""
        return self.parking.until(queue)

    def _pump_in(self, pool: Pool, seconds: float) -> None:
        self.connections.pump_in(pool, seconds)

    def _make(self, core: ClientSession, peer: str) -> Session:
        return self.connections.make(core, peer)

    # Site states

    def site_state_changed(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """Called when a state was published on the machine, or (None) the one with this key removed."""
        if key[0] not in (HOLD, BOUNCE):
            self.decisions.changed(state, key)
            return
        self.policies.refresh()
        for pool in list(self.pools.values()):
            for entry in pool.ready.take_all():
                if not self.policies.apply(entry):
                    pool.ready.push(entry)

    # What operators read

    def view(
        self, name: QueueName, entry: Entry | None = None, sender: str = "", recipients: Sequence[str] = (), user: str = ""
    ) -> View:
        """What delivery knows now about a queue, and about one of its messages: its entry, where it is in memory, its sender and
        all its recipients, and who has logged in."""
        now, states = time.time(), self.decisions.states
        site = self.sites.last(name)
        pools = self.connections.of(site) if site is not None else []
        suspended = states.suspension(self.shaping.shape(site).key, name.application) if site is not None else None
        failed, until = self.lookups.unresolved(name)
        policy = self.policies.find(name, sender, list(recipients), user) if recipients else None
        if policy is not None and policy.kind != HOLD:
            policy = None
        delivering, place = position(pools, entry) if entry is not None else (None, -1)
        return View(
            site, tuple(map(self.seen, pools)), suspended, now + states.left(suspended) / 1000 if suspended is not None else 0.0,
            self.lookups.asks(name), entry is not None and self.recovery.keeps(entry), failed, self._wall(until), policy,
            now + states.left(policy) / 1000 if policy is not None else 0.0, delivering, place, self.routes,
        )  # fmt: skip

    def names_of_site(self, name: QueueName) -> tuple[str, ...]:
        """The names of the site that a queue's mail is delivered to: its own, that under which its limits are counted, and those
        of its hosts. Also called on reader threads: at most it fills a cache."""
        site = self.sites.last(name)
        return () if site is None else (site.key, self.shaping.shape(site).key, *site.names)

    def seen(self, pool: Pool) -> SiteView:
        """A pool as of now."""
        until = self._wall(pool.down_until) if pool.failures else 0.0
        return seen(pool, self.loop.time(), until, self.opener.down(pool.site.route))

    def _wall(self, moment: int) -> float:
        """A moment of the queue's clock as seconds since the epoch, 0 for none."""
        return self._its_queue().clock.wall(moment) / 1000 if moment else 0.0

    # Traces

    def mark_attempts(self, traced: Callable[[Entry], bool]) -> None:
        """From now on entries of messages that have spans (`traced`) say when their attempts have begun."""
        self.outcomes.stages = MarkedStages(self.counters, traced)

    def trace(self, tracer: Tracer) -> None:
        """Let this one know of connections."""
        self.opener.tracer, self.opener.names = tracer, self._names

    def _names(self, site: Site, source: Source | None) -> frozenset[str]:
        """The names by which operators know a site."""
        return frozenset((site.key, pool_key(site, source), self.shaping.shape(site).key, site.route.label, *site.names))

    def join_trace(self, tracer: Tracer) -> None:
        """Let it know of the connections that are open."""
        for session, pool in self.sessions:
            session.trace(tracer, self._names(pool.site, pool.source), hosts_of(session.peer, session.place))

    # Timer, reload, stop

    def _tick(self) -> None:
        """Runs every TICK seconds; the timer is set first, so that an exception does not end it."""
        self._timer = self.loop.call_later(TICK, self._tick)
        if self._queue is not None:
            self.recovery.tick()
            self.policies.tick()
            self.parking.tick()
            self.local.tick()
            self.connections.tick(self.loop.time(), self._clock())

    def look_back(self) -> None:
        """Called at start: wake the queues that slept when the previous process ended, since their sites may be up again; those
        that must sleep on are put to sleep again when their mail is offered."""
        self.parking.wake()

    def forget_parked(self) -> None:
        """Forget which queues sleep: others may have woken them."""
        self.parking.forget()

    def flush(self) -> None:
        """Forget that sites are down and domains unresolved: an operator wants another attempt now."""
        self.lookups.forget()
        self.parking.forget()
        for pool in self.pools.values():
            pool.down_until = 0
            self.parking.wake_pool(pool)
        self.decisions.forget_dead()

    def reconfigure(self, config: Config, routes: RouteTable) -> None:
        """Apply a new configuration: entries in memory are put back and routed anew."""
        self._configure(config, routes)
        self.parking.wake()

    def in_flight(self) -> int:
        """Messages in flight."""
        return self.sessions.in_flight() + self.local.under_way

    async def drain(self, seconds: float, data_seconds: float) -> None:
        """Start nothing new; wait up to `seconds` for messages under way, `data_seconds` for those past their final dot; then
        close all connections."""
        await asyncio.gather(self.connections.drain(seconds, data_seconds), self.local.drain(seconds))
        self._timer.cancel()
        self.opener.close()
        await self.tasks.cancel()
