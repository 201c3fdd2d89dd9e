"""`relaymta abuse`: accounts whose mail is not as usual (`[[abuse]]`)."""

from shlex import quote
from typing import Any

import click

from relaymta.cli.console import record, say, say_json, table
from relaymta.cli.options import Configuration, configured, group
from relaymta.cli.peer import as_json, asked, counted, daemon, given, until, when

__all__ = ["abuse"]

_HEAD = ["check", "now", "limit", "at least", "then", "what"]
_account = click.argument("account", metavar="ACCOUNT", callback=given)


@group
def abuse() -> None:
    """Accounts whose mail is not like their own any more."""


@abuse.command(name="list")
@as_json
@configured
def list_findings(read: Configuration, as_json: bool) -> None:
    """List what was found: the account, the check, since when and until when, what is done, and why."""
    rows = asked(daemon(read), "abuse")
    for row in rows:
        if as_json:
            say_json(row)
        else:
            _show(row)
    if not rows and not as_json:
        say("all accounts are as usual, as far as [[abuse]] looks at them", err=True)


def _show(row: dict[str, Any]) -> None:
    done = {"hold": "its mail is held", "suspend": "its mail waits"}.get(row["verdict"], "nothing is done (enforce = false)")
    record(f"{row['account']}  {row['check']}  since {when(row['since'])}, {until(row['until'])}", done, row["reason"])


@abuse.command()
@_account
@as_json
@configured
def why(read: Configuration, account: str, as_json: bool) -> None:
    """Show what an account sends now, beside what each check takes for usual. ACCOUNT: a user or an application, as "ann", or
    "user=ann", "application=shop"."""
    found = asked(daemon(read), "abuse_why", account=account)
    if as_json:
        say_json(found)
        return
    since = f"known since {when(found['since'])}" if found["since"] else "it has sent nothing that is remembered"
    say(f"{found['account']}: {since}")
    if found["checks"]:
        table("", _HEAD, [_cells(row) for row in found["checks"]])
    if found["networks"]:
        say("networks: " + ", ".join(f"{one['network']} (since {when(one['first'])})" for one in found["networks"]))
    for row in found["findings"]:
        _show(row)


def _cells(row: dict[str, Any]) -> list[str]:
    then = row["verdict"] + ("" if row["enforce"] else " (enforce = false)")
    now = f"{row['value']:g}" + (" !" if row["above"] else "")
    return [row["check"], now, f"{row['limit']:g}", str(row["floor"]), then, row["text"]]


@abuse.command()
@_account
@click.option("--check", default="", callback=given, metavar="NAME", help="Only what this check has found; default: all.")
@as_json
@configured
def clear(read: Configuration, account: str, check: str, as_json: bool) -> None:
    """End what was found about an account, and what is done because of it. What it sends now is usual from now on.

    What is in the quarantine because of it stays there: `relaymta quarantine release|delete` decides."""
    rows = asked(daemon(read), "abuse_clear", account=account, check=check)
    if as_json:
        for row in rows:
            say_json(row)
        return
    say(f"{rows[0]['account']}: {counted(len(rows), 'finding has', 'findings have')} ended")
    kind, _, name = rows[0]["account"].partition("=")
    option = "--user" if kind == "user" else "--app"
    for held in sorted({row["check"] for row in rows if row["verdict"] == "hold"}):
        say(f"what is held: `relaymta quarantine release --filter {quote(held)} {option} {quote(name)}`")
