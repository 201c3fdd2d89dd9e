"""One write transaction of a shard: what happens to users, mailboxes and messages. Each method is all or nothing: it checks
first, and raises Refusal before it has changed anything.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from relaymta.disk.clock import wall_ms
from relaymta.proto.envelope import encode
from relaymta.proto.imap_records import LAST_UID, RECORD, apply, changed, count, load, untold, values
from relaymta.store import scripts
from relaymta.store.asked import Copied, Stored
from relaymta.store.blocks import Record, records_of
from relaymta.store.collected import (
    CANNOT,
    EXISTS,
    LIMIT,
    MAILBOXES_MOST,
    MISSING,
    MOVING,
    OVERQUOTA,
    Collected,
    Refusal,
    tally,
)
from relaymta.store.rows import (
    ANY_ATTEMPT,
    DELETED,
    DONE,
    EXPUNGED,
    FILED,
    ID,
    INBOX,
    MESSAGE,
    MESSAGE_KIND,
    SEEN,
    SYSTEM_FLAGS,
    UNFINISHED,
    MailboxRow,
    MailboxState,
    MessageRow,
    UnfinishedRow,
    UserRow,
    decode_message,
    expunged_of,
    expunged_value,
    runs_of,
)

__all__ = ["CANNOT", "EXISTS", "LIMIT", "MISSING", "MOVING", "NO_LIMITS", "OVERQUOTA", "Change", "Filed", "Limits", "Refusal"]

EXPUNGED_MOST = 100_000  # UIDs of a mailbox that are known to have been expunged
EXPUNGED_SECONDS = 90 * 86400
FORGOTTEN_TOGETHER = 10  # rows

_ALL = (1 << 64) - 1
SYSTEM = (1 << SYSTEM_FLAGS) - 1


class Limits(NamedTuple):
    """A user's quota; 0: any."""

    octets: int = 0
    messages: int = 0


NO_LIMITS = Limits()


class Filed(NamedTuple):
    """Where a message is now."""

    mailbox: int
    uidvalidity: int
    uid: int
    modseq: int


