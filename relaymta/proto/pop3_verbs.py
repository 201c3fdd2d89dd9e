"""The commands of a POP3 session, one function each: checks first, then actions. It returns the reply, b"" where that follows
later."""

from collections.abc import Callable
from typing import Final, NamedTuple

from relaymta.proto import pop3_reply as reply
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.pop3_maildrop import Maildrop, Wanted
from relaymta.proto.pop3_session import COMMITTING, SENDING, TLS, Session, counted, described
from relaymta.proto.sasl import Password

__all__ = ["VERBS", "Verb"]

# In which states of RFC 1939 a command is allowed.
AUTHORIZATION: Final = 1
TRANSACTION: Final = 2
BOTH: Final = 3

DIGITS = 10  # of a number


class Verb(NamedTuple):
    """A command: its function, the states in which it is allowed, how many arguments it has at least and at most; `whole`: its
    argument is the rest of the line, in UTF-8."""

    run: Callable[[Session, list[bytes]], bytes]
    states: int
    least: int = 0
    most: int = 0
    whole: bool = False

    def refusal(self, session: Session, arguments: list[bytes]) -> bytes | None:
        """The reply to the command in a state that does not allow it, or with too many or too few arguments."""
        if session.maildrop is None and not self.states & AUTHORIZATION:
            return reply.NOT_LOGGED_IN
        if session.maildrop is not None and not self.states & TRANSACTION:
            return reply.LOGGED_IN_ALREADY
        if len(arguments) < self.least:
            return reply.MISSING_ARGUMENT
        return reply.TOO_MANY_ARGUMENTS if len(arguments) > self.most else None


# AUTHORIZATION


def _login_refusal(session: Session) -> bytes | None:
    """The reply to a login that is not allowed on this connection."""
    if not session.offers.mechanisms:
        return reply.NO_LOGINS
    if session.may_log_in:
        return None
    return reply.TLS_FOR_LOGIN if session.offers.starttls else reply.TLS_UNAVAILABLE


def _by_password(session: Session) -> bool:
    """Whether USER and PASS are offered: they make the claim that PLAIN does."""
    return session.may_log_in and "PLAIN" in session.offers.mechanisms


def _text(octets: bytes) -> str | None:
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _user(session: Session, arguments: list[bytes]) -> bytes:
    session.name = None
    refused = _login_refusal(session)
    name = _text(arguments[0].strip())
    if refused is None and not _by_password(session):
        refused = reply.NO_PASSWORDS
    if refused is None and name is None:
        refused = reply.NOT_UTF8
    if refused is not None:
        return session.error(refused)
    session.name = name
    return reply.SEND_PASSWORD


def _pass(session: Session, arguments: list[bytes]) -> bytes:
    name, session.name = session.name, None
    password = _text(arguments[0])
    refused = _login_refusal(session)
    if refused is None and name is None:
        refused = reply.NEED_USER
    if refused is None and password is None:
        refused = reply.NOT_UTF8
    if refused is not None or name is None or password is None:
        return session.error(refused or reply.NEED_USER)
    return session.exchanged(Password(name, password))


def _auth(session: Session, arguments: list[bytes]) -> bytes:
    session.name = None
    mechanism = arguments[0].upper().decode()
    refused = _login_refusal(session)
    if refused is None and mechanism not in session.offers.mechanisms:
        refused = reply.NO_SUCH_MECHANISM
    if refused is not None:
        return session.error(refused)
    session.exchange = AuthExchange(mechanism, session.keys)
    return session.exchanged(session.exchange.begin(arguments[1:]))


def _stls(session: Session, arguments: list[bytes]) -> bytes:
    if session.secure:
        return session.error(reply.HAS_TLS)
    if not session.offers.starttls:
        return session.error(reply.NO_TLS)
    if session.waiting():  # command injection: sent in the clear, to be processed as if it came by TLS
        session.close()
        return reply.TALKING_EARLY
    session.wait(TLS)
    return reply.START_TLS


def _utf8(session: Session, arguments: list[bytes]) -> bytes:
    session.utf8 = True
    return reply.UTF8_ENABLED


# Both


