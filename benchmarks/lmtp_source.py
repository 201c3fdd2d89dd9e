"""A load generator for LMTP and SMTP: `python -m benchmarks.lmtp_source PORT [--protocol lmtp|smtp] [--messages N] ...`.

Sends mail to users u0, u1, ... of one domain on several connections that are reused, each message to users at random (or with
--each to all of them in turn), and prints one JSON object: replies counted, seconds, and how long the replies to message data
took (final dot to the last reply; with LMTP there is one for each recipient, RFC 2033 4.2). Half of the messages are multipart
with base64 and quoted-printable. Written without relaymta's code.
"""

import argparse
import asyncio
import base64
import json
import quopri
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import uvloop

__all__ = ["messages_of"]

TEXT = (
    "the report of last month is attached please look at the figures before we meet on Thursday and tell me what you think "
    "about the new offices für Köln and Zürich since the lease has to be signed by the end of this year regards"
)
WORDS = TEXT.split()
VARIANTS = 64  # of messages; what differs between two of the same is the Message-ID
SERIAL = b"@@@@@@@@@@@@"  # where it is


def text_of(chance: random.Random, size: int) -> str:
    """Lines of words, of about so many characters."""
    lines, length = [], 0
    while length < size:
        line = " ".join(chance.choices(WORDS, k=chance.randrange(8, 14)))
        lines.append(line)
        length += len(line) + 2
    return "\r\n".join(lines)


def header_of(chance: random.Random, kind: str) -> str:
    """A header as mail that has come from elsewhere has."""
    sender, host = chance.choice(WORDS).encode("ascii", "ignore").decode(), f"mx{chance.randrange(9)}.far.example"
    return (
        f"Received: from {host} ({host} [192.0.2.{chance.randrange(250)}])\r\n"
        f"\tby in.local.example (Postfix) with ESMTPS id {chance.getrandbits(40):X}\r\n"
        f"\tfor <somebody@local.example>; Fri, 27 Nov 2026 10:{chance.randrange(10, 60)}:07 +0000 (UTC)\r\n"
        f"From: {sender.title()} Miller <{sender}@far.example>\r\nTo: Somebody <somebody@local.example>\r\n"
        f"Subject: {' '.join(chance.choices(WORDS[:20], k=5))}\r\nDate: Fri, 27 Nov 2026 10:14:07 +0000\r\n"
        f"Message-ID: <{SERIAL.decode()}.{chance.getrandbits(64):x}@far.example>\r\n"
        f"In-Reply-To: <{chance.getrandbits(64):x}@local.example>\r\nReferences: <{chance.getrandbits(64):x}@local.example>\r\n"
        f"User-Agent: Mozilla Thunderbird\r\nMIME-Version: 1.0\r\nContent-Type: {kind}\r\n"
    )


