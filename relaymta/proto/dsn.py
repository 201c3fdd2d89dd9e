"""DSNs about failed recipients: delivery status notifications (RFC 3464) in a multipart/report (RFC 6522).

The sender is an outsider: a DSN quotes the peer's reply or `Attempt.text`, never `Attempt.inside`. Replies, addresses and the
original header come from outsiders too: control characters are replaced in each line, so that none can start another line.

Octets above 127 are sent as they are only to a sender whose address has such characters: its host offers SMTPUTF8, and so
8BITMIME (RFC 6531 3.1). Every other DSN has only 7-bit octets, since no DSN would report that a 7-bit host could not accept it.
"""

import re
from binascii import b2a_qp
from collections.abc import Sequence

from relaymta.proto.envelope import Attempt, Envelope
from relaymta.proto.header import rfc5322_date
from relaymta.proto.said import LONGEST

__all__ = ["failure_dsn"]

HEADER_LIMIT = 64 * 1024  # octets of the original header that are returned
LINE_LIMIT = 900  # octets of a generated line (RFC 5322 2.1.1: at most 998)
REPLY_LIMIT = LONGEST  # characters of a reply
REPLIES_LIMIT, REPLY_LEAST = 256 << 10, 500  # ... of all replies together; but so many of each
WIDTH = 76  # characters of a line at which a reply is folded (RFC 5322 2.1.1: 78)
WORD_LIMIT = 200  # characters of a word of a reply: longer ones are divided

_CONTROL = re.compile(rb"[\0\r\n]")
_WORDS = re.compile(rf"\S{{1,{WORD_LIMIT}}}")


def failure_dsn(
    envelope: Envelope,
    failed: Sequence[tuple[str, Attempt, bool]],
    original_header: bytes,
    *,
    hostname: str,
    ident: str,
    original_ident: str,
    seconds: int,
) -> bytes:
    """The message data of a DSN about `failed` recipients (address, last attempt, whether the message expired).

    It is addressed to the envelope's sender, returns the original header (not the body), and carries Auto-Submitted
    (RFC 3834 5), so that no automatic responder answers it. `seconds`: its Date, wall clock, UTC. It needs SMTPUTF8 if the sender
    has characters above 127, and 8BITMIME if it is not ASCII.
    """
    boundary = f"=_{ident}"
    while boundary.encode() in original_header:
        boundary += "_"
    utf8 = not envelope.sender.isascii()
    parts = [_text(failed, hostname, utf8), _status(envelope, failed, hostname, original_ident, utf8)]
    parts.append(_headers(original_header, utf8))
    head = [
        f"From: Mail Delivery System <MAILER-DAEMON@{hostname}>",
        f"To: <{envelope.sender}>",
        "Subject: Undelivered mail returned to sender",
        f"Date: {rfc5322_date(seconds)}",
        f"Message-ID: <{ident}@{hostname}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
    ]
    out = [_line(line, utf8) + b"\r\n" for line in head]
    out.append(f'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="{boundary}"\r\n'.encode())
    if not all(map(bytes.isascii, parts)):
        out.append(b"Content-Transfer-Encoding: 8bit\r\n")
    border = f"\r\n--{boundary}".encode()
    for part in parts:
        out += [border, b"\r\n", part]
    return b"".join([*out, border, b"--\r\n"])


def _part(kind: str, content: bytes, utf8: bool) -> bytes:
    """A body part. `utf8`: octets above 127 may be in it."""
    encoding = "7bit" if content.isascii() else "8bit" if utf8 else "quoted-printable"
    if encoding == "quoted-printable":
        content = b2a_qp(content, istext=True)
    return f"Content-Type: {kind}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n".encode() + content


def _text(failed: Sequence[tuple[str, Attempt, bool]], hostname: str, utf8: bool) -> bytes:
    """The part for people."""
    lines = [
        f"This is the mail system at {hostname}.",
        "",
        "Your message could not be delivered to the following recipients.",
        "It will not be tried again.",
        "",
    ]
    out = [f"{line}\r\n".encode() for line in lines]
    most = _reply_limit(len(failed))
    for address, attempt, expired in failed:
        late = "message expired; last attempt: " if expired else ""
        where = ", ".join(word for word in (attempt.phase, _remote(attempt)) if word)
        out.append(_folded(f"<{address}>: {late}{attempt.whole[:most]} ({where})", "    ", True))
    content = b"".join(out)
    return _part(f"text/plain; charset={'us-ascii' if content.isascii() else 'utf-8'}", content, utf8)


