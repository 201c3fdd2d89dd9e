"""What the tables of a configuration require of each other, and warnings about a valid one."""

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relaymta.config.filters import SCORED
from relaymta.config.names import has_one_label, helo_name
from relaymta.config.networks import everywhere, widest
from relaymta.config.patterns import never
from relaymta.config.values import in_clear, is_loopback, near, parse_hostport, repeated

if TYPE_CHECKING:
    from relaymta.config.filters import Filter
    from relaymta.config.whole import Config

__all__ = ["contradictions", "never_used", "notes", "open_to_all"]


# Fields that hosts on the way add.
TRACE = {
    "arc-authentication-results", "arc-message-signature", "arc-seal", "authentication-results", "delivered-to", "received",
    "return-path",
}  # fmt: skip


def contradictions(config: "Config") -> Iterator[tuple[str, ...]]:
    """(dotted key, what is wrong) of each value that other values do not allow; where it is one other that another file may have,
    also the key of that."""
    if not config.listener:
        yield "listener", "there is none: give a [[listener]] table, or --listen HOST:PORT"
    if not config.relay.open_relay:
        meant = ". Name your networks, or set relay.open_relay = true if you mean it"
        yield from ((key, what + meant) for key, what in open_to_all(config))
    yield from _sent_in_clear(config)
    yield from _needs_of_listeners(config)
    yield from _needs_of_mailboxes(config)
    if config.verify.dmarc == "enforce" and not config.verify.results:
        yield "verify.dmarc", "'enforce' needs verify.results = true: nothing is checked without it"
    known = {source.name for source in config.source}
    for number, route in enumerate(config.route):
        for name in route.sources:
            if name not in known:
                yield f"route.{number}.sources", f"there is no [[source]] {name!r}{near(name, known)}"
    rules = [rule.name for rule in config.mail_rule]
    for number, check in enumerate(config.abuse):
        if check.rule and check.rule not in rules:
            yield f"abuse.{number}.rule", f"there is no [[mail_rule]] {check.rule!r}{near(check.rule, rules)}"
    yield from _twice(config)
    yield from _overlapping(config)


def _twice(config: "Config") -> Iterator[tuple[str, str, str]]:
    """What is given twice and must not be, with the first of the two."""
    keys = [f"{one.selector}._domainkey.{one.domain} for {one.authors} {one.application}" for one in config.dkim]
    tables: list[tuple[str, str, list[str], str]] = [
        ("route", "name", [route.label for route in config.route], "two routes are called {!r}: give one of them another name"),
        ("source", "name", [source.name for source in config.source], "two sources are called {!r}"),
        ("application", "name", [one.name for one in config.application], "there are two tables for the application {!r}"),
        ("certificate", "chain", [one.chain for one in config.certificate], "two certificates are in {!r}"),
        ("filter", "name", [one.name for one in config.filter], "two filters are called {!r}: give one of them another name"),
        ("mail_rule", "name", [one.name for one in config.mail_rule], "two rules are called {!r}: give one of them another name"),
        ("abuse", "name", [one.name for one in config.abuse], "two [[abuse]] are called {!r}: give one another name"),
        ("webhook", "name", [one.name for one in config.webhook], "two webhooks are called {!r}: give one another name"),
        ("dkim", "selector", keys, "the same key is given twice: it would sign twice"),
    ]
    for table, key, values, what in tables:
        for number, value in repeated(values):
            yield f"{table}.{number}.{key}", what.format(value), f"{table}.{values.index(value)}.{key}"


def _overlapping(config: "Config") -> Iterator[tuple[str, str, str]]:
    """Addresses to listen on that an earlier one includes, with that."""
    places = [(f"listener.{number}.address", listener.address) for number, listener in enumerate(config.listener)]
    if config.metrics.listen != "off":
        places.append(("metrics.listen", config.metrics.listen))
    if config.admin.listen != "off":
        places.append(("admin.listen", config.admin.listen))
    earlier: dict[tuple[str, int], tuple[str, str]] = {}
    for key, address in places:
        host, port = _bound(address)
        wildcard = "::" if ":" in host else "0.0.0.0"
        other = earlier.get((host, port)) or earlier.get((wildcard, port))
        if other is None and host == wildcard:
            same = (found for (one, at), found in earlier.items() if at == port and (":" in one) == (":" in host))
            other = next(same, None)
        if other is not None:
            listeners = key.startswith("listener")
            both = listeners and _bound(other[1]) == (host, port)
            what = f"two listeners have the address {address!r}" if both else f"{other[0]} ({other[1]}) has this port already"
            yield key, what, other[0]
        earlier.setdefault((host, port), (key, address))


