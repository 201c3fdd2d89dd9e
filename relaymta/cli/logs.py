"""`relaymta logs`: the log as people read it, and the schema of its records."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import click

from relaymta.cli.console import record, say_json, say_json_lines
from relaymta.cli.log_source import source_of
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, group, loaded
from relaymta.cli.peer import as_json, due, given, given_address, given_domain, given_sender, number_of, size, when
from relaymta.control.filters import Filter
from relaymta.errors import NoSuch
from relaymta.log import EVENTS, schema
from relaymta.proto.maillog import Said, heard

__all__ = ["logs"]

T = TypeVar("T")
SHOWN, MOST = 10, 1_000_000  # events, by default and at most
_NOT_SHOWN = {"event", "ts", "worker", "until", "notice"}


@group
def logs() -> None:
    """Show the log: what has happened to mail, and why."""


def _event(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in EVENTS:
            fail(64, f"{NoSuch('event', name, EVENTS)}; docs/log.md has all of them")
    return names


def _ident(context: click.Context, parameter: click.Parameter, ident: str) -> str:
    if given(context, parameter, ident):
        number_of(ident)
    return ident.upper()


def _recipient(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return str(given_address(context, parameter, value)) if given(context, parameter, value) else ""


@logs.command()
@click.option("-f", "--follow", is_flag=True, help="Then go on with what is added, until Ctrl-C; also when the file is rotated.")
@click.option("-n", "--lines", type=click.IntRange(0, MOST), default=SHOWN, metavar="N", help=f"So many; default: {SHOWN}.")
@click.option(
    "--event", "events", multiple=True, callback=_event, metavar="EVENT", help="Only these, such as deferred. Repeatable."
)
@click.option("--id", "ident", default="", callback=_ident, metavar="ID", help="Only about this message.")
@click.option("--from", "sender", default="", callback=given_sender, metavar="ADDRESS", help="That name this sender; '<>': null.")
@click.option("--to", "recipient", default="", callback=_recipient, metavar="ADDRESS", help="That name this recipient.")
@click.option("--domain", default="", callback=given_domain, metavar="DOMAIN", help="That name a recipient in this domain.")
@click.option("--unit", default="", callback=given, metavar="UNIT", help="Read the journal of this unit of systemd.")
@as_json
@configured
def tail(
    read: Configuration, follow: bool, lines: int, events: tuple[str, ...], ident: str, sender: str, recipient: str, domain: str,
    unit: str, as_json: bool,
) -> None:  # fmt: skip
    """Show the end of the log: that of log.file, or of systemd's journal. Where the log goes elsewhere: of the history, which has
    the events of messages and users alone."""
    config = loaded(read, ANY_LISTENER)
    source, is_history = _tried(lambda: source_of(config, unit))
    if as_json and config.log.format != "json" and not is_history:
        fail(
            64, f'--json: log.format is "{config.log.format}" (`relaymta message history ID --json` has the records of a message)'
        )
    wanted = Wanted(frozenset(events), ident, Filter(sender=sender, recipient=recipient, recipient_domain=domain), as_json)
    time = _utc if follow else when
    for line in _tried(lambda: source.last(lines, wanted.time)):
        _show(line, as_json, time)
    if not follow:
        return
    try:
        looks = source.follow()
        while (added := _tried(lambda: next(looks, None))) is not None:
            for line in added:
                if wanted.time(line) is not None:
                    _show(line, as_json, time)
    except KeyboardInterrupt:
        return


@logs.command(name="schema")
@configured
def show_schema(read: Configuration) -> None:
    """Print the JSON schema of the records of the log, and of `message history --json`."""
    say_json(schema())


def _tried(read: Callable[[], T]) -> T:
    """What `read()` returns; ends the program (77, 74) where the log cannot be read."""
    try:
        return read()
    except PermissionError as error:
        fail(77, f"{error.filename}: {error.strerror}: run this as root, or as the user that the relay runs as")
    except OSError as error:
        fail(74, f"{error.filename or 'the log'}: {error.strerror or error}")


# Which


class Line(NamedTuple):
    """A line of the log: a record, or what a line in the form of Postfix says, or (neither) something else, such as a traceback
    that is in the journal, too."""

    record: dict[str, Any] | None
    said: Said | None


def _parsed(line: bytes) -> Line:
    if line.startswith(b"{"):
        try:
            found = json.loads(line)
        except ValueError:  # cut off
            return Line(None, None)
        if isinstance(found, dict) and isinstance(found.get("event"), str) and isinstance(found.get("ts"), (int, float)):
            return Line(found, None)
        return Line(None, None)
    return Line(None, heard(line.decode("utf-8", "replace")))


class Wanted(NamedTuple):
    """Which lines are shown. `chosen`: of it the addresses count. `records`: only records."""

    events: frozenset[str]
    ident: str
    chosen: Filter
    records: bool

    def time(self, line: bytes) -> float | None:
        """The time of a line that is wanted (0: it is not in a form that lines of several files have); None: it is not."""
        if not line or (self.ident and self.ident.encode() not in line):
            return None
        found, said = _parsed(line)
        if found is not None:
            to = found.get("recipients") or [found.get("recipient", "")]
            wanted = self._wants(found["event"], found.get("id", ""), found.get("sender"), to)
            return found["ts"] if wanted else None
        if self.records:
            return None
        if said is not None:
            sender = {"": None, "<>": ""}.get(said.sender, said.sender)
            return 0.0 if self._wants(said.event, said.ident, sender, said.recipients) else None
        return None if self.events or self.ident or self.chosen != Filter() else 0.0

    def _wants(self, event: str, ident: str, sender: str | None, recipients: list[str]) -> bool:
        chosen = self.chosen
        return (
            (not self.events or event in self.events)
            and (not self.ident or ident == self.ident)
            and (not chosen.sender or (sender is not None and chosen.is_from(sender)))
            and chosen.is_to([one for one in recipients if isinstance(one, str)])
        )


# How


def _utc(seconds: float) -> str:
    """A time that stays on the screen while others follow."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _show(line: bytes, as_json: bool, time: Callable[[float], str]) -> None:
    found, _ = _parsed(line)
    if as_json:
        say_json_lines(line + b"\n")
    elif found is None:
        record(line.decode("utf-8", "replace"))
    else:
        text = _TEXTS.get(found["event"], _fields)
        try:
            shown = text(found)
        except (KeyError, TypeError, IndexError):  # of another version
            shown = _fields(found)
        record(f"{time(found['ts']):>10}  {found['event']:<10}", shown)


