"""`relaymta site` and `relaymta shaping`: the sites that mail is sent to, their limits, and decisions about them."""

import shlex
from pathlib import Path
from typing import Any

import click

from relaymta.cli.console import record, say, say_json, table
from relaymta.cli.options import ANY_LISTENER, Configuration, absolute, configured, fail, group, loaded, missing
from relaymta.cli.peer import Daemon, Offline, absent, as_json, asked, connect, counted, given, no_such, seconds_of, until, when
from relaymta.cli.queue import KINDS, SITES, is_named, names_of_sites
from relaymta.errors import near

__all__ = ["counted_name", "end_suspension", "note_suspensions", "shaping", "site"]


@group
def site() -> None:
    """The sites that mail is sent to."""


@site.command(name="list")
@as_json
@configured
def list_sites(read: Configuration, as_json: bool) -> None:
    """List the sites that have mail or connections now, one a line."""
    peer = connect(read)
    rows = asked(peer, "sites")
    note_suspensions(rows, asked(peer, "site_states"))
    if as_json:
        for row in rows:
            say_json(row)
        return
    if not rows:
        say("no site has mail or connections now", err=True)
        return
    lines = [
        [
            row["pool"], row["state"], str(row["waiting"]), str(row["deferred"]), str(row["in flight"]),
            f"{row['connections']} of {row['limits']['connections']['value']:g}", f"{row['rate']:.0f}/s", row["reason"],
        ]
        for row in rows
    ]  # fmt: skip
    table("", ["site", "state", "waiting", "deferred", "in flight", "conns", "rate", "reason"], lines)


def note_suspensions(rows: list[dict[str, Any]], states: list[dict[str, Any]]) -> None:
    """Give the sites that are suspended that state."""
    found = {state["site"]: state for state in states if state["kind"] == "suspended" and not state["about"]}
    for row in rows:
        if row["site"] in found:
            row |= {"state": "suspended", **{key: found[row["site"]][key] for key in ("reason", "until")}}


