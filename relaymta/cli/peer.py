"""What answers a verb: the running daemon, or the spool when it is stopped; and the format of values in answers."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from relaymta import control
from relaymta.cli.console import table
from relaymta.cli.serve import fail
from relaymta.config import Config
from relaymta.errors import ConfigError, RelayError

__all__ = ["Daemon", "Offline", "answered", "as_json", "asked", "connect", "number_of", "size", "table", "when"]

T = TypeVar("T")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON value (or object a line) for programs.")


class Offline:
    """Answers the daemon's reading requests from the spool, while no daemon runs."""

    def __init__(self, config: Config) -> None:
        self._spool = Path(config.spool)

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to a reading request; RelayError for all others."""
        from relaymta.queue.offline import answer

        if op not in ("summary", "shape", "shards", "page", "message", "raw", "history"):
            raise RelayError("the daemon is not running (start it with `relaymta serve`)")
        return answer(self._spool, op, **args)

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        """A function that answers the request, as `ask`."""
        return lambda: self.ask(op, **args)


class Daemon:
    """Sends requests to the running daemon."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to a request. RelayError with the daemon's error."""
        return self.begin(op, **args)()

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        """Send a request now; the function returned waits for its answer, as `ask`."""
        finish = control.begin(self._path, op, **args)

        def result() -> Any:
            try:
                return finish()
            except control.Refused as error:
                raise RelayError(str(error)) from None

        return result


def connect(read: Callable[..., Config]) -> Daemon | Offline:
    """The daemon of this configuration, or its spool when no daemon runs; ends the program when there is neither."""
    try:
        config = read({"listener": [{"address": "127.0.0.1:2525"}]})
    except ConfigError as error:
        fail(78, str(error))
    try:
        control.ask(config.control_path, "status")
    except (FileNotFoundError, ConnectionRefusedError):
        if not Path(config.spool).is_dir():
            fail(69, f"no daemon answers at {config.control_path}, and there is no spool {config.spool}")
        return Offline(config)
    except (OSError, control.Refused) as error:
        fail(69, f"{config.control_path}: {error}")
    return Daemon(config.control_path)


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


def number_of(ident: str) -> int:
    """The number of a message's id; ends the program (64) if it is not an id."""
    from relaymta.queue.ident import parse_id

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


def size(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1000
    return f"{octets:.1f} TB"
