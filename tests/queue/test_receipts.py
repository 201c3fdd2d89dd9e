"""Receipts and idempotency keys in the queue: what is committed with a message and with its end, as any process reads it."""

import asyncio
import subprocess
import sys

import pytest

from relaymta.accept.once import Busy, Once, key_of
from relaymta.proto.envelope import IN_DOUBT, PERMANENT, SUCCESS, TRANSIENT, Attempt, Envelope
from relaymta.queue import Request, Shards, digest_of, receipts, wall_ms
from relaymta.shm import Shared
from tests.queue.test_queue import Bench, until

KEEP = 3_600_000
DIGEST = digest_of("shop", "order-1")


async def put(bench, *to, request=None, receipt=KEEP, later=0) -> int:
    queue = bench.queue
    ident, data = queue.ident(), b"Subject: x\r\n\r\nbody\r\n"
    envelope = Envelope(
        "a@b.example", list(to), len(data), 0, wall_ms(), queue.deadline(), user="shop", application="web", tags=["t"],
        receipt=receipt, not_before=queue.clock.now() + later if later else 0,
    )  # fmt: skip
    future = asyncio.get_running_loop().create_future()
    queue.submit(ident, envelope, [data], future.set_result, request)
    assert await future is None
    return ident


def request_of(part=0, recipients=("c@d.example",), keep=KEEP) -> Request:
    return Request(DIGEST, part, b"content", list(recipients), [("x@y.example", "550 no")], keep)


def attempt(kind, text, code=550) -> Attempt:
    return Attempt(wall_ms(), kind, "rcpt", "mx.d.example", code, f"{code // 100}.1.1", text)


def shards(bench, own=True) -> Shards:
    return Shards(bench.folder, {0: bench.queue.store} if own else {}, lambda ident: False)


def told(bench, ident):
    known = shards(bench).message(ident)
    assert known is not None
    return known.ended, [(one.address, one.state, one.reply) for one in known.receipt.recipients]


@pytest.mark.asyncio
async def test_a_key_is_committed_with_its_message_and_survives_it(tmp_path):
    async with Bench(tmp_path) as bench:
        ident = await put(bench, "c@d.example", request=request_of())
        again = await put(bench, "c@d.example", request=request_of(1))
        for entry in await bench.next(2):
            bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == 2)
    async with Bench(tmp_path) as bench:
        found = shards(bench).kept(DIGEST)
        assert [(part, one.ident) for part, one in sorted(found.items())] == [(0, ident), (1, again)]
        assert found[0].content == b"content" and found[0].refused == [("x@y.example", "550 no")]
        assert shards(bench).kept(digest_of("shop", "order-10")) == {}
        assert shards(bench).kept(digest_of("other", "order-1")) == {}


@pytest.mark.asyncio
async def test_a_message_that_could_not_be_stored_has_no_key(tmp_path, monkeypatch):
    async with Bench(tmp_path) as bench:
        monkeypatch.setattr(bench.queue.segments, "sync", lambda: (_ for _ in ()).throw(OSError(5, "no")))
        queue = bench.queue
        future = asyncio.get_running_loop().create_future()
        envelope = Envelope("a@b.example", ["c@d.example"], 1, 0, wall_ms(), queue.deadline())
        queue.submit(queue.ident(), envelope, [b"x"], future.set_result, request_of())
        assert await future is not None
        assert shards(bench).kept(DIGEST) == {}


