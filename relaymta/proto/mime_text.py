"""The text of a message as people see it, for SEARCH (RFC 9051 6.4.4): encoded words (RFC 2047), transfer encodings and charsets
undone; compared as the casefold of its compatibility form (NFKC). HTML is searched as it is written.

Linear in the length of the text. A charset that is not known is read as ISO-8859-1, so that its ASCII is found.
"""

import codecs
import re
import sys
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
    "PIECE", "PartSearch", "charset_of", "comparable", "contains", "decoded", "header_text", "in_header", "in_text", "is_text",
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
QUOTED_PRINTABLE: Final = 1
BASE64: Final = 2
_UNDO: Final[dict[int, Callable[[bytes], bytes]]] = {0: bytes, 1: quoted_printable, BASE64: base64, 3: bytes}  # by Part.encoding
MARKS_MOST = 32  # combining characters in a row that are normalized together (UAX #15, 13: text has 30 at most)
WHOLE: Final = 1 << 18  # octets of a part that are looked at together, where they need not be decoded
PIECE: Final = 1 << 14  # octets of a part that are decoded together: 1 to 5 ms in the slowest charset
HELD_MOST: Final = 1 << 14  # octets that wait for those behind them
MARK: Final = 4  # octets of the longest mark of byte order,
SEQUENCE_MOST: Final = 16  # and of what a decoder of ISO 2022 takes for the beginning of an escape sequence
_NO_BASE64 = bytes(octet for octet in range(256) if octet > 127 or not (chr(octet).isalnum() or octet in b"+/="))
_MAY_COMBINE = re.compile("[\u0300-\U0010ffff]")
_UTF_8: Final = ("ascii", "utf_8", "utf_8_sig")
_MARKS_OF_ORDER: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_ENDED = re.compile(rb"[A-Z@]")  # a sequence
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
    search, told = PartSearch(part.body, part.end, part.encoding, charset_of(data, part), needle), None
    while told is None:
        told = search.step(lambda start, end: data[start:end])
    return told


def _told(text: bytes, charset: bytes, needle: str) -> bool | None:
    """Whether text in a charset has `needle` in it; None: it has to be decoded to tell. Where octets below 128 are ASCII that is
    done only when it may matter."""
    if not _has_ascii(charset):
        return None
    sought = _sought(needle)
    if sought is None:
        return False if text.isascii() else None
    at = folded(text, False).find(sought.octets)
    if text.isascii():
        return at >= 0
    if at >= 0:  # its last letter and a combining character behind it may be another one
        behind = at + len(needle)
        return True if text[behind : behind + 1] < b"\x80" else None
    size = len(text) if _codec(charset[:40].decode("latin-1")) in _UTF_8 else PIECE  # of others each octet is a character
    shown = (decoded(text[start : start + size], charset) for start in range(0, len(text), size))
    return None if any(map(sought.hidden, shown)) else False


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


