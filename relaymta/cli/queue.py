"""`relaymta status|queue|reload`: inspect the running daemon and change its queue.

When the daemon is stopped, reading verbs read the spool, holding its lock.
"""

import json
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.console import record, say, say_json, say_json_lines, table
from relaymta.cli.options import Configuration, configured, fail, group, incomplete, missing
from relaymta.cli.peer import (
    Daemon,
    GivenPath,
    absent,
    answered,
    as_json,
    asked,
    connect,
    counted,
    due,
    given,
    given_domain,
    given_sender,
    lasting,
    no_such,
    number_of,
    routes,
    size,
    when,
)
from relaymta.control.requests import AGES
from relaymta.errors import NoSuch
from relaymta.ident import format_id
from relaymta.proto.address import same_host

if TYPE_CHECKING:
    from relaymta.cli.peer import Peer
    from relaymta.cli.stopped import Stopped

__all__ = [
    "KINDS", "SITES", "change", "changeable", "is_named", "list_in_order", "names_of_sites", "pages", "queue", "reload", "result",
    "status",
]  # fmt: skip

QUEUES_TOGETHER = 10_000  # names of queues in one request
QUEUES = "`relaymta queue summary` names those that have mail"
SITES = "`relaymta site list` names those that have mail or connections"
KINDS = ["suspended", "slow", "dead", "learned"]  # of decisions about sites


@click.command()
@as_json
@configured
def status(read: Configuration, as_json: bool) -> None:
    """Show the state of the daemon and its workers."""
    peer = connect(read)
    found = asked(peer, "status")
    if as_json:
        say_json(found)
        return
    up, addresses = lasting(found["uptime"]), ", ".join(found["listeners"])
    listening = "listened" if found.get("stopping") else "listening"
    say(f"relaymta {found['version']}, pid {found['pid']}, up {up}, {listening} on {addresses}")
    if found.get("stopping"):
        say("it is stopping: no mail is accepted, and what is in flight is finished first")
    say(f"spool {found['spool']}; {found['durability']}; metrics on {found['metrics']}")
    totals = found["totals"]
    results = ", ".join(f"{totals[name]} {name}" for name in totals if name != "accepted")
    say(f"since the start: {totals['accepted']} messages accepted; recipients: {results}")
    rows = [
        [str(w["worker"]), w["state"], str(w.get("pid", "")), str(w.get("connections", "")),
         str(w.get("in flight", "")), "full" if w.get("full") else "stalled" if w.get("stalled") else "ok"]
        for w in found["workers"]
    ]  # fmt: skip
    table("", ["worker", "state", "pid", "connections", "in flight", "store"], rows)
    for site, reason in {key: why for worker in found["workers"] for key, why in worker.get("sites down", {}).items()}.items():
        say(f"{site} is down: {reason}")


@group
def queue() -> None:
    """List the messages in the queue, and change them."""


@queue.command()
@as_json
@configured
def summary(read: Configuration, as_json: bool) -> None:
    """Show one line for each queue that has messages."""
    rows = asked(connect(read), "summary")
    if as_json:
        for row in rows:
            say_json(row)
        return
    if not rows:
        say(_no_mail(), err=True)
        return
    table("", ["queue", "messages", "size", "deferred", "held", "unseen", "next attempt"], [
        [r["queue"], str(r["messages"]), size(r["bytes"]), *(str(r[c]) for c in ("deferred", "held", "unseen")), due(r["next"])]
        for r in rows
    ])  # fmt: skip


def _no_mail() -> str:
    """That there are no messages, as far as the workers that have answered know."""
    return "no messages where a worker answers" if missing() else "the queue is empty"


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    def text(name: str, metavar: str, sentence: str, field: str, checked: Callable[..., Any] = given) -> Callable[..., Any]:
        return click.option(name, field, default="", callback=checked, metavar=metavar, help=sentence)

    for option in reversed((
        text("--queue", "NAME", "In this queue, as `queue summary` names it.", "queue"),
        text("--route", "NAME", "With this route.", "route"),
        text("--site", "NAME", "For this site, as `site list` names it, or one of its hosts.", "site"),
        text("--app", "APP", "Of this application.", "application"),
        text("--from", "ADDRESS", "From this sender; '<>': the null sender, as of DSNs.", "sender", given_sender),
        text("--user", "NAME", "Of the client that logged in as this user.", "user"),
        text("--domain", "DOMAIN", "With a recipient in this domain.", "recipient_domain", given_domain),
        click.option("--held", is_flag=True, help="Held messages only."),
        click.option("--unseen", is_flag=True, help="Only messages that filters have not looked at yet."),
    )):  # fmt: skip
        function = option(function)
    return function


