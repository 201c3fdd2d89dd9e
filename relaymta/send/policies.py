"""Hold and bounce policies: mail that one matches is held, or bounced, when the queue offers it for delivery, for as long as the
policy is in effect. Mail that a hold policy held is released when no hold policy matches it any more. Policies are site states
of the machine (node/)."""

from collections.abc import Callable, Coroutine
from functools import lru_cache

from relaymta.errors import StoreError
from relaymta.node import BOUNCE, HOLD, SiteState, SiteStates
from relaymta.proto.envelope import DSN, Envelope, QueueName
from relaymta.queue import Entry, Filter, Queue

__all__ = ["Policies", "filter_of"]

TOGETHER = 1000
LONGEST_PAUSE = 30  # seconds until messages that could not be held are tried again, at most


# What a policy can be about: it is matched against a queue's name, the sender, the recipients and the login.
FIELDS = ("queue", "route", "application", "sender", "recipient_domain", "user")


def filter_of(text: str) -> Filter:
    """The filter of a policy, from its name: `field=value` words, each field of FIELDS once. ValueError says what is wrong."""
    fields: dict[str, str] = {}
    for word in text.split(" "):
        field, _, value = word.partition("=")
        if field not in FIELDS:
            raise ValueError(f"a policy cannot be about {field!r}: it is about {', '.join(FIELDS)}, as field=value words")
        if not value:
            raise ValueError(f"a policy about {field} needs a value ({field}=...)")
        if field in fields:
            raise ValueError(f"a policy can be about one {field} only")
        fields[field] = value
    return Filter(**fields)  # type: ignore[arg-type]


@lru_cache(20_000)  # [[abuse]] may suspend many accounts
def _meant(site: str) -> Filter | None:
    """The filter of a stored policy; None when it is none, as versions before stored some: then it is about no mail."""
    try:
        return filter_of(site)
    except ValueError:
        return None


