"""SEARCH: what a program (proto/imap_program.py) asks of the store, on reader threads.

A slice of the index is searched at a time, some messages of it together, for MILLISECONDS; then others may run. A large message
is read in pieces, and searched as far as its description goes: 64 MB at most (DESCRIBED_MOST of fetch.py). One whose data cannot
be read is searched as if it had none; `mailbox verify` says what is wrong with it.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.proto.imap_program import Batch, Program, Stage
from relaymta.proto.imap_records import RECORD, RECORD_SIZE, joined, load, lower
from relaymta.proto.imap_text import EnvelopeText, FileText, HeaderText, MessageText
from relaymta.proto.mime import PLACE, Description, describe
from relaymta.store.change import Refusal
from relaymta.store.reading import Readable, body_of
from relaymta.store.rows import MessageRow, ObjectRow
from relaymta.view.access import Access
from relaymta.view.fetch import email_id, read_at, with_description
from relaymta.view.reading import Message, after
from relaymta.view.selected import Selected

__all__ = ["UNREADABLE", "bring", "described_of", "first_octets", "now_ms", "searched", "slice_of"]

MILLISECONDS: Final = 5
RECORDS: Final = 4000  # of the index in one slice: some 0.1 ms
TOGETHER: Final = 64  # messages
ROOM: Final = 2 << 20  # octets of message data in memory; or one message. What takes longer to look into counts for more:
WEIGHTS: Final = {Stage.ROW: 0, Stage.ENVELOPE: 32, Stage.HEADER: 4, Stage.BODY: 1}
PART: Final = 512  # octets of the place of a part
PARTS_MOST: Final = 10_000
HEADER_MOST: Final = 1 << 20  # octets of a header
BODIES_MOST: Final = 32  # keys that look into all of a message

_NO_DATA = ObjectRow(0, Body(0, 0, 0, 0))
UNREADABLE: Final = describe(b"")  # of a message that cannot be read


def now_ms() -> int:
    """The time, as `Program` takes it."""
    return time.time_ns() // 1_000_000


async def slice_of(access: Access, selected: Selected, program: Program, behind: int) -> tuple[bytes, int | None]:
    """Search some messages with UIDs above `behind`: the records of those that match, packed, and the UID above which the search
    goes on; None: it is over. StoreError."""
    search = partial(searched, selected.shard, selected.mailbox, program, behind)
    return await access.search(selected.user, search) if program.stages else await access.read_little(search)


def searched(shard: Readable, mailbox: int, program: Program, behind: int) -> tuple[bytes, int | None]:
    """As `slice_of`, on the thread at hand."""
    records = after(shard, mailbox, behind, RECORDS)
    if not records:
        return b"", None
    batch = program.batch(records)
    matching, batch = (b"", None) if batch is None else program.run(batch)
    last = _uid(records, len(records) - RECORD_SIZE)
    if batch is None:
        return matching, last
    found, end = _decided(program, batch, partial(bring, shard, mailbox, room=max(ROOM // max(program.bodies, 1), 1)), behind)
    matching = joined([matching, *found])
    if end is None:
        return matching, last
    return matching[: lower(load([matching]), end + 1) * RECORD_SIZE], end


def _uid(records: bytes, at: int) -> int:
    uid: int = RECORD.unpack_from(records, at)[0]
    return uid


def _decided(
    program: Program, batch: Batch, brought: Callable[[Batch, Stage], tuple[Batch, Batch]], behind: int
) -> tuple[list[bytes], int | None]:
    """The records of messages that match, of those that are undecided; and, when time was short, the UID (above `behind`) up to
    which all is decided."""
    until = time.monotonic() + MILLISECONDS / 1000
    found: list[bytes] = []
    todo = [batch]  # each is in front of the one before it
    while todo:
        end = _uid(todo[-1].records, 0) - 1
        if end > behind and time.monotonic() > until:
            return found, end
        batch, later = todo.pop().divided(TOGETHER)
        batch, rest = brought(batch, program.next_stage(batch))
        matching, undecided = program.run(batch)
        found.append(matching)
        todo += [one for one in (later, rest, undecided) if one]
    return found, None


def bring(shard: Readable, mailbox: int, batch: Batch, stage: Stage, room: int = ROOM) -> tuple[Batch, Batch]:
    """The first messages of a batch, one at least, with what a stage needs of them, and the others, which have to wait until
    there is room (octets); those that have been expunged are in neither. StoreError."""
    name, make = _STAGES[stage]
    taken, bits, data = 0, 0, []
    for message in _messages(shard, mailbox, batch, stage):
        if room <= 0:
            break
        if message is not None and (made := make(shard, message)) is not None:
            bits |= 1 << taken
            data.append(made)
            room -= _weight(message, stage)
        taken += 1
    first, rest = batch.divided(taken)
    first = first.kept(bits)
    setattr(first, name, data)
    return first, rest


def _weight(message: Message, stage: Stage) -> int:
    """How much of the room a message takes."""
    described, octets = message.object.described, min(message.object.body.length, HEADER_MOST)
    if stage == Stage.BODY:
        return octets + PART * (PARTS_MOST if described is None else len(described.parts) // PLACE.size)
    if described is not None:
        octets = min(len(described.envelope) if stage == Stage.ENVELOPE else described.header_end, HEADER_MOST)
    return WEIGHTS[stage] * octets


def _messages(shard: Readable, mailbox: int, batch: Batch, stage: Stage) -> list[Message | None]:
    """The messages of a batch, those that a row alone is needed of without the row of their data; None: it is gone."""
    rows, found = shard.rows, list[Message | None]()
    with rows.reading() as txn:
        for uid, _, flags, modseq in RECORD.iter_unpack(batch.records):
            row = rows.message(txn, mailbox, uid)
            data = None if row is None else _NO_DATA if stage == Stage.ROW else rows.object(txn, row.object)
            found.append(None if row is None or data is None else Message(uid, flags, modseq, row, data))
    return found


# What each stage needs of a message; None: it is gone


def _row(shard: Readable, message: Message) -> MessageRow:
    return message.row


def _envelope(shard: Readable, message: Message) -> EnvelopeText | None:
    described = described_of(shard, message)
    if described is None:
        return None
    return EnvelopeText(described.envelope, partial(email_id, message.object, message.row))


def _header(shard: Readable, message: Message) -> HeaderText | None:
    described = message.object.described
    data = first_octets(shard, message, HEADER_MOST if described is None else described.header_end)
    return None if data is None else HeaderText(message.row.prefix + data)


def _text(shard: Readable, message: Message) -> MessageText | FileText | None:
    if message.object.body.segment:
        data = _data(shard, message)
        return None if data is None else MessageText(message.row.prefix, data)
    described = described_of(shard, message)
    return None if described is None else FileText(message.row.prefix, described.parts, _large(shard, message))


_STAGES: dict[Stage, tuple[str, Callable[[Readable, Message], Any]]] = {
    Stage.ROW: ("rows", _row),
    Stage.ENVELOPE: ("envelopes", _envelope),
    Stage.HEADER: ("headers", _header),
    Stage.BODY: ("bodies", _text),
}


def described_of(shard: Readable, message: Message) -> Description | None:
    """Reader thread: the description of a message; None: it is gone."""
    try:
        return with_description(shard, message).object.described
    except Refusal:
        return None
    except StoreError:
        return UNREADABLE


def first_octets(shard: Readable, message: Message, end: int) -> bytes | None:
    """Reader thread: the data of a message up to `end`, HEADER_MOST at most; b"" where it cannot be read; None: it is gone."""
    body, end = message.object.body, min(end, HEADER_MOST)
    data = _data(shard, message) if body.segment else _large(shard, message)(0, min(end, body.length))
    return None if data is None else data[:end]


def _data(shard: Readable, message: Message) -> bytes | None:
    """The data of a small message."""
    ident = message.row.object
    try:
        return shard.bodies.read(ident, message.object.body)
    except StoreError:  # it may have been moved
        pass
    try:
        return body_of(shard.rows, shard.bodies, ident)
    except Refusal:
        return None
    except StoreError:
        return b""


def _large(shard: Readable, message: Message) -> Callable[[int, int], bytes]:
    """What reads the data of a large message."""
    return partial(_octets, shard.bodies.big_path(message.row.object), message.object.body.offset + FRAME.size)


def _octets(path: Path, offset: int, start: int, end: int) -> bytes:
    try:
        return read_at(path, offset + start, end - start)
    except StoreError:
        return b""
