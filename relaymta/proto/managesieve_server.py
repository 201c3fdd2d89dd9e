"""The server side of a ManageSieve session (RFC 5804), without I/O.

The caller passes octets to `receive()` and writes what it returns. `state` says what is to be done then:

    COMMANDS      nothing: commands are parsed
    TLS           a TLS handshake is to be done, before anything is read: then `tls_started()`, and what `greet()` returns is
                  written
    CLAIMED       a login is to be verified: `claim`, answered by `checked(reply)`
    ASKED         `asked` is to be done with the scripts of the user who has logged in: `done(result)` or `refused(code, text)`

In all but the first nothing is parsed, and input is kept (KEPT octets at most). `closing`: the connection is to be closed after
what was returned is written (`foreign`: because the client speaks another protocol; `parting`: the client has asked for it).
`behind` is set when there is more than the work of one call, and when commands have arrived meanwhile: `receive(b"")` goes on.

The session is authenticated when `owner` is set: by `checked`, whose caller has named the user in `name_owner`.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from relaymta.proto import managesieve_reply as reply
from relaymta.proto import sasl, sieve
from relaymta.proto.access_session import CLAIMED, COMMANDS, KEPT, TLS, AccessSession, no_keys
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.managesieve_grammar import Broken, Command, Reader, String, Word
from relaymta.proto.session import Offers
from relaymta.proto.sieve_run import REDIRECTS_MOST
from relaymta.proto.verbs import OTHERS

__all__ = ["ASKED", "CLAIMED", "COMMANDS", "KEPT", "TLS", "VERBS", "Asked", "Listed", "Offers", "ServerSession"]

ASKED: Final = 3  # ServerSession.state

BEFORE_LOGIN, AFTER_LOGIN = 8192, sieve.SCRIPT_MOST + 4096  # octets of a command with its literals
ENOUGH = 64  # responses of one call
NUMBER_MOST = 0xFFFFFFFF  # RFC 5804 4


class Asked(NamedTuple):
    """What is to be done with scripts. `what`: "list" (the result: Listed of each), "get" (its text, None where there is none),
    "put", "check", "activate" (`name` "": none), "remove", "rename" (to `new`), "room" (for a script of `size` octets); those
    without a result have None."""

    what: str
    name: str = ""
    text: bytes = b""
    new: str = ""
    size: int = 0


class Listed(NamedTuple):
    """A script."""

    name: str
    active: bool


class ServerSession(AccessSession):
    """One ManageSieve session. `hostname`: our name; `offers`: of these `starttls`, `tls_needed`, `mechanisms` and `clear` count;
    `keys`: for SCRAM, see `sasl.begin`; `secure`: TLS is active."""

    __slots__ = ("_final", "_reader", "asked", "owner")

    TOO_MANY_ERRORS = reply.TOO_MANY_ERRORS
    TOO_MANY_WRONG = reply.TOO_MANY_WRONG
    OTHER_PROTOCOL = reply.NOT_MANAGESIEVE

    def __init__(self, hostname: str, offers: Offers, keys: Callable[[str], sasl.Keys] = no_keys, secure: bool = False) -> None:
        super().__init__(hostname, offers, keys, secure)
        self.asked: Asked | None = None
        self.owner = ""  # who has logged in
        self._final = b""  # what proves to the client, with the login, that we know the password
        self._reader = Reader(BEFORE_LOGIN)

    def greet(self) -> bytes:
        """The greeting, and what follows STARTTLS (RFC 5804 1.7, 2.2): the capabilities."""
        return self.capabilities() + reply.ok(f"{self.hostname} ManageSieve relaymta ready")

    def capabilities(self) -> bytes:
        """The capabilities as they are now, a line each (RFC 5804 1.7)."""
        rows = {"IMPLEMENTATION": "relaymta", "SIEVE": " ".join(sieve.EXTENSIONS)}
        rows["SASL"] = " ".join(self.offers.mechanisms) if self.may_log_in else ""
        rows |= {"MAXREDIRECTS": str(REDIRECTS_MOST), "VERSION": "1.0"}
        if self.owner:
            rows["OWNER"] = self.owner
        lines = [reply.string(name) + b" " + reply.string(value) + b"\r\n" for name, value in rows.items()]
        if self.offers.starttls and not self.secure and not self.owner:
            lines.append(b'"STARTTLS"\r\n')
        return b"".join(lines)

    # Input

    def receive(self, data: bytes) -> bytes:
        """Take octets from the client; returns the octets to write."""
        if self.closing or self.state:
            self.keep(data)
            return b""
        self.behind = False
        self._reader.feed(data)
        out: list[bytes] = []
        while not self.closing and not self.state:
            if len(out) >= ENOUGH:
                self.behind = self.waiting() > 0
                break
            found = self._reader.next()
            if found is None:
                break
            out.append(self._broken(found) if isinstance(found, Broken) else self._received(found))
        if not self.closing and self.waiting() > KEPT:
            self.close()
            out.append(reply.TOO_MUCH_SENT)
        return b"".join(out)

    def keep(self, data: bytes) -> None:
        """Keep octets from the client for a later `receive(b"")`. More than KEPT close the session."""
        if not self.closing:
            self._reader.feed(data)
            if self.waiting() > KEPT:
                self.close()

    def waiting(self) -> int:
        """The number of octets that have arrived and are not parsed yet."""
        return len(self._reader.buffer)

    def close(self) -> None:
        """The connection is lost, or is to be closed: nothing more is parsed. Further calls do nothing."""
        self.closing = True
        self.behind = False
        self.claim = self.exchange = self.asked = None
        self._reader = Reader(0)
        self.state = COMMANDS

    def _broken(self, found: Broken) -> bytes:
        if not self.owner and self.exchange is None and OTHERS.match(found.start):
            return self.reject_protocol()
        answer = self.login_failed(found.answer) if self.exchange is not None else self.error(found.answer)
        if found.fatal:
            self.close()
        return answer

    def _received(self, command: Command) -> bytes:
        tokens = command.tokens
        if self.exchange is not None:
            if len(tokens) == 1 and isinstance(tokens[0], String):
                return self.exchanged(self.exchange.respond(tokens[0]))
            return self.login_failed(reply.NOT_A_STRING)
        verb = VERBS.get(tokens[0].upper()) if tokens and isinstance(tokens[0], Word) else None
        if verb is None:
            if not self.owner and OTHERS.match(command.start):
                return self.reject_protocol()
            return self.error(reply.UNKNOWN_COMMAND)
        if verb.logged_in is not None and verb.logged_in != bool(self.owner):
            return self.error(reply.LOGGED_IN_ALREADY if self.owner else reply.NOT_LOGGED_IN)
        given = arguments_of(verb, tokens[1:])
        return self.error(given) if isinstance(given, bytes) else verb.run(self, *given)

    # What the caller answers. After `close` each of these does nothing.

    def tls_started(self) -> None:
        """The TLS handshake is done: what the client has said before is forgotten, and the capabilities are told again."""
        if self._over(TLS):
            self.secure = True
            self._reader = Reader(BEFORE_LOGIN)
            self.behind = False

    def name_owner(self, user: str) -> None:
        """The user whose login is being accepted, and whose scripts the session is about."""
        self.owner = user

    def checked(self, answer: bytes) -> bytes:
        claim = self.claim
        if isinstance(claim, sasl.Proof) and claim.final and answer.startswith(b"2") and self._over(CLAIMED):
            self.claim, self._final = None, claim.final  # told with the OK (RFC 5804 1.3)
            return self.exchanged(answer)
        return super().checked(answer)

    def done(self, result: Any = None) -> bytes:
        """What was asked is done, with this result. Returns what to write."""
        asked, self.asked = self.asked, None
        if asked is None or not self._over(ASKED):
            return b""
        if asked.what == "list":
            active = {True: b" ACTIVE\r\n", False: b"\r\n"}
            return b"".join(reply.string(one.name) + active[one.active] for one in result) + reply.DONE
        if asked.what == "get":
            return reply.NO_SCRIPT if result is None else reply.literal(result) + b"\r\n" + reply.DONE
        return reply.DONE

    def refused(self, text: str, code: bytes = b"") -> bytes:
        """What was asked is refused; `code`: a response code. Returns what to write."""
        self.asked = None
        return reply.no(text, code) if self._over(ASKED) else b""

    # What commands do

    def exchanged(self, answer: bytes | sasl.Claim) -> bytes:
        """Go on after a step of a login."""
        if not isinstance(answer, bytes):
            self.claim = answer
            return self.wait(CLAIMED)
        if answer.startswith(b"334"):
            return reply.of_login(answer)
        if not answer.startswith(b"2"):
            return self.login_failed(reply.of_login(answer), answer.startswith(b"535"))
        self.exchange, self.accepted = None, False
        self._reader.most = AFTER_LOGIN
        final, self._final = self._final, b""
        return reply.final(final) if final else reply.LOGGED_IN

    def ask(self, asked: Asked) -> bytes:
        """The caller is to do something with the scripts; the response follows then."""
        self.asked = asked
        return self.wait(ASKED)


# Commands: each function returns the response, b"" where that follows later.


def _login_refusal(session: ServerSession) -> bytes | None:
    """The response to a login that is not allowed on this connection."""
    if not session.offers.mechanisms:
        return reply.NO_LOGINS
    if session.may_log_in:
        return None
    return reply.TLS_FOR_LOGIN if session.offers.starttls else reply.TLS_UNAVAILABLE


def _authenticate(session: ServerSession, mechanism: str, initial: bytes | None = None) -> bytes:
    refused = _login_refusal(session)
    if refused is None and mechanism.upper() not in session.offers.mechanisms:
        refused = reply.NO_SUCH_MECHANISM
    if refused is not None:
        return session.error(refused)
    session.exchange = AuthExchange(mechanism.upper(), session.keys)
    return session.exchanged(session.exchange.begin([]) if initial is None else session.exchange.respond(initial))


def _starttls(session: ServerSession) -> bytes:
    if session.secure:
        return session.error(reply.HAS_TLS)
    if not session.offers.starttls:
        return session.error(reply.NO_TLS)
    if session.waiting():  # command injection: sent in the clear, to be processed as if it came by TLS
        session.close()
        return reply.TALKING_EARLY
    session.wait(TLS)
    return reply.START_TLS


def _logout(session: ServerSession) -> bytes:
    session.parting = True
    session.close()
    return reply.BYE


def _capability(session: ServerSession) -> bytes:
    return session.capabilities() + reply.DONE


def _noop(session: ServerSession, tag: bytes | None = None) -> bytes:
    return reply.ok("Done", b"" if tag is None else b"TAG " + reply.string(tag))


class Verb(NamedTuple):
    """A command: its function, called with its arguments; `kinds`: of these, a letter each: n name or word in UTF-8, o octets,
    # number; those behind | may be left out; `logged_in`: whether that is needed, must not be, or (None) does not matter."""

    run: Callable[..., bytes]
    kinds: str = ""
    logged_in: bool | None = True


