"""Virus scanning by clamd (proto/clamd.py), over connections that are kept for the next message.

A connection has one message at a time: clamd itself takes one after the other. It is used again only after a whole dialogue; and
what it fails at before any reply, since clamd was restarted meanwhile, is done once more on a new one.
"""

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import cast

from relaymta.filter.judgement import PIECE, Answer, FailureReason, FilterFailure, Mail, Text
from relaymta.filter.reach import Unreached, check_address, reach
from relaymta.proto import clamd

__all__ = ["CLAMD_IDLE", "Clamd"]

CLAMD_IDLE = 10.0  # seconds that a connection is kept for the next message: fewer than clamd keeps it (CommandReadTimeout, 30)
SKIPPED = 5.0  # seconds for which an address that failed is asked only if the others fail, too

_EICAR = (b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR", b"-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*")  # in two: this file is no virus
_FAILURES: dict[clamd.Word, FailureReason] = {"OVERSIZE": "oversize", "ERROR": "refused"}
_VERDICTS = ("OK", "FOUND")


class _Lost(FilterFailure):
    """A connection failed before there was a reply to what was asked."""


class _Connection(asyncio.Protocol):
    """One session. `ended`: it cannot be used any more."""

    def __init__(self, place: "_Place") -> None:
        self.place = place
        self.ended = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._inode = 0
        self._replies = clamd.Replies()
        self._failure: FilterFailure | None = None
        self._answer: asyncio.Future[clamd.Reply] | None = None  # to what was asked last
        self._paused = False
        self._room: asyncio.Future[None] | None = None  # what waits while writing is paused

    def ask(self, command: bytes) -> asyncio.Future[clamd.Reply]:
        """Send a command; its reply. _Lost."""
        answer = self._answer = asyncio.get_running_loop().create_future()
        if self.ended or self._transport is None:
            answer.set_exception(self._failure or self._lost())
            return answer
        first = self._replies.asked() == 1
        self._transport.write(clamd.START + command if first else command)
        return answer

    async def show(self, text: Text, most: int | None) -> clamd.Reply:
        """Send a text piece by piece, until a reply comes. _Lost; OSError: the text cannot be read."""
        answer = self.ask(clamd.INSTREAM + clamd.length(clamd.MAIL) + clamd.MAIL)
        async with contextlib.aclosing(cast(AsyncGenerator[bytes, None], text.pieces(most))) as pieces:
            async for piece in pieces:
                if not await self._sent(clamd.length(piece), piece):
                    break
            else:
                if await self._sent(clamd.END):
                    return await answer
        reply = await answer
        if reply.word not in _FAILURES:
            raise FilterFailure("protocol", f"{self.place.name}: answers {reply.word} before it was shown the whole message")
        return reply

    async def _sent(self, *octets: bytes) -> bool:
        """Send more of a text, when there is room for it; False: there is a reply, or none will come."""
        assert self._transport is not None and self._answer is not None
        if self._paused and not self._answer.done():
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        if self._answer.done() or self._transport.is_closing():
            return False
        self._transport.writelines(octets)
        return True

    def drop(self) -> None:
        """Close it now, whatever is under way."""
        self.ended = True
        if self._answer is not None and not self._answer.cancel() and not self._answer.cancelled():
            self._answer.exception()  # nobody else will ask for it
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.ended:
            self._transport.abort()
            return
        self._inode = os.fstat(transport.get_extra_info("socket").fileno()).st_ino
        self.place.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        try:
            for reply in self._replies.feed(data):
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(reply)
                    self._go_on()
        except clamd.ClamdError as error:
            self._fail(_Lost("protocol", f"{self.place.name}: answers, but not as clamd: {error}"))

    def eof_received(self) -> None:
        self._fail(self._lost())

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._go_on()

    def _go_on(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.ended:
            self._read_on()
        self.place.connections.discard(self)
        if self in self.place.idle:
            self.place.idle.remove(self)
        self._fail(self._lost())

    def _read_on(self) -> None:
        """When clamd replies before it has read all, and closes the connection, the transport ends at its next write: what clamd
        said is still to be read from the socket, which is open as long as connection_lost runs."""
        assert self._transport is not None
        number = self._transport.get_extra_info("socket").fileno()
        with contextlib.suppress(OSError):
            while not self.ended and os.fstat(number).st_ino == self._inode and (data := os.read(number, PIECE)):
                self.data_received(data)

    def _lost(self) -> FilterFailure:
        if self._replies.begun:
            return _Lost("protocol", f"{self.place.name}: closes the connection within a reply")
        return _Lost("connect", f"{self.place.name}: closes the connection without a reply")

    def _fail(self, failure: FilterFailure) -> None:
        if self.ended:
            return
        self.ended = True
        self._failure = failure
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(failure)
        self._go_on()
        if self._transport is not None:
            self._transport.abort()


class _Place:
    """An address, and the connections to it: all of them, and those that are idle, the one used last at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped_until = 0.0  # loop time
        self.connections: set[_Connection] = set()
        self.idle: list[_Connection] = []
        check_address(name)

    def kept(self) -> _Connection | None:
        """A connection that can be used again."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.ended:
                return connection
        return None

    async def connect(self, timeout: float) -> _Connection:
        """A new connection, within `timeout` seconds. Unreached."""
        made = _Connection(self)
        try:
            return await reach(self.name, lambda: made, timeout)
        except BaseException:
            made.drop()
            self.connections.discard(made)  # uvloop does not tell of the end of one that is given up as it is connected
            raise


_Say = Callable[[_Connection], Awaitable[clamd.Reply]]  # sends a question; its reply


class Clamd:
    """A judgement.Filter. Its words are OK and FOUND, whose reason is the signature's name."""

    def __init__(self, addresses: Sequence[str], timeout: float) -> None:
        """`addresses`: "unix:/path", "host:port" or "[::1]:port"; the first that is up is asked. `timeout`: seconds for a
        connection, and for all of probe() and prove(); how long judge() may take is its caller's to say. ValueError: an address
        is none."""
        self._places = [_Place(address) for address in addresses]
        self._timeout = timeout
        self._closed = False
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        """Connections that there are, idle or not."""
        return sum(len(place.connections) for place in self._places)

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter. FilterFailure; OSError: the text cannot be read."""
        text, most = mail.text, mail.most
        if text.size <= PIECE or (most is not None and most <= PIECE):
            command = clamd.stream([piece async for piece in text.pieces(most)])
            reply = await self._ask(lambda connection: connection.ask(command), _VERDICTS)
        else:
            reply = await self._ask(lambda connection: connection.show(text, most), _VERDICTS)
        return Answer(reply.word, reply.text)

    async def probe(self) -> None:
        """As in judgement.Filter: PING."""
        await self._in_time(clamd.PING, ("PONG",))

    async def prove(self) -> str:
        """As in judgement.Filter: a message with EICAR attached in base64."""
        reply = await self._in_time(clamd.stream([_proof()]), _VERDICTS)
        if reply.word != "FOUND":
            raise FilterFailure("refused", "does not find EICAR, the test file of all virus scanners, as an attachment in base64")
        return reply.text

    def close(self) -> None:
        """As in judgement.Filter."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for place in self._places:
            for connection in place.idle:
                connection.drop()
            place.idle.clear()

    async def _in_time(self, command: bytes, words: tuple[str, ...]) -> clamd.Reply:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._ask(lambda connection: connection.ask(command), words)
        except TimeoutError:
            raise FilterFailure("timeout", f"{self._names()}: no answer within {self._timeout:g} s") from None

    def _names(self) -> str:
        return ", ".join(place.name for place in self._places)

    async def _ask(self, say: _Say, words: tuple[str, ...]) -> clamd.Reply:
        """What the first address that can be connected to replies: one of `words`. FilterFailure. An address that fails, or is so
        slow that the caller's time is up, is the last to be asked for SKIPPED seconds. Then one message finds out whether it is
        up again: others do not wait for that."""
        now = asyncio.get_running_loop().time
        began, failures = now(), []
        for place in self._places if len(self._places) == 1 else sorted(self._places, key=lambda one: one.skipped_until > began):
            began = now()
            if place.skipped_until:
                place.skipped_until = began + max(SKIPPED, self._timeout)
            try:
                reply = await self._ask_at(place, say, words)
            except Unreached as failure:
                place.skipped_until = now() + SKIPPED
                failures.append(failure)
            except _Lost:
                place.skipped_until = now() + SKIPPED
                raise
            except asyncio.CancelledError:
                if now() - began > self._timeout / 2:
                    place.skipped_until = now() + SKIPPED
                raise
            else:
                place.skipped_until = 0.0
                return reply
        raise FilterFailure(failures[0].reason, "; ".join(map(str, failures)))

    async def _ask_at(self, place: _Place, say: _Say, words: tuple[str, ...]) -> clamd.Reply:
        """On a connection that is there already, if it is still good; else on a new one."""
        connection = place.kept()
        if connection is not None:
            with contextlib.suppress(_Lost):
                return await self._ask_on(connection, say, words)
        return await self._ask_on(await place.connect(self._timeout), say, words)

    async def _ask_on(self, connection: _Connection, say: _Say, words: tuple[str, ...]) -> clamd.Reply:
        """A whole dialogue; whatever else becomes of it, the connection is closed."""
        try:
            reply = await say(connection)
            if reply.word not in words:
                reason = _FAILURES.get(reply.word, "protocol")
                raise FilterFailure(reason, f"{connection.place.name}: answers {reply.text or reply.word}")
        except BaseException:
            connection.drop()
            raise
        if self._closed:
            connection.drop()
        elif not connection.ended:
            self._keep(connection)
        return reply

    def _keep(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        connection.place.idle.append(connection)
        if self._sweeping is None:
            self._sweeping = loop.call_later(CLAMD_IDLE, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for CLAMD_IDLE, and come back for the next."""
        self._sweeping = None
        loop = asyncio.get_running_loop()
        for place in self._places:
            while place.idle and place.idle[0].idle_since + CLAMD_IDLE <= loop.time():
                place.idle.pop(0).drop()
        waiting = [place.idle[0].idle_since for place in self._places if place.idle]
        if waiting:
            self._sweeping = loop.call_at(min(waiting) + CLAMD_IDLE, self._sweep)


def _proof() -> bytes:
    return (
        b"Subject: EICAR\r\nMIME-Version: 1.0\r\nContent-Type: application/octet-stream; name=eicar.com\r\n"
        b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(b"".join(_EICAR))
    )
