"""An entry's life: its states, the only transitions between them, and the one owner of what is in memory.

Theory of operation. A placement (a message's recipients in one queue) is a row on disk. Its *entry* is that row in memory; at
most one entry of a placement is in the table of `Lifecycle` at a time. Everybody who does something with a message takes its
entries here first, on the loop:

    a commit, a scan   add an entry to the window; it is offered to delivery, and *waiting* from then on
    delivery           `begin`s a waiting entry; ends it by `Queue.finish`, or gives it back by `again` or `put_back`
    expiry             `seize`s an overdue one that waits in memory or on disk, and ends it
    operators          `claim` messages; what is in flight or ending is not claimed, what waits leaves the window. Nobody else
                       adds or seizes entries of a claimed message until `release_claim`. A change of whole queues claims these
                       the same way (`claim_queues`), but what is in flight there goes on: outcomes name a queue by its number
    compaction         moves bodies, whoever has the message: `moved` corrects the entries and what is being read

What holds in between:

- Only who has an entry in flight, or has claimed it, may end it: an entry is *ending* once, and its outcome is committed once.
- A row whose entry is in memory, or whose message or queue is claimed, is not added by a scan. (Nor is one whose change the disk
  has just refused: it *rests*. Expiry and other changes may take it.)
- A row that is *being read* on a reader thread is nobody's. A read has a mark; a row read before its entry left memory, or before
  a claim on it was released, is outdated and is dropped when the read arrives (`outdated`). It is read again if it still exists.
- An entry holds `octets` of the budget for message data while its data is in memory or being read. They are given back when it
  leaves the table, and only then is it no longer counted: the sum is what the entries hold, and never negative.

An event that is not in the table for a state is an error: of delivery (`Events.refused`), or of this package (`Mistake`). Where
each message passes, `fire` is spelled out in place; tests compare these places with the table.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from relaymta.proto.envelope import Body

if TYPE_CHECKING:
    from relaymta.queue.entry import Entry

__all__ = ["CLAIMED", "ENDED", "ENDING", "IN_FLIGHT", "ON_DISK", "READ", "WAITING", "Lifecycle", "Mistake", "fire", "refusal"]

# States of an entry.
READ = 0  # made from a row, or by a commit; nobody has it yet
WAITING = 1  # in the window, offered to delivery
IN_FLIGHT = 2  # delivery has given it to a session, or tries to
CLAIMED = 3  # by an operator's change or expiry, which ends or changes it; delivery drops it
ENDING = 4  # its outcome has been submitted to the writer
ENDED = 5  # its outcome is committed
ON_DISK = 6  # given back untried: only the row is left, and whoever still holds the entry drops it

# Events.
ADD = "add"  # to the window
BEGIN = "begin"  # an attempt
AGAIN = "again"  # an attempt that reached no peer: it waits on
PUT_BACK = "put back"
CLAIM = "claim"
FINISH = "finish"  # by delivery
END = "end"  # by whoever has claimed it
RECORD = "record"  # the outcome is committed, or the message had left the queue before

TRANSITIONS: dict[int, dict[str, int]] = {
    READ: {ADD: WAITING, CLAIM: CLAIMED},
    WAITING: {BEGIN: IN_FLIGHT, PUT_BACK: ON_DISK, CLAIM: CLAIMED, FINISH: ENDING},
    IN_FLIGHT: {AGAIN: WAITING, PUT_BACK: ON_DISK, FINISH: ENDING},
    CLAIMED: {PUT_BACK: CLAIMED, END: ENDING},
    ENDING: {RECORD: ENDED},
    ENDED: {},
    ON_DISK: {PUT_BACK: ON_DISK},
}

# Why an event of delivery is refused.
REFUSALS = {
    READ: "the entry was never offered",
    WAITING: "the entry is not in flight",
    CLAIMED: "the entry is not in flight",
    ON_DISK: "the entry is not in flight",
    ENDING: "the entry has an outcome already",
    ENDED: "the entry has an outcome already",
}  # (not one of an entry in flight, which may do all that delivery may ask for)

KEPT_LEFT = 10_000


class Mistake(Exception):
    """A transition that the table does not have: a defect of this package."""


def fire(entry: "Entry", event: str) -> None:
    """Let an event happen to an entry. Mistake, and nothing is changed, when its state does not allow it."""
    after = TRANSITIONS[entry.state].get(event)
    if after is None:
        raise Mistake(f"{event} of an entry in state {entry.state}")
    entry.state = after


def refusal(entry: "Entry", event: str) -> str:
    """Why delivery may not let an event happen to an entry; "" when it may."""
    return "" if event in TRANSITIONS[entry.state] else REFUSALS[entry.state]


class Lifecycle:
    """The entries in memory, the claims on messages and queues, and the reads under way. All methods run on the loop; only
    `has` is also called by reader threads.

    Half of `window` (entries) is for fresh mail, half for what scans find. `window_bytes`: octets of message data that the
    entries may hold, fresh or read for delivery. `offer(entry)` gives an entry to delivery; `failed(entry, error)` is called
    when it raised, with the entry put back."""

    def __init__(
        self, offer: Callable[["Entry"], None], failed: Callable[["Entry", Exception], None], window: int, window_bytes: int
    ) -> None:
        self._offer = offer
        self._failed = failed
        self.half = window // 2
        self._window_bytes = window_bytes
        self._entries: dict[tuple[int, int], Entry] = {}
        self.fresh = 0  # entries of fresh mail
        self.scanned = 0  # all others
        self.octets = 0  # of message data that the entries hold
        self._keeps_data = True
        self.paused = False  # the window takes nothing more
        self._claimed: set[int] = set()  # messages
        self._claimed_queues: set[int] = set()
        self._resting: set[int] = set()  # messages whose change the disk has refused: scans leave them alone for a while
        # The marks of the reads under way: the value of `_changes` when each began. And what has left memory or was changed
        # meanwhile: (id, queue) an entry, (id, 0) a whole message, (0, queue) a whole queue -> the value of `_changes` then.
        self._readings: list[int] = []
        self._changes = 0
        self._left: dict[tuple[int, int], int] = {}
        self._moved: dict[int, tuple[int, Body]] = {}  # bodies that compaction moved meanwhile: the value then, and the place

    def resize(self, window: int, window_bytes: int) -> None:
        """Change the bounds. Entries beyond them stay; no other is added until there is room."""
        self.half = window // 2
        self._window_bytes = window_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, ident: int, queue: int) -> "Entry | None":
        """The entry of a message in a queue; None when it is not in memory."""
        return self._entries.get((ident, queue))

    def has(self, ident: int, queue: int) -> bool:
        """Whether a row is not to be added: its entry is in memory, or its message is claimed or rests."""
        return (ident, queue) in self._entries or ident in self._claimed or ident in self._resting

    def claimed_queue(self, queue: int) -> bool:
        """Whether a change of this whole queue is under way."""
        return queue in self._claimed_queues

    # Into the window

    def add_fresh(self, entries: list["Entry"]) -> bool:
        """Add and offer the entries of a message that was just committed; False when one of them did not fit."""
        whole = True
        for entry in entries:
            key = (entry.ident, entry.queue)
            if key in self._entries:
                continue
            if self.fresh >= self.half or self.paused or entry.ident in self._claimed:
                whole = False
                continue
            size = entry.envelope.size
            if self.octets + size > self._window_bytes or not self._keeps_data:
                entry.data = None
            elif entry.data is not None:
                entry.octets = size
                self.octets += size
            self.fresh += 1
            self._entries[key] = entry
            entry.state = WAITING  # ADD
            try:
                self._offer(entry)
            except Exception as error:
                self._refused(entry, error)
        return whole

    def add_read(self, entry: "Entry", mark: int) -> bool:
        """Add and offer an entry that a scan has read with this mark; False when it is outdated or claimed, so that a later scan
        has to read it again."""
        key = (entry.ident, entry.queue)
        if key in self._entries:
            return True
        if entry.ident in self._claimed or entry.queue in self._claimed_queues or self.outdated(entry, mark):
            return False
        self._take_in(entry, ADD, mark)
        try:
            self._offer(entry)
        except Exception as error:
            self._refused(entry, error)
        return True

    def _refused(self, entry: "Entry", error: Exception) -> None:
        """The deliverer raised an exception over an entry: a defect, which must not keep others from it."""
        self.put_back(entry)
        self._failed(entry, error)

    def _take_in(self, entry: "Entry", event: str, mark: int) -> None:
        """Put an entry that was read from disk with this mark into the table."""
        key = (entry.ident, entry.queue)
        if key in self._entries:
            raise Mistake(f"{event} of a placement that is in memory")
        fire(entry, event)
        when, body = self._moved.get(entry.ident, (0, None))
        if when > mark:  # after the read began; a later read has found this place, or where an outcome has put it since
            entry.envelope.body = body
        entry.scanned = True
        self.scanned += 1
        self._entries[key] = entry

    # Delivery

    def begin(self, entry: "Entry") -> bool:
        """An attempt to deliver a waiting entry begins. False: somebody else has claimed it, and the caller drops it."""
        if entry.state == WAITING:  # BEGIN
            entry.state = IN_FLIGHT
            return True
        return False

    def put_back(self, entry: "Entry") -> str:
        """Remove an entry that was not tried: a scan finds its row again. One that somebody else has claimed, or that was put
        back before, is left alone. Why it is refused; "" when it is not."""
        state = entry.state
        why = refusal(entry, PUT_BACK)
        if not why:
            fire(entry, PUT_BACK)
            if state != entry.state:
                self._remove(entry)
        return why

    def record(self, entry: "Entry") -> None:
        """An entry's outcome is committed, or its message had left the queue before: it leaves memory."""
        if entry.state == ENDING:  # RECORD
            entry.state = ENDED
            self._remove(entry)

    def _remove(self, entry: "Entry") -> None:
        key = (entry.ident, entry.queue)
        del self._entries[key]
        if entry.octets:
            self.octets -= entry.octets
            entry.octets = 0
        if entry.scanned:
            self.scanned -= 1
        else:
            self.fresh -= 1
        if self._readings:
            self._note(key)

    # Claims

    def claim(self, idents: Iterable[int]) -> set[int]:
        """Claim these messages for an operator's change: they leave the window and are not offered until `release_claim`. The
        ids of those claimed: all but those in flight, ending, or claimed before."""
        wanted = set(idents) - self._claimed
        matching = [entry for entry in self._entries.values() if entry.ident in wanted]
        claimed = wanted - {entry.ident for entry in matching if entry.state != WAITING}
        for entry in matching:
            if entry.ident in claimed:
                fire(entry, CLAIM)
                self._remove(entry)
        self._claimed |= claimed
        self._resting -= claimed
        return claimed

    def release_claim(self, claimed: set[int], rest: bool = False) -> None:
        """End a claim: the change is committed or failed. Rows of these messages that were read before are outdated. `rest`:
        scans leave them alone until `wake`; expiry and other changes do not."""
        self._claimed -= claimed
        if rest:
            self._resting |= claimed
        if self._readings:
            for ident in claimed:
                self._note((ident, 0))

    def wake(self, idents: set[int]) -> None:
        """These messages have rested long enough."""
        self._resting -= idents

    def claim_queues(self, queues: set[int], route: str) -> int:
        """Claim whole queues for a move to `route`: what waits leaves the window, and no scan adds what is in them until
        `release_queues`. How many entries are in flight or ending, and stay: they move to `route` when they are deferred."""
        self._claimed_queues |= queues
        matching = [entry for entry in self._entries.values() if entry.queue in queues]
        staying = 0
        for entry in matching:
            if entry.state == WAITING:
                fire(entry, PUT_BACK)
                self._remove(entry)
            else:
                staying += 1
                entry.envelope.route = route
        return staying

    def release_queues(self, queues: set[int]) -> None:
        """End a claim of whole queues: rows of them that were read before are outdated."""
        self._claimed_queues -= queues
        if self._readings:
            for queue in queues:
                self._note((0, queue))

    def seize(self, entry: "Entry", mark: int) -> "Entry | None":
        """Claim the placement of an entry that was read from disk with this mark, to end it: the entry to end. None when it is in
        flight, claimed, or outdated."""
        known = self._entries.get((entry.ident, entry.queue))
        if known is not None:
            if known.state != WAITING:
                return None
            fire(known, CLAIM)  # whoever still holds it drops it; it stays here until its outcome is committed
            return known
        if entry.ident in self._claimed or self.outdated(entry, mark):
            return None
        self._take_in(entry, CLAIM, mark)
        return entry

    def adopt(self, entry: "Entry", mark: int) -> None:
        """Take over an entry, read from disk with this mark, of a message that the caller's change has claimed, to end it."""
        self._take_in(entry, CLAIM, mark)

    # Reads of the disk

    def begin_reading(self) -> int:
        """Note that a read of the disk begins; its mark, for `outdated` and `end_reading`."""
        self._readings.append(self._changes)
        return self._changes

    def end_reading(self, mark: int) -> None:
        """Note that what was read with this mark has been used."""
        self._readings.remove(mark)
        if not self._readings:
            self._left.clear()
            self._moved.clear()
        elif len(self._left) + len(self._moved) > KEPT_LEFT:  # reads overlap without a gap: keep what the oldest needs
            oldest = min(self._readings)
            self._left = {key: when for key, when in self._left.items() if when > oldest}
            self._moved = {ident: moved for ident, moved in self._moved.items() if moved[0] > oldest}

    def _note(self, key: tuple[int, int]) -> None:
        """Make rows of `key` that the reads under way have read outdated."""
        self._changes += 1
        self._left[key] = self._changes

    def outdated(self, entry: "Entry", mark: int) -> bool:
        """Whether an entry read with this mark may have left or changed since it was read."""
        left, ident, queue = self._left, entry.ident, entry.queue
        return bool(left) and (
            left.get((ident, queue), 0) > mark or left.get((ident, 0), 0) > mark or left.get((0, queue), 0) > mark
        )

    def moved(self, ident: int, queues: list[int], body: Body) -> None:
        """Update the entries of a message whose body compaction moved."""
        for queue in queues:
            entry = self._entries.get((ident, queue))
            if entry is not None:
                entry.envelope.body = body
        if self._readings:
            self._changes += 1
            self._moved[ident] = (self._changes, body)

    # The budget for message data

    @property
    def crowded(self) -> bool:
        """Whether message data takes more than half of `window_bytes`."""
        return 2 * self.octets > self._window_bytes

    def reserve(self, entries: list["Entry"]) -> list["Entry"]:
        """Of entries whose data is to be read for delivery, those for which there is room, which is reserved: up to half of
        `window_bytes`, so that reads leave room for fresh mail; but always the first one, so that delivery goes on."""
        taken: list[Entry] = []
        for entry in entries:
            if taken and self.crowded:
                break
            if not entry.octets and (entry.state == WAITING or entry.state == IN_FLIGHT):
                entry.octets = entry.envelope.size
                self.octets += entry.octets
            taken.append(entry)
        return taken

    def keep(self, entry: "Entry", data: list[bytes] | None) -> None:
        """Keep data that was read for an entry as long as the entry is in memory; give its room back when there is none."""
        if not entry.octets:  # it has left memory meanwhile
            return
        if data is None and entry.data is None:
            self.octets -= entry.octets
            entry.octets = 0
        elif entry.data is None:
            entry.data = data

    def keep_data(self, keep: bool) -> None:
        """Whether the data of fresh messages stays in memory. False also drops what is there, but for entries in flight."""
        self._keeps_data = keep
        if keep:
            return
        for entry in self._entries.values():
            if entry.octets and entry.state == WAITING and entry.data is not None:
                self.octets -= entry.octets
                entry.octets, entry.data = 0, None
