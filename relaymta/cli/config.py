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
    """Check the configuration and report every problem (exit status 78). Warnings are printed as notes."""
    from relaymta.accept import endpoint
    from relaymta.route import shaping  # imported here: other verbs start in half the time

    config = loaded(read)
    _as_user(config)
    try:
        endpoint.check(config)
    except ConfigError as error:
        fail(78, str(error))
    for sentence in [*notes(config), *shaping.check(config)]:
        say(f"note: {sentence}")
    say("the configuration is valid")


def _as_user(config: Config) -> None:
    """Become the user that the relay runs as, to read keys and accounts with its rights."""
    if config.user and os.geteuid() == 0:
        try:
            become(account(config.user))
        except ConfigError as error:
            fail(78, str(error))


@config.command()
@configured
def show(read: Callable[..., Config]) -> None:
    """Show the effective configuration, with defaults, as JSON."""
    say_json_lines(loaded(read).model_dump_json(indent=2).encode() + b"\n")


@config.command(name="describe")
def describe_keys() -> None:
    """Write the reference configuration file: every key with its description and default."""
    say(*describe().removesuffix("\n").split("\n"))
