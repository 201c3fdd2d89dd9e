"""ENVELOPE of a message (RFC 9051 7.5.2, RFC 3501 7.4.2), and strings as IMAP sends them.

Lenient, as a mail reader has to be: what is no address list gives the addresses that can be seen in it. (proto/mailbox.py is the
strict parser, for decisions.) Linear in the length of the fields.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["ADDRESSES_MOST", "FIELDS", "OCTETS_MOST", "envelope", "nstring", "string", "unfolded"]

ADDRESSES_MOST: Final = 10_000  # of one field; the first ones are shown
OCTETS_MOST: Final = 131_072  # of the fields of addresses of one message that are read
VALUE_MOST: Final = 65_536  # octets of another field
QUOTED_MOST = 1000  # octets of a quoted string; what is longer is a literal (RFC 2683 3.2.1.5)

# Names of the fields that _speedups.mime reports; their numbers are indices of this.
FIELDS: Final = (
    "date", "subject", "from", "sender", "reply-to", "to", "cc", "bcc", "in-reply-to", "message-id", "content-id",
    "content-description", "content-disposition", "content-language", "content-location", "content-md5",
    "content-transfer-encoding", "content-type",
)  # fmt: skip
_DATE, _SUBJECT, _FROM, _SENDER, _REPLY_TO, _TO, _CC, _BCC, _IN_REPLY_TO, _MESSAGE_ID = range(10)
_NOTHING: tuple[tuple[int, int], ...] = ()

_FOLD = re.compile(rb"\r?\n(?=[ \t])")
_ONE_LINE = bytes(32 if octet in b"\0\r\n" else octet for octet in range(256))
_PLAIN = re.compile(rb"[\x01-\x09\x0b\x0c\x0e-!#-\[\]-\x7f]*+\Z")
_SPECIAL = re.compile(rb'(["\\])')
_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)

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


def unfolded(value: bytes) -> bytes:
    """A field's value on one line (RFC 5322 2.2.3), without white space around it; a CR, LF or NUL that is left is a space."""
    if b"\n" in value or b"\r" in value or b"\0" in value:
        value = _FOLD.sub(b"", value).translate(_ONE_LINE)
    return value.strip(b" \t")


def string(value: bytes) -> bytes:
    """Octets as IMAP's `string`, on one line: quoted where the grammar allows it (7-bit), else a literal, which is never empty. A
    CR, LF or NUL is a space."""
    if len(value) <= QUOTED_MOST:
        if _PLAIN.match(value):
            return b'"%b"' % value
        value = value.translate(_ONE_LINE)
        if value.isascii():
            return b'"%b"' % _SPECIAL.sub(rb"\\\1", value)
    return b"{%d}\r\n%b" % (len(value), value.translate(_ONE_LINE))


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
