"""Whether a shard contradicts itself: counts against rows, references against messages, bodies against checksums."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError
from relaymta.store import scripts
from relaymta.store.blocks import MOST, RECORD, Record, records_of
from relaymta.store.change import Refusal
from relaymta.store.reading import Bodies, body_of
from relaymta.store.rows import DELETED, ID, SEEN, SYSTEM_FLAGS, MailboxState, MailShard

__all__ = ["contradictions"]

PAGE = 1000  # objects of one transaction


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
        references: Counter[int] = Counter()
        known: set[int] = set()
        users = list(shard.users(txn))
        if known_users is not None:
            yield from (f"user {user} is not in the directory" for user, _ in users if user not in known_users | free)
            there = {user for user, _ in users}
            yield from (f"user {user} of the directory has no mailboxes" for user in sorted(known_users - there - free))
        for user, row in users:
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
                    references.update(message.object for _, message in shard.messages(txn, unfinished.mailbox))
            if (octets, messages) != (row.octets, row.messages):
                yield f"user {user}: {row.messages} messages, {row.octets} octets, but its mailboxes have {messages}, {octets}"
        yield from (f"rows of mailbox {number}, which nobody has" for number in _mailboxes(shard, txn) - known - {0})
        strangers = {user for user, _, _ in shard.unfinished(txn)} - {user for user, _ in users}
        yield from (f"user {user}, who is not here, has something unfinished" for user in strangers)
        yield from scripts.contradictions(shard, txn, {user for user, _ in users})
        yield from _objects(shard, txn, references)


def _mailboxes(shard: MailShard, txn: Any) -> set[int]:
    """All mailboxes that have rows."""
    found: set[int] = set()
    cursor = txn.cursor(db=shard.tables["mail"])
    while cursor.set_range(ID.pack(max(found, default=-1) + 1)):
        found.add(ID.unpack(cursor.key()[:8])[0])
    return found


def _mailbox(shard: MailShard, txn: Any, mailbox: int, state: MailboxState, references: Counter[int]) -> Iterator[str]:
    records: list[Record] = []
    for first, block in shard.index(txn, mailbox).blocks():
        part = records_of(block)
        if not part or len(part) > MOST or len(block) % RECORD.size or part[0].uid != first:
            yield f"the block of UID {first} is malformed"
        records += part
    uids = [record.uid for record in records]
    if uids != sorted(set(uids)):
        yield "UIDs are not in order"
    rows = dict(shard.messages(txn, mailbox))
    if list(rows) != uids:
        yield f"the index has UIDs {sorted(set(uids) - set(rows))} without a row, and not {sorted(set(rows) - set(uids))}"
    for row in rows.values():
        references[row.object] += 1
    counted = (
        len(records),
        sum(not record.flags & SEEN for record in records),
        sum(bool(record.flags & DELETED) for record in records),
        sum(row.size for row in rows.values()),
    )
    if counted != (state.messages, state.unseen, state.deleted, state.octets):
        yield f"counted {counted}, but its state says {(state.messages, state.unseen, state.deleted, state.octets)}"
    expunged = list(shard.expunged(txn, mailbox))
    if state.vanished > sum(last - first + 1 for _, runs in expunged for first, last in runs):
        yield f"{state.vanished} UIDs should be known to be expunged"
    if expunged and expunged[0][0] <= state.forgotten:
        yield f"what was expunged at MODSEQ {expunged[0][0]} should be forgotten"
    gone = {uid for _, runs in expunged for first, last in runs for uid in range(first, last + 1)}
    if gone & set(uids):
        yield f"UIDs {sorted(gone & set(uids))} are expunged and there"
    if max([0, *uids, *gone]) >= state.uidnext:
        yield f"UIDNEXT is {state.uidnext}"
    if max([0, *(record.modseq for record in records), *(modseq for modseq, _ in expunged)]) > state.modseq:
        yield f"HIGHESTMODSEQ is {state.modseq}"
    if any(record.flags >> (SYSTEM_FLAGS + len(state.keywords)) for record in records):
        yield "there are flags without a keyword"


def _objects(shard: MailShard, txn: Any, references: Counter[int]) -> Iterator[str]:
    live: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for ident, row in shard.objects(txn):
        if references.pop(ident, 0) != row.references:
            yield f"object {ident:016x} has {row.references} references, and other messages than these"
        if row.body.segment:
            live[row.body.segment][0] += 1
            live[row.body.segment][1] += FRAME.size + row.body.length
    yield from (f"object {ident:016x} of {count} messages is missing" for ident, count in references.items())
    for number, segment in shard.segment_rows(txn):
        counted = live.pop(number, [0, 0])
        if counted != [segment.live, segment.live_bytes]:
            yield f"segment {number} has {counted}, but its row says {[segment.live, segment.live_bytes]}"
    yield from (f"segment {number} of {counted[0]} bodies has no row" for number, counted in live.items())
