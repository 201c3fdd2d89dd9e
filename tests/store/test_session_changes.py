"""What sessions change: flags, and which messages are there."""

import asyncio
import random
from functools import partial

from relaymta.errors import StoreError
from relaymta.proto.imap_records import LAST_UID
from relaymta.store import change as module
from relaymta.store.asked import Message
from relaymta.store.change import CANNOT, LIMIT, MISSING, MOVING
from relaymta.store.rows import ANSWERED, DELETED, FLAGGED, INBOX, KEYWORDS_MOST, SEEN
from relaymta.store.writer import Target
from tests.store.sessions import ANY, WORK, Failing, filed, refused, unpacked


async def test_flags_are_added_removed_and_replaced(bench):
    await filed(bench, 5, flags=SEEN)
    box, state = bench.mailbox(1)
    store = partial(bench.shard.store_flags, 1, box)
    stored = await store([1, 3, 9], "+", FLAGGED, ["$Work", "$WORK"], None)
    assert unpacked(stored.before) == [(1, SEEN, 2), (3, SEEN, 4)]
    assert unpacked(stored.after) == [(1, SEEN | FLAGGED | WORK, 7), (3, SEEN | FLAGGED | WORK, 7)]
    assert (stored.modified, stored.keywords) == ([], ["$Work"])
    stored = await store([1, 2], "-", SEEN, ["$WORK", "$unknown"], None)
    assert unpacked(stored.after) == [(1, FLAGGED, 8), (2, 0, 8)] and stored.keywords == ["$Work"]
    stored = await store([2, 3, 4], "", DELETED, ["More"], None)
    assert unpacked(stored.after) == [(uid, DELETED | WORK << 1, 9) for uid in (2, 3, 4)]
    assert stored.keywords == ["$Work", "More"]
    assert [flags for _, flags, _ in bench.messages(1)] == [FLAGGED, *[DELETED | WORK << 1] * 3, SEEN]
    _, state = bench.mailbox(1)
    assert (state.unseen, state.deleted, state.modseq) == (4, 3, 9)


async def test_a_message_whose_flags_do_not_change_keeps_its_modseq(bench):
    await filed(bench, 3)
    box, _ = bench.mailbox(1)
    await bench.shard.store_flags(1, box, [2], "+", SEEN, [], None)
    stored = await bench.shard.store_flags(1, box, [1, 2, 3], "+", SEEN, [], None)
    assert unpacked(stored.before) == [(1, 0, 2), (2, SEEN, 5), (3, 0, 4)]
    assert unpacked(stored.after) == [(1, SEEN, 6), (2, SEEN, 5), (3, SEEN, 6)]
    stored = await bench.shard.store_flags(1, box, [1, 2, 3], "", SEEN, [], None)
    assert stored.before == stored.after and bench.mailbox(1)[1].modseq == 6


async def test_what_others_have_changed_is_left_alone(bench, small_slices):
    await filed(bench, 8)
    box, _ = bench.mailbox(1)
    await bench.shard.store_flags(1, box, [2, 5], "+", ANSWERED, [], None)
    stored = await bench.shard.store_flags(1, box, [1, 2, 4, 5, 8, 9], "+", SEEN, ["new"], 9)
    assert stored.modified == [2, 5]
    assert [uid for uid, *_ in unpacked(stored.after)] == [1, 4, 8]
    stored = await bench.shard.store_flags(1, box, [1, 2, 4, 5], "+", SEEN, ["other"], 1)
    assert (stored.modified, stored.before, stored.keywords) == ([1, 2, 4, 5], b"", ["new"]), "nothing has changed"
    assert (await bench.shard.store_flags(1, box, [], "+", SEEN, ["other"], None)).keywords == ["new"]