def _rows_of(read: Configuration, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, states) of the sites with this name; ends the program when there are none."""
    peer = connect(read)
    rows = [row for row in asked(peer, "sites") if is_named(row, name)]
    names = {name, *(row["pool"] for row in rows), *(row["site"] for row in rows)}
    states = [state for state in asked(peer, "site_states") if state["site"] in names]
    note_suspensions(rows, states)
    if not rows and not states:
        absent(no_such("site", name, names_of_sites(peer), SITES))
    return rows, states


@site.command()
@click.argument("name")
@as_json
@configured
def show(read: Configuration, name: str, as_json: bool) -> None:
    """Show one site: its hosts, its connections and their state, its limits and where each comes from."""
    rows, states = _rows_of(read, name)
    if as_json:
        say_json({"sites": rows, "states": states, "facts": states})
        return
    for row in rows:
        say(f"{row['pool']}: {row['state']}" + (f" {until(row['until'])}: {row['reason']}" if row["reason"] else ""))
        say(f"  hosts: {', '.join(row['hosts'])}" + (f"; from {row['source']}" if row["source"] else ""))
        for host, reason in row["hosts down"].items():
            say(f"  {host} is down: {reason}")
        counts = f"{row['waiting']} wait, {row['deferred']} deferred, {row['in flight']} in flight"
        opening = f" ({row['opening']} being opened)" if row["opening"] else ""
        say(f"  {counts}, {row['connections']} connections{opening}, {row['rate']:.0f}/s")
        for session in row["sessions"]:
            say(f"    {session['peer']}: awaits {session['awaits']}, {session['messages']} messages so far")
        _show_limits(row)
    _show_states(states)


def _show_limits(row: dict[str, Any]) -> None:
    say(f"  limits (counted as {row['site']}):")
    for name, limit in row["limits"].items():
        say(f"    {name:<24} {limit['value']:g}  ({limit['origin']})" if limit["value"] else f"    {name:<24} none")


@site.command()
@click.argument("name")
@as_json
@configured
def limits(read: Configuration, name: str, as_json: bool) -> None:
    """Show the limits of one site that are in effect now, and where each comes from."""
    rows, _ = _rows_of(read, name)
    if as_json:
        say_json({row["pool"]: row["limits"] for row in rows})
        return
    for row in rows:
        say(row["pool"])
        _show_limits(row)


def counted_name(rows: list[dict[str, Any]], name: str) -> str:
    """The name under which the site is counted that has this name, or this host, in the rows of `site list`; ends the program
    where it is that of several. One that has no mail now keeps its name."""
    found = {row["site"] for row in rows if is_named(row, name)}
    if name in found or not found:
        return name
    if len(found) > 1:
        fail(64, f"{name} belongs to several sites: {', '.join(sorted(found))}: name one of them")
    return str(found.pop())


@site.command()
@click.argument("name", default="", callback=given)
@click.option("--for", "duration", default="1h", metavar="DURATION", help="How long, such as 30m; default 1h.")
@click.option("--app", "application", default="", callback=given, help="Only mail of this application.")
@click.option("--reason", default="suspended by the operator", help="The reason, shown by `explain` and `shaping active`.")
@configured
def suspend(read: Configuration, name: str, duration: str, application: str, reason: str) -> None:
    """Send nothing to a site (by the name that its limits are counted by) for a time; without NAME, nothing of --app to any site.
    This survives a restart."""
    if not name and not application:
        fail(64, "which site? Give its name (`relaymta site list`), or --app for an application's mail to all of them")
    seconds, peer = seconds_of("--for", duration, least=0.001), connect(read)
    rows = asked(peer, "sites") if name else []
    known = names_of_sites(peer, rows) if name else set()
    done = asked(peer, "suspend", site=counted_name(rows, name), about=application, seconds=seconds, reason=reason)
    if name and done["site"] == name and not done["known"] and name not in known:
        where = "on the workers that answer" if missing() else "now"  # not refused: in an outage suspensions are needed
        say(f"note: no site {name} has mail or connections {where}{near(name, known)}", err=True)
    name = _shown_as(name, done["site"])
    whose = f"mail of {application} " if application else "mail "
    about = [shlex.quote(name)] if name else []
    about += ["--app", shlex.quote(application)] if application else []
    again = " ".join(["relaymta site resume", *about])
    shown = duration.strip() + ("s" if duration.strip().isdigit() else "")
    say(f"{whose}to {name or 'all sites'} is suspended for {shown} (`{again}` ends it)")


@site.command()
@click.argument("name", default="", callback=given)
@click.option("--app", "application", default="", callback=given, help="End the suspension of this application's mail.")
@configured
def resume(read: Configuration, name: str, application: str) -> None:
    """Resume sending to a suspended or dead site, now."""
    if not name and not application:
        fail(64, "which site? Give its name (`relaymta shaping active` lists what is suspended), or --app")
    peer = connect(read)
    rows = asked(peer, "sites") if name else []
    mine = [row for row in rows if is_named(row, name)]
    done, counted_as = end_suspension(peer, rows, name, application)
    name = _shown_as(name, counted_as)
    if not done:
        if name and not mine and name not in (known := names_of_sites(peer, rows)):
            absent(no_such("site", name, known, SITES))
        about = " ".join(filter(None, (name, f"--app {application}" if application else "")))
        absent(no_such("suspension", about, hint="`relaymta shaping active` lists what is suspended"))
    say(f"{f'mail of {application} to ' if application else ''}{name or 'all sites'} is resumed")


def end_suspension(peer: Daemon | Offline, rows: list[dict[str, Any]], name: str, application: str) -> tuple[int, str]:
    """End what keeps mail from a site ("": of an application from all sites): (how many states were removed, the name by which
    the site is counted where that is how one was found, else `name`). `rows`: those of `site list`."""
    done = asked(peer, "clear", kind="", site=name, about=application, resume=True)
    mine = [row for row in rows if is_named(row, name)]
    if not application:  # sites that are down are known by their pools
        done += sum(asked(peer, "clear", kind="dead", site=row["pool"], about="", resume=False) for row in mine)
    if not done and mine:
        counted_as = counted_name(rows, name)
        done += asked(peer, "clear", kind="suspended", site=counted_as, about=application, resume=False)
        name = counted_as if done else name
    return done, name


def _shown_as(name: str, counted_as: str) -> str:
    """The name by which a site is counted; a note says so where it is not the given one."""
    if counted_as != name:
        say(f"note: {name} is counted as {counted_as}", err=True)
    return counted_as


@group
def shaping() -> None:
    """Show and clear decisions about sites: by operators, by rules about replies, and learned from replies."""


@shaping.command()
@as_json
@configured
def active(read: Configuration, as_json: bool) -> None:
    """List all suspensions, slow-downs, dead sites and learned limits in effect now."""
    states = [state for state in asked(connect(read), "site_states") if state["kind"] in KINDS]
    if as_json:
        for state in states:
            say_json(state)
    elif not states:
        say("nothing is suspended, slowed down, dead or learned", err=True)
    else:
        _show_states(states)


def _show_states(states: list[dict[str, Any]]) -> None:
    for state in states:
        about = f" ({state['about']})" if state["about"] else ""
        reply = f"; after: {state['reply']}" if state["reply"] and state["reply"] != state["reason"] else ""
        by = "automatically" if state["by"] == "automatic" else f"by {state['by']}"
        what = f"{state['kind']} {until(state['until'])} {by}"
        record(f"{state['site'] or 'all sites'}{about} {what}: {state['reason']}{reply}")


@shaping.command()
@click.argument("name", required=False, default="", callback=given)
@click.option("--all", "everything", is_flag=True, help="Of all sites.")
@click.option("--kind", type=click.Choice(KINDS), help="Only decisions of this kind.")
@click.option("--dry-run", is_flag=True, help="Only count the decisions that match.")
@configured
def clear(read: Configuration, name: str, everything: bool, kind: str | None, dry_run: bool) -> None:
    """Remove the decisions about a site (or all sites); new replies may lead to the same ones."""
    if not name and not everything:
        fail(64, "which site? Give its name, or --all")
    peer = connect(read)
    kinds = [kind] if kind else KINDS
    mine = [row for row in asked(peer, "sites") if is_named(row, name)] if name else []
    names = {name, *(row[key] for row in mine for key in ("pool", "site"))}
    states = [f for f in asked(peer, "site_states") if (everything or f["site"] in names) and f["kind"] in kinds]
    if name and not states and not mine and name not in (known := names_of_sites(peer)):
        absent(no_such("site", name, known, SITES))
    if dry_run:
        say(f"{counted(len(states), 'decision matches', 'decisions match')}; nothing was changed")
        return
    for state in states:
        asked(peer, "clear", kind=state["kind"], site=state["site"], about=state["about"], resume=False)
    say(f"{counted(len(states), 'decision was', 'decisions were')} removed")


@shaping.command()
@click.argument("name")
@as_json
@configured
def why(read: Configuration, name: str, as_json: bool) -> None:
    """Show the reply that caused each decision about a site, its time, and when the decision ends."""
    _, states = _rows_of(read, name)
    if as_json:
        for state in states:
            say_json(state)
        return
    if not states:
        say(f"there is no decision about {name}", err=True)
    for state in states:
        about = f" {state['about']}" if state["about"] else ""
        say(f"{state['kind']}{about}: {state['reason']} (by {state['by']})")
        say(f"  since {when(state['since'])}, {until(state['until'])}; the reply: {state['reply'] or '-'}")


@shaping.command()
@as_json
@configured
def diff(read: Configuration, as_json: bool) -> None:
    """Show what has changed in the provider profiles since the version used before."""
    from relaymta.node import PROFILES, PROFILES_BEFORE
    from relaymta.route.shaping import differences, read_profiles
    from relaymta.route.shaping import profiles as shipped

    spool = Path(loaded(read, ANY_LISTENER).spool)
    used = [path for path in (spool / "node" / name for name in (PROFILES, PROFILES_BEFORE)) if path.exists()]
    now = shipped()
    earlier = [kept for path in used if (kept := read_profiles(path.read_text(encoding="utf-8"))) != now]
    changes = differences(earlier[0], now) if earlier else []
    if as_json:
        say_json({"before": earlier[0].version if earlier else "", "now": now.version, "changes": changes})
    elif not earlier:
        say(f"no other profiles than those of {now.version} have been used in {absolute(spool)}")
    else:
        say(f"provider profiles of {earlier[0].version} -> {now.version}")
        for line in changes:
            say(f"  {line}")


@shaping.command()
@as_json
@configured
def profiles(read: Configuration, as_json: bool) -> None:
    """Show the provider profiles of this version of relaymta."""
    from relaymta.route.shaping import profiles as shipped
    from relaymta.route.shaping import rule_text

    found = shipped()
    if as_json:
        say_json({"version": found.version, "sites": [s.model_dump(exclude_none=True) for s in found.sites],
                  "rules": [r.model_dump(by_alias=True) for r in found.rules]})  # fmt: skip
        return
    say(f"provider profiles of {found.version}")
    for one in found.sites:
        limits = [f"{k} {v:g}" for k, v in one.model_dump(exclude_none=True).items() if k not in ("name", "hosts")]
        say(f"  {one.name}: {', '.join(one.hosts)}: {', '.join(limits)}")
    for rule in found.rules:
        say(f"  {rule_text(rule)}")
