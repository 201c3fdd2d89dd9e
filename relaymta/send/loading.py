"""Reading message data from disk for delivery."""

from collections.abc import AsyncIterator, Callable

from relaymta.errors import Failure, StoreError, is_scarce
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto.envelope import TRANSIENT
from relaymta.proto.smtp_client import Mail
from relaymta.queue import Entry, Queue, format_id
from relaymta.send.mails import is_large
from relaymta.send.outcomes import Outcomes
from relaymta.send.pool import Pool
from relaymta.send.tasks import Tasks

__all__ = ["Loading"]

CORRUPT = index("relaymta_corrupt_bodies_total")
TOGETHER = 32  # bodies read in one batch


class Loading:
    """Owns each pool's `loading`: whether a batch is being read for it. `pump(pool)`: gives its ready entries to sessions."""

    queue: Queue

    def __init__(self, outcomes: Outcomes, tasks: Tasks, counters: Counters, log: Log, pump: Callable[[Pool], None]) -> None:
        self._outcomes = outcomes
        self._tasks = tasks
        self._counters = counters
        self._log = log
        self._pump = pump

    def load(self, pool: Pool) -> None:
        """Read the message data of the first waiting entries, in one batch, on a reader thread."""
        if pool.loading:
            return
        pool.loading = True
        wanted = [e for e in pool.ready.first(TOGETHER) if e.data is None and not is_large(e)]
        self._tasks.spawn(self._load(pool, wanted))

    async def _load(self, pool: Pool, entries: list[Entry]) -> None:
        try:
            loaded = await self.queue.read(entries)
        finally:
            pool.loading = False
        for entry, data in zip(entries, loaded, strict=True):
            if isinstance(data, StoreError):
                self._unreadable(pool, entry, data)
        self._pump(pool)

    def _unreadable(self, pool: Pool, entry: Entry, error: StoreError) -> None:
        """A body that cannot be read is never sent: a warning is logged, and the entry is deferred. One that was put back or
        claimed meanwhile is not looked at: nothing corrects its place any more when the body moves."""
        if not (entry.waiting and pool.ready.remove(entry)):
            return
        if not is_scarce(error):  # else it may be as good as ever
            self._counters.add(CORRUPT, 1)
        self._log.event("warning", text=f"message {format_id(entry.ident)}: {error}")
        why = Failure("the message could not be read", str(error))
        self._outcomes.charge(entry, TRANSIENT, "queue", "", 0, "4.3.0", why)

    async def pieces(self, mail: Mail) -> AsyncIterator[bytes]:
        """The message data of a large message, in pieces."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        async for piece in self.queue.stream(entry):
            yield piece
