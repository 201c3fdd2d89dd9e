"""Memory shared by the supervisor and the workers: counters for metrics, limits and rates of all workers, messages in flight.

One memfd, mapped by all processes. Layout: a block of counters for each worker slot, limits, ids in flight, rates. A worker
writes only its own cells, except for rates, which all workers change by compare-and-swap. The supervisor reads all cells, also
those of a worker that has died.
"""

import mmap
import os
import time
from collections.abc import Iterable

import xxhash

from relaymta._speedups.cells import Cells

__all__ = ["InFlight", "Limits", "Rates", "Shared"]

SLOTS = 64  # worker slots
COUNTERS = 256  # cells of one worker
IN_FLIGHT = 512  # cells of one worker for ids of messages in flight; the first is for the message that is probed
ROWS = 4096  # limits in use at the same time
ROW = SLOTS + 1  # a row: the key's hash, then one cell for each worker slot
PROBES = 16
# Rates in use at the same time, in each of two tables. A row: the key's hash, and when the rate is free again (us,
# CLOCK_BOOTTIME).
RATE_ROWS = 4096
RATE_IDLE_US = 60_000_000  # a rate that has been free for so long may lose its row to another key

_IN_FLIGHT_AT = SLOTS * COUNTERS + ROWS * ROW
_RATES_AT = _IN_FLIGHT_AT + SLOTS * IN_FLIGHT
_CELLS = _RATES_AT + 2 * 2 * RATE_ROWS


class Shared:
    """The mapping. The supervisor calls `create()`; a worker calls `Shared(fd)` with the descriptor it has received."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        size = 8 * _CELLS
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, size)
        self._rows = Cells(self._map, 8 * SLOTS * COUNTERS, ROWS * ROW)

    @classmethod
    def create(cls) -> "Shared":
        """A new, zeroed mapping."""
        return cls(os.memfd_create("relaymta", os.MFD_CLOEXEC))

    def counters(self, slot: int) -> Cells:
        """The counter cells of a worker slot."""
        return Cells(self._map, 8 * slot * COUNTERS, COUNTERS)

    def limits(self, slot: int, workers: int) -> "Limits":
        """The limits, as seen by one of `workers` workers."""
        return Limits(self._rows, slot, workers)

    def in_flight(self, slot: int) -> "InFlight":
        """The messages that a slot's worker has, or had when it died, in flight."""
        return InFlight(Cells(self._map, 8 * (_IN_FLIGHT_AT + slot * IN_FLIGHT), IN_FLIGHT))

    def rates(self, workers: int) -> "Rates":
        """The rates of delivery, as seen by one of `workers` workers."""
        return Rates(Cells(self._map, 8 * _RATES_AT, 2 * RATE_ROWS), workers)

    def client_rates(self, workers: int) -> "Rates":
        """The rates and quotas of clients. They have a table of their own, since unauthenticated clients can use any number of
        addresses."""
        return Rates(Cells(self._map, 8 * (_RATES_AT + 2 * RATE_ROWS), 2 * RATE_ROWS), workers)

    def clear_limits(self, slot: int) -> None:
        """Release all units of limits that a dead worker held."""
        for row in range(ROWS):
            self._rows.set(row * ROW + 1 + slot, 0)


class InFlight:
    """The ids of messages that a worker has in flight, which survive its death. Its successor probes them, one at a time. The
    message that was probed when the successor died, too, is the culprit. Ids that do not fit into the cells are not recorded."""

    __slots__ = ("_cells", "_free", "_where")

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._free = list(range(cells.count - 1, 0, -1))
        self._where: dict[int, int] = {}

    def add(self, ident: int) -> None:
        """A delivery begins."""
        if self._free and ident not in self._where:
            cell = self._where[ident] = self._free.pop()
            self._cells.set(cell, ident)

    def remove(self, ident: int) -> None:
        """A delivery's outcome is durable."""
        cell = self._where.pop(ident, 0)
        if cell:
            self._cells.set(cell, 0)
            self._free.append(cell)

    def probe(self, ident: int) -> None:
        """A message is probed from now on (0: none; the worker survived the last one)."""
        self._cells.set(0, ident)

    def take(self) -> tuple[list[int], int]:
        """(ids to probe, culprit or 0) of a dead worker; its cells are cleared."""
        culprit, *others = self._cells.values()
        for cell in range(self._cells.count):
            self._cells.set(cell, 0)
        return [ident for ident in others if ident and ident != culprit], culprit


