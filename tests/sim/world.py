"""One simulated run: two workers, peers, clients and operators, drawn from a seed."""

import hashlib
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from relaymta.config import Config
from relaymta.node import SiteState
from relaymta.proto.envelope import DSN
from relaymta.proto.smtp_client import ClientSession, Features
from relaymta.queue import format_id
from relaymta.queue.store import Store
from relaymta.shm import Shared
from tests.sim import inside
from tests.sim.ledger import Ledger, Message
from tests.sim.peers import Host, Network, Taken
from tests.sim.scenario import Scenario
from tests.sim.seams import Clock, Disk, seams
from tests.sim.stage import Process, Stage
from tests.sim.worker import Worker

__all__ = ["Failure", "World", "run"]

CHECK_SHARE = 0.04  # of the steps that are followed by a check of memory, and
DISK_SHARE = 0.08  # of these by one of the disk
STEPS = 400_000
EXPECTED = ("simulated", "ClientGone", "closed/deleted/dropped object")  # the second: LMDB was opened again while a thread read
DAMAGED = ("is not where its row says", "does not match its checksum", "is cut short")  # no disk here damages a body
MOST_OFFERS = 12  # of an entry within a second
SHORT = 40  # lines of a short trace


class Failure(AssertionError):
    """What must not happen did. The text has the seed and a short trace."""


