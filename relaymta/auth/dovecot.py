"""Password verification by a Dovecot auth service: its client protocol 1.1 over a unix socket, with many requests in progress at
a time.

https://doc.dovecot.org/developer_manual/design/auth_protocol/
"""

import asyncio
import base64
import itertools
import os
import re

from relaymta.auth.identity import Identity, Unavailable

__all__ = ["Dovecot"]

TIMEOUT = 30.0  # seconds for an answer: Dovecot itself delays a refusal by some
GREETING = 5.0  # seconds for Dovecot's side of the handshake
RETRY_SECONDS = 1.0
LINE_LIMIT = 65536  # octets of a line from Dovecot
LONGEST = (
    8192  # octets of a line to Dovecot: on a longer one (16384 with 2.3) it closes the connection and fails all requests on it
)
NAMES_KEPT = 10_000

_ESCAPED = re.compile("\x01(.)", re.DOTALL)
_ESCAPES = {"0": "\0", "1": "\x01", "t": "\t", "r": "\r", "n": "\n"}


class Dovecot:
    """A client of one auth socket. It has one connection, opened on first use and again after it was lost."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[list[str]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._pending = 0  # requests that wait for an answer or for the connection
        self._closed = False
        self._retry_at = 0.0  # no new connection before this (loop time)
        self._reason = ""
        self.names: dict[str, str] = {}  # login name -> Dovecot's user name, where they differ

    async def password(self, user: str, password: str, address: str) -> Identity | None:
        """The identity of `user`; None for a wrong password or a user that may not log in. `address`: the client's, for Dovecot's
        own policy. Unavailable: no answer, or a temporary failure."""
        self._pending += 1
        try:
            return await self._password(user, password, address)
        finally:
            self._pending -= 1
            self._close_if_idle()

    def close(self) -> None:
        """No more requests will come (a reload replaced this one): close the connection after the last answer."""
        self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closed and not self._pending and self._writer is not None:
            self._writer.close()
            self._writer = None

    async def _password(self, user: str, password: str, address: str) -> Identity | None:
        response = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
        request = f"PLAIN\tservice=smtp\tsecured\trip={address}\tresp={response}\n"
        if len(request) > LONGEST - 32:
            return None
        try:
            async with asyncio.timeout(TIMEOUT):
                writer = await self._connected()
                number = next(self._numbers)
                future = self._waiting[number] = asyncio.get_running_loop().create_future()
                writer.write(f"AUTH\t{number}\t{request}".encode())
                try:
                    kind, *fields = await future
                finally:
                    self._waiting.pop(number, None)
        except TimeoutError:
            raise Unavailable(f"{self._path}: no answer from Dovecot for {TIMEOUT:.0f} s") from None
        parameters = {key: _unescaped(value) for key, _, value in (field.partition("=") for field in fields)}
        return self._identity(kind, parameters, user)

    def _identity(self, kind: str, parameters: dict[str, str], user: str) -> Identity | None:
        """The identity that an answer (`kind`: OK, FAIL or CONT) stands for; None for a refusal. Unavailable: a temporary
        failure, or CONT."""
        name = parameters.get("user") or user
        if name != user:
            if len(self.names) >= NAMES_KEPT:
                self.names.clear()
            self.names[user] = name
        if kind == "OK":  # nologin: right password, login refused; with "proxy", Dovecot itself would pass the login on
            return Identity(name) if "nologin" not in parameters or "proxy" in parameters else None
        if kind != "FAIL":
            raise Unavailable(f"{self._path}: Dovecot answers {kind}")
        if "temp" in parameters or parameters.get("code") == "temp_fail":
            raise Unavailable(f"{self._path}: Dovecot: {parameters.get('reason', 'temporary failure')}")
        return None

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is not None:
                return self._writer
            loop = asyncio.get_running_loop()
            if loop.time() < self._retry_at:
                raise Unavailable(self._reason)
            writer = None
            try:
                async with asyncio.timeout(GREETING):
                    reader, writer = await asyncio.open_unix_connection(self._path, limit=LINE_LIMIT)
                    writer.write(f"VERSION\t1\t1\nCPID\t{os.getpid()}\n".encode())
                    await self._greeted(reader)
            except BaseException as error:
                if writer is not None:
                    writer.close()
                if not isinstance(error, OSError | ValueError):  # the request was cancelled; the next one connects
                    raise
                why = "no greeting from Dovecot" if isinstance(error, TimeoutError) else str(error)
                self._retry_at, self._reason = loop.time() + RETRY_SECONDS, f"{self._path}: {why}"
                raise Unavailable(self._reason) from None
            self._writer = writer
            self._reader = loop.create_task(self._read(reader, writer))
            return writer

    async def _greeted(self, reader: asyncio.StreamReader) -> None:
        """Read Dovecot's handshake up to DONE. ValueError: it is not that of an auth client socket, or of another major
        version."""
        versioned = False
        while True:
            line = await reader.readline()
            words = line.decode("utf-8", "replace").rstrip("\n").split("\t")
            if words[0] == "DONE":
                return
            if (not versioned and words[0] != "VERSION") or not line.endswith(
                b"\n"
            ):  # later minor versions may send other lines after it
                raise ValueError("this is no Dovecot auth socket for clients")
            versioned = True
            if words[0] == "VERSION" and words[1:2] != ["1"]:
                raise ValueError(f"Dovecot uses version {'.'.join(words[1:])} of the protocol, not 1")

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read answers until the connection ends; then fail all pending requests."""
        try:
            while (line := await reader.readline()).endswith(b"\n"):  # an incomplete last line is dropped
                kind, *fields = line.decode("utf-8", "replace").rstrip("\n").split("\t")
                number = int(fields[0]) if fields and fields[0].isdecimal() and len(fields[0]) < 20 else 0
                future = self._waiting.get(number)
                if (
                    future is not None and not future.done() and kind in ("OK", "FAIL", "CONT")
                ):  # any other line is no answer to AUTH
                    future.set_result([kind, *fields[1:]])
        except (OSError, ValueError):
            pass
        if self._writer is writer:
            self._writer = None
        writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable(f"{self._path}: Dovecot closed the connection"))


def _unescaped(value: str) -> str:
    return _ESCAPED.sub(lambda found: _ESCAPES.get(found[1], found[1]), value)
