"""The index of a mailbox against a dict, in any order of changes."""

import random

import lmdb
import pytest

from relaymta.store.blocks import MOST, RECORD, Blocks, Record, records_of


def append(blocks: Blocks, record: Record) -> None:
    blocks.extend(RECORD.pack(record.uid, 0, record.flags, record.modseq))


@pytest.fixture
def table(tmp_path):
    env = lmdb.open(str(tmp_path), max_dbs=1)
    mail = env.open_db(b"mail")
    with env.begin(write=True) as txn:
        yield txn, mail
        txn.abort()


@pytest.mark.parametrize("seed", range(40))
def test_blocks_hold_what_a_dict_holds(table, seed):
    txn, mail = table
    chance = random.Random(seed)
    neighbours = [Blocks(txn, mail, number) for number in (6, 8)]
    for blocks in neighbours:
        append(blocks, Record(5, 1, 1))
    blocks, model, uidnext = Blocks(txn, mail, 7), {}, 1
    for step in range(60):
        what = chance.random()
        if what < 0.5:
            for _ in range(chance.choice((1, 30, 100))):
                uidnext += chance.choice((0, 0, 1, 50))
                model[uidnext] = Record(uidnext, chance.getrandbits(64), step)
                append(blocks, model[uidnext])
                uidnext += 1
        elif model:
            uids = sorted(chance.sample(sorted(model), chance.randint(1, min(len(model), chance.choice((1, 5, 200))))))
            if what < 0.75:
                new = {uid: Record(uid, chance.getrandbits(64), step) for uid in uids if uid in model}
                chosen = blocks.choose(
                    sorted({*uids, *(chance.randint(1, uidnext + 3) for _ in range(5))} - (model.keys() - new.keys()))
                )
                assert [record for one in chosen for record in records_of(one.records)] == [model[uid] for uid in new]
                for one in chosen:
                    blocks.replace(
                        one, b"".join(RECORD.pack(uid, 0, *new[uid][1:]) for uid, *_ in RECORD.iter_unpack(one.records))
                    )
                model |= new
            else:
                blocks.remove(uids)
                model = {uid: record for uid, record in model.items() if uid not in uids}
        there = [model[uid] for uid in sorted(model)]
        assert list(blocks) == there
        first = chance.randint(1, uidnext + 3)
        last = first + chance.randint(0, 200)
        assert list(blocks.range(first, last)) == [record for record in there if first <= record.uid <= last]
        assert blocks.get(first) == model.get(first)
    assert all(list(blocks) == [Record(5, 1, 1)] for blocks in neighbours)


def test_what_is_not_there_is_not_changed(table):
    txn, mail = table
    blocks = Blocks(txn, mail, 7)
    append(Blocks(txn, mail, 6), Record(1, 0, 1))
    for uids in ([1], [2, 3]):
        with pytest.raises(KeyError):
            blocks.remove(uids)
    append(blocks, Record(2, 0, 1))
    for uid in (1, 3):
        assert blocks.choose([uid]) == []
    assert list(blocks) == [Record(2, 0, 1)]
    assert blocks.get(1) is None


def test_few_messages_take_few_blocks(table):
    txn, mail = table
    blocks = Blocks(txn, mail, 7)
    for uid in range(1, 100 * MOST + 1):
        append(blocks, Record(uid, 0, uid))
    assert len(list(blocks.blocks())) == 100
    for keep in (10, 50, 400):  # of each so many messages one is left
        blocks.remove([record.uid for record in list(blocks) if record.uid % keep])
        left = sum(1 for _ in blocks)
        assert left == 100 * MOST // keep or keep == 50
        assert len(list(blocks.blocks())) <= 1 + left / (MOST // 4) * 2
