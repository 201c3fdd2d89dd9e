"""`relaymta upgrade`, the old program's end: another program takes over all that this one has, while every port stays open.

    step       what happens                                              who serves   at the new one's death, refusal or delay
    ---------  --------------------------------------------------------  -----------  -----------------------------------------
    STARTED    the new program runs, and gets the sockets; it reads the  the old one  nothing has changed: the old one goes on
               configuration, as at a restart, and checks it
    PREPARED   its workers run, and wait at their gates                  the old one  nothing has changed
    HANDED     slot by slot (the first alone): the old worker finishes   both         the new one is ended (its workers drain);
               its deliveries while it takes mail; then its sockets are               then the old one starts its own workers
               lent, it leaves, its locks are free; the new worker opens              again, in each slot that was handed over
               the shards and serves the same sockets
    SETTLED    the old one has stored what is known of sites, quotas,    new workers  the same
               triplets, and changes nothing more
    COMMITTED  the new one has read that, answers the control socket     the new one  as at the death of any supervisor
               and /metrics, and is the main process; the old one ends

Until COMMITTED the old supervisor alone decides and stores: what new workers learn (site states, OAuth tokens, what accounts
send) they tell it by way of the new supervisor, which gets each change. Limits, rates, quotas and what was counted are in memory
that both programs map, where it has the same layout in both; otherwise the new one begins with what was stored.

- At the old supervisor's death before COMMITTED the new one ends, too: whoever starts the relay starts it again, as ever.
- An old worker that dies is not replaced once its slot is handed over; a new one that dies is replaced by the new supervisor once
  it has been ready, and before that the upgrade has failed.
- SIGTERM ends the new program, then the old one. A reload waits until it is known which program is to do it.
- Whoever asked for the upgrade may go; the upgrade goes on.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from relaymta import __version__
from relaymta.control import Channel, Late, Refused
from relaymta.errors import RelayError
from relaymta.supervisor.elder import LAYOUT, VARIABLE, VERSION, Facts, absolute
from relaymta.supervisor.slots import STOP_SECONDS, Slot

if TYPE_CHECKING:
    from relaymta.supervisor import Supervisor

__all__ = ["Upgrade", "command"]

END_SECONDS = 3.0  # for a program that has closed the dialogue to end
COMMIT_SECONDS = 30.0
SAID = 4000  # octets of what the new program has written to standard error


class _Failed(Exception):
    """The new program does not take over; str(): why."""


@dataclass
class _Successor:
    """The new program's process."""

    process: asyncio.subprocess.Process
    channel: Channel
    errors: int  # a memfd: its standard error, until it is prepared
    ended: asyncio.Task[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_task(self.process.wait())

    async def ask(self, seconds: float, op: str, descriptors: list[int] | None = None, /, **args: Any) -> Any:
        """Its answer. _Failed says why there is none."""
        try:
            return await self.channel.ask(op, descriptors, seconds, **args)
        except Late:
            raise _Failed(f"it was not ready within {seconds:g} s") from None
        except ConnectionError as error:  # it has ended
            with contextlib.suppress(TimeoutError):
                if not self.channel.open:
                    await asyncio.wait_for(asyncio.shield(self.ended), END_SECONDS)
            raise _Failed(self._end() or str(error)) from None
        except (Refused, RelayError) as error:
            raise _Failed(str(error)) from None

    def _end(self) -> str:
        if not self.ended.done():
            return ""
        status = self.ended.result()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        said = os.pread(self.errors, SAID, max(0, os.fstat(self.errors).st_size - SAID)).decode("utf-8", "replace").strip()
        return f"it ended with {how}" + (f":\n{said}" if said else "")

    async def end(self, seconds: float) -> None:
        """Have it end, with its workers; kill it where it does not. What its workers have under way they finish first."""
        if self.channel.open:
            self.channel.notify("stop")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), seconds)
        if not self.ended.done():
            self.process.kill()  # its workers notice that, and end within a bound
            await self.ended
        self.channel.close()


def command(program: str) -> list[str]:
    """How this program was started, as it is on disk now; `program` ("": the same one) in place of it."""
    arguments = sys.argv[1:]
    if program:
        return [program, *arguments]
    if os.access(sys.argv[0], os.X_OK) and os.path.isfile(sys.argv[0]):
        return [sys.argv[0], *arguments]
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)], *arguments]