def _status(
    envelope: Envelope, failed: Sequence[tuple[str, Attempt, bool]], hostname: str, original_ident: str, utf8: bool
) -> bytes:
    """The part for programs (RFC 3464 2.1). Where a recipient has characters above 127 it has the form of RFC 6533 4, which
    allows them everywhere; else they are replaced by question marks."""
    wide = not all(address.isascii() for address, _, _ in failed)
    lines = [
        f"Reporting-MTA: dns; {hostname}",
        f"X-Relaymta-Id: {original_ident}",
        f"Arrival-Date: {rfc5322_date(envelope.arrived // 1000)}",
    ]
    out = [_line(line, wide) + b"\r\n" for line in lines]
    most = _reply_limit(len(failed))
    for address, attempt, expired in failed:
        out += [b"\r\n", _recipient_fields(address, attempt, expired, wide, most)]
    return _part(f"message/{'global-' if wide else ''}delivery-status", b"".join(out), utf8)


def _reply_limit(recipients: int) -> int:
    """The characters of each reply in a DSN about so many recipients."""
    return max(min(REPLY_LIMIT, REPLIES_LIMIT // recipients), REPLY_LEAST)


def _recipient_fields(address: str, attempt: Attempt, expired: bool, wide: bool, most: int) -> bytes:
    """The per-recipient fields of RFC 3464 2.3. `wide`: characters above 127 are allowed; `most`: characters of the reply."""
    kind = "rfc822" if address.isascii() else "utf-8"
    enhanced = attempt.enhanced or "5.0.0"
    lines = [
        f"Final-Recipient: {kind}; {address}",
        "Action: failed",
        f"Status: {'4.4.7' if expired else '5' + enhanced[1:]}",
    ]
    if _remote(attempt):
        lines.append(f"Remote-MTA: dns; {_remote(attempt)}")
    if attempt.code:
        reply = f"smtp; {attempt.code} {attempt.enhanced} {attempt.text[:most]}"
    else:
        reply = f"X-relaymta; {attempt.text[:most]}"
    return b"".join(
        [
            *(_line(line, wide) + b"\r\n" for line in lines),
            _folded(f"Diagnostic-Code: {reply}", " ", wide),
            f"Last-Attempt-Date: {rfc5322_date(attempt.time // 1000)}\r\n".encode(),
        ]
    )


def _headers(original: bytes, utf8: bool) -> bytes:
    """The part with the original header (RFC 6522 4; RFC 6533 6.3 where it is in UTF-8)."""
    content = _returned_header(original)
    kind = "text/rfc822-headers"
    if not content.isascii():
        try:
            content.decode()
            kind = "message/global-headers"
        except UnicodeDecodeError:  # of an unknown charset
            utf8 = False
    return _part(kind, content, utf8)


def _remote(attempt: Attempt) -> str:
    """The peer's name; "" for a Unix socket, whose path is not shown to outsiders."""
    return "" if attempt.peer.startswith("unix:") else attempt.peer


def _clean(text: str, wide: bool) -> str:
    """A text as one line: control characters become spaces, and those above 127 question marks unless they are allowed."""
    seen = "".join(c if c.isprintable() or c == "\t" else " " for c in text)
    return seen if wide else seen.encode("ascii", "replace").decode()


def _line(line: str, wide: bool) -> bytes:
    """One generated line, cut to LINE_LIMIT octets."""
    octets = _clean(line, wide).encode("utf-8", "replace")
    return octets if len(octets) <= LINE_LIMIT else octets[:LINE_LIMIT].decode("utf-8", "ignore").encode() + b"..."


def _folded(line: str, indent: str, wide: bool) -> bytes:
    """A line that is folded to WIDTH characters between words, with its CRLF; `indent` begins the further lines."""
    out: list[str] = []
    current = ""
    for word in _WORDS.findall(_clean(line, wide)):
        if current and len(current) + 1 + len(word) > WIDTH:
            out.append(current)
            current = indent + word
        else:
            current = f"{current} {word}" if current else word
    return "".join(f"{one}\r\n" for one in [*out, current]).encode("utf-8", "replace")


def _returned_header(header: bytes) -> bytes:
    """The original header as a DSN returns it: whole lines of at most 998 octets, at most HEADER_LIMIT octets in all, without
    NUL, bare CR and bare LF, which some software takes for the end of a line."""
    lines = header[:HEADER_LIMIT].split(b"\r\n")
    if len(header) > HEADER_LIMIT:
        lines.pop()
    kept = []
    for line in lines:
        if not line:
            break
        kept.append(_CONTROL.sub(b" ", line[:998]))
    return b"".join(line + b"\r\n" for line in kept)
