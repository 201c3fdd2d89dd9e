"""A message as the tests of a Sieve script see it: fields, addresses and body, in UTF-8. Each is made once for all tests."""

from collections.abc import Callable, Iterator
from typing import Final

from relaymta._speedups.mime import Part, scan
from relaymta._speedups.text import base64, quoted_printable
from relaymta.proto.mime import header_fields
from relaymta.proto.mime_structure import MESSAGE, MULTIPART
from relaymta.proto.mime_text import header_text, is_text, part_text
from relaymta.proto.sieve_address import Address, addresses_in

__all__ = ["Message"]

_UNDO: Final[dict[int, Callable[[bytes], bytes]]] = {1: quoted_printable, 2: base64}  # by Part.encoding
_LAST_LINES = (b"\n\r\n", b"\n\n")  # at the end of a header with nothing behind it: the body is empty, but there is one


class Message:
    """Message data. `data`: all of it, or its header alone where no test looks into the body; `size`: octets of all of it."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self._data = data
        self.size = len(data) if size is None else size
        self._fields: dict[bytes, list[bytes]] | None = None
        self._texts: dict[bytes, list[bytes]] = {}
        self._addresses: dict[bytes, list[Address]] = {}
        self._parts: list[Part] | None = None
        self._body: list[bytes] | None = None
        self._contents: dict[int, list[bytes]] = {}

    # The header

    def raw(self, name: bytes) -> list[bytes]:
        """The values of all fields of a name (in lower case), as they are in the header."""
        if self._fields is None:
            self._fields = {}
            data = self._data
            for start, name_end, value, end in header_fields(data, 0, len(data)):
                self._fields.setdefault(data[start:name_end].lower(), []).append(data[value:end].rstrip(b"\r\n"))
        return self._fields.get(name, [])

    def names(self) -> list[bytes]:
        """The names of all fields, each once, in lower case."""
        self.raw(b"")
        return list(self._fields or ())

    def texts(self, name: bytes) -> list[bytes]:
        """The same as people see them: on one line, encoded words decoded, without white space around."""
        found = self._texts.get(name)
        if found is None:
            found = [header_text(value).strip().encode("utf-8", "replace") for value in self.raw(name)]
            self._texts[name] = found
        return found

    def addresses(self, name: bytes) -> list[Address]:
        """The addresses in these fields, without the names of groups."""
        found = self._addresses.get(name)
        if found is None:
            found = self._addresses[name] = [one for value in self.raw(name) for one in addresses_in(value)]
        return found

    # The body

    def body(self) -> list[bytes]:
        """The body as it is; none where there is a header alone."""
        if self._body is None:
            whole = self._scanned()[0]
            self._body = [self._data[whole.body : whole.end]] if self._has_body() else []
        return self._body

    def _has_body(self) -> bool:
        """Whether there is an empty line behind the header."""
        data = self._data
        return self._scanned()[0].body < len(data) or data.endswith(_LAST_LINES) or data in (b"\r\n", b"\n")

    def parts(self) -> int:
        """How many MIME parts there are; 0 without a body."""
        return len(self._scanned()) if self._has_body() else 0

    def content(self, number: int, types: list[bytes]) -> list[bytes]:
        """What is looked into of a part, if its type is one of `types` (RFC 5173 5.2)."""
        parts = self._scanned()
        if not any(_has_type(self._type(parts[number]), wanted) for wanted in types):
            return []
        found = self._contents.get(number)
        if found is None:
            found = self._contents[number] = list(self._content(parts, number))
        return found

    def _scanned(self) -> list[Part]:
        if self._parts is None:
            self._parts = scan(self._data)
        return self._parts

    def _type(self, part: Part) -> tuple[bytes, bytes]:
        """Its type and subtype, in lower case."""
        if part.type < 0:
            return (b"message", b"rfc822") if part.kind == MESSAGE else (b"text", b"plain")
        return self._data[part.type : part.type_end].lower(), self._data[part.subtype : part.subtype_end].lower()

    def _content(self, parts: list[Part], number: int) -> Iterator[bytes]:
        data, part = self._data, parts[number]
        if part.kind == MULTIPART:
            yield from self._around(parts, number)
        elif part.kind == MESSAGE:
            inner = parts[number + 1]
            yield data[inner.header : inner.body]
        elif is_text(data, part):
            yield part_text(data, part).encode("utf-8", "replace")
        else:
            undo = _UNDO.get(part.encoding, bytes)
            yield undo(data[part.body : part.end])

    def _around(self, parts: list[Part], number: int) -> Iterator[bytes]:
        """Prologue and epilogue of a multipart."""
        data, part = self._data, parts[number]
        first = last = parts[number + 1]
        for one in parts[number + 1 :]:
            if one.depth <= part.depth:
                break
            if one.depth == part.depth + 1:
                last = one
        delimiter = data.rfind(b"\n", part.body, max(first.header - 1, part.body)) + 1 or part.body
        yield data[part.body : delimiter]
        start = data.find(b"\n--", last.end, part.end) + 1
        behind = data.find(b"\n", start, part.end) + 1 if start else 0
        yield data[behind : part.end] if behind else b""


def _has_type(one: tuple[bytes, bytes], wanted: bytes) -> bool:
    """Whether a content type is the wanted one: `type/subtype`, `type`, or b"" for all (RFC 5173 5.2)."""
    kind, slash, subtype = wanted.lower().partition(b"/")
    return not wanted or (kind == one[0] and (subtype == one[1] if slash else True))
