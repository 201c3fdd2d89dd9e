"""What is tried next: a bounded window in memory over the due index on disk.

Fresh messages enter the window with their text as they are committed; what does not fit stays on disk only and is found
by the scan, as retries are. Fresh mail and scanned mail share the window half and half. A row that is in the window or
in flight has an entry in `_entries` and is never picked twice; a scan that began before an entry left is told so.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from relaymta.proto.envelope import DELIVERED, FAILED, Body
from relaymta.queue.clock import QueueClock
from relaymta.queue.entry import Entry
from relaymta.queue.store import QueueRow, Store

__all__ = ["RETRY_STEPS", "Schedule", "retry_delay"]

RETRY_STEPS = (1, 2, 5, 10, 20, 40, 60)  # times the first delay: 1m 2m 5m 10m 20m 40m 1h 1h ...
JITTER = 0.15
SCAN_GAP_MS = 50  # between two scans at least


def retry_delay(attempts: int, first_ms: int) -> int:
    """Milliseconds to wait after the `attempts`-th attempt failed (1: the first), jitter of 15 % included."""
    step = RETRY_STEPS[min(attempts, len(RETRY_STEPS)) - 1]
    return int(first_ms * step * random.uniform(1, 1 + JITTER))


@dataclass(slots=True)
class Scanned:
    """What a scan found: entries, whether rows were left for lack of room, when the next row is due (0: none)."""

    entries: list[Entry] = field(default_factory=list)
    more: bool = False
    next_at: int = 0


class Schedule:
    """The window. All methods but `_scan` run on the loop; `offer(entry)` takes an entry to be delivered."""

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
        self._keeps_texts = True
        self._scanned = 0
        self._scanning = False
        self._readings = 0
        self._left: set[tuple[int, int]] = set()  # entries that left while the disk is being read
        self._moved: dict[int, Body] = {}  # bodies that moved while the disk is being read
        self._more = True
        self._next_at = 0
        self._last_scan = 0
        self.paused = False
        self.skip: set[int] = set()  # queues of which enough is in memory: not scanned
        self.changing = 0  # operators' changes under way: nothing is scanned meanwhile
        self.last_error = ""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def crowded(self) -> bool:
        """Whether the texts of fresh mail take more than half of their room in memory."""
        return 2 * self._fresh_bytes > self._window_bytes

    def get(self, ident: int, queue: int) -> Entry | None:
        """The entry of a message in a queue, when it is in memory."""
        return self._entries.get((ident, queue))

    def room(self, promised: int) -> bool:
        """Whether a message that is committed next will be in the window, when `promised` others are before it."""
        return self._fresh + promised < self._half and not self.paused

    def add_fresh(self, entries: list[Entry]) -> bool:
        """Messages that were just committed; whether all of them are in the window."""
        whole = True
        for entry in entries:
            key = (entry.ident, entry.queue)
            if key in self._entries:
                continue
            if self._fresh >= self._half or self.paused:
                self._more, whole = True, False
                continue
            size = entry.envelope.size
            if self._fresh_bytes + size > self._window_bytes or not self._keeps_texts:
                entry.text = None
            if entry.text is not None:
                self._fresh_bytes += size
            self._fresh += 1
            self._entries[key] = entry
            self._offer(entry)
        return whole

    def keep_texts(self, keep: bool) -> None:
        """Whether texts of fresh mail stay in memory; with False those that are there go, but for what is in flight."""
        self._keeps_texts = keep
        if keep:
            return
        for entry in self._entries.values():
            if entry.text is not None and not entry.flying and entry.attempts == 0 and entry.due >= 0:
                self._fresh_bytes -= entry.envelope.size
                entry.text = None

    def remove(self, entry: Entry, next_at: int = 0) -> None:
        """An entry left: its outcome is committed, or it goes back unattempted. `next_at`: when it is due again."""
        key = (entry.ident, entry.queue)
        if self._entries.pop(key, None) is None:
            return
        if entry.attempts == 0 and entry.text is not None:
            self._fresh_bytes -= entry.envelope.size
        if entry.due < 0:
            self._scanned -= 1
        else:
            self._fresh -= 1
        if self._readings:
            self._left.add(key)
        if next_at:
            self.wake_at(next_at)

    def moved(self, ident: int, queues: list[int], body: Body) -> None:
        """A message's body lies elsewhere now."""
        for queue in queues:
            entry = self._entries.get((ident, queue))
            if entry is not None:
                entry.envelope.body = body
        if self._readings:
            self._moved[ident] = body

    def put_back(self, entry: Entry) -> None:
        """An entry leaves the window untried: its row on disk is found again once its queue wakes."""
        entry.cancelled = True
        self.remove(entry)
        self._more = True

    def wake_at(self, moment: int) -> None:
        """Something is due at `moment`."""
        if not self._next_at or moment < self._next_at:
            self._next_at = moment

    def wake(self) -> None:
        """Something may be due now that was not."""
        self._more = True

    def tick(self) -> None:
        """Scan when there is room and something to be found. Called often."""
        if self._scanning or self.paused or self.changing:
            return
        now = self._clock.now()
        if self._scanned > self._half // 2 or now - self._last_scan < SCAN_GAP_MS:
            return
        if not self._more and (not self._next_at or self._next_at > now):
            return
        self._scanning, self._more, self._next_at, self._last_scan = True, False, 0, now
        room = self._half - self._scanned
        self.reading(lambda: self._scan(now, room), self._found)

    def reading(self, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `function` on a reader thread, then `then(result)` here; what leaves meanwhile is remembered, so that a
        row read before its message ended is not taken for a message that is still there."""
        self._readings += 1

        def done(result: Any) -> None:
            if isinstance(result, Exception):  # the disk refused: look again at the next tick
                self._scanning, self._more = False, True
                self.last_error = str(result)
            else:
                then(result)
            self._readings -= 1
            if not self._readings:
                self._left.clear()
                self._moved.clear()

        self._run(function, done)

    def seize(self, entry: Entry) -> Entry | None:
        """Take an entry that was read from disk out of everybody's hands, to end it. None when it is in flight or gone."""
        key = (entry.ident, entry.queue)
        known = self._entries.get(key)
        if known is not None:
            if known.flying or known.cancelled:
                return None
            known.cancelled = True  # whoever has it waiting drops it; it stays here until its outcome is committed
            return known
        if key in self._left:
            return None
        self._relocated(entry)
        entry.due = -1
        entry.flying = True
        self._scanned += 1
        self._entries[key] = entry
        return entry

    def withdraw(self, idents: set[int]) -> set[int]:
        """Take these messages out of the window; those that are in flight, and stay. Scans must be paused."""
        meant = [entry for entry in self._entries.values() if entry.ident in idents]
        flying = {entry.ident for entry in meant if entry.flying or entry.cancelled}
        for entry in meant:
            if entry.ident not in flying:
                self.put_back(entry)
        return flying

    def withdraw_queues(self, queues: set[int], route: str) -> int:
        """Take the messages of these queues out of the window; how many are in flight, and stay: they go by `route` should they
        have to wait. Scans must be paused."""
        meant = [entry for entry in self._entries.values() if entry.queue in queues]
        flying = [entry for entry in meant if entry.flying or entry.cancelled]
        for entry in flying:
            entry.envelope.route = route
        for entry in meant:
            if not (entry.flying or entry.cancelled):
                self.put_back(entry)
        self.skip -= queues
        return len(flying)

    def load(self, txn: Any, ident: int) -> list[Entry]:
        """Reader thread: a message's entries, one for each of its placements."""
        envelope = self._store.envelope(txn, ident)
        found = []
        for placement in envelope.placements if envelope is not None else []:
            row = self._store.queue(txn, placement.queue)
            entry = None if row is None else self._entry(txn, row, ident)
            if entry is not None:
                found.append(entry)
        return found

    def _found(self, scanned: Scanned) -> None:
        self._scanning = False
        self._more = self._more or scanned.more
        if scanned.next_at:
            self.wake_at(scanned.next_at)
        for entry in scanned.entries:
            key = (entry.ident, entry.queue)
            if key in self._left:
                self._more = True  # it may have come back meanwhile: looked at again once no older reading is under way
                continue
            if key in self._entries:
                continue
            self._relocated(entry)
            self._scanned += 1
            entry.due = -1  # marks it as counted in the scanned half
            self._entries[key] = entry
            self._offer(entry)

    def _relocated(self, entry: Entry) -> None:
        """An entry read from disk: its body may have moved meanwhile."""
        body = self._moved.get(entry.ident)
        if body is not None:
            entry.envelope.body = body

    # On a reader thread

    def _scan(self, now: int, room: int) -> Scanned:
        """Up to `room` due rows that are not in memory, taken in turn from the queues that are awake."""
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
            entry = self._entry(txn, row, ident)
            if entry is not None:
                found.entries.append(entry)
                taken += 1

    def _entry(self, txn: Any, row: QueueRow, ident: int) -> Entry | None:
        envelope = self._store.envelope(txn, ident)
        if envelope is None:
            return None
        placement = next((p for p in envelope.placements if p.queue == row.number), None)
        if placement is None:
            return None
        if row.moved:
            envelope.route = row.name.route  # and with the message's next outcome it stands in its row
        indexes = placement.indexes
        if placement.attempts:
            states = self._store.recipient_states(txn, ident)
            everyone = range(len(envelope.recipients)) if indexes is None else indexes
            indexes = [i for i in everyone if i not in states or states[i].state not in (DELIVERED, FAILED)]
        return Entry(
            ident, envelope, row.name, row.number, placement.due, placement.attempts, indexes, len(envelope.placements) == 1
        )
