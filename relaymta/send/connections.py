"""Connections: ready entries are given to idle sessions, connections are opened for the others, and one failure is charged for
each failed wave of them (pool.py).

An entry is given to an idle session; when there is none and the limits allow, a connection is opened; otherwise it is pipelined
behind the message data of the transaction under way.
"""

import asyncio
from collections.abc import Callable

from relaymta.config import Config, Source
from relaymta.log import Log
from relaymta.metrics import THROTTLES, Counters, index
from relaymta.proto.envelope import PERMANENT, TRANSIENT
from relaymta.proto.smtp_client import ClientSession, Mail, Said
from relaymta.queue import Entry, Queue, format_id
from relaymta.queue.schedule import retry_delay
from relaymta.route.mx import NoRoute
from relaymta.route.shaping import Shaping
from relaymta.route.sites import Site
from relaymta.send.connect import ConnectFailed
from relaymta.send.decisions import Decisions
from relaymta.send.elsewhere import Elsewhere
from relaymta.send.loading import Loading
from relaymta.send.mails import is_large, mail_of, unfit
from relaymta.send.opener import Opener
from relaymta.send.outcomes import Outcomes
from relaymta.send.parking import Parking
from relaymta.send.pool import CROWDED, Pool, pool_key
from relaymta.send.probes import Probes, worth_probing
from relaymta.send.room import Room
from relaymta.send.session import MESSAGE_DATA, TIMEOUTS, Session
from relaymta.send.sessions import Sessions
from relaymta.send.tasks import Tasks
from relaymta.shm import InFlight

__all__ = ["Connections"]

FAILED = index("relaymta_sessions_total", "failed")
WATCHDOG = index("relaymta_watchdog_total")
THROTTLED = {limit: index("relaymta_throttled_seconds_total", limit) for limit in THROTTLES}

FORGET_MS = 3 * 3_600_000  # after this long without an attempt the failures of a site are forgotten
STARVED_SECONDS = 1.0  # until connections are opened again that no descriptor was left for
STARVED_TOLD = 60.0  # seconds without that, until it is logged again
OPENING = 50  # connections of one worker to one site at the same time


