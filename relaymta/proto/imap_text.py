"""What SEARCH looks into: ENVELOPE, header and text of a message (RFC 9051 6.4.4), made of octets as the store keeps them, which
are decoded only where that may matter. A needle is `mime_text.comparable`, and so is what it is looked for in.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain, compress
from typing import Any, TypeVar, overload

from relaymta._speedups.envelopes import envelopes
from relaymta._speedups.mime import Part, scan
from relaymta._speedups.packed import bodies, objects, undescribed
from relaymta._speedups.text import holds
from relaymta.proto.mime import PLACE, VERSION, header_fields
from relaymta.proto.mime_envelope import MONTHS, full_year, tokens
from relaymta.proto.mime_text import charset_of, comparable, header_text, in_header, in_pieces, in_text, is_text, needle_of

__all__ = [
    "FIELDS", "EnvelopeText", "FileText", "HeaderText", "Look", "MessageText", "Stored", "bodies", "look_at_envelopes",
    "look_at_texts", "objects", "undescribed",
]  # fmt: skip

T = TypeVar("T")

FIELDS = {name: place for place, name in enumerate(
    ("date", "subject", "from", "sender", "reply-to", "to", "cc", "bcc", "in-reply-to", "message-id")
)}  # fmt: skip  # of an ENVELOPE, in its order

_PIECE = re.compile(r'[^\x00-\x1f"(),:;<>@\\\x7f-\U0010ffff]+')  # stands in an ENVELOPE as it does in what is made of it
_DAY = re.compile(
    r"(?<![0-9])(?P<day>[0-9]{1,2})[\s-]+(?P<month>[A-Za-z]{3})[A-Za-z]*[\s-]+(?P<year>[0-9]{2,4})(?![0-9])"
    r"|(?P<month2>[A-Za-z]{3})\s+(?P<day2>[0-9]{1,2})\s+[0-9]+:[0-9]+(?::[0-9]+)?\s+(?:[A-Z]+\s+)?(?P<year2>[0-9]{4})(?![0-9])"
)


class Stored(Sequence[T]):
    """Texts of messages. `messages`: of each what the store has of it, from which `make` makes its text when that is asked for
    (a tuple, as the functions below take them), or its text."""

    __slots__ = ("_make", "messages")

    def __init__(self, messages: list[Any], make: Callable[..., T]) -> None:
        self.messages = messages
        self._make = make

    def __len__(self) -> int:
        return len(self.messages)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> "Stored[T]": ...
    def __getitem__(self, at: int | slice) -> "T | Stored[T]":
        if isinstance(at, slice):
            return Stored(self.messages[at], self._make)
        found = self.messages[at]
        made: T = self._make(*found) if isinstance(found, tuple) else found
        return made

    def chosen(self, wanted: Iterable[int]) -> "Stored[T]":
        """Those of them that are wanted."""
        return Stored(list(compress(self.messages, wanted)), self._make)


Told = tuple[bytes, ...]  # bitmaps: messages that have what is sought, and those that a look does not tell of
Look = Callable[[list[Any], bytes], Told]  # at those of the messages of a Stored whose bits are set


def look_at_envelopes(name: str, needle: str) -> Look:
    """What tells of (MessageRow, ObjectRow with a description), as they are stored, what EnvelopeText.has does."""
    place, sought = FIELDS[name], needle_of(needle)
    return lambda messages, care: envelopes(sought, messages, care, place, VERSION)


def look_at_texts(needle: str, headers: bool) -> Look:
    """What tells of (MessageRow, ObjectRow, data) what MessageText.in_body (`headers`: in_text) does; a third bitmap: those that
    in_headers tells of. There is no line end in what is sought in headers."""
    sought = needle_of(needle)
    return lambda messages, care: sought.texts(messages, care, headers, VERSION)


class EnvelopeText:
    """The ENVELOPE of a message, as `mime_envelope.envelope` makes it. `ident`: makes its EMAILID."""

    __slots__ = ("_octets", "ident")

    def __init__(self, octets: bytes, ident: Callable[[], str]) -> None:
        self._octets = octets
        self.ident = ident

    def has(self, name: str, needle: str) -> bool:
        """Whether a field (of FIELDS) has the needle in it; "": whether there is such a field. Addresses are as `name <address>,
        ...`."""
        if not _may_have(self._octets, needle):
            return False
        found = self._field(FIELDS[name])
        if not needle or found is None:
            return found is not None
        return needle in comparable(_addresses(found) if isinstance(found, list) else header_text(found))

    def sent(self) -> datetime.date | None:
        """The day that Date: names, whatever the time zone; None: it names none."""
        found = self._field(FIELDS["date"])
        match = _DAY.search(found.decode("latin-1")) if isinstance(found, bytes) else None
        if match is None:
            return None
        day, month, year = (match[name] or match[name + "2"] for name in ("day", "month", "year"))
        try:
            return datetime.date(full_year(year), MONTHS.get(month.lower(), 0), int(day))
        except ValueError:
            return None

    def _field(self, place: int) -> bytes | list[bytes | None] | None:
        """A field: a string, or those of its addresses, four of each; None: NIL."""
        depth = 0
        strings: list[bytes | None] = []
        for token in tokens(self._octets):
            if token in ("(", ")"):
                depth += 1 if token == "(" else -1
                if token == "(" or depth != 1:
                    continue
            elif depth > 1:
                if not place:
                    strings.append(token)  # type: ignore[arg-type]
                continue
            if not place:
                return strings or token  # type: ignore[return-value]
            place -= 1
        return None


def _addresses(strings: Sequence[bytes | None]) -> str:
    found = []
    for name, _, mailbox, host in zip(*[iter(strings)] * 4, strict=False):
        if host is None:  # a group begins, or ends
            found += [header_text(mailbox)] if mailbox is not None else []
            continue
        address = header_text(b"%b@%b" % (mailbox or b"", host) if host else mailbox or b"")
        found.append(f"{header_text(name)} <{address}>" if name else address)
    return ", ".join(found)


def _may_have(octets: bytes, needle: str) -> bool:
    """Whether an ENVELOPE may have the needle in it: no, where nothing in it has to be decoded, and a piece of the needle is not
    there."""
    if not needle or not _is_plain(octets):
        return True
    shown = octets.lower()
    return needle.isascii() and all(piece in shown for piece in _needed(needle))


@lru_cache(100)
def _needed(needle: str) -> list[bytes]:
    return [piece.strip(" ").encode() for piece in _PIECE.findall(needle)]


class HeaderText:
    """The header of a message, or more of it."""

    __slots__ = ("_octets",)

    def __init__(self, octets: bytes) -> None:
        self._octets = octets

    def has(self, name: bytes, needle: str) -> bool:
        """Whether a field of this name (in lower case) has the needle in it; "": whether there is such a field."""
        octets = self._octets
        if not holds(octets, name, False):
            return False
        for begin, name_end, start, end in header_fields(octets, 0, len(octets)):
            if octets[begin:name_end].lower() == name and (not needle or in_header(octets[start:end], needle)):
                return True
        return False


class MessageText:
    """A message in memory. `prefix`: header fields in front of `data`."""

    __slots__ = ("_data", "_parts", "_prefix")

    def __init__(self, prefix: bytes, data: bytes) -> None:
        self._prefix = prefix
        self._data = data
        self._parts: list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        """All of its MIME parts, the message itself first."""
        if self._parts is None:
            self._parts = scan(self._data)
        return self._parts

    def in_body(self, needle: str) -> bool:
        """Whether the text of a part has the needle in it, also in a message that is attached."""
        data = self._data
        return any(is_text(data, part) and in_text(data, part, needle) for part in self.parts)

    def in_text(self, needle: str) -> bool:
        """Whether it is in the text or the header of a part, or in the message's own header."""
        return self.in_headers(needle) or self.in_body(needle)

    def in_headers(self, needle: str) -> bool:
        """Whether it is in the header of a part, or in the message's own header."""
        data = self._data
        headers = [self._prefix, *[data[part.header : part.body] for part in self.parts]]
        every = b"".join(headers)
        return _in_headers([every] if _is_plain(every) else headers, needle)


