"""The words of the suppression list: reasons, and the form of its addresses."""

from typing import Final

from relaymta.proto.address import compared, plain

__all__ = ["REASONS", "listed", "listed_application", "shown_reason"]

REASONS: Final = ("hard-bounce", "complaint", "unsubscribe", "manual")  # their positions are stored
APPLICATION_MOST: Final = 300  # octets of a name: keys of LMDB have 511
_NOT_IN_NAMES: Final = frozenset("\0\r\n")
_SHOWN: Final = {"hard-bounce": "hard bounce", "unsubscribe": "unsubscribed", "manual": "by hand"}


def shown_reason(reason: str) -> str:
    """A reason in a sentence."""
    return _SHOWN.get(reason, reason)


def listed(address: str) -> str:
    """An address as it is in the list: in the form in which addresses are compared. ValueError: it is none, or has characters
    that nobody can see, such as U+200B and U+00A0: what is copied has them at times, and no mailbox."""
    found = plain(address)
    if found is None:
        raise ValueError(f"{address[:300]!r} is not an address")
    found = compared(found)
    if not found.isprintable():
        raise ValueError(f"{address[:300]!r} is not an address: it has characters that cannot be seen")
    return found


def listed_application(name: str) -> str:
    """The name of an application of whose mail alone an entry is. ValueError: none can have such an entry."""
    if not _NOT_IN_NAMES.isdisjoint(name) or len(name.encode("utf-8", "replace")) > APPLICATION_MOST:
        raise ValueError(
            f"the name of an application in the list has no NUL and no line end, at most {APPLICATION_MOST} octets: {name[:60]!r}"
        )
    return name
