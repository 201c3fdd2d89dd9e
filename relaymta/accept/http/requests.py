"""The operations of HTTP injection: who asks, what of, and what is answered.

    POST /v1/messages         one message, or a batch: JSON, a form with JSON and files, or a message as it is (message/rfc822)
    GET  /v1/messages/ID      what has become of it
    GET  /v1/receipts/KEY     what was accepted under an idempotency key
    GET  /v1/openapi.json     the description

A request is answered once all of its messages are safe on disk, or refused. Its work is a task of its own, which goes on when the
client has gone: what was begun under an idempotency key ends before the next one with that key begins.
"""

import asyncio
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from hashlib import blake2b
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec
from aiohttp import hdrs, web

from relaymta.accept.admission import Admission
from relaymta.accept.http import answers
from relaymta.accept.http.answers import Accepted, MessageResult, ReceiptState
from relaymta.accept.http.connection import Desk, HttpConnection
from relaymta.accept.http.letters import Letters, Order
from relaymta.accept.http.places import Full, Places
from relaymta.accept.http.receiving import Received, Receiver, media_type, without_frames
from relaymta.accept.http.submitting import Answer, Letter, Submitter
from relaymta.accept.once import Busy, Turn, Wanted, owner_of
from relaymta.accept.origin import Client, Origin
from relaymta.auth.identity import Identity
from relaymta.errors import StoreError, redacted
from relaymta.ident import parse_id
from relaymta.metrics import COUNTERS, index
from relaymta.problems import Problem
from relaymta.proto.header import HEADER_SEEN
from relaymta.proto.host import hostname_of, is_address
from relaymta.proto.printable import printable
from relaymta.proto.sasl import Claim, Password, Token
from relaymta.queue import Kept, Known, Request, Shards

__all__ = ["Injection"]

TURN_SECONDS = 10.0  # for another request with the same idempotency key
LOGIN_SECONDS = 60.0  # for which the credentials of a connection count without being verified again
TOGETHER = 64  # messages of a batch that are submitted at the same time
LARGE, LARGE_TOGETHER = 1 << 20, 4  # octets of a request of which only so many are dealt with at the same time
ENDING = Answer(421, "4.3.2 Shutting down; try again in a moment")
SPARE = 1 << 20  # octets of a request beside its message
_KEY = re.compile(r"[!-~]{1,255}\Z")
# Version 00 as it is; of a later one what 00 has (W3C Trace Context 2, 3.2.4). The first group is what is behind the version.
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2}(?=.{53}(?:-|\Z)))(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})"
)
_encode = msgspec.json.Encoder().encode
_TOTAL = "relaymta_http_requests_total"
_REQUESTS = {value: index(_TOTAL, value) for value in COUNTERS[_TOTAL][2]}
_NAMES = {("POST", "/v1/messages"): "send", ("GET", "/v1/messages/"): "message", ("GET", "/v1/receipts/"): "receipt"}
DETAIL_LOGGED = 300  # characters


class Asked(NamedTuple):
    """A request whose client is known, as it was then: what is done for it goes on when the client has gone. `identity`: of the
    user, None: nobody has logged in; `key`: its idempotency key, "" without one; `traceparent`: likewise; `began`: when it
    began to come (loop time)."""

    connection: HttpConnection
    request: web.BaseRequest
    client: Client
    identity: Identity | None
    origin: Origin
    key: str
    traceparent: str
    began: float


