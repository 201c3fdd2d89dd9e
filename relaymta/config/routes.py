"""Where mail is sent: routes, sources, limits of sites, rules about replies, staging."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from relaymta.config.accounts import OAuth
from relaymta.config.names import HostnameIfAny, Name
from relaymta.config.values import Duration, Host, Rate, Reload, Size, Table, in_clear, is_http

__all__ = ["Route", "Rule", "SiteTable", "Source", "Staging", "header_condition"]


# Keys that are about the hosts of a route
_OF_HOSTS = {
    "mx", "hosts", "lookup", "lookup_hosts", "mode", "weights", "tls", "ca_file", "client_certificate", "client_key", "auth",
    "username", "password_file", "password_env", "oauth", "sources", "ip", "rewrite_sender", "chunking", "xforward",
    "connections", "messages_per_connection",
}  # fmt: skip


def header_condition(text: str) -> tuple[bytes, re.Pattern[str]]:
    """A route's `header` condition as (field name in lower case, expression). ValueError when it is malformed."""
    name, colon, expression = text.partition(":")
    if not colon or not re.fullmatch(r"[!-9;-~]+", name):
        raise ValueError(f'{text!r} is not "Name: regular expression"')
    try:
        return name.lower().encode(), re.compile(expression.strip(), re.I | re.S)
    except re.error as error:
        raise ValueError(f"{text!r}: {error}") from None


