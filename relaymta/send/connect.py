"""From an address to a session: aiosmtplib connects, greets, starts TLS and authenticates; then its transport is handed over."""

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
from relaymta.errors import Failure, redacted
from relaymta.proto.sequence import HELO_AFTER
from relaymta.proto.smtp_client import ClientSession, Said, features_of
from relaymta.send.login import log_in
from relaymta.send.oauth import Tokens
from relaymta.send.session import Session

__all__ = ["ConnectFailed", "Peer", "Via", "connect", "implicit_tls"]

SESSIONS_KEPT = 10_000  # hosts
IMPLICIT_TLS_PORT = 465  # RFC 8314 3.3


class ConnectFailed(Failure):
    """No usable session. `phase` tells how far it came, `said` what the peer said to that. A reply is public, but for one to a
    login, which concerns only who runs the relay."""

    def __init__(self, phase: str, public: str, inside: str = "", said: Said | None = None) -> None:
        super().__init__(public, inside)
        self.phase = phase
        self.said = said

    def __str__(self) -> str:
        return self.inside or (self.said.whole if self.said is not None else self.public)


@dataclass(frozen=True, slots=True)
class Peer:
    """What to connect to: an address and port, or (`path`) a unix socket. `name`: the peer's in TLS and the log."""

    name: str
    address: str
    port: int
    path: str = ""

    @property
    def label(self) -> str:
        """What people know it by."""
        return f"unix:{self.path}" if self.path else f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Via:
    """How to connect: the route's protocol and credentials, our name, the source address, seconds to wait for each step,
    and TLS: off | may | encrypt | verify."""

    route: Route
    hostname: str
    timeout: float
    tls: str
    source: Source | None = None


def implicit_tls(peer: Peer, tls: str) -> ssl.SSLContext | None:
    """The context for a peer that speaks TLS from the first octet; None for others."""
    return _context(tls) if peer.port == IMPLICIT_TLS_PORT and tls in ("encrypt", "verify") else None


class _Client(aiosmtplib.SMTP):
    """aiosmtplib, speaking LMTP where that is wanted (RFC 2033 4.1: LHLO, and no other greeting)."""

    greeting = b"EHLO"

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
    """A session past EHLO, STARTTLS and AUTH. ConnectFailed when it does not come that far."""
    client = _client(peer, via)
    phase = "connect"
    try:
        await client.connect()
        phase = "ehlo"
        await _greet(client)
        if not client.use_tls and via.tls != "off" and (via.tls != "may" or client.supports_extension("starttls")):
            phase = "starttls"
            await _start_tls(client, peer.name, via.tls)
        if via.route.username and via.tls == "verify":
            phase = "auth"
            await log_in(client, via.route, tokens)
            _in_turn(client, phase)
        return _handed_over(client, peer, via, make, recipients)
    except BaseException as error:
        client.close()
        if isinstance(error, Exception):
            raise _failure(phase, peer, error) from None
        raise


async def _greet(client: _Client) -> None:
    """EHLO, or LHLO; HELO only to a peer that does not know EHLO: another refusal is one for now (RFC 5321 4.1.4), and what HELO
    leaves (no 8BITMIME) would have mail returned for good."""
    _in_turn(client, "connect")
    try:
        await client.ehlo()
    except SMTPHeloError as error:
        if error.code not in HELO_AFTER or not client.is_connected:
            raise
        _in_turn(client, "ehlo")
        await client.helo()
    _in_turn(client, "ehlo")


def _in_turn(client: _Client, phase: str) -> None:
    """ConnectFailed where the peer has said more than was asked: it would be taken for the reply to the next command."""
    if client.protocol is not None and client.protocol._buffer:
        raise ConnectFailed(phase, "the peer speaks out of turn")


def _client(peer: Peer, via: Via) -> _Client:
    source = (via.source.address, 0) if via.source is not None else None
    name = via.source.hostname if via.source is not None and via.source.hostname else via.hostname
    if peer.path:
        client = _Client(socket_path=peer.path, timeout=via.timeout, local_hostname=name, use_tls=False, start_tls=False)
    else:
        implicit = implicit_tls(peer, via.tls)
        client = _Client(
            hostname=peer.address, port=peer.port, timeout=via.timeout, local_hostname=name, source_address=source,
            use_tls=implicit is not None, start_tls=False, tls_context=implicit,
        )  # fmt: skip
    if via.route.protocol == "lmtp":
        client.greeting = b"LHLO"
    return client


def _handed_over(
    client: _Client, peer: Peer, via: Via, make: Callable[[ClientSession, str], Session], recipients: int
) -> Session:
    """aiosmtplib's transport, with the pipelined client on it."""
    transport, protocol = cast("asyncio.Transport | None", client.transport), client.protocol
    if transport is None or protocol is None or transport.is_closing():
        raise ConnectFailed("ehlo", "the peer closed the connection")
    if protocol._buffer or transport.get_write_buffer_size():
        client.close()
        raise ConnectFailed("ehlo", "the peer speaks out of turn")
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
    """A client's context that goes on with the session that a host gave it the last time, which saves both the most of a
    handshake. (uvloop never asks for that: it calls `wrap_bio` without a session.) What was verified then is not again."""

    sessions: dict[str, ssl.SSLSession]

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False,
        server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:  # fmt: skip
        known = self.sessions.get(str(server_hostname))
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session or known)

    def remember(self, connection: ssl.SSLObject) -> None:
        """Behind the first data of a connection: with TLS 1.3 a session comes after the handshake."""
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
        raise ConnectFailed("starttls", "the peer offers no STARTTLS, and the route asks for TLS")
    await client.starttls(server_hostname=name, tls_context=_context(tls), validate_certs=tls == "verify")
    await _greet(client)


def _failure(phase: str, peer: Peer, error: Exception) -> ConnectFailed:
    if isinstance(error, ConnectFailed):
        return error
    name = "a local socket" if peer.path else peer.name
    if isinstance(error, aiosmtplib.SMTPResponseException) and 200 <= error.code < 600:
        said = Said(error.code, str(error.message).encode("utf-8", "surrogateescape"), phase)
        if phase == "auth":
            said.text = redacted(said.text)  # it may quote what it was sent
            return ConnectFailed(phase, f"{name}: logging in failed", f"{peer.name}: {said.whole}", said)
        return ConnectFailed(phase, said.text, said=said)
    cause = f"{peer.name}: {str(error) or type(error).__name__}"
    public = error.public if isinstance(error, Failure) else _plainly(error)
    return ConnectFailed(phase, f"{name}: {public}", cause)


def _plainly(error: BaseException | None) -> str:
    """What went wrong in the words of the system, without addresses, paths and places in the source."""
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
            return "what it said is no reply"
        cause = error.__cause__ or error.__context__
        if cause is None and isinstance(error, aiosmtplib.SMTPServerDisconnected):
            return "the connection was closed"
        error = cause
    return "no usable connection"
