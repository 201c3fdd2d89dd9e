"""What SEARCH looks into: ENVELOPE, header and text of a message (RFC 9051 6.4.4), made of octets as the store keeps them, which
are decoded only where that may matter. A needle is `mime_text.comparable`, and so is what it is looked for in.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, compress
from typing import Any, NamedTuple, TypeVar, overload

from relaymta._speedups.envelopes import elements, envelopes
from relaymta._speedups.mime import Part, scan
from relaymta._speedups.packed import bodies, objects, undescribed
from relaymta._speedups.text import folded, holds
from relaymta.proto.mime import PLACE, VERSION, Description, header_fields, whole_fields
from relaymta.proto.mime_envelope import MONTHS, full_year, tokens
from relaymta.proto.mime_text import PIECE, PartSearch, charset_of, comparable, header_text, in_header, is_text, needle_of

__all__ = [
    "BODY", "FIELDS", "HEADERS", "TEXT", "EnvelopeText", "FileText", "HeaderText", "Look", "MessageText", "Stored", "TextSearch",
    "Turns", "bodies", "look_at_envelopes", "look_at_texts", "objects", "undescribed",
]  # fmt: skip

T = TypeVar("T")

FIELDS = {name: place for place, name in enumerate(
    ("date", "subject", "from", "sender", "reply-to", "to", "cc", "bcc", "in-reply-to", "message-id")
)}  # fmt: skip  # of an ENVELOPE, in its order

BODY, TEXT, HEADERS = "body", "text", "headers"  # where a needle is looked for: in the text of parts, in both, in headers alone
HEADER_MOST = 1 << 20  # octets of a part's header that say what it is, as of _speedups.mime
FIELD_MOST = 1 << 18  # octets of a field that are decoded together

_PIECE = re.compile(r'[^\x00-\x1f"(),:;<>@\\\x7f-\U0010ffff]+')  # stands in an ENVELOPE as it does in what is made of it
_AMID_FIELD = (b" ", b"\t", b"\r", b"\n")
_DAY = re.compile(
    r"(?<![0-9])(?P<day>[0-9]{1,2})[\s-]+(?P<month>[A-Za-z]{3})[A-Za-z]*[\s-]+(?P<year>[0-9]{2,4})(?![0-9])"
    r"|(?P<month2>[A-Za-z]{3})\s+(?P<day2>[0-9]{1,2})\s+[0-9]+:[0-9]+(?::[0-9]+)?\s+(?:[A-Z]+\s+)?(?P<year2>[0-9]{4})(?![0-9])"
)


class Stored(Sequence[T]):
    """Texts of messages. `messages`: of each what the store has of it, from which `make` makes its text when that is asked for
    (a tuple, as the functions below take them), or its text, as soon as it was made: what a key has decoded the next ones need
    not decode again."""

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
        if isinstance(found, tuple):
            found = self.messages[at] = self._make(*found)
        made: T = found
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

    __slots__ = ("_octets", "_shown", "ident")

    def __init__(self, octets: bytes, ident: Callable[[], str]) -> None:
        self._octets = octets
        self._shown: dict[str, str | None] = {}  # fields as they are compared; None: there is none
        self.ident = ident

    def has(self, name: str, needle: str) -> bool:
        """Whether a field (of FIELDS) has the needle in it; "": whether there is such a field. Addresses are as `name <address>,
        ...`."""
        if name not in self._shown:
            if not _may_have(self._octets, needle):
                return False
            found = self._field(FIELDS[name])
            if not needle:
                return found is not None
            shown = None if found is None else _addresses(found) if isinstance(found, list) else header_text(found)
            self._shown[name] = None if shown is None else comparable(shown)
        text = self._shown[name]
        return text is not None and needle in text

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
        places = elements(self._octets)
        if place >= len(places):
            return None
        depth = 0
        strings: list[bytes | None] = []
        for token in tokens(self._octets, places[place]):
            if isinstance(token, str):
                depth += 1 if token == "(" else -1
            elif not depth:
                return token
            else:
                strings.append(token)
            if depth <= 0:
                break
        return strings or None


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


class _Values(NamedTuple):
    """The values of all fields of a name: those that need no decoding as they are, the others as they are compared."""

    fields: int
    plain: bytes
    shown: str


class HeaderText:
    """The header of a message, or more of it."""

    __slots__ = ("_named", "_octets")

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._named: dict[bytes, _Values] = {}  # those that were asked for, by their names in lower case

    def has(self, name: bytes, needle: str) -> bool:
        """Whether a field of this name (in lower case) has the needle in it; "": whether there is such a field."""
        found = self._named.get(name)
        if found is None:
            found = self._named[name] = self._values(name)
        if not needle:
            return found.fields > 0
        return needle in found.shown or (needle.isascii() and holds(found.plain, needle.encode(), True))

    def _values(self, name: bytes) -> "_Values":
        octets, plain, shown = self._octets, list[bytes](), list[str]()
        if holds(octets, name, False):
            for begin, name_end, start, end in header_fields(octets, 0, len(octets)):
                if octets[begin:name_end].lower() == name:
                    value = octets[start:end]
                    if value.isascii() and b"=?" not in value:
                        plain.append(value)
                    else:
                        shown.append(comparable(header_text(value)))
        return _Values(len(plain) + len(shown), b"\xff".join(plain), "\udfff".join(shown))  # what no needle has between them


class _Text:
    """The text of a message, of which `read(start, end)` is octets, less where there are not so many. `prefix`: header fields in
    front of them."""

    __slots__ = ("prefix", "read")

    def __init__(self, prefix: bytes, read: Callable[[int, int], bytes]) -> None:
        self.prefix = prefix
        self.read = read

    def __len__(self) -> int:
        """How many MIME parts there are."""
        raise NotImplementedError

    def header(self, number: int) -> tuple[int, int]:
        """Where the header of a part is."""
        raise NotImplementedError

    def search_of(self, number: int, needle: str) -> PartSearch | None:
        """What looks for a needle in the text of a part; None: it has none."""
        raise NotImplementedError

    def in_body(self, needle: str) -> bool:
        """Whether the text of a part has the needle in it, also in a message that is attached."""
        return TextSearch(BODY, needle).end(self)

    def in_text(self, needle: str) -> bool:
        """Whether it is in the text or the header of a part, or in the message's own header."""
        return TextSearch(TEXT, needle).end(self)

    def in_headers(self, needle: str) -> bool:
        """Whether it is in the header of a part, or in the message's own header."""
        return TextSearch(HEADERS, needle).end(self)


