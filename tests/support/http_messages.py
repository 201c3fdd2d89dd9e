"""Requests of the HTTP injection API, valid and nearly so, and what must come of them."""

import base64
import email
import email.policy
from email.message import EmailMessage
from typing import Any

from hypothesis import strategies as st

from relaymta.accept.http.compose import Composed, compose
from relaymta.accept.http.models import parse

# What some program takes for the end of a line, of a field, of a part, of an address or of an encoded word.
HOSTILE = (
    "\r\n", "\n", "\r", "\0", "\t", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x7f", "\x85", "\u2028", "\u2029", "\ufeff",
    "\u202e",
    "\r\nBcc: evil@evil.example", "\nX-Evil: 1", "\r\n\r\n", "\r\n.\r\n", "\r\n--=_", "Bcc:", ":", ";", ",", "<", ">", "@", '"',
    "\\",
    "\\\"", "(", ")", "=?utf-8?q?=0D=0AX-Evil:_1?=", "=?utf-8?b?DQpYLUV2aWw6IDE=?=", "?=", "=?", "=", "==", "%0D%0A", "&#10;",
    "''",
    "*", "*0*=", "[", "]", "{{", "{%", "{#", " ", "  ", "a" * 80, "a" * 1000, "ä", "😀", "\u200d", "\u212a", "xn--", "．",
    "filename=",
)  # fmt: skip
WORDS = ("a", "Ann", "b.example", "x y", "ann@a.example", "Ann <ann@a.example>", "logo", "image/png", "text/csv; charset=utf-8")
hostile = st.lists(st.sampled_from(HOSTILE + WORDS) | st.text(max_size=5), max_size=5).map("".join)

STRINGS = {
    "from": "Ann <ann@a.example>", "from_email": "ann@a.example", "from_name": "Ann", "to": "bob@b.example", "to_email": "c@d",
    "to_name": "C", "cc": "d@e", "bcc": "hidden@h.example", "reply_to": "r@r", "envelope_from": "e@e", "subject": "S",
    "text": "T",
    "html": "H", "tag": "tag", "header": "X-Own", "value": "v", "list_id": "<a.b>", "sender": "s@s", "references": "<a@b>",
    "filename": "f", "content_type": "image/png", "content_id": "i", "content": "YQ==", "part": "p",
}  # fmt: skip


def full(of: dict[str, str], as_object: bool) -> dict[str, Any]:
    """A request that has each kind of string."""
    return {
        "from": {"email": of["from_email"], "name": of["from_name"]} if as_object else of["from"],
        "to": [of["to"], {"email": of["to_email"], "name": of["to_name"]}],
        "cc": of["cc"], "bcc": of["bcc"], "reply_to": of["reply_to"], "envelope_from": of["envelope_from"],
        "subject": of["subject"],
        "text": of["text"], "html": of["html"], "tags": [of["tag"]],
        "headers": {
            of["header"]: [of["value"]], "List-Id": of["list_id"], "Sender": of["sender"], "References": of["references"]
        },
        "attachments": [
            {
                "filename": of["filename"], "content_type": of["content_type"], "content_id": of["content_id"],
                "content": of["content"],
            },
            {"filename": of["filename"], "part": of["part"]},
        ],
    }  # fmt: skip


class Held:
    """A part of a request. `short`: it gives no more than so many octets at once."""

    def __init__(self, octets: bytes, short: int = 1 << 30) -> None:
        self.octets, self.short, self.size = octets, short, len(octets)

    def read(self, at: int, most: int) -> bytes:
        """As of Part."""
        return self.octets[at : at + min(most, self.short)]


def made(request: dict[str, Any], parts: dict[str, Held] | None = None) -> tuple[Composed, bytes]:
    """What is composed of a request, and its message data, which is as every message's has to be."""
    import msgspec

    found = compose(parse(msgspec.json.encode(request)), parts or {})
    pieces = list(found.pieces)
    assert all(0 < len(piece) <= 65536 for piece in pieces)
    data = b"".join(pieces)
    assert len(data) == found.size
    check(data, found.utf8)
    return found, data


def check(data: bytes, utf8: bool) -> None:
    """Lines of at most 998 octets, CRLF between them and behind the last, ASCII (but for a header that needs SMTPUTF8), no
    NUL."""
    assert data.endswith(b"\r\n") and b"\0" not in data
    assert data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r")
    assert max(map(len, data.split(b"\r\n"))) <= 998
    header, _, body = data.partition(b"\r\n\r\n")
    assert body.isascii() and (utf8 or header.isascii())
    assert not any(line.isspace() for line in header.split(b"\r\n"))


def read(data: bytes) -> EmailMessage:
    """The message, as the standard library reads it, without a defect anywhere."""
    found = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(found, EmailMessage)
    for part in found.walk():
        assert not part.defects, part.defects
    return found


def base64_of(octets: bytes) -> str:
    """Base64 as JSON has it."""
    return base64.b64encode(octets).decode()
