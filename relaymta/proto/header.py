"""Header blocks as bytes: found, counted and prepended to; a message is never parsed and rebuilt."""

import re
from email.utils import formatdate

__all__ = ["HEADER_SEEN", "LINES_SEEN", "count_received", "field_names", "fields", "header_end", "received_field", "too_long"]

HEADER_SEEN = 131072  # octets of a text that are looked at for its header
LINES_SEEN = 5000  # of one that is taken apart: nobody's has a tenth, and each costs as much as a hundred octets

_RECEIVED = re.compile(rb"^received:", re.I | re.M)
_NAME = re.compile(rb"^([!-9;-~]+)[ \t]*:", re.M)
_SAFE = re.compile(r"[^A-Za-z0-9._:\[\]-]")

# The date is the same for all messages of a second, and formatting it costs more than the rest of the field.
_date: tuple[int, str] = (0, "")


def header_end(text: bytes) -> int:
    """Where the body begins in `text`: behind the empty line, or the whole length when there is none."""
    if text.startswith(b"\r\n"):
        return 2
    end = text.find(b"\r\n\r\n")
    return len(text) if end < 0 else end + 4


def too_long(header: bytes) -> bool:
    """Whether a header block is longer than anybody's, and would take too long to be taken apart."""
    return len(header) > HEADER_SEEN or header.count(b"\n") > LINES_SEEN


def count_received(header: bytes) -> int:
    """How many hops a header block names (RFC 5321 6.3)."""
    return len(_RECEIVED.findall(header)) if header.count(b":") > 8 else header.lower().count(b"received:")


def field_names(header: bytes) -> set[bytes]:
    """The field names of a header block, lower case."""
    return {match.lower() for match in _NAME.findall(header)}


def fields(header: bytes) -> list[tuple[bytes, str]]:
    """The fields of a header block: name in lower case, and value unfolded (RFC 5322 2.2.3); octets that are no UTF-8
    replaced, encoded words as they stand."""
    found: list[tuple[bytes, str]] = []
    for line in re.split(rb"\r\n(?![ \t])", header):
        name, colon, value = line.partition(b":")
        if colon:
            text = value.replace(b"\r\n", b"").decode("utf-8", "replace").strip()
            found.append((name.strip().lower(), text))
    return found


def rfc5322_date(seconds: int) -> str:
    """A wall-clock second as RFC 5322 writes it, in UTC."""
    global _date
    known, text = _date
    if known != seconds:
        text = formatdate(seconds, localtime=False).replace("-0000", "+0000")
        _date = (seconds, text)
    return text


def received_field(*, hostname: str, helo: str, client: str, protocol: str, ident: str, recipient: str, seconds: int) -> bytes:
    """Our trace field (RFC 5321 4.4), CRLF included. `recipient` is named only when it is the only one."""
    address = f"[IPv6:{client}]" if ":" in client else f"[{client}]"
    shown = helo if not _SAFE.search(helo) else _SAFE.sub("?", helo)
    target = f"\r\n\tfor <{recipient}>" if recipient else ""
    return (
        f"Received: from {shown or 'unknown'} ({address})\r\n\tby {hostname} (relaymta) with {protocol} id {ident}"
        f"{target};\r\n\t{rfc5322_date(seconds)}\r\n"
    ).encode()
