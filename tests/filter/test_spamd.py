"""spamd: the real one, and one that answers what it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relaymta.filter.judgement import FilterFailure, Mail, Text
from relaymta.filter.spamd import Spamd
from relaymta.proto.spamc import LARGEST
from tests.support.daemon import free_port
from tests.support.spamd import GTUBE, spamd

PATIENCE = 60
HEADER = b"From: a@b.example\r\nSubject: hello\r\n\r\n"
GOOD = b"SPAMD/1.1 0 EX_OK\r\nContent-length: 1\r\nSpam: False ; 0.5 / 5.0\r\n\r\nA\r\n"


def mail(body: bytes = b"hello\r\n", octets: int = 0, read: Any = None) -> Mail:
    return Mail(
        "ID",
        "a@b.example",
        ["c@d.example"],
        "192.0.2.1",
        "h",
        "ann",
        "",
        Text(HEADER, b"" if read is not None else body, octets, read),
    )


class Fake:
    """Answers each connection with the next of `answers`; None: nothing. `early`: before it has read the message."""

    def __init__(self, answers: list[bytes | None], early: bool) -> None:
        self.answers, self.early = answers, early
        self.seen: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            self.seen.append(await reader.read(10) if self.early else await reader.read())
            answer = self.answers.pop(0) if self.answers else GOOD
            if answer is None:
                await asyncio.sleep(PATIENCE)
            writer.write(answer or b"")
            await writer.drain()
        writer.close()


@asynccontextmanager
async def fake(*answers: bytes | None, early: bool = False) -> AsyncIterator[tuple[Fake, Spamd]]:
    made = Fake(list(answers), early)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    async with asyncio.timeout(PATIENCE):
        yield made, Spamd([f"127.0.0.1:{server.sockets[0].getsockname()[1]}"], 5)
    server.close()


async def test_the_real_one():
    with spamd() as address:
        one = Spamd([f"127.0.0.1:{free_port()}", address], 5)
        async with asyncio.timeout(PATIENCE):
            await one.probe()
            assert (await one.prove()).startswith("GTUBE (score 100")
            found = await one.judge(mail(GTUBE.encode() + b"\r\n"))
            assert found.word == "True" and found.score > 900 and "GTUBE" in found.reason
            found = await one.judge(mail())
            assert found.word == "False" and 0 < found.score < 5
            text = Text(
                b"From: a@b.example\r\nMessage-ID: <1@b.example>\r\nSubject: cheap\r\n\r\n", b"buy cheap things now\r\n" * 20
            )
            assert await one.learn(text, True) == "learned"
            assert await one.learn(text, True) == "known already"
            assert await one.learn(text, False) == "learned"
            both = await asyncio.gather(one.judge(mail()), one.judge(mail(GTUBE.encode() + b"\r\n")))
            assert [answer.word for answer in both] == ["False", "True"]


async def test_what_it_is_shown():
    body = b"x" * 1_000_000

    async def read(at: int, most: int) -> bytes:
        await asyncio.sleep(0)
        return body[at : at + most]

    async with fake() as (seen, one):
        assert (await one.judge(mail())).score == 0.5
        assert seen.seen[0] == b"SYMBOLS SPAMC/1.5\r\nContent-length: 44\r\nUser: ann\r\n\r\n" + HEADER + b"hello\r\n"
        await one.judge(mail(octets=len(body), read=read))
        assert seen.seen[1].endswith(HEADER + body) and b"length: 1000037\r\n" in seen.seen[1]
        await one.judge(mail(octets=len(body), read=read).head(len(HEADER) + 1))
        assert seen.seen[2].endswith(b"length: 38\r\nUser: ann\r\n\r\n" + HEADER + b"x")


@pytest.mark.parametrize("answer, reason", [
    (b"", "protocol"), (b"220 mail.example\r\n", "protocol"), (b"SPAMD/1.0 76 Bad header line\r\n", "refused"),
    (GOOD[:40], "protocol"), (GOOD + b"x" * LARGEST, "protocol"), (b"\0" * 10 * LARGEST, "protocol"),
])  # fmt: skip
@pytest.mark.parametrize("early", [False, True])
async def test_what_makes_no_sense_is_a_failure_and_the_next_message_is_right(answer, reason, early):
    async with fake(answer, early=early) as (_, one):
        with pytest.raises(FilterFailure) as failure:
            await one.judge(mail(b"x" * (3_000_000 if early else 5)))
        assert failure.value.reason == reason
        one_more = Spamd(one._addresses, 5)
        _.early = False
        assert (await one_more.judge(mail())).word == "False"


async def test_an_answer_amid_the_message_counts():
    """Such as that it is too large."""
    async with fake(b"SPAMD/1.0 65 EX_DATAERR\r\n", early=True) as (_, one):
        with pytest.raises(FilterFailure, match="answers 65 EX_DATAERR"):
            await one.judge(mail(b"x" * 30_000_000))


async def test_one_that_does_not_learn_says_so():
    async with fake(b"SPAMD/1.0 69 Service Unavailable: TELL commands are not enabled\r\n", b"?", b"") as (seen, one):
        with pytest.raises(FilterFailure, match="answers 69 Service Unavailable") as failure:
            await one.learn(Text(HEADER, b"x"), True)
        assert failure.value.reason == "refused"
        assert (
            seen.seen[0] == b"TELL SPAMC/1.5\r\nContent-length: 38\r\nMessage-class: spam\r\nSet: local\r\n\r\n" + HEADER + b"x"
        )
        for _ in range(2):
            with pytest.raises(FilterFailure) as failure:
                await one.learn(Text(HEADER, b"x"), False)
            assert failure.value.reason == "protocol"


async def test_nobody_there_and_silence():
    none = Spamd([f"127.0.0.1:{free_port()}", "unix:/none/x"], 5)
    for asked in (none.judge(mail()), none.probe()):
        with pytest.raises(FilterFailure, match="unix:/none/x") as failure:
            await asked
        assert failure.value.reason == "connect"
    async with fake(None) as (_, one):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await one.judge(mail())
        assert (await one.judge(mail())).word == "False"


async def test_a_text_that_cannot_be_read_is_no_failure_of_spamd():
    async def read(at: int, most: int) -> bytes:
        raise OSError("the disk")

    async with fake() as (_, one):
        with pytest.raises(OSError, match="the disk"):
            await one.judge(mail(octets=1_000_000, read=read))
