"""The new program's end of an upgrade: what the old one gives it, and asks of it, over a socket that it has inherited.

The old program is the one who asks (upgrade.py has the table of steps). A request that is not known here is refused, and the old
program goes back; so two versions whose dialogues differ do not harm each other.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from relaymta.config import Config
from relaymta.control import Channel
from relaymta.errors import ConfigError, RelayError
from relaymta.metrics import LAYOUT as METRICS
from relaymta.node import SiteStates
from relaymta.shm import LAYOUT as MEMORY
from relaymta.shm import Shared
from relaymta.sockets import key_of

__all__ = ["LAYOUT", "VARIABLE", "VERSION", "Elder", "Facts", "absolute", "check_same", "met", "notice_end"]

VERSION = 1  # of the dialogue; both ends have to know the same one
VARIABLE = "RELAYMTA_UPGRADE"  # the descriptors of the dialogue's socket and of standard error
LAYOUT = f"{MEMORY} {METRICS}"


class Facts(msgspec.Struct):
    """What the old program is, and what it gives with this. `listeners`: addresses, in the order of each slot's sockets;
    `metrics`: the address of /metrics, "" for none, and how many sockets it has; `admin`, `admin_listen`: the path and the
    address of the HTTP API's sockets, "" for none; `layout`: of the shared memory; `watchdog`:
    seconds in which systemd expects a sign of life; `stays`: the old process waits for this one to end, so that whoever started
    it sees that end."""

    protocol: int
    version: str
    pid: int
    spool: str
    workers: int
    control: str
    listeners: list[str]
    metrics: str
    metrics_sockets: int
    admin: str
    admin_listen: str
    layout: str
    watchdog: float
    stays: bool


async def met() -> "Elder | None":
    """The old program that has started this one for an upgrade; None where it was started otherwise. RelayError."""
    told = os.environ.pop(VARIABLE, "")
    if not told:
        return None
    descriptors = [int(number) for number in told.split(",")]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    elder = Elder(*descriptors)
    await elder.introduced()
    return elder


class Elder:
    """The old program, as the new one sees it. `control`, `metrics`, `admin`, `admin_port`: its sockets; `sockets`: of each slot;
    `shared`: the memory of all workers, None where its layout is another; `states`, `tickets`: what is known, once `begun`."""

    def __init__(self, descriptor: int, errors: int) -> None:
        self.facts: Facts
        self.control: socket.socket
        self.metrics: list[socket.socket] = []
        self.admin: socket.socket | None = None
        self.admin_port: socket.socket | None = None
        self.sockets: dict[int, list[socket.socket]] = {}
        self.shared: Shared | None = None
        self.states = SiteStates()
        self.tickets = b""
        self.settled = False  # the older program stores what it knows: nothing more is told to it
        self.committed = asyncio.Event()  # all is ours
        self.left = asyncio.Event()  # the old program is gone, or is about to
        self._errors = errors
        self._met: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.Event()
        self._handlers: dict[str, Callable[..., Awaitable[Any]]] = {
            "facts": self._facts,
            "sockets": self._sockets,
            "left": self._left,
        }
        self._gone: Callable[[], None] = lambda: None
        self.channel = Channel(socket.socket(fileno=descriptor), self._asked, self._closed)

    async def introduced(self) -> None:
        """Wait for the facts. RelayError when this program cannot follow that one."""
        await self._met

    def serve(self, handlers: dict[str, Callable[..., Awaitable[Any]]], gone: Callable[[], None]) -> None:
        """Answer the steps of the upgrade from now on. `gone()`: the old program has ended before it was committed."""
        self._handlers |= handlers
        self._gone = gone
        self._serving.set()
        if not self.channel.open:
            self._closed()

    def inherited_sockets(self) -> dict[tuple[str, int], list[socket.socket]]:
        """The listening sockets by address, each with one for each slot in their order."""
        addresses = [key_of(address) for address in self.facts.listeners]
        columns = zip(*(self.sockets[slot] for slot in sorted(self.sockets)), strict=True)
        return {address: list(column) for address, column in zip(addresses, columns, strict=True)}

    def errors_are_heard(self) -> None:
        """What is written to standard error from now on is no more for the one who asked for the upgrade."""
        os.dup2(self._errors, 2)
        os.close(self._errors)

    async def _asked(self, op: str, args: dict[str, Any], descriptors: list[int]) -> Any:
        if op in ("facts", "sockets"):
            return await self._handlers[op](descriptors, **args)
        await self._serving.wait()
        if op not in self._handlers:
            raise RelayError(f"the new program knows no {op!r} in an upgrade")
        return await self._handlers[op](**args)

    async def _facts(self, descriptors: list[int], facts: dict[str, Any]) -> None:
        """The first descriptor is the control socket's; then come those of /metrics, those of the HTTP API; the memory's."""
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors[:-1]]
        try:
            self.facts = msgspec.convert(facts, Facts)
            if self.facts.protocol != VERSION:
                raise RelayError(f"the running program speaks version {self.facts.protocol} of the dialogue, not {VERSION}")
        except (msgspec.ValidationError, RelayError) as error:
            self._met.set_exception(RelayError(f"this program cannot follow the running one: {error}: a restart is needed"))
            return
        self.control, *others = sockets
        self.metrics, others = others[: self.facts.metrics_sockets], others[self.facts.metrics_sockets :]
        self.admin = others.pop(0) if self.facts.admin else None
        self.admin_port = others.pop(0) if self.facts.admin_listen else None
        if self.facts.layout == LAYOUT:
            self.shared = Shared(descriptors[-1])
        else:
            os.close(descriptors[-1])

    async def _sockets(self, descriptors: list[int], slot: int, last: bool) -> None:
        self.sockets[slot] = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        if last:
            self._met.set_result(None)

    async def _left(self) -> None:
        """The old program has told systemd who is the main process now, and ends soon."""
        self.left.set()

    def _closed(self) -> None:
        self.left.set()
        if not self._met.done():
            self._met.set_exception(RelayError("the running program has given up the upgrade"))
        if not self.committed.is_set():
            self._gone()


def absolute(path: str | Path) -> str:
    """A path as both programs write it. Looks at no file."""
    return os.path.abspath(path)


def check_same(config: Config, facts: Facts, workers: int) -> None:
    """ConfigError where the file says now what only a restart can change."""
    pairs = {
        "spool": (facts.spool, absolute(config.spool)),
        "control.socket": (facts.control, absolute(config.control_path)),
        "workers": (str(facts.workers), str(workers)),
    }
    found = [
        f"{key}: it is {before} in the running relay, and {now} in the configuration: this needs a restart"
        for key, (before, now) in pairs.items()
        if before != now
    ]
    if os.geteuid() == 0 and config.user:
        found.append(f"user: the running relay is root; to become {config.user} needs a restart")
    if found:
        raise ConfigError(found)


def notice_end(pid: int, ended: Callable[[], None]) -> None:
    """Have `ended()` called once a process, our parent, has ended."""
    if os.getppid() != pid:
        ended()
        return
    with contextlib.suppress(OSError):  # Linux before 5.3: it is not noticed
        descriptor = os.pidfd_open(pid)
        loop = asyncio.get_running_loop()

        def readable() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            ended()

        loop.add_reader(descriptor, readable)
