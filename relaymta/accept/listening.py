"""Listening sockets, and what is read of a socket before its protocol begins (a PROXY header)."""

import asyncio
import fcntl
import ipaddress
import socket
import struct
import termios
from array import array
from collections.abc import Callable

from relaymta.auth.identity import plain_address
from relaymta.errors import SCARCE
from relaymta.proto.proxy import LONGEST, BadHeader, Header, parse

__all__ = ["Listening", "ProxyHeaderReader", "client_address", "in_networks", "readable", "unread"]

BACKLOG = 1024
ACCEPT_TOGETHER = 16  # sockets accepted in one turn of the loop: each may begin a TLS handshake
_INSTANT = struct.pack("ll", 0, 1000)  # a timeval: 1 ms
PROXY_SECONDS = 5.0  # seconds for a load balancer's whole header


class Listening:
    """A bound socket whose connections are accepted or, while it is paused, wait in its backlog. `arrived(socket, peer address)`
    is called for each (of a unix socket the address is ""); `scarce()` when no descriptor is left for the next, which waits in
    the backlog. (A server of uvloop would accept all that wait then, and close them without a word.)

    `resume`, `pause` and `close` may be called at any time and in any order: the last call decides. None of them needs a
    descriptor."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        arrived: Callable[[socket.socket, str], None],
        scarce: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._socket = sock
        # Accepted sockets inherit this: TCP's urgent octet stays in the stream. Otherwise it would be missing in FIONREAD and in
        # the message data.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        # Whether calls block is a property of the socket, which other processes have, too: one of them may change that (as a
        # program that an upgrade starts). Then accept() ends after this time.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _INSTANT)
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._arrived = arrived
        self._scarce = scarce
        self._accepting = self._closed = False

    def resume(self) -> None:
        """Accept connections, unless it is closed."""
        if not self._accepting and not self._closed:
            self._accepting = True
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def pause(self) -> None:
        """Stop accepting; connections wait in the backlog."""
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._socket.fileno())

    def close(self) -> None:
        """Stop accepting and close the socket, for good."""
        self._closed = True
        self.pause()
        self._socket.close()

    def _accept(self) -> None:
        for _ in range(ACCEPT_TOGETHER):
            if not self._accepting:
                return
            try:
                sock, peer = self._socket.accept()
            except BlockingIOError:  # the backlog is empty
                return
            except OSError as error:
                if error.errno in SCARCE:  # the socket would stay readable: stop polling it
                    self._scarce()
                    return
                continue  # this client has disconnected
            sock.setblocking(False)
            self._arrived(sock, peer[0] if isinstance(peer, tuple) else "")


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
