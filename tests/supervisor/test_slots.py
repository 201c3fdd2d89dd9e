"""The life of a slot: workers that are slow, stopped, killed, or cannot be executed. The processes are real, their work not."""

import asyncio
import errno
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from relaymta.metrics import Counters, families
from relaymta.shm import Shared
from relaymta.supervisor import slots as module
from relaymta.supervisor.slots import Slot, Slots, State

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    for name, seconds in {"CHECK_SECONDS": 0.05, "LATE_SECONDS": 0.5, "KILL_SECONDS": 600, "END_SECONDS": 5}.items():
        monkeypatch.setattr(module, name, seconds)
    boot = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'x'"
    boot += "; runpy.run_module('tests.support.fake_worker', run_name='__main__')"
    monkeypatch.setattr(module, "program", lambda _, descriptor: [sys.executable, "-c", boot, descriptor, str(tmp_path)])


class Kept:
    """Slots with what they said."""

    def __init__(self, count: int) -> None:
        self.said: list[str] = []
        self.stopping = asyncio.Event()
        self.shared = Shared.create()
        self.slots = Slots(self.shared, self.said.append, self.stopping, lambda slot: {}, self.handle)
        for number in range(count):
            self.slots.add(Slot(number, [socket.create_server(("127.0.0.1", 0))], [number]))
        self.all = list(self.slots)

    async def handle(self, op, args, descriptors):
        pass

    def pid(self, number: int) -> int:
        process = self.all[number].process
        assert process is not None
        return process.pid


async def until(condition, what="it"):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def kept(count):
    one = Kept(count)
    try:
        yield one
    finally:
        one.stopping.set()
        for slot in one.slots:
            if slot.process is not None:
                with suppress(ProcessLookupError):
                    slot.process.send_signal(signal.SIGCONT)
        await one.slots.stop()
        assert all(slot.state is State.DEAD for slot in one.slots)
        for slot in one.slots:
            slot.sockets[0].close()


def requests(folder, number):
    path = folder / f"requests.{number}"
    return path.read_text().splitlines() if path.exists() else []


async def test_a_stopped_workers_sockets_are_lent_until_it_continues(tmp_path):
    async with kept(2) as one:
        assert await one.slots.start() == ""
        assert one.slots.health() == ""
        pid = one.pid(0)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: one.all[0].loan)
        assert one.slots.health() == "workers not ready: 0 (late, its sockets are lent to worker 1)"
        assert [slot.number for slot, _ in one.slots.ready()] == [1], "nobody waits for its answers"
        os.kill(pid, signal.SIGCONT)
        await until(lambda: one.all[0].ready and not one.all[0].loan)
        await until(lambda: requests(tmp_path, 1)[1:] == ["borrow 0 ", "give_back 0 "])
        assert one.pid(0) == pid
        assert len(one.said) == 2 and "has not answered" in one.said[0] and "answers again" in one.said[1]


async def test_a_worker_that_stays_stopped_is_killed_and_replaced(tmp_path, monkeypatch):
    async with kept(2) as one:
        assert await one.slots.start() == ""
        pid = one.pid(0)
        Counters(one.shared.counters(0)).gauge("relaymta_connections", 7)
        Counters(one.shared.counters(0)).add(0, 3)
        monkeypatch.setattr(module, "KILL_SECONDS", 1.0)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: one.all[0].ready and one.all[0].process and one.pid(0) != pid)
        await until(lambda: not one.all[0].loan)
        assert any("it is killed" in text for text in one.said)
        found = {family.name: family.samples[0].value for family in families([one.shared.counters(0)])}
        assert found["relaymta_connections"] == 0, "a dead worker has no connections"
        assert one.shared.counters(0).get(0) == 3, "counters go on"


async def test_all_stopped_together_are_not_late(monkeypatch):
    async with kept(1) as one:
        assert await one.slots.start() == ""
        monkeypatch.setattr(module, "LATE_SECONDS", 3.0)
        os.kill(one.pid(0), signal.SIGSTOP)
        await asyncio.sleep(0.2)  # a heartbeat is unanswered when
        clock = module.time.monotonic
        monkeypatch.setattr(module.time, "monotonic", lambda: clock() + 3600)  # our own process was stopped for an hour
        await asyncio.sleep(0.2)
        assert one.all[0].ready


async def test_a_slow_start_is_taken_in(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 0.2)
    (tmp_path / "start.0").write_text("2")
    async with kept(2) as one:
        begun = asyncio.create_task(one.slots.start())
        await until(lambda: one.all[0].state is State.LATE and one.all[0].loan)
        assert not begun.done()
        assert await begun == ""
        assert one.all[0].ready and one.slots.health() == ""
        await until(lambda: requests(tmp_path, 1)[-1:] == ["give_back 0 "])
        os.kill(one.pid(0), signal.SIGKILL)  # and the successor
        await until(lambda: one.all[0].state is State.LATE)
        await until(lambda: one.all[0].ready)


async def test_a_stop_does_not_wait_for_a_slow_start(tmp_path):
    (tmp_path / "start.0").write_text("1000")
    async with kept(1) as one:
        begun = asyncio.create_task(one.slots.start())
        await until(lambda: requests(tmp_path, 0))
        one.stopping.set()
        assert await begun == ""


