"""BODYSTRUCTURE and BODY of a message (RFC 9051 7.5.2, RFC 3501 7.4.2).

Names of types, encodings and parameters are in lower case, values are as they are in the message, on one line (RFC 2047 and RFC
2231 are not decoded). What has no valid Content-Type is text/plain in US-ASCII (RFC 2045 5.2); a part that is not looked into
(_speedups.mime) is application/octet-stream.
"""

import re
from collections.abc import Iterator, Sequence

from relaymta._speedups.mime import Part, value
from relaymta.proto.mime_envelope import FIELDS, OCTETS_MOST, envelope, nstring, string, unfolded

__all__ = ["MESSAGE", "MULTIPART", "OPAQUE", "body", "body_of", "bodystructure"]

MULTIPART, MESSAGE, OPAQUE = 1, 2, 3  # kinds of _speedups.mime (C integers there)

_ID, _DESCRIPTION, _DISPOSITION, _LANGUAGE, _LOCATION, _MD5, _ENCODING = range(10, 17)
assert FIELDS[_ID] == "content-id" and FIELDS[_ENCODING] == "content-transfer-encoding"

_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)
_TAG = re.compile(rb"[A-Za-z0-9*-]+")
_DEFAULT = b'"text" "plain" ("charset" "us-ascii")'

FIELDS_MOST = 1_048_576  # octets of all fields that are shown
VALUE_MOST = 65_536  # octets of a field that are read

_Places = dict[int, tuple[int, int]]  # of a part's fields: where the first value of each is


def bodystructure(data: bytes, parts: Sequence[Part]) -> bytes:
    """BODYSTRUCTURE of the message that `scan` found these parts in."""
    return _Writer(data, parts, True).all()


def body(data: bytes, parts: Sequence[Part]) -> bytes:
    """BODY: the same without extension data."""
    return _Writer(data, parts, False).all()


class _Writer:
    """Writes the parts one by one, in the order of `scan`, so that the time is linear however they are nested. No fields are
    shown of parts behind FIELDS_MOST octets of fields, no addresses of attached messages behind OCTETS_MOST octets of those."""

    def __init__(self, data: bytes, parts: Sequence[Part], extended: bool) -> None:
        self._data = data
        self._parts = parts
        self._extended = extended
        self._out: list[bytes] = []
        self._room = FIELDS_MOST
        self._addresses = OCTETS_MOST

    def all(self) -> bytes:
        self._part(0)
        return b"".join(self._out)

    def _part(self, index: int) -> int:
        """Write a part and all that is in it; the index of the next one."""
        part = self._parts[index]
        if part.kind == MULTIPART:
            return self._multipart(index)
        places = self._places(part)
        out = self._out
        index += 1
        text = part.type < 0 or self._data[part.type : part.type_end].lower() == b"text"
        out.append(b"(")
        out += self._fields(part, places)
        if part.kind == MESSAGE:
            inner = self._parts[index].fields
            out.append(b" %b " % envelope(self._data, inner, self._addresses))
            self._addresses = max(0, self._addresses - sum(end - start for number, start, end in inner if 2 <= number <= 7))
            index = self._part(index)
        if part.kind == MESSAGE or (text and part.kind != OPAQUE):
            out.append(b" %d" % part.lines)
        if self._extended:
            out.append(b" %b%b" % (nstring(self._text(places, _MD5)), self._extension(places)))
        out.append(b")")
        return index

    def _multipart(self, index: int) -> int:
        part = self._parts[index]
        places = self._places(part)
        self._out.append(b"(")
        index += 1
        while index < len(self._parts) and self._parts[index].depth > part.depth:
            index = self._part(index)
        self._out.append(b" %b" % string(self._data[part.subtype : part.subtype_end].lower()))
        if self._extended:
            self._out.append(b" %b%b" % (self._parameters(part, places), self._extension(places)))
        self._out.append(b")")
        return index

    def _fields(self, part: Part, places: _Places) -> Iterator[bytes]:
        """Type, subtype and body-fields."""
        data = self._data
        if part.kind == OPAQUE:
            yield b'"application" "octet-stream" '
            yield self._parameters(part, places)
        elif part.type >= 0:
            yield b"%b %b " % (
                string(data[part.type : part.type_end].lower()),
                string(data[part.subtype : part.subtype_end].lower()),
            )
            yield self._parameters(part, places)
        else:
            yield b'"message" "rfc822" NIL' if part.kind == MESSAGE else _DEFAULT
        encoding = b"7bit"
        if _ENCODING in places:
            start, end = places[_ENCODING]
            token = value(data, start, end)
            encoding = data[token[0] : token[1]].lower() or encoding
        yield b" %b %b %b %d" % (
            nstring(self._text(places, _ID)), nstring(self._text(places, _DESCRIPTION)), string(encoding), part.end - part.body,
        )  # fmt: skip

    def _extension(self, places: _Places) -> bytes:
        """Disposition, language and location, each with a space in front."""
        shown = b"NIL"
        if _DISPOSITION in places:
            start, end, parameters = value(self._data, *places[_DISPOSITION])
            if end > start:
                shown = b"(%b %b)" % (string(self._data[start:end].lower()), _parameters(self._data, parameters))
        tags = _TAG.findall((self._text(places, _LANGUAGE) or b"")[:1000])
        language = b"(%b)" % b" ".join(map(string, tags)) if tags else b"NIL"
        return b" %b %b %b" % (shown, language, nstring(self._text(places, _LOCATION)))

    def _places(self, part: Part) -> _Places:
        """Where the first value of each field is."""
        self._room -= sum(end - start for _, start, end in part.fields)
        if self._room < 0:
            return {}
        return {number: (start, min(end, start + VALUE_MOST)) for number, start, end in reversed(part.fields)}

    def _parameters(self, part: Part, places: _Places) -> bytes:
        return _parameters(self._data, part.parameters) if places else b"NIL"

    def _text(self, places: _Places, number: int) -> bytes | None:
        found = places.get(number)
        return None if found is None else unfolded(self._data[found[0] : found[1]])