class PartSearch:
    """Looks for a needle (which is `comparable`) in the text of a part, a piece at a time: between two of them it keeps some
    PIECE octets. Up to WHOLE octets are looked at together first, where that tells; 8-bit text that is said to be ASCII, and is
    longer, is ISO-8859-1 from the first octet on that is not UTF-8."""

    __slots__ = (
        "_at", "_before", "_charset", "_codec", "_decoder", "_encoding", "_end", "_needle", "_octets", "_text", "_undecoded",
        "_whole",
    )  # fmt: skip

    def __init__(self, start: int, end: int, encoding: int, charset: bytes, needle: str) -> None:
        """`start`, `end`: of the part's body; `encoding`: as of _speedups.mime.Part."""
        self._at, self._end = start, end
        self._encoding = encoding
        self._charset, self._codec = charset, _codec(charset[:40].decode("latin-1"))
        self._needle = needle
        self._whole = end - start <= WHOLE
        self._octets = b""  # that wait for those behind them, in the transfer encoding
        self._undecoded = b""  # and without it
        self._decoder: codecs.IncrementalDecoder | None = None
        self._text = ""  # in a line whose end has not come
        self._before = ""  # in front of that, in which the needle may begin

    def step(self, read: Callable[[int, int], bytes]) -> bool | None:
        """Look at the next piece; None: it is not known yet. `read(start, end)`: octets of the message, less where there are not
        so many."""
        if self._whole:
            self._whole = False
            return self._at_once(_UNDO[self._encoding](read(self._at, self._end)))
        piece = read(self._at, min(self._at + PIECE, self._end))
        self._at += len(piece)
        last = not piece or self._at >= self._end
        text = self._text + self._decoded(self._undone(piece, last), last)
        end = len(text) if last else text.rfind("\n") + 1 or _last_start(text)
        before = self._before + comparable(text[:end])
        if last or self._needle in before:
            return self._needle in before
        self._text, self._before = text[end:], before[max(0, len(before) - len(self._needle) + 1) :]
        return None

    def _at_once(self, octets: bytes) -> bool | None:
        if self._codec == "ascii":
            self._codec = "utf_8" if _valid(octets) else "latin_1"
        return _told(octets, self._charset, self._needle)

    def _undone(self, piece: bytes, last: bool) -> bytes:
        """The next octets without their transfer encoding."""
        octets = self._octets + (piece.translate(None, _NO_BASE64) if self._encoding == BASE64 else piece)
        end = len(octets) if last else _whole_groups(octets, self._encoding)
        if not end and len(octets) > HELD_MOST:
            end = len(octets)
        self._octets = octets[end:]
        if last or self._encoding != QUOTED_PRINTABLE:
            return _UNDO[self._encoding](octets[:end])
        return quoted_printable(octets[:end] + b"x")[:-1]  # the line goes on: white space stays

    def _decoded(self, octets: bytes, last: bool) -> str:
        octets = self._undecoded + octets
        end = len(octets) if last else _whole_sequences(octets)
        if self._decoder is None:
            if end < MARK and not last:
                end = 0
            else:
                self._decoder = _decoder(self._codec, octets)
        octets, self._undecoded = octets[:end], octets[end:]
        if self._decoder is None:
            return ""
        try:
            text = self._decoder.decode(octets, last)
        except UnicodeDecodeError as error:
            self._decoder = _decoder("latin_1", b"")
            octets = error.object
            return octets[: error.start].decode() + octets[error.start :].decode("latin_1")
        except UnicodeError:  # it cannot keep what it has not decoded: no text has such
            self._decoder.reset()
            text = self._decoder.decode(octets, True)
        if len(getattr(self._decoder, "buffer", b"")) > HELD_MOST:  # UTF-7 would keep all of it
            text += self._decoder.decode(b"", True)
            self._decoder.reset()
        return text


def _valid(octets: bytes) -> bool:
    """Whether octets are UTF-8."""
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decoder(codec: str, octets: bytes) -> codecs.IncrementalDecoder:
    """Of a text that begins with these octets: it decodes piece by piece as `decoded` does all of it."""
    if (codec == "utf_16" and octets[:2] not in _MARKS_OF_ORDER) or (codec == "utf_32" and octets[:4] not in _MARKS_OF_ORDER):
        codec += "_le" if sys.byteorder == "little" else "_be"
    return codecs.getincrementaldecoder("utf_8" if codec == "ascii" else codec)("strict" if codec == "ascii" else "replace")


def _whole_sequences(octets: bytes) -> int:
    """How many octets are no beginning of an escape sequence (ISO 2022), of which a decoder cannot keep more than 8; or all,
    where there are too many to wait."""
    end = len(octets)
    while (escape := octets.rfind(b"\x1b", max(0, end - SEQUENCE_MOST), end)) >= 0 and not _ENDED.search(octets, escape, end):
        end = escape
    return end or (len(octets) if len(octets) > HELD_MOST else 0)


def _whole_groups(octets: bytes, encoding: int) -> int:
    """How many of the octets can be decoded without those behind them; perhaps none."""
    if encoding == BASE64:  # in which padding ends a group, wherever it is
        return len(octets) - (len(octets) - octets.rfind(b"=") - 1) % 4
    if encoding != QUOTED_PRINTABLE:
        return len(octets)
    if end := octets.rfind(b"\n") + 1:
        return end
    end = len(octets.rstrip(b" \t\r"))  # more of it may follow, and a line end
    escape = octets.rfind(b"=", max(0, end - 2), end)
    return end if escape < 0 else escape


def _last_start(text: str) -> int:
    """Where the last character begins that does not join the one in front of it in a normal form (of the last 64)."""
    at = len(text) - 1
    while at > 0 and len(text) - at < 64 and _joins(text[at]):
        at -= 1
    return max(at, 0)


def _joins(character: str) -> bool:
    """Whether a character may become one with the one in front of it, or change places with it."""
    if character < "\u0300":
        return False
    first = unicodedata.normalize("NFKD", character)[:1]
    return unicodedata.combining(first) > 0 or "\u1160" <= first <= "\u11ff" or first in _joining()


@lru_cache(1)
def _joining() -> frozenset[str]:
    """Characters that are no marks, and which others have at the end of their canonical decomposition."""
    ends = (unicodedata.decomposition(chr(code)).split() for code in (*range(0x300, 0x10000), *range(0x11000, 0x12000)))
    return frozenset(chr(int(end[1], 16)) for end in ends if len(end) == 2 and "<" not in end[0])
