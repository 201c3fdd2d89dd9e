"""`queue import`: a message that `queue export` has written comes into a shard as it was.

What was imported once is noted in the same transaction (the table "imported"), so an import that was interrupted can be repeated:
also what has left the queue meanwhile is not imported again. The note is kept for KEPT_MS, or until the message is exported with
`--delete`.
"""

import asyncio
from collections.abc import Callable

import msgspec

from relaymta.disk.big import BigBody
from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.ident import IdSource
from relaymta.disk.room import Disk
from relaymta.errors import RelayError, StoreError, StoreFull
from relaymta.ident import parse_id, stamp_of
from relaymta.proto.envelope import Attempt, Body, Envelope, Placement, Quarantine, QueueName, RecipientState, Unseen
from relaymta.queue.big import BigBodies
from relaymta.queue.change import Change
from relaymta.queue.entry import Put
from relaymta.queue.exported import FLAGS, SAME, STATES, Record, Try, address_of
from relaymta.queue.group import Assign
from relaymta.queue.readers import Readers
from relaymta.queue.store import ID, Store
from relaymta.queue.writer import Writer

__all__ = ["BEFORE", "FULL", "IMPORTED", "OTHER", "THERE", "Importing"]

# What has become of it; FULL: there is no room for it.
IMPORTED, THERE, OTHER, BEFORE, FULL = "imported", "there", "other", "before", "full"

KEPT_MS = 90 * 86_400_000
FUTURE_MS = 86_400_000  # an id that was made later than in a day would make all later ids of the shard as late
FORGOTTEN_TOGETHER = 1000


