"""One run: a sink, a relay (or one that runs already), the load, the wait for what is under way, and the comparison."""

import asyncio
import contextlib
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from relaymta.bench.generator import Generator, Login, Target
from relaymta.bench.ledger import Account, Counter, Sent, State, account, arrivals_of
from relaymta.bench.load import Load
from relaymta.bench.messages import Messages, Recipients, Sizes
from relaymta.bench.peers import PEERS, Cannot, Peer, Plan
from relaymta.bench.processes import anonymous_bytes, cpu_seconds, start, stop, tail_of
from relaymta.control import program
from relaymta.disk.mounts import mount_of
from relaymta.errors import RelayError

__all__ = ["Interrupted", "Progress", "Run", "Setup", "Unreachable", "run"]

PROBE_SECONDS = 20.0  # for one message before the load
LOOK_SECONDS = 0.25  # between two looks at what has arrived
DRAIN_SECONDS = 600.0  # to the end of the wait, whatever arrives
# What ends a run: also that the terminal has gone, unless nohup has the program ignore that.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []))
LIMIT = 0.9  # of a core: what uses more was the limit


class Unreachable(RelayError):
    """The message before the load was not taken, or has not arrived."""


class Interrupted:
    """Whether a signal is to end the run, and which (`number`)."""

    def __init__(self) -> None:
        self.number = 0

    def is_set(self) -> bool:
        """Whether there was one."""
        return self.number != 0

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """The signals are noted, and raise nothing."""

        def note(number: int, _: object) -> None:
            self.number = number

        old = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Progress(NamedTuple):
    """How far a run is: `phase`: "starting", "load", "waiting", "comparing"; `done`: from 0 to 1; `left`: seconds, at most."""

    name: str
    phase: str
    done: float = 0.0
    left: float = 0.0
    sent: int = 0
    arrived: int = 0


@dataclass
class Setup:
    """What is to be run. `peer`: a name of PEERS, or "" for `target`, a relay that runs already, which routes everything to
    `listen`; there `sink` may be False: nothing is compared. `grace`: seconds without an arrival after which the rest counts as
    lost."""

    load: Load = field(default_factory=Load)
    peer: str = "relaymta"
    target: Target | None = None
    login: Login | None = None
    listen: list[tuple[str, int]] = field(default_factory=lambda: [("127.0.0.1", 0)])
    sink: bool = True
    profile: Path | None = None
    recipients: tuple[str, ...] = ()
    folder: Path = Path("/var/tmp")
    grace: float = 20.0
    workers: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    queued: Callable[[], set[bytes] | None] | None = None  # what is in the queue of `target`
    keep: Path | None = None  # where the ledger of what was sent is written


@dataclass
class Run:
    """What a run has shown. Times are those of CLOCK_MONOTONIC. `cpu`: seconds, of the `relay` (None: not ours to see), the
    `generator` (`share`: of a core, during the load) and the `sink`."""

    setup: Setup
    name: str
    version: str
    durability: str
    disk: str
    sent: Sent
    account: Account
    began: float
    loaded: float  # until all was sent
    ended: float  # until all had arrived
    why: str  # why the load ended: as of Generator
    connections: int
    failures: dict[str, int]
    sink: dict[str, Any]
    relay_cpu: float | None
    generator_cpu: float
    sink_cpu: float
    memory: int | None
    syncs: float | None

    @property
    def limits(self) -> list[str]:
        """Sentences about what else than the relay was the limit."""
        elapsed = max(1e-9, self.loaded - self.began)
        found = []
        if self.setup.load.rate == 0 or self.generator_cpu / elapsed >= LIMIT:
            for what, cpu in (("generator", self.generator_cpu), ("sink", self.sink_cpu)):
                if cpu / elapsed >= LIMIT:
                    found.append(f"the {what} was the limit: it used {min(1.0, cpu / elapsed):.0%} of a core")
        return found


class _Sink:
    """A sink in a process of its own."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        self.arrivals = folder / "arrived"
        self._said = folder / "sink.stderr"
        options = {
            "addresses": setup.listen,
            "profile": str(setup.profile or ""),
            "seed": setup.load.seed,
            "arrivals": str(self.arrivals),
        }
        with self._said.open("wb") as said:
            self.process = start(
                program("relaymta.bench.sink", json.dumps(options)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Cannot(f"the sink does not start: {tail_of(self._said).rpartition(chr(10))[2]}", 78)
        self.port = int(json.loads(line)[0][1])
        self.count = Counter(self.arrivals)

    def report(self) -> dict[str, Any]:
        """Stop it; what it has seen."""
        self.process.terminate()
        try:
            out = self.process.communicate(timeout=20)[0]
            return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            return {}

    def close(self) -> None:
        """End it."""
        stop(self.process, 5)


def run(setup: Setup, watch: Callable[[Progress], None], interrupted: Interrupted) -> Run:
    """Run it. `watch` is told how far it is, a few times a second; `interrupted` is set where a signal has ended the load: the
    result is what is known then. Cannot, Unreachable, OSError."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="relaymta-bench-", dir=setup.folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        name = setup.peer or "target"
        watch(Progress(name, "starting"))
        sink = None
        if setup.sink:
            sink = _Sink(folder, setup)
            stack.callback(sink.close)
        peer: Peer | None = None
        if setup.peer:
            below = folder / setup.peer
            below.mkdir(mode=0o755)
            folder.chmod(0o755)
            assert sink is not None
            plan = Plan(setup.load, sink.port, setup.profile is not None, setup.workers, setup.settings)
            peer = PEERS[setup.peer](below, plan)
            stack.callback(peer.close)
        with interrupted.noting():
            return _Trial(setup, watch, interrupted, folder, sink, peer).run()


