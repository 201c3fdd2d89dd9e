"""The mail hosts of a domain (RFC 5321 5.1): MX by preference, equal ones shuffled, implicit MX, null MX, and loop prevention."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from relaymta.dns import DnsFailure, NoData, NoDescriptor, NoSuchName, Resolver
from relaymta.errors import DNS, OUT_OF_DESCRIPTORS, US, Failure
from relaymta.hosts import numeric
from relaymta.proto.address import DomainError, literal_address, normalize_domain

__all__ = ["Hosts", "NoRoute", "Target", "mx_hosts", "roll_up", "targets"]

ADDRESSES_LIMIT = 10  # tried in one attempt; Postfix: smtp_mx_address_limit 5
HOSTS_LIMIT = 30  # of a domain, the most preferred; an answer may have thousands, and the name of a site lists them
FAILURES_LIMIT = 5  # hosts whose address lookups fail one after the other, each after the DNS timeout
LITERAL_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Target:
    """One address to try, and the host name for TLS and the log."""

    host: str
    address: str


@dataclass(frozen=True, slots=True)
class Hosts:
    """A domain's mail hosts: (preference, name) in order, equal preferences by name. `until`: when they expire (resolver's
    clock)."""

    pairs: tuple[tuple[int, str], ...]
    until: float

    @property
    def names(self) -> list[str]:
        """The hosts' names, in order."""
        return [host for _, host in self.pairs]


class NoRoute(Failure):
    """A domain has no usable mail host. `permanent`: a permanent failure; `enhanced`: its enhanced status code (RFC 3463).
    `scarce`: this machine has no descriptor left to find out: that is no failure of the domain."""

    def __init__(
        self,
        permanent: bool,
        enhanced: str,
        public: str,
        cause: str = "",
        fault: str = DNS,
        category: str = "",
        scarce: bool = False,
    ) -> None:
        super().__init__(public, cause, fault, category or ("dns" if fault == DNS else "local"))
        self.scarce = scarce
        self.permanent = permanent
        self.enhanced = enhanced


async def mx_hosts(resolver: Resolver, domain: str, ourselves: set[str]) -> Hosts:
    """The mail hosts of a domain. NoRoute when there is none. `ourselves`: this machine's host names, lower case. (`targets`
    finds it by its addresses.)"""
    if literal_address(domain) is not None:
        return Hosts(((0, domain),), resolver.now() + LITERAL_SECONDS)
    try:
        name = normalize_domain(domain)
    except DomainError:
        raise NoRoute(True, "5.1.2", f"{domain!r} is not a domain name") from None
    try:
        records, until = await resolver.mx(name)
    except NoSuchName:
        raise NoRoute(True, "5.1.2", f"{name} does not exist (NXDOMAIN)") from None
    except NoData:
        records, until = [(0, name)], 0.0  # the implicit MX: the domain's own address
    except DnsFailure as error:
        raise _dns_failed(error) from None
    return Hosts(_order(records, name, ourselves), until)


def _order(records: list[tuple[int, str]], name: str, ourselves: set[str]) -> tuple[tuple[int, str], ...]:
    if len(records) == 1 and records[0][1] == "":
        raise NoRoute(True, "5.1.10", f"{name} accepts no mail (null MX, RFC 7505)")
    pairs = sorted({(preference, host.lower()) for preference, host in records if host})
    limit = min((preference for preference, host in pairs if host in ourselves), default=None)
    kept = tuple(pair for pair in pairs if limit is None or pair[0] < limit)
    if not kept:
        raise _loop(f"the MX of {name}")
    return kept[:HOSTS_LIMIT]


def _loop(what: str) -> NoRoute:
    return NoRoute(True, "5.4.6", f"{what} is this host: mail for it would loop", fault=US, category="loop")


def roll_up(hosts: Hosts) -> str:
    """The name of the site of these hosts, the same for all domains that have them in this order: `(alt1|alt2).mx.example`."""
    names = hosts.names
    if len(names) == 1:
        return names[0]
    labels = [name.split(".") for name in names]
    common = 0
    while all(len(parts) > common + 1 for parts in labels) and len({parts[-1 - common] for parts in labels}) == 1:
        common += 1
    shared = ".".join(labels[0][len(labels[0]) - common :])
    heads = "|".join(".".join(parts[: len(parts) - common]) for parts in labels)
    return f"({heads}).{shared}" if shared else f"({heads})"


async def targets(
    resolver: Resolver,
    hosts: Hosts,
    families: str,
    ours: Callable[[str], bool] = lambda address: False,
    alias: Callable[[str], bool] = lambda host: False,
) -> list[Target]:
    """The addresses to try, in order; hosts of equal preference are shuffled. NoRoute when there is none. `families`: as of
    `Resolver.addresses`; `ours(address)`: whether it is this machine's; `alias(host)`: whether a host whose addresses were looked
    up is an alias of this machine. Then its host and those not preferred to that are left out (RFC 5321 5.1)."""
    shuffled = list(hosts.pairs)
    random.shuffle(shuffled)
    shuffled.sort(key=lambda pair: pair[0])
    found: list[Target] = []
    failures: list[DnsFailure] = []
    preferences: list[int] = []  # of those in `found`
    for preference, host in shuffled:
        try:
            addresses = await _addresses(resolver, host, families)
            if any(map(ours, addresses)) or alias(host):
                found = [target for target, at in zip(found, preferences, strict=True) if at < preference]
                if found or failures:
                    break
                raise _loop(f"the mail host {host}")
            found += [Target(host, address) for address in addresses]
            preferences += [preference] * len(addresses)
        except (NoSuchName, NoData):
            continue
        except DnsFailure as error:
            failures.append(error)
        if len(found) >= ADDRESSES_LIMIT or len(failures) >= FAILURES_LIMIT:
            break
    if found:
        return found[:ADDRESSES_LIMIT]
    if failures:
        raise _dns_failed(failures[-1])
    raise NoRoute(True, "5.4.4", f"{', '.join(hosts.names)}: no mail host with an address")


def _dns_failed(error: DnsFailure) -> NoRoute:
    if isinstance(error, NoDescriptor):
        return NoRoute(False, "4.3.0", OUT_OF_DESCRIPTORS, str(error), US, scarce=True)
    return NoRoute(False, "4.4.3", f"DNS failed: {error}")


async def _addresses(resolver: Resolver, host: str, families: str) -> list[str]:
    literal = literal_address(host)
    if literal is not None:
        return [literal]
    number = numeric(host)  # not allowed in an MX record (RFC 1035 3.3.9), but found there; as Postfix does
    return [number] if number is not None else await resolver.addresses(host, families)
