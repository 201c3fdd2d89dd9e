"""What happens in a run: clients, operators, faults, deaths; then calm, in which every message must end."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import lmdb

from relaymta.dns import DnsFailure, NoData, NoSuchName
from relaymta.errors import StoreError
from relaymta.node import BOUNCE, HOLD, SUSPENDED, SiteState
from relaymta.proto.envelope import DSN, EIGHT_BIT, HELD, POLICY_HELD, Body, Envelope
from relaymta.queue import Filter, format_id, wall_ms
from relaymta.send.explain import explain, goes_to
from tests.sim import inside
from tests.sim.ledger import Message
from tests.sim.peers import MODES
from tests.sim.stage import Expected
from tests.sim.worker import Worker

__all__ = ["ClientGone", "Scenario"]

DOMAINS = ("a.test", "b.test", "c.test", "d.test", "e.test", "s.test", "s.test", "t.test", "gone.test")
VERBS = ("flush", "hold", "release", "delete", "bounce", "reroute", "policy")
FAULTS = ("write", "sync", "read", "commit")
RUDE = 0.02  # of the clients have a callback that raises
PATIENCE = 140.0  # seconds of calm after which all mail has ended: the longest retry, and what it takes


WATCH = 2.5  # seconds between two looks for mail that no scan reads,
ENDS = 6  # looks for what is left, 4 s apart
STARVED = 6  # and how many of them may find it


class ClientGone(Expected):
    """Raised by a client's callback; the simulation expects it."""


