"""Templates (Jinja2) of messages that are submitted by HTTP: rendered in processes of their own (templating.py), which a worker
starts when the first is there."""

import asyncio
import contextlib
import itertools
import signal
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import msgspec

from relaymta.accept.http.exchange import ENDED, KILL, LENGTH, RENDER, REQUEST, Job, One, Rendered, framed
from relaymta.accept.http.models import (
    LONGEST_SUBJECT,
    LONGEST_VALUE,
    Entry,
    Message,
    Wrong,
    check_header,
    check_text,
    is_template,
    with_rendered,
)  # fmt: skip
from relaymta.accept.http.places import Full, Places
from relaymta.control import program
from relaymta.errors import RelayError
from relaymta.log import Log

__all__ = ["SECONDS", "Templates", "Unavailable"]

SECONDS = 2.0  # of CPU time for a request of up to TOGETHER messages, and in proportion for more
TOGETHER = 1000
AT_ONCE = 4  # batches that are rendered at the same time, and as many single messages; one fewer of one account
WAIT_SECONDS = 30.0  # for that
TEXT_MOST = 4 << 20  # characters of text, and of html, also of what is rendered
AHEAD = 16  # messages that are sent before those in front of them are rendered,
AHEAD_OCTETS = 1 << 18  # while they have no more than so many octets
ANSWER_SECONDS = 10.0  # beside five times the CPU time: for a message to be rendered on a busy machine
NOTICE_SECONDS = 5.0  # to be told why a process has ended
_FRAME = 65536  # octets of a frame beside what is rendered

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class Unavailable(RelayError):
    """Templates cannot be rendered now, whatever is in them."""


class _Died(Exception):
    """The process of a request has ended before it was done. `by`: the signal, 0: none, None: that is not known; `template`: the
    number of the one that it worked on, or -1."""

    def __init__(self, by: int | None, template: int) -> None:
        super().__init__(by)
        self.by, self.template = by, template


