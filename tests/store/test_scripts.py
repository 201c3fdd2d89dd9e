"""Sieve scripts and remembered replies of users: against dicts, across reopening, and what must be refused."""

import random

import pytest

from relaymta.proto.sieve import SCRIPT_MOST
from relaymta.store import scripts
from relaymta.store.carry import Carried
from relaymta.store.change import CANNOT, EXISTS, LIMIT, MISSING, OVERQUOTA, Refusal
from relaymta.store.others import ReadOnly
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from tests.store.test_shard import Bench


def kept(shard, user=1):
    """{name: (text, active)} of a user's scripts."""
    with shard.rows.reading() as txn:
        return {name: (text, active) for name, text, active in scripts.all_scripts(shard.rows, txn, user)}


def script(size: int) -> bytes:
    return b"#" + b"x" * (size - 3) + b"\r\n"


async def test_random_changes_are_what_dicts_say(tmp_path):
    chance, model = random.Random(7), dict[str, tuple[bytes, bool]]()
    names = ["a", "b", "ü" * 200, "x" * 500, "x" * 499 + "y"]
    for _ in range(4):
        async with Bench(tmp_path) as bench:
            if not model:
                await bench.user(1)
            for _ in range(60):
                name, other = chance.choice(names), chance.choice(names)
                try:
                    match chance.randrange(5):
                        case 0 | 1:
                            text = script(chance.choice([3, 1899, 1900, 1901, 5000]))
                            await bench.shard.put_script(1, name, text)
                            model[name] = text, model.get(name, (b"", False))[1]
                        case 2:
                            await bench.shard.activate_script(1, name)
                            model = {one: (text, one == name) for one, (text, _) in model.items()}
                        case 3:
                            await bench.shard.remove_script(1, name)
                            del model[name]
                        case 4:
                            await bench.shard.rename_script(1, name, other)
                            model[other] = model.pop(name)
                except Refusal as refusal:
                    assert refusal.code in (MISSING, CANNOT, EXISTS)
                    assert name not in model or other in model or model[name][1]
                assert kept(bench.shard) == model
            assert list(contradictions(bench.shard.rows, None)) == []


async def test_what_is_refused(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)

        async def code(what, *given):
            with pytest.raises(Refusal) as refusal:
                await getattr(bench.shard, what)(1, *given)
            return refusal.value.code

        for name in ("", "x" * 513, "a\x00", "a\n", "\u2028"):
            assert await code("put_script", name, b"keep;") == CANNOT
        assert await code("put_script", "a", b"filinto;") == scripts.INVALID
        assert (
            await code("activate_script", "a")
            == await code("remove_script", "a")
            == await code("rename_script", "a", "b")
            == MISSING
        )
        for number in range(scripts.SCRIPTS_MOST):
            await bench.shard.put_script(1, f"s{number}", b"keep;")
        assert await code("put_script", "more", b"keep;") == LIMIT
        await bench.shard.put_script(1, "s1", script(SCRIPT_MOST))
        assert await code("rename_script", "s1", "s2") == EXISTS
        await bench.shard.activate_script(1, "s1")
        assert await code("remove_script", "s1") == CANNOT
        with pytest.raises(Refusal):
            await bench.shard.put_script(9, "a", b"keep;")


async def test_too_long_a_script_is_refused(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        with pytest.raises(Refusal) as refusal:
            await bench.shard.put_script(1, "a", script(SCRIPT_MOST + 1))
        assert refusal.value.code in (OVERQUOTA, scripts.INVALID) and kept(bench.shard) == {}


async def test_a_reply_is_remembered_for_its_time_and_claimed_by_one(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        remember = bench.shard.remember_reply
        assert await remember(1, b"key", 100, 10, b"one") and await remember(1, b"key", 200, 20, b"one")
        assert not await remember(1, b"key", 100, 20, b"two") and await remember(1, b"other", 100, 20, b"two")
        assert await remember(1, b"key", 300, 100, b"two") and not await remember(1, b"key", 300, 101, b"one")
        assert await remember(1, b"x" * 500, 300, 100, b"two")


async def test_replies_that_are_over_are_forgotten_and_all_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts, "REPLIES_MOST", 50)
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        for number in range(200):
            assert await bench.shard.remember_reply(1, b"%d" % number, 1000 + number, 10, b"")
        with bench.shard.rows.reading() as txn:
            assert len(scripts.replies(bench.shard.rows, txn, 1)) <= 51
        for number in range(200, 260):
            await bench.shard.remember_reply(1, b"%d" % number, 9000, 5000, b"")
        with bench.shard.rows.reading() as txn:
            assert all(until > 5000 for _, until in scripts.replies(bench.shard.rows, txn, 1))


async def test_they_go_with_the_user_to_another_shard_and_are_purged(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await bench.shard.put_script(1, "a", script(5000))
        await bench.shard.put_script(1, "b", b"keep;")
        await bench.shard.activate_script(1, "b")
        await bench.shard.remember_reply(1, b"key", 100, 10, b"")
        other = Shard(tmp_path, 1)
        await other.start()
        carried = Carried(bench.shard, 1)
        for part in carried.parts():
            carried.put(part, await other.take(1, part))
        assert kept(other) == kept(bench.shard) == {"a": (script(5000), False), "b": (b"keep;", True)}
        with other.rows.reading() as txn:
            assert scripts.replied_until(other.rows, txn, 1, b"key") == 100
        await bench.shard.purge(1)
        assert kept(bench.shard) == {} and list(contradictions(bench.shard.rows, None)) == []
        assert list(contradictions(other.rows, None)) == []
        await other.stop()


async def test_a_shard_of_an_older_version_has_none_and_gets_the_table(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)

        def older(change):
            change.set_meta(b"schema", 2)
            change.txn.drop(bench.shard.rows.tables["sieve"])

        await bench.shard.task(older)
        bench.shard.rows.tables.pop("sieve")
    reader = ReadOnly(tmp_path)
    found = reader.shard(0)
    assert found is not None and kept(found) == {}
    reader.close()
    async with Bench(tmp_path) as bench:
        await bench.shard.put_script(1, "a", b"keep;")
        assert bench.shard.rows.meta(b"schema") == 3
