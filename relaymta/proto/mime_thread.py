"""Which messages a message answers (RFC 5256 3, REFERENCES): keys of the Message-IDs in its header."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

import xxhash

__all__ = ["KEY_SIZE", "REFERENCES_MOST", "thread_keys"]

KEY_SIZE: Final = 8
REFERENCES_MOST: Final = 100  # the last ones
LOOKED_AT: Final = 1000  # Message-IDs of a field, valid or not,
IDENT_MOST: Final = 4096  # and octets of one
NO_KEY: Final = bytes(KEY_SIZE)

_ID = re.compile(rb"<([^<>]++)>")
_REVERSED = re.compile(rb">([^<>]++)<")
_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)
_END = re.compile(rb"\n\r?\n")  # of a header
_FIELD_END = re.compile(rb"\n(?![ \t])")
_FIELDS: Final = {name: re.compile(rb"\n%b[ \t]*+:" % name) for name in (b"message-id", b"references", b"in-reply-to")}


def thread_keys(header: bytes) -> bytes:
    """Keys of the Message-IDs in a header, KEY_SIZE octets each (xxh3_64, little-endian): the message's own, 0 where it has none
    that is valid; then those of References in their order, the last REFERENCES_MOST; where these are none, the first one of
    In-Reply-To. Of several fields of a name the first counts. In linear time, and little of it: there may be 100,000 fields."""
    header = b"\n" + header
    end = _END.search(header)
    lowered = header[: len(header) if end is None else end.start() + 1].lower()
    found = {name: _value(header, field.search(lowered)) for name, field in _FIELDS.items()}
    own = _keys(_idents(found[b"message-id"]), 1) or [NO_KEY]
    references = _keys(_last_idents(found[b"references"]), REFERENCES_MOST)[::-1]
    return b"".join(own + (references or _keys(_idents(found[b"in-reply-to"]), 1)))


def _value(header: bytes, found: re.Match[bytes] | None) -> bytes:
    """The value of the field that was found, folded; b"" without one."""
    if found is None:
        return b""
    end = _FIELD_END.search(header, found.end())
    return header[found.end() : len(header) if end is None else end.start() + 1]


def _idents(value: bytes) -> Iterator[bytes]:
    """What is between < and > in a field's value."""
    return (match[1] for match in _ID.finditer(value))


def _last_idents(value: bytes) -> Iterator[bytes]:
    """The same, the last one first."""
    return (match[1][::-1] for match in _REVERSED.finditer(value[::-1]))


def _keys(idents: Iterator[bytes], most: int) -> list[bytes]:
    """Keys of the first valid ones of Message-IDs."""
    normal = (_normal(ident) for ident in islice(idents, LOOKED_AT))
    return list(islice((_key(ident) for ident in normal if ident), most))


def _normal(ident: bytes) -> bytes:
    """What is between < and >, with what quotes it and folds it removed; b"" where it is no Message-ID."""
    if len(ident) > IDENT_MOST:
        return b""
    left, at, right = ident.translate(None, b" \t\r\n").rpartition(b"@")
    if left[:1] == b'"' == left[-1:] and len(left) > 1:
        left = _QUOTED_PAIR.sub(rb"\1", left[1:-1])
    return left + at + right if left and right else b""


def _key(ident: bytes) -> bytes:
    return (xxhash.xxh3_64_intdigest(ident) or 1).to_bytes(KEY_SIZE, "little")
