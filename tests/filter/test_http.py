"""HTTP hooks, with one that answers what it is told; and the example and the program of docs/filters.md."""

import asyncio
import base64
import contextlib
import gc
import gzip
import hashlib
import hmac
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import trustme

from relaymta.filter import http as module
from relaymta.filter.http import LARGEST, Http
from relaymta.filter.judgement import Answer, FilterFailure, Mail, NewEnvelope, Text
from relaymta.filter.revision import Revision
from relaymta.proto import hook
from relaymta.proto.edits import Insert
from relaymta.proto.header import header_end
from tests.queue.test_queue import until
from tests.support.daemon import free_port
from tests.support.hooks import answers, block, ends, running, says, scripted, silent
from tests.support.prove import in_prove

PATIENCE = 60
HEADER = b"From: a@b.example\r\nSubject: hello\r\n world\r\nX-Spam: one\r\nX-Other: x\r\nx-spam: two\r\n\r\n"
MAIL = Mail("ID1", "a@b.example", ["c@d.example"], "192.0.2.1", "helo.example", "", "", Text(HEADER, b"hello\r\n"))
ACCEPT: dict[str, Any] = {"verdict": "accept"}


@contextlib.asynccontextmanager
async def asking(*addresses: str, timeout: float = 30.0, **more: Any) -> AsyncIterator[Http]:
    """A filter that leaves no connection, no task, and no failure that nobody has asked for."""
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
    tasks = asyncio.all_tasks()
    made = Http(addresses, timeout, "hook", "relay.example", **more)
    async with asyncio.timeout(PATIENCE):
        yield made
        made.close()
        await until(lambda: made.open == 0 and not [one for one in asyncio.all_tasks() - tasks if "serve" not in repr(one)])
    gc.collect()
    assert not unheard


async def failed(ours: Http, mail: Mail = MAIL) -> FilterFailure:
    with pytest.raises(FilterFailure) as raised:
        await ours.judge(mail)
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()
    return raised.value


def in_a_file(body: bytes) -> Text:
    async def read(at: int, most: int) -> bytes:
        await asyncio.sleep(0)
        return body[at : at + most]

    return Text(HEADER, octets=len(body), read=read)


# What it is asked


