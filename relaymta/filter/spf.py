"""SPF (RFC 7208) by pyspf, which asks the DNS synchronously: a question that was not asked before stops it, is asked on the loop,
and then it is run again from the start, which is 68 us of CPU in all."""

import asyncio
import ipaddress
from functools import lru_cache
from typing import Any, NamedTuple

import spf

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver

__all__ = ["Spf", "check"]

QUESTIONS = 40  # pyspf itself stops at ten mechanisms that ask (4.6.4); this is for what it does not count
# Of all records of a policy, which are read anew for each question (11.1); nobody's have half of that.
OCTETS = 10_240
TERMS = 800
MACROS = 50
ADDRESSES = 500  # of all answers about hosts; nobody's have a fifth of that
EFFORT = 8000  # terms and addresses read in all, again for each question: some 80 ms
AT_ONCE = 200  # that many are read in one turn of the loop
NUMBERS_KEPT = 4096
# Of one answer: with more MX records there is no result (4.6.4), more names of an address are not looked at (5.5).
MOST = {"MX": 11, "PTR": 10}

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


class _Query(spf.query):  # type: ignore[misc]
    """With the domain behind the last @, where pyspf takes the first, which may be within a quoted local part; and with addresses
    as numbers: pyspf makes two networks of each, whenever it compares it."""

    def __init__(self, address: str, sender: str, helo: str, querytime: int) -> None:
        super().__init__(address, sender, helo, querytime=querytime)
        if sender.count("@") > 1:
            self.l, _, self.o = sender.rpartition("@")
            self.d = self.o

    def cidrmatch(self, addresses: list[Any], prefix: int) -> bool:
        """`addresses`: numbers, or the text of ip4: or ip6:."""
        if addresses and isinstance(addresses[0], str):
            addresses = [_number(address) for address in addresses]
        shift = self.cidrmax - prefix
        own = int(self.ipaddr) >> shift
        return any(address >> shift == own for address in addresses)


@lru_cache(NUMBERS_KEPT)
def _number(address: str) -> int:
    try:
        return int(ipaddress.ip_address(address))
    except ValueError as error:
        raise spf.PermError(str(error)) from None


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
    octets, terms, macros, addresses, effort, at_once = 0, 0, 0, 0, 0, 0
    for _ in range(QUESTIONS):
        spf.DNSLookup = look_up  # set and used within one turn of the loop
        try:
            result, _, reason = _Query(address, sender, helo, querytime=20).check()
            return Spf("none" if result == "invalid" else str(result), domain, str(reason))
        except _Unknown as unknown:
            known[unknown.question] = await _asked(resolver, *unknown.question)
            answer = known[unknown.question]
            for text in _policies(answer):
                octets, terms, macros = octets + len(text), terms + text.count(b" "), macros + text.count(b"%{")
            if unknown.question[1] in ("A", "AAAA") and isinstance(answer, list):
                addresses += len(answer)
            effort += terms + addresses
            if octets > OCTETS or terms > TERMS or macros > MACROS or addresses > ADDRESSES or effort > EFFORT:
                return Spf(
                    "permerror", domain, f"a policy of too many octets, terms, macros or addresses ({OCTETS} octets at most)"
                )
            at_once += terms + addresses
            if at_once > AT_ONCE:  # answers that are known already need no turn
                at_once = 0
                await asyncio.sleep(0)
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
        values = [(text.encode("utf-8"),) for text in _telling(values)]
    elif kind in ("A", "AAAA"):
        values = [int(ipaddress.ip_address(value)) for value in values[: ADDRESSES + 1]]
    return [((name, kind), value) for value in values[: MOST.get(kind)]]


def _telling(texts: list[str]) -> list[str]:
    """As many of a name's texts as say all: of policies, and of others, more than one is as good as any number (4.5, 6.2)."""
    policies: list[str] = []
    others: list[str] = []
    for text in texts:
        (policies if text[:6].lower() == "v=spf1" else others).append(text)
    return policies[:2] + others[:2]
