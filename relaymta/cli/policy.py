"""`relaymta policy`: hold and bounce policies, for mail in the queue and for mail that arrives while they are in effect; and
`policy test`, of hooks in Python."""

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from relaymta.cli.console import record, say, say_json
from relaymta.cli.options import Configuration, configured, fail, files, folders, group
from relaymta.cli.peer import (
    Daemon,
    GivenPath,
    Offline,
    absent,
    as_json,
    asked,
    connect,
    given,
    given_domain,
    given_sender,
    no_such,
    routes,
    seconds_of,
    until,
    when,
)
from relaymta.cli.queue import change, pages

__all__ = ["POLICIES", "about_mail", "enact", "policy", "shown_policy", "standing"]

# What happens to mail, and the verb of the queue that applies the policy to queued mail: it is held, or due at once.
POLICIES = {"hold": ("held", "policy"), "bounce": ("returned to its sender", "flush")}


@group
def policy() -> None:
    """Hold or bounce mail for a time, both queued and new mail."""


def _seconds(duration: str, clock: str) -> float:
    """The duration of a policy in seconds, from --for or --until; ends the program if they are malformed."""
    if not clock:
        return seconds_of("--for", duration, least=0.001)
    try:
        time_of_day = datetime.strptime(clock, "%H:%M").time()
    except ValueError:
        fail(64, f'--until {clock}: expected a time of day such as "18:00"')
    now = datetime.now().astimezone()
    moment = datetime.combine(now.date(), time_of_day, now.tzinfo)
    return ((moment if moment > now else moment + timedelta(days=1)) - now).total_seconds()


def _add(kind: str, sentence: str, reason: str) -> None:
    @policy.command(name=kind, help=sentence)
    @click.option("--app", "application", default="", callback=given, metavar="APP", help="Mail of this application.")
    @click.option("--user", default="", callback=given, metavar="NAME", help="Mail of who logged in as this user.")
    @click.option("--route", default="", callback=given, metavar="NAME", help="Mail with this route.")
    @click.option("--queue", default="", callback=given, metavar="NAME", help="Mail in this queue, as `queue summary` names it.")
    @click.option("--from", "sender", default="", callback=given_sender, metavar="ADDRESS", help="Mail from this sender.")
    @click.option(
        "--domain", "recipient_domain", default="", callback=given_domain, metavar="DOMAIN", help="Mail to this domain."
    )
    @click.option("--for", "duration", default="1h", metavar="DURATION", help="How long, such as 30m; default 1h.")
    @click.option("--until", "clock", default="", metavar="HH:MM", help="Until this time of day (local time), instead of --for.")
    @click.option("--reason", default=reason, help="Shown by `explain` and `list`; of a bounce policy, also in the DSN.")
    @click.option("--dry-run", is_flag=True, help="Only count the queued messages that match.")
    @configured
    def command(
        read: Configuration, duration: str, clock: str, reason: str, dry_run: bool, **chosen: str
    ) -> None:  # fmt: skip
        given = {key: value for key, value in chosen.items() if value}
        if not given:
            fail(64, f"which mail? Give --app, --user, --route, --queue, --from or --domain: relaymta policy {kind} --help")
        about = about_mail(given)
        seconds = _seconds(duration, clock)
        peer = connect(read)
        if isinstance(peer, Offline):
            fail(69, "the daemon is not running (start it with `relaymta serve`)")
        if given.get("route") and given["route"] not in (known := routes(peer)):
            absent(no_such("route", given["route"], known))
        done, _ = POLICIES[kind]
        if dry_run:
            count = sum(len(idents) for _, idents, _ in pages(peer, given))
            say(f"{count} queued messages would be {done}, and new mail that matches; nothing was changed")
            return
        found = enact(peer, kind, given, seconds, reason)
        ends = until(time.time() + seconds)
        say(f"mail with {about} is {done} {ends}; {found['changed']} queued messages were {done}")
        say(f'`relaymta policy remove {kind} "{about}"` ends it')


def about_mail(given: dict[str, str]) -> str:
    """The conditions of a policy, in its own form."""
    if any(" " in value for value in given.values()):
        fail(64, "the conditions of a policy must not have spaces in them")
    return " ".join(f"{key}={value}" for key, value in sorted(given.items()))


def enact(peer: Daemon, kind: str, given: dict[str, str], seconds: float, reason: str, outside: bool = False) -> dict[str, Any]:
    """Set a policy, and apply it to queued mail, or only what is `outside` the quarantine: as of `queue.change`."""
    about = about_mail(given)
    asked(peer, "policy", kind=kind, about=about, seconds=seconds, reason=reason)
    return change(peer, POLICIES[kind][1], [given | ({"outside": True} if outside else {})], False, about)


_add("hold", "Hold mail: no attempts, no expiry, until the policy ends.", "held by the operator")
_add("bounce", "Bounce mail: return it to its senders.", "returned by the operator")


@policy.command(name="list")
@as_json
@configured
def list_policies(read: Configuration, as_json: bool) -> None:
    """List the policies in effect."""
    policies = [state for state in asked(connect(read), "site_states") if state["kind"] in POLICIES]
    if as_json:
        for state in policies:
            say_json(shown_policy(state))
        return
    for state in policies:
        record(f"{state['kind']} {state['site']}, since {when(state['since'])}, {until(state['until'])}: {state['reason']}")
    if not policies:
        say("no policy is in effect", err=True)


def shown_policy(state: dict[str, Any]) -> dict[str, Any]:
    """A policy, from its site state."""
    return {"kind": state["kind"], "about": state["site"], **{key: state[key] for key in ("since", "until", "by", "reason")}}


@policy.command()
@click.argument("kind", type=click.Choice(list(POLICIES)))
@click.argument("about")
@configured
def remove(read: Configuration, kind: str, about: str) -> None:
    """End a policy, by its kind and the mail that it is about, as `policy list` shows them. Mail that it held is released."""
    if not asked(connect(read), "clear", kind=kind, site=about, about="", resume=False):
        absent(no_such("policy", f"{kind} {about}", hint="`relaymta policy list` names those in effect"))
    say(f"the policy to {kind} {about} has ended")


@policy.command()
@click.argument("folder", type=GivenPath(path_type=Path, exists=True, file_okay=False), metavar="DIR", shell_complete=folders)
@click.option(
    "--file", default=None, type=GivenPath(path_type=Path, dir_okay=False), shell_complete=files,
    help="Test these hooks, instead of those of the configuration.",
)  # fmt: skip
@click.option("--only", default="", callback=given, metavar="FILTER", help="Test the hooks of this filter.")
@as_json
@configured
def test(read: Configuration, folder: Path, file: Path | None, only: str, as_json: bool) -> None:
    """Call hooks in Python (docs/hooks.md) with the cases in DIR/**/*.toml, and compare what they answer.

    They run in a process of their own, as in the relay, which need not run. Exit status 1 when a case fails, 78 when the hooks or
    the cases cannot be read."""
    from relaymta.cli import cases  # the other verbs do without

    cases.run(cases.chosen(read, file, only), folder, as_json)


def _warn() -> None:
    say("relaymta: 'standing' is called 'policy' now and will go", err=True)


# The name of 0.1, kept for one version.
standing = click.Group("standing", commands=policy.commands, callback=_warn, help=policy.help, hidden=True)
