"""One worker process: connects accept, queue, route and send on one event loop, around the shards that the worker owns.

The supervisor runs `main()` with the descriptor of a socket as its argument. The first request on that socket, `start`, brings
the configuration and the other descriptors.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from relaymta import memory
from relaymta.accept.acceptor import Acceptor
from relaymta.accept.endpoint import Endpoint
from relaymta.accept.intake import Intake
from relaymta.accept.listening import Listening
from relaymta.accept.quota import Quotas
from relaymta.config import Config, near
from relaymta.control import Channel
from relaymta.dns import Resolver
from relaymta.errors import RelayError
from relaymta.log import History, Log
from relaymta.metrics import Counters, index
from relaymta.node import SiteState, SiteStates
from relaymta.proto.envelope import SUCCESS, TRANSIENT
from relaymta.queue import (
    Committed,
    Entry,
    Events,
    Filter,
    Outcome,
    Put,
    Queue,
    QueueSettings,
    Totals,
    format_id,
    parse_id,
)  # fmt: skip
from relaymta.route.table import RouteTable
from relaymta.send.dispatch import Dispatcher
from relaymta.send.explain import explain, goes_to, site_rows, throttled
from relaymta.shm import Shared

DELIVERED = index("relaymta_recipients_total", "delivered")
DEFERRED = index("relaymta_recipients_total", "deferred")
BOUNCED = index("relaymta_recipients_total", "bounced")
EXPIRED = index("relaymta_recipients_total", "expired")
DELIVERED_OCTETS = index("relaymta_delivered_octets_total")
COMMITS = index("relaymta_commits_total")
OPERATIONS = index("relaymta_commit_operations_total")
SYNCS = index("relaymta_syncs_total")
DSNS = index("relaymta_dsns_total")
DNS_QUERIES = index("relaymta_dns_lookups_total", "query")
DNS_HITS = index("relaymta_dns_lookups_total", "hit")
LOG_DROPPED = index("relaymta_log_dropped_total")
DSNS_DROPPED = index("relaymta_dsns_dropped_total")

_TOTALS: list[tuple[str, Callable[[Totals], float], Callable[[Iterable[float]], float]]] = [
    ("relaymta_queue_messages", attrgetter("messages"), sum),
    ("relaymta_queue_octets", attrgetter("octets"), sum),
    ("relaymta_queue_deferred", attrgetter("deferred"), sum),
    ("relaymta_queue_held", attrgetter("held"), sum),
    ("relaymta_oldest_overdue_seconds", attrgetter("overdue"), max),
    ("relaymta_segment_octets", attrgetter("segment_octets"), sum),
    ("relaymta_segment_live_octets", attrgetter("segment_live"), sum),
]

COUNT_SECONDS = 60.0  # after so long another count is started, even if the last one has not ended
COUNT_SHARE = 50  # counting takes at most 1/50 of the time
_STORE_REASONS = {"slow": "free space is near its floor", "full": "free space is below its floor"}
DRAIN_SECONDS = 10.0
DATA_SECONDS = 30.0


class Witness(Events):
    """Counts and logs what the queue has committed."""

    def __init__(self, counters: Counters, log: Log, landed: Callable[[Entry], None], next_try: Callable[[Outcome], int]) -> None:
        """`landed(entry)`: called when an entry's outcome is committed or refused. `next_try(outcome)`: when its deferred
        recipients are tried again (ms of the wall clock)."""
        self._landed = landed
        self._next_try = next_try
        self._add = counters.add
        self._delay = counters.histogram("relaymta_delivery_delay_seconds")
        self._log = log

    def queued(self, put: Put) -> None:
        envelope = put.envelope
        self._log.event(
            "queued", id=format_id(put.ident), sender=envelope.sender, recipients=envelope.recipients, size=envelope.size,
            client=envelope.client, helo=envelope.helo, user=envelope.user, application=envelope.application,
        )  # fmt: skip

    def ended(self, outcome: Outcome) -> None:
        entry = outcome.entry
        self._landed(entry)
        envelope = entry.envelope
        peer, answer = entry.route if isinstance(entry.route, tuple) else ("", b"")
        if outcome.success:
            count = len(envelope.recipients) if entry.indexes is None else len(entry.indexes)
            delay = time.time() - envelope.arrived / 1000
            self._add(DELIVERED, count)
            self._add(DELIVERED_OCTETS, envelope.size)
            self._delay(delay)
            self._log.event(
                "delivered", id=format_id(entry.ident), recipients=[a for _, a in entry.recipients], route=entry.name.label,
                peer=peer, reply=answer.decode("utf-8", "replace"), delay=round(delay, 3), attempt=entry.attempts + 1,
            )  # fmt: skip
            return
        for position, attempt in outcome.results.items():
            self._recipient_ended(outcome, position, attempt)
        if outcome.dsn is not None:
            self._add(DSNS, 1)
        elif outcome.failed:
            self._add(DSNS_DROPPED, 1)

    def _recipient_ended(self, outcome: Outcome, position: int, attempt: Any) -> None:
        entry = outcome.entry
        common = {
            "id": format_id(entry.ident), "route": entry.name.label, "peer": attempt.peer, "attempt": entry.attempts + 1,
            "reply": attempt.cause,
        }  # fmt: skip
        address = entry.envelope.recipients[position]
        if attempt.kind == SUCCESS:
            self._add(DELIVERED, 1)
            delay = time.time() - entry.envelope.arrived / 1000
            self._log.event("delivered", recipients=[address], delay=round(delay, 3), **common)
        elif attempt.kind == TRANSIENT:
            self._add(DEFERRED, 1)
            self._log.event("deferred", recipient=address, phase=attempt.phase, next=self._next_try(outcome) / 1000, **common)
        else:
            self._add(EXPIRED if outcome.expired else BOUNCED, 1)
            dsn = format_id(outcome.dsn.ident) if outcome.dsn is not None else ""
            self._log.event("bounced", recipient=address, phase=attempt.phase, dsn=dsn, **common)

    def refused(self, entry: Entry, why: str) -> None:
        self._log.event("warning", text=f"message {format_id(entry.ident)}: an outcome was refused: {why}")
        self._landed(entry)

    def failed(self, what: str) -> None:
        self._log.event("warning", text=f"a change of the queue was undone: internal error: {what}")

    def committed(self, group: Committed) -> None:
        self._add(COMMITS, 1)
        self._add(OPERATIONS, len(group.puts) + len(group.outcomes) + len(group.tasks))
        self._add(SYNCS, group.syncs)


class Shard:
    """One shard's queue and dispatcher."""

    def __init__(self, worker: "Worker", number: int) -> None:
        config = worker.config
        self.dispatcher = Dispatcher(
            config, worker.routes, worker.limits, worker.rates, worker.in_flight, worker.counters, worker.log, worker.resolver,
            worker.probed, worker.states, worker.send_site_state,
        )  # fmt: skip
        settings = QueueSettings(
            hostname=config.hostname,
            max_age_ms=int(config.queue.max_age * 1000),
            first_retry_ms=int(config.delivery.first_retry * 1000),
            window=config.queue.window,
            window_bytes=config.queue.window_bytes,
        )
        self.queue = Queue(
            Path(config.spool),
            number,
            settings,
            worker.assign,
            self.dispatcher.offer,
            Witness(worker.counters, worker.log, self.dispatcher.landed, self._next_try),
            self.dispatcher.awake,
            worker.sign_dsn,
        )
        self.dispatcher.queue = self.queue
        self.totals: Totals | None = None
        self.count_at = 0.0

    def _next_try(self, outcome: Outcome) -> int:
        """When an outcome's deferred recipients are tried again (ms of the wall clock): at its due time, or later if its queue
        sleeps."""
        asleep = self.dispatcher.sleeps_until(outcome.entry.queue) if outcome.name == outcome.entry.name else 0
        return self.queue.clock.wall(max(outcome.retry_at, asleep))


