"""Which messages are tried next: a bounded window in memory over the due index on disk.

Fresh messages enter the window with their message data when they are committed; what does not fit stays on disk only and is
found by a scan, as retries are. Fresh mail and scanned mail each have half of the window.

Invariants. A message is ended either through its entry in `_entries`, once, or by an operator's change that has *claimed* it,
which is possible only while none of its entries is in flight or ending. A row whose entry is in the window or in flight is not
picked again, and a claimed one is not picked at all. A read of the disk has a *mark*: a row that it read before the entry left
memory, or before a change of it was committed, is outdated and not used.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relaymta.proto.envelope import DELIVERED, FAILED, Body, Envelope
from relaymta.queue.clock import QueueClock
from relaymta.queue.entry import Entry
from relaymta.queue.store import QueueRow, Store

__all__ = ["RETRY_STEPS", "Schedule", "retry_delay"]

RETRY_STEPS = (1, 2, 5, 10, 20, 40, 60)  # multiples of the first delay: 1m 2m 5m 10m 20m 40m 1h 1h ...
JITTER = 0.15
SCAN_GAP_MS = 50  # at least, between two scans
KEPT_LEFT = 10_000


def retry_delay(attempts: int, first_ms: int) -> int:
    """Milliseconds to wait after the `attempts`-th attempt (1: the first) failed temporarily, up to 15 % of jitter included."""
    step = RETRY_STEPS[min(attempts, len(RETRY_STEPS)) - 1]
    return int(first_ms * step * random.uniform(1, 1 + JITTER))


@dataclass(slots=True)
class Scanned:
    """The result of a scan: entries, whether due rows were left for lack of room, when the next row is due (0: none)."""

    entries: list[Entry] = field(default_factory=list)
    more: bool = False
    next_at: int = 0


class Schedule:
    """The window. All methods but `load` and those of the scan run on the loop. `run(function, then)`: as `Queue._read`;
    `offer(entry)` takes an entry to be delivered. `window` in entries, `window_bytes` in octets of fresh message data."""

    def __init__(
        self,
        store: Store,
        clock: QueueClock,
        run: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        offer: Callable[[Entry], None],
        *,
        window: int = 10_000,
        window_bytes: int = 32 << 20,
    ) -> None:
        self._store = store
        self._clock = clock
        self._run = run
        self._offer = offer
        self._half = window // 2
        self._window_bytes = window_bytes
        self._entries: dict[tuple[int, int], Entry] = {}
        self._fresh = 0
        self._fresh_bytes = 0
        self._keeps_data = True
        self._scanned = 0
        self._scanning = False
        self._claimed: set[int] = set()  # messages that an operator's change has claimed
        # The marks of the reads under way: the value of `_changes` when each began. And what has left memory or was changed
        # meanwhile: (id, queue) an entry, (id, 0) a whole message, (0, queue) a whole queue -> the value of `_changes` then.
        self._readings: list[int] = []
        self._changes = 0
        self._left: dict[tuple[int, int], int] = {}
        self._moved: dict[int, Body] = {}  # bodies that compaction moved while a read is under way
        self._more = True
        self._next_at = 0
        self._last_scan = 0
        self.paused = False
        self.skip: set[int] = set()  # queues that are not scanned: enough of them is in memory
        self.changing = 0  # operators' changes under way: no scan begins meanwhile
        self.last_error = ""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def crowded(self) -> bool:
        """Whether the data of fresh messages takes more than half of `window_bytes`."""
        return 2 * self._fresh_bytes > self._window_bytes

    def get(self, ident: int, queue: int) -> Entry | None:
        """The entry of a message in a queue; None when it is not in memory."""
        return self._entries.get((ident, queue))

    def room(self, promised: int) -> bool:
        """Whether the message submitted next will fit into the window, after `promised` others that are not committed yet."""
        return self._fresh + promised < self._half and not self.paused

    def add_fresh(self, entries: list[Entry]) -> bool:
        """Add and offer the entries of a message that was just committed; False when one of them did not fit."""
        whole = True
        for entry in entries:
            key = (entry.ident, entry.queue)
            if key in self._entries:
                continue
            if self._fresh >= self._half or self.paused or entry.ident in self._claimed:
                self._more, whole = True, False
                continue
            size = entry.envelope.size
            if self._fresh_bytes + size > self._window_bytes or not self._keeps_data:
                entry.data = None
            if entry.data is not None:
                entry.counted = True
                self._fresh_bytes += size
            self._fresh += 1
            self._entries[key] = entry
            self._offer(entry)
        return whole

    def keep_data(self, keep: bool) -> None:
        """Whether the data of fresh messages stays in memory. False also drops what is there, but for entries in flight."""
        self._keeps_data = keep
        if keep:
            return
        for entry in self._entries.values():
            if entry.counted and not entry.in_flight:
                self._fresh_bytes -= entry.envelope.size
                entry.counted, entry.data = False, None

    def remove(self, entry: Entry, next_at: int = 0) -> None:
        """Remove an entry whose outcome is committed, or that was put back. `next_at`: when its message is due again (0: not)."""
        key = (entry.ident, entry.queue)
        if self._entries.get(key) is not entry:
            return
        del self._entries[key]
        if entry.counted:  # not one whose message data was read from disk for its delivery
            entry.counted = False
            self._fresh_bytes -= entry.envelope.size
        if entry.due < 0:
            self._scanned -= 1
        else:
            self._fresh -= 1
        if self._readings:
            self._note(key)
        if next_at:
            self.wake_at(next_at)

    def moved(self, ident: int, queues: list[int], body: Body) -> None:
        """Update the entries of a message whose body compaction moved."""
        for queue in queues:
            entry = self._entries.get((ident, queue))
            if entry is not None:
                entry.envelope.body = body
        if self._readings:
            self._moved[ident] = body

    def put_back(self, entry: Entry) -> None:
        """Remove an entry that was not tried: a scan finds its row again once its queue is awake. One that is cancelled is left
        alone: its message was claimed, seized or put back before."""
        if entry.cancelled:
            return
        entry.cancelled = True
        self.remove(entry)
        self._more = True

    def wake_at(self, moment: int) -> None:
        """Scan at `moment` (ms of the queue's clock) or earlier: something is due then."""
        if not self._next_at or moment < self._next_at:
            self._next_at = moment

    def wake(self) -> None:
        """Scan at the next tick: something may be due that was not."""
        self._more = True

    def tick(self) -> None:
        """Begin a scan when there is room in the window and something may be due. Called periodically."""
        if self._scanning or self.paused or self.changing:
            return
        now = self._clock.now()
        if self._scanned > self._half // 2 or now - self._last_scan < SCAN_GAP_MS:
            return
        if not self._more and (not self._next_at or self._next_at > now):
            return
        self._scanning, self._more, self._next_at, self._last_scan = True, False, 0, now
        room = self._half - self._scanned
        self.reading(lambda: self._scan(now, room), self._found, self._not_found)

    def reading(
        self, function: Callable[[], Any], then: Callable[[Any, int], None], refused: Callable[[], None] = lambda: None
    ) -> None:
        """Run `function` on a reader thread, then `then(result, mark)` on the loop, or `refused()` when it raised. `mark`: when
        the read began, for `seize`, which rejects a row that was read before its message ended or was changed."""
        mark = self.begin_reading()

        def done(result: Any) -> None:
            try:
                if isinstance(result, Exception):
                    self.last_error = str(result)
                    refused()
                else:
                    then(result, mark)
            finally:
                self.end_reading(mark)

        self._run(function, done)

    def begin_reading(self) -> int:
        """Note that a read of the disk begins; its mark, for `seize` and `end_reading`."""
        self._readings.append(self._changes)
        return self._changes

    def end_reading(self, mark: int) -> None:
        """Note that what was read with this mark has been used."""
        self._readings.remove(mark)
        if not self._readings:
            self._left.clear()
            self._moved.clear()
        elif len(self._left) > KEPT_LEFT:  # reads overlap without a gap: keep what the oldest needs
            oldest = min(self._readings)
            self._left = {key: when for key, when in self._left.items() if when > oldest}

    def _note(self, key: tuple[int, int]) -> None:
        """Make rows of `key` that the reads under way have read outdated."""
        self._changes += 1
        self._left[key] = self._changes

    def _outdated(self, entry: Entry, mark: int) -> bool:
        """Whether an entry read with this mark may have left or changed since it was read."""
        left, ident, queue = self._left, entry.ident, entry.queue
        return bool(left) and (
            left.get((ident, queue), 0) > mark or left.get((ident, 0), 0) > mark or left.get((0, queue), 0) > mark
        )

    def seize(self, entry: Entry, mark: int) -> Entry | None:
        """Take over an entry that was read from disk with this mark, to end it: the one to pass to `finish`. None when it is in
        flight, claimed, or outdated."""
        key = (entry.ident, entry.queue)
        known = self._entries.get(key)
        if known is not None:
            if known.in_flight or known.cancelled:
                return None
            known.cancelled = True  # whoever still holds it drops it; it stays here until its outcome is committed
            return known
        if entry.ident in self._claimed or self._outdated(entry, mark):
            return None
        self.adopt(entry)
        return entry

    def adopt(self, entry: Entry) -> None:
        """Put an entry that was read from disk, and is not in memory, in flight without offering it, to end it."""
        self._relocated(entry)
        entry.due = -1
        entry.in_flight = True
        self._scanned += 1
        self._entries[entry.ident, entry.queue] = entry

    def claim(self, idents: Iterable[int]) -> set[int]:
        """Claim these messages for an operator's change: they leave the window and are not offered until `release_claim`. The
        ids of those claimed: all but those in flight, ending, or claimed before."""
        wanted = set(idents) - self._claimed
        matching = [entry for entry in self._entries.values() if entry.ident in wanted]
        claimed = wanted - {entry.ident for entry in matching if entry.in_flight or entry.cancelled}
        for entry in matching:
            if entry.ident in claimed:
                self.put_back(entry)
        self._claimed |= claimed
        return claimed

    def release_claim(self, claimed: set[int]) -> None:
        """End a claim: the change is committed or failed. Rows of these messages that were read before are outdated."""
        self._claimed -= claimed
        self._more = True
        if self._readings:
            for ident in claimed:
                self._note((ident, 0))

    def queues_changed(self, queues: Iterable[int]) -> None:
        """An operator's change of whole queues is committed or failed: rows of them that were read before are outdated."""
        self._more = True
        if self._readings:
            for queue in queues:
                self._note((0, queue))

    def withdraw_queues(self, queues: set[int], route: str) -> int:
        """Put back the entries of these queues; how many are in flight or ending, and stay: they move to `route` when they are
        deferred. No scan may be in use (`changing`), and the caller calls `queues_changed` afterwards."""
        matching = [entry for entry in self._entries.values() if entry.queue in queues]
        in_flight = [entry for entry in matching if entry.in_flight or entry.cancelled]
        for entry in in_flight:
            entry.envelope.route = route
        for entry in matching:
            if not (entry.in_flight or entry.cancelled):
                self.put_back(entry)
        self.skip -= queues
        return len(in_flight)

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
        self._scanning = False
        self._more = self._more or scanned.more
        if scanned.next_at:
            self.wake_at(scanned.next_at)
        if self.changing:  # an operator's change began meanwhile, perhaps of what was read
            self._more = True
            return
        for entry in scanned.entries:
            key = (entry.ident, entry.queue)
            if key in self._entries:
                continue
            if self._outdated(entry, mark):
                self._more = True  # the next scan reads it again, if it still exists
                continue
            self._relocated(entry)
            self._scanned += 1
            entry.due = -1  # marks it as counted in the scanned half
            self._entries[key] = entry
            self._offer(entry)

    def _relocated(self, entry: Entry) -> None:
        """Correct the place of an entry's body that was moved after the entry was read."""
        body = self._moved.get(entry.ident)
        if body is not None:
            entry.envelope.body = body

    # On a reader thread

    def _scan(self, now: int, room: int) -> Scanned:
        """Up to `room` due rows that are not in memory, an equal share from each queue that is awake."""
        found = Scanned()
        store = self._store
        with store.env.begin() as txn:
            awake: list[int] = []
            for moment, queue in store.wakes(txn):
                if moment > now or len(awake) >= 2000:
                    found.next_at = moment
                    break
                if queue not in self.skip:
                    awake.append(queue)
            share = max(1, room // max(1, len(awake)))
            for queue in awake:
                if len(found.entries) >= room:
                    found.more = True
                    break
                self._scan_queue(txn, queue, now, share, found)
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
            if (ident, queue) in self._entries:
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
