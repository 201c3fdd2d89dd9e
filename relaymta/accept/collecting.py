"""Takes messages from the drop and the pickup folder (dropped.py): each is sent to a connection of this process, as its user
would have sent it by the socket of sendmail(1).

One worker does it, and of two programs, in an upgrade, the one that has the folder's lock. A file is removed once its message is
in the queue: when the machine or the relay dies in between, it is looked at again, and the queue says who has it already (see
once.py).
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.dropped import BAD, Broken, Converted, Folder, Identity, Message, opened_drop, opened_pickup
from relaymta.accept.user import UserConnection, name_of
from relaymta.config import Listener

__all__ = ["Collector"]

LOOK_SECONDS = 2.0
TOGETHER, OF_ONE = 16, 4  # files of a folder at the same time, and of them those of one user: nobody keeps the others waiting
AGAIN_SECONDS = 60.0  # before a message is tried again that was refused for now
PIECE = 65536
OVERALL_SECONDS = 900.0  # for one message
END_SECONDS = 10.0  # for messages under way, at the end
REFUSALS_MOST = 10  # of recipients, before a new connection is made: it would be closed (intake.errors)
LATER_MOST = 100  # recipients who are refused for now, before the rest waits with them
CLOCK_SET = 1_700_000_000  # seconds UTC; a file of a time before was left while the clock of the machine was not set
SHOWN_LINES, SHOWN = 100, 2000  # lines of a notice, and characters of a log record, about recipients
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
KINDS = ("drop", "pickup")
T = TypeVar("T")


class _Refused(Exception):
    """The message is refused for good; str() is the reply."""


class _Later(Exception):
    """It is refused for now."""


@dataclass(slots=True)
class _Work:
    """What has become of a message. `left`: the commands for the recipients that neither have it nor were refused; `later`: while
    it is sent, for those of them that were refused for now; `refused`: one line for each that was refused for good; `text`: why
    all of it was."""

    identity: Identity
    rcpts: list[bytes]
    left: list[bytes]
    later: list[bytes] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    text: str = ""

    def refuse(self, at: int, reply: str) -> None:
        """One of those that are left is refused."""
        self.refused.append(f"{self.left.pop(at).decode('utf-8', 'replace').partition(':')[2]} {reply}")

    def refuse_rest(self, text: str) -> None:
        """Those that are left are refused."""
        if len(self.left) == len(self.rcpts):
            self.text = text
        self.refused += [f"{rcpt.decode('utf-8', 'replace').partition(':')[2]} {text}" for rcpt in self.left]
        self.left.clear()

    @property
    def reason(self) -> str:
        """Why the file is put aside; empty: nobody was refused."""
        if self.text or not self.refused:
            return self.text
        lines = "\n".join(self.refused)
        return lines if len(self.refused) == len(self.rcpts) else "it was sent, but not to these recipients:\n" + lines


@dataclass(slots=True)
class _State:
    """What is known of the files of a folder, by their names. `since`: when they were seen first, `oldest`: the first of these
    times (loop time; None: no file is there); `bad`: how many are put aside; `later`: when those are tried again that could not
    be dealt with (loop time); `works`: of messages that some recipients have, or all, but that are still there; `warned`: what
    was logged; `due`: files to be taken, and whose they are, `more`: there are others; `running`: those that are being taken;
    `tasks`: who does it.

    `note` and `due` are for the thread that looks, one at a time; all else changes on the loop."""

    since: dict[str, float] = field(default_factory=dict)
    oldest: float | None = None
    bad: int = 0
    later: dict[str, float] = field(default_factory=dict)
    works: dict[str, _Work] = field(default_factory=dict)
    warned: dict[str, str] = field(default_factory=dict)
    due: list[tuple[str, int]] = field(default_factory=list)
    more: bool = False
    running: dict[str, int] = field(default_factory=dict)
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def next(self, now: float) -> tuple[str, int] | None:
        """A file that is to be taken, and may be now; it is not due any more."""
        if len(self.running) < TOGETHER:
            owners = list(self.running.values())
            full = {owner for owner in owners if owners.count(owner) >= OF_ONE}
            for at, (name, owner) in enumerate(self.due):
                if owner not in full and name not in self.running and self.later.get(name, 0.0) <= now:
                    return self.due.pop(at)
        return None

    def clear_counts(self) -> None:
        """The folder is not there, or another program's to empty. Who has a message already is still known."""
        self.since.clear()
        self.oldest, self.bad = None, 0

    def note(self, there: set[str], now: float) -> None:
        """These are there. Forget all others."""
        for name in there:
            self.since.setdefault(name, now)
        known: dict[str, object]
        for known in (self.since, self.later, self.works, self.warned):  # type: ignore[assignment]
            for name in list(known):  # one by one: a difference of sets would keep the event loop waiting
                if name not in there and name not in self.running:
                    known.pop(name, None)
        self.oldest = min(self.since.values(), default=None)


