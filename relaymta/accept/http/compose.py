"""Message data from a message that was submitted by HTTP: MIME (RFC 2045, 2046), in pieces, ASCII but for addresses that need
SMTPUTF8.

The standard library's EmailMessage takes ten times as long for a short text. So the structure is put together here; what is
encoded, is by that library.
"""

import binascii
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from relaymta.accept.http import fields
from relaymta.accept.http.contents import Content, Part, content_of
from relaymta.accept.http.models import Attachment, Header, Mailbox, Message, Wrong
from relaymta.proto.address import compared

__all__ = ["PIECE", "Composed", "Composer", "Part", "compose"]

T = TypeVar("T")

PIECE = 65536  # octets of a piece of message data at most
LONGEST_LINE = 998  # octets (RFC 5322 2.1.1)
HEADER_MOST = 98304  # octets: the relay adds fields, and reads no more than 128 KiB (relaymta.proto.header)
LINES_MOST = 4000
_SLICE = 57 * 800  # octets of a text that become lines of base64 together
_MICROSECONDS = 50  # that a message takes, or an attachment, however small
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
    """A message that is alone in its request. As Composer.compose."""
    return Composer(message, parts).compose(message)


class Composer:
    """Composes the messages of a request, one at a time. What several have in common is encoded once: what is the same object in
    them as in the request. `parts`: of the request, by their names."""

    def __init__(self, request: Message, parts: Mapping[str, Part] = MappingProxyType({})) -> None:
        self._request, self._parts = request, parts
        self._headers = {one.field: one for one in request.headers}
        self._made: dict[str, Any] = {}

    def cost(self, message: Message) -> int:
        """About how many microseconds `compose` will take, of what has not been encoded yet; what is in memory already costs
        nothing."""
        new, request = self._is_new, self._request
        found = _MICROSECONDS + sum(_of_mailboxes(some) for some in (message.to, message.cc, message.bcc))
        if new("Reply-To", message.reply_to, request.reply_to):
            found += _of_mailboxes(message.reply_to)
        for key, text, own in (("text", message.text, request.text), ("html", message.html, request.html)):
            if text is not None and new(key, text, own):
                found += len(text) // 32
        if message.subject is not None and new("Subject", message.subject, request.subject):
            found += len(message.subject) // 8
        for header in message.headers:
            if new(header.field, header, self._headers.get(header.field)):
                found += 1 + len(header.value) // 8
        if new("files", message.attachments, request.attachments):
            found += sum(_MICROSECONDS + len(one.filename) + len(one.content) // 256 for one in message.attachments)
        return found

    def compose(self, message: Message) -> Composed:
        """A message that is no batch (any more: `Templates.rendered`). Raises Wrong. The base64 of attachments is checked here,
        once."""
        if message.batch is not None:
            raise ValueError("a batch is to be rendered")
        everybody = (*message.to, *message.cc, *message.bcc)
        recipients: dict[str, str] = {}
        for one in everybody:
            recipients.setdefault(compared(one.address), one.address)
        header, utf8 = self._header(message)
        body = self._body(message)
        segments = [b"".join((*header, b"MIME-Version: 1.0\r\n", body.fields, b"\r\n")), *body.segments]
        utf8 = utf8 or not (message.sender.isascii() and all(one.address.isascii() for one in message.bcc))
        size = sum(len(one) if isinstance(one, bytes) else one.size for one in segments)
        return Composed(message.sender, list(recipients.values()), utf8, size, _pieces(segments))

    def _is_new(self, key: str, value: object, own: object) -> bool:
        return value is not own or key not in self._made

    def _once(self, key: str, value: object, own: object, make: Callable[[], T]) -> T:
        """What is made of a value: only once where it is that of the request (`own`)."""
        if value is not own:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def _header(self, message: Message) -> tuple[list[bytes], bool]:
        """The fields that say who and what, and whether they need SMTPUTF8."""
        request, once = self._request, self._once
        if sum(len(one.name) + len(one.address) for one in (*message.to, *message.cc, *message.reply_to)) > HEADER_MOST:
            raise Wrong("to", _TOO_LONG)
        found = _Header()
        found.add(once("From", message.author, request.author, lambda: fields.addresses("From", [message.author])))
        sender, answers = message.on_behalf, message.reply_to
        if sender is not None:
            found.add(once("Sender", sender, request.on_behalf, lambda: fields.addresses("Sender", [sender])))
        if answers:
            found.add(once("Reply-To", answers, request.reply_to, lambda: fields.addresses("Reply-To", answers)))
        for name, mailboxes in (("To", message.to), ("Cc", message.cc)):
            if mailboxes:
                found.add(fields.addresses(name, mailboxes))
        if not message.to and not message.cc:
            found.add(_NOBODY)
        if found.is_too_long:
            raise Wrong("to", _TOO_LONG)
        utf8 = not all(one.isascii() for one in found.fields)
        subject = message.subject
        if subject is not None:
            found.add(once("Subject", subject, request.subject, lambda: fields.unstructured("Subject", subject)))
        for one in message.headers:
            found.add(once(one.field, one, self._headers.get(one.field), lambda: _field(one)))  # noqa: B023 (called here)
            if found.is_too_long:  # each time: before more is encoded
                raise Wrong("headers", "the header is too long")
        return found.fields, utf8

    def _body(self, message: Message) -> _Body:
        request = self._request
        if message.text is request.text and message.html is request.html:
            return self._once("body", request, request, lambda: self._new_body(message))
        return self._new_body(message)

    def _new_body(self, message: Message) -> _Body:
        """mixed(alternative(text, related(html, images)), attachments): as much of it as there is."""
        request, once = self._request, self._once
        files = once("files", message.attachments, request.attachments, lambda: self._files(message.attachments))
        images = [body for one, body in files if one.content_id] if message.html is not None else []
        behind = [body for one, body in files if message.html is None or not one.content_id]
        text, html = message.text, message.html
        alone = not files and (text is None or html is None)
        shown = []
        if text is not None:
            shown.append(once("text", text, request.text, lambda: _text("plain", text, alone)))
        if html is not None:
            page = once("html", html, request.html, lambda: _text("html", html, alone))
            shown.append(_multipart('related; type="text/html"', [page, *images]) if images else page)
        first = [_multipart("alternative", shown)] if len(shown) > 1 else shown
        return _multipart("mixed", [*first, *behind]) if behind else first[0]

    def _files(self, attachments: tuple[Attachment, ...]) -> list[tuple[Attachment, _Body]]:
        return [(one, _file(one, content_of(one, self._parts))) for one in attachments]


class _Header:
    """The fields of a message as they are encoded."""

    def __init__(self) -> None:
        self.fields: list[bytes] = []
        self._octets = self._lines = 0

    def add(self, field: bytes) -> None:
        self.fields.append(field)
        self._octets += len(field)
        self._lines += field.count(b"\n")

    @property
    def is_too_long(self) -> bool:
        return self._octets > HEADER_MOST or self._lines > LINES_MOST


def _of_mailboxes(mailboxes: tuple[Mailbox, ...]) -> int:
    """Microseconds of `cost`."""
    return sum(8 + (len(one.name) + len(one.address)) // 8 for one in mailboxes)


def _field(header: Header) -> bytes:
    return (fields.structured if header.structured else fields.unstructured)(header.name, header.value)


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
    if text.isascii() and not _has_long_line(data):
        return _Body(_text_fields(subtype, "7bit"), [one.replace(b"\n", b"\r\n") for one in _slices(data)])
    if len(data) - len(text) > len(data) // 6:
        return _Body(_text_fields(subtype, "base64"), _base64(b"".join(one.replace(b"\n", b"\r\n") for one in _slices(data))))
    return _Body(_text_fields(subtype, "quoted-printable"), list(_quoted(data)))


def _slices(data: bytes) -> Iterator[bytes]:
    """A text in slices of PIECE octets at most, each of which ends behind a line end, unless the line is longer. Other threads
    run between them: no call works on all of a large text."""
    at = 0
    while at < len(data):
        end = at + PIECE
        if end < len(data):
            end = data.rfind(b"\n", at, end) + 1 or end
        yield data[at:end]
        at = end


def _has_long_line(data: bytes) -> bool:
    return any(len(one) > LONGEST_LINE and max(map(len, one.split(b"\n"))) > LONGEST_LINE for one in _slices(data))


def _quoted(data: bytes) -> Iterator[bytes]:
    """Quoted-printable (RFC 2045 6.7). A line that is longer than a slice has a soft line break there."""
    left = len(data)
    for one in _slices(data):
        left -= len(one)
        quoted = binascii.b2a_qp(one, quotetabs=False, istext=True).replace(b"\n", b"\r\n")
        yield quoted if not left or one.endswith(b"\n") else quoted + b"=\r\n"


def _text_fields(subtype: str, encoding: str) -> bytes:
    return f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: {encoding}\r\n'.encode()


def _base64(data: bytes) -> list[_Segment]:
    """Lines of base64, each with its CRLF, in segments of less than PIECE octets."""
    return [
        b"".join(
            binascii.b2a_base64(data[at : at + 57])[:-1] + b"\r\n" for at in range(start, min(start + _SLICE, len(data)), 57)
        )
        for start in range(0, len(data), _SLICE)
    ]


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
