"""Hold and bounce policies: mail that one matches is held, or bounced, when the queue offers it for delivery, for as long as the
policy is in effect. Mail that a hold policy held is released when no hold policy matches it any more. Policies are site states
of the machine (node/)."""

from collections.abc import Callable, Coroutine

from relaymta.node import BOUNCE, HOLD, SiteState, SiteStates
from relaymta.proto.address import domain_of
from relaymta.proto.envelope import DSN, Envelope, QueueName
from relaymta.queue import Entry, Filter, Queue

__all__ = ["Policies", "filter_of"]

TOGETHER = 1000


def filter_of(text: str) -> Filter:
    """The filter of a policy, from its name: `field=value` words with the field names of `Filter`. ValueError or TypeError when
    the name is malformed."""
    return Filter(**dict(word.split("=", 1) for word in text.split(" ")))  # type: ignore[arg-type]


class Policies:
    """Applies the policies in one worker's delivery. `queue()` is its queue; `put_back(entry)` puts an entry back untried,
    `bounce(entry, indexes, reason)` fails these of its recipients permanently, `spawn(coroutine)` runs a background task."""

    def __init__(
        self,
        states: SiteStates,
        queue: Callable[[], Queue],
        put_back: Callable[[Entry], None],
        bounce: Callable[[Entry, list[int], str], None],
        spawn: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self._states = states
        self._queue = queue
        self._put_back = put_back
        self._bounce = bounce
        self._spawn = spawn
        self._policies: list[tuple[SiteState, Filter]] = []
        self._to_hold: list[int] = []
        self._holding = False
        self._holds: set[str] | None = None  # the hold policies at the last `tick`; None: held mail is to be checked
        self.refresh()

    def refresh(self) -> None:
        """Reload the policies: some may have been added, removed or have expired."""
        self._policies = [(state, filter_of(state.site)) for state in self._states if state.kind in (HOLD, BOUNCE)]

    def __bool__(self) -> bool:
        return bool(self._policies)

    def find(self, name: QueueName, sender: str, recipients: list[str]) -> SiteState | None:
        """The policy that matches mail in a queue, hold before bounce; None when none does."""
        found = [state for state, chosen in self._policies if _matches(chosen, name, sender, recipients)]
        return min(found, key=lambda state: state.kind != HOLD, default=None)

    def apply(self, entry: Entry) -> bool:
        """Hold or bounce an entry that a policy matches; whether it was taken out of delivery."""
        name, sender, recipients = entry.name, entry.envelope.sender, entry.recipients
        policy = self.find(name, sender, [address for _, address in recipients])
        if policy is None:
            return False
        if policy.kind == BOUNCE and entry.envelope.flags & DSN:
            return False  # or a policy would bounce the DSNs that it causes, and no sender would be notified
        if policy.kind == BOUNCE:  # only the recipients that it matches
            chosen = filter_of(policy.site)
            meant = [index for index, address in recipients if _matches(chosen, name, sender, [address])]
            self._bounce(entry, meant, policy.reason)
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
                del self._to_hold[:TOGETHER]  # where this fails, the entries are offered again and matched again
                holds = self._holding_policies()
                await self._queue().change_messages("policy", idents)
                if holds - self._holding_policies():  # it ended during this commit, and `tick` checked before
                    await self._release()
        finally:
            self._holding = False

    def tick(self) -> None:
        """Called each second: release the mail of hold policies that have ended."""
        self.refresh()
        holds = self._holding_policies()
        if self._holds is None or self._holds - holds:
            self._spawn(self._release())
        self._holds = holds

    def _holding_policies(self) -> set[str]:
        return {state.site for state, _ in self._policies if state.kind == HOLD}

    async def _release(self) -> None:
        released = False
        try:
            await self._queue().release_policy_held(self._held_still)
            released = True
        finally:
            if not released:
                self._holds = None  # the next tick tries again

    def _held_still(self, envelope: Envelope, names: list[QueueName]) -> bool:
        policies = [self.find(name, envelope.sender, envelope.recipients) for name in names]
        return any(policy is not None and policy.kind == HOLD for policy in policies)


def _matches(chosen: Filter, name: QueueName, sender: str, recipients: list[str]) -> bool:
    domain = chosen.recipient_domain.lower()
    return (
        chosen.waits_in(name)
        and chosen.sender.lower() in ("", sender.lower())
        and (not domain or any(domain_of(address.lower()) == domain for address in recipients))
    )
