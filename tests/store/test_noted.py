"""What is kept of a message's data beside it."""

import random
from hashlib import sha256

import pytest

from relaymta.errors import StoreError
from relaymta.proto.envelope import encode
from relaymta.proto.mime import describe
from relaymta.store import noted
from relaymta.store.directory import Directory, User
from relaymta.store.repair import repair
from relaymta.store.rows import ObjectRow
from relaymta.store.verify import contradictions
from relaymta.store.writer import Target
from tests.store.sessions import ANY, described, filed
from tests.store.test_shard import Bench


@pytest.mark.parametrize("size", [0, 5000, 1_500_000])
async def test_a_message_is_described_when_it_is_filed(bench, size):
    data = b"Subject: hello\r\nFrom: a@b.example\r\n\r\n" + b"text\r\n" * (size // 6)
    await bench.file(data, Target(1), Target(1, "Sent"))
    await bench.shard.copy(1, bench.mailbox(1)[0], [1], "Sent", ANY, False)
    ((stored, row),) = described(bench.shard)
    assert stored == data and row.references == 3
    assert row.described == describe(data) and row.digest == sha256(data).digest()[:16]


async def test_a_description_that_is_too_long_is_not_kept(bench):
    data = b"Content-Type: multipart/mixed; boundary=x\r\n\r\n" + b"--x\r\n\r\n.\r\n" * 2000
    await bench.file(data, Target(1))
    ((_, row),) = described(bench.shard)
    assert row.described is None and row.digest == sha256(data).digest()[:16]


async def test_of_a_very_large_message_there_is_a_digest_alone(bench, monkeypatch):
    monkeypatch.setattr(noted, "SCANNED_MOST", 2_000_000)
    data = b"Subject: x\r\n\r\n" + random.Random(1).randbytes(3_000_000)
    await bench.file(data, Target(1))
    ((_, row),) = described(bench.shard)
    assert row.described is None and row.digest == sha256(data).digest()[:16]


async def test_rows_of_older_versions_are_read_and_repair_keeps_what_is_there(tmp_path):
    directory = Directory(tmp_path / "directory", writable=True)
    directory.add(User(1, "alice@local.example", 0))
    directory.close()
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await filed(bench, 3)
        before = described(bench.shard)
        with bench.shard.rows.reading() as txn:
            (first, row), *_ = bench.shard.rows.objects(txn)
        old = encode([row.references, row.body])
        await bench.shard.task(lambda change: change.txn.put(first.to_bytes(8, "big"), old, db=bench.shard.rows.tables["object"]))
        assert described(bench.shard) == [(before[0][0], ObjectRow(1, row.body)), *before[1:]]

        def damage(change):
            change.state(1).messages = 77

        await bench.shard.task(damage)
        assert list(contradictions(bench.shard.rows))
        await bench.shard.stop()
        assert list(repair(tmp_path))
        await bench.__aenter__()
        assert described(bench.shard) == [(before[0][0], ObjectRow(1, row.body)), *before[1:]]


async def test_a_large_body_that_can_be_neither_read_nor_removed_is_a_store_error(bench, monkeypatch):
    """Whoever asked for it is told so, and goes on."""

    def unreadable(path, body):
        path.unlink()
        path.mkdir()  # which cannot be removed as a file is
        raise StoreError("EIO")

    monkeypatch.setattr(noted, "_noted_of", unreadable)
    with pytest.raises(StoreError, match="EIO"):
        await bench.file(b"Subject: x\r\n\r\n" + b"x" * 1_500_000, Target(1))
    monkeypatch.undo()
    await bench.file(b"Subject: x\r\n\r\n" + b"x" * 1_500_000, Target(1))
