"""Authentication-Results of others (RFC 8601): which of them claim to be ours."""

import re

from relaymta.proto.dkim import name_of

__all__ = ["without_forged"]

BRACKETS = 50  # of comments in one place; each takes as long as a hundred octets
_BLANK = re.compile(rb"[ \t\r\n]*+")
_WITHIN_COMMENT = re.compile(rb"(?:[^()\\]|\\.)*+([()])", re.S)
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*+)"', re.S)
_TOKEN = re.compile(rb'[^\s\x00-\x1f()<>@,;:\\"/\[\]?=]++')  # RFC 2045 5.1
_PAIR = re.compile(rb"\\(.)", re.S)
_VERSION = re.compile(rb"[0-9]*+")


def without_forged(block: bytes, hostname: str) -> bytes:
    """A header block without Authentication-Results fields that claim to be ours, or may be read so (RFC 8601 5)."""
    if b"uthentication-" not in block and b"authentication-results" not in block.lower():
        return block
    fields = re.split(rb"(?<=\r\n)(?![ \t])", block)
    return b"".join(field for field in fields if not _ours(field, hostname))


def _ours(field: bytes, hostname: str) -> bool:
    """Whether a field is Authentication-Results of this host, or nobody can say of which."""
    if name_of(field) != b"authentication-results":
        return False
    value = field.partition(b":")[2]
    at = _behind_blanks(value, 0)
    match = _QUOTED.match(value, at) or _TOKEN.match(value, at)
    if match is None:
        return True
    if value[match.end() : match.end() + 1] == b"=":  # no identifier: `spf=pass ...`, as some have it
        return False
    said = _PAIR.sub(rb"\1", match[1]) if match.re is _QUOTED else match[0]
    if said.decode("utf-8", "replace").strip().lower().rstrip(".") == hostname.lower().rstrip("."):
        return True
    version = _VERSION.match(value, _behind_blanks(value, match.end()))
    assert version is not None
    at = _behind_blanks(value, version.end())
    return at < len(value) and value[at : at + 1] != b";"


def _behind_blanks(value: bytes, at: int) -> int:
    """Where white space and comments end that stand at `at`; a comment without an end, or more than anybody has, end nowhere."""
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
