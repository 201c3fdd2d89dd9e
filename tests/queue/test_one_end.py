"""Every acknowledged message has one state and ends once: through sweeps, tasks that fail half-way, operators' verbs over many
pages, slow reads of the disk, and outcomes that contradict the store."""

import asyncio
import json
import os
import threading

import lmdb
import msgspec
import pytest

from relaymta.cli.queue import pages
from relaymta.disk.environment import MAP_SIZE
from relaymta.disk.operations import Task
from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.proto.envelope import (
    ATTEMPT_SHOWN,
    DSN,
    HELD,
    HELD_SHOWN,
    PERMANENT,
    TRANSIENT,
    Attempt,
    Envelope,
    decode_envelope,
    encode,
    held_because,
)
from relaymta.proto.printable import printable
from relaymta.queue import Entry, Filter, Outcome, dsns, expiry, listing, wall_ms
from relaymta.queue.change import Change
from tests.queue.test_queue import Bench, Recorder, answer, until

DATA = b"Subject: x\r\n\r\nbody\r\n"


class Witness(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[tuple[int, str]] = []
        self.failures: list[str] = []

    def refused(self, entry, why) -> None:
        self.refusals.append((entry.ident, why))

    def failed(self, what) -> None:
        self.failures.append(what)


class Watched(Bench):
    """A bench that collects what is refused and undone."""

    def __init__(self, folder, **settings) -> None:
        super().__init__(folder, **settings)
        self.events: Witness = Witness()

    def submit(self, to: str = "c@d.example", sender: str = "a@b.example") -> tuple[int, "asyncio.Future"]:
        """Submit a message for the next group; its id, and the result for its client."""
        ident, done = self.queue.ident(), asyncio.get_running_loop().create_future()
        envelope = Envelope(sender, [to], len(DATA), 0, wall_ms(), self.queue.deadline())
        self.queue.submit(ident, envelope, [DATA], done.set_result)
        return ident, done

    def dump(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """All rows of LMDB, but for the time, the highest queue number and the segments."""
        tables = self.queue.store.tables
        with self.queue.store.env.begin() as txn:
            found = {name: list(txn.cursor(db=table)) for name, table in tables.items()}
        found["meta"] = [(key, value) for key, value in found["meta"] if key not in (b"seen", b"queues")]
        found["segment"] = []  # append positions may change
        return found

    async def settled(self) -> None:
        """Wait until the writer has committed everything submitted so far."""
        await self.queue.writer.task(lambda change: None)


# Sweeps and the numbers of queues


async def test_a_sweep_keeps_the_queue_of_mail_in_the_same_group(tmp_path):
    async with Watched(tmp_path, first_retry_ms=50) as bench:
        ident, done = bench.submit("a@x.example")
        bench.queue.writer.submit(Task(lambda change: change.sweep()))
        assert await done is None
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer(TRANSIENT)})  # it gets rows of its own now
        (again,) = await bench.next()
        assert (again.ident, again.name.domain, again.attempts) == (ident, "x.example", 1)
        other, done = bench.submit("b@y.example")
        assert await asyncio.wait_for(done, 5) is None
        assert not bench.queue.writer.stalled
        bench.queue.finish(again, None)
    async with Watched(tmp_path) as bench:
        (entry,) = await bench.next()
        assert (entry.ident, entry.name.domain) == (other, "y.example")


async def test_mail_in_the_group_of_a_sweep_is_there_after_a_restart(tmp_path):
    async with Watched(tmp_path) as bench:
        ident, done = bench.submit("a@x.example")
        bench.queue.writer.submit(Task(lambda change: change.sweep()))
        assert await done is None
    async with Watched(tmp_path) as bench:
        (entry,) = await bench.next()
        assert (entry.ident, entry.name.domain) == (ident, "x.example")
        assert await bench.queue.message(ident) is not None


async def test_numbers_of_queues_are_never_used_again(tmp_path, monkeypatch):
    seen: list[int] = []

    async def use(bench: Bench, domain: str) -> None:
        await bench.put(to=(f"a@{domain}",))
        (entry,) = await bench.next()
        assert entry.queue not in seen
        seen.append(entry.queue)
        bench.queue.finish(entry, None)
        await until(lambda: len(bench.queue.entries) == 0)
        await bench.queue.task(lambda change: change.sweep())

    async with Watched(tmp_path) as bench:
        await use(bench, "one.example")
        await use(bench, "two.example")
    async with Watched(tmp_path) as bench:
        await use(bench, "three.example")
        commit = Change.finish

        def fails(change, now):
            raise StoreError("disk error")

        monkeypatch.setattr(Change, "finish", fails)
        with pytest.raises(StoreError):
            await bench.put(to=("a@four.example",))
        monkeypatch.setattr(Change, "finish", commit)
        await use(bench, "five.example")
        assert seen == sorted(seen)


