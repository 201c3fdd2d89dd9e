"""Whether a shard contradicts itself: counts against rows, references against messages, bodies against checksums.

In time that is linear in its rows. Kept in memory: the ids of users, 8 octets of each message and each mailbox, and 8 more of
each message of one mailbox.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from heapq import merge
from itertools import groupby, islice
from typing import Any

from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.store import scripts
from relaymta.store.blocks import MOST, RECORD, Record, records_of
from relaymta.store.change import Refusal
from relaymta.store.reading import Bodies, body_of
from relaymta.store.rows import DELETED, ID, SEEN, SYSTEM_FLAGS, MailboxState, MailShard

__all__ = ["PAGE", "contradictions"]

PAGE = 1000  # objects of one transaction
RUN = 1 << 16  # references that are sorted together


def contradictions(
    shard: MailShard, bodies: Bodies | None = None, known_users: set[int] | None = None, free: set[int] | None = None
) -> Iterator[str]:
    """A sentence for each contradiction in one snapshot of a shard. `bodies`: they are read, too; `known_users`: those that the
    directory places here, where nobody changes it meanwhile; `free`: users who may be here or not. Blocks."""
    yield from list(_rows(shard, known_users, free or set()))
    if bodies is not None:
        yield from _damaged(shard, bodies)


def _damaged(shard: MailShard, bodies: Bodies) -> Iterator[str]:
    """A sentence for each body that cannot be read. Blocks; no transaction is open while a body is read."""
    after = -1
    while True:
        with shard.reading() as txn:
            page = list(islice(shard.objects(txn, after), PAGE))
        if not page:
            return
        for ident, _ in page:
            try:
                body_of(shard, bodies, ident)
            except Refusal:
                continue  # expunged meanwhile
            except StoreError as error:
                yield str(error)
        after = page[-1][0]


def _rows(shard: MailShard, known_users: set[int] | None, free: set[int]) -> Iterator[str]:
    with shard.reading() as txn:
        references, known, there = _Idents(), _Idents(), set(shard.user_idents(txn))
        if known_users is not None:
            strange = (user for user in sorted(there) if user not in known_users and user not in free)
            yield from (f"user {user} is not in the directory" for user in strange)
            yield from (f"user {user} of the directory has no mailboxes" for user in sorted(known_users - there - free))
        for user, row in shard.users(txn):
            octets = messages = 0
            for found in shard.mailboxes(txn, user):
                if not found.mailbox:
                    continue
                known.add(found.mailbox)
                state = shard.state(txn, found.mailbox)
                if state is None:
                    yield f"user {user}: {found.name}: mailbox {found.mailbox} has no state"
                    continue
                octets += state.octets
                messages += state.messages
                wrong = _mailbox(shard, txn, found.mailbox, state, references)
                yield from (f"user {user}: {found.name}: {what}" for what in wrong)
            for _, _, unfinished in shard.unfinished(txn, user):
                octets += unfinished.octets
                messages += unfinished.messages
                if unfinished.removed:
                    known.add(unfinished.mailbox)
                    for _, message in shard.messages(txn, unfinished.mailbox):
                        references.add(message.object)
            if (octets, messages) != (row.octets, row.messages):
                yield f"user {user}: {row.messages} messages, {row.octets} octets, but its mailboxes have {messages}, {octets}"
        nobodys = _without(_mailboxes(shard, txn), known)
        yield from (f"rows of mailbox {number}, which nobody has" for number in nobodys if number)
        strangers = {user for user, _, _ in shard.unfinished(txn)} - there
        yield from (f"user {user}, who is not here, has something unfinished" for user in strangers)
        yield from scripts.contradictions(shard, txn, there)
        yield from _objects(shard, txn, references)


class _Idents:
    """Ids, such as those of the objects that messages point at, each perhaps several times."""

    def __init__(self) -> None:
        self._runs: list[array[int]] = []  # each sorted
        self._run = array("Q")

    def add(self, ident: int) -> None:
        """Add one."""
        self._run.append(ident)
        if len(self._run) >= RUN:
            self._end_run()

    def _end_run(self) -> None:
        self._runs.append(array("Q", sorted(self._run)))
        self._run = array("Q")

    def counted(self) -> Iterator[tuple[int, int]]:
        """(id, how many times it was added), by id; asked for once."""
        self._end_run()
        for ident, same in groupby(merge(*self._runs)):
            yield ident, sum(1 for _ in same)


def _without(idents: Iterator[int], others: _Idents) -> Iterator[int]:
    """Those of some ids, in their order, that are not among others."""
    counts = others.counted()
    other, _ = next(counts, (None, 0))
    for ident in idents:
        while other is not None and other < ident:
            other, _ = next(counts, (None, 0))
        if other != ident:
            yield ident


def _mailboxes(shard: MailShard, txn: Any) -> Iterator[int]:
    """All mailboxes that have rows."""
    last, cursor = -1, txn.cursor(db=shard.tables["mail"])
    while cursor.set_range(ID.pack(last + 1)):
        last = ID.unpack(cursor.key()[:8])[0]
        yield last


class _Index:
    """What a mailbox's index says. `wrong`: sentences; `modseq`, `flags`: the highest, and all that there are."""

    def __init__(self, shard: MailShard, txn: Any, mailbox: int) -> None:
        self.uids = array("I")
        self.wrong: list[str] = []
        self.unseen = self.deleted = self.modseq = self.flags = 0
        for first, block in shard.index(txn, mailbox).blocks():
            part = records_of(block)
            if not part or len(part) > MOST or len(block) % RECORD.size or part[0].uid != first:
                self.wrong.append(f"the block of UID {first} is malformed")
            for record in part:
                self._add(record)
        if any(self.uids[place] >= self.uids[place + 1] for place in range(len(self.uids) - 1)):
            self.wrong.append("UIDs are not in order")
            self.uids = array("I", sorted(self.uids))

    def _add(self, record: Record) -> None:
        self.uids.append(record.uid)
        self.unseen += not record.flags & SEEN
        self.deleted += bool(record.flags & DELETED)
        self.modseq = max(self.modseq, record.modseq)
        self.flags |= record.flags


