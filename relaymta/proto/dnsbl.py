"""Lists of addresses and domains in the DNS (RFC 5782): the names that are asked, and what the answers mean."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

__all__ = ["Codes", "Result", "reversed_address"]

_NUMBER = r"(?:0|[1-9][0-9]{0,2})"
_CODE = re.compile(rf"((?:{_NUMBER}\.){{3}})({_NUMBER})(?:-({_NUMBER})|/([0-9]{{1,2}}))?\Z")
_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")
# With these a list says that it does not answer the one who asks (https://www.spamhaus.org/faqs/dnsbl-usage/, RFC 5782 5).
_REFUSALS = ipaddress.IPv4Network("127.255.255.0/24")
_TEST = ipaddress.IPv4Address("127.0.0.1")

Kind = Literal["listed", "other", "refused"]


class Result(NamedTuple):
    """What the answers to one question mean. listed: with these `codes`, of those that count, in their order, each once; other:
    none of them does; refused: the list does not answer us, or a resolver lies; `codes` are those answers then."""

    kind: Kind
    codes: Sequence[str]


def reversed_address(address: str) -> str:
    """An address as it is asked for: its octets, of IPv6 its 32 digits, turned round (RFC 5782 2.1, 2.4). An IPv4 address in one
    of IPv6 is that one; a zone (RFC 4007 11) is left out. ValueError: it is no address."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or ipaddress.IPv6Address(int(found))
    return found.reverse_pointer.removesuffix(".in-addr.arpa").removesuffix(".ip6.arpa")


class Codes:
    """Answers of a list that count."""

    __slots__ = ("_ranges",)

    def __init__(self, texts: Sequence[str]) -> None:
        """`texts`: "127.0.0.2", "127.0.0.2-11" (in the last octet), "127.0.0.0/24". ValueError: with what is wrong."""
        self._ranges: list[tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]] = []
        for text in texts:
            first, last = _bounds(text)
            if first not in _LOOPBACK or last not in _LOOPBACK:
                raise ValueError(f"{text!r}: answers of lists are within 127.0.0.0/8")
            if first == last == _TEST or (first in _REFUSALS and last in _REFUSALS):
                raise ValueError(f"{text!r}: with this a list says that it does not answer us; it cannot count")
            self._ranges.append((first, last))

    def match(self, answers: Sequence[str]) -> Result:
        """What the A records of one answer mean."""
        listed, refused = set(), []
        for text in answers:
            try:
                code = ipaddress.IPv4Address(text)
            except ValueError:
                refused.append(text)
                continue
            if code not in _LOOPBACK or code in _REFUSALS or code == _TEST:
                refused.append(text)
            elif any(first <= code <= last for first, last in self._ranges):
                listed.add(code)
        if refused:
            return Result("refused", refused)
        return Result("listed", list(map(str, sorted(listed)))) if listed else Result("other", ())


def _bounds(text: str) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
    match = _CODE.match(text)
    if match is None:
        raise ValueError(f'{text!r} is none of "127.0.0.2", "127.0.0.2-11" and "127.0.0.0/24"')
    octets, octet, end, length = match.groups()
    try:
        first = ipaddress.IPv4Address(octets + octet)
        last = ipaddress.IPv4Address(octets + (end or octet))
        network = ipaddress.IPv4Network((first, int(length or 32)), strict=False)
    except ValueError:
        raise ValueError(f"{text!r}: an octet is 255 at most, and a prefix 32 bits") from None
    if first > last:
        raise ValueError(f"{text!r}: the range ends before it begins")
    if length is None:
        return first, last
    if network.network_address != first:
        raise ValueError(f"{text!r}: the network is {network}")
    return first, network.broadcast_address
