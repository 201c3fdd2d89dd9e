"""The load: an SMTP client with many connections (RFC 5321, 2920, 3207, 4954). Written without the code of the relay.

A message is tried once: what is refused is counted, and not sent again. A message has its *due* time: in an open loop (a rate)
that is when it was to be sent, whether or not a connection was free then, so that a relay which stalls cannot hide that
(coordinated omission); in a closed loop, when its connection took it.
"""

import asyncio
import base64
import contextlib
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine
from math import sqrt
from typing import NamedTuple, cast

from relaymta.bench.ledger import Sent, State
from relaymta.bench.load import Load
from relaymta.bench.messages import Messages

__all__ = ["Generator", "Login", "Target"]

CONNECT_SECONDS = 30.0
LAST_SECONDS = 30.0  # for the replies to what is under way at the end
BACK_OFF = (0.02, 1.0)  # seconds before the next connection after one that failed: at first, at most
REPLY = 65536  # octets of replies that are not complete
JOINED = 65536  # octets of a message that are written at once
_clock = time.monotonic


class Login(NamedTuple):
    """Whom to log in as."""

    user: str
    password: str


class Target(NamedTuple):
    """Where to send. `verify`: the certificate must be valid for this name."""

    host: str
    port: int
    verify: bool = False


class Pace:
    """When each message is due, in seconds from the beginning: at `rate` messages a second, which is reached after `ramp`
    seconds."""

    def __init__(self, rate: float, ramp: float) -> None:
        self.rate, self.ramp = rate, ramp
        self._in_ramp = rate * ramp / 2

    def due(self, serial: int) -> float:
        """When this one is due."""
        if serial < self._in_ramp:
            return sqrt(2 * self.ramp * serial / self.rate)
        return self.ramp + (serial - self._in_ramp) / self.rate


class Generator:
    """One load to one target. `stop()` ends it early; `ended` says why it did: "" (all sent), "time", "stopped", or the error by
    which no connection was possible at all."""

    def __init__(self, target: Target, load: Load, sent: Sent, messages: Messages, login: Login | None = None) -> None:
        self.target, self.load, self.sent, self.login = target, load, sent, login
        self.messages = messages
        self.began = self.finished = 0.0
        self.under_way = 0
        self.connections = 0  # that were opened
        self.failures: dict[str, int] = {}  # why connections failed, and how often
        self.ended = ""
        self.context = _context(target) if load.tls != "off" else None
        self._pace = Pace(load.rate, load.ramp) if load.rate else None
        self._idle: deque[_Slot] = deque()
        self._stopping = False
        self._timer: asyncio.TimerHandle | None = None
        self._over: asyncio.Event
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send all of it, and wait for the replies."""
        load, loop = self.load, asyncio.get_running_loop()
        self._loop, self._over = loop, asyncio.Event()
        self.began = _clock()
        slots = [_Slot(self) for _ in range(load.connections)]
        step = load.ramp / load.connections
        for number, slot in enumerate(slots):
            loop.call_later(step * number, slot.begin)
        end = loop.call_later(load.seconds, self.stop, "time")
        try:
            await self._over.wait()
            end.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5 if self.ended == "stopped" else LAST_SECONDS):
                    while self.under_way:
                        await asyncio.sleep(0.005)
        finally:
            self.finished = _clock()
            end.cancel()
            for slot in slots:
                slot.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self, why: str = "stopped") -> None:
        """Begin no more messages."""
        if not self._stopping:
            self._stopping, self.ended = True, why
            if self._timer is not None:
                self._timer.cancel()
            self._over.set()

    @property
    def stopping(self) -> bool:
        """Whether no more messages begin."""
        return self._stopping

    def free(self, slot: "_Slot") -> None:
        """A connection has nothing to do: it gets the next message, now or when it is due."""
        self._idle.append(slot)
        self._pump()

    def _pump(self) -> None:
        sent, idle, pace = self.sent, self._idle, self._pace
        while idle and not self._stopping:
            serial, now = len(sent), _clock()
            if serial >= self.load.messages:
                self.stop("")
                return
            due = now
            if pace is not None:
                due = self.began + pace.due(serial)
                if due > now:
                    if self._timer is not None:
                        self._timer.cancel()
                    self._timer = self._loop.call_later(due - now, self._pump)
                    return
            header, text, end, digest = self.messages.make(serial)
            sent.add(due, digest)
            self.under_way += 1
            idle.popleft().take(serial, header, text, end)

    def task(self, work: Coroutine[None, None, None]) -> None:
        """Run a coroutine; its exceptions are its own."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def failed(self, why: str) -> None:
        """Count a connection that failed."""
        if why in self.failures or len(self.failures) < 20:
            self.failures[why] = self.failures.get(why, 0) + 1


