"""FETCH (RFC 3501 and 9051 6.4.5, 7.5.2): from the rows and data of messages to the items of its responses.

What a FETCH needs of a message is known before anything is read (`Plan.level`): index records, its row, its description, or its
data. A large message is not in memory: its sections are places in its file (`FilePart`).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.proto import imap_response as response
from relaymta.proto import mime
from relaymta.proto.imap_command import Fetch, Section
from relaymta.proto.imap_view import View
from relaymta.proto.preview import READ_MOST, preview
from relaymta.store.change import LIMIT, MISSING, Refusal
from relaymta.store.reading import Readable, body_of
from relaymta.store.rows import MessageRow, ObjectRow
from relaymta.view.reading import Message

__all__ = [
    "FilePart", "Level", "Making", "Piece", "Plan", "Sections", "Text", "described_now", "email_id", "plan_of", "read_at",
    "text_now", "text_of", "with_description",
]  # fmt: skip

DECODED_MOST = 4 << 20  # octets of a part of a large message that BINARY decodes: it is in memory then
DESCRIBED_MOST = 64 << 20  # octets of a message that are looked at for its description
LIGHT_DESCRIBED = 32 << 10  # octets of messages that are described side by side
LIGHT = 256 << 10  # octets that are looked at for one message's sections on the loop,
WORK_MOST = 32 << 20  # and in all
TOO_MANY = "so many sections of so large a message cannot be made"
SHORT = 4 << 10  # octets of BODYSTRUCTURE of which BODY is made on the loop
FEW, NAMES = 8, 1000  # sections, and octets of names of header fields in them, of a FETCH whose plan is remembered
CHEAP = 16  # how many octets are copied while one is decoded


class Level:
    """What is needed of a message: each more than the one before."""

    INDEX: Final = 0
    ROW: Final = 1
    DESCRIPTION: Final = 2
    DATA: Final = 3


class FilePart(NamedTuple):
    """Octets in a large message's file. `text`: a NUL becomes 0x80."""

    path: Path
    start: int
    length: int
    text: bool = False

    def cut(self, first: int, octets: int) -> "FilePart":
        """`octets` of it from `first` on, as far as there are so many."""
        first = min(first, self.length)
        return FilePart(self.path, self.start + first, min(octets, self.length - first), self.text)


Piece = bytes | memoryview | FilePart
Making = partial[list[Piece]]  # what takes long: called on a reader thread


class Text(NamedTuple):
    """The data of a message. `prefix`: header fields in front of it; `parts`: as of mime.Description; `data`: in memory, or
    (None) `file`."""

    prefix: bytes
    parts: bytes
    data: bytes | None
    file: FilePart = FilePart(Path(), 0, 0)

    def slice(self, start: int, end: int) -> Piece:
        """Octets of the data, without the prefix."""
        if self.data is not None:
            return memoryview(self.data)[start:end]
        return self.file.cut(start, end - start)

    def read(self, start: int, end: int) -> bytes:
        """The same, in memory. StoreError."""
        return read_at(self.file.path, self.file.start + start, end - start)


