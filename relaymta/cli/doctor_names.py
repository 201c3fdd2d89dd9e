"""What `relaymta doctor` checks of names and addresses: ours, the nameservers', and what lists say of ours."""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from relaymta.cli.doctor_scene import Row, Scene
from relaymta.config import Config
from relaymta.config.names import has_one_label

if TYPE_CHECKING:
    from relaymta.dns import Resolver
    from relaymta.filter.dnsbl import Dnsbl, DnsList

__all__ = [
    "Unanswered",
    "default_addresses",
    "has_route",
    "hostname",
    "in_time",
    "listings",
    "nameservers",
    "pointers",
    "reverse",
    "sources",
]

T = TypeVar("T")
SECONDS = 4.0  # for an answer of the DNS
SLOW = 1.0
POINTERS = 5  # names of an address that are looked at
_NOWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}  # connect() to them only chooses the local address
_ANYWHERE = {4: "198.41.0.4", 6: "2001:503:ba3e::2:30"}  # a.root-servers.net: what is routed to the Internet is routed there
_LOCAL_NAMES = ("localhost", "localdomain", "local")
# Lists that are asked where no [[filter]] names any: zone, codes.
_LISTS = {"zen.spamhaus.org": ["127.0.0.2-11"], "bl.spamcop.net": ["127.0.0.2"], "b.barracudacentral.org": ["127.0.0.2"]}


class Unanswered(Exception):
    """The DNS did not answer a question, or refused it: nothing is known. str(): why."""


async def in_time(question: Awaitable[T]) -> T:
    """The resolver's answer. Its NoSuchName and NoData; Unanswered."""
    from relaymta.dns import DnsFailure

    try:
        async with asyncio.timeout(SECONDS):
            return await question
    except TimeoutError:
        raise Unanswered(f"the DNS does not answer within {SECONDS:g} s") from None
    except DnsFailure as error:
        raise Unanswered(f"the DNS fails: {error}") from None


def default_addresses() -> list[str]:
    """The addresses that the system chooses to send from, of IPv6 only one that the Internet can reach."""
    found = []
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((_NOWHERE[version], 9))
            address = ipaddress.ip_address(sock.getsockname()[0])
            if version == 4 or address.is_global:
                found.append(str(address))
    return found


def _sending(scene: Scene) -> dict[str, str]:
    """The addresses from which mail goes to the MX, with the name that EHLO gives there."""
    config = scene.config
    known = {source.name: source for source in config.source}
    names = {source.address: source.hostname or config.hostname for source in config.source}
    if scene.addresses:
        return {address: names.get(address, config.hostname) for address in scene.addresses}
    found: dict[str, str] = {}
    for route in scene.to_mx:
        own = [known[name].address for name in route.sources] or default_addresses()
        allowed = [address for address in own if ("6" if ":" in address else "4") in route.ip]
        found |= {address: names.get(address, config.hostname) for address in allowed}
    return found


async def hostname(scene: Scene) -> list[Row]:
    """Whether the names that EHLO gives are full names, which the DNS has."""
    config = scene.config
    names = {"hostname": config.hostname}
    names |= {f"hostname of source {one.name}": one.hostname for one in config.source if one.hostname}
    return list(await asyncio.gather(*(_name(scene, what, name) for what, name in names.items())))


async def _name(scene: Scene, what: str, name: str) -> Row:
    from relaymta.dns import NoData, NoSuchName

    state = "wrong" if scene.to_mx else "warning"
    cure = f"set {'hostname' if what == 'hostname' else 'its hostname'} to the full name of this host, such as mail.example.org"
    if name.startswith("["):
        return what, "warning", f"{name} is an address, and many servers reject that in EHLO: {cure}"
    if has_one_label(name) or name.lower().endswith(tuple(f".{one}" for one in _LOCAL_NAMES)):
        return what, state, f"{name} is not a full name (FQDN), and many servers reject it in EHLO: {cure}"
    if scene.offline:
        return what, "ok", name
    try:
        asked = scene.dns.addresses(name) if scene.to_mx else scene.dns.host(name)
        found = await in_time(asked)
    except (NoSuchName, NoData):
        publish = f"publish an A or AAAA record of {name}, or set hostname"
        return what, state, f"{name} has no address in the DNS, and servers that look it up reject mail: {publish}"
    except Unanswered as error:
        return what, "warning", f"{name} could not be looked up: {error}; see the rows about nameservers"
    return what, "ok", f"{name} ({', '.join(found[:3])})"


