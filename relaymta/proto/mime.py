"""What FETCH needs of a message (RFC 9051 6.4.5, 7.5.2; RFC 3516): its description, which a store keeps, and its sections, which
are cut out by that description without parsing the message again. No I/O; nothing that a message contains is an error.

Part offsets (`Description.parts`) are records of PLACE, one for each part of `scan`, in its order.
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from relaymta._speedups.mime import fields
from relaymta._speedups.structure import describe as described
from relaymta._speedups.text import base64, quoted_printable
from relaymta.proto.mime_envelope import string
from relaymta.proto.mime_structure import MESSAGE, MULTIPART, body_of

__all__ = [
    "VERSION", "Description", "Extent", "Section", "UnknownEncoding", "binary", "body_of", "chosen_fields", "cut", "decoded_part",
    "describe", "extent", "header_fields", "literal", "section", "whole_fields",
]  # fmt: skip

VERSION: Final = 1  # of what `describe` makes: a row with another one is made anew from the message
PLACE = struct.Struct("<BBIII")  # kind and encoding (4 bits each), depth, offset of the header, length of header and of body
_FIELDS_AT_ONCE = 1000  # FIELDS_MOST of _speedups.mime (a C integer there)
READ: Final = 1 << 16  # octets of a header that are read together
DEPTH_MOST: Final = 100  # numbers in a section

_ENCODINGS = {0: None, 1: quoted_printable, 2: base64}  # encodings of _speedups.mime (C integers there)
_NUMBERS = rb"([1-9][0-9]{0,8}(?>(?:\.[1-9][0-9]{0,8})*))"
_SECTION = re.compile(rb"(?:" + _NUMBERS + rb"(?:\.(?=[A-Z])|\Z))?(?:([A-Z.]+)(?: \((.+)\))?)?\Z", re.I | re.S)
_NAME = re.compile(rb'(?:"((?>(?:[^"\\]++|\\.)*))"|([^\x00-\x20(){%*"\\\x7f-\xff]++))(?: |\Z)')
_ATOM = re.compile(rb'[^\x00-\x20(){%*"\\\]\x7f-\xff]++\Z')
_WHOLE = re.compile(rb".*\n(?=[^ \t])", re.S)
_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)

Octets = bytes | memoryview


class Description(NamedTuple):
    """What is kept of a message. `version`: VERSION; `envelope`, `structure`: ENVELOPE and BODYSTRUCTURE as they are sent (BODY:
    `body_of`); `header_end`: the offset of the body; `parts`: offsets of all parts, for `section`; `thread`: keys of its
    Message-ID and of those that it refers to, as of mime_thread.thread_keys (b"": they have not been made)."""

    version: int
    envelope: bytes
    structure: bytes
    header_end: int
    parts: bytes
    thread: bytes = b""


class Extent(NamedTuple):
    """Octets of message data that a section is in."""

    start: int
    end: int


class UnknownEncoding(ValueError):
    """A part's Content-Transfer-Encoding is not known: NO [UNKNOWN-CTE] (RFC 3516 4.3)."""


class Section(NamedTuple):
    """What is between the brackets of BODY[...]. `path`: the numbers; `what`: "", "HEADER", "HEADER.FIELDS", "HEADER.FIELDS.NOT",
    "TEXT" or "MIME"; `names`: of fields, as the client has written them, without quotes."""

    path: tuple[int, ...] = ()
    what: str = ""
    names: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, text: bytes) -> "Section":
        """The section of `text` (RFC 9051 9: `section`, without brackets and literals). ValueError when it is none."""
        match = _SECTION.match(text)
        if match is None:
            raise ValueError("a section that is not valid")
        path = tuple(map(int, match[1].split(b"."))) if match[1] else ()
        what = (match[2] or b"").decode().upper()
        names = _names(match[3]) if match[3] is not None else ()
        return cls(path, what, names).checked()

    def checked(self) -> "Section":
        """The same. ValueError when the grammar does not allow it."""
        if self.what not in ("", "HEADER", "HEADER.FIELDS", "HEADER.FIELDS.NOT", "TEXT", "MIME"):
            raise ValueError("an unknown section")
        if bool(self.names) != self.what.startswith("HEADER.FIELDS"):
            raise ValueError("a section with names of fields that it has no use for, or without")
        if (self.what == "MIME" and not self.path) or len(self.path) > DEPTH_MOST:
            raise ValueError("a section of no part, or of one that is too deep")
        return self

    def shown(self) -> bytes:
        """It as a response has it: names without quotes where they need none."""
        words = [str(number).encode() for number in self.path] + [self.what.encode()] * bool(self.what)
        names = b" ".join(name if _ATOM.match(name) else string(name) for name in self.names)
        return b".".join(words) + (b" (%b)" % names if self.names else b"")


