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
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from relaymta import __version__
from relaymta.accept.acceptor import Acceptor, Make
from relaymta.accept.admission import Admission
from relaymta.accept.collecting import Collector
from relaymta.accept.endpoint import Endpoint
from relaymta.accept.intake import Intake
from relaymta.accept.listening import Listening
from relaymta.accept.once import Once
from relaymta.accept.quota import Quotas
from relaymta.config import Config, OAuth
from relaymta.control import Channel, Refused
from relaymta.dns import Resolver
from relaymta.errors import RelayError
from relaymta.filter.means import Means
from relaymta.ident import shard_of
from relaymta.log import USERS, History, Log
from relaymta.metrics import Counters, index
from relaymta.node import ABUSE, SiteState, SiteStates
from relaymta.proto.envelope import Envelope
from relaymta.proto.otlp import Traces
from relaymta.queue import Outcome, Queue, Shards, Totals, format_id, wall_ms
from relaymta.queue.quarantine import Keeper
from relaymta.route.table import RouteTable
from relaymta.send.dispatch import Dispatcher
from relaymta.send.oauth import TokenError, Tokens
from relaymta.shm import SLOTS, Shared
from relaymta.worker.accounting import Witness, attempt_of
from relaymta.worker.answers import answer
from relaymta.worker.gauges import QUARANTINE, Gauges, busy, watch_collector
from relaymta.worker.hooks import Hooking
from relaymta.worker.orphaned import end_with_supervisor
from relaymta.worker.reloading import Reloading, how_many, queue_settings
from relaymta.worker.suppression import Suppressing
from relaymta.worker.tracing import wire

if TYPE_CHECKING:
    from relaymta.accept.http.requests import Injection
    from relaymta.filter.conduct import Conduct
    from relaymta.filter.judgement import Mail as Judged
    from relaymta.filter.scanner import Needs, Scanner
    from relaymta.spans import Spans
    from relaymta.worker.mail import Mail

__all__ = ["Shard", "Worker", "main"]

DRAIN_SECONDS = 10.0
DATA_SECONDS = 30.0
LEAVE_SECONDS = 1.0  # for clients that are in the middle of something, when another program is to have the sockets
FILING_SECONDS = 3.0  # behind these, for messages of LMTP clients that have gone
ORPHAN_SECONDS = DRAIN_SECONDS + DATA_SECONDS + 10.0  # after the supervisor's end, the worker's: whatever it is doing
USERS_SHARE = 4  # the history of users has one in so many octets of that of messages, in addition
NEIGHBOUR_SECONDS = 3.0  # in which another worker has said what it gives up, or gives up nothing
ACCOUNTS_TOGETHER = 100  # in one report of what they have sent: each may take 32 KB and more
TOKEN_SECONDS = 60.0  # for an exchange, and one before it that uses the same refresh token

DNS_QUERIES = index("relaymta_dns_lookups_total", "query")
DNS_HITS = index("relaymta_dns_lookups_total", "hit")


