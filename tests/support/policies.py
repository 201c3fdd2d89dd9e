"""Policy services: one that does as a script says, and real ones."""

import asyncio
import contextlib
import grp
import os
import pwd
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from tests.support.daemon import free_port, wait_for
from tests.support.programs import PACKAGES, need

__all__ = ["Act", "Scripted", "ends", "policyd_spf", "postgrey", "says", "scripted", "silent"]

PACKAGES |= {"postgrey": "postgrey", "policyd-spf": "postfix-policyd-spf-python"}

Request = dict[str, str]
Act = Callable[["Scripted", Request, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Scripted:
    """Does each of `acts` once, for one request after the other, and then answers `answer` of the request. `requests`: what it
    was asked; `raw`: in octets; `connections`: how many there were; `open`: those that are open."""

    def __init__(self, acts: list[Act], greeting: bytes = b"") -> None:
        self.acts = acts
        self.greeting = greeting
        self.answer: Callable[[Request], bytes] = lambda request: b"action=DUNNO\n\n"
        self.raw: list[bytes] = []
        self.requests: list[Request] = []
        self.connections = self.open = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.writers.append(writer)
        if self.greeting:
            writer.write(self.greeting)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                octets = await reader.readuntil(b"\n\n")
                self.raw.append(octets)
                request = dict(line.split("=", 1) for line in octets.decode().removesuffix("\n\n").split("\n"))
                self.requests.append(request)
                if self.acts:
                    await self.acts.pop(0)(self, request, reader, writer)
                else:
                    writer.write(self.answer(request))
        self.open -= 1
        writer.close()


def says(*pieces: bytes) -> Act:
    """Says something, in pieces."""

    async def act(one: Scripted, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    return act


def ends(*pieces: bytes) -> Act:
    """Says something, and closes the connection."""

    async def act(one: Scripted, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(*pieces)(one, request, reader, writer)
        raise ConnectionAbortedError

    return act


async def silent(one: Scripted, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says nothing, until the connection is closed."""
    await reader.read()
    raise ConnectionAbortedError


@contextlib.asynccontextmanager
async def scripted(path: Path, *acts: Act, greeting: bytes = b"") -> AsyncIterator[tuple[Scripted, str]]:
    """A running one, on a unix socket, and its address."""
    made = Scripted(list(acts), greeting)
    server = await asyncio.start_unix_server(made.serve, str(path))
    try:
        yield made, f"unix:{path}"
    finally:
        server.close()
        for writer in made.writers:
            writer.close()
        os.unlink(path)


@contextlib.contextmanager
def postgrey(delay: int = 1) -> Iterator[str]:
    """The address of a running postgrey, whose triplets are known after so many seconds."""
    program, port = need("postgrey"), free_port()
    folder = Path(tempfile.mkdtemp(prefix="postgrey"))
    who = [f"--user={pwd.getpwuid(os.getuid()).pw_name}", f"--group={grp.getgrgid(os.getgid()).gr_name}"]
    command = [program, f"--inet=127.0.0.1:{port}", f"--dbdir={folder}", f"--delay={delay}", *who]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or _is_there(port), what="postgrey")
        assert process.poll() is None, (folder / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def _is_there(port: int) -> bool:
    with socket.socket() as sock:
        return not sock.connect_ex(("127.0.0.1", port))


@contextlib.contextmanager
def policyd_spf() -> Iterator[str]:
    """The address of a service that runs policyd-spf for each connection, as Postfix's spawn does. It adds what it finds, and
    refuses nothing."""
    program = need("policyd-spf")
    folder = Path(tempfile.mkdtemp(prefix="spf"))  # short: the path of a socket has at most 107 octets
    (folder / "conf").write_text("debugLevel = 0\nTestOnly = 1\nHELO_reject = False\nMail_From_reject = False\n")

    class Spawn(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            process = subprocess.Popen([program, folder / "conf"], stdin=self.connection, stdout=self.connection)
            self.server.children.append(process)  # type: ignore[attr-defined]
            process.wait()

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True
        children: list[subprocess.Popen[bytes]]

    with Server(str(folder / "s"), Spawn) as server:
        server.children = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"unix:{folder}/s"
        finally:
            server.shutdown()
            thread.join()
            for child in server.children:
                child.kill()
                child.wait()
            shutil.rmtree(folder)
