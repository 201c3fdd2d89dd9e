"""What `relaymta doctor` checks of the ways that mail leaves by: smart hosts, port 25, and loops."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import ssl
from typing import TYPE_CHECKING, Any, cast

from relaymta.cli.doctor_names import Unanswered, has_route, in_time
from relaymta.cli.doctor_scene import Row, Scene, in_thread
from relaymta.cli.doctor_tls import SOON, expiry
from relaymta.config import Route, parse_hostport
from relaymta.route.ourselves import Ourselves, check, is_local

if TYPE_CHECKING:
    from relaymta.proto.smtp_client import ClientSession
    from relaymta.send.connect import Peer
    from relaymta.send.opener import Opener

__all__ = ["PROBE_DOMAIN", "loops", "own_domains", "port_25", "smart_hosts"]

PROBE_DOMAIN = "gmail.com"  # whose MX is connected to, without --probe-host: most relays have mail for it
STEP = 4.0  # seconds for a connection, and for each reply
HOST = 9.0  # for a smart host all in all
ADDRESSES, HOSTS, DOMAINS = 4, 100, 30  # that are tried: of one host, smart hosts, domains of our own
SMTP_PORT, TLS_PORT = 25, 465


class _Reached:
    """Takes the place of send.session.Session: it has been connected to, and says QUIT."""

    def __init__(self, core: "ClientSession", peer: str) -> None:
        self.core = core
        self.peer = peer
        self.fell_back = False
        self.place = ""
        self.link: Any = None
        self.leaf: bytes | None = None  # the certificate that it has shown, DER
        self.address: tuple[str, int] = ("", 0)

    def attach(self, transport: asyncio.Transport) -> None:
        """The connection is there: leave it."""
        connection: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self.leaf = connection.getpeercert(binary_form=True) if connection is not None else None
        address = transport.get_extra_info("peername")
        self.address = (address[0], address[1]) if isinstance(address, tuple) else ("", 0)
        transport.set_protocol(asyncio.Protocol())
        transport.write(b"QUIT\r\n")
        transport.close()


class _Unlogged:
    """Takes the place of a log."""

    def event(self, *args: Any, **fields: Any) -> None:
        """Nothing is logged: it is no attempt of the relay's."""


def _opener(scene: Scene) -> "Opener":
    from relaymta.send.oauth import Tokens
    from relaymta.send.opener import Opener

    async def none(settings: Any, refused: str) -> tuple[str, float]:
        raise AssertionError("nobody logs in")

    return Opener(scene.config, scene.dns, cast(Any, _Unlogged()), Tokens(none), cast(Any, _Reached))


async def smart_hosts(scene: Scene) -> list[Row]:
    """Whether each smart host can be connected to as the relay does it, TLS included, but without a login; and for how long its
    certificate is valid."""
    opener = _opener(scene)
    asked = {(host, route.label): route for route in scene.config.route for host in route.hosts}
    rows = await asyncio.gather(*(_smart_host(scene, opener, route, host) for (host, _), route in list(asked.items())[:HOSTS]))
    left = len(asked) - HOSTS
    return [*rows, *([("smart hosts", "warning", f"{left} more were not tried: {HOSTS} are at once")] if left > 0 else [])]


async def _smart_host(scene: Scene, opener: "Opener", route: Route, host: str) -> Row:
    from relaymta.route.mx import NoRoute
    from relaymta.route.sites import Site
    from relaymta.send.cures import cure

    name = f"smart host {host}" + (f" of route {route.label}" if route.label != host else "")
    if route.client_certificate and not scene.rights:
        return name, "warning", f"the route has a client certificate: run as {scene.who} to check this host"
    one = route.model_copy(update={"hosts": [host], "weights": [], "username": "", "password_file": "", "oauth": None})
    site = Site(route.label, one, None)
    try:
        async with asyncio.timeout(HOST):
            peers = _routed([await _resolved(peer) for peer in await opener.peers(site)])[:ADDRESSES]
            source = next((source for source in scene.config.source if source.name in route.sources), None)
            found = await asyncio.gather(*(opener.to(site, peer, source, STEP) for peer in peers), return_exceptions=True)
            reached = [cast(_Reached, each) for each in found if not isinstance(each, BaseException)]
            ours = bool(reached) and await _is_ours(scene, reached[0])
    except TimeoutError:
        return name, "wrong", f"no complete dialogue within {HOST:g} s: {cure('timeout', route, [host])}"
    failed = [each for each in found if isinstance(each, BaseException)]
    loop = next((str(each) for each in failed if isinstance(each, NoRoute)), "")
    if loop or ours:
        why = loop or f"it greets with our own name, {scene.config.hostname}"
        return name, "wrong", f"{why}: {cure('loop', route, [host])}"
    if not reached:
        category = getattr(failed[0], "category", "")
        return name, "wrong", f"{_said(failed[0])}: {cure(category, route, [host]) or 'see the log of the relay'}"
    state, what = _shown(reached[0], route)
    if failed and state == "ok":
        rest = f"{len(failed)} of {len(found)} addresses failed ({_said(failed[0])})"
        return name, "warning", f"{what}; {rest}: see to it, or name another host"
    return name, state, what


