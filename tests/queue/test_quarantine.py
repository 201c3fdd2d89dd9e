"""The quarantine: its table says what the envelopes say, whatever happens; what is over is deleted, and nothing else."""

import asyncio
import dataclasses
import random

import lmdb
import pytest

from relaymta.control.filters import Filter
from relaymta.disk import clock
from relaymta.errors import StoreError
from relaymta.proto.envelope import BY_CRASHES, HELD, UNSEEN, Envelope, Quarantine, Unseen, encode
from relaymta.queue import offline, quarantine, wall_ms
from relaymta.queue.change import Change
from relaymta.queue.quarantine import Release
from relaymta.queue.store import ID
from tests.conftest import PROVE
from tests.queue.test_queue import Bench, Recorder, until

DAY = 86_400_000
AS_IT_IS = Release([], "", False)


class Told(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.left: list[tuple[int, str, str]] = []
        self.to: list[list[str]] = []

    def left_quarantine(self, ident: int, envelope: Envelope, how: str, to: list[str]) -> None:
        assert envelope.quarantine is not None
        self.left.append((ident, how, envelope.quarantine.by))
        self.to.append(to)


class Ward(Bench):
    """A queue with messages in quarantine. Nothing is deleted by itself before `over` is called."""

    def __init__(self, folder, **settings) -> None:
        super().__init__(folder, **{"quarantine_ms": 30 * DAY} | settings)
        self.events = Told()

    async def __aenter__(self) -> "Ward":
        await super().__aenter__()
        self.real = self.queue.quarantine.tick
        self.queue.quarantine.tick = lambda: None
        return self

    async def held(
        self,
        octets: int = 100,
        judged: bool = True,
        by: str = "filter av",
        to=("c@d.example",),
        unseen=(),
        since: int | None = None,
    ) -> int:
        ident = self.queue.ident()
        data = b"Subject: x\r\n\r\n".ljust(octets, b"x")
        now = self.queue.clock.now() if since is None else since
        envelope = Envelope(
            "a@b.example", [*to], len(data), HELD, wall_ms(), self.queue.deadline(), held_for=f"{by}: why",
            quarantine=Quarantine(now, by, "why", 1.5, "x", judged),
            unseen=Unseen([*unseen], 0, 0, False, False, False) if unseen else None,
        )  # fmt: skip
        done = asyncio.get_running_loop().create_future()
        self.queue.submit(ident, envelope, [data], done.set_result)
        assert await done is None
        return ident

    async def over(self) -> None:
        """What the queue does each second."""
        keeper = self.queue.quarantine
        keeper._looking = True
        keeper._act(keeper.look())
        await until(lambda: not keeper._looking)

    def check(self) -> dict[int, Envelope]:
        """The messages in the quarantine, where all that there is of it says the same."""
        store = self.queue.store
        with store.reading() as txn:
            rows = {
                ident: (judged, since, size) for judged in (True, False) for ident, since, size in store.quarantined(txn, judged)
            }
            envelopes = {ident: one for ident, one in store.idents(txn, 0, store.fresh.live()) if one.quarantine is not None}
            octets = store.meta_in(txn, b"quarantine")
        assert rows == {i: (e.quarantine.judged, e.quarantine.since, e.size) for i, e in envelopes.items()}
        assert all(one.flags & HELD for one in envelopes.values())
        assert octets == sum(size for judged, _, size in rows.values() if judged)
        return envelopes


@pytest.mark.parametrize("seed", range(60 if PROVE else 6))
async def test_against_a_plain_account(tmp_path, seed):
    rng, model, others = random.Random(seed), dict[int, bool](), set[int]()
    for _ in range(4):
        async with Ward(tmp_path) as bench:
            for _ in range(20):
                if not model or rng.random() < 0.4:
                    judged, to = rng.random() < 0.7, rng.choice([("c@d.example",), ("c@d.example", "e@f.example")])
                    ident = await bench.held(rng.choice([50, 700]), judged, to=to, unseen=rng.choice([(), ("two",)]))
                    model[ident] = judged
                elif rng.random() < 0.2:
                    others.add(await bench.put())
                else:
                    chosen = rng.sample([*model, *others], rng.randint(1, min(4, len(model) + len(others))))
                    verb = rng.choice([
                        "release", "delete", "bounce", "hold", "reroute", "flush", "release quarantined", "delete quarantined",
                        "quarantine expired", "quarantine displaced",
                    ])  # fmt: skip
                    word: str | Release = rng.choice([AS_IT_IS, Release(["z@z.example"], "pm@relay.example", True)])
                    word = word if verb == "release quarantined" else "elsewhere"
                    await bench.queue.change_messages(verb, chosen, word)
                    for ident in chosen:
                        ends = verb.startswith("quarantine") and model.get(ident)
                        if ident in model and (ends or verb in ("release", "delete", "bounce") or verb.endswith(" quarantined")):
                            del model[ident]
                assert {ident: one.quarantine.judged for ident, one in bench.check().items()} == model
            assert len(set(bench.events.left)) == len(bench.events.left), "each is told of once"
        await asyncio.sleep(0)


async def test_what_is_older_than_it_is_kept_is_deleted_and_told(tmp_path):
    async with Ward(tmp_path) as bench:
        old = [await bench.held(by="rule x") for _ in range(3)]
        kept = await bench.held(judged=False)
        bench.pass_time(29 * DAY)
        new = await bench.held()
        await bench.over()
        assert {*bench.check()} == {*old, kept, new}
        bench.pass_time(DAY + 1)
        await bench.over()
        assert {*bench.check()} == {kept, new}
        assert sorted(bench.events.left) == [(ident, "expired", "rule x") for ident in old]
        bench.queue.reconfigure(dataclasses.replace(bench.settings, quarantine_ms=1000))
        assert bench.queue.quarantine.keep_ms == 1000
        bench.pass_time(400 * DAY)
        await bench.over()
        assert {*bench.check()} == {kept}, "nobody has judged it"
        assert await bench.queue.change_messages("delete quarantined", [kept]) == (1, 0)
        await bench.empty()


async def test_a_message_that_waited_in_the_queue_is_kept_from_then_on_when_it_was_judged(tmp_path):
    async with Ward(tmp_path) as bench:
        first = await bench.held(since=bench.queue.clock.now() + 4 * DAY)
        second = await bench.held()
        bench.pass_time(30 * DAY + 1000)
        await bench.over()
        assert {*bench.check()} == {first}, f"{second} is behind it"
        bench.pass_time(4 * DAY)
        await bench.over()
        assert not bench.check()


async def test_a_long_look_goes_on_where_the_last_one_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "ROWS", 3)
    monkeypatch.setattr(quarantine, "AT_ONCE", 2)
    async with Ward(tmp_path) as bench:
        late = bench.queue.clock.now() + 40 * DAY
        waiting = [await bench.held(since=late) for _ in range(7)]
        over = [await bench.held() for _ in range(5)]
        bench.pass_time(31 * DAY)
        for _ in range(8):
            await bench.over()
        assert {*bench.check()} == {*waiting} and len(over) == 5


