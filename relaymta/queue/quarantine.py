"""The quarantine: messages that are held because of what a filter, a rule about mail or DMARC says of them.

They are held as others are, and have a row in the table "quarantine" as well, written and removed in the same commits. What was
judged stays for as long as `keep_ms` says, and while all of it has room; then it is deleted, the oldest first, and nobody gets a
DSN: its sender may be forged. What nobody could look at (`Quarantine.judged`) stays until an operator decides.

State: the totals, `_checked` and `_after` are set by `look`, on a reader thread, of which one runs at a time; `_looking` on
the loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from relaymta.disk.clock import ShardClock
from relaymta.ident import stamp_of
from relaymta.proto.envelope import CRASHED, HELD, POLICY_HELD, QUARANTINED, SMTPUTF8, UNSEEN, Envelope, Quarantine, Unseen
from relaymta.queue.change import Change
from relaymta.queue.entry import Put
from relaymta.queue.expiry import RESUMED_GRACE_MS
from relaymta.queue.group import Assign
from relaymta.queue.outcomes import put_rows
from relaymta.queue.readers import Readers
from relaymta.queue.store import Store

__all__ = ["Keeper", "Left", "Release", "not_judged", "released"]

AT_ONCE = 1000  # messages that are deleted together
ROWS = 20_000  # that are read in one go

# What has left the quarantine: its id, its envelope before, how, and to whom, where that is not to its recipients.
Left = Callable[[int, Envelope, str, list[str]], None]


class Release(NamedTuple):
    """How messages are released: to `recipients` in place of their own (empty: to these), and then from `sender`, who gets the
    DSNs; `unscanned`: also those that other filters have not looked at yet, without them."""

    recipients: list[str]
    sender: str
    unscanned: bool


class Over(NamedTuple):
    """Messages whose time is over, those for which there is no room, and those of which an older version has left the row alone
    here; `more`: there are more of them."""

    expired: list[int]
    displaced: list[int]
    stale: list[int]
    more: bool


class Keeper:
    """Bounds the quarantine of one shard. `begin(verb, idents, then)`: as Changes.begin; `over(octets)`: of so many octets of
    judged mail here, how many are too many, and whether the last message may have more than these; `changed`: `octets` is another
    figure. `messages`: in the quarantine; `octets`: of those that were judged and are not chosen to be deleted."""

    def __init__(
        self, store: Store, clock: ShardClock, readers: Readers, begin: Callable[[str, list[int], Callable[[int], None]], None],
        keep_ms: int,
    ) -> None:  # fmt: skip
        self._store = store
        self._clock = clock
        self._readers = readers
        self._begin = begin
        self.keep_ms = keep_ms
        self.over: Callable[[int], tuple[int, bool]] = lambda octets: (0, False)
        self.changed: Callable[[], None] = lambda: None
        self.messages = self.octets = 0
        self._after = 0  # the id behind which the next look for what is expired begins
        self._looking = False
        self._checked = False

    def tick(self) -> None:
        """Each second, on the loop: delete what is over."""
        if not self._looking:
            self._looking = True
            self._readers.start(self.look, self._act)

    def look(self) -> Over:
        """Reader thread: what is over."""
        store = self._store
        with store.reading() as txn:
            self.messages = int(txn.stat(db=store.tables["quarantine"])["entries"])
            there = store.meta_in(txn, b"quarantine")
            expired = self._expired(txn)
            (too_many, one_more), displaced = self.over(there), list[int]()
            known, over = set(expired), 0
            for ident, _, octets in store.quarantined(txn, True) if too_many > 0 else ():
                if over >= too_many or (over + octets > too_many and not one_more) or len(displaced) >= AT_ONCE:
                    break
                over += octets
                if ident not in known:
                    displaced.append(ident)
        self.octets = max(there - over, 0)  # what is chosen is gone for others, before it is deleted: they give up no more for it
        self.changed()
        stale = [] if self._checked else self._stale()
        self._checked = True
        return Over(expired, displaced, stale, bool(self._after) or len(displaced) >= AT_ONCE)

    def _stale(self) -> list[int]:
        """Once, after the start."""
        store, found = self._store, list[int]()
        with store.reading() as txn:
            for judged in (True, False):
                for ident, *_ in store.quarantined(txn, judged):
                    envelope = store.envelope(txn, ident)
                    if envelope is None or envelope.quarantine is None:
                        found.append(ident)
        return found

    def _expired(self, txn: object) -> list[int]:
        """Ids are in the order of arrival, before which none was in the quarantine: the look ends at those that came too late. A
        page of ROWS at a time: what cannot be deleted now hides nothing."""
        clock, read, self._after = self._clock, self._after, 0
        now = clock.now()
        found: list[int] = []
        resumed = clock.resumed or self._store.meta_in(txn, b"resumed")
        if resumed and now < resumed + RESUMED_GRACE_MS:  # after a long stop, or with a wrong clock, somebody may look first
            return found
        until = now - self.keep_ms
        for rows, (ident, since, _) in enumerate(self._store.quarantined(txn, True, read)):
            if stamp_of(ident) > until:
                break
            if rows >= ROWS or len(found) >= AT_ONCE:
                self._after = ident - 1
                break
            if since <= until:
                found.append(ident)
        return found

    def _act(self, over: Over | Exception) -> None:
        """On the loop."""
        if isinstance(over, Exception):  # the store cannot be read now
            self._looking = False
            return
        changes = [
            ("quarantine expired", over.expired), ("quarantine displaced", over.displaced), ("quarantine stale", over.stale),
        ]  # fmt: skip
        changes = [(verb, idents) for verb, idents in changes if idents]
        left, deleted = len(changes), 0

        def done(count: int) -> None:
            nonlocal left, deleted
            left, deleted = left - 1, deleted + count
            if not left:
                self._looking = False
                if over.more and deleted:
                    self.tick()

        for verb, idents in changes:
            self._begin(verb, idents, done)
        if not changes:
            self._looking = False


def not_judged(envelope: Envelope, now: int, why: str) -> Quarantine:
    """Of a message that filters cannot look at, or have not."""
    names = envelope.unseen.filters if envelope.unseen is not None else ()
    return Quarantine(now, f"filter {', '.join(names)}" if names else CRASHED, why, None, "", False)


def released(
    change: Change, clock: ShardClock, assign: Assign, max_age_ms: int, idents: list[int], how: Release, left: Left
) -> int:
    """Writer thread, inside a group commit: release those of these messages, none of which is in memory, that are in the
    quarantine; how many it were. Their message data stays as it is."""
    changed, now = 0, clock.now()
    for ident in idents:
        envelope = change.envelope(ident)
        if envelope is None or envelope.quarantine is None:
            continue
        left(ident, msgspec.structs.replace(envelope), "released", how.recipients)
        if not how.recipients:
            envelope.unseen = _left(envelope, how)
            change.release(ident, envelope, now, now + max_age_ms)
        else:
            _redirect(change, ident, envelope, how, assign, now, now + max_age_ms)
        changed += 1
    return changed


def _left(envelope: Envelope, how: Release) -> Unseen | None:
    """What is to be done with a message before it is due: one that is not signed is, also where no filter is to look at it."""
    unseen = envelope.unseen
    if unseen is None or not how.unscanned:
        return unseen
    return msgspec.structs.replace(unseen, filters=[]) if unseen.signs else None


def _redirect(change: Change, ident: int, envelope: Envelope, how: Release, assign: Assign, now: int, deadline: int) -> None:
    """As a new message to other recipients, of the same id and with the same message data."""
    unseen = _left(envelope, how)
    flags = envelope.flags & ~(HELD | QUARANTINED | POLICY_HELD) | (UNSEEN if unseen is not None else 0)
    flags |= 0 if how.sender.isascii() and all(map(str.isascii, how.recipients)) else SMTPUTF8
    new = msgspec.structs.replace(
        envelope, sender=how.sender, recipients=how.recipients, flags=flags, deadline=deadline, placements=[], route="",
        held_for="", unseen=unseen, quarantine=None, receipt=0, not_before=0,
    )  # fmt: skip
    change.finish_message(ident, envelope, histories=True)
    change.tell("released", ident, new)
    put_rows(change, Put(ident, new, assign(new, 0), None, None), now)
