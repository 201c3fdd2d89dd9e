"""Receipts: by which an application learns what has become of a message after it was accepted, and by which a message that is
handed in twice is taken once.

    request  digest, part    Kept     what was accepted under an idempotency key, message by message
    receipt  id              Receipt  how a message has ended whose envelope asks for that (`Envelope.receipt`)
    forget   time, table, key         when each of these rows is removed (ms of the queue's clock)

A request's row is committed with its message, a receipt with the end of its message: whenever the machine stops, there is either
both or neither.
"""

import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import msgspec

from relaymta.proto.envelope import DELIVERED, FAILED, Attempt, Envelope, RecipientState, encode

__all__ = [
    "BOUNCED", "DELETED", "FORGOTTEN_TOGETHER", "SENT", "Ended", "Kept", "Receipt", "Request", "digest_of", "due_to_forget",
    "forget", "keep_receipt", "keep_request", "kept", "receipt_of", "states_of",
]  # fmt: skip

DIGEST: Final = 16  # octets
PART = struct.Struct(">I")
TIME = struct.Struct(">Q")
REPLY_KEPT: Final = 500  # characters
FORGOTTEN_TOGETHER: Final = 1000  # rows in one group commit
TABLES: Final = {b"q": "request", b"r": "receipt"}

# Ended.state
SENT: Final = "delivered"
BOUNCED: Final = "bounced"
DELETED: Final = "deleted"


class Request(NamedTuple):
    """What a message belongs to that is handed in under an idempotency key. `digest`: of the key (`digest_of`); `part`: which
    message of the request it is; `content`: a digest of the whole request, by which another one under the same key is noticed;
    `recipients`: those who get it, as they were given; `refused`: those who do not, each with the reply; `keep`: how long this is
    remembered (ms)."""

    digest: bytes
    part: int
    content: bytes
    recipients: list[str]
    refused: list[tuple[str, str]]
    keep: int


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message that was accepted under an idempotency key. `at`: when (ms, UTC); the others as of Request."""

    content: bytes
    ident: int
    at: int
    recipients: list[str]
    refused: list[tuple[str, str]] = []


class Ended(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What has become of a recipient: "delivered", "bounced", or "deleted" (by an operator or a filter). `at`: ms, UTC; `reply`:
    the last one, of `peer`."""

    address: str
    state: str
    at: int
    reply: str = ""
    peer: str = ""
    attempts: int = 0


class Receipt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a message has ended. `user`, `application`: whose it was; `at`: when it left the queue; times are ms, UTC."""

    user: str
    application: str
    sender: str
    message_id: str
    tags: list[str]
    arrived: int
    at: int
    recipients: list[Ended]


_decode_kept = msgspec.msgpack.Decoder(Kept).decode
_decode_receipt = msgspec.msgpack.Decoder(Receipt).decode


def digest_of(owner: str, key: str) -> bytes:
    """The digest under which a request is kept. `owner`: whose key it is; each has keys of its own."""
    return blake2b(f"{owner}\0{key}".encode(), digest_size=DIGEST).digest()


def states_of(envelope: Envelope, states: dict[int, RecipientState], now: int, delivered: Mapping[int, Attempt]) -> list[Ended]:
    """The recipients of a message that leaves the queue now (ms, UTC), by what was kept of each. `delivered`: those whom the
    last attempt has reached."""
    return [
        _ended(address, states.get(index), now, delivered.get(index)) for index, address in enumerate(envelope.recipients)
    ]  # fmt: skip


def _ended(address: str, state: RecipientState | None, now: int, delivered: Attempt | None) -> Ended:
    made = len(state.attempts) if state is not None else 0
    if delivered is not None:
        return Ended(address, SENT, delivered.time, delivered.whole[:REPLY_KEPT], delivered.peer, made + 1)
    if state is None or not state.attempts:
        return Ended(address, SENT if state is not None and state.state == DELIVERED else DELETED, now)
    last = state.attempts[-1]
    how = {DELIVERED: SENT, FAILED: BOUNCED}.get(state.state, DELETED)
    return Ended(address, how, last.time if how != DELETED else now, last.whole[:REPLY_KEPT], last.peer, made)


# In a transaction of the writer thread


def keep_request(txn: Any, tables: dict[str, Any], request: Request, row: Kept, now: int) -> None:
    """Write the row of a request's message. `now`: ms of the queue's clock."""
    key = request.digest + PART.pack(request.part)
    txn.put(key, encode(row), db=tables["request"])
    txn.put(TIME.pack(now + request.keep) + b"q" + key, b"", db=tables["forget"])


def keep_receipt(txn: Any, tables: dict[str, Any], ident: int, row: Receipt, until: int) -> None:
    """Write a receipt, to be kept `until` a time of the queue's clock (ms)."""
    key = ident.to_bytes(8, "big")
    txn.put(key, encode(row), db=tables["receipt"])
    txn.put(TIME.pack(until) + b"r" + key, b"", db=tables["forget"])


def forget(txn: Any, tables: dict[str, Any], now: int) -> int:
    """Remove what was to be kept until `now`, FORGOTTEN_TOGETHER rows at most; how many. A row that was written again, to be kept
    longer, stays: its key has a later time, too."""
    gone = _due(txn, tables, now)
    for entry in gone:
        table, key = entry[8:9], entry[9:]
        txn.delete(entry, db=tables["forget"])
        txn.delete(key, db=tables[TABLES[table]])
    return len(gone)


def _due(txn: Any, tables: dict[str, Any], now: int) -> list[bytes]:
    found: list[bytes] = []
    cursor = txn.cursor(db=tables["forget"])
    more = cursor.first()
    while more and len(found) < FORGOTTEN_TOGETHER:
        key = bytes(cursor.key())
        if TIME.unpack(key[:8])[0] > now:
            break
        found.append(key)
        more = cursor.next()
    return found


# Reading, by any process


def due_to_forget(txn: Any, tables: dict[str, Any], now: int) -> bool:
    """Whether `forget` would remove anything."""
    cursor = txn.cursor(db=tables["forget"])
    return bool(cursor.first()) and TIME.unpack(cursor.key()[:8])[0] <= now


def kept(txn: Any, tables: dict[str, Any], digest: bytes) -> dict[int, Kept]:
    """The messages that were accepted under a key, by part."""
    found: dict[int, Kept] = {}
    if "request" not in tables:  # read only, and an older version wrote it
        return found
    cursor = txn.cursor(db=tables["request"])
    more = cursor.set_range(digest)
    while more and cursor.key()[:DIGEST] == digest:
        found[PART.unpack(cursor.key()[DIGEST:])[0]] = _decode_kept(cursor.value())
        more = cursor.next()
    return found


def receipt_of(txn: Any, tables: dict[str, Any], ident: int) -> Receipt | None:
    """A message's receipt; None: it has none, or has not left the queue."""
    raw = txn.get(ident.to_bytes(8, "big"), db=tables["receipt"]) if "receipt" in tables else None
    return None if raw is None else _decode_receipt(raw)