class Templates:
    """A worker's process that renders templates."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._places = Places(AT_ONCE, WAIT_SECONDS), Places(AT_ONCE, WAIT_SECONDS)  # single messages, batches
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._numbers = itertools.count()
        self._ended: dict[int, asyncio.Future[_Died]] = {}
        self._closed = False

    async def rendered(
        self, message: Message, most: int, seconds: float = SECONDS, owner: str = ""
    ) -> AsyncGenerator[Message, None]:
        """The messages of a request, each with its own recipients and texts, in order: of a batch, one for each entry; else one.
        No more than a few are ahead of who takes them. `most`: octets of the templates' texts in one message; `seconds`: of CPU
        time, for up to TOGETHER messages; `owner`: whose turn it is. Raises Wrong, also behind messages that were rendered, and
        Unavailable. Close it (`aclosing`) where it is not read to its end."""
        if message.substitutions is None:
            yield message
            return
        names = _strings(message)
        templates = [(name, text) for name, text in names if is_template(text)]
        entries = message.batch
        if not templates and not any(is_template(one.subject or "") for one in entries or ()):
            for number in range(len(entries or (0,))):
                yield _filled(message, number, {})
            return
        ones = [_one(message, number) for number in range(len(entries or (0,)))]
        job = Job(
            templates, message.substitutions, seconds * max(1.0, len(ones) / TOGETHER), most, TEXT_MOST, LONGEST_VALUE
        )  # fmt: skip
        try:
            async with self._places[entries is not None].place(owner), aclosing(self._answers(job, ones)) as answers:
                number = 0
                async for answer in answers:
                    if answer.wrong is not None:
                        field, detail = answer.wrong
                        raise _wrong(message, number if answer.own else None, field, detail)
                    yield _filled(message, number, answer.texts)
                    number += 1
        except Full:
            raise Unavailable("too many templates are rendered at the same time") from None

    def end(self) -> None:
        """Stop the process."""
        self._closed = True
        self._gone()

    async def _answers(self, job: Job, ones: list[One]) -> AsyncGenerator[Rendered, None]:
        done = 0
        for again in (True, False):
            run = await self._begin(job)
            try:
                async with aclosing(run.answers(ones, done)) as answers:
                    async for answer in answers:
                        done += 1
                        yield answer
                return
            except _Died as died:
                wrong = _reason(died, job)
                if wrong is not None:
                    yield Rendered({}, wrong, True)
                    return
                if not again:
                    raise Unavailable("the process that renders templates has ended twice") from None
            except TimeoutError:
                await self._stuck(run.number)
                raise Unavailable("templates are not rendered in time") from None
            finally:
                self._finish(run)

    async def _begin(self, job: Job) -> "_Run":
        """A process that has the job."""
        for again in (True, False):
            async with self._starting:
                if self._socket is None:
                    await self._start()
            ours, theirs = _pair(socket.SOCK_STREAM)
            number = next(self._numbers)
            try:
                with theirs:
                    assert self._socket is not None
                    socket.send_fds(self._socket, [REQUEST.pack(RENDER, number)], [theirs.fileno()])
                self._ended[number] = self._loop.create_future()
                reader, writer = await asyncio.open_unix_connection(sock=ours)
                return _Run(number, job, reader, writer, self._ended[number])
            except BaseException as error:  # such as that the caller was cancelled
                ours.close()
                if self._ended.pop(number, None) is not None:
                    self._kill(number)
                if not isinstance(error, OSError):
                    raise
                if isinstance(error, BlockingIOError) or not again:
                    raise Unavailable("the process that renders templates takes no request") from None
                self._gone()
        raise AssertionError

    async def _start(self) -> None:
        if self._closed:
            raise Unavailable("the worker ends")
        ours, theirs = _pair(socket.SOCK_SEQPACKET)
        command = program("relaymta.accept.http.templating", str(theirs.fileno()))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL
            )
        except BaseException as error:
            ours.close()
            if not isinstance(error, OSError):
                raise
            raise Unavailable(f"the process that renders templates cannot be started: {error.strerror}") from None
        finally:
            theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self._loop.add_reader(ours.fileno(), self._noticed)
        if self._closed:  # meanwhile
            self._gone()
            raise Unavailable("the worker ends")

    def _noticed(self) -> None:
        """The process says why that of a request has ended; or it has ended itself."""
        assert self._socket is not None
        try:
            data = self._socket.recv(ENDED.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            if not self._closed:
                self._log.event(
                    "warning", text="the process that renders templates has ended; it is started again when it is needed"
                )
            return
        number, by, template = ENDED.unpack(data)
        self._tell(number, _Died(by, template))

    def _tell(self, number: int, died: _Died) -> None:
        future = self._ended.get(number)
        if future is not None and not future.done():
            future.set_result(died)

    def _gone(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for number in self._ended:
            self._tell(number, _Died(None, -1))

    def _finish(self, run: "_Run") -> None:
        """A request is done, or nobody waits for it any more."""
        ended = self._ended.pop(run.number)
        run.close()
        if not ended.done():
            self._kill(run.number)

    def _kill(self, number: int) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(REQUEST.pack(KILL, number))

    async def _stuck(self, number: int) -> None:
        """A process does not answer: it is killed, and so is that which forks if it does not do that."""
        self._kill(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOTICE_SECONDS):
                await asyncio.shield(self._ended[number])
                return
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._gone()


def _pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair(socket.AF_UNIX, kind)
    except OSError as error:
        raise Unavailable(f"templates cannot be rendered: {error.strerror}") from None


class _Run:
    """One request, and the process that renders it."""

    def __init__(
        self, number: int, job: Job, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ended: "asyncio.Future[_Died]"
    ) -> None:
        self.number = number
        self._job = job
        self._reader, self._writer = reader, writer
        self._ended = ended

    async def answers(self, ones: list[One], start: int) -> AsyncGenerator[Rendered, None]:
        """What is rendered of the messages from `start`. Raises _Died, TimeoutError."""
        seconds = ANSWER_SECONDS + 5 * self._job.seconds
        self._writer.write(framed(self._job))
        ahead: list[int] = []  # octets of those that were sent
        sent = start
        for number in range(start, len(ones)):
            while sent < len(ones) and (sent == number or (len(ahead) < AHEAD and sum(ahead) < AHEAD_OCTETS)):
                frame = framed(ones[sent])
                self._writer.write(frame)
                ahead.append(len(frame))
                sent += 1
            async with asyncio.timeout(seconds):
                answer = await self._answer()
            ahead.pop(0)
            yield answer
            if answer.wrong is not None:
                return

    async def _answer(self) -> Rendered:
        try:
            (octets,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if octets > self._job.most + _FRAME:
                raise _Died(0, -1)
            return msgspec.msgpack.decode(await self._reader.readexactly(octets), type=Rendered)
        except (EOFError, OSError, msgspec.DecodeError):
            pass
        try:
            async with asyncio.timeout(NOTICE_SECONDS):
                died = await asyncio.shield(self._ended)
        except TimeoutError:
            died = _Died(None, -1)
        raise died

    def close(self) -> None:
        """Close the socket: the process ends when it next reads."""
        self._writer.transport.abort()


def _strings(message: Message) -> Iterator[tuple[str, str]]:
    """The strings that may be templates, by the fields that have them."""
    for name, text in (("subject", message.subject), ("text", message.text), ("html", message.html)):
        if text is not None:
            yield name, text
    for header in message.headers:
        yield header.field, header.value


def _one(message: Message, number: int) -> One:
    if message.batch is None:
        return One(b"", None)
    entry = message.batch[number]
    subject = entry.subject if entry.subject is None or is_template(entry.subject) else ""
    return One(entry.substitutions, subject)


def _reason(died: _Died, job: Job) -> tuple[str, str] | None:
    """What is wrong with the templates; None: somebody else has ended the process."""
    field = (
        job.templates[died.template][0] if 0 <= died.template < len(job.templates) else "subject" if not job.templates else "text"
    )
    if died.by == signal.SIGXCPU:
        return field, f"rendering takes more than {job.seconds:g} s of CPU time"
    if died.by == 0:
        return field, "rendering takes too much memory"
    return (field, "it cannot be rendered") if died.by in _CRASHES else None


def _wrong(message: Message, number: int | None, field: str, detail: str) -> Wrong:
    """What is wrong for the message with this number, with its place in a batch."""
    if message.batch is None or number is None:
        return Wrong(field, detail)
    if field == "substitutions":
        return Wrong(f"batch[{number}].substitutions", detail)
    return Wrong(field, f"{detail} (batch[{number}])")


def _filled(message: Message, number: int, texts: dict[str, str]) -> Message:
    """The message with this number. Raises Wrong."""
    entry = message.batch[number] if message.batch is not None else Entry(message.to, message.cc, message.bcc, None, b"")
    subject = texts.get("subject", message.subject if entry.subject is None else entry.subject)
    try:
        if subject is not None:
            check_text(subject, "subject", LONGEST_SUBJECT)
        for name in ("text", "html"):
            if "\0" in texts.get(name, ""):
                raise Wrong(name, "it has a NUL")
        headers = [
            check_header(one._replace(value=texts[one.field])) if one.field in texts else one for one in message.headers
        ]  # fmt: skip
        if any(one.field in texts for one in headers):
            message = with_rendered(message, headers)
    except Wrong as wrong:
        raise _wrong(message, number, wrong.field, wrong.detail) from None
    return msgspec.structs.replace(
        message, to=entry.to, cc=entry.cc, bcc=entry.bcc, subject=subject, text=texts.get("text", message.text),
        html=texts.get("html", message.html), batch=None, substitutions=None,
    )  # fmt: skip
