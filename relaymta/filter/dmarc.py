"""DMARC (RFC 7489): the policy that the domain in From: publishes for mail that fails authentication. Evaluation by `dmarc`,
organizational domains by the public suffix list."""

import asyncio
import random
import re
from functools import cache, lru_cache
from typing import NamedTuple

import dmarc
from publicsuffixlist import PublicSuffixList

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver

__all__ = ["Dmarc", "check", "organizational"]

OCTETS = 4096  # of a record; real ones have less than a tenth of that
DOMAINS_KEPT = 4096
MOST = 5  # domains in From:; real mail does not have more
_POLICIES = ("none", "quarantine", "reject")
_WANTED = {dmarc.PolicyQuarantineError: "quarantine", dmarc.PolicyRejectError: "reject"}
_RECORD = re.compile(r"v\s*=\s*DMARC1\s*(;|\Z)")
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


async def check(resolver: Resolver, authors: list[str], spf: tuple[str, str], signatures: list[tuple[str, str]]) -> Dmarc:
    """`authors`: the domains in From:; `spf`: (domain, result); `signatures`: (domain, result) of each. Of several authors the
    strictest result counts (RFC 7489 6.6.1)."""
    if len(authors) > MOST:
        return Dmarc("permerror", "reject", authors[0])
    found = await asyncio.gather(*(_check(resolver, author, spf, signatures) for author in authors))
    return max(found, key=_severity, default=Dmarc("none", "none", ""))


def _severity(one: Dmarc) -> tuple[int, int]:
    return _POLICIES.index(one.policy), _RESULTS.index(one.result)


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
    try:
        policy = dmarc.DMARCPolicy(record, author, above or None, publicsuffix=_Organizations, strict=False)
        policy.verify(auth_results=_passed(author, spf, signatures, "pass"))
    except dmarc.PolicyError as failure:
        wanted = _POLICIES.index(_WANTED.get(type(failure), "none"))
        if random.random() * 100 >= policy.policy.pct:  # the rest gets the next weaker policy (6.6.4; with t=y all)
            wanted = max(0, wanted - 1)
        unknown = _passed(author, spf, signatures, "temperror")
        return Dmarc("temperror" if unknown and _would_pass(policy, unknown) else "fail", _POLICIES[wanted], author)
    except (dmarc.Error, ValueError):
        return Dmarc("permerror", "none", author)
    return Dmarc("pass", "none", author)


def _passed(author: str, spf: tuple[str, str], signatures: list[tuple[str, str]], result: str) -> list[dmarc.AuthResult]:
    """The identifiers with this result that could be aligned with the author, as passed ones. Those of other organizations
    cannot be aligned, and may be invalid domains."""
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
    try:
        found = [text for text in await resolver.txt(f"_dmarc.{domain}") if len(text) <= OCTETS and _RECORD.match(text)]
    except (NoData, NoSuchName, ValueError):  # ValueError: an invalid domain
        return None
    return found[0] if len(found) == 1 else None
