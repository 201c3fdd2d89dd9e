"""Inlined messages: the fresh mail of one group commit shares a few rows until each message has left or is materialized.

    fresh  first id  [[id, Envelope], ...]  the messages of a group commit, or as many as a row holds
    ended  first id  bits                   which of them have ended since, or were materialized

Most mail is delivered within milliseconds, from memory. Three rows for each message, added and deleted one by one, would cost
more than anything else the queue does (each call of LMDB releases the GIL and has to acquire it again). So a group is one row,
the end of a message is a bit beside it, and both rows are deleted with the last member. What is not delivered by the first
attempt is *materialized*: it gets rows of its own (store.py). Invariant: in each committed state a message has one of the two
forms, never both and never neither.
"""

from typing import Any

import msgspec

from relaymta.proto.envelope import Envelope, encode

__all__ = ["MOST_RECIPIENTS", "Fresh", "inlined"]

MOST_RECIPIENTS = 10  # of an inlined message, so that rows stay small
# Octets of one row. LMDB keeps up to about 2,000 within a page; a longer row takes adjacent pages of its own, and in a file that
# once held a large queue the search for those is slow (after 1,000,000 messages all mail cost 1.35 to 1.4 x as much CPU as
# before with long rows, 1.13 to 1.2 x with short ones; two runs of each, on a machine with other work).
ROW_OCTETS = 1900

_decode = msgspec.msgpack.Decoder(list[tuple[int, Envelope]]).decode


def inlined(txn: Any, tables: dict[str, Any], ident: int) -> Envelope | None:
    """As `Fresh.get`, read from the tables, as another process has to."""
    for key, value in txn.cursor(db=tables["fresh"]):
        if int.from_bytes(key, "big") > ident:
            return None
        for position, (member, envelope) in enumerate(_decode(value)):
            if member == ident:
                ended = int.from_bytes(txn.get(key, db=tables["ended"]) or b"", "little")
                return None if ended >> position & 1 else envelope
    return None


class Group:
    """One row: its key, its members, the bits of those that have ended, and when it was added (ms of the queue's clock)."""

    __slots__ = ("born", "ended", "key", "members")

    def __init__(self, key: bytes, members: list[tuple[int, Envelope]], ended: int, born: int) -> None:
        self.key = key
        self.members = members
        self.ended = ended
        self.born = born


class Fresh:
    """The two tables, and their content in memory. `get`, `live`, `oldest` and `came_by` may be called from any thread and return
    what is committed; everything else belongs to the writer thread, inside a transaction: `add` and `end`, then `write`,
    and `settle` when the commit has returned or `forget` when it failed (`end_only` when a part of it is undone)."""

    def __init__(self, fresh: Any, ended: Any) -> None:
        """The tables' handles."""
        self._fresh = fresh
        self._ended = ended
        self._where: dict[int, tuple[Group, int]] = {}  # message -> its group and bit
        self._groups: dict[bytes, Group] = {}
        self._added: list[tuple[Group, bytes]] = []
        self._ending: dict[Group, int] = {}

    def load(self, txn: Any, now: int) -> None:
        """Read the rows that the previous process left. `now`: counts as the time they were added."""
        for key, value in txn.cursor(db=self._fresh):
            members = _decode(value)
            raw = txn.get(key, db=self._ended)
            group = Group(key, members, int.from_bytes(raw, "little") if raw else 0, now)
            self._register(group)

    def _register(self, group: Group) -> None:
        """Make a committed group visible to `get` and `live`."""
        self._groups[group.key] = group
        for position, (ident, _) in enumerate(group.members):
            if not group.ended >> position & 1:
                self._where[ident] = (group, position)

    def __len__(self) -> int:
        return len(self._where)

    def get(self, ident: int) -> Envelope | None:
        """An inlined message's envelope; None when it is not inlined."""
        found = self._where.get(ident)
        return None if found is None else found[0].members[found[1]][1]

    def live(self) -> list[tuple[int, Envelope]]:
        """(id, envelope) of all inlined messages, by id."""
        return sorted((ident, group.members[position][1]) for ident, (group, position) in self._where.copy().items())

    def oldest(self) -> int:
        """When the oldest group was added; 0 when there is none."""
        for group in self._groups.copy().values():
            return group.born
        return 0

    def came_by(self, born: int) -> list[int]:
        """The ids of the messages in groups added up to a time of the queue's clock."""
        return [ident for ident, (group, _) in self._where.copy().items() if group.born <= born]

    # In a transaction

    def queues(self) -> set[int]:
        """The numbers of the queues in which inlined messages wait, those that this transaction adds included."""
        groups = [*self._groups.values(), *(group for group, _ in self._added)]
        return {placement.queue for group in groups for _, envelope in group.members for placement in envelope.placements}

    def is_ending(self, ident: int) -> bool:
        """Whether this transaction has ended the inlined form of a message."""
        found = self._where.get(ident)
        return found is not None and bool(self._ending.get(found[0], 0) >> found[1] & 1)

    def ending(self) -> dict[Group, int]:
        """The bits that this transaction has set so far, for `end_only`."""
        return self._ending.copy()

    def end_only(self, ending: dict[Group, int]) -> None:
        """Undo the ends of a part: back to what `ending` returned before it."""
        self._ending = ending

    def add(self, members: list[tuple[int, Envelope]], now: int) -> None:
        """Inline new messages, as many into a row as it holds. `now`: ms of the queue's clock."""
        row: list[tuple[int, Envelope]] = []
        encoded: list[bytes] = []
        octets = 0
        for member in members:
            value = encode(member)
            if row and octets + len(value) > ROW_OCTETS:
                self._add_row(row, encoded, now)
                row, encoded, octets = [], [], 0
            row.append(member)
            encoded.append(value)
            octets += len(value)
        self._add_row(row, encoded, now)

    def _add_row(self, row: list[tuple[int, Envelope]], encoded: list[bytes], now: int) -> None:
        group = Group(row[0][0].to_bytes(8, "big"), row, 0, now)
        self._added.append((group, b"\xdc" + len(encoded).to_bytes(2, "big") + b"".join(encoded)))  # a msgpack array

    def end(self, ident: int) -> Envelope | None:
        """End the inlined form of a message and return its envelope; None when it is not (or no longer) inlined."""
        found = self._where.get(ident)
        if found is None:
            return None
        group, position = found
        bits = self._ending.get(group, 0)
        if bits >> position & 1:
            return None
        self._ending[group] = bits | 1 << position
        return group.members[position][1]

    def write(self, txn: Any) -> None:
        """Write what was added and ended into the transaction."""
        for group, value in self._added:
            txn.put(group.key, value, db=self._fresh)
        for group, bits in self._ending.items():
            ended = group.ended | bits
            if ended.bit_count() < len(group.members):
                txn.put(group.key, ended.to_bytes((len(group.members) + 7) // 8, "little"), db=self._ended)
                continue
            txn.delete(group.key, db=self._fresh)
            if group.ended:
                txn.delete(group.key, db=self._ended)

    def settle(self) -> None:
        """The commit has returned: make its changes visible in memory."""
        for group, _ in self._added:
            self._register(group)
        for group, bits in self._ending.items():
            group.ended |= bits
            for position, (ident, _) in enumerate(group.members):
                if bits >> position & 1:
                    del self._where[ident]
            if group.ended.bit_count() == len(group.members):
                del self._groups[group.key]
        self.forget()

    def forget(self) -> None:
        """Drop what was added and ended since the last commit; called when the commit failed."""
        self._added = []
        self._ending = {}
