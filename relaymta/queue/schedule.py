"""Which messages are tried next: a bounded window in memory over the due index on disk.

Fresh messages enter the window with their message data when they are committed; what does not fit stays on disk only and is
found by a scan, as retries are. Who has an entry, and which rows a scan may add: lifecycle.py.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relaymta.disk.clock import ShardClock
from relaymta.proto.envelope import DELIVERED, FAILED, Envelope
from relaymta.queue.entry import Entry
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.readers import Readers
from relaymta.queue.store import QueueRow, Store

__all__ = ["RETRY_STEPS", "Schedule", "retry_delay"]

RETRY_STEPS = (1, 2, 5, 10, 20, 40, 60)  # multiples of the first delay: 1m 2m 5m 10m 20m 40m 1h 1h ...
JITTER = 0.15
SCAN_GAP_MS = 50  # at least, between two scans
SCAN_QUEUES = 2000  # at most, in one scan
FIRST = (0, 0)  # before the first key of the wake index


def retry_delay(attempts: int, first_ms: int) -> int:
    """Milliseconds to wait after the `attempts`-th attempt (1: the first) failed temporarily, up to 15 % of jitter included."""
    step = RETRY_STEPS[min(attempts, len(RETRY_STEPS)) - 1]
    return int(first_ms * step * random.uniform(1, 1 + JITTER))


@dataclass(slots=True)
class Scanned:
    """The result of a scan: entries; whether a queue has more due rows than its share; when the next row is due (0: none); and
    where the pass goes on (`FIRST`: it is over)."""

    entries: list[Entry] = field(default_factory=list)
    more: bool = False
    next_at: int = 0
    at: tuple[int, int] = FIRST


class Schedule:
    """Scans the due index and adds what is due to the window. All methods but `load` and those of the scan run on the loop.

    Scans make passes over the queues that are awake, the longest awake first. One takes up where the one before it stopped, for
    lack of room or after SCAN_QUEUES queues: so queues whose mail is in flight, or that hold very much, starve no others."""

    def __init__(
        self,
        store: Store,
        clock: ShardClock,
        readers: Readers,
        entries: Lifecycle,
    ) -> None:
        self._store = store
        self._clock = clock
        self._readers = readers
        self._entries = entries
        self._scanning = False
        self._more = True  # another pass is wanted
        self._next_at = 0  # and when (0: not known)
        self._at = FIRST  # where the pass under way goes on
        self._last_scan = 0
        self.skip: set[int] = set()  # queues that are not scanned: enough of them is in memory

    def wake_at(self, moment: int) -> None:
        """Scan at `moment` (ms of the queue's clock) or earlier: something is due then."""
        if not self._next_at or moment < self._next_at:
            self._next_at = moment

    def wake(self) -> None:
        """Scan at the next tick: something may be due that was not."""
        self._more = True

    def tick(self) -> None:
        """Begin a scan when there is room in the window and something may be due. Called periodically."""
        entries = self._entries
        if self._scanning or entries.paused:
            return
        now = self._clock.now()
        if entries.scanned > entries.half // 2 or now - self._last_scan < SCAN_GAP_MS:
            return
        if self._at == FIRST:
            if not self._more and (not self._next_at or self._next_at > now):
                return
            self._more, self._next_at = False, 0  # what is set from now on, while the pass is under way, wants another one
        self._scanning, self._last_scan = True, now
        room, start = entries.half - entries.scanned, self._at
        self._readers.read_rows(lambda: self._scan(now, room, start), self._found, self._not_found)

    def load(self, txn: Any, ident: int, fresh: Mapping[int, Envelope] = {}) -> list[Entry]:
        """Reader thread: a message's entries, one for each of its placements. `fresh`: the inlined messages, as `fresh.live()`
        returned them before `txn` began."""
        envelope = self._store.envelope(txn, ident) or fresh.get(ident)
        found = []
        for placement in envelope.placements if envelope is not None else []:
            row = self._store.queue(txn, placement.queue)
            entry = None if row is None else self._entry(txn, row, ident, envelope)
            if entry is not None:
                found.append(entry)
        return found

    def _not_found(self) -> None:
        """The scan failed: scan again at the next tick."""
        self._scanning, self._more = False, True

    def _found(self, scanned: Scanned, mark: int) -> None:
        """Offer what a scan found, but for what is in memory by now or outdated."""
        self._scanning, self._at = False, scanned.at
        self._more = self._more or scanned.more
        if scanned.next_at:
            self.wake_at(scanned.next_at)
        for entry in scanned.entries:
            if not self._entries.add_read(entry, mark):
                self._more = True  # a later scan reads it again, if it still exists

    # On a reader thread

    def _scan(self, now: int, room: int, start: tuple[int, int]) -> Scanned:
        """Up to `room` due rows that are not in memory, an equal share from each queue that is awake, from `start` on."""
        found = Scanned()
        store = self._store
        with store.reading() as txn:
            awake: list[tuple[int, int]] = []
            for moment, queue in store.wakes(txn, start):
                if moment > now:
                    found.next_at = moment
                    break
                if len(awake) >= SCAN_QUEUES:
                    found.at = (moment, queue)
                    break
                if queue not in self.skip and not self._entries.claimed_queue(queue):
                    awake.append((moment, queue))
            share = max(1, room // max(1, len(awake)))
            for key in awake:
                if len(found.entries) >= room:
                    found.at = key
                    break
                self._scan_queue(txn, key[1], now, share, found)
        return found

    def _scan_queue(self, txn: Any, queue: int, now: int, share: int, found: Scanned) -> None:
        """Add up to `share` due rows of one queue to `found`."""
        store = self._store
        row = store.queue(txn, queue)
        if row is None or row.not_before > now:
            return
        taken = 0
        for moment, ident in store.due(txn, queue):
            if moment > now and not row.moved:
                if not found.next_at or moment < found.next_at:
                    found.next_at = moment
                return
            if self._entries.has(ident, queue):
                continue
            if taken >= share:
                found.more = True
                return
            entry = self._entry(txn, row, ident, self._store.envelope(txn, ident))
            if entry is not None:
                found.entries.append(entry)
                taken += 1

    def _entry(self, txn: Any, row: QueueRow, ident: int, envelope: Envelope | None) -> Entry | None:
        """A message's entry in a queue, with its pending recipients; None when it is not in that queue (any more)."""
        if envelope is None:
            return None
        placement = next((p for p in envelope.placements if p.queue == row.number), None)
        if placement is None:
            return None
        if row.moved:
            envelope.route = row.name.route  # written to the message's row with its next outcome
        indexes = placement.indexes
        if placement.attempts:
            states = self._store.recipient_states(txn, ident)
            everyone = range(len(envelope.recipients)) if indexes is None else indexes
            indexes = [i for i in everyone if i not in states or states[i].state not in (DELIVERED, FAILED)]
        return Entry(
            ident, envelope, row.name, row.number, placement.due, placement.attempts, indexes, len(envelope.placements) == 1
        )
