"""Mail that is in the queue before filters have looked at it: a random model, crashes amid `replaced`, disks that refuse, callers
that are cancelled, what older versions have written, and deadlines."""

import asyncio
import contextlib
import os
import random
import shutil
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import msgspec
import pytest

from relaymta.disk.big import BigBody, read_big
from relaymta.disk.operations import Move
from relaymta.disk.segments import Segments
from relaymta.errors import StoreError
from relaymta.ident import format_id
from relaymta.proto.envelope import (
    BY_EXPIRY,
    CLASSES,
    DSN,
    HELD,
    PERMANENT,
    POLICY_HELD,
    TRANSIENT,
    UNSEEN,
    Body,
    Envelope,
    Quarantine,
    QueueName,
    Unseen,
    decode_envelope,
    encode,
)
from relaymta.queue import Filter, Queue, offline, wall_ms
from relaymta.queue.big import BigBodies
from relaymta.queue.change import Change
from relaymta.queue.store import DUE, EXPIRY, HELD_KEY, SCHEMA, SCHEMA_UNSEEN, UNSEEN_KEY, WAKE, Store
from relaymta.queue.unseen import FIRST, Taken
from tests.conftest import PROVE
from tests.queue.test_one_end import Watched, Witness
from tests.queue.test_queue import answer, until

WHY = Quarantine(1, "filter av", "why", None, "", True)
BIG = 2000  # octets above which a body is a file of its own here
SMALL_DATA, LARGE_DATA, LARGER_DATA = b"Subject: s\r\n\r\nx\r\n", b"l" * 3000, b"L" * 5000
NONE_DOWN = (frozenset[str](), frozenset[str]())
WAITS = Unseen(["av"], 0, 0, False, False, False)
DAY = 86_400_000


def assign(envelope: Envelope, attempts: int):
    """As routes do: by domain, and by class; or what an operator has said."""
    if envelope.route:
        return [(QueueName(envelope.route, "", "", envelope.priority), None)]
    groups: dict[str, list[int]] = {}
    for index, address in enumerate(envelope.recipients):
        groups.setdefault(address.partition("@")[2], []).append(index)
    every = len(groups) > 1
    return [(QueueName("mx", domain, "", envelope.priority), found if every else None) for domain, found in groups.items()]


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def exists(path: Path) -> bool:
    return path.exists()


class Scanned(Watched):
    """A bench whose messages filters look at. Its ticks are its caller's."""

    async def __aenter__(self) -> "Scanned":
        self.queue = Queue(self.folder, 0, self.settings, assign, self, self.events)
        self.queue.segments.big_limit = BIG
        await self.queue.start()
        assert self.queue._timer is not None
        self.queue._timer.cancel()
        self.noticed = 0
        self.written: dict[int, BigBody] = {}  # a sweep takes what nobody has any more for abandoned
        self.queue.unseen.noticed = self._noticed
        return self

    def _noticed(self) -> None:
        self.noticed += 1

    async def store(self, data: bytes = SMALL_DATA, flags: int = UNSEEN, unseen: Unseen | None = WAITS, **fields) -> int:
        """Store a message; its id, once it is durable."""
        ident, done = self.queue.ident(), asyncio.get_running_loop().create_future()
        given = {"sender": "a@b.example", "recipients": ["c@d.example"], "deadline": self.queue.deadline()} | fields
        envelope = Envelope(size=len(data), flags=flags, arrived=wall_ms(), unseen=unseen, **given)
        if len(data) > BIG:
            file = self.queue.big_body(ident)
            file.write([data])
            self.queue.submit(ident, envelope, file.finish([]), done.set_result)
        else:
            self.queue.submit(ident, envelope, [data], done.set_result)
        assert await done is None
        return ident

    async def take(self, ident: int) -> Taken:
        taken = await self.queue.unseen.take(ident)
        assert taken is not None
        return taken

    def body(self, taken: Taken, data: bytes) -> list[bytes] | Body:
        """What `replaced` takes."""
        if len(data) <= BIG:
            return [data[:5], data[5:]]
        file = self.file(taken, 100)
        file.write([data])
        self.written[taken.ident] = file
        return file.finish([])

    def file(self, taken: Taken, room: int = 0) -> BigBody:
        """A file that is to have the message's data. OSError."""
        file = self.queue.unseen.big_body(taken, self.queue.ident(), room)
        try:
            self.queue.unseen.become(taken, file)
        except OSError:
            file.discard()
            raise
        return file

    async def replace(self, taken: Taken, data: bytes, flags: int = 0, **fields) -> None:
        """It has this data from now on."""
        try:
            await self.queue.unseen.replaced(taken, changed(taken, data, flags, **fields), self.body(taken, data))
        finally:
            self.written.pop(taken.ident, None)

    async def replaced(self, ident: int, data: bytes, flags: int = 0, **fields) -> None:
        taken = await self.take(ident)
        try:
            await self.replace(taken, data, flags, **fields)
        finally:
            taken.release()

    async def raw(self, ident: int) -> bytes:
        return b"".join([piece async for piece in self.queue.raw(ident)])

    def row(self, ident: int) -> Envelope | None:
        with self.queue.store.reading() as txn:
            return self.queue.store.envelope(txn, ident)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "shard-0/bodies/big").iterdir())

    @property
    def descriptors(self) -> list[str]:
        """The large bodies that are open."""
        found = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(path))
        return [path for path in found if str(self.folder / "shard-0/bodies/big") in path]

    async def quiet(self) -> None:
        """Wait until nothing is under way."""
        queue = self.queue
        for _ in range(3):
            await queue._changes.finished()
            await queue._readers.run(lambda: None)
            await self.settled()
            await asyncio.sleep(0)
        await until(lambda: not queue.writer._busy and not queue.writer._pending and not queue.schedule._scanning)

    async def scan(self) -> None:
        """Offer all that is due."""
        schedule = self.queue.schedule
        for _ in range(2):
            schedule.wake()
            schedule._last_scan = 0
            schedule.tick()
            await until(lambda: not schedule._scanning)

    async def expire(self) -> None:
        """End what is overdue."""
        self.queue._readers.read_rows(self.queue._expiry.overdue, self.queue._expiry.expire)
        await self.quiet()

    async def settled_whatever(self) -> None:
        """Wait until all that was submitted so far is committed or refused."""
        with contextlib.suppress(StoreError):
            await self.settled()

    def entries(self, ident: int) -> list:
        return [entry for entry in self.offered if entry.ident == ident and entry.waiting]


def changed(taken: Taken, data: bytes, flags: int = 0, **fields) -> Envelope:
    """The envelope of a message that filters have changed."""
    kept = taken.envelope.flags & ~UNSEEN
    unseen = fields.pop("unseen", taken.envelope.unseen if flags & UNSEEN else None)
    return msgspec.structs.replace(
        taken.envelope, size=len(data), flags=kept | flags, placements=[], unseen=unseen, held_for="why" if flags & HELD else "",
        **fields,
    )  # fmt: skip


# A crash amid `replaced`, and disks that refuse

WAYS = [(a, b) for a in (SMALL_DATA, LARGE_DATA) for b in (b"new\r\n", LARGER_DATA)]
NAMES = ["small-small", "small-large", "large-small", "large-large"]


