"""Segments through commits that fail: what LMDB says of them is what is on disk, and no descriptor is used after it is closed."""

import os

import pytest

from relaymta.disk.segments import COLD, FRAME, FREE_MOST, HOT, MEGABYTE, SegmentRow, Segments
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.store.reading import Files


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


@pytest.mark.parametrize("of_owner", [True, False])
def test_bodies_that_are_read_together_are_those_that_are_read_alone(shard, of_owner, monkeypatch):
    """Whatever their order, and what lies between; None where one alone cannot be read."""
    bodies = shard.commit(10, 0, 300_000, 400_000, 5, 5000, 7) + shard.commit(20, 900_000, 30)
    idents = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    shard.commit(free=[bodies[7]])
    segments = shard.segments
    reader = segments if of_owner else Files(shard.folder)

    def read(chosen: list[int]) -> list[bytes | None]:
        places = [(body.segment, body.generation, body.offset, body.length) for body in (bodies[one] for one in chosen)]
        return reader.read_many([idents[one] for one in chosen], places)

    def alone(chosen: list[int]) -> list[bytes | None]:
        found = []
        for one in chosen:
            try:
                found.append(reader.read(idents[one], bodies[one]))
            except StoreError:
                found.append(None)
        return found

    orders = [[], [3], [*range(10)], [*range(9, -1, -1)], [0, 0, 2, 4, 6], [1, 5, 6, 8, 9, 0]]
    assert len({body.segment for body in bodies}) > 1
    assert [read(order) for order in orders] == [alone(order) for order in orders]
    assert None not in read([*range(7)]) and [len(one) for one in read([4, 5])] == [5, 5000]
    path = segments._path(bodies[5].segment)
    octets = bytearray(path.read_bytes())
    for at in (0, 5, 9, 17, 25, FRAME.size, FRAME.size + 4999):  # all of the frame, and the data
        octets[bodies[5].offset + at] ^= 1
        path.write_bytes(octets)
        assert read([4, 5, 6]) == alone([4, 5, 6]) == [bytes(5), None, bytes(7)]
        octets[bodies[5].offset + at] ^= 1
    path.write_bytes(octets[: bodies[6].offset + FRAME.size + 6])
    assert read([6]) == alone([6]) == [None]
    bodies[0] = Body(999, 1, 0, 10)
    assert read([0, 1]) == alone([0, 1]) == [None, b""]
    for order in orders:
        monkeypatch.setattr("relaymta.disk.segments.RUN", 1)
        assert read(order) == alone(order)
