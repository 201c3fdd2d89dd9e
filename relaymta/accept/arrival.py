"""A new socket on which a PROXY header, TLS or both come before SMTP."""

import asyncio
import contextlib
import socket
import ssl
from typing import Any

from relaymta.accept.client import TLS_TIMEOUTS, ClientConnection
from relaymta.accept.listening import ProxyHeaderReader, client_address, in_networks, readable, unread
from relaymta.proto import reply

__all__ = ["Arrival"]


class Arrival:
    """What happens on a socket before SMTP. It is counted from `admit` on: as the client's if that is known, else as the load
    balancer's. Then `run` is a task, and `over` is called when that has ended, was cancelled or never ran. `since`: when it was
    accepted (loop time)."""

    def __init__(self, connection: ClientConnection[Any], sock: socket.socket, peer: str) -> None:
        self.connection = connection
        self.since = connection.admission.now()
        self._socket = sock
        self._peer = peer
        self._header: ProxyHeaderReader | None = None  # the reader of a PROXY header that is still incomplete

    def admit(self) -> bool:
        """Count it. False when it is rejected."""
        connection, listener, peer = self.connection, self.connection.listener, self._peer
        intake = connection.admission.intake
        try:
            if not listener.proxy:
                return connection.enter(intake.client(peer)) is None
            if not in_networks(peer, listener.proxy):
                raise ConnectionRefusedError(f"{peer} is no load balancer (listener.proxy)")
            self._header = ProxyHeaderReader(self._socket, peer)
            header = self._header.try_read()
            if header is None:
                return self._entered(connection.enter(intake.client(peer), is_client=False))
        except OSError:
            connection.count_refused()
            return False
        return self._proxied(client_address(header, peer))

    def _proxied(self, address: str) -> bool:
        """The load balancer has named its client ("": unknown): count that instead. Whether it is admitted."""
        self._header = None
        connection, intake = self.connection, self.connection.admission.intake
        connection.release()
        waits = connection.greets and connection.listener.tls != "implicit"
        early = reply.TALKING_EARLY if waits and unread(self._socket) else None
        client = intake.client(address) if address else intake.unknown_client(self._peer)
        return self._entered(connection.enter(client, early))

    def _entered(self, refusal: bytes | None) -> bool:
        """Whether a client is admitted (`refusal` is None); else send it the refusal."""
        if refusal is not None and self.connection.listener.tls != "implicit":  # a client that expects TLS could not read it
            with contextlib.suppress(OSError):
                self._socket.send(self.connection.refusal(refusal))
        return refusal is None

    async def run(self) -> None:
        """Read the PROXY header, do the TLS handshake; then the session begins."""
        connection, sock, loop = self.connection, self._socket, self.connection.admission.loop
        if self._header is not None:
            try:
                address = client_address(await self._header.read(), self._peer)
            except OSError:
                connection.count_refused()
                return
            if not self._proxied(address):
                return
        if connection.listener.tls == "implicit":
            if not unread(sock):  # a silent client costs no more than its socket
                await readable(sock)

            async def accept(context: ssl.SSLContext) -> asyncio.Transport:
                return (await loop.connect_accepted_socket(lambda: connection, sock, ssl=context, **TLS_TIMEOUTS))[0]

            await connection.shake_hands(accept)
        else:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(lambda: connection, sock)

    def over(self) -> None:
        """Release everything, unless a session has begun or the transport is being closed."""
        connection = self.connection
        if connection.session is None and (connection.transport is None or not connection.transport.is_closing()):
            if connection.transport is not None:
                connection.transport.abort()
            connection.release()
            self._socket.close()

    def release(self) -> None:
        """It was evicted: give back its place at once, unless its session has begun."""
        if self.connection.session is None:
            self.connection.release()
