"""Passwords that a Dovecot auth service knows: its client protocol 1.1, over a unix socket, many questions at a time.

https://doc.dovecot.org/developer_manual/design/auth_protocol/
"""

import asyncio
import base64
import itertools
import os
import re

from relaymta.accept.identity import Identity, Unavailable

__all__ = ["Dovecot"]

TIMEOUT = 30.0  # Dovecot itself holds a refusal back for seconds
GREETING = 5.0  # seconds until it has said who it is
RETRY_SECONDS = 1.0
LINE_LIMIT = 65536  # of its lines
LONGEST = 8192  # of ours: behind a longer one (16384 with 2.3) it closes the connection, and with it what others have asked
NAMES_KEPT = 10_000

_ESCAPED = re.compile("\x01(.)", re.DOTALL)
_ESCAPES = {"0": "\0", "1": "\x01", "t": "\t", "r": "\r", "n": "\n"}


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
        self.names: dict[str, str] = {}  # what it calls whom, where that is not what they said

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
        response = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
        question = f"PLAIN\tservice=smtp\tsecured\trip={address}\tresp={response}\n"
        if len(question) > LONGEST - 32:
            return None
        try:
            async with asyncio.timeout(TIMEOUT):
                writer = await self._connected()
                number = next(self._numbers)
                future = self._waiting[number] = asyncio.get_running_loop().create_future()
                writer.write(f"AUTH\t{number}\t{question}".encode())
                try:
                    kind, *fields = await future
                finally:
                    self._waiting.pop(number, None)
        except TimeoutError:
            raise Unavailable(f"{self._path}: no answer from Dovecot for {TIMEOUT:.0f} s") from None
        said = {key: _unescaped(value) for key, _, value in (field.partition("=") for field in fields)}
        return self._judged(kind, said, user)

    def _judged(self, kind: str, said: dict[str, str], user: str) -> Identity | None:
        """What an answer means."""
        name = said.get("user") or user
        if name != user:
            if len(self.names) >= NAMES_KEPT:
                self.names.clear()
            self.names[user] = name
        if kind == "OK":  # nologin: the right password, and no login all the same, but where Dovecot's own would be a proxy
            return Identity(name) if "nologin" not in said or "proxy" in said else None
        if kind != "FAIL":
            raise Unavailable(f"{self._path}: Dovecot answers {kind}")
        if "temp" in said or said.get("code") == "temp_fail":
            raise Unavailable(f"{self._path}: Dovecot: {said.get('reason', 'temporary failure')}")
        return None

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is not None:
                return self._writer
            loop = asyncio.get_running_loop()
            if loop.time() < self._again:
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
                if not isinstance(error, OSError | ValueError):  # whoever asked is gone; the next one connects
                    raise
                why = "no greeting from Dovecot" if isinstance(error, TimeoutError) else str(error)
                self._again, self._reason = loop.time() + RETRY_SECONDS, f"{self._path}: {why}"
                raise Unavailable(self._reason) from None
            self._writer = writer
            self._reader = loop.create_task(self._read(reader, writer))
            return writer

    async def _greeted(self, reader: asyncio.StreamReader) -> None:
        """Its side of the greeting, up to DONE. ValueError when that is none."""
        known = False
        while True:
            line = await reader.readline()
            words = line.decode("utf-8", "replace").rstrip("\n").split("\t")
            if words[0] == "DONE":
                return
            if (not known and words[0] != "VERSION") or not line.endswith(b"\n"):  # later versions of 1 may say more behind it
                raise ValueError("this is no Dovecot auth socket for clients")
            known = True
            if words[0] == "VERSION" and words[1:2] != ["1"]:
                raise ValueError(f"Dovecot speaks version {'.'.join(words[1:])} of the protocol, not 1")

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers, until the connection ends."""
        try:
            while (line := await reader.readline()).endswith(b"\n"):  # else it ends in the middle, and says who knows what
                kind, *fields = line.decode("utf-8", "replace").rstrip("\n").split("\t")
                number = int(fields[0]) if fields and fields[0].isdecimal() and len(fields[0]) < 20 else 0
                future = self._waiting.get(number)
                if future is not None and not future.done() and kind in ("OK", "FAIL", "CONT"):  # anything else is none of ours
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
