"""Listening sockets: those whose connections the event loop accepts, and those where TLS or a PROXY header comes before SMTP."""

import asyncio
import errno
import fcntl
import ipaddress
import socket
import termios
from array import array
from collections.abc import Callable

from relaymta.auth.identity import plain_address
from relaymta.proto.proxy import LONGEST, BadHeader, Header, parse

__all__ = ["SCARCE", "Guarded", "Listening", "ProxyHeaderReader", "client_address", "in_networks", "readable", "unread"]

BACKLOG = 1024
ACCEPT_TOGETHER = 16  # sockets accepted in one turn of the loop: each may begin a TLS handshake
PROXY_SECONDS = 5.0  # seconds for a load balancer's whole header
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # errors that end when descriptors or memory are free again


class Listening:
    """A bound socket whose connections are accepted or, while it is paused, wait in its backlog.

    `resume`, `pause` and `close` may be called at any time and in any order: the last call decides. Only `resume` creates the
    server; a call while another is under way leaves that to it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        self._loop = loop
        self._socket = sock
        # Accepted sockets inherit this: TCP's urgent octet stays in the stream. Otherwise it would be missing in FIONREAD and in
        # the message data.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._make = make
        self._server: asyncio.Server | None = None
        self._wanted = False
        self._resuming = False
        self._closed = False

    async def resume(self) -> None:
        """Accept connections, unless `pause` or `close` is called meanwhile. OSError: no descriptor is left."""
        self._wanted = not self._closed
        if self._resuming:
            return
        self._resuming = True
        try:
            while self._wanted and self._server is None:
                server = await self._serving()
                if self._wanted:
                    self._server = server
                else:  # paused or closed meanwhile
                    server.close()
        finally:
            self._resuming = False

    async def _serving(self) -> asyncio.Server:
        sock = self._socket.dup()
        try:
            return await self._loop.create_server(self._make, sock=sock, backlog=BACKLOG)
        except BaseException:
            sock.close()
            raise

    def pause(self) -> None:
        """Stop accepting; connections wait in the backlog."""
        self._wanted = False
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """Stop accepting and close the socket, for good."""
        self._closed = True
        self.pause()
        self._socket.close()


class Guarded(Listening):
    """A listening socket on which TLS or a PROXY header comes before SMTP. Sockets are accepted here, so that a client is
    identified, and counted or rejected, before the cost of a handshake. `arrived(socket, peer address)` is called for each;
    `scarce()` when no descriptor is left for the next."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        arrived: Callable[[socket.socket, str], None],
        scarce: Callable[[], None],
    ) -> None:
        super().__init__(loop, sock, asyncio.Protocol)
        self._arrived = arrived
        self._scarce = scarce
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
            except BlockingIOError:  # the backlog is empty
                return
            except OSError as error:
                if error.errno in SCARCE:  # the socket would stay readable: stop polling it
                    self._scarce()
                    return
                continue  # this client has disconnected
            sock.setblocking(False)
            self._arrived(sock, peer[0])


def in_networks(peer: str, networks: list[str]) -> bool:
    """Whether an address, as the system gives it, is in one of some networks."""
    address = plain_address(peer)
    return any(address in ipaddress.ip_network(network) for network in networks)


def client_address(header: Header, peer: str) -> str:
    """The client address in a PROXY header from the load balancer at `peer`; "" where it is unknown: none is given (LOCAL,
    UNKNOWN), no host can have it, or it is a loopback address of the load balancer's machine, not of ours."""
    if not header.address:
        return ""
    address = plain_address(header.address)
    invalid = address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255"
    return "" if invalid or (address.is_loopback and not plain_address(peer).is_loopback) else str(address)


def unread(sock: socket.socket) -> int:
    """The number of received octets of a socket that were not read yet; 0 for one that was reset."""
    found = array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, found)
    except OSError:
        return 0
    return found[0]


class ProxyHeaderReader:
    """Reads the PROXY header with which the load balancer at `peer` begins a connection."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._socket = sock
        self._peer = peer
        self._received = b""

    def try_read(self) -> Header | None:
        """The header, consumed from the socket without anything after it; None while it is incomplete. ConnectionError:
        malformed, or the connection was closed."""
        try:
            data = self._socket.recv(LONGEST - len(self._received), socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionRefusedError(f"{self._peer}: it closed the connection")
        try:
            found = parse(self._received + data)
        except BadHeader as error:
            raise ConnectionRefusedError(f"{self._peer}: {error}") from None
        # A partial header is consumed, so that the socket becomes readable again only when more arrives.
        self._received += self._socket.recv(len(data) if found is None else found.length - len(self._received))
        return found

    async def read(self) -> Header:
        """The header, once it is complete. OSError: it is malformed, or incomplete after PROXY_SECONDS."""
        async with asyncio.timeout(PROXY_SECONDS):
            while True:
                await readable(self._socket)
                found = self.try_read()
                if found is not None:
                    return found


async def readable(sock: socket.socket) -> None:
    """Wait until a socket has data or has reached its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), _resolve, future)
    try:
        await future
    finally:
        loop.remove_reader(sock.fileno())


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
