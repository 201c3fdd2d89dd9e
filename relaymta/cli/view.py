"""`relaymta view`: the sessions of users who have logged in by IMAP, POP3 or ManageSieve."""

from typing import Any

import click

from relaymta.cli.console import say, say_json, table
from relaymta.cli.options import Configuration, configured, group
from relaymta.cli.peer import Daemon, as_json, asked, counted, daemon, given, read_pieces, when

__all__ = ["view"]

TOGETHER = 1000  # sessions of a table
_HEAD = ["user", "protocol", "client", "tls", "since", "mailbox", "commands", "program"]


@group
def view() -> None:
    """Show and end the sessions of users who read mail that is kept here: by IMAP, POP3 and ManageSieve."""


@view.command()
@click.argument("user", required=False, callback=given)
@as_json
@configured
def sessions(read: Configuration, user: str | None, as_json: bool) -> None:
    """List the sessions of users who have logged in, one a line.

    USER: only those of the user who has this address. The commands are those since the login, for POP3 the messages that were
    retrieved."""
    peer = daemon(read)
    found: list[dict[str, Any]] = []
    none = True
    for page in read_pieces(peer, "sessions", user=_ident(peer, user) if user is not None else 0):
        none = none and not page
        if as_json:
            for row in page:
                say_json(row)
            continue
        found += page
        if len(found) >= TOGETHER:
            _show(found)
            found = []
    if found:
        _show(found)
    if none and not as_json:
        say(f"{user} has no session" if user else "nobody is logged in", err=True)


def _show(rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: (row["user"], row["since"]))
    table("", _HEAD, [_cells(row) for row in rows])


def _ident(peer: Daemon, address: str) -> int:
    return int(asked(peer, "mailbox_owner", address=address)["id"])


def _cells(row: dict[str, Any]) -> list[str]:
    place = " ".join(filter(None, ("idle" if row["state"] == "idle" else "", row["mailbox"])))
    count = row["retrieved"] if row["protocol"] == "pop3" else row["commands"]
    return [
        row["user"], row["protocol"], row["client"], row["tls"] or "no", when(row["since"]), place or "-", str(count),
        row["program"] or "-",
    ]  # fmt: skip


@view.command()
@click.argument("user", callback=given)
@configured
def disconnect(read: Configuration, user: str) -> None:
    """End the sessions of a user, each once the command under way has ended.

    USER: any address of the user. The user may log in again: `relaymta mailbox disable` prevents that."""
    peer = daemon(read)
    count = asked(peer, "disconnect", user=_ident(peer, user))
    say(f"{counted(count, 'session', 'sessions')} of {user} {'is' if count == 1 else 'are'} ended")
