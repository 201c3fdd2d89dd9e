"""Compaction: the disk used stays within its bound in whatever order mail leaves; no body is lost or taken for another."""

import asyncio
import random
import threading

import pytest

from relaymta.disk import compact
from relaymta.disk.operations import Move
from relaymta.errors import StoreError
from relaymta.proto.envelope import TRANSIENT, Attempt, Body
from relaymta.queue import Entry, lifecycle, wall_ms
from tests.queue.test_queue import Bench, answer, until

SIZE = 20_000  # octets of a body: about fifty fill a segment of 1 MB
WINDOW = 2_000


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Few spare segments, and segments of 1 MB on file systems of every size."""
    monkeypatch.setattr("relaymta.queue.segment_size_for", lambda path: 1 << 20)
    monkeypatch.setattr(compact, "SPARE", 3)


def data_of(number: int) -> bytes:
    return b"Subject: %d\r\n\r\n" % number + random.Random(number).randbytes(SIZE // 2).hex().encode() + b"\r\n"


def within_bound(bench: Bench) -> bool:
    octets, live, _ = bench.queue.segments.usage()
    return octets <= 2 * live + 16 * bench.queue.segments.size


async def fill(bench: Bench, count: int) -> dict[int, bytes]:
    bodies = [data_of(number) for number in range(count)]
    idents = await asyncio.gather(*(bench.put(data) for data in bodies))
    return dict(zip(idents, bodies, strict=True))


async def read(bench: Bench, entries: list[Entry]) -> list:
    """Their message data, one by one: the window has no room for any."""
    return [(await bench.queue.read([entry]))[0] for entry in entries]


async def check(bench: Bench, messages: dict[int, bytes]) -> None:
    for ident, data in messages.items():
        assert b"".join([piece async for piece in bench.queue.raw(ident)]) == data


async def test_random_deletes_give_space_back_and_harm_nobody(tmp_path):
    async with Bench(tmp_path, window=2) as bench:  # they wait on disk
        messages = await fill(bench, 1000)
        octets = bench.queue.segments.usage()[0]
        assert octets >= 20 << 20
        gone = random.Random(1).sample(sorted(messages), 900)
        for start in range(0, 900, 300):
            await bench.queue.change_messages("delete", gone[start : start + 300])
        for ident in gone:
            messages.pop(ident, None)
        left = bench.queue.segments
        await until(lambda: left.usage()[0] <= 2 * left.usage()[1] + 12 * left.size)
        kept = {ident: data for ident, data in messages.items() if await bench.queue.message(ident)}
        assert len(kept) >= 98, "all but those in flight, which are not deleted"
        await check(bench, kept)
    async with Bench(tmp_path, window=2) as bench:
        await check(bench, kept)
        assert within_bound(bench)


async def test_entries_in_memory_follow_their_bodies(tmp_path):
    """Entries in flight are ended, deferred and read where their bodies are now, not where they were."""
    async with Bench(tmp_path, window=WINDOW, window_bytes=0, first_retry_ms=10) as bench:
        messages = await fill(bench, 800)
        entries = await bench.next(800)
        places = {entry.ident: entry.envelope.body for entry in entries}
        random.Random(2).shuffle(entries)
        for entry in entries[:700]:
            bench.queue.finish(entry, None)
            messages.pop(entry.ident)
        moved = entries[700:]
        await until(lambda: sum(e.envelope.body != places[e.ident] for e in moved) > 50)
        await until(lambda: not bench.queue.compactor._busy and within_bound(bench))
        for entry, data in zip(moved, await read(bench, moved), strict=True):
            assert data == [messages[entry.ident]]
        again = Attempt(wall_ms(), TRANSIENT, "rcpt", "mx", 450, "4.2.0", "later")
        for entry in moved[:50]:
            bench.queue.finish(entry, {0: again})
        for entry in moved[50:]:
            bench.queue.finish(entry, None)
        for entry, data in zip(back := await bench.next(50), await read(bench, back), strict=True):
            assert data == [messages[entry.ident]]
            bench.queue.finish(entry, None)
        await bench.empty()


async def test_what_ends_or_moves_while_its_copy_is_under_way_is_neither_lost_nor_kept_twice(tmp_path):
    """Outcomes race with the copies: each message ends once, and finally no octet is counted as live."""
    chance = random.Random(3)
    async with Bench(tmp_path, window=WINDOW, window_bytes=0, first_retry_ms=5) as bench:
        compactor = bench.queue.compactor
        await fill(bench, 600)
        entries = await bench.next(600)
        chance.shuffle(entries)
        later = Attempt(wall_ms(), TRANSIENT, "rcpt", "mx", 450, "4.2.0", "later")
        ended = 0
        while ended < 600:
            for entry in entries:
                if chance.random() < 0.3:
                    bench.queue.finish(entry, {0: later})
                else:
                    bench.queue.finish(entry, None)
                    ended += 1
                if chance.random() < 0.1:
                    await asyncio.sleep(0)
                    compactor.tick()
            if ended < 600:
                entries = await bench.next(1)
                entries += await bench.next(len(bench.offered))
        await bench.empty()


async def move(bench: Bench, ident: int, times: int = 1) -> list[Move]:
    """Copies of a message's body, as the compactor makes them, in one group commit."""
    with bench.queue.store.env.begin() as txn:
        body = bench.queue.store.envelope(txn, ident).body
    done: list[Move] = []
    for _ in range(times):
        bench.queue.writer.submit(Move(ident, body, bench.queue.segments.read(ident, body), done.append))
    await until(lambda: len(done) == times)
    return done


