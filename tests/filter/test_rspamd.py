"""rspamd by HTTP: the real one, and one that answers what it is told."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relaymta.filter.judgement import FilterFailure, Mail, Text
from relaymta.filter.rspamd import LARGEST, Rspamd
from relaymta.proto.edits import edited
from tests.support.daemon import free_port
from tests.support.rspamd import ADD_HEADER, REJECT, REWRITE, RealRspamd, rspamd

PATIENCE = 60
HEADER = b"From: a@b.example\r\nSubject: hello\r\nX-Spam: one\r\nX-Other: x\r\nx-spam: two\r\n\r\n"
GOOD: dict[str, Any] = {"action": "no action", "score": 0.5, "symbols": {}}


def mail(body: bytes = b"hello\r\n", header: bytes = HEADER, **more: Any) -> Mail:
    given: dict[str, Any] = {"sender": "a@b.example", "recipients": ["c@d.example"], "helo": "h", "user": "", "tls": ""} | more
    return Mail(ident="ID", client="192.0.2.1", text=Text(header, body), **given)


@pytest.fixture(scope="module")
def real() -> Iterator[RealRspamd]:
    with rspamd() as running:
        yield running


@asynccontextmanager
async def asked(*addresses: str, **more: Any) -> AsyncIterator[Rspamd]:
    made = Rspamd(addresses, 5, **more)
    async with asyncio.timeout(PATIENCE):
        yield made
    made.close()


class Fake:
    """A server that answers each request with the next of `answers`, octets as they are; None: nothing. `seen`: the requests."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers = answers
        self.seen: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
            self.seen.append(head + await reader.readexactly(length))
            answer = self.answers.pop(0) if self.answers else said(GOOD)
            if answer is None:
                await asyncio.sleep(PATIENCE)
            writer.write(answer or b"")
            await writer.drain()
        writer.close()


def said(found: Any, status: str = "200 OK") -> bytes:
    body = found if isinstance(found, bytes) else json.dumps(found).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@asynccontextmanager
async def fake(*answers: bytes | None) -> AsyncIterator[tuple[Fake, str]]:
    made = Fake(list(answers))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    yield made, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_the_real_one_says_what_it_is_known_to_say(real):
    async with asked(real.address) as one:
        await one.probe()
        assert await one.prove() == "GTUBE (reject, score 15)"
        answer = await one.judge(mail(REJECT.encode() + b"\r\n"))
        assert (answer.word, answer.score, answer.reason) == ("reject", 15.0, "Gtube pattern")
        assert (await one.judge(mail(ADD_HEADER.encode() + b"\r\n"))).word == "add header"
        answer = await one.judge(mail(REWRITE.encode() + b"\r\n"))
        assert answer.word == "rewrite subject"
        assert b"\r\nSubject: *** SPAM *** hello\r\n" in edited(HEADER, answer.edits).header
        answer = await one.judge(
            mail(sender="", recipients=["c@d.example", "ü@d.example"], tls="using TLSv1.3 with cipher X (1/1 bits)")
        )
        assert answer.score is not None and answer.reason and "," in answer.reason


async def test_a_text_in_a_file_and_the_head_of_one_are_shown_whole(real):
    body = REJECT.encode() + b"\r\n" + b"xxx xxx\r\n" * 300_000

    async def read(at: int, most: int) -> bytes:
        await asyncio.sleep(0)
        return body[at : at + most]

    async with asked(real.address) as one, fake() as (seen, address), asked(address) as other:
        shown = mail()
        shown.text = Text(HEADER, octets=len(body), read=read)
        assert (await one.judge(shown)).score  # it looks for GTUBE in short ones alone
        await other.judge(shown)
        assert seen.seen[0].endswith(b"\r\n\r\n" + HEADER + body)
        await other.judge(shown.head(len(HEADER) + 5))
        assert seen.seen[1].endswith(b"\r\n\r\n" + HEADER + REJECT[:5].encode())


