"""How an entry ends: the outcome of an attempt, of expiry or of an operator's bounce, on its way to the writer."""

from collections.abc import Sequence

import msgspec

from relaymta.disk.clock import ShardClock
from relaymta.proto.envelope import PERMANENT, TRANSIENT, Attempt, QueueName
from relaymta.queue.big import BigBodies
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.events import Events, QueueSettings
from relaymta.queue.group import Assign
from relaymta.queue.lifecycle import END, ENDING, FINISH, IN_FLIGHT, WAITING, fire, refusal
from relaymta.queue.schedule import retry_delay
from relaymta.queue.writer import Writer

__all__ = ["Ends"]


class Ends:
    """Ends the entries of one shard. All methods are called on the loop. `assign`: as of the queue."""

    def __init__(
        self, writer: Writer, clock: ShardClock, settings: QueueSettings, assign: Assign, events: Events, big: BigBodies
    ) -> None:
        self._writer = writer
        self._big = big
        self._clock = clock
        self.settings = settings
        self.assign = assign
        self._events = events

    def finish(self, entry: Entry, results: dict[int, Attempt] | None, retry_after_ms: int = 0, sent: Sequence[Put] = ()) -> None:
        """Record the outcome of an attempt. `results`: an Attempt by index for each recipient of the entry (one without was not
        tried, and is deferred like one that failed temporarily); None: all were delivered.

        Recipients that failed temporarily are tried again after `retry_after_ms` (0: the schedule's own delay); they fail
        permanently when the message's deadline has passed. `sent`: messages that come into the queue by the same commit. The
        entry is ending until the outcome is durable.
        Invariant: an entry ends once. A second outcome, or one of an entry that was put back, is refused (`Events.refused`).
        """
        state = entry.state
        if state != IN_FLIGHT and state != WAITING:  # FINISH; waiting: an attempt that reached no session
            self._events.refused(entry, refusal(entry, FINISH))
            return
        entry.state = ENDING
        for put in sent:
            if put.data is None:
                self._big.submitted(put.ident)
        if results is None:
            self._writer.submit(Outcome(entry, sent=sent))
        else:
            self._end(entry, results, retry_after_ms, sent)

    def end(self, entry: Entry, results: dict[int, Attempt]) -> None:
        """Record an outcome of an entry that a change or expiry has claimed."""
        fire(entry, END)
        self._end(entry, results)

    def _end(self, entry: Entry, results: dict[int, Attempt], retry_after_ms: int = 0, sent: Sequence[Put] = ()) -> None:
        now = self._clock.now()
        deadline = entry.envelope.deadline
        expired = now >= deadline
        failed: list[tuple[str, Attempt, bool]] = []
        final: dict[int, Attempt] = {}
        for index, attempt in results.items():
            kept = attempt
            if attempt.kind == PERMANENT:
                failed.append((entry.envelope.recipients[index], attempt, False))
            elif attempt.kind == TRANSIENT and expired:
                kept = msgspec.structs.replace(attempt, kind=PERMANENT)
                failed.append((entry.envelope.recipients[index], kept, True))
            final[index] = kept
        delay = retry_after_ms or retry_delay(entry.attempts + 1, self.settings.first_retry_ms)
        retry_at = max(now + 1, min(now + delay, deadline))
        self._writer.submit(Outcome(entry, final, retry_at, self._name_now(entry), failed, expired, sent))

    def _name_now(self, entry: Entry) -> QueueName:
        """The queue in which an entry's recipients wait after this attempt: routes may have changed."""
        names = self.assign(entry.envelope, entry.attempts + 1)
        first = entry.indexes[0] if entry.indexes else 0
        for name, indexes in names:
            if indexes is None or first in indexes:
                return name
        return entry.name
