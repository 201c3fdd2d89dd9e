"""One shard of the mailboxes: its LMDB environment, the tables, and how they are read.

    mail      0, 4, user, number      UnfinishedRow (the ids of mailboxes begin with 1)
              mailbox, 0              MailboxState
              mailbox, 1, first UID   a block of index records (blocks.py)
              mailbox, 2, UID         MessageRow
              mailbox, 3, MODSEQ      UIDs expunged then, as pairs of first and last; the first pair is 0 and the time (s)
    mailbox   user, name              MailboxRow
    object    id                      ObjectRow: a message's data, once for all mailboxes of the shard
    user      id                      UserRow
    done      queue id, n, user       when that recipient's message was filed for the user, and by which attempt: it is not again
    sieve     user, kind, ...         Sieve scripts, and to whom vacation replies went (scripts.py)
    segment   number                  SegmentRow
    meta      word                    schema, last committed time ("seen"), highest object id, highest mailbox id

Keys begin with the mailbox, so that what a delivery changes lies together; they are big-endian, so that every query is a prefix
scan. Values stay below 2 kB, so that they need no pages of their own, but for these: objects of which ENVELOPE and BODYSTRUCTURE
are long (64 kB at most), what was expunged at once and is not adjacent (8 kB: SLICE of sessions.py), states with many long
keywords (6 kB), and what is unfinished. What a group commit changes: change.py.
"""

import struct
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import msgspec

from relaymta.disk.environment import MAP_SIZE, Environment
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.proto.mime import Description
from relaymta.store.blocks import Blocks

__all__ = [
    "ANSWERED", "DELETED", "DRAFT", "FLAGGED", "INBOX", "KEYWORDS_MOST", "KEYWORD_OCTETS", "SEEN", "MailShard", "MailboxRow",
    "MailboxState", "MessageRow", "ObjectRow", "UnfinishedRow", "UserRow",
]  # fmt: skip

SCHEMA = 3  # 3: the table `sieve`
INBOX: Final = "INBOX"

# Flags of an index record; the bits above are the mailbox's keywords, in the order of MailboxState.keywords.
SEEN, ANSWERED, FLAGGED, DELETED, DRAFT = 1, 2, 4, 8, 16
SYSTEM_FLAGS = 5
KEYWORDS_MOST = 64 - SYSTEM_FLAGS
KEYWORD_OCTETS: Final = 100  # of each: all of them are in the row that every delivery writes

STATE = struct.Struct(">QB")
MESSAGE = struct.Struct(">QBI")
EXPUNGED = struct.Struct(">QBQ")
ID = struct.Struct(">Q")
DONE = struct.Struct(">QIQ")
FILED = struct.Struct(">QI")
ANY_ATTEMPT: Final = (1 << 32) - 1
RUN = struct.Struct("<II")  # first and last UID
MESSAGE_KIND = 2
UNFINISHED = struct.Struct(">QBQQ")

_NAME_MOST = 480  # octets of a mailbox name that are in its key; LMDB takes 511 in all

_TABLES = ("mail", "mailbox", "object", "user", "done", "sieve", "segment", "meta")


class MailboxState(msgspec.Struct, array_like=True, gc=False):
    """What a mailbox's next message gets, and what SELECT and STATUS tell. `recent`: the first UID that no session was told of as
    \\Recent; `octets`: sum of the sizes of its messages; `forgotten`: the MODSEQ up to which it is not known what was expunged;
    `vanished`: how many UIDs are known to be expunged."""

    uidvalidity: int
    uidnext: int = 1
    modseq: int = 1
    messages: int = 0
    unseen: int = 0
    deleted: int = 0
    octets: int = 0
    recent: int = 1
    keywords: list[str] = []
    forgotten: int = 0
    vanished: int = 0


class MessageRow(msgspec.Struct, array_like=True, gc=False):
    """One message in one mailbox. `date`: INTERNALDATE, `saved`: when it came into this mailbox (ms, wall clock); `size`: octets
    with the prefix; `prefix`: header fields of this copy alone (Return-Path, Delivered-To)."""

    object: int
    date: int
    saved: int
    size: int
    prefix: bytes = b""