class Change(Collected):
    """One write transaction: methods, then `finish`, or `abort` after an exception."""

    # Users

    def add_user(self, user: int, mailboxes: Iterable[tuple[str, str]], uidvalidity: int) -> None:
        """Add a user with INBOX and these mailboxes (name and special use), subscribed to all. `uidvalidity`: of the first, by
        the wall clock (s)."""
        self.take_user(user, uidvalidity)
        for name, special in ((INBOX, ""), *mailboxes):
            self.create_mailbox(user, name, special, subscribed=True)

    def freeze(self, user: int, frozen: bool = True) -> None:
        """Change nothing of a user from now on but by `purge`; or again."""
        self.user(user).frozen = frozen

    def purge(self, user: int, most: int) -> int:
        """Remove a user with all mailboxes, whose names go first, or a part of that: at most so many rows. 0 while the user is
        there; then a UIDVALIDITY (1 at least) that is higher than all that the user's mailboxes have had."""
        if not self.is_user(user):
            return 1
        for row in list(self.shard.mailboxes(self.txn, user)):
            if row.mailbox:
                self.abandon(user, row.mailbox)
            self.remove_name(user, row.name)
        self.scripted.add(user)
        most -= scripts.clear(self.shard, self.txn, user, most)
        if most <= 0:
            return 0
        for _, number, unfinished in list(self.shard.unfinished(self.txn, user)):
            if unfinished.removed:
                most -= self.purge_mailbox(unfinished.mailbox, most)
                if most <= 0:
                    return 0
            self.remove_unfinished(user, number)
        uidvalidity = self.user(user).uidvalidity
        self.remove_user(user)
        return max(uidvalidity, 1)

    # A user who comes from another shard, or a backup

    def take_user(self, user: int, uidvalidity: int) -> None:
        """Add a user without mailboxes, which `take_mailbox` brings. `uidvalidity`: of the next mailbox."""
        if self.is_user(user):
            raise Refusal(EXISTS, "the user exists")
        self.put_user(user, UserRow(uidvalidity=uidvalidity))

    def take_mailbox(
        self, user: int, row: MailboxRow, state: MailboxState | None, expunged: list[tuple[int, list[tuple[int, int]]]]
    ) -> None:
        """Add a mailbox as it was elsewhere, without its messages, which `file` brings with their UIDs."""
        self.user(user)
        if self.shard.mailbox(self.txn, user, row.name) is not None:
            raise Refusal(EXISTS, f"there is a mailbox {row.name}")
        number = 0
        if state is not None:
            vanished = sum(last - first + 1 for _, runs in expunged for first, last in runs)
            empty = msgspec.structs.replace(state, messages=0, unseen=0, deleted=0, octets=0, vanished=vanished)
            number = self.put_state(empty)
            for modseq, runs in expunged:
                value = expunged_value(runs, wall_ms() // 1000)
                self.txn.put(EXPUNGED.pack(number, 3, modseq), value, db=self._tables["mail"])
        self.put_mailbox(user, msgspec.structs.replace(row, mailbox=number))

    # Mailboxes

    def create_mailbox(self, user: int, name: str, special: str = "", subscribed: bool = False) -> MailboxRow:
        """Add a mailbox."""
        row = self.owner(user)
        old = self.shard.mailbox(self.txn, user, name)
        if old is not None and old.mailbox:
            raise Refusal(EXISTS, f"there is a mailbox {name}")
        if old is None:
            self.check_names(user)
        number = self.put_state(MailboxState(row.uidvalidity))
        row.uidvalidity += 1
        new = MailboxRow(name, number, special, subscribed or (old is not None and old.subscribed))
        self.put_mailbox(user, new)
        return new

    def check_names(self, user: int, more: int = 1) -> None:
        """Whether a user may have so many more names. Refusal."""
        if self.shard.count_names(self.txn, user) + more > MAILBOXES_MOST:
            raise Refusal(LIMIT, f"{MAILBOXES_MOST} mailboxes are the most that a user may have")

    def abandon(self, user: int, mailbox: int) -> None:
        """A mailbox has lost its name: it is there for nobody from now on, and counts no more. Its rows go by `purge_mailbox`."""
        owner, state = self.user(user), self.find_state(mailbox)
        if state is not None:
            owner.messages -= state.messages
            owner.octets -= state.octets
            self.touched[mailbox] = state.modseq + 1
            self.remove_state(mailbox)
        self.put_unfinished(user, mailbox, UnfinishedRow(mailbox, removed=True))

    def purge_mailbox(self, mailbox: int, most: int) -> int:
        """Remove rows of an abandoned mailbox; how many: `most` while there may be more."""
        cursor = self.txn.cursor(db=self._tables["mail"])
        prefix = ID.pack(mailbox)
        for removed in range(most):
            if not cursor.set_range(prefix) or cursor.key()[:8] != prefix:
                return removed
            key, value = cursor.item()
            if key[8] == MESSAGE_KIND:
                self.unreference(decode_message(value).object)
            cursor.delete()
        return most

    def put_unfinished(self, user: int, number: int, row: UnfinishedRow) -> None:
        """Write what a user has begun."""
        self.txn.put(UNFINISHED.pack(0, 4, user, number), encode(row), db=self._tables["mail"])

    def remove_unfinished(self, user: int, number: int) -> None:
        """It has come to its end."""
        self.txn.delete(UNFINISHED.pack(0, 4, user, number), db=self._tables["mail"])

    # Messages

    def refer(self, ident: int, references: int) -> None:
        """Further messages of data that is there."""
        self.object(ident).references += references

    def size(self, ident: int) -> int:
        """The octets of a message's data. Refusal when it is not there."""
        return self.object(ident).body.length

    def file(
        self, user: int, name: str, message: MessageRow, flags: int, keywords: list[str], limits: Limits,
        place: tuple[int, int] | None = None,
    ) -> Filed:  # fmt: skip
        """Add a message to a mailbox (of which the caller counts a reference by `put_object` or `refer`). `place`: UID and MODSEQ
        that it has, in a mailbox of `take_mailbox`; in the order of UIDs."""
        owner, row = self.owner(user), self.mailbox(user, name)
        self.check_room(owner, limits, 1, message.size)
        return self.add(user, row.mailbox, message, flags, keywords, place)

    def add(
        self, user: int, mailbox: int, message: MessageRow, flags: int, keywords: list[str], place: tuple[int, int] | None = None
    ) -> Filed:
        """As `file`, into a mailbox by its id, whatever the user's quota is."""
        owner, state = self.owner(user), self.state(mailbox)
        if state.uidnext >= LAST_UID:  # UIDNEXT has to be a UID, too
            raise Refusal(LIMIT, "the mailbox has had as many messages as it can")
        flags |= self.bits(state, keywords)
        if place is not None:
            uid, modseq = place
        else:
            uid, state.uidnext = state.uidnext, state.uidnext + 1
            modseq = self.raised(mailbox, state)
        self.add_record(mailbox, RECORD.pack(uid, 0, flags, modseq))
        self.txn.put(MESSAGE.pack(mailbox, MESSAGE_KIND, uid), encode(message), db=self._tables["mail"])
        tally(state, owner, flags, message.size, 1)
        return Filed(mailbox, state.uidvalidity, uid, modseq)

    def check_room(self, owner: UserRow, limits: Limits, messages: int, octets: int) -> None:
        """Whether a user may have so much more. Refusal."""
        if limits.octets and owner.octets + octets > limits.octets:
            raise Refusal(OVERQUOTA, f"{owner.octets} of {limits.octets} octets are used")
        if limits.messages and owner.messages + messages > limits.messages:
            raise Refusal(OVERQUOTA, f"there are {owner.messages} of {limits.messages} messages")

    def store_flags(
        self, user: int, mailbox: int, uids: list[int], how: str, flags: int, keywords: list[str], unchanged_since: int | None
    ) -> Stored:
        """Add ("+"), remove ("-") or replace ("") flags of messages (UIDs in order; those that are gone are left out). Those that
        have changed since MODSEQ `unchanged_since` are left alone; a message that has the flags already does not change."""
        self.check_owner(user)
        state, index = self.state(mailbox), self.index(mailbox)
        chosen, modified = index.choose(uids), list[int]()
        if unchanged_since is not None:
            modified = [*values(load([changed([one.records], unchanged_since) for one in chosen]))]
            chosen = [one._replace(records=untold(one.records, changed([one.records], unchanged_since))) for one in chosen]
        before = [one.records for one in chosen if one.records]
        after = before
        if before:
            keep, add = self._masks(state, how, flags, keywords)
            after = [apply(records, keep, add, state.modseq + 1) for records in before]
        if after != before:
            self.raised(mailbox, state)
            state.unseen += count(after, 0, SEEN) - count(before, 0, SEEN)
            state.deleted += count(after, DELETED, 0) - count(before, DELETED, 0)
            for one, records in zip((one for one in chosen if one.records), after, strict=True):
                if records != one.records:
                    index.replace(one, records)
        return Stored(b"".join(before), b"".join(after), modified, state.keywords)

    def _masks(self, state: MailboxState, how: str, flags: int, keywords: list[str]) -> tuple[int, int]:
        """The flags that messages keep, and those that they get."""
        if how == "-":
            known = {keyword.lower() for keyword in state.keywords}
            return _ALL ^ (flags | self.bits(state, [keyword for keyword in keywords if keyword.lower() in known])), 0
        return _ALL if how == "+" else 0, flags | self.bits(state, keywords)

    def copy(
        self, user: int, mailbox: int, uids: list[int], target: int, now: int, limits: Limits = NO_LIMITS, move: bool = False
    ) -> Copied:
        """Copy messages (UIDs in order; those that are gone are left out) to the user's mailbox `target`, or move them there.
        `now`: ms, wall clock."""
        owner, into = self.owner(user), self.state(target)
        source = self.shard.state(self.txn, mailbox) if mailbox != target else into
        if source is None:
            raise Refusal(CANNOT, "the mailbox is gone")
        found = self._there(mailbox, uids)
        copied = Copied(target, into.uidvalidity, [record.uid for record, _ in found])
        if not found:
            return copied
        self.check_room(owner, limits, len(found), sum(message.size for _, message in found))
        if into.uidnext + len(found) > LAST_UID:
            raise Refusal(LIMIT, "the mailbox has had as many messages as it can")
        words = self._translated(source, into, {record.flags >> SYSTEM_FLAGS for record, _ in found})
        records = bytearray()
        for uid, (record, message) in enumerate(found, into.uidnext):
            modseq = self.raised(target, into)  # each its own: see `reading.changes` of view/
            flags = record.flags & SYSTEM | words[record.flags >> SYSTEM_FLAGS]
            records += RECORD.pack(uid, 0, flags, modseq)
            row = msgspec.structs.replace(message, saved=now)
            self.txn.put(MESSAGE.pack(target, MESSAGE_KIND, uid), encode(row), db=self._tables["mail"])
            tally(into, owner, flags, message.size, 1)
            copied.copies.append(uid)
            if not move:
                self.object(message.object).references += 1
        into.uidnext += len(found)
        self.index(target).extend(bytes(records))
        if move:
            self._remove(owner, mailbox, found, referred=True)
        return copied

    def _there(self, mailbox: int, uids: list[int]) -> list[tuple[Record, MessageRow]]:
        """The messages with these UIDs that are there."""
        chosen = self.index(mailbox).choose(uids)
        records = records_of(b"".join(one.records for one in chosen))
        found = ((record, self.shard.message(self.txn, mailbox, record.uid)) for record in records)
        return [(record, message) for record, message in found if message is not None]

    def _translated(self, source: MailboxState, into: MailboxState, keywords: set[int]) -> dict[int, int]:
        """Bits of keywords of one mailbox: those of the same keywords in another."""
        return {
            bits: self.bits(into, [word for number, word in enumerate(source.keywords) if bits >> number & 1])
            for bits in sorted(keywords)
        }

    def expunge(self, user: int, mailbox: int, uids: list[int], marked: bool = False) -> int:
        """Remove messages (UIDs in order; those that are gone are left out, and, where `marked`, those without \\Deleted); the
        MODSEQ of that, 0 when all were gone."""
        return self.expunge_as(self.owner(user), mailbox, uids, marked)

    def expunge_as(self, owner: UserRow, mailbox: int, uids: list[int], marked: bool = False) -> int:
        """As `expunge`, also while the user is frozen."""
        self.state(mailbox)
        there = self._there(mailbox, uids)
        gone = [one for one in there if one[0].flags & DELETED] if marked else there
        return self._remove(owner, mailbox, gone) if gone else 0

    def _remove(self, owner: UserRow, mailbox: int, messages: list[tuple[Record, MessageRow]], referred: bool = False) -> int:
        """Remove messages that are there. `referred`: other messages point at their objects instead."""
        state = self.state(mailbox)
        modseq = self.raised(mailbox, state)
        for record, message in messages:
            self.txn.delete(MESSAGE.pack(mailbox, MESSAGE_KIND, record.uid), db=self._tables["mail"])
            tally(state, owner, record.flags, message.size, -1)
            if not referred:
                self.unreference(message.object)
        gone, now = [record.uid for record, _ in messages], wall_ms() // 1000
        self.index(mailbox).remove(gone)
        self.txn.put(EXPUNGED.pack(mailbox, 3, modseq), expunged_value(runs_of(gone), now), db=self._tables["mail"])
        state.vanished += len(gone)
        self._forget_expunged(mailbox, state, now - EXPUNGED_SECONDS)
        return modseq

    def _forget_expunged(self, mailbox: int, state: MailboxState, before: int) -> None:
        """Forget some of what was expunged first, where it is more than is kept, or older (s, wall clock)."""
        cursor = self.txn.cursor(db=self._tables["mail"])
        prefix = EXPUNGED.pack(mailbox, 3, 0)[:9]
        for _ in range(FORGOTTEN_TOGETHER):
            if not cursor.set_range(prefix) or cursor.key()[:9] != prefix:
                return
            when, runs = expunged_of(cursor.value())
            if state.vanished <= EXPUNGED_MOST and not 0 < when < before:
                return
            state.forgotten = EXPUNGED.unpack(cursor.key())[2]
            state.vanished = max(state.vanished - sum(last - first + 1 for first, last in runs), 0)
            cursor.delete()

    # Deliveries of the queue

    def is_done(self, queue_id: int, recipient: int, user: int) -> bool:
        """Whether this recipient's message was filed for a user."""
        return self.shard.is_done(self.txn, queue_id, recipient, user)

    def done(self, queue_id: int, recipient: int, user: int, now: int, attempt: int = ANY_ATTEMPT) -> None:
        """Note that a recipient's message is filed for a user (`now`: ms of the shard's clock)."""
        self.txn.put(DONE.pack(queue_id, recipient, user), FILED.pack(now, attempt), db=self._tables["done"])

    def forget_done(self, queue_id: int, recipient: int) -> None:
        """The queue has ended a recipient of a message: nobody asks for it again."""
        cursor = self.txn.cursor(db=self._tables["done"])
        prefix = DONE.pack(queue_id, recipient, 0)[:12]
        while cursor.set_range(prefix) and cursor.key()[:12] == prefix:
            cursor.delete()

    def forget_ended(self, queue_ids: list[int], most: int) -> int:
        """The queue has ended these messages: as `forget_done`, of so many rows at most; of how many."""
        cursor, removed = self.txn.cursor(db=self._tables["done"]), 0
        for queue_id in queue_ids:
            prefix = ID.pack(queue_id)
            while removed < most and cursor.set_range(prefix) and cursor.key()[:8] == prefix:
                cursor.delete()
                removed += 1
        return removed
