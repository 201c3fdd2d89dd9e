"""The state of an SMTP or LMTP session on the server side, and what a session asks of its caller."""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from relaymta._speedups.smtp import Parser
from relaymta.proto import reply, sasl
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.transaction import NOBODY, NOTHING_SAID, Limits, Transaction

__all__ = ["ASKED", "CLAIMED", "COMMANDS", "COMPLETE", "DATA", "STORING", "TLS", "Host", "Offers", "Question", "Session", "Tap"]

# Session.state, see smtp_server.py
COMMANDS: Final = 0
DATA: Final = 1
COMPLETE: Final = 2
STORING: Final = 3
CLAIMED: Final = 4
TLS: Final = 5
ASKED: Final = 6

LINE_LIMIT = 2048  # 512 (RFC 5321 4.5.3.1.4) plus what extensions add; Postfix: line_length_limit 2048
LOGIN_LINE_LIMIT = 12288  # RFC 4954 4
DATA_LINE_LIMIT = 998  # RFC 5322 2.1.1
WRONG_LOGINS = 3  # in one session


@dataclass(frozen=True, slots=True)
class Offers:
    """The extensions that a session offers, and what it requires before MAIL. `mechanisms`: of AUTH, which is offered
    over TLS, and without when `clear`; `lmtp`: it is one of LMTP (RFC 2033)."""

    starttls: bool = False
    tls_needed: bool = False
    mechanisms: tuple[str, ...] = ()
    clear: bool = False
    login_needed: bool = False
    xclient: bool = False
    xforward: bool = False
    lmtp: bool = False


class Question(NamedTuple):
    """What the caller has to ask others about: a command, of a transaction MAIL, with its `parameters` as they came; RCPT, with
    an `address`; or DATA, also for the first BDAT, with `again`: the command, which is taken once more when the answer is there,
    and with LAST among its parameters where it is the only one. Or, where there is no transaction, CONNECT, before the greeting,
    and HELO. `accepted`: the reply where nobody objects."""

    verb: str
    address: str = ""
    parameters: tuple[str, ...] = ()
    again: tuple[int, int, bytes] | None = None
    accepted: bytes = b""


class Tap(Protocol):
    """Who is told of a dialogue."""

    def heard(self, session: "Session", event: Any) -> None:
        """An event of the parser, before it is handled."""

    def asks(self, again: tuple[int, int, bytes] | None) -> None:
        """A command is put off: the event that it will be taken from once more."""


_LIMITS, _OFFERS = Limits(), Offers()


class Host:
    """What a session asks of its caller: the rights of the client. This one accepts everything. `user`: the authenticated user,
    "" for none. `domain`: completes addresses without one; "": they are errors. `asks_client`: of CONNECT and HELO: about what
    others are asked. The caller may change all of them between two
    calls, but within a transaction its own `limits` hold."""

    __slots__ = ("asks_client", "domain", "limits", "offers", "user")

    def __init__(self, limits: Limits = _LIMITS, offers: Offers = _OFFERS) -> None:
        self.limits = limits
        self.offers = offers
        self.user = ""
        self.domain = ""
        self.asks_client = NOBODY

    def begin(self, session: "Session", sender: str, size: int, smtputf8: bool) -> Transaction | bytes:
        """MAIL: a new transaction, or the reply that rejects it. `size`: as the client announced it, 0: not at all."""
        return Transaction(sender, smtputf8, self.limits)

    def keys(self, user: str) -> sasl.Keys:
        """The keys for SCRAM, see `sasl.begin`."""
        raise KeyError(user)

    def assume(self, attributes: dict[str, str]) -> bytes | None:
        """XCLIENT: from now on this is the client with these attributes. The reply that refuses them, or None; after a 4xx the
        session is closed."""
        return None

    def log_out(self) -> None:
        """The session starts anew: nobody is authenticated any more."""
        self.user = ""


