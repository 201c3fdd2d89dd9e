"""A session's picture of the mailbox it has selected: which numbers messages have for the client, and what the client was told
(RFC 9051 5.2, 7.4, 7.5; RFC 7162). Without I/O: the caller reads the index in one transaction, and the view says what to write.

The UIDs in `View.uids` are the messages that the client has numbers for. What others expunge stays among them until the client
may be told (7.5.1), so numbers hold during FETCH, STORE and SEARCH; a message that is gone has a number and a UID, but no record.
A UID is never used again, so its number never leads to another message.

What a command does with the view, always in this order:

1. `targets` makes UIDs of the set that the command names. The caller looks for their records; UIDs without one have been expunged
   ([EXPUNGEISSUED]: RFC 5530).
2. `stored` after a change of flags by this session, `told` after FETCH has written FLAGS: neither is told again.
3. `advance` with what has changed since `View.modseq`, then the tagged reply; also when nothing has changed, while it `holds`
   something back: the client must not take a MODSEQ that it has read for the highest one (RFC 7162 6). `may_expunge` is False for
   FETCH, STORE and SEARCH, for UID SEARCH with message numbers, and while no command is in progress (IDLE is one that is).
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from relaymta.proto.imap_command import Numbers
from relaymta.proto.imap_records import (
    LAST_UID,
    RECORD,
    RECORD_SIZE,
    changed,
    cut,
    formatted,
    joined,
    lines,
    load,
    lower,
    minus,
    numbers,
    pick,
    ranges_of,
    runs,
    select,
    slices,
    union,
    untold,
    values,
)
from relaymta.proto.imap_uids import Shared, Uids

__all__ = ["SYSTEM_FLAGS", "Changes", "Desynchronized", "Mailbox", "View"]

SYSTEM_FLAGS = (b"\\Seen", b"\\Answered", b"\\Flagged", b"\\Deleted", b"\\Draft")  # bits 0 to 4 of a record; keywords follow
KEYWORDS_MOST = 64 - len(SYSTEM_FLAGS)
KEYWORDS_KNOWN = 64  # mailboxes whose keywords (some 6 kB at most) are remembered: most have none, or what all have
NONE_RECENT = LAST_UID + 1
FLAGS, MODSEQ = 1, 2  # `items` of `lines`
COVERED_MOST = 1000  # records
SET_RUNS = 400  # ranges in one VANISHED response: some 8 kB at most


class Desynchronized(Exception):
    """What the caller says has changed does not lead from the view's messages to the mailbox's: `Changes.uids` must be given."""


class Mailbox(NamedTuple):
    """A mailbox as it was in one transaction. `recent`: the first UID of those messages that no other session was told of as
    \\Recent (RFC 3501 2.3.2)."""

    uidvalidity: int
    uidnext: int
    modseq: int
    keywords: Sequence[str] = ()
    recent: int = NONE_RECENT


class Changes(NamedTuple):
    """What has happened in a mailbox above a MODSEQ, as of one transaction.

    `modseq`, `uidnext`, `messages` (how many there are), `keywords`: of the mailbox now. `records`: with a MODSEQ above that one.
    `expunged`: UIDs above it (first, last), in any order; None when the store does not remember all of them: then `uids`, all
    UIDs of the mailbox, packed, has to be given."""

    modseq: int
    uidnext: int
    messages: int
    keywords: Sequence[str]
    records: bytes = b""
    expunged: Iterable[tuple[int, int]] | None = ()
    uids: bytes | None = None


@lru_cache(KEYWORDS_KNOWN)
def _names_of(keywords: tuple[str, ...]) -> list[bytes]:
    """The names of flags by their bits. The list is shared: it is never changed."""
    return [*SYSTEM_FLAGS, *(word.encode() for word in keywords)]


@lru_cache(4 * KEYWORDS_KNOWN)
def _named(keywords: tuple[str, ...], flags: int) -> bytes:
    """The names of some flags."""
    return b" ".join([name for bit, name in enumerate(_names_of(keywords)) if flags >> bit & 1])


@lru_cache(KEYWORDS_KNOWN)
def _flags_told(keywords: tuple[str, ...], read_only: bool) -> bytes:
    """FLAGS and PERMANENTFLAGS of a mailbox with these keywords."""
    names = b" ".join(_names_of(keywords))
    more = b" \\*" if len(keywords) < KEYWORDS_MOST else b""
    permanent = b"" if read_only else names + more
    return b"* FLAGS (%s)\r\n* OK [PERMANENTFLAGS (%s)] Flags that are kept\r\n" % (names, permanent)


class View:
    """The picture. `uids`: by message number; `modseq`: all changes of flags up to it were told; `saved`: the result that SEARCH
    has saved, packed UIDs; `condstore`, `qresync`: what the client has enabled; messages from the UID `recent` to before `until`
    are \\Recent; `read_only`: by EXAMINE."""

    __slots__ = (
        "_held", "_keywords", "_names", "_own", "_recent_told", "_safe", "_shared", "_told", "condstore", "key", "modseq",
        "qresync", "read_only", "recent", "rev2", "saved", "uidnext", "uids", "uidvalidity", "until",
    )  # fmt: skip

    def __init__(
        self, shared: Shared, key: Hashable, mailbox: Mailbox, uids: bytes, *, condstore: bool = False, qresync: bool = False,
        rev2: bool = False, read_only: bool = False,
    ) -> None:  # fmt: skip
        """`key`: of the mailbox in `shared`; `uids`: of its messages at `mailbox.modseq`, packed."""
        self._shared, self.key = shared, key
        self.uidvalidity, self.uidnext, self.modseq = mailbox.uidvalidity, mailbox.uidnext, mailbox.modseq
        self.uids = shared.keep(key, mailbox.modseq, Uids(uids))
        self.recent = self.until = NONE_RECENT
        if not rev2:
            self.take_recent(mailbox.recent, mailbox.uidnext)
        self.condstore, self.qresync, self.rev2, self.read_only = condstore or qresync, qresync, rev2, read_only
        self.saved = b""
        self._recent_told = 0  # the last RECENT
        self._held = b""  # UIDs that are gone, and that the client still has numbers for
        self._safe = self.modseq  # below the MODSEQ of all that is held
        self._told: list[bytes] = []  # records above `modseq` that the client knows
        self._own: set[int] = set()  # MODSEQs above it of changes of this session
        self._keywords = tuple(mailbox.keywords)
        self._names = _names_of(self._keywords)

    # What the client was told

    def __len__(self) -> int:
        """The number of messages that the client was told (EXISTS)."""
        return len(self.uids)

    @property
    def highest(self) -> int:
        """What HIGHESTMODSEQ may say: all up to it was told, expunges included (RFC 7162 3.2, 6)."""
        return self._safe if self._held else self.modseq

    @property
    def holds(self) -> bool:
        """Whether messages are known to be gone that the client was not told of."""
        return bool(self._held)

    def opened(self, unseen: int) -> bytes:
        """The untagged responses of SELECT and EXAMINE (RFC 9051 6.3.2, RFC 3501 6.3.1). `unseen`: the UID of the first message
        that is not seen, or 0."""
        old = b""  # what IMAP4rev2 has not
        if not self.rev2:
            self._recent_told = self._count_recent()
            old = b"* %d RECENT\r\n" % self._recent_told
            if number := self.uids.number(unseen):
                old += b"* OK [UNSEEN %d] First unseen\r\n" % number
        return (
            b"%b* %d EXISTS\r\n%b* OK [UIDVALIDITY %d] UIDs valid\r\n* OK [UIDNEXT %d] Next UID\r\n"
            b"* OK [HIGHESTMODSEQ %d] Highest\r\n"
        ) % (_flags_told(self._keywords, self.read_only), len(self.uids), old, self.uidvalidity, self.uidnext, self.highest)

    def enable_condstore(self) -> bytes:
        """The client has issued a command that enables CONDSTORE (RFC 7162 3.1); what to write, once."""
        if self.condstore:
            return b""
        self.condstore = True
        return self._highest_response()

    def _highest_response(self) -> bytes:
        return b"* OK [HIGHESTMODSEQ %d] Highest\r\n" % self.highest

    def _count_recent(self) -> int:
        if self.recent == self.until:
            return 0
        end = lower(self.uids.data, self.until) if self.until <= LAST_UID else len(self.uids)
        return end - lower(self.uids.data, self.recent)

    def take_recent(self, first: int, until: int) -> None:
        """This session is the first that is told of the messages from `first` to before `until` (RFC 3501 2.3.2): there were none
        so far, or they end at `first`. Before `advance`, which tells of them."""
        if first < until:
            self.recent, self.until = (first, until) if self.recent == self.until else (self.recent, until)

    # Flags

    def learn(self, keywords: Sequence[str]) -> bytes:
        """The mailbox has these keywords now; what to write before one of them occurs in FETCH. `advance` does this itself."""
        if len(keywords) <= len(self._keywords):  # keywords are only added
            return b""
        self._keywords = tuple(keywords)
        self._names = _names_of(self._keywords)
        return _flags_told(self._keywords, self.read_only)

    def flag_bit(self, name: str) -> int | None:
        """The bit of a flag (in any case) in records; None when the mailbox does not know the keyword."""
        sought = name.lower().encode()
        return next((bit for bit, known in enumerate(self._names) if known.lower() == sought), None)

    def flag_list(self, uid: int, flags: int) -> bytes:
        """The flags of a message as FETCH shows them, without parentheses."""
        names = _named(self._keywords, flags)
        if self.recent <= uid < self.until:
            return b"\\Recent " + names if names else b"\\Recent"
        return names

    def lines(self, records: bytes, flags: bool = True, modseq: bool | None = None) -> Iterator[bytes]:
        """FETCH responses with UID, and with FLAGS or MODSEQ (None: if CONDSTORE is enabled), in pieces of 4096 messages; of
        those records whose messages the client has numbers for."""
        items = FLAGS * flags + MODSEQ * (self.condstore if modseq is None else modseq)
        uids, names, recent, until = self.uids.data, self._names, self.recent, self.until
        if len(records) == RECORD_SIZE:
            return iter((lines(records, uids, names, recent, until, items),))
        return (lines(part, uids, names, recent, until, items) for part in slices(records))

    # Sequence sets

    def ranges(self, chosen: Numbers, by_uid: bool) -> bytes:
        """A set of UIDs, or of message numbers, as packed ranges of UIDs. NoSuchNumber (BAD)."""
        if chosen.saved:
            return runs(self.saved)  # what has been expunged is in no array any more
        return self.uids.of_uids(chosen) if by_uid else self.uids.of_numbers(chosen)

    def targets(self, chosen: Numbers, by_uid: bool) -> bytes:
        """The UIDs of the messages of a set, packed. NoSuchNumber (BAD)."""
        return self.uids.cut(self.ranges(chosen, by_uid))

    def named(self, uids: bytes, by_uid: bool) -> bytes:
        """Packed UIDs as a sequence set for the client, of UIDs or of message numbers: for MODIFIED and ESEARCH."""
        return formatted(runs(uids if by_uid else numbers(self.uids.data, uids)))

    # What has changed

    def told(self, records: bytes) -> None:
        """FETCH has written the flags of these records, also those that it has made \\Seen (with MODSEQ, if CONDSTORE is
        enabled): they need not be told again, unless they have keywords that the client has not learned of."""
        if new := changed([records], self.modseq):
            nameless = ~((1 << len(self._names)) - 1) & (1 << 64) - 1
            self._told.append(untold(new, pick(new, select(new, 0, nameless, 0, 0))) if nameless else new)

    def changed_here(self, before: bytes, after: bytes) -> None:
        """This session has changed flags: the records of all messages that it applied to, as of `stored`. What others have done
        has other MODSEQs."""
        if len(after) <= COVERED_MOST * RECORD_SIZE:
            self._own.update(modseq for _, _, _, modseq in RECORD.iter_unpack(untold(after, before)))

    def covers(self, modseq: int) -> bool:
        """Whether all changes up to this MODSEQ are known to be this session's own. False, too, where that would take long to
        find out."""
        return modseq - self.modseq <= len(self._own) and all(one in self._own for one in range(self.modseq + 1, modseq + 1))

    def stored(self, before: bytes, after: bytes, silent: bool, conditional: bool = False) -> Iterator[bytes]:
        """FETCH responses of this session's STORE (RFC 9051 6.4.6, RFC 7162 3.1.3). `before`, `after`: the records of the
        messages that it applied to, as they were right before and are now, in the same order; `conditional`: with UNCHANGEDSINCE.
        Flags that others have changed meanwhile are told, silent or not. `learn` comes first when the mailbox got a keyword."""
        others = select(before, 0, 0, 0, self.modseq + 1)
        self.changed_here(before, after)
        self.told(after)
        if not silent:
            return self.lines(after)
        foreign = self.lines(pick(after, others))
        if not self.condstore:
            return foreign
        own = after if conditional else untold(after, before)
        return chain(foreign, self.lines(untold(own, pick(after, others)), flags=False))

    def advance(self, changes: Changes, may_expunge: bool) -> Iterator[bytes]:
        """Untagged responses that bring the client from `modseq` to the mailbox as it is. The view has changed at the return; the
        pieces of the reply are made one by one. Nothing happens when `changes` are older than the view. Desynchronized: nothing
        has changed."""
        if changes.modseq < self.modseq:
            return iter(())
        gone = self._gone(changes)
        held, telling = union(self._held, gone), b""
        if may_expunge:
            held, telling = b"", held
        new, flagged = self._divided(changes.records)
        arrived = load([new])
        count = len(self.uids) + (len(arrived) - len(telling)) // 4
        if count - len(held) // 4 != changes.messages:
            raise Desynchronized(f"{changes.messages} messages, {count} in the view")
        removed = numbers(self.uids.data, telling)
        if not self._held:
            self._safe = self.modseq
        self._held = held
        self.uids = self._replaced(changes.modseq, telling, arrived)
        self.uidnext, self.modseq = changes.uidnext, changes.modseq
        keywords, exists = self.learn(changes.keywords), self._exists(arrived)
        flagged = untold(flagged, joined(self._told))
        self._told.clear()
        self._own.clear()
        end = self._highest_response() if self.condstore and (held or (self.qresync and telling)) else b""
        return filter(None, chain([keywords], self._expunges(telling, removed), [exists], self.lines(flagged), [end]))

    def _gone(self, changes: Changes) -> bytes:
        """The UIDs of messages that have gone since the last time, packed."""
        if changes.expunged is not None:
            return cut(self.uids.data, ranges_of(changes.expunged))
        if changes.uids is None:
            raise Desynchronized("the UIDs of the mailbox are not given")
        return minus(self.uids.data, changes.uids)

    def _divided(self, records: bytes) -> tuple[bytes, bytes]:
        """The records of messages that the client has no number for, and of those that it has one for."""
        at = lower(load([records]), self.uidnext) * RECORD_SIZE
        return records[at:], records[:at]

    def _replaced(self, modseq: int, removed: bytes, arrived: bytes) -> Uids:
        """The array without the UIDs that are told as gone, and with new ones; shared when it is the mailbox's at its version."""
        if not removed and not arrived and (self._held or modseq == self.modseq):
            return self.uids
        if not self._held and (there := self._shared.get(self.key, modseq)) is not None:
            return there
        data = self.uids.data if not removed else minus(self.uids.data, removed)
        uids = Uids(data + arrived) if removed or arrived else self.uids
        return uids if self._held else self._shared.keep(self.key, modseq, uids)

    def _exists(self, arrived: bytes) -> bytes:
        """EXISTS where there are more messages; RECENT (RFC 3501) there, and where their number has changed."""
        exists = b"* %d EXISTS\r\n" % len(self.uids) if arrived else b""
        if self.rev2:
            return exists
        told, self._recent_told = self._recent_told, self._count_recent()
        return b"%s* %d RECENT\r\n" % (exists, self._recent_told) if arrived or told != self._recent_told else exists

    def _expunges(self, gone: bytes, removed: bytes) -> Iterator[bytes]:
        """EXPUNGE, or VANISHED, of packed UIDs that had these numbers. From the highest on: so each number is what it was."""
        if not gone:
            return
        if self.qresync:
            found = runs(gone)
            for at in range(0, len(found), 8 * SET_RUNS):
                yield b"* VANISHED %s\r\n" % formatted(found[at : at + 8 * SET_RUNS])
            return
        listed = values(removed)
        listed.reverse()
        for at in range(0, len(listed), 4096):
            yield b"".join([b"* %d EXPUNGE\r\n" % number for number in listed[at : at + 4096]])
