"""What the loop does after a group commit: replies, events, entries into the window and out of it."""

import traceback
from collections.abc import Callable, Iterable

from relaymta.proto.envelope import HELD, UNSEEN, Envelope, QueueName
from relaymta.queue.big import BigBodies
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.events import Events
from relaymta.queue.group import Committed
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.schedule import Schedule

__all__ = ["Replies"]


class Replies:
    """Takes the groups of one shard from the writer. `materialize(idents)`: as of the queue; `unseen()`: there is a message that
    filters have not looked at. `promised`: inlined messages that are not committed yet; each has room in the window."""

    def __init__(
        self,
        events: Events,
        entries: Lifecycle,
        schedule: Schedule,
        big: BigBodies,
        materialize: Callable[[Iterable[int]], None],
        unseen: Callable[[], None],
    ) -> None:
        self._events = events
        self._entries = entries
        self._schedule = schedule
        self._big = big
        self._materialize = materialize
        self._unseen = unseen
        self.promised = 0

    def committed(self, group: Committed) -> None:
        """On the loop: answer whoever waits for the group, offer what it stored, drop the entries whose outcomes it recorded. A
        callback that raises fails alone."""
        self._stored(group.puts)
        for move in group.moves:
            if move.body is not None and move.error is None:
                self._entries.moved(move.ident, move.places, move.body)
            self._call(move.done, move)
        self._recorded(group.outcomes)
        for task in group.tasks:
            if task.mistake:
                self._events.failed(f"{type(task.error).__name__}: {task.error} ({task.mistake})")
            if task.done is not None:
                self._call(task.done, task)
        self._call(self._events.committed, group)

    def _stored(self, puts: list[Put]) -> None:
        for put in puts:
            self.promised -= put.fresh
            error = put.error
            if put.data is None:
                self._big.settled(put.ident)
            try:
                if error is None and not put.replaces:
                    self._events.queued(put)
            except Exception as raised:
                self.raised(raised)
            try:
                if put.done is not None:
                    put.done(error)
            except Exception as raised:
                self.raised(raised)
            flags = put.envelope.flags
            later = put.restored is not None or put.envelope.not_before  # what is due is found by a scan
            if later:
                self._schedule.wake()
            if flags & UNSEEN and error is None:
                self._unseen()
            elif not flags & HELD and error is None and not later and not self._entries.add_fresh(_entries(put)):
                self._schedule.wake()
                if put.fresh:
                    self._materialize([put.ident])

    def _recorded(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            entry = outcome.entry
            for put in outcome.sent:
                if put.data is None:
                    self._big.settled(put.ident)
            if outcome.refused:
                if outcome.gone:  # else it is ending for good: what cannot be recorded is not tried again
                    self._entries.record(entry)
                self._call(self._events.refused, entry, outcome.refused)
                continue
            self._entries.record(entry)
            if outcome.retry_at:
                self._schedule.wake_at(outcome.retry_at)
            if not entry.sole:
                self._schedule.wake()  # other recipients may have been deferred to this queue meanwhile
            self._call(self._events.ended, outcome)
            if outcome.dsn is not None or outcome.sent:
                self._added(outcome.puts)

    def _added(self, puts: list[Put]) -> None:
        """An outcome has put these messages into the queue."""
        for put in puts:
            self._call(self._events.queued, put)
            if not self._entries.add_fresh(_entries(put)):
                self._schedule.wake()

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        try:
            callback(*args)
        except Exception as raised:
            self.raised(raised)

    def left_quarantine(self, ident: int, envelope: Envelope, how: str, to: list[str]) -> None:
        """Report it."""
        self._call(self._events.left_quarantine, ident, envelope, how, to)

    def changed(self, how: str, ident: int, envelope: Envelope, by: str) -> None:
        """Report it."""
        self._call(self._events.changed, how, ident, envelope, by)

    def moved(self, name: QueueName, new: QueueName, messages: int, by: str) -> None:
        """Report it."""
        self._call(self._events.moved, name, new, messages, by)

    def raised(self, error: Exception) -> None:
        """Report an exception of a callback: a defect, which must not take the replies of others."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        self._events.failed(f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})")


def _entries(put: Put) -> list[Entry]:
    """The entries of a message that was just committed, one for each of its placements."""
    placements = put.envelope.placements
    if len(placements) == 1:
        only, name = placements[0], put.names[0][0]
        return [Entry(put.ident, put.envelope, name, only.queue, only.due, 0, None, True, put.data)]
    return [
        Entry(put.ident, put.envelope, name, placement.queue, placement.due, 0, indexes, False, put.data)
        for placement, (name, indexes) in zip(placements, put.names, strict=True)
    ]
