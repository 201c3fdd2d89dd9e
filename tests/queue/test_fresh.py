"""Inlined messages: in whatever order messages are delivered, deferred, put back or changed, and however the process ends, the
shard holds what a model holds."""

import asyncio
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relaymta.errors import StoreError
from relaymta.proto.envelope import TRANSIENT
from relaymta.queue import Queue, inspect
from tests.queue.test_queue import Bench, answer, until


def rows(queue: Queue) -> dict[str, int]:
    with queue.store.env.begin() as txn:
        return {name: txn.stat(db)["entries"] for name, db in queue.store.tables.items()}


def listed(queue: Queue) -> list[int]:
    fresh = queue.store.fresh.live()
    with queue.store.env.begin() as txn:
        return [ident for ident, _ in queue.store.idents(txn, 0, fresh)]


async def test_a_group_is_one_row_and_leaves_with_its_last_message(tmp_path):
    async with Bench(tmp_path) as bench:
        idents = [await bench.put() for _ in range(3)]
        counts = rows(bench.queue)
        assert (counts["message"], counts["due"], counts["expiry"]) == (0, 0, 0)
        assert 1 <= counts["fresh"] <= 3
        assert listed(bench.queue) == idents
        assert [row["messages"] for row in bench.summary()] == [3]
        assert (await bench.queue.message(idents[0]))["state"] == "queued"
        for entry in await bench.next(3):
            bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == 3)
        assert (rows(bench.queue)["fresh"], rows(bench.queue)["ended"]) == (0, 0)
        assert bench.summary() == []


async def test_the_ended_are_not_there_after_a_crash_and_the_others_are(tmp_path):
    """The files as they are while the process runs: what kill -9 leaves."""
    spool, copy = tmp_path / "spool", tmp_path / "copy"
    async with Bench(spool) as bench:
        idents = [await bench.put() for _ in range(3)]
        idents += await asyncio.gather(*(bench.put() for _ in range(201)))
        entries = await bench.next(len(idents))
        for entry in entries[::2]:
            bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == len(entries[::2]))
        await bench.copied(copy)
    left = sorted(entry.ident for entry in entries[1::2])
    async with Bench(copy) as bench:
        assert listed(bench.queue) == left
        again = await bench.next(len(left))
        assert sorted(entry.ident for entry in again) == left
        assert all(not isinstance(data, Exception) for data in await bench.queue.read(again))


async def test_what_does_not_leave_soon_is_materialized(tmp_path, monkeypatch):
    monkeypatch.setattr("relaymta.queue.MATERIALIZE_MS", 300)
    async with Bench(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        await until(lambda: rows(bench.queue)["message"] == 1)
        counts = rows(bench.queue)
        assert (counts["due"], counts["expiry"], counts["fresh"], counts["ended"]) == (1, 1, 0, 0)
        bench.queue.finish(entry, None)
        await until(lambda: rows(bench.queue)["message"] == 0)
        assert bench.summary() == []


async def test_an_entry_that_is_put_back_is_found_again(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.put()
        for _ in range(3):
            (entry,) = await bench.next()
            bench.queue.put_back(entry)
        (entry,) = await bench.next()
        bench.queue.finish(entry, None)
        await until(lambda: bench.summary() == [])


async def test_a_newer_schema_is_refused(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.queue.task(lambda change: change.set_meta(b"schema", 99))
    with pytest.raises(StoreError, match="newer relaymta"):
        async with Bench(tmp_path):
            pass


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "deliver", "defer", "put back", "hold", "delete", "crash"]), st.integers(0, 9)),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
async def test_any_order_of_steps_leaves_what_a_model_says(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("model")
    spool, number = folder / "0", 0
    model: dict[int, str] = {}
    bench = Bench(spool, first_retry_ms=3_600_000)
    await bench.__aenter__()
    taken: dict[int, object] = {}

    async def gather() -> None:
        await until(lambda: len(taken) + len(bench.offered) >= sum(state == "ready" for state in model.values()))
        for entry in await bench.next(len(bench.offered)):
            taken[entry.ident] = entry

    for step, which in steps:
        await gather()
        ready = [ident for ident in sorted(taken) if model.get(ident) == "ready"]
        some = sorted(model)[which % len(model)] if model else 0
        if step == "put":
            model[await bench.put(to=("c@d", "e@f") if which == 9 else ("c@d",))] = "ready" if which != 9 else "two"
            continue
        if step in ("deliver", "defer", "put back") and ready:
            ident = ready[which % len(ready)]
            entry = taken.pop(ident)
            outcomes = bench.events.outcomes
            seen = len(outcomes)
            if step == "put back":
                bench.queue.put_back(entry)
                continue
            bench.queue.finish(entry, None if step == "deliver" else {0: answer(TRANSIENT)})
            await until(lambda seen=seen, outcomes=outcomes: len(outcomes) > seen)
            if step == "deliver":
                del model[ident]
            else:
                model[ident] = "waits"
        elif step in ("hold", "delete") and some:
            entry = taken.get(some)
            if entry is not None and entry.in_flight:
                bench.queue.again(entry)
            if model[some] == "two":
                continue
            changed, in_flight = await bench.queue.change_messages(step, [some])
            assert in_flight == 0
            if model[some] == "held":
                assert changed == (step == "delete")
            taken.pop(some, None)
            if step == "delete":
                del model[some]
            else:
                model[some] = "held"
        elif step == "crash":
            number += 1
            await bench.copied(folder / str(number))
            await bench.__aexit__()
            spool = folder / str(number)
            taken.clear()
            bench = Bench(spool, first_retry_ms=3_600_000)
            await bench.__aenter__()
        assert listed(bench.queue) == sorted(model)
        two = sum(state == "two" for state in model.values())
        totals = inspect.totals(bench.queue.store, bench.queue.segments, bench.queue.clock)
        assert totals.messages == len(model) + two
        assert totals.held == sum(state == "held" for state in model.values())
    await bench.__aexit__()
    shutil.rmtree(folder)
