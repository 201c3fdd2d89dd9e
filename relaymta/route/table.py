"""The route table: the first route that matches a recipient is used, and is part of the name of the message's queue.

Conditions on the MX can be checked only when the domain's hosts are known: such a route takes a queue over when its site is
looked up (`by_mx`). Beside `mx` it may have conditions only on what a queue's name contains: application and recipient domain.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from relaymta.config import Config, Route, header_condition, near
from relaymta.config.checks import never_used
from relaymta.config.patterns import map_trouble
from relaymta.errors import ConfigError
from relaymta.files import read_text
from relaymta.proto.address import comparable, compared, domain_matches, domain_of
from relaymta.proto.envelope import Envelope, QueueName
from relaymta.proto.header import fields

__all__ = ["Asked", "RouteTable", "Verdict", "map_notes", "unnamed"]

_AUTHORS = {b"from", b"sender"}


@dataclass(frozen=True, slots=True)
class Asked:
    """The properties of a message that conditions of routes are checked against. Addresses as `compared`; `size` in octets."""

    application: str
    sender: str
    recipient: str
    size: int = 0
    attempts: int = 0
    headers: tuple[str, ...] = ()  # the conditions on header fields that it matches
    listener: str = ""  # where it came in

    @classmethod
    def of(cls, envelope: Envelope, recipient: str, attempts: int) -> "Asked":
        """The properties for one recipient of a message that was tried `attempts` times."""
        sender, met = compared(envelope.sender), tuple(envelope.headers)
        return cls(envelope.application, sender, compared(recipient), envelope.size, attempts, met, envelope.listener)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one route for a message: whether it matches; `reason`: the first condition that failed, or ""."""

    route: Route
    matches: bool
    reason: str


Condition = Callable[[Asked], bool]


def _conditions(route: Route) -> list[tuple[str, Condition]]:
    """The conditions of a route that need only the message, each with its configuration key."""
    senders, recipients = set(map(comparable, route.sender)), set(map(comparable, route.recipient))
    applications, listeners = set(route.application), set(route.listener)
    table: list[tuple[str, bool, Condition]] = [
        ("application", bool(applications), lambda asked: asked.application in applications),
        ("listener", bool(listeners), lambda asked: asked.listener in listeners),
        ("sender", bool(senders), lambda asked: asked.sender in senders),
        ("sender_domain", bool(route.sender_domain), lambda asked: domain_matches(domain_of(asked.sender), route.sender_domain)),
        ("recipient", bool(recipients), lambda asked: asked.recipient in recipients),
        (
            "recipient_domain",
            bool(route.recipient_domain),
            lambda asked: domain_matches(domain_of(asked.recipient), route.recipient_domain),
        ),
        ("header", bool(route.header), lambda asked: all(condition in asked.headers for condition in route.header)),
        ("min_size", route.min_size > 0, lambda asked: asked.size >= route.min_size),
        ("max_size", route.max_size > 0, lambda asked: asked.size <= route.max_size),
        ("min_attempts", route.min_attempts > 0, lambda asked: asked.attempts >= route.min_attempts),
    ]
    return [(key, condition) for key, given, condition in table if given]


