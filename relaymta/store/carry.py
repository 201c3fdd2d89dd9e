"""A user on the way to another shard, or out of a backup: all that there is of the user, in parts that are put in order, so that
UIDs, MODSEQs, flags and what was expunged stay as they are.

`Carried` reads them, on any thread and in any process; `Shard.take` puts them. Meanwhile nobody else may change the user: where
the user was, the row is frozen; where the user comes to, nobody knows the user yet.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from relaymta.disk.big import BigFile, read_big
from relaymta.errors import StoreError
from relaymta.store import scripts
from relaymta.store.reading import Readable, body_of, pages
from relaymta.store.rows import MailboxRow, MailboxState

__all__ = [
    "Carried", "CarriedDone", "CarriedMailbox", "CarriedMessages", "CarriedScripts", "CarriedUser", "Entry", "Part",
    "convert_part",
]  # fmt: skip

OCTETS, MESSAGES = 4 << 20, 500  # of one part, but for a single larger message
EXPUNGED_MOST = 100_000


class Entry(msgspec.Struct, array_like=True):
    """A message. `data`: its data, or a large one's file, which stays until the part is put; None where `object` (there) is the
    same; `date`, `saved`: as of rows.MessageRow; `was`: the
    object's id here."""

    uid: int
    modseq: int
    flags: int
    date: int
    saved: int
    prefix: bytes
    was: int
    object: int = 0
    data: bytes | BigFile | None = None


class CarriedUser(msgspec.Struct, array_like=True, tag=True):
    """The user: first of all. `uidvalidity`: of the next mailbox."""

    uidvalidity: int


class CarriedMailbox(msgspec.Struct, array_like=True, tag=True):
    """A mailbox, or (no `state`) a name that is only subscribed. `expunged`: (MODSEQ, runs of UIDs)."""

    row: MailboxRow
    state: MailboxState | None
    expunged: list[tuple[int, list[tuple[int, int]]]]


class CarriedMessages(msgspec.Struct, array_like=True, tag=True):
    """Messages of a mailbox that has been put, in the order of their UIDs."""

    name: str
    entries: list[Entry]


class CarriedDone(msgspec.Struct, array_like=True, tag=True):
    """What the queue may ask for again: (queue id, recipient, the attempt that has filed it)."""

    rows: list[tuple[int, int, int]]


class CarriedScripts(msgspec.Struct, array_like=True, tag=True):
    """Sieve scripts (name, text, whether it is active), and the vacation replies that are remembered (key, until when, for
    whom)."""

    scripts: list[tuple[str, bytes, bool]]
    replies: list[tuple[bytes, int, bytes]]


Part = CarriedUser | CarriedMailbox | CarriedMessages | CarriedDone | CarriedScripts


def convert_part(found: Any) -> Part:
    """A part as it came over a channel. ValidationError."""
    return msgspec.convert(found, Part)  # type: ignore[no-any-return]


