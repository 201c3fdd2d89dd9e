"""The process: one stream for each consumer and shard, as the configuration says now; what the command line asks; figures."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from relaymta.config import Config
from relaymta.control import Channel
from relaymta.disk.folders import make_folder
from relaymta.disk.journal import End
from relaymta.disk.shards import shard_numbers
from relaymta.errors import NoSuch, RelayError, StoreError
from relaymta.ident import format_id
from relaymta.log import Log
from relaymta.queue.journal import stamp
from relaymta.report.replays import Replay, begun, load_all, new
from relaymta.report.shards import Shard
from relaymta.report.streams import Consumer, NotTaken, Pace, Stream, Tally
from relaymta.report.suppressing import Suppressing
from relaymta.report.webhook import Webhook

__all__ = ["FOLDER", "Reporter", "serve"]

WORKER = -3  # the number of this process in the log
FOLDER = "report"  # in the spool
START_SECONDS = 3.0  # for which a question waits while it starts
LOOK_SECONDS = 1.0  # for new shards; and figures are told so often
THREADS = 4
SUPPRESS_SECONDS = 30.0  # for the suppression list to take events
NICE = 10  # mail first: on a busy machine a tenth of a core is left


class Told:
    """A consumer, with its streams: by shard, and of replays by name and shard."""

    def __init__(
        self, consumer: Consumer, folder: Path, warn: Callable[[str], None], fresh: bool, tally: Tally, replayed: Tally
    ) -> None:
        self.consumer = consumer
        self.folder = folder
        self.fresh = fresh
        self.tally = tally
        self.replayed = replayed
        self.pace = Pace(warn)
        self.warn = warn
        self.streams: dict[int, Stream] = {}
        self.replays: dict[str, tuple[Replay, list[Stream]]] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        """Do something until it ends, or this one is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self) -> None:
        """End all streams; where they are is kept."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.consumer.close()


class Reporter:
    """The streams of a spool. `consumers`: more of them than the webhooks of the configuration (no reload changes them)."""

    def __init__(self, spool: Path, log: Log, consumers: tuple[Consumer, ...] = ()) -> None:
        self._spool = spool
        self._folder = spool / FOLDER
        self._log = log
        self._others = consumers
        self._told: dict[str, Told] = {}
        self._tallies: dict[str, tuple[Tally, Tally]] = {}  # of consumers and their replays, by name: they outlive a reload
        self._shards: dict[int, Shard] = {}
        self._threads = ThreadPoolExecutor(THREADS, "report")
        self._configuring = asyncio.Lock()  # reloads may follow each other at once: the last one counts

    async def configure(self, config: Config, fresh: tuple[str, ...] = ()) -> None:
        """Serve these webhooks from now on. One whose table has not changed goes on. `fresh`: names of those that begin with the
        oldest event that there is, where they have no place yet."""
        async with self._configuring:
            await self._configure(config, fresh)

    async def _configure(self, config: Config, fresh: tuple[str, ...]) -> None:
        wanted = {row.name: row for row in config.webhook}
        for name, told in list(self._told.items()):
            consumer = told.consumer
            if isinstance(consumer, Webhook) and wanted.get(name) != consumer.settings:
                await told.close()
                del self._told[name]
            else:
                told.pace.revive()
        others = [one for one in self._others if one.name not in self._told]
        for consumer in [*others, *(Webhook(row) for name, row in wanted.items() if name not in self._told)]:
            name = consumer.name
            folder = self._folder / name
            known = await asyncio.to_thread(_has_place, folder)
            tallies = self._tallies.setdefault(name, (Tally(), Tally()))
            self._told[name] = Told(consumer, folder, partial(self._warn, name), known or name in fresh, *tallies)
        await self._follow()
        for told in self._told.values():
            told.fresh = True  # all that happens in shards that come later is new to it
        for told in self._told.values():
            if not told.replays:
                for replay in await asyncio.to_thread(load_all, told.folder):
                    self._replay(told, replay)

    def _warn(self, name: str, text: str) -> None:
        what = "the suppression list" if name == Suppressing.name else f"webhook {name}"
        self._log.event("warning", text=f"{what}: {text}")

    async def look(self) -> None:
        """Follow shards that there are from now on, again and again."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._follow()

    async def _follow(self) -> None:
        for number in await asyncio.to_thread(shard_numbers, self._spool):
            shard = self._shards.get(number) or Shard(self._spool, number)
            if number not in self._shards:
                try:
                    await self._run(shard.open)
                except (OSError, StoreError):  # its owner has not made it yet
                    continue
                self._shards[number] = shard
            with contextlib.suppress(OSError, StoreError):
                await self._run(shard.end)  # how far streams are behind that wait for their consumer
            for told in self._told.values():
                if number not in told.streams:
                    stream = Stream(
                        told.consumer, shard, told.folder / f"shard-{number}", told.pace, told.tally, self._threads, told.warn,
                        fresh=told.fresh,
                    )  # fmt: skip
                    told.streams[number] = stream
                    told.spawn(stream.run())

    async def _run(self, what: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, what, *arguments)

    async def close(self) -> None:
        """End all streams."""
        for told in self._told.values():
            await told.close()
        self._threads.shutdown()
        for shard in self._shards.values():
            shard.close()

    # What operators ask

    def _webhook(self, name: str) -> tuple[Told, Webhook]:
        told = self._told.get(name)
        if told is None or not isinstance(told.consumer, Webhook):
            raise NoSuch("webhook", name, [one for one, found in self._told.items() if isinstance(found.consumer, Webhook)])
        return told, told.consumer

    def rows(self) -> list[dict[str, Any]]:
        """Of each webhook: its state, and how far it is."""
        found = []
        for told in self._told.values():
            if isinstance(told.consumer, Webhook):
                found.append(_row(told, told.consumer))
        return found

    async def test(self, name: str) -> dict[str, Any]:
        """Send one event of the kind "test"; the response. NotTaken: there was none; NoSuch."""
        told, webhook = self._webhook(name)
        now = time.time_ns()
        event = {"id": f"test-{now:x}", "event": "test", "time": stamp(now // 1_000_000), "message": format_id(0)}
        answer = await webhook.send(f"msg_test{now:x}", "test", [event])
        if answer.taken and told.pace.failures:
            told.pace.succeeded()
        return {"status": answer.status, "taken": answer.taken, "text": answer.text, "seconds": answer.seconds}

    async def replay(self, name: str, since: int, until: int, kinds: list[str]) -> dict[str, Any]:
        """Send events from the journal again: times in ms UTC, `until` 0: up to now. What it is called, and how many events the
        journal has there, of all kinds. NoSuch, RelayError."""
        told, _ = self._webhook(name)
        shards: dict[int, tuple[End, End]] = {}
        for number, shard in self._shards.items():
            first = await self._run(shard.from_time, since)
            shards[number] = first, await self._run(shard.end)
        replay = new(since, until, tuple(kinds), shards)
        try:
            await self._run(begun, told.folder, replay)
        except OSError as error:
            raise RelayError(f"the replay cannot be kept: {error.strerror or error}") from None
        self._replay(told, replay)
        return {"replay": replay.name, "events": sum(last.number - first.number for first, last in shards.values())}

    def _replay(self, told: Told, replay: Replay) -> None:
        streams: list[Stream] = []
        told.replays[replay.name] = replay, streams
        told.spawn(self._replayed(told, replay, streams))

    async def _replayed(self, told: Told, replay: Replay, streams: list[Stream]) -> None:
        async def of(number: int, last: End) -> None:
            while number not in self._shards:  # this process has just been started
                await asyncio.sleep(LOOK_SECONDS)
            stream = Stream(
                told.consumer, self._shards[number], replay.place_file(told.folder, number), told.pace, told.replayed,
                self._threads, told.warn, last, replay.only(), replay.began,
            )  # fmt: skip
            streams.append(stream)
            await stream.run()

        await asyncio.gather(*(of(number, last) for number, (_, last) in replay.shards.items()))
        del told.replays[replay.name]
        with contextlib.suppress(OSError):
            await self._run(replay.remove, told.folder)


def _has_place(folder: Path) -> bool:
    """Whether a consumer with this folder has followed any shard: one in which it has no place is newer than it."""
    return next(folder.glob("shard-*"), None) is not None


def _row(told: Told, webhook: Webhook) -> dict[str, Any]:
    """What operators see of a webhook. Times are seconds UTC, `lag_seconds` the age of the oldest event that was not taken."""
    waiting = [stream.waits_since for stream in told.streams.values() if stream.waits_since]
    pace, answer = told.pace, webhook.answer
    lag = max(0.0, time.time() - min(waiting) / 1000) if waiting else 0.0
    settings = webhook.settings
    return {
        "name": webhook.name, "url": settings.url, "state": "gone" if pace.gone else "failing" if pace.failures else "ok",
        "events": settings.events, "applications": settings.applications, "lag_events": sum(one.behind for one in
        told.streams.values()), "lag_seconds": round(lag, 1), "reply": answer.line if answer is not None else pace.why,
        "asked": webhook.asked, "why": pace.why, "failures": pace.failures, "delivered": told.tally.delivered,
        "replayed": told.replayed.delivered, "dropped": told.tally.dropped + told.replayed.dropped, "replays": [
            {"name": name, "left": sum(one.behind for one in streams)} for name, (_, streams) in told.replays.items()
        ],
    }  # fmt: skip


class _Process:
    """What the supervisor asks, and its end."""

    def __init__(self, sock: socket.socket) -> None:
        self.ending = asyncio.Event()
        self.channel = Channel(sock, self._asked, self.ending.set)
        self._reporter: Reporter | None = None
        self._started = asyncio.Event()
        self._suppressing: Suppressing | None = None
        self._log: Log | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def _asked(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        known: dict[str, Callable[..., Awaitable[Any]]] = {
            "start": self._start, "configure": self._configure, "reopen_log": self._reopen_log, "rows": self._rows,
            "test": self._test, "replay": self._replay,
        }  # fmt: skip
        return await known[op](**args)

    async def _start(self, config: str, fresh: list[str]) -> None:
        found = Config.model_validate_json(config)
        spool = Path(found.spool)
        self._log = Log(found.log.file, WORKER, form=found.log.format)
        await asyncio.to_thread(_alone, spool / FOLDER)
        self._suppressing = Suppressing(found, self._suppress)
        self._reporter = Reporter(spool, self._log, (self._suppressing,))
        await self._reporter.configure(found, tuple(fresh))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._reporter.look()), loop.create_task(self._tell(self._reporter))]
        self._started.set()

    async def _reports(self) -> Reporter:
        """RelayError: it waits, as in an upgrade, until another process does not report any more."""
        try:
            await asyncio.wait_for(self._started.wait(), START_SECONDS)
        except TimeoutError:
            raise RelayError("the process of the webhooks is starting") from None
        assert self._reporter is not None
        return self._reporter

    async def _suppress(self, events: list[dict[str, Any]]) -> None:
        """Have the supervisor, who has the list, take events."""
        await self.channel.ask("suppress", None, SUPPRESS_SECONDS, events=events)

    async def _configure(self, config: str) -> None:
        found = Config.model_validate_json(config)
        await self._started.wait()  # however long that takes, such as in an upgrade: else it would go on with what was before
        assert self._suppressing is not None
        self._suppressing.configure(found)
        await (await self._reports()).configure(found)

    async def _reopen_log(self) -> None:
        if self._log is not None:
            self._log.reopen()

    async def _rows(self) -> list[dict[str, Any]]:
        return (await self._reports()).rows()

    async def _test(self, name: str) -> dict[str, Any]:
        reporter, began = await self._reports(), time.monotonic()
        try:
            return await reporter.test(name)
        except NotTaken as error:
            return {"status": 0, "taken": False, "text": str(error), "seconds": time.monotonic() - began}

    async def _replay(self, **args: Any) -> dict[str, Any]:
        return await (await self._reports()).replay(**args)

    async def _tell(self, reporter: Reporter) -> None:
        """Tell the supervisor the figures, for /metrics."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            rows = [
                (row["name"], row["delivered"], row["dropped"], row["lag_events"], row["lag_seconds"], row["state"] != "ok")
                for row in reporter.rows()
            ]
            self.channel.notify("figures", rows=rows)

    async def run(self) -> None:
        await self.ending.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reporter is not None:
            await self._reporter.close()
        if self._log is not None:
            self._log.close()


def _alone(folder: Path) -> int:
    """Wait until no other process reports of this spool, as in an upgrade; until this one ends. Blocks."""
    make_folder(folder)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def serve(sock: socket.socket) -> None:
    """Report until the other end of a socket is closed."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the supervisor handles those that a terminal sends
    with contextlib.suppress(OSError):
        os.nice(NICE)
    asyncio.run(_serve(sock))


async def _serve(sock: socket.socket) -> None:
    process = _Process(sock)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, process.ending.set)
    await process.run()