class Scenario:
    """The events of one run, drawn from the seed."""

    def __init__(self, world: Any) -> None:
        random = world.random
        self.world = world
        self.random = random
        self.stage = world.stage
        self.over = False
        self.calm = False
        self.max_age = random.choice((20, 60, 400))
        self.length = random.choice((8.0, 15.0, 30.0))
        self.busy = random.randrange(15, 50)  # events
        self._policies: list[tuple[str, str, str]] = []
        self._names = [""]  # of hold policies, also past ones
        self._numbers = 0
        self._until = 0.0
        self._ends = 0

    def plan(self) -> None:
        """Draw when what happens."""
        now = self.stage.now
        self.stage.after(0.2, self._submit)
        for _ in range(self.busy):
            self.stage.at(now + self.random.random() * self.length, self._something)
        self.stage.at(now + self.length, self._begin_calm)
        self.stage.after(WATCH, self._watch)

    def _watch(self) -> None:
        """What is due and has room in the window is read before long: no queue starves."""
        self.stage.after(WATCH, self._watch)
        for worker in self.world.workers:
            if not worker.up or worker.process.committing:
                continue
            before = worker.overlooked
            now = {key: before.get(key, 0) + 1 for key in sorted(inside.overlooked(worker.queue))}
            worker.overlooked = now
            for (ident, _), times in now.items():
                if times >= STARVED:
                    self.world.wrong("due, and no scan reads it", self.world.ledger.messages.get(ident))

    def _something(self) -> None:
        if self.calm:
            return
        (event,) = self.random.choices([one for one, _ in EVENTS], [share for _, share in EVENTS])
        event(self)

    def _worker(self) -> Worker | None:
        """A worker that is up."""
        up = [worker for worker in self.world.workers if worker.up]
        return self.random.choice(up) if up else None

    def _spawn(self, worker: Worker, request: Callable[[], Coroutine[Any, Any, Any]], what: str) -> None:
        """Run an operator's request in a worker's process."""
        process = worker.process

        async def run() -> None:
            try:
                await request()
            except StoreError as error:
                self.world.say(f"{process.name} {what}: {error}")
            except lmdb.Error as error:  # the environment was opened again meanwhile, after a failed commit
                self.world.say(f"{process.name} {what}: {error}")
            except OSError as error:
                if "simulated" not in str(error):
                    raise
            except RuntimeError as error:
                if "shutdown" not in str(error):
                    raise

        process.loop.call_soon(lambda: process.loop.create_task(self._watched(run, what)))

    async def _watched(self, request: Callable[[], Coroutine[Any, Any, Any]], what: str) -> None:
        try:
            await request()
        except Expected:
            pass
        except Exception as error:
            self.stage.failures.append(f"{what}: {type(error).__name__}: {error}")

    # Clients

    def _submit(self) -> None:
        worker = self._worker()
        if worker is not None:
            for _ in range(self.random.randrange(1, 7)):
                worker.process.loop.call_soon(self._send, worker)

    def _send(self, worker: Worker) -> None:
        if not worker.up:
            return
        random = self.random
        self._numbers += 1
        sender = random.choice(("", "a@ok.test", "b@ok.test", "c@a.test"))
        count = random.choice((1, 1, 1, 1, 2, 3, 12))
        some = [f"r{self._numbers}-{number}@{random.choice(DOMAINS)}" for number in range(count)]
        queue = worker.queue
        ident = queue.ident()
        octets = random.choice((0, 100, 100, 1000, 3000, 12_000) if random.random() < 0.5 else (100, 400))
        lines = b"".join(b"%s%d line\r\n" % (random.choice((b"", b".", b"..")), n) for n in range(octets // 12))
        data = f"X-Sim: {format_id(ident)}\r\nSubject: x\r\n\r\n".encode() + lines
        flags = (HELD if random.random() < 0.03 else 0) | (EIGHT_BIT if random.random() < 0.1 else 0)
        message = self.world.ledger.add(Message(ident, worker.slot, sender, some, data))
        now = wall_ms()
        application, priority = random.choice(("", "", "app")), random.choice(("normal", "normal", "express", "bulk"))
        envelope = Envelope(sender, some, len(data), flags, now, queue.deadline(), application=application, priority=priority)
        rude = random.random() < RUDE
        self.world.say(f"{worker.process.name} client sends {len(data)} octets from <{sender}> to {some}", message)

        def done(error: StoreError | None, place: Body | None = None) -> None:
            if worker.process.dead:
                return
            self.world.say(f"client is told {error or 'ok'}{', and raises' * rude}", message)
            self.world.ledger.answered(message, error)
            if error is not None:
                message.deleted = True
                if isinstance(place, Body):
                    self.stage.after(0, lambda: queue.segments.big_path(ident).unlink(missing_ok=True))
            if rude:
                raise ClientGone

        if random.random() < 0.15:
            self._spawn(worker, lambda: self._asks(worker, some[0].rpartition("@")[2]), "DNS query")
        if len(data) > queue.big_limit:
            self._spawn(worker, lambda: self._send_large(worker, ident, envelope, data, done), "large message")
        else:
            cut = random.randrange(len(data))
            queue.submit(ident, envelope, [data[:cut], data[cut:]], done)

    async def _send_large(self, worker: Worker, ident: int, envelope: Envelope, data: bytes, done: Any) -> None:
        queue, loop = worker.queue, worker.process.loop
        file: Any = None

        def write() -> Any:
            nonlocal file
            file = queue.big_body(ident)
            file.write([data])
            return file.finish([])

        try:
            place = await loop.run_in_executor(None, write)
        except OSError as error:
            if file is not None:
                file.discard()
            done(StoreError(str(error)))
            return
        queue.submit(ident, envelope, place, lambda error: done(error, place))

    # Operators

    def _filter(self) -> Filter:
        random = self.random
        kind = random.randrange(6)
        if kind == 0:
            return Filter(recipient_domain=random.choice(DOMAINS))
        if kind == 1:
            return Filter(sender=random.choice(("a@ok.test", "b@ok.test")))
        if kind == 2:
            return Filter(application="app")
        if kind == 3:
            return Filter(route="smart")
        return Filter()

    def _verb(self) -> None:
        worker = self._worker()
        if worker is not None:
            verb = self.random.choice(VERBS)
            self._spawn(worker, lambda: self._change(worker, verb, self._filter()), verb)

    async def _change(self, worker: Worker, verb: str, chosen: Filter) -> None:
        """A verb over all pages, as `relaymta queue VERB` does."""
        world, queue, after, first, bound = self.world, worker.queue, 0, True, 0
        word = {
            "bounce": "unwanted", "reroute": self.random.choice(("away", "smart")), "policy": self.random.choice(self._names),
        }.get(verb, "")  # fmt: skip
        world.say(f"{worker.process.name} operator: {verb} {word} {chosen}")
        while first or after:
            first = False
            page = await queue.page(chosen, after, lambda name, site: goes_to(worker.dispatcher, name, site))
            after, chosen = (
                page["after"],
                Filter(**{f: getattr(chosen, f) for f in chosen.__dataclass_fields__} | {"until": page["until"]}),
            )
            idents = page["ids"]
            if bound and idents and max(idents) > bound:
                world.wrong(f"{verb} has reached a message that came after its start", world.ledger.messages.get(max(idents)))
            bound = bound or queue.ident()
            if idents:
                await self._change_page(worker, verb, idents, word)
            if verb == "flush":
                worker.dispatcher.flush()
                await queue.wake_queues()

    async def _change_page(self, worker: Worker, verb: str, idents: list[int], word: str) -> None:
        known = self.world.ledger.messages
        if set(idents) - set(known):  # DSNs whose commit is not reported yet
            for ident, (envelope, _) in inside.contents(worker.queue.store).items():
                if ident in idents and ident not in known and envelope.flags & DSN:
                    self.world.ledger.add(Message(ident, worker.slot, "", list(envelope.recipients), None, True, True))
        messages = [known[ident] for ident in idents if ident in known]
        for message in messages:
            message.contested = message.contested or (message.deleting and verb == "delete")
            message.deleting = message.deleting or verb == "delete"
            self.world.say(f"operator begins to {verb}", message)
        changed: int | None = None
        try:
            changed, skipped = await worker.queue.change_messages(verb, idents, word)
            said = f"{verb} {[format_id(i) for i in idents]}: {changed} changed, {skipped} skipped"
            self.world.say(f"{worker.process.name} operator: {said}")
        finally:
            if verb == "policy":
                worker.dispatcher.policies.held(word)
            if verb == "delete" and not worker.process.dead:
                await self._deleted(worker, messages, changed if len(messages) == len(idents) else None)

    async def _deleted(self, worker: Worker, messages: list[Message], changed: int | None) -> None:
        """Note which messages a deletion has reached; `changed`: how many the queue says (None: it failed, perhaps half-way)."""
        while worker.process.committing:
            await asyncio.sleep(0.01)
        there = inside.contents(worker.queue.store)
        ends = {one.ident for one in messages if one.ended or set(one.outcomes.values()) - {"pending"}}
        gone = [one for one in messages if one.ident not in there and one.ident not in ends]
        for message in messages:
            message.deleted = message.deleted or message in gone
            message.deleting = False
        if changed is not None and changed != len(gone) and not any(one.contested for one in messages):
            self.world.wrong(f"{changed} messages were deleted by what the operator is told, {len(gone)} are gone")

    def _move(self) -> None:
        worker = self._worker()
        if worker is not None:
            self._spawn(worker, lambda: self._move_queues(worker), "move")

    async def _move_queues(self, worker: Worker) -> None:
        label = self.random.choice(("away", "smart"))
        route = worker.routes.named(label)
        chosen = self.random.choice((Filter(), Filter(application="app"), Filter(route="smart")))
        self.world.say(f"{worker.process.name} operator: move {chosen} to {label}")
        at_site: Callable[[Any, str], bool] = lambda name, site: goes_to(worker.dispatcher, name, site)  # noqa: E731
        found = await worker.queue.move_queues(chosen, at_site, lambda name: worker.routes.by_route(route, name), False)
        self.world.say(f"{worker.process.name} moved {found}")
        worker.dispatcher.forget_parked()

    def _read(self) -> None:
        worker = self._worker()
        if worker is not None:
            self._spawn(worker, lambda: self._look(worker), "reading")

    async def _look(self, worker: Worker) -> None:
        queue = worker.queue
        live = [message for message in self.world.ledger.messages.values() if message.shard == worker.slot and not message.ended]
        await queue.summary()
        await queue.shape()
        queue.watch_totals(lambda totals: None)
        if live:
            message = self.random.choice(live)
            await queue.message(message.ident)
            await explain(worker.dispatcher, message.ident)
            data = b"".join([piece async for piece in queue.raw(message.ident)]) or None  # none: not there
            if data is not None and message.data is not None and data != message.data:
                self.world.wrong("its message data on the disk is other than what was sent", message)

    def _ask(self) -> None:
        """Somebody else asks the worker's DNS cache (as SPF does), and does not wait for long."""
        worker = self._worker()
        if worker is not None:
            self._spawn(worker, lambda: self._asks(worker, self.random.choice(DOMAINS)), "DNS query")

    async def _asks(self, worker: Worker, domain: str) -> None:
        await asyncio.sleep(self.random.random() * 0.005)
        try:
            async with asyncio.timeout(self.random.random() * 0.02):
                await worker.resolver.mx(domain)
        except (TimeoutError, DnsFailure, NoData, NoSuchName):
            pass

    def _sweep(self) -> None:
        worker = self._worker()
        if worker is not None:
            self._spawn(worker, lambda: worker.queue.task(lambda change: change.sweep()), "sweep")

    def _mistake(self) -> None:
        """A task of the queue with a defect: it raises half-way."""
        worker = self._worker()
        if worker is not None:
            self._spawn(worker, lambda: self._failing(worker), "a task with a defect")

    async def _failing(self, worker: Worker) -> None:
        def run(change: Any) -> None:
            for ident, envelope in inside.contents(worker.queue.store).items():
                change.materialize(ident)
                envelope = worker.queue.store.envelope(change.txn, ident)
                if envelope is not None:
                    change.unplace(ident, envelope, envelope.placements[0])
                    break
            raise ValueError("simulated defect")

        try:
            await worker.queue.task(run)
        except ValueError:
            self.world.say(f"{worker.process.name} a task failed")

    def _memory(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.queue.entries.keep_data(self.random.random() < 0.5)

    # Policies and suspensions

    def _policy(self) -> None:
        if self._policies and self.random.random() < 0.5:
            key = self._policies.pop(self.random.randrange(len(self._policies)))
            self._remove(key)
            return
        kind, site = self.random.choice((
            (HOLD, "recipient_domain=a.test"), (HOLD, "sender=a@ok.test"),
            (BOUNCE, "recipient_domain=c.test"), (BOUNCE, "application=app"),
            (SUSPENDED, "m1.test"), (SUSPENDED, "smart"), (SUSPENDED, ""),
        ))  # fmt: skip
        now = wall_ms()
        about = "app" if kind == SUSPENDED and (not site or self.random.random() < 0.3) else ""
        state = SiteState(kind, site, about, now, now + self.random.choice((2000, 8000, 20_000)), "operator", "because")
        self._policies.append(state.key)
        self._names += [site] if kind == HOLD else []
        chance = self.random.random()
        if kind == HOLD and chance < 0.2:
            self._fail(self.random.choice(self.world.workers).disk, {"commit": 0.7})
        elif kind == HOLD and chance < 0.6:
            self._slow(self.random.choice(self.world.workers))
        self.world.say(f"operator adds {state.key}")
        self.world.published(state, state.key)
        if kind == HOLD and self.random.random() < 0.5:
            self.stage.after(self.random.random(), lambda: self._remove(state.key))

    def _remove(self, key: tuple[str, str, str]) -> None:
        if key in self.world.states:
            self.world.say(f"operator removes {key}")
            self.world.published(None, key)

    # Faults

    def _mode(self) -> None:
        host = self.random.choice(list(self.world.network.hosts.values()))
        host.mode = self.random.choice(MODES)
        self.world.say(f"{host.name} is {host.mode}")
        if host.mode in ("refuse", "dying"):
            for wire in [wire for wire in self.world.network.wires if wire.host is host]:
                wire.die(self.random.random() < 0.5)

    def _dns(self) -> None:
        network = self.world.network
        network.dns_fails = self.random.choice((0.0, 0.0, 0.3, 1.0))
        network.dns_slow = self.random.random() < 0.3
        network.ttl = self.random.choice((0, 5, 60))
        self.world.say(f"DNS: {network.dns_fails} fail, slow {network.dns_slow}")

    def _disk(self) -> None:
        disk = self.random.choice(self.world.workers).disk
        if disk.faults or disk.full:
            disk.faults, disk.full = {}, False
        else:
            disk.faults = {
                kind: self.random.choice((0.1, 0.5, 1.0)) for kind in self.random.sample(FAULTS, self.random.choice((1, 1, 2)))
            }
            disk.full = self.random.random() < 0.2
            self._fail(disk, disk.faults)

    def _fail(self, disk: Any, faults: dict[str, float]) -> None:
        """A disk has faults for a while."""
        disk.faults = faults
        self.stage.after(self.random.choice((0.3, 1.0, 4.0)), lambda: self._mended(disk))
        self.world.say(f"disk: {disk.faults}, full {disk.full}")

    def _slow(self, worker: Worker) -> None:
        """The syncs of a worker's disk take long for a while, in which mail arrives."""
        disk = worker.disk
        disk.slow = self.random.choice((0.5, 2.0))
        self.stage.after(self.random.choice((1.0, 8.0)), lambda: self._mended(disk))
        self.world.say(f"disk: a sync takes {disk.slow} s")

        def arrives() -> None:
            if worker.up:
                worker.process.loop.call_soon(self._send, worker)

        for _ in range(self.random.randrange(10)):
            self.stage.after(self.random.random(), arrives)

    def _mended(self, disk: Any) -> None:
        disk.faults, disk.full, disk.slow = {}, False, 0.0
        self.world.say("the disk is mended")

    def _kill(self) -> None:
        self._kill_some([self.random.choice(self.world.workers)])

    def _kill_all(self) -> None:
        self._kill_some(self.world.workers)

    def _kill_some(self, workers: list[Worker]) -> None:
        for worker in workers:
            if worker.up or worker.starting:
                self.world.say(f"{worker.process.name} is killed")
                worker.kill()
                self.world.compare(worker, "death")
                self.stage.after(self.random.random(), lambda worker=worker: self.again(worker))  # type: ignore[misc]

    def again(self, worker: Worker) -> None:
        """Start a worker that died or stopped, unless it was started meanwhile."""
        if not (worker.up or worker.starting or worker.stopping):
            worker.boot()

    def _stop(self) -> None:
        worker = self._worker()
        if worker is not None and not worker.disk.faults:
            self.world.say(f"{worker.process.name} is stopped")
            worker.up, worker.stopping = False, True
            loop = worker.process.loop
            loop.call_soon(lambda: loop.create_task(self._watched(worker.stop, "stop")))

    def _reload(self) -> None:
        self.world.variant += self.random.randrange(1, 3)
        self.world.say(f"reload: variant {self.world.variant}")
        for worker in self.world.workers:
            if worker.up:
                worker.process.loop.call_soon(lambda worker=worker: worker.up and worker.reload())

    def _jump(self) -> None:
        clock = self.world.clock
        clock.wall += self.random.choice((-90_000, -30, 30, 90_000))
        if self.random.random() < 0.2:
            clock.boot += 30  # the machine slept
            clock.wall += 30
        self.world.say(f"the clock is set to {clock.time():.0f}")

    # Calm

    def _begin_calm(self) -> None:
        """Faults stop, and policies end; from now on everything has to end."""
        world = self.world
        self.calm = True
        world.say("calm")
        for worker in world.workers:
            worker.disk.faults, worker.disk.full, worker.disk.slow = {}, False, 0.0
        for host in world.network.hosts.values():
            host.mode = "good"
            host.latency = min(host.latency, 0.02)
        world.network.dns_fails, world.network.dns_slow = 0.0, False
        for key in [key for key in world.states if key[0] in (HOLD, BOUNCE, SUSPENDED)]:
            world.published(None, key)
        self._until = self.stage.now + PATIENCE
        self.stage.after(2.0, self._release)

    def _release(self) -> None:
        """Release held mail, again and again: quarantine and holds under way may come later. What a policy held is to be released
        without an operator."""
        for worker in self.world.workers:
            if worker.up and not worker.process.committing:
                flags = {ident: envelope.flags for ident, (envelope, _) in inside.contents(worker.queue.store).items()}
                held = [ident for ident, its in flags.items() if its & HELD and not its & POLICY_HELD]
                if held:
                    self._spawn(worker, lambda one=worker, ids=held: self._change_page(one, "release", ids, ""), "release")  # type: ignore[misc]
        self.stage.after(3.0, self._release)
        if all(worker.up for worker in self.world.workers) and not self._live():
            if not self._ends:
                self._ends = 1
                self.stage.after(6.0, self._end)
        elif self.stage.now > self._until:
            left = self._live()
            message = left[0] if left else None
            self.world.wrong(f"{len(left)} messages do not end" if left else "a worker does not start", message)

    def _live(self) -> list[Message]:
        return [
            message for message in self.world.ledger.messages.values() if message.acknowledged is not False and not message.ended
        ]

    def _end(self) -> None:
        """All mail has ended, and connections had time to close: nothing may be left."""
        if self._live():
            self._ends = 0
            return
        left = {worker.slot: inside.leftovers(worker) for worker in self.world.workers}
        self._ends += 1
        if any(left.values()) and self._ends < ENDS:  # a site that was down is probed even now: that connection closes, too
            self.stage.after(4.0, self._end)
            return
        for slot, what in left.items():
            if what:
                self.world.wrong(f"worker {slot}: {what}")
        self.world.check(everything=True)
        self.over = True


EVENTS: list[tuple[Callable[[Scenario], None], int]] = [
    (Scenario._submit, 30), (Scenario._mode, 14), (Scenario._verb, 14), (Scenario._policy, 7), (Scenario._disk, 7),
    (Scenario._ask, 6), (Scenario._kill, 5), (Scenario._reload, 4), (Scenario._dns, 4), (Scenario._sweep, 4), (Scenario._read, 4),
    (Scenario._stop, 3), (Scenario._jump, 3), (Scenario._move, 3), (Scenario._memory, 2), (Scenario._mistake, 2),
    (Scenario._kill_all, 1),
]  # fmt: skip
