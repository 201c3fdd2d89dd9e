"""Dovecot's auth protocol with a peer that sends anything."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from relaymta.auth import dovecot
from relaymta.auth.dovecot import Dovecot
from relaymta.auth.identity import Identity, Unavailable
from tests.queue.test_queue import until

GREETING = b"VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nSPID\t1\nCUID\t1\nCOOKIE\tabc\nDONE\n"
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """An auth service: it calls `answer(number, writer)` for each request."""

    def __init__(self, answer: Answer, greeting: bytes = GREETING) -> None:
        self.answer = answer
        self.greeting = greeting
        self.connections = 0
        self.open = 0
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        writer.write(self.greeting)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                if line.startswith(b"AUTH\t"):
                    self.asked.append(line)
                    await self.answer(line.split(b"\t")[1], writer)
        self.open -= 1
        writer.close()


@contextlib.asynccontextmanager
async def peer(folder: Path, answer: Answer, greeting: bytes = GREETING) -> AsyncIterator[tuple[Peer, Dovecot]]:
    made = Peer(answer, greeting)
    server = await asyncio.start_unix_server(made.serve, str(folder / "auth"))
    try:
        yield made, Dovecot(str(folder / "auth"))
    finally:
        server.close()


ANN = Identity("ann")
ANSWERS = [
    ("yes", b"OK\t%s\tuser=ann\n", ANN),
    ("yes, without a name", b"OK\t%s\n", ANN),
    ("yes, by another name", b"OK\t%s\tuser=ann@corp.example\n", Identity("ann@corp.example")),
    ("yes, with a tab in a field", b"OK\t%s\tuser=a\x01tb\tx=\x01n\n", Identity("a\tb")),
    ("yes, with more", b"OK\t%s\tuser=ann\tuid=5\tx\t\t=\n", ANN),
    ("yes, a long line", b"OK\t%s\tuser=ann\tx=" + b"y" * 20_000 + b"\n", ANN),
    ("yes, but login is refused", b"OK\t%s\tuser=ann\tnologin\treason=closed\n", None),
    ("yes, Dovecot itself would be a proxy", b"OK\t%s\tuser=ann\tproxy\tnologin\thost=x\n", ANN),
    ("no", b"FAIL\t%s\tuser=ann\n", None),
    ("no, disabled", b"FAIL\t%s\tuser=ann\tcode=user_disabled\n", None),
    ("not now (2.2)", b"FAIL\t%s\tuser=ann\ttemp\n", Unavailable),
    ("not now (2.3)", b"FAIL\t%s\tuser=ann\tcode=temp_fail\treason=busy\n", Unavailable),
    ("more is wanted", b"CONT\t%s\tQUJD\n", Unavailable),
    ("unknown lines in front", b"NEWS\nPING\tx\n\n\t\nOK\nOK\tx\nOK\t99999999999999999999999\tuser=eve\nOK\t%s\tuser=ann\n", ANN),
    ("another answer in front", b"OK\t777\tuser=eve\nFAIL\t%s\tuser=ann\n", None),
    ("no UTF-8", b"FAIL\t%s\tuser=\xff\xfe\n", None),
    ("twice, the first counts", b"FAIL\t%s\tuser=ann\nOK\t%s\tuser=ann\n", None),
]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
async def test_an_answer_means_the_same_in_any_number_of_pieces(tmp_path, answer, expected, pieces):
    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        line = answer.replace(b"%s", number)
        size = max(1, len(line) // pieces)
        for start in range(0, len(line), size):
            writer.write(line[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)

    async with peer(tmp_path, say) as (service, ours):
        for _ in range(2):  # nor does it affect the next request
            if expected is Unavailable:
                with pytest.raises(Unavailable):
                    await ours.password("ann", "x", "192.0.2.1")
            else:
                assert await ours.password("ann", "x", "192.0.2.1") == expected
        assert service.connections == 1 and not ours._waiting


async def test_a_truncated_answer_is_no_answer(tmp_path):
    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK\t%s\tuser=an" % number)
        writer.close()

    async with peer(tmp_path, say) as (_, ours):
        with pytest.raises(Unavailable, match="closed the connection"):
            await ours.password("ann", "x", "192.0.2.1")


async def test_concurrent_requests_get_their_own_answers(tmp_path):
    held: list[tuple[bytes, asyncio.StreamWriter]] = []

    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        held.append((number, writer))
        if len(held) == 50:
            for one, to in reversed(held):
                to.write(b"OK\t%s\tuser=user %s\n" % (one, one))

    async with peer(tmp_path, say) as (service, ours):
        found = await asyncio.gather(*(ours.password(str(n), "x", "192.0.2.1") for n in range(1, 51)))
        assert [identity.name for identity in found if identity] == [f"user {n}" for n in range(1, 51)]
        assert service.connections == 1


async def test_a_restarted_service_is_connected_again(tmp_path):
    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK\t%s\n" % number)
        if number == b"2":
            writer.close()

    async with peer(tmp_path, say) as (service, ours):
        assert [await ours.password("ann", "x", "192.0.2.1") for _ in range(2)] == [ANN, ANN]
        await until(lambda: ours._writer is None)
        assert await ours.password("ann", "x", "192.0.2.1") == ANN
        assert service.connections == 2


async def test_cancelled_requests_leave_nothing_and_do_not_affect_others(tmp_path):
    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        async def later() -> None:
            await go.wait()
            writer.write(b"OK\t%s\tuser=user%s\n" % (number, number))

        going.append(asyncio.create_task(later()))

    going: list[asyncio.Task[None]] = []
    go = asyncio.Event()
    async with peer(tmp_path, say) as (service, ours):
        asking = [asyncio.create_task(ours.password("x", "x", "192.0.2.1")) for _ in range(4)]
        await until(lambda: len(service.asked) == 4)
        asking[0].cancel()  # the one that opened the connection, too
        asking[2].cancel()
        go.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert [one for one in found if isinstance(one, Identity)] == [Identity("user2"), Identity("user4")]
        assert not ours._waiting


async def test_a_request_cancelled_while_connecting_leaves_no_connection(tmp_path):
    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK\t%s\n" % number)

    async with peer(tmp_path, say, greeting=b"VERSION\t1\t2\n") as (service, ours):
        asking = [asyncio.create_task(ours.password("ann", "x", "192.0.2.1")) for _ in range(2)]
        await until(lambda: service.connections == 1)
        service.greeting = GREETING
        asking[0].cancel()
        assert await asking[1] == ANN
        await until(lambda: (service.connections, service.open) == (2, 1))


@pytest.mark.parametrize("greeting", [b"* OK this is IMAP\n", b"VERSION\t2\t0\nDONE\n", b"x" * 100_000, b"VERSION\t1\t2\n"])
async def test_a_peer_that_is_no_dovecot_is_disconnected(tmp_path, monkeypatch, greeting):
    monkeypatch.setattr(dovecot, "GREETING", 0.2)

    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK\t%s\n" % number)

    async with peer(tmp_path, say, greeting) as (service, ours):
        for _ in range(2):  # the second fails at once, with the same reason
            with pytest.raises(Unavailable) as error:
                await ours.password("ann", "x", "192.0.2.1")
            assert str(error.value).rpartition(": ")[2]
        await until(lambda: service.open == 0)
        assert (service.connections, service.asked) == (1, [])


async def test_a_password_too_long_for_dovecot_is_wrong(tmp_path):
    async def say(number: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK\t%s\n" % number)

    async with peer(tmp_path, say) as (service, ours):
        assert await ours.password("ann", "x" * 7000, "192.0.2.1") is None
        assert await ours.password("ann", "x" * 5000, "192.0.2.1") == ANN
        assert len(service.asked) == 1
