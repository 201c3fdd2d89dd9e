"""Header blocks as bytes: where they end, their fields, and our own trace field; a message is never parsed and rebuilt."""

import re
from email.utils import formatdate

__all__ = [
    "HEADER_SEEN", "LINES_SEEN", "begins_well", "begun", "count_received", "field_names", "fields", "first_octets",
    "header_end", "message_id", "received_field", "too_long",
]  # fmt: skip

HEADER_SEEN = 131072  # octets of message data within which its header must end
LINES_SEEN = 5000  # lines of a header that is parsed: real ones have less than a tenth; each costs as much as a hundred octets

_RECEIVED = re.compile(rb"^received:", re.I | re.M)
_UNFOLDED = re.compile(rb"\r\n(?![ \t])")
_NAME = re.compile(rb"^([!-9;-~]+)[ \t]*:", re.M)
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:|\r\n")
_FROM_LINE = re.compile(rb">*From ")
_MAILBOX_LINE = b"X-Mailbox-Line: "
_BETWEEN_WORDS = re.compile(rb"(?<=[^ \t])[ \t](?=[^ \t])")
LONGEST_LINE = 998  # octets, without CRLF (RFC 5322 2.1.1)
MAILBOX_LINES = 100  # `From ` lines in front of a message that become fields
HELO_SHOWN = 255  # characters of the client's name that Received: has: of some it is as long as a line
MESSAGE_ID_SHOWN = 256  # characters of a Message-ID that are logged
_MESSAGE_IDS = (b"\nMessage-ID:", b"\nMessage-Id:")  # as nearly all mail has it
_WHITE = (b" ", b"\t")
_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:", re.I | re.M)
_SAFE = re.compile(r"[^A-Za-z0-9._:\[\]-]")

# The date is the same for all messages of a second, and formatting it costs more than the rest of the field.
_date: tuple[int, str] = (0, "")


def header_end(data: bytes) -> int:
    """The index of the body in message data: behind the first empty line (RFC 5322 2.1), or the whole length without one; 0 where
    there is no header, since the first line is no field."""
    if data.startswith(b"\r\n"):
        return 2
    if _FIELD.match(data) is None:
        return 0
    end = data.find(b"\r\n\r\n")
    return len(data) if end < 0 else end + 4


def first_octets(data: list[bytes], most: int) -> bytes:
    """The first `most` octets of message data in pieces."""
    found: list[bytes] = []
    for piece in data:
        found.append(piece[:most])
        most -= len(found[-1])
        if not most:
            break
    return b"".join(found)


def begins_well(data: bytes) -> bool:
    """Whether message data begins with a header field or an empty line, so that our fields can be put in front of it."""
    return _FIELD.match(data) is not None


def begun(data: bytes) -> bytes:
    """Message data in which `From ` lines of mailboxes at its beginning are fields, as Postfix does it, with an empty line behind
    them if no field follows. The same object if there are none."""
    at = 0
    lines: list[bytes] = []
    while _FROM_LINE.match(data, at) and not _FIELD.match(data, at) and len(lines) < MAILBOX_LINES:
        end = data.find(b"\r\n", at)
        end = len(data) if end < 0 else end + 2
        lines.append(_mailbox_line(data[at:end]))
        at = end
    if not lines:
        return data
    if not _FIELD.match(data, at) and at < len(data):
        lines.append(b"\r\n")
    return b"".join([*lines, data[at:]])


def _mailbox_line(line: bytes) -> bytes:
    """A `From ` line as a field. One that would become too long by that is folded at a blank, if it has one to fold at."""
    text = line.rstrip(b"\r\n")
    if not LONGEST_LINE - len(_MAILBOX_LINE) < len(text) <= LONGEST_LINE:
        return _MAILBOX_LINE + line
    behind, text = line[len(text) :], text.rstrip(b" \t")
    if len(_MAILBOX_LINE) + len(text) <= LONGEST_LINE:
        return _MAILBOX_LINE + text + behind
    blanks = [match.start() for match in _BETWEEN_WORDS.finditer(text, 0, LONGEST_LINE // 2)]
    if blanks:
        return _MAILBOX_LINE + text[: blanks[-1]] + b"\r\n" + text[blanks[-1] :] + behind
    at = LONGEST_LINE // 2
    while text[at : at + 1] and text[at] & 0xC0 == 0x80:  # not within a character
        at -= 1
    return _MAILBOX_LINE + text[:at] + b"\r\n " + text[at:] + behind


def message_id(header: bytes) -> str:
    """The (first) Message-ID of a header block, with its brackets, for the log: unfolded, MESSAGE_ID_SHOWN characters at most; ""
    without one. What is not UTF-8 is replaced; control characters may be in it."""
    for name in _MESSAGE_IDS:
        at = header.find(name)
        if at >= 0:
            at += len(name)
            break
    else:
        match = _MESSAGE_ID.search(header) if b"message-id" in header.lower() else None
        if match is None:
            return ""
        at = match.end()
    end = header.find(b"\r\n", at)
    if end < 0 or end - at > 4 * MESSAGE_ID_SHOWN or header[end + 2 : end + 3] in _WHITE:  # folded, or too long
        value = header[at : at + 4 * MESSAGE_ID_SHOWN]
        match = _UNFOLDED.search(value)
        value = (value if match is None else value[: match.start()]).replace(b"\r\n", b"")
    else:
        value = header[at:end]
    return value.strip().decode("utf-8", "replace")[:MESSAGE_ID_SHOWN]


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
    for line in _UNFOLDED.split(header):
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


def received_field(
    *, hostname: str, helo: str, client: str, protocol: str, ident: str, recipient: str, seconds: int, tls: str = ""
) -> bytes:
    """The Received field that we add (RFC 5321 4.4), CRLF included. `recipient`: the only one, or "". `tls`: version and cipher
    (RFC 8314 4.4), or ""."""
    address = f"[IPv6:{client}]" if ":" in client else f"[{client}]"
    shown = (helo if not _SAFE.search(helo) else _SAFE.sub("?", helo))[:HELO_SHOWN]
    secured = f"\r\n\t({tls})" if tls else ""
    target = f"\r\n\tfor <{recipient}>" if recipient else ""
    return (
        f"Received: from {shown or 'unknown'} ({address}){secured}\r\n\tby {hostname} (relaymta) with {protocol} id {ident}"
        f"{target};\r\n\t{rfc5322_date(seconds)}\r\n"
    ).encode()
