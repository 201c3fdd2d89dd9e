"""Identities: an authenticated user, and the address groups by which clients are counted."""

import ipaddress
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

from relaymta.proto.address import in_a_labels

__all__ = ["QUOTAS", "Identity", "MailUser", "Unavailable", "folded", "group_of", "plain_address", "possible", "wider_group_of"]

QUOTAS = ("messages", "recipients", "octets")  # the kinds of an account's quotas
SENDERS_KEPT = 4096
_NOT_LOCAL = re.compile(r"[@\s]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Unavailable(Exception):
    """An authentication back end gave no usable answer; str() is the reason."""


class Identity(NamedTuple):
    """An authenticated user, and what applies to their mail ("" where the listener or network decides)."""

    name: str
    application: str = ""
    priority: str = ""
    senders: tuple[str, ...] = ()
    quotas: dict[str, str] = {}  # noqa: RUF012 (of a tuple, never changed)
    hold: bool = False  # hold messages above a quota instead of rejecting them
    connections: int = 0  # connections at the same time; 0: no limit
    said_by: str = "senders of its account"  # what says `senders`
    unsure: bool = False  # the directory of users may know more later: what `senders` does not allow is refused for now

    def may_send_as(self, address: str) -> bool:
        """Whether `senders` allows an address, its domain in U-labels or A-labels. A malformed address is not allowed."""
        if not self.senders:
            return True
        local, _, domain = address.lower().rpartition("@")
        if not local or (_NOT_LOCAL.search(local) and not (local[0] == local[-1] == '"')):
            return False
        domain = in_a_labels(domain)
        return any(
            own in (f"{local}@{domain}", f"@{domain}") or (own.startswith("@.") and domain.endswith(own[1:]))
            for own in map(_comparable, self.senders)
        )


class MailUser(NamedTuple):
    """A user whose mail is kept here, as one who logs in. `secret`: as of `auth.passwords`, "": a back end knows it; `active`:
    false for one who may not log in; `senders`: the user's addresses."""

    name: str
    secret: str
    active: bool
    senders: tuple[str, ...]


@lru_cache(SENDERS_KEPT)
def _comparable(sender: str) -> str:
    """An address, `@domain` or `@.domain` of `senders` in lower case, its domain in A-labels."""
    local, _, domain = sender.lower().rpartition("@")
    dot = "." * domain.startswith(".")
    return f"{local}@{dot}{in_a_labels(domain.removeprefix('.'))}"


def plain_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address as the system or a protocol gives it, without its scope; an IPv4-mapped IPv6 address (RFC 4291 2.5.5.2) as IPv4.
    ValueError: it is none."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def group_of(address: str) -> str:
    """The group that counts as one client: an IPv4 address, or an IPv6 /64, which one host may have."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def wider_group_of(address: str) -> str:
    """The wider group that may be one client: an IPv6 /48, the usual prefix of a site; "" for IPv4."""
    parsed = ipaddress.ip_address(address)
    return str(ipaddress.ip_network((parsed, 48), strict=False)) if isinstance(parsed, ipaddress.IPv6Address) else ""


def possible(name: str) -> bool:
    """Whether a user name is valid: not empty, and without control characters, which logs and replies would contain."""
    return bool(name) and not _CONTROL.search(name)


def folded(name: str) -> str:
    """A user name normalized as a back end may do it: without regard to case, width and surrounding blanks."""
    return unicodedata.normalize("NFKC", name).casefold().strip()