async def nameservers(scene: Scene) -> list[Row]:
    """Whether each nameserver answers, and how fast. For what goes to the MX it has to know the root; DNSSEC is not needed."""
    names = [scene.config.hostname.strip("[]")] + (["."] if scene.to_mx else [])
    servers = scene.dns.nameservers
    where = "delivery.nameservers" if scene.config.delivery.nameservers else "/etc/resolv.conf"
    if not servers:
        return [("nameservers", "wrong", f"there is none: name one in {where}")]
    found = await asyncio.gather(*(_nameserver(server, names) for server in servers))
    some = any(not why for why, _ in found)
    rows: list[Row] = []
    for server, (why, seconds) in zip(servers, found, strict=True):
        name = f"nameserver {server.removesuffix(':53')}"
        cure = f"correct {where}, or mend it" + (": each question waits for it first" if some else "")
        if why:
            rows.append((name, "warning" if some else "wrong", f"{why}: {cure}"))
        elif seconds > SLOW:
            rows.append((name, "warning", f"answers in {seconds:.1f} s: use a nearer one, such as unbound on this machine"))
        else:
            rows.append((name, "ok", f"answers in {seconds * 1000:.0f} ms"))
    return rows


async def _nameserver(server: str, names: list[str]) -> tuple[str, float]:
    """Why a nameserver cannot be used ("": it can), and the seconds of its slowest answer."""
    import dns.asyncquery
    import dns.exception
    import dns.message
    import dns.rcode

    host, _, port = server.rpartition(":")
    slowest = 0.0
    for name in names:
        query = dns.message.make_query(name.rstrip(".") + ".", "NS" if name == "." else "A")
        began = time.monotonic()
        try:
            answer = await dns.asyncquery.udp(query, host.strip("[]"), SECONDS, int(port), ignore_trailing=True)
        except dns.exception.Timeout:
            return f"does not answer within {SECONDS:g} s", 0.0
        except (OSError, dns.exception.DNSException) as error:
            return f"does not answer ({getattr(error, 'strerror', None) or type(error).__name__})", 0.0
        slowest = max(slowest, time.monotonic() - began)
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            return f"answers {dns.rcode.to_text(answer.rcode())} when asked for {'the root' if name == '.' else name}", slowest
    return "", slowest


async def pointers(scene: Scene) -> list[Row]:
    """The PTR records of the addresses that mail is sent to MX hosts from."""
    found = await asyncio.gather(*(reverse(scene.dns, address, name) for address, name in _sending(scene).items()))
    return [row for rows in found for row in rows]


async def reverse(resolver: "Resolver", address: str, name: str) -> list[Row]:
    """Checks that an address has a PTR record, whose name has that address and is the one that EHLO gives (RFC 1912 2.1)."""
    from relaymta.dns import NoData, NoSuchName

    parsed = ipaddress.ip_address(address)
    if parsed.is_private:
        return [(f"address {address}", "warning", "a private address: other servers see another one (give it with --address)")]
    what, ask = f"PTR of {address}", f"have whoever gave you the address set it to {name}"
    try:
        found = [str(pointer) for pointer in await in_time(resolver.values(parsed.reverse_pointer, "PTR"))]
    except (NoData, NoSuchName):
        return [(what, "wrong", f"no PTR record: many servers reject mail from such addresses; {ask}")]
    except Unanswered as error:
        return [(what, "warning", f"it could not be looked up: {error}")]
    known = await asyncio.gather(*(_confirmed(resolver, pointer, address) for pointer in found[:POINTERS]))
    confirmed = [pointer.lower() for pointer, good in zip(found, known, strict=False) if good]
    if not confirmed:
        return [(what, "wrong", f"{', '.join(found)}, which does not have this address: {ask}, and publish that in the DNS")]
    if name.lower() in confirmed:
        return [(what, "ok", ", ".join(confirmed))]
    cure = f"set hostname to {confirmed[0]}, or {ask}"
    return [(what, "warning", f"{', '.join(confirmed)}, but EHLO gives {name}: {cure}")]


