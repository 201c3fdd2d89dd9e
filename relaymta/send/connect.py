"""From an address to a session: aiosmtplib connects, sends EHLO, starts TLS and authenticates; then a Session takes over its
transport."""

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import aiosmtplib
from aiosmtplib.errors import SMTPHeloError

from relaymta.config import Route, Source
from relaymta.errors import NETWORK, OUT_OF_DESCRIPTORS, PEER, US, Failure, is_scarce, redacted, without
from relaymta.proto.envelope import category_of
from relaymta.proto.sequence import HELO_AFTER
from relaymta.proto.smtp_client import ClientSession, Said, features_of
from relaymta.route.mx import NoRoute
from relaymta.route.ourselves import Ourselves
from relaymta.send import trust
from relaymta.send.greeting import LenientSMTP
from relaymta.send.login import log_in
from relaymta.send.oauth import Tokens
from relaymta.send.session import Link, Session
from relaymta.send.timing import Stopwatch, Timed, untimed
from relaymta.send.trust import NO_FILES, Context, Files

__all__ = ["ConnectFailed", "Peer", "Via", "connect", "implicit_tls"]

IMPLICIT_TLS_PORT = 465  # RFC 8314 3.3
WITHIN_TLS = "ehlo within TLS"
_FAULTS = {"connect": NETWORK, "auth": US}  # of a failure without a reply, by phase; else the peer's


class ConnectFailed(Failure):
    """No usable session. `phase`: the one that failed (connect, ehlo, starttls, auth); `said`: the peer's reply in it, if any. A
    reply may be quoted in DSNs, but for one to AUTH, which is for the log and operators only. `in_tls`: TLS failed, or the peer
    does not offer it and has to."""

    in_tls = False

    def __init__(
        self,
        phase: str,
        public: str,
        cause: str = "",
        said: Said | None = None,
        fault: str = "",
        category: str = "",
        scarce: bool = False,
    ) -> None:
        """`fault`, `category`: where they do not follow from the phase and the reply. `scarce`: this machine has no descriptor
        left for a connection: that is no failure of the peer."""
        answered = said is not None and phase != "auth"  # a rejected login is for whoever set it
        code, enhanced = (said.code, said.enhanced) if said is not None else (0, "4.4.1")
        category = category or ("local" if fault == US else category_of(phase, code, enhanced, public))
        super().__init__(public, cause, fault or (PEER if answered else _FAULTS.get(phase, PEER)), category)
        self.phase = phase
        self.said = said
        self.scarce = scarce
        self.enhanced = "4.4.3" if category == "dns" else "4.4.1"  # of a failure without a reply

    def __str__(self) -> str:
        return self.cause or (self.said.whole if self.said is not None else self.public)


