"""`relaymta status|queue|reload`: look into the running daemon and change its queue.

With the daemon stopped, reading verbs read the spool themselves, holding its lock.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import click

from relaymta.cli.peer import Daemon, Offline, as_json, asked, connect, size, table, when
from relaymta.cli.serve import configured, fail
from relaymta.config import Config

__all__ = ["queue", "reload", "status"]


@click.command()
@as_json
@configured
def status(read: Callable[..., Config], as_json: bool) -> None:
    """What the daemon is doing."""
    peer = connect(read)
    found = asked(peer, "status")
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"relaymta, pid {found['pid']}, listening on {', '.join(found['listeners'])}")
    click.echo(f"spool {found['spool']}; {found['durability']}; metrics on {found['metrics']}")
    rows = [
        [str(w["worker"]), "ready" if w["ready"] else "starting", str(w.get("pid", "")), str(w.get("connections", "")),
         str(w.get("in flight", "")), "full" if w.get("full") else "stalled" if w.get("stalled") else "ok"]
        for w in found["workers"]
    ]  # fmt: skip
    table("", ["worker", "state", "pid", "connections", "in flight", "store"], rows)
    for worker in found["workers"]:
        for site, reason in worker.get("sites down", {}).items():
            click.echo(f"{site} is down: {reason}")


@click.group()
def queue() -> None:
    """Look into the queue and change it."""


@queue.command()
@as_json
@configured
def summary(read: Callable[..., Config], as_json: bool) -> None:
    """One line for each queue that holds mail."""
    rows = asked(connect(read), "summary")
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo("the queue is empty")
        return
    table("", ["queue", "messages", "size", "deferred", "held", "next"], [
        [r["queue"], str(r["messages"]), size(r["bytes"]), str(r["deferred"]), str(r["held"]), when(r["next"])] for r in rows
    ])  # fmt: skip


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--queue", "queue_name", default="", metavar="NAME", help="In this queue, as `queue summary` names it."),
        click.option("--from", "sender", default="", metavar="ADDRESS", help="From this sender."),
        click.option("--domain", default="", metavar="DOMAIN", help="With a recipient in this domain."),
        click.option("--held", is_flag=True, help="Held messages only."),
    ):
        function = option(function)
    return function


def _pages(peer: Daemon | Offline, chosen: dict[str, Any]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    cursor: list[int] = []
    while True:
        page = asked(peer, "page", cursor=cursor, chosen=chosen)
        yield page["shard"], page["rows"]
        cursor = page["cursor"]
        if not cursor:
            return


def _chosen(queue_name: str, sender: str, domain: str, held: bool, ident: str = "") -> dict[str, Any]:
    from relaymta.queue.ident import parse_id

    try:
        number = parse_id(ident) if ident else 0
    except ValueError as error:
        fail(64, str(error))
    return {"queue": queue_name, "sender": sender, "recipient_domain": domain, "held": held, "ident": number}


@queue.command(name="list")
@_filters
@as_json
@configured
def list_messages(read: Callable[..., Config], as_json: bool, queue_name: str, sender: str, domain: str, held: bool) -> None:
    """The messages, oldest first. --json: one object a line, for any number of them."""
    peer = connect(read)
    chosen = _chosen(queue_name, sender, domain, held)
    count = 0
    for _, rows in _pages(peer, chosen):
        count += len(rows)
        for row in rows:
            if as_json:
                click.echo(json.dumps(row))
            else:
                click.echo(_line(row))
    if not count and not as_json:
        click.echo("no such messages" if any(chosen.values()) else "the queue is empty")


def _line(row: dict[str, Any]) -> str:
    waiting = [r for r in row["recipients"] if r["state"] == "pending"] or row["recipients"]
    more = f" +{len(waiting) - 1}" if len(waiting) > 1 else ""
    last = f"\n{'':15}{waiting[0]['last']}" if waiting[0]["last"] else ""
    return (
        f"{row['id']}  {size(row['size']):>9}  {when(row['arrived']):>12}  {row['state']:<9}  next {when(row['next']):<12}"
        f"  <{row['sender']}> -> <{waiting[0]['address']}>{more}{last}"
    )


@queue.command(name="show")
@click.argument("name")
@as_json
@configured
def show_queue(read: Callable[..., Config], name: str, as_json: bool) -> None:
    """One queue, by the name that `queue summary` shows."""
    rows = [row for row in asked(connect(read), "summary") if row["queue"] == name]
    if not rows:
        fail(1, f"no mail in a queue named {name!r} (`relaymta queue summary` names them)")
    if as_json:
        click.echo(json.dumps(rows[0]))
        return
    for key, value in rows[0].items():
        click.echo(f"{key:>9}: {when(value) if key == 'next' else size(value) if key == 'bytes' else value}")


def _verb(verb: str, sentence: str, *more: Any) -> click.Command:
    """A verb that changes messages. `more`: options of its own; one of them sets `word`."""

    def own(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in more:
            function = option(function)
        return function

    @queue.command(name=verb, help=sentence)
    @own
    @click.argument("ids", nargs=-1)
    @click.option("--all", "everything", is_flag=True, help="Every message.")
    @click.option("--dry-run", is_flag=True, help="Only say how many messages are meant.")
    @_filters
    @as_json
    @configured
    def command(
        read: Callable[..., Config], ids: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool,
        queue_name: str, sender: str, domain: str, held: bool, word: str = "",
    ) -> None:  # fmt: skip
        if not (ids or everything or queue_name or sender or domain or held):
            fail(
                64,
                f"which messages? Give ids, a filter (--queue, --from, --domain, --held), or --all: relaymta queue {verb} --help",
            )
        peer = connect(read)
        if isinstance(peer, Offline):
            fail(69, "the daemon is not running; the queue is read-only (start it with `relaymta serve`)")
        matched = changed = flying = 0
        for chosen in [_chosen(queue_name, sender, domain, held, ident) for ident in ids or ("",)]:
            for shard, rows in _pages(peer, chosen):
                matched += len(rows)
                idents = [row["id"] for row in rows]
                for start in range(0, 0 if dry_run else len(idents), 1000):
                    one, two = asked(peer, "change", verb=verb, shard=shard, idents=idents[start : start + 1000], word=word)
                    changed += one
                    flying += two
        if as_json:
            click.echo(json.dumps({"matched": matched, "changed": changed, "in_flight": flying, "dry_run": dry_run}))
        elif dry_run:
            click.echo(f"{verb}: {matched} messages are meant; nothing was changed")
        else:
            text = f"; {flying} in flight were left to their outcome" if flying else ""
            click.echo(f"{verb}: {changed} of {matched} messages changed{text}")

    return command


_verb("flush", "Try these messages now.")
_verb("hold", "Keep these messages until they are released: not tried, not expired.")
_verb("release", "Put held messages back on their schedule, due now, with a new deadline.")
_verb("delete", "Delete these messages. The sender is not told.")
_verb(
    "bounce",
    "Give these messages up; each sender is told, with the reason.",
    click.option("--reason", "word", default="returned by the operator", help="What the notice says."),
)
_verb(
    "reroute",
    "Send these messages by another route from now on, whatever the route table says; due now.",
    click.option("--to", "word", required=True, metavar="ROUTE", help="The route's name."),
)


@click.command()
@configured
def reload(read: Callable[..., Config]) -> None:
    """Let the daemon read its configuration again."""
    peer = connect(read)
    answer = asked(peer, "reload")
    click.echo(answer)
    if not answer.startswith("reloaded"):
        raise SystemExit(78)
