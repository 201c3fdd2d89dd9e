"""DMARC (RFC 7489): what the domain in From: wants done with mail that it did not authenticate. Policy logic by `dmarc`,
organizational domains by the public suffix list."""

from functools import cache
from typing import NamedTuple

import dmarc
from publicsuffixlist import PublicSuffixList

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver

__all__ = ["Dmarc", "check", "organizational"]


class Dmarc(NamedTuple):
    """`result`: none, pass, fail, temperror or permerror (RFC 8601 2.7); `policy`: none, quarantine or reject, which holds for a
    message that fails."""

    result: str
    policy: str
    domain: str


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


def organizational(domain: str) -> str:
    """The domain that somebody registered (3.2)."""
    found: str | None = _suffixes().privatesuffix(domain)
    return found or domain


async def check(resolver: Resolver, author: str, spf: tuple[str, str], signatures: list[tuple[str, str]]) -> Dmarc:
    """`author`: the domain in From:; `spf`: (domain, result); `signatures`: (domain, result) of each."""
    organization = organizational(author)
    try:
        record = await _record(resolver, author)
        if record is None and organization != author:
            record = await _record(resolver, organization)
    except DnsFailure:
        return Dmarc("temperror", "none", author)
    if record is None:
        return Dmarc("none", "none", author)
    results: list[dmarc.AuthResult] = [dmarc.SPFAuthResult(spf[0], dmarc.SPFResult(spf[1]))]
    for domain, found in signatures:
        results.append(dmarc.DKIMAuthResult(domain, dmarc.DKIMResult("pass" if found == "pass" else "fail")))
    try:
        policy = dmarc.DMARCPolicy(record, author, organization, publicsuffix=_suffixes(), strict=False)
        policy.verify(auth_results=results)
    except dmarc.PolicyRejectError:
        return Dmarc("fail", "reject", author)
    except dmarc.PolicyQuarantineError:
        return Dmarc("fail", "quarantine", author)
    except dmarc.PolicyError:
        return Dmarc("fail", "none", author)
    except (dmarc.Error, ValueError):
        return Dmarc("permerror", "none", author)
    return Dmarc("pass", "none", author)


async def _record(resolver: Resolver, domain: str) -> str | None:
    """The one DMARC record of a domain (6.6.3); None when there is none, or more than one."""
    try:
        found = [text for text in await resolver.txt(f"_dmarc.{domain}") if text.startswith("v=DMARC1")]
    except (NoData, NoSuchName):
        return None
    return found[0] if len(found) == 1 else None