def _bound(address: str) -> tuple[str, int]:
    host, port = parse_hostport(address)
    try:
        return ipaddress.ip_address(host).compressed, port
    except ValueError:
        return "127.0.0.1" if host == "localhost" else host.lower(), port


def notes(config: "Config") -> list[str]:
    """Warnings about a valid configuration, one sentence each: values given by old names, and probable mistakes."""
    pairs: list[tuple[str, ...]] = []
    if config.relay.domains and not config.relay.recipients:
        what = (
            "without relay.recipients there is a backscatter risk: mail for any address there is accepted, and bounces to forged "
            "senders when the next hop rejects the address"
        )
        pairs.append(("relay.domains", what))
    pairs += [*open_to_all(config), *_doubtful_names(config), *_without_effect(config), *_for_nobody(config), *never(config)]
    pairs += [*_of_filters(config), *_of_mail_rules(config)]
    if config.quarantine.octets < config.limits.message_size:
        what = "a message may be larger than that (limits.message_size), and is deleted as soon as it is there"
        pairs.append(("quarantine.octets", what))
    if not config.route_map:  # else what it names is not known here
        pairs += [(f"route.{number}", what, f"route.{first}") for number, what, first in never_used(config)]
    pairs += _relative(config)
    for number, route in enumerate(config.route):
        if in_clear(route.lookup):
            what = f"{route.lookup}: an attacker on the path can redirect mail; use https://"
            pairs.append((f"route.{number}.lookup", what))
    return [*config._renamed, *config.shortened(), *(config.at(*pair) for pair in pairs)]


def _doubtful_names(config: "Config") -> Iterator[tuple[str, str]]:
    """Names that other servers may reject in EHLO."""
    what = "{!r} has no dot: other servers cannot look it up, and many reject it in EHLO; give the full name of this host"
    if not config._unnamed:
        if has_one_label(config.hostname):
            yield "hostname", what.format(config.hostname)
    else:
        try:
            helo_name(socket.gethostname())
        except ValueError as error:
            yield "hostname", f"the name of this host cannot be used: {error}; {config.hostname!r} is used instead: set hostname"
    for number, source in enumerate(config.source):
        if source.hostname and has_one_label(source.hostname):
            yield f"source.{number}.hostname", what.format(source.hostname)


def never_used(config: "Config") -> Iterator[tuple[int, str, int]]:
    """(number, why, number of the other) of routes behind one that matches everything, or the same; a route map may name them
    all the same."""
    everything: int | None = None
    earlier: dict[tuple[str, ...], int] = {}
    for number, route in enumerate(config.route):
        alike = None if route.catches_all else earlier.get(route.conditions)
        for first, why in ((everything, "has no condition"), (alike, "has the same conditions")):
            if first is not None:
                what = f"route.{first} ({config.route[first].label!r}) {why} and comes first"
                yield number, f"{route.label!r} is never used: {what}", first
        earlier.setdefault(route.conditions, number)
        if route.catches_all and everything is None:
            everything = number


def _without_effect(config: "Config") -> Iterator[tuple[str, str]]:
    """What is repeated, and what other keys, or their own values, make ineffective."""
    listeners = [one.address for one in config.listeners]
    for number, route in enumerate(config.route):
        for address in route.listener:
            if address not in listeners:
                yield f"route.{number}.listener", f"there is no [[listener]] {address!r}{near(address, listeners)}"
        for position, _ in repeated([host if "/" in host else repr(parse_hostport(host, 25)) for host in route.hosts]):
            yield f"route.{number}.hosts", f"{route.hosts[position]} is given twice"
        if "ip" in route.model_fields_set and route.hosts and all(map(_is_number, route.hosts)):
            yield f"route.{number}.ip", "it has no effect: the hosts are given as addresses"
        if route.weights and route.mode != "balance":
            yield f"route.{number}.weights", 'they have no effect without mode = "balance"'
    for number, site in enumerate(config.site):
        if not site.hosts:
            yield f"site.{number}.hosts", "it matches no site: there are no hosts in it"
    for number, rule in enumerate(config.rule):
        lasts = rule.action in ("retry", "suspend", "slow")
        if not lasts and "duration" in rule.model_fields_set:
            yield f"rule.{number}.for", f'it has no effect with action = "{rule.action}"'
        elif rule.action == "slow" and not rule.duration:
            yield f"rule.{number}.for", "slow for no time has no effect"
    for number, key in enumerate(config.dkim):
        for name in sorted(TRACE & set(key.oversigned)):
            yield (
                f"dkim.{number}.oversigned",
                f"{name}: a host on the way may add one, which no signature survives (RFC 6376 5.4.1)",
            )
    for number, one in enumerate(config.filter):
        if one.timeout > config.filters.budget and "timeout" in one.model_fields_set:
            what = f"{one.timeout:g} s are more than all filters have together (filters.budget, {config.filters.budget:g} s)"
            yield f"filter.{number}.timeout", what
    for number, listener in enumerate(config.listener):
        if listener.auth_in_clear and listener.auth == "off" and not listener.reads_mail:
            yield f"listener.{number}.auth_in_clear", 'it has no effect with auth = "off"'
    earlier: list[Any] = []
    for number, row in enumerate(config.network):
        networks = [ipaddress.ip_network(text) for text in row.networks]
        if not networks:
            yield f"network.{number}.networks", "it is never used: there are no clients in it"
        elif all(any(one.version == wide.version and one.subnet_of(wide) for wide in earlier) for one in networks):
            yield f"network.{number}", "it is never used: earlier [[network]] tables have all of its clients"
        earlier += networks


