"""HTTP hooks: one POST of JSON for each message (proto/hook.py), over connections that are kept for the next one.

aiohttp speaks HTTP. What it leaves open is here: a connection that was kept is used again only while there is nothing to be read
from it, since what is there would be taken for the next answer; and one that the hook has closed before it has said anything is
replaced by a new one, once. An answer is waited for on no other condition: the caller says how long all may take.

State, changed on the loop alone: `_client`, the session of aiohttp, from the first question to `close`, and for questions behind
that as long as they last; `_asking`, how many are under way; `_skipped_until`, when (loop time) an address is asked first again.
"""

import asyncio
import base64
import os
import secrets
import select
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, NamedTuple
from weakref import WeakSet

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from yarl import URL

from relaymta.files import read_secret
from relaymta.filter.judgement import Answer, FilterFailure, Mail, NewEnvelope, gtube
from relaymta.proto.hook import HookError, Signature, fields, said, wanted, written
from relaymta.proto.printable import printable
from relaymta.watch import Watched

__all__ = ["LARGEST", "Http"]

LARGEST: Final = 1 << 20  # octets of an answer
WHOLE: Final = 1 << 20  # octets of message data that are sent as one; larger ones are read twice, to sign and to send them
IDLE: Final = 10.0  # seconds that a connection is kept for the next question
SKIPPED: Final = 5.0  # seconds for which an address that failed is asked only if the others fail, too
SECRET_EVERY: Final = 10.0  # seconds after which the file of the secret is looked at again
ERROR_MOST: Final = 200  # characters
UNKNOWN: Final = 501  # the status of a server that does not know OPTIONS

_HEADERS: Final = {
    "Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "relaymta",
}  # fmt: skip


class _Lost(FilterFailure):
    """A connection that was kept was closed before there was any octet of an answer."""


class _Handler(ResponseHandler):
    """A connection. `used`: it has been asked; `kept`: and before that, too; `heard`: there were octets since it was asked last;
    `idle`: it has answered; `spoiled`: and has said more since."""

    used = kept = heard = idle = spoiled = False

    def data_received(self, data: bytes) -> None:
        self.heard = True
        self.spoiled = self.spoiled or self.idle
        super().data_received(data)

    def ask(self) -> None:
        """It is asked now."""
        self.kept, self.used, self.heard, self.idle = self.used, True, False, False


class _Attempt:
    """One request. `fresh`: not over a connection that was kept; `handler`: over which connection, None: there is none yet."""

    __slots__ = ("fresh", "handler")

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.handler: _Handler | None = None


_attempt: ContextVar[_Attempt] = ContextVar("_attempt")  # of the current task


