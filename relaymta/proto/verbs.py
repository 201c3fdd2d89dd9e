"""The commands of an SMTP session, one function each: checks first, then actions. It returns the reply."""

import re
from collections.abc import Callable

from relaymta.proto import reply
from relaymta.proto.address import mail_argument, parse_parameters, rcpt_argument
from relaymta.proto.arguments import XCLIENT, XFORWARD, attributes, forwarded, hello_name, mail_parameters
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.session import DATA, TLS, Question, Session

__all__ = ["OTHERS", "VERBS", "unknown"]

# How lines of other protocols begin: a request of HTTP, WebDAV or HTTP/2, a field of a header, the banner of SSH, the header of a
# load balancer that is not configured (listener.proxy).
OTHERS = re.compile(
    rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PRI|COPY|MOVE|LOCK|UNLOCK|MKCOL|PROPFIND|PROPPATCH|REPORT|SEARCH"
    rb"|PROXY)(?![!-~])|[!-9;-~]+:|SSH-",
    re.I,
)


def _hello(session: Session, argument: bytes, extended: bool) -> bool:
    """The client has said its name, which ends a transaction under way; False, and nothing has changed, when it is none."""
    helo = hello_name(argument, session.host.limits.lenient)
    if helo is None:
        return False
    session.helo, session.extended = helo, extended
    session.drop()
    return True


def _ehlo(session: Session, argument: bytes) -> bytes:
    if session.host.offers.lmtp:
        return session.error(reply.UNKNOWN_COMMAND)
    return _extended_hello(session, argument)


def _lhlo(session: Session, argument: bytes) -> bytes:
    """RFC 2033 4.1"""
    if not session.host.offers.lmtp:
        return session.error(reply.UNKNOWN_COMMAND)
    return _extended_hello(session, argument)


def _extended_hello(session: Session, argument: bytes) -> bytes:
    if not _hello(session, argument, True):
        return session.error(reply.BAD_HELLO)
    host, offers = session.host, session.host.offers
    lines = [session.hostname, "PIPELINING", f"SIZE {host.limits.message_size}", "8BITMIME", "SMTPUTF8", "CHUNKING"]
    if offers.starttls and not session.secure:
        lines.append("STARTTLS")
    if offers.xclient:
        lines.append("XCLIENT " + " ".join(XCLIENT))
    if offers.xforward:
        lines.append("XFORWARD " + " ".join(XFORWARD))
    if offers.mechanisms and not host.user and (session.secure or offers.clear):
        lines.append("AUTH " + " ".join(offers.mechanisms))
    answer = ("250-" + "\r\n250-".join(lines) + "\r\n250 ENHANCEDSTATUSCODES\r\n").encode()
    return session.ask(Question("HELO", accepted=answer)) if "HELO" in host.asks_client else answer


def _helo(session: Session, argument: bytes) -> bytes:
    if session.host.offers.lmtp:
        return session.error(reply.UNKNOWN_COMMAND)
    if not _hello(session, argument, False):
        return session.error(reply.BAD_HELLO)
    answer = f"250 {session.hostname}\r\n".encode()
    return session.ask(Question("HELO", accepted=answer)) if "HELO" in session.host.asks_client else answer


def _mail(session: Session, argument: bytes) -> bytes:
    host, offers = session.host, session.host.offers
    if not session.helo:
        return session.error(reply.NEED_LHLO if offers.lmtp else reply.NEED_HELLO)
    if session.transaction is not None:
        return session.error(reply.NESTED_MAIL)
    if offers.tls_needed and not session.secure:
        return session.error(reply.NEED_TLS if offers.starttls else reply.TLS_UNAVAILABLE)
    if offers.login_needed and not host.user:
        return session.error(reply.NEED_LOGIN)
    found = mail_argument(argument, host.domain)
    if found is None:
        return session.error(reply.BAD_SENDER)
    sender, parameters = found
    size, smtputf8 = 0, False
    if parameters:
        checked = mail_parameters(parameters)
        if isinstance(checked, bytes):
            return session.error(checked)
        size, smtputf8 = checked
    if size > host.limits.message_size:
        return session.error(reply.TOO_BIG)
    if not smtputf8 and not sender.isascii():
        return session.error(reply.NEEDS_SMTPUTF8)
    begun = host.begin(session, sender, size, smtputf8)
    if isinstance(begun, bytes):
        return session.error_if_5xx(begun)
    session.transaction = begun
    begun.announced = size
    begun.parameters = parameters
    begun.forwarded = session.forwarded
    if "MAIL" in begun.asks:
        return session.ask(Question("MAIL", "", tuple(parameters.split())))
    return reply.SENDER_OK


