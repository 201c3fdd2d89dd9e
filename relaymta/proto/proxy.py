"""The PROXY protocol, versions 1 and 2: the header with which a load balancer names its client.

https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt
"""

import ipaddress
import struct
from typing import NamedTuple

__all__ = ["LONGEST", "BadHeader", "Header", "parse"]

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LONGEST = 16 + 2048  # octets of a header that is accepted; version 1 has 107 at most
_V1_LONGEST = 107
# Octets of one address, and of the whole address block: TCP over IPv4 and IPv6; AF_UNSPEC and AF_UNIX, which give no address.
_FAMILIES = {0x11: (4, 12), 0x21: (16, 36), 0x00: (0, 0), 0x31: (0, 216)}


class BadHeader(ValueError):
    """A connection does not begin with a valid header; str() is the reason."""


class Header(NamedTuple):
    """`length`: octets of the header; `address`: the client's, "" without one: a connection of the balancer itself (LOCAL), an
    unknown client (UNKNOWN, AF_UNSPEC) or one on a unix socket (AF_UNIX)."""

    length: int
    address: str


def parse(data: bytes) -> Header | None:
    """The header at the beginning of `data`; None while it is incomplete. BadHeader when it is invalid."""
    if data[:12] == _SIGNATURE[: len(data[:12])]:
        return _second(data) if len(data) >= 16 else None
    if not b"PROXY ".startswith(data[:6]):
        raise BadHeader("no PROXY header")
    end = data.find(b"\r\n", 0, _V1_LONGEST)
    if end < 0:
        if len(data) >= _V1_LONGEST:
            raise BadHeader("a PROXY header of more than 107 octets")
        return None
    return _first(data[:end], end + 2)


def _first(line: bytes, length: int) -> Header:
    words = line.decode("ascii", "replace").split(" ")
    if words[1:2] == ["UNKNOWN"]:
        return Header(length, "")
    if len(words) != 6 or words[1] not in ("TCP4", "TCP6") or not all(word.isdigit() and int(word) < 65536 for word in words[4:]):
        raise BadHeader("a malformed PROXY header")
    try:
        ends = [ipaddress.ip_address(word) for word in words[2:4] if "%" not in word]  # a scope id is of another host
    except ValueError:
        raise BadHeader("a PROXY header without addresses") from None
    if len(ends) != 2 or any(end.version != int(words[1][3]) for end in ends):
        raise BadHeader("addresses of another family than the PROXY header's")
    return Header(length, str(ends[0]))


def _second(data: bytes) -> Header | None:
    command, family, size = struct.unpack_from(">BBH", data, 12)
    if command >> 4 != 2 or command & 15 > 1:
        raise BadHeader("a PROXY header of an unknown version or command")
    length = 16 + size
    if length > LONGEST:
        raise BadHeader("a PROXY header that is too long")
    if len(data) < length:
        return None
    if command & 15 == 0:  # LOCAL: a health check
        return Header(length, "")
    octets, both = _FAMILIES.get(family, (0, LONGEST))
    if size < both:
        raise BadHeader("a PROXY header that is not about TCP")
    return Header(length, str(ipaddress.ip_address(data[16 : 16 + octets])) if octets else "")
