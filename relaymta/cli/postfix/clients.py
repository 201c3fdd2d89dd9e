"""A transport that sends mail by SMTP or LMTP: source address, TLS, login and limits, as keys of a route."""

import ipaddress
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from relaymta.cli.postfix.beside import Beside
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import DEFAULT, Origin, Place, tokens
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.maps import Entry, Maps
from relaymta.cli.postfix.master_cf import Service
from relaymta.cli.postfix.resolving import Resolver, maps_of
from relaymta.cli.postfix.toml_text import NOWHERE, Row

__all__ = ["SYSTEM_CAS", "Client", "Source", "host_and_port", "port_number", "shown"]

SYSTEM_CAS = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
)  # fmt: skip
_PORTS = {"smtp": 25, "mail": 25, "submission": 587, "smtps": 465, "submissions": 465, "lmtp": 24}
# TLS levels, as tls of a route; those of the second table are weaker here.
_LEVELS = {"none": "off", "may": "may", "encrypt": "encrypt", "verify": "verify", "secure": "verify"}
_WEAKER = {"dane": "may", "dane-only": "encrypt", "half-dane": "may", "fingerprint": "encrypt"}
_MECHANISMS = ("plain", "login", "cram-md5", "scram-sha-256")


@dataclass(frozen=True)
class Source:
    """A [[source]]."""

    address: str
    hostname: str
    origin: Origin = field(compare=False)


def port_number(text: str) -> int | None:
    """A port by its number or name."""
    if text.isdecimal():
        return int(text)
    try:
        return _PORTS.get(text) or socket.getservbyname(text, "tcp")
    except OSError:
        return None


def host_and_port(text: str, default: int) -> tuple[str, int, bool] | None:
    """(Host, port, whether its MX is looked up) of `[host]:port`, `host:port` and the like; None: it is none of them."""
    match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]+))(?::([A-Za-z0-9-]+))?", text.strip())
    if match is None:
        return None
    host = re.sub(r"\Aipv6:", "", match[1] or match[2], flags=re.I)
    port = port_number(match[3]) if match[3] else default
    return None if port is None else (host, port, match[1] is None and not is_address(host))


