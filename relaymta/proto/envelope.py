"""Envelopes, recipient states and attempts, and their stored form (msgpack arrays; fields are only ever appended).

Times are milliseconds: `arrived` and attempt times by the wall clock (UTC), `deadline` and `due` by the queue's clock.
"""

from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from relaymta.proto.printable import printable

__all__ = [
    "Attempt", "Body", "Envelope", "Onward", "Placement", "Quarantine", "QueueName", "RecipientState", "Unseen", "category_of",
    "decode_envelope", "encode", "held_because", "reply_text",
]  # fmt: skip

# Envelope.flags
EIGHT_BIT: Final = 1
SMTPUTF8: Final = 2
HELD: Final = 8  # (4 was set by older versions and is ignored)
QUARANTINED: Final = 16
DSN: Final = 32  # a DSN that relaymta generated
POLICY_HELD: Final = 64  # held by a hold policy, until that ends
UTF8_HEADER: Final = 128  # given with SMTPUTF8, and its header is not ASCII (RFC 6531 3.2)
UNSEEN: Final = 256  # not delivered before the filters that `Envelope.unseen` names have looked at it; not while it is held

# RecipientState.state
PENDING: Final = 0
DELIVERED: Final = 1
FAILED: Final = 2

# Attempt.kind: the result of an attempt for the recipient.
SUCCESS: Final = "success"
TRANSIENT: Final = "transient"
PERMANENT: Final = "permanent"

# Attempt.category: why it failed, for programs (`cause` in the log; docs/log.md).
CATEGORIES: Final = (
    "refused", "timeout", "network", "dns", "tls", "password", "421", "policy", "reply", "loop", "message", "operator", "expired",
    "local",
)  # fmt: skip

# What the text of an attempt ends with whose reply did not come.
IN_DOUBT: Final = " (in doubt: the message was sent, its reply did not come)"

ATTEMPTS_KEPT: Final = 8
HELD_SHOWN: Final = 200  # characters of the reason why a message is held
ATTEMPT_SHOWN: Final = 500  # characters of a reply to an attempt that is not the last one

# Priority classes; the lower number is delivered first.
CLASSES: Final = {"express": 0, "normal": 1, "bulk": 2}


