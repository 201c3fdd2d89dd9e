"""`relaymta serve`: runs the relay."""

from typing import Any

import click

from relaymta.cli.options import Configuration, configured, fail, loaded
from relaymta.errors import ConfigError, RelayError, SpoolBusy

__all__ = ["serve"]


@click.command()
@click.option("--listen", multiple=True, metavar="HOST:PORT", help="Accept mail on this address. Repeatable.")
@click.option(
    "--smarthost",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Send all mail there. Repeatable, for fallbacks.",
)
@click.option("--workers", type=int, help="Worker processes; 0: one for each core.")
@click.option("--ephemeral", is_flag=True, help="Start even if the spool, and the mail in it, ends with this container.")
@configured
def serve(read: Configuration, listen: tuple[str, ...], smarthost: tuple[str, ...], workers: int | None, ephemeral: bool) -> None:
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
    if ephemeral:
        extra["ephemeral"] = True
    config = loaded(read, extra)
    try:
        status, failure = run(config, lambda: read(extra))
    except ConfigError as error:
        fail(78, "\n".join(config.located(error.problems)))
    except SpoolBusy as error:
        fail(75, str(error))
    except RelayError as error:
        fail(70, str(error))
    if failure:
        fail(status, failure)
