"""Users who come and go: carried to another shard, out of a backup, removed; and shards that are corrupted and repaired."""

import random

import msgspec
import pytest

from relaymta.disk.big import BigBody, BigFile
from relaymta.disk.segments import Segments
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body, encode
from relaymta.store import names
from relaymta.store.backup import copy_shard, renumber
from relaymta.store.carry import Carried, CarriedMessages, convert_part
from relaymta.store.change import EXISTS, MOVING, Refusal
from relaymta.store.directory import Directory, User
from relaymta.store.reading import ShardReader
from relaymta.store.repair import repair
from relaymta.store.rows import DELETED, ID, INBOX, SEEN, STATE, MailboxState, MailShard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target
from tests.store.test_shard import Bench


async def filled(bench: Bench, user: int, count: int, seed: int = 0) -> None:
    """A user with messages in two mailboxes, some of them the same data, some expunged."""
    chance = random.Random(seed)
    await bench.user(user, "Sent")
    for number in range(count):
        flags = chance.choice((0, SEEN, SEEN | DELETED))
        targets = [Target(user, flags=flags, keywords=["$Work"] * chance.choice((0, 1)), prefix=b"Delivered-To: x\r\n")]
        if number % 3 == 0:
            targets += [Target(user, "Sent", once=(number, 7, user), attempt=number), Target(user, date=1_600_000_000_000)]
        await bench.file(b"%d %s\r\n" % (number, b"x" * chance.choice((10, 3000))), *targets)
    number, _ = bench.mailbox(user)
    await bench.shard.task(lambda change: change.expunge(user, number, list(range(1, 5))))


def everything(bench: Bench, user: int):
    """All that a client could see of a user, and what was filed for the user."""
    rows, found = bench.shard.rows, {}
    with rows.reading() as txn:
        names = list(rows.mailboxes(txn, user))
        owner = rows.user(txn, user)
        done = sorted(rows.done_of(txn, user))
        for row in names:
            dates = [(uid, message.date, message.saved, message.size) for uid, message in rows.messages(txn, row.mailbox)]
            state, expunged = rows.state(txn, row.mailbox), list(rows.expunged(txn, row.mailbox))
            records = list(rows.index(txn, row.mailbox))
            found[row.name] = (row.special, row.subscribed, state, expunged, dates, records)
    texts = {name: bench.messages(user, name) for name in found}
    return (owner.octets, owner.messages, owner.uidvalidity), done, found, texts


async def carry(source, target: Bench, user: int, into: int | None = None, uidvalidity: int = 0) -> None:
    carried = Carried(source, user, uidvalidity)
    for part in carried.parts():
        copy = convert_part(msgspec.msgpack.decode(msgspec.msgpack.encode(part)))
        carried.put(part, await target.shard.take(user if into is None else into, copy))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("relaymta.store.carry.MESSAGES", 7)
    monkeypatch.setattr("relaymta.store.reading.PAGE", 5)


async def test_a_user_is_carried_with_all_that_clients_know(tmp_path, small_parts):
    async with Bench(tmp_path / "a") as one, Bench(tmp_path / "b") as other:
        await filled(one, 1, 20)
        await one.file(b"large" * 400_000, Target(1), Target(1, "Sent"))
        for number in range(20):
            await one.file(b"%d" % number, Target(1))
        await filled(other, 9, 3)
        await one.shard.freeze(1)
        before = everything(one, 1)
        await carry(one.shard, other, 1)
        assert everything(other, 1) == before
        assert one.shard.segments.usage()[1] == pytest.approx(
            other.shard.segments.usage()[1] - 3 * 1600, abs=10_000
        )  # data of several mailboxes is there once
        await one.shard.purge(1)
        assert list(one.shard.rows.users(one.shard.rows.env.begin())) == []
        assert one.shard.segments.usage()[1] == 0
        # It goes on as before.
        (filed,) = await other.file(b"next", Target(1))
        assert filed.filed.uid == before[2][INBOX][2].uidnext
        assert await other.file(b"again", Target(1, "Sent", once=(3, 7, 1))) == [type(filed)()]


