"""`relaymta trace`: the SMTP dialogues with clients and with other hosts, as they happen."""

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.options import Configuration, configured, fail, group
from relaymta.cli.peer import as_json, daemon, given, given_address, given_sender, read_pieces, seconds_of

__all__ = ["trace"]

_MARKS = {"heard": "<", "said": ">", "event": "*", "closed": "*", "dropped": "!", "note": "!"}
_CONTINUED = re.compile(r"\d{3}-")  # a line of a reply, but for the last one


@group
def trace() -> None:
    """Show SMTP dialogues as they happen, without secrets and message data."""


def _recipient(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return str(given_address(context, parameter, value)) if given(context, parameter, value) else ""


def _networks(clients: tuple[str, ...]) -> list[str]:
    """The networks that are meant; a name stands for its addresses."""
    found: list[str] = []
    for value in clients:
        try:
            found.append(str(ipaddress.ip_network(value, strict=False)))
        except ValueError:
            try:
                found += {str(row[4][0]) for row in socket.getaddrinfo(value, None, type=socket.SOCK_STREAM)} if value else ()
            except (OSError, UnicodeError):
                fail(64, f"--client {value}: neither a network or an address, nor a host that has one")
    if clients and not found:
        fail(64, "--client: it is empty")
    return found


def _duration(context: click.Context, parameter: click.Parameter, value: str) -> float:
    return seconds_of("--for", value, least=0.001) if given(context, parameter, value) else 0.0


def _ways(function: Callable[..., None]) -> Callable[..., None]:
    """The options of both directions."""
    for option in reversed((
        click.option("--app", "application", default="", callback=given, metavar="NAME", help="Only of this application's mail."),
        click.option("--from", "sender", default="", callback=given_sender, metavar="ADDRESS",
                     help="Only with a message of this sender; '<>': the null sender."),
        click.option("--to", "recipient", default="", callback=_recipient, metavar="ADDRESS",
                     help="Only with a message to this recipient."),
        click.option("--only-one", is_flag=True, help="Follow the first connection that matches, to its end."),
        click.option("--terse", is_flag=True, help="Of a reply only the last line."),
        click.option("--count", type=click.IntRange(1), default=None, metavar="N", help="End after so many lines."),
        click.option("--for", "seconds", default="", callback=_duration, metavar="DURATION", help="End after so long, as 30s."),
    )):  # fmt: skip
        function = option(function)
    return function


@trace.command(name="in")
@click.option("--client", "clients", multiple=True, metavar="NETWORK|HOST", help="Only these. Repeatable.")
@click.option("--listener", default="", callback=given, metavar="ADDRESS|PORT", help="Only on this listener.")
@_ways
@as_json
@configured
def trace_in(
    read: Configuration, clients: tuple[str, ...], as_json: bool, only_one: bool, terse: bool, count: int | None, seconds: float,
    **wanted: Any,
) -> None:  # fmt: skip
    """Show the dialogues with clients (SMTP and LMTP), until Ctrl-C.

    With --app, --from or --to, a connection is shown from its beginning once it has matched, to its end."""
    _follow(
        read, Shown(as_json, only_one, terse, count, seconds), side="in", clients=_networks(clients), only_one=only_one, **wanted
    )


@trace.command(name="out")
@click.option("--site", default="", callback=given, metavar="SITE", help="Only this site, by its name, route or a host of it.")
@click.option("--host", default="", callback=given, metavar="HOST", help="Only this host, by its name or address.")
@_ways
@as_json
@configured
def trace_out(
    read: Configuration, as_json: bool, only_one: bool, terse: bool, count: int | None, seconds: float, **wanted: Any
) -> None:
    """Show the dialogues with the hosts that mail is sent to, until Ctrl-C.

    With --app, --from or --to, a connection is shown once it carries such a message, with what was said before, to its end."""
    _follow(read, Shown(as_json, only_one, terse, count, seconds), side="out", only_one=only_one, **wanted)


def _follow(read: Configuration, shown: "Shown", **wanted: Any) -> None:
    try:
        for piece in read_pieces(daemon(read), "trace", **wanted):
            if not all(shown.line(*line) for line in piece) or shown.over:
                return
    except KeyboardInterrupt:
        return


class Shown:
    """What was shown, and what ends it."""

    def __init__(self, as_json: bool, only_one: bool, terse: bool, count: int | None, seconds: float) -> None:
        self._as_json = as_json
        self._only_one = only_one
        self._terse = terse
        self._left = count
        self._until = time.monotonic() + seconds if seconds else 0.0
        self._only = ""  # the connection that is followed

    @property
    def over(self) -> bool:
        """Whether the time has passed."""
        return bool(self._until) and time.monotonic() >= self._until

    def line(self, when: float, connection: str, kind: str, text: str) -> bool:
        """Show a line of the trace; False: it was the last."""
        if kind == "begun":
            say(f"tracing {text} (Ctrl-C ends it)", err=True)
            return True
        if self._only_one and connection:
            self._only = self._only or connection
            if connection != self._only:
                return True
        if self._terse and kind in ("heard", "said") and _CONTINUED.match(text):
            return True
        self._show(when, connection, kind, text)
        if self._left is not None:
            self._left -= 1
        ended = kind == "closed" or (kind == "note" and self._only.startswith(f"{_worker(text)}-"))
        return self._left != 0 and not (self._only_one and self._only and ended)

    def _show(self, when: float, connection: str, kind: str, text: str) -> None:
        if self._as_json:
            worker = connection.partition("-")[0]
            say_json({
                "time": when, "worker": int(worker) if worker else None, "connection": connection, "kind": kind, "text": text,
            })  # fmt: skip
            return
        time_of_day = datetime.fromtimestamp(when, UTC).strftime("%H:%M:%S.%f")[:-3]
        say(f"{time_of_day}Z {connection or '-'} {_MARKS.get(kind, '*')} {text}")


def _worker(note: str) -> str:
    """The worker that a note is about."""
    words = note.split()
    return words[1] if words[:1] == ["worker"] and len(words) > 1 else ""