async def test_a_message_whose_queue_has_no_row_stays_inlined(tmp_path):
    """Materializing it fails, and does not lose it."""
    async with Watched(tmp_path) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        store = bench.queue.store

        def lose(change: Change) -> None:
            change.txn.delete(b"q" + entry.queue.to_bytes(4, "big"), db=store.tables["queue"])
            store.forget({entry.queue})

        await bench.queue.task(lose)
        with pytest.raises(StoreError, match="has no row"):
            await bench.queue.task(lambda change: change.materialize(ident))
        assert store.fresh.get(ident) is not None
        assert bench.events.failures


# Tasks


def delete_half(bench: Watched, ident: int, change: Change) -> None:
    change.materialize(ident)
    envelope = bench.queue.store.envelope(change.txn, ident)
    change.finish_message(ident, envelope, histories=True)
    bench.queue.writer.free_body(ident, envelope.body)


def unplace_half(bench: Watched, ident: int, change: Change) -> None:
    change.materialize(ident)
    envelope = bench.queue.store.envelope(change.txn, ident)
    change.unplace(ident, envelope, envelope.placements[0])


def hold_half(bench: Watched, ident: int, change: Change) -> None:
    change.materialize(ident)
    change.hold(ident, bench.queue.store.envelope(change.txn, ident), "why")


def move_half(bench: Watched, ident: int, change: Change) -> None:
    (row, *_) = list(bench.queue.store.queues(change.txn))
    change.move(row.number, row.name.__class__("away", ""))


def sweep_half(bench: Watched, ident: int, change: Change) -> None:
    change.row(bench.offered[0].name.__class__("new", "queue.example"))
    change.sweep()


@pytest.mark.parametrize("half", [delete_half, unplace_half, hold_half, move_half, sweep_half])
@pytest.mark.parametrize("inlined", [True, False])
async def test_a_task_that_fails_half_way_is_undone_and_logged(tmp_path, half, inlined):
    async with Watched(tmp_path, window=20_000) as bench:
        ident = await bench.put()
        await until(lambda: len(bench.offered) == 1)
        if not inlined:
            await bench.queue.task(lambda change: change.materialize(ident))
        await bench.settled()
        before, live = bench.dump(), bench.queue.segments.usage()[1]

        def run(change: Change) -> None:
            half(bench, ident, change)
            raise ValueError("no such route")

        with pytest.raises(ValueError, match="no such route"):
            await bench.queue.task(run)
        await bench.settled()
        assert bench.dump() == before
        assert bench.queue.segments.usage()[1] == live
        assert ["ValueError: no such route" in failure for failure in bench.events.failures] == [True]
        # And the rest of its group is committed.
        other, done = bench.submit("z@other.example")
        failed = asyncio.ensure_future(bench.queue.task(run))
        assert await done is None
        with pytest.raises(ValueError):
            await failed
        for entry in await bench.next(2):
            bench.queue.finish(entry, None)
        await until(lambda: bench.summary() == [] and len(bench.events.outcomes) == 2)
        assert {outcome.entry.ident for outcome in bench.events.outcomes} == {ident, other}
        assert bench.queue.segments.usage()[1] == 0


