"""What answers a verb: the running daemon, or the spool when it is stopped; and the format of values in answers."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Union

import click
from click.core import ParameterSource

from relaymta import control
from relaymta.cli.options import ANY_LISTENER, Configuration, absolute, fail, loaded, missing, note_missing
from relaymta.control.requests import REQUESTS
from relaymta.duration import parse_duration
from relaymta.errors import NoSuch, RelayError, SpoolBusy
from relaymta.ident import parse_id

if TYPE_CHECKING:
    from relaymta.cli.stopped import Stopped
    from relaymta.config import Config

    Peer = Union["Daemon", "Offline", Stopped]  # noqa: UP007 # names that are not known yet

__all__ = [
    "Daemon", "GivenPath", "Offline", "absent", "answered", "as_json", "asked", "connect", "counted", "daemon", "due", "given",
    "given_address", "given_domain", "given_sender", "lasting", "no_such", "number_of", "process_of", "read_file", "read_pieces",
    "routes", "seconds_of", "size", "spool_of", "until", "unused_spool", "when",
]  # fmt: skip

CONNECT_SECONDS = 10.0

T = TypeVar("T")
as_json = click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object a line (docs/cli.md).")


class Offline:
    """Answers the daemon's reading requests from the spool, while no daemon runs."""

    def __init__(self, config: "Config") -> None:
        # All of it before root is dropped: the spool's owner may not be able to read our files.
        import difflib  # noqa: F401

        from relaymta.queue import ages, offline  # noqa: F401
        from relaymta.route.table import RouteTable

        self.routes = RouteTable(config).labels
        self.spool = Path(config.spool).absolute()
        self._answer = offline.answer

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to a reading request; RelayError for all others."""
        return self._answer(self.spool, op, **args)

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
    if not os.path.isdir(config.spool):
        where = f"no daemon answers at {absolute(config.control_path)}, and there is no spool {absolute(config.spool)}"
        fail(69, f"{where}: start it (`relaymta serve`), or name its configuration (-c FILE) or spool (--spool DIR)")
    try:
        names = os.listdir(config.spool)
    except PermissionError as error:
        _forbidden(error, config.spool)
    if not {"secret", "mail"}.intersection(names) and not any(name.startswith("shard-") for name in names):
        fail(69, f"{absolute(config.spool)} is no spool of relaymta, and no daemon answers at {absolute(config.control_path)}")
    return Offline(config)


def daemon(read: Configuration) -> Daemon:
    """The running daemon of this configuration; ends the program when there is none."""
    peer = connect(read)
    if isinstance(peer, Offline):
        fail(69, "this needs the running daemon (start it with `relaymta serve`)")
    return peer


def running(read: Configuration) -> Daemon | None:
    """The daemon of this configuration, if it runs and we may ask it."""
    path = read.control_path() or loaded(read, ANY_LISTENER).control_path
    try:
        _reach(path)
    except OSError:
        return None
    return Daemon(path)


def spool_of(read: Configuration) -> tuple[Daemon | None, Path]:
    """The daemon of this configuration, if it runs, and its spool; ends the program when there is neither."""
    peer = connect(read)
    return (None, peer.spool) if isinstance(peer, Offline) else (peer, Path(asked(peer, "status")["spool"]))


def unused_spool(read: Configuration) -> Path:
    """The spool of this configuration, which need not be there; ends the program (75) while its daemon runs."""
    config = loaded(read, ANY_LISTENER)
    if _answers(config.control_path):
        fail(75, "the relay is running: stop it first")
    return Path(config.spool).absolute()


def _reach(path: Path) -> None:
    """Connect to a control socket, and leave it. OSError: there is none, it is not ours to ask, or nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CONNECT_SECONDS)
        sock.connect(str(path))


def process_of(path: Path) -> int:
    """The id of the process that listens at a control socket; 0: none does, or it is not ours to ask."""
    from relaymta.privileges import peer_of

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(str(path))
            return peer_of(sock).pid
    except OSError:
        return 0


def _answers(path: Path) -> bool:
    """Whether a daemon listens at a control socket; ends the program when that cannot be found out."""
    try:
        _reach(path)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        _forbidden(error, path)
    except OSError as error:
        fail(69, f"{absolute(path)}: {error.strerror or error}")
    return True


def _forbidden(error: PermissionError, path: str | Path) -> NoReturn:
    fail(77, f"{absolute(path)}: {error.strerror}: run this as root, or as the user that the relay runs as")


def asked(peer: "Peer", op: str, **args: Any) -> Any:
    """The answer to a request; ends the program with the error when there is none: 1 when what it is about does not exist, 69
    when the daemon does not answer or refuses, 75 when a process has the spool, 77 when we may not read it."""
    return answered(lambda: peer.ask(op, **args))


