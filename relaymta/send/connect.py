"""From an address to a session: aiosmtplib connects, sends EHLO, starts TLS and authenticates; then a Session takes over its
transport."""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import aiosmtplib
from aiosmtplib.errors import SMTPHeloError

from relaymta.config import Route, Source
from relaymta.errors import NETWORK, PEER, US, Failure, redacted
from relaymta.proto.sequence import HELO_AFTER
from relaymta.proto.smtp_client import ClientSession, Said, features_of
from relaymta.route.mx import NoRoute
from relaymta.route.ourselves import Ourselves
from relaymta.send.greeting import LenientSMTP
from relaymta.send.login import log_in
from relaymta.send.oauth import Tokens
from relaymta.send.session import Session

__all__ = ["ConnectFailed", "Peer", "Via", "connect", "implicit_tls"]

SESSIONS_KEPT = 10_000  # hosts
IMPLICIT_TLS_PORT = 465  # RFC 8314 3.3
_FAULTS = {"connect": NETWORK, "auth": US}  # of a failure without a reply, by phase; else the peer's


class ConnectFailed(Failure):
    """No usable session. `phase`: the one that failed (connect, ehlo, starttls, auth); `said`: the peer's reply in it, if any. A
    reply may be quoted in DSNs, but for one to AUTH, which is for the log and operators only."""

    def __init__(self, phase: str, public: str, cause: str = "", said: Said | None = None, fault: str = "") -> None:
        """`fault`: where it does not follow from the phase."""
        answered = said is not None and phase != "auth"  # a rejected login is for whoever set it
        super().__init__(public, cause, fault or (PEER if answered else _FAULTS.get(phase, PEER)))
        self.phase = phase
        self.said = said

    def __str__(self) -> str:
        return self.cause or (self.said.whole if self.said is not None else self.public)


@dataclass(frozen=True, slots=True)
class Peer:
    """What to connect to: an address and port, or (`path`) a unix socket. `name`: the peer's in TLS and the log."""

    name: str
    address: str
    port: int
    path: str = ""

    @property
    def place(self) -> str:
        """What is connected to, also where hosts with several names are one, and one has several addresses."""
        return f"unix:{self.path}" if self.path else f"{self.address}:{self.port}"

    @property
    def label(self) -> str:
        """Its name in messages for people."""
        return f"unix:{self.path}" if self.path else f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Via:
    """How to connect: the route (protocol and credentials), our name for EHLO, seconds for the TCP connection (with implicit TLS)
    and for each reply after it, TLS (off | may | encrypt | verify), ourselves (not to be connected to), and the source
    address."""

    route: Route
    hostname: str
    connect_timeout: float
    reply_timeout: float
    tls: str
    ourselves: Ourselves
    source: Source | None = None


def implicit_tls(peer: Peer, tls: str) -> ssl.SSLContext | None:
    """The context for a peer with implicit TLS; None for others."""
    return _context(tls) if peer.port == IMPLICIT_TLS_PORT and tls != "off" else None


class _Client(LenientSMTP):
    """aiosmtplib with LMTP (RFC 2033 4.1: LHLO instead of EHLO and HELO). `opened(transport)` is called when TCP (and implicit
    TLS) is there, before the greeting."""

    greeting = b"EHLO"
    opened: Callable[[asyncio.BaseTransport], None] | None = None
    _opened_transport: asyncio.BaseTransport | None = None

    @property
    def transport(self) -> asyncio.BaseTransport | None:  # aiosmtplib sets it as soon as it is connected
        return self._opened_transport

    @transport.setter
    def transport(self, transport: asyncio.BaseTransport | None) -> None:
        self._opened_transport = transport
        if transport is not None and self.opened is not None:
            opened, self.opened = self.opened, None
            opened(transport)

    async def ehlo(self, *args: object, **options: object) -> aiosmtplib.SMTPResponse:
        assert self.local_hostname is not None
        response = await self.execute_command(self.greeting, self.local_hostname.encode("ascii"))
        if response.code != 250:
            raise SMTPHeloError(response.code, response.message)
        self.last_ehlo_response = response
        return response

    async def helo(self, *args: object, **options: object) -> aiosmtplib.SMTPResponse:
        if self.greeting == b"LHLO":
            raise SMTPHeloError(500, "the peer does not speak LMTP")
        return await super().helo()