class Policies:
    """Applies the policies in one worker's delivery. Owns the entries that are to be held: they stay in the window, waiting,
    until the change that holds them has claimed them, so that the queue does not offer them again meanwhile.

    `queue()` is its queue; `put_back(entry)` puts an entry back untried, `taken(entry)` is called when one is to be held,
    `bounce(entry, indexes, reason)` fails these of its recipients permanently, `spawn(coroutine)` runs a background task."""

    def __init__(
        self,
        states: SiteStates,
        queue: Callable[[], Queue],
        put_back: Callable[[Entry], None],
        taken: Callable[[Entry], None],
        bounce: Callable[[Entry, list[int], str], None],
        spawn: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        self._states = states
        self._queue = queue
        self._put_back = put_back
        self._taken = taken
        self._bounce = bounce
        self._spawn = spawn
        self._policies: list[tuple[SiteState, Filter]] = []
        self._by_user: dict[str, list[tuple[SiteState, Filter]]] = {}  # by the user that they are about, "": about any
        self._to_hold: list[Entry] = []
        self._refused: list[Entry] = []  # could not be held: the disk is full, or an entry of the same message is in flight
        self._pause = self._ticks = 0  # until they are tried again, and since they were
        self._holding = False
        self._seen: set[str] = set()  # the hold policies in effect at any time since the last check of held mail
        self._to_check = True  # held mail, at the next `tick`: some may be held by a policy that ended in an earlier process
        self._releasing = False
        self.refresh()

    def refresh(self) -> None:
        """Reload the policies: some may have been added, removed or have expired."""
        policies = ((state, _meant(state.site)) for state in self._states.of(HOLD, BOUNCE))
        self._policies = [(state, chosen) for state, chosen in policies if chosen is not None]
        self._by_user = {}
        for one in self._policies:
            self._by_user.setdefault(one[1].user, []).append(one)
        self._seen |= self._holding_policies()

    def __bool__(self) -> bool:
        return bool(self._policies)

    def find(self, name: QueueName, sender: str, recipients: list[str], user: str = "") -> SiteState | None:
        """The policy that matches mail in a queue, hold before bounce; None when none does."""
        meant = self._by_user.get("", ()), self._by_user.get(user, ()) if user else ()
        found = [state for some in meant for state, chosen in some if _matches(chosen, name, sender, recipients, user)]
        return min(found, key=lambda state: state.kind != HOLD, default=None)

    def apply(self, entry: Entry) -> bool:
        """Hold or bounce an entry that a policy matches; whether it was taken out of delivery."""
        name, sender, recipients, user = entry.name, entry.envelope.sender, entry.recipients, entry.envelope.user
        policy = self.find(name, sender, [address for _, address in recipients], user)
        if policy is None:
            return False
        if policy.kind == BOUNCE and entry.envelope.flags & DSN:
            return False  # or a policy would bounce the DSNs that it causes, and no sender would be notified
        if policy.kind == BOUNCE:  # only the recipients that it matches
            chosen = filter_of(policy.site)
            meant = [index for index, address in recipients if _matches(chosen, name, sender, [address], user)]
            self._bounce(entry, meant, policy.reason)
            return True
        self._to_hold.append(entry)
        self._taken(entry)
        self._begin_to_hold()
        return True

    def _begin_to_hold(self) -> None:
        if self._to_hold and not self._holding:
            self._holding = True
            self._spawn(self._hold())

    async def _hold(self) -> None:
        try:
            while self._to_hold:
                some, self._to_hold = self._to_hold[:TOGETHER], self._to_hold[TOGETHER:]
                try:
                    await self._hold_some(some)
                finally:
                    self._refused += [entry for entry in some if entry.waiting]
        finally:
            self._holding = False

    async def _hold_some(self, entries: list[Entry]) -> None:
        """Hold those of these entries that a hold policy matches when it is this change's turn; the others are put back. What
        somebody else has taken until then is left alone: it may be in another queue by now."""

        holds, names = self._holding_policies(), dict[int, str]()

        def chosen() -> list[int]:
            nonlocal holds
            holds |= self._holding_policies()  # one that has begun while this waited may be the reason
            found = []
            for entry in entries:
                policy = self._holding_policy(entry) if entry.waiting else None
                if policy is not None:
                    found.append(entry.ident)
                    names[entry.ident] = policy.site
                elif entry.waiting:
                    self._put_back(entry)
            return found

        try:
            await self._queue().change_messages("policy", chosen, names)
        except StoreError:
            pass  # which the queue reports; some may be held all the same
        finally:
            if holds - self._holding_policies():  # one ended during this change, and `tick` checked before
                self._to_check = True

    def _holds(self, name: QueueName, sender: str, recipients: list[str], user: str) -> SiteState | None:
        """The hold policy that matches mail in a queue now, if one does."""
        policy = self.find(name, sender, recipients, user)
        return policy if policy is not None and policy.kind == HOLD else None

    def _holding_policy(self, entry: Entry) -> SiteState | None:
        return self._holds(entry.name, entry.envelope.sender, [address for _, address in entry.recipients], entry.envelope.user)

    def held(self, about: str) -> None:
        """Called when an operator's change has held mail for the hold policy with this name ("": not known): if it has ended
        meanwhile, `tick` may have released its mail before."""
        self._to_check |= self._states.get(HOLD, about) is None

    def tick(self) -> None:
        """Called each second: release the mail of hold policies that have ended, and hold again what could not be held."""
        self.refresh()
        self._hold_again()
        self._begin_to_hold()
        if self._releasing:
            return
        holds = self._holding_policies()
        if self._to_check or self._seen - holds:  # also one that began and ended since the last tick
            self._to_check, self._releasing = False, True
            self._spawn(self._release())
        self._seen = holds

    def _hold_again(self) -> None:
        """Put back what no hold policy matches any more; try the rest again after a pause that becomes longer each time."""
        if not self._refused:
            self._pause = 0 if not self._holding else self._pause
            return
        still, self._refused = [entry for entry in self._refused if entry.waiting], []
        for entry in still:
            if self._holding_policy(entry) is not None:
                self._refused.append(entry)
            else:
                self._put_back(entry)
        self._ticks += 1
        if self._ticks > self._pause:
            self._ticks, self._pause = 0, min(2 * self._pause + 1, LONGEST_PAUSE)
            self._to_hold, self._refused = self._refused + self._to_hold, []

    def _holding_policies(self) -> set[str]:
        return {state.site for state, _ in self._policies if state.kind == HOLD}

    async def _release(self) -> None:
        released = False
        try:
            await self._queue().release_policy_held(self._held_still)
            released = True
        finally:
            self._releasing = False
            if not released:
                self._to_check = True  # the next tick tries again

    def _held_still(self, envelope: Envelope, names: list[QueueName]) -> bool:
        return any(self._holds(name, envelope.sender, envelope.recipients, envelope.user) is not None for name in names)


def _matches(chosen: Filter, name: QueueName, sender: str, recipients: list[str], user: str) -> bool:
    return chosen.user in ("", user) and chosen.waits_in(name) and chosen.is_from(sender) and chosen.is_to(recipients)
