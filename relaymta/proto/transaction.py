"""One mail transaction of the server side (RFC 5321 3.3), without I/O: its envelope, and its message data."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from relaymta.proto import reply
from relaymta.proto.envelope import Quarantine, Unseen

__all__ = ["NO_NAMES", "Limits", "Transaction"]

# Flags of _speedups.smtp (C integers there).
BARE_LF, BARE_CR, NUL, EIGHT_BIT, LONG_LINE = 1, 2, 4, 8, 16
NOBODY: frozenset[str] = frozenset()
NO_NAMES: Mapping[str, bool] = MappingProxyType({})
NOTHING_SAID: dict[str, str] = {}  # never changed
PIECES = 1024  # of message data in memory, until they are joined: each costs more memory than it may hold


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one session. Sizes in octets. `lenient`: EHLO may give a name that is none, such as `my pc`."""

    message_size: int = 50 * 1024 * 1024
    recipients: int = 1000
    errors: int = 20
    normalize: bool = False
    long_lines: bool = False
    lenient: bool = False


class Transaction:
    """One message under way: all of its state, which ends with it. The session makes one at MAIL (`Host.begin`) and calls `end`
    once, whatever ends it: the reply to its message data, RSET, EHLO, STARTTLS, or the end of the session."""

    __slots__ = (
        "announced", "asks", "began_at", "chunked", "cleared", "counted", "data", "eight_bit", "forwarded", "headers", "held",
        "key", "keyed", "last_chunk", "led", "limits", "message_id", "names", "parameters", "quarantine", "recipients", "refusal",
        "route", "sender", "size", "smtputf8", "tail", "unseen", "utf8_header",
    )  # fmt: skip

    def __init__(self, sender: str, smtputf8: bool, limits: Limits) -> None:
        self.sender = sender
        self.smtputf8 = smtputf8
        self.limits = limits
        self.recipients: list[str] = []
        self.names = NO_NAMES  # recipients that were given without a domain, and whether they were given with it, too
        self.led = 0  # to how many addresses aliases among the recipients lead
        self.parameters = ""  # of MAIL, as they came
        self.announced = 0  # octets, by SIZE of MAIL; 0: unknown
        self.asks = NOBODY  # of MAIL, RCPT and DATA: about what others are asked (see Session.answered); set by Host.begin
        self.cleared = False  # the answer to DATA was that it is accepted
        self.began_at = 0.0  # when its message data began to come (monotonic seconds), 0.0 before
        self.data: list[bytes] = []
        self.size = 0
        self.eight_bit = False
        self.forwarded = NOTHING_SAID  # by XFORWARD; set by the session
        self.counted = False  # it has taken its unit of the rates and quotas of messages
        self.chunked = False  # by BDAT
        self.last_chunk = False
        self.tail = b""  # the last two octets of message data
        self.refusal = b""  # the reply to its message data, which is discarded; b"": it is kept
        self.held = ""  # why it is to be held in the queue until it is released; "": it is not
        self.quarantine: Quarantine | None = None  # why it is held in the quarantine; None: it is not
        self.unseen: Unseen | None = None  # which filters look at it in the queue; None: none does
        self.message_id = ""
        self.key = ""  # the idempotency key in its header, which is not sent on
        self.keyed = False  # it counts
        self.utf8_header = False  # it is not ASCII, and was given with SMTPUTF8
        self.route = ""  # the name of the route that filters have chosen; "": none
        self.headers: list[str] = []  # the conditions of routes that its header fields meet

    def accept(self, address: str) -> bytes | None:
        """RCPT: the reply that rejects a recipient, or None."""
        return None

    def named(self, address: str, completed: bool) -> None:
        """RCPT of a client whose addresses are completed. `completed`: this one was."""
        if completed and address not in self.names:
            self.names = {**self.names, address: address in self.recipients}
        elif not completed and address in self.names:
            self.names = {**self.names, address: True}

    def rejects(self, address: str, answer: bytes) -> None:
        """A recipient was refused by `accept`, with this reply: nobody is asked about it."""

    def received(self, data: bytes) -> None:
        """More message data has arrived."""
        if self.refusal:
            return
        self.size += len(data)
        if self.size > self.limits.message_size:
            self.refuse(reply.TOO_BIG)
            return
        self.data.append(data)
        if len(self.data) > PIECES:
            self.data = [b"".join(self.data)]
        if self.chunked:
            self.tail = (self.tail + data[-2:])[-2:]

    def arrived(self, now: float) -> None:
        """All input that has come by `now` (monotonic seconds) was parsed; message data is still awaited."""

    def take(self) -> list[bytes]:
        """The message data received since the last call."""
        data, self.data = self.data, []
        return data

    def refuse(self, answer: bytes) -> None:
        """Reply `answer` at the end of the message data, which is discarded from now on."""
        self.refusal = answer
        self.data.clear()

    def ended(self, flags: int, normalized: bool) -> bytes | None:
        """The message data has ended. The reply that rejects it, or None. `flags`: the parser's; `normalized`: it has replaced
        bare CR and LF, and NUL."""
        self.eight_bit = bool(flags & EIGHT_BIT)
        if self.refusal:
            return self.refusal
        if self.tail.endswith(b"\r"):
            flags |= BARE_CR
        repaired = normalized and not self.chunked
        if flags & BARE_LF and not repaired:
            return reply.BARE_LF
        if flags & BARE_CR and not repaired:
            return reply.BARE_CR
        if flags & NUL and not normalized:
            return reply.NUL_IN_DATA
        if flags & LONG_LINE and not self.limits.long_lines:
            return reply.LONG_LINE
        return None

    def refused(self, answer: bytes) -> None:
        """The message was rejected at or after the end of its data, with `answer`. `end` follows."""

    def end(self) -> None:
        """The transaction is over: give up what it holds. Called once."""
