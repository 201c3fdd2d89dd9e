"""The site of a queue: a route's smart hosts, or the MX hosts of a domain. Domains with the same MX hosts are one site: they
share its connections and its limits."""

from collections.abc import Callable
from dataclasses import dataclass, field

from relaymta.config import Config, Route, parse_hostport
from relaymta.dns import Resolver
from relaymta.errors import US, is_scarce
from relaymta.proto.address import domain_matches, same_host
from relaymta.proto.envelope import QueueName
from relaymta.route.lookup import LookupFailed, ask
from relaymta.route.mx import Hosts, NoRoute, mx_hosts, roll_up
from relaymta.route.shaping import Shaping
from relaymta.route.table import RouteTable

__all__ = ["Site", "Sites", "counted_as"]

LEAST_SECONDS = 5.0  # a domain's site is cached for at least so long
KEPT = 100_000  # domains
KEPT_GIVEN = 10_000  # lists of hosts that a lookup returned


@dataclass(frozen=True, slots=True)
class Site:
    """A destination: the route, and the MX hosts to try (None: the route's smart hosts)."""

    key: str
    route: Route = field(compare=False)
    hosts: Hosts | None = field(compare=False)

    @property
    def names(self) -> list[str]:
        """The names of its hosts."""
        return self.route.hosts if self.hosts is None else self.hosts.names


def counted_as(config: Config, name: str) -> set[str]:
    """The names under which sites with smart hosts are counted and suspended, by the name of a route or of one of its hosts, or
    of a [[site]] table; none for other sites."""
    shaping = Shaping(config)
    if any(table.name == name for table in config.site):
        return {name}
    return {
        shaping.shape(Site(route.label, route, None)).key
        for route in config.route
        if route.hosts and (name == route.label or any(same_host(name, host) for host in route.hosts))
    }


class Sites:
    """The sites of one worker's queues. `ourselves`: this machine's host names, lower case. `now()`: the resolver's clock."""

    def __init__(self, routes: RouteTable, resolver: Resolver, ourselves: set[str], now: Callable[[], float]) -> None:
        self._routes = routes
        self._resolver = resolver
        self._ourselves = ourselves
        self._now = now
        self._known: dict[tuple[str, str, str], tuple[Site, float]] = {}
        self._fixed: dict[str, Site] = {}
        self._given: dict[tuple[str, tuple[str, ...]], Route] = {}  # routes to the hosts that a lookup returned

    def known(self, name: QueueName) -> Site | None:
        """A queue's site when it is known without a lookup; None otherwise."""
        fixed = self._fixed.get(name.route)
        if fixed is not None:
            return fixed
        route = self._routes.route_of(name)
        if route.one_queue:
            return self._fixed.setdefault(name.route, Site(route.label, route, None))
        found = self._known.get((name.route, name.domain, name.application))
        return found[0] if found is not None and found[1] > self._now() else None

    def last(self, name: QueueName) -> Site | None:
        """A queue's site as it was last known, even when expired; for display."""
        found = self._known.get((name.route, name.domain, name.application))
        return self.known(name) or (found[0] if found is not None else None)

    async def find(self, name: QueueName) -> Site:
        """Look a queue's site up. NoRoute when its domain has no host."""
        own, until = self._routes.route_of(name), float("inf")
        route = own
        if own.lookup:
            route, until = await self._looked_up(own, name)
        if route.hosts:
            site = Site(route.label, route, None)
            if until == float("inf"):
                return site
        elif route.username:
            raise NoRoute(False, "4.4.3", f"the route of {name.domain} could not be looked up", "the lookup returned no host", US)
        else:
            hosts = await mx_hosts(self._resolver, name.domain, self._ourselves)
            if route is own:
                route = self._routes.by_mx(name, hosts.names)
            site = Site(route.label, route, None) if route.hosts else Site(f"{route.label}/{roll_up(hosts)}", route, hosts)
            until = min(until, hosts.until)
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[name.route, name.domain, name.application] = (site, max(until, self._now() + LEAST_SECONDS))
        return site

    async def _looked_up(self, route: Route, name: QueueName) -> tuple[Route, float]:
        """(Route that the HTTP lookup returns for a queue, when it expires). NoRoute, temporary, when the lookup fails."""
        try:
            found = await ask(route.lookup, name.domain, name.application)
            named = self._routes.named(found.route) if found.route else route
            if named is None:
                raise LookupFailed(f"there is no route {found.route!r}")
            _allow(route, found.hosts)
        except LookupFailed as error:
            cause = f"look-up of {name.domain} at {route.lookup}: {error}"
            raise NoRoute(
                False, "4.4.3", f"the route of {name.domain} could not be looked up", cause, US, scarce=is_scarce(error)
            ) from None
        if found.hosts:
            given = self._given.get((route.label, found.hosts))
            if given is None:
                if len(self._given) >= KEPT_GIVEN:
                    self._given.clear()
                given = self._given[route.label, found.hosts] = _with_hosts(route, found.hosts)
            named = given
        return named, self._now() + found.seconds


def _allow(route: Route, hosts: tuple[str, ...]) -> None:
    """LookupFailed where a lookup returned a host outside of `lookup_hosts`: credentials would be sent to it."""
    if not (route.lookup_hosts or route.username):
        return
    for host in hosts:
        name = parse_hostport(host, 25)[0].lower().rstrip(".")
        if not domain_matches(name, route.lookup_hosts):
            raise LookupFailed(f"{name} is not one of lookup_hosts")


def _with_hosts(route: Route, hosts: tuple[str, ...]) -> Route:
    """A copy of a route with these smart hosts, and a name of its own, since it is another site."""
    return route.model_copy(update={"name": f"{route.label}/{','.join(hosts)}", "hosts": list(hosts), "lookup": ""})
