"""One request and its answer on a connection of its own, as spamd and rspamd want it: the filter closes it behind the answer."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Sequence

from relaymta.config import parse_hostport
from relaymta.filter.judgement import FilterFailure

__all__ = ["exchange", "nothing"]

TOGETHER = 65536  # octets in one write


class _Lost(Exception):
    """The answer does not end as it should."""


async def exchange(
    addresses: Sequence[str], request: bytes, pieces: AsyncIterable[bytes], connect_seconds: float, largest: int, ends: bool
) -> bytes:
    """The whole answer, up to the end of the connection, of the first address ("host:port" or "unix:/path") that can be connected
    to. `pieces`: what follows the request, until there is an answer; `ends`: our side of the connection is ended behind that.
    FilterFailure: there is none, or it is longer than `largest` octets; what reading `pieces` raises. Cancelled: it is closed."""
    address, reader, writer = await _connected(addresses, connect_seconds)
    answering = asyncio.ensure_future(_answer(reader, largest))
    try:
        await _send(writer, request, pieces, answering)
        if ends and writer.can_write_eof() and not writer.transport.is_closing():
            writer.write_eof()
        return await answering
    except _Lost as error:
        raise FilterFailure("protocol", f"{address}: {error}") from None
    finally:
        if not answering.cancel() and not answering.cancelled():
            answering.exception()  # nobody else asks for it
        writer.transport.abort()


async def _send(
    writer: asyncio.StreamWriter, request: bytes, pieces: AsyncIterable[bytes], answering: "asyncio.Future[bytes]"
) -> None:
    """What is small goes out in one write."""
    waiting, octets = [request], 0
    async for piece in pieces:
        waiting.append(piece)
        octets += len(piece)
        if octets < TOGETHER:
            continue
        if answering.done():  # it refuses, and need not be shown the rest
            return
        writer.write(b"".join(waiting))
        waiting, octets = [], 0
        try:
            await writer.drain()
        except OSError:  # closed: what it has said before is there to be read
            return
    writer.write(b"".join(waiting))


async def _connected(addresses: Sequence[str], seconds: float) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
    unreached = []
    for address in addresses:
        try:
            async with asyncio.timeout(seconds):
                if address.startswith("unix:"):
                    return address, *(await asyncio.open_unix_connection(address.removeprefix("unix:")))
                return address, *(await asyncio.open_connection(*parse_hostport(address)))
        except TimeoutError:
            unreached.append(f"{address}: no connection within {seconds:g} s")
        except OSError as error:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
            unreached.append(f"{address}: {why}")
    raise FilterFailure("connect", "; ".join(unreached))


async def _answer(reader: asyncio.StreamReader, largest: int) -> bytes:
    found = bytearray()
    try:
        while piece := await reader.read(65536):
            found += piece
            if len(found) > largest:
                raise _Lost(f"its answer is longer than {largest} octets")
    except OSError as error:
        if not found:
            raise _Lost(error.strerror or str(error) or "it closes the connection") from None
    return bytes(found)


async def nothing() -> AsyncIterator[bytes]:
    """No pieces."""
    return
    yield b""