async def test_the_example_of_the_document_is_a_whole_request(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("correct horse\n")
    head, _, body = block("POST /hook").partition("\n\n")
    told, signed = json.loads(body), re.search(r"Signature: (t=(\d+),v1=\w+)", head)
    assert signed is not None
    monkeypatch.setattr(time, "time", lambda: float(signed[2]))
    monkeypatch.setattr("secrets.token_hex", lambda octets: told["request"])
    data = base64.b64decode(told["message"])
    end, client, envelope = header_end(data), told["client"], told["envelope"]
    mail = Mail(
        told["id"], envelope["sender"], envelope["recipients"], client["address"], client["helo"], client["user"], client["tls"],
        Text(data[:end], data[end:]), mechanism=client["mechanism"], listener=client["listener"],
        application=client["application"], protocol=client["protocol"],
        parameters=tuple(envelope["parameters"]), dmarc=told["results"]["dmarc"],
    )  # fmt: skip
    async with scripted() as (seen, address), asking(address, body=True, secret_file=str(tmp_path / "secret")) as ours:
        await ours.judge(mail)
    (request,) = seen.requests
    assert request.line == head.split("\n")[0] and request.told == told and list(request.told) == list(told)
    for name, value in re.findall(r"^([\w-]+): (.*)$", head, re.M):
        assert request.fields[name.lower()] == value
    assert not request.fields.keys() & {"cookie", "authorization", "connection", "transfer-encoding", "expect"}


def test_the_answer_of_the_document_is_one():
    found = hook.said(block('{\n      "verdict"').encode())
    wanted = hook.wanted(found, b"Subject: B\r\nX-Mailer: a\r\nx-mailer: b\r\n\r\n")
    assert (found.verdict, found.score, wanted.added, wanted.dropped) == ("tag", 4.5, ["archive@d.example"], 0)
    revision = Revision(replace(MAIL, text=Text(b"Subject: B\r\nX-Mailer: a\r\nx-mailer: b\r\n\r\n")))
    assert revision.edit(wanted.edits) == 0
    assert revision.header == b"X-Hook: links\r\nSubject: Office tomorrow\r\n\r\n"


async def test_octets_that_are_not_utf8_survive():
    header = "Subject: gr\u00fc\u00dfe\r\n".encode() + b"X: gr\xfc\xdfe\r\n more\r\nno field\r\n\r\n"
    mail = replace(MAIL, text=Text(header), sender="\udcfc@b.example", helo="\ud800")
    async with scripted() as (seen, address), asking(address) as ours:
        await ours.judge(mail)
        await ours.judge(MAIL)
    told = seen.requests[0].told
    assert told["header"] == [["Subject", "gr\u00fc\u00dfe"], ["X", "gr\ufffd\ufffde more"]]
    assert base64.b64decode(told["header_octets"]) == header and "message" not in told
    assert told["envelope"]["sender"] == "\ufffd@b.example" and told["client"]["helo"] == "?"
    assert "header_octets" not in seen.requests[1].told


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100_000, 3_000_000])
@pytest.mark.parametrize("where", ["memory", "file"])
async def test_the_message_data_is_shown_whole_or_its_head_and_signed(tmp_path, size, where):
    (tmp_path / "secret").write_text("correct horse")
    data = b"xxx xxx\r\n" * (size // 9) + b"y" * (size % 9)
    mail = replace(MAIL, text=in_a_file(data) if where == "file" else Text(HEADER, data))
    async with scripted() as (seen, address), asking(address, body=True, secret_file=str(tmp_path / "secret")) as ours:
        await ours.judge(mail)
        await ours.judge(mail.head(len(HEADER) + size // 2))
    whole, head = seen.requests
    assert base64.b64decode(whole.told["message"]) == HEADER + data
    assert base64.b64decode(head.told["message"]) == HEADER + data[: size // 2]
    assert whole.told["size"] == head.told["size"] == len(HEADER) + size
    assert whole.told["request"] != head.told["request"]
    for request in seen.requests:
        match = re.fullmatch(r"t=(\d+),v1=(\w+)", request.fields["x-relaymta-signature"])
        assert match is not None and abs(int(match[1]) - time.time()) < PATIENCE
        assert match[2] == hmac.new(b"correct horse", match[1].encode() + b"." + request.body, hashlib.sha256).hexdigest()
        assert request.fields["x-relaymta-request"] == request.told["request"]
        assert "transfer-encoding" not in request.fields
    assert seen.connections == 1


# What it answers


@pytest.mark.parametrize("found, answer", [
    (ACCEPT, Answer("accept")),
    ({"verdict": "reject", "reason": "no\r\n550 x\0\u202e"}, Answer("reject", r"no\r\n550 x\x00\u202e")),
    ({"verdict": "hold", "reason": "x" * 1000, "score": 7}, Answer("hold", "x" * 200, 7.0)),
    ({"verdict": "tag", "score": None, "changes": []}, Answer("tag")),
    ({"verdict": "discard", "score": -1e300}, Answer("discard", "", -1e300)),
    ({"verdict": "tempfail"}, Answer("tempfail")),
])  # fmt: skip
async def test_an_answer(found, answer):
    async with scripted(says(found)) as (_, address), asking(address) as ours:
        assert await ours.judge(MAIL) == answer


async def test_changes_of_the_envelope():
    changes = [
        {"do": "add_recipient", "address": "x@y.example"}, {"do": "remove_recipient", "address": "c@d.example"},
        {"do": "set_sender", "address": "z@b.example"}, {"do": "set_sender", "address": ""},
        {"do": "add_recipient", "address": "x"},
    ]  # fmt: skip
    async with scripted(says(ACCEPT | {"changes": changes})) as (_, address), asking(address) as ours:
        answer = await ours.judge(MAIL)
        assert answer.envelope == NewEnvelope(["x@y.example"], ["c@d.example"], "") and answer.dropped == 1


DEEP = b'{"verdict": "accept", "changes": ' + b"[" * 100_000
NONSENSE = [
    (answers(b"<html>502</html>"), "protocol", "begins with '<html>"), (answers([1]), "protocol", "Expected `object`"),
    (answers({}), "protocol", "missing required field `verdict`"), (answers(b""), "protocol", "truncated"),
    (answers({"verdict": "ACCEPT"}), "protocol", "Invalid enum value"), (answers({"verdict": 1}), "protocol", "Expected `str`"),
    (answers(ACCEPT | {"score": "5"}), "protocol", "score"), (answers(ACCEPT | {"score": True}), "protocol", "score"),
    (answers(b'{"verdict": "accept", "score": NaN}'), "protocol", "malformed"), (answers(DEEP), "protocol", ""),
    (answers(b'{"verdict": "accept", "score": 1e999}'), "protocol", "out of range"),
    (answers(b'{"verdict": "accept", "score": ' + b"9" * 5000 + b"}"), "protocol", "out of range"),
    (answers(ACCEPT | {"reason": 5}), "protocol", "reason"), (answers(ACCEPT | {"\x1b\r\n": 5}), "protocol", "unknown field"),
    (answers(ACCEPT | {"reason": "\ud800"}), "protocol", ""), (answers(b'{"verdict": "\xff"}'), "protocol", ""),
    (answers(ACCEPT | {"changes": {}}), "protocol", "changes"), (answers(ACCEPT | {"changes": [{}]}), "protocol", "do"),
    (answers(ACCEPT | {"changes": [{"do": "ad"}]}), "protocol", "Invalid value 'ad'"),
    (answers(ACCEPT | {"changes": [{"do": "add", "name": "X"}]}), "protocol", "value"),
    (answers(ACCEPT | {"changes": [{"do": "remove", "name": "X", "instance": 0}]}), "protocol", ">= 1"),
    (answers(ACCEPT | {"changes": [{"do": "remove", "name": "X", "instance": True}]}), "protocol", "instance"),
    (answers(ACCEPT | {"changes": [{"do": "add_recipient", "address": None}]}), "protocol", "address"),
    (answers(ACCEPT, "500 Internal Server Error"), "refused", "HTTP 500"),
    (answers(ACCEPT, "404 No"), "refused", "HTTP 404"),
    (answers(ACCEPT, "413 Large"), "refused", "HTTP 413"),
    (answers(ACCEPT, "204 No Content"), "protocol", ""),
    (answers(ACCEPT, "201 Made"), "protocol", "HTTP 201"),
    (answers(b"", "302 Found", "Location: /other"), "protocol", "HTTP 302"),
    (answers(b"", "307 Found", "Location: http://127.0.0.1:1/"), "protocol", "HTTP 307"),
    (answers(gzip.compress(b'{"verdict": "accept"}'), "200 OK", "Content-Encoding: gzip"), "protocol", "compressed (gzip)"),
    (answers(b"\x78\x9c", "200 OK", "Content-Encoding: x\x1by"), "protocol", "compressed"),
    (b"220 mail.example ESMTP\r\n", "protocol", "not by HTTP"), (b"\0" * 100, "protocol", "not by HTTP"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "protocol", ""), (b"HTTP/1.1 200 OK\r\nA\r\n\r\n", "protocol", ""),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 1000, "protocol", "longer than"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}", "protocol", "cut short"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}", "protocol", ""),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "protocol", "cut short"),
    (b"HTTP/1.1 200 OK\r\n" + b"X-Y: " + b"y" * 100_000 + b"\r\n\r\n", "protocol", ""),
    (b"HTTP/1.1 200 OK\r\n" + b"X-Y: y\r\n" * 10_000 + b"\r\n", "protocol", ""),
    (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "protocol", "HTTP 101"),
    (b"HTTP/1.1 20", "protocol", "within its answer"), (b"", "connect", "without an answer"),
    (b"HTTP/1.0 200 OK\r\n\r\n", "protocol", ""),
]  # fmt: skip


@pytest.mark.parametrize("kept", [*in_prove(False), True])
@pytest.mark.parametrize("answer, reason, text", NONSENSE)
async def test_what_makes_no_sense_is_a_failure_and_the_next_message_is_right(answer, reason, text, kept):
    before = [says(ACCEPT)] * kept
    again = kept and not answer  # it was kept, and has said nothing
    async with scripted(*before, ends(answer), *[ends()] * again) as (seen, address), asking(address) as ours:
        if kept:
            assert await ours.judge(MAIL) == Answer("accept")
        failure = await failed(ours)
        assert failure.reason == reason and text in str(failure), str(failure)
        assert await ours.judge(MAIL) == Answer("accept")
        assert len(seen.requests) == 2 + kept + again and {one.line for one in seen.requests} == {"POST /hook HTTP/1.1"}


GOOD = b'{"verdict": "hold"}'


@pytest.mark.parametrize("octets", [
    b"HTTP/1.0 200 OK\r\n\r\n" + GOOD,
    b"HTTP/1.0 200 OK\r\nContent-Length: 19\r\n\r\n" + GOOD, b"HTTP/1.1 200\r\n\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + GOOD, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9;x=y\r\n"
    + GOOD[:9] + b"\r\nA\r\n" + GOOD[9:] + b"\r\n0\r\nX: y\r\n\r\n",
    answers(GOOD, "200 OK", "Content-Encoding: identity", "Set-Cookie: a=b"),
])  # fmt: skip
async def test_forms_of_a_good_answer(octets):
    async with scripted(ends(octets)) as (seen, address), asking(address) as ours:
        assert await ours.judge(MAIL) == Answer("hold")
        assert await ours.judge(MAIL) == Answer("accept") and seen.connections == 2
        assert "cookie" not in seen.requests[1].fields


async def test_an_answer_in_single_octets():
    octets = answers(GOOD)
    async with scripted(says(*(octets[at : at + 1] for at in range(len(octets))), then=0.001)) as (_, address):
        async with asking(address) as ours:
            assert await ours.judge(MAIL) == Answer("hold")


async def test_an_answer_without_end_is_left_and_not_kept_in_memory():
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):
            writer.write(b" " * 100_000)
            await writer.drain()

    async with scripted(flood) as (seen, address), asking(address) as ours:
        assert "longer than" in str(await failed(ours))
        assert await ours.judge(MAIL) == Answer("accept")
        await until(lambda: seen.open == 1)
    large = answers(ACCEPT)[:-1] + b" " * (LARGEST - 22) + b"}"
    async with (
        scripted(says(large.replace(b"Length: 21", b"Length: %d" % (LARGEST - 1)))) as (_, address),
        asking(address) as ours,
    ):
        assert await ours.judge(MAIL) == Answer("accept")


