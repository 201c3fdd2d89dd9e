"""Authentication-Results fields (RFC 8601): ours are written, and those that claim to be ours in received mail are removed."""

import re
import unicodedata
from functools import lru_cache

from relaymta.proto.address import in_a_labels
from relaymta.proto.dkim import name_of

__all__ = ["behind_comments", "field", "mailbox", "result", "value", "without_forged"]

BRACKETS = 50  # parentheses of comments in a row; each costs as much as a hundred octets
LINE = 900  # octets of a line, above which each property gets a line of its own
LONGEST_ID = 1000  # characters of an identifier that may be a host's name, in its longest form (NFD)
ODD_MOST = 10  # fields that are not ASCII in a header; to compare their identifiers costs most, and further ones are removed
LONGEST = 400  # octets of a value that we write; addresses have less
_BLANK = re.compile(rb"[ \t\r\n]*+")
_WITHIN_COMMENT = re.compile(rb"(?>(?:[^()\\]++|\\.)*)([()])", re.S)
_QUOTED = re.compile(rb'"((?>(?:[^"\\]++|\\.)*))"', re.S)
_TOKEN = re.compile(rb'[^\s\x00-\x1f\x7f()<>@,;:\\"/\[\]?=]++')  # RFC 2045 5.1
_PAIR = re.compile(rb"\\(.)", re.S)
_VERSION = re.compile(rb"[0-9]*+")
# What cannot be seen: control and format characters, fillers, variation selectors.
_NOTHING = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]++"
)

_PLAIN = re.compile(r"[!#$%&'*+.0-9A-Z^_`a-z{|}~-]++\Z")  # a token
_ATOM = r"[!#$%&'*+/0-9=?A-Z^_`a-z{|}~\x80-\U0010ffff-]++"  # RFC 6532 3.2
_LOCAL = re.compile(rf'(?:{_ATOM}(?>(?:\.{_ATOM})*)|"(?>(?:[^"\\]++|\\.)*)")\Z')
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})+\Z")


def field(hostname: str, results: list[str]) -> bytes:
    """Our field, CRLF included, with `result`s, each on a line of its own."""
    return f"Authentication-Results: {value(hostname)};\r\n\t".encode() + ";\r\n\t".join(results).encode() + b"\r\n"


def result(method: str, outcome: str, properties: dict[str, str], reason: str = "") -> str:
    """`method=outcome reason="..." ptype.property=pvalue ...` (2.2). `properties`: as `value` or `mailbox` write them; one
    without a value ("") is left out."""
    parts = [f"{method}={outcome}"]
    if reason:
        parts.append(f"reason={_quoted(reason)}")
    parts += [f"{name}={text}" for name, text in properties.items() if text]
    line = " ".join(parts)
    return line if len(line.encode()) <= LINE else "\r\n\t ".join(parts)


def value(text: str) -> str:
    """An untrusted value, such as a domain: a token, or a quoted string where it is none. "" for ""."""
    return text if not text or (_PLAIN.match(text) and len(text) <= LONGEST) else _quoted(text)


def mailbox(address: str) -> str:
    """An untrusted address: `local-part@domain-name`, or where it is not that (an address literal) as `value` writes it. The
    domain is written in A-labels."""
    local, _, domain = address.rpartition("@")
    domain = domain if domain.isascii() else in_a_labels(domain)
    if _LOCAL.match(local) and local.isprintable() and _DOMAIN.match(domain):
        return f"{local}@{domain}"
    return value(f"{local}@{domain}")


def _quoted(text: str) -> str:
    """A quoted string (RFC 5322 3.2.4, RFC 6532); what cannot be in one is replaced."""
    short = text.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    shown = "".join(char if char.isprintable() and char != "\ufffd" else "?" for char in short)
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"'


def without_forged(block: bytes, hostname: str) -> bytes:
    """A header block without Authentication-Results whose authserv-id is `hostname`, or may be read as it (RFC 8601 5); the same
    object where there are none."""
    if b"authentication-results" not in block.lower():
        return block
    fields, kept, odd = re.split(rb"(?<=\r\n)(?![ \t])", block), [], 0
    for each in fields:
        if name_of(each) == b"authentication-results":
            odd += not each.isascii()
            if (not each.isascii() and odd > ODD_MOST) or _ours(each, hostname):
                continue
        kept.append(each)
    return block if len(kept) == len(fields) else b"".join(kept)


def _ours(field: bytes, hostname: str) -> bool:
    """Whether the authserv-id of an Authentication-Results field is `hostname`, or cannot be determined."""
    value = field.partition(b":")[2]
    at = behind_comments(value, 0)
    match = _QUOTED.match(value, at) or _TOKEN.match(value, at)
    if match is None:
        return True
    identifier = _PAIR.sub(rb"\1", match[1]) if match.re is _QUOTED else match[0]
    if _folded("".join(identifier.decode("utf-8", "replace").split())) in _spellings(hostname):
        return True
    if value[match.end() : match.end() + 1] == b"=" and match.re is _TOKEN:
        return False  # no authserv-id: `spf=pass ...`, as some programs write
    version = _VERSION.match(value, behind_comments(value, match.end()))
    assert version is not None
    at = behind_comments(value, version.end())
    return at < len(value) and value[at : at + 1] != b";"


def _folded(identifier: str) -> str:
    """A domain as a program could read it: without case, width, what cannot be seen, and a trailing dot. (IDNA would cost too
    much for each field.)"""
    if not (identifier.isascii() and identifier.isprintable()):
        identifier = _NOTHING.sub("", identifier)
    if not identifier.isascii() and len(identifier) <= LONGEST_ID:  # the cost is the square of a run of combining marks
        identifier = unicodedata.normalize("NFKC", identifier).replace("\u3002", ".").casefold()
    return identifier.lower().rstrip(".")


@lru_cache(10)
def _spellings(hostname: str) -> frozenset[str]:
    """A host's name as it is given, in A-labels and in U-labels."""
    import idna

    found = {_folded(hostname), in_a_labels(hostname)}
    try:
        found.add(_folded(idna.decode(in_a_labels(hostname))))
    except idna.IDNAError:
        pass
    return frozenset(found)


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
