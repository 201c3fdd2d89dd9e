"""The configuration: one typed schema, one TOML file, command line options that override it, and all problems reported at once.

The type, bounds, default and description of an option are here and nowhere else: `config describe`, the reference file and
the error messages are made from them. A problem reads `file:line: key: what (did you mean ...)`.
"""

import difflib
import inspect
import ipaddress
import re
import socket
import tomllib
from collections.abc import Iterable
from copy import deepcopy
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from relaymta.errors import ConfigError
from relaymta.proto.address import DomainError, normalize_domain

__all__ = [
    "Account", "Certificate", "Config", "Dkim", "Listener", "Route", "load", "load_accounts", "parse_duration", "parse_hostport",
    "parse_quota",
]  # fmt: skip

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\Z")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]?)i?[bB]?\Z")
_QUOTA = re.compile(r"(\d{1,15})\s*/\s*(s|m|h|d)\Z")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*/\s*(s|m|h|d)\Z")
_HASH = re.compile(r"SCRAM-SHA-256\$\d{4,8}:[A-Za-z0-9+/=]+\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=\Z|\$argon2id\$\S+\Z")
_UNION = re.compile(r"constrained-str\Z|(function-before|literal)\[")  # pydantic's names for the types of a union
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}
_OCTETS = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LONGEST = 36500 * 86400.0  # seconds of a duration: a time plus this can still be stored and shown


