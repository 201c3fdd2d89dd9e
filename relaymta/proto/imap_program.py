"""SEARCH (RFC 9051 6.4.4, RFC 5032, RFC 7162 3.1.5, RFC 8474, RFC 8514): search keys, and the program that they are compiled to.

A program decides about messages in stages, from what is at hand to what is dear: index records, rows, the cached ENVELOPE, the
header, the body. After each stage a message matches, does not, or is undecided; only undecided ones go on to the next. The caller
brings the data, for as many messages at a time as it likes:

    batch = program.batch(records)                  # a slice of the index
    while batch:
        matching, batch = program.run(batch)        # packed records; the undecided ones
        if batch:
            batch.rows = [...]                      # or what else `program.next_stage(batch)` names, for batch.uids

Text is compared as `fold` makes it: the caller folds what it brings (decoded: RFC 2047, transfer encoding, charset), the program
its strings. Three-valued logic on bitmaps, one bit for each message: (true, undecided).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from enum import IntEnum
from itertools import compress, pairwise
from operator import eq, ge, gt, le, lt
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

from relaymta.proto.imap_records import LAST_UID, RECORD_SIZE, load, lower, pick, ranges_of, select, values, within
from relaymta.proto.imap_uids import SAVED, Ranges
from relaymta.proto.imap_view import View

__all__ = [
    "All", "And", "Batch", "BodyText", "Date", "Envelope", "EnvelopeText", "Flag", "Header", "HeaderText", "Identifier", "InBody",
    "InText", "Key", "ModSeq", "Not", "Numbers", "Or", "Program", "Row", "Saved", "Size", "Stage", "Uids", "Within", "fold",
]  # fmt: skip

DAY = 86_400_000  # ms
EPOCH = date(1970, 1, 1).toordinal()
RECENT = "\\recent"
_MARKS = re.compile(r"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){32}")  # all that NFKC makes combining marks of, and symbols


# Search keys, as the grammar makes them


class All(NamedTuple):
    """ALL; SAVEDATESUPPORTED."""


class Flag(NamedTuple):
    """A system flag ("\\\\Seen"), \\\\Recent or a keyword, in any case: SEEN, KEYWORD, RECENT; UNSEEN, UNKEYWORD, OLD, NEW with
    Not."""

    name: str


class Numbers(NamedTuple):
    """A set of message numbers."""

    ranges: Ranges


class Uids(NamedTuple):
    """UID with a set."""

    ranges: Ranges


class Saved(NamedTuple):
    """The messages that SEARCH has saved: $, UID $."""


class ModSeq(NamedTuple):
    """MODSEQ: at least `modseq`. Entry names are ignored (RFC 7162 3.1.5)."""

    modseq: int


class Date(NamedTuple):
    """BEFORE, ON, SINCE; with SENT and SAVED in front. Without time and time zone: a day as the message says it, an INTERNALDATE
    and a save date in UTC, as they are shown."""

    kind: Literal["internal", "sent", "saved"]
    relation: Literal["before", "on", "since"]
    day: date


class Within(NamedTuple):
    """YOUNGER, OLDER (RFC 5032)."""

    relation: Literal["younger", "older"]
    seconds: int


class Size(NamedTuple):
    """LARGER, SMALLER."""

    relation: Literal["larger", "smaller"]
    octets: int


class Identifier(NamedTuple):
    """EMAILID, THREADID (RFC 8474 5.3)."""

    kind: Literal["email", "thread"]
    text: str


class Envelope(NamedTuple):
    """FROM, TO, CC, BCC, SUBJECT: a string in a field of the ENVELOPE; `name` in lower case."""

    name: Literal["from", "to", "cc", "bcc", "subject"]
    text: str


class Header(NamedTuple):
    """HEADER: a string in a field, or the field's presence when it is empty."""

    name: str
    text: str


class InBody(NamedTuple):
    """BODY."""

    text: str


class InText(NamedTuple):
    """TEXT: in the header, in headers of parts, or in the body."""

    text: str


class Not(NamedTuple):
    """NOT."""

    key: "Key"


class Or(NamedTuple):
    """OR."""

    one: "Key"
    other: "Key"


class And(NamedTuple):
    """Keys that must all match: the whole program, or a list in parentheses."""

    keys: "Sequence[Key]"


Key = (
    All | Flag | Numbers | Uids | Saved | ModSeq | Date | Within | Size | Identifier | Envelope | Header | InBody | InText | Not
    | Or | And
)  # fmt: skip


# What the caller brings


class Stage(IntEnum):
    """How dear it is to know something."""

    INDEX = 0
    ROW = 1
    ENVELOPE = 2
    HEADER = 3
    BODY = 4


class Row(NamedTuple):
    """A message's row. `date`, `saved`: INTERNALDATE and save date (ms, UTC); `size`: RFC822.SIZE; `email`, `thread`: EMAILID and
    THREADID."""

    date: int
    saved: int
    size: int
    email: str = ""
    thread: str = ""


