"""What the tests of sessions' changes have in common: what is in a shard, and tasks that fail."""

import asyncio

import pytest

from relaymta.disk.operations import Task
from relaymta.proto.imap_records import RECORD
from relaymta.store.asked import Message
from relaymta.store.change import Limits, Refusal
from relaymta.store.rows import INBOX

ANY = Limits()
WORK = 32  # the bit of a mailbox's first keyword


def unpacked(packed):
    return [(uid, flags, modseq) for uid, _, flags, modseq in RECORD.iter_unpack(packed)]


async def settled(shard):
    """Wait until nothing is unfinished."""
    async with asyncio.timeout(20):
        while shard._taking_back is not None:
            await asyncio.sleep(0.002)
    assert unfinished(shard) == []


def unfinished(shard):
    with shard.rows.reading() as txn:
        return list(shard.rows.unfinished(txn))


def used(shard):
    with shard.rows.reading() as txn:
        row = shard.rows.user(txn, 1)
    return row.messages, row.octets


def text(number):
    return b"Subject: %d\r\n\r\n%s" % (number, b"x" * number)


async def filed(bench, count, name=INBOX, **fields):
    """File messages of `text(1)`, `text(2)`, ..."""
    messages = [Message(text(number), **fields) for number in range(1, count + 1)]
    for start in range(0, count, 500):
        await bench.shard.append(1, name, messages[start : start + 500], ANY)


def rows(bench):
    """The names of the user: (mailbox, special, subscribed)."""
    with bench.shard.rows.reading() as txn:
        return {row.name: (row.mailbox, row.special, row.subscribed) for row in bench.shard.rows.mailboxes(txn, 1)}


def described(shard):
    """(data, row) of each object."""
    with shard.rows.reading() as txn:
        found = list(shard.rows.objects(txn))
    return [(shard.segments.read(ident, row.body), row) for ident, row in found]


async def refused(call, code):
    with pytest.raises(Refusal) as error:
        await call
    assert error.value.code == code, error.value
    return error.value


def assert_kept(shard):
    """What the writer keeps of rows in memory is what the shard has."""
    kept, rows = shard.writer.kept, shard.rows
    with rows.reading() as txn:
        for mailbox, state in kept.states.items():
            assert rows.state(txn, mailbox) == state
        for user, row in kept.users.items():
            assert rows.user(txn, user) == row
        for (user, name), row in kept.names.items():
            assert rows.mailbox(txn, user, name) == row


class Failing:
    """The tasks of a shard, what is filed together among them; the `number`-th from now on fails. `before(number)` is awaited in
    front of each."""

    def __init__(self, shard, number=0, error=None, before=None):
        self.count = 0
        self._number, self._error, self._before = number, error, before
        self._task, shard.task = shard.task, self._run
        self._together, shard.writer.task = shard.writer.task, self._run_together

    async def _run(self, run, kind=Task):
        if await self._is_next():
            raise self._error
        return await self._task(run, kind)

    async def _run_together(self, run, kind):
        if isinstance(kind, type):  # a task, which was counted
            return await self._together(run, kind)
        return await self._together(self._fail if await self._is_next() else run, kind)

    async def _is_next(self):
        self.count += 1
        if self._before is not None:
            await self._before(self.count)
        return self.count == self._number

    def _fail(self, change):
        raise self._error
