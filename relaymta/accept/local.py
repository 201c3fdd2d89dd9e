"""Recipients whose mail is kept here."""

from collections.abc import Callable
from typing import NamedTuple

from relaymta.proto.said import Reply

__all__ = ["LocalRecipients"]


class LocalRecipients(NamedTuple):
    """What the mailboxes say of them; the worker hands it over, since accept/ does not know the store. `refusal(address)`: why an
    address gets no mail, None: it does. `expanded(recipients, kept_here)`: a message's recipients, with aliases of addresses
    elsewhere replaced by these; `kept_here(address)`: whether its mail is kept here."""

    refusal: Callable[[str], Reply | None]
    expanded: Callable[[list[str], Callable[[str], bool]], list[str]]
