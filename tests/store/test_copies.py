"""COPY, MOVE and APPEND. What is all or nothing is so for many messages, too: also when it is refused or cancelled."""

import asyncio

import pytest

from relaymta.disk.big import BigBody, BigFile
from relaymta.disk.clock import wall_ms
from relaymta.errors import StoreError, StoreFull
from relaymta.proto.envelope import Body
from relaymta.proto.mime import describe
from relaymta.store import sessions
from relaymta.store.asked import Copied, Message, Partial
from relaymta.store.change import LIMIT, MISSING, MOVING, OVERQUOTA, Limits, Refusal
from relaymta.store.rows import INBOX, KEYWORDS_MOST, SEEN
from relaymta.store.shard import Shard
from relaymta.store.writer import Target
from tests.store.sessions import (
    ANY,
    WORK,
    Failing,
    described,
    filed,
    refused,
    rows,
    settled,
    text,
    unfinished,
    used,
)


async def test_a_copy_keeps_what_a_message_has(bench):
    await bench.file(text(1), Target(1, prefix=b"To: x\r\n", flags=SEEN, keywords=["$Work", "b"], date=5000, saved=6000))
    await bench.file(text(2), Target(1, "Sent", keywords=["B", "c"]))
    box, sent = bench.mailbox(1)[0], bench.mailbox(1, "Sent")[0]
    assert await bench.shard.copy(1, box, [1, 5], "Sent", ANY, False) == Copied(sent, 1_700_000_001, [1], [2])
    assert bench.mailbox(1, "Sent")[1].keywords == ["B", "c", "$Work"]
    assert bench.messages(1, "Sent")[1] == (2, SEEN | WORK | WORK << 2, b"To: x\r\n" + text(1))
    with bench.shard.rows.reading() as txn:
        old, new = bench.shard.rows.message(txn, box, 1), bench.shard.rows.message(txn, sent, 2)
    assert (new.object, new.date, new.size, new.prefix) == (old.object, 5000, old.size, old.prefix) and new.saved > 6000
    assert await bench.shard.copy(1, box, [2, 3], "Sent", ANY, False) == Copied(sent, 1_700_000_001, [], [])


@pytest.mark.parametrize("move", [True, False])
@pytest.mark.parametrize("name", [INBOX, "Sent"])
async def test_many_are_copied_and_moved_in_slices(bench, small_slices, move, name):
    await filed(bench, 10)
    await filed(bench, 2, "Sent")
    box, first = bench.mailbox(1)[0], bench.mailbox(1, name)[1].uidnext
    copied = await bench.shard.copy(1, box, [1, 2, 3, 4, 6, 7, 9, 10, 99], name, ANY, move)
    assert (copied.sources, copied.copies) == ([1, 2, 3, 4, 6, 7, 9, 10], list(range(first, first + 8)))
    copies = {uid: data for uid, _, data in bench.messages(1, name)}
    assert [copies[uid] for uid in copied.copies] == [text(uid) for uid in copied.sources]
    left = [uid for uid, *_ in bench.messages(1) if uid <= 10]
    assert left == ([5, 8] if move else list(range(1, 11)))
    assert used(bench.shard)[0] == (12 if move else 20)


@pytest.mark.parametrize("count", [3, 8])
async def test_a_copy_is_all_or_nothing_by_quota_and_a_move_asks_for_none(bench, small_slices, count):
    await filed(bench, 8)
    box, before = bench.mailbox(1)[0], used(bench.shard)
    uids = list(range(1, count + 1))
    octets = sum(len(text(uid)) for uid in uids)
    for limits in (Limits(messages=8 + count - 1), Limits(octets=before[1] + octets - 1)):
        await refused(bench.shard.copy(1, box, uids, "Sent", limits, False), OVERQUOTA)
        assert bench.messages(1, "Sent") == [] and used(bench.shard) == before
    await bench.shard.copy(1, box, uids, "Sent", Limits(before[1] + octets, 8 + count), False)
    assert used(bench.shard) == (8 + count, before[1] + octets)
    await bench.shard.copy(1, box, uids, "Sent", Limits(1, 1), True)
    assert len(bench.messages(1, "Sent")) == 2 * count and used(bench.shard) == (8 + count, before[1] + octets)


