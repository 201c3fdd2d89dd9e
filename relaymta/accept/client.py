"""One client's connection: asyncio on one side, a session without I/O on the other, with back-pressure; whatever it speaks.

It feeds octets to the session, and does what the session's state requires (`steps`). Each state has one owner: the transport and
what is waited for, `Line` (line.py); who the client is, `rights` (rights.py). Nothing is read or parsed while something is waited
for.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.eager import begin
from relaymta.accept.line import ASKING, BEHIND, CHECKING, COMMITTING, SHAKING, Line
from relaymta.accept.listening import in_networks, unread
from relaymta.accept.origin import Client
from relaymta.accept.rights import Rights
from relaymta.accept.transaction import Flow
from relaymta.config import Listener
from relaymta.errors import redacted
from relaymta.metrics import index
from relaymta.proto import reply
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.sasl import Claim

__all__ = ["ENGAGED", "KEPT", "STRESS_PATIENCE", "TLS_TIMEOUTS", "ClientConnection", "described"]

FULL, RESUMED, FAILED = (index("relaymta_tls_handshakes_total", result) for result in ("full", "resumed", "failed"))
ACCEPTED = index("relaymta_connections_total", "accepted")
REFUSED = index("relaymta_connections_total", "refused")
ENGAGED = 0.2  # seconds in which a client goes on that is in the middle of something
STRESS_PATIENCE = 0.1  # factor of the timeouts under stress
# Seconds for the handshake, and for the client's close_notify.
TLS_TIMEOUTS: dict[str, Any] = {"ssl_handshake_timeout": 30.0, "ssl_shutdown_timeout": 5.0}
KEPT = 4096  # octets behind a complete message, or a command about which filters are asked, that are read until its reply
SOFT_ERRORS = 3  # errors above which each is delayed (tarpit)


class AnySession(Protocol):
    """What the sessions of all protocols have (proto.smtp_server, proto.pop3_server)."""

    state: int
    secure: bool
    closing: bool
    behind: bool
    foreign: bool
    parting: bool
    errors: int
    claim: Claim | None
    exchange: AuthExchange | None

    def greet(self) -> bytes:
        """The greeting."""

    def receive(self, data: bytes) -> bytes:
        """Take octets; what to write."""

    def keep(self, data: bytes) -> None:
        """Take octets, to be parsed later."""

    def close(self) -> None:
        """Nothing more is parsed."""

    def tls_started(self) -> None:
        """The TLS handshake is done."""

    def checked(self, answer: bytes) -> bytes:
        """The claim was verified, with the reply of SMTP's AUTH; what to write."""


S = TypeVar("S", bound=AnySession)


