"""The process that runs hooks in Python beside a worker: `main()`, started by hookprocess.py.

Its arguments: the descriptors of its socket and of a memory that it shares with the worker, the file, and the octets of memory
that it may have (0: any number). With `check`, a file and a descriptor it says there whether the file can be imported.

In the shared memory stands which call is running: a hook that blocks, exits or crashes tells nobody, and the worker finds there
whose fault it was. A second thread looks at it, too: it tells where a hook is that has kept the event loop waiting.
"""

import asyncio
import contextlib
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

from relaymta.filter.hookfile import BrokenFile, HookFile
from relaymta.filter.hookframes import Call, Frames, Reply, pack, unpack_call
from relaymta.hooks import Body
from relaymta.proto.printable import encodable

__all__ = ["SHARED", "SPENT"]

# Octets of the shared memory, numbers of eight each: the call that is running, 0: none; how many steps calls have taken; the call
# that was running last; how many calls have begun, of those that were given to this process; and, written by the worker: up to
# which of these, in their order, none is to begin any more.
SHARED: Final = 40
SPENT: Final = 71  # exit status: it has come to the end of its memory
ERROR_MOST: Final = 2000  # characters of why it cannot
BROKEN: Final = 78  # exit status: the file cannot be imported
LOOK: Final = 0.025  # seconds between two looks at what is running
HELD: Final = 2  # looks after which a call that has not gone on holds the event loop
LONG: Final = 16  # looks after which that is told again, of what is no step of a call, which the worker does not see
IDLE: Final = 40  # looks without a call after which the second thread rests
CALL_MOST: Final = 1 << 27  # octets of a call; the worker is trusted
OCTETS: Final = 1 << 18  # of one read
RESERVE: Final = 1 << 20  # octets that are given back when memory is at its end, so that this can be told
_PR_SET_PDEATHSIG: Final = 1

_number: ContextVar[int] = ContextVar("_number", default=0)  # of the call that a task belongs to


class _Forked:
    """Whether this is a process that a hook has forked, which must not speak in the name of the one that it comes from."""

    here = False


@types.coroutine
def _steps(coroutine: Coroutine[Any, Any, Any], number: int, running: memoryview) -> Generator[Any, Any, Any]:
    """Run a coroutine; at each of its steps the shared memory tells that it is running."""
    step: Callable[[], Any] = partial(coroutine.send, None)
    while True:
        running[1] += 1
        running[0] = running[2] = number
        try:
            waits_for = step()
        except StopIteration as stop:
            return stop.value
        finally:
            if _Forked.here:
                os._exit(0)
            running[0] = 0
        try:
            step = partial(coroutine.send, (yield waits_for))
        except BaseException as error:
            step = partial(coroutine.throw, error)


async def _stepped(coroutine: Coroutine[Any, Any, Any], number: int, running: memoryview) -> Any:
    return await _steps(coroutine, number, running)