class FileText:
    """A message that is not in memory. `parts`: as of mime.Description; `read(start, end)`: octets of its data, less where there
    are not so many."""

    __slots__ = ("_parts", "_prefix", "_read")

    def __init__(self, prefix: bytes, parts: bytes, read: Callable[[int, int], bytes]) -> None:
        self._prefix = prefix
        self._parts = parts
        self._read = read

    def in_body(self, needle: str) -> bool:
        """As of MessageText."""
        for kind, _, start, header_size, size in PLACE.iter_unpack(self._parts):
            if kind & 15:
                continue
            body = start + header_size
            header = self._read(start, body)
            part = scan(header)[0]
            if is_text(header, part) and in_pieces(
                self._read, body, body + size, part.encoding, charset_of(header, part), needle
            ):
                return True
        return False

    def in_text(self, needle: str) -> bool:
        """As of MessageText."""
        return self.in_headers(needle) or self.in_body(needle)

    def in_headers(self, needle: str) -> bool:
        """As of MessageText."""
        headers = (self._read(start, start + size) for _, _, start, size, _ in PLACE.iter_unpack(self._parts))
        return _in_headers(chain([self._prefix], headers), needle)


def _is_plain(header: bytes) -> bool:
    """Whether it need not be decoded."""
    return header.isascii() and b"=?" not in header


def _in_headers(headers: Iterable[bytes], needle: str) -> bool:
    """Whether fields, names and all, have the needle in them."""
    for octets in headers:
        if _is_plain(octets):
            found = needle.isascii() and holds(octets, needle.encode(), True)
        else:
            found = any(in_header(octets[begin:end], needle) for begin, _, _, end in header_fields(octets, 0, len(octets)))
        if found:
            return True
    return False
