"""The ready list of a site: entries in the order of delivery, by class, with weighted round-robin between tenants and
round-robin between their queues.

A higher class goes first, but one of every TURNS messages is of the next lower class that waits, so that no class starves.
Within a class the tenants (applications) take turns, each with as many messages as its weight; within a tenant its queues do.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from relaymta.proto.envelope import CLASSES
from relaymta.queue import Entry
from relaymta.queue.lifecycle import WAITING

__all__ = ["Ready"]

TURNS = 10


class _Tenant:
    """One tenant's queues in one class, each a line of entries."""

    __slots__ = ("lines", "order", "turn")

    def __init__(self) -> None:
        self.lines: dict[int, deque[Entry]] = {}
        self.order: deque[int] = deque()  # the queues that have a line, the next one first
        self.turn = 0  # messages taken in its present turn


class _Class:
    """One class: round-robin between its tenants."""

    __slots__ = ("order", "tenants", "weights")

    def __init__(self, weights: Mapping[str, int]) -> None:
        self.weights = weights
        self.tenants: dict[str, _Tenant] = {}
        self.order: deque[str] = deque()

    def push(self, entry: Entry, first: bool) -> None:
        name = entry.name.application
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant()
            self.order.appendleft(name) if first else self.order.append(name)
        line = tenant.lines.get(entry.queue)
        if line is None:
            line = tenant.lines[entry.queue] = deque()
            tenant.order.appendleft(entry.queue) if first else tenant.order.append(entry.queue)
        line.appendleft(entry) if first else line.append(entry)

    def head(self) -> Entry:
        tenant = self.tenants[self.order[0]]
        return tenant.lines[tenant.order[0]][0]

    def pop(self) -> Entry:
        """Take the head; its queue moves to the end of the tenant's order, and its tenant to the end when its turn is over."""
        name, tenant = self.order[0], self.tenants[self.order[0]]
        number = tenant.order[0]
        entry = tenant.lines[number].popleft()
        tenant.order.rotate(-1)
        tenant.turn += 1
        if tenant.turn >= self.weights.get(name, 1):
            tenant.turn = 0
            self.order.rotate(-1)
        self._tidy(name, tenant, number)
        return entry

    def remove(self, entry: Entry) -> bool:
        """Take one entry out; whether it was there."""
        name = entry.name.application
        tenant = self.tenants.get(name)
        line = tenant.lines.get(entry.queue) if tenant is not None else None
        if tenant is None or line is None or entry not in line:
            return False
        line.remove(entry)
        self._tidy(name, tenant, entry.queue)
        return True

    def copy(self) -> "_Class":
        """A copy with the same entries in the same order."""
        other = _Class(self.weights)
        other.order = self.order.copy()
        for name, tenant in self.tenants.items():
            other.tenants[name] = made = _Tenant()
            made.order, made.turn = tenant.order.copy(), tenant.turn
            made.lines = {number: line.copy() for number, line in tenant.lines.items()}
        return other

    def _tidy(self, name: str, tenant: _Tenant, number: int) -> None:
        """Remove a line, and a tenant, that has become empty."""
        if not tenant.lines[number]:
            del tenant.lines[number]
            tenant.order.remove(number)
        if not tenant.order:
            del self.tenants[name]
            self.order.remove(name)

    def __iter__(self) -> Iterator[Entry]:
        for tenant in self.tenants.values():
            for line in tenant.lines.values():
                yield from line


class Ready:
    """The entries that wait for one site. Those that do not wait any more (they were claimed) are dropped by
    `head`. `weights`: messages in a tenant's turn, where it
    is not one."""

    __slots__ = ("_classes", "_count", "_picked", "_turn", "weights")

    def __init__(self, weights: Mapping[str, int] | None = None) -> None:
        self.weights: Mapping[str, int] = weights or {}
        self._classes: list[_Class | None] = [None] * len(CLASSES)
        self._count = 0
        self._turn = 0
        self._picked: _Class | None = None  # the class whose head `head` returned

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in no particular order."""
        for one in self._classes:
            if one is not None:
                yield from one

    def push(self, entry: Entry, first: bool = False) -> None:
        """Add an entry; `first`: in front of all of its tenant's."""
        rank = CLASSES.get(entry.name.priority, CLASSES["normal"])
        one = self._classes[rank]
        if one is None:
            one = self._classes[rank] = _Class(self.weights)
        one.push(entry, first)
        self._count += 1
        self._picked = None

    def highest(self) -> int:
        """The highest class that waits, counted from 1; 0 when nothing does."""
        for rank, one in enumerate(self._classes):
            if one is not None and one.order:
                return len(CLASSES) - rank
        return 0

    def tenants(self) -> list[str]:
        """The tenants in the highest class that waits, the next one first."""
        return next((list(one.order) for one in self._classes if one is not None and one.order), [])

    def prefer(self, wanted: Callable[[str], bool]) -> None:
        """In the highest class that waits, give the next turn to the first tenant for which `wanted(name)` holds, if any."""
        one = next((one for one in self._classes if one is not None and one.order), None)
        name = next((name for name in one.order if wanted(name)), None) if one is not None else None
        if one is not None and name is not None:
            one.order.remove(name)
            one.order.appendleft(name)
            self._picked = None

    def head(self) -> Entry | None:
        """The next entry; None when nothing waits. The same one until `pop`, `push`, `prefer` or `remove`."""
        while self._count:
            picked = self._picked
            if picked is None:
                picked = self._picked = self._choose()
            entry = picked.head()
            if entry.state == WAITING:
                return entry
            self._take(picked)
        return None

    def pop(self) -> Entry:
        """Take the entry that `head` returned."""
        picked = self._picked
        assert picked is not None
        self._turn = (self._turn + 1) % TURNS
        return self._take(picked)

    def _take(self, one: _Class) -> Entry:
        self._picked = None
        self._count -= 1
        return one.pop()

    def _choose(self) -> _Class:
        waiting = [one for one in self._classes if one is not None and one.order]
        return waiting[1] if self._turn == TURNS - 1 and len(waiting) > 1 else waiting[0]

    def remove(self, entry: Entry) -> bool:
        """Take one entry out, wherever it waits; whether it was there."""
        for one in self._classes:
            if one is not None and one.remove(entry):
                self._count -= 1
                self._picked = None
                return True
        return False

    def position(self, entry: Entry, most: int) -> int:
        """The number of entries before this one: exact up to `most`, `most` for more; -1 when it does not wait here. Found by
        popping entries from a copy."""
        if entry not in self:
            return -1
        other = Ready(self.weights)
        other._classes = [None if one is None else one.copy() for one in self._classes]
        other._count, other._turn = self._count, self._turn
        for ahead in range(most):
            head = other.head()
            if head is entry:
                return ahead
            if head is None:  # the entry was claimed: `head` has dropped it
                return -1
            other.pop()
        return most

    def take_all(self) -> list[Entry]:
        """Empty the list; returns its entries in order, without claimed ones."""
        found = []
        while self.head() is not None:
            found.append(self.pop())
        return found

    def first(self, count: int) -> list[Entry]:
        """Up to `count` entries: the head, and others in approximate order."""
        found = []
        for entry in self:
            if entry.state == WAITING:
                found.append(entry)
                if len(found) == count:
                    break
        head = self.head()
        return found if head is None or head in found else [head, *found[: count - 1]]
