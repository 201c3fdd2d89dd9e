"""Open relays: whether networks that may relay cover much of the Internet."""

import ipaddress
from typing import TypeVar

__all__ = ["EVERYWHERE_SHARE", "everywhere", "widest"]

# Special-purpose IPv4 addresses (IANA's registry), which no host on the Internet has; and IPv6's global unicast addresses.
_SPECIAL = [
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
        "198.18.0.0/15", "224.0.0.0/3",
    )
]  # fmt: skip
_GLOBAL = [ipaddress.IPv6Network("2000::/3")]
# IPv6 prefixes that embed an IPv4 address, and after how many bits: NAT64 (RFC 6052), 6to4 (RFC 3056).
_EMBEDDED = [(ipaddress.IPv6Network("64:ff9b::/96"), 96), (ipaddress.IPv6Network("2002::/16"), 16)]
EVERYWHERE_SHARE = 16  # no organization's own networks are a sixteenth of the Internet
_Network = TypeVar("_Network", ipaddress.IPv4Network, ipaddress.IPv6Network)


def _common(some: list[_Network], others: list[_Network]) -> int:
    """The number of addresses that are in both of two lists, neither of which overlaps itself."""
    return sum(min(one.num_addresses, other.num_addresses) for one in some for other in others if one.overlaps(other))


def everywhere(networks: list[str]) -> bool:
    """Whether networks cover much of the Internet together (1/EVERYWHERE_SHARE of the public IPv4 or IPv6 addresses), so that
    anybody can have an address in them."""
    all_of = [ipaddress.ip_network(text) for text in networks]
    fourth = [network for network in all_of if isinstance(network, ipaddress.IPv4Network)]
    sixth = [network for network in all_of if isinstance(network, ipaddress.IPv6Network)]
    for network in sixth:
        for prefix, bits in _EMBEDDED:
            if network.overlaps(prefix):
                length = min(32, max(0, network.prefixlen - bits))
                inner = int(network.network_address) >> (96 - bits) & 0xFFFFFFFF if network.prefixlen >= bits else 0
                fourth.append(ipaddress.IPv4Network((inner, length), strict=False))
    fourth, sixth = list(ipaddress.collapse_addresses(fourth)), list(ipaddress.collapse_addresses(sixth))
    public = sum(network.num_addresses for network in fourth) - _common(fourth, _SPECIAL)
    return public >= 2**32 // EVERYWHERE_SHARE or _common(sixth, _GLOBAL) >= 2**125 // EVERYWHERE_SHARE


def widest(networks: list[str]) -> str:
    """The widest three of some networks, for a message."""
    first = sorted(networks, key=lambda text: ipaddress.ip_network(text).prefixlen)
    return ", ".join(first[:3]) + (" ..." if len(first) > 3 else "")
