"""The workers, one for each slot. A slot's whole life is in this file.

    state     what holds                                     it becomes
    --------  ---------------------------------------------  -------------------------------------------------------------------
    DEAD      no process                                     STARTING: a process was executed (after the back-off)
    STARTING  a process that has not answered `start`        READY: its answer; LATE: after START_SECONDS; DEAD: the process ended
    READY     a worker that serves its sockets               LATE: no heartbeat for LATE_SECONDS; DEAD: the process ended
    LATE      a process that starts slowly or is silent      READY: it has started and answers; DEAD: the process ended
    LEAVING   a worker that ends for a successor of another  DEAD: the process ended
              program (upgrade.py)

Each of the first four becomes LEAVING when the slot is handed over (`Slots.hand_over`); then it stays DEAD, until it is taken
back. In the other program the same slot is STARTING meanwhile: its process has been executed, and waits at the slot's `gate`.

A slot's sockets stay open here whatever its state is. They are *lent* (`Slot.loan`) to a ready worker while the slot is DEAD,
LATE or LEAVING, and on until it is READY (or the other program's is), so that no new connection waits for a process that does
not answer.

Only the slot's keeper, a task that lives as long as the slot, changes its state, process, channel and loan. It is the only one
who executes, kills and buries its processes; so no slot is forgotten, and none has two of them. A process that cannot be executed
(no memory, too many processes) is tried again with a back-off. A worker that is silent for KILL_SECONDS is killed and replaced;
one that starts is left alone for START_KILL_SECONDS, since a large spool takes long.

The heartbeat is a request over the worker's channel: what answers it is the worker's event loop. Silence is counted in checks of
our own, not by a clock: after all processes were stopped together (a debugger, a frozen container) no worker is late.
"""

import asyncio
import contextlib
import enum
import errno
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from relaymta.control import Channel, Refused, program
from relaymta.metrics import Counters, clear_filter_gauges
from relaymta.shm import NAMED, NAMED_CELLS, Shared

__all__ = ["Slot", "Slots", "State"]

CHECK_SECONDS = 1.0  # between two heartbeats
LATE_SECONDS = 5.0  # without a heartbeat: the sockets are lent
KILL_SECONDS = 60.0  # without a heartbeat: the worker is killed
START_SECONDS = 30.0  # from exec to ready: then the sockets are lent
START_KILL_SECONDS = 600.0  # without a heartbeat while it starts
EASE_SECONDS = 35.0  # for a worker that is to leave to finish deliveries, while it takes mail
END_SECONDS = 10.0  # for a worker that could not start to end by itself
LEND_SECONDS = 5.0  # for a worker to take over sockets
BACKOFF_FIRST, BACKOFF_MOST = 0.1, 10.0
STEADY_SECONDS = 10.0  # a worker that has lived so long resets the back-off
STOP_SECONDS = 45.0
# Message data of some 100 kB is common: by default glibc would map and unmap memory for each message, and fault in every page.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "4"}


# Why a worker was replaced: it did not start, or ended by a signal or by itself; silent: it did not answer, and was killed.
RESTARTS = ("start", "signal", "exit", "silent")


class State(enum.StrEnum):
    """What a slot's worker is doing; see the table above."""

    DEAD = "dead"
    STARTING = "starting"
    READY = "ready"
    LATE = "late"
    LEAVING = "leaving"


_NEXT = {
    State.DEAD: {State.STARTING},
    State.STARTING: {State.READY, State.LATE, State.LEAVING, State.DEAD},
    State.READY: {State.LATE, State.LEAVING, State.DEAD},
    State.LATE: {State.READY, State.LEAVING, State.DEAD},
    State.LEAVING: {State.DEAD},
}


