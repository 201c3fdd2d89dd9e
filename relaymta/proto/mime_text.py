"""The text of a message as people see it, for SEARCH (RFC 9051 6.4.4): encoded words (RFC 2047), transfer encodings and charsets
undone; compared as the casefold of its compatibility form (NFKC). HTML is searched as it is written.

Linear in the length of the text. A charset that is not known is read as ISO-8859-1, so that its ASCII is found.
"""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterator
from encodings.aliases import aliases
from functools import lru_cache, partial
from itertools import pairwise
from typing import Final, NamedTuple

from relaymta._speedups.mime import Part, scan
from relaymta._speedups.search import Needle
from relaymta._speedups.text import base64, folded, holds, quoted_printable
from relaymta.proto.mime_envelope import unfolded

__all__ = [
    "charset_of", "comparable", "contains", "decoded", "header_text", "in_header", "in_pieces", "in_text", "is_text",
    "needle_of", "part_text", "text_parts",
]  # fmt: skip

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
BASE64: Final = 2
_UNDO: Final[dict[int, Callable[[bytes], bytes]]] = {0: bytes, 1: quoted_printable, BASE64: base64, 3: bytes}  # by Part.encoding
MARKS_MOST = 32  # combining characters in a row that are normalized together (UAX #15, 13: text has 30 at most)
PIECE: Final = 1 << 18  # octets of a part that are decoded together
_NO_BASE64 = bytes(octet for octet in range(256) if octet > 127 or not (chr(octet).isalnum() or octet in b"+/="))
_MAY_COMBINE = re.compile("[\u0300-\U0010ffff]")
_ASCII = re.compile("[\0-\x7f]+")
_FORMED = "\u0530"  # below are Latin, Greek, Cyrillic
_COMMON = " etaoinsrhldcumfpgwyb.,v-k"  # in text, the most common first
_BEYOND = "\U00010000-\U0010ffff"  # in a set of characters: all that a regular expression looks for one by one, so none of them


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
    return decoded(_UNDO[part.encoding](data[part.body : part.end]), charset_of(data, part))


def charset_of(data: bytes, part: Part) -> bytes:
    """The charset that a part names; b"": none."""
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
    """Text in the form in which it is compared (RFC 9051 6.4.4): casefold of NFKC, so that upper and lower case, and
    compatibility forms, are the same."""
    if text.isascii():
        return text.lower()
    text = _normal(text).casefold()
    return text if text.isascii() else _normal(text)


def _normal(text: str) -> str:
    """NFKC, in linear time: it sorts combining characters, which takes the square of how many follow each other, so behind each
    MARKS_MOST in a row the text is divided."""
    ends = [run.end() for run in _marked().finditer(text)] if _MAY_COMBINE.search(text) else []
    if not ends:
        return unicodedata.normalize("NFKC", text)
    return "".join([unicodedata.normalize("NFKC", text[start:end]) for start, end in pairwise([0, *ends, len(text)])])


@lru_cache(1)
def _marks() -> str:
    """Characters of 16 bits that normalization makes combining ones of."""
    every = map(chr, range(0x300, 0x10000))
    return "".join([one for one in every if unicodedata.combining(unicodedata.normalize("NFKD", one)[0])])


@lru_cache(1)
def _marked() -> re.Pattern[str]:
    """MARKS_MOST characters in a row that normalization makes combining ones of, or that are beyond 16 bits."""
    return re.compile(f"[{_marks()}{_BEYOND}]{{{MARKS_MOST}}}")


@lru_cache(1)
def _forms() -> dict[str, str]:
    """By character below _FORMED, all others of 16 bits, ASCII left out, that are compared as it, or as something that has it:
    NBSP by the blank, U+00DF by s."""
    found = dict.fromkeys(map(chr, range(ord(_FORMED))), "")
    for one in map(chr, range(128, 0x10000)):
        form = unicodedata.normalize("NFKC", one).casefold()
        if form != one:
            for character in {*comparable(one)} & found.keys():
                found[character] += one
    return found


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
    charset = charset_of(data, part)
    if part.end - part.body > PIECE:
        return in_pieces(lambda start, end: data[start:end], part.body, part.end, part.encoding, charset, needle)
    return _has(_UNDO[part.encoding](data[part.body : part.end]), charset, needle)


def in_pieces(read: Callable[[int, int], bytes], start: int, end: int, encoding: int, charset: bytes, needle: str) -> bool:
    """The same of a long text, from `start` to `end` of what `read` reads: in memory there are some pieces of it alone, of PIECE
    octets. `encoding`: as of _speedups.mime.Part."""
    before = ""
    for text in _lines(_decoded_pieces(read, start, end, encoding), _codec(charset[:40].decode("latin-1"))):
        before += comparable(text)
        if needle in before:
            return True
        before = before[max(0, len(before) - len(needle) + 1) :]
    return False


