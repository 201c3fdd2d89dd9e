"""Authentication-Results fields in received mail (RFC 8601): those with our own authserv-id are forged, and removed."""

import re

from relaymta.proto.dkim import name_of

__all__ = ["behind_comments", "without_forged"]

BRACKETS = 50  # parentheses of comments in a row; each costs as much as a hundred octets
_BLANK = re.compile(rb"[ \t\r\n]*+")
_WITHIN_COMMENT = re.compile(rb"(?:[^()\\]|\\.)*+([()])", re.S)
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*+)"', re.S)
_TOKEN = re.compile(rb'[^\s\x00-\x1f()<>@,;:\\"/\[\]?=]++')  # RFC 2045 5.1
_PAIR = re.compile(rb"\\(.)", re.S)
_VERSION = re.compile(rb"[0-9]*+")


def without_forged(block: bytes, hostname: str) -> bytes:
    """A header block without Authentication-Results whose authserv-id is `hostname`, or may be read as it (RFC 8601 5)."""
    if b"uthentication-" not in block and b"authentication-results" not in block.lower():
        return block
    fields = re.split(rb"(?<=\r\n)(?![ \t])", block)
    return b"".join(field for field in fields if not _ours(field, hostname))


def _ours(field: bytes, hostname: str) -> bool:
    """Whether a field is Authentication-Results whose authserv-id is `hostname`, or cannot be determined."""
    if name_of(field) != b"authentication-results":
        return False
    value = field.partition(b":")[2]
    at = behind_comments(value, 0)
    match = _QUOTED.match(value, at) or _TOKEN.match(value, at)
    if match is None:
        return True
    if value[match.end() : match.end() + 1] == b"=":  # no authserv-id: `spf=pass ...`, as some programs write
        return False
    identifier = _PAIR.sub(rb"\1", match[1]) if match.re is _QUOTED else match[0]
    if identifier.decode("utf-8", "replace").strip().lower().rstrip(".") == hostname.lower().rstrip("."):
        return True
    version = _VERSION.match(value, behind_comments(value, match.end()))
    assert version is not None
    at = behind_comments(value, version.end())
    return at < len(value) and value[at : at + 1] != b";"


def behind_comments(value: bytes, at: int) -> int:
    """The index behind white space and comments (RFC 5322 3.2.2) at `at`; the end of `value` if unterminated or too many."""
    depth = 0
    for _ in range(BRACKETS):
        if depth == 0:
            match = _BLANK.match(value, at)
            assert match is not None
            at = match.end()
            if value[at : at + 1] != b"(":
                return at
            depth, at = 1, at + 1
        match = _WITHIN_COMMENT.match(value, at)
        if match is None:
            return len(value)
        depth += 1 if match[1] == b"(" else -1
        at = match.end()
    return len(value)
