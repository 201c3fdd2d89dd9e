"""CREATE, DELETE, RENAME and SUBSCRIBE: which names there are then, and what is refused."""

import asyncio

import pytest

from relaymta.store.asked import Message, Partial
from relaymta.store.change import CANNOT, EXISTS, LIMIT, MISSING, Refusal
from relaymta.store.rows import INBOX
from relaymta.store.writer import Target
from tests.store.sessions import ANY, Failing, filed, refused, rows, settled, text, unfinished, used

DEEP = "/".join("a" * 20)  # as many levels as there may be
LONG = "n" * 250


def names(bench):
    """Those that are mailboxes, and those that are subscribed."""
    found = rows(bench)
    return {name for name, row in found.items() if row[0]}, {name for name, row in found.items() if row[2]}


async def test_missing_parents_are_created_too(bench):
    await bench.shard.create(1, "a/b/c", "\\Junk")
    found = rows(bench)
    assert found.keys() == {INBOX, "Sent", "a", "a/b", "a/b/c"}
    assert [found[name][1:] for name in ("a", "a/b", "a/b/c")] == [("", False), ("", False), ("\\Junk", False)]
    validities = [bench.mailbox(1, name)[1].uidvalidity for name in (INBOX, "Sent", "a", "a/b", "a/b/c")]
    assert validities == list(range(1_700_000_000, 1_700_000_005))
    await bench.shard.create(1, "a/x")
    await bench.shard.create(1, "INBOX/y")
    assert names(bench)[0] == {INBOX, "Sent", "a", "a/b", "a/b/c", "a/x", "INBOX/y"}


async def test_what_may_not_be_created_is_refused(bench):
    await bench.shard.create(1, "a/b", "\\Trash")
    before = rows(bench)
    for name, special, code in (
        (INBOX, "", EXISTS),
        ("a", "", EXISTS),
        ("a/b", "\\Trash", EXISTS),
        ("new/c", "\\Trash", CANNOT),
        ("", "", CANNOT),
        ("a//b", "", CANNOT),
        ("a/", "", CANNOT),
        ("a*", "", CANNOT),
        ("x/" * 20 + "x", "", CANNOT),
        ("x" * 256, "", CANNOT),
    ):
        await refused(bench.shard.create(1, name, special), code)
    assert rows(bench) == before


async def test_a_user_has_no_more_names_than_there_may_be(bench, monkeypatch):
    monkeypatch.setattr("relaymta.store.names.MAILBOXES_MOST", 6)
    monkeypatch.setattr("relaymta.store.change.MAILBOXES_MOST", 6)
    await bench.shard.create(1, "a/b")
    await bench.shard.subscribe(1, "c", True)
    before = rows(bench)
    await refused(bench.shard.create(1, "x/y"), LIMIT)
    await refused(bench.shard.rename(1, "a", "x/y/z"), LIMIT)
    assert rows(bench) == before, "its parent is not there either"
    await bench.shard.subscribe(1, "d", True)
    await refused(bench.shard.subscribe(1, "e", True), LIMIT)
    await bench.shard.subscribe(1, "a", True)
    await bench.shard.create(1, "d")
    await refused(bench.shard.create(1, "e"), LIMIT)
    await refused(bench.shard.rename(1, "a", "e"), LIMIT)  # its old name stays, subscribed
    await bench.shard.rename(1, "a/b", "e")
    assert names(bench)[0] == {INBOX, "Sent", "a", "d", "e"}


