"""The Host of an HTTP request (RFC 9110 7.2)."""

import ipaddress

__all__ = ["hostname_of", "is_address"]


def hostname_of(host: str) -> str:
    """The name, or address without brackets, in the value of Host: in lower case, without a port or a trailing dot."""
    before, colon, port = host.rpartition(":")
    name = before if colon and port.isdigit() and not host.endswith("]") else host
    return name.removeprefix("[").removesuffix("]").lower().rstrip(".")


def is_address(name: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
