"""The connection of an HTTP client: HTTP itself is aiohttp's, the limits, deadlines and the end are those of all clients."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from relaymta.accept.admission import Admission
from relaymta.accept.client import STRESS_PATIENCE, ClientConnection, described
from relaymta.accept.http.answers import problem_of, retry_after
from relaymta.accept.http.submitting import Answer, Submitter
from relaymta.accept.line import OUTPUT_SECONDS
from relaymta.accept.rights import Rights
from relaymta.config import Listener
from relaymta.problems import Problem
from relaymta.proto.auth_exchange import AuthExchange
from relaymta.proto.sasl import Claim

__all__ = ["Desk", "HttpConnection"]

HEAD_SECONDS = 30.0  # for the head of a request, from its first octet
QUIET_SECONDS = 75.0  # between two requests
RATE_GRACE = 60.0  # seconds until the rate of a body is checked
HEAD_MOST = 8190  # octets of a line, or field, of the head
FIELDS_MOST = 64
AGAIN_SECONDS = 5  # until a client that was refused may connect again, where the refusal does not say
REFUSED = "HTTP/1.1 %d %s\r\nContent-Type: application/problem+json\r\nContent-Length: %d\r\n%sConnection: close\r\n\r\n"


class Desk:
    """What answers the requests of a worker: `answer(connection, request)`."""

    def __init__(self, answer: "Callable[[HttpConnection, web.BaseRequest], Awaitable[web.StreamResponse]]") -> None:
        self._answer = answer
        self._of: dict[Any, HttpConnection] = {}
        self._server = _Server(
            self._handle, access_log=None, keepalive_timeout=2 * QUIET_SECONDS, lingering_time=5.0, max_line_size=HEAD_MOST,
            max_field_size=HEAD_MOST, max_headers=FIELDS_MOST, auto_decompress=False,
        )  # fmt: skip

    def begin(self, connection: "HttpConnection") -> Any:
        """What speaks HTTP for a connection."""
        handler = self._server()
        self._of[handler] = connection
        return handler

    def end(self, handler: Any) -> None:
        """The connection is closed."""
        self._of.pop(handler, None)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = self._of.get(request.protocol)
        if connection is None:
            raise ConnectionResetError
        connection.begins(request)
        try:
            return await self._answer(connection, request)
        finally:
            connection.done()


class _Handler(web.RequestHandler):
    """What aiohttp says of a request that it cannot read: here as a problem document, and nothing of it in a log. `answered`:
    how many requests were."""

    answered = 0
    _last: Any = None  # the body of the last request that was read, which may still come

    def data_received(self, data: bytes) -> None:
        """As of Protocol."""
        super().data_received(data)
        if self._messages:
            self._last = self._messages[-1][1]

    @property
    def owes(self) -> bool:
        """Whether there is a request that is not answered."""
        return self._request_count > self.answered

    @property
    def is_whole(self) -> bool:
        """Whether the last request has come with its whole body."""
        return self._last is not None and bool(self._last.is_eof())

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """As of RequestHandler."""
        if request.writer.output_size > 0:
            raise ConnectionAbortedError
        detail = "it is not HTTP as it is to be" if status < 500 else "internal error"
        body = msgspec.json.encode(Problem(status, detail).details)
        found = web.Response(status=status, body=body, content_type="application/problem+json", headers={"Server": "relaymta"})
        found.force_close()
        return found


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


class _Session:
    """What the connections of all protocols have; here aiohttp has it."""

    state = 0
    secure = False
    closing = False
    behind = False
    foreign = False
    parting = False
    errors = 0
    claim: Claim | None = None
    exchange: AuthExchange | None = None

    def greet(self) -> bytes:
        """The client speaks first."""
        return b""

    def receive(self, data: bytes) -> bytes:
        """Nothing: not what this is for."""
        return b""

    def keep(self, data: bytes) -> None:
        """As `receive`."""

    def close(self) -> None:
        """As `receive`."""

    def tls_started(self) -> None:
        """As `receive`."""

    def checked(self, answer: bytes) -> bytes:
        """As `receive`."""
        return b""


class HttpConnection(ClientConnection[_Session]):
    """`request`: the one that is answered; `tls`: version and cipher, "": none; `remembered`: the credentials that were verified
    last, and until when that counts (loop time). `submitters`: sessions that wait for the next message of the connection's user;
    `at_work`: those that have one."""

    greets = False

    __slots__ = (
        "_before", "_blocked", "_desk", "_handler", "at_work", "began_at", "remembered", "request", "submitters", "taken", "tls",
    )  # fmt: skip

    def __init__(self, desk: Desk, admission: Admission, listener: Listener) -> None:
        super().__init__(admission, listener)
        self._desk = desk
        self._handler: _Handler | None = None
        self._before: list[bytes] = []  # what came with the end of the TLS handshake
        self.request: web.BaseRequest | None = None
        self.began_at = 0.0  # when the request under way began to come (loop time), 0.0: none has
        self.taken = 0  # octets of its body
        self.tls = ""
        self.remembered: tuple[str, float] = ("", 0.0)
        self.submitters: list[Submitter] = []
        self.at_work: set[Submitter] = set()

    def begin_session(self, rights: Rights, secure: bool) -> _Session | None:
        """As of ClientConnection."""
        rights.offers = self.admission.endpoint.offers(self.listener, False)
        transport = self.transport
        assert transport is not None
        if secure:
            self.tls = described(transport)
        self._handler = self._desk.begin(self)
        self._handler.connection_made(transport)
        if self._before:
            self.admission.loop.call_soon(self._hand_over)
        return _Session()

    def _hand_over(self) -> None:
        """What came before there was a handler, and before what comes now."""
        before, self._before = self._before, []
        for data in before:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        """As of Protocol."""
        if self.lingers:
            self.drop(data)
            return
        if self._handler is None or self._before:
            self._before.append(data)
            return
        self.active_at = self.admission.now()
        self.began_at = self.began_at or self.active_at
        self.taken += len(data)
        self._handler.data_received(data)

    def eof_received(self) -> bool:
        """As of Protocol. A client that says no more may still wait for its answer (but for TLS, where asyncio cannot tell); not
        to a request that it has sent in part."""
        self.ended = True
        return self._handler is not None and not self.tls and self._handler.owes and self._handler.is_whole

    def pause_writing(self) -> None:
        """As of Protocol."""
        self.blocked_at = self.admission.now()
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        """As of Protocol."""
        self.blocked_at = 0.0
        if self._handler is not None:
            self._handler.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """As of Protocol. What filters are asked about is not taken; other messages under way are."""
        handler, self._handler = self._handler, None
        if handler is not None:
            self._desk.end(handler)
            # Its task may have been woken for a request in this turn of the loop, and takes a connection that is there then.
            self.admission.loop.call_soon(handler.connection_lost, exc)
        super().connection_lost(exc)
        for one in self.at_work:
            one.forsake()
        self.dismiss()

    def dismiss(self) -> None:
        """End the sessions that wait: the user is another one from now on, or there is none."""
        waiting, self.submitters = self.submitters, []
        for one in waiting:
            one.end()

    # Requests

    def begins(self, request: web.BaseRequest) -> None:
        """The head of a request was read."""
        self.request = request
        self.began_at = self.began_at or self.admission.now()
        self.taken = 0

    def done(self) -> None:
        """It was answered."""
        self.request = None
        self.began_at = 0.0
        self.active_at = self.admission.now()
        if self._handler is None:
            return
        self._handler.answered += 1
        if self.admission.intake.draining or (self.ended and not self._handler.owes):
            self._handler.close()  # behind the answer

    # As of ClientConnection

    def check(self, now: float) -> None:
        """Close a client that is silent or too slow."""
        patience = STRESS_PATIENCE if self.admission.stressed else 1.0
        settings = self.admission.config.intake
        if self.check_output(now, min(OUTPUT_SECONDS, settings.command_timeout) * patience) or self.transport is None:
            return
        if self.request is not None:
            taken, coming = now - self.began_at, not self.request.content.is_eof()
            late = taken > RATE_GRACE * patience and self.taken < taken * settings.data_rate
            if coming and not self.at_work and (late or now - self.active_at > settings.data_timeout * patience):
                self.transport.abort()
        elif self.began_at:
            if now - self.began_at > HEAD_SECONDS * patience:
                self.transport.abort()
        elif now - self.active_at > QUIET_SECONDS * patience or self.admission.intake.draining:
            self.transport.close()

    def drain(self) -> None:
        """Shutting down: close it, behind the answer that is under way (`done`)."""
        if self.request is None and self.transport is not None:
            self.transport.close()

    def refusal(self, answer: bytes) -> bytes:
        """A refusal of SMTP as an answer of HTTP."""
        code, _, text = answer.decode("utf-8", "replace").strip().partition(" ")
        found, again = Problem(403, text), ""
        if code.startswith("4"):
            found = Problem(problem_of(Answer(int(code), text), []).status, text)
            again = f"Retry-After: {retry_after(text, AGAIN_SECONDS)}\r\n"
        body = msgspec.json.encode(found.details)
        return (REFUSED % (found.status, found.details.title, len(body), again)).encode() + body
