"""Replies before the first transaction: aiosmtplib's client, with replies read as in all other phases, and with LMTP."""

import asyncio
from collections.abc import Callable

import aiosmtplib
from aiosmtplib.errors import (
    SMTPConnectError,
    SMTPConnectResponseError,
    SMTPHeloError,
    SMTPResponseException,
    SMTPServerDisconnected,
)
from aiosmtplib.protocol import SMTPProtocol
from aiosmtplib.response import SMTPResponse

from relaymta.proto.smtp_client import LINE_LIMIT, LINES_LIMIT, Replies

__all__ = ["Client"]

NO_REPLY = -1  # aiosmtplib's code for what is not a reply


class _Protocol(SMTPProtocol):
    """Reads replies as `Replies` does: the code decides (RFC 5321 4.2.1), whatever the form and the octets of the text. Octets
    that are not UTF-8 are shown as U+FFFD. (aiosmtplib keeps them as surrogates, which no log and no DSN can hold.)"""

    def _read_response_from_buffer(self) -> SMTPResponse | None:
        replies, end = Replies(LINE_LIMIT, LINES_LIMIT), 0
        while (newline := self._buffer.find(b"\n", end)) >= 0:
            found = replies.feed(bytes(self._buffer[end : newline + 1]))
            end = newline + 1
            if found:
                code, text = found[0]
                del self._buffer[:end]
                shown = text.decode("utf-8", "replace").strip()
                if not code:
                    raise SMTPResponseException(NO_REPLY, f"not a reply: {shown}")
                return SMTPResponse(code, shown)
        return None


class Client(aiosmtplib.SMTP):
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

    async def _create_connection(self, timeout: float | None) -> SMTPResponse:
        """As in aiosmtplib, which does not let its protocol be chosen. The caller limits the time."""
        loop = asyncio.get_running_loop()
        where = f"{self.hostname} on port {self.port}"

        def made() -> _Protocol:
            return _Protocol(loop, self._on_connection_lost)

        context = await self._get_tls_context() if self.use_tls else None
        try:
            if self.socket_path is not None:
                transport, protocol = await loop.create_unix_connection(made, str(self.socket_path))
            else:
                host, port, source = self.hostname or "", self.port or 0, self.source_address
                transport, protocol = await loop.create_connection(made, host, port, ssl=context, local_addr=source)
        except OSError as error:
            raise SMTPConnectError(f"Error connecting to {where}: {error}") from error
        self.protocol, self.transport = protocol, transport
        try:
            response = await protocol.read_response()
        except SMTPServerDisconnected as error:
            raise SMTPConnectError(f"Error connecting to {where}: {error}") from error
        if response.code != 220:
            raise SMTPConnectResponseError(response.code, response.message)
        return response

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