async def test_a_refused_start_is_the_answer_at_first_and_tried_again_later(tmp_path):
    (tmp_path / "start.0").write_text("refuse")
    async with kept(1) as one:
        assert await one.slots.start() == "worker 0 did not start: the spool is in use"
    (tmp_path / "start.0").unlink()
    async with kept(1) as one:
        assert await one.slots.start() == ""
        (tmp_path / "start.0").write_text("refuse")
        os.kill(one.pid(0), signal.SIGKILL)
        await until(lambda: any("the spool is in use" in text for text in one.said))
        (tmp_path / "start.0").unlink()
        await until(lambda: one.all[0].ready)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
async def test_a_failed_fork_is_tried_again(monkeypatch, code):
    async with kept(1) as one:
        assert await one.slots.start() == ""
        execute, failures = asyncio.create_subprocess_exec, []

        async def fails(*command, **options):
            if len(failures) < 3:
                failures.append(one.all[0].state)
                raise OSError(code, os.strerror(code))
            return await execute(*command, **options)

        monkeypatch.setattr(module.asyncio, "create_subprocess_exec", fails)
        os.kill(one.pid(0), signal.SIGKILL)
        await until(lambda: len(failures) == 3)
        await until(lambda: one.all[0].ready)
        assert failures == [State.DEAD] * 3
        assert sum(os.strerror(code) in text for text in one.said) == 3


async def test_a_dead_lender_is_replaced_by_another(tmp_path):
    async with kept(3) as one:
        assert await one.slots.start() == ""
        os.kill(one.pid(0), signal.SIGSTOP)
        await until(lambda: one.all[0].loan)
        lender = one.all[0].loan.lender.number
        (tmp_path / f"start.{lender}").write_text("1000")
        os.kill(one.pid(lender), signal.SIGKILL)
        other = 3 - lender
        await until(lambda: one.all[0].loan and one.all[0].loan.lender.number == other)
        await until(lambda: one.all[lender].loan and one.all[lender].loan.lender.number == other)
        assert sorted(line for line in requests(tmp_path, other) if "borrow" in line) == ["borrow 0 ", f"borrow {lender} "]
        os.kill(one.pid(0), signal.SIGCONT)
        await until(lambda: requests(tmp_path, other)[-1:] == ["give_back 0 "])
        assert one.all[lender].loan, "only one loan has ended"


async def test_what_was_in_flight_is_kept_when_the_successor_cannot_start(tmp_path):
    async with kept(1) as one:
        assert await one.slots.start() == ""
        one.shared.in_flight(0).add(77)
        (tmp_path / "start.0").write_text("refuse")
        os.kill(one.pid(0), signal.SIGKILL)
        await until(lambda: any("in use" in text for text in one.said))
        (tmp_path / "start.0").unlink()
        await until(lambda: one.all[0].ready)
        first, *others = [line for line in requests(tmp_path, 0) if line.startswith("start")]
        assert first == "start 0 []" and len(others) > 1 and set(others) == {"start 0 [[77, False]]"}


async def test_no_change_misses_a_worker_that_starts_or_comes_before_its_start(tmp_path):
    async with kept(1) as one:
        changes, known = [0], []

        def arguments(slot: Slot) -> dict[str, int]:
            known.append(changes[0])
            return {}

        async def change() -> None:
            while not one.all[0].ready:
                changes[0] += 1
                one.slots.notify("change", slot=changes[0])
                await asyncio.sleep(0)

        one.slots._arguments = arguments
        await asyncio.gather(change(), one.slots.start())
        await until(lambda: f"change {changes[0]} " in requests(tmp_path, 0))
        first, *others = requests(tmp_path, 0)
        assert first.startswith("start") and requests(tmp_path, -1) == [], "before its start it knows no slot"
        assert [int(line.split()[1]) for line in others] == list(range(known[0] + 1, changes[0] + 1))


def test_no_other_transition_is_possible():
    slot = Slot(0, [], [])
    for wrong in (State.READY, State.LATE, State.DEAD):
        with pytest.raises(AssertionError):
            slot.enter(wrong)


async def test_the_end_of_a_worker_that_waits_at_its_gate_clears_nothing_of_the_one_that_serves():
    """Until the gate is open, what the slot has in shared memory is the other program's worker's."""
    async with kept(1) as one:
        limits, flying = one.shared.limits(0, 1), one.shared.in_flight(0)
        assert limits.take("connections", 1)
        flying.add(7)
        Counters(one.shared.counters(0)).gauge("relaymta_sessions", 3)
        one.slots.hold()
        begun = asyncio.create_task(one.slots.start())
        assert await one.slots.held() == ""
        one.stopping.set()
        await one.slots.stop()
        assert await begun == ""
        assert not limits.take("connections", 1), "it is still in use"
        limits.give("connections")
        assert limits.take("connections", 1) and not limits.take("connections", 1)
        assert flying.take() == ([(7, False)], 0)
        assert Counters(one.shared.counters(0)).reading("relaymta_sessions") == 3
