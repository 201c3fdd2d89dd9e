"""Replies before the first transaction: aiosmtplib's client, with replies read as in all other phases."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import aiosmtplib
from aiosmtplib.errors import (
    SMTPConnectError,
    SMTPConnectResponseError,
    SMTPResponseException,
    SMTPServerDisconnected,
)
from aiosmtplib.protocol import SMTPProtocol
from aiosmtplib.response import SMTPResponse

from relaymta.errors import PEER, Failure
from relaymta.proto.smtp_client import LINE_LIMIT, LINES_LIMIT, Replies
from relaymta.trace import Outgoing

__all__ = ["LenientSMTP", "Unsolicited"]

NO_REPLY = -1  # aiosmtplib's code for what is not a reply
REFUSAL = 400  # and above


class Unsolicited(Failure):
    """The peer sent more than one reply: the rest would be read as the reply to the next command."""

    def __init__(self) -> None:
        super().__init__("the peer sent an unexpected reply", fault=PEER, category="reply")


class _Protocol(SMTPProtocol):
    """Reads replies as `Replies` does: the code decides (RFC 5321 4.2.1), whatever the form and the octets of the text. Octets
    that are not UTF-8 are shown as U+FFFD. (aiosmtplib keeps them as surrogates, which no log and no DSN can hold.)"""

    _replies: Replies | None = None  # the reply that has begun: what has come of it is not in the buffer any more

    heard = False  # since `listen_anew` anything has come
    tap: Outgoing | None = None
    made: Callable[[asyncio.BaseTransport], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As in aiosmtplib."""
        super().connection_made(transport)
        if self.made is not None:
            self.made(transport)

    def write(self, data: bytes) -> None:
        """As in aiosmtplib."""
        if self.tap is not None:
            self.tap.said(data)
        super().write(data)

    def data_received(self, data: bytes) -> None:
        """As in aiosmtplib, but for its limit of the buffer, which holds only what follows a reply: `Replies` has limits."""
        self.heard = True
        waiter = self._response_waiter
        if waiter is None or waiter.done() or not self._response_pending:
            return
        self._buffer.extend(data)
        try:
            response = self._read_response_from_buffer()
        except SMTPResponseException as error:
            self._set_response_exception(waiter, error)
        else:
            if response is not None:
                waiter.set_result(response)

    def _read_response_from_buffer(self) -> SMTPResponse | None:
        while self._buffer:
            end = self._buffer.find(b"\n") + 1 or len(self._buffer)
            if self._replies is None:
                self._replies = Replies(LINE_LIMIT, LINES_LIMIT)
            found = self._replies.feed(bytes(self._buffer[:end]))
            del self._buffer[:end]
            if found and self.tap is not None:
                self.tap.heard(found)
            if found:
                self._replies = None
                code, text = found[0] if found[0][0] >= REFUSAL else found[-1]  # nothing can follow one that is too long
                if not code:
                    raise SMTPResponseException(NO_REPLY, f"not a reply: {_shown(text)}")
                return SMTPResponse(code, _shown(text))
        return None

    def begun(self) -> SMTPResponseException | None:
        """The refusal that had begun when the connection ended, or when its time was over."""
        found, self._replies = self._replies.end() if self._replies is not None else [], None
        return SMTPResponseException(found[0][0], _shown(found[0][1])) if found and found[0][0] >= REFUSAL else None


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "replace").strip()


class LenientSMTP(aiosmtplib.SMTP):
    """aiosmtplib with replies that are read as in all other phases. `secrets`: what replies may echo, and nobody may read."""

    _reading: _Protocol | None = None  # also after the connection has ended
    secrets: tuple[str, ...] = ()
    tap: Outgoing | None = None
    made: Callable[[asyncio.BaseTransport], None] | None = None  # called when the connection is there

    def hide(self, *texts: str) -> None:
        """Add to `secrets`, also in the form in which AUTH sends them, with padding and without."""
        sent = [base64.b64encode(text.encode()).decode() for text in texts]
        self.secrets += (*texts, *sent, *(text.rstrip("=") for text in sent))
        if self.tap is not None:
            self.tap.hide(self.secrets)

    async def execute_command(self, *args: bytes, **options: Any) -> SMTPResponse:
        """As in aiosmtplib; Unsolicited where a reply has come before its command."""
        self.check_unsolicited()
        response = await super().execute_command(*args, **options)
        if response.code < REFUSAL:
            self.check_unsolicited()
        return response

    def check_unsolicited(self) -> None:
        """Unsolicited where a reply has come that nothing has asked for."""
        if self.protocol is not None and self.protocol._buffer:
            raise Unsolicited

    @property
    def heard(self) -> bool:
        """Whether anything has come from the peer since `listen_anew`."""
        return self._reading is not None and self._reading.heard

    def listen_anew(self) -> None:
        """Forget that anything has come from the peer."""
        if self._reading is not None:
            self._reading.heard = False

    def begun(self) -> SMTPResponseException | None:
        """As `_Protocol.begun`."""
        return self._reading.begun() if self._reading is not None else None

    async def _create_connection(self, timeout: float | None) -> SMTPResponse:
        """As in aiosmtplib, which does not let its protocol be chosen. The caller limits the time."""
        loop = asyncio.get_running_loop()
        where = str(self.socket_path) if self.socket_path is not None else f"{self.hostname} on port {self.port}"
        source, context = self.source_address, None

        def made() -> _Protocol:
            protocol = _Protocol(loop, self._on_connection_lost)
            protocol.made = self.made
            if self.tap is not None:
                self.tap.hold(protocol)
            return protocol

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
        self.protocol = self._reading = protocol
        self.transport = transport
        try:
            response = await protocol.read_response()
        except SMTPServerDisconnected as error:
            raise SMTPConnectError(f"Error connecting to {where}: {error}") from error
        if response.code != 220:
            raise SMTPConnectResponseError(response.code, response.message)
        return response
