"""What `mailbox verify` says of a shard that contradicts itself: each contradiction, and nothing else."""

import pytest
from msgspec.structs import replace

from relaymta.disk.environment import SEGMENT
from relaymta.disk.segments import COLD, FRAME, SegmentRow
from relaymta.proto.envelope import Body, encode
from relaymta.store import repair, verify
from relaymta.store.blocks import KEY, KIND, RECORD
from relaymta.store.change import Change, Limits
from relaymta.store.rows import (
    DELETED,
    EXPUNGED,
    ID,
    INBOX,
    MESSAGE,
    MESSAGE_KIND,
    SEEN,
    STATE,
    MailShard,
    MessageRow,
    ObjectRow,
    expunged_value,
)

BOX, OTHER = 1, 2  # INBOX of users 1 and 2
UIDS = range(1, 9)
OBJECT = "object %016x"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two users; the messages of the first, with objects 101 to 108, are the second's, too. UIDs 7 and 8 are expunged of both."""
    monkeypatch.setattr(verify, "RUN", 3)
    rows = MailShard(tmp_path)
    change = Change(rows)
    for user in (1, 2):
        change.add_user(user, [], 7)
    for uid in UIDS:
        change.put_object(100 + uid, ObjectRow(2, Body(1, 1, 0, 10)))
        for user in (1, 2):
            change.file(user, INBOX, MessageRow(100 + uid, 0, 0, 10), SEEN if uid % 2 else DELETED, [], Limits())
    for box in (BOX, OTHER):
        change.expunge(box, box, [7, 8])
    change.settle()
    live = [row for _, row in rows.objects(change.txn)]
    change.segment(1, SegmentRow(1, COLD, len(live), len(live) * (FRAME.size + 10), 0))
    change.finish(0)
    assert list(verify.contradictions(rows, None, {1, 2})) == []
    yield rows
    rows.close()


def block(rows, txn, box, *uids, more=0):
    """Index records of these UIDs, with more flags, in place of those that are there."""
    txn.delete(KEY.pack(box, KIND, 1), db=rows.tables["mail"])
    records = b"".join(RECORD.pack(uid, 0, more | (SEEN if uid % 2 else DELETED), 2) for uid in uids)
    txn.put(KEY.pack(box, KIND, uids[0]), records, db=rows.tables["mail"])


def state(rows, txn, **changes):
    txn.put(STATE.pack(BOX, 0), encode(replace(rows.state(txn, BOX), **changes)), db=rows.tables["mail"])


def reference(rows, txn, ident, references):
    txn.put(ID.pack(ident), encode(replace(rows.object(txn, ident), references=references)), db=rows.tables["object"])


def mail(rows, txn, key, value=b""):
    txn.put(key, value, db=rows.tables["mail"])


