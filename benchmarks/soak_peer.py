"""The peers of the soak: `python -m benchmarks.soak_peer PORT LEDGER`, on all loopback addresses.

By the local part of the recipient: `later` is deferred at its first attempt, `no` is rejected, `never` is always deferred, all
others are accepted and recorded (id, hash of the body, recipients, time). Every 50th connection gets 421.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import ClassVar

import uvloop

from tests.support.sink import LedgerSink

REFUSED_EACH = 50


class MoodyPeer(LedgerSink):
    """One connection. `seen`: recipients that were deferred once."""

    connections: ClassVar = 0
    seen: ClassVar[set[tuple[str, str]]] = set()

    def connection_made(self, transport: object) -> None:
        MoodyPeer.connections += 1
        if MoodyPeer.connections % REFUSED_EACH == 0:
            transport.write(b"421 4.3.2 come back later\r\n")
            transport.close()
            return
        super().connection_made(transport)

    def refusal(self, sender: str, recipient: str) -> bytes:
        local = recipient.partition("-")[0]
        if local == "no":
            return b"550 5.1.1 no such user\r\n"
        if local == "never" or (local == "later" and (sender, recipient) not in self.seen):
            if local == "later":
                self.seen.add((sender, recipient))
            return b"450 4.2.0 come back later\r\n"
        self.seen.discard((sender, recipient))
        return b""


async def serve(port: int, note: Callable[[str, str, list[str]], None]) -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(lambda: MoodyPeer(note), "0.0.0.0", port, backlog=1000)
    await server.serve_forever()


def main() -> None:
    with open(sys.argv[2], "a", buffering=1) as file:

        def note(ident: str, digest: str, to: list[str]) -> None:
            print(json.dumps([ident, digest, to, time.monotonic()]), file=file)

        uvloop.run(serve(int(sys.argv[1]), note))


if __name__ == "__main__":
    main()