def _rcpt(session: Session, argument: bytes) -> bytes:
    transaction = session.transaction
    if transaction is None:
        return session.error(reply.NEED_SENDER)
    if transaction.chunked:
        return session.error(reply.IN_CHUNKS)
    found = rcpt_argument(argument, session.host.domain)
    if found is None:
        return session.error(reply.BAD_RECIPIENT)
    address, parameters = found
    if parameters:
        return session.error(reply.BAD_PARAMETER if parse_parameters(parameters) is None else reply.UNKNOWN_PARAMETER)
    if not transaction.smtputf8 and not address.isascii():
        return session.error(reply.NEEDS_SMTPUTF8)
    if len(transaction.recipients) >= transaction.limits.recipients:
        return reply.TOO_MANY_RECIPIENTS
    if session.host.domain and address.endswith(session.host.domain):
        transaction.named(address, rcpt_argument(argument) is None)
    refused = transaction.accept(address)
    if refused is not None:
        transaction.rejects(address, refused)
        return refused if isinstance(refused, reply.Blameless) else session.error_if_5xx(refused)
    if "RCPT" in transaction.asks:
        return session.ask(Question("RCPT", address))
    transaction.recipients.append(address)
    return reply.RECIPIENT_OK


def _no_recipient(session: Session) -> bytes:
    """The reply to DATA, or to a chunk, without recipients (RFC 2033 4.2)."""
    return reply.NEED_RECIPIENT_LMTP if session.host.offers.lmtp else reply.NEED_RECIPIENT


def _data(session: Session, argument: bytes) -> bytes:
    transaction = session.transaction
    refused = None
    if argument.strip():
        refused = reply.BAD_ARGUMENT
    elif transaction is None:
        refused = reply.NEED_SENDER
    elif transaction.chunked:
        refused = reply.IN_CHUNKS
    elif not transaction.recipients:
        refused = _no_recipient(session)
    if refused is not None or transaction is None:
        session.parser.commands()
        return session.error(refused or reply.NEED_SENDER)
    if session.parser.waiting():
        session.close()
        return reply.TALKING_EARLY
    if "DATA" in transaction.asks and not transaction.cleared:
        return session.ask(Question("DATA", again=(0, _verb(b"DATA"), argument)))
    session.state = DATA
    session.parser.normalize = transaction.limits.normalize
    session.parser.data()
    return reply.GO_AHEAD


def _bdat(session: Session, argument: bytes) -> bytes:
    words = argument.upper().split()
    if not words or not words[0].isdigit() or len(words[0]) > 15 or (len(words) > 1 and words[1:] != [b"LAST"]):
        # How many octets follow is unknown, so what follows cannot be read.
        session.close()
        return reply.BAD_ARGUMENT
    transaction, octets = session.transaction, int(words[0])
    if transaction is None or not transaction.recipients:
        refused = session.refusal or (reply.NEED_SENDER if transaction is None else _no_recipient(session))
        session.drop()
        session.refusal = refused
        session.state = DATA
        session.parser.chunk(octets, True)
        return b""
    if "DATA" in transaction.asks and not transaction.cleared:
        return session.ask(Question("DATA", "", tuple(word.decode() for word in words), (0, _verb(b"BDAT"), argument)))
    first = not transaction.chunked
    transaction.chunked, transaction.last_chunk = True, len(words) > 1
    session.state = DATA
    session.parser.normalize = transaction.limits.normalize
    session.parser.chunk(octets, first)
    return b""


def _rset(session: Session, argument: bytes) -> bytes:
    if argument.strip():
        return session.error(reply.BAD_ARGUMENT)
    session.drop()
    return reply.RESET


def _quit(session: Session, argument: bytes) -> bytes:
    session.parting = True
    session.close()
    return reply.BYE


def _noop(session: Session, argument: bytes) -> bytes:
    return reply.NOOP


def _vrfy(session: Session, argument: bytes) -> bytes:
    return reply.VERIFY if argument.strip() else session.error(reply.BAD_ARGUMENT)


def _help(session: Session, argument: bytes) -> bytes:
    return reply.HELP_LMTP if session.host.offers.lmtp else reply.HELP


def _starttls(session: Session, argument: bytes) -> bytes:
    refused = None
    if not session.host.offers.starttls:
        refused = reply.NOT_IMPLEMENTED
    elif argument:
        refused = reply.BAD_ARGUMENT
    elif session.secure:
        refused = reply.HAS_TLS
    if refused is not None:
        session.parser.commands()
        return session.error(refused)
    if session.parser.waiting():  # command injection: sent in the clear, to be processed as if it came by TLS
        session.close()
        return reply.TALKING_EARLY
    session.drop()
    session.state = TLS
    return reply.START_TLS


