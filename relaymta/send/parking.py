"""Entries that are put back untried, and queues that are parked (asleep) because their site is down or suspended, or their
domain cannot be looked up."""

from collections.abc import Callable, Coroutine

from relaymta.queue import Entry, Queue
from relaymta.send.pool import Pool
from relaymta.send.room import Room

__all__ = ["Parking"]

KEPT_PARKED = 50_000  # queues whose end of sleep is remembered


class Parking:
    """Owns what this worker knows about sleeping queues: `_parked` (until when each sleeps) and, of every pool, `sleeping` (the
    queues that sleep because of it). Nothing else changes these. `landed(entry)`: called when an entry was put back."""

    queue: Queue

    def __init__(
        self, room: Room, spawn: Callable[[Coroutine[object, object, None]], None], landed: Callable[[Entry], None]
    ) -> None:
        self._room = room
        self._spawn = spawn
        self._landed = landed
        self._parked: dict[int, int] = {}  # queue: until when it sleeps (queue clock)
        self._waking = False  # all queues are being woken
        self._to_wake = False  # all queues, at the next tick: the disk has refused it, or they were being woken

    def put_back(self, entry: Entry) -> None:
        """Put an entry back into the queue untried."""
        self.queue.put_back(entry)
        self._landed(entry)

    def until(self, queue: int) -> int:
        """Until when a queue sleeps (queue clock); 0 when it does not."""
        return self._parked.get(queue, 0)

    def park(self, queue: int, until: int) -> None:
        """Let a queue sleep until a moment of the queue's clock."""
        if self._parked.get(queue, 0) < until:
            if len(self._parked) >= KEPT_PARKED:
                self._parked.clear()
            self._parked[queue] = until
            self.queue.park(queue, until)

    def park_for(self, pool: Pool, queue: int, until: int) -> None:
        """Let a queue sleep because of its site; it is woken when the site is up."""
        if pool.failures:
            pool.sleeping.add(queue)
        self.park(queue, until)

    def sleeps_for(self, pool: Pool, entries: list[Entry]) -> None:
        """Note that the queues of these entries sleep because of a site."""
        pool.sleeping.update(entry.queue for entry in entries)

    def send_back(self, pool: Pool, until: int, tenant: str | None) -> None:
        """Put the entries in a pool's ready list (of one tenant, or all) back, and let their queues sleep."""
        for entry in pool.ready.take_all():
            if tenant is None or entry.name.application == tenant:
                self.put_back(entry)
                self.park_for(pool, entry.queue, until)
            else:
                pool.ready.push(entry)
        if not len(pool.ready):
            self._room.wait_no_longer(pool)

    def wake(self) -> None:
        """Wake all queues, whether this process or its predecessor let them sleep; those that must sleep are put to sleep again
        when their mail is offered."""
        self._parked.clear()
        self._spawn(self._wake_all())

    async def _wake_all(self) -> None:
        if self._waking:  # hundreds of suspensions may end in one second
            self._to_wake = True
            return
        self._waking, self._to_wake, done = True, False, False
        try:
            await self.queue.wake_queues()
            done = True
        finally:
            self._waking = False
            self._to_wake |= not done

    def tick(self) -> None:
        """Called each second: wake all queues, if that has to be done again."""
        if self._to_wake:
            self.wake()

    def wake_pool(self, pool: Pool) -> None:
        """Wake the queues that sleep because of a site: it is up, or may be tried again."""
        if pool.sleeping:
            self._spawn(self._wake_some(pool, pool.sleeping))
            pool.sleeping = set()

    async def _wake_some(self, pool: Pool, queues: set[int]) -> None:
        done = False
        try:
            for queue in queues:
                self._parked.pop(queue, None)
            await self.queue.wake_queues(queues)
            done = True
        finally:
            if not done:
                pool.sleeping |= queues  # the next tick tries again

    def forget(self) -> None:
        """Forget which queues sleep: others may have woken them."""
        self._parked.clear()
