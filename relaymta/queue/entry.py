"""A message as it stands in memory: one entry for each of its placements that is in the window or in flight."""

from collections.abc import Callable
from dataclasses import dataclass

from relaymta.errors import StoreError
from relaymta.proto.envelope import Attempt, Body, Envelope, QueueName

__all__ = ["Entry", "Move", "Outcome", "Put"]


class Entry:
    """One message's recipients in one queue.

    `indexes`: which of the envelope's recipients, None for all. `text`: the body's pieces while they are in memory; `counted`:
    they count as the window's. `sole`: the message is in no other queue. `cancelled`: was taken out of the window; whoever
    meets it drops it. `ending`: its outcome was handed to the writer, and there is no second one.
    """

    __slots__ = (
        "attempts", "cancelled", "counted", "due", "ending", "envelope", "flying", "ident", "indexes", "name", "queue", "route",
        "sole", "text",
    )  # fmt: skip

    def __init__(
        self,
        ident: int,
        envelope: Envelope,
        name: QueueName,
        queue: int,
        due: int,
        attempts: int,
        indexes: list[int] | None,
        sole: bool,
        text: list[bytes] | None = None,
    ) -> None:
        self.ident = ident
        self.envelope = envelope
        self.name = name
        self.queue = queue
        self.due = due
        self.attempts = attempts
        self.indexes = indexes
        self.sole = sole
        self.text = text
        self.cancelled = False
        self.counted = False
        self.flying = False
        self.ending = False
        self.route: object = None  # what send/ has resolved for it

    @property
    def recipients(self) -> list[tuple[int, str]]:
        """(index, address) of the recipients this entry is about."""
        everyone = self.envelope.recipients
        if len(everyone) == 1:
            return [(0, everyone[0])]
        if self.indexes is None:
            return list(enumerate(everyone))
        return [(index, everyone[index]) for index in self.indexes]


@dataclass(slots=True, eq=False)
class Put:
    """A message to make safe. `text`: its pieces, or `body` where a large one lies already. `done` is called on the
    loop with None when it is safe, or with why it is not. `fresh`: it is delivered at once, so it shares a row."""

    ident: int
    envelope: Envelope
    names: list[tuple[QueueName, list[int] | None]]
    text: list[bytes] | None
    done: Callable[[StoreError | None], None] | None
    fresh: bool = False
    error: StoreError | None = None


class Outcome:
    """What an attempt came to: a result for each recipient of the entry (`results`, by index, or `success` for all of
    them), and when and in which queue the unfinished ones wait. `refused`: why it was not made durable ("": it was); then
    `gone` tells whether what it was about had ended before."""

    __slots__ = ("entry", "expired", "failed", "gone", "moved", "name", "notice", "refused", "results", "retry_at", "success")

    def __init__(
        self,
        entry: Entry,
        results: dict[int, Attempt] | None = None,
        retry_at: int = 0,
        name: QueueName | None = None,
        failed: list[tuple[str, Attempt, bool]] | None = None,
        expired: bool = False,
    ) -> None:
        self.entry = entry
        self.success = results is None
        self.results = results if results is not None else {}
        self.retry_at = retry_at
        self.name = name
        self.failed = failed or []
        self.expired = expired
        self.notice: Put | None = None
        self.moved: Body | None = None
        self.refused = ""
        self.gone = False


class Move:
    """A body copied from its segment (`was`, verified as `text`) to a cold one. `body`: where it lies once that is
    committed, None when its message ended or moved first. `done(move)` is called on the loop; `last`: of its slice."""

    __slots__ = ("body", "done", "error", "ident", "last", "queues", "text", "was")

    def __init__(self, ident: int, was: Body, text: bytes, done: Callable[["Move"], None]) -> None:
        self.ident = ident
        self.was = was
        self.text = text
        self.done = done
        self.body: Body | None = None
        self.queues: list[int] = []  # in which the message waits
        self.error: StoreError | None = None
        self.last = False