@pytest.mark.parametrize("own", [True, False], ids=["own", "another process's"])
@pytest.mark.parametrize("materialized", [False, True])
@pytest.mark.asyncio
async def test_a_message_is_found_at_each_stage(tmp_path, own, materialized):
    async with Bench(tmp_path) as bench:
        ident = await put(bench, "c@d.example", "e@d.example")
        if materialized:
            await bench.queue.task(lambda change: change.materialize(ident))
        if not own:  # LMDB must not be opened twice in a process
            code = (
                "import sys; from pathlib import Path; from relaymta.queue import Shards\n"
                "found = Shards(Path(sys.argv[1]), {}, lambda ident: False).message(int(sys.argv[2]))\n"
                "print(found.ended, [(one.address, one.state) for one in found.receipt.recipients])"
            )
            call = [sys.executable, "-c", code, str(tmp_path), str(ident)]
            said = await asyncio.to_thread(subprocess.run, call, capture_output=True, text=True, timeout=60)
            assert said.stdout == "False [('c@d.example', 'accepted'), ('e@d.example', 'accepted')]\n", said.stderr
            return
        assert told(bench, ident) == (False, [("c@d.example", "accepted", ""), ("e@d.example", "accepted", "")])
        busy = Shards(tmp_path, {0: bench.queue.store}, lambda one: one == ident).message(ident)
        assert {one.state for one in busy.receipt.recipients} == {"attempting"}
        [entry] = await bench.next()
        bench.queue.finish(entry, {0: attempt(PERMANENT, "nobody"), 1: attempt(TRANSIENT, "later" + IN_DOUBT, 451)}, 1)
        await until(lambda: bench.events.outcomes)
        assert told(bench, ident) == (
            False, [("c@d.example", "bounced", "550 5.1.1 nobody"), ("e@d.example", "in doubt", f"451 4.1.1 later{IN_DOUBT}")],
        )  # fmt: skip
        [entry] = [one for one in await bench.next(2) if one.ident == ident]  # the other one is the DSN
        bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == 2)
        ended, found = told(bench, ident)
        assert (
            ended and found[0] == ("c@d.example", "bounced", "550 5.1.1 nobody") and found[1][:2] == ("e@d.example", "delivered")
        )


@pytest.mark.parametrize("how", ["at once", "after a deferral", "deleted", "bounced", "expired"])
@pytest.mark.asyncio
async def test_the_end_is_kept_for_a_message_that_asks_for_it_and_no_other(tmp_path, how):
    async with Bench(tmp_path, max_age_ms=1 if how == "expired" else 432_000_000) as bench:
        ident, other = await put(bench, "c@d.example"), await put(bench, "c@d.example", receipt=0)
        if how != "expired":
            for entry in await bench.next(2):
                if how == "at once":
                    bench.queue.finish(entry, None)
                elif how == "bounced":
                    bench.queue.finish(entry, {0: attempt(PERMANENT, "nobody")})
                else:
                    bench.queue.finish(entry, {0: attempt(TRANSIENT, "later", 451)}, 1)
            await until(lambda: len(bench.events.outcomes) == 2)
        if how == "after a deferral":
            for entry in await bench.next(2):
                bench.queue.finish(entry, {0: attempt(SUCCESS, "thanks", 250)})
            await until(lambda: len(bench.events.outcomes) == 4)
        elif how == "deleted":
            left = {ident, other}
            while left:  # those that are not about to be offered
                for one in left:
                    if (await bench.queue.change_messages("delete", [one]))[0]:
                        left.discard(one)
                await asyncio.sleep(0.01)
        elif how == "expired":
            await until(lambda: len(bench.events.outcomes) == 2 or bench.offered)
            for entry in list(bench.offered):
                bench.queue.begin(entry)
                bench.queue.finish(entry, {0: attempt(TRANSIENT, "later", 451)})
            await until(lambda: len(bench.events.outcomes) == 2)
        state, reply = {
            "at once": ("delivered", ""), "after a deferral": ("delivered", "250 2.1.1 thanks"),
            "deleted": ("deleted", "451 4.1.1 later"), "bounced": ("bounced", "550 5.1.1 nobody"),
            "expired": ("bounced", "451 4.1.1 later"),
        }[how]  # fmt: skip
        assert told(bench, ident) == (True, [("c@d.example", state, reply)])
        known = shards(bench).message(ident)
        assert (known.receipt.user, known.receipt.application, known.receipt.tags) == ("shop", "web", ["t"])
        assert shards(bench).message(other) is None


@pytest.mark.asyncio
async def test_what_is_kept_is_forgotten_in_time_and_not_before(tmp_path):
    async with Bench(tmp_path) as bench:
        for number in range(5):
            await put(bench, "c@d.example", request=request_of(number, keep=1 if number else KEEP), receipt=1)
        for entry in await bench.next(5):
            bench.queue.finish(entry, None)
        await until(lambda: len(bench.events.outcomes) == 5)
        await asyncio.sleep(0.01)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(receipts, "FORGOTTEN_TOGETHER", 2)
            bench.queue._forget(bench.queue._is_due_to_forget())
            await until(lambda: not bench.queue._is_due_to_forget())
        assert list(shards(bench).kept(DIGEST)) == [0]
        with bench.queue.store.reading() as txn:
            counts = {name: txn.stat(bench.queue.store.tables[name])["entries"] for name in ("request", "receipt", "forget")}
        assert counts == {"request": 1, "receipt": 0, "forget": 1}


