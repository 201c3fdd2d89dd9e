"""`relaymta doctor`: what runs here, and whether a domain's mail from here would pass the checks of other servers."""

import asyncio
import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING

import click

from relaymta.cli import spf as records
from relaymta.cli.console import say_json, table
from relaymta.cli.dkim import checked
from relaymta.cli.doctor_here import Row, here
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, loaded
from relaymta.cli.peer import as_json
from relaymta.config import Config
from relaymta.proto.address import in_a_labels, is_host

if TYPE_CHECKING:
    from relaymta.dns import Resolver

__all__ = ["addresses_of", "doctor", "reverse"]


@click.group(invoke_without_command=True)
@as_json
@configured
@click.pass_context
def doctor(context: click.Context, read: Configuration, as_json: bool) -> None:
    """Check what runs here; with a subject, what other servers see of this one. Exit status 1 when something is wrong."""
    if context.invoked_subcommand is None:
        _report(here(), as_json)
    elif as_json:
        fail(64, f"doctor: give --json behind {context.invoked_subcommand}")


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
    try:
        chosen = [str(ipaddress.ip_address(text)) for text in addresses]
    except ValueError as error:
        fail(64, f"--address: {error}")
    given, name = name, in_a_labels(name).rstrip(".")
    if not is_host(f"a.{name}"):  # of one label, too
        fail(64, f"{given!r} is not a domain name")
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
    """The addresses that mail is sent from: the [[source]] ones, else the one that the system uses; none where it has none."""
    if config.source:
        return [source.address for source in config.source]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # sends nothing: connect() only chooses the local address
        return [str(sock.getsockname()[0])]
    return []


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


async def reverse(resolver: "Resolver", address: str, hostname: str) -> list[Row]:
    """Checks that an address has a PTR record, whose name has that address and is the one that EHLO gives (RFC 1912 2.1)."""
    from relaymta.dns import DnsFailure, NoData, NoSuchName

    parsed = ipaddress.ip_address(address)
    if parsed.is_private:
        return [(f"address {address}", "warning", "a private address: other servers see another one (give it with --address)")]
    try:
        pointers = await resolver.values(parsed.reverse_pointer, "PTR")
    except (NoData, NoSuchName, DnsFailure):
        pointers = []
    if not pointers:
        return [(f"PTR of {address}", "wrong", "no PTR record: many servers reject mail from such addresses")]
    confirmed = []
    for pointer in pointers:
        with contextlib.suppress(NoData, NoSuchName, DnsFailure):
            if address in await resolver.addresses(pointer):
                confirmed.append(pointer.lower())
    if not confirmed:
        return [(f"PTR of {address}", "wrong", f"{', '.join(pointers)}, which does not have this address")]
    fits = hostname.lower() in confirmed
    result = ", ".join(confirmed) if fits else f"{', '.join(confirmed)}, but EHLO gives {hostname}"
    return [(f"PTR of {address}", "ok" if fits else "warning", result)]


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
