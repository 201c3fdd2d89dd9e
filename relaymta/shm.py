"""Memory shared by the supervisor and the workers: counters for metrics, limits and rates of all workers, messages in flight.

One memfd, mapped by all processes. Layout: a block of counters for each worker slot, limits, ids in flight, rates, the version of
the directory of mailboxes, counters of what is known by its name, triplets (triplets.py). A worker writes only its own cells,
except for rates, triplets and the keys of rows, which all workers change by compare-and-swap. The supervisor reads all cells,
also those of a worker that has died; it alone writes the version.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterable

import xxhash

from relaymta import triplets
from relaymta._speedups.cells import Cells
from relaymta._speedups.pairs import Pairs

__all__ = ["LAYOUT", "NAMED", "NAMED_CELLS", "SLOTS", "InFlight", "Limits", "Named", "Rates", "Shared"]

SLOTS = 64  # worker slots
COUNTERS = 1024  # cells of one worker
IN_FLIGHT = 512  # cells of one worker for ids of messages in flight
PROBED = 16  # of these, for messages that are probed side by side
ROWS = 4096  # limits in use at the same time
ROW = SLOTS + 1  # a row of limits: the key, then one cell for each worker slot
RATE_ROWS = 4096  # rates in use at the same time, in each of two tables
RATE_ROW = 2  # a row of rates: the key, and when the rate is free again (us, CLOCK_BOOTTIME)
PROBES = 16  # rows in which a key is looked for
NAMED, NAMED_CELLS = 256, 32  # names that have counters, and the counters of each worker for one
RATE_IDLE_US = 60_000_000  # a rate that has been free for so long may lose its row to another key

_IN_FLIGHT_AT = SLOTS * COUNTERS + ROWS * ROW
_RATES_AT = _IN_FLIGHT_AT + SLOTS * IN_FLIGHT
_DIRECTORY_AT = _RATES_AT + 2 * RATE_ROW * RATE_ROWS
_NAMED_AT = _DIRECTORY_AT + 1
_TRIPLETS_AT = (_NAMED_AT + NAMED + SLOTS * NAMED * NAMED_CELLS + 511) // 512 * 512  # on a page: pairs are aligned
_CELLS = _TRIPLETS_AT + triplets.CELLS

# What is where, and, by the number in front, what it means: two programs with the same layout can share the memory.
LAYOUT = repr(
    (1, SLOTS, COUNTERS, IN_FLIGHT, PROBED, ROWS, ROW, RATE_ROWS, RATE_ROW, PROBES, NAMED, NAMED_CELLS, triplets.LAYOUT)
)

SUPERVISOR = SLOTS  # who changes a table, where it is not the worker of a slot


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
        return InFlight(self._flights(slot))

    def is_in_flight(self, slot: int, ident: int) -> bool:
        """Whether a slot's worker has a message in flight, as far as it is recorded."""
        return slot < SLOTS and ident in self._flights(slot).values()

    def _flights(self, slot: int) -> Cells:
        return Cells(self._map, 8 * (_IN_FLIGHT_AT + slot * IN_FLIGHT), IN_FLIGHT)

    def rates(self, workers: int, slot: int = SUPERVISOR) -> "Rates":
        """The rates of delivery, as seen by one of `workers` workers. `slot`: the caller's, where several processes take."""
        return Rates(self._rate_cells(0), workers, slot)

    def client_rates(self, workers: int, slot: int = SUPERVISOR) -> "Rates":
        """The rates and quotas of clients. They have a table of their own, since unauthenticated clients can use any number of
        addresses."""
        return Rates(self._rate_cells(1), workers, slot)

    def _rate_cells(self, table: int) -> Cells:
        return Cells(self._map, 8 * (_RATES_AT + table * RATE_ROW * RATE_ROWS), RATE_ROW * RATE_ROWS)

    def directory(self) -> Cells:
        """The version of the directory of mailboxes: one cell."""
        return Cells(self._map, 8 * _DIRECTORY_AT, 1)

    def named(self, slot: int = SUPERVISOR) -> "Named":
        """The counters of what is known by its name, as used by a slot's worker."""
        values = [Cells(self._map, 8 * (_NAMED_AT + NAMED * (1 + n * NAMED_CELLS)), NAMED * NAMED_CELLS) for n in range(SLOTS)]
        return Named(Cells(self._map, 8 * _NAMED_AT, NAMED), values, slot)

    def triplets(self, secret: bytes, stale: Callable[[int, int, int], bool]) -> triplets.Triplets:
        """The triplets of greylisting, with the secret of the spool. Its memory is used from the first one on."""
        return triplets.Triplets(Pairs(self._map, 8 * _TRIPLETS_AT, triplets.ROWS), secret, stale)

    def clear_limits(self, slot: int) -> None:
        """Release all units of limits that a dead worker held, and undo what it was changing in the tables. Called before its
        successor starts."""
        _clear_units(self._rows, slot)
        names = Cells(self._map, 8 * _NAMED_AT, NAMED)
        for cells, width in ((self._rows, ROW), (self._rate_cells(0), RATE_ROW), (self._rate_cells(1), RATE_ROW), (names, 1)):
            _undo_changes(cells, width, slot)


