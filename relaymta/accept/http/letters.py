"""The messages of a request: read from its body, composed, rendered for each recipient of a batch, or taken as they are."""

import contextlib
import mmap
from collections.abc import AsyncGenerator, Callable, Container, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

import msgspec
from aiohttp import web

from relaymta.accept.admission import Admission
from relaymta.accept.dropped import Converted
from relaymta.accept.http import models
from relaymta.accept.http.compose import PIECE, compose
from relaymta.accept.http.models import Limits, Message, Wrong
from relaymta.accept.http.receiving import Received, finished, media_type
from relaymta.accept.http.submitting import Letter
from relaymta.accept.http.templates import Templates, Unavailable
from relaymta.accept.rights import Rights
from relaymta.problems import Problem
from relaymta.proto.address import compared, plain
from relaymta.proto.addressees import header_octets, recipients
from relaymta.proto.header import HEADER_SEEN
from relaymta.proto.mailbox import Malformed, authors
from relaymta.queue import wall_ms

__all__ = ["Letters", "Order"]

T = TypeVar("T")
ON_THREAD = 262_144  # octets of a body from which on it is read, and composed, on a thread
TEXT_MOST = 4 << 20  # characters of text, and of html, which are in memory
JSON_MOST = 16 << 20  # octets of JSON, but for the base64 of attachments
STRINGS_MOST = 500_000  # in JSON
LATER_MOST = 90 * 86_400_000  # ms: how far ahead a message can be ordered
TAGS_MOST = 20
JSON = ("application/json", "multipart/form-data")
RAW = "message/rfc822"
VALIDATE = ("0", "1", "false", "true")
_PARAMETERS = {"from", "to", "tag", "priority", "send_at", "validate"}


class Order(NamedTuple):
    """What a request wants. `message`: of JSON, None: it is a message as it is, for `sender` and `recipients`. `priority`: "" for
    that of the account; `send_at`: ms, UTC, 0: at once; `most`: octets that one message may have."""

    received: Received
    message: Message | None
    tags: list[str]
    priority: str
    send_at: int
    most: int
    sender: str = ""
    recipients: tuple[str, ...] = ()

    @property
    def messages(self) -> int:
        """How many messages it is about."""
        return 1 if self.message is None or self.message.batch is None else len(self.message.batch)