async def test_messages_that_are_gone_are_not_reserved_for(bench, small_slices):
    await filed(bench, 9)
    box, _ = bench.mailbox(1)
    await bench.shard.expunge(1, box, list(range(1, 8)))
    copied = await bench.shard.copy(1, box, list(range(1, 10)), "Sent", Limits(messages=4), False)
    assert copied.sources == [8, 9] and used(bench.shard)[0] == 4
    assert (await bench.shard.copy(1, box, list(range(1, 8)), "Sent", Limits(messages=1), False)).sources == []


@pytest.mark.parametrize("error", [Refusal(LIMIT, "no more"), StoreError("no disk"), asyncio.CancelledError()])
@pytest.mark.parametrize("number", range(1, 6))
async def test_a_copy_that_fails_between_slices_leaves_nothing(bench, small_slices, monkeypatch, number, error):
    await filed(bench, 8)
    box, before = bench.mailbox(1)[0], used(bench.shard)
    Failing(bench.shard, number, error)  # reserve, three slices, end
    with pytest.raises(type(error)):
        await bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False)
    await settled(bench.shard)
    assert bench.messages(1, "Sent") == [] and len(bench.messages(1)) == 8
    assert used(bench.shard) == before


async def test_what_cannot_be_taken_back_now_is_taken_back_later(bench, small_slices, monkeypatch):
    monkeypatch.setattr(sessions, "AGAIN_SECONDS", 0.01)
    await filed(bench, 8)
    box, before = bench.mailbox(1)[0], used(bench.shard)
    failed = 0

    async def fail(number):
        nonlocal failed
        if 3 <= number < 10:
            failed += 1
            raise StoreError("no disk")

    Failing(bench.shard, before=fail)
    with pytest.raises(StoreError):
        await bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False)
    await settled(bench.shard)
    assert bench.messages(1, "Sent") == [] and used(bench.shard) == before and failed == 7


async def test_what_cannot_be_taken_back_holds_up_nothing_else(bench, small_slices, monkeypatch):
    """Of two COPYs that have failed one cannot be undone, by a defect; it is tried again, and the other is undone."""
    monkeypatch.setattr(sessions, "AGAIN_SECONDS", 0.01)
    await bench.user(2, "Sent")
    await filed(bench, 8)
    await bench.shard.append(2, INBOX, [Message(text(number)) for number in range(1, 9)], ANY)
    end, stuck, reported = Shard._end, True, []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))

    async def fails(shard, user, number):
        if user == 1 and stuck:
            raise ZeroDivisionError
        await end(shard, user, number)

    monkeypatch.setattr(Shard, "_end", fails)
    for user in (1, 2):
        failing = Failing(bench.shard, 4, asyncio.CancelledError())  # two slices are done, and it is undone in the background
        with pytest.raises(asyncio.CancelledError):
            await bench.shard.copy(user, bench.mailbox(user)[0], list(range(1, 9)), "Sent", ANY, False)
        assert failing.count >= 4
    async with asyncio.timeout(20):
        while {user for user, *_ in unfinished(bench.shard)} != {1} or len(reported) < 3:
            await asyncio.sleep(0.002)
    assert bench.messages(2, "Sent") == [] and len(bench.messages(1, "Sent")) == 6
    assert {type(error) for error in reported} == {ZeroDivisionError}
    stuck = False
    await settled(bench.shard)
    assert bench.messages(1, "Sent") == [] and used(bench.shard)[0] == 8


async def test_a_move_that_is_stopped_tells_what_was_moved(bench, small_slices):
    await filed(bench, 8)
    box, sent = bench.mailbox(1)[0], bench.mailbox(1, "Sent")[0]
    Failing(bench.shard, 3, StoreError("no disk"))
    with pytest.raises(Partial) as stopped:
        await bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, True)
    assert stopped.value.code == MOVING
    assert stopped.value.copied == Copied(sent, 1_700_000_001, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert [uid for uid, *_ in bench.messages(1)] == [7, 8]
    assert [data for *_, data in bench.messages(1, "Sent")] == [text(uid) for uid in range(1, 7)]


async def test_a_move_whose_first_slice_is_refused_moves_nothing(bench, small_slices):
    await filed(bench, 8)
    words = [f"k{number}" for number in range(KEYWORDS_MOST)]
    await bench.file(text(1), Target(1, "Sent", keywords=words))
    box, _ = bench.mailbox(1)
    await bench.shard.store_flags(1, box, [1], "+", 0, ["$Work"], None)
    assert not isinstance(await refused(bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, True), LIMIT), Partial)
    await refused(bench.shard.copy(1, box, [1], "Sent", ANY, False), LIMIT)
    assert len(bench.messages(1)) == 8 and len(bench.messages(1, "Sent")) == 1


