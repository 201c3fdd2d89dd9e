"""A program on a terminal, and somebody who types."""

import contextlib
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tests.support.daemon import PATIENCE

__all__ = ["Terminal"]


class Terminal:
    """`relaymta ARGUMENTS` with a terminal of its own. `shown`: all that was on it, with what was typed where that is echoed."""

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        self.shown = ""
        self._left = False
        self._read = 0  # characters of `shown` that `await_text` has found
        self._pid, self._leader = pty.fork()
        if not self._pid:
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, "-m", "relaymta", *arguments])

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._leader)

    def answer(self, question: str, text: str) -> None:
        """Type a line once the question is there."""
        self.await_text(question)
        os.write(self._leader, text.encode() + b"\r")

    def press(self, keys: str) -> None:
        """Press keys, without Return."""
        os.write(self._leader, keys.encode())

    def signal(self, number: int) -> None:
        """Send the program a signal."""
        os.kill(self._pid, number)

    def await_text(self, text: str) -> None:
        """Wait until this is shown, behind what was waited for before."""
        until = time.monotonic() + PATIENCE
        while (at := self.shown.find(text, self._read)) < 0:
            assert self._more(until), f"{text!r} is not shown: {self.shown}"
        self._read = at + len(text)

    def _more(self, until: float) -> bool:
        """Read what the program writes; False: it has left the terminal, or the time is over."""
        poll = select.poll()  # select() knows no descriptor above 1,023
        poll.register(self._leader, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return False
        try:
            octets = os.read(self._leader, 65536)
        except OSError:
            octets = b""
        self._left = not octets
        self.shown += octets.decode(errors="replace").replace("\r\n", "\n")
        return bool(octets)

    def interrupt(self) -> int:
        """Press Ctrl-C, and again after some seconds: one that comes just before readline waits is not seen. The exit status."""
        until = time.monotonic() + PATIENCE
        while not self._left and time.monotonic() < until:
            os.write(self._leader, b"\x03")
            seen = time.monotonic() + 2
            while self._more(seen):
                pass
        return self.end()

    def end(self) -> int:
        """Wait for the end; the exit status."""
        until = time.monotonic() + PATIENCE
        while self._more(until):
            pass
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)