def answered(ask: Callable[[], T]) -> T:
    """The result of `ask()`, with errors as in `asked`."""
    try:
        return ask()
    except RelayError as error:
        fail(1 if error.absent else 75 if isinstance(error, SpoolBusy) else 69, str(error))
    except PermissionError as error:
        _forbidden(error, error.filename or "the spool")
    except OSError as error:
        fail(69, f"the daemon does not answer: {error}")


def routes(peer: "Peer") -> list[str]:
    """The names of all routes."""
    return asked(peer, "routes") if isinstance(peer, Daemon) else peer.routes


def read_pieces(peer: Daemon | Offline, op: str, **args: Any) -> Iterator[Any]:
    """The pieces of an answer, with errors as in `asked`."""
    found = answered(lambda: peer.pieces(op, **args))
    while (piece := answered(lambda: next(found, None))) is not None:
        yield piece


def absent(text: str) -> NoReturn:
    """End the program since something does not exist: with `text` (1), or (75) since a worker that may have it is missing."""
    if missing():
        sys.exit(75)  # `configured` names the workers
    fail(1, text)


def no_such(kind: str, name: str, known: Iterable[str] = (), hint: str = "") -> str:
    """The sentence that something does not exist. `known`: the names among which one may be meant; `hint`: how to find out
    more."""
    return f"{NoSuch(kind, name, known)}{hint and f' ({hint})'}"


def given(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """For options and arguments that select: refuse one that was given but is empty, such as a script's variable that is not set;
    without it more would be selected than is meant."""
    if value == "" and context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE:
        fail(64, f"{parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name}: it is empty")
    return value


def given_address(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """As `given`: one or several arguments that are addresses with a domain."""
    from relaymta.proto.address import plain

    for one in value if isinstance(value, tuple) else (value,):
        if "@" not in one or plain(one) is None:
            fail(64, f"{given(context, parameter, one)!r} is not an address")
    return value


class GivenPath(click.Path):
    """As click.Path, but "" is wrong usage, not the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. click.BadParameter."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


def given_sender(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """As `given`: an address, as it is or in angle brackets, or <> for the null sender."""
    from relaymta.proto.address import plain

    value = given(context, parameter, value)
    if value in ("", "<>"):
        return value
    address = plain(value[1:-1] if value.startswith("<") and value.endswith(">") else value)
    if address is None:
        fail(64, f"{parameter.opts[0]} {value}: neither an address nor <> (the null sender)")
    return address


def read_file(file: Path, most: int) -> bytes:
    """The first `most` octets of a file that was given ("-": standard input); ends the program (77, 74) when there are none to
    read."""
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(most)
        with file.open("rb") as opened:
            return opened.read(most)
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 74, f"{file}: {error.strerror}")


def given_domain(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """As `given`: a domain, without @."""
    value = given(context, parameter, value)
    if "@" in value:
        fail(64, f"{parameter.opts[0]} {value}: a domain has no @ in it")
    return value


def number_of(ident: str) -> int:
    """The number of a message's id; ends the program (64) if it is not an id."""
    try:
        return parse_id(ident)
    except ValueError as error:
        fail(64, "for every message there is --all" if ident == "ALL" else str(error))  # ALL: Postfix's


def seconds_of(option: str, duration: str, least: float = 0.0) -> float:
    """The seconds of an option that is a duration; ends the program (64) if it is malformed, or shorter than `least`."""
    try:
        seconds = parse_duration(duration)
    except ValueError as error:
        fail(64, f"{option} {duration}: expected {error}")
    if seconds < least:
        fail(64, f"{option} {duration}: expected a longer time")
    return seconds


def counted(number: int, one: str, several: str) -> str:
    """A number and what it counts, in the singular for 1."""
    return f"{number} {one if number == 1 else several}"


def when(seconds: float) -> str:
    """A time (seconds UTC; 0: "-") relative to now where it is near, else absolute."""
    if not seconds:
        return "-"
    ahead = seconds - time.time()
    if abs(ahead) < 1:
        return "now"
    if abs(ahead) < 7200:
        minutes, rest = divmod(int(abs(ahead)), 60)
        text = f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
        return f"in {text}" if ahead > 0 else f"{text} ago"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def lasting(seconds: float) -> str:
    """A length of time, in its two largest units."""
    for above, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= above:
            return f"{seconds // above:.0f}{unit}{seconds % above // below:02.0f}{smaller}"
    return f"{seconds:.0f}s"


def until(seconds: float) -> str:
    """An end (seconds UTC) in a sentence: "until 09:30:00Z (in 12m05s)" where it is near."""
    text = when(seconds)
    if not text.startswith("in "):
        return f"until {text}"
    return f"until {datetime.fromtimestamp(seconds, UTC):%H:%M:%SZ} ({text})"


def due(seconds: float) -> str:
    """The time of a next attempt: as `when`, and "now" where it has passed, since what is due need not be tried at once."""
    return "now" if 0 < seconds < time.time() else when(seconds)


def size(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1000
    return f"{octets:.1f} TB"