def _capa(session: Session, arguments: list[bytes]) -> bytes:
    """RFC 2449 5: what is offered here before a login is listed after it too, except STLS, which RFC 2595 4 lists where it is
    permitted."""
    lines = ["+OK Capability list follows", "TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "EXPIRE NEVER"]
    if session.may_log_in:
        lines.append("SASL " + " ".join(session.offers.mechanisms))
    if _by_password(session):
        lines.append("USER")
    if session.offers.starttls and not session.secure and session.maildrop is None:
        lines.append("STLS")
    lines += ["UTF8 USER" if _by_password(session) else "UTF8", "IMPLEMENTATION relaymta", ".", ""]
    return "\r\n".join(lines).encode()


def _quit(session: Session, arguments: list[bytes]) -> bytes:
    session.parting = True
    if session.maildrop is None:
        session.close()
        return reply.BYE
    return session.wait(COMMITTING)


# TRANSACTION


def _maildrop(session: Session) -> Maildrop:
    assert session.maildrop is not None  # Verb.refusal
    return session.maildrop


def _number(maildrop: Maildrop, argument: bytes) -> int | bytes:
    """A message number, or the reply to one that names no message, which is no error of syntax: others may have told the client
    of it."""
    if not argument.isdigit():
        return reply.BAD_ARGUMENT
    number = int(argument) if len(argument) <= DIGITS else 0
    if not 1 <= number <= len(maildrop):
        return reply.err(f"No such message; there are {len(maildrop)}")
    return reply.err(f"Message {number} has been deleted") if maildrop.marked(number) else number


def _refused(session: Session, answer: bytes) -> bytes:
    return session.error(answer) if answer is reply.BAD_ARGUMENT else answer


def _stat(session: Session, arguments: list[bytes]) -> bytes:
    maildrop = _maildrop(session)
    return reply.ok(f"{maildrop.count} {maildrop.octets}")


def _list(session: Session, arguments: list[bytes]) -> bytes:
    maildrop = _maildrop(session)
    if not arguments:
        session.listing = maildrop.scan_listings()
        return reply.ok(described(maildrop))
    number = _number(maildrop, arguments[0])
    if isinstance(number, bytes):
        return _refused(session, number)
    return reply.ok(f"{number} {maildrop.size(number)}")


def _uidl(session: Session, arguments: list[bytes]) -> bytes:
    maildrop = _maildrop(session)
    if not arguments:
        session.listing = maildrop.unique_id_listings()
        return reply.ok(counted(maildrop.count))
    number = _number(maildrop, arguments[0])
    if isinstance(number, bytes):
        return _refused(session, number)
    return reply.ok(f"{number} {maildrop.unique_id(number)}")


def _send(session: Session, argument: bytes, lines: int | None) -> bytes:
    maildrop = _maildrop(session)
    number = _number(maildrop, argument)
    if isinstance(number, bytes):
        return _refused(session, number)
    session.wanted = Wanted(number, maildrop.uid(number), lines)
    return session.wait(SENDING)


def _retr(session: Session, arguments: list[bytes]) -> bytes:
    return _send(session, arguments[0], None)


def _top(session: Session, arguments: list[bytes]) -> bytes:
    if not arguments[1].isdigit() or len(arguments[1]) > DIGITS:
        return session.error(reply.BAD_ARGUMENT)
    return _send(session, arguments[0], int(arguments[1]))


def _dele(session: Session, arguments: list[bytes]) -> bytes:
    maildrop = _maildrop(session)
    number = _number(maildrop, arguments[0])
    if isinstance(number, bytes):
        return _refused(session, number)
    maildrop.delete(number)
    return reply.ok(f"Message {number} deleted")


def _rset(session: Session, arguments: list[bytes]) -> bytes:
    maildrop = _maildrop(session)
    maildrop.reset()
    return reply.ok(described(maildrop))


def _noop(session: Session, arguments: list[bytes]) -> bytes:
    return reply.NOOP


VERBS: dict[bytes, Verb] = {
    b"USER": Verb(_user, AUTHORIZATION, 1, 1, whole=True),
    b"PASS": Verb(_pass, AUTHORIZATION, 1, 1, whole=True),
    b"AUTH": Verb(_auth, AUTHORIZATION, 1, 2),
    b"STLS": Verb(_stls, AUTHORIZATION),
    b"UTF8": Verb(_utf8, AUTHORIZATION),
    b"CAPA": Verb(_capa, BOTH),
    b"QUIT": Verb(_quit, BOTH),
    b"STAT": Verb(_stat, TRANSACTION),
    b"LIST": Verb(_list, TRANSACTION, 0, 1),
    b"UIDL": Verb(_uidl, TRANSACTION, 0, 1),
    b"RETR": Verb(_retr, TRANSACTION, 1, 1),
    b"TOP": Verb(_top, TRANSACTION, 2, 2),
    b"DELE": Verb(_dele, TRANSACTION, 1, 1),
    b"RSET": Verb(_rset, TRANSACTION),
    b"NOOP": Verb(_noop, TRANSACTION),
}