class _Host:
    """State, changed on the loop: `_tasks`, the calls that are under way. `_lock` is held by whoever writes to the socket."""

    def __init__(self, sock: socket.socket, running: memoryview, file: HookFile, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = sock
        self._running = running
        self._file = file
        self._loop = loop
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._frames = Frames(CALL_MOST)
        self._descriptors: list[int] = []
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._reserve = bytearray(RESERVE)
        self._taken = 0  # calls
        self._begun: set[int] = set()  # of those in `_tasks`
        self._withdrawn: set[int] = set()  # of those in `_tasks` that have not begun
        self._turns = 0  # of the loop, that the second thread has asked for
        loop.set_task_factory(self._task)

    def begin(self) -> None:
        """Take calls from now on."""
        main_thread = threading.get_ident()
        threading.Thread(target=self._watch, args=(main_thread,), daemon=True, name="watch").start()
        file = self._file
        self.send(Reply(0, "ready", hooks=list(file.hooks), bodies=file.bodies, files=file.files))
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, context: Any = None, **more: Any) -> "asyncio.Task[Any]":
        number = _number.get() if context is None else context.get(_number, 0)
        if number and asyncio.iscoroutine(coroutine):
            coroutine = _stepped(coroutine, number, self._running)
        return asyncio.Task(coroutine, loop=loop, context=context, **more)

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, OCTETS, 253)
        except BlockingIOError:
            return
        except OSError:
            os._exit(1)
        if not data:  # the worker has ended, or wants this process no more
            os._exit(0)
        self._descriptors += descriptors
        try:
            for body in self._frames.feed(data):
                self._take(unpack_call(body))
        except MemoryError:
            os._exit(SPENT)

    def _take(self, call: Call) -> None:
        if not call.number:
            task = self._tasks.get(call.arguments)
            if task is not None and call.arguments in self._begun:
                task.cancel()
            elif task is not None:  # cancelled before its first step it would not even say so
                self._withdrawn.add(call.arguments)
            return
        body = None
        if call.descriptors:
            descriptor, (at, octets) = self._descriptors.pop(0), call.arguments.pop()
            body = Body(descriptor, at, octets), descriptor
        self._work.set()
        self._taken += 1
        _number.set(call.number)
        self._tasks[call.number] = self._loop.create_task(self._answer(call, body, self._taken))
        _number.set(0)

    async def _answer(self, call: Call, body: tuple[Body, int] | None, order: int) -> None:
        self._running[3] = order
        self._begun.add(call.number)
        try:
            if order <= self._running[4] or call.number in self._withdrawn:
                raise asyncio.CancelledError
            reply = await self._file.call(call.number, call.hook, call.arguments, None if body is None else body[0])
        except asyncio.CancelledError:
            reply = Reply(call.number, "cancelled")
        finally:
            self._tasks.pop(call.number, None)
            self._begun.discard(call.number)
            self._withdrawn.discard(call.number)
            if body is not None:
                with contextlib.suppress(OSError):  # the hook has closed it
                    os.close(body[1])
        if _Forked.here:
            os._exit(0)
        spent = self._file.spent
        if spent:
            self._reserve.clear()
        self.send(reply)
        if spent:
            os._exit(SPENT)

    def send(self, reply: Reply) -> None:
        """Send a whole frame; without a socket, or memory, this process is of no use."""
        try:
            data = memoryview(pack(reply))
            with self._lock:
                while data:
                    try:
                        data = data[self._socket.send(data) :]
                    except BlockingIOError:
                        select.select([], [self._socket], [], 1.0)
        except (OSError, ValueError):
            os._exit(1)
        except MemoryError:
            os._exit(SPENT)

    def _turned(self) -> None:
        self._turns += 1

    def _watch(self, thread: int) -> None:
        """On a thread of its own: tell of calls that hold the event loop, once for each step. What holds it without being a step
        of a call, such as a callback, is taken for a doing of the call that was running last."""
        running, before, same, idle = self._running, -1, 0, 0
        asked = turns = 0
        while True:
            self._work.wait()
            time.sleep(LOOK)
            number, step = running[0], running[1]
            if turns == self._turns and asked:
                number = number or running[2]
            else:
                turns = self._turns
                self._loop.call_soon_threadsafe(self._turned)
                asked += 1
            idle = 0 if number or self._tasks else idle + 1
            if idle > IDLE:
                self._work.clear()
                idle = 0
            same = same + 1 if number and step == before else 0
            before = step
            if same == HELD or (same == LONG and not running[0]):
                place = self._file.place(sys._current_frames().get(thread))
                self.send(Reply(number, "held", "long" if same == LONG else "", place=place))


def _forked(sock: socket.socket) -> None:
    """In a process that a hook has forked."""
    _Forked.here = True
    try:
        sock.close()
    except OSError:
        pass


def _end_with_worker() -> None:
    """The kernel ends this process with the worker: a hook that blocks does not see that the socket is closed. (Where libffi may
    not be used, only the end of the socket does.)"""
    with contextlib.suppress(OSError, MemoryError, ImportError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _close_others(kept: set[int]) -> None:
    """Close all other descriptors: what the worker has inherited itself is none of a hook's business, and uvloop passes it on."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            try:
                os.close(number)
            except OSError:  # that of the folder
                pass


def check(path: str, answer: int) -> None:
    """Say whether a file can be imported, by a descriptor: its hooks as JSON, or why not."""
    _close_others({0, 1, 2, answer})
    os.set_inheritable(answer, False)
    found: object
    try:
        found = list(HookFile(path).hooks)
    except BrokenFile as error:
        found = str(error)[:ERROR_MOST]
    os.write(answer, json.dumps(found).encode())
    os._exit(0 if isinstance(found, list) else BROKEN)  # whatever threads it has begun


def main() -> None:
    """Serve until the worker ends. It handles signals that a terminal or a service manager sends to all of its processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what a hook prints is no answer of the command line that tests it
    if sys.argv[1] == "check":
        check(sys.argv[2], int(sys.argv[3]))
    _end_with_worker()
    descriptor, shared, path, memory, parent = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    if os.getppid() != parent:
        return
    _close_others({0, 1, 2, descriptor, shared})
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    os.register_at_fork(after_in_child=partial(_forked, sock))
    own = os.dup(shared)  # the descriptor that mmap makes for itself, which is of no use, but to write garbage to
    os.close(own)
    running = memoryview(mmap.mmap(shared, SHARED)).cast("Q")
    os.close(own)
    os.close(shared)
    try:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:  # a filter of system calls: hooks are called all the same
        sys.stderr.write(f"relaymta: the memory of hooks cannot be limited: {error}\n")
    sock.setblocking(False)
    try:
        file = HookFile(path)
    except BrokenFile as error:
        sock.setblocking(True)
        sock.sendall(pack(Reply(0, "broken", encodable(str(error)[:ERROR_MOST]))))
        os._exit(BROKEN)
    gc.freeze()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    host = _Host(sock, running, file, loop)
    host.begin()
    try:
        loop.run_forever()
    finally:
        os._exit(1)