async def test_a_large_message_is_carried_from_file_to_file_and_verified(tmp_path):
    async with Bench(tmp_path / "a") as one, Bench(tmp_path / "b") as other:
        await one.user(1)
        for number in range(3):
            await one.file(b"%d" % number + b"large" * 400_000, Target(1))
        await one.shard.freeze(1)
        carried = Carried(one.shard, 1, large=lambda file: file)
        for part in carried.parts():
            sent = msgspec.msgpack.encode(part)
            assert len(sent) < 1000 and (not isinstance(part, CarriedMessages) or len(part.entries) <= 3)
            carried.put(part, await other.shard.take(1, convert_part(msgspec.msgpack.decode(sent))))
        assert everything(other, 1) == everything(one, 1)
        damaged = sorted((tmp_path / "a").rglob("bodies/big/*"))[1]
        before = damaged.read_bytes()
        damaged.write_bytes(before[:-1] + b"?")
        with pytest.raises(StoreError, match="checksum"):
            for part in Carried(one.shard, 1, large=lambda file: file).parts():
                await other.shard.take(2, part)
        assert len(list((tmp_path / "b").rglob("bodies/big/*"))) == 4
        damaged.write_bytes(before)


async def test_nothing_is_changed_of_a_frozen_user(tmp_path):
    async with Bench(tmp_path) as bench:
        await filled(bench, 1, 8)
        await bench.shard.freeze(1)
        before = everything(bench, 1)
        number, _ = bench.mailbox(1)
        (refused,) = await bench.file(b"x", Target(1))
        assert refused.code == MOVING
        for change in (
            lambda change: change.expunge(1, number, [6]),
            lambda change: change.create_mailbox(1, "new"),
            lambda change: names.delete(change, 1, "Sent", 10),
        ):
            with pytest.raises(Refusal, match="is being moved"):
                await bench.shard.task(change)
        assert everything(bench, 1) == before


async def test_a_user_is_removed_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr("relaymta.store.sessions.SLICE", 3)
    async with Bench(tmp_path) as bench:
        await filled(bench, 1, 20)
        await filled(bench, 2, 5)
        kept = everything(bench, 2)
        await bench.shard.purge(1)
        await bench.shard.purge(1)
        assert everything(bench, 2) == kept
        with bench.shard.rows.reading() as txn:
            assert [user for user, _ in bench.shard.rows.users(txn)] == [2]
            assert list(bench.shard.rows.mailboxes(txn, 1)) == []


async def test_a_part_that_cannot_be_put_is_refused(tmp_path):
    async with Bench(tmp_path / "a") as one, Bench(tmp_path / "b") as other:
        await filled(one, 1, 5)
        await other.user(1)
        with pytest.raises(Refusal) as refused:
            await carry(one.shard, other, 1)
        assert refused.value.code == EXISTS


async def test_a_backup_is_a_state_that_was(tmp_path):
    async with Bench(tmp_path / "live") as bench:
        await filled(bench, 1, 60)
        await bench.file(b"large" * 400_000, Target(1))
        before = everything(bench, 1)
        copy_shard(bench.shard.rows, bench.shard.path / "bodies", tmp_path / "copy")
        number, _ = bench.mailbox(1)
        for round in range(3):  # all of it goes, and its segments would be used again
            with bench.shard.rows.reading() as txn:
                uids = [record.uid for record in bench.shard.rows.index(txn, number)]
            await bench.shard.task(lambda change, uids=uids: change.expunge(1, number, uids))
            await bench.file(b"%d" % round, Target(1))
        with pytest.raises(StoreError):
            copy_shard(bench.shard.rows, bench.shard.path / "bodies", tmp_path / "copy")
    reader = ShardReader(tmp_path / "copy", locked=False)
    assert list(contradictions(reader.rows, reader.bodies)) == []
    async with Bench(tmp_path / "new") as other:
        await carry(reader, other, 1, into=5)
        owner, done, mailboxes, texts = everything(other, 5)
        assert (owner, done, mailboxes, texts) == (before[0], before[1], before[2], before[3])
        await carry(reader, other, 1, into=6, uidvalidity=1_900_000_000)
        assert [state.uidvalidity for _, _, state, *_ in everything(other, 6)[2].values()] == [1_900_000_000, 1_900_000_001]
        assert everything(other, 6)[3] == before[3]
    reader.close()
    renumber(tmp_path / "copy", 1_900_000_000)
    reader = ShardReader(tmp_path / "copy", locked=False)
    with reader.rows.reading() as txn:
        assert reader.rows.user(txn, 1).uidvalidity == 1_900_000_002
    reader.close()


