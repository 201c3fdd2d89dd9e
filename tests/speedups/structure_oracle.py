"""ENVELOPE, BODYSTRUCTURE and BODY of messages written in a slow and obvious way, with expressions and a list of tokens: the
kernel has to write the same octets."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from relaymta._speedups.mime import Part, scan, value
from relaymta.proto.mime import PLACE
from relaymta.proto.mime_envelope import string, unfolded

ADDRESSES_MOST = 10_000  # of one field; the first ones are shown
OCTETS_MOST = 131_072  # of the fields of addresses of one message that are read
FIELDS_MOST = 1_048_576  # octets of all fields that are shown
VALUE_MOST = 65_536  # octets of another field

MULTIPART, MESSAGE, OPAQUE = 1, 2, 3
_DATE, _SUBJECT, _FROM, _SENDER, _REPLY_TO, _TO, _CC, _BCC, _IN_REPLY_TO, _MESSAGE_ID = range(10)
_NOTHING: tuple[tuple[int, int], ...] = ()
_ID, _DESCRIPTION, _DISPOSITION, _LANGUAGE, _LOCATION, _MD5, _ENCODING = range(10, 17)

_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)
_TAG = re.compile(rb"[A-Za-z0-9*-]+")
_DEFAULT = b'"text" "plain" ("charset" "us-ascii")'

# The common forms of an address, where nothing has to be unquoted: (quoted name, name, local part, domain, and both without <>).
_LOCAL = rb"([A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,256}+)"
_DOMAIN = rb"([A-Za-z0-9._-]{1,255}+)"
_NAME = rb'(?:"([ !#-\[\]-~]{0,500}+)"[ \t]*+|' + rb"([A-Za-z0-9!#$%&'*+/=?^_`{|}~. -]{0,500}+))"
_COMMON = re.compile(
    rb"[ \t]*+(?:" + _NAME + rb"<" + _LOCAL + rb"@" + _DOMAIN + rb">|" + _LOCAL + rb"@" + _DOMAIN + rb")[ \t]*+(?:,|\Z)"
)
_TOKEN = re.compile(
    rb'(?P<space>[ \t]++)|"(?P<quoted>(?:[^"\\]++|\\.)*+)(?:"|\\?\Z)|(?P<comment>\()|(?P<special>[<>,;:@])'
    rb'|(?P<literal>(?<=@)\[[^\[\]@<>,;" \t]*+\])|(?P<atom>(?:[^ \t"(<>,;:@\\]++|\\.)++|\\)',
    re.S,
)
_WITHIN_COMMENT = re.compile(rb"(?:[^()\\]++|\\.)*+([()]|\\?\Z)", re.S)
_GROUP_END = b"(NIL NIL NIL NIL)"


class _Token(NamedTuple):
    """`kind`: "word", "comment" or a special; `spaced`: behind white space or a comment."""

    kind: str
    text: bytes
    spaced: bool = False


def describe(data: bytes) -> tuple[bytes, bytes, int, bytes]:
    """As of the kernel."""
    parts = scan(data)
    return envelope(data, parts[0].fields), bodystructure(data, parts), parts[0].body, b"".join(map(place, parts))


def place(part: Part) -> bytes:
    return PLACE.pack(part.kind | part.encoding << 4, part.depth, part.header, part.body - part.header, part.end - part.body)


def nstring(value: bytes | None) -> bytes:
    """`string`, or NIL."""
    return b"NIL" if value is None else string(value)


def envelope(data: bytes, fields: Iterable[tuple[int, int, int]], room: int = OCTETS_MOST) -> bytes:
    """ENVELOPE of the message with these fields (number, start and end of the value in `data`), as a parenthesized list. Of a
    field that is repeated the first counts; of addresses, all. `room`: octets of fields of addresses that are read."""
    places: dict[int, list[tuple[int, int]]] = {}
    for number, start, end in fields:
        places.setdefault(number, []).append((start, end))

    def text(number: int) -> bytes:
        found = places.get(number)
        return b"NIL" if found is None else string(unfolded(data[found[0][0] : min(found[0][1], found[0][0] + VALUE_MOST)]))

    def people(number: int) -> bytes:
        nonlocal room
        found: list[bytes] = []
        for start, end in places.get(number, _NOTHING):
            end = min(end, start + room)
            room -= end - start
            if len(found) < ADDRESSES_MOST:
                found += addresses(unfolded(data[start:end]))
        return b"(%b)" % b"".join(found[:ADDRESSES_MOST]) if found else b"NIL"

    author, sender, reply_to = people(_FROM), people(_SENDER), people(_REPLY_TO)
    shown = (
        text(_DATE), text(_SUBJECT), author, author if sender == b"NIL" else sender, author if reply_to == b"NIL" else reply_to,
        people(_TO), people(_CC), people(_BCC), text(_IN_REPLY_TO), text(_MESSAGE_ID),
    )  # fmt: skip
    return b"(%b)" % b" ".join(shown)


def addresses(value: bytes) -> list[bytes]:
    """The address structures of an unfolded value, ADDRESSES_MOST of them and a few more at most."""
    found: list[bytes] = []
    at = 0
    while at < len(value) and len(found) < ADDRESSES_MOST:
        match = _COMMON.match(value, at)
        if match is None:
            return found + general(value[at:])
        quoted, name, local, domain, bare, bare_domain = match.groups()
        if bare is not None:
            found.append(b'(NIL NIL "%b" "%b")' % (bare, bare_domain))
        else:
            shown = (b" ".join(name.split()) if quoted is None else quoted.strip()) or None
            found.append(b'(%b NIL "%b" "%b")' % (nstring(shown), local, domain))
        at = match.end()
    return found


def general(value: bytes) -> list[bytes]:
    """`addresses` for every form: groups, routes, comments, quoted strings, and what is malformed."""
    found: list[bytes] = []
    words: list[_Token] = []  # of the element at hand
    within: list[_Token] | None = None  # what is between < and > of it
    angle = group = False
    for token in _tokens(value):
        kind = token.kind
        if angle and within is not None and (kind in ("word", ":", "@") or (kind == "," and _is_route(within))):
            within.append(token)
        elif kind == "<":
            within, angle = [], True
        elif kind == ">":
            angle = False
        elif kind in (",", ";", ":", ""):
            if kind == ":":
                found += [_GROUP_END] * group + [b"(NIL NIL %b NIL)" % string(_phrase(words))]
            elif words or within is not None:
                found += _mailbox(words, within)
            if group and kind in (";", ""):
                found.append(_GROUP_END)
            group = kind == ":" or (group and kind == ",")
            words, within, angle = [], None, False
            if len(found) >= ADDRESSES_MOST:
                return found + [_GROUP_END] * group
        else:
            words.append(token)
    return found


def _is_route(within: Sequence[_Token]) -> bool:
    """Whether what is between < and > begins with a source route."""
    return len(within) > 0 and within[0].kind == "@"


def _tokens(value: bytes) -> Iterator[_Token]:
    """The tokens of a value, and one of kind "" at its end."""
    at, end, spaced = 0, len(value), False
    while at < end:
        match = _TOKEN.match(value, at)
        if match is None:  # no octet is left out by the expression
            break
        at = match.end()
        kind = match.lastgroup or ""
        text = match[0]
        if kind == "space":
            spaced = True
            continue
        if kind == "comment":
            begin, at = at, _behind_comment(value, at)
            inner = value[begin : at - 1] if value[at - 1 : at] == b")" else value[begin:at]
            yield _Token("comment", _QUOTED_PAIR.sub(rb"\1", inner).strip(b" \t"))
            spaced = True
            continue
        if kind == "special":
            yield _Token(text.decode(), text, spaced)
        elif kind == "quoted":
            yield _Token("word", _QUOTED_PAIR.sub(rb"\1", match["quoted"]), spaced)
        else:
            yield _Token("word", text, spaced)
        spaced = False
    yield _Token("", b"")


def _behind_comment(value: bytes, at: int) -> int:
    """The index behind a comment whose ( is in front of `at`; comments nest, and one that does not end is all the rest."""
    depth = 1
    while depth:
        match = _WITHIN_COMMENT.match(value, at)
        if match is None or match[1] not in (b"(", b")"):
            return len(value)
        depth += 1 if match[1] == b"(" else -1
        at = match.end()
    return at


def _mailbox(words: Sequence[_Token], within: Sequence[_Token] | None) -> list[bytes]:
    """The structure of one address: (name, source route, local part, domain). What has no domain gets an empty one: NIL would
    make it a group. None where there is nothing but comments."""
    comments = [one.text for one in words if one.kind == "comment"]
    words = [one for one in words if one.kind != "comment"]
    name = (comments[-1] if comments else b"") or None
    route = None
    if within is None:
        if not words:
            return []
        within = words
    else:
        name = _phrase(words) or name
        colons = [place for place, one in enumerate(within) if one.kind == ":"]
        if colons and within[0].kind == "@":
            route = b"".join(one.text for one in within[: colons[-1]])
            within = within[colons[-1] + 1 :]
    ats = [place for place, one in enumerate(within) if one.kind == "@"]
    at = ats[-1] if ats else len(within)
    mailbox, host = _joined(within[:at]), _joined(within[at + 1 :])
    return [b"(%b %b %b %b)" % (nstring(name), nstring(route), string(mailbox), string(host))]


def _phrase(words: Iterable[_Token]) -> bytes:
    """A display name, or the name of a group: white space between words is one space."""
    return b"".join(b" " * one.spaced + one.text for one in words if one.kind != "comment").strip(b" \t")


def _joined(words: Iterable[_Token]) -> bytes:
    """A local part or a domain: without white space around dots."""
    text = b"".join(b" " * one.spaced + one.text for one in words).strip(b" \t")
    return b".".join(label.strip(b" \t") for label in text.split(b".")) if b" " in text else text


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
