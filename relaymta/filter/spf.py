"""SPF (RFC 7208) by pyspf, which queries the DNS synchronously: a query without a known answer aborts it, is made on the event
loop, and then pyspf is run again from the start: 68 us of CPU in all."""

import asyncio
import ipaddress
import re
from functools import lru_cache
from typing import Any, NamedTuple

import spf

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.proto.address import in_a_labels, in_dns, is_host

__all__ = ["Spf", "check"]

QUESTIONS = 122  # the policy, ten terms (4.6.4) with a query and ten more for the hosts of each, and what is behind exp=
# Of all records of a policy, which are parsed again for each query (11.1); real ones have less than half of that.
OCTETS = 10_240
TERMS = 800
MACROS = 50
ADDRESSES = 500  # in all answers about hosts; real ones have less than a fifth of that
EFFORT = 8000  # terms and addresses parsed in all, again for each query: some 80 ms
AT_ONCE = 200  # terms and addresses parsed in one iteration of the event loop
NUMBERS_KEPT = 4096
# Of one answer: with more MX records there is no result (4.6.4), more names of an address are ignored (5.5).
MOST = {"MX": 11, "PTR": 10}
LONGEST_TERM = 512  # characters of a domain with macros; the longest name has 253
_MODIFIER = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*+)=")
_VERSION = re.compile(rb"v=spf1(?: |\Z)", re.I)
# macro-string (7.1); the number of labels must not be zero (7.3).
_MACROS = re.compile(r"(?>(?:[!-$&-~]|%[%_-]|%\{[A-Za-z](?!0++[^0-9])[0-9]*+[rR]?[.+,/_=-]*+\})*)\Z")

_Answers = list[tuple[tuple[str, str], Any]]


class Spf(NamedTuple):
    """`result`: none, neutral, pass, fail, softfail, temperror or permerror (2.6); `domain`: the one whose policy it is."""

    result: str
    domain: str
    reason: str


class _Unknown(BaseException):
    """A query whose answer is not known yet. Not an Exception: pyspf must not catch it."""

    def __init__(self, name: str, kind: str) -> None:
        self.question = (name, kind)


class _Query(spf.query):  # type: ignore[misc]
    """Takes the domain behind the last @, where pyspf takes the first, which may be within a quoted local part; compares
    addresses as numbers, where pyspf makes two networks for each comparison; ignores unknown modifiers however often they are
    there (6), where pyspf takes all for exp= and redirect=; shortens a long name as far as necessary, not by one label; counts a
    redirect= that is followed (4.6.4), not each that is there; takes a name of the client that cannot be looked up for none (5.5,
    7.3), where pyspf fails; and refuses what is no macro (7.1)."""

    def __init__(self, address: str, sender: str, helo: str, querytime: int) -> None:
        super().__init__(address, sender, helo, querytime=querytime)
        if sender.count("@") > 1:
            self.l, _, self.o = sender.rpartition("@")
            self.d = self.o
        self._levels: list[int] = []  # of the records that are evaluated, the innermost last: a redirect is on that of its record
        self._uncounted = 0  # redirect= that pyspf is about to count

    def check0(self, spf: str | None, recursion: int) -> tuple[str, int, str]:
        """Evaluate a record (None: there is none)."""
        if self._levels and self._levels[-1] == recursion:
            self.check_lookups()  # a redirect= is followed
        version, *terms = (spf or "").split(" ")
        named = [version, *(_named(number, term) for number, term in enumerate(terms))]
        self._uncounted += any(term.startswith("redirect=") for term in named)
        self._levels.append(recursion)
        try:
            found: tuple[str, int, str] = super().check0(" ".join(named), recursion)
        finally:
            self._levels.pop()
        return found

    def check_lookups(self) -> None:
        """Count a term with a look-up."""
        if self._uncounted:
            self._uncounted -= 1
        else:
            super().check_lookups()

    def validated_ptrs(self) -> list[str]:
        """The names of the client's address that lead back to it."""
        try:
            names = self.dns_ptr(self.i)
        except spf.TempError:
            return []
        return [name for name in names[: MOST["PTR"]] if self._leads_back(name)]

    def _leads_back(self, name: str) -> bool:
        try:
            return self.cidrmatch(self.dns_a(name, self.A), self.cidrmax)
        except spf.TempError:
            return False

    def expand(self, text: str, stripdot: bool = True) -> str:
        """`text` with its macros expanded; a domain of at most 253 characters (7.3), or (not `stripdot`) an explanation."""
        if len(text) > LONGEST_TERM:  # pyspf's time is the square of its length
            if stripdot:
                raise spf.PermError("a term is too long")
            text = text[:LONGEST_TERM]
        if text.endswith("%%"):  # which pyspf takes for a % that begins nothing
            return str(super().expand(text[:-2] + "%_", stripdot))[:-1] + "%"
        name: str = super().expand(text, stripdot)
        while stripdot and len(name) > 253 and "." in name:
            name = name.partition(".")[2]
        return name

    def cidrmatch(self, addresses: list[Any], prefix: int) -> bool:
        """`addresses`: numbers, or the text of ip4: or ip6:."""
        if addresses and isinstance(addresses[0], str):
            addresses = [_number(address) for address in addresses]
        shift = self.cidrmax - prefix
        own = int(self.ipaddr) >> shift
        return any(address >> shift == own for address in addresses)


