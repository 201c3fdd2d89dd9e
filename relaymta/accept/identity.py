"""Who has logged in."""

from typing import NamedTuple

__all__ = ["Identity", "Unavailable"]


class Unavailable(Exception):
    """Nobody can say now who somebody is; str() is the reason."""


class Identity(NamedTuple):
    """Somebody who has logged in, and what holds for their mail ("" where the listener or network decides)."""

    name: str
    application: str = ""
    priority: str = ""
    senders: tuple[str, ...] = ()

    def may_send_as(self, address: str) -> bool:
        """Whether an address is one of `senders`."""
        lower = address.lower()
        domain = lower.rpartition("@")[2]
        return not self.senders or any(
            lower == own or own == "@" + domain or (own.startswith("@.") and domain.endswith(own[1:])) for own in self.senders
        )
