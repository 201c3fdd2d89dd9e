"""One write transaction of a shard: what happens to users, mailboxes and messages. Each method is all or nothing: it checks
first, and raises Refusal before it has changed anything.

States of mailboxes, users' rows and references of objects are collected, and written once by `finish` (or before a part).
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from relaymta.disk.transaction import Transaction
from relaymta.errors import RelayError
from relaymta.proto.envelope import Body, encode
from relaymta.store.blocks import LAST_UID, Record
from relaymta.store.rows import (
    DELETED,
    DONE,
    EXPUNGED,
    ID,
    INBOX,
    KEYWORDS_MOST,
    MESSAGE,
    RUN,
    SEEN,
    STATE,
    SYSTEM_FLAGS,
    MailboxRow,
    MailboxState,
    MailShard,
    MessageRow,
    ObjectRow,
    UserRow,
    name_key,
    pairs,
)

__all__ = ["CANNOT", "EXISTS", "LIMIT", "MISSING", "MOVING", "OVERQUOTA", "Change", "Filed", "Limits", "Refusal", "tally"]

# Why something is refused (the response codes of RFC 5530 and RFC 9208).
MISSING, EXISTS, OVERQUOTA, LIMIT, CANNOT = "nonexistent", "alreadyexists", "overquota", "limit", "cannot"
MOVING = "unavailable"

MAILBOXES_MOST = 10_000  # of a user


class Refusal(RelayError):
    """The store does not do what was asked; nothing has changed. `code`: why, for programs."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Limits(NamedTuple):
    """A user's quota; 0: any."""

    octets: int = 0
    messages: int = 0


class Filed(NamedTuple):
    """Where a message is now."""

    mailbox: int
    uidvalidity: int
    uid: int
    modseq: int


