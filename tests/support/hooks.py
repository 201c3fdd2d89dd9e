"""HTTP hooks: one that does as a script says, and the program that docs/filters.md has."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.daemon import free_port, wait_for

__all__ = ["Act", "Request", "Scripted", "answers", "block", "ends", "program", "running", "says", "scripted", "silent"]

DOCUMENT = Path(__file__).parents[2] / "docs/filters.md"


class Request(NamedTuple):
    """`fields`: names in lower case."""

    line: str
    fields: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


class Running(NamedTuple):
    """A program: its URL, and the file of its secret."""

    address: str
    secret: str
    process: "subprocess.Popen[bytes]"


Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Scripted:
    """Does each of `acts` once, for one request after the other, then says that all is accepted. `connections`: how many there
    were; `open`: those that are open."""

    def __init__(self, acts: list[Act]) -> None:
        self.acts = acts
        self.requests: list[Request] = []
        self.connections = self.open = 0
        self.early = False  # it acts before it has read the body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, RuntimeError):  # of uvloop: it is closed
            while True:
                line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
                fields = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
                body = b"" if self.early else await reader.readexactly(int(fields.get("content-length", 0)))
                self.requests.append(Request(line, fields, body))
                await (self.acts.pop(0) if self.acts else says({"verdict": "accept"}))(reader, writer)
        self.open -= 1
        writer.close()


def answers(body: Any, status: str = "200 OK", *fields: str) -> bytes:
    """A whole answer; `body`: octets, or what becomes JSON."""
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(octets)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + octets


def says(*bodies: Any, then: float = 0.01) -> Act:
    """Octets as they are, or what becomes an answer, with a pause between them."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, body in enumerate(bodies):
            if number:
                await asyncio.sleep(then)
            writer.write(body if isinstance(body, bytes) else answers(body))

    return act


def ends(octets: bytes = b"", reset: bool = False) -> Act:
    """Closes the connection behind these octets."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(octets)
        await writer.drain()
        if reset:
            await asyncio.sleep(0.05)
            writer.transport.abort()
        writer.close()
        raise ConnectionError

    return act


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says nothing until the connection is closed."""
    await reader.read()
    raise ConnectionError


@contextlib.asynccontextmanager
async def scripted(*acts: Act, **more: Any) -> AsyncIterator[tuple[Scripted, str]]:
    """A running one, and its URL. `more`: of asyncio.start_server."""
    made = Scripted(list(acts))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, **more)
    scheme = "https" if "ssl" in more else "http"
    yield made, f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    server.close()


def block(begin: str) -> str:
    """The indented block of docs/filters.md that begins with this, without its indent."""
    text = DOCUMENT.read_text()
    lines = text[text.index(f"    {begin}") :].split("\n")
    end = next(at for at, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end]).strip() + "\n"


def program(judge: str = "") -> str:
    """The program of docs/filters.md as it is written, or with another function `judge`."""
    text = block("import hmac")
    found = re.search(r"^def judge\(mail\):\n(?:(?: .*)?\n)+?(?=\S)", text, re.M)
    assert found is not None
    return text.replace(found[0], judge + "\n\n") if judge else text


@contextlib.contextmanager
def running(folder: Path, secret: str = "correct horse", judge: str = "", port: int = 0) -> Iterator[Running]:
    """The program of docs/filters.md, which listens."""
    port = port or free_port()
    (folder / "hook.py").write_text(program(judge))
    file = folder / "hook-secret"
    file.write_text(f"{secret}\n")
    file.chmod(0o644)
    with (folder / "hook.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, folder / "hook.py", str(port), file], stdout=log, stderr=log)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), what="the hook")
        yield Running(f"http://127.0.0.1:{port}/hook", str(file), process)
    finally:
        process.kill()
        process.wait()