class ObjectRow(msgspec.Struct, array_like=True, gc=False):
    """A message's data. `references`: rows of mailboxes that point at it; `described`: what FETCH needs of it, None when that is
    too long to be kept (or has not been made: then it is made of the data); `digest`: the first 16 octets of its SHA-256, b""
    where it has not been made."""

    references: int
    body: Body
    described: Description | None = None
    digest: bytes = b""


class UnfinishedRow(msgspec.Struct, array_like=True, gc=False):
    """What has been begun for a user and has not come to its end. `mailbox`: `removed`, it has no name any more, and all that is
    left of it goes; else messages are being filed there: those in `uids` (first and last) go if the others do not come. For those
    others, `messages` and `octets` are reserved: the user has used them already."""

    mailbox: int
    removed: bool
    uids: list[tuple[int, int]] = []
    messages: int = 0
    octets: int = 0


class MailboxRow(msgspec.Struct, array_like=True, gc=False):
    """A name of a user's. `mailbox`: its id, 0 for a name that is only subscribed; `special`: its special use ("\\Sent")."""

    name: str
    mailbox: int
    special: str = ""
    subscribed: bool = False


class UserRow(msgspec.Struct, array_like=True, gc=False):
    """What a user has used, and the UIDVALIDITY of the next mailbox: higher than that of any before it, deleted ones included.
    `frozen`: the user is being moved to another shard; nothing is changed here."""

    octets: int = 0
    messages: int = 0
    uidvalidity: int = 0
    frozen: bool = False


_decode_state = msgspec.msgpack.Decoder(MailboxState).decode
decode_message = msgspec.msgpack.Decoder(MessageRow).decode
decode_object = msgspec.msgpack.Decoder(ObjectRow).decode
_decode_unfinished = msgspec.msgpack.Decoder(UnfinishedRow).decode
_decode_mailbox = msgspec.msgpack.Decoder(MailboxRow).decode
_decode_user = msgspec.msgpack.Decoder(UserRow).decode


def name_key(user: int, name: str) -> bytes:
    """The key of a mailbox's name. Of a name that is too long for LMDB, its beginning and a digest of all of it."""
    raw = name.encode()
    if len(raw) <= _NAME_MOST:
        return ID.pack(user) + raw
    return ID.pack(user) + raw[:_NAME_MOST] + b"\xff" + sha256(raw).digest()[:16]