class Worker:
    """One worker. The first of its `shards` gets new mail; the others (orphans) are only drained."""

    def __init__(self, channel_socket: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.channel = Channel(channel_socket, self._request, self._orphaned)
        self.stopping = asyncio.Event()
        self.shards: dict[int, Shard] = {}
        self.intake: Intake | None = None
        self.acceptor: Acceptor | None = None
        self._store_state = "ok"
        self._log_dropped = 0
        self._memory_level = 0
        self._borrowed: list[Listening] = []

    def sign_dsn(self, data: bytes) -> bytes:
        """The DKIM-Signature fields for a DSN. Called by writer threads."""
        return self.acceptor.endpoint.signer.signatures(data) if self.acceptor is not None else b""

    def assign(self, envelope: Any, attempts: int) -> Any:
        """The queues of a message, by the current route table."""
        return self.routes.assign(envelope, attempts)

    async def start(
        self,
        config: str,
        slot: int,
        workers: int,
        shards: list[int],
        probed: list[int],
        culprit: int,
        states: list[Any],
        tickets: bytes,
        descriptors: list[int],
    ) -> None:
        """Open the shards, then accept mail. `descriptors`: the shared memory, then the listening sockets. `probed`, `culprit`:
        messages in flight when the last worker died (shm.InFlight). RelayError or OSError when the worker cannot serve."""
        self.config = Config.model_validate_json(config)
        self.slot = slot
        self.workers = workers
        shared = Shared(descriptors[0])
        self.counters = Counters(shared.counters(slot))
        self.limits = shared.limits(slot, workers)
        self.rates = shared.rates(workers)
        self.client_rates = shared.client_rates(workers)
        self.states = SiteStates(msgspec.convert(states, list[SiteState]))
        self.in_flight = shared.in_flight(slot)
        self.probed = set(probed)
        kept = self.config.log.history // workers
        history = History(Path(self.config.spool) / "history", slot, kept) if kept else None
        self.log = Log(self.config.log.file, slot, history)
        self.routes = RouteTable(self.config)
        if any(route.lookup or route.oauth for route in self.config.route):
            import aiohttp  # noqa: F401 (at start, rather than while mail waits)
        self.resolver = Resolver(self.config.delivery.nameservers, self._count_dns)
        for number in shards:
            self.shards[number] = Shard(self, number)
        for shard in self.shards.values():
            await shard.queue.start(culprit)
            shard.dispatcher.look_back()
            if culprit and shard.queue.quarantined:
                text = f"message {format_id(culprit)} was the only one in flight when a worker died again: it is quarantined"
                self.log.event("warning", text=text + " (`relaymta queue list --held` shows it, `release` tries it once more)")
        taking = self.shards[shards[0]].queue
        endpoint = Endpoint(self.config, self.client_rates, self.limits, self.resolver, self.counters, self.log, tickets)
        quotas = Quotas(self.client_rates, self.counters)
        self.intake = Intake(self.config, self.routes, taking, endpoint, quotas, self.counters, self.log)
        self.acceptor = Acceptor(self.config, self.intake, endpoint, self.limits, ThreadPoolExecutor(4, "spill"))
        for listener, descriptor in zip(self.config.listener, descriptors[1:], strict=True):
            await self.acceptor.listen(socket.socket(fileno=descriptor), listener)
        self._gauges()

    def _count_dns(self, what: str) -> None:
        self.counters.add(DNS_QUERIES if what == "query" else DNS_HITS, 1)

    def send_site_state(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """Send a learned state (None: the one with `key` is forgotten) to the supervisor, which stores it and sends it to all
        workers."""
        self.channel.notify("site_state", state=None if state is None else msgspec.to_builtins(state), key=list(key))

    async def _site_state(self, descriptors: list[int], state: dict[str, Any] | None, key: list[str]) -> None:
        kind, site, about = key
        learned = None if state is None else msgspec.convert(state, SiteState)
        if learned is None:
            self.states.forget(kind, site, about)
        else:
            self.states.learn(learned)
        for shard in self.shards.values():
            shard.dispatcher.site_state_changed(learned, (kind, site, about))

    def _gauges(self) -> None:
        """Set the gauges, and what follows from memory and disk; once a second, even if it fails."""
        self._timer = self.loop.call_later(1.0, self._gauges)
        now = self.loop.time()
        for shard in self.shards.values():
            if now >= shard.count_at:
                shard.count_at = now + COUNT_SECONDS
                shard.queue.watch_totals(lambda totals, shard=shard: self._set_gauges(shard, totals, now))  # type: ignore[misc]
        gauge = self.counters.gauge
        gauge("relaymta_connections", len(self.acceptor.connections) if self.acceptor else 0)
        gauge("relaymta_sessions", sum(shard.dispatcher.connections for shard in self.shards.values()))
        gauge("relaymta_window", sum(len(shard.queue.schedule) for shard in self.shards.values()))
        full = any(shard.queue.full for shard in self.shards.values())
        slow = any(shard.queue.pressure for shard in self.shards.values())
        stalled = any(shard.queue.writer.stalled for shard in self.shards.values())
        gauge("relaymta_limit_overflows", self.limits.overflows + self.rates.overflows + self.client_rates.overflows)
        gauge("relaymta_store_slow", slow)
        gauge("relaymta_store_full", full)
        gauge("relaymta_listeners_paused", self.acceptor is not None and self.acceptor.paused)
        gauge("relaymta_stressed", self.acceptor is not None and self.acceptor.stressed)
        gauge("relaymta_store_stalled", stalled)
        self._watch_memory()
        brim = any(shard.queue.brim for shard in self.shards.values())
        self.log.muted = brim and self.log.shares_disk_with(Path(self.config.spool))
        self.counters.add(LOG_DROPPED, self.log.dropped - self._log_dropped)
        self._log_dropped = self.log.dropped
        state = "stalled" if stalled else "full" if full else "slow" if slow else "ok"
        if state != self._store_state:
            reason = next((s.queue.writer.last_error for s in self.shards.values() if s.queue.writer.last_error), "")
            self.log.event("store", state=state, reason="" if state == "ok" else reason or _STORE_REASONS.get(state, ""))
            self._store_state = state

    def _watch_memory(self) -> None:
        """When memory is tight, keep no message data in it; when it is used up, reject new mail temporarily."""
        used = memory.share(self.config.limits.memory, self.workers)
        level = 2 if used >= memory.REFUSE else 1 if used >= memory.TIGHT else 0
        self.counters.gauge("relaymta_memory_pressure", level)
        self.counters.gauge("relaymta_shedding", self.acceptor is not None and self.acceptor.shedding)
        if self.intake is not None:
            self.intake.out_of_memory = level == 2
        if level != self._memory_level:
            self._memory_level = level
            for shard in self.shards.values():
                shard.queue.schedule.keep_data(level == 0)
            text = ("sufficient again", "tight: message data is not kept in it", "used up: mail is temporarily rejected")[level]
            self.log.event("warning", text=f"memory is {text} ({used:.0%} of the limit)")

    def _set_gauges(self, shard: Shard, totals: Totals, began: float) -> None:
        """Set the gauges of totals, from the last counts of this worker's shards. The longer a count takes (with very many
        queues), the later is the next one (COUNT_SECONDS, COUNT_SHARE)."""
        shard.totals = totals
        shard.count_at = began + max(1.0, COUNT_SHARE * (self.loop.time() - began))
        for name, of, combine in _TOTALS:
            self.counters.gauge(name, combine(of(one.totals) for one in self.shards.values() if one.totals is not None))

    # Requests from the supervisor

    async def _request(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        if op == "start":
            try:
                await self.start(descriptors=descriptors, **args)
            except (RelayError, OSError) as error:
                self.loop.call_later(0.1, self.stopping.set)  # after the answer was sent
                raise RelayError(str(error)) from None
            return {"pid": os.getpid()}
        return await _REQUESTS[op](self, descriptors, **args)

    async def _stop(self, descriptors: list[int]) -> None:
        self.stopping.set()

    async def _reload(self, descriptors: list[int], config: str) -> None:
        fresh = Config.model_validate_json(config)
        self.config = fresh
        self.routes = RouteTable(fresh)
        self.resolver.reload()
        if self.intake is not None and self.acceptor is not None:
            self.intake.configure(fresh, self.routes)
            self.acceptor.config = fresh
            self.acceptor.endpoint.configure(fresh)
        for shard in self.shards.values():
            shard.dispatcher.reconfigure(fresh, self.routes)
            shard.queue.schedule.wake()

    async def _renew_tickets(self, descriptors: list[int], keys: bytes) -> None:
        if self.acceptor is not None:
            self.acceptor.endpoint.renew_tickets(keys)

    async def _reopen_log(self, descriptors: list[int]) -> None:
        self.log.reopen()

    async def _borrow(self, descriptors: list[int]) -> None:
        """Accept connections on a dead worker's sockets until its successor is ready."""
        assert self.acceptor is not None
        for listener, descriptor in zip(self.config.listener, descriptors, strict=True):
            self._borrowed.append(await self.acceptor.listen(socket.socket(fileno=descriptor), listener))

    async def _give_back(self, descriptors: list[int]) -> None:
        assert self.acceptor is not None
        for endpoint in self._borrowed:
            self.acceptor.close(endpoint)
        self._borrowed.clear()

    async def _summary(self, descriptors: list[int]) -> list[Any]:
        found: list[Any] = []
        for shard in self.shards.values():
            found += await shard.queue.summary()
        return found

    async def _page(self, descriptors: list[int], shard: int, after: int, chosen: dict[str, Any]) -> Any:
        one = self.shards[shard]
        return await one.queue.page(Filter(**chosen), after, partial(goes_to, one.dispatcher))

    async def _move(self, descriptors: list[int], chosen: dict[str, Any], word: str, dry_run: bool) -> Any:
        """Move all messages of whole queues to the route `word`: (messages matched, those in flight). None when the filter
        `chosen` does not match whole queues, or the route has no hosts of its own. RelayError when there is no such route."""
        wanted, route = Filter(**chosen), self.routes.named(word)
        if route is None:
            raise self._no_route(word)
        if not (wanted.whole_queues and route.hosts):  # without hosts, the queue depends on the recipient's domain
            return None
        messages, in_flight = 0, 0
        for shard in self.shards.values():
            one, at_site = shard.dispatcher, partial(goes_to, shard.dispatcher)
            found = await shard.queue.move_queues(wanted, at_site, partial(self.routes.by_route, route), dry_run)
            one.forget_parked()
            messages, in_flight = messages + found[0], in_flight + found[1]
        return messages, in_flight

    def _no_route(self, word: str) -> RelayError:
        return RelayError(f"there is no route {word!r}{near(word, self.routes.labels)}")

    async def _shape(self, descriptors: list[int]) -> list[Any]:
        return [row for shard in self.shards.values() for row in await shard.queue.shape()]

    async def _message(self, descriptors: list[int], ident: str) -> Any:
        for shard in self.shards.values():
            found = await shard.queue.message(parse_id(ident))
            if found is not None:
                return found
        return None

    async def _explain(self, descriptors: list[int], ident: str) -> Any:
        for shard in self.shards.values():
            found = await explain(shard.dispatcher, parse_id(ident))
            if found is not None:
                return found
        return None

    async def _sites(self, descriptors: list[int], most: int = 0) -> list[Any]:
        return [row for shard in self.shards.values() for row in site_rows(shard.dispatcher, most)]

    async def _usage(self, descriptors: list[int]) -> list[Any]:
        if self.acceptor is None or self.intake is None:
            return []
        return self.intake.quotas.usage(self.acceptor.endpoint.logins.accounts)

    async def _raw(self, descriptors: list[int], ident: str) -> bytes | None:
        for shard in self.shards.values():
            data: bytes | None = await shard.queue.raw(parse_id(ident))
            if data is not None:
                return data
        return None

    async def _change(self, descriptors: list[int], shard: int, verb: str, idents: list[int], word: str) -> Any:
        one = self.shards[shard]
        if verb == "reroute" and word not in self.routes.labels:
            raise self._no_route(word)
        result = await one.queue.change_messages(verb, idents, word)
        if verb == "flush":
            one.dispatcher.flush()
            await one.queue.wake_queues()
        return result

    async def _throttled(self, descriptors: list[int], queues: dict[str, int]) -> Any:
        found = [(0, 0.0)]
        for shard in self.shards.values():
            names = {name: queues[str(name)] for name in await shard.queue.names() if str(name) in queues}
            found.append(throttled(shard.dispatcher, names))
        return max(found)

    async def _status(self, descriptors: list[int]) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "shards": list(self.shards),
            "connections": len(self.acceptor.connections) if self.acceptor else 0,
            "in flight": sum(shard.dispatcher.in_flight() for shard in self.shards.values()),
            "full": any(shard.queue.full for shard in self.shards.values()),
            "stalled": any(shard.queue.writer.stalled for shard in self.shards.values()),
            "last store error": next((s.queue.writer.last_error for s in self.shards.values() if s.queue.writer.last_error), ""),
            "sites down": {
                pool.key: pool.reason
                for shard in self.shards.values()
                for pool in shard.dispatcher.pools.values()
                if pool.failures
            },
        }

    # Stop

    def _orphaned(self) -> None:
        """The supervisor has died: drain, and exit."""
        self.stopping.set()

    async def run(self) -> None:
        """Serve until `stopping` is set, then drain."""
        await self.stopping.wait()
        if self.acceptor is None:
            return
        self.acceptor.stop_listening()
        await asyncio.gather(
            self.acceptor.drained(DRAIN_SECONDS),
            *(shard.dispatcher.drain(DRAIN_SECONDS, DATA_SECONDS) for shard in self.shards.values()),
        )
        self._timer.cancel()
        self.acceptor.endpoint.signer.end()
        for shard in self.shards.values():
            await shard.queue.stop()
        await self.resolver.close()
        self.log.close()


_REQUESTS: dict[str, Callable[..., Awaitable[Any]]] = {
    "stop": Worker._stop,
    "reload": Worker._reload,
    "reopen_log": Worker._reopen_log,
    "tickets": Worker._renew_tickets,
    "site_state": Worker._site_state,
    "borrow": Worker._borrow,
    "give_back": Worker._give_back,
    "summary": Worker._summary,
    "shape": Worker._shape,
    "page": Worker._page,
    "move": Worker._move,
    "message": Worker._message,
    "raw": Worker._raw,
    "explain": Worker._explain,
    "sites": Worker._sites,
    "usage": Worker._usage,
    "change": Worker._change,
    "throttled": Worker._throttled,
    "status": Worker._status,
}


async def _main(descriptor: int) -> None:
    worker = Worker(socket.socket(fileno=descriptor))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the supervisor handles those that a terminal sends
    loop.add_signal_handler(signal.SIGTERM, worker.stopping.set)
    await worker.run()


def main() -> None:
    """Run one worker until it is stopped. Its argument: the descriptor of the socket to the supervisor."""
    # The writer thread wakes often and needs the GIL briefly. With the default interval of 5 ms it waits for the event loop many
    # times for each group. Measured: 10 % less CPU per message.
    sys.setswitchinterval(0.0001)
    os.environ.pop("NOTIFY_SOCKET", None)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_main(int(sys.argv[1])))