# Connections


async def test_connections_are_kept():
    async with scripted() as (seen, address), asking(address) as ours:
        for _ in range(20):
            await ours.judge(MAIL)
        assert seen.connections == ours.open == 1
        await asyncio.gather(*(ours.judge(MAIL) for _ in range(20)))
        assert seen.connections == ours.open == 20
        await asyncio.gather(*(ours.judge(MAIL) for _ in range(20)))
        assert seen.connections == 20 and len({one.told["request"] for one in seen.requests}) == 60


async def test_a_kept_connection_that_is_closed_without_an_octet_is_replaced_once():
    async with scripted(says(ACCEPT), ends(), says({"verdict": "hold"}), ends(reset=True), ends()) as (seen, address):
        async with asking(address) as ours:
            assert await ours.judge(MAIL) == Answer("accept")
            assert await ours.judge(MAIL) == Answer("hold") and seen.connections == 2
            failure = await failed(ours)  # the kept one, and the new one
            assert failure.reason == "connect" and "without an answer" in str(failure) and seen.connections == 3
            assert await ours.judge(MAIL) == Answer("accept")
            assert len({one.told["request"] for one in seen.requests}) == len(seen.requests) == 6


async def test_it_is_replaced_by_a_new_one_though_others_are_kept():
    async with scripted() as (seen, address), asking(address) as ours:
        await asyncio.gather(ours.judge(MAIL), ours.judge(MAIL))
        seen.acts = [ends(), says({"verdict": "hold"})]
        assert seen.connections == 2 and await ours.judge(MAIL) == Answer("hold") and seen.connections == 3


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("begun", [b"H", b"HTTP/1.1 200 OK\r\nContent-Le", answers(GOOD)[:-1]])
async def test_half_an_answer_is_not_asked_for_again(begun, reset):
    async with scripted(says(ACCEPT), ends(begun, reset)) as (seen, address), asking(address) as ours:
        await ours.judge(MAIL)
        assert (await failed(ours)).reason == "protocol" and len(seen.requests) == 2
        assert await ours.judge(MAIL) == Answer("accept") and seen.connections == 2