def _named(number: int, term: str) -> str:
    """A term of a record, as pyspf reads it: an unknown modifier under a name that no other has (which is not looked at)."""
    modifier = _MODIFIER.match(term)
    if (modifier is not None or "%" in term) and not _MACROS.match(term):
        raise spf.PermError("invalid macro", term[:100])
    if modifier is None:
        return term
    name = modifier[1].lower()
    return f"{name if name in ('exp', 'redirect') else f'x{number}'}={term[modifier.end() :]}"


@lru_cache(NUMBERS_KEPT)
def _number(address: str) -> int:
    try:
        return int(ipaddress.ip_address(address))
    except ValueError as error:
        raise spf.PermError(str(error)) from None


async def check(resolver: Resolver, address: str, sender: str, helo: str) -> Spf:
    """Whether a client at `address` may send as `sender` (with the null sender: as postmaster of `helo`, 2.4). The result is
    "none", and nothing is looked up, for a domain that no host can have: a single label, an address literal, a label above 63
    octets (4.3). U-labels are converted (RFC 8616 4)."""
    local, _, given = sender.rpartition("@")
    domain = in_a_labels((given or helo).removesuffix("."))
    if not is_host(domain):
        return Spf("none", domain, "")
    sender = f"{local}@{domain}" if sender else ""
    known: dict[tuple[str, str], _Answers | Exception] = {}

    def look_up(name: Any, kind: str, *_: Any) -> _Answers:
        found = known.get((str(name), kind))
        if found is None:
            raise _Unknown(str(name), kind)
        if isinstance(found, Exception):
            raise found
        return found

    octets, terms, macros, addresses, effort, at_once = 0, 0, 0, 0, 0, 0
    for _ in range(QUESTIONS):
        spf.DNSLookup = look_up  # set and used within one iteration of the event loop
        try:
            result, _, reason = _Query(address, sender, helo if sender else domain, querytime=20).check()
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
            if at_once > AT_ONCE:  # cached answers do not yield to the event loop
                at_once = 0
                await asyncio.sleep(0)
        except Exception as error:  # pyspf fails on hostile records
            return Spf("permerror", domain, f"{type(error).__name__}: {error}")
    return Spf("permerror", domain, "too many DNS look-ups")


def _policies(found: _Answers | Exception) -> list[bytes]:
    """The SPF records in an answer."""
    if isinstance(found, Exception):
        return []
    return [value[0] for key, value in found if key[1] == "TXT" and _VERSION.match(value[0])]


async def _asked(resolver: Resolver, name: str, kind: str) -> _Answers | Exception:
    """An answer in the form that pyspf expects."""
    if kind not in ("A", "AAAA", "MX", "PTR", "TXT") or not in_dns(name):  # nor does a non-ASCII local part match (RFC 8616 4)
        return []
    try:
        values = await resolver.values(name, kind)
    except (NoData, NoSuchName):
        return []
    except DnsFailure as error:
        unanswered: Exception = spf.TempError(f"DNS {error}")
        return unanswered
    if kind == "TXT":
        values = [(text,) for text in _relevant([text.encode("utf-8") for text in values])]
    elif kind in ("A", "AAAA"):
        values = [int(ipaddress.ip_address(value)) for value in values[: ADDRESSES + 1]]
    return [((name, kind), value) for value in values[: MOST.get(kind)]]


def _relevant(texts: list[bytes]) -> list[bytes]:
    """The texts that matter: two SPF records are as invalid as more (4.5), and of other texts two are as good as more (6.2)."""
    policies: list[bytes] = []
    others: list[bytes] = []
    for text in texts:
        (policies if _VERSION.match(text) else others).append(text)
    return policies[:2] + others[:2]