def _of_filters(config: "Config") -> Iterator[tuple[str, str]]:
    """What filters do not do, though it looks as if they did."""
    listeners = [one.address for one in config.listener]
    filtered = {one.address for one in config.listener if one.filtered}
    for number, row in enumerate(config.filter):
        for address in row.listener:
            if address not in listeners:
                yield f"filter.{number}.listener", f"there is no [[listener]] {address!r}{near(address, listeners)}"
            elif address in filtered:
                yield f"filter.{number}.listener", f"no filter looks at mail that comes in on {address} (filtered = true)"
        for _, address in repeated(row.address):
            yield f"filter.{number}.address", f"{address} is given twice"
        yield from _of_hooks(number, row)
        behind = [one.name for one in config.filter[number + 1 :] if one.type == "milter" and "dkim" in _called(one)]
        if row.type == "milter" and "dmarc" in _called(row) and behind:
            what = f"{row.name} comes before {behind[0]}, and finds no DKIM results of that: put it behind"
            yield f"filter.{number}", what
        for word, verdict in row.verdicts.items():
            if verdict == "tag" and not config.filters.tag and not config.filters.subject:
                what = '"tag" has no effect: filters.tag and filters.subject are empty'
                yield f"filter.{number}.verdicts.{word}", what


def _of_hooks(number: int, row: "Filter") -> Iterator[tuple[str, str]]:
    """What others on the way may do with a hook on another host."""
    others = [address for address in row.address if row.type == "http" and not is_loopback(urlsplit(address).hostname or "")]
    for address in others:
        if in_clear(address):
            what = f"{address}: who is on the path can read mail and answer in place of the hook; use https://"
            yield f"filter.{number}.address", what
    if not row.secret_file and any(urlsplit(address).hostname != "localhost" for address in others):
        yield f"filter.{number}", f"{row.name} cannot tell requests of this relay from others: give secret_file"


def _of_mail_rules(config: "Config") -> Iterator[tuple[str, str]]:
    """What rules about mail do not do, though it looks as if they did."""
    scores = any(row.type in SCORED and not row.is_queued for row in config.filter)
    for number, row in enumerate(config.mail_rule):
        if row.score_min is not None and not scores:
            what = "no filter gives a score before the message is in the queue, so this never holds"
            yield f"mail_rule.{number}.score_min", f"{what}: {_listed(SCORED)} do"
        if row.verdict == "tag" and not config.filters.tag and not config.filters.subject:
            yield f"mail_rule.{number}.verdict", '"tag" has no effect: filters.tag and filters.subject are empty'
        if row.dmarc and (row.clients == "trusted" or not config.verify.results):
            why = "mail of clients that may relay is not verified" if config.verify.results else "verify.results is false"
            yield f"mail_rule.{number}.dmarc", f"it never holds: {why}"


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _called(row: "Filter") -> str:
    """The names by which a filter may be known, in one."""
    return " ".join([row.name, *row.address]).lower()


def _is_number(host: str) -> bool:
    """Whether a smart host is given as an address."""
    if "/" in host:
        return False
    try:
        ipaddress.ip_address(parse_hostport(host, 25)[0])
    except ValueError:
        return False
    return True


_PATHS = {
    "spool",
    "route_map",
    "recipients",
    "dovecot",
    "socket",
    "chain",
    "key",
    "client_certificate",
    "client_key",
}  # and what ends in "file"


def _relative(config: "Config") -> Iterator[tuple[str, str]]:
    """Paths whose meaning depends on where the relay is started."""
    from relaymta.config.describing import given_values  # knows the whole configuration

    for key, value in given_values(config):
        name = key.rpartition(".")[2]
        is_path = isinstance(value, str) and value not in ("", "-") and (name in _PATHS or name.endswith("file"))
        is_none = name == "socket" and value == "off"
        if is_path and not is_none and not PurePath(value).is_absolute():
            yield key, f"{value!r} is relative to the directory that the relay is started in: write the whole path"