def _duration(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if match is None:
            raise ValueError('a duration such as "90s", "10m", "5d"')
        value = float(match[1]) * _SECONDS[match[2]]
    if isinstance(value, int | float) and value > _LONGEST:
        raise ValueError('a duration of at most "36500d"')
    return value


def parse_duration(text: str) -> float:
    """Seconds of a duration such as "90s", "10m", "5d", at most a hundred years. ValueError says what is expected."""
    return float(_duration(text))  # type: ignore[arg-type]


def _size(value: object) -> object:
    if isinstance(value, str):
        match = _SIZE.match(value.strip())
        if match is None:
            raise ValueError('a size such as "50MB"')
        return int(float(match[1]) * _OCTETS[match[2]])
    return value


def _rate(value: object) -> object:
    if isinstance(value, str):
        match = _RATE.match(value.strip())
        if match is None:
            raise ValueError('a rate such as "20/s", "500/m", "10000/h"')
        return float(match[1]) / _SECONDS[match[2]]
    return value


def parse_hostport(text: str, default_port: int | None = None) -> tuple[str, int]:
    """(host, port) of `host:port`, `[v6]:port`, or `host` with a default port. ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets")
    if any(char.isspace() for char in host):
        raise ValueError(f"{text!r}: it has white space in it")
    if not port and default_port is not None and host:
        return host, default_port
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: expected host:port")
    return host, int(port)


def _address(value: object) -> object:
    if isinstance(value, str):
        parse_hostport(value)
    return value


def notes(config: "Config") -> list[str]:
    """Warnings about a valid configuration, one sentence each: values given by old names, and probable mistakes."""
    found = list(config._renamed)
    if config.relay.domains and not config.relay.recipients:
        found.append(
            "relay.domains without relay.recipients: backscatter risk (mail for any address there is accepted, and bounces to "
            "forged senders when the next hop rejects the address)"
        )
    found += [f"{_dotted(place)}: {what}" for place, what in _open_to_all(config)]
    for number, route in enumerate(config.route):
        if _in_clear(route.lookup):
            found.append(f"route.{number}.lookup: {route.lookup}: an attacker on the path can redirect mail; use https://")
    return found


def _host(value: object) -> object:
    if isinstance(value, str) and not value.startswith("unix:/"):
        parse_hostport(value, 25)
    return value


@cache
def parse_quota(text: str) -> tuple[int, float]:
    """(count, seconds) of a quota `COUNT/UNIT`. ValueError for anything else."""
    match = _QUOTA.match(text.strip())
    if match is None or not int(match[1]):
        raise ValueError(f'{text!r} is not a quota such as "60/m" or "10000/d"')
    return int(match[1]), float(_SECONDS[match[2]])


def _quota(value: object) -> object:
    if isinstance(value, str) and value:
        parse_quota(value)
    return value


def _network(value: object) -> object:
    if isinstance(value, str):
        network = ipaddress.ip_network(value)
        if isinstance(network, ipaddress.IPv6Network):
            if network.network_address.scope_id is not None:
                raise ValueError("a network without a scope: the scope of a client's address is ignored")
            mapped = network.network_address.ipv4_mapped
            if mapped is not None and network.prefixlen >= 96:  # an IPv4 client (RFC 4291 2.5.5.2)
                return str(ipaddress.ip_network((mapped, network.prefixlen - 96)))
        return str(network)
    return value


Duration = Annotated[float, BeforeValidator(_duration), Field(ge=0)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_rate), Field(ge=0)]
Quota = Annotated[str, BeforeValidator(_quota)]
Address = Annotated[str, BeforeValidator(_address)]
Host = Annotated[str, BeforeValidator(_host)]
Network = Annotated[str, BeforeValidator(_network)]
M = TypeVar("M", bound=BaseModel)
LOOPBACK = ["127.0.0.0/8", "::1/128"]


# Special-purpose IPv4 addresses (IANA's registry), which no host on the Internet has; and IPv6's global unicast addresses.
_SPECIAL = [
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
        "198.18.0.0/15", "224.0.0.0/3",
    )
]  # fmt: skip
_GLOBAL = [ipaddress.IPv6Network("2000::/3")]
# IPv6 prefixes that embed an IPv4 address, and after how many bits: NAT64 (RFC 6052), 6to4 (RFC 3056).
_EMBEDDED = [(ipaddress.IPv6Network("64:ff9b::/96"), 96), (ipaddress.IPv6Network("2002::/16"), 16)]
EVERYWHERE_SHARE = 16  # no organization's own networks are a sixteenth of the Internet
_Network = TypeVar("_Network", ipaddress.IPv4Network, ipaddress.IPv6Network)


def _common(some: list[_Network], others: list[_Network]) -> int:
    """The number of addresses that are in both of two lists, neither of which overlaps itself."""
    return sum(min(one.num_addresses, other.num_addresses) for one in some for other in others if one.overlaps(other))


def everywhere(networks: list[str]) -> bool:
    """Whether networks cover much of the Internet together (1/EVERYWHERE_SHARE of the public IPv4 or IPv6 addresses), so that
    anybody can have an address in them."""
    all_of = [ipaddress.ip_network(text) for text in networks]
    fourth = [network for network in all_of if isinstance(network, ipaddress.IPv4Network)]
    sixth = [network for network in all_of if isinstance(network, ipaddress.IPv6Network)]
    for network in sixth:
        for prefix, bits in _EMBEDDED:
            if network.overlaps(prefix):
                length = min(32, max(0, network.prefixlen - bits))
                inner = int(network.network_address) >> (96 - bits) & 0xFFFFFFFF if network.prefixlen >= bits else 0
                fourth.append(ipaddress.IPv4Network((inner, length), strict=False))
    fourth, sixth = list(ipaddress.collapse_addresses(fourth)), list(ipaddress.collapse_addresses(sixth))
    public = sum(network.num_addresses for network in fourth) - _common(fourth, _SPECIAL)
    return public >= 2**32 // EVERYWHERE_SHARE or _common(sixth, _GLOBAL) >= 2**125 // EVERYWHERE_SHARE


Place = tuple[str | int, ...]


class _Problems(ValueError):
    """Problems with several keys. `found`: (place of the key, what is wrong with it) of each."""

    def __init__(self, found: list[tuple[Place, str]]) -> None:
        super().__init__("; ".join(f"{_dotted(place)}: {what}" for place, what in found))
        self.found = found


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _in_clear(url: str) -> bool:
    """Whether a URL means plain http to another host: request and response could be read and changed on the path."""
    try:
        parts = urlsplit(url)
    except ValueError:  # not a URL
        return True
    return parts.scheme == "http" and parts.hostname != "localhost" and not _is_loopback(parts.hostname or "")


def _open_to_all(config: "Config") -> list[tuple[Place, str]]:
    """Settings that make an open relay: (place, what is wrong). The networks of several places are added up."""
    peers = [(("network", number, "networks"), peer) for number, peer in enumerate(config.network)]
    relaying: list[tuple[Place, list[str]]] = [(("relay", "networks"), config.relay.networks)]
    relaying += [(place, peer.networks) for place, peer in peers if peer.relay]
    speaking: list[tuple[Place, list[str]]] = [(place, peer.networks) for place, peer in peers if peer.xclient]
    found = []
    for parts, what in (
        (relaying, "may relay: that is an open relay, which spammers find within hours"),
        (speaking, "may set their address by XCLIENT: that is an open relay for whoever claims a local one"),
    ):
        networks = _first(parts, len(parts))
        if everywhere(networks):
            place = next(place for number, (place, _) in enumerate(parts, 1) if everywhere(_first(parts, number)))
            found.append((place, f"{_named(networks)} {what}"))
    for number, listener in enumerate(config.listener):
        if everywhere(listener.proxy):
            what = "may set their address by PROXY: that is an open relay for whoever claims a local one"
            found.append((("listener", number, "proxy"), f"{_named(listener.proxy)} {what}"))
    return found


def _first(parts: list[tuple[Place, list[str]]], count: int) -> list[str]:
    return [text for _, more in parts[:count] for text in more]


def _named(networks: list[str]) -> str:
    """The widest three of some networks, for a message."""
    first = sorted(networks, key=lambda text: ipaddress.ip_network(text).prefixlen)
    return ", ".join(first[:3]) + (" ..." if len(first) > 3 else "")


def _spoken(name: str) -> str:
    if not name.isprintable() or " " in name:
        raise ValueError(f"{name!r} has white space or control characters in it")
    return name


Spoken = Annotated[str, AfterValidator(_spoken)]  # is inserted unchanged into commands, replies and header fields


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Listener(_Table):
    """An address to accept mail on. `[[listener]]`, repeatable."""

    address: Address = Field(description="host:port to listen on")
    application: str = Field("", description="application of mail accepted here, as routes, limits and log records name it")
    priority: Literal["express", "normal", "bulk"] = Field("normal", description="class of mail accepted here")
    submission: bool = Field(False, description="add Date: and Message-ID: where they are missing (RFC 6409 8)")
    tls: Literal["off", "may", "require", "implicit"] = Field(
        "may", description="may: STARTTLS if there is a certificate; require: no mail before STARTTLS; implicit: TLS from the "
        "first octet (port 465)",
    )  # fmt: skip
    auth: Literal["off", "may", "require"] = Field(
        "off", description="AUTH, offered over TLS; may: clients that log in may relay; require: no mail before AUTH"
    )
    proxy: list[Network] = Field(
        [],
        description="load balancers that send a PROXY header (version 1 or 2); if given, no other client may connect",
    )
    auth_in_clear: bool = Field(False, description="offer AUTH without TLS; only on a loopback address")

    @model_validator(mode="after")
    def _check(self) -> "Listener":
        host = parse_hostport(self.address)[0]
        if self.auth_in_clear and not (host == "localhost" or _is_loopback(host)):
            raise ValueError(f"auth_in_clear: {self.address} is not a loopback address: passwords would be sent in clear")
        if self.auth != "off" and self.tls == "off" and not self.auth_in_clear:
            raise ValueError("auth needs tls, or auth_in_clear on a loopback address: no client could log in")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Certificate(_Table):
    """A certificate for TLS with clients. `[[certificate]]`, repeatable; the one for the server name that a client asks for (SNI)
    is used, else the first. Files are read again when they change."""

    chain: str = Field(description="PEM file: the certificate, then its intermediate certificates")
    key: str = Field("", description="PEM file of the private key; empty: it is in the same file")


class Dkim(_Table):
    """A DKIM key that signs mail of clients that may relay. `[[dkim]]`, repeatable; every key that matches signs. Files are read
    again when they change."""

    domain: str = Field(description="the signing domain: d=")
    selector: str = Field(description="selector of its DNS record: s=")
    key: str = Field(description="PEM file of the private key, RSA or Ed25519 (`relaymta dkim keygen`)")
    authors: list[str] = Field(
        [], description='domains in From: whose mail it signs, ".example" for subdomains, "*" for all; empty: the signing domain'
    )
    application: list[str] = Field([], description="applications whose mail it signs; empty: all")
    canonicalization: Literal["relaxed/relaxed", "relaxed/simple", "simple/relaxed", "simple/simple"] = Field(
        "relaxed/relaxed", description="header/body canonicalization: c="
    )
    signed: list[str] = Field([], description="header fields to sign in addition to the usual ones")
    oversigned: list[str] = Field(
        [], description="header fields that must not be added later; empty: From, To, Subject, Date and similar ones"
    )
    expires: Duration = Field(0, description="validity of a signature (x=); 0: it does not expire")

    @field_validator("domain", "selector")
    @classmethod
    def _is_domain(cls, name: str) -> str:
        return _in_dns(name)

    @field_validator("authors")
    @classmethod
    def _are_domains(cls, names: list[str]) -> list[str]:
        return [name if name == "*" else "." * name.startswith(".") + _in_dns(name.removeprefix(".")) for name in names]

    @field_validator("signed", "oversigned")
    @classmethod
    def _are_fields(cls, names: list[str]) -> list[str]:
        wrong = next((name for name in names if not re.fullmatch(r"[!-9;-~]+", name)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is not the name of a header field")
        return [name.lower() for name in names]

    def signs_for(self, application: str) -> bool:
        """Whether this key signs mail of an application, apart from its author."""
        return not self.application or application in self.application

    def signs(self, author: str) -> bool:
        """Whether this key signs mail of an author's domain, given in A-labels and lower case; "": the author has no domain."""
        return any(
            own in ("*", author) or (own.startswith(".") and author.endswith(own)) for own in self.authors or [self.domain]
        )


def _in_dns(name: str) -> str:
    """A domain name in A-labels and lower case, safe to insert into header fields. ValueError when it is not one."""
    try:
        found = normalize_domain(name)
    except DomainError:
        found = ""
    if not re.fullmatch(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*", found):
        raise ValueError(f"{name!r} is not a valid domain name")
    return found


class Verify(_Table):
    """SPF, DKIM and DMARC checks of mail from unauthenticated clients. `[verify]`"""

    results: bool = Field(False, description="check, and add the results as Authentication-Results: (RFC 8601)")
    dmarc: Literal["report", "enforce"] = Field(
        "report",
        description="report: only add the result; enforce: if DMARC fails, reject where the author's domain has p=reject, hold "
        "where it has p=quarantine",
    )


class TokensTable(_Table):
    """OAuth 2.0 bearer tokens that clients log in with (OAUTHBEARER, XOAUTH2). `[accounts.tokens]`"""

    issuer: str = Field("", description="required issuer: the `iss` claim; needed with jwks")
    audience: str = Field("", description="required audience: the `aud` claim; empty: not checked")
    jwks: str = Field("", description="URL of the issuer's keys (JWK set), to verify tokens that are JWTs")
    introspection: str = Field("", description="URL of an introspection endpoint (RFC 7662), instead of jwks")
    client_id: str = Field("", description="our client id at the introspection endpoint")
    client_secret_file: str = Field("", description="file with our client secret")
    user_claim: str = Field("email", description="the claim with the user name")

    @model_validator(mode="after")
    def _check(self) -> "TokensTable":
        for url in (self.jwks, self.introspection):
            if url and not re.match(r"https?://[^/]", url):
                raise ValueError(f"{url!r} is not an http:// or https:// URL")
        if bool(self.jwks) == bool(self.introspection):
            raise ValueError("give jwks or introspection")
        if self.jwks and not self.issuer:
            raise ValueError("jwks needs issuer: other issuers may use the same keys")
        return self


class AccountsTable(_Table):
    """Authentication: the file of accounts and the back ends. `[accounts]`"""

    file: str = Field("", description="file of accounts, edited by `relaymta user` and `relaymta app`")
    dovecot: str = Field("", description="auth-client socket of Dovecot: checks the passwords of users who are not in the file")
    url: str = Field(
        "", description="HTTP endpoint that checks the passwords of users who are not in the file; see docs/submission.md"
    )
    tokens: TokensTable | None = Field(None, description="bearer tokens")
    failures: int = Field(
        10,
        ge=1,
        description="failed login attempts from one address (IPv6: /64; 8 times as many from a /48) or for one account, after "
        "which more are temporarily rejected",
    )
    failures_forgotten: Duration = Field(60, description="time after which one failed attempt no longer counts")
    answer_after: Duration = Field(1, description="delay from a failed login attempt to its reply, whatever the reason")
    remember: Duration = Field(60, description="time for which a verified password is cached; 0: not cached")

    @model_validator(mode="after")
    def _check(self) -> "AccountsTable":
        if self.url and not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"url: {self.url!r} is not an http:// or https:// URL")
        if self.url and self.dovecot:
            raise ValueError("url and dovecot: give one of them")
        return self

    def __bool__(self) -> bool:
        return bool(self.file or self.dovecot or self.url or self.tokens)


class OAuth(_Table):
    """OAuth 2.0 tokens for a smart host that requires them (Microsoft 365, Gmail). `[route.oauth]`"""

    token_url: str = Field(description="the token endpoint")
    client_id: str = Field(description="our client id")
    client_secret_file: str = Field("", description="file with our client secret")
    refresh_token_file: str = Field("", description="file with a refresh token; empty: use the grant client_credentials")
    scope: str = Field("", description='for example "https://outlook.office365.com/.default"')


def header_condition(text: str) -> tuple[bytes, re.Pattern[str]]:
    """A route's `header` condition as (field name in lower case, expression). ValueError when it is malformed."""
    name, colon, expression = text.partition(":")
    if not colon or not re.fullmatch(r"[!-9;-~]+", name):
        raise ValueError(f'header: {text!r} is not "Name: regular expression"')
    try:
        return name.lower().encode(), re.compile(expression.strip(), re.I | re.S)
    except re.error as error:
        raise ValueError(f"header: {text!r}: {error}") from None


class Route(_Table):
    """Where mail is sent. `[[route]]`, repeatable; the first route that matches is used. All conditions given must match."""

    name: str = Field("", description="name in logs, metrics and `queue summary`; default: the first host")
    application: list[str] = Field([], description="matches mail of these applications; empty: any")
    sender: list[str] = Field([], description='matches these sender addresses, "" the null sender; empty: any')
    sender_domain: list[str] = Field([], description='matches these sender domains, ".example" and below; empty: any')
    recipient: list[str] = Field([], description="matches these recipient addresses; empty: any")
    recipient_domain: list[str] = Field([], description='matches these recipient domains, ".example" and below; empty: any')
    mx: list[str] = Field(
        [], description='matches domains with an MX host of these names, ".example" and below; with application and '
        "recipient_domain only; empty: any",
    )  # fmt: skip
    header: list[str] = Field(
        [], description='matches messages with such header fields, each a "Name: regular expression" on its value (of From: and '
        "Sender: on each address), evaluated when the message is accepted; empty: any",
    )  # fmt: skip
    min_size: Size = Field(0, description="matches messages of at least this many octets")
    max_size: Size = Field(0, description="matches messages of at most this many octets; 0: any")
    min_attempts: int = Field(0, ge=0, description="matches messages after at least this many attempts: a fallback")
    hosts: list[Host] = Field(
        [], description="smart hosts as host[:port] or, for LMTP, unix:/path; empty: the recipient domain's MX"
    )
    lookup: str = Field(
        "",
        description="URL of a service that returns the hosts for a domain: `?domain=D&application=A`; see docs/delivery.md",
    )
    lookup_hosts: list[str] = Field(
        [], description='hosts that the look-up may return, ".example" and below; empty: any (required with username)'
    )
    mode: Literal["failover", "balance"] = Field(
        "failover", description="failover: use the next host when one cannot be reached; balance: share the load"
    )
    weights: list[int] = Field([], description="weights of the hosts for balance, in their order; empty: equal")
    protocol: Literal["smtp", "lmtp"] = Field("smtp", description="protocol of the hosts")
    tls: Literal["off", "may", "encrypt", "verify"] = Field(
        "may",
        description="TLS to these hosts; may: if offered; encrypt: required, with any certificate; verify: with a valid one",
    )
    auth: Literal["auto", "plain", "login", "cram-md5", "scram-sha-256", "xoauth2", "oauthbearer"] = Field(
        "auto", description="AUTH mechanism; auto: the strongest that the host offers, xoauth2 if there is an oauth table"
    )
    username: str = Field("", description="AUTH user name; needs tls = verify")
    password_file: str = Field("", description="file with the password")
    password_env: str = Field("", description="environment variable with the password")
    oauth: OAuth | None = Field(None, description="OAuth 2.0 tokens instead of a password")
    sources: list[str] = Field([], description="names of the [[source]] addresses to send from; empty: the system chooses")
    ip: Literal["6 4", "4 6", "4", "6"] = Field("6 4", description="address families to use, the preferred one first")
    rewrite_sender: str = Field(
        "", description='envelope sender to use: an address, or "@domain" to replace the domain; the null sender is not changed'
    )
    chunking: bool = Field(True, description="use BDAT with hosts that offer CHUNKING (RFC 3030)")
    connections: int = Field(20, ge=1, le=1000, description="concurrent connections to the site, of all workers together")
    messages_per_connection: int = Field(1000, ge=1, description="messages after which a connection is closed")

    @model_validator(mode="after")
    def _check(self) -> "Route":
        if self.username and self.tls != "verify":
            raise ValueError('username needs tls = "verify": credentials are sent over verified TLS only')
        if self.username and not (self.password_file or self.password_env or self.oauth):
            raise ValueError("username needs password_file, password_env or oauth")
        if self.username and not (self.hosts or self.lookup):
            raise ValueError("username needs hosts: credentials are sent to configured hosts only")
        if self.oauth and not self.username:
            raise ValueError("oauth needs username: the mailbox that the token is for")
        if self.auth in ("xoauth2", "oauthbearer") and not self.oauth:
            raise ValueError(f"auth = {self.auth!r} needs an oauth table")
        if self.weights and len(self.weights) != len(self.hosts):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.hosts)} hosts")
        if self.weights and (min(self.weights) < 0 or not any(self.weights)):
            raise ValueError("weights: none may be negative, and not all 0")
        others = (
            self.sender, self.sender_domain, self.recipient, self.header, self.min_size, self.max_size, self.min_attempts,
        )  # fmt: skip
        for condition in self.header:
            header_condition(condition)
        if self.lookup and self.hosts:
            raise ValueError("lookup and hosts: give one of them; the look-up returns the hosts")
        if self.lookup and not re.match(r"https?://[^/]", self.lookup):
            raise ValueError("lookup: not an http:// or https:// URL")
        if self.lookup and self.username and (not self.lookup_hosts or _in_clear(self.lookup)):
            raise ValueError(
                "username and lookup: needs an https:// or loopback URL, and lookup_hosts: credentials are sent to these only"
            )
        if self.mx and any(others):
            raise ValueError(
                "mx can be combined with application and recipient_domain only: MX hosts are known per domain, not per message"
            )
        if self.protocol == "lmtp" and not self.hosts:
            raise ValueError('protocol = "lmtp" needs hosts')
        if any(host.startswith("unix:") for host in self.hosts) and self.protocol != "lmtp":
            raise ValueError('unix: hosts need protocol = "lmtp"')
        if "@" not in self.rewrite_sender and self.rewrite_sender:
            raise ValueError(f'rewrite_sender: {self.rewrite_sender!r} is neither an address nor "@domain"')
        return self

    @property
    def label(self) -> str:
        """The route's name; by default its first host, or "mx"."""
        return self.name or (self.hosts[0] if self.hosts else "mx")


