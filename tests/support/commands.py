"""The command line and the daemon, as processes of their own that are forked from ones which have imported them: importing takes
longer than most commands, and is half of the start of a relay.

Programs that start `python -m relaymta` are tested elsewhere (tests/test_cli.py, tests/e2e/test_privileges.py)."""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import relaymta
from tests.support import forked_workers

__all__ = ["Started", "forkable", "run", "start"]

REQUEST = 1 << 17  # octets: arguments and environment
MAIN = [sys.executable, "-m", "relaymta"]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "4"}  # as of workers
_FROM_START = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "OPENSSL_", "SSL_")  # what a program looks at but once
_parents: dict[str, tuple[socket.socket, subprocess.Popen[bytes]]] = {}  # of commands and of relays, once there is one
_environment, _folder = dict(os.environ), os.getcwd()


def run(arguments: Sequence[str | bytes], timeout: float) -> subprocess.CompletedProcess[str]:
    """As subprocess.run(["python", "-m", "relaymta", *arguments], capture_output=True, text=True, timeout=timeout), but without
    standard input. For threads, too."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Started("commands", [os.fsdecode(one) for one in arguments], os.environ, out.fileno(), err.fileno())
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.forget()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
        return subprocess.CompletedProcess(list(arguments), code, *texts)


def forkable(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether `start` does what this command does in this environment, and in this folder, which might have modules."""
    changed = {name for name in environment.keys() | _environment.keys() if environment.get(name) != _environment.get(name)}
    return list(command[:3]) == MAIN and os.getcwd() == _folder and not any(name.startswith(_FROM_START) for name in changed)


def start(command: Sequence[str], environment: Mapping[str, str], stderr: IO[bytes]) -> "Started":
    """As subprocess.Popen(command, start_new_session=True, env=environment, stderr=stderr), for a command that is `forkable`."""
    return Started("relays", list(command[3:]), environment, 1, stderr.fileno())


class Started:
    """A process that was forked, as subprocess.Popen has one."""

    def __init__(self, kind: str, arguments: list[str], environment: Mapping[str, str], out: int, err: int) -> None:
        self.args = arguments
        self.returncode: int | None = None
        request = json.dumps([arguments, dict(environment), os.getcwd()]).encode()
        self._status, ends = os.pipe()
        try:
            socket.send_fds(_parent(kind), [request], [out, err, ends])
        finally:
            os.close(ends)
        told = b""
        while not told.endswith(b"\n"):
            piece = os.read(self._status, 1)
            assert piece, "it was not forked"
            told += piece
        self.pid = int(told)

    def poll(self) -> int | None:
        """The exit status; None: it runs. Of a signal: its negative number."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, where it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def forget(self) -> None:
        """Nobody will ask for its exit status."""
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._status, select.POLLIN)
            if not ended.poll(None if timeout is None else timeout * 1000):
                return None
            self.returncode = int(os.read(self._status, 10) or b"-1")
            self.forget()
        return self.returncode

    def __del__(self) -> None:
        self.forget()


def _parent(kind: str) -> socket.socket:
    if kind not in _parents:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            script = f"from tests.support.commands import serve; serve({kind!r}, {theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-c", script], cwd=_folder, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                start_new_session=True, env=MALLOC | _environment,
            )  # fmt: skip
        _parents[kind] = ours, process
    return _parents[kind][0]


def _import(kind: str) -> None:
    """What most of these need."""
    from relaymta.cli import VERBS

    verbs = {"serve"} if kind == "relays" else {verb.module for verb in VERBS.values()} - {"serve", "sink"}
    more = (
        ("relaymta.supervisor", "relaymta.worker", "uvloop")
        if kind == "relays"
        else ("relaymta.control", "relaymta.cli.mail_files")
    )
    for module in ("relaymta.config", *more, *(f"relaymta.cli.{verb}" for verb in verbs)):
        importlib.import_module(module)


def serve(kind: str, number: int) -> None:
    """Fork a process for each request that comes from this socket, until it is closed."""
    from relaymta.cli import main

    del sys.path[0]  # as relaymta/__main__.py does
    _import(kind)
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, (out, err, status), _, _ = _received(requests)
        if os.fork():
            for descriptor in (out, err, status):
                os.close(descriptor)
            continue
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if child := os.fork():
            with contextlib.suppress(BrokenPipeError):
                os.write(status, b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        os.setsid()
        os.write(status, b"%d\n" % os.getpid())
        os.close(status)
        arguments, environment, folder = json.loads(request)
        for descriptor, standard in ((out, 1), (err, 2)):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        with contextlib.suppress(FileNotFoundError):
            os.chdir(folder)
        if kind == "relays":
            _as_executed(arguments)
            if forked_workers.possible():
                forked_workers.prepare()
        else:
            sys.argv = ["relaymta", *arguments]
        main()
        sys.exit(0)


def _as_executed(arguments: list[str]) -> None:
    """What differs in a process that was executed for this."""
    from relaymta.supervisor import answers

    sys.argv = [str(Path(relaymta.__file__).with_name("__main__.py")), *arguments]
    sys.orig_argv = [*MAIN, *arguments]
    answers._STARTED = time.monotonic()


def _received(requests: socket.socket) -> tuple[bytes, list[int], int, object]:
    found = socket.recv_fds(requests, REQUEST, 3)
    if not found[0]:
        sys.exit(0)
    return found
