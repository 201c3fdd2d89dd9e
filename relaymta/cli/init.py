"""`relaymta init`: from nothing to the first delivered message."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import click

from relaymta.cli.options import Configuration, configured, fail, named_path, usual_path
from relaymta.cli.peer import as_json, seconds_of
from relaymta.cli.questions import asks, take
from relaymta.cli.setup import Setup

__all__ = ["init"]

_OPTIONS = (
    click.option("--smarthost", "smarthosts", multiple=True, metavar="HOST[:PORT]",
                 help="Send all mail there. Repeatable, for fallbacks. Without a port: 587 with a login, else 25."),
    click.option("--direct", is_flag=True, help="Deliver to the MX of each recipient's domain instead."),
    click.option("--username", metavar="NAME", help="User name at the smart host."),
    click.option("--password-file", metavar="FILE", help="The file that has the password there; it is used where it is."),
    click.option("--password-stdin", is_flag=True, help="Read the password there from standard input, and keep it in a file."),
    click.option("--tls", metavar="HOW", help="TLS to the smart host: verify (default), encrypt, may or off."),
    click.option("--ca-file", metavar="FILE", help="The CA of the smart host's certificate, where the system does not know it."),
    click.option("--domain", help="Domain of your mail: what is behind the @ of its senders."),
    click.option("--hostname", metavar="NAME", help="Full name of this host, for EHLO."),
    click.option("--network", "networks", multiple=True, metavar="NETWORK",
                 help="Clients that may relay beside this machine. Repeatable."),
    click.option("--listen", multiple=True, metavar="HOST:PORT", help="Accept mail on this address. Repeatable."),
    click.option("--user", metavar="NAME", help="Whom the relay runs as when root starts it (default: relaymta, if it exists)."),
    click.option("--dkim/--no-dkim", default=True, help="Sign mail of the domain, by a new key (default), or do not."),
    click.option("--selector", metavar="NAME", help="Selector of the key's DNS record."),
    click.option("--to", metavar="ADDRESS", help="Send a test message there."),
    click.option("--from", "sender", metavar="ADDRESS", help="Its sender."),
    click.option("--wait", "patience", default="60s", show_default=True, metavar="DURATION",
                 help="Time to wait for its delivery."),
    click.option("--no-connect", is_flag=True, help="Neither connect to the smart host nor send a test message."),
    click.option("--force", is_flag=True, help="Replace files that exist, but for a DKIM key, which is used as it is."),
    click.option("--dry-run", is_flag=True, help="Show the files, and write none."),
    click.option("--yes", is_flag=True, help="Ask nothing: take the defaults."),
)  # fmt: skip


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command()
@_with_options
@as_json
@configured
def init(
    read: Configuration, as_json: bool, patience: str, no_connect: bool, force: bool, dry_run: bool, yes: bool, **given: Any
) -> None:
    """Set up a relay: ask for what it needs, write its configuration, and send a test message.

    What an option says is not asked. Without a terminal, or with --yes, nothing is asked: what has no default must be given. The
    configuration is written to -c FILE, by default where all verbs look for it; --set KEY=VALUE sets a further key in it. Exit
    status 1 when the smart host cannot be used (then nothing is written), or the test message was not delivered.
    """
    with _ended_as_by_ctrl_c():
        _init(read, as_json, patience, no_connect, force, dry_run, yes, given)


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Signals that would end the program are KeyboardInterrupt, so that what was begun is cleared away."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _init(
    read: Configuration,
    as_json: bool,
    patience: str,
    no_connect: bool,
    force: bool,
    dry_run: bool,
    yes: bool,
    given: dict[str, Any],
) -> None:
    seconds, asking = seconds_of("--wait", patience, 1.0), asks() and not yes
    path = (named_path() or usual_path()).resolve()
    if os.path.lexists(path) and not force:
        fail(73, f"{path} exists already: --force replaces it, -c FILE writes another file")
    settings = read.overrides
    setup = Setup(take(given, settings.pop("spool", None), asking), path, settings, as_json)
    if dry_run:
        setup.show_files()
        return
    connects = not no_connect and setup.reach(asking)
    if asking and not click.confirm(f"Write {setup.named}?", default=True, err=True):
        raise click.Abort
    setup.write(force)
    setup.check()
    setup.show_records()
    delivered = not connects or setup.send(seconds)
    setup.end()
    if not delivered:
        raise SystemExit(1)
