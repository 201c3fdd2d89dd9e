"""What a shard keeps is what a session's View reads: blocks, expunged UIDs and state, as they come from LMDB."""

import random
from itertools import chain
from types import SimpleNamespace

import pytest

from relaymta.proto.envelope import Body
from relaymta.proto.imap_records import LAST_UID, changed, first, load, packed
from relaymta.proto.imap_uids import Shared
from relaymta.proto.imap_view import Changes, Mailbox, View
from relaymta.store.change import Change, Limits
from relaymta.store.rows import DELETED, INBOX, SEEN, MailShard, MessageRow, ObjectRow
from relaymta.view import reading
from tests.speedups.index import unpack32

BOX = 1


def changes_since(rows: MailShard, modseq: int) -> Changes:
    """What a worker reads, in one transaction."""
    with rows.reading() as txn:
        state = rows.state(txn, BOX)
        blocks = [block for _, block in rows.index(txn, BOX).blocks()]
        expunged = list(chain.from_iterable(runs for _, runs in rows.expunged(txn, BOX, modseq)))
    return Changes(state.modseq, state.uidnext, state.messages, state.keywords, changed(blocks, modseq), expunged)


def reads_the_same(rows, modseq):
    """What `reading` reads in pieces is what a look at all blocks finds."""
    shard, everything = SimpleNamespace(rows=rows), packed([1, LAST_UID])
    right = changes_since(rows, modseq)
    with rows.reading() as txn:
        blocks = [block for _, block in rows.index(txn, BOX).blocks()]
        records = list(rows.index(txn, BOX))
    found = reading.changes(shard, BOX, modseq, LAST_UID, False, lambda modseq: modseq == -1, LAST_UID)
    assert found == right._replace(uids=None) or right.modseq == modseq
    whole = reading.changes(shard, BOX, modseq, LAST_UID, True, lambda modseq: False, LAST_UID)
    assert whole == right._replace(expunged=None, uids=load(blocks))
    for known in (None, load(blocks)):
        for unseen in (False, True):
            opened = reading.opened(shard, 1, INBOX, lambda mailbox, modseq: known, unseen, LAST_UID)  # noqa: B023
            assert (opened.uids, opened.unseen) == (load(blocks), first(blocks, 0, SEEN) if unseen else 0)
    marked = [record.uid for record in records if record.flags & DELETED]
    assert unpack32(reading.marked(shard, BOX, everything, LAST_UID)) == marked
    assert reading.deleted_octets(shard, BOX) == len(marked)


@pytest.mark.parametrize("seed", range(8))
def test_views_follow_a_shard(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(reading, "TOGETHER", 1 + seed % 3)
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
        reads_the_same(rows, chance.choice(views).modseq)
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
