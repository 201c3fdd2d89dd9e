"""Recipients whose mail is kept here."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from relaymta.proto.said import Reply

__all__ = ["Landed", "LocalRecipients"]


class Landed(Protocol):
    """What has become of a message for one recipient: the reply, the users in whose mailboxes it is, and the addresses to which
    it is to go by way of the queue (see store.deliver)."""

    @property
    def reply(self) -> Reply: ...

    @property
    def users(self) -> list[str]: ...

    @property
    def rest(self) -> list[str]: ...


class LocalRecipients(NamedTuple):
    """What the mailboxes say of them; the worker hands it over, since accept/ does not know the store. `refusal(address, size)`:
    why an address gets no message of so many octets (0: unknown), None: it does. `expanded(recipients, kept_here)`: a message's
    recipients, with aliases of addresses elsewhere replaced by these; `kept_here(address)`: whether its mail is kept here.
    `file(sender, recipients, data, done)`: files a message, whoever waits for it; `done(landed)` is called once, with what has
    become of it for each recipient, or with an exception."""

    refusal: Callable[[str, int], Reply | None]
    expanded: Callable[[list[str], Callable[[str], bool]], list[str]]
    file: Callable[[str, list[str], list[bytes], Callable[[Sequence[Landed] | Exception], None]], None]