class SiteTable(_Table):
    """Limits of the sites whose hosts match. `[[site]]`, repeatable. Each limit is taken from the first match that sets it, then
    from the route, then from the provider profiles that come with relaymta."""

    name: str = Field("", description="all sites that match share these limits, under this name; empty: each site has its own")
    hosts: list[str] = Field(description='matches sites with an MX or smart host of these names, ".example" and below')
    connections: int | None = Field(None, ge=1, le=1000, description="concurrent connections, of all workers together")
    messages_per_connection: int | None = Field(None, ge=1, description="messages after which a connection is closed")
    rate: Rate | None = Field(None, description='message rate, such as "500/m", of all workers together')
    connection_rate: Rate | None = Field(None, description='rate of new connections, such as "2/s", of all workers together')


class Rule(_Table):
    """What a reply of a host means, beyond its code. `[[rule]]`, repeatable; the first rule that matches is used, before those of
    the provider profiles."""

    match: str = Field(description="regular expression on `code enhanced-code text`")
    hosts: list[str] = Field([], description='only replies of these hosts, ".example" and below; empty: all')
    action: Literal["retry", "suspend", "slow", "bounce", "defer"] = Field(
        description="retry: try this message again after `for`; suspend: send nothing (or not the application's mail) to the "
        "site for that time; slow: half the rate and connections for that time; bounce, defer: a permanent or a temporary failure"
    )
    duration: Duration = Field(600, alias="for", description="duration of the action")
    scope: Literal["site", "tenant"] = Field(
        "site", description="site: suspend all mail to the site; tenant: only that of the application whose message it was"
    )

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: {error}") from None
        return self


