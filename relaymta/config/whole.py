"""The whole configuration: its keys and tables, and what they require of each other (checks.py)."""

from pathlib import Path

from pydantic import Field, PrivateAttr, ValidationInfo, model_validator

from relaymta.config.abuse import Abuse
from relaymta.config.accounts import AccountsTable
from relaymta.config.admin import Admin
from relaymta.config.checks import contradictions
from relaymta.config.clients import Application, Certificate, Intake, Listener, PeerNetwork, Relay
from relaymta.config.delivery import Delivery, QuarantineTable, QueueTable
from relaymta.config.filters import Filter, FiltersTable
from relaymta.config.machine import Control, LimitsTable, Local, Log, Metrics
from relaymta.config.mail_rules import MailRule
from relaymta.config.mailboxes import Imap, Mailboxes
from relaymta.config.names import Hostname, own_name
from relaymta.config.origin import Origin
from relaymta.config.routes import Route, Rule, SiteTable, Source, Staging
from relaymta.config.signing import Dkim, Verify
from relaymta.config.suppression import SuppressionTable
from relaymta.config.tracing import Tracing
from relaymta.config.values import Problem, Problems, Reload, Restart, Table, place_of
from relaymta.config.webhooks import Webhook, WebhooksTable

__all__ = ["Config"]


class Config(Table):
    """The whole configuration."""

    hostname: Restart[Hostname] = Field(
        default_factory=own_name, description="our name in the greeting, EHLO and Received: (default: this host's)"
    )
    user: Restart[str] = Field("", description="user to run as when started as root; empty: stay root, with a warning")
    workers: Restart[int] = Field(0, ge=0, le=255, description="worker processes; 0: one for each core")
    spool: Restart[str] = Field("/var/lib/relaymta", description="directory of the queue")
    ephemeral: Restart[bool] = Field(
        False,
        description="start even if the spool is on an overlay file system, which ends with its container: docs/containers.md",
    )
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
    filter: list[Filter] = Field([], description="programs that judge mail")
    mail_rule: list[MailRule] = Field([], description="rules about mail")
    abuse: list[Abuse] = Field([], description="when mail of an account is not like its own any more")
    webhook: list[Webhook] = Field([], description="who is told of what becomes of mail")
    verify: Verify = Verify()
    filters: FiltersTable = FiltersTable()
    accounts: AccountsTable = AccountsTable()
    mailboxes: Mailboxes = Mailboxes()
    imap: Imap = Imap()
    staging: Staging = Staging()
    relay: Relay = Relay()
    intake: Intake = Intake()
    queue: QueueTable = QueueTable()
    quarantine: QuarantineTable = QuarantineTable()
    webhooks: WebhooksTable = WebhooksTable()
    suppression: SuppressionTable = SuppressionTable()
    delivery: Delivery = Delivery()
    limits: LimitsTable = LimitsTable()
    metrics: Metrics = Metrics()
    tracing: Tracing = Tracing()
    control: Control = Control()
    local: Local = Local()
    admin: Admin = Admin()
    log: Log = Log()
    _origin: Origin = PrivateAttr(default_factory=Origin)
    _renamed: list[str] = PrivateAttr(default_factory=list)  # values given by their old names, as sentences
    _unnamed: bool = PrivateAttr(default=False)  # hostname is this host's, and not given

    @model_validator(mode="after")
    def _keep_hostname(self) -> "Config":
        """The name that this host has now is kept as if given, so that no other process asks for it again."""
        self._unnamed = "hostname" not in self.model_fields_set
        self.model_fields_set.add("hostname")
        return self

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "Config":
        """As of all tables. With a list as the context of the validation, problems are put there, and not raised."""
        found = [Problem(place_of(key), what, *map(place_of, other)) for key, what, *other in contradictions(self)]
        if info.context is not None:
            info.context.extend(found)
        elif found:
            raise Problems(found)
        return self

    def to_json(self) -> str:
        """The configuration for another process: only what was given, so that defaults can be told from values (see shaping)."""
        return self.model_dump_json(exclude_unset=True, by_alias=True)

    def at(self, key: str, what: str, other: str = "") -> str:
        """`file:line: key: what`, for a problem with the key `route.0.hosts` (dotted). `other`: the key that it does not go with;
        if that is in another file, it says where."""
        return self._origin.sentence(place_of(key), what, place_of(other) if other else ())

    def order(self, key: str) -> tuple[int, int]:
        """The place of a key (dotted) among those that were given, to sort by; those that were not come first."""
        return self._origin.spot(place_of(key))

    def shortened(self) -> list[str]:
        """A sentence about each list of values that lacks some which an earlier file gives."""
        return [self._origin.sentence(place, what) for place, what in self._origin.shortened()]

    @property
    def files(self) -> list[Path]:
        """The files that it was read from, in their order."""
        return self._origin.files

    def file_of(self, key: str) -> Path | None:
        """The file in which a key (dotted) was given; None: in none."""
        place = place_of(key)
        spot = self._origin.spot(place)
        return self.files[spot.file] if spot.line and not self._origin.is_overridden(place) else None

    def located(self, problems: list[str]) -> list[str]:
        """Problems that begin with a key, each with its place in front (`at`); others are left as they are. `listener.address:
        ADDRESS: what` is about the listener with this address."""
        return [self._located(problem, *problem.partition(": ")[::2]) for problem in problems]

    def _located(self, problem: str, key: str, what: str) -> str:
        if key == "listener.address":
            addresses = [listener.address for listener in self.listener]
            address = next((one for one in addresses if what.startswith(f"{one}: ")), "")
            if not address or self._origin.is_option("listener"):  # as --listen has given it
                return problem
            key = f"listener.{addresses.index(address)}.address"
        return self.at(key, what) if key.partition(".")[0] in Config.model_fields else problem

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return Path(self.control.socket) if self.control.socket else Path(self.spool) / "control.sock"

    @property
    def admin_path(self) -> Path | None:
        """Where the unix socket of the HTTP API is; None: there is none."""
        if self.admin.socket == "off":
            return None
        return Path(self.admin.socket) if self.admin.socket else self.control_path.parent / "admin.sock"

    @property
    def local_path(self) -> Path | None:
        """Where the socket of sendmail(1) is; None: there is none."""
        if self.local.socket == "off":
            return None
        return Path(self.local.socket) if self.local.socket else self.control_path.parent / "sendmail.sock"

    @property
    def local_listener(self) -> Listener | None:
        """The socket of sendmail(1) as a listener; None: there is none."""
        path = self.local_path
        if path is None:
            return None
        own = Listener.model_construct(None, address=f"unix:{path.absolute()}", submission=True, tls="off")
        return own.model_copy(update={"application": self.local.application})

    @property
    def listeners(self) -> list[Listener]:
        """All that mail is accepted on: those of the configuration, then the socket of sendmail(1)."""
        local = self.local_listener
        return self.listener if local is None else [*self.listener, local]

    @property
    def alias_domains(self) -> list[str]:
        """The domains whose addresses are looked up in local.aliases."""
        return [self.hostname, *self.local.alias_domains]

    @property
    def tokens_path(self) -> Path:
        """Where the hashes of tokens are."""
        return Path(self.admin.tokens) if self.admin.tokens else Path(self.spool) / "admin-tokens.json"

    @property
    def keeps_mail(self) -> bool:
        """Whether any route leads into mailboxes."""
        return any(route.is_local for route in self.route)

    @property
    def local_domains(self) -> list[str]:
        """The domains of routes into mailboxes, as they are written."""
        return [domain for route in self.route if route.is_local for domain in route.recipient_domain]
