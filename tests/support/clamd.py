"""clamd: a real one with signatures of the test's, and one that does as it is told."""

import asyncio
import contextlib
import hashlib
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from relaymta.proto.clamd import INSTREAM, START
from tests.support.daemon import wait_for
from tests.support.programs import need

__all__ = ["EICAR", "MARKER", "Act", "Fake", "RealClamd", "clamd", "fake_clamd", "good", "said", "text_of"]

EICAR = b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR" + b"-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"  # in two: this file is no virus
MARKER = b"a marker that one signature is about"  # wherever it is


class RealClamd:
    """clamd, which knows EICAR as a file (Eicar-Test-Signature) and anywhere in one (Eicar-Within), and MARKER (Marker)."""

    def __init__(self, folder: Path, settings: tuple[str, ...]) -> None:
        self.path = folder / "ctl"
        self.address = f"unix:{self.path}"
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        self._program = need("clamd")
        (folder / "db").mkdir()
        (folder / "tmp").mkdir()
        hashed = f"{hashlib.md5(EICAR, usedforsecurity=False).hexdigest()}:{len(EICAR)}:Eicar-Test-Signature\n"
        (folder / "db/x.hdb").write_text(hashed)
        (folder / "db/x.ndb").write_text(f"Eicar-Within:0:*:{EICAR.hex()}\nMarker:0:*:{MARKER.hex()}\n")
        lines = (
            "Foreground yes",
            f"LocalSocket {self.path}",
            f"DatabaseDirectory {folder}/db",
            f"TemporaryDirectory {folder}/tmp",
        )
        (folder / "clamd.conf").write_text("\n".join((*lines, *settings, "")))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen([self._program, "-c", self._folder / "clamd.conf"], stdout=log, stderr=log)
        process = self.process
        wait_for(lambda: process.poll() is not None or self._answers(), what="clamd")
        assert process.poll() is None, (self._folder / "log").read_text()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(10)
            sock.connect(str(self.path))
            sock.sendall(b"zPING\0")
            return sock.recv(16) == b"PONG\0"
        return False

    def send(self, number: signal.Signals) -> None:
        """A signal. SIGKILL: it is gone afterwards."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def clamd(*settings: str) -> Iterator[RealClamd]:
    """A running clamd. `settings`: further lines of its configuration."""
    need("clamd")
    folder = Path(tempfile.mkdtemp(prefix="clamd"))  # short: the path of a socket has at most 107 octets
    made = RealClamd(folder, settings)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


Act = Callable[["Fake", int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Fake:
    """A clamd that does each of `acts` once, for one command after the other, and then answers as it should. `texts`: what it was
    shown; `connections`: how many there were."""

    def __init__(self, acts: list[Act], greeting: bytes = b"") -> None:
        self.acts = acts
        self.greeting = greeting
        self.texts: list[bytes] = []
        self.connections = 0
        self.sent = 0  # octets without a NUL

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(self.greeting)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(len(START))
            number = 0
            while command := await reader.readuntil(b"\0"):
                number += 1
                if command != INSTREAM:
                    writer.write(b"%d: PONG\0" % number)
                    continue
                await (self.acts.pop(0) if self.acts else good)(self, number, reader, writer)
        writer.close()


async def text_of(reader: asyncio.StreamReader) -> bytes:
    """A text in chunks."""
    found = []
    while size := int.from_bytes(await reader.readexactly(4), "big"):
        found.append(await reader.readexactly(size))
    return b"".join(found)


async def good(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads a text, and finds nothing."""
    fake.texts.append(await text_of(reader))
    writer.write(b"%d: stream: OK\0" % number)


def said(reply: bytes, close: bool = False, after: int | None = None, pieces: bool = False) -> Act:
    """Says something; `%d` is the command's number. `close`: closes the connection then; `after`: says it after so many octets
    instead of all; `pieces`: octet by octet."""

    async def act(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (text_of(reader) if after is None else reader.readexactly(after))
        octets = reply.replace(b"%d", b"%d" % number)
        for at in range(0, len(octets), 1 if pieces else max(1, len(octets))):
            writer.write(octets[at : at + 1] if pieces else octets)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            raise ConnectionAbortedError

    return act


@contextlib.asynccontextmanager
async def fake_clamd(*acts: Act, path: Path | None = None, greeting: bytes = b"") -> AsyncIterator[tuple[Fake, str]]:
    """A scripted one, and its address; `path`: of its unix socket."""
    made = Fake(list(acts), greeting)
    if path is None:
        server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(made.serve, str(path))
        address = f"unix:{path}"
    try:
        yield made, address
    finally:
        server.close()
