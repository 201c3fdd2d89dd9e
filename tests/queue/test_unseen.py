"""Messages in the queue that filters have not looked at: in no state of the store is one due, lost, or there twice."""

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from relaymta.errors import StoreError
from relaymta.proto.envelope import BY_EXPIRY, HELD, UNSEEN, Body, Envelope, Quarantine, Unseen, decode_envelope, encode
from relaymta.queue import inspect, offline, wall_ms
from relaymta.queue.store import ID, Store
from relaymta.queue.unseen import FIRST, Taken
from tests.conftest import PROVE
from tests.queue.test_queue import Bench, until

SMALL, LARGE = 100, 1_300_000
WHY = Quarantine(1, "filter av", "why", None, "", True)
NOBODY = (frozenset[str](), frozenset[str]())


def body_of(octets: int, mark: int) -> bytes:
    head = b"Subject: %d\r\n\r\n" % mark
    return head + bytes([65 + mark % 26]) * (octets - len(head))


class Unlooked(Bench):
    """A queue into which unseen messages are put."""

    async def unseen(
        self, octets: int = SMALL, flags: int = UNSEEN, filters: tuple[str, ...] = ("one",),
        to: tuple[str, ...] = ("c@d.example",), priority: str = "normal", trusted: bool = True, genuine: bool = False,
    ) -> tuple[int, bytes]:  # fmt: skip
        ident = self.queue.ident()
        data = body_of(octets, ident % 1000)
        unseen = Unseen([*filters], 0, 0, trusted, False, genuine)
        envelope = Envelope(
            "a@b.example", [*to], len(data), flags, wall_ms(), self.queue.deadline(), priority=priority, unseen=unseen,
            held_for="for a test" if flags & HELD else "",
        )  # fmt: skip
        done = asyncio.get_running_loop().create_future()
        stored: Any = [data]
        if octets > self.queue.big_limit:
            file = self.queue.big_body(ident)
            file.write(stored)
            stored = file.finish([])
        self.queue.submit(ident, envelope, stored, done.set_result)
        assert await done is None
        return ident, data

    async def taken(self, ident: int) -> Taken:
        found = await self.queue.unseen.take(ident)
        assert found is not None
        return found

    async def replace(self, taken: Taken, data: bytes, **fields: Any) -> None:
        """`fields`: of the envelope."""
        stored: list[bytes] | Body = [data]
        if len(data) > self.queue.big_limit:
            file = self.queue.unseen.big_body(taken, self.queue.ident(), 10)
            file.write([data])
            self.queue.unseen.become(taken, file)
            stored = file.finish([])
        envelope = msgspec.structs.replace(taken.envelope, size=len(data), placements=[], **fields)
        await self.queue.unseen.replaced(taken, envelope, stored)

    async def raw(self, ident: int) -> bytes:
        return b"".join([piece async for piece in self.queue.raw(ident)])

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "shard-0/bodies/big").iterdir()}

    def rows(self) -> dict[int, Envelope]:
        store = self.queue.store
        with store.reading() as txn:
            return dict(store.idents(txn, 0, store.fresh.live()))

    def check(self, expected: dict[int, tuple[str, int]]) -> None:
        """The store has these messages: their state and octets; and every table says the same."""
        store, rows = self.queue.store, self.rows()
        fresh = {ident for ident, _ in store.fresh.live()}
        with store.reading() as txn:
            unseen = {ident: names for (_, ident), (_, names) in store.unseen(txn)}
            expiring = {ident for _, ident in store.expiries(txn)}
            due = {ident for queue in store.queues(txn) for _, ident in store.due(txn, queue.number)}
            held = {ident for queue in store.queues(txn) for ident in store.held(txn, queue.number)}
        state = {
            ident: ("held" if one.flags & HELD else "unseen" if one.flags & UNSEEN else "due", one.size)
            for ident, one in rows.items()
        }
        assert state == expected
        for word, table in (("unseen", set(unseen)), ("due", due | fresh), ("held", held)):
            assert table == {ident for ident, (is_, _) in expected.items() if is_ == word}, word
        assert expiring | fresh == {ident for ident, (is_, _) in expected.items() if is_ != "held"}
        assert all(rows[ident].unseen is not None and rows[ident].unseen.filters == names for ident, names in unseen.items())
        summary = self.summary()
        for word in ("held", "unseen"):
            places = sum(len(rows[ident].placements) for ident, (is_, _) in expected.items() if is_ == word)
            assert sum(row[word] for row in summary) == places
        assert sum(row["messages"] for row in summary) == sum(len(one.placements) for one in rows.values())
        assert sum(row["bytes"] for row in summary) == sum(len(one.placements) * one.size for one in rows.values())
        big = {f"{ident:016x}" for ident, one in rows.items() if one.body is not None and not one.body.segment}
        assert self.files() == big
        assert {entry.ident for entry in self.offered if entry.waiting} <= due | fresh


