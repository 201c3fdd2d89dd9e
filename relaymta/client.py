"""A client of HTTP injection (docs/injection.md), for programs in Python: blocking, of the standard library alone.

    from relaymta.client import Client

    with Client("https://relay.example:8443", "shop", key) as relay:
        sent = relay.send(from_="Shop <shop@shop.example>", to="ann@example.org", subject="Your order", text="...",
                          attachments=["invoice.pdf"])
        relay.message(sent.id)

Each message that is sent has an idempotency key, so it is tried again after failures without being sent twice. A Client has one
connection, and is used by one thread at a time.
"""

import http.client
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from email.message import Message as EmailMessage
from typing import TYPE_CHECKING, Any, NamedTuple, Required, TypeAlias, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode, urlsplit

if TYPE_CHECKING:
    import ssl
    from datetime import datetime

__all__ = [
    "Attachment", "BatchEntry", "Check", "Client", "Failed", "Mail", "MessageResult", "MessageState", "Problem", "Receipt",
    "RecipientResult", "RecipientState", "RouteOf", "Sent", "Unreachable",
]  # fmt: skip

BLOCK = 65536  # octets of a file that are read at once
AGAIN = (409, 429, 502, 503, 504)  # statuses after which the same request is sent again (502, 504: of a proxy before the relay)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts, where the relay does not say how many
ANSWER_MOST = 64 << 20  # octets

_T = TypeVar("_T")
Mailbox: TypeAlias = str | Mapping[str, str]
"""`a@b`, `Name <a@b>`, or {"email": ..., "name": ...}."""
Mailboxes: TypeAlias = Mailbox | Sequence[Mailbox]
Path: TypeAlias = str | os.PathLike[str]


class Attachment(NamedTuple):
    """A file of a message. `content`: octets, or the path of a file, which is read while it is sent; `filename`: "" for that of
    the path; `content_type`: "" for what the name's ending means; `content_id`: by which the html shows it: `cid:CONTENT_ID`."""

    content: bytes | Path
    filename: str = ""
    content_type: str = ""
    content_id: str = ""


class BatchEntry(TypedDict, total=False):
    """One message of a batch."""

    to: Required[Mailboxes]
    cc: Mailboxes
    bcc: Mailboxes
    subject: str
    substitutions: Mapping[str, Any]


class Mail(TypedDict, total=False):
    """What a message has, as in the JSON of the API (`from_` is `from`). `envelope_from`: "" for the null sender; `attachments`:
    also paths."""

    from_: Required[Mailbox]
    envelope_from: str
    to: Mailboxes
    cc: Mailboxes
    bcc: Mailboxes
    reply_to: Mailboxes
    subject: str
    text: str
    html: str
    headers: Mapping[str, str | Sequence[str]]
    attachments: Sequence[Attachment | Path]
    send_at: "datetime | str"
    tags: Sequence[str]
    priority: str
    batch: Sequence[BatchEntry]
    substitutions: Mapping[str, Any]


# Answers


class RecipientResult(NamedTuple):
    """`status`: "accepted", "refused", or "try again"; `reply`: why, as SMTP says it."""

    address: str
    status: str
    reply: str = ""


class MessageResult(NamedTuple):
    """A message of a request. `id`: where it was accepted, also if not all recipients were; `reply`: why it was not."""

    status: str
    recipients: list[RecipientResult]
    id: str = ""
    reply: str = ""


class Sent(NamedTuple):
    """What was accepted. `id`: of the first message, "": that one was not; `key`: the idempotency key of the request; `replayed`:
    it was all accepted before, by an earlier attempt."""

    id: str
    messages: list[MessageResult]
    key: str
    replayed: bool

    @property
    def complete(self) -> bool:
        """Whether every recipient of every message was accepted."""
        return all(one.id and all(to.status == "accepted" for to in one.recipients) for one in self.messages)


class RouteOf(NamedTuple):
    """A recipient of a message that was only checked. `route`: by which it would go, to `domain`."""

    address: str
    status: str
    reply: str = ""
    route: str = ""
    domain: str = ""


class Check(NamedTuple):
    """What would happen with a message; as in the API."""

    valid: bool
    sender: str
    size: int
    size_limit: int
    dkim: list[str]
    recipients: list[RouteOf]
    sender_reply: str = ""