class _Trial:
    """A run whose processes have started."""

    def __init__(
        self,
        setup: Setup,
        watch: Callable[[Progress], None],
        interrupted: Interrupted,
        folder: Path,
        sink: _Sink | None,
        peer: Peer | None,
    ) -> None:
        self._setup, self._watch, self._interrupted = setup, watch, interrupted
        self._folder, self._sink, self._peer = folder, sink, peer
        self._name = setup.peer or "target"
        number = secrets.randbits(63) | 1
        self._probe = number ^ 1
        recipients = Recipients(setup.load.recipients, setup.load.domains, setup.recipients)
        self._sent = Sent(number, recipients)
        self._messages = Messages(number, Sizes(setup.load.size), setup.load.seed)
        self._memory = 0
        self._before = 0  # rows of the probe

    def run(self) -> Run:
        """All of it."""
        setup, peer = self._setup, self._peer
        self._target = setup.target if peer is None else Target("127.0.0.1", peer.port)
        assert self._target is not None
        cpu = syncs = 0.0
        uvloop.run(self._probed())
        if peer is not None:
            cpu, syncs = cpu_seconds(peer.root), peer.syncs() or 0.0
        sink_cpu = cpu_seconds(self._sink.process.pid) if self._sink is not None else 0.0
        generator, spent, load_sink_cpu = uvloop.run(self._loaded(sink_cpu))
        self._wait()
        relay_cpu = cpu_seconds(peer.root) - cpu if peer is not None else None
        after = peer.syncs() if peer is not None else None
        found, seen = self._compared(self._left(), end=True)
        ended = max(generator.finished, max(found.first, default=0.0))
        return Run(
            setup, self._name, *self._about(), self._sent, found, generator.began, generator.finished, ended, generator.ended,
            generator.connections, generator.failures, seen, relay_cpu, spent, load_sink_cpu, self._memory or None,
            None if after is None else after - syncs,
        )  # fmt: skip

    def _about(self) -> tuple[str, str, str]:
        """(version, durability, file system) of the relay."""
        if self._peer is None:
            return "", "not known: it was not started here", ""
        mount = mount_of(self._folder)
        return self._peer.version, self._peer.durability, mount.kind if mount is not None else "?"

    # The load

    async def _probed(self) -> None:
        """One message, which must arrive. Unreachable."""
        load = Load(1, 1, PROBE_SECONDS, tls=self._setup.load.tls, auth=self._setup.load.auth, ramp=0.0)
        sent = Sent(self._probe, self._sent.recipients)
        generator = self._generator(load, sent, Messages(self._probe, Sizes("1k")))
        with self._signals(generator):
            await generator.run()
        if self._interrupted.is_set():
            return
        where = f"{generator.target.host}:{generator.target.port}"
        if not sent.count(State.ACCEPTED):
            why = [*generator.failures, *(reply.decode("latin-1") for reply in sent.replies)]
            raise Unreachable(f"{where} did not take a message: {'; '.join(why) or 'no reply'}")
        if self._sink is None:
            return
        end = time.monotonic() + PROBE_SECONDS * (3 if self._setup.profile else 1)
        while not self._sink.count():
            if self._interrupted.is_set():
                return
            if time.monotonic() > end:
                listen = ", ".join(f"{host}:{port}" for host, port in self._setup.listen)
                raise Unreachable(
                    f"{where} took a message to {sent.recipients.of(0)[0].decode()}, and it has not come to the sink at "
                    f"{listen}: does it route everything there? Nothing more was sent"
                )
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)  # copies of other recipients
        self._before = self._sink.count()

    def _generator(self, load: Load, sent: Sent, messages: Messages) -> Generator:
        assert self._target is not None
        login = self._peer.login if self._peer is not None else self._setup.login
        return Generator(self._target, load, sent, messages, login)

    async def _loaded(self, sink_cpu: float) -> tuple[Generator, float, float]:
        """(generator, its CPU seconds, those of the sink during the load)."""
        generator = self._generator(self._setup.load, self._sent, self._messages)
        before = _own_cpu()
        with self._signals(generator):
            looking = asyncio.create_task(self._looking(generator))
            try:
                await generator.run()
            finally:
                looking.cancel()
        spent = _own_cpu() - before
        sink = self._sink
        return generator, spent, cpu_seconds(sink.process.pid) - sink_cpu if sink is not None else 0.0

    @contextlib.contextmanager
    def _signals(self, generator: Generator) -> Iterator[None]:
        """The signals end the load."""
        loop = asyncio.get_running_loop()

        def ended(number: int) -> None:
            self._interrupted.number = number
            generator.stop()

        old = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, ended, number)
        if self._interrupted.is_set():
            generator.stop()
        try:
            yield
        finally:
            for number, handler in old.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def _looking(self, generator: Generator) -> None:
        load = self._setup.load
        looks = 0
        while True:
            elapsed = time.monotonic() - generator.began if generator.began else 0.0
            done = max(elapsed / load.seconds, len(self._sent) / load.messages)
            left = load.seconds - elapsed
            if len(self._sent) > 100:
                left = min(left, (load.messages - len(self._sent)) * elapsed / len(self._sent))
            self._watch(Progress(self._name, "load", min(1.0, done), max(0.0, left), len(self._sent), self._count()))
            if looks % 4 == 0 and self._peer is not None:
                self._memory = max(self._memory, anonymous_bytes(self._peer.root))
            looks += 1
            await asyncio.sleep(LOOK_SECONDS)

    def _count(self) -> int:
        return max(0, self._sink.count() - self._before) if self._sink is not None else 0

    # Afterwards

    def _wait(self) -> None:
        """Until all has arrived, nothing more is in the queue, or nothing comes any more."""
        if self._sink is None:
            return
        began = last = time.monotonic()
        accepted = self._sent.count(State.ACCEPTED) * self._sent.recipients.each
        refused = sum(map(len, self._sent.refused.values()))
        expected, rows = accepted - refused, -1
        asked, empty = began + 2.0, False
        while not self._interrupted.is_set() and time.monotonic() < min(last + self._setup.grace, began + DRAIN_SECONDS):
            now, count = time.monotonic(), self._count()
            if count != rows:
                rows, last = count, now
            self._watch(Progress(
                self._name, "waiting", min(1.0, count / max(1, expected)), last + self._setup.grace - now, len(self._sent), count
            ))  # fmt: skip
            if count >= expected:
                missing = self._compared(set())[0].lost
                if not missing:
                    return
                expected = max(expected, count) + missing  # copies that came twice do not count
            if now > asked and now > last + 1:
                # A listing may miss what is moved within the queue meanwhile (Postfix: deferred to active): two in a row do not.
                found = self._queued() == set() and self._count() == count
                if empty and found:
                    return
                asked, empty = time.monotonic() + (1.0 if found else 2.0), found
            time.sleep(LOOK_SECONDS)

    def _queued(self) -> set[bytes] | None:
        if self._peer is not None:
            return self._peer.queued()
        return self._setup.queued() if self._setup.queued is not None else None

    def _left(self) -> set[bytes] | None:
        """The queue at the end: what one of two listings shows, for the reason in `_wait`; else it would count as lost."""
        first, second = self._queued(), self._queued()
        return first if second is None else second if first is None else first | second

    def _compared(self, queued: set[bytes] | None, end: bool = False) -> tuple[Account, dict[str, Any]]:
        """The comparison, and what the sink has seen; `end`: it is stopped before."""
        if end:
            self._watch(Progress(self._name, "comparing", 1.0, 0.0, len(self._sent), self._count()))
            if self._setup.keep is not None:
                self._sent.write(self._setup.keep)
        if self._sink is None:
            return account(self._sent, None, queued), {}
        seen = self._sink.report() if end else {}
        rows, _ = arrivals_of(self._sink.arrivals)
        return account(self._sent, (row for row in rows if row.run != self._probe), queued), seen


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import platform

    return {"cores": os.cpu_count(), "system": platform.release(), "python": platform.python_version()}


def times_of(found: Run) -> dict[str, "array[float]"]:
    """Seconds from when a message was due, of each that was accepted: `reply` (from its final dot to 250), `accepted` (to 250)
    and `arrived` (to the sink; of those that have arrived)."""
    sent = found.sent
    reply, accepted, arrived = array("d"), array("d"), array("d")
    for serial, state in enumerate(sent.states):
        if state == State.ACCEPTED:
            reply.append(sent.answered[serial] - sent.dotted[serial])
            accepted.append(sent.answered[serial] - sent.intended[serial])
            if found.account.first[serial]:
                arrived.append(found.account.first[serial] - sent.intended[serial])
    return {"reply": reply, "accepted": accepted, "arrived": arrived}
