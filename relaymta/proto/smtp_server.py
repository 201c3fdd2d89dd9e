"""The server side of an SMTP session (RFC 5321, 2920, 1870, 6152, 2034, 3030, 6531, 3207, 4954), without I/O.

The caller passes octets to `receive()` and writes what it returns. When a message is complete, `complete` holds its
Transaction, and the session pauses until the caller has stored it and calls `finish(reply)`. `closing`: the connection is to be
closed after what was returned is written (`foreign`: because the client speaks another protocol). Message data can be taken
early with `Transaction.take()`. `ended()` is called at every end of a transaction, before anything behind it is parsed: the
caller then drops what it holds of it.

The work of one call is bounded: `behind` is set when there is more, which `receive(b"")` continues. While the caller has set
`stopped` (the client does not read its replies) nothing is parsed, and input is kept.

The session pauses in two more states: after `starting_tls` nothing is to be read before the caller has done the handshake and
calls `tls_started()`; a `claim` is a login, which the caller verifies and answers with `checked()`.

    state       MAIL  RCPT  DATA  BDAT  message data
    greeted      ->    503   503   503
    MAIL         503   ->    554   554         (`transaction` is set)
    RCPT         503   ->    354   ->          (it has recipients)
    data                                 END -> complete -> finish() -> greeted
"""

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass

from relaymta._speedups.smtp import Parser
from relaymta.proto import reply, sasl
from relaymta.proto.address import mail_argument, parse_parameters, rcpt_argument

__all__ = ["Limits", "Offers", "ServerSession", "Transaction"]

# Event kinds and flags of _speedups.smtp (C integers there).
COMMAND, BAD, DATA, END = 0, 1, 2, 3
BARE_LF, BARE_CR, NUL, EIGHT_BIT, LONG_LINE = 1, 2, 4, 8, 16

LINE_LIMIT = 2048  # 512 (RFC 5321 4.5.3.1.4) plus what extensions add; Postfix: line_length_limit 2048
LOGIN_LINE_LIMIT = 12288  # RFC 4954 4
DATA_LINE_LIMIT = 998  # RFC 5322 2.1.1
WRONG_LOGINS = 3  # in one session
ENOUGH = 64  # replies of one call
PIECES = 1024  # of message data in memory, until they are joined: each costs more memory than it may hold

_XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
_XTEXT = re.compile(r"\+([0-9A-Fa-f]{2})")
_BAD_LINES = {1: reply.LINE_TOO_LONG, 2: reply.BARE_IN_COMMAND, 3: reply.NUL_IN_COMMAND}
_FOREIGN = 4
# How lines of other protocols begin: a request of HTTP, WebDAV or HTTP/2, a field of a header, the banner of SSH, the header of a
# load balancer that is not configured (listener.proxy).
_OTHERS = re.compile(
    rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PRI|COPY|MOVE|LOCK|UNLOCK|MKCOL|PROPFIND|PROPPATCH|REPORT|SEARCH"
    rb"|PROXY)(?![!-~])|[!-9;-~]+:|SSH-",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one session. Sizes in octets."""

    message_size: int = 50 * 1024 * 1024
    recipients: int = 1000
    errors: int = 20
    normalize: bool = False
    long_lines: bool = False


def _nobody(user: str) -> sasl.Keys:
    raise KeyError(user)


@dataclass(frozen=True, slots=True)
class Offers:
    """The extensions that a session offers, and what it requires before MAIL. `mechanisms`: of AUTH, which is offered
    over TLS, and without when `clear`; `keys`: for SCRAM, see `sasl.begin`."""

    starttls: bool = False
    tls_needed: bool = False
    mechanisms: tuple[str, ...] = ()
    clear: bool = False
    login_needed: bool = False
    assume: Callable[[dict[str, str]], bytes | None] | None = None  # XCLIENT: apply its attributes; a reply refuses them
    keys: Callable[[str], sasl.Keys] = _nobody


class Transaction:
    """One message under way: its envelope so far, and message data received and not taken yet."""

    __slots__ = ("chunked", "data", "eight_bit", "headers", "held", "recipients", "sender", "size", "smtputf8", "tail")

    def __init__(self, sender: str, smtputf8: bool) -> None:
        self.sender = sender
        self.smtputf8 = smtputf8
        self.recipients: list[str] = []
        self.data: list[bytes] = []
        self.size = 0
        self.eight_bit = False
        self.chunked = False
        self.tail = b""  # the last two octets of message data
        self.held = False  # to be held in the queue until it is released
        self.headers: list[str] = []  # the conditions of routes that its header fields meet

    def take(self) -> list[bytes]:
        """The message data received since the last call."""
        data, self.data = self.data, []
        return data


class ServerSession:
    """One SMTP session.

    `hostname`: our name; `accept_recipient(address, transaction)`: None, or the reply that refuses it;
    `accept_sender(address, announced size)` likewise. `refused(transaction, reply)` is called when a message is
    refused at or after the end of its data, `ended()` at every transaction's end. `secure`: TLS is active; `user`: the
    authenticated user, "" for none.
    """

    __slots__ = (
        "_exchange",
        "accept_recipient",
        "accept_sender",
        "behind",
        "claim",
        "closing",
        "complete",
        "discarding",
        "ended",
        "errors",
        "extended",
        "foreign",
        "helo",
        "hostname",
        "last_chunk",
        "limits",
        "offers",
        "parser",
        "refusal",
        "refused",
        "secure",
        "starting_tls",
        "stopped",
        "taking_data",
        "transaction",
        "user",
        "wrong_logins",
    )

    def __init__(
        self,
        hostname: str,
        limits: Limits,
        accept_sender: Callable[[str, int], bytes | None],
        accept_recipient: Callable[[str, Transaction], bytes | None],
        refused: Callable[[Transaction, bytes], None] = lambda transaction, answer: None,
        offers: Offers = Offers(),
        secure: bool = False,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.hostname = hostname
        self.limits = limits
        self.accept_sender = accept_sender
        self.accept_recipient = accept_recipient
        self.refused = refused
        self.ended = ended
        self.offers = offers
        self.secure = secure
        self.user = ""
        self.starting_tls = False
        self.claim: sasl.Claim | None = None
        self._exchange: sasl.Exchange | None = None
        self.wrong_logins = 0
        self.parser = self._parser()
        self.helo = ""
        self.extended = False
        self.errors = 0
        self.closing = False
        self.foreign = False
        self.behind = False
        self.stopped = False
        self.transaction: Transaction | None = None
        self.complete: Transaction | None = None
        self.taking_data = False  # between 354 (or BDAT) and the end of message data
        self.last_chunk = False
        self.discarding = False
        self.refusal = b""  # the reply to a message or chunk that was refused before its end

    def _parser(self) -> Parser:
        limit = LOGIN_LINE_LIMIT if self.offers.mechanisms else LINE_LIMIT
        return Parser(limit, DATA_LINE_LIMIT, self.limits.normalize)

    def greet(self) -> bytes:
        """The 220 greeting, for which a client has to wait (RFC 5321 3.1); from now on commands are parsed."""
        self.parser.commands()
        return f"220 {self.hostname} ESMTP relaymta\r\n".encode()

    def receive(self, data: bytes) -> bytes:
        """Take octets from the client; returns the octets to write."""
        if self.closing:
            return b""
        if self.stopped:
            self.parser.keep(data)
            return b""
        self.behind = False
        out: list[bytes] = []
        events = self.parser.feed(data)
        while True:
            for event in events:
                kind = event[0]
                if kind == DATA:
                    self._received(event[1])  # type: ignore[misc, arg-type]
                elif kind == COMMAND:
                    out.append(_VERBS.get(event[1], _unknown)(self, event[2]))  # type: ignore[misc, arg-type]
                elif kind == END:
                    out.append(self._ended())
                else:
                    out.append(self._bad_line(event[1], event[2]))  # type: ignore[misc, arg-type]
                if self.closing:
                    return b"".join(out)
            if not events or not self.parser.runnable():
                return b"".join(out) if len(out) != 1 else out[0]
            if len(out) >= ENOUGH:
                self.behind = True
                return b"".join(out)
            events = self.parser.feed(b"")

    def finish(self, answer: bytes) -> bytes:
        """The complete message was stored or refused. Returns `answer` and the replies to what has arrived meanwhile."""
        if not answer.startswith(b"2") and self.complete is not None:
            self.refused(self.complete, answer)
        self.complete = None
        self._drop()
        self.parser.commands()
        if self.parser.waiting():
            return answer + self.receive(b"")
        return answer

    def limit(self, limits: Limits) -> None:
        """Apply other limits from now on, after XCLIENT or AUTH."""
        self.limits = limits
        self.parser.normalize = limits.normalize

    def refuse(self, answer: bytes) -> None:
        """Reply `answer` at the end of the message under way; its data is dropped from now on."""
        self.refusal = answer
        self.discarding = True
        if self.transaction is not None:
            self.transaction.data.clear()

    def tls_started(self) -> None:
        """The TLS handshake is done: the session starts anew (RFC 3207 4.2)."""
        self.secure, self.starting_tls = True, False
        self.helo, self.extended, self.user = "", False, ""
        self._drop()
        self.parser = self._parser()
        self.parser.commands()

    def checked(self, user: str, answer: bytes) -> bytes:
        """The claim was verified: `user` is authenticated ("": the login failed, with the reply `answer`). Returns what to write,
        with the replies to what has arrived meanwhile."""
        claim, self.claim = self.claim, None
        if user:
            self.user = user
            if isinstance(claim, sasl.Proof) and claim.final:  # RFC 4954 4: the server's proof, an empty response, and then 235
                self._exchange = _proved()
                next(self._exchange)
                return self._challenge(claim.final) + self._waiting()
        elif answer.startswith(b"5"):
            self.wrong_logins += 1
            if isinstance(claim, sasl.Token):  # RFC 7628 3.2.3: the client responds to the reason, and then gets 535
                self._exchange = _token_refused()
                next(self._exchange)
                self.parser.line()
                return b"334 " + b64encode(b'{"status":"invalid_token","schemes":"bearer"}') + b"\r\n" + self._waiting()
            answer = self._wrong_login(answer)
        else:  # temporarily rejected attempts count as errors too: each costs a check of the limits and a line in the log
            answer = self._error(answer)
        if self.closing:
            return answer
        self.parser.commands()
        return answer + self._waiting()

    def _wrong_login(self, answer: bytes) -> bytes:
        if self.wrong_logins < WRONG_LOGINS:
            return self._error(answer)
        self.closing = True
        return answer + reply.TOO_MANY_WRONG

    def _waiting(self) -> bytes:
        return self.receive(b"") if self.parser.waiting() else b""

    def _bad_line(self, why: int, start: bytes) -> bytes:
        if self._exchange is not None:
            self._exchange = None
            self.closing = bool(self.user)
            self.parser.commands()
        elif why == _FOREIGN or _OTHERS.match(start):
            return self._reject_protocol()
        return self._error(_BAD_LINES[why])

    def _reject_protocol(self) -> bytes:
        """The client speaks another protocol: close before SMTP commands within it are reached (cross-protocol attack)."""
        self.closing = self.foreign = True
        return reply.NOT_SMTP

    def _error(self, answer: bytes) -> bytes:
        self.errors += 1
        if self.errors >= self.limits.errors:
            self.closing = True
            return answer + reply.TOO_MANY_ERRORS
        return answer

    def _received(self, data: bytes) -> None:
        transaction = self.transaction
        if transaction is None or self.discarding:
            return
        if transaction.size + len(data) > self.limits.message_size:
            self.refuse(reply.TOO_BIG)
            return
        transaction.size += len(data)
        transaction.data.append(data)
        if len(transaction.data) > PIECES:
            transaction.data = [b"".join(transaction.data)]
        if transaction.chunked:
            transaction.tail = (transaction.tail + data[-2:])[-2:]

    def _ended(self) -> bytes:
        """The message data, or one chunk of it, is complete."""
        transaction = self.transaction
        if transaction is None or (transaction.chunked and not self.last_chunk):
            return self._chunk_ended()
        self.taking_data = False
        answer = self._verdict(transaction)
        self.discarding = False
        self.refusal = b""
        if answer is not None:
            self.refused(transaction, answer)
            self._drop()
            self.parser.commands()
            return self._error(answer) if answer.startswith(b"5") else answer
        flags = self.parser.flags
        transaction.eight_bit = bool(flags & EIGHT_BIT)
        self.complete = transaction
        return b""

    def _chunk_ended(self) -> bytes:
        self.parser.commands()
        if self.refusal and self.transaction is None:
            answer = self.refusal
            self._drop()
            return self._error(answer)
        return reply.RESET

    def _verdict(self, transaction: Transaction) -> bytes | None:
        """The reply that refuses the message data that just ended, or None."""
        flags = self.parser.flags
        if self.refusal:
            return self.refusal
        if transaction.tail.endswith(b"\r"):
            flags |= BARE_CR
        normalize = self.parser.normalize  # as it was while this data was parsed
        repaired = normalize and not transaction.chunked
        if flags & BARE_LF and not repaired:
            return reply.BARE_LF
        if flags & BARE_CR and not repaired:
            return reply.BARE_CR
        if flags & NUL and not normalize:
            return reply.NUL_IN_DATA
        if flags & LONG_LINE and not self.limits.long_lines:
            return reply.LONG_LINE
        return None

    # One method per verb: checks first, then actions.

    def _ehlo(self, argument: bytes) -> bytes:
        helo = _hello_name(argument)
        if helo is None:
            return self._error(reply.BAD_HELLO)
        self.helo, self.extended = helo, True
        self._drop()
        lines = [self.hostname, "PIPELINING", f"SIZE {self.limits.message_size}", "8BITMIME", "SMTPUTF8", "CHUNKING"]
        offers = self.offers
        if offers.starttls and not self.secure:
            lines.append("STARTTLS")
        if offers.assume is not None:
            lines.append("XCLIENT " + " ".join(_XCLIENT))
        if offers.mechanisms and not self.user and (self.secure or offers.clear):
            lines.append("AUTH " + " ".join(offers.mechanisms))
        return "".join(f"250-{line}\r\n" for line in lines).encode() + b"250 ENHANCEDSTATUSCODES\r\n"

    def _helo(self, argument: bytes) -> bytes:
        helo = _hello_name(argument)
        if helo is None:
            return self._error(reply.BAD_HELLO)
        self.helo, self.extended = helo, False
        self._drop()
        return f"250 {self.hostname}\r\n".encode()

    def _mail(self, argument: bytes) -> bytes:
        if not self.helo:
            return self._error(reply.NEED_HELLO)
        if self.transaction is not None:
            return self._error(reply.NESTED_MAIL)
        if self.offers.tls_needed and not self.secure:
            return self._error(reply.NEED_TLS if self.offers.starttls else reply.TLS_UNAVAILABLE)
        if self.offers.login_needed and not self.user:
            return self._error(reply.NEED_LOGIN)
        found = mail_argument(argument)
        if found is None:
            return self._error(reply.BAD_SENDER)
        sender, parameters = found
        size, smtputf8 = 0, False
        if parameters:
            checked = _mail_parameters(parameters, bool(self.offers.mechanisms))
            if isinstance(checked, bytes):
                return self._error(checked)
            size, smtputf8 = checked
        if size > self.limits.message_size:
            return self._error(reply.TOO_BIG)
        if not smtputf8 and not sender.isascii():
            return self._error(reply.NEEDS_SMTPUTF8)
        refused = self.accept_sender(sender, size)
        if refused is not None:
            return self._error(refused) if refused.startswith(b"5") else refused
        self.transaction = Transaction(sender, smtputf8)
        return reply.SENDER_OK

    def _rcpt(self, argument: bytes) -> bytes:
        transaction = self.transaction
        if transaction is None:
            return self._error(reply.NEED_SENDER)
        if transaction.chunked:
            return self._error(reply.IN_CHUNKS)
        found = rcpt_argument(argument)
        if found is None:
            return self._error(reply.BAD_RECIPIENT)
        address, parameters = found
        if parameters:
            return self._error(reply.BAD_PARAMETER if parse_parameters(parameters) is None else reply.UNKNOWN_PARAMETER)
        if not transaction.smtputf8 and not address.isascii():
            return self._error(reply.NEEDS_SMTPUTF8)
        if len(transaction.recipients) >= self.limits.recipients:
            return reply.TOO_MANY_RECIPIENTS
        refused = self.accept_recipient(address, transaction)
        if refused is not None:
            return self._error(refused) if refused.startswith(b"5") else refused
        transaction.recipients.append(address)
        return reply.RECIPIENT_OK

    def _data(self, argument: bytes) -> bytes:
        transaction = self.transaction
        refused = None
        if argument.strip():
            refused = reply.BAD_ARGUMENT
        elif transaction is None:
            refused = reply.NEED_SENDER
        elif transaction.chunked:
            refused = reply.IN_CHUNKS
        elif not transaction.recipients:
            refused = reply.NEED_RECIPIENT
        if refused is not None:
            self.parser.commands()
            return self._error(refused)
        if self.parser.waiting():
            self.closing = True
            return reply.TALKING_EARLY
        self.taking_data = True
        self.parser.data()
        return reply.GO_AHEAD

    def _bdat(self, argument: bytes) -> bytes:
        words = argument.upper().split()
        if not words or not words[0].isdigit() or len(words[0]) > 15 or (len(words) > 1 and words[1:] != [b"LAST"]):
            # How many octets follow is unknown, so what follows cannot be read.
            self.closing = True
            return reply.BAD_ARGUMENT
        transaction = self.transaction
        octets, self.last_chunk = int(words[0]), len(words) > 1
        if transaction is None or not transaction.recipients:
            self._drop()
            self.refuse(reply.NEED_SENDER if transaction is None else reply.NEED_RECIPIENT)
            self.taking_data = True
            self.parser.chunk(octets, True)
            return b""
        first = not transaction.chunked
        transaction.chunked = True
        self.taking_data = True
        self.parser.chunk(octets, first)
        return b""

    def _rset(self, argument: bytes) -> bytes:
        if argument.strip():
            return self._error(reply.BAD_ARGUMENT)
        self._drop()
        return reply.RESET

    def _drop(self) -> None:
        """End the transaction under way, if there is one: none of its state remains for the next."""
        self.taking_data = self.discarding = self.last_chunk = False
        self.refusal = b""
        if self.transaction is not None:
            self.transaction = None
            self.ended()

    def _quit(self, argument: bytes) -> bytes:
        self.closing = True
        return reply.BYE

    def _noop(self, argument: bytes) -> bytes:
        return reply.NOOP

    def _vrfy(self, argument: bytes) -> bytes:
        return reply.VERIFY if argument.strip() else self._error(reply.BAD_ARGUMENT)

    def _help(self, argument: bytes) -> bytes:
        return reply.HELP

    def _starttls(self, argument: bytes) -> bytes:
        refused = None
        if not self.offers.starttls:
            refused = reply.NOT_IMPLEMENTED
        elif argument:
            refused = reply.BAD_ARGUMENT
        elif self.secure:
            refused = reply.HAS_TLS
        if refused is not None:
            self.parser.commands()
            return self._error(refused)
        if self.parser.waiting():  # command injection: sent in the clear, to be processed as if it came by TLS
            self.closing = True
            return reply.TALKING_EARLY
        self._drop()
        self.starting_tls = True
        return reply.START_TLS

    def _xclient(self, argument: bytes) -> bytes:
        """https://www.postfix.org/XCLIENT_README.html"""
        refused = None
        attributes = _attributes(argument)
        assert self.offers.assume is not None
        if self.transaction is not None:
            refused = reply.NOT_IN_TRANSACTION
        elif attributes is None:
            refused = reply.BAD_ARGUMENT
        else:
            refused = self.offers.assume(attributes)
        if refused is not None or attributes is None:
            self.parser.commands()
            return self._error(refused or reply.BAD_ARGUMENT)
        self.helo = attributes.get("HELO", "")
        self.extended = attributes.get("PROTO", "") in ("", "ESMTP") and bool(self.helo)
        self.errors = self.wrong_logins = 0
        return self.greet()

    def _auth(self, argument: bytes) -> bytes:
        words = argument.split()
        refused = None
        if not self.offers.mechanisms:
            refused = reply.NOT_IMPLEMENTED
        elif not self.helo:
            refused = reply.NEED_HELLO
        elif not (self.secure or self.offers.clear):
            refused = reply.TLS_FOR_LOGIN
        elif self.user:
            refused = reply.LOGGED_IN_ALREADY
        elif self.transaction is not None:
            refused = reply.NOT_IN_TRANSACTION
        elif not 1 <= len(words) <= 2:
            refused = reply.BAD_ARGUMENT
        elif words[0].upper().decode("ascii", "replace") not in self.offers.mechanisms:
            refused = reply.NO_SUCH_MECHANISM
        if refused is not None:
            self.parser.commands()
            return self._error(refused)
        self._exchange, challenge = sasl.begin(words[0].upper().decode(), self.offers.keys)
        if len(words) == 2:
            return self._responded(b"" if words[1] == b"=" else words[1])
        return self._challenge(challenge or b"")

    def _challenge(self, challenge: bytes) -> bytes:
        self.parser.line()
        return b"334 " + b64encode(challenge) + b"\r\n"

    def _responded(self, line: bytes) -> bytes:
        """The client's response in an AUTH exchange, in base64 (RFC 4954 4)."""
        exchange = self._exchange
        assert exchange is not None
        refused = reply.LOGIN_CANCELLED
        if line != b"*":
            try:
                return self._challenge(exchange.send(b64decode(line, validate=True)))
            except StopIteration as end:
                self._exchange = None
                self.claim = end.value
                return b""
            except binascii.Error:
                refused = reply.NOT_BASE64
            except sasl.Malformed:
                refused = reply.BAD_RESPONSE
            except _TokenRefused:
                refused = reply.WRONG_CREDENTIALS
            except _ProofTaken:
                self._exchange = None
                self.parser.commands()
                return reply.LOGGED_IN
        if self.user:  # the client rejects our proof: it must not go on as authenticated
            self.closing = True
        self._exchange = None
        self.parser.commands()
        return self._wrong_login(refused) if refused is reply.WRONG_CREDENTIALS else self._error(refused)


class _TokenRefused(Exception):
    """The client has responded to the reason why its token is refused."""


def _token_refused() -> sasl.Exchange:
    yield b""
    raise _TokenRefused


class _ProofTaken(Exception):
    """The client has accepted the server's proof."""


def _proved() -> sasl.Exchange:
    if (yield b""):
        raise sasl.Malformed("expected an empty response to the server's proof")
    raise _ProofTaken


def _unknown(session: ServerSession, argument: bytes) -> bytes:
    """An unknown verb of four letters."""
    return session._error(reply.UNKNOWN_COMMAND)


def _other(session: ServerSession, argument: bytes) -> bytes:
    """A word that is not of four letters, or a response in an AUTH exchange: the parser holds after it."""
    if session._exchange is not None:
        return session._responded(argument.strip())
    word, _, rest = argument.partition(b" ")
    if word.upper() == b"STARTTLS":
        return session._starttls(rest.strip())
    if word.upper() == b"XCLIENT" and session.offers.assume is not None:
        return session._xclient(rest.strip())
    session.parser.commands()
    if _OTHERS.match(argument):
        return session._reject_protocol()
    return session._error(reply.UNKNOWN_COMMAND)


def _alien(session: ServerSession, argument: bytes) -> bytes:
    """A word of four letters of another protocol."""
    return session._reject_protocol()


def _hello_name(argument: bytes) -> str | None:
    """The client's name in EHLO/HELO; None when it is missing or unprintable."""
    name = argument.strip()
    if not name or len(name) > 255 or b" " in name:
        return None
    text = name.decode("utf-8", "replace")
    return text if text.isprintable() else None


def _attributes(argument: bytes) -> dict[str, str] | None:
    """XCLIENT's attributes, "" for unavailable ones; None: a syntax error."""
    found = {}
    for word in argument.split():
        name, equals, value = word.decode("utf-8", "replace").partition("=")
        if not equals or name.upper() not in _XCLIENT:
            return None
        known = value.upper() not in ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
        text = _XTEXT.sub(lambda match: chr(int(match[1], 16)), value) if known else ""
        if not text.isprintable():
            return None
        found[name.upper()] = text
    return found if argument else None


def _mail_parameters(text: str, auth: bool) -> tuple[int, bool] | bytes:
    """(announced size, SMTPUTF8) of MAIL's parameters, or the reply that refuses them. `auth`: AUTH is offered."""
    found = parse_parameters(text)
    if found is None:
        return reply.BAD_PARAMETER
    size, smtputf8 = 0, False
    for keyword, value in found.items():
        if keyword == "SIZE" and value.isascii() and value.isdigit() and len(value) <= 20:
            size = int(value)
        elif keyword == "BODY" and value.upper() in ("7BIT", "8BITMIME"):
            pass
        elif keyword == "SMTPUTF8" and not value:
            smtputf8 = True
        elif keyword == "AUTH" and auth and value:
            pass  # the original submitter (RFC 4954 5): ignored, since clients are not trusted with it
        elif keyword in ("SIZE", "BODY", "SMTPUTF8"):
            return reply.BAD_PARAMETER
        else:
            return reply.UNKNOWN_PARAMETER
    return size, smtputf8


def _verb(word: bytes) -> int:
    return int.from_bytes(word, "big")


_VERBS: dict[int, Callable[[ServerSession, bytes], bytes]] = {
    _verb(b"EHLO"): ServerSession._ehlo,
    _verb(b"HELO"): ServerSession._helo,
    _verb(b"MAIL"): ServerSession._mail,
    _verb(b"RCPT"): ServerSession._rcpt,
    _verb(b"DATA"): ServerSession._data,
    _verb(b"BDAT"): ServerSession._bdat,
    _verb(b"RSET"): ServerSession._rset,
    _verb(b"NOOP"): ServerSession._noop,
    _verb(b"VRFY"): ServerSession._vrfy,
    _verb(b"HELP"): ServerSession._help,
    _verb(b"QUIT"): ServerSession._quit,
    _verb(b"AUTH"): ServerSession._auth,
    0: _other,
    **{_verb(word): _alien for word in (b"HEAD", b"POST", b"COPY", b"MOVE", b"LOCK")},
}
