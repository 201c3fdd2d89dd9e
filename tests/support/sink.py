"""A sink that keeps a ledger: for each message its id (X-Ledger) and a hash of its body. Written without relaymta's code."""

import asyncio
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable

import uvloop

_LEDGER = re.compile(rb"^X-Ledger: (\S+)", re.M)


class LedgerSink(asyncio.Protocol):
    """One connection: accepts and records everything. `note(id, digest, recipients)` is called before the dot is answered."""

    def __init__(self, note: Callable[[str, str, list[str]], None]) -> None:
        self.note = note
        self.buffer = bytearray()
        self.in_data = False
        self.scanned = 0
        self.sender = ""
        self.recipients: list[str] = []

    def refusal(self, sender: str, recipient: str) -> bytes:
        """The reply to a recipient that is not accepted; empty when it is."""
        return b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(b"220 sink ESMTP\r\n")  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        out = []
        while True:
            if self.in_data:
                end = self.buffer.find(b"\r\n.\r\n", max(0, self.scanned - 4))
                if end < 0:
                    self.scanned = len(self.buffer)
                    break
                message = bytes(self.buffer[: end + 2])
                del self.buffer[: end + 5]
                self.in_data, self.scanned = False, 0
                message = message.replace(b"\r\n..", b"\r\n.")
                match = _LEDGER.search(message)
                body = message.partition(b"\r\n\r\n")[2]
                self.note(match[1].decode() if match else "", hashlib.sha256(body).hexdigest(), self.recipients)
                self.recipients = []
                out.append(b"250 2.0.0 taken\r\n")
                continue
            end = self.buffer.find(b"\r\n")
            if end < 0:
                break
            line = bytes(self.buffer[:end])
            del self.buffer[: end + 2]
            word = line[:4].upper()
            if word == b"EHLO":
                out.append(b"250-sink\r\n250-PIPELINING\r\n250-SIZE 0\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n")
            elif word == b"MAIL":
                self.sender, self.recipients = line[10:].partition(b">")[0].strip(b"< ").decode(), []
                out.append(b"250 2.1.0 ok\r\n")
            elif word == b"DATA" and not self.recipients:
                out.append(b"503 5.5.1 no recipients\r\n")
            elif word == b"DATA":
                self.in_data = True
                out.append(b"354 go\r\n")
            elif word == b"QUIT":
                out.append(b"221 bye\r\n")
                self.transport.write(b"".join(out))  # type: ignore[attr-defined]
                self.transport.close()
                return
            else:
                refusal = b""
                if word == b"RCPT":
                    recipient = line[8:].partition(b">")[0].strip(b"< ").decode()
                    refusal = self.refusal(self.sender, recipient)
                    self.recipients += [] if refusal else [recipient]
                out.append(refusal or b"250 2.1.0 ok\r\n")
        if out:
            self.transport.write(b"".join(out))  # type: ignore[attr-defined]


async def serve(port: int, note: Callable[[str, str, list[str]], None]) -> asyncio.Server:
    """Listen on 127.0.0.1:port (0: any)."""
    return await asyncio.get_running_loop().create_server(lambda: LedgerSink(note), "127.0.0.1", port, backlog=500)


async def _main(port: int, ledger: str) -> None:
    with open(ledger, "a", buffering=1) as file:  # noqa: ASYNC230

        def note(ident: str, digest: str, to: list[str]) -> None:
            print(json.dumps([ident, digest, to, time.monotonic()]), file=file)

        server = await serve(port, note)
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), sys.argv[2]))
