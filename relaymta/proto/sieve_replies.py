"""Messages and replies that a Sieve script sends (RFC 5230 5, RFC 5228 4.2, RFC 5429 2). Script text and the message that it is
about come from outsiders: nothing in them begins a line of the header.
"""

import re
from binascii import b2a_base64, b2a_qp
from collections.abc import Iterable, Iterator
from typing import Final

from relaymta.proto.address import quoted_if_needed
from relaymta.proto.envelope import Onward
from relaymta.proto.header import rfc5322_date
from relaymta.proto.sieve_outcome import Answered

__all__ = ["answered", "redirected", "rejection", "vacation_reply"]

REASON_MOST: Final = 500  # characters of the reply to a message that is refused
WORD_OCTETS: Final = 39  # of an encoded word: with `Subject: ` its line has 73 octets, of the 76 that it may have (RFC 2047 2)

_LINE_END = re.compile(rb"\r\n|\r|\n")
_FIELD = re.compile(rb"^(?i:content)-[!-9;-~]++[ \t]*+:[^\r\n]*+(?>(?:\r\n[ \t][^\r\n]*+)*)", re.M)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]*\Z")
_WITHIN = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")


def answered(answer: Answered, *, hostname: str, ident: str, seconds: int) -> Onward:
    """A reply of `vacation` as a message for the queue, with a null sender (RFC 5230 5.1)."""
    return Onward("", answer.recipient, b"", vacation_reply(answer, hostname=hostname, ident=ident, seconds=seconds))


def redirected(address: str, *, sender: str, recipients: Iterable[str]) -> Onward:
    """The message at hand for another address, with its own sender; `recipients`: addresses of whose script says so, which
    Delivered-To remembers, so that a loop is noticed."""
    fields = "".join(f"Delivered-To: {_line(recipient)}\r\n" for recipient in recipients)
    return Onward(sender, address, fields.encode("utf-8", "replace"), None)


def rejection(reason: bytes) -> str:
    """The text of the reply to a message that is refused: one line."""
    text = " ".join(_line(reason.decode("utf-8", "replace")).split())[:REASON_MOST]
    return text or "the recipient does not accept this message"


def vacation_reply(answer: Answered, *, hostname: str, ident: str, seconds: int) -> bytes:
    """The message data of a reply. `ident`: with `hostname` its Message-ID; `seconds`: its Date, wall clock, UTC. It is ASCII,
    but for the addresses in it, and for the body where that is a MIME entity of 8-bit octets."""
    header = [
        f"From: {_author(*answer.sender)}",
        f"To: <{_line(answer.recipient)}>",
        f"Subject: {_words(answer.subject)}",
        f"Date: {rfc5322_date(seconds)}",
        f"Message-ID: <{ident}@{hostname}>",
    ]
    if answer.message_id:
        header.append(f"In-Reply-To: {answer.message_id.decode('ascii')}")
        header.append("References: " + "\r\n\t".join(one.decode("ascii") for one in answer.references))
    header += ["Auto-Submitted: auto-replied", "MIME-Version: 1.0"]
    head = "".join(f"{line}\r\n" for line in header).encode("utf-8", "replace")
    return head + (_entity(answer.reason) if answer.mime else _text(answer.reason))


def _line(text: str) -> str:
    """A text on one line: what is not printable is a blank."""
    return "".join(one if one.isprintable() else " " for one in text)


def _author(name: str, address: str) -> str:
    name = " ".join(_line(name).split())
    if not name:
        return f"<{_line(address)}>"
    if not name.isascii() or "=?" in name:
        return f"{_words(name)}\r\n\t<{_line(address)}>"
    shown = name if _PLAIN_NAME.match(name) else quoted_if_needed(name)
    return f"{shown} <{_line(address)}>"


def _words(text: str) -> str:
    """A text on one line as a header has it: in encoded words where it is not ASCII (RFC 2047), or seems to have some."""
    text = _line(text)
    if text.isascii() and "=?" not in text:
        return text
    return "\r\n\t".join(f"=?utf-8?B?{b2a_base64(piece, newline=False).decode()}?=" for piece in _pieces(text))


def _pieces(text: str) -> Iterator[bytes]:
    """A text in pieces of at most WORD_OCTETS octets, none of which ends within a character."""
    piece = b""
    for one in text:
        octets = one.encode("utf-8", "replace")
        if len(piece) + len(octets) > WORD_OCTETS:
            yield piece
            piece = b""
        piece += octets
    yield piece


def _text(reason: bytes) -> bytes:
    """A text and the fields in front of it."""
    text = _LINE_END.sub(b"\n", reason).decode("utf-8", "replace").encode()
    encoded = b2a_qp(text, istext=True).replace(b"\n", b"\r\n")
    end = b"" if encoded.endswith(b"\r\n") or not encoded else b"\r\n"
    return b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + encoded + end


def _entity(reason: bytes) -> bytes:
    """A MIME entity (RFC 2045 2.4) as it is written, its header without all that is not MIME's."""
    whole = _LINE_END.sub(b"\r\n", _WITHIN.sub(b" ", reason))
    if whole.startswith(b"\r\n"):
        header, body = b"", whole[2:]
    else:
        header, _, body = whole.partition(b"\r\n\r\n")
    fields = [match[0].decode("ascii", "replace").encode("ascii", "replace") for match in _FIELD.finditer(header)]
    return b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body
