"""Streams of events: batches, order, places, consumers that fail, and events that are there no more."""

import asyncio
import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from relaymta.disk.journal import End, JournalReader, JournalWriter, Rows
from relaymta.proto.envelope import encode
from relaymta.queue import wall_ms
from relaymta.report import places, streams
from relaymta.report.replays import Replay, begun, load_all
from relaymta.report.streams import Consumer, NotTaken, Pace, Stream, Tally
from tests.queue.test_queue import until


class Shard:
    """A journal without a store: what was committed is known here."""

    number = 0

    def __init__(self, folder) -> None:
        self.writer = JournalWriter(folder / "journal", Rows(), 1, 64 << 20, 1 << 40)
        self.reader = JournalReader(folder / "journal")
        self.known = End()
        self.idents = 0

    def write(self, *kinds: str, to: int = 1, age_ms: int = 0, text: str = "") -> None:
        for kind in kinds:
            self.idents += 1
            about = ("a@b.example", "shop", "", [], text, "")
            parties = [(f"{number}@d.example",) for number in range(to)]
            self.writer.add(encode([(kind, wall_ms() - age_ms, self.idents, about, parties, 0, {})]), to)
        self.writer.write(1)
        self.writer.settle()

    def end(self) -> End:
        self.known = self.writer.end
        return self.known

    def read(self, place, most):
        return self.reader.read(place, self.end(), most)


class Taker(Consumer):
    """Takes everything, or fails as `errors` say, one after the other."""

    name = "taker"

    def __init__(self) -> None:
        self.taken: list[list[dict]] = []
        self.offered: list[list[dict]] = []
        self.errors: list[Exception] = []
        self.wanted = ("accepted", "held")

    def wants(self, event) -> bool:
        return event["event"] in self.wanted

    async def take(self, events) -> None:
        self.offered.append(events)
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append(events)

    @property
    def numbers(self) -> list[int]:
        return [int(event["id"].rpartition("-")[2]) for events in self.taken for event in events]


@dataclasses.dataclass
class Bench:
    stream: Stream
    taker: Taker
    shard: Shard
    tally: Tally
    warnings: list[str]
    pace: Pace


@contextlib.asynccontextmanager
async def streaming(folder, taker=None, shard=None, fresh=True, **more):
    taker, shard, tally, warnings = taker or Taker(), shard or Shard(folder), Tally(), list[str]()
    pace = Pace(warnings.append)
    with ThreadPoolExecutor(2) as threads:
        file = more.pop("file", folder / "places/shard-0")
        stream = Stream(taker, shard, file, pace, tally, threads, warnings.append, fresh=fresh, **more)
        task = asyncio.get_running_loop().create_task(stream.run())
        try:
            yield Bench(stream, taker, shard, tally, warnings, pace)
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(streams, "POLL", 0.005)
    monkeypatch.setattr(streams, "FIRST", 0.005)


async def test_batches_are_bounded_and_follow_each_other(tmp_path):
    shard = Shard(tmp_path)
    shard.write("accepted", to=700)
    shard.write(*["accepted", "delivered"] * 300)
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: len(bench.taker.numbers) == 1000)
        assert bench.taker.numbers == [*range(700), *range(700, 1300, 2)]
        assert [len(events) for events in bench.taker.taken] == [500, 500]
        shard.write("held")
        await until(lambda: bench.taker.numbers[-1] == 1300)
        assert bench.tally.delivered == 1001 and bench.tally.dropped == 0 and bench.stream.behind == 0


async def test_a_batch_has_a_megabyte_at_most(tmp_path):
    shard = Shard(tmp_path)
    for _ in range(12):
        shard.write("accepted", text="x" * 300_000)
    shard.write("accepted", text="x" * 3_000_000)
    shard.write("accepted")
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: len(bench.taker.numbers) == 14)
        assert bench.taker.numbers == [*range(14)]
        assert [len(events) for events in bench.taker.taken] == [3, 3, 3, 3, 1, 1]


async def test_what_was_taken_does_not_come_again_after_a_restart_and_what_was_not_does(tmp_path):
    shard = Shard(tmp_path)
    shard.write(*["accepted"] * 3)
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: bench.taker.numbers == [0, 1, 2])
        bench.taker.errors = [NotTaken("HTTP 500")] * 1000
        shard.write("accepted")
        await until(lambda: len(bench.taker.offered) > 2)
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: bench.taker.numbers == [3])