async def test_a_failed_task_without_a_callback_is_logged(tmp_path):
    async with Watched(tmp_path) as bench:
        bench.queue.writer.submit(Task(lambda change: 1 // 0))
        await bench.settled()
        assert "ZeroDivisionError" in bench.events.failures[0]


# Bulk verbs


async def bulk(bench: Bench, verb: str, chosen: Filter = Filter()) -> int:  # noqa: B008
    """As the CLI does it: a page, a change, the next page."""
    after, changed = 0, 0
    while True:
        page = await bench.queue.page(chosen, after, lambda name, site: True)
        if page["ids"]:
            changed += (await bench.queue.change_messages(verb, page["ids"], "go away"))[0]
        after = page["after"]
        chosen = Filter(until=page["until"])
        if not after:
            return changed


async def test_bounce_never_touches_the_dsns_it_generates(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "PAGE_ROWS", 3)
    monkeypatch.setattr(listing, "CLOCK_EVERY", 1)
    async with Watched(tmp_path, window=2) as bench:
        idents = [await bench.put(sender=f"s{n}@b.example") for n in range(20)]
        for entry in bench.offered:
            bench.queue.put_back(entry)
        assert await bulk(bench, "bounce") == 20
        dsns = [put for put in bench.events.put if put.envelope.flags & DSN]
        assert sorted(put.envelope.recipients[0] for put in dsns) == sorted(f"s{n}@b.example" for n in range(20))
        assert {outcome.entry.ident for outcome in bench.events.outcomes} == set(idents)
        page = await bench.queue.page(Filter(), 0, lambda name, site: True)
        assert len(page["ids"]) == 3, "the DSNs are queued"


async def test_a_verb_is_not_applied_to_mail_that_came_after_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "PAGE_ROWS", 3)
    monkeypatch.setattr(listing, "CLOCK_EVERY", 1)
    async with Watched(tmp_path, window=2) as bench:
        idents = [await bench.put() for _ in range(7)]
        first = await bench.queue.page(Filter(), 0, lambda name, site: True)
        later = await bench.put()
        found, after = list(first["ids"]), first["after"]
        while after:
            page = await bench.queue.page(Filter(until=first["until"]), after, lambda name, site: True)
            found, after = found + page["ids"], page["after"]
        assert found == idents and later not in found


def test_the_cli_passes_the_limit_of_the_first_page_with_the_next_ones():
    asked = []

    class Peer:
        def ask(self, op, **args):
            return [7]

        def begin(self, op, **args):
            asked.append(args["chosen"].get("until"))
            after = 0 if len(asked) == 3 else len(asked)
            return lambda: {"ids": [len(asked)], "lines": b"{}\n", "after": after, "until": 99}

    assert len(list(pages(Peer(), {"sender": "a@b.example"}))) == 3
    assert asked == [None, 99, 99]


# One claim on a message at a time


def slowly(bench: Bench, name: str, monkeypatch) -> tuple[threading.Event, threading.Event]:
    """Make a reading function of the schedule wait after it has read: (it has read, let it return)."""
    read, go = threading.Event(), threading.Event()
    real = getattr(bench.queue.schedule, name)

    def slow(*args):
        found = real(*args)
        read.set()
        assert go.wait(10)
        return found

    monkeypatch.setattr(bench.queue.schedule, name, slow)
    return read, go


@pytest.mark.parametrize("verb", ["delete", "hold", "bounce", "reroute"])
@pytest.mark.parametrize("when", ["during", "after"])
async def test_a_scan_that_read_a_message_before_it_was_changed_does_not_offer_it(tmp_path, monkeypatch, verb, when):
    async with Watched(tmp_path, window=2) as bench:
        await bench.put()
        waiting = await bench.put()  # one in memory, this one on disk only
        read, go = slowly(bench, "_scan", monkeypatch)
        bench.queue.schedule.wake()
        await until(read.is_set)
        change = asyncio.ensure_future(bench.queue.change_messages(verb, [waiting], "away"))
        if when == "after":
            assert await change == (1, 0)
        go.set()
        assert await change == (1, 0)
        for _ in range(20):
            await asyncio.sleep(0.01)
        wrong = [e for e in bench.offered if e.ident == waiting and not (verb == "reroute" and e.name.route == "away")]
        assert wrong == []
        assert bench.events.refusals == []


async def test_mail_that_is_delivered_while_a_bounce_reads_is_not_bounced(tmp_path, monkeypatch):
    async with Watched(tmp_path) as bench:
        ident, other = await bench.put(), await bench.put()
        entries = {entry.ident: entry for entry in await bench.next(2)}
        bench.queue.again(entries[other])
        read, go = slowly(bench, "load", monkeypatch)
        bounce = asyncio.ensure_future(bench.queue.change_messages("bounce", [ident, other], "go away"))
        await until(read.is_set)
        bench.queue.finish(entries[ident], None)
        await until(lambda: len(bench.events.outcomes) == 1)
        go.set()
        assert await bounce == (1, 1)
        await until(lambda: len(bench.events.outcomes) == 2)
        assert [outcome.entry.ident for outcome in bench.events.outcomes] == [ident, other]
        assert sum(put.envelope.sender == "" for put in bench.events.put) == 1
        assert [row["messages"] for row in bench.summary()] == [1], "the DSN"
        assert bench.events.refusals == []


async def test_two_operators_at_once_end_a_message_once(tmp_path):
    async with Watched(tmp_path, window=2) as bench:
        idents = [await bench.put() for _ in range(12)]
        verbs = ["bounce", "delete", "bounce", "delete"]
        found = await asyncio.gather(*(bench.queue.change_messages(verb, idents, "x") for verb in verbs))
        assert sum(changed for changed, _ in found) == 12
        await bench.settled()
        dsns = [put for put in bench.events.put if put.envelope.flags & DSN]
        assert len(dsns) == len(bench.events.outcomes) == found[0][0]
        assert bench.events.refusals == []


async def test_what_cannot_expire_now_does_not_hide_what_is_behind_it(tmp_path, monkeypatch):
    """A page of expired messages is in flight; those behind it expire all the same."""
    monkeypatch.setattr(expiry, "TOGETHER", 3)
    async with Watched(tmp_path, max_age_ms=600_000) as bench:
        for _ in range(9):
            await bench.put(sender="")
        entries = await bench.next(9)
        for entry in entries[6:]:
            bench.queue.again(entry)
        bench.pass_time(600_001)
        await until(lambda: len(bench.events.outcomes) == 3)
        for entry in entries[:6]:
            bench.queue.again(entry)
        await until(lambda: bench.summary() == [])


async def test_what_expires_while_an_operator_changes_it_ends_once(tmp_path):
    async with Watched(tmp_path, window=2, max_age_ms=1) as bench:
        for _ in range(3):
            await bench.put(sender="")
        page = await bench.queue.page(Filter(), 0, lambda name, site: True)
        await asyncio.gather(*(bench.queue.change_messages("delete", page["ids"]) for _ in range(2)))
        await until(lambda: bench.summary() == [])
        await bench.settled()
        assert bench.events.refusals == []
        assert bench.queue.segments.usage()[1] == 0


async def test_a_change_continues_when_its_caller_is_cancelled(tmp_path, monkeypatch):
    async with Watched(tmp_path, window=2) as bench:
        await bench.put()
        waiting = await bench.put()
        read, go = slowly(bench, "load", monkeypatch)
        bounce = asyncio.ensure_future(bench.queue.change_messages("bounce", [waiting], "go away"))
        await until(read.is_set)
        bounce.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bounce
        assert waiting in bench.queue.entries._claimed
        go.set()
        await until(lambda: [o.entry.ident for o in bench.events.outcomes] == [waiting])
        assert await bench.queue.change_messages("delete", [waiting]) == (0, 0)
        assert not bench.queue.entries._claimed


async def test_mail_that_is_committed_while_it_is_claimed_is_not_offered(tmp_path):
    """An operator may name a message whose client has no 250 yet."""
    async with Watched(tmp_path) as bench:
        for delay in range(6):
            ident, done = bench.submit()
            for _ in range(delay):
                await asyncio.sleep(0)
            changed, in_flight = await bench.queue.change_messages("delete", [ident])
            assert await done is None
            if not changed:  # it was not committed yet when the change was made
                await until(lambda ident=ident: any(entry.ident == ident and entry.waiting for entry in bench.offered))
            await asyncio.sleep(0.02)
            offered = [entry for entry in bench.offered if entry.ident == ident and entry.waiting]
            assert len(offered) + changed == 1 and in_flight == 0
            bench.offered.clear()
        assert bench.events.refusals == []


async def test_a_held_message_is_bounced_without_a_release(tmp_path):
    async with Watched(tmp_path) as bench:
        ident = await bench.put(to=("a@x.example", "b@y.example"))
        assert await bench.queue.change_messages("hold", [ident]) == (1, 0)
        assert await bench.queue.change_messages("bounce", [ident], "go away") == (1, 0)
        await until(lambda: len(bench.events.outcomes) == 2)
        assert await bench.queue.message(ident) is None
        assert [(row["queue"], row["held"]) for row in bench.summary()] == [("mx/b.example", 0)]


# Ending twice


async def test_a_second_end_is_refused(tmp_path):
    async with Watched(tmp_path) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        bench.queue.finish(entry, None)
        bench.queue.finish(entry, {0: answer(PERMANENT)})
        await until(lambda: len(bench.events.outcomes) == 1)
        bench.queue.finish(entry, None)
        assert bench.events.refusals == [(ident, "the entry has an outcome already")] * 2
        await bench.settled()
        assert bench.events.outcomes[0].success and bench.summary() == []
        assert bench.queue.segments.usage()[1] == 0


async def test_an_outcome_of_an_entry_that_was_put_back_is_refused(tmp_path):
    async with Watched(tmp_path) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        bench.queue.again(entry)
        assert await bench.queue.change_messages("hold", [ident]) == (1, 0)
        bench.queue.finish(entry, None)
        assert bench.events.refusals == [(ident, "the entry is not in flight")]
        assert (await bench.queue.message(ident))["state"] == "held"


@pytest.mark.parametrize("kind", ["delivered", "deferred", "failed"])
@pytest.mark.parametrize("sole", [True, False])
async def test_an_outcome_of_a_message_that_has_ended_changes_no_count(tmp_path, kind, sole):
    """Whatever the loop submits, the writer ends no message twice, frees no body twice, and continues."""
    async with Watched(tmp_path) as bench:
        ident = await bench.put(to=("c@d.example",) if sole else ("c@d.example", "e@f.example"))
        keeper = await bench.put(b"Subject: keep\r\n\r\nme\r\n")
        entries = [e for e in await bench.next(2 if sole else 3) if e.ident == ident]

        def outcome(entry: Entry) -> Outcome:
            if kind == "delivered":
                return Outcome(entry)
            attempt = answer(TRANSIENT if kind == "deferred" else PERMANENT)
            failed = [(entry.recipients[0][1], attempt, False)] if kind == "failed" else []
            return Outcome(entry, {i: attempt for i, _ in entry.recipients}, bench.queue.clock.now() + 60_000, entry.name, failed)

        for entry in entries:
            bench.queue.writer.submit(Outcome(entry))
        await bench.settled()
        for entry in entries:
            bench.queue.writer.submit(outcome(entry))
        await bench.settled()
        assert bench.events.refusals == [(ident, "the message had left the queue before")] * len(entries)
        assert [(row["messages"], row["deferred"]) for row in bench.summary()] == [(1, 0)]
        assert b"".join([piece async for piece in bench.queue.raw(keeper)]) == b"Subject: keep\r\n\r\nme\r\n"
        assert bench.queue.segments.usage()[1] == FRAME.size + 21, "the body of the other message"
        assert not any(put.envelope.flags & DSN for put in bench.events.put)


async def test_an_outcome_that_can_never_be_recorded_does_not_stop_the_others(tmp_path):
    async with Watched(tmp_path, first_retry_ms=60_000) as bench:
        idents = [await bench.put(to=(f"a@{name}.example",)) for name in ("one", "two", "three")]
        entries = await bench.next(3)
        await bench.queue.task(lambda change: change.materialize(*idents))
        store = bench.queue.store

        def lose(change: Change) -> None:
            change.txn.delete(b"q" + entries[1].queue.to_bytes(4, "big"), db=store.tables["queue"])
            store.forget({entries[1].queue})

        await bench.queue.task(lose)
        for entry in entries:
            bench.queue.finish(entry, {0: answer(TRANSIENT)})
        await until(lambda: len(bench.events.outcomes) == 2)
        await bench.put()
        assert not bench.queue.writer.stalled
        ((ident, why),) = bench.events.refusals
        assert ident == idents[1] and "has no row" in why
        assert bench.queue.entries.get(ident, entries[1].queue) is entries[1], "it is not tried again by this process"


# DSNs


async def test_a_dsn_larger_than_a_segment_is_a_file_of_its_own(tmp_path):
    async with Watched(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.segments.big_limit = 200
        bench.queue.finish(entry, {0: answer(PERMANENT)})
        (dsn,) = await bench.next()
        assert dsn.envelope.body.segment == 0
        assert b"Undelivered mail" in b"".join([piece async for piece in bench.queue.raw(dsn.ident)])
        dsn.data = None
        assert b"Undelivered mail" in b"".join([piece async for piece in bench.queue.stream(dsn)])
        bench.queue.finish(dsn, None)
        await until(lambda: bench.summary() == [])
        await until(lambda: list((tmp_path / "shard-0/bodies/big").iterdir()) == [])


async def test_an_exception_over_a_header_does_not_end_the_thread(tmp_path, monkeypatch, capfd):
    real = dsns.failure_dsn

    def fails(envelope, failed, header, **rest):
        if header:
            raise ValueError("what a header")
        return real(envelope, failed, header, **rest)

    monkeypatch.setattr(dsns, "failure_dsn", fails)
    async with Watched(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.finish(entry, {0: answer(PERMANENT)})
        (dsn,) = await bench.next()
        assert b"said so" in b"".join([piece async for piece in bench.queue.raw(dsn.ident)])
    assert "what a header" in capfd.readouterr().err


async def test_a_deferred_body_that_cannot_be_read_does_not_fail_its_group(tmp_path):
    async with Watched(tmp_path) as bench:
        ident = await bench.put()
        (entry,) = await bench.next()
        body = entry.envelope.body
        with (tmp_path / f"shard-0/bodies/{body.segment:08d}.seg").open("r+b") as file:
            file.seek(body.offset + 45)
            file.write(b"\0")
        entry.data = None
        bench.queue.finish(entry, {0: answer(TRANSIENT)})
        _, done = bench.submit()
        assert await done is None
        await until(lambda: len(bench.events.outcomes) == 1)
        assert (await bench.queue.message(ident))["attempts"] == 1


async def test_only_what_a_policy_holds_is_released_with_it(tmp_path):
    async with Watched(tmp_path) as bench:
        idents = [await bench.put() for _ in range(2)]
        await bench.queue.change_messages("policy", idents, {ident: f"queue={ident}\x1b" for ident in idents})
        reasons = [(await bench.queue.message(ident))["held_for"] for ident in idents]
        assert reasons == [f"hold policy queue={ident}\\x1b" for ident in idents]
        await bench.queue.change_messages("hold", idents[:1])  # by an operator, before the policy's end releases them
        assert (await bench.queue.message(idents[0]))["held_for"] == "by the operator (queue hold)"
        assert await bench.queue.change_messages("release policy", idents) == (1, 0)
        states = [(await bench.queue.message(ident))["state"] for ident in idents]
        assert states[0] == "held" and states[1] != "held"
        with bench.queue.store.env.begin() as txn:
            assert bench.queue.store.envelope(txn, idents[0]).flags & HELD
        assert (await bench.queue.message(idents[1]))["held_for"] == ""


async def test_why_a_message_is_held_is_kept_until_it_is_released(tmp_path):
    async with Watched(tmp_path / "before") as bench:
        queue, futures = bench.queue, []
        idents = [queue.ident() for _ in range(2)]
        for ident, reason in zip(idents, ("quota: x", ""), strict=True):  # "": as an older version has held it
            envelope = Envelope("a@b", ["c@d"], 1, HELD, wall_ms(), queue.deadline(), held_for=reason)
            futures.append(asyncio.get_running_loop().create_future())
            queue.submit(ident, envelope, [b"x"], futures[-1].set_result)
        assert await asyncio.gather(*futures) == [None, None]
        await queue.change_messages("hold", idents)  # they are held already: the reason stays
        await queue.change_messages("policy", idents, "queue=x")
        await bench.copied(tmp_path / "after")
    async with Watched(tmp_path / "after") as bench:
        found = [await bench.queue.message(ident) for ident in idents]
        assert [(one["state"], one["held_for"]) for one in found] == [("held", "quota: x"), ("held", "")]
        page = await bench.queue.page(Filter(held=True), 0, lambda name, site: True)
        assert [json.loads(line)["held_for"] for line in page["lines"].splitlines()] == ["quota: x", ""]
        assert await bench.queue.change_messages("release", idents) == (2, 0)
        assert [(await bench.queue.message(ident))["held_for"] for ident in idents] == ["", ""]


@pytest.mark.parametrize("reason", ["x" * 999, "\x1b" * 999, "two\r\nlines", "\udc80 no UTF-8", "\u202e"])
def test_the_reason_for_a_hold_is_one_line_that_is_safe_to_show_and_to_store(reason):
    shown = held_because(reason)
    assert shown == printable(reason)[:HELD_SHOWN] and shown.isprintable() and len(shown) <= 200
    assert decode_envelope(encode(Envelope("", [], 0, HELD, 0, 0, held_for=shown))).held_for == shown


def test_an_envelope_of_an_older_version_is_held_for_no_reason():
    fields = msgspec.msgpack.decode(encode(Envelope("a@b", ["c@d"], 1, HELD, 0, 0, message_id="<x@y>", held_for="why")))
    assert fields[16] == "why", "fields are only ever appended"
    older = decode_envelope(msgspec.msgpack.encode(fields[:16]))
    assert (
        older.held_for == older.listener == "" and older.forwarded == {} and older.message_id == "<x@y>" and older.flags == HELD
    )


async def test_the_reply_to_the_last_attempt_is_kept_whole_and_of_those_before_their_beginning(tmp_path):
    long = [Attempt(1, TRANSIENT, "rcpt", "h", 450, "4.2.0", "short", letter * 8000) for letter in "ab"]
    long.append(Attempt(1, TRANSIENT, "rcpt", "h", 450, "4.2.0", "c" * 4096))
    async with Watched(tmp_path) as bench:
        ident = await bench.put()
        for attempt in long:
            (entry,) = await bench.next()
            bench.queue.finish(entry, {0: attempt}, 1)
        await bench.next()
        (found,) = (await bench.queue.message(ident))["recipients"]
    assert [len(shown["reply"]) for shown in found["attempts"]] == [*[ATTEMPT_SHOWN + 10] * 2, 4096 + 10]


async def test_a_change_names_its_messages_when_it_is_its_turn(tmp_path):
    seen = []
    async with Watched(tmp_path) as bench:
        ident = await bench.put()

        def chosen() -> list[int]:
            with bench.queue.store.env.begin() as txn:
                (placement,) = bench.queue.store.envelope(txn, ident).placements
                seen.append(bench.queue.store.queue(txn, placement.queue).name.route)
            return [ident]

        changes = (("reroute", [ident], "elsewhere"), ("policy", chosen, ""))
        assert await asyncio.gather(*(bench.queue.change_messages(*change) for change in changes)) == [(1, 0), (1, 0)]
        assert (await bench.queue.message(ident))["state"] == "held"
    assert seen == ["elsewhere"]


@pytest.mark.parametrize("number", ["gone", "another's"])
async def test_mail_whose_queue_an_earlier_version_swept_is_delivered(tmp_path, number):
    """An inlined message whose queue has no row, or whose queue's number was given to another queue."""
    async with Watched(tmp_path / "before") as bench:
        idents = [await bench.put(to=(f"a@{domain}.example",)) for domain in ("x", "y")]
        await bench.copied(tmp_path / "after")
    with lmdb.open(str(tmp_path / "after/shard-0/lmdb"), max_dbs=16, map_size=MAP_SIZE) as env:
        queues, meta = env.open_db(b"queue"), env.open_db(b"meta")
        with env.begin(write=True) as txn:
            for key, value in list(txn.cursor(db=queues)):
                if b"x.example" in key + value:
                    txn.delete(key, db=queues)
                if b"x.example" in value and number == "another's":
                    txn.put(key, value.replace(b"x.example", b"z.example"), db=queues)
            txn.delete(b"queues", db=meta)
    async with Watched(tmp_path / "after") as bench:
        entries = await bench.next(2)
        assert sorted((entry.ident, entry.name.domain) for entry in entries) == [
            (idents[0], "x.example"),
            (idents[1], "y.example"),
        ]
        for entry in entries:
            bench.queue.finish(entry, None)
        await bench.empty()
        assert bench.events.failures == []


async def test_no_history_outlives_its_message(tmp_path):
    """The first recipient's is written while the other, not tried yet, waits in another queue."""
    async with Watched(tmp_path) as bench:
        await bench.put(to=("a@x.example", "b@y.example"))
        one, two = await bench.next(2)
        bench.queue.finish(one, None)
        await until(lambda: bench.events.outcomes)
        bench.queue.put_back(two)
        (again,) = await bench.next()
        assert again.sole
        bench.queue.finish(again, None)
        await until(lambda: len(bench.events.outcomes) == 2)
        assert (bench.dump()["recipient"], bench.dump()["message"]) == ([], [])


async def test_no_octet_of_message_data_is_counted_when_all_has_left(tmp_path):
    data = b"Subject: x\r\n\r\n" + b"y" * 5000
    async with Watched(tmp_path, window_bytes=12_000) as bench:
        for _ in range(3):
            for _ in range(4):
                await bench.put(data)
            assert sum(entry.data is not None for entry in bench.offered) == 2
            for entry in await bench.next(4):
                await bench.queue.read([entry])
                bench.queue.finish(entry, None)
            await bench.empty()
            assert bench.queue.entries.octets == 0


async def test_a_cancelled_reader_of_a_large_message_leaves_no_file_open(tmp_path, monkeypatch):
    async with Watched(tmp_path) as bench:
        queue, ident, done = bench.queue, bench.queue.ident(), asyncio.get_running_loop().create_future()
        file = queue.big_body(ident)
        file.write([b"x" * 2_000_000])
        queue.submit(ident, Envelope("a@b", ["c@d"], 2_000_000, 0, wall_ms(), queue.deadline()), file.finish([]), done.set_result)
        assert await done is None
        (entry,) = await bench.next()
        opened, going, open_big = threading.Event(), threading.Event(), queue.segments.open_big
        descriptors: list[int] = []

        def slowly(*what) -> int:
            descriptors.append(open_big(*what))
            opened.set()
            going.wait()
            return descriptors[0]

        monkeypatch.setattr(queue.segments, "open_big", slowly)
        reader = asyncio.ensure_future(anext(queue.stream(entry)))
        await until(opened.is_set)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert reader.cancelled()
        going.set()
        await until(lambda: not os.path.exists(f"/proc/self/fd/{descriptors[0]}"))


async def test_large_bodies_without_a_message_are_removed_at_start(tmp_path):
    """One was being received when the process was killed, the message of one had just ended; one is queued, and stays."""
    async with Watched(tmp_path / "before") as bench:
        queue, bodies = bench.queue, []
        for _ in range(3):
            file = queue.big_body(queue.ident())
            file.write([b"x" * 2_000_000])
            bodies.append(file)
        done = asyncio.get_running_loop().create_future()
        envelope = Envelope("a@b", ["c@d"], 2_000_000, 0, wall_ms(), queue.deadline())
        queue.submit(bodies[0].ident, envelope, bodies[0].finish([]), done.set_result)
        assert await done is None
        bodies[1].finish([])
        await bench.copied(tmp_path / "after")
        bodies[2].discard()
    assert len(list((tmp_path / "after/shard-0/bodies/big").iterdir())) == 3
    async with Watched(tmp_path / "after") as bench:
        assert [path.name for path in (tmp_path / "after/shard-0/bodies/big").iterdir()] == [f"{bodies[0].ident:016x}"]
        (entry,) = await bench.next()
        assert sum([len(piece) async for piece in bench.queue.stream(entry)]) == 2_000_000


# Disk errors


async def test_a_read_that_fails_begins_no_second_scan(tmp_path, monkeypatch):
    async with Watched(tmp_path, window=2) as bench:
        await bench.put()
        await bench.put()
        read, go = slowly(bench, "_scan", monkeypatch)
        bench.queue.schedule.wake()
        await until(read.is_set)

        def refuses() -> None:
            raise OSError(5, "EIO")

        bench.queue._readers.read_rows(refuses, lambda result, mark: None)
        await until(lambda: "EIO" in bench.queue._readers.last_error)
        assert bench.queue.schedule._scanning
        go.set()
        await bench.next(2)


async def test_a_park_that_the_disk_refused_is_not_repeated_after_the_queue_was_woken(tmp_path, monkeypatch):
    """Its site is up, and nobody would wake it again."""
    monkeypatch.setattr("relaymta.queue.changes.PARK_AGAIN", 0.01)
    async with Watched(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        bench.queue.again(entry)
        bench.queue.put_back(entry)
        await bench.settled()
        finish, refused = Change.finish, []

        def fails(change, now):
            refused.append(now)
            if len(refused) == 1:
                raise StoreError("disk error")
            finish(change, now)

        monkeypatch.setattr(Change, "finish", fails)
        bench.queue.park(entry.queue, bench.queue.clock.now() + 60_000)
        await until(lambda: refused)
        await bench.queue.wake_queues([entry.queue])
        await asyncio.sleep(0.1)  # several times PARK_AGAIN: a repeated park would be committed by now, or slept through
        await bench.settled()
        assert [row["parked"] for row in bench.summary()] == [False]


async def test_a_park_that_the_disk_refuses_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("relaymta.queue.changes.PARK_AGAIN", 0.01)
    async with Watched(tmp_path) as bench:
        await bench.put()
        (entry,) = await bench.next()
        finish, refused = Change.finish, []

        def fails(change, now):
            refused.append(now)
            if len(refused) < 3:
                raise StoreError("disk error")
            finish(change, now)

        monkeypatch.setattr(Change, "finish", fails)
        bench.queue.park(entry.queue, bench.queue.clock.now() + 60_000)
        await until(lambda: [row["parked"] for row in bench.summary()] == [True])