async def connect(
    peer: Peer, via: Via, tokens: Tokens, make: Callable[[ClientSession, str], Session], recipients: int
) -> Session:
    """A session past EHLO, STARTTLS and AUTH. ConnectFailed when one of them fails; NoRoute when the peer is this host.
    `make(core, peer)` makes the session; `recipients`: at most in one transaction."""
    client = _client(peer, via)
    phase = "connect"
    try:
        await _open(client, peer, via)
        phase = "ehlo"
        await _greet(client)
        if not client.use_tls and via.tls != "off" and (via.tls != "may" or client.supports_extension("starttls")):
            phase = "starttls"
            await _start_tls(client, peer.name, via.tls)
        if via.route.username and via.tls == "verify":
            phase = "auth"
            await log_in(client, via.route, tokens)
            _check_unsolicited(client, phase)
        return _handed_over(client, peer, via, make, recipients)
    except BaseException as error:
        client.close()
        if isinstance(error, Exception) and not isinstance(error, NoRoute):
            raise _failure(phase, peer, error) from None
        raise


async def _open(client: _Client, peer: Peer, via: Via) -> None:
    """Connect and wait for the greeting, each within its own time."""
    what = "connecting"
    try:
        async with asyncio.timeout(via.connect_timeout) as limit:

            def opened(transport: asyncio.BaseTransport) -> None:
                nonlocal what
                what = "waiting for the greeting"
                limit.reschedule(asyncio.get_running_loop().time() + via.reply_timeout)
                address = transport.get_extra_info("peername")
                if not peer.path and address is not None and via.ourselves.at(address[0], address[1]):
                    raise NoRoute(True, "5.4.6", f"{peer.name} is this host: mail to it would loop", fault=US)

            client.opened = opened
            await client.connect(timeout=None)
    except TimeoutError as error:
        raise TimeoutError(f"timed out {what}") from error
    client.timeout = via.reply_timeout


async def _greet(client: _Client) -> None:
    """EHLO, or LHLO; HELO only for a peer that does not implement EHLO (RFC 5321 4.1.4). Any other rejection is temporary:
    without extensions (8BITMIME) mail would be bounced."""
    _check_unsolicited(client, "connect")
    try:
        await client.ehlo()
    except SMTPHeloError as error:
        if error.code not in HELO_AFTER or not client.is_connected:
            raise
        _check_unsolicited(client, "ehlo")
        await client.helo()
    _check_unsolicited(client, "ehlo")


def _check_unsolicited(client: _Client, phase: str) -> None:
    """ConnectFailed where the peer sent more than one reply: the rest would be read as the reply to the next command."""
    if client.protocol is not None and client.protocol._buffer:
        raise ConnectFailed(phase, "the peer sent an unexpected reply")


def _client(peer: Peer, via: Via) -> _Client:
    source = (via.source.address, 0) if via.source is not None else None
    name = via.source.hostname if via.source is not None and via.source.hostname else via.hostname
    if peer.path:
        client = _Client(socket_path=peer.path, timeout=via.reply_timeout, local_hostname=name, use_tls=False, start_tls=False)
    else:
        implicit = implicit_tls(peer, via.tls)
        client = _Client(
            hostname=peer.address, port=peer.port, timeout=via.reply_timeout, local_hostname=name, source_address=source,
            use_tls=implicit is not None, start_tls=False, tls_context=implicit,
        )  # fmt: skip
    if via.route.protocol == "lmtp":
        client.greeting = b"LHLO"
    return client


