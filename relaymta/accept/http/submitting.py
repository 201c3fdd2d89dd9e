"""One message of an HTTP client on its way into the queue: it takes that of mail by SMTP, by a session of this process, which has
no socket. So one set of rules, quotas, filters and keys holds for all mail, and each refusal is the reply that SMTP would have.

A Submitter is one session, for one message at a time. Its client hangs up with that of the HTTP connection.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

from relaymta.accept.admission import Admission
from relaymta.accept.connection import Connection
from relaymta.accept.line import COMMITTING
from relaymta.accept.once import Wanted
from relaymta.accept.origin import Client
from relaymta.accept.rights import Rights
from relaymta.accept.transaction import IncomingTransaction
from relaymta.auth.identity import Identity
from relaymta.config import Listener
from relaymta.reservation import Reservation

__all__ = ["Answer", "Letter", "Result", "Submitter"]

PIECE = 65536  # octets of message data in one chunk
AT_ONCE = 64  # recipients that are given before their replies are awaited
ERRORS = 1_000_000  # that a session may make: each recipient that is refused is one
_IDENT = "queued as "


class Answer(NamedTuple):
    """A reply of the session."""

    code: int
    text: str

    @property
    def whole(self) -> str:
        """In one line, as the client sees it."""
        return f"{self.code} {self.text}"


class Letter(NamedTuple):
    """A message to be submitted. `size`: octets of message data; `pieces`: these; `utf8`: an address or the header needs
    SMTPUTF8."""

    sender: str
    recipients: list[str]
    utf8: bool
    size: int
    pieces: Iterator[bytes]


class Result(NamedTuple):
    """What has become of it. `ident`: its id, "": it was not taken; `refused`: the recipients that were, each with the reply;
    `answer`: the reply to all of it."""

    ident: str
    refused: list[tuple[str, Answer]]
    answer: Answer


class _Nowhere(asyncio.Transport):
    """The transport of a session without a socket. `said(octets)`: what it writes."""

    def __init__(self, said: Callable[[bytes], None]) -> None:
        super().__init__()
        self._said = said
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As of Transport."""
        self._said(bytes(data))

    def is_closing(self) -> bool:
        """As of Transport."""
        return self._closing

    def close(self) -> None:
        """As of Transport."""
        self._closing = True
        self._said(b"")

    abort = close

    def can_write_eof(self) -> bool:
        """As of Transport."""
        return False

    def pause_reading(self) -> None:
        """As of Transport: who submits awaits each reply."""

    def resume_reading(self) -> None:
        """As of Transport."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As of Transport."""

    def get_write_buffer_size(self) -> int:
        """As of Transport."""
        return 0


