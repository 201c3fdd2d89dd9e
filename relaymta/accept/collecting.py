"""Takes messages from the drop and the pickup folder (dropped.py): each is sent to a connection of this process, as its user
would have sent it by the socket of sendmail(1).

One worker does it, and of two programs, in an upgrade, the one that has the folder's lock. A file is removed once its message is
in the queue: when the machine or the relay dies in between, it is sent twice, and never lost.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.dropped import BAD, Broken, Converted, Folder, Message, opened_drop, opened_pickup
from relaymta.accept.user import UserConnection, name_of
from relaymta.config import Listener

__all__ = ["Collector"]

LOOK_SECONDS = 2.0
TOGETHER = 4  # messages at the same time
AGAIN_SECONDS = 60.0  # before a message is tried again that was refused for now
PIECE = 65536
OVERALL_SECONDS = 900.0  # for one message
END_SECONDS = 10.0  # for messages under way, at the end
NOTICE = """\
From: MAILER-DAEMON
To: {user}
Subject: Mail that was not sent
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

While the mail relay of this machine did not answer, `sendmail` has kept a
message of yours. The relay refuses it now:

{reason}

Its recipients:

{commands}

The administrator of this machine has the message.
"""
T = TypeVar("T")


class _Refused(Exception):
    """The message is refused for good; str() is the reply."""


class _Later(Exception):
    """It is refused for now."""


class Collector:
    """What one worker does about the two folders."""

    def __init__(self, admission: Admission, listener: Listener) -> None:
        """`listener`: that of sendmail(1)."""
        self._admission = admission
        self._listener = listener
        self._folders: dict[str, Folder] = {}  # by their key
        self._later: dict[str, float] = {}  # files that could not be dealt with, and when they are tried again (loop time)
        self._sent: dict[str, list[str]] = {}  # files whose message is in the queue, with the recipients that were refused
        self._told: dict[str, str] = {}  # what is wrong with a folder, and was logged
        self._ending = asyncio.Event()
        self._task = admission.loop.create_task(self._run())

    async def end(self) -> None:
        """Begin no message any more, finish those under way, and leave the folders to others."""
        self._ending.set()
        await asyncio.wait({self._task}, timeout=END_SECONDS)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for folder in self._folders.values():
            folder.end()

    async def _run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._ending.wait()
            for key, folder in self._there():
                try:
                    if not self._ending.is_set() and await self._thread(folder.begin):
                        await self._empty(folder)
                        self._told.pop(key, None)
                except OSError as error:
                    text = f"{key}: {folder.path}: {error.strerror or error}"
                    if self._told.get(key) != text:
                        self._told[key] = text
                        self._warn(text)

    def _there(self) -> list[tuple[str, Folder]]:
        """The folders of the current configuration."""
        local = self._admission.config.local
        for key, path, ends, opened in (
            ("local.drop", local.drop, ".drop", opened_drop), ("local.pickup", local.pickup, ".eml", opened_pickup),
        ):  # fmt: skip
            known = self._folders.get(key)
            if known is not None and str(known.path) != path:
                self._folders.pop(key).end()
            if path and path != "off" and key not in self._folders:
                self._folders[key] = Folder(path, ends, opened, key == "local.drop")
        return list(self._folders.items())

    async def _empty(self, folder: Folder) -> None:
        """Take what is there now."""
        now, names = self._admission.now(), await self._thread(folder.names)
        there = {folder.place(name) for name in names}
        self._later = {path: at for path, at in self._later.items() if path in there or not path.startswith(folder.place(""))}
        due = iter([name for name in names if self._later.get(folder.place(name), 0.0) <= now])
        await asyncio.gather(*(self._take_each(folder, due) for _ in range(TOGETHER)))

    async def _take_each(self, folder: Folder, names: Iterator[str]) -> None:
        for name in names:
            if self._ending.is_set() or self._admission.intake.draining:
                return
            try:
                await self._take(folder, name)
            except FileNotFoundError:  # somebody has removed it
                self._sent.pop(folder.place(name), None)
            except _Later:
                self._later[folder.place(name)] = self._admission.now() + AGAIN_SECONDS
            except (OSError, EOFError) as error:
                self._later[folder.place(name)] = self._admission.now() + AGAIN_SECONDS
                self._warn(f"{folder.place(name)} stays where it is for now: {error or type(error).__name__}")

    async def _take(self, folder: Folder, name: str) -> None:
        """One file: to the queue, or aside. `_Later`, OSError or EOFError: it stays where it is."""
        path = folder.place(name)
        try:
            if path not in self._sent:  # else it is only to be removed, which has failed before
                message = await self._thread(folder.open, name)
                self._sent[path] = await self._queue(message)
        except Broken as error:
            await self._put_aside(folder, name, str(error))
            return
        except _Refused as error:
            await self._put_aside(folder, name, str(error))
            await self._tell(folder, message, str(error))
            return
        if refused := self._sent[path]:
            reason = "it was sent, but not to these recipients:\n" + "\n".join(refused)
            await self._put_aside(folder, name, reason)
            await self._tell(folder, message, reason)
        else:
            await self._thread(folder.remove, name)
        del self._sent[path]

    async def _tell(self, folder: Folder, message: Message, reason: str) -> None:
        """Tell the user who has dropped a message that it was not sent: the program that did it said that it would be."""
        if not folder.drops:
            return
        user = name_of(message.user)
        text = NOTICE.format(
            user=user, reason=reason, commands="\n".join(one.decode("utf-8", "replace") for one in message.rcpts)
        )
        rcpt = f"RCPT TO:<{user}>".encode()
        notice = Message(-1, os.geteuid(), b"MAIL FROM:<>", [rcpt], Converted().take(text.encode(), True), 0, False)
        try:
            async with asyncio.timeout(OVERALL_SECONDS):
                await self._send(notice)
        except (_Refused, _Later, OSError, EOFError) as error:
            self._warn(f"{user} could not be told of a message that was not sent: {error or type(error).__name__}")

    async def _put_aside(self, folder: Folder, name: str, reason: str) -> None:
        await self._thread(folder.put_aside, name, reason)
        self._warn(f"{folder.place(name)} was moved to {BAD}/: {reason}")

    async def _queue(self, message: Message) -> list[str]:
        """Send a message, and close its file; as `_send`."""
        try:
            async with asyncio.timeout(OVERALL_SECONDS):
                return await self._send(message)
        finally:
            os.close(message.descriptor)

    async def _send(self, message: Message) -> list[str]:
        """Send it; the recipients that are refused for good, each with the reply. `_Refused` of the message, or all of them."""
        loop = self._admission.loop
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            await loop.connect_accepted_socket(lambda: UserConnection(self._admission, self._listener, message.user), theirs)
            return await _spoken(reader, writer, message, self._thread)
        finally:
            writer.close()

    def _thread(self, work: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
        return self._admission.loop.run_in_executor(self._admission.threads, work, *arguments)

    def _warn(self, text: str) -> None:
        self._admission.intake.log.event("warning", text=text)


async def _spoken(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: Message, thread: Callable[..., "asyncio.Future[bytes]"]
) -> list[str]:
    """The dialogue of one message; as `Collector._send`."""

    async def ask(line: bytes, end: bytes = b"\r\n") -> tuple[int, str]:
        writer.write(line + end)
        return await _reply(reader)

    _positive(await _reply(reader))
    _positive(await ask(b"EHLO localhost"))
    _positive(await ask(message.mail))
    refused = []
    for rcpt in message.rcpts:
        code, text = await ask(rcpt)
        if code >= 500:
            refused.append(f"{rcpt.decode('utf-8', 'replace').partition(':')[2]} {code} {text}")
        else:
            _positive((code, text))
    if len(refused) == len(message.rcpts):
        raise _Refused("\n".join(refused))
    converted, left, piece = Converted(), message.octets, message.head
    while left:
        _positive(await ask(b"BDAT %d\r\n%b" % (len(piece), piece), b""))
        piece = await _whole(thread(os.read, message.descriptor, min(PIECE, left)))
        if not piece:
            raise _Refused("the file has become shorter")
        left -= len(piece)
        if message.converts:
            piece = converted.take(piece, not left)
    _positive(await ask(b"BDAT %d LAST\r\n%b" % (len(piece), piece), b""))
    writer.write(b"QUIT\r\n")
    return refused


async def _whole(reading: "asyncio.Future[bytes]") -> bytes:
    """What is read; a reader that is cancelled waits for the thread, which has the descriptor."""
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.wait([reading])
        raise


async def _reply(reader: asyncio.StreamReader) -> tuple[int, str]:
    """The (code, text) of the next reply. EOFError: the connection was closed."""
    texts = []
    while True:
        line = await reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the connection was closed")
        texts.append(line[4:].strip().decode("utf-8", "replace"))
        if line[3:4] != b"-":
            return int(line[:3]), " ".join(texts)


def _positive(answer: tuple[int, str]) -> None:
    code, text = answer
    if code >= 500:
        raise _Refused(f"{code} {text}")
    if code >= 400:
        raise _Later(text)
