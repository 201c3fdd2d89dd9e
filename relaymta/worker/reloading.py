"""A worker's part of a reload, in two phases: `prepare` does what can fail, on a thread; `commit` only replaces, in one step.

Owner of `prepared`: `prepare` sets it, `commit` and `drop` take it. Each replaces only what belongs to its own number, so that an
answer that comes late changes nothing.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relaymta.accept.endpoint import Parts
from relaymta.config import Config
from relaymta.disk.shards import shard_numbers
from relaymta.errors import RelayError
from relaymta.queue import QueueSettings
from relaymta.queue.journal import JournalSettings
from relaymta.route.shaping import Shaping
from relaymta.route.table import RouteTable

if TYPE_CHECKING:
    from relaymta.worker import Worker

__all__ = ["Reloading", "how_many", "queue_settings"]


class _Prepared(NamedTuple):
    number: int
    config: Config
    routes: RouteTable
    parts: Parts
    shards: int


class Reloading:
    """The configuration that one worker has prepared."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._newest = 0
        self._prepared: _Prepared | None = None

    async def prepare(self, number: int, config: str) -> None:
        """Make everything that a configuration needs, without using it. An exception says why it cannot be used here."""
        self._newest = number
        with self._own_work():  # the thread keeps the event loop waiting, too: parts of it hold the GIL
            prepared = await asyncio.to_thread(self._made, number, config)
        if self._newest != number:
            raise RelayError("another reload has begun meanwhile")
        self._prepared = prepared

    def _own_work(self) -> contextlib.AbstractContextManager[None]:
        acceptor = self._worker.acceptor
        return acceptor.lateness.own_work() if acceptor is not None else contextlib.nullcontext()

    def drop(self, number: int) -> None:
        """Forget what was prepared: another worker has refused it."""
        if self._newest == number:
            self._newest, self._prepared = 0, None

    def _made(self, number: int, text: str) -> _Prepared:
        acceptor = self._worker.acceptor
        if acceptor is None:
            raise RelayError("the worker is starting")
        config = Config.model_validate_json(text)
        if any(route.lookup for route in config.route):
            import aiohttp  # noqa: F401 (here, rather than while mail waits)
        Shaping(config)  # fails here, if ever
        shards = how_many(Path(config.spool), self._worker.workers)
        return _Prepared(number, config, RouteTable(config), acceptor.endpoint.prepare(config), shards)

    def commit(self, number: int) -> None:
        """Use what was prepared. Nothing here reads a file or waits. If it fails all the same, which is a defect, the worker
        drains and ends: its successor starts with the whole new configuration."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared.number != number:
            raise RelayError("this configuration was not prepared")
        try:
            with self._own_work():
                self._use(prepared)
        except Exception:
            self._worker.stopping.set()
            raise

    def _use(self, prepared: _Prepared) -> None:
        worker, config, routes = self._worker, prepared.config, prepared.routes
        assert worker.intake is not None and worker.acceptor is not None
        other_answers = worker.resolver.reconfigure(config.delivery.nameservers)
        worker.config, worker.routes = config, routes
        worker.log.routes(config)
        worker.intake.configure(config, routes)
        worker.watch_conduct()
        worker.suppressing.configured()
        worker.tell_hooks()
        worker.acceptor.config = config
        worker.acceptor.endpoint.configure(prepared.parts)
        for shard in worker.shards.values():
            if other_answers:
                shard.dispatcher.flush()  # domains that could not be looked up
            shard.dispatcher.reconfigure(config, routes)
            shard.queue.reconfigure(queue_settings(config, prepared.shards))


def how_many(spool: Path, workers: int) -> int:
    """How many shards there are, or will be when all workers have made theirs: also those of workers that there are no more.
    Blocks."""
    return len({*range(workers), *shard_numbers(spool)})


def queue_settings(config: Config, shards: int) -> QueueSettings:
    """The settings of a shard, one of so many."""
    return QueueSettings(
        hostname=config.hostname,
        max_age_ms=int(config.queue.max_age * 1000),
        first_retry_ms=int(config.delivery.first_retry * 1000),
        quarantine_ms=int(config.quarantine.keep * 1000),
        window=config.queue.window,
        window_bytes=config.queue.window_bytes,
        journal=_journal(config, shards),
    )


def _journal(config: Config, shards: int) -> JournalSettings | None:
    """What the journal of events of each shard may have; None: nobody reads any."""
    if not (config.webhook or config.suppression.follows):
        return None
    return JournalSettings(config.webhooks.store // max(shards, 1), int(config.webhooks.keep * 1000))
