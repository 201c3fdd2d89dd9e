"""One client's connection: asyncio on one side, proto.smtp_server on the other, with back-pressure and deadlines.

A message is held in memory up to 1 MB; what is longer streams into a file of its own, read no faster than the disk
takes it. Nothing is read while a commit is awaited, or a login, a signature or a handshake.
"""

import asyncio
import contextlib
import fcntl
import ipaddress
import socket
import ssl
import termios
from array import array
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from relaymta.accept.identity import Identity
from relaymta.accept.intake import Client
from relaymta.accept.large import Large
from relaymta.accept.listening import proxied
from relaymta.config import Listener
from relaymta.errors import StoreError, store_error
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

__all__ = ["DRAIN_REPLY", "Connection"]

FULL, RESUMED, FAILED = (index("relaymta_tls_handshakes_total", result) for result in ("full", "resumed", "failed"))
ACCEPTED = index("relaymta_connections_total", "accepted")
REFUSED = index("relaymta_connections_total", "refused")
RATE_GRACE = 60.0  # seconds until a text's rate is looked at
STRESS_PATIENCE = 0.1  # share of the timeouts that is left under stress
# For the handshake, and for the client's part of the end of TLS.
_PATIENCE: dict[str, Any] = {"ssl_handshake_timeout": 30.0, "ssl_shutdown_timeout": 5.0}
PATIENT_ERRORS = 3  # wrong commands until each costs time
DRAIN_REPLY = reply.SHUTTING_DOWN


