"""The limits of connections: how many, and for how long one may take to say what it wants, or to take its answer. (aiohttp has
limits for the parts of a request, and for connections between two requests.)"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["Connections", "Door", "Limited"]

HEAD_SECONDS = 15.0  # for the head of a request, from the connection or its first octet
STUCK_SECONDS = 60.0  # in which a client must take something of its answer
LOOK_SECONDS = 10.0
CLOSE_SECONDS = 0.02  # in which the handling of a request begins, and its answer is written


class Door(socket.socket):
    """A listening socket, in place of `sock`, that gives away at most `most` connections at a time; others are closed as they
    come. So those that are in the handshake of TLS are counted, too, of which nothing else knows. For asyncio's loop."""

    def __init__(self, sock: socket.socket, most: int) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.most = most
        self.out: set[_Counted] = set()

    def accept(self) -> tuple[socket.socket, Any]:
        """As of socket."""
        while True:
            accepted, address = super().accept()  # BlockingIOError ends this
            if len(self.out) < self.most:
                return _Counted(accepted, self.out), address
            accepted.close()


class _Counted(socket.socket):
    """A connection, which is in `out` until it is closed."""

    def __init__(self, sock: socket.socket, out: "set[_Counted]") -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._out = out
        out.add(self)

    def close(self) -> None:
        """As of socket."""
        self._out.discard(self)
        super().close()


class Connections:
    """Those of one socket, at most `most`. `make()`: the protocol of a new one."""

    def __init__(self, make: Callable[[], asyncio.Protocol], most: int) -> None:
        self._make = make
        self.most = most
        self.open: set[Limited] = set()
        self.of: dict[Any, Limited] = {}

    def __call__(self) -> "Limited":
        """The protocol of a new connection."""
        return Limited(self, self._make())

    def look(self) -> None:
        """Close those whose clients take nothing. Every LOOK_SECONDS."""
        for one in list(self.open):
            one.look()


class Limited(asyncio.Protocol):
    """One connection: passes everything on to `inner`."""

    def __init__(self, owner: Connections, inner: asyncio.Protocol) -> None:
        self._owner = owner
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._busy = 0
        self._unsent = 0
        self._ended = False
        self._stuck = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As of Protocol. One too many is closed."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "abort")
        self._transport = transport  # type: ignore[assignment]
        if len(self._owner.open) >= self._owner.most:
            self._transport.abort()  # type: ignore[union-attr]
            return
        self._owner.open.add(self)
        self._owner.of[self._inner] = self
        self._wait()
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """As of Protocol."""
        self._stop()
        if self in self._owner.open:
            self._owner.open.discard(self)
            self._owner.of.pop(self._inner, None)
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As of Protocol."""
        if self not in self._owner.open:
            return
        if not self._busy and self._deadline is None:
            self._wait()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """As of Protocol. A client that says no more may still wait for its answer (but for TLS, where asyncio cannot tell)."""
        if self not in self._owner.open or self._transport is None or self._transport.get_extra_info("sslcontext") is not None:
            return None
        self._inner.eof_received()
        self._ended = True
        self._close_soon()
        return True

    def _close_soon(self) -> None:
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._close)

    def _close(self) -> None:
        if not self._busy and self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        """As of Protocol."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """As of Protocol."""
        self._stuck = 0.0
        self._inner.resume_writing()

    # Deadlines

    def begins(self) -> None:
        """The head of a request has been read."""
        self._busy += 1
        self._stop()

    def ends(self) -> None:
        """It has been answered."""
        self._busy -= 1
        if self._ended:
            self._close_soon()

    def _wait(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._late)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self._busy and self._transport is not None:
            self._transport.abort()

    def look(self) -> None:
        """Close it when nothing of an answer has been taken for long."""
        if self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        self._stuck = self._stuck + LOOK_SECONDS if unsent and unsent >= self._unsent else 0.0
        self._unsent = unsent
        if self._stuck > STUCK_SECONDS:
            self._transport.abort()
