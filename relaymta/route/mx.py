"""The hosts of a domain (RFC 5321 5.1): MX by preference, equals shuffled, implicit MX, null MX, and never ourselves."""

import ipaddress
import random
from dataclasses import dataclass

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.proto.address import DomainError, literal_address, normalize_domain

__all__ = ["NoRoute", "Target", "mx_targets"]

ADDRESSES_LIMIT = 10  # tried in one attempt; Postfix: smtp_mx_address_limit 5


@dataclass(frozen=True, slots=True)
class Target:
    """One address to try, and the name it has in TLS and in the log."""

    host: str
    address: str


class NoRoute(Exception):
    """A domain has nowhere to send to. `permanent`: it is final; `enhanced`: the code that says so."""

    def __init__(self, permanent: bool, enhanced: str, text: str) -> None:
        super().__init__(text)
        self.permanent = permanent
        self.enhanced = enhanced


async def mx_targets(resolver: Resolver, domain: str, ourselves: set[str]) -> list[Target]:
    """The addresses to try for a domain, in order. NoRoute when there is none. `ourselves`: our own host names."""
    literal = literal_address(domain)
    if literal is not None:
        return [Target(domain, literal)]
    try:
        name = normalize_domain(domain)
    except DomainError:
        raise NoRoute(True, "5.1.2", f"{domain!r} is no domain name") from None
    try:
        records = await resolver.mx(name)
    except NoSuchName:
        raise NoRoute(True, "5.1.2", f"{name} does not exist (NXDOMAIN)") from None
    except NoData:
        records = [(0, name)]  # the implicit MX: the domain's own address
    except DnsFailure as error:
        raise NoRoute(False, "4.4.3", f"DNS failed: {error}") from None
    hosts = _order(records, name, ourselves)
    return await _resolve(resolver, hosts, name)


def _order(records: list[tuple[int, str]], name: str, ourselves: set[str]) -> list[str]:
    if len(records) == 1 and records[0][1] == "":
        raise NoRoute(True, "5.1.10", f"{name} takes no mail (null MX, RFC 7505)")
    shuffled = [record for record in records if record[1]]
    random.shuffle(shuffled)
    shuffled.sort(key=lambda record: record[0])
    limit = min((preference for preference, host in shuffled if host.lower() in ourselves), default=None)
    kept = [host for preference, host in shuffled if limit is None or preference < limit]
    if not kept:
        raise NoRoute(True, "5.4.6", f"the MX of {name} is this host: mail for it would loop")
    return kept


async def _resolve(resolver: Resolver, hosts: list[str], name: str) -> list[Target]:
    targets: list[Target] = []
    failure: DnsFailure | None = None
    for host in hosts:
        try:
            ipaddress.ip_address(host)
            addresses = [host]
        except ValueError:
            try:
                addresses = await resolver.addresses(host)
            except (NoSuchName, NoData):
                continue
            except DnsFailure as error:
                failure = error
                continue
        targets += [Target(host, address) for address in addresses]
        if len(targets) >= ADDRESSES_LIMIT:
            break
    if targets:
        return targets[:ADDRESSES_LIMIT]
    if failure is not None:
        raise NoRoute(False, "4.4.3", f"DNS failed: {failure}")
    raise NoRoute(True, "5.4.4", f"{name} has no mail host with an address")
