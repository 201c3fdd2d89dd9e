"""The sink: an SMTP server that takes all mail, notes each copy of each message of ours for the ledger, and misbehaves as its
profile says. Written without the code of the relay.

Whether a fault happens follows from the seed and the number of the connection, or the message and how often it has come: the same
load meets the same faults.
"""

import asyncio
import contextlib
import datetime
import json
import os
import re
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvloop
from xxhash import xxh3_64

from relaymta.bench.ledger import Arrival, Arrivals
from relaymta.bench.messages import FIELD, digest_of_address
from relaymta.bench.profile import Profile, load_profile

__all__ = ["Server", "certificate", "serve"]

HEADER = 1 << 18  # octets of a header that is looked at
COMMAND = 4096  # octets of a command line
FLUSH_SECONDS = 0.05
NO_RECIPIENTS = b"503 5.5.1 No valid recipients\r\n"
IDENT = re.compile(rb"^" + FIELD + rb":[ \t]*([0-9a-f]{16})-([0-9a-f]{1,16})[ \t]*\r?$", re.M | re.I)
_clock = time.monotonic


class Server:
    """What all connections share."""

    def __init__(self, profile: Profile, seed: int, arrivals: Arrivals | None, folder: Path) -> None:
        """`folder`: where a certificate may be put."""
        self.profile = profile
        self.seed = seed
        self.arrivals = arrivals
        self.began = _clock()
        self.seen: Counter[str] = Counter()  # what has happened, by its name
        self.open: Counter[str] = Counter()  # connections by client address
        self.most = 0
        self.pairs: dict[tuple[bytes, bytes], float] = {}
        self.tries: Counter[tuple[int, int]] = Counter()  # how often a message has come
        self.context = certificate(folder) if profile.tls.offer else None
        self.tasks: set[asyncio.Task[None]] = set()
        self.faulty = any(
            (profile.cut.in_data, profile.cut.at_dot, profile.cut.after_dot, profile.cut.in_reply, profile.refuse.dot)
        )
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}
        self._flushing = False

    def happens(self, chance: float, kind: str, *key: int) -> bool:
        """Whether this fault happens here; it is counted."""
        if not chance:
            return False
        drawn = xxh3_64(f"{self.seed} {kind} {key}".encode()).intdigest() / 2**64
        if drawn >= chance:
            return False
        self.seen[kind] += 1
        return True

    def storm(self, at: str) -> bool:
        """Whether there is a storm now, which is felt there. (The first one begins when a period ends.)"""
        storm = self.profile.storm
        if not storm.every or storm.at != at or (_clock() - self.began) % storm.every < storm.every - storm.lasts:
            return False
        self.seen["storm"] += 1
        return True

    def too_fast(self, kind: str, address: str, rate: float) -> bool:
        """Whether this exceeds a rate (a second) from an address: a second's worth may come at once."""
        if not rate:
            return False
        now = _clock()
        left, at = self._buckets.get((kind, address), (max(1.0, rate), now))
        left = min(max(1.0, rate), left + (now - at) * rate)
        over = left < 1
        self._buckets[kind, address] = (left if over else left - 1, now)
        self.seen[f"{kind}: rate"] += over
        return over

    def note(self, arrival: Arrival) -> None:
        """For the ledger."""
        if self.arrivals is None:
            return
        self.arrivals.note(arrival)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write what is kept."""
        self._flushing = False
        if self.arrivals is not None:
            self.arrivals.flush()

    def report(self) -> dict[str, Any]:
        """What has happened."""
        return {"connections": self.seen["connections"], "most at once": self.most, **dict(sorted(self.seen.items()))}


def certificate(folder: Path) -> ssl.SSLContext:
    """A context for servers, with a certificate of its own (sink.pem in `folder`)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench.invalid")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("bench.invalid"), x509.DNSName("localhost")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30)).add_extension(names, critical=False).sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "sink.pem"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(pem + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


class _Body:
    """Message data as it comes: its header is kept, its body digested."""

    def __init__(self) -> None:
        self.header = b""
        self.size = 0
        self.in_body = False
        self._digest = xxh3_64()

    def feed(self, piece: bytes) -> None:
        """The next part, without dot-stuffing."""
        self.size += len(piece)
        if self.in_body:
            self._digest.update(piece)
            return
        start = max(0, len(self.header) - 3)
        self.header += piece
        end = self.header.find(b"\r\n\r\n", start)
        if end >= 0:
            self.in_body = True
            self._digest.update(self.header[end + 4 :])
            self.header = self.header[: end + 2]
        elif len(self.header) > HEADER:
            self.in_body = True

    @property
    def digest(self) -> int:
        """Of the body."""
        return int(self._digest.intdigest())

    def ident(self) -> tuple[int, int] | None:
        """(run, serial) of a message of ours."""
        match = IDENT.search(self.header)
        return (int(match[1], 16), int(match[2], 16)) if match else None