class QueueName(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The name of a queue: mail of the same route, next-hop domain, application and class waits together."""

    route: str
    domain: str
    application: str = ""
    priority: str = "normal"

    def __str__(self) -> str:
        return _label(self)

    @property
    def label(self) -> str:
        """The queue's name in the log and on the command line; empty parts at the end are left out."""
        return _label(self)


@lru_cache(4096)
def _label(name: QueueName) -> str:
    parts = [name.route, name.domain, name.application, "" if name.priority == "normal" else name.priority]
    while parts and not parts[-1]:
        parts.pop()
    return "/".join(parts)


class Body(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where message data lies on disk: in a frame of a segment, or (segment 0) in a file of its own named by the id."""

    segment: int
    generation: int
    offset: int
    length: int


class Placement(msgspec.Struct, array_like=True):
    """A message's row in one queue: the queue's number, due time, attempts made, and indexes of the recipients (None: all)."""

    queue: int
    due: int
    attempts: int = 0
    indexes: list[int] | None = None


class Unseen(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What filters have to know of a message that they look at after it was accepted, and that nothing else says. `filters`:
    the names of those that have not looked yet. Its message data begins with `above` octets of fields of verification and of
    filters that have looked, then `front` octets of those of the relay; the header as filters see it is behind these. `trusted`:
    its client may relay; `signs`: it is to be signed; `genuine`: SPF or DKIM have passed. The others as of filter.Mail."""

    filters: list[str]
    above: int
    front: int
    trusted: bool
    signs: bool
    genuine: bool
    tls: str = ""
    mechanism: str = ""
    parameters: list[str] = []
    announced: int = 0
    protocol: str = "ESMTP"


class Quarantine(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why a held message is in the quarantine. `since`: ms of the queue's clock; `by`: "filter NAME", "rule NAME", "DMARC" or
    CRASHED; `reason`: one line; `score`: of the filter, None: it gives none; `subject`: as it is shown, one line, cut. `judged`:
    by a verdict, so that it ends with the time that the quarantine keeps mail; else nobody could look at it, and it stays until
    an operator decides."""

    since: int
    by: str
    reason: str
    score: float | None
    subject: str
    judged: bool


class Envelope(msgspec.Struct, array_like=True, gc=False):
    """Everything about a message but its message data and its recipients' histories. `size`: octets of message data."""

    sender: str
    recipients: list[str]
    size: int
    flags: int
    arrived: int
    deadline: int
    client: str = ""
    helo: str = ""
    application: str = ""
    priority: str = "normal"
    body: Body | None = None
    placements: list[Placement] = []
    route: str = ""  # the route that an operator, or a hook, chose for it; "": by the route table
    headers: list[str] = []  # the `header` conditions of routes that its header matches
    user: str = ""  # the login it was submitted with; "": none
    message_id: str = ""  # the value of its Message-ID, MESSAGE_ID_SHOWN characters at most
    held_for: str = ""  # why it is held (`held_because`); "": it is not, or an older version has held it
    listener: str = ""  # the address that it came in on, as in the configuration; "": our own, or an older version took it
    forwarded: dict[str, str] = {}  # what its client has said by XFORWARD of the client that it had it from, by attribute
    unseen: Unseen | None = None  # None: all filters have looked at it
    quarantine: Quarantine | None = None  # None: it is not in the quarantine
    tags: list[str] = []  # words by which its application tells its messages apart, in events
    traceparent: str = ""  # of the request that it came by (W3C Trace Context); "": none
    not_before: int = 0  # when it is tried first at the earliest, by the queue's clock; 0: at once
    receipt: int = 0  # how long after its end it is known how it has ended (ms); 0: it is not


class Onward(NamedTuple):
    """A message that a delivery sends, such as one of a recipient's Sieve script: from `sender` ("": null) to `recipient` and
    `others`, `front` (header fields) with `data` behind it, or (None) with the data of the message at hand."""

    sender: str
    recipient: str
    front: bytes
    data: bytes | None
    others: tuple[str, ...] = ()


# Reasons why a message is held, but for those that quotas, DMARC and filters give.
BY_OPERATOR: Final = "by the operator (queue hold)"
BY_POLICY: Final = "hold policy"  # and which
BY_CRASHES: Final = "a worker died twice while delivering it"
BY_EXPIRY: Final = "it expired before filters had looked at it; its sender may be forged, so there is no DSN"
BY_CRASHES_UNSEEN: Final = "a worker died twice while filters looked at it"

CRASHED: Final = "worker deaths"  # `Quarantine.by` of these


def held_because(reason: str) -> str:
    """A reason why a message is held, for an operator to read: one line of HELD_SHOWN characters at most, what is not printable
    escaped."""
    return printable(reason[:HELD_SHOWN])[:HELD_SHOWN]


def reply_text(code: int, enhanced: str, text: str) -> str:
    """A reply in one line; missing parts (0, "") are left out."""
    return " ".join(part for part in (str(code) if code else "", enhanced, text) if part)


# By enhanced status code, of a failure without a reply (RFC 3463; the subject .6, message content, is a prefix).
_CATEGORY_OF_OURS: Final = {
    "4.4.1": "network", "4.4.2": "network", "4.4.3": "dns", "5.1.2": "dns", "5.1.10": "dns", "5.4.4": "dns", "5.4.6": "loop",
    "5.3.4": "message", "4.7.1": "operator", "5.7.1": "operator",
}  # fmt: skip


def category_of(phase: str, code: int, enhanced: str, text: str = "") -> str:
    """Which of CATEGORIES a failed attempt belongs to, by the peer's reply (or, with code 0, our own sentence `text`)."""
    if code == 421:
        return "421"
    if phase in ("auth", "starttls"):
        return "password" if phase == "auth" else "tls"
    if code:
        return "policy" if enhanced[1:3] == ".7" else "reply"
    if phase == "queue":
        return "expired" if enhanced == "4.4.7" else "operator"
    if text.startswith("timed out"):
        return "timeout"
    return "message" if enhanced[1:3] == ".6" else _CATEGORY_OF_OURS.get(enhanced, "local")


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One try for one recipient: when, the phase in which it ended, the peer, and its reply. `text` is for the sender to read;
    `inside` is the cause that only operators read ("": the same). `category`: the cause for programs, where it does not follow
    from the others (`because`). No field is None."""

    time: int
    kind: str
    phase: str
    peer: str
    code: int
    enhanced: str
    text: str
    inside: str = ""
    category: str = ""

    @property
    def because(self) -> str:
        """Why it failed: one of CATEGORIES."""
        return self.category or category_of(self.phase, self.code, self.enhanced, self.text)

    @property
    def in_doubt(self) -> bool:
        """Whether the peer may have the message all the same: its reply did not come."""
        return (self.inside or self.text).endswith(IN_DOUBT)

    @property
    def whole(self) -> str:
        """The reply as the sender may read it."""
        return reply_text(self.code, self.enhanced, self.text)

    @property
    def cause(self) -> str:
        """The reply or its cause as operators read it."""
        return reply_text(self.code, self.enhanced, self.inside or self.text)

    def __str__(self) -> str:
        return f"{self.cause} ({self.phase}{', ' + self.peer if self.peer else ''})"


def shortened(attempt: Attempt) -> Attempt:
    """An attempt as it is kept once another has followed: with ATTEMPT_SHOWN characters of its reply and of its cause, since a
    recipient has a row of its own with all of them."""
    if max(len(attempt.text), len(attempt.inside)) <= ATTEMPT_SHOWN:
        return attempt
    return msgspec.structs.replace(attempt, text=attempt.text[:ATTEMPT_SHOWN], inside=attempt.inside[:ATTEMPT_SHOWN])


class RecipientState(msgspec.Struct, array_like=True):
    """The state of one recipient, and its last ATTEMPTS_KEPT attempts. It has no row before the first outcome that leaves its
    message in the queue."""

    state: int = PENDING
    attempts: list[Attempt] = []


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
decode_recipient = msgspec.msgpack.Decoder(RecipientState).decode