def _handed_over(
    client: _Client, peer: Peer, via: Via, make: Callable[[ClientSession, str], Session], recipients: int
) -> Session:
    """A session of the pipelined client on aiosmtplib's transport."""
    transport, protocol = cast("asyncio.Transport | None", client.transport), client.protocol
    if transport is None or protocol is None or transport.is_closing():
        raise ConnectFailed("ehlo", "the peer closed the connection")
    if protocol._buffer or transport.get_write_buffer_size():
        client.close()
        raise ConnectFailed("ehlo", "the peer sent an unexpected reply")
    features = features_of(client.esmtp_extensions)
    lmtp = via.route.protocol == "lmtp"
    connection = transport.get_extra_info("ssl_object")
    if connection is not None and isinstance(connection.context, _Resuming):
        connection.context.remember(connection)
    features.chunking = features.chunking and via.route.chunking and not lmtp
    session = make(ClientSession(features, recipients, lmtp), peer.name)
    client.protocol = None
    client.transport = None
    session.attach(transport)
    return session


class _Resuming(ssl.SSLContext):
    """A client context that resumes the last TLS session of a host, which saves most of the handshake on both sides. (uvloop does
    not: it calls `wrap_bio` without a session.) The certificate is verified in the full handshake only."""

    sessions: dict[str, ssl.SSLSession]

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False,
        server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:  # fmt: skip
        known = self.sessions.get(str(server_hostname))
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session or known)

    def remember(self, connection: ssl.SSLObject) -> None:
        """Keep a connection's session; called after its first data, since TLS 1.3 sends sessions after the handshake."""
        if connection.session is not None and connection.server_hostname:
            if len(self.sessions) >= SESSIONS_KEPT:
                self.sessions.clear()
            self.sessions[connection.server_hostname] = connection.session


@cache
def _context(tls: str) -> _Resuming:
    context = _Resuming(ssl.PROTOCOL_TLS_CLIENT)
    context.sessions = {}
    context.load_default_certs()
    if tls != "verify":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _start_tls(client: _Client, name: str, tls: str) -> None:
    if not client.supports_extension("starttls"):
        raise ConnectFailed("starttls", "the peer does not offer STARTTLS, and the route requires TLS")
    await client.starttls(server_hostname=name, tls_context=_context(tls), validate_certs=tls == "verify")
    await _greet(client)


def _failure(phase: str, peer: Peer, error: Exception) -> ConnectFailed:
    if isinstance(error, ConnectFailed):
        return error
    name = "a local socket" if peer.path else peer.name
    if isinstance(error, aiosmtplib.SMTPResponseException) and 200 <= error.code < 600:
        said = Said(error.code, str(error.message).encode("utf-8", "replace"), phase)
        if phase == "auth":
            said.text = redacted(said.text)  # it may quote the credentials
            return ConnectFailed(phase, f"{name}: logging in failed", f"{peer.name}: {said.whole}", said)
        return ConnectFailed(phase, said.text, said=said)
    cause = f"{peer.name}: {str(error) or type(error).__name__}"
    public = error.public if isinstance(error, Failure) else _public_reason(error)
    return ConnectFailed(phase, f"{name}: {public}", cause)


def _public_reason(error: BaseException | None) -> str:
    """The cause of an error as a standard text, without addresses, paths and source lines."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return "its certificate could not be verified"
        if isinstance(error, ssl.SSLError):
            return "TLS failed"
        if isinstance(error, TimeoutError):
            return "timed out"
        if isinstance(error, socket.gaierror):
            return "its name could not be looked up"
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        if isinstance(error, aiosmtplib.SMTPResponseException):
            return "it sent an invalid reply"
        cause = error.__cause__ or error.__context__
        if cause is None and isinstance(error, aiosmtplib.SMTPServerDisconnected):
            return "the connection was closed"
        error = cause
    return "no usable connection"