async def test_what_was_not_wanted_is_not_asked_for_again_after_a_restart_and_what_waits_is(tmp_path):
    async with streaming(tmp_path) as bench:
        bench.taker.wanted = ()
        for _ in range(2):  # the place behind the first is written, that behind the second not yet
            bench.shard.write("accepted")
            await until(lambda: bench.stream.place == bench.shard.end())
    async with streaming(tmp_path, shard=bench.shard) as second:
        second.shard.write("held")
        await until(lambda: second.taker.taken)
        assert [event["event"] for event in second.taker.taken[0]] == ["held"]
        second.taker.errors = [NotTaken("not yet", 3600)]
        second.shard.write("accepted", "held")
        await until(lambda: len(second.taker.offered) == 2)
    async with streaming(tmp_path, shard=bench.shard) as third:
        await until(lambda: third.taker.taken)
        assert [event["event"] for event in third.taker.taken[0]] == ["accepted", "held"]


async def test_a_write_of_a_place_that_comes_late_does_not_take_it_back(tmp_path, monkeypatch):
    began, go = threading.Event(), threading.Event()
    save = places.save

    def slow(file, place):
        if place.number == 1 and not began.is_set():
            began.set()
            go.wait(10)
        save(file, place)

    async with streaming(tmp_path) as bench:
        await until(lambda: (tmp_path / "places/shard-0").exists())
        monkeypatch.setattr(places, "save", slow)
        bench.shard.write("accepted")
        await asyncio.to_thread(began.wait, 10)
        threading.Timer(0.1, go.set).start()
        last = bench.shard.end()
    assert places.load(tmp_path / "places/shard-0") == last


async def test_a_batch_comes_until_it_is_taken_whatever_a_consumer_raises(tmp_path):
    shard, taker = Shard(tmp_path), Taker()
    taker.errors = [NotTaken("HTTP 500"), KeyError("a defect"), NotTaken("no response")]
    shard.write(*["accepted"] * 5)
    async with streaming(tmp_path, taker, shard) as bench:
        await until(lambda: bench.taker.taken)
        assert len(taker.offered) == 4 and taker.offered[0] == taker.offered[3] == taker.taken[0]
        assert [text.partition(":")[0] for text in bench.warnings] == ["it does not take events", "it takes events again"]
        assert bench.pace.failures == 0


async def test_events_that_were_not_taken_for_too_long_are_dropped_and_told(tmp_path):
    shard, taker = Shard(tmp_path), Taker()
    taker.retry_ms, taker.errors = 60_000, [NotTaken("HTTP 500")] * 2
    shard.write("accepted", "accepted", age_ms=61_000)
    shard.write("accepted")
    async with streaming(tmp_path, taker, shard) as bench:
        await until(lambda: bench.taker.taken)
        assert taker.numbers == [2] and bench.tally.dropped == 2
        assert any("2 events of shard 0 were not taken for too long" in text for text in bench.warnings)


async def test_what_was_removed_before_it_was_read_is_counted_and_told_once(tmp_path):
    shard = Shard(tmp_path)
    async with streaming(tmp_path, shard=shard) as bench:
        shard.write(*["accepted"] * 3)
        await until(lambda: len(bench.taker.numbers) == 3)
        bench.taker.errors = [NotTaken("HTTP 500", 0.0, True)]
        shard.write("accepted")
        await until(lambda: bench.pace.gone)
        shard.write("accepted", "held", to=2)
        shard.writer.remove()
        shard.write("held")
        bench.pace.succeeded()  # a test of it did
        await until(lambda: bench.taker.numbers[-1] == 8)
        assert bench.taker.numbers == [0, 1, 2, 3, 8] and bench.tally.dropped == 4
        assert len([text for text in bench.warnings if "4 events of shard 0" in text]) == 1


async def test_what_was_removed_last_is_counted_though_nothing_follows(tmp_path):
    shard = Shard(tmp_path)
    shard.write("accepted")
    shard.write("held", to=3)
    shard.writer.remove()
    (tmp_path / "places").mkdir()
    places.save(tmp_path / "places/shard-0", End())
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: bench.stream.place == shard.end())
        assert bench.tally.dropped == 4 and not bench.taker.taken


