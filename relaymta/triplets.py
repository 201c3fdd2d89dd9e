"""Greylisting: when a triplet (client, sender, recipient) was first and last seen, known by all workers (no policy, no clock).

A table in memory that all processes map (shm.py). A row has 16 octets: a key, which is a hash of the triplet, and two times in
seconds (UTC), each of 32 bits. All workers use the rows at the same time, without a lock, and any of them may be stopped or
killed between two steps. What holds in spite of it, since a row is read and written as a whole (_speedups/pairs.pyx):

1. The times that are found are those that were put for this key, both by the same call. A row is free, or some key's; a worker
   that dies leaves no other state behind.
2. Times change only from those that a worker has seen (`put`): of two workers, one is told to look again.

What remains: two workers that put a new key at the same moment may put it in two rows. Only the first one is found and changed;
when that is given to another key, the times in the second are found, which are older ones of the same key. And a key can lose its
row, the one that was seen last the longest ago of those where the key that needs it can be, while no row there is free. Either
way a triplet is at worst forgotten, that is deferred once more. One that was never put is found only if its hash, of 63 bits, is
that of another one.
"""

import hashlib
import sys
from collections.abc import Callable

import xxhash

from relaymta._speedups.pairs import Pairs

__all__ = ["CELLS", "LAYOUT", "PROBES", "ROWS", "Triplets"]

ROWS = 1 << 20
CELLS = 2 * (ROWS + 1)  # 64-bit cells of the mapping: the last two are for the number of rows in use
PROBES = 16  # rows in which a key can be: two runs of 8, so that more of them are in use before one is lost
_TRIES = 8  # collisions with other workers until a call does without a row
_TIME = (1 << 32) - 1
LAYOUT = (1, ROWS, PROBES)  # the first changes with what a row means


class Triplets:
    """The table, as used by one process. `pairs`: its rows. `secret`: the spool's, so that nobody else knows which keys share a
    row. `stale(first, last, wall)`: whether a triplet with these times is of no more use at `wall`, so that it may lose its row.
    `evicted`: how many lost it without being stale, to triplets that this process has put."""

    __slots__ = ("_pairs", "_seed", "_stale", "evicted")

    def __init__(self, pairs: Pairs, secret: bytes, stale: Callable[[int, int, int], bool]) -> None:
        self._pairs = pairs
        self._seed = int.from_bytes(hashlib.blake2b(secret, digest_size=8, person=b"triplets").digest())
        self._stale = stale
        self.evicted = 0

    def key(self, *parts: str) -> int:
        """The key of a triplet, the same in every process with this secret: 1 to 2^63 - 1. Other parts have another key, also if
        they are the same when joined."""
        text = "".join([f"{len(part)}:{part}" for part in parts])
        return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), self._seed) >> 1 or 1

    def get(self, key: int) -> tuple[int, int]:
        """When a triplet was first and last seen; (0, 0): it is not known."""
        pairs = self._pairs
        for _ in range(_TRIES):
            row = pairs.find(key)
            if row < 0:
                break
            there, times = pairs.get(row)
            if there == key:
                return times >> 32 & _TIME, times & _TIME
        return 0, 0

    def put(self, key: int, was: tuple[int, int], now: tuple[int, int]) -> bool:
        """Set the times of a triplet to `now`, if they are `was` (as `get` returned it); whether they were. `now` is not (0, 0);
        its second time is the present. A new triplet gets a free row, else one that is stale, else the one whose last time is
        the oldest. False also when other workers were faster at every try. ValueError for times that have no 32 bits."""
        times = _packed(now)
        if not times:
            raise ValueError("a triplet without a time")
        row = self._pairs.find(key)
        if was != (0, 0):
            return row >= 0 and self._pairs.swap(row, key, _packed(was), key, times)
        return row < 0 and any(self._insert(key, times) for _ in range(_TRIES))

    def _insert(self, key: int, times: int) -> bool:
        row = self._pairs.free(key)
        if row >= 0:
            return self._pairs.swap(row, 0, 0, key, times)
        near, stale, wall = self._pairs.near(key), self._stale, times & _TIME
        for last, first, row, other in near:
            if not other or stale(first, last, wall):
                return self._pairs.swap(row, other, _packed((first, last)), key, times)
        last, first, row, other = min(near)
        done = self._pairs.swap(row, other, _packed((first, last)), key, times)
        self.evicted += done
        return done

    def rows_used(self) -> int:
        """How many rows have a triplet, also a stale one. Workers that were killed may have left it wrong by one each."""
        return self._pairs.used()

    def dump(self) -> bytes:
        """All triplets, for `restore`: 8 octets, and 16 for each. It may run on a thread: most of it is done without the GIL."""
        return self._mark() + self._pairs.dump()

    def restore(self, octets: bytes) -> None:
        """Put the triplets that `dump` returned. One that is known keeps its times; of those that have no room the ones that were
        seen last stay. Octets of another secret or kind of machine, or of anything else, change nothing."""
        mark = self._mark()
        if octets.startswith(mark) and len(octets) % 16 == len(mark):
            self._pairs.load(octets, len(mark))

    def _mark(self) -> bytes:
        """What octets begin with that this secret and this order of octets were used for."""
        return self.key().to_bytes(8, sys.byteorder)


def _packed(times: tuple[int, int]) -> int:
    """Two times as one signed number of 64 bits."""
    first, last = times
    if not (0 <= first <= _TIME and 0 <= last <= _TIME):
        raise ValueError(f"times that have no 32 bits: {first} {last}")
    both = first << 32 | last
    return both - (1 << 64) if both >> 63 else both
