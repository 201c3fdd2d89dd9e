"""Sinks for the benchmarks, with limits and delays: `python -m benchmarks.peers PORT KIND [KEY=VALUE ...]`.

    open      accepts everything                         limited   per address: `connections` at most, `rate` messages a second,
    grey      refuses each sender-recipient pair once               `messages` on one connection, else 421
    flaky     421 to every third connection              slow      one connection, `delay` seconds for each reply
    order     accepts everything, and records when each transaction began
With chunking=1 it offers CHUNKING, as most large providers do.

On SIGTERM it prints what it saw as one JSON object: messages, connections, the most of them at a time by address, refusals.
"""

import asyncio
import json
import signal
import sys
import time
from collections import Counter, defaultdict, deque

import uvloop


class Seen:
    """State shared by all connections of one sink."""

    def __init__(self, kind: str, options: dict[str, float]) -> None:
        self.kind = kind
        self.options = options
        self.messages = self.connections = self.refused = 0
        self.open: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.recent: dict[str, deque[float]] = defaultdict(deque)
        self.pairs: set[tuple[bytes, bytes]] = set()
        self.order: list[tuple[float, str]] = []  # kind `order`: when a transaction began, and its sender
        self.marks: list[tuple[float, int, int]] = []  # each second: time, messages, refused

    def report(self) -> dict[str, object]:
        """For the benchmark."""
        most = max(self.most.values(), default=0)
        return {"messages": self.messages, "connections": self.connections, "most open": most, "refused": self.refused,
                "marks": self.marks, "order": self.order}  # fmt: skip


class Peer(asyncio.Protocol):
    """One connection. Written without relaymta's code."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.buffer = bytearray()
        self.in_data = False
        self.chunk = 0  # octets of a BDAT chunk that are still to come
        self.carried = 0
        self.sender = b""
        self.loop = asyncio.get_running_loop()
        self.counted = False
        self.when = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        seen = self.seen
        self.transport = transport
        self.address = transport.get_extra_info("sockname")[0]
        seen.connections += 1
        limit = seen.options.get("connections", 1 if seen.kind == "slow" else 1 << 30)
        if seen.open[self.address] >= limit or (seen.kind == "flaky" and seen.connections % 3 == 0):
            seen.refused += 1
            self.say(b"421 4.7.0 too many connections\r\n")
            self.transport.close()
            return
        self.counted = True
        seen.open[self.address] += 1
        seen.most[self.address] = max(seen.most[self.address], seen.open[self.address])
        self.say(b"220 peer ESMTP\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.counted:
            self.seen.open[self.address] -= 1

    def say(self, text: bytes) -> None:
        """Reply, after the delay where there is one."""
        delay = self.seen.options.get("delay", 0.2 if self.seen.kind == "slow" else 0)
        if delay:
            self.when = max(self.when, self.loop.time()) + delay
            self.loop.call_at(self.when, self.write, text)
        else:
            self.transport.write(text)

    def write(self, text: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(text)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while not self.transport.is_closing():
            if self.chunk:
                taken = min(self.chunk, len(self.buffer))
                del self.buffer[:taken]
                self.chunk -= taken
                if self.chunk:
                    return
                self.taken()
                continue
            if self.in_data and self.buffer.startswith(b".\r\n"):  # a lone dot: no recipient was accepted
                del self.buffer[:3]
                self.in_data = False
                self.say(b"554 5.5.1 no valid recipients\r\n")
                continue
            end = self.buffer.find(b"\r\n.\r\n" if self.in_data else b"\r\n")
            if end < 0:
                return
            if self.in_data:
                del self.buffer[: end + 5]
                self.in_data = False
                self.taken()
                continue
            line = bytes(self.buffer[:end])
            del self.buffer[: end + 2]
            self.command(line[:4].upper(), line)

    def taken(self) -> None:
        """A message is whole."""
        self.seen.messages += 1
        self.carried += 1
        self.say(b"250 2.0.0 taken\r\n")

    def command(self, verb: bytes, line: bytes) -> None:
        """One command."""
        seen = self.seen
        if verb == b"EHLO":
            chunking = b"250-CHUNKING\r\n" if seen.options.get("chunking") else b""
            self.say(b"250-peer\r\n" + chunking + b"250-PIPELINING\r\n250 8BITMIME\r\n")
        elif verb == b"MAIL":
            self.sender = line
            if seen.kind == "order":
                seen.order.append((time.monotonic(), line.decode()))
            if self.too_much():
                seen.refused += 1
                self.say(b"421 4.7.0 too much from you\r\n")
                self.transport.close()
            else:
                self.say(b"250 2.1.0 ok\r\n")
        elif verb == b"RCPT" and seen.kind == "grey" and (self.sender, line) not in seen.pairs:
            seen.pairs.add((self.sender, line))
            seen.refused += 1
            self.say(b"450 4.7.1 come back later\r\n")
        elif verb == b"BDAT":
            self.chunk = int(line.split()[1])  # always the last
        elif verb == b"DATA":
            self.in_data = True
            self.say(b"354 go\r\n")
        elif verb == b"QUIT":
            self.say(b"221 bye\r\n")
            self.transport.close()
        else:
            self.say(b"250 2.0.0 ok\r\n")

    def too_much(self) -> bool:
        """Whether this message is over a limit."""
        options = self.seen.options
        if self.carried >= options.get("messages", 1 << 30):
            return True
        rate = options.get("rate", 0)
        if rate:
            recent, now = self.seen.recent[self.address], time.monotonic()
            while recent and recent[0] < now - 1:
                recent.popleft()
            if len(recent) >= rate:
                return True
            recent.append(now)
        return False


async def main(port: int, kind: str, options: dict[str, float]) -> None:
    """Serve on all loopback addresses until SIGTERM."""
    seen, loop, stop = Seen(kind, options), asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    address = str(options.pop("host", "")) or "0.0.0.0"
    server = await loop.create_server(lambda: Peer(seen), address, port, backlog=1000)
    while not stop.is_set():
        seen.marks.append((time.monotonic(), seen.messages, seen.refused))
        try:
            await asyncio.wait_for(stop.wait(), 1)
        except TimeoutError:
            continue
    server.close()
    print(json.dumps(seen.report()))


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[3:])
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], {k: v if k == "host" else float(v) for k, v in given.items()}))  # type: ignore[misc]
