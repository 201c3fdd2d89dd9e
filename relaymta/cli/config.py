"""`relaymta config`: check, show and describe the configuration."""

import os
from collections.abc import Callable

import click

from relaymta.cli.console import say, say_json_lines
from relaymta.cli.serve import configured, fail, loaded
from relaymta.config import Config, describe, notes
from relaymta.errors import ConfigError
from relaymta.privileges import account, become

__all__ = ["config"]


@click.group()
def config() -> None:
    """Check, show or describe the configuration."""


@config.command()
@configured
def check(read: Callable[..., Config]) -> None:
    """Name every problem (exit status 78), or say that there is none."""
    from relaymta.accept import door
    from relaymta.route import shaping  # and what they need: other verbs start in half the time without

    config = loaded(read)
    _as_user(config)
    try:
        door.check(config)
    except ConfigError as error:
        fail(78, str(error))
    for sentence in [*notes(config), *shaping.check(config)]:
        say(f"note: {sentence}")
    say("the configuration is fine")


def _as_user(config: Config) -> None:
    """Read keys and accounts as the relay will."""
    if config.user and os.geteuid() == 0:
        try:
            become(account(config.user))
        except ConfigError as error:
            fail(78, str(error))


@config.command()
@configured
def show(read: Callable[..., Config]) -> None:
    """The effective configuration, defaults included, as JSON."""
    say_json_lines(loaded(read).model_dump_json(indent=2).encode() + b"\n")


@config.command(name="describe")
def describe_keys() -> None:
    """Every key with its sentence and default: the reference configuration file."""
    say(*describe().removesuffix("\n").split("\n"))