async def test_others_see_copies_in_between_and_may_remove_them(bench, small_slices):
    await filed(bench, 8)
    box, sent = bench.mailbox(1)[0], bench.mailbox(1, "Sent")[0]

    async def meanwhile(number):
        if number == 4:  # two slices are done
            assert [uid for uid, *_ in bench.messages(1, "Sent")] == [1, 2, 3, 4, 5, 6]
            await bench.file(text(1), Target(1, "Sent"))
            await bench.shard.expunge(1, sent, [2])
        if number == 6:  # the end, behind the expunge and the third slice
            raise Refusal(LIMIT, "no")

    Failing(bench.shard, before=meanwhile)
    with pytest.raises(Refusal):
        await bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False)
    await settled(bench.shard)
    assert [uid for uid, *_ in bench.messages(1, "Sent")] == [7], "what another has filed stays"
    assert used(bench.shard)[0] == 9


async def test_a_copy_to_a_mailbox_that_is_removed_meanwhile_is_refused(bench, small_slices):
    await filed(bench, 8)
    box, before = bench.mailbox(1)[0], used(bench.shard)

    async def meanwhile(number):
        if number == 3:
            await Shard.delete(bench.shard, 1, "Sent")

    Failing(bench.shard, before=meanwhile)
    await refused(bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False), MISSING)
    await settled(bench.shard)
    assert used(bench.shard) == before and rows(bench)["Sent"] == (0, "", True)


async def test_a_copy_is_taken_back_before_its_user_is_carried_away(bench, small_slices):
    await filed(bench, 8)
    box, before = bench.mailbox(1)[0], used(bench.shard)
    frozen = False

    async def meanwhile(number):
        nonlocal frozen
        if number == 4 and not frozen:
            frozen = True
            await bench.shard.freeze(1)
            assert bench.messages(1, "Sent") == [] and used(bench.shard) == before and unfinished(bench.shard) == []

    Failing(bench.shard, before=meanwhile)
    await refused(bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False), MOVING)
    await bench.shard.freeze(1, frozen=False)
    assert bench.messages(1, "Sent") == [] and used(bench.shard) == before


async def test_a_copy_that_was_taken_back_meanwhile_does_not_go_on(bench, small_slices):
    await filed(bench, 8)
    box, before = bench.mailbox(1)[0], used(bench.shard)
    done = False

    async def meanwhile(number):
        nonlocal done
        if number == 4 and not done:
            done = True
            await bench.shard.freeze(1)
            await bench.shard.freeze(1, frozen=False)  # the move was given up

    Failing(bench.shard, before=meanwhile)
    await refused(bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False), MOVING)
    assert bench.messages(1, "Sent") == [] and used(bench.shard) == before


async def test_a_copy_of_a_user_who_is_removed_is_refused(bench, small_slices):
    await filed(bench, 8)
    box = bench.mailbox(1)[0]
    gone = False

    async def meanwhile(number):
        nonlocal gone
        if number == 4 and not gone:
            gone = True
            await bench.shard.purge(1)

    Failing(bench.shard, before=meanwhile)
    await refused(bench.shard.copy(1, box, list(range(1, 9)), "Sent", ANY, False), MISSING)
    assert bench.shard.segments.usage()[1] == 0


async def test_without_room_nothing_is_copied(bench):
    await filed(bench, 3)
    box, bench.shard.disk.full = bench.mailbox(1)[0], True
    with pytest.raises(StoreFull):
        await bench.shard.copy(1, box, [1], "Sent", ANY, False)
    with pytest.raises(StoreFull):
        await bench.shard.append(1, INBOX, [Message(b"x")] * 2, ANY)
    await bench.shard.copy(1, box, [1], "Sent", ANY, True)
    assert len(bench.messages(1)) == 2


# APPEND


