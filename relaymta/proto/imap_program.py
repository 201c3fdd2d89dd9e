"""SEARCH (RFC 9051 6.4.4, RFC 5032, RFC 7162 3.1.5, RFC 8474, RFC 8514): the program that search keys are compiled to.

A program decides about messages in stages, from what is at hand to what is dear: index records, rows, the cached ENVELOPE, the
header, the body. After each stage a message matches, does not, or is undecided; only undecided ones go on to the next. The caller
brings the data, for as many messages at a time as it likes:

    batch = program.batch(records)                  # a slice of the index
    while batch:
        matching, batch = program.run(batch)        # packed records; the undecided ones
        if batch:
            batch.rows = [...]                      # or what else `program.next_stage(batch)` names, for batch.uids

Three-valued logic on bitmaps, one bit for each message: (true, undecided).
"""

from collections.abc import Callable, Sequence
from datetime import date
from enum import IntEnum
from functools import partial
from itertools import compress
from operator import eq, ge, gt, le, lt
from typing import Any, NamedTuple, Protocol

from relaymta.proto.imap_command import (
    Age,
    And,
    Day,
    Field,
    Flagged,
    Key,
    Modified,
    Not,
    Numbers,
    ObjectId,
    Or,
    Size,
    Text,
    Within,
)
from relaymta.proto.imap_records import LAST_UID, RECORD_SIZE, load, lower, pick, ranges_of, select, values, within
from relaymta.proto.imap_text import (
    BODY,
    FIELDS,
    HEADERS,
    TEXT,
    EnvelopeText,
    FileText,
    HeaderText,
    Look,
    MessageText,
    Stored,
    Turns,
    look_at_envelopes,
    look_at_texts,
)
from relaymta.proto.imap_view import View
from relaymta.proto.mime_text import comparable

__all__ = ["Batch", "Program", "Row", "Stage"]

DAY = 86_400_000  # ms
EPOCH = date(1970, 1, 1).toordinal()
RECENT = "\\recent"


# What the caller brings


class Stage(IntEnum):
    """How dear it is to know something."""

    INDEX = 0
    ROW = 1
    ENVELOPE = 2
    HEADER = 3
    BODY = 4


class Row(Protocol):
    """A message's row. `date`, `saved`: INTERNALDATE and save date (ms, UTC); `size`: RFC822.SIZE."""

    date: int
    saved: int
    size: int


_BROUGHT = ("rows", "envelopes", "headers", "bodies")


class Batch:
    """Messages about which nothing is decided yet. `records`: of the index; the rest: for each of them in that order, set by the
    caller stage by stage."""

    __slots__ = ("bodies", "envelopes", "headers", "records", "rows", "turns")

    def __init__(self, records: bytes, turns: Turns | None = None) -> None:
        """`turns`: of the search, when it is done in slices."""
        self.records = records
        self.turns = Turns() if turns is None else turns
        self.rows: Sequence[Row] | None = None
        self.envelopes: Sequence[EnvelopeText] | None = None
        self.headers: Sequence[HeaderText] | None = None
        self.bodies: Sequence[MessageText | FileText] | None = None

    def __len__(self) -> int:
        return len(self.records) // RECORD_SIZE

    @property
    def uids(self) -> Sequence[int]:
        """The UIDs of the messages."""
        return values(load([self.records]))

    def data(self, stage: Stage) -> Sequence[Any] | None:
        """What the caller has brought for a stage."""
        return (self.records, self.rows, self.envelopes, self.headers, self.bodies)[stage]

    def divided(self, count: int) -> "tuple[Batch, Batch]":
        """The first messages, and the others."""
        return self._part(0, count), self._part(count, len(self))

    def _part(self, start: int, end: int) -> "Batch":
        batch = Batch(self.records[start * RECORD_SIZE : end * RECORD_SIZE], self.turns)
        for name in _BROUGHT:
            if (found := getattr(self, name)) is not None:
                setattr(batch, name, found[start:end])
        return batch

    def kept(self, bits: int) -> "Batch":
        """The messages whose bits are set, with what is known of them."""
        octets = _octets(bits, len(self))
        batch = Batch(pick(self.records, octets), self.turns)
        wanted = [octets[at >> 3] >> (at & 7) & 1 for at in range(len(self))]
        for name in _BROUGHT:
            if (found := getattr(self, name)) is not None:
                setattr(batch, name, found.chosen(wanted) if isinstance(found, Stored) else list(compress(found, wanted)))
        return batch


# The program


class _Node(NamedTuple):
    """A part of the program. `stages`: those that it may need; `bits(batch, care)`: (true, undecided) among the bits of
    `care`."""

    stages: frozenset[Stage]
    bits: Callable[[Batch, int], tuple[int, int]]