class ClientConnection(Line, Generic[S]):
    """One client's connection. `enter` begins it, `release` is its end. `steps`: what is to be done in a state of the session."""

    steps: ClassVar[dict[int, Callable[[Any, Any], None]]] = {}
    greets: ClassVar[bool] = True  # the server speaks first: a client that does not wait for that is no mail program

    __slots__ = (
        "delayed",
        "eager",
        "early",
        "ended",
        "kept",
        "listener",
        "rights",
        "session",
    )

    def __init__(self, admission: Admission, listener: Listener) -> None:
        super().__init__(admission)
        self.listener = listener
        self.rights: Rights | None = None
        self.session: S | None = None
        self.eager = False  # what `run` has begun has not waited yet
        self.early = False  # the client sent data before the banner
        self.ended = False  # the client has sent its EOF
        self.kept = 0  # octets that have arrived while something was waited for, since it was last not so
        self.delayed = b""  # replies that the tarpit holds back

    # What each protocol does in its own way

    def begin_session(self, rights: Rights, secure: bool) -> S | None:
        """A new session, of which the greeting is sent next; None: the connection was closed instead."""
        raise NotImplementedError

    def check(self, now: float) -> None:
        """Apply the deadlines. Called every CHECK_EVERY seconds."""
        raise NotImplementedError

    def drain(self) -> None:
        """Shutting down: begin to end it."""
        raise NotImplementedError

    def refusal(self, answer: bytes) -> bytes:
        """A refusal of SMTP (4xx or 5xx) as the client can read it."""
        return answer

    def admit_login(self) -> bytes | None:
        """A user has logged in; the reply that refuses that, or None."""
        return None

    async def ask_login(self, rights: Rights) -> bytes | None:
        """Ask filters about a user who has logged in; the reply that refuses that, or None."""
        return None

    def flow(self) -> Flow | None:
        """What mail transactions ask of the connection, where there are any."""
        return None

    def helo(self) -> str:
        """What the client calls itself, for the log."""
        return ""

    def secured(self, described: str) -> None:
        """TLS is active now: version and cipher."""

    def hung_up(self) -> None:
        """The client has hung up, or sends no more, while its message is signed, verified, filtered or committed, or filters are
        asked about its command."""

    # Begin and end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self.rights is None:
            client = self.connected(transport)
            if client is None:
                self.count_refused()
                transport.abort()  # type: ignore[attr-defined]
                return
            early = self.greets and unread(transport.get_extra_info("socket"))
            refusal = self.enter(client, reply.TALKING_EARLY if early else None)
            if refusal is not None:
                self.write(self.refusal(refusal))
                transport.close()
                return
        elif not self.rights.admitted:  # what came before SMTP was cancelled meanwhile
            transport.abort()  # type: ignore[attr-defined]
            return
        if transport.get_extra_info("ssl_object") is None:
            self._greet(False)

    def connected(self, transport: asyncio.BaseTransport) -> Client | None:
        """Who has connected; None: it was reset before its address could be read."""
        peer = transport.get_extra_info("peername")
        return self.admission.intake.client(peer[0]) if isinstance(peer, tuple) else None

    def enter(self, client: Client, refusal: bytes | None = None, is_client: bool = True) -> bytes | None:
        """Count a new connection (`refusal`: a reply that rejects it anyway). The reply that rejects it, or None. `is_client`:
        see `Admission.enter`."""
        self.trace(client)
        if self.listener.filtered and refusal is None:
            if in_networks(client.address, self.listener.networks):
                client = self.admission.intake.returning(client)
            else:
                refusal = reply.FILTERS_ONLY
        admitted = refusal or Rights.admit(self.admission, self.listener, self.flow(), client, is_client)
        if isinstance(admitted, bytes):
            self.count_refused()
            if self.tap is not None:
                self.tap.said(self.refusal(admitted))
                self.tap.closed("refused")
            return admitted
        self.rights = admitted
        if is_client:
            self.admission.intake.counters.add(ACCEPTED, 1)
        self.admission.connections.add(self)
        self.active_at = self.admission.now()
        return None

    def engaged(self, now: float) -> bool:
        """Whether the client has sent something a moment ago, and so may go on."""
        return not self.gone and now - self.active_at < ENGAGED

    def trace(self, client: Client, begins: bool = True) -> None:
        """Let those know of the dialogue who watch it. `begins`: now, or (after a PROXY header) anew, of this client."""

    def count_refused(self) -> None:
        """Count a connection that was rejected."""
        self.admission.intake.counters.add(REFUSED, 1)

    def release(self) -> None:
        """Give back all that the connection holds of the limits. Called wherever its end may be noticed first; further calls do
        nothing."""
        self.admission.connections.discard(self)
        if self.rights is not None:
            self.rights.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.tap is not None:
            self.tap.closed(self._why_closed(exc))
        if self.session is not None:
            self.session.close()
            if self.waits & (COMMITTING | ASKING):
                self.hung_up()
        self.release()
        if self.rights is not None:
            self.rights.detach()

    def _why_closed(self, exc: Exception | None) -> str:
        """For a trace."""
        if self.session is not None and self.session.parting:
            return "closed after QUIT"
        if exc is not None:
            return f"lost: {exc}"
        return "closed by the client" if self.ended else "closed by us"

    def _greet(self, secure: bool, described: str = "") -> None:
        """Begin the session and send the banner. `secure`: over TLS, whose version and cipher are `described`."""
        self.set_buffer_limits()
        assert self.rights is not None
        self.session = self.begin_session(self.rights, secure)
        if self.session is not None:
            if described:
                self.secured(described)
            self.advance(self.session, self.session.greet())

    # Input

    def data_received(self, data: bytes) -> None:
        session = self.session
        if self.lingers:
            self.drop(data)
            return
        if session is None:
            self.early = True
            return
        self.active_at = self.admission.time
        if self.waits:
            session.keep(data)
            self.kept += len(data)
            if self.waits not in (COMMITTING, ASKING) or self.kept > KEPT:  # a client that says QUIT and goes is to be noticed
                self.pause()
            return
        self.kept = 0
        errors = session.errors
        out = session.receive(data)
        if session.errors > errors and self.is_delayed(session, errors):
            self.tarpit(out)
        else:
            self.advance(session, out)

    def is_delayed(self, session: S, errors: int) -> bool:
        """Whether the reply to what the client has done now, which had made so many errors before, is delayed."""
        trusted = self.rights is not None and self.rights.client.trusted
        return session.errors > errors and session.errors > SOFT_ERRORS and not trusted

    def tarpit(self, out: bytes) -> None:
        """Delay the reply to a client that made many errors; nothing is read meanwhile."""
        self.waits |= CHECKING
        self.delayed = out
        self.pause()
        self.admission.loop.call_later(self.admission.config.intake.tarpit, self._tarpitted)

    def _tarpitted(self) -> None:
        self.waits &= ~CHECKING
        if self.session is not None and not self.gone:
            self.active_at = self.admission.now()
            out, self.delayed = self.delayed, b""
            self.advance(self.session, out)
            self.go_on(0)

    def eof_received(self) -> bool:
        """A client that half-closes after the final dot still gets its reply (where filters look, that its message is not taken),
        except over TLS: asyncio always closes that, and logs a warning when asked to keep it open. One about whose command
        filters are asked is taken for gone."""
        self.ended = True
        if self.waits & (COMMITTING | ASKING):
            self.hung_up()
        return not self.lingers and self.waits != 0 and self.session is not None and not self.session.secure

    def advance(self, session: S, out: bytes) -> None:
        """After each step of the session: write `out`, then do what its state requires."""
        if out and self.transport is not None:
            if self.tap is not None:
                self.tap.said(out)
            self.transport.write(out)
        if session.state:
            step = self.steps.get(session.state)
            if step is not None:
                step(self, session)
        if session.behind and not self.waits & BEHIND:
            self.waits |= BEHIND
            self.pause()
            self.admission.turns.wait(self._caught_up)
        if session.closing or (self.ended and not self.waits):
            if session.foreign and self.rights is not None:
                self.admission.intake.foreign(self.rights.client, self.helo())
            if self.ended or session.parting:
                self.close()
            else:
                self.linger()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run what the session's state requires, and what ends in `more`: up to where it first waits, the rest as a task."""
        before, self.eager = self.eager, True
        try:
            begin(coroutine, self.admission.spawn)
        finally:
            self.eager = before

    def more(self, session: S, out: bytes) -> None:
        """A wait is over, with the reply `out`: go on with what has arrived meanwhile, unless something else is waited for. Where
        nothing was waited for, that has a turn of its own: however many commands are there, they do not call each other."""
        if session.behind and not self.waits and not self.eager:
            out += session.receive(b"")
        self.advance(session, out)
        if self.paused:
            self.resume()

    def go_on(self, reason: int) -> None:
        self.waits &= ~reason
        session = self.session
        if session is not None and not self.waits and not self.gone:
            self.advance(session, session.receive(b""))
            self.resume()

    def _caught_up(self) -> None:
        self.go_on(BEHIND)

    # TLS and logins

    def start_tls(self, session: S) -> None:
        """Begin the handshake after STARTTLS. Reading is paused until then, so that nothing sent in the clear is taken for a
        command (RFC 3207 4.2)."""
        assert self.transport is not None
        self.waits |= SHAKING
        self.pause()
        loop, transport = self.admission.loop, self.transport

        def begin(context: ssl.SSLContext) -> Awaitable[Any]:
            return loop.start_tls(transport, self, context, server_side=True, **TLS_TIMEOUTS)

        self.admission.spawn(self.shake_hands(begin))

    async def shake_hands(self, begin: Callable[[ssl.SSLContext], Awaitable[Any]]) -> None:
        """Do the TLS handshake: `begin(context)` returns the new transport."""
        context, before = self.admission.endpoint.certificates.context, self.transport
        try:
            if context is None:
                raise ConnectionError("there is no usable certificate")
            found = await begin(context)
            if self.session is None:  # data that came with the end of the handshake, before the banner, is read in the next turn
                await asyncio.sleep(0)
        except Exception as error:  # SSLError, disconnect, timeout: after any error the connection is ended here
            self.admission.intake.counters.add(FAILED, 1)
            if self.tap is not None:
                self.tap.event(f"the TLS handshake has failed: {str(error) or type(error).__name__}")
            self.connection_lost(None)
            if before is not None:
                before.abort()
            return
        if self.rights is not None and self.rights.admitted:  # the client has not disconnected meanwhile
            self.transport, self.paused = found, False
            self._secured(found)

    def _secured(self, transport: asyncio.Transport) -> None:
        """The TLS handshake is complete."""
        resumed = transport.get_extra_info("ssl_object").session_reused
        self.admission.intake.counters.add(RESUMED if resumed else FULL, 1)
        self.active_at = self.admission.now()
        if self.tap is not None:
            self.tap.event(f"TLS {described(transport)}{', resumed' if resumed else ''}")
        if self.session is not None:
            self.waits, self.blocked_at = 0, 0.0  # replies were sent before the handshake began
            self.set_buffer_limits()
            self.session.tls_started()
            self.secured(described(transport))
        elif self.early:
            self.write(self.refusal(reply.TALKING_EARLY))
            transport.close()
        else:
            self._greet(True, described(transport))

    def log_in(self, session: S) -> None:
        assert session.claim is not None
        self.waits |= CHECKING
        self.run(self._check_login(session, session.claim))

    async def _check_login(self, session: S, claim: Claim) -> None:
        admission, rights, began = self.admission, self.rights, self.admission.now()
        assert rights is not None
        mechanism = session.exchange.mechanism if session.exchange is not None else ""
        try:
            identity, answer = await admission.endpoint.logins.check(
                claim, rights.client.address, rights.client.behind, mechanism
            )
        except Exception as error:  # after an internal error, too, the client gets a reply
            identity, answer = None, self._unchecked(error)
        if answer.startswith(b"535"):
            await asyncio.sleep(began + admission.config.accounts.answer_after - admission.now())
        if identity is not None and not self.gone:
            answer = rights.log_in(identity) or self._admit(rights) or answer
            if rights.asks_client and answer.startswith(b"235"):
                answer = await self._ask_login(rights) or answer
        self.waits &= ~CHECKING
        if self.gone:
            return
        self.active_at = admission.now()
        self.more(session, session.checked(answer))

    async def _ask_login(self, rights: Rights) -> bytes | None:
        refused = await self.ask_login(rights)
        if refused is not None:
            rights.log_out()
        return refused

    def _admit(self, rights: Rights) -> bytes | None:
        try:
            refused = self.admit_login()
        except Exception as error:
            refused = self._unchecked(error)
        if refused is not None:
            rights.log_out()
        return refused

    def _unchecked(self, error: Exception) -> bytes:
        """Log why a login could not be checked; the reply to it."""
        text = redacted(f"a login attempt could not be checked: {type(error).__name__}: {error}")
        self.admission.intake.log.event("warning", text=text)
        return reply.LOGIN_UNAVAILABLE


def described(transport: asyncio.Transport) -> str:
    """TLS version and cipher of a transport, as Postfix writes them into Received:."""
    cipher = transport.get_extra_info("cipher")
    if cipher is None:
        return ""
    name, _, bits = cipher
    return f"using {transport.get_extra_info('ssl_object').version()} with cipher {name} ({bits}/{bits} bits)"
