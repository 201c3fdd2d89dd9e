"""One shard of mailboxes: random operations against dicts, with ends of the process in between; and what must not go wrong."""

import asyncio
import os
import random
import shutil
import threading
import time
from functools import partial
from typing import Any

import pytest

from relaymta.disk import compact
from relaymta.disk.big import BigBody
from relaymta.disk.lock import lock
from relaymta.errors import SpoolBusy, StoreError, StoreFull
from relaymta.store import change, names
from relaymta.store.change import CANNOT, EXISTS, LIMIT, MISSING, OVERQUOTA, Change, Limits, Refusal
from relaymta.store.rows import DELETED, FLAGGED, INBOX, KEYWORD_OCTETS, KEYWORDS_MOST, SEEN
from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions
from relaymta.store.writer import Place, Step, Target
from tests.store.sessions import assert_kept


class Bench:
    """A shard with its users."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.options = options

    async def __aenter__(self):
        self.shard = Shard(self.folder, 0, **self.options)
        await self.shard.start()
        return self

    async def __aexit__(self, *error):
        assert list(contradictions(self.shard.rows, self.shard.segments)) == []
        assert_kept(self.shard)
        await self.shard.stop()

    async def user(self, user, *mailboxes):
        await self.shard.task(lambda change: change.add_user(user, [(name, "") for name in mailboxes], 1_700_000_000))

    async def file(self, data, *targets):
        return await self.shard.file([data], list(targets))

    def mailbox(self, user, name=INBOX):
        with self.shard.rows.reading() as txn:
            row = self.shard.rows.mailbox(txn, user, name)
            return row.mailbox, self.shard.rows.state(txn, row.mailbox)

    def messages(self, user, name=INBOX):
        """(UID, flags, text) of each message."""
        number, _ = self.mailbox(user, name)
        with self.shard.rows.reading() as txn:
            records = list(self.shard.rows.index(txn, number))
            rows = dict(self.shard.rows.messages(txn, number))
        return [(record.uid, record.flags, self.shard.data(rows[record.uid])) for record in records]


@pytest.mark.parametrize("script", [False, True])
async def test_filing_creates_parents_as_create_does_all_of_them_or_none(tmp_path, monkeypatch, script):
    def target(name, **more):
        return Target(1, places=[Place(name, create=True)], **more) if script else Target(1, name, create=True, **more)

    def there():
        with bench.shard.rows.reading() as txn:
            return {row.name: row.subscribed for row in bench.shard.rows.mailboxes(txn, 1) if row.mailbox}

    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await bench.file(b"x", target("A/B/C"))
        await bench.shard.task(lambda change: names.create(change, 1, "D/E/F"))
        assert there() == {INBOX: True, "A": False, "A/B": False, "A/B/C": True, "D": False, "D/E": False, "D/E/F": False}
        before = there()
        for name in ("G/*", "G//H"):
            (refused,) = await bench.file(b"x", target(name))
            assert refused.filed.mailbox == bench.mailbox(1)[0] if script else refused.code == CANNOT
        (refused,) = await bench.file(b"x", target("G/H", limits=Limits(messages=1)))
        assert refused.code == OVERQUOTA and there() == before
        monkeypatch.setattr(change, "MAILBOXES_MOST", len(before) + 2)
        (refused,) = await bench.file(b"x", target("A/G/H/I"))
        assert refused.filed.mailbox == bench.mailbox(1)[0] if script else refused.code == LIMIT
        assert there() == before
        (filed,) = await bench.file(b"x", target("A/G/H"))
        assert filed.filed.mailbox == bench.mailbox(1, "A/G/H")[0]


async def test_a_message_is_filed_once_for_all_its_mailboxes(tmp_path):
    async with Bench(tmp_path) as bench:
        for user in range(20):
            await bench.user(user)
        targets = await bench.file(b"x" * 1000, *(Target(user, prefix=b"Delivered-To: %d\r\n" % user) for user in range(20)))
        assert all(target.filed.uid == 1 for target in targets)
        assert bench.shard.segments.usage()[1] < 2000
        assert bench.messages(7) == [(1, 0, b"Delivered-To: 7\r\n" + b"x" * 1000)]


@pytest.mark.parametrize("size", [1000, 2_000_000])
async def test_what_was_begun_is_filed_though_the_caller_is_cancelled(tmp_path, size):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        calls = [asyncio.create_task(bench.file(b"x" * size, Target(1))) for _ in range(3)]
        await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.gather(calls[0], calls[2])
        assert calls[1].cancelled()
        while len(bench.messages(1)) < 3:
            await asyncio.sleep(0.01)
        assert {len(text) for _, _, text in bench.messages(1)} == {size}


async def test_what_was_filed_is_there_after_a_crash(tmp_path):
    async with Bench(tmp_path / "a") as bench:
        await bench.user(1, "Sent")
        await bench.file(b"first", Target(1), Target(1, "Sent", flags=SEEN, keywords=["$Work"]))
        shutil.copytree(tmp_path / "a", tmp_path / "b")  # what a crash leaves
    async with Bench(tmp_path / "b") as bench:
        assert bench.messages(1) == [(1, 0, b"first")]
        assert bench.messages(1, "Sent") == [(1, SEEN | 1 << 5, b"first")]
        assert bench.mailbox(1, "Sent")[1].keywords == ["$Work"]


async def test_the_queue_may_ask_again_and_nothing_is_filed_twice(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await bench.user(2)
        (first,) = await bench.file(b"text", Target(1, once=(77, 0, 1)))
        again, other = await bench.file(b"text", Target(1, once=(77, 0, 1)), Target(2, once=(77, 1, 2)))
        assert first.filed and not again.filed and not again.code and other.filed
        assert len(bench.messages(1)) == len(bench.messages(2)) == 1
        bench.shard.forget(77, [1])
        (again,) = await bench.file(b"text", Target(1, once=(77, 0, 1)))
        assert not again.filed
        bench.shard.forget(77, [0])
        await bench.shard.task(lambda change: None)
        (again,) = await bench.file(b"text", Target(1, once=(77, 0, 1)))
        assert again.filed, "the queue has forgotten it, and so may we"


async def test_a_full_user_hurts_nobody_else(tmp_path):
    async with Bench(tmp_path) as bench:
        for user in (1, 2, 3):
            await bench.user(user)
        targets = await bench.file(
            b"x" * 100, Target(1), Target(2, limits=Limits(octets=99)), Target(3, limits=Limits(octets=100))
        )
        assert [target.code for target in targets] == ["", OVERQUOTA, ""]
        (target,) = await bench.file(b"x", Target(3, limits=Limits(messages=1)))
        assert (target.code, target.text) == (OVERQUOTA, "there are 1 of 1 messages")
        assert bench.messages(2) == []
        live = bench.shard.segments.usage()[1]
        await bench.file(b"y" * 5000, Target(2, limits=Limits(octets=99)))
        assert bench.shard.segments.usage()[1] == live, "the body of a message that nobody takes is freed"


async def test_unknown_users_and_mailboxes_are_refused(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        targets = await bench.file(b"x", Target(9), Target(1, "No"), Target(1, "Yes", create=True))
        assert [target.code for target in targets] == [MISSING, MISSING, ""]
        assert bench.messages(1, "Yes") == [(1, 0, b"x")]


async def test_keywords_are_of_any_case_and_bounded(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        many = [f"k{n}" for n in range(KEYWORDS_MOST)]
        await bench.file(b"x", Target(1, keywords=["K1", "k1", "$Forwarded"]), Target(1, keywords=["$FORWARDED"]))
        assert bench.mailbox(1)[1].keywords == ["K1", "$Forwarded"]
        refused, fits = await bench.file(b"x", Target(1, keywords=[*many]), Target(1, keywords=many[: KEYWORDS_MOST - 1]))
        assert refused.code == LIMIT and fits.filed
        assert len(bench.mailbox(1)[1].keywords) == KEYWORDS_MOST


async def test_the_row_that_each_delivery_writes_is_bounded_whatever_keywords_there_are(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        (refused,) = await bench.file(b"x", Target(1, keywords=["k" * (KEYWORD_OCTETS + 1)]))
        (script,) = await bench.file(b"x", Target(1, places=[Place(keywords=["k" * (KEYWORD_OCTETS + 1)])]))
        assert refused.code == LIMIT and script.filed and bench.mailbox(1)[1].keywords == []
        many = [f"{n:0{KEYWORD_OCTETS}}" for n in range(KEYWORDS_MOST)]
        (filed,) = await bench.file(b"x", Target(1, keywords=many))
        number, state = bench.mailbox(1)
        with bench.shard.rows.reading() as txn:
            assert filed.filed and state.keywords == many and len(bench.shard.rows.raw_state(txn, number)) < 6200


async def test_a_name_that_comes_back_has_a_higher_uidvalidity(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        (first,) = await bench.file(b"x", Target(1, "A", create=True))

        def remove(change: Change) -> None:
            change.expunge(1, first.filed.mailbox, [1])
            assert not names.delete(change, 1, "A", 10)

        await bench.shard.task(remove)
        (second,) = await bench.file(b"x", Target(1, "A", create=True))
        assert second.filed.uidvalidity > first.filed.uidvalidity
        with pytest.raises(Refusal) as refused:
            await bench.shard.task(lambda change: change.create_mailbox(1, "A"))
        assert refused.value.code == EXISTS


async def test_names_that_are_too_long_for_a_key_are_different_names(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        names = ["x" * 1000, "x" * 999 + "y", "x" * 480]
        for name in names:
            await bench.shard.task(lambda change, name=name: change.create_mailbox(1, name))
            await bench.file(name[-1].encode(), Target(1, name))
        with bench.shard.rows.reading() as txn:
            assert sorted(row.name for row in bench.shard.rows.mailboxes(txn, 1)) == sorted([INBOX, *names])
        assert bench.messages(1, names[1])[0][2] == b"y"


async def test_a_task_that_fails_leaves_nothing_behind(tmp_path):
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        (target,) = await bench.file(b"x", Target(1))

        def fails(change: Change) -> None:
            change.create_mailbox(1, "New")
            change.mailbox(1, "New")  # which is not remembered
            change.expunge(1, target.filed.mailbox, [1])
            raise ZeroDivisionError

        results = await asyncio.gather(
            bench.shard.task(fails), bench.shard.task(lambda change: change.create_mailbox(1, "Other")), return_exceptions=True
        )
        assert isinstance(results[0], ZeroDivisionError)
        assert results[1].name == "Other"
        assert bench.messages(1) == [(1, 0, b"x")]
        with bench.shard.rows.reading() as txn:
            assert [row.name for row in bench.shard.rows.mailboxes(txn, 1)] == [INBOX, "Other"]


async def test_a_step_that_is_refused_or_fails_leaves_the_others(tmp_path):
    """A step is no part of the transaction of its own, until it fails by a defect."""
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await bench.file(b"x", Target(1))
        inbox, _ = bench.mailbox(1)
        calls = []

        def fails(change: Change) -> None:
            calls.append(change)
            change.store_flags(1, inbox, [1], "+", DELETED, [], None)
            raise ZeroDivisionError

        def succeeds_later(change: Change) -> None:
            calls.append(change)
            if len(calls) == 3:
                change.create_mailbox(1, "Lost")
                change.mailbox(1, "Lost")  # which is not remembered
                raise ZeroDivisionError

        def flag(mailbox: int) -> Any:
            return bench.shard.store_flags(1, mailbox, [1], "+", FLAGGED, [], None)

        refused, filed, stored = await asyncio.gather(flag(99), bench.file(b"y", Target(1)), flag(inbox), return_exceptions=True)
        assert isinstance(refused, Refusal) and filed[0].filed is not None and stored.after != stored.before
        assert bench.messages(1) == [(1, FLAGGED, b"x"), (2, 0, b"y")]
        failed, filed, stored, task = await asyncio.gather(
            bench.shard.task(fails, Step),
            bench.file(b"z", Target(1)),
            bench.shard.store_flags(1, inbox, [1], "+", SEEN, [], None),
            bench.shard.task(lambda change: change.create_mailbox(1, "Other")),
            return_exceptions=True,
        )
        assert isinstance(failed, ZeroDivisionError) and len(calls) == 2, "the second time it is undone alone"
        assert filed[0].filed.uid == 3 and stored.after != stored.before and task.name == "Other"
        assert bench.messages(1) == [(1, FLAGGED | SEEN, b"x"), (2, 0, b"y"), (3, 0, b"z")]
        await bench.shard.task(succeeds_later, Step)
        assert len(calls) == 4


async def test_tasks_that_find_no_room_take_that_of_the_ballast(tmp_path, monkeypatch):
    """In groups of ten; mail of the same group is refused, and a task that is refused is refused alone."""
    told: list[dict[int, int]] = []
    async with Bench(tmp_path, told=told.append) as bench:
        await bench.user(1)
        (target,) = await bench.file(b"x", Target(1, once=(7, 0, 1)))
        box, ballast, finish = target.filed.mailbox, bench.shard.disk.ballast, Change.finish
        monkeypatch.setattr(bench.shard.disk, "check", lambda: None)  # which writes it again
        ballast.write_bytes(b"\0" * 4096)
        commits = []

        def full(change: Change, now: int) -> None:
            if ballast.exists():
                raise StoreFull("no room")
            commits.append(change)
            finish(change, now)

        monkeypatch.setattr(Change, "finish", full)

        async def forget() -> None:
            bench.shard.forget(7, [0])

        _, refused, expunged, *created = await asyncio.gather(
            forget(),  # in the same group
            bench.file(b"y", Target(1)),
            bench.shard.task(partial(_expunge, 1, box, [1])),
            *(bench.shard.task(lambda change, name=str(n // 2): change.create_mailbox(1, name)) for n in range(24)),
            return_exceptions=True,
        )
        assert isinstance(refused, StoreFull)
        assert told[-1] == {box: expunged}
        assert len(commits) == 3 and not ballast.exists()
        assert [isinstance(one, Refusal) for one in created] == [False, True] * 12
        (again,) = await bench.file(b"x", Target(1, once=(7, 0, 1)))
        assert again.filed, "it was forgotten, too"


async def test_a_large_message_has_a_file_of_its_own(tmp_path):
    async with Bench(tmp_path / "a") as bench:
        await bench.user(1)
        await bench.user(2)
        data = bytes(range(256)) * 8192
        targets = await bench.file(data, Target(1), Target(2, prefix=b"A: b\r\n"))
        assert bench.messages(2) == [(1, 0, b"A: b\r\n" + data)]
        folder = tmp_path / "a" / "shard-0" / "bodies" / "big"
        assert len(list(folder.iterdir())) == 1
        await bench.file(data, Target(1, limits=Limits(octets=10)))
        assert len(list(folder.iterdir())) == 1, "the file of a message that nobody takes goes"
        (folder / ("0" * 16)).write_bytes(b"left by a crash")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (folder / ("0" * 16)).unlink()
        for user, target in enumerate(targets, 1):
            assert len(list(folder.iterdir())) == 1
            await bench.shard.task(partial(_expunge, user, target.filed.mailbox, [1]))
        assert list(folder.iterdir()) == []
    async with Bench(tmp_path / "b") as bench:
        assert [path.name != "0" * 16 for path in (tmp_path / "b" / "shard-0" / "bodies" / "big").iterdir()] == [True]
        assert bench.messages(1) == [(1, 0, data)]


async def test_a_large_message_that_is_being_written_is_filed_before_the_end(tmp_path, monkeypatch):
    write = BigBody.write

    def slow(file: BigBody, buffers: list[bytes]) -> None:
        time.sleep(0.2)
        write(file, buffers)

    monkeypatch.setattr(BigBody, "write", slow)
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        filing = asyncio.ensure_future(bench.file(b"x" * 2_000_000, Target(1)))
        await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        (result,) = await filing
        for late in (bench.file(b"x", Target(1)), bench.file(b"x" * 2_000_000, Target(1)), bench.shard.task(lambda change: None)):
            with pytest.raises(StoreError, match="is being closed"):
                await late
    async with Bench(tmp_path) as bench:
        assert [uid for uid, _, _ in bench.messages(1)] == [result.filed.uid]


async def test_a_shard_has_one_owner(tmp_path):
    async with Bench(tmp_path):
        with pytest.raises(SpoolBusy):
            Shard(tmp_path, 0)


async def test_an_owner_waits_for_one_that_is_being_ended(tmp_path):
    async with Bench(tmp_path) as bench:
        path = bench.shard.path
    held = lock(path)
    threading.Timer(0.3, os.close, [held]).start()
    async with Bench(tmp_path) as bench:
        await bench.user(1)


async def test_watchers_are_told_what_has_changed(tmp_path):
    told = []
    async with Bench(tmp_path, told=told.append) as bench:
        await bench.user(1)
        (target,) = await bench.file(b"x", Target(1))
        assert told[-1] == {target.filed.mailbox: target.filed.modseq}


@pytest.mark.parametrize("seed", range(6))
async def test_any_operations_leave_what_dicts_hold(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(compact, "SPARE", 0)
    chance, model, ends = random.Random(seed), {}, 0
    texts = {}
    folder = tmp_path / "0"
    for _ in range(4):
        async with Bench(folder) as bench:
            bench.shard.segments.size = 1 << 15
            if not model:
                for user in range(3):
                    await bench.user(user, "A", "B")
                    model |= {(user, name): {} for name in (INBOX, "A", "B")}
                uidnext = dict.fromkeys(model, 1)
            for _ in range(40):
                await asyncio.gather(*(_random(bench, chance, model, uidnext, texts) for _ in range(chance.randint(1, 5))))
            for (user, name), messages in model.items():
                assert bench.messages(user, name) == [(uid, *messages[uid]) for uid in sorted(messages)], (user, name)
                _, state = bench.mailbox(user, name)
                assert state.uidnext == uidnext[user, name]
            ends += 1
            shutil.copytree(folder, tmp_path / str(ends))
        folder = tmp_path / str(ends)
    await asyncio.sleep(0)


async def _random(bench, chance, model, uidnext, texts):
    if chance.random() < 0.6:
        data = chance.randbytes(chance.choice((10, 3000)))
        places = chance.sample(sorted(model), chance.randint(1, 4))
        flags = chance.choice((0, SEEN, DELETED))
        targets = [Target(user, name, flags=flags, prefix=b"%d" % user) for user, name in places]
        for (user, name), target in zip(places, await bench.file(data, *targets), strict=True):
            assert target.filed.uid >= uidnext[user, name] or target.filed.uid not in model[user, name]
            uidnext[user, name] = max(uidnext[user, name], target.filed.uid + 1)
            model[user, name][target.filed.uid] = (flags, b"%d" % user + data)
        return
    place = chance.choice(sorted(model))
    uids = sorted(uid for uid in model[place] if chance.random() < 0.5)
    for uid in uids:
        del model[place][uid]
    number, _ = bench.mailbox(*place)
    await bench.shard.task(partial(_expunge, place[0], number, uids))


def _expunge(user, number, uids, change):
    return change.expunge(user, number, uids)


@pytest.mark.parametrize("uids", [[5, 3], [5, 5], [5, 6, 2]])
async def test_uids_of_one_group_that_do_not_ascend_are_refused_and_the_others_filed(tmp_path, uids):
    """As of a damaged backup: in one mailbox, in one group, whose index records are written together."""
    async with Bench(tmp_path) as bench:
        await bench.user(1)
        await bench.shard.task(lambda change: setattr(change.state(bench.mailbox(1)[0]), "uidnext", 10))
        targets = [Target(1, place=(uid, 1)) for uid in uids]
        filing = (bench.file(b"%d" % number, target) for number, target in enumerate(targets))
        *found, last = await asyncio.gather(*filing, return_exceptions=True)
        assert isinstance(last, StoreError) and all(one[0].filed is not None for one in found)
        assert [uid for uid, *_ in bench.messages(1)] == uids[:-1]
