"""Passwords that a Dovecot auth service knows: its client protocol 1.1, over a unix socket, many questions at a time.

https://doc.dovecot.org/developer_manual/design/auth_protocol/
"""

import asyncio
import base64
import itertools
import os

from relaymta.accept.identity import Identity, Unavailable

__all__ = ["Dovecot"]

TIMEOUT = 30.0  # Dovecot itself holds a refusal back for seconds
RETRY_SECONDS = 1.0
LINE_LIMIT = 8192


class Dovecot:
    """One connection, made when it is first needed and again when it is lost."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[list[str]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._asking = 0  # who waits for an answer, or for the connection
        self._closed = False
        self._again = 0.0  # not tried before (loop time)
        self._reason = ""

    async def password(self, user: str, password: str, address: str) -> Identity | None:
        """Who that is; None for a wrong password. Unavailable when Dovecot does not say."""
        self._asking += 1
        try:
            return await self._password(user, password, address)
        finally:
            self._asking -= 1
            self._hang_up()

    def close(self) -> None:
        """It is not needed any more: hang up when the last who asks has an answer."""
        self._closed = True
        self._hang_up()

    def _hang_up(self) -> None:
        if self._closed and not self._asking and self._writer is not None:
            self._writer.close()
            self._writer = None

    async def _password(self, user: str, password: str, address: str) -> Identity | None:
        try:
            async with asyncio.timeout(TIMEOUT):
                writer = await self._connected()
                number = next(self._numbers)
                future = self._waiting[number] = asyncio.get_running_loop().create_future()
                response = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
                line = f"AUTH\t{number}\tPLAIN\tservice=smtp\tsecured\trip={address}\tresp={response}\n"
                writer.write(line.encode())
                try:
                    kind, *fields = await future
                finally:
                    self._waiting.pop(number, None)
        except TimeoutError:
            raise Unavailable(f"{self._path}: no answer from Dovecot for {TIMEOUT:.0f} s") from None
        said = dict(field.partition("=")[::2] for field in fields)
        if kind == "OK":
            return Identity(said.get("user", user))
        if "temp" in said:
            raise Unavailable(f"{self._path}: Dovecot: {said.get('reason', 'temporary failure')}")
        return None

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is not None:
                return self._writer
            loop = asyncio.get_running_loop()
            if loop.time() < self._again:
                raise Unavailable(self._reason)
            try:
                reader, writer = await asyncio.open_unix_connection(self._path, limit=LINE_LIMIT)
                try:
                    writer.write(f"VERSION\t1\t1\nCPID\t{os.getpid()}\n".encode())
                    await self._greeted(reader)
                except BaseException:  # cancelled, too: nobody else knows of it
                    writer.close()
                    raise
            except (OSError, ValueError) as error:
                self._again, self._reason = loop.time() + RETRY_SECONDS, f"{self._path}: {error}"
                raise Unavailable(self._reason) from None
            self._writer = writer
            self._reader = loop.create_task(self._read(reader, writer))
            return writer

    async def _greeted(self, reader: asyncio.StreamReader) -> None:
        """Its side of the greeting, up to DONE. ValueError when that is none."""
        while True:
            words = (await reader.readline()).decode("utf-8", "replace").rstrip("\n").split("\t")
            if words[0] == "DONE":
                return
            if words[0] not in ("VERSION", "MECH", "SPID", "CUID", "COOKIE", "MECHS"):
                raise ValueError("this is no Dovecot auth socket for clients")
            if words[0] == "VERSION" and words[1:2] != ["1"]:
                raise ValueError(f"Dovecot speaks version {'.'.join(words[1:])} of the protocol, not 1")

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers, until the connection ends."""
        try:
            while line := await reader.readline():
                kind, number, *fields = line.decode("utf-8", "replace").rstrip("\n").split("\t")
                future = self._waiting.get(int(number))
                if future is not None and not future.done() and kind in ("OK", "FAIL"):
                    future.set_result([kind, *fields])
        except (OSError, ValueError):
            pass
        if self._writer is writer:
            self._writer = None
        writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable(f"{self._path}: Dovecot closed the connection"))
