"""PREVIEW (RFC 8970): the beginning of a message's text."""

import re
from collections.abc import Callable
from html import unescape
from typing import Final

from relaymta._speedups.mime import Part, scan
from relaymta._speedups.text import base64, quoted_printable
from relaymta.proto.mime import PLACE
from relaymta.proto.mime_text import charset_of, decoded, is_text

__all__ = ["CHARACTERS", "preview"]

CHARACTERS: Final = 200
READ_MOST: Final = 16 << 10  # octets of the part that are looked at
HEADER_MOST: Final = 16 << 10  # octets of a part's header
PARTS_MOST: Final = 20  # that are looked at for one of text

_UNDO: Final[dict[int, Callable[[bytes], bytes]]] = {1: quoted_printable, 2: base64}
_LINE_END = re.compile(r"\r\n?|\n")
_HIDDEN = re.compile(r"<(script|style|head|title)\b.*?(?:</\1\s*+>|\Z)|<!--.*?(?:-->|\Z)", re.S | re.I)
_TAG = re.compile(r"<[/!?a-zA-Z][^<>]*+(?:>|\Z)")
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u034f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]+")


def preview(parts: bytes, read: Callable[[int, int], bytes]) -> str:
    """At most CHARACTERS of the first part of plain text, or else of HTML, on one line: without quoted lines, unless there are
    no others, and without a signature; "" where there is none. `parts`: as of mime.Description; `read(start, end)`: octets of
    the message. In linear time."""
    found = _text_part(parts, read)
    if found is None:
        return ""
    text, html = found
    shown = _of_html(text) if html else _of_plain(text)
    return " ".join(_NOT_SHOWN.sub(" ", shown).split())[:CHARACTERS].rstrip()


def _text_part(parts: bytes, read: Callable[[int, int], bytes]) -> tuple[str, bool] | None:
    """The beginning of the text that is shown, and whether it is HTML."""
    html: tuple[str, bool] | None = None
    for number, (kind, _, start, header_size, size) in enumerate(PLACE.iter_unpack(parts)):
        if number >= PARTS_MOST:
            break
        if kind & 15 or not size:
            continue
        header = read(start, start + min(header_size, HEADER_MOST))
        part = scan(header)[0]
        subtype = header[part.subtype : part.subtype_end].lower() if part.type >= 0 else b"plain"
        if not is_text(header, part) or subtype not in (b"plain", b"html") or _is_attached(header):
            continue
        if subtype == b"plain" or html is None:
            body = start + header_size
            text = _decoded(header, part, read(body, body + min(size, READ_MOST)))
            if subtype == b"plain":
                return text, False
            html = text, True
    return html


def _is_attached(header: bytes) -> bool:
    return re.search(rb"^content-disposition:\s*+attachment", header, re.M | re.I) is not None


def _decoded(header: bytes, part: Part, data: bytes) -> str:
    undo = _UNDO.get(part.encoding)
    return decoded(data if undo is None else undo(data), charset_of(header, part)).rstrip("\ufffd")


def _of_plain(text: str) -> str:
    lines = _LINE_END.split(text)
    for at, line in enumerate(lines):
        if line == "-- " or (line == "--" and at):
            lines = lines[:at]
            break
    own = [line for at, line in enumerate(lines) if not (line.startswith(">") or _introduces(lines, at))]
    return "\n".join(own if any(map(str.strip, own)) else lines)


def _introduces(lines: list[str], at: int) -> bool:
    """Whether a line says who wrote the quoted ones behind it."""
    return lines[at].rstrip().endswith(":") and any(line.startswith(">") for line in lines[at + 1 : at + 3])


def _of_html(text: str) -> str:
    return unescape(_TAG.sub(" ", _without_hidden(text)))


def _without_hidden(text: str) -> str:
    """HTML without scripts, style, head and comments: to their end, or to the text's."""
    return _HIDDEN.sub(" ", text)