def _mailbox(shard: MailShard, txn: Any, mailbox: int, state: MailboxState, references: _Idents) -> Iterator[str]:
    index = _Index(shard, txn, mailbox)
    yield from index.wrong
    uids, rows, octets = index.uids, array("I"), 0
    for uid, row in shard.messages(txn, mailbox):
        rows.append(uid)
        octets += row.size
        references.add(row.object)
    if rows != uids:
        yield f"the index has UIDs {sorted(set(uids) - set(rows))} without a row, and not {sorted(set(rows) - set(uids))}"
    counted = (len(uids), index.unseen, index.deleted, octets)
    if counted != (state.messages, state.unseen, state.deleted, state.octets):
        yield f"counted {counted}, but its state says {(state.messages, state.unseen, state.deleted, state.octets)}"
    expunged = list(shard.expunged(txn, mailbox))
    if state.vanished > sum(last - first + 1 for _, runs in expunged for first, last in runs):
        yield f"{state.vanished} UIDs should be known to be expunged"
    if expunged and expunged[0][0] <= state.forgotten:
        yield f"what was expunged at MODSEQ {expunged[0][0]} should be forgotten"
    runs = [run for _, some in expunged for run in some]
    found = [uid for first, last in runs for uid in uids[bisect_left(uids, first) : bisect_right(uids, last)]]
    if found:
        yield f"UIDs {sorted(found)} are expunged and there"
    if max([0, *uids[-1:], *(last for _, last in runs)]) >= state.uidnext:
        yield f"UIDNEXT is {state.uidnext}"
    if max([index.modseq, *(modseq for modseq, _ in expunged)]) > state.modseq:
        yield f"HIGHESTMODSEQ is {state.modseq}"
    if index.flags >> (SYSTEM_FLAGS + len(state.keywords)):
        yield "there are flags without a keyword"


def _objects(shard: MailShard, txn: Any, references: _Idents) -> Iterator[str]:
    live: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    counts = references.counted()
    wanted = next(counts, None)
    for ident, row in shard.objects(txn):
        while wanted is not None and wanted[0] < ident:
            yield f"object {wanted[0]:016x} of {wanted[1]} messages is missing"
            wanted = next(counts, None)
        count = 0
        if wanted is not None and wanted[0] == ident:
            count, wanted = wanted[1], next(counts, None)
        if count != row.references:
            yield f"object {ident:016x} has {row.references} references, and other messages than these"
        if row.body.segment:
            live[row.body.segment][0] += 1
            live[row.body.segment][1] += FRAME.size + row.body.length
    for ident, count in [] if wanted is None else [wanted, *counts]:
        yield f"object {ident:016x} of {count} messages is missing"
    for number, segment in shard.segment_rows(txn):
        counted = live.pop(number, [0, 0])
        if counted != [segment.live, segment.live_bytes]:
            yield f"segment {number} has {counted}, but its row says {[segment.live, segment.live_bytes]}"
    yield from (f"segment {number} of {counted[0]} bodies has no row" for number, counted in live.items())
