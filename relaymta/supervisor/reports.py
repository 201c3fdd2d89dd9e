"""The process that tells webhooks and the suppression list what becomes of mail (report/), which is not this one: it is there
while one of them is configured, and is started again when it ends. What it does, or does not, costs mail nothing."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from relaymta.config import Config
from relaymta.control import Channel, program
from relaymta.disk.journal import file_numbers
from relaymta.disk.shards import shard_numbers
from relaymta.errors import RelayError
from relaymta.metrics import WebhookTotals
from relaymta.report.suppressing import Suppressing

__all__ = ["Reports"]

BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0  # seconds before a process that has failed is started again
STEADY_SECONDS = 60.0  # of a process that is no failure
END_SECONDS = 5.0  # for it to end
ASK_SECONDS = 3.0  # for which who asks it something waits until it is there


class Reports:
    """`warn(text)` logs a warning; `suppress(events)`: has the suppression list take events. StoreError."""

    def __init__(
        self, config: Config, warn: Callable[[str], None], suppress: Callable[[list[dict[str, Any]]], Awaitable[None]]
    ) -> None:
        self._config = config
        self._suppress = suppress
        self._warn = warn
        self._channel: Channel | None = None
        self._there = asyncio.Event()  # there is a channel
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._changed = asyncio.Event()  # the configuration has, or it is closing
        self._totals: dict[str, WebhookTotals] = {}
        self._before: dict[str, WebhookTotals] = {}  # what processes counted that have ended
        # Where nobody has kept a journal before, whoever is there first begins with its first event, though that may be earlier
        # than the process.
        self._unkept = not _has_journal(Path(config.spool))
        self._fresh: list[str] = []

    def start(self) -> None:
        """Have the process run while there is whom to tell. Until `close`."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep())

    def configured(self, config: Config) -> None:
        """A reload has replaced the configuration."""
        self._config = config
        known = {row.name for row in config.webhook}
        self._totals = {name: found for name, found in self._totals.items() if name in known}
        self._changed.set()
        if not self._unwanted and self._channel is not None:
            with contextlib.suppress(RelayError):
                self._channel.notify("configure", config=config.to_json())

    @property
    def _unwanted(self) -> bool:
        return self._closing or not (self._config.webhook or self._config.suppression.follows)

    async def _keep(self) -> None:
        backoff = BACKOFF_FIRST
        while not self._closing:
            self._changed.clear()
            if self._unwanted:
                await self._changed.wait()
                continue
            if self._unkept:
                self._unkept, self._fresh = False, [Suppressing.name, *(row.name for row in self._config.webhook)]
            began = time.monotonic()
            status = await self._run()
            if self._unwanted:
                continue
            if time.monotonic() - began > STEADY_SECONDS:
                backoff = BACKOFF_FIRST
            self._warn(f"the process of the webhooks has ended ({status}); it is started again in {backoff:.0f} s")
            await self._pause(backoff)
            backoff = min(2 * backoff, BACKOFF_MOST)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._closing:
                    self._changed.clear()
                    await self._changed.wait()

    async def _run(self) -> int | str:
        """One process, until it ends; its status, or why there was none."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            return error.strerror or str(error)
        try:
            process = await asyncio.create_subprocess_exec(
                *program("relaymta.report", str(theirs.fileno())), pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL
            )
        except OSError as error:
            ours.close()
            return error.strerror or str(error)
        finally:
            theirs.close()
        channel, task = Channel(ours, self._asked, lambda: None), asyncio.get_running_loop().create_task
        ended = task(process.wait())
        # It begins when that of another program has ended, which in an upgrade may take long.
        started = task(channel.ask("start", None, None, config=self._config.to_json(), fresh=self._fresh))
        self._channel = channel
        self._there.set()
        why = ""
        try:
            while not (ended.done() or self._unwanted):
                changed = task(self._changed.wait())
                await asyncio.wait({ended, changed, *[started] * (not started.done())}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                self._changed.clear()
                if started.done():
                    started.result()
        except Exception as error:  # RelayError, ConnectionError, Refused; or a defect, which must not end this for good
            why = str(error) or type(error).__name__
        finally:
            self._channel = None
            self._there.clear()
            started.cancel()
            await asyncio.gather(started, return_exceptions=True)
            channel.close()  # it ends then
            await _ended(process)
            await ended
            self._before = dict(self._totals)
        return why or process.returncode or 0

    async def _asked(self, op: str, args: dict[str, Any], descriptors: list[int]) -> None:
        if op == "suppress":
            await self._suppress(args["events"])
        elif op == "figures":
            for name, delivered, dropped, behind, seconds, failing in args["rows"]:
                before = self._before.get(name, WebhookTotals())
                self._totals[name] = WebhookTotals(
                    before.delivered + delivered, before.dropped + dropped, behind, seconds, failing
                )  # fmt: skip

    def totals(self) -> dict[str, WebhookTotals]:
        """What was counted of each webhook, since the start."""
        return self._totals

    async def ask(self, op: str, seconds: float, **args: Any) -> Any:
        """Ask the process. RelayError: it is not there, or refuses."""
        if not self._config.webhook:
            raise RelayError("no [[webhook]] is configured")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._there.wait(), ASK_SECONDS)
        if self._channel is None:
            raise RelayError("the process of the webhooks is being started; try again")
        try:
            return await self._channel.ask(op, None, seconds, **args)
        except ConnectionError as error:
            raise RelayError(f"the process of the webhooks: {error}") from None

    def reopen_log(self) -> None:
        """The log was rotated."""
        if self._channel is not None:
            with contextlib.suppress(RelayError):
                self._channel.notify("reopen_log")

    async def close(self) -> None:
        """End the process."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of a process, which has been told to end."""
    if process.returncode is None:
        try:
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()


def _has_journal(spool: Path) -> bool:
    """Whether any shard has a journal."""
    return any(file_numbers(spool / f"shard-{number}" / "journal") for number in shard_numbers(spool))
