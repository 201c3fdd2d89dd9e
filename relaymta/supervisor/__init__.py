"""The supervisor: binds the sockets, starts a worker for each slot and replaces those that die, reloads, drains, answers the CLI
and serves /metrics. It does not handle mail.

Each listener has one SO_REUSEPORT socket for each slot. The socket stays open in the supervisor when the slot's worker dies, so
that new connections wait in its backlog; it is lent to another worker until the successor is ready.

A supervisor that an older one has started (upgrade.py, elder.py) does the same, but for what it has from that one: sockets,
shared memory and, until it is committed, all that is decided and stored.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from relaymta import __version__, privileges
from relaymta.accept.tls import certificate_paths
from relaymta.config import Config, parse_hostport
from relaymta.disk.lock import OWNER_SECONDS, TRY_SECONDS, locked_shard
from relaymta.disk.shards import shard_numbers
from relaymta.errors import ConfigError, RelayError, SpoolBusy
from relaymta.log import Log
from relaymta.metrics import FilterTotals, Own, RuleTotals, certificate_name, list_name, rule_name
from relaymta.node import SiteState, SiteStates, keep_secret
from relaymta.queue.snapshot import remove_stale
from relaymta.shm import SLOTS, Shared
from relaymta.sockets import (
    ENDING_SECONDS,
    another,
    bound,
    control_socket,
    http_sockets,
    in_use,
    key_of,
    listens,
    local_socket,
    notify,
    notify_wait,
    reason,
    remove_socket,
    watchdog_seconds,
)
from relaymta.supervisor.abuse import Accounts
from relaymta.supervisor.activity import Activity
from relaymta.supervisor.answers import serve_cli, usage
from relaymta.supervisor.audit import Audit
from relaymta.supervisor.busiest import busiest
from relaymta.supervisor.checks import check_files, check_program, ephemeral_spool
from relaymta.supervisor.configuration import Configuration
from relaymta.supervisor.elder import Elder, absolute, check_same, met, notice_end
from relaymta.supervisor.first import bury_adopted
from relaymta.supervisor.http_api import HttpApi, admin_port, admin_socket
from relaymta.supervisor.machine import Machine
from relaymta.supervisor.readiness import reasons
from relaymta.supervisor.reports import Reports
from relaymta.supervisor.root import Opened, drop_root, group_of, make_folder, prepare_as_root
from relaymta.supervisor.slots import Slot, Slots
from relaymta.supervisor.standing_by import stand_by
from relaymta.supervisor.suppression import Suppressing
from relaymta.supervisor.upgrade import Upgrade

if TYPE_CHECKING:
    from relaymta.supervisor.mailboxes import MachineMailboxes

__all__ = ["Supervisor", "serve"]

ANSWER_SECONDS = 5.0  # for the command line to get its answers after an upgrade
ACCOUNTS = "accounts"  # the table of node/ of what they usually send
PLACES_MOST = 200  # of exceptions of hooks, that are exposed one by one


class Supervisor:
    """The processes of one spool. `reload`: reads the configuration again (ConfigError)."""

    def __init__(self, config: Config, reload: Callable[[], Config], elder: Elder | None = None) -> None:
        self._elder = elder
        self._refused = False  # the older program goes on, with the sockets at their paths
        self.shared = elder.shared if elder is not None and elder.shared is not None else Shared.create()
        self.watchdog = elder.facts.watchdog if elder is not None else watchdog_seconds()
        self.control: socket.socket
        self.http_sockets: list[socket.socket] = []
        self.admin: socket.socket | None = None  # the unix socket of the HTTP API
        self.admin_port: socket.socket | None = None
        self.local: socket.socket | None = None  # that of sendmail(1), of which each slot has a duplicate
        self._http: Any = None
        self._server: asyncio.AbstractServer | None = None
        self.conversations: set[asyncio.Task[None]] = set()  # with the command line
        self.stopping = asyncio.Event()
        self.failure = ""
        self._raised: Counter[str] = Counter()  # exceptions of hooks in Python, by their places
        self.audit = Audit(lambda: self.log)
        self.http_api: HttpApi | None = None
        self.reports: Reports
        self.activity = Activity()
        self._named = self.shared.named()
        self.mail: MachineMailboxes | None = None
        self.slots = Slots(self.shared, self._warn, self.stopping, self._start_arguments, self._by_worker, self._started)
        self.configuration = Configuration(config, reload, self.slots, self.stopping)
        self.upgrade = Upgrade(self)
        self.suppressing = Suppressing(lambda: self.config, self._warn)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status (`failure` says why it is not 0). ConfigError, SpoolBusy or StoreError
        before any worker is started."""
        config = self.config
        spool = Path(config.spool)
        _raise_descriptor_limit()
        workers = config.workers or len(os.sched_getaffinity(0))
        workers = min(workers, SLOTS)
        if problems := ephemeral_spool(config):
            raise ConfigError(problems)
        if self._elder is None:
            opened, sockets = self._opened_as_root(workers)
        else:
            opened, sockets = self._inherited(self._elder, workers)
        self._sockets = sockets
        self._prepare_spool(spool)
        self.reports = Reports(config, self._warn, self.suppressing.take)
        self.control = opened.control or control_socket(config.control_path, None, group_of(config))
        self.admin = opened.admin or admin_socket(config, group_of(config))
        self._open_local(opened.local)
        check_files(config)
        if self._elder is not None:
            self._elder.errors_are_heard()
        self.log = self.configuration.log = _opened_log(config)
        if os.geteuid() == 0:
            others = "" if privileges.roots_alone(spool) else f"; others can write to {spool}, and their links are followed"
            self.log.event("warning", text=f"running as root: set `user` to run as another user{others}")
        if self._elder is None:
            self._open_machine()
        if config.keeps_mail:
            from relaymta.supervisor.mailboxes import MachineMailboxes  # where it is needed: others do without

            self.mail = MachineMailboxes(spool, workers, self.slots, self.shared.directory(), self._warn)
        self.suppressing.start()
        self.configuration.note(config)
        existing = shard_numbers(spool)
        for number, own in enumerate(sockets):
            orphans = [shard for shard in existing if shard >= workers and shard % workers == number]
            self.slots.add(Slot(number, own, [number, *orphans]))
        self._hear_signals()
        self._spawn(bury_adopted())
        if self.mail is not None:
            self.mail.start()
        if self._elder is None:
            await self._serve()
            self._spawn(_signs_of_life(self.watchdog))
            self.failure = await self.slots.start()
        else:
            self.failure = await self._take_over(self._elder)
        if self.failure:
            self.stopping.set()
        elif not self.stopping.is_set():
            addresses = [listener.address for listener in config.listener]
            self.log.event("started", pid=os.getpid(), listeners=addresses)
            notify("READY=1")
        await self.stopping.wait()
        await self._stop()
        return 75 if self.failure else 0

    async def _stop(self) -> None:
        """End all that runs: also where another program has it."""
        pid = self.upgrade.pid
        if pid:
            if self._server is not None:
                self._server.close()  # who asks from now on is answered by the new program
            notify_wait(f"MAINPID={pid}")
            self.upgrade.leave()
        elif self._serves:
            notify("STOPPING=1")
        for slot in self.slots:
            slot.close()
        await asyncio.gather(self.slots.stop(), self.upgrade.abort())
        if self.http_api is not None:
            await self.http_api.close(leave=bool(pid) or self._refused)
        await self.reports.close()
        if not pid:
            await self.audit.end()
        if self._server is not None:
            self._server.close()  # until then the command line is answered: mail may be under way for long
        if self._serves:
            await (self.machine.leave() if pid else self.machine.stop())
        if self.mail is not None:
            self.mail.close()
        await self.suppressing.stop()
        if self._http is not None:
            await self._http.cleanup()
        if pid:
            if self.configuration.hung_up:
                self.upgrade.pass_on(signal.SIGHUP)
            if self.conversations:
                await asyncio.wait(self.conversations, timeout=ANSWER_SECONDS)
            await self.audit.end()
        elif self._serves and not self._refused:
            remove_socket(self.control, self.config.control_path)
            if self.local is not None and self.config.local_path is not None:
                remove_socket(self.local, self.config.local_path)
        self.control.close()
        if self.local is not None:
            self.local.close()
        reason = "upgraded" if pid else "signal"
        self.log.event("stopped", reason=self.failure or reason)
        self.log.close()

    @property
    def _serves(self) -> bool:
        """Whether the command line is answered here, and what is decided is stored: not in an upgrade before it is committed."""
        return self._server is not None

    def _open_machine(self, tickets: bytes = b"", in_use: bool = False) -> None:
        """What all workers share, and what accounts send."""
        spool = Path(self.config.spool)
        secret = (spool / "secret").read_bytes()
        self.machine = Machine(spool / "node", self.shared, len(self._sockets), self.log, self.slots, secret, tickets, in_use)
        self.abuse = self._accounts(self.machine)

    async def _serve(self) -> None:
        """Answer the command line and /metrics, and store what is decided, from now on."""
        if self.http_sockets:
            self._http = await self._serve_metrics(self.http_sockets)
        self._server = await asyncio.start_unix_server(self._converse, sock=another(self.control))
        self.machine.start()
        self.http_api = HttpApi(self.config, self.admin, self.admin_port, self._warn)
        self.http_api.start()
        self.reports.start()
        if self.mail is not None:
            self.mail.upkeep.start()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.conversations.add(task)
        try:
            await serve_cli(self, reader, writer)
        finally:
            self.conversations.discard(task)

    # Taking over from an older program

    def _inherited(self, elder: Elder, workers: int) -> tuple[Opened, list[list[socket.socket]]]:
        """The unix sockets and the listening sockets that an older program has; those of listeners that it has not are bound
        here. ConfigError where this one cannot follow it."""
        config, facts = self.config, elder.facts
        check_same(config, facts, workers)
        given = elder.inherited_sockets()
        local = [sock for one in config.listeners if one.is_local for sock in given.pop(key_of(one.address), [])]
        for sock in local[1:]:  # each slot has had the same one
            sock.close()
        sockets = bound(config.listener, workers, given)
        if config.metrics.listen == facts.metrics:
            self.http_sockets = elder.metrics
        else:
            for sock in elder.metrics:
                sock.close()
            self._open_http()
        path, admin = config.admin_path, elder.admin
        if admin is not None and (path is None or absolute(path) != facts.admin):
            admin.close()
            admin = None
        if config.admin.listen == facts.admin_listen:
            self.admin_port = elder.admin_port
        else:
            if elder.admin_port is not None:
                elder.admin_port.close()
            self.admin_port = admin_port(config)
        check_program(config)
        return Opened(elder.control, admin, local[0] if local else None), sockets

    async def _take_over(self, elder: Elder) -> str:
        """Start workers, each when the older program's has left its slot; then decide and store in its place. Why that has
        failed; "": it has not, or the relay is to stop."""
        self.slots.hold()
        starting = asyncio.get_running_loop().create_task(self.slots.start())
        elder.serve(
            {"prepare": self._prepare, "begin": self._begin, "take": self._take, "settle": self._settle, "commit": self._commit,
             "stop": self._give_up, "site_state": self._elders_state, "reload": self.reload, "reopen_log": self._rotated},
            self.stopping.set,
        )  # fmt: skip
        failure = await starting
        if failure:  # the older program is told that, and then has this one end
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self.stopping.wait()
            return failure
        stopping = asyncio.get_running_loop().create_task(self.stopping.wait())
        committed = asyncio.get_running_loop().create_task(elder.committed.wait())
        await asyncio.wait({stopping, committed}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        committed.cancel()
        return ""

    async def _prepare(self) -> str:
        why = await self.slots.held()
        if why:
            raise RelayError(why)
        return __version__

    async def _begin(self, states: list[Any], tickets: bytes) -> None:
        assert self._elder is not None
        self._elder.states = SiteStates(msgspec.convert(states, list[SiteState]))
        self._elder.tickets = tickets

    async def _take(self, slot: int, probed: list[tuple[int, bool]], culprit: int) -> None:
        one = next(own for own in self.slots if own.number == slot)
        assert one.first is not None
        self.slots.open_gate(one, probed, culprit)
        why = await asyncio.shield(one.first)
        if why:
            raise RelayError(why)
        await self.slots.lend_held()

    async def _settle(self) -> None:
        assert self._elder is not None
        self._elder.settled = True

    async def _commit(self) -> None:
        elder = self._elder
        assert elder is not None
        self._open_machine(elder.tickets, elder.shared is not None)
        await self._serve()
        elder.committed.set()
        self._spawn(self._lead(elder))

    async def _lead(self, elder: Elder) -> None:
        """Behind the older program's end: systemd hears this one from then on; or the older process stands by, and its end is
        noticed."""
        await elder.left.wait()
        if elder.facts.stays:
            notice_end(elder.facts.pid, self.stopping.set)
        await _signs_of_life(self.watchdog)

    async def _give_up(self) -> None:
        """The older program goes back, perhaps since the answer to `commit` was late."""
        self._refused = True
        self.stopping.set()

    async def _rotated(self) -> None:
        self._reopen_logs()

    async def _elders_state(self, state: dict[str, Any] | None, key: list[str]) -> None:
        assert self._elder is not None
        if state is None:
            self._elder.states.forget(*key)
        else:
            self._elder.states.learn(msgspec.convert(state, SiteState))
        self.slots.notify("site_state", state=state, key=key)

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self.configuration.config

    def _start_arguments(self, slot: Slot) -> dict[str, Any]:
        """What every worker needs at its start."""
        own = self._elder is None or self._elder.committed.is_set()
        states = self.machine.known_by_workers() if own else self._elder.states  # type: ignore[union-attr]
        return {
            "config": self.configuration.given(slot),
            "states": [msgspec.to_builtins(state) for state in states],
            "tickets": self.machine.tickets if own else self._elder.tickets,  # type: ignore[union-attr]
            "mail": self.mail.of(slot.number) if self.mail is not None else None,
        }

    def _started(self, slot: Slot) -> None:
        self.configuration.started(slot)

    async def _by_worker(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        """As `from_worker`; in an upgrade that is not committed the older program answers; what comes while it stores waits."""
        elder = self._elder
        if elder is not None and not elder.committed.is_set():
            if not elder.settled:
                return await elder.channel.ask(op, **args)
            await elder.committed.wait()
        return await self.from_worker(op, args, descriptors)

    async def from_worker(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        """Answer a worker's request."""
        answers: dict[str, Callable[..., Awaitable[Any]]] = {
            "site_state": self.machine.site_state, "token": self.machine.token, "conduct": self.abuse.conduct,
            "sites": self.activity.note, "hooks_raised": self._hooks_raised,
        }  # fmt: skip
        if op not in answers:
            raise RelayError(f"no such request of a worker: {op}")
        return await answers[op](**args)

    async def _hooks_raised(self, places: dict[str, int]) -> None:
        """Hooks in Python have raised exceptions."""
        for place, count in places.items():
            known = place in self._raised or len(self._raised) < PLACES_MOST
            self._raised[place if known else "other"] += count

    def _accounts(self, machine: Machine) -> Accounts:
        """What accounts send, and usually send."""
        found = Accounts(lambda: self.config.abuse, machine.states, machine.set_site_state, self.log, machine.kept(ACCOUNTS))
        machine.keep(ACCOUNTS, found)
        self.configuration.replaced = lambda: self._configured(found)
        found.configured()  # the file may have changed meanwhile
        return found

    def _configured(self, abuse: Accounts) -> None:
        """A reload has replaced the configuration."""
        abuse.configured()
        self.suppressing.configured()
        if self.http_api is not None:
            self.http_api.configured(self.config)
            self.reports.configured(self.config)

    def _warn(self, text: str) -> None:
        self.log.event("warning", text=text)

    # Start

    def _opened_as_root(self, workers: int) -> tuple[Opened, list[list[socket.socket]]]:
        """What only root may open (the unix sockets, where they are in root's folders; the listening sockets); from then on
        root's rights are gone."""
        config = self.config
        self._await_the_killed()
        opened = prepare_as_root(config)
        try:
            sockets = self._open_ports(workers)
            self.admin_port = admin_port(config)
            drop_root(config)
            check_program(config)
        except BaseException:
            opened.discard(config)
            raise
        return opened, sockets

    def _open_local(self, opened: socket.socket | None) -> None:
        """Give each slot the socket of sendmail(1): all accept on the same one. `opened`: it is there already."""
        path = self.config.local_path
        if path is None:
            return
        self.local = opened or local_socket(path)
        for row in self._sockets:
            row.append(another(self.local))

    def _open_ports(self, workers: int) -> list[list[socket.socket]]:
        """The listening sockets, also those of /metrics. SpoolBusy where they are those of a relay with this spool."""
        try:
            found = bound(self.config.listener, workers)
            self._open_http()
            return found
        except ConfigError:
            shard = locked_shard(Path(self.config.spool))
            if shard is None:
                raise
            raise SpoolBusy(f"{shard} is in use by another relaymta") from None

    def _await_the_killed(self) -> None:
        """Wait for the end of processes of a relay that was killed: they have its ports, and its shards, until then."""
        spool, began = Path(self.config.spool), time.monotonic()
        while self._is_taken():
            if _answers(self.config.control_path):
                return  # it is alive
            most = OWNER_SECONDS if locked_shard(spool) is not None else ENDING_SECONDS
            if time.monotonic() - began > most:
                return
            time.sleep(TRY_SECONDS)

    def _is_taken(self) -> bool:
        """Whether others have a port, or the socket of sendmail(1). (Ports that systemd passes are its own.)"""
        addresses = [] if "LISTEN_FDS" in os.environ else [listener.address for listener in self.config.listener]
        local = self.config.local_path
        return any(map(in_use, addresses)) or (local is not None and _answers(local))

    def _prepare_spool(self, spool: Path) -> None:
        make_folder(spool)
        if not os.access(spool, os.W_OK | os.X_OK):
            user = self.config.user
            hint = f": `chown -hR {user} {spool}`, if that is what you want" if user else f" for user {os.geteuid()}"
            raise ConfigError([f"spool: {spool} is not writable{hint}"])
        try:
            keep_secret(spool)
        except OSError as error:
            raise ConfigError([f"spool: {error.filename or spool}: {error.strerror}"]) from None
        remove_stale(spool)

    def _open_http(self) -> None:
        if self.config.metrics.listen == "off":
            return
        host, port = parse_hostport(self.config.metrics.listen)
        try:
            self.http_sockets = http_sockets(host, port)
        except OSError as error:
            raise ConfigError([f"metrics.listen: {self.config.metrics.listen}: {reason(error)}"]) from None

    async def _serve_metrics(self, sockets: list[socket.socket]) -> Any:
        from relaymta.admin.http import serve_http

        return await serve_http(
            sockets,
            lambda: [self.shared.counters(slot.number) for slot in self.slots],
            lambda: busiest(self.slots, self.activity),
            lambda: usage(self),
            self.slots.health,
            lambda: reasons(self.slots, self.shared, self.stopping),
            lambda: self.machine.outages.rows(_smart_sites(self.config)),
            lambda: {one.name: FilterTotals(self._named.of(one.name), one.seconds) for one in self.config.filter},
            lambda: {zone: self._named.of(list_name(zone)) for zone in _zones(self.config)},
            lambda: {one.name: RuleTotals.of(self._named.of(rule_name(one.name))) for one in self.config.mail_rule},
            lambda: self.abuse.counts(),
            self.activity.totals,
            self._own,
            lambda: self.reports.totals(),
        )

    def _own(self) -> Own:
        """What /metrics shows of the supervisor."""
        ends: dict[str, int] = {}
        for path in {path for paths in certificate_paths(self.config) for path in paths}:
            known = [cells[0] for cells in self._named.of(certificate_name(path)) if cells[0]]
            if known:  # of the workers that use it: the first to end
                ends[path] = min(known)
        made = self.configuration
        listed = self.suppressing
        return Own(
            made.number, made.refused, made.refusals, self.slots.restarts, self.slots.states(), ends, listed.counts.by_reason(),
            listed.counts.most, listed.left_out, dict(self._raised),
        )  # fmt: skip

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)

    def _told_to_stop(self, number: int) -> None:
        """SIGTERM or SIGINT; after an upgrade it is meant for the program that has taken over."""
        self.stopping.set()
        self.upgrade.pass_on(number)

    def _hang_up(self) -> None:
        if self.upgrade.pid:
            self.upgrade.pass_on(signal.SIGHUP)
        else:
            self.configuration.hang_up()

    def _reopen_logs(self) -> None:
        """SIGUSR1: open the log file again, in all processes, after it was rotated."""
        self.log.reopen()
        self.upgrade.reopen_logs()
        if self.http_api is not None:
            self.http_api.reopen_log()
            self.reports.reopen_log()
        for _, channel in self.slots.ready():
            channel.notify("reopen_log")

    async def reload(self) -> str:
        """Read the configuration again and replace the one in use. The answer for operators."""
        return await self.configuration.reload()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _signs_of_life(period: float) -> None:
    """Tell systemd's watchdog, where there is one (`period`: as of `watchdog_seconds`), that this event loop runs."""
    while period > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(period / 3)


def _answers(path: Path) -> bool:
    """Whether a process listens at a unix socket, as far as that can be found out."""
    try:
        return listens(path)
    except OSError:
        return False


def _raise_descriptor_limit() -> None:
    """Raise RLIMIT_NOFILE to its hard limit: each connection needs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _opened_log(config: Config) -> Log:
    try:
        return Log(config.log.file, -1, form=config.log.format)
    except OSError as error:
        raise ConfigError([f"log.file: {config.log.file}: {error.strerror or error}"]) from None


async def _run(config: Config, reload: Callable[[], Config]) -> tuple[int, str, int]:
    supervisor = Supervisor(config, reload, await met())
    status = await supervisor.run()
    upgrade = supervisor.upgrade
    if upgrade.pid and (ended := upgrade.status()) is not None:
        return ended, "", 0
    return status, supervisor.failure, upgrade.pid


def serve(config: Config, reload: Callable[[], Config]) -> tuple[int, str]:
    """Run the relay until SIGTERM or SIGINT: (exit status, failure or ""). ConfigError or SpoolBusy before it is ready. After an
    upgrade this process ends at once where systemd knows the new one, and else when that one does."""
    status, failure, pid = uvloop.run(_run(config, reload))
    if pid and "NOTIFY_SOCKET" not in os.environ:
        stand_by(pid)
    return status, failure


def _zones(config: Config) -> list[str]:
    """The lists in the DNS that filters ask."""
    return sorted({one.zone for row in config.filter for one in row.lists})


def _smart_sites(config: Config) -> Callable[[str], bool]:
    """Whether a site is that of a route's smart hosts, by its name (`send.pool.pool_key`)."""
    names = {route.label for route in config.route if route.hosts}
    names |= {f"{route.label} from {source}" for route in config.route if route.hosts for source in route.sources}
    looked_up = tuple(f"{route.label}/" for route in config.route if route.lookup)  # (route.sites) with the hosts behind it

    def is_smart(site: str) -> bool:
        return site in names or (bool(looked_up) and site.startswith(looked_up) and ":" in site.rpartition("/")[2])

    return is_smart
