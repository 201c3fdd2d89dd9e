"""The UIDs of a selected mailbox in the order of their message numbers, and sequence sets of either (RFC 9051 2.3.1, 9)."""

from collections.abc import Hashable
from weakref import WeakValueDictionary

from relaymta.proto.imap_command import Numbers
from relaymta.proto.imap_records import cut, lower, ranges_of

__all__ = ["NoSuchNumber", "Shared", "Uids"]


class NoSuchNumber(ValueError):
    """A message number beyond the number of messages that the client was told: BAD (RFC 9051 9, seq-number)."""


class Uids:
    """An array of UIDs, which never changes. `data`: packed; `version`: the last HIGHESTMODSEQ at which it was seen to be the
    mailbox's (0: it is of one session, which holds back EXPUNGE)."""

    __slots__ = ("__weakref__", "data", "version")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.version = 0

    def __len__(self) -> int:
        return len(self.data) // 4

    def uid(self, number: int) -> int:
        """The UID of a message by its number, from 1 on."""
        return int.from_bytes(self.data[number * 4 - 4 : number * 4], "little")

    def number(self, uid: int) -> int:
        """The number of a message by its UID; 0 when it is not there."""
        at = lower(self.data, uid)
        return at + 1 if self.data[at * 4 : at * 4 + 4] == uid.to_bytes(4, "little") else 0

    @property
    def last(self) -> int:
        """The highest UID; 0 when there is none."""
        return self.uid(len(self)) if self.data else 0

    def of_uids(self, chosen: Numbers) -> bytes:
        """Packed ranges of UIDs; "*" is the highest UID. UIDs that are not there are no error."""
        return ranges_of(chosen.ranges if chosen.star is None else chosen.resolved(self.last))

    def of_numbers(self, chosen: Numbers) -> bytes:
        """Packed ranges of the UIDs that messages have by their numbers; "*" is the highest number, and names nothing where there
        is no message. NoSuchNumber."""
        ranges = chosen.resolved(len(self))
        if ranges and ranges[-1][1] > len(self):
            raise NoSuchNumber("no such message number")
        return ranges_of((self.uid(low), self.uid(high)) for low, high in ranges)

    def cut(self, ranges: bytes) -> bytes:
        """The UIDs within packed ranges, packed."""
        return cut(self.data, ranges)


class Shared:
    """The arrays that sessions of one worker use: those whose mailbox is at the same version (HIGHESTMODSEQ) share one, which
    goes with the last of them. A mailbox's key (of the caller's) must never come back for another mailbox."""

    def __init__(self) -> None:
        self._newest: WeakValueDictionary[Hashable, Uids] = WeakValueDictionary()

    def get(self, mailbox: Hashable, modseq: int) -> Uids | None:
        """The array of a mailbox at a version, if that is the newest that a session has seen."""
        uids = self._newest.get(mailbox)
        return uids if uids is not None and uids.version == modseq else None

    def keep(self, mailbox: Hashable, modseq: int, uids: Uids) -> Uids:
        """Share the array of a mailbox at a version; the one to use."""
        there = self._newest.get(mailbox)
        if there is not None and there.version >= modseq:
            return there if there.version == modseq else uids
        uids.version = modseq
        self._newest[mailbox] = uids
        return uids

    def __len__(self) -> int:
        return len(self._newest)

    @property
    def octets(self) -> int:
        """The memory of the arrays that are shared."""
        return sum(len(uids.data) for uids in list(self._newest.values()))
