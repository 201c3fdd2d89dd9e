"""What can be corrected in shards that contradict themselves, while no daemon runs: everything that is counted is counted anew
from the rows of messages. What rows say of bodies that are lost cannot be."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from relaymta.disk.environment import SEGMENT
from relaymta.disk.lock import lock
from relaymta.disk.segments import FRAME
from relaymta.errors import StoreError, store_error
from relaymta.proto.envelope import encode
from relaymta.store import scripts
from relaymta.store.blocks import Record
from relaymta.store.change import Change
from relaymta.store.collected import tally
from relaymta.store.files import MailFiles
from relaymta.store.reading import Files
from relaymta.store.rows import (
    EXPUNGED,
    ID,
    MESSAGE,
    MESSAGE_KIND,
    STATE,
    SYSTEM_FLAGS,
    MailboxState,
    MailShard,
    MessageRow,
    ObjectRow,
    UserRow,
)
from relaymta.store.verify import PAGE, contradictions

__all__ = ["repair"]


def repair(folder: Path, read_bodies: bool = True) -> Iterator[str]:
    """Correct the shards in SPOOL/mail; a sentence for each that was corrected. `read_bodies`: those that cannot be read go, too.
    SpoolBusy, StoreError. Blocks."""
    with MailFiles(folder) as files:
        placed: dict[int, set[int]] = defaultdict(set)
        for user in files.users():
            placed[user.shard].add(user.ident)
            if user.moving >= 0:  # whose mail is in two shards, of which one is complete
                placed[user.moving].add(user.ident)
        shards = files.shards()
    for number in shards:
        path = folder / f"shard-{number}"
        descriptor = lock(path)
        try:
            rows, bodies = MailShard(path / "lmdb"), Files(path / "bodies") if read_bodies else None
            try:
                wrong = list(contradictions(rows, bodies, placed[number]))
                if wrong:
                    _repair(rows, bodies, placed[number])
                    left = len(list(contradictions(rows, bodies, placed[number])))
                    yield f"shard {number}: {len(wrong) - left} of {len(wrong)} contradictions corrected"
            finally:
                rows.close()
        except lmdb.Error as error:
            raise store_error(error) from None
        finally:
            os.close(descriptor)


def _repair(rows: MailShard, bodies: Files | None, known: set[int]) -> None:
    """One transaction: all or nothing. A message whose data cannot be read goes."""
    change = Change(rows)
    try:
        for user, _ in list(rows.users(change.txn)):
            if user not in known:
                change.purge(user, 1 << 62)
        known_here = {user for user, _ in rows.users(change.txn)}
        for user, number, _ in list(rows.unfinished(change.txn)):
            if user not in known_here:
                change.remove_unfinished(user, number)
        scripts.mend(rows, change.txn, known_here)
        change.settle()
        if bodies is not None:
            for ident, row in _objects(rows, change.txn):
                try:
                    bodies.read(ident, row.body)
                except StoreError:
                    change.txn.delete(ID.pack(ident), db=rows.tables["object"])
        _recount(rows, change.txn)
        change.finish(rows.meta_in(change.txn, b"seen"))
    except BaseException:
        change.abort()
        raise


def _objects(rows: MailShard, txn: Any) -> Iterator[tuple[int, ObjectRow]]:
    """All objects, of which the caller may change or remove the one that it has; not all in memory at once."""
    after = -1
    while page := list(islice(rows.objects(txn, after), PAGE)):
        yield from page
        after = page[-1][0]


def _recount(rows: MailShard, txn: Any) -> None:
    references: Counter[int] = Counter()
    for user, row in list(rows.users(txn)):
        owner = UserRow(uidvalidity=row.uidvalidity, frozen=row.frozen)
        for found in list(rows.mailboxes(txn, user)):
            if not found.mailbox:
                continue
            state = rows.state(txn, found.mailbox)
            if state is None:  # lost: clients have to synchronise anew
                state = MailboxState(owner.uidvalidity)
                owner.uidvalidity += 1
            _recount_mailbox(rows, txn, found.mailbox, state, owner, references)
        for _, _, unfinished in list(rows.unfinished(txn, user)):
            owner.messages += unfinished.messages
            owner.octets += unfinished.octets
            if unfinished.removed:
                references.update(message.object for _, message in _kept(rows, txn, unfinished.mailbox))
        txn.put(ID.pack(user), encode(owner), db=rows.tables["user"])
    live: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for ident, found_object in _objects(rows, txn):
        count = references.get(ident, 0)
        if not count:
            txn.delete(ID.pack(ident), db=rows.tables["object"])
            continue
        if count != found_object.references:
            txn.put(ID.pack(ident), encode(msgspec.structs.replace(found_object, references=count)), db=rows.tables["object"])
        if found_object.body.segment:
            live[found_object.body.segment][0] += 1
            live[found_object.body.segment][1] += FRAME.size + found_object.body.length
    for number, segment in list(rows.segment_rows(txn)):
        count, octets = live[number]
        if (count, octets) != (segment.live, segment.live_bytes):
            new = msgspec.structs.replace(segment, live=count, live_bytes=octets)
            txn.put(SEGMENT.pack(number), encode(new), db=rows.tables["segment"])


def _kept(rows: MailShard, txn: Any, mailbox: int) -> list[tuple[int, MessageRow]]:
    """The messages of a mailbox. One without its data goes."""
    kept = []
    for uid, message in list(rows.messages(txn, mailbox)):
        if rows.object(txn, message.object) is None:
            txn.delete(MESSAGE.pack(mailbox, MESSAGE_KIND, uid), db=rows.tables["mail"])
        else:
            kept.append((uid, message))
    return kept


def _recount_mailbox(
    rows: MailShard, txn: Any, mailbox: int, state: MailboxState, owner: UserRow, references: Counter[int]
) -> None:
    """Count a mailbox anew. A message that the index does not have is put there, without flags. Where one went or came, MODSEQ is
    raised, and what was expunged before that is forgotten, so that clients look at all of it."""
    index = rows.index(txn, mailbox)
    state.messages = state.unseen = state.deleted = state.octets = state.vanished = 0
    known = {record.uid: record for record in index}
    kept, gone = _kept(rows, txn, mailbox), list(rows.expunged(txn, mailbox))
    state.modseq = max([state.modseq, *(record.modseq for record in known.values()), *(modseq for modseq, _ in gone)])
    if [uid for uid, _ in kept] != list(known):
        state.modseq += 1
        state.forgotten = state.modseq
    for modseq, runs in gone:
        state.uidnext = max(state.uidnext, *(last + 1 for _, last in runs))
        if modseq <= state.forgotten:
            txn.delete(EXPUNGED.pack(mailbox, 3, modseq), db=rows.tables["mail"])
        else:
            state.vanished += sum(last - first + 1 for first, last in runs)
    there: list[Record] = []
    named = (1 << (SYSTEM_FLAGS + len(state.keywords))) - 1
    for uid, message in kept:
        record = known.get(uid) or Record(uid, 0, state.modseq)
        record = record._replace(flags=record.flags & named)
        there.append(record)
        references[message.object] += 1
        tally(state, owner, record.flags, message.size, 1)
        state.uidnext = max(state.uidnext, uid + 1)
    if there != list(known.values()):
        index.write_all(there)
    txn.put(STATE.pack(mailbox, 0), encode(state), db=rows.tables["mail"])