class MessageText(_Text):
    """A message in memory."""

    __slots__ = ("_data", "_parts")

    def __init__(self, prefix: bytes, data: bytes) -> None:
        super().__init__(prefix, lambda start, end: data[start:end])
        self._data = data
        self._parts: list[Part] | None = None

    @property
    def parts(self) -> list[Part]:
        """All of its MIME parts, the message itself first."""
        if self._parts is None:
            self._parts = scan(self._data)
        return self._parts

    def __len__(self) -> int:
        return len(self.parts)

    def header(self, number: int) -> tuple[int, int]:
        """As of _Text."""
        part = self.parts[number]
        return part.header, part.body

    def search_of(self, number: int, needle: str) -> PartSearch | None:
        """As of _Text."""
        data, part = self._data, self.parts[number]
        if not is_text(data, part):
            return None
        return PartSearch(part.body, part.end, part.encoding, charset_of(data, part), needle)


class FileText(_Text):
    """A message that is not in memory. `parts`: as of mime.Description."""

    __slots__ = ("_parts",)

    def __init__(self, prefix: bytes, parts: bytes, read: Callable[[int, int], bytes]) -> None:
        super().__init__(prefix, read)
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts) // PLACE.size

    def header(self, number: int) -> tuple[int, int]:
        """As of _Text."""
        _, _, start, header_size, _ = PLACE.unpack_from(self._parts, number * PLACE.size)
        return start, start + header_size

    def search_of(self, number: int, needle: str) -> PartSearch | None:
        """As of _Text."""
        kind, _, start, header_size, size = PLACE.unpack_from(self._parts, number * PLACE.size)
        if kind & 15:
            return None
        body = start + header_size
        header = self.read(start, min(body, start + HEADER_MOST))
        part = scan(header)[0]
        return PartSearch(body, body + size, part.encoding, charset_of(header, part), needle) if is_text(header, part) else None


