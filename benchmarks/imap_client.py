"""Clients that make load: IMAP, POP3 and LMTP on asyncio, in raw octets. Written without relaymta's code.

A session waits for the end of an answer by its last line, and does not look at the rest: the server is what is measured.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import cast

__all__ = [
    "Refused", "Session", "all_paced", "at_once", "delivered", "delivering", "imap_session", "logged_in", "paced", "pop3_session",
    "with_scram",
]  # fmt: skip

TAG = b"gen7 "  # of every command; no line of a message begins so
OK = TAG + b"OK"
TAIL = 1024  # octets that are kept of an answer that has not ended; more than a last line has
EXISTS = re.compile(rb"^\* ([0-9]+) EXISTS", re.MULTILINE)


class Refused(Exception):
    """The server has not done what was asked, or has closed the connection."""


Ends = Callable[[bytes], bool]  # whether an answer ends here, by its last TAIL octets at least


def line(tail: bytes) -> bool:
    """One line, or some."""
    return tail.endswith(b"\r\n")


def last_line(tail: bytes) -> int:
    """Where it begins."""
    return tail.rfind(b"\n", 0, -1) + 1


def tagged(tail: bytes) -> bool:
    """The end of an IMAP command (RFC 9051 2.2.2)."""
    return tail.endswith(b"\r\n") and tail.startswith(TAG, last_line(tail))


def challenged(tail: bytes) -> bool:
    """As `tagged`, or a command continuation request (RFC 9051 7.6), which the last line is."""
    return tail.endswith(b"\r\n") and tail.startswith((TAG, b"+"), last_line(tail))


def dotted(tail: bytes) -> bool:
    """A multi-line response of POP3, or an error (RFC 1939 3)."""
    return tail.endswith(b"\r\n.\r\n") or (tail.startswith(b"-ERR") and tail.endswith(b"\r\n"))


def coded(tail: bytes) -> bool:
    """The last line of an LMTP reply (RFC 5321 4.2.1)."""
    return tail.endswith(b"\r\n") and tail[last_line(tail) + 3 :].startswith(b" ")


def ready(tail: bytes) -> bool:
    """The replies to a transaction that is sent at once, up to that to DATA."""
    return tail.endswith(b"\r\n") and tail.startswith((b"354 ", b"5"), last_line(tail))


class Session(asyncio.Protocol):
    """A connection. `greeting`: its first line, when it has come. `port`: of this end."""

    def __init__(self) -> None:
        self.greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waits: asyncio.Future[bytes] = self.greeting
        self._ends: Ends = line
        self._answered: Callable[[bytes], None] = self._settle
        self._pieces: list[bytes] = []
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.port: int = transport.get_extra_info("sockname")[1]

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set_result(None)
        if not self._waits.done():
            self._waits.set_exception(Refused(f"the connection has ended: {exc}; {self._tail!r}"))

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        tail = self._tail + data if self._tail else data
        if not self._ends(tail):
            self._tail = tail[-TAIL:]
            return
        answer = data if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._tail = b""
        self._answered(answer)

    def _settle(self, answer: bytes) -> None:
        if not self._waits.done():  # what nobody asked for is dropped: the server says that it ends
            self._waits.set_result(answer)

    def close(self) -> None:
        self._transport.close()

    async def ask(self, octets: bytes, ends: Ends = tagged) -> bytes:
        """Send something; its answer."""
        self._waits = asyncio.get_running_loop().create_future()
        self._ends, self._answered = ends, self._settle
        self._transport.write(octets)
        return await self._waits

    async def command(self, text: bytes) -> bytes:
        """An IMAP command, without tag and end: its answer. Refused when it is not OK."""
        answer = await self.ask(TAG + text + b"\r\n")
        if not answer.startswith(OK, last_line(answer)):
            raise Refused(f"{text[:100]!r}: {answer[-300:]!r}")
        return answer

    async def each(self, commands: Iterable[bytes], times: list[float], holds: bytes = b"") -> None:
        """IMAP commands, one behind the other; `times` gets the seconds of each. Refused when one is not OK, or `holds` is not in
        its answer. Nothing is awaited between them: that would cost more than all the rest here."""
        done = self._waits = asyncio.get_running_loop().create_future()
        left, sent_at, clock = iter(commands), 0.0, time.perf_counter

        def send() -> None:
            nonlocal sent_at
            text = next(left, None)
            if text is None:
                done.set_result(b"")
                return
            sent_at = clock()
            self._transport.write(b"%s%s\r\n" % (TAG, text))

        def answered(answer: bytes) -> None:
            times.append(clock() - sent_at)
            if answer.startswith(OK, last_line(answer)) and holds in answer:
                send()
            else:
                done.set_exception(Refused(f"no {holds!r} or not OK: {answer[-300:]!r}"))

        self._ends, self._answered = tagged, answered
        send()
        await done

    async def idle(self, told: Callable[[int], None]) -> None:
        """Begin IDLE (RFC 9051 6.3.13); from now on `told(n)` is called for each "* n EXISTS"."""
        begun = self._waits = asyncio.get_running_loop().create_future()

        def hear(lines: bytes) -> None:
            if not begun.done():
                begun.set_result(lines)  # "+" comes before all else
            for number in EXISTS.findall(lines):
                told(int(number))

        self._ends, self._answered = line, hear
        self._transport.write(TAG + b"IDLE\r\n")
        if not (await begun).startswith(b"+"):
            raise Refused(f"IDLE: {begun.result()!r}")


async def connected(port: int, secure: ssl.SSLContext | None = None) -> Session:
    """A connection to this machine, greeted; `secure`: with TLS from the first octet."""
    loop = asyncio.get_running_loop()
    name = "localhost" if secure else None
    _, session = await loop.create_connection(Session, "127.0.0.1", port, ssl=secure, server_hostname=name)
    await session.greeting
    return session


async def logged_in(port: int, user: str, password: str, secure: ssl.SSLContext | None = None) -> Session:
    """An IMAP session of a user."""
    session = await connected(port, secure)
    await session.command(f"LOGIN {user} {password}".encode())
    return session


async def imap_session(port: int, user: str, password: str) -> None:
    """Log in and out."""
    session = await logged_in(port, user, password)
    await session.command(b"LOGOUT")
    await session.gone


async def pop3_session(port: int, user: str, password: str, messages: int = 10) -> None:
    """Log in, UIDL, fetch messages, QUIT."""
    session = await connected(port)
    for text, ends, least in [
        (f"USER {user}", line, 1), (f"PASS {password}", line, 1), ("UIDL", dotted, 10 * messages),
        *((f"RETR {number + 1}", dotted, 3000) for number in range(messages)), ("QUIT", line, 1),
    ]:  # fmt: skip
        answer = await session.ask(text.encode() + b"\r\n", ends)
        if not answer.startswith(b"+OK") or len(answer) < least:
            raise Refused(f"{text}: {answer[:300]!r}")
    await session.gone


@lru_cache
def salted(password: str, salt: bytes, iterations: int) -> bytes:
    """SaltedPassword (RFC 5802 3); clients may keep it (RFC 5802 5.1)."""
    return hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)


async def with_scram(port: int, user: str, password: str) -> None:
    """As `imap_session`, with SCRAM-SHA-256 (RFC 7677)."""
    session = await connected(port)
    bare = f"n={user},r=cnonce".encode()

    async def said(octets: bytes) -> bytes:
        answer = await session.ask(octets + b"\r\n", challenged)
        if not answer.startswith(b"+"):
            raise Refused(f"SCRAM: {answer!r}")
        return base64.b64decode(answer[2:])

    await said(TAG + b"AUTHENTICATE SCRAM-SHA-256")
    first = await said(base64.b64encode(b"n,," + bare))
    fields = dict(field.split(b"=", 1) for field in first.split(b","))
    final = b"c=biws,r=" + fields[b"r"]
    key = hmac.digest(salted(password, base64.b64decode(fields[b"s"]), int(fields[b"i"])), b"Client Key", "sha256")
    signature = hmac.digest(hashlib.sha256(key).digest(), b",".join((bare, first, final)), "sha256")
    proof = bytes(one ^ other for one, other in zip(key, signature, strict=True))
    await said(base64.b64encode(final + b",p=" + base64.b64encode(proof)))
    if not (await session.ask(b"\r\n")).startswith(OK):
        raise Refused("SCRAM failed")
    await session.command(b"LOGOUT")
    await session.gone


async def at_once(clients: int, count: int, work: Callable[[int], Awaitable[object]]) -> list[float]:
    """`work(client)`, `count` times in all, each of some clients again and again: the seconds of each."""
    times: list[float] = []

    async def client(number: int) -> None:
        for _ in range(max(1, count // clients)):
            began = time.perf_counter()
            await work(number)
            times.append(time.perf_counter() - began)

    await asyncio.gather(*map(client, range(clients)))
    return times


async def all_paced(works: Iterable[Callable[[], Awaitable[object]]], a_second: float, ended: Callable[[], bool]) -> list[float]:
    """Some of `paced` at the same time, each so many times a second: the seconds of each."""
    return [seconds for times in await asyncio.gather(*(paced(work, a_second, ended) for work in works)) for seconds in times]


async def paced(work: Callable[[], Awaitable[object]], a_second: float, ended: Callable[[], bool]) -> list[float]:
    """`work()`, so many times a second: the seconds of each. What begins late, since the one before took long, counts from when
    it was due: what waits behind a pause of the server is not left out."""
    times: list[float] = []
    due = time.perf_counter()
    while not ended():
        began = due
        if (rest := due - time.perf_counter()) > 0:
            await asyncio.sleep(rest)
            began = time.perf_counter()
        await work()
        times.append(time.perf_counter() - began)
        due += 1 / a_second
    return times


async def delivering(port: int) -> Session:
    """An LMTP session."""
    session = await connected(port)
    await session.ask(b"LHLO source.example\r\n", coded)
    return session


async def delivered(session: Session, address: str, data: bytes) -> float:
    """Deliver a message, dots stuffed, by LMTP: when its data was sent (time.perf_counter)."""
    transaction = f"MAIL FROM:<sender@far.example>\r\nRCPT TO:<{address}>\r\nDATA\r\n"
    answer = await session.ask(transaction.encode(), ready)
    if not answer.startswith(b"354", last_line(answer)):
        raise Refused(f"LMTP: {answer!r}")
    sent_at = time.perf_counter()
    answer = await session.ask(data + b".\r\n", coded)
    if not answer.startswith(b"250"):
        raise Refused(f"LMTP: {answer!r}")
    return sent_at
