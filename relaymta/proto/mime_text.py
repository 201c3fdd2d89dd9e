"""The text of a message as people see it, for SEARCH (RFC 9051 6.4.4): encoded words (RFC 2047), transfer encodings and charsets
undone; compared as the casefold of its compatibility form (NFKC). HTML is searched as it is written.

Linear in the length of the text. A charset that is not known is read as ISO-8859-1, so that its ASCII is found.
"""

import codecs
import re
import unicodedata
from collections.abc import Iterator
from encodings.aliases import aliases
from functools import lru_cache
from typing import Final

from relaymta._speedups.mime import Part, scan
from relaymta._speedups.text import base64, holds, quoted_printable
from relaymta.proto.mime_envelope import unfolded

__all__ = ["comparable", "contains", "decoded", "header_text", "in_header", "in_text", "is_text", "part_text", "text_parts"]

_WORD = re.compile(rb"=\?([^?\s*]*+)(?:\*[^?\s]*+)?\?([BbQq])\?([^?]*+)\?=")
_BLANK = re.compile(rb"\s*+\Z")
# Not among the aliases of the standard library: modules of it without an alias, and names that mail has.
_MORE: Final = {
    "koi8_u": "koi8_u", "koi8_t": "koi8_t", "cp874": "cp874", "windows_874": "cp874", "tis_620": "cp874", "cp737": "cp737",
    "cp856": "cp856", "cp875": "cp875", "cp1006": "cp1006", "cp720": "cp720", "mac_croatian": "mac_croatian",
    "mac_romanian": "mac_romanian", "utf_8_sig": "utf_8_sig", "iso_8859_8_i": "iso8859_8", "iso_8859_8_e": "iso8859_8",
    "x_sjis": "cp932", "x_gbk": "gb18030", "gb2312": "gb18030", "gbk": "gb18030", "x_euc_jp": "euc_jp", "x_unknown": "ascii",
    "unicode_1_1_utf_7": "utf_7", "x_mac_roman": "mac_roman", "shift_jis": "cp932", "iso_8859_1": "cp1252", "latin1": "cp1252",
}  # fmt: skip
_ALL: Final = {**{one: one for one in aliases.values()}, **aliases, **_MORE}
_NO_TEXT: Final = frozenset(
    ("base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec", "mbcs", "idna", "punycode")
)
_ASCII_IS_ASCII = ("ascii", "utf_8", "latin_1", "iso8859_", "cp125")  # codecs in which octets below 128 are ASCII
MARKS_MOST = 30  # combining characters in a row (UAX #15, 13): sorting them takes the square of their number


@lru_cache(256)
def _codec(charset: str) -> str:
    """The codec of a charset: "ascii" where none is named, ISO-8859-1 where it is not known. Only names of a list are looked up,
    since each other name stays in the interpreter's memory; those that take more than linear time are not on it."""
    name = re.sub(r"[^a-z0-9]+", "_", charset.lower()).strip("_")
    found = _ALL.get(name, "ascii" if not name else "latin_1")
    return "latin_1" if found in _NO_TEXT else found


def decoded(data: bytes, charset: bytes | str) -> str:
    """Text in a charset; what is not valid in it is replaced. 8-bit text that is said to be ASCII is UTF-8 or else ISO-8859-1."""
    if isinstance(charset, bytes):
        charset = charset.decode("latin-1")
    codec = _codec(charset[:40])
    if codec == "ascii":
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.decode("latin_1")
    try:
        return codecs.decode(data, codec, "replace")
    except (UnicodeError, LookupError):
        return data.decode("latin_1")


def header_text(value: bytes) -> str:
    """A field's value, folded or not, as it is shown: encoded words are decoded, also within quotes and words, where many
    programs write them, and those in a row together, since a character may be divided among them."""
    value = unfolded(value)
    if b"=?" not in value:
        return decoded(value, "")
    out: list[str] = []
    pending: list[bytes] = []  # of encoded words in a row with the same charset
    charset = b""
    at = 0
    for match in _WORD.finditer(value):
        between = value[at : match.start()]
        apart = not at or not _BLANK.match(between)
        if pending and (apart or match[1].lower() != charset):
            out.append(decoded(b"".join(pending), charset))
            pending = []
        if apart:
            out.append(decoded(between, ""))
        charset = match[1].lower()
        pending.append(base64(match[3]) if match[2] in b"Bb" else _q_decoded(match[3]))
        at = match.end()
    if pending:
        out.append(decoded(b"".join(pending), charset))
    out.append(decoded(value[at:], ""))
    return "".join(out)


def _q_decoded(text: bytes) -> bytes:
    """The Q encoding (RFC 2047 4.2)."""
    text = text.replace(b"_", b"=20")
    return quoted_printable(text) if b"=" in text else text


def part_text(data: bytes, part: Part) -> str:
    """The text of a part, decoded by its encoding and charset."""
    body = data[part.body : part.end]
    if part.encoding == 1:
        body = quoted_printable(body)
    elif part.encoding == 2:
        body = base64(body)
    return decoded(body, _charset(data, part))


def _charset(data: bytes, part: Part) -> bytes:
    for name, name_end, start, end in part.parameters or ():
        if data[name:name_end].lower() == b"charset":
            return data[start:end]
    return b""


def text_parts(data: bytes) -> Iterator[str]:
    """The text of each part of type text in a message, also of messages attached."""
    return (part_text(data, part) for part in scan(data) if is_text(data, part))


def is_text(data: bytes, part: Part) -> bool:
    """Whether a part is of type text."""
    return part.kind == 0 and (part.type < 0 or data[part.type : part.type_end].lower() == b"text")


def comparable(text: str) -> str:
    """Text in the form in which it is compared: casefold of NFKC, so that upper and lower case, and compatibility forms, are the
    same."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", _streamed(text)).casefold()
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _streamed(text: str) -> str:
    """Text in which no run of combining characters is longer than MARKS_MOST."""
    return text if max(text) < "\u0300" else _marks().sub("\\1\u034f", text)


@lru_cache(1)
def _marks() -> re.Pattern[str]:
    """MARKS_MOST combining characters in a row."""
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code)))
    return re.compile(f"([{marks}]{{{MARKS_MOST}}})")


def contains(text: str, needle: str) -> bool:
    """Whether text has `needle` (which is `comparable`) in it."""
    return needle in comparable(text)


def in_header(value: bytes, needle: str) -> bool:
    """Whether a field's value, folded or not, has `needle` (which is `comparable`) in it, decoded."""
    if value.isascii() and b"=?" not in value:
        return needle.isascii() and holds(value, needle.encode(), True)
    return contains(header_text(value), needle)


def in_text(data: bytes, part: Part, needle: str) -> bool:
    """The same of a part's text."""
    if part.encoding == 0 and _codec(_charset(data, part)[:40].decode("latin-1")).startswith(_ASCII_IS_ASCII):
        body = data[part.body : part.end]
        if body.isascii():
            return needle.isascii() and holds(body, needle.encode(), False)
    return contains(part_text(data, part), needle)