def open_to_all(config: "Config") -> Iterator[tuple[str, str]]:
    """Settings that make an open relay: (key, what is wrong). The networks of several places are added up."""
    peers = [(f"network.{number}.networks", peer) for number, peer in enumerate(config.network)]
    relaying = [("relay.networks", config.relay.networks), *((key, peer.networks) for key, peer in peers if peer.relay)]
    speaking = [(key, peer.networks) for key, peer in peers if peer.xclient]
    for parts, what in (
        (relaying, "may relay: that is an open relay, which spammers find within hours"),
        (speaking, "may set their address by XCLIENT: that is an open relay for whoever claims a local one"),
    ):
        networks = _first(parts, len(parts))
        if everywhere(networks):
            key = next(key for number, (key, _) in enumerate(parts, 1) if everywhere(_first(parts, number)))
            yield key, f"{widest(networks)} {what}"
    for number, listener in enumerate(config.listener):
        if everywhere(listener.proxy):
            what = "may set their address by PROXY: that is an open relay for whoever claims a local one"
            yield f"listener.{number}.proxy", f"{widest(listener.proxy)} {what}"


def _first(parts: list[tuple[str, list[str]]], count: int) -> list[str]:
    return [text for _, more in parts[:count] for text in more]


def _sent_in_clear(config: "Config") -> Iterator[tuple[str, str]]:
    """URLs by which secrets would be sent unprotected to another host."""
    asked = [("accounts.url", config.accounts.url, "passwords")]
    if config.accounts.tokens is not None:
        tokens = config.accounts.tokens
        asked.append(("accounts.tokens.jwks", tokens.jwks, "keys that verify tokens"))
        asked.append(("accounts.tokens.introspection", tokens.introspection, "tokens and our client secret"))
    if config.tracing.header_file:
        asked.append(("tracing.endpoint", config.tracing.endpoint, "the secret of header_file"))
    for number, route in enumerate(config.route):
        if route.oauth is not None:
            asked.append((f"route.{number}.oauth.token_url", route.oauth.token_url, "our client secret and tokens"))
    for key, url, what in asked:
        if in_clear(url):
            yield key, f"{what} would go over plain http to another host; use https://, or a loopback address"


def _needs_of_listeners(config: "Config") -> Iterator[tuple[str, str]]:
    """What listeners need of other tables: certificates and accounts."""
    if config.admin.tls and not config.certificate:
        yield "admin.tls", "needs a [[certificate]]"
    for number, listener in enumerate(config.listener):
        if listener.tls in ("require", "implicit") and not config.certificate:
            yield f"listener.{number}.tls", f"{listener.tls!r} needs a [[certificate]]"
        if listener.auth != "off" and not (config.certificate or listener.auth_in_clear):
            yield f"listener.{number}.auth", "needs a [[certificate]]: AUTH is offered over TLS only"
        if listener.auth != "off" and not config.accounts and not config.local_domains:
            yield f"listener.{number}.auth", "needs accounts.file or a back end: no client could log in"


def _needs_of_mailboxes(config: "Config") -> Iterator[tuple[str, str]]:
    """What listeners of mailboxes need: that there are any, and for LMTP that their mail is not taken elsewhere by staging."""
    for number, listener in enumerate(config.listener):
        if listener.reads_mail:
            if not config.local_domains:
                what = f'{listener.protocol!r} needs a [[route]] with protocol = "mailbox": no mail is kept here'
                yield f"listener.{number}.protocol", what
            if not (config.certificate or listener.auth_in_clear):
                yield f"listener.{number}.protocol", f"{listener.protocol!r} needs a [[certificate]]: logins need TLS"
        if listener.protocol == "lmtp":
            if not config.local_domains:
                yield f"listener.{number}.protocol", '"lmtp" needs a [[route]] with protocol = "mailbox": no mail is kept here'
            if config.staging.redirect:
                yield f"listener.{number}.protocol", '"lmtp" with staging.redirect: mail would be filed, and not redirected'


_FOR_WHOM = {
    "lmtp": "deliver: name them in relay.networks, or listen on 127.0.0.1",
    "http": 'send: let them log in (auth = "require"), name them in relay.networks, or listen on 127.0.0.1',
}


def _for_nobody(config: "Config") -> Iterator[tuple[str, str]]:
    """Listeners of LMTP and HTTP that other hosts reach and may not use."""
    relaying = [*config.relay.networks, *(text for peer in config.network if peer.relay for text in peer.networks)]
    if any(not ipaddress.ip_network(text).is_loopback for text in relaying):
        return
    for number, listener in enumerate(config.listener):
        host = _bound(listener.address)[0]
        if listener.protocol in _FOR_WHOM and listener.auth == "off" and not is_loopback(host):
            yield f"listener.{number}.address", f"other hosts can connect, but none may {_FOR_WHOM[listener.protocol]}"
