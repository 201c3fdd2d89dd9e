"""Delivery: entries offered by the queue wait at their site, ride on its sessions, and end as outcomes.

A site has a ready list and a pool. An entry goes to an idle session; when there is none and the limits allow, a
connection is opened; otherwise it follows behind the text of a message under way. Where no host of a site can be
reached, one message is charged with the attempt, the others go back untried and their queues sleep; all of them are due, so
that they go as soon as a look in the background finds the site up. (What a failure of a site is: pool.py.)
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
from relaymta.node import BOUNCE, HOLD, TOKEN, Fact, Facts
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
from relaymta.send.decisions import Decisions, Tell
from relaymta.send.oauth import Tokens
from relaymta.send.opener import Opener, Sources
from relaymta.send.outcome import judge
from relaymta.send.pool import Pool, pool_key
from relaymta.send.room import Room
from relaymta.send.session import TIMEOUTS, Session
from relaymta.send.standing import Orders
from relaymta.shm import Flying, Limits, Rates

__all__ = ["Dispatcher"]

OPENED = index("relaymta_sessions_total", "opened")
FAILED = index("relaymta_sessions_total", "failed")
TRANSACTIONS = index("relaymta_transactions_total")
IN_DOUBT = index("relaymta_in_doubt_total")
WATCHDOG = index("relaymta_watchdog_total")
CORRUPT = index("relaymta_corrupt_bodies_total")

CHECK_EVERY = 1.0
LOAD_TOGETHER = 32  # bodies read from disk in one go
ROOM_SECONDS = 30.0  # waited for a connection to another host of a site
FORGET_MS = 3 * 3_600_000  # after this long without a try a site that was down is a new one
FREE_RETRIES = 3  # times a message may lose a reused connection before it costs an attempt
LOOKUPS = 200  # domains whose hosts are looked up at the same time
KEPT_DOWN = 50_000  # domains and queues that are remembered to be left alone
CROWDED = 2000  # messages that wait for one site in memory; further ones stay on disk
AT_ONCE_MS = 1  # as a delay: what keeps a message then is that its queue sleeps
LOOKS = 50  # sites that are looked at in the background at the same time
TOKEN_KEPT_MS = 400 * 86_400_000  # a refresh token that was not used for so long is worth nothing anywhere


class Dispatcher:
    """All delivery of one worker. `offer` is the queue's way in."""

    def __init__(
        self,
        config: Config,
        routes: RouteTable,
        limits: Limits,
        rates: Rates,
        flying: Flying,
        counters: Counters,
        log: Log,
        resolver: Resolver,
        suspects: set[int],
        facts: Facts,
        tell: Tell,
    ) -> None:
        """`suspects`: ids that were in flight when the worker before this one died; they are tried one at a time.
        `facts`: what the machine knows; `tell(fact, key)` makes a fact known to it (None: `key` holds no longer)."""
        self.room = Room(limits, rates, config.delivery.connections, self._pump_in, asyncio.get_running_loop().time)
        self.flying = flying
        self._suspects = suspects
        self._lineup: list[Entry] = []  # suspects that wait for their turn
        self._alone: Entry | None = None
        self._choosing = False  # whose turn it is
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
        self._asking: dict[tuple[str, str, str], list[Entry]] = {}  # whose site is being looked up
        self._nowhere: dict[tuple[str, str], _Nowhere] = {}  # by route and domain
        self._parked: dict[int, int] = {}  # queue: until when we let it sleep (queue clock)
        self._lookups = asyncio.Semaphore(LOOKUPS)
        self._looks = 0  # at sites that are down, under way
        self.opener = Opener(config, resolver, log, Tokens(self._kept_token, self._keep_token), self._make)
        self._facts, self._tell = facts, tell
        self.decisions = Decisions(
            facts, tell, log, self.pools, self.loop.time, self._clock, self._send_back, self._wake, self._rise
        )
        self.orders = Orders(facts, self._queue, self._return, self._give_up, self._spawn)
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

    # In

    def awake(self, name: QueueName) -> bool:
        """Whether mail of a queue would be tried at once."""
        site = self.sites.known(name)
        if self.draining or site is None or site.route.sources:
            return not self.draining
        pool = self.pools.get(site.key)
        if pool is None:
            return self.decisions.facts.suspension(self.shaping.shape(site).key, name.application) is None
        return len(pool.ready) < CROWDED and not self.decisions.asleep(pool, name.application)

    def offer(self, entry: Entry) -> None:
        """Take an entry to deliver."""
        if self.draining:
            self._return(entry)
        elif self._suspects and entry.ident in self._suspects:
            self._lineup.append(entry)
            if self._alone is None:
                self._next_suspect()
        elif not self.orders or not self.orders.obeyed(entry):
            site = self.sites.known(entry.name)
            if site is not None:
                self._arrive(site, entry)
            else:
                self._look_up(entry)

    def _arrive(self, site: Site, entry: Entry) -> None:
        """An entry whose site is known."""
        if self._staging is not None and not all(self._staging.allows(address) for _, address in entry.recipients):
            # It was queued before staging was switched on: it stays.
            self._charge(entry, TRANSIENT, "route", "", 0, "4.7.1", "staging: not sent to real recipients (staging.redirect)")
            return
        pool = self._pool(site, entry)
        until = self.decisions.asleep(pool, entry.name.application)
        if until:
            self._return(entry)
            self._sleep(pool, entry.queue, until)
        elif len(pool.ready) >= CROWDED and entry.name.priority != "express":
            # One slow site does not fill the window that all sites share.
            pool.skipped.add(entry.queue)
            self._queue().skip(entry.queue)
            self._return(entry)
        elif pool.idle and not len(pool.ready) and entry.text is not None and not pool.paced:
            self._give(pool, pool.idle[-1], entry)
        else:
            pool.ready.push(entry)
            self._pump(pool)

    def _give(self, pool: Pool, session: Session, entry: Entry) -> None:
        """An entry meets an idle session, and nobody is before it."""
        if session.ended or self._queue().writer.stalled:
            pool.ready.push(entry)
            self._pump(pool)
            return
        mail = self._fly(pool, session, entry)
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
        """An entry goes back to the queue untried."""
        self._queue().put_back(entry)
        self.landed(entry)

    def _park(self, queue: int, until: int) -> None:
        """Let a queue sleep."""
        if self._parked.get(queue, 0) < until:
            if len(self._parked) >= KEPT_DOWN:
                self._parked.clear()
            self._parked[queue] = until
            self._queue().park(queue, until)

    def _sleep(self, pool: Pool, queue: int, until: int) -> None:
        """Let a queue sleep because of a site."""
        if pool.failures:
            pool.sleeping.add(queue)
        self._park(queue, until)

    def _rise(self, pool: Pool) -> None:
        """What sleeps because of a site goes on: it is up, or worth another try."""
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
        """Until when we let a queue sleep (queue clock); 0 when we do not."""
        return self._parked.get(queue, 0)

    def _next_suspect(self) -> None:
        """The next suspect's turn. One that comes back at once ends its turn within `offer`: the loop goes on with the next, so
        that hundreds of a site that is down are no recursion."""
        self._alone = None
        if self._choosing:
            return
        self._choosing = True
        try:
            while self._lineup and self._alone is None:
                entry = self._lineup.pop(0)
                self._suspects.discard(entry.ident)
                if not entry.cancelled:
                    self._alone = entry
                    self.flying.try_alone(entry.ident)
                    self.offer(entry)
        finally:
            self._choosing = False
        if self._alone is None:
            self.flying.try_alone(0)

    def landed(self, entry: Entry) -> None:
        """An entry's outcome is durable, or it went back untried."""
        self.flying.remove(entry.ident)
        if entry is self._alone:
            self._next_suspect()

    def _clock(self) -> int:
        return self._queue().clock.now()

    def _queue(self) -> Queue:
        assert self.queue is not None
        return self.queue

    # Which site

    def _look_up(self, entry: Entry) -> None:
        """An entry waits until its domain's hosts are known; one question for all of its queue."""
        name = entry.name
        _, until = self.nowhere(name)
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

    def nowhere(self, name: QueueName) -> tuple[int, int]:
        """(How often a domain could not be looked up in a row, until when it is left alone by the queue's clock)."""
        known = self._nowhere.get((name.route, name.domain))
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
            if site is None and failure is None:  # we are cancelled
                for entry in entries:
                    self._return(entry)
        if failure is not None:
            self._no_site(name, entries, failure, began)
        elif site is not None:
            if self._nowhere:
                self._nowhere.pop((name.route, name.domain), None)
            for entry in entries:
                self._arrive(site, entry)

    def _no_site(self, name: QueueName, entries: list[Entry], error: NoRoute, began: float) -> None:
        """A domain has no host, for good or for now. As with sites (pool.py), look-ups that are under way when one of them
        fails, for other tenants or classes, are one failure."""
        if error.permanent:
            for entry in entries:
                self._charge(entry, PERMANENT, "route", "", 0, error.enhanced, error)
            return
        known = self._nowhere.get((name.route, name.domain))
        if known is not None and began <= known.known_at:
            for entry in entries:
                self._look_up(entry)
            return
        failures = known.failures + 1 if known is not None else 1
        until = self._clock() + self._pause(failures)
        if len(self._nowhere) >= KEPT_DOWN:
            self._nowhere.clear()
        self._nowhere[name.route, name.domain] = _Nowhere(failures, until, self.loop.time())
        self._charge_one(entries, until, "route", Said(0, b"", "route"), error.enhanced, error)

    def _pause(self, failures: int) -> int:
        return retry_delay(failures, int(self.config.delivery.first_retry * 1000))

    def _charge_one(self, entries: list[Entry], until: int, phase: str, said: Said, enhanced: str, why: Failure) -> None:
        """Where nothing can be delivered one message is charged with the attempt; the others keep their place. Their queues
        sleep, and nothing else keeps them: the one that was charged is due like the others, and goes when its queue wakes."""
        for number, entry in enumerate(entries):
            self._park(entry.queue, until)
            if number == 0:
                self._charge(entry, TRANSIENT, phase, "", said.code, enhanced, why, AT_ONCE_MS)
            else:
                self._return(entry)

    # Entries meet sessions

    def _pump(self, pool: Pool) -> None:
        """Give ready entries to idle sessions, and open connections for the others."""
        if self.draining or self._queue().writer.stalled:
            return
        if pool.skipped and len(pool.ready) < CROWDED // 2:
            self._uncrowd(pool)
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

    def _uncrowd(self, pool: Pool) -> None:
        skipped, pool.skipped = pool.skipped, set()
        self._queue().skip_no_longer(skipped)

    def _open_more(self, pool: Pool) -> None:
        wanted = len(pool.ready)
        if not wanted:
            self.room.wait_no_longer(pool)
            return
        if pool.failures and pool.down_until > self._clock():
            self._send_back(pool, pool.down_until, None)  # what came back from connections that were lost
            return
        if pool.pumping_at > self.loop.time() and not pool.waiting:
            return  # a rate lets no message begin now
        most = 1 if pool.failures else 50  # a site that was down is knocked at once
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
        """The next entry as a Mail for this session, or None while there is none (or its text is still being read, or a
        rate has no room)."""
        ready = pool.ready
        while (entry := ready.head()) is not None:
            if entry.text is None and not _is_large(entry):
                self._load(pool)
                return None
            if pool.paced and not self.room.take_message(pool):
                return None
            ready.pop()
            mail = self._fly(pool, session, entry)
            if mail is not None:
                return mail
        return None

    def _fly(self, pool: Pool, session: Session, entry: Entry) -> Mail | None:
        """An entry is in flight from now on: its Mail for this session, or None when this peer cannot take it."""
        entry.flying = True
        self.flying.add(entry.ident)
        refusal = _unfit(entry, session.core.features)
        if refusal is None:
            pool.began(self.loop.time())
            return _mail(entry, pool.site.route.rewrite_sender)
        self._spawn(self._try_elsewhere(pool, entry, session.peer, refusal))
        return None

    def _load(self, pool: Pool) -> None:
        """Read the texts of the first entries that wait, together, on a reader thread."""
        if pool.loading:
            return
        pool.loading = True
        wanted = [e for e in pool.ready.first(LOAD_TOGETHER) if e.text is None and not _is_large(e)]
        self._spawn(self._load_texts(pool, wanted))

    async def _load_texts(self, pool: Pool, entries: list[Entry]) -> None:
        try:
            texts = await self._queue().read_texts(entries)
        finally:
            pool.loading = False
        for entry, text in zip(entries, texts, strict=True):
            if isinstance(text, StoreError):
                self._unreadable(pool, entry, text)
            else:
                entry.text = text
        self._pump(pool)

    def _unreadable(self, pool: Pool, entry: Entry, error: StoreError) -> None:
        """A body that cannot be read is never sent; it is tried again later, and said loudly."""
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
        """Open one connection to a site, as was decided at `began`; its hosts are tried in order."""
        try:
            session = await self._connect(pool)
        except Exception as error:
            self.counters.add(FAILED, 1)
            self._not_opened(pool, self._failure(error), began)
        else:
            if self._adopt(pool, session):
                self._idle(session)

    async def _connect(self, pool: Pool, timeout: float = 0.0) -> Session:
        """A connection for which there is room, and a place in `pool.connecting`: both are given back when there is none."""
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
        """An attempt to connect, decided on at `began`, came to nothing."""
        said = failure.said if isinstance(failure, ConnectFailed) else None
        if said is not None and said.code == 421:
            self.decisions.learned(pool, pool.refused_connection(said, began, self.loop.time()))
        if not pool.sessions and pool.is_news(began):
            self._site_failed(pool, failure)
        elif not pool.sessions:
            self._pump(pool)

    async def _look(self, pool: Pool) -> None:
        """See whether a site that is down can be used again. It is looked at with a connection such as its mail would have, so
        that whatever kept the mail away is found out; but nothing is charged for one that fails."""
        try:
            session = await self._connect(pool, pool.look_timeout)
        except Exception as error:
            pool.look_at = self.loop.time() + pool.look_pause(self.loop.time())
            if not _may_come_back(self._failure(error)):
                pool.look_at = float("inf")
            self._pump(pool)  # its time may have come meanwhile
        else:
            if self._adopt(pool, session):
                self._idle(session)
        finally:
            pool.looking = False
            self._looks -= 1

    def _look_around(self, now: float, clock: int) -> None:
        """Begin to look at the sites whose turn it is: that are down with mail asleep, or let us wait for a connection."""
        turn = [
            pool for pool in self.pools.values()
            if (pool.connecting or pool.failures) and not pool.looking and pool.look_at <= now
            and (pool.is_silent(now) if pool.connecting else pool.sleeping and pool.down_until > clock)
        ]  # fmt: skip
        for pool in sorted(turn, key=lambda pool: pool.look_at):
            if self._looks >= LOOKS:
                break
            if self.decisions.facts.suspension(pool.shape.key, "") is not None:
                continue
            # Beyond the window: it may be full of attempts that stand still.
            if self.room.may_look(pool, pool.look_pause(now)) and self.room.take(pool, beyond=1):
                self._looks += 1
                pool.looking = True
                self._count_in(pool)
                self._spawn(self._look(pool))

    def _count_in(self, pool: Pool) -> None:
        if not pool.connecting:
            pool.opening_since = self.loop.time()
        pool.connecting += 1

    def _unexpected(self, error: Exception) -> tuple[str, str]:
        """A mistake of ours must not strand mail: it waits, as for any other failure, and the log says where it happened."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"internal error: {type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        self.log.event("warning", text=redacted(text))
        return "internal error", text

    def _adopt(self, pool: Pool, session: Session) -> bool:
        """Take a fresh connection into the pool; whether it still lives."""
        if session.ended:
            self.room.give(pool)
            return False
        if pool.failures:
            self.decisions.alive(pool)
        pool.up(self.loop.time())
        self._rise(pool)
        pool.served = 0
        self.room.arrived(pool)
        self.counters.add(OPENED, 1)
        session.leaving = self.pools.get(pool.key) is not pool  # a reload has made another one of it
        pool.sessions.add(session)
        self._owner[session] = pool
        return True

    async def _try_elsewhere(self, pool: Pool, entry: Entry, unfit: str, refusal: tuple[str, str]) -> None:
        """The peer `unfit` cannot take a message (no SMTPUTF8, 8BITMIME, too small): another host of its site may. When
        none can it fails for good, when one could not be asked it is tried again later."""
        failure: ConnectFailed | NoRoute | None
        try:
            session, failure = await self._one_that_takes(pool, entry, unfit)
        except Exception as error:
            session, failure = None, self._failure(error)
        except BaseException:
            entry.flying = False
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
        """A connection to a host of a site, other than `unfit`, that can take a message; None when there is none, and why one
        could not be asked."""
        failure: ConnectFailed | NoRoute | None = None
        asked = {unfit}
        peers: list[Peer] = []
        try:
            peers = await self.opener.peers(pool.site)
        except NoRoute as error:  # the names were there a moment ago
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
        """A connection to one host of a site, as soon as the limits allow it."""
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
        pool.down(pool.failures + 1, until, str(error), self.loop.time(), _may_come_back(error))
        if isinstance(error, ConnectFailed) and error.said is None and pool.farewell(self.loop.time()):
            self.decisions.unlearned(pool, "rate")
        said = (error.said if isinstance(error, ConnectFailed) else None) or Said(0, str(error).encode(), "connect")
        self.decisions.dead(pool, str(error), said, self._queue().clock.wall(until))
        phase = error.phase if isinstance(error, ConnectFailed) else "route"
        enhanced = said.enhanced if said.code else getattr(error, "enhanced", "4.4.1")
        pool.sleeping.update(entry.queue for entry in entries)
        self._charge_one(entries, until, phase, said, enhanced, error)

    # Sessions speak

    def _idle(self, session: Session) -> None:
        """A session can take a message: directly, or (text written, reply awaited) one more behind it."""
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
            return  # others are free
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
        """A connection ended, expected or not; what was under way on it is settled."""
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
        if mail.text_out:
            self.counters.add(IN_DOUBT, 1)
            doubt = " (in doubt: the message was sent, its reply did not come)"
        if mail.reached == "" and core.messages and not mail.said and lost < FREE_RETRIES:
            # A reused connection that died before MAIL's reply: as if it had never been there. (Not where a transaction of this
            # very message went before: who got it then must not get it again.)
            self._lost_before[entry.ident] = lost + 1
            entry.flying = False
            if self.pools.get(pool.key) is pool:
                pool.ready.push(entry, first=True)
            else:  # a reload has made another one of it
                self.offer(entry)
            return
        self._lost_before.pop(entry.ident, None)
        phase = core.awaiting or mail.reached or "mail"
        inside = session.cause and session.cause + doubt
        never = Attempt(wall_ms(), TRANSIENT, phase, session.peer, 0, "4.4.2", reason + doubt, inside)
        judged = judge(mail, session.peer, lambda _: said or never, self.shaping.rule)
        self.decisions.rules(pool, entry.name.application, judged.rules)
        entry.route = (session.peer, b"")
        self._queue().finish(entry, judged.results, judged.retry_after_ms)

    def _kept_token(self, name: str) -> str:
        fact = self._facts.get(TOKEN, name)
        return fact.reply if fact is not None else ""

    def _keep_token(self, name: str, token: str) -> None:
        now = wall_ms()
        fact = Fact(TOKEN, name, "", now, now + TOKEN_KEPT_MS, "automatic", "", token)
        self._facts.learn(fact)
        self._tell(fact, fact.key)

    def _send_back(self, pool: Pool, until: int, tenant: str | None) -> None:
        """What waits in a pool (of one tenant, or all) goes back to queues that sleep."""
        for entry in pool.ready.take_all():
            if tenant is None or entry.name.application == tenant:
                self._return(entry)
                self._sleep(pool, entry.queue, until)
            else:
                pool.ready.push(entry)
        if not len(pool.ready):
            self.room.wait_no_longer(pool)

    def _wake(self) -> None:
        """Queues that were put to sleep, by us or by the process before us, may go on; those that may not are put to sleep
        again when their mail is offered."""
        self._parked.clear()
        self._spawn(self._queue().wake_queues())

    def _give_up(self, entry: Entry, indexes: list[int], reason: str) -> None:
        """A standing order is that mail to these recipients comes back to its sender; the others are due at once."""
        entry.flying = True
        attempt = Attempt(wall_ms(), PERMANENT, "queue", "", 0, "5.7.1", reason)
        self._queue().finish(entry, dict.fromkeys(indexes, attempt), 1)

    def fact_changed(self, fact: Fact | None, key: tuple[str, str, str]) -> None:
        """The machine has learned a fact, or (None) forgotten the one with this key."""
        if key[0] not in (HOLD, BOUNCE):
            self.decisions.changed(fact, key)
            return
        self.orders.refresh()
        for pool in self.pools.values():
            for entry in pool.ready.take_all():
                if not self.orders.obeyed(entry):
                    pool.ready.push(entry)

    def _charge(
        self, entry: Entry, kind: str, phase: str, peer: str, code: int, enhanced: str, why: str | Failure, retry_after: int = 0
    ) -> None:
        """An attempt that reached no transaction, for all recipients of an entry."""
        entry.flying = True
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

    # Large texts

    async def _pieces(self, mail: Mail) -> AsyncIterator[bytes]:
        """A large body's text."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        async for piece in self._queue().stream_text(entry):
            yield piece

    # Time passes

    def _check(self) -> None:
        """Each second, whatever becomes of it."""
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)
        if self._alone is not None and self._alone.cancelled:
            self._next_suspect()  # it was held, deleted or given up in its turn
        self.orders.tick()
        now = self.loop.time()
        clock = self._clock() if self.queue is not None else 0
        for session, pool in list(self._owner.items()):
            if session.deadline and now > session.deadline:
                self.counters.add(WATCHDOG, 1)
                self._say_stuck(session)
                pool.timed_out(session.deadline - TIMEOUTS[session.core.awaiting or "text"] * self.config.delivery.patience, now)
                session.fail(f"timed out waiting for the reply to {session.core.awaiting or 'text'}")
            elif session.core.idle and now - session.idle_since > self.config.delivery.idle and session in pool.idle:
                self._retire(session, pool)
        if not self.draining and self.queue is not None:
            self._look_around(now, clock)
        for pool in list(self.pools.values()):
            if pool.sleeping and pool.down_until <= clock:
                self._rise(pool)
            if pool.skipped and len(pool.ready) < CROWDED // 2:
                self._uncrowd(pool)  # however it emptied
            if len(pool.ready):
                self._pump(pool)
            elif not pool.sessions and not pool.connecting:
                kept = FORGET_MS if pool.failures or pool.learned else 0  # so that what was learned goes on where it was
                if pool.down_until + kept <= clock:
                    self.room.wait_no_longer(pool)
                    self._uncrowd(pool)
                    self.pools.pop(pool.key, None)

    def _say_stuck(self, session: Session) -> None:
        """The watchdog lets a delivery go: which, against whom, and where it stood."""
        names = [format_id(mail.cargo.ident) for mail in session.core.under_way() if isinstance(mail.cargo, Entry)]
        waits = f"the reply to {session.core.awaiting}" if session.core.awaiting else "its text to be taken"
        stack = "".join(f"; {line}" for line in session.stack())
        self.log.event("warning", text=f"delivery of {', '.join(names)} to {session.peer} stood still waiting for {waits}{stack}")

    def look_back(self) -> None:
        """What slept when the process before this one ended is offered again: it is put to sleep here where that is still right.
        (A site may have been found up meanwhile, and nobody told us.)"""
        self._wake()

    def forget_parked(self) -> None:
        """Queues that we let sleep may have been woken by others."""
        self._parked.clear()

    def flush(self) -> None:
        """Forget that sites are down: an operator wants another try now."""
        self._nowhere.clear()
        self._parked.clear()
        for pool in self.pools.values():
            pool.down_until = 0
            self._rise(pool)
        self.decisions.forget_dead()

    def reconfigure(self, config: Config, routes: RouteTable) -> None:
        """New routes: what waits in memory goes back and is routed anew."""
        self._configure(config, routes)
        for pool in self.pools.values():
            self._uncrowd(pool)
            for entry in pool.ready.take_all():
                self._return(entry)
            for session in list(pool.idle):
                self._retire(session, pool)
            self.room.wait_no_longer(pool)
        # What is under way ends in its old pool, under the name its limits were counted as; new mail makes new pools.
        self.pools.clear()
        for session in self._owner:
            session.leaving = True
        self._wake()

    @property
    def connections(self) -> int:
        """Connections to peers."""
        return len(self._owner)

    def in_flight(self) -> int:
        """Messages under way."""
        return sum(len(session.core.under_way()) for session in self._owner)

    async def drain(self, seconds: float, text_seconds: float) -> None:
        """Start nothing new; wait `seconds` for what is under way, `text_seconds` for what is past its final dot."""
        self.draining = True
        start = self.loop.time()
        for pool in self.pools.values():
            for session in list(pool.idle):
                self._retire(session, pool)
        while self.in_flight():
            spent = self.loop.time() - start
            sent = any(mail.text_out for session in self._owner for mail in session.core.under_way())
            if spent > text_seconds or (spent > seconds and not sent):
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
class _Nowhere:
    """A domain that could not be looked up: how often in a row, until when it is left alone (queue clock), and as of when we know
    (loop time)."""

    failures: int
    until: int
    known_at: float


