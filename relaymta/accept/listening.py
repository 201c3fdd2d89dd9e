"""Bound sockets: those whose connections the loop accepts, and those where something comes before SMTP."""

import asyncio
import errno
import fcntl
import ipaddress
import socket
import termios
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from relaymta.proto.proxy import LONGEST, BadHeader, Header, parse

if TYPE_CHECKING:
    from relaymta.accept.connection import Connection

__all__ = ["SCARCE", "Announcement", "Guarded", "Listening", "among", "named", "readable", "waiting"]

BACKLOG = 1024
ACCEPT_TOGETHER = 16  # sockets accepted in one turn of the loop, each of which may be the first part of a handshake
PROXY_SECONDS = 5.0  # waited for a load balancer's header
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # there will be descriptors again when others have ended


class Listening:
    """A bound socket, on which connections are taken or, while paused, wait in its backlog.

    `resume`, `pause` and `close` may be called at any time and in any order: what was wanted last holds. `resume` alone makes a
    server, and one at a time, however many wait for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, make: "Callable[[], Connection]") -> None:
        self._loop = loop
        self._socket = sock
        # TCP's urgent octet stays where it was sent, for all that are accepted here: else it would be in nobody's count of what
        # has come, and missing in the text.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._make = make
        self._server: asyncio.Server | None = None
        self._wanted = False
        self._resuming = False
        self._closed = False

    async def resume(self) -> None:
        """Take connections, unless told otherwise meanwhile. OSError: there are no descriptors for that."""
        self._wanted = not self._closed
        if self._resuming:
            return
        self._resuming = True
        try:
            while self._wanted and self._server is None:
                server = await self._serving()
                if self._wanted:
                    self._server = server
                else:  # paused or closed while that was made
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
        """Let connections wait."""
        self._wanted = False
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
    refused, before a handshake is paid for. `arrived(connection, socket, address of the peer)` goes on with each; `scarce()` is
    told when there is no descriptor for the next."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        make: "Callable[[], Connection]",
        arrived: "Callable[[Connection, socket.socket, str], None]",
        scarce: Callable[[], None],
    ) -> None:
        super().__init__(loop, sock, make)
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
            except BlockingIOError:  # nobody waits any more
                return
            except OSError as error:
                if error.errno in SCARCE:  # it would be readable again at once, for nothing
                    self._scarce()
                    return
                continue  # this one has gone again
            sock.setblocking(False)
            self._arrived(self._make(), sock, peer[0])


def among(peer: str, networks: list[str]) -> bool:
    """Whether an address, as the system gives it, is in one of some networks."""
    address = _plain(peer)
    return any(address in ipaddress.ip_network(network) for network in networks)


def named(header: Header, peer: str) -> str:
    """The client of whom the load balancer at `peer` speaks; "" where it cannot be known who that is: nobody is named, no host
    can have the address, or it is a loopback address of the balancer's machine, which is not ours."""
    if not header.address:
        return ""
    address = _plain(header.address)
    nobody = address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255"
    return "" if nobody or (address.is_loopback and not _plain(peer).is_loopback) else str(address)


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Without its scope; an IPv4 address that is written as one of IPv6 (RFC 4291 2.5.5.2) as what it is."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def waiting(sock: socket.socket) -> int:
    """How many octets have come on a socket and were not read; 0 for one that is gone."""
    found = array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, found)
    except OSError:
        return 0
    return found[0]


class Announcement:
    """The PROXY header that a load balancer at `peer` begins a connection with, as it comes in."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._socket = sock
        self._peer = peer
        self._taken = b""

    def look(self) -> Header | None:
        """The header, taken from the socket, and nothing behind it; None while it is not whole. ConnectionError: it is none."""
        try:
            data = self._socket.recv(LONGEST - len(self._taken), socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionRefusedError(f"{self._peer}: it closed the connection")
        try:
            found = parse(self._taken + data)
        except BadHeader as error:
            raise ConnectionRefusedError(f"{self._peer}: {error}") from None
        # While it is not whole all of it is the header's: taken, so that the socket is readable again only when there is more.
        self._taken += self._socket.recv(len(data) if found is None else found.length - len(self._taken))
        return found

    async def whole(self) -> Header:
        """The header, once it is whole. OSError: it is none, or does not come for PROXY_SECONDS."""
        async with asyncio.timeout(PROXY_SECONDS):
            while True:
                await readable(self._socket)
                found = self.look()
                if found is not None:
                    return found


async def readable(sock: socket.socket) -> None:
    """Wait until something has come on a socket, or its end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), _tell, future)
    try:
        await future
    finally:
        loop.remove_reader(sock.fileno())


def _tell(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