class RecipientState(NamedTuple):
    """What has become of a message for a recipient; as in the API. `bounce_class` is `class` there."""

    address: str
    state: str
    reply: str = ""
    peer: str = ""
    bounce_class: str = ""
    attempts: int = 0
    time: str = ""


class MessageState(NamedTuple):
    """A message. `ended`: it has left the queue; `accepted`: when (RFC 3339)."""

    id: str
    accepted: str
    sender: str
    recipients: list[RecipientState]
    ended: bool = False
    message_id: str = ""
    application: str = ""
    tags: Sequence[str] = ()


class Receipt(NamedTuple):
    """What was accepted under an idempotency key."""

    key: str
    accepted: str
    messages: list[MessageState]


class Failed(Exception):
    """A request was not done."""


class Unreachable(Failed):
    """The relay was not reached, or its answer was not, or it is none of the relay's. `key`: of the request, by which it can be
    sent again, "": it has none."""

    def __init__(self, detail: str, key: str = "") -> None:
        super().__init__(detail)
        self.key = key


class Problem(Failed):
    """The relay has answered with an error. `document`: all of it (RFC 9457); `argument`: what is wrong in the request;
    `recipients`: of a message that nobody gets; `messages`: of a batch that nobody gets; `retry_after`: seconds, where the relay
    names them; `key` as of Unreachable."""

    def __init__(self, document: Mapping[str, Any], key: str = "", retry_after: float | None = None) -> None:
        self.document = document
        self.status = int(document.get("status", 0))
        self.detail = str(document.get("detail", ""))
        self.argument = str(document.get("argument", ""))
        self.recipients: list[RecipientResult] = _rows(document, "recipients", lambda row: _of(RecipientResult, row))
        self.messages: list[MessageResult] = _rows(document, "messages", _message)
        self.retry_after = retry_after
        self.key = key
        super().__init__(f"{self.status}: {self.detail}")


