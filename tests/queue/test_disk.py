"""What is left on the disk: no large body without a message, no map that stays full, no segment without a use."""

import asyncio
import os

import lmdb
import pytest

from relaymta.disk import room
from relaymta.disk.segments import MEGABYTE, Segments
from relaymta.errors import StoreError
from relaymta.proto.envelope import PERMANENT, Envelope
from relaymta.queue import BigBody, wall_ms, writer
from relaymta.queue.change import Change
from relaymta.queue.store import Store
from tests.queue.test_one_end import Watched
from tests.queue.test_queue import Bench, answer, until

SIZE = 2_000_000


class Large(Watched):
    def receive(self):
        """A large message as a thread of the intake receives it."""
        file = self.queue.big_body(self.queue.ident())
        file.write([b"x" * SIZE])
        return file

    def give(self, file) -> "asyncio.Future":
        """Submit it; the result for its client."""
        done = asyncio.get_running_loop().create_future()
        envelope = Envelope("a@b", ["c@d"], SIZE, 0, wall_ms(), self.queue.deadline())
        self.queue.submit(file.ident, envelope, file.finish([]), done.set_result)
        return done

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "shard-0/bodies/big").iterdir())


def fails(change, now) -> None:
    raise StoreError("disk full")


async def test_a_large_message_that_could_not_be_stored_leaves_no_file(tmp_path, monkeypatch):
    async with Large(tmp_path) as bench:
        file = bench.receive()
        monkeypatch.setattr(Change, "finish", fails)
        assert isinstance(await bench.give(file), StoreError)
        assert bench.files == []
        file.discard()  # as the intake does
        monkeypatch.undo()


async def test_a_receiver_that_gives_up_after_it_submitted_takes_no_file(tmp_path):
    async with Large(tmp_path) as bench:
        file = bench.receive()
        done = bench.give(file)
        file.discard()
        assert await done is None
        assert len(b"".join([piece async for piece in bench.queue.raw(file.ident)])) == SIZE


async def test_a_large_body_that_could_not_be_finished_leaves_no_file(tmp_path, monkeypatch):
    async with Large(tmp_path) as bench:
        file = bench.receive()
        monkeypatch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(28, "ENOSPC")))
        with pytest.raises(OSError, match="ENOSPC"):
            file.finish([])
        assert bench.files == []
        monkeypatch.undo()


async def test_a_file_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch):
    """It is left until the next start: a failed unlink must not end the thread that commits."""
    async with Large(tmp_path) as bench:
        assert await bench.give(bench.receive()) is None
        (entry,) = await bench.next()
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "EROFS")))
            bench.queue.finish(entry, None)
            await until(lambda: len(bench.events.outcomes) == 1)
            patched.setattr(Change, "finish", fails)
            assert isinstance(await bench.give(bench.receive()), StoreError)
        await bench.put()
        assert len(bench.files) == 2
    async with Large(tmp_path) as bench:
        assert bench.files == []


@pytest.mark.parametrize("front", [b"", b"Received: x\r\n" * 1000])
def test_a_large_body_whose_front_is_written_in_parts_is_whole(tmp_path, monkeypatch, front):
    """As a nearly full disk takes it."""
    pwritev, pwrite = os.pwritev, os.pwrite
    segments = Segments(tmp_path, MEGABYTE)
    file = BigBody(segments.big_path(1), 1, room=16384)
    file.write([b"x" * SIZE])
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", lambda fd, parts, at: pwritev(fd, [b"".join(parts)[:20]], at))
        patched.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:4096], at))
        body = file.finish([front])
    assert segments.read(1, body) == front + b"x" * SIZE
    segments.close()


async def test_a_sweep_removes_what_nobody_will_commit_and_nothing_else(tmp_path, monkeypatch):
    async with Large(tmp_path) as bench:
        queue, sweep = bench.queue, bench.queue._big.sweep
        stored, waits, received, abandoned = (bench.receive() for _ in range(4))
        assert await bench.give(stored) is None
        abandoned.finish([])
        names = [f"{file.ident:016x}" for file in (stored, waits, received, abandoned)]
        del abandoned  # its connection was lost between the last octet and its submission
        with monkeypatch.context() as patched:
            patched.setattr(queue.writer, "_hand_over", lambda: None)  # its group has not begun
            done = bench.give(waits)
            del waits
            try:
                await queue._readers.run(sweep)
                assert bench.files == sorted(names), "not what was written to a moment ago"
                await queue._readers.run(sweep, -60)
                assert bench.files == sorted(names[:3])
            finally:
                patched.undo()
                queue.writer._hand_over()
        assert await done is None
        await queue._readers.run(sweep, -60)
        assert bench.files == sorted(names[:3])
        del received
        await queue._readers.run(sweep, -60)
        assert bench.files == sorted(names[:2])


def test_an_abandoned_receiver_leaves_no_descriptor(tmp_path):
    file = BigBody(tmp_path / "1", 1)
    descriptor = file._fd
    assert os.path.exists(f"/proc/self/fd/{descriptor}")
    del file
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")


