"""The stage of a simulation: virtual time, event loops that run one callback at a time, and threads that are fibers (greenlets).

Exactly one thing runs at a time, and which one is next is drawn from the seed. A fiber runs until it pauses: at each system call,
each transaction of LMDB and each sleep of the code on a thread. So the steps of loops, readers and writers interleave as they
could on threads, and the same seed gives the same run.
"""

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from greenlet import getcurrent, greenlet

__all__ = ["Condition", "Executor", "Expected", "Fiber", "Inbox", "Killed", "Loop", "Process", "Stage", "Thread"]

BURST = 6  # callbacks of one loop in a row, at most
START = 1_000.0  # loop time at the beginning


class Killed(BaseException):
    """Raised in a fiber whose process was killed, where it had paused."""


class Expected(Exception):
    """Raised in a callback on purpose."""


class Process:
    """What belongs to one process: a loop and fibers. Once it is `dead`, none of them runs."""

    def __init__(self, stage: "Stage", name: str) -> None:
        self.stage = stage
        self.name = name
        self.dead = False
        self.committing = False  # its writer is between the commit and what follows in memory
        self.loop = Loop(stage, self)
        self.fibers: dict[Fiber, None] = {}
        stage.processes.append(self)

    def kill(self) -> None:
        """Unwind all fibers and tasks; what they do meanwhile is seen by nobody (the world has replaced disk and memory)."""
        self.dead = True
        self.stage.processes.remove(self)
        for fiber in list(self.fibers):
            fiber.unwind()
        self.loop.unwind()


class Fiber(greenlet):
    """A thread, or a job on one."""

    serials = itertools.count()

    def __init__(self, process: Process, run: Callable[[], None]) -> None:
        super().__init__(self._main, process.stage.hub)
        self.process = process
        self.ended = False
        self.started = False
        self._run_once = run
        process.fibers[self] = None

    def _main(self) -> None:
        self.started = True
        try:
            self._run_once()
        except Killed:
            pass
        finally:
            self.ended = True
            self.process.fibers.pop(self, None)

    def unwind(self) -> None:
        """End it where it has paused."""
        self.process.stage.forget(self)
        for _ in range(100):  # a handler of the code may pause again
            if self.ended or not self.started:
                break
            self.switch()
        self.process.fibers.pop(self, None)


