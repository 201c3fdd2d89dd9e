"""The messages of a request: read from its body, composed, rendered for each recipient of a batch, or taken as they are."""

import contextlib
import mmap
import re
from collections.abc import AsyncGenerator, Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from aiohttp import web

from relaymta.accept.admission import Admission
from relaymta.accept.dropped import Converted
from relaymta.accept.http import models
from relaymta.accept.http.compose import PIECE, Composer
from relaymta.accept.http.models import Limits, Message, Wrong
from relaymta.accept.http.places import Full, Places
from relaymta.accept.http.receiving import Received, finished, media_type
from relaymta.accept.http.submitting import Letter
from relaymta.accept.http.templates import TEXT_MOST, Templates, Unavailable
from relaymta.accept.once import FIELD
from relaymta.problems import Problem
from relaymta.proto.address import compared, plain
from relaymta.proto.addressees import header_octets, recipients
from relaymta.proto.header import HEADER_SEEN
from relaymta.proto.mailbox import Malformed, authors
from relaymta.proto.printable import printable
from relaymta.proto.transaction import Limits as SessionLimits
from relaymta.queue import wall_ms

__all__ = ["Letters", "Order"]

T = TypeVar("T")
ON_LOOP = 2000  # microseconds that work may take, about, to be done on the loop, and in one turn of it
BODY_ON_LOOP, STRINGS_ON_LOOP = 65536, 200  # octets of JSON, and strings in it, that are read on the loop
RAW_ON_LOOP = 16384  # octets of a message as it is
LARGE = 262_144  # octets of a body whose work does not have the places of smaller ones
AT_ONCE = 2  # works of large requests that are done on threads at the same time, and of others; one fewer of one account
WAIT_SECONDS = 30.0  # for that
JSON_MOST = 16 << 20  # octets of JSON, but for the base64 of attachments
STRINGS_MOST = 500_000  # in JSON
SHORT_MOST = 1000  # octets of the JSON of a priority, or a time
LATER_MOST = 90 * 86_400_000  # ms: how far ahead a message can be ordered
TAGS_MOST = 20
JSON = ("application/json", "multipart/form-data")
RAW = "message/rfc822"
VALIDATE = ("0", "1", "false", "true")
_FIELD = re.compile(rb"^" + FIELD + rb"[ \t]*:", re.I | re.M)
_PARAMETERS = {"from", "to", "tag", "priority", "send_at", "validate"}


class Order(NamedTuple):
    """What a request wants. `message`: of JSON, None: it is a message as it is, for `sender` and `recipients`. `priority`: "" for
    that of the account; `send_at`: ms, UTC, 0: at once; `most`: octets that one message may have; `size`: octets of a message
    as it is, with CRLF; `owner`: whose it is, among those who wait for a thread."""

    received: Received
    message: Message | None
    tags: list[str]
    priority: str
    send_at: int
    most: int
    sender: str = ""
    recipients: tuple[str, ...] = ()
    size: int = 0
    owner: str = ""

    @property
    def messages(self) -> int:
        """How many messages it is about."""
        return 1 if self.message is None or self.message.batch is None else len(self.message.batch)