class Source(_Table):
    """A local address to send from. `[[source]]`, repeatable; routes use sources by name."""

    name: str = Field(description="name in routes, logs and `relaymta site`")
    address: str = Field(description="the IP address")
    hostname: Spoken = Field("", description="name to send in EHLO from this address; empty: hostname")
    weight: int = Field(1, ge=1, le=1000, description="share of the mail")

    @model_validator(mode="after")
    def _check(self) -> "Source":
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            raise ValueError(f"address: {self.address!r} is not an IP address") from None
        return self


class Staging(_Table):
    """Redirect the mail of a test system. `[staging]`"""

    redirect: str = Field(
        "", description="address that gets all mail, with a header field that names the real recipients; empty: off"
    )
    allow: list[str] = Field([], description='recipients that are not redirected: addresses, or "@domain"')

    @model_validator(mode="after")
    def _check(self) -> "Staging":
        if self.redirect and "@" not in self.redirect:
            raise ValueError(f"redirect: {self.redirect!r} is not an address")
        if self.allow and not self.redirect:
            raise ValueError("allow needs redirect: without it there is no staging")
        return self


class PeerNetwork(_Table):
    """Settings for clients in some networks; they override the tables below. `[[network]]`, repeatable; the first match holds."""

    networks: list[Network] = Field(description="the clients' networks")
    application: str = Field("", description="application of their mail; overrides the listener's")
    priority: Literal["express", "normal", "bulk"] | None = Field(None, description="class of their mail")
    relay: bool | None = Field(None, description="whether they may relay")
    normalize: bool | None = Field(None, description="whether bare CR and LF are replaced by CRLF, and NUL by a space")
    long_lines: bool | None = Field(None, description="whether lines may be longer than 998 octets")
    message_size: Size | None = Field(None, description="maximum size of a message (octets)")
    recipients: int | None = Field(None, ge=1, le=65535, description="maximum recipients of a message")
    connections: int | None = Field(None, ge=1, description="maximum concurrent connections from one address")
    connection_rate: Quota | None = Field(None, description='rate of new connections from one address, such as "60/m"')
    message_rate: Quota | None = Field(None, description="rate of messages from one address")
    recipient_rate: Quota | None = Field(None, description="rate of recipients from one address")
    xclient: bool = Field(False, description="whether they may send XCLIENT to set the client's name and address")


