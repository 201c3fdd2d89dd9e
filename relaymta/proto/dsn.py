"""Failure notices (RFC 3464, RFC 6522): what the sender is told when recipients are given up.

The reader is an outsider: of an attempt it says what the peer said, or our `Attempt.text`, never the cause inside. And what it is
made of comes from outsiders: no line of it holds a control character, so that each stays one line.
"""

import re
from collections.abc import Sequence

from relaymta.proto.envelope import Attempt, Envelope
from relaymta.proto.header import rfc5322_date

__all__ = ["failure_notice"]

HEADER_LIMIT = 64 * 1024  # of the original header that is returned
LINE_LIMIT = 900  # octets of a line of ours (RFC 5322 2.1.1: 998)

_CONTROL = re.compile(rb"[\0\r\n]")


def failure_notice(
    envelope: Envelope,
    failed: Sequence[tuple[str, Attempt, bool]],
    original_header: bytes,
    *,
    hostname: str,
    ident: str,
    original_ident: str,
    seconds: int,
) -> bytes:
    """The notice about `failed` recipients (address, last attempt, whether it expired), as message text.

    It is addressed to the envelope's sender, carries the original header (not its body), and says Auto-Submitted
    (RFC 3834), so that no robot answers it. `seconds`: wall clock, UTC.
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
        late = "not delivered in time; the last attempt said: " if expired else ""
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
    text = b"\r\n".join(_line(line, utf8) for line in [*head, *status, *closing])
    return text + _returned_header(original_header) + f"\r\n--{boundary}--\r\n".encode()


def _recipient_fields(address: str, attempt: Attempt, expired: bool) -> list[str]:
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
        said = f"{attempt.code} {attempt.enhanced} {attempt.text}".replace("  ", " ")
        lines.append(f"Diagnostic-Code: smtp; {said}")
    else:
        lines.append(f"Diagnostic-Code: X-relaymta; {attempt.text}")
    lines.append(f"Last-Attempt-Date: {rfc5322_date(attempt.time // 1000)}")
    return lines


def _remote(attempt: Attempt) -> str:
    """The peer's name, "" for a socket of this machine: its path is nobody's business."""
    return "" if attempt.peer.startswith("unix:") else attempt.peer


def _line(line: str, utf8: bool) -> bytes:
    """One line of ours, cut where a peer's text would make it too long, without control characters of the peer's."""
    if line.startswith("Content-Type"):
        return line.encode()
    clean = "".join(c if c == "\t" or (c.isprintable() and (utf8 or c.isascii())) else " " for c in line)
    octets = clean.encode("utf-8", "replace")
    return octets if len(octets) <= LINE_LIMIT else octets[:LINE_LIMIT].decode("utf-8", "ignore").encode() + b"..."


def _returned_header(header: bytes) -> bytes:
    """The original header as it may stand in our notice: whole lines, at most HEADER_LIMIT octets, no long lines, and nothing
    that somebody may take for the end of one."""
    lines = header[:HEADER_LIMIT].split(b"\r\n")
    if len(header) > HEADER_LIMIT:
        lines.pop()
    kept = []
    for line in lines:
        if not line:
            break
        kept.append(_CONTROL.sub(b" ", line[:998]))
    return b"".join(line + b"\r\n" for line in kept)