class InFlight:
    """The ids of messages that a worker has in flight, which survive its death. Cell 0 is for the one that is probed alone, the
    next PROBED are for those that are probed side by side, the others for all other messages; ids for which there is no cell are
    not recorded. How they are probed: send/recovery.py."""

    __slots__ = ("_alone", "_cells", "_free", "_free_probed", "_where")

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._alone = False  # whether one is probed alone
        self._free = list(range(cells.count - 1, PROBED, -1))
        self._free_probed = list(range(PROBED, 0, -1))
        self._where: dict[int, int] = {}

    def add(self, ident: int) -> None:
        """A delivery begins."""
        cell = self._where.get(ident, -1)
        if cell < 0:
            if not self._free:
                return
            cell = self._where[ident] = self._free.pop()
        self._cells.set(cell, ident)

    def probe(self, ident: int, alone: bool = False) -> bool:
        """A message is probed from now on: `add` will record it as such. False, and it is not to be probed now, while one is
        probed alone, there is no cell, or (`alone`) another one is probed."""
        busy = PROBED - len(self._free_probed)
        if self._alone or not self._free_probed or (alone and busy):
            return False
        self.remove(ident)
        self._alone = alone
        self._where[ident] = 0 if alone else self._free_probed.pop()
        return True

    def again(self, ident: int) -> None:
        """A delivery that had begun was no attempt: the message waits again, and is still probed if it was."""
        cell = self._where.get(ident, -1)
        if cell > PROBED:
            self.remove(ident)
        elif cell >= 0:
            self._cells.set(cell, 0)

    def remove(self, ident: int) -> None:
        """A delivery's outcome is durable, or it has ended without one."""
        cell = self._where.pop(ident, -1)
        if cell >= 0:
            self._cells.set(cell, 0)
        if cell > PROBED:
            self._free.append(cell)
        elif cell > 0:
            self._free_probed.append(cell)
        elif cell == 0:
            self._alone = False

    def take(self) -> tuple[list[tuple[int, bool]], int]:
        """(ids to probe, each with whether alone; culprit or 0) of a dead worker; its cells are cleared. The culprit is the one
        that was probed alone, or one that was probed while nothing else was in flight."""
        values = self._cells.values()
        for cell in range(self._cells.count):
            self._cells.set(cell, 0)
        probed = [ident for ident in values[1 : PROBED + 1] if ident]
        others = [ident for ident in values[PROBED + 1 :] if ident]
        culprit = values[0] or (probed[0] if len(probed) == 1 and not others else 0)
        return [(ident, True) for ident in probed if ident != culprit] + [(ident, False) for ident in others], culprit


# A row's key: the hash of its text, then who is changing the row, and how (nobody: 0). A free row's key is 0.
_WHO = (1 << 7) - 1
_FREEING, _CLAIMING = 1 << 7, 1 << 8
_CHANGING = _FREEING | _CLAIMING
_TRIES = 8  # collisions with other workers until a call does without a row


def _key(text: str) -> int:
    """A key as it is in a row's first cell, the same in every process, never 0."""
    return (xxhash.xxh3_64_intdigest(text.encode()) >> 10 | 1) << 9


