"""Sieve scripts of users, and whom a vacation reply went to: in a shard, after a crash, carried, restored, removed, mended."""

import asyncio
import random
import shutil
import subprocess
import sys

import lmdb
import msgspec
import pytest

from relaymta.disk.folders import make_folder
from relaymta.errors import StoreError
from relaymta.proto.sieve import SCRIPT_MOST
from relaymta.store import scripts
from relaymta.store.backup import copy_shard
from relaymta.store.carry import Carried, convert_part
from relaymta.store.change import CANNOT, EXISTS, LIMIT, MISSING, MOVING, OVERQUOTA, Refusal
from relaymta.store.directory import Directory
from relaymta.store.mailboxes import CHANGES, Mailboxes
from relaymta.store.others import ReadOnly
from relaymta.store.reading import ShardReader
from relaymta.store.repair import _repair
from relaymta.store.rows import SCHEMA, MailShard
from relaymta.store.scripts import INVALID, NAME_MOST, PIECE, REPLIES_MOST, SCRIPTS_MOST
from relaymta.store.verify import contradictions
from tests.store.test_shard import Bench

LARGE = b"#" + b"x" * (SCRIPT_MOST - 1)


def listed(rows: MailShard, user: int = 1) -> dict[str, tuple[int, bool]]:
    with rows.reading() as txn:
        return {one.name: (one.size, one.active) for one in scripts.scripts(rows, txn, user)}


def text(rows: MailShard, name: str, user: int = 1) -> bytes | None:
    with rows.reading() as txn:
        return scripts.text(rows, txn, user, name)


def active(rows: MailShard, user: int = 1) -> bytes | None:
    with rows.reading() as txn:
        found = scripts.active_text(rows, txn, user)
    return None if found is None else found[1]


async def refused(operation) -> str:
    with pytest.raises(Refusal) as found:
        await operation
    return found.value.code


async def test_scripts_are_kept_replaced_renamed_and_removed(bench):
    shard, rows = bench.shard, bench.shard.rows
    await shard.put_script(1, "one", b"keep;")
    await shard.put_script(1, "two", LARGE)
    assert listed(rows) == {"one": (5, False), "two": (SCRIPT_MOST, False)} and text(rows, "two") == LARGE
    assert active(rows) is None
    await shard.activate_script(1, "one")
    assert active(rows) == b"keep;"
    assert await refused(shard.remove_script(1, "one")) == CANNOT
    await shard.put_script(1, "one", b"stop;")
    assert active(rows) == b"stop;" and listed(rows)["one"] == (5, True), "it stays active"
    assert await refused(shard.rename_script(1, "one", "two")) == EXISTS
    await shard.rename_script(1, "one", "three")
    assert active(rows) == text(rows, "three") == b"stop;" and text(rows, "one") is None
    await shard.activate_script(1, "two")
    await shard.remove_script(1, "three")
    await shard.activate_script(1, "")
    assert listed(rows) == {"two": (SCRIPT_MOST, False)} and active(rows) is None
    for operation in (shard.remove_script(1, "x"), shard.activate_script(1, "x"), shard.rename_script(1, "x", "y")):
        assert await refused(operation) == MISSING
    assert listed(rows, 2) == {}


async def test_a_new_text_has_a_new_id(bench):
    rows, seen = bench.shard.rows, set()
    for word in (b"keep;", b"stop;", b"keep;"):
        await bench.shard.put_script(1, "a", word)
        await bench.shard.activate_script(1, "a")
        with rows.reading() as txn:
            seen.add(scripts.active_ident(rows, txn, 1))
    assert len(seen) == 3


async def test_what_cannot_be_kept_is_refused(bench):
    put = bench.shard.put_script
    with pytest.raises(Refusal, match=r'^line 2:1: unknown command "filinto" \(did you mean "fileinto"\?\)$') as found:
        await put(1, "a", b'keep;\nfilinto "x";')
    assert found.value.code == INVALID
    assert await refused(put(1, "a", LARGE + b"x")) == OVERQUOTA
    for name in ("", "x" * (NAME_MOST + 1), "é" * 257, "a\nb", "\x7f", "\x85", "a\u2028", "\u2029"):
        assert await refused(put(1, name, b"keep;")) == CANNOT, name
    assert await refused(put(9, "a", b"keep;")) == MISSING
    for number in range(SCRIPTS_MOST):
        await put(1, f"s{number}", b"keep;")
    assert await refused(put(1, "more", b"keep;")) == LIMIT
    await put(1, "s0", b"stop;")
    await bench.shard.freeze(1)
    for operation in (
        put(1, "s0", b"keep;"),
        bench.shard.activate_script(1, "s0"),
        bench.shard.remember_reply(1, b"k", 9, 1, b""),
    ):
        assert await refused(operation) == MOVING


