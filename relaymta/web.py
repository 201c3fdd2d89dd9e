"""Requests to the HTTP endpoints that the configuration names (authentication back ends, token endpoints, look-ups). Whatever an
endpoint answers, it takes bounded time and memory, and fails with one exception."""

import contextlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from aiohttp import ClientResponse

__all__ = ["Response", "WebError", "object_in", "request"]

PLAIN = {"Accept-Encoding": "identity"}  # responses are small: no decompression


class WebError(Exception):
    """There is no usable response; str() is the reason. It may quote what the endpoint said."""


class Response(NamedTuple):
    """`reason`: the text behind the status. `cache`: its Cache-Control."""

    status: int
    reason: str
    cache: str
    body: bytes


async def request(method: str, url: str, *, seconds: float, largest: int, errors: bool = False, **options: Any) -> Response:
    """The response; redirects are not followed. WebError when there is none within `seconds`, or the body behind a status of 200
    cannot be read whole or is longer than `largest` octets. The body behind another status is read with `errors` only, as far as
    it comes. `options`: of aiohttp."""
    import aiohttp  # takes 0.1 s: only where it is needed

    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=seconds), headers=PLAIN) as client,
            client.request(method, url, allow_redirects=False, **options) as response,
        ):
            body = b""
            if response.status == 200:
                body = await _body(response, largest)
            elif errors:
                with contextlib.suppress(WebError, aiohttp.ClientError, TimeoutError, OSError, ValueError):
                    body = await _body(response, largest)
            return Response(response.status, response.reason or "", response.headers.get("Cache-Control", ""), body)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:  # ValueError: malformed HTTP or URL
        raise WebError(str(error) or type(error).__name__) from None


async def _body(response: "ClientResponse", largest: int) -> bytes:
    found = bytearray()
    async for piece in response.content.iter_any():
        found += piece
        if len(found) > largest:
            raise WebError(f"the response is longer than {largest} octets")
    return bytes(found)


def object_in(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. WebError when it is none."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise WebError("the response is no JSON object")
    return found


def _no_number(name: str) -> float:
    """NaN and Infinity are not JSON (RFC 8259 6), and no comparison with NaN holds."""
    raise ValueError(name)
