"""`relaymta upgrade`: another program takes over from the running one, while every port stays open."""

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.options import Configuration, absolute, configured, files
from relaymta.cli.peer import as_json, asked, daemon, seconds_of

__all__ = ["upgrade"]

NOT_UPGRADED = 1
UNSEEN = {
    "unchanged": "not upgraded, nothing has changed: the new program is not ready",
    "gone back": "not upgraded: the new program could not take over, and the running one has gone back to its own workers",
}


@click.command()
@click.option(
    "--program", metavar="PATH", default="", shell_complete=files,
    help="The new program; default: the one that the relay was started with, as it is on disk now.",
)  # fmt: skip
@click.option("--timeout", default="2m", metavar="TIME", help="For each step of the new program; then the old one goes on.")
@as_json
@configured
def upgrade(read: Configuration, program: str, timeout: str, as_json: bool) -> None:
    """Have a new program take over, without a closed port: it gets the sockets of the running one, checks the configuration, and
    opens each shard when the old program has left it. Where it does not become ready, the old program goes on. Exit status 1
    then."""
    path = absolute(program) if program else ""
    found = asked(daemon(read), "upgrade", program=path, seconds=seconds_of("--timeout", timeout, 1.0))
    if as_json:
        say_json(found)
    elif found["result"] == "upgraded":
        say(f"upgraded from {found['from']} to {found['to']}, pid {found['pid']}, in {found['seconds']:.1f} s")
    if found["result"] != "upgraded":
        if not as_json:
            say(f"{UNSEEN[found['result']]}:", *found["why"].split("\n"), err=True)
        raise SystemExit(NOT_UPGRADED)