class Connection(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "acceptor", "checking", "client", "counted", "dot_at", "heard", "ident", "identity", "large", "late", "listener",
        "paused", "seat", "session", "size", "spilling", "storing", "text_since", "transport", "wrong",
    )  # fmt: skip

    def __init__(self, acceptor: "Acceptor", listener: Listener) -> None:
        self.acceptor = acceptor
        self.listener = listener
        self.transport: asyncio.Transport | None = None
        self.session: ServerSession | None = None
        self.client: Client | None = None
        self.counted = False
        self.heard = 0.0  # when the peer was last heard (loop time)
        self.text_since = 0.0  # when the text under way began
        self.dot_at = 0.0
        self.ident = 0
        self.size = 0  # octets stored of the message under way, ours in front included
        self.large: Large | None = None
        self.spilling = False  # a thread is writing to `large`
        self.storing = False
        self.checking = False  # a login is being checked, or a reply held back
        self.late: bytes | None = None  # what comes while a reply is held back
        self.paused = False
        self.identity: Identity | None = None
        self.seat = ""  # the limit of an account's connections that this one counts in
        self.wrong = 0  # the session's errors when its client was last made to wait

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if not self.counted:
            peer = transport.get_extra_info("peername")
            refusal = self.enter(peer[0] if peer else "127.0.0.1", reply.TALKING_EARLY if _talks_early(transport) else None)
            if refusal is not None:
                self._write(refusal)
                transport.close()
                return
        if transport.get_extra_info("ssl_object") is None:
            self._greet(False)
        else:
            self._secured()

    def enter(self, address: str, refusal: bytes | None = None) -> bytes | None:
        """A client at the door: count it, or the reply that refuses it."""
        acceptor = self.acceptor
        client = self.client = acceptor.intake.client(address.partition("%")[0])
        if refusal is None:
            refusal = acceptor.enter(client)
        if refusal is not None:
            acceptor.intake.counters.add(REFUSED, 1)
            return refusal
        self.counted = True
        acceptor.intake.counters.add(ACCEPTED, 1)
        acceptor.connections.add(self)
        self.heard = acceptor.now()
        return None

    def _greet(self, secure: bool) -> None:
        """Begin the session."""
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
        )
        self._write(self.session.greet())

    def _assume(self, attributes: dict[str, str]) -> bytes | None:
        """XCLIENT: from now on this is another client. The reply that refuses it, or None."""
        session, acceptor = self.session, self.acceptor
        assert session is not None
        address = attributes.get("ADDR", "")
        if address.upper().startswith("IPV6:"):
            address = address[5:]
        try:
            address = str(ipaddress.ip_address(address)) if address else self.client_of().address
        except ValueError:
            return reply.BAD_ARGUMENT
        before = self.client_of()
        client = acceptor.intake.client(address)
        acceptor.leave(before)
        self.counted = False
        refusal = acceptor.enter(client)
        if refusal is not None:
            session.closing = True
            return refusal
        self.counted, self.client = True, client
        login = attributes.get("LOGIN", "")
        self.identity = acceptor.door.logins.as_kept(Identity(login)) if login else None
        session.user = login
        session.limits = client.limits
        self._permit(session)
        return None

    def _permit(self, session: ServerSession) -> None:
        """What this client, or who has logged in, may do."""
        intake, identity = self.acceptor.intake, self.identity
        session.accept_sender = intake.sender_check(identity) if identity is not None else intake.accept_sender
        session.accept_recipient = intake.recipient_check(self.client_of(), identity)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.acceptor.connections.discard(self)
        if self.counted and self.client is not None:
            self.acceptor.leave(self.client)
            self.counted = False
        if self.seat:
            self.acceptor.limits.give(self.seat)
            self.seat = ""
        if self.large is not None and not self.spilling and not self.storing:
            self._discard_large()

    def eof_received(self) -> bool:
        return self.storing  # a client that half-closes behind the dot still gets its reply

    def _write(self, data: bytes) -> None:
        if self.transport is not None and data:
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        session = self.session
        if session is None:
            return
        self.heard = self.acceptor.time
        if self.storing or self.checking:
            # Pipelined behind the dot or AUTH: the session keeps it. Nothing more is read until it goes on.
            if self.late is not None:
                self.late += data
            else:
                session.parser.feed(data)
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
        self.checking, self.late = True, b""
        self._pause()

        def answer() -> None:
            late, self.checking, self.late = self.late or b"", False, None
            if self.transport is not None and not self.transport.is_closing():
                self.heard = self.acceptor.now()
                self._resume()
                self._advance(session, out)
                if late:
                    self.data_received(late)

        self.acceptor.loop.call_later(self.acceptor.config.intake.tarpit, answer)

    def _advance(self, session: ServerSession, out: bytes) -> None:
        """Behind the session's last move: write, store, spill, close."""
        self._write(out)
        if session.complete is not None:
            self._store(session, session.complete)
        elif session.claim is not None:
            self.checking = True
            self.acceptor.spawn(self._check_login(session, session.claim))
        elif session.starting_tls:
            self._start_tls()
        elif session.taking_text and session.transaction is not None:
            if not self.text_since:
                self.text_since = self.heard
            large = self.large is not None or session.transaction.size > self.acceptor.intake.queue.big_limit - 4096
            if large and not session.discarding:  # a refused text is dropped as it comes, not stored
                self._spill(session, session.transaction)
        elif self.text_since:
            self.text_since = 0.0
        if session.transaction is None and self.large is not None and not self.spilling:
            self._discard_large()  # refused at its end
        if session.closing and self.transport is not None:
            self.transport.close()

    def _pause(self) -> None:
        if not self.paused and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            self.paused = True

    def _resume(self) -> None:
        if self.paused and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self.paused = False

    # TLS and logins

    def _start_tls(self) -> None:
        """Shake hands behind STARTTLS. Nothing is read until that has begun: nothing in the clear is taken for a command."""
        assert self.transport is not None
        self._pause()
        loop, transport = self.acceptor.loop, self.transport

        def begin(context: ssl.SSLContext) -> Awaitable[Any]:
            return loop.start_tls(transport, self, context, server_side=True, **_PATIENCE)

        self.acceptor.spawn(self._shake_hands(begin))

    async def begin(self, sock: socket.socket, peer: str) -> None:
        """A socket on which a PROXY header comes first, or TLS, or both."""
        loop, refusal = self.acceptor.loop, None
        try:
            address = await proxied(sock, peer, self.listener.proxy) if self.listener.proxy else peer
            refusal = self.enter(address)
            if refusal is not None:
                raise ConnectionRefusedError
            if self.listener.tls == "implicit":
                await self._shake_hands(
                    lambda context: loop.connect_accepted_socket(lambda: self, sock, ssl=context, **_PATIENCE)
                )
            else:
                await loop.connect_accepted_socket(lambda: self, sock)
        except OSError:
            if refusal is not None and self.listener.tls != "implicit":  # who expects TLS would not understand it
                with contextlib.suppress(OSError):
                    sock.send(refusal)
            elif refusal is None:
                self.acceptor.intake.counters.add(REFUSED, 1)
            self.connection_lost(None)
        if self.session is None:
            sock.close()

    async def _shake_hands(self, begin: Callable[[ssl.SSLContext], Awaitable[Any]]) -> None:
        context = self.acceptor.door.certificates.context
        try:
            if context is None:
                raise ConnectionError("there is no usable certificate")
            found = await begin(context)
        except OSError:  # SSLError; a peer that is gone or too slow
            self.acceptor.intake.counters.add(FAILED, 1)
            self.connection_lost(None)
            return
        if self.session is not None and self.session.starting_tls:
            self.transport, self.paused = found, False
            self._secured()

    def _secured(self) -> None:
        """TLS is on."""
        assert self.transport is not None
        resumed = self.transport.get_extra_info("ssl_object").session_reused
        self.acceptor.intake.counters.add(RESUMED if resumed else FULL, 1)
        self.heard = self.acceptor.now()
        if self.session is None:
            self._greet(True)
        else:
            self.session.tls_started()

    async def _check_login(self, session: ServerSession, claim: Claim) -> None:
        began = self.acceptor.now()
        try:
            identity, answer = await self.acceptor.door.logins.check(claim, self.client_of().address)
        except Exception as error:  # a mistake of ours must not leave the client waiting for good
            self.acceptor.intake.log.event("warning", text=f"a login could not be checked: {type(error).__name__}: {error}")
            identity, answer = None, reply.LOGIN_UNAVAILABLE
        if answer.startswith(b"535"):
            await asyncio.sleep(began + self.acceptor.config.accounts.answer_after - self.acceptor.now())
        self.checking = False
        if self.transport is None or self.transport.is_closing():
            return
        if identity is not None and identity.connections:
            seat = f"logged in as {identity.name}"
            if self.acceptor.limits.take(seat, identity.connections):
                self.seat = seat
            else:
                text = f"Too many connections of {identity.name} (limit connections {identity.connections}); try again later"
                identity, answer = None, reply.format_reply(454, "4.7.0", text)
        if identity is not None:
            self.identity = identity
            self._permit(session)
        self.heard = self.acceptor.now()
        self._resume()
        self._advance(session, session.checked(identity.name if identity is not None else "", answer))

    # A message that fits into memory

    def _store(self, session: ServerSession, transaction: Transaction) -> None:
        self.storing = True
        self.text_since = 0.0
        self.dot_at = self.acceptor.now()
        if self.large is not None:
            if not self.spilling:
                self._finish_large()
            return  # else the thread's return goes on
        intake = self.acceptor.intake
        self.ident = intake.queue.ident()
        text = transaction.take()
        start = text[0] if text else b""
        if len(text) > 1 and b"\r\n\r\n" not in start:
            start = _beginning(text)
        front = intake.prepend(self.ident, transaction, self.client_of(), session, start, self.listener.submission, self.identity)
        if isinstance(front, bytes):
            self._answer(front)
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
            self._answer(error.reply)
        else:
            self.acceptor.intake.unsigned(error)
            self._answer(reply.NOT_SIGNED)

    def client_of(self) -> Client:
        """The peer's rules."""
        assert self.client is not None
        return self.client

    def _admit(self, session: ServerSession, transaction: Transaction, text: list[bytes] | Body) -> None:
        client, identity = self.client_of(), self.identity
        if identity is not None and "octets" in identity.quotas:
            refused = self.acceptor.intake.quotas.account(identity, "octets", self.size, transaction)
            if refused is not None:
                self._discard_large()
                self._answer(refused)
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
            self._discard_large()
            self._answer(intake.failed(error))
            return
        self.large = None
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
        self.storing = False
        session = self.session
        if session is None or self.transport is None or self.transport.is_closing():
            return
        self._resume()
        out = session.finish(answer)
        if self.acceptor.intake.draining and session.complete is None:
            session.closing = True
            out += DRAIN_REPLY
        self._advance(session, out)

    # A message that streams to disk

    def _spill(self, session: ServerSession, transaction: Transaction) -> None:
        """Hand the text received so far to a thread, and read nothing until it is written."""
        if self.spilling:
            return
        text = transaction.take()
        if self.large is None:
            self.ident = self.acceptor.intake.queue.ident()
            found = self._opened(session, transaction, b"".join(text))
            if isinstance(found, bytes):
                session.refuse(found)
                return
            self.large, text = found
        if text:
            self.spilling = True
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
        self.spilling = False
        session = self.session
        error = future.exception()
        if self.transport is None or self.transport.is_closing() or session is None:
            self._discard_large()
            return
        self.heard = self.acceptor.time
        if error is not None:
            # The client is told at the end of its text; until then it is read and dropped.
            self._discard_large()
            answer = self.acceptor.intake.failed(store_error(error))
            if self.storing:
                self._answer(answer)
                return
            session.refuse(answer)
        if self.storing:
            self._finish_large()
            return
        self._resume()
        if session.transaction is not None and session.transaction.text and self.large is not None:
            self._spill(session, session.transaction)
        elif session.transaction is None:
            self._discard_large()

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
                self._discard_large()
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
        if field is None:
            self._discard_large()
        else:
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
            self.acceptor.loop.run_in_executor(self.acceptor.threads, large.discard)

    # Deadlines

    def check(self, now: float) -> None:
        """Close a peer that is silent or too slow. Called every CHECK_EVERY seconds."""
        session, transport = self.session, self.transport
        if session is None or transport is None or self.storing or self.checking or self.spilling or session.starting_tls:
            return
        settings = self.acceptor.config.intake
        patience = STRESS_PATIENCE if self.acceptor.stressed else 1.0
        quiet = now - self.heard
        if session.taking_text:
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
        if self.transport is not None:
            self.transport.close()
        self._discard_large()

    def drain(self) -> None:
        """Shutting down: an idle session is told so now, one with a message under way behind its dot."""
        session = self.session
        if session is not None and not (self.storing or self.checking or session.taking_text or session.starting_tls):
            self._give_up(DRAIN_REPLY)


def _talks_early(transport: asyncio.BaseTransport) -> bool:
    """Whether a client's octets are there before our banner (RFC 5321 4.3.1: it waits for it)."""
    waiting = array("i", [0])
    try:
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, waiting)
    except OSError:  # it is gone already
        return False
    return waiting[0] > 0


def _beginning(text: list[bytes]) -> bytes:
    """The first octets of a text, which hold its header if it is a reasonable one."""
    found = bytearray()
    for piece in text:
        found += piece[: HEADER_SEEN - len(found)]
        if len(found) == HEADER_SEEN:
            break
    return bytes(found)