class Injection:
    """The requests of one worker."""

    def __init__(self, admission: Admission, shards: Shards, folder: str) -> None:
        """`folder`: where the bodies of large requests are written."""
        self._admission = admission
        self._shards = shards
        self._receiver = Receiver(admission, folder)
        self._letters = Letters(admission)
        self._large = Places(LARGE_TOGETHER, TURN_SECONDS)
        self.desk = Desk(self.answer)

    def end(self) -> None:
        """The worker ends."""
        self._letters.end()

    async def answer(self, connection: HttpConnection, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to a request. Every error is a problem document."""
        found = await self._answer(connection, request)
        found.headers[hdrs.SERVER] = "relaymta"
        name = _NAMES.get((request.method, request.rel_url.raw_path[:13]), "other")
        self._admission.intake.counters.add(_REQUESTS[f"{name} {found.status // 100}xx"], 1)
        return found

    async def _answer(self, connection: HttpConnection, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._routed(connection, request)
        except Problem as error:
            found = without_frames(error)
            rights = connection.rights
            if request.method == "POST" and rights is not None and "recipients" not in error.more:  # else each has a record
                said = f"{error.status} {printable(error.detail)[:DETAIL_LOGGED]}"
                self._admission.intake.not_asked_well(rights.client, rights.user, said)
        except ConnectionError:
            raise
        except Exception as error:
            text = redacted(f"{request.method} {request.path[:100]}: internal error: {type(error).__name__}: {error}")
            self._admission.intake.log.event("warning", text=text)
            found = Problem(500, "internal error; the log of the relay says more")
        return web.Response(
            status=found.status, body=_encode(found.details), headers=found.headers, content_type="application/problem+json"
        )

    async def _routed(self, connection: HttpConnection, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path  # also of the absolute form (RFC 9112 3.2.2)
        for pattern, methods in _OPERATIONS:
            match = pattern.fullmatch(path)
            if match is not None:
                operation = methods.get(request.method)
                if operation is None:
                    raise Problem(405, f"{request.method} is not possible here", {"Allow": ", ".join(methods)})
                await self._log_in(connection, request)
                return await operation(self, _asked(connection, request), *(unquote(word) for word in match.groups()))
        raise Problem(404, "there is no such operation (GET /v1/openapi.json describes all)")

    # Who asks

    async def _log_in(self, connection: HttpConnection, request: web.BaseRequest) -> None:
        """The user of the connection is the one of this request. Problem: there is none, and it needs one."""
        rights, listener = connection.rights, connection.listener
        assert rights is not None
        all_given = request.headers.getall(hdrs.AUTHORIZATION, [])
        if len(all_given) > 1:
            raise Problem(400, "there is more than one Authorization", argument=hdrs.AUTHORIZATION)
        given = "".join(all_given)
        of_page = hdrs.ORIGIN in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none"
        if of_page and not given.lower().startswith("bearer "):  # a browser sends what it knows of us to whoever asks it to
            raise Problem(403, "requests of web pages are not taken, but with a bearer token")
        # DNS rebinding: a page of a name whose address has become ours. (With what it posts, a browser names the page.)
        if not given and request.method != "POST" and not self._is_ours(request):
            raise Problem(421, "without credentials a request is to be for a name of this relay (Host), or its address")
        now = self._admission.loop.time()
        if given:
            if given != connection.remembered[0] or now > connection.remembered[1]:
                connection.remembered = "", 0.0
                connection.dismiss()
                await self._verify(connection, given)
                connection.remembered = given, now + LOGIN_SECONDS
        elif connection.remembered[0]:
            connection.remembered = "", 0.0
            connection.dismiss()
            rights.log_out()
        if rights.login is None and (listener.auth == "require" or not rights.client.trusted):
            raise _who_are_you(
                "credentials are needed" if listener.auth != "off" else "your address may not send here", listener.auth
            )

    def _is_ours(self, request: web.BaseRequest) -> bool:
        """Whether a request is for this host, by an address or one of its names."""
        hosts = request.headers.getall(hdrs.HOST, [])
        name = hostname_of(hosts[0]) if len(hosts) == 1 else ""
        certificates, own = self._admission.endpoint.certificates, self._admission.config.hostname.lower().rstrip(".")
        return is_address(name) or name in ("localhost", own) or (name != "" and certificates.has(name))

    async def _verify(self, connection: HttpConnection, given: str) -> None:
        rights, endpoint = connection.rights, self._admission.endpoint
        assert rights is not None
        rights.log_out()
        if connection.listener.auth == "off":
            raise Problem(403, "credentials are not taken here (auth of the listener)")
        claim = _claim(given)
        if claim is None:
            raise _who_are_you("the credentials are not understood: Basic, or Bearer with a token", connection.listener.auth)
        client = rights.client
        mechanism = "PLAIN" if isinstance(claim, Password) else "OAUTHBEARER"
        began = self._admission.loop.time()
        identity, said = await endpoint.logins.check(claim, client.address, client.behind, mechanism)
        if said.startswith(b"535"):
            await asyncio.sleep(began + self._admission.config.accounts.answer_after - self._admission.loop.time())
        if connection.transport is None:
            raise ConnectionResetError
        refused = said if identity is None else rights.log_in(identity)
        if refused is None:
            return
        text = refused.decode("utf-8", "replace").strip()
        if text.startswith("535"):
            raise _who_are_you("the credentials are wrong", connection.listener.auth)
        busy = text.startswith("454 4.7.0 Too many")
        raise Problem(429 if busy else 503, text.partition(" ")[2], {"Retry-After": "30"})

    # POST /v1/messages

    async def _post(self, asked: Asked) -> web.StreamResponse:
        received = await self._receiver.receive(asked.request, asked.client.limits.message_size * 4 // 3 + SPARE)
        work = self._admission.loop.create_task(self._inject(asked, received))
        work.add_done_callback(lambda task: received.close())
        return await asyncio.shield(work)

    async def _order(self, asked: Asked, received: Received) -> Order:
        """What a request wants. Of large ones few are read at the same time."""
        owner = owner_of(asked.origin)
        if received.size < LARGE:
            return await self._letters.read(asked.request, received, asked.client.limits, owner)
        try:
            async with self._large.place(owner):
                return await self._letters.read(asked.request, received, asked.client.limits, owner)
        except Full:
            raise Problem(503, "too many large requests at the same time; try again", {"Retry-After": "5"}) from None

    async def _inject(self, asked: Asked, received: Received) -> web.StreamResponse:
        if asked.request.query.get("validate", "") in ("1", "true"):
            return _json(200, await self._validate(asked, await self._order(asked, received)))
        turn = await self._turn(asked)
        if turn is None:
            return self._answered(await self._submit_all(asked, await self._order(asked, received), None, b""), False)
        try:
            content = _content(asked.request, received)
            is_other = any(kept.content != content for kept in turn.kept.values())
            if (
                turn.kept
                and not is_other
                and len(turn.kept) == await self._letters.count(asked.request, received, owner_of(asked.origin))
            ):
                # As it was answered then, whatever is allowed now.
                return self._answered([answers.again(one) for _, one in sorted(turn.kept.items())], True)
            order = await self._order(asked, received)
            if is_other:
                raise Problem(422, "another request was sent with this Idempotency-Key before", argument="Idempotency-Key")
            return self._answered(await self._submit_all(asked, order, turn, content), False)
        finally:
            turn.end()

    async def _turn(self, asked: Asked) -> Turn | None:
        """The turn of a request with an idempotency key."""
        once = self._admission.intake.once
        if not asked.key:
            return None
        assert once is not None
        try:
            return await once.begin(owner_of(asked.origin), asked.key, TURN_SECONDS)
        except Busy as error:
            raise Problem(409, f"{error}; try again", {"Retry-After": "1"}, argument="Idempotency-Key") from None
        except StoreError as error:
            raise Problem(503, f"it cannot be told whether this was sent before: {error}", {"Retry-After": "30"}) from None

    async def _submit_all(self, asked: Asked, order: Order, turn: Turn | None, digest: bytes) -> list[MessageResult]:
        """Submit all messages of a request that were not accepted before; the results of all, in their order."""
        kept = turn.kept if turn is not None else {}
        results: dict[int, MessageResult] = {part: answers.again(one) for part, one in kept.items()}
        under_way: set[asyncio.Task[None]] = set()

        async def one(part: int, letter: Letter) -> None:
            request = _part(turn, part, digest, int(self._admission.config.intake.idempotency_keep * 1000))
            results[part] = await self._submit(asked, order, letter, request)

        ended: Problem | None = None
        try:
            async with aclosing(self._letters.of(order, kept)) as letters:
                async for part, letter in letters:
                    under_way.add(self._admission.loop.create_task(one(part, letter)))
                    if len(under_way) >= TOGETHER:
                        done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                        for task in done:
                            task.result()
        except Problem as error:  # of a batch: in the middle
            ended = error
        finally:
            if under_way:  # before the turn ends
                await asyncio.wait(under_way)
        for task in under_way:
            task.result()
        if ended is not None:
            if not any(one.id for one in results.values()):
                raise ended
            left = MessageResult(status=answers.TRY_AGAIN, reply=f"421 4.3.0 {ended.detail}", recipients=[])
            return [results.get(part, left) for part in range(order.messages)]
        return [results[part] for part in range(len(results))]

    async def _submit(
        self, asked: Asked, order: Order, letter: Letter, request: Callable[[list[str], list[tuple[str, Answer]]], Request | None]
    ) -> MessageResult:
        connection = asked.connection
        if self._admission.intake.draining:
            return MessageResult(status=answers.TRY_AGAIN, reply=ENDING.whole, recipients=[])

        def wanted(taken: list[str], refused: list[tuple[str, Answer]]) -> Wanted:
            return Wanted(order.tags, asked.traceparent, order.priority, order.send_at, request(taken, refused), asked.began)

        submitter: Submitter | None = None
        try:
            submitter = await self._submitter(asked)
            result = await submitter.submit(letter, wanted)
        except ConnectionError as error:
            reply = str(error) if str(error)[:1] == "4" else ENDING.whole
            return MessageResult(status=answers.TRY_AGAIN, reply=reply, recipients=[])
        finally:
            if submitter is not None:
                self._given_back(connection, submitter)
        left = dict(result.refused)
        rows = [answers.recipient(one, left.get(one) or (None if result.ident else result.answer)) for one in letter.recipients]
        if result.ident:
            return MessageResult(status=answers.ACCEPTED, id=result.ident, recipients=rows)
        status = answers.TRY_AGAIN if result.answer.code < 500 else answers.REFUSED
        return MessageResult(status=status, reply=result.answer.whole, recipients=rows)

    def _given_back(self, connection: HttpConnection, submitter: Submitter) -> None:
        """A message was submitted, or that has failed: the session may be used for another one of the same user."""
        connection.at_work.discard(submitter)
        if submitter.usable and connection.transport is not None and len(connection.submitters) < TOGETHER:
            connection.submitters.append(submitter)
        else:
            submitter.end()

    async def _submitter(self, asked: Asked, counts: bool = True) -> Submitter:
        """A session for a message of the request's user. ConnectionError: there is none now."""
        connection = asked.connection
        while counts and connection.submitters:
            found = connection.submitters.pop()
            if found.identity is asked.identity:
                connection.at_work.add(found)
                return found
            found.end()
        made = Submitter(self._admission, connection.listener, asked.client, asked.identity, connection.tls, counts)
        connection.at_work.add(made)
        try:
            address = asked.client.address
            await made.begin(f"[IPv6:{address}]" if ":" in address else f"[{address}]")
        except BaseException:
            connection.at_work.discard(made)
            made.end()
            raise
        return made

    def _answered(self, results: list[MessageResult], repeated: bool) -> web.StreamResponse:
        if not any(one.id for one in results):
            raise answers.not_taken(results)
        found = _json(202, Accepted(id=results[0].id, messages=results))
        if repeated:
            found.headers["Idempotency-Replayed"] = "true"
        return found

    # ?validate=1

    async def _validate(self, asked: Asked, order: Order) -> answers.Check:
        connection, intake = asked.connection, self._admission.intake
        async with aclosing(self._letters.of(order, {})) as letters:  # of a batch, the first
            letter = (await anext(letters))[1]
            try:
                submitter = await self._submitter(asked, False)
            except ConnectionError as error:
                raise Problem(503, str(error), {"Retry-After": "5"}) from None
            try:
                taken, refused, answer = await submitter.envelope(letter)
            finally:
                connection.at_work.discard(submitter)
                submitter.end()
            rows = [answers.RouteOf(**msgspec.structs.asdict(answers.recipient(one, said))) for one, said in refused]
            for one, name in intake.routed(taken, asked.origin):
                rows.append(answers.RouteOf(address=one, status=answers.ACCEPTED, route=name.route, domain=name.domain))
            return answers.Check(
                valid=bool(taken), sender=letter.sender, sender_reply=answer.whole if answer.code >= 400 else "",
                size=letter.size, size_limit=asked.client.limits.message_size,
                dkim=intake.signed_as(_header(letter.pieces), asked.origin), recipients=rows,
            )  # fmt: skip

    # What has become of it

    async def _message(self, asked: Asked, name: str) -> web.StreamResponse:
        try:
            ident = parse_id(name)
        except ValueError:
            ident = 0
        known = await self._known(ident) if ident else None
        if known is None or not _is_theirs(asked, known):
            raise Problem(404, "there is no such message of yours, or it is known no longer (intake.receipts_keep)")
        return _json(200, answers.state_of(ident, known))

    async def _known(self, ident: int) -> Known | None:
        try:
            return await self._admission.loop.run_in_executor(self._admission.threads, self._shards.message, ident)
        except StoreError as error:
            raise Problem(503, str(error), {"Retry-After": "5"}) from None

    async def _receipt(self, asked: Asked, key: str) -> web.StreamResponse:
        once = self._admission.intake.once
        assert once is not None
        try:
            kept: dict[int, Kept] = await once.kept(owner_of(asked.origin), key)
        except StoreError as error:
            raise Problem(503, str(error), {"Retry-After": "5"}) from None
        if not kept:
            raise Problem(404, "nothing was accepted under this key, or it is known no longer (intake.idempotency_keep)")
        messages = []
        for _, one in sorted(kept.items()):
            known = await self._known(one.ident)
            if known is not None:
                messages.append(answers.state_of(one.ident, known))
        return _json(200, ReceiptState(key=key, accepted=answers.shown(min(one.at for one in kept.values())), messages=messages))

    async def _openapi(self, asked: Asked) -> web.StreamResponse:
        from relaymta.accept.http.openapi import description

        return _json(200, description())


_Operation = Callable[..., Awaitable[web.StreamResponse]]
_OPERATIONS: tuple[tuple[re.Pattern[str], dict[str, _Operation]], ...] = (
    (re.compile(r"/v1/messages"), {"POST": Injection._post}),
    (re.compile(r"/v1/messages/([0-9A-Za-z]{1,32})"), {"GET": Injection._message}),
    (re.compile(r"/v1/receipts/([^/]{1,1000})"), {"GET": Injection._receipt}),
    (re.compile(r"/v1/openapi\.json"), {"GET": Injection._openapi}),
)


def _asked(connection: HttpConnection, request: web.BaseRequest) -> Asked:
    keys, traces = request.headers.getall("Idempotency-Key", []), request.headers.getall("traceparent", [])
    if keys and (len(keys) > 1 or not _KEY.match(keys[0])):
        raise Problem(400, "Idempotency-Key is 1 to 255 visible ASCII characters, once", argument="Idempotency-Key")
    rights = connection.rights
    if rights is None or not rights.admitted:
        raise ConnectionResetError
    identity = rights.login.identity if rights.login is not None else None
    found = _TRACEPARENT.match(traces[0]) if len(traces) == 1 else None
    trace = "00" + found[1] if found is not None else ""
    return Asked(connection, request, rights.client, identity, rights.origin, keys[0] if keys else "", trace, connection.began_at)


def _header(pieces: Iterator[bytes]) -> bytes:
    """The beginning of message data, with its whole header, as far as that is read."""
    found = b""
    for piece in pieces:
        found += piece
        if b"\r\n\r\n" in found or len(found) > HEADER_SEEN:
            break
    return found


def _part(
    turn: Turn | None, part: int, digest: bytes, keep: int
) -> Callable[[list[str], list[tuple[str, Answer]]], Request | None]:
    """What the message is of its request, once it is known who gets it."""

    def request(taken: list[str], refused: list[tuple[str, Answer]]) -> Request | None:
        if turn is None:
            return None
        return Request(turn.digest, part, digest, taken, [(address, answer.whole) for address, answer in refused], keep)

    return request


def _content(request: web.BaseRequest, received: Received) -> bytes:
    """What tells a request from another one under the same key: all that it says."""
    found = blake2b(received.digest, digest_size=len(received.digest))
    for name, value in (("", media_type(request)), *sorted(request.query.items())):
        found.update(f"{name}\0{value}\0".encode())
    return found.digest()


def _claim(given: str) -> Claim | None:
    """The credentials of a request; None: they are none."""
    scheme, _, word = given.strip().partition(" ")
    if scheme.lower() == "bearer" and word.strip():
        return Token("", word.strip())
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = b64decode(word.strip(), validate=True).decode().partition(":")
    except ValueError:
        return None
    return Password(user, password) if colon and user and "\0" not in user + password else None


def _who_are_you(detail: str, auth: str) -> Problem:
    if auth == "off":
        return Problem(403, detail)
    return Problem(401, detail, {"WWW-Authenticate": 'Basic realm="relaymta", charset="UTF-8"'})


def _is_theirs(asked: Asked, known: Known) -> bool:
    """Whether a message is one of the client's: of the same user, or, of nobody who has logged in, of the same address and
    application."""
    origin, receipt = asked.origin, known.receipt
    if origin.user or receipt.user:
        return receipt.user == origin.user
    return (receipt.client, receipt.application) == (asked.client.address, origin.application)


def _json(status: int, answer: Any) -> web.Response:
    return web.Response(status=status, body=_encode(answer), content_type="application/json")