class Application(_Table):
    """Settings for the mail of one application. `[[application]]`, repeatable."""

    name: str = Field(description="name, as in listeners, networks and accounts")
    weight: int = Field(1, ge=1, le=100, description="messages in a turn where several applications wait for the same site")


class Relay(_Table):
    """Who may relay, and for which domains. `[relay]`"""

    networks: list[Network] = Field(LOOPBACK, description="clients that may relay")
    domains: list[str] = Field([], description="recipient domains that mail is accepted for from any client")
    recipients: str = Field(
        "",
        description='file of valid recipients in these domains, one "a@example.com" or "@example.com" a line; others are '
        "rejected; empty: all are valid",
    )
    open_relay: bool = Field(
        False, description="start even if much of the Internet may relay, or set client addresses by PROXY or XCLIENT"
    )


class Intake(_Table):
    """How mail is accepted. `[intake]`"""

    normalize_networks: list[Network] = Field(
        [], description="clients whose bare CR and LF are replaced by CRLF, and NUL by a space; rejected from others"
    )
    long_line_networks: list[Network] = Field(LOOPBACK, description="clients whose lines may be longer than 998 octets")
    hops: int = Field(50, ge=1, description="maximum number of Received: fields; a message with more is in a loop")
    errors: int = Field(20, ge=1, description="errors after which a connection is closed")
    shed_lag: Duration = Field(
        0.1,
        description="load shedding: new clients get 421 when the event loop is later than this three times in 5 s; 0: off",
    )
    tarpit: Duration = Field(1, description="delay before each reply to a client that has made more than three errors")
    recipients: int = Field(1000, ge=100, le=65535, description="maximum recipients of a message (RFC 5321 4.5.3.1.8)")
    command_timeout: Duration = Field(300, description="time to wait for a command")
    data_timeout: Duration = Field(180, description="time to wait for the next block of message data")
    flow_delay: Duration = Field(
        0.02, description="flow control: delay of each 250 while message data arrives faster than it leaves; 0: off"
    )
    data_rate: int = Field(500, ge=0, description="minimum rate of message data (octets a second)")


