"""One outgoing connection: aiosmtplib connects, greets, starts TLS and authenticates; then its transport is handed to
the pipelined client of proto.smtp_client, which stays on it for many messages."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

import aiosmtplib

from relaymta.proto.smtp_client import ClientSession, Mail, Said, features_of

__all__ = ["ConnectFailed", "Session", "connect"]

# RFC 5321 4.5.3.2, seconds
TIMEOUTS = {"rset": 300.0, "mail": 300.0, "rcpt": 300.0, "data": 120.0, "final": 600.0, "text": 180.0}
GATHER = 32768  # octets above which pieces are written as they are, not joined


class ConnectFailed(Exception):
    """No usable session. `phase` and `said` tell how far it came; `permanent` when the peer said 5xx."""

    def __init__(self, phase: str, text: str, said: Said | None = None) -> None:
        super().__init__(text)
        self.phase = phase
        self.said = said


class Session(asyncio.Protocol):
    """The client side of one connection in the pool. `idle(session)`, `finished(session, mail)` and
    `lost(session, reason)` belong to whoever owns it."""

    def __init__(
        self,
        core: ClientSession,
        peer: str,
        now: Callable[[], float],
        idle: Callable[["Session"], None],
        finished: Callable[["Session", Mail], None],
        lost: Callable[["Session", str], None],
        patience: float = 1.0,
    ) -> None:
        """`patience`: times RFC 5321's timeouts."""
        self.core = core
        self.peer = peer
        self.transport: asyncio.Transport | None = None
        self.deadline = 0.0  # loop time; 0: nothing is awaited
        self.idle_since = 0.0
        self._now = now
        self._idle = idle
        self._finished = finished
        self._lost = lost
        self._patience = patience
        self._writable = asyncio.Event()
        self._writable.set()
        self._stream: asyncio.Task[None] | None = None
        self.read_pieces: Callable[[Mail], Any] | None = None
        self.ended = False
        self.waiting = False  # in its site's list of idle sessions

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over a transport that is past EHLO."""
        self.transport = transport
        transport.set_protocol(self)

    def send(self, mail: Mail) -> None:
        """Start a message; allowed when `core.may_follow`."""
        self.core.begin(mail)
        self._flush()

    def _flush(self) -> None:
        core = self.core
        out = core.out
        if out and self.transport is not None:
            if len(out) == 1:
                self.transport.write(out[0])
            elif len(out) > 2 and sum(map(len, out)) > GATHER:
                self.transport.writelines(out)
            else:
                self.transport.write(b"".join(out))
            out.clear()
        if core.streaming is not None and self._stream is None:
            self._stream = asyncio.get_running_loop().create_task(self._write_text(core.streaming))
        awaiting = "text" if core.streaming is not None else core.awaiting
        self.deadline = self._now() + TIMEOUTS[awaiting] * self._patience if awaiting else 0.0

    def data_received(self, data: bytes) -> None:
        core = self.core
        core.receive(data)
        if core.finished:
            done, core.finished = core.finished, []
            for mail in done:
                self._finished(self, mail)
        if self.ended:
            return
        if core.closing:
            self.fail("the peer closes: " + core.broken[:200].decode("utf-8", "replace"))
            return
        if core.may_follow:
            self._idle(self)
        if not self.ended:
            self._flush()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._writable.set()
        if not self.ended:
            self.ended = True
            self._lost(self, f"connection lost: {exc}" if exc else "the peer closed the connection")

    def fail(self, reason: str) -> None:
        """Give the connection up."""
        if self.ended:
            return
        self.ended = True
        if self._stream is not None:
            self._stream.cancel()
        if self.transport is not None:
            self.transport.abort()
        self._lost(self, reason)

    def stack(self) -> list[str]:
        """Where the task that writes a large text stands, `file:line function` from the outside in; empty without one."""
        frames = self._stream.get_stack() if self._stream is not None else []
        return [f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" for frame in frames]

    def quit(self) -> None:
        """Say QUIT and close; nothing may be under way."""
        if self.ended:
            return
        self.ended = True
        if self.transport is not None:
            self.transport.write(b"QUIT\r\n")
            self.transport.close()

    async def _write_text(self, mail: Mail) -> None:
        """Write a large text from disk, no faster than the peer takes it."""
        assert self.read_pieces is not None
        whole = False
        try:
            async for piece in self.read_pieces(mail):
                await self._writable.wait()
                if self.ended or self.transport is None:
                    return
                self.deadline = self._now() + TIMEOUTS["text"] * self._patience
                self.transport.write(piece)
            if self.transport is not None:
                self.transport.write(b".\r\n")
                whole = True
        except Exception as error:  # the body is damaged or unreadable: cut the connection, so that no dot ends it
            self._stream = None
            self.fail(f"reading the message failed: {error}")
            return
        self._stream = None
        self.core.text_written(whole)
        self._flush()


async def connect(
    host: str,
    port: int,
    name: str,
    *,
    hostname: str,
    timeout: float,
    tls: str,
    username: str,
    password: str,
    make: Callable[[ClientSession, str], Session],
    recipients: int,
) -> Session:
    """A session past EHLO, STARTTLS and AUTH. `host`: what to connect to; `name`: the peer's name in TLS and the log."""
    client = aiosmtplib.SMTP(hostname=host, port=port, timeout=timeout, local_hostname=hostname, use_tls=False, start_tls=False)
    phase = "connect"
    try:
        await client.connect()
        phase = "ehlo"
        await client._ehlo_or_helo_if_needed()
        if tls != "off" and (tls != "may" or client.supports_extension("starttls")):
            phase = "starttls"
            await _start_tls(client, name, tls)
        if username:
            phase = "auth"
            await client.login(username, password)
    except Exception as error:
        client.close()
        raise _failure(phase, name, error) from None
    transport, protocol = cast("asyncio.Transport | None", client.transport), client.protocol
    if transport is None or protocol is None or transport.is_closing():
        raise ConnectFailed("ehlo", "the peer closed the connection")
    if protocol._buffer or transport.get_write_buffer_size():
        client.close()
        raise ConnectFailed("ehlo", "the peer speaks out of turn")
    session = make(ClientSession(features_of(client.esmtp_extensions), recipients), name)
    client.protocol = None
    client.transport = None
    session.attach(transport)
    return session


async def _start_tls(client: aiosmtplib.SMTP, name: str, tls: str) -> None:
    context = ssl.create_default_context()
    if tls != "verify":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if not client.supports_extension("starttls"):
        raise ConnectFailed("starttls", "the peer offers no STARTTLS, and the route asks for TLS")
    await client.starttls(server_hostname=name, tls_context=context, validate_certs=tls == "verify")
    await client._ehlo_or_helo_if_needed()


def _failure(phase: str, name: str, error: Exception) -> ConnectFailed:
    if isinstance(error, ConnectFailed):
        return error
    if isinstance(error, aiosmtplib.SMTPResponseException):
        said = Said(error.code, str(error.message).encode(), phase)
        return ConnectFailed(phase, f"{error.code} {error.message}", said)
    text = str(error) or type(error).__name__
    return ConnectFailed(phase, f"{name}: {text}")
