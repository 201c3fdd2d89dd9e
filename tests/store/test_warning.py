"""A user whose quota is nearly used up is told so, once a day."""

import asyncio

import pytest

from relaymta.errors import StoreError
from relaymta.store import warning
from relaymta.store.deliver import FULL, Delivery
from relaymta.store.warning import Warnings
from tests.store.test_recipients import FILED, Bench, Outbox


class Warned(Bench):
    """A bench that waits for what is done beside, when a message has been filed."""

    async def file(self, *given):
        landed = await super().file(*given)
        await asyncio.gather(*self.delivery._tasks)
        return landed

    async def deliver(self, queue_id):
        await self.delivery.deliver(queue_id, 0, "s@x.example", [(0, "a@a.example")], [b"x"], Outbox())
        await asyncio.gather(*self.delivery._tasks)


@pytest.fixture
async def bench(tmp_path):
    async with Warned(tmp_path) as bench:
        bench.logged = []
        warnings = Warnings(bench.mailboxes, "mx.example", lambda **fields: bench.logged.append(fields))
        bench.delivery = Delivery(bench.mailboxes, lambda: bench.settings, bench.counted.append, None, warnings)
        yield bench


def texts(bench, ident, shard=0):
    own = bench.mailboxes.shards[shard]
    with own.rows.reading() as txn:
        (row,) = own.rows.mailboxes(txn, ident)
        messages = list(own.rows.messages(txn, row.mailbox))
    return [own.data(message) for _, message in messages]


async def test_once_a_day_by_lmtp_and_from_the_queue(bench, monkeypatch):
    ident = await bench.user("a", messages=20)
    for _ in range(17):
        await bench.file(b"x", "a")
    assert bench.logged == []
    (landed,) = await bench.file(b"x", "a")
    assert landed.reply == FILED and bench.logged == [{"user": "a@a.example", "filled": 90}]
    told = texts(bench, ident)[-1]
    assert told.startswith(
        b"Return-Path: <>\r\nDelivered-To: a@a.example\r\nFrom: Mail Delivery System <MAILER-DAEMON@mx.example>"
    )
    assert b"Subject: Your mailbox is 90 % full\r\n" in told and b"(20 messages)" in told
    await bench.deliver(7)
    assert len(texts(bench, ident)) == 20 and len(bench.logged) == 1
    own = bench.mailboxes.shards[0]
    mailbox = 1
    await own.expunge(ident, mailbox, [1])
    now = warning.time.time
    monkeypatch.setattr(warning.time, "time", lambda: now() + 86401)
    await bench.deliver(8)
    assert [one["filled"] for one in bench.logged] == [90, 100] and len(texts(bench, ident)) == 21, "beyond the quota"


async def test_once_though_much_mail_comes_together(bench):
    ident = await bench.user("a", messages=100)
    for _ in range(89):
        await bench.file(b"x", "a")
    await asyncio.gather(*(bench.file(b"x", "a") for _ in range(8)))
    assert len(bench.logged) == 1 and sum(b"% full" in text for text in texts(bench, ident)) == 1


async def test_octets_count_and_who_has_no_quota_is_not_warned(bench):
    await bench.user("a", octets=1000)
    await bench.user("b")
    await bench.file(b"x" * 700, "a", "b")
    assert bench.logged == []
    await bench.file(b"x" * 100, "a", "b")
    assert [one["user"] for one in bench.logged] == ["a@a.example"]


async def test_what_goes_wrong_with_it_keeps_no_mail_from_anybody(bench, monkeypatch):
    await bench.user("a", messages=1)

    async def fails(*given):
        raise StoreError("no")

    monkeypatch.setattr(bench.mailboxes, "change", fails)
    (landed,) = await bench.file(b"x", "a")
    assert landed.reply == FILED and bench.logged == []


async def test_nobody_waits_for_it(bench, monkeypatch):
    """One for each user is under way at a time; the relay's end does not wait for it without end."""
    await bench.user("a", messages=1)
    asked = []

    async def hangs(*given):
        asked.append(given)
        await asyncio.Event().wait()

    monkeypatch.setattr(bench.mailboxes, "change", hangs)
    for _ in range(3):
        async with asyncio.timeout(10):
            (landed,) = await Bench.file(bench, b"x", "a")
    assert landed.reply in (FILED, FULL) and len(asked) == 1
    await bench.delivery.end(0.01)
    assert not bench.delivery._tasks
