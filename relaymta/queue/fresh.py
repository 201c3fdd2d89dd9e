"""Fresh mail: what one group commit takes in stands in a few rows together, until each message has left or has to wait.

    fresh  first id  [[id, Envelope], ...]  the messages of a group, or as many as a row holds
    ended  first id  bits                   which of them have ended since, or were unfolded

Most mail is delivered within milliseconds, from memory. Three rows for each message, made and removed one by one, would
cost it more than anything else the queue does (each call of LMDB's gives the interpreter up and has to win it back); so a
group is one row, an end is a bit beside it, and both rows go with the last member. What is not delivered at the first go
is *unfolded*: it gets the rows of its own that store.py describes. A message stands in one of the two forms, never in both.
"""

from typing import Any

import msgspec

from relaymta.proto.envelope import Envelope, encode

__all__ = ["MOST_RECIPIENTS", "Fresh"]

MOST_RECIPIENTS = 10  # of a message that is folded: rows stay small
# Octets of one row. LMDB keeps up to about 2,000 within a page; what is longer takes pages of its own, side by side, and in a
# file that once held a large queue those are long sought for (after 1,000,000 messages all mail cost 1.35 to 1.4 x as much CPU
# as before with long rows, 1.13 to 1.2 x with short ones; two runs of each, on a machine with other work).
ROW_OCTETS = 1900

_decode = msgspec.msgpack.Decoder(list[tuple[int, Envelope]]).decode


class Group:
    """One row: its key, its members, the bits of those that have ended, and when it came (ms of the queue's clock)."""

    __slots__ = ("born", "ended", "key", "members")

    def __init__(self, key: bytes, members: list[tuple[int, Envelope]], ended: int, born: int) -> None:
        self.key = key
        self.members = members
        self.ended = ended
        self.born = born


class Fresh:
    """The two tables, and what they say in memory. `get`, `live`, `oldest` and `came_by` may be called from any thread and tell
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
        """Read what the last process left."""
        for key, value in txn.cursor(db=self._fresh):
            members = _decode(value)
            raw = txn.get(key, db=self._ended)
            group = Group(key, members, int.from_bytes(raw, "little") if raw else 0, now)
            self._register(group)

    def _register(self, group: Group) -> None:
        self._groups[group.key] = group
        for position, (ident, _) in enumerate(group.members):
            if not group.ended >> position & 1:
                self._where[ident] = (group, position)

    def __len__(self) -> int:
        return len(self._where)

    def get(self, ident: int) -> Envelope | None:
        """A folded message's envelope."""
        found = self._where.get(ident)
        return None if found is None else found[0].members[found[1]][1]

    def live(self) -> list[tuple[int, Envelope]]:
        """All folded messages, by id."""
        return sorted((ident, group.members[position][1]) for ident, (group, position) in self._where.copy().items())

    def oldest(self) -> int:
        """When the oldest group came; 0 when there is none."""
        for group in self._groups.copy().values():
            return group.born
        return 0

    def came_by(self, born: int) -> list[int]:
        """The messages of the groups that came up to a moment of the queue's clock."""
        return [ident for ident, (group, _) in self._where.copy().items() if group.born <= born]

    # In a transaction

    def queues(self) -> set[int]:
        """The numbers of the queues in which folded messages wait, those that this transaction adds included."""
        groups = [*self._groups.values(), *(group for group, _ in self._added)]
        return {placement.queue for group in groups for _, envelope in group.members for placement in envelope.placements}

    def ending(self) -> dict[Group, int]:
        """What this transaction has ended so far, for `end_only`."""
        return self._ending.copy()

    def end_only(self, ending: dict[Group, int]) -> None:
        """Nothing ends in this transaction but what `ending` told before."""
        self._ending = ending

    def add(self, members: list[tuple[int, Envelope]], now: int) -> None:
        """Fold new messages, as many into a row as it holds."""
        row: list[tuple[int, Envelope]] = []
        texts: list[bytes] = []
        octets = 0
        for member in members:
            text = encode(member)
            if row and octets + len(text) > ROW_OCTETS:
                self._add_row(row, texts, now)
                row, texts, octets = [], [], 0
            row.append(member)
            texts.append(text)
            octets += len(text)
        self._add_row(row, texts, now)

    def _add_row(self, row: list[tuple[int, Envelope]], texts: list[bytes], now: int) -> None:
        group = Group(row[0][0].to_bytes(8, "big"), row, 0, now)
        self._added.append((group, b"\xdc" + len(texts).to_bytes(2, "big") + b"".join(texts)))  # a msgpack array

    def end(self, ident: int) -> Envelope | None:
        """A message leaves its group; its envelope, None when it is not (or no longer) folded."""
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
        """Put what was gathered into the transaction."""
        for group, text in self._added:
            txn.put(group.key, text, db=self._fresh)
        for group, bits in self._ending.items():
            ended = group.ended | bits
            if ended.bit_count() < len(group.members):
                txn.put(group.key, ended.to_bytes((len(group.members) + 7) // 8, "little"), db=self._ended)
                continue
            txn.delete(group.key, db=self._fresh)
            if group.ended:
                txn.delete(group.key, db=self._ended)

    def settle(self) -> None:
        """The commit has returned."""
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
        """The commit failed: what was gathered is as if it had never been."""
        self._added = []
        self._ending = {}
