"""Segments through commits that fail: what LMDB says of them is what is on disk, and no descriptor is used after it is closed."""

import os

import pytest

from relaymta.disk.segments import COLD, FRAME, FREE_MOST, HOT, MEGABYTE, SegmentRow, Segments


class Shard:
    """Segments, and the rows of them that a commit leaves in LMDB."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.rows: dict[int, SegmentRow] = {}
        self.segments = Segments(folder, MEGABYTE)
        self.segments.load({})

    def commit(self, *sizes: int, free=(), fails: bool = False) -> list:
        segments = self.segments
        bodies = [segments.append(number, [bytes(size)], size, HOT) for number, size in enumerate(sizes)]
        segments.write()
        segments.sync()
        for body in free:
            segments.release(body)
        doomed, rows = segments.doomed(), segments.rows()
        if fails:
            segments.forget()
            return bodies
        for number in doomed:
            self.rows.pop(number, None)
        self.rows.update(rows)
        segments.unlink()
        segments.settle()
        return bodies

    def check(self) -> None:
        assert sorted(self.rows) == sorted(int(path.stem) for path in self.folder.glob("*.seg"))
        for segment in [*self.segments._free, *self.segments._segments.values()]:
            assert os.readlink(f"/proc/self/fd/{segment.fd}") == str(self.segments._path(segment.number))

    def reopen(self) -> None:
        """What a restart finds."""
        again = Segments(self.folder, MEGABYTE)
        again.load(self.rows)
        again.close()


@pytest.fixture
def shard(tmp_path):
    made = Shard(tmp_path)
    yield made
    made.segments.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_segment_that_is_emptied_and_changed_is_removed_once(shard, fails):
    """Enough are free; the active one is empty, and a group that failed has changed it; then a body does not fit into it."""
    (last, *bodies) = [shard.commit(900_000)[0] for _ in range(FREE_MOST + 4)][::-1]
    shard.commit(free=bodies)
    shard.commit()
    shard.commit(free=[last])
    shard.commit(1000, fails=fails)
    for size in (900_000, 10, 900_000, 900_000):
        (body,) = shard.commit(size)
        shard.check()
        assert shard.segments._segments[body.segment].row.live > 0
    shard.reopen()


def test_a_removal_whose_commit_failed_is_repeated(shard):
    bodies = [shard.commit(900_000)[0] for _ in range(FREE_MOST + 4)]
    shard.commit(free=bodies[:-1])
    assert shard.segments.doomed()
    shard.commit(10, fails=True)
    shard.commit(10)
    shard.check()
    assert not shard.segments.doomed()
    shard.reopen()


def test_what_was_not_written_leaves_no_gap(shard, monkeypatch):
    """A group that could not be written, behind which other bodies come: compaction reads a segment from frame to frame."""
    (first,) = shard.commit(1000)
    segments = shard.segments
    segments.append(7, [b"x" * 500], 500, HOT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "ENOSPC")))
        with pytest.raises(OSError, match="ENOSPC"):
            segments.append(8, [b"y"], 1, COLD)
    segments.forget()
    (second,) = shard.commit(2000)
    assert second.offset == first.offset + FRAME.size + first.length

    def fails(fd, buffers, offset):
        raise OSError(5, "EIO")

    segments.append(9, [b"y"], 1, COLD)
    segments.append(10, [b"x" * 500], 500, HOT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", fails)
        with pytest.raises(OSError, match="EIO"):
            segments.write()  # the cold one, which is sealed, and not the other
    segments.forget()
    (third,) = shard.commit(3000)
    assert (third.segment, third.offset) == (second.segment, second.offset + FRAME.size + second.length)
    shard.reopen()
