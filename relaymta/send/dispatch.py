"""Delivery: entries offered by the queue wait at their site, ride on its sessions, and end as outcomes.

A site has a ready list and a pool. An entry goes to an idle session; when there is none and the limits allow, a
connection is opened; otherwise it follows behind the text of a message under way. Where no host of a site can be
reached, one message is charged with the attempt, the others go back untried and their queues sleep.
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

from relaymta.config import Config, parse_hostport
from relaymta.dns import Resolver
from relaymta.errors import StoreError
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto.envelope import (
    DOTTED,
    EIGHT_BIT,
    PERMANENT,
    SMTPUTF8,
    SUCCESS,
    TRANSIENT,
    Attempt,
    QueueName,
)
from relaymta.proto.smtp_client import ClientSession, Features, Mail, Said, classify, stuff
from relaymta.queue import Entry, Queue, format_id, wall_ms
from relaymta.queue.schedule import retry_delay
from relaymta.route.mx import NoRoute, Target, mx_targets
from relaymta.route.table import RouteTable, Site
from relaymta.send.session import ConnectFailed, Session, connect
from relaymta.shm import Flying, Limits

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


class SiteState:
    """One site: what waits for it, and its connections."""

    __slots__ = ("connecting", "down_until", "failures", "idle", "loading", "ready", "reason", "sessions", "site")

    def __init__(self, site: Site) -> None:
        self.site = site
        self.ready: deque[Entry] = deque()
        self.idle: list[Session] = []
        self.sessions: set[Session] = set()
        self.connecting = 0
        self.loading = False
        self.failures = 0
        self.down_until = 0  # queue clock
        self.reason = ""


class Dispatcher:
    """All delivery of one worker. `offer` is the queue's way in."""

    def __init__(
        self,
        config: Config,
        routes: RouteTable,
        limits: Limits,
        flying: Flying,
        counters: Counters,
        log: Log,
        resolver: Resolver,
        suspects: set[int],
    ) -> None:
        """`suspects`: ids that were in flight when the worker before this one died; they are tried one at a time."""
        self.config = config
        self.routes = routes
        self.limits = limits
        self.flying = flying
        self._suspects = suspects
        self._lineup: deque[Entry] = deque()  # suspects that wait for their turn
        self._alone: Entry | None = None
        self.counters = counters
        self.log = log
        self.resolver = resolver
        self.queue: Queue | None = None
        self.loop = asyncio.get_running_loop()
        self.sites: dict[str, SiteState] = {}
        self.draining = False
        self._owner: dict[Session, SiteState] = {}
        self._lost_before: dict[int, int] = {}  # message id -> reused connections lost under it
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)

    # In

    def offer(self, entry: Entry) -> None:
        """Take an entry to deliver."""
        site = self.routes.site(entry.name)
        state = self.sites.get(site.key)
        if state is None:
            state = self.sites[site.key] = SiteState(site)
        if self.draining or state.down_until > self._queue().clock.now():
            self._queue().put_back(entry)
            self.landed(entry)
            return
        if self._suspects and entry.ident in self._suspects:
            self._line_up(entry)
            return
        state.ready.append(entry)
        self._pump(state)

    def awake(self, name: QueueName) -> bool:
        """Whether mail of a queue would be tried at once."""
        state = self.sites.get(self.routes.site(name).key)
        return not self.draining and (state is None or state.down_until <= self._queue().clock.now())

    def _line_up(self, entry: Entry) -> None:
        """A suspect waits for its turn."""
        self._lineup.append(entry)
        if self._alone is None:
            self._next_suspect()

    def _next_suspect(self) -> None:
        self._alone = None
        while self._lineup and self._alone is None:
            entry = self._lineup.popleft()
            self._suspects.discard(entry.ident)
            if not entry.cancelled:
                self._alone = entry
                self.flying.try_alone(entry.ident)
                self.offer(entry)
        if self._alone is None:
            self.flying.try_alone(0)

    def landed(self, entry: Entry) -> None:
        """An entry's outcome is durable, or it went back untried."""
        self.flying.remove(entry.ident)
        if entry is self._alone:
            self._next_suspect()

    def _queue(self) -> Queue:
        assert self.queue is not None
        return self.queue

    def _pump(self, state: SiteState) -> None:
        """Give ready entries to idle sessions, and open connections for the others."""
        if self._queue().writer.stalled:
            return
        while state.idle and state.ready:
            session = state.idle[-1]
            mail = None if session.ended else self._next(state, session)
            if mail is None and not session.ended:
                break
            state.idle.pop()
            session.waiting = False
            if mail is None:
                continue
            session.send(mail)
        wanted = len(state.ready)
        most = 1 if state.failures else 50  # a site that was down is knocked at once
        while state.connecting < min(wanted, most) and self._room(state):
            state.connecting += 1
            self._spawn(self._open(state))

    def _room(self, state: SiteState) -> bool:
        if len(state.sessions) + state.connecting >= state.site.route.connections:
            return False
        if not self.limits.take("out", self.config.delivery.connections):
            return False
        if not self.limits.take("site " + state.site.key, state.site.route.connections):
            self.limits.give("out")
            return False
        return True

    def _give_room(self, state: SiteState) -> None:
        self.limits.give("out")
        self.limits.give("site " + state.site.key)

    def _next(self, state: SiteState, session: Session) -> Mail | None:
        """The next entry as a Mail for this session, or None while there is none (or its text is still being read)."""
        ready = state.ready
        while ready:
            entry = ready[0]
            if entry.cancelled:
                ready.popleft()
                continue
            if entry.text is None and not _is_large(entry):
                self._load(state)
                return None
            ready.popleft()
            entry.flying = True
            self.flying.add(entry.ident)
            refusal = _unfit(entry, session.core.features)
            if refusal is None:
                return _mail(entry)
            self._spawn(self._try_elsewhere(state, entry, session.peer, refusal))
        return None

    def _load(self, state: SiteState) -> None:
        """Read the texts of the first entries that wait, together, on a reader thread."""
        if state.loading:
            return
        state.loading = True
        wanted = [e for e in list(state.ready)[:LOAD_TOGETHER] if e.text is None and not e.cancelled and not _is_large(e)]
        self._spawn(self._load_texts(state, wanted))

    async def _load_texts(self, state: SiteState, entries: list[Entry]) -> None:
        texts = await self._queue().read_texts(entries)
        for entry, text in zip(entries, texts, strict=True):
            if isinstance(text, StoreError):
                self._unreadable(state, entry, text)
            else:
                entry.text = text
        state.loading = False
        self._pump(state)

    def _unreadable(self, state: SiteState, entry: Entry, error: StoreError) -> None:
        """A body that cannot be read is never sent; it is tried again later, and said loudly."""
        self.counters.add(CORRUPT, 1)
        self.log.event("warning", text=f"message {format_id(entry.ident)}: {error}")
        if entry in state.ready and not entry.cancelled:
            state.ready.remove(entry)
            self._charge(entry, TRANSIENT, "queue", "", 0, "4.3.0", str(error))

    # Connections

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, state: SiteState) -> None:
        """Open one connection to a site; its hosts are tried in order."""
        try:
            session = await self._connect(state.site)
        except (ConnectFailed, NoRoute) as error:
            state.connecting -= 1
            self._give_room(state)
            self.counters.add(FAILED, 1)
            if not state.sessions:
                self._site_failed(state, error)
            return
        state.connecting -= 1
        if self._adopt(state, session):
            self._idle(session)

    def _adopt(self, state: SiteState, session: Session) -> bool:
        """Take a fresh connection into the pool; whether it still lives."""
        if session.ended:
            self._give_room(state)
            return False
        if state.failures:
            self.log.event("site", route=state.site.key, state="up", reason="", until=0)
        state.failures = 0
        state.reason = ""
        self.counters.add(OPENED, 1)
        state.sessions.add(session)
        self._owner[session] = state
        return True

    async def _try_elsewhere(self, state: SiteState, entry: Entry, unfit: str, refusal: tuple[str, str]) -> None:
        """The peer `unfit` cannot take a message (no SMTPUTF8, 8BITMIME, too small): another host of its site may. When
        none can it fails for good, when one could not be asked it is tried again later."""
        failure: ConnectFailed | NoRoute | None = None
        asked = {unfit}
        targets: list[tuple[Target, int]] = []
        try:
            targets = await self._targets(state.site)
        except NoRoute as error:  # the names were there a moment ago
            failure = error
        for target, port in targets:
            if target.host in asked:
                continue
            asked.add(target.host)
            try:
                session = await self._connect_with_room(state, target, port)
            except ConnectFailed as error:
                failure = error
                continue
            fits = _unfit(entry, session.core.features) is None
            if self._adopt(state, session):
                if fits:
                    session.send(_mail(entry))
                    return
                self._idle(session)
        if failure is None:
            self._charge(entry, PERMANENT, "mail", unfit, 0, *refusal)
        else:
            phase = failure.phase if isinstance(failure, ConnectFailed) else "route"
            self._charge(entry, TRANSIENT, phase, "", 0, "4.4.1", str(failure))

    async def _connect_with_room(self, state: SiteState, target: Target, port: int) -> Session:
        """A connection to one host of a site, as soon as the limits allow it."""
        until = self.loop.time() + ROOM_SECONDS
        while not self._room(state):
            if self.loop.time() > until:
                raise ConnectFailed("connect", f"{target.host}: no free connection to this site")
            await asyncio.sleep(0.1)
        try:
            return await self._connect_host(state.site, target, port)
        except BaseException:
            self._give_room(state)
            raise

    async def _connect(self, site: Site) -> Session:
        failure: ConnectFailed | None = None
        for target, port in await self._targets(site):
            try:
                return await self._connect_host(site, target, port)
            except ConnectFailed as error:
                failure = error
        raise failure or ConnectFailed("connect", "no host to connect to")

    async def _connect_host(self, site: Site, target: Target, port: int) -> Session:
        try:
            return await self._connect_to(site, target, port, site.tls)
        except ConnectFailed as error:
            if site.tls != "may" or error.phase != "starttls":
                raise
        return await self._connect_to(site, target, port, "off")  # a failed handshake, where TLS is optional

    async def _connect_to(self, site: Site, target: Target, port: int, tls: str) -> Session:
        route = site.route
        return await connect(
            target.address,
            port,
            target.host,
            hostname=self.config.hostname,
            timeout=self.config.delivery.connect_timeout,
            tls=tls,
            username=route.username if tls == "verify" else "",
            password=_password(site) if route.username else "",
            make=self._make,
            recipients=100,
        )

    def _make(self, core: ClientSession, peer: str) -> Session:
        session = Session(core, peer, self.loop.time, self._idle, self._finished, self._lost, self.config.delivery.patience)
        session.read_pieces = self._pieces
        return session

    async def _targets(self, site: Site) -> list[tuple[Target, int]]:
        if site.route.hosts:
            pairs = [parse_hostport(text, 25) for text in site.route.hosts]
            return [(Target(host, host), port) for host, port in pairs]
        targets = await mx_targets(self.resolver, site.domain, {self.config.hostname.lower()})
        return [(target, self.config.delivery.port) for target in targets]

    def _site_failed(self, state: SiteState, error: ConnectFailed | NoRoute) -> None:
        """No host of the site can be used: charge one message, let the queues sleep."""
        queue = self._queue()
        if isinstance(error, NoRoute) and error.permanent:
            while state.ready:
                entry = state.ready.popleft()
                if not entry.cancelled:
                    self._charge(entry, PERMANENT, "route", "", 0, error.enhanced, str(error))
            return
        state.failures += 1
        pause = retry_delay(state.failures, int(self.config.delivery.first_retry * 1000))
        state.down_until = queue.clock.now() + pause
        state.reason = str(error)
        self.log.event("site", route=state.site.key, state="down", reason=str(error), until=queue.clock.wall(state.down_until))
        charged = False
        queues: set[int] = set()
        while state.ready:
            entry = state.ready.popleft()
            if entry.cancelled:
                continue
            queues.add(entry.queue)
            if charged:
                queue.put_back(entry)
                self.landed(entry)
                continue
            charged = True
            said = error.said if isinstance(error, ConnectFailed) else None
            phase = error.phase if isinstance(error, ConnectFailed) else "route"
            code, enhanced = (said.code, said.enhanced) if said is not None else (0, getattr(error, "enhanced", "4.4.1"))
            self._charge(entry, TRANSIENT, phase, "", code, enhanced, said.text if said is not None else str(error), pause)
        for number in queues:
            queue.park(number, state.down_until)

    # Sessions speak

    def _idle(self, session: Session) -> None:
        """A session can take a message: directly, or (text written, reply awaited) one more behind it."""
        state = self._owner.get(session)
        if state is None:
            return
        core = session.core
        route = state.site.route
        if core.messages >= route.messages_per_connection or self.draining:
            if core.idle:
                self._retire(session, state)
            return
        if not core.idle and state.idle:
            return  # others are free
        mail = None if self._queue().writer.stalled else self._next(state, session)
        if mail is not None:
            core.begin(mail)
            session._flush()
        elif core.idle and not session.waiting:
            session.waiting = True
            session.idle_since = self.loop.time()
            state.idle.append(session)

    def _finished(self, session: Session, mail: Mail) -> None:
        entry = mail.cargo
        assert isinstance(entry, Entry)
        self.counters.add(TRANSACTIONS, 1)
        if self._lost_before:
            self._lost_before.pop(entry.ident, None)
        queue = self._queue()
        entry.route = (session.peer, mail.answer)
        if mail.all_sent:
            queue.finish(entry, None)
            return
        now = wall_ms()
        results = {}
        for recipient, _ in mail.recipients:
            said = mail.said.get(recipient) or Said(250, mail.answer, "final")
            results[recipient] = Attempt(now, classify(said), said.phase, session.peer, said.code, said.enhanced, said.text)
        queue.finish(entry, None if all(a.kind == SUCCESS for a in results.values()) else results)

    def _lost(self, session: Session, reason: str) -> None:
        """A connection ended, expected or not; what was under way on it is settled."""
        state = self._owner.pop(session, None)
        if state is None:
            return
        state.sessions.discard(session)
        if session in state.idle:
            state.idle.remove(session)
        self._give_room(state)
        core = session.core
        self.counters.observe("relaymta_messages_per_session", core.messages)
        for mail in core.under_way():
            self._settle_lost(state, session, mail, reason)
        self._pump(state)

    def _settle_lost(self, state: SiteState, session: Session, mail: Mail, reason: str) -> None:
        entry = mail.cargo
        assert isinstance(entry, Entry)
        core = session.core
        lost = self._lost_before.get(entry.ident, 0)
        said = core.last_said
        if mail.reached == "" and (said is None or said.code != 421 or core.messages) and core.messages and lost < FREE_RETRIES:
            # A reused connection that died before MAIL's reply: as if it had never been there.
            self._lost_before[entry.ident] = lost + 1
            entry.flying = False
            state.ready.appendleft(entry)
            return
        self._lost_before.pop(entry.ident, None)
        if mail.reached == "text":
            self.counters.add(IN_DOUBT, 1)
            reason += " (in doubt: the message was sent, its reply did not come)"
        now = wall_ms()
        phase = core.awaiting or mail.reached or "mail"
        results = {}
        for recipient, _ in mail.recipients:
            own = mail.said.get(recipient)
            use = own if own is not None else said
            if use is not None:
                results[recipient] = Attempt(now, classify(use), use.phase, session.peer, use.code, use.enhanced, use.text)
            else:
                results[recipient] = Attempt(now, TRANSIENT, phase, session.peer, 0, "4.4.2", reason)
        entry.route = (session.peer, b"")
        self._queue().finish(entry, results)

    def _charge(
        self, entry: Entry, kind: str, phase: str, peer: str, code: int, enhanced: str, text: str, retry_after: int = 0
    ) -> None:
        """An attempt that reached no transaction, for all recipients of an entry."""
        entry.flying = True
        attempt = Attempt(wall_ms(), kind, phase, peer, code, enhanced, text)
        self._queue().finish(entry, dict.fromkeys((i for i, _ in entry.recipients), attempt), retry_after)

    def _retire(self, session: Session, state: SiteState) -> None:
        """Close an idle session."""
        if session in state.idle:
            state.idle.remove(session)
        session.quit()
        if self._owner.pop(session, None) is not None:
            state.sessions.discard(session)
            self._give_room(state)
            self.counters.observe("relaymta_messages_per_session", session.core.messages)

    # Large texts

    async def _pieces(self, mail: Mail) -> AsyncIterator[bytes]:
        """A large body's text, stuffed."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        before = b"\r\n"
        async for piece in self._queue().stream_text(entry):
            if entry.envelope.flags & DOTTED:
                joined = (before + piece).replace(b"\r\n.", b"\r\n..")
                before = (before + piece)[-2:]
                yield joined[2:]
            else:
                yield piece

    # Time passes

    def _check(self) -> None:
        if self._alone is not None and self._alone.cancelled:
            self._next_suspect()  # it was held, deleted or given up in its turn
        now = self.loop.time()
        clock = self._queue().clock.now() if self.queue is not None else 0
        for state in list(self.sites.values()):
            for session in list(state.sessions):
                if session.deadline and now > session.deadline:
                    self.counters.add(WATCHDOG, 1)
                    self._say_stuck(session)
                    session.fail(f"timed out waiting for the reply to {session.core.awaiting or 'text'}")
                elif session.core.idle and now - session.idle_since > self.config.delivery.idle and session in state.idle:
                    self._retire(session, state)
            if state.ready:
                self._pump(state)
            elif not state.sessions and not state.connecting:
                kept = FORGET_MS if state.failures else 0  # so that a site's back-off goes on where it was
                if state.down_until + kept <= clock:
                    self.sites.pop(state.site.key, None)
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)

    def _say_stuck(self, session: Session) -> None:
        """The watchdog lets a delivery go: which, against whom, and where it stood."""
        names = [format_id(mail.cargo.ident) for mail in session.core.under_way() if isinstance(mail.cargo, Entry)]
        waits = f"the reply to {session.core.awaiting}" if session.core.awaiting else "its text to be taken"
        stack = "".join(f"; {line}" for line in session.stack())
        self.log.event("warning", text=f"delivery of {', '.join(names)} to {session.peer} stood still waiting for {waits}{stack}")

    def flush(self) -> None:
        """Forget that sites are down: an operator wants another try now."""
        for state in self.sites.values():
            state.down_until = 0

    def reconfigure(self, config: Config, routes: RouteTable) -> None:
        """New routes: what waits in memory goes back and is routed anew."""
        self.config, self.routes = config, routes
        for state in self.sites.values():
            while state.ready:
                entry = state.ready.popleft()
                if not entry.cancelled:
                    self._queue().put_back(entry)
                    self.landed(entry)
            for session in list(state.idle):
                self._retire(session, state)
        self.sites = {key: state for key, state in self.sites.items() if state.sessions or state.connecting}

    def in_flight(self) -> int:
        """Messages under way."""
        return sum(len(s.core.under_way()) for state in self.sites.values() for s in state.sessions)

    async def drain(self, seconds: float, text_seconds: float) -> None:
        """Start nothing new; wait `seconds` for what is under way, `text_seconds` for what is past its final dot."""
        self.draining = True
        start = self.loop.time()
        for state in self.sites.values():
            for session in list(state.idle):
                self._retire(session, state)
        while self.in_flight():
            spent = self.loop.time() - start
            sent = any(m.reached == "text" for st in self.sites.values() for s in st.sessions for m in s.core.under_way())
            if spent > text_seconds or (spent > seconds and not sent):
                break
            await asyncio.sleep(0.02)
        for state in self.sites.values():
            for session in list(state.sessions):
                session.fail("shutting down")
        self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()


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


def _mail(entry: Entry) -> Mail:
    envelope = entry.envelope
    text = entry.text
    if text is not None and envelope.flags & DOTTED:
        text = stuff(text)
    return Mail(
        entry,
        envelope.sender,
        entry.recipients,
        text,
        envelope.size,
        bool(envelope.flags & EIGHT_BIT),
        bool(envelope.flags & SMTPUTF8),
    )


def _password(site: Site) -> str:
    route = site.route
    if route.password_file:
        try:
            return Path(route.password_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConnectFailed("auth", f"password_file {route.password_file}: {error}") from None
    return os.environ.get(route.password_env, "")
