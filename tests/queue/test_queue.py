"""One shard without sockets: durability across reopening, schedule, deadlines, operators' verbs, segments."""

import asyncio
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from relaymta.disk.clock import ShardClock
from relaymta.disk.ident import IdSource
from relaymta.disk.segments import Corrupt
from relaymta.errors import SpoolBusy, StoreError
from relaymta.ident import format_id, parse_id, shard_of
from relaymta.proto.envelope import PERMANENT, TRANSIENT, Attempt, Envelope, QueueName, decode_envelope
from relaymta.queue import Entry, Events, Filter, Outcome, Queue, QueueSettings, inspect, wall_ms
from relaymta.queue.schedule import RETRY_STEPS, retry_delay
from tests.support.daemon import PATIENCE
from tests.support.dead_reader import is_forgotten


class Recorder(Events):
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.put: list = []

    def queued(self, put) -> None:
        self.put.append(put)

    def ended(self, outcome) -> None:
        self.outcomes.append(outcome)


class Bench:
    """A queue in a folder; `offered` collects the entries that it offers for delivery."""

    def __init__(self, folder: Path, **settings) -> None:
        self.folder = folder
        self.settings = QueueSettings("relay.example", **settings)
        self.offered: list[Entry] = []
        self.events = Recorder()

    async def __aenter__(self) -> "Bench":
        self.queue = Queue(self.folder, 0, self.settings, assign, self, self.events)
        await self.queue.start()
        return self

    async def __aexit__(self, *exc) -> None:
        await self.queue.stop()

    def offer(self, entry: Entry) -> None:
        self.offered.append(entry)

    def awake(self, name: QueueName) -> bool:
        return True

    async def drain(self, seconds: float, data_seconds: float) -> None:
        pass

    async def put(self, data: bytes = b"Subject: x\r\n\r\nbody\r\n", to=("c@d.example",), sender="a@b.example") -> int:
        """Store a message; its id, once it is durable."""
        ident = self.queue.ident()
        envelope = Envelope(sender, list(to), len(data), 0, wall_ms(), self.queue.deadline())
        future = asyncio.get_running_loop().create_future()
        self.queue.submit(ident, envelope, [data], future.set_result)
        error = await future
        if error is not None:
            raise error
        return ident

    async def next(self, count: int = 1) -> list[Entry]:
        """The next entries offered, in flight from now on."""
        await until(lambda: len(self.offered) >= count)
        taken, self.offered[:] = self.offered[:count], self.offered[count:]
        for entry in taken:
            assert self.queue.begin(entry)
        return taken

    async def copied(self, folder: Path) -> None:
        """Copy the files as kill -9 would leave them now: no group is committed while they are copied."""
        await until(lambda: not self.queue.writer._busy and not self.queue.writer._pending)
        shutil.copytree(self.folder, folder)

    async def empty(self) -> None:
        """Wait until nothing is queued and (an iteration of the loop later) no octet is live."""
        await until(lambda: self.summary() == [])
        await until(lambda: self.queue.segments.usage()[1] == 0)

    def pass_time(self, milliseconds: int) -> None:
        """Move the queue's clock forward."""
        self.queue.clock._offset += milliseconds
        self.queue.schedule.wake()

    def summary(self) -> list[dict]:
        return inspect.summary(self.queue.store, self.queue.clock)


def assign(envelope: Envelope, attempts: int):
    if envelope.route:
        return [(QueueName(envelope.route, ""), None)]
    groups: dict[str, list[int]] = {}
    for index, address in enumerate(envelope.recipients):
        groups.setdefault(address.partition("@")[2], []).append(index)
    return [(QueueName("mx", domain), indexes if len(groups) > 1 else None) for domain, indexes in groups.items()]


