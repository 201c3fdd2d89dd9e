"""This machine as a target: mail that it would send to itself loops (RFC 5321 5.1, 6.3)."""

import errno
import ipaddress
import socket
from collections.abc import Iterable

from relaymta.config import Config, parse_hostport
from relaymta.errors import is_scarce
from relaymta.hosts import numeric
from relaymta.proto.address import DomainError, normalize_domain

__all__ = ["Ourselves", "check", "is_local"]

SMTP_PORT = 25


def is_local(address: str) -> bool:
    """Whether an IP address is one of this machine's now. OSError: no descriptor is left to find out."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError as error:
        if is_scarce(error):
            raise
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def check(config: Config) -> list[str]:
    """Smart hosts that are this relay, one `file:line: key: what` each, for `config check`. Names are not looked up."""
    ours, found = Ourselves.of(config), []
    for number, route in enumerate(config.route):
        for text in route.hosts:
            host, port = ("", 0) if text.startswith("unix:") else parse_hostport(text, 25)
            if ours.at("127.0.0.1" if host.lower().rstrip(".") == "localhost" else host, port):
                found.append(config.at(f"route.{number}.hosts", f"{text} is a listener of this relay: mail would loop (5.4.6)"))
    return found


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A host given by number; the IPv4 address of a mapped one (RFC 4291 2.5.5.2). None: it is a name."""
    number = numeric(host)
    try:
        address = ipaddress.ip_address(number or host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _name(host: str) -> str:
    """A host's name as the DNS has it: A-labels, lower case, no dot at the end."""
    try:
        return normalize_domain(host.rstrip("."))
    except DomainError:
        return host.lower().rstrip(".")


class Ourselves:
    """`names`: this machine's host names, lower case; `listeners`: the addresses that it accepts mail on, `host:port` each."""

    def __init__(self, names: set[str], listeners: Iterable[str] = ()) -> None:
        self.names = names
        self._exact: set[tuple[str, int]] = set()
        self._any: set[tuple[int, int]] = set()  # (IP version, port) of listeners on all addresses
        for listener in listeners:
            host, port = parse_hostport(listener)
            address = _plain(host)
            if address is None:  # a name: which addresses it has is not known here
                self._any |= {(4, port), (6, port)}
            elif address.is_unspecified:
                self._any.add((address.version, port))
            else:
                self._exact.add((str(address), port))

    @classmethod
    def of(cls, config: Config) -> "Ourselves":
        """This machine as a configuration has it: the names that it gives itself, and its listeners."""
        given = [config.hostname, *(source.hostname for source in config.source)]
        return cls({_name(name) for name in given if name}, [listener.address for listener in config.listener])

    def at(self, address: str, port: int) -> bool:
        """Whether a connection to this IP address and port would reach one of our listeners. OSError: as of `is_local`."""
        known = _plain(address)
        if known is None:
            return False
        if known.is_unspecified:  # connects to the loopback address
            known = ipaddress.ip_address("127.0.0.1" if known.version == 4 else "::1")
        return (str(known), port) in self._exact or ((known.version, port) in self._any and is_local(str(known)))

    def is_exchange(self, address: str, port: int) -> bool:
        """Whether a mail exchanger at this address and port is this machine: `at`, or the loopback address and the port of SMTP,
        where no other domain's mail can be (Postfix, too, takes its own addresses for a loop on this port only). OSError: as of
        `is_local`."""
        known = _plain(address)
        return self.at(address, port) or (port == SMTP_PORT and known is not None and (known.is_loopback or known.is_unspecified))

    def greeted(self, name: str) -> bool:
        """Whether the name that a peer gives in its reply to EHLO is one of ours. A name without a dot, and those of localhost,
        many hosts give."""
        found = _name(name)
        return found in self.names and "." in found and not found.startswith("localhost.")