class QueueTable(_Table):
    """The queue. `[queue]`"""

    max_age: Duration = Field(5 * 86400, description="age at which a message expires")
    window: int = Field(10_000, ge=100, description="messages kept in memory for delivery, for each worker")
    window_bytes: Size = Field(32 << 20, description="message data kept in memory for delivery, for each worker")


class Delivery(_Table):
    """How mail is sent. `[delivery]`"""

    first_retry: Duration = Field(
        60, description="delay after the first attempt; then 2, 5, 10, 20, 40, 60 times as long, with 15 % jitter"
    )
    connections: int = Field(500, ge=1, description="concurrent outgoing connections, of all workers together")
    connect_timeout: Duration = Field(30, description="time to wait for a connection")
    patience: float = Field(
        1,
        ge=0.01,
        le=10,
        description="factor for RFC 5321's timeouts (4.5.3.2: MAIL, RCPT 300 s, DATA 120, data block 180, final dot 600)",
    )
    idle: Duration = Field(5, description="time after which an idle connection is closed")
    port: int = Field(25, ge=1, le=65535, description="port of MX hosts")
    nameservers: list[str] = Field([], description="DNS servers as host[:port]; empty: the system's")


class LimitsTable(_Table):
    """Limits. `[limits]`"""

    message_size: Size = Field(50 << 20, description="maximum size of a message (octets)")
    connections: int = Field(20_000, ge=1, description="concurrent incoming connections, of all workers together")
    memory: Size = Field(
        0, description="memory of all workers together: above 80 % no message data is kept in memory, above 95 % mail is "
        "temporarily rejected; 0: the cgroup's limit, if there is one",
    )  # fmt: skip
    connections_per_client: int = Field(
        50,
        ge=1,
        description="concurrent connections from one address (IPv6: one /64, as in all limits by address); relay networks: at "
        "least 200",
    )
    connection_rate: Quota = Field("", description='rate of new connections from one address, such as "60/m"; empty: unlimited')
    message_rate: Quota = Field("", description="rate of messages from one address; empty: unlimited")
    recipient_rate: Quota = Field("", description="rate of recipients from one address; empty: unlimited")


class Metrics(_Table):
    """Prometheus metrics. `[metrics]`"""

    listen: Address | Literal["off"] = Field("127.0.0.1:9125", description='host:port of /metrics, or "off"')


class Control(_Table):
    """The socket of the command line. `[control]`"""

    socket: str = Field("", description="path; default: control.sock in the spool")


class Log(_Table):
    """The log: one JSON object a line. `[log]`"""

    file: str = Field("-", description='path, "-" for standard error')
    history: Size = Field(
        256 << 20,
        description="octets of the history that `message history` shows, of all workers together; 0: off",
    )