async def test_a_mailbox_that_is_removed_leaves_what_is_below_it(bench):
    await bench.shard.create(1, "a/b")
    await bench.shard.subscribe(1, "a", True)
    await filed(bench, 5, "a")
    before = used(bench.shard)
    await filed(bench, 5, "a/b")
    await bench.shard.delete(1, "a")
    assert names(bench) == ({INBOX, "Sent", "a/b"}, {INBOX, "Sent", "a"})
    assert used(bench.shard) == before and len(bench.messages(1, "a/b")) == 5
    for name, code in ((INBOX, CANNOT), ("a", MISSING), ("b", MISSING)):
        await refused(bench.shard.delete(1, name), code)
    await refused(bench.shard.rename(1, "a", "c"), MISSING)
    await bench.shard.create(1, "a")
    assert bench.messages(1, "a") == [] and names(bench)[1] == {INBOX, "Sent", "a"}
    assert bench.mailbox(1, "a")[1].uidvalidity == 1_700_000_004, "higher than that of the one before it"


async def test_the_messages_of_a_mailbox_that_is_removed_go_in_slices(bench, small_slices):
    await filed(bench, 20, "Sent")
    box = bench.mailbox(1, "Sent")[0]
    tasks = Failing(bench.shard)
    await bench.shard.delete(1, "Sent")
    assert used(bench.shard) == (0, 0), "they do not count any more"
    with bench.shard.rows.reading() as txn:
        assert bench.shard.rows.state(txn, box) is None
    await refused(bench.shard.append(1, "Sent", [Message(b"x")], ANY), MISSING)
    await refused(bench.shard.expunge(1, box, [1]), MISSING)
    await settled(bench.shard)
    assert tasks.count > 6 and bench.shard.segments.usage()[1] == 0


async def test_a_user_with_something_unfinished_is_removed(bench, small_slices):
    await filed(bench, 20, "Sent")
    await filed(bench, 8)

    async def fail(number):
        if number > 1:
            raise Refusal(LIMIT, "not now")

    failing = Failing(bench.shard, before=fail)
    await bench.shard.delete(1, "Sent")
    while failing.count < 2:
        await asyncio.sleep(0.001)
    assert len(unfinished(bench.shard)) == 1
    failing._before = None
    assert await bench.shard.purge(1) == 1_700_000_002
    with bench.shard.rows.reading() as txn:
        assert txn.stat(bench.shard.rows.tables["mail"])["entries"] == 0
        assert txn.stat(bench.shard.rows.tables["object"])["entries"] == 0


async def test_all_that_is_below_a_mailbox_is_renamed_with_it(bench):
    await bench.shard.create(1, "a/b/c", "\\Junk")
    for name in ("a", "a/b/d", "x/y/b"):
        await bench.shard.subscribe(1, name, True)
    await filed(bench, 3, "a/b")
    before = rows(bench)
    await bench.shard.rename(1, "a", "x/y")
    after = rows(bench)
    assert names(bench)[0] == {INBOX, "Sent", "x", "x/y", "x/y/b", "x/y/b/c"}
    assert names(bench)[1] == {INBOX, "Sent", "a", "a/b/d", "x/y/b"}, "subscriptions stay with the names"
    assert [after[f"x/y{name}"][0] for name in ("", "/b", "/b/c")] == [before[f"a{name}"][0] for name in ("", "/b", "/b/c")]
    assert after["x/y/b/c"][1] == "\\Junk"
    assert [uid for uid, *_ in bench.messages(1, "x/y/b")] == [1, 2, 3]


@pytest.mark.parametrize(("old", "new"), [("a/a", "a2"), ("a/a", "a/b"), ("a/a/a", "a/x/a"), ("a/b", "INBOX/z")])
async def test_a_mailbox_is_renamed_within_its_own_tree(bench, old, new):
    for name in ("a/a/a", "a/a/b", "a/ab"):
        await bench.shard.create(1, name)
    if old == "a/b":
        await bench.shard.create(1, old)
    before = names(bench)[0]
    await bench.shard.rename(1, old, new)
    moved = {name: new + name[len(old) :] for name in before if name == old or name.startswith(f"{old}/")}
    parents = {"/".join(new.split("/")[:depth]) for depth in range(1, new.count("/") + 1)}
    assert names(bench)[0] == (before - moved.keys()) | set(moved.values()) | parents


