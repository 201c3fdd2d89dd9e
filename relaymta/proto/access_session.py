"""What sessions of POP3, IMAP and ManageSieve have in common: waiting for the caller, the login, and the count of errors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Final

from relaymta.proto import sasl
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.session import WRONG_LOGINS, Offers

__all__ = ["CLAIMED", "COMMANDS", "ERRORS", "KEPT", "TLS", "AccessSession", "no_keys"]

# AccessSession.state; each protocol goes on from 3
COMMANDS: Final = 0
TLS: Final = 1
CLAIMED: Final = 2

ERRORS = 20  # in one session
KEPT = 1 << 20  # octets that are kept while something is waited for; a read from a socket has a quarter of that at most


def no_keys(user: str) -> sasl.Keys:
    """Keys for SCRAM where there are none."""
    raise KeyError(user)


class AccessSession(ABC):
    """`hostname`: our name; `offers`: of these `starttls`, `tls_needed`, `mechanisms` and `clear` count; `keys`: for SCRAM, see
    `sasl.begin`; `secure`: TLS is active."""

    __slots__ = (
        "accepted",
        "behind",
        "claim",
        "closing",
        "errors",
        "exchange",
        "foreign",
        "hostname",
        "keys",
        "offers",
        "parting",
        "secure",
        "state",
        "wrong_logins",
    )

    TOO_MANY_ERRORS: ClassVar[bytes]  # follows the reply to the last of ERRORS
    TOO_MANY_WRONG: ClassVar[bytes]  # follows the reply to the last of WRONG_LOGINS
    OTHER_PROTOCOL: ClassVar[bytes]  # the reply to a client of another protocol

    def __init__(self, hostname: str, offers: Offers, keys: Callable[[str], sasl.Keys], secure: bool) -> None:
        self.hostname = hostname
        self.offers = offers
        self.keys = keys
        self.secure = secure
        self.state = COMMANDS
        self.claim: sasl.Claim | None = None
        self.exchange: AuthExchange | None = None
        self.accepted = False  # the caller has accepted a login, and the exchange is not over
        self.behind = False
        self.closing = False
        self.foreign = False
        self.parting = False
        self.errors = 0
        self.wrong_logins = 0

    @abstractmethod
    def waiting(self) -> int:
        """The number of octets that have arrived and are not parsed yet."""

    @abstractmethod
    def close(self) -> None:
        """The connection is lost, or is to be closed: nothing more is parsed. Further calls do nothing."""

    @abstractmethod
    def exchanged(self, answer: bytes | sasl.Claim) -> bytes:
        """Go on after a step of a login; `answer`: as in SMTP."""

    def checked(self, answer: bytes) -> bytes:
        """The claim was verified. `answer`: as for SMTP's AUTH (RFC 4954 6), 235, or the reply that refuses it. Returns what to
        write; after `close` it does nothing."""
        claim, self.claim = self.claim, None
        if claim is None or not self._over(CLAIMED):
            return b""
        if answer.startswith(b"5"):
            self.wrong_logins += 1
        self.accepted = answer.startswith(b"2")
        return self.exchanged(self.exchange.checked(claim, answer) if self.exchange is not None else answer)

    def login_failed(self, answer: bytes, wrong: bool = False) -> bytes:
        """A login has ended with the reply `answer`; `wrong`: because of what the client sent as proof. Returns what to write."""
        self.exchange = None
        if self.accepted:  # the client rejects our proof: it must not go on as the user
            self.close()
            return answer
        if wrong and self.wrong_logins >= WRONG_LOGINS:
            self.close()
            return answer + self.TOO_MANY_WRONG
        return self.error(answer)

    @property
    def may_log_in(self) -> bool:
        """Whether a login is allowed on this connection as it is now."""
        return bool(self.offers.mechanisms) and (self.secure or (self.offers.clear and not self.offers.tls_needed))

    def wait(self, state: int) -> bytes:
        """The caller is to do what `state` says, before anything else is parsed; the reply follows then."""
        self.state = state
        self.behind = False
        return b""

    def reject_protocol(self) -> bytes:
        """The client speaks another protocol: close before commands within it are reached (cross-protocol attack)."""
        self.foreign = True
        self.close()
        return self.OTHER_PROTOCOL

    def error(self, answer: bytes) -> bytes:
        """Count an error of the client, for which `answer` is the reply."""
        self.errors += 1
        if self.errors >= ERRORS:
            self.close()
            return answer + self.TOO_MANY_ERRORS
        return answer

    def _over(self, state: int) -> bool:
        """What was waited for in `state` is there: go on with commands, of which some may have arrived. False: it was not waited
        for."""
        if self.state != state or self.closing:
            return False
        self.state = COMMANDS
        self.behind = self.waiting() > 0
        return True
