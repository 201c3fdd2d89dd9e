"""The queue's clock: what schedules and deadlines are counted in.

It starts at the later of the wall clock and the last time the shard has seen, and from there runs with CLOCK_BOOTTIME.
So it never goes back, and a wall clock that is set while we run, to the past or the future, moves no retry and expires
no message. A jump forward between two runs cannot be told from a long stop: `resumed` says from when on a message must
have been tried once before it may expire.
"""

import time

__all__ = ["QueueClock", "wall_ms"]

LONG_STOP_MS = 3_600_000


def wall_ms() -> int:
    """The wall clock, milliseconds since 1970 UTC: only for what people read."""
    return time.time_ns() // 1_000_000


def _boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class QueueClock:
    """Milliseconds that only go forward. `last_seen`: the shard's last committed time, 0 for a new shard."""

    def __init__(self, last_seen: int) -> None:
        wall = wall_ms()
        start = max(wall, last_seen)
        self._offset = start - _boot_ms()
        self.resumed = start if last_seen and start - last_seen > LONG_STOP_MS else 0

    def now(self) -> int:
        """The queue's time, ms."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 + self._offset

    def wall(self, moment: int) -> int:
        """What the wall clock (as it stands now) will show at a moment of the queue's time."""
        return wall_ms() + moment - self.now()
