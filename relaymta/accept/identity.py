"""Who somebody is: by their login, or by the network they come from."""

import ipaddress
import re
import unicodedata
from typing import NamedTuple

__all__ = ["Identity", "Unavailable", "folded", "group_of", "possible", "wider_group_of"]


_NOT_LOCAL = re.compile(r"[@\s]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Unavailable(Exception):
    """Nobody can say now who somebody is; str() is the reason."""


class Identity(NamedTuple):
    """Somebody who has logged in, and what holds for their mail ("" where the listener or network decides)."""

    name: str
    application: str = ""
    priority: str = ""
    senders: tuple[str, ...] = ()
    quotas: dict[str, str] = {}  # noqa: RUF012 (of a tuple, never changed)
    hold: bool = False  # what is over a quota
    connections: int = 0  # logged in at the same time; 0: any

    def may_send_as(self, address: str) -> bool:
        """Whether an address is one of `senders`; what is none, is not."""
        if not self.senders:
            return True
        lower = address.lower()
        local, _, domain = lower.rpartition("@")
        if not local or (_NOT_LOCAL.search(local) and not (local[0] == local[-1] == '"')):
            return False
        return any(
            lower == own or own == "@" + domain or (own.startswith("@.") and domain.endswith(own[1:])) for own in self.senders
        )


def group_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 /64, all of which one host may have."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def wider_group_of(address: str) -> str:
    """What may be one client all the same: an IPv6 /48, which a site is given; "" for IPv4."""
    parsed = ipaddress.ip_address(address)
    return str(ipaddress.ip_network((parsed, 48), strict=False)) if isinstance(parsed, ipaddress.IPv6Address) else ""


def possible(name: str) -> bool:
    """Whether that can be somebody's name: there is one, and it has no control characters, which logs and replies would show."""
    return bool(name) and not _CONTROL.search(name)


def folded(name: str) -> str:
    """A user's name without what a back end may overlook: case, width and blanks around it."""
    return unicodedata.normalize("NFKC", name).casefold().strip()
