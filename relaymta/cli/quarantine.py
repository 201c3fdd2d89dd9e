"""`relaymta quarantine`: mail that filters, rules about mail or DMARC hold."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.lessons import again as also_again
from relaymta.cli.lessons import learning, taught
from relaymta.cli.options import Configuration, configured, fail, group, missing
from relaymta.cli.peer import (
    Daemon,
    Offline,
    absent,
    as_json,
    asked,
    connect,
    counted,
    daemon,
    given,
    given_address,
    given_domain,
    given_sender,
    no_such,
    number_of,
    read_pieces,
    seconds_of,
    size,
    when,
)
from relaymta.cli.queue import change, list_in_order, pages, result
from relaymta.ident import format_id

__all__ = ["header_of", "quarantine"]

HEAD_MOST = 1 << 17  # octets of a message in which its header is looked for
SHOWN = ("from", "to", "cc", "reply-to", "subject", "date", "message-id", "authentication-results")
TO = "Send them to this address in place of their recipients; repeatable. relay.postmaster is the sender then, and gets the DSNs."
WHICH = "--filter, --from, --recipient, --domain, --app, --user, --older, --newer"


@group
def quarantine() -> None:
    """Mail that filters, rules about mail or DMARC hold: look at it, release it, delete it, learn from it."""


def _age(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """An age as the time (ms UTC) at which a message of this age has arrived; 0: not given."""
    if not given(context, parameter, value):
        return 0
    return max(1, int((time.time() - seconds_of(parameter.opts[0], value)) * 1000))


def _which(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which messages."""

    def option(name: str, metavar: str, sentence: str, field: str, checked: Callable[..., Any] = given) -> Callable[..., Any]:
        return click.option(name, field, default="", callback=checked, metavar=metavar, help=sentence)

    for one in reversed((
        option("--filter", "NAME", "Held by this filter or rule; \"DMARC\": by DMARC.", "held_by"),
        option("--from", "ADDRESS", "From this sender; '<>': the null sender.", "sender", given_sender),
        option("--recipient", "ADDRESS", "To this recipient.", "recipient", _recipient),
        option("--domain", "DOMAIN", "With a recipient in this domain.", "recipient_domain", given_domain),
        option("--app", "APP", "Of this application.", "application"),
        option("--user", "NAME", "Of the client that logged in as this user.", "user"),
        option("--older", "AGE", "That arrived longer ago, such as 7d.", "older", _age),
        option("--newer", "AGE", "That arrived since then, such as 12h.", "newer", _age),
    )):  # fmt: skip
        function = one(function)
    return function