class Shard:
    """One shard's queue and dispatcher."""

    def __init__(self, worker: "Worker", number: int) -> None:
        config = worker.config
        self.dispatcher = Dispatcher(
            config, worker.routes, worker.limits, worker.rates, worker.in_flight, worker.counters, worker.log, worker.resolver,
            worker.probed, worker.states, worker.send_site_state, worker.tokens,
        )  # fmt: skip
        if worker.mail is not None:
            self.dispatcher.keep_mail(worker.mail.store())
        self.witness = Witness(
            worker.counters, worker.log, self.dispatcher.landed, self.dispatcher.refused, self._next_try, self._now
        )
        self.queue = Queue(
            Path(config.spool),
            number,
            queue_settings(config, how_many(Path(config.spool), worker.workers)),
            worker.assign,
            self.dispatcher,
            self.witness,
            worker.sign_dsn,
            attempt_of,
        )
        keeper = self.queue.quarantine
        keeper.over = lambda octets: worker.quarantine_over(keeper, octets)
        keeper.changed = worker.note_quarantine
        self.dispatcher.queue = self.queue
        self.totals: Totals | None = None
        self.count_at = 0.0
        self._worker = worker
        self.scanner: Scanner | None = None  # there have been no messages yet that filters had not looked at

    async def look(self) -> None:
        """From now on filters look at the unseen messages in the queue."""
        self.queue.unseen.noticed = self._scan
        if await self.queue.unseen.exist():
            self._scan()

    def _scan(self) -> None:
        if self.scanner is None:
            from relaymta.filter.scanner import Scanner

            worker = self._worker
            self.scanner = Scanner(self.queue, worker.needs(), worker.in_flight, worker.probed, worker.log)
        self.scanner.wake()

    async def end_scans(self) -> None:
        """Unseen messages stay as they are."""
        self.queue.unseen.noticed = lambda: None
        if self.scanner is not None:
            await self.scanner.stop()

    def _now(self) -> int:
        """The time by the shard's clock, ms."""
        return self.queue.clock.now()

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
        self.conduct: Conduct | None = None  # None: nobody looks for abuse
        self.mail: Mail | None = None
        self._peers: set[Channel] = set()
        self.acceptor: Acceptor | None = None
        self._injection: Injection | None = None  # nobody has sent a message by HTTP yet
        self.collector: Collector | None = None  # of one worker: it empties the drop folder
        self.reloading = Reloading(self)
        self.suppressing = Suppressing(self)
        self._borrowed: dict[int, list[Listening]] = {}  # by the slot whose sockets they are

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
        probed: list[tuple[int, bool]],
        culprit: int,
        states: list[Any],
        tickets: bytes,
        mail: list[int] | None,
        descriptors: list[int],
    ) -> None:
        """Open the shards, then accept mail. `descriptors`: the shared memory, then the listening sockets. `probed`, `culprit`:
        messages in flight when the last worker died (shm.InFlight). `mail`: the shards of mailboxes that this worker owns; None:
        no mailboxes are kept. RelayError or OSError when the worker cannot serve."""
        self.config = Config.model_validate_json(config)
        self.slot = slot
        self.tracer = wire(self)
        self.workers = workers
        shared = self._shared = Shared(descriptors[0])
        self.counters = Counters(shared.counters(slot))
        self._goals: dict[Keeper, tuple[tuple[int, int], int, float]] = {}  # what shards may keep; see `quarantine_over`
        self._neighbours = [Counters(shared.counters(one)) for one in range(SLOTS) if one != slot]
        self.limits = shared.limits(slot, workers)
        self.rates = shared.rates(workers, slot)
        self.client_rates = shared.client_rates(workers, slot)
        self.states = SiteStates(msgspec.convert(states, list[SiteState]))
        self.in_flight = shared.in_flight(slot)
        self.named = shared.named(slot)
        self.triplets = partial(shared.triplets, (Path(self.config.spool) / "secret").read_bytes())
        self.probed = dict(probed)
        self.log = self._open_log(mail is not None)
        self.spans = self._follow_log()
        self.routes = RouteTable(self.config)
        self.tokens = Tokens(self._exchange)
        if any(route.lookup for route in self.config.route):
            import aiohttp  # noqa: F401 (at start, rather than while mail waits)
        took = {result: self.counters.histogram("relaymta_dns_seconds", result) for result in ("found", "none", "failed")}
        nameservers = self.config.delivery.nameservers
        self.resolver = Resolver(nameservers, self._count_dns, took=lambda result, seconds: took[result](seconds))
        watch_collector(self.counters)
        if mail is not None:
            from relaymta.worker.mail import Mail

            self.mail = Mail(self, mail, shared)
            await self.mail.mailboxes.start()
        for number in shards:
            self.shards[number] = Shard(self, number)
            self.shards[number].dispatcher.trace(self.tracer)
            if self.spans is not None:
                self.shards[number].dispatcher.mark_attempts(self.spans.has)
        for shard in self.shards.values():
            await shard.queue.start(culprit)
            shard.dispatcher.look_back()
            if culprit and shard.queue.quarantined:
                text = f"message {format_id(culprit)} was probed when a worker died again: it is quarantined"
                self.log.event("warning", text=text + " (`relaymta queue list --held` shows it, `release` tries it once more)")
        self._report_lost()
        await self._listen(self.shards[shards[0]].queue, tickets, descriptors[1:])

    def _report_lost(self) -> None:
        """Log which segments are missing."""
        lost = "is missing: the messages in it are lost"
        for shard in self.shards.values():
            for path in shard.queue.segments.lost:
                self.log.event("warning", text=f"{path} {lost} (each is deferred, and says so: `relaymta queue list`)")
        for mailboxes in self.mail.shards.values() if self.mail is not None else ():
            for path in mailboxes.segments.lost:
                self.log.event("warning", text=f"{path} {lost} (`relaymta mailbox verify` names them)")

    def _open_log(self, keeps_mail: bool) -> Log:
        """The log, with the histories."""
        kept, folder = self.config.log.history // self.workers, Path(self.config.spool) / "history"
        history = History(folder, self.slot, kept) if kept else None
        users = History(folder / USERS, self.slot, kept // USERS_SHARE) if kept and keeps_mail else None
        log = Log(self.config.log.file, self.slot, history, users, self.config.log.format)
        log.routes(self.config)
        return log

    def _follow_log(self) -> "Spans | None":
        """What makes spans of the log; None: nobody wants any."""
        settings = self.config.tracing
        if not settings.endpoint:
            return None
        from relaymta.spans import Collector, Spans  # with http.client

        secret = (Path(self.config.spool) / "secret").read_bytes()
        resource = {"service.name": "relaymta", "service.version": __version__,
                    "service.instance.id": f"{self.config.hostname}/{self.slot}", "host.name": self.config.hostname}  # fmt: skip

        def warn(text: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(lambda: self.log.event("warning", text=text))

        traces = Traces(secret, settings.ratio, settings.unsampled)
        spans = Spans(settings, Collector(settings), traces, self.counters, resource, warn)
        self.log.follow = spans.take
        return spans

    async def _listen(self, taking: Queue, tickets: bytes, descriptors: list[int]) -> None:
        """Accept mail into a queue, and users who read theirs. `descriptors`: the listening sockets."""
        login = self.mail.recipients.login if self.mail is not None else None
        endpoint = Endpoint(
            self.config, self.client_rates, self.limits, self.resolver, self.counters, self.log, tickets, login,
            Means(
                "", self.resolver, self.counters, self.named, matched=self._matched, triplets=self.triplets,
                hooks=Hooking(self).means(),
            ),
        )  # fmt: skip
        quotas = Quotas(self.client_rates, self.counters)
        self.intake = Intake(self.config, self.routes, taking, endpoint, quotas, self.counters, self.log)
        threads = ThreadPoolExecutor(4, "spill")
        own = {number: shard.queue.store for number, shard in self.shards.items()}
        self.known = Shards(Path(self.config.spool), own, self._is_in_flight)
        self.intake.traces = self.spans.traces if self.spans is not None else None
        self.intake.once = Once(self.known, self.limits, threads)
        self.watch_conduct()
        await self.suppressing.start()
        self.tell_hooks()
        others: dict[str, Make] = {}
        if self.mail is not None:
            self.intake.local = self.mail.local()
            others = self.mail.connections()
        if any(listener.protocol == "http" for listener in self.config.listeners):
            from relaymta.accept.http.connection import HttpConnection  # with aiohttp, 35 MB, only where it is configured

            others["http"] = lambda admission, listener: HttpConnection(self._injection_of(admission).desk, admission, listener)
        self.acceptor = Acceptor(self.config, self.intake, endpoint, self.limits, threads, others)
        self.acceptor.tracer = self.tracer
        self.gauges = Gauges(self)  # `run` ends them wherever it ends the acceptor
        for shard in self.shards.values():
            await shard.look()
        for listener, descriptor in zip(self.config.listeners, descriptors, strict=True):
            self.acceptor.listen(socket.socket(fileno=descriptor), listener)
        local = self.config.local_listener
        if local is not None and self.slot == 0:
            self.collector = Collector(self.acceptor, local)

    def _injection_of(self, admission: Admission) -> "Injection":
        if self._injection is None:
            from relaymta.accept.http.requests import Injection

            self._injection = Injection(admission, self.known, self.config.spool)
        return self._injection

    def _is_in_flight(self, ident: int) -> bool:
        """Whether a delivery of a message is under way, in whichever worker."""
        number = shard_of(ident)
        return self._shared.is_in_flight(self.slot if number in self.shards else number, ident)

    def needs(self) -> "Needs":
        """What scanners use."""
        from relaymta.filter.scanner import Needs

        intake, acceptor = self.intake, self.acceptor
        assert intake is not None and acceptor is not None
        endpoint = acceptor.endpoint
        return Needs(
            lambda: endpoint.chains, endpoint.signer, intake.readdressed, intake.rewritten,
            lambda: self.config.limits.message_size,
        )  # fmt: skip

    def watch_conduct(self) -> None:
        """Look at what accounts send from now on, or not any more, as is configured."""
        if not self.config.abuse:
            self.conduct = None
        elif self.conduct is None:
            from relaymta.filter.conduct import Conduct

            self.conduct = Conduct(self.states)
        assert self.intake is not None
        self.intake.conduct = self.conduct
        for shard in self.shards.values():
            shard.witness.conduct = self.conduct

    def tell_hooks(self) -> None:
        """Tell hooks what becomes of messages from now on, or nobody any more, as is configured."""
        there = any(one.type == "python" for one in self.config.filter)
        for shard in self.shards.values():
            shard.witness.tell = self._tell if there else None

    def _tell(self, result: str, attempt: dict[str, Any]) -> None:
        chains = self.acceptor.endpoint.chains if self.acceptor is not None else None
        if chains is not None:
            chains.tell(result, attempt)

    def report_conduct(self) -> None:
        """Tell the supervisor what accounts have sent."""
        rows = self.conduct.report() if self.conduct is not None else []
        for start in range(0, len(rows), ACCOUNTS_TOGETHER):
            self.channel.notify("conduct", rows=rows[start : start + ACCOUNTS_TOGETHER])

    def _matched(self, mail: "Judged", rule: str) -> None:
        if self.conduct is not None:
            self.conduct.matched(mail, rule)

    def note_quarantine(self) -> None:
        """Tell the other workers how much is in the quarantine here."""
        self.counters.gauge(QUARANTINE, sum(shard.queue.quarantine.octets for shard in list(self.shards.values())))

    def quarantine_over(self, keeper: Keeper, octets: int) -> tuple[int, bool]:
        """Of so many octets of a shard in the quarantine, how many are too many: each shard of the machine gives up the same
        share, of whole messages; and the first that has any, one more. Called by reader threads."""
        others = [one.reading(QUARANTINE) for one in self._neighbours]
        here = [shard.queue.quarantine for shard in list(self.shards.values())]
        limit, rest = self.config.quarantine.octets, sum(others) + sum(one.octets for one in here if one is not keeper)
        if rest + octets <= limit:
            self._goals.pop(keeper, None)
            return 0, False
        seen, goal, until = self._goals.get(keeper, ((-1, -1), 0, 0.0))
        now = time.monotonic()
        if seen != (limit, rest) or now > until:  # else others have not said more since: what is theirs is not given up here
            goal = limit * octets // (rest + octets)
            self._goals[keeper] = (limit, rest), goal, now + NEIGHBOUR_SECONDS
        first = not any(others[: self.slot]) and next((one for one in here if one is keeper or one.octets), keeper) is keeper
        return max(octets - goal, 0), first

    def _count_dns(self, what: str) -> None:
        self.counters.add(DNS_QUERIES if what == "query" else DNS_HITS, 1)

    def send_site_state(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """Send a learned state (None: the one with `key` is forgotten) to the supervisor, which stores it and sends it to all
        workers."""
        self.channel.notify("site_state", state=None if state is None else msgspec.to_builtins(state), key=list(key))

    async def _exchange(self, settings: OAuth, refused: str) -> tuple[str, float]:
        """An access token from the supervisor, the one who exchanges (send.oauth.Exchanges). TokenError."""
        try:
            async with asyncio.timeout(TOKEN_SECONDS):
                text, seconds = await self.channel.ask("token", oauth=settings.model_dump(), refused=refused)
        except Refused as error:
            raise TokenError(str(error)) from None
        except (ConnectionError, TimeoutError):
            raise TokenError("the supervisor does not answer") from None
        return text, seconds

    async def _site_state(self, descriptors: list[int], state: dict[str, Any] | None, key: list[str]) -> None:
        kind, site, about = key
        learned = None if state is None else msgspec.convert(state, SiteState)
        if learned is None:
            self.states.forget(kind, site, about)
        else:
            self.states.learn(learned)
        if kind == ABUSE and self.conduct is not None:
            self.conduct.changed(learned, (kind, site, about))
        for shard in self.shards.values():
            shard.dispatcher.site_state_changed(learned, (kind, site, about))

    # Requests from the supervisor

    async def _request(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        if op == "start":
            try:
                await self.start(descriptors=descriptors, **args)
            except (RelayError, OSError) as error:
                self.loop.call_later(0.1, self.stopping.set)  # after the answer was sent
                raise RelayError(str(error)) from None
            return {"pid": os.getpid()}
        if op in _OWN_REQUESTS:
            return await _OWN_REQUESTS[op](self, descriptors, **args)
        if self.mail is not None and op in self.mail.requests:
            return await self.mail.answer(op, args)
        return await answer(self, op, args)

    async def _stop(self, descriptors: list[int]) -> None:
        self.stopping.set()

    async def _prepare(self, descriptors: list[int], number: int, config: str) -> None:
        await self.reloading.prepare(number, config)

    async def _commit(self, descriptors: list[int], number: int) -> None:
        self.reloading.commit(number)

    async def _drop(self, descriptors: list[int], number: int) -> None:
        self.reloading.drop(number)

    async def _renew_tickets(self, descriptors: list[int], keys: bytes) -> None:
        if self.acceptor is not None:
            self.acceptor.endpoint.renew_tickets(keys)

    async def _reopen_log(self, descriptors: list[int]) -> None:
        self.log.reopen()

    async def _alive(self, descriptors: list[int]) -> None:
        """The heartbeat: that the event loop answers is the answer."""

    async def _busy(self, descriptors: list[int], names: list[str] | None) -> list[Any]:
        return busy(self.shards.values(), names, self.loop.time())

    async def _complained(self, descriptors: list[int], rows: list[tuple[str, str, str]]) -> None:
        """Recipients have complained, of whatever message: address, application and what is noted of it."""
        queue = next(iter(self.shards.values())).queue

        def noted(address: str, application: str, text: str) -> Awaitable[None]:
            envelope = Envelope("", [address], 0, 0, wall_ms(), 0, application=application)
            return queue.complained(queue.ident(), envelope, [address], {"message": "", "text": text})

        await asyncio.gather(*(noted(*row) for row in rows))  # in one group commit

    async def _peer(self, descriptors: list[int], shards: list[int]) -> None:
        """A channel to another worker, which owns these shards of mailboxes."""
        sock = socket.socket(fileno=descriptors[0])
        if self.mail is None:
            sock.close()
            return
        channel = Channel(sock, lambda op, args, _: self._from_peer(channel, op, args), lambda: self._peer_gone(channel))
        self._peers.add(channel)
        self.mail.mailboxes.reach(shards, channel)

    def _peer_gone(self, channel: Channel) -> None:
        self._peers.discard(channel)
        if self.mail is not None:
            self.mail.mailboxes.leave(channel)

    async def _from_peer(self, channel: Channel, op: str, args: dict[str, Any]) -> Any:
        if self.mail is None:
            raise RelayError("no mailboxes are kept here")
        return await self.mail.mailboxes.asked_by(channel, op, args)

    async def _borrow(self, descriptors: list[int], slot: int) -> None:
        """Accept connections on the sockets of a slot whose worker does not, until they are given back."""
        assert self.acceptor is not None
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for listener, sock in zip(self.config.listeners, sockets, strict=True):
            self._borrowed.setdefault(slot, []).append(self.acceptor.listen(sock, listener))

    async def _give_back(self, descriptors: list[int], slot: int) -> None:
        assert self.acceptor is not None
        for listening in self._borrowed.pop(slot, []):
            self.acceptor.close(listening)

    # Stop

    async def _ease(self, descriptors: list[int]) -> None:
        """Finish deliveries, and begin none: another program is to have the shards soon. Mail is taken meanwhile."""
        await self._finish_deliveries()

    async def _leave(self, descriptors: list[int]) -> None:
        """Accept no connections any more, leave clients that are in the middle of something a moment, and end."""
        if self.acceptor is not None:
            self.acceptor.stop_accepting()
            await asyncio.sleep(0.02)  # so that a connection that was accepted before has begun
            await self.acceptor.disengaged(LEAVE_SECONDS)
        self.stopping.set()

    async def _finish_deliveries(self) -> None:
        await asyncio.gather(
            *(shard.end_scans() for shard in self.shards.values()),
            *(shard.dispatcher.drain(DRAIN_SECONDS, DATA_SECONDS) for shard in self.shards.values()),
        )

    def _orphaned(self) -> None:
        """The supervisor has died: drain, and exit."""
        self.stopping.set()

    async def run(self) -> None:
        """Serve until `stopping` is set, then drain."""
        await self.stopping.wait()
        if self.acceptor is None:
            return
        if self.collector is not None:
            await self.collector.end()
        self.acceptor.stop_listening()
        await asyncio.gather(self.acceptor.drained(DRAIN_SECONDS), self._finish_deliveries())
        if self.mail is not None:
            await self.mail.delivery.end(FILING_SECONDS)
        self.gauges.stop()
        if self._injection is not None:
            self._injection.end()
        self.suppressing.stop()
        self.acceptor.endpoint.end()
        self.known.close()
        for shard in self.shards.values():
            await shard.queue.stop()
        if self.mail is not None:
            self.mail.access.close()
            for channel in list(self._peers):
                channel.close()
            await self.mail.mailboxes.stop()
        await self.resolver.close()
        self.log.close()
        if self.spans is not None:
            self.spans.close()


_OWN_REQUESTS: dict[str, Callable[..., Awaitable[Any]]] = {
    "alive": Worker._alive,
    "busy": Worker._busy,
    "stop": Worker._stop,
    "ease": Worker._ease,
    "leave": Worker._leave,
    "prepare": Worker._prepare,
    "commit": Worker._commit,
    "drop": Worker._drop,
    "reopen_log": Worker._reopen_log,
    "tickets": Worker._renew_tickets,
    "site_state": Worker._site_state,
    "peer": Worker._peer,
    "complained": Worker._complained,
    "borrow": Worker._borrow,
    "give_back": Worker._give_back,
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
    os.set_inheritable(int(sys.argv[1]), False)  # the supervisor's socket is none of the business of processes beside this one
    end_with_supervisor(ORPHAN_SECONDS)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_main(int(sys.argv[1])))
