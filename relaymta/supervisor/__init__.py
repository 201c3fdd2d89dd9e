"""The supervisor: binds the sockets, starts a worker for each slot and replaces those that die, reloads, drains, answers the CLI
and serves /metrics. It does not handle mail.

Each listener has one SO_REUSEPORT socket for each slot. The socket stays open in the supervisor when the slot's worker dies, so
that new connections wait in its backlog; it is lent to another worker until the successor is ready.
"""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from relaymta import privileges
from relaymta.accept.tls import certificate_paths
from relaymta.config import Config, parse_hostport
from relaymta.disk.lock import locked_shard
from relaymta.disk.shards import shard_numbers
from relaymta.errors import ConfigError, RelayError, SpoolBusy
from relaymta.log import Log
from relaymta.metrics import FilterTotals, Own, RuleTotals, certificate_name, list_name, rule_name
from relaymta.node import keep_secret
from relaymta.queue.snapshot import remove_stale
from relaymta.shm import SLOTS, Shared
from relaymta.sockets import bound, control_socket, notify, reason, remove_socket, watchdog_seconds
from relaymta.supervisor.abuse import Accounts
from relaymta.supervisor.activity import Activity
from relaymta.supervisor.answers import serve_cli, usage
from relaymta.supervisor.audit import Audit
from relaymta.supervisor.busiest import busiest
from relaymta.supervisor.checks import check_files, check_program, ephemeral_spool
from relaymta.supervisor.configuration import Configuration
from relaymta.supervisor.first import bury_adopted
from relaymta.supervisor.http_api import HttpApi, admin_port, admin_socket, discard
from relaymta.supervisor.machine import Machine
from relaymta.supervisor.readiness import reasons
from relaymta.supervisor.root import drop_root, group_of, make_folder, prepare_as_root
from relaymta.supervisor.slots import Slot, Slots

if TYPE_CHECKING:
    from relaymta.supervisor.mailboxes import MachineMailboxes

__all__ = ["Supervisor", "serve"]

ACCOUNTS = "accounts"  # the table of node/ of what they usually send


