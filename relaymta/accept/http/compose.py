"""Message data from a message that was submitted by HTTP: MIME (RFC 2045, 2046), in pieces, ASCII but for addresses that need
SMTPUTF8.

The standard library's EmailMessage takes ten times as long for a short text. So the structure is put together here; what is
encoded, is by that library.
"""

import binascii
import secrets
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from relaymta.accept.http import fields
from relaymta.accept.http.contents import Content, Part, content_of
from relaymta.accept.http.models import Attachment, Message, Wrong
from relaymta.proto.address import compared

__all__ = ["PIECE", "Composed", "Part", "compose"]

PIECE = 65536  # octets of a piece of message data at most
LONGEST_LINE = 998  # octets (RFC 5322 2.1.1)
HEADER_MOST = 98304  # octets: the relay adds fields, and reads no more than 128 KiB (relaymta.proto.header)
LINES_MOST = 4000
_TOO_LONG = "the names and addresses of the recipients are too long for a header"
_NOBODY = b"To: undisclosed-recipients:;\r\n"

_Segment = bytes | Content


class _Body(NamedTuple):
    """A body, or a part: its own fields, and what follows behind the empty line."""

    fields: bytes
    segments: list[_Segment]


class Composed(NamedTuple):
    """A message. `utf8`: SMTPUTF8 is needed (RFC 6531); `size`: octets of message data. `pieces`: it, once; from it Wrong is
    raised where a part ends too early."""

    sender: str
    recipients: list[str]
    utf8: bool
    size: int
    pieces: Iterator[bytes]


def compose(message: Message, parts: Mapping[str, Part] = MappingProxyType({})) -> Composed:
    """A message that is no batch (any more: `Templates.rendered`). `parts`: of the request, by their names. Raises Wrong. The
    base64 of attachments is checked here: of more than a megabyte, on a thread."""
    if message.batch is not None:
        raise ValueError("a batch is to be rendered")
    everybody = (*message.to, *message.cc, *message.bcc)
    recipients: dict[str, str] = {}
    for one in everybody:
        recipients.setdefault(compared(one.address), one.address)
    header, utf8 = _header(message)
    contents = [content_of(one, parts) for one in message.attachments]
    body = _body(message, contents)
    segments = [b"".join((*header, b"MIME-Version: 1.0\r\n", body.fields, b"\r\n")), *body.segments]
    utf8 = utf8 or not (message.sender.isascii() and all(one.address.isascii() for one in message.bcc))
    size = sum(len(one) if isinstance(one, bytes) else one.size for one in segments)
    return Composed(message.sender, list(recipients.values()), utf8, size, _pieces(segments))


def _header(message: Message) -> tuple[list[bytes], bool]:
    """The fields that say who and what, and whether they need SMTPUTF8."""
    if sum(len(one.name) + len(one.address) for one in (*message.to, *message.cc, *message.reply_to)) > HEADER_MOST:
        raise Wrong("to", _TOO_LONG)
    found = [fields.addresses("From", [message.author])]
    if message.on_behalf is not None:
        found.append(fields.addresses("Sender", [message.on_behalf]))
    for name, mailboxes in (("Reply-To", message.reply_to), ("To", message.to), ("Cc", message.cc)):
        if mailboxes:
            found.append(fields.addresses(name, mailboxes))
    if not message.to and not message.cc:
        found.append(_NOBODY)
    if _is_too_long(found):
        raise Wrong("to", _TOO_LONG)
    utf8 = not all(one.isascii() for one in found)
    if message.subject is not None:
        found.append(fields.unstructured("Subject", message.subject))
    for header in message.headers:
        found.append((fields.structured if header.structured else fields.unstructured)(header.name, header.value))
        if _is_too_long(found):  # each time: encoding takes a microsecond a character
            raise Wrong("headers", "the header is too long")
    return found, utf8


def _is_too_long(found: list[bytes]) -> bool:
    return sum(map(len, found)) > HEADER_MOST or sum(one.count(b"\n") for one in found) > LINES_MOST