class Limits:
    """Limits that hold for all workers together. A row has one cell for each worker, which only that worker writes. To take a
    unit it adds to its own cell, sums all cells, and undoes that if the sum exceeds the limit; so a limit is never exceeded. A
    row whose cells are all 0 may be reused for another key. When no row is free, a worker uses only its share of the limit."""

    __slots__ = ("_cells", "_fallback", "_known", "_slot", "_workers", "overflows")

    def __init__(self, cells: Cells, slot: int, workers: int) -> None:
        self._cells = cells
        self._slot = slot
        self._workers = workers
        self._fallback: dict[str, int] = {}
        self._known: dict[str, tuple[int, int]] = {}
        self.overflows = 0

    @property
    def workers(self) -> int:
        """The number of workers that share the limits."""
        return self._workers

    def take(self, key: str, most: int) -> bool:
        """Take one of the `most` units of `key`; False when all are in use."""
        cells = self._cells
        mark, row = self._find(key)
        if row < 0:
            self.overflows += 1
            held = self._fallback.get(key, 0)
            if held >= max(1, most // self._workers):
                return False
            self._fallback[key] = held + 1
            return True
        mine = row + 1 + self._slot
        cells.add(mine, 1)
        if cells.get(row) != mark:  # another worker has reused the idle row
            cells.add(mine, -1)
            self._known.pop(key, None)
            return self.take(key, most)
        if cells.total(row + 1, SLOTS) > most:
            cells.add(mine, -1)
            return False
        return True

    def give(self, key: str) -> None:
        """Give one unit back."""
        held = self._fallback.get(key, 0)
        if held:
            self._fallback[key] = held - 1
            if held == 1:
                del self._fallback[key]
            return
        _, row = self._find(key)  # still the key's: a row in which a unit is held is not reused
        if row >= 0:
            self._cells.add(row + 1 + self._slot, -1)

    def wait(self, key: str, claim: int) -> None:
        """Record that this worker waits for a unit of `key`, with what priority (`claim`: 1 and up; 0: it does not wait)."""
        mark, row = self._find("wait " + key)
        if row >= 0:
            self._cells.set(row + 1 + self._slot, claim)
            if claim and self._cells.get(row) != mark:  # another worker has reused the idle row
                self._cells.set(row + 1 + self._slot, 0)
                self._known.pop("wait " + key, None)

    def waiting(self, key: str) -> int:
        """The highest claim of the other workers that wait for a unit of `key`; 0 when none waits."""
        mark, row = self._find("wait " + key)
        if row < 0 or self._cells.get(row) != mark:
            self._known.pop("wait " + key, None)
            return 0
        return self._cells.highest(row + 1, SLOTS, row + 1 + self._slot)

    def taken(self, key: str) -> int:
        """The number of units of `key` in use, by all workers."""
        mark, row = self._find(key)
        if row >= 0 and self._cells.get(row) != mark:  # another worker has reused the idle row
            self._known.pop(key, None)
            mark, row = self._find(key)
        return (self._cells.total(row + 1, SLOTS) if row >= 0 else 0) + self._fallback.get(key, 0)

    def _find(self, key: str) -> tuple[int, int]:
        """The key's hash and row. Rows are cached; `take` checks that a row is still the key's."""
        known = self._known.get(key)
        if known is None:
            mark = _mark(key)
            row = self._row(mark)
            if row < 0:
                return mark, row
            if len(self._known) > 4 * ROWS:
                self._known.clear()
            known = self._known[key] = (mark, row)
        return known

    def _row(self, mark: int) -> int:
        """The first cell of the key's row; an idle one is claimed if it has none. -1 when none is free."""
        cells = self._cells
        idle = -1
        for probe in range(PROBES):
            row = (mark + probe) % ROWS * ROW
            owner = cells.get(row)
            if owner == mark:
                return row
            if idle < 0 and (owner == 0 or cells.total(row + 1, SLOTS) == 0):
                idle = row
        if idle >= 0 and cells.compare_swap(idle, cells.get(idle), mark):
            return idle
        return self._row(mark) if idle >= 0 else -1


class Rates:
    """Rates that hold for all workers together (GCRA): for each key the time at which it is free again (microseconds of
    CLOCK_BOOTTIME), changed by compare-and-swap. When no row is free, a worker uses only its share of the rate."""

    __slots__ = ("_cells", "_own", "overflows", "workers")

    def __init__(self, cells: Cells, workers: int) -> None:
        self._cells = cells
        self.workers = workers
        self._own: dict[str, int] = {}
        self.overflows = 0

    def take(self, key: str, per_second: float, burst: int = 1, units: int = 1) -> float:
        """Take units of a rate of `per_second`, of which up to `burst` may be taken at once. 0.0, or (nothing was taken) the
        seconds until they are available."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        interval = 1_000_000 / per_second
        row = self._row(_mark(key), now)
        if row < 0:
            self.overflows += 1
            if len(self._own) > RATE_ROWS:
                self._own.clear()
            free, wait = _next_free(self._own.get(key, 0), now, interval * self.workers, burst, units)
            if not wait:
                self._own[key] = free
            return wait / 1_000_000
        while True:
            was = self._cells.get(row + 1)
            free, wait = _next_free(was, now, interval, burst, units)
            if wait:
                return wait / 1_000_000
            if self._cells.compare_swap(row + 1, was, free):
                return 0.0

    def give(self, key: str, per_second: float, units: int = 1) -> None:
        """Return units that were taken at a rate of `per_second`, as far as they have not become available again meanwhile."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        back = max(1, int(units * 1_000_000 / per_second))
        row = self._known_row(_mark(key))
        if row < 0:
            free = self._own.get(key, 0)
            if free > now:
                self._own[key] = free - back * self.workers
            return
        while (was := self._cells.get(row + 1)) > now:  # so the row is not reused meanwhile
            if self._cells.compare_swap(row + 1, was, was - back):
                return

    def wait(self, key: str, per_second: float, burst: int = 1) -> float:
        """The seconds until a unit is available, 0.0 if one is now. Takes nothing."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        return _next_free(self._free(key), now, 1_000_000 / per_second, burst)[1] / 1_000_000

    def rows(self) -> list[tuple[int, int]]:
        """(hash of the key, microseconds until it is free) of the rates that are in use for longer than RATE_IDLE_US."""
        now, cells = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000, self._cells
        found = [(cells.get(row), cells.get(row + 1) - now) for row in range(0, 2 * RATE_ROWS, 2)]
        return [(mark, left) for mark, left in found if mark and left > RATE_IDLE_US]

    def restore(self, rows: Iterable[tuple[int, int]]) -> None:
        """Set rates as `rows()` returned them."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        for mark, left in rows:
            row = self._row(mark, now)
            if row >= 0:
                self._cells.set(row + 1, now + left)

    def used(self, key: str, per_second: float) -> float:
        """The number of units of `key` that were taken and have not become available again."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        return max(0, self._free(key) - now) * per_second / 1_000_000

    def _free(self, key: str) -> int:
        """When a key's rate is free again (microseconds). Claims no row."""
        row = self._known_row(_mark(key))
        return self._cells.get(row + 1) if row >= 0 else self._own.get(key, 0)

    def _known_row(self, mark: int) -> int:
        """The key's row; -1 when it has none."""
        for probe in range(PROBES):
            row = (mark + probe) % RATE_ROWS * 2
            if self._cells.get(row) == mark:
                return row
        return -1

    def _row(self, mark: int, now: int) -> int:
        """The key's row; an idle one is claimed if it has none. -1 when none is free."""
        cells = self._cells
        idle = -1
        for probe in range(PROBES):
            row = (mark + probe) % RATE_ROWS * 2
            owner = cells.get(row)
            if owner == mark:
                return row
            if idle < 0 and (owner == 0 or cells.get(row + 1) < now - RATE_IDLE_US):
                idle = row
        if idle < 0:
            return -1
        return idle if cells.compare_swap(idle, cells.get(idle), mark) else self._row(mark, now)


def _next_free(free: int, now: int, interval: float, burst: int, units: int = 1) -> tuple[int, int]:
    """(when the rate is free again once `units` are taken, how long to wait until they can be taken), in microseconds. More units
    than `burst` can be taken when none is in use."""
    start = max(free, now)
    wait = start - now - int(max(0, burst - units) * interval)
    return start + max(1, int(units * interval)), max(0, wait)


def _mark(key: str) -> int:
    """A key's hash, the same in every process, never 0."""
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1 | 1
