"""One process of hooks, as its worker sees it: calls that it has, and octets to and from it.

It runs code of the operator's own, which may do anything: all that comes from it is checked (hookframes.py), and its end is known
from the kernel, not from its socket, which a process that it has forked may have, too. Who is told: `Owner` (hookpool.py).
"""

import asyncio
import contextlib
import mmap
import os
import signal
import socket
from collections import deque
from typing import Final, Protocol

from relaymta.control import program
from relaymta.filter.hookframes import ANSWER_MOST, Call, Frames, Garbage, Reply, pack, pack_call, unpack_reply
from relaymta.filter.hookhost import SHARED, SPENT

__all__ = ["Ask", "Owner", "Process", "environment"]

CLOSING: Final = 0.05  # seconds from the end of its socket to that of the process
BACKLOG: Final = 32 << 20  # octets that it has not taken, above which it is sent no more calls
_EXITING: Final = 4  # PF_EXITING of a process: its files are closed before anybody is told
_KEPT: Final = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "HOME")  # of our environment


def environment() -> dict[str, str]:
    """What code of the operator's own sees of our environment, which may have secrets."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ}


class Ask:
    """A call, and who waits for what comes of it. `descriptor`: goes with it, -1: none; `deadline`: until when (loop time) it has
    to be answered, or, while no process has it, to be given to one; `limit`: until when it has to be answered, which begins when
    a process is given it first; `order`: which of the calls it is that its process was given; `tries`: processes that have ended
    under it, as hookpool.TRIES counts; `moved`: it was begun, and then given to another."""

    __slots__ = ("arguments", "deadline", "descriptor", "future", "hook", "limit", "moved", "number", "order", "tries")

    def __init__(
        self, number: int, hook: str, arguments: list[object], descriptor: int, future: "asyncio.Future[Reply]"
    ) -> None:  # fmt: skip
        self.number = number
        self.hook = hook
        self.arguments = arguments
        self.descriptor = descriptor
        self.future = future
        self.deadline = self.limit = 0.0
        self.order = self.tries = 0
        self.moved = False


class Owner(Protocol):
    """Who is told what becomes of a process."""

    def came_up(self, process: "Process", reply: Reply) -> None:
        """It has imported the file, or ("broken") could not."""

    def answered(self, process: "Process", ask: Ask, reply: Reply) -> None:
        """What has come of a call, which is not under way there any more."""

    def is_held(self, process: "Process", number: int, place: str, long: bool) -> None:
        """A call, or what it has left behind, keeps the event loop of the process waiting, at a place; `long`: it still does."""

    def came_back(self, process: "Process") -> None:
        """It was held, and has no calls any more."""

    def ended(self, process: "Process", why: str) -> None:
        """It is gone; `pending` has what was under way. `why`: "has ...", or "was ..."; "": nobody wants it any more."""


class Process:
    """See above. `pending`: calls that it has, by their numbers; `cancelling`: those that nobody waits for any more, and until
    when it is to confirm that; `ready`: it has imported the file; `held`: a call of it holds its event loop; `spent`: its memory
    was used up, which it has said and ended; `gone`: it has ended, or has been ended."""

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._loop = loop
        self.pending: dict[int, Ask] = {}
        self.cancelling: dict[int, float] = {}
        self.ready = self.held = self.spent = self.gone = self._closing = False
        self.started_at = loop.time()
        self.pid = 0
        self._socket: socket.socket | None = None
        self._memory: mmap.mmap | None = None
        self._running: memoryview | None = None
        self._frames = Frames(ANSWER_MOST)
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._backlog = 0
        self._process: asyncio.subprocess.Process | None = None
        self._seen, self._same = (0, 0), 0  # by `look`
        self._given = 0  # calls
        self._astray = False  # the socket was closed or written to by somebody else than us

    async def run(self, path: str, memory: int) -> None:
        """Start it, and wait for its end. `memory`: octets that it may have, 0: any number. Cancelled: it is killed."""
        why = ""
        try:
            await self._start(path, memory)
            assert self._process is not None
            if self.gone:
                self._kill()
            status = await self._process.wait()
            self.spent = status == SPENT
            # One that ends by itself does so by what ran last: a task, a thread, or a callback that it has left behind.
            self._astray = self._astray or (status >= 0 and not self.spent)
            why = f"has ended with status {status}" if status >= 0 else f"was ended by {_signal(-status)}"
        except OSError as error:
            why = f"cannot be started: {error.strerror or error}"
        except asyncio.CancelledError:
            self._kill()
            raise
        finally:
            self.end(why)

    async def _start(self, path: str, memory: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        shared = os.memfd_create("relaymta-hooks", os.MFD_CLOEXEC)
        try:
            os.ftruncate(shared, SHARED)
            self._memory = mmap.mmap(shared, SHARED)
            self._running = memoryview(self._memory).cast("Q")
            numbers = [str(one) for one in (theirs.fileno(), shared)]
            command = program("relaymta.filter.hookhost", *numbers, path, str(memory), str(os.getpid()))
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno(), shared], stdin=asyncio.subprocess.DEVNULL, env=environment(), cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(shared)
        self.pid = self._process.pid
        if self.gone:
            ours.close()
            return
        ours.setblocking(False)
        self._socket = ours
        self._loop.add_reader(ours.fileno(), self._readable)

    @property
    def now(self) -> tuple[int, int]:
        """The number of the call that is running, 0: none, and how many steps calls have taken, both as it says."""
        return (self._running[0], self._running[1]) if self._running is not None else (0, 0)

    @property
    def suspect(self) -> int:
        """The number of the call whose fault its end is, as far as that can be known, 0: it cannot. One that has closed the
        socket, or written to it, or has ended the process by what it has left behind, may have returned since."""
        if self._running is None:
            return 0
        return self._running[0] or (self._running[2] if self._astray else 0)

    def look(self) -> int:
        """At how many looks in a row, this one included, a call of it, or a task that one has left behind, was at the same step:
        0: it has gone on since."""
        seen, self._seen = self._seen, self.now
        self._same = self._same + 1 if seen[0] and seen == self._seen else 0
        return self._same

    # Calls

    def put(self, ask: Ask, limit: float) -> bool:
        """Give it a call, which has until then, where no other process was given it before. False: it has too many; OSError: no
        descriptor is left."""
        if self._backlog > BACKLOG:
            return False
        data = pack_call(Call(ask.number, ask.hook, int(ask.descriptor >= 0), ask.arguments))  # fails here, if ever
        descriptors = [] if ask.descriptor < 0 else [os.dup(ask.descriptor)]
        ask.deadline = ask.limit = ask.limit or limit
        self._given += 1
        ask.order = self._given
        self.pending[ask.number] = ask
        self._send(data, descriptors)
        return True

    def has_begun(self, ask: Ask) -> bool:
        """Whether a call of it has begun, or is just about to."""
        return self._running is None or ask.order <= self._running[3]

    def withdraw(self) -> None:
        """None of the calls that it has, and that have not begun, is to begin."""
        if self._running is not None:
            self._running[4] = self._given

    def cancel(self, number: int, until: float) -> None:
        """Nobody waits for a call any more; it has until then (loop time) to stop it."""
        if self.pending.pop(number, None) is not None and not self.gone:
            self.cancelling[number] = until
            self._send(pack(Call(0, "cancel", 0, number)), [])

    def _send(self, data: bytes, descriptors: list[int]) -> None:
        sock, done = self._socket, 0
        if not self._out and not descriptors and sock is not None:  # as nearly always
            try:
                done = sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._closes()
                return
            if done == len(data):
                return
        self._out.append((memoryview(data)[done:], descriptors))
        self._backlog += len(data) - done
        if len(self._out) == 1:
            self._writable()

    def _writable(self) -> None:
        sock = self._socket
        if sock is None:
            return
        while self._out:
            data, descriptors = self._out[0]
            try:
                done = socket.send_fds(sock, [data], descriptors) if descriptors else sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(sock.fileno(), self._writable)
                return
            except OSError:
                self._closes()
                return
            _close(descriptors)
            self._backlog -= done
            if done < len(data):
                self._out[0] = (data[done:], [])
            else:
                self._out.popleft()
        self._loop.remove_writer(sock.fileno())

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._closes()
            return
        try:
            for body in self._frames.feed(data):
                self._heard(unpack_reply(body))
                if self.gone:
                    return
        except Garbage as error:
            self._astray = True
            self.end(f"says what makes no sense: {error}")

    def _heard(self, reply: Reply) -> None:
        number = reply.number
        if reply.word in ("ready", "broken") or not self.ready:
            if number or self.ready or reply.word not in ("ready", "broken"):
                raise Garbage(f"{reply.word[:32]!r} at a wrong time")
            self.ready = reply.word == "ready"
            self._owner.came_up(self, reply)
        elif reply.word == "held":
            self._owner.is_held(self, number, reply.place, reply.reason == "long")
        elif (ask := self.pending.pop(number, None)) is not None:
            self._owner.answered(self, ask, reply)
        else:
            self.cancelling.pop(number, None)
        if self.held and not self.pending and not self.cancelling and not self.gone:
            self._owner.came_back(self)

    # Its end

    def _closes(self) -> None:
        """Its socket is closed. Where that is since it has ended, the kernel tells how in a moment."""
        if self._socket is not None and not self._closing:
            self._closing = True
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._loop.call_later(CLOSING, self._closed)

    def _closed(self) -> None:
        """It has not ended since: a hook has closed it; or it is at it, on a machine that is busy."""
        if self._process is not None and not self.gone and _is_ending(self.pid):
            self._loop.call_later(CLOSING, self._closed)
            return
        self._astray = True
        self.end("has closed its socket")

    def end(self, why: str) -> None:
        """It is ended now, with all that it has forked. Further calls do nothing."""
        if self.gone:
            return
        self.gone = True
        self._kill()
        sock, self._socket = self._socket, None
        if sock is not None:
            with contextlib.suppress(OSError, ValueError):
                self._loop.remove_reader(sock.fileno())
                self._loop.remove_writer(sock.fileno())
            sock.close()
        for _, descriptors in self._out:
            _close(descriptors)
        self._out.clear()
        self._owner.ended(self, why)
        if self._running is not None and self._memory is not None:
            self._running.release()
            self._running = None
            self._memory.close()

    def _kill(self) -> None:
        """The group is its own, and whoever it has forked belongs to it."""
        if self.pid > 1:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _is_ending(pid: int) -> bool:
    """Whether a child is a zombie, or about to be one: then its end is told soon. proc(5), /proc/pid/stat."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *others = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return state in b"ZX" or bool(int(others[5]) & _EXITING)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
