"""The old program's end of an upgrade, where what comes in the middle is too rare for a real one."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from types import SimpleNamespace

from relaymta.supervisor import upgrade as module
from relaymta.supervisor.upgrade import Upgrade


@asynccontextmanager
async def unchanged():
    yield


async def test_a_stop_waits_for_the_end_of_a_program_that_does_not_take_over(monkeypatch):
    ending, may_end = asyncio.Event(), asyncio.Event()

    class Successor:
        process = SimpleNamespace(pid=1)
        errors = os.memfd_create("x")

        async def end(self, seconds: float) -> None:
            ending.set()
            await may_end.wait()

    async def start(words):
        return Successor()

    async def prepared(successor, seconds):
        raise module._Failed("it is of clay")

    one = Upgrade(
        SimpleNamespace(  # type: ignore[arg-type]
            slots=SimpleNamespace(take_back=lambda: None), machine=SimpleNamespace(changed=None), stopping=asyncio.Event(),
            configuration=SimpleNamespace(unchanged=unchanged), log=SimpleNamespace(event=lambda name, **fields: None),
        )
    )  # fmt: skip
    monkeypatch.setattr(one, "_start", start)
    monkeypatch.setattr(one, "_prepared", prepared)
    asked = asyncio.create_task(one.run("", 1.0))
    await ending.wait()
    stopped = asyncio.create_task(one.abort())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stopped.done(), "the new program and its workers have the spool"
    may_end.set()
    await stopped
    assert (await asked)["why"] == "it is of clay"


async def test_signals_are_passed_on_once_a_program_has_taken_over():
    one = Upgrade(SimpleNamespace(slots=None))  # type: ignore[arg-type]
    one.pass_on(signal.SIGTERM)  # to nobody
    process = await asyncio.create_subprocess_exec("sleep", "1000")
    one.pid = process.pid
    one.pass_on(signal.SIGTERM)
    assert await process.wait() == -signal.SIGTERM
    one.pass_on(signal.SIGTERM)  # it has ended already