class Client:
    """A relay. `url`: such as https://relay.example:8443; `password`: or key of an application; `token`: an OAuth token instead
    of both; `timeout`: seconds for each step of a request; `patience`: seconds within which a failed request is tried again;
    `context`: of TLS, None: certificates are verified as the system does; `in_clear`: http to another host is no error."""

    def __init__(
        self, url: str, user: str = "", password: str = "", *, token: str = "", timeout: float = 60.0, patience: float = 60.0,
        context: "ssl.SSLContext | None" = None, in_clear: bool = False,
    ) -> None:  # fmt: skip
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"a URL such as https://relay.example:8443 is needed, not {url!r}")
        if parts.scheme == "http" and not in_clear and not _is_loopback(host):
            raise ValueError(f"mail and passwords would be sent in clear to {host}: https, or in_clear=True")
        self._path = parts.path.rstrip("/")
        self._timeout, self._patience = timeout, patience
        self._headers = {"Accept": "application/json, application/problem+json", "User-Agent": "relaymta.client"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        elif user:
            self._headers["Authorization"] = f"Basic {_base64(f'{user}:{password}'.encode())}"
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=timeout, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, parts.port, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next request opens one."""
        self._connection.close()

    # Requests

    def send(self, *, key: str = "", traceparent: str = "", **mail: Unpack[Mail]) -> Sent:
        """Send a message, or a batch of them. `key`: the idempotency key, "" for one of its own: give the one of a request before
        to send exactly that again, which tries those of its messages that were not accepted. Raises Problem: nothing was
        accepted (of a batch, with 500 or 503, perhaps a part); Unreachable: that is not known."""
        return self._sent(_mail(mail), "", key or _key(), traceparent)

    def send_raw(
        self, message: "bytes | os.PathLike[str] | EmailMessage", *, sender: str | None = None, to: Iterable[str] = (),
        tags: Iterable[str] = (), priority: str = "", send_at: "datetime | str" = "", key: str = "", traceparent: str = "",
    ) -> Sent:  # fmt: skip
        """Send a message as it is: octets, a file, or one of the standard library. `sender`: of the envelope, "" for the null
        sender, None for that of its header; `to`: the recipients, none: those in its To, Cc and Bcc. Otherwise as `send`."""
        at = send_at if isinstance(send_at, str) else send_at.isoformat()
        found = [("tag", one) for one in tags] + [("to", one) for one in to]
        found += [(name, value) for name, value in (("priority", priority), ("send_at", at)) if value]
        if sender is not None:
            found.append(("from", sender))
        if isinstance(message, EmailMessage):
            message = message.as_bytes()
        return self._sent(_Body("message/rfc822", [message]), urlencode(found), key or _key(), traceparent)

    def check(self, **mail: Unpack[Mail]) -> Check:
        """What would happen with a message. Nothing is sent."""
        return self._ask(_check, "POST", "/v1/messages?validate=1", _mail(mail))

    def message(self, ident: str) -> MessageState:
        """What has become of a message. Problem 404: it is not known, or no longer."""
        return self._ask(lambda answer, _: _state(answer), "GET", f"/v1/messages/{quote(ident, safe='')}")

    def receipt(self, key: str) -> Receipt:
        """What was accepted under an idempotency key. Problem 404: nothing was, or it is known no longer."""
        return self._ask(_receipt, "GET", f"/v1/receipts/{quote(key, safe='')}")

    def _sent(self, body: "_Body", query: str, key: str, traceparent: str) -> Sent:
        headers = {"Idempotency-Key": key} | ({"traceparent": traceparent} if traceparent else {})

        def sent(answer: Any, told: http.client.HTTPMessage) -> Sent:
            rows = [_message(one) for one in answer["messages"]]
            return Sent(answer["id"], rows, key, told.get("Idempotency-Replayed", "") == "true")

        return self._ask(sent, "POST", "/v1/messages" + ("?" + query if query else ""), body, headers, key)

    # HTTP

    def _ask(
        self, read: Callable[[Any, http.client.HTTPMessage], _T], method: str, path: str, body: "_Body | None" = None,
        headers: Mapping[str, str] | None = None, key: str = "",
    ) -> _T:  # fmt: skip
        """The answer to a request, as `read` (JSON, header) has it. It is sent again while that may help: all requests here can
        be."""
        until, pause = time.monotonic() + self._patience, FIRST_PAUSE
        while True:
            used = self._connection.sock is not None
            wait: float | None = None
            try:
                status, told, text = self._once(method, path, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if isinstance(error, _Unreadable):
                    raise
                if used and not isinstance(
                    error, TimeoutError
                ):  # the relay closes connections that are not used: perhaps that one
                    continue
                failed: Failed = Unreachable(f"{type(error).__name__}: {error}", key)
            else:
                if 200 <= status < 300:
                    try:
                        return read(json.loads(text), told)
                    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                        self.close()
                        raise Unreachable("the answer is not as the relay's are: is that the relay?", key) from None
                wait = _seconds(told.get("Retry-After"))
                failed = Problem(_document(status, text), key, wait)
                if status not in AGAIN:
                    raise failed
            wait = wait or pause * (0.5 + os.urandom(1)[0] / 512)
            if time.monotonic() + wait >= until:
                raise failed
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(
        self, method: str, path: str, body: "_Body | None", headers: Mapping[str, str]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = self._connection
        headers = self._headers | dict(headers)
        pieces: Iterator[bytes] | None = None
        if body is not None:
            size, pieces = body.begin()
            headers |= {"Content-Type": body.content_type, "Content-Length": str(size)}
        try:
            connection.request(method, self._path + path, pieces, headers)
        except OSError as error:
            if connection.sock is None or isinstance(error, _Unreadable | TimeoutError):
                raise
            try:  # it may have answered, and read no more
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException):
                raise error from None
        else:
            answer = connection.getresponse()
        text = answer.read(ANSWER_MOST)
        if answer.length and len(text) < ANSWER_MOST:  # no error for http.client where so many octets are asked for
            raise http.client.IncompleteRead(text, answer.length)
        return answer.status, answer.msg, text


# Bodies


class _Unreadable(OSError):
    """A file is not as it was."""


class _Body:
    """The body of a request: octets, and files, which are read while they are sent."""

    def __init__(self, content_type: str, parts: Sequence["bytes | Path"]) -> None:
        self.content_type = content_type
        self._parts = parts

    def begin(self) -> tuple[int, Iterator[bytes]]:
        """How many octets it has, and these, once."""
        try:
            sizes = [len(part) if isinstance(part, bytes) else os.stat(part).st_size for part in self._parts]
        except OSError as error:
            raise _Unreadable(error.errno, error.strerror, error.filename) from None
        return sum(sizes), self._pieces(sizes)

    def _pieces(self, sizes: Sequence[int]) -> Iterator[bytes]:
        for part, size in zip(self._parts, sizes, strict=True):
            if isinstance(part, bytes):
                yield from (part[at : at + BLOCK] for at in range(0, size, BLOCK))
            else:
                yield from _read(part, size)


def _read(path: Path, size: int) -> Iterator[bytes]:
    """The first octets of a file."""
    try:
        with open(path, "rb", buffering=0) as file:
            while size:
                piece = file.read(min(size, BLOCK))
                if not piece:
                    raise _Unreadable(f"{os.fspath(path)} has become shorter while it was sent")
                size -= len(piece)
                yield piece
    except OSError as error:
        raise error if isinstance(error, _Unreadable) else _Unreadable(error.errno, error.strerror, error.filename) from None


def _mail(mail: Mapping[str, Any]) -> _Body:
    """A message as JSON, in a form where it has files."""
    message = {name.rstrip("_"): value for name, value in mail.items() if name != "attachments"}
    files: list[Attachment] = []
    for one in mail.get("attachments", ()):
        files.append(one if isinstance(one, Attachment) else Attachment(one))
    if not files:
        return _Body("application/json", [_text(message)])
    message["attachments"] = [_described(number, one) for number, one in enumerate(files)]
    boundary = os.urandom(24).hex()
    parts: list[bytes | Path] = [_head(boundary, "message", "application/json"), _text(message)]
    for number, one in enumerate(files):
        parts += [b"\r\n" + _head(boundary, f"file{number}", "application/octet-stream"), one.content]
    return _Body(f"multipart/form-data; boundary={boundary}", [*parts, f"\r\n--{boundary}--\r\n".encode()])


def _head(boundary: str, name: str, kind: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: {kind}\r\n\r\n'.encode()


def _described(number: int, one: Attachment) -> dict[str, str]:
    filename = one.filename
    if not filename:
        if isinstance(one.content, bytes):
            raise ValueError("an attachment of octets needs a filename")
        filename = os.path.basename(os.fspath(one.content))
    found = {"filename": filename, "content_type": one.content_type or _guessed(filename), "part": f"file{number}"}
    return found | ({"content_id": one.content_id} if one.content_id else {})


def _guessed(filename: str) -> str:
    import mimetypes

    kind, encoding = mimetypes.guess_type(filename)
    if kind is None or encoding is not None or kind.startswith(("message/", "multipart/")):
        return "application/octet-stream"
    return kind


def _text(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    """What JSON has not: times, and any sequence or mapping."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


def _base64(octets: bytes) -> str:
    import binascii

    return binascii.b2a_base64(octets, newline=False).decode()


def _key() -> str:
    return os.urandom(16).hex()


# Answers


def _of(kind: Any, row: Mapping[str, Any], **more: Any) -> Any:
    """A row of an answer, without the fields that a newer relay may have."""
    return kind(**{name: row[name] for name in kind._fields if name in row} | more)


def _state(answer: Mapping[str, Any]) -> MessageState:
    rows = [_of(RecipientState, row, bounce_class=row.get("class", "")) for row in answer["recipients"]]
    found: MessageState = _of(MessageState, answer, recipients=rows)
    return found


def _message(row: Mapping[str, Any]) -> MessageResult:
    found: MessageResult = _of(MessageResult, row, recipients=[_of(RecipientResult, one) for one in row["recipients"]])
    return found


def _check(answer: Mapping[str, Any], _: object) -> Check:
    found: Check = _of(Check, answer, recipients=[_of(RouteOf, row) for row in answer["recipients"]])
    return found


def _receipt(answer: Mapping[str, Any], _: object) -> Receipt:
    found: Receipt = _of(Receipt, answer, messages=[_state(one) for one in answer["messages"]])
    return found


def _rows(document: Mapping[str, Any], name: str, read: Callable[[Any], _T]) -> list[_T]:
    """Rows of a problem document; none where something else has answered, and it has others."""
    try:
        return [read(row) for row in document.get(name, ())]
    except (TypeError, LookupError, AttributeError):
        return []


def _document(status: int, text: bytes) -> Mapping[str, Any]:
    """The problem document; one with the status alone where something else has answered."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("status") == status:
        return found
    return {"status": status, "title": http.client.responses.get(status, ""), "detail": "the relay has not said why"}


def _seconds(value: str | None) -> float | None:
    return float(value) if value is not None and value.isascii() and value.isdigit() else None
