"""One client's connection: asyncio on one side, proto.smtp_server on the other, with back-pressure and deadlines.

A message is held in memory up to 1 MB; what is longer streams into a file of its own, read no faster than the disk
takes it. Nothing is read or parsed while something is waited for (`waits`): a commit, a login, the disk, or a client that does
not read what it is told.
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
from relaymta.accept.listening import Announcement, among, named, readable, waiting
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
RATE_GRACE = 60.0  # seconds until a text's rate is looked at
STRESS_PATIENCE = 0.1  # share of the timeouts that is left under stress
# For the handshake, and for the client's part of the end of TLS.
_PATIENCE: dict[str, Any] = {"ssl_handshake_timeout": 30.0, "ssl_shutdown_timeout": 5.0}
PATIENT_ERRORS = 3  # wrong commands until each costs time
DRAIN_REPLY = reply.SHUTTING_DOWN
OWED, OWED_LOW = 16384, 4096  # octets of replies above which a client is not heard, and below which it is again
DECRYPTED = 65536  # octets that TLS holds of a client that is not heard
LINGER = 5.0  # seconds for a client to take what is left for it, once its connection is closed

# What `waits` for:
STORING = 1  # the message behind its final dot
CHECKING = 2  # a login, or the time for which a reply is held back
SPILLING = 4  # a thread that writes to `large`
BLOCKED = 8  # the client to read
BEHIND = 16  # its turn: there is more to be parsed than others should wait for
SHAKING = 32  # TLS


class Connection(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "acceptor", "announcement", "arrived", "client", "closed_at", "counted", "dot_at", "early", "ended", "heard", "ident",
        "identity", "large", "listener", "paused", "proxy", "seat", "session", "size", "text_since", "transport", "waits",
        "wrong",
    )  # fmt: skip

    def __init__(self, acceptor: "Acceptor", listener: Listener) -> None:
        self.acceptor = acceptor
        self.listener = listener
        self.transport: asyncio.Transport | None = None
        self.session: ServerSession | None = None
        self.client: Client | None = None
        self.counted = False  # in the limits, as `client`: `_enter` and `_assume` take, `give_back` alone gives back for good
        self.announcement: Announcement | None = None  # a PROXY header that is still to come
        self.arrived = 0.0  # when it was accepted (loop time), where something comes before SMTP
        self.early = False  # it has talked before the banner
        self.ended = False  # the client will say no more
        self.heard = 0.0  # when the peer was last heard (loop time)
        self.text_since = 0.0  # when the text under way began
        self.dot_at = 0.0
        self.ident = 0
        self.size = 0  # octets stored of the message under way, ours in front included
        self.large: Large | None = None
        self.waits = 0
        self.paused = False
        self.closed_at = 0.0  # when it was first seen that the connection is being closed (loop time)
        self.proxy: Client | None = None  # who has said by XCLIENT that this is `client`
        self.identity: Identity | None = None
        self.seat = ""  # the limit of an account's connections that this one counts in: `give_back` ends that, too
        self.wrong = 0  # the session's errors when its client was last made to wait

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self.client is None:
            peer = transport.get_extra_info("peername")
            if not isinstance(peer, tuple):  # it is gone already, or has no address: nobody knows who it was
                self._turned_away()
                transport.abort()  # type: ignore[attr-defined]
                return
            early = waiting(transport.get_extra_info("socket"))
            refusal = self.enter(peer[0], reply.TALKING_EARLY if early else None)
            if refusal is not None:
                self._write(refusal)
                transport.close()
                return
        elif not self.counted:  # `begin` was ended meanwhile
            transport.abort()  # type: ignore[attr-defined]
            return
        if transport.get_extra_info("ssl_object") is None:
            self._greet(False)

    def enter(self, address: str, refusal: bytes | None = None) -> bytes | None:
        """A client at the door: count it, or the reply that refuses it."""
        client = self.acceptor.intake.client(address.partition("%")[0])
        return self._enter(client, refusal)

    def _enter(self, client: Client, refusal: bytes | None, speaks: bool = True) -> bytes | None:
        acceptor = self.acceptor
        self.client = client
        if refusal is None:
            refusal = acceptor.enter(client, speaks)
        if refusal is not None:
            self._turned_away()
            return refusal
        self.counted = True
        if speaks:
            acceptor.intake.counters.add(ACCEPTED, 1)
        acceptor.connections.add(self)
        self.heard = acceptor.now()
        return None

    def _turned_away(self) -> None:
        self.acceptor.intake.counters.add(REFUSED, 1)

    def give_back(self) -> None:
        """What it holds of the limits. The only place: whoever sees its end first does it, and who comes later finds nothing."""
        self.acceptor.connections.discard(self)
        if self.counted and self.client is not None:
            self.counted = False
            self.acceptor.leave(self.client)
        self._stand_up()

    def _bound(self) -> None:
        """Limits on what is owed to this client, and on what TLS holds of it."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.set_write_buffer_limits(OWED, OWED_LOW)
            if transport.get_extra_info("ssl_object") is not None:
                transport.set_read_buffer_limits(DECRYPTED)  # type: ignore[attr-defined]

    def _greet(self, secure: bool) -> None:
        """Begin the session."""
        self._bound()
        intake, client = self.acceptor.intake, self.client_of()
        offers = self.acceptor.door.offers(self.listener, self._assume if client.xclient else None)
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
        """XCLIENT: from now on this is another client; one whose address is not said, now or before, may what anybody may. The
        reply that refuses it, or None."""
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
                client = acceptor.intake.nobody(proxy.address)
        except ValueError:
            return reply.BAD_ARGUMENT
        refusal = self._change(client) if client is not before else None
        if refusal is None and (attributes.keys() & {"ADDR", "LOGIN"} or client is not before):
            login = attributes.get("LOGIN", "")
            refusal = self._become(acceptor.door.logins.as_kept(Identity(login)) if login else None)
            session.user = login if refusal is None else ""
        self.proxy = proxy
        if refusal is not None:
            session.closing = True
            return refusal
        session.limit(client.limits)
        self._permit(session)
        self.wrong = 0
        return None

    def _change(self, client: Client) -> bytes | None:
        """Count this connection as another client's. The reply that refuses it, or None."""
        self.acceptor.leave(self.client_of())
        refusal = self.acceptor.enter(client)
        self.counted = refusal is None
        if refusal is None:
            self.client = client
        return refusal

    def _become(self, identity: Identity | None) -> bytes | None:
        """From now on this is somebody who has logged in, or nobody. The reply that refuses it, which leaves nobody: as many are
        logged in as may be."""
        self._stand_up()
        self.identity = None
        if identity is not None and identity.connections:
            seat = f"logged in as {identity.name}"
            if not self.acceptor.limits.take(seat, identity.connections):
                text = f"Too many connections of {identity.name} (limit connections {identity.connections}); try again later"
                return reply.format_reply(454, "4.7.0", text)
            self.seat = seat
        self.identity = identity
        return None

    def _stand_up(self) -> None:
        if self.seat:
            self.acceptor.limits.give(self.seat)
            self.seat = ""

    def _permit(self, session: ServerSession) -> None:
        """What this client, or who has logged in, may do."""
        intake, identity = self.acceptor.intake, self.identity
        session.accept_sender = intake.sender_check(identity) if identity is not None else intake.accept_sender
        session.accept_recipient = intake.recipient_check(self.client_of(), identity)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.give_back()
        if not self.waits & (STORING | SPILLING):  # else what is waited for goes on with it
            self._discard_large()

    def eof_received(self) -> bool:
        """A client that half-closes behind the dot still gets its reply, but by TLS, which has no half: whatever we say there, it
        is closed, and asking for more is a line on stderr."""
        self.ended = True
        return self.waits != 0 and self.session is not None and not self.session.secure

    def pause_writing(self) -> None:
        """The client does not read what it is told."""
        self.waits |= BLOCKED
        if self.session is not None:
            self.session.stopped = True
        self._pause()

    def resume_writing(self) -> None:
        """It has read nearly all of it."""
        if self.session is not None:
            self.session.stopped = False
        self.heard = self.acceptor.now()
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
        self.heard = self.acceptor.time
        if self.waits:
            session.parser.keep(data)
            self._pause()
            return
        out = session.receive(data)
        if session.errors > self.wrong and session.errors > PATIENT_ERRORS and not self.client_of().trusted:
            self._slow_down(session, out)
        else:
            self._advance(session, out)

    def _slow_down(self, session: ServerSession, out: bytes) -> None:
        """Who makes mistake after mistake waits for each reply, and is not heard meanwhile."""
        self.wrong = session.errors
        self.waits |= CHECKING
        self._pause()

        def answer() -> None:
            self.waits &= ~CHECKING
            if not self._gone():
                self.heard = self.acceptor.now()
                self._advance(session, out)
                self._go_on(0)

        self.acceptor.loop.call_later(self.acceptor.config.intake.tarpit, answer)

    def _advance(self, session: ServerSession, out: bytes) -> None:
        """Behind the session's last move: write, store, spill, close."""
        self._write(out)
        if session.complete is not None:
            self._store(session, session.complete)
        elif session.claim is not None:
            self.waits |= CHECKING
            self.acceptor.spawn(self._check_login(session, session.claim))
        elif session.starting_tls:
            self._start_tls()
        elif session.taking_text and session.transaction is not None:
            if not self.text_since:
                self.text_since = self.heard
            large = self.large is not None or session.transaction.size > self.acceptor.intake.queue.big_limit - 4096
            if large and not session.discarding:  # a refused text is dropped as it comes, not stored
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
        """This is waited for no more: if nothing else is, on with what has come meanwhile, and with what comes."""
        self.waits &= ~reason
        session = self.session
        if session is not None and not self.waits and not self._gone():
            self._advance(session, session.receive(b""))
            self._resume()

    def _gone(self) -> bool:
        """Whether the connection is closed, or being closed."""
        return self.transport is None or self.transport.is_closing()

    def _close(self) -> None:
        """Close it behind what is written; `check` ends one whose client does not take that."""
        if self.transport is not None:
            self.transport.close()

    def _ended(self) -> None:
        """A transaction ended, and all that is its own ends with it."""
        self.text_since = 0.0
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
        """Shake hands behind STARTTLS. Nothing is read until that has begun: nothing in the clear is taken for a command."""
        assert self.transport is not None
        self.waits |= SHAKING
        self._pause()
        loop, transport = self.acceptor.loop, self.transport

        def begin(context: ssl.SSLContext) -> Awaitable[Any]:
            return loop.start_tls(transport, self, context, server_side=True, **_PATIENCE)

        self.acceptor.spawn(self._shake_hands(begin))

    def arrive(self, sock: socket.socket, peer: str) -> bool:
        """A socket on which a PROXY header comes first, or TLS, or both: count it, as the client's where it is known who that is,
        else as the load balancer's; False where it is turned away."""
        self.arrived = self.acceptor.now()
        try:
            if not self.listener.proxy:
                return self.enter(peer) is None
            if not among(peer, self.listener.proxy):
                raise ConnectionRefusedError(f"{peer} is no load balancer (listener.proxy)")
            self.announcement = Announcement(sock, peer)
            header = self.announcement.look()
            if header is None:
                balancer = self.acceptor.intake.client(peer.partition("%")[0])
                return self._let_in(sock, self._enter(balancer, None, speaks=False))
        except OSError:
            self._turned_away()
            return False
        return self._announced(sock, named(header, peer), peer)

    def _announced(self, sock: socket.socket, address: str, peer: str) -> bool:
        """The load balancer at `peer` has said for whom it connects ("": nobody knows): whether they may come in."""
        self.announcement = None
        self.give_back()
        early = reply.TALKING_EARLY if self.listener.tls != "implicit" and waiting(sock) else None
        intake = self.acceptor.intake
        client = intake.client(address) if address else intake.nobody(peer.partition("%")[0])
        return self._let_in(sock, self._enter(client, early))

    def _let_in(self, sock: socket.socket, refusal: bytes | None) -> bool:
        """Whether nothing refuses a client; else it is told."""
        if refusal is not None and self.listener.tls != "implicit":  # who expects TLS would not understand it
            with contextlib.suppress(OSError):
                sock.send(refusal)
        return refusal is None

    async def begin(self, sock: socket.socket, peer: str) -> None:
        """What comes before SMTP on a socket that has arrived. Where no session comes of it, `begun` clears up."""
        loop = self.acceptor.loop
        if self.announcement is not None:
            try:
                address = named(await self.announcement.whole(), peer)
            except OSError:
                self._turned_away()
                return
            if not self._announced(sock, address, peer):
                return
        if self.listener.tls == "implicit":
            if not waiting(sock):  # who says nothing costs no more than its socket
                await readable(sock)

            async def accept(context: ssl.SSLContext) -> asyncio.Transport:
                return (await loop.connect_accepted_socket(lambda: self, sock, ssl=context, **_PATIENCE))[0]

            await self._shake_hands(accept)
        else:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(lambda: self, sock)

    def begun(self, sock: socket.socket) -> None:
        """`begin` has ended, was cancelled, or never ran: without a session, or one that is being closed, nothing stays of it."""
        if self.session is None and (self.transport is None or not self.transport.is_closing()):
            if self.transport is not None:
                self.transport.abort()
            self.give_back()
            sock.close()

    async def _shake_hands(self, begin: Callable[[ssl.SSLContext], Awaitable[Any]]) -> None:
        context, before = self.acceptor.door.certificates.context, self.transport
        try:
            if context is None:
                raise ConnectionError("there is no usable certificate")
            found = await begin(context)
            if self.session is None:  # what came with the end of the handshake, before our banner, is read in the next turn
                await asyncio.sleep(0)
        except Exception:  # SSLError; a peer that is gone or too slow; whatever it was, nobody else ends this connection
            self.acceptor.intake.counters.add(FAILED, 1)
            self.connection_lost(None)
            if before is not None:
                before.abort()
            return
        if self.counted:  # it is still there
            self.transport, self.paused = found, False
            self._secured()

    def _secured(self) -> None:
        """TLS is on."""
        assert self.transport is not None
        resumed = self.transport.get_extra_info("ssl_object").session_reused
        self.acceptor.intake.counters.add(RESUMED if resumed else FULL, 1)
        self.heard = self.acceptor.now()
        if self.session is not None:
            self._start_over(self.session)
        elif self.early:
            self._write(reply.TALKING_EARLY)
            self.transport.close()
        else:
            self._greet(True)

    def _start_over(self, session: ServerSession) -> None:
        """TLS is on behind STARTTLS: nothing that was said in the clear holds, not even who it was."""
        self.waits, session.stopped = 0, False  # what was owed is written in front of the handshake
        self._bound()
        session.tls_started()
        self._become(None)
        self._permit(session)

    async def _check_login(self, session: ServerSession, claim: Claim) -> None:
        began = self.acceptor.now()
        try:
            identity, answer = await self.acceptor.door.logins.check(claim, self.client_of().address)
        except Exception as error:  # a mistake of ours must not leave the client waiting for good
            text = redacted(f"a login could not be checked: {type(error).__name__}: {error}")
            self.acceptor.intake.log.event("warning", text=text)
            identity, answer = None, reply.LOGIN_UNAVAILABLE
        if answer.startswith(b"535"):
            await asyncio.sleep(began + self.acceptor.config.accounts.answer_after - self.acceptor.now())
        self.waits &= ~CHECKING
        if self._gone():
            return
        if identity is not None:
            answer = self._become(identity) or answer
            self._permit(session)
        self.heard = self.acceptor.now()
        self._advance(session, session.checked(self.identity.name if self.identity is not None else "", answer))
        self._resume()

    # A message that fits into memory

    def _store(self, session: ServerSession, transaction: Transaction) -> None:
        self.waits |= STORING
        self.text_since = 0.0
        self.dot_at = self.acceptor.now()
        if self.large is not None:
            self._finish_large()
            return
        intake = self.acceptor.intake
        self.ident = intake.queue.ident()
        text = transaction.take()
        start = text[0] if text else b""
        if len(text) > 1 and b"\r\n\r\n" not in start:
            start = _beginning(text)
        front = intake.prepend(self.ident, transaction, self.client_of(), session, start, self.listener.submission, self.identity)
        if isinstance(front, bytes):
            self._turn_down(front)
            return
        if transaction.chunked and transaction.tail != b"\r\n":
            text.append(b"\r\n")  # BDAT text need not end in CRLF; what we send by DATA must
        if self._signs():
            self.acceptor.door.signer.sign(
                front[0], text, self._application(), lambda found: self._signed(session, transaction, front, text, found)
            )
            return
        verifier = self.acceptor.door.verifier
        if verifier is not None and not self._own():
            self.acceptor.spawn(self._verify(verifier, session, transaction, front, text))
            return
        text[:0] = front
        self.size = sum(map(len, text))
        self._admit(session, transaction, text)

    async def _verify(
        self, verifier: "Verifier", session: ServerSession, transaction: Transaction, front: list[bytes], text: list[bytes]
    ) -> None:
        """A stranger's message that is in memory."""
        whole = b"".join(text)
        look = verifier.look(whole)
        if look is None:
            self._answer(reply.HEADER_TOO_LONG)
            return
        body = whole[look.end :]
        field = await self._looked_at(verifier, session, transaction, look, body)
        if field is not None:
            found = [field, *front, look.header, body]
            self.size = sum(map(len, found))
            self._admit(session, transaction, found)

    async def _looked_at(
        self, verifier: "Verifier", session: ServerSession, transaction: Transaction, look: "Look", body: bytes
    ) -> bytes | None:
        """A stranger's message: what it says of itself is looked at. The field that tells what was found; None when it was
        refused, and that answered."""
        try:
            verdict = await verifier.check(self.client_of().address, session.helo, transaction.sender, look, body)
        except Exception as error:  # a mistake of ours loses nobody's mail
            self.acceptor.intake.unverified(error)
            self._answer(reply.NOT_VERIFIED)
            return None
        refusal = verdict.refusal
        self.acceptor.intake.judged(verdict.dmarc.result, refusal)
        if refusal is not None:
            self._answer(refusal)
            return None
        transaction.held = transaction.held or verdict.held
        return verdict.field

    def _own(self) -> bool:
        """Whether it is mail of somebody who may relay, or has logged in."""
        return self.identity is not None or self.client_of().trusted

    def _signs(self) -> bool:
        """Whether mail of this client is signed where there is a key for it: that of strangers is not ours."""
        return bool(self.acceptor.door.signer) and self._own()

    def _application(self) -> str:
        """Whose mail it is."""
        own = self.identity.application if self.identity is not None else ""
        return own or self.client_of().application or self.listener.application

    def _signed(
        self, session: ServerSession, transaction: Transaction, front: list[bytes], text: list[bytes], found: bytes | Exception
    ) -> None:
        """The signatures are there, or cannot be: then the message is not sent without."""
        if isinstance(found, Exception):
            self._not_signed(found)
            return
        text[:0] = [found, *front] if found else front
        self.size = sum(map(len, text))
        self._admit(session, transaction, text)

    def _not_signed(self, error: Exception) -> None:
        if isinstance(error, Unsignable):
            self._turn_down(error.reply)
        else:
            self.acceptor.intake.unsigned(error)
            self._turn_down(reply.NOT_SIGNED)

    def client_of(self) -> Client:
        """The peer's rules."""
        assert self.client is not None
        return self.client

    def _admit(self, session: ServerSession, transaction: Transaction, text: list[bytes] | Body) -> None:
        client, identity = self.client_of(), self.identity
        if identity is not None and "octets" in identity.quotas:
            refused = self.acceptor.intake.quotas.account(identity, "octets", self.size, transaction)
            if refused is not None:
                self._turn_down(refused)
                return
        self.acceptor.intake.admit(
            self.ident,
            transaction,
            text,
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
        """The group commit has returned."""
        intake = self.acceptor.intake
        session = self.session
        if error is not None:
            self._turn_down(intake.failed(error))
            return
        if self.large is not None:
            self.large = None  # it is the queue's
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
        """Answer the final dot and go on."""
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

    def _turn_down(self, answer: bytes) -> None:
        """Refuse the complete message, in a turn of its own: there may be hundreds of them in one segment."""
        self.acceptor.loop.call_soon(self._answer, answer)

    # A message that streams to disk

    def _spill(self, session: ServerSession, transaction: Transaction) -> None:
        """Hand the text received so far to a thread, and read nothing until it is written."""
        text = transaction.take()
        if self.large is None:
            self.ident = self.acceptor.intake.queue.ident()
            found = self._opened(session, transaction, b"".join(text))
            if not isinstance(found, bytes) and not self.acceptor.take_file():
                found = self.acceptor.intake.failed(StoreError("no descriptor is left for it"))
            if isinstance(found, bytes):
                session.refuse(found)
                return
            self.large, text = found
        if text:
            self.waits |= SPILLING
            self._pause()
            future = self.acceptor.loop.run_in_executor(self.acceptor.threads, self.large.write, text)
            future.add_done_callback(self._spilled)

    def _opened(self, session: ServerSession, transaction: Transaction, start: bytes) -> tuple[Large, list[bytes]] | bytes:
        """A large message whose text begins with `start`, and that text; or the reply that refuses it."""
        intake, door = self.acceptor.intake, self.acceptor.door
        ident, draft, look = self.ident, None, None
        if door.verifier is not None and not self._own():
            look = door.verifier.look(start)
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
                draft = door.signer.draft(front[0], start, self._application())
            except Unsignable as error:
                return error.reply
        return Large(lambda room: intake.queue.big_body(ident, room), front, draft, look), [start]

    def _spilled(self, future: "asyncio.Future[None]") -> None:
        session, error = self.session, future.exception()
        if session is None or self._gone():
            self.waits &= ~SPILLING
            self._discard_large()
            return
        self.heard = self.acceptor.time
        if error is not None:
            # The client is told at the end of its text; until then it is read and dropped.
            self._discard_large()
            session.refuse(self.acceptor.intake.failed(store_error(error)))
        self._go_on(SPILLING)

    def _finish_large(self) -> None:
        session, large = self.session, self.large
        assert session is not None and session.complete is not None and large is not None
        transaction = session.complete
        text = transaction.take()
        if transaction.chunked and transaction.tail != b"\r\n":
            text.append(b"\r\n")
        self._pause()
        future = self.acceptor.loop.run_in_executor(self.acceptor.threads, large.write, text)
        future.add_done_callback(lambda future: self._passed_by(session, transaction, large, future.exception()))

    def _passed_by(self, session: ServerSession, transaction: Transaction, large: Large, error: BaseException | None) -> None:
        """All of a large text is written: now it can be known what stands in front of it."""
        verifier = self.acceptor.door.verifier

        def signed(found: bytes | Exception) -> None:
            if isinstance(found, Exception):
                self._not_signed(found)
            else:
                self._close_large(session, transaction, large, found)

        if error is not None:
            self._stored(store_error(error))
        elif large.draft is not None:
            self.acceptor.door.signer.finish(large.draft, signed)
        elif large.look is not None and verifier is not None:
            self.acceptor.spawn(self._verify_large(verifier, session, transaction, large, large.look))
        else:
            self._close_large(session, transaction, large, b"")

    async def _verify_large(
        self, verifier: "Verifier", session: ServerSession, transaction: Transaction, large: Large, look: "Look"
    ) -> None:
        field = await self._looked_at(verifier, session, transaction, look, b"")
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
        """Close a peer that is silent or too slow, and end one that does not read. Called every CHECK_EVERY seconds."""
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
        quiet = now - self.heard
        if self.waits & BLOCKED:
            if quiet > settings.command_timeout * patience:
                transport.abort()
        elif session.taking_text:
            taken = now - self.text_since if self.text_since else 0.0
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
        """Shutting down: an idle session is told so now, one with a message under way behind its dot."""
        session = self.session
        if session is not None and not (self.waits & (STORING | CHECKING) or session.taking_text or session.starting_tls):
            self._give_up(DRAIN_REPLY)


def _beginning(text: list[bytes]) -> bytes:
    """The first octets of a text, which hold its header if it is a reasonable one."""
    found = bytearray()
    for piece in text:
        found += piece[: HEADER_SEEN - len(found)]
        if len(found) == HEADER_SEEN:
            break
    return bytes(found)
