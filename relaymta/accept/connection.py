"""One client's connection: asyncio on one side, proto.smtp_server on the other, with back-pressure and deadlines.

It feeds octets to the session, and does what the session's state requires (`_STEPS`). Each state has one owner: the transport
and what is waited for, `Line` (line.py); who the client is, `rights` (rights.py); a message, the session's transaction
(transaction.py). Nothing is read or parsed while something is waited for.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from relaymta.accept.admission import DRAIN_REPLY, Admission
from relaymta.accept.line import BEHIND, CHECKING, COMMITTING, OUTPUT_SECONDS, SHAKING, SPILLING, Line
from relaymta.accept.listening import unread
from relaymta.accept.origin import Client
from relaymta.accept.rights import Rights
from relaymta.accept.transaction import IncomingTransaction
from relaymta.config import Listener
from relaymta.errors import redacted
from relaymta.metrics import index
from relaymta.proto import reply
from relaymta.proto.sasl import Claim
from relaymta.proto.session import CLAIMED, COMPLETE, DATA, STORING, TLS
from relaymta.proto.smtp_server import ServerSession
from relaymta.proto.transaction import Transaction

__all__ = ["STRESS_PATIENCE", "TLS_TIMEOUTS", "Connection"]

FULL, RESUMED, FAILED = (index("relaymta_tls_handshakes_total", result) for result in ("full", "resumed", "failed"))
ACCEPTED = index("relaymta_connections_total", "accepted")
REFUSED = index("relaymta_connections_total", "refused")
RATE_GRACE = 60.0  # seconds until the rate of message data is checked
STRESS_PATIENCE = 0.1  # factor of the timeouts under stress
# Seconds for the handshake, and for the client's close_notify.
TLS_TIMEOUTS: dict[str, Any] = {"ssl_handshake_timeout": 30.0, "ssl_shutdown_timeout": 5.0}
SOFT_ERRORS = 3  # errors above which each is delayed (tarpit)


class Connection(Line):
    """One client's connection. `enter` begins it, `release` is its end."""

    __slots__ = (
        "delayed",
        "early",
        "ended",
        "listener",
        "rights",
        "session",
    )

    def __init__(self, admission: Admission, listener: Listener) -> None:
        super().__init__(admission)
        self.listener = listener
        self.rights: Rights | None = None
        self.session: ServerSession | None = None
        self.early = False  # the client sent data before the banner
        self.ended = False  # the client has sent its EOF
        self.delayed = b""  # replies that the tarpit holds back

    # Begin and end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self.rights is None:
            peer = transport.get_extra_info("peername")
            if not isinstance(peer, tuple):  # reset before its address could be read
                self.count_refused()
                transport.abort()  # type: ignore[attr-defined]
                return
            early = unread(transport.get_extra_info("socket"))
            client = self.admission.intake.client(peer[0])
            refusal = self.enter(client, reply.TALKING_EARLY if early else None)
            if refusal is not None:
                self.write(refusal)
                transport.close()
                return
        elif not self.rights.admitted:  # what came before SMTP was cancelled meanwhile
            transport.abort()  # type: ignore[attr-defined]
            return
        if transport.get_extra_info("ssl_object") is None:
            self._greet(False)

    def enter(self, client: Client, refusal: bytes | None = None, is_client: bool = True) -> bytes | None:
        """Count a new connection (`refusal`: a reply that rejects it anyway). The reply that rejects it, or None. `is_client`:
        see `Admission.enter`."""
        admitted = refusal or Rights.admit(self.admission, self.listener, self, client, is_client)
        if isinstance(admitted, bytes):
            self.count_refused()
            return admitted
        self.rights = admitted
        if is_client:
            self.admission.intake.counters.add(ACCEPTED, 1)
        self.admission.connections.add(self)
        self.active_at = self.admission.now()
        return None

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
        if self.session is not None:
            self.session.close()
        self.release()
        if self.rights is not None:
            self.rights.detach()

    def _greet(self, secure: bool) -> None:
        """Begin the SMTP session and send the banner. `secure`: over TLS."""
        self.set_buffer_limits()
        admission, rights = self.admission, self.rights
        assert rights is not None
        rights.offers = admission.endpoint.offers(self.listener, rights.client.xclient)
        if rights.useless:
            self.count_refused()
            self.write(reply.LMTP_CLOSED)
            self.close()
            return
        self.session = ServerSession(admission.intake.hostname, rights, secure)
        self.write(self.session.greet())

    # Input

    def data_received(self, data: bytes) -> None:
        session = self.session
        if session is None:
            self.early = True
            return
        self.active_at = self.admission.time
        if self.waits:
            session.keep(data)
            self.pause()
            return
        errors = session.errors
        out = session.receive(data)
        if session.errors > errors and session.errors > SOFT_ERRORS and not self._trusted():
            self._tarpit(out)
        else:
            self._advance(session, out)

    def _trusted(self) -> bool:
        return self.rights is not None and self.rights.client.trusted

    def _tarpit(self, out: bytes) -> None:
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
            self._advance(self.session, out)
            self.go_on(0)

    def eof_received(self) -> bool:
        """A client that half-closes after the final dot still gets its reply, except over TLS: asyncio always closes that, and
        logs a warning when asked to keep it open."""
        self.ended = True
        return self.waits != 0 and self.session is not None and not self.session.secure

    def _advance(self, session: ServerSession, out: bytes) -> None:
        """After each step of the session: write `out`, then do what its state requires."""
        if out and self.transport is not None:
            self.transport.write(out)
        if session.state:
            step = _STEPS.get(session.state)
            if step is not None:
                step(self, session)
        if session.behind and not self.waits & BEHIND:
            self.waits |= BEHIND
            self.pause()
            self.admission.turns.wait(self._caught_up)
        if session.closing or (self.ended and not self.waits):
            if session.foreign and self.rights is not None:
                self.admission.intake.foreign(self.rights.client, session.helo)
            self.close()

    def _more(self, session: ServerSession, out: bytes) -> None:
        """A wait is over, with the reply `out`: go on with what has arrived meanwhile, unless something else is waited for."""
        if session.behind and not self.waits:
            out += session.receive(b"")
        self._advance(session, out)
        if self.paused:
            self.resume()

    def go_on(self, reason: int) -> None:
        self.waits &= ~reason
        session = self.session
        if session is not None and not self.waits and not self.gone:
            self._advance(session, session.receive(b""))
            self.resume()

    def _caught_up(self) -> None:
        self.go_on(BEHIND)

    # Transactions

    def _receiving(self, session: ServerSession) -> None:
        transaction = session.transaction
        if transaction is not None:  # None: the chunk of none is discarded
            transaction.arrived(self.active_at)

    def _store(self, session: ServerSession) -> None:
        transaction = session.transaction
        assert isinstance(transaction, IncomingTransaction)
        self.waits |= COMMITTING
        session.store()
        transaction.complete()

    def writing(self) -> None:
        """A thread writes message data: read nothing until it has."""
        self.waits |= SPILLING
        self.pause()

    def written(self) -> None:
        """It has."""
        self.active_at = self.admission.time
        self.go_on(SPILLING)

    def answer(self, transaction: Transaction, answer: bytes | list[bytes]) -> None:
        """The reply to a complete message: its transaction ends. Of several only the first counts: a later one is not taken for
        that to the next message, which would be acknowledged before it is stored."""
        session = self.session
        if session is None or session.state != STORING or session.transaction is not transaction:
            return
        self.waits &= ~COMMITTING
        if self.gone:
            session.close()
            session.finish(answer)
            return
        out = session.finish(answer)
        if self.admission.intake.draining:
            session.close()
            out += DRAIN_REPLY
        self._more(session, out)

    # TLS and logins

    def _start_tls(self, session: ServerSession) -> None:
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
        except Exception:  # SSLError, disconnect, timeout: after any error the connection is ended here
            self.admission.intake.counters.add(FAILED, 1)
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
        if self.session is not None:
            self.waits, self.blocked_at = 0, 0.0  # replies were sent before the handshake began
            self.set_buffer_limits()
            self.session.tls_started()
            self.session.tls = _described(transport)
        elif self.early:
            self.write(reply.TALKING_EARLY)
            transport.close()
        else:
            self._greet(True)
            if self.session is not None:
                self.session.tls = _described(transport)

    def _log_in(self, session: ServerSession) -> None:
        assert session.claim is not None
        self.waits |= CHECKING
        self.admission.spawn(self._check_login(session, session.claim))

    async def _check_login(self, session: ServerSession, claim: Claim) -> None:
        admission, rights, began = self.admission, self.rights, self.admission.now()
        assert rights is not None
        try:
            identity, answer = await admission.endpoint.logins.check(claim, rights.client.address, rights.client.behind)
        except Exception as error:  # after an internal error, too, the client gets a reply
            text = redacted(f"a login attempt could not be checked: {type(error).__name__}: {error}")
            admission.intake.log.event("warning", text=text)
            identity, answer = None, reply.LOGIN_UNAVAILABLE
        if answer.startswith(b"535"):
            await asyncio.sleep(began + admission.config.accounts.answer_after - admission.now())
        self.waits &= ~CHECKING
        if self.gone:
            return
        if identity is not None:
            answer = rights.log_in(identity) or answer
        self.active_at = admission.now()
        self._more(session, session.checked(answer))

    # Deadlines

    def check(self, now: float) -> None:
        """Close a client that is silent or too slow, and abort one that does not read. Called every CHECK_EVERY seconds."""
        session = self.session
        settings = self.admission.config.intake
        patience = STRESS_PATIENCE if self.admission.stressed else 1.0
        if self.check_output(now, min(OUTPUT_SECONDS, settings.command_timeout) * patience):
            return
        if self.admission.intake.draining:  # since `drain`, its handshake may have ended, or its message data been rejected
            self.drain()
        if self.gone or session is None or self.waits & (COMMITTING | CHECKING | SPILLING | SHAKING):
            return
        quiet = now - self.active_at
        transaction = session.transaction
        if quiet > (settings.data_timeout if session.state == DATA else settings.command_timeout) * patience:
            self._give_up(reply.TIMEOUT)
        elif session.state == DATA and isinstance(transaction, IncomingTransaction) and transaction.began_at:
            taken = now - transaction.began_at
            if taken > RATE_GRACE * patience and transaction.size < taken * settings.data_rate:
                self._give_up(reply.TOO_SLOW)

    def _give_up(self, answer: bytes) -> None:
        self.write(answer)
        if self.session is not None:
            self.session.close()
        self.close()

    def drain(self) -> None:
        """Shutting down: close a session with a 421 now, also one whose login is checked or whose reply is delayed; one with a
        message under way gets it after its final dot."""
        session = self.session
        if session is None or self.gone or self.waits & (COMMITTING | SPILLING | SHAKING) or session.state == DATA:
            return
        out, self.delayed = self.delayed, b""
        self._give_up(out + DRAIN_REPLY)


def _described(transport: asyncio.Transport) -> str:
    """TLS version and cipher of a transport, as Postfix writes them into Received:."""
    cipher = transport.get_extra_info("cipher")
    if cipher is None:
        return ""
    name, _, bits = cipher
    return f"using {transport.get_extra_info('ssl_object').version()} with cipher {name} ({bits}/{bits} bits)"


_STEPS: dict[int, Callable[[Connection, ServerSession], None]] = {
    DATA: Connection._receiving,
    COMPLETE: Connection._store,
    CLAIMED: Connection._log_in,
    TLS: Connection._start_tls,
}
