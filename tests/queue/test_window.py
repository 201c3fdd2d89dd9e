"""The window: its budget for message data, fair scans, and what becomes of an entry when its deliverer or the disk fails."""

import asyncio
import threading
from types import SimpleNamespace

import lmdb
import pytest

from relaymta.errors import StoreError
from relaymta.proto.envelope import PERMANENT, TRANSIENT, QueueName
from relaymta.queue import Entry, Null, Queue, QueueSettings, schedule
from relaymta.queue.change import Change
from tests.queue.test_one_end import Watched
from tests.queue.test_queue import Bench, answer, until

BODY = b"Subject: x\r\n\r\n" + b"y" * 986  # 1,000 octets


def held(queue: Queue) -> int:
    """The octets of message data that entries hold in memory."""
    return sum(len(b"".join(entry.data)) for entry in queue.entries._entries.values() if entry.data is not None)


# The budget for message data


async def test_a_backlog_that_was_read_from_disk_leaves_the_budget_as_it_was(tmp_path):
    async with Bench(tmp_path, window=10, window_bytes=4_000) as bench:
        idents = {await bench.put(BODY) for _ in range(40)}
        while idents:
            (entry,) = await bench.next()
            (data,) = await bench.queue.read([entry])
            assert data == [BODY] == entry.data
            assert held(bench.queue) == bench.queue.entries.octets
            bench.queue.finish(entry, None)
            idents.discard(entry.ident)
        await bench.empty()
        assert bench.queue.entries.octets == 0 and not bench.queue.entries.crowded
        for _ in range(5):
            await bench.put(BODY)
        assert held(bench.queue) == bench.queue.entries.octets == 4_000
        assert bench.queue.delay(0.05) == 0.05


async def test_what_is_read_for_delivery_is_counted_and_bounded_and_goes_on(tmp_path):
    async with Bench(tmp_path, window=100, window_bytes=4_000) as bench:
        bench.queue.entries.keep_data(False)
        for _ in range(12):
            await bench.put(BODY)
        entries = await bench.next(12)
        found = await bench.queue.read(entries)
        assert [data is not None for data in found] == [True] * 3 + [False] * 9, "up to half, and the one that exceeds it"
        assert bench.queue.entries.crowded and held(bench.queue) == bench.queue.entries.octets == 3_000
        assert await bench.queue.read(entries[5:]) == [[BODY], *[None] * 6], "never nothing, or delivery would stop"
        for entry in entries[:3]:
            bench.queue.put_back(entry)
        assert bench.queue.entries.octets == 1_000


@pytest.mark.parametrize("how", ["gone", "damaged", "cancelled"])
async def test_data_that_is_not_used_holds_no_octets(tmp_path, how):
    async with Bench(tmp_path, window_bytes=4_000) as bench:
        bench.queue.entries.keep_data(False)
        await bench.put(BODY)
        (entry,) = await bench.next()
        go, read = threading.Event(), bench.queue.segments.read

        def slowly(ident, body) -> bytes:
            assert go.wait(10)
            if how == "damaged":
                raise StoreError("damaged")
            return read(ident, body)

        bench.queue.segments.read = slowly
        reading = asyncio.ensure_future(bench.queue.read([entry]))
        await until(lambda: bench.queue.entries.octets == 1_000)
        if how == "gone":
            bench.queue.put_back(entry)
        if how == "cancelled":
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        go.set()
        if how != "cancelled":
            await reading
        assert bench.queue.entries.octets == 0 and entry.data is None


async def test_new_settings_apply_to_what_comes_from_now_on(tmp_path):
    async with Bench(tmp_path, window=100, window_bytes=100_000, first_retry_ms=60_000, max_age_ms=3_600_000) as bench:
        queue, before = bench.queue, bench.queue.deadline()
        for _ in range(4):
            await bench.put(BODY)
        queue.reconfigure(QueueSettings("relay.example", 7_200_000, 1_000, 8, 4_000))
        assert queue.deadline() >= before + 3_600_000 and queue.entries.crowded
        await bench.put(BODY)
        assert queue.entries.fresh == 4, "the fresh half is full"
        first, *others = await bench.next(4)
        queue.finish(first, {0: answer(TRANSIENT)})
        await until(lambda: bench.events.outcomes)
        assert bench.events.outcomes[0].retry_at < queue.clock.now() + 2_000
        queue.finish(others[0], {0: answer(PERMANENT)})
        await until(lambda: len(bench.events.outcomes) == 2)
        assert bench.events.outcomes[1].dsn.envelope.deadline >= before + 3_600_000


