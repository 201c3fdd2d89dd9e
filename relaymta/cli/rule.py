"""`relaymta rule`: rules about mail (`[[mail_rule]]`)."""

import sys
from typing import TYPE_CHECKING, Any

import click

from relaymta.auth.identity import plain_address
from relaymta.cli.console import record, say, say_json, table
from relaymta.cli.filter import message_text, show_rows
from relaymta.cli.options import Configuration, config_with, configured, fail, files, group, missing
from relaymta.cli.peer import (
    absent,
    as_json,
    asked,
    connect,
    daemon,
    given,
    given_address,
    given_sender,
    no_such,
    when,
)

if TYPE_CHECKING:
    from relaymta.config import Config

__all__ = ["rule"]

_HEAD = ["rule", "verdict", "done", "would be done", "looked at", "us each", "last"]


@group
def rule() -> None:
    """Rules about mail: what they match, and what they would do."""


@rule.command()
@as_json
@configured
def stats(read: Configuration, as_json: bool) -> None:
    """Show for each rule how many messages it has decided (enforce = true), how many it would have, and the last ones of both.

    Counted since the start, also over reloads."""
    show_rows(asked(daemon(read), "rules"), as_json, _HEAD, _cells, "rules")


def _cells(row: dict[str, Any]) -> list[str]:
    each = f"{row['microseconds'] / row['looked']:.0f}" if row["looked"] else "-"
    verdict = row["verdict"] + ("" if row["enforce"] else " (enforce = false)")
    shown = " ".join(row["last"][-2:]) or "-"
    return [row["rule"], verdict, str(row["enforced"]), str(row["dry"]), str(row["looked"]), each, shown]


@rule.command()
@click.argument("ident", metavar="ID", callback=given)
@as_json
@configured
def why(read: Configuration, ident: str, as_json: bool) -> None:
    """Show which rules a message has matched, and by what in it. Of one that was refused, too: its id is in the log."""
    events = [] if missing() else asked(connect(read), "history", ident=ident)
    if not events:
        absent(no_such("message in the history", ident))
    found = [event for event in events if event["event"] == "rule"]
    for event in found:
        if as_json:
            say_json(event)
            continue
        done = event["verdict"] if event["enforced"] else f"would be {event['verdict']} (enforce = false)"
        match = f": {event['match']}" if event["match"] else ""
        record(f"{when(event['ts']):>10}  {event['rule']}  {done}{match}")
    if not found and not as_json:
        say("no rule has matched it")


@rule.command()
@click.argument("message", metavar="FILE|ID", callback=given, shell_complete=files)
@click.option("--from", "sender", default="", callback=given_sender, metavar="ADDRESS", help="The envelope sender.")
@click.option("--to", "recipients", multiple=True, callback=given_address, metavar="ADDRESS", help="A recipient; repeatable.")
@click.option("--client", default="192.0.2.1", callback=given, metavar="IP", help="The client's address; default: 192.0.2.1.")
@click.option("--as", "application", default="", callback=given, metavar="APP", help="It has logged in, for this application.")
@click.option(
    "--dmarc", default="", type=click.Choice(["", "pass", "none", "fail", "permerror", "temperror"]), help="The result of DMARC."
)
@click.option("--score", default=None, type=float, metavar="NUMBER", help="The score that a filter has given.")
@as_json
@configured
def test(
    read: Configuration, message: str, sender: str, recipients: tuple[str, ...], client: str, application: str, dmarc: str,
    score: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Evaluate all rules on a message: a file ("-": standard input), or one in the queue by its id.

    Nothing is sent, logged or counted. Exit status: 0: no rule matches, 1: some match, and none of them is enforced, 2: one that
    is enforced does."""
    config = config_with(read, "mail_rule")
    try:
        address = str(plain_address(client))
    except ValueError:
        fail(64, f"--client: {client}: not an IP address")
    rows = _evaluated(config, message_text(read, message), sender, recipients, address, application, dmarc, score)
    if as_json:
        for row in rows:
            say_json(row)
    else:
        table("", ["rule", "matches", "done", "by", "us"], [
            [row["rule"], {True: "yes", False: "no", None: "not asked"}[row["matches"]], row["done"] or "-", row["match"] or "-",
             str(row["microseconds"])] for row in rows
        ])  # fmt: skip
    if any(row["done"] for row in rows):
        sys.exit(2)
    if any(row["matches"] for row in rows):
        sys.exit(1)


def _evaluated(
    config: "Config", data: bytes, sender: str, recipients: tuple[str, ...], client: str, application: str, dmarc: str,
    score: float | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each rule. `done`: what is done because of it, "": nothing."""
    import time

    from relaymta.cli.judged import may_relay
    from relaymta.filter.chain import Sender
    from relaymta.filter.judgement import Mail, Text
    from relaymta.filter.rules import Message, Rules
    from relaymta.metrics import RuleCounters
    from relaymta.proto.header import header_end

    end = header_end(data)
    trusted = bool(application) or may_relay(config, client)
    to = recipients or ("recipient@" + config.hostname,)
    mail = Mail("test", sender, to, client, "", application, "", Text(data[:end], data[end:]), dmarc=dmarc)
    message = Message(mail, data[end:], score)
    who = Sender("", client, application, trusted, True)
    rows, decided = [], set[bool]()  # those with score_min, which are evaluated behind the filters, decide apart from the others
    none: Any = None
    for one in Rules(config.mail_rule, lambda name: RuleCounters(none, -1), None, lambda mail, match: None, fail_rule).rules:
        began = time.perf_counter_ns()
        asked_about = who.is_meant_by(one.settings)
        match = one.match(message) if asked_about else None
        done = (
            one.settings.verdict
            if match is not None and one.enforce and one.late not in decided and one.settings.verdict != "accept"
            else ""
        )
        decided |= {one.late} if done else set()
        rows.append({
            "rule": one.name, "matches": match is not None if asked_about else None, "match": match.what if match else "",
            "verdict": one.settings.verdict, "enforce": one.enforce, "done": done,
            "microseconds": (time.perf_counter_ns() - began) // 1000,
        })  # fmt: skip
    return rows


def fail_rule(text: str) -> None:
    """A rule could not be evaluated."""
    fail(70, text)
