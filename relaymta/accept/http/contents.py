"""The octets of attachments, encoded in base64 (RFC 2045 6.8) while they are read: of a JSON string, which has them in base64
already, and of a part of the request. None is ever in memory as a whole."""

import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Protocol

from relaymta.accept.http.models import Attachment, Wrong

__all__ = ["Content", "Part", "content_of"]

LINE = 76  # characters of base64 (RFC 2045 6.8)
_LINES = 840  # of one piece: below 64 KiB with their line ends
_CHARACTERS = LINE * _LINES
_OCTETS = _CHARACTERS // 4 * 3
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_ESCAPE = re.compile(rb"\\(?:u00([0-9A-Fa-f]{2})|(/))")
_COMMON = ((rb"\/", b"/"), (rb"\u002B", b"+"), (rb"\u002b", b"+"))  # as PHP and .NET write them
_UNFINISHED = re.compile(rb"\\(?:u[0-9A-Fa-f]{0,3})?\Z")


class Part(Protocol):
    """Octets that came beside the JSON, in memory or in a file."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read(self, at: int, most: int) -> bytes:
        """`most` octets from index `at`, or fewer; none only at the end."""


class Content(Protocol):
    """What an attachment has in message data: lines of base64, CRLF between them."""

    @property
    def size(self) -> int:
        """Octets."""

    def pieces(self) -> Iterator[bytes]:
        """Pieces of 64 KiB at most. Raises Wrong where the octets end too early."""


def content_of(attachment: Attachment, parts: Mapping[str, Part]) -> Content:
    """The content of an attachment. Raises Wrong when there is no such part, or the base64 of a JSON string is not valid: that is
    read as a whole once for a request."""
    if attachment.part is not None:
        part = parts.get(attachment.part)
        if part is None:
            raise Wrong(f"{attachment.field}.part", "the request has no part of this name")
        return _OfPart(part, f"{attachment.field}.part")
    if attachment.characters is None:
        attachment.characters = _checked(attachment.content, f"{attachment.field}.content")
    return _OfString(attachment.content, attachment.characters)


def _in_lines(characters: bytes) -> bytes:
    return b"\r\n".join([characters[at : at + LINE] for at in range(0, len(characters), LINE)])


def _size(characters: int) -> int:
    return characters + max(0, (characters - 1) // LINE) * 2


class _OfPart:
    def __init__(self, part: Part, field: str) -> None:
        self._part, self._field = part, field
        self.size = _size((part.size + 2) // 3 * 4)

    def pieces(self) -> Iterator[bytes]:
        """As of Content."""
        size = self._part.size
        for at in range(0, size, _OCTETS):
            yield (b"\r\n" if at else b"") + _in_lines(
                binascii.b2a_base64(self._read(at, min(_OCTETS, size - at)), newline=False)
            )

    def _read(self, at: int, most: int) -> bytes:
        octets = self._part.read(at, most)
        while len(octets) < most:
            more = self._part.read(at + len(octets), most - len(octets))
            if not more:
                raise Wrong(self._field, "it has ended before all of its octets were read")
            octets += more
        return octets


class _OfString:
    def __init__(self, content: memoryview, characters: int) -> None:
        self._content, self._characters = content, characters
        self.size = _size(characters)

    def pieces(self) -> Iterator[bytes]:
        """As of Content."""
        ahead = b""
        between = b""
        for piece in _characters_of(self._content, self._characters != len(self._content)):
            ahead = ahead + piece if ahead else piece
            if len(ahead) >= _CHARACTERS:
                yield between + _in_lines(ahead[:_CHARACTERS])
                ahead, between = ahead[_CHARACTERS:], b"\r\n"
        if ahead:
            yield between + _in_lines(ahead)


def _characters_of(content: memoryview, escapes: bool) -> Iterator[bytes]:
    """The characters of a JSON string, in pieces of _CHARACTERS at most. `escapes`: some are escaped, as several libraries do
    with `/` and `+`."""
    if not escapes:
        for at in range(0, len(content), _CHARACTERS):
            yield bytes(content[at : at + _CHARACTERS])
        return
    ahead = b""
    for at in range(0, len(content), _CHARACTERS - 5):
        piece = ahead + bytes(content[at : at + _CHARACTERS - 5])
        unfinished = _UNFINISHED.search(piece, max(0, len(piece) - 5))
        ahead = unfinished[0] if unfinished is not None else b""
        yield _unescaped(piece[: len(piece) - len(ahead)])
    yield ahead


def _unescaped(piece: bytes) -> bytes:
    if b"\\\\" not in piece:  # a backslash is not base64: what is behind it is left for the error
        for escape, character in _COMMON:
            piece = piece.replace(escape, character)
    return _ESCAPE.sub(_character, piece) if b"\\" in piece else piece


def _character(match: re.Match[bytes]) -> bytes:
    return match[2] or bytes((int(match[1], 16),))


def _checked(content: memoryview, field: str) -> int:
    """The characters of a JSON string that is base64 with padding, and without anything else (RFC 4648 3). Raises Wrong."""
    characters, end = 0, b""
    escapes = any(b"\\" in bytes(content[at : at + _CHARACTERS]) for at in range(0, len(content), _CHARACTERS))
    for piece in _characters_of(content, escapes):
        other = piece.translate(None, _ALPHABET)
        if (other and other not in (b"=", b"==")) or (piece and end.endswith(b"=") and piece != b"="):
            raise Wrong(field, _reason(piece))
        if other and not piece.endswith(other):
            raise Wrong(field, "base64 has = at its end only")
        characters += len(piece)
        end = (end + piece)[-4:]
    if characters % 4:
        raise Wrong(field, "base64 has a multiple of four characters, with = at its end")
    if end and _again(end) != end:
        raise Wrong(field, "the last characters of the base64 are not valid")
    return characters


def _again(end: bytes) -> bytes:
    try:
        return binascii.b2a_base64(binascii.a2b_base64(end, strict_mode=True), newline=False)
    except binascii.Error:
        return b""


def _reason(piece: bytes) -> str:
    if b"\\n" in piece or b"\\r" in piece:
        return "base64 is to be without line breaks (RFC 4648 3.1)"
    if b"-" in piece or b"_" in piece:
        return "it is base64url; base64 has + and / (RFC 4648 4)"
    return "it is not base64 (RFC 4648 4)"
