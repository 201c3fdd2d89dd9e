"""A caller of proto.pop3_server for tests: mailboxes that are dictionaries, and logins that are compared."""

from collections.abc import Callable

from relaymta.proto import reply
from relaymta.proto.pop3_maildrop import Maildrop
from relaymta.proto.pop3_reply import IN_USE, MESSAGE_GONE, MESSAGE_UNAVAILABLE
from relaymta.proto.pop3_server import Offers, ServerSession
from relaymta.proto.pop3_session import CLAIMED, COMMITTING, OPENING, SENDING, TLS
from relaymta.proto.sasl import Claim, Password, Proof

__all__ = ["CLEAR", "LOGIN", "Caller", "Mailbox", "caller"]

LOGIN = b"USER bob\r\nPASS secret\r\n"
CLEAR = Offers(mechanisms=("PLAIN", "LOGIN"), clear=True)


class Mailbox:
    """INBOX of bob, whose password is secret: `messages` by UID. `unreadable`, `stuck`: UIDs that cannot be read or removed."""

    def __init__(self, *messages: bytes, uidvalidity: int = 7) -> None:
        self.messages = {10 * number: message for number, message in enumerate(messages, 1)}
        self.uidvalidity = uidvalidity
        self.seen: set[int] = set()
        self.unreadable: set[int] = set()
        self.stuck: set[int] = set()
        self.session: object = None  # who has it

    def open(self, session: object) -> Maildrop | bytes:
        if self.session is not None:
            return IN_USE
        self.session = session
        return Maildrop(self.uidvalidity, list(self.messages), list(map(len, self.messages.values())))

    def remove(self, uids: tuple[int, ...]) -> int:
        """Returns how many are still there."""
        for uid in set(uids) - self.stuck:
            self.messages.pop(uid, None)
        return sum(uid in self.messages for uid in uids)


class Caller:
    """Does what a session's state requires, at once. `piece`: octets of a message that are read together. `login`: the reply to a
    claim, by default that of bob."""

    def __init__(self, session: ServerSession, mailbox: Mailbox, piece: int = 65536) -> None:
        self.session, self.mailbox, self.piece = session, mailbox, piece
        self.claims: list[Claim] = []
        self.login: Callable[[Claim], bytes] = by_secret
        self.octets_read = 0

    def feed(self, data: bytes) -> bytes:
        """Octets of the client; all that is written then."""
        return self.session.receive(data) + self.run()

    def run(self) -> bytes:
        """Whatever can be done without more octets of the client."""
        out, session = [], self.session
        while not session.closing and (session.state or session.behind):
            out.append(self.step())
        if session.closing:
            self.drop()
        return b"".join(out)

    def step(self) -> bytes:
        """What the session's state requires now."""
        return _STEPS[self.session.state](self) if self.session.state else self.session.receive(b"")

    def drop(self) -> None:
        """The connection ends."""
        self.session.close()
        if self.session.maildrop is not None:
            self.mailbox.seen |= self.session.maildrop.retrieved
        if self.mailbox.session is self.session:
            self.mailbox.session = None

    def _start_tls(self) -> bytes:
        self.session.tls_started()
        return b""

    def _log_in(self) -> bytes:
        claim = self.session.claim
        assert claim is not None
        self.claims.append(claim)
        return self.session.checked(self.login(claim))

    def _open(self) -> bytes:
        return self.session.opened(self.mailbox.open(self.session))

    def _send(self) -> bytes:
        wanted = self.session.wanted
        assert wanted is not None
        message = self.mailbox.messages.get(wanted.uid)
        if message is None or wanted.uid in self.mailbox.unreadable:
            return self.session.refused(MESSAGE_UNAVAILABLE if message is not None else MESSAGE_GONE)
        out, at = [], 0
        while at < len(message) and not wanted.enough:
            out.append(self.session.piece(message[at : at + self.piece]))
            at += self.piece
        self.octets_read += min(at, len(message))
        return b"".join(out) + self.session.sent()

    def _commit(self) -> bytes:
        return self.session.committed(self.mailbox.remove(self.session.deletions))


def caller(*messages: bytes, offers: Offers = CLEAR, secure: bool = False, login: bool = True, piece: int = 65536) -> Caller:
    """A session of a mailbox with these messages, logged in."""
    made = Caller(ServerSession("mx.example", offers, secure=secure), Mailbox(*messages), piece)
    assert made.session.greet() == b"+OK mx.example POP3 relaymta ready\r\n"
    if login:
        assert made.feed(LOGIN).endswith(b" octets)\r\n")
    return made


def by_secret(claim: Claim) -> bytes:
    """The reply to a claim of bob's, or of nobody."""
    good = claim.good if isinstance(claim, Proof) else isinstance(claim, Password) and claim == Password("bob", "secret")
    return reply.LOGGED_IN if good else reply.WRONG_CREDENTIALS


_STEPS: dict[int, Callable[[Caller], bytes]] = {
    TLS: Caller._start_tls,
    CLAIMED: Caller._log_in,
    OPENING: Caller._open,
    SENDING: Caller._send,
    COMMITTING: Caller._commit,
}