async def _step(bench: Unlooked, rng: random.Random, model: dict[int, tuple[str, int]], texts: dict[int, bytes]) -> None:
    """Something happens to a message, or one comes."""
    waiting = [ident for ident, (state, _) in model.items() if state == "unseen"]
    octets = rng.choice([SMALL, SMALL, LARGE])
    if not waiting or rng.random() < 0.3:
        flags = rng.choice([UNSEEN, UNSEEN, HELD])
        to = rng.choice([("c@d.example",), ("c@d.example", "e@f.example")])
        ident, texts[ident] = await bench.unseen(octets, flags, ("one", "two"), to, rng.choice(["express", "normal", "bulk"]))
        model[ident] = "held" if flags == HELD else "unseen", octets
        return
    if rng.random() < 0.3:
        ident = rng.choice([*model])
        verb = rng.choice(["hold", "release", "flush", "reroute", "delete"])
        changed, _ = await bench.queue.change_messages(verb, [ident], "elsewhere" if verb == "reroute" else "")
        seen = bench.rows().get(ident)
        if verb == "delete" and changed:
            del model[ident]
        elif changed and verb in ("hold", "release"):
            after = "held" if verb == "hold" else "due" if seen is None or seen.unseen is None else "unseen"
            model[ident] = after, model[ident][1]
        return
    ident = rng.choice(waiting)
    taken = await bench.taken(ident)
    assert (taken.data or await taken.piece(0, 1 << 30)) == texts[ident]
    what, left = rng.choice(["passed", "held", "waits", "dropped", "replaced", "nothing"]), rng.choice([[], ["two"]])
    assert await bench.queue.change_messages("delete", [ident]) == (0, 1), "whoever has it has claimed it"
    try:
        if what == "passed":
            await bench.queue.unseen.passed(taken)
            model[ident] = "due", model[ident][1]
        elif what == "held":
            await bench.queue.unseen.held(taken, "why", WHY, left)
            model[ident] = "held", model[ident][1]
        elif what == "waits":
            await bench.queue.unseen.waits(taken, ["two"])
        elif what == "dropped":
            await bench.queue.unseen.dropped(taken)
            del model[ident]
        elif what == "replaced":
            state = rng.choice(["due", "held", "unseen"])
            flags = {"due": 0, "held": HELD, "unseen": UNSEEN}[state]
            still = msgspec.structs.replace(taken.envelope.unseen, filters=["two"]) if state != "due" else None
            texts[ident] = body_of(octets, rng.randrange(1000))
            await bench.replace(taken, texts[ident], flags=flags, unseen=still, recipients=["x@d.example"])
            model[ident] = state, octets
    finally:
        taken.release()


@pytest.mark.parametrize("seed", range(40 if PROVE else 5))
async def test_against_a_plain_account(tmp_path, seed):
    rng, model, texts = random.Random(seed), dict[int, tuple[str, int]](), dict[int, bytes]()
    for _ in range(4):  # a stop, and another start, in between
        async with Unlooked(tmp_path) as bench:
            for _ in range(15):
                await _step(bench, rng, model, texts)
                bench.check(model)
            for ident in model:
                assert await bench.raw(ident) == texts[ident]


async def _killed(bench: Unlooked, folder: Path) -> None:
    """The files as kill -9 leaves them now."""
    await until(lambda: not bench.queue.writer._busy and not bench.queue.writer._pending)
    shutil.copytree(bench.folder, folder)


@pytest.mark.parametrize("before", [SMALL, LARGE])
async def test_a_kill_at_each_step_of_another_large_body(tmp_path, monkeypatch, before):
    """Before the commit the message is what it was; behind it, also before its file has its name, what it is to be."""
    new = body_of(LARGE + 7, 3)
    async with Unlooked(tmp_path / "a") as bench:
        ident, old = await bench.unseen(before)
        taken = await bench.taken(ident)
        file = bench.queue.unseen.big_body(taken, bench.queue.ident(), 10)
        file.write([new])
        await _killed(bench, tmp_path / "b")
        bench.queue.unseen.become(taken, file)
        body = file.finish([])
        await _killed(bench, tmp_path / "c")
        monkeypatch.setattr(bench.queue.segments, "take_place", lambda ident: None)
        envelope = msgspec.structs.replace(taken.envelope, size=len(new), placements=[], flags=0, unseen=None)
        await bench.queue.unseen.replaced(taken, envelope, body)
        assert await bench.raw(ident) == new, "whatever name it has"
        await _killed(bench, tmp_path / "d")
        bench.queue._big.sweep(0)
        assert await bench.raw(ident) == new
    for name, state, data in (("b", "unseen", old), ("c", "unseen", old), ("d", "due", new)):
        async with Unlooked(tmp_path / name) as bench:
            bench.check({ident: (state, len(data))})
            assert await bench.raw(ident) == data


