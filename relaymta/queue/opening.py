"""What a start does before mail is taken: what the previous process left is put in order."""

from functools import partial

from relaymta.disk.clock import ShardClock
from relaymta.queue import inspect
from relaymta.queue.big import BigBodies
from relaymta.queue.change import Change
from relaymta.queue.entry import Entry
from relaymta.queue.group import Assign
from relaymta.queue.readers import Readers
from relaymta.queue.schedule import Schedule
from relaymta.queue.store import SCHEMA, Store
from relaymta.queue.writer import Writer

__all__ = ["Opening"]


class Opening:
    """The start of one shard. `assign`: as of the queue."""

    def __init__(
        self,
        store: Store,
        big: BigBodies,
        clock: ShardClock,
        writer: Writer,
        readers: Readers,
        schedule: Schedule,
        assign: Assign,
    ) -> None:
        self._store = store
        self._big = big
        self._clock = clock
        self._writer = writer
        self._readers = readers
        self._schedule = schedule
        self._assign = assign

    async def quarantine(self, culprit: int) -> bool:
        """Hold a message whose delivery ended a worker; False when it is not in this shard."""
        return await self._writer.task(lambda change: inspect.quarantine(change, self._store, culprit, self._clock.now()))

    async def put_in_order(self) -> list[Entry]:
        """Write the schema, remove and rehouse what is astray. The entries of the messages that were still inlined when the
        previous process ended."""
        if self._store.meta(b"schema") < SCHEMA:  # not written again, so that an existing shard starts on a full disk
            await self._writer.task(lambda change: change.set_meta(b"schema", SCHEMA))
        if self._clock.resumed:  # another start within the time of grace does not end it
            await self._writer.task(lambda change: change.set_meta(b"resumed", self._clock.resumed))
        else:  # a command may have changed the queue between the stop and this start
            self._clock.resumed = await self._readers.run(self._store.meta, b"resumed")
        await self._readers.run(self._big.sweep, 0)  # a process that was killed leaves large bodies without a message
        astray = await self._readers.run(self._astray)
        if astray:
            await self._writer.task(partial(self._rehouse, astray))
        return await self._readers.run(self._left_behind)

    def _left_behind(self) -> list[Entry]:
        with self._store.reading() as txn:
            return [entry for ident, _ in self._store.fresh.live() for entry in self._schedule.load(txn, ident)]

    def _astray(self) -> list[int]:
        """Reader thread: inlined messages whose queue does not exist any more, or whose queue's number was given to another
        queue: earlier versions could sweep a queue with inlined mail and use its number again."""
        found = []
        with self._store.reading() as txn:
            for ident, envelope in self._store.fresh.live():
                names = [name for name, _ in self._assign(envelope, 0)]
                rows = [self._store.queue(txn, placement.queue) for placement in envelope.placements]
                if any(row is None or not (row.moved or row.name in names) for row in rows):
                    found.append(ident)
        return found

    def _rehouse(self, idents: list[int], change: Change) -> None:
        """Writer thread: put the messages that `_astray` found into the queues that `assign` names."""
        for ident in idents:
            envelope = self._store.fresh.get(ident)
            if envelope is not None:
                change.rehouse(ident, envelope, self._assign(envelope, 0), self._clock.now())