class Config(_Table):
    """The whole configuration."""

    hostname: Spoken = Field(
        default_factory=socket.getfqdn, description="our name in the greeting, EHLO and Received: (default: this host's)"
    )
    user: str = Field("", description="user to run as when started as root; empty: stay root, with a warning")
    workers: int = Field(0, ge=0, le=255, description="worker processes; 0: one for each core")
    spool: str = Field("/var/lib/relaymta", description="directory of the queue")
    listener: list[Listener] = Field([], description="addresses to accept mail on")
    route: list[Route] = Field([], description="where mail is sent; none: to the MX of each recipient's domain")
    route_map: str = Field(
        "", description="file of `PATTERN ROUTE` lines, which override the routes' conditions; PATTERN: an address, a domain, "
        ".domain (and below) or /regular expression/ on the address",
    )  # fmt: skip
    source: list[Source] = Field([], description="local addresses to send from")
    site: list[SiteTable] = Field([], description="limits of sites")
    rule: list[Rule] = Field([], description="rules about replies")
    application: list[Application] = Field([], description="settings for single applications")
    network: list[PeerNetwork] = Field([], description="settings for clients in some networks")
    certificate: list[Certificate] = Field([], description="certificates for TLS with clients")
    dkim: list[Dkim] = Field([], description="DKIM keys")
    verify: Verify = Verify()
    accounts: AccountsTable = AccountsTable()
    staging: Staging = Staging()
    relay: Relay = Relay()
    intake: Intake = Intake()
    queue: QueueTable = QueueTable()
    delivery: Delivery = Delivery()
    limits: LimitsTable = LimitsTable()
    metrics: Metrics = Metrics()
    control: Control = Control()
    log: Log = Log()
    _renamed: list[str] = PrivateAttr(default_factory=list)  # values given by their old names, as sentences

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if not self.listener:
            raise ValueError("no [[listener]]: give one, or --listen HOST:PORT")
        return self

    @model_validator(mode="after")
    def _check_open(self) -> "Config":
        meant = ". Name your networks, or set relay.open_relay = true if you mean it"
        found = [] if self.relay.open_relay else [(place, what + meant) for place, what in _open_to_all(self)]
        asked: list[tuple[Place, str, str]] = [(("accounts", "url"), self.accounts.url, "passwords")]
        if self.accounts.tokens is not None:
            tokens = self.accounts.tokens
            asked += [(("accounts", "tokens", "jwks"), tokens.jwks, "keys that verify tokens")]
            asked += [(("accounts", "tokens", "introspection"), tokens.introspection, "tokens and our client secret")]
        for number, route in enumerate(self.route):
            if route.oauth is not None:
                asked.append((("route", number, "oauth", "token_url"), route.oauth.token_url, "our client secret and tokens"))
        for place, url, what in asked:
            if _in_clear(url):
                found.append((place, f"{what} would go over plain http to another host; use https://, or a loopback address"))
        if found:
            raise _Problems(found)
        return self

    @model_validator(mode="after")
    def _check_endpoint(self) -> "Config":
        for number, listener in enumerate(self.listener):
            if listener.tls in ("require", "implicit") and not self.certificate:
                raise ValueError(f"listener.{number}.tls: {listener.tls!r} needs a [[certificate]]")
            if listener.auth != "off" and not (self.certificate or listener.auth_in_clear):
                raise ValueError(f"listener.{number}.auth: needs a [[certificate]]: AUTH is offered over TLS only")
            if listener.auth != "off" and not self.accounts:
                raise ValueError(f"listener.{number}.auth: needs accounts.file or a back end: no client could log in")
        if self.verify.dmarc == "enforce" and not self.verify.results:
            raise ValueError("verify.dmarc: 'enforce' needs verify.results = true: nothing is checked without it")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "Config":
        known = {source.name for source in self.source}
        for number, route in enumerate(self.route):
            missing = [name for name in route.sources if name not in known]
            if missing:
                raise ValueError(f"route.{number}.sources: there is no [[source]] {missing[0]!r}{near(missing[0], known)}")
        addresses = [listener.address for listener in self.listener]
        twice = next((address for address in addresses if addresses.count(address) > 1), None)
        if twice is not None:
            raise ValueError(f"two listeners have the address {twice!r}")
        labels = [route.label for route in self.route]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"two routes are called {twice!r}: give one of them another name")
        return self

    def to_json(self) -> str:
        """The configuration for another process: only what was given, so that defaults can be told from values (see shaping)."""
        return self.model_dump_json(exclude_unset=True, by_alias=True)

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return Path(self.control.socket) if self.control.socket else Path(self.spool) / "control.sock"


class Secret(_Table):
    """A password or key of an account."""

    hash: str = Field(description="SCRAM-SHA-256$ITERATIONS:SALT$STORED-KEY:SERVER-KEY, or $argon2id$...")
    expires: datetime | None = Field(None, description="end of its validity; none: it does not expire")

    @model_validator(mode="after")
    def _check(self) -> "Secret":
        if not _HASH.match(self.hash):
            raise ValueError("hash: neither SCRAM-SHA-256$... nor $argon2id$...; `relaymta user add` makes one")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError('expires: give the offset, too, such as "Z" for UTC')
        return self


class Account(_Table):
    """A person or an application that may log in. `[[account]]` in the file of accounts"""

    name: str = Field(description="the user name")
    secrets: list[Secret] = Field([], description="passwords and keys, each of which is accepted; none: login is not possible")
    application: str = Field("", description="application of its mail; empty: the listener's")
    priority: Literal["express", "normal", "bulk"] | None = Field(None, description="class of its mail")
    senders: list[str] = Field(
        [], description='addresses it may send as, in the envelope and in From: "a@example.com", "@example.com" for a domain, '
        '"@.example.com" for those below; empty: any',
    )  # fmt: skip

    messages: Quota = Field("", description='quota of messages, such as "60/m" or "10000/d"; empty: unlimited')
    recipients: Quota = Field("", description="quota of recipients")
    octets: Quota = Field("", description="quota of octets")
    over: Literal["reject", "hold"] = Field("reject", description="what happens beyond a quota: 452, or hold until released")
    connections: int = Field(0, ge=0, description="concurrent connections; 0: unlimited")

    @model_validator(mode="after")
    def _check(self) -> "Account":
        wrong = next((sender for sender in self.senders if "@" not in sender), None)
        if wrong is not None:
            raise ValueError(f'senders: {wrong!r} is neither an address nor "@domain"')
        return self


class AccountsFile(_Table):
    """The file of accounts."""

    account: list[Account] = Field([], description="accounts")

    @model_validator(mode="after")
    def _check(self) -> "AccountsFile":
        names = [account.name for account in self.account]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two accounts are called {twice!r}")
        return self


# Reading the file

# Values that had another name in 0.1, understood for one version with a warning: key -> old -> new.
_RENAMED: dict[str, dict[str, str]] = {"verify.dmarc": {"tell": "report"}}

_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")
_HEAD = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]")


