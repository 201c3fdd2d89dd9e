"""Mail that stays: the mailboxes of local users."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from relaymta.config.values import Reload, Size, Table
from relaymta.errors import near
from relaymta.proto.imap_capability import HIDEABLE

__all__ = ["Imap", "Mailboxes"]

SPECIAL = {
    "Drafts": "\\Drafts", "Sent": "\\Sent", "Junk": "\\Junk", "Trash": "\\Trash", "Archive": "\\Archive",
}  # fmt: skip
_USES = {"\\All", "\\Archive", "\\Drafts", "\\Flagged", "\\Junk", "\\Sent", "\\Trash"}  # RFC 6154 2


class Mailboxes(Table):
    """Mailboxes of local users. `[mailboxes]`; a route with `protocol = "mailbox"` says which mail is for them."""

    subaddress: Reload[str] = Field("+", description='separates a detail in local parts: "ann+detail"; empty: there are none')
    quota: Reload[Size] = Field(0, description='octets of a user without a quota of their own, such as "5G"; 0: any')
    messages: Reload[int] = Field(0, ge=0, description="messages of a user without a quota of their own; 0: any")
    over_quota: Reload[Literal["defer", "refuse"]] = Field(
        "defer", description="mail for a user whose quota is used up; defer: 452 4.2.2, tried again; refuse: 552 5.2.2"
    )
    special: Reload[dict[str, str]] = Field(
        SPECIAL, description='mailboxes of a new user beside INBOX, and their special use (RFC 6154), "" for none'
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(self.subaddress) > 1:
            yield "subaddress", f"{self.subaddress!r}: one character, or none"
        elif self.subaddress and (self.subaddress in '@"\\()<>,;:[] .' or not self.subaddress.isascii()):
            yield "subaddress", f"{self.subaddress!r} cannot be in a local part"
        for name, use in self.special.items():
            if not name or name.upper() == "INBOX" or "/" in name or not name.isprintable() or len(name.encode()) > 255:
                yield f"special.{name}", f"{name!r} cannot be the name of a mailbox here"
            if use and use not in _USES:
                yield f"special.{name}", f"{use!r} is no special use ({', '.join(sorted(_USES))})"


class Imap(Table):
    """What is offered to IMAP clients. `[imap]`"""

    hide: Reload[list[str]] = Field(
        [], description='capabilities that are not offered, for a client that fails on one, such as "QRESYNC"'
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in self.hide:
            if name not in HIDEABLE:
                yield "hide", f"{name!r} is no capability that can be hidden{near(name, HIDEABLE)}"