async def test_too_many_keywords_are_refused_and_nothing_changes(bench, small_slices):
    await filed(bench, 5)
    box, _ = bench.mailbox(1)
    words = [f"k{number}" for number in range(KEYWORDS_MOST - 1)]
    await bench.shard.store_flags(1, box, [1], "+", 0, words, None)
    before = bench.mailbox(1), bench.messages(1)
    await refused(bench.shard.store_flags(1, box, [1, 2, 3, 4], "+", SEEN, ["K0", "one", "two"], None), LIMIT)
    assert (bench.mailbox(1), bench.messages(1)) == before
    stored = await bench.shard.store_flags(1, box, [1, 2, 3, 4], "+", SEEN, ["K0", "one"], None)
    assert [flags >> 5 for _, flags, _ in unpacked(stored.after)][1:] == [1 | 1 << KEYWORDS_MOST - 1] * 3


async def test_each_slice_has_a_modseq_of_its_own(bench, small_slices):
    await filed(bench, 8)
    box, _ = bench.mailbox(1)
    stored = await bench.shard.store_flags(1, box, list(range(1, 9)), "+", SEEN, [], None)
    assert [modseq for *_, modseq in unpacked(stored.after)] == [10, 10, 10, 11, 11, 11, 12, 12]
    await bench.shard.expunge(1, box, list(range(1, 9)))
    with bench.shard.rows.reading() as txn:
        assert list(bench.shard.rows.expunged(txn, box)) == [(13, [(1, 3)]), (14, [(4, 6)]), (15, [(7, 8)])]


async def test_flags_of_any_messages_are_what_a_dict_says(bench):
    await filed(bench, 700)
    box, _ = bench.mailbox(1)
    chance, model = random.Random(1), dict.fromkeys(range(1, 701), 0)
    for _ in range(60):
        uids = sorted(chance.sample(range(1, 800), chance.choice((1, 5, 300))))
        if chance.random() < 0.2:
            await bench.shard.expunge(1, box, uids[:20])
            model = {uid: flags for uid, flags in model.items() if uid not in uids[:20]}
            continue
        how, flags, words = chance.choice(("+", "-", "")), chance.getrandbits(5), chance.choice(([], ["a"], ["A", "b"]))
        if not model.keys() & set(uids):
            continue
        stored = await bench.shard.store_flags(1, box, uids, how, flags, words, None)
        places = {word: 32 << place for place, word in enumerate(stored.keywords)}
        bits = flags | sum(places.get(word.lower(), places.get(word, 0)) for word in words)
        there = [uid for uid in uids if uid in model]
        assert [(uid, old) for uid, old, _ in unpacked(stored.before)] == [(uid, model[uid]) for uid in there]
        for uid in there:
            model[uid] = {"+": model[uid] | bits, "-": model[uid] & ~bits, "": bits}[how]
        assert [(uid, new) for uid, new, _ in unpacked(stored.after)] == [(uid, model[uid]) for uid in there]
    with bench.shard.rows.reading() as txn:
        assert {record.uid: record.flags for record in bench.shard.rows.index(txn, box)} == model


async def test_a_mailbox_or_user_who_is_gone_is_refused(bench):
    shard, box = bench.shard, bench.mailbox(1)[0]
    for call in (
        shard.store_flags(1, 99, [1], "+", SEEN, [], None),
        shard.expunge(1, 99, [1]),
        shard.claim_recent(1, 99, 0, 5, False),
        shard.copy(1, box, [1], "nowhere", ANY, False),
        shard.copy(1, box, [1], "nowhere", ANY, True),
        shard.append(1, "nowhere", [Message(b"x")], ANY),
        shard.append(1, "nowhere", [Message(b"x")] * 2, ANY),
        shard.delete(1, "nowhere"),
        shard.rename(1, "nowhere", "x"),
        shard.create(7, "x"),
        shard.rename(7, INBOX, "x"),
        shard.append(7, INBOX, [Message(b"x")] * 2, ANY),
    ):
        await refused(call, MISSING)
    for move in (True, False):
        await refused(shard.copy(1, 99, [1], INBOX, ANY, move), CANNOT)


