"""The state of an IMAP session, and what a session asks of its caller."""

from collections.abc import Callable
from typing import Final

from relaymta._speedups.imap import Parser
from relaymta.proto import imap_response as response
from relaymta.proto import sasl
from relaymta.proto.access_session import CLAIMED, COMMANDS, KEPT, TLS, AccessSession, no_keys
from relaymta.proto.imap_capability import AFTER_LOGIN, BEFORE_LOGIN, REVISIONS
from relaymta.proto.imap_command import Append, Command
from relaymta.proto.imap_words import Refused
from relaymta.proto.session import LOGIN_LINE_LIMIT, Offers

__all__ = ["APPENDED", "CANCELLED", "CLAIMED", "COMMAND", "COMMANDS", "IDLE", "LITERAL", "MESSAGE", "TLS", "Session"]

# Session.state, see imap_server.py
COMMAND: Final = 3
LITERAL: Final = 4
MESSAGE: Final = 5
APPENDED: Final = 6
CANCELLED: Final = 7
IDLE: Final = 8

FIRST_LIMIT = 32768  # octets of a command before login: an ID may have so many (RFC 2971 3.3)
LIMIT = 65536  # and after it, APPEND's messages apart
FIRST_LITERAL = 4096  # octets of a literal before login


class Session(AccessSession):
    """The state of an IMAP session, and every change of it that is not one command's. `hostname`: our name; `offers`: of these
    `starttls`, `tls_needed`, `mechanisms` and `clear` count; `keys`: for SCRAM, see `sasl.begin`; `secure`: TLS is active;
    `hide`: capabilities that are not offered, which the caller may change until a login is over; `append_limit`: octets of a
    message.

    `logged_in`, `selected` and `read_only` say in which state of RFC 9051 3 it is; `rev2`, `utf8_accept`, `condstore` and
    `qresync` what the client has enabled; `client`: what it has said of itself (ID)."""

    __slots__ = (
        "append",
        "append_limit",
        "appending",
        "client",
        "command",
        "condstore",
        "hide",
        "logged_in",
        "mistaken",
        "parser",
        "pieces",
        "qresync",
        "read_only",
        "refusal",
        "rev2",
        "selected",
        "tag",
        "utf8_accept",
    )

    TOO_MANY_ERRORS = response.bye("Too many errors")
    TOO_MANY_WRONG = response.bye("Too many failed logins")
    OTHER_PROTOCOL = response.bye("This is an IMAP server, and that was not IMAP")

    def __init__(
        self,
        hostname: str,
        offers: Offers,
        keys: Callable[[str], sasl.Keys] = no_keys,
        secure: bool = False,
        hide: frozenset[str] = frozenset(),
        append_limit: int = 50 << 20,
        mistaken: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__(hostname, offers, keys, secure)
        self.mistaken = mistaken
        self.hide = hide
        self.append_limit = append_limit
        self.tag = "*"  # of the command under way
        self.command: Command | None = None
        self.append: Append | None = None
        self.appending = False  # the caller has messages of an APPEND that is not over
        self.pieces: list[bytes] = []
        self.refusal: Refused | None = None  # why a command is refused, of which the rest is dropped first
        self.parser = _parser()
        self.logged_in = self.selected = self.read_only = False
        self.rev2 = self.utf8_accept = self.condstore = self.qresync = False
        self.client: dict[str, str | None] = {}

    @property
    def utf8(self) -> bool:
        """Whether names of mailboxes are in UTF-8, and strings may be."""
        return self.rev2 or self.utf8_accept

    def greet(self) -> bytes:
        """The greeting, with capabilities (RFC 9051 7.1.1)."""
        return response.untagged("OK", f"{self.hostname} relaymta ready", self.capability_code())

    def keep(self, data: bytes) -> None:
        """Keep octets from the client for a later `receive(b"")`. More than KEPT close the session."""
        if not self.closing:
            self.parser.keep(data)
            if self.waiting() > KEPT:
                self.close()

    def waiting(self) -> int:
        """The number of octets that have arrived and are not parsed yet."""
        return self.parser.waiting()

    def close(self) -> None:
        """The connection is lost, or is to be closed: nothing more is parsed. What the caller has of an APPEND is void. Further
        calls do nothing."""
        self.closing = True
        self.behind = False
        self.state = COMMANDS
        self.command = self.claim = self.exchange = self.append = self.mistaken = None
        self.appending = False
        self.pieces = []
        self.parser = _parser()

    # What the caller answers. After `close` each of these does nothing.

    def tls_started(self) -> None:
        """The TLS handshake is done: what the client has said before, and what has arrived in the clear, is forgotten (RFC 9051
        6.2.1)."""
        if self._over(TLS):
            self.secure = True
            self.client = {}
            self.parser = _parser()
            self.behind = False

    def write(self, octets: bytes) -> bytes:
        """Untagged responses to the command, or in IDLE; also while nothing is under way, except EXPUNGE and VANISHED. Returns
        what to write."""
        return b"" if self.closing else octets

    def done(self, status: str, text: str, code: bytes = b"") -> bytes:
        """The end of the command: OK, NO or BAD, a text, a response code. Returns what to write. After SELECT, EXAMINE, CLOSE and
        UNSELECT a mailbox is selected, or not (`code` READ-ONLY: it may only be read)."""
        command, self.command = self.command, None
        if command is None or not self._over(COMMAND):
            return b""
        self.appending = False
        if command.name in ("SELECT", "EXAMINE"):
            self.selected = status == "OK"
            self.read_only = command.name == "EXAMINE" or code == response.READ_ONLY
        elif command.name in ("CLOSE", "UNSELECT") and status == "OK":
            self.selected = False
        answer = response.tagged(command.tag, status, text, code)
        return self.error(answer) if status == "BAD" else answer

    def failed(self) -> bytes:
        """The command has met a defect of ours (RFC 5530 3): its end. Returns what to write."""
        return self.done("NO", "Internal error; it has been logged", response.SERVERBUG)

    def unselected(self) -> None:
        """The mailbox that was selected is gone: none is."""
        self.selected = False

    def go_ahead(self) -> bytes:
        """The message `append` may come. Returns what to write."""
        if self.state != LITERAL or self.append is None or self.closing:
            return b""
        self.state = MESSAGE
        self.appending = True
        self.behind = self.waiting() > 0
        self.parser.stream()
        return b"" if self.append.plus else response.continuation(b"Ready for the message")

    def take(self) -> list[bytes]:
        """The octets of the message `append` that have arrived since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces

    def taken(self) -> None:
        """The caller has all of the message `append` (APPENDED)."""
        if self._over(APPENDED):
            self.append = None
            self.behind = True

    # What commands do

    def capabilities(self) -> list[str]:
        """What is offered now, in the order of RFC 9051 7.2.2: the revisions first."""
        names = [*REVISIONS, *(AFTER_LOGIN if self.logged_in else BEFORE_LOGIN)]
        if not self.logged_in and self.offers.starttls and not self.secure:
            names.append("STARTTLS")
        if not self.logged_in:
            names += [f"AUTH={one}" for one in self.offers.mechanisms] if self.may_log_in else []
            if not self.may_log_in or "PLAIN" not in self.offers.mechanisms:
                names.append("LOGINDISABLED")
        shown = [name for name in names if name not in self.hide]
        return [f"APPENDLIMIT={self.append_limit}" if name == "APPENDLIMIT" else name for name in shown]

    def capability_code(self) -> bytes:
        """What is offered now, as a response code."""
        return f"CAPABILITY {' '.join(self.capabilities())}".encode()

    def exchanged(self, answer: bytes | sasl.Claim) -> bytes:
        """Go on after a step of a login; `answer`: as in SMTP."""
        if not isinstance(answer, bytes):
            self.claim = answer
            return self.wait(CLAIMED)
        if answer.startswith(b"334"):
            self.parser.line()
            return response.continuation(answer[4:-2])
        self.exchange = None
        if not answer.startswith(b"2"):
            return self.refuse_login(answer)
        self.accepted = False
        self.logged_in = True
        self.parser.limit = LIMIT
        return response.tagged(self.tag, "OK", "Logged in", self.capability_code())

    def refuse_login(self, answer: bytes) -> bytes:
        """A login has ended with this reply of SMTP's AUTH: 535, 4xx, or 501."""
        text = answer.decode("utf-8", "replace").strip("\r\n").partition(" ")[2].partition(" ")[2]
        if answer.startswith(b"535"):
            said = response.tagged(self.tag, "NO", text, response.AUTHENTICATIONFAILED)
        elif answer.startswith(b"550"):
            said = response.tagged(self.tag, "NO", text, response.AUTHORIZATIONFAILED)
        elif answer.startswith(b"4"):
            said = response.tagged(self.tag, "NO", text, response.UNAVAILABLE)
        else:
            said = response.tagged(self.tag, "BAD", text)
        return self.login_failed(said, answer.startswith(b"535"))

    def said(self, refused: Refused) -> bytes:
        """The end of the command under way, which is refused."""
        answer = response.tagged(self.tag, refused.status, refused.text, refused.code)
        return self.error(answer) if refused.status == "BAD" else answer


def _parser() -> Parser:
    """A line in AUTHENTICATE may have 12288 octets and CRLF, as in SMTP (RFC 4954 4; RFC 9051 names no bound)."""
    return Parser(FIRST_LIMIT, LOGIN_LINE_LIMIT + 2)