class RouteTable:
    """The routes of a configuration, immutable: a reload makes a new table. ConfigError when the route map cannot be read."""

    def __init__(self, config: Config) -> None:
        self.routes = [*config.route]
        self._rules = [(route, _conditions(route)) for route in self.routes]
        if not any(route.catches_all for route in self.routes):
            everything = Route(name="mx" if not any(route.label == "mx" for route in self.routes) else "mx-of-domain")
            self.routes.append(everything)
            self._rules.append((everything, []))
        self._by_label = {route.label: route for route in reversed(self.routes)}
        self._map = _RouteMap(Path(config.route_map), self._by_label) if config.route_map else None
        self._only = self.routes[0] if self.routes[0].catches_all and self._map is None else None
        self._by_mx = [route for route in self.routes if route.mx]
        self._headers = [(text, *header_condition(text)) for route in self.routes for text in route.header]
        self._by_author = _AUTHORS & {name for _, name, _ in self._headers}

    def choose(self, envelope: Envelope, recipient: str, attempts: int = 0) -> Route:
        """The route of one recipient of a message that was tried `attempts` times before."""
        if envelope.route and envelope.route in self._by_label:
            return self._by_label[envelope.route]
        if self._only is not None:
            return self._only
        asked = Asked.of(envelope, recipient, attempts)
        mapped = self._map.find(asked.recipient) if self._map is not None else None
        if mapped is not None:
            return mapped
        for route, conditions in self._rules:
            if not route.mx and all(condition(asked) for _, condition in conditions):
                return route
        raise AssertionError("the last route catches all")

    @property
    def looks_at_headers(self) -> bool:
        """Whether any route has a `header` condition."""
        return bool(self._headers)

    def headers_met(self, header: bytes) -> list[str]:
        """The `header` conditions of all routes that a message matches: those that match a field's value; for From: and Sender:
        one of its addresses. Malformed when a condition on these exists and the field cannot be parsed."""
        values = fields(header)
        if self._by_author:  # of these fields the parsed addresses are matched, not the text
            from relaymta.proto.mailbox import authors

            values = [row for row in values if row[0] not in _AUTHORS]
            values += [(name, str(one)) for name in self._by_author for one in authors(header, (name,))]
        return [
            text
            for text, name, expression in self._headers
            if any(known == name and expression.search(value) for known, value in values)
        ]

    def trace(self, asked: Asked, mx: list[str] | None) -> list[Verdict]:
        """The result of each route in order, up to the one that is used. `mx`: the MX hosts of the domain, when known."""
        mapped = self._map.find(asked.recipient) if self._map is not None else None
        if mapped is not None:
            return [Verdict(mapped, True, "route_map")]
        found = []
        for route, conditions in self._rules:
            failed = next((key for key, condition in conditions if not condition(asked)), "")
            if not failed and route.mx and (mx is None or not mx_matches(mx, route.mx)):
                failed = "mx"
            found.append(Verdict(route, not failed, failed))
            if not failed:
                break
        return found

    def assign(self, envelope: Envelope, attempts: int = 0) -> list[tuple[QueueName, list[int] | None]]:
        """The queues of a message that was tried `attempts` times: name, and which recipients (None: all). At least one."""
        recipients = envelope.recipients
        only = None if envelope.route else self._only
        if len(recipients) == 1 or (only is not None and only.one_queue):
            route = only or self.choose(envelope, recipients[0], attempts)
            return [(self._name(envelope, route, recipients[0]), None)]
        groups: dict[QueueName, list[int]] = {}
        for index, recipient in enumerate(recipients):
            name = self._name(envelope, self.choose(envelope, recipient, attempts), recipient)
            groups.setdefault(name, []).append(index)
        if len(groups) == 1:
            return [(next(iter(groups)), None)]
        return list(groups.items())

    def _name(self, envelope: Envelope, route: Route, recipient: str) -> QueueName:
        domain = "" if route.one_queue else domain_of(recipient)  # an invalid one: the attempt fails with the reason
        return QueueName(route.label, domain, envelope.application, envelope.priority)

    def by_route(self, route: Route, name: QueueName) -> QueueName:
        """The queue for mail of the queue `name` when it is delivered by `route`, which has smart hosts."""
        return QueueName(route.label, "", name.application, name.priority)

    def route_of(self, name: QueueName) -> Route:
        """The route of a queue; the last route, which matches everything, when its own does not exist any more."""
        return self._by_label.get(name.route) or self.routes[-1]

    @property
    def labels(self) -> list[str]:
        """The names of all routes."""
        return list(self._by_label)

    def named(self, label: str) -> Route | None:
        """The route of this name, or None."""
        return self._by_label.get(label)

    def by_mx(self, name: QueueName, hosts: list[str]) -> Route:
        """The route of a queue whose domain has these MX hosts: an earlier one whose `mx` matches, or its own."""
        own = self.route_of(name)
        for route in self._by_mx:
            if (
                self.routes.index(route) < self.routes.index(own)
                and (not route.application or name.application in route.application)
                and (not route.recipient_domain or domain_matches(name.domain, route.recipient_domain))
                and mx_matches(hosts, route.mx)
            ):
                return route
        return own


