"""A message of the queue as `queue export` writes it beside its data, and `queue import` reads it (the format: docs/queue.md).

Times are seconds since 1970 UTC by the wall clock, with milliseconds. What a version adds gets a new VERSION: another one with
the same number has no other keys.
"""

from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from relaymta.disk.clock import ShardClock
from relaymta.errors import RelayError
from relaymta.ident import format_id, parse_id
from relaymta.proto.address import plain
from relaymta.proto.envelope import (
    CLASSES,
    DELIVERED,
    DSN,
    EIGHT_BIT,
    FAILED,
    HELD,
    PENDING,
    PERMANENT,
    POLICY_HELD,
    QUARANTINED,
    SMTPUTF8,
    SUCCESS,
    TRANSIENT,
    UNSEEN,
    UTF8_HEADER,
    Attempt,
    Envelope,
    Quarantine,
    QueueName,
    RecipientState,
    Unseen,
    encode,
)
from relaymta.queue.store import Store

__all__ = ["VERSION", "Record", "address_of", "print_of", "read", "record_of", "records"]

VERSION = 1
TOGETHER = 4 << 20  # octets of records in one answer, about
MOST = 32 << 20  # octets of a record

FLAGS = {
    "8bitmime": EIGHT_BIT, "smtputf8": SMTPUTF8, "held": HELD, "quarantined": QUARANTINED, "dsn": DSN,
    "policy held": POLICY_HELD, "utf8 header": UTF8_HEADER, "unseen": UNSEEN,
}  # fmt: skip
STATES = {"pending": PENDING, "delivered": DELIVERED, "failed": FAILED}

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Index = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Word = Annotated[str, msgspec.Meta(max_length=4000, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
Line = Annotated[str, msgspec.Meta(max_length=4000, pattern=r"\A[^\x00\r\n]*\Z")]
Reply = Annotated[str, msgspec.Meta(max_length=100_000, pattern=r"\A[^\x00]*\Z")]


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """No other keys than these."""


class Try(Strict):
    """An Attempt."""

    time: Seconds
    result: str
    phase: Word
    peer: Word
    code: Count
    enhanced: Word
    text: Reply
    inside: Reply = ""
    category: Word = ""


class Recipient(Strict):
    """A recipient, its state, and its last attempts."""

    address: Word
    state: str = "pending"
    attempts: list[Try] = []


class Wait(Strict):
    """A queue in which the message waits: its name's parts; `next`: the next attempt; `recipients`: their places in the list of
    recipients (None: all)."""

    route: Word
    domain: Word
    application: Word
    priority: Word
    next: Seconds
    attempts: Count
    recipients: list[Index] | None = None


# What a row can hold (a larger number would end the thread that writes it).
_BOUNDED: dict[Any, Any] = {int: Count, str: Line, list[str]: list[Line]}


def _strict(name: str, of: type[msgspec.Struct]) -> Any:
    """A struct with the fields of an array-like one; `since` is a time."""
    fields = [
        (one.name, Seconds if one.name == "since" else _BOUNDED.get(one.type, one.type)) for one in msgspec.structs.fields(of)
    ]
    return msgspec.defstruct(name, fields, forbid_unknown_fields=True)


if TYPE_CHECKING:
    from typing import Any as QuarantineRecord
    from typing import Any as UnseenRecord
else:
    UnseenRecord = _strict("UnseenRecord", Unseen) | None
    QuarantineRecord = _strict("QuarantineRecord", Quarantine) | None


class Record(Strict):
    """The content of ID.json. `sha256`: of the message data, in hexadecimal digits; "" as a shard makes it."""

    version: int
    id: str
    sender: Word
    recipients: Annotated[list[Recipient], msgspec.Meta(min_length=1, max_length=65535)]
    size: Count
    arrived: Seconds
    expires: Seconds
    flags: list[str]
    waits: Annotated[list[Wait], msgspec.Meta(min_length=1)]
    client: Line = ""
    helo: Line = ""
    application: Word = ""
    priority: Word = "normal"
    route: Word = ""
    headers: list[Word] = []
    user: Line = ""
    message_id: Line = ""
    held_for: Line = ""
    listener: Word = ""
    forwarded: dict[Word, Word] = {}
    tags: list[Word] = []
    traceparent: Word = ""
    unseen: UnseenRecord = None
    quarantine: QuarantineRecord = None
    sha256: str = ""


def print_of(store: Store, txn: Any, ident: int, envelope: Envelope) -> str:
    """What changes with anything that is exported of a message, but for its data, which only changes with its size."""
    rows = [store.queue(txn, placement.queue) for placement in envelope.placements]
    names = [None if row is None else (row.name, row.moved) for row in rows]
    states = sorted(store.recipient_states(txn, ident).items())
    return sha256(encode((msgspec.structs.replace(envelope, body=None), states, names))).hexdigest()[:32]


def record_of(store: Store, txn: Any, clock: ShardClock, ident: int, envelope: Envelope) -> Record:
    """A message as it is in the transaction."""
    states, now = store.recipient_states(txn, ident), clock.now()
    behind = clock.wall(now) - now
    waits, route = [], envelope.route
    for placement in envelope.placements:
        row = store.queue(txn, placement.queue)
        name = QueueName("?", "") if row is None else row.name
        due = placement.due
        if row is not None and row.moved:
            route, due = name.route, min(due, now)
        at = max(0, due + behind) / 1000
        waits.append(Wait(name.route, name.domain, name.application, name.priority, at, placement.attempts, placement.indexes))
    none = RecipientState()
    recipients = [
        Recipient(address, _STATE[(found := states.get(index, none)).state], [_try(one) for one in found.attempts])
        for index, address in enumerate(envelope.recipients)
    ]
    why, unseen = envelope.quarantine, envelope.unseen
    kept = None if why is None else msgspec.structs.asdict(why) | {"since": max(0, why.since + behind) / 1000}
    same = {name: getattr(envelope, name) for name in SAME}
    return Record(
        VERSION, format_id(ident), envelope.sender, recipients, envelope.size, envelope.arrived / 1000,
        max(0, envelope.deadline + behind) / 1000, [word for word, bit in FLAGS.items() if envelope.flags & bit], waits,
        route=route, unseen=None if unseen is None else msgspec.structs.asdict(unseen), quarantine=kept, **same,
    )  # fmt: skip


_STATE = {number: word for word, number in STATES.items()}
SAME = (
    "client", "helo", "application", "priority", "headers", "user", "message_id", "held_for", "listener", "forwarded", "tags",
    "traceparent",
)  # fmt: skip


def _try(attempt: Attempt) -> Try:
    fields = msgspec.structs.asdict(attempt)
    return Try(fields.pop("time") / 1000, fields.pop("kind"), **fields)


def records(store: Store, clock: ShardClock, idents: list[int]) -> list[tuple[int, str, bytes]]:
    """(id, `print_of`, the record as JSON) of these messages, as far as TOGETHER reaches; ("", b"") of one that is not there (any
    more). Blocks."""
    found, octets = [], 0
    for ident in idents:
        with store.reading() as txn:
            envelope = store.envelope(txn, ident)
            if envelope is None:
                found.append((ident, "", b""))
                continue
            record = record_of(store, txn, clock, ident, envelope)
            found.append((ident, print_of(store, txn, ident, envelope), msgspec.json.encode(record)))
        octets += len(found[-1][2])
        if octets > TOGETHER:
            break
    return found


# Reading

_decode = msgspec.json.Decoder(Record).decode


class _Version(msgspec.Struct):
    version: int


def read(text: bytes) -> Record:
    """The record in the content of an ID.json. RelayError names the key that is wrong."""
    if len(text) > MOST:
        raise RelayError(f"it has more than {MOST >> 20} MB")
    try:
        version = msgspec.json.decode(text, type=_Version).version
        if version > VERSION:
            raise RelayError(f"$.version: a newer relaymta wrote this (format {version}; this one reads {VERSION})")
        if version < 1:
            raise RelayError(f"$.version: there is no format {version}")
        record = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RelayError(str(error)) from None
    for key, good in _checked(record):
        if not good:
            raise RelayError(f"$.{key}: this is not what `queue export` writes")
    return record


def address_of(text: str) -> str:
    """The address in a record as it goes into an envelope; "" when it is none."""
    return text if text.lower() == "postmaster" else plain(text) or ""


def _checked(record: Record) -> Any:
    """(key, whether it is as it can be) of what its type does not say."""
    yield "id", _is_id(record.id)
    yield "sender", not record.sender or bool(address_of(record.sender))
    for index, recipient in enumerate(record.recipients):
        at = f"recipients[{index}]"
        yield f"{at}.address", bool(address_of(recipient.address))
        yield f"{at}.state", recipient.state in STATES
        yield f"{at}.attempts", all(one.result in (SUCCESS, TRANSIENT, PERMANENT) for one in recipient.attempts)
    flags = record.flags
    yield "flags", all(word in FLAGS for word in flags) and not {"held", "unseen"} <= set(flags)
    unseen = record.unseen
    yield "unseen", "unseen" not in flags if unseen is None else unseen.above + unseen.front <= record.size
    yield "quarantine", record.quarantine is None or "held" in flags
    yield "priority", record.priority in CLASSES
    yield "waits", _covers(record)
    yield "sha256", len(record.sha256) == 64


def _is_id(text: str) -> bool:
    try:
        return bool(parse_id(text)) and format_id(parse_id(text)) == text
    except ValueError:
        return False


def _covers(record: Record) -> bool:
    """Whether each pending recipient waits in one queue, and nobody in two."""
    everyone = range(len(record.recipients))
    waiting = [index for wait in record.waits for index in (everyone if wait.recipients is None else wait.recipients)]
    pending = {index for index in everyone if record.recipients[index].state == "pending"}
    names = {(wait.route, wait.domain, wait.application, wait.priority) for wait in record.waits}
    return (
        len(waiting) == len(set(waiting)) and set(waiting) <= set(everyone) and pending <= set(waiting) and bool(pending)
        and len(names) == len(record.waits) and all(wait.priority in CLASSES for wait in record.waits)
    )  # fmt: skip
