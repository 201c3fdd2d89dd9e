"""What the formats of export and import have in common: a message with its date, flags and keywords, and its line ends in a file.

In a file, a message whose lines all end with CRLF has LF instead; any other is written as it is. Read, a file without any CRLF
gets CRLF for LF, and any other is taken as it is. So every message comes back exactly, but for one that has bare LF and no CRLF
at all: it comes back with CRLF.
"""

import math
import re
from typing import Final

import msgspec

__all__ = ["FLAGS", "MOST", "Broken", "Stored", "atoms", "from_disk", "seconds_of", "to_disk"]

MOST: Final = 64 << 20  # octets of a message in a file
FLAGS: Final = ("\\Seen", "\\Answered", "\\Flagged", "\\Deleted", "\\Draft")

_ATOM = re.compile(r'[^\x00-\x20\x7f-\U0010ffff(){%*"\\\]]+')  # RFC 9051 9: flag-keyword
_EARLIEST, _LATEST = -62135596800, 253402300799  # years 1 to 9999


class Stored(msgspec.Struct, frozen=True):
    """A message of a mailbox. `data`: lines end with CRLF; `date`: INTERNALDATE, seconds UTC, written without its fraction;
    `flags`: of FLAGS, read in that order; `keywords`: atoms, each once, whatever its case."""

    data: bytes
    date: float
    flags: list[str] = []
    keywords: list[str] = []


class Broken(msgspec.Struct, frozen=True):
    """What cannot be read and is skipped. `place`: where it is, printable; `reason`: why."""

    place: str
    reason: str


def to_disk(data: bytes) -> bytes:
    """Message data as it is in a file."""
    pairs = data.count(b"\r\n")
    if pairs and pairs == data.count(b"\n") == data.count(b"\r"):
        return data.replace(b"\r\n", b"\n")
    return data


def from_disk(data: bytes) -> bytes:
    """Message data of what a file has."""
    return data if b"\r\n" in data else data.replace(b"\n", b"\r\n")


def atoms(words: list[str]) -> list[str]:
    """Those of `words` that can be keywords, in their order, each once (upper and lower case are the same)."""
    found: dict[str, str] = {}
    for word in words:
        if _ATOM.fullmatch(word):
            found.setdefault(word.lower(), word)
    return list(found.values())


def seconds_of(date: float) -> int:
    """The whole seconds of a date, at least in the year 1 and at most in 9999."""
    return min(max(math.floor(date), _EARLIEST), _LATEST)
