"""The command line, as a process of its own that is forked from one which has imported it: that takes longer than most commands.

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
from collections.abc import Sequence

__all__ = ["run"]

REQUEST = 1 << 17  # octets: arguments and environment
_ours: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []  # the parent of commands, once there is one


def run(arguments: Sequence[str | bytes], timeout: float) -> subprocess.CompletedProcess[str]:
    """As subprocess.run(["python", "-m", "relaymta", *arguments], capture_output=True, text=True, timeout=timeout), but without
    standard input. For threads, too."""
    request = json.dumps([[os.fsdecode(one) for one in arguments], dict(os.environ), os.getcwd()]).encode()
    status, ends = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, os.fdopen(status, "rb") as told:
        try:
            socket.send_fds(_parent(), [request], [out.fileno(), err.fileno(), ends])
        finally:
            os.close(ends)
        ended = select.poll()
        ended.register(told, select.POLLIN)
        if not ended.poll(timeout * 1000):
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        code = int(told.read() or b"-1")
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
        return subprocess.CompletedProcess(list(arguments), code, *texts)


def _parent() -> socket.socket:
    if not _ours:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            script = f"from tests.support.commands import serve; serve({theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-c", script], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        _ours.append((ours, process))
    return _ours[0][0]


def serve(number: int) -> None:
    """Fork a command for each request that comes from this socket, until it is closed."""
    from relaymta.cli import VERBS, main

    for module in {verb.module for verb in VERBS.values()} - {"serve", "sink"}:
        importlib.import_module(f"relaymta.cli.{module}")
    for module in ("relaymta.config", "relaymta.control", "relaymta.cli.mail_files"):
        importlib.import_module(module)
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
            os.write(status, b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        os.close(status)
        arguments, environment, folder = json.loads(request)
        for descriptor, standard in ((out, 1), (err, 2)):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        with contextlib.suppress(FileNotFoundError):
            os.chdir(folder)
        sys.argv = ["relaymta", *arguments]
        main()
        sys.exit(0)


def _received(requests: socket.socket) -> tuple[bytes, list[int], int, object]:
    found = socket.recv_fds(requests, REQUEST, 3)
    if not found[0]:
        sys.exit(0)
    return found
