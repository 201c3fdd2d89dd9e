"""The state of a POP3 session, and what a session asks of its caller."""

from collections.abc import Callable, Iterator
from typing import Final

from relaymta._speedups.smtp import Parser
from relaymta.proto import pop3_reply as reply
from relaymta.proto import sasl
from relaymta.proto.access_session import CLAIMED, COMMANDS, KEPT, TLS, AccessSession, no_keys
from relaymta.proto.pop3_maildrop import Maildrop, Wanted
from relaymta.proto.session import LOGIN_LINE_LIMIT, Offers

__all__ = ["CLAIMED", "COMMANDS", "COMMITTING", "OPENING", "SENDING", "TLS", "Session"]

# Session.state, see pop3_server.py
OPENING: Final = 3
SENDING: Final = 4
COMMITTING: Final = 5


class Session(AccessSession):
    """The state of a POP3 session, and every change of it that is not one command's. `hostname`: our name; `offers`: of these
    `starttls`, `tls_needed`, `mechanisms` and `clear` count; `keys`: for SCRAM, see `sasl.begin`; `secure`: TLS is active.

    `maildrop` is None in the AUTHORIZATION state of RFC 1939, and set in TRANSACTION."""

    __slots__ = (
        "late",
        "listing",
        "maildrop",
        "name",
        "parser",
        "utf8",
        "wanted",
    )

    TOO_MANY_ERRORS = reply.TOO_MANY_ERRORS
    TOO_MANY_WRONG = reply.TOO_MANY_WRONG
    OTHER_PROTOCOL = reply.NOT_POP3

    def __init__(self, hostname: str, offers: Offers, keys: Callable[[str], sasl.Keys] = no_keys, secure: bool = False) -> None:
        super().__init__(hostname, offers, keys, secure)
        self.maildrop: Maildrop | None = None
        self.wanted: Wanted | None = None
        self.listing: Iterator[bytes] | None = None  # the rest of a multi-line reply
        self.name: str | None = None  # what USER said
        self.parser = _parser()
        self.late = bytearray()  # what has arrived behind that which the parser has
        self.utf8 = False  # the client has said UTF8

    def greet(self) -> bytes:
        """The greeting (RFC 1939 4). There is no timestamp in it: APOP is not offered."""
        return reply.ok(f"{self.hostname} POP3 relaymta ready")

    def keep(self, data: bytes) -> None:
        """Keep octets from the client for a later `receive(b"")`. More than KEPT close the session."""
        if not self.closing:
            self.late += data
            if self.waiting() > KEPT:
                self.close()

    def waiting(self) -> int:
        """The number of octets that have arrived and are not parsed yet."""
        return self.parser.waiting() + len(self.late)

    @property
    def within_reply(self) -> bool:
        """Whether a multi-line reply has begun and not ended: nothing else may be written now, not even that we are closing."""
        return self.listing is not None or (self.wanted is not None and self.wanted.begun)

    def close(self) -> None:
        """The connection is lost, or is to be closed: nothing more is parsed, and nothing is deleted unless QUIT has asked for it
        already. Further calls do nothing."""
        self.closing = True
        self.behind = False
        self.listing = self.wanted = self.name = self.claim = self.exchange = None
        self.late.clear()
        if self.state != COMMITTING:
            self.state = COMMANDS

    def dismiss(self) -> None:
        """As `close`, from the caller that was to do what `state` says, and will not: nothing is left to do."""
        self.close()
        self.state = COMMANDS

    # What the caller answers. After `close` each of these does nothing.

    def tls_started(self) -> None:
        """The TLS handshake is done: what the client has said before, and what has arrived in the clear, is forgotten (RFC 2595
        4)."""
        if self._over(TLS):
            self.secure = True
            self.name, self.utf8 = None, False
            self.parser = _parser()
            self.late.clear()
            self.behind = False

    def opened(self, found: Maildrop | bytes) -> bytes:
        """The maildrop of the user, whose session alone may have it until its end (RFC 1939 4); or the reply that refuses it,
        and the user is not logged in. Returns what to write."""
        if not self._over(OPENING):
            return b""
        self.accepted = False
        if isinstance(found, bytes):
            return self.error(found)
        self.maildrop = found
        return reply.ok(described(found))

    def piece(self, data: bytes) -> bytes:
        """The next piece of the message that is `wanted`, of any size. Returns what to write."""
        wanted = self.wanted
        if wanted is None:
            return b""
        if wanted.begun:
            return wanted.feed(data)
        wanted.begun = True
        return self._status(wanted) + wanted.feed(data)

    def sent(self) -> bytes:
        """All of the message that is `wanted` has been passed to `piece`, or as much as it needs. Returns what to write."""
        end = self.piece(b"")
        wanted, self.wanted = self.wanted, None
        if wanted is None or self.maildrop is None or not self._over(SENDING):
            return b""
        if wanted.lines is None:
            self.maildrop.retrieved.add(wanted.uid)
        return end + wanted.end()

    def refused(self, answer: bytes = reply.MESSAGE_GONE) -> bytes:
        """The message that is `wanted` cannot be had. Returns what to write. After its first piece nothing can say so but a reply
        without an end: the session is closing."""
        wanted, self.wanted = self.wanted, None
        if wanted is None or not self._over(SENDING):
            return b""
        if wanted.begun:
            self.close()
            return b""
        return answer

    @property
    def deletions(self) -> tuple[int, ...]:
        """The UIDs to delete, in the state COMMITTING alone: in all others nothing is deleted, whatever the client has marked."""
        return self.maildrop.deleted if self.state == COMMITTING and self.maildrop is not None else ()

    def committed(self, left: int) -> bytes:
        """`deletions` was carried out, but for `left` messages, which are still there (those that others have removed are not).
        The session is closing, and nothing is left to do. Returns what to write (RFC 1939 6)."""
        if self.state != COMMITTING:
            return b""
        lost = self.closing
        self.dismiss()
        if lost:
            return b""
        if left:
            return reply.NOT_REMOVED
        removed = len(self.maildrop.deleted) if self.maildrop is not None else 0
        return reply.ok(f"{counted(removed)} deleted; bye") if removed else reply.BYE

    # What commands do

    def exchanged(self, answer: bytes | sasl.Claim) -> bytes:
        """Go on after a step of a login."""
        if not isinstance(answer, bytes):
            self.claim = answer
            return self.wait(CLAIMED)
        if answer.startswith(b"334"):
            return reply.of_login(answer)
        if answer.startswith(b"2"):
            self.exchange = None
            return self.wait(OPENING)
        return self.login_failed(reply.of_login(answer), answer.startswith(b"535"))

    def _status(self, wanted: Wanted) -> bytes:
        if wanted.lines is not None or self.maildrop is None:
            return reply.ok("Top of the message follows")
        return reply.ok(f"{self.maildrop.size(wanted.number)} octets")


def described(maildrop: Maildrop) -> str:
    """How many messages a maildrop has, and how large they are."""
    return f"{counted(maildrop.count)} ({maildrop.octets} octets)"


def counted(messages: int) -> str:
    """A number of messages, in words."""
    return f"{messages} message{'' if messages == 1 else 's'}"


def _parser() -> Parser:
    """Of lines only. A line may be as long as a response in AUTH, 12288 octets and CRLF (RFC 4954 4; RFC 5034 names no bound);
    commands have a bound of their own."""
    return Parser(LOGIN_LINE_LIMIT + 2, 0, False)