FILTERS = "--queue, --route, --site, --app, --from, --user, --domain, --held, --unseen"


def pages(peer: "Peer", chosen: dict[str, Any]) -> Iterator[tuple[int, list[int], list[bytes]]]:
    """The messages that match a filter and are in the queue now, page by page: (shard, ids, each message as a line of JSON). The
    next page is requested while one is processed. Mail that arrives meanwhile (such as DSNs for messages that are bounced) does
    not match. The shards of a worker that does not answer are left out."""
    for shard in asked(peer, "shards"):
        yield from _pages_of(peer, shard, chosen)


def _pages_of(peer: "Peer", shard: int, chosen: dict[str, Any]) -> Iterator[tuple[int, list[int], list[bytes]]]:
    def ask(after: int) -> Callable[[], dict[str, Any]]:
        return answered(lambda: peer.begin("page", shard=shard, after=after, chosen=chosen))

    page = ask(0)
    while True:
        found = answered(page)
        if found is None:
            return
        if found["after"]:
            chosen = chosen | {"until": found["until"]}
            page = ask(found["after"])
        yield shard, found["ids"], found["lines"].splitlines()
        if not found["after"]:
            return


def in_order(peer: "Peer", chosen: dict[str, Any]) -> Iterator[list[bytes]]:
    """The messages of all shards that match a filter, the oldest first, as lines of JSON, many at a time."""
    sources = [_pages_of(peer, shard, chosen) for shard in asked(peer, "shards")]
    waiting: list[list[tuple[int, bytes]]] = [[] for _ in sources]  # of each shard: (id, line) not yet returned
    while sources:
        for number in reversed(range(len(sources))):
            while not waiting[number] and number < len(sources):
                page = next(sources[number], None)
                if page is None:
                    del sources[number], waiting[number]
                    break
                waiting[number] = list(zip(page[1], page[2], strict=True))
        if sources:
            known = min(part[-1][0] for part in waiting)  # no shard has an older one to come
            counts = [bisect(part, known, key=itemgetter(0)) for part in waiting]
            yield [line for _, line in sorted(chain(*(part[:count] for part, count in zip(waiting, counts, strict=True))))]
            waiting = [part[count:] for part, count in zip(waiting, counts, strict=True)]


def list_in_order(peer: "Peer", chosen: dict[str, Any], as_json: bool, parts: Callable[[dict[str, Any]], list[str]]) -> bool:
    """Write the messages that match, the oldest first; `parts`: those of a message's line. Whether there were any."""
    some = False
    for lines in in_order(peer, chosen):
        some = some or bool(lines)
        if as_json:
            say_json_lines(b"\n".join([*lines, b""]))
            continue
        for line in lines:
            record(*parts(json.loads(line)))
    return some


@queue.command(name="list")
@_filters
@as_json
@configured
def list_messages(read: Configuration, as_json: bool, **chosen: Any) -> None:
    """List the messages, the oldest first: id, state, size, arrival, next attempt, sender and recipients, why it is held, and
    the result of the last attempt."""
    peer = connect(read)
    empty = not list_in_order(peer, chosen, as_json, _shown)
    if empty and (wrong := unknown_name(peer, chosen)):
        absent(wrong)
    if empty and not as_json:
        say("no such messages" if any(chosen.values()) else _no_mail(), err=True)


def _shown(row: dict[str, Any]) -> list[str]:
    """A message of the list, in parts that are one line in all, or one each."""
    waiting = [r for r in row["recipients"] if r["state"] == "pending"] or row["recipients"]
    more = f" +{len(waiting) - 1}" if len(waiting) > 1 else ""
    schedule = f"{when(row['arrived']):>10}  next {due(row['next']):<9}"
    return [
        f"{row['id']}  {row['state']:<11}  {size(row['size']):>8}  {schedule}",
        f"<{row['sender']}> -> <{waiting[0]['address']}>{more}",
        _why(row),
        waiting[0]["last"],
    ]