class Route(Table):
    """Where mail is sent. `[[route]]`, repeatable; the first route that matches is used. All conditions given must match."""

    name: Reload[str] = Field("", description="name in logs, metrics and `queue summary`; default: the first host")
    application: Reload[list[str]] = Field([], description="matches mail of these applications; empty: any")
    listener: Reload[list[str]] = Field(
        [], description="matches mail that came in on these listeners, as their address is written; empty: any"
    )
    sender: Reload[list[str]] = Field([], description='matches these sender addresses, "" the null sender; empty: any')
    sender_domain: Reload[list[str]] = Field([], description='matches these sender domains, ".example" and below; empty: any')
    recipient: Reload[list[str]] = Field([], description="matches these recipient addresses; empty: any")
    recipient_domain: Reload[list[str]] = Field(
        [], description='matches these recipient domains, ".example" and below; empty: any'
    )
    mx: Reload[list[str]] = Field(
        [], description='matches domains with an MX host of these names, ".example" and below; with application and '
        "recipient_domain only; empty: any",
    )  # fmt: skip
    header: Reload[list[str]] = Field(
        [], description='matches messages with such header fields, each a "Name: regular expression" on its value (of From: and '
        "Sender: on each address), evaluated when the message is accepted; empty: any",
    )  # fmt: skip
    min_size: Reload[Size] = Field(0, description="matches messages of at least this many octets")
    max_size: Reload[Size] = Field(0, description="matches messages of at most this many octets; 0: any")
    min_attempts: Reload[int] = Field(0, ge=0, description="matches messages after at least this many attempts: a fallback")
    hosts: Reload[list[Host]] = Field(
        [], description="smart hosts as host[:port] or, for LMTP, unix:/path; empty: the recipient domain's MX"
    )
    lookup: Reload[str] = Field(
        "",
        description="URL of a service that returns the hosts for a domain: `?domain=D&application=A`; see docs/delivery.md",
    )
    lookup_hosts: Reload[list[str]] = Field(
        [], description='hosts that the look-up may return, ".example" and below; empty: any (required with username)'
    )
    mode: Reload[Literal["failover", "balance"]] = Field(
        "failover", description="failover: use the next host when one cannot be reached; balance: share the load"
    )
    weights: Reload[list[int]] = Field([], description="weights of the hosts for balance, in their order; empty: equal")
    protocol: Reload[Literal["smtp", "lmtp", "mailbox"]] = Field(
        "smtp", description="protocol of the hosts; mailbox: the mail is kept here, in mailboxes of local users"
    )
    tls: Reload[Literal["off", "may", "encrypt", "verify"]] = Field(
        "may",
        description="TLS to these hosts; may: if offered; encrypt: required, with any certificate; verify: with a valid one",
    )
    ca_file: Reload[str] = Field(
        "", description="PEM file of the CA certificates that these hosts are verified by, instead of the system's; needs verify"
    )
    client_certificate: Reload[str] = Field(
        "", description="PEM file of our certificate, and its intermediate ones, for hosts that want one"
    )
    client_key: Reload[str] = Field("", description="PEM file of its private key; empty: it is in the same file")
    auth: Reload[Literal["auto", "plain", "login", "cram-md5", "scram-sha-256", "xoauth2", "oauthbearer"]] = Field(
        "auto", description="AUTH mechanism; auto: the strongest that the host offers, xoauth2 if there is an oauth table"
    )
    username: Reload[str] = Field("", description="AUTH user name; needs tls = verify")
    password_file: Reload[str] = Field("", description="file with the password")
    password_env: Reload[str] = Field("", description="environment variable with the password")
    oauth: OAuth | None = Field(None, description="OAuth 2.0 tokens instead of a password")
    sources: Reload[list[str]] = Field(
        [], description="names of the [[source]] addresses to send from; empty: the system chooses"
    )
    ip: Reload[Literal["6 4", "4 6", "4", "6"]] = Field("6 4", description="address families to use, the preferred one first")
    rewrite_sender: Reload[str] = Field(
        "", description='envelope sender to use: an address, or "@domain" to replace the domain; the null sender is not changed'
    )
    chunking: Reload[bool] = Field(True, description="use BDAT with hosts that offer CHUNKING (RFC 3030)")
    xforward: Reload[bool] = Field(
        False, description="tell hosts that offer XFORWARD, such as content filters, the client that the message came from"
    )
    connections: Reload[int] = Field(20, ge=1, le=1000, description="concurrent connections to the site, of all workers together")
    messages_per_connection: Reload[int] = Field(1000, ge=1, description="messages after which a connection is closed")

    def problems(self) -> Iterator[tuple[str, str]]:
        for condition in self.header:
            try:
                header_condition(condition)
            except ValueError as error:
                yield "header", str(error)
        yield from (problem for wrong, *problem in self._contradictions() if wrong)  # type: ignore[misc]

    def _contradictions(self) -> Iterator[tuple[bool, str, str]]:
        """(Whether it is so; key; what is wrong then) of keys that need or exclude each other."""
        login = bool(self.username)
        secret = bool(self.password_file or self.password_env or self.oauth)
        yield login and self.tls != "verify", "username", 'needs tls = "verify": credentials are sent over verified TLS only'
        yield login and not secret, "username", "needs password_file, password_env or oauth"
        for key, secret_of in (("password_file", self.password_file), ("password_env", self.password_env)):
            yield bool(secret_of) and not login, key, "needs username"
        yield bool(self.password_file and self.password_env), "password_env", "password_file is given, too: give one of them"
        yield login and not (self.hosts or self.lookup), "username", "needs hosts: credentials are sent to configured hosts only"
        yield bool(self.ca_file) and self.tls != "verify", "ca_file", 'needs tls = "verify": otherwise no certificate is checked'
        own = self.client_certificate
        yield bool(own) and self.tls == "off", "client_certificate", 'needs TLS, but tls = "off"'
        yield bool(self.client_key) and not own, "client_key", "needs client_certificate"
        yield bool(self.oauth) and not login, "oauth", "needs username: the mailbox that the token is for"
        yield self.auth in ("xoauth2", "oauthbearer") and not self.oauth, "auth", f"{self.auth!r} needs an oauth table"
        yield (
            bool(self.weights) and len(self.weights) != len(self.hosts),
            "weights",
            (f"{len(self.weights)} for {len(self.hosts)} hosts"),
        )
        wrong_weights = bool(self.weights) and (min(self.weights) < 0 or not any(self.weights))
        yield wrong_weights, "weights", "none may be negative, and not all 0"
        yield bool(self.lookup and self.hosts), "lookup", "lookup and hosts: give one of them; the look-up returns the hosts"
        yield bool(self.lookup) and not is_http(self.lookup), "lookup", "not an http:// or https:// URL"
        yield (
            bool(self.lookup) and login and (not self.lookup_hosts or in_clear(self.lookup)),
            "lookup",
            ("with username it needs an https:// or loopback URL, and lookup_hosts: credentials are sent to these only"),
        )
        others = (
            self.listener, self.sender, self.sender_domain, self.recipient, self.header, self.min_size, self.max_size,
            self.min_attempts,
        )  # fmt: skip
        yield (
            bool(self.mx) and any(others),
            "mx",
            ("can be combined with application and recipient_domain only: MX hosts are known per domain, not per message"),
        )
        yield self.protocol == "lmtp" and not self.hosts, "protocol", '"lmtp" needs hosts'
        yield self.xforward and not self.hosts, "xforward", "needs hosts: clients are told to configured hosts only"
        if self.is_local:
            for key in sorted(self.model_fields_set & _OF_HOSTS):
                yield True, key, 'it has no meaning with protocol = "mailbox": the mail is kept here'
            domains = [domain for domain in self.recipient_domain if not domain.startswith(".")]
            yield not domains, "protocol", '"mailbox" needs recipient_domain = ["..."]: the domains whose mail is kept here'
        unix = any(host.startswith("unix:") for host in self.hosts)
        yield unix and self.protocol != "lmtp", "hosts", 'unix: hosts need protocol = "lmtp"'
        rewritten = self.rewrite_sender
        yield bool(rewritten) and "@" not in rewritten, "rewrite_sender", f'{rewritten!r} is neither an address nor "@domain"'

    @property
    def is_local(self) -> bool:
        """Whether its mail is kept here, in mailboxes."""
        return self.protocol == "mailbox"

    @property
    def one_queue(self) -> bool:
        """Whether all its mail waits together, whatever the domain: it goes to the same hosts, or to mailboxes."""
        return bool(self.hosts) or self.is_local

    @property
    def catches_all(self) -> bool:
        """Whether it has no condition: routes behind it are used only where they are named."""
        return not any(self.conditions)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Its conditions, to be compared with those of other routes; "" for each that it does not have."""
        lists = (
            self.application, self.listener, self.sender, self.sender_domain, self.recipient, self.recipient_domain, self.mx,
            self.header,
        )  # fmt: skip
        numbers = (self.min_size, self.max_size, self.min_attempts)
        return (*(repr(sorted(values)) if values else "" for values in lists), *(str(number or "") for number in numbers))

    @property
    def label(self) -> str:
        """The route's name; by default its first host, or "mx"."""
        return self.name or (self.hosts[0] if self.hosts else "mx")

    @property
    def login(self) -> str:
        """As whom the route logs in, and where its secret comes from, for operators."""
        if self.oauth is not None:
            secret = f"a token of {self.oauth.token_url}"
        else:
            key = "password_file" if self.password_file else "password_env"
            secret = f"the password of {key} {self.password_file or self.password_env}"
        return f"user {self.username}, with {secret}"


