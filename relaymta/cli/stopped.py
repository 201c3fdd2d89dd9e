"""The queue while no daemon runs, to be changed: this process is its owner meanwhile, as a worker would be.

All shards are locked before anything is changed, and until the end: a daemon that is started waits for that, or ends. What is
changed goes through the group commit of the queue, so a process that is killed leaves each message as it was, or changed.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaymta.cli.options import ANY_LISTENER, Configuration, loaded
from relaymta.cli.peer import answered
from relaymta.control.filters import Filter
from relaymta.control.requests import (
    REQUESTS,
    Change,
    Exported,
    ImportData,
    ImportMessage,
    Messages,
    Move,
    Nothing,
    OfMessage,
    Page,
    Queues,
)
from relaymta.disk.lock import all_unlocked
from relaymta.disk.shards import shard_numbers
from relaymta.errors import NoSuch, RelayError
from relaymta.ident import parse_id
from relaymta.log import History, Log
from relaymta.metrics import Counters
from relaymta.privileges import become, owner_of
from relaymta.queue import Null, Queue
from relaymta.queue.exported import read
from relaymta.queue.offline import import_all
from relaymta.route.table import RouteTable
from relaymta.shm import Shared
from relaymta.worker.accounting import Witness
from relaymta.worker.reloading import queue_settings

if TYPE_CHECKING:
    from relaymta.config import Config

__all__ = ["Stopped", "opened"]

SITES = "the daemon is not running, and only the daemon knows which mail is for a site"
COMMANDS = -1  # the number of this process in the log: as of the supervisor, which does not run


@contextmanager
def opened(read: Configuration) -> "Iterator[Stopped]":
    """The queue of this configuration, whose daemon does not run; ends the program as `asked` does when another process has a
    shard (75), or it cannot be opened."""
    config = loaded(read, ANY_LISTENER)
    stopped = answered(lambda: Stopped(config))
    try:
        yield stopped
    finally:
        stopped.close()


class Stopped:
    """Answers requests about the queue as the daemon does: a method for each. Only the owner of the spool can be that; root is
    from here on. SpoolBusy, PermissionError; StoreError when a shard cannot be opened."""

    def __init__(self, config: "Config") -> None:
        self.spool = Path(config.spool).absolute()
        self._table = RouteTable(config)
        self.routes = self._table.labels
        self._config = config
        self._uid = os.getuid()
        self._queues: dict[int, Queue] = {}
        owner = owner_of(self.spool)
        if os.geteuid() != owner.pw_uid:  # the owner could not open files of root's
            import_all()
            become(owner)
        all_unlocked([self.spool / f"shard-{number}" for number in shard_numbers(self.spool)])
        self._log = self._open_log()
        self._runner = asyncio.Runner()
        try:
            self._runner.run(self._open())
        except BaseException:
            self.close()
            raise

    def _open_log(self) -> Log:
        """What is done here is in the history, and in the log where that is a file."""
        log = self._config.log
        history = History(self.spool / "history", COMMANDS, log.history) if log.history else None
        return Log(os.devnull if log.file == "-" else log.file, COMMANDS, history, form=log.format)

    async def _open(self) -> None:
        counters = Counters(Shared.create().counters(0))  # which nobody reads
        shards = shard_numbers(self.spool)
        for number in shards:
            witness = Witness(
                counters,
                self._log,
                lambda entry: None,
                lambda entry: None,
                lambda outcome: outcome.retry_at,
                partial(self._now, number),
            )
            queue = Queue(self.spool, number, queue_settings(self._config, len(shards)), self._table.assign, Null(), witness)
            self._queues[number] = queue
            await queue.start_idle()

    def _now(self, number: int) -> int:
        return self._queues[number].clock.now()

    def close(self) -> None:
        """Commit what is pending, and give the shards back."""

        async def stop() -> None:
            for queue in self._queues.values():
                await queue.stop()

        self._runner.run(stop())
        self._runner.close()
        self._log.close()

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to a request. RelayError for those that only the daemon answers."""
        method: Callable[[Any], Any] | None = getattr(self, f"_{op}", None) if op in REQUESTS else None
        if method is None:
            raise RelayError("this needs the running daemon (start it with `relaymta serve`)")
        return self._runner.run(method(REQUESTS[op].read(args)))

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        """A function that answers the request, as `ask`."""
        return lambda: self.ask(op, **args)

    def _shard(self, number: int) -> Queue:
        if number not in self._queues:
            raise RelayError(f"there is no shard {number}")
        return self._queues[number]

    async def _shards(self, args: Nothing) -> list[int]:
        return list(self._queues)

    async def _summary(self, args: Nothing) -> Any:
        merge = REQUESTS["summary"].merge
        assert merge is not None
        return merge([await queue.summary() for queue in self._queues.values()], args)

    async def _page(self, args: Page) -> Any:
        chosen = Filter.of(args.chosen)
        if chosen.site:
            raise RelayError(SITES)
        return await self._shard(args.shard).page(chosen, args.after, lambda name, site: False)

    async def _change(self, args: Change) -> Any:
        if args.verb == "reroute" and args.word not in self.routes:
            raise NoSuch("route", args.word, self.routes)
        by = f"operator (uid {self._uid})"
        return await self._shard(args.shard).change_messages(args.verb, args.idents, args.word, by)

    async def _records(self, args: Messages) -> list[tuple[int, str, bytes]]:
        return await self._shard(args.shard).records(args.idents)

    async def _exported(self, args: Exported) -> list[tuple[int, str]]:
        by = f"operator (uid {self._uid})"
        return list((await self._shard(args.shard).delete_unchanged(dict(args.messages), by)).items())

    async def _import_data(self, args: ImportData) -> str:
        return await self._shard(args.shard).importing.data(args.ident, args.at, args.data)

    async def _import_message(self, args: ImportMessage) -> str:
        known = self.routes.__contains__
        return await self._shard(args.shard).importing.message(read(args.record), args.data, known, args.again)

    async def _message(self, args: OfMessage) -> dict[str, Any] | None:
        for queue in self._queues.values():
            found = await queue.message(parse_id(args.ident))
            if found is not None:
                return found
        return None

    def pieces(self, op: str, **args: Any) -> Iterator[bytes]:
        """The pieces of `raw`: a message's data."""
        ident = parse_id(REQUESTS["raw"].read(args).ident)
        for queue in self._queues.values():
            pieces, some = queue.raw(ident), False
            while (piece := self._runner.run(_next(pieces))) is not None:
                some = True
                yield piece
            if some:
                return

    async def _move(self, args: Move) -> None:
        """Messages are moved one by one."""
        if args.word not in self.routes:
            raise NoSuch("route", args.word, self.routes)

    async def _throttled(self, args: Queues) -> tuple[int, float]:
        """Nothing is: the daemon sends what is due when it is started."""
        return 0, 0.0

    async def _site_states(self, args: Nothing) -> list[Any]:
        return []


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(pieces, None)