class Stage:
    """Time, and everything that can run."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.hub = getcurrent()
        self.now = START
        self.processes: list[Process] = []
        self.current: Process | None = None  # whose callback runs
        self.stepped = 0
        self._runnable: list[Fiber] = []
        self._later: list[tuple[float, int, Fiber | Callable[[], None]]] = []  # sleeping fibers, and events of the world
        self._serial = itertools.count()
        self.failures: list[str] = []

    @property
    def process(self) -> Process | None:
        """The process whose code runs now."""
        me = getcurrent()
        return me.process if isinstance(me, Fiber) else self.current

    def at(self, moment: float, event: Callable[[], None]) -> None:
        """Call `event()` at a moment of loop time."""
        heapq.heappush(self._later, (max(moment, self.now), next(self._serial), event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.at(self.now + seconds, event)

    # Fibers

    def start(self, fiber: Fiber) -> None:
        """Let a fiber run from the next step on."""
        self._runnable.append(fiber)

    def forget(self, fiber: Fiber) -> None:
        if fiber in self._runnable:
            self._runnable.remove(fiber)
        self._later = [row for row in self._later if row[2] is not fiber]
        heapq.heapify(self._later)

    def pause(self, seconds: float = 0.0) -> None:
        """Called by code on a fiber: let others run; on a loop: nothing."""
        me = getcurrent()
        if not isinstance(me, Fiber):
            return
        if me.process.dead:
            raise Killed
        if seconds > 0:
            heapq.heappush(self._later, (self.now + seconds, next(self._serial), me))
        else:
            self._runnable.append(me)
        self.hub.switch()
        if me.process.dead:
            raise Killed

    def wait(self) -> None:
        """Called by code on a fiber: sleep until `start` is called for it."""
        me = getcurrent()
        assert isinstance(me, Fiber)
        if me.process.dead:
            raise Killed
        self.hub.switch()
        if me.process.dead:
            raise Killed

    def perhaps_pause(self) -> None:
        """A point of code on a thread at which others may run: mostly for no time, sometimes for long."""
        if not isinstance(getcurrent(), Fiber):
            return  # a loop does not pause, and a check must not change the run
        drawn = self.random.random()
        if drawn < 0.65:
            return
        if drawn < 0.85:
            self.pause()
        elif drawn < 0.99:
            self.pause(self.random.random() * 0.02)
        else:
            self.pause(self.random.choice((0.1, 0.3, 1.5)))

    # Running

    def step(self) -> bool:
        """Run one thing; False when nothing will ever run."""
        ready: list[Any] = [process.loop for process in self.processes if process.loop.ready]
        ready += self._runnable
        self.stepped += 1
        if not ready:
            return self._advance()
        one = ready[0] if len(ready) == 1 else ready[int(self.random.random() * len(ready))]
        if isinstance(one, Fiber):
            self._runnable.remove(one)
            one.switch()
        else:
            for _ in range(1 + int(self.random.random() * BURST)):
                if not one.ready or one.process.dead:
                    break
                one.run_one()
        return True

    def _advance(self) -> bool:
        """Nothing is ready: go on to the next moment at which something is."""
        moments = [loop.next_timer() for loop in (process.loop for process in self.processes)]
        if self._later:
            moments.append(self._later[0][0])
        moment = min((m for m in moments if m is not None), default=None)
        if moment is None:
            return False
        self.now = max(self.now, moment)
        for process in self.processes:
            process.loop.expire()
        while self._later and self._later[0][0] <= self.now:
            _, _, due = heapq.heappop(self._later)
            if isinstance(due, Fiber):
                self._runnable.append(due)
            else:
                due()
        return True


class Task(asyncio.Task):  # type: ignore[type-arg]
    """A task that is hashed by its serial number, so that the order of a set of tasks is the same in each run."""

    def __hash__(self) -> int:
        return self.serial

    serial = 0


class Loop(asyncio.AbstractEventLoop):
    """An event loop whose callbacks the stage runs, one at a time, in order."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage = stage
        self.process = process
        self.ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._serial = itertools.count(1)
        self._tasks: list[Task] = []
        self._context = contextvars.copy_context()
        self.threads = Executor(1000)

    def time(self) -> float:
        return self.stage.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.process.dead

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context or self._context)
        if not self.process.dead:
            self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        return self.call_at(self.stage.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        handle = asyncio.TimerHandle(when, callback, args, self, context or self._context)
        if not self.process.dead:
            heapq.heappush(self._timers, (when, next(self._serial), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Any = None) -> Task:  # type: ignore[override]
        task = Task.__new__(Task)
        task.serial = next(self._serial)  # before the constructor, which puts it into a set
        task.__init__(coro, loop=self, name=name or "task", context=context)  # type: ignore[misc]
        if len(self._tasks) > 200:
            self._tasks = [one for one in self._tasks if not one.done()]
        self._tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Expected):
            return
        self.stage.failures.append(f"{self.process.name}: {context.get('message')}: {type(error).__name__}: {error}")

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        return (executor or self.threads).submit_to(self, func, args)

    def next_timer(self) -> float | None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def expire(self) -> None:
        while self._timers and self._timers[0][0] <= self.stage.now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                self.ready.append(handle)

    def run_one(self) -> None:
        handle = self.ready.popleft()
        if handle.cancelled():
            return
        asyncio._set_running_loop(self)
        self.stage.current = self.process
        try:
            handle._run()
        finally:
            asyncio._set_running_loop(None)
            self.stage.current = None

    def unwind(self) -> None:
        """Close all coroutines. The process is dead: whatever they do has no effect."""
        self.ready.clear()
        self._timers.clear()
        failures = list(self.stage.failures)
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if not task.done():
                asyncio._set_running_loop(self)
                try:
                    task.get_coro().close()  # type: ignore[union-attr]
                except (RuntimeError, Killed, Exception):
                    pass
                finally:
                    asyncio._set_running_loop(None)
        self.stage.failures[:] = failures


class Executor:
    """A ThreadPoolExecutor: jobs are fibers, `most` at a time, begun in order."""

    def __init__(self, most: int, name: str = "") -> None:
        self._most = most
        self._running = 0
        self._jobs: deque[tuple[Loop, asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._shut = False

    def submit_to(self, loop: Loop, function: Callable[..., Any], args: tuple[Any, ...]) -> "asyncio.Future[Any]":
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = loop.create_future()
        self._jobs.append((loop, future, lambda: function(*args)))
        self._more()
        return future

    def _more(self) -> None:
        while self._jobs and self._running < self._most:
            loop, future, job = self._jobs.popleft()
            if future.cancelled():
                continue
            self._running += 1
            loop.stage.start(Fiber(loop.process, lambda loop=loop, future=future, job=job: self._run(loop, future, job)))  # type: ignore[misc]

    def _run(self, loop: Loop, future: "asyncio.Future[Any]", job: Callable[[], Any]) -> None:
        result: Any = None
        error: Exception | None = None
        loop.stage.perhaps_pause()
        try:
            result = job()
        except Exception as raised:
            error = raised
        loop.call_soon_threadsafe(_set, future, result, error)
        self._running -= 1
        self._more()

    def shutdown(self, wait: bool = True) -> None:
        self._shut = True
        me = getcurrent()
        while wait and isinstance(me, Fiber) and (self._running or self._jobs):
            me.process.stage.pause(0.01)


def _set(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class Thread:
    """threading.Thread of the process whose code runs."""

    def __init__(self, stage: Stage, target: Callable[[], None]) -> None:
        assert stage.process is not None
        self._stage = stage
        self._fiber = Fiber(stage.process, target)

    def start(self) -> None:
        self._stage.start(self._fiber)

    def is_alive(self) -> bool:
        return not self._fiber.ended

    def join(self) -> None:
        while not self._fiber.ended:
            self._stage.pause(0.01)


class Condition:
    """threading.Condition. Between two pauses nothing else runs, so its lock needs no code."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *error: object) -> None:
        pass

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until = self._stage.now + (float("inf") if timeout is None else timeout)
        while not (result := predicate()) and isinstance(getcurrent(), Fiber) and self._stage.now < until:
            self._stage.pause(0.005)
        return result

    def notify_all(self) -> None:
        pass


class Inbox:
    """queue.SimpleQueue: `put` from anywhere, `get` by one fiber."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._items: deque[Any] = deque()
        self._waiting: Fiber | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._stage.start(waiting)

    def get(self) -> Any:
        while not self._items:
            me = getcurrent()
            assert isinstance(me, Fiber)
            self._waiting = me
            self._stage.wait()
        return self._items.popleft()