class EnvelopeText(NamedTuple):
    """The cached ENVELOPE. `sent`: the day of Date: as it stands there; `fields`: by name in lower case, folded: from, to, cc,
    bcc (each `name <address>, ...`), subject, message-id, in-reply-to; those that the header does not have are left out."""

    sent: date | None
    fields: Mapping[str, str]


class HeaderText(NamedTuple):
    """The header. `fields`: what is behind the colon, by name in lower case, folded; `whole`: all of it, folded, with names."""

    fields: Mapping[str, Sequence[str]]
    whole: str


class BodyText(NamedTuple):
    """The body. `parts`: headers of its MIME parts, folded, with names; `text`: the text of all parts, folded."""

    parts: str
    text: str


class Batch:
    """Messages about which nothing is decided yet. `records`: of the index; the rest: for each of them in that order, set by the
    caller stage by stage."""

    __slots__ = ("bodies", "envelopes", "headers", "records", "rows")

    def __init__(self, records: bytes) -> None:
        self.records = records
        self.rows: Sequence[Row] | None = None
        self.envelopes: Sequence[EnvelopeText] | None = None
        self.headers: Sequence[HeaderText] | None = None
        self.bodies: Sequence[BodyText] | None = None

    def __len__(self) -> int:
        return len(self.records) // RECORD_SIZE

    @property
    def uids(self) -> Sequence[int]:
        """The UIDs of the messages."""
        return values(load([self.records]))

    def data(self, stage: Stage) -> Sequence[Any] | None:
        """What the caller has brought for a stage."""
        return (self.records, self.rows, self.envelopes, self.headers, self.bodies)[stage]

    def kept(self, bits: int) -> "Batch":
        """The messages whose bits are set, with what is known of them."""
        octets = _octets(bits, len(self))
        batch = Batch(pick(self.records, octets))
        wanted = [octets[at >> 3] >> (at & 7) & 1 for at in range(len(self))]
        for name in ("rows", "envelopes", "headers", "bodies"):
            if (found := getattr(self, name)) is not None:
                setattr(batch, name, list(compress(found, wanted)))
        return batch


def fold(text: str) -> str:
    """Text as it is compared: without case, in a normal form (RFC 9051 6.4.4; i;unicode-casemap in spirit)."""
    if text.isascii():
        return text.lower()
    return _normal(_normal(text).casefold())


def _normal(text: str) -> str:
    """NFKC, in linear time: it sorts combining marks, at the cost of the square of how many follow each other, so after each 32
    in a row the text is divided."""
    return "".join([normalize("NFKC", part) for part in _parts(text)])


def _parts(text: str) -> list[str]:
    ends = [run.end() for run in _MARKS.finditer(text)]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)])]


# The program


class _Node(NamedTuple):
    """A part of the program. `stages`: those that it may need; `bits(batch, care)`: (true, undecided) among the bits of
    `care`."""

    stages: frozenset[Stage]
    bits: Callable[[Batch, int], tuple[int, int]]


class Program:
    """A search. `stages`: which data it may need; `by_number`: it names message numbers, so no EXPUNGE may be told during UID
    SEARCH; `by_modseq`: it has a MODSEQ key, so results tell theirs."""

    def __init__(self, key: Key, view: View, now: int) -> None:
        """Compile a search key for a session. `now`: ms, for YOUNGER and OLDER. NoSuchNumber (BAD)."""
        self._last = view.uids.last
        self.by_number = self.by_modseq = False
        self._root = self._node(key, view, now)
        self.stages = self._root.stages

    def batch(self, records: bytes) -> Batch | None:
        """The messages of a slice of the index that the client has numbers for; None when there are none."""
        known = records[: lower(load([records]), self._last + 1) * RECORD_SIZE] if self._last < LAST_UID else records
        return Batch(known) if known else None

    def run(self, batch: Batch) -> tuple[bytes, Batch | None]:
        """The records of messages that match, packed; those that are undecided, for which `next_stage` names what is missing."""
        every = (1 << len(batch)) - 1
        true, open_ = self._root.bits(batch, every)
        matching = pick(batch.records, _octets(true, len(batch))) if true else b""
        return matching, batch.kept(open_) if open_ else None

    def next_stage(self, batch: Batch) -> Stage:
        """The data that an undecided batch lacks."""
        return min(stage for stage in self.stages if batch.data(stage) is None)

    def _node(self, key: Key, view: View, now: int) -> _Node:
        match key:
            case And(keys):
                return _all_of([self._node(one, view, now) for one in keys])
            case Or(one, other):
                return _any_of([self._node(one, view, now), self._node(other, view, now)])
            case Not(inner):
                return _inverse(self._node(inner, view, now))
            case Numbers():
                self.by_number = True
            case ModSeq():
                self.by_modseq = True
        return _COMPILED[type(key)](key, view, now)


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


