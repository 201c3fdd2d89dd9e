"""The configuration in use, and how a reload replaces it: in all workers, or in none.

A reload reads the file, merges it with what is running (`config.merge`), and asks each worker to *prepare* the result, which
does all that can fail. When all have agreed, it is in use: each worker that starts from then on gets it, and the others *commit*
it, which replaces everything in one step. So a worker has the old or the new configuration, each whole.

SIGHUPs are answered by one task, `hang_up`'s, which ends when there is none left.

Owner of `config` and its `number`: `_replace`, under the lock that all reloads take. A worker that was starting meanwhile began
with the old one; `started` has it catch up.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from relaymta.config import Change, Config, merge, notes
from relaymta.control import Channel, Refused
from relaymta.errors import ConfigError
from relaymta.log import Log
from relaymta.supervisor.checks import (
    absent_places,
    changeable_files,
    check_files,
    closed_socket,
    exposed_secrets,
    fleeting_spool,
    missing_variables,
    unreadable_secrets,
)
from relaymta.supervisor.slots import Slot, Slots

__all__ = ["Configuration"]

HANGUP_SECONDS = 1.0  # from the end of a reload by SIGHUP to the next one
PREPARE_SECONDS = 25.0  # in which a worker must have read all files; with COMMIT_SECONDS less than the command line waits
COMMIT_SECONDS = 10.0
KEYS_SHOWN = 20
T = TypeVar("T")


class _Worker(NamedTuple):
    slot: Slot
    channel: Channel


class Configuration:
    """The configuration in use. `read()`: reads the file again (ConfigError); it blocks, and runs on a thread. `stopping`: set
    when the relay stops."""

    def __init__(self, config: Config, read: Callable[[], Config], slots: Slots, stopping: asyncio.Event | None = None) -> None:
        self._stopping = stopping or asyncio.Event()
        self.config = config
        self.number = 1  # of this configuration, counted since the start
        self.log: Log | None = None  # once it is open
        self.refused = False  # whether the last reload was
        self.refusals = 0  # reloads that were refused
        self._read = read
        self._slots = slots
        self._given: dict[int, int] = {}  # slot -> number of the configuration that its worker has
        self._next = 2  # of what is prepared next
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.replaced: Callable[[], None] = lambda: None  # called when another configuration is in use
        self._hung_up = False  # a SIGHUP that no reload has answered
        self._hangups: asyncio.Task[None] | None = None  # answers them

    def given(self, slot: Slot) -> str:
        """The configuration for a worker that starts in this slot."""
        self._given[slot.number] = self.number
        return self.config.to_json()

    def note(self, config: Config) -> None:
        """Log warnings about a configuration."""
        for sentence in _warnings(config):
            self._warn(sentence)

    def _warn(self, text: str) -> None:
        if self.log is not None:
            self.log.event("warning", text=text)

    async def reload(self) -> str:
        """Read the configuration again and replace the one in use. The answer for operators, of one or several lines: "reloaded"
        with what was applied and what needs a restart, with `listener ADDRESS ...` for each that is left out until then, and with
        workers that have not answered; or "refused" with all reasons:
        then the old configuration stays in use everywhere. It is carried through even if the caller is cancelled."""
        return await asyncio.shield(self._spawn(self._reload()))

    @contextlib.asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """Within, reloads wait."""
        async with self._lock:
            yield

    @property
    def hung_up(self) -> bool:
        """Whether a SIGHUP is not answered yet."""
        return self._hung_up or self._hangups is not None

    def hang_up(self) -> None:
        """SIGHUP: reload soon, with what the file says by then. Many in a row are one reload at once and one after it. While the
        relay stops it is ignored."""
        if self._stopping.is_set():
            return
        self._hung_up = True
        if self._hangups is None:
            self._hangups = self._spawn(self._answer_hangups())

    async def _answer_hangups(self) -> None:
        try:
            while self._hung_up:
                self._hung_up = False
                await self.reload()
                if self._stopping.is_set():
                    self._hung_up = True  # perhaps for a program that has taken over
                    return
                await asyncio.sleep(HANGUP_SECONDS)
        finally:
            self._hangups = None

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reload(self) -> str:
        async with self._lock:
            if self._stopping.is_set():
                return "refused, the old configuration stays: the relay is stopping"
            try:
                fresh, warnings = await asyncio.to_thread(self._checked)
                change = merge(self.config, fresh)
            except ConfigError as error:
                return self._refused(error.problems)
            except Exception as error:  # a defect: whoever has sent SIGHUP learns why nothing has changed
                return self._refused([f"internal error: {type(error).__name__}: {error}"])
            refusals = await self._replace(change.config)
            if isinstance(refusals, _Refusals):
                return self._refused(refusals.why)
            for sentence in warnings:
                self._warn(sentence)
            return self._replaced(change, refusals)

    def _checked(self) -> tuple[Config, list[str]]:
        """On a thread: the configuration as it is in the file now, and warnings about it."""
        fresh = self._read()
        check_files(fresh)
        return fresh, _warnings(fresh)

    def _refused(self, why: list[str]) -> str:
        self.refused, self.refusals = True, self.refusals + 1
        text = "\n".join(why)
        self._warn(f"reload refused, the old configuration stays: {text}")
        return f"refused, the old configuration stays:\n{text}"

    def _replaced(self, change: Change, missing: list[str]) -> str:
        self.refused = False
        if self.log is not None:
            self.log.event("reloaded", applied=change.applied, restart=change.restart)
        for sentence in (*change.left_out, *missing):
            self._warn(f"reload: {sentence}")
        parts = ["reloaded"]
        if change.applied:
            parts.append(f"applied: {_listed(change.applied)}")
        if change.restart:
            parts.append(f"these need a restart: {_listed(change.restart)}")
        if len(parts) == 1:
            parts.append("no key has changed; the files that it names were read again")
        return "\n".join(["; ".join(parts), *change.left_out, *missing])

    async def _replace(self, config: Config) -> "list[str] | _Refusals":
        """Put a configuration to use in all workers that are ready: sentences about those that did not answer in the end. Or in
        none: why."""
        number, self._next = self._next, self._next + 1
        workers = [_Worker(*pair) for pair in self._slots.ready()]
        refusals = _sentences(await self._ask(workers, PREPARE_SECONDS, "prepare", number=number, config=config.to_json()))
        if refusals:
            for worker in workers:
                worker.channel.notify("drop", number=number)
            return _Refusals(refusals)
        self.config, self.number = config, number
        missing = await self._commit(workers, number)
        self.replaced()
        for slot, _ in self._slots.ready():
            self.started(slot)
        late = [slot.number for slot in self._slots if not slot.ready]
        return missing + [f"worker {slot} is not ready: it gets the new configuration when it is" for slot in late]

    async def _commit(self, workers: list[_Worker], number: int) -> list[str]:
        """Have workers use what they have prepared: sentences about those that did not confirm it."""
        failed = await self._ask(workers, COMMIT_SECONDS, "commit", number=number)
        for worker in workers:
            if isinstance(failed.get(worker.slot.number), Refused):  # a defect
                worker.channel.notify("stop")
            if worker.slot.channel is worker.channel:  # otherwise a successor has begun, perhaps with the old one
                self._given[worker.slot.number] = number
        return [
            f"{sentence}: it has the new configuration once it answers, or its successor has" for sentence in _sentences(failed)
        ]

    def started(self, slot: Slot) -> None:
        """A worker is ready. It gets the current configuration, if that was replaced while it started."""
        if self._given.get(slot.number) != self.number:
            self._spawn(self._catch_up(slot))

    async def _catch_up(self, slot: Slot) -> None:
        async with self._lock:
            if self._given.get(slot.number) == self.number or not slot.ready or slot.channel is None:
                return  # it has ended, or its successor was given the current one
            worker, number = [_Worker(slot, slot.channel)], self.number
            failed = await self._ask(worker, PREPARE_SECONDS, "prepare", number=number, config=self.config.to_json())
            why = _sentences(failed) or await self._commit(worker, number)
            if why:
                self._warn(f"{why[0]}; it is replaced, since it has an old configuration")
                worker[0].channel.notify("stop")

    async def _ask(self, workers: list[_Worker], seconds: float, op: str, **args: Any) -> dict[int, Exception]:
        """Ask all workers at once: the errors, by slot, of those that have refused, have ended, or have not answered in time."""

        async def one(asked: Awaitable[Any]) -> None:
            async with asyncio.timeout(seconds):
                await asked

        answers = await asyncio.gather(*(one(worker.channel.ask(op, **args)) for worker in workers), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Refused | ConnectionError | TimeoutError):
                raise answer
        pairs = zip(workers, answers, strict=True)
        return {worker.slot.number: answer for worker, answer in pairs if isinstance(answer, Exception)}


def _warnings(config: Config) -> list[str]:
    late = "; it is read when it is needed, which fails until it can be read"
    unreadable = [sentence + late for sentence in unreadable_secrets(config)]
    return [
        *notes(config),
        *unreadable,
        *missing_variables(config),
        *absent_places(config),
        *changeable_files(config),
        *exposed_secrets(config),
        *fleeting_spool(config),
        *closed_socket(config),
    ]


class _Refusals(NamedTuple):
    """Why workers have refused a configuration, one sentence each."""

    why: list[str]


def _sentences(failed: dict[int, Exception]) -> list[str]:
    """One sentence for each worker, or for several with the same reason."""
    by_reason: dict[str, list[str]] = {}
    for slot, error in failed.items():
        why = "does not answer" if isinstance(error, TimeoutError) else "has ended" if isinstance(error, ConnectionError) else ""
        by_reason.setdefault(why or f": {error}", []).append(str(slot))
    return [
        f"worker{'s' * (len(numbers) > 1)} {', '.join(numbers)}{'' if why.startswith(':') else ' '}{why}"
        for why, numbers in by_reason.items()
    ]


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(keys[:KEYS_SHOWN]) + more
