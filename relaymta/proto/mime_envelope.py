"""Strings as IMAP sends them (RFC 9051 4.3), values of header fields on one line, and the names of the fields that it shows.
(What it tells of a message in them: _speedups/structure.py.) Here an ENVELOPE is read again, too, and its
date."""

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["FIELDS", "MONTHS", "full_year", "string", "tokens", "unfolded"]

QUOTED_MOST = 1000  # octets of a quoted string; what is longer is a literal (RFC 2683 3.2.1.5)

# Names of the fields that _speedups.mime reports; their numbers are indices of this.
FIELDS: Final = (
    "date", "subject", "from", "sender", "reply-to", "to", "cc", "bcc", "in-reply-to", "message-id", "content-id",
    "content-description", "content-disposition", "content-language", "content-location", "content-md5",
    "content-transfer-encoding", "content-type",
)  # fmt: skip

_NAMES = "jan feb mar apr may jun jul aug sep oct nov dec"
MONTHS: Final = {name: number for number, name in enumerate(_NAMES.split(), 1)}

_TOKEN = re.compile(rb' ?(?:(\()|(\))|NIL|"([^"\\]*+(?>(?:\\.[^"\\]*+)*))"|\{([0-9]+)\}\r\n)', re.S)
_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)
_FOLD = re.compile(rb"\r?\n(?=[ \t])")
_ONE_LINE = bytes(32 if octet in b"\0\r\n" else octet for octet in range(256))
_PLAIN = re.compile(rb"[\x01-\x09\x0b\x0c\x0e-!#-\[\]-\x7f]*+\Z")
_SPECIAL = re.compile(rb'(["\\])')


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


def tokens(envelope: bytes, at: int = 0) -> Iterator[bytes | str | None]:
    """What an ENVELOPE is made of, from an offset on: parentheses as text, strings as octets, NIL as None."""
    while match := _TOKEN.match(envelope, at):
        at = match.end()
        opening, closing, quoted, literal = match.groups()
        if opening or closing:
            yield "(" if opening else ")"
        elif quoted is not None:
            yield _QUOTED_PAIR.sub(rb"\1", quoted) if b"\\" in quoted else quoted
        elif literal is not None:
            at += int(literal)
            yield envelope[match.end() : at]
        else:
            yield None


def full_year(digits: str) -> int:
    """The year of a Date:, of two or three digits too (RFC 5322 4.3)."""
    return int(digits) if len(digits) == 4 else int(digits) + (2000 if int(digits) < 50 else 1900)
