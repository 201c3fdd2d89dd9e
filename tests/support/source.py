"""A load generator that keeps a ledger: each message has an id of its own; what was acknowledged is recorded at once."""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable


class Source:
    """`connections` clients that send for ever to 127.0.0.1:port, reconnecting when they are cut off.

    `pause`: seconds of each between two messages. `acknowledged`: id -> hash of the body, recorded when 250 has arrived.
    `offered`: every id whose dot was sent.
    """

    def __init__(
        self, port: Callable[[], int], connections: int, size: int = 2000, reuse: bool = True, pause: float = 0.0
    ) -> None:
        self.port = port
        self.size = size
        self.reuse = reuse
        self._pause = pause
        self.acknowledged: dict[str, str] = {}
        self.acknowledged_at: dict[str, float] = {}  # time.monotonic(), as `sent_at`
        self.sent_at: dict[str, float] = {}
        self.offered: set[str] = set()
        self.refused = 0
        self.failed_connects = 0
        self.slowest_banner = 0.0  # seconds from connect to 220
        self._serial = 0
        self._stop = False
        self._connections = connections

    async def run(self, until: Callable[[], bool]) -> None:
        """Send until `until()` holds."""
        clients = [asyncio.create_task(self._client()) for _ in range(self._connections)]
        while not until():
            await asyncio.sleep(0.01)
        self._stop = True
        await asyncio.gather(*clients)

    async def _client(self) -> None:
        while not self._stop:
            began = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port())
            except OSError:
                self.failed_connects += 1
                await asyncio.sleep(0.02)
                continue
            try:
                async with asyncio.timeout(60):
                    await self._session(reader, writer, began)
            except (OSError, asyncio.IncompleteReadError, TimeoutError, EOFError):
                await asyncio.sleep(0.01)
            finally:
                writer.close()

    def envelope(self, ident: str) -> tuple[str, str]:
        """The sender and the recipient of a message."""
        return "a@b.example", "c@d.example"

    async def pause(self) -> None:
        """Called before each message."""
        if self._pause:
            await asyncio.sleep(self._pause)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, began: float) -> None:
        await self._reply(reader)
        self.slowest_banner = max(self.slowest_banner, time.monotonic() - began)
        writer.write(b"EHLO source\r\n")
        await self._reply(reader)
        while not self._stop:
            await self.pause()
            self._serial += 1
            ident = f"m{self._serial}"
            body = (b"%s " % ident.encode() + random.randbytes(self.size // 2).hex().encode())[: self.size] + b"\r\n"
            writer.write("MAIL FROM:<{}>\r\nRCPT TO:<{}>\r\nDATA\r\n".format(*self.envelope(ident)).encode())
            codes = [await self._reply(reader) for _ in range(3)]
            if codes != [250, 250, 354]:
                self.refused += 1
                if codes[2] == 354:
                    writer.write(b".\r\n")
                    await self._reply(reader)
                else:
                    writer.write(b"RSET\r\n")
                    await self._reply(reader)
                await asyncio.sleep(0.02)
                continue
            self.offered.add(ident)
            self.sent_at[ident] = time.monotonic()
            writer.write(b"X-Ledger: %s\r\n\r\n%s.\r\n" % (ident.encode(), body))
            if await self._reply(reader) == 250:
                self.acknowledged_at[ident] = time.monotonic()
                self.acknowledged[ident] = hashlib.sha256(body).hexdigest()
            else:
                self.refused += 1
                await asyncio.sleep(0.02)
            if not self.reuse:
                writer.write(b"QUIT\r\n")
                return

    @staticmethod
    async def _reply(reader: asyncio.StreamReader) -> int:
        while True:
            line = await reader.readuntil(b"\n")
            if line[3:4] != b"-":
                return int(line[:3])