def message(chance: random.Random, size: int, multipart: bool) -> bytes:
    """One message of about `size` octets."""
    if not multipart:
        head = header_of(chance, "text/plain; charset=us-ascii") + "Content-Transfer-Encoding: 7bit\r\n\r\n"
        return (head + text_of(chance, size - len(head)).encode("ascii", "ignore").decode() + "\r\n").encode()
    mark = f"----=_Part_{chance.getrandbits(64):x}"
    head = header_of(chance, f'multipart/mixed;\r\n\tboundary="{mark}"')
    room = size - len(head) - 400
    text = quopri.encodestring(text_of(chance, room // 2).encode()).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    file = base64.encodebytes(chance.randbytes(int((room - len(text)) / 1.37))).replace(b"\n", b"\r\n")
    return (
        f"{head}\r\nThis is a multi-part message in MIME format.\r\n--{mark}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        "Content-Transfer-Encoding: quoted-printable\r\n\r\n"
    ).encode() + text + (
        f'\r\n--{mark}\r\nContent-Type: application/pdf; name="figures.pdf"\r\nContent-Transfer-Encoding: base64\r\n'
        'Content-Disposition: attachment; filename="figures.pdf"\r\n\r\n'
    ).encode() + file + f"--{mark}--\r\n".encode()  # fmt: skip


def messages_of(size: int, seed: int = 1) -> list[bytes]:
    """VARIANTS messages of about `size` octets, dots stuffed; every second is multipart."""
    chance = random.Random(seed)
    return [message(chance, size, bool(number % 2)).replace(b"\r\n.", b"\r\n..") for number in range(VARIANTS)]


class Run:
    """What all connections share: which message is next, and what has come of those before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.hello = b"LHLO source.example\r\n" if options.protocol == "lmtp" else b"EHLO source.example\r\n"
        self.parts = [text.split(SERIAL, 1) for text in messages_of(options.size)]
        self.begun = self.accepted = self.refused = self.messages = 0
        self.said = ""
        self.times: list[float] = []
        self.open = options.connections
        self.ended = asyncio.get_running_loop().create_future()
        self._chance = random.Random(options.seed)
        self._began = f"{time.time_ns() // 1_000_000 % 1_000_000:06d}"

    def next(self) -> tuple[bytes, int, bytes] | None:
        """The commands, the number of recipients and the data of the next message; None when there is no more."""
        options = self.options
        if self.begun >= options.messages:
            return None
        serial, self.begun = self.begun, self.begun + 1
        if options.each:
            first = serial * options.recipients
            users = [(first + place) % options.users for place in range(options.recipients)]
        else:
            users = self._chance.sample(range(options.users), options.recipients)
        recipients = "".join(f"RCPT TO:<u{user}@{options.domain}>\r\n" for user in users)
        before, behind = self.parts[serial % VARIANTS]
        return (
            f"MAIL FROM:<sender@far.example>\r\n{recipients}DATA\r\n".encode(),
            len(users),
            b"%s%s%06d%s.\r\n" % (before, self._began.encode(), serial % 1_000_000, behind),
        )

    def closed(self) -> None:
        """A connection has ended."""
        self.open -= 1
        if not self.open and not self.ended.done():
            self.ended.set_result(None)


class Client(asyncio.Protocol):
    """One connection: greeting, one message after another, QUIT. `_steps`: how many replies each step takes, and what
    follows when they are there."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._buffer = b""
        self._codes: list[bytes] = []
        self._steps: deque[tuple[int, Callable[[list[bytes]], None]]] = deque([(1, self._greeted)])
        self._data, self._recipients, self._sent_at = b"", 0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.closed()

    def data_received(self, data: bytes) -> None:
        lines = (self._buffer + data).split(b"\r\n")
        self._buffer = lines.pop()
        for line in lines:
            if line[3:4] != b"-":
                self._reply(line)

    def _reply(self, line: bytes) -> None:
        if line[:1] not in b"23":
            self._run.said = line.decode("utf-8", "replace")
        self._codes.append(line[:3])
        count, done = self._steps[0]
        if len(self._codes) == count:
            self._steps.popleft()
            codes, self._codes = self._codes, []
            done(codes)

    def _ask(self, text: bytes, replies: int, done: Callable[[list[bytes]], None]) -> None:
        self._transport.write(text)
        self._steps.append((replies, done))

    def _greeted(self, codes: list[bytes]) -> None:
        self._ask(self._run.hello, 1, lambda codes: self._begin())

    def _begin(self) -> None:
        found = self._run.next()
        if found is None:
            self._ask(b"QUIT\r\n", 1, lambda codes: self._transport.close())
            return
        commands, self._recipients, self._data = found
        self._ask(commands, self._recipients + 2, self._answered)

    def _answered(self, codes: list[bytes]) -> None:
        taken = sum(code == b"250" for code in codes[1:-1])
        self._run.refused += self._recipients - taken
        if codes[-1] != b"354":
            self._ask(b"RSET\r\n", 1, lambda codes: self._begin())
            return
        self._sent_at = time.perf_counter()
        replies = taken if self._run.options.protocol == "lmtp" else 1
        self._ask(self._data, replies, lambda codes: self._ended(codes, taken))

    def _ended(self, codes: list[bytes], taken: int) -> None:
        run = self._run
        run.times.append(time.perf_counter() - self._sent_at)
        filed = sum(code == b"250" for code in codes)
        if run.options.protocol == "smtp":
            filed *= taken
        run.messages += bool(filed)
        run.accepted += filed
        run.refused += taken - filed
        self._begin()


async def main(options: argparse.Namespace) -> dict[str, object]:
    """Send everything; what came of it."""
    run, loop, began = Run(options), asyncio.get_running_loop(), time.monotonic()
    for _ in range(options.connections):
        await loop.create_connection(lambda: Client(run), "127.0.0.1", options.port)
    try:
        async with asyncio.timeout(options.seconds):
            await run.ended
    except TimeoutError:
        run.said = run.said or f"not done within {options.seconds:.0f} s"
    seconds, times = time.monotonic() - began, sorted(run.times) or [0.0]
    return {
        "messages": run.messages, "recipients": run.accepted, "refused": run.refused, "said": run.said, "seconds": seconds,
        "p50 ms": times[len(times) // 2] * 1000, "p99 ms": times[int(len(times) * 0.99)] * 1000,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--protocol", choices=["lmtp", "smtp"], default="lmtp")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--recipients", type=int, default=1, help="of each message")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--domain", default="local.example")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--each", action="store_true", help="to all users in turn, rather than at random")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of users")
    parser.add_argument("--seconds", type=float, default=120, help="after which it gives up")
    return parser.parse_args()


if __name__ == "__main__":
    found = uvloop.run(main(arguments()))
    print(json.dumps(found))
    sys.exit(0 if found["messages"] else 1)
