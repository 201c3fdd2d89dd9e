"""`relaymta sieve`: the Sieve scripts of users whose mail is kept here."""

from pathlib import Path
from typing import Any

import click

from relaymta.cli.console import say, say_json, say_message, table
from relaymta.cli.options import Configuration, configured, fail, group
from relaymta.cli.peer import GivenPath, answered, as_json, asked, counted, daemon, given, read_file, size

__all__ = ["sieve"]

_file = click.argument("file", type=GivenPath(path_type=Path, dir_okay=False, allow_dash=True))


@group
def sieve() -> None:
    """Manage users' Sieve scripts, which sort mail as it is delivered."""


def _compiled(file: Path) -> bytes:
    """The text of a script that compiles; else ends the program (65)."""
    from relaymta.proto.sieve import SCRIPT_MOST, SieveError, compile  # here and below: the other verbs do not need it

    text = read_file(file, SCRIPT_MOST + 1)
    try:
        compile(text)
    except SieveError as error:
        fail(65, f"{file}:{error.line}:{error.column}: {error.what}")
    return text


def _change(read: Configuration, address: str, what: str, *args: Any) -> None:
    asked(daemon(read), "sieve_change", address=address, what=what, name=args[0], text=b"".join(args[1:]))


@sieve.command()
@_file
@configured
def check(read: Configuration, file: Path) -> None:
    """Compile a script ("-": standard input), and say what is wrong.

    The relay need not run."""
    _compiled(file)
    say(f"{file} is a valid script")


@sieve.command()
@click.argument("address", callback=given)
@_file
@click.option("--name", default="", callback=given, help="The script's name; default: that of the file, without .sieve.")
@click.option("--activate", is_flag=True, help="Run it from now on.")
@configured
def put(read: Configuration, address: str, file: Path, name: str, activate: bool) -> None:
    """Compile a script and keep it.

    FILE "-" is standard input. One of the same name is replaced."""
    name = name or file.name.removesuffix(".sieve")
    if name == "-":
        fail(64, "--name: a script from standard input needs a name")
    _change(read, address, "put_script", name, _compiled(file))
    if activate:
        _change(read, address, "activate_script", name)
    say(f"{address} has the script {name}" + (", which is active" if activate else ""))


@sieve.command()
@click.argument("address", callback=given)
@click.argument("name", default="", callback=given)
@configured
def get(read: Configuration, address: str, name: str) -> None:
    """Write a script, by default the active one, to standard output.

    The relay need not run."""
    say_message([_script(read, address, name)])


def _script(read: Configuration, address: str, name: str) -> bytes:
    from relaymta.cli.mail_files import mail_files
    from relaymta.store import scripts

    def find() -> bytes | None:
        user = files.directory.known(address)
        rows = files.shard(user.shard).rows
        with rows.reading() as txn:
            if name:
                return scripts.text(rows, txn, user.ident, name)
            active = scripts.active_text(rows, txn, user.ident)
            return active[1] if active is not None else None

    with mail_files(read) as files:
        found = answered(find)
    if found is None:
        fail(1, f"{address} has no script {name}" if name else f"{address} has no active script")
    return found


@sieve.command(name="list")
@click.argument("address", callback=given)
@as_json
@configured
def list_scripts(read: Configuration, address: str, as_json: bool) -> None:
    """List a user's scripts; the relay need not run."""
    from relaymta.cli.mail_files import mail_files
    from relaymta.store import scripts

    def find() -> list[scripts.Script]:
        user = files.directory.known(address)
        rows = files.shard(user.shard).rows
        with rows.reading() as txn:
            return scripts.scripts(rows, txn, user.ident)

    with mail_files(read) as files:
        found = answered(find)
    if as_json:
        for one in found:
            say_json({"script": one.name, "size": one.size, "active": one.active})
    elif found:
        table("", ["script", "size", "active"], [[one.name, size(one.size), "yes" if one.active else ""] for one in found])
    else:
        say(f"{address} has {counted(0, 'script', 'scripts')}", err=True)


@sieve.command()
@click.argument("address", callback=given)
@click.argument("name", default="")
@click.option("--none", is_flag=True, help="Run none.")
@configured
def activate(read: Configuration, address: str, name: str, none: bool) -> None:
    """Run a script for a user's mail from now on, in place of another."""
    if bool(name) == none:
        fail(64, "which script? `relaymta sieve activate ADDRESS NAME`, or --none")
    _change(read, address, "activate_script", name)
    say(f"{address} has no active script" if none else f"{name} is the active script of {address}")


@sieve.command()
@click.argument("address", callback=given)
@click.argument("name", callback=given)
@configured
def remove(read: Configuration, address: str, name: str) -> None:
    """Remove a script that is not active."""
    _change(read, address, "remove_script", name)
    say(f"{address} has no script {name} any more")