@pytest.mark.parametrize(("before", "after"), WAYS, ids=NAMES)
async def test_what_has_taken_a_place_is_read_whatever_becomes_of_its_file(tmp_path, monkeypatch, before, after):
    """A rename that is not made, or fails: the message is readable all the time, and once the next process has begun there is one
    file of it, or none."""
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(before)
        with monkeypatch.context() as patched:
            patched.setattr(Segments, "take_place", lambda self, ident: None)
            await bench.replaced(ident, after, UNSEEN)
            assert await bench.raw(ident) == after
            taken = await bench.take(ident)
            assert (taken.data or await taken.piece(0, 9999)) == after
            await bench.queue.unseen.waits(taken, ["av", "other"])
            taken.release()
            await bench.queue._readers.run(bench.queue._big.sweep, -60)
            assert await bench.raw(ident) == after
        await bench.copied(tmp_path / "copy")
        found = b"".join(offline.answer(tmp_path / "copy", "raw", ident=format_id(ident)))
        assert found == after
    async with Scanned(tmp_path / "copy") as bench:
        assert await bench.raw(ident) == after
        assert bench.files == ([f"{ident:016x}"] if len(after) > BIG else [])
        await bench.replaced(ident, before)
        await bench.scan()
        (entry,) = bench.entries(ident)
        assert b"".join((await bench.queue.read([entry]))[0]) == before
        assert bench.queue.begin(entry)
        bench.queue.finish(entry, None)
        await bench.empty()
        await until(lambda: bench.files == [])


async def test_what_was_replaced_twice_is_there_where_the_first_rename_failed(tmp_path, monkeypatch):
    """The only copy of a message must not make room for a new one that may never be committed."""
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(LARGE_DATA)
        with monkeypatch.context() as patched:
            patched.setattr(Segments, "take_place", lambda self, ident: None)
            await bench.replaced(ident, LARGER_DATA, UNSEEN)
        taken = await bench.take(ident)
        file = bench.file(taken)
        file.write([b"x" * 4000])
        assert await bench.raw(ident) == LARGER_DATA
        file.finish([])
        assert await bench.raw(ident) == LARGER_DATA
        file.discard()
        assert await bench.raw(ident) == LARGER_DATA
        await bench.replace(taken, LARGE_DATA, HELD)
        taken.release()
        assert await bench.raw(ident) == LARGE_DATA
        assert bench.files == [f"{ident:016x}"]


@pytest.mark.parametrize("size", [SMALL_DATA, LARGE_DATA])
async def test_where_no_rename_is_possible_nothing_is_lost(tmp_path, monkeypatch, size):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(size)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "EIO")))
            await bench.replaced(ident, LARGER_DATA, UNSEEN)
            taken = await bench.take(ident)
            with pytest.raises(OSError, match="EIO"):
                bench.file(taken)
            assert await bench.raw(ident) == LARGER_DATA
            await bench.queue.unseen.passed(taken)
            taken.release()
            await bench.scan()
            (entry,) = bench.entries(ident)
            where = bench.queue.big_file(entry)
            assert where is not None
            assert read_big(where) == LARGER_DATA
            assert b"".join([piece async for piece in bench.queue.stream(entry)]) == LARGER_DATA
            assert bench.queue.begin(entry)
            bench.queue.finish(entry, None)
            await bench.empty()
            await bench.quiet()
        await bench.queue._readers.run(bench.queue._big.sweep, -60)
        assert bench.files == []


async def test_a_file_that_gets_its_name_while_it_is_opened_is_read(tmp_path, monkeypatch):
    """Delivery may have the message from a scan while its file still has the other name."""
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(LARGE_DATA)
        with monkeypatch.context() as patched:
            patched.setattr(Segments, "take_place", lambda self, ident: None)
            await bench.replaced(ident, LARGER_DATA)
        await bench.scan()
        (entry,) = bench.entries(ident)
        is_next = Segments.is_next

        def renamed(self, ident: int, body: Body) -> bool:
            found = is_next(self, ident, body)
            self.take_place(ident)
            return found

        monkeypatch.setattr(Segments, "is_next", renamed)
        assert b"".join([piece async for piece in bench.queue.stream(entry)]) == LARGER_DATA


@pytest.mark.parametrize("first", [True, False], ids=["the name", "the file"])
async def test_a_sweep_amid_a_commit_leaves_its_file_alone(tmp_path, monkeypatch, first):
    async with Scanned(tmp_path) as bench:
        queue, begun, goes_on = bench.queue, threading.Event(), threading.Event()
        ident = await bench.store(LARGE_DATA)
        taken = await bench.take(ident)
        step = (Change, "finish") if first else (Segments, "take_place")
        real = getattr(*step)

        def slow(*arguments) -> None:
            begun.set()
            assert goes_on.wait(10)
            real(*arguments)

        monkeypatch.setattr(*step, slow)
        replacing = asyncio.create_task(bench.replace(taken, LARGER_DATA))
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
        await queue._readers.run(queue._big.sweep, -60)
        assert await bench.raw(ident) == (LARGE_DATA if first else LARGER_DATA)
        goes_on.set()
        await replacing
        taken.release()
        assert await bench.raw(ident) == LARGER_DATA
        assert bench.files == [f"{ident:016x}"]


async def test_a_sweep_renames_nothing_that_is_being_written(tmp_path, monkeypatch):
    """A file that was left is what its message has, when the sweep looks; and somebody else's before it is renamed."""
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(LARGE_DATA)
        with monkeypatch.context() as patched:
            patched.setattr(Segments, "take_place", lambda self, ident: None)
            await bench.replaced(ident, LARGER_DATA, UNSEEN)
        taken, made = await bench.take(ident), []
        is_astray = BigBodies._is_astray

        def looked_at(*arguments) -> bool:
            made.append(bench.file(taken))
            made[0].write([b"unfinished"])
            return is_astray(*arguments)

        monkeypatch.setattr(BigBodies, "_is_astray", looked_at)
        await bench.queue._readers.run(bench.queue._big.sweep, -60)
        assert await bench.raw(ident) == LARGER_DATA
        assert f"{ident:016x}.next" in bench.files
        made[0].discard()
        taken.release()
        assert await bench.raw(ident) == LARGER_DATA
        assert bench.files == [f"{ident:016x}"]


@pytest.mark.parametrize("committed", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("before", [SMALL_DATA, LARGE_DATA], ids=["small", "large"])
async def test_a_kill_around_the_commit_leaves_one_of_the_two(tmp_path, monkeypatch, before, committed):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(before)
        taken = await bench.take(ident)
        body = bench.body(taken, LARGER_DATA)
        if committed:
            monkeypatch.setattr(Segments, "take_place", lambda self, ident: None)
            await bench.queue.unseen.replaced(taken, changed(taken, LARGER_DATA, UNSEEN), body)
        await bench.copied(tmp_path / "copy")
        monkeypatch.undo()
        taken.release()
    expected = LARGER_DATA if committed else before
    assert b"".join(offline.answer(tmp_path / "copy", "raw", ident=format_id(ident))) == expected
    async with Scanned(tmp_path / "copy") as bench:
        assert await bench.raw(ident) == expected
        assert bench.files == ([f"{ident:016x}"] if len(expected) > BIG else [])


# A disk that refuses


class Refused(Exception):
    pass


def full(*_) -> None:
    raise lmdb.MapFullError("mdb_put: MDB_MAP_FULL")


def broken(*_) -> None:
    raise lmdb.DiskError("EIO")


def no_space(*_) -> None:
    raise OSError(28, "ENOSPC")


FAULTS = {"map": (Change, "finish", full), "lmdb": (Change, "finish", broken), "write": (Segments, "write", no_space),
          "sync": (Segments, "sync", no_space)}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("before", "after"), WAYS, ids=NAMES)
async def test_a_refused_replacement_changes_nothing(tmp_path, monkeypatch, before, after, fault):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(before, recipients=["a@x", "b@y"])
        was = bench.dump(), bench.files
        with monkeypatch.context() as patched:
            patched.setattr(*FAULTS[fault])
            taken = await bench.take(ident)
            for flags in (0, HELD, UNSEEN):
                with pytest.raises(StoreError):
                    await bench.replace(taken, after, flags, recipients=["c@z"])
                assert (bench.dump(), bench.files) == was
            assert await bench.raw(ident) == before
        await bench.replace(taken, after, HELD, recipients=["c@z"])
        taken.release()
        assert await bench.raw(ident) == after
        assert bench.files == ([f"{ident:016x}"] if len(after) > BIG else [])
        assert await bench.queue.change_messages("release", [ident]) == (1, 0)
        await bench.scan()
        (entry,) = bench.entries(ident)
        assert entry.recipients == [(0, "c@z")]
        bench.queue.finish(entry, None)
        await bench.empty()


