"""Virus scanning by clamd: a real one, and one that does anything else."""

import asyncio
import base64
import contextlib
import gc
import io
import signal
import socket
import zipfile
from collections.abc import AsyncIterator, Iterator

import pytest

from relaymta.filter import clamd as module
from relaymta.filter.clamd import Clamd
from relaymta.filter.judgement import PIECE, Answer, FilterFailure, Mail, Text
from relaymta.proto.clamd import MAIL, SHOWN
from tests.queue.test_queue import until
from tests.support.clamd import EICAR, MARKER, Fake, RealClamd, clamd, fake_clamd, good, said, text_of
from tests.support.fake_mx import FakeMx
from tests.support.prove import in_prove

CLEAN = Answer("OK")
RESULTS = b"Authentication-Results: relay.example; spf=none\r\n"
BIG = b"\r\n".join(b"%09d abcdefghijklmnopqrstuvwxyz" % n for n in range(140_000))  # 5 MB


def mail(body: bytes = b"text\r\n", head: bytes = b"Subject: x\r\n\r\n", most: int | None = None) -> Mail:
    return of(Text(RESULTS + head, body), most)


def of(text: Text, most: int | None = None) -> Mail:
    return Mail("id", "a@a.example", ["b@b.example"], "192.0.2.1", "a.example", "", "", text, most)


def attached(octets: bytes) -> Mail:
    head = b"Subject: x\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    return mail(base64.encodebytes(octets), head)