async def test_long_names_differ_by_all_of_their_octets(bench):
    names = [end.rjust(NAME_MOST, "n") for end in ("a", "b", "é"[:1])]
    names[2] = "n" * (NAME_MOST - 2) + "é"
    for number, name in enumerate(names):
        await bench.shard.put_script(1, name, b"#%d" % number)
    assert [text(bench.shard.rows, name) for name in names] == [b"#0", b"#1", b"#2"]


async def test_no_value_needs_pages_of_its_own(bench):
    for number in range(3):
        await bench.shard.put_script(1, f"s{number}", LARGE)
    rows = bench.shard.rows
    with rows.reading() as txn:
        assert txn.stat(rows.tables["sieve"])["overflow_pages"] == 0
        assert max(len(value) for _, value in txn.cursor(db=rows.tables["sieve"])) == PIECE


async def test_random_operations_against_a_dictionary(bench):
    chance, rows = random.Random(5), bench.shard.rows
    known: dict[str, bytes] = {}
    now = ""
    for _ in range(300):
        name, other = (chance.choice("abcdefg") for _ in range(2))
        what = chance.choice(("put", "put", "activate", "remove", "rename"))
        try:
            if what == "put":
                data = b"#" + b"x" * chance.choice((0, 3, PIECE - 1, PIECE, 5000))
                await bench.shard.put_script(1, name, data)
                known[name] = data
            elif what == "activate":
                await bench.shard.activate_script(1, name)
                now = name
            elif what == "remove":
                await bench.shard.remove_script(1, name)
                del known[name]
            else:
                await bench.shard.rename_script(1, name, other)
                known[other] = known.pop(name)
                now = other if now == name else now
        except Refusal as refusal:
            assert (refusal.code == MISSING) == (name not in known)
        assert listed(rows) == {one: (len(data), one == now) for one, data in sorted(known.items())}
        assert active(rows) == known.get(now)
        assert bench.shard.has_script(1) == (now in known), "what is remembered follows each change"
    with rows.reading() as txn:
        assert list(scripts.contradictions(rows, txn, {1})) == []


async def test_what_was_kept_is_there_after_a_crash(tmp_path):
    async with Bench(tmp_path / "a") as bench:
        await bench.user(1)
        await bench.shard.put_script(1, "a", LARGE)
        await bench.shard.activate_script(1, "a")
        await bench.shard.remember_reply(1, b"key", 100, 50, b"q1")
        shutil.copytree(tmp_path / "a", tmp_path / "b")  # what a crash leaves
    async with Bench(tmp_path / "b") as bench:
        assert active(bench.shard.rows) == LARGE
        assert not await bench.shard.remember_reply(1, b"key", 100, 99, b"q2")


# Vacation replies


async def test_a_reply_is_sent_once_until_its_time_is_over(bench):
    remember = bench.shard.remember_reply
    assert await remember(1, b"s@x.example", 100, 10, b"q1")
    assert not await remember(1, b"s@x.example", 150, 99, b"q2")
    assert await remember(1, b"s@x.example", 150, 99, b"q1"), "who asks again for the same message has the same answer"
    assert await remember(1, b"t@x.example", 100, 10, b"q3")
    assert await remember(1, b"s@x.example", 200, 100, b"q5")
    assert await remember(1, b"k" * 1000, 200, 100, b"q6") and not await remember(1, b"k" * 1000, 200, 100, b"q7")
    assert await remember(1, b"k" * 1001, 200, 100, b"q8"), "long keys are told apart by all of their octets"