class TextSearch:
    """Looks for a needle in headers or texts of a message (BODY, TEXT, HEADERS), a step at a time, of a piece of PIECE octets
    mostly. Between two steps it keeps some of those, and the text may be made anew."""

    __slots__ = ("_needle", "_steps", "_text")

    def __init__(self, where: str, needle: str) -> None:
        self._text: _Text | None = None
        self._needle = needle
        self._steps = chain(self._headers() if where != BODY else (), self._bodies() if where != HEADERS else ())

    def step(self, text: _Text) -> bool | None:
        """Go on; None: it is not known yet whether the needle is there."""
        self._text = text
        found = next(self._steps, None)
        self._text = None
        return False if found is None else found or None

    def end(self, text: _Text) -> bool:
        """Go on until it is known."""
        while (found := self.step(text)) is None:
            pass
        return found

    @property
    def _now(self) -> _Text:
        assert self._text is not None
        return self._text

    def _headers(self) -> Iterator[bool]:
        """Whether it has been found, behind each step."""
        found, before = _in_header(self._now.prefix, self._needle, b"")
        yield found
        number = 0
        while number < len(self._now):
            start, end = self._now.header(number)
            while start < end:
                found, before, octets = self._header(start, end, before)
                yield found
                start += octets
            number += 1

    def _header(self, start: int, end: int, before: bytes) -> tuple[bool, bytes, int]:
        """As of _in_header, of the next fields of a header; and how many octets they have."""
        for most in (PIECE, FIELD_MOST):
            octets = self._now.read(start, min(start + most, end))
            whole = len(octets) if start + len(octets) >= end else whole_fields(octets)
            if whole:
                break
        octets = octets[: whole or len(octets[: octets.rfind(b"\n") + 1].rstrip(b"\r\n")) or len(octets)]
        return *_in_header(octets, self._needle, before), len(octets) or end - start

    def _bodies(self) -> Iterator[bool]:
        """Whether it has been found, behind each step."""
        number = 0
        while number < len(self._now):
            search = self._now.search_of(number, self._needle)
            while search is not None:
                found = search.step(self._now.read)
                yield found is True
                search = search if found is None else None
            number += 1


class Turns:
    """The searches of the texts of some messages that take turns with those of others: each turn is over at a time, but has a
    step at least, and the next one goes on where it was over. `described`: the message that was described last to be searched,
    and that description."""

    __slots__ = ("_begun", "_late", "_searches", "described")

    def __init__(self) -> None:
        self._late: Callable[[], bool] = lambda: False
        self._begun = False
        self._searches: dict[tuple[int, str, str], TextSearch | bool] = {}
        self.described: tuple[int, Description | None] = 0, None

    def begin(self, late: Callable[[], bool], behind: int) -> None:
        """Begin a turn, with messages of UIDs above `behind`. `late`: whether its time is over."""
        self._late, self._begun = late, False
        self._searches = {key: one for key, one in self._searches.items() if key[0] > behind}

    def __len__(self) -> int:
        """How many searches have begun, with those that are over, of messages that are not behind all of it."""
        return len(self._searches)

    @property
    def over(self) -> bool:
        """Whether it is others' turn: there was a step, and it is late."""
        return self._begun and self._late()

    def told(self, uid: int, where: str, needle: str, text: Callable[[], Any]) -> bool | None:
        """Whether the needle is in a text of a message (`where`: as of TextSearch); None: that is told in another turn."""
        key = uid, where, needle
        search = self._searches.get(key)
        if isinstance(search, bool):
            return search
        if self.over:
            return None
        if search is None:
            search = TextSearch(where, needle)
        at_hand, found = text(), None
        while found is None and not self.over:
            found = search.step(at_hand)
            self._begun = True
        self._searches[key] = search if found is None else found
        return found


def _is_plain(header: bytes) -> bool:
    """Whether it need not be decoded."""
    return header.isascii() and b"=?" not in header


def _in_header(octets: bytes, needle: str, before: bytes) -> tuple[bool, bytes]:
    """Whether fields, names and all, have the needle in them, or the needle begins in `before`, the end of those in front of
    them; and the end of these."""
    if not _is_plain(octets):
        if octets[:1] in _AMID_FIELD and in_header(octets, needle):  # the rest of a field
            return True, b""
        return any(in_header(octets[begin:end], needle) for begin, _, _, end in header_fields(octets, 0, len(octets))), b""
    if not needle.isascii():
        return False, b""
    shown = before + folded(octets, True)
    return needle.encode() in shown, shown[max(0, len(shown) - len(needle) + 1) :]