def zipped(octets: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eicar.com", octets)
    return made.getvalue()


def whole(one: Mail) -> bytes:
    """What clamd is shown of a message in memory."""
    return MAIL + one.text.head + one.text._body


async def failed(filter_: Clamd, one: Mail | None = None) -> FilterFailure:
    with pytest.raises(FilterFailure) as raised:
        await filter_.judge(one or mail())
    return raised.value


@contextlib.asynccontextmanager
async def asking(*addresses: str, timeout: float = 30.0) -> AsyncIterator[Clamd]:
    """A filter that leaves no connection, and no failure that nobody has asked for."""
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
    made = Clamd(addresses, timeout)
    try:
        yield made
    finally:
        made.close()
    await until(lambda: made.open == 0)
    gc.collect()
    assert not unheard


# The real one


@pytest.fixture(scope="module")
def real() -> Iterator[RealClamd]:
    with clamd("StreamMaxLength 20M", "MaxThreads 4") as made:
        yield made


FOUND = {
    "as all of the body": (mail(EICAR), "Eicar-Within"),
    "within the body": (mail(b"look:\r\n" + EICAR + b"\r\nbye\r\n"), "Eicar-Within"),
    "in base64": (attached(EICAR), "Eicar-Test-Signature"),
    "zipped": (attached(zipped(EICAR)), "Eicar-Test-Signature"),
    "at the end of 5 MB": (mail(BIG + b"\r\n" + EICAR), "Eicar-Within"),
    "in 5 MB in base64": (attached(BIG + MARKER), "Marker"),
    "in a text without a header": (of(Text(b"", EICAR)), "Eicar-Within"),
}


@pytest.mark.parametrize(("one", "name"), FOUND.values(), ids=FOUND)
async def test_a_virus_is_found(real, one, name):
    async with asking(real.address) as ours:
        word, reason, *_ = await ours.judge(one)
        assert word == "FOUND" and reason in (f"{name}.UNOFFICIAL", "Eicar-Within.UNOFFICIAL")
        assert await ours.judge(mail()) == CLEAN


async def test_a_text_is_taken_for_mail_by_the_line_in_front_of_it(real, monkeypatch):
    """Without it clamd does not decode what follows a header field that it does not know."""
    async with asking(real.address) as ours:
        assert (await ours.judge(attached(EICAR))).word == "FOUND"
        monkeypatch.setattr("relaymta.proto.clamd.MAIL", b"")
        assert await ours.judge(attached(EICAR)) == CLEAN
        one = attached(EICAR)
        one.text.head = one.text.head.removeprefix(RESULTS)
        assert (await ours.judge(one)).word == "FOUND"


async def test_clean_texts_of_any_length(real):
    async with asking(real.address) as ours:
        for size in (0, 1, 4000, *range(PIECE - 70, PIECE + 70, 10), 5_000_000):
            assert await ours.judge(mail(BIG[:size])) == CLEAN, size
        assert await ours.judge(of(Text(b""))) == CLEAN
        assert ours.open == 1


async def test_a_text_in_a_file(real):
    octets = BIG + EICAR

    async def read(at: int, most: int) -> bytes:
        await asyncio.sleep(0)
        return octets[at : at + min(most, 50_000)]

    async with asking(real.address) as ours:
        one = of(Text(RESULTS + b"Subject: x\r\n\r\n", octets=len(octets), read=read))
        assert (await ours.judge(one)).word == "FOUND"
        one.most = one.text.size - 1
        assert await ours.judge(one) == CLEAN


async def test_only_a_part_of_a_text(real):
    async with asking(real.address) as ours:
        assert await ours.judge(mail(EICAR, most=100)) == CLEAN
        assert await ours.judge(mail(BIG + EICAR, most=1000)) == CLEAN
        assert (await ours.judge(mail(EICAR + BIG, most=1000))).word == "FOUND"
        assert (await ours.judge(mail(EICAR + BIG, most=PIECE + 1))).word == "FOUND"


async def test_twenty_on_one_connection_and_twenty_at_a_time(real):
    mails = [mail(EICAR) if n % 3 == 0 else mail(b"text %d\r\n" % n) for n in range(20)]
    expected = ["FOUND" if n % 3 == 0 else "OK" for n in range(20)]
    async with asking(real.address) as ours:
        assert [(await ours.judge(one)).word for one in mails] == expected
        assert ours.open == 1
        assert [one.word for one in await asyncio.gather(*map(ours.judge, mails))] == expected
        assert 1 < ours.open <= 20


async def test_a_question_and_a_proof(real):
    async with asking(real.address) as ours:
        await ours.probe()
        assert await ours.prove() in ("Eicar-Test-Signature.UNOFFICIAL", "Eicar-Within.UNOFFICIAL")
        await ours.probe()
        assert ours.open == 1


async def test_too_large(tmp_path):
    """clamd replies while it is still sent the text, and closes the connection."""
    with clamd("StreamMaxLength 1M") as small:
        async with asking(small.address) as ours:
            for _ in range(5):
                assert await ours.judge(mail()) == CLEAN
                failure = await failed(ours, mail(BIG))
                assert failure.reason == "oversize" and "INSTREAM size limit exceeded" in str(failure)
            assert (await failed(ours, mail(BIG, most=1 << 20))).reason == "oversize"  # with the line in front
            assert await ours.judge(mail(BIG, most=(1 << 20) - len(MAIL))) == CLEAN


async def test_too_large_by_tcp():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with clamd("StreamMaxLength 1M", "TCPAddr 127.0.0.1", f"TCPSocket {port}"):
        async with asking(f"127.0.0.1:{port}") as ours:
            for _ in range(5):
                assert (await failed(ours, mail(BIG))).reason == "oversize"
                assert await ours.judge(mail()) == CLEAN


async def test_a_clamd_that_is_killed_and_started_again():
    with clamd() as one:
        async with asking(one.address) as ours:
            assert await asyncio.gather(*(ours.judge(mail()) for _ in range(5))) == [CLEAN] * 5
            one.send(signal.SIGKILL)
            one.start()
            assert await ours.judge(mail()) == CLEAN  # though it has not been told yet that its connections are gone
            one.send(signal.SIGKILL)
            failure = await failed(ours)
            assert failure.reason == "connect" and str(failure) == f"{one.address}: Connection refused"
            one.path.unlink()
            failure = await failed(ours)
            assert failure.reason == "connect" and str(failure) == f"{one.address}: No such file or directory"
            one.start()
            assert await ours.judge(mail(BIG)) == CLEAN


async def test_a_clamd_that_stands_still():
    with clamd() as one:
        async with asking(one.address, timeout=0.3) as ours:
            assert await ours.judge(mail()) == CLEAN
            one.send(signal.SIGSTOP)
            for text in (mail(), mail(BIG)):  # the caller has the time of a message
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await ours.judge(text)
            with pytest.raises(FilterFailure) as raised:
                await ours.probe()
            assert raised.value.reason == "timeout"
            await until(lambda: ours.open == 0)
            one.send(signal.SIGCONT)
            assert await ours.judge(mail()) == CLEAN
            assert (await ours.judge(mail(EICAR))).word == "FOUND"


# One that does anything else


async def test_what_it_is_shown(tmp_path):
    async with fake_clamd(path=tmp_path / "c") as (fake, address), asking(address) as ours:
        mails = [mail(), mail(BIG[:200_000]), mail(b""), mail(b"x" * PIECE)]
        for one in mails:
            assert await ours.judge(one) == CLEAN
            assert fake.texts[-1] == whole(one)
        assert await ours.judge(mail(BIG, most=100_000)) == CLEAN and fake.texts[-1] == whole(mail(BIG))[: len(MAIL) + 100_000]
        assert fake.connections == 1


REPLY = b"%d: stream: A.Virus FOUND\0"


@pytest.mark.parametrize("size", [100, 500_000])
async def test_a_reply_that_is_cut(tmp_path, size):
    reply = REPLY.replace(b"%d", b"1")
    acts = [said(reply[:length], close=True) for length in range(len(reply))]
    async with fake_clamd(*acts, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        one = mail(BIG[:size])
        for length in range(len(reply)):
            failure = await failed(ours, one)
            assert failure.reason == ("protocol" if length else "connect") and not ours._places[0].idle, length
        assert await ours.judge(one) == CLEAN and fake.texts == [whole(one)] and not fake.acts


@pytest.mark.parametrize("size", [100, 500_000])
async def test_a_reply_that_is_cut_on_a_connection_that_was_used(tmp_path, size):
    """The message is shown again on a new one."""
    reply = REPLY.replace(b"%d", b"2")
    acts = [act for length in range(len(reply)) for act in (good, said(reply[:length], close=True), good)]
    async with fake_clamd(*acts, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        one = mail(BIG[:size])
        for length in range(len(reply)):
            assert await ours.judge(mail()) == CLEAN
            assert await ours.judge(one) == CLEAN and fake.texts[-1] == whole(one) and ours.open == 1, length
            ours._places[0].idle.pop().drop()
        assert not fake.acts and fake.connections == 2 * len(reply)


async def test_a_reply_octet_by_octet_or_late(tmp_path):
    async def late(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await text_of(reader)
        await asyncio.sleep(0.05)
        writer.write(REPLY.replace(b"%d", b"%d" % number))

    acts = [said(REPLY, pieces=True), late, said(REPLY)]
    async with fake_clamd(*acts, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        for _ in range(3):
            assert await ours.judge(mail()) == Answer("FOUND", "A.Virus")
        assert await ours.judge(mail()) == CLEAN and fake.connections == 1


async def test_a_second_reply_is_not_the_next_messages(tmp_path):
    async def twice(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await said(REPLY)(fake, number, reader, writer)
        await asyncio.sleep(0.02)
        writer.write(REPLY.replace(b"%d", b"%d" % number))

    async with fake_clamd(said(REPLY * 2), twice, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        assert (await ours.judge(mail())).word == "FOUND"
        assert await failed_or_answer(ours) == "FOUND"
        assert await ours.judge(mail()) == CLEAN  # while the second reply to the last one comes, or behind it
        await asyncio.sleep(0.03)
        assert await ours.judge(mail()) == CLEAN
        assert fake.texts == [whole(mail())] * len(fake.texts) and fake.connections == 3


async def failed_or_answer(filter_: Clamd) -> str:
    try:
        return (await filter_.judge(mail())).word
    except FilterFailure as failure:
        return failure.reason


WRONG = {
    "a number nobody asked": (b"7: stream: OK\0", "protocol", "answers, but not as clamd: begins with '7: stream: OK'"),
    "no number": (b"stream: OK\0", "protocol", "begins with 'stream: OK'"),
    "the n form": (b"%d: stream: OK\n", "protocol", r"begins with '1: stream: OK\n'"),
    "an answer to something else": (b"%d: PONG\0", "protocol", "answers PONG"),
    "nothing, but much of it": (b"%d: " + b"x" * 2000, "protocol", "begins with '1: xxx"),
    "it cannot look": (b"%d: stream: Can't open file or directory ERROR\0", "refused", "answers stream: Can't open file"),
    "too large": (b"%d: INSTREAM size limit exceeded. ERROR\0", "oversize", "answers INSTREAM size limit exceeded."),
    "another service": (b"220 mail.example ESMTP\x1b\r\n", "protocol", r"begins with '220 mail.example ESMTP\x1b\r\n'"),
    "its end": (b"", "connect", "closes the connection without a reply"),
}


@pytest.mark.parametrize("after", [None, 10_000, 0], ids=["behind the text", "within it", "in front of it"])
@pytest.mark.parametrize("close", [False, True], ids=["stays", "closes"])
@pytest.mark.parametrize("by_port", [False, *in_prove(True)], ids=["unix", "tcp"])
@pytest.mark.parametrize(("reply", "reason", "shown"), WRONG.values(), ids=WRONG)
async def test_what_is_no_answer(tmp_path, reply, reason, shown, by_port, close, after):
    """And the next message gets its own one."""
    path = None if by_port else tmp_path / "c"
    async with fake_clamd(said(reply, close or not reply, after), path=path) as (fake, address), asking(address) as ours:
        failure = await failed(ours, mail(BIG))
        assert (failure.reason, str(failure).startswith(f"{address}: ")) == (reason, True) and shown in str(failure)
        assert await ours.judge(mail()) == CLEAN and fake.texts[-1] == whole(mail())


@pytest.mark.parametrize("reply", [b"%d: stream: OK\0", b"%d: stream: A.Virus FOUND\0"])
@pytest.mark.parametrize("close", [False, True])
async def test_a_verdict_before_the_end_of_the_text_is_none(tmp_path, reply, close):
    async with fake_clamd(said(reply, close, 10_000), path=tmp_path / "c") as (fake, address), asking(address) as ours:
        failure = await failed(ours, mail(BIG))
        assert failure.reason == "protocol" and "before it was shown the whole message" in str(failure)
        assert await ours.judge(mail()) == CLEAN and fake.texts[-1] == whole(mail())


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET], ids=["unix", "tcp"])
@pytest.mark.parametrize(
    ("reply", "reason"), [(b"1: INSTREAM size limit exceeded. ERROR\0", "oversize"), (b"1: ", "protocol"), (b"", "connect")]
)
async def test_a_connection_closed_in_front_of_a_write(tmp_path, family, reply, reason):
    """The write fails before what was said is read."""
    with socket.socket(family) as listening:
        listening.bind(str(tmp_path / "c") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listening.listen()
        pieces = 0

        async def read(at: int, most: int) -> bytes:
            nonlocal pieces
            pieces += 1
            if pieces == 2:
                peer = listening.accept()[0]
                peer.sendall(reply)
                peer.close()
            return b"x" * most

        address = f"unix:{tmp_path}/c" if family == socket.AF_UNIX else f"127.0.0.1:{listening.getsockname()[1]}"
        async with asking(address) as ours:
            assert (await failed(ours, of(Text(b"", octets=10_000_000, read=read)))).reason == reason
            assert pieces < 10


async def test_a_verdict_before_the_question_is_none(tmp_path):
    async with fake_clamd(path=tmp_path / "c", greeting=b"1: stream: OK\0") as (fake, address), asking(address) as ours:
        with contextlib.suppress(FilterFailure):  # or it cannot be told from the answer
            await ours.judge(mail(BIG))
        fake.greeting = b""
        assert await ours.judge(mail()) == CLEAN


async def test_a_stale_reply_on_a_used_connection(tmp_path):
    """It is the connection that is wrong: the message is shown again on a new one."""
    acts = [good, said(b"1: stream: A.Virus FOUND\0"), good, said(b"COMMAND READ TIMED OUT\n", close=True)]
    async with fake_clamd(*acts, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        for _ in range(4):
            assert await ours.judge(mail()) == CLEAN
        assert fake.connections == 3


async def test_one_that_never_reads(tmp_path):
    """What is read of a large text is what fits between."""
    stuck = asyncio.Event()
    octets = 0

    async def never(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stuck.wait()
        raise ConnectionAbortedError

    async def read(at: int, most: int) -> bytes:
        nonlocal octets
        octets += most
        return b"x" * most

    async with fake_clamd(never, never, path=tmp_path / "c") as (_, address), asking(address, timeout=0.2) as ours:
        for one in (of(Text(b"", octets=1 << 30, read=read)), mail()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ours.judge(one)
        assert octets < 1_500_000
        await until(lambda: ours.open == 0)
        stuck.set()
        assert await ours.judge(mail()) == CLEAN


@pytest.mark.parametrize("beginning", [b"", b"1: "])
async def test_a_gigabyte_without_an_end(tmp_path, beginning):
    async def flood(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(beginning)
        for _ in range(1000):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
            fake.sent += 1

    async with fake_clamd(flood, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        failure = await failed(ours, mail(BIG))
        assert failure.reason == "protocol" and len(str(failure)) < 200
        assert await ours.judge(mail()) == CLEAN
        assert fake.sent < 5


async def test_a_name_is_short_and_printable(tmp_path):
    async with fake_clamd(said(b"%d: stream: \x1b[2J" + b"x" * 500 + b" FOUND\0"), path=tmp_path / "c") as (_, address):
        async with asking(address) as ours:
            reason = (await ours.judge(mail())).reason
            assert reason.startswith("\\x1b[2Jxxx") and len(reason) == SHOWN


@pytest.mark.parametrize("before", [0, 1], ids=["new", "used"])
@pytest.mark.parametrize("at", [0, 3])
async def test_a_text_that_cannot_be_read(tmp_path, at, before):
    count = 0

    async def read(at_: int, most: int) -> bytes:
        nonlocal count
        count += 1
        if count > at:
            raise OSError(5, "Input/output error")
        return b"x" * most

    async with fake_clamd(path=tmp_path / "c") as (fake, address), asking(address) as ours:
        for _ in range(before):
            assert await ours.judge(mail()) == CLEAN
        with pytest.raises(OSError, match="Input/output error"):
            await ours.judge(of(Text(b"", octets=1_000_000, read=read)))
        assert await ours.judge(mail()) == CLEAN
        assert fake.texts == [whole(mail())] * (before + 1)


async def test_a_cancelled_message_leaves_nothing(tmp_path):
    """Whenever it is cancelled; the answer to it is nobody's."""
    one = mail(BIG[:300_000])
    async with fake_clamd(path=tmp_path / "c") as (fake, address), asking(address) as ours:
        done = turns = 0
        while not done:
            task = asyncio.create_task(ours.judge(one))
            for _ in range(turns):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == CLEAN
            assert await ours.judge(mail(EICAR)) == CLEAN and fake.texts[-1] == whole(mail(EICAR))
            assert len(ours._places[0].idle) <= 1
            turns += 1
        assert turns > 5


# Addresses


async def test_a_socket_whose_queue_is_full(tmp_path):
    """connect(2) says EAGAIN."""
    path = tmp_path / "c"
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as first:
        sock.bind(str(path))
        sock.listen(0)
        first.connect(str(path))
        async with asking(f"unix:{path}", timeout=0.1) as ours:
            failure = await failed(ours)
            assert failure.reason == "timeout" and "does not take the connection within 0.1 s" in str(failure)
            task = asyncio.create_task(ours.probe())
            await asyncio.sleep(0)
            sock.accept()[0].close()
            with pytest.raises(FilterFailure) as raised:
                await task
            assert "no answer" in str(raised.value)


async def test_nobody_is_there(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"unix:{tmp_path}/none", f"unix:{tmp_path}/file", f"unix:/{'x' * 200}"):
            async with asking(address) as ours:
                failure = await failed(ours)
                assert failure.reason == "connect" and str(failure).startswith(address), address
                for ask in (ours.probe, ours.prove):
                    with pytest.raises(FilterFailure):
                        await ask()


@pytest.mark.parametrize("address", ["", "unix:", "unix:x", "127.0.0.1", "::1:3310", "127.0.0.1:x"])
def test_what_is_no_address(address):
    with pytest.raises(ValueError):
        Clamd([address], 1.0)


async def test_by_ipv6_and_by_name():
    made = Fake([])
    server = await asyncio.start_server(made.serve, "::1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asking(f"[::1]:{port}") as ours:
        assert await ours.judge(mail()) == CLEAN
    async with fake_clamd() as (_, address), asking(address.replace("127.0.0.1", "localhost")) as ours:
        assert await ours.judge(mail()) == CLEAN


async def test_an_smtp_server():
    with FakeMx({}) as server:
        async with asking(f"127.0.0.1:{server.port}") as ours:
            async with asyncio.timeout(10):
                failure = await failed(ours)
            assert failure.reason == "protocol"
            assert str(failure).startswith(
                f"127.0.0.1:{server.port}: answers, but not as clamd: begins with '220 fake ESMTP\\r\\n"
            )
            with pytest.raises(FilterFailure, match="answers, but not as clamd: begins with '220 fake"):
                await ours.probe()


async def test_the_first_that_is_up(tmp_path, monkeypatch):
    first, second = tmp_path / "1", tmp_path / "2"
    async with asking(f"unix:{first}", f"unix:{second}") as ours:
        failure = await failed(ours)
        assert failure.reason == "connect" and str(failure).count("No such file or directory") == 2
        async with fake_clamd(path=second) as (other, _):
            assert await ours.judge(mail()) == CLEAN
            async with fake_clamd(path=first) as (one, _):
                assert await ours.judge(mail()) == CLEAN and one.connections == 0  # it has failed a moment ago
                ours._places[0].skipped_until = asyncio.get_running_loop().time()
                assert await ours.judge(mail()) == CLEAN and len(one.texts) == 1
                one.acts = [said(b"", close=True)] * 2
                assert (await failed(ours)).reason == "connect"  # no message is the end of more than one clamd
                assert await ours.judge(mail()) == CLEAN and (len(one.texts), len(other.texts)) == (1, 3)


async def test_both_have_failed_a_moment_ago(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    async with asking(f"unix:{first}", f"unix:{second}") as ours:
        await failed(ours)
        async with fake_clamd(path=first):
            assert await ours.judge(mail()) == CLEAN


async def test_one_that_says_nothing_until_the_time_is_up_is_skipped(tmp_path):
    async def silent(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with fake_clamd(silent, path=tmp_path / "1") as (one, first), fake_clamd(path=tmp_path / "2") as (other, second):
        async with asking(first, second, timeout=0.1) as ours:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ours.judge(mail())
            assert await ours.judge(mail()) == CLEAN
            assert (one.connections, len(other.texts)) == (1, 1)


async def test_one_message_finds_out_whether_an_address_is_still_silent(tmp_path):
    """The others do not wait for that."""

    async def silent(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def judged(ours: Clamd) -> object:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                return await ours.judge(mail())

    async with fake_clamd(*[silent] * 9, path=tmp_path / "1") as (one, first), fake_clamd(path=tmp_path / "2") as (_, second):
        async with asking(first, second, timeout=0.1) as ours:
            assert await judged(ours) is None
            ours._places[0].skipped_until = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*(judged(ours) for _ in range(8)))
            assert sorted(map(repr, answers)) == [repr(CLEAN)] * 7 + ["None"]
            one.acts.clear()
            ours._places[0].skipped_until = asyncio.get_running_loop().time()
            assert await asyncio.gather(*(judged(ours) for _ in range(8))) == [CLEAN] * 8
            assert ours._places[0].skipped_until == 0 and await judged(ours) == CLEAN and len(one.texts) == 2


# Connections


async def test_idle_connections_are_closed(tmp_path, monkeypatch):
    async with fake_clamd(path=tmp_path / "c") as (fake, address), asking(address) as ours:
        await asyncio.gather(*(ours.judge(mail()) for _ in range(4)))
        idle = ours._places[0].idle
        used = idle[-1]
        for _ in range(3):  # one is enough for these
            assert await ours.judge(mail()) == CLEAN and ours.open == 4
        for one in idle[:-1]:
            one.idle_since -= module.CLAMD_IDLE
        ours._sweep()
        assert idle == [used]
        await until(lambda: ours.open == 1)
        assert await ours.judge(mail()) == CLEAN and fake.connections == 4
        monkeypatch.setattr(module, "CLAMD_IDLE", 0.02)
        ours._sweep()
        await until(lambda: ours.open == 0)  # by itself
        assert await ours.judge(mail()) == CLEAN and fake.connections == 5


async def test_what_is_given_up_as_it_is_connected_is_forgotten(tmp_path, monkeypatch):
    """uvloop does not say that it has closed such a connection."""
    made = module._Connection.connection_made

    async with fake_clamd(path=tmp_path / "c") as (fake, address), asking(address) as ours:
        task = asyncio.create_task(ours.judge(mail()))
        with monkeypatch.context() as patched:
            patched.setattr(module._Connection, "connection_made", lambda self, transport: (made(self, transport), task.cancel()))
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ours.open == 0
        assert await ours.judge(mail()) == CLEAN and fake.connections == 2


async def test_a_connection_closed_meanwhile_is_forgotten(tmp_path):
    async with fake_clamd(said(b"%d: stream: OK\0", close=True), path=tmp_path / "c") as (fake, address), asking(address) as ours:
        assert await ours.judge(mail()) == CLEAN
        await until(lambda: ours.open == 0)
        assert not ours._places[0].idle
        assert await ours.judge(mail()) == CLEAN and fake.connections == 2


async def test_what_is_under_way_ends_after_close(tmp_path):
    go = asyncio.Event()

    async def waits(fake: Fake, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await good(fake, number, reader, writer)

    async with fake_clamd(good, waits, path=tmp_path / "c") as (fake, address), asking(address) as ours:
        assert await ours.judge(mail()) == CLEAN
        task = asyncio.create_task(ours.judge(mail(BIG)))
        await until(lambda: not fake.acts)
        ours.close()
        go.set()
        assert await task == CLEAN and fake.texts[-1] == whole(mail(BIG))
        await until(lambda: ours.open == 0)


async def test_eicar_is_not_found(tmp_path):
    async with fake_clamd(path=tmp_path / "c") as (_, address), asking(address) as ours:
        with pytest.raises(FilterFailure, match="does not find EICAR") as raised:
            await ours.prove()
        assert raised.value.reason == "refused"