def _flag(key: Flag, view: View, now: int) -> _Node:
    if key.name.lower() == RECENT:
        return _in_ranges(ranges_of([(view.recent, LAST_UID)] if view.recent <= LAST_UID else []))
    bit = view.flag_bit(key.name)
    return _constant(False) if bit is None else _indexed(lambda records: select(records, 1 << bit, 0, 0, 0))


def _in_ranges(ranges: bytes) -> _Node:
    return _indexed(lambda records: within(records, ranges)) if ranges else _constant(False)


def _numbered(key: Numbers, view: View, now: int) -> _Node:
    if not len(view) and any(0 in ends for ends in key.ranges):
        return _constant(False)  # "1:*" of an empty mailbox finds nothing
    return _in_ranges(view.ranges(key.ranges, by_uid=False))


def _modseq(key: ModSeq, view: View, now: int) -> _Node:
    return _indexed(lambda records: select(records, 0, 0, 0, key.modseq))


# Keys that need more of a message


def _decided(stage: Stage, test: Callable[[Any], bool]) -> _Node:
    """`test`: whether a message matches, by the data of a stage."""

    def bits(batch: Batch, care: int) -> tuple[int, int]:
        data = batch.data(stage)
        return (0, care) if data is None else (_where(test, data, care), 0)

    return _Node(frozenset({stage}), bits)


def _where(test: Callable[[Any], bool], data: Sequence[Any], care: int) -> int:
    """A bitmap of the data among `care` that passes a test."""
    marks = bytearray((len(data) + 7) // 8)
    cared = care.to_bytes(len(marks), "little")
    for at, one in enumerate(data):
        if cared[at >> 3] >> (at & 7) & 1 and test(one):
            marks[at >> 3] |= 1 << (at & 7)
    return int.from_bytes(marks, "little")


_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "before": lt, "on": eq, "since": ge, "younger": ge, "older": le, "larger": gt, "smaller": lt,
}  # fmt: skip


def _date(key: Date, view: View, now: int) -> _Node:
    holds = _RELATIONS[key.relation]
    if key.kind == "sent":
        return _decided(Stage.ENVELOPE, lambda found: found.sent is not None and holds(found.sent, key.day))
    wanted, which = key.day.toordinal() - EPOCH, Row._fields.index("date" if key.kind == "internal" else "saved")
    return _decided(Stage.ROW, lambda row: holds(row[which] // DAY, wanted))


def _within(key: Within, view: View, now: int) -> _Node:
    holds, target = _RELATIONS[key.relation], now // 1000 - key.seconds
    return _decided(Stage.ROW, lambda row: holds(row.date // 1000, target))


def _size(key: Size, view: View, now: int) -> _Node:
    holds = _RELATIONS[key.relation]
    return _decided(Stage.ROW, lambda row: holds(row.size, key.octets))


def _identifier(key: Identifier, view: View, now: int) -> _Node:
    return _decided(Stage.ROW, lambda row: key.text == (row.email if key.kind == "email" else row.thread))


def _envelope(name: str, text: str) -> _Node:
    sought = fold(text)
    return _decided(Stage.ENVELOPE, lambda found: sought in found.fields.get(name, "") if sought else name in found.fields)


def _header(key: Header, view: View, now: int) -> _Node:
    name, sought = key.name.lower(), fold(key.text)
    if name in ("subject", "message-id", "in-reply-to"):  # the ENVELOPE has the same text
        return _envelope(name, key.text)
    return _decided(Stage.HEADER, lambda found: any(sought in text for text in found.fields.get(name, ())))


def _in_body(key: InBody, view: View, now: int) -> _Node:
    sought = fold(key.text)
    return _decided(Stage.BODY, lambda found: sought in found.text)


def _in_text(key: InText, view: View, now: int) -> _Node:
    """Found in the header, or else in the body."""
    sought = fold(key.text)
    header = _decided(Stage.HEADER, lambda found: sought in found.whole)
    body = _decided(Stage.BODY, lambda found: sought in found.parts or sought in found.text)
    return _any_of([header, body])


_COMPILED: dict[type, Callable[[Any, View, int], _Node]] = {
    All: lambda key, view, now: _constant(True),
    Flag: _flag,
    Numbers: _numbered,
    Uids: lambda key, view, now: _in_ranges(view.ranges(key.ranges, by_uid=True)),
    Saved: lambda key, view, now: _in_ranges(view.ranges(SAVED, by_uid=True)),
    ModSeq: _modseq,
    Date: _date,
    Within: _within,
    Size: _size,
    Identifier: _identifier,
    Envelope: lambda key, view, now: _envelope(key.name, key.text),
    Header: _header,
    InBody: _in_body,
    InText: _in_text,
}