class Slot:
    """A worker's place: its number, sockets and shards, which outlive it, and its current process."""

    def __init__(self, number: int, sockets: list[socket.socket], shards: list[int]) -> None:
        self.number = number
        self.sockets = sockets
        self.shards = shards
        self.state = State.DEAD
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Channel | None = None
        self.loan: _Loan | None = None
        self.lives = 0  # processes that were executed
        self.proven = False  # a worker of this slot has been ready
        self.first: asyncio.Future[str] | None = None  # "" when it was ready for the first time, or why the first could not start
        self.backoff = BACKOFF_FIRST
        self.probed: list[tuple[int, bool]] = []  # messages in flight at the last worker's death; whether to be probed alone
        self.culprit = 0
        self.handed = False  # to another program: none is started here
        self.taken = False  # its worker is ready
        self.vacant = asyncio.Event()  # it is handed, and has no process
        self.gate = asyncio.Event()  # the worker may open its shards
        self.gate.set()
        self.waits = asyncio.Event()  # the worker runs, and waits at the gate
        self._called = asyncio.Event()

    def call(self) -> None:
        """Wake the keeper: something has changed."""
        self._called.set()

    async def called(self) -> None:
        """Until `call`. For the keeper alone."""
        await self._called.wait()
        self._called.clear()

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    def close(self) -> None:
        """Close the listening sockets (those of systemd stay open there): a client in a backlog that nobody serves any more would
        not try another host."""
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            sock.close()

    def enter(self, state: State) -> None:
        """Change the state; only the slot's keeper may. AssertionError when the table has no such transition."""
        assert state in _NEXT[self.state], f"worker {self.number}: {self.state} -> {state}"
        self.state = state

    def __str__(self) -> str:
        lent = f", its sockets are lent to worker {self.loan.lender.number}" if self.loan is not None else ""
        return f"{self.number} ({self.state}{lent})"


@dataclass(slots=True)
class _Loan:
    """The worker which accepts connections on a slot's sockets."""

    lender: Slot
    channel: Channel  # of the process that has borrowed: its successor has not

    @property
    def works(self) -> bool:
        return self.lender.ready and self.lender.channel is self.channel