@pytest.mark.asyncio
async def test_a_message_for_later_is_not_tried_before(tmp_path):
    async with Bench(tmp_path) as bench:
        ident = await put(bench, "c@d.example", later=1500)
        await put(bench, "c@d.example")
        await bench.next()
        assert await bench.queue.change_messages("hold", [ident]) == (1, 0)
        assert await bench.queue.change_messages("release", [ident]) == (1, 0)
        before = bench.queue.clock.now()
        [entry] = await bench.next()
        assert entry.ident == ident and bench.queue.clock.now() - before > 500
    async with Bench(tmp_path) as bench:
        assert shards(bench).message(ident) is not None


@pytest.mark.asyncio
async def test_what_an_owner_has_committed_that_was_killed_then_is_unknown_and_not_overlooked(tmp_path):
    """LMDB's lock file says which commit readers see, and was not written any more."""
    async with Bench(tmp_path) as bench:
        await put(bench, "c@d.example", request=request_of())
    code = (
        "import sys, time; from pathlib import Path; from relaymta.queue import Shards; from relaymta.errors import StoreError\n"
        "shards, lock = Shards(Path(sys.argv[1]), {}, lambda ident: False), Path(sys.argv[1], 'shard-0/lmdb/lock.mdb')\n"
        "print(list(shards.kept(bytes.fromhex(sys.argv[2]))))\n"
        "with lock.open('r+b') as file:\n"
        "    file.seek(48); last = int.from_bytes(file.read(8), 'little')\n"  # mti_txnid
        "    assert 0 < last < 1000; file.seek(48); file.write((last - 1).to_bytes(8, 'little'))\n"
        "try:\n"
        "    print(list(shards.kept(bytes.fromhex(sys.argv[2]))))\n"
        "except StoreError as error:\n"
        "    print(error)\n"
    )
    call = [sys.executable, "-c", code, str(tmp_path), DIGEST.hex()]
    said = await asyncio.to_thread(subprocess.run, call, capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines() == ["[0]", "what the last owner of shard 0 has committed cannot be read yet"], said.stderr


@pytest.mark.asyncio
async def test_one_request_with_a_key_at_a_time(tmp_path):
    shared = Shared.create()
    async with Bench(tmp_path) as bench:
        workers = [Once(shards(bench), shared.limits(slot, 2), None) for slot in range(2)]
        first = await workers[0].begin("shop", "order-1", 1)
        with pytest.raises(Busy):
            await workers[1].begin("shop", "order-1", 0.05)
        (await workers[1].begin("shop", "order-2", 0.05)).end()
        waiting = asyncio.ensure_future(workers[1].begin("shop", "order-1", 10))
        await asyncio.sleep(0.02)
        await put(bench, "c@d.example", request=request_of())
        first.end()
        first.end()
        second = await waiting
        assert list(second.kept) == [0]
        with pytest.raises(Busy):
            await workers[0].begin("shop", "order-1", 0.02)
        shared.clear_limits(1)  # the worker died
        (await workers[0].begin("shop", "order-1", 1)).end()
        cancelled = asyncio.ensure_future(workers[0].begin("shop", "order-3", 1))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        (await workers[1].begin("shop", "order-3", 1)).end()


def test_the_field_of_a_key():
    assert key_of(b"X-RELAY-Idempotency: \tab-1 \r\nTo: x\r\n\r\n") == "ab-1"
    assert key_of(b"Subject: x-relay-idempotency: 1\r\n\r\n") == ""
    for wrong in (b"", b"a b", b"\xc3\xa4", b"x" * 256):
        assert key_of(b"X-Relay-Idempotency: " + wrong + b"\r\n\r\n") is None, wrong
    assert key_of(b"X-Relay-Idempotency: 1\r\nX-Relay-Idempotency: 1\r\n\r\n") is None