BROKEN = {
    "no row": (
        lambda rows, txn: txn.delete(MESSAGE.pack(BOX, MESSAGE_KIND, 3), db=rows.tables["mail"]),
        ["INBOX: the index has UIDs [3] without a row, and not []", "INBOX: counted (6, 3, 3, 50)", OBJECT % 103 + " has 2"],
    ),
    "not in the index": (
        lambda rows, txn: block(rows, txn, BOX, 1, 2, 3, 4, 6),
        ["INBOX: the index has UIDs [] without a row, and not [5]", "INBOX: counted (5, 3, 3, 60)"],
    ),
    "not in order": (lambda rows, txn: block(rows, txn, BOX, 1, 2, 4, 3, 5, 6), ["INBOX: UIDs are not in order"]),
    "an empty block": (
        lambda rows, txn: mail(rows, txn, KEY.pack(BOX, KIND, 9)),
        ["INBOX: the block of UID 9 is malformed"],
    ),
    "octets": (
        lambda rows, txn: state(rows, txn, octets=70),
        ["INBOX: counted (6, 3, 3, 60), but its state says (6, 3, 3, 70)", "6 messages, 60 octets, but its mailboxes have 6, 70"],
    ),
    "uidnext": (lambda rows, txn: state(rows, txn, uidnext=6), ["INBOX: UIDNEXT is 6"]),
    "uidnext of what is gone": (lambda rows, txn: state(rows, txn, uidnext=8), ["INBOX: UIDNEXT is 8"]),
    "modseq": (lambda rows, txn: state(rows, txn, modseq=9), ["INBOX: HIGHESTMODSEQ is 9"]),
    "keywords": (
        lambda rows, txn: block(rows, txn, BOX, *range(1, 7), more=32),
        ["INBOX: there are flags without a keyword"],
    ),
    "expunged and there": (
        lambda rows, txn: mail(rows, txn, EXPUNGED.pack(BOX, 3, 5), expunged_value([(2, 3), (6, 6)], 1)),
        ["INBOX: UIDs [2, 3, 6] are expunged and there"],
    ),
    "vanished": (lambda rows, txn: state(rows, txn, vanished=3), ["INBOX: 3 UIDs should be known to be expunged"]),
    "forgotten": (lambda rows, txn: state(rows, txn, forgotten=10), ["expunged at MODSEQ 10 should be forgotten"]),
    "too many references": (lambda rows, txn: reference(rows, txn, 101, 3), [OBJECT % 101 + " has 3"]),
    "one reference less": (lambda rows, txn: reference(rows, txn, 106, 1), [OBJECT % 106 + " has 1"]),
    "no object": (
        lambda rows, txn: [txn.delete(ID.pack(ident), db=rows.tables["object"]) for ident in (103, 106)],
        [OBJECT % 103 + " of 2 messages is missing", OBJECT % 106 + " of 2 messages is missing", "segment 1 has [4, "],
    ),
    "a stranger's object": (
        lambda rows, txn: txn.put(ID.pack(50), encode(ObjectRow(1, Body(0, 1, 0, 10))), db=rows.tables["object"]),
        [OBJECT % 50 + " has 1"],
    ),
    "no segment": (
        lambda rows, txn: txn.delete(SEGMENT.pack(1), db=rows.tables["segment"]),
        ["segment 1 of 6 bodies has no row"],
    ),
    "nobody's mailbox": (
        lambda rows, txn: [mail(rows, txn, STATE.pack(box, 0), encode(rows.state(txn, BOX))) for box in (40, 70)],
        ["rows of mailbox 40, which nobody has", "rows of mailbox 70, which nobody has"],
    ),
    "no state": (
        lambda rows, txn: txn.delete(STATE.pack(BOX, 0), db=rows.tables["mail"]),
        ["user 1: INBOX: mailbox 1 has no state", "6 messages, 60 octets", *[OBJECT % (100 + uid) for uid in UIDS[:6]]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_each_contradiction_is_said(rows, what):
    break_it, expected = BROKEN[what]
    with rows.env.begin(write=True) as txn:
        break_it(rows, txn)
    found = list(verify.contradictions(rows, None, {1, 2}))
    assert len(found) == len(expected), found
    for sentence, part in zip(found, expected, strict=True):
        assert part in sentence


def test_users_are_those_of_the_directory(rows):
    assert list(verify.contradictions(rows, None, {1, 5, 6}, {6})) == [
        "user 2 is not in the directory", "user 5 of the directory has no mailboxes",
    ]  # fmt: skip
    assert list(verify.contradictions(rows, None, {1}, {2, 7})) == []


LEFT = {"an empty block", "expunged and there", "no segment", "nobody's mailbox"}  # what `--repair` does not correct


@pytest.mark.parametrize("what", sorted(BROKEN.keys() - LEFT))
def test_the_other_contradictions_are_corrected(rows, monkeypatch, what):
    monkeypatch.setattr(repair, "PAGE", 2)
    with rows.env.begin(write=True) as txn:
        BROKEN[what][0](rows, txn)
    repair._repair(rows, None, {1, 2})
    assert list(verify.contradictions(rows, None, {1, 2})) == []
