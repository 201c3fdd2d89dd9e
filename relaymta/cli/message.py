"""`relaymta message`: find messages, show one, explain why it is in the queue, and its history."""

from itertools import chain
from typing import Any

import click

from relaymta.cli.console import record, say, say_json, say_message
from relaymta.cli.options import Configuration, configured, fail, group, missing
from relaymta.cli.peer import (
    absent,
    as_json,
    asked,
    connect,
    due,
    given,
    given_domain,
    given_sender,
    no_such,
    number_of,
    read_pieces,
    size,
    until,
    when,
)

__all__ = ["message", "waiting", "what_happened"]

IN_QUEUE = "message in the queue"
STATUSES = ["queued", "deferred", "held", "delivered", "bounced", "gone"]  # what `find` may be asked for
RESULTS = {"success": "delivered", "transient": "deferred", "permanent": "failed"}  # of an attempt, as people say


def _ident(context: click.Context, parameter: click.Parameter, ident: str) -> str:
    number_of(ident)
    return ident


_of = click.argument("ident", metavar="ID", callback=_ident)


@group
def message() -> None:
    """Find messages, and inspect one."""


@message.command(name="show")
@_of
@as_json
@configured
def show_message(read: Configuration, ident: str, as_json: bool) -> None:
    """Show the envelope, the schedule and every recipient's last attempts."""
    found = asked(connect(read), "message", ident=ident)
    if found is None:
        absent(no_such(IN_QUEUE, ident, hint=f"what happened to it: `relaymta message history {ident}`"))
    if as_json:
        say_json(found)
        return
    say(f"{found['id']}  {found['state']}  {size(found['size'])}  from <{found['sender']}>")
    client = f"{found['client']} ({found['helo']}){_by(found)}"
    listener = f" on {found['listener']}" if found["listener"] else ""
    say(f"arrived {when(found['arrived'])} from {client}{listener}; queue {', '.join(found['queues'])}")
    if found["forwarded"]:
        said = (f"{name.lower()} {value or 'unknown'}" for name, value in found["forwarded"].items())
        say(f"by XFORWARD: {', '.join(said)}")
    say(f"attempts {found['attempts']}, next {due(found['next'])}, expires {when(found['expires'])}")
    if found["held_for"]:
        say(f"{found['state']}: {found['held_for']}")
    if found["unseen"]:
        say(f"not looked at yet by filter {', '.join(found['unseen'])}")
    for recipient in found["recipients"]:
        say(f"  <{recipient['address']}>: {recipient['state']}")
        for attempt in recipient.get("attempts", []):
            say(f"    {_attempt(attempt)}")


@message.command()
@_of
@configured
def raw(read: Configuration, ident: str) -> None:
    """Write the message data, as it will be sent: unchanged to a file or pipe; on a terminal, unprintable characters are
    escaped."""
    pieces = read_pieces(connect(read), "raw", ident=ident)
    first = next(pieces, None)
    if first is None:
        absent(no_such(IN_QUEUE, ident))
    say_message(chain([first], pieces))


@message.command()
@_of
@as_json
@configured
def explain(read: Configuration, ident: str, as_json: bool) -> None:
    """Explain why a message is still in the queue: its route, attempts, what it waits for, which limit delays it, and until
    when."""
    peer = connect(read)
    found = asked(peer, "explain", ident=ident)
    if found is None:
        events = [] if missing() else asked(peer, "history", ident=ident)
        if not events:
            absent(no_such("message in the queue or in the history", ident))
        found = {"id": ident, "state": "gone", "history": events}
    if as_json:
        say_json(found)
    elif found["state"] == "gone":
        say(f"{ident} is not in the queue any more:")
        _show_history(found["history"])
    else:
        _show_explanation(found, read.options)


def _attempt(attempt: dict[str, Any]) -> str:
    peer = f" {attempt['peer']}" if attempt["peer"] else ""
    return f"{when(attempt['time'])}: {RESULTS[attempt['result']]} at {attempt['phase']}{peer}: {attempt['reply']}"


def _by(found: dict[str, Any]) -> str:
    return f", logged in as {found['user']}" if found["user"] else ""


