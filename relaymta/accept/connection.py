"""One client's connection: asyncio on one side, proto.smtp_server on the other, with back-pressure and deadlines.

Message data is kept in memory up to 1 MB; a large message is streamed into a file of its own, read no faster than the disk takes
it. Nothing is read or parsed while the connection waits for something (`waits`): a commit, a login attempt, the disk, or a client
that does not read its replies.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from relaymta.accept.identity import Identity
from relaymta.accept.intake import Client
from relaymta.accept.large import Large
from relaymta.accept.listening import ProxyHeaderReader, client_address, in_networks, readable, unread
from relaymta.config import Listener
from relaymta.errors import StoreError, redacted, store_error
from relaymta.filter.signing import Unsignable
from relaymta.metrics import index
from relaymta.proto import reply
from relaymta.proto.envelope import Body
from relaymta.proto.header import HEADER_SEEN
from relaymta.proto.sasl import Claim
from relaymta.proto.smtp_server import ServerSession, Transaction
from relaymta.queue import format_id

if TYPE_CHECKING:
    from relaymta.accept.acceptor import Acceptor
    from relaymta.filter.verify import Look, Verifier

__all__ = ["DRAIN_REPLY", "STRESS_PATIENCE", "Connection"]

FULL, RESUMED, FAILED = (index("relaymta_tls_handshakes_total", result) for result in ("full", "resumed", "failed"))
ACCEPTED = index("relaymta_connections_total", "accepted")
REFUSED = index("relaymta_connections_total", "refused")
RATE_GRACE = 60.0  # seconds until the rate of message data is checked
STRESS_PATIENCE = 0.1  # factor of the timeouts under stress
# Seconds for the handshake, and for the client's close_notify.
_TLS_TIMEOUTS: dict[str, Any] = {"ssl_handshake_timeout": 30.0, "ssl_shutdown_timeout": 5.0}
SOFT_ERRORS = 3  # errors above which each is delayed (tarpit)
DRAIN_REPLY = reply.SHUTTING_DOWN
UNSENT, UNSENT_LOW = 16384, 4096  # octets of unsent replies above which reading stops, and below which it resumes
DECRYPTED = 65536  # octets that TLS buffers while reading is paused
LINGER = 5.0  # seconds for a client to read the last replies, once its connection is being closed

# Flags of `waits`:
STORING = 1  # a complete message is signed, verified or committed
CHECKING = 2  # a login attempt is checked, or a reply is delayed
SPILLING = 4  # a thread writes to `large`
BLOCKED = 8  # the client does not read its replies
BEHIND = 16  # more input than is parsed in one turn: `turns` schedules the rest
SHAKING = 32  # the TLS handshake after STARTTLS


class Connection(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "acceptor",
        "account_limit",
        "active_at",
        "arrived",
        "client",
        "closed_at",
        "counted",
        "data_since",
        "dot_at",
        "early",
        "ended",
        "errors_delayed",
        "ident",
        "identity",
        "large",
        "listener",
        "paused",
        "proxy",
        "proxy_header",
        "session",
        "size",
        "transport",
        "waits",
    )  # fmt: skip

    def __init__(self, acceptor: "Acceptor", listener: Listener) -> None:
        self.acceptor = acceptor
        self.listener = listener
        self.transport: asyncio.Transport | None = None
        self.session: ServerSession | None = None
        self.client: Client | None = None
        self.counted = False  # in the limits, as `client`: `_enter` and `_change` take, only `release` gives back at the end
        self.proxy_header: ProxyHeaderReader | None = None  # the reader of a PROXY header that is still incomplete
        self.arrived = 0.0  # when it was accepted (loop time), if TLS or a PROXY header comes before SMTP
        self.early = False  # the client sent data before the banner
        self.ended = False  # the client has sent its EOF
        self.active_at = 0.0  # when the client last sent, or was last made to wait (loop time): timeouts count from it
        self.data_since = 0.0  # when the message data under way began (loop time); 0: none
        self.dot_at = 0.0  # when the last message data was complete (loop time)
        self.ident = 0
        self.size = 0  # octets of the message to be stored, the fields added here included
        self.large: Large | None = None
        self.waits = 0
        self.paused = False
        self.closed_at = 0.0  # when `check` first found the connection being closed (loop time)
        self.proxy: Client | None = None  # the proxy that named `client` by XCLIENT
        self.identity: Identity | None = None
        self.account_limit = ""  # the account's connection limit that counts it, or "": `release` gives that back, too
        self.errors_delayed = 0  # the session's errors when a reply was last delayed for them

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self.client is None:
            peer = transport.get_extra_info("peername")
            if not isinstance(peer, tuple):  # reset before its address could be read
                self._count_refused()
                transport.abort()  # type: ignore[attr-defined]
                return
            early = unread(transport.get_extra_info("socket"))
            refusal = self.enter(peer[0], reply.TALKING_EARLY if early else None)
            if refusal is not None:
                self._write(refusal)
                transport.close()
                return
        elif not self.counted:  # `begin` was cancelled meanwhile
            transport.abort()  # type: ignore[attr-defined]
            return
        if transport.get_extra_info("ssl_object") is None:
            self._greet(False)

    def enter(self, address: str, refusal: bytes | None = None) -> bytes | None:
        """Count a new client by its address (`refusal`: a reply that rejects it anyway). The reply that rejects it, or None."""
        client = self.acceptor.intake.client(address.partition("%")[0])
        return self._enter(client, refusal)

    def _enter(self, client: Client, refusal: bytes | None, is_client: bool = True) -> bytes | None:
        acceptor = self.acceptor
        self.client = client
        if refusal is None:
            refusal = acceptor.enter(client, is_client)
        if refusal is not None:
            self._count_refused()
            return refusal
        self.counted = True
        if is_client:
            acceptor.intake.counters.add(ACCEPTED, 1)
        acceptor.connections.add(self)
        self.active_at = acceptor.now()
        return None

    def _count_refused(self) -> None:
        self.acceptor.intake.counters.add(REFUSED, 1)

    def release(self) -> None:
        """Give back all that the connection holds of the limits. Called wherever its end may be noticed first; further calls do
        nothing."""
        self.acceptor.connections.discard(self)
        if self.counted and self.client is not None:
            self.counted = False
            self.acceptor.leave(self.client)
        self._leave_account()

    def _set_buffer_limits(self) -> None:
        """Limit the unsent replies, and what TLS buffers while reading is paused."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.set_write_buffer_limits(UNSENT, UNSENT_LOW)
            if transport.get_extra_info("ssl_object") is not None:
                transport.set_read_buffer_limits(DECRYPTED)  # type: ignore[attr-defined]

    def _greet(self, secure: bool) -> None:
        """Begin the SMTP session and send the banner. `secure`: over TLS."""
        self._set_buffer_limits()
        intake, client = self.acceptor.intake, self.client_of()
        offers = self.acceptor.endpoint.offers(self.listener, self._assume if client.xclient else None)
        self.session = ServerSession(
            intake.hostname,
            client.limits,
            intake.accept_sender,
            intake.recipient_check(client, None),
            self._refused,
            offers,
            secure,
            self._ended,
        )
        self._write(self.session.greet())

    def _assume(self, attributes: dict[str, str]) -> bytes | None:
        """XCLIENT: from now on this is the client with these attributes. One whose address is unknown, now and before, has the
        rights of an unauthenticated client. The reply that rejects it, or None."""
        session, acceptor, before = self.session, self.acceptor, self.client_of()
        proxy = self.proxy or before
        assert session is not None
        address = attributes.get("ADDR", "")
        if address.upper().startswith("IPV6:"):
            address = address[5:]
        client = before
        try:
            if address:
                client = acceptor.intake.client(str(ipaddress.ip_address(address.partition("%")[0])))
            elif "ADDR" in attributes or self.proxy is None:
                client = acceptor.intake.unknown_client(proxy.address)
        except ValueError:
            return reply.BAD_ARGUMENT
        refusal = self._change(client) if client is not before else None
        if refusal is None and (attributes.keys() & {"ADDR", "LOGIN"} or client is not before):
            login = attributes.get("LOGIN", "")
            refusal = self._set_identity(acceptor.endpoint.logins.with_account(Identity(login)) if login else None)
            session.user = login if refusal is None else ""
        self.proxy = proxy
        if refusal is not None:
            session.closing = True
            return refusal
        session.limit(client.limits)
        self._set_checks(session)
        self.errors_delayed = 0
        return None

    def _change(self, client: Client) -> bytes | None:
        """Count this connection as another client's. The reply that rejects it, or None."""
        self.acceptor.leave(self.client_of())
        refusal = self.acceptor.enter(client)
        self.counted = refusal is None
        if refusal is None:
            self.client = client
        return refusal

    def _set_identity(self, identity: Identity | None) -> bytes | None:
        """Set or clear (None) the authenticated user. The 454 when the account has too many connections, which leaves the client
        unauthenticated; or None."""
        self._leave_account()
        self.identity = None
        if identity is not None and identity.connections:
            limit = f"logged in as {identity.name}"
            if not self.acceptor.limits.take(limit, identity.connections):
                text = f"Too many connections of {identity.name} (limit connections {identity.connections}); try again later"
                return reply.format_reply(454, "4.7.0", text)
            self.account_limit = limit
        self.identity = identity
        return None

    def _leave_account(self) -> None:
        if self.account_limit:
            self.acceptor.limits.give(self.account_limit)
            self.account_limit = ""

    def _set_checks(self, session: ServerSession) -> None:
        """Set the session's checks at MAIL and RCPT to those of this client or authenticated user."""
        intake, identity = self.acceptor.intake, self.identity
        session.accept_sender = intake.sender_check(identity) if identity is not None else intake.accept_sender
        session.accept_recipient = intake.recipient_check(self.client_of(), identity)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.release()
        if not self.waits & (STORING | SPILLING):  # otherwise the operation under way still uses it
            self._discard_large()

    def eof_received(self) -> bool:
        """A client that half-closes after the final dot still gets its reply, except over TLS: asyncio always closes that, and
        logs a warning when asked to keep it open."""
        self.ended = True
        return self.waits != 0 and self.session is not None and not self.session.secure

    def pause_writing(self) -> None:
        """The transport holds more than UNSENT octets of replies: stop parsing and reading until the client has read them."""
        self.waits |= BLOCKED
        if self.session is not None:
            self.session.stopped = True
        self._pause()

    def resume_writing(self) -> None:
        """The client has read nearly all replies: go on in a turn of its own."""
        if self.session is not None:
            self.session.stopped = False
        self.active_at = self.acceptor.now()
        self.acceptor.turns.wait(self._unblocked)

    def _unblocked(self) -> None:
        if self.session is not None and not self.session.stopped:
            self._go_on(BLOCKED)

    def _write(self, data: bytes) -> None:
        if self.transport is not None and data:
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        session = self.session
        if session is None:
            self.early = True
            return
        self.active_at = self.acceptor.time
        if self.waits:
            session.parser.keep(data)
            self._pause()
            return
        out = session.receive(data)
        if session.errors > self.errors_delayed and session.errors > SOFT_ERRORS and not self.client_of().trusted:
            self._tarpit(session, out)
        else:
            self._advance(session, out)

    def _tarpit(self, session: ServerSession, out: bytes) -> None:
        """Delay the reply to a client that made many errors; nothing is read meanwhile."""
        self.errors_delayed = session.errors
        self.waits |= CHECKING
        self._pause()

        def answer() -> None:
            self.waits &= ~CHECKING
            if not self._gone():
                self.active_at = self.acceptor.now()
                self._advance(session, out)
                self._go_on(0)

        self.acceptor.loop.call_later(self.acceptor.config.intake.tarpit, answer)

    def _advance(self, session: ServerSession, out: bytes) -> None:
        """After each step of the session: write `out`, then store, check a login, start TLS, spill or close as its state
        requires."""
        self._write(out)
        if session.complete is not None:
            self._store(session, session.complete)
        elif session.claim is not None:
            self.waits |= CHECKING
            self.acceptor.spawn(self._check_login(session, session.claim))
        elif session.starting_tls:
            self._start_tls()
        elif session.taking_data and session.transaction is not None:
            if not self.data_since:
                self.data_since = self.active_at
            large = self.large is not None or session.transaction.size > self.acceptor.intake.queue.big_limit - 4096
            if large and not session.discarding:  # the message data of a rejected message is discarded, not stored
                self._spill(session, session.transaction)
        if session.behind and not self.waits & BEHIND:
            self.waits |= BEHIND
            self._pause()
            self.acceptor.turns.wait(self._caught_up)
        if session.closing or (self.ended and not self.waits):
            if session.foreign:
                self.acceptor.intake.foreign(self.client_of(), session.helo)
            self._close()

    def _caught_up(self) -> None:
        self._go_on(BEHIND)

    def _go_on(self, reason: int) -> None:
        """Clear a flag of `waits`; if none is left, parse what came meanwhile and resume reading."""
        self.waits &= ~reason
        session = self.session
        if session is not None and not self.waits and not self._gone():
            self._advance(session, session.receive(b""))
            self._resume()

    def _gone(self) -> bool:
        """Whether the connection is closed or being closed."""
        return self.transport is None or self.transport.is_closing()

    def _close(self) -> None:
        """Close the connection after what is written; `check` aborts it if the client does not read that."""
        if self.transport is not None:
            self.transport.close()

    def _ended(self) -> None:
        """Called by the session when a transaction ends: discard its message data."""
        self.data_since = 0.0
        if self.large is not None:
            self._discard_large()

    def _pause(self) -> None:
        if not self.paused and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            self.paused = True

    def _resume(self) -> None:
        if self.paused and not self.waits and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self.paused = False

    # TLS and logins

    def _start_tls(self) -> None:
        """Begin the handshake after STARTTLS. Reading is paused until then, so that nothing sent in the clear is taken for a
        command (RFC 3207 4.2)."""
        assert self.transport is not None
        self.waits |= SHAKING
        self._pause()
        loop, transport = self.acceptor.loop, self.transport

        def begin(context: ssl.SSLContext) -> Awaitable[Any]:
            return loop.start_tls(transport, self, context, server_side=True, **_TLS_TIMEOUTS)

        self.acceptor.spawn(self._shake_hands(begin))

    def arrive(self, sock: socket.socket, peer: str) -> bool:
        """A new socket on which a PROXY header, TLS or both come before SMTP: count it as the client's if that is known, else as
        the load balancer's. False when it is rejected."""
        self.arrived = self.acceptor.now()
        try:
            if not self.listener.proxy:
                return self.enter(peer) is None
            if not in_networks(peer, self.listener.proxy):
                raise ConnectionRefusedError(f"{peer} is no load balancer (listener.proxy)")
            self.proxy_header = ProxyHeaderReader(sock, peer)
            header = self.proxy_header.try_read()
            if header is None:
                balancer = self.acceptor.intake.client(peer.partition("%")[0])
                return self._entered(sock, self._enter(balancer, None, is_client=False))
        except OSError:
            self._count_refused()
            return False
        return self._proxied(sock, client_address(header, peer), peer)

    def _proxied(self, sock: socket.socket, address: str, peer: str) -> bool:
        """The load balancer at `peer` has named its client ("": unknown): count that instead. Whether it is admitted."""
        self.proxy_header = None
        self.release()
        early = reply.TALKING_EARLY if self.listener.tls != "implicit" and unread(sock) else None
        intake = self.acceptor.intake
        client = intake.client(address) if address else intake.unknown_client(peer.partition("%")[0])
        return self._entered(sock, self._enter(client, early))

    def _entered(self, sock: socket.socket, refusal: bytes | None) -> bool:
        """Whether a client is admitted (`refusal` is None); else send it the refusal."""
        if refusal is not None and self.listener.tls != "implicit":  # a client that expects TLS could not read it
            with contextlib.suppress(OSError):
                sock.send(refusal)
        return refusal is None

    async def begin(self, sock: socket.socket, peer: str) -> None:
        """What comes before SMTP on a socket: the PROXY header, the TLS handshake. Runs as a task; `begun` cleans up after it."""
        loop = self.acceptor.loop
        if self.proxy_header is not None:
            try:
                address = client_address(await self.proxy_header.read(), peer)
            except OSError:
                self._count_refused()
                return
            if not self._proxied(sock, address, peer):
                return
        if self.listener.tls == "implicit":
            if not unread(sock):  # a silent client costs no more than its socket
                await readable(sock)

            async def accept(context: ssl.SSLContext) -> asyncio.Transport:
                return (await loop.connect_accepted_socket(lambda: self, sock, ssl=context, **_TLS_TIMEOUTS))[0]

            await self._shake_hands(accept)
        else:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(lambda: self, sock)

    def begun(self, sock: socket.socket) -> None:
        """`begin` has ended, was cancelled or never ran: release everything, unless a session has begun or the transport is being
        closed."""
        if self.session is None and (self.transport is None or not self.transport.is_closing()):
            if self.transport is not None:
                self.transport.abort()
            self.release()
            sock.close()

    async def _shake_hands(self, begin: Callable[[ssl.SSLContext], Awaitable[Any]]) -> None:
        context, before = self.acceptor.endpoint.certificates.context, self.transport
        try:
            if context is None:
                raise ConnectionError("there is no usable certificate")
            found = await begin(context)
            if self.session is None:  # data that came with the end of the handshake, before the banner, is read in the next turn
                await asyncio.sleep(0)
        except Exception:  # SSLError, disconnect, timeout: after any error the connection is ended here
            self.acceptor.intake.counters.add(FAILED, 1)
            self.connection_lost(None)
            if before is not None:
                before.abort()
            return
        if self.counted:  # the client has not disconnected meanwhile
            self.transport, self.paused = found, False
            self._secured()

    def _secured(self) -> None:
        """The TLS handshake is complete."""
        assert self.transport is not None
        resumed = self.transport.get_extra_info("ssl_object").session_reused
        self.acceptor.intake.counters.add(RESUMED if resumed else FULL, 1)
        self.active_at = self.acceptor.now()
        if self.session is not None:
            self._start_over(self.session)
        elif self.early:
            self._write(reply.TALKING_EARLY)
            self.transport.close()
        else:
            self._greet(True)

    def _start_over(self, session: ServerSession) -> None:
        """TLS is on after STARTTLS: discard all session state from before, authentication included (RFC 3207 4.2)."""
        self.waits, session.stopped = 0, False  # replies were sent before the handshake began
        self._set_buffer_limits()
        session.tls_started()
        self._set_identity(None)
        self._set_checks(session)

    async def _check_login(self, session: ServerSession, claim: Claim) -> None:
        began = self.acceptor.now()
        try:
            identity, answer = await self.acceptor.endpoint.logins.check(claim, self.client_of().address)
        except Exception as error:  # after an internal error, too, the client gets a reply
            text = redacted(f"a login attempt could not be checked: {type(error).__name__}: {error}")
            self.acceptor.intake.log.event("warning", text=text)
            identity, answer = None, reply.LOGIN_UNAVAILABLE
        if answer.startswith(b"535"):
            await asyncio.sleep(began + self.acceptor.config.accounts.answer_after - self.acceptor.now())
        self.waits &= ~CHECKING
        if self._gone():
            return
        if identity is not None:
            answer = self._set_identity(identity) or answer
            self._set_checks(session)
        self.active_at = self.acceptor.now()
        self._advance(session, session.checked(self.identity.name if self.identity is not None else "", answer))
        self._resume()

    # A message that fits into memory

    def _store(self, session: ServerSession, transaction: Transaction) -> None:
        self.waits |= STORING
        self.data_since = 0.0
        self.dot_at = self.acceptor.now()
        if self.large is not None:
            self._finish_large()
            return
        intake = self.acceptor.intake
        self.ident = intake.queue.ident()
        data = transaction.take()
        start = data[0] if data else b""
        if len(data) > 1 and b"\r\n\r\n" not in start:
            start = _start_of(data)
        front = intake.prepend(self.ident, transaction, self.client_of(), session, start, self.listener.submission, self.identity)
        if isinstance(front, bytes):
            self._reject(front)
            return
        if transaction.chunked and transaction.tail != b"\r\n":
            data.append(b"\r\n")  # BDAT message data need not end in CRLF; what is delivered by DATA must
        if self._signs():
            self.acceptor.endpoint.signer.sign(
                front[0], data, self._application(), lambda found: self._signed(session, transaction, front, data, found)
            )
            return
        verifier = self.acceptor.endpoint.verifier
        if verifier is not None and not self._may_relay():
            self.acceptor.spawn(self._verify(verifier, session, transaction, front, data))
            return
        data[:0] = front
        self.size = sum(map(len, data))
        self._admit(session, transaction, data)

    async def _verify(
        self, verifier: "Verifier", session: ServerSession, transaction: Transaction, front: list[bytes], data: list[bytes]
    ) -> None:
        """Verify a message of an unauthenticated client that is in memory, then admit it."""
        whole = b"".join(data)
        look = verifier.look(whole)
        if look is None:
            self._answer(reply.HEADER_TOO_LONG)
            return
        body = whole[look.end :]
        field = await self._verified_field(verifier, session, transaction, look, body)
        if field is not None:
            found = [field, *front, look.header, body]
            self.size = sum(map(len, found))
            self._admit(session, transaction, found)

    async def _verified_field(
        self, verifier: "Verifier", session: ServerSession, transaction: Transaction, look: "Look", body: bytes
    ) -> bytes | None:
        """Verify a message of an unauthenticated client (SPF, DKIM, DMARC). The header field with the results; None when it was
        rejected, and that reply sent."""
        try:
            verdict = await verifier.check(self.client_of().address, session.helo, transaction.sender, look, body)
        except Exception as error:  # after an internal error the client tries again
            self.acceptor.intake.not_verified(error)
            self._answer(reply.NOT_VERIFIED)
            return None
        refusal = verdict.refusal
        self.acceptor.intake.count_dmarc(verdict.dmarc.result, refusal)
        if refusal is not None:
            self._answer(refusal)
            return None
        transaction.held = transaction.held or verdict.held
        return verdict.field

    def _may_relay(self) -> bool:
        """Whether the client is authenticated or in a network that may relay."""
        return self.identity is not None or self.client_of().trusted

    def _signs(self) -> bool:
        """Whether this client's mail is signed where there is a key for it."""
        return bool(self.acceptor.endpoint.signer) and self._may_relay()

    def _application(self) -> str:
        """The application that the message belongs to, "" for none."""
        own = self.identity.application if self.identity is not None else ""
        return own or self.client_of().application or self.listener.application

    def _signed(
        self, session: ServerSession, transaction: Transaction, front: list[bytes], data: list[bytes], found: bytes | Exception
    ) -> None:
        """Called with the DKIM-Signature fields, or the reason why there are none: then the message is rejected, not sent
        unsigned."""
        if isinstance(found, Exception):
            self._not_signed(found)
            return
        data[:0] = [found, *front] if found else front
        self.size = sum(map(len, data))
        self._admit(session, transaction, data)

    def _not_signed(self, error: Exception) -> None:
        if isinstance(error, Unsignable):
            self._reject(error.reply)
        else:
            self.acceptor.intake.not_signed(error)
            self._reject(reply.NOT_SIGNED)

    def client_of(self) -> Client:
        """The rules for this client."""
        assert self.client is not None
        return self.client

    def _admit(self, session: ServerSession, transaction: Transaction, data: list[bytes] | Body) -> None:
        client, identity = self.client_of(), self.identity
        if identity is not None and "octets" in identity.quotas:
            refused = self.acceptor.intake.quotas.account(identity, "octets", self.size, transaction)
            if refused is not None:
                self._reject(refused)
                return
        self.acceptor.intake.admit(
            self.ident,
            transaction,
            data,
            self.size,
            client,
            session.helo,
            identity.name if identity is not None else "",
            self._application(),
            (identity.priority if identity is not None else "") or client.priority or self.listener.priority,
            self._stored,
        )

    def _refused(self, transaction: Transaction, answer: bytes) -> None:
        helo = self.session.helo if self.session is not None else ""
        self.acceptor.intake.refused(transaction, self.client_of(), helo, answer)

    def _stored(self, error: StoreError | None) -> None:
        """Called by the queue: the group commit has returned, or the message could not be stored."""
        intake = self.acceptor.intake
        session = self.session
        if error is not None:
            self._reject(intake.failed(error))
            return
        if self.large is not None:
            self.large = None  # the queue owns the file now
            self.acceptor.give_file()
        transaction = session.complete if session is not None else None
        intake.accepted(self.size, len(transaction.recipients) if transaction is not None else 0)
        intake.accept_seconds(self.acceptor.now() - self.dot_at)
        answer = f"250 2.0.0 Ok: queued as {format_id(self.ident)}\r\n".encode()
        delay = intake.queue.delay(self.acceptor.config.intake.flow_delay)
        if delay:
            self.acceptor.loop.call_later(delay, self._answer, answer)
        else:
            self._answer(answer)

    def _answer(self, answer: bytes) -> None:
        """Send the reply to a complete message and go on."""
        self.waits &= ~STORING
        session = self.session
        if session is None or self._gone():
            self._discard_large()
            return
        out = session.finish(answer)
        if self.acceptor.intake.draining and session.complete is None:
            session.closing = True
            out += DRAIN_REPLY
        self._advance(session, out)
        self._resume()

    def _reject(self, answer: bytes) -> None:
        """Send a negative reply (4xx or 5xx) to the complete message, in a turn of its own: one segment may hold hundreds of
        them, which would recurse."""
        self.acceptor.loop.call_soon(self._answer, answer)

    # A message that streams to disk

    def _spill(self, session: ServerSession, transaction: Transaction) -> None:
        """Pass the message data received so far to a thread, and read nothing until it is written."""
        data = transaction.take()
        if self.large is None:
            self.ident = self.acceptor.intake.queue.ident()
            found = self._opened(session, transaction, b"".join(data))
            if not isinstance(found, bytes) and not self.acceptor.take_file():
                found = self.acceptor.intake.failed(StoreError("no file descriptor is left for it"))
            if isinstance(found, bytes):
                session.refuse(found)
                return
            self.large, data = found
        if data:
            self.waits |= SPILLING
            self._pause()
            future = self.acceptor.loop.run_in_executor(self.acceptor.threads, self.large.write, data)
            future.add_done_callback(self._spilled)

    def _opened(self, session: ServerSession, transaction: Transaction, start: bytes) -> tuple[Large, list[bytes]] | bytes:
        """A new large message whose message data begins with `start`, and that start; or the reply that rejects it."""
        intake, endpoint = self.acceptor.intake, self.acceptor.endpoint
        ident, draft, look = self.ident, None, None
        if endpoint.verifier is not None and not self._may_relay():
            look = endpoint.verifier.look(start)
            if look is None:
                return reply.HEADER_TOO_LONG
            start = look.header + start[look.end :]
            look.body.skip(len(look.header))
        front = intake.prepend(
            ident, transaction, self.client_of(), session, start[:HEADER_SEEN], self.listener.submission, self.identity
        )
        if isinstance(front, bytes):
            return front
        if self._signs():
            try:
                draft = endpoint.signer.draft(front[0], start, self._application())
            except Unsignable as error:
                return error.reply
        return Large(lambda room: intake.queue.big_body(ident, room), front, draft, look), [start]

    def _spilled(self, future: "asyncio.Future[None]") -> None:
        session, error = self.session, future.exception()
        if session is None or self._gone():
            self.waits &= ~SPILLING
            self._discard_large()
            return
        self.active_at = self.acceptor.time
        if error is not None:
            # The reply is sent after the message data; until then that is read and discarded.
            self._discard_large()
            session.refuse(self.acceptor.intake.failed(store_error(error)))
        self._go_on(SPILLING)

    def _finish_large(self) -> None:
        session, large = self.session, self.large
        assert session is not None and session.complete is not None and large is not None
        transaction = session.complete
        data = transaction.take()
        if transaction.chunked and transaction.tail != b"\r\n":
            data.append(b"\r\n")
        self._pause()
        future = self.acceptor.loop.run_in_executor(self.acceptor.threads, large.write, data)
        future.add_done_callback(lambda future: self._large_written(session, transaction, large, future.exception()))

    def _large_written(self, session: ServerSession, transaction: Transaction, large: Large, error: BaseException | None) -> None:
        """All message data of a large message is written: compute the fields that depend on it."""
        verifier = self.acceptor.endpoint.verifier

        def signed(found: bytes | Exception) -> None:
            if isinstance(found, Exception):
                self._not_signed(found)
            else:
                self._close_large(session, transaction, large, found)

        if error is not None:
            self._stored(store_error(error))
        elif large.draft is not None:
            self.acceptor.endpoint.signer.finish(large.draft, signed)
        elif large.look is not None and verifier is not None:
            self.acceptor.spawn(self._verify_large(verifier, session, transaction, large, large.look))
        else:
            self._close_large(session, transaction, large, b"")

    async def _verify_large(
        self, verifier: "Verifier", session: ServerSession, transaction: Transaction, large: Large, look: "Look"
    ) -> None:
        field = await self._verified_field(verifier, session, transaction, look, b"")
        if field is not None:
            self._close_large(session, transaction, large, field)

    def _close_large(self, session: ServerSession, transaction: Transaction, large: Large, fields: bytes) -> None:
        def finished(future: "asyncio.Future[Body]") -> None:
            error = future.exception()
            if error is not None:
                self._stored(store_error(error))
                return
            body = future.result()
            self.size = body.length
            self._admit(session, transaction, body)

        self.acceptor.loop.run_in_executor(self.acceptor.threads, large.finish, fields).add_done_callback(finished)

    def _discard_large(self) -> None:
        large, self.large = self.large, None
        if large is not None:
            discarded = self.acceptor.loop.run_in_executor(self.acceptor.threads, large.discard)
            discarded.add_done_callback(lambda future: self.acceptor.give_file())

    # Deadlines

    def check(self, now: float) -> None:
        """Close a client that is silent or too slow, and abort one that does not read. Called every CHECK_EVERY seconds."""
        session, transport = self.session, self.transport
        if transport is not None and transport.is_closing():
            if not self.closed_at:
                self.closed_at = now
            elif now - self.closed_at > LINGER:
                transport.abort()
            return
        if session is None or transport is None or self.waits & (STORING | CHECKING | SPILLING) or session.starting_tls:
            return
        settings = self.acceptor.config.intake
        patience = STRESS_PATIENCE if self.acceptor.stressed else 1.0
        quiet = now - self.active_at
        if self.waits & BLOCKED:
            if quiet > settings.command_timeout * patience:
                transport.abort()
        elif session.taking_data:
            taken = now - self.data_since if self.data_since else 0.0
            received = session.transaction.size if session.transaction is not None else 0
            if quiet > settings.data_timeout * patience:
                self._give_up(reply.TIMEOUT)
            elif taken > RATE_GRACE * patience and received < taken * settings.data_rate:
                self._give_up(reply.TOO_SLOW)
        elif quiet > settings.command_timeout * patience:
            self._give_up(reply.TIMEOUT)

    def _give_up(self, answer: bytes) -> None:
        self._write(answer)
        if self.session is not None:
            self.session.closing = True
        self._close()
        self._discard_large()

    def drain(self) -> None:
        """Shutting down: close an idle session with a 421 now; one with a message under way gets it after its final dot."""
        session = self.session
        if session is not None and not (self.waits & (STORING | CHECKING) or session.taking_data or session.starting_tls):
            self._give_up(DRAIN_REPLY)


def _start_of(data: list[bytes]) -> bytes:
    """The first HEADER_SEEN octets of message data."""
    found = bytearray()
    for piece in data:
        found += piece[: HEADER_SEEN - len(found)]
        if len(found) == HEADER_SEEN:
            break
    return bytes(found)
