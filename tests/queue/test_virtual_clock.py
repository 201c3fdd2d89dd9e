"""The schedule on a clock that the test moves: no attempt before its due time, no message past its deadline but held ones, and
every message ends; through deferrals, holds, parked queues, crashes and restarts."""

import asyncio
import shutil

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import relaymta.queue
from relaymta.disk.clock import ShardClock
from relaymta.proto.envelope import PERMANENT, TRANSIENT
from relaymta.queue import Entry, Filter, wall_ms
from tests.conftest import PROVE
from tests.queue.test_queue import Bench, answer, move, until

AGE, FIRST = 3_600_000, 60_000

VERBS = ["deliver", "defer", "fail", "put back", "hold", "release", "sleep", "move", "crash"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 3)),
        st.tuples(st.sampled_from(VERBS), st.integers(0, 9)),
        st.tuples(st.just("pass"), st.sampled_from([1_000, 59_000, 61_000, 300_000, 1_200_000])),
    ),
    max_size=30,
)


class World:
    """A queue, the time, and a model of each message: when it may be tried, its deadline, whether it is held."""

    def __init__(self, folder) -> None:
        self.folder, self.number, self.now = folder, 0, wall_ms()
        self.due: dict[int, int] = {}
        self.deadline: dict[int, int] = {}
        self.held: set[int] = set()
        self.moved: set[int] = set()  # by an operator to another route
        self.waiting: dict[int, Entry] = {}
        self.seen = 0

    async def open(self) -> None:
        self.bench = Bench(self.folder / str(self.number), max_age_ms=AGE, first_retry_ms=FIRST)
        await self.bench.__aenter__()
        self.waiting, self.seen = {}, 0

    async def settle(self) -> None:
        """Collect the entries that were offered and the outcomes that were recorded."""
        for _ in range(4):
            await asyncio.sleep(0.03)
            for entry in self.bench.offered:
                if not entry.waiting:  # since it was offered
                    continue
                assert self.now >= self.due.get(entry.ident, 0), "an attempt before its time"
                assert entry.ident not in self.held, "held mail is offered"
                assert (entry.name.route == "away") == (entry.ident in self.moved), "the wrong route"
                self.waiting[entry.ident] = entry
            self.bench.offered.clear()
            for outcome in self.bench.events.outcomes[self.seen :]:
                self.seen += 1
                self.ended(outcome)

    def ended(self, outcome) -> None:
        ident = outcome.entry.ident
        self.waiting.pop(ident, None)
        if not outcome.success and any(a.kind == TRANSIENT for a in outcome.results.values()):
            assert self.now < self.deadline[ident], "deferred past its deadline"
            self.due[ident] = self.now + FIRST
        else:
            if outcome.expired:
                assert self.now >= self.deadline[ident], "given up before its deadline"
            del self.deadline[ident]
        if outcome.dsn is not None:
            self.deadline[outcome.dsn.ident] = self.now + AGE

    async def step(self, what: str, which: int) -> None:
        queue = self.bench.queue
        ready = [ident for ident, entry in sorted(self.waiting.items()) if entry.waiting]
        some = sorted(self.deadline)[which % len(self.deadline)] if self.deadline else 0
        if what == "put":
            ident = await self.bench.put(to=(f"x@d{which}",), sender="" if which == 3 else "a@b.example")
            self.deadline[ident] = self.now + AGE
        elif what == "pass":
            self.now += which
        elif what == "crash":
            await self.settle()
            self.number += 1
            await self.bench.copied(self.folder / str(self.number))
            await self.bench.__aexit__()
            await self.open()
        elif what in ("hold", "release") and some:
            changed, _ = await queue.change_messages(what, [some])
            self.waiting.pop(some, None)
            if changed and what == "hold":
                self.held.add(some)
            elif changed:
                self.held.discard(some)
                self.deadline[some], self.due[some] = self.now + AGE, 0
        elif what == "sleep" and ready:
            entry = self.waiting.pop(ready[which % len(ready)])
            queue.put_back(entry)
            queue.park(entry.queue, self.now + 120_000)
        elif what == "move":
            await move(self.bench, Filter())
            self.moved = set(self.deadline)
            self.due = {}
        elif what == "put back" and ready:
            queue.put_back(self.waiting.pop(ready[which % len(ready)]))
        elif what in ("deliver", "defer", "fail") and ready:
            entry = self.waiting.pop(ready[which % len(ready)])
            assert queue.begin(entry)
            kind = PERMANENT if what == "fail" else TRANSIENT
            queue.finish(entry, None if what == "deliver" else {0: answer(kind)})
            await until(lambda: len(self.bench.events.outcomes) > self.seen)

    async def end(self) -> None:
        """Let time pass until all messages that are not held have ended."""
        for _ in range(60):
            if set(self.deadline) <= self.held:
                return
            self.now += 1_200_000
            for ident in list(self.waiting):
                self.waiting.pop(ident)
            await asyncio.sleep(0.3)
            await self.settle()
        raise AssertionError(f"these never end: {set(self.deadline) - self.held}")


@given(STEPS)
@settings(
    max_examples=200 if PROVE else 5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_attempt_before_its_time_and_every_message_ends(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("clock")
    world = World(folder)
    tick, relaymta.queue.TICK = relaymta.queue.TICK, 0.01
    now, ShardClock.now = ShardClock.now, lambda clock: world.now  # type: ignore[method-assign, assignment]
    try:
        await world.open()
        for what, which in steps:
            await world.step(what, which)
            await world.settle()
        await world.end()
        await world.bench.__aexit__()
    finally:
        relaymta.queue.TICK = tick
        ShardClock.now = now  # type: ignore[method-assign]
        shutil.rmtree(folder)