async def test_nothing_is_changed_of_a_user_who_is_being_moved(bench):
    await filed(bench, 2)
    shard, box = bench.shard, bench.mailbox(1)[0]
    await shard.freeze(1)
    for call in (
        shard.store_flags(1, box, [1], "+", SEEN, [], None),
        shard.expunge(1, box, [1]),
        shard.copy(1, box, [1], "Sent", ANY, False),
        shard.copy(1, box, [1], "Sent", ANY, True),
        shard.append(1, INBOX, [Message(b"x")], ANY),
        shard.append(1, INBOX, [Message(b"x")] * 2, ANY),
        shard.create(1, "x"),
        shard.delete(1, "Sent"),
        shard.rename(1, "Sent", "x"),
        shard.rename(1, INBOX, "x"),
        shard.subscribe(1, "x", True),
    ):
        await refused(call, MOVING)
    assert len(bench.messages(1)) == 2


async def test_only_marked_messages_are_expunged_by_a_session(bench, small_slices):
    await filed(bench, 9)
    box, _ = bench.mailbox(1)
    await bench.shard.store_flags(1, box, [2, 4, 7, 8], "+", DELETED, [], None)
    await bench.shard.expunge(1, box, [1, 2, 3, 4, 5, 6, 7], True)
    assert [uid for uid, *_ in bench.messages(1)] == [1, 3, 5, 6, 8, 9]


async def test_a_message_is_recent_to_one_session(bench, monkeypatch):
    monkeypatch.setattr("relaymta.store.sessions.RECENT_SECONDS", 0.01)
    await filed(bench, 3)
    box, before = bench.mailbox(1)
    claim = partial(bench.shard.claim_recent, 1, box)
    assert [await claim(0, 4, True), await claim(0, 4, True)] == [1, 1], "they only ask"
    assert [await claim(0, 4, False), await claim(0, 4, False), await claim(0, 4, True)] == [1, 4, 4]
    await filed(bench, 2)
    assert [await claim(1, 6, False), await claim(4, 6, False), await claim(4, 6, False)] == [6, 4, 6]
    while bench.mailbox(1)[1].recent != 6:
        await asyncio.sleep(0.002)
    assert bench.mailbox(1)[1].modseq == before.modseq + 2, "nobody is told"


async def test_what_was_told_as_recent_is_written_at_the_end(bench, monkeypatch):
    monkeypatch.setattr("relaymta.store.sessions.RECENT_SECONDS", 60)
    await filed(bench, 3)
    assert await bench.shard.claim_recent(1, bench.mailbox(1)[0], 0, 3, False) == 1
    await bench.shard.stop()
    await bench.__aenter__()
    assert bench.mailbox(1)[1].recent == 3


async def test_a_message_is_recent_once_though_that_could_not_be_written(bench, monkeypatch):
    monkeypatch.setattr("relaymta.store.sessions.RECENT_SECONDS", 0.01)
    await filed(bench, 3)
    box, _ = bench.mailbox(1)
    failed = 0

    async def fail(number):
        nonlocal failed
        if number <= 3:
            failed += 1
            raise StoreError("no disk")

    failing = Failing(bench.shard, before=fail)
    claim = partial(bench.shard.claim_recent, 1, box)
    assert await claim(0, 4, False) == 1
    async with asyncio.timeout(60):
        while failed < 3 or bench.mailbox(1)[1].recent != 4:
            assert await claim(0, 4, False) == 4, "another session"
            await asyncio.sleep(0.002)
    await asyncio.sleep(0.05)
    assert failing.count == 4 and await claim(0, 4, False) == 4, "it is written once"


