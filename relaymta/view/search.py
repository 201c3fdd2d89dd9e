"""SEARCH: what a program (proto/imap_program.py) asks of the store, on reader threads.

A slice of the index is searched at a time, some messages of it together, for MILLISECONDS; then others may run, also amid a
message: the next slice goes on there (`Program.turns`). A large message is read in pieces, and searched as far as its description
goes: 64 MB at most (DESCRIBED_MOST of fetch.py). One whose data cannot be read is searched as if it had none; `mailbox verify`
says what is wrong with it.
"""

import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, TypeVar

from relaymta.disk.environment import Shut
from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.proto.imap_program import Batch, Program, Stage
from relaymta.proto.imap_records import RECORD, RECORD_SIZE, joined, load, lower
from relaymta.proto.imap_text import EnvelopeText, FileText, HeaderText, MessageText, Stored, Turns, bodies, objects, undescribed
from relaymta.proto.mime import VERSION, Description, describe
from relaymta.store.change import Refusal
from relaymta.store.reading import Readable, body_of
from relaymta.store.rows import decode_message, decode_object
from relaymta.view.access import Access
from relaymta.view.fetch import described_now, email_id, read_at, with_description
from relaymta.view.reading import Message, TooMuch, after
from relaymta.view.selected import Selected

T = TypeVar("T")

__all__ = ["UNREADABLE", "bring", "described_of", "first_octets", "now_ms", "searched", "slice_of"]

MILLISECONDS: Final = 5
FEW: Final = 200  # messages of a mailbox that is searched on the loop,
KEYS: Final = 10  # where so many keys at most need more than the index,
ON_LOOP: Final = 3  # and milliseconds of that,
AT_FIRST: Final = 8  # with so many messages together, or where they take little time more,
LIGHT: Final = 256 << 10  # and as much as of ROOM for all keys: what has to be decoded takes up to 1 ms for 1 kB of a row
RECORDS: Final = 4000  # of the index in one slice: some 0.1 ms
TOGETHER, TOGETHER_MOST = 64, 256  # messages, and where they take little time
ROOM: Final = 2 << 20  # octets of message data in memory; or one message. What takes longer to look into counts for more:
WEIGHTS: Final = {Stage.ENVELOPE: (0, 32), Stage.HEADER: (4, 0), Stage.BODY: (1, 16)}  # octets: of data, and of its row
UNDESCRIBED: Final = 4 << 20  # a message that has to be read first
HEADER_MOST: Final = 1 << 20  # octets of a header
READ: Final = 1 << 17  # octets of a large message that are read together
BODIES_MOST: Final = 32  # keys that look into all of a message

UNREADABLE: Final = describe(b"")  # of a message that cannot be read


def now_ms() -> int:
    """The time, as `Program` takes it."""
    return time.time_ns() // 1_000_000


async def slice_of(access: Access, selected: Selected, program: Program, behind: int) -> tuple[bytes, int | None]:
    """Search some messages with UIDs above `behind`: the records of those that match, packed, and the UID above which the search
    goes on, perhaps the same; None: it is over. StoreError."""
    search = partial(searched, selected.shard, selected.mailbox, program, behind)
    if not program.stages:
        return await access.read_little(search)
    few = len(selected.view.uids) <= FEW and program.keys <= KEYS
    if few and not behind and max(program.stages) <= Stage.ENVELOPE:
        with suppress(TooMuch, Shut):  # a thread would wait hundreds of times for the interpreter while others have much to do
            return access.read_here(partial(search, now=True))
    return await access.search(selected.user, search)


