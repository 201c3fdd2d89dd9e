"""DSNs about failed recipients: delivery status notifications (RFC 3464) in a multipart/report (RFC 6522).

The sender is an outsider: a DSN quotes the peer's reply or `Attempt.text`, never `Attempt.inside`. Replies, addresses and the
original header come from outsiders too: control characters are replaced in each line, so that none can start another line.
"""

import re
from collections.abc import Sequence

from relaymta.proto.envelope import Attempt, Envelope
from relaymta.proto.header import rfc5322_date

__all__ = ["failure_dsn"]

HEADER_LIMIT = 64 * 1024  # octets of the original header that are returned
LINE_LIMIT = 900  # octets of a generated line (RFC 5322 2.1.1: at most 998)

_CONTROL = re.compile(rb"[\0\r\n]")


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
    (RFC 3834 5), so that no automatic responder answers it. `seconds`: its Date, wall clock, UTC.
    """
    boundary = f"=_{ident}"
    while boundary.encode() in original_header:
        boundary += "_"
    utf8 = not all(address.isascii() for address, _, _ in failed) or not envelope.sender.isascii()
    head = [
        f"From: Mail Delivery System <MAILER-DAEMON@{hostname}>",
        f"To: <{envelope.sender}>",
        "Subject: Undelivered mail returned to sender",
        f"Date: {rfc5322_date(seconds)}",
        f"Message-ID: <{ident}@{hostname}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="{boundary}"',
        "",
        f"--{boundary}",
        f"Content-Type: text/plain; charset={'utf-8' if utf8 else 'us-ascii'}",
        "",
        f"This is the mail system at {hostname}.",
        "",
        "Your message could not be delivered to the following recipients.",
        "It will not be tried again.",
        "",
    ]
    for address, attempt, expired in failed:
        late = "message expired; last attempt: " if expired else ""
        where = ", ".join(word for word in (attempt.phase, _remote(attempt)) if word)
        head.append(f"<{address}>: {late}{attempt.whole} ({where})")
    status = [
        "",
        f"--{boundary}",
        f"Content-Type: message/{'global-' if utf8 else ''}delivery-status",
        "",
        f"Reporting-MTA: dns; {hostname}",
        f"X-Relaymta-Id: {original_ident}",
        f"Arrival-Date: {rfc5322_date(envelope.arrived // 1000)}",
    ]
    for address, attempt, expired in failed:
        status += _recipient_fields(address, attempt, expired)
    closing = ["", f"--{boundary}", "Content-Type: text/rfc822-headers", "", ""]
    data = b"\r\n".join(_line(line, utf8) for line in [*head, *status, *closing])
    return data + _returned_header(original_header) + f"\r\n--{boundary}--\r\n".encode()


def _recipient_fields(address: str, attempt: Attempt, expired: bool) -> list[str]:
    """The per-recipient fields of RFC 3464 2.3, with the empty line before them."""
    kind = "rfc822" if address.isascii() else "utf-8"
    enhanced = attempt.enhanced or "5.0.0"
    lines = [
        "",
        f"Final-Recipient: {kind}; {address}",
        "Action: failed",
        f"Status: {'4.4.7' if expired else '5' + enhanced[1:]}",
    ]
    if _remote(attempt):
        lines.append(f"Remote-MTA: dns; {_remote(attempt)}")
    if attempt.code:
        reply = f"{attempt.code} {attempt.enhanced} {attempt.text}".replace("  ", " ")
        lines.append(f"Diagnostic-Code: smtp; {reply}")
    else:
        lines.append(f"Diagnostic-Code: X-relaymta; {attempt.text}")
    lines.append(f"Last-Attempt-Date: {rfc5322_date(attempt.time // 1000)}")
    return lines


def _remote(attempt: Attempt) -> str:
    """The peer's name; "" for a Unix socket, whose path is not shown to outsiders."""
    return "" if attempt.peer.startswith("unix:") else attempt.peer


def _line(line: str, utf8: bool) -> bytes:
    """One generated line: control characters replaced by spaces, cut to LINE_LIMIT octets."""
    if line.startswith("Content-Type"):
        return line.encode()
    clean = "".join(c if c == "\t" or (c.isprintable() and (utf8 or c.isascii())) else " " for c in line)
    octets = clean.encode("utf-8", "replace")
    return octets if len(octets) <= LINE_LIMIT else octets[:LINE_LIMIT].decode("utf-8", "ignore").encode() + b"..."


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
