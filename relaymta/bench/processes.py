"""Processes that are started for a run, and what they cost: read from /proc."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["anonymous_bytes", "cpu_seconds", "free_port", "start", "stop", "tree_of"]

TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _stats() -> dict[int, list[str]]:
    """The fields behind the name in /proc/PID/stat (proc_pid_stat(5)), by process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
                found[int(name)] = file.read().rpartition(")")[2].split()
    return found


def _tree(root: int, stats: dict[int, list[str]]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(pid)
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def tree_of(root: int) -> list[int]:
    """A process and its descendants."""
    return _tree(root, _stats())


def cpu_seconds(root: int) -> float:
    """User and system seconds of a process, its descendants, and those of them that have ended."""
    stats = _stats()
    return sum(sum(map(int, stats[pid][11:15])) for pid in _tree(root, stats) if pid in stats) / TICKS


def anonymous_bytes(root: int) -> int:
    """The memory of a process and its descendants that no file backs (RssAnon)."""
    total = 0
    for pid in tree_of(root):
        with contextlib.suppress(OSError, StopIteration, ValueError), open(f"/proc/{pid}/status", encoding="latin-1") as file:
            line = next(line for line in file if line.startswith("RssAnon:"))
            total += int(line.split()[1]) << 10
    return total


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is not in use, below those that the system gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that Ctrl-C does not reach it; it gets SIGTERM when this process ends."""

    def of_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(command, start_new_session=True, preexec_fn=of_child, **options)


def stop(process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    """SIGTERM, and after so many seconds SIGKILL to all of its session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        _close(stream)


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()


def wait_until(condition: Any, seconds: float) -> bool:
    """Poll until it holds; whether it came to that."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def tail_of(path: Path, octets: int = 2000) -> str:
    """The end of a file; "": there is none."""
    try:
        return path.read_bytes()[-octets:].decode("utf-8", "replace").strip()
    except OSError:
        return ""