class _Table:
    """Rows of `width` cells, found by a key's hash: the first cell of a row holds the key, the others its values. A key has one
    of the PROBES rows from its hash on. `idle(row)`: whether the values say that the key does without its row; such a row may be
    given to another key. `slot`: the worker that uses this object; it has one thread.

    All workers use the rows at the same time, without a lock, and any of them may be stopped or killed between two steps. What
    holds in spite of it:

    1. A value is never changed for a key that has lost the row. Who changes values does so first and reads the key afterwards
       (`holds`); if it is not the key any more, the change is undone. Who frees a row marks its key first (_FREEING), then reads
       the values, and frees the row only if they are idle, by a compare-and-swap of the mark. All of these operations are
       sequentially consistent, so either the change is seen by the one who frees, who removes the mark; or the mark (or a later
       key) is seen by the one who changes. The latter may remove the mark, and then has the row: the compare-and-swap that would
       free it fails, since only the worker in the mark can set the same mark again, and that one is at another step.
    2. A key has one row. A free row is first marked as claimed (_CLAIMING), then all rows of the key are read, then the mark is
       removed by a compare-and-swap. Of two workers that claim two rows for a key, the one that marked its row later sees the
       other's: as a row in use, and gives its own up; or as a mark, and removes it, so that the other's last step fails.
    3. A mark of a worker that died is removed by `_undo_changes`; until then, rule 1 and 2 hold as for one that is slow.
    """

    __slots__ = ("_cells", "_idle", "_known", "_rows", "_who", "_width")

    def __init__(self, cells: Cells, width: int, slot: int, idle: Callable[[int], bool]) -> None:
        self._cells = cells
        self._width = width
        self._rows = cells.count // width
        self._who = slot
        self._idle = idle
        self._known: dict[str, tuple[int, int]] = {}  # key and row

    def find(self, text: str) -> int:
        """The first cell of a key's row; -1 when it has none."""
        known = self._known.get(text)
        if known is not None and (self._cells.get(known[1]) == known[0] or self.holds(known[1], known[0])):
            return known[1]
        key = _key(text)
        return self._remember(text, key, self._search(key))

    def claim(self, text: str) -> tuple[int, int]:
        """A key, and the first cell of its row; it gets one if it has none. (key, -1) when none can be had."""
        known = self._known.get(text)
        if known is not None and (self._cells.get(known[1]) == known[0] or self.holds(known[1], known[0])):
            return known
        key = _key(text)
        return key, self._remember(text, key, self.claim_key(key))

    def claim_key(self, key: int) -> int:
        """As `claim`, of a key as it is in a row."""
        for _ in range(_TRIES):
            row = self._search(key)
            if row >= 0:
                return row
            free = self._free(key)
            if free < 0:
                return -1
            if self._take_free(free, key):
                return free
        return -1

    def holds(self, row: int, key: int) -> bool:
        """Whether the row is the key's; if it was about to be freed, it is not any more."""
        there = self._cells.get(row)
        while there != key:
            if there & ~_WHO != key | _FREEING:
                return False
            if self._cells.compare_swap(row, there, key):
                return True
            there = self._cells.get(row)
        return True

    def _remember(self, text: str, key: int, row: int) -> int:
        if row < 0:
            self._known.pop(text, None)
            return row
        if len(self._known) >= 4 * self._rows:
            self._known.clear()
        self._known[text] = (key, row)
        return row

    def _places(self, key: int) -> list[int]:
        """The first cells of the rows in which a key may be."""
        first = key >> 10
        return [(first + probe) % self._rows * self._width for probe in range(min(PROBES, self._rows))]

    def _search(self, key: int) -> int:
        for row in self._places(key):
            if self.holds(row, key):
                return row
        return -1

    def _free(self, key: int) -> int:
        """A free row for the key, if need be one that was idle; -1: there is none."""
        places = self._places(key)
        for row in places:
            if not self._cells.get(row):
                return row
        for row in places:
            if self._idle(row) and self._release(row):
                return row
        return -1

    def _release(self, row: int) -> bool:
        """Free an idle row (rule 1); False when it is in use."""
        cells, key = self._cells, self._cells.get(row)
        if not key:
            return True
        if key & _CHANGING:
            return False
        mark = key | _FREEING | self._who
        if not cells.compare_swap(row, key, mark):
            return False
        if self._idle(row):
            return cells.compare_swap(row, mark, 0)
        cells.compare_swap(row, mark, key)
        return False

    def _take_free(self, row: int, key: int) -> bool:
        """Make a free row the key's (rule 2); False when another worker was faster, here or in another row."""
        cells, mark = self._cells, key | _CLAIMING | self._who
        if not cells.compare_swap(row, 0, mark):
            return False
        for other in self._places(key):
            there = cells.get(other)
            if other == row or there >> 9 != key >> 9:
                continue
            if not (there & _CLAIMING and cells.compare_swap(other, there, 0)):
                cells.compare_swap(row, mark, 0)
                return False
        return cells.compare_swap(row, mark, key)


