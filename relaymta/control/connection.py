"""Connections on which requests are answered in order: the supervisor's end of the command line's, and that of a program that
only answers."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

from relaymta.control.frames import ROWS_TOGETHER, Broken, Frame, Frames, in_pieces, pack, refusal
from relaymta.errors import RelayError

__all__ = ["READER_SECONDS", "Answer", "converse", "serve"]

READER_SECONDS = 600.0  # for an asker to take the next piece, such as a pager that waits for its user
_OCTETS = 1 << 18  # of one read


class Answer(NamedTuple):
    """The answer to a request of the command line. `missing`: the workers whose part of it is not there; it is complete when the
    last piece of a `value` in pieces (an asynchronous generator) is."""

    value: Any
    missing: list[int]


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Callable[[str, dict[str, Any], list[str]], Awaitable[Answer]],
    failed: Callable[[str, Exception], None],
) -> None:
    """The daemon's end of a connection: answer its requests in order until the other end closes. `answer` gets the request, its
    arguments and on whose behalf it is made ([]: nobody else's). An exception of a handler is an answer, too; `failed(op,
    error)` is called for one that is a bug."""
    frames = Frames()
    try:
        while data := await reader.read(_OCTETS):
            for frame in frames.feed(data):
                if isinstance(frame, Broken):
                    await _write(writer, Frame(frame.ident, error=frame.why))
                elif frame.op is None:
                    await _write(writer, Frame(frame.id, error="this is not a request: it has no `op`"))
                else:
                    await _respond(writer, frame, frame.op, answer, failed)
    except ConnectionError:
        pass  # the other end has gone, or takes nothing
    finally:
        writer.close()


async def _respond(
    writer: asyncio.StreamWriter,
    frame: Frame,
    op: str,
    answer: Callable[[str, dict[str, Any], list[str]], Awaitable[Answer]],
    failed: Callable[[str, Exception], None],
) -> None:
    try:
        found = await answer(op, frame.args, frame.by)
        value = found.value
        if isinstance(value, AsyncGenerator):
            async with aclosing(value):
                async for piece in value:
                    await _write(writer, Frame(frame.id, piece=piece))
            value = None
        elif isinstance(value, list) and len(value) > ROWS_TOGETHER:
            for piece in in_pieces(value):
                await _write(writer, Frame(frame.id, piece=piece))
            value = None
        await _write(writer, Frame(frame.id, ok=value, missing=sorted(found.missing)))
    except Exception as error:
        if not isinstance(error, (RelayError, ConnectionError)):
            failed(op, error)
        await _write(writer, refusal(frame.id, error))


async def _write(writer: asyncio.StreamWriter, frame: Frame) -> None:
    if writer.is_closing():  # uvloop raises RuntimeError for a write
        raise ConnectionResetError("the other end has gone")
    writer.write(pack(frame))
    try:
        async with asyncio.timeout(READER_SECONDS):
            await writer.drain()
    except TimeoutError:
        writer.transport.abort()
        raise ConnectionAbortedError("nobody takes the answer") from None


def serve(sock: socket.socket, handle: Callable[[str, dict[str, Any]], Any]) -> None:
    """Answer requests one after the other until the other end closes. Blocks."""
    frames = Frames()
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(_OCTETS):
            for frame in frames.feed(data):
                if isinstance(frame, Broken):
                    sock.sendall(pack(Frame(frame.ident, error=frame.why)))
                elif frame.op is not None:
                    sock.sendall(_served(frame, frame.op, handle))


def _served(frame: Frame, op: str, handle: Callable[[str, dict[str, Any]], Any]) -> bytes:
    try:
        return pack(Frame(frame.id, ok=handle(op, frame.args)))
    except Exception as error:
        return pack(refusal(frame.id, error))