def read_at(path: Path, start: int, octets: int) -> bytes:
    """Octets of a file, which is open only meanwhile: a client that does not read its message holds no descriptor. StoreError
    when they are not all there."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            found = file.read(octets) or b""
    except OSError as error:
        raise StoreError(f"cannot read the body of {path.name}: {error}") from error
    if len(found) < octets:
        raise StoreError(f"the body of {path.name} ends early")
    return found


def text_of(shard: Readable, message: Message) -> Text:
    """Reader thread: the data of a message, verified where it is read whole, and (parts) its description. Refusal when it is
    gone, StoreError."""
    with_it = with_description(shard, message)
    described = with_it.object.described
    assert described is not None
    row, body = message.row, message.object.body
    if body.segment:
        return Text(row.prefix, described.parts, body_of(shard.rows, shard.bodies, row.object))
    path = shard.bodies.big_path(row.object)
    return Text(row.prefix, described.parts, None, FilePart(path, body.offset + FRAME.size, body.length))


def described_now(message: Message) -> bool:
    """Whether the description of a message is at hand."""
    described = message.object.described
    return described is not None and described.version == mime.VERSION


def text_now(shard: Readable, message: Message) -> Text | None:
    """As `text_of`, where nothing has to be waited for; else None."""
    described, body = message.object.described, message.object.body
    if described is None or not described_now(message) or not body.segment:
        return None
    data = shard.bodies.read_now(message.row.object, body)
    return None if data is None else Text(message.row.prefix, described.parts, data)


def with_description(shard: Readable, message: Message) -> Message:
    """Reader thread: the same, its description made anew where none is kept, or one of another version. Errors as of
    `text_of`."""
    if described_now(message):
        return message
    body = message.object.body
    if body.segment:
        data: bytes = body_of(shard.rows, shard.bodies, message.row.object)
        with _describing if len(data) > LIGHT_DESCRIBED else nullcontext():
            described = mime.describe(data)
    else:
        described = _describe_file(shard.bodies.big_path(message.row.object), body.offset + FRAME.size, body.length)
    row = message.object
    return message._replace(object=ObjectRow(row.references, row.body, described, row.digest))


# One at a time: all of a large message is in memory meanwhile, and threads that are at work keep the loop waiting.
_describing = threading.Lock()


def _describe_file(path: Path, start: int, octets: int) -> mime.Description:
    wanted = min(octets, DESCRIBED_MOST)
    try:
        with _describing, path.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(wanted) or b""
            if len(data) < wanted:
                raise StoreError(f"the body of {path.name} ends early")
            return mime.describe(data)
    except FileNotFoundError:
        raise Refusal(MISSING, "the message has been expunged") from None
    except OSError as error:
        raise StoreError(f"cannot read the body of {path.name}: {error}") from error


def email_id(found: ObjectRow, row: MessageRow) -> str:
    """EMAILID (RFC 8474 5.1): the same for the same octets, also in another mailbox or shard."""
    digest = found.digest or sha256(row.object.to_bytes(8, "big")).digest()[:16]
    if row.prefix:
        digest = sha256(digest + row.prefix).digest()[:16]
    return "E" + digest.hex()


# Sections


class Asked(NamedTuple):
    """A section that a FETCH asks for. `name`: as its response has it; `shape`: where it is in a message."""

    section: Section
    name: bytes
    shape: mime.Section

    @classmethod
    def of(cls, asked: Section) -> "Asked":
        """The section with what follows of it."""
        shape = mime.Section(asked.part, asked.text, tuple(field.encode() for field in asked.fields))
        return cls(asked, response.section(asked), shape)


class Sections:
    """The sections of one message, made one after another: what was read or decoded for the one before is kept for the next."""

    __slots__ = ("_decoded", "_path", "_text", "costs")

    def __init__(self, text: Text, asked: Sequence[Asked]) -> None:
        """`asked`: what will be made. UnknownEncoding: not all of it can be made; Refusal (LIMIT): it would take too long."""
        self._text = text
        self._path: tuple[int, ...] | None = None
        self._decoded: Sequence[Piece] | None = None
        if len(text.parts) * len(asked) > WORK_MOST:
            raise Refusal(LIMIT, TOO_MANY)
        self.costs = [self._cost(one.section, one.shape) for one in asked]
        if sum(self.costs) > WORK_MOST:
            raise Refusal(LIMIT, TOO_MANY)

    def at_once(self, asked: Section, spent: int) -> bool:
        """Whether a section may be made on the loop, where `spent` are the costs up to this one."""
        reads = self._text.data is None and (asked.fields or asked.name.startswith(("BINARY", "PREVIEW")))
        return spent <= LIGHT and not reads

    def _cost(self, asked: Section, shape: mime.Section) -> int:
        """How many octets are looked at one by one to make a section, about. UnknownEncoding."""
        text = self._text
        if asked.name == "PREVIEW":
            return READ_MOST
        if not (asked.part or asked.text):
            size = len(text.data) if text.data is not None else min(text.file.length, DESCRIBED_MOST)
            return (min(size, asked.partial[1]) if asked.partial is not None else size) // CHEAP
        found = mime.extent(text.parts, shape)
        if found is None:
            return 0
        size = found.end - found.start + (len(text.parts) if asked.part else 0)
        if asked.name.startswith("BINARY"):
            mime.decoded_part(b"", text.parts, asked.part)
            if text.data is None and size > DECODED_MOST:
                raise mime.UnknownEncoding("a part that is too large to be decoded here")
            return size
        return size if asked.fields else min(size, asked.partial[1]) // CHEAP if asked.partial is not None else size // CHEAP

    def make(self, one: Asked) -> tuple[bytes, Sequence[Piece]]:
        """A section as FETCH tells it: what precedes its octets, and these. A client stalls on a literal of no octets, so nothing
        is `""`; NUL is sent in BINARY alone (in a literal8), and becomes 0x80 elsewhere, which RFC 9051 4.3 leaves no better
        choice for. StoreError."""
        asked, name, shape = one
        if asked.name == "PREVIEW":
            return self._preview(asked), ()
        pieces = self._pieces(asked, shape)
        if pieces is None:
            return name + b" NIL", ()
        total = sum(map(_size, pieces))
        if asked.name == "BINARY.SIZE":
            return b"%b %d" % (name, total), ()
        if asked.partial is not None:
            pieces = _cut(pieces, *asked.partial)
            total = sum(map(_size, pieces))
        if not total:
            return name + b' ""', ()
        eight = asked.name == "BINARY" and any(isinstance(one, FilePart) or b"\0" in bytes(one) for one in pieces)
        if not eight:
            pieces = [_without_nul(one) for one in pieces]
        return b"%b %b{%d}\r\n" % (name, b"~" if eight else b"", total), pieces

    def made(self, asked: Asked) -> list[Piece]:
        """The same, all of it."""
        first, pieces = self.make(asked)
        return [first, *pieces]

    def _preview(self, asked: Section) -> bytes:
        """PREVIEW (RFC 8970 3.2). LAZY: NIL where it would have to be read from a large message's file. StoreError."""
        text = self._text
        if text.data is None and asked.text:
            return b"PREVIEW NIL"
        data = text.data
        read = text.read if data is None else lambda start, end: data[start:end]
        return b"PREVIEW " + response.string(preview(text.parts, read).encode())

    def _pieces(self, asked: Section, which: mime.Section) -> Sequence[Piece] | None:
        """A section in pieces; None (NIL): there is no such part."""
        text = self._text
        if asked.name.startswith("BINARY") and asked.part:
            return self._decoded_part(asked.part)
        if not (asked.part or asked.text):
            whole = text.data if text.data is not None else text.file
            return [text.prefix, whole] if text.prefix else [whole]
        if text.data is not None:
            there = mime.section(text.data, text.parts, which, text.prefix)
            return [b"".join(there)] if there and which.names else there
        found = self._extent(which)
        if found is None:
            return None
        front = text.prefix if not which.path and which.what != "TEXT" else b""
        if which.names:
            return mime.chosen_fields(text.read, found, which, front)
        return [front, text.slice(found.start, found.end)]

    def _extent(self, which: mime.Section) -> mime.Extent | None:
        """As of `mime`; what ends where the look at a very large message ended goes on to the message's end."""
        found, octets = mime.extent(self._text.parts, which), self._text.file.length
        if found is not None and found.end == DESCRIBED_MOST < octets:
            return found._replace(end=octets)
        return found

    def _decoded_part(self, path: tuple[int, ...]) -> Sequence[Piece] | None:
        """As of mime.binary."""
        if self._path != path:
            self._path, self._decoded = path, self._decode(path)
        return self._decoded

    def _decode(self, path: tuple[int, ...]) -> Sequence[Piece] | None:
        text = self._text
        if text.data is not None:
            return mime.binary(text.data, text.parts, path, text.prefix)
        found = self._extent(mime.Section(path))
        return None if found is None else mime.decoded_part(text.read(found.start, found.end), text.parts, path)