async def test_a_large_dsn_whose_outcome_is_refused_leaves_no_file(tmp_path):
    async with Large(tmp_path) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        queue = bench.queue
        await queue.task(lambda change: change.materialize(ident))

        def lose(change: Change) -> None:
            change.txn.delete(b"q" + entry.queue.to_bytes(4, "big"), db=queue.store.tables["queue"])
            queue.store.forget({entry.queue})

        await queue.task(lose)
        queue.segments.big_limit = 200
        queue.finish(entry, {0: answer(PERMANENT)})
        await until(lambda: bench.events.refusals)
        assert bench.files == []


# The map


async def test_a_map_that_was_full_is_not_when_its_mail_has_left(tmp_path, monkeypatch):
    async with Bench(tmp_path, window=2) as bench:
        queue = bench.queue
        empty, _ = queue.store.used()
        idents = await asyncio.gather(*(bench.put(to=(f"{'x' * 200}@d.example",)) for _ in range(2000)))
        used, size = queue.store.used()
        assert used - empty > 2000 * 200
        monkeypatch.setattr(room, "MAP_SHARE", used * 50 / size)
        await queue._readers.run(queue.disk.check)
        assert queue.full
        for start in range(0, 2000, 500):
            await queue.change_messages("delete", idents[start : start + 500])
        for entry in bench.offered:
            if entry.waiting:
                queue.finish(entry, None)
        await bench.empty()
        await queue._readers.run(queue.disk.check)
        assert not queue.full
        assert queue.store.env.info()["last_pgno"] * 4096 > used // 2, "the file does not shrink"


def test_a_sealed_segment_that_was_empty_at_the_start_is_removed(tmp_path):
    segments = Segments(tmp_path, MEGABYTE)
    segments.load({})
    segments.append(1, [b"x"], 1, 0)
    segments._seal(segments._segments[1])
    rows = dict(segments.rows())
    rows[1].live = rows[1].live_bytes = 0
    segments.close()
    again = Segments(tmp_path, MEGABYTE)
    again.load(rows)
    assert again.doomed() == [1]
    again.unlink()
    assert list(tmp_path.glob("*.seg")) == []
    again.close()


async def test_a_failed_commit_without_outcomes_does_not_leave_the_store_stalled(tmp_path, monkeypatch):
    """Nothing would end that: delivery pauses and mail is rejected while it is stalled."""
    async with Watched(tmp_path) as bench:
        reopen, times = Store.reopen, []

        def finish(change, now) -> None:
            monkeypatch.undo()
            monkeypatch.setattr(Store, "reopen", fails_once)
            raise lmdb.DiskError("EIO")

        def fails_once(store) -> None:
            times.append(1)
            if len(times) == 1:
                raise lmdb.DiskError("EIO")
            reopen(store)

        monkeypatch.setattr(Change, "finish", finish)
        with pytest.raises(StoreError):
            await bench.queue.task(lambda change: change.set_meta(b"x", 1))
        assert len(times) == 2
        assert not bench.queue.stalled


async def test_outcomes_are_tried_again_also_where_the_ballast_cannot_be_removed(tmp_path, monkeypatch):
    """The thread that commits must not end by it, nor its worker."""
    async with Watched(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        ballast = tmp_path / "shard-0" / "ballast"
        ballast.unlink(missing_ok=True)
        ballast.mkdir()
        monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
        finish, failures = Change.finish, []

        def fails_for_a_while(change, now) -> None:
            if len(failures) < 4:
                failures.append(1)
                raise lmdb.DiskError("EIO")
            finish(change, now)

        monkeypatch.setattr(Change, "finish", fails_for_a_while)
        bench.queue.finish(entry, {0: answer(PERMANENT)})
        await until(lambda: len(bench.events.outcomes) == 1)
        assert len(failures) == 4 and not bench.queue.stalled


async def test_a_dsn_that_cannot_be_written_for_long_takes_no_file_and_no_descriptor_each_time(tmp_path, monkeypatch):
    """The outcome is tried again until it is committed; each time that its DSN could not be written seals a segment."""
    async with Watched(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        segments, tries = bench.queue.segments, []
        monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
        monkeypatch.setattr(writer, "RETRY_MOST", 0.001)

        def full(fd, buffers, offset) -> int:
            tries.append(fd)
            if len(tries) < 50:
                raise OSError(28, "ENOSPC")
            return pwritev(fd, buffers, offset)

        pwritev = os.pwritev
        monkeypatch.setattr(os, "pwritev", full)
        bench.queue.finish(entry, {0: answer(PERMANENT)})
        await until(lambda: len(tries) > 40)
        found = len(segments._segments), len(list((tmp_path / "shard-0/bodies").glob("*.seg")))
        await until(lambda: len(bench.events.outcomes) == 1)
        assert max(found) < 10
