"""The routes: what Postfix does with the mail of every address that its tables name, and of all others, as [[route]] tables.

Each recipient that is named (an address, a domain, what is below a domain) is resolved for each sender that is named, as Postfix
would. What is not what more general conditions come to becomes a route. So neither the order of Postfix's tables nor what one
overrides of another has to be translated.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from relaymta.cli.postfix.conditions import ANYBODY, Condition, above
from relaymta.cli.postfix.findings import Findings
from relaymta.cli.postfix.lines import Origin, Place
from relaymta.cli.postfix.maps import Expressions, Indexed, Static
from relaymta.cli.postfix.named import Named
from relaymta.cli.postfix.patterns import Rule, anchored
from relaymta.cli.postfix.resolving import Resolver
from relaymta.cli.postfix.ways import MOVED, UNDECIDED, Way, Ways
from relaymta.proto.address import domain_of

__all__ = ["Refusal", "Route", "Routing"]

MANY = 100  # recipients beyond which they are in a route map: a route compares them one by one
Decision = tuple[Way, ...]  # for each sender that is named, and last for all others
Decisions = dict[Condition, Decision]


@dataclass
class Route:
    """A [[route]]: its conditions, the way, and where they come from. `attempts`: min_attempts."""

    way: Way
    sender: Condition | None = None
    recipients: list[Condition] = field(default_factory=list)
    listeners: list[str] = field(default_factory=list)
    origin: Origin | None = None
    attempts: int = 0
    name: str = ""


@dataclass
class Refusal:
    """Recipients whose mail is refused with the same text."""

    text: str
    recipients: list[Condition]
    origin: Origin


class Routing:
    """`routes`, in their order; `mapped`: the route map, as (pattern, route); `refusals`; `kept`: domains whose mail is kept
    here."""

    def __init__(self, resolver: Resolver, named: Named, ways: Ways, findings: Findings, filters: list[Route]) -> None:
        """`filters`: the routes to content filters, which come first."""
        self._resolver, self._ways, self._findings, self.named = resolver, ways, findings, named
        self.routes = list(filters)
        self.mapped: list[tuple[str, Route]] = []
        self._refusals: dict[str, Refusal] = {}
        if named.by_expression:
            self._expressions(filtered=bool(filters))
        self._decisions: Decisions = {one: self._decision(one) for one in [*named.recipients, Condition("any")]}
        self.kept = {one.value for one in self._decisions if one.kind == "domain" and self.way(one).kind == "mailbox"}
        for condition in sorted(self._decisions, key=lambda one: one.rank):
            self._check(condition)
        self._emit(filtered=bool(filters))
        self._name()
        self._note_kept()

    @property
    def refusals(self) -> list[Refusal]:
        """Recipients that are refused, by what is said to them."""
        return list(self._refusals.values())

    def where(self, condition: Condition) -> Origin:
        """The line that names a sender or recipient."""
        return self.named.where.get(condition, Origin(Place("main.cf", 0)))

    def way(self, recipient: Condition) -> Way:
        """The way of a recipient's mail from a sender that is not named."""
        return self._decisions[recipient][-1]

    # Decisions

    @property
    def _senders(self) -> list[str]:
        return [*(one.sample for one in self.named.senders), ANYBODY]

    def _decision(self, condition: Condition) -> Decision:
        return tuple(self._ways.of(self._resolver.resolve(sender, condition.sample), sender) for sender in self._senders)

    def _check(self, condition: Condition) -> None:
        """What no route can do: mailboxes and refusals for less than a domain, or for some senders."""
        way = self.way(condition)
        if way.kind == "refused":
            if not self._refusable(condition):
                self._undecide(condition, f"{way.text!r}: a rule would refuse other mail, too")
        elif condition.kind == "address" and (way.kind == "mailbox") != (condition.domain in self.kept):
            self._undecide(condition, "of a domain that is kept here all recipients are kept here, of another one none")
        elif way.kind == "mailbox" and condition.kind in ("below", "any"):
            self._undecide(condition, "only domains that are named are kept here: name them in recipient_domain of that route")

    def _undecide(self, condition: Condition, why: str) -> None:
        origin = self.where(condition)
        self._findings.way(origin.place, str(condition), f"{why}. Mail for it waits at {UNDECIDED}")
        way = Way("undecided", (f"{UNDECIDED}:25",), label="undecided", origins=(origin,))
        self._decisions[condition] = (way,) * len(self._senders)
        self._above_others.update(above(condition))

    def _refusable(self, condition: Condition) -> bool:
        """Whether a rule by recipient refuses this mail, whoever sends it, and no other."""
        if condition.kind == "any" or any(way.kind != "refused" for way in self._decisions[condition]):
            return False
        if condition.kind == "address":
            return True
        if self.named.by_expression and not self.way(condition).text.startswith(MOVED):  # some of it may go elsewhere
            return False
        return condition not in self._above_others

    @cached_property
    def _above_others(self) -> set[Condition]:
        """The conditions that some mail meets which is not refused by a more special one."""
        return {general for one in self._decisions if self.way(one).kind != "refused" for general in above(one)}

    # Routes

    def _emit(self, filtered: bool) -> None:
        """The routes of all decisions, the special ones first. `filtered`: behind those to content filters."""
        made: Decisions = {}
        for condition in sorted(self._decisions, key=lambda one: one.rank, reverse=True):
            decision = self._decisions[condition]
            general = next((made[one] for one in above(condition) if one in made), None)
            if decision[-1].kind == "refused":
                self._refuse(condition, decision[-1])
            elif decision != general:
                made[condition] = decision
        self._emit_extended(made, filtered)
        if len(made) > MANY and not filtered and not self.mapped:
            self._emit_mapped(made)
        ranks: dict[tuple[int, int], Decisions] = {}
        for condition in self._decisions:
            if condition in made:
                ranks.setdefault(condition.rank, {})[condition] = made[condition]
        for _, rows in sorted(ranks.items()):
            self._emit_rank(rows)

    def _emit_rank(self, rows: Decisions) -> None:
        """Routes of conditions that exclude each other: those with the same decision share them."""
        groups: dict[Decision, list[Condition]] = {}
        for condition, decision in rows.items():
            groups.setdefault(decision, []).append(condition)
        for decision, conditions in groups.items():
            recipients = [one for one in conditions if one.kind != "any"]
            numbers = {sender: number for number, sender in enumerate(self.named.senders)}
            for sender, number in numbers.items():
                general = next((decision[numbers[one]] for one in above(sender) if one in numbers), decision[-1])
                if decision[number] != general:
                    self._add(decision[number], sender, recipients)
            self._add(decision[-1], None, recipients)

    def _add(self, way: Way, sender: Condition | None, recipients: list[Condition]) -> None:
        if way.fallback:
            later = Way("hosts", way.fallback, keys=way.keys, rows=way.rows, label=f"{way.label}-fallback")
            self.routes.append(Route(later, sender, recipients, attempts=1))
        self.routes.append(Route(way, sender, recipients, origin=way.origins[-1] if way.origins else None))

    def _refuse(self, condition: Condition, way: Way) -> None:
        if way.text not in self._refusals:
            self._refusals[way.text] = Refusal(way.text, [], way.origins[-1] if way.origins else self.where(condition))
        self._refusals[way.text].recipients.append(condition)

    def _name(self) -> None:
        """Add the routes that the route map alone uses, behind the one that matches all, and give each route a name."""
        known = {id(route) for route in self.routes}
        self.routes += {id(route): route for _, route in self.mapped if id(route) not in known}.values()
        used: dict[str, int] = {}
        for route in sorted(self.routes, key=lambda route: bool(route.recipients or route.sender or route.listeners)):
            base = route.way.label or "route"
            used[base] = used.get(base, 0) + 1
            route.name = base if used[base] == 1 else f"{base}-{used[base]}"

    def _note_kept(self) -> None:
        """Name expressions that may be about recipients of domains that are kept here: these have to exist here first."""
        domains = [one for one in sorted(self.kept) if self._resolver.domain_kind(one)[0] != "alias"]
        for rule in self.named.by_expression if domains else ():
            instead = f"it is asked about recipients of {domains[0]} only if they have a mailbox or an alias here"
            self._findings.way(rule.place, f"{rule.text} {rule.value}", f"in route_map {instead}")

    # The route map, which comes before all routes

    def _map(self, pattern: str, way: Way) -> None:
        """Add a line of the route map."""
        route = next((route for _, route in self.mapped if route.way == way), None)
        self.mapped.append((pattern, route or Route(way, origin=way.origins[-1] if way.origins else None)))

    def _emit_mapped(self, made: Decisions) -> None:
        """Put recipients into the route map, if no sender matters; `made` then has what needs a [[route]] all the same."""
        special = {condition: decision for condition, decision in made.items() if condition.kind != "any"}
        if any(len(set(decision)) > 1 for decision in special.values()):
            return
        routes: dict[Way, Route] = {}
        for condition, (way, *_) in special.items():
            route = routes.setdefault(way, Route(way, origin=way.origins[-1] if way.origins else None))
            self.mapped.append((condition.pattern, route))
            del made[condition]
            if way.kind == "mailbox":  # the domains that are kept here are those of routes
                self.routes += [] if route.recipients else [route]
                route.recipients.append(condition)

    def _emit_extended(self, made: Decisions, filtered: bool) -> None:
        """Where addresses may have an extension, put those that are named into the route map, as expressions that match them with
        one, too; those that are named with one first. `made` then has the others."""
        delimiter = self._resolver.scope.text("recipient_delimiter")
        named = [one for one in made if one.kind == "address"] if delimiter else []
        plain = {one: self._resolver.without_extension(one.value) == one.value for one in named}
        for condition in sorted(named, key=lambda one: plain[one]):
            if filtered or len(set(made[condition])) > 1:
                instead = f"it is matched without an extension ({delimiter[0]}...) alone: write a [[route]] for that"
                self._findings.way(self.where(condition).place, condition.value, instead)
            else:
                self._map(_written(anchored(condition, delimiter if plain[condition] else "")), made.pop(condition)[-1])

    def _expressions(self, filtered: bool) -> None:
        """Regular expressions of transport_maps, and the addresses before and behind them, in the order of the tables."""
        for table in self._resolver.transport_maps.flat():
            if isinstance(table, Expressions):
                for rule in table.rules:
                    self._map_rule(rule, filtered)
                table.left_out = {rule.place for rule in table.rules}
            elif isinstance(table, Static):
                self._findings.way(table.place, table.spec, "behind expressions it is about all mail: write a last [[route]]")
            elif isinstance(table, Indexed) and not filtered:
                for entry in table.entries:
                    condition = Condition("address", entry.key.lower())
                    moved = self._resolver.resolve(ANYBODY, condition.value).moved
                    if condition in self.named.recipients and moved is None:
                        del self.named.recipients[condition]
                        extension = self._resolver.scope.text("recipient_delimiter")
                        self._map_result(anchored(condition, extension), entry.value, condition, Origin(entry.place))

    def _map_rule(self, rule: Rule, filtered: bool) -> None:
        why = ""
        if filtered:
            why = "the route map comes before the route to the content filter: write a [[route]] for it"
        elif "$" in rule.value:
            why = "a result with $ in it, which Postfix refuses, too"
        elif not rule.expression or not rule.exact:
            why = "this expression, or a part of it, is not understood: see that its line in route_map means the same"
        if why:
            self._findings.way(rule.place, f"{rule.text} {rule.value}", why)
        if rule.expression and not filtered and "$" not in rule.value:
            self._map_result(rule.expression, rule.value, Condition("any"), Origin(rule.place, "transport_maps"))

    def _map_result(self, expression: str, value: str, condition: Condition, origin: Origin) -> None:
        """A line of the route map for a result of transport_maps, if that comes to the same way for all that it is about."""
        recipients = [condition] if condition.kind == "address" else [*self.named.recipients, Condition("any")]
        samples = [one.sample for one in recipients]
        known = [one for one in samples if self._resolver.domain_kind(domain_of(one))[0] != "alias"]  # those have no transport
        ways = {way for recipient in known for way in self._by_result(value, recipient, origin)} if value != ":" else set()
        if known and (len(ways) != 1 or any(way.kind in ("mailbox", "refused") for way in ways)):
            self._findings.way(origin.place, f"{expression} {value}", "it is no route that there is: name one in route_map")
        elif known:
            self._map(_written(expression), ways.pop())

    def _by_result(self, value: str, recipient: str, origin: Origin) -> Iterator[Way]:
        for sender in self._senders:
            yield self._ways.of(self._resolver.resolved_by(value, sender, recipient, origin), sender)


def _written(expression: str) -> str:
    """An expression as a route map has it: without blanks, between slashes."""
    return "/" + re.sub(r"[\s/]", lambda found: f"\\{'x' if found[0] < chr(256) else 'u'}{ord(found[0]):02x}", expression) + "/"
