"""`relaymta config`: check, show and describe the configuration.

What takes long to import is imported where it is used: a shell asks for the options of these verbs.
"""

import os
from typing import TYPE_CHECKING

import click

from relaymta import control
from relaymta.cli.console import say, say_json, say_json_lines
from relaymta.cli.options import Configuration, config_path, configured, fail, group, loaded
from relaymta.cli.peer import as_json
from relaymta.errors import ConfigError, RelayError
from relaymta.toml import misnamed

if TYPE_CHECKING:
    from relaymta.config import Config

__all__ = ["config"]


@group
def config() -> None:
    """Check, show or describe the configuration."""


@config.command()
@click.option("--no-connect", is_flag=True, help="Do not ask the filters whether they answer.")
@configured
def check(read: Configuration, no_connect: bool) -> None:
    """Check the configuration, and the files, folders and addresses that it names, with the rights of the relay's user. Every
    problem is reported as `file:line: key: what` (exit status 78), probable mistakes as notes: so is a port on which a program
    listens now that is not the relay of this configuration, and a filter that does not answer. Whether another program uses the
    spool is not checked."""
    from relaymta.config import notes
    from relaymta.route import ourselves, shaping
    from relaymta.route.table import map_notes, unnamed
    from relaymta.supervisor import checks

    problems: list[str] = []
    config = loaded(read, found=problems)
    mapped = [*map_notes(config), *unnamed(config)] if not problems else []  # with our rights, as the rest of the configuration
    ours = _addresses_of_the_relay(config)
    busy = checks.busy_ports(config, ours) if ours is not None else []  # with our rights: root may try them all
    file = config_path()
    others = [] if file is None else [f"{path}: not read: its name does not end in .toml" for path in misnamed(file)]
    made_by_root = _as_user(config)
    remarks = [*others, *notes(config), *mapped, *shaping.check(config), *ourselves.check(config)]
    remarks += [*checks.missing_variables(config), *checks.absent_places(config), *checks.exposed_secrets(config)]
    remarks += [*checks.changeable_files(config), *checks.fleeting_spool(config), *busy]
    problems += [*checks.ephemeral_spool(config), *checks.unreadable_secrets(config)]
    if made_by_root is None:
        remarks.append(f"run this as root or {config.user} to check the spool, the log and the addresses, too")
    else:
        problems += checks.unusable_places(config, made_by_root)
        remarks += checks.unreadable_files(config)
    try:
        checks.check_files(config)
    except ConfigError as error:
        problems += error.problems
    try:
        checks.check_program(config)
    except ConfigError as error:  # a note: `relaymta serve` may be that of another installation
        remarks += error.problems
    remarks += checks.broken_lists(config)
    if problems:
        fail(78, "\n".join(dict.fromkeys(problems)))
    remarks += checks.closed_socket(config)
    if config.local_domains and made_by_root is not None:
        from relaymta.cli import mail_files

        remarks += mail_files.missing_addresses(config)
    if config.filter and not no_connect:
        from relaymta.cli.filter import silent

        remarks += config.located(silent(config))
    for sentence in remarks:
        say(f"note: {sentence}")
    say("the configuration is valid")


def _addresses_of_the_relay(config: "Config") -> set[str] | None:
    """Where a running relay with this control socket listens; nothing when none runs. None: one may run, and does not tell."""
    try:
        found = control.ask(config.control_path, "status")
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return set()
    except (RelayError, OSError):
        return None
    return {*found["listeners"], found["metrics"]}


def _as_user(config: "Config") -> set[str] | None:
    """Become the user that the relay runs as, to look at files with its rights: `checks.made_by_root`. None: this is another
    user, and not root."""
    from relaymta.privileges import account, become
    from relaymta.supervisor.checks import import_all, made_by_root

    import_all(config)
    try:
        made = made_by_root(config)
        if config.user and os.geteuid() == 0:
            become(account(config.user))
        elif config.user and account(config.user).pw_uid != os.geteuid():
            return None
    except ConfigError as error:
        fail(78, "\n".join(config.located(error.problems)))
    return made


@config.command()
@click.option("--origin", is_flag=True, help="Show each key that was given, and where: FILE:LINE, or the command line.")
@as_json
@configured
def show(read: Configuration, origin: bool, as_json: bool) -> None:
    """Show the effective configuration, with defaults, as JSON: indented, or (--json) in one line."""
    from pydantic_core import to_jsonable_python

    from relaymta.config import as_toml, given

    config = loaded(read)
    if not origin:
        say_json_lines(config.model_dump_json(indent=None if as_json else 2).encode() + b"\n")
        return
    for key, value, lines in given(config):
        if as_json:
            places = [{"file": file, "line": line} for file, line in lines]
            say_json({"key": key, "value": to_jsonable_python(value), "places": places})
            continue
        where, *also = (f"{file}:{line}" for file, line in lines) if lines else ("command line",)
        say(f"{where}: {key} = {as_toml(value)}" + (f"  # also in {', '.join(also)}" if also else ""))


@config.command(name="describe")
@configured
def describe_keys(read: Configuration) -> None:
    """Write the reference configuration file: every key with its description and default."""
    from relaymta.config import describe

    say(*describe().removesuffix("\n").split("\n"))
