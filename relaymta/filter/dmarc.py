"""DMARC (RFC 7489, and RFC 9989 about records): the policy that the domain in From: publishes for mail that fails authentication.
Evaluation by `dmarc`, which gets only the tags that are valid; organizational domains by the public suffix list."""

import asyncio
import random
import re
from functools import cache, lru_cache
from typing import NamedTuple

import dmarc
from publicsuffixlist import PublicSuffixList

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.proto.address import in_a_labels, in_dns

__all__ = ["Dmarc", "check", "organizational"]

OCTETS = 4096  # of a record; real ones have less than a tenth of that
DOMAINS_KEPT = 4096
MOST = 5  # domains in From:; real mail does not have more
_POLICIES = ("none", "quarantine", "reject")
_WANTED = {dmarc.PolicyQuarantineError: "quarantine", dmarc.PolicyRejectError: "reject"}
_RECORD = re.compile(r"[Vv]\s*=\s*DMARC1\s*(;|\Z)")
# The tags that matter, and their values.
_POLICY = re.compile("|".join(_POLICIES))
_TAGS = {
    "p": _POLICY, "sp": _POLICY, "np": _POLICY, "adkim": re.compile("[rs]"), "aspf": re.compile("[rs]"), "t": re.compile("[yn]"),
    "pct": re.compile("0*(?:100|[0-9]{1,2})"),
}  # fmt: skip
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*+:[^\s,;!]+(?:![0-9]+[kmgt]?)?")  # an URI of rua=
_RESULTS = ("pass", "none", "permerror", "temperror", "fail")


class Dmarc(NamedTuple):
    """`result`: none, pass, fail, temperror or permerror (RFC 8601 2.7); `policy`: none, quarantine or reject, as requested
    for this message (with temperror: the strictest that could result); `domain`: the author's, whose policy was evaluated."""

    result: str
    policy: str
    domain: str


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


@lru_cache(DOMAINS_KEPT)
def organizational(domain: str) -> str:
    """The organizational domain of a domain (3.2)."""
    found: str | None = _suffixes().privatesuffix(domain)
    return found or domain


class _Organizations:
    """The library's interface for organizational domains."""

    @staticmethod
    def get_public_suffix(domain: str) -> str:
        return organizational(domain)


async def check(
    resolver: Resolver, authors: list[str], spf: tuple[str, str], signatures: list[tuple[str, str]], seconds: float | None = None
) -> Dmarc:
    """`authors`: the domains in From:; `spf`: (domain, result); `signatures`: (domain, result) of each. Of several authors the
    strictest result counts (RFC 7489 6.6.1). U-labels are converted. `seconds`: a record that has not come by then is a temporary
    failure."""
    authors = list(dict.fromkeys(map(_comparable, authors)))
    if len(authors) > MOST:
        return Dmarc("permerror", "reject", authors[0])
    spf = _comparable(spf[0]), spf[1]
    signatures = [(_comparable(domain), result) for domain, result in signatures]
    found = await asyncio.gather(*(_in_time(resolver, author, spf, signatures, seconds) for author in authors))
    return max(found, key=_severity, default=Dmarc("none", "none", ""))


def _comparable(domain: str) -> str:
    """A domain in A-labels and lower case, without a trailing dot."""
    return in_a_labels(domain.removesuffix("."))


def _severity(one: Dmarc) -> tuple[int, int]:
    return _POLICIES.index(one.policy), _RESULTS.index(one.result)


async def _in_time(
    resolver: Resolver, author: str, spf: tuple[str, str], signatures: list[tuple[str, str]], seconds: float | None
) -> Dmarc:
    try:
        async with asyncio.timeout(seconds):
            return await _check(resolver, author, spf, signatures)
    except TimeoutError:
        return Dmarc("temperror", "reject", author)