async def test_a_connection_that_is_closed_between_two_questions_is_not_asked():
    async with scripted(ends(answers(ACCEPT))) as (seen, address), asking(address) as ours:
        await ours.judge(MAIL)
        await until(lambda: ours.open == 0)
        await ours.judge(MAIL)
        assert len(seen.requests) == 2


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("more", [answers({"verdict": "reject"}), b"H", b"HTTP/1.1 200 OK\r\n", b"\0"])
async def test_what_nobody_waits_for_is_no_answer_to_the_next_question(more, together):
    act = says(answers(ACCEPT) + more) if together else says(answers(ACCEPT), more)
    async with scripted(act) as (seen, address), asking(address) as ours:
        with contextlib.suppress(FilterFailure):
            assert await ours.judge(MAIL) == Answer("accept")
        await asyncio.sleep(0.05)
        assert await ours.judge(MAIL) == Answer("accept")
        if together is False:
            assert seen.connections == 2


async def test_what_has_come_and_was_not_read_yet_is_no_answer_to_the_next_question():
    """The event loop was at work elsewhere meanwhile."""
    listening, go, gone = socket.create_server(("127.0.0.1", 0)), threading.Event(), threading.Event()

    def serve() -> None:
        for number in range(2):
            peer, _ = listening.accept()
            with peer, contextlib.suppress(ConnectionError):
                while not peer.recv(65536).endswith(b"}"):
                    pass
                peer.sendall(answers(ACCEPT))
                if not number:
                    go.wait(PATIENCE)
                    peer.sendall(answers({"verdict": "reject"}))
                    gone.set()
                peer.recv(65536)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    async with asking(f"http://127.0.0.1:{listening.getsockname()[1]}/hook") as ours:
        await ours.judge(MAIL)
        go.set()
        gone.wait(PATIENCE)  # on the loop
        assert await ours.judge(MAIL) == Answer("accept")
    await asyncio.to_thread(thread.join)
    listening.close()