class Submitter(Connection):
    """The session of an HTTP client. `tls`: version and cipher of its connection, "": none; `quotas`: whether what is asked of it
    counts, false where nothing is sent."""

    __slots__ = ("_awaited", "_closed", "_rest", "_said", "_waiting", "identity")

    def __init__(
        self, admission: Admission, listener: Listener, client: Client, identity: Identity | None, tls: str, counts: bool = True
    ) -> None:
        super().__init__(admission, listener)
        self.identity = identity
        self._said: list[Answer] = []
        self._rest = b""
        self._awaited = 0
        self._waiting: asyncio.Future[None] | None = None
        self._closed = False
        client = replace(client, limits=replace(client.limits, errors=ERRORS, lenient=True))
        if not counts:
            client = replace(client, message_rate="", recipient_rate="")
        place = Reservation(lambda: None)  # the HTTP connection is the one that counts
        self.rights = Rights(admission, listener, self, client, place)
        if identity is not None:
            self.rights.log_in(identity._replace(connections=0, quotas=identity.quotas if counts else {}))
        self.transport = _Nowhere(self._heard)
        self.trace(client)
        self._greet(bool(tls), tls)

    def is_delayed(self, session: Any, errors: int) -> bool:
        """Who has to log in is not guessing recipients."""
        return False

    @property
    def usable(self) -> bool:
        """Whether another message can be submitted: it is open, and none is under way."""
        session = self.session
        if self._closed or self.transport is None or session is None:
            return False
        return not session.closing and session.transaction is None and not self.waits

    # What it says

    def _heard(self, data: bytes) -> None:
        if not data:
            self._closed = True
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        for line in lines:
            if line[3:4] != b"-":
                self._said.append(Answer(int(line[:3]), line[4:].decode("utf-8", "replace")))
        if self._waiting is not None and (len(self._said) >= self._awaited or self._closed) and not self._waiting.done():
            self._waiting.set_result(None)

    async def _replies(self, count: int) -> list[Answer]:
        """The next replies. ConnectionError: the session has ended before."""
        if len(self._said) < count:
            if self._closed:
                raise ConnectionAbortedError(self._said[-1].whole if self._said else "the session has ended")
            self._awaited = count
            self._waiting = self.admission.loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
            if len(self._said) < count:
                raise ConnectionAbortedError(self._said[-1].whole if self._said else "the session has ended")
        found, self._said = self._said[:count], self._said[count:]
        return found

    async def _say(self, data: bytes, count: int = 1) -> list[Answer]:
        self.data_received(data)
        return await self._replies(count)

    # What it is told

    async def begin(self, helo: str) -> None:
        """Open the session. ConnectionError: it is refused."""
        [greeting] = await self._replies(1)
        if greeting.code >= 400:
            raise ConnectionAbortedError(greeting.whole)
        await self._say(b"EHLO %b\r\n" % helo.encode())

    async def envelope(self, letter: Letter) -> tuple[list[str], list[tuple[str, Answer]], Answer]:
        """Give the sender and the recipients: (those that are taken, the refused ones, the reply to the sender)."""
        utf8 = b" SMTPUTF8" if letter.utf8 else b""
        [answer] = await self._say(b"MAIL FROM:<%b> SIZE=%d BODY=8BITMIME%b\r\n" % (letter.sender.encode(), letter.size, utf8))
        taken: list[str] = []
        refused: list[tuple[str, Answer]] = []
        if answer.code >= 400:
            return taken, refused, answer
        for start in range(0, len(letter.recipients), AT_ONCE):
            some = letter.recipients[start : start + AT_ONCE]
            commands = b"".join(b"RCPT TO:<%b>\r\n" % address.encode() for address in some)
            for address, one in zip(some, await self._say(commands, len(some)), strict=True):
                if one.code >= 400:
                    refused.append((address, one))
                else:
                    taken.append(address)
        return taken, refused, answer

    async def reset(self) -> None:
        """Give up the message under way."""
        await self._say(b"RSET\r\n")

    async def submit(self, letter: Letter, wanted: Callable[[list[str], list[tuple[str, Answer]]], Wanted]) -> Result:
        """Submit a message. `wanted(recipients taken, refused)`: what its application wants of it. ConnectionError: the session
        has ended, and the message was not taken."""
        taken, refused, answer = await self.envelope(letter)
        if not taken:
            if answer.code < 400:
                await self.reset()
                answer = refused[0][1]
            return Result("", refused, answer)
        assert self.session is not None
        cast(IncomingTransaction, self.session.transaction).wanted = wanted(taken, refused)
        answer = await self._data(letter.pieces)
        ident = answer.text.rpartition(_IDENT)[2] if answer.code < 400 else ""
        return Result(ident, refused, answer)

    async def _data(self, pieces: Iterator[bytes]) -> Answer:
        last = b""
        for piece in pieces:
            if last and len(last) + len(piece) > PIECE:
                [answer] = await self._say(b"BDAT %d\r\n%b" % (len(last), last))
                if answer.code >= 400:
                    return answer
                last = b""
            last += piece
        [answer] = await self._say(b"BDAT %d LAST\r\n%b" % (len(last), last))
        return answer

    def forsake(self) -> None:
        """The client has gone: what filters are still asked about is not taken. There is a reply all the same."""
        if self.waits & COMMITTING:
            self.hung_up()

    def end(self) -> None:
        """The session is needed no more. Not while a message is submitted; further calls do nothing."""
        if self.transport is not None:
            self.connection_lost(None)
