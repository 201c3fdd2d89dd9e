"""Authentication-Results of others (RFC 8601): which of them claim to be ours."""

import re

from relaymta.proto.dkim import name_of

__all__ = ["without_forged"]

_ID = re.compile(rb"\s*(?:\((?:[^()\\]|\\.)*\)\s*)*\"?([^\s;\"(]+)", re.S)


def without_forged(block: bytes, hostname: str) -> bytes:
    """A header block without Authentication-Results fields that claim to be ours (RFC 8601 5)."""
    if b"uthentication-" not in block and b"authentication-results" not in block.lower():
        return block
    fields = re.split(rb"(?<=\r\n)(?![ \t])", block)
    return b"".join(field for field in fields if not _ours(field, hostname))


def _ours(field: bytes, hostname: str) -> bool:
    if name_of(field) != b"authentication-results":
        return False
    match = _ID.match(field.partition(b":")[2])
    return match is None or match[1].decode("utf-8", "replace").lower().rstrip(".") == hostname.lower().rstrip(".")
