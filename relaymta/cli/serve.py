"""`relaymta serve`: run the relay; and how every verb finds its configuration."""

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
    """End with a sentence, or several lines of them, on standard error."""
    say(*text.split("\n"), err=True)
    sys.exit(status)


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb --config, --set and --spool, and the function that loads what they say."""

    @click.option("-c", "--config", "path", type=click.Path(path_type=Path), envvar="RELAYMTA_CONFIG",
                  help=f"Configuration file (default: {CONFIG_PATH} where it exists).")  # fmt: skip
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key; wins over the file. Repeatable.")
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
            RouteTable(config)  # its route map can be read, and names routes that exist
            return config

        return function(read=read, **others)

    return wrapper


def config_path() -> Path | None:
    """The configuration file of the command under way; None when it has none."""
    found: Path | None = click.get_current_context().meta[_FILE]
    return found


def loaded(read: Callable[..., Config], extra: dict[str, Any] | None = None) -> Config:
    """The configuration, or the end of the program with every problem (exit status 78)."""
    try:
        return read(extra)
    except ConfigError as error:
        fail(78, str(error))


@click.command()
@click.option("--listen", multiple=True, metavar="HOST:PORT", help="Take mail here. Repeatable.")
@click.option("--smarthost", multiple=True, metavar="HOST[:PORT]", help="Send everything there; the next one when it is down.")
@click.option("--workers", type=int, help="Worker processes; 0: one for each core.")
@configured
def serve(read: Callable[..., Config], listen: tuple[str, ...], smarthost: tuple[str, ...], workers: int | None) -> None:
    """Run the relay until SIGTERM (drains) or Ctrl-C; SIGHUP reloads the configuration.

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