class Upgrade:
    """The upgrades of one supervisor, one at a time. `pid`: of the new program, once it is committed. `settling`: what is decided
    here now, the new program may not read."""

    def __init__(self, supervisor: "Supervisor") -> None:
        self._supervisor = supervisor
        self._slots = supervisor.slots
        self._task: asyncio.Task[dict[str, Any]] | None = None
        self._successor: _Successor | None = None
        self._began = 0.0
        self._returning = False  # to our own workers: the new program is being ended
        self.pid = 0
        self.settling = False

    async def run(self, program: str, seconds: float) -> dict[str, Any]:
        """Upgrade to a program ("": the one that this process was started with). `seconds`: for each of its steps. What came of
        it: `result` is "upgraded", "unchanged" or "gone back", `why`: the reason where it is not the first. It is carried through
        if the caller is cancelled. RelayError where another upgrade is under way, or the relay stops."""
        if self._supervisor.stopping.is_set():
            raise RelayError("the relay is stopping")
        if self._task is not None:
            raise RelayError("an upgrade is under way already")
        self._task = asyncio.get_running_loop().create_task(self._run(program, seconds))
        return await asyncio.shield(self._task)

    async def over(self) -> None:
        """Wait until no upgrade is under way."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def abort(self) -> None:
        """The relay is to stop: end an upgrade that is under way, and the new program."""
        if self._task is not None and not self.pid:
            if not self._returning:
                self._task.cancel()
            await asyncio.wait({self._task})

    def leave(self) -> None:
        """Tell the new program that systemd knows it, and this one ends soon."""
        if self._successor is not None:
            self._successor.channel.notify("left")

    def status(self) -> int | None:
        """The exit status of the new program, as a shell has it; None: it runs."""
        ended = self._successor.ended if self._successor is not None else None
        if ended is None or not ended.done():
            return None
        return ended.result() if ended.result() >= 0 else 128 - ended.result()

    def pass_on(self, number: int) -> None:
        """A signal has come: it is for the new program, once that is committed."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def reopen_logs(self) -> None:
        """The log was rotated: the new program's workers may write to it already."""
        if self._successor is not None:
            self._successor.channel.notify("reopen_log")

    async def passed_on(self, op: str, **args: Any) -> Any:
        """The new program's answer to a request, once it is committed. RelayError, ConnectionError."""
        assert self._successor is not None
        return await self._successor.channel.ask(op, None, COMMIT_SECONDS, **args)

    def _log(self, state: str, **fields: Any) -> None:
        known = {"program": "", "pid": 0, "slot": -1, "seconds": round(time.monotonic() - self._began, 3), "reason": ""}
        self._supervisor.log.event("upgrade", state=state, **known | fields)

    # The steps

    async def _run(self, program: str, seconds: float) -> dict[str, Any]:
        self._began = time.monotonic()
        words = command(program)
        self._log("begun", program=words[0])
        handed = False
        try:
            async with self._supervisor.configuration.unchanged():
                successor = self._successor = await self._start(words)
                version = await self._prepared(successor, seconds)
                self._log("prepared", program=words[0], pid=successor.process.pid)
                handed = True
                await self._hand_over(successor, seconds)
                await self._commit(successor)
        except (_Failed, OSError) as error:
            return await self._go_back(str(error), handed)
        except BaseException as error:  # SIGTERM, or a mistake of ours
            await asyncio.shield(self._go_back(repr(error), handed))
            raise
        took = round(time.monotonic() - self._began, 3)
        self._log("committed", program=words[0], pid=self.pid)
        return {"result": "upgraded", "why": "", "from": __version__, "to": version, "pid": self.pid, "seconds": took}

    async def _start(self, words: list[str]) -> _Successor:
        """Execute the new program. _Failed when that cannot be done."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        errors = os.memfd_create("relaymta-upgrade", os.MFD_CLOEXEC)
        real = os.dup(2)
        try:
            process = await asyncio.create_subprocess_exec(
                *words, pass_fds=[theirs.fileno(), real], stdin=asyncio.subprocess.DEVNULL, stderr=errors,
                env=os.environ | {VARIABLE: f"{theirs.fileno()},{real}"},
            )  # fmt: skip
        except BaseException as error:
            ours.close()
            os.close(errors)
            if isinstance(error, OSError):
                raise _Failed(f"{words[0]}: {error.strerror or error}") from None
            raise
        finally:
            theirs.close()
            os.close(real)
        return _Successor(process, Channel(ours, self._asked, lambda: None), errors)

    async def _asked(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        """What new workers tell and ask: as if they were ours."""
        return await self._supervisor.from_worker(op, args, descriptors)

    async def _prepared(self, successor: _Successor, seconds: float) -> str:
        """Give the new program the sockets, and have it prepare. Its version."""
        supervisor = self._supervisor
        facts = Facts(
            VERSION, __version__, os.getpid(), absolute(supervisor.config.spool), len(self._slots),
            absolute(supervisor.config.control_path), [listener.address for listener in supervisor.config.listeners],
            supervisor.config.metrics.listen if supervisor.http_sockets else "", len(supervisor.http_sockets),
            absolute(supervisor.config.admin_path or "") if supervisor.admin is not None else "",
            supervisor.config.admin.listen if supervisor.admin_port is not None else "", LAYOUT,
            supervisor.watchdog, "NOTIFY_SOCKET" not in os.environ,
        )  # fmt: skip
        admin = [sock for sock in (supervisor.admin, supervisor.admin_port) if sock is not None]
        opened = [supervisor.control, *supervisor.http_sockets, *admin]
        given = [*(sock.fileno() for sock in opened), supervisor.shared.descriptor]
        async with _within(seconds):
            await successor.ask(seconds, "facts", given, facts=msgspec.to_builtins(facts))
            slots = list(self._slots)
            for slot in slots:
                sockets = [sock.fileno() for sock in slot.sockets]
                await successor.ask(seconds, "sockets", sockets, slot=slot.number, last=slot is slots[-1])
            return str(await successor.ask(seconds, "prepare"))

    async def _hand_over(self, successor: _Successor, seconds: float) -> None:
        """The first slot alone, so that a program that cannot open a shard costs no more; then the others. With mailboxes
        all at once, since their workers need each other."""
        machine, slots = self._supervisor.machine, list(self._slots)
        if self._supervisor.mail is not None:
            self._supervisor.mail.upkeep.stop()
        channel = successor.channel
        machine.changed = lambda state, key: channel.notify(
            "site_state", state=None if state is None else msgspec.to_builtins(state), key=list(key)
        )
        states = [msgspec.to_builtins(state) for state in machine.known_by_workers()]
        await successor.ask(seconds, "begin", states=states, tickets=machine.tickets)
        together = [slots] if self._supervisor.mail is not None else [slots[:1], slots[1:]]
        for some in together:
            tasks = [asyncio.get_running_loop().create_task(self._hand(successor, slot, seconds)) for slot in some]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _hand(self, successor: _Successor, slot: Slot, seconds: float) -> None:
        await self._slots.hand_over(slot)
        began = time.monotonic()
        await successor.ask(seconds, "take", slot=slot.number, probed=slot.probed, culprit=slot.culprit)
        slot.probed, slot.culprit = [], 0
        self._slots.taken(slot)
        self._log("slot", slot=slot.number, pid=successor.process.pid, seconds=round(time.monotonic() - began, 3))

    async def _commit(self, successor: _Successor) -> None:
        """From here on nothing is decided here: what new workers tell waits in the new program, which reads what is stored."""
        self.settling = True
        await successor.ask(COMMIT_SECONDS, "settle")
        try:
            await self._supervisor.machine.settle()
        except RelayError as error:
            raise _Failed(str(error)) from None
        await successor.ask(COMMIT_SECONDS, "commit")
        self.pid = successor.process.pid
        self._supervisor.stopping.set()

    async def _go_back(self, why: str, handed: bool) -> dict[str, Any]:
        """The new program does not take over: end it, and start workers again in slots that were handed over."""
        supervisor = self._supervisor
        self._returning, self.settling = True, False
        supervisor.machine.changed = lambda state, key: None
        if self._successor is not None:
            await self._successor.end(STOP_SECONDS if handed else END_SECONDS)  # before, its workers have nothing
            os.close(self._successor.errors)
            self._successor = None
        if handed:
            supervisor.machine.start()
            if supervisor.mail is not None:
                supervisor.mail.upkeep.start()
        self._slots.take_back()
        result = "gone back" if handed else "unchanged"
        self._log(result, reason=why)
        self._task, self._returning = None, False
        return {"result": result, "why": why, "from": __version__, "to": "", "pid": 0}


@contextlib.asynccontextmanager
async def _within(seconds: float) -> Any:
    """_Failed after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise _Failed(f"it was not ready within {seconds:g} s") from None