def _body(message: Message, contents: list[Content]) -> _Body:
    """mixed(alternative(text, related(html, images)), attachments): as much of it as there is."""
    files = [(one, _file(one, content)) for one, content in zip(message.attachments, contents, strict=True)]
    images = [body for one, body in files if one.content_id] if message.html is not None else []
    behind = [body for one, body in files if message.html is None or not one.content_id]
    alone = not files and (message.text is None or message.html is None)
    shown = []
    if message.text is not None:
        shown.append(_text("plain", message.text, alone))
    if message.html is not None:
        html = _text("html", message.html, alone)
        shown.append(_multipart('related; type="text/html"', [html, *images]) if images else html)
    first = [_multipart("alternative", shown)] if len(shown) > 1 else shown
    return _multipart("mixed", [*first, *behind]) if behind else first[0]


def _text(subtype: str, text: str, alone: bool) -> _Body:
    """A text, as it is, or, where that is not ASCII or has long lines, in quoted-printable or base64, whichever is shorter.
    `alone`: it is the whole body, which ends with a line end."""
    if "\0" in text:
        raise Wrong("text" if subtype == "plain" else subtype, "it has a NUL")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if alone and text and text[-1] != "\n":
        text += "\n"
    data = text.encode()
    if text.isascii() and (len(data) <= LONGEST_LINE or max(map(len, data.split(b"\n"))) <= LONGEST_LINE):
        return _Body(_text_fields(subtype, "7bit"), [data.replace(b"\n", b"\r\n")])
    if len(data) - len(text) > len(data) // 6:
        return _Body(_text_fields(subtype, "base64"), [_base64(data.replace(b"\n", b"\r\n"))])
    quoted = binascii.b2a_qp(data, quotetabs=False, istext=True).replace(b"\n", b"\r\n")
    return _Body(_text_fields(subtype, "quoted-printable"), [quoted])


def _text_fields(subtype: str, encoding: str) -> bytes:
    return f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: {encoding}\r\n'.encode()


def _base64(data: bytes) -> bytes:
    """Lines of base64, each with its CRLF."""
    return b"".join(binascii.b2a_base64(data[at : at + 57])[:-1] + b"\r\n" for at in range(0, len(data), 57))


def _file(one: Attachment, content: Content) -> _Body:
    kind = one.content_type if len(one.content_type) < 60 else one.content_type.replace("; ", ";\r\n ")
    found = f"Content-Type: {kind}\r\nContent-Transfer-Encoding: base64\r\n".encode()
    found += fields.disposition("inline" if one.inline else "attachment", one.filename)
    if one.content_id:
        found += f"Content-ID: <{one.content_id}>\r\n".encode()
    return _Body(found, [content])


def _multipart(subtype: str, bodies: list[_Body]) -> _Body:
    """Bodies with a boundary between them. No line of quoted-printable or base64 can be one (RFC 2045 6.7: it has "=_" in it),
    and that of a text as it is cannot be known; it is looked for all the same."""
    boundary = _boundary(segment for body in bodies for segment in body.segments if isinstance(segment, bytes))
    between = b"\r\n--" + boundary
    segments: list[_Segment] = []
    for number, body in enumerate(bodies):
        segments.append((between if number else between[2:]) + b"\r\n" + body.fields + b"\r\n")
        segments += body.segments
    segments.append(between + b"--\r\n")
    return _Body(b"Content-Type: multipart/" + subtype.encode() + b';\r\n boundary="' + boundary + b'"\r\n', segments)


def _boundary(texts: Iterable[bytes]) -> bytes:
    held = list(texts)
    while True:
        found = b"=_" + secrets.token_hex(16).encode()
        if not any(found in text for text in held):
            return found


def _pieces(segments: list[_Segment]) -> Iterator[bytes]:
    """Segments as pieces of PIECE octets, none longer and none empty."""
    held: list[bytes] = []
    octets = 0
    for data in _flat(segments):
        if octets + len(data) > PIECE:
            yield from _cut(b"".join(held))
            held, octets = [], 0
        held.append(data)
        octets += len(data)
    yield from _cut(b"".join(held))


def _flat(segments: list[_Segment]) -> Iterator[bytes]:
    for one in segments:
        if isinstance(one, bytes):
            yield one
        else:
            yield from one.pieces()


def _cut(data: bytes) -> Iterator[bytes]:
    if len(data) <= PIECE:
        if data:
            yield data
        return
    for at in range(0, len(data), PIECE):
        yield data[at : at + PIECE]