class Importing:
    """Imports into one shard, one message at a time. All methods are called on the loop. `assign`: as of the queue."""

    def __init__(
        self, store: Store, clock: ShardClock, ids: IdSource, writer: Writer, readers: Readers, big: BigBodies, big_limit: int,
        assign: Assign, disk: Disk,
    ) -> None:  # fmt: skip
        self._disk = disk
        self._store, self._clock, self._ids = store, clock, ids
        self._writer, self._readers, self._big, self._big_limit = writer, readers, big, big_limit
        self._assign = assign
        self._turn = asyncio.Lock()
        self._file: BigBody | None = None  # of a large message that comes in
        self._for = 0  # its id

    def _is_full(self) -> bool:
        """Reader thread: whether no mail is taken for lack of room, as from clients."""
        self._disk.check()
        return self._disk.full

    async def data(self, ident: int, at: int, data: bytes) -> str:
        """A piece of the data of a large message, the one behind `at` octets; FULL, or "". The first discards what an import that
        was given up has left. RelayError; StoreError when it cannot be written."""
        async with self._turn:
            if at == 0:
                await self._discard()
                if await self._readers.run(self._is_full):
                    return FULL
                self._file, self._for = await self._readers.run(self._big.make, self._ids.next(), 0), ident
            if self._file is None or self._for != ident or self._file.length != at:
                raise RelayError("another import is under way")
            try:
                await self._readers.run(self._file.write, [data])
            except StoreFull:
                await self._discard()
                return FULL
        return ""

    async def _discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            await self._readers.run(file.discard)

    async def message(self, record: Record, data: bytes | None, known: Callable[[str], bool], again: bool = False) -> str:
        """Import a message with this data, or (None) with what `data` has got; what has become of it. `known(route)`: whether
        there is such a route; where there is none, the message waits as the route table says. `again`: also one that was imported
        before and has left. RelayError; StoreError when it cannot be stored."""
        async with self._turn:
            ident = parse_id(record.id)
            if stamp_of(ident) > self._clock.now() + FUTURE_MS:
                raise RelayError("$.id: it is of the future: one of the clocks is wrong")
            found = await self._readers.run(self._known, ident, record, again)
            if found:
                await self._discard()
                return found
            if await self._readers.run(self._is_full):
                await self._discard()
                return FULL
            await self._writer.task(self._forget)
            envelope = self._envelope(record)
            names = self._names(record, envelope, known)
            body = await self._body(ident, record, data)
            states = [RecipientState(STATES[one.state], [_attempt(each) for each in one.attempts]) for one in record.recipients]
            self._ids.leave_behind(ident)
            done: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
            put = Put(ident, envelope, [(name, placement.indexes) for name, placement in names], None, done.set_result)
            put.restored = [placement for _, placement in names], states
            if isinstance(body, Body):
                envelope.body = body
                self._big.submitted(ident)
            else:
                put.data = [body]
            self._writer.submit(put)
            error = await asyncio.shield(done)
            if isinstance(error, StoreFull):
                return FULL
            if error is not None:
                raise error
            return IMPORTED

    def _known(self, ident: int, record: Record, again: bool) -> str:
        """Reader thread: what is known of a message; "": nothing."""
        fresh = dict(self._store.fresh.live())
        with self._store.reading() as txn:
            there = self._store.envelope(txn, ident) or fresh.get(ident)
            before = txn.get(ID.pack(ident), db=self._store.tables["imported"])
        if there is not None:
            same = (there.sender, there.size, there.arrived) == (
                address_of(record.sender),
                record.size,
                round(record.arrived * 1000),
            )
            return THERE if same else OTHER
        return BEFORE if before is not None and not again else ""

    def _forget(self, change: Change) -> None:
        """Writer thread: forget what was imported long ago, some at a time."""
        cursor, old = change.txn.cursor(db=self._store.tables["imported"]), wall_ms() - KEPT_MS
        there = cursor.first()
        for _ in range(FORGOTTEN_TOGETHER):
            if not there or int.from_bytes(cursor.value(), "big") > old:
                return
            there = cursor.delete() and bool(cursor.key())

    def _to_clock(self, seconds: float) -> int:
        """A time of a record by the queue's clock, ms."""
        return max(1, self._clock.now() + round(seconds * 1000) - wall_ms())

    def _envelope(self, record: Record) -> Envelope:
        flags = sum(FLAGS[word] for word in set(record.flags))
        why, unseen = record.quarantine, record.unseen
        since = {} if why is None else {"since": self._to_clock(why.since)}
        to = [address_of(one.address) for one in record.recipients]
        arrived, expires = round(record.arrived * 1000), self._to_clock(record.expires)
        return Envelope(
            address_of(record.sender), to, record.size, flags, arrived, expires, route=record.route,
            unseen=None if unseen is None else Unseen(**msgspec.structs.asdict(unseen)),
            quarantine=None if why is None else Quarantine(**msgspec.structs.asdict(why) | since),
            not_before=self._to_clock(record.not_before) if record.not_before else 0,
            **{name: getattr(record, name) for name in SAME},
        )  # fmt: skip

    def _names(self, record: Record, envelope: Envelope, known: Callable[[str], bool]) -> list[tuple[QueueName, Placement]]:
        """The queues in which a message waits, each with its placement, whose number is not known yet."""
        if envelope.route and not known(envelope.route):
            envelope.route = ""
        found: dict[QueueName, Placement] = {}
        for wait in record.waits:
            due, own = self._to_clock(wait.next), QueueName(wait.route, wait.domain, wait.application, wait.priority)
            here = range(len(record.recipients)) if wait.recipients is None else wait.recipients
            names = [(own, wait.recipients)] if known(wait.route) else self._assign(envelope, wait.attempts)
            for name, indexes in names:
                mine = wait.recipients if indexes is None else [index for index in indexes if index in here]
                if mine is not None and not mine:
                    continue
                if name in found:  # two of its queues are one here
                    other = found[name]
                    other.indexes = sorted([*(other.indexes or []), *(mine or [])])
                    other.due, other.attempts = min(other.due, due), max(other.attempts, wait.attempts)
                else:
                    found[name] = Placement(0, due, wait.attempts, mine)
        return list(found.items())

    async def _body(self, ident: int, record: Record, data: bytes | None) -> bytes | Body:
        if data is not None:
            if len(data) != record.size or len(data) > self._big_limit:
                raise RelayError("$.size: it is not that of the message data")
            return data
        file, self._file = self._file, None
        if file is None or self._for != ident or file.length != record.size:
            if file is not None:
                await self._readers.run(file.discard)
            raise RelayError("$.size: it is not that of the message data")
        await self._readers.run(self._big.become, file, ident)
        return await self._readers.run(file.finish, [])


def _attempt(one: Try) -> Attempt:
    fields = msgspec.structs.asdict(one)
    return Attempt(round(fields.pop("time") * 1000), fields.pop("result"), **fields)
