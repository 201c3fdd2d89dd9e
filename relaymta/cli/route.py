"""`relaymta route test`: where a message would be sent, and why."""

import re
import shlex
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, group, loaded
from relaymta.cli.peer import as_json, no_such
from relaymta.errors import ConfigError
from relaymta.proto.address import plain
from relaymta.proto.envelope import Envelope

if TYPE_CHECKING:
    from relaymta.config import Config
    from relaymta.dns import Resolver
    from relaymta.route.ourselves import Ourselves
    from relaymta.route.sites import Site

__all__ = ["route"]


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
    """Show which routes match, the hosts, the site and its limits. Queries the DNS, sends no mail, and needs no daemon."""
    import asyncio  # imported here: a shell that completes options need not wait for it

    sender, recipient = _address("--from", sender), _address("--to", recipient)
    for field in headers:
        if not re.match(r"[!-9;-~]+[ \t]*:", field):
            fail(64, f'--header {field}: expected "Name: value"')
    config = _config(read)
    listeners = [one.address for one in config.listener] + [address for route in config.route for address in route.listener]
    if listener and listener not in listeners:
        fail(64, f"--listener: {no_such('listener', listener, listeners)}")
    try:
        envelope = Envelope(sender, [recipient], size, 0, 0, 0, application=application, listener=listener)
        found = asyncio.run(_test(config, envelope, headers, attempts))
    except ConfigError as error:
        fail(78, str(error))
    if as_json:
        say_json(found)
        return
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


async def _test(config: "Config", envelope: Envelope, headers: tuple[str, ...], attempts: int) -> dict[str, Any]:
    from relaymta.dns import Resolver
    from relaymta.proto.mailbox import Malformed
    from relaymta.route.mx import NoRoute
    from relaymta.route.ourselves import Ourselves
    from relaymta.route.sites import Sites
    from relaymta.route.staging import Redirection
    from relaymta.route.table import Asked, RouteTable

    redirected = ""
    if config.staging.redirect:  # as `Intake` does before it asks for routes
        wanted = envelope.recipients[0]
        (envelope.recipients[0],) = Redirection(config.staging.redirect, config.staging.allow).recipients([wanted])
        redirected = envelope.recipients[0] if envelope.recipients[0] != wanted else ""
    routes = RouteTable(config)
    resolver = Resolver(config.delivery.nameservers)
    ours = Ourselves.of(config)
    sites = Sites(routes, resolver, ours.names, resolver.now)
    try:
        envelope.headers = routes.headers_met("\r\n".join(headers).encode())
    except Malformed as error:
        fail(64, f"--header: {error}")
    ((name, _),) = routes.assign(envelope, attempts)
    found: dict[str, Any] = {
        "redirected_to": redirected,
        "routes": [],
        "error": "",
        "hosts": [],
        "site": "",
        "counted as": "",
        "limits": {},
    }
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
    finally:
        await resolver.close()
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
