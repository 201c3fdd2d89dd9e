"""The queue while no daemon runs, to be changed: this process is its owner meanwhile, as a worker would be.

All shards are locked before anything is changed, and until the end: a daemon that is started waits for that, or ends. What is
changed goes through the group commit of the queue, so a process that is killed leaves each message as it was, or changed.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaymta.cli.options import ANY_LISTENER, Configuration, loaded
from relaymta.cli.peer import Daemon, answered, connect
from relaymta.control.filters import Filter
from relaymta.control.requests import REQUESTS, Change, Move, Nothing, Page, Queues
from relaymta.disk.lock import all_unlocked
from relaymta.disk.shards import shard_numbers
from relaymta.errors import NoSuch, RelayError
from relaymta.log import History, Log
from relaymta.metrics import Counters
from relaymta.privileges import become, owner_of
from relaymta.queue import Null, Queue
from relaymta.queue.offline import import_all
from relaymta.route.table import RouteTable
from relaymta.shm import Shared
from relaymta.worker.accounting import Witness
from relaymta.worker.reloading import queue_settings

if TYPE_CHECKING:
    from relaymta.config import Config

__all__ = ["Stopped", "changeable"]

SITES = "the daemon is not running, and only the daemon knows which mail is for a site"
COMMANDS = -1  # the number of this process in the log: as of the supervisor, which does not run


@contextmanager
def changeable(read: Configuration) -> "Iterator[Daemon | Stopped]":
    """The daemon of this configuration, or its queue when no daemon runs; ends the program as `asked` does when there is neither,
    or when another process has a shard (75)."""
    peer = connect(read)
    if isinstance(peer, Daemon):
        yield peer
        return
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
        for number in shard_numbers(self.spool):
            witness = Witness(counters, self._log, lambda entry: None, lambda entry: None, lambda outcome: outcome.retry_at)
            queue = Queue(self.spool, number, queue_settings(self._config), self._table.assign, Null(), witness)
            self._queues[number] = queue
            await queue.start_idle()

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

    async def _move(self, args: Move) -> None:
        """Messages are moved one by one."""
        if args.word not in self.routes:
            raise NoSuch("route", args.word, self.routes)

    async def _throttled(self, args: Queues) -> tuple[int, float]:
        """Nothing is: the daemon sends what is due when it is started."""
        return 0, 0.0

    async def _site_states(self, args: Nothing) -> list[Any]:
        return []