def _fields(event: dict[str, Any]) -> str:
    parts = ((name, value) for name, value in event.items() if name not in _NOT_SHOWN and value not in ("", None, []))
    return " ".join(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in parts)


def _to(event: dict[str, Any]) -> str:
    everyone = event.get("recipients", [event.get("recipient", "")])
    if not everyone:
        return ""
    return f" to <{everyone[0]}>" + (f" +{len(everyone) - 1}" if len(everyone) > 1 else "")


def _taken(event: dict[str, Any]) -> str:
    user = f", logged in as {event['user']}" if event["user"] else ""
    client = f" from {event['client']} ({event['helo']}){user}" if event["client"] else ""
    held = f": held ({event['held']})" if event.get("held") else ""
    return f"{event['id']}  <{event['sender']}>{_to(event)}, {size(event['size'])}{client}{held}"


def _delivered(event: dict[str, Any]) -> str:
    return f"{event['id']} {_to(event)} by {event['peer']}: {event['reply']}"


def _failed(event: dict[str, Any]) -> str:
    peer = f" at {event['peer']}" if event["peer"] else ""
    then = f"; next attempt {due(event['next'])}" if "next" in event else ""
    late = " (expired)" if event.get("expired") else ""
    return f"{event['id']} {_to(event)}{peer}: {event['reply']}{late}{then}"


def _rejected(event: dict[str, Any]) -> str:
    where = f" at {event['phase']}" if event.get("phase") else ""
    return f"{event['client']} ({event['helo']}){where}, from <{event['sender']}>{_to(event)}: {event['reply']}"


_TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "queued": _taken,
    "received": _taken,
    "delivered": _delivered,
    "deferred": _failed,
    "bounced": _failed,
    "next_host": _failed,
    "rejected": _rejected,
    "login": lambda event: f"{event['user']} from {event['client']}: {event['reply']}",
    "warning": lambda event: event["text"],
}
