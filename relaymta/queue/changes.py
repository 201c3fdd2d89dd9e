"""Operators' changes of a shard, one at a time: verbs on messages, moves of whole queues, the end of a hold policy, wakes.

A change claims what it is about (lifecycle.py), runs in group commits on the writer thread, and releases its claim.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from relaymta.control.filters import Filter
from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.operations import Task
from relaymta.errors import StoreError
from relaymta.proto.envelope import PERMANENT, Attempt, Envelope, QueueName
from relaymta.queue import inspect
from relaymta.queue.change import Change
from relaymta.queue.ends import Ends
from relaymta.queue.entry import Entry
from relaymta.queue.group import Assign
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.quarantine import Left, Release, released
from relaymta.queue.readers import Readers
from relaymta.queue.schedule import Schedule
from relaymta.queue.store import QueueRow, Store
from relaymta.queue.writer import Writer

__all__ = ["Changes"]

TOGETHER = 200  # messages of a change in one group commit, so that incoming mail waits for few
PARK_AGAIN = 1.0  # seconds until a park that the disk refused is tried again
REST_LEAST, REST_MOST = 1.0, 60.0  # seconds that scans leave messages alone after the disk refused their change
T = TypeVar("T")
AtSite = Callable[[QueueName, str], bool]
Rename = Callable[[QueueName], QueueName]
Idents = list[int] | Callable[[], list[int]]
Word = str | Mapping[int, str] | Release  # what a verb is about, or for each message
# Who changes messages, by the verb, where it is no operator.
BY = {"policy": "policy", "release policy": "policy", "unseen expired": "expiry"}
OPERATOR = "operator"


class Changes:
    """The changes of one shard. All public methods are called on the loop. `assign`: as of the queue."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: Store,
        clock: ShardClock,
        writer: Writer,
        readers: Readers,
        schedule: Schedule,
        entries: Lifecycle,
        ends: Ends,
        assign: Assign,
        max_age_ms: int,
        noticed: Callable[[], None],
        left: Left,
        told: Callable[[str, int, Envelope, str], None],
        moved: Callable[[QueueName, QueueName, int, str], None],
    ) -> None:
        """`noticed()`: there may be unseen messages that were none before; `left`: told, on the loop, of what has left the
        quarantine; `told(how, id, envelope, by)` and `moved(name, new name, messages, by)`: as of Events.changed and
        Events.moved."""
        self._told, self._moved = told, moved
        self._noticed = noticed
        self._left = left
        self._loop = loop
        self._store = store
        self._clock = clock
        self._writer = writer
        self._readers = readers
        self._schedule = schedule
        self._entries = entries
        self._ends = ends
        self._assign = assign
        self.max_age_ms = max_age_ms
        self._parks: dict[int, int] = {}  # queues that are to sleep, until when: not committed yet, and not woken since
        self._refusals = 0  # of changes, one after the other, by the disk
        self._turn = asyncio.Lock()  # one change at a time
        self._tasks: set[asyncio.Task[Any]] = set()  # changes under way or waiting for their turn

    async def _in_turn(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a change after those before it, to completion even when the caller is cancelled."""
        return await asyncio.shield(self._begin(change))

    def _begin(self, change: Callable[[], Coroutine[Any, Any, T]]) -> "asyncio.Task[T]":
        async def run() -> T:
            async with self._turn:
                try:
                    return await change()
                finally:
                    self._schedule.wake()

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finished(self) -> None:
        """Wait until no change is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Messages

    async def change_messages(self, verb: str, idents: Idents, word: Word = "", by: str = "") -> tuple[int, int]:
        """Change messages, at most 1,000: flush, hold, policy (hold until no hold policy applies; `word`: the policy's name, or
        that of each message), release, release policy (only what a policy holds), delete, bounce (`word`: the reason), reroute
        (`word`: the route), release quarantined (`word`: a Release), delete quarantined. (changed, skipped because in flight,
        ending or being changed.) `idents` may be a function, which names them when those before have been made, and may fill
        `word` then. `by`: who does it, for the log. A cancelled caller does not stop the change. StoreError when a commit
        failed."""
        return await self._in_turn(lambda: self._change(verb, idents() if callable(idents) else idents, word, by))

    def begin(self, verb: str, idents: list[int], then: Callable[[int], None] = lambda changed: None) -> None:
        """As `change_messages`, of which nobody awaits the end; `then` is called with the number of messages that it has changed.
        Where the disk refuses it, it is to be begun again."""

        def ended(task: "asyncio.Task[tuple[int, int]]") -> None:
            then(0 if task.cancelled() or task.exception() is not None else task.result()[0])

        self._begin(lambda: self._change(verb, idents, "", "")).add_done_callback(ended)

    async def _change(self, verb: str, idents: list[int], word: Word, by: str) -> tuple[int, int]:
        claimed = self._entries.claim(idents)
        refused = False
        try:
            wanted = [ident for ident in dict.fromkeys(idents) if ident in claimed]
            parts = [wanted[start : start + TOGETHER] for start in range(0, len(wanted), TOGETHER)]
            if verb == "bounce":
                changed = sum([await self._bounce(part, str(word)) for part in parts])
            else:
                changed = sum([await self._apply(verb, part, word, by or BY.get(verb, OPERATOR)) for part in parts])
                if verb.startswith("release"):
                    self._noticed()
        except StoreError:
            refused = True
            raise
        finally:
            self._entries.release_claim(claimed, refused)
            self._refusals = self._refusals + 1 if refused else 0
            if refused:  # they would only be offered, and their change asked for, again at once
                pause = min(REST_LEAST * 2 ** (self._refusals - 1), REST_MOST)
                self._loop.call_later(pause, self._wake, claimed)
        return changed, len(set(idents)) - len(claimed)

    def _wake(self, idents: set[int]) -> None:
        self._entries.wake(idents)
        self._schedule.wake()

    async def _apply(self, verb: str, idents: list[int], word: Word, by: str) -> int:
        """One group commit; how many messages it has changed."""
        left: list[tuple[int, Envelope, str, list[str]]] = []
        others: list[tuple[str, int, Envelope]] = []

        def leaves(ident: int, envelope: Envelope, how: str, recipients: list[str]) -> None:
            left.append((ident, envelope, how, recipients))

        def told(how: str, ident: int, envelope: Envelope) -> None:
            others.append((how, ident, envelope))

        def run(change: Change) -> int:
            left.clear()  # of a group that was undone
            others.clear()
            if verb == "reroute":
                return inspect.reroute(change, self._store, self._clock, self._assign, idents, str(word), told)
            if isinstance(word, Release):
                return released(change, self._clock, self._assign, self.max_age_ms, idents, word, leaves)
            store, writer, clock = self._store, self._writer, self._clock
            return inspect.apply(verb, change, store, writer, clock, self.max_age_ms, idents, word, leaves, told)

        changed = await self._writer.task(run)
        for one in left:
            self._left(*one)
        for how, ident, envelope in others:
            self._told(how, ident, envelope, by)
        return changed

    async def delete_unchanged(self, prints: dict[int, str], by: str = OPERATOR) -> dict[int, str]:
        """Delete those of these messages that are as they were when they were exported (`exported.print_of`); what has become of
        each: "deleted", "in flight" (or being changed), "changed", "gone". StoreError when a commit failed."""
        return await self._in_turn(lambda: self._delete_unchanged(prints, by))

    async def _delete_unchanged(self, prints: dict[int, str], by: str) -> dict[int, str]:
        claimed = self._entries.claim(prints)
        found = dict.fromkeys(prints, "in flight")
        try:
            wanted = [ident for ident in prints if ident in claimed]
            for start in range(0, len(wanted), TOGETHER):
                part = {ident: prints[ident] for ident in wanted[start : start + TOGETHER]}
                run = partial(inspect.delete_unchanged, store=self._store, writer=self._writer, prints=part)
                results = await self._writer.task(run)
                for ident, (how, envelope) in results.items():
                    found[ident] = how
                    if envelope is not None:
                        self._told("deleted", ident, envelope, by)
        finally:
            self._entries.release_claim(claimed)
        return found

    async def _bounce(self, idents: list[int], reason: str) -> int:
        """Fail the pending recipients of messages that this change has claimed, with a DSN to each sender; how many messages."""

        def load() -> list[Entry]:
            fresh = dict(self._store.fresh.live())  # before the transaction, so that one materialized meanwhile is not missed
            with self._store.reading() as txn:
                return [entry for ident in idents for entry in self._schedule.load(txn, ident, fresh)]

        mark = self._entries.begin_reading()
        try:
            entries = await self._readers.run(load)
            attempt = Attempt(wall_ms(), PERMANENT, "queue", "", 0, "5.7.1", reason)
            for entry in entries:
                self._entries.adopt(entry, mark)
                self._ends.end(entry, dict.fromkeys((index for index, _ in entry.recipients), attempt))
        finally:
            self._entries.end_reading(mark)
        await self._writer.task(lambda change: None)  # committed after their outcomes
        found = {entry.ident: entry.envelope for entry in entries}
        for ident, envelope in found.items():
            if envelope.quarantine is not None:
                self._left(ident, envelope, "bounced", [])
        return len(found)

    async def release_policy_held(self, still: Callable[[Envelope, list[QueueName]], bool]) -> int:
        """Release the messages that a hold policy held, but for those that `still(envelope, queues)` one applies to; how many."""
        after, released = (0, 0), 0
        while True:
            found, after = await self._readers.run(inspect.policy_held, self._store, after)
            idents = [ident for ident, envelope, names in found if not still(envelope, names)]
            if idents:
                released += (await self.change_messages("release policy", idents))[0]
            if after == (0, 0):
                return released

    # Whole queues

    async def move_queues(
        self, chosen: Filter, at_site: AtSite, rename: Rename, dry_run: bool, by: str = OPERATOR
    ) -> tuple[int, int]:
        """Move all mail of the queues that match `chosen` (`whole_queues`) to the route that `rename` names, due now, in one
        group commit: (messages, of them in flight, which follow when they are deferred). `dry_run`: only count; `by`: as of
        `change_messages`."""
        if dry_run:
            rows, inlined = await self._readers.run(self._chosen, chosen, at_site)
            return sum(row.messages for row in rows) + len(inlined), 0
        return await self._in_turn(lambda: self._move(chosen, at_site, rename, by))

    def _chosen(self, chosen: Filter, at_site: AtSite) -> tuple[list[QueueRow], list[int]]:
        """Reader thread: the queues that match, and the ids of the inlined messages in them."""
        rows = inspect.chosen_queues(self._store, chosen, at_site)
        numbers = {row.number for row in rows}
        return rows, [i for i, envelope in self._store.fresh.live() if any(p.queue in numbers for p in envelope.placements)]

    async def _move(self, chosen: Filter, at_site: AtSite, rename: Rename, by: str) -> tuple[int, int]:
        rows, inlined = await self._readers.run(self._chosen, chosen, at_site)
        if not rows:
            return 0, 0
        numbers = {row.number for row in rows}
        for number in numbers:
            self._parks.pop(number, None)
        in_flight = self._entries.claim_queues(numbers, rename(rows[0].name).route)
        self._schedule.skip -= numbers

        def run(change: Change) -> int:
            change.materialize(*inlined)
            return inspect.move(change, rows, rename)

        try:
            moved = await self._writer.task(run)
        finally:
            self._entries.release_queues(numbers)
        for row in rows:
            self._moved(row.name, rename(row.name), row.messages, by)
        return moved, in_flight

    def park(self, queue: int, until: int) -> None:
        """Exclude a queue from scans until a time of the queue's clock, ms (0: wake it now). Repeated while the disk refuses,
        unless the queue is woken, moved or parked again meanwhile."""
        self._parks[queue] = until

        def run(change: Change) -> None:
            change.park(queue, until)

        def done(task: Task) -> None:
            if self._parks.get(queue) == until:
                if task.error is not None and not task.mistake:  # the disk refused: the caller relies on it
                    self._loop.call_later(PARK_AGAIN, self._park_again, queue, until)
                else:
                    del self._parks[queue]
            self._schedule.wake_at(until or self._clock.now())

        self._writer.submit(Task(run, done))

    def _park_again(self, queue: int, until: int) -> None:
        if self._parks.get(queue) == until:
            self.park(queue, until)

    async def wake_queues(self, numbers: Iterable[int] | None = None) -> None:
        """Wake all queues (or these): what is due in them is tried now."""
        numbers = None if numbers is None else list(numbers)
        for number in list(self._parks) if numbers is None else numbers:
            self._parks.pop(number, None)

        def run(change: Change) -> None:
            rows = self._store.queues(change.txn) if numbers is None else map(partial(self._store.queue, change.txn), numbers)
            for row in list(rows):
                if row is not None and (row.not_before or numbers is not None):  # None: swept meanwhile
                    change.park(row.number, 0)

        await self._writer.task(run)
        self._schedule.wake()
