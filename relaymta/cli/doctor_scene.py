"""What the checks of `relaymta doctor` look at, and the form of what they find."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pwd import struct_passwd
from typing import TYPE_CHECKING, Any, TypeVar

from relaymta import control, privileges
from relaymta.config import Config, Route
from relaymta.errors import RelayError
from relaymta.route.table import RouteTable

if TYPE_CHECKING:
    from relaymta.dns import Resolver

__all__ = ["Row", "Scene", "Told", "days_left", "first_of", "in_thread", "mx_routes", "relays_user", "status_of"]

T = TypeVar("T")
Row = tuple[str, str, str]  # what was checked; ok | warning | wrong; what was found, and the cure
ANSWER = 8.0  # seconds
SHOWN = 2  # problems that a row names


@dataclass(frozen=True, slots=True)
class Told:
    """What the running relay says of itself: `status`; None where none has answered, and `silence` says why ("": none runs;
    `closed`: it may not be asked by us)."""

    status: dict[str, Any] | None = None
    silence: str = ""
    closed: bool = False


@dataclass(frozen=True)
class Scene:
    """`config`: the configuration, where it has no `problems`, else the defaults; `given`: there is one; `notes`: probable
    mistakes in it. `options`: to follow another verb in a shell. `control`: the path of the control socket; None: not known.
    `user`: whom the relay runs as, None: not known; `rights`: the checks have that user's rights, or root's; `by_root`: as of
    supervisor.checks.made_by_root. `addresses`: those that mail is sent from, as given, not as found. `probe_host`: where
    port 25 is tried. `resolver`: that of the event loop in which checks run."""

    config: Config
    given: bool = True
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: str = ""
    control: Path | None = None
    told: Told = Told()
    user: struct_passwd | None = None
    rights: bool = True
    by_root: frozenset[str] = frozenset()
    offline: bool = False
    dnsbl: bool = False
    probe_host: str = ""
    addresses: tuple[str, ...] = ()
    resolver: "Resolver | None" = field(default=None, repr=False)

    @property
    def who(self) -> str:
        """Whom to run this as, for what needs more rights."""
        name = (self.user.pw_name or f"user {self.user.pw_uid}") if self.user is not None else ""
        return f"root or {name}" if name and name != "root" else "root"

    @property
    def dns(self) -> "Resolver":
        """The resolver."""
        assert self.resolver is not None
        return self.resolver

    @property
    def to_mx(self) -> list[Route]:
        """As `mx_routes`."""
        return list(mx_routes(self.config))

    @property
    def processes(self) -> list[int]:
        """The process ids of the running relay: the supervisor's, and those of its workers."""
        status = self.told.status
        return [] if status is None else [status["pid"], *(row["pid"] for row in status["workers"] if row.get("pid"))]

    @property
    def workers(self) -> int:
        """How many there are, or would be."""
        return self.config.workers or len(os.sched_getaffinity(0))


def mx_routes(config: Config) -> Iterator[Route]:
    """The routes whose mail goes to the MX of its domain, the one for what no route takes included."""
    for route in RouteTable(config).routes:
        if not (route.hosts or route.lookup or route.is_local):
            yield route


def status_of(path: Path | None) -> Told:
    """Ask the relay that listens on a control socket; it has ANSWER seconds."""

    async def asked() -> Told:
        async with asyncio.timeout(ANSWER):
            return await in_thread(lambda: _told(path) if path is not None else Told())

    try:
        return asyncio.run(asked())
    except TimeoutError:
        return Told(silence=f"{path}: nothing within {ANSWER:g} s")


def _told(path: Path) -> Told:
    try:
        return Told(control.ask(path, "status"))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return Told()
    except PermissionError:
        return Told(silence=f"{path}: Permission denied", closed=True)
    except (RelayError, OSError) as error:
        return Told(silence=f"{path}: {getattr(error, 'strerror', None) or error}")


def relays_user(config: Config, told: Told) -> struct_passwd | None:
    """Whom the relay runs as: `user`, or who runs it now, or the owner of the spool. None: not known. ConfigError: there is no
    such user."""
    if config.user:
        return privileges.account(config.user)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        if told.status is not None:
            text = Path(f"/proc/{told.status['pid']}/status").read_text()
            ids = {line.split()[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith(("Uid:", "Gid:"))}
            return privileges.user_of(ids["Uid:"], ids["Gid:"])
    with contextlib.suppress(OSError):
        return privileges.owner_of(Path(config.spool))
    return None


async def in_thread(function: Callable[[], T]) -> T:
    """The result of a function that blocks. Its thread is nobody's to wait for: neither a caller that is cancelled nor the end
    of the program, where it hangs (in a file system that does not answer)."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if found.done():
            return
        if error is not None:
            found.set_exception(error)
        else:
            found.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, failure = None, None
        try:
            value = function()
        except Exception as error:
            failure = error
        except BaseException as error:  # of the command line's own, such as SystemExit
            failure = RuntimeError(repr(error))
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    return await found


def first_of(sentences: list[str], more: str) -> str:
    """The first sentences in one, and how many more there are, which `more` shows."""
    left = len(sentences) - SHOWN
    return "; ".join(sentences[:SHOWN]) + (f"; and {left} more ({more})" if left > 0 else "")


def days_left(seconds: float) -> str:
    """How long something is still valid, in words."""
    return f"{seconds / 86400:.0f} days" if seconds >= 172_800 else f"{seconds / 3600:.0f} hours"