def _names(text: bytes) -> tuple[bytes, ...]:
    found = []
    at = 0
    while at < len(text):
        match = _NAME.match(text, at)
        if match is None:
            raise ValueError("a list of field names that is not valid")
        found.append(match[2] if match[1] is None else _QUOTED_PAIR.sub(rb"\1", match[1]))
        at = match.end()
    return tuple(found)


def describe(data: bytes) -> Description:
    """The description of a message."""
    envelope, tree, header_end, parts = described(data)
    return Description(VERSION, envelope, tree, header_end, parts)


class _Place(NamedTuple):
    """A part by its record; `record`: the number of the record."""

    record: int
    kind: int
    encoding: int
    depth: int
    header: int
    body: int
    end: int


def _placed(parts: bytes, record: int) -> _Place:
    kind, depth, header, header_size, body_size = PLACE.unpack_from(parts, record * PLACE.size)
    body = header + header_size
    return _Place(record, kind & 15, kind >> 4, depth, header, body, body + body_size)


def _child(parts: bytes, parent: _Place, number: int) -> _Place | None:
    """The part that is the `number`-th within another."""
    depth = parent.depth + 1
    for at in range((parent.record + 1) * PLACE.size, len(parts), PLACE.size):
        if parts[at + 1] < depth:
            break
        if parts[at + 1] == depth:
            number -= 1
            if not number:
                return _placed(parts, at // PLACE.size)
    return None


def _find(parts: bytes, path: Sequence[int]) -> _Place | None:
    """The part that the numbers of a section name (6.4.5.1): a message that is no multipart has a part 1, which is its body."""
    place: _Place | None = _placed(parts, 0)
    message = True  # `place` is a message, not a part of one
    for number in path:
        assert place is not None
        if place.kind == MESSAGE and not message:
            place = _child(parts, place, 1)
            message = True
        if place is None or (place.kind != MULTIPART and not (message and number == 1)):
            return None
        if place.kind == MULTIPART:
            place = _child(parts, place, number)
            if place is None:
                return None
        message = False
    return place


def extent(parts: bytes, which: Section) -> Extent | None:
    """Where in the message data a section is, or the header that its fields are in; None: there is no such part. In a message
    with a prefix, a section without numbers that is not TEXT begins with that."""
    place = _find(parts, which.path)
    what = which.what
    if place is not None and which.path and what not in ("", "MIME"):
        place = _child(parts, place, 1) if place.kind == MESSAGE else None
    if place is None:
        return None
    if what == "":
        return Extent(place.body if which.path else place.header, place.end)
    return Extent(place.body, place.end) if what == "TEXT" else Extent(place.header, place.body)


def section(data: bytes, parts: bytes, which: Section, prefix: bytes = b"") -> list[Octets] | None:
    """A section of a message as slices that follow each other; None (NIL) when there is no such part. `prefix`: header fields
    that are in front of `data` in this copy of the message."""
    found = extent(parts, which)
    if found is None:
        return None
    front = prefix if not which.path and which.what != "TEXT" else b""
    if which.names:
        return chosen_fields(lambda start, end: data[start:end], found, which, front)
    slices: list[Octets] = [front, memoryview(data)[found.start : found.end]]
    return [one for one in slices if len(one)]


def header_fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the header at data[start:end]: (start, end of the name, start of the value, end), the end behind the last
    line. Lines that belong to no field are left out."""
    while True:
        found = fields(data, start, end)
        yield from found
        if len(found) < _FIELDS_AT_ONCE:
            break
        start = found[-1][3]


def chosen_fields(read: Callable[[int, int], bytes], where: Extent, which: Section, prefix: bytes = b"") -> list[Octets]:
    """The fields that a section names, or all others, of the header at `where` of what `read(start, end)` reads, and an empty
    line; some READ octets of it are in memory at a time, or a field that is longer. `prefix`: as of `section`."""
    names = {name.lower() for name in which.names}
    found: list[Octets] = []
    start, most = where.start, READ
    while start < where.end or prefix:
        octets = read(start, min(start + most, where.end))
        whole = len(octets) if start + most >= where.end else whole_fields(octets)
        if octets and not whole:  # it is amid a field
            most *= 2
            continue
        if some := _chosen(prefix + octets[:whole], names, which.what.endswith(".NOT")):
            found.append(some)
        start, most, prefix = start + whole, READ, b""
        if not octets:
            break
    if found and found[-1][-1:] != b"\n":
        found.append(b"\r\n")
    return [*found, b"\r\n"]


def _chosen(header: bytes, names: set[bytes], others: bool) -> bytes:
    """The fields of a header with these names (lower case), or those without."""
    fields = header_fields(header, 0, len(header))
    return b"".join([header[name:end] for name, name_end, _, end in fields if (header[name:name_end].lower() in names) != others])


def whole_fields(header: bytes) -> int:
    """How many octets of the beginning of a header are whole fields, as far as that is seen."""
    found = _WHOLE.match(header)
    return found.end() if found else 0


def binary(data: bytes, parts: bytes, path: Sequence[int], prefix: bytes = b"") -> list[Octets] | None:
    """BINARY[path]: the body of a part, decoded, as slices; a multipart, a message in it, and the whole (no numbers) as they are.
    BINARY.SIZE is the sum of their lengths. None: there is no such part. Raises UnknownEncoding."""
    place = _find(parts, path)
    if place is None or not path:
        return section(data, parts, Section(tuple(path)), prefix)
    return _decoded(place, memoryview(data)[place.body : place.end])


def decoded_part(body: bytes, parts: bytes, path: Sequence[int]) -> list[Octets] | None:
    """BINARY[path] as `binary`, where only the part's body is at hand. `path` is not empty."""
    place = _find(parts, path)
    return None if place is None else _decoded(place, memoryview(body))


def _decoded(place: _Place, body: memoryview) -> list[Octets]:
    if place.kind in (MULTIPART, MESSAGE):
        return [body] if body else []
    if place.encoding not in _ENCODINGS:
        raise UnknownEncoding("unknown Content-Transfer-Encoding")
    decode = _ENCODINGS[place.encoding]
    decoded = body if decode is None else decode(body.tobytes())
    return [decoded] if decoded else []


def cut(slices: Iterable[Octets], first: int, octets: int) -> list[Octets]:
    """`<first.octets>` of slices; nothing where it begins behind their end."""
    found: list[Octets] = []
    for one in slices:
        part = one[first : first + octets]
        first = max(0, first - len(one))
        octets -= len(part)
        if part:
            found.append(part)
        if octets <= 0:
            break
    return found


def literal(slices: Sequence[Octets] | None, eight: bool = False) -> list[Octets]:
    """Slices as a literal; `eight`: as a literal8 where they have a NUL (BINARY). None is NIL, and nothing is `""`: a client
    stalls on a literal of no octets."""
    if slices is None:
        return [b"NIL"]
    size = sum(map(len, slices))
    if not size:
        return [b'""']
    tilde = b"~" if eight and any(0 in one for one in slices) else b""
    return [b"%b{%d}\r\n" % (tilde, size), *slices]
