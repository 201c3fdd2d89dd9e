"""`relaymta doctor`: whether this machine, the configuration and the running relay are as they should be (the checks:
doctor_checks.py), and whether a domain's mail from here would pass those of other servers."""

import asyncio
import ipaddress
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from relaymta.cli import spf as records
from relaymta.cli.console import say_json, table
from relaymta.cli.dkim import checked
from relaymta.cli.doctor_names import default_addresses, reverse
from relaymta.cli.doctor_scene import Row, Scene, relays_user, status_of
from relaymta.cli.doctor_ways import PROBE_DOMAIN
from relaymta.cli.options import ANY_LISTENER, Configuration, config_path, configured, fail, loaded
from relaymta.cli.peer import as_json, given
from relaymta.config import Config, load, notes, parse_hostport
from relaymta.errors import ConfigError
from relaymta.proto.address import in_a_labels, is_host
from relaymta.route import shaping
from relaymta.route.table import map_notes, unnamed
from relaymta.supervisor.checks import made_by_root

if TYPE_CHECKING:
    from relaymta.dns import Resolver

__all__ = ["addresses_of", "doctor"]


@click.group(invoke_without_command=True)
@click.option("--offline", is_flag=True, help="Leave out what sends packets to other hosts.")
@click.option(
    "--probe-host",
    default="",
    callback=given,
    metavar="HOST[:PORT]",
    help=f"Where port 25 is tried, if mail goes to the MX. Default: an MX of {PROBE_DOMAIN}.",
)
@click.option("--dnsbl", is_flag=True, help="Ask lists in the DNS about the addresses that mail is sent from.")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="IP",
    help="Address that others see mail come from; repeatable. Default: the [[source]] addresses, else the system's.",
)
@as_json
@configured
@click.pass_context
def doctor(
    context: click.Context, read: Configuration, offline: bool, probe_host: str, dnsbl: bool, addresses: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Check what runs here; with a subject, what other servers see of this one. Exit status 1 when something is wrong.

    Each row says what was found, and the cure. Root checks with the rights of the relay's user. No mail is sent, and nobody logs
    in."""
    others = {"--offline": offline, "--probe-host": probe_host, "--dnsbl": dnsbl, "--address": addresses, "--json": as_json}
    if context.invoked_subcommand is not None:
        for option in (name for name, value in others.items() if value):
            fail(64, f"doctor: give {option} behind {context.invoked_subcommand}, if it has that")
        return
    from relaymta.cli.doctor_checks import results

    if probe_host:
        _check_host(probe_host)
    scene = _scene(read)
    _report(results(replace(
        scene, offline=offline, dnsbl=dnsbl, probe_host=probe_host, addresses=tuple(_parsed(addresses))
    )), as_json)  # fmt: skip


def _check_host(text: str) -> None:
    try:
        parse_hostport(text, 25)
    except ValueError as error:
        fail(64, f"--probe-host {text}: {error}")


def _parsed(addresses: tuple[str, ...]) -> list[str]:
    try:
        return [str(ipaddress.ip_address(text)) for text in addresses]
    except ValueError as error:
        fail(64, f"--address: {error}")


def _scene(read: Configuration) -> Scene:
    """What there is to check: the configuration, with whatever is wrong with it, and the running relay."""
    config, problems = _configuration(read)
    told = status_of(config.control_path if config is not None else read.control_path())
    control = config.control_path if config is not None else read.control_path()
    if config is None:
        config = load(None, ANY_LISTENER)
        return Scene(config, False, tuple(problems), options=read.options, control=control, told=told)
    try:
        user, by_root = relays_user(config, told), made_by_root(config)
    except ConfigError as error:
        cure = "create it (`adduser --system --group NAME`), or correct the key"
        problems = [f"{sentence}: {cure}" for sentence in config.located(error.problems)]
        return Scene(config, False, tuple(problems), options=read.options, control=control, told=told)
    rights = user is None or os.geteuid() in (0, user.pw_uid)
    notes_found = [*notes(config), *map_notes(config), *unnamed(config), *shaping.check(config)]
    return Scene(
        config, True, (), tuple(notes_found), read.options, control, told, user, rights, frozenset(by_root)
    )  # fmt: skip


def _configuration(read: Configuration) -> tuple[Config | None, list[str]]:
    """The configuration, if there is a valid one, and what is wrong with it. Without a file, listeners need not be given."""
    no_file = config_path() is None
    if no_file and not read.options:
        return None, []
    try:
        return read(), []
    except ConfigError as error:
        problems = error.problems
    if no_file:
        try:
            return read(ANY_LISTENER).model_copy(update={"listener": []}), []
        except ConfigError:
            pass
    return None, problems


@doctor.command()
@click.argument("name", metavar="DOMAIN")
@click.option(
    "--address", "addresses", multiple=True, metavar="IP",
    help="Address to send from; repeatable. Default: the [[source]] addresses, else the one that the system uses.",
)  # fmt: skip
@as_json
@configured
def domain(read: Configuration, name: str, addresses: tuple[str, ...], as_json: bool) -> None:
    """Check whether mail of DOMAIN sent from here would pass SPF, DKIM and DMARC, and whether the names of our addresses match.
    Where its routes have smart hosts, receivers see these instead of our addresses. Exit status 1 when a check fails."""
    config = loaded(read, ANY_LISTENER)
    chosen = _parsed(addresses)
    given_name, name = name, in_a_labels(name).rstrip(".")
    if not is_host(f"a.{name}"):  # of one label, too
        fail(64, f"{given_name!r} is not a domain name")
    ways = records.ways(config, name)
    ours = [] if ways and all(way.host for way in ways) else addresses_of(config)  # else it never leaves from an address of ours
    _report(asyncio.run(_checks(config, name, chosen or ours, ways)), as_json)


def _report(rows: list[Row], as_json: bool) -> None:
    if as_json:
        for row in rows:
            say_json(dict(zip(("check", "state", "found"), row, strict=True)))
    else:
        table("", ["check", "state", "found"], [list(row) for row in rows])
    if any(state == "wrong" for _, state, _ in rows):
        raise SystemExit(1)


def addresses_of(config: Config) -> list[str]:
    """The addresses that mail is sent from: the [[source]] ones, else those that the system uses; none where it has none."""
    return [source.address for source in config.source] or default_addresses()


async def _checks(config: Config, name: str, addresses: list[str], ways: list[records.Way]) -> list[Row]:
    from relaymta.dns import Resolver

    resolver = Resolver(config.delivery.nameservers)
    try:
        names = {source.address: source.hostname or config.hostname for source in config.source}
        rows: list[Row] = []
        aligned = False
        for address in addresses:
            hostname = names.get(address, config.hostname)
            rows += await reverse(resolver, address, hostname)
            row, good = await _spf(resolver, address, name, hostname)
            rows.append(row)
            aligned = aligned or good
        for way in ways:
            if way.note or way.host:
                row, good = await _spf_of_smart_host(resolver, way, name)
                rows.append(row)
                aligned = aligned or good
        if not addresses and not any(way.host for way in ways):
            rows.append(("address", "wrong", "the address that mail would be sent from is unknown: give --address"))
        keys = await checked(config.model_copy(update={"dkim": [one for one in config.dkim if one.domain == name]}))
        rows += [(f"DKIM {row['record']}", "ok" if row["state"] == "ok" else "wrong", row["state"]) for row in keys]
        if not keys:
            rows.append(("DKIM", "warning", f"no [[dkim]] of {name}: its mail is not signed (`relaymta dkim keygen`)"))
        signed = any(row["state"] == "ok" for row in keys)
        return [*rows, await _dmarc(resolver, name, aligned or signed)]
    finally:
        await resolver.close()


async def _spf(resolver: "Resolver", address: str, name: str, hostname: str) -> tuple[Row, bool]:
    from relaymta.filter import spf

    found = await spf.check(resolver, address, f"postmaster@{name}", hostname)
    state = {"pass": "ok", "none": "warning"}.get(found.result, "wrong")
    what = f"SPF of {name} for {address}"
    result = (
        f"no record; publish v=spf1 ip4:{address} -all" if found.result == "none" else f"{found.result} {found.reason}".strip()
    )
    return (what, state, result), found.result == "pass"


async def _spf_of_smart_host(resolver: "Resolver", way: records.Way, name: str) -> tuple[Row, bool]:
    """Whether the domain's record allows a smart host that its mail leaves by."""
    what = f"SPF of {name} for {way.host or 'a rewritten sender'}"
    if way.note:
        return (what, "warning", way.note), False
    found = await records.includes(resolver, name, way.mechanism.removeprefix("include:"))
    if found == "yes":
        return (what, "ok", f"the record has {way.mechanism}"), True
    if found == "none":
        return (what, "warning", f"no record; publish v=spf1 {way.mechanism} -all"), False
    if found == "no":
        return (what, "wrong", f"mail leaves by {way.host}, and the record lacks {way.mechanism}: add it"), False
    return (what, "wrong", found), False


async def _dmarc(resolver: "Resolver", name: str, passes: bool) -> Row:
    from relaymta.filter import dmarc

    found = await dmarc.check(resolver, [name], (name, "pass" if passes else "fail"), [])
    if found.result == "none":
        return f"DMARC of {name}", "warning", 'no record; begin with "v=DMARC1; p=none"'
    if found.result == "pass":
        return f"DMARC of {name}", "ok", "mail from here passes"
    return f"DMARC of {name}", "wrong", f"{found.result}: the policy for mail from here is p={found.policy}"
