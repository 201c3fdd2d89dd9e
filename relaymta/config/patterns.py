"""Patterns and conditions of routes, sites and rules that can never match: probable mistakes."""

import re
from collections.abc import Callable, Iterator
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

from relaymta.config.mail_rules import MailRule
from relaymta.config.routes import Route
from relaymta.proto.address import domain_matches, domain_of, in_a_labels

if TYPE_CHECKING:
    from relaymta.config.whole import Config

__all__ = ["address_trouble", "domain_trouble", "host_trouble", "map_trouble", "never", "relay_domain_trouble"]

_DIGITS = frozenset("0123456789")
_REPLY = (frozenset("2345"), _DIGITS, _DIGITS, frozenset(" "))  # how the line that a rule's `match` is compared with begins


def domain_trouble(pattern: str) -> str:
    """Why a pattern for domains (`example.org`, `.example.org`) can match none; "" if it can."""
    bare = pattern.removeprefix(".")
    if not bare:
        return "it names no domain"
    if "@" in pattern:
        return f"it has an @; write the domain alone: {_quoted(pattern.rpartition('@')[2])}"
    if "*" in pattern:
        inner = bare.replace("*", "").strip(".")
        return f'"*" is not special here; write {_quoted("." + inner) if inner else "no condition"}' + (
            f" for {inner} and all below it" if inner else " to match all"
        )
    if any(char.isspace() for char in pattern) or "," in pattern:
        return "it has white space or a comma in it; write one string for each domain"
    if "://" in pattern:
        return "it is a URL; write the domain alone"
    if pattern.startswith("[") and pattern.endswith("]"):
        return ""  # an address literal
    if "/" in pattern:
        return "regular expressions and networks are not understood here; write a domain"
    if bare.endswith("."):
        return f"domains are compared without the dot at the end; write {_quoted(pattern.rstrip('.'))}"
    if ".." in bare:
        return "it has an empty label"
    if not bare.isascii() and not in_a_labels(bare).isascii():
        return "it is no domain (IDNA 2008)"
    if any(len(label.encode()) > 63 for label in bare.split(".") if label.isascii()) or len(bare) > 253:
        return "a label has at most 63 characters, a domain 253"
    return ""


def relay_domain_trouble(domain: str) -> str:
    """Why no recipient can be in a domain of `relay.domains`; "" if one can. Unlike in conditions, the dot at the end of a
    domain is ignored."""
    if domain.startswith(".") and domain != ".":
        return f"sub-domains are named one by one; write {_quoted(domain.strip('.'))} for this domain alone"
    return domain_trouble(domain.removesuffix("."))


def host_trouble(pattern: str) -> str:
    """Why a pattern for names of hosts can match none; "" if it can."""
    if re.search(r"[^:]:\d+$", pattern) and pattern.count(":") == 1:
        return f"hosts are compared without their port; write {_quoted(pattern.partition(':')[0])}"
    return domain_trouble(pattern)


def address_trouble(pattern: str) -> str:
    """Why a pattern for addresses can match none; "" if it can."""
    local, at, domain = pattern.rpartition("@")
    if not at:
        return "" if pattern.lower() == "postmaster" else "it is not an address; domains have conditions of their own"
    if not local:
        return f"it has no local part; the domain {domain} has a condition of its own (..._domain)"
    if pattern.startswith("<") or pattern.endswith(">"):
        return "write the address without < and >"
    if "@" in local and not local.startswith('"'):
        return "it has more than one @"
    if "*" in domain:
        return '"*" is not special here; domains have conditions of their own (..._domain)'
    return domain_trouble(domain.rstrip(".")) if domain.strip(".") else "it has no domain"


def map_trouble(pattern: str) -> str:
    """Why a pattern of the route map that is no regular expression can match none; "" if it can."""
    if pattern.startswith("@"):
        return f"write the domain alone: {_quoted(pattern[1:])}"
    if "@" in pattern:
        return address_trouble(pattern)
    if re.search(r":\d+$", pattern):
        return "recipients are compared, which have no port"
    return domain_trouble(pattern)


