"""A server of the HTTP API in the process of the test, without a relay: what it would ask is noted."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from relaymta.admin.tokens import Token, expanded, fresh, hashed, written
from relaymta.api.serving import Server
from relaymta.config import Config

LISTENER: dict[str, Any] = {"listener": [{"address": "127.0.0.1:2525"}], "hostname": "relay.example"}


class Asked:
    """Stands for Asker. `asked`: on whose behalf; `answer`: what each verb would answer."""

    def __init__(self, answer: Any = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answer = answer

    async def __call__(self, by: tuple[str, str], verb: Callable[[Any], Any]) -> tuple[Any, list[int]]:
        self.asked.append(by)
        return (self.answer(verb) if callable(self.answer) else {}), []

    async def stream(self, by: tuple[str, str], verb: Callable[[Any], Any]) -> AsyncGenerator[bytes, None]:
        self.asked.append(by)
        yield b"x"

    def close(self) -> None:
        pass


class Serving:
    """`tcp`: the base URL; `unix`: the path of the socket; `server`; `asked`; `log`: its records."""

    def __init__(self, folder: Path, admin: dict[str, Any]) -> None:
        self.folder = folder
        self.port = socket.socket()
        self.port.bind(("127.0.0.1", 0))
        self.port.listen()  # who connects early waits
        self.number = self.port.getsockname()[1]
        self.tcp = f"http://127.0.0.1:{self.number}"
        self.path = folder / "admin.sock"
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(self.path))
        unix.listen()
        given = LISTENER | {
            "spool": str(folder), "log": {"file": str(folder / "log")},
            "admin": {"listen": f"127.0.0.1:{self.number}", **admin},
        }  # fmt: skip
        self.server = Server(Config.model_validate(given), {"unix": unix, "tcp": self.port})
        self.asked = self.server._ask = self.server._page._ask = Asked()  # type: ignore[assignment]

    def token(self, name: str, *scopes: str, expires: float = 0.0) -> str:
        """Add a token; the token."""
        path, made = self.folder / "admin-tokens.json", fresh()
        known = json.loads(path.read_text())["tokens"] if path.exists() else []
        tokens = [Token(**one) for one in known]
        row = Token(name=name, hash=hashed(made), scopes=expanded(list(scopes)), expires=expires)
        path.write_text(written([*tokens, row]))
        return made

    def revoke(self, *names: str) -> None:
        """Remove tokens."""
        path = self.folder / "admin-tokens.json"
        path.write_text(written([Token(**one) for one in json.loads(path.read_text())["tokens"] if one["name"] not in names]))

    def noted(self) -> list[dict[str, Any]]:
        """The log, as far as it was written."""
        self.server.log._closing = True  # at once
        self.server.log.close()
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


@asynccontextmanager
async def serving(folder: Path, **admin: Any) -> AsyncIterator[tuple[Serving, aiohttp.ClientSession]]:
    """A server, and a client that connects over TCP."""
    import asyncio

    found, closed = Serving(folder, admin), asyncio.StreamReader()
    task = asyncio.create_task(found.server.run(closed))
    async with aiohttp.ClientSession(found.tcp, cookie_jar=aiohttp.DummyCookieJar()) as client:
        try:
            yield found, client
        finally:
            closed.feed_eof()
            await task


async def spoken(number: int, *pieces: bytes) -> bytes:
    """What the server at a port answers to octets that come in pieces; b"" where it has closed the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        writer.write_eof()
        async with asyncio.timeout(60):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
