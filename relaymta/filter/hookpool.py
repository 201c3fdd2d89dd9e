"""The processes of one file of hooks: which one is called, which one takes its place, and which version of the file they have.

A *version* is the file as it was imported at one time. It has one process that is called, and one more that has imported the file
and waits, so that nobody waits for an import when the first one has to go. Sessions keep the version with which they began.

What becomes of a call:

answered    its reply, or what the hook has raised.
late        no answer within its time, which begins when a process is given it first: whoever waits hears that, and the process
            has a moment to confirm that it has stopped the call; else it is killed. One that blocks is killed at once.
held        it blocks the process: after HELD looks all others that have not begun are given to the one that waits, as what comes
            from then on is; after LONG looks those that have, too, which begin there anew, once. It has its time.
ended       the process has ended under it: if it was running then, it has failed; if not, it is called once more, or a few times,
            where each time another one was to blame.

State, changed on the loop alone: `Version.called`, `spares`, `others` and `waiting` by its methods; `Pool.version` by `came_up`,
`_candidate` by this, `_looked` and `did_not_come_up`.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from relaymta.filter.hookframes import Reply
from relaymta.filter.hookprocess import Ask, Process
from relaymta.filter.judgement import FilterFailure
from relaymta.watch import stamp

__all__ = ["WAIT", "Pool", "Version"]

TICK: Final = 0.025  # seconds between two looks at calls, while there are any
HELD: Final = 2  # looks at which a call is at the same step: then it holds the event loop of its process
LONG: Final = 16  # looks after which it is not waited for any more
STOPPING: Final = 0.1  # seconds for a process to stop a call
TRIES: Final = 4  # processes that may end under a call, others being to blame; of an end that nobody knows the reason of, one
WAIT: Final = 5.0  # seconds for which a call waits for a process
IMPORT: Final = 30.0  # seconds that an import may take
SPARES: Final = 2  # that wait, at most: one that was held, and has come back, is one of them
PROCESSES: Final = 4  # of one version at the same time
PAUSE_LEAST, PAUSE_MOST, PAUSE_BROKEN = 0.1, 1.0, 10.0  # seconds between two starts: twice as many with each in a row
STABLE: Final = 10.0  # seconds after which one that ends is not taken for one of a row
OLD: Final = 300.0  # seconds for which sessions keep a version that was replaced
OLD_MOST: Final = 4  # versions that were replaced, at the same time: a process each
FILES: Final = 1000  # that are looked at
LOOK: Final = 1.0  # seconds, at least, between two looks at the files


class Failed(FilterFailure):
    """There is no answer. `kind`: of the metric."""

    def __init__(self, reason: str, kind: str, text: str, own: bool = True) -> None:
        super().__init__(reason, text, own)  # type: ignore[arg-type]
        self.kind = kind


class Listener(Protocol):
    """Who is told."""

    def warn(self, text: str) -> None:
        """Something is wrong."""

    def changed(self, hooks: frozenset[str]) -> None:
        """The version in use has these hooks from now on."""


class Version:
    """See above. `hooks`, `bodies`, `files`: as of hookfile.HookFile, once it is `known`; `sessions`: that keep it."""

    def __init__(self, pool: "Pool", loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self.known = False
        self.hooks: frozenset[str] = frozenset()
        self.bodies: frozenset[str] = frozenset()
        self.files: tuple[tuple[str, int, int, int], ...] = ()
        self.sessions = 0
        self.problem = ""  # why no process could be started last
        self.called: Process | None = None
        self.spares: deque[Process] = deque()  # that wait
        self.others: set[Process] = set()  # being started, or held by a call
        self.waiting: deque[Ask] = deque()
        self._tasks: dict[Process, asyncio.Task[None]] = {}
        self._row = 0  # processes that have ended soon, one after the other
        self._pause: asyncio.TimerHandle | None = None
        self._over = self._replaced = False
        self._old: asyncio.TimerHandle | None = None

    # Calls

    def ask(self, ask: Ask) -> None:
        """Call a hook; `ask.future` gets what comes of it."""
        process = self.called
        if process is not None:
            try:
                taken = process.put(ask, self._loop.time() + self._pool.seconds)
            except OSError as error:  # no descriptor is left
                self._fail(ask, Failed("connect", "unavailable", f"it cannot be called: {error.strerror}", False))
                return
            if not taken:
                self._fail(ask, Failed("connect", "unavailable", "the process of hooks takes no more calls", False))
        elif self._over or (self._replaced and not self._pool.closed):
            self._pool.again(self, ask)
        elif self.problem and not self.others:
            self._fail(ask, Failed("connect", "unavailable", self.problem, False))
        else:
            until = self._loop.time() + WAIT
            ask.deadline = min(ask.limit, until) if ask.limit else until
            self.waiting.append(ask)
            self.start()

    def drop(self, ask: Ask) -> None:
        """Nobody waits for a call any more."""
        for process in self._tasks:
            if ask.number in process.pending:
                process.cancel(ask.number, self._loop.time() + STOPPING)
                self._pool.tick_soon()
                return
        if ask in self.waiting:
            self.waiting.remove(ask)

    def _fail(self, ask: Ask, why: Failed) -> None:
        if not ask.future.done():
            ask.future.set_exception(why)

    def look(self, now: float) -> bool:
        """Look for calls that are late, or hold a process. Whether there is anything to look for."""
        for ask in [ask for ask in self.waiting if ask.deadline <= now]:
            self.waiting.remove(ask)
            self._fail(ask, self._late(ask) if 0.0 < ask.limit <= now else self._none_ready())
        for process in [*self._tasks]:
            self._look_at(process, now)
        return bool(self.waiting or any(one.pending or one.cancelling or not one.ready for one in self._tasks))

    def _look_at(self, process: Process, now: float) -> None:
        if not process.ready:
            if now - process.started_at > IMPORT:
                process.end(f"has not imported the file within {IMPORT:g} s")
            return
        same = process.look()
        if same >= HELD and not process.held:
            self.is_held(process, process.now[0], "", False)
        if same >= LONG and process.held:
            self._move(process, [ask for ask in process.pending.values() if ask.number != process.now[0] and not ask.moved])
        late = [ask for ask in process.pending.values() if ask.deadline <= now]
        running = process.now[0]
        for ask in late:  # one that waits for its turn there, or behind another one, is not what keeps the process
            waits = not process.has_begun(ask) or (same and running != ask.number)
            process.cancel(ask.number, now + STOPPING + (self._pool.seconds if waits else 0.0))
            self._fail(ask, self._late(ask))
        if same and any(running == ask.number for ask in late):
            process.end("was ended: a hook blocks it")
        elif any(until <= now for until in process.cancelling.values()):
            process.end("was ended: a hook does not stop")

    def _late(self, ask: Ask) -> Failed:
        return Failed("timeout", "timeout", f"{ask.hook}: no answer in {self._pool.seconds:g} s")

    def _none_ready(self) -> Failed:
        return Failed("connect", "unavailable", self.problem or "no process of hooks is ready", False)

    # Owner

    def came_up(self, process: Process, reply: Reply) -> None:
        """As of Owner."""
        if reply.word == "broken":
            self.problem = reply.reason
            return  # its end follows
        self.problem = ""
        files = tuple(reply.files[:FILES])
        if self.known and files != self.files:  # they have changed since: that is another version
            self._pool.look()
            self._row += 1
            process.end("")
            return
        self.hooks, self.bodies, self.files = frozenset(reply.hooks), frozenset(reply.bodies), files
        self.known = True
        self.others.discard(process)
        self._settle(process)
        self._pool.came_up(self)

    def answered(self, process: Process, ask: Ask, reply: Reply) -> None:
        """As of Owner. One that was cancelled by somebody else in the process is called once more."""
        if ask.future.done():
            return
        if reply.word == "cancelled" and ask.tries < TRIES:
            ask.tries += 1
            self.ask(ask)
        else:
            ask.future.set_result(reply)

    def came_back(self, process: Process) -> None:
        """As of Owner."""
        process.held = False
        self.others.discard(process)
        self._settle(process)

    def _settle(self, process: Process) -> None:
        """A process is ready: to be called, or to wait."""
        if self._over:
            process.end("")
        elif self.called is None:
            self.called = process
            while self.waiting and self.called is process:
                self.ask(self.waiting.popleft())
            if not self._replaced:
                self.start()
        elif len(self.spares) < SPARES and not self._replaced:
            self.spares.append(process)
        else:
            process.end("")

    def is_held(self, process: Process, number: int, place: str, long: bool) -> None:
        """As of Owner, or seen from here (`place`: ""): the other calls that have not begun go elsewhere."""
        if long:
            self._move(process, [ask for ask in process.pending.values() if ask.number != number and not ask.moved])
            return
        if place:
            self._pool.held(place)
        if process.held or not process.pending or number in process.cancelling:
            return
        process.held = True
        if process in self.spares:
            self.spares.remove(process)
        self.others.add(process)
        process.withdraw()
        if process is self.called:
            self._succeed()
        self._move(process, [ask for ask in process.pending.values() if ask.number != number and not process.has_begun(ask)])

    def _move(self, process: Process, asks: list[Ask]) -> None:
        """Call these elsewhere: in a process that is not held."""
        for ask in asks:
            ask.moved = ask.moved or process.has_begun(ask)
            process.cancel(ask.number, ask.limit + self._pool.seconds)
            self.ask(ask)

    def ended(self, process: Process, why: str) -> None:
        """As of Owner."""
        culprit, pending = process.suspect, list(process.pending.values())
        process.pending.clear()
        process.cancelling.clear()
        lasted = self._loop.time() - process.started_at
        if why:
            self._row = 1 if process.ready and lasted > STABLE else self._row + 1
        self.others.discard(process)
        if process in self.spares:
            self.spares.remove(process)
        if why and not process.ready:
            self.problem = self.problem or f"the process of hooks {why}"
            self._pool.did_not_come_up(self)
            while self.waiting and self.called is None and not self.others:
                self._fail(self.waiting.popleft(), Failed("connect", "unavailable", self.problem, False))
        elif why:
            self._pool.listener.warn(f"the process of hooks {why}")
        if process is self.called:
            self._succeed()
        for ask in pending:
            if ask.future.done():
                continue
            if ask.number == culprit or ask.tries >= TRIES:
                self._fail(ask, Failed("refused", "ended", f"{ask.hook}: the process of hooks {why}"))
            else:
                ask.tries += 1 if culprit or process.spent else TRIES
                self.ask(ask)
        if not self._over and not self._replaced:
            self.start()

    def _succeed(self) -> None:
        """The one that waits takes the place of the one that was called."""
        self.called = self.spares.popleft() if self.spares else None
        if not self._over:
            self.start()
        while self.waiting and self.called is not None:
            self.ask(self.waiting.popleft())

    # Processes

    def start(self) -> None:
        """Start what is missing: one that is called, and one that waits. Not at once, where they end one after the other."""
        starting = [one for one in self.others if not one.ready]
        missing = (self.called is None) + (not self.spares) - len(starting)
        if self._over or missing <= 0 or (starting and self.called is None) or self._pause is not None:
            return
        if len(self._tasks) >= PROCESSES:
            return
        if self._row:
            most = PAUSE_BROKEN if self.problem else PAUSE_MOST
            seconds = min(PAUSE_LEAST * 2 ** min(self._row - 1, 10), most) if self._row > 1 else 0.0
            self._pause = self._loop.call_later(seconds, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._pause = None
        if self._over:
            return
        process = Process(self, self._loop)
        self.others.add(process)
        task = self._tasks[process] = self._loop.create_task(process.run(self._pool.path, self._pool.memory))
        task.add_done_callback(lambda _: self._left(process))
        self._pool.tick_soon()

    def _left(self, process: Process) -> None:
        task = self._tasks.pop(process)
        if not task.cancelled():
            task.exception()
        if not self._over and not self._replaced:
            self.start()

    def keep(self) -> None:
        """A session has begun, and keeps it until `leave`."""
        self.sessions += 1

    def leave(self) -> None:
        """A session has ended."""
        self.sessions -= 1
        if self._replaced and not self.sessions:
            self.end()

    def replaced(self) -> None:
        """No session begins with it any more."""
        if self._replaced:
            return
        self._replaced = True
        if not self.sessions or (self.called is None and not self._pool.closed):
            self.end()
            return
        self._old = self._loop.call_later(OLD, self.end)
        for process in [*self.spares]:
            process.end("")

    def is_last(self) -> None:
        """Its sessions keep it until they end, since no other will be in use for them."""
        if self._old is not None:
            self._old.cancel()

    def end(self) -> None:
        """End its processes. What is under way fails, or is called in the version in use."""
        self._over = self._replaced = True
        for timer in (self._pause, self._old):
            if timer is not None:
                timer.cancel()
        for process in [*self._tasks]:
            process.end("")
        while self.waiting:
            self._pool.again(self, self.waiting.popleft())
        self._pool.over(self)


class Pool:
    """See above. `path`: of the file; `memory`: octets of a process; `seconds`: that a call may take; `version`: in use;
    `closed`: no session begins here any more."""

    def __init__(self, path: str, seconds: float, memory: int, listener: Listener) -> None:
        self.path = path
        self.seconds = seconds
        self.memory = memory
        self.listener = listener
        self._loop = asyncio.get_running_loop()
        self.version = Version(self, self._loop)
        self._candidate: Version | None = None
        self._versions = [self.version]
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False
        self._refused: object = None  # files as they were when they could not be imported
        self._looking: asyncio.Future[object] | None = None
        self._look_after = 0.0
        self.held: Callable[[str], None] = lambda place: None

    def begin(self) -> None:
        """Start what is called."""
        self.version.start()

    async def call(
        self, version: Version, hook: str, arguments: list[object], descriptor: int = -1
    ) -> Reply:  # fmt: skip
        """Call a hook of a version. `descriptor`: goes with it, and stays the caller's. Failed: there is no answer. Cancelled: it
        is stopped there."""
        loop = self._loop
        self._number += 1
        ask = Ask(self._number, hook, arguments, descriptor, loop.create_future())
        version.ask(ask)
        if self._timer is None:
            self._timer = loop.call_later(TICK, self._tick)
        try:
            return await ask.future
        except asyncio.CancelledError:
            for one in self._versions:
                one.drop(ask)
            if ask.future.done() and not ask.future.cancelled():
                ask.future.exception()
            raise

    def again(self, gone: Version, ask: Ask) -> None:
        """A call of a version that has ended: in the one in use."""
        if self.version is gone or self.closed:
            if not ask.future.done():
                ask.future.set_exception(Failed("connect", "unavailable", "the hooks have been replaced", False))
        else:
            self.version.ask(ask)

    def tick_soon(self) -> None:
        """There is something to look for."""
        if self._timer is None:
            self._timer = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now, busy = self._loop.time(), False
        for version in [*self._versions]:
            busy = version.look(now) or busy
        if busy:
            self.tick_soon()

    # Versions

    def came_up(self, version: Version) -> None:
        """A process of a version is ready."""
        if version is self._candidate:
            before, self.version, self._candidate = self.version, version, None
            self._refused = None
            before.replaced()
            for oldest in [one for one in self._versions if one is not version][:-OLD_MOST]:
                oldest.end()
        if version is self.version:
            self.listener.changed(version.hooks)

    def did_not_come_up(self, version: Version) -> None:
        """One could not be started."""
        self.listener.warn(version.problem + ("; what was read before stays in use" if version is self._candidate else ""))
        if version is self._candidate:
            self._candidate = None
            version.end()

    def over(self, version: Version) -> None:
        """It has ended."""
        if version in self._versions and (version is not self.version or self.closed):
            self._versions.remove(version)

    def look(self) -> None:
        """Look whether the files have changed, on a thread; what has is imported by a process of its own, and is in use once that
        has succeeded."""
        now = self._loop.time()
        if self._looking is not None or self.closed or now < self._look_after or self._candidate is not None:
            return
        if not self.version.known:  # it is imported anew anyway
            return
        self._look_after = now + LOOK
        paths = [path for path, *_ in self.version.files]
        self._looking = self._loop.run_in_executor(None, lambda: tuple((path, *(stamp(path) or ())) for path in paths))
        self._looking.add_done_callback(self._looked)

    def _looked(self, future: "asyncio.Future[object]") -> None:
        self._looking = None
        if future.cancelled() or future.exception() is not None or self.closed:
            return
        found = future.result()
        if found in (self.version.files, self._refused) or self._candidate is not None:
            return
        self._refused = found  # unless it can be imported
        self._candidate = Version(self, self._loop)
        self._versions.append(self._candidate)
        self._candidate.start()

    def close(self) -> None:
        """No session begins here any more: the processes end with the last one."""
        self.closed = True
        if self._candidate is not None:
            self._candidate.end()
            self._candidate = None
        self.version.replaced()
        for version in self._versions:
            version.is_last()

    def stop(self) -> None:
        """All processes end now."""
        self.closed = True
        for version in [*self._versions]:
            version.end()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def open(self) -> int:
        """Descriptors that its processes have here: a socket each."""
        return sum(len(version._tasks) for version in self._versions)
