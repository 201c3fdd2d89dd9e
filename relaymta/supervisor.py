"""The supervisor: binds the sockets, starts a worker for each slot, replaces those that die, reloads, drains, answers
the CLI and serves /metrics. It touches no mail.

Each listener has one SO_REUSEPORT socket for each slot, which stays open here when its worker dies: connections that
arrive meanwhile wait in its backlog, and a living worker is lent the socket until the successor is ready.
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
    Fact,
    Facts,
    Store,
    fact_row,
    keep_profiles,
    keep_rates,
    keep_secret,
    kept_rates,
)
from relaymta.queue import inspect
from relaymta.queue.ident import format_id, parse_id, shard_of
from relaymta.route.shaping import shipped_text
from relaymta.send.standing import filter_of
from relaymta.shm import SLOTS, Shared
from relaymta.sockets import bound, control_socket, notify, reason, remove_socket

__all__ = ["serve"]

START_SECONDS = 30.0
BACKOFF_MOST = 10.0
TICKETS_SECONDS = 12 * 3600.0  # a client resumes its TLS session for so long
RATES_SECONDS = 60.0  # how much of quotas is forgotten when everything is killed
STOP_SECONDS = 45.0
# Texts of some 100 kB are the usual case: glibc would map and unmap each, and fault in every page of it anew.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "33554432", "MALLOC_ARENA_MAX": "4"}
NEEDS_RESTART = ("user", "workers", "spool", "listener", "metrics", "control", "log", "hostname")

_Join = Callable[[dict[str, Any], dict[str, Any]], None]


class Slot:
    """A place for a worker: its sockets, which outlive it, and the process that fills it now."""

    def __init__(self, number: int, sockets: list[socket.socket], shards: list[int]) -> None:
        self.number = number
        self.sockets = sockets
        self.shards = shards
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Channel | None = None
        self.ready = False
        self.started = 0.0
        self.backoff = 0.1
        self.suspects: list[int] = []  # messages in flight at the last worker's death
        self.culprit = 0


class Supervisor:
    """All processes of one spool. `reload()` reads the configuration again."""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self.config = config
        self._reload_config = reload
        self.shared = Shared.create()
        self.stopping = asyncio.Event()
        self.failure = ""
        self.slots: list[Slot] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self.facts = Facts()
        self._tickets = os.urandom(TICKET_OCTETS)
        self._unwritten: tuple[list[Fact], list[Fact]] = ([], [])  # learned, forgotten
        self._writing: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit status."""
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
            self.log.event("warning", text=f"running as root: set `user` to run as somebody else{others}")
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
        going = [loop.create_task(one) for one in (self._keep_rates_going(), self._renew_tickets_going())]
        server = await asyncio.start_unix_server(self._cli, sock=control)
        await self.stopping.wait()
        notify("STOPPING=1")
        server.close()
        await self._stop_workers()
        for task in going:
            task.cancel()
        self._keep_rates()
        if self._writing is not None:
            await self._writing
        self.store.close()
        if http is not None:
            await http.cleanup()
        remove_socket(control, config.control_path)
        self.log.event("stopped", reason=self.failure or "told to")
        self.log.close()
        return 75 if self.failure else 0

    # Beginnings

    def _prepare_as_root(self) -> socket.socket | None:
        """What only root can do for `user`: give it the spool and the log file, where they are in root's hands alone; the control
        socket, if it belongs into a folder that is."""
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
        self.facts = Facts(self.store.load())
        try:
            if keep_profiles(path, shipped_text()):
                self.log.event("warning", text="the provider profiles have changed: `relaymta shaping diff` shows how")
        except OSError as error:  # a full disk, for one: the relay does not need them there
            self.log.event("warning", text=f"{path}: {error.strerror}: the provider profiles in use are not remembered")

    def _note(self, config: Config) -> None:
        for sentence in notes(config):
            self.log.event("warning", text=sentence)

    async def _keep_rates_going(self) -> None:
        while True:
            await asyncio.sleep(RATES_SECONDS)
            await asyncio.to_thread(self._keep_rates)

    async def _renew_tickets_going(self) -> None:
        while True:
            await asyncio.sleep(TICKETS_SECONDS)
            self._tickets = os.urandom(TICKET_OCTETS)
            for _, channel in self._ready():
                channel.tell("tickets", keys=self._tickets)

    def _keep_rates(self) -> None:
        """Quotas go on where they were, and who guesses passwords is known, after a restart."""
        try:
            keep_rates(Path(self.config.spool) / "node", self.shared.client_rates(len(self.slots)).rows())
        except OSError as error:
            self.log.event("warning", text=f"node: {error.strerror}: what is used of quotas is not remembered")

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
        """Start a slot's worker and wait until it is ready. RelayError when it cannot serve."""
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
        suspects, culprit = slot.suspects, slot.culprit
        slot.suspects, slot.culprit = [], 0
        descriptors = [self.shared.descriptor, *(s.fileno() for s in slot.sockets)]
        try:
            async with asyncio.timeout(START_SECONDS):
                await slot.channel.ask(
                    "start", descriptors, config=self.config.to_json(), slot=slot.number,
                    workers=len(self.slots), shards=slot.shards, suspects=suspects, culprit=culprit,
                    facts=[msgspec.to_builtins(fact) for fact in self.facts], tickets=self._tickets,
                )  # fmt: skip
        except (Refused, ConnectionError, TimeoutError) as error:
            raise RelayError(f"worker {slot.number} did not start: {error or 'no answer'}") from None
        slot.ready = True

    async def _watch(self, slot: Slot, process: asyncio.subprocess.Process) -> None:
        """Replace a worker that dies."""
        status = await process.wait()
        was_ready, slot.ready = slot.ready, False
        if slot.channel is not None:
            slot.channel.close()
        self.shared.clear_limits(slot.number)
        slot.suspects, slot.culprit = self.shared.flying(slot.number).take()
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
                return  # _watch of the new process goes on
        if lender is not None and lender.channel is not None:
            with contextlib.suppress(ConnectionError, Refused):
                await lender.channel.ask("give_back")

    async def _lend(self, slot: Slot) -> Slot | None:
        """Give a dead worker's sockets to a living one."""
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
                slot.channel.tell("stop")
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            for process in processes:
                if process.returncode is None:
                    process.kill()

    # What the machine knows

    async def _from_worker(self, op: str, args: dict[str, Any], descriptors: list[int]) -> None:
        """A worker tells a fact."""
        if op != "fact":
            raise RelayError(f"workers ask nothing: {op}")
        fact = None if args["fact"] is None else msgspec.convert(args["fact"], Fact)
        self._know(fact, tuple(args["key"]))

    def _know(self, fact: Fact | None, key: tuple[str, str, str]) -> bool:
        """Keep a fact, or (None) forget the one with this key, and tell all workers; whether anything changed."""
        if fact is None:
            forgotten = self.facts.forget(*key)
            if forgotten is None:
                return False
            self._unwritten[1].append(forgotten)
        else:
            self.facts.learn(fact)
            self._unwritten[0].append(fact)
        for slot in self.slots:
            if slot.channel is not None:
                slot.channel.tell("fact", fact=None if fact is None else msgspec.to_builtins(fact), key=list(key))
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_facts())
        return True

    async def _write_facts(self) -> None:
        """Make facts durable, all that have piled up at a time. What the disk refuses is known as long as we run."""
        try:
            while self._unwritten[0] or self._unwritten[1]:
                (learned, forgotten), self._unwritten = self._unwritten, ([], [])
                forgotten += self.facts.sweep()
                await asyncio.to_thread(self.store.write, learned, forgotten)
        except StoreError as error:
            self.log.event("warning", text=f"node: {error}: what was learned about sites is lost at the next restart")
        finally:
            self._writing = None

    def _reopen_logs(self) -> None:
        """SIGUSR1: the log file was rotated."""
        self.log.reopen()
        for _, channel in self._ready():
            channel.tell("reopen_log")

    async def reload(self) -> str:
        """Read the configuration again and hand it to the workers; what is wrong with it, or needs a restart."""
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
        """One CLI's connection: requests, answered in order."""
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
                except ConnectionError:  # it has just died; another is on its way
                    row["ready"] = False
            rows.append(row)
        return {
            "pid": os.getpid(),
            "listeners": [listener.address for listener in self.config.listener],
            "spool": self.config.spool,
            "durability": "250 only after fdatasync of the text and a synced LMDB commit",
            "metrics": self.config.metrics.listen,
            "workers": rows,
        }

    async def _merged(self, op: str, name: str, counts: tuple[str, ...], join: _Join, **args: Any) -> list[dict[str, Any]]:
        """The rows that all workers answer `op` with, one for each value of `name`: `counts` are added up, `join(known, row)`
        does the rest."""
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
        """The shards that are open."""
        return sorted(shard for slot, _ in self._ready() for shard in slot.shards)

    async def _page(self, shard: int, after: int, chosen: dict[str, Any]) -> Any:
        """The next messages of a shard behind the id `after`, as `listing.page` gives them."""
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
        """All mail of whole queues goes by the route `word`: [messages, in flight]; None when `chosen` means no whole queues, or
        the route has no hosts of its own."""
        found = [await channel.ask("move", chosen=chosen, word=word, dry_run=dry_run) for _, channel in self._ready()]
        return None if None in found else [sum(part) for part in zip(*found, strict=True)] or [0, 0]

    async def _throttled(self, queues: dict[str, int]) -> list[float]:
        """Of so many messages in these queues, all due: how many a site's limits keep, and until when (seconds UTC)."""
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
        """The sites of all workers, one row for each; the `most` busiest (0: all)."""

        def join(known: dict[str, Any], row: dict[str, Any]) -> None:
            if row["state"] == "down":
                known |= {key: row[key] for key in ("state", "reason", "until")}

        counts = ("waiting", "in flight", "connections", "opening", "window", "rate", "sessions")
        rows = await self._merged("sites", "pool", counts, join, most=most)
        rows.sort(key=lambda row: (-row["waiting"], -row["connections"], row["pool"]))
        return rows[:most] if most else rows

    async def _facts(self) -> list[dict[str, Any]]:
        shown = sorted((fact for fact in self.facts if fact.kind != TOKEN), key=lambda fact: fact.key)
        return [fact_row(fact, self.facts) for fact in shown]

    async def _suspend(self, site: str, about: str, seconds: float, reason: str) -> None:
        now = time.time_ns() // 1_000_000
        fact = Fact(SUSPENDED, site, about, now, now + int(seconds * 1000), "operator", reason)
        self._ordered(fact, about)

    async def _order(self, kind: str, about: str, seconds: float, reason: str) -> None:
        """A standing order about mail (`field=value` words)."""
        if kind not in (HOLD, BOUNCE):
            raise RelayError(f"no such order: {kind}")
        filter_of(about)
        now = time.time_ns() // 1_000_000
        self._ordered(Fact(kind, about, "", now, now + int(seconds * 1000), "operator", reason), "")

    def _ordered(self, fact: Fact, tenant: str) -> None:
        """An operator decided something."""
        self.log.event(
            "shaping", site=fact.site, tenant=tenant, action=fact.kind, by=fact.by, reply=fact.reason, until=fact.until
        )
        self._know(fact, fact.key)

    async def _clear(self, kind: str, site: str, about: str, resume: bool) -> int:
        """Forget facts; how many. `resume`: all that keep mail from a site."""
        kinds = [SUSPENDED, DEAD] if resume else [kind]
        return sum(self._know(None, (one, site, about)) for one in kinds)

    async def _usage(self) -> list[dict[str, Any]]:
        """What is used of the quotas of accounts. They are the machine's: any worker knows."""
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
    "facts": Supervisor._facts,
    "suspend": Supervisor._suspend,
    "order": Supervisor._order,
    "clear": Supervisor._clear,
    "usage": Supervisor._usage,
    "reload": Supervisor.reload,
}


def _check_files(config: Config) -> None:
    """ConfigError with what is wrong with certificates, keys and accounts, as whom we run as now can read them."""
    if config.certificate or config.accounts or config.dkim or config.relay.recipients:
        from relaymta.accept import door  # and what it needs: cryptography, argon2

        door.check(config)


async def _execute(*command: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a process. RelayError when the user we run as may not execute it."""
    try:
        return await asyncio.create_subprocess_exec(*command, **options)
    except OSError as error:
        raise RelayError(f"cannot start a worker: {command[0]}: {error.strerror} (may this user execute it?)") from None


def _raise_descriptor_limit() -> None:
    """As many descriptors as the system lets us have: one for each connection, and the spool's."""
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
    """Make the log file, and give it to whom we will run as; not in a folder that they can write themselves."""
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
    """Run the relay until it is told to stop: (exit status, what went wrong). ConfigError, SpoolBusy before it begins."""
    return uvloop.run(_run(config, reload))
