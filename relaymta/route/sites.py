"""Which site a queue's mail goes to: a route's smart hosts, or the MX of a domain. Domains whose MX are the same hosts are
one site: they share its connections and its limits."""

from collections.abc import Callable
from dataclasses import dataclass, field

from relaymta.config import Route
from relaymta.dns import Resolver
from relaymta.proto.envelope import QueueName
from relaymta.route.mx import Hosts, mx_hosts, roll_up
from relaymta.route.table import RouteTable

__all__ = ["Site", "Sites"]

LEAST_SECONDS = 5.0  # a domain's site is looked up again after so long at the earliest
KEPT = 100_000  # domains


@dataclass(frozen=True, slots=True)
class Site:
    """Where mail goes: the route, and the hosts to try (None: the route's smart hosts)."""

    key: str
    route: Route = field(compare=False)
    hosts: Hosts | None = field(compare=False)

    @property
    def names(self) -> list[str]:
        """The names of its hosts."""
        return self.route.hosts if self.hosts is None else self.hosts.names


class Sites:
    """The sites of one worker's queues. `ourselves`: our own host names. `now()`: the resolver's clock."""

    def __init__(self, routes: RouteTable, resolver: Resolver, ourselves: set[str], now: Callable[[], float]) -> None:
        self._routes = routes
        self._resolver = resolver
        self._ourselves = ourselves
        self._now = now
        self._known: dict[tuple[str, str, str], tuple[Site, float]] = {}
        self._fixed: dict[str, Site] = {}

    def known(self, name: QueueName) -> Site | None:
        """A queue's site where no question has to be asked."""
        fixed = self._fixed.get(name.route)
        if fixed is not None:
            return fixed
        route = self._routes.route_of(name)
        if route.hosts:
            return self._fixed.setdefault(name.route, Site(route.label, route, None))
        found = self._known.get((name.route, name.domain, name.application))
        return found[0] if found is not None and found[1] > self._now() else None

    def last(self, name: QueueName) -> Site | None:
        """A queue's site as it was last known, for people who ask."""
        found = self._known.get((name.route, name.domain, name.application))
        return self.known(name) or (found[0] if found is not None else None)

    async def find(self, name: QueueName) -> Site:
        """A queue's site. NoRoute when its domain has no host."""
        route = self._routes.route_of(name)
        if route.hosts:
            return Site(route.label, route, None)
        hosts = await mx_hosts(self._resolver, name.domain, self._ourselves)
        route = self._routes.by_mx(name, hosts.names)
        site = Site(route.label, route, None) if route.hosts else Site(f"{route.label}/{roll_up(hosts)}", route, hosts)
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[name.route, name.domain, name.application] = (site, max(hosts.until, self._now() + LEAST_SECONDS))
        return site
