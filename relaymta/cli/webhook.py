"""`relaymta webhook`: who is told of what becomes of mail (docs/webhooks.md)."""

import time
from typing import Any

import click

from relaymta.cli.console import record, say, say_json, table
from relaymta.cli.options import Configuration, configured, fail, group
from relaymta.cli.peer import absent, as_json, asked, counted, daemon, given, lasting, no_such, when
from relaymta.proto.webhook import EVENTS

__all__ = ["webhook"]

UNTAKEN = 1  # exit status: a test was not answered by 2xx
_HEAD = ["webhook", "state", "behind", "oldest", "delivered", "dropped", "last reply"]
_name = click.argument("name", metavar="NAME", callback=given)


@group
def webhook() -> None:
    """Who is told of what becomes of mail: state, replays, tests."""


@webhook.command(name="list")
@as_json
@configured
def list_webhooks(read: Configuration, as_json: bool) -> None:
    """List the webhooks: whether each takes events, how far it is behind (in events of the journal, of all kinds; and the age of
    the oldest that it has not taken), what was counted since the start of its process, and its last reply."""
    rows = asked(daemon(read), "webhooks")
    if as_json:
        for row in rows:
            say_json(row)
    elif rows:
        table("", _HEAD, [_cells(row) for row in rows])
    else:
        say("there are no webhooks ([[webhook]])", err=True)


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = [str(row[key]) for key in ("delivered", "dropped")]
    return [row["name"], row["state"], str(row["lag_events"]), lasting(row["lag_seconds"]), *numbers, row["reply"] or "-"]


@webhook.command()
@_name
@as_json
@configured
def show(read: Configuration, name: str, as_json: bool) -> None:
    """Show one webhook."""
    rows = asked(daemon(read), "webhooks")
    row = next((row for row in rows if row["name"] == name), None)
    if row is None:
        absent(no_such("webhook", name, [row["name"] for row in rows]))
    if as_json:
        say_json(row)
        return
    say(f"{row['name']}: {row['state']}" + (f": {row['why']}" if row["why"] else ""))
    say(f"  {row['url']}")
    say(f"  events: {', '.join(row['events']) or 'all'}; applications: {', '.join(row['applications']) or 'all'}")
    say(f"  last asked {when(row['asked'])}: {row['reply'] or '-'}")
    say(f"  {counted(row['lag_events'], 'event', 'events')} behind; the oldest that was not taken: {lasting(row['lag_seconds'])}")
    say(f"  {row['delivered']} delivered, {row['replayed']} by replays, {row['dropped']} dropped")
    for one in row["replays"]:
        record(f"  replay {one['name']}", f"{counted(one['left'], 'event', 'events')} of the journal left")


@webhook.command()
@_name
@click.option("--since", required=True, metavar="TIME", help='A duration before now ("2h"), or a day and time (UTC: with "Z").')
@click.option("--until", default="", metavar="TIME", help="The same; default: now.")
@click.option("--event", "kinds", multiple=True, type=click.Choice(EVENTS), help="Only these; can be given several times.")
@as_json
@configured
def replay(read: Configuration, name: str, since: str, until: str, kinds: tuple[str, ...], as_json: bool) -> None:
    """Send events from the journal to a webhook again, beside what happens now. How far it is: `relaymta webhook show`."""
    from relaymta.cli.finding import moment

    first, last = moment("--since", since), moment("--until", until) if until else 0.0
    if last and last <= first:
        fail(64, "--until is not after --since")
    if first > time.time():
        fail(64, "--since is in the future")
    args = {"name": name, "since": max(0, int(first * 1000)), "until": max(0, int(last * 1000)), "kinds": list(kinds)}
    found = asked(daemon(read), "webhook_replay", **args)
    if as_json:
        say_json(found)
    else:
        say(f"replay {found['replay']} has begun: it looks at {counted(found['events'], 'event', 'events')} of the journal")


@webhook.command()
@_name
@as_json
@configured
def test(read: Configuration, name: str, as_json: bool) -> None:
    """Send one signed event of the kind "test" to a webhook, and show the response. Exit status 1: it is none of 2xx."""
    found = asked(daemon(read), "webhook_test", name=name)
    if as_json:
        say_json(found)
    else:
        why, passed = found["text"], f"after {found['seconds']:.2f} s"
        say(f"HTTP {found['status']} {passed}" + (f": {why}" if why else "") if found["status"] else f"{why} ({passed})")
    if not found["taken"]:
        raise SystemExit(UNTAKEN)