class MailShard(Environment):
    """The environment of one shard in `path`. Methods with a transaction use the caller's, on any thread."""

    def __init__(self, path: Path, map_size: int = MAP_SIZE, readonly: bool = False, locked: bool = True) -> None:
        super().__init__(path, _TABLES, map_size, readonly, locked)

    def bodies(self) -> int:
        """How many messages there are; one that is in several mailboxes counts once."""
        with self.reading() as txn:
            return int(txn.stat(self.tables["object"])["entries"])

    def _opened(self, txn: Any) -> None:
        """StoreError when a newer version wrote the shard."""
        schema = self.meta_in(txn, b"schema")
        if schema > SCHEMA:
            raise StoreError(f"{self._path} was written by a newer relaymta (mailbox schema {schema}, not {SCHEMA})")

    def user(self, txn: Any, user: int) -> UserRow | None:
        """A user's row; None when this shard does not have the user."""
        raw = txn.get(ID.pack(user), db=self.tables["user"])
        return None if raw is None else _decode_user(raw)

    def users(self, txn: Any) -> Iterator[tuple[int, UserRow]]:
        """All users of the shard, by id."""
        for key, value in txn.cursor(db=self.tables["user"]):
            yield ID.unpack(key)[0], _decode_user(value)

    def user_idents(self, txn: Any, after: int = -1) -> Iterator[int]:
        """The ids of the shard's users above `after`, in their order."""
        cursor = txn.cursor(db=self.tables["user"])
        if cursor.set_range(ID.pack(after + 1)):
            for key in cursor.iternext(values=False):
                yield ID.unpack(key)[0]

    def mailbox(self, txn: Any, user: int, name: str) -> MailboxRow | None:
        """A user's mailbox by its name."""
        raw = txn.get(name_key(user, name), db=self.tables["mailbox"])
        return None if raw is None else _decode_mailbox(raw)

    def mailboxes(self, txn: Any, user: int) -> Iterator[MailboxRow]:
        """All names of a user, in the order of their octets (but for very long ones that begin alike)."""
        prefix = ID.pack(user)
        cursor = txn.cursor(db=self.tables["mailbox"])
        if cursor.set_range(prefix):
            for key, value in cursor:
                if key[:8] != prefix:
                    return
                yield _decode_mailbox(value)

    def count_names(self, txn: Any, user: int) -> int:
        """How many names a user has."""
        prefix = ID.pack(user)
        cursor = txn.cursor(db=self.tables["mailbox"])
        if not cursor.set_range(prefix):
            return 0
        return sum(1 for _ in takewhile(lambda key: key[:8] == prefix, cursor.iternext(keys=True, values=False)))

    def raw_state(self, txn: Any, mailbox: int) -> bytes | None:
        """A mailbox's state as it is stored."""
        raw: bytes | None = txn.get(STATE.pack(mailbox, 0), db=self.tables["mail"])
        return raw

    def state(self, txn: Any, mailbox: int) -> MailboxState | None:
        """A mailbox's state; None when there is no such mailbox."""
        raw = self.raw_state(txn, mailbox)
        return None if raw is None else _decode_state(raw)

    def index(self, txn: Any, mailbox: int) -> Blocks:
        """A mailbox's index records."""
        return Blocks(txn, self.tables["mail"], mailbox)

    def message(self, txn: Any, mailbox: int, uid: int) -> MessageRow | None:
        """A message's row; None when it is not in the mailbox."""
        raw = txn.get(MESSAGE.pack(mailbox, MESSAGE_KIND, uid), db=self.tables["mail"])
        return None if raw is None else decode_message(raw)

    def raw_messages(self, txn: Any, mailbox: int, uids: Iterable[int]) -> list[bytes | None]:
        """The rows of messages, as they are stored; None: it is not in the mailbox."""
        prefix = MESSAGE.pack(mailbox, MESSAGE_KIND, 0)[:9]
        return _values(txn.cursor(db=self.tables["mail"]), [prefix + uid.to_bytes(4, "big") for uid in uids])

    def messages(self, txn: Any, mailbox: int, after: int = 0) -> Iterator[tuple[int, MessageRow]]:
        """(UID, row) of the messages of a mailbox with UIDs above `after`, in their order."""
        cursor = txn.cursor(db=self.tables["mail"])
        prefix = MESSAGE.pack(mailbox, MESSAGE_KIND, 0)[:9]
        if cursor.set_range(MESSAGE.pack(mailbox, MESSAGE_KIND, after + 1)):
            for key, value in cursor:
                if key[:9] != prefix:
                    return
                yield MESSAGE.unpack(key)[2], decode_message(value)

    def expunged(self, txn: Any, mailbox: int, after: int = 0) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(MODSEQ, UIDs as pairs of first and last) of what was expunged above MODSEQ `after`, in its order."""
        cursor = txn.cursor(db=self.tables["mail"])
        prefix = EXPUNGED.pack(mailbox, 3, 0)[:9]
        if cursor.set_range(EXPUNGED.pack(mailbox, 3, after + 1)):
            for key, value in cursor:
                if key[:9] != prefix:
                    return
                yield EXPUNGED.unpack(key)[2], expunged_of(value)[1]

    def unfinished(self, txn: Any, user: int | None = None) -> Iterator[tuple[int, int, UnfinishedRow]]:
        """(user, number, row) of what has not come to its end: for a user, or for all."""
        cursor = txn.cursor(db=self.tables["mail"])
        prefix = UNFINISHED.pack(0, 4, user or 0, 0)[: 9 if user is None else 17]
        if cursor.set_range(prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                _, _, owner, number = UNFINISHED.unpack(key)
                yield owner, number, _decode_unfinished(value)

    def unfinished_row(self, txn: Any, user: int, number: int) -> UnfinishedRow | None:
        """What a user has begun under a number; None when it has come to its end."""
        raw = txn.get(UNFINISHED.pack(0, 4, user, number), db=self.tables["mail"])
        return None if raw is None else _decode_unfinished(raw)

    def object(self, txn: Any, ident: int) -> ObjectRow | None:
        """The row of a message's data; None when no mailbox has it (any more)."""
        raw = txn.get(ID.pack(ident), db=self.tables["object"])
        return None if raw is None else decode_object(raw)

    def raw_objects(self, txn: Any, keys: list[bytes]) -> list[bytes | None]:
        """The rows of messages' data by their keys (ids), as they are stored; None as of `object`."""
        return _values(txn.cursor(db=self.tables["object"]), keys)

    def objects(self, txn: Any, after: int = -1) -> Iterator[tuple[int, ObjectRow]]:
        """The objects of the shard with ids above `after`, by id."""
        cursor = txn.cursor(db=self.tables["object"])
        if cursor.set_range(ID.pack(after + 1)):
            for key, value in cursor:
                yield ID.unpack(key)[0], decode_object(value)

    def points_at(self, txn: Any, ident: int, body: Body) -> bool:
        """Whether an object's row points at this body."""
        row = self.object(txn, ident)
        return row is not None and row.body == body

    def done_of(self, txn: Any, user: int) -> Iterator[tuple[int, int, int]]:
        """(queue id, recipient, attempt: as of `filed_by`) of what was filed for a user, of all that is noted in the shard."""
        for key, value in txn.cursor(db=self.tables["done"]):
            queue_id, recipient, owner = DONE.unpack(key)
            if owner == user:
                yield queue_id, recipient, _attempt_of(value)

    def done_by_queue(self, txn: Any, after: int, most: int) -> list[int]:
        """The ids of messages of the queue of which it is noted that they were filed: so many, above `after`, in order."""
        found: list[int] = []
        cursor = txn.cursor(db=self.tables["done"])
        while len(found) < most and cursor.set_range(ID.pack(after + 1)):
            after = ID.unpack_from(cursor.key())[0]
            found.append(after)
        return found

    def filed_by(self, txn: Any, queue_id: int, recipient: int, user: int) -> int | None:
        """The attempt that has filed this recipient's message for a user (ANY_ATTEMPT: not known); None: none has."""
        raw = txn.get(DONE.pack(queue_id, recipient, user), db=self.tables["done"])
        return None if raw is None else _attempt_of(raw)

    def is_done(self, txn: Any, queue_id: int, recipient: int, user: int) -> bool:
        """Whether this recipient's message was filed for a user."""
        return txn.get(DONE.pack(queue_id, recipient, user), db=self.tables["done"]) is not None


