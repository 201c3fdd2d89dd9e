"""Bound sockets: those whose connections the loop accepts, and those where something comes before SMTP."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from relaymta.proto.proxy import LONGEST, BadHeader, Header, parse

if TYPE_CHECKING:
    from relaymta.accept.connection import Connection

__all__ = ["Guarded", "Listening", "proxied"]

BACKLOG = 1024
ACCEPT_TOGETHER = 64  # sockets accepted in one turn of the loop
PROXY_SECONDS = 5.0  # waited for a load balancer's header
PROXY_AGAIN = 0.01


class Listening:
    """A bound socket, on which connections are taken or, while paused, wait in its backlog."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, make: "Callable[[], Connection]") -> None:
        self._loop = loop
        self._socket = sock
        self._make = make
        self._server: asyncio.Server | None = None
        self._closed = False

    async def resume(self) -> None:
        """Take connections."""
        if self._server is None and not self._closed:
            self._server = await self._loop.create_server(self._make, sock=self._socket.dup(), backlog=BACKLOG)

    def pause(self) -> None:
        """Let connections wait."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """Give the socket up."""
        self._closed = True
        self.pause()
        self._socket.close()


class Guarded(Listening):
    """One on which TLS or a PROXY header comes first. Sockets are accepted here, so that a client is known, and counted or
    refused, before a handshake is paid for. `enter(connection, socket, address of the peer)` goes on with each."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        make: "Callable[[], Connection]",
        enter: "Callable[[Connection, socket.socket, str], None]",
    ) -> None:
        super().__init__(loop, sock, make)
        self._enter = enter
        self._listening: socket.socket | None = None

    async def resume(self) -> None:
        if self._listening is None and not self._closed:
            self._listening = self._socket.dup()
            self._listening.setblocking(False)
            self._listening.listen(BACKLOG)
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def pause(self) -> None:
        if self._listening is not None:
            self._loop.remove_reader(self._listening.fileno())
            self._listening.close()
            self._listening = None

    def _accept(self) -> None:
        for _ in range(ACCEPT_TOGETHER):
            if self._listening is None:
                return
            try:
                sock, peer = self._listening.accept()
            except OSError:  # nobody waits any more, or has gone again
                return
            sock.setblocking(False)
            self._enter(self._make(), sock, peer[0])


async def proxied(sock: socket.socket, peer: str, balancers: list[str]) -> str:
    """The client for whom a load balancer at `peer` connects. ConnectionError: it is none of `balancers`, or says no header."""
    address = ipaddress.ip_address(peer.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not any(address in ipaddress.ip_network(network) for network in balancers):
        raise ConnectionRefusedError(f"{peer} is no load balancer (listener.proxy)")
    try:
        async with asyncio.timeout(PROXY_SECONDS):
            header = await _header(sock)
    except (BadHeader, TimeoutError) as error:
        raise ConnectionRefusedError(f"{peer}: {error or 'no PROXY header'}") from None
    sock.recv(header.length)
    return header.address or peer


async def _header(sock: socket.socket) -> Header:
    """Look at what comes until it is a whole header, and leave it there."""
    loop = asyncio.get_running_loop()
    while True:
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock.fileno(), lambda future=readable: future.done() or future.set_result(None))  # type: ignore[misc]
        try:
            await readable
        finally:
            loop.remove_reader(sock.fileno())
        data = sock.recv(LONGEST, socket.MSG_PEEK)
        found = parse(data)
        if found is not None:
            return found
        if not data:
            raise BadHeader("it closed the connection")
        await asyncio.sleep(PROXY_AGAIN)  # for the rest: what has come would be readable at once
