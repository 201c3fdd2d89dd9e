"""One outgoing connection past EHLO: connects an asyncio transport with the pipelined client of proto.smtp_client, for many
messages."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from relaymta.errors import redacted
from relaymta.proto.smtp_client import ClientSession, Mail, Stuffer
from relaymta.send.mails import told_of
from relaymta.trace import Facts, Outgoing, Tracer

__all__ = ["MESSAGE_DATA", "TIMEOUTS", "Link", "Session"]

MESSAGE_DATA = "message data"  # the phase in which a large message is written (RFC 5321 4.5.3.2.5: data block)
# RFC 5321 4.5.3.2, seconds
TIMEOUTS = {
    "rset": 300.0, "xforward": 300.0, "mail": 300.0, "rcpt": 300.0, "data": 120.0, "final": 600.0, MESSAGE_DATA: 180.0,
}  # fmt: skip
GATHER = 32768  # octets above which pieces are written as they are, not joined


class Link(NamedTuple):
    """The other end of a connection: its IP address and port ("" and 0: a unix socket), TLS version and cipher ("": no TLS)."""

    address: str = ""
    port: int = 0
    tls: str = ""
    cipher: str = ""


class Session(asyncio.Protocol):
    """The client side of one connection in a pool. Its owner passes callbacks: `idle(session)`: it can take a message; whether it
    was sent one. `finished(session, mail)`: all replies to a message are there. `lost(session, reason)`: the connection ended,
    once."""

    def __init__(
        self,
        core: ClientSession,
        peer: str,
        now: Callable[[], float],
        idle: Callable[["Session"], bool],
        finished: Callable[["Session", Mail], None],
        lost: Callable[["Session", str], None],
        patience: float = 1.0,
    ) -> None:
        """`now()`: loop time. `patience`: a factor on the timeouts of RFC 5321."""
        self.core = core
        self.peer = peer
        self.link = Link()
        self.transport: asyncio.Transport | None = None
        self.deadline = 0.0  # loop time; 0: nothing is awaited
        self.idle_since = 0.0
        self.place = ""  # the address and port of the peer (or its path); set by who connected
        self.fell_back = False  # it is not encrypted, since starting TLS failed
        self.our_fault = False  # it was lost because of this machine: another host would not help
        self._now = now
        self._idle = idle
        self._finished = finished
        self._lost = lost
        self._patience = patience
        self._unsent = 0  # octets not yet written when the peer was heard last
        self._writable = asyncio.Event()
        self._writable.set()
        self._stream: asyncio.Task[None] | None = None
        self.read_pieces: Callable[[Mail], Any] | None = None
        self.ended = False
        self.closed_by_peer = False  # not by us, nor by the network
        self.cause = ""  # why it was lost, in detail that is for the log only
        self.leaving = False  # takes no more messages: it is closed when nothing is under way
        self.waiting = False  # in its pool's list of idle sessions
        self.tap: Outgoing | None = None
        self.secrets: tuple[str, ...] = ()  # what was said in AUTH

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over a transport that is past EHLO."""
        self.transport = transport
        transport.set_protocol(self)

    def trace(self, tracer: Tracer, names: frozenset[str], hosts: tuple[str, ...]) -> None:
        """Let those know of the dialogue who watch it, from now on. `names`: those of the site; `hosts`: the peer's."""
        known = self.tap
        tracer.outgoing(self, Facts(names=names, hosts=hosts))
        tap = self.tap
        if tap is not None and tap is not known:
            tap.hold(self.core)
            tap.hide(self.secrets)
            tap.event(f"already connected: {self.peer} {self.place}")

    def send(self, mail: Mail) -> None:
        """Start a message; allowed when `core.may_follow`."""
        if self.tap is not None:
            ident, application = told_of(mail)
            self.tap.begin(ident, application, mail.sender, [address for _, address in mail.recipients])
        self.core.moment = time.monotonic()
        self.core.begin(mail)
        self._flush()

    def take_more(self) -> None:
        """Report to the owner that this session can take a message."""
        self._idle(self)

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
        if core.streaming is None:
            awaiting = core.awaiting
        else:
            awaiting = MESSAGE_DATA
            if self._stream is None:
                self._stream = asyncio.get_running_loop().create_task(self._write_data(core.streaming))
        self.deadline = self._now() + TIMEOUTS[awaiting] * self._patience if awaiting else 0.0

    def data_received(self, data: bytes) -> None:
        core = self.core
        self._unsent = self.transport.get_write_buffer_size() if self.transport is not None else 0
        core.moment = time.monotonic()
        core.receive(data, self._unsent)
        if core.finished:
            self._report()
        if self.ended:
            return
        if core.closing:
            self.fail(core.broken[:300].decode("utf-8", "replace"))
            return
        if not (core.may_follow and self._idle(self)) and not self.ended:
            self._flush()

    def _report(self) -> None:
        """Report the mails to which all replies are there."""
        done, self.core.finished = self.core.finished, []
        for mail in done:
            self._finished(self, mail)

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
            self.closed_by_peer = exc is None or isinstance(exc, ConnectionResetError | BrokenPipeError)
            self.cause = redacted(f"connection lost: {exc}") if exc else ""
            if self.tap is not None:
                self.tap.closed(self.cause or "closed by the peer")
            self._settle()
            self._lost(self, "connection lost" if exc else "the peer closed the connection")

    def fail(self, reason: str, cause: str = "") -> None:
        """Abort the connection, and call `lost` with `reason`; `cause`: detail for the log only."""
        if self.ended:
            return
        self.ended = True
        self.cause = redacted(cause)
        if self.tap is not None:
            self.tap.closed(f"closed by us: {self.cause or reason}")
        if self._stream is not None:
            self._stream.cancel()
        if self.transport is not None:
            self.transport.abort()
        self._settle()
        self._lost(self, reason)

    def _settle(self) -> None:
        """A reply that had begun when the connection ended counts by its code."""
        self.core.moment = time.monotonic()
        self.core.ended(self._unsent)
        self.core.out.clear()
        self._report()

    def stack(self) -> list[str]:
        """The stack of the task that writes a large message, `file:line function`, outermost first; empty without one."""
        frames = self._stream.get_stack() if self._stream is not None else []
        return [f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" for frame in frames]

    def quit(self) -> None:
        """Send QUIT and close; nothing may be under way."""
        if self.ended:
            return
        self.ended = True
        if self.tap is not None:
            self.tap.said(b"QUIT\r\n")
            self.tap.closed("closed after QUIT")
        if self.transport is not None:
            self.transport.write(b"QUIT\r\n")
            self.transport.close()

    @property
    def secure(self) -> bool:
        """Whether the connection is open, and is one of TLS."""
        return self.transport is not None and self.transport.get_extra_info("ssl_object") is not None

    def cut(self) -> None:
        """End what `quit` has left of the connection."""
        if self.transport is not None:
            self.transport.abort()

    async def _write_data(self, mail: Mail) -> None:
        """Write a large message's data from disk, no faster than the peer accepts it."""
        assert self.read_pieces is not None
        whole, stuffer = False, Stuffer()
        try:
            async for piece in self.read_pieces(mail):
                await self._writable.wait()
                if self.ended or self.transport is None:
                    return
                self.deadline = self._now() + TIMEOUTS[MESSAGE_DATA] * self._patience
                self.transport.write(stuffer.feed(piece))
            if self.transport is not None:
                self.transport.write(stuffer.end())
                whole = True
        except Exception as error:  # the body is damaged or unreadable: abort, so that no final dot completes it
            self._stream = None
            self.our_fault = True
            self.fail("reading the message failed", f"reading the message failed: {error}")
            return
        self._stream = None
        self.core.moment = time.monotonic()
        self.core.data_written(whole)
        self._flush()