VERBS: dict[bytes, Verb] = {
    b"AUTHENTICATE": Verb(_authenticate, "n|o", False),
    b"STARTTLS": Verb(_starttls, "", False),
    b"LOGOUT": Verb(_logout, "", None),
    b"CAPABILITY": Verb(_capability, "", None),
    b"NOOP": Verb(_noop, "|o", None),
    b"HAVESPACE": Verb(lambda session, name, size: session.ask(Asked("room", name, size=size)), "n#"),
    b"PUTSCRIPT": Verb(lambda session, name, text: session.ask(Asked("put", name, text)), "no"),
    b"LISTSCRIPTS": Verb(lambda session: session.ask(Asked("list"))),
    b"SETACTIVE": Verb(lambda session, name: session.ask(Asked("activate", name)), "n"),
    b"GETSCRIPT": Verb(lambda session, name: session.ask(Asked("get", name)), "n"),
    b"DELETESCRIPT": Verb(lambda session, name: session.ask(Asked("remove", name)), "n"),
    b"RENAMESCRIPT": Verb(lambda session, old, new: session.ask(Asked("rename", old, new=new)), "nn"),
    b"CHECKSCRIPT": Verb(lambda session, text: session.ask(Asked("check", text=text)), "o"),
}


def arguments_of(verb: Verb, tokens: list[String | Word]) -> list[Any] | bytes:
    """The arguments of a command, or the response to wrong ones."""
    needed, _, further = verb.kinds.partition("|")
    kinds = needed + further
    if not len(needed) <= len(tokens) <= len(kinds):
        return reply.BAD_ARGUMENTS
    found: list[Any] = []
    for kind, token in zip(kinds, tokens, strict=False):
        if isinstance(token, Word) != (kind == "#"):
            return reply.BAD_ARGUMENTS
        if kind == "#":
            if not token.isdigit() or len(token) > 10 or int(token) > NUMBER_MOST:
                return reply.BAD_ARGUMENTS
            found.append(int(token))
        elif kind == "o":
            found.append(bytes(token))
        else:
            try:
                found.append(token.decode("utf-8"))
            except UnicodeDecodeError:
                return reply.NOT_UTF8
    return found
