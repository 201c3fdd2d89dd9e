"""The workers of a relay that was forked (commands.py) are forked, too: from a process that has imported them, and has done
nothing else. Importing is most of what the start of a worker costs.

Where the relay has other rights, or is in another cgroup, than when that process was made, its workers are executed."""

import asyncio
import atexit
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
from typing import Any

__all__ = ["NAME", "possible", "prepare"]

CLONE, CLONE_PARENT = 56, 0x8000  # of x86-64
PR_SET_NAME = 15
NAME = "relaymta.worker"  # in /proc/PID/comm, since the command is that of the relay
REQUEST = 1 << 17
RIGHTS = ("Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp:", "Speculation")
LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]
_python = ctypes.PyDLL(None)


def possible() -> bool:
    """Whether this machine has what is needed."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return os.uname().machine == "x86_64"


def prepare() -> None:
    """In a process that will be a supervisor, before it does anything: from now on it gets its workers so."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        ours.close()
        _serve(theirs)
    theirs.close()
    before, execute = _rights(), asyncio.create_subprocess_exec

    async def create(*command: Any, pass_fds: Any = (), env: Any = None, **more: Any) -> Any:
        if "from relaymta.worker import main" in str(command[3:4]) and len(pass_fds) == 1 and _rights() == before:
            with contextlib.suppress(OSError):  # it was killed with others of its group
                return _Forked(_asked(ours, pass_fds[0], dict(env or os.environ)))
        return await execute(*command, pass_fds=pass_fds, env=env, **more)

    asyncio.create_subprocess_exec = create


def _rights() -> list[str]:
    with open("/proc/self/status") as status, open("/proc/self/cgroup") as cgroup:
        return [*(line for line in status if line.startswith(RIGHTS)), *cgroup]


def _asked(ours: socket.socket, descriptor: int, environment: dict[str, str]) -> int:
    """The process id of a new worker that has this descriptor."""
    umask = os.umask(0o077)
    os.umask(umask)
    limits = [[number, *resource.getrlimit(number)] for number in LIMITS]
    request = json.dumps([environment, os.getcwd(), umask, limits, os.getpid()]).encode()
    socket.send_fds(ours, [request], [descriptor])
    found = ours.recv(20)
    if not found:
        raise OSError
    return int(found)


class _Forked:
    """What of asyncio.subprocess.Process a supervisor uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._descriptor = os.pidfd_open(pid)
        self._loop.add_reader(self._descriptor, self._has_ended)

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if not self._ended.done():
            self._ended.set_result(self.returncode)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(requests: socket.socket) -> None:
    """Fork a worker for each request, as a child of our parent, until that has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, REQUEST, 1)
        if not request:
            os._exit(0)
        _python.PyOS_BeforeFork()
        pid = _python.syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
        if not pid:
            _python.PyOS_AfterFork_Child()
            requests.close()
            _be_worker(descriptors[0], *json.loads(request))
        _python.PyOS_AfterFork_Parent()
        os.close(descriptors[0])
        requests.send(b"%d" % pid)


def _be_worker(
    descriptor: int, environment: dict[str, str], folder: str, umask: int, limits: list[list[int]], parent: int
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        with contextlib.suppress(FileNotFoundError):
            os.chdir(folder)
        os.umask(umask)
        for limit, soft, hard in limits:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(limit, (soft, hard))
        assert os.getppid() == parent
        _python.prctl(PR_SET_NAME, NAME.encode(), 0, 0, 0)
        os.set_inheritable(descriptor, True)
        sys.argv = ["-c", str(descriptor)]
        from relaymta.worker import main

        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            vars(threading)["_shutdown"]()  # what the interpreter does at its end
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
