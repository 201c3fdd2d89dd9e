"""A shard is put in order again: its schedule and counts are made anew from its messages, in one transaction.

What cannot be sent, since its data or its own row is damaged, is written aside first, by the caller, and removed in the same
transaction.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from relaymta.disk.clock import ShardClock
from relaymta.disk.segments import FRAME, MAGIC, SegmentRow, body_file
from relaymta.errors import StoreError
from relaymta.proto.envelope import Envelope, Placement, decode_envelope
from relaymta.queue.change import Change
from relaymta.queue.exported import record_of
from relaymta.queue.group import Assign
from relaymta.queue.store import ID, RECIPIENT, Store

__all__ = ["left_of", "repair"]

DERIVED = ("due", "wake", "expiry", "held", "unseen", "quarantine")  # tables that the messages say all about
PAGE = 500
PIECE = 1 << 20


def left_of(store: Store, clock: ShardClock, bodies: Path, ident: int) -> tuple[bytes, Iterator[bytes]]:
    """What can be read of a message: its record as JSON, else its row as it is; and its data, which may be damaged. Nothing of
    another message. Blocks."""
    with store.reading() as txn:
        raw = txn.get(ID.pack(ident), db=store.tables["message"])
        try:
            envelope = store.fresh.get(ident) if raw is None else decode_envelope(raw)
            if envelope is None:
                return b"", iter(())
            text = msgspec.json.encode(record_of(store, txn, clock, ident, envelope))
        except msgspec.MsgspecError:
            return raw or b"", iter(())
    return text, _data(bodies, ident, envelope)


def _data(bodies: Path, ident: int, envelope: Envelope) -> Iterator[bytes]:
    body = envelope.body
    if body is None:
        return
    try:
        descriptor = os.open(body_file(bodies, ident, body), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        head = os.pread(descriptor, FRAME.size, body.offset)
        start, end = body.offset + FRAME.size, body.offset + FRAME.size + body.length
        if len(head) < FRAME.size or FRAME.unpack(head)[:3] != (MAGIC, body.generation, ident):
            if body.segment:
                return  # another one's, perhaps
            start = 0  # the file has its name: all that is in it
        while start < end and (piece := os.pread(descriptor, min(PIECE, end - start), start)):
            start += len(piece)
            yield piece
    except OSError:
        return
    finally:
        os.close(descriptor)


def repair(store: Store, clock: ShardClock, bodies: Path, damaged: Collection[int], assign: Assign) -> None:
    """Put a shard that nobody else has open in order, without these messages. `assign`: as of the queue, for mail whose queue is
    missing. Blocks. StoreError, lmdb.Error: nothing is changed."""
    change = Change(store)
    try:
        for ident in damaged:
            if not change.txn.delete(ID.pack(ident), db=store.tables["message"]):
                change.end_inlined(ident)
        _remove_strays(store, change)
        for table in DERIVED:
            change.txn.drop(store.tables[table], delete=False)
        for row in list(store.queues(change.txn)):
            own = store.row_numbered(change.txn, row.number)
            own.messages = own.bytes = own.deferred = own.held = own.unseen = own.wake = 0
            own.ages = []
            change.touch(row.number)
        change.set_meta(b"quarantine", 0)
        live: dict[int, list[int]] = {}
        for ident, envelope in _messages(store, change.txn):
            change.end_inlined(ident)  # it has rows of its own
            _replace(store, change, clock, assign, ident, envelope)
            _count(live, envelope)
        for ident, envelope in store.fresh.live():
            if ident not in damaged and change.envelope(ident) is not None:
                _count(live, envelope)
        _segments(store, change, bodies, live)
        change.finish(clock.now())
    except BaseException:
        change.abort()
        raise


def _messages(store: Store, txn: Any) -> Iterator[tuple[int, Envelope]]:
    """All messages with rows, which may be written meanwhile."""
    after = 0
    while True:
        page: list[tuple[int, Envelope]] = []
        cursor = txn.cursor(db=store.tables["message"])
        more = cursor.set_range(ID.pack(after + 1))
        while more and len(page) < PAGE:
            after = ID.unpack(cursor.key())[0]
            page.append((after, decode_envelope(cursor.value())))
            more = cursor.next()
        yield from page
        if not more:
            return


def _remove_strays(store: Store, change: Change) -> None:
    """Remove histories of recipients of messages that are not there."""
    cursor, txn = change.txn.cursor(db=store.tables["recipient"]), change.txn
    more = cursor.first()
    while more:
        ident = RECIPIENT.unpack(cursor.key())[0]
        known = txn.get(ID.pack(ident), db=store.tables["message"]) is not None
        more = cursor.next() if known else cursor.delete() and bool(cursor.key())


def _replace(store: Store, change: Change, clock: ShardClock, assign: Assign, ident: int, envelope: Envelope) -> None:
    """Write all that a message's row says."""
    if any(store.queue(change.txn, placement.queue) is None for placement in envelope.placements):
        everyone = range(len(envelope.recipients))
        waiting = {i for one in envelope.placements for i in (everyone if one.indexes is None else one.indexes)}
        attempts = max(placement.attempts for placement in envelope.placements)
        found = []
        for name, indexes in assign(envelope, attempts):
            mine = [index for index in (everyone if indexes is None else indexes) if index in waiting]
            if mine:
                found.append(Placement(change.row(name).number, clock.now(), attempts, mine))
        envelope.placements = found
        change.replace(ident, envelope)
    for placement in envelope.placements:
        change.place(ident, envelope, placement)
    change.restore_marks(ident, envelope)


def _count(live: dict[int, list[int]], envelope: Envelope) -> None:
    body = envelope.body
    if body is not None and body.segment:
        known = live.setdefault(body.segment, [0, 0, body.generation])
        known[0] += 1
        known[1] += FRAME.size + body.length


def _segments(store: Store, change: Change, bodies: Path, live: dict[int, list[int]]) -> None:
    for number, row in list(store.segment_rows(change.txn)):
        count, octets, _ = live.pop(number, [0, 0, 0])
        change.segment(number, msgspec.structs.replace(row, live=count, live_bytes=octets))
    for number, (count, octets, generation) in live.items():
        path = bodies / f"{number:08d}.seg"
        if not path.exists():
            raise StoreError(f"{path} is missing")
        change.segment(number, SegmentRow(generation, 1, count, octets, path.stat().st_size, True))