async def test_twenty_at_a_time_and_one_after_the_other(real):
    async with asked(real.address) as one:
        answers = await asyncio.gather(*(one.judge(mail(f"{n}\r\n".encode())) for n in range(20)))
        assert len({answer.word for answer in answers}) == 1
        for _ in range(20):
            await one.judge(mail())


async def test_what_it_is_told_beside_the_message():
    async with fake() as (seen, address), asked(address) as one:
        await one.judge(mail(user="ann", recipients=["c@d.example", "e@f.example"], helo="x\x1b\u202e" + "h" * 2000))
        head = seen.seen[0].partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert head[0] == b"POST /checkv2 HTTP/1.0"
        for line in (
            b"From: a@b.example",
            b"Rcpt: c@d.example",
            b"Rcpt: e@f.example",
            b"IP: 192.0.2.1",
            b"User: ann",
            b"Queue-Id: ID",
        ):
            assert line in head
        (helo,) = [line for line in head if line.startswith(b"Helo: ")]
        assert helo.startswith(b"Helo: x\\x1b\\u202ehhh") and len(helo) < 1100


@pytest.mark.parametrize("answer, reason", [
    (said(b"<html>502</html>"), "protocol"), (said(b"[1]"), "protocol"), (said(b"{}"), "protocol"), (said(b""), "protocol"),
    (said({"action": "reject", "score": "x"}), "protocol"), (said({"action": 1, "score": 1}), "protocol"),
    (said(b'{"action": "reject", "score": NaN}'), "protocol"), (said(b'{"action": "reject", "score": 1e999}'), "protocol"),
    (said(b"[" * 100_000), "protocol"), (said(GOOD, "500 Internal Server Error"), "refused"), (said(GOOD, "404 No"), "refused"),
    (said(GOOD, "302 Found\r\nLocation: /x"), "refused"), (b"220 mail.example ESMTP\r\n", "protocol"), (b"", "protocol"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "protocol"), (b"\0" * 100, "protocol"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + b"x" * (2 * LARGEST), "protocol"),
    (b"HTTP/1.1 200 OK\r\n" + b"X-Y: " + b"y" * 100_000 + b"\r\n\r\n", "protocol"),
])  # fmt: skip
async def test_what_makes_no_sense_is_a_failure_and_the_next_message_is_right(answer, reason):
    async with fake(answer) as (_, address), asked(address) as one:
        with pytest.raises(FilterFailure) as failure:
            await one.judge(mail())
        assert failure.value.reason == reason and len(str(failure.value)) < 400 and str(failure.value).isprintable()
        assert (await one.judge(mail())).word == "no action"


async def test_nobody_there_and_the_second_address():
    async with fake() as (_, address), asked(f"127.0.0.1:{free_port()}", address) as one:
        assert (await one.judge(mail())).word == "no action"
    async with asked(f"127.0.0.1:{free_port()}", "unix:/none/x") as none:
        with pytest.raises(FilterFailure, match=r"127.0.0.1.*unix:/none/x") as failure:
            await none.judge(mail())
        assert failure.value.reason == "connect"
        with pytest.raises(FilterFailure):
            await none.probe()


async def test_cancelled_while_it_is_silent_the_next_one_is_right():
    async with fake(None) as (_, address), asked(address) as one:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await one.judge(mail())
        assert (await one.judge(mail())).word == "no action"


async def test_a_text_that_cannot_be_read_is_no_failure_of_rspamd():
    async def read(at: int, most: int) -> bytes:
        raise OSError("the disk")

    async with fake() as (_, address), asked(address) as one:
        shown = mail()
        shown.text = Text(HEADER, octets=1_000_000, read=read)
        with pytest.raises(OSError, match="the disk"):
            await one.judge(shown)
        assert (await one.judge(mail())).word == "no action"


async def test_a_part_that_did_not_work_is_a_failure():
    found = GOOD | {"symbols": {"CLAM_VIRUS_FAIL": {"score": 0}, "OTHER": {"score": 1}}}
    async with fake(said(found), said(found)) as (_, address):
        async with asked(address, must_work=["CLAM_VIRUS_FAIL"]) as one:
            with pytest.raises(FilterFailure, match="CLAM_VIRUS_FAIL") as failure:
                await one.judge(mail())
            assert failure.value.reason == "refused"
        async with asked(address) as one:
            assert (await one.judge(mail())).word == "no action"


