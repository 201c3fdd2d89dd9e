"""`relaymta route test`: where a message would be sent, and why."""

import re
import shlex
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, group, loaded
from relaymta.cli.peer import as_json, no_such
from relaymta.errors import ConfigError
from relaymta.proto.address import domain_of_host, plain
from relaymta.proto.envelope import Envelope

if TYPE_CHECKING:
    from relaymta.config import Config
    from relaymta.dns import Resolver
    from relaymta.route.ourselves import Ourselves
    from relaymta.route.sites import Site

__all__ = ["route"]

WAITS = "those of a file that it includes are not known now (`relaymta config check`): mail for it waits"
MOST_SHOWN = 100  # addresses that an alias leads to


@group
def route() -> None:
    """Test the routes."""


@route.command()
@click.option("--from", "sender", default="", metavar="ADDRESS", help="The envelope sender; default: the null sender.")
@click.option("--to", "recipient", required=True, metavar="ADDRESS", help="The recipient.")
@click.option("--as", "application", default="", metavar="APP", help="The application of the message.")
@click.option("--listener", default="", metavar="HOST:PORT", help="The listener that it comes in on.")
@click.option("--size", default=0, help="The size of the message in octets.")
@click.option("--attempts", default=0, help="The number of attempts before.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    metavar="FIELD",
    help='A header field, such as "X-Class: bulk"; repeatable.',
)
@as_json
@configured
def test(
    read: Configuration, sender: str, recipient: str, application: str, listener: str, size: int,
    attempts: int, headers: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Show which routes match, the hosts, the site and its limits; of an alias (local.aliases) those of each address that it
    leads to. A recipient without a domain is what a user of this machine may give sendmail(1). Queries the DNS, sends no mail,
    and needs no daemon."""
    import asyncio  # imported here: a shell that completes options need not wait for it

    sender, named = _address("--from", sender), bool(recipient) and "@" not in recipient
    if not named:
        recipient = _address("--to", recipient)
    for field in headers:
        if not re.match(r"[!-9;-~]+[ \t]*:", field):
            fail(64, f'--header {field}: expected "Name: value"')
    config = _config(read)
    if named:
        recipient = _address("--to", f"{recipient}@{config.intake.complete_domain or domain_of_host(config.hostname)}")
    listeners = [one.address for one in config.listener] + [address for route in config.route for address in route.listener]
    if listener and listener not in listeners:
        fail(64, f"--listener: {no_such('listener', listener, listeners)}")
    try:
        led = _led(config, recipient, named)
        envelopes = [
            Envelope(sender, [one], size, 0, 0, 0, application=application, listener=listener)
            for one in ([recipient] if led is None else led)
        ]
        ways = asyncio.run(_tests(config, envelopes[: None if as_json else MOST_SHOWN], headers, attempts))
    except ConfigError as error:
        fail(78, str(error))
    if as_json:
        waits = "" if led is None or led else WAITS
        say_json(ways[0] | {"leads_to": []} if led is None else _nothing(recipient) | {"error": waits, "leads_to": ways})
        return
    if led is not None:
        count = f"leads to {len(led)} address{'es' if len(led) > 1 else ''}" if led else WAITS
        say(f"<{recipient}> is an alias (local.aliases): {count}")
    for found in ways:
        _show(read, found, application, sender)
    if led is not None and len(led) > MOST_SHOWN:
        say(f"and {len(led) - MOST_SHOWN} more: --json has all of them")


def _show(read: Configuration, found: dict[str, Any], application: str, sender: str) -> None:
    recipient = found["recipient"]
    say(f"<{recipient}>" + (f" of {application}" if application else "") + (f" from <{sender}>" if sender else ""))
    if found["redirected_to"]:
        say(f"  redirected to <{found['redirected_to']}> (staging.redirect)")
    for row in found["routes"]:
        say(f"  route {row['route']:<16} {'yes' if row['matches'] else 'no: ' + row['by']}")
    if found["error"]:
        say(f"  {found['error']}")
        return
    if found["kept_here"]:
        command = f"relaymta mailbox show {shlex.quote(found['redirected_to'] or recipient)}{read.options}"
        say(f"  kept here, in mailboxes; whether somebody has the address: {command}")
        return
    for host in found["hosts"]:
        preference = f"{host['preference']:>3} " if host["preference"] is not None else ""
        say(f"  host  {preference}{host['name']}  {' '.join(host['addresses'])}")
    say(f"  site  {found['site']}, counted as {found['counted as']}")
    for name, limit in found["limits"].items():
        say(f"  {name:<24} {limit['value']:g}" + f"  ({limit['origin']})")


def _led(config: "Config", recipient: str, named: bool) -> list[str] | None:
    """The addresses that an alias leads to; none: those of its list are not known; None: it is no alias. `named`: it was given
    without its domain."""
    if not config.local.aliases:
        return None
    from relaymta.accept import aliases

    found = aliases.read(config.local.aliases, config.alias_domains)
    count = found.leads(recipient, named)
    if count == aliases.UNKNOWN_ALIAS:
        return []
    return found.expanded([recipient], {recipient: False} if named else {}) if count else None


def _address(option: str, given: str) -> str:
    """An address as it would be in an envelope; "" for the null sender."""
    found = plain(given)
    if found is None and (given or option == "--to"):
        fail(64, f"{option} {given}: expected an address, such as ann@example.com")
    return found or ""


def _config(read: Configuration) -> "Config":
    """The configuration, with its listeners where it has some: a host may be one of them."""
    try:
        return read()
    except ConfigError:
        return loaded(read, ANY_LISTENER)


def _nothing(recipient: str) -> dict[str, Any]:
    """What is found of a recipient, before anything is."""
    return {
        "recipient": recipient, "redirected_to": "", "routes": [], "error": "", "hosts": [], "site": "", "counted as": "",
        "limits": {}, "kept_here": False,
    }  # fmt: skip


async def _tests(config: "Config", envelopes: list[Envelope], headers: tuple[str, ...], attempts: int) -> list[dict[str, Any]]:
    """What is found of each of them, each with one recipient."""
    from relaymta.dns import Resolver

    resolver = Resolver(config.delivery.nameservers)
    try:
        return [await _test(config, resolver, envelope, headers, attempts) for envelope in envelopes]
    finally:
        await resolver.close()


async def _test(
    config: "Config", resolver: "Resolver", envelope: Envelope, headers: tuple[str, ...], attempts: int
) -> dict[str, Any]:
    from relaymta.proto.mailbox import Malformed
    from relaymta.route.mx import NoRoute
    from relaymta.route.ourselves import Ourselves
    from relaymta.route.sites import Sites
    from relaymta.route.staging import Redirection
    from relaymta.route.table import Asked, RouteTable

    found = _nothing(envelope.recipients[0])
    if config.staging.redirect:  # as `Intake` does before it asks for routes
        wanted = envelope.recipients[0]
        (envelope.recipients[0],) = Redirection(config.staging.redirect, config.staging.allow).recipients([wanted])
        found["redirected_to"] = envelope.recipients[0] if envelope.recipients[0] != wanted else ""
    routes = RouteTable(config)
    ours = Ourselves.of(config)
    sites = Sites(routes, resolver, ours.names, resolver.now)
    try:
        envelope.headers = routes.headers_met("\r\n".join(headers).encode())
    except Malformed as error:
        fail(64, f"--header: {error}")
    ((name, _),) = routes.assign(envelope, attempts)
    found["kept_here"] = routes.route_of(name).is_local
    mx: list[str] | None = None
    try:
        if not found["kept_here"]:
            site = await sites.find(name)
            mx = site.names if site.hosts is not None else None
            await _show_site(found, site, config, resolver)
            _check_loop(site, found["hosts"], ours, config.delivery.port)
    except NoRoute as error:
        found["error"] = f"{'bounces' if error.permanent else 'waits'}: {error.enhanced} {error}"
    asked = Asked.of(envelope, envelope.recipients[0], attempts)
    found["routes"] = [{"route": v.route.label, "matches": v.matches, "by": v.reason} for v in routes.trace(asked, mx)]
    return found


async def _show_site(found: dict[str, Any], site: "Site", config: "Config", resolver: "Resolver") -> None:
    """Add the hosts of a site, and its limits."""
    from relaymta.config import parse_hostport
    from relaymta.dns import DnsFailure, NoData, NoSuchName
    from relaymta.route.shaping import LIMITS, Shaping

    families = site.route.ip.replace(" ", "")
    for preference, host in site.hosts.pairs if site.hosts is not None else [(None, host) for host in site.route.hosts]:
        addresses: list[str] = []
        try:
            if site.hosts is not None:
                addresses = await resolver.addresses(host, families)
            elif not host.startswith("unix:"):
                addresses = await resolver.host(parse_hostport(host, 25)[0], families)
        except (DnsFailure, NoData, NoSuchName) as error:
            addresses = [f"({type(error).__name__})"]
        found["hosts"].append({"preference": preference, "name": host, "addresses": addresses})
    shape = Shaping(config).shape(site)
    limits = {limit: getattr(shape, limit) for limit in LIMITS}
    found |= {"site": site.key, "counted as": shape.key}
    found["limits"] = {n: {"value": limit.value, "origin": limit.origin} for n, limit in limits.items() if limit.value}


def _check_loop(site: "Site", hosts: list[dict[str, Any]], ours: "Ourselves", port: int) -> None:
    """NoRoute where the first host that has an address is this relay itself."""
    from relaymta.config import parse_hostport
    from relaymta.route.mx import NoRoute

    for host in hosts:
        if site.hosts is not None:
            own = any(ours.is_exchange(address, port) for address in host["addresses"])
        else:
            at = 0 if host["name"].startswith("unix:") else parse_hostport(host["name"], 25)[1]
            own = any(ours.at(address, at) for address in host["addresses"])
        if own:
            raise NoRoute(True, "5.4.6", f"{host['name']} is this host: mail for it would loop")
        if any(not address.startswith("(") for address in host["addresses"]):
            return
