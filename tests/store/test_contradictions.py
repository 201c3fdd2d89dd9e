"""What cannot be written, since it contradicts the rows that are there, hurts nobody else; and clients hear of what
`verify --repair` has done."""

import asyncio

import msgspec
import pytest

from relaymta.errors import StoreError
from relaymta.store.backup import copy_shard
from relaymta.store.carry import Carried, convert_part
from relaymta.store.change import Change
from relaymta.store.directory import Directory, User
from relaymta.store.reading import ShardReader
from relaymta.store.repair import repair
from relaymta.store.rows import ID, INBOX, STATE, MailShard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target
from relaymta.view import reading
from tests.store.sessions import ANY, Failing, filed, settled, text, unfinished, used
from tests.store.test_shard import Bench

ALL = 1 << 32


@pytest.fixture
def told(capfd):
    """What a defect has left on stderr, which is not shown where it is expected."""
    yield capfd.readouterr


# The group commit


@pytest.mark.parametrize("value", ["\ud800", object(), 1 << 64])
async def test_a_change_that_cannot_be_written_fails_alone(bench, value):
    """It is collected, and written at the end of the task: the encoder refuses it there."""
    box, _ = bench.mailbox(1)

    def unwritable(change: Change) -> str:
        change.create_mailbox(1, "half")
        state = change.state(box)
        if isinstance(value, int):
            state.uidnext = value
        else:
            state.keywords = [value]
        return "done"

    results = await asyncio.gather(
        bench.file(text(1), Target(1)),
        bench.shard.task(lambda change: change.create_mailbox(1, "before").name),
        bench.shard.task(unwritable),
        bench.shard.task(lambda change: change.create_mailbox(1, "after").name),
        return_exceptions=True,
    )
    (result,) = results[0]
    assert result.filed.uid == 1 and results[1::2] == ["before", "after"]
    assert isinstance(results[2], Exception) and not isinstance(results[2], StoreError)
    with bench.shard.rows.reading() as txn:
        assert {row.name for row in bench.shard.rows.mailboxes(txn, 1)} == {INBOX, "Sent", "before", "after"}
    (result,) = await bench.file(text(2), Target(1))
    assert result.filed.uid == 2, "the writer goes on"


@pytest.mark.parametrize("size", [10_000, 1_500_000])
async def test_a_message_that_contradicts_the_rows_fails_alone(bench, told, size):
    """UIDNEXT says less than the index has. Others of the group are filed once; nothing of it is left, neither rows nor data."""
    await filed(bench, 3)
    await filed(bench, 1, "Sent")
    box, state = bench.mailbox(1)
    live = bench.shard.segments.usage()[1]

    def lower(change: Change) -> None:
        change.state(box).uidnext = 2

    await bench.shard.task(lower)
    good = [Target(1, "Sent", once=(7, number, 1)) for number in range(2)]
    results = await asyncio.gather(
        bench.file(text(1), good[0]),
        bench.file(b"z" * size, Target(1, once=(8, 0, 1)), Target(1, "Sent", once=(8, 1, 1))),
        bench.file(text(1), good[1]),
        bench.shard.task(lambda change: change.create_mailbox(1, "new").name),
        return_exceptions=True,
    )
    assert isinstance(results[1], StoreError) and "cannot be filed" in str(results[1])
    assert [results[0][0].filed.uid, results[2][0].filed.uid, results[3]] == [2, 3, "new"]
    assert [data for *_, data in bench.messages(1, "Sent")] == [text(1)] * 3 and "is not the highest" in told().err
    assert bench.shard.segments.big_files() == []
    with bench.shard.rows.reading() as txn:
        assert not bench.shard.rows.is_done(txn, 8, 1, 1)
    assert bench.shard.segments.usage()[1] - live < 200, "its data counts no more"

    def correct(change: Change) -> None:
        change.state(box).uidnext = state.uidnext

    await bench.shard.task(correct)
    (result,) = await bench.file(b"z" * size, Target(1, once=(8, 0, 1)))
    assert result.filed.uid == 4, "the queue asks again"


# Repair


@pytest.fixture
async def broken(tmp_path):
    """`broken(damage)` lets `damage(rows, txn, mailbox)` change the shard in which a user has 8 messages, and repairs it: the
    state of INBOX before."""
    directory = Directory(tmp_path / "directory", writable=True)
    directory.add(User(1, "alice@local.example", 0))
    directory.close()
    async with Bench(tmp_path) as bench:
        await bench.user(1, "Sent")
        await filed(bench, 8)
        await filed(bench, 2, "Sent")
        await bench.shard.expunge(1, bench.mailbox(1)[0], [2])
        number, state = bench.mailbox(1)

    def break_(damage):
        rows = MailShard(tmp_path / "shard-0" / "lmdb")
        with rows.env.begin(write=True) as txn:
            damage(rows, txn, number)
        rows.close()
        (sentence,) = repair(tmp_path)
        assert sentence.split()[2] == sentence.split()[4], sentence
        return state

    yield tmp_path, break_


