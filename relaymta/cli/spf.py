"""Which SPF record a domain needs whose mail leaves by this relay: its own addresses only where it delivers to the MX itself."""

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from relaymta.config import Config, Route, parse_hostport
from relaymta.proto.address import domain_matches, domain_of, in_a_labels

if TYPE_CHECKING:
    from relaymta.dns import Resolver

__all__ = ["Way", "includes", "mechanisms", "record", "ways"]

LOOKUPS = 10  # includes that are followed (RFC 7208 4.6.4)

# Smart hosts of providers that document one `include:` for all customers: suffix of the host's name -> include.
PROVIDERS = {
    "smtp-relay.gmail.com": "_spf.google.com", "smtp.gmail.com": "_spf.google.com", "google.com": "_spf.google.com",
    "googlemail.com": "_spf.google.com",
    "office365.com": "spf.protection.outlook.com", "outlook.com": "spf.protection.outlook.com",
    "amazonaws.com": "amazonses.com", "amazonses.com": "amazonses.com",
    "sendgrid.net": "sendgrid.net", "mailgun.org": "mailgun.org", "mailjet.com": "spf.mailjet.com",
    "mandrillapp.com": "spf.mandrillapp.com", "postmarkapp.com": "spf.mtasv.net", "sparkpostmail.com": "_spf.sparkpostmail.com",
    "brevo.com": "spf.brevo.com", "sendinblue.com": "spf.brevo.com", "smtp2go.com": "spf.smtp2go.com",
    "mailersend.net": "_spf.mailersend.net", "elasticemail.com": "_spf.elasticemail.com", "socketlabs.com": "email-od.com",
    "zoho.com": "zohomail.com", "zoho.eu": "zohomail.eu", "messagingengine.com": "spf.messagingengine.com",
    "fastmail.com": "spf.messagingengine.com", "migadu.com": "spf.migadu.com", "protonmail.ch": "_spf.protonmail.ch",
    "gandi.net": "_mailcust.gandi.net", "ovh.net": "mx.ovh.com", "yandex.com": "_spf.yandex.net", "yandex.ru": "_spf.yandex.net",
    "mailchannels.net": "relay.mailchannels.net", "secureserver.net": "secureserver.net", "emailsrvr.com": "emailsrvr.com",
    "one.com": "_custspf.one.com",
}  # fmt: skip


class Way(NamedTuple):
    """How mail of a domain leaves: `mechanism` of the SPF record that allows it, "" where only `note` says what is needed;
    `host`: the smart host that it leaves by, "" for our own address."""

    mechanism: str
    note: str = ""
    host: str = ""


def ways(config: Config, domain: str, application: str = "") -> list[Way]:
    """All ways that mail of a domain, from an application ("": any), may leave by, without duplicates."""
    found: list[Way] = []
    domain = in_a_labels(domain.rstrip("."))
    for route in _routes(config, domain, application):
        found += _ways_of(config, route, domain)
    return list(dict.fromkeys(found))


def mechanisms(config: Config, domain: str, application: str = "") -> tuple[str, list[str]]:
    """(What the SPF record of a domain has to have, "" where that is not known; sentences about what else it needs)."""
    found = ways(config, domain, application)
    notes = [f"{domain}. SPF: {way.note}" for way in found if way.note]
    return " ".join(dict.fromkeys(way.mechanism for way in found if way.mechanism)), notes


def record(config: Config, domain: str, application: str = "") -> list[str]:
    """Lines for people with the SPF record that a domain needs."""
    needed, notes = mechanisms(config, domain, application)
    if not needed:
        return notes
    return [f'{domain}. TXT "v=spf1 {needed} -all"  (or add {needed} to an existing record)', *notes]


def _routes(config: Config, domain: str, application: str) -> Iterator[Route | None]:
    """The routes that may take mail of a domain, up to the one that takes all that is left; None: to the MX, without a route."""
    for route in config.route:
        own = [address for address in route.sender if domain_of(address) == domain]
        if (route.sender and not own) or (application and route.application and application not in route.application):
            continue
        if route.sender_domain and not domain_matches(domain, route.sender_domain):
            continue
        yield route
        partly = (
            own, route.recipient, route.recipient_domain, route.mx, route.header, route.min_size, route.max_size,
            route.min_attempts, route.application and not application,
        )  # fmt: skip
        if not any(partly):
            return
    yield None


def _ways_of(config: Config, route: Route | None, domain: str) -> Iterator[Way]:
    rewritten = domain_of(route.rewrite_sender) if route is not None else ""
    if route is not None and rewritten and rewritten != domain:
        yield Way(
            "", f"route {route.label} rewrites the sender to {route.rewrite_sender}: there, the record of that domain counts"
        )
    elif route is not None and route.lookup:
        yield Way("", f"route {route.label} looks its hosts up: the record has to allow all of them", route.lookup)
    elif route is None or not route.hosts:
        yield from (Way(mechanism) for mechanism in _our_own(config, route))
    else:
        for text in route.hosts:
            yield from _by_host(config, route, text)


def _by_host(config: Config, route: Route, text: str) -> Iterator[Way]:
    host = "localhost" if text.startswith("unix:") else parse_hostport(text, 25)[0].lower().rstrip(".")
    include = next((found for suffix, found in PROVIDERS.items() if f".{host}".endswith(f".{suffix}")), "")
    if _is_here(host):  # another program of this machine sends it on
        yield from (Way(mechanism) for mechanism in _our_own(config, route))
    elif include:
        yield Way(f"include:{include}", "", host)
    else:
        what = f"mail leaves by {host} (route {route.label}), whose addresses receivers see, not ours"
        yield Way("", f"{what}: add the include: or ip4: that its operator names for SPF", host)


def _is_here(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _our_own(config: Config, route: Route | None) -> list[str]:
    """The mechanisms for the addresses that we send from: those of the route's sources, else of our host name."""
    chosen = [source for source in config.source if route is not None and source.name in route.sources]
    public = [address for source in chosen if not (address := ipaddress.ip_address(source.address)).is_private]
    return [f"ip{address.version}:{address}" for address in public] or [f"a:{config.hostname}"]


async def includes(resolver: "Resolver", name: str, wanted: str) -> str:
    """Whether a domain's SPF record has an include (also by that of another): "yes" or "no"; "none": there is no record; else why
    that is not known."""
    from relaymta.dns import DnsFailure, NoData, NoSuchName

    asked, pending = 0, [name]
    seen: set[str] = set()
    while pending and asked < LOOKUPS:
        asked, domain = asked + 1, pending.pop(0)
        try:
            texts = await resolver.txt(domain)
        except (NoData, NoSuchName):
            texts = []
        except DnsFailure as error:
            return f"the DNS look-up failed: {error}"
        records = [text.lower() for text in texts if text.lower().split(" ")[0] == "v=spf1"]
        if not records and domain == name:
            return "none"
        for term in " ".join(records).split():
            other = term.lstrip("+").removeprefix("include:").removeprefix("redirect=").rstrip(".")
            if other == term or other.startswith(("-", "~", "?")) or other in seen:
                continue
            if other == wanted:
                return "yes"
            seen.add(other)
            pending.append(other)
    return "no"
