"""What room a disk has left."""

import os
from types import SimpleNamespace

import pytest

from relaymta.disk.room import Disk

FLOOR = 100 * 4096


@pytest.mark.parametrize(
    ("free", "used", "full", "room", "reserve", "brim"),
    [
        (500, 0, False, 400, 450, False),
        (100, 0, False, 0, 50, False),
        (99, 0, True, 0, 49, False),
        (50, 0, True, 0, 0, False),
        (49, 0, True, 0, 0, True),
        (500, 91, True, 400, 450, False),
        (500, 95, True, 400, 450, False),
        (500, 96, True, 400, 0, False),
    ],
)
def test_the_reserve_is_what_is_left_between_full_and_brim(tmp_path, monkeypatch, free, used, full, room, reserve, brim):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=4096, f_blocks=1000, f_bavail=free))
    disk = Disk(tmp_path, lambda: (used, 100))
    disk.check()
    assert (disk.floor, disk.full, disk.brim) == (FLOOR, full, brim)
    assert (disk.room, disk.reserve) == (room * 4096, reserve * 4096)