async def until(condition) -> None:
    """Wait until a condition holds: as long as it takes on any machine."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.01)


def answer(kind: str, text: str = "said so") -> Attempt:
    return Attempt(wall_ms(), kind, "rcpt", "mx.example", 550 if kind == PERMANENT else 451, "", text)


async def test_what_is_put_is_there_after_reopening(tmp_path):
    async with Bench(tmp_path) as bench:
        idents = [await bench.put(b"Subject: %d\r\n\r\nx\r\n" % n) for n in range(20)]
    async with Bench(tmp_path) as bench:
        entries = await bench.next(20)
        assert sorted(e.ident for e in entries) == idents
        assert await bench.queue.read(entries[:1]) == [[b"Subject: 0\r\n\r\nx\r\n"]]
        for entry in entries:
            bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == 20)
        assert bench.summary() == []
        with bench.queue.store.env.begin() as txn:
            counts = {name: txn.stat(db)["entries"] for name, db in bench.queue.store.tables.items()}
        assert [counts[name] for name in ("message", "recipient", "due", "wake", "expiry", "held")] == [0] * 6
        await bench.empty()


async def test_250_is_delayed_while_message_data_piles_up_in_memory(tmp_path):
    async with Bench(tmp_path, window_bytes=100_000) as bench:
        delays = []
        for _ in range(12):
            await bench.put(b"x" * 10_000)
            delays.append(bench.queue.delay(0.05))
        assert delays == [0] * 5 + [0.05] * 7
        for entry in await bench.next(12):
            bench.queue.finish(entry, None)
        await until(lambda: bench.queue.delay(0.05) == 0)


async def test_a_start_reads_a_window_and_not_the_queue(tmp_path, monkeypatch):
    async with Bench(tmp_path, window=100) as bench:
        await asyncio.gather(*(bench.put() for _ in range(3000)))
    decoded = 0

    def counting(raw: bytes) -> Envelope:
        nonlocal decoded
        decoded += 1
        return decode_envelope(raw)

    monkeypatch.setattr("relaymta.queue.store.decode_envelope", counting)
    async with Bench(tmp_path, window=100) as bench:
        await bench.next(50)
        assert 50 <= decoded <= 200


async def test_a_deferred_message_comes_back_when_it_is_due_and_not_before(tmp_path):
    async with Bench(tmp_path, first_retry_ms=300_000) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer(TRANSIENT)})
        await until(lambda: bench.events.outcomes)
        bench.pass_time(200_000)  # a wide margin, since the clock also runs by itself
        await asyncio.sleep(0.3)
        assert bench.offered == []
        bench.pass_time(145_001)  # up to 15 % later
        (again,) = await bench.next()
        assert again.attempts == 1
        assert again.envelope.body.segment != entry.envelope.body.segment, "a straggler moves to a cold segment"
        assert await bench.queue.read([again]) == [[b"Subject: x\r\n\r\nbody\r\n"]]
        bench.queue.finish(again, None)
        await bench.empty()


async def test_mixed_results_leave_only_the_pending_recipient(tmp_path):
    async with Bench(tmp_path, first_retry_ms=100) as bench:
        await bench.put(to=("a@x", "b@x", "c@x"))
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer("success"), 1: answer(TRANSIENT), 2: answer(PERMANENT)})
        dsn, again = await bench.next(2)
        assert dsn.envelope.sender == ""
        assert dsn.envelope.recipients == ["a@b.example"]
        assert b"<c@x>" in b"".join(dsn.data)
        assert again.recipients == [(1, "b@x")]


async def test_recipients_in_several_queues_end_one_by_one(tmp_path):
    async with Bench(tmp_path) as bench:
        ident = await bench.put(to=("a@x", "b@y", "c@x"))
        first, second = sorted(await bench.next(2), key=lambda e: e.name.domain)
        assert [r for _, r in first.recipients] == ["a@x", "c@x"]
        bench.queue.finish(first, None)
        await until(lambda: len(bench.events.outcomes) == 1)
        with bench.queue.store.env.begin() as txn:
            assert bench.queue.store.envelope(txn, ident) is not None
        bench.queue.finish(second, None)
        await bench.empty()


async def test_a_dsn_and_the_end_of_its_recipients_are_one_transaction(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer(PERMANENT)})
        await until(lambda: bench.events.outcomes)
        assert [row["messages"] for row in bench.summary()] == [1], "the DSN, and not the message"
        (dsn,) = await bench.next()
        bench.queue.finish(dsn, {0: answer(PERMANENT)})
        await until(lambda: bench.summary() == [])


async def test_a_queue_may_have_a_name_of_any_length(tmp_path):
    """Also that of a DSN, whose sender chooses it: a key of LMDB has 511 octets, and an outcome is committed again and again."""
    domains = [letter * 2000 + ".example" for letter in "ab"]
    async with Bench(tmp_path) as bench:
        for domain in domains:
            await bench.put(to=("bad@d.example",), sender=f"a@{domain}")
        for entry in await bench.next(2):
            bench.queue.finish(entry, {0: answer(PERMANENT)})
        dsns = await bench.next(2)
        assert {entry.name.domain for entry in dsns} == set(domains)
        for entry in dsns:
            bench.queue.finish(entry, {0: answer(TRANSIENT)})
        await until(lambda: len(bench.events.outcomes) == 4)
    async with Bench(tmp_path) as bench:
        assert sorted(row["queue"] for row in bench.summary()) == [f"mx/{domain}" for domain in domains]
        await bench.put(to=(f"c@{domains[0]}",))
        assert sorted(row["messages"] for row in bench.summary()) == [1, 2]
        bench.pass_time(3_600_000)
        for entry in await bench.next(3):
            bench.queue.finish(entry, None)
        await bench.empty()
        assert await bench.queue.task(lambda change: change.sweep()) == 3


async def test_the_deadline_holds_wherever_a_message_waits(tmp_path):
    async with Bench(tmp_path, max_age_ms=600_000, first_retry_ms=3_600_000) as bench:
        await bench.put(b"waiting in the window\r\n\r\n")
        await bench.put(b"deferred\r\n\r\n")
        entries = await bench.next(2)
        bench.queue.again(entries[0])
        bench.queue.finish(entries[1], {0: answer(TRANSIENT, "come back")})
        await until(lambda: len(bench.events.outcomes) == 1)
        bench.pass_time(600_001)
        await until(lambda: sum(o.expired for o in bench.events.outcomes) == 2)
        dsns = [b"".join(p.data or []) for p in bench.events.put if p.envelope.sender == ""]
        assert len(dsns) == 2
        assert sum(b"come back" in dsn for dsn in dsns) == 1
        assert all(b"Status: 4.4.7" in dsn for dsn in dsns)
        assert not entries[0].waiting, "whoever still holds it drops it"


async def test_held_messages_neither_move_nor_expire(tmp_path):
    async with Bench(tmp_path, max_age_ms=500_000, first_retry_ms=50_000) as bench:
        ident = await bench.put()
        bench.offered.clear()
        assert await bench.queue.change_messages("hold", [ident]) == (1, 0)
        bench.pass_time(1_500_000)
        await asyncio.sleep(0.3)
        assert bench.offered == []
        assert bench.events.outcomes == []
        assert await bench.queue.change_messages("release", [ident]) == (1, 0)
        (entry,) = await bench.next()
        assert await bench.queue.change_messages("delete", [ident]) == (0, 1), "in flight: left to its outcome"
        bench.queue.again(entry)
        assert await bench.queue.change_messages("delete", [ident]) == (1, 0)
        assert not entry.waiting
        assert bench.summary() == []


async def test_flush_makes_a_deferred_message_due(tmp_path):
    async with Bench(tmp_path, first_retry_ms=3_600_000) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer(TRANSIENT)})
        await until(lambda: bench.events.outcomes)
        await bench.queue.change_messages("flush", [ident])
        (again,) = await bench.next()
        assert again.ident == ident


async def move(bench: Bench, chosen: Filter, dry_run: bool = False) -> tuple[int, int]:
    return await bench.queue.move_queues(chosen, lambda name, site: False, lambda name: QueueName("away", ""), dry_run)


async def test_a_queue_moved_as_a_whole_is_due_and_stays_moved(tmp_path):
    async with Bench(tmp_path) as bench:
        idents = [await bench.put(to=("x@d",)) for _ in range(4)]
        fresh, deferred, in_flight, held = await bench.next(4)
        bench.queue.again(fresh)
        bench.queue.again(held)
        await bench.queue.change_messages("hold", [held.ident])
        bench.queue.finish(deferred, {0: answer(TRANSIENT)})
        await until(lambda: len(bench.events.outcomes) == 1)
        assert await move(bench, Filter(queue="mx/other")) == (0, 0)
        assert await move(bench, Filter(queue="mx/d"), dry_run=True) == (4, 0)
        assert await move(bench, Filter(queue="mx/d")) == (4, 1)
        assert not fresh.waiting
        again = {entry.ident: entry for entry in await bench.next(2)}
        assert set(again) == {fresh.ident, deferred.ident} and {str(entry.name) for entry in again.values()} == {"away"}
        rows = [json.loads(line) for line in (await bench.queue.page(Filter(), 0, lambda *_: False))["lines"].splitlines()]
        assert [row["queues"] for row in rows] == [["away"]] * 4
        # What is deferred again stays with the new route; new mail is routed by the route table.
        for entry in (*again.values(), in_flight):
            bench.queue.finish(entry, {0: answer(TRANSIENT)}, 1)
        new = await bench.put(to=("x@d",))
        later = {entry.ident: str(entry.name) for entry in await bench.next(4)}
        assert later == {fresh.ident: "away", deferred.ident: "away", in_flight.ident: "away", new: "mx/d"}
        assert (await bench.queue.change_messages("release", [held.ident]))[0] == 1
        assert [str(entry.name) for entry in await bench.next(1)] == ["away"]
    async with Bench(tmp_path) as bench:
        found = await bench.next(5)
        assert {entry.ident: str(entry.name) for entry in found} == dict.fromkeys(idents, "away") | {new: "mx/d"}
        for entry in found:
            bench.queue.finish(entry, None)
        await until(lambda: bench.summary() == [])
        await bench.queue.task(lambda change: change.sweep())
        assert await bench.queue.names() == []
        await bench.put(to=("x@d",))
        assert [str(entry.name) for entry in await bench.next(1)] == ["mx/d"]


async def test_mail_that_is_moved_twice_stays_with_the_second_route(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put(to=("x@d",))
        (entry,) = await bench.next()
        for route in ("away", "farther"):
            bench.queue.again(entry)
            name = QueueName(route, "")
            chosen = Filter(queue=str(entry.name))
            assert await bench.queue.move_queues(chosen, lambda *_: False, lambda _, name=name: name, False) == (1, 0)
            for _ in range(3):
                (entry,) = await bench.next()
                assert entry.name == name
                bench.queue.finish(entry, {0: answer(TRANSIENT)}, 1)
            (entry,) = await bench.next()


async def test_of_a_message_in_two_queues_a_moved_one_is_lost_to_neither(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put(to=("x@d", "y@e"))
        one, other = sorted(await bench.next(2), key=lambda entry: entry.name.domain)
        bench.queue.again(one)
        bench.queue.again(other)
        assert await move(bench, Filter(queue="mx/d")) == (1, 0)
        (moved,) = await bench.next(1)
        assert (str(moved.name), moved.indexes) == ("away", [0])
        assert bench.queue.begin(other)
        bench.queue.finish(other, {1: answer(TRANSIENT)}, 1)
        bench.queue.finish(moved, {0: answer(TRANSIENT)}, 1)
        both = {str(entry.name): entry for entry in await bench.next(2)}
        assert {name: entry.indexes for name, entry in both.items()} == {"away": [0], "mx/e": [1]}
        bench.queue.finish(both["mx/e"], {1: answer(TRANSIENT)}, 1)  # and now its other recipient moves, too
        await until(lambda: len(bench.events.outcomes) == 3)
        bench.queue.finish(both["away"], None)
        (rest,) = await bench.next(1)
        assert (str(rest.name), rest.recipients) == ("away", [(1, "y@e")])
        bench.queue.finish(rest, None)
        await until(lambda: bench.summary() == [])


async def test_a_parked_queue_is_not_scanned_until_it_wakes(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.again(entry)
        bench.queue.put_back(entry)
        bench.queue.park(entry.queue, bench.queue.clock.now() + 600_000)
        await asyncio.sleep(0.3)
        assert bench.offered == []
        bench.pass_time(600_001)
        await bench.next()


async def test_more_than_the_window_is_found_on_disk(tmp_path):
    async with Bench(tmp_path, window=40) as bench:
        idents = {await bench.put() for _ in range(200)}
        seen = set()
        while len(seen) < 200:
            (entry,) = await bench.next()
            assert entry.ident not in seen, "a row in flight is never picked twice"
            seen.add(entry.ident)
            assert len(bench.queue.entries) <= 41
            bench.queue.finish(entry, None)
        assert seen == idents
        await until(lambda: bench.summary() == [])


async def test_empty_queues_are_forgotten(tmp_path):
    async with Bench(tmp_path) as bench:
        for number in range(20):
            await bench.put(to=(f"a@d{number}.example",))
        for entry in await bench.next(20):
            if entry.name.domain != "d7.example":
                bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == 19)
        assert await bench.queue.task(lambda change: change.sweep()) == 19
        assert [row["queue"] for row in bench.summary()] == ["mx/d7.example"]
        assert len(bench.queue.store._queues) <= 1
        await bench.put(to=("again@d3.example",))
        assert sorted(row["queue"] for row in bench.summary()) == ["mx/d3.example", "mx/d7.example"]
        with bench.queue.store.env.begin() as txn:
            numbers = [row.number for row in bench.queue.store.queues(txn)]
        assert len(set(numbers)) == 2


async def test_a_shard_has_one_owner(tmp_path):
    async with Bench(tmp_path) as bench:
        with pytest.raises(SpoolBusy):
            Queue(tmp_path, 0, bench.settings, assign, bench, Recorder())


async def test_a_damaged_body_is_noticed(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put(b"x" * 5000)
        (entry,) = await bench.next()
        entry.data = None
        (segment,) = (tmp_path / "shard-0/bodies").glob("*.seg")
        with segment.open("r+b") as file:
            file.seek(entry.envelope.body.offset + 100)
            file.write(b"y")
        (error,) = await bench.queue.read([entry])
        assert isinstance(error, Corrupt)


async def test_space_is_reused_only_after_the_commit_that_freed_it(tmp_path):
    async with Bench(tmp_path) as bench:
        bench.queue.segments.size = 1 << 20
        for number in range(30):
            await bench.put(b"z" * 200_000)
            (entry,) = await bench.next()
            bench.queue.finish(entry, None)
            await until(lambda number=number: len(bench.events.outcomes) > number)
        await bench.empty()
        assert bench.queue.segments.usage()[2] <= 4


async def test_a_failed_group_is_not_there_and_the_next_one_is(tmp_path, monkeypatch):
    async with Bench(tmp_path) as bench:
        import relaymta.disk.segments as segments

        first = await bench.put()
        real = segments.os.fdatasync
        monkeypatch.setattr(segments.os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "EIO")))
        with pytest.raises(StoreError):
            await bench.put()
        monkeypatch.setattr(segments.os, "fdatasync", real)
        sealed = [s for s in bench.queue.segments._segments.values() if s.row.sealed]
        assert len(sealed) == 1, "a failed sync is never repeated on the same file"
        ident = await bench.put()
    async with Bench(tmp_path) as bench:
        assert {entry.ident for entry in await bench.next(2)} == {first, ident}


def test_the_clock_never_goes_back(monkeypatch):
    wall = wall_ms()
    ahead = ShardClock(wall + 3_600_000)
    assert ahead.now() >= wall + 3_600_000, "a wall clock set back an hour across a restart"
    assert ahead.resumed == 0
    late = ShardClock(wall - 10 * 86_400_000)
    assert late.resumed >= wall, "ten days forward: what is overdue is tried once first"
    clock = ShardClock(0)
    before = clock.now()
    monkeypatch.setattr("time.time_ns", lambda: 0)
    assert clock.now() >= before, "a wall clock set back while the process runs"


async def test_ten_days_forward_expire_nothing_untried(tmp_path):
    async with Bench(tmp_path, max_age_ms=86_400_000, first_retry_ms=7_200_000) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer(TRANSIENT)})
        await until(lambda: bench.events.outcomes)
        await bench.queue.task(lambda change: None)
    async with Bench(tmp_path, max_age_ms=86_400_000) as bench:
        bench.queue.clock._offset += 10 * 86_400_000
        bench.queue.clock.resumed = bench.queue.clock.now()
        await asyncio.sleep(0.5)
        (entry,) = await bench.next()
        assert entry.attempts == 1, "it is tried before it expires"
        bench.queue.finish(entry, {0: answer(TRANSIENT)})
        await until(lambda: bench.events.outcomes)
        assert bench.events.outcomes[0].expired


async def test_what_may_not_expire_yet_after_a_long_stop_is_not_counted_as_overdue(tmp_path):
    async with Bench(tmp_path, max_age_ms=86_400_000) as bench:
        queue = bench.queue
        ident = await bench.put()
        await queue.task(lambda change: change.materialize(ident))

        def overdue() -> float:
            return inspect.totals(queue.store, queue.segments, queue.clock).overdue

        assert overdue() == 0
        queue.clock._offset += 10 * 86_400_000  # no await from here on, with which it would expire
        assert 9 * 86_400 - 60 < overdue() < 9 * 86_400 + 3600
        queue.clock.resumed = queue.clock.now()
        assert overdue() == 0, "it is to be tried once before it expires"
        queue.clock._offset += 86_400_000 + 7_200_000
        assert 7_200 <= overdue() < 10_800, "since the end of the day of grace"


def test_ids_are_never_reused_and_print_well():
    source = IdSource(3, 0, lambda: 1_800_000_000_000)
    idents = [source.next() for _ in range(10_000)]
    assert len(set(idents)) == 10_000
    assert idents == sorted(idents)
    assert all(shard_of(i) == 3 for i in idents)
    later = IdSource(3, idents[-1], lambda: 0)
    assert later.next() > idents[-1], "a clock set back"
    assert parse_id(format_id(idents[5]).lower()) == idents[5]
    for wrong in ("", "x", "U" * 13, "Z" * 13):
        with pytest.raises(ValueError):
            parse_id(wrong)


def test_the_retry_schedule():
    for attempt, step in enumerate((*RETRY_STEPS, 60, 60), 1):
        for _ in range(50):
            assert step * 60_000 <= retry_delay(attempt, 60_000) <= step * 60_000 * 1.15


async def test_a_recipient_that_joins_a_queue_in_which_its_message_is_in_flight_is_not_lost(tmp_path, monkeypatch):
    async with Bench(tmp_path) as bench:
        bench.queue.ends.assign = lambda envelope, attempts: (
            assign(envelope, 0) if not attempts else [(QueueName("mx", "d"), None)]
        )
        await bench.put(to=("x@d", "y@e"))
        one, other = sorted(await bench.next(2), key=lambda entry: entry.name.domain)
        bench.queue.finish(other, {1: answer(TRANSIENT)}, 1)
        await until(lambda: len(bench.events.outcomes) == 1)
        bench.queue.finish(one, None)
        await until(lambda: len(bench.events.outcomes) == 2)
        (rest,) = await bench.next(1)
        assert (str(rest.name), rest.recipients) == ("mx/d", [(1, "y@e")])
        bench.queue.finish(rest, None)
        await until(lambda: bench.summary() == [])


async def test_of_placements_that_join_the_attempts_are_those_of_that_with_more(tmp_path):
    async with Bench(tmp_path) as bench:
        bench.queue.ends.assign = lambda envelope, attempts: (
            assign(envelope, 0) if attempts < 3 else [(QueueName("mx", "d"), None)]
        )
        await bench.put(to=("x@d", "y@e"))
        one, other = sorted(await bench.next(2), key=lambda entry: entry.name.domain)
        for count in range(1, 4):
            bench.queue.finish(other, {1: answer(TRANSIENT)}, 1)
            await until(lambda: len(bench.events.outcomes) == count)  # noqa: B023
            if count < 3:
                (other,) = await bench.next(1)
        bench.queue.finish(one, {0: answer(TRANSIENT)}, 1)
        (rest,) = await bench.next(1)
        assert (str(rest.name), len(rest.recipients), rest.attempts) == ("mx/d", 2, 3)
        bench.queue.finish(rest, None)
        await until(lambda: bench.summary() == [])


@pytest.mark.parametrize("room", [0, 4096])
async def test_fields_that_are_only_known_at_the_end_are_prepended_to_a_large_body(tmp_path, room):
    async with Bench(tmp_path) as bench:
        segments = bench.queue.segments
        ident = bench.queue.ident()
        big = bench.queue.big_body(ident, room)
        big.write([b"Subject: x\r\n", b"\r\n"])
        big.write([b"body\r\n" * 300_000])
        body = big.finish([b"A: 1\r\n", b"B: 2\r\n"] if room else [b""])
        expected = (b"A: 1\r\nB: 2\r\n" if room else b"") + b"Subject: x\r\n\r\n" + b"body\r\n" * 300_000
        assert segments.read(ident, body) == expected and body.length == len(expected) == big.length
        os.close(segments.open_big(ident, body))
        path = segments.big_path(ident)
        whole = bytearray(path.read_bytes())
        whole[body.offset + 40] ^= 1  # in what was put in front
        path.write_bytes(whole)
        for read in (segments.read, segments.open_big):
            with pytest.raises(Corrupt):
                read(ident, body)
        other = bench.queue.big_body(bench.queue.ident(), room)
        other.write([b"x"])
        with pytest.raises(StoreError, match="do not fit"):
            other.finish([bytes(room + 1)])
        other.discard()


async def test_a_reader_that_was_killed_pins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("relaymta.queue.SWEEP_TICKS", 2)
    async with Bench(tmp_path) as bench:
        await bench.put()
        (path,) = tmp_path.rglob("data.mdb")
        await is_forgotten(bench.queue.store.env, path.parent)
        await bench.put()