def is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def shown(host: str, port: int) -> str:
    """`host:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Client:
    """`scope`: its parameters; `service`: its line of master.cf; `sources`: where the source addresses of all transports are;
    `used`: where the rows of tables are noted that a route uses."""

    def __init__(
        self, scope: Scope, transport: str, service: Service | None, resolver: Resolver, files: Files, findings: Findings,
        beside: Beside, sources: dict[str, Source], used: set[Place],
    ) -> None:  # fmt: skip
        self.scope, self._transport, self._service, self._resolver = scope, transport, service, resolver
        self._files, self._findings, self._beside, self._sources, self._used = files, findings, beside, sources, used

    @property
    def port(self) -> int:
        """The port of hosts that are named without one."""
        return port_number(self.scope.text("smtp_tcp_port")) or 25

    @property
    def asks_for_mx(self) -> bool:
        """Whether a host without brackets is looked up as a domain."""
        scope = self.scope
        never = scope.yes("disable_dns_lookups") or scope.text("smtp_dns_support_level") == "disabled"
        return not never and scope.text("smtp_host_lookup") != "native"

    def note_mx(self) -> None:
        """Name what is not carried of mail to the MX."""
        scope = self.scope
        if self.delay:
            instead = 'give the domains a [[site]] with their MX and a rate, such as "60/m" for a delay of 1 s'
            self._findings.gap(scope.place(self.delay_name), f"{self.delay_name} = {scope.text(self.delay_name)}", instead)
        if not self.asks_for_mx:
            names = ("disable_dns_lookups", "smtp_dns_support_level", "smtp_host_lookup")
            name = next(name for name in names if scope.is_given(name))
            instead = "mail goes to the MX of a domain: name the hosts of those that have none in a [[route]]"
            self._findings.way(scope.place(name), f"{name} = {scope.text(name)}", instead)

    def families(self) -> Iterator[Row]:
        """`ip`."""
        protocols = set(self.scope.words("inet_protocols"))
        if protocols in ({"ipv4"}, {"ipv6"}):
            yield Row("ip", "4" if protocols == {"ipv4"} else "6", self.scope.origin("inet_protocols"))
        elif self.scope.text("smtp_address_preference") == "ipv4":
            yield Row("ip", "4 6", self.scope.origin("smtp_address_preference"))
        if self.scope.text("smtp_dns_support_level") == "dnssec":
            self._findings.gap(
                self.scope.place("smtp_dns_support_level"), "smtp_dns_support_level = dnssec", "DNSSEC is not asked for"
            )

    def chunking(self) -> Iterator[Row]:
        """`chunking`."""
        name = "smtp_discard_ehlo_keywords"
        words = [word.lower() for word in self.scope.words(name)]
        if "chunking" in words:
            yield Row("chunking", False, self.scope.origin(name))
        others = [word for word in words if word not in ("chunking", "silent-discard")]
        if others:
            instead = "what a host offers is used: chunking of a [[route]] is the only one that can be switched off"
            self._findings.gap(self.scope.place(name), f"{name} = {', '.join(others)}", instead)

    def xforward(self) -> Iterator[Row]:
        """`xforward`."""
        if self.scope.yes("smtp_send_xforward_command"):
            yield Row("xforward", True, self.scope.origin("smtp_send_xforward_command"))

    def limits(self) -> Iterator[Row]:
        """`connections`: the least of the transport's concurrency and its processes."""
        own = f"{self._transport}_destination_concurrency_limit"
        name = own if self.scope.is_given(own) else "default_destination_concurrency_limit"
        limits = [(self.scope.number(own) or 20, self.scope.origin(name))]
        if self._service is not None and self._service.limit:
            limits.append((self._service.limit, Origin(self._service.place, self._service.name)))
        least, origin = min(limits, key=lambda row: row[0])
        if least != 20:
            yield Row("connections", max(1, min(least, 1000)), origin)

    @property
    def delay_name(self) -> str:
        """The parameter with the delay between two messages to a host."""
        own = f"{self._transport}_destination_rate_delay"
        return own if self.scope.is_given(own) else "default_destination_rate_delay"

    @property
    def delay(self) -> int:
        """Seconds between two messages to a host; 0: there is no delay."""
        return self.scope.seconds(self.delay_name) or 0

    def source(self) -> Iterator[Row]:
        """`sources`."""
        scope = self.scope
        name = "smtp_bind_address" if scope.text("smtp_bind_address") else "smtp_bind_address6"
        address, helo = scope.text(name), scope.text("smtp_helo_name")
        helo = "" if helo == scope.text("myhostname") else helo
        if not address:
            if helo:
                instead = "give its address as a [[source]] with this hostname, and name that in sources of the routes"
                self._findings.gap(scope.place("smtp_helo_name"), f"smtp_helo_name = {helo}", instead)
            return
        other = scope.text("smtp_bind_address6")
        if name == "smtp_bind_address" and other:
            instead = "only the IPv4 address is carried: two [[source]] of a route share its mail"
            self._findings.gap(scope.place("smtp_bind_address6"), f"smtp_bind_address6 = {other}", instead)
        source = Source(address, helo, scope.origin(name))
        label = next((label for label, known in self._sources.items() if known == source), "")
        if not label:
            label = f"{self._transport[:28]}" if self._transport[:28] not in self._sources else f"source-{len(self._sources) + 1}"
            self._sources[label] = source
        yield Row("sources", [label], scope.origin(name))

    # TLS

    def tls(self, nexthop: str, login: bool) -> Iterator[Row]:
        """`tls` and what belongs to it. `login`: the route has one."""
        scope = self.scope
        level, origin = self._level(nexthop)
        ours = _LEVELS.get(level) or _WEAKER.get(level, "may")
        if level in _WEAKER:
            instead = f'there is no {"check of fingerprints" if level == "fingerprint" else "DANE"}; tls = "{ours}" here'
            self._findings.gap(origin.place, f"{origin.name or nexthop}: {level}", instead)
        if login and ours != "verify":
            instead = "credentials are sent over verified TLS alone: the host's certificate has to be valid for its name"
            place = origin.place if origin.place != DEFAULT else scope.place("smtp_sasl_auth_enable")
            self._findings.note(place, f"TLS level {level or 'none'} to {nexthop}", instead)
            ours, origin = "verify", origin if level else scope.origin("smtp_sasl_auth_enable")
        if ours != "may":
            yield Row("tls", ours, origin)
        if scope.yes("smtp_tls_wrappermode") and not re.search(r":(465|smtps|submissions)\Z", nexthop):
            instead = "TLS begins with the first octet on port 465 only"
            self._findings.way(scope.place("smtp_tls_wrappermode"), f"smtp_tls_wrappermode = yes, to {nexthop}", instead)
        authorities = scope.text("smtp_tls_CAfile")
        if ours == "verify" and authorities and authorities not in SYSTEM_CAS:
            yield Row("ca_file", authorities, scope.origin("smtp_tls_CAfile"))
        if ours != "off":
            yield from self._certificate()

    def _certificate(self) -> Iterator[Row]:
        scope, files = self.scope, self.scope.words("smtp_tls_chain_files")
        if files:
            yield Row("client_certificate", files[-1], scope.origin("smtp_tls_chain_files"))
            if len(files) > 1:
                yield Row("client_key", files[0], scope.origin("smtp_tls_chain_files"))
        elif scope.text("smtp_tls_cert_file") not in ("", "none"):
            yield Row("client_certificate", scope.text("smtp_tls_cert_file"), scope.origin("smtp_tls_cert_file"))
            if scope.text("smtp_tls_key_file") != scope.text("smtp_tls_cert_file"):
                yield Row("client_key", scope.text("smtp_tls_key_file"), scope.origin("smtp_tls_key_file"))

    def _level(self, nexthop: str) -> tuple[str, Origin]:
        """The TLS level for a next hop, "" where none is given, and where it is."""
        found = self._policy(nexthop)
        if found is not None:
            self._used.add(found.place)
            level, *more = found.value.split() or [""]
            if more:
                instead = "a policy is a level here: a host is verified by its own name, with TLS 1.2 or 1.3"
                self._findings.gap(found.place, f"smtp_tls_policy_maps: {nexthop} {found.value}", instead)
            return level, Origin(found.place, "smtp_tls_policy_maps")
        scope = self.scope
        if scope.text("smtp_tls_security_level"):
            return scope.text("smtp_tls_security_level").split()[0], scope.origin("smtp_tls_security_level")
        if scope.yes("smtp_enforce_tls"):
            return "verify" if scope.yes("smtp_tls_enforce_peername") else "encrypt", scope.origin("smtp_enforce_tls")
        return ("may", scope.origin("smtp_use_tls")) if scope.yes("smtp_use_tls") else ("", NOWHERE)

    @cached_property
    def policies(self) -> Maps:
        """smtp_tls_policy_maps."""
        return maps_of(self.scope, self._files, "smtp_tls_policy_maps")

    def _policy(self, nexthop: str) -> Entry | None:
        """The row of smtp_tls_policy_maps for a next hop: as it is written, or of a domain above it."""
        maps = self.policies
        for one in maps.unreadable:
            self._findings.gap(one.place, f"smtp_tls_policy_maps = {one.spec}", f"{one.why}: set tls of the routes")
        found, rest = maps.find(nexthop), nexthop.lower()
        while found is None and "." in rest[1:] and not rest.startswith("["):
            rest = rest[rest.index(".", 1) :]
            found = maps.find(rest, True)
        return found

    # Logins

    @cached_property
    def passwords(self) -> Maps:
        """smtp_sasl_password_maps, where logins are on."""
        return (
            maps_of(self.scope, self._files, "smtp_sasl_password_maps") if self.scope.yes("smtp_sasl_auth_enable") else Maps([])
        )

    def login(self, hops: dict[str, str], sender: str) -> list[Row]:
        """User name and password for hosts: by the sender ("": by none), by the name of the host, or by the next hop as it is
        written. `hops`: host -> next hop; those that have another login, or none, are taken out."""
        maps = self.passwords
        for one in maps.unreadable:
            self._findings.gap(one.place, f"smtp_sasl_password_maps = {one.spec}", f"{one.why}: give username and password_file")
        names = {host: parts[0] for host, parts in ((host, host_and_port(host, 25)) for host in hops) if parts is not None}
        by_sender = self.scope.yes("smtp_sender_dependent_authentication") and bool(sender)
        of_sender = self._resolver.find_address(maps, sender) if by_sender else None
        each = {host: of_sender or maps.find(name) or maps.find(hops[host]) for host, name in names.items()}
        self._used |= {entry.place for entry in each.values() if entry is not None}
        found = next(iter(each.values()))
        for host, entry in each.items():
            if (entry and entry.value) != (found and found.value):
                instead = "a route has one login, which no other host gets: give this one a [[route]] with min_attempts = 1"
                place = entry.place if entry is not None else found.place if found is not None else self.scope.place("relayhost")
                self._findings.way(place, f"{host} beside {next(iter(hops))}", instead)
                del hops[host]
        if found is None or not found.value.partition(":")[2]:
            return []
        first = next(iter(names.values()))
        user, _, password = found.value.partition(":")
        path = self._beside.password(f"{first}-{user}", password)
        if not self._beside.has_secrets:
            instead = f"import with --secrets DIR, or write it into {path}, for the relay's user alone"
            self._findings.gap(found.place, f"the password of {user} at {first}", instead)
        origin = Origin(found.place)
        return [Row("username", user, origin), Row("password_file", path, origin), *self._mechanism()]

    def _mechanism(self) -> Iterator[Row]:
        origin = self.scope.origin("smtp_sasl_mechanism_filter")
        words = [word.lower() for word in tokens(self.scope.text("smtp_sasl_mechanism_filter"))]
        if len(words) == 1 and words[0] in _MECHANISMS:
            yield Row("auth", words[0], origin)
        elif any(word in ("xoauth2", "oauthbearer") for word in words):
            self._findings.gap(origin.place, "a login by OAuth 2.0", "give the route a [route.oauth] table (docs/delivery.md)")
