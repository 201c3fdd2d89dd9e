"""The base of a shard's write transaction: states of mailboxes, users' rows and references of objects are collected, and written
once by `finish` (or before a part). Why something is refused.
"""

from collections import defaultdict
from typing import Final

from relaymta.disk.transaction import Transaction
from relaymta.errors import RelayError, StoreError
from relaymta.proto.envelope import Body, encode
from relaymta.proto.imap_records import RECORD
from relaymta.store.blocks import Blocks
from relaymta.store.rows import (
    DELETED,
    ID,
    KEYWORD_OCTETS,
    KEYWORDS_MOST,
    SEEN,
    STATE,
    SYSTEM_FLAGS,
    MailboxRow,
    MailboxState,
    MailShard,
    ObjectRow,
    UserRow,
    name_key,
)

__all__ = ["CANNOT", "EXISTS", "LIMIT", "MISSING", "MOVING", "OVERQUOTA", "Collected", "Refusal", "tally"]

# Why something is refused (the response codes of RFC 5530 and RFC 9208).
MISSING, EXISTS, OVERQUOTA, LIMIT, CANNOT = "nonexistent", "alreadyexists", "overquota", "limit", "cannot"
MOVING = "unavailable"

MAILBOXES_MOST: Final = 10_000  # names of a user
KEPT_MOST = 10_000  # rows of each kind that are in memory