def _has(text: bytes, charset: bytes, needle: str) -> bool:
    """Whether text in a charset has `needle` in it. Where octets below 128 are ASCII it is decoded only when that may matter."""
    if not _has_ascii(charset):
        return contains(decoded(text, charset), needle)
    sought = _sought(needle)
    if sought is None:
        return not text.isascii() and contains(decoded(text, charset), needle)
    at = folded(text, False).find(sought.octets)
    if text.isascii():
        return at >= 0
    if at >= 0:  # its last letter and a combining character behind it may be another one
        behind = at + len(needle)
        return text[behind : behind + 1] < b"\x80" or contains(decoded(text, charset), needle)
    shown = decoded(text, charset)
    return sought.hidden(shown) and contains(shown, needle)


@lru_cache(256)
def _has_ascii(charset: bytes) -> bool:
    """Whether octets below 128 are ASCII in a charset."""
    return _codec(charset[:40].decode("latin-1")).startswith(("ascii", "utf_8", "latin_1", "iso8859_", "cp125"))


@lru_cache(1000)
def _part_kind(field: bytes) -> int:
    """What a Content-Type, the whole field, makes of a part without others in it: as of _speedups.search."""
    part = scan(field)[0]
    if not is_text(field, part):
        return 0
    charset = charset_of(field, part)
    if _codec(charset[:40].decode("latin-1")) in ("ascii", "utf_8"):
        return 1
    return 2 if _has_ascii(charset) else 3


def needle_of(needle: str) -> Needle:
    """What looks for a needle (which is `comparable`), or where it has other characters than those of European scripts, or marks,
    for the longest part of it that is of ASCII. For one thread."""
    whole = all(character < _FORMED and not unicodedata.combining(character) for character in needle)
    part = needle if whole else max(_ASCII.findall(needle), key=len, default="")
    octets = part.encode()
    rare = sorted(range(len(octets)), key=lambda at: _COMMON.find(chr(octets[at])) % 100, reverse=True)
    first, second, third, *_ = [*rare, *rare[:1] * 2, 0, 0, 0]
    return Needle(octets, whole, (first, second, third), _part_kind, partial(_hiding, part))


def _hiding(needle: str) -> bytes:
    """A bitmap of the characters of 16 bits in which a needle of characters below _FORMED may be found, though it is not there;
    where it is not ASCII, of all marks, too."""
    flags = bytearray(1 << 13)
    hiding = "".join([_forms()[character] for character in {*needle}])
    for code in map(ord, hiding if needle.isascii() else hiding + _marks()):
        flags[code >> 3] |= 1 << (code & 7)
    return bytes(flags)


class _Sought(NamedTuple):
    """A needle of ASCII. `few`, `many`: other characters in which a part of it may be found, below U+0100 and from there on."""

    octets: bytes
    few: str
    many: re.Pattern[str]

    def hidden(self, text: str) -> bool:
        """Whether there may be a needle in a text, though not in its ASCII characters."""
        try:
            text.encode("latin_1")
        except UnicodeEncodeError:
            if self.many.search(text):
                return True
        return any(character in text for character in self.few)


@lru_cache(100)
def _sought(needle: str) -> _Sought | None:
    """None: it is not of ASCII."""
    if not needle.isascii():
        return None
    forms = "".join([_forms()[character] for character in set(needle)])
    many = re.escape("".join(one for one in forms if one > "\xff"))
    return _Sought(needle.encode(), "".join(one for one in forms if one <= "\xff"), re.compile(f"[{many}{_BEYOND}]"))


def _decoded_pieces(read: Callable[[int, int], bytes], start: int, end: int, encoding: int) -> Iterator[bytes]:
    """Pieces without their transfer encoding; each of whole lines, where there are any."""
    rest = b""
    while start < end:
        piece = read(start, min(start + PIECE, end))
        if not piece:
            return
        if start + len(piece) < end:
            piece = piece[: piece.rfind(b"\n") + 1] or piece
        start += len(piece)
        if encoding == BASE64:
            piece = rest + piece.translate(None, _NO_BASE64)
            whole = len(piece) if start == end else len(piece) & ~3
            piece, rest = piece[:whole], piece[whole:]
        yield _UNDO[encoding](piece)


def _lines(pieces: Iterator[bytes], codec: str) -> Iterator[str]:
    """The text of pieces, up to a line end each time: characters in front of it and behind it have nothing to do with each
    other."""
    decoder = codecs.getincrementaldecoder("utf_8" if codec == "ascii" else codec)("strict" if codec == "ascii" else "replace")
    rest = ""
    for piece in pieces:
        try:
            rest += decoder.decode(piece)
        except UnicodeError:
            decoder = codecs.getincrementaldecoder("latin_1")()
            rest += decoder.decode(piece)
        end = rest.rfind("\n") + 1 or _last_start(rest)
        yield rest[:end]
        rest = rest[end:]
    yield rest


def _last_start(text: str) -> int:
    """Where the last character begins that does not join the one in front of it in a normal form (of the last 64)."""
    at = len(text) - 1
    while at > 0 and len(text) - at < 64 and (unicodedata.combining(text[at]) or "\u1160" <= text[at] <= "\u11ff"):
        at -= 1
    return max(at, 0)