def _undo_changes(cells: Cells, width: int, slot: int) -> None:
    """Remove the marks of a worker that died from the rows of a table."""
    for row in range(0, cells.count, width):
        there = cells.get(row)
        if there & _CHANGING and there & _WHO == slot:
            cells.compare_swap(row, there, there & ~(_WHO | _FREEING) if there & _FREEING else 0)


def _clear_units(cells: Cells, slot: int) -> None:
    """Set a worker's cell in each row of limits to 0."""
    for row in range(0, cells.count, ROW):
        cells.set(row + 1 + slot, 0)


class Named:
    """NAMED_CELLS counters of each worker for each of NAMED names, such as those of filters. A name keeps its counters until the
    next start of the supervisor, also while no configuration has it. Only the worker of a slot writes its counters."""

    def __init__(self, names: Cells, values: list[Cells], slot: int) -> None:
        self._values = values
        self._slot = slot
        self._table = _Table(names, 1, slot, lambda row: False)

    def row(self, name: str) -> int:
        """Where the counters of a name begin, which it has from now on; -1: too many names have some."""
        _, row = self._table.claim(name)
        return row * NAMED_CELLS if row >= 0 else -1

    def own(self) -> Cells:
        """The counters of the worker of this slot, of all names."""
        return self._values[self._slot]

    def of(self, name: str) -> list[list[int]]:
        """The counters of a name, of each slot that has counted anything; empty: it has none."""
        row = self._table.find(name)
        if row < 0:
            return []
        at = row * NAMED_CELLS
        found = [cells.some(at, NAMED_CELLS) for cells in self._values]
        return [one for one in found if any(one)]