async def test_a_mailbox_whose_uids_are_used_up(bench):
    """UIDNEXT has to be a UID, too: the last one that is given is 2^32 - 2. What is there can be read, changed and moved away."""
    await filed(bench, 3)
    await filed(bench, 1, "Sent")
    (box, _), (sent, _) = bench.mailbox(1), bench.mailbox(1, "Sent")

    def raise_(change, mailbox=box):
        change.state(mailbox).uidnext = LAST_UID - 2

    await bench.shard.task(raise_)
    await refused(bench.shard.append(1, INBOX, [Message(b"x")] * 3, ANY), LIMIT)
    assert bench.mailbox(1)[1].messages == 3, "all of them or none"
    copied = await bench.shard.append(1, INBOX, [Message(b"x")] * 2, ANY)
    assert copied.copies == [LAST_UID - 2, LAST_UID - 1] and bench.mailbox(1)[1].uidnext == LAST_UID
    (result,) = await bench.file(b"x", Target(1))
    assert result.code == LIMIT
    for move in (False, True):
        await refused(bench.shard.copy(1, sent, [1], INBOX, ANY, move), LIMIT)
    assert bench.mailbox(1, "Sent")[1].messages == 1
    stored = await bench.shard.store_flags(1, box, [1, LAST_UID - 1, LAST_UID], "+", SEEN, [], None)
    assert [uid for uid, *_ in unpacked(stored.after)] == [1, LAST_UID - 1]
    moved = await bench.shard.copy(1, box, [LAST_UID - 2, LAST_UID - 1], "Sent", ANY, True)
    assert moved.copies == [2, 3]
    await bench.shard.expunge(1, box, [1, 2])
    assert [uid for uid, *_ in bench.messages(1)] == [3] and bench.mailbox(1)[1].uidnext == LAST_UID


async def test_what_was_expunged_long_ago_is_forgotten(bench, monkeypatch):
    await filed(bench, 40)
    box, _ = bench.mailbox(1)
    now = 1_000_000_000
    monkeypatch.setattr(module, "wall_ms", lambda: now * 1000)
    expunge = partial(bench.shard.expunge, 1, box)

    def known():
        with bench.shard.rows.reading() as txn:
            state = bench.shard.rows.state(txn, box)
            return state.forgotten, state.vanished, [modseq for modseq, _ in bench.shard.rows.expunged(txn, box)]

    for uid in range(1, 21):
        await expunge([uid])
    assert known() == (0, 20, list(range(42, 62)))
    now += module.EXPUNGED_SECONDS
    await expunge([21, 22])
    assert known() == (0, 22, list(range(42, 63)))
    now += 1
    await expunge([23])  # ten at a time
    assert known() == (51, 13, list(range(52, 64)))
    await expunge([24])
    await expunge([25])
    assert known() == (61, 5, [62, 63, 64, 65])


async def test_no_more_is_known_of_what_was_expunged_than_is_kept(bench, monkeypatch):
    monkeypatch.setattr(module, "EXPUNGED_MOST", 7)
    await filed(bench, 30)
    box, _ = bench.mailbox(1)
    for uid in range(1, 6):
        await bench.shard.expunge(1, box, [uid])
    await bench.shard.expunge(1, box, list(range(6, 12)))
    with bench.shard.rows.reading() as txn:
        state = bench.shard.rows.state(txn, box)
        assert list(bench.shard.rows.expunged(txn, box)) == [(36, [(5, 5)]), (37, [(6, 11)])]
    assert (state.forgotten, state.vanished) == (35, 7)


async def test_what_an_older_version_has_expunged_is_known(bench):
    await filed(bench, 5)
    box, _ = bench.mailbox(1)

    def old(change):
        change.txn.put(module.EXPUNGED.pack(box, 3, 3), b"\x07\0\0\0\x09\0\0\0", db=bench.shard.rows.tables["mail"])
        change.state(box).uidnext = 10

    await bench.shard.task(old)
    await bench.shard.expunge(1, box, [1])
    with bench.shard.rows.reading() as txn:
        assert list(bench.shard.rows.expunged(txn, box)) == [(3, [(7, 9)]), (7, [(1, 1)])]