def _why(row: dict[str, Any]) -> str:
    """Why a message is held, or waits for filters."""
    waits = f"not looked at by filter {', '.join(row['unseen'])}" if row["unseen"] else ""
    return "; ".join(text for text in (row["held_for"], waits) if text)


def unknown_name(peer: "Peer", chosen: dict[str, Any]) -> str:
    """After nothing has matched a filter: the sentence about a queue, route or site in it that does not exist; "": all do."""
    names = [row["queue"] for row in asked(peer, "summary")] if chosen.get("queue") or chosen.get("route") else []
    if chosen.get("queue") and chosen["queue"] not in names:
        return no_such("queue", chosen["queue"], names, QUEUES)
    known = {*(name.partition("/")[0] for name in names), *routes(peer)} if chosen.get("route") else set()
    if chosen.get("route") and chosen["route"] not in known:
        return no_such("route", chosen["route"], known)
    sites = names_of_sites(peer) if chosen.get("site") else set()
    if chosen.get("site") and chosen["site"] not in sites:
        return no_such("site", chosen["site"], sites, SITES)
    return ""


def names_of_row(row: dict[str, Any]) -> set[str]:
    """The names by which a row of `site list` is known."""
    return {row["pool"], row["site"], *row["hosts"]}


def is_named(row: dict[str, Any], name: str) -> bool:
    """Whether a row of `site list` has a name, or a host of it."""
    return name in names_of_row(row) or any(same_host(name, host) for host in row["hosts"])


def names_of_sites(peer: "Peer", rows: list[dict[str, Any]] | None = None) -> set[str]:
    """The names of all sites that have mail or connections, or a decision about them. `rows`: the sites, if they are known."""
    rows, states = asked(peer, "sites") if rows is None else rows, asked(peer, "site_states")
    found = set[str]().union(*map(names_of_row, rows))
    return found | {state["site"] for state in states if state["kind"] in KINDS and state["site"]}


@queue.command()
@click.option("--all", "everything", is_flag=True, help="Every queue, not only the 30 with the most mail.")
@as_json
@configured
def shape(read: Configuration, as_json: bool, everything: bool) -> None:
    """Show the age of the mail in each queue: messages by age in minutes (as Postfix's qshape)."""
    rows = asked(connect(read), "shape")
    if as_json:
        say_json({"minutes": AGES, "queues": rows})
        return
    if not rows:
        say(_no_mail(), err=True)
        return
    total = {
        "queue": "TOTAL",
        "messages": sum(r["messages"] for r in rows),
        "ages": map(sum, zip(*(r["ages"] for r in rows), strict=True)),
    }
    shown = rows if everything else rows[:30]
    columns = ["queue", "total", *(f"{minutes}m" for minutes in AGES), "older"]
    table("", columns, [[r["queue"], str(r["messages"]), *(str(n) if n else "-" for n in r["ages"])] for r in [total, *shown]])
    if len(rows) > len(shown):
        say(f"and {len(rows) - len(shown)} more queues (--all)", err=True)


@queue.command(name="show")
@click.argument("name")
@as_json
@configured
def show_queue(read: Configuration, name: str, as_json: bool) -> None:
    """Show one queue, by its name in `queue summary`."""
    rows = {row["queue"]: row for row in asked(connect(read), "summary")}
    if name not in rows:
        absent(no_such("queue", name, rows, QUEUES))
    row = rows[name]
    if as_json:
        say_json(row)
        return
    say(f"queue {name}: {row['messages']} messages, {size(row['bytes'])}")
    asleep = "; its site is down or suspended" if row["parked"] else ""
    counts = ", ".join(f"{row[word]} {word}" for word in ("deferred", "held", "unseen"))
    say(f"{counts}; next attempt {due(row['next'])}{asleep}")


