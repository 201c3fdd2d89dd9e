"""One worker process of the simulation: the real Shard (queue and dispatcher) of a worker, without intake and supervisor."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from relaymta.config import Config
from relaymta.dns import Resolver
from relaymta.metrics import Counters
from relaymta.node import SiteState, SiteStates
from relaymta.queue import Outcome
from relaymta.route.table import RouteTable
from relaymta.worker import Shard
from tests.sim.seams import Disk
from tests.sim.stage import Process

__all__ = ["Worker"]


class Lines:
    """The log of one worker: each event goes to the world."""

    dropped = 0
    muted = False

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def event(self, name: str, **fields: Any) -> None:
        if not self._worker.process.dead:
            self._worker.world.logged(self._worker, name, fields)


class _Shard(Shard):
    def _next_try(self, outcome: Outcome) -> int:
        return super()._next_try(outcome)


class Worker:
    """A slot: its process, which may die and start again, and its folder. It has the attributes that Shard reads."""

    def __init__(self, world: Any, slot: int, folder: Path) -> None:
        self.world = world
        self.slot, self.workers = slot, 2
        self.disk = Disk()
        self._folder = folder
        self._life = 0
        self.folder = folder / "0"
        self.folder.mkdir(parents=True)
        self.up = False  # accepts and delivers
        self.starting = False
        self.stopping = False
        self.queue: Any = None
        self.probed: dict[int, bool] = {}
        self.culprit = 0
        self.overlooked: dict[tuple[int, int], int] = {}
        self.process: Process
        self.shard: Shard

    def boot(self) -> None:
        """Start the process, as the supervisor does."""
        world = self.world
        self._life += 1
        self.process = Process(world.stage, f"w{self.slot}.{self._life}")
        self.starting, self.queue, self.overlooked = True, None, {}
        self.process.loop.call_soon(lambda: self.process.loop.create_task(self._start()))

    async def _start(self) -> None:
        world, shared = self.world, self.world.shared
        self.config: Config = world.config_of(self.folder)
        self.counters = Counters(shared.counters(self.slot))
        self.limits = shared.limits(self.slot, 2)
        self.rates = shared.rates(2)
        self.in_flight = shared.in_flight(self.slot)
        self.states = SiteStates(world.states.values())
        self.log = Lines(self)
        self.tokens = self.mail = None  # no route has OAuth, or keeps mail
        self.routes = RouteTable(self.config)
        self.resolver = Resolver([], now=world.clock.monotonic)
        process, culprit = self.process, self.culprit
        try:
            self.shard = _Shard(self, self.slot)  # type: ignore[arg-type]
            self.queue, self.dispatcher = self.shard.queue, self.shard.dispatcher
            await self.queue.start(culprit)
        except Exception as error:
            self.starting = False
            world.did_not_start(self, error)
            return
        assert process is self.process
        self.culprit = 0
        self.dispatcher.look_back()
        self.starting, self.up = False, True
        world.started(self)

    # What Shard and Dispatcher call

    def assign(self, envelope: Any, attempts: int) -> Any:
        return self.routes.assign(envelope, attempts)

    def sign_dsn(self, data: bytes) -> bytes:
        return b""

    def quarantine_over(self, keeper: Any, octets: int) -> tuple[int, bool]:
        return 0, False

    def note_quarantine(self) -> None:
        pass

    def send_site_state(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        if not self.process.dead:
            self.world.published(state, key)

    def site_state(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """As `Worker._site_state`: the supervisor sends a state to all workers."""
        if state is None:
            self.states.forget(*key)
        else:
            self.states.learn(state)
        self.dispatcher.site_state_changed(state, key)

    # What happens to it

    def reload(self) -> None:
        self.config = self.world.config_of(self.folder)
        self.routes = RouteTable(self.config)
        self.dispatcher.reconfigure(self.config, self.routes)
        self.queue.schedule.wake()

    def kill(self) -> None:
        """As kill -9: what the disk has now is what is left."""
        world, before = self.world, self.folder
        self.folder = self._folder / str(self._life)
        shutil.copytree(before, self.folder, ignore=shutil.ignore_patterns("lock", "lock.mdb"))
        if hasattr(self, "limits"):
            self.limits._cells = self.rates._cells = self.in_flight._cells = _Nothing()  # type: ignore[assignment]
        self.up = self.starting = False
        self.process.kill()
        world.shared.clear_limits(self.slot)
        probed, self.culprit = world.shared.in_flight(self.slot).take()
        self.probed = dict(probed)
        self.release()
        shutil.rmtree(before)

    def release(self) -> None:
        """Close what a process that is dead had open."""
        queue = self.queue
        if queue is not None:
            for close in (queue.store.close, queue.segments.close, lambda: os.close(queue._lock)):
                with contextlib.suppress(Exception):
                    close()

    async def stop(self) -> None:
        """As `Worker.run` after a stop request."""
        await self.dispatcher.drain(3.0, 6.0)
        await self.queue.stop()
        await self.resolver.close()
        world = self.world
        self.process.kill()
        world.shared.clear_limits(self.slot)
        world.shared.in_flight(self.slot).take()
        self.probed, self.culprit, self.stopping = {}, 0, False
        world.stopped(self)


class _Nothing:
    """The shared memory of a process that is dead."""

    count = 512

    def __getattr__(self, name: str) -> Any:
        return lambda *args: 0
