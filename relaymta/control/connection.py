"""Connections on which requests are answered in order: that of the command line to the supervisor, both ends, and the end of a
program that only answers."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

from relaymta.control.frames import ROWS_TOGETHER, UNSET, Broken, Frame, Frames, Refused, in_pieces, pack, refusal
from relaymta.control.requests import REQUESTS
from relaymta.errors import RelayError

__all__ = ["READER_SECONDS", "Answer", "Asked", "ask", "begin", "converse", "serve"]

READER_SECONDS = 600.0  # for an asker to take the next piece, such as a pager that waits for its user
_OCTETS = 1 << 18  # of one read


class Answer(NamedTuple):
    """The answer to a request of the command line. `missing`: the workers whose part of it is not there; it is complete when the
    last piece of a `value` in pieces (an asynchronous generator) is."""

    value: Any
    missing: list[int]


class Asked:
    """A request that was sent to the daemon. Call it, or read its `pieces`, once. `missing`: as in `Answer`, when that has
    ended."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._value: Any = None
        self.missing: list[int] = []

    def __call__(self) -> Any:
        """The answer; a list that comes in pieces is put together. Blocks; OSError when the daemon goes away or is late, Refused
        with its sentence."""
        rows: list[Any] = []
        for piece in self.pieces():
            rows.extend(piece)
        return rows or self._value

    def pieces(self) -> Iterator[Any]:
        """The pieces of an answer that comes in pieces, as they arrive. Errors as of a call."""
        with self._socket as sock:
            frames = Frames()
            while data := sock.recv(_OCTETS):
                for frame in frames.feed(data):
                    if isinstance(frame, Broken):
                        raise Refused(frame.why)
                    if frame.error is not None:
                        raise Refused(frame.error, frame.absent)
                    if frame.piece is UNSET:
                        self._value, self.missing = frame.ok, frame.missing
                        return
                    yield frame.piece
        raise ConnectionError("the daemon closed the connection")


def begin(path: Path, op: str, /, **args: Any) -> Asked:
    """Send a request to the daemon's control socket. Blocks; OSError when there is no daemon, RelayError when the request cannot
    be sent."""
    row = REQUESTS.get(op)
    data = pack(Frame(1, op, args))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(60 if row is None else row.patience)
        sock.connect(str(path))
        sock.sendall(data)
    except BaseException:
        sock.close()
        raise
    return Asked(sock)


def ask(path: Path, op: str, /, **args: Any) -> Any:
    """The daemon's answer to a request. Errors as of `begin` and of a call of `Asked`."""
    return begin(path, op, **args)()


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Callable[[str, dict[str, Any]], Awaitable[Answer]],
    failed: Callable[[str, Exception], None],
) -> None:
    """The daemon's end of a connection: answer its requests in order until the other end closes. An exception of a handler is an
    answer, too; `failed(op, error)` is called for one that is a bug."""
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
    answer: Callable[[str, dict[str, Any]], Awaitable[Answer]],
    failed: Callable[[str, Exception], None],
) -> None:
    try:
        found = await answer(op, frame.args)
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