class Session:
    """The state of an SMTP session, and every change of it that is not one command's. `hostname`: our name; `secure`: TLS is
    active; `mechanism`: by which the user has logged in, "" where that was not here."""

    __slots__ = (
        "behind",
        "claim",
        "closing",
        "errors",
        "exchange",
        "extended",
        "foreign",
        "forwarded",
        "helo",
        "host",
        "hostname",
        "mechanism",
        "parser",
        "parting",
        "pending",
        "question",
        "refusal",
        "returns",
        "secure",
        "state",
        "tap",
        "tls",
        "transaction",
        "wrong_logins",
    )

    def __init__(self, hostname: str, host: Host, secure: bool = False) -> None:
        self.hostname = hostname
        self.host = host
        self.secure = secure
        self.tls = ""  # version and cipher, for Received:
        self.tap: Tap | None = None
        self.state = COMMANDS
        self.transaction: Transaction | None = None
        self.claim: sasl.Claim | None = None
        self.exchange: AuthExchange | None = None
        self.mechanism = ""
        self.question: Question | None = None
        self.refusal = b""  # the reply to a chunk that belongs to no transaction
        self.parser = self._parser()
        self.pending: list[Any] = []  # events behind the end of a transaction
        self.returns = False  # `receive` returns: a transaction has ended, or the session is closing
        self.behind = False
        self.closing = False
        self.foreign = False
        self.forwarded = NOTHING_SAID  # by XFORWARD, about the next transaction
        self.parting = False
        self.helo = ""
        self.extended = False
        self.errors = 0
        self.wrong_logins = 0

    def _parser(self) -> Parser:
        limit = LOGIN_LINE_LIMIT if self.host.offers.mechanisms else LINE_LIMIT
        return Parser(limit, DATA_LINE_LIMIT, False)

    @property
    def complete(self) -> Transaction | None:
        """The transaction to store, while the state is COMPLETE."""
        return self.transaction if self.state == COMPLETE else None

    def greet(self) -> bytes:
        """The 220 greeting, for which a client has to wait (RFC 5321 3.1); from now on commands are parsed. b"": others are asked
        about the client first."""
        self.parser.commands()
        greeting = f"220 {self.hostname} {'LMTP' if self.host.offers.lmtp else 'ESMTP'} relaymta\r\n".encode()
        return self.ask(Question("CONNECT", accepted=greeting)) if "CONNECT" in self.host.asks_client else greeting

    def keep(self, data: bytes) -> None:
        """Keep octets from the client for a later `receive(b"")`."""
        self.parser.keep(data)

    def store(self) -> None:
        """The caller stores the complete message: whatever happens to the connection, it calls `finish` once."""
        self.state = STORING

    def finish(self, answer: bytes | list[bytes]) -> bytes:
        """The complete message was stored, or rejected as a whole, with the reply `answer`; or, of LMTP, a list: one reply for
        each recipient, in their order. Its transaction ends. Returns what to write."""
        if isinstance(answer, list):
            out = b"".join(answer)
        else:
            if not answer.startswith(b"2") and self.transaction is not None:
                self.transaction.refused(answer)
            out = self.for_each(answer)
        self.drop()
        self.go_on()
        return out

    def for_each(self, answer: bytes) -> bytes:
        """The reply to the message data of the transaction under way: of LMTP once for each recipient (RFC 2033 4.2)."""
        if self.host.offers.lmtp and self.transaction is not None:
            return answer * len(self.transaction.recipients)
        return answer

    def close(self) -> None:
        """The connection is lost, or is to be closed: nothing more is parsed, and a transaction that is not being stored ends.
        Further calls do nothing."""
        if self.closing:
            return
        self.closing = self.returns = True
        self.behind = False
        self.question = None
        self.pending = []
        if self.state != STORING:
            self.drop()

    def tls_started(self) -> None:
        """The TLS handshake is done: the session starts anew (RFC 3207 4.2)."""
        self.drop()
        self.secure = True
        self.helo, self.extended, self.mechanism = "", False, ""
        self.host.log_out()
        self.parser = self._parser()
        self.parser.commands()

    def checked(self, answer: bytes) -> bytes:
        """The claim was verified. `answer`: 235, and `host.user` is authenticated; or the reply that refuses it. Returns what to
        write."""
        claim, exchange = self.claim, self.exchange
        assert claim is not None and exchange is not None
        self.claim, self.state = None, COMMANDS
        if answer.startswith(b"5"):
            self.wrong_logins += 1
        found = self.exchanged(exchange.checked(claim, answer))
        self.behind = not self.closing and self.parser.runnable()
        return found

    def ask(self, question: Question) -> bytes:
        """What a command's function returns when its reply is left to `answered`: nothing behind it is parsed before that."""
        self.question, self.state, self.returns = question, ASKED, True
        if self.tap is not None:
            self.tap.asks(question.again)
        return b""

    def answered(self, answer: bytes | None) -> bytes:
        """What was asked is answered, which ends the state ASKED; not to be called once the session is closing. `answer`: the
        reply that refuses it (4xx or 5xx; 421 and 521 end the session), None: it is accepted. Returns what to write."""
        question, transaction = self.question, self.transaction
        assert question is not None
        self.question, self.state = None, COMMANDS
        if answer is not None:
            out = self._refused(question, answer)
        elif transaction is None:
            out = question.accepted
        else:
            out = self._accepted(question, transaction)
        self.behind = not self.closing and (bool(self.pending) or self.parser.runnable())
        return out

    def _accepted(self, question: Question, transaction: Transaction) -> bytes:
        if question.verb == "MAIL":
            return reply.SENDER_OK
        if question.verb == "RCPT":
            transaction.recipients.append(question.address)
            return reply.RECIPIENT_OK
        transaction.cleared = True
        self.pending.insert(0, question.again)
        return b""

    def _refused(self, question: Question, answer: bytes) -> bytes:
        if answer.startswith((b"421", b"521")) or question.verb == "CONNECT":
            out = self.error_if_5xx(answer)  # RFC 7504 3: with 521, too, there is nothing more to say
            self.close()
            return out
        if question.verb == "HELO":
            self.helo, self.extended = "", False
        if question.verb == "DATA" and question.parameters:  # BDAT: the chunk follows, whatever it is told (RFC 3030 2)
            refusal = self.for_each(answer) if "LAST" in question.parameters else answer
            self.drop()
            self.refusal = refusal
            self.pending.insert(0, question.again)
            return b""
        if question.verb == "MAIL":
            self.drop()
        elif question.verb == "DATA":
            self.parser.commands()
        return self.error_if_5xx(answer)

    def exchanged(self, answer: bytes | sasl.Claim) -> bytes:
        """Go on after a step of an AUTH exchange."""
        if not isinstance(answer, bytes):
            self.claim, self.state = answer, CLAIMED
            return b""
        if answer.startswith(b"334"):
            self.parser.line()
            return answer
        if self.exchange is not None and answer.startswith(b"235"):
            self.mechanism = self.exchange.mechanism
        self.exchange = None
        self.parser.commands()
        if answer.startswith(b"235"):
            return answer
        if self.host.user:  # the client rejects our proof: it must not go on as authenticated
            self.close()
        if answer.startswith(b"535"):
            return self._wrong_login(answer)
        # Temporarily rejected attempts count as errors too: each costs a check of the limits and a line in the log.
        return self.error(answer)

    def _wrong_login(self, answer: bytes) -> bytes:
        if self.wrong_logins < WRONG_LOGINS:
            return self.error(answer)
        self.close()
        return answer + reply.TOO_MANY_WRONG

    def go_on(self) -> None:
        """Go on with commands, of which some may have arrived."""
        self.parser.commands()
        self.behind = not self.closing and self.parser.runnable()

    def reject_protocol(self) -> bytes:
        """The client speaks another protocol: close before SMTP commands within it are reached (cross-protocol attack)."""
        self.foreign = True
        self.close()
        return reply.NOT_SMTP

    def error(self, answer: bytes) -> bytes:
        self.errors += 1
        if self.errors >= self.host.limits.errors:
            self.close()
            return answer + reply.TOO_MANY_ERRORS
        return answer

    def error_if_5xx(self, answer: bytes) -> bytes:
        return self.error(answer) if answer.startswith(b"5") else answer

    def drop(self) -> None:
        """End the transaction under way, if there is one: none of its state remains for the next."""
        self.state = COMMANDS
        self.refusal = b""
        self.forwarded = NOTHING_SAID
        transaction, self.transaction = self.transaction, None
        if transaction is not None:
            self.returns = True
            transaction.end()
