"""Whether a shard contradicts itself: rows against messages, counts against rows, bodies against checksums. It only reads.

Memory does not grow with the number of messages (8 octets for each of those that are damaged, and a row for each queue and
segment). While a daemon has the shard, each page of messages is one short transaction: then counts cannot be compared, and what
is in files without a message may be coming in.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from relaymta.disk.segments import FRAME, body_file, check_frame, digest_of, read_frame
from relaymta.errors import StoreError
from relaymta.ident import format_id
from relaymta.proto.envelope import (
    DELIVERED,
    FAILED,
    HELD,
    UNSEEN,
    Body,
    Envelope,
    RecipientState,
    decode_envelope,
)
from relaymta.queue.fresh import Fresh
from relaymta.queue.store import (
    DUE,
    EXPIRY,
    HELD_KEY,
    ID,
    QUARANTINE_KEY,
    RECIPIENT,
    WAKE,
    QueueRow,
    Store,
)

__all__ = ["DATA", "FILE", "NOTE", "ROWS", "Fault", "faults", "is_sound", "missing_body"]

PAGE = 500  # messages, or rows, of one transaction
COMING_IN = 3600.0  # seconds in which a file without a message may be one that is being received

# What a fault is about: a message's data or own row; rows that can be made again from the messages; nothing that harms; or
# a file of LMDB, which cannot be repaired.
DATA, ROWS, NOTE, FILE = "data", "rows", "note", "file"


class Fault(NamedTuple):
    """One contradiction. `ident`: of the message whose data is damaged, 0: none; `what`: DATA, ROWS or NOTE; `text`: a
    sentence."""

    ident: int
    what: str
    text: str


class _Counts:
    """What the rows of the messages add up to."""

    def __init__(self) -> None:
        self.queues: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])  # messages, octets, deferred, held, unseen
        self.segments: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # bodies, octets
        self.judged = 0  # octets in the quarantine

    def add(self, envelope: Envelope, inlined: bool) -> None:
        """Count a message."""
        body, flags = envelope.body, envelope.flags
        if body is not None and body.segment:
            self.segments[body.segment][0] += 1
            self.segments[body.segment][1] += FRAME.size + body.length
        for placement in envelope.placements if not inlined else ():
            own = (1, envelope.size, bool(placement.attempts), bool(flags & HELD), bool(flags & UNSEEN and not flags & HELD))
            self.queues[placement.queue] = [a + b for a, b in zip(self.queues[placement.queue], own, strict=True)]
        if envelope.quarantine is not None and envelope.quarantine.judged and flags & HELD:
            self.judged += envelope.size


def faults(store: Store, bodies: Path, steady: bool, data: bool = True) -> Iterator[Fault]:
    """The faults of a shard. `bodies`: its folder of bodies; `steady`: nobody changes it; `data`: read the message data, too.
    Blocks. StoreError when the shard cannot be read."""
    counts = _Counts()
    after = 0
    while True:
        found, places, after = _messages(store, after, counts)
        yield from found
        if data:
            for ident, body in places:
                text = missing_body(bodies, ident, body)
                if text and _still(store, ident, body):
                    yield Fault(ident, DATA, f"message {format_id(ident)}: {text}")
        if not after:
            break
    for table in ("due", "held", "expiry", "unseen", "quarantine", "recipient", "wake"):
        yield from _strays(store, table)
    if steady:
        yield from _sums(store, counts)
    yield from _files(store, bodies, steady)


def is_sound(store: Store, bodies: Path) -> str:
    """The first fault of a shard that nobody changes, "" when there is none."""
    return next((fault.text for fault in faults(store, bodies, True) if fault.what != NOTE), "")


def _fresh(store: Store, txn: Any) -> dict[int, Envelope]:
    """The inlined messages as a transaction sees them: another process may own the shard."""
    found = Fresh(store.tables["fresh"], store.tables["ended"])
    found.load(txn, 0)
    return dict(found.live())


def _messages(store: Store, after: int, counts: _Counts) -> tuple[list[Fault], list[tuple[int, Body]], int]:
    """A page of messages: their faults, their bodies, and the last id (0: there are no more)."""
    found: list[Fault] = []
    places: list[tuple[int, Body]] = []
    with store.reading() as txn:
        fresh = _fresh(store, txn)
        cursor = txn.cursor(db=store.tables["message"])
        more = cursor.set_range(ID.pack(after + 1))
        rows = 0
        while more and rows < PAGE:
            rows += 1
            after = ID.unpack(cursor.key())[0] if len(cursor.key()) == ID.size else after
            try:
                envelope = decode_envelope(cursor.value())
            except msgspec.MsgspecError as error:
                found.append(Fault(after, DATA, f"message {format_id(after)}: its row cannot be read: {error}"))
            else:
                found += _message(store, txn, after, envelope, after in fresh)
                counts.add(envelope, False)
                if envelope.body is not None:
                    places.append((after, envelope.body))
            more = cursor.next()
        if not more:
            for ident, envelope in fresh.items():
                rows_of = [store.queue(txn, placement.queue) for placement in envelope.placements]
                if None in rows_of or not rows_of:
                    found.append(Fault(0, ROWS, f"message {format_id(ident)}: its queue is missing"))
                counts.add(envelope, True)
                if envelope.body is not None:
                    places.append((ident, envelope.body))
    return found, places, after if more else 0


def _message(store: Store, txn: Any, ident: int, envelope: Envelope, twice: bool) -> Iterator[Fault]:
    """What is wrong with the rows of a message that has rows of its own."""
    name = f"message {format_id(ident)}"
    flags = envelope.flags

    def has(key: bytes, table: str) -> bool:
        return txn.get(key, db=store.tables[table]) is not None

    if twice:
        yield Fault(0, ROWS, f"{name} is there twice")
    if envelope.body is None:
        yield Fault(ident, DATA, f"{name} has no body")
    states: dict[int, RecipientState] = {}
    try:
        states = store.recipient_states(txn, ident)
    except msgspec.MsgspecError as error:
        yield Fault(ident, DATA, f"{name}: the row of a recipient cannot be read: {error}")
    everyone = range(len(envelope.recipients))
    if set(states) - set(everyone):
        yield Fault(ident, DATA, f"{name} has histories of more recipients than it has")
    waiting = [i for placement in envelope.placements for i in (everyone if placement.indexes is None else placement.indexes)]
    pending = {i for i in everyone if i not in states or states[i].state not in (DELIVERED, FAILED)}
    if not pending <= set(waiting) or not set(waiting) <= set(everyone) or not envelope.placements:
        yield Fault(ident, DATA, f"{name}: not all of its recipients wait in a queue")
    for placement in envelope.placements:
        if store.queue(txn, placement.queue) is None:
            yield Fault(0, ROWS, f"{name}: its queue is missing")
        due = has(DUE.pack(placement.queue, placement.due, ident), "due")
        if due != (not flags & (HELD | UNSEEN)):
            yield Fault(0, ROWS, f"{name} is {'in the schedule, and should not be' if due else 'not in the schedule'}")
        if has(HELD_KEY.pack(placement.queue, ident), "held") != bool(flags & HELD):
            yield Fault(0, ROWS, f"{name}: whether it is held is not known")
    if has(EXPIRY.pack(envelope.deadline, ident), "expiry") == bool(flags & HELD):
        yield Fault(0, ROWS, f"{name}: when it expires is not known, or it should not expire")
    kept = envelope.quarantine
    known = kept is None or not flags & HELD or "quarantine" not in store.tables
    if not known and kept is not None and not has(QUARANTINE_KEY.pack(kept.judged, ident), "quarantine"):
        yield Fault(0, ROWS, f"{name} is not in the quarantine, where it should be")


_KEYS: dict[str, Callable[[bytes], int]] = {
    "due": lambda key: DUE.unpack(key)[2],
    "held": lambda key: HELD_KEY.unpack(key)[1],
    "expiry": lambda key: EXPIRY.unpack(key)[1],
    "unseen": lambda key: ID.unpack(key[1:])[0],
    "quarantine": lambda key: ID.unpack(key[1:])[0],
    "recipient": lambda key: RECIPIENT.unpack(key)[0],
}


def _strays(store: Store, table: str) -> Iterator[Fault]:
    """Rows of a table that no message has, or (wake) no queue."""
    if table not in store.tables:
        return
    after, more = b"", True
    while more:
        found: list[Fault] = []
        with store.reading() as txn:
            cursor = txn.cursor(db=store.tables[table])
            more = cursor.set_range(after + b"\0") if after else cursor.first()
            for _ in range(PAGE):
                if not more:
                    break
                after = bytes(cursor.key())
                text = _stray(store, txn, table, after)
                if text:
                    found.append(Fault(0, ROWS, text))
                more = cursor.next()
        yield from found


def _stray(store: Store, txn: Any, table: str, key: bytes) -> str:
    try:
        if table == "wake":
            at, number = WAKE.unpack(key)
            row = store.queue(txn, number)
            return "" if row is not None and row.wake == at else f"queue {number} is to be looked at, and does not know it"
        ident = _KEYS[table](key)
        raw = txn.get(ID.pack(ident), db=store.tables["message"])
        if raw is None:
            return f"the table {table} has message {format_id(ident)}, which is not in the queue"
        if table == "due":
            queue, at, _ = DUE.unpack(key)
            if not any((placement.queue, placement.due) == (queue, at) for placement in decode_envelope(raw).placements):
                return f"message {format_id(ident)} is in the schedule at another time"
    except msgspec.MsgspecError:
        return ""  # said before
    except Exception as error:
        return f"the table {table} has a malformed row: {error}"
    return ""


def _sums(store: Store, counts: _Counts) -> Iterator[Fault]:
    """What rows of queues and segments count."""
    with store.reading() as txn:
        cursor = txn.cursor(db=store.tables["queue"])
        for key, value in cursor:
            if key[:1] != b"q":
                continue
            try:
                row = msgspec.msgpack.decode(value, type=QueueRow)
            except msgspec.MsgspecError as error:
                yield Fault(0, ROWS, f"the row of a queue cannot be read: {error}")
                continue
            own = counts.queues.pop(row.number, [0] * 5)
            if own != [row.messages, row.bytes, row.deferred, row.held, row.unseen]:
                yield Fault(0, ROWS, f"queue {row.name}: its counts are wrong")
            first = next(store.due(txn, row.number), None)
            awake = bool(row.wake) and txn.get(WAKE.pack(row.wake, row.number), db=store.tables["wake"]) is not None
            if (first is None) == awake:
                yield Fault(0, ROWS, f"queue {row.name} would not be looked at, or is without need")
        for number in counts.queues:
            yield Fault(0, ROWS, f"queue {number} has messages and no row")
        for number, segment in store.segment_rows(txn):
            if counts.segments.pop(number, [0, 0]) != [segment.live, segment.live_bytes]:
                yield Fault(0, ROWS, f"segment {number}: its counts are wrong")
        for number in counts.segments:
            yield Fault(0, ROWS, f"segment {number} has message data and no row")
        if "quarantine" in store.tables and store.meta_in(txn, b"quarantine") != counts.judged:
            yield Fault(0, ROWS, "the octets in the quarantine are counted wrong")


def _still(store: Store, ident: int, body: Body) -> bool:
    """Whether a message is in the queue with this body."""
    with store.reading() as txn:
        raw = txn.get(ID.pack(ident), db=store.tables["message"])
        envelope = decode_envelope(raw) if raw is not None else _fresh(store, txn).get(ident)
    return envelope is not None and envelope.body == body


def missing_body(bodies: Path, ident: int, body: Body) -> str:
    """What is wrong with the data of a message; "": nothing. Blocks."""
    path = bodies
    try:
        path = body_file(bodies, ident, body)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    try:
        if body.segment:
            read_frame(descriptor, ident, body)
        else:
            digest, length = digest_of(descriptor, body.offset + FRAME.size)
            check_frame(os.pread(descriptor, FRAME.size, body.offset), ident, body, length, digest)
    except StoreError as error:
        return f"{path}: {error}"
    except OSError as error:
        return f"{path}: {error.strerror}"
    finally:
        os.close(descriptor)
    return ""


def _files(store: Store, bodies: Path, steady: bool) -> Iterator[Fault]:
    """Files of large messages without a message. The next start removes them."""
    for path in bodies.glob("big/*"):
        try:
            ident, old = int(path.stem, 16), time.time() - path.stat().st_mtime > COMING_IN
        except (ValueError, OSError):
            continue
        if not steady and not old:
            continue
        with store.reading() as txn:
            raw = txn.get(ID.pack(ident), db=store.tables["message"])
            known = raw is not None or ident in _fresh(store, txn)
        if not known:
            yield Fault(0, NOTE, f"{path} has no message: the next start removes it")
