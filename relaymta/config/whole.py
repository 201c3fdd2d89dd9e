"""The whole configuration: its keys and tables, what they require of each other, and warnings about it."""

import socket
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, PrivateAttr, model_validator

from relaymta.config.accounts import AccountsTable
from relaymta.config.clients import Application, Certificate, Intake, Listener, PeerNetwork, Relay
from relaymta.config.delivery import Delivery, QueueTable
from relaymta.config.machine import Control, LimitsTable, Log, Metrics
from relaymta.config.networks import everywhere, widest
from relaymta.config.origin import Origin
from relaymta.config.patterns import never
from relaymta.config.routes import Route, Rule, SiteTable, Source, Staging
from relaymta.config.signing import Dkim, Verify
from relaymta.config.values import Reload, Restart, Spoken, Table, in_clear, near, place_of, repeated

__all__ = ["Config", "notes"]


class Config(Table):
    """The whole configuration."""

    hostname: Restart[Spoken] = Field(
        default_factory=socket.getfqdn, description="our name in the greeting, EHLO and Received: (default: this host's)"
    )
    user: Restart[str] = Field("", description="user to run as when started as root; empty: stay root, with a warning")
    workers: Restart[int] = Field(0, ge=0, le=255, description="worker processes; 0: one for each core")
    spool: Restart[str] = Field("/var/lib/relaymta", description="directory of the queue")
    listener: list[Listener] = Field([], description="addresses to accept mail on")
    route: list[Route] = Field([], description="where mail is sent; none: to the MX of each recipient's domain")
    route_map: Reload[str] = Field(
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
    _origin: Origin = PrivateAttr(default_factory=Origin)
    _renamed: list[str] = PrivateAttr(default_factory=list)  # values given by their old names, as sentences

    @model_validator(mode="after")
    def _keep_hostname(self) -> "Config":
        """The name that this host has now is kept as if given, so that no other process asks for it again."""
        self.model_fields_set.add("hostname")
        return self

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.listener:
            yield "listener", "there is none: give a [[listener]] table, or --listen HOST:PORT"
        if not self.relay.open_relay:
            meant = ". Name your networks, or set relay.open_relay = true if you mean it"
            yield from ((key, what + meant) for key, what in _open_to_all(self))
        yield from _sent_in_clear(self)
        yield from _needs_of_listeners(self)
        if self.verify.dmarc == "enforce" and not self.verify.results:
            yield "verify.dmarc", "'enforce' needs verify.results = true: nothing is checked without it"
        known = {source.name for source in self.source}
        for number, route in enumerate(self.route):
            for name in route.sources:
                if name not in known:
                    yield f"route.{number}.sources", f"there is no [[source]] {name!r}{near(name, known)}"
        for number, address in repeated([listener.address for listener in self.listener]):
            yield f"listener.{number}.address", f"two listeners have the address {address!r}"
        for number, label in repeated([route.label for route in self.route]):
            yield f"route.{number}.name", f"two routes are called {label!r}: give one of them another name"

    def to_json(self) -> str:
        """The configuration for another process: only what was given, so that defaults can be told from values (see shaping)."""
        return self.model_dump_json(exclude_unset=True, by_alias=True)

    def at(self, key: str, what: str) -> str:
        """`file:line: key: what`, for a problem with the key `route.0.hosts` (dotted)."""
        return self._origin.sentence(place_of(key), what)

    def located(self, problems: list[str]) -> list[str]:
        """Problems that begin with a key, each with its place in front (`at`); others are left as they are."""
        pairs = [(problem, *problem.partition(": ")[::2]) for problem in problems]
        return [self.at(key, what) if key.partition(".")[0] in Config.model_fields else problem for problem, key, what in pairs]

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return Path(self.control.socket) if self.control.socket else Path(self.spool) / "control.sock"


def notes(config: Config) -> list[str]:
    """Warnings about a valid configuration, one sentence each: values given by old names, and probable mistakes."""
    found = list(config._renamed)
    if config.relay.domains and not config.relay.recipients:
        found.append(
            "relay.domains without relay.recipients: backscatter risk (mail for any address there is accepted, and bounces to "
            "forged senders when the next hop rejects the address)"
        )
    found += [f"{key}: {what}" for key, what in _open_to_all(config)]
    for number, route in enumerate(config.route):
        if in_clear(route.lookup):
            found.append(f"route.{number}.lookup: {route.lookup}: an attacker on the path can redirect mail; use https://")
    found += [config.at(key, what) for key, what in never(config)]
    return found


def _open_to_all(config: Config) -> Iterator[tuple[str, str]]:
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


def _sent_in_clear(config: Config) -> Iterator[tuple[str, str]]:
    """URLs by which secrets would be sent unprotected to another host."""
    asked = [("accounts.url", config.accounts.url, "passwords")]
    if config.accounts.tokens is not None:
        tokens = config.accounts.tokens
        asked.append(("accounts.tokens.jwks", tokens.jwks, "keys that verify tokens"))
        asked.append(("accounts.tokens.introspection", tokens.introspection, "tokens and our client secret"))
    for number, route in enumerate(config.route):
        if route.oauth is not None:
            asked.append((f"route.{number}.oauth.token_url", route.oauth.token_url, "our client secret and tokens"))
    for key, url, what in asked:
        if in_clear(url):
            yield key, f"{what} would go over plain http to another host; use https://, or a loopback address"


def _needs_of_listeners(config: Config) -> Iterator[tuple[str, str]]:
    """What listeners need of other tables: certificates and accounts."""
    for number, listener in enumerate(config.listener):
        if listener.tls in ("require", "implicit") and not config.certificate:
            yield f"listener.{number}.tls", f"{listener.tls!r} needs a [[certificate]]"
        if listener.auth != "off" and not (config.certificate or listener.auth_in_clear):
            yield f"listener.{number}.auth", "needs a [[certificate]]: AUTH is offered over TLS only"
        if listener.auth != "off" and not config.accounts:
            yield f"listener.{number}.auth", "needs accounts.file or a back end: no client could log in"
