"""SPF (RFC 7208) by pyspf, which asks the DNS synchronously: a question that was not asked before stops it, is asked on the loop,
and then it is run again from the start, which is 68 us of CPU in all."""

import ipaddress
from typing import Any, NamedTuple

import spf

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver

__all__ = ["Spf", "check"]

QUESTIONS = 40  # pyspf itself stops at ten mechanisms that ask (4.6.4); this is for what it does not count
# Of all records of a policy, which are read anew for each question (11.1); nobody's have half of that.
OCTETS = 10_240
MACROS = 50

_Answers = list[tuple[tuple[str, str], Any]]


class Spf(NamedTuple):
    """`result`: none, neutral, pass, fail, softfail, temperror or permerror (2.6); `domain`: whose policy that is."""

    result: str
    domain: str
    reason: str


class _Unknown(BaseException):
    """A question whose answer is not known yet. Not an Exception: pyspf must not catch it."""

    def __init__(self, name: str, kind: str) -> None:
        self.question = (name, kind)


async def check(resolver: Resolver, address: str, sender: str, helo: str) -> Spf:
    """Whether a client at `address` may send as `sender` (with the null sender: as postmaster of `helo`, 2.4)."""
    known: dict[tuple[str, str], _Answers | Exception] = {}

    def look_up(name: Any, kind: str, *_: Any) -> _Answers:
        found = known.get((str(name), kind))
        if found is None:
            raise _Unknown(str(name), kind)
        if isinstance(found, Exception):
            raise found
        return found

    domain = (sender.rpartition("@")[2] or helo).lower()
    octets, macros = 0, 0
    for _ in range(QUESTIONS):
        spf.DNSLookup = look_up  # set and used within one turn of the loop
        try:
            result, reason = spf.check2(i=address, s=sender, h=helo)
            return Spf("none" if result == "invalid" else str(result), domain, str(reason))
        except _Unknown as unknown:
            known[unknown.question] = await _asked(resolver, *unknown.question)
            for text in _policies(known[unknown.question]):
                octets, macros = octets + len(text), macros + text.count(b"%{")
            if octets > OCTETS or macros > MACROS:
                return Spf("permerror", domain, f"a policy of more than {OCTETS} octets or {MACROS} macros")
        except Exception as error:  # pyspf on hostile records: theirs, not ours
            return Spf("permerror", domain, f"{type(error).__name__}: {error}")
    return Spf("permerror", domain, "too many DNS look-ups")


def _policies(found: _Answers | Exception) -> list[bytes]:
    """Those of an answer's texts that are SPF's."""
    if isinstance(found, Exception):
        return []
    return [value[0] for key, value in found if key[1] == "TXT" and value[0][:6].lower() == b"v=spf1"]


async def _asked(resolver: Resolver, name: str, kind: str) -> _Answers | Exception:
    """An answer as pyspf wants it."""
    if kind not in ("A", "AAAA", "MX", "PTR", "TXT"):
        return []
    try:
        values = await resolver.values(name, kind)
    except (NoData, NoSuchName):
        return []
    except (DnsFailure, ValueError) as error:  # the last one for what is no name at all
        unanswered: Exception = spf.TempError(f"DNS {error}")
        return unanswered
    if kind == "TXT":
        values = [(text.encode("utf-8"),) for text in values]
    elif kind in ("A", "AAAA"):
        values = [str(ipaddress.ip_address(value)) for value in values]
    return [((name, kind), value) for value in values]
