"""The names within a zip archive (APPNOTE 4.3), whatever it says of itself.

A program that opens an archive may go by its directory, where that is or by an offset, by another directory in front of it, or by
the headers of its files. So every header counts, of either kind, wherever it is: no directory has to be there, none is believed,
and an archive behind a program (self-extracting), or within another without compression, is read, too. Linear.
"""

import struct
from collections.abc import Iterator
from typing import Final

from relaymta.proto.attachment_names import forms

__all__ = ["NAMES_MOST", "zip_names"]

NAMES_MOST: Final = 1000  # headers that are read
NAME_MOST: Final = 1024  # octets of a name: of a longer one its end
EXTRA_MOST: Final = 4096  # octets of extra fields that are read

_LOCAL = b"PK\3\4", 6, 26, 30  # signature, offsets of the flags and of the lengths, length
_CENTRAL = b"PK\1\2", 8, 28, 46
_LENGTHS = struct.Struct("<HH")
_UNICODE_PATH: Final = 0x7075  # 4.6.9


def zip_names(octets: bytes, most: int = NAMES_MOST) -> tuple[tuple[str, ...], bool]:
    """The names, each in all `forms`, and whether these are all: False where there are more than `most` headers, or names that
    are too long. Directories have no name here."""
    names: dict[str, None] = {}
    whole = True
    for signature, flags, lengths, size in (_CENTRAL, _LOCAL):
        at = octets.find(signature)
        count = 0
        while at >= 0 and at + size <= len(octets):
            if count >= most:
                whole = False
                break
            count += 1
            length, extra = _LENGTHS.unpack_from(octets, at + lengths)
            start, end = at + size, at + size + length
            whole = whole and length <= NAME_MOST
            name = octets[max(start, end - NAME_MOST) : end]
            utf_8 = bool(octets[at + flags + 1] & 8)
            for shown in dict.fromkeys((*_texts(name, utf_8), *_unicode_path(octets[end : end + min(extra, EXTRA_MOST)]))):
                if shown and not shown.endswith("/"):
                    names.update(dict.fromkeys(forms(shown)))
            at = octets.find(signature, at + 4)
    return tuple(names), whole


def _texts(name: bytes, utf_8: bool) -> Iterator[str]:
    """A name as programs read it: as UTF-8 or in the code page of MS-DOS (4.4.4, bit 11)."""
    if name.isascii():
        yield name.decode()
        return
    if not utf_8:
        yield name.decode("cp437")
    yield name.decode("utf-8", "replace")


def _unicode_path(extra: bytes) -> Iterator[str]:
    """The name that an extra field has in its place."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = _LENGTHS.unpack_from(extra, at)
        if kind == _UNICODE_PATH and size > 5:
            yield extra[at + 9 : at + 4 + size][-NAME_MOST:].decode("utf-8", "replace")
        at += 4 + size