def lose_data(rows, txn, mailbox):
    txn.delete(ID.pack(rows.message(txn, mailbox, 5).object), db=rows.tables["object"])


def lose_index(rows, txn, mailbox):
    assert txn.delete(ID.pack(mailbox) + b"\x01\0\0\0\x01", db=rows.tables["mail"])


@pytest.mark.parametrize("damage, left", [(lose_data, [1, 3, 4, 6, 7, 8]), (lose_index, [1, 3, 4, 5, 6, 7, 8])])
async def test_clients_that_synchronise_hear_of_what_was_repaired(broken, damage, left):
    """QRESYNC: MODSEQ is higher than what a client knows, and of what was expunged since then not all is known, so that it is
    told of all that are not there; and a message that came back has changed."""
    folder, break_ = broken
    before = break_(damage)
    async with Bench(folder) as bench:
        number, state = bench.mailbox(1)
        assert state.modseq > before.modseq and (state.uidvalidity, state.uidnext) == (before.uidvalidity, before.uidnext)
        assert [uid for uid, *_ in bench.messages(1)] == left
        assert reading.expunged(bench.shard, number, before.modseq) is None
        changes = reading.changes(bench.shard, number, before.modseq, before.uidnext, False, lambda modseq: False, ALL)
        assert changes.modseq == state.modseq and changes.expunged is None and changes.uids is not None
        assert len(changes.records) == (0 if damage is lose_data else 24 * 7)
        await bench.shard.expunge(1, number, [1])
        assert reading.expunged(bench.shard, number, state.modseq) == [(1, 1)], "from now on it is known"


async def test_repair_goes_on_past_a_mailbox_without_a_state(broken):
    folder, break_ = broken

    def damage(rows, txn, mailbox):
        lose_data(rows, txn, mailbox)
        txn.delete(STATE.pack(rows.mailbox(txn, 1, "Sent").mailbox, 0), db=rows.tables["mail"])

    reader = ShardReader(folder / "shard-0")
    with reader.rows.reading() as txn:
        validities = {row.name: reader.rows.state(txn, row.mailbox).uidvalidity for row in reader.rows.mailboxes(txn, 1)}
    reader.close()
    break_(damage)
    async with Bench(folder) as bench:
        assert [uid for uid, *_ in bench.messages(1)] == [1, 3, 4, 6, 7, 8]
        assert [data for *_, data in bench.messages(1, "Sent")] == [text(1), text(2)]
        found = {name: bench.mailbox(1, name)[1].uidvalidity for name in validities}
        assert found[INBOX] == validities[INBOX] and found["Sent"] > max(validities.values())
        await bench.shard.create(1, "new")
        assert bench.mailbox(1, "new")[1].uidvalidity > found["Sent"]
        assert used(bench.shard)[0] == 8


# What was unfinished


async def test_nothing_of_half_a_copy_is_restored(bench, memory_path, small_slices):
    """A backup amid a COPY: the user who is restored from it has none of its messages, but what others had filed meanwhile."""
    await filed(bench, 8)
    backups = []

    async def meanwhile(number):
        if number == 4:  # two slices are done
            await bench.file(b"of another", Target(1, "Sent"))
            copy_shard(bench.shard.rows, bench.shard.path / "bodies", memory_path / "copy")
            backups.append(unfinished(bench.shard))

    Failing(bench.shard, before=meanwhile)
    await bench.shard.copy(1, bench.mailbox(1)[0], list(range(1, 9)), "Sent", ANY, False)
    ((_, _, row),) = backups[0]
    assert row.uids == [(1, 6)] and (row.messages, row.octets) != (0, 0), "the backup is of a COPY under way"
    reader = ShardReader(memory_path / "copy", locked=False)
    async with Bench(memory_path / "restored") as other:
        carried = Carried(reader, 1, 1_900_000_000)
        for part in carried.parts():
            sent = convert_part(msgspec.msgpack.decode(msgspec.msgpack.encode(part)))
            carried.put(part, await other.shard.take(5, sent))
        assert [data for *_, data in other.messages(5, "Sent")] == [b"of another"]
        assert [data for *_, data in other.messages(5)] == [text(number) for number in range(1, 9)]
        assert unfinished(other.shard) == [] and list(contradictions(other.shard.rows, other.shard.segments)) == []
        with other.shard.rows.reading() as txn:
            assert other.shard.rows.user(txn, 5).messages == 9
    reader.close()
    await settled(bench.shard)