def _show_explanation(found: dict[str, Any], options: str) -> None:
    sender = f"accepted {when(found['arrived'])} from {found['client']} ({found['helo']}){_by(found)}"
    application = f", application {found['application']}" if found["application"] else ""
    say(f"{found['id']}  {found['state']}  {size(found['size'])}  <{found['sender']}>; {sender}{application}")
    for place in found["waits"]:
        wait = place["wait"]
        say(f"queue {place['queue']}: {', '.join(place['recipients'])}")
        tried = [f"{r['route']} {'yes' if r['matches'] else 'no: ' + r['by']}" for r in place["routes"]]
        say(f"  route: {'; '.join(tried)}" + (f"; site {place['site']}" if place["site"] else ""))
        for attempt in place["attempts"]:
            say(f"  {_attempt(attempt)}")
        say(f"  {waiting(wait['why'])}" + (f", {until(wait['until'])}" if wait["until"] else ""))
        if wait["position"] >= 0:
            more = " or more" if wait["position"] >= 1000 else ""
            say(f"  {wait['position']}{more} messages are ahead of it")
        if wait["released by"]:
            say(f"  would be released by {wait['released by']}")
        if wait.get("cure"):
            say(f"  cure: {wait['cure']}")
        if wait.get("command"):
            say(f"  command: relaymta {wait['command']}{options}")
    say(f"expires {when(found['expires'])}" if found["expires"] else "does not expire while it is held")


def waiting(why: str) -> str:
    """Why a message waits (send/explain.py), as a sentence without its subject."""
    return f"waits for {why}" if why.startswith(("its ", "the DNS", "a ", "filter ")) else why


@message.command()
@_of
@as_json
@configured
def history(read: Configuration, ident: str, as_json: bool) -> None:
    """Show what happened to a message, also after it has left the queue (as far back as log.history reaches)."""
    events = asked(connect(read), "history", ident=ident)
    if not events:
        absent(no_such("message in the history", ident))
    if as_json:
        for event in events:
            say_json(event)
    else:
        _show_history(events)


def _show_history(events: list[dict[str, Any]]) -> None:
    for event in events:
        record(f"{when(event['ts']):>10}  {event['event']:<10}  {what_happened(event)}")


def what_happened(event: dict[str, Any]) -> str:
    """An event of a message's history in words, but for its time and name."""
    who = event.get("recipients") or [event.get("recipient", "")]
    more = f" +{len(who) - 1}" if len(who) > 1 else ""
    reply = f": {event['reply']}" if event.get("reply") else ""
    where = f" by {event['route']}" if event.get("route") else ""
    peer = f" to {event['peer']}" if event.get("peer") else ""
    filtered = _SAID.get(event["event"], _forwarded)(event)
    return f"<{who[0]}>{more}{where}{peer}{filtered}{reply}"


def _forwarded(event: dict[str, Any]) -> str:
    """What XFORWARD has said: ` of 192.0.2.1 (mail.example), there 0ABCDEFGHJKMN`; "" where nothing."""
    unseen = f", not looked at yet by filter {', '.join(event['unseen'])}" if event.get("unseen") else ""
    unseen += f": held ({event['held']})" if event.get("held") else ""
    if "orig_client" not in event:
        return unseen
    there = f", there {event['orig_id']}" if event["orig_id"] else ""
    return f" of {event['orig_client'] or 'unknown'} ({event['orig_helo'] or 'unknown'}){there}{unseen}"


def _filtered(event: dict[str, Any]) -> str:
    """What a filter has said: ` by virus: reject (Eicar-Test-Signature)`, and what was done, where that is something else."""
    score = "" if event["score"] is None else f" {event['score']:g}"
    reason = f" ({event['reason']})" if event["reason"] else ""
    done = f", done: {event['action']}" if event["action"] != event["verdict"] else ""
    return f" by {event['filter']}: {event['verdict']}{score}{reason}{done}"


def _scanned(event: dict[str, Any]) -> str:
    """What has come of a message in the queue that filters have looked at: `: held (filter virus: Eicar-Test-Signature)`."""
    return f": {event['result']}" + (f" ({event['reason']})" if event["reason"] else "")


def _ruled(event: dict[str, Any]) -> str:
    """What a rule about mail has done, or would have: ` no programs: reject (setup.exe)`."""
    match = f" ({event['match']})" if event["match"] else ""
    return f" by rule {event['rule']}: {event['verdict']}{match}" + ("" if event["enforced"] else ", not enforced")


