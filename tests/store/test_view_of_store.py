"""What a shard keeps is what a session's View reads: blocks, expunged UIDs and state, as they come from LMDB."""

import random
from itertools import chain

import pytest

from relaymta.proto.envelope import Body
from relaymta.proto.imap_records import changed, first, load
from relaymta.proto.imap_uids import Shared
from relaymta.proto.imap_view import Changes, Mailbox, View
from relaymta.store.change import Change, Limits
from relaymta.store.rows import INBOX, SEEN, MailShard, MessageRow, ObjectRow
from tests.speedups.index import unpack32

BOX = 1


def changes_since(rows: MailShard, modseq: int) -> Changes:
    """What a worker reads, in one transaction."""
    with rows.reading() as txn:
        state = rows.state(txn, BOX)
        blocks = [block for _, block in rows.index(txn, BOX).blocks()]
        expunged = list(chain.from_iterable(runs for _, runs in rows.expunged(txn, BOX, modseq)))
    return Changes(state.modseq, state.uidnext, state.messages, state.keywords, changed(blocks, modseq), expunged)


@pytest.mark.parametrize("seed", range(8))
def test_views_follow_a_shard(tmp_path, seed):
    chance = random.Random(seed)
    rows = MailShard(tmp_path)
    change = Change(rows)
    change.add_user(1, [], 7)
    change.finish(0)
    views = [View(Shared(), BOX, Mailbox(7, 1, rows_modseq(rows)), b"") for _ in range(2)]
    for step in range(40):
        change = Change(rows)
        there = [record.uid for record in rows.index(change.txn, BOX)]
        some = sorted(chance.sample(there, min(len(there), chance.choice((1, 20, 150)))))
        what = chance.random()
        if what < 0.5 or not some:
            for _ in range(chance.choice((1, 50, 200))):
                ident = chance.getrandbits(60)
                change.put_object(ident, ObjectRow(1, Body(1, 1, 0, 1)))
                change.file(1, INBOX, MessageRow(ident, 0, 0, 1), chance.choice((0, SEEN)), [], Limits())
        elif what < 0.75:
            change.store_flags(1, BOX, some, "", chance.getrandbits(5), [], None)
        else:
            change.expunge(1, BOX, some)
        change.finish(step)
        view, may_expunge = chance.choice(views), chance.random() < 0.7
        list(view.advance(changes_since(rows, view.modseq), may_expunge))
        with rows.reading() as txn:
            blocks = [block for _, block in rows.index(txn, BOX).blocks()]
            records = list(rows.index(txn, BOX))
        assert load(blocks) == view.uids.data or not may_expunge
        assert first(blocks, 0, SEEN) == next((record.uid for record in records if not record.flags & SEEN), 0)
        assert unpack32(load(blocks)) == [record.uid for record in records]
    rows.close()


def rows_modseq(rows: MailShard) -> int:
    with rows.reading() as txn:
        return rows.state(txn, BOX).modseq