@pytest.mark.parametrize("fault", ["map", "lmdb"])
@pytest.mark.parametrize("what", ["passed", "held", "waits", "dropped"])
async def test_a_refused_result_changes_nothing(tmp_path, monkeypatch, what, fault):
    rest = {"passed": (), "held": ("why", WHY, ["av"]), "waits": (["b"],), "dropped": ()}[what]
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(LARGE_DATA, recipients=["a@x", "b@y"])
        was = bench.dump(), bench.files
        taken = await bench.take(ident)
        with monkeypatch.context() as patched:
            patched.setattr(*FAULTS[fault])
            with pytest.raises(StoreError):
                await getattr(bench.queue.unseen, what)(taken, *rest)
            assert (bench.dump(), bench.files) == was
        taken.release()
        again = await bench.take(ident)
        await getattr(bench.queue.unseen, what)(again, *rest)
        again.release()
        assert bench.dump() != was[0]
        assert bench.descriptors == []


async def test_a_message_that_is_gone_is_not_replaced(tmp_path):
    """Whoever has it taken has claimed it; but a defect elsewhere must leave neither a message nor a file."""
    async with Scanned(tmp_path) as bench:
        for data in (SMALL_DATA, LARGE_DATA):
            ident = await bench.store(data)
            taken = await bench.take(ident)
            await bench.queue.unseen.dropped(taken)
            for after in (b"new", LARGER_DATA):
                with pytest.raises(StoreError, match="had left the queue before"):
                    await bench.replace(taken, after)
            for flagged in (bench.queue.unseen.passed(taken), bench.queue.unseen.waits(taken, ["x"])):
                await flagged
            taken.release()
        await bench.empty()
        await until(lambda: bench.files == [])


# Callers that are cancelled


async def _cancelled(make, steps: int) -> bool:
    """Begin, and cancel after so many iterations of the loop; whether it ended before."""
    task = asyncio.create_task(make())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return (await task) is not None
    return False


@pytest.mark.parametrize("data", [SMALL_DATA, LARGE_DATA], ids=["small", "large"])
async def test_a_cancelled_take_leaves_neither_a_claim_nor_a_descriptor(tmp_path, data):
    async with Scanned(tmp_path) as bench:
        ident, ended = await bench.store(data), 0

        async def take() -> bool:
            taken = await bench.queue.unseen.take(ident)
            if taken is None:
                return True
            taken.release()
            return True

        for steps in [*range(12), *range(12)]:
            ended += await _cancelled(take, steps)
            assert ident not in bench.queue.entries._claimed
        await bench.quiet()
        assert bench.descriptors == []
        taken = await bench.take(ident)
        taken.release()
        taken.release()
        assert bench.descriptors == []