async def test_a_file_that_cannot_be_renamed_is_read_where_it_is_and_renamed_later(tmp_path, monkeypatch):
    new = body_of(LARGE + 7, 3)
    async with Unlooked(tmp_path) as bench:
        ident, _ = await bench.unseen(LARGE)
        import relaymta.disk.segments as segments

        real = segments.os.replace
        monkeypatch.setattr(segments.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "EIO")))
        await bench.replace(await bench.taken(ident), new, flags=0, unseen=None)
        assert await bench.raw(ident) == new and len(bench.files()) == 2
        monkeypatch.setattr(segments.os, "replace", real)
        bench.queue._big.sweep(0)
        bench.check({ident: ("due", len(new))})
        assert await bench.raw(ident) == new


@pytest.mark.parametrize("octets", [SMALL, LARGE])
async def test_what_the_disk_refuses_leaves_the_message_as_it_was(tmp_path, monkeypatch, octets):
    async with Unlooked(tmp_path) as bench:
        ident, data = await bench.unseen(SMALL)
        taken = await bench.taken(ident)
        monkeypatch.setattr(bench.queue.writer, "_begin", lambda: (_ for _ in ()).throw(OSError(28, "ENOSPC")))
        with pytest.raises(StoreError):
            await bench.replace(taken, body_of(octets, 3), flags=0, unseen=None)
        taken.release()
        monkeypatch.undo()
        bench.check({ident: ("unseen", SMALL)})
        assert await bench.raw(ident) == data
        await bench.replace(await bench.taken(ident), body_of(octets, 3), flags=0, unseen=None)
        bench.check({ident: ("due", octets)})


async def test_who_hangs_up_while_a_message_is_read_leaves_nothing(tmp_path):
    async with Unlooked(tmp_path) as bench:
        ident, _ = await bench.unseen(LARGE)
        for pause in range(8):
            task = asyncio.get_running_loop().create_task(bench.queue.unseen.take(ident))
            for _ in range(pause):
                await asyncio.sleep(0)
            task.cancel()
            [found] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(found, Taken):
                found.release()
        (await bench.taken(ident)).release()
        path = str(bench.folder / "shard-0/bodies/big")
        await until(lambda: not [fd for fd in Path("/proc/self/fd").iterdir() if str(_link(fd)).startswith(path)])


def _link(fd: Path) -> Path:
    try:
        return fd.readlink()
    except OSError:
        return Path()


async def test_express_mail_first_and_the_oldest_of_each_class(tmp_path):
    async with Unlooked(tmp_path) as bench:
        order = {}
        for priority in ("bulk", "normal", "express", "normal", "express"):
            ident, _ = await bench.unseen(priority=priority)
            order.setdefault(priority, []).append(ident)
        found = await bench.queue.unseen.page(FIRST, 10, set(), NOBODY)
        assert found.idents == order["express"] + order["normal"] + order["bulk"] and not found.empty
        down = frozenset({"one"}), frozenset[str]()
        assert (await bench.queue.unseen.page(FIRST, 10, {found.idents[0]}, down)).idents == found.idents[1:]
        assert (await bench.queue.unseen.page(FIRST, 10, set(), (down[0], down[0]))).idents == []


@pytest.mark.parametrize(("trusted", "genuine"), [(True, False), (False, True), (False, False)])
async def test_the_deadline_holds_and_no_forged_sender_gets_a_dsn(tmp_path, trusted, genuine):
    async with Unlooked(tmp_path, max_age_ms=600_000) as bench:
        ident, _ = await bench.unseen(trusted=trusted, genuine=genuine)
        bench.pass_time(600_001)
        if trusted or genuine:
            await until(lambda: [put for put in bench.events.put if put.envelope.sender == ""])
            assert ident not in bench.rows()
        else:
            await until(lambda: bench.rows()[ident].flags & HELD)
            assert bench.rows()[ident].held_for == BY_EXPIRY
            bench.check({ident: ("held", SMALL)})


async def test_a_shard_without_such_mail_is_one_for_older_versions_and_one_with_it_is_not(tmp_path):
    async with Unlooked(tmp_path) as bench:
        await bench.put()
        bench.offered.clear()
        assert bench.queue.store.meta(b"schema") == 2
        await bench.unseen()
        assert bench.queue.store.meta(b"schema") == 3
        assert inspect.totals(bench.queue.store, bench.queue.segments, bench.queue.clock).unseen == 1
    async with Unlooked(tmp_path) as bench:
        assert bench.queue.store.meta(b"schema") == 3


async def test_what_an_older_version_has_written_is_read(tmp_path):
    """Without the table, and envelopes without the field; also read only."""
    async with Unlooked(tmp_path) as bench:
        ident = await bench.put()
    store = Store(tmp_path / "shard-0/lmdb")
    with store.env.begin(write=True) as txn:
        raw = msgspec.msgpack.decode(txn.get(ID.pack(ident), db=store.tables["message"]))
        txn.put(ID.pack(ident), encode(raw[:-1]), db=store.tables["message"])
        txn.drop(store.tables["unseen"])
    store.close()
    (row,) = list(offline.answer(tmp_path, "summary"))
    assert (row["messages"], row["unseen"]) == (1, 0)
    async with Unlooked(tmp_path) as bench:
        bench.check({ident: ("due", 20)})
        assert decode_envelope(encode(bench.rows()[ident])).unseen is None
