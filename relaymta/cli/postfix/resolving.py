"""Where Postfix would send mail: what trivial-rewrite(8) makes of an address, by main.cf and its tables."""

from functools import cached_property
from typing import Literal, NamedTuple

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin, Place
from relaymta.cli.postfix.main_cf import Scope
from relaymta.cli.postfix.maps import Entry, Maps, Unreadable, opened
from relaymta.cli.postfix.match_lists import MatchList, read_list

__all__ = ["Kind", "Resolved", "Resolver", "maps_of"]

MANY = 100
Kind = Literal["local", "alias", "virtual", "relay", "default"]


class Resolved(NamedTuple):
    """A transport and its next hop. `domain`: that of the recipient, and its class `kind`; `origins`: where that comes from;
    `moved`: what relocated_maps has for the recipient, or None; `by_relayhost`: the next hop is a relayhost, of the sender or for
    all mail."""

    transport: str
    nexthop: str
    domain: str
    kind: Kind
    origins: tuple[Origin, ...]
    moved: Entry | None = None
    by_relayhost: bool = False

    @property
    def place(self) -> Place:
        """The line that decides, or main.cf as a whole."""
        return next((one.place for one in reversed(self.origins) if one.place.line), Place("main.cf", 0))


def maps_of(scope: Scope, files: Files, name: str) -> Maps:
    """The tables of a parameter."""
    return Maps([opened(files, word, scope.place(name, word)) for word in scope.words(name)])