class _Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: Server) -> None:
        self.server, self.profile = server, server.profile
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._scanned = 0
        self._out: list[bytes] = []
        self._when = 0.0  # until then replies are delayed
        self._pending = 0  # replies that are delayed
        self._sender = b""
        self._recipients: list[bytes] = []
        self._body: _Body | None = None
        self._chunk = -1  # octets of BDAT that are to come; -1: none
        self._last = False
        self._carried = 0
        self._counted = False
        self._secure = False
        self._chunks: _Body | None = None  # of BDAT, between two chunks
        self._cut = False  # whether the connection ends within this message has been decided
        self._try = 0
        self._closing = False  # what comes in is not looked at any more
        self._dead = False  # and nothing is sent

    # The transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        server, limits = self.server, self.profile.connections
        self._address = str((transport.get_extra_info("peername") or ("",))[0])
        server.seen["connections"] += 1
        self._number = server.seen["connections"]
        self._slow = server.happens(self.profile.slow.chance, "slow", self._number) if self._is_slow() else False
        if server.happens(limits.dropped, "dropped", self._number):
            self._end()
            return
        full = limits.per_address and server.open[self._address] >= limits.per_address
        server.seen["over the cap"] += bool(full)
        if (
            full
            or server.happens(limits.refused, "refused", self._number)
            or server.too_fast("connection", self._address, limits.rate)
        ):
            self._last_reply(limits.reply)
            return
        if server.storm("banner"):
            self._last_reply(self.profile.storm.reply)
            return
        self._counted = True
        server.open[self._address] += 1
        server.most = max(server.most, server.open[self._address])
        self._say(b"220 sink.bench.invalid ESMTP\r\n", self.profile.slow.banner)
        self._flush()

    def _is_slow(self) -> bool:
        slow = self.profile.slow
        return bool(slow.banner or slow.reply or slow.dot)

    def connection_lost(self, exc: Exception | None) -> None:
        self._dead = True
        if self._counted:
            self._counted = False
            self.server.open[self._address] -= 1

    def _say(self, reply: bytes, delay: float = 0.0, then: Callable[[], None] | None = None) -> None:
        """Send a reply, after those before it and a delay; `then` is called when it is written, or cannot be."""
        slow = self.profile.slow
        delay = (delay or slow.reply) if self._slow else 0.0
        if not delay and not self._pending:
            self._out.append(reply)
            if then is not None:
                self._flush()
                then()
            return
        self._flush()
        self._when = max(self._when, self._loop.time()) + delay
        self._pending += 1
        self._loop.call_at(self._when, self._say_now, reply, then)

    def _say_now(self, reply: bytes, then: Callable[[], None] | None) -> None:
        self._pending -= 1
        if not self._dead:
            self.transport.write(reply)
        if then is not None:
            then()

    def _flush(self) -> None:
        if self._out and not self._dead:
            self.transport.write(b"".join(self._out))
        self._out.clear()

    def _last_reply(self, text: str) -> None:
        """A reply, behind which the connection is closed."""
        self.server.seen[text[:3]] += 1
        self._closing = True
        self._say(text.encode() + b"\r\n", 0.0, self.transport.close)

    def _end(self) -> None:
        """The connection ends at once."""
        self._dead = self._closing = True
        self._out.clear()
        if self.profile.cut.reset:
            sock = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._buffer += data
        while not self._closing and self._step():
            pass
        self._flush()

    def _step(self) -> bool:
        """Take the next part of what has come; whether there was one."""
        if self._chunk >= 0:
            return self._take_chunk()
        if self._body is not None:
            return self._take_lines()
        buffer = self._buffer
        end = buffer.find(b"\n")
        if end < 0:
            if len(buffer) > COMMAND:
                self._last_reply("500 5.5.2 Line too long")
            return False
        line = bytes(buffer[:end]).rstrip(b"\r")
        del buffer[: end + 1]
        verb, _, argument = line.partition(b" ")
        act = _VERBS.get(verb.upper(), _Connection._unknown)
        act(self, argument)
        return True

    def _take_lines(self) -> bool:
        body, buffer = self._body, self._buffer
        assert body is not None
        if buffer.startswith(b".\r\n"):
            del buffer[:3]
            self._scanned = 0
            self._complete()
            return True
        end = buffer.find(b"\r\n.\r\n", max(0, self._scanned - 4))
        upto = end + 2 if end >= 0 else buffer.rfind(b"\r\n", max(0, self._scanned - 1)) + 2
        self._scanned = len(buffer)
        if upto < 2:
            return False
        piece = bytes(buffer[:upto])
        del buffer[:upto]
        self._scanned = 0
        if piece.startswith(b"."):
            piece = piece[1:]
        body.feed(piece.replace(b"\r\n.", b"\r\n"))
        return not self._cut_here(body) and end >= 0

    def _take_chunk(self) -> bool:
        body, taken = self._body, min(self._chunk, len(self._buffer))
        assert body is not None
        body.feed(bytes(self._buffer[:taken]))
        del self._buffer[:taken]
        self._chunk -= taken
        if self._cut_here(body) or self._chunk:
            return False
        self._chunk = -1
        if self._last:
            self._complete()
        else:
            self._body, self._chunks = None, body
            self._say(b"250 2.0.0 Octets received\r\n" if self._recipients else NO_RECIPIENTS)
        return True

    def _cut_here(self, body: _Body) -> bool:
        """Whether the connection has been cut within this message data; decided once, when the header is known."""
        if self.server.faulty and not self._cut and body.in_body:
            self._cut = True
            run, serial = body.ident() or (0, 0)
            self.server.tries[run, serial] += 1
            self._try = self.server.tries[run, serial]
            if self.server.happens(self.profile.cut.in_data, "cut in data", serial, self._try):
                self._end()
                return True
        return False

    # A message

    def _complete(self) -> None:
        """All of it is there."""
        body = self._body
        assert body is not None
        self._body, self._cut = None, False
        if not self._recipients:  # chunks are not held back by the reply to RCPT
            self._say(NO_RECIPIENTS)
            return
        self._carried += 1
        server, cut, refuse = self.server, self.profile.cut, self.profile.refuse
        run, serial = body.ident() or (0, 0)
        key = (serial, self._try)
        server.seen["messages"] += 1
        if server.happens(cut.at_dot, "cut at the dot", *key):
            self._end()
            return
        if server.storm("dot"):
            self._last_reply(self.profile.storm.reply)
            return
        if server.happens(refuse.dot, "refused at the dot", *key):
            self._say(refuse.dot_reply.encode() + b"\r\n")
            return
        recipients, at = self._recipients, _clock()
        self._recipients = []
        if server.happens(cut.after_dot, "cut after the dot", *key):
            self._note(run, serial, body, recipients, at, False)
            self._end()
        elif server.happens(cut.in_reply, "cut in the reply", *key):
            self._note(run, serial, body, recipients, at, False)
            self._flush()
            self.transport.write(b"250 2.0")
            self._dead = self._closing = True
            self.transport.close()
        else:
            self._say(
                b"250 2.0.0 Taken\r\n", self.profile.slow.dot,
                lambda: self._note(run, serial, body, recipients, at, not self.transport.is_closing()),
            )  # fmt: skip

    def _note(self, run: int, serial: int, body: _Body, recipients: list[bytes], at: float, answered: bool) -> None:
        for address in recipients:
            self.server.note(
                Arrival(run, serial, body.digest, digest_of_address(address), at, min(body.size, 2**32 - 1), answered)
            )

    # Commands

    def _ehlo(self, argument: bytes) -> None:
        tls = b"250-STARTTLS\r\n" if self.server.context is not None and not self._secure else b""
        chunking = b"250-CHUNKING\r\n" if self.profile.chunking else b""
        self._say(b"250-sink.bench.invalid\r\n" + tls + chunking + b"250-PIPELINING\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n")

    def _helo(self, argument: bytes) -> None:
        self._say(b"250 sink.bench.invalid\r\n")

    def _mail(self, argument: bytes) -> None:
        limits = self.profile.connections
        self._recipients = []
        if limits.messages and self._carried >= limits.messages:
            self.server.seen["messages on a connection"] += 1
            self._last_reply(limits.reply)
        elif self.server.too_fast("message", self._address, self.profile.messages.rate):
            self._last_reply(self.profile.messages.reply)
        elif self.server.storm("mail"):
            self._last_reply(self.profile.storm.reply)
        else:
            self._sender = _address_in(argument)
            self._say(b"250 2.1.0 Ok\r\n")

    def _rcpt(self, argument: bytes) -> None:
        server, profile, address = self.server, self.profile, _address_in(argument)
        server.seen["recipients"] += 1
        if profile.greylisting.delay:
            now = _clock()
            if now < server.pairs.setdefault((self._sender, address), now + profile.greylisting.delay):
                server.seen["greylisted"] += 1
                self._say(profile.greylisting.reply.encode() + b"\r\n")
                return
        if server.happens(profile.refuse.recipient, "refused at RCPT", server.seen["recipients"]):
            self._say(profile.refuse.recipient_reply.encode() + b"\r\n")
            return
        self._recipients.append(address)
        self._say(b"250 2.1.5 Ok\r\n")

    def _data(self, argument: bytes) -> None:
        if not self._recipients:
            self._say(NO_RECIPIENTS)
            return
        self._body, self._scanned = _Body(), 0
        self._say(b"354 Go ahead\r\n")

    def _bdat(self, argument: bytes) -> None:
        words = argument.split()
        if not words or not words[0].isdigit() or len(words[0]) > 12:
            self._last_reply("501 5.5.4 BDAT without a size")
            return
        chunks, self._chunks = self._chunks, None
        self._chunk, self._last = int(words[0]), len(words) > 1
        self._body = chunks or _Body()

    def _starttls(self, argument: bytes) -> None:
        tls, context = self.profile.tls, self.server.context
        broken = tls.broken and self.server.happens(tls.chance, f"TLS {tls.broken}", self._number)
        if context is None or (broken and tls.broken == "refused"):
            self._say(b"454 4.7.0 TLS not available\r\n")
            return
        self._flush()
        self.transport.write(b"220 2.0.0 Go ahead\r\n")
        self._buffer.clear()
        if broken:
            if tls.broken == "handshake":
                self.transport.write(b"\x15\x03\x01\x00\x02\x02\x28")  # the alert handshake_failure
            self._dead = self._closing = True
            self.transport.close()
            return
        task = self._loop.create_task(self._secured(context))
        self.server.tasks.add(task)
        task.add_done_callback(self.server.tasks.discard)

    async def _secured(self, context: ssl.SSLContext) -> None:
        try:
            transport = await self._loop.start_tls(self.transport, self, context, server_side=True)
        except (OSError, ssl.SSLError):
            self.server.seen["TLS failed"] += 1
            transport = None
        if transport is None:
            self.connection_lost(None)
            return
        self.server.seen["TLS"] += 1
        self.transport, self._secure = transport, True

    def _rset(self, argument: bytes) -> None:
        self._recipients, self._chunks = [], None
        self._say(b"250 2.0.0 Ok\r\n")

    def _noop(self, argument: bytes) -> None:
        self._say(b"250 2.0.0 Ok\r\n")

    def _quit(self, argument: bytes) -> None:
        self._closing = True
        self._say(b"221 2.0.0 Bye\r\n", 0.0, self.transport.close)

    def _unknown(self, argument: bytes) -> None:
        self._say(b"500 5.5.2 Command unknown\r\n")


