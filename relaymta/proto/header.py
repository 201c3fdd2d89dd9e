"""Header blocks as bytes: where they end, their fields, and our own trace field; a message is never parsed and rebuilt."""

import re
from email.utils import formatdate

__all__ = [
    "HEADER_SEEN", "LINES_SEEN", "count_received", "field_names", "fields", "has_header", "header_end", "received_field",
    "too_long",
]  # fmt: skip

HEADER_SEEN = 131072  # octets of message data within which its header must end
LINES_SEEN = 5000  # lines of a header that is parsed: real ones have less than a tenth; each costs as much as a hundred octets

_RECEIVED = re.compile(rb"^received:", re.I | re.M)
_NAME = re.compile(rb"^([!-9;-~]+)[ \t]*:", re.M)
_SAFE = re.compile(r"[^A-Za-z0-9._:\[\]-]")

# The date is the same for all messages of a second, and formatting it costs more than the rest of the field.
_date: tuple[int, str] = (0, "")


def header_end(data: bytes) -> int:
    """The index of the body in message data: behind the first empty line (RFC 5322 2.1), or the whole length without one."""
    if data.startswith(b"\r\n"):
        return 2
    end = data.find(b"\r\n\r\n")
    return len(data) if end < 0 else end + 4


def has_header(data: bytes) -> bool:
    """Whether message data begins with a header, which may be empty. Otherwise all of it is body (text that a program has sent as
    it was), and an empty line must separate our fields from it."""
    first = data.find(b"\r\n", 0, HEADER_SEEN)
    return first == 0 or data.find(b":", 0, HEADER_SEEN if first < 0 else first) >= 0


def too_long(header: bytes) -> bool:
    """Whether a header block is too long to be parsed: real ones are shorter, and it would cost too much time."""
    return len(header) > HEADER_SEEN or header.count(b"\n") > LINES_SEEN


def count_received(header: bytes) -> int:
    """The number of Received fields in a header block (loop detection, RFC 5321 6.3); in a short one, an upper bound."""
    return len(_RECEIVED.findall(header)) if header.count(b":") > 8 else header.lower().count(b"received:")


def field_names(header: bytes) -> set[bytes]:
    """The field names of a header block, lower case."""
    return {match.lower() for match in _NAME.findall(header)}


def fields(header: bytes) -> list[tuple[bytes, str]]:
    """The fields of a header block: name in lower case, and value unfolded (RFC 5322 2.2.3); octets that are not
    UTF-8 are replaced, encoded words (RFC 2047) are not decoded."""
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
    """The Received field that we add (RFC 5321 4.4), CRLF included. `recipient`: the only one, or ""."""
    address = f"[IPv6:{client}]" if ":" in client else f"[{client}]"
    shown = helo if not _SAFE.search(helo) else _SAFE.sub("?", helo)
    target = f"\r\n\tfor <{recipient}>" if recipient else ""
    return (
        f"Received: from {shown or 'unknown'} ({address})\r\n\tby {hostname} (relaymta) with {protocol} id {ident}"
        f"{target};\r\n\t{rfc5322_date(seconds)}\r\n"
    ).encode()