class Program:
    """A search. `stages`: which data it may need; `by_number`: it names message numbers, so no EXPUNGE may be told during UID
    SEARCH; `keys`: how many keys need more than the index; `bodies`: how many look into all of a message; `turns`: how far it
    has come in those that it is amid."""

    def __init__(self, key: Key, view: View, now: int) -> None:
        """Compile a search key for a session. `now`: ms, for YOUNGER and OLDER."""
        self._last = view.uids.last
        self.by_number = False
        self.keys = self.bodies = 0
        self.turns = Turns()
        self._root = self._node(key, view, now)
        self.stages = self._root.stages

    def batch(self, records: bytes) -> Batch | None:
        """The messages of a slice of the index that the client has numbers for; None when there are none."""
        known = records[: lower(load([records]), self._last + 1) * RECORD_SIZE] if self._last < LAST_UID else records
        return Batch(known, self.turns) if known else None

    def run(self, batch: Batch) -> tuple[bytes, Batch | None]:
        """The records of messages that match, packed; those that are undecided, for which `next_stage` names what is missing, or
        whose texts have not been searched in this turn."""
        every = (1 << len(batch)) - 1
        true, open_ = self._root.bits(batch, every)
        matching = pick(batch.records, _octets(true, len(batch))) if true else b""
        return matching, batch.kept(open_) if open_ else None

    def next_stage(self, batch: Batch) -> Stage:
        """The data that an undecided batch lacks, before the turn is over."""
        return min(stage for stage in self.stages if batch.data(stage) is None)

    def _node(self, key: Key, view: View, now: int) -> _Node:
        match key:
            case And(keys):
                return _all_of([self._node(one, view, now) for one in keys])
            case Or(one, other):
                return _any_of([self._node(one, view, now), self._node(other, view, now)])
            case Not(inner):
                return _inverse(self._node(inner, view, now))
            case Within(numbers, uid):
                self.by_number |= not uid and not numbers.saved
        node = _COMPILED[type(key)](key, view, now)
        self.keys += bool(node.stages)
        self.bodies += Stage.BODY in node.stages
        return node


def _all_of(nodes: list[_Node]) -> _Node:
    nodes.sort(key=lambda node: max(node.stages, default=Stage.INDEX))

    def bits(batch: Batch, care: int) -> tuple[int, int]:
        open_ = 0
        for node in nodes:
            true, maybe = node.bits(batch, care)
            care, open_ = true | maybe, (open_ | maybe) & (true | maybe)
            if not care:
                break
        return care & ~open_, open_

    return _Node(frozenset(stage for node in nodes for stage in node.stages), bits)


def _any_of(nodes: list[_Node]) -> _Node:
    return _inverse(_all_of([_inverse(node) for node in nodes]))


def _inverse(node: _Node) -> _Node:
    def bits(batch: Batch, care: int) -> tuple[int, int]:
        true, maybe = node.bits(batch, care)
        return care & ~(true | maybe), maybe

    return _Node(node.stages, bits)