def _attempt_of(value: bytes) -> int:
    attempt: int = FILED.unpack(value)[1] if len(value) == FILED.size else ANY_ATTEMPT
    return attempt


def _values(cursor: Any, keys: list[bytes]) -> list[bytes | None]:
    """What a table has under keys. As long as one follows the other in it, it is not searched for them."""
    found: list[bytes | None] = []
    if keys and cursor.set_range(keys[0]):
        for key, (at, value) in zip(keys, cursor.iternext(keys=True, values=True), strict=False):
            if at != key:
                break
            found.append(value)
    if len(found) < len(keys):
        rest = keys[len(found) :]
        found += map(dict(cursor.getmulti(rest)).get, rest)
    return found


def runs_of(uids: Iterable[int]) -> list[tuple[int, int]]:
    """UIDs, in order, as first and last of each run."""
    runs: list[tuple[int, int]] = []
    for uid in uids:
        if runs and uid == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], uid
        else:
            runs.append((uid, uid))
    return runs


def expunged_value(runs: list[tuple[int, int]], when: int) -> bytes:
    """The value of a row of UIDs that were expunged (s, wall clock)."""
    return b"".join(RUN.pack(*run) for run in ((0, when), *runs))


def expunged_of(value: bytes) -> tuple[int, list[tuple[int, int]]]:
    """When UIDs were expunged (s; 0: unknown), and the UIDs."""
    runs = list(RUN.iter_unpack(value))
    return (0, runs) if runs[0][0] else (runs[0][1], runs[1:])