async def test_what_is_dropped_is_counted_once_though_the_process_is_killed_again_and_again(tmp_path):
    """What was removed, what cannot be shown, and what is too old: before events that nobody takes, and between them."""
    shard = Shard(tmp_path)
    shard.write("accepted", to=5)
    shard.writer.remove()
    shard.writer.add(b"of a newer version", 2)
    shard.write("accepted", to=3, age_ms=61_000)
    shard.write("accepted", "accepted")
    shard.writer.add(b"of a newer version", 7)
    shard.write("accepted")
    file, counted = tmp_path / "places/shard-0", 0
    places.save(file, End())
    for _ in range(3):
        taker = Taker()
        taker.retry_ms, taker.errors = 60_000, [NotTaken("HTTP 500")] * 1000
        async with streaming(tmp_path, taker, shard) as bench:
            await until(lambda: len(taker.offered) > 3)  # noqa: B023
            killed = file.read_bytes()
        file.write_bytes(killed)  # nothing of what it does at its end
        counted += bench.tally.dropped
        assert counted == 10 and not taker.taken
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: bench.tally.dropped == 7)
        assert bench.taker.numbers == [10, 11, 19] and places.load(file) == shard.end()


async def test_several_gaps_one_behind_the_other_are_all_counted_and_a_place_that_stays_is_not_looked_at_at_once(tmp_path):
    shard, looks = Shard(tmp_path), 0
    shard.write("accepted", to=20)
    read = shard.read

    def with_gaps(place, most):
        nonlocal looks
        looks += 1
        piece = read(place, most)
        if place.number == 0:
            return piece._replace(records=[], place=piece.place._replace(number=10), gaps={4: 4, 10: 6})
        return piece._replace(records=[], place=place, gaps={})

    shard.read = with_gaps
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: looks > 3)
        assert bench.tally.dropped == 10 and bench.stream.place.number == 10
        assert not bench.stream._more


async def test_events_that_are_too_old_wait_for_those_before_them(tmp_path):
    shard, taker = Shard(tmp_path), Taker()
    taker.retry_ms, taker.errors = 60_000, [NotTaken("HTTP 500")]
    shard.write("accepted")
    shard.write("accepted", age_ms=61_000)
    async with streaming(tmp_path, taker, shard) as bench:
        await until(lambda: taker.taken)
        assert taker.numbers == [0, 1] and not bench.tally.dropped


async def test_who_wants_nothing_lacks_nothing(tmp_path):
    """As the suppression list where it is not used."""
    shard, taker = Shard(tmp_path), Taker()
    taker.follows = False
    shard.write("accepted", to=5)
    shard.writer.remove()
    places.save(tmp_path / "places/shard-0", End())
    async with streaming(tmp_path, taker, shard) as bench:
        await until(lambda: bench.stream.place == shard.end())
        assert not bench.tally.dropped and not bench.warnings


async def test_a_consumer_that_does_not_answer_delays_no_other(tmp_path):
    class Slow(Taker):
        async def take(self, events) -> None:
            await asyncio.Event().wait()

    shard = Shard(tmp_path)
    async with streaming(tmp_path, Slow(), shard), streaming(tmp_path, shard=shard, file=tmp_path / "other") as bench:
        shard.write(*["accepted"] * 3)
        await until(lambda: bench.taker.numbers == [0, 1, 2])


async def test_a_new_consumer_begins_with_what_happens_then(tmp_path):
    shard = Shard(tmp_path)
    shard.write(*["accepted"] * 3)
    async with streaming(tmp_path, shard=shard, fresh=False) as bench:
        await until(lambda: bench.stream.place.number == 3)
        shard.write("held")
        await until(lambda: bench.taker.numbers == [3])


async def test_a_place_that_cannot_be_read_begins_with_the_oldest(tmp_path):
    shard = Shard(tmp_path)
    shard.write(*["accepted"] * 3)
    (tmp_path / "places").mkdir()
    (tmp_path / "places/shard-0").write_bytes(b"")  # as a power cut may leave it
    async with streaming(tmp_path, shard=shard, fresh=False) as bench:
        await until(lambda: bench.taker.numbers == [0, 1, 2])


async def test_another_journal_in_its_place_is_read_from_its_beginning(tmp_path):
    """As after a backup was restored, or a shard begun anew."""
    shard = Shard(tmp_path / "old")
    shard.write(*["accepted"] * 7)
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: len(bench.taker.numbers) == 7)
        await until(lambda: places.load(tmp_path / "places/shard-0") == shard.end())
    shard = Shard(tmp_path / "new")
    shard.write(*["accepted"] * 3)
    async with streaming(tmp_path, shard=shard, fresh=False) as bench:
        await until(lambda: bench.taker.numbers == [0, 1, 2])
        assert bench.tally.dropped == 0


