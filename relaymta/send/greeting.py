"""Replies before the first transaction: aiosmtplib's client, with replies read as in all other phases."""

import asyncio

import aiosmtplib
from aiosmtplib.errors import (
    SMTPConnectError,
    SMTPConnectResponseError,
    SMTPResponseException,
    SMTPServerDisconnected,
)
from aiosmtplib.protocol import SMTPProtocol
from aiosmtplib.response import SMTPResponse

from relaymta.proto.smtp_client import LINE_LIMIT, LINES_LIMIT, Replies

__all__ = ["LenientSMTP"]

NO_REPLY = -1  # aiosmtplib's code for what is not a reply


class _Protocol(SMTPProtocol):
    """Reads replies as `Replies` does: the code decides (RFC 5321 4.2.1), whatever the form and the octets of the text. Octets
    that are not UTF-8 are shown as U+FFFD. (aiosmtplib keeps them as surrogates, which no log and no DSN can hold.)"""

    _replies: Replies | None = None  # the reply that has begun; its lines are not in the buffer any more

    def _read_response_from_buffer(self) -> SMTPResponse | None:
        while (newline := self._buffer.find(b"\n")) >= 0:
            if self._replies is None:
                self._replies = Replies(LINE_LIMIT, LINES_LIMIT)
            found = self._replies.feed(bytes(self._buffer[: newline + 1]))
            del self._buffer[: newline + 1]
            if found:
                self._replies = None
                code, text = found[0]
                shown = text.decode("utf-8", "replace").strip()
                if not code:
                    raise SMTPResponseException(NO_REPLY, f"not a reply: {shown}")
                return SMTPResponse(code, shown)
        return None


class LenientSMTP(aiosmtplib.SMTP):
    """aiosmtplib with replies that are read as in all other phases."""

    async def _create_connection(self, timeout: float | None) -> SMTPResponse:
        """As in aiosmtplib, which does not let its protocol be chosen. The caller limits the time."""
        loop = asyncio.get_running_loop()
        where = f"{self.hostname} on port {self.port}"
        source, context = self.source_address, None

        def made() -> _Protocol:
            return _Protocol(loop, self._on_connection_lost)

        if self.use_tls:
            context = await self._get_tls_context()
        try:
            if self.socket_path is not None:
                transport, protocol = await loop.create_unix_connection(made, str(self.socket_path))
            elif self.sock is not None:
                name = self.hostname if context is not None else None
                transport, protocol = await loop.create_connection(made, sock=self.sock, ssl=context, server_hostname=name)
            else:
                host, port = self.hostname or "", self.port or 0
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