class SiteTable(Table):
    """Limits of the sites whose hosts match. `[[site]]`, repeatable. Each limit is taken from the first match that sets it, then
    from the route, then from the provider profiles that come with relaymta."""

    name: Reload[str] = Field(
        "", description="all sites that match share these limits, under this name; empty: each site has its own"
    )
    hosts: Reload[list[str]] = Field(description='matches sites with an MX or smart host of these names, ".example" and below')
    connections: Reload[int | None] = Field(None, ge=1, le=1000, description="concurrent connections, of all workers together")
    messages_per_connection: Reload[int | None] = Field(None, ge=1, description="messages after which a connection is closed")
    rate: Reload[Rate | None] = Field(None, description='message rate, such as "500/m", of all workers together')
    connection_rate: Reload[Rate | None] = Field(
        None, description='rate of new connections, such as "2/s", of all workers together'
    )


class Rule(Table):
    """What a reply of a host means, beyond its code. `[[rule]]`, repeatable; the first rule that matches is used, before those of
    the provider profiles."""

    match: Reload[str] = Field(description="regular expression on `code enhanced-code text`")
    hosts: Reload[list[str]] = Field([], description='only replies of these hosts, ".example" and below; empty: all')
    action: Reload[Literal["retry", "suspend", "slow", "bounce", "defer"]] = Field(
        description="retry: try this message again after `for`; suspend: send nothing (or not the application's mail) to the "
        "site for that time; slow: half the rate and connections for that time; bounce, defer: a permanent or a temporary failure"
    )
    duration: Reload[Duration] = Field(600, alias="for", description="duration of the action")
    scope: Reload[Literal["site", "tenant"]] = Field(
        "site", description="site: suspend all mail to the site; tenant: only that of the application whose message it was"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        try:
            re.compile(self.match, re.I | re.S)
        except re.error as error:
            yield "match", str(error)


class Source(Table):
    """A local address to send from. `[[source]]`, repeatable; routes use sources by name."""

    name: Reload[Name] = Field(description="name in routes, logs and `relaymta site`")
    address: Reload[str] = Field(description="the IP address")
    hostname: Reload[HostnameIfAny] = Field("", description="name to send in EHLO from this address; empty: hostname")
    weight: Reload[int] = Field(1, ge=1, le=1000, description="share of the mail")

    def problems(self) -> Iterator[tuple[str, str]]:
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            yield "address", f"{self.address!r} is not an IP address"


class Staging(Table):
    """Redirect the mail of a test system. `[staging]`"""

    redirect: Reload[str] = Field(
        "", description="address that gets all mail, with a header field that names the real recipients; empty: off"
    )
    allow: Reload[list[str]] = Field([], description="recipients that are not redirected: addresses and domains")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.redirect and "@" not in self.redirect:
            yield "redirect", f"{self.redirect!r} is not an address"
        if self.allow and not self.redirect:
            yield "allow", "needs redirect: without it there is no staging"
