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

_FILE = "relaymta.config_path"
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
            RouteTable(config)  # ConfigError when its route map cannot be read or names an unknown route
            return config

        return function(read=read, **others)

    return wrapper


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
