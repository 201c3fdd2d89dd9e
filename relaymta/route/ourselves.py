"""This machine as a target: mail that it would send to itself loops (RFC 5321 5.1, 6.3)."""

import errno
import ipaddress
import socket
from collections.abc import Iterable

from relaymta.config import parse_hostport

__all__ = ["Ourselves", "is_local"]


def is_local(address: str) -> bool:
    """Whether an IP address is one of this machine's now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


class Ourselves:
    """`names`: this machine's host names, lower case; `listeners`: the addresses that it accepts mail on, `host:port` each."""

    def __init__(self, names: set[str], listeners: Iterable[str] = ()) -> None:
        self.names = names
        self._exact: set[tuple[str, int]] = set()
        self._any: set[tuple[int, int]] = set()  # (IP version, port) of listeners on all addresses
        for listener in listeners:
            host, port = parse_hostport(listener)
            try:
                address = ipaddress.ip_address(host)
            except ValueError:  # a name: which addresses it has is not known here
                self._any |= {(4, port), (6, port)}
                continue
            if address.is_unspecified:
                self._any.add((address.version, port))
            else:
                self._exact.add((str(address), port))

    def at(self, address: str, port: int) -> bool:
        """Whether a connection to this IP address and port would reach one of our listeners."""
        try:
            known = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(known, ipaddress.IPv6Address) and known.ipv4_mapped is not None:
            known = known.ipv4_mapped
        if known.is_unspecified:  # connects to the loopback address
            known = ipaddress.ip_address("127.0.0.1" if known.version == 4 else "::1")
        return (str(known), port) in self._exact or ((known.version, port) in self._any and is_local(str(known)))