CHANGES = [
    ({"remove_headers": {"X-Spam": 0}}, HEADER.replace(b"X-Spam: one\r\n", b"").replace(b"x-spam: two\r\n", b"")),
    ({"remove_headers": {"x-spam": 2}}, HEADER.replace(b"x-spam: two\r\n", b"")),
    ({"remove_headers": {"X-SPAM": -2}}, HEADER.replace(b"X-Spam: one\r\n", b"")),
    ({"remove_headers": {"X-Spam": 3, "X-None": 0, "X-Spam-": "x"}}, HEADER),
    ({"add_headers": {"X-A": "1"}}, HEADER[:-2] + b"X-A: 1\r\n\r\n"),
    ({"add_headers": {"X-A": ["1", {"value": "2", "order": -1}]}}, HEADER[:-2] + b"X-A: 1\r\nX-A: 2\r\n\r\n"),
    ({"add_headers": {"X-A": {"value": "1", "order": 1}}}, b"X-A: 1\r\n" + HEADER),
    ({"add_headers": {"X-A": {"value": "1\nX-B: 2\n\nbody", "order": 1}}}, b"X-A: 1\r\n\tX-B: 2\r\n\tbody\r\n" + HEADER),
    ({"add_headers": {"X A": "1", "": "x", "X-A": 5, "X-B": None, "X-C": [[]]}}, HEADER),
    ({"add_headers": {"X-A": "\ud800", "\ud800": "x"}, "remove_headers": {"\ud800": 0}}, HEADER[:-2] + b"X-A: ?\r\n?: x\r\n\r\n"),
    ({"add_headers": [], "remove_headers": "x"}, HEADER),
    ([], HEADER),
]  # fmt: skip


@pytest.mark.parametrize("milter, header", CHANGES)
async def test_changes_are_those_of_its_own_milter(milter, header):
    async with fake(said(GOOD | {"milter": milter})) as (_, address), asked(address) as one:
        answer = await one.judge(mail())
        assert edited(HEADER, answer.edits).header == header


async def test_a_new_subject_is_for_who_says_so():
    odd = {"action": "rewrite subject", "score": 7, "subject": "=?utf-8?q?h=C3=A4?=\r\nX-Evil: 1", "symbols": "x", "messages": []}
    async with (
        fake(said(odd), said(odd | {"action": "add header"}), said(odd | {"subject": 5})) as (_, address),
        asked(address) as one,
    ):
        header = edited(HEADER, (await one.judge(mail())).edits).header
        assert b"Subject: =?utf-8?q?h=C3=A4?=\r\n\tX-Evil: 1\r\n" in header
        assert [list((await one.judge(mail())).edits) for _ in range(2)] == [[], []]


async def test_learning_is_its_controllers():
    success, known = said({"success": True}), said({"error": "<x> has been already learned as spam"}, "208 Already")
    failed, odd = said({"error": "no classifier\x1b is there"}, "500 No"), said(b"<html>")
    async with fake(success, known, failed, odd) as (seen, address), asked("127.0.0.1:1", controller=address) as one:
        text = Text(HEADER, b"x")
        assert await one.learn(text, True) == "learned"
        assert seen.seen[0].startswith(b"POST /learnspam HTTP/1.0\r\n") and seen.seen[0].endswith(HEADER + b"x")
        assert await one.learn(text, False) == "known already" and b"POST /learnham " in seen.seen[1]
        for reason, what in (("refused", r"answers HTTP 500: no classifier\\x1b is there"), ("protocol", "not as rspamd")):
            with pytest.raises(FilterFailure, match=what) as failure:
                await one.learn(text, True)
            assert failure.value.reason == reason
    async with asked("127.0.0.1:1") as none:
        with pytest.raises(FilterFailure, match="no `controller` is configured"):
            await none.learn(text, True)