async def test_replies_that_are_remembered_are_bounded(bench, monkeypatch):
    monkeypatch.setattr("relaymta.store.scripts.REPLIES_MOST", 50)
    rows = bench.shard.rows
    for number in range(200):
        assert await bench.shard.remember_reply(1, b"%d" % number, 1000 + number, 0, b"")
    with rows.reading() as txn:
        found = scripts.replies(rows, txn, 1)
    assert len(found) == 50 and (b"199", 1199, b"") in found
    for number in range(60):
        await bench.shard.remember_reply(1, b"later %d" % number, 10_000, 5000, b"")
    with rows.reading() as txn:
        assert {until for _, until, _ in scripts.replies(rows, txn, 1)} == {10_000}, "what is over is forgotten"
    assert REPLIES_MOST >= 1000


# Users who come and go


async def filled(bench: Bench) -> None:
    await bench.shard.put_script(1, "large", LARGE)
    await bench.shard.put_script(1, "näme", b"keep;")
    await bench.shard.activate_script(1, "large")
    for number in range(10):
        await bench.shard.remember_reply(1, b"%d" % number, 100, 10, b"q1")


async def test_a_user_takes_scripts_and_replies_along(tmp_path):
    async with Bench(tmp_path / "a") as one, Bench(tmp_path / "b") as other:
        await one.user(1)
        await other.user(7)
        await filled(one)
        assert one.shard.has_script(1) and not other.shard.has_script(1)
        await one.shard.freeze(1)
        carried = Carried(one.shard, 1)
        for part in carried.parts():
            carried.put(part, await other.shard.take(1, convert_part(msgspec.msgpack.decode(msgspec.msgpack.encode(part)))))
        assert listed(other.shard.rows) == listed(one.shard.rows) and active(other.shard.rows) == LARGE
        assert other.shard.has_script(1)
        assert not await other.shard.remember_reply(1, b"5", 200, 99, b"q2")
        assert await other.shard.remember_reply(1, b"5", 200, 99, b"q1"), "for the same message it is the same answer"
        assert await other.shard.remember_reply(1, b"x", 9, 1, b"q1")
        assert await one.shard.purge(1)
        assert not one.shard.has_script(1)
        with one.shard.rows.reading() as txn:
            assert txn.stat(one.shard.rows.tables["sieve"])["entries"] == 0


async def test_a_user_is_purged_in_slices(bench):
    await filled(bench)
    calls = 0
    while not await bench.shard.task(lambda change: change.purge(1, 10)):
        calls += 1
    assert calls > 3 and listed(bench.shard.rows) == {}
    with bench.shard.rows.reading() as txn:
        assert txn.stat(bench.shard.rows.tables["sieve"])["entries"] == 0


async def test_a_backup_has_them(tmp_path):
    async with Bench(tmp_path / "a") as bench:
        await bench.user(1)
        await filled(bench)
        copy_shard(bench.shard.rows, tmp_path / "a" / "shard-0" / "bodies", tmp_path / "copy")
        await bench.shard.remove_script(1, "näme")
    reader = ShardReader(tmp_path / "copy", locked=False)
    assert text(reader.rows, "näme") == b"keep;" and active(reader.rows) == LARGE
    async with Bench(tmp_path / "b") as other:
        carried = Carried(reader, 1, uidvalidity=1_800_000_000)
        for part in carried.parts():
            carried.put(part, await other.shard.take(4, part))
        assert listed(other.shard.rows, 4) == {"large": (SCRIPT_MOST, True), "näme": (5, False)}
    reader.close()


# Contradictions


@pytest.mark.parametrize("what", ["piece", "name", "own", "stranger", "reply", "text"])
async def test_contradictions_are_named_and_mended(tmp_path, what):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await filled(bench)
    rows = MailShard(tmp_path / "shard-0" / "lmdb")
    damage(rows, what)
    assert list(contradictions(rows)) != []
    _repair(rows, None, {1})
    assert list(contradictions(rows)) == []
    assert text(rows, "näme") == b"keep;", "what is whole stays"
    if what != "piece":
        assert what == "name" or text(rows, "large") == LARGE
    else:
        assert text(rows, "large") is None and active(rows) is None
    rows.close()


def damage(rows: MailShard, what: str) -> None:
    table = rows.tables["sieve"]
    with rows.env.begin(write=True) as txn:
        keys = [key for key, _ in txn.cursor(db=table)]
        kinds = {kind: [key for key in keys if key[8] == kind] for kind in range(4)}
        if what == "stranger":
            txn.put(b"\0" * 7 + b"\x09" + kinds[1][0][8:], txn.get(kinds[1][0], db=table), db=table)
        elif what == "text":
            txn.put(kinds[2][0][:9] + b"\xff" * 10, b"x", db=table)
        else:
            txn.delete(kinds[{"piece": 2, "name": 1, "own": 0, "reply": 3}[what]][0], db=table)


