"""A message in memory: an Entry for each of its placements in the window or in flight; and the operations of the writer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relaymta.errors import StoreError
from relaymta.proto.envelope import Attempt, Body, Envelope, Placement, QueueName, RecipientState
from relaymta.queue.lifecycle import IN_FLIGHT, READ, WAITING
from relaymta.queue.receipts import Request

__all__ = ["Entry", "Outcome", "Put"]


class Entry:
    """One message's recipients in one queue.

    `indexes`: of the envelope's recipients, None for all. `data`: the pieces of the message data while they are in memory;
    `octets`: what it holds of the budget for them. `sole`: the message is in no other queue. `scanned`: it was read from disk.
    `state`: see lifecycle.py, which alone changes it. `route` (how its result came), `lost` (reused connections that it has
    lost) and `began` (when the attempt did, monotonic, of a message that has a trace; 0.0: none has, or nobody asks) belong to
    send/.
    """

    __slots__ = (
        "attempts",
        "began",
        "data",
        "due",
        "envelope",
        "ident",
        "indexes",
        "lost",
        "name",
        "octets",
        "queue",
        "route",
        "scanned",
        "sole",
        "state",
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
        data: list[bytes] | None = None,
    ) -> None:
        self.ident = ident
        self.envelope = envelope
        self.name = name
        self.queue = queue
        self.due = due
        self.attempts = attempts
        self.indexes = indexes
        self.sole = sole
        self.data = data
        self.state = READ
        self.octets = 0
        self.scanned = False
        self.route: object = None
        self.lost = 0
        self.began = 0.0

    @property
    def waiting(self) -> bool:
        """Whether delivery may begin an attempt; where it may not, somebody else has the entry, or an attempt is under way."""
        return self.state == WAITING

    @property
    def in_flight(self) -> bool:
        """Whether an attempt is under way."""
        return self.state == IN_FLIGHT

    @property
    def recipients(self) -> list[tuple[int, str]]:
        """(index, address) of the recipients of this entry."""
        everyone = self.envelope.recipients
        if len(everyone) == 1:
            return [(0, everyone[0])]
        if self.indexes is None:
            return list(enumerate(everyone))
        return [(index, everyone[index]) for index in self.indexes]


@dataclass(slots=True, eq=False)
class Put:
    """A message to store. `data`: the message data in pieces; None when `envelope.body` names the file of a large message.
    `names`: its queues, each with the recipients' indexes (None: all). `done` is called on the loop with None when it is durable,
    or with the error. `fresh`: it is delivered at once, so it is inlined; `replaces`: it takes the place of the unseen message of
    this id, whom its caller has claimed, and its body, if it is a large one, is in `Segments.next_path`.
    `restored`: it was imported: its placements, one for each of `names`, and its recipients' states. `request`: what it belongs
    to, None: it was handed in without an idempotency key. `began`: when its acceptance did (monotonic), of a message that has a
    trace; else 0.0."""

    ident: int
    envelope: Envelope
    names: list[tuple[QueueName, list[int] | None]]
    data: list[bytes] | None
    done: Callable[[StoreError | None], None] | None
    fresh: bool = False
    error: StoreError | None = None
    replaces: bool = False
    restored: tuple[list[Placement], list[RecipientState]] | None = None
    request: Request | None = None
    began: float = 0.0


class Outcome:
    """The outcome of an attempt: a result for each recipient of the entry (`results`, by index, or `success` for all of
    them), and when (`retry_at`, ms of the queue's clock) and in which queue (`name`) the deferred ones wait. `failed`: address,
    last attempt and whether it expired, for the DSN. `sent`: messages that the recipients' Sieve scripts send; they are in the
    queue by the commit that records the outcome. `stays`: the message is in the queue after it. `refused`: why it was not
    recorded ("": it was); `gone`: because the message had left the queue before."""

    __slots__ = (
        "dsn", "entry", "expired", "failed", "gone", "moved", "name", "refused", "results", "retry_at", "sent", "stays",
        "success",
    )  # fmt: skip

    def __init__(
        self,
        entry: Entry,
        results: dict[int, Attempt] | None = None,
        retry_at: int = 0,
        name: QueueName | None = None,
        failed: list[tuple[str, Attempt, bool]] | None = None,
        expired: bool = False,
        sent: Sequence[Put] = (),
    ) -> None:
        self.entry = entry
        self.success = results is None
        self.results = results if results is not None else {}
        self.retry_at = retry_at
        self.name = name
        self.failed = failed or []
        self.expired = expired
        self.sent = sent
        self.dsn: Put | None = None
        self.moved: Body | None = None
        self.stays = False
        self.refused = ""
        self.gone = False

    @property
    def puts(self) -> list[Put]:
        """All messages that come into the queue with it."""
        return [*self.sent] if self.dsn is None else [*self.sent, self.dsn]