def _xclient(session: Session, argument: bytes) -> bytes:
    """https://www.postfix.org/XCLIENT_README.html"""
    found = attributes(argument)
    if session.transaction is not None:
        refused: bytes | None = reply.NOT_IN_TRANSACTION
    elif found is None:
        refused = reply.BAD_ARGUMENT
    else:
        refused = session.host.assume(found)
        if not session.host.user or found.get("LOGIN"):
            session.mechanism = ""
    if refused is not None or found is None:
        session.parser.commands()
        if refused is not None and refused.startswith(b"4"):
            session.close()
        return session.error(refused or reply.BAD_ARGUMENT)
    session.drop()  # what XFORWARD has said was about mail of the client before
    session.helo = found.get("HELO", "")
    session.extended = found.get("PROTO", "") in ("", "ESMTP") and bool(session.helo)
    session.errors = session.wrong_logins = 0
    return session.greet()


def _xforward(session: Session, argument: bytes) -> bytes:
    """https://www.postfix.org/XFORWARD_README.html: what is said holds for the next transaction; what several commands say is
    put together."""
    session.parser.commands()
    if session.transaction is not None:
        return session.error(reply.NOT_IN_TRANSACTION)
    found = forwarded(argument)
    if found is None:
        return session.error(reply.BAD_ARGUMENT)
    session.forwarded = session.forwarded | found
    return reply.RESET


def _auth(session: Session, argument: bytes) -> bytes:
    words, offers = argument.split(), session.host.offers
    refused = None
    if not offers.mechanisms:
        refused = reply.NOT_IMPLEMENTED
    elif not session.helo:
        refused = reply.NEED_LHLO if offers.lmtp else reply.NEED_HELLO
    elif not (session.secure or offers.clear):
        refused = reply.TLS_FOR_LOGIN
    elif session.host.user:
        refused = reply.LOGGED_IN_ALREADY
    elif session.transaction is not None:
        refused = reply.NOT_IN_TRANSACTION
    elif not 1 <= len(words) <= 2:
        refused = reply.BAD_ARGUMENT
    elif words[0].upper().decode("ascii", "replace") not in offers.mechanisms:
        refused = reply.NO_SUCH_MECHANISM
    if refused is not None:
        session.parser.commands()
        return session.error(refused)
    session.exchange = AuthExchange(words[0].upper().decode(), session.host.keys)
    return session.exchanged(session.exchange.begin(words[1:]))


def unknown(session: Session, argument: bytes) -> bytes:
    """An unknown verb of four letters."""
    return session.error(reply.UNKNOWN_COMMAND)


def _other(session: Session, argument: bytes) -> bytes:
    """A word that is not of four letters, or a response in an AUTH exchange: the parser holds after it."""
    if session.exchange is not None:
        return session.exchanged(session.exchange.respond(argument.strip()))
    word, _, rest = argument.partition(b" ")
    if word.upper() == b"STARTTLS":
        return _starttls(session, rest.strip())
    if word.upper() == b"XCLIENT" and session.host.offers.xclient:
        return _xclient(session, rest.strip())
    if word.upper() == b"XFORWARD" and session.host.offers.xforward:
        return _xforward(session, rest.strip())
    if OTHERS.match(argument):
        return session.reject_protocol()
    if argument[4:5] == b"\t":  # as Postfix: a tab is as good as a blank
        verb = _verb(argument[:4].upper())
        if verb not in _HOLDING:
            session.parser.commands()
        return VERBS.get(verb, unknown)(session, argument[5:])
    session.parser.commands()
    return session.error(reply.UNKNOWN_COMMAND)


def _alien(session: Session, argument: bytes) -> bytes:
    """A word of four letters of another protocol."""
    return session.reject_protocol()


def _verb(word: bytes) -> int:
    return int.from_bytes(word, "big")


_HOLDING = {_verb(word) for word in (b"DATA", b"BDAT", b"AUTH")}  # what follows them may be no commands

VERBS: dict[int, Callable[[Session, bytes], bytes]] = {
    _verb(b"EHLO"): _ehlo,
    _verb(b"LHLO"): _lhlo,
    _verb(b"HELO"): _helo,
    _verb(b"MAIL"): _mail,
    _verb(b"RCPT"): _rcpt,
    _verb(b"DATA"): _data,
    _verb(b"BDAT"): _bdat,
    _verb(b"RSET"): _rset,
    _verb(b"NOOP"): _noop,
    _verb(b"VRFY"): _vrfy,
    _verb(b"HELP"): _help,
    _verb(b"QUIT"): _quit,
    _verb(b"AUTH"): _auth,
    0: _other,
    **{_verb(word): _alien for word in (b"HEAD", b"POST", b"COPY", b"MOVE", b"LOCK")},
}
