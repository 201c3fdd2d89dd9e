"""Delivery into mailboxes: an entry of a route with `protocol = "mailbox"` is given to the store, which answers for each
recipient. There is no site: nothing to look up, to connect to or to pace; only how many are under way is bounded."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from relaymta.disk.big import BigFile
from relaymta.errors import Failure, StoreError, is_scarce
from relaymta.ident import format_id
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto.envelope import PERMANENT, SUCCESS, TRANSIENT, Attempt
from relaymta.proto.said import Reply
from relaymta.queue import Entry, Put, Queue, wall_ms
from relaymta.send.onward import Outbox
from relaymta.send.outcomes import Outcomes
from relaymta.send.tasks import Tasks
from relaymta.shm import InFlight

__all__ = ["Local", "Store"]

CORRUPT = index("relaymta_corrupt_bodies_total")
MOST, MOST_OCTETS = 512, 64 << 20  # entries under way, and their octets (one at least)
PEER = "mailbox"


Delivered = tuple[dict[int, Reply], list[int], list[Put]]


class Store(NamedTuple):
    """What the store offers; the worker hands it over, since send/ does not know it. `deliver(queue_id, attempt, sender,
    recipients, data, outbox)`, with the number of attempts before this one: a reply for each recipient by index, the shards that
    were asked, and what the outbox has made of the messages that are to come into the queue with the outcome;
    `forget(queue_id, recipients, shards)`: the queue does not ask for these again; `expanded(recipients)`: recipients with
    aliases of addresses elsewhere replaced by these."""

    deliver: Callable[[int, int, str, Iterable[tuple[int, str]], list[bytes] | BigFile, Outbox], Awaitable[Delivered]]
    forget: Callable[[int, list[int], list[int]], None]
    expanded: Callable[[list[str]], list[str]]


class Local:
    """Owns the entries that are given to the store, from `deliver` to `landed`. `under_way`: how many the store has now; `store`:
    None where no mailboxes are kept."""

    queue: Queue

    def __init__(self, outcomes: Outcomes, marks: InFlight, tasks: Tasks, counters: Counters, log: Log) -> None:
        self._outcomes = outcomes
        self._marks = marks
        self._tasks = tasks
        self._counters = counters
        self._log = log
        self._waiting: deque[Entry] = deque()
        self._ended: dict[Entry, tuple[list[int], list[int]]] = {}  # recipients that have ended, and the shards that were asked
        self.under_way = self._octets = 0
        self.draining = False
        self.store: Store | None = None

    def deliver(self, entry: Entry) -> None:
        """Deliver an entry, now or when others have ended."""
        if self.store is None:
            why = Failure("there are no mailboxes here", "the relay keeps no mailboxes: restart it")
            self._outcomes.charge(entry, TRANSIENT, "route", "", 0, "4.3.5", why)
        elif self._crowded or self.queue.stalled:
            self._waiting.append(entry)
        else:
            self._begin(entry)

    @property
    def _crowded(self) -> bool:
        return self.under_way >= MOST or self._octets >= MOST_OCTETS

    def tick(self) -> None:
        """Called each second: the disk may take outcomes again."""
        self._next()

    def _begin(self, entry: Entry) -> None:
        if not self.queue.begin(entry):
            return
        self._marks.add(entry.ident)
        self._outcomes.stages.begun(entry, self.queue.clock.now())
        self.under_way += 1
        self._octets += entry.envelope.size
        self._tasks.spawn(self._deliver(entry))

    async def _deliver(self, entry: Entry) -> None:
        try:
            await self._attempt(entry)
        except StoreError as error:
            if not is_scarce(error):  # else it may be as good as ever
                self._counters.add(CORRUPT, 1)
            self._log.event("warning", text=f"message {format_id(entry.ident)}: {error}")
            why = Failure("the message could not be read", str(error))
            self._outcomes.charge(entry, TRANSIENT, "queue", "", 0, "4.3.0", why)
        except Exception as error:
            reason, inside = self._tasks.unexpected(error)
            self._outcomes.charge(entry, TRANSIENT, "final", PEER, 0, "4.3.0", Failure(reason, inside))
        finally:
            self.under_way -= 1
            self._octets -= entry.envelope.size
            self._next()

    def _next(self) -> None:
        while self._waiting and not (self._crowded or self.draining or self.queue.stalled):
            entry = self._waiting.popleft()
            if entry.waiting:
                self._begin(entry)

    async def _attempt(self, entry: Entry) -> None:
        data = await self._data(entry)
        assert self.store is not None
        envelope = entry.envelope
        outbox = Outbox(self.queue, entry, data, self.store.expanded)
        try:
            replies, shards, sent = await self.store.deliver(
                entry.ident, entry.attempts, envelope.sender, entry.recipients, data, outbox
            )
        except BaseException:
            outbox.drop()
            raise
        filed = [position for position, said in replies.items() if said.code < 300]
        ended = [position for position, said in replies.items() if not 400 <= said.code < 500]
        if ended:
            self._ended[entry] = ended, shards
        said = next(iter(replies.values()))
        if len(filed) == len(replies):
            entry.route = (PEER, (said.code, f"{said.enhanced} {said.text}".encode()), ("", 0, "", ""))
            self.queue.finish(entry, None, sent=sent)
            return
        now = wall_ms()
        results = {
            position: Attempt(now, _kind(said), "final", PEER, said.code, said.enhanced, said.text)
            for position, said in replies.items()
        }
        entry.route = {}
        self.queue.finish(entry, results, sent=sent)

    async def _data(self, entry: Entry) -> list[bytes] | BigFile:
        """The message data, or the file of a large message. StoreError when it cannot be read."""
        if entry.data is not None:
            return entry.data
        large = self.queue.big_file(entry)
        if large is not None:
            return large
        (found,) = await self.queue.read([entry])
        if found is None:
            raise StoreError("there is no room in memory")
        if isinstance(found, StoreError):
            raise found
        return found

    def landed(self, entry: Entry) -> None:
        """An entry's outcome is committed: its recipients that have ended are not asked for again."""
        ended = self._ended.pop(entry, None)
        if ended is not None and self.store is not None:
            self.store.forget(entry.ident, *ended)

    def refused(self, entry: Entry) -> None:
        """An entry's outcome could not be recorded: its recipients may be asked for again."""
        self._ended.pop(entry, None)

    async def drain(self, seconds: float) -> None:
        """Begin nothing new; wait up to `seconds` for what is under way."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                while self.under_way:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return


def _kind(said: Reply) -> str:
    return SUCCESS if said.code < 300 else TRANSIENT if said.code < 500 else PERMANENT