# Scans


async def test_queues_whose_mail_is_in_flight_starve_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "SCAN_QUEUES", 3)
    async with Bench(tmp_path, window=100) as bench:
        idents = [await bench.put(to=(f"a@d{number}.example",)) for number in range(10)]
        await bench.next(10)
        await bench.queue.task(lambda change: change.materialize(*idents))
        others = {await bench.put(to=(f"a@other{number}.example",)) for number in range(5)}
        for entry in await bench.next(5):
            bench.queue.put_back(entry)
        again = await bench.next(5)
        assert {entry.ident for entry in again} == others


async def test_more_queues_than_the_window_has_room_for_take_turns(tmp_path):
    async with Bench(tmp_path, window=8) as bench:
        bench.queue.entries.paused = True
        idents = {await bench.put(to=(f"a@d{number}.example",)) for number in range(30)}
        bench.queue.entries.paused = False
        bench.queue.schedule.wake()
        seen = set()
        for _ in range(300):  # what was offered is put back, and due again at once
            (entry,) = await bench.next()
            seen.add(entry.ident)
            bench.queue.put_back(entry)
            if seen == idents:
                break
        assert seen == idents


async def test_what_becomes_due_behind_a_pass_is_found_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "SCAN_QUEUES", 2)
    async with Bench(tmp_path, first_retry_ms=1) as bench:
        for number in range(9):
            await bench.put(to=(f"a@d{number}.example",))
        tried: dict[int, int] = {}
        while sum(tried.values()) < 36:
            for entry in await bench.next():
                tried[entry.ident] = tried.get(entry.ident, 0) + 1
                bench.queue.finish(entry, {0: answer(TRANSIENT)} if tried[entry.ident] < 4 else None)
        assert set(tried.values()) == {4}
        await bench.empty()


async def test_what_is_put_back_behind_a_pass_is_found_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "SCAN_QUEUES", 2)
    async with Bench(tmp_path) as bench:
        idents = [await bench.put(to=(f"a@d{number}.example",)) for number in range(6)]
        await bench.queue.task(lambda change: change.materialize(*idents))
        entries, again = list(bench.offered), []

        def offer(entry: Entry) -> None:
            again.append(entry)
            if len(again) == 1:
                bench.queue.put_back(entry)

        bench.queue.entries._offer = offer
        for entry in entries:
            bench.queue.put_back(entry)
        await until(lambda: len(again) == 7)
        assert len({entry.ident for entry in again}) == 6


async def test_a_null_deliverer_puts_everything_back_and_lets_it_sleep(tmp_path):
    async with Bench(tmp_path) as bench:
        nobody = Null()
        nobody.queue = bench.queue
        bench.queue.entries._offer = nobody.offer
        await bench.put()
        await until(lambda: [row["parked"] for row in bench.summary()] == [True])
        assert len(bench.queue.entries) == 0 and not nobody.awake(QueueName("mx", "d.example"))


# Failures


async def test_messages_whose_change_the_disk_refused_are_not_offered_again_at_once(tmp_path, monkeypatch):
    """A hold policy holds each message that it is offered. While the disk refuses that, the message must not go round as fast as
    scans do; but an operator may change it."""
    monkeypatch.setattr("relaymta.queue.changes.REST_LEAST", 3600)
    monkeypatch.setattr("relaymta.queue.changes.REST_MOST", 3600)
    finish, offered, changes = Change.finish, [], []
    async with Watched(tmp_path) as bench:

        def offer(entry: Entry) -> None:
            offered.append(entry.ident)
            bench.queue.put_back(entry)
            changes.append(asyncio.ensure_future(bench.queue.change_messages("policy", [entry.ident])))

        async def scan() -> None:
            for _ in range(10):
                bench.queue.schedule.wake()
                bench.queue.schedule._last_scan = 0
                bench.queue.schedule.tick()
                await asyncio.sleep(0.01)

        ident, other = [await bench.put(), await bench.put()]
        await bench.queue.task(lambda change: change.materialize(ident, other))
        bench.queue.entries._offer = offer
        monkeypatch.setattr(Change, "finish", lambda change, now: (_ for _ in ()).throw(StoreError("disk full")))
        for entry in list(bench.offered):
            offer(entry)
        await until(lambda: len(bench.queue.entries._resting) == 2 and not bench.queue._changes._tasks)
        before = len(offered)
        await scan()
        assert len(offered) == before
        monkeypatch.setattr(Change, "finish", finish)
        assert await bench.queue.change_messages("delete", [other]) == (1, 0)
        await scan()
        assert len(offered) == before
        bench.queue._changes._wake({ident})
        await until(lambda: [row["held"] for row in bench.summary()] == [1])
        await asyncio.gather(*changes, return_exceptions=True)


