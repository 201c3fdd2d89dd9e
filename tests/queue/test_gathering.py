"""When the group commit begins a group: behind one of several it waits a little for those who have been answered by it."""

import asyncio
import random
import time
from types import SimpleNamespace

import pytest

from relaymta.disk import writer as module
from relaymta.disk.operations import Group, Task
from relaymta.disk.writer import GroupWriter
from tests.support.daemon import PATIENCE, wait_for


class Unawaited:
    """An operation that nobody waits for."""


class Bench:
    """A writer whose thread is not there: `groups` are the sizes of those that have begun, `answered` ends the last one."""

    def __init__(self, monkeypatch, seconds=0.02):
        monkeypatch.setattr(module, "GATHER_SECONDS", seconds)
        monkeypatch.setattr(module, "EXPECTED_SECONDS", 3600.0)
        loop = asyncio.get_running_loop()
        self.groups = []
        self.writer = GroupWriter(
            loop, None, None, None, begin=None, on_commit=lambda group: None, unawaited=Unawaited, name="writer"
        )
        self.writer._inbox = SimpleNamespace(put=lambda batch: self.groups.append(len(batch)))

    def submit(self, count, kind=lambda: Task(None)):
        for _ in range(count):
            self.writer.submit(kind())

    async def turns(self):
        for _ in range(5):
            await asyncio.sleep(0)

    async def answered(self):
        self.writer._posted(Group())
        await self.turns()


async def test_what_is_submitted_in_a_turn_of_the_loop_is_one_group_at_once(monkeypatch):
    bench = Bench(monkeypatch)
    bench.submit(3)
    await bench.turns()
    assert bench.groups == [3]


async def test_behind_a_group_of_several_the_next_begins_when_as_many_have_come_again(monkeypatch):
    bench = Bench(monkeypatch, seconds=3600.0)
    bench.submit(5)
    await bench.turns()
    bench.submit(2)  # who have come meanwhile are expected, too
    await bench.answered()
    bench.submit(4)
    await bench.turns()
    assert bench.groups == [5], "one is missing"
    bench.submit(9, Unawaited)
    await bench.turns()
    assert bench.groups == [5], "nobody waits for these"
    bench.submit(1)
    await bench.turns()
    assert bench.groups == [5, 16]
    await bench.answered()  # nothing is pending
    bench.submit(6)
    await bench.turns()
    assert bench.groups == [5, 16], "seven are expected"
    bench.submit(1)
    await bench.turns()
    assert bench.groups == [5, 16, 7]


async def test_those_who_do_not_come_again_are_not_waited_for_without_end(monkeypatch):
    bench = Bench(monkeypatch)
    bench.submit(5)
    await bench.turns()
    await bench.answered()
    bench.submit(1)
    await asyncio.to_thread(wait_for, lambda: bench.groups == [5, 1], 10, "the second group")
    await bench.answered()
    bench.submit(1)
    await bench.turns()
    assert bench.groups == [5, 1, 1], "behind a group of one nobody is waited for"


async def test_long_after_a_group_nobody_is_expected(monkeypatch):
    bench = Bench(monkeypatch, seconds=3600.0)
    monkeypatch.setattr(module, "EXPECTED_SECONDS", 0.0)
    bench.submit(5)
    await bench.turns()
    await bench.answered()
    bench.submit(1)
    await bench.turns()
    assert bench.groups == [5, 1]


class Committing(GroupWriter):
    """A writer whose groups are written at once: `written` has the numbers of its operations, in their order."""

    def __init__(self, on_commit):
        loop = asyncio.get_running_loop()
        super().__init__(loop, None, None, None, begin=None, on_commit=on_commit, unawaited=Numbered, name="writer")
        self.written = []
        self.sizes = []

    def _commit(self, batch):
        self.sizes.append(len(batch))
        time.sleep(0.001)
        self.written += [operation.number for operation in batch]
        return Batch(batch)


class Batch(list):
    """A group that is committed."""


class Numbered:
    """An operation that nobody waits for."""

    def __init__(self, number):
        self.number = number


class Awaited(Numbered):
    """An operation that somebody waits for."""


@pytest.mark.parametrize("seed", range(20))
async def test_each_operation_is_in_one_group_in_its_turn_whatever_happens(monkeypatch, seed):
    """Groups that are full, those whose report fails, operations that are submitted by it, and callers who do not come again."""
    draw, numbers, failed = random.Random(seed), iter(range(1_000_000)), []
    monkeypatch.setattr(module, "GROUP_LIMIT", 7)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.append(context["exception"]))

    def submit(most):
        for _ in range(draw.randrange(most)):
            writer.submit((Awaited if draw.random() < 0.6 else Numbered)(next(numbers)))

    def report(batch):
        assert writer._inbox.empty(), "there is one group at a time"
        if draw.random() < 0.4:
            submit(4)
        if draw.random() < 0.1:
            raise ZeroDivisionError

    writer = Committing(report)
    writer.start()
    for _ in range(150):
        submit(draw.choice([2, 6, 30]))
        await asyncio.sleep(draw.choice([0, 0, 0.0005, 0.002, 0.005]))
    async with asyncio.timeout(PATIENCE):
        while writer._busy or writer._pending:  # which is not left to the next one who submits something
            await asyncio.sleep(0.001)
    await writer.close()
    assert writer.written == list(range(next(numbers)))
    assert (
        min(writer.sizes) > 0 and max(writer.sizes) == 7 and failed and all(isinstance(one, ZeroDivisionError) for one in failed)
    )