class _Connector(aiohttp.TCPConnector):
    """Connections, as many as there are questions. Names are looked up as everywhere on this machine."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=IDLE, resolver=aiohttp.ThreadedResolver())
        self.handlers = WeakSet[_Handler]()
        self._factory = self._handler  # type: ignore[assignment]  # it has no other way to name another protocol

    def _handler(self) -> _Handler:
        made = _Handler(self._loop)
        self.handlers.add(made)
        return made

    def leave(self) -> None:
        """Close all connections now. `close` of the base class does that at once, too; what it returns is the wait for the end of
        the sockets, which warns if nobody begins it; the resolver has nothing to close."""
        aiohttp.BaseConnector.close(self).__await__()

    async def connect(self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout) -> Connection:
        """As of BaseConnector, which is asked for another one until one can be used."""
        attempt = _attempt.get()
        while True:
            connection = await super().connect(req, traces, timeout)
            handler = connection.protocol
            assert isinstance(handler, _Handler)
            if not handler.used or not (attempt.fresh or _says_something(handler)):
                handler.ask()
                attempt.handler = handler
                return connection
            connection.close()


def _says_something(handler: _Handler) -> bool:
    """Whether a connection that was kept has octets that nobody waits for, or is closed."""
    transport = handler.transport
    if transport is None or handler.should_close or handler.spoiled:
        return True
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))


class _Request(NamedTuple):
    """`body`: octets, or what makes an iterator of them."""

    headers: dict[str, str]
    body: bytes | Callable[[], AsyncIterator[bytes]]


_Make = Callable[[], Awaitable[_Request]]


class Http:
    """A judgement.Filter. Its words are verdicts."""

    def __init__(
        self, addresses: Sequence[str], timeout: float, name: str = "", hostname: str = "", stage: str = "message",
        body: bool = False, secret_file: str = "", warn: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """`addresses`: URLs, of which the first that can be connected to is asked. `timeout`: seconds for a connection, and for
        all of probe(); how long all else may take is its caller's to say. `name`, `hostname`, `stage`: what the hook is told of
        this filter; `body`: it is shown the message data; `secret_file`: what signs requests, "": nothing; `warn(text)`: it
        cannot be read, and what was read before is used."""
        self._skipped_until = {URL(address): 0.0 for address in addresses}
        self._names = {URL(address): address for address in addresses}
        self._timeout = timeout
        self._told = {"filter": name, "stage": stage, "hostname": hostname}
        self._body = body
        self._secret = Watched([secret_file], lambda: _secret(secret_file)) if secret_file else None
        self._look_at = 0.0  # loop time, at the secret
        self._looking: asyncio.Future[None] | None = None
        self._warned = ""
        self._warn = warn
        self._client: aiohttp.ClientSession | None = None
        self._connector: _Connector | None = None
        self._asking = 0
        self._closed = False

    @property
    def open(self) -> int:
        """Connections that there are, idle or not."""
        return sum(one.is_connected() for one in self._connector.handlers) if self._connector is not None else 0

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter. FilterFailure; OSError or StoreError: the text cannot be read."""
        name, body = await self._asked(partial(self._question, mail))
        try:
            found = said(body)
        except HookError as error:
            raise FilterFailure("protocol", f"{name}: {error}: it begins with {_begin(body)}") from None
        if not found.changes:
            return Answer(found.verdict, found.reason, found.score)
        changes = wanted(found, mail.text.head)
        envelope = None
        if changes.added or changes.removed or changes.sender is not None:
            envelope = NewEnvelope(changes.added, changes.removed, changes.sender)
        return Answer(found.verdict, found.reason, found.score, changes.edits, None, envelope, changes.dropped)

    async def probe(self) -> None:
        """As in judgement.Filter: OPTIONS, which a hook need not know: any answer shows that it is there, but for what a proxy in
        front of it says when it is gone."""
        try:
            async with asyncio.timeout(self._timeout):
                name, status, _ = await self._twice(self._option, "OPTIONS")
        except TimeoutError:
            names = ", ".join(self._names.values())
            raise FilterFailure("timeout", f"{names}: no answer within {self._timeout:g} s") from None
        if status >= 500 and status != UNKNOWN:
            raise FilterFailure("refused", f"{name}: answers HTTP {status}")

    async def prove(self) -> str:
        """As in judgement.Filter: whether what it answers makes sense. There is no message that each of them finds."""
        answer = await self.judge(gtube())
        return f"a hook that says {answer.word}" + (f": {answer.reason}" if answer.reason else "")

    def close(self) -> None:
        """As in judgement.Filter."""
        self._closed = True
        self._leave()

    # How

    async def _asked(self, make: _Make) -> tuple[str, bytes]:
        """The address that has answered with status 200, and the body."""
        name, status, body = await self._twice(make, "POST")
        if status == 200:
            return name, body
        if status == 413 and self._body:
            raise FilterFailure("oversize", f"{name}: answers HTTP 413")
        if status >= 400:
            raise FilterFailure("refused", f"{name}: answers HTTP {status}")
        raise FilterFailure("protocol", f"{name}: answers HTTP {status}")

    async def _twice(self, make: _Make, method: str) -> tuple[str, int, bytes]:
        """Ask; once more, on a new connection, where one that was kept is lost."""
        self._asking += 1
        try:
            try:
                return await self._first(make, method, False)
            except _Lost:
                return await self._first(make, method, True)
        finally:
            self._asking -= 1
            self._leave()

    async def _first(self, make: _Make, method: str, fresh: bool) -> tuple[str, int, bytes]:
        """What is answered at the first address that can be connected to, as `_put`. One that fails, or is so slow that the
        caller's time is up, is the last to be tried for SKIPPED seconds."""
        now = asyncio.get_running_loop().time
        began, failures = now(), list[FilterFailure]()
        request = await make()
        for url in sorted(self._skipped_until, key=lambda one: self._skipped_until[one] > began):
            began, name = now(), self._names[url]
            if self._skipped_until[url]:
                self._skipped_until[url] = began + max(SKIPPED, self._timeout)
            try:
                status, body = await self._put(method, url, request, fresh)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                self._skipped_until[url] = now() + SKIPPED
                failures.append(_unreached(name, error, self._timeout))
            except _Lost:
                raise
            except BaseException as error:
                late = isinstance(error, asyncio.CancelledError) and now() - began > self._timeout / 2
                if late or isinstance(error, FilterFailure):
                    self._skipped_until[url] = now() + SKIPPED
                raise
            else:
                self._skipped_until[url] = 0.0
                return name, status, body
        raise FilterFailure(failures[0].reason, "; ".join(map(str, failures)))

    async def _put(self, method: str, url: URL, request: _Request, fresh: bool) -> tuple[int, bytes]:
        """Status and body of an answer; of another status than 200 the body is left. FilterFailure; ClientConnectorError and
        ConnectionTimeoutError: there is no connection; what reading the text raises. Cancelled: the connection is closed."""
        attempt, name, reading = _Attempt(fresh), self._names[url], _Reading()
        _attempt.set(attempt)
        data = request.body if isinstance(request.body, bytes) else reading.of(request.body())
        try:
            response = await self._session().request(
                method, url, data=data or None, headers=request.headers, allow_redirects=False
            )
            try:
                body = await _answer(response, name) if response.status == 200 and method == "POST" else None
                if body is None:
                    response.close()
                elif attempt.handler is not None:
                    attempt.handler.idle = True
            except BaseException:
                response.close()
                raise
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise
        except (aiohttp.ClientError, ValueError, OSError) as error:
            if reading.error is not None:
                raise reading.error from None
            raise _failure(name, error, attempt) from None
        return response.status, body or b""

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._connector = _Connector()
            self._client = aiohttp.ClientSession(
                connector=self._connector, cookie_jar=aiohttp.DummyCookieJar(), headers=_HEADERS, auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout), trust_env=False,
            )  # fmt: skip
        return self._client

    def _leave(self) -> None:
        """Close the connections, if nothing is under way and nothing is to come."""
        if self._closed and not self._asking and self._connector is not None:
            self._connector.leave()
            self._client = self._connector = None

    # What is sent

    async def _option(self) -> _Request:
        if self._secret is not None:
            await self._key(self._secret)  # without it there are no questions
        return _Request({}, b"")

    async def _question(self, mail: Mail) -> _Request:
        """The request about a message, signed now. Each has an id of its own."""
        ident = secrets.token_hex(16)
        front, body = self._front(mail, ident), None
        if self._body:
            front = front[:-1] + b',"message":"'
        if not self._body:
            body = front
        elif mail.octets <= WHOLE:
            data = b"".join([piece async for piece in mail.text.pieces(mail.most)])
            body = b"".join((front, base64.b64encode(data), _END))
        headers = {"X-Relaymta-Request": ident}
        if body is None:
            headers["Content-Length"] = str(len(front) + 4 * -(-mail.octets // 3) + len(_END))
        if self._secret is not None:
            made = Signature(await self._key(self._secret), int(time.time()))
            if body is not None:
                made.feed(body)
            else:
                async with aclosing(_whole(front, mail)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        made.feed(piece)
            headers["X-Relaymta-Signature"] = made.value()
        return _Request(headers, body if body is not None else partial(_whole, front, mail))

    def _front(self, mail: Mail, ident: str) -> bytes:
        """All but the message data."""
        header, octets = fields(mail.text.head)
        told = {
            "request": ident,
            **self._told,
            "id": mail.ident,
            "client": {
                "address": mail.client, "helo": mail.helo, "user": mail.user, "mechanism": mail.mechanism,
                "application": mail.application, "tls": mail.tls, "listener": mail.listener, "protocol": mail.protocol,
            },
            "envelope": {"sender": mail.sender, "recipients": mail.recipients, "parameters": mail.parameters},
            "results": {"dmarc": mail.dmarc} if mail.dmarc else {},
            "size": mail.text.size,
            "header": header,
        }  # fmt: skip
        if octets:
            told["header_octets"] = octets
        return written(told)

    async def _key(self, secret: "Watched[bytes]") -> bytes:
        """The secret, which is read on a thread. FilterFailure: there is none."""
        loop = asyncio.get_running_loop()
        if self._looking is None and loop.time() >= self._look_at:
            self._look_at = loop.time() + SECRET_EVERY
            self._looking = loop.run_in_executor(None, secret.refresh)
            self._looking.add_done_callback(lambda _: self._looked(secret))
        if self._looking is not None:
            await asyncio.shield(self._looking)
        if secret.value is None:
            self._look_at = 0.0
            raise FilterFailure("connect", secret.problem)
        return secret.value

    def _looked(self, secret: "Watched[bytes]") -> None:
        self._looking = None
        if secret.problem and secret.problem != self._warned:
            self._warn(secret.trouble)
        self._warned = secret.problem


class _Reading:
    """Message data on its way. `error`: why it could not be read: aiohttp has another word for that."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def of(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for piece in pieces:
                yield piece
        except Exception as error:
            self.error = error
            raise


async def _encoded(mail: Mail) -> AsyncIterator[bytes]:
    """Message data in base64, as much as there is to be shown."""
    rest = b""
    async for piece in mail.text.pieces(mail.most):
        piece = rest + piece
        rest = piece[len(piece) - len(piece) % 3 :]
        yield base64.b64encode(piece[: len(piece) - len(rest)])
    if rest:
        yield base64.b64encode(rest)


_END: Final = b'"}'


async def _whole(front: bytes, mail: Mail) -> AsyncIterator[bytes]:
    """A request with the message data, whose beginning is `front`."""
    yield front
    async for piece in _encoded(mail):
        yield piece
    yield _END


async def _answer(response: aiohttp.ClientResponse, name: str) -> bytes:
    """The body. FilterFailure: it is too long, or compressed."""
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.strip().lower() != "identity":
        raise FilterFailure("protocol", f"{name}: its answer is compressed ({printable(coding)[:32]}), which nobody asked for")
    found = b""
    if (response.content_length or 0) <= LARGEST:
        while piece := await response.content.readany():
            found += piece
            if len(found) > LARGEST:
                break
        else:
            return found
    raise FilterFailure("protocol", f"{name}: its answer is longer than {LARGEST} octets")


def _failure(name: str, error: Exception, attempt: _Attempt) -> FilterFailure:
    """What an exception of aiohttp means, once there is a connection."""
    handler = attempt.handler
    if isinstance(error, aiohttp.ClientPayloadError):
        return FilterFailure("protocol", f"{name}: its answer is cut short")
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        if handler is not None and handler.heard:
            return FilterFailure("protocol", f"{name}: closes the connection within its answer")
        is_kept = handler is not None and handler.kept
        return (_Lost if is_kept else FilterFailure)("connect", f"{name}: closes the connection without an answer")
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return FilterFailure("protocol", f"{name}: answers, but not by HTTP: {printable(text)[:ERROR_MOST]}")


def _unreached(name: str, error: Exception, seconds: float) -> FilterFailure:
    """Why there is no connection."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FilterFailure("timeout", f"{name}: does not take the connection within {seconds:g} s")
    cause: Exception = error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
    why = str(cause)
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
        why = os.strerror(cause.errno) if cause.errno > 0 else cause.strerror or why  # the negative ones are of names
    return FilterFailure("connect", f"{name}: {printable(why)[:ERROR_MOST]}")


def _begin(body: bytes) -> str:
    return repr(printable(body[:64].decode("utf-8", "replace")))


def _secret(path: str) -> bytes:
    try:
        return read_secret(path).encode()
    except OSError as error:
        raise ValueError(f"secret_file {path}: {error.strerror or error}") from None