_NOTHING = _State()


class Collector:
    """What one worker does about the two folders."""

    def __init__(self, admission: Admission, listener: Listener) -> None:
        """`listener`: that of sendmail(1)."""
        self._admission = admission
        self._listener = listener
        self._folders: dict[str, tuple[Folder, _State]] = {}  # by their key
        self._told: dict[str, str] = {}  # what is wrong with a folder, and was logged
        self._ending = asyncio.Event()
        self._wake = asyncio.Event()  # it is to look again, or to end
        self._task = admission.loop.create_task(self._run())

    async def end(self) -> None:
        """Begin no message any more, finish those under way, and leave the folders to others."""
        self._ending.set()
        self._wake.set()
        tasks = {self._task, *(task for _, state in self._folders.values() for task in state.tasks)}
        await asyncio.wait(tasks, timeout=END_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=END_SECONDS)
        for folder, _ in self._folders.values():
            folder.end()
        self._folders.clear()

    def set_gauges(self, gauge: Callable[[str, float], None]) -> None:
        """What is in the folders, as it was seen last; of those that are others' to empty, nothing."""
        now = self._admission.now()
        for kind in KINDS:
            _, state = self._folders.get(f"local.{kind}", (None, _NOTHING))
            gauge(f"relaymta_{kind}_files", len(state.since))
            gauge(f"relaymta_{kind}_oldest_seconds", 0.0 if state.oldest is None else now - state.oldest)
            gauge(f"relaymta_{kind}_bad_files", state.bad)

    async def _run(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            for key, folder, state in self._there():
                try:
                    if self._ending.is_set():
                        break
                    if await self._thread(folder.begin, bool(state.running)):
                        state.due = await self._thread(_due, folder, state, self._admission.now())
                        self._begin(folder, state)
                        self._told.pop(key, None)
                    else:
                        state.clear_counts()
                except Exception as error:  # nothing ends this but the end of the process
                    text = f"{key}: {folder.path}: {_said(error)}"
                    if self._told.get(key) != text:
                        self._told[key] = text
                        self._warn(text)

    def _there(self) -> list[tuple[str, Folder, _State]]:
        """The folders of the current configuration."""
        local = self._admission.config.local
        for key, path, ends, opened in (
            ("local.drop", local.drop, ".drop", opened_drop), ("local.pickup", local.pickup, ".eml", opened_pickup),
        ):  # fmt: skip
            known = self._folders.get(key)
            if known is not None and str(known[0].path) != path:
                if known[1].running:  # they are finished first, and nothing else is begun
                    known[1].due, known[1].more = [], False
                    continue
                self._folders.pop(key)[0].end()
                self._told.pop(key, None)
            if path and path != "off" and key not in self._folders:
                self._folders[key] = Folder(path, ends, opened, key == "local.drop"), _State()
        paths = {"local.drop": local.drop, "local.pickup": local.pickup}
        return [(key, *found) for key, found in self._folders.items() if str(found[0].path) == paths[key]]

    def _begin(self, folder: Folder, state: _State) -> None:
        """Take what is due, as many files as may be taken at the same time."""
        while not (self._ending.is_set() or self._admission.intake.draining):
            found = state.next(self._admission.now())
            if found is None:
                break
            name, owner = found
            state.running[name] = owner
            task = self._admission.loop.create_task(self._take_one(folder, state, name))
            state.tasks.add(task)
            task.add_done_callback(state.tasks.discard)

    async def _take_one(self, folder: Folder, state: _State, name: str) -> None:
        try:
            await self._take(folder, state, name)
        except FileNotFoundError:  # somebody has removed it
            pass
        except _Later:
            state.later[name] = self._admission.now() + AGAIN_SECONDS
        except Exception as error:  # one file keeps no other from being sent
            state.later[name] = self._admission.now() + AGAIN_SECONDS
            text = f"{folder.place(name)} stays where it is for now: {_said(error)}"
            if state.warned.get(name) != text:
                state.warned[name] = text
                self._warn(text)
        finally:
            del state.running[name]
        self._begin(folder, state)
        if state.more and not state.running:
            self._wake.set()

    async def _take(self, folder: Folder, state: _State, name: str) -> None:
        """One file: to the queue, or aside. An exception: it stays where it is."""
        try:
            message = await self._thread(folder.open, name)
        except Broken as error:
            await self._put_aside(folder, name, str(error), None)
            if error.user is not None:
                await self._tell(error.user, [], str(error))
            return
        try:
            work = state.works.get(name)
            if work is None or work.identity != message.identity:
                work = _Work(message.identity, message.rcpts, list(message.rcpts))
            try:
                await self._queue(message, work)
            finally:
                if work.left != work.rcpts:  # some have it, or are refused, or it is the turn of others first
                    state.works[name] = work
        finally:
            os.close(message.descriptor)
        if reason := work.reason:
            await self._put_aside(folder, name, reason, work.identity)
        else:
            await self._thread(folder.remove, name, work.identity)
        state.works.pop(name, None)
        if reason and folder.drops:
            await self._tell(message.user, message.rcpts, reason)

    async def _tell(self, owner: int, commands: list[bytes], reason: str) -> None:
        """Tell the user who has dropped a message that it was not sent: the program that did it said that it would be."""
        user = (await name_of(owner)).rpartition("\\")[2]  # `CORP\ann`, as Winbind has it
        text = NOTICE.format(
            user=user, reason=_some(reason.split("\n")),
            commands=_some([one.decode("utf-8", "replace") for one in commands]) or "(they could not be read)",
        )  # fmt: skip
        data, rcpts = Converted(True).take(text.encode("utf-8", "replace"), True), [f"RCPT TO:<{user}>".encode()]
        notice = Message(-1, os.geteuid(), b"MAIL FROM:<>", rcpts, data, 0, 0, False, Identity(0, 0, 0), time.time())
        work = _Work(notice.identity, rcpts, list(rcpts))
        try:
            await self._queue(notice, work)
            failed = work.reason
        except (_Later, OSError, EOFError) as error:
            failed = _said(error)
        if failed:
            self._warn(f"{user} could not be told of a message that was not sent: {failed}")

    async def _put_aside(self, folder: Folder, name: str, reason: str, identity: Identity | None) -> None:
        await self._thread(folder.put_aside, name, reason, identity)
        self._warn(f"{folder.place(name)} was moved to {BAD}/: {reason[:SHOWN]}")

    async def _queue(self, message: Message, work: _Work) -> None:
        """Send a message to those who are left. `_Later`, EOFError or OSError: not all of them have it, or are refused, and it is
        not too old to be tried again."""
        try:
            async with asyncio.timeout(OVERALL_SECONDS):
                await self._send(message, work)
        except _Refused as error:
            work.refuse_rest(str(error))
        except (_Later, EOFError, TimeoutError) as error:
            if message.since < CLOCK_SET or time.time() - message.since < self._admission.config.queue.max_age:
                raise
            work.refuse_rest(f"it is too old (queue.max_age); the last that was said: {_said(error)}")

    async def _send(self, message: Message, work: _Work) -> None:
        """As `_queue`, of any age, by as many connections as it takes. `_Refused`: those who are left are refused."""
        try:
            last = await self._send_to_each(message, work)
        finally:
            later, work.later = work.later, []
            work.left += later  # behind the others: next time it is their turn
        if later:
            raise _Later(last)

    async def _send_to_each(self, message: Message, work: _Work) -> str:
        """As `_send`, but those who are refused for now are in `work.later`; why the last one was."""
        last = ""
        while work.left and len(work.later) < LATER_MOST:
            left = len(work.left)
            try:
                reader, writer = await self._connected(message.user, message.key)
                dialogue = _Dialogue(reader, writer, self._thread)
                try:
                    await dialogue.all(message, work)
                finally:
                    writer.close()
                    last = dialogue.later or last
            except (_Later, EOFError, ConnectionError):
                if len(work.left) == left:  # else some progress was made: after many errors a connection is closed
                    raise
        return last

    async def _connected(self, user: int, file: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of this user with ourselves, for the messages of a file."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            make = lambda: UserConnection(self._admission, self._listener, user, file)  # noqa: E731
            await self._admission.loop.connect_accepted_socket(make, theirs)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    def _thread(self, work: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
        return self._admission.loop.run_in_executor(self._admission.threads, work, *arguments)

    def _warn(self, text: str) -> None:
        self._admission.intake.log.event("warning", text=text)


def _due(folder: Folder, state: _State, now: float) -> list[tuple[str, int]]:
    """The files that are to be taken now, and whose they are. It blocks: there may be very many. OSError."""
    due, there, state.more = folder.names(dict(state.later), now)
    state.note(there, now)
    with contextlib.suppress(OSError):  # a count keeps no mail waiting
        state.bad = folder.bad_files()
    return due


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__) or type(error).__name__


def _some(lines: list[str]) -> str:
    more = [f"and {len(lines) - SHOWN_LINES} more"] if len(lines) > SHOWN_LINES else []
    return "\n".join(lines[:SHOWN_LINES] + more)


class _Dialogue:
    """One connection that a message is sent by."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, thread: Callable[..., "asyncio.Future[bytes]"]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._thread = thread
        self._refusals = 0
        self.later = ""  # why a recipient was refused for now, last

    async def all(self, message: Message, work: _Work) -> None:
        """Send it to those who are left, or as many as one connection is good for."""
        _positive(await _reply(self._reader))
        _positive(await self._ask(b"EHLO localhost"))
        while work.left and self._refusals < REFUSALS_MOST:
            await self._transaction(message, work)
        self._writer.write(b"QUIT\r\n")
        while await self._reader.read(PIECE):  # to its end: then it counts no more among those of the user
            pass

    async def _transaction(self, message: Message, work: _Work) -> None:
        """Send it to the first of those who are left. 452 4.5.3 says that they are enough for this time (RFC 5321 4.5.3.1.10)."""
        _positive(await self._ask(message.mail))
        taken = 0
        while taken < len(work.left) and self._refusals < REFUSALS_MOST:
            code, text = await self._ask(work.left[taken])
            if code >= 500:
                work.refuse(taken, f"{code} {text}")
                self._refusals += 1
                continue
            if taken and code == 452 and text.startswith("4.5.3"):
                break
            if code >= 400 and code != 421:  # it keeps none of the others from it
                work.later.append(work.left.pop(taken))
                self._refusals += 1
                self.later = text
                continue
            _positive((code, text))
            taken += 1
        if taken:
            await self._data(message)
            del work.left[:taken]
        elif work.left:
            _positive(await self._ask(b"RSET"))

    async def _data(self, message: Message) -> None:
        converted, at, left, piece = Converted(False), message.at, message.octets, message.head
        while left:
            _positive(await self._ask(b"BDAT %d\r\n%b" % (len(piece), piece), b""))
            piece = await _whole(self._thread(os.pread, message.descriptor, min(PIECE, left), at))
            if not piece:
                raise _Refused("the file has become shorter")
            at, left = at + len(piece), left - len(piece)
            if message.converts:
                piece = converted.take(piece, not left)
        _positive(await self._ask(b"BDAT %d LAST\r\n%b" % (len(piece), piece), b""))

    async def _ask(self, line: bytes, end: bytes = b"\r\n") -> tuple[int, str]:
        self._writer.write(line + end)
        return await _reply(self._reader)


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
