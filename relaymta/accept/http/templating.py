"""The process that renders templates: `main()` with a socket's descriptor as its argument, started by templates.py.

Templates come from clients. For each request it forks a process of its own, with bounds on CPU time, memory and output, which can
open no file: so one that never ends, or ends badly, is no other request's concern.
"""

import contextlib
import mmap
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import msgspec
from jinja2 import StrictUndefined, Template, TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from relaymta.accept.http.exchange import ENDED, KILL, LENGTH, REQUEST, Job, One, Rendered, framed

__all__ = ["MEMORY", "Renderer"]

MEMORY = 128 << 20  # octets of address space of a request, beside four times what it may render
_GRACE = 1  # seconds of CPU time in which what cannot be interrupted has to end, behind those of the job
_TICK = 0.05  # seconds until an interruption that had no effect is made again
_DIGITS = 10_000  # bits of a power
_SUBJECTS = 16  # templates of subjects that are kept
_NONE = -1


class _TimeOut(BaseException):
    """Too much CPU time. No handler in a template's code, or in Jinja2, is for it."""


class _Invalid(Exception):
    """A template or its result cannot be used; str() says why."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("**",))

    def __init__(self) -> None:
        super().__init__(
            undefined=StrictUndefined, autoescape=lambda name: name == "html", keep_trailing_newline=True, cache_size=0
        )
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Powers of bounded size: they are made in one step that no signal interrupts."""
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _DIGITS:
            raise _Invalid("the power is too large")
        return super().call_binop(context, operator, left, right)


