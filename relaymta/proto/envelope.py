"""Envelope, recipient and outcome as data, and their stored form (msgpack arrays; fields are only ever appended).

Times are milliseconds: `arrived` and attempt times by the wall clock (UTC), `deadline` and `due` by the queue's clock.
"""

from functools import lru_cache
from typing import Final

import msgspec

__all__ = ["Attempt", "Body", "Envelope", "Placement", "QueueName", "RecipientState", "decode_envelope", "encode", "reply_text"]

# Envelope.flags
EIGHT_BIT: Final = 1
SMTPUTF8: Final = 2
HELD: Final = 8  # (4 is set in spools of older versions, and means nothing)
QUARANTINED: Final = 16
NOTICE: Final = 32  # a DSN of our own
ORDERED: Final = 64  # held by a standing order, until that ends

# RecipientState.state
PENDING: Final = 0
DELIVERED: Final = 1
FAILED: Final = 2

# Attempt.kind: what an attempt's result means for the recipient.
SUCCESS: Final = "success"
TRANSIENT: Final = "transient"
PERMANENT: Final = "permanent"

ATTEMPTS_KEPT: Final = 8

# Priority classes, the first goes first.
CLASSES: Final = {"express": 0, "normal": 1, "bulk": 2}


class QueueName(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which messages wait together: the same route, next-hop domain, application and class."""

    route: str
    domain: str
    application: str = ""
    priority: str = "normal"

    def __str__(self) -> str:
        return _label(self)

    @property
    def label(self) -> str:
        """As people and the log name the queue."""
        return _label(self)


@lru_cache(4096)
def _label(name: QueueName) -> str:
    parts = [name.route, name.domain, name.application, "" if name.priority == "normal" else name.priority]
    while parts and not parts[-1]:
        parts.pop()
    return "/".join(parts)


class Body(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a message's text lies: a frame in a segment, or (segment 0) a file of its own named by the id."""

    segment: int
    generation: int
    offset: int
    length: int


class Placement(msgspec.Struct, array_like=True):
    """A message's row in one queue: when it is due, attempts made, and which recipients (None: all)."""

    queue: int
    due: int
    attempts: int = 0
    indexes: list[int] | None = None


class Envelope(msgspec.Struct, array_like=True):
    """Everything about a message but its text and its recipients' histories."""

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
    route: str = ""  # the route that an operator chose for it; "": as the table says
    headers: list[str] = []  # the `header` conditions of routes that its header fields meet
    user: str = ""  # who had logged in


def reply_text(code: int, enhanced: str, text: str) -> str:
    """A reply as people read it; what is missing (0, "") is left out."""
    return " ".join(part for part in (str(code) if code else "", enhanced, text) if part)


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One try at one recipient: when, how far it came, against whom, and what was said: `text`, which the sender may read, and
    `inside`, the cause, where operators may read more. Never null."""

    time: int
    kind: str
    phase: str
    peer: str
    code: int
    enhanced: str
    text: str
    inside: str = ""

    @property
    def whole(self) -> str:
        """The reply, as the sender may read it."""
        return reply_text(self.code, self.enhanced, self.text)

    @property
    def cause(self) -> str:
        """The reply or its cause, as operators read it."""
        return reply_text(self.code, self.enhanced, self.inside or self.text)

    def __str__(self) -> str:
        return f"{self.cause} ({self.phase}{', ' + self.peer if self.peer else ''})"


class RecipientState(msgspec.Struct, array_like=True):
    """How far one recipient is; `attempts` are the last eight. There is no row before the first unfinished attempt."""

    state: int = PENDING
    attempts: list[Attempt] = []


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
decode_recipient = msgspec.msgpack.Decoder(RecipientState).decode