def _recipient(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return value if not given(context, parameter, value) else given_address(context, parameter, value)


@quarantine.command(name="list")
@_which
@as_json
@configured
def list_messages(read: Configuration, as_json: bool, **chosen: Any) -> None:
    """List the messages in the quarantine, the oldest first: id, who holds it, score, size, since when and until when, sender and
    recipients, Subject, and why."""
    some = list_in_order(connect(read), chosen | {"quarantined": True}, as_json, _cells)
    if not some and not as_json:
        nothing = "the quarantine is empty" if not missing() else "no messages where a worker answers"
        say("no such messages in the quarantine" if any(chosen.values()) else nothing, err=True)


def _cells(row: dict[str, Any]) -> list[str]:
    why, recipients = row["quarantine"], row["recipients"]
    score = "" if why["score"] is None else f"  {why['score']:g}"
    more = f" +{len(recipients) - 1}" if len(recipients) > 1 else ""
    until = f"until {when(why['until'])}" if why["until"] else "" if why["judged"] else "until released or deleted"
    return [
        f"{row['id']}  {why['by']}{score}  {size(row['size']):>8}  {when(why['since'])}  {until}",
        f"<{row['sender']}> -> <{recipients[0]['address']}>{more}",
        why["subject"],
        why["reason"],
    ]


@quarantine.command()
@click.argument("ids", nargs=-1, required=True, callback=given, metavar="ID...")
@as_json
@configured
def show(read: Configuration, ids: tuple[str, ...], as_json: bool) -> None:
    """Show messages in the quarantine: who holds them and why, the envelope, and the header. `relaymta message raw ID` writes all
    of one."""
    peer = connect(read)
    for ident in ids:
        number_of(ident)
    for ident in ids:
        found = asked(peer, "message", ident=ident)
        if found is None or found["quarantine"] is None:
            hint = "" if found is None else f"it is {found['state']} in the queue: `relaymta message show {ident}`"
            absent(no_such("message in the quarantine", ident, hint=hint))
        fields = header_of(peer, ident)
        if as_json:
            say_json(found | {"header": fields})
        else:
            _show(found, fields)


def header_of(peer: Daemon | Offline, ident: str) -> list[tuple[str, str]]:
    """The fields of a message's header, decoded, as far as its first 128 kB have it."""
    from relaymta.proto.edits import shown
    from relaymta.proto.header import header_end
    from relaymta.proto.mime_text import header_text

    head = b""
    for piece in read_pieces(peer, "raw", ident=ident):
        head += piece
        if len(head) >= HEAD_MOST or header_end(head) < len(head):
            break
    fields = shown(head[: header_end(head)])
    return [(name.decode("ascii", "replace"), header_text(line.partition(b":")[2]).strip()) for name, line in fields]


def _show(found: dict[str, Any], fields: list[tuple[str, str]]) -> None:
    why = found["quarantine"]
    score = "" if why["score"] is None else f", score {why['score']:g}"
    say(f"{found['id']}  {size(found['size'])}  held by {why['by']}{score}: {why['reason']}")
    kept = "for quarantine.keep" if why["judged"] else "until it is released or deleted"
    until = f"deleted {when(why['until'])}" if why["until"] else f"it stays {kept}"
    say(f"since {when(why['since'])}; {until}")
    if found["unseen"]:
        say(f"not looked at yet by filter {', '.join(found['unseen'])}, which will do so first when it is released")
    login = f", logged in as {found['user']}" if found["user"] else ""
    say(f"arrived {when(found['arrived'])} from {found['client']} ({found['helo']}){login}")
    say(f"from <{found['sender']}> to {', '.join('<' + one['address'] + '>' for one in found['recipients'])}")
    for name, text in fields:
        if name.lower() in SHOWN:
            say(f"  {name}: {text}")
    say(f"all of it: `relaymta message raw {found['id']}`")


def _verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """What verbs that change messages, or learn from them, have in common."""
    for option in reversed((
        click.argument("ids", nargs=-1, callback=given, metavar="[ID]..."),
        click.option("--all", "everything", is_flag=True, help="Every message in the quarantine."),
        click.option("--dry-run", is_flag=True, help="Only count the messages that match."),
        _which,
        as_json,
        configured,
    )):  # fmt: skip
        function = option(function)
    return function


def _chosen(verb: str, ids: tuple[str, ...], everything: bool, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """The filters of a request: one for each id, or one for all."""
    if not (ids or everything or any(chosen.values())):
        fail(64, f"which messages? Give ids, a filter ({WHICH}), or --all: relaymta quarantine {verb} --help")
    chosen = chosen | {"quarantined": True}
    return [chosen | {"ident": number} for number in dict.fromkeys(map(number_of, ids))] or [chosen]


def _changed(read: Configuration, verb: str, filters: list[dict[str, Any]], dry_run: bool, as_json: bool, **how: Any) -> None:
    """Release or delete what matches, and say what was done."""
    waiting = 0

    def look(row: dict[str, Any]) -> None:
        nonlocal waiting
        waiting += bool(row["unseen"])

    found = change(daemon(read), f"{verb} quarantined", filters, dry_run, look=look, **how)
    del found["in_flight"]  # no attempt is made at mail in the quarantine
    if as_json:
        say_json(found)
    else:
        say(f"{verb}: {result(found, 'message in the quarantine')}")
        if verb == "release" and waiting and not how["unscanned"]:
            those = counted(waiting, "of them waits", "of them wait")
            say(f"note: {those} for other filters first (`message explain ID`; --unscanned: without them)", err=True)
    if "unknown" in found and not missing():
        fail(1, "\n".join(no_such("message in the quarantine", ident) for ident in found["unknown"]))


@quarantine.command()
@click.option("--to", "recipients", multiple=True, callback=given_address, metavar="ADDRESS", help=TO)
@click.option("--unscanned", is_flag=True, help="Also without the filters that have not looked at it yet.")
@_verb
def release(
    read: Configuration, ids: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, recipients: tuple[str, ...],
    unscanned: bool, **chosen: Any,
) -> None:  # fmt: skip
    """Release messages: they are sent to their recipients as they are, and filters do not look at them again."""
    filters = _chosen("release", ids, everything, chosen)
    _changed(read, "release", filters, dry_run, as_json, recipients=[*dict.fromkeys(recipients)], unscanned=unscanned)


@quarantine.command()
@_verb
def delete(read: Configuration, ids: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, **chosen: Any) -> None:
    """Delete messages. No DSN is sent."""
    _changed(read, "delete", _chosen("delete", ids, everything, chosen), dry_run, as_json)


@quarantine.command()
@click.argument("what", type=click.Choice(["spam", "ham"]))
@click.option("--only", default="", callback=given, metavar="FILTER", help="Teach this filter alone.")
@also_again
@_verb
def learn(
    read: Configuration, ids: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, what: str, only: str,
    again: bool, **chosen: Any,
) -> None:  # fmt: skip
    """Teach filters that messages are spam, or that they are none (ham). They stay in the quarantine.

    As `filter learn`: each text once, five a second. Exit status 75 when one was not learned."""
    filters = _chosen("learn", ids, everything, chosen)
    peer, of = connect(read), learning(read, only)
    if dry_run:
        found = sum(len(idents) for chosen in filters for _, idents, _ in pages(peer, chosen))
        say_json({"matched": found}) if as_json else say(counted(found, "message matches", "messages match"))
        return
    unknown: list[str] = []

    def texts() -> Iterator[tuple[str, bytes]]:
        for chosen in filters:
            seen = False
            for _, idents, _ in pages(peer, chosen):
                for ident in map(format_id, idents):
                    seen = True
                    yield ident, b"".join(read_pieces(peer, "raw", ident=ident))
            if chosen.get("ident") and not seen:
                unknown.append(format_id(chosen["ident"]))

    good = taught(peer, of, texts(), what == "spam", as_json, again)
    if unknown and not missing():
        fail(1, "\n".join(no_such("message in the quarantine", ident) for ident in unknown))
    if not good:
        sys.exit(75)