@pytest.mark.parametrize("limit", [0, 1, 350, 1000, 10_000])
async def test_octets_are_bounded_and_the_oldest_go(tmp_path, limit):
    async with Ward(tmp_path) as bench:
        aside = await bench.held(5000, judged=False)
        idents = [await bench.held(100) for _ in range(10)]
        bench.queue.quarantine.over = lambda octets: (octets - limit, True)
        await bench.over()
        kept = min(limit // 100, 10)
        assert {*bench.check()} == {aside, *idents[10 - kept :]}
        assert [how for _, how, _ in bench.events.left] == ["displaced"] * (10 - kept)
        assert bench.queue.quarantine.messages == 11 and bench.queue.quarantine.octets == kept * 100, "what was chosen is gone"
        await bench.over()
        assert bench.queue.quarantine.messages == kept + 1 and bench.queue.quarantine.octets == kept * 100


async def test_very_many_are_deleted_without_a_pause(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "AT_ONCE", 10)
    async with Ward(tmp_path) as bench:
        for _ in range(95):
            await bench.held(100)
        bench.queue.quarantine.over = lambda octets: (octets, True)
        bench.queue.quarantine.tick = bench.real
        bench.real()
        await until(lambda: len(bench.events.left) == 95)  # it is told of what is committed
        assert not bench.check()


async def test_after_a_long_stop_somebody_may_look_first_however_often_it_is_started(tmp_path, monkeypatch):
    async with Ward(tmp_path) as bench:
        ident = await bench.held()
    real, ahead = clock.wall_ms(), 40 * DAY
    monkeypatch.setattr(clock, "wall_ms", lambda: real + ahead)
    for _ in range(3):
        async with Ward(tmp_path) as bench:
            await bench.over()
            assert {*bench.check()} == {ident}
        ahead += 1_800_000
    async with Ward(tmp_path) as bench:
        bench.pass_time(DAY)
        await bench.over()
        assert not bench.check()


async def test_what_somebody_else_has_is_not_deleted_and_nothing_spins(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "AT_ONCE", 1)
    async with Ward(tmp_path) as bench:
        ident = await bench.held()
        bench.queue.quarantine.over = lambda octets: (octets, True)
        claimed = bench.queue.entries.claim([ident])
        await bench.over()
        assert {*bench.check()} == {ident} and not bench.queue.quarantine._looking
        bench.queue.entries.release_claim(claimed)
        await bench.over()
        assert not bench.check()


@pytest.mark.parametrize("how", [AS_IT_IS, Release(["z@z.example"], "pm@relay.example", False)])
async def test_a_refused_commit_changes_nothing(tmp_path, monkeypatch, how):
    def full(*arguments: object) -> None:
        raise lmdb.MapFullError("full")

    async with Ward(tmp_path) as bench:
        ident, before = await bench.held(), None
        with monkeypatch.context() as patched:
            patched.setattr(Change, "finish", full)
            before = bench.check()[ident]
            for verb in ("release quarantined", "delete quarantined", "release"):
                with pytest.raises(StoreError):
                    await bench.queue.change_messages(verb, [ident], how if verb == "release quarantined" else "")
            await bench.over()
        assert encode(bench.check()[ident]) == encode(before) and bench.events.left == []
        assert await bench.queue.change_messages("release quarantined", [ident], how) == (1, 0)
        assert bench.events.left == [(ident, "released", "filter av")]


async def test_a_release_sends_the_same_octets_once(tmp_path):
    async with Ward(tmp_path) as bench:
        ident = await bench.held(200, to=("a@one.example", "b@two.example"))
        data = b"".join([piece async for piece in bench.queue.raw(ident)])
        assert await bench.queue.change_messages("release quarantined", [ident], AS_IT_IS) == (1, 0)
        assert await bench.queue.change_messages("release quarantined", [ident], AS_IT_IS) == (0, 0)
        entries = await bench.next(2)
        assert sorted(address for one in entries for _, address in one.recipients) == ["a@one.example", "b@two.example"]
        assert [b"".join(pieces) for pieces in await bench.queue.read(entries)] == [data, data]
        assert {one.envelope.sender for one in entries} == {"a@b.example"}


async def test_a_release_to_somebody_else_comes_from_who_releases(tmp_path):
    async with Ward(tmp_path) as bench:
        ident = await bench.held(200)
        data = b"".join([piece async for piece in bench.queue.raw(ident)])
        how = Release(["x@one.example", "y@two.example"], "pm@relay.example", False)
        assert await bench.queue.change_messages("release quarantined", [ident], how) == (1, 0)
        entries = await bench.next(2)
        assert sorted(address for one in entries for _, address in one.recipients) == ["x@one.example", "y@two.example"]
        assert {(one.ident, one.envelope.sender) for one in entries} == {(ident, "pm@relay.example")}
        assert [b"".join(pieces) for pieces in await bench.queue.read(entries)] == [data, data]
        for entry in entries:
            bench.queue.finish(entry, None)
        await bench.empty()


@pytest.mark.parametrize("to", [[], ["z@z.example"]])
async def test_filters_that_have_not_looked_do_so_first_unless_it_is_said_otherwise(tmp_path, to):
    async with Ward(tmp_path) as bench:
        for unscanned in (False, True):
            ident = await bench.held(unseen=("two",))
            how = Release(to, "pm@relay.example", unscanned)
            assert await bench.queue.change_messages("release quarantined", [ident], how) == (1, 0)
            bench.queue.schedule.wake()
            if unscanned:
                assert [one.ident for one in await bench.next()] == [ident]
                continue
            with bench.queue.store.reading() as txn:
                envelope = bench.queue.store.envelope(txn, ident)
            assert envelope is not None and envelope.flags & UNSEEN and envelope.unseen.filters == ["two"]
            assert (await bench.queue.unseen.page((0, 0), 5, set(), (frozenset(), frozenset()))).idents == [ident]
            assert not bench.offered


async def test_a_kill_after_each_of_them_leaves_what_was_committed(tmp_path):
    async with Ward(tmp_path / "a") as bench:
        idents = [await bench.held() for _ in range(4)]
        await bench.copied(tmp_path / "b")
        await bench.queue.change_messages("release quarantined", idents[:1], AS_IT_IS)
        await bench.queue.change_messages("delete quarantined", idents[1:2])
        await bench.queue.change_messages("release quarantined", idents[2:3], Release(["z@z.example"], "pm@x.example", False))
        await bench.copied(tmp_path / "c")
    for name, left in (("b", idents), ("c", idents[3:])):
        async with Ward(tmp_path / name) as bench:
            assert [*bench.check()] == left
            bench.queue.quarantine.look()
            assert (bench.queue.quarantine.messages, bench.queue.quarantine.octets) == (len(left), 100 * len(left))


async def test_what_an_older_version_has_released_or_ended_is_forgotten(tmp_path):
    """It knows nothing of the table, and writes envelopes without what it does not know."""
    async with Ward(tmp_path) as bench:
        released, ended = await bench.held(), await bench.held()

        def older(change: Change) -> None:
            for ident in (released, ended):
                envelope = change.envelope(ident)
                assert envelope is not None
                envelope.quarantine = None
                if ident == released:
                    change.release(ident, envelope, bench.queue.clock.now(), envelope.deadline)
                else:
                    change.finish_message(ident, envelope, histories=True)

        aside = await bench.held(judged=False)

        def ended_before(change: Change) -> None:
            envelope = change.envelope(aside)
            assert envelope is not None
            envelope.quarantine = None
            change.finish_message(aside, envelope, histories=True)

        await bench.queue.task(older)
        await bench.queue.task(ended_before)
        page = await bench.queue.page(Filter(quarantined=True), 0, lambda name, site: False)
        assert page["ids"] == []
        kept = await bench.held()
        await bench.over()
        with bench.queue.store.reading() as txn:
            rows = [ident for judged in (True, False) for ident, *_ in bench.queue.store.quarantined(txn, judged)]
            assert rows == [kept]
        await bench.queue.change_messages("delete quarantined", [kept])
        bench.events.left.clear()
        with bench.queue.store.reading() as txn:
            assert bench.queue.store.meta_in(txn, b"quarantine") == 0
            assert txn.get(ID.pack(released), db=bench.queue.store.tables["message"]) is not None
        assert bench.events.left == []


async def test_what_is_shown(tmp_path):
    async with Ward(tmp_path) as bench:
        await bench.put()
        first, second = await bench.held(by="filter av"), await bench.held(judged=False, by="rule no programs")
        third = await bench.held(by="DMARC", to=("z@other.example",))

        async def found(**chosen) -> list[int]:
            page = await bench.queue.page(Filter(quarantined=True, **chosen), 0, lambda name, site: False)
            return page["ids"]

        assert await found() == [first, second, third] and await found(outside=True) == []
        every = (await bench.queue.page(Filter(), 0, lambda name, site: False))["ids"]
        others = (await bench.queue.page(Filter(outside=True), 0, lambda name, site: False))["ids"]
        assert others and others == [ident for ident in every if ident not in (first, second, third)]
        assert not Filter(outside=True).whole_queues
        for name, ids in (
            ("filter", []),
            ("programs", []),
            ("av", [first]),
            ("filter av", [first]),
            ("no programs", [second]),
            ("DMARC", [third]),
            ("AV", []),
        ):
            assert await found(held_by=name) == ids, name
        assert await found(recipient="Z@OTHER.example") == await found(recipient_domain="other.example") == [third]
        assert await found(newer=wall_ms() - 60_000) == await found(older=wall_ms() + 60_000) == [first, second, third]
        assert await found(older=wall_ms() - 60_000) == await found(newer=wall_ms() + 60_000) == []
        assert await found(ident=second) == [second] and await found(sender="x@y.example") == []
        shown = (await bench.queue.message(first))["quarantine"]
        assert shown["until"] - shown["since"] == 30 * 86400 and (shown["by"], shown["score"]) == ("filter av", 1.5)
        assert (await bench.queue.message(second))["quarantine"]["until"] == 0


async def test_what_is_held_while_a_verb_is_at_work_is_not_concerned(tmp_path):
    """Also where it came before: it waited for a filter."""
    async with Ward(tmp_path) as bench:
        earlier = bench.queue.ident()
        first = await bench.held()
        page = await bench.queue.page(Filter(quarantined=True), 0, lambda name, site: False)
        assert page["ids"] == [first]
        bench.pass_time(5)
        why = Quarantine(bench.queue.clock.now(), "filter av", "why", None, "", True)
        envelope = Envelope("a@b", ["c@d.example"], 1, HELD, wall_ms(), bench.queue.deadline(), held_for="x", quarantine=why)
        done = asyncio.get_running_loop().create_future()
        bench.queue.submit(earlier, envelope, [b"x"], done.set_result)
        await done
        again = await bench.queue.page(Filter(quarantined=True, until=page["until"]), 0, lambda name, site: False)
        assert again["ids"] == [first]
        assert (await bench.queue.page(Filter(quarantined=True), 0, lambda name, site: False))["ids"] == [earlier, first]


async def test_what_is_bounced_has_left_it_too(tmp_path):
    async with Ward(tmp_path) as bench:
        ident = await bench.held(to=("a@one.example", "b@two.example"))
        assert await bench.queue.change_messages("bounce", [ident], "no") == (1, 0)
        assert bench.events.left == [(ident, "bounced", "filter av")] and not bench.check()


@pytest.mark.parametrize("to", [[], ["z@z.example"]])
async def test_mail_that_is_to_be_signed_is_not_due_before_it_is(tmp_path, to):
    async with Ward(tmp_path) as bench:
        ident = bench.queue.ident()
        why = Quarantine(bench.queue.clock.now(), "filter av", "why", None, "", True)
        envelope = Envelope(
            "a@b", ["c@d.example"], 1, HELD, wall_ms(), bench.queue.deadline(), held_for="x", quarantine=why,
            unseen=Unseen(["two"], 0, 0, True, True, False),
        )  # fmt: skip
        done = asyncio.get_running_loop().create_future()
        bench.queue.submit(ident, envelope, [b"x"], done.set_result)
        await done
        await bench.queue.change_messages("release quarantined", [ident], Release(to, "pm@relay.example", True))
        assert bench.events.to == [to] and not bench.offered
        page = await bench.queue.unseen.page((0, 0), 5, set(), (frozenset(["two"]), frozenset(["two"])))
        assert page.idents == [ident], "nobody is waited for but who signs"
        taken = await bench.queue.unseen.take(ident)
        assert taken is not None and taken.envelope.unseen.filters == []
        await bench.queue.unseen.held(taken, "it cannot be signed", why, None)
        taken.release()
        await bench.queue.change_messages("release quarantined", [ident], Release([], "", True))
        assert not bench.offered and (await bench.queue.message(ident))["state"] == "unseen"


async def test_a_page_of_the_quarantine_reads_no_other_mail(tmp_path, monkeypatch):
    from relaymta.queue import listing

    monkeypatch.setattr(listing, "PAGE_ROWS", 2)
    monkeypatch.setattr(listing, "CLOCK_EVERY", 1)
    async with Ward(tmp_path) as bench:
        idents = []
        for n in range(9):
            await bench.put()
            idents.append(await bench.held(judged=bool(n % 2)))
        monkeypatch.setattr(bench.queue.store, "idents", lambda *arguments: pytest.fail("all mail is read"))
        seen, page = [], {"after": 0, "until": 0}
        while True:
            chosen = Filter(quarantined=True, until=page["until"])
            page = await bench.queue.page(chosen, page["after"], lambda name, site: False)
            seen += page["ids"]
            await bench.held()  # what comes in meanwhile
            if not page["after"]:
                break
        assert seen == idents


async def test_what_ended_a_worker_is_there_and_stays(tmp_path):
    async with Ward(tmp_path) as bench:
        ident = await bench.put()
        await bench.next()
        await bench.copied(tmp_path / "killed")
    ward = Ward(tmp_path / "killed")
    from relaymta.queue import Queue
    from tests.queue.test_queue import assign

    ward.queue = Queue(ward.folder, 0, ward.settings, assign, ward, ward.events)
    await ward.queue.start(ident)
    try:
        found = ward.check()[ident]
        assert found.held_for == BY_CRASHES and not found.quarantine.judged and found.quarantine.by == "worker deaths"
    finally:
        await ward.queue.stop()


async def test_without_a_daemon_it_is_read_from_the_files(tmp_path):
    async with Ward(tmp_path) as bench:
        ident = await bench.held()
        await bench.put()
    page = offline.answer(tmp_path, "page", shard=0, after=0, chosen={"quarantined": True})
    assert page["ids"] == [ident]