def _positions(text: str) -> dict[tuple[str | int, ...], int]:
    """The line number of every key and table of a TOML file, by path. Lines within multi-line values may add entries, which are
    harmless."""
    found: dict[tuple[str | int, ...], int] = {}
    counts: dict[str, int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        head = _HEAD.match(line)
        if head is not None:
            name = head[2].strip()
            parts: tuple[str | int, ...] = tuple(part.strip().strip("\"'") for part in name.split("."))
            if head[1] == "[[":
                parts = (*parts, counts.get(name, 0))
                counts[name] = counts.get(name, 0) + 1
            elif parts[0] in counts:  # [route.oauth]: it belongs to the last [[route]]
                parts = (parts[0], counts[str(parts[0])] - 1, *parts[1:])
            table = parts
            found.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key is not None:
            path = (*table, *(part.strip().strip("\"'") for part in key[1].split(".")))
            found.setdefault(path, number)
    return found


def load(path: Path | None, overrides: dict[str, Any]) -> Config:
    """The configuration of a file (None: no file), overridden by `overrides` (dotted key -> value, or "listener"/"route" ->
    tables). ConfigError with every problem."""
    text, data = _read(path) if path is not None else ("", {})
    for key, value in overrides.items():
        _lay_over(data, key, deepcopy(value))  # old names in it are replaced
    renamed = _rename(data)
    config = _validated(Config, path, text, data, overrides)
    positions = _positions(text) if renamed else {}
    config._renamed = [_sentence(path, positions, overrides, place, what) for place, what in renamed]
    return config


def _rename(data: dict[str, Any]) -> list[tuple[Place, str]]:
    """Replace old values by their new names: the place of each, and what it is called now."""
    found: list[tuple[Place, str]] = []
    for key, names in _RENAMED.items():
        *tables, last = key.split(".")
        inner: Any = data
        for table in tables:
            inner = inner.get(table) if isinstance(inner, dict) else None
        old = inner.get(last) if isinstance(inner, dict) else None
        if isinstance(old, str) and old in names:
            inner[last] = names[old]
            found.append(((*tables, last), f'"{old}" is called "{names[old]}" now'))
    return found


def load_accounts(path: Path) -> list[Account]:
    """The accounts of a file. ConfigError with every problem."""
    text, data = _read(path)
    return _validated(AccountsFile, path, text, data, {}).account


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """(text, parsed content) of a TOML file. ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not UTF-8"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(path, str(error))]) from None


def _validated(model: type[M], path: Path | None, text: str, data: dict[str, Any], overrides: dict[str, Any]) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        positions = _positions(text)
        entries = [single for entry in error.errors() for single in _singly(entry)]
        raise ConfigError([_problem(model, path, positions, overrides, entry) for entry in entries]) from None


def _singly(entry: Any) -> list[Any]:
    """The errors in an error of pydantic's, which may be about several keys."""
    problems = entry.get("ctx", {}).get("error")
    if not isinstance(problems, _Problems):
        return [entry]
    return [{"type": "value_error", "loc": (*entry["loc"], *place), "msg": what} for place, what in problems.found]


def _syntax_problem(path: Path, text: str) -> str:
    match = re.search(r"\(at line (\d+), column \d+\)", text)
    what = re.sub(r"\s*\(at (?:line \d+, column \d+|end of document)\)", "", text)
    what = what.replace("Cannot overwrite a value", "this key is given twice")
    return f"{path}:{match[1] if match else 'end'}: {what}"


def _lay_over(data: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        inner = data.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"--set {key}: {table} is not a table"])
        data = inner
    data[last] = value


def _problem(
    model: type[BaseModel], path: Path | None, positions: dict[tuple[str | int, ...], int], overrides: dict[str, Any], entry: Any
) -> str:
    location: tuple[str | int, ...] = tuple(part for part in entry["loc"] if not _UNION.match(str(part)))
    what = re.sub(r"^Value error, ", "", entry["msg"])
    if entry["type"] == "extra_forbidden":
        what = "no such key" + _did_you_mean(model, location)
    elif entry["type"] == "missing":
        what = "is missing"
    elif "input" in entry and isinstance(entry["input"], str | int | float | bool):
        what = f"{what} (it is {entry['input']!r})" if repr(entry["input"]) not in what else what
    return _sentence(path, positions, overrides, location, what)


def _sentence(path: Path | None, positions: dict[Place, int], overrides: dict[str, Any], location: Place, what: str) -> str:
    """`file:line: key: what`, or where else the key was given."""
    dotted = _dotted(location)
    if any(dotted == key or dotted.startswith(key + ".") for key in overrides):
        return f"command line: {dotted}: {what}"
    line = 0
    while location and not line:
        line = positions.get(location, 0)
        location = location[:-1]
    where = f"{path}:{line}: " if line else f"{path}: " if path else ""
    return f"{where}{dotted}: {what}" if dotted else f"{where}{what}"


def _did_you_mean(root: type[BaseModel], location: tuple[str | int, ...]) -> str:
    model: Any = root
    for part in location[:-1]:
        if isinstance(part, str):
            model = _model_of(model.model_fields[part].annotation)
    return near(str(location[-1]), model.model_fields)


def near(word: str, known: Iterable[str]) -> str:
    """` (did you mean "..."?)`, or nothing."""
    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f' (did you mean "{found[0]}"?)' if found else ""


def parse_value(text: str) -> Any:
    """The value of `--set key=value`: parsed as TOML where possible, else the string itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def describe() -> str:
    """The reference configuration file: every key with its description and default, as comments."""
    lines = ["# relaymta: every key, with its default. Lines without a value show keys that have none.", ""]
    lines += _describe_fields(Config)
    for name, model in _tables_of(Config):
        repeated = _is_list(Config.model_fields[name].annotation)
        lines += ["", *_comment(model), f"#[[{name}]]" if repeated else f"[{name}]"]
        lines += _describe_fields(model)
        for inner, below in _tables_of(model):
            lines += ["", *_comment(below), f"#[{name}.{inner}]", *_describe_fields(below)]
    return "\n".join(lines) + "\n"


def _comment(model: type[BaseModel]) -> list[str]:
    return [f"# {line}" for line in inspect.cleandoc(model.__doc__ or "").splitlines()]


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list


def _tables_of(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """(key, model) of the keys of a table that are tables themselves."""
    found = [(name, _model_of(field.annotation)) for name, field in model.model_fields.items()]
    return [(name, below) for name, below in found if below is not None]


def _model_of(annotation: Any) -> type[BaseModel] | None:
    inner = getattr(annotation, "__args__", (annotation,))[0]
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _describe_fields(model: type[BaseModel]) -> list[str]:
    """The lines about the keys of a table that are not tables."""
    lines = []
    for name, field in model.model_fields.items():
        if _model_of(field.annotation) is None:
            default = None if field.is_required() or field.default_factory is not None else field.default
            lines += [f"# {field.description}", f"#{field.alias or name} = {_toml(default)}"]
    return lines


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(int(value)) if float(value).is_integer() else str(value)