class Refusal(RelayError):
    """The store does not do what was asked; nothing has changed. `code`: why, for programs."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.absent = code in (MISSING, EXISTS)


class Kept:
    """Rows as the last commit has left them, in memory for the next transactions, which are one behind the other: those that are
    changed are taken out, and put back by the commit."""

    __slots__ = ("names", "states", "users")

    def __init__(self) -> None:
        self.states: dict[int, MailboxState] = {}
        self.users: dict[int, UserRow] = {}
        self.names: dict[tuple[int, str], MailboxRow] = {}  # nobody changes these

    def put_back(self, states: dict[int, MailboxState], users: dict[int, UserRow]) -> None:
        """These have been committed."""
        if max(len(self.states), len(self.users), len(self.names)) > KEPT_MOST:
            self.states, self.users, self.names = {}, {}, {}
        self.states |= states
        self.users |= users


class Collected(Transaction):
    """One write transaction, used on one thread. `freed`: bodies that nothing points at any more. `touched`: the MODSEQ of each
    mailbox that has changed; `scripted`: users whose Sieve scripts may have changed. `kept`: as the transaction before has left
    it."""

    def __init__(self, shard: MailShard, kept: Kept | None = None) -> None:
        super().__init__(shard)
        self.shard = shard
        self._kept = kept or Kept()
        self._states: dict[int, MailboxState] = {}
        self._users: dict[int, UserRow] = {}
        self._objects: dict[int, ObjectRow] = {}
        self._records: defaultdict[int, bytearray] = defaultdict(bytearray)  # index records to add, by mailbox
        self._before: tuple[int, dict[int, int]] = (0, {})  # what `undo_part` restores
        self._meta: dict[bytes, int] = {}
        self.freed: list[tuple[int, Body]] = []
        self.touched: dict[int, int] = {}
        self.scripted: set[int] = set()

    # What is collected: rows that are got here may be changed, and are written

    def user(self, user: int) -> UserRow:
        """A user's row. Refusal."""
        row = self._users.get(user)
        if row is None:
            row = self._user(user)
            self._kept.users.pop(user, None)
            self._users[user] = row
        return row

    def _user(self, user: int) -> UserRow:
        """A user's row, which is not changed. Refusal."""
        row = self._users.get(user) or self._kept.users.get(user) or self.shard.user(self.txn, user)
        if row is None:
            raise Refusal(MISSING, "no such user")
        return row

    def owner(self, user: int) -> UserRow:
        """The row of a user who is to be changed. Refusal."""
        return _here(self.user(user))

    def check_owner(self, user: int) -> None:
        """As `owner`, of one whose row does not change."""
        _here(self._user(user))

    def is_user(self, user: int) -> bool:
        """Whether the user is here."""
        return user in self._users or self.shard.user(self.txn, user) is not None

    def remove_user(self, user: int) -> None:
        """Remove a user's row."""
        self._users.pop(user, None)
        self._kept.users.pop(user, None)
        self.txn.delete(ID.pack(user), db=self._tables["user"])

    def put_user(self, user: int, row: UserRow) -> None:
        """Add a user's row."""
        self._users[user] = row

    def state(self, mailbox: int) -> MailboxState:
        """A mailbox's state. Refusal."""
        state = self.find_state(mailbox)
        if state is None:
            raise Refusal(MISSING, "no such mailbox")
        return state

    def find_state(self, mailbox: int) -> MailboxState | None:
        """A mailbox's state; None: it is not there."""
        state = self._states.get(mailbox)
        if state is None:
            state = self._kept.states.pop(mailbox, None) or self.shard.state(self.txn, mailbox)
            if state is not None:
                self._states[mailbox] = state
        return state

    def add_record(self, mailbox: int, record: bytes) -> None:
        """Add a message to the index of a mailbox: with others, by `index` or `settle_records`. StoreError: its UID is not higher
        than theirs."""
        waiting = self._records[mailbox]
        if waiting and (uid := RECORD.unpack_from(record)[0]) <= RECORD.unpack_from(waiting, len(waiting) - RECORD.size)[0]:
            raise StoreError(f"UID {uid} of mailbox {mailbox} is not the highest")
        waiting += record

    def index(self, mailbox: int) -> Blocks:
        """The index of a mailbox."""
        blocks = self.shard.index(self.txn, mailbox)
        if mailbox in self._records:
            blocks.extend(bytes(self._records.pop(mailbox)))
        return blocks

    def settle_records(self) -> None:
        """Write what has been added to indexes. StoreError: a UID is not the highest."""
        for mailbox in [*self._records]:
            self.index(mailbox)

    def put_state(self, state: MailboxState) -> int:
        """Add a mailbox's state; the mailbox's id."""
        number = self._number(b"mailboxes") + 1
        self._meta[b"mailboxes"] = number
        self._states[number] = state
        return number

    def remove_state(self, mailbox: int) -> None:
        """Remove a mailbox's state: it is not there any more."""
        self._states.pop(mailbox, None)
        self._kept.states.pop(mailbox, None)
        self.txn.delete(STATE.pack(mailbox, 0), db=self._tables["mail"])

    def raised(self, mailbox: int, state: MailboxState) -> int:
        """The MODSEQ of a change of a mailbox."""
        state.modseq += 1
        self.touched[mailbox] = state.modseq
        return state.modseq

    def mailbox(self, user: int, name: str) -> MailboxRow:
        """The row of a mailbox by its name. Refusal, also where the name is only subscribed."""
        row = self._kept.names.get((user, name))
        if row is None:
            row = self.shard.mailbox(self.txn, user, name)
            if row is None or not row.mailbox:
                raise Refusal(MISSING, f"there is no mailbox {name}")
            self._kept.names[user, name] = row
        return row

    def put_mailbox(self, user: int, row: MailboxRow) -> None:
        """Write the row of a name."""
        self._kept.names.pop((user, row.name), None)
        self.txn.put(name_key(user, row.name), encode(row), db=self._tables["mailbox"])

    def remove_name(self, user: int, name: str) -> None:
        """Remove the row of a name."""
        self._kept.names.pop((user, name), None)
        self.txn.delete(name_key(user, name), db=self._tables["mailbox"])

    def bits(self, state: MailboxState, keywords: list[str]) -> int:
        """The bits of keywords (any case); those that the mailbox does not have yet are added to it. Refusal."""
        if not keywords:
            return 0
        known = {keyword.lower(): keyword for keyword in (*reversed(keywords), *state.keywords)}
        new = [
            known[word] for word in dict.fromkeys(keyword.lower() for keyword in keywords) if known[word] not in state.keywords
        ]
        if any(len(word.encode()) > KEYWORD_OCTETS for word in new):
            raise Refusal(LIMIT, f"{KEYWORD_OCTETS} octets are the most that a keyword may have")
        if len(state.keywords) + len(new) > KEYWORDS_MOST:
            raise Refusal(LIMIT, f"{KEYWORDS_MOST} keywords are the most that a mailbox may have")
        state.keywords = [*state.keywords, *new]
        return sum(1 << (SYSTEM_FLAGS + state.keywords.index(known[word])) for word in {keyword.lower() for keyword in keywords})

    # Objects

    def object(self, ident: int) -> ObjectRow:
        """The row of a message's data. Refusal."""
        row = self._objects.get(ident) or self.shard.object(self.txn, ident)
        if row is None:
            raise Refusal(MISSING, "no such message")
        self._objects[ident] = row
        return row

    def put_object(self, ident: int, row: ObjectRow) -> None:
        """Add a message's data, at which so many messages of this transaction will point."""
        self._objects[ident] = row
        self._meta[b"highest"] = max(ident, self._number(b"highest"))

    def unreference(self, ident: int) -> None:
        """A message that had this data is gone."""
        row = self.object(ident)
        row.references -= 1
        if not row.references:
            del self._objects[ident]
            self.txn.delete(ID.pack(ident), db=self._tables["object"])
            self.freed.append((ident, row.body))

    def relocate(self, ident: int, was: Body, body: Body) -> bool:
        """Point an object at the copy of its body; False when it is gone or has moved meanwhile."""
        row = self._objects.get(ident) or self.shard.object(self.txn, ident)
        if row is None or row.body != was:
            return False
        row.body = body
        self._objects[ident] = row
        return True

    # The transaction

    def _number(self, key: bytes) -> int:
        value = self._meta.get(key)
        return self.shard.meta_in(self.txn, key) if value is None else value

    def set_meta(self, key: bytes, value: int) -> None:
        """Write a number in meta."""
        self._meta[key] = value

    def settle(self) -> None:
        """Write what was collected."""
        self.settle_records()
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
        for collected in (self._states, self._users, self._objects, self._records, self._meta):
            collected.clear()

    def begin_part(self) -> None:
        """Begin a nested transaction, which `keep_part` or `undo_part` ends."""
        self.settle()  # so that what is undone can be read again as it was
        self._before = len(self.freed), dict(self.touched)
        super().begin_part()

    def keep_part(self) -> None:
        """Keep the part: it is committed if the whole transaction is."""
        self.settle()
        super().keep_part()

    def undo_part(self) -> None:
        """Undo all changes of the part."""
        super().undo_part()
        self._forget()
        self._kept.names.clear()  # those of the part may be among them
        freed, self.touched = self._before
        del self.freed[freed:]

    def finish(self, now: int) -> None:
        """Write what was collected, and commit. lmdb.Error: nothing of it is committed (then call `abort`)."""
        self._meta[b"seen"] = now
        states, users = dict(self._states), dict(self._users)
        self.settle()
        self.txn.commit()
        self._kept.put_back(states, users)

    def abort(self) -> None:
        """Undo the whole transaction."""
        super().abort()
        self._kept.names.clear()


def _here(row: UserRow) -> UserRow:
    if row.frozen:
        raise Refusal(MOVING, "the user is being moved; try again")
    return row


def tally(state: MailboxState, owner: UserRow, flags: int, size: int, sign: int) -> None:
    """Count a message that comes (`sign` 1) or goes (-1)."""
    state.messages += sign
    state.unseen += sign * (not flags & SEEN)
    state.deleted += sign * bool(flags & DELETED)
    state.octets += sign * size
    owner.messages += sign
    owner.octets += sign * size