class Change(Transaction):
    """One write transaction, used on one thread: methods, then `finish`, or `abort` after an exception. `freed`: bodies that
    nothing points at any more. `touched`: the MODSEQ of each mailbox that has changed."""

    def __init__(self, shard: MailShard) -> None:
        super().__init__(shard)
        self._shard = shard
        self._states: dict[int, MailboxState] = {}
        self._users: dict[int, UserRow] = {}
        self._objects: dict[int, ObjectRow] = {}
        self._before: tuple[int, dict[int, int]] = (0, {})  # what `undo_part` restores
        self._meta: dict[bytes, int] = {}
        self.freed: list[tuple[int, Body]] = []
        self.touched: dict[int, int] = {}

    # What is collected

    def _user(self, user: int) -> UserRow:
        row = self._users.get(user) or self._shard.user(self.txn, user)
        if row is None:
            raise Refusal(MISSING, "no such user")
        self._users[user] = row
        return row

    def _owner(self, user: int) -> UserRow:
        """The row of a user who is to be changed."""
        row = self._user(user)
        if row.frozen:
            raise Refusal(MOVING, "the user is being moved; try again")
        return row

    def _state(self, mailbox: int) -> MailboxState:
        state = self._states.get(mailbox) or self._shard.state(self.txn, mailbox)
        if state is None:
            raise Refusal(MISSING, "no such mailbox")
        self._states[mailbox] = state
        return state

    def _object(self, ident: int) -> ObjectRow:
        row = self._objects.get(ident) or self._shard.object(self.txn, ident)
        if row is None:
            raise Refusal(MISSING, "no such message")
        self._objects[ident] = row
        return row

    def _number(self, key: bytes) -> int:
        value = self._meta.get(key)
        return self._shard.meta_in(self.txn, key) if value is None else value

    def _change_mailbox(self, mailbox: int, state: MailboxState) -> int:
        """The MODSEQ of a change of a mailbox."""
        state.modseq += 1
        self.touched[mailbox] = state.modseq
        return state.modseq

    # Users

    def add_user(self, user: int, mailboxes: Iterable[tuple[str, str]], uidvalidity: int) -> None:
        """Add a user with INBOX and these mailboxes (name and special use), subscribed to all. `uidvalidity`: of the first, by
        the wall clock (s)."""
        if self._shard.user(self.txn, user) is not None or user in self._users:
            raise Refusal(EXISTS, "the user exists")
        self._users[user] = UserRow(uidvalidity=uidvalidity)
        for name, special in ((INBOX, ""), *mailboxes):
            self.create_mailbox(user, name, special, subscribed=True)

    def freeze(self, user: int, frozen: bool = True) -> None:
        """Change nothing of a user from now on but by `purge`; or again."""
        self._user(user).frozen = frozen

    def purge(self, user: int, most: int) -> int:
        """Remove a user with all mailboxes, or a part of that: at most so many messages. 0 while the user is there; then a
        UIDVALIDITY (1 at least) that is higher than all that the user's mailboxes have had."""
        if user not in self._users and self._shard.user(self.txn, user) is None:
            return 1
        owner = self._user(user)
        for row in list(self._shard.mailboxes(self.txn, user)):
            if row.mailbox:
                uids = [record.uid for record, _ in zip(self._shard.index(self.txn, row.mailbox), range(most), strict=False)]
                self._expunge(owner, row.mailbox, uids)
                most -= len(uids)
                if next(iter(self._shard.index(self.txn, row.mailbox)), None) is not None:
                    return 0
                self._remove_rows(row.mailbox)
            self.txn.delete(name_key(user, row.name), db=self._tables["mailbox"])
            if most <= 0:
                return 0
        del self._users[user]
        self.txn.delete(ID.pack(user), db=self._tables["user"])
        return max(owner.uidvalidity, 1)

    # A user who comes from another shard, or a backup

    def take_user(self, user: int, uidvalidity: int) -> None:
        """Add a user without mailboxes, which `take_mailbox` brings. `uidvalidity`: of the next mailbox."""
        if self._shard.user(self.txn, user) is not None or user in self._users:
            raise Refusal(EXISTS, "the user exists")
        self._users[user] = UserRow(uidvalidity=uidvalidity)

    def take_mailbox(
        self, user: int, row: MailboxRow, state: MailboxState | None, expunged: list[tuple[int, list[tuple[int, int]]]]
    ) -> None:
        """Add a mailbox as it was elsewhere, without its messages, which `file` brings with their UIDs."""
        self._user(user)
        if self._shard.mailbox(self.txn, user, row.name) is not None:
            raise Refusal(EXISTS, f"there is a mailbox {row.name}")
        number = 0
        if state is not None:
            self._meta[b"mailboxes"] = number = self._number(b"mailboxes") + 1
            self._states[number] = msgspec.structs.replace(state, messages=0, unseen=0, deleted=0, octets=0)
            for modseq, runs in expunged:
                packed = b"".join(RUN.pack(*run) for run in runs)
                self.txn.put(EXPUNGED.pack(number, 3, modseq), packed, db=self._tables["mail"])
        self._put_mailbox(user, msgspec.structs.replace(row, mailbox=number))

    # Mailboxes

    def create_mailbox(self, user: int, name: str, special: str = "", subscribed: bool = False) -> MailboxRow:
        """Add a mailbox."""
        row = self._owner(user)
        old = self._shard.mailbox(self.txn, user, name)
        if old is not None and old.mailbox:
            raise Refusal(EXISTS, f"there is a mailbox {name}")
        if sum(1 for _ in self._shard.mailboxes(self.txn, user)) >= MAILBOXES_MOST:
            raise Refusal(LIMIT, f"{MAILBOXES_MOST} mailboxes are the most that a user may have")
        number = self._number(b"mailboxes") + 1
        self._meta[b"mailboxes"] = number
        self._states[number] = MailboxState(row.uidvalidity)
        row.uidvalidity += 1
        new = MailboxRow(name, number, special, subscribed or (old is not None and old.subscribed))
        self._put_mailbox(user, new)
        return new

    def _put_mailbox(self, user: int, row: MailboxRow) -> None:
        self.txn.put(name_key(user, row.name), encode(row), db=self._tables["mailbox"])

    def remove_mailbox(self, user: int, name: str) -> None:
        """Remove a mailbox whose messages are gone; its name stays while it is subscribed."""
        self._owner(user)
        row = self._shard.mailbox(self.txn, user, name)
        if row is None or not row.mailbox:
            raise Refusal(MISSING, f"there is no mailbox {name}")
        if self._state(row.mailbox).messages:
            raise Refusal(CANNOT, f"{name} has messages")
        self._remove_rows(row.mailbox)
        if row.subscribed:
            self._put_mailbox(user, MailboxRow(name, 0, "", True))
        else:
            self.txn.delete(name_key(user, name), db=self._tables["mailbox"])

    def _remove_rows(self, mailbox: int) -> None:
        """Remove what is left of a mailbox without messages."""
        self._states.pop(mailbox, None)
        cursor = self.txn.cursor(db=self._tables["mail"])
        prefix = ID.pack(mailbox)
        while cursor.set_range(prefix) and cursor.key()[:8] == prefix:
            cursor.delete()

    # Messages

    def add_object(self, ident: int, body: Body, references: int) -> None:
        """Add a message's data, to which so many messages have been or will be filed in this transaction."""
        self._objects[ident] = ObjectRow(references, body)
        self._meta[b"highest"] = max(ident, self._number(b"highest"))

    def refer(self, ident: int, references: int) -> None:
        """Further messages of data that is there."""
        self._object(ident).references += references

    def size(self, ident: int) -> int:
        """The octets of a message's data. Refusal when it is not there."""
        return self._object(ident).body.length

    def file(
        self, user: int, name: str, message: MessageRow, flags: int, keywords: list[str], limits: Limits, create: bool = False,
        place: tuple[int, int] | None = None,
    ) -> Filed:  # fmt: skip
        """Add a message to a mailbox (of which the caller counts a reference by `add_object` or `refer`). `place`: UID and MODSEQ
        that it has, in a mailbox of `take_mailbox`; in the order of UIDs."""
        owner = self._owner(user)
        self._check_room(owner, limits, 1, message.size)
        if len(keywords) > KEYWORDS_MOST:
            raise Refusal(LIMIT, f"{KEYWORDS_MOST} keywords are the most that a message may have")
        row = self._shard.mailbox(self.txn, user, name)
        if row is None or not row.mailbox:
            if not create:
                raise Refusal(MISSING, f"there is no mailbox {name}")
            row = self.create_mailbox(user, name, subscribed=True)
        state = self._state(row.mailbox)
        if state.uidnext > LAST_UID:
            raise Refusal(LIMIT, f"{name} has had as many messages as it can")
        flags |= self._bits(state, keywords)
        if place is not None:
            uid, modseq = place
        else:
            uid, state.uidnext = state.uidnext, state.uidnext + 1
            modseq = self._change_mailbox(row.mailbox, state)
        self._shard.index(self.txn, row.mailbox).append(Record(uid, flags, modseq))
        self.txn.put(MESSAGE.pack(row.mailbox, 2, uid), encode(message), db=self._tables["mail"])
        tally(state, owner, flags, message.size, 1)
        return Filed(row.mailbox, state.uidvalidity, uid, modseq)

    def _check_room(self, owner: UserRow, limits: Limits, messages: int, octets: int) -> None:
        if limits.octets and owner.octets + octets > limits.octets:
            raise Refusal(OVERQUOTA, f"{owner.octets} of {limits.octets} octets are used")
        if limits.messages and owner.messages + messages > limits.messages:
            raise Refusal(OVERQUOTA, f"there are {owner.messages} of {limits.messages} messages")

    def _bits(self, state: MailboxState, keywords: list[str]) -> int:
        """The bits of keywords (any case); those that the mailbox does not have yet are added to it."""
        if not keywords:
            return 0
        known = {keyword.lower(): keyword for keyword in (*reversed(keywords), *state.keywords)}
        new = [
            known[word] for word in dict.fromkeys(keyword.lower() for keyword in keywords) if known[word] not in state.keywords
        ]
        if len(state.keywords) + len(new) > KEYWORDS_MOST:
            raise Refusal(LIMIT, f"{KEYWORDS_MOST} keywords are the most that a mailbox may have")
        state.keywords = [*state.keywords, *new]
        return sum(1 << (SYSTEM_FLAGS + state.keywords.index(known[word])) for word in {keyword.lower() for keyword in keywords})

    def change_flags(self, user: int, mailbox: int, uids: list[int], add: int, remove: int = 0) -> list[Record]:
        """Set and clear flags of messages (UIDs in order; those that are gone are left out); the records that have changed, all
        with one MODSEQ. A message that has them already does not change (RFC 7162 3.1)."""
        owner, state = self._owner(user), self._state(mailbox)
        index = self._shard.index(self.txn, mailbox)
        there = [record for uid in uids if (record := index.get(uid)) is not None]
        changed = [(record, flags) for record in there if (flags := (record.flags | add) & ~remove) != record.flags]
        if not changed:
            return []
        modseq = self._change_mailbox(mailbox, state)
        for record, flags in changed:
            tally(state, owner, record.flags, 0, -1)
            tally(state, owner, flags, 0, 1)
        records = [record._replace(flags=flags, modseq=modseq) for record, flags in changed]
        index.replace(records)
        return records

    def expunge(self, user: int, mailbox: int, uids: list[int]) -> int:
        """Remove messages (UIDs in order; those that are gone are left out); the MODSEQ of that, 0 when all were gone."""
        return self._expunge(self._owner(user), mailbox, uids)

    def _expunge(self, owner: UserRow, mailbox: int, uids: list[int]) -> int:
        state, index = self._state(mailbox), self._shard.index(self.txn, mailbox)
        there = [record for uid in uids if (record := index.get(uid)) is not None]
        if not there:
            return 0
        modseq = self._change_mailbox(mailbox, state)
        for record in there:
            message = self._shard.message(self.txn, mailbox, record.uid)
            assert message is not None
            self.txn.delete(MESSAGE.pack(mailbox, 2, record.uid), db=self._tables["mail"])
            tally(state, owner, record.flags, message.size, -1)
            self._unreference(message.object)
        gone = [record.uid for record in there]
        index.remove(gone)
        self.txn.put(EXPUNGED.pack(mailbox, 3, modseq), pairs(gone), db=self._tables["mail"])
        return modseq

    def _unreference(self, ident: int) -> None:
        row = self._object(ident)
        row.references -= 1
        if not row.references:
            del self._objects[ident]
            self.txn.delete(ID.pack(ident), db=self._tables["object"])
            self.freed.append((ident, row.body))

    def relocate(self, ident: int, was: Body, body: Body) -> bool:
        """Point an object at the copy of its body; False when it is gone or has moved meanwhile."""
        row = self._objects.get(ident) or self._shard.object(self.txn, ident)
        if row is None or row.body != was:
            return False
        row.body = body
        self._objects[ident] = row
        return True

    # Deliveries of the queue

    def is_done(self, queue_id: int, recipient: int, user: int) -> bool:
        """Whether this recipient's message was filed for a user."""
        return self._shard.is_done(self.txn, queue_id, recipient, user)

    def done(self, queue_id: int, recipient: int, user: int, now: int) -> None:
        """Note that a recipient's message is filed for a user (`now`: ms of the shard's clock)."""
        self.txn.put(DONE.pack(queue_id, recipient, user), ID.pack(now), db=self._tables["done"])

    def forget_done(self, queue_id: int, recipient: int) -> None:
        """The queue has ended a recipient of a message: nobody asks for it again."""
        cursor = self.txn.cursor(db=self._tables["done"])
        prefix = DONE.pack(queue_id, recipient, 0)[:12]
        while cursor.set_range(prefix) and cursor.key()[:12] == prefix:
            cursor.delete()

    # The transaction

    def set_meta(self, key: bytes, value: int) -> None:
        """Write a number in meta."""
        self._meta[key] = value

    def _settle(self) -> None:
        """Write what was collected."""
        put, tables = self.txn.put, self._tables
        for mailbox, state in self._states.items():
            put(STATE.pack(mailbox, 0), encode(state), db=tables["mail"])
        for user, row in self._users.items():
            put(ID.pack(user), encode(row), db=tables["user"])
        for ident, found in self._objects.items():
            put(ID.pack(ident), encode(found), db=tables["object"])
        for key, value in self._meta.items():
            put(key, str(value).encode(), db=tables["meta"])
        self._forget()

    def _forget(self) -> None:
        for collected in (self._states, self._users, self._objects, self._meta):
            collected.clear()

    def begin_part(self) -> None:
        """Begin a nested transaction, which `keep_part` or `undo_part` ends."""
        self._settle()  # so that what is undone can be read again as it was
        self._before = len(self.freed), dict(self.touched)
        super().begin_part()

    def keep_part(self) -> None:
        """Keep the part: it is committed if the whole transaction is."""
        self._settle()
        super().keep_part()

    def undo_part(self) -> None:
        """Undo all changes of the part."""
        super().undo_part()
        self._forget()
        freed, self.touched = self._before
        del self.freed[freed:]

    def finish(self, now: int) -> None:
        """Write what was collected, and commit. lmdb.Error: nothing of it is committed (then call `abort`)."""
        self._meta[b"seen"] = now
        self._settle()
        self.txn.commit()


def tally(state: MailboxState, owner: UserRow, flags: int, size: int, sign: int) -> None:
    """Count a message that comes (`sign` 1) or goes (-1)."""
    state.messages += sign
    state.unseen += sign * (not flags & SEEN)
    state.deleted += sign * bool(flags & DELETED)
    state.octets += sign * size
    owner.messages += sign
    owner.octets += sign * size