def _routed(peers: "list[Peer]") -> "list[Peer]":
    """Those to whose addresses this machine has a route (none to IPv6 addresses, often); all, where it has none to any."""
    return [peer for peer in peers if not peer.address or has_route(peer.address)] or peers


def _said(error: BaseException) -> str:
    """Why a host could not be connected to."""
    from relaymta.send.connect import ConnectFailed

    if not isinstance(error, ConnectFailed):
        return str(error)
    if error.said is not None:
        return f"the host says {error}"
    return error.public if error.category in ("refused", "timeout", "network") else str(error)


async def _is_ours(scene: Scene, reached: _Reached) -> bool:
    """Whether a host greets with a name of ours: it is this relay, behind an address translation. The relay itself looks at the
    name on port 25 alone."""
    address, port = reached.address
    if port in (0, SMTP_PORT, TLS_PORT) or is_local(address):
        return False
    try:
        async with asyncio.timeout(STEP):
            words = (await _greeting("", address, port)).decode("latin-1").split()
    except (OSError, ValueError, TimeoutError):
        return False
    return len(words) > 1 and Ourselves.of(scene.config).greeted(words[1])


async def _resolved(peer: "Peer") -> "Peer":
    """A host that our resolver does not find, as the system does (getaddrinfo(3)), which the relay asks then."""
    if peer.failure is None or not peer.address:
        return peer
    with contextlib.suppress(OSError):
        found = await in_thread(lambda: socket.getaddrinfo(peer.address, peer.port, type=socket.SOCK_STREAM))
        return dataclasses.replace(peer, address=str(found[0][4][0]), failure=None)
    return dataclasses.replace(peer, address="")


def _shown(reached: _Reached, route: Route) -> tuple[str, str]:
    """(State and what was found) of a host that was connected to."""
    if reached.fell_back:
        cure = f'have it mended there, or set tls = "off" of route {route.label} if that is meant'
        return "warning", f"answers, but TLS fails, and mail goes in clear: {cure}"
    if reached.leaf is None:
        return "ok", "answers" + ("" if route.tls == "off" else ", without TLS")
    from cryptography import x509

    state, when = expiry(x509.load_der_x509_certificate(reached.leaf))
    if route.tls != "verify":  # which does not look at it
        return "ok", f"answers with TLS; its certificate, which is not verified, {when}"
    if state == "ok":
        return "ok", f"answers with TLS; its certificate {when}"
    days = f"{SOON / 86400:.0f} days"
    return "warning", f"its certificate {when}: ask who runs it to renew it, which is due {days} before the end"


async def port_25(scene: Scene) -> list[Row]:
    """Where mail goes to the MX of its domain: whether port 25 of other hosts can be reached from each of our addresses."""
    from relaymta.dns import NoData, NoSuchName

    try:
        host, port, addresses = await in_time(_probed(scene))
    except (NoData, NoSuchName, Unanswered) as error:
        why = str(error) if isinstance(error, Unanswered) else f"{error} is not in the DNS"
        cure = "see the rows about nameservers, or name a host that you may connect to (--probe-host)"
        return [("port 25", "warning", f"not tried, since {why}: {cure}")]
    known = {source.name: source.address for source in scene.config.source}
    own = {known[name] for route in scene.to_mx for name in route.sources} or {""}
    rows = await asyncio.gather(*(_from(address, host, port, addresses) for address in sorted(own)))
    return list(rows)


async def _probed(scene: Scene) -> tuple[str, int, list[str]]:
    """(Name, port, an address of each family) of the host that is connected to."""
    if scene.probe_host:
        host, port = parse_hostport(scene.probe_host, SMTP_PORT)
        found = await scene.dns.host(host)
    else:
        pairs, _ = await scene.dns.mx(PROBE_DOMAIN)
        host, port = min(pairs)[1], scene.config.delivery.port
        found = await scene.dns.addresses(host)
    each = {":" in address: address for address in reversed(found)}
    return host, port, list(each.values())