_VERBS: dict[bytes, Callable[[_Connection, bytes], None]] = {
    b"EHLO": _Connection._ehlo, b"HELO": _Connection._helo, b"MAIL": _Connection._mail, b"RCPT": _Connection._rcpt,
    b"DATA": _Connection._data, b"BDAT": _Connection._bdat, b"STARTTLS": _Connection._starttls, b"RSET": _Connection._rset,
    b"NOOP": _Connection._noop, b"QUIT": _Connection._quit,
}  # fmt: skip


def _address_in(argument: bytes) -> bytes:
    """What is between the angle brackets."""
    return argument.partition(b"<")[2].partition(b">")[0]


async def serve(
    server: Server, addresses: list[tuple[str, int]], ready: Callable[[list[tuple[str, int]]], None], stop: asyncio.Event
) -> None:
    """Listen until `stop`. `ready` gets the addresses, with the ports that were chosen for 0. OSError."""
    loop = asyncio.get_running_loop()
    listening: list[asyncio.Server] = []
    try:
        for host, port in addresses:
            listening.append(await loop.create_server(lambda: _Connection(server), host, port, backlog=1000))
        ready([one.sockets[0].getsockname()[:2] for one in listening])
        await stop.wait()
    finally:
        for one in listening:
            one.close()
        server.flush()


def _watch_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """End with the process that has started this one: it has the other end of standard input."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=read, daemon=True).start()


async def _run(options: dict[str, Any]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _watch_parent(loop, stop)
    profile = load_profile(Path(options["profile"])) if options["profile"] else Profile()
    arrivals = Arrivals(Path(options["arrivals"]))

    def ready(addresses: list[tuple[str, int]]) -> None:
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(dir=Path(options["arrivals"]).parent) as folder:
        server = Server(profile, options["seed"], arrivals, Path(folder))
        await serve(server, [tuple(one) for one in options["addresses"]], ready, stop)
    sys.stdout.write(json.dumps(server.report()) + "\n")


def main() -> None:
    """As a process of its own, with its options in JSON as the argument: prints its addresses when it listens, and on SIGTERM
    what has happened."""
    uvloop.run(_run(json.loads(sys.argv[-1])))


if __name__ == "__main__":
    main()
