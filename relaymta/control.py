"""How our processes are started, and the protocol between them: length-prefixed msgpack over unix sockets, with descriptors
passed along where needed (SCM_RIGHTS).

A request is `{"id", "op", "args"}`, its answer `{"id", "ok"}` or `{"id", "error"}`. A notification is a request without an id; it
gets no answer.
"""

import asyncio
import contextlib
import os
import site
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["Channel", "Refused", "ask", "begin", "program", "serve"]

_LENGTH = struct.Struct(">I")
LIMIT = 64 << 20
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def program(module: str, *arguments: str) -> list[str]:
    """The command that runs `main()` of a module of ours in a process of its own, isolated (python -I): neither the current
    folder nor a PYTHON* variable decides what is imported. The search path is the interpreter's own folders, then those from
    which this process has imported."""
    own = {os.path.dirname(sys.executable), *site.getsitepackages()}
    library, package = os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = [path for path in dict.fromkeys((*sys.path, package)) if os.path.isabs(path) and path not in own]
    paths = [path for path in found if not path.startswith(library) and not path.endswith(".zip")]
    boot = f"import sys; sys.path += {paths!r}; from {module} import main; main()"
    return [sys.executable, "-I", "-c", boot, *arguments]


class Refused(Exception):
    """The other side answered with an error; str() is its text."""


def pack(message: dict[str, Any]) -> bytes:
    """A message as octets, with its length in front."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Channel:
    """One end of a socket between processes, on the event loop. `handle(op, args, descriptors)` answers the other end's requests;
    `closed()` is called once when the channel closes."""

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[str, dict[str, Any], list[int]], Awaitable[Any]],
        closed: Callable[[], None],
    ) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._handle = handle
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._descriptors: list[int] = []
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._out: list[tuple[bytes, list[int]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.open = True
        self._loop.add_reader(sock.fileno(), self._readable)

    async def ask(self, op: str, descriptors: list[int] | None = None, /, **args: Any) -> Any:
        """Send a request and wait for its answer. Refused when it is an error, ConnectionError when the channel closes first."""
        if not self.open:
            raise ConnectionError("the process is gone")
        self._next += 1
        ident = self._next
        future = self._waiting[ident] = self._loop.create_future()
        try:
            self._send({"id": ident, "op": op, "args": args}, descriptors or [])
            return await future
        finally:
            self._waiting.pop(ident, None)  # the caller may have been cancelled

    def notify(self, op: str, /, **args: Any) -> None:
        """Send a notification; there is no answer."""
        if self.open:
            self._send({"op": op, "args": args}, [])

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        self._out.append((pack(message), descriptors))
        if len(self._out) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._out:
            data, descriptors = self._out[0]
            try:
                done = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
                return
            except OSError:
                self.close()
                return
            if done < len(data):
                self._out[0] = (data[done:], [])
            else:
                self._out.pop(0)
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 18, 64)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        if not data:
            self.close()
            return
        self._buffer += data
        while len(self._buffer) >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LIMIT:
                self.close()
                return
            if len(self._buffer) < 4 + length:
                return
            message = _decode(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "op" in message:
            descriptors, self._descriptors = self._descriptors, []
            task = self._loop.create_task(self._answer(message, descriptors))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        future = self._waiting.pop(message["id"], None)
        if future is not None and not future.done():
            if "error" in message:
                future.set_exception(Refused(message["error"]))
            else:
                future.set_result(message.get("ok"))

    async def _answer(self, message: dict[str, Any], descriptors: list[int]) -> None:
        ident = message.get("id")
        try:
            result = await self._handle(message["op"], message.get("args") or {}, descriptors)
            answer = {"id": ident, "ok": result}
        except Exception as error:
            answer = {"id": ident, "error": str(error) or type(error).__name__}
        if ident is not None and self.open:
            self._send(answer, [])

    def close(self) -> None:
        """Close the channel. Callers that wait for an answer get ConnectionError."""
        if not self.open:
            return
        self.open = False
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("the process is gone"))
        self._waiting.clear()
        self._closed()


def ask(path: Path, op: str, /, **args: Any) -> Any:
    """Send one request to the daemon's control socket and return the answer. Blocks; OSError when there is no daemon, Refused."""
    return begin(path, op, **args)()


def begin(path: Path, op: str, /, **args: Any) -> Callable[[], Any]:
    """As `ask`, in two steps: the request is sent now, and the function returned, to be called once, waits for the answer."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(pack({"id": 1, "op": op, "args": args}))
    except BaseException:
        sock.close()
        raise

    def finish() -> Any:
        with sock:
            head = _receive(sock, 4)
            answer = _decode(_receive(sock, _LENGTH.unpack(head)[0]))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer.get("ok")

    return finish


def serve(sock: socket.socket, handle: Callable[[str, dict[str, Any]], Any]) -> None:
    """Answer requests one after the other until the other end closes. Blocks."""
    with contextlib.suppress(ConnectionError):
        while True:
            message = _decode(_receive(sock, _LENGTH.unpack(_receive(sock, 4))[0]))
            try:
                answer = {"ok": handle(message["op"], message["args"])}
            except Exception as error:
                answer = {"error": str(error) or type(error).__name__}
            sock.sendall(pack({"id": message["id"]} | answer))


def _receive(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        piece = sock.recv(count - len(parts))
        if not piece:
            raise ConnectionError("the daemon closed the connection")
        parts += piece
    return bytes(parts)
