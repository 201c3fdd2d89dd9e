"""The connection of an SMTP or LMTP client: what it does beside what all do (client.py). A message is the session's transaction
(transaction.py).
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Protocol, cast

from relaymta.accept.admission import DRAIN_REPLY, Admission
from relaymta.accept.client import KEPT, STRESS_PATIENCE, ClientConnection
from relaymta.accept.eager import begin
from relaymta.accept.line import ASKING, CHECKING, COMMITTING, OUTPUT_SECONDS, SHAKING, SPILLING
from relaymta.accept.origin import Client
from relaymta.accept.rights import Rights
from relaymta.accept.transaction import Flow, IncomingTransaction
from relaymta.config import Listener
from relaymta.errors import redacted
from relaymta.proto import reply
from relaymta.proto.session import ASKED, CLAIMED, COMPLETE, DATA, STORING, TLS, Question
from relaymta.proto.smtp_server import ServerSession
from relaymta.proto.transaction import Transaction
from relaymta.trace import Facts

__all__ = ["Connection"]

RATE_GRACE = 60.0  # seconds until the rate of message data is checked


class Asks(Protocol):
    """What a transaction that `asks` has."""

    async def asked(self, question: Question) -> bytes | None:
        """The reply by which filters refuse a command, or None. Cancelled: no filter is left in the middle of it."""


class Connection(ClientConnection[ServerSession]):
    """The connection of an SMTP or LMTP client."""

    __slots__ = ("asking", "file")

    def __init__(self, admission: Admission, listener: Listener) -> None:
        super().__init__(admission, listener)
        self.file = ""  # as of Flow
        self.asking: asyncio.Task[None] | None = None  # filters, about the session's question

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        admission = self.admission
        rights.offers = admission.endpoint.offers(self.listener, rights.client.xclient, rights.client.xforward)
        if rights.useless:
            self.count_refused()
            self.write(reply.LMTP_CLOSED)
            self.close()
            return None
        session = ServerSession(admission.intake.hostname, rights, secure)
        if self.tap is not None:
            self.tap.hold(session)
        return session

    def trace(self, client: Client, begins: bool = True) -> None:
        tracer, listener = self.admission.tracer, self.listener
        if tracer is None or not tracer.watches_in:
            return
        application = client.application or listener.application
        if self.rights is not None:
            application = self.rights.origin.application
        facts = Facts(client=client.address, listener=listener.address, application=application)
        known = self.tap
        tracer.incoming(self, facts, client.xclient)
        tap = self.tap
        if tap is not None and tap is not known:
            tap.who = self._who
            if self.session is not None:
                tap.hold(self.session)
            tap.event(f"{'connected' if begins else 'already connected'}: {client.address} to {listener.address}")

    def _who(self) -> tuple[str, str, str] | None:
        rights = self.rights
        if rights is None:  # the client is refused
            return None
        return rights.client.address, rights.origin.application, rights.user

    def flow(self) -> Flow:
        return self

    def helo(self) -> str:
        return self.session.helo if self.session is not None else ""

    def secured(self, described: str) -> None:
        if self.session is not None:
            self.session.tls = described

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

    def _ask(self, session: ServerSession) -> None:
        """Ask filters about a command, or about a new client, unless it has hung up already. One that goes meanwhile is to be
        noticed, so that what it sends ahead is read, as far as it is little."""
        if self.ended:
            session.close()
            return
        if self.kept <= KEPT:
            self.resume()
        self.waits |= ASKING
        question = session.question
        assert question is not None
        before, self.eager = self.eager, True
        try:
            begin(self._asked(session, question), self._asks)
        finally:
            self.eager = before

    def _asks(self, rest: Coroutine[Any, Any, None]) -> None:
        self.asking = self.admission.spawn(rest)

    async def _asked(self, session: ServerSession, question: Question) -> None:
        try:
            if session.transaction is not None:
                answer = await cast(Asks, session.transaction).asked(question)
            else:
                assert self.rights is not None
                answer = await self.rights.asked(question.verb, session)
        except asyncio.CancelledError as error:
            if not self.waits & ASKING:  # by `_stop_asking`
                return
            answer = self._not_asked(error)  # the client still waits for a reply
        except Exception as error:  # after an internal error, too, the client gets a reply
            answer = self._not_asked(error)
        self._answered(session, answer)

    def _answered(self, session: ServerSession, answer: bytes | None) -> None:
        self.asking = None
        self.waits &= ~ASKING
        if self.gone or session.closing:
            return
        self.active_at = self.admission.now()
        errors = session.errors
        out = session.answered(answer)
        if self.is_delayed(session, errors):
            self.tarpit(out)
        else:
            self.more(session, out)

    def _not_asked(self, error: BaseException) -> bytes:
        """Log why filters could not be asked about a command; the reply to it."""
        text = redacted(f"filters could not be asked about a command: {type(error).__name__}: {error}")
        self.admission.intake.log.event("warning", text=text)
        return reply.NOT_ASKED

    async def ask_login(self, rights: Rights) -> bytes | None:
        """As of ClientConnection."""
        if "AUTH" not in rights.asks_client or self.session is None:
            return None
        try:
            return await rights.asked("AUTH", self.session)
        except Exception as error:
            return self._not_asked(error)

    def _stop_asking(self) -> None:
        """The client has gone, or is sent away: the question is not answered any more."""
        asking, self.asking = self.asking, None
        self.waits &= ~ASKING
        if asking is not None:
            asking.cancel()

    def writing(self) -> None:
        """A thread writes message data: read nothing until it has."""
        self.waits |= SPILLING
        self.pause()

    def written(self) -> None:
        """It has."""
        self.active_at = self.admission.time
        self.go_on(SPILLING)

    def hung_up(self) -> None:
        """As of ClientConnection: what filters look at is given up, and nothing of it is queued; so is a question."""
        session = self.session
        if self.waits & ASKING:
            self._stop_asking()
            if session is not None:
                session.close()
        transaction = session.transaction if session is not None else None
        if isinstance(transaction, IncomingTransaction):
            transaction.abandon()

    def answer(self, transaction: Transaction, answer: bytes | list[bytes], closes: bool = False) -> None:
        """As of Flow. Of several only the first counts: a later one is not taken for that to the next message, which would be
        acknowledged before it is stored."""
        session = self.session
        if session is None or session.state != STORING or session.transaction is not transaction:
            return
        self.waits &= ~COMMITTING
        if self.gone:
            session.close()
            session.finish(answer)
            return
        out = session.finish(answer)
        if closes:
            session.close()
        if self.admission.intake.draining:
            session.close()
            out += DRAIN_REPLY
        self.more(session, out)

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
        if self.gone or session is None or self.waits & (COMMITTING | CHECKING | SPILLING | SHAKING | ASKING):
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
        self.linger()

    def drain(self) -> None:
        """Shutting down: close a session with a 421 now, also one whose login is checked, whose reply is delayed or about whose
        command filters are asked; one with a message under way gets it after its final dot."""
        session = self.session
        if session is None or self.gone or self.waits & (COMMITTING | SPILLING | SHAKING) or session.state == DATA:
            return
        self._stop_asking()
        out, self.delayed = self.delayed, b""
        self._give_up(out + DRAIN_REPLY)

    steps: ClassVar[dict[int, Callable[[Any, Any], None]]] = {
        DATA: _receiving,
        COMPLETE: _store,
        ASKED: _ask,
        CLAIMED: ClientConnection.log_in,
        TLS: ClientConnection.start_tls,
    }