@dataclass(slots=True)
class _Life:
    """One process of a slot, from exec to its end."""

    process: asyncio.subprocess.Process
    channel: Channel
    ended: asyncio.Task[int]
    begun: asyncio.Task[Any]  # its answer to `start`
    started: float = field(default_factory=time.monotonic)
    checked: float = field(default_factory=time.monotonic)
    left: float = 0.0  # when it was told to leave
    beat: asyncio.Task[Any] | None = None
    silent: float = 0.0
    served: bool = False
    refused: float = 0.0  # when it answered that it cannot start (or its channel was closed before)
    killed: bool = False

    @property
    def has_begun(self) -> bool:
        return self.begun.done() and not self.begun.cancelled() and self.begun.exception() is None

    def listen(self) -> None:
        """Take note of an answered heartbeat, or of its absence, and send another."""
        now = time.monotonic()
        step, self.checked = min(now - self.checked, 2 * CHECK_SECONDS), now
        answered = self.beat is not None and self.beat.done() and not isinstance(self.beat.exception(), ConnectionError)
        self.silent = 0.0 if answered else self.silent + step
        if self.beat is None or self.beat.done():
            self.beat = asyncio.get_running_loop().create_task(self.channel.ask("alive"))

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Slots:
    """The slots of one supervisor."""

    def __init__(
        self,
        shared: Shared,
        warn: Callable[[str], None],
        stopping: asyncio.Event,
        arguments: Callable[[Slot], dict[str, Any]],
        handle: Callable[[str, dict[str, Any], list[int]], Awaitable[Any]],
        started: Callable[[Slot], None] = lambda slot: None,
    ) -> None:
        """`warn(text)`: logs a warning. `arguments(slot)`: what every worker needs at its start. `handle`: as of
        Channel, for what workers send. `started(slot)`: its worker is ready, for the first time or again."""
        self._shared = shared
        self._warn = warn
        self._stopping = stopping
        self._arguments = arguments
        self._started = started
        self._handle = handle
        self._slots: list[Slot] = []
        self._keepers: list[asyncio.Task[None]] = []
        self.restarts = dict.fromkeys(RESTARTS, 0)  # workers that have ended, and were replaced

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, slot: Slot) -> None:
        """Add a slot, before `start`."""
        self._slots.append(slot)

    def ready(self) -> list[tuple[Slot, Channel]]:
        """The slots whose workers answer, with their channels."""
        return [(slot, slot.channel) for slot in self if slot.ready and slot.channel is not None]

    def notify(self, op: str, /, **args: Any) -> None:
        """Send a notification to all workers, also to those that are starting or late."""
        for slot in self:
            if slot.channel is not None:
                slot.channel.notify(op, **args)

    def states(self) -> dict[str, int]:
        """How many slots are in each state."""
        return {str(state): sum(slot.state is state for slot in self) for state in State}

    def health(self) -> str:
        """ "" when all workers are ready; otherwise which are not, for operators."""
        down = [str(slot) for slot in self if not slot.ready and not slot.handed]
        return f"workers not ready: {', '.join(down)}" if down else ""

    async def start(self) -> str:
        """Start a worker in each slot, and wait until all have been ready. Why the first could not start; "" when none failed, or
        the relay is being stopped."""
        loop = asyncio.get_running_loop()
        for slot in self:
            slot.first = slot.first or loop.create_future()
        self._keepers = [loop.create_task(self._keep(slot)) for slot in self]
        stopping = loop.create_task(self._stopping.wait())
        waiting: set[asyncio.Future[Any]] = {slot.first for slot in self if slot.first is not None}
        try:
            while waiting and not stopping.done():
                done, _ = await asyncio.wait({*waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                waiting -= done
                failure = next((one.result() for one in done if one is not stopping and one.result()), "")
                if failure:
                    return str(failure)
        finally:
            stopping.cancel()
        return ""

    async def stop(self) -> None:
        """Stop all workers: those that have not ended after STOP_SECONDS are killed. `stopping` is set."""
        self.notify("stop")
        for slot in self:
            slot.call()
        if not self._keepers:
            return
        await asyncio.wait(self._keepers, timeout=STOP_SECONDS)
        for slot in self:
            if slot.process is not None and slot.process.returncode is None:
                slot.process.kill()
        await asyncio.wait(self._keepers, timeout=END_SECONDS)

    # Another program

    async def hand_over(self, slot: Slot) -> None:
        """Have a slot's worker end; returns when it has, and its shards can be opened by another program. None is started here
        until `take_back`."""
        slot.vacant.clear()
        slot.handed = True
        slot.call()
        await slot.vacant.wait()

    def taken(self, slot: Slot) -> None:
        """Another program's worker serves the sockets of a slot that was handed over."""
        slot.taken = True
        slot.call()

    def take_back(self) -> None:
        """Start workers again in all slots that were handed over: the other program has ended."""
        for slot in self:
            slot.handed = slot.taken = False
            slot.backoff = BACKOFF_FIRST
            slot.call()

    def hold(self) -> None:
        """Before `start`: workers are executed, and open nothing until `open_gate`. Their sockets may be lent meanwhile."""
        loop = asyncio.get_running_loop()
        for slot in self:
            slot.first = loop.create_future()
            slot.gate.clear()
            slot.proven = True

    async def held(self) -> str:
        """Wait until the workers wait at their gates: ""; or why one does not."""
        loop = asyncio.get_running_loop()
        firsts = [slot.first for slot in self if slot.first is not None]
        for slot in self:
            waits = loop.create_task(slot.waits.wait())
            waiting: set[asyncio.Future[Any]] = {waits, *firsts}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waits.cancel()
            if failure := next((first.result() for first in firsts if first.done()), ""):
                return failure
        return ""

    def open_gate(self, slot: Slot, probed: list[tuple[int, bool]], culprit: int) -> None:
        """The other program's worker has left the slot: this one may open its shards. `probed`, `culprit`: what that one had in
        flight when it died (shm.InFlight)."""
        slot.probed, slot.culprit = probed, culprit
        slot.gate.set()
        slot.call()

    async def lend_held(self) -> None:
        """Have the sockets of slots that wait lent to a worker that is ready; soon, where that takes long."""
        held = [slot for slot in self if not slot.gate.is_set()]
        for slot in held:
            slot.call()
        until = time.monotonic() + CHECK_SECONDS
        while time.monotonic() < until and not all(slot.loan for slot in held):
            await asyncio.sleep(0.01)

    # A slot's keeper

    async def _keep(self, slot: Slot) -> None:
        """Run one process after the other until the relay stops."""
        while not self._stopping.is_set():
            if slot.handed:
                slot.vacant.set()
                await self._arrange_loan(slot)
                await self._rest(slot, CHECK_SECONDS)
                continue
            pause = BACKOFF_MOST
            try:
                pause = await self._run(slot)
            except OSError as error:
                pause = slot.backoff = min(slot.backoff * 2, BACKOFF_MOST)
                hint = " (may this user execute it?)" if error.errno in (errno.EACCES, errno.ENOENT) else ""
                self._failed(slot, f"cannot start a worker: {sys.executable}: {error.strerror or error}{hint}")
            except Exception as error:  # a mistake of ours costs a worker, not the slot
                self._failed(slot, f"worker {slot.number}: internal error: {error!r}")
            until = time.monotonic() + pause
            while not self._stopping.is_set() and not slot.handed:
                await self._arrange_loan(slot)
                left = until - time.monotonic()
                if left <= 0:
                    break
                await self._rest(slot, min(left, CHECK_SECONDS))
        slot.vacant.set()

    async def _rest(self, slot: Slot, seconds: float) -> None:
        """Wait for so long, or until the relay stops or the keeper is called."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._stopping.wait()), loop.create_task(slot.called())]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _failed(self, slot: Slot, why: str) -> None:
        """A worker could not start. For the first one that is the answer of `start`; a later one is tried again."""
        if slot.first is not None and not slot.first.done():
            slot.first.set_result(why)
        else:
            self._warn(why)

    async def _run(self, slot: Slot) -> float:
        """Execute a process, attend it until it has ended, and clear what it held. The seconds until the next may be started.
        OSError when it cannot be executed."""
        life = await self._execute(slot)
        slot.lives += 1
        slot.enter(State.STARTING)
        slot.process = life.process
        if self._stopping.is_set():
            life.channel.notify("stop")
        called = asyncio.get_running_loop().create_task(slot.called())
        try:
            while not life.ended.done():
                waiting: set[asyncio.Task[Any]] = {life.ended, called} if life.begun.done() else {life.ended, called, life.begun}
                await asyncio.wait(waiting, timeout=CHECK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if called.done():
                    called = asyncio.get_running_loop().create_task(slot.called())
                if self._stopping.is_set() and not slot.gate.is_set():
                    life.channel.notify("stop")  # it is not the slot's channel yet
                if not life.ended.done() and not self._stopping.is_set():
                    if slot.handed and slot.state is not State.LEAVING:
                        await self._leave(slot, life)
                    self._check(slot, life)
                    await self._arrange_loan(slot)
        finally:
            called.cancel()
            if not life.ended.done():  # only after a mistake of ours
                life.kill()
                await life.ended
            await asyncio.wait({life.begun}, timeout=CHECK_SECONDS)  # an answer that was sent before the end
            self._bury(slot, life)
        lived = time.monotonic() - life.started
        if not life.served:
            slot.backoff = min(slot.backoff * 2, BACKOFF_MOST)
            return slot.backoff
        if lived > STEADY_SECONDS:
            slot.backoff = BACKOFF_FIRST
        return 0.0

    async def _execute(self, slot: Slot) -> _Life:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            process = await asyncio.create_subprocess_exec(
                *program("relaymta.worker", str(theirs.fileno())), pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL, env=MALLOC | os.environ,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        channel = Channel(ours, self._handle, lambda: None)
        begun = loop.create_task(self._begin(slot, channel))
        return _Life(process, channel, loop.create_task(process.wait()), begun)

    async def _begin(self, slot: Slot, channel: Channel) -> None:
        """Send `start`, and wait for its answer. The slot has its channel from the moment on at which the arguments are collected
        and sent: no later change of what workers share misses the new one, or comes before `start`."""
        if not slot.gate.is_set():
            await channel.ask("alive")  # so that a program that cannot be run is known before anything is changed
            slot.waits.set()
            await slot.gate.wait()
        descriptors = [self._shared.descriptor, *(s.fileno() for s in slot.sockets)]
        arguments = self._arguments(slot)
        slot.channel = channel
        await channel.ask(
            "start", descriptors, slot=slot.number, workers=len(self), shards=slot.shards, probed=slot.probed,
            culprit=slot.culprit, **arguments,
        )  # fmt: skip

    def _check(self, slot: Slot, life: _Life) -> None:
        """Judge a process that runs: once a heartbeat."""
        life.listen()
        if slot.state is State.LEAVING:
            if time.monotonic() - life.left > STOP_SECONDS and not life.killed:
                self._warn(f"worker {slot.number} (pid {life.process.pid}) has not left: it is killed")
                life.kill()
            return
        if not slot.gate.is_set():
            life.started = time.monotonic()
        if life.begun.done() and not life.has_begun:
            self._refused(slot, life)
        elif life.has_begun and life.silent < LATE_SECONDS and life.channel.open:
            if not slot.ready:
                self._is_ready(slot, life)
        elif slot.ready or (slot.state is State.STARTING and time.monotonic() - life.started > START_SECONDS):
            slot.enter(State.LATE)
            what = f"has not answered for {life.silent:.0f} s" if life.has_begun else f"is not ready after {START_SECONDS:.0f} s"
            self._warn(f"worker {slot.number} (pid {life.process.pid}) {what}; another serves its sockets if one is ready")
        if life.silent > (KILL_SECONDS if life.has_begun else START_KILL_SECONDS) and not life.killed:
            self._warn(f"worker {slot.number} (pid {life.process.pid}) has not answered for {life.silent:.0f} s: it is killed")
            life.kill()

    async def _leave(self, slot: Slot, life: _Life) -> None:
        """Have a worker end for its successor in another program: one that is ready finishes its deliveries first, while it takes
        mail; then another takes that, if one is ready, or it waits in the backlog."""
        if slot.ready:
            with contextlib.suppress(ConnectionError, Refused, TimeoutError):
                async with asyncio.timeout(EASE_SECONDS):
                    await life.channel.ask("ease")
        slot.enter(State.LEAVING)
        life.left = time.monotonic()
        await self._arrange_loan(slot)
        life.channel.notify("leave" if life.has_begun else "stop")

    def _is_ready(self, slot: Slot, life: _Life) -> None:
        if slot.state is State.LATE:
            what = "answers again" if life.served else "is ready"
            self._warn(f"worker {slot.number} (pid {life.process.pid}) {what}; it serves its sockets itself")
        slot.enter(State.READY)
        life.served = slot.proven = True
        slot.probed, slot.culprit = [], 0  # its own affair now
        self._started(slot)
        if slot.first is not None and not slot.first.done():
            slot.first.set_result("")

    def _refused(self, slot: Slot, life: _Life) -> None:
        """A worker cannot start. It ends by itself; if it does not, it is killed."""
        now = time.monotonic()
        if not life.refused:
            life.refused = now
            self._failed(slot, f"worker {slot.number} did not start: {life.begun.exception() or 'no answer'}")
        elif now - life.refused > END_SECONDS and not life.killed:
            life.kill()

    def _bury(self, slot: Slot, life: _Life) -> None:
        """Clear what an ended process held: units of limits, gauges; and note what it had in flight."""
        status = life.ended.result()
        life.channel.close()
        for task in (life.beat, life.begun):
            if task is not None:
                task.cancel()
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
        slot.enter(State.DEAD)
        slot.process = slot.channel = None
        if slot.gate.is_set():  # else what is in the slot's cells is the other program's worker's, which serves
            self._clear(slot)
        if self._stopping.is_set() or (slot.handed and life.left and status == 0):
            return
        if not life.served and not life.refused:
            error = life.begun.exception() if life.begun.done() and not life.begun.cancelled() else None
            self._failed(slot, f"worker {slot.number} did not start: {error or 'no answer'}")
        self.restarts["silent" if life.killed else "start" if not life.served else "signal" if status < 0 else "exit"] += 1
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._warn(f"worker {slot.number} (pid {life.process.pid}) ended with {how}; starting another")

    def _clear(self, slot: Slot) -> None:
        """What the slot's worker had in shared memory when it ended."""
        self._shared.clear_limits(slot.number)
        Counters(self._shared.counters(slot.number)).clear_gauges()
        clear_filter_gauges(self._shared.named(slot.number).own(), NAMED_CELLS, NAMED)
        probed, culprit = self._shared.in_flight(slot.number).take()
        slot.probed, slot.culprit = list(dict.fromkeys([*slot.probed, *probed])), culprit or slot.culprit

    async def _arrange_loan(self, slot: Slot) -> None:
        """Lend a slot's sockets to a ready worker while its own does not serve them; take them back when it does. A lender that
        has died or is late itself is replaced, if another worker is ready."""
        loan = slot.loan
        if slot.ready or slot.taken:
            slot.loan = None
            if loan is not None:
                loan.channel.notify("give_back", slot=slot.number)
            return
        others = sorted((pair for pair in self.ready() if pair[0] is not slot), key=lambda pair: self._loans(pair[0]))
        if (loan is not None and (loan.works or not others)) or (slot.state is State.STARTING and not slot.proven):
            return
        if loan is not None:
            slot.loan = None
            loan.channel.notify("give_back", slot=slot.number)
        for other, channel in others:
            try:
                async with asyncio.timeout(LEND_SECONDS):
                    await channel.ask("borrow", [s.fileno() for s in slot.sockets], slot=slot.number)
            except (ConnectionError, Refused, TimeoutError):
                channel.notify("give_back", slot=slot.number)  # it may do so later
                continue
            slot.loan = _Loan(other, channel)
            return

    def _loans(self, lender: Slot) -> int:
        """How many slots' sockets a worker has borrowed."""
        return sum(slot.loan is not None and slot.loan.lender is lender for slot in self)
