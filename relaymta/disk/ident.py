"""New message ids (relaymta/ident.py)."""

import threading
from collections.abc import Callable

from relaymta.ident import SEQUENCE_BITS, SHARD_BITS, stamp_of

__all__ = ["IdSource"]


class IdSource:
    """Makes ids above `high_water` (the highest committed one), on any thread. `now()`: ms of the clock of its shard."""

    def __init__(self, shard: int, high_water: int, now: Callable[[], int]) -> None:
        self._shard = shard << SEQUENCE_BITS
        self._stamp = stamp_of(high_water)
        self._sequence = (1 << SEQUENCE_BITS) - 1  # so that the first id takes a stamp above the high-water mark's
        self._now = now
        self._lock = threading.Lock()

    def leave_behind(self, ident: int) -> None:
        """Make ids above this one from now on, which was made elsewhere."""
        with self._lock:
            if stamp_of(ident) > self._stamp:
                self._stamp, self._sequence = stamp_of(ident), (1 << SEQUENCE_BITS) - 1

    def next(self) -> int:
        """A new id: 44 bits of milliseconds, 8 of shard, 12 of sequence."""
        with self._lock:
            stamp = self._now()
            if stamp > self._stamp:
                self._stamp, self._sequence = stamp, 0
            elif self._sequence == (1 << SEQUENCE_BITS) - 1:
                self._stamp, self._sequence = self._stamp + 1, 0
            else:
                self._sequence += 1
            return self._stamp << (SHARD_BITS + SEQUENCE_BITS) | self._shard | self._sequence