async def _check(resolver: Resolver, author: str, spf: tuple[str, str], signatures: list[tuple[str, str]]) -> Dmarc:
    above = ""  # the organizational domain, if the record is that one's
    try:
        record = await _record(resolver, author)
        if record is None and (organization := organizational(author)) != author:
            above = organization
            record = await _record(resolver, above)
    except DnsFailure:
        return Dmarc("temperror", "reject", author)
    if record is None:
        return Dmarc("none", "none", author)
    tags = _tags(record)
    if tags is None:
        return Dmarc("permerror", "none", author)
    try:
        policy = dmarc.DMARCPolicy(tags, author, above or None, publicsuffix=_Organizations, strict=False)
        policy.verify(auth_results=_passed(author, spf, signatures, "pass"))
    except dmarc.PolicyError as failure:
        wanted = _POLICIES.index(_WANTED.get(type(failure), "none"))
        if random.random() * 100 >= policy.policy.pct:  # the rest gets the next weaker policy (6.6.4; with t=y all)
            wanted = max(0, wanted - 1)
        unknown = _passed(author, spf, signatures, "temperror")
        return Dmarc("temperror" if unknown and _would_pass(policy, unknown) else "fail", _POLICIES[wanted], author)
    return Dmarc("pass", "none", author)


def _tags(record: str) -> str | None:
    """A record of its valid tags alone; None when no policy can be read out of it (RFC 7489 6.3 and 6.6.3, RFC 9989 4.8 and
    4.10.1). What is no tag, unknown tags and tags with an invalid value are ignored; but where p=, sp= or np= is invalid, the
    policy is "none" if reports are asked for. It is "none" without p=, too (RFC 9989 4.7)."""
    found: dict[str, str | None] = {}  # None: an invalid value
    reports = False
    for part in record.split(";")[1:]:
        name, equals, value = part.partition("=")
        name, value = name.strip().lower(), value.strip().lower()
        if equals and name in _TAGS:
            if _TAGS[name].fullmatch(value):
                found[name] = value
            else:
                found.setdefault(name, None)
        elif equals and name == "rua":
            reports = any(_ADDRESS.fullmatch(address.strip()) for address in value.split(","))
    broken = [name for name in ("p", "sp", "np") if found.get(name, "") is None]
    if broken and not reports:
        return None
    if broken or "p" not in found:
        found.update(p="none", sp=None)
    return "v=DMARC1; " + "; ".join(f"{name}={value}" for name, value in found.items() if value is not None)


def _passed(author: str, spf: tuple[str, str], signatures: list[tuple[str, str]], result: str) -> list[dmarc.AuthResult]:
    """The identifiers with this result that could be aligned with the author, as passed ones. Those of other organizations
    cannot be aligned, and may be invalid domains. A public suffix is no organization (RFC 7489 3.1.1)."""
    if _suffixes().privatesuffix(author) is None:
        return []
    own = organizational(author)
    found: list[dmarc.AuthResult] = []
    if spf[1] == result and organizational(spf[0]) == own:
        found.append(dmarc.SPFAuthResult(spf[0], dmarc.SPFResult.PASS))
    aligned = [domain for domain, outcome in signatures if outcome == result and organizational(domain) == own]
    return [*found, *(dmarc.DKIMAuthResult(domain, dmarc.DKIMResult.PASS) for domain in aligned)]


def _would_pass(policy: dmarc.DMARCPolicy, results: list[dmarc.AuthResult]) -> bool:
    """Whether these identifiers are aligned as the policy requires."""
    try:
        policy.verify(auth_results=results)
    except (dmarc.Error, ValueError):
        return False
    return True


async def _record(resolver: Resolver, domain: str) -> str | None:
    """The one DMARC record of a domain (6.6.3); None when there is none, or more than one."""
    name = f"_dmarc.{domain}"
    if not in_dns(name):
        return None
    try:
        found = [text for text in await resolver.txt(name) if len(text) <= OCTETS and _RECORD.match(text)]
    except (NoData, NoSuchName):
        return None
    return found[0] if len(found) == 1 else None