class Renderer:
    """The templates of one job, and what is made of them. `at`: told the number of the template that is worked on. Its errors are
    Rendered, too."""

    def __init__(self, job: Job, at: Callable[[int], None] | None = None) -> None:
        self._job = job
        self._at = at
        self._environment = _Environment()
        self._templates: dict[str, Template] | None = None
        self._subjects: dict[str, Template] = {}
        self._substitutions: dict[str, Any] = {}

    def render(self, one: One) -> Rendered:
        """The texts of a message."""
        if self._templates is None:
            templates: dict[str, Template] = {}
            for number, (name, source) in enumerate(self._job.templates):
                self._note(number)
                wrong = self._tried(name, lambda: self._compiled(name, source, templates), None)  # noqa: B023 (called here)
                if wrong is not None:
                    return Rendered({}, wrong)
            self._templates = templates
            wrong = self._read(self._job.substitutions)
            if wrong is not None:
                return Rendered({}, wrong)
            self._shared = self._substitutions
        self._substitutions = {}
        wrong = self._read(one.substitutions)
        return Rendered({}, wrong, True) if wrong is not None else self._rendered(one, self._shared | self._substitutions)

    def _rendered(self, one: One, substitutions: dict[str, Any]) -> Rendered:
        texts: dict[str, str] = {}
        room = self._job.most
        for number, (name, template) in enumerate((self._templates or {}).items()):
            self._note(number)
            if name != "subject" or one.subject is None:
                wrong = self._tried(name, lambda: self._text(name, template, substitutions, texts, room), template)  # noqa: B023
                if wrong is not None:
                    return Rendered({}, wrong, True)
                room -= len(texts[name].encode())
        if one.subject:
            self._note(_NONE)
            wrong = self._tried(
                "subject", lambda: self._compiled("subject", one.subject or "", self._subjects, one.subject), None
            )
            if wrong is None:
                template = self._subjects[one.subject]
                wrong = self._tried("subject", lambda: self._text("subject", template, substitutions, texts, room), template)
            if wrong is not None:
                return Rendered({}, wrong, True)
        return Rendered(texts)

    def _note(self, number: int) -> None:
        if self._at is not None:
            self._at(number)

    def _read(self, octets: bytes) -> tuple[str, str] | None:
        if octets:
            try:
                self._substitutions = msgspec.json.decode(octets, type=dict[str, Any])
            except (ValueError, RecursionError, MemoryError) as error:
                return "substitutions", str(error) or type(error).__name__
        return None

    def _tried(self, name: str, work: Callable[[], None], template: Template | None) -> tuple[str, str] | None:
        """Do it; what is wrong, if it cannot be done, with the line of the template."""
        line = 0
        try:
            work()
            return None
        except TemplateSyntaxError as error:
            line, why = error.lineno, error.message or "it cannot be read"
        except _TimeOut as error:
            _Interrupted.active = False
            line, why = _line(error, template), f"rendering takes more than {self._job.seconds:g} s of CPU time"
        except MemoryError as error:
            line, why = _line(error, template), "rendering takes too much memory"
        except (RecursionError, SyntaxError) as error:  # (SyntaxError is Python's, about blocks in blocks)
            line, why = _line(error, template), "it is nested too deeply"
        except Exception as error:  # whatever a template can cause
            line, why = _line(error, template), str(error)[:1000] or type(error).__name__
        return name, f"line {line}: {why}" if line else why

    def _compiled(self, name: str, source: str, into: dict[str, Template], key: str | None = None) -> None:
        environment = self._environment
        with _Interrupted(self._job.seconds):
            parsed = environment.parse(source, name, name)
            other = next(parsed.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
            if other is not None:
                raise TemplateSyntaxError("a template of a request includes no others", other.lineno)
            code = environment.compile(parsed, name, name)
            if key is not None and len(into) >= _SUBJECTS:
                into.clear()
            into[key or name] = Template.from_code(environment, code, environment.make_globals(None))

    def _text(self, name: str, template: Template, substitutions: dict[str, Any], into: dict[str, str], room: int) -> None:
        pieces: list[str] = []
        characters = 0
        most = self._job.text if name in ("text", "html") else self._job.value
        with _Interrupted(self._job.seconds):
            # (Template.render would also write tracebacks anew.)
            for piece in template.root_render_func(template.new_context(substitutions)):
                characters += len(piece)
                if characters > room:
                    raise _Invalid(f"what is rendered has more than {self._job.most} octets")
                if characters > most:
                    raise _Invalid(f"what is rendered has more than {most} characters")
                pieces.append(piece)
            text = "".join(pieces)
            try:
                octets = len(text.encode())
            except UnicodeEncodeError as error:
                raise _Invalid(f"what is rendered has no character at U+{ord(text[error.start]):04X}") from None
            if octets > room:
                raise _Invalid(f"what is rendered has more than {self._job.most} octets")
            into[name] = text


class _Interrupted:
    """While it is entered, SIGPROF (the CPU time of the job has passed) raises _TimeOut."""

    active = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        if time.process_time() > self._seconds:
            raise _TimeOut
        _Interrupted.active = True

    def __exit__(self, *error: object) -> None:
        _Interrupted.active = False


def _passed(number: int, frame: FrameType | None) -> None:
    if _Interrupted.active:
        raise _TimeOut


def _line(error: BaseException, template: Template | None) -> int:
    """The line of a template that was being rendered; 0: it was not."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        here: Any = trace.tb_frame.f_globals.get("__jinja_template__")
        its = here is not None and here is template
        if its:
            line = int(here.get_corresponding_lineno(trace.tb_lineno))
        trace = trace.tb_next
    return line


# The process of one request


def _work(sock: socket.socket, at: mmap.mmap) -> None:
    """Read a job and each message of it, until one is wrong, or the worker closes."""

    def note(number: int) -> None:
        at[:4] = number.to_bytes(4, "big", signed=True)

    job = msgspec.msgpack.decode(_frame(sock), type=Job)
    _bound(job)
    renderer = Renderer(job, note)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            rendered = renderer.render(msgspec.msgpack.decode(_frame(sock), type=One))
            sock.sendall(framed(rendered))
            if rendered.wrong is not None:
                # What was sent ahead is read: else the kernel would reset the connection, and the answer be lost.
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
                break


def _frame(sock: socket.socket) -> bytes:
    return _octets(sock, LENGTH.unpack(_octets(sock, LENGTH.size))[0])


def _octets(sock: socket.socket, wanted: int) -> bytes:
    found = bytearray()
    while len(found) < wanted:
        data = sock.recv(min(wanted - len(found), 1 << 20))
        if not data:
            raise EOFError
        found += data
    return bytes(found)


def _bound(job: Job) -> None:
    """The bounds of the process of a request. (As long as one of them is not reached, it also ends with the worker: its socket
    does.)"""
    with open("/proc/self/statm", "rb") as file:
        space = int(file.read().split()[0]) * resource.getpagesize()
    most = space + MEMORY + 4 * job.most
    seconds = int(time.process_time() + job.seconds) + _GRACE + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    signal.signal(signal.SIGPROF, _passed)
    signal.setitimer(signal.ITIMER_PROF, job.seconds, _TICK)
    os.nice(5)


# The process that forks


class _Parent:
    """`asked`: the worker's socket. Knows the process of each request, until that has ended."""

    def __init__(self, asked: socket.socket) -> None:
        self._asked = asked
        self._processes: dict[int, tuple[int, mmap.mmap]] = {}  # by pid: the request, what it works on
        self._ended, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Until the worker ends."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([self._asked.fileno(), self._ended], [], [])
            if self._ended in ready:
                os.read(self._ended, 4096)
                self._reap()
            if self._asked.fileno() in ready:
                data, descriptors = self._received()
                if not data:
                    break
                what, number = REQUEST.unpack(data)
                if what == KILL:
                    self._kill(number)
                elif descriptors:
                    self._render(number, descriptors[0])
                else:  # there was no descriptor left for it
                    self._tell(number, signal.SIGKILL, _NONE)
        for pid in self._processes:
            os.kill(pid, signal.SIGKILL)

    def _received(self) -> tuple[bytes, list[int]]:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._asked, REQUEST.size, 1)
        except ConnectionError:  # the worker has not read all that it was told
            return b"", []
        return data, descriptors

    def _render(self, number: int, descriptor: int) -> None:
        at = mmap.mmap(-1, mmap.PAGESIZE)
        at[:4] = _NONE.to_bytes(4, "big", signed=True)
        with socket.socket(fileno=descriptor) as sock:
            try:
                pid = os.fork()
            except OSError:
                self._tell(number, signal.SIGKILL, _NONE)
                return
            if pid == 0:
                self._child(sock, at)
            self._processes[pid] = number, at

    def _child(self, sock: socket.socket, at: mmap.mmap) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (self._ended, self._wake):
                os.close(descriptor)
            self._asked.close()
            _work(sock, at)
            status = 0
        except EOFError:  # the worker has closed
            status = 0
        except MemoryError:
            pass
        except Exception:  # a bug
            status = 2
            traceback.print_exc()
        finally:
            os._exit(status)

    def _kill(self, number: int) -> None:
        for pid, (request, _) in self._processes.items():
            if request == number:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        for pid, status in _ended():
            number, at = self._processes.pop(pid)
            by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else signal.SIGABRT if os.WEXITSTATUS(status) == 2 else 0
            self._tell(number, by, int.from_bytes(at[:4], "big", signed=True))
            at.close()

    def _tell(self, number: int, by: int, template: int) -> None:
        with contextlib.suppress(OSError):  # the worker is gone, which the next read says
            self._asked.send(ENDED.pack(number, by, template))


def _ended() -> Iterator[tuple[int, int]]:
    """(pid, status) of children that have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


_SAMPLES = (
    "{% for a in [1]|sort %}{{ a|pprint|upper|e|wordwrap }}{% endfor %}{{ '%s {}'|format(1) }}{{ 'a {}'.format(1) }}",
    "{{ [1]|tojson|urlize|striptags }}{{ '&amp;'|safe|striptags }}{{ [1, 2]|random }}",
    "{% if %}", "{{ a.b }}",
)  # fmt: skip


def _warm() -> None:
    """Have all imported that rendering needs, which a process that can open no file cannot."""
    for sample in _SAMPLES:
        Renderer(Job([("text", sample), ("html", sample)], b"", 3600.0, 10000)).render(One(b"", None))


def main() -> None:
    """Serve until the worker ends. Signals are ignored, so that a draining worker can still render."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # of Python, about what clients write
    _warm()
    _Parent(socket.socket(fileno=int(sys.argv[1]))).serve()
