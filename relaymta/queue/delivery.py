"""The face between the queue and delivery.

The queue gives a `Deliverer` entries by `offer`. Of the queue a deliverer uses only `begin`, `again`, `put_back` and `finish`
(an entry's way: lifecycle.py); `read` and `stream` (message data); `park`, `skip`, `skip_no_longer` and `wake_queues` (when a
queue is scanned); `stalled` and `clock`; and, for policies, `change_messages` and `release_policy_held`.
"""

from typing import TYPE_CHECKING, Protocol

from relaymta.proto.envelope import QueueName
from relaymta.queue.entry import Entry

if TYPE_CHECKING:
    from relaymta.queue import Queue

__all__ = ["Deliverer", "Null"]


class Deliverer(Protocol):
    """What delivers a queue's mail. Everything is called on the loop."""

    def offer(self, entry: Entry) -> None:
        """Take an entry to deliver: from now on the deliverer has it, until `Queue.finish` or `Queue.put_back`. An entry that is
        not `waiting` any more was claimed by somebody else: it is dropped."""

    def awake(self, name: QueueName) -> bool:
        """Whether mail of this queue would be tried at once."""

    async def drain(self, seconds: float, data_seconds: float) -> None:
        """Start nothing new; wait up to `seconds` for messages under way, `data_seconds` for those past their final dot; then end
        all attempts."""


class Null:
    """A deliverer that delivers nothing: it puts everything back, and lets its queue sleep."""

    def __init__(self) -> None:
        self.queue: Queue | None = None

    def offer(self, entry: Entry) -> None:
        """Put the entry back."""
        if self.queue is not None:
            self.queue.put_back(entry)
            self.queue.park(entry.queue, self.queue.clock.now() + 3_600_000)

    def awake(self, name: QueueName) -> bool:
        """Nothing is tried."""
        return False

    async def drain(self, seconds: float, data_seconds: float) -> None:
        """Nothing is under way."""