def map_notes(config: Config) -> list[str]:
    """Sentences about lines of the route map that match nothing or are repeated. ConfigError when it cannot be read."""
    found = []
    known: set[str] = set()
    for number, words in _map_lines(Path(config.route_map)) if config.route_map else ():
        if words[0].startswith("/"):
            continue
        pattern, trouble = comparable(words[0]), map_trouble(words[0])
        if trouble:
            found.append(f"{config.route_map}:{number}: {words[0]} can never match: {trouble}")
        elif pattern in known:
            found.append(f"{config.route_map}:{number}: {words[0]} is there twice; the last line counts")
        known.add(pattern)
    return found


def unnamed(config: Config) -> list[str]:
    """Sentences about routes behind others that match the same, and that the route map does not name. ConfigError when it cannot
    be read."""
    if not config.route_map:
        return []  # those are notes of the configuration itself
    named = {words[-1] for _, words in _map_lines(Path(config.route_map))}
    found = never_used(config)
    return [config.at(f"route.{n}", why, f"route.{first}") for n, why, first in found if config.route[n].label not in named]


def _map_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number, words) of each line of a route map that has any, but for comments. ConfigError when it cannot be read."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise ConfigError([f"route_map: {path}: {error.strerror}"]) from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words


class _RouteMap:
    """`PATTERN ROUTE` lines. Precedence: address, domain, .domain from the longest, then regular expressions in order."""

    def __init__(self, path: Path, routes: dict[str, Route]) -> None:
        self._exact: dict[str, Route] = {}
        self._expressions: list[tuple[re.Pattern[str], Route]] = []
        problems = []
        for number, words in _map_lines(path):
            if len(words) != 2:
                problems.append(f"{path}:{number}: expected PATTERN ROUTE")
            elif words[1] not in routes:
                problems.append(f"{path}:{number}: there is no route {words[1]!r}{near(words[1], routes)}")
            elif words[0].startswith("/"):
                try:
                    self._expressions.append((re.compile(words[0].strip("/"), re.I), routes[words[1]]))
                except re.error as error:
                    problems.append(f"{path}:{number}: {words[0]}: {error}")
            else:
                self._exact[comparable(words[0])] = routes[words[1]]
        if problems:
            raise ConfigError(problems)

    def find(self, recipient: str) -> Route | None:
        """The route of an address (as `compared`), None when no line matches it. Expressions may have U-labels or A-labels."""
        domain = domain_of(recipient)
        found = self._exact.get(recipient) or self._exact.get(domain)
        rest = domain
        while found is None and rest:
            found = self._exact.get("." + rest)
            rest = rest.partition(".")[2]
        if found is None:
            forms = (recipient,) if "xn--" not in domain else (recipient, recipient.replace(domain, _decoded(domain)))
            found = next((route for expression, route in self._expressions if any(map(expression.search, forms))), None)
        return found


@lru_cache(1024)
def _decoded(domain: str) -> str:
    """A domain of A-labels (lower case) in U-labels, as an expression may have it; what is none stays as it is."""
    import idna

    try:
        return idna.decode(domain)
    except UnicodeError:  # as IDNAError is
        return domain


def mx_matches(hosts: list[str], patterns: list[str]) -> bool:
    """Whether one of a domain's MX hosts matches."""
    return any(domain_matches(host.lower(), patterns) for host in hosts)
