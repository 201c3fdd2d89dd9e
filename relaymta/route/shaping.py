"""Limits of sites, and rules about replies: from the configuration's `[[site]]` and `[[rule]]` tables, then from the route, then
from the provider profiles that come with relaymta. Each limit names its origin."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from relaymta.config import Config, Rule, SiteTable
from relaymta.proto.address import domain_matches

if TYPE_CHECKING:  # the provider profiles are shown without it
    from relaymta.route.sites import Site

__all__ = [
    "Limit",
    "Profiles",
    "Shape",
    "Shaping",
    "check",
    "differences",
    "profiles",
    "read_profiles",
    "rule_text",
    "shipped_text",
]

LIMITS = ("connections", "messages_per_connection", "rate", "connection_rate")


class Limit(NamedTuple):
    """A limit and its origin, for people. Rates are per second; 0: no limit."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class Shape:
    """The limits of one site. `key`: the name under which they are counted, shared by all sites of a provider."""

    key: str
    connections: Limit
    messages_per_connection: Limit
    rate: Limit
    connection_rate: Limit


@dataclass(frozen=True, slots=True)
class Profiles:
    """The provider profiles that come with relaymta."""

    version: str
    sites: list[SiteTable]
    rules: list[Rule]


def shipped_text() -> str:
    """The text of the profile file that comes with this version."""
    return resources.files("relaymta.route").joinpath("providers.toml").read_text(encoding="utf-8")


def read_profiles(text: str) -> Profiles:
    """The profiles in the text of a profile file."""
    data = tomllib.loads(text)
    sites = [SiteTable.model_validate(site) for site in data["site"]]
    return Profiles(data["version"], sites, [Rule.model_validate(rule) for rule in data["rule"]])


@cache
def profiles() -> Profiles:
    """The shipped profiles."""
    return read_profiles(shipped_text())


def differences(before: Profiles, after: Profiles) -> list[str]:
    """The changes between two versions of the profiles, one line each."""
    found = []
    old, new = ({site.name: site.model_dump(exclude_none=True) for site in p.sites} for p in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            found.append(f"site {name}: gone")
        elif name not in old:
            found.append(f"site {name}: new: " + ", ".join(f"{k} {_value(v)}" for k, v in new[name].items() if k != "name"))
        else:
            keys = sorted(old[name].keys() | new[name].keys())
            found += [
                f"site {name}: {key} {_value(old[name].get(key))} -> {_value(new[name].get(key))}"
                for key in keys
                if old[name].get(key) != new[name].get(key)
            ]
    found += [f"rule gone: {rule_text(rule)}" for rule in before.rules if rule not in after.rules]
    found += [f"rule new: {rule_text(rule)}" for rule in after.rules if rule not in before.rules]
    return found


def _value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def rule_text(rule: Rule) -> str:
    """A rule in one line, for people."""
    return f"{rule.action} {rule.duration:g} s on {rule.match}" + (f" from {', '.join(rule.hosts)}" if rule.hosts else "")


class Shaping:
    """The limits and rules of a configuration."""

    def __init__(self, config: Config) -> None:
        shipped = profiles()
        self._own = [(f"[[site]] {s.name or ', '.join(s.hosts)}", s) for s in config.site]
        self._shipped = [(f"provider profile {s.name} ({shipped.version})", s) for s in shipped.sites]
        self._rules = [(re.compile(rule.match, re.I | re.S), rule) for rule in [*config.rule, *shipped.rules]]
        self._shapes: dict[Site, Shape] = {}

    def shape(self, site: "Site") -> Shape:
        """A site's limits."""
        found = self._shapes.get(site)
        if found is None:
            if len(self._shapes) > 10_000:
                self._shapes.clear()
            found = self._shapes[site] = self._find(site)
        return found

    def _find(self, site: "Site") -> Shape:
        names = [_host(name.lower()) for name in site.names]

        def matching(tables: list[tuple[str, SiteTable]]) -> list[tuple[str, SiteTable]]:
            return [pair for pair in tables if any(domain_matches(name, pair[1].hosts) for name in names)]

        own, shipped = matching(self._own), matching(self._shipped)
        route = site.route
        chosen = [(f"route {route.label}", route)] if route.model_fields_set else []
        limits = {}
        for limit in LIMITS:
            given = [(o, v) for o, table in own if (v := getattr(table, limit)) is not None]
            given += [(o, getattr(table, limit)) for o, table in chosen if limit in table.model_fields_set]
            given += [(o, v) for o, table in shipped if (v := getattr(table, limit)) is not None]
            given.append(("default", getattr(route, limit, 0)))
            limits[limit] = Limit(given[0][1], given[0][0])
        name = next((table.name for _, table in own + shipped if table.name), "")
        return Shape(name or site.key, **limits)

    def rule(self, host: str, reply: str) -> Rule | None:
        """The first rule that matches a reply (`code enhanced-code text`) of a host; None when none does."""
        for expression, rule in self._rules:
            if (not rule.hosts or domain_matches(host.lower(), rule.hosts)) and expression.search(reply):
                return rule
        return None


def _host(text: str) -> str:
    """The name in `host[:port]`, without the dot at the end of a complete one."""
    return (text if text.count(":") != 1 else text.partition(":")[0]).rstrip(".")


def check(config: Config) -> list[str]:
    """Limits that can never be reached, one line each, for `config check`."""
    found = []
    for site in config.site:
        what = site.name or ", ".join(site.hosts)
        if site.connection_rate and site.messages_per_connection and site.rate:
            ceiling = site.connection_rate * site.messages_per_connection
            if ceiling < site.rate:
                found.append(
                    f"site {what}: rate {site.rate:g}/s is never reached: {site.connection_rate:g} connections/s of "
                    f"{site.messages_per_connection} messages carry {ceiling:g}/s"
                )
    return found