async def test_a_replay_ends_where_it_was_to_and_keeps_its_own_place(tmp_path):
    shard = Shard(tmp_path)
    shard.write("accepted", age_ms=600_000)
    shard.write("accepted", "held")
    replay = Replay("1", wall_ms() - 300_000, 0, ("accepted",), {0: (End(), shard.end())}, wall_ms())
    begun(tmp_path, replay)
    shard.write("accepted")
    assert load_all(tmp_path) == [replay]
    live = tmp_path / "places/shard-0"
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: len(bench.taker.numbers) == 4)
        before = places.load(live)
        file, last = replay.place_file(tmp_path, 0), replay.shards[0][1]
        async with streaming(tmp_path, shard=shard, file=file, until=last, only=replay.only()) as again:
            await until(lambda: again.stream.place == last)
            assert again.taker.numbers == [1] and again.stream.behind == 0
        assert places.load(live) == before
    replay.remove(tmp_path)
    assert load_all(tmp_path) == []


async def test_what_a_replay_sends_is_dropped_when_the_replay_has_tried_for_too_long_however_old_it_is(tmp_path):
    shard, taker = Shard(tmp_path), Taker()
    taker.retry_ms, taker.errors = 60_000, [NotTaken("HTTP 500")] * 2
    shard.write("accepted", "accepted", age_ms=600_000)
    more = {"file": tmp_path / "replay", "until": shard.end()}
    async with streaming(tmp_path, taker, shard, began=wall_ms() - 30_000, **more) as bench:
        await until(lambda: bench.stream.place == shard.end())
        assert taker.numbers == [0, 1] and not bench.tally.dropped
    (tmp_path / "replay").unlink()
    taker.errors = [NotTaken("HTTP 500")] * 2
    async with streaming(tmp_path, taker, shard, began=wall_ms() - 61_000, **more) as bench:
        await until(lambda: bench.stream.place == shard.end())
        assert bench.tally.dropped == 2 and len(taker.taken) == 1


async def test_a_replay_lacks_only_what_lies_before_its_end(tmp_path):
    shard = Shard(tmp_path)
    shard.write("accepted", to=3)
    last = shard.end()
    shard.write("accepted", to=4)
    shard.writer.remove()
    shard.write("accepted")
    places.save(tmp_path / "replay", End())
    async with streaming(tmp_path, shard=shard, file=tmp_path / "replay", until=last) as bench:
        await until(lambda: bench.stream.place == last)
        assert bench.tally.dropped == 3 and not bench.taker.taken


async def test_the_pace_of_failures(monkeypatch):
    monkeypatch.setattr(streams, "FIRST", 1.0)
    now, told = 0.0, list[str]()
    pace = Pace(told.append, lambda: now)
    waits = []
    for _ in range(12):
        pace.failed(NotTaken("HTTP 500"), now)
        waits.append(pace.until - now)
        at, now = now, pace.until
    assert all(0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits[:8])) and max(waits) <= 1.25 * 300
    assert len(told) == 1 and pace.failures == 12
    pace.failed(NotTaken("HTTP 500"), at - 0.1)  # of another stream, at the same time as the last one
    assert pace.failures == 12
    pace.succeeded()
    pace.failed(NotTaken("HTTP 429", 120.0), now)
    assert pace.until == now + 120.0, "as it has asked for"


async def test_what_cannot_be_shown_is_dropped_and_counted_and_stops_nothing(tmp_path):
    shard = Shard(tmp_path)
    shard.write("accepted")
    shard.writer.add(b"of a newer version", 2)
    shard.write("accepted", "deferred", "accepted", to=3)  # a deferral without the time of the next attempt
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: len(bench.taker.numbers) == 7)
        await until(lambda: bench.tally.dropped == 5)
        assert bench.taker.numbers == [0, 3, 4, 5, 9, 10, 11]
        assert bench.stream.behind == 0


async def test_a_stream_outlives_whatever_cannot_be_read_and_says_why_once(tmp_path, monkeypatch):
    shard = Shard(tmp_path)
    read, failing = shard.read, [True]

    def reading(place, most):
        if failing:
            raise ValueError("no more readers")
        return read(place, most)

    monkeypatch.setattr(shard, "read", reading)
    shard.write("accepted")
    async with streaming(tmp_path, shard=shard) as bench:
        await until(lambda: bench.warnings)
        await asyncio.sleep(0.05)
        assert bench.warnings == ["no more readers: its events wait"]
        failing.clear()
        await until(lambda: bench.taker.numbers == [0])


def test_who_is_gone_has_failed_also_where_another_stream_was_answered_meanwhile():
    clock, told = [10.0], list[str]()
    pace = Pace(told.append, lambda: clock[0])
    pace.failed(NotTaken("500"), 10.0)
    clock[0] = 12.0
    pace.succeeded()
    pace.failed(NotTaken("410", gone=True), 9.0)
    assert pace.gone and pace.failures == 1, "so that a test which succeeds revives it"
