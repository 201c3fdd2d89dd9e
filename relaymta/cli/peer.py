"""What answers a verb: the running daemon, or the spool when it is stopped; and the format of values in answers."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from relaymta import control
from relaymta.cli.console import table
from relaymta.cli.options import ANY_LISTENER, Configuration, fail, loaded, missing, note_missing
from relaymta.control.requests import REQUESTS
from relaymta.errors import RelayError
from relaymta.ident import parse_id

if TYPE_CHECKING:
    from relaymta.config import Config

__all__ = [
    "Daemon", "Offline", "absent", "answered", "as_json", "asked", "connect", "given", "lasting", "number_of", "read_pieces",
    "size", "table", "when",
]  # fmt: skip

CONNECT_SECONDS = 10.0

T = TypeVar("T")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON value (or object a line) for programs.")


class Offline:
    """Answers the daemon's reading requests from the spool, while no daemon runs."""

    def __init__(self, config: "Config") -> None:
        from relaymta.cli import console
        from relaymta.queue import ages, offline  # noqa: F401

        console.import_all()  # before root is dropped: the spool's owner may not be able to read our files
        self._spool = Path(config.spool)
        self._answer = offline.answer

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to a reading request; RelayError for all others."""
        return self._answer(self._spool, op, **args)

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        """A function that answers the request, as `ask`."""
        return lambda: self.ask(op, **args)

    def pieces(self, op: str, **args: Any) -> Iterator[bytes]:
        """The pieces of an answer that comes in pieces."""
        return self.ask(op, **args)  # type: ignore[no-any-return]


class Daemon:
    """Sends requests to the running daemon."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to a request. RelayError with the daemon's error. Workers that are missing in it are noted (`missing`)."""
        return self.begin(op, **args)()

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        """Send a request now; the function returned waits for its answer, as `ask`."""
        asked = control.begin(self._path, op, **args)

        def result() -> Any:
            found = asked()
            note_missing(asked.missing, REQUESTS[op].changes)
            return found

        return result

    def pieces(self, op: str, **args: Any) -> Iterator[bytes]:
        """The pieces of an answer that comes in pieces."""
        asked = control.begin(self._path, op, **args)
        yield from asked.pieces()
        note_missing(asked.missing)


def connect(read: Configuration) -> Daemon | Offline:
    """The daemon of this configuration, or its spool when no daemon runs; ends the program when there is neither."""
    path = read.control_path()
    if path is not None and _answers(path):
        return Daemon(path)
    config = loaded(read, ANY_LISTENER)
    if _answers(config.control_path):
        return Daemon(config.control_path)
    if not Path(config.spool).is_dir():
        fail(69, f"no daemon answers at {config.control_path}, and there is no spool {config.spool}")
    return Offline(config)


def _answers(path: Path) -> bool:
    """Whether a daemon listens at a control socket; ends the program when that cannot be found out."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except OSError as error:
        fail(69, f"{path}: {error}")
    return True


def asked(peer: Daemon | Offline, op: str, **args: Any) -> Any:
    """The answer to a request; ends the program (69) with the error when there is none."""
    return answered(lambda: peer.ask(op, **args))


def answered(ask: Callable[[], T]) -> T:
    """The result of `ask()`, with errors as in `asked`."""
    try:
        return ask()
    except RelayError as error:
        fail(69, str(error))
    except OSError as error:
        fail(69, f"the daemon does not answer: {error}")


def read_pieces(peer: Daemon | Offline, op: str, **args: Any) -> Iterator[bytes]:
    """The pieces of an answer, with errors as in `asked`."""
    found = answered(lambda: peer.pieces(op, **args))
    while (piece := answered(lambda: next(found, None))) is not None:
        yield piece


def absent(text: str) -> NoReturn:
    """End the program since something was not found: with `text` (1), or (75) since a worker that may have it is missing."""
    if missing():
        sys.exit(75)  # `configured` names the workers
    fail(1, text)


def given(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """For options and arguments that select: refuse one that was given but is empty, such as a script's variable that is not set;
    without it more would be selected than is meant."""
    if value == "" and context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE:
        fail(64, f"{parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name}: it is empty")
    return value


def number_of(ident: str) -> int:
    """The number of a message's id; ends the program (64) if it is not an id."""
    try:
        return parse_id(ident)
    except ValueError as error:
        fail(64, str(error))


def when(seconds: float) -> str:
    """A time (seconds UTC; 0: "-") relative to now where it is near, else absolute."""
    if not seconds:
        return "-"
    ahead = seconds - time.time()
    if abs(ahead) < 1:
        return "now"
    if 0 < ahead < 7200:
        return f"in {int(ahead // 60)}m{int(ahead % 60):02d}s"
    if -7200 < ahead < 0:
        return f"{int(-ahead // 60)}m{int(-ahead % 60):02d}s ago"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def lasting(seconds: float) -> str:
    """A length of time, in its two largest units."""
    for above, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= above:
            return f"{seconds // above:.0f}{unit}{seconds % above // below:02.0f}{smaller}"
    return f"{seconds:.0f}s"


def size(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1000
    return f"{octets:.1f} TB"