async def test_a_segment_that_a_backup_has_is_not_used_again(tmp_path):
    segments = Segments(tmp_path, 1 << 20)

    def committed():
        segments.write()
        segments.sync()
        segments.rows()
        segments.unlink()
        segments.settle()

    first = segments.append(1, [b"first"], 5, 0)
    committed()
    (tmp_path / "name").hardlink_to(tmp_path / "00000001.seg")
    segments.append(2, [b"x" * 1_048_540], 1_048_540, 0)  # into another segment
    segments.release(first)
    committed()
    assert segments.append(3, [b"y" * 1_048_540], 1_048_540, 0).segment == 3
    assert segments.doomed() == [1]
    committed()
    assert not (tmp_path / "00000001.seg").exists() and (tmp_path / "name").read_bytes().endswith(b"first")
    segments.close()


DAMAGES = {
    "counts": lambda rows, txn: txn.put(STATE.pack(1, 0), encode(MailboxState(1, 1, 1, 2, 3, 4, 5)), db=rows.tables["mail"]),
    "a block": lambda rows, txn: txn.delete(b"".join((ID.pack(1), b"\x01", b"\0\0\0\x05")), db=rows.tables["mail"]),
    "an object": lambda rows, txn: txn.delete(next(iter(txn.cursor(db=rows.tables["object"])))[0], db=rows.tables["object"]),
    "a segment": lambda rows, txn: txn.put(b"\0\0\0\x01", b"\x96\x01\x00\x01\x02\x03\xc2", db=rows.tables["segment"]),
    "a user": lambda rows, txn: txn.put(ID.pack(77), b"\x93\x01\x02\x03", db=rows.tables["user"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_counted_is_repaired(tmp_path, damage):
    directory = Directory(tmp_path / "directory", writable=True)
    directory.add(User(1, "alice@local.example", 0))
    directory.close()
    async with Bench(tmp_path) as bench:
        await filled(bench, 1, 20)
        texts = {text for _, _, text in bench.messages(1)}
    assert list(repair(tmp_path)) == []
    rows = MailShard(tmp_path / "shard-0" / "lmdb")
    with rows.env.begin(write=True) as txn:
        DAMAGES[damage](rows, txn)
    assert list(contradictions(rows, None, {1}))
    rows.close()
    (sentence,) = repair(tmp_path)
    found, of = map(int, sentence.removeprefix("shard 0: ").removesuffix(" contradictions corrected").split(" of "))
    assert found == of > 0
    async with Bench(tmp_path) as bench:
        left = {text for _, _, text in bench.messages(1)}
        assert left <= texts and len(left) >= len(texts) - (damage == "an object")
        assert list(contradictions(bench.shard.rows, bench.shard.segments, {1})) == []


async def test_a_large_body_is_copied_from_the_queues_file(tmp_path):
    data = b"x" * 3_000_000 + b"\r\n"
    file = BigBody(tmp_path / "queued", 42, 100)
    file.write([data])
    body = file.finish([b"Received: x\r\n"])
    source = BigFile(str(tmp_path / "queued"), 42, body)
    async with Bench(tmp_path / "a") as bench:
        await bench.user(1)
        (result,) = await bench.shard.file(source, [Target(1, prefix=b"P: x\r\n")])
        assert result.filed.uid == 1
        assert bench.messages(1) == [(1, 0, b"P: x\r\nReceived: x\r\n" + data)]
        for wrong in (
            source._replace(ident=43),
            source._replace(path=str(tmp_path / "none")),
            source._replace(body=Body(0, 1, body.offset, 7)),
        ):
            with pytest.raises(StoreError):
                await bench.shard.file(wrong, [Target(1)])
        with (tmp_path / "queued").open("r+b") as changed:
            changed.seek(5000)
            changed.write(b"y")
        with pytest.raises(StoreError, match="checksum"):
            await bench.shard.file(source, [Target(1)])
        assert len(bench.shard.segments.big_files()) == 1 and len(bench.messages(1)) == 1