async def test_a_take_that_is_cancelled_while_its_thread_opens_the_file_leaves_no_descriptor(tmp_path, monkeypatch):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(LARGE_DATA)
        opened, goes_on, real = threading.Event(), threading.Event(), Segments.open_big

        def slow(self, *arguments) -> int:
            opened.set()
            assert goes_on.wait(10)
            return real(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(Segments, "open_big", slow)
            task = asyncio.create_task(bench.queue.unseen.take(ident))
            await asyncio.get_running_loop().run_in_executor(None, opened.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ident not in bench.queue.entries._claimed
            goes_on.set()
            await bench.quiet()
        assert bench.descriptors == []


@pytest.mark.parametrize("what", ["passed", "held", "waits", "dropped", "replaced"])
async def test_whoever_is_cancelled_has_the_message_until_the_commit(tmp_path, monkeypatch, what):
    """Somebody else who took it meanwhile would look at what it is no more, and write into the file that is being committed."""
    async with Scanned(tmp_path) as bench:
        queue, begun, goes_on, real = bench.queue, threading.Event(), threading.Event(), Change.finish
        ident = await bench.store(LARGE_DATA)

        def slow(*arguments) -> None:
            begun.set()
            goes_on.wait(5)
            real(*arguments)

        monkeypatch.setattr(Change, "finish", slow)

        async def result() -> None:
            taken = await bench.take(ident)
            try:
                if what == "replaced":
                    await bench.replace(taken, LARGER_DATA, UNSEEN)
                else:
                    rest = {"held": ("why", WHY, []), "waits": (["b"],)}.get(what, ())
                    await getattr(queue.unseen, what)(taken, *rest)
            finally:
                taken.release()

        task = asyncio.create_task(result())
        await asyncio.get_running_loop().run_in_executor(None, begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.descriptors == []
        assert await queue.unseen.take(ident) is None
        assert await queue.change_messages("delete", [ident]) == (0, 1)
        goes_on.set()
        await until(lambda: ident not in queue.entries._claimed)
        if what in ("replaced", "waits"):
            assert await bench.raw(ident) == (LARGER_DATA if what == "replaced" else LARGE_DATA)
            again = await bench.take(ident)
            await bench.replace(again, LARGE_DATA)
            again.release()
        row = bench.row(ident)
        assert what == "dropped" if row is None else row.flags & HELD if what == "held" else not row.flags & UNSEEN
        assert bench.files == ([] if what == "dropped" else [f"{ident:016x}"])


@pytest.mark.parametrize("after", [b"new", LARGER_DATA], ids=["small", "large"])
async def test_a_replacement_that_is_cancelled_anywhere_leaves_one_of_the_two(tmp_path, after):
    async with Scanned(tmp_path) as bench:
        for steps in range(20):
            ident = await bench.store(LARGE_DATA)

            async def result(ident=ident) -> None:
                taken = await bench.take(ident)
                try:
                    await bench.replace(taken, after, HELD)
                finally:
                    taken.release()

            await _cancelled(result, steps)
            await bench.quiet()
            assert ident not in bench.queue.entries._claimed
            row = bench.row(ident)
            assert row is not None
            assert await bench.raw(ident) == (after if row.flags & HELD else LARGE_DATA)
            assert bench.files == ([f"{ident:016x}"] if row.size > BIG else [])
            assert await bench.queue.change_messages("delete", [ident]) == (1, 0)
        assert bench.descriptors == []
        assert bench.files == []


async def test_a_refusal_that_nobody_awaits_ends_the_claim(tmp_path, monkeypatch):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(LARGE_DATA)
        monkeypatch.setattr(Change, "finish", full)
        for what in ("passed", "replaced"):
            taken = await bench.take(ident)
            result = bench.queue.unseen.passed(taken) if what == "passed" else bench.replace(taken, LARGER_DATA)
            task = asyncio.create_task(result)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            taken.release()
            await bench.settled_whatever()
            await until(lambda: ident not in bench.queue.entries._claimed)
        assert bench.files == [f"{ident:016x}"]
        monkeypatch.undo()


# What operators and deadlines do meanwhile


async def moved(bench: Scanned, name: QueueName, to: str) -> None:
    chosen = Filter(queue=str(name))
    await bench.queue.move_queues(chosen, lambda *_: False, lambda was: QueueName(to, "", "", was.priority), False)


@pytest.mark.parametrize("when", ["before", "meanwhile", "twice"])
@pytest.mark.parametrize("after", [b"new", LARGER_DATA], ids=["small", "large"])
async def test_what_replaces_a_message_goes_where_its_queue_was_moved_to(tmp_path, when, after):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(SMALL_DATA)
        name = QueueName("mx", "d.example")
        if when == "twice":
            await moved(bench, name, "elsewhere")
            name = QueueName("elsewhere", "")
        if when == "before":
            await moved(bench, name, "away")
        taken = await bench.take(ident)
        if when != "before":
            await moved(bench, name, "away")
        await bench.replace(taken, after, recipients=["c@d.example", "e@f.example"])
        taken.release()
        ((place, _),) = await bench.queue.places(ident)
        assert str(place) == "away"
        await bench.scan()
        (entry,) = bench.entries(ident)
        assert (entry.name.route, entry.envelope.route) == ("away", "away")
        bench.queue.finish(entry, None)
        await bench.empty()


@pytest.mark.parametrize("after", [b"new", LARGER_DATA], ids=["small", "large"])
@pytest.mark.parametrize("what", ["replaced", "dropped", "passed", "held"])
async def test_recipients_that_have_ended_before_are_not_mailed(tmp_path, what, after):
    """Two entries of a message expire, or are bounced, and the process is killed between their two group commits."""
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(recipients=["a@x", "b@y", "c@x", "d@z"])
        with bench.queue.store.reading() as txn:
            entries = bench.queue.schedule.load(txn, ident)
        mark = bench.queue.entries.begin_reading()
        (first,) = (entry for entry in entries if entry.name.domain == "x")
        bench.queue.entries.adopt(first, mark)
        bench.queue.ends.end(first, {0: answer(PERMANENT), 2: answer(PERMANENT)})
        await bench.quiet()
        bench.queue.entries.end_reading(mark)
        assert len(bench.events.put) == 2  # and its DSN
        (dsn,) = bench.offered
        bench.queue.finish(dsn, None)
        await bench.quiet()
        taken = await bench.take(ident)
        assert taken.envelope.recipients == ["b@y", "d@z"]
        if what == "replaced":
            await bench.replace(taken, after)
        else:
            await getattr(bench.queue.unseen, what)(taken, *(("why", WHY, ["av"]) if what == "held" else ()))
        taken.release()
        if what == "held":
            assert await bench.queue.change_messages("release", [ident]) == (1, 0)
            await bench.replaced(ident, after)
        await bench.scan()
        sent = []
        for entry in bench.entries(ident):
            sent += [address for _, address in entry.recipients]
            bench.queue.finish(entry, None)
        assert sorted(sent) == ([] if what == "dropped" else ["b@y", "d@z"])
        await bench.empty()
        dump = bench.dump()
        assert [dump[table] for table in ("message", "recipient", "due", "expiry", "unseen", "held")] == [[]] * 6


@pytest.mark.parametrize("who", ["trusted", "genuine", "nobody", "null"])
@pytest.mark.parametrize("data", [SMALL_DATA, LARGE_DATA], ids=["small", "large"])
async def test_unseen_mail_that_expires(tmp_path, who, data):
    """A DSN where the sender is not forged, and to nobody else."""
    async with Scanned(tmp_path, max_age_ms=DAY) as bench:
        unseen = msgspec.structs.replace(WAITS, trusted=who in ("trusted", "null"), genuine=who == "genuine")
        sender = "" if who == "null" else "a@b.example"
        ident = await bench.store(data, unseen=unseen, recipients=["a@x", "b@y"], sender=sender)
        later = await bench.store(data, unseen=unseen, deadline=bench.queue.clock.now() + 3 * DAY)
        taken = await bench.take(ident)
        bench.pass_time(2 * DAY)
        await bench.expire()
        row = bench.row(ident)
        assert row is not None
        assert row.flags & UNSEEN, "not while filters look at it"
        taken.release()
        await bench.expire()
        await bench.expire()
        texts = [b" ".join(b"".join(put.data).split()) for put in bench.events.put if put.envelope.flags & DSN]
        row = bench.row(ident)
        if who == "nobody":
            assert row is not None
            assert (row.flags & (HELD | UNSEEN), row.held_for) == (HELD, BY_EXPIRY)
            assert texts == []
            assert (await bench.queue.message(ident))["state"] == "held"
            assert await bench.queue.change_messages("release", [ident]) == (1, 0)
            await bench.expire()
            row = bench.row(ident)
            assert row is not None
            assert row.flags & UNSEEN, "filters look at it first, and it has a new deadline"
        else:
            assert row is None
            addresses = [] if who == "null" else [b"<a@x>", b"<b@y>"]
            assert len(texts) == len(addresses)
            assert all(any(address in text for text in texts) for address in addresses)
            assert all(b"before filters had looked at it" in text and b"4.4.7" in text for text in texts)
        left = bench.row(later)
        assert left is not None
        assert left.flags & UNSEEN
        assert bench.offered == [] or {entry.envelope.sender for entry in bench.offered} == {""}


async def test_what_was_released_with_a_new_deadline_is_not_held_as_expired(tmp_path, monkeypatch):
    """It was overdue when the disk was read, but an operator came first."""
    async with Scanned(tmp_path, max_age_ms=DAY) as bench:
        ident = await bench.store()
        bench.pass_time(2 * DAY)
        overdue = await bench.queue._readers.run(bench.queue._expiry.overdue)
        mark = bench.queue.entries.begin_reading()
        assert await bench.queue.change_messages("hold", [ident]) == (1, 0)
        assert await bench.queue.change_messages("release", [ident]) == (1, 0)
        bench.queue._expiry.expire(overdue, mark)
        bench.queue.entries.end_reading(mark)
        await bench.quiet()
        row = bench.row(ident)
        assert row is not None
        assert row.flags & UNSEEN


async def test_an_expiry_that_the_disk_refuses_is_made_later(tmp_path, monkeypatch):
    async with Scanned(tmp_path) as bench:
        ident = await bench.store(deadline=1)
        with monkeypatch.context() as patched:
            patched.setattr(Change, "finish", full)
            bench.queue._readers.read_rows(bench.queue._expiry.overdue, bench.queue._expiry.expire)
            for _ in range(3):
                await bench.queue._readers.run(lambda: None)
                await bench.queue._changes.finished()
        assert ident not in bench.queue.entries._claimed
        await bench.expire()
        row = bench.row(ident)
        assert row is not None
        assert row.flags & HELD


# What older versions have written, and read


def schema(folder: Path) -> bytes:
    with lmdb.open(str(folder / "shard-0/lmdb"), max_dbs=16, readonly=True) as environment:
        table = environment.open_db(b"meta", create=False)
        with environment.begin() as txn:
            return bytes(txn.get(b"schema", db=table))


async def test_a_shard_is_refused_by_older_versions_once_there_was_unseen_mail(tmp_path, monkeypatch):
    async with Scanned(tmp_path) as bench:
        await bench.store(flags=0, unseen=None)
        await bench.store(flags=HELD, unseen=None, held_for="why")
    assert schema(tmp_path) == b"%d" % SCHEMA
    async with Scanned(tmp_path) as bench:
        with monkeypatch.context() as patched:
            patched.setattr(Change, "finish", full)
            with pytest.raises(AssertionError):
                await bench.store()
    assert schema(tmp_path) == b"%d" % SCHEMA
    async with Scanned(tmp_path) as bench:
        await bench.replaced(await bench.store(), b"new")
    async with Scanned(tmp_path) as bench:
        assert bench.queue.store.meta(b"schema") == SCHEMA_UNSEEN
    assert (schema(tmp_path), SCHEMA, SCHEMA_UNSEEN) == (b"3", 2, 3)
    monkeypatch.setattr("relaymta.queue.store.SCHEMA_UNSEEN", SCHEMA)  # as versions that do not know of it check it
    with pytest.raises(StoreError, match="was written by a newer relaymta"):
        Store(tmp_path / "shard-0/lmdb", readonly=True)


async def test_mail_that_filters_hold_is_refused_by_older_versions_as_well(tmp_path):
    """They would release it to nobody's filters."""
    async with Scanned(tmp_path) as bench:
        await bench.store(flags=HELD, held_for="why")
    assert schema(tmp_path) == b"3"


async def test_a_shard_of_an_older_version_opens(tmp_path):
    """It has no table of unseen mail, and neither envelopes nor queues have the new fields."""
    async with Scanned(tmp_path) as bench:
        idents = [await bench.store(data, flags=0, unseen=None) for data in (SMALL_DATA, LARGE_DATA)]
    with lmdb.open(str(tmp_path / "shard-0/lmdb"), max_dbs=16) as environment:
        tables = {name: environment.open_db(name, create=False) for name in (b"unseen", b"message", b"queue", b"fresh")}
        with environment.begin(write=True) as txn:
            txn.drop(tables[b"unseen"])
            for name in (b"message", b"queue"):
                for key, value in txn.cursor(db=tables[name]):
                    if name == b"message" or key[:1] == b"q":
                        row = msgspec.msgpack.decode(value)
                        txn.put(key, msgspec.msgpack.encode(row[:-1]), db=tables[name])
    for _ in range(2):
        rows = offline.answer(tmp_path, "summary")
        assert [(row["messages"], row["unseen"]) for row in rows] == [(2, 0)]
        found = offline.answer(tmp_path, "message", ident=format_id(idents[0]))
        assert (found["state"], found["unseen"]) == ("queued", [])
        assert b"".join(offline.answer(tmp_path, "raw", ident=format_id(idents[1]))) == LARGE_DATA
    async with Scanned(tmp_path) as bench:
        assert not await bench.queue.unseen.exist()
        await bench.scan()
        assert sorted({entry.ident for entry in bench.offered}) == idents
        ident = await bench.store()
        assert (await bench.queue.unseen.page(FIRST, 9, set(), NONE_DOWN)).idents == [ident]
    rows = offline.answer(tmp_path, "summary")
    assert [(row["messages"], row["unseen"]) for row in rows] == [(3, 1)]
    assert offline.answer(tmp_path, "message", ident=format_id(ident))["unseen"] == ["av"]


def test_envelopes_without_the_new_field_are_read():
    envelope = Envelope("a@b", ["c@d"], 1, HELD, 2, 3, "client", "helo", "app", "bulk", Body(1, 2, 3, 4))
    old = msgspec.msgpack.encode(msgspec.msgpack.decode(encode(envelope))[:-1])
    assert decode_envelope(old) == envelope
    newer = msgspec.structs.replace(envelope, flags=UNSEEN, unseen=WAITS)
    assert decode_envelope(encode(newer)) == newer


# A model


@dataclass(eq=False)
class Row:
    """A queue."""

    name: QueueName
    moved: bool = False


@dataclass(eq=False)
class Place:
    row: Row
    indexes: list[int]
    attempts: int = 0


@dataclass(eq=False)
class Mail:
    ident: int
    data: bytes
    sender: str
    recipients: list[str]
    priority: str
    deadline: int
    state: str  # due, held or unseen
    unseen: Unseen | None
    policy: bool = False
    route: str = ""
    places: list[Place] = field(default_factory=list)


DATA = [b"a\r\n", b"bb" * 500, b"c" * 2001, b"dd" * 3000, b"e" * 70_000]
PEOPLE = ["a@x.example", "b@x.example", "c@y.example", "d@z.example"]
ROUTES = ["r1", "r2", "r3"]
STEPS, RUNS = (400, 60) if PROVE else (60, 10)


class Model:
    """What a shard holds, as naively as possible, and random steps that are done in both. Nothing is in flight between steps."""

    def __init__(self, bench: Scanned, seed: int) -> None:
        self.bench = bench
        self.random = random.Random(seed)
        self.mail: dict[int, Mail] = {}
        self.taken: dict[int, Taken] = {}
        self.rows: dict[QueueName, Row] = {}
        self.told = 0  # DSNs in `bench.events.put` that it knows
        self.steps: list[str] = []
        self.copies = 0

    # The model

    def row(self, name: QueueName) -> Row:
        return self.rows.setdefault(name, Row(name))

    def placed(self, mail: Mail, pending: list[int] | None = None, attempts: int = 0) -> list[Place]:
        """Where `assign` puts it."""
        envelope = Envelope(mail.sender, mail.recipients, 0, 0, 0, 0, priority=mail.priority, route=mail.route)
        everyone = range(len(mail.recipients))
        found = []
        for name, indexes in assign(envelope, 0):
            own = [i for i in (everyone if indexes is None else indexes) if pending is None or i in pending]
            if own:
                found.append(Place(self.row(name), own, attempts))
        return found

    def add(self, mail: Mail) -> None:
        mail.places = self.placed(mail)
        self.mail[mail.ident] = mail

    def gone(self, mail: Mail) -> None:
        del self.mail[mail.ident]

    def adopt_dsns(self, expected: int) -> None:
        """The DSNs that have come."""
        new = [put for put in self.bench.events.put if put.envelope.flags & DSN][self.told :]
        assert len(new) == expected, (len(new), expected)
        self.told += len(new)
        for put in new:
            envelope = put.envelope
            data = b"".join(put.data)
            self.add(Mail(put.ident, data, "", envelope.recipients, "normal", envelope.deadline, "due", None))

    def pick(self, wanted=lambda mail: True) -> Mail | None:
        found = [mail for mail in self.mail.values() if wanted(mail)]
        return self.random.choice(found) if found else None

    # Steps

    async def step(self) -> None:
        steps = [
            (self.submit, 6), (self.take, 6), (self.result, 9), (self.operate, 9), (self.reroute, 2), (self.move, 1),
            (self.expire, 1), (self.compact, 2), (self.deliver, 3), (self.sweep, 1), (self.restart, 1), (self.kill, 1),
        ]  # fmt: skip
        step = self.random.choices([step for step, _ in steps], [weight for _, weight in steps])[0]
        if len(self.mail) > 14 and step == self.submit:
            step = self.take
        self.steps.append(step.__name__)
        await step()
        await self.bench.quiet()
        await self.check()

    async def submit(self) -> None:
        pick = self.random.choice
        kind = pick(["due", "unseen", "unseen", "unseen", "held"])
        unseen = None if kind == "due" else self.some_unseen()
        deadline = self.bench.queue.clock.now() + pick([600_000, 30 * DAY])
        mail = Mail(0, pick(DATA), pick(["s@s.example", ""]), self.some_people(), pick([*CLASSES]), deadline, kind, unseen)
        flags = {"due": 0, "unseen": UNSEEN, "held": HELD}[kind]
        mail.ident = await self.bench.store(
            mail.data, flags, unseen, sender=mail.sender, recipients=[*mail.recipients], priority=mail.priority,
            deadline=deadline, held_for="why" if kind == "held" else "",
        )  # fmt: skip
        self.add(mail)

    def some_unseen(self) -> Unseen:
        trusted, genuine = self.random.random() < 0.3, self.random.random() < 0.3
        return Unseen(self.random.sample(["av", "spam", "dlp"], self.random.randint(1, 3)), 0, 0, trusted, False, genuine)

    def some_people(self) -> list[str]:
        return self.random.sample(PEOPLE, self.random.randint(1, len(PEOPLE)))

    async def take(self) -> None:
        mail = self.pick(lambda mail: mail.state != "due")
        if mail is None:
            return
        taken = await self.bench.queue.unseen.take(mail.ident)
        assert (taken is not None) == (mail.state == "unseen" and mail.ident not in self.taken)
        if taken is not None:
            assert taken.is_large == (len(mail.data) > BIG)
            assert (taken.data or await taken.piece(0, 99_999)) == mail.data
            assert await taken.piece(3, 7) == mail.data[3:10] if taken.is_large else True
            self.taken[mail.ident] = taken

    async def result(self) -> None:
        if not self.taken:
            return
        ident = self.random.choice([*self.taken])
        taken, mail, unseen = self.taken.pop(ident), self.mail[ident], self.bench.queue.unseen
        assert mail.unseen is not None
        filters = self.random.sample(mail.unseen.filters, self.random.randint(0, len(mail.unseen.filters)))
        kind = self.random.choice(["passed", "held", "waits", "dropped", "replaced", "replaced", "replaced", "nothing"])
        self.steps[-1] += f" {kind}"
        if taken.is_large:
            assert await taken.piece(0, 99_999) == mail.data
        if self.random.random() < 0.2:
            await self.refused(taken)
        if kind == "passed":
            await unseen.passed(taken)
            mail.state, mail.unseen = "due", None
        elif kind == "held":
            await unseen.held(taken, "why", WHY, filters)
            mail.state, mail.unseen = "held", msgspec.structs.replace(mail.unseen, filters=filters) if filters else None
        elif kind == "waits":
            filters = filters or ["last"]
            await unseen.waits(taken, filters)
            mail.unseen = msgspec.structs.replace(mail.unseen, filters=filters)
        elif kind == "dropped":
            await unseen.dropped(taken)
            self.gone(mail)
        elif kind == "replaced":
            await self.replaced(taken, mail, filters)
        taken.release()

    async def refused(self, taken: Taken) -> None:
        """The disk refuses what has come of it, whatever that is."""
        unseen, data = self.bench.queue.unseen, self.random.choice(DATA)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(*FAULTS[self.random.choice(["map", "lmdb"])])
            for result in (
                unseen.passed(taken),
                unseen.held(taken, "w", WHY, []),
                unseen.dropped(taken),
                self.bench.replace(taken, data),
            ):
                with pytest.raises(StoreError):
                    await result
        await self.check({taken.ident: taken})

    async def replaced(self, taken: Taken, mail: Mail, filters: list[str]) -> None:
        pick = self.random.choice
        mail.state = pick(["due", "held", "unseen"])
        if mail.state == "unseen":
            filters = filters or ["last"]
        left = msgspec.structs.replace(mail.unseen, filters=filters) if filters and mail.state != "due" else None
        mail.unseen, mail.data, mail.priority = left, pick(DATA), pick([mail.priority, *CLASSES])
        mail.sender, mail.recipients = pick([mail.sender, "new@s.example"]), pick([mail.recipients, self.some_people()])
        await self.bench.replace(
            taken, mail.data, {"due": 0, "held": HELD, "unseen": UNSEEN}[mail.state], unseen=left, sender=mail.sender,
            recipients=[*mail.recipients], priority=mail.priority,
        )  # fmt: skip
        mail.route = next((place.row.name.route for place in mail.places if place.row.moved), mail.route)
        self.add(mail)

    async def operate(self) -> None:
        verb = self.random.choice(["hold", "release", "release", "policy", "release policy", "flush", "delete", "bounce"])
        many = [mail for mail in self.mail.values() if self.random.random() < (0.15 if verb in ("delete", "bounce") else 0.4)]
        self.steps[-1] += f" {verb} {len(many)}"
        idents = [mail.ident for mail in many]
        if verb != "bounce" and idents and self.random.random() < 0.1:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(*FAULTS["map"])
                with pytest.raises(StoreError):
                    await self.bench.queue.change_messages(verb, idents, "why")
            self.bench.queue.entries.wake(set(idents))
            await self.check()
        count = await self.bench.queue.change_messages(verb, idents, "why")
        free = [mail for mail in many if mail.ident not in self.taken]
        dsns, done = 0, 0
        for mail in free:
            before = mail.state, mail.policy
            if verb in ("delete", "bounce"):
                dsns += len(mail.places) if verb == "bounce" and mail.sender else 0
                self.gone(mail)
                done += 1
            elif verb in ("hold", "policy") and mail.state != "held":
                mail.state, mail.policy = "held", verb == "policy"
            elif verb == "hold" and mail.policy:
                mail.policy = False
            elif verb == "release" or (verb == "release policy" and mail.policy):
                if mail.state == "held":
                    self.release(mail)
            elif verb == "flush":
                done += mail.state == "due"
            done += before != (mail.state, mail.policy)
        assert count == (done, len(many) - len(free)), (verb, count, done)
        await self.bench.quiet()
        self.adopt_dsns(dsns)

    def release(self, mail: Mail) -> None:
        mail.state, mail.policy = "unseen" if mail.unseen is not None else "due", False
        mail.deadline = self.bench.queue.clock.now() + self.bench.settings.max_age_ms

    async def reroute(self) -> None:
        mail = self.pick()
        if mail is None:
            return
        route = self.random.choice(ROUTES)
        changed = await self.bench.queue.change_messages("reroute", [mail.ident], route)
        assert changed == ((0, 1) if mail.ident in self.taken else (1, 0))
        if mail.ident not in self.taken:
            mail.route = route
            pending = sorted({index for place in mail.places for index in place.indexes})
            mail.places = self.placed(mail, pending, max(place.attempts for place in mail.places))

    async def move(self) -> None:
        mail = self.pick()
        if mail is None:
            return
        name, to = self.random.choice(mail.places).row.name, self.random.choice(ROUTES)
        await moved(self.bench, name, to)
        after = QueueName(to, "", "", name.priority)
        for row in {place.row for other in self.mail.values() for place in other.places if place.row.name == name}:
            row.name, row.moved = after, True
        self.rows.pop(name, None)

    async def expire(self) -> None:
        self.bench.pass_time(3_600_000)
        self.bench.queue._materialize(self.bench.queue.store.fresh.came_by(1 << 63))  # which have no deadline before
        await self.bench.quiet()
        now = self.bench.queue.clock.now()
        await self.bench.expire()
        dsns = 0
        for mail in [*self.mail.values()]:
            if mail.deadline > now or mail.state == "held" or mail.ident in self.taken:
                continue
            unseen = mail.unseen
            if mail.state == "unseen" and unseen is not None and not (unseen.trusted or unseen.genuine):
                mail.state = "held"
            else:
                dsns += len(mail.places) if mail.sender else 0
                self.gone(mail)
        self.adopt_dsns(dsns)

    async def compact(self) -> None:
        """Move a body, as compaction does."""
        mail = self.pick(lambda mail: len(mail.data) <= BIG)
        row = None if mail is None else self.bench.row(mail.ident)
        if mail is None or row is None or row.body is None:
            return
        done = asyncio.get_running_loop().create_future()
        self.bench.queue.writer.submit(Move(mail.ident, row.body, mail.data, done.set_result))
        found = await done
        assert found.error is None
        assert found.body is not None

    async def deliver(self) -> None:
        """Try what is offered: nothing else is due; it ends, or is tried again later."""
        bench = self.bench
        await bench.scan()
        for entry in self.random.sample(bench.offered, min(3, len(bench.offered))):
            bench.offered.remove(entry)
            if not bench.queue.begin(entry):
                continue
            mail = self.mail[entry.ident]
            assert mail.state == "due"
            (place,) = (
                place for place in mail.places if place.row.name == entry.name and place.indexes[0] in dict(entry.recipients)
            )
            assert [index for index, _ in entry.recipients] == place.indexes
            assert [address for _, address in entry.recipients] == [mail.recipients[index] for index in place.indexes]
            if len(mail.data) <= BIG:
                assert b"".join((await bench.queue.read([entry]))[0]) == mail.data
            else:
                assert b"".join([piece async for piece in bench.queue.stream(entry)]) == mail.data
            domains = {
                address.partition("@")[2] for address in mail.recipients
            }  # of several, an entry may not know its last route
            if len(domains) > 1 or self.random.random() < 0.5:
                bench.queue.finish(entry, None)
                await bench.quiet()
                self.ended(mail, place)
            else:
                results = {index: answer(TRANSIENT) for index in place.indexes}
                overdue = mail.deadline <= bench.queue.clock.now()
                bench.queue.finish(entry, results, DAY)
                await bench.quiet()
                if overdue:
                    self.ended(mail, place)
                    self.adopt_dsns(1 if mail.sender else 0)
                else:
                    self.deferred(mail, place)

    def ended(self, mail: Mail, place: Place) -> None:
        if place.row.moved:
            mail.route = place.row.name.route
        mail.places.remove(place)
        if not mail.places:
            self.gone(mail)

    def deferred(self, mail: Mail, place: Place) -> None:
        if place.row.moved:
            mail.route = place.row.name.route
        mail.places.remove(place)
        envelope = Envelope("", mail.recipients, 0, 0, 0, 0, priority=mail.priority, route=mail.route)
        name = next(name for name, indexes in assign(envelope, 0) if indexes is None or place.indexes[0] in indexes)
        row = self.row(name)
        again = Place(row, place.indexes, place.attempts + 1)
        for same in [other for other in mail.places if other.row is row]:
            mail.places.remove(same)
            again = Place(row, sorted({*again.indexes, *same.indexes}), max(again.attempts, same.attempts))
        mail.places.append(again)

    async def sweep(self) -> None:
        await self.bench.queue._readers.run(self.bench.queue._big.sweep, self.random.choice([-60, 3600]))
        await self.bench.queue.task(lambda change: change.sweep())
        used = {id(place.row) for mail in self.mail.values() for place in mail.places}
        self.rows = {name: row for name, row in self.rows.items() if id(row) in used}

    async def restart(self) -> None:
        bench = self.bench
        await bench.queue.stop()
        self.let_go()
        await self.opened()

    async def kill(self) -> None:
        """What is on the disk now is all that is left."""
        bench, self.copies = self.bench, self.copies + 1
        folder = bench.folder.parent / f"{self.copies}"
        await bench.copied(folder)
        await bench.queue.stop()
        self.let_go()
        shutil.rmtree(bench.folder)
        bench.folder = folder
        await self.opened()

    def let_go(self) -> None:
        """Whoever has messages taken ends."""
        for taken in self.taken.values():
            taken.release()
        self.taken.clear()
        assert self.bench.descriptors == []

    async def opened(self) -> None:
        self.bench.offered.clear()
        await self.bench.__aenter__()
        self.bench.queue.clock.resumed = 0

    # Whether both say the same

    async def check(self, also: dict[int, Taken] = {}) -> None:  # noqa: B006  # nobody changes it
        """`also`: taken, too."""
        taken = self.taken | also
        bench, store = self.bench, self.bench.queue.store
        with store.reading() as txn:
            envelopes = dict(store.idents(txn, 0, store.fresh.live()))
            inlined = {ident for ident, _ in store.fresh.live()}
            rows = {row.number: row for row in store.queues(txn)}
            keys = {
                name: [bytes(key) for key in txn.cursor(db=table).iternext(values=False)] for name, table in store.tables.items()
            }
        assert envelopes.keys() == self.mail.keys()
        due, held, expiry, unseen = set(), set(), set(), set()
        for ident, mail in self.mail.items():
            envelope = envelopes[ident]
            self.check_envelope(mail, envelope, rows)
            assert await bench.raw(ident) == mail.data
            told = await bench.queue.message(ident)
            deferred = any(place.attempts for place in mail.places)
            assert told["state"] == (mail.state if mail.state != "due" else "deferred" if deferred else "queued")
            assert told["unseen"] == ([] if mail.unseen is None else mail.unseen.filters)
            if ident in inlined:
                assert mail.state == "due"
                continue
            for place in envelope.placements:
                if mail.state == "due":
                    due.add(DUE.pack(place.queue, place.due, ident))
                elif mail.state == "held":
                    held.add(HELD_KEY.pack(place.queue, ident))
            if mail.state != "held":
                expiry.add(EXPIRY.pack(envelope.deadline, ident))
            if mail.state == "unseen":
                unseen.add(UNSEEN_KEY.pack(CLASSES[mail.priority], ident))
        for table, found in (("due", due), ("held", held), ("expiry", expiry), ("unseen", unseen)):
            assert set(keys[table]) == found, table
        awake = {WAKE.unpack(key)[1] for key in keys["wake"]}
        assert awake == {DUE.unpack(key)[0] for key in due}
        assert {key[:8] for key in keys["recipient"]} <= {ident.to_bytes(8, "big") for ident in self.mail}
        page = await bench.queue.unseen.page(FIRST, 99, set(), NONE_DOWN)
        assert [*page.idents] == [UNSEEN_KEY.unpack(key)[1] for key in sorted(unseen)]
        assert page.empty == (not unseen)
        self.check_counts()
        large = {f"{ident:016x}" for ident, mail in self.mail.items() if len(mail.data) > BIG}
        assert set(bench.files) == large
        assert len(bench.descriptors) == sum(one.is_large for one in taken.values())
        assert bench.queue.entries._claimed == taken.keys()
        assert {entry.ident for entry in bench.offered if entry.waiting} <= {i for i, m in self.mail.items() if m.state == "due"}
        live = sum(row.live for row in store.segments().values())
        assert live == sum(len(mail.data) <= BIG for mail in self.mail.values())
        assert bench.events.refusals == []
        assert bench.events.failures == []

    def check_envelope(self, mail: Mail, envelope: Envelope, rows: dict) -> None:
        flags = {"due": 0, "held": HELD, "unseen": UNSEEN}[mail.state] | (POLICY_HELD if mail.policy else 0)
        assert (envelope.flags & ~DSN & ~1) == flags
        assert (envelope.sender, envelope.recipients, envelope.size) == (mail.sender, mail.recipients, len(mail.data))
        assert (envelope.priority, envelope.route, envelope.unseen) == (mail.priority, mail.route, mail.unseen)
        assert bool(envelope.held_for) == (mail.state == "held")
        assert abs(envelope.deadline - mail.deadline) < 60_000
        everyone = list(range(len(mail.recipients)))
        found = sorted(
            (str(rows[p.queue].name), p.indexes if p.indexes is not None else everyone, p.attempts) for p in envelope.placements
        )
        assert found == sorted((str(place.row.name), place.indexes, place.attempts) for place in mail.places)

    def check_counts(self) -> None:
        counts: dict[str, Counter[str]] = {}
        for mail in self.mail.values():
            for place in mail.places:
                found = counts.setdefault(str(place.row.name), Counter())
                found["messages"] += 1
                found["bytes"] += len(mail.data)
                found["deferred"] += place.attempts > 0
                found["held"] += mail.state == "held"
                found["unseen"] += mail.state == "unseen"
        seen: dict[str, Counter[str]] = {}
        for row in self.bench.summary():
            found = seen.setdefault(row["queue"], Counter())
            for key in ("messages", "bytes", "deferred", "held", "unseen"):
                found[key] += row[key]
        assert seen == counts

    async def finish(self) -> None:
        """Each message is seen, released and offered, once."""
        for taken in self.taken.values():
            await self.bench.queue.unseen.passed(taken)
            self.mail[taken.ident].state, self.mail[taken.ident].unseen = "due", None
        self.let_go()
        idents = [*self.mail]
        await self.bench.queue.change_messages("release", idents)
        for mail in self.mail.values():
            if mail.state == "held":
                self.release(mail)
            if mail.state == "unseen":
                taken = await self.bench.take(mail.ident)
                await self.bench.queue.unseen.passed(taken)
                taken.release()
                mail.state, mail.unseen = "due", None
        await self.check()
        await self.bench.queue.change_messages("flush", idents)
        await self.bench.scan()
        offered = [entry for entry in self.bench.offered if self.bench.queue.begin(entry)]
        found = Counter((entry.ident, index) for entry in offered for index, _ in entry.recipients)
        assert found == Counter((mail.ident, i) for mail in self.mail.values() for place in mail.places for i in place.indexes)
        for entry in offered:
            self.bench.queue.finish(entry, None)
        await self.bench.empty()
        await until(lambda: self.bench.files == [])


@pytest.mark.parametrize("seed", range(RUNS))
async def test_a_shard_says_what_a_naive_model_says(tmp_path, seed):
    bench = Scanned(tmp_path / "0")
    bench.events = Witness()
    await bench.__aenter__()
    model = Model(bench, seed)
    try:
        for _ in range(STEPS):
            await model.step()
        await model.finish()
    except BaseException:
        print(seed, model.steps[-30:])
        raise
    finally:
        model.let_go()
        await bench.queue.stop()


# All of it at once


class Storm:
    """Filters, operators, delivery, deadlines and compaction, all at work together; filters are cancelled now and then."""

    def __init__(self, bench: Scanned, seed: int) -> None:
        self.bench, self.random = bench, random.Random(seed)
        self.versions: dict[int, set[bytes]] = {}  # what a message may be
        self.released: set[int] = set()  # what may be offered: a result that says so has begun
        self.ended: Counter[int] = Counter()
        self.busy = True

    def data(self, ident: int) -> bytes:
        """Another version of a message."""
        found = b"%016x " % ident + self.random.randbytes(4).hex().encode() * self.random.choice([1, 600])
        self.versions.setdefault(ident, set()).add(found)
        return found

    async def submit(self) -> None:
        for _ in range(40):
            ident = self.bench.queue.ident()
            data = self.data(ident)
            unseen = msgspec.structs.replace(WAITS, trusted=True)
            deadline = self.bench.queue.clock.now() + self.random.choice([60, 3 * DAY, 3 * DAY, 3 * DAY])
            self.bench.queue.ident = lambda ident=ident: ident
            stored = self.bench.store(data, unseen=unseen, deadline=deadline, sender="", recipients=["a@x"])
            storing = asyncio.ensure_future(stored)
            await asyncio.sleep(0)
            del self.bench.queue.ident
            await storing

    async def filters(self) -> None:
        while self.busy:
            page = await self.bench.queue.unseen.page(FIRST, 20, set(), NONE_DOWN)
            scans = [asyncio.create_task(self.scan(ident)) for ident in page.idents]
            for scan in scans:
                if self.random.random() < 0.2:
                    for _ in range(self.random.randint(0, 6)):
                        await asyncio.sleep(0)
                    scan.cancel()
            await asyncio.gather(*scans, return_exceptions=True)
            for scan in scans:
                if not scan.cancelled() and scan.exception() is not None:
                    raise scan.exception()
            await asyncio.sleep(0.001)

    async def scan(self, ident: int) -> None:
        unseen = self.bench.queue.unseen
        taken = await unseen.take(ident)
        if taken is None:
            return
        try:
            data = taken.data or await taken.piece(0, 99_999)
            assert data in self.versions[ident]
            what = self.random.choice(["passed", "held", "waits", "dropped", "replaced", "replaced", "replaced", "nothing"])
            if what == "passed":
                self.released.add(ident)
                await unseen.passed(taken)
            elif what == "held":
                await unseen.held(taken, "why", WHY, self.random.choice([[], ["av"]]))
            elif what == "waits":
                await unseen.waits(taken, ["other"])
            elif what == "dropped":
                await unseen.dropped(taken)
            elif what == "replaced":
                flags = self.random.choice([0, HELD, UNSEEN, UNSEEN])
                if not flags:
                    self.released.add(ident)
                await self.bench.replace(taken, self.data(ident), flags)
        finally:
            taken.release()

    async def operators(self) -> None:
        verbs = ["hold", "release", "release", "policy", "release policy", "flush", "reroute", "delete", "bounce", "move"]
        while self.busy:
            verb, idents = self.random.choice(verbs), [*self.versions]
            many = self.random.sample(idents, min(len(idents), 2 if verb in ("delete", "bounce") else 15))
            if verb == "release":  # of those that filters have held for good
                self.released |= {i for i in many if (row := self.bench.row(i)) is not None and row.unseen is None}
            if verb == "move":
                await moved(self.bench, QueueName("mx", "x"), "r1")
            else:
                await self.bench.queue.change_messages(verb, many, "r2")
            await asyncio.sleep(0.001)

    async def delivery(self) -> None:
        bench = self.bench
        while self.busy or bench.offered:
            await bench.scan()
            offered, bench.offered[:] = [*bench.offered], []
            for entry in offered:
                if bench.queue.begin(entry):
                    assert entry.ident in self.released
                    assert await self.read(entry) in self.versions[entry.ident]
                    self.ended[entry.ident] += 1
                    bench.queue.finish(entry, None)
            await asyncio.sleep(0.001)

    async def read(self, entry) -> bytes:
        if entry.envelope.size > BIG:
            return b"".join([piece async for piece in self.bench.queue.stream(entry)])
        (found,) = await self.bench.queue.read([entry])
        assert isinstance(found, list), found
        return b"".join(found)

    async def others(self) -> None:
        queue = self.bench.queue
        while self.busy:
            queue._readers.read_rows(queue._expiry.overdue, queue._expiry.expire)
            queue._readers.start(lambda: queue._big.sweep(0.1), lambda result: None)
            for ident in self.random.sample([*self.versions], min(5, len(self.versions))):
                row = self.bench.row(ident)
                if row is not None and row.body is not None and row.body.segment:
                    with contextlib.suppress(StoreError):  # it has moved or ended
                        data = queue.segments.read(ident, row.body)
                        queue.writer.submit(Move(ident, row.body, data, lambda move: None))
            for ident in self.random.sample([*self.versions], min(5, len(self.versions))):
                assert await self.bench.raw(ident) in self.versions[ident] | {b""}
            await asyncio.sleep(0.002)

    async def run(self) -> None:
        works = [asyncio.create_task(work()) for work in (self.filters, self.operators, self.delivery, self.others)]
        await self.submit()
        await asyncio.wait(works, timeout=1.0 if PROVE else 0.2, return_when=asyncio.FIRST_EXCEPTION)
        self.busy = False
        await asyncio.gather(*works)
        await self.bench.quiet()


@pytest.mark.parametrize("seed", range(60 if PROVE else 3))
async def test_all_at_once_loses_and_doubles_nothing(tmp_path, seed):
    async with Scanned(tmp_path) as bench:
        storm = Storm(bench, seed)
        await storm.run()
        assert max(storm.ended.values(), default=0) <= 1
        assert bench.events.refusals == []
        assert bench.events.failures == []
        model = Model(bench, seed)
        with bench.queue.store.reading() as txn:
            left = dict(bench.queue.store.idents(txn, 0, bench.queue.store.fresh.live()))
            rows = {row.number: Row(row.name, row.moved) for row in bench.queue.store.queues(txn)}
        assert not left.keys() & storm.ended.keys()
        for ident, envelope in left.items():
            state = "held" if envelope.flags & HELD else "unseen" if envelope.flags & UNSEEN else "due"
            model.mail[ident] = Mail(
                ident, await bench.raw(ident), "", ["a@x"], envelope.priority, envelope.deadline, state, envelope.unseen,
                bool(envelope.flags & POLICY_HELD), envelope.route,
                [Place(rows[place.queue], place.indexes or [0], place.attempts) for place in envelope.placements],
            )  # fmt: skip
            assert model.mail[ident].data in storm.versions[ident]
        await model.check()
        await model.finish()
