"""The command line: `relaymta VERB`. Options, output and exit statuses are the same for all verbs: docs/cli.md."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from relaymta import __version__
from relaymta.cli.console import OutputFailed, check_streams, give_up
from relaymta.cli.options import for_all_verbs, note_given

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["COMPLETE", "main"]

USAGE, UNWRITTEN = 64, 74  # EX_USAGE, EX_IOERR of sysexits.h
COMPLETE = "_RELAYMTA_COMPLETE"  # by which a shell asks for completions
BROKEN_PIPE, TERMINATED = 141, 143  # as a shell has it for a program that SIGPIPE, SIGTERM has ended


class Verb(NamedTuple):
    """A verb: its module, and its line in `relaymta --help`, with which its own help begins. Hidden without a line. `command`:
    its name in the module, "": as the verb."""

    module: str
    line: str = ""
    command: str = ""


# Only the module of the verb that is called is imported, and none for `relaymta --help`.
VERBS = {
    "abuse": Verb("abuse", "Accounts whose mail is not like their own any more."),
    "app": Verb("account", "Manage applications that log in with a key to send mail."),
    "assets": Verb("assets", "Write the units, the reference configuration and the dashboard to a folder."),
    "bench": Verb("bench", "Measure a relay: a load, a faulty sink, and a ledger of what was lost."),
    "completion": Verb("completion", "Print the script by which a shell completes verbs and options."),
    "config": Verb("config", "Check, show or describe the configuration."),
    "dkim": Verb("dkim", "Create, check and rotate DKIM keys."),
    "doctor": Verb("doctor", "Check what runs here; with a subject, what other servers see of this one."),
    "filter": Verb("filter", "What judges mail: its state, and what it says about a message."),
    "fsck": Verb("fsck", "Check the queue: every message's rows, schedule, recipients and data."),
    "import": Verb("import_postfix", "Read the configuration of another mail server.", "import_"),
    "init": Verb("init", "Set up a relay: ask for what it needs, write its configuration, and send a test message."),
    "logs": Verb("logs", "Show the log: what has happened to mail, and why."),
    "mailbox": Verb("mailbox", "Manage users whose mail is kept here."),
    "manual": Verb("manual", "Write the manual pages of all verbs and of the configuration."),
    "message": Verb("message", "Find messages, and inspect one."),
    "policy": Verb("policy", "Hold or bounce mail for a time, both queued and new mail."),
    "quarantine": Verb("quarantine", "Mail that filters, rules about mail or DMARC hold."),
    "queue": Verb("queue", "List the messages in the queue, and change them."),
    "reload": Verb("queue", "Make the daemon read its configuration again."),
    "route": Verb("route", "Test the routes."),
    "rule": Verb("rule", "Rules about mail: what they match, and what they would do."),
    "serve": Verb("serve", "Run the relay until SIGTERM or Ctrl-C."),
    "shaping": Verb("site", "Show and clear decisions about sites."),
    "sieve": Verb("sieve", "Manage users' Sieve scripts, which sort mail as it is delivered."),
    "sink": Verb("sink", "Run a smart host for tests."),
    "site": Verb("site", "The sites that mail is sent to."),
    "standing": Verb("policy"),
    "status": Verb("queue", "Show the state of the daemon and its workers."),
    "suppression": Verb("suppression", "Recipients to whom no mail is to be sent any more."),
    "token": Verb("token", "Manage tokens of the HTTP API."),
    "top": Verb("top", "Watch the relay: rates, the queue, workers and sites, as they are now."),
    "trace": Verb("trace", "Show SMTP dialogues as they happen."),
    "upgrade": Verb("upgrade", "Have a new program take over, without a closed port."),
    "user": Verb("account", "Manage people who log in to send mail."),
    "webhook": Verb("webhook", "Who is told of what becomes of mail: state, replays, tests."),
    "view": Verb("view", "Show and end the sessions of users who read mail that is kept here."),
}


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
        verb = VERBS[cmd_name]
        found: click.Command = getattr(import_module(f"relaymta.cli.{verb.module}"), verb.command or cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the lines of VERBS."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, VERBS[name].line) for name in self.list_commands(ctx) if VERBS[name].line])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """The verbs and options that begin so, without an import of any verb."""
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=VERBS[name].line) for name in self.list_commands(ctx) if VERBS[name].line]
        return [one for one in verbs if one.value.startswith(incomplete)] + click.Command.shell_complete(self, ctx, incomplete)

    def main(self, *args: Any, **extra: Any) -> Any:
        """As click's; help that cannot be written ends with UNWRITTEN, too."""
        _end_on_sigterm()
        if COMPLETE in os.environ:
            import_module("relaymta.cli.completion")  # has a class for bash
        try:
            check_streams()
            return super().main(*args, **extra)
        except OutputFailed as error:
            sys.exit(UNWRITTEN if give_up(error) else BROKEN_PIPE)
        except OSError as error:
            if not _by_echo(error):
                raise
            failed = OutputFailed()
            failed.__cause__ = error
            sys.exit(UNWRITTEN if give_up(failed) else BROKEN_PIPE)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As click's; a wrong option or argument has the exit status USAGE."""
        with _sysexits():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's; a wrong option or argument has the exit status USAGE, output that cannot be written UNWRITTEN, one that
        nobody reads any more BROKEN_PIPE."""
        try:
            with _sysexits():
                return super().invoke(ctx)
        except OutputFailed as error:
            sys.exit(UNWRITTEN if give_up(error) else BROKEN_PIPE)


def _end_on_sigterm() -> None:
    """As process 1, of a container, end on SIGTERM until somebody else handles it: the kernel ends that one by no signal."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


def _by_echo(error: OSError) -> bool:
    """Whether click could not write something of its own: help or version."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("click.")


@contextmanager
def _sysexits() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        error.exit_code = USAGE  # type: ignore[misc]
        raise


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@for_all_verbs
@click.version_option(__version__, "--version", "-V", prog_name="relaymta")
def main(path: Path | None, settings: tuple[str, ...], spool: str | None) -> None:
    """A relay MTA: accepts mail by SMTP, makes it safe on disk before it replies 250, and delivers it."""
    note_given(path, settings, spool)