def _octets(bits: int, count: int) -> bytes:
    return bits.to_bytes((count + 7) // 8, "little")


# Keys that the index answers


def _indexed(found: Callable[[bytes], bytes]) -> _Node:
    """`found`: a bitmap of records."""
    return _Node(frozenset(), lambda batch, care: (int.from_bytes(found(batch.records), "little") & care, 0))


def _constant(result: bool) -> _Node:
    return _Node(frozenset(), lambda batch, care: (care if result else 0, 0))


def _flagged(key: Flagged, view: View, now: int) -> _Node:
    if key.flag.lower() == RECENT:
        return _in_ranges(ranges_of([(view.recent, view.until - 1)] if view.recent < view.until else []))
    bit = view.flag_bit(key.flag)
    return _constant(False) if bit is None else _indexed(lambda records: select(records, 1 << bit, 0, 0, 0))


def _within_set(key: Within, view: View, now: int) -> _Node:
    """Message numbers beyond the last one match nothing: elsewhere they are an error, but programs search for them."""
    numbers = key.numbers
    if not key.uid and not numbers.saved:
        last = len(view)
        numbers = Numbers(tuple((low, min(high, last)) for low, high in numbers.resolved(last) if low <= last))
    return _in_ranges(view.ranges(numbers, key.uid))


def _in_ranges(ranges: bytes) -> _Node:
    return _indexed(lambda records: within(records, ranges)) if ranges else _constant(False)


def _modified(key: Modified, view: View, now: int) -> _Node:
    return _indexed(lambda records: select(records, 0, 0, 0, key.modseq))


# Keys that need more of a message


def _decided(stage: Stage, test: Callable[[Any], bool]) -> _Node:
    """`test`: whether a message matches, by the data of a stage."""
    return _looked_at(stage, None, test)


def _looked_at(stage: Stage, look: Look | None, test: Callable[[Any], bool]) -> _Node:
    """`look`: what tells of most messages whether they match; `test`: of those of its other bitmap."""

    def bits(batch: Batch, care: int) -> tuple[int, int]:
        data = batch.data(stage)
        if data is None:
            return 0, care
        if look is None or not isinstance(data, Stored):
            return _where(test, data, care), 0
        true, asked = (int.from_bytes(told, "little") for told in look(data.messages, _octets(care, len(data))))
        return true | (_where(test, data, asked) if asked else 0), 0

    return _Node(frozenset({stage}), bits)


def _where(test: Callable[[Any], bool], data: Sequence[Any], care: int) -> int:
    """A bitmap of the data among `care` that passes a test."""
    marks = bytearray((len(data) + 7) // 8)
    cared = care.to_bytes(len(marks), "little")
    for at in range(len(data)):
        if cared[at >> 3] >> (at & 7) & 1 and test(data[at]):
            marks[at >> 3] |= 1 << (at & 7)
    return int.from_bytes(marks, "little")


_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {"<": lt, "=": eq, ">": ge}


def _day(key: Day, view: View, now: int) -> _Node:
    """A day as Date: says it; of an INTERNALDATE and a save date in UTC, as they are shown."""
    holds, wanted = _RELATIONS[key.how], key.day.toordinal() - EPOCH
    match key.which:
        case "SENT":
            return _decided(Stage.ENVELOPE, lambda found: (sent := found.sent()) is not None and holds(sent, key.day))
        case "SAVED":
            return _decided(Stage.ROW, lambda row: holds(row.saved // DAY, wanted))
        case _:
            return _decided(Stage.ROW, lambda row: holds(row.date // DAY, wanted))


def _age(key: Age, view: View, now: int) -> _Node:
    holds, target = le if key.older else ge, now // 1000 - key.seconds
    return _decided(Stage.ROW, lambda row: holds(row.date // 1000, target))


def _size(key: Size, view: View, now: int) -> _Node:
    holds = gt if key.larger else lt
    return _decided(Stage.ROW, lambda row: holds(row.size, key.octets))


def _object_id(key: ObjectId, view: View, now: int) -> _Node:
    if key.which == "THREADID":  # no message has one
        return _constant(False)
    return _decided(Stage.ENVELOPE, lambda found: key.ident == found.ident())


def _field(key: Field, view: View, now: int) -> _Node:
    name, sought = key.name.lower(), comparable(key.what)
    if name in ("subject", "message-id", "in-reply-to"):  # the ENVELOPE has the same text
        return _in_envelope(name, sought)
    octets = name.encode()
    return _decided(Stage.HEADER, lambda found: found.has(octets, sought))


def _in_envelope(name: str, sought: str) -> _Node:
    look = look_at_envelopes(name, sought) if sought else None
    return _looked_at(Stage.ENVELOPE, look, lambda found: found.has(name, sought))


def _text(key: Text, view: View, now: int) -> _Node:
    name, sought = key.where.lower(), comparable(key.what)
    if name in FIELDS:
        return _in_envelope(name, sought)
    if not sought:
        return _constant(True)
    if name == "body":
        return _in_texts(sought, look_at_texts(sought, False), BODY, BODY)
    look = None if "\r" in sought or "\n" in sought else look_at_texts(sought, True)
    return _in_texts(sought, look, TEXT, HEADERS)


def _in_texts(sought: str, look: Look | None, *where: str) -> _Node:
    """`look`: what tells of most messages whether they match; `where`: the needle is looked for in those of each of its other
    bitmaps, as of TextSearch, or (of all) in the first."""

    def bits(batch: Batch, care: int) -> tuple[int, int]:
        data = batch.bodies
        if data is None:
            return 0, care
        true, asked = 0, [care]
        if look is not None and isinstance(data, Stored):
            true, *asked = (int.from_bytes(told, "little") for told in look(data.messages, _octets(care, len(data))))
        open_ = 0
        for place, some in zip(where, asked, strict=False):
            matching, undecided = _searched(batch, data, some, place, sought)
            true, open_ = true | matching, open_ | undecided
        return true, open_

    return _Node(frozenset({Stage.BODY}), bits)


def _searched(batch: Batch, data: Sequence[Any], care: int, where: str, sought: str) -> tuple[int, int]:
    """(true, undecided): of the messages among `care`, whose texts are searched as far as their turn goes."""
    true = open_ = 0
    uids = batch.uids
    while care:
        at = (care & -care).bit_length() - 1
        told = batch.turns.told(uids[at], where, sought, partial(data.__getitem__, at))
        true, open_ = true | (told is True) << at, open_ | (told is None) << at
        care &= care - 1
    return true, open_


_COMPILED: dict[type, Callable[[Any, View, int], _Node]] = {
    Age: _age,
    Day: _day,
    Field: _field,
    Flagged: _flagged,
    Modified: _modified,
    ObjectId: _object_id,
    Size: _size,
    Text: _text,
    Within: _within_set,
}
