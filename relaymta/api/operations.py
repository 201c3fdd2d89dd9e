"""The operations of the API, as aiohttp calls them: who asks, what for, and the answer as JSON."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import cache, partial
from typing import Any, get_args, get_origin

import msgspec
from aiohttp import web

from relaymta.api.access import Access, Caller
from relaymta.api.asking import Asker
from relaymta.api.openapi import description
from relaymta.api.routes import PREFIX, ROUTES, Route
from relaymta.problems import Problem, of_arguments
from relaymta.proto.printable import printable_json

__all__ = ["BODY_MOST", "Operations", "as_json", "problem", "read_body"]

BODY_MOST = 1 << 20  # octets
BODY_SECONDS = 30.0
WRITE_SECONDS = 60.0  # for a client to take the next part of an answer
SECURE = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "relaymta",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def as_json(value: Any, status: int = 200, kind: str = "application/json", headers: dict[str, str] | None = None) -> web.Response:
    """An answer. Characters that are not printable are escaped."""
    body = printable_json(msgspec.json.encode(value) + b"\n")
    return web.Response(body=body, status=status, headers={"Content-Type": kind, **SECURE, **(headers or {})})


def problem(error: Problem) -> web.Response:
    """An answer that is an error."""
    return as_json(error.details, error.status, "application/problem+json", error.headers)


async def read_body(request: web.Request) -> bytes:
    """The body of a request. Problem when it is too large (413), late (408), or compressed (415)."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "a compressed body is not read (Content-Encoding)")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise Problem(408, "the body is late") from None
    except web.HTTPRequestEntityTooLarge:
        raise Problem(413, f"the body has more than {BODY_MOST} octets") from None
    except (web.RequestPayloadError, ValueError) as error:
        raise Problem(400, f"the body cannot be read: {error}") from None


@cache
def _lists(kind: type) -> frozenset[str]:
    """The fields of a model that are lists, by their names in requests."""
    return frozenset(
        one.encode_name
        for one in msgspec.structs.fields(kind)
        if list in (get_origin(one.type), get_origin(next(iter(get_args(one.type)), None)))
    )


class Operations:
    """The operations. `local`: their requests come by the unix socket."""

    def __init__(self, access: Access, ask: Asker, local: bool) -> None:
        self._access = access
        self._ask = ask
        self._local = local

    def routes(self) -> list[web.RouteDef]:
        """What aiohttp's router takes."""
        found = [web.route(row.method, PREFIX + row.path, self._answers(partial(self._operate, row))) for row in ROUTES.values()]
        return [*found, web.get(f"{PREFIX}/openapi.json", self._answers(self._describe))]

    def _answers(self, operate: Handler) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                return await operate(request)
            except Problem as error:
                return problem(error)

        return handler

    async def _describe(self, request: web.Request) -> web.StreamResponse:
        return as_json(description())

    async def _operate(self, route: Route, request: web.Request) -> web.StreamResponse:
        caller = await self._access.caller(request, self._local)
        self._access.require(request, caller, route.scope)
        arguments = await self._arguments(route, request)
        if route.octets:
            return await self._pour(request, caller, lambda peer: route.run(peer, arguments), "application/octet-stream")
        if route.lines is not None and "application/x-ndjson" in request.headers.get("Accept", ""):
            lines = route.lines
            return await self._pour(request, caller, lambda peer: lines(peer, arguments), "application/x-ndjson")
        value, missing = await self._ask((caller.who, caller.where), lambda peer: route.within(caller.scopes)(peer, arguments))
        return as_json(_joined(value) | {"missing": missing})

    async def _arguments(self, route: Route, request: web.Request) -> Any:
        given: dict[str, Any] = dict(request.match_info)
        if not route.changes:
            lists = _lists(route.arguments)
            for name in request.query:
                if name in request.match_info:
                    raise Problem(400, f"{name} is given in the path", argument=name)
                values = request.query.getall(name)
                if name not in lists and len(values) > 1:
                    raise Problem(400, f"{name} is given {len(values)} times", argument=name)
                given[name] = values if name in lists else values[0]
            return _converted(given, route.arguments, strict=False)
        if request.query:
            raise Problem(400, "arguments are given in the body", argument=next(iter(request.query)))
        if request.content_type != "application/json":
            raise Problem(415, "the body has to be JSON (Content-Type: application/json)")
        try:
            body = msgspec.json.decode(await read_body(request) or b"{}")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem(400, f"the body is no JSON: {error}") from None
        return _converted(body, route.arguments)

    async def _pour(self, request: web.Request, caller: Caller, verb: Callable[[Any], Any], kind: str) -> web.StreamResponse:
        """An answer in parts. What goes wrong before the first is a Problem; later, the connection is cut, so that nobody takes a
        part for the whole."""
        async with contextlib.aclosing(self._ask.stream((caller.who, caller.where), verb)) as pieces:
            first = await anext(pieces, b"")
            answer = web.StreamResponse(headers={"Content-Type": kind, "Content-Disposition": "attachment", **SECURE})
            await answer.prepare(request)
            if request.method == "HEAD":  # what aiohttp would write is the beginning of the next answer for the client
                return answer
            try:
                await _write(answer, first, kind)
                await self._rest(answer, pieces, kind)
            except (Problem, TimeoutError):
                if request.transport is not None:
                    request.transport.abort()
                raise asyncio.CancelledError from None
        await answer.write_eof()
        return answer

    async def _rest(self, answer: web.StreamResponse, pieces: AsyncGenerator[bytes, None], kind: str) -> None:
        async for piece in pieces:
            await _write(answer, piece, kind)


async def _write(answer: web.StreamResponse, piece: bytes, kind: str) -> None:
    if piece:
        async with asyncio.timeout(WRITE_SECONDS):
            await answer.write(printable_json(piece) if kind == "application/x-ndjson" else piece)


def _converted(given: Any, kind: type, strict: bool = True) -> Any:
    try:
        return msgspec.convert(given, kind, strict=strict)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        raise of_arguments(error) from None


def _joined(value: dict[str, Any]) -> dict[str, Any]:
    """Messages come as lines of JSON, which need not be read."""
    if value.get("messages") and isinstance(value["messages"][0], bytes):
        return value | {"messages": [msgspec.Raw(line) for line in value["messages"]]}
    return value
