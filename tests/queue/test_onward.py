"""Messages that come into the queue with the outcome of another (what Sieve scripts send): by one commit, once."""

import pytest

from relaymta.disk.big import BigBody
from relaymta.errors import StoreError
from relaymta.proto.envelope import EIGHT_BIT, PERMANENT, SMTPUTF8, SUCCESS, TRANSIENT, UTF8_HEADER, Onward
from relaymta.queue import Outcome
from relaymta.queue.change import Change
from relaymta.send.onward import Outbox
from tests.queue.test_one_end import DATA, Watched
from tests.queue.test_queue import Bench, answer, until

REDIRECT = Onward("a@b.example", "new@z.example", b"Delivered-To: c@d.example\r\n", None)
REPLY = Onward("", "a@b.example", b"", b"Auto-Submitted: auto-replied\r\n\r\naway\r\n")


async def data_of(bench: Bench, ident: int) -> bytes:
    return b"".join([piece async for piece in bench.queue.raw(ident)])


async def sent(bench: Bench, entry, messages, data=(DATA,)):
    return await outbox(bench, entry, list(data)).make(messages)


def outbox(bench: Bench, entry, data) -> Outbox:
    return Outbox(bench.queue, entry, data, lambda recipients: recipients)


@pytest.mark.parametrize("result", [SUCCESS, TRANSIENT, PERMANENT])
@pytest.mark.parametrize("sole", [True, False])
async def test_they_are_there_after_a_crash_once_the_outcome_is(tmp_path, result, sole):
    to = ("c@d.example",) if sole else ("c@d.example", "e@f.example")
    async with Watched(tmp_path / "one", first_retry_ms=60_000) as bench:
        ident = await bench.put(DATA, to=to)
        entry = next(one for one in await bench.next(len(to)) if one.recipients[0][1] == "c@d.example")
        puts = await sent(bench, entry, [REDIRECT, REPLY])
        await bench.copied(tmp_path / "before")
        bench.queue.finish(entry, None if result == SUCCESS else {entry.recipients[0][0]: answer(result)}, sent=puts)
        await until(lambda: bench.events.outcomes)
        await bench.copied(tmp_path / "after")
        ours = [put.ident for put in bench.events.put if put.ident != ident][:2]
        assert ours == [put.ident for put in puts]
        assert {one.ident for one in await bench.next(2)} >= set(ours) or result == PERMANENT
    async with Bench(tmp_path / "before") as bench:
        assert [await bench.queue.message(one) for one in ours] == [None, None], "nothing before the outcome"
        assert await bench.queue.message(ident) is not None
    async with Bench(tmp_path / "after") as bench:
        assert [await data_of(bench, one) for one in ours] == [REDIRECT.front + DATA, REPLY.data]
        rows = [await bench.queue.message(one) for one in ours]
        assert [(row["sender"], row["recipients"][0]["address"]) for row in rows] == [
            ("a@b.example", "new@z.example"),
            ("", "a@b.example"),
        ]
        assert (await bench.queue.message(ident) is None) == (sole and result != TRANSIENT)


async def test_a_commit_that_fails_is_tried_again_and_adds_them_once(tmp_path, monkeypatch):
    async with Watched(tmp_path) as bench:
        await bench.put(DATA)
        (entry,) = await bench.next()
        puts = await sent(bench, entry, [REDIRECT])
        commit, fails = Change.finish, [OSError("no"), OSError("no")]

        def failing(change, now):
            if fails:
                raise fails.pop()
            return commit(change, now)

        monkeypatch.setattr(Change, "finish", failing)
        bench.queue.finish(entry, None, sent=puts)
        await until(lambda: bench.events.outcomes)
        (again,) = await bench.next()
        assert (again.ident, again.envelope.recipients) == (puts[0].ident, ["new@z.example"])
        bench.queue.finish(again, None)
        await bench.empty()


async def test_an_outcome_that_is_refused_adds_nothing(tmp_path):
    async with Watched(tmp_path) as bench:
        ident = await bench.put(DATA)
        (entry,) = await bench.next()
        puts = await sent(bench, entry, [REDIRECT, REPLY])
        bench.queue.writer.submit(Outcome(entry))
        bench.queue.writer.submit(Outcome(entry, sent=puts))
        await bench.settled()
        assert bench.events.refusals == [(ident, "the message had left the queue before")]
        assert [put.ident for put in bench.events.put] == [ident]
        await bench.empty()


async def test_a_large_message_is_redirected_by_a_file_of_its_own(tmp_path):
    data = b"Subject: large\r\n\r\n" + b"x" * (3 << 20) + b"\r\n"
    async with Watched(tmp_path) as bench:
        await bench.put(DATA)
        (entry,) = await bench.next()
        small = await sent(bench, entry, [REDIRECT], [data[:1000], data[1000:]])
        assert small[0].data is None and small[0].envelope.size == len(REDIRECT.front + data)
        bench.queue.finish(entry, None, sent=small)
        (large,) = await bench.next()
        assert await data_of(bench, large.ident) == REDIRECT.front + data
        twice = await outbox(bench, large, bench.queue.big_file(large)).make([REDIRECT])
        bench.queue.finish(large, None, sent=twice)
        (last,) = await bench.next()
        assert await data_of(bench, last.ident) == REDIRECT.front * 2 + data
        dropped = outbox(bench, last, bench.queue.big_file(last))
        for which in (await dropped.make([REDIRECT]), None):  # one of several, and all of them
            await dropped.make([REDIRECT])
            dropped.drop(which)
        await until(lambda: len(bench.queue.segments.big_files()) == 1)
        gone = await outbox(bench, last, bench.queue.big_file(last)).make([REDIRECT])
        bench.queue.finish(last, None)
        await until(lambda: len(bench.queue.entries) == 0)
        bench.queue.writer.submit(Outcome(last, sent=gone))
        await bench.settled()
        assert [ident for ident, _ in bench.queue.segments.big_files()] == []
        await bench.empty()


@pytest.mark.parametrize("fails", ["write", "finish", "the next one"])
async def test_what_fails_half_way_leaves_no_file(tmp_path, monkeypatch, fails):
    def fail(*given):
        raise OSError(28, "No space left on device")

    async with Watched(tmp_path) as bench:
        await bench.put(DATA)
        (entry,) = await bench.next()
        if fails == "the next one":
            monkeypatch.setattr(bench.queue, "sign", fail)
        else:
            monkeypatch.setattr(BigBody, fails, fail)
        with pytest.raises((StoreError, OSError)):
            await sent(bench, entry, [REDIRECT, REPLY], [b"x" * (3 << 20)])
        await until(lambda: [ident for ident, _ in bench.queue.segments.big_files()] == [])
        bench.queue.finish(entry, None)
        await bench.empty()


async def test_what_is_wide_is_said_to_be_wide(tmp_path):
    async with Watched(tmp_path) as bench:
        await bench.put(DATA)
        (entry,) = await bench.next()
        wide = Onward("", "grün@z.example", b"", "Subject: ü\r\n\r\n".encode())
        one, other = await sent(bench, entry, [wide, REPLY])
        assert one.envelope.flags == SMTPUTF8 | EIGHT_BIT | UTF8_HEADER and other.envelope.flags == 0
        assert other.envelope.sender == ""