def _parameters(data: bytes, parameters: list[tuple[int, int, int, int]] | None) -> bytes:
    """body-fld-param."""
    if not parameters:
        return b"NIL"
    shown = []
    for name, name_end, start, end in parameters:
        text = data[start:end]
        if b"\\" in text and data[start - 1 : start] == b'"':
            text = _QUOTED_PAIR.sub(rb"\1", text)
        shown.append(b"%b %b" % (string(data[name:name_end].lower()), string(unfolded(text))))
    return b"(%b)" % b" ".join(shown)


# BODY from a BODYSTRUCTURE that was kept

_TOKEN = re.compile(rb'\(|\)|"(?:[^"\\]|\\.)*+"|\{(\d+)\}\r\n|[A-Za-z0-9]++', re.S)
_MESSAGES = (b'"rfc822"', b'"global"')


def body_of(structure: bytes) -> bytes:
    """BODY, of what `bodystructure` has made: without extension data. ValueError: it has not made that."""
    return _Shortener(structure).all()


class _Shortener:
    """Copies the elements that BODY has, in one pass over the tokens."""

    def __init__(self, structure: bytes) -> None:
        self._structure = structure
        self._tokens = list(_tokens(structure))
        self._at = 0
        self._out: list[bytes] = []

    def all(self) -> bytes:
        try:
            self._body()
        except IndexError:
            raise ValueError("not a structure of ours") from None
        return b"".join(self._out)

    def _token(self, offset: int = 0) -> bytes:
        start, end = self._tokens[self._at + offset]
        return self._structure[start:end]

    def _body(self) -> None:
        self._at += 1
        self._out.append(b"(")
        if self._token() == b"(":
            while self._token() == b"(":
                self._body()
            self._out.append(b" ")
            self._copy(1)
        elif self._token() == b'"message"' and self._token(1) in _MESSAGES:
            self._copy(8)
            self._out.append(b" ")
            self._body()
            self._out.append(b" ")
            self._copy(1)
        else:
            self._copy(8 if self._token() == b'"text"' else 7)
        self._out.append(b")")
        while self._token() != b")":
            self._skip()
        self._at += 1

    def _copy(self, count: int) -> None:
        """Copy `count` elements, each a string, a number or a list."""
        start = self._tokens[self._at][0]
        for _ in range(count):
            self._skip()
        self._out.append(self._structure[start : self._tokens[self._at - 1][1]])

    def _skip(self) -> None:
        depth = 0
        while True:
            token = self._token()
            depth += (token == b"(") - (token == b")")
            self._at += 1
            if not depth:
                break


def _tokens(structure: bytes) -> Iterator[tuple[int, int]]:
    """Where the tokens are."""
    at = 0
    while at < len(structure):
        if structure[at] == 32:
            at += 1
            continue
        match = _TOKEN.match(structure, at)
        if match is None:
            raise ValueError("not a structure of ours")
        end = match.end() + int(match[1] or 0)
        yield at, end
        at = end