def _context(target: Target) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not target.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Slot:
    """One of the connections that there are at a time: when it ends, the next one takes its place."""

    def __init__(self, run: Generator) -> None:
        self.run = run
        self.client: _Client | None = None
        self.message: tuple[int, bytes, bytes, bytes] | None = None
        self._pause = BACK_OFF[0]
        self._closed = False
        self._later: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Connect; or, where a connection is for so many messages, wait for the first."""
        if self._closed or self.run.stopping:
            return
        if self.run.load.per_connection:
            self.run.free(self)
        else:
            self._connect()

    def take(self, serial: int, header: bytes, text: bytes, end: bytes) -> None:
        """The next message."""
        self.message = (serial, header, text, end)
        if self.client is None:
            self._connect()
        else:
            self.client.send(*self.message)

    def ready(self, client: "_Client") -> None:
        """The connection can take a message."""
        self._pause = BACK_OFF[0]
        if self.message is not None:
            client.send(*self.message)
        else:
            self.run.free(self)

    def done(self, again: bool) -> None:
        """The message has had its end. `again`: the connection takes another."""
        self.message = None
        self.run.under_way -= 1
        if again:
            self.run.free(self)

    def lost(self, why: str, later: bool) -> None:
        """The connection has ended. `later`: it failed, so the next one is opened after a pause."""
        self.client = None
        if self.message is not None:
            self.done(False)
        with contextlib.suppress(ValueError):
            self.run._idle.remove(self)
        if why:
            self.run.failed(why)
        if self._closed:
            return
        if later:
            self._later = asyncio.get_running_loop().call_later(self._pause, self.begin)
            self._pause = min(BACK_OFF[1], self._pause * 2)
        else:
            self.begin()

    def close(self) -> None:
        """End it."""
        self._closed = True
        if self._later is not None:
            self._later.cancel()
        if self.client is not None:
            self.client.leave()

    def _connect(self) -> None:
        self.run.task(self._connected())

    async def _connected(self) -> None:
        run = self.run
        context = run.context if run.load.tls == "implicit" else None
        name = run.target.host if context is not None else None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, client = await asyncio.get_running_loop().create_connection(
                    lambda: _Client(self), run.target.host, run.target.port, ssl=context, server_hostname=name
                )
        except (OSError, TimeoutError, ssl.SSLError) as error:
            known = isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno
            self.lost(f"connecting: {os.strerror(known) if known else str(error) or 'timeout'}", True)
            return
        if self._closed:
            client.leave()


class _Client(asyncio.Protocol):
    """One connection. Each reply goes to `_next`."""

    def __init__(self, slot: _Slot) -> None:
        self.slot, self.run = slot, slot.run
        self._next: Callable[[int, bytes], None] = self._greeted
        self._rest = b""
        self._offers: list[bytes] = []
        self._carried = 0
        self._leaving = False
        self._serial = -1
        self._dotted = False  # the final dot has been written, and not been answered
        self._waiting = 0  # replies to RCPT that are to come
        self._refused: set[int] = set()
        self._worst = 0  # the code that refuses the message
        self._lost = False

    # The transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.slot.client = self
        self.run.connections += 1

    def data_received(self, data: bytes) -> None:
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > REPLY:
            self._fail("a reply without an end")
            return
        for line in lines:
            if line[3:4] == b"-":
                if len(self._offers) < 100:
                    self._offers.append(line)
                continue
            try:
                code = int(line[:3])
            except ValueError:
                self._fail(f"no reply: {line[:60]!r}")
                return
            if code == 421:
                self.run.sent.note_reply(line.strip()[:100])
            self._next(code, line)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        if self._serial >= 0:
            self._end(State.IN_DOUBT if self._dotted else State.UNSENT)
        if self.slot.client is self:
            self.slot.lost("" if self._leaving else f"closed by the relay{f': {exc}' if exc else ''}", not self._leaving)

    def leave(self) -> None:
        """Close it without a word."""
        self._leaving = True
        self.transport.abort()

    def _fail(self, why: str) -> None:
        self.run.failed(why)
        self._next = self._nothing
        self.transport.abort()

    def _nothing(self, code: int, line: bytes) -> None:
        pass

    # Before the first message

    def _greeted(self, code: int, line: bytes) -> None:
        if code != 220:
            self._fail(f"greeting: {line[:80].decode('latin-1').strip()}")
            return
        self._hello(self._offered)

    def _hello(self, then: Callable[[int, bytes], None]) -> None:
        self._offers = []
        self._next = then
        self.transport.write(b"EHLO load.bench.invalid\r\n")

    def _offers_of(self, line: bytes) -> set[bytes]:
        return {one[4:].split()[0].upper() for one in [*self._offers, line] if one[4:].split()}

    def _offered(self, code: int, line: bytes) -> None:
        if code != 250:
            self._fail(f"EHLO: {line[:80].decode('latin-1').strip()}")
            return
        if self.run.load.tls == "starttls":
            if b"STARTTLS" not in self._offers_of(line):
                self._fail("the relay does not offer STARTTLS")
                return
            self._next = self._begin_tls
            self.transport.write(b"STARTTLS\r\n")
            return
        self._greeted_again(code, line)

    def _begin_tls(self, code: int, line: bytes) -> None:
        if code != 220:
            self._fail(f"STARTTLS: {line[:80].decode('latin-1').strip()}")
            return
        self._next, self._rest = self._nothing, b""
        self.run.task(self._secured())

    async def _secured(self) -> None:
        assert self.run.context is not None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                secure = await asyncio.get_running_loop().start_tls(
                    self.transport, self, self.run.context, server_hostname=self.run.target.host
                )
        except (OSError, TimeoutError, ssl.SSLError) as error:
            self._fail(f"TLS: {error}")
            self.connection_lost(None)  # the transport tells nobody, where the handshake has failed
            return
        if secure is None:
            self.connection_lost(None)
            return
        self.transport = secure
        self._hello(self._greeted_again)

    def _greeted_again(self, code: int, line: bytes) -> None:
        if code != 250:
            self._fail(f"EHLO: {line[:80].decode('latin-1').strip()}")
            return
        self._pipelining = self.run.load.pipelining and b"PIPELINING" in self._offers_of(line)
        login = self.run.login
        if self.run.load.auth == "off" or login is None:
            self._ready()
        elif self.run.load.auth == "plain":
            self._next = self._logged_in
            token = base64.b64encode(f"\0{login.user}\0{login.password}".encode())
            self.transport.write(b"AUTH PLAIN " + token + b"\r\n")
        else:
            words = [base64.b64encode(word.encode()) for word in (login.password, login.user)]
            self._next = lambda code, line: self._asked(code, line, words)
            self.transport.write(b"AUTH LOGIN\r\n")

    def _asked(self, code: int, line: bytes, words: list[bytes]) -> None:
        if code == 334 and words:
            self.transport.write(words.pop() + b"\r\n")
        else:
            self._logged_in(code, line)

    def _logged_in(self, code: int, line: bytes) -> None:
        if code != 235:
            self._fail(f"AUTH: {line[:80].decode('latin-1').strip()}")
            return
        self._ready()

    def _ready(self) -> None:
        self._next = self._nothing
        self.slot.ready(self)

    # A message

    def send(self, serial: int, header: bytes, text: bytes, end: bytes) -> None:
        """Send a message; `slot.done` is called once."""
        self._serial, self._dotted, self._worst = serial, False, 0
        self._refused = set()
        self._data = (header, text, end)
        recipients = self.run.sent.recipients.of(serial)
        self._waiting = len(recipients)
        mail = b"MAIL FROM:<load@bench.invalid>\r\n"
        commands = [b"RCPT TO:<%s>\r\n" % address for address in recipients] + [b"DATA\r\n"]
        self._next = self._sender
        if self._pipelining:
            self._left: list[bytes] = []
            self.transport.write(mail + b"".join(commands))
        else:
            self._left = commands[::-1]
            self.transport.write(mail)

    def _further(self) -> None:
        if self._left:
            self.transport.write(self._left.pop())

    def _sender(self, code: int, line: bytes) -> None:
        if code != 250:
            self._refuse(code, line)
            if not self._pipelining:
                self._reset()
                return
        self._next = self._recipient
        self._further()

    def _recipient(self, code: int, line: bytes) -> None:
        number = self.run.sent.recipients.each - self._waiting
        self._waiting -= 1
        if code not in (250, 251):
            self._refused.add(number)
            self._refuse(code, line)
        if not self._waiting:
            self._next = self._go
            if not self._pipelining and len(self._refused) == self.run.sent.recipients.each:
                self._reset()
                return
        self._further()

    def _refuse(self, code: int, line: bytes) -> None:
        self._worst = self._worst or code
        if code != 421:
            self.run.sent.note_reply(line.strip()[:100])

    def _go(self, code: int, line: bytes) -> None:
        if code != 354:
            self._worst = self._worst or code
            self._reset()
            return
        if len(self._refused) == self.run.sent.recipients.each:
            self._next = self._given_up
            self.transport.write(b".\r\n")  # RFC 2920 3.1: 354 without a recipient
            return
        header, text, end = self._data
        self._next, self._dotted = self._answered, True
        self.run.sent.dotted[self._serial] = _clock()
        if len(text) <= JOINED:
            self.transport.write(header + text + end)
        else:
            self.transport.writelines((header, text, end))

    def _answered(self, code: int, line: bytes) -> None:
        sent, serial = self.run.sent, self._serial
        sent.answered[serial] = _clock()
        if code == 250:
            sent.names[serial] = line.rstrip()[-40:].rpartition(b" ")[2].rpartition(b"=")[2]
            if self._refused:
                sent.refused[serial] = self._refused
            self._end(State.ACCEPTED)
        else:
            self._refuse(code, line)
            self._end(State.REJECTED if code >= 500 else State.IN_DOUBT)
        self._after(code != 250)

    def _reset(self) -> None:
        self._next = self._given_up
        self.transport.write(b"RSET\r\n")

    def _given_up(self, code: int, line: bytes) -> None:
        self._end(State.REJECTED if self._worst >= 500 else State.DEFERRED)
        self._after(True)

    def _end(self, state: State) -> None:
        """The message has come to this. (421 before the dot is followed by the end of the connection.)"""
        if state is State.UNSENT and self._worst:
            state = State.REJECTED if self._worst >= 500 else State.DEFERRED
        self.run.sent.states[self._serial] = state
        self._serial, self._dotted = -1, False

    def _after(self, refused: bool) -> None:
        self._carried += 1
        self._next = self._nothing
        load = self.run.load
        if load.per_connection and self._carried >= load.per_connection:
            self._leaving, self._next = True, self._gone
            self.transport.write(b"QUIT\r\n")
            self.slot.done(False)
        elif refused:  # a relay that refuses is not asked as fast as it can
            self.slot.done(False)
            asyncio.get_running_loop().call_later(BACK_OFF[0], self._free)
        else:
            self.slot.done(True)

    def _free(self) -> None:
        if self.slot.client is self and not self.transport.is_closing():
            self.run.free(self.slot)

    def _gone(self, code: int, line: bytes) -> None:
        self.transport.close()