def searched(shard: Readable, mailbox: int, program: Program, behind: int, now: bool = False) -> tuple[bytes, int | None]:
    """As `slice_of`, on the thread at hand. `now`: on the loop; TooMuch, and nothing is done, where one is not described,
    or more than LIGHT."""
    records = after(shard, mailbox, behind, RECORDS)
    if not records:
        return b"", None
    batch = program.batch(records)
    matching, batch = (b"", None) if batch is None else program.run(batch)
    last = _uid(records, len(records) - RECORD_SIZE)
    if batch is None:
        return matching, last
    room = max((LIGHT if now else ROOM) // max(program.keys, 1), 1)
    bringing = partial(bring, shard, mailbox, room=room, turns=program.turns, now=now)
    found, end = _decided(program, batch, bringing, behind, *((ON_LOOP, AT_FIRST) if now else (MILLISECONDS, TOGETHER)))
    matching = joined([matching, *found])
    if end is None:
        return matching, last
    return matching[: lower(load([matching]), end + 1) * RECORD_SIZE], end


def _uid(records: bytes, at: int) -> int:
    uid: int = RECORD.unpack_from(records, at)[0]
    return uid


def _decided(
    program: Program,
    batch: Batch,
    brought: Callable[[Batch, Stage], tuple[Batch, Batch]],
    behind: int,
    milliseconds: int,
    at_first: int,
) -> tuple[list[bytes], int | None]:
    """The records of messages that match, of those that are undecided; and, when time was short, the UID (`behind` itself, amid
    the first message) up to which all is decided."""
    slice_ = milliseconds / 1000
    until = time.monotonic() + slice_
    program.turns.begin(lambda: time.monotonic() >= until, behind)
    together = 1 if program.turns else at_first
    found: list[bytes] = []
    todo = [batch]  # each is in front of the one before it
    while todo:
        end, now = _uid(todo[-1].records, 0) - 1, time.monotonic()
        if now >= until and (end > behind or program.turns.over):
            return found, end
        batch, later = todo.pop().divided(together)
        batch, rest = brought(batch, program.next_stage(batch))
        matching, undecided = program.run(batch)
        found.append(matching)
        todo += [one for one in (later, rest, undecided) if one]
        took = time.monotonic() - now
        if took > slice_ / 4:
            together = at_first
        elif took < slice_ / 10:
            together = min(2 * together, TOGETHER_MOST)
    return found, None


def bring(
    shard: Readable, mailbox: int, batch: Batch, stage: Stage, room: int = ROOM, turns: Turns | None = None, now: bool = False
) -> tuple[Batch, Batch]:
    """The first messages of a batch, one at least, with what a stage needs of them, and the others, which have to wait until
    there is room (octets); those that have been expunged are in neither. `now`: as of `searched`. StoreError."""
    name, brought, make = _STAGES[stage]
    batch, rows = _there(batch, _rows(shard, mailbox, batch, stage))
    if now and stage != Stage.ROW and (undescribed([data for _, data, _ in rows], VERSION) or _alone(rows, stage) > room):
        raise TooMuch
    data = brought(shard, rows, room, Turns() if turns is None else turns)
    first, rest = batch.divided(len(data))
    first, data = _there(first, data)
    setattr(first, name, Stored(data, make) if make else data)
    return first, rest


def _there(batch: Batch, found: list[T | None]) -> tuple[Batch, list[T]]:
    """The messages of a batch of which something was found, and that."""
    there = [one for one in found if one is not None]
    if len(there) < len(found):
        batch = batch.kept(sum(1 << at for at, one in enumerate(found) if one is not None))
    return batch, there


_Rows = tuple[bytes, bytes, bytes]  # of a message as they are stored, its own and that of its data, and the key of the latter


def _rows(shard: Readable, mailbox: int, batch: Batch, stage: Stage) -> list[_Rows | None]:
    """The rows of the messages of a batch, of a row alone where no more is needed; None: it is gone."""
    rows = shard.rows
    with rows.reading() as txn:
        messages = rows.raw_messages(txn, mailbox, batch.uids)
        if stage == Stage.ROW:
            return [None if row is None else (row, b"", b"") for row in messages]
        keys = objects(messages)
        data = rows.raw_objects(txn, keys)
    every: Any = list(zip(messages, data, keys, strict=True))
    return [None if found is None else (row, found, key) for row, found, key in every] if None in data else every


def _message(row: bytes, found: bytes, *_: bytes) -> Message:
    """A message, without what the index has of it."""
    return Message(0, 0, 0, decode_message(row), decode_object(found))


# What each stage needs of messages, of as many as there is room for: as a `Look` takes it, or made; None: it is gone


def _decoded(shard: Readable, rows: list[_Rows], room: int, turns: Turns) -> list[Any]:
    return [decode_message(row) for row, *_ in rows]


def _envelopes(shard: Readable, rows: list[_Rows], room: int, turns: Turns) -> list[Any]:
    missing = undescribed([data for _, data, _ in rows], VERSION)
    count = _fitting(rows, [0] * len(rows), missing, room, Stage.ENVELOPE)
    found: list[Any] = rows[:count]
    for at in missing[: bisect_left(missing, count)]:
        found[at] = _envelope(shard, _message(*rows[at]), turns)
    return found


def _fitting(rows: list[_Rows], lengths: Iterable[int], missing: list[int], room: int, stage: Stage) -> int:
    """How many messages there is room for, one at least. `lengths`: of their data, as far as it is brought; `missing`: those that
    have to be described first."""
    each, stored = WEIGHTS[stage]
    weights = [each * length + stored * len(row) for length, (_, row, _) in zip(lengths, rows, strict=True)]
    for at in missing:
        weights[at] += UNDESCRIBED
    return min(bisect_left(list(accumulate(weights, initial=0)), room, 1), len(rows))


def _alone(rows: list[_Rows], stage: Stage) -> int:
    """How much room the first message takes, which is brought where there is too little, too."""
    return WEIGHTS[stage][1] * len(rows[0][1]) if rows else 0


def _headers(shard: Readable, rows: list[_Rows], room: int, turns: Turns) -> list[Any]:
    return _with_data(shard, rows, room, Stage.HEADER, _header)


def _texts(shard: Readable, rows: list[_Rows], room: int, turns: Turns) -> list[Any]:
    return _with_data(shard, rows, room, Stage.BODY, partial(_text, turns=turns))


def _with_data(
    shard: Readable, rows: list[_Rows], room: int, stage: Stage, make: Callable[[Readable, Message], Any]
) -> list[Any]:
    """`make`: for those whose data is not where its row says, in a segment."""
    messages, objects, keys = zip(*rows, strict=True) if rows else ((), (), ())
    places = bodies([*objects])
    missing = undescribed([*objects], VERSION) if stage == Stage.BODY else []  # a header alone needs no description
    count = _fitting(rows, (min(length, HEADER_MOST) for *_, length in places), missing, room, stage)
    idents = struct.unpack(f">{count}Q", b"".join(keys[:count]))
    data = shard.bodies.read_many(idents, places[:count])
    found: list[Any] = list(zip(messages, objects, data, strict=False))
    if None in data:
        for at in [at for at, text in enumerate(data) if text is None]:
            found[at] = make(shard, _message(*rows[at]))
    return found


def _envelope(shard: Readable, message: Message, turns: Turns) -> EnvelopeText | None:
    described = _kept(shard, message, turns)
    if described is None:
        return None
    return EnvelopeText(described.envelope, partial(email_id, message.object, message.row))


def _header(shard: Readable, message: Message) -> HeaderText | None:
    described = message.object.described
    data = first_octets(shard, message, HEADER_MOST if described is None else described.header_end)
    return None if data is None else HeaderText(message.row.prefix + data)


def _kept(shard: Readable, message: Message, turns: Turns) -> Description | None:
    """As `described_of`; what had to be described for the turn before is not described anew."""
    ident, described = turns.described
    if ident != message.row.object:
        described = described_of(shard, message)
        if described is not None and not described_now(message):
            described = described._replace(structure=b"")
            turns.described = message.row.object, described
    return described


def _text(shard: Readable, message: Message, turns: Turns) -> MessageText | FileText | None:
    if message.object.body.segment:
        data = _data(shard, message)
        return None if data is None else MessageText(message.row.prefix, data)
    described = _kept(shard, message, turns)
    return None if described is None else FileText(message.row.prefix, described.parts, _large(shard, message))


# What a text is made from, as it was brought


def _envelope_text(row: bytes, found: bytes, key: bytes) -> EnvelopeText:
    message = _message(row, found)
    assert message.object.described is not None
    return EnvelopeText(message.object.described.envelope, partial(email_id, message.object, message.row))


def _header_text(row: bytes, found: bytes, data: bytes) -> HeaderText:
    described = decode_object(found).described
    return HeaderText(decode_message(row).prefix + data[: HEADER_MOST if described is None else described.header_end])


def _message_text(row: bytes, found: bytes, data: bytes) -> MessageText:
    return MessageText(decode_message(row).prefix, data)


_STAGES: dict[Stage, tuple[str, Callable[[Readable, list[_Rows], int, Turns], list[Any]], Callable[..., Any] | None]] = {
    Stage.ROW: ("rows", _decoded, None),
    Stage.ENVELOPE: ("envelopes", _envelopes, _envelope_text),
    Stage.HEADER: ("headers", _headers, _header_text),
    Stage.BODY: ("bodies", _texts, _message_text),
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
    body = message.object.body
    return _File(shard.bodies.big_path(message.row.object), body.offset + FRAME.size, body.length).read


class _File:
    """The data of a large message: `length` octets of a file, of which READ are read together."""

    __slots__ = ("_at", "_length", "_offset", "_path", "_read")

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._path, self._offset, self._length = path, offset, length
        self._at, self._read = 0, b""

    def read(self, start: int, end: int) -> bytes:
        """Octets of it; b"" where they are not all there, or cannot be read."""
        if start < self._at or end > self._at + len(self._read):
            if end - start >= READ:
                return self._octets(start, end)
            self._at, self._read = start, self._octets(start, min(start + READ, self._length)) or self._octets(start, end)
        return self._read[start - self._at : end - self._at]

    def _octets(self, start: int, end: int) -> bytes:
        try:
            return read_at(self._path, self._offset + start, end - start)
        except StoreError:
            return b""