def _may_come_back(error: ConnectFailed | NoRoute) -> bool:
    """Whether a site that cannot be used may be usable again at any moment. One that refuses us for good, or our login, is there:
    asking again and again makes nothing better, and locks accounts."""
    said = error.said if isinstance(error, ConnectFailed) else None
    return said is None or not (said.code >= 500 or said.phase == "auth")


def _is_large(entry: Entry) -> bool:
    """Whether the text is streamed from a file of its own."""
    body = entry.envelope.body
    return body is not None and not body.segment


def _unfit(entry: Entry, features: Features) -> tuple[str, str] | None:
    """Why a message cannot be given to a peer with these features (enhanced code, text), or None."""
    envelope = entry.envelope
    if envelope.flags & SMTPUTF8 and not features.smtputf8:
        needed = not envelope.sender.isascii() or not all(address.isascii() for _, address in entry.recipients)
        if needed:
            return "5.6.7", "the message needs SMTPUTF8, which the peer does not offer"
    if envelope.flags & EIGHT_BIT and not features.eight_bit:
        return "5.6.3", "8-bit message, and the peer does not offer 8BITMIME"
    if features.size and envelope.size > features.size:
        return "5.3.4", f"the message has {envelope.size} octets, the peer takes {features.size}"
    return None


def _mail(entry: Entry, rewrite: str) -> Mail:
    """A message for a peer. `rewrite`: the sender to use there, an address or "@domain"; "" to leave it as it is."""
    envelope = entry.envelope
    sender = envelope.sender
    if rewrite and sender:
        sender = sender.rpartition("@")[0] + rewrite if rewrite.startswith("@") else rewrite
    flags = envelope.flags
    return Mail(
        entry,
        sender,
        entry.recipients,
        entry.text,
        envelope.size,
        bool(flags & EIGHT_BIT),
        bool(flags & SMTPUTF8),
    )