def _left_quarantine(event: dict[str, Any]) -> str:
    """How a message has left the quarantine: `: released (filter virus: Eicar-Test-Signature)`."""
    return f": {event['result']} ({event['by']}: {event['reason']})"


def _changed(event: dict[str, Any]) -> str:
    """Who has changed a message in the queue, and why: `, by operator (uid 0): by the operator (queue hold)`."""
    return f", by {event['by']}" + (f": {event['reason']}" if event.get("reason") else "")


_SAID = dict.fromkeys(("held", "released", "rerouted", "deleted"), _changed) | {
    "filtered": _filtered,
    "scanned": _scanned,
    "rule": _ruled,
    "quarantine": _left_quarantine,
}


def _recipient(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from relaymta.proto.address import plain

    address = given(context, parameter, value).removeprefix("<").removesuffix(">")
    if value and not plain(address):
        fail(64, f"--to {value}: not an address")
    return str(address)


@message.command()
@click.option(
    "--from",
    "sender",
    default="",
    callback=given_sender,
    metavar="ADDRESS",
    help="From this sender; '<>': the null sender, as of DSNs.",
)
@click.option("--to", "recipient", default="", callback=_recipient, metavar="ADDRESS", help="To this recipient.")
@click.option(
    "--domain", "recipient_domain", default="", callback=given_domain, metavar="DOMAIN", help="With a recipient in this domain."
)
@click.option("--app", "application", default="", callback=given, metavar="APP", help="Of this application.")
@click.option(
    "--since",
    default="",
    callback=given,
    metavar="TIME",
    help='Accepted since then: 2h (ago), 09:30, 2026-11-27, "2026-11-27 09:30".',
)
@click.option("--until", "before", default="", callback=given, metavar="TIME", help="Accepted before then.")
@click.option("--id", "ident", default="", callback=given, metavar="ID", help="With this id, or this Message-ID.")
@click.option(
    "--subject", default="", callback=given, metavar="TEXT", help="With this text in the Subject; of messages in the queue only."
)
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(STATUSES),
    metavar="STATUS",
    help=f"With this status: {', '.join(STATUSES[:-1])} or {STATUSES[-1]}; repeatable.",
)
@click.option("--limit", "most", default=100, type=click.IntRange(1), metavar="N", help="The newest N at most; default: 100.")
@as_json
@configured
def find(
    read: Configuration, since: str, before: str, ident: str, subject: str, statuses: tuple[str, ...], most: int, as_json: bool,
    **chosen: Any,
) -> None:  # fmt: skip
    """Find messages: those in the queue, and those that have left it, as far back as log.history reaches. The newest first: id,
    time, state, sender and recipient, and the last reply. The daemon need not run.

    A message that is not in the queue is delivered (to all recipients), bounced (to one at least) or gone: deleted by an
    operator, discarded by a filter, or its end is not in the history."""
    from relaymta.cli.finding import Finder, Search, moment

    found: dict[str, Any] = dict(chosen)
    if since:
        found["newer"] = max(1, int(moment("--since", since) * 1000))
    if before:
        found["older"] = max(1, int(moment("--until", before) * 1000))
    if ident and "@" not in ident:
        found["ident"] = number_of(ident)
    search = Search(found, statuses, ident if "@" in ident else "", subject)
    finder, count = Finder(connect(read), search), 0
    for row in finder.find(most):
        count += 1
        if as_json:
            say_json(row)
        else:
            record(*_found(row, search.concerned(row)))
    if not count and not as_json:
        say("no such messages", err=True)
    for note in finder.notes(count, most):
        say(f"note: {note}", err=True)


def _found(row: dict[str, Any], concerned: list[dict[str, Any]]) -> list[str]:
    """A message that was found, in parts that are one line in all, or one each."""
    one = concerned[0] if concerned else {"address": "", "reply": ""}
    more = f" +{len(row['recipients']) - 1}" if len(row["recipients"]) > 1 else ""
    return [
        f"{row['id']}  {when(row['arrived']):>10}  {row['state']:<11}",
        f"<{row['sender']}> -> <{one['address']}>{more}",
        row["subject"] or "",
        row["why"] or one["reply"],
    ]