class Connections:
    """Owns the pools (which exist, and what each has seen of its site), their ready lists and their idle sessions. Which sessions
    there are is owned by `Sessions`, what a site's replies decided by `Decisions`, which queues sleep by `Parking`.

    `offer(entry)`: delivers an entry as a new one; `ruled()`: whether there are policies, which that applies."""

    queue: Queue

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pools: dict[str, Pool],
        room: Room,
        opener: Opener,
        sessions: Sessions,
        decisions: Decisions,
        outcomes: Outcomes,
        parking: Parking,
        marks: InFlight,
        tasks: Tasks,
        counters: Counters,
        log: Log,
        offer: Callable[[Entry], None],
        ruled: Callable[[], bool],
    ) -> None:
        self.pools = pools
        self.draining = False
        self._starved_until = 0.0  # until then it is not logged that no descriptor is left
        self._loop = loop
        self._room = room
        self._sessions = sessions
        self._decisions = decisions
        self._outcomes = outcomes
        self._parking = parking
        self._marks = marks
        self._tasks = tasks
        self._counters = counters
        self._log = log
        self._offer = offer
        self._ruled = ruled
        self.loading = Loading(outcomes, tasks, counters, log, self.pump)
        self._probes = Probes(pools, sessions, decisions, room, tasks, self.pump, loop.time)
        self._opener = opener
        self.elsewhere = Elsewhere(sessions, opener, outcomes, parking, room, tasks, log, self._stops, loop.time)

    def configure(self, config: Config, shaping: Shaping) -> None:
        """Apply a new configuration: existing sessions finish what is under way in pools that are no longer used."""
        self._delivery = config.delivery
        self._shaping = shaping
        self._weights = {application.name: application.weight for application in config.application}
        # Messages under way finish in their old pool, whose limits are counted under its old name; new mail makes new pools, also
        # mail that is offered because something is put back here.
        replaced = list(self.pools.values())
        self.pools.clear()
        for session, _ in self._sessions:
            session.leaving = True
        for pool in replaced:
            self._unskip(pool)
            for entry in pool.ready.take_all():
                self._parking.put_back(entry)
            for session in list(pool.idle):
                self._sessions.retire(session)
            self._room.wait_no_longer(pool)

    def pool(self, site: Site, source: Source | None) -> Pool:
        """The pool of a site for a source address."""
        key = pool_key(site, source)
        pool = self.pools.get(key)
        if pool is None:
            pool = self.pools[key] = Pool(site, source, self._shaping.shape(site), self._weights)
            self._decisions.recall(pool)
        return pool

    def of(self, site: Site) -> list[Pool]:
        """The pools of a site that exist, for any source address."""
        keys = [site.key, *(f"{site.key} from {source}" for source in site.route.sources)]
        return [self.pools[key] for key in keys if key in self.pools]

    def shown(self, site: Site) -> Pool:
        """A pool of a site. Where there is none, since nothing waits in memory and nothing is connected: one that shows what is
        known about the site, and is not kept."""
        found = self.of(site)
        if found:
            return found[0]
        pool = Pool(site, None, self._shaping.shape(site), self._weights)
        self._decisions.apply(pool)
        return pool

    def _stops(self, pool: Pool, entry: Entry) -> bool:
        """Whether an entry in flight is not given to another host of its site: nothing new is begun for it now."""
        return self.draining or self.queue.stalled or bool(self._decisions.asleep(pool, entry.name.application))

    # Entries are given to sessions

    def give(self, pool: Pool, entry: Entry) -> None:
        """Deliver an entry: by an idle session, or later."""
        if pool.idle and not len(pool.ready) and entry.data is not None and not pool.paced:
            session = pool.idle[-1]
            if not session.ended and not self.queue.stalled:
                mail = self._put_in_flight(pool, session, entry)
                if mail is not None:
                    pool.idle.pop()
                    session.waiting = False
                    session.send(mail)
                return
        pool.ready.push(entry)
        self.pump(pool)

    def pump(self, pool: Pool) -> None:
        """Give ready entries to idle sessions, and open connections for the others."""
        if self.draining or self.queue.stalled:
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

    def skip(self, pool: Pool, queue: int) -> None:
        """Leave a queue's further mail on disk: the ready list is long."""
        pool.skipped.add(queue)
        self.queue.skip(queue)

    def _unskip(self, pool: Pool) -> None:
        skipped, pool.skipped = pool.skipped, set()
        self.queue.skip_no_longer(skipped)

    def _open_more(self, pool: Pool) -> None:
        wanted = len(pool.ready)
        if not wanted:
            self._room.wait_no_longer(pool)
            return
        if pool.failures and pool.down_until > self.queue.clock.now():
            self._parking.send_back(pool, pool.down_until, None)  # entries of connections that were lost
            return
        if pool.needy:
            return  # they were first
        if pool.pumping_at > self._loop.time() and not pool.waiting:
            return  # a rate limit allows no message now
        most = 1 if pool.failures else OPENING  # a site that was down is tried with one connection
        while pool.connecting < min(wanted, most):
            if not self._room.take(pool):
                if not pool.sessions and not pool.connecting:
                    self._room.wait(pool)
                return
            self._room.wait_no_longer(pool)
            self._sessions.begin(pool)
            self._tasks.spawn(self._open(pool, self._loop.time()))

    def pump_in(self, pool: Pool, seconds: float) -> None:
        """Pump after some seconds."""
        now = self._loop.time()
        if pool.pumping_at <= now or pool.pumping_at > now + seconds:
            pool.pumping_at = now + seconds
            self._loop.call_later(seconds, self._pump_again, pool, pool.pumping_at)

    def _pump_again(self, pool: Pool, moment: float) -> None:
        if pool.pumping_at == moment:
            pool.pumping_at = 0.0
            if not self.draining:
                self.pump(pool)

    def _next(self, pool: Pool, session: Session) -> Mail | None:
        """The next entry as a Mail for this session; None while there is none, its message data is still being read, or a rate
        limit is reached."""
        ready = pool.ready
        while (entry := ready.head()) is not None:
            if entry.data is None and not is_large(entry):
                self.loading.load(pool)
                return None
            if pool.paced and not self._room.take_message(pool):
                return None
            ready.pop()
            mail = self._put_in_flight(pool, session, entry)
            if mail is not None:
                return mail
        return None

    def _put_in_flight(self, pool: Pool, session: Session, entry: Entry) -> Mail | None:
        """Begin an entry. Returns its Mail for this session, or None when the entry was claimed meanwhile, or this peer cannot
        accept it."""
        if not self.queue.begin(entry):
            return None
        self._marks.add(entry.ident)
        refusal = unfit(entry, session.core.features)
        self._outcomes.stages.begun(entry, self.queue.clock.now())
        if refusal is None:
            pool.began(self._loop.time())
            return mail_of(entry, pool.site.route)
        self._tasks.spawn(self.elsewhere.deliver(pool, entry, session.peer, refusal))
        return None

    # Connections are opened

    async def _open(self, pool: Pool, began: float) -> None:
        """Open one connection to a site, as decided at `began` (loop time); its hosts are tried in order."""
        try:
            session = await self._sessions.connect(pool)
        except Exception as error:
            self._counters.add(FAILED, 1)
            self._not_opened(pool, self._sessions.failure(error), began)
        else:
            if self._sessions.adopt(pool, session):
                self.idle(session)

    def _not_opened(self, pool: Pool, failure: ConnectFailed | NoRoute, began: float) -> None:
        """An attempt to connect, decided on at `began` (loop time), failed. That of a pool that a reload has replaced tells
        nothing about the new one, which makes its own attempts: or both would count the same outage."""
        if self.pools.get(pool.key) is not pool:
            return
        if failure.scarce:
            self._starved(pool, failure)
            return
        said = failure.said if isinstance(failure, ConnectFailed) else None
        if said is not None and said.code == 421:
            self._decisions.learned(pool, pool.refused_connection(said, began, self._loop.time()))
        if not pool.sessions and pool.is_news(began):
            self._site_failed(pool, failure, began)
        elif not pool.sessions:
            self.pump(pool)

    def _starved(self, pool: Pool, failure: ConnectFailed | NoRoute) -> None:
        """No descriptor is left for a connection. Nothing was attempted: the site is not down, no message is charged, and all of
        them wait until it is tried again."""
        now = self._loop.time()
        if now > self._starved_until:
            self._log.event("warning", text=f"{failure.public}: mail for {pool.key} waits, and is tried each second ({failure})")
        self._starved_until = now + STARVED_TOLD
        self.pump_in(pool, STARVED_SECONDS)

    def _site_failed(self, pool: Pool, error: ConnectFailed | NoRoute, began: float = 0.0) -> None:
        """No host of the site can be used, as was found from `began` (loop time) on: charge one message, let the queues sleep."""
        entries = pool.ready.take_all()
        if isinstance(error, NoRoute) and error.permanent:
            for entry in entries:
                self._outcomes.charge(entry, PERMANENT, "route", "", 0, error.enhanced, error)
            return
        until = self.queue.clock.now() + retry_delay(pool.failures + 1, int(self._delivery.first_retry * 1000))
        pool.down(pool.failures + 1, until, str(error), self._loop.time(), worth_probing(error))
        pool.cause = error.category
        if isinstance(error, ConnectFailed) and error.said is None and pool.learned_at_shutdown(self._loop.time()):
            self._decisions.unlearned(pool, "rate")
        said = (error.said if isinstance(error, ConnectFailed) else None) or Said(0, str(error).encode(), "connect")
        self._decisions.dead(pool, error, said, self.queue.clock.wall(until))
        phase = error.phase if isinstance(error, ConnectFailed) else "route"
        enhanced = said.enhanced if said.code else getattr(error, "enhanced", "4.4.1")
        self._parking.sleeps_for(pool, entries)
        if entries:
            self._outcomes.tally.add(pool.key, TRANSIENT, len(entries[0].recipients))
        self._outcomes.charge_one(entries, until, phase, said, enhanced, error, began if phase != "route" else 0.0)

    # Callbacks of sessions

    def make(self, core: ClientSession, peer: str) -> Session:
        """A session for a new connection."""
        session = Session(core, peer, self._loop.time, self.idle, self._finished, self._lost, self._delivery.patience)
        session.read_pieces = self.loading.pieces
        return session

    def idle(self, session: Session) -> bool:
        """A session can take a message: it is idle, or its message data is written and the next one can be pipelined. Whether it
        was sent one."""
        pool = self._sessions.pool_of(session)
        if pool is None:
            return False
        core = session.core
        if not session.leaving and core.messages >= pool.most_messages(self._loop.time()):
            session.leaving = True
        if session.leaving or self.draining or self._room.yields(pool, session):
            if core.idle:
                self._sessions.retire(session)
                self.pump(pool)
            return False
        if pool.needy and self.elsewhere.claims(pool, session):
            return False
        if pool.idle and not core.idle:
            return False  # other sessions are idle
        mail = None if self.queue.stalled else self._next(pool, session)
        if mail is not None:
            session.send(mail)
            return True
        if core.idle and not session.waiting:
            session.waiting = True
            session.idle_since = self._loop.time()
            pool.idle.append(session)
        return False

    def _finished(self, session: Session, mail: Mail) -> None:
        pool = self._sessions.pool_of(session)
        if mail.all_sent and pool is not None:
            pool.went_well(self._loop.time())
        if session.core.no_bdat:
            self._opener.without_bdat(session.place)
        self._outcomes.finished(pool, session, mail)

    def _lost(self, session: Session, reason: str) -> None:
        """A connection ended, expected or not: settle the messages under way on it."""
        pool = self._sessions.release(session)
        if pool is None:
            return
        core = session.core
        said = core.last_said
        if core.no_bdat:
            self._opener.without_bdat(session.place)
        if said is not None and said.code == 421 and core.under_way():
            self._decisions.learned(pool, pool.refused_message(said, session, self._loop.time(), self._room.workers))
        for mail in core.under_way():
            if not self._outcomes.lost(pool, session, mail, reason):
                self._again(pool, mail)
        self.pump(pool)

    def _again(self, pool: Pool, mail: Mail) -> None:
        """Deliver a message that was not attempted: at once, unless a policy, a suspension or a reload says otherwise by now."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        self.queue.again(entry)
        self._marks.again(entry.ident)
        if self._ruled() or self.pools.get(pool.key) is not pool or self._decisions.asleep(pool, entry.name.application):
            self._offer(entry)
        else:
            pool.ready.push(entry, first=True)

    # Timer

    def tick(self, now: float, clock: int) -> None:
        """Called each second: end what stalls, close what is idle, pump what could not be delivered before, and forget pools that
        are not used. `now`: loop time; `clock`: the queue's."""
        for session, pool in self._sessions:
            if session.deadline and now > session.deadline:
                self._end_stalled(session, pool, now)
            elif session.core.idle and now - session.idle_since > self._delivery.idle and session in pool.idle:
                self._sessions.retire(session)
        if not self.draining:
            self._probes.tick(now, clock)
        for pool in list(self.pools.values()):
            if pool.sleeping and pool.down_until <= clock:
                self._parking.wake_pool(pool)
            if pool.skipped and len(pool.ready) < CROWDED // 2:
                self._unskip(pool)  # also where `pump` did not empty it
            if len(pool.ready):
                self._pump_throttled(pool, now)
            elif not pool.sessions and not pool.connecting and not pool.needy:
                kept = FORGET_MS if pool.failures or pool.learned else 0  # or the failures would be counted from 0
                if pool.down_until + kept <= clock:
                    self._room.wait_no_longer(pool)
                    self._unskip(pool)
                    self.pools.pop(pool.key, None)

    def _pump_throttled(self, pool: Pool, now: float) -> None:
        """Pump what waits; where a limit goes on holding it, that has taken a second."""
        if pool.pumping_at <= now:
            pool.limited = ""  # what it waited for is over, unless this finds it again
        self.pump(pool)
        limit = self._room.throttle(pool) if len(pool.ready) else ""
        if limit:
            self._counters.add(THROTTLED[limit], 1)

    def _end_stalled(self, session: Session, pool: Pool, now: float) -> None:
        """The watchdog: end a session whose peer exceeded the timeout of its phase, and log its messages, the peer, and what it
        was waiting for."""
        self._counters.add(WATCHDOG, 1)
        awaiting = session.core.awaiting
        names = [format_id(mail.cargo.ident) for mail in session.core.under_way() if isinstance(mail.cargo, Entry)]
        waits = f"the reply to {awaiting}" if awaiting else "the peer to accept its message data"
        stack = "".join(f"; {line}" for line in session.stack())
        self._log.event("warning", text=f"delivery of {', '.join(names)} to {session.peer} stalled waiting for {waits}{stack}")
        pool.timed_out(session.deadline - TIMEOUTS[awaiting or MESSAGE_DATA] * self._delivery.patience, now)
        session.fail("timed out " + (f"waiting for the reply to {awaiting}" if awaiting else "sending the message data"))

    async def drain(self, seconds: float, data_seconds: float) -> None:
        """Start nothing new; wait up to `seconds` for messages under way, `data_seconds` for those past their final dot; then
        close all connections."""
        self.draining = True
        start = self._loop.time()
        for pool in self.pools.values():
            for session in list(pool.idle):
                self._sessions.retire(session)
        while self._sessions.in_flight():
            spent = self._loop.time() - start
            sent = any(mail.data_sent for session, _ in self._sessions for mail in session.core.under_way())
            if spent > data_seconds or (spent > seconds and not sent):
                break
            await asyncio.sleep(0.02)
        for session, _ in self._sessions:
            session.fail("shutting down")
