"""Which messages a message answers (RFC 5256 3, REFERENCES): keys of the Message-IDs in its header."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import xxhash

from relaymta.proto.mime import header_fields

__all__ = ["KEY_SIZE", "REFERENCES_MOST", "thread_keys"]

KEY_SIZE: Final = 8
REFERENCES_MOST: Final = 100  # the last ones
NO_KEY: Final = bytes(KEY_SIZE)

_ID = re.compile(rb"<([^<>]++)>")
_BLANK = re.compile(rb"[ \t\r\n]+")
_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)
_NAMES: Final = frozenset((b"message-id", b"references", b"in-reply-to"))


def thread_keys(header: bytes) -> bytes:
    """Keys of the Message-IDs in a header, KEY_SIZE octets each (xxh3_64, little-endian): the message's own, 0 where it has none
    that is valid; then those of References in their order, the last REFERENCES_MOST; where these are none, the first one of
    In-Reply-To. Of several fields of a name the first counts. In linear time."""
    found: dict[bytes, bytes] = {}
    for begin, name_end, start, end in header_fields(header, 0, len(header)):
        name = header[begin:name_end].lower()
        if name in _NAMES and name not in found:
            found[name] = header[start:end]
    own = _keys(_idents(found.get(b"message-id", b"")), 1) or [NO_KEY]
    references = _keys(reversed([*_idents(found.get(b"references", b""))]), REFERENCES_MOST)[::-1]
    return b"".join(own + (references or _keys(_idents(found.get(b"in-reply-to", b"")), 1)))


def _idents(value: bytes) -> Iterator[bytes]:
    """What is between < and > in a field's value."""
    return (match[1] for match in _ID.finditer(value))


def _keys(idents: Iterable[bytes], most: int) -> list[bytes]:
    """Keys of the first valid ones of Message-IDs."""
    normal = (_normal(ident) for ident in idents)
    return list(islice((_key(ident) for ident in normal if ident), most))


def _normal(ident: bytes) -> bytes:
    """What is between < and >, with what quotes it and folds it removed; b"" where it is no Message-ID."""
    left, at, right = _BLANK.sub(b"", ident).rpartition(b"@")
    if left[:1] == b'"' == left[-1:] and len(left) > 1:
        left = _QUOTED_PAIR.sub(rb"\1", left[1:-1])
    return left + at + right if left and right else b""


def _key(ident: bytes) -> bytes:
    return (xxhash.xxh3_64_intdigest(ident) or 1).to_bytes(KEY_SIZE, "little")
