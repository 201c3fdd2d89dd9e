"""Delivery: entries offered by the queue wait in their site's ready list, are sent over its sessions, and end as outcomes.

A site has a ready list and a pool. An entry is given to an idle session; when there is none and the limits allow, a
connection is opened; otherwise it is pipelined behind the message data of the transaction under way. Where no host of a site
can be reached, one message is charged with the attempt, the others are put back untried and their queues sleep; all of them
remain due, so that they are offered again as soon as a background probe finds the site up. (What counts as one failure of a
site: pool.py.)
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass

from relaymta.config import Config
from relaymta.dns import Resolver
from relaymta.errors import Failure, StoreError, redacted, told
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.node import BOUNCE, HOLD, TOKEN, SiteState, SiteStates
from relaymta.proto.envelope import (
    EIGHT_BIT,
    PERMANENT,
    SMTPUTF8,
    SUCCESS,
    TRANSIENT,
    Attempt,
    QueueName,
)
from relaymta.proto.smtp_client import ClientSession, Features, Mail, Said
from relaymta.queue import Entry, Queue, format_id, wall_ms
from relaymta.queue.schedule import retry_delay
from relaymta.route.mx import NoRoute
from relaymta.route.shaping import Shaping
from relaymta.route.sites import Site, Sites
from relaymta.route.staging import Redirection
from relaymta.route.table import RouteTable
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.decisions import Decisions, Publish
from relaymta.send.oauth import Tokens
from relaymta.send.opener import Opener, Sources
from relaymta.send.outcome import judge
from relaymta.send.policies import Policies
from relaymta.send.pool import Pool, pool_key
from relaymta.send.room import Room
from relaymta.send.session import MESSAGE_DATA, TIMEOUTS, Session
from relaymta.shm import InFlight, Limits, Rates

__all__ = ["Dispatcher"]

OPENED = index("relaymta_sessions_total", "opened")
FAILED = index("relaymta_sessions_total", "failed")
TRANSACTIONS = index("relaymta_transactions_total")
IN_DOUBT = index("relaymta_in_doubt_total")
WATCHDOG = index("relaymta_watchdog_total")
CORRUPT = index("relaymta_corrupt_bodies_total")

CHECK_EVERY = 1.0
LOAD_TOGETHER = 32  # bodies read from disk in one batch
ROOM_SECONDS = 30.0  # waited for a connection to another host of a site
FORGET_MS = 3 * 3_600_000  # after this long without an attempt the failures of a site are forgotten
FREE_RETRIES = 3  # times a message may lose a reused connection before it costs an attempt
LOOKUPS = 200  # domains whose hosts are looked up at the same time
KEPT_DOWN = 50_000  # unresolved domains, and sleeping queues, kept in memory
CROWDED = 2000  # messages that wait for one site in memory; further ones stay on disk
AT_ONCE_MS = 1  # retry delay of a message that is due at once; only its sleeping queue holds it back
SITE_PROBES = 50  # background probes of sites at the same time
TOKEN_KEPT_MS = 400 * 86_400_000  # no provider accepts a refresh token that was unused for so long


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
        probed: set[int],
        states: SiteStates,
        publish: Publish,
    ) -> None:
        """`probed`: ids that were in flight when the previous worker of this slot died; they are tried one at a time.
        `states`: the machine's site states; `publish(state, key)` sends a new state to all workers (None: the one with `key` is
        removed)."""
        self.room = Room(limits, rates, config.delivery.connections, self._pump_in, asyncio.get_running_loop().time)
        self.marks = in_flight
        self._probed = probed
        self._to_probe: list[Entry] = []  # entries still to be tried alone
        self._probing: Entry | None = None
        self._choosing = False  # within `_probe_next`
        self.counters = counters
        self.log = log
        self.resolver = resolver
        self.queue: Queue | None = None
        self.loop = asyncio.get_running_loop()
        self.pools: dict[str, Pool] = {}
        self.draining = False
        self._owner: dict[Session, Pool] = {}
        self._lost_before: dict[int, int] = {}  # message id -> reused connections lost under it
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: dict[tuple[str, str, str], list[Entry]] = {}  # entries whose site is being looked up
        self._unresolved: dict[tuple[str, str], _Unresolved] = {}  # by route and domain
        self._parked: dict[int, int] = {}  # queue: until when it sleeps (queue clock)
        self._lookups = asyncio.Semaphore(LOOKUPS)
        self._site_probes = 0  # background probes under way
        self.opener = Opener(config, resolver, log, Tokens(self._kept_token, self._keep_token), self._make)
        self._states, self._publish = states, publish
        self.decisions = Decisions(
            states, publish, log, self.pools, self.loop.time, self._clock, self._send_back, self._wake, self._wake_pool
        )
        self.policies = Policies(states, self._queue, self._return, self._bounce, self._spawn)
        self._configure(config, routes)
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)

    def _configure(self, config: Config, routes: RouteTable) -> None:
        self.config = config
        self.routes = routes
        self.shaping = Shaping(config)
        self.sites = Sites(routes, self.resolver, {config.hostname.lower()}, self.resolver.now)
        self.sources = Sources(config, self.log)
        self._staging = Redirection(config.staging.redirect, config.staging.allow) if config.staging.redirect else None
        self._weights = {application.name: application.weight for application in config.application}
        self.opener.reconfigure(config)
        self.room.connections = config.delivery.connections

    # Entries arrive

    def awake(self, name: QueueName) -> bool:
        """Whether mail of a queue would be tried immediately."""
        site = self.sites.known(name)
        if self.draining or site is None or site.route.sources:
            return not self.draining
        pool = self.pools.get(site.key)
        if pool is None:
            return self.decisions.states.suspension(self.shaping.shape(site).key, name.application) is None
        return len(pool.ready) < CROWDED and not self.decisions.asleep(pool, name.application)

    def offer(self, entry: Entry) -> None:
        """Take an entry to deliver."""
        if self.draining:
            self._return(entry)
        elif self._probed and entry.ident in self._probed:
            self._to_probe.append(entry)
            if self._probing is None:
                self._probe_next()
        elif not self.policies or not self.policies.apply(entry):
            site = self.sites.known(entry.name)
            if site is not None:
                self._arrive(site, entry)
            else:
                self._look_up(entry)

    def _arrive(self, site: Site, entry: Entry) -> None:
        """Accept an entry whose site is known: start it, add it to the ready list, or put it back."""
        if self._staging is not None and not all(self._staging.allows(address) for _, address in entry.recipients):
            # It was queued before staging was switched on: it stays in the queue.
            self._charge(entry, TRANSIENT, "route", "", 0, "4.7.1", "staging: not sent to real recipients (staging.redirect)")
            return
        pool = self._pool(site, entry)
        until = self.decisions.asleep(pool, entry.name.application)
        if until:
            self._return(entry)
            self._sleep(pool, entry.queue, until)
        elif len(pool.ready) >= CROWDED and entry.name.priority != "express":
            # One slow site must not fill the window that all sites share.
            pool.skipped.add(entry.queue)
            self._queue().skip(entry.queue)
            self._return(entry)
        elif pool.idle and not len(pool.ready) and entry.data is not None and not pool.paced:
            self._give(pool, pool.idle[-1], entry)
        else:
            pool.ready.push(entry)
            self._pump(pool)

    def _give(self, pool: Pool, session: Session, entry: Entry) -> None:
        """Give an entry to an idle session; the ready list is empty."""
        if session.ended or self._queue().writer.stalled:
            pool.ready.push(entry)
            self._pump(pool)
            return
        mail = self._put_in_flight(pool, session, entry)
        if mail is not None:
            pool.idle.pop()
            session.waiting = False
            session.send(mail)

    def _pool(self, site: Site, entry: Entry) -> Pool:
        source = None
        if site.route.sources:
            source = self.sources.choose(site.route, f"{entry.envelope.sender}\0{entry.name.domain}")
        key = pool_key(site, source)
        pool = self.pools.get(key)
        if pool is None:
            pool = self.pools[key] = Pool(site, source, self.shaping.shape(site), self._weights)
            self.decisions.recall(pool)
        return pool

    def _return(self, entry: Entry) -> None:
        """Put an entry back into the queue untried."""
        self._queue().put_back(entry)
        self.landed(entry)

    def _park(self, queue: int, until: int) -> None:
        """Let a queue sleep until a moment of the queue's clock."""
        if self._parked.get(queue, 0) < until:
            if len(self._parked) >= KEPT_DOWN:
                self._parked.clear()
            self._parked[queue] = until
            self._queue().park(queue, until)

    def _sleep(self, pool: Pool, queue: int, until: int) -> None:
        """Let a queue sleep because of its site; it is woken when the site is up."""
        if pool.failures:
            pool.sleeping.add(queue)
        self._park(queue, until)

    def _wake_pool(self, pool: Pool) -> None:
        """Wake the queues that sleep because of a site: it is up, or may be tried again."""
        if pool.sleeping:
            self._spawn(self._wake_some(pool, pool.sleeping))
            pool.sleeping = set()

    async def _wake_some(self, pool: Pool, queues: set[int]) -> None:
        done = False
        try:
            for queue in queues:
                self._parked.pop(queue, None)
            await self._queue().wake_queues(queues)
            done = True
        finally:
            if not done:
                pool.sleeping |= queues  # the next tick tries again

    def sleeps_until(self, queue: int) -> int:
        """Until when a queue sleeps (queue clock); 0 when it does not."""
        return self._parked.get(queue, 0)

    def _probe_next(self) -> None:
        """Try the next probed entry alone. One that is put back at once is finished within `offer`; the loop then takes the next,
        so that hundreds for a site that is down do not recurse."""
        self._probing = None
        if self._choosing:
            return
        self._choosing = True
        try:
            while self._to_probe and self._probing is None:
                entry = self._to_probe.pop(0)
                self._probed.discard(entry.ident)
                if not entry.cancelled:
                    self._probing = entry
                    self.marks.probe(entry.ident)
                    self.offer(entry)
        finally:
            self._choosing = False
        if self._probing is None:
            self.marks.probe(0)

    def landed(self, entry: Entry) -> None:
        """Called when an entry's outcome is durable, or the entry was put back untried."""
        self.marks.remove(entry.ident)
        if entry is self._probing:
            self._probe_next()

    def _clock(self) -> int:
        return self._queue().clock.now()

    def _queue(self) -> Queue:
        assert self.queue is not None
        return self.queue

    # Site lookup

    def _look_up(self, entry: Entry) -> None:
        """Let an entry wait until its domain's hosts are known; all entries of its queue share one lookup."""
        name = entry.name
        _, until = self.unresolved(name)
        if until > self._clock():
            self._return(entry)
            self._park(entry.queue, until)
            return
        key = (name.route, name.domain, name.application)
        waiting = self._asking.get(key)
        if waiting is not None:
            waiting.append(entry)
            return
        self._asking[key] = [entry]
        self._spawn(self._find(key, name, self.loop.time()))

    def unresolved(self, name: QueueName) -> tuple[int, int]:
        """(Consecutive failed lookups of a domain, until when it is not looked up again by the queue's clock)."""
        known = self._unresolved.get((name.route, name.domain))
        return (0, 0) if known is None else (known.failures, known.until)

    async def _find(self, key: tuple[str, str, str], name: QueueName, began: float) -> None:
        site: Site | None = None
        failure: NoRoute | None = None
        try:
            async with self._lookups:
                site = await self.sites.find(name)
        except Exception as error:
            failure = error if isinstance(error, NoRoute) else NoRoute(False, "4.3.0", *self._unexpected(error))
        finally:
            entries = [entry for entry in self._asking.pop(key) if not entry.cancelled]
            if site is None and failure is None:  # cancelled
                for entry in entries:
                    self._return(entry)
        if failure is not None:
            self._no_site(name, entries, failure, began)
        elif site is not None:
            if self._unresolved:
                self._unresolved.pop((name.route, name.domain), None)
            for entry in entries:
                self._arrive(site, entry)

    def _no_site(self, name: QueueName, entries: list[Entry], error: NoRoute, began: float) -> None:
        """A domain has no host, permanently or temporarily. As with sites (pool.py), lookups that are under way for other tenants
        or classes when one of them fails count as the same failure."""
        if error.permanent:
            for entry in entries:
                self._charge(entry, PERMANENT, "route", "", 0, error.enhanced, error)
            return
        known = self._unresolved.get((name.route, name.domain))
        if known is not None and began <= known.known_at:
            for entry in entries:
                self._look_up(entry)
            return
        failures = known.failures + 1 if known is not None else 1
        until = self._clock() + self._pause(failures)
        if len(self._unresolved) >= KEPT_DOWN:
            self._unresolved.clear()
        self._unresolved[name.route, name.domain] = _Unresolved(failures, until, self.loop.time())
        self._charge_one(entries, until, "route", Said(0, b"", "route"), error.enhanced, error)

    def _pause(self, failures: int) -> int:
        return retry_delay(failures, int(self.config.delivery.first_retry * 1000))

    def _charge_one(self, entries: list[Entry], until: int, phase: str, said: Said, enhanced: str, why: Failure) -> None:
        """Where nothing can be delivered, charge one message with the attempt and put the others back. Their queues sleep, and
        nothing else delays them: the charged one is due like the others, and is offered when its queue wakes."""
        for number, entry in enumerate(entries):
            self._park(entry.queue, until)
            if number == 0:
                self._charge(entry, TRANSIENT, phase, "", said.code, enhanced, why, AT_ONCE_MS)
            else:
                self._return(entry)

    # Entries are given to sessions

    def _pump(self, pool: Pool) -> None:
        """Give ready entries to idle sessions, and open connections for the others."""
        if self.draining or self._queue().writer.stalled:
            return
        if pool.skipped and len(pool.ready) < CROWDED // 2:
            self._unskip(pool)
        while pool.idle and len(pool.ready):
            session = pool.idle[-1]
            mail = None if session.ended else self._next(pool, session)
            if mail is None and not session.ended:
                break
            pool.idle.pop()
            session.waiting = False
            if mail is not None:
                session.send(mail)
        self._open_more(pool)

    def _unskip(self, pool: Pool) -> None:
        skipped, pool.skipped = pool.skipped, set()
        self._queue().skip_no_longer(skipped)

    def _open_more(self, pool: Pool) -> None:
        wanted = len(pool.ready)
        if not wanted:
            self.room.wait_no_longer(pool)
            return
        if pool.failures and pool.down_until > self._clock():
            self._send_back(pool, pool.down_until, None)  # entries of connections that were lost
            return
        if pool.pumping_at > self.loop.time() and not pool.waiting:
            return  # a rate limit allows no message now
        most = 1 if pool.failures else 50  # a site that was down is tried with one connection
        while pool.connecting < min(wanted, most):
            if not self.room.take(pool):
                if not pool.sessions and not pool.connecting:
                    self.room.wait(pool)
                return
            self.room.wait_no_longer(pool)
            self._count_in(pool)
            self._spawn(self._open(pool, self.loop.time()))

    def _pump_in(self, pool: Pool, seconds: float) -> None:
        now = self.loop.time()
        if pool.pumping_at <= now or pool.pumping_at > now + seconds:
            pool.pumping_at = now + seconds
            self.loop.call_later(seconds, self._pump_again, pool, pool.pumping_at)

    def _pump_again(self, pool: Pool, moment: float) -> None:
        if pool.pumping_at == moment:
            pool.pumping_at = 0.0
            if not self.draining:
                self._pump(pool)

    def _next(self, pool: Pool, session: Session) -> Mail | None:
        """The next entry as a Mail for this session; None while there is none, its message data is still being read, or a rate
        limit is reached."""
        ready = pool.ready
        while (entry := ready.head()) is not None:
            if entry.data is None and not _is_large(entry):
                self._load(pool)
                return None
            if pool.paced and not self.room.take_message(pool):
                return None
            ready.pop()
            mail = self._put_in_flight(pool, session, entry)
            if mail is not None:
                return mail
        return None

    def _put_in_flight(self, pool: Pool, session: Session, entry: Entry) -> Mail | None:
        """Mark an entry as in flight. Returns its Mail for this session, or None when this peer cannot accept it."""
        entry.in_flight = True
        self.marks.add(entry.ident)
        refusal = _unfit(entry, session.core.features)
        if refusal is None:
            pool.began(self.loop.time())
            return _mail(entry, pool.site.route.rewrite_sender)
        self._spawn(self._try_elsewhere(pool, entry, session.peer, refusal))
        return None

    def _load(self, pool: Pool) -> None:
        """Read the message data of the first waiting entries, in one batch, on a reader thread."""
        if pool.loading:
            return
        pool.loading = True
        wanted = [e for e in pool.ready.first(LOAD_TOGETHER) if e.data is None and not _is_large(e)]
        self._spawn(self._load_data(pool, wanted))

    async def _load_data(self, pool: Pool, entries: list[Entry]) -> None:
        try:
            loaded = await self._queue().read_data(entries)
        finally:
            pool.loading = False
        for entry, data in zip(entries, loaded, strict=True):
            if isinstance(data, StoreError):
                self._unreadable(pool, entry, data)
            else:
                entry.data = data
        self._pump(pool)

    def _unreadable(self, pool: Pool, entry: Entry, error: StoreError) -> None:
        """A body that cannot be read is never sent: a warning is logged, and the entry is deferred."""
        self.counters.add(CORRUPT, 1)
        self.log.event("warning", text=f"message {format_id(entry.ident)}: {error}")
        if not entry.cancelled and pool.ready.remove(entry):
            self._charge(entry, TRANSIENT, "queue", "", 0, "4.3.0", Failure("the message could not be read", str(error)))

    # Connections

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, StoreError):
            self.log.event("warning", text=f"store: {error}")
        elif isinstance(error, Exception):
            self._unexpected(error)

    async def _open(self, pool: Pool, began: float) -> None:
        """Open one connection to a site, as decided at `began` (loop time); its hosts are tried in order."""
        try:
            session = await self._connect(pool)
        except Exception as error:
            self.counters.add(FAILED, 1)
            self._not_opened(pool, self._failure(error), began)
        else:
            if self._adopt(pool, session):
                self._idle(session)

    async def _connect(self, pool: Pool, timeout: float = 0.0) -> Session:
        """Open a connection that `room` and `pool.connecting` already count; a failure or cancellation releases both. Raises
        ConnectFailed or NoRoute. `timeout`: as for `Opener.open`."""
        session = None
        try:
            session = await self.opener.open(pool.site, pool.source, timeout)
            return session
        finally:
            pool.connecting -= 1
            if session is None:
                self.room.give(pool)

    def _failure(self, error: Exception) -> ConnectFailed | NoRoute:
        return error if isinstance(error, ConnectFailed | NoRoute) else ConnectFailed("connect", *self._unexpected(error))

    def _not_opened(self, pool: Pool, failure: ConnectFailed | NoRoute, began: float) -> None:
        """An attempt to connect, decided on at `began` (loop time), failed."""
        said = failure.said if isinstance(failure, ConnectFailed) else None
        if said is not None and said.code == 421:
            self.decisions.learned(pool, pool.refused_connection(said, began, self.loop.time()))
        if not pool.sessions and pool.is_news(began):
            self._site_failed(pool, failure)
        elif not pool.sessions:
            self._pump(pool)

    async def _probe_site(self, pool: Pool) -> None:
        """Probe a site that is down. The probe is a connection like any other (TLS, AUTH), so that it fails for the same reasons
        as delivery; but no message is charged for it."""
        try:
            session = await self._connect(pool, pool.probe_timeout)
        except Exception as error:
            pool.probe_at = self.loop.time() + pool.probe_pause(self.loop.time())
            if not _worth_probing(self._failure(error)):
                pool.probe_at = float("inf")
            self._pump(pool)  # it may be due meanwhile
        else:
            if self._adopt(pool, session):
                self._idle(session)
        finally:
            pool.probing = False
            self._site_probes -= 1

    def _probe_sites(self, now: float, clock: int) -> None:
        """Start the probes that are due: of sites that are down and have sleeping mail, or do not answer attempts to connect."""
        due = [
            pool for pool in self.pools.values()
            if (pool.connecting or pool.failures) and not pool.probing and pool.probe_at <= now
            and (pool.is_silent(now) if pool.connecting else pool.sleeping and pool.down_until > clock)
        ]  # fmt: skip
        for pool in sorted(due, key=lambda pool: pool.probe_at):
            if self._site_probes >= SITE_PROBES:
                break
            if self.decisions.states.suspension(pool.shape.key, "") is not None:
                continue
            # Beyond the window: it may be full of attempts that are stalled.
            if self.room.may_probe(pool, pool.probe_pause(now)) and self.room.take(pool, beyond=1):
                self._site_probes += 1
                pool.probing = True
                self._count_in(pool)
                self._spawn(self._probe_site(pool))

    def _count_in(self, pool: Pool) -> None:
        if not pool.connecting:
            pool.opening_since = self.loop.time()
        pool.connecting += 1

    def _unexpected(self, error: Exception) -> tuple[str, str]:
        """Log an internal error with its source line; returns (public reason, detail for the log). It must not strand mail: the
        caller defers it as for any other failure."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"internal error: {type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        self.log.event("warning", text=redacted(text))
        return "internal error", text

    def _adopt(self, pool: Pool, session: Session) -> bool:
        """Add a new connection to the pool; whether it is still open."""
        if session.ended:
            self.room.give(pool)
            return False
        if pool.failures:
            self.decisions.alive(pool)
        pool.up(self.loop.time())
        self._wake_pool(pool)
        pool.served = 0
        self.room.arrived(pool)
        self.counters.add(OPENED, 1)
        session.leaving = self.pools.get(pool.key) is not pool  # replaced by a reload
        pool.sessions.add(session)
        self._owner[session] = pool
        return True

    async def _try_elsewhere(self, pool: Pool, entry: Entry, unfit: str, refusal: tuple[str, str]) -> None:
        """The peer `unfit` cannot accept a message (no SMTPUTF8, no 8BITMIME, SIZE too small): try the other hosts of its site.
        When none can, the failure is permanent; when one could not be reached, it is temporary."""
        failure: ConnectFailed | NoRoute | None
        try:
            session, failure = await self._one_that_takes(pool, entry, unfit)
        except Exception as error:
            session, failure = None, self._failure(error)
        except BaseException:
            entry.in_flight = False
            self._return(entry)
            raise
        if session is not None:
            session.send(_mail(entry, pool.site.route.rewrite_sender))
        elif failure is None:
            self._charge(entry, PERMANENT, "mail", unfit, 0, *refusal)
        else:
            phase = failure.phase if isinstance(failure, ConnectFailed) else "route"
            self._charge(entry, TRANSIENT, phase, "", 0, "4.4.1", failure)

    async def _one_that_takes(
        self, pool: Pool, entry: Entry, unfit: str
    ) -> tuple[Session | None, ConnectFailed | NoRoute | None]:
        """A connection to a host of a site, other than `unfit`, that can accept a message; None when there is none, and why one
        could not be reached."""
        failure: ConnectFailed | NoRoute | None = None
        asked = {unfit}
        peers: list[Peer] = []
        try:
            peers = await self.opener.peers(pool.site)
        except NoRoute as error:  # temporary: the names resolved a moment ago
            failure = error
        for peer in peers:
            if peer.name in asked:
                continue
            asked.add(peer.name)
            try:
                session = await self._connect_with_room(pool, peer)
            except ConnectFailed as error:
                failure = error
                continue
            if not self._adopt(pool, session):
                failure = ConnectFailed("ehlo", f"{peer.name}: the peer closed the connection")
            elif _unfit(entry, session.core.features) is None:
                return session, None
            else:
                self._idle(session)
        return None, failure

    async def _connect_with_room(self, pool: Pool, peer: Peer) -> Session:
        """A connection to one host of a site, as soon as the limits allow it. ConnectFailed when it fails, or the limits do not
        allow it within ROOM_SECONDS."""
        until = self.loop.time() + ROOM_SECONDS
        while not self.room.take(pool):
            if self.loop.time() > until:
                raise ConnectFailed("connect", f"{peer.name}: no free connection to this site")
            await asyncio.sleep(0.1)
        try:
            return await self.opener.to(pool.site, peer, pool.source)
        except BaseException:
            self.room.give(pool)
            raise

    def _make(self, core: ClientSession, peer: str) -> Session:
        session = Session(core, peer, self.loop.time, self._idle, self._finished, self._lost, self.config.delivery.patience)
        session.read_pieces = self._pieces
        return session

    def _site_failed(self, pool: Pool, error: ConnectFailed | NoRoute) -> None:
        """No host of the site can be used: charge one message, let the queues sleep."""
        entries = pool.ready.take_all()
        if isinstance(error, NoRoute) and error.permanent:
            for entry in entries:
                self._charge(entry, PERMANENT, "route", "", 0, error.enhanced, error)
            return
        until = self._clock() + self._pause(pool.failures + 1)
        pool.down(pool.failures + 1, until, str(error), self.loop.time(), _worth_probing(error))
        if isinstance(error, ConnectFailed) and error.said is None and pool.learned_at_shutdown(self.loop.time()):
            self.decisions.unlearned(pool, "rate")
        said = (error.said if isinstance(error, ConnectFailed) else None) or Said(0, str(error).encode(), "connect")
        self.decisions.dead(pool, str(error), said, self._queue().clock.wall(until))
        phase = error.phase if isinstance(error, ConnectFailed) else "route"
        enhanced = said.enhanced if said.code else getattr(error, "enhanced", "4.4.1")
        pool.sleeping.update(entry.queue for entry in entries)
        self._charge_one(entries, until, phase, said, enhanced, error)

    # Callbacks of sessions

    def _idle(self, session: Session) -> None:
        """A session can take a message: it is idle, or its message data is written and the next one can be pipelined."""
        pool = self._owner.get(session)
        if pool is None:
            return
        core = session.core
        if not session.leaving and core.messages >= pool.most_messages(self.loop.time()):
            session.leaving = True
        if session.leaving or self.draining or self.room.yields(pool, session):
            if core.idle:
                self._retire(session, pool)
                self._pump(pool)
            return
        if not core.idle and pool.idle:
            return  # other sessions are idle
        mail = None if self._queue().writer.stalled else self._next(pool, session)
        if mail is not None:
            core.begin(mail)
            session._flush()
        elif core.idle and not session.waiting:
            session.waiting = True
            session.idle_since = self.loop.time()
            pool.idle.append(session)

    def _finished(self, session: Session, mail: Mail) -> None:
        entry = mail.cargo
        assert isinstance(entry, Entry)
        self.counters.add(TRANSACTIONS, 1)
        if self._lost_before:
            self._lost_before.pop(entry.ident, None)
        queue = self._queue()
        entry.route = (session.peer, mail.answer)
        pool = self._owner.get(session)
        if mail.all_sent:
            if pool is not None:
                pool.went_well(self.loop.time())
            queue.finish(entry, None)
            return
        judged = judge(mail, session.peer, lambda _: Said(0, b"no reply was seen", "final"), self.shaping.rule)
        self.decisions.rules(pool, entry.name.application, judged.rules)
        good = all(a.kind == SUCCESS for a in judged.results.values())
        queue.finish(entry, None if good else judged.results, judged.retry_after_ms)

    def _lost(self, session: Session, reason: str) -> None:
        """A connection ended, expected or not: settle the messages under way on it."""
        pool = self._owner.pop(session, None)
        if pool is None:
            return
        pool.sessions.discard(session)
        if session in pool.idle:
            pool.idle.remove(session)
        self.room.give(pool)
        core = session.core
        self.counters.observe("relaymta_messages_per_session", core.messages)
        said = core.last_said
        if said is not None and said.code == 421 and core.under_way():
            self.decisions.learned(pool, pool.refused_message(said, session, self.loop.time(), self.room.workers))
        for mail in core.under_way():
            self._settle_lost(pool, session, mail, reason)
        self._pump(pool)

    def _settle_lost(self, pool: Pool, session: Session, mail: Mail, reason: str) -> None:
        entry = mail.cargo
        assert isinstance(entry, Entry)
        core = session.core
        lost = self._lost_before.get(entry.ident, 0)
        said = core.last_said
        doubt = ""
        if mail.data_sent:
            self.counters.add(IN_DOUBT, 1)
            doubt = " (in doubt: the message was sent, its reply did not come)"
        if mail.reached == "" and core.messages and not mail.said and lost < FREE_RETRIES:
            # A reused connection that ended before the reply to MAIL: no attempt is counted. (Not where an earlier transaction of
            # the same message was on it: its recipients must not get the message again.)
            self._lost_before[entry.ident] = lost + 1
            entry.in_flight = False
            if self.pools.get(pool.key) is pool:
                pool.ready.push(entry, first=True)
            else:  # replaced by a reload
                self.offer(entry)
            return
        self._lost_before.pop(entry.ident, None)
        phase = core.awaiting or mail.reached or "mail"
        inside = session.cause and session.cause + doubt
        unanswered = Attempt(wall_ms(), TRANSIENT, phase, session.peer, 0, "4.4.2", reason + doubt, inside)
        judged = judge(mail, session.peer, lambda _: said or unanswered, self.shaping.rule)
        self.decisions.rules(pool, entry.name.application, judged.rules)
        entry.route = (session.peer, b"")
        self._queue().finish(entry, judged.results, judged.retry_after_ms)

    def _kept_token(self, name: str) -> str:
        state = self._states.get(TOKEN, name)
        return state.reply if state is not None else ""

    def _keep_token(self, name: str, token: str) -> None:
        now = wall_ms()
        state = SiteState(TOKEN, name, "", now, now + TOKEN_KEPT_MS, "automatic", "", token)
        self._states.learn(state)
        self._publish(state, state.key)

    def _send_back(self, pool: Pool, until: int, tenant: str | None) -> None:
        """Put the entries in a pool's ready list (of one tenant, or all) back, and let their queues sleep."""
        for entry in pool.ready.take_all():
            if tenant is None or entry.name.application == tenant:
                self._return(entry)
                self._sleep(pool, entry.queue, until)
            else:
                pool.ready.push(entry)
        if not len(pool.ready):
            self.room.wait_no_longer(pool)

    def _wake(self) -> None:
        """Wake all queues, whether this process or its predecessor let them sleep; those that must sleep are put to sleep again
        when their mail is offered."""
        self._parked.clear()
        self._spawn(self._queue().wake_queues())

    def _bounce(self, entry: Entry, indexes: list[int], reason: str) -> None:
        """A bounce policy: these recipients fail permanently; the others are due at once."""
        entry.in_flight = True
        attempt = Attempt(wall_ms(), PERMANENT, "queue", "", 0, "5.7.1", reason)
        self._queue().finish(entry, dict.fromkeys(indexes, attempt), 1)

    def site_state_changed(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """Called when a state was published on the machine, or (None) the one with this key removed."""
        if key[0] not in (HOLD, BOUNCE):
            self.decisions.changed(state, key)
            return
        self.policies.refresh()
        for pool in self.pools.values():
            for entry in pool.ready.take_all():
                if not self.policies.apply(entry):
                    pool.ready.push(entry)

    def _charge(
        self, entry: Entry, kind: str, phase: str, peer: str, code: int, enhanced: str, why: str | Failure, retry_after: int = 0
    ) -> None:
        """Finish an entry with an attempt that reached no transaction, for all of its recipients. `retry_after`: ms, 0: by the
        schedule."""
        entry.in_flight = True
        attempt = Attempt(wall_ms(), kind, phase, peer, code, enhanced, *told(why))
        self._queue().finish(entry, dict.fromkeys((i for i, _ in entry.recipients), attempt), retry_after)

    def _retire(self, session: Session, pool: Pool) -> None:
        """Close an idle session."""
        if session in pool.idle:
            pool.idle.remove(session)
        session.quit()
        if self._owner.pop(session, None) is not None:
            pool.sessions.discard(session)
            self.room.give(pool)
            self.counters.observe("relaymta_messages_per_session", session.core.messages)

    # Large messages

    async def _pieces(self, mail: Mail) -> AsyncIterator[bytes]:
        """The message data of a large message, in pieces."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        async for piece in self._queue().stream_data(entry):
            yield piece

    # Timer

    def _check(self) -> None:
        """Runs every CHECK_EVERY seconds; the timer is set first, so that an exception does not end it."""
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)
        if self._probing is not None and self._probing.cancelled:
            self._probe_next()  # it was held, deleted or bounced meanwhile
        self.policies.tick()
        now = self.loop.time()
        clock = self._clock() if self.queue is not None else 0
        for session, pool in list(self._owner.items()):
            if session.deadline and now > session.deadline:
                self.counters.add(WATCHDOG, 1)
                self._log_stalled(session)
                awaiting = session.core.awaiting
                pool.timed_out(session.deadline - TIMEOUTS[awaiting or MESSAGE_DATA] * self.config.delivery.patience, now)
                session.fail("timed out " + (f"waiting for the reply to {awaiting}" if awaiting else "sending the message data"))
            elif session.core.idle and now - session.idle_since > self.config.delivery.idle and session in pool.idle:
                self._retire(session, pool)
        if not self.draining and self.queue is not None:
            self._probe_sites(now, clock)
        for pool in list(self.pools.values()):
            if pool.sleeping and pool.down_until <= clock:
                self._wake_pool(pool)
            if pool.skipped and len(pool.ready) < CROWDED // 2:
                self._unskip(pool)  # also where `_pump` did not empty it
            if len(pool.ready):
                self._pump(pool)
            elif not pool.sessions and not pool.connecting:
                kept = FORGET_MS if pool.failures or pool.learned else 0  # or the failures would be counted from 0
                if pool.down_until + kept <= clock:
                    self.room.wait_no_longer(pool)
                    self._unskip(pool)
                    self.pools.pop(pool.key, None)

    def _log_stalled(self, session: Session) -> None:
        """Log a delivery that the watchdog ends: its messages, the peer, and what it was waiting for."""
        names = [format_id(mail.cargo.ident) for mail in session.core.under_way() if isinstance(mail.cargo, Entry)]
        waits = f"the reply to {session.core.awaiting}" if session.core.awaiting else "the peer to accept its message data"
        stack = "".join(f"; {line}" for line in session.stack())
        self.log.event("warning", text=f"delivery of {', '.join(names)} to {session.peer} stalled waiting for {waits}{stack}")

    def look_back(self) -> None:
        """Called at start: wake the queues that slept when the previous process ended, since their sites may be up again; those
        that must sleep on are put to sleep again when their mail is offered."""
        self._wake()

    def forget_parked(self) -> None:
        """Forget which queues sleep: others may have woken them."""
        self._parked.clear()

    def flush(self) -> None:
        """Forget that sites are down and domains unresolved: an operator wants another attempt now."""
        self._unresolved.clear()
        self._parked.clear()
        for pool in self.pools.values():
            pool.down_until = 0
            self._wake_pool(pool)
        self.decisions.forget_dead()

    def reconfigure(self, config: Config, routes: RouteTable) -> None:
        """Apply a new configuration: entries in memory are put back and routed anew."""
        self._configure(config, routes)
        for pool in self.pools.values():
            self._unskip(pool)
            for entry in pool.ready.take_all():
                self._return(entry)
            for session in list(pool.idle):
                self._retire(session, pool)
            self.room.wait_no_longer(pool)
        # Messages under way finish in their old pool, whose limits are counted under its old name; new mail makes new pools.
        self.pools.clear()
        for session in self._owner:
            session.leaving = True
        self._wake()

    @property
    def connections(self) -> int:
        """Open connections to peers."""
        return len(self._owner)

    def in_flight(self) -> int:
        """Messages in flight."""
        return sum(len(session.core.under_way()) for session in self._owner)

    async def drain(self, seconds: float, data_seconds: float) -> None:
        """Start nothing new; wait up to `seconds` for messages under way, `data_seconds` for those past their final dot; then
        close all connections."""
        self.draining = True
        start = self.loop.time()
        for pool in self.pools.values():
            for session in list(pool.idle):
                self._retire(session, pool)
        while self.in_flight():
            spent = self.loop.time() - start
            sent = any(mail.data_sent for session in self._owner for mail in session.core.under_way())
            if spent > data_seconds or (spent > seconds and not sent):
                break
            await asyncio.sleep(0.02)
        for session in list(self._owner):
            session.fail("shutting down")
        self._timer.cancel()
        self.opener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Unresolved:
    """A domain that could not be looked up: consecutive failures, until when it is not looked up again (queue clock), and when it
    failed last (loop time)."""

    failures: int
    until: int
    known_at: float


def _worth_probing(error: ConnectFailed | NoRoute) -> bool:
    """Whether a site that failed is worth probing. One that rejects connections or the login permanently (5xx) is up: probing it
    again and again does not help, and locks accounts."""
    said = error.said if isinstance(error, ConnectFailed) else None
    return said is None or not (said.code >= 500 or said.phase == "auth")


def _is_large(entry: Entry) -> bool:
    """Whether the message is a large one: its message data is streamed from a file of its own."""
    body = entry.envelope.body
    return body is not None and not body.segment


def _unfit(entry: Entry, features: Features) -> tuple[str, str] | None:
    """Why a peer with these features cannot accept a message, as (enhanced status code, text); None when it can."""
    envelope = entry.envelope
    if envelope.flags & SMTPUTF8 and not features.smtputf8:
        needed = not envelope.sender.isascii() or not all(address.isascii() for _, address in entry.recipients)
        if needed:
            return "5.6.7", "the message needs SMTPUTF8, which the peer does not offer"
    if envelope.flags & EIGHT_BIT and not features.eight_bit:
        return "5.6.3", "the message needs 8BITMIME, which the peer does not offer"
    if features.size and envelope.size > features.size:
        return "5.3.4", f"the message has {envelope.size} octets, the peer accepts {features.size}"
    return None


def _mail(entry: Entry, rewrite: str) -> Mail:
    """An entry as a Mail. `rewrite`: the route's `rewrite_sender`: an address or "@domain"; "" for none."""
    envelope = entry.envelope
    sender = envelope.sender
    if rewrite and sender:
        sender = sender.rpartition("@")[0] + rewrite if rewrite.startswith("@") else rewrite
    flags = envelope.flags
    return Mail(
        entry,
        sender,
        entry.recipients,
        entry.data,
        envelope.size,
        bool(flags & EIGHT_BIT),
        bool(flags & SMTPUTF8),
    )