class Resolver:
    """`scope`: the parameters of trivial-rewrite."""

    def __init__(self, scope: Scope, files: Files) -> None:
        self.scope, self.files = scope, files
        parents = scope.words("parent_domain_matches_subdomains")
        self.mydestination = self._list("mydestination", None)
        self.alias_domains = self._list("virtual_alias_domains", None)
        self.mailbox_domains = self._list("virtual_mailbox_domains", None)
        self.relay_domains = self._list("relay_domains", "relay_domains" in parents)
        self.transport_maps = maps_of(scope, files, "transport_maps")
        self.sender_relayhosts = maps_of(scope, files, "sender_dependent_relayhost_maps")
        self.sender_transports = maps_of(scope, files, "sender_dependent_default_transport_maps")
        self.relocated_maps = maps_of(scope, files, "relocated_maps")
        self._parents = "transport_maps" in parents

    def _list(self, name: str, parents: bool | None) -> MatchList:
        found = read_list(self.files, self.scope.text(name), self.scope.place(name), parents)
        if found.opaque and self.scope.is_given(name):
            found.stand_in = f"{name.replace('_', '-')}.invalid"  # a domain that never exists (RFC 2606)
        return found

    def domain_kind(self, domain: str) -> tuple[Kind, Origin | None]:
        """The class of a domain, and where that is said."""
        lists: list[tuple[Kind, MatchList, str]] = [
            ("local", self.mydestination, "mydestination"), ("alias", self.alias_domains, "virtual_alias_domains"),
            ("virtual", self.mailbox_domains, "virtual_mailbox_domains"), ("relay", self.relay_domains, "relay_domains"),
        ]  # fmt: skip
        for kind, members, name in lists:
            place = members.match(domain)
            if place is not None:
                return kind, Origin(place, name) if place.line else self.scope.origin(name)
        return "default", None

    def resolve(self, sender: str, recipient: str) -> Resolved:
        """What becomes of a recipient's mail. `sender`: "" for the null sender."""
        domain = recipient.rpartition("@")[2]
        kind, where = self.domain_kind(domain)
        origins = [where] if where is not None else []
        transport, nexthop = self._by_class(kind, domain, sender, origins)
        if kind != "alias":
            found = self._by_transport_maps(recipient)
            if found is not None:
                transport, nexthop = _updated(found.value, domain, transport, nexthop)
                origins = [Origin(found.place, "transport_maps")]
        moved = self.find_address(self.relocated_maps, recipient) if self.relocated_maps else None
        by_relayhost = bool(origins) and "relayhost" in origins[-1].name
        return Resolved(transport, nexthop, domain.lower(), kind, tuple(origins), moved, by_relayhost)

    def resolved_by(self, value: str, sender: str, recipient: str, origin: Origin) -> Resolved:
        """What becomes of a recipient's mail by a result of transport_maps."""
        domain = recipient.rpartition("@")[2]
        kind, _ = self.domain_kind(domain)
        transport, nexthop = _updated(value, domain, *self._by_class(kind, domain, sender, []))
        return Resolved(transport, nexthop, domain.lower(), kind, (origin,))

    def _by_class(self, kind: Kind, domain: str, sender: str, origins: list[Origin]) -> tuple[str, str]:
        """Transport and next hop without transport_maps; adds where they come from."""
        if kind == "alias":
            return "error", "5.1.1 User unknown in virtual alias table"
        name = {"local": "local_transport", "virtual": "virtual_transport", "relay": "relay_transport"}.get(
            kind, "default_transport"
        )
        channel, nexthop = self.scope.text(name), domain
        if self.scope.is_given(name):
            origins.append(self.scope.origin(name))
        if kind == "default":
            found = self._of_sender(self.sender_transports, sender, "empty_address_default_transport_maps_lookup_key")
            if found is not None:
                channel = found.value
                origins.append(Origin(found.place, "sender_dependent_default_transport_maps"))
        channel, colon, destination = channel.partition(":")
        if colon and destination:
            return channel, destination
        if kind in ("relay", "default"):
            found = self._of_sender(self.sender_relayhosts, sender, "empty_address_relayhost_maps_lookup_key")
            if found is not None:
                nexthop = found.value
                origins.append(Origin(found.place, "sender_dependent_relayhost_maps"))
            elif self.scope.text("relayhost"):
                nexthop = self.scope.text("relayhost")
                origins.append(self.scope.origin("relayhost"))
        return channel, nexthop

    def _of_sender(self, maps: Maps, sender: str, null: str) -> Entry | None:
        found = self.find_address(maps, sender or self.scope.text(null)) if maps else None
        return None if found is None or found.value.upper() == "DUNNO" else found

    def _by_transport_maps(self, recipient: str) -> Entry | None:
        maps = self.transport_maps
        if not maps:
            return None
        found = self._full(maps, recipient)
        key = recipient.rpartition("@")[2]
        while found is None and key:
            found = maps.find(key, True)
            at = key.find(".", 1)
            key = "" if at < 0 else key[at + 1 :] if self._parents else key[at:]
        return found or maps.find("*")

    def _full(self, maps: Maps, address: str) -> Entry | None:
        """What there is for an address, or for it without its extension."""
        found = maps.find(address)
        bare = self.without_extension(address)
        return found or (maps.find(bare, True) if bare != address else None)

    def find_address(self, maps: Maps, address: str) -> Entry | None:
        """As mail_addr_find(3): the address; the local part, of a local domain; @domain."""
        found = self._full(maps, address)
        local, at, domain = address.rpartition("@")
        if found is None and at and self.is_local(domain):
            found = maps.find(local, True) or maps.find(self.without_extension(address).rpartition("@")[0], True)
        return found or (maps.find(f"@{domain}", True) if at else None)

    def is_local(self, domain: str) -> bool:
        """Whether a local part alone means an address in this domain."""
        return domain.lower() == self.scope.text("myorigin").lower() or self.mydestination.match(domain) is not None

    def without_extension(self, address: str) -> str:
        """An address without what is behind a character of recipient_delimiter."""
        local, at, domain = address.rpartition("@")
        ends = [end for end in (local.find(char, 1) for char in self.scope.text("recipient_delimiter")) if end > 0]
        return f"{local[: min(ends)]}{at}{domain}" if ends and at else address

    @cached_property
    def local_domains(self) -> list[str]:
        """The domains whose addresses a local part alone stands for, of many the first ones."""
        found = [self.scope.text("myorigin").lower(), *(name for name, _ in self.mydestination.names())]
        return list(dict.fromkeys(domain for domain in found if self.is_local(domain)))[:MANY]

    def note_unreadable(self, findings: Findings) -> None:
        """Name what could not be read: each may send mail elsewhere."""
        lists = {
            "mydestination": self.mydestination, "virtual_alias_domains": self.alias_domains,
            "virtual_mailbox_domains": self.mailbox_domains, "relay_domains": self.relay_domains,
        }  # fmt: skip
        for name, members in lists.items():
            for table in members.opaque if members.stand_in else ():
                why = table.why if isinstance(table, Unreadable) else "its domains are not named one by one"
                findings.way(table.place, f"{name} = {table.spec}", f"{why}: name the domains in place of {members.stand_in}")
        if len(self.local_domains) == MANY:
            instead = f"names without a domain in tables are read for the first {MANY} of these domains alone"
            findings.way(self.scope.place("mydestination"), "mydestination", instead)
        maps = {
            "transport_maps": self.transport_maps, "sender_dependent_relayhost_maps": self.sender_relayhosts,
            "sender_dependent_default_transport_maps": self.sender_transports, "relocated_maps": self.relocated_maps,
        }  # fmt: skip
        for name, every in maps.items():
            for one in every.unreadable:
                findings.way(one.place, f"{name} = {one.spec}", f"{one.why}: {_INSTEAD[name]}")


_INSTEAD = {
    "transport_maps": "write what it has as [[route]] tables or a route_map, or answer by HTTP (lookup of a [[route]])",
    "sender_dependent_relayhost_maps": "write what it has as [[route]] tables with sender or sender_domain",
    "sender_dependent_default_transport_maps": "write what it has as [[route]] tables with sender or sender_domain",
    "relocated_maps": "refuse the addresses by a [[mail_rule]] with recipient",
}


def _updated(value: str, domain: str, transport: str, nexthop: str) -> tuple[str, str]:
    """Transport and next hop after a result of transport_maps (transport(5))."""
    channel, _, host = value.partition(":")
    if not channel:
        return transport, host or nexthop
    if host:
        return channel, host
    return channel, "Address is undeliverable" if channel in ("error", "retry") else domain