class Letters:
    """Makes the messages of a worker's requests."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._templates = Templates(admission.intake.log)
        # Their own: those of the admission write the data of all mail.
        self._threads = ThreadPoolExecutor(2 * AT_ONCE, "letters")
        self._places = Places(AT_ONCE, WAIT_SECONDS), Places(AT_ONCE, WAIT_SECONDS)  # of small requests, of large ones

    def end(self) -> None:
        """The worker ends."""
        self._templates.end()
        self._threads.shutdown(wait=False)

    async def read(self, request: web.BaseRequest, received: Received, own: SessionLimits, owner: str = "") -> Order:
        """What a request wants. `own`: the limits of its client; `owner`: who that is. Problem."""
        kind = media_type(request)
        _check_query(request, _PARAMETERS if kind == RAW else {"validate"})
        try:
            if kind == RAW:
                if received.body.size <= RAW_ON_LOOP and not received.body.in_file:
                    return _raw(request, received, own.recipients)
                return await self._work(received, owner, _raw, request, received, own.recipients)
            if kind not in JSON:
                raise Problem(415, f"Content-Type is to be one of {', '.join((*JSON, RAW))}")
            limits = Limits(recipients=own.recipients, text=TEXT_MOST)
            if _is_short(received):
                message = _parsed(received.body.buffer, limits)
            else:
                message = await self._work(received, owner, _parsed, received.body.buffer, limits)
        except Wrong as error:
            raise _wrong(error) from None
        except OSError as error:
            raise _unread(error) from None
        _check_parts(received, message)
        at = 0 if message.send_at is None else int(message.send_at.timestamp() * 1000)
        at = _checked_time(at)
        return Order(received, message, list(message.tags), message.priority, at, own.message_size, owner=owner)

    async def count(self, request: web.BaseRequest, received: Received, owner: str) -> int:
        """How many messages a request is about, which was read before: nothing of it is checked. Problem."""
        if media_type(request) == RAW:
            return 1
        try:
            if received.body.size <= BODY_ON_LOOP:
                return _counted(received.body.buffer)
            return await self._work(received, owner, _counted, received.body.buffer)
        except OSError as error:
            raise _unread(error) from None

    async def of(self, order: Order, without: Container[int]) -> AsyncGenerator[tuple[int, Letter], None]:
        """The messages of a request with their numbers, but for those in `without`. Problem; none of the messages is returned
        then, but where a part of a form is wrong."""
        if order.message is None:
            if 0 not in without:
                utf8 = not all(map(str.isascii, (order.sender, *order.recipients)))
                yield 0, Letter(order.sender, list(order.recipients), utf8, order.size, _as_it_is(order.received))
            return
        try:
            composer = Composer(order.message, order.received.parts)
            if order.message.batch is not None:  # before any of it is submitted
                async with aclosing(self._each(order, order.message, composer)) as letters:
                    async for _ in letters:
                        pass
            number = 0
            async with aclosing(self._each(order, order.message, composer)) as letters:
                async for letter in letters:
                    if number not in without:
                        yield number, letter
                    number += 1
        except Wrong as error:
            raise _wrong(error) from None
        except Unavailable as error:
            raise Problem(503, str(error), {"Retry-After": "5"}) from None

    async def _each(self, order: Order, message: Message, composer: Composer) -> AsyncGenerator[Letter, None]:
        """All messages. No turn of the loop is longer than ON_LOOP, or than one message that takes as long."""
        spent, in_file = 0, order.received.body.in_file  # with the base64 of attachments, which is checked with the first
        async with aclosing(self._templates.rendered(message, order.most, owner=order.owner)) as messages:
            async for one in messages:
                cost = composer.cost(one)
                if cost > ON_LOOP or in_file:
                    in_file = False
                    yield Letter(*await self._work(order.received, order.owner, composer.compose, one))
                    continue
                spent += cost
                if spent > ON_LOOP:
                    spent = cost
                    await self._admission.turns.turn()
                yield Letter(*composer.compose(one))

    async def _work(self, received: Received, owner: str, work: Callable[..., T], *arguments: object) -> T:
        """What may take long is done on a thread. Problem: there are too many who want that."""
        try:
            async with self._places[received.size >= LARGE].place(owner):
                return await finished(self._admission.loop.run_in_executor(self._threads, work, *arguments))
        except Full:
            raise Problem(503, "too many large requests at the same time; try again", {"Retry-After": "5"}) from None


def _is_short(received: Received) -> bool:
    """Whether JSON is read in a moment: what takes long are addresses, up to 50 us each."""
    body = received.body
    return body.size <= BODY_ON_LOOP and not body.in_file and body.read(0, body.size).count(b'"') <= 2 * STRINGS_ON_LOOP


def _check_parts(received: Received, message: Message) -> None:
    """Problem: there is a part that is for nothing."""
    unused = received.parts.keys() - {one.part for one in message.attachments}
    if unused:
        name = printable(min(unused)[: models.SHOWN])
        raise Problem(422, f"no attachment names the part {name!r} of the form"[:300], argument=name)


class _File(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw()


class _Outline(msgspec.Struct):
    to: msgspec.Raw = msgspec.Raw()
    cc: msgspec.Raw = msgspec.Raw()
    bcc: msgspec.Raw = msgspec.Raw()
    reply_to: msgspec.Raw = msgspec.Raw()
    headers: msgspec.Raw = msgspec.Raw()
    tags: msgspec.Raw = msgspec.Raw()
    priority: msgspec.Raw = msgspec.Raw()
    send_at: msgspec.Raw = msgspec.Raw()
    attachments: list[_File] = []


def _parsed(buffer: bytes | mmap.mmap, limits: Limits) -> Message:
    """As `models.parse`, of a body that is large at most by the base64 in it: all else takes many times its octets in memory.
    Wrong."""
    octets = len(buffer)
    if octets > BODY_ON_LOOP:
        view = memoryview(buffer)
        if _count(view, b'"') // 2 > STRINGS_MOST:
            raise Wrong("", f"there are more than {STRINGS_MOST} strings in the JSON")
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # what is wrong is told below
            outline = msgspec.json.decode(view, type=_Outline)
            _check_outline(outline, limits)
            octets -= sum(len(memoryview(one.content)) for one in outline.attachments)
        if octets > JSON_MOST:
            raise Wrong("", f"there are more than {JSON_MOST} octets of JSON beside the content of attachments")
    return models.parse(memoryview(buffer), limits)


def _check_outline(outline: _Outline, limits: Limits) -> None:
    """Wrong: a list has many times what it may have, which would be made of it in one step: that no other thread interrupts."""
    most = {
        "to": limits.recipients, "cc": limits.recipients, "bcc": limits.recipients, "reply_to": limits.reply_to,
        "headers": limits.headers, "tags": limits.tags, "priority": 1, "send_at": 1,
    }  # fmt: skip
    for name, count in most.items():
        view = memoryview(getattr(outline, name))
        # Of the quotes of a string that are not escaped there are two at most; and what is one of many has four strings at most.
        if _count(view, b'"') - _count(view, b'\\"') > 2 * 4 * count:
            raise Wrong(name, f"there are more than {count}")
        if count == 1 and len(view) > SHORT_MOST:
            raise Wrong(name, "it is too long")


class _Entries(msgspec.Struct):
    batch: list[msgspec.Raw] | None = None


def _counted(buffer: bytes | mmap.mmap) -> int:
    """As `Letters.count`, of JSON."""
    batch = msgspec.json.decode(memoryview(buffer), type=_Entries).batch
    return 1 if batch is None else len(batch)


def _unread(error: OSError) -> Problem:
    return Problem(503, f"the body cannot be read: {error.strerror}; try again later", {"Retry-After": "10"})


def _count(view: memoryview, what: bytes) -> int:
    """How often it is there, without a copy of all."""
    return sum(view[at : at + PIECE + len(what) - 1].tobytes().count(what) for at in range(0, len(view), PIECE))


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
    try:
        unquote_to_bytes(request.rel_url.raw_query_string).decode()
    except UnicodeError:
        raise Problem(400, "the query is not UTF-8") from None
    unknown = set(request.query) - known
    if unknown:
        raise Problem(400, f"there is no parameter {min(unknown)[:100]!r} in the query", argument=min(unknown)[:100])
    if (given := request.query.getall("validate", [])) and (len(given) > 1 or given[0] not in VALIDATE):
        raise Problem(400, f"validate is one of {', '.join(VALIDATE)}, once", argument="validate")


def _raw(request: web.BaseRequest, received: Received, most: int) -> Order:
    """A message as it is. Its sender and recipients are those of the query, else those of its header. Problem."""
    query = request.query
    start = Converted(True).take(received.body.read(0, HEADER_SEEN), True)
    header = start[: header_octets(start)]
    if not header:
        raise Problem(422, "the message does not begin with a header")
    if len(header) == len(start) and received.body.size > HEADER_SEEN:
        raise Problem(422, f"the header of the message has more than {HEADER_SEEN} octets")
    if _FIELD.search(header):
        raise Problem(422, "X-Relay-Idempotency is for SMTP: give the key as the header Idempotency-Key of the request")
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
    size = sum(map(len, _as_it_is(received)))
    return Order(received, None, tags, priority, at, 0, sender, tuple(reversed(everybody.values())), size)


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


def _as_it_is(received: Received) -> Iterator[bytes]:
    """The data of a message, with CRLF for each line end."""
    body, converted, at = received.body, Converted(True), 0
    while at < body.size:
        piece = body.read(at, PIECE)
        at += len(piece)
        yield converted.take(piece, at >= body.size)
