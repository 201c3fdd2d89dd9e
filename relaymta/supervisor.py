"""The supervisor: binds the sockets, starts a worker for each slot and replaces those that die, reloads, drains, answers the CLI
and serves /metrics. It does not handle mail.

Each listener has one SO_REUSEPORT socket for each slot. The socket stays open in the supervisor when the slot's worker dies, so
that new connections wait in its backlog; it is lent to another worker until the successor is ready.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from pwd import struct_passwd
from typing import Any

import msgspec
import uvloop

from relaymta import privileges
from relaymta.accept.tickets import OCTETS as TICKET_OCTETS
from relaymta.config import Config, notes, parse_hostport
from relaymta.control import LIMIT, Channel, Refused, pack, program
from relaymta.errors import ConfigError, RelayError, StoreError
from relaymta.log import Log, find_history
from relaymta.metrics import SITES_SHOWN
from relaymta.node import (
    BOUNCE,
    DEAD,
    HOLD,
    SUSPENDED,
    TOKEN,
    SiteState,
    SiteStates,
    Store,
    keep_profiles,
    keep_rates,
    keep_secret,
    kept_rates,
    site_state_row,
)
from relaymta.queue import inspect
from relaymta.queue.ident import format_id, parse_id, shard_of
from relaymta.route.shaping import shipped_text
from relaymta.send.policies import filter_of
from relaymta.shm import SLOTS, Shared
from relaymta.sockets import bound, control_socket, notify, reason, remove_socket

__all__ = ["serve"]

START_SECONDS = 30.0
BACKOFF_MOST = 10.0
TICKETS_SECONDS = 12 * 3600.0  # lifetime of the keys of TLS session tickets
RATES_SECONDS = 60.0  # interval of storing rates and quotas: a crash loses at most that much of their use
STOP_SECONDS = 45.0
# Message data of some 100 kB is common: by default glibc would map and unmap memory for each message, and fault in every page.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "4"}
NEEDS_RESTART = ("user", "workers", "spool", "listener", "metrics", "control", "log", "hostname")

_Join = Callable[[dict[str, Any], dict[str, Any]], None]


class Slot:
    """A worker's place: its number, sockets and shards, which outlive it, and its current process."""

    def __init__(self, number: int, sockets: list[socket.socket], shards: list[int]) -> None:
        self.number = number
        self.sockets = sockets
        self.shards = shards
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Channel | None = None
        self.ready = False
        self.started = 0.0
        self.backoff = 0.1
        self.probed: list[int] = []  # messages in flight at the last worker's death
        self.culprit = 0


