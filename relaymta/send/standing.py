"""Standing orders: mail that one is about is held, or given up, when its turn to be delivered comes, for as long as the order
stands. What a hold order held is released when no order holds it any more. Orders are facts of the machine (node/)."""

from collections.abc import Callable, Coroutine

from relaymta.node import BOUNCE, HOLD, Fact, Facts
from relaymta.proto.address import domain_of
from relaymta.proto.envelope import NOTICE, Envelope, QueueName
from relaymta.queue import Entry, Filter, Queue

__all__ = ["Orders", "filter_of"]

TOGETHER = 1000


def filter_of(text: str) -> Filter:
    """Which mail an order is about, from its name: `field=value` words, as `Filter` calls the fields. ValueError, TypeError when
    it is none."""
    return Filter(**dict(word.split("=", 1) for word in text.split(" ")))  # type: ignore[arg-type]


class Orders:
    """The standing orders, as one worker's delivery obeys them. `queue()` is its queue; `put_back(entry)` gives an entry back
    untried, `give_up(entry, indexes, reason)` fails these of its recipients for good, `spawn(coroutine)` runs something in
    the background."""

    def __init__(
        self,
        facts: Facts,
        queue: Callable[[], Queue],
        put_back: Callable[[Entry], None],
        give_up: Callable[[Entry, list[int], str], None],
        spawn: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self._facts = facts
        self._queue = queue
        self._put_back = put_back
        self._give_up = give_up
        self._spawn = spawn
        self._orders: list[tuple[Fact, Filter]] = []
        self._to_hold: list[int] = []
        self._holding = False
        self._holds: set[str] | None = None  # the hold orders when it was last looked what is to be released
        self.refresh()

    def refresh(self) -> None:
        """Orders may have been given, withdrawn or have ended."""
        self._orders = [(fact, filter_of(fact.site)) for fact in self._facts if fact.kind in (HOLD, BOUNCE)]

    def __bool__(self) -> bool:
        return bool(self._orders)

    def find(self, name: QueueName, sender: str, recipients: list[str]) -> Fact | None:
        """The order about mail in a queue; one that holds before one that gives up."""
        found = [fact for fact, chosen in self._orders if _is_about(chosen, name, sender, recipients)]
        return min(found, key=lambda fact: fact.kind != HOLD, default=None)

    def obeyed(self, entry: Entry) -> bool:
        """Whether an order took an entry out of delivery."""
        name, sender, recipients = entry.name, entry.envelope.sender, entry.recipients
        order = self.find(name, sender, [address for _, address in recipients])
        if order is None:
            return False
        if order.kind == BOUNCE and entry.envelope.flags & NOTICE:
            return False  # or the failure notices that an order makes would be given up by it, and nobody told
        if order.kind == BOUNCE:  # those that it is about, and nobody else
            chosen = filter_of(order.site)
            meant = [index for index, address in recipients if _is_about(chosen, name, sender, [address])]
            self._give_up(entry, meant, order.reason)
            return True
        self._put_back(entry)
        self._to_hold.append(entry.ident)
        if not self._holding:
            self._holding = True
            self._spawn(self._hold())
        return True

    async def _hold(self) -> None:
        try:
            while self._to_hold:
                idents = self._to_hold[:TOGETHER]
                del self._to_hold[:TOGETHER]  # where this fails they are offered again, and come here again
                holds = self._standing()
                await self._queue().change_messages("order", idents)
                if holds - self._standing():  # it ended while this was committed, and the look for what it held was before
                    await self._release()
        finally:
            self._holding = False

    def tick(self) -> None:
        """Each second: orders that have ended let go of their mail."""
        self.refresh()
        holds = self._standing()
        if self._holds is None or self._holds - holds:
            self._spawn(self._release())
        self._holds = holds

    def _standing(self) -> set[str]:
        return {fact.site for fact, _ in self._orders if fact.kind == HOLD}

    async def _release(self) -> None:
        released = False
        try:
            await self._queue().release_ordered(self._held_still)
            released = True
        finally:
            if not released:
                self._holds = None  # the next tick tries again

    def _held_still(self, envelope: Envelope, names: list[QueueName]) -> bool:
        orders = [self.find(name, envelope.sender, envelope.recipients) for name in names]
        return any(order is not None and order.kind == HOLD for order in orders)


def _is_about(chosen: Filter, name: QueueName, sender: str, recipients: list[str]) -> bool:
    domain = chosen.recipient_domain.lower()
    return (
        chosen.waits_in(name)
        and chosen.sender.lower() in ("", sender.lower())
        and (not domain or any(domain_of(address.lower()) == domain for address in recipients))
    )