async def _from(source: str, host: str, port: int, addresses: list[str]) -> Row:
    """Whether a host greets, from one of our addresses ("": the system's choice)."""
    usable = [one for one in addresses if not source or (":" in one) == (":" in source)]
    usable = [one for one in usable if source or has_route(one)] or usable
    what, where = "port 25" + (f" from {source}" if source else ""), f"{host}:{port}"
    if not usable:
        return what, "warning", f"not tried: {host} has no address of its family; name another host (--probe-host)"
    found = await asyncio.gather(*(_greets(source, one, port) for one in usable))
    failed = [f"{one}: {why}" for one, why in zip(usable, found, strict=True) if why]
    if not failed:
        return what, "ok", f"{where} greets"
    if len(failed) == len(usable):
        cure = (
            "many providers block port 25: ask yours to open it, open your firewall, or send by a smart host ([[route]], hosts)"
        )
        return what, "wrong", f"{where} cannot be reached ({'; '.join(failed)}): {cure}"
    cure = 'open it there, too, or set ip = "4" or "6" of the route to the family that works'
    return what, "warning", f"{where} greets, but not at {'; '.join(failed)}: {cure}"


async def _greets(source: str, address: str, port: int) -> str:
    """Why a host does not greet as one of SMTP does; "": it does."""
    try:
        async with asyncio.timeout(STEP):
            line = await _greeting(source, address, port)
    except TimeoutError:
        return f"no greeting within {STEP:g} s"
    except (OSError, ValueError) as error:
        return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return "" if line[:3] in (b"220", b"421", b"450", b"451", b"554") else f"greets with {line[:60]!r}, which is no SMTP"


async def _greeting(source: str, address: str, port: int) -> bytes:
    """The first line that a host sends. OSError; ValueError: it is too long."""
    reader, writer = await asyncio.open_connection(address, port, local_addr=(source, 0) if source else None)
    try:
        line = await reader.readline()
        writer.write(b"QUIT\r\n")
        return line
    finally:
        writer.close()


def loops(scene: Scene) -> list[Row]:
    """Whether a smart host is a listener of this relay, as far as the configuration says it."""
    found = check(scene.config)
    if not found:
        return [("mail loop", "ok", "no smart host is a listener of this relay")]
    return [("mail loop", "wrong", f"{sentence}; give the route the next host") for sentence in found]


async def own_domains(scene: Scene) -> list[Row]:
    """Whether mail for the domains that any client may send to has a way on, and does not come back to this relay."""
    domains = [domain.lstrip(".") for domain in scene.config.relay.domains]
    opener = _opener(scene)
    found = await asyncio.gather(*(_domain(scene, opener, domain) for domain in domains[:DOMAINS]))
    left = len(domains) - DOMAINS
    return [*found, *([("mail for more domains", "warning", f"{left} were not looked at: {DOMAINS} are")] if left > 0 else [])]


async def _domain(scene: Scene, opener: "Opener", domain: str) -> Row:
    from relaymta.proto.address import in_a_labels
    from relaymta.proto.envelope import Envelope
    from relaymta.route.mx import NoRoute
    from relaymta.route.sites import Sites
    from relaymta.route.table import RouteTable
    from relaymta.send.connect import ConnectFailed

    routes, resolver, name = RouteTable(scene.config), scene.dns, in_a_labels(domain)
    what = f"mail for {domain}"
    ((queue, _),) = routes.assign(Envelope("", [f"postmaster@{name}"], 0, 0, 0, 0), 0)
    route = routes.route_of(queue)
    if route.hosts or route.lookup or route.is_local:
        return what, "ok", f"route {route.label}"
    cure = f'add a [[route]] with recipient_domain = ["{domain}"] that says where it goes (hosts, or protocol = "mailbox")'
    try:
        async with asyncio.timeout(HOST):
            site = await Sites(routes, resolver, Ourselves.of(scene.config).names, resolver.now).find(queue)
            peers = await opener.peers(site)
            await opener.to(site, peers[0], None, STEP)
    except NoRoute as error:
        if error.category == "loop":
            return what, "wrong", f"{error}: {cure}"
        if error.permanent:
            return what, "wrong", f"{error}, so it bounces: {cure}"
        return what, "warning", f"{error}: see the rows about nameservers"
    except (ConnectFailed, TimeoutError) as error:
        why = str(error) or f"no complete dialogue within {HOST:g} s"
        return what, "warning", f"its MX does not answer: {why}; see whether that host runs, or {cure}"
    return what, "ok", f"goes to {peers[0].label}"