class Carried:
    """Reads a user's parts from a shard. Whoever puts a part of messages notes by `put` as which objects, so that data of several
    mailboxes is carried once. `uidvalidity`: new UIDVALIDITYs from this one on (0: those that are); the UIDs of a backup may have
    been given to other messages since. `damaged(sentence)`: called for each message whose data cannot be read, which is left out;
    without it, that ends in StoreError. `large(file)`: the data of a message in a file of its own as whoever puts the part can
    read it. StoreError."""

    def __init__(
        self,
        reader: Readable,
        user: int,
        uidvalidity: int = 0,
        damaged: Callable[[str], None] | None = None,
        large: Callable[[BigFile], bytes | BigFile] = read_big,
    ) -> None:
        self._damaged = damaged
        self._large = large
        self._reader = reader
        self._user = user
        self._uidvalidity = uidvalidity
        self._unfinished: dict[int, list[tuple[int, int]]] = {}  # UIDs of a COPY or APPEND that has not come to its end
        self._shared: dict[int, int] = {}  # objects of several mailboxes: id here -> id there, 0: on its way

    def put(self, part: Part, objects: list[int]) -> None:
        """The objects of a part's messages, where it has been put."""
        if isinstance(part, CarriedMessages):
            for entry, ident in zip(part.entries, objects, strict=True):
                if entry.was in self._shared:
                    self._shared[entry.was] = ident

    def parts(self) -> Iterator[Part]:
        """The parts, each read when it is asked for; `put` is called before the next. Refusal, StoreError: the data of a message
        cannot be read."""
        rows = self._reader.rows
        with rows.reading() as txn:
            owner = rows.user(txn, self._user)
            if owner is None:
                return
            mailboxes = [(row, rows.state(txn, row.mailbox)) for row in rows.mailboxes(txn, self._user)]
            done = list(rows.done_of(txn, self._user))
            for _, _, unfinished in rows.unfinished(txn, self._user):
                self._unfinished.setdefault(unfinished.mailbox, []).extend(unfinished.uids)
            found = CarriedScripts(scripts.all_scripts(rows, txn, self._user), scripts.replies(rows, txn, self._user))
        kept = [row for row, state in mailboxes if state is not None]
        if self._uidvalidity:
            self._uidvalidity = max(self._uidvalidity, owner.uidvalidity)
        yield CarriedUser(self._uidvalidity + len(kept) if self._uidvalidity else owner.uidvalidity)
        for row, state in mailboxes:
            yield self._mailbox(row, state)
        if found.scripts or found.replies:
            yield found
        for row in kept:
            yield from self._messages(row)
        for start in range(0, len(done), MESSAGES):
            yield CarriedDone(done[start : start + MESSAGES])

    def _mailbox(self, row: MailboxRow, state: MailboxState | None) -> CarriedMailbox:
        if state is None:
            return CarriedMailbox(row, None, [])
        with self._reader.rows.reading() as txn:
            expunged = list(self._reader.rows.expunged(txn, row.mailbox))
        if len(expunged) > EXPUNGED_MOST:
            state = msgspec.structs.replace(state, forgotten=expunged[-EXPUNGED_MOST - 1][0])
            expunged = expunged[-EXPUNGED_MOST:]
        if self._uidvalidity:  # higher than those that were
            state = msgspec.structs.replace(state, uidvalidity=self._uidvalidity)
            self._uidvalidity += 1
            expunged = []
        return CarriedMailbox(row, state, expunged)

    def _messages(self, row: MailboxRow) -> Iterator[Part]:
        entries, octets = list[Entry](), 0
        for page in pages(self._reader.rows, row.mailbox):
            for record, message in page:
                if any(first <= record.uid <= last for first, last in self._unfinished.get(row.mailbox, ())):
                    continue
                date, saved, prefix = message.date, message.saved, message.prefix
                entry = Entry(record.uid, record.modseq, record.flags, date, saved, prefix, message.object)
                if entries and (len(entries) >= MESSAGES or octets + message.size > OCTETS or self._shared.get(entry.was) == 0):
                    yield CarriedMessages(row.name, entries)
                    entries, octets = [], 0
                if self._fill(row, entry):
                    entries.append(entry)
                    octets += message.size if entry.data is not None else len(prefix)
        if entries:
            yield CarriedMessages(row.name, entries)

    def _fill(self, row: MailboxRow, entry: Entry) -> bool:
        """The data of a message, or what has it there already; whether it can be carried."""
        entry.object = self._shared.get(entry.was, 0)
        if entry.object:
            return True
        try:
            entry.data = self._data(entry.was)
        except StoreError as error:
            if self._damaged is None:
                raise
            self._damaged(f"{row.name}, UID {entry.uid}: {error}")
            return False
        if self._is_shared(entry.was):
            self._shared[entry.was] = 0
        return True

    def _data(self, ident: int) -> bytes | BigFile:
        with self._reader.rows.reading() as txn:
            row = self._reader.rows.object(txn, ident)
        if row is not None and not row.body.segment:
            return self._large(BigFile(str(self._reader.bodies.big_path(ident)), ident, row.body))
        return body_of(self._reader.rows, self._reader.bodies, ident)

    def _is_shared(self, ident: int) -> bool:
        with self._reader.rows.reading() as txn:
            row = self._reader.rows.object(txn, ident)
        return row is not None and row.references > 1
