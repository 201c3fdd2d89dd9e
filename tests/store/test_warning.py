"""A user whose quota is nearly used up is told so, once a day."""

import asyncio

import pytest

from relaymta.errors import StoreError
from relaymta.store import warning
from relaymta.store.deliver import Delivery
from relaymta.store.warning import Warnings
from tests.store.test_recipients import FILED, Bench


@pytest.fixture
async def bench(tmp_path):
    async with Bench(tmp_path) as bench:
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
    await bench.delivery.deliver(7, 0, "s@x.example", [(0, "a@a.example")], [b"x"])
    assert len(texts(bench, ident)) == 20 and len(bench.logged) == 1
    own = bench.mailboxes.shards[0]
    mailbox = 1
    await own.expunge(ident, mailbox, [1])
    now = warning.time.time
    monkeypatch.setattr(warning.time, "time", lambda: now() + 86401)
    await bench.delivery.deliver(8, 0, "s@x.example", [(0, "a@a.example")], [b"x"])
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