# Versions


def older(path) -> None:
    """Make a shard what the version before this one has left: without the table."""
    environment = lmdb.open(str(path), max_dbs=16)
    with environment.begin(write=True) as txn:
        txn.drop(environment.open_db(b"sieve", txn=txn))
        txn.put(b"schema", b"2", db=environment.open_db(b"meta", txn=txn))
    environment.close()


async def test_a_shard_of_an_older_version_is_read_and_upgraded(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
    older(tmp_path / "shard-0" / "lmdb")
    reader = ShardReader(tmp_path / "shard-0")
    assert "sieve" not in reader.rows.tables
    with reader.rows.reading() as txn:
        assert scripts.scripts(reader.rows, txn, 1) == scripts.all_scripts(reader.rows, txn, 1) == []
        assert scripts.text(reader.rows, txn, 1, "a") is None and scripts.active_text(reader.rows, txn, 1) is None
        assert scripts.replied_until(reader.rows, txn, 1, b"k") == 0
    assert list(contradictions(reader.rows)) == []
    assert [type(part).__name__ for part in Carried(reader, 1).parts()][:2] == ["CarriedUser", "CarriedMailbox"]
    copy_shard(reader.rows, tmp_path / "shard-0" / "bodies", tmp_path / "copy")
    reader.close()
    async with Bench(tmp_path) as bench:
        assert bench.shard.rows.meta(b"schema") == SCHEMA == 3
        await bench.shard.put_script(1, "a", b"keep;")


async def test_a_table_that_its_owner_adds_is_seen_by_those_who_read(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
    older(tmp_path / "shard-0" / "lmdb")
    others = ReadOnly(tmp_path)
    found = others.shard(0)
    assert found is not None and listed(found.rows) == {}
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", OWNER, str(tmp_path)], check=True, timeout=60)
    others._not_before.clear()  # as a while later
    assert others.shard(0) is found and listed(found.rows) == {"a": (5, False)}
    others.close()


OWNER = """
import asyncio, sys
from pathlib import Path
from relaymta.store.shard import Shard

async def main():
    shard = Shard(Path(sys.argv[1]), 0)
    await shard.start()
    await shard.put_script(1, "a", b"keep;")
    await shard.stop()

asyncio.run(main())
"""


def test_an_older_version_refuses_the_shard(tmp_path, monkeypatch):
    make_folder(tmp_path / "lmdb")
    rows = MailShard(tmp_path / "lmdb")
    with rows.env.begin(write=True) as txn:
        txn.put(b"schema", b"3", db=rows.tables["meta"])
    rows.close()
    monkeypatch.setattr("relaymta.store.rows.SCHEMA", 2)
    with pytest.raises(StoreError, match="written by a newer relaymta"):
        MailShard(tmp_path / "lmdb")


# By way of the owner


async def test_an_owner_is_asked_by_its_peers(tmp_path):
    (tmp_path / "mail").mkdir()
    Directory(tmp_path / "mail" / "directory", writable=True).close()
    mailboxes = Mailboxes(tmp_path, [0])
    await mailboxes.start()
    try:
        await mailboxes.add_user(0, 1, [], 1)
        for what, args in (
            ("put_script", ["a", b"keep;"]), ("activate_script", ["a"]), ("rename_script", ["a", "b"]),
            ("put_script", ["c", b"stop;"]), ("remove_script", ["c"]), ("remember_reply", [b"k", 9, 1, b"q"]),
        ):  # fmt: skip
            answer = await mailboxes.change_for_peer(0, what, msgspec.msgpack.decode(msgspec.msgpack.encode([1, *args])))
            assert answer.error == "" and answer.taken(CHANGES[what][2]) == (True if what == "remember_reply" else None)
        assert listed(mailboxes.shards[0].rows) == {"b": (5, True)}
        answer = await mailboxes.change_for_peer(0, "put_script", [1, "a", b"filinto;"])
        with pytest.raises(Refusal, match=r"^line 1:1: ") as found:
            answer.taken(None)
        assert found.value.code == INVALID
    finally:
        await mailboxes.stop()
