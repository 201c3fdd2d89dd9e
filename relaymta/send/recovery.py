"""Recovery of what was in flight when the previous worker of this slot died: these messages are *probed*, so that the one that
kills workers is found, and the others are delivered.

Messages for different sites are probed side by side, one at each site, so that a silent peer delays only its own. The ids under
way survive in shared memory (shm.InFlight). If the worker dies again and nothing but one probed message was in flight, that is
the culprit. If more was, the messages probed then are tried *alone* by the successor: no other message is probed at the same
time. One during whose trial a worker dies is the culprit.
"""

from collections.abc import Callable

from relaymta.queue import Entry
from relaymta.queue.lifecycle import CLAIMED, ON_DISK
from relaymta.shm import InFlight

__all__ = ["Recovery"]


class Recovery:
    """Owns the messages to probe, and those that are probed. `marks`: the worker's messages in flight, in shared memory, also of
    its other shards; `probed`: ids to probe, and whether alone; `offer(entry)`: delivers an entry."""

    def __init__(self, marks: InFlight, probed: dict[int, bool], offer: Callable[[Entry], None]) -> None:
        self._marks = marks
        self._offer = offer
        self.left = probed  # not probed yet
        self._waiting: list[Entry] = []
        self._probing: dict[tuple[str, str], Entry] = {}  # by route and domain
        self._choosing = False  # within `_probe_more`

    def takes(self, entry: Entry) -> bool:
        """Whether an entry is to be probed: then it is offered again when its turn has come."""
        if entry.ident not in self.left:
            return False
        self._waiting.append(entry)
        self._probe_more()
        return True

    def keeps(self, entry: Entry) -> bool:
        """Whether an entry waits until it may be probed."""
        return entry in self._waiting

    def _probe_more(self) -> None:
        """Probe what may be probed now. What is put back at once is finished within `offer`; the loop then takes the next, so
        that hundreds for a site that is down do not recurse."""
        if self._choosing or not self._waiting:
            return
        self._choosing = True
        try:
            while (entry := self._choose()) is not None:
                self._waiting.remove(entry)
                self.left.pop(entry.ident, None)
                self._probing[entry.name.route, entry.name.domain] = entry
                self._offer(entry)
        finally:
            self._choosing = False

    def _choose(self) -> Entry | None:
        """The next entry to probe, marked so; None when none may be probed now."""
        self._waiting = [entry for entry in self._waiting if entry.waiting]
        alone = next((entry for entry in self._waiting if self.left.get(entry.ident)), None)
        if alone is not None:
            return alone if self._marks.probe(alone.ident, alone=True) else None
        for entry in self._waiting:
            if (entry.name.route, entry.name.domain) not in self._probing:
                return entry if self._marks.probe(entry.ident) else None
        return None

    def landed(self, entry: Entry) -> None:
        """Called when an entry's outcome is durable, or the entry was put back untried."""
        self._marks.remove(entry.ident)
        if self._probing and self._probing.get((entry.name.route, entry.name.domain)) is entry:
            del self._probing[entry.name.route, entry.name.domain]
            self._probe_more()

    def tick(self) -> None:
        """Called each second: go on where a probed entry was held, deleted or bounced meanwhile, or another shard's was done."""
        for entry in list(self._probing.values()):
            if entry.state in (CLAIMED, ON_DISK):
                self.landed(entry)
        self._probe_more()
