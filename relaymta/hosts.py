"""What this machine knows of host names beside the DNS: numbers, localhost, /etc/hosts, and the search list of resolv.conf."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from relaymta.errors import is_scarce

__all__ = ["HOSTS", "RESOLV_CONF", "Hosts", "Stamp", "numeric", "stamp"]

HOSTS = "/etc/hosts"
RESOLV_CONF = "/etc/resolv.conf"
LARGEST = 4 << 20  # octets of a file that are read
MOST_SEARCHED = 8  # domains of a search list
LOOPBACK = {"6": "::1", "4": "127.0.0.1"}

Stamp = tuple[int, int, int] | None


def numeric(host: str) -> str | None:
    """The address that a host given by number has: in any form that inet_aton(3) and inet_pton(3) read ("127.1", "::1"), also in
    the brackets of a URL. None: it is a name."""
    if not host or not (host[0].isdigit() or ":" in host):
        return None
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    address = str(found[0][4][0])
    return address + host[host.index("%") :] if "%" in host and "%" not in address else address


def stamp(path: str) -> Stamp:
    """What distinguishes a version of a file from others; None: it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass(frozen=True, slots=True)
class _Search:
    """resolv.conf(5): a name with fewer dots than `ndots` is searched for below `domains` first, others afterwards."""

    domains: tuple[str, ...] = ()
    ndots: int = 1


class Hosts:
    """The files are read again when they have changed, which is looked at whenever they are used. What cannot be read is as if it
    were empty; without a descriptor to read it, both methods end with OSError."""

    def __init__(self, hosts: str = "", resolv_conf: str = "") -> None:
        self._hosts = hosts or HOSTS
        self._resolv_conf = resolv_conf or RESOLV_CONF
        self._stamps: dict[str, Stamp] = {}
        self._names: dict[str, list[str]] = {}
        self._search = _Search()

    def addresses(self, host: str, families: str) -> list[str]:
        """The addresses of a name in /etc/hosts, in the order of `families` (as of `dns.Resolver.addresses`); those of localhost
        and names below it, also where they are not listed (RFC 6761 6.3). Empty: ask the DNS."""
        lines = self._changed(self._hosts)
        if lines is not None:
            self._names = _names(lines)
        name = host.lower().rstrip(".")
        found = self._names.get(name, [])
        if not found and (name == "localhost" or name.endswith(".localhost")):
            found = [LOOPBACK[family] for family in families]
        return [address for family in families for address in found if (":" in address) == (family == "6")]

    def candidates(self, host: str) -> list[str]:
        """The names to ask the DNS for, in order, as the search list has it. A name that ends with a dot is complete."""
        if host.endswith("."):
            return [host.rstrip(".")]
        lines = self._changed(self._resolv_conf)
        if lines is not None:
            self._search = _search(lines)
        longer = [f"{host}.{domain}" for domain in self._search.domains]
        return [host, *longer] if host.count(".") >= self._search.ndots else [*longer, host]

    def _changed(self, path: str) -> list[list[str]] | None:
        """What `_read` finds in a file that has changed; None: it has not. OSError: it has, and no descriptor is left."""
        now = stamp(path)
        if path in self._stamps and self._stamps[path] == now:
            return None
        lines = _read(path)
        self._stamps[path] = now
        return lines


def _read(path: str) -> list[list[str]]:
    """The words of each line, without comments; none of a file that cannot be read. OSError: no descriptor is left for it."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST).decode("utf-8", "replace")
    except OSError as error:
        if is_scarce(error):
            raise
        return []
    return [line.partition("#")[0].split() for line in text.splitlines()]


def _names(lines: list[list[str]]) -> dict[str, list[str]]:
    """hosts(5): the addresses of each name, lower case."""
    found: dict[str, list[str]] = {}
    for address, *names in filter(None, lines):
        number = numeric(address)
        for name in names if number is not None else ():
            known = found.setdefault(name.lower().rstrip("."), [])
            if number is not None and number not in known:
                known.append(number)
    return found


def _search(lines: list[list[str]]) -> _Search:
    domains: list[str] = []
    ndots = 1
    for word, *values in filter(None, lines):
        if word in ("search", "domain"):  # the last one counts
            domains = [value.rstrip(".") for value in values if value.strip(".")][:MOST_SEARCHED]
        elif word == "options":
            given = [value.removeprefix("ndots:") for value in values if value.startswith("ndots:")]
            ndots = next((min(int(text), 15) for text in given if text.isascii() and text.isdigit()), ndots)
    return _Search(tuple(domains), ndots)