async def test_the_first_that_can_be_connected_to_is_asked():
    none = f"http://127.0.0.1:{free_port()}/hook"
    async with scripted() as (seen, address), asking(none, address) as ours:
        for _ in range(3):
            await ours.judge(MAIL)
        assert len(seen.requests) == 3
    async with asking(none, "http://host.invalid/x") as ours:
        failure = await failed(ours)
        assert failure.reason == "connect" and "Connection refused" in str(failure) and "host.invalid" in str(failure)
        with pytest.raises(FilterFailure):
            await ours.probe()


async def test_a_silent_one_is_left_and_the_next_message_is_right():
    async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"HTTP/1.1 200 OK\r\nX: " if not reader.at_eof() else b"")
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with scripted(silent, drips, says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")) as (seen, address):
        async with asking(address) as ours:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await ours.judge(MAIL)
            await until(lambda: ours.open == 0)
            assert await ours.judge(MAIL) == Answer("accept") and seen.connections == 4


async def test_cancelled_while_a_large_message_goes_out():
    async with scripted(silent) as (seen, address), asking(address, body=True) as ours:
        seen.early = True
        mail = replace(MAIL, text=in_a_file(b"x" * 20_000_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await ours.judge(mail)
        await until(lambda: ours.open == 0)


@pytest.mark.parametrize("status, reason", [("413 Too Large", "oversize"), ("403 No", "refused"), ("200 OK", "protocol")])
async def test_one_that_answers_before_it_has_all_of_a_large_message(status, reason):
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers(b"", status))
        while await reader.read(65536):
            pass

    async with scripted(early) as (seen, address), asking(address, body=True) as ours:
        seen.early = True
        assert (await failed(ours, replace(MAIL, text=in_a_file(b"x" * 20_000_000)))).reason == reason
        seen.early = False
        assert await ours.judge(MAIL) == Answer("accept") and seen.connections == 2


async def test_one_that_closes_before_it_has_all_of_a_large_message():
    async with scripted(ends()) as (seen, address), asking(address, body=True) as ours:
        seen.early = True
        assert (await failed(ours, replace(MAIL, text=in_a_file(b"x" * 20_000_000)))).reason == "connect"
        seen.early = False
        assert await ours.judge(MAIL) == Answer("accept")


async def test_a_good_answer_before_it_has_all_of_a_large_message():
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers({"verdict": "hold"}))
        while await reader.read(65536):
            pass

    async with scripted(early) as (seen, address), asking(address, body=True) as ours:
        seen.early = True
        assert await ours.judge(replace(MAIL, text=in_a_file(b"x" * 20_000_000))) == Answer("hold")
        seen.early = False
        assert await ours.judge(MAIL) == Answer("accept") and seen.connections == 2


async def test_what_is_under_way_ends_after_close_and_what_comes_then_is_answered():
    said = asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await said.wait()
        writer.write(answers({"verdict": "hold"}))

    async with scripted(says(ACCEPT), late) as (seen, address), asking(address) as ours:
        await ours.judge(MAIL)
        asked = asyncio.ensure_future(ours.judge(MAIL))
        await until(lambda: len(seen.requests) == 2)
        ours.close()
        said.set()
        assert await asked == Answer("hold")
        await until(lambda: ours.open == seen.open == 0)
        assert await ours.judge(MAIL) == Answer("accept")
        await until(lambda: ours.open == seen.open == 0)


async def test_a_text_that_cannot_be_read_is_no_failure_of_the_hook():
    async def never(at: int, most: int) -> bytes:
        raise OSError("the disk")

    reads = 0

    async def once(at: int, most: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 50:
            raise OSError("the disk")
        return b"x" * min(most, 5_000_000 - at)

    async with scripted() as (_, address), asking(address, body=True) as ours:
        for octets, read in ((1000, never), (5_000_000, never), (5_000_000, once)):
            with pytest.raises(OSError, match="the disk"):
                await ours.judge(replace(MAIL, text=Text(HEADER, octets=octets, read=read)))
        assert await ours.judge(MAIL) == Answer("accept")


async def test_no_proxy_of_the_environment_is_used(monkeypatch):
    async with scripted() as (seen, address), scripted() as (proxy, other), asking(address) as ours:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, other)
        await ours.judge(MAIL)
        assert len(seen.requests) == 1 and not proxy.requests


async def test_a_certificate_is_verified(monkeypatch):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with scripted(ssl=context) as (seen, address):
        async with asking(address) as ours:
            failure = await failed(ours)
            assert failure.reason == "connect" and "certificate verify failed" in str(failure) and not seen.requests
        trusts = ssl.create_default_context()
        authority.configure_trust(trusts)
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusts)
        async with asking(address) as ours:
            for _ in range(3):
                assert await ours.judge(MAIL) == Answer("accept")
            assert seen.connections == 1


