"""`relaymta standing`: orders about mail that hold for a while, for what waits and for what is still to come."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.peer import Offline, as_json, asked, connect, when
from relaymta.cli.queue import change, pages
from relaymta.cli.serve import configured, fail
from relaymta.config import Config, parse_duration

__all__ = ["standing"]

# What becomes of mail, and the verb for what waits already: its turn comes at once, and with it the order.
ORDERS = {"hold": ("held", "order"), "bounce": ("returned to its sender", "flush")}


@click.group()
def standing() -> None:
    """Orders about mail that hold for a while: hold it, or return it. For mail that waits, and for what is still to come."""


def _seconds(duration: str, until: str) -> float:
    """How long an order stands."""
    if not until:
        try:
            return parse_duration(duration)
        except ValueError as error:
            fail(64, f"--for {duration}: expected {error}")
    try:
        clock = datetime.strptime(until, "%H:%M").time()
    except ValueError:
        fail(64, f'--until {until}: expected a time of day such as "18:00"')
    now = datetime.now().astimezone()
    moment = datetime.combine(now.date(), clock, now.tzinfo)
    return ((moment if moment > now else moment + timedelta(days=1)) - now).total_seconds()


def _give(kind: str, sentence: str, reason: str) -> None:
    @standing.command(name=kind, help=sentence)
    @click.option("--app", "application", default="", metavar="APP", help="Mail of this application.")
    @click.option("--route", default="", metavar="NAME", help="Mail that goes by this route.")
    @click.option("--queue", default="", metavar="NAME", help="Mail in this queue, as `queue summary` names it.")
    @click.option("--from", "sender", default="", metavar="ADDRESS", help="Mail from this sender.")
    @click.option("--domain", "recipient_domain", default="", metavar="DOMAIN", help="Mail to this domain.")
    @click.option("--for", "duration", default="1h", metavar="DURATION", help="How long, such as 30m; default 1h.")
    @click.option("--until", default="", metavar="HH:MM", help="Until this time of day (local time), instead of --for.")
    @click.option("--reason", default=reason, help="Shown wherever somebody asks why; of a bounce, what the notice says.")
    @click.option("--dry-run", is_flag=True, help="Only say how many messages that wait now are meant.")
    @configured
    def command(
        read: Callable[..., Config], duration: str, until: str, reason: str, dry_run: bool, **chosen: str
    ) -> None:  # fmt: skip
        given = {key: value for key, value in chosen.items() if value}
        if not given:
            fail(64, f"which mail? Give --app, --route, --queue, --from or --domain: relaymta standing {kind} --help")
        if any(" " in value for value in given.values()):
            fail(64, "a standing order cannot be about a name with a space in it")
        seconds = _seconds(duration, until)
        about = " ".join(f"{key}={value}" for key, value in sorted(given.items()))
        peer = connect(read)
        if isinstance(peer, Offline):
            fail(69, "the daemon is not running (start it with `relaymta serve`)")
        done, verb = ORDERS[kind]
        if dry_run:
            count = sum(len(idents) for _, idents, _ in pages(peer, given))
            say(f"{count} messages that wait now would be {done}, and whatever comes; nothing was changed")
            return
        asked(peer, "order", kind=kind, about=about, seconds=seconds, reason=reason)
        found = change(peer, verb, [given], dry_run)
        ends = when(time.time() + seconds)
        say(f"mail with {about} is {done}, ends {ends}; {found['changed']} messages that waited were {done}")
        say(f'`relaymta standing remove {kind} "{about}"` ends it')


_give("hold", "Hold mail: not tried, not expired, until the order ends; then it goes.", "told to")
_give("bounce", "Return mail to its senders.", "returned by the operator")


@standing.command(name="list")
@as_json
@configured
def list_orders(read: Callable[..., Config], as_json: bool) -> None:
    """The orders that stand."""
    orders = [fact for fact in asked(connect(read), "facts") if fact["kind"] in ORDERS]
    if as_json:
        say_json([_order(fact) for fact in orders])
        return
    for fact in orders:
        say(f"{fact['kind']} {fact['site']}, since {when(fact['since'])}, ends {when(fact['until'])}: {fact['reason']}")
    if not orders:
        say("no order stands")


def _order(fact: dict[str, Any]) -> dict[str, Any]:
    return {"kind": fact["kind"], "about": fact["site"], **{key: fact[key] for key in ("since", "until", "by", "reason")}}


@standing.command()
@click.argument("kind", type=click.Choice(list(ORDERS)))
@click.argument("about")
@configured
def remove(read: Callable[..., Config], kind: str, about: str) -> None:
    """End an order, by its kind and the mail that it is about, as `standing list` shows them. What it held goes."""
    if not asked(connect(read), "clear", kind=kind, site=about, about="", resume=False):
        fail(1, f"no order to {kind} {about} stands (`relaymta standing list`)")
    say(f"the order to {kind} {about} has ended")
