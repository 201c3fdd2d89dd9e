"""The route table: the first route that matches a recipient is taken; it names the queue the message waits in."""

from dataclasses import dataclass
from typing import Literal

from relaymta.config import Config, Route
from relaymta.proto.address import DomainError, domain_of, normalize_domain
from relaymta.proto.envelope import Envelope, QueueName

__all__ = ["RouteTable", "Site", "site_of"]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a queue's messages go: the hosts to try in order (empty: MX of `domain`), and how."""

    key: str
    route: Route
    domain: str
    tls: Literal["may", "encrypt", "verify"]


class RouteTable:
    """Immutable; a reload makes a new one."""

    def __init__(self, config: Config) -> None:
        self.routes = [*config.route]
        if not any(_catches_all(route) for route in self.routes):
            self.routes.append(Route(name="mx"))
        self._by_label = {route.label: route for route in reversed(self.routes)}
        self._only = self.routes[0] if _catches_all(self.routes[0]) else None
        self._sites: dict[tuple[str, str], Site] = {}

    def choose(self, envelope: Envelope, recipient: str) -> Route:
        """The route of one recipient."""
        if self._only is not None:
            return self._only
        domain = domain_of(recipient)
        sender = domain_of(envelope.sender)
        for route in self.routes:
            if route.application and envelope.application not in route.application:
                continue
            if route.sender_domain and not _matches(sender, route.sender_domain):
                continue
            if route.recipient_domain and not _matches(domain, route.recipient_domain):
                continue
            return route
        raise AssertionError("the last route catches all")

    def assign(self, envelope: Envelope) -> list[tuple[QueueName, list[int] | None]]:
        """The queues of a message: name, and which recipients (None: all). At least one."""
        recipients = envelope.recipients
        if len(recipients) == 1 or (self._only is not None and self._only.hosts):
            route = self._only or self.choose(envelope, recipients[0])
            return [(self._name(envelope, route, recipients[0]), None)]
        groups: dict[QueueName, list[int]] = {}
        for index, recipient in enumerate(recipients):
            name = self._name(envelope, self.choose(envelope, recipient), recipient)
            groups.setdefault(name, []).append(index)
        if len(groups) == 1:
            return [(next(iter(groups)), None)]
        return list(groups.items())

    def _name(self, envelope: Envelope, route: Route, recipient: str) -> QueueName:
        domain = "" if route.hosts else domain_of(recipient)
        if domain and not domain.startswith("["):
            try:
                domain = normalize_domain(domain)
            except DomainError:
                pass  # the attempt says so
        return QueueName(route.label, domain, envelope.application, envelope.priority)

    def site(self, name: QueueName) -> Site:
        """Where a queue's messages go. A queue of a route that is no more is routed by the table as it is now."""
        found = self._sites.get((name.route, name.domain))
        if found is None:
            route = self._by_label.get(name.route) or self.routes[-1]
            found = self._sites[name.route, name.domain] = site_of(route, name.domain)
            if len(self._sites) > 100_000:
                self._sites.clear()
        return found


def site_of(route: Route, domain: str) -> Site:
    """The site of a route, for a domain when it goes by MX."""
    return Site(route.label if route.hosts else f"{route.label}/{domain}", route, domain, route.tls)


def _catches_all(route: Route) -> bool:
    return not (route.application or route.sender_domain or route.recipient_domain)


def _matches(domain: str, patterns: list[str]) -> bool:
    return any(domain == p.lower() or (p.startswith(".") and domain.endswith(p.lower())) for p in patterns)