async def test_a_mailbox_takes_the_place_of_its_parent(bench):
    await bench.shard.create(1, "a/b/b/c")
    before = rows(bench)
    await bench.shard.delete(1, "a")
    await bench.shard.rename(1, "a/b", "a")
    after = rows(bench)
    assert names(bench)[0] == {INBOX, "Sent", "a", "a/b", "a/b/c"}
    assert [after[name][0] for name in ("a", "a/b", "a/b/c")] == [before[name][0] for name in ("a/b", "a/b/b", "a/b/b/c")]


async def test_what_may_not_be_renamed_is_refused(bench):
    for name in ("a/b", "c/b", "m/n", DEEP, f"l/{LONG}/{LONG}/{LONG}"):
        await bench.shard.create(1, name)
    await bench.shard.delete(1, "c")
    await bench.shard.subscribe(1, "only", True)
    before = rows(bench)
    for old, new, code in (
        ("a", "a", EXISTS),
        ("a", "Sent", EXISTS),
        ("a", INBOX, EXISTS),
        ("a", "c", EXISTS),  # c/b is there
        ("m", "m/x", CANNOT),
        ("m", "m/n", EXISTS),
        ("a", "x*", CANNOT),
        ("a", "x//y", CANNOT),
        ("a", "b/" + DEEP, CANNOT),
        ("l", "m" * 255, CANNOT),  # what is below it would be too long
        ("b", "d", MISSING),
        ("only", "d", MISSING),
        ("c", "d", MISSING),
        (INBOX, "Sent", EXISTS),
        (INBOX, INBOX, EXISTS),
        (INBOX, "x*", CANNOT),
    ):
        await refused(bench.shard.rename(1, old, new), code)
    assert rows(bench) == before
    await bench.shard.rename(1, "a", "only")  # a name that is only subscribed may be taken
    assert {"only", "only/b"} <= names(bench)[0]


async def test_the_messages_of_inbox_are_moved(bench, small_slices):
    await filed(bench, 7)
    await bench.shard.create(1, "INBOX/child")
    box, before = bench.mailbox(1)
    await bench.shard.rename(1, INBOX, "old/mail")
    assert names(bench) == ({INBOX, "Sent", "INBOX/child", "old", "old/mail"}, {INBOX, "Sent"})
    assert [data for *_, data in bench.messages(1, "old/mail")] == [text(number) for number in range(1, 8)]
    assert bench.messages(1) == []
    assert bench.mailbox(1)[0] == box and bench.mailbox(1)[1].uidnext == before.uidnext
    await bench.shard.rename(1, INBOX, "empty")
    assert bench.messages(1, "empty") == []
    await bench.file(b"x", Target(1))
    assert [uid for uid, *_ in bench.messages(1)] == [8]


async def test_a_renaming_of_inbox_that_is_stopped_tells_what_was_moved(bench, small_slices):
    await filed(bench, 7)
    Failing(bench.shard, 2, Refusal(LIMIT, "no more"))
    with pytest.raises(Partial) as stopped:
        await bench.shard.rename(1, INBOX, "x")
    assert stopped.value.copied.sources == [1, 2, 3]
    assert len(bench.messages(1)) == 4 and len(bench.messages(1, "x")) == 3


async def test_names_are_subscribed_that_do_not_exist(bench):
    await bench.shard.subscribe(1, "not/there", True)
    await bench.shard.subscribe(1, "not/there", True)
    await bench.shard.subscribe(1, "Sent", False)
    await bench.shard.subscribe(1, "nowhere", False)
    assert names(bench) == ({INBOX, "Sent"}, {INBOX, "not/there"})
    await bench.shard.subscribe(1, "not/there", False)
    assert rows(bench).keys() == {INBOX, "Sent"}
    await refused(bench.shard.subscribe(1, "a*", True), CANNOT)
    await bench.shard.subscribe(1, "a*", False)
