"""A caller of proto.imap_server for tests: it executes nothing, but keeps what it was asked for; logins are compared."""

from collections.abc import Callable

from relaymta.proto import reply
from relaymta.proto.imap_command import Append, Command
from relaymta.proto.imap_server import Offers, ServerSession
from relaymta.proto.imap_session import APPENDED, CANCELLED, CLAIMED, COMMAND, IDLE, LITERAL, MESSAGE, TLS
from relaymta.proto.sasl import Claim, Password, Proof
from tests.support.imap_client import Client
from tests.support.imap_grammar import responses

__all__ = ["CLEAR", "Caller", "by_secret", "caller", "client"]

CLEAR = Offers(mechanisms=("PLAIN", "LOGIN"), clear=True)
LOGIN = b"l LOGIN bob secret\r\n"


def by_secret(claim: Claim) -> bytes:
    """The reply to a claim of bob's, or of nobody."""
    good = claim.good if isinstance(claim, Proof) else isinstance(claim, Password) and claim == Password("bob", "secret")
    return reply.LOGGED_IN if good else reply.WRONG_CREDENTIALS


class Caller:
    """Does what a session's state requires, at once: each command is OK, unless `execute` says something else. `messages`: those
    of APPENDs that came to their end, of each (announced, its octets). `admit`: refuses messages of APPEND, with a text."""

    def __init__(self, session: ServerSession) -> None:
        self.session = session
        self.commands: list[Command] = []
        self.claims: list[Claim] = []
        self.messages: list[tuple[Append, bytes]] = []
        self.login: Callable[[Claim], bytes] = by_secret
        self.execute: Callable[[Command], bytes] = self._ok
        self.admit: Callable[[Append], str] = lambda append: ""
        self.idles = 0
        self._coming: list[tuple[Append, bytes]] = []

    def feed(self, data: bytes) -> bytes:
        """Octets of the client; all that is written then. It passes the grammar."""
        said = self.session.receive(data) + self.run()
        responses(said, self.session.utf8, self.session.rev2)
        return said

    def run(self) -> bytes:
        """Whatever can be done without more octets of the client."""
        out, session = [], self.session
        while not session.closing and (session.behind or session.state in _STEPS):
            out.append(self.step())
        if session.state == MESSAGE:
            self._take()
        return b"".join(out)

    def step(self) -> bytes:
        """What the session's state requires now."""
        if self.session.state == MESSAGE:
            self._take()
        return _STEPS[self.session.state](self) if self.session.state in _STEPS else self.session.receive(b"")

    def _start_tls(self) -> bytes:
        self.session.tls_started()
        return b""

    def _log_in(self) -> bytes:
        claim = self.session.claim
        assert claim is not None
        self.claims.append(claim)
        return self.session.checked(self.login(claim))

    def _execute(self) -> bytes:
        command = self.session.command
        assert command is not None
        self.commands.append(command)
        if command.name == "APPEND":
            self.messages += self._coming
            self._coming = []
        return self.execute(command)

    def _ok(self, command: Command) -> bytes:
        return self.session.done("OK", f"{command.name} completed")

    def _admit(self) -> bytes:
        append = self.session.append
        assert append is not None
        why = self.admit(append)
        if why:
            self._coming = []
            return self.session.refuse(why)
        assert append.number == len(self._coming)
        self._coming.append((append, b""))
        return self.session.go_ahead()

    def _take(self) -> None:
        append, octets = self._coming[-1]
        self._coming[-1] = (append, octets + b"".join(self.session.take()))

    def _taken(self) -> bytes:
        self._take()
        append, octets = self._coming[-1]
        assert len(octets) == append.octets
        self.session.taken()
        return b""

    def _cancel(self) -> bytes:
        self._coming = []
        return self.session.cancelled()


def caller(
    offers: Offers = CLEAR,
    secure: bool = False,
    login: bool = True,
    selected: bool = False,
    first: bytes = b"",
    **options: object,
) -> Caller:
    """A session; logged in, with a mailbox selected, and after commands `first`."""
    made = Caller(ServerSession("mx.example", offers, secure=secure, **options))  # type: ignore[arg-type]
    assert responses(made.session.greet())[0].name == "OK"
    if login:
        assert made.feed(LOGIN).startswith(b"l OK ")
    if selected:
        assert made.feed(b"s SELECT INBOX\r\n") == b"s OK SELECT completed\r\n"
    if first:
        made.feed(first)
    made.commands.clear()
    return made


def client(made: Caller) -> Client:
    """A client of this caller's session."""
    waiting = [made.session.greet()]

    def receive() -> bytes:
        return waiting.pop(0) if waiting else b""

    return Client(lambda octets: waiting.append(made.feed(octets)), receive)


_STEPS: dict[int, Callable[[Caller], bytes]] = {
    TLS: Caller._start_tls,
    CLAIMED: Caller._log_in,
    COMMAND: Caller._execute,
    LITERAL: Caller._admit,
    APPENDED: Caller._taken,
    CANCELLED: Caller._cancel,
}
assert IDLE not in _STEPS
