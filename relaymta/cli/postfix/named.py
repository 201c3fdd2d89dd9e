"""Senders and recipients that Postfix's tables name: for these its decision may be another one than for all others."""

from collections.abc import Iterator

from relaymta.cli.postfix.clients import Client
from relaymta.cli.postfix.conditions import Condition
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin, Place
from relaymta.cli.postfix.maps import Entry
from relaymta.cli.postfix.match_lists import MatchList
from relaymta.cli.postfix.patterns import Rule, plain_conditions
from relaymta.cli.postfix.resolving import Resolver

__all__ = ["Named", "is_domain"]


def is_domain(text: str) -> bool:
    """Whether a pattern of a list names a domain."""
    return bool(text) and not any(char in text for char in "@/:[]*") and not text.startswith(".")


class Named:
    """`senders`: those that are told apart, addresses first; `recipients`: addresses, domains and what is below domains; `where`:
    the line that names each; `by_expression`: the rules of transport_maps that are more than such conditions."""

    def __init__(self, resolver: Resolver, clients: list[Client], findings: Findings) -> None:
        """`clients`: the transports by which mail for the MX leaves."""
        self._resolver, self._clients, self._findings = resolver, clients, findings
        self.where: dict[Condition, Origin] = {}
        rules = resolver.transport_maps.rules
        self.by_expression = rules if any(not _is_plain(rule) for rule in rules) else []
        found = dict.fromkeys(self._senders())
        self.senders = sorted((one for one in found if one.kind != "any"), key=lambda one: one.rank)
        self.recipients = dict.fromkeys(self._recipients())
        delimiter = resolver.scope.text("recipient_delimiter")
        for one in self.senders if delimiter else ():
            if one.kind == "address" and one.value:
                local, _, domain = one.value.rpartition("@")
                instead = f"senders are matched as they are: name {local}{delimiter[0]}...@{domain}, too, if it sends so"
                findings.way(self.where[one].place, one.value, instead)

    def _at(self, place: Place, *conditions: Condition) -> Iterator[Condition]:
        for condition in conditions:
            self.where.setdefault(condition, Origin(place))
            yield condition

    def _senders(self) -> Iterator[Condition]:
        resolver = self._resolver
        for maps in (resolver.sender_relayhosts, resolver.sender_transports):
            for entry in maps.entries:
                yield from self._at(entry.place, *self._of_sender(entry))
            for rule in maps.rules:
                if not _is_plain(rule):
                    instead = (
                        "no route matches senders by such an expression: name them in sender or sender_domain of [[route]] tables"
                    )
                    self._findings.way(rule.place, f"{rule.text} {rule.value}", instead)
                yield from self._at(rule.place, *plain_conditions(rule.expression))
        if resolver.scope.yes("smtp_sender_dependent_authentication"):
            for entry in (entry for client in self._clients for entry in client.passwords.entries if "@" in entry.key):
                yield from self._at(entry.place, _of_address(entry.key.lower()))

    def _of_sender(self, entry: Entry) -> Iterator[Condition]:
        key, scope = entry.key.lower(), self._resolver.scope
        if key in map(scope.text, ("empty_address_relayhost_maps_lookup_key", "empty_address_default_transport_maps_lookup_key")):
            yield Condition("address", "")
        elif "@" in key:
            yield _of_address(key)
        elif "." in key:
            self._findings.note(entry.place, key, f"Postfix never looks a sender up by this; the domain would be @{key}")
        else:
            yield from (Condition("address", f"{key}@{domain}") for domain in self._resolver.local_domains)

    def _recipients(self) -> Iterator[Condition]:
        resolver = self._resolver
        parents = "transport_maps" in resolver.scope.words("parent_domain_matches_subdomains")
        entries = resolver.transport_maps.entries
        for entry in sorted(entries, key=lambda one: "@" in one.key):  # the place of a domain is its own line, if it has one
            yield from self._at(entry.place, *_of_recipient(entry.key.lower(), parents))
        for entry in resolver.relocated_maps.entries:
            local = [] if "@" in entry.key else [f"{entry.key}@{domain}" for domain in resolver.local_domains]
            for key in local or [entry.key]:
                yield from self._at(entry.place, *_of_recipient(key.lower(), False))
        for entry in (entry for client in self._clients for entry in client.policies.entries):
            yield from self._at(entry.place, *_of_recipient(entry.key.lower(), False))
        for members in (resolver.mydestination, resolver.alias_domains, resolver.mailbox_domains, resolver.relay_domains):
            yield from self._of_list(members)
        for rule in [] if self.by_expression else resolver.transport_maps.rules:
            for condition in plain_conditions(rule.expression):
                above = [Condition("domain", condition.value)] if condition.kind == "below" else []
                yield from self._at(rule.place, condition, *above)

    def _of_list(self, members: MatchList) -> Iterator[Condition]:
        resolver = self._resolver
        by_maps = members is resolver.alias_domains and not resolver.scope.is_given("virtual_alias_domains")
        for name, place in members.names():
            bare = name.lstrip(".")
            below = members.parents or (members is resolver.relay_domains and name.startswith("."))
            if by_maps and "." not in name:
                continue  # a local part of virtual_alias_maps
            if is_domain(bare) and (below or bare == name):
                yield from self._at(place, Condition("domain", bare), *([Condition("below", bare)] if below else []))


def _is_plain(rule: Rule) -> bool:
    return rule.exact and bool(plain_conditions(rule.expression))


def _of_address(key: str) -> Condition:
    local, _, domain = key.rpartition("@")
    return Condition("address", key) if local else Condition("domain", domain)


def _of_recipient(key: str, parents: bool) -> Iterator[Condition]:
    """The conditions for a key of a table of recipients. `parents`: a domain matches what is below it, too."""
    local, at, domain = key.rpartition("@")
    bare = domain.lstrip(".")
    if not is_domain(bare) or key == "*":
        return
    yield Condition("domain", bare)
    if at and local:
        yield Condition("address", key)
    elif not at and (domain.startswith(".") or parents):
        yield Condition("below", bare)
