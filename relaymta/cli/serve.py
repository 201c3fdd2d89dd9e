"""`relaymta serve`: runs the relay; and the options by which every verb finds its configuration."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from relaymta.cli.console import say
from relaymta.config import Config, load, parse_value
from relaymta.errors import ConfigError, RelayError, SpoolBusy
from relaymta.route.table import RouteTable

__all__ = ["config_path", "configured", "serve"]

_FILE, _MISSING, _INCOMPLETE = "relaymta.config_path", "relaymta.missing", "relaymta.incomplete"
CONFIG_PATH = "/etc/relaymta/relaymta.toml"


def fail(status: int, text: str) -> NoReturn:
    """End the program with a message of one or several lines on standard error."""
    say(*text.split("\n"), err=True)
    sys.exit(status)


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config, --set and --spool to a verb, and pass it `read(extra)`, which loads the configuration that they mean
    (ConfigError)."""

    @click.option("-c", "--config", "path", type=click.Path(path_type=Path), envvar="RELAYMTA_CONFIG",
                  help=f"Configuration file (default: {CONFIG_PATH} where it exists).")  # fmt: skip
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key; overrides the file. Repeatable.")
    @click.option("--spool", metavar="DIR", help="Directory of the queue.")
    @functools.wraps(function)
    def wrapper(path: Path | None, settings: tuple[str, ...], spool: str | None, **others: Any) -> Any:
        overrides: dict[str, Any] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or not key:
                fail(78, f"--set {setting}: expected KEY=VALUE")
            overrides[key.strip()] = parse_value(value.strip())
        if spool is not None:
            overrides["spool"] = spool
        if path is None and Path(CONFIG_PATH).exists():
            path = Path(CONFIG_PATH)
        click.get_current_context().meta[_FILE] = path

        def read(extra: dict[str, Any] | None = None) -> Config:
            config = load(path, overrides | (extra or {}))
            try:
                RouteTable(config)  # reads the route map
            except ConfigError as error:
                raise ConfigError(config.located(error.problems)) from None
            return config

        try:
            result = function(read=read, **others)
        finally:
            _report_missing()
        if click.get_current_context().meta.get(_INCOMPLETE):
            sys.exit(75)
        return result

    return wrapper


def missing() -> set[int]:
    """The workers whose parts of this command's answers are not there."""
    found: set[int] = click.get_current_context().meta.setdefault(_MISSING, set())
    return found


def note_missing(workers: list[int], matters: bool = False) -> None:
    """Note workers whose part of an answer is not there. `matters`: the command then ends with status 75."""
    missing().update(workers)
    if workers and matters:
        incomplete()


def incomplete() -> None:
    """End the command with status 75 if a worker is missing in its answers: it changes something, and has not changed all."""
    if missing():
        click.get_current_context().meta[_INCOMPLETE] = True


def _report_missing() -> None:
    if numbers := sorted(missing()):
        one = len(numbers) == 1
        who = f"worker {numbers[0]} does" if one else f"workers {', '.join(map(str, numbers))} do"
        say(f"{who} not answer: what {'it has' if one else 'they have'} is missing here (`relaymta status`)", err=True)


def config_path() -> Path | None:
    """The configuration file of the current command; None when it has none."""
    found: Path | None = click.get_current_context().meta[_FILE]
    return found


def loaded(read: Callable[..., Config], extra: dict[str, Any] | None = None) -> Config:
    """The configuration; ends the program (78) with every problem when it is invalid."""
    try:
        return read(extra)
    except ConfigError as error:
        fail(78, str(error))


@click.command()
@click.option("--listen", multiple=True, metavar="HOST:PORT", help="Accept mail on this address. Repeatable.")
@click.option(
    "--smarthost",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Send all mail there. Repeatable, for fallbacks.",
)
@click.option("--workers", type=int, help="Worker processes; 0: one for each core.")
@configured
def serve(read: Callable[..., Config], listen: tuple[str, ...], smarthost: tuple[str, ...], workers: int | None) -> None:
    """Run the relay until SIGTERM or Ctrl-C, then drain; SIGHUP reloads the configuration.

    Without a file: relaymta serve --listen 127.0.0.1:2525 --smarthost mail.example.net:587 --spool DIR
    """
    from relaymta.supervisor import serve as run

    extra: dict[str, Any] = {}
    if listen:
        extra["listener"] = [{"address": address} for address in listen]
    if smarthost:
        extra["route"] = [{"name": "smarthost", "hosts": list(smarthost)}]
    if workers is not None:
        extra["workers"] = workers
    config = loaded(read, extra)
    try:
        status, failure = run(config, lambda: read(extra))
    except ConfigError as error:
        fail(78, str(error))
    except SpoolBusy as error:
        fail(75, str(error))
    except RelayError as error:
        fail(70, str(error))
    if failure:
        fail(status, failure)