class Letters:
    """Makes the messages of a worker's requests."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._templates = Templates(admission.intake.log)

    def end(self) -> None:
        """The worker ends."""
        self._templates.end()

    async def read(self, request: web.BaseRequest, received: Received, rights: Rights | None) -> Order:
        """What a request wants. Problem."""
        kind = media_type(request)
        assert rights is not None
        _check_query(request, _PARAMETERS if kind == RAW else {"validate"})
        try:
            if kind == RAW:
                return await self._work(received, _raw, request, received, rights.client.limits.recipients)
            if kind not in JSON:
                raise Problem(415, f"Content-Type is to be one of {', '.join((*JSON, RAW))}")
            limits = Limits(recipients=rights.client.limits.recipients, text=TEXT_MOST)
            message = await self._work(received, _parsed, received.body.buffer, limits)
        except Wrong as error:
            raise _wrong(error) from None
        at = 0 if message.send_at is None else int(message.send_at.timestamp() * 1000)
        return Order(
            received, message, list(message.tags), message.priority or "", _checked_time(at), rights.client.limits.message_size
        )

    async def of(self, order: Order, without: Container[int]) -> AsyncGenerator[tuple[int, Letter], None]:
        """The messages of a request with their numbers, but for those in `without`. Problem; none of the messages is returned
        then, but where a part of a form is wrong."""
        if order.message is None:
            if 0 not in without:
                size, pieces = _as_it_is(order.received)
                utf8 = not all(map(str.isascii, (order.sender, *order.recipients)))
                yield 0, Letter(order.sender, list(order.recipients), utf8, size, pieces)
            return
        try:
            if order.message.batch is not None:  # before any of it is submitted
                async for _ in self._each(order, order.message):
                    pass
            number = 0
            async with aclosing(self._each(order, order.message)) as letters:
                async for letter in letters:
                    if number not in without:
                        yield number, letter
                    number += 1
        except Wrong as error:
            raise _wrong(error) from None
        except Unavailable as error:
            raise Problem(503, str(error), {"Retry-After": "5"}) from None

    async def _each(self, order: Order, message: Message) -> AsyncGenerator[Letter, None]:
        async with aclosing(self._templates.rendered(message, order.most)) as messages:
            async for one in messages:
                yield await self._composed(order, one)

    async def _composed(self, order: Order, message: Message) -> Letter:
        return Letter(*await self._work(order.received, compose, message, order.received.parts))

    async def _work(self, received: Received, work: Callable[..., T], *arguments: object) -> T:
        """What may take long is done on a thread."""
        if received.body.size < ON_THREAD:
            return work(*arguments)
        return await finished(self._admission.loop.run_in_executor(self._admission.threads, work, *arguments))


class _File(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw()


class _Outline(msgspec.Struct):
    attachments: list[_File] = []


def _parsed(buffer: bytes | mmap.mmap, limits: Limits) -> Message:
    """As `models.parse`, of a body that is large at most by the base64 in it: all else takes many times its octets in memory.
    Wrong."""
    octets = len(buffer)
    if octets > ON_THREAD:
        view = memoryview(buffer)
        strings = sum(view[at : at + PIECE].tobytes().count(b'"') for at in range(0, octets, PIECE)) // 2
        if strings > STRINGS_MOST:
            raise Wrong("", f"there are more than {STRINGS_MOST} strings in the JSON")
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # what is wrong is told below
            octets -= sum(len(memoryview(one.content)) for one in msgspec.json.decode(view, type=_Outline).attachments)
        if octets > JSON_MOST:
            raise Wrong("", f"there are more than {JSON_MOST} octets of JSON beside the content of attachments")
    return models.parse(memoryview(buffer), limits)


def _wrong(error: Wrong) -> Problem:
    status = 400 if not error.field else 422
    return Problem(status, f"{error.field}: {error.detail}" if error.field else error.detail, argument=error.field)


def _checked_time(at: int) -> int:
    """When a message is to be sent, ms. Problem: it is too far away."""
    if at and at - wall_ms() > LATER_MOST:
        raise Problem(422, f"send_at: it is more than {LATER_MOST // 86_400_000} days ahead", argument="send_at")
    return at


def _check_query(request: web.BaseRequest, known: set[str]) -> None:
    """Problem: there is another parameter, or `validate` is not well-formed: nothing is sent where only a check is meant."""
    unknown = set(request.query) - known
    if unknown:
        raise Problem(400, f"there is no parameter {min(unknown)[:100]!r} in the query", argument=min(unknown)[:100])
    if (given := request.query.getall("validate", [])) and (len(given) > 1 or given[0] not in VALIDATE):
        raise Problem(400, f"validate is one of {', '.join(VALIDATE)}, once", argument="validate")


def _raw(request: web.BaseRequest, received: Received, most: int) -> Order:
    """A message as it is. Its sender and recipients are those of the query, else those of its header. Problem."""
    query = request.query
    start = Converted().take(received.body.read(0, HEADER_SEEN), True)
    header = start[: header_octets(start)]
    if not header:
        raise Problem(422, "the message does not begin with a header")
    sender = _sender(header) if "from" not in query else _address(query["from"], "from", True)
    named = query.getall("to", [])
    found = [_address(one, "to") for one in named] or [
        _address(one.decode("utf-8", "replace"), "to") for one in recipients(header)
    ]
    if not found:
        raise Problem(422, "nobody is to get the message: there is no `to` in the query, and no To, Cc or Bcc", argument="to")
    everybody = {compared(one): one for one in reversed(found)}
    if len(everybody) > most:
        raise Problem(422, f"there are {len(everybody)} recipients, {most} are allowed", argument="to")
    tags = query.getall("tag", [])
    if len(tags) > TAGS_MOST or not all(models.is_tag(tag) for tag in tags):
        raise Problem(422, f"tag: at most {TAGS_MOST} words of 1 to 64 printable ASCII characters without commas", argument="tag")
    priority = query.get("priority", "")
    if priority not in ("", "express", "normal", "bulk"):
        raise Problem(422, "priority is express, normal or bulk", argument="priority")
    at = _checked_time(_time(query.get("send_at", "")))
    return Order(received, None, tags, priority, at, 0, sender, tuple(reversed(everybody.values())))


def _time(text: str) -> int:
    if not text:
        return 0
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            raise ValueError
        return int(found.astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise Problem(422, "send_at is a time such as 2026-12-24T18:00:00Z, with its offset", argument="send_at") from None


def _address(text: str, name: str, null: bool = False) -> str:
    """An address of the query or the header. Problem: it is none."""
    if null and text in ("", "<>"):
        return ""
    found = plain(text)
    if found is None:
        raise Problem(422, f"{text[:100]!r} is not a mail address", argument=name)
    return found


def _sender(header: bytes) -> str:
    """The address in Sender, or the first one in From. Problem."""
    try:
        found = authors(header, (b"sender",)) or authors(header, (b"from",))
    except Malformed as error:
        raise Problem(422, f"From or Sender: {error}", argument="from") from None
    if not found:
        raise Problem(422, "there is no `from` in the query, and no From in the message", argument="from")
    return _address(str(found[0]), "from")


def _as_it_is(received: Received) -> tuple[int, Iterator[bytes]]:
    """The octets of a message, as far as they are known, and its data with CRLF for each line end."""

    def pieces() -> Iterator[bytes]:
        body, converted, at = received.body, Converted(), 0
        while at < body.size:
            piece = body.read(at, PIECE)
            at += len(piece)
            yield converted.take(piece, at >= body.size)

    return received.body.size, pieces()