class Supervisor:
    """The processes of one spool. `reload`: reads the configuration again (ConfigError)."""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self.config = config
        self._reload_config = reload
        self.shared = Shared.create()
        self.stopping = asyncio.Event()
        self.failure = ""
        self.slots: list[Slot] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self.states = SiteStates()
        self._tickets = os.urandom(TICKET_OCTETS)
        self._unwritten: tuple[list[SiteState], list[SiteState]] = ([], [])  # learned, forgotten
        self._writing: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status (`failure` says why it is not 0). ConfigError, SpoolBusy or StoreError
        before any worker is started."""
        config = self.config
        spool = Path(config.spool)
        _raise_descriptor_limit()
        workers = config.workers or len(os.sched_getaffinity(0))
        workers = min(workers, SLOTS)
        control = self._prepare_as_root()
        sockets = bound(config.listener, workers)
        http = await self._serve_metrics()
        self._drop_root()
        self._prepare_spool(spool)
        control = control or control_socket(config.control_path)
        self.log = _opened_log(config)
        if os.geteuid() == 0:
            others = "" if privileges.roots_alone(spool) else f"; others can write to {spool}, and their links are followed"
            self.log.event("warning", text=f"running as root: set `user` to run as another user{others}")
        _check_files(self.config)
        self._open_node(spool / "node")
        self.shared.client_rates(workers).restore(kept_rates(spool / "node"))
        self._note(config)
        for number, own in enumerate(sockets):
            self.slots.append(Slot(number, own, [number]))
        for orphan in _existing_shards(spool):
            if orphan >= workers:
                self.slots[orphan % workers].shards.append(orphan)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self.reload()))
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)
        results = await asyncio.gather(*(self._start(slot) for slot in self.slots), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                self.failure = str(result)
                self.stopping.set()
        if not self.failure:
            addresses = [listener.address for listener in config.listener]
            self.log.event("started", pid=os.getpid(), listeners=addresses)
            notify("READY=1")
        periodic = [loop.create_task(one) for one in (self._store_rates_periodically(), self._renew_tickets_periodically())]
        server = await asyncio.start_unix_server(self._cli, sock=control)
        await self.stopping.wait()
        notify("STOPPING=1")
        server.close()
        await self._stop_workers()
        for task in periodic:
            task.cancel()
        self._store_rates()
        if self._writing is not None:
            await self._writing
        self.store.close()
        if http is not None:
            await http.cleanup()
        remove_socket(control, config.control_path)
        self.log.event("stopped", reason=self.failure or "signal")
        self.log.close()
        return 75 if self.failure else 0

    # Start

    def _prepare_as_root(self) -> socket.socket | None:
        """Do what only root can do for `user`: make it the owner of the spool and of the log file, if only root can change their
        folders; and create the control socket, if only root can change its folder."""
        if os.geteuid() != 0 or not self.config.user:
            return None
        user = privileges.account(self.config.user)
        spool, control = Path(self.config.spool), self.config.control_path
        if privileges.roots_alone(spool, user):
            _make_folder(spool)
            _give_spool(spool, user)
        _give_log(self.config.log.file, user)
        return control_socket(control, user) if privileges.roots_alone(control.parent, user) else None

    def _prepare_spool(self, spool: Path) -> None:
        _make_folder(spool)
        if not os.access(spool, os.W_OK | os.X_OK):
            user = self.config.user
            hint = f": `chown -hR {user} {spool}`, if that is what you want" if user else ""
            raise ConfigError([f"spool: {spool} is not writable{hint}"])
        try:
            keep_secret(spool)
        except OSError as error:
            raise ConfigError([f"spool: {error.filename or spool}: {error.strerror}"]) from None

    def _open_node(self, path: Path) -> None:
        self.store = Store(path)
        self.states = SiteStates(self.store.load())
        try:
            if keep_profiles(path, shipped_text()):
                self.log.event("warning", text="the provider profiles have changed: `relaymta shaping diff` shows how")
        except OSError as error:  # such as a full disk; the relay works without this record
            self.log.event("warning", text=f"{path}: {error.strerror}: the provider profiles in use are not recorded")

    def _note(self, config: Config) -> None:
        for sentence in notes(config):
            self.log.event("warning", text=sentence)

    async def _store_rates_periodically(self) -> None:
        while True:
            await asyncio.sleep(RATES_SECONDS)
            await asyncio.to_thread(self._store_rates)

    async def _renew_tickets_periodically(self) -> None:
        while True:
            await asyncio.sleep(TICKETS_SECONDS)
            self._tickets = os.urandom(TICKET_OCTETS)
            for _, channel in self._ready():
                channel.notify("tickets", keys=self._tickets)

    def _store_rates(self) -> None:
        """Store the use of quotas and the counts of failed login attempts, which continue after a restart. Blocks."""
        try:
            keep_rates(Path(self.config.spool) / "node", self.shared.client_rates(len(self.slots)).rows())
        except OSError as error:
            self.log.event("warning", text=f"node: {error.strerror}: the use of quotas is not stored")

    def _drop_root(self) -> None:
        if os.geteuid() == 0 and self.config.user:
            privileges.become(privileges.account(self.config.user))

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
                lambda: self._sites(SITES_SHOWN),
                self._usage,
                self._health,
            )
        except OSError as error:
            raise ConfigError([f"metrics.listen: {self.config.metrics.listen}: {reason(error)}"]) from None

    def _health(self) -> str:
        down = [slot.number for slot in self.slots if not slot.ready]
        return f"workers not ready: {down}" if down else ""

    # Workers

    async def _start(self, slot: Slot) -> None:
        """Start a slot's worker and wait until it is ready. RelayError when it cannot start, or is not ready after
        START_SECONDS."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        slot.started = time.monotonic()
        slot.process = await _execute(
            *program("relaymta.worker", str(theirs.fileno())), pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            env=MALLOC | os.environ,
        )  # fmt: skip
        theirs.close()
        slot.channel = Channel(ours, self._from_worker, lambda: None)
        self._spawn(self._watch(slot, slot.process))
        probed, culprit = slot.probed, slot.culprit
        slot.probed, slot.culprit = [], 0
        descriptors = [self.shared.descriptor, *(s.fileno() for s in slot.sockets)]
        try:
            async with asyncio.timeout(START_SECONDS):
                await slot.channel.ask(
                    "start", descriptors, config=self.config.to_json(), slot=slot.number,
                    workers=len(self.slots), shards=slot.shards, probed=probed, culprit=culprit,
                    states=[msgspec.to_builtins(state) for state in self.states], tickets=self._tickets,
                )  # fmt: skip
        except (Refused, ConnectionError, TimeoutError) as error:
            raise RelayError(f"worker {slot.number} did not start: {error or 'no answer'}") from None
        slot.ready = True

    async def _watch(self, slot: Slot, process: asyncio.subprocess.Process) -> None:
        """Wait until a worker ends, and start its successor (unless the relay is stopping)."""
        status = await process.wait()
        was_ready, slot.ready = slot.ready, False
        if slot.channel is not None:
            slot.channel.close()
        self.shared.clear_limits(slot.number)
        slot.probed, slot.culprit = self.shared.in_flight(slot.number).take()
        if self.stopping.is_set():
            return
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self.log.event("warning", text=f"worker {slot.number} (pid {process.pid}) ended with {how}; starting another")
        if not was_ready:
            slot.backoff = min(slot.backoff * 2, BACKOFF_MOST)
        elif time.monotonic() - slot.started > 10:
            slot.backoff = 0.1
        lender = await self._lend(slot)
        while not self.stopping.is_set():
            await asyncio.sleep(slot.backoff if not was_ready else 0)
            try:
                await self._start(slot)
                break
            except RelayError as error:
                self.log.event("warning", text=str(error))
                return  # _watch of the new process starts the next one
        if lender is not None and lender.channel is not None:
            with contextlib.suppress(ConnectionError, Refused):
                await lender.channel.ask("give_back")

    async def _lend(self, slot: Slot) -> Slot | None:
        """Lend a dead worker's sockets to a ready one, which is returned; None when no worker is ready."""
        for other in self.slots:
            if other.ready and other.channel is not None:
                with contextlib.suppress(ConnectionError, Refused):
                    await other.channel.ask("borrow", [s.fileno() for s in slot.sockets])
                    return other
        return None

    async def _stop_workers(self) -> None:
        processes = [slot.process for slot in self.slots if slot.process is not None]
        for slot in self.slots:
            if slot.channel is not None:
                slot.channel.notify("stop")
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            for process in processes:
                if process.returncode is None:
                    process.kill()

    # Site states

    async def _from_worker(self, op: str, args: dict[str, Any], descriptors: list[int]) -> None:
        """Handle a worker's notification: it has learned, or (state None) forgotten a site state."""
        if op != "site_state":
            raise RelayError(f"no such request of a worker: {op}")
        state = None if args["state"] is None else msgspec.convert(args["state"], SiteState)
        self._set_site_state(state, tuple(args["key"]))

    def _set_site_state(self, state: SiteState | None, key: tuple[str, str, str]) -> bool:
        """Add a state, or (None) remove the one with this key; send the change to all workers and have it stored. Whether
        anything changed."""
        if state is None:
            forgotten = self.states.forget(*key)
            if forgotten is None:
                return False
            self._unwritten[1].append(forgotten)
        else:
            self.states.learn(state)
            self._unwritten[0].append(state)
        for slot in self.slots:
            if slot.channel is not None:
                slot.channel.notify("site_state", state=None if state is None else msgspec.to_builtins(state), key=list(key))
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_site_states())
        return True

    async def _write_site_states(self) -> None:
        """Store pending changes of states, all at a time. If the disk fails, they are in effect until the next restart."""
        try:
            while self._unwritten[0] or self._unwritten[1]:
                (learned, forgotten), self._unwritten = self._unwritten, ([], [])
                forgotten += self.states.sweep()
                await asyncio.to_thread(self.store.write, learned, forgotten)
        except StoreError as error:
            self.log.event("warning", text=f"node: {error}: what was learned about sites is lost at the next restart")
        finally:
            self._writing = None

    def _reopen_logs(self) -> None:
        """SIGUSR1: open the log file again, in all processes, after it was rotated."""
        self.log.reopen()
        for _, channel in self._ready():
            channel.notify("reopen_log")

    async def reload(self) -> str:
        """Read the configuration again and send it to the workers. The answer for operators: "reloaded", with the keys that need
        a restart, or "refused" with the problems; then the old configuration stays in use."""
        try:
            fresh = self._reload_config()
            _check_files(fresh)
        except ConfigError as error:
            self.log.event("warning", text=f"reload refused, the old configuration stays: {error}")
            return f"refused, the old configuration stays:\n{error}"
        changed = [key for key in NEEDS_RESTART if getattr(fresh, key) != getattr(self.config, key)]
        fresh = fresh.model_copy(update={key: getattr(self.config, key) for key in changed})
        self.config = fresh
        self._note(fresh)
        text = fresh.to_json()
        for slot in self.slots:
            if slot.ready and slot.channel is not None:
                await slot.channel.ask("reload", config=text)
        if changed:
            self.log.event("warning", text=f"reloaded; these need a restart: {', '.join(changed)}")
            return f"reloaded; these need a restart: {', '.join(changed)}"
        return "reloaded"

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The CLI

    async def _cli(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the CLI: answer its requests in order."""
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(4), "big")
                if length > LIMIT:
                    return
                message = msgspec.msgpack.decode(await reader.readexactly(length))
                try:
                    handler = _COMMANDS.get(message["op"])
                    if handler is None:
                        raise RelayError(f"no such request: {message['op']}")
                    answer = {"id": message["id"], "ok": await handler(self, **message["args"])}
                except (RelayError, Refused, ConnectionError, ValueError, TypeError) as error:
                    answer = {"id": message["id"], "error": str(error)}
                writer.write(pack(answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _ready(self) -> list[tuple[Slot, Channel]]:
        return [(slot, slot.channel) for slot in self.slots if slot.ready and slot.channel is not None]

    async def _status(self) -> dict[str, Any]:
        rows = []
        for slot in self.slots:
            row = {"worker": slot.number, "ready": slot.ready}
            if slot.ready and slot.channel is not None:
                try:
                    row |= await slot.channel.ask("status")
                except ConnectionError:  # it has just died; its successor is being started
                    row["ready"] = False
            rows.append(row)
        return {
            "pid": os.getpid(),
            "listeners": [listener.address for listener in self.config.listener],
            "spool": self.config.spool,
            "durability": "250 only after fdatasync of the message data and a synced LMDB commit",
            "metrics": self.config.metrics.listen,
            "workers": rows,
        }

    async def _merged(self, op: str, name: str, counts: tuple[str, ...], join: _Join, **args: Any) -> list[dict[str, Any]]:
        """All workers' rows for the request `op`, merged by the value of the column `name`: the columns `counts` are added up,
        and `join(known, row)` merges the others."""
        merged: dict[str, dict[str, Any]] = {}
        for _, channel in self._ready():
            for row in await channel.ask(op, **args):
                known = merged.setdefault(row[name], row)
                if known is not row:
                    for key in counts:
                        known[key] += row[key]
                    join(known, row)
        return list(merged.values())

    async def _summary(self) -> list[dict[str, Any]]:
        def join(known: dict[str, Any], row: dict[str, Any]) -> None:
            known["next"] = min(filter(None, (known["next"], row["next"])), default=0)

        rows = await self._merged("summary", "queue", ("messages", "bytes", "deferred", "held"), join)
        return sorted(rows, key=lambda row: -row["messages"])

    async def _shape(self) -> list[dict[str, Any]]:
        def join(known: dict[str, Any], row: dict[str, Any]) -> None:
            known["ages"] = [sum(pair) for pair in zip(known["ages"], row["ages"], strict=True)]

        return sorted(await self._merged("shape", "queue", ("messages",), join), key=lambda row: -row["messages"])

    async def _shards(self) -> list[int]:
        """The numbers of the open shards."""
        return sorted(shard for slot, _ in self._ready() for shard in slot.shards)

    async def _page(self, shard: int, after: int, chosen: dict[str, Any]) -> Any:
        """The next messages of a shard after the id `after` that match the filter `chosen`, as returned by `listing.page`."""
        return await self._owner(shard).ask("page", shard=shard, after=after, chosen=chosen)

    async def _change(self, verb: str, shard: int, idents: list[int], word: str = "") -> Any:
        if verb not in inspect.VERBS:
            raise RelayError(f"no such verb: {verb}")
        return await self._owner(shard).ask("change", shard=shard, verb=verb, idents=idents, word=word)

    def _owner(self, shard: int) -> Channel:
        for slot, channel in self._ready():
            if shard in slot.shards:
                return channel
        raise RelayError(f"shard {shard} is not open")

    async def _move(self, chosen: dict[str, Any], word: str, dry_run: bool) -> list[int] | None:
        """Move all messages of whole queues to the route `word`: [messages matched, those in flight]. None when the filter
        `chosen` does not match whole queues, or the route has no hosts of its own."""
        found = [await channel.ask("move", chosen=chosen, word=word, dry_run=dry_run) for _, channel in self._ready()]
        return None if None in found else [sum(part) for part in zip(*found, strict=True)] or [0, 0]

    async def _throttled(self, queues: dict[str, int]) -> list[float]:
        """Of `queues` (name -> number of due messages): how many messages the limits of sites delay, and until when (seconds
        UTC)."""
        return max([await channel.ask("throttled", queues=queues) for _, channel in self._ready()], default=[0, 0.0])

    async def _message(self, ident: str) -> Any:
        return await self._first("message", ident)

    async def _raw(self, ident: str) -> Any:
        return await self._first("raw", ident)

    async def _explain(self, ident: str) -> Any:
        return await self._first("explain", ident)

    async def _history(self, ident: str) -> Any:
        return await asyncio.to_thread(find_history, Path(self.config.spool) / "history", format_id(parse_id(ident)))

    async def _sites(self, most: int = 0) -> list[dict[str, Any]]:
        """One row for each site, of all workers together; the `most` busiest (0: all)."""

        def join(known: dict[str, Any], row: dict[str, Any]) -> None:
            if row["state"] == "down":
                known |= {key: row[key] for key in ("state", "reason", "until")}

        counts = ("waiting", "in flight", "connections", "opening", "window", "rate", "sessions")
        rows = await self._merged("sites", "pool", counts, join, most=most)
        rows.sort(key=lambda row: (-row["waiting"], -row["connections"], row["pool"]))
        return rows[:most] if most else rows

    async def _site_states(self) -> list[dict[str, Any]]:
        shown = sorted((state for state in self.states if state.kind != TOKEN), key=lambda state: state.key)
        return [site_state_row(state, self.states) for state in shown]

    async def _suspend(self, site: str, about: str, seconds: float, reason: str) -> None:
        now = time.time_ns() // 1_000_000
        state = SiteState(SUSPENDED, site, about, now, now + int(seconds * 1000), "operator", reason)
        self._decided(state, about)

    async def _policy(self, kind: str, about: str, seconds: float, reason: str) -> None:
        """Set a hold or bounce policy (`kind`) about mail (`about`: `field=value` words) for some seconds."""
        if kind not in (HOLD, BOUNCE):
            raise RelayError(f"no such policy: {kind}")
        filter_of(about)
        now = time.time_ns() // 1_000_000
        self._decided(SiteState(kind, about, "", now, now + int(seconds * 1000), "operator", reason), "")

    def _decided(self, state: SiteState, tenant: str) -> None:
        """Log and set a state that an operator has decided."""
        self.log.event(
            "shaping", site=state.site, tenant=tenant, action=state.kind, by=state.by, reply=state.reason, until=state.until
        )
        self._set_site_state(state, state.key)

    async def _clear(self, kind: str, site: str, about: str, resume: bool) -> int:
        """Remove states; how many. `resume`: all kinds that keep mail from a site, instead of `kind`."""
        kinds = [SUSPENDED, DEAD] if resume else [kind]
        return sum(self._set_site_state(None, (one, site, about)) for one in kinds)

    async def _usage(self) -> list[dict[str, Any]]:
        """The use of accounts' quotas. Quotas are shared by all workers, so one is asked."""
        channel = next((channel for _, channel in self._ready()), None)
        if channel is None:
            raise RelayError("no worker is ready")
        found: list[dict[str, Any]] = await channel.ask("usage")
        return found

    async def _first(self, op: str, ident: str) -> Any:
        home = shard_of(parse_id(ident))
        for _, channel in sorted(self._ready(), key=lambda pair: home not in pair[0].shards):
            found = await channel.ask(op, ident=ident)
            if found is not None:
                return found
        return None


_COMMANDS: dict[str, Callable[..., Awaitable[Any]]] = {
    "status": Supervisor._status,
    "summary": Supervisor._summary,
    "shape": Supervisor._shape,
    "shards": Supervisor._shards,
    "page": Supervisor._page,
    "move": Supervisor._move,
    "change": Supervisor._change,
    "throttled": Supervisor._throttled,
    "message": Supervisor._message,
    "raw": Supervisor._raw,
    "explain": Supervisor._explain,
    "history": Supervisor._history,
    "sites": Supervisor._sites,
    "site_states": Supervisor._site_states,
    "suspend": Supervisor._suspend,
    "policy": Supervisor._policy,
    "clear": Supervisor._clear,
    "usage": Supervisor._usage,
    "reload": Supervisor.reload,
}


def _check_files(config: Config) -> None:
    """ConfigError when certificates, keys, accounts or recipients cannot be read or used by the current user."""
    if config.certificate or config.accounts or config.dkim or config.relay.recipients:
        from relaymta.accept import endpoint  # imports cryptography and argon2

        endpoint.check(config)


async def _execute(*command: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a process. RelayError when it cannot be executed."""
    try:
        return await asyncio.create_subprocess_exec(*command, **options)
    except OSError as error:
        raise RelayError(f"cannot start a worker: {command[0]}: {error.strerror} (may this user execute it?)") from None


def _raise_descriptor_limit() -> None:
    """Raise RLIMIT_NOFILE to its hard limit: each connection needs a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _existing_shards(spool: Path) -> list[int]:
    found = [path.name.removeprefix("shard-") for path in spool.glob("shard-*")]
    return sorted(int(text) for text in found if text.isdigit())


def _make_folder(spool: Path) -> None:
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"spool: {spool}: {error.strerror}"]) from None


