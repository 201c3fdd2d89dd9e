"""The settings of a shard, and the callbacks by which a queue reports what it has committed."""

from dataclasses import dataclass

from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue.entry import Entry, Outcome, Put
from relaymta.queue.group import Committed
from relaymta.queue.journal import JournalSettings

__all__ = ["Events", "QueueSettings"]


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """One shard's settings. Ages and delays in milliseconds; `window` in entries, `window_bytes` in octets of message data.
    `journal`: None: there is none."""

    hostname: str
    max_age_ms: int = 5 * 86_400_000
    first_retry_ms: int = 60_000
    window: int = 10_000
    window_bytes: int = 32 << 20
    quarantine_ms: int = 30 * 86_400_000
    journal: JournalSettings | None = None


class Events:
    """Callbacks for logging and metrics; each is called on the loop, after the commit."""

    def queued(self, put: Put) -> None:
        """A message is durable."""

    def ended(self, outcome: Outcome) -> None:
        """An attempt's outcome is durable."""

    def committed(self, group: Committed) -> None:
        """A group was committed."""

    def left_quarantine(self, ident: int, envelope: Envelope, how: str, to: list[str]) -> None:
        """A message is in the quarantine no more: it was released (to others than its recipients: `to`), deleted or bounced, has
        expired, or there was no room for it ("displaced"). `envelope`: as it was in it."""

    def changed(self, how: str, ident: int, envelope: Envelope, by: str) -> None:
        """A message was "held", "released", "rerouted" or "deleted" (`envelope`: as it was), and has not left the quarantine by
        that. `by`: an operator, "policy" or "expiry"."""

    def moved(self, name: QueueName, new: QueueName, messages: int, by: str) -> None:
        """All mail of a queue, about so many messages, was given another route. `by`: as of `changed`."""

    def refused(self, entry: Entry, why: str) -> None:
        """An outcome of `entry` was not recorded, because it contradicts the store: a defect. `why`: for the log."""

    def failed(self, what: str) -> None:
        """A change of the queue was undone because of a defect. `what`: for the log."""