def _cut(pieces: Sequence[Piece], first: int, octets: int) -> list[Piece]:
    """`<first.octets>` of pieces; nothing where it begins behind their end."""
    found: list[Piece] = []
    for one in pieces:
        size = _size(one)
        part = one.cut(first, octets) if isinstance(one, FilePart) else memoryview(one)[first : first + octets]
        first = max(0, first - size)
        octets -= _size(part)
        if _size(part):
            found.append(part)
        if octets <= 0:
            break
    return found


def _size(piece: Piece) -> int:
    return piece.length if isinstance(piece, FilePart) else len(piece)


def _without_nul(piece: Piece) -> Piece:
    if isinstance(piece, FilePart):
        return piece._replace(text=True)
    data = bytes(piece)
    return data.replace(b"\0", b"\x80") if b"\0" in data else data


# Items


def _described(message: Message) -> mime.Description:
    assert message.object.described is not None
    return message.object.described


Show = Callable[[View, Message], bytes]
_ITEMS: dict[str, tuple[int, Show]] = {
    "FLAGS": (Level.INDEX, lambda view, message: b"FLAGS (%b)" % view.flag_list(message.uid, message.flags)),
    "UID": (Level.INDEX, lambda view, message: response.uid(message.uid)),
    "MODSEQ": (Level.INDEX, lambda view, message: response.modseq(message.modseq)),
    "INTERNALDATE": (Level.ROW, lambda view, message: response.internaldate(message.row.date // 1000)),
    "SAVEDATE": (Level.ROW, lambda view, message: response.savedate(message.row.saved // 1000)),
    "RFC822.SIZE": (Level.ROW, lambda view, message: response.size(message.row.size)),
    "EMAILID": (Level.ROW, lambda view, message: response.object_id("EMAILID", email_id(message.object, message.row))),
    "THREADID": (Level.ROW, lambda view, message: response.object_id("THREADID", None)),
    "ENVELOPE": (Level.DESCRIPTION, lambda view, message: b"ENVELOPE " + _described(message).envelope),
    "BODYSTRUCTURE": (Level.DESCRIPTION, lambda view, message: b"BODYSTRUCTURE " + _described(message).structure),
    "BODY": (Level.DESCRIPTION, lambda view, message: b"BODY " + mime.body_of(_described(message).structure)),
}


def _head(view: View, message: Message, number: int, items: "list[Show]") -> bytes:
    """The beginning of a response, up to its sections."""
    return b"* %d FETCH (%b" % (number, b" ".join([show(view, message) for show in items]))


def _long_head(view: View, message: Message, number: int, items: "list[Show]") -> list[Piece]:
    """Reader thread: the same."""
    return [_head(view, message, number, items)]


class Plan:
    """A FETCH of some items and sections, whatever the mailbox: it never changes, and sessions share it (`plan_of`). `level`:
    what it needs of each message; `sees`: it sets \\Seen; `tells_flags`, `tells_modseq`: FLAGS, MODSEQ is among its items."""

    __slots__ = ("_if_seen", "_items", "_sections", "_shortens", "level", "sees", "tells_flags", "tells_modseq")

    def __init__(self, items: tuple[str, ...], sections: tuple[Section, ...], condstore: bool, read_only: bool) -> None:
        self._items = [_ITEMS[item][1] for item in items]
        told = ("FLAGS", "UID", "MODSEQ") if condstore else ("FLAGS",)  # RFC 7162 3.2.4
        self._if_seen = [_ITEMS[item][1] for item in told if item not in items]
        self._sections = [Asked.of(one) for one in sections]
        self.level = Level.DATA if sections else max((_ITEMS[item][0] for item in items), default=Level.INDEX)
        self._shortens = "BODY" in items
        self.sees = any(not section.peek for section in sections) and not read_only
        self.tells_flags, self.tells_modseq = "FLAGS" in items, "MODSEQ" in items

    def sections(self, text: Text) -> Sections:
        """The sections of a message. Errors as of `Sections`."""
        return Sections(text, self._sections)

    def is_light(self, text: Text) -> bool:
        """Whether `sections` takes little time."""
        return len(text.parts) * len(self._sections) <= LIGHT

    def is_heavy(self, message: Message) -> bool:
        """Whether it takes long to find what is needed of a message."""
        if self.level < Level.DESCRIPTION:
            return False
        if not described_now(message):
            size = message.row.size  # there may be as many octets of parts
            return size > LIGHT_DESCRIBED or size * len(self._sections) > LIGHT
        return len(_described(message).parts) * len(self._sections) > LIGHT

    def response(self, view: View, message: Message, sections: Sections | None, seen: bool) -> Iterator[Piece | Making]:
        """The response for a message; none where it has no number (any more). `seen`: \\Seen has been set, so that its flags are
        told. Each section is made when it is asked for; behind the first ones (LIGHT) by a function that may take long.
        StoreError."""
        number = view.uids.number(message.uid)
        if not number:
            return
        items = self._items + self._if_seen if seen else self._items
        if self._shortens and len(_described(message).structure) > SHORT:
            yield partial(_long_head, view, message, number, items)
            front = b""
        else:
            front = _head(view, message, number, items)
        if sections is not None:
            spent, between = 0, b" " if items else b""
            for asked, cost in zip(self._sections, sections.costs, strict=True):
                spent += cost
                if sections.at_once(asked.section, spent):
                    first, pieces = sections.make(asked)
                    yield front + between + first
                    yield from pieces
                else:
                    yield front + between
                    yield partial(sections.made, asked)
                front, between = b"", b" "
        yield front + b")\r\n"


def plan_of(asked: Fetch, view: View) -> Plan:
    """The plan of a FETCH in a mailbox: that of the last one like it, unless it is a long one."""
    short = len(asked.sections) <= FEW and sum([len(name) for one in asked.sections for name in one.fields]) <= NAMES
    return (_known_plan if short else Plan)(asked.items, asked.sections, view.condstore, view.read_only)


_known_plan = lru_cache(64)(Plan)  # some kB each