class Supervisor:
    """The processes of one spool. `reload`: reads the configuration again (ConfigError)."""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self.shared = Shared.create()
        self.stopping = asyncio.Event()
        self.failure = ""
        self.audit = Audit(lambda: self.log)
        self.http_api: HttpApi | None = None
        self.activity = Activity()
        self._named = self.shared.named()
        self.mail: MachineMailboxes | None = None
        self.slots = Slots(self.shared, self._warn, self.stopping, self._start_arguments, self._from_worker, self._started)
        self.configuration = Configuration(config, reload, self.slots, self.stopping)
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
        control, admin, sockets, port, http = await self._opened_as_root(workers)
        self._prepare_spool(spool)
        control = control or control_socket(config.control_path, None, group_of(config))
        admin = admin or admin_socket(config, group_of(config))
        check_files(config)
        self.log = self.configuration.log = _opened_log(config)
        if os.geteuid() == 0:
            others = "" if privileges.roots_alone(spool) else f"; others can write to {spool}, and their links are followed"
            self.log.event("warning", text=f"running as root: set `user` to run as another user{others}")
        secret = (spool / "secret").read_bytes()
        self.machine = Machine(spool / "node", self.shared, workers, self.log, self.slots, secret)
        self.abuse = self._accounts(self.machine)
        self.mail = None
        if config.keeps_mail:
            from relaymta.supervisor.mailboxes import MachineMailboxes  # where it is needed: others do without

            self.mail = MachineMailboxes(spool, workers, self.slots, self.shared.directory(), self._warn)
        self.configuration.note(config)
        existing = shard_numbers(spool)
        for number, own in enumerate(sockets):
            orphans = [shard for shard in existing if shard >= workers and shard % workers == number]
            self.slots.add(Slot(number, own, [number, *orphans]))
        self._hear_signals()
        self._spawn(bury_adopted())
        self._spawn(_signs_of_life())
        server = await asyncio.start_unix_server(partial(serve_cli, self), sock=control)
        if self.mail is not None:
            self.mail.start()
        self.failure = await self.slots.start()
        if self.failure:
            self.stopping.set()
        elif not self.stopping.is_set():
            addresses = [listener.address for listener in config.listener]
            self.log.event("started", pid=os.getpid(), listeners=addresses)
            notify("READY=1")
        self.machine.start()
        self.http_api = HttpApi(config, admin, port, self._warn)
        self.http_api.start()
        await self.stopping.wait()
        await self._end(server, control, http)
        return 75 if self.failure else 0

    async def _end(self, server: asyncio.Server, control: socket.socket, http: Any) -> None:
        """Stop the workers; then close all else. Until then the command line is answered."""
        notify("STOPPING=1")
        for slot in self.slots:
            slot.close()
        await self.slots.stop()
        if self.http_api is not None:
            await self.http_api.close()
        await self.audit.end()
        server.close()  # until then the command line is answered: mail may be under way for long
        await self.machine.stop()
        if self.mail is not None:
            self.mail.close()
        if http is not None:
            await http.cleanup()
        remove_socket(control, self.config.control_path)
        self.log.event("stopped", reason=self.failure or "signal")
        self.log.close()

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self.configuration.config

    def _start_arguments(self, slot: Slot) -> dict[str, Any]:
        """What every worker needs at its start."""
        return {
            "config": self.configuration.given(slot),
            "states": [msgspec.to_builtins(state) for state in self.machine.known_by_workers()],
            "tickets": self.machine.tickets,
            "mail": self.mail.of(slot.number) if self.mail is not None else None,
        }

    def _started(self, slot: Slot) -> None:
        self.configuration.started(slot)

    async def _from_worker(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        """Answer a worker's request."""
        answers: dict[str, Callable[..., Awaitable[Any]]] = {
            "site_state": self.machine.site_state, "token": self.machine.token, "conduct": self.abuse.conduct,
            "sites": self.activity.note,
        }  # fmt: skip
        if op not in answers:
            raise RelayError(f"no such request of a worker: {op}")
        return await answers[op](**args)

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
        if self.http_api is not None:
            self.http_api.configured(self.config)

    def _warn(self, text: str) -> None:
        self.log.event("warning", text=text)

    # Start

    async def _opened_as_root(
        self, workers: int
    ) -> tuple[socket.socket | None, socket.socket | None, list[list[socket.socket]], socket.socket | None, Any]:
        """What only root may open (the control socket and that of the HTTP API, where they are in root's folders; the listening
        sockets; the port of the HTTP API) and the server of /metrics; from then on root's rights are gone."""
        config = self.config
        control, admin = prepare_as_root(config)
        try:
            sockets, http = await self._open_ports(workers)
            port = admin_port(config)
            drop_root(config)
            check_program(config)
        except BaseException:
            if control is not None:
                remove_socket(control, config.control_path)
            discard(admin, config)
            raise
        return control, admin, sockets, port, http

    async def _open_ports(self, workers: int) -> tuple[list[list[socket.socket]], Any]:
        """The listening sockets, and the server of /metrics. SpoolBusy where they are those of a relay with this spool."""
        try:
            return bound(self.config.listener, workers), await self._serve_metrics()
        except ConfigError:
            shard = locked_shard(Path(self.config.spool))
            if shard is None:
                raise
            raise SpoolBusy(f"{shard} is in use by another relaymta") from None

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

    async def _serve_metrics(self) -> Any:
        if self.config.metrics.listen == "off":
            return None
        from relaymta.admin.http import serve_http

        host, port = parse_hostport(self.config.metrics.listen)
        try:
            return await serve_http(
                host,
                port,
                lambda: [self.shared.counters(slot.number) for slot in self.slots],
                lambda: busiest(self.slots, self.activity),
                lambda: usage(self),
                self.slots.health,
                lambda: reasons(self.slots, self.shared, self.stopping),
                lambda: self.machine.outages.rows(_smart_sites(self.config)),
                lambda: {one.name: FilterTotals(self._named.of(one.name), one.timeout) for one in self.config.filter},
                lambda: {zone: self._named.of(list_name(zone)) for zone in _zones(self.config)},
                lambda: {one.name: RuleTotals.of(self._named.of(rule_name(one.name))) for one in self.config.mail_rule},
                lambda: self.abuse.counts(),
                self.activity.totals,
                self._own,
            )
        except OSError as error:
            raise ConfigError([f"metrics.listen: {self.config.metrics.listen}: {reason(error)}"]) from None

    def _own(self) -> Own:
        """What /metrics shows of the supervisor."""
        ends: dict[str, int] = {}
        for path in {path for paths in certificate_paths(self.config) for path in paths}:
            known = [cells[0] for cells in self._named.of(certificate_name(path)) if cells[0]]
            if known:  # of the workers that use it: the first to end
                ends[path] = min(known)
        made = self.configuration
        return Own(made.number, made.refused, made.refusals, self.slots.restarts, self.slots.states(), ends)

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self.configuration.hang_up)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)

    def _reopen_logs(self) -> None:
        """SIGUSR1: open the log file again, in all processes, after it was rotated."""
        self.log.reopen()
        if self.http_api is not None:
            self.http_api.reopen_log()
        for _, channel in self.slots.ready():
            channel.notify("reopen_log")

    async def reload(self) -> str:
        """Read the configuration again and replace the one in use. The answer for operators."""
        return await self.configuration.reload()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _signs_of_life() -> None:
    """Tell systemd's watchdog, where there is one, that this event loop runs."""
    period = watchdog_seconds()
    while period > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(period / 3)


def _raise_descriptor_limit() -> None:
    """Raise RLIMIT_NOFILE to its hard limit: each connection needs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _opened_log(config: Config) -> Log:
    try:
        return Log(config.log.file, -1, form=config.log.format)
    except OSError as error:
        raise ConfigError([f"log.file: {config.log.file}: {error.strerror or error}"]) from None


async def _run(config: Config, reload: Callable[[], Config]) -> tuple[int, str]:
    supervisor = Supervisor(config, reload)
    status = await supervisor.run()
    return status, supervisor.failure


def serve(config: Config, reload: Callable[[], Config]) -> tuple[int, str]:
    """Run the relay until SIGTERM or SIGINT: (exit status, failure or ""). ConfigError or SpoolBusy before it is ready."""
    return uvloop.run(_run(config, reload))


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