async def test_a_copy_that_comes_too_late_is_dropped(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        live = bench.queue.segments.usage()[1]
        first, second = await move(bench, entry.ident, 2)
        assert first.body == entry.envelope.body and second.body is None
        assert bench.queue.segments.usage()[1] == live
        bench.queue.finish(entry, None)
        (late,) = await move(bench, entry.ident)
        assert late.body is None
        assert bench.queue.segments.usage()[1] == 0


async def test_a_row_read_before_its_body_moved_is_offered_with_the_new_place(tmp_path):
    async with Bench(tmp_path, window=2) as bench:
        await bench.put()
        waiting = await bench.put()  # one in memory, this one on disk only
        schedule, read, go = bench.queue.schedule, threading.Event(), threading.Event()
        scan = schedule._scan

        def slow_scan(*args):
            found = scan(*args)
            read.set()
            go.wait(60)
            return found

        schedule._scan = slow_scan
        schedule.wake()
        await until(read.is_set)
        (moved,) = await move(bench, waiting)
        go.set()
        _, second = await bench.next(2)
        assert second.ident == waiting and second.envelope.body == moved.body


async def test_a_row_read_after_its_body_moved_again_is_offered_with_the_newest_place(tmp_path):
    """Ended with the older place, the message would free octets that another body may own by then."""
    async with Bench(tmp_path) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        mark = bench.queue.entries.begin_reading()  # a long read, which began before everything that follows
        assert (await move(bench, ident))[0].body is not None
        bench.queue.finish(entry, {0: answer(TRANSIENT)}, 1)  # the first deferral moves it to a cold segment
        (again,) = await bench.next()
        with bench.queue.store.env.begin() as txn:
            assert again.envelope.body == bench.queue.store.envelope(txn, ident).body
        bench.queue.entries.end_reading(mark)


async def test_what_moved_is_forgotten_although_reads_overlap_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lifecycle, "KEPT_LEFT", 10)
    entries = lifecycle.Lifecycle(lambda entry: None, lambda entry, error: None, 100, 1000)
    mark = entries.begin_reading()
    for ident in range(1, 100):
        entries.moved(ident, [1], Body(1, 1, ident, 1))
        following = entries.begin_reading()
        entries.end_reading(mark)
        mark = following
    assert len(entries._moved) <= 11


async def test_a_damaged_frame_does_not_move_and_does_not_stop_the_others(tmp_path):
    async with Bench(tmp_path, window=2) as bench:
        messages = await fill(bench, 600)
        bodies = {}
        with bench.queue.store.env.begin() as txn:
            for ident, envelope in bench.queue.store.idents(txn, 0, bench.queue.store.fresh.live()):
                bodies[ident] = envelope.body
        first = min(body.segment for body in bodies.values())
        keep = [ident for ident in sorted(messages) if bodies[ident].segment == first][10:14]
        with (tmp_path / "shard-0/bodies" / f"{first:08d}.seg").open("r+b") as file:
            file.seek(bodies[keep[0]].offset + 100)
            file.write(b"\0")
        gone = [ident for ident in messages if ident not in keep]
        await bench.queue.change_messages("delete", gone[:300])
        await bench.queue.change_messages("delete", gone[300:])
        await until(lambda: bool(bench.queue.compactor._given_up))
        await until(lambda: not bench.queue.compactor._busy)
        for ident in keep[1:]:
            assert b"".join([piece async for piece in bench.queue.raw(ident)]) == messages[ident]
            assert (await bench.queue.message(ident))["state"] == "queued"
        with pytest.raises(StoreError):
            b"".join([piece async for piece in bench.queue.raw(keep[0])])


@pytest.mark.parametrize("inlined", [True, False])
async def test_a_body_that_moves_in_the_group_in_which_its_message_ends_is_freed_once(tmp_path, inlined):
    """The copy is dropped, and no row of the message comes back."""
    async with Bench(tmp_path) as bench:
        data = data_of(1)
        ident = await bench.put(data)
        (entry,) = await bench.next()
        if not inlined:
            await bench.queue.task(lambda change: change.materialize(ident))
        moved = asyncio.get_running_loop().create_future()
        bench.queue.finish(entry, None)
        bench.queue.writer.submit(Move(ident, entry.envelope.body, data, moved.set_result))
        assert (await moved).body is None
        await until(lambda: len(bench.queue.entries) == 0)
        assert bench.queue.segments.usage()[1] == 0
        assert await bench.queue.message(ident) is None
