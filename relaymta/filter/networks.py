"""The network by which a client is known, where its pool is one client."""

import ipaddress
from functools import lru_cache

__all__ = ["network_of"]

NETWORKS = {4: 24, 6: 64}  # bits, by family


@lru_cache(4096)
def network_of(client: str) -> str:
    """The network of a client's address: /24, or /64 of IPv6. What is no address is returned as it is."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:  # a client whose address its proxy does not know
        return client
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return str(ipaddress.ip_network((address, NETWORKS[address.version]), strict=False))