async def test_messages_are_appended_together(bench, tmp_path, monkeypatch):
    file = BigBody(tmp_path / "big", 77, 100)
    file.write([b"Subject: big\r\n\r\n" + b"y" * 2_000_000])
    big = BigFile(str(tmp_path / "big"), 77, file.finish([b"Front: x\r\n"]))
    large = b"Subject: large\r\n\r\n" + b"z" * 1_200_000
    messages = [Message(text(1), SEEN, ["a"], 1000), Message(big, 0, ["A", "b"]), Message(large), Message(b"")]
    before = wall_ms()
    copied = await bench.shard.append(1, "Sent", messages, ANY)
    sent = bench.mailbox(1, "Sent")[0]
    assert copied == Copied(sent, 1_700_000_001, [], [1, 2, 3, 4])
    big_data = b"Front: x\r\nSubject: big\r\n\r\n" + b"y" * 2_000_000
    assert bench.messages(1, "Sent") == [(1, SEEN | WORK, text(1)), (2, WORK | WORK << 1, big_data), (3, 0, large), (4, 0, b"")]
    assert all(row.described == describe(data) for data, row in described(bench.shard))
    with bench.shard.rows.reading() as txn:
        dates = [row.date for _, row in bench.shard.rows.messages(txn, sent)]
    assert dates[0] == 1000 and all(date >= before for date in dates[1:])
    assert (tmp_path / "big").exists(), "it is the caller's"
    one = await bench.shard.append(1, INBOX, [Message(big)], ANY)
    assert one.copies == [1] and bench.messages(1) == [(1, 0, big_data)]


@pytest.mark.parametrize("count", [2, 8])
async def test_append_is_all_or_nothing(bench, small_slices, tmp_path, count):
    large = Message(b"x" * 1_200_000)
    messages = [*(Message(text(number)) for number in range(count - 1)), large]
    octets = sum(len(message.data) for message in messages)
    for limits in (Limits(messages=count - 1), Limits(octets=octets - 1)):
        await refused(bench.shard.append(1, INBOX, messages, limits), OVERQUOTA)
    words = [f"k{number}" for number in range(KEYWORDS_MOST + 1)]
    await refused(bench.shard.append(1, INBOX, [*messages, Message(b"x", 0, words)], ANY), LIMIT)
    broken = BigFile(str(tmp_path / "gone"), 7, Body(0, 1, 0, 5))
    with pytest.raises(StoreError):
        await bench.shard.append(1, INBOX, [large, Message(broken), *messages], ANY)
    await settled(bench.shard)
    assert bench.messages(1) == [] and used(bench.shard) == (0, 0) and described(bench.shard) == []
    assert list(bench.shard.segments.big_files()) == [] and bench.shard.segments.usage()[1] == 0
    await bench.shard.append(1, INBOX, messages, Limits(octets, count))
    assert len(bench.messages(1)) == count and used(bench.shard) == (count, octets)


@pytest.mark.parametrize("error", [Refusal(LIMIT, "no more"), StoreError("no disk")])
@pytest.mark.parametrize("number", range(1, 6))
async def test_an_append_that_fails_between_slices_leaves_nothing(bench, small_slices, number, error):
    Failing(bench.shard, number, error)
    with pytest.raises(type(error)):
        await bench.shard.append(1, INBOX, [Message(b"x" * 1_200_000), *(Message(text(size)) for size in range(7))], ANY)
    await settled(bench.shard)
    assert bench.messages(1) == [] and used(bench.shard) == (0, 0) and described(bench.shard) == []
    assert list(bench.shard.segments.big_files()) == []


async def test_an_append_is_done_though_the_caller_is_cancelled(bench, small_slices):
    call = asyncio.create_task(bench.shard.append(1, INBOX, [Message(text(size)) for size in range(8)], ANY))
    while not bench.shard._begun:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    while len(bench.messages(1)) < 8 or unfinished(bench.shard):
        await asyncio.sleep(0.001)


async def test_large_messages_are_appended_in_slices_of_octets(bench, monkeypatch):
    monkeypatch.setattr("relaymta.store.appending.OCTETS", 2500)
    tasks = Failing(bench.shard)
    copied = await bench.shard.append(1, INBOX, [Message(b"x" * size) for size in (1000, 1500, 1, 9000, 2)], ANY)
    assert copied.copies == [1, 2, 3, 4, 5] and tasks.count == 2 + 4
    assert [len(data) for *_, data in bench.messages(1)] == [1000, 1500, 1, 9000, 2]