def _give_spool(spool: Path, user: struct_passwd) -> None:
    try:
        privileges.give(spool, user)
    except OSError as error:
        raise ConfigError([f"spool: {error.filename or spool}: {error.strerror}"]) from None


def _give_log(file: str, user: struct_passwd) -> None:
    """Create the log file and make `user` its owner, if only root can change its folder."""
    path = Path(file)
    if file == "-" or not privileges.roots_alone(path.parent, user):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            if os.fstat(descriptor).st_nlink == 1:
                os.fchown(descriptor, user.pw_uid, user.pw_gid)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError([f"log.file: {file}: {error.strerror or error}"]) from None


def _opened_log(config: Config) -> Log:
    try:
        return Log(config.log.file, -1)
    except OSError as error:
        raise ConfigError([f"log.file: {config.log.file}: {error.strerror or error}"]) from None


async def _run(config: Config, reload: Callable[[], Config]) -> tuple[int, str]:
    supervisor = Supervisor(config, reload)
    status = await supervisor.run()
    return status, supervisor.failure


def serve(config: Config, reload: Callable[[], Config]) -> tuple[int, str]:
    """Run the relay until SIGTERM or SIGINT: (exit status, failure or ""). ConfigError or SpoolBusy before it is ready."""
    return uvloop.run(_run(config, reload))
