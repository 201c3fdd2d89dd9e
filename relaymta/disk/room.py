"""The disk under a shard: how much room is left, and the ballast."""

import os
from collections.abc import Callable
from pathlib import Path

from relaymta.disk.folders import remove_file

__all__ = ["Disk"]

BALLAST_LEAST, BALLAST_MOST = 512 << 10, 4 << 20
FLOOR_SHARE = 10  # per cent of the file system
FLOOR_MOST = 2 << 30
MAP_SHARE, MAP_MOST = 90, 95  # per cent of LMDB's map
SLOW_SHARE = 4


class Disk:
    """The room on one shard's file system and in its map. `check` alone changes what is here.

    `full`: no mail is taken. `room`: octets until then. `pressure`: 0 while there is room enough, up to 1 as the last quarter of
    a floor of room is used up. `brim`: half of the floor is used up, too: nothing is written that can be spared. `reserve`:
    octets until then, and none while the map is nearly full, for mail without which no room would come free.
    `free`: octets that the file system has for us, 0 until they are known, never after; `map_used`: the used share of the map.
    `used()`: octets of the map that are used, and its size."""

    def __init__(self, path: Path, used: Callable[[], tuple[int, int]]) -> None:
        self._path = path
        self._used = used
        self.ballast = path / "ballast"  # released by the writer when the disk is too full to record outcomes
        self.full = False
        self.room = 1 << 62
        self.pressure = 0.0
        self.brim = False
        self.reserve = 1 << 62
        self.floor = FLOOR_MOST
        self.free = 0
        self.map_used = 0.0

    def check(self) -> None:
        """Reader thread, each second: look at the file system and at the map."""
        stats = os.statvfs(self._path)
        total, free = stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail
        used, size = self._used()
        self.free, self.map_used = max(free, 1), used / size
        floor = self.floor = min(total * FLOOR_SHARE // 100, FLOOR_MOST)
        self.room = max(0, free - floor)
        slow = floor // SLOW_SHARE
        self.pressure = 1 - min(self.room, slow) / slow if slow else 0.0
        self.brim = free < floor // 2
        self.full = free < floor or used * 100 > size * MAP_SHARE
        self.reserve = max(0, free - floor // 2) if used * 100 <= size * MAP_MOST else 0
        ballast = max(BALLAST_LEAST, min(total // 64, BALLAST_MOST))
        if not self.ballast.exists() and free > 2 * floor + ballast:
            _write_ballast(self.ballast, ballast)


def _write_ballast(path: Path, size: int) -> None:
    """Reserve `size` octets of disk."""
    try:
        path.write_bytes(b"\0" * size)
    except OSError:
        remove_file(path)