@dataclass(frozen=True, slots=True)
class Peer:
    """What to connect to: an address and port, or (`path`) a unix socket. `name`: the peer's in TLS and the log. Of a smart host:
    `host`: as the route names it; `files`: the route's files for TLS; `last`: the host has no further address; `failure`: why it
    has none at all."""

    name: str
    address: str
    port: int
    path: str = ""
    host: str = ""
    files: Files = NO_FILES
    last: bool = True
    failure: ConnectFailed | None = None

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
    and for each reply after it, TLS (off | may | encrypt | verify), ourselves (not to be connected to), the source address, and
    whether a peer that greets by our own name is ourselves, behind an address translation or a proxy."""

    route: Route
    hostname: str
    connect_timeout: float
    reply_timeout: float
    tls: str
    ourselves: Ourselves
    source: Source | None = None
    by_name: bool = False
    trace: Callable[[LenientSMTP], None] | None = None


def implicit_tls(peer: Peer, tls: str) -> Context | None:
    """The context for a peer with implicit TLS; None for others. TrustFailed."""
    return trust.context_of(tls, peer.files) if peer.port == IMPLICIT_TLS_PORT and tls != "off" else None


class _Client(LenientSMTP):
    """aiosmtplib with LMTP (RFC 2033 4.1: LHLO instead of EHLO and HELO). `opened(transport)` is called when TCP (and implicit
    TLS) is there, before the greeting."""

    greeting = b"EHLO"
    shaking = False  # implicit TLS is being started
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

    def opened_by(self, sock: socket.socket) -> None:
        """Use a socket that is connected already; aiosmtplib allows no port beside it."""
        self.sock, self.port = sock, None

    async def ehlo(self, *args: object, **options: object) -> aiosmtplib.SMTPResponse:
        assert self.local_hostname is not None
        response = await self.execute_command(self.greeting, self.local_hostname.encode("ascii"))
        if response.code != 250:
            raise SMTPHeloError(response.code, response.message)
        # A tab between a keyword and its parameters, where there is to be a blank (RFC 5321 4.1.1.1), is as good, as for Postfix.
        self.last_ehlo_response = aiosmtplib.SMTPResponse(response.code, response.message.replace("\t", " "))
        return response


async def connect(
    peer: Peer, via: Via, tokens: Tokens, make: Callable[[ClientSession, str], Session], recipients: int, timed: Timed = untimed
) -> Session:
    """A session past EHLO, STARTTLS and AUTH. ConnectFailed when one of them fails; NoRoute when the peer is this host.
    `make(core, peer)` makes the session; `recipients`: at most in one transaction; `timed`: what each phase takes."""
    watch = Stopwatch(timed)
    try:
        return await _connect(peer, via, tokens, make, recipients, watch)
    finally:
        watch.begin("")


async def _connect(
    peer: Peer, via: Via, tokens: Tokens, make: Callable[[ClientSession, str], Session], recipients: int, watch: Stopwatch
) -> Session:
    client: _Client | None = None
    phase = "connect"
    try:
        client = _client(peer, via)
        if via.trace is not None:
            via.trace(client)
            client.made = partial(_tell_made, client, via)
        await _open(client, peer, via, watch)
        client.check_unsolicited()
        phase = "ehlo"
        watch.begin("ehlo")
        await _greet(client)
        if via.by_name:
            _check_name(client, peer, via)
        if not client.use_tls and via.tls != "off" and (via.tls != "may" or client.supports_extension("starttls")):
            phase = "starttls"
            watch.begin("tls")
            await _start_tls(client, peer, via.tls)
            _tell_tls(client, via, client.transport)
            client.listen_anew()
            phase = WITHIN_TLS
            watch.begin("ehlo")
            await _greet(client)
        if via.route.username and via.tls == "verify":
            phase = "auth"
            watch.begin("auth")
            await _log_in(client, via, tokens)
        return _handed_over(client, peer, via, make, recipients)
    except BaseException as error:
        if client is not None:
            client.close()
        if not isinstance(error, Exception) or isinstance(error, NoRoute):
            _tell_end(client, str(error) or "given up")
            raise
        if client is not None and not isinstance(error, aiosmtplib.SMTPResponseException | Failure):
            error = client.begun() or error
        if phase == WITHIN_TLS:  # a peer that closes without a word may have refused our certificate (RFC 8446 4.4.2.4)
            phase = "starttls" if client is not None and not client.heard and not _timed_out(error) else "ehlo"
        failure = _failure(phase, peer, error, via, client.secrets if client is not None else ())
        in_tls = phase == "starttls" or (client is not None and client.shaking) or _of_tls(failure)
        failure.in_tls = in_tls and not failure.scarce
        _tell_end(client, f"failed: {failure}")
        raise failure from None


async def _log_in(client: _Client, via: Via, tokens: Tokens) -> None:
    tap = client.tap
    if tap is None:
        await log_in(client, via.route, tokens)
        return
    tap.event(f"logging in as {via.route.username}")
    tap.logging_in(True)
    try:
        await log_in(client, via.route, tokens)
    finally:
        tap.logging_in(False)


def _tell_made(client: _Client, via: Via, transport: asyncio.BaseTransport) -> None:
    """Tell a trace of a connection that is there."""
    if client.tap is not None:
        ours = transport.get_extra_info("sockname")
        client.tap.event(f"connected from {ours[0]}" if isinstance(ours, tuple) else "connected")
        _tell_tls(client, via, transport)


def _tell_tls(client: _Client, via: Via, transport: asyncio.BaseTransport | None) -> None:
    """Tell a trace of TLS that is active."""
    connection = transport.get_extra_info("ssl_object") if transport is not None else None
    if client.tap is not None and connection is not None:
        link = _link(cast("asyncio.Transport", transport), connection)
        checked = "certificate verified" if via.tls == "verify" else f'certificate not verified (tls = "{via.tls}")'
        client.tap.event(f"TLS {link.tls} with cipher {link.cipher}, {checked}")


def _tell_end(client: _Client | None, why: str) -> None:
    if client is not None and client.tap is not None:
        client.tap.closed(why)


def _check_name(client: _Client, peer: Peer, via: Via) -> None:
    """NoRoute where the peer replies to EHLO with a name of ours."""
    reply = client.last_ehlo_response or client.last_helo_response
    words = str(reply.message).split() if reply is not None else []
    if words and via.ourselves.greeted(words[0]):
        raise _loop(peer, f"{peer.label} ({peer.address}) replies to EHLO with our own name, {words[0]}")


def _loop(peer: Peer, cause: str = "") -> NoRoute:
    public = f"{peer.name} is this host: mail to it would loop"
    return NoRoute(True, "5.4.6", public, cause and f"{cause}: {public}", US, "loop")


async def _open(client: _Client, peer: Peer, via: Via, watch: Stopwatch) -> None:
    """Connect and wait for the greeting, each within its own time."""
    what = "connecting"
    watch.begin("connect")
    try:
        async with asyncio.timeout(via.connect_timeout) as limit:

            def opened(transport: asyncio.BaseTransport) -> None:
                nonlocal what
                client.shaking = False
                what = "waiting for the greeting"
                watch.begin("greeting")
                limit.reschedule(asyncio.get_running_loop().time() + via.reply_timeout)
                address = transport.get_extra_info("peername")
                if not peer.path and address is not None and via.ourselves.at(address[0], address[1]):
                    raise _loop(peer)

            client.opened = opened
            if client.use_tls:
                sock = await _dialed(peer, via)
                client.opened_by(sock)
                client.shaking = True
                watch.begin("tls")
            await client.connect(timeout=None)
    except TimeoutError as error:
        raise TimeoutError(f"timed out {what}") from error
    client.timeout = via.reply_timeout


async def _dialed(peer: Peer, via: Via) -> socket.socket:
    """A connected socket. (Of one that asyncio connects, the certificate is compared with the address instead of the name.)"""
    loop = asyncio.get_running_loop()
    ((family, kind, proto, _, address), *_) = await loop.getaddrinfo(peer.address, peer.port, type=socket.SOCK_STREAM)
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
    try:
        if via.source is not None:
            sock.bind((via.source.address, 0))
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _greet(client: _Client) -> None:
    """EHLO, or LHLO; HELO only for a peer that does not implement EHLO (RFC 5321 4.1.4). Any other rejection is temporary:
    without extensions (8BITMIME) mail would be bounced."""
    try:
        await client.ehlo()
    except SMTPHeloError as error:
        if error.code not in HELO_AFTER or client.greeting == b"LHLO" or not client.is_connected:
            raise
        await client.helo()


def _client(peer: Peer, via: Via) -> _Client:
    source = (via.source.address, 0) if via.source is not None else None
    name = via.source.hostname if via.source is not None and via.source.hostname else via.hostname
    if peer.path:
        client = _Client(socket_path=peer.path, timeout=via.reply_timeout, local_hostname=name, use_tls=False, start_tls=False)
    else:
        implicit = implicit_tls(peer, via.tls)
        client = _Client(
            hostname=peer.address if implicit is None else peer.name, port=peer.port, timeout=via.reply_timeout,
            local_hostname=name, source_address=source,
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
        raise ConnectFailed("ehlo", "the peer sent an unexpected reply", category="reply")
    features = features_of(client.esmtp_extensions)
    lmtp = via.route.protocol == "lmtp"
    connection = transport.get_extra_info("ssl_object")
    if connection is not None and isinstance(connection.context, Context):
        connection.context.remember(connection)
    features.chunking = features.chunking and via.route.chunking and not lmtp
    if not via.route.xforward:
        features.xforward = frozenset()
    session = make(ClientSession(features, recipients, lmtp), peer.name)
    client.protocol = None
    client.transport = None
    session.secrets = client.secrets
    if client.tap is not None:
        client.tap.hold(session, session.core)
    session.link = _link(transport, connection)
    session.attach(transport)
    return session


def _link(transport: asyncio.Transport, connection: ssl.SSLObject | None) -> Link:
    address = transport.get_extra_info("peername")
    host, port = (address[0], address[1]) if isinstance(address, tuple) else ("", 0)
    cipher = connection.cipher() if connection is not None else None
    return Link(host, port, (connection.version() or "") if connection is not None else "", cipher[0] if cipher else "")


async def _start_tls(client: _Client, peer: Peer, tls: str) -> None:
    if not client.supports_extension("starttls"):
        raise ConnectFailed("starttls", "the peer does not offer STARTTLS, and the route requires TLS")
    context = trust.context_of(tls, peer.files)
    await client.starttls(server_hostname=peer.name, tls_context=context, validate_certs=tls == "verify")


def _failure(phase: str, peer: Peer, error: Exception, via: Via | None = None, secrets: Iterable[str] = ()) -> ConnectFailed:
    """What a failed connection is reported as. `secrets`: what a reply to AUTH may echo, and nobody may read."""
    if isinstance(error, ConnectFailed):
        return error
    if is_scarce(error):
        return ConnectFailed(phase, OUT_OF_DESCRIPTORS, f"{peer.name}: {error}", None, US, "local", True)
    name = "a local socket" if peer.path else peer.name
    login = f" ({via.route.login})" if via is not None and phase == "auth" else ""
    if isinstance(error, aiosmtplib.SMTPResponseException) and 200 <= error.code < 600:
        said = Said(error.code, str(error.message).encode("utf-8", "surrogateescape"), phase)
        if phase == "auth":
            said.text = redacted(without(said.text, secrets))
            return ConnectFailed(phase, f"{name}: logging in failed", f"{peer.name}: {said.whole}{login}", said)
        return ConnectFailed(phase, said.text, said=said)
    if isinstance(error, Failure):
        cause, fault = f"{peer.name}: {without(str(error), secrets)}{login}", ""
        if error.category in ("tls", "reply"):
            fault = error.fault
        return ConnectFailed(phase, f"{name}: {error.public}", cause, fault=fault, category=error.category)
    public, category, origin = _reason(error)
    cause, fault = str(error) or type(error).__name__, ""
    if isinstance(origin, OSError) and origin.errno == errno.EADDRNOTAVAIL and via is not None and via.source is not None:
        category, fault = "local", US
        cause = f"source {via.source.name}: {via.source.address} is not an address of this machine"
    elif isinstance(origin, OSError) and peer.path and phase == "connect" and origin.errno in _NO_SOCKET:
        category, fault = "local", US
    if isinstance(origin, aiosmtplib.SMTPResponseException):  # what is no reply may echo the credentials
        cause = public if phase == "auth" else f"{public}: {origin.message}"
    elif isinstance(origin, aiosmtplib.SMTPServerDisconnected):
        cause = public
    if isinstance(origin, ssl.SSLError):
        why = trust.reason(origin, peer.name, peer.files, via.route.label if via is not None else "")
        cause = why if str(origin) in why else f"{why} [{origin}]"
    return ConnectFailed(phase, f"{name}: {public}", f"{peer.name}: {cause}{login}", fault=fault, category=category)


_NO_SOCKET = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENOTSOCK)  # at a path: not there, or not for us


def _of_tls(failure: ConnectFailed) -> bool:
    """Whether a failure without a reply is one of TLS, whatever the phase: with TLS 1.3 a host refuses our certificate later."""
    return failure.said is None and failure.category == "tls"


def _timed_out(error: BaseException) -> bool:
    return _reason(error)[1] == "timeout"


# Errors in a chain of causes, the first that is known: (type, its public text, its category).
_REASONS: list[tuple[type[BaseException], str, str]] = [
    (ssl.SSLCertVerificationError, "its certificate could not be verified", "tls"),
    (ssl.SSLError, "TLS failed", "tls"),
    (TimeoutError, "timed out", "timeout"),
    (socket.gaierror, "its name could not be looked up", "dns"),
    (ConnectionRefusedError, os.strerror(errno.ECONNREFUSED), "refused"),
]


def _reason(error: BaseException | None) -> tuple[str, str, BaseException | None]:
    """(The cause of an error as a standard text, without addresses, paths and source lines; its category; the error that it is
    found in)."""
    while error is not None:
        for kind, text, category in _REASONS:
            if isinstance(error, kind):
                return text, category, error
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno), "network", error
        if isinstance(error, aiosmtplib.SMTPResponseException):
            return "it sent an invalid reply", "reply", error
        cause = error.__cause__ or error.__context__
        if cause is None and isinstance(error, aiosmtplib.SMTPServerDisconnected):
            return "the connection was closed", "network", error
        error = cause
    return "no usable connection", "network", None