# The secret


async def test_a_secret_is_read_when_it_is_needed_and_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECRET_EVERY", 0.0)
    file, warned = tmp_path / "secret", list[str]()

    def signed(request: Any) -> bytes:
        seconds, _, given = request.fields["x-relaymta-signature"].removeprefix("t=").partition(",v1=")
        made = {key: hmac.new(key, f"{seconds}.".encode() + request.body, "sha256").hexdigest() for key in (b"one", b"two")}
        return next(key for key, value in made.items() if value == given)

    async with scripted() as (seen, address), asking(address, secret_file=str(file), warn=warned.append) as ours:
        failure = await failed(ours)
        assert failure.reason == "connect" and str(failure) == f"secret_file {file}: No such file or directory"
        with pytest.raises(FilterFailure, match="No such file"):
            await ours.probe()
        assert not seen.requests
        file.write_text("one\n")
        await asyncio.gather(*(ours.judge(MAIL) for _ in range(5)))
        file.write_text("two, longer\nlines")
        await ours.judge(MAIL)
        assert [signed(one) for one in seen.requests] == [b"one"] * 6
        file.write_text(" two \n")
        await ours.judge(MAIL)
        assert signed(seen.requests[-1]) == b"two"
    assert [text.partition(": ")[2] for text in warned] == [
        "No such file or directory; there is no earlier version to use",
        "has more than one line: it holds one password or token; what was read before stays in use",
    ]


