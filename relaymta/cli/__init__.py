"""The command line: `relaymta VERB`. Every reading verb has --json."""

from importlib import import_module
from typing import Any

import click

from relaymta import __version__

__all__ = ["main"]

# Verb -> its module. Only that of the verb that is called is imported.
VERBS = {
    "serve": "serve", "sink": "sink", "config": "config", "status": "queue", "queue": "queue", "message": "message",
    "route": "route", "site": "site", "shaping": "site", "policy": "policy", "standing": "policy", "user": "account",
    "app": "account", "dkim": "dkim", "doctor": "doctor", "reload": "queue",
}  # fmt: skip


class Verbs(click.Group):
    """The verbs of VERBS."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment] # their names, for "Did you mean"

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in alphabetical order."""
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A verb's command; None when there is no such verb."""
        if cmd_name not in VERBS:
            return None
        found: click.Command = getattr(import_module(f"relaymta.cli.{VERBS[cmd_name]}"), cmd_name)
        return found


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="relaymta")
def main() -> None:
    """A relay MTA: accepts mail by SMTP, makes it safe on disk before it replies 250, and delivers it."""