def _verb(verb: str, sentence: str, *more: Any) -> click.Command:
    """Make a verb that changes messages. `more`: its own options, one of which sets `word`."""

    def own(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in more:
            function = option(function)
        return function

    @queue.command(name=verb, help=sentence)
    @own
    @click.argument("ids", nargs=-1)
    @click.option("--all", "everything", is_flag=True, help="Every message.")
    @click.option("--dry-run", is_flag=True, help="Only count the messages that match.")
    @_filters
    @as_json
    @configured
    def command(
        read: Configuration, ids: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, word: str = "",
        **chosen: Any,
    ) -> None:  # fmt: skip
        if not (ids or everything or any(chosen.values())):
            fail(64, f"which messages? Give ids, a filter ({FILTERS}), or --all: relaymta queue {verb} --help")
        filters = [chosen | {"ident": number_of(ident)} for ident in dict.fromkeys(ids)] or [chosen]
        with changeable(read) as peer:
            found = change(peer, verb, filters, dry_run, word)
            if as_json:
                say_json(found)
            else:
                say(f"{verb}: {result(found)}")
                if verb == "release" and found["changed"]:
                    _note_hold_policies(peer)
            if not found["matched"] and (wrong := unknown_name(peer, chosen)):
                if not dry_run:
                    absent(wrong)
                say(wrong, err=True)  # the count is the answer
        if "unknown" in found and not missing():
            where = "message in the queue" + (" that matches" if any(chosen.values()) else "")
            fail(1, "\n".join(str(NoSuch(where, ident)) for ident in found["unknown"]))

    return command


@contextmanager
def changeable(read: Configuration) -> "Iterator[Daemon | Stopped]":
    """The daemon, or the queue of one that is stopped."""
    daemon = connect(read)
    if isinstance(daemon, Daemon):
        yield daemon
    else:
        from relaymta.cli.stopped import opened  # the daemon is spared what it takes

        with opened(read) as stopped:
            yield stopped


def _note_hold_policies(peer: "Daemon | Stopped") -> None:
    """Say that released mail is held again by the hold policies that are in effect."""
    about = [state["site"] for state in asked(peer, "site_states") if state["kind"] == "hold"]
    if about:
        policies = f"{', '.join(about[:3])}{' ...' if len(about) > 3 else ''}"
        say(f"note: what a hold policy matches is held again at once: {policies} (`relaymta policy list`)", err=True)


def change(
    peer: "Daemon | Stopped", verb: str, filters: list[dict[str, Any]], dry_run: bool, word: str = "",
    look: Callable[[dict[str, Any]], None] | None = None, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Apply `verb` to all messages that match one of `filters`. `look(row)` is called with each of them; `how`: what else the
    request says. Returns how many were `matched`, `changed`, and skipped since they are `in_flight`; for flush also how many the
    limits of their sites delay (`throttled`), and `until` when (seconds UTC). `unknown`: the ids in `filters` that nothing
    matched, if there are any."""
    found = {"matched": 0, "changed": 0, "in_flight": 0, "dry_run": dry_run}
    queues: Counter[str] = Counter()
    look = look if verb != "flush" else lambda row: queues.update(row["queues"])
    unknown = []
    for chosen in filters:
        before = found["matched"]
        moved = asked(peer, "move", chosen=chosen, word=word, dry_run=dry_run) if verb == "reroute" else None
        if moved is not None:  # whole queues: not message by message
            found["matched"] += moved[0]
            found["changed"] += 0 if dry_run else moved[0] - moved[1]
            found["in_flight"] += moved[1]
            continue
        for shard, idents, lines in pages(peer, chosen):
            found["matched"] += len(idents)
            if look is not None:
                for line in lines:
                    look(json.loads(line))
            if idents and not dry_run:
                done = asked(peer, "change", verb=verb, shard=shard, idents=idents, word=word, **how)
                changed, in_flight = done or (0, 0)  # its worker has gone since the page was read
                found["changed"] += changed
                found["in_flight"] += in_flight
        if chosen.get("ident") and found["matched"] == before:
            unknown.append(format_id(chosen["ident"]))
    if verb == "flush":
        found |= _throttled(peer, queues)
    incomplete()
    return found | ({"unknown": unknown} if unknown else {})


def _throttled(peer: "Daemon | Stopped", queues: Counter[str]) -> dict[str, Any]:
    """`throttled` and `until` of `change`, for the number of messages in each queue."""
    names, count, until = iter(queues.items()), 0, 0.0
    while True:
        some = dict(islice(names, QUEUES_TOGETHER))
        more, end = asked(peer, "throttled", queues=some)
        count, until = count + more, max(until, end)
        if len(some) < QUEUES_TOGETHER:
            return {"throttled": count, "until": until}


def result(found: dict[str, Any], what: str = "message") -> str:
    """The result of `change` as a sentence."""
    if not found["matched"]:
        return f"no {what} matches; nothing was changed"
    if found["dry_run"]:
        text = f"{counted(found['matched'], 'message matches', 'messages match')}; nothing was changed"
    else:
        text = f"{found['changed']} of {found['matched']} messages changed"
        text += f"; {found['in_flight']} in flight were not changed" if found.get("in_flight") else ""
    if found.get("throttled"):
        eligible = max(0, found["matched"] - found["throttled"])
        text += f"; {eligible} are tried now, {found['throttled']} are throttled by their sites until {when(found['until'])}"
    return text


_verb("flush", "Try these messages now.")
_verb("hold", "Hold these messages until they are released: no attempts, no expiry.")
_verb(
    "release",
    "Release held messages: they are due now, and their maximum age begins again. Filters that have not looked at one do first.",
)
_verb("delete", "Delete these messages. No DSN is sent.")
_verb(
    "bounce",
    "Bounce these messages: each sender gets a DSN with the reason.",
    click.option("--reason", "word", default="returned by the operator", help="The reason in the DSN."),
)
_verb(
    "reroute",
    "Move these messages to another route, regardless of the route table; they are due now.",
    click.option("--to", "word", required=True, metavar="ROUTE", help="The route's name."),
)


@queue.command(name="export")
@click.argument("ids", nargs=-1)
@click.option(
    "--to", "folder", required=True, type=GivenPath(file_okay=False, path_type=Path), help="The folder; made if missing."
)
@click.option("--all", "everything", is_flag=True, help="Every message.")
@click.option("--delete", is_flag=True, help="Delete each from the queue once its files are synced, without a DSN.")
@click.option("--force", is_flag=True, help="Replace files of the same names.")
@click.option("--dry-run", is_flag=True, help="Only count the messages that match.")
@_filters
@as_json
@configured
def export_messages(
    read: Configuration, ids: tuple[str, ...], folder: Path, everything: bool, delete: bool, force: bool, dry_run: bool,
    as_json: bool, **chosen: Any,
) -> None:  # fmt: skip
    """Write messages to files: ID.eml, the message data, and ID.json, the envelope, its recipients' states and when the next
    attempt is (docs/queue.md). `queue import` reads them. The daemon need not run.

    A message is complete when its ID.json is there. What is delivered later all the same is in both: see docs/queue.md."""
    from relaymta.cli.queue_files import export

    if not (ids or everything or any(chosen.values())):
        fail(64, f"which messages? Give ids, a filter ({FILTERS}), or --all: relaymta queue export --help")
    filters = [chosen | {"ident": number_of(ident)} for ident in dict.fromkeys(ids)] or [chosen]
    export(read, folder, filters, delete, force, as_json, dry_run)


@queue.command(name="import")
@click.argument("files", nargs=-1, required=True, type=GivenPath(path_type=Path))
@click.option("--again", is_flag=True, help="Also those that were imported before, and have left the queue.")
@as_json
@configured
def import_messages(read: Configuration, files: tuple[Path, ...], again: bool, as_json: bool) -> None:
    """Put messages that `queue export` has written back into the queue, as they were: those in folders, or single ones (ID.json).
    What is there already, or was imported before, is skipped and named, so an import can be repeated. The daemon need not run."""
    from relaymta.cli.queue_files import import_from

    import_from(read, files, again, as_json)


@queue.command()
@click.argument("folder", type=GivenPath(file_okay=False, path_type=Path))
@as_json
@configured
def snapshot(read: Configuration, folder: Path, as_json: bool) -> None:
    """Copy the whole queue, as it is at one moment, into a new folder, whether the relay runs or not, and verify the copy.

    A relay that is started with that copy sends all mail in it: see docs/operations.md."""
    from relaymta.cli.queue_snapshot import take

    take(read, folder, as_json)


@click.command()
@configured
def reload(read: Configuration) -> None:
    """Make the daemon read its configuration again. Exit status 78 when it is refused, 1 when a listener is not as in the file
    before a restart."""
    peer = connect(read)
    answer = asked(peer, "reload")
    say(*answer.split("\n"))
    if not answer.startswith("reloaded"):
        raise SystemExit(78)
    if any(line.startswith("listener ") for line in answer.split("\n")):
        raise SystemExit(1)