async def _confirmed(resolver: "Resolver", pointer: str, address: str) -> bool:
    from relaymta.dns import NoData, NoSuchName

    try:
        return address in await in_time(resolver.addresses(pointer))
    except (NoData, NoSuchName, Unanswered):
        return False


def sources(scene: Scene) -> list[Row]:
    """Whether each [[source]] is an address of this machine, and has a way to the Internet."""
    from relaymta.route.ourselves import is_local

    rows: list[Row] = []
    for source in scene.config.source:
        what, address = f"source {source.name}", ipaddress.ip_address(source.address)
        if not is_local(source.address):
            cure = "add it (`ip address add`), or remove the table: mail goes by other sources meanwhile, if its route has any"
            rows.append((what, "warning", f"{address} is not an address of this machine now: {cure}"))
        elif not address.is_loopback and (why := _no_way(str(address), _ANYWHERE[address.version])):
            cure = f"see `ip -{address.version} route`, or remove the table"
            rows.append((what, "wrong", f"{address} has no route to the Internet ({why}): {cure}"))
        else:
            rows.append((what, "ok", str(address)))
    return rows


def _no_way(address: str, there: str) -> str:
    """Why packets cannot be sent from one address ("": any) to another; "": they can. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in there else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            if address:
                sock.bind((address, 0))
            sock.connect((there, 9))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def has_route(address: str) -> bool:
    """Whether this machine has a route to an address."""
    return not _no_way("", address)


async def listings(scene: Scene) -> list[Row]:
    """Whether lists in the DNS list the addresses that mail is sent from."""
    from relaymta.filter.dnsbl import Dnsbl

    lists = Dnsbl(_lists(scene.config), SECONDS, scene.dns)
    found = await asyncio.gather(*(_listed(lists, address, bool(scene.addresses)) for address in _sending(scene)))
    return [row for rows in found for row in rows]


async def _listed(lists: "Dnsbl", address: str, given: bool) -> list[Row]:
    if not ipaddress.ip_address(address).is_global and not given:
        return [(f"DNSBL {address}", "warning", "a private address, which no list knows: give yours with --address")]
    rows: list[Row] = []
    for one in await lists.survey(address, "", ""):
        what = f"DNSBL {one.zone} of {address}"
        if one.result == "listed":
            cure = "find out why (`relaymta abuse list`, the log), end that, and then ask the list to remove it"
            rows.append((what, "wrong", f"listed ({', '.join(one.answers)}): {cure}"))
        elif one.result == "clean":
            rows.append((what, "ok", "not listed"))
        else:
            how = "refuses to answer your nameserver" if one.result == "refused" else "does not answer"
            rows.append((what, "warning", f"{how}: ask by a resolver of your own, such as unbound, not by a public one"))
    return rows


def _lists(config: Config) -> "list[DnsList]":
    """The lists of addresses that filters ask, else those that many receivers do."""
    from relaymta.filter.dnsbl import DnsList
    from relaymta.proto.dnsbl import Codes

    own = [one for row in config.filter if row.type == "dnsbl" for one in row.lists if not one.domain and one.score > 0]
    zones = {one.zone: one.codes for one in own} or _LISTS
    return [DnsList(zone, Codes(codes)) for zone, codes in zones.items()]
