"""Expiry: messages past their deadline are given up, wherever they wait. What is in flight expires with its outcome, what an
operator's change has claimed with a later check.

After a stop or a jump of the clock of an hour or more, each message is tried once before it expires: for a day only the outcome
of an attempt expires it.
"""

from collections.abc import Callable

import msgspec

from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.proto.envelope import TRANSIENT, UNSEEN, Attempt, Envelope
from relaymta.queue.ends import Ends
from relaymta.queue.entry import Entry
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.schedule import Schedule
from relaymta.queue.store import Store

__all__ = ["Expiry", "Overdue"]

RESUMED_GRACE_MS = 86_400_000
TOGETHER = 200  # messages

# An entry of a message past its deadline, with the last attempt at each pending recipient, by index.
Overdue = tuple[Entry, dict[int, Attempt]]


class Expiry:
    """Finds what is overdue and ends it."""

    def __init__(
        self,
        store: Store,
        clock: ShardClock,
        schedule: Schedule,
        entries: Lifecycle,
        ends: Ends,
        hold: Callable[[list[int]], object],
    ) -> None:
        """`hold(idents)`: holds unseen messages that have expired."""
        self._hold = hold
        self._store = store
        self._clock = clock
        self._schedule = schedule
        self._entries = entries
        self._ends = ends
        self._after = (0, 0)  # the last one of the page before: what cannot be ended now does not hide those behind it

    def overdue(self) -> list[Overdue]:
        """Reader thread, each second: entries of messages past their deadline, page by page, then from the beginning again."""
        now = self._clock.now()
        if self._clock.resumed and now < self._clock.resumed + RESUMED_GRACE_MS:
            return []
        found: list[Overdue] = []
        read, self._after = self._after, (0, 0)
        with self._store.reading() as txn:
            for deadline, ident in self._store.expiries(txn, read):
                if deadline > now:
                    break
                if len(found) >= TOGETHER:
                    self._after = read
                    break
                read = deadline, ident
                states = self._store.recipient_states(txn, ident)
                last = {index: state.attempts[-1] for index, state in states.items() if state.attempts}
                found += [(entry, last) for entry in self._schedule.load(txn, ident)]
        return found

    def expire(self, overdue: list[Overdue], mark: int) -> None:
        """On the loop: end what `overdue` has read with this mark, unless it is in flight, claimed or outdated."""
        unsent = {loaded.ident for loaded, _ in overdue if _has_no_dsn(loaded.envelope)}
        if unsent:
            self._hold(list(unsent))
        for loaded, last in overdue:
            if loaded.ident in unsent:
                continue
            entry = self._entries.seize(loaded, mark)
            if entry is None:
                continue
            what = "filters had looked at it" if entry.envelope.flags & UNSEEN else "it was tried"
            never = Attempt(wall_ms(), TRANSIENT, "queue", "", 0, "4.4.7", f"the message expired before {what}")
            results = {index: msgspec.structs.replace(last.get(index, never), kind=TRANSIENT) for index, _ in entry.recipients}
            self._ends.end(entry, results)


def _has_no_dsn(envelope: Envelope) -> bool:
    """Whether the sender of an unseen message may be forged: then it is held, and there is no DSN to whoever that is."""
    unseen = envelope.unseen
    return bool(envelope.flags & UNSEEN) and unseen is not None and not (unseen.trusted or unseen.genuine)
