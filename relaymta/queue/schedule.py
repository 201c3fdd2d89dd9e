"""What is tried next: a bounded window in memory over the due index on disk.

Fresh messages enter the window with their text as they are committed; what does not fit stays on disk only and is found
by the scan, as retries are. Fresh mail and scanned mail share the window half and half.

Who may end a message: whoever has its entry in `_entries`, once; or an operator's change that has *claimed* it, which it can
only while no part of it is in flight or ending. A row that is in the window or in flight is never picked twice, what is
claimed is not picked at all, and a read of the disk that began before an entry left, or before a change was committed, is
told so: what it found of that is not believed.
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

RETRY_STEPS = (1, 2, 5, 10, 20, 40, 60)  # times the first delay: 1m 2m 5m 10m 20m 40m 1h 1h ...
JITTER = 0.15
SCAN_GAP_MS = 50  # between two scans at least
KEPT_LEFT = 10_000


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
        self._claimed: set[int] = set()  # messages that an operator's change is about
        # Reads of the disk that are under way, each the value of `_changes` when it began; and what has left or was changed
        # meanwhile: (id, queue) an entry, (id, 0) a whole message, (0, queue) a whole queue -> the value of `_changes` then.
        self._readings: list[int] = []
        self._changes = 0
        self._left: dict[tuple[int, int], int] = {}
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
            if self._fresh >= self._half or self.paused or entry.ident in self._claimed:
                self._more, whole = True, False
                continue
            size = entry.envelope.size
            if self._fresh_bytes + size > self._window_bytes or not self._keeps_texts:
                entry.text = None
            if entry.text is not None:
                entry.counted = True
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
            if entry.counted and not entry.flying:
                self._fresh_bytes -= entry.envelope.size
                entry.counted, entry.text = False, None

    def remove(self, entry: Entry, next_at: int = 0) -> None:
        """An entry left: its outcome is committed, or it goes back unattempted. `next_at`: when it is due again."""
        key = (entry.ident, entry.queue)
        if self._entries.get(key) is not entry:
            return
        del self._entries[key]
        if entry.counted:  # not one whose text was read from disk for its delivery
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
        """A message's body lies elsewhere now."""
        for queue in queues:
            entry = self._entries.get((ident, queue))
            if entry is not None:
                entry.envelope.body = body
        if self._readings:
            self._moved[ident] = body

    def put_back(self, entry: Entry) -> None:
        """An entry leaves the window untried: its row on disk is found again once its queue wakes. One that was cancelled is
        somebody else's already."""
        if entry.cancelled:
            return
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
        self.reading(lambda: self._scan(now, room), self._found, self._not_found)

    def reading(
        self, function: Callable[[], Any], then: Callable[[Any, int], None], refused: Callable[[], None] = lambda: None
    ) -> None:
        """Run `function` on a reader thread, then `then(result, mark)` here, or `refused()` when it raised. `mark` tells `seize`
        when it began, so that a row read before its message ended or was changed is not taken for what is there."""
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
        """A read of the disk begins; its mark, for `seize` and `end_reading`."""
        self._readings.append(self._changes)
        return self._changes

    def end_reading(self, mark: int) -> None:
        """What was read has been looked at."""
        self._readings.remove(mark)
        if not self._readings:
            self._left.clear()
            self._moved.clear()
        elif len(self._left) > KEPT_LEFT:  # reads follow each other without a gap: keep what the oldest needs
            oldest = min(self._readings)
            self._left = {key: when for key, when in self._left.items() if when > oldest}

    def _note(self, key: tuple[int, int]) -> None:
        self._changes += 1
        self._left[key] = self._changes

    def _outdated(self, entry: Entry, mark: int) -> bool:
        """Whether a row that was read since `mark` may be no longer what it was."""
        left, ident, queue = self._left, entry.ident, entry.queue
        return bool(left) and (
            left.get((ident, queue), 0) > mark or left.get((ident, 0), 0) > mark or left.get((0, queue), 0) > mark
        )

    def seize(self, entry: Entry, mark: int) -> Entry | None:
        """Take an entry that was read from disk since `mark` out of everybody's hands, to end it. None when it is in flight,
        claimed, or gone."""
        key = (entry.ident, entry.queue)
        known = self._entries.get(key)
        if known is not None:
            if known.flying or known.cancelled:
                return None
            known.cancelled = True  # whoever has it waiting drops it; it stays here until its outcome is committed
            return known
        if entry.ident in self._claimed or self._outdated(entry, mark):
            return None
        self.adopt(entry)
        return entry

    def adopt(self, entry: Entry) -> None:
        """An entry that was read from disk, and that nobody else has, is about to end."""
        self._relocated(entry)
        entry.due = -1
        entry.flying = True
        self._scanned += 1
        self._entries[entry.ident, entry.queue] = entry

    def claim(self, idents: Iterable[int]) -> set[int]:
        """An operator's change of these messages begins: they leave the window, and until `release_claim` nobody else gets
        them. Those that it may have: not what is in flight, ending, or claimed."""
        wanted = set(idents) - self._claimed
        meant = [entry for entry in self._entries.values() if entry.ident in wanted]
        claimed = wanted - {entry.ident for entry in meant if entry.flying or entry.cancelled}
        for entry in meant:
            if entry.ident in claimed:
                self.put_back(entry)
        self._claimed |= claimed
        return claimed

    def release_claim(self, claimed: set[int]) -> None:
        """The change is committed, or did not happen; what was read before is not believed any more."""
        self._claimed -= claimed
        self._more = True
        if self._readings:
            for ident in claimed:
                self._note((ident, 0))

    def queues_changed(self, queues: Iterable[int]) -> None:
        """An operator's change of whole queues is committed, or did not happen."""
        self._more = True
        if self._readings:
            for queue in queues:
                self._note((0, queue))

    def withdraw_queues(self, queues: set[int], route: str) -> int:
        """Take the messages of these queues out of the window; how many are in flight, and stay: they go by `route` should they
        have to wait. Scans must be paused, and `queues_changed` follows."""
        meant = [entry for entry in self._entries.values() if entry.queue in queues]
        flying = [entry for entry in meant if entry.flying or entry.cancelled]
        for entry in flying:
            entry.envelope.route = route
        for entry in meant:
            if not (entry.flying or entry.cancelled):
                self.put_back(entry)
        self.skip -= queues
        return len(flying)

    def load(self, txn: Any, ident: int, fresh: Mapping[int, Envelope] = {}) -> list[Entry]:
        """Reader thread: a message's entries, one for each of its placements. `fresh`: the folded ones, as `fresh.live()` told
        before `txn` began."""
        envelope = self._store.envelope(txn, ident) or fresh.get(ident)
        found = []
        for placement in envelope.placements if envelope is not None else []:
            row = self._store.queue(txn, placement.queue)
            entry = None if row is None else self._entry(txn, row, ident, envelope)
            if entry is not None:
                found.append(entry)
        return found

    def _not_found(self) -> None:
        """The disk refused: look again at the next tick."""
        self._scanning, self._more = False, True

    def _found(self, scanned: Scanned, mark: int) -> None:
        self._scanning = False
        self._more = self._more or scanned.more
        if scanned.next_at:
            self.wake_at(scanned.next_at)
        if self.changing:  # an operator's change began meanwhile: what was read may be what it is about
            self._more = True
            return
        for entry in scanned.entries:
            key = (entry.ident, entry.queue)
            if key in self._entries:
                continue
            if self._outdated(entry, mark):
                self._more = True  # it may be there all the same: the next scan tells
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
            entry = self._entry(txn, row, ident, self._store.envelope(txn, ident))
            if entry is not None:
                found.entries.append(entry)
                taken += 1

    def _entry(self, txn: Any, row: QueueRow, ident: int, envelope: Envelope | None) -> Entry | None:
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