class World:
    """The machine, and everything outside of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.stage = Stage(self.random)
        self.clock = Clock(self.stage)
        self.ledger = Ledger(self.wrong)
        self.network = Network(self.stage, self._taken, self.ledger.refused)
        self.shared = Shared.create()
        self.states: dict[tuple[str, str, str], SiteState] = {}  # as the supervisor stores them
        self.trace: list[tuple[float, str, str]] = []  # when, which message ("": none), what
        self.digest = hashlib.sha256()
        self.found = ""
        self.about: Message | None = None
        self.variant = 0
        self._downs: dict[tuple[str, str], float] = {}  # when a process counted the last failure of a site
        self.system: Any = None
        self._checks = Random(seed)  # so that a replay with more checks has the same run
        self._none = Disk()
        self.workers = [Worker(self, slot, folder / f"w{slot}") for slot in range(2)]
        self._hosts()
        self.scenario = Scenario(self)

    # The machine

    def _hosts(self) -> None:
        random, network = self.random, self.network
        for name in ("m1.test", "m2.test", "m3.test", "m4.test", "ok.test", "h1.test", "h2.test", "h3.test"):
            features = Features(
                random.random() < 0.8, random.random() < 0.7, True, random.choice((None, 0, 20_000, 2500)), random.random() < 0.3
            )
            network.add(Host(name, features, "good", random.choice((0.002, 0.02, 0.3)), random.random() < 0.3))
        network.exchanges = {
            "a.test": [(10, "m1.test")],
            "b.test": [(10, "m1.test")],
            "c.test": [(10, "m2.test"), (20, "m3.test")],
            "d.test": [(10, "m3.test"), (10, "m4.test")],
        }
        network.addresses["e.test"] = network.addresses["m4.test"]  # no MX

    def config_of(self, folder: Path) -> Config:
        return _config(self.variant, self.scenario.max_age).model_copy(update={"spool": str(folder)})

    def disk_of(self, process: Process | None) -> Disk:
        return next((worker.disk for worker in self.workers if process is not None and worker.process is process), self._none)

    # Reports

    def say(self, what: str, message: Message | int | None = None) -> None:
        """Add a line to the trace."""
        ident = message.ident if isinstance(message, Message) else message or 0
        name = format_id(ident) if ident else ""
        line = (round(self.stage.now, 6), name, what)
        self.trace.append(line)
        self.digest.update(repr(line).encode())

    def wrong(self, what: str, message: Message | None = None) -> None:
        """Something happened that must not; the run ends after this step."""
        self.say(f"WRONG: {what}", message)
        if not self.found:
            self.found, self.about = what, message

    def logged(self, worker: Worker, event: str, fields: dict[str, Any]) -> None:
        message = self.ledger.named(fields["id"]) if "id" in fields else None
        self.say(f"{worker.process.name} log {event} {_short(fields)}", message)
        if event == "site" and fields["state"] == "down":
            self._down(worker, fields["route"])
        if event == "warning":
            text = fields["text"]
            if any(word in text for word in DAMAGED):
                self.wrong(text, message)
            if "an outcome was refused" in text or ("internal error" in text and not any(word in text for word in EXPECTED)):
                self.wrong(text)
        else:
            self.ledger.logged(worker, event, fields)

    def _down(self, worker: Worker, site: str) -> None:
        """A worker counts a failure of a site: all attempts under way when it counted the one before are that one."""
        hosts = {"smart": ("h1.test", "h2.test"), "away": ("h3.test",), "balance": ("h1.test", "h3.test")}.get(site)
        before = self._downs.get((worker.process.name, site), 0.0)
        began = max((self.network.began.get((worker.process.name, host), 0.0) for host in hosts or ()), default=0.0)
        if hosts and before and began <= before:
            self.wrong(f"{site} has failed again, and nothing was tried since it failed at {before:.3f}")
        self._downs[worker.process.name, site] = self.stage.now

    def offered(self, entry: Any) -> None:
        """An entry is offered to delivery. The same one is not offered again and again: whoever puts it back lets its queue
        sleep, or holds it."""
        message = self.ledger.messages.get(entry.ident)
        if message is None:
            return
        message.offered = [when for when in message.offered if when > self.stage.now - 1.0] + [self.stage.now]
        if len(message.offered) > MOST_OFFERS * len(message.recipients):
            self.wrong(f"offered {len(message.offered)} times in a second", message)

    def _taken(self, record: Taken, data: bytes) -> None:
        self.ledger.taken(record, data)
        self.say(f"{record.host} has it for {record.address} from {record.process.name}", self.ledger.named(record.ident))

    def began(self, core: ClientSession, mail: Any) -> None:
        """An attempt begins."""
        process = self.stage.process
        worker = next((one for one in self.workers if one.process is process), None)
        if worker is None or process is None or process.dead:
            return
        entry = mail.cargo
        if (
            entry.ident not in self.ledger.messages and entry.envelope.flags & DSN
        ):  # a scan found it before its commit was reported
            self.ledger.add(Message(entry.ident, worker.slot, "", list(entry.envelope.recipients), None, True, True))
        message = self.ledger.messages.get(entry.ident)
        self.say(f"{process.name} attempt {[address for _, address in mail.todo]}", mail.cargo.ident)
        why = "" if process.committing else inside.attempt(worker.queue, mail.cargo)
        if why:
            self.wrong(why, message)
        elif message is not None and message.deleted:
            self.wrong("attempted after it was deleted", message)
        elif message is not None:
            first = mail.trail is None and not mail.asked
            host = self.network.names[id(core)]
            self.ledger.began(message, entry.queue, host, [address for _, address in mail.todo], first)

    def finished(self, entry: Any, results: Any) -> None:
        """An outcome is passed to the queue."""
        process = self.stage.process
        worker = next((one for one in self.workers if one.process is process), None)
        if worker is not None and process is not None and not process.dead:
            self.ledger.finished(entry, results, worker.queue.clock.now())

    def published(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """The supervisor gets a state, stores it, and sends it to all workers."""

        def arrived() -> None:
            if state is None:
                self.states.pop(key, None)
            else:
                self.states[key] = state
            for worker in self.workers:
                process = worker.process
                self.stage.after(self.random.random() * 0.01, lambda worker=worker, process=process: told(worker, process))

        def told(worker: Worker, process: Process) -> None:
            if worker.up and worker.process is process:
                process.loop.call_soon(lambda: worker.up and worker.site_state(state, key))

        self.stage.after(self.random.random() * 0.01, arrived)

    def did_not_start(self, worker: Worker, error: Exception) -> None:
        self.say(f"{worker.process.name} did not start: {type(error).__name__}: {error}")
        if "simulated" not in str(error):
            self.wrong(f"a worker did not start: {type(error).__name__}: {error}")
        process = worker.process

        def ends() -> None:
            if worker.process is process and not process.dead:
                worker.kill()
                self.compare(worker, "exit")
                self.stage.after(1.0, lambda: self.scenario.again(worker))

        self.stage.after(0.0, ends)

    def started(self, worker: Worker) -> None:
        self.say(f"{worker.process.name} started")

    def stopped(self, worker: Worker) -> None:
        self.say(f"worker {worker.slot} stopped")
        self.compare(worker, "stop")
        self.stage.after(self.random.random() * 2, lambda: self.scenario.again(worker))

    def compare(self, worker: Worker, why: str) -> None:
        """Compare the ledger with the disk of a worker that does not run."""
        path = worker.folder / f"shard-{worker.slot}" / "lmdb"
        if (path / "data.mdb").exists():
            try:
                store = Store(path, readonly=True)
            except Exception as error:
                if "MDB_NOTFOUND" not in str(error):  # killed before the tables were made
                    raise
                found: Any = {}
            else:
                found = inside.contents(store)
                store.close()
        else:
            found = {}
        self.say(f"after the {why} of worker {worker.slot}: {len(found)} messages on disk")
        self.ledger.compare(worker.slot, found)

    # The run

    def check(self, everything: bool = False) -> None:
        """Counts are equal to what is there."""
        for worker in self.workers:
            if worker.up and not worker.process.committing:
                self._wrong_if(worker, inside.memory(worker.queue))
                if everything or self._checks.random() < DISK_SHARE:
                    self._wrong_if(worker, inside.disk(worker.queue))
        self._wrong_if(None, inside.slots(self.workers, self.shared.limits(0, 2)))

    def _wrong_if(self, worker: Worker | None, text: str) -> None:
        if text:
            self.wrong(f"worker {worker.slot}: {text}" if worker is not None else text)

    def run(self, closely: bool = False) -> None:
        """Run the scenario. `closely`: check after every step. Raises Failure."""
        for worker in self.workers:
            worker.boot()
        self.scenario.plan()
        while not self.scenario.over:
            if self.stage.stepped > STEPS:
                self.wrong(f"it has not ended after {STEPS} steps")
            elif not self.stage.step():
                self.wrong("nothing is left to do, and it is not over")
            if self.stage.failures:
                self.wrong(self.stage.failures[0])
            if not self.found and (closely or self._checks.random() < CHECK_SHARE):
                self.check(closely)
            if self.found:
                raise Failure(self.story())

    def story(self, lines: int = SHORT) -> str:
        """The seed, what went wrong, and the last steps about the message concerned."""
        name = self.about.name if self.about is not None else ""
        chosen = [line for line in self.trace if name in (line[1], "") or name in line[2]] if name else self.trace
        shown = "\n".join(f"  {when:12.6f} {who:13} {what}" for when, who, what in chosen[-lines:])
        state = f"\n  its state: {self.about}" if self.about is not None else ""
        head = f"seed {self.seed}, step {self.stage.stepped}: {self.found} {name}"
        return f"{head}{state}\n{shown}\n  replay: python -m tests.sim {self.seed} --trace"

    def close(self) -> None:
        """Release everything."""
        for worker in self.workers:
            if hasattr(worker, "process") and not worker.process.dead:
                worker.process.kill()
            worker.release()
        os.close(self.shared.descriptor)


def _short(fields: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value}" for key, value in fields.items() if value not in ("", [], 0) and key not in ("id", "helo", "client")
    )


@lru_cache(8)
def _config(variant: int, max_age: int) -> Config:
    hosts = [["h1.test:25", "h2.test:25"], ["h2.test:25"], ["h2.test:25", "h1.test:25"]][variant % 3]
    config = Config.model_validate(
        {
            "hostname": "relay.test",
            "listener": [{"address": "127.0.0.1:25"}],
            "route": [
                {"name": "smart", "recipient_domain": ["s.test"], "hosts": hosts, "connections": 2 + variant % 2},
                {"name": "away", "recipient_domain": ["nowhere.test"], "hosts": ["h3.test:25"], "connections": 2},
                {"name": "balance", "recipient_domain": ["t.test"], "hosts": ["h1.test:25", "h3.test:25"], "mode": "balance"},
            ],
            "rule": [
                {"match": "4.2.1 busy", "action": "suspend", "for": 4, "scope": "tenant"},
                {"match": "4.3.0 later", "action": "retry", "for": 3},
                {"match": "4.3.1 full", "action": "slow", "for": 5},
            ],
            "site": [{"hosts": ["m2.test"], "connections": 1 + variant % 2, "rate": "120/m"}],
            "delivery": {"first_retry": 1, "connect_timeout": 4, "patience": 0.05, "idle": 2, "connections": 6},
            "queue": {"max_age": max_age},
        }
    )
    queue = config.queue.model_copy(update={"window": 12 + 4 * (variant % 3), "window_bytes": 6000})
    return config.model_copy(update={"queue": queue})


def run(seed: int, closely: bool = False) -> World:
    """Run a seed; the world as it was at the end. Raises Failure."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="relaymta-sim-", dir=shm if shm.is_dir() else None))
    world = World(seed, folder)
    try:
        with seams(world):
            try:
                world.run(closely)
            finally:
                world.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return world