async def test_the_pause_after_changes_that_the_disk_refuses_becomes_longer(tmp_path, monkeypatch):
    pauses: list[float] = []
    async with Watched(tmp_path) as bench:
        ident = await bench.put()
        task, finish = asyncio.get_running_loop().create_task, Change.finish
        bench.queue._changes._loop = SimpleNamespace(call_later=lambda pause, *what: pauses.append(pause), create_task=task)

        def fails(change, now) -> None:
            raise StoreError("disk full")

        for refused in (*[True] * 8, False, True):
            monkeypatch.setattr(Change, "finish", fails if refused else finish)
            (result,) = await asyncio.gather(bench.queue.change_messages("hold", [ident]), return_exceptions=True)
            assert isinstance(result, StoreError) == refused
        monkeypatch.setattr(Change, "finish", finish)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 1]


async def test_one_reply_that_raises_takes_no_other(tmp_path):
    async with Watched(tmp_path) as bench:
        queue = bench.queue

        def raises(*what) -> None:
            raise ValueError("the client is gone")

        (first, one), (second, two) = bench.submit(), bench.submit()
        queue.writer._pending[0].done = raises
        await two
        await until(lambda: len(bench.offered) == 2)
        assert not one.done() and [entry.ident for entry in bench.offered] == [first, second]
        events = bench.events
        events.ended = raises
        for entry in await bench.next(2):
            queue.finish(entry, None)
        await until(lambda: len(queue.entries) == 0)
        del events.ended
        await bench.put()
        assert sum("the client is gone" in what for what in events.failures) == 3


async def test_an_entry_over_which_the_deliverer_raises_is_kept_and_the_others_are_offered(tmp_path):
    async with Watched(tmp_path) as bench:
        taken = []

        def offer(entry: Entry) -> None:
            if entry.name.domain == "bad.example":
                raise KeyError("bad")
            taken.append(entry.ident)

        bench.queue.entries._offer = offer
        (_, _), (good, done) = bench.submit("a@bad.example"), bench.submit("a@good.example")
        assert await done is None
        await until(lambda: taken == [good] and bench.events.failures)
        await until(lambda: [row["parked"] for row in bench.summary() if "bad" in row["queue"]] == [True])


async def test_the_environment_is_not_closed_while_somebody_reads(tmp_path, monkeypatch):
    finish, fails = Change.finish, [True]

    def once(change, now) -> None:
        if fails:
            fails.pop()
            raise lmdb.Error("mdb_txn_commit: Input/output error")
        finish(change, now)

    async with Bench(tmp_path) as bench:
        ident = await bench.put()
        store, inside, go = bench.queue.store, threading.Event(), threading.Event()

        def read() -> tuple[bool, bool]:
            with store.reading() as txn:
                before = store.envelope(txn, ident) is not None
                inside.set()
                assert go.wait(10)
                return before, len(list(txn.cursor(db=store.tables["segment"]))) > 0

        reading = asyncio.ensure_future(bench.queue._readers.run(read))
        await until(inside.is_set)
        monkeypatch.setattr(Change, "finish", once)
        refused = asyncio.ensure_future(bench.put())
        await until(lambda: not fails)
        await asyncio.sleep(0.05)  # with the defect, the environment is closed by now
        later = asyncio.ensure_future(bench.queue.summary())  # a read that begins meanwhile waits
        go.set()
        assert await reading == (True, True)
        with pytest.raises(StoreError):
            await refused
        assert [row["messages"] for row in await later] == [1]
        await bench.put()


async def test_reads_are_refused_while_the_store_cannot_be_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr("relaymta.disk.environment.READ_PATIENCE", 0.01)
    async with Bench(tmp_path) as bench:
        bench.queue.store._shut = True
        with pytest.raises(StoreError, match="could not be opened again"):
            await bench.queue.summary()
        bench.queue.store._shut = False
        assert await bench.queue.summary() == []