class Limits:
    """Limits that hold for all workers together. A row has one cell for each worker, which only that worker writes. To take a
    unit it adds to its own cell, sums all cells, and undoes that if the sum exceeds the limit; so a limit is never exceeded. A
    row whose cells are all 0 may be given to another key. When no row is free, a worker uses only its share of the limit (at
    least one unit)."""

    __slots__ = ("_cells", "_fallback", "_slot", "_table", "_workers", "overflows")

    def __init__(self, cells: Cells, slot: int, workers: int) -> None:
        self._cells = cells
        self._slot = slot
        self._workers = workers
        self._table = _Table(cells, ROW, slot, lambda row: cells.total(row + 1, SLOTS) == 0)
        self._fallback: dict[str, int] = {}
        self.overflows = 0

    @property
    def workers(self) -> int:
        """The number of workers that share the limits."""
        return self._workers

    def take(self, key: str, most: int) -> bool:
        """Take one of the `most` units of `key`; False when all are in use."""
        cells = self._cells
        hashed, row = self._table.claim(key)
        while row >= 0:
            mine = row + 1 + self._slot
            cells.add(mine, 1)
            ours = cells.get(row) == hashed or self._table.holds(row, hashed)
            if ours and cells.total(row + 1, SLOTS) <= most:
                return True
            cells.add(mine, -1)
            if ours:
                return False
            hashed, row = self._table.claim(key)
        self.overflows += 1
        held = self._fallback.get(key, 0)
        if held >= max(1, most // self._workers):
            return False
        self._fallback[key] = held + 1
        return True

    def give(self, key: str) -> None:
        """Give one unit back."""
        held = self._fallback.get(key, 0)
        if held:
            self._fallback[key] = held - 1
            if held == 1:
                del self._fallback[key]
            return
        row = self._table.find(key)  # it has one: a row in which a unit is held is not freed
        if (
            row >= 0 and self._cells.get(row + 1 + self._slot) > 0
        ):  # else it was cleared: this process has outlived its supervisor
            self._cells.add(row + 1 + self._slot, -1)

    def apart(self, key: str) -> bool:
        """Whether this worker has taken units of `key` for which there was no row: the others do not see them."""
        return key in self._fallback

    def wait(self, key: str, claim: int) -> None:
        """Record that this worker waits for a unit of `key`, with what priority (`claim`: 1 and up; 0: it does not wait)."""
        name = "wait " + key
        if not claim:
            row = self._table.find(name)
            if row >= 0:
                self._cells.set(row + 1 + self._slot, 0)
            return
        hashed, row = self._table.claim(name)
        if row >= 0:
            self._cells.set(row + 1 + self._slot, claim)
            if not self._table.holds(row, hashed):  # another key's now; the claim is not published, as where no row is free
                self._cells.set(row + 1 + self._slot, 0)

    def waiting(self, key: str) -> int:
        """The highest claim of the other workers that wait for a unit of `key`; 0 when none waits."""
        _, row = self._table.claim("wait " + key)  # claimed, so that it is found at once the next time
        return self._cells.highest(row + 1, SLOTS, row + 1 + self._slot) if row >= 0 else 0

    def taken(self, key: str) -> int:
        """The number of units of `key` in use, by all workers."""
        row = self._table.find(key)
        return (self._cells.total(row + 1, SLOTS) if row >= 0 else 0) + self._fallback.get(key, 0)


class Rates:
    """Rates that hold for all workers together (GCRA): for each key the time at which it is free again (microseconds of
    CLOCK_BOOTTIME), changed by compare-and-swap. A rate that has been free for RATE_IDLE_US may lose its row to another key. When
    no row is free, a worker uses only its share of the rate."""

    __slots__ = ("_cells", "_own", "_table", "overflows", "workers")

    def __init__(self, cells: Cells, workers: int, slot: int) -> None:
        self._cells = cells
        self._table = _Table(cells, RATE_ROW, slot, lambda row: cells.get(row + 1) < _now() - RATE_IDLE_US)
        self.workers = workers
        self._own: dict[str, int] = {}
        self.overflows = 0

    def take(self, key: str, per_second: float, burst: int = 1, units: int = 1) -> float:
        """Take units of a rate of `per_second`, of which up to `burst` may be taken at once. 0.0, or (nothing was taken) the
        seconds until they are available."""
        now, interval, cells = _now(), 1_000_000 / per_second, self._cells
        hashed, row = self._table.claim(key)
        while row >= 0:
            was = cells.get(row + 1)
            free, wait = _next_free(was, now, interval, burst, units)
            if wait or cells.compare_swap(row + 1, was, free):
                if self._table.holds(row, hashed):
                    return wait / 1_000_000
                if not wait:  # another key's now. If that has been taken from meanwhile, it waits a little longer than it need
                    cells.compare_swap(row + 1, free, was)
            hashed, row = self._table.claim(key)
        self.overflows += 1
        if len(self._own) > RATE_ROWS:
            self._own.clear()
        free, wait = _next_free(self._own.get(key, 0), now, interval * self.workers, burst, units)
        if not wait:
            self._own[key] = free
        return wait / 1_000_000

    def give(self, key: str, per_second: float, units: int = 1) -> None:
        """Return units that were taken at a rate of `per_second`, as far as they have not become available again meanwhile."""
        now = _now()
        back = max(1, int(units * 1_000_000 / per_second))
        row = self._table.find(key)
        if row < 0:
            free = self._own.get(key, 0)
            if free > now:
                self._own[key] = free - back * self.workers
            return
        while (was := self._cells.get(row + 1)) > now:  # so the row is not given to another key meanwhile
            if self._cells.compare_swap(row + 1, was, was - back):
                return

    def wait(self, key: str, per_second: float, burst: int = 1) -> float:
        """The seconds until a unit is available, 0.0 if one is now. Takes nothing."""
        return _next_free(self._free(key), _now(), 1_000_000 / per_second, burst)[1] / 1_000_000

    def rows(self) -> list[tuple[int, int]]:
        """(key's hash, microseconds until it is free) of the rates that are in use for longer than RATE_IDLE_US."""
        now, cells = _now(), self._cells
        found = [(cells.get(row), cells.get(row + 1) - now) for row in range(0, cells.count, RATE_ROW)]
        return [(key, left) for key, left in found if key and not key & _CLAIMING and left > RATE_IDLE_US]

    def restore(self, rows: Iterable[tuple[int, int]]) -> None:
        """Set rates as `rows()` returned them."""
        now = _now()
        for key, left in rows:
            row = self._table.claim_key((key >> 9 | 1) << 9)
            if row >= 0:
                self._cells.set(row + 1, now + left)

    def used(self, key: str, per_second: float) -> float:
        """The number of units of `key` that were taken and have not become available again."""
        return max(0, self._free(key) - _now()) * per_second / 1_000_000

    def _free(self, key: str) -> int:
        """When a key's rate is free again (microseconds)."""
        row = self._table.find(key)
        return self._cells.get(row + 1) if row >= 0 else self._own.get(key, 0)


def _now() -> int:
    """Microseconds of CLOCK_BOOTTIME."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def _next_free(free: int, now: int, interval: float, burst: int, units: int = 1) -> tuple[int, int]:
    """(when the rate is free again once `units` are taken, how long to wait until they can be taken), in microseconds. More units
    than `burst` can be taken when none is in use."""
    start = max(free, now)
    wait = start - now - int(max(0, burst - units) * interval)
    return start + max(1, int(units * interval)), max(0, wait)
