"""`relaymta config`: check, show and describe the configuration."""

from collections.abc import Callable

import click

from relaymta.cli.serve import configured, loaded
from relaymta.config import Config, describe

__all__ = ["config"]


@click.group()
def config() -> None:
    """Check, show or describe the configuration."""


@config.command()
@configured
def check(read: Callable[..., Config]) -> None:
    """Name every problem (exit status 78), or say that there is none."""
    from relaymta.route import shaping  # and what it needs: other verbs start in half the time without

    for sentence in shaping.check(loaded(read)):
        click.echo(f"note: {sentence}")
    click.echo("the configuration is fine")


@config.command()
@configured
def show(read: Callable[..., Config]) -> None:
    """The effective configuration, defaults included, as JSON."""
    click.echo(loaded(read).model_dump_json(indent=2))


@config.command(name="describe")
def describe_keys() -> None:
    """Every key with its sentence and default: the reference configuration file."""
    click.echo(describe(), nl=False)