def never(config: "Config") -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of what can never match."""
    yield from _each("relay.domains", config.relay.domains, relay_domain_trouble)
    for number, route in enumerate(config.route):
        for key, what in (*_lists(route), *_contradictions(route)):
            yield f"route.{number}.{key}", what
    for number, row in enumerate(config.mail_rule):
        yield from ((f"mail_rule.{number}.{key}", what) for key, what in _envelope(row))
    for number, site in enumerate(config.site):
        yield from _each(f"site.{number}.hosts", site.hosts, host_trouble)
    for number, rule in enumerate(config.rule):
        yield from _each(f"rule.{number}.hosts", rule.hosts, host_trouble)
        if not _may_match(rule.match):
            what = 'it is compared with "code enhanced-code text", such as "450 4.2.1 not now", which never begins so'
            yield f"rule.{number}.match", f"{_quoted(rule.match)} can never match: {what}"
        earlier = [other for other in config.rule[:number] if other.match == rule.match and not other.hosts]
        if earlier:
            yield f"rule.{number}.match", f"{_quoted(rule.match)} can never match: an earlier rule with this match comes first"


def _each(key: str, patterns: list[str], trouble: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    for pattern in patterns:
        what = trouble(pattern)
        if what:
            yield key, f"{_quoted(pattern)} can never match: {what}"


def _envelope(row: Route | MailRule) -> Iterator[tuple[str, str]]:
    yield from _each("sender", [address for address in row.sender if address], address_trouble)  # "": the null sender
    yield from _each("recipient", row.recipient, address_trouble)
    yield from _each("sender_domain", row.sender_domain, domain_trouble)
    yield from _each("recipient_domain", row.recipient_domain, domain_trouble)


def _lists(route: Route) -> Iterator[tuple[str, str]]:
    yield from _envelope(route)
    yield from _each("mx", route.mx, host_trouble)
    yield from _each("lookup_hosts", route.lookup_hosts, host_trouble)


def _contradictions(route: Route) -> Iterator[tuple[str, str]]:
    """Conditions of one route that no message can meet together."""
    if route.max_size and route.min_size > route.max_size:
        yield "min_size", f"no message has {route.min_size} octets or more, and {route.max_size} (max_size) or less"
    for key, addresses, domains in (
        ("sender", route.sender, route.sender_domain), ("recipient", route.recipient, route.recipient_domain)
    ):  # fmt: skip
        sound = [address for address in addresses if not address_trouble(address)]  # the others are named already
        if sound and domains and not any(map(domain_trouble, domains)) and not any(_within(one, domains) for one in sound):
            yield key, f"none of these addresses is in {key}_domain, and both conditions must match"


def _within(address: str, domains: list[str]) -> bool:
    return domain_matches(domain_of(address), domains)


def _quoted(text: str) -> str:
    return f'"{text}"'


# Whether a regular expression can match at the beginning of a reply


def _may_match(expression: str) -> bool:
    """Whether a rule's `match` may match some reply; False only where its beginning excludes every one."""
    try:
        tree = list(parser.parse(expression, re.I | re.S))
    except re.error:  # reported elsewhere
        return True
    if not tree or tree[0][0] is not codes.AT or tree[0][1] not in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return True
    return _fits(tree[1:], 0) is not False


def _fits(items: list[Any], place: int) -> int | bool | None:
    """Where in _REPLY a sequence ends that begins at `place`; False: it cannot match there; None: not known."""
    for operation, argument in items:
        if place >= len(_REPLY):
            return None
        allowed = _REPLY[place]
        if operation is codes.SUBPATTERN:
            found = _fits(list(argument[-1]), place)
        elif operation is codes.BRANCH:
            ends = [_fits(list(branch), place) for branch in argument[1]]
            found = False if all(end is False for end in ends) else None
        elif operation is codes.MAX_REPEAT and argument[0] == argument[1]:
            found = _fits(list(argument[2]) * min(argument[0], 5), place)
        else:
            found = _one(operation, argument, allowed, place)
        if found is False or found is None:
            return found
        place = found
    return place


def _one(operation: Any, argument: Any, allowed: frozenset[str], place: int) -> int | bool | None:
    """As `_fits`, of one character."""
    if operation is codes.ANY:
        return place + 1
    if operation is codes.LITERAL:
        return place + 1 if chr(argument) in allowed else False
    if operation is codes.IN:
        return place + 1 if any(_in(char, argument) for char in allowed) else False
    return None


def _class(which: Any, char: str) -> bool:
    """Whether a character is of a class, such as that of \\d."""
    digit = char.isdigit()  # of _REPLY: a character is a digit or a space
    of = {codes.CATEGORY_DIGIT: digit, codes.CATEGORY_WORD: digit, codes.CATEGORY_NOT_SPACE: digit}
    of |= {codes.CATEGORY_NOT_DIGIT: not digit, codes.CATEGORY_NOT_WORD: not digit, codes.CATEGORY_SPACE: not digit}
    return of.get(which, True)


def _in(char: str, members: list[Any]) -> bool:
    """Whether a set of a regular expression may contain a character."""
    negated = members[0][0] is codes.NEGATE
    found = False
    for operation, argument in members[negated:]:
        if operation is codes.LITERAL:
            found |= ord(char) == argument
        elif operation is codes.RANGE:
            found |= argument[0] <= ord(char) <= argument[1]
        elif operation is codes.CATEGORY:
            found |= _class(argument, char)
    return found != negated
