"""A shard's clock, by which due times and deadlines are measured (docs say "the queue's clock" for the queue's).

It starts at the later of the wall clock and the last committed time of the shard, and then follows CLOCK_BOOTTIME. So it never
goes back, and setting the wall clock while a worker runs neither moves a retry nor expires a message. A clock that was set
forward between two runs looks like a long stop: from `resumed` on, a message must be tried once before it may expire.
"""

import time

__all__ = ["ShardClock", "wall_ms"]

LONG_STOP_MS = 3_600_000


def wall_ms() -> int:
    """The wall clock, milliseconds since 1970 UTC: only for display, logs and `Date`."""
    return time.time_ns() // 1_000_000


def _boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class ShardClock:
    """Milliseconds that never go back. `last_seen`: the shard's last committed time, 0 for a new shard."""

    def __init__(self, last_seen: int) -> None:
        wall = wall_ms()
        start = max(wall, last_seen)
        self._offset = start - _boot_ms()
        self.resumed = start if last_seen and start - last_seen > LONG_STOP_MS else 0

    def now(self) -> int:
        """The time, ms."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 + self._offset

    def wall(self, moment: int) -> int:
        """The wall clock time (ms, by its present setting) of a time of this clock."""
        return wall_ms() + moment - self.now()