# Probes and proofs


async def test_whether_it_is_there():
    acts = [
        says(answers(b"x", status)) for status in ("200 OK", "405 No", "404 No", "501 Unsupported", "302 Found\r\nLocation: /x")
    ]
    bad = [ends(answers(b"x", status)) for status in ("500 No", "502 Bad Gateway", "503 No")]
    async with scripted(*acts, *bad, ends(), ends(), ends(b"220 hello\r\n"), silent) as (seen, address):
        async with asking(address, timeout=1.0) as ours:
            for _ in acts:
                await ours.probe()
            assert {one.line for one in seen.requests} == {"OPTIONS /hook HTTP/1.1"} and not seen.requests[0].body
            for reason in ("refused", "refused", "refused", "connect", "protocol", "timeout"):
                with pytest.raises(FilterFailure) as failure:
                    await ours.probe()
                assert failure.value.reason == reason


async def test_what_it_says_of_a_sample():
    async with scripted(says({"verdict": "reject", "reason": "spam"}), says({})) as (seen, address), asking(address) as ours:
        assert await ours.prove() == "a hook that says reject: spam"
        with pytest.raises(FilterFailure, match="verdict"):
            await ours.prove()
        assert seen.requests[0].told["id"] == "prove"
        assert await ours.prove() == "a hook that says accept"


async def test_the_program_of_the_document_as_it_is_written(tmp_path):
    (tmp_path / "other").write_text("another one")
    with running(tmp_path) as (address, file, _):
        async with (
            asking(address, body=True, secret_file=file) as ours,
            asking(address, secret_file=str(tmp_path / "other")) as bad,
        ):
            async with asking(address) as unsigned:
                await ours.probe()
                answer = await ours.judge(MAIL)
                assert answer.word == "accept" and list(answer.edits) == [Insert(1, b"X-Hook", b" ID1")]
                assert await ours.judge(replace(MAIL, helo="relay.example")) == Answer("reject", "that is my own name")
                assert await ours.judge(replace(MAIL, text=in_a_file(b"x" * 3_000_000))) == answer
                assert ours.open == 1
                for one in (bad, unsigned):
                    failure = await failed(one)
                    assert failure.reason == "refused" and "HTTP 403" in str(failure)
    assert "Traceback" not in (tmp_path / "hook.log").read_text()
