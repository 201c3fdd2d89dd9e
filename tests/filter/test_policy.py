"""Policy services: scripted ones, and real ones."""

import asyncio
import contextlib
import gc
import random
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from relaymta.filter import policy as module
from relaymta.filter.judgement import Answer, FilterFailure, Mail, NewEnvelope, Text
from relaymta.filter.policy import IDLE_MOST, Policy
from relaymta.proto.edits import Insert
from tests.queue.test_queue import until
from tests.support.policies import Scripted, ends, policyd_spf, postgrey, says, scripted, silent

TEXT = Text(b"Subject: x\r\n\r\n", b"text\r\n")
MAIL = Mail(
    "ID1", "a@a.example", ["b@b.example"], "192.0.2.1", "helo.example", "joe", "using TLSv1.3 with cipher NAME (256/256 bits)",
    TEXT, mechanism="PLAIN", listener="192.0.2.25:25", announced=4711,
)  # fmt: skip
DUNNO = Answer("DUNNO")
CLOSED = "closes the connection without a reply"


@contextlib.asynccontextmanager
async def asking(*addresses: str, stage: str = "rcpt", timeout: float = 30.0) -> AsyncIterator[Policy]:
    """A filter that leaves no connection, and no failure that nobody has asked for."""
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
    made = Policy(addresses, timeout, "relay.example", stage)
    try:
        yield made
    finally:
        made.close()
    await until(lambda: made.open == 0)
    gc.collect()
    assert not unheard


async def rcpt(ours: Policy, address: str = "c@c.example") -> Answer:
    return await ours.session("192.0.2.1").rcpt(MAIL, address)


async def failed(ours: Policy) -> FilterFailure:
    with pytest.raises(FilterFailure) as raised:
        await rcpt(ours)
    return raised.value


# What it is asked


async def test_the_attributes_of_each_stage(tmp_path):
    async with scripted(tmp_path / "s") as (service, address):
        async with asking(address) as ours:
            assert (ours.asks, ours.looks, ours.alone) == ({"RCPT"}, False, False)
            assert await rcpt(ours) == DUNNO
        assert service.raw[0] == (
            b"request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\nclient_address=192.0.2.1\n"
            b"client_name=unknown\nclient_port=\nreverse_client_name=unknown\nserver_address=192.0.2.25\nserver_port=25\n"
            b"helo_name=helo.example\nsender=a@a.example\nrecipient=c@c.example\nrecipient_count=0\nqueue_id=ID1\ninstance=ID1\n"
            b"size=4711\netrn_domain=\nstress=\nsasl_method=PLAIN\nsasl_username=joe\nsasl_sender=\nccert_subject=\n"
            b"ccert_issuer=\nccert_fingerprint=\nccert_pubkey_fingerprint=\nencryption_protocol=TLSv1.3\nencryption_cipher=NAME\n"
            b"encryption_keysize=256\npolicy_context=\n\n"
        )
        async with asking(address, stage="data") as ours:
            assert (ours.asks, ours.looks) == ({"DATA"}, False)
            session = ours.session("192.0.2.1")
            assert await session.data(MAIL) == DUNNO and session.decided
            session.reset()
            many = replace(MAIL, ident="ID2", recipients=["b@b.example", "c@c.example"], tls="", listener="", announced=0)
            assert not session.decided and await session.data(many) == DUNNO
        one, other = service.requests[1:]
        assert (one["protocol_state"], one["recipient"], one["recipient_count"], one["size"]) == (
            "DATA",
            "b@b.example",
            "1",
            "4711",
        )
        assert (other["recipient"], other["recipient_count"], other["size"], other["instance"]) == ("", "2", "0", "ID2")
        assert (other["encryption_protocol"], other["encryption_keysize"], other["server_port"]) == ("", "0", "")
        async with asking(address, stage="message") as ours:
            assert (ours.asks, ours.looks) == (frozenset(), True)
            assert await ours.session("192.0.2.1").judge(MAIL) == await ours.judge(MAIL) == DUNNO
        one, other = service.requests[3:]
        assert one == other and (one["protocol_state"], one["size"]) == ("END-OF-MESSAGE", str(TEXT.size))


async def test_questions_about_one_message_have_one_instance(tmp_path):
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        session = ours.session("192.0.2.1")
        await session.rcpt(MAIL, "b@b.example")
        await session.rcpt(replace(MAIL, ident="ID1b"), "c@c.example")
        session.refused("d@d.example", b"550 5.1.1 no\r\n")
        session.reset()
        await session.rcpt(replace(MAIL, ident="ID2"), "b@b.example")
        session.close()
        assert [one["instance"] for one in service.requests] == ["ID1", "ID1", "ID2"]
        assert (await session.mail(MAIL)).word == "continue" and len(service.requests) == 3 and service.connections == 1


# What its answers mean

AT_RCPT = "<c@c.example>: Recipient address rejected: "
ANSWERS = {
    "OK": DUNNO,
    "DUNNO": DUNNO,
    "": DUNNO,
    "permit": DUNNO,
    "REJECT": Answer("REJECT", reply=b"554 5.7.1 %sAccess denied\r\n"),
    "reject 5.1.1 no": Answer("REJECT", "no", reply=b"554 5.1.1 %sno\r\n"),
    "550 no": Answer("REJECT", "no", reply=b"550 5.7.1 %sno\r\n"),
    "DEFER later": Answer("DEFER", "later", reply=b"450 4.7.1 %slater\r\n"),
    "421 4.3.2 go": Answer("DEFER", "go", reply=b"421 4.3.2 %sgo\r\n"),
    "DEFER_IF_PERMIT later": Answer("DEFER", "later", reply=b"450 4.7.1 %slater\r\n", condition="if permitted"),
    "DEFER_IF_REJECT later": Answer("DUNNO", "later", reply=b"450 4.7.1 %slater\r\n", condition="if rejected"),
    "HOLD look": Answer("HOLD", "look"),
    "DISCARD away": Answer("DISCARD", "away"),
    "PREPEND X-A: b": Answer("DUNNO", "X-A: b", edits=(Insert(0, b"X-A", b" b"),)),
    "PREPEND nothing": Answer("DUNNO", "nothing", dropped=1, note="says PREPEND 'nothing', which is no field"),
    "WARN look": Answer("DUNNO", "look", note="look"),
    "INFO": Answer("DUNNO", note="says INFO"),
    "REDIRECT <x@y.example>": Answer("DUNNO", "<x@y.example>", envelope=NewEnvelope(only="x@y.example")),
    "REDIRECT nobody": Answer("DUNNO", "nobody", dropped=1, note="says REDIRECT 'nobody', which is no address"),
    "BCC x@y.example": Answer("DUNNO", "x@y.example", envelope=NewEnvelope(added=["x@y.example"])),
    "FILTER x:y": Answer("DUNNO", "x:y", dropped=1, note="says FILTER 'x:y': there is no way to name a route"),
    "FOO bar": Answer("DUNNO", "bar", note="says 'FOO', which is no action: taken for DUNNO"),
    "5xx bar": Answer("DUNNO", "bar", note="says '5XX', which is no action: taken for DUNNO"),
    "WARN " + "x" * 15_000: Answer("DUNNO", "x" * 200, note="x" * 200),
    "PREPEND " + "x" * 15_000: Answer(
        "DUNNO", "x" * 200, dropped=1, note=("says PREPEND '" + "x" * 191)[:205] + ", which is no field"
    ),
}


@pytest.mark.parametrize("action", ANSWERS, ids=[action[:30] for action in ANSWERS])
async def test_answers(tmp_path, action):
    async with scripted(tmp_path / "s") as (service, address):
        service.answer = lambda request: b"action=" + action.encode() + b"\n\n"
        for stage in ("rcpt", "message"):
            async with asking(address, stage=stage) as ours:
                session = ours.session("192.0.2.1")
                found = await (session.rcpt(MAIL, "c@c.example") if stage == "rcpt" else session.judge(MAIL))
                expected = ANSWERS[action]
                where = AT_RCPT if stage == "rcpt" else ""
                if not (action.startswith("PREPEND x")):
                    assert found == expected._replace(reply=expected.reply.replace(b"%s", where.encode()))
                else:
                    assert found.dropped == 1 and len(found.note) < 300
                assert session.decided == (stage == "message" or action.startswith("DISCARD"))


async def test_a_message_of_a_client_that_is_not_followed(tmp_path):
    """The strictest answer about a recipient is that of the message; changes are those of all answers."""
    says_of = {
        "b@b.example": b"PREPEND X: b", "c@c.example": b"BCC x@y.example", "d@d.example": b"REJECT no",
        "e@e.example": b"450 later", "f@f.example": b"REDIRECT z@y.example",
    }  # fmt: skip
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        service.answer = lambda request: b"action=" + says_of[request["recipient"]] + b"\n\n"
        everyone = replace(MAIL, recipients=list(says_of))
        assert (await ours.judge(everyone)).reply == b"554 5.7.1 <d@d.example>: Recipient address rejected: no\r\n"
        says_of["d@d.example"] = b"WARN d"
        assert (await ours.judge(everyone)).word == "DEFER"
        says_of["e@e.example"] = b"WARN e"
        found = await ours.judge(everyone)
        assert found.word == "DUNNO" and list(found.edits) == [Insert(0, b"X", b" b")] and found.note == "d; e"
        assert found.envelope == NewEnvelope(["x@y.example"], only="z@y.example")
        assert await ours.judge(replace(MAIL, recipients=[])) == Answer("DUNNO", edits=[])


# Connections


async def test_a_connection_is_kept(tmp_path):
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        for _ in range(20):
            assert await rcpt(ours) == DUNNO
        assert service.connections == ours.open == 1
        await asyncio.gather(*(rcpt(ours) for _ in range(20)))
        assert service.connections == 20
        await until(lambda: ours.open == IDLE_MOST == service.open)
        await asyncio.gather(*(rcpt(ours) for _ in range(10)))
        assert service.connections == 20


async def test_what_is_idle_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IDLE", 0.05)
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        await asyncio.gather(rcpt(ours), rcpt(ours))
        await until(lambda: ours.open == service.open == 0)
        assert await rcpt(ours) == DUNNO and service.connections == 3
        await until(lambda: ours.open == 0)


async def test_a_kept_connection_that_is_closed_is_replaced_once(tmp_path):
    async with scripted(tmp_path / "s", says(b"action=OK\n\n"), ends(), says(b"action=HOLD\n\n"), ends(), ends()) as (
        service,
        address,
    ):
        async with asking(address) as ours:
            assert await rcpt(ours) == DUNNO
            assert (await rcpt(ours)).word == "HOLD" and service.connections == 2
            failure = await failed(ours)  # the kept one, and the new one
            assert (failure.reason, str(failure)) == ("connect", f"{address}: {CLOSED}")
            assert service.connections == 3 and len(service.requests) == 5
            assert await rcpt(ours) == DUNNO


async def test_a_connection_that_is_closed_between_two_questions_is_not_asked(tmp_path):
    async with scripted(tmp_path / "s", ends(b"action=OK\n\n")) as (service, address), asking(address) as ours:
        assert await rcpt(ours) == DUNNO
        await until(lambda: ours.open == 0)
        assert await rcpt(ours) == DUNNO and len(service.requests) == 2


async def test_a_new_connection_that_is_closed_is_not_replaced(tmp_path):
    async with scripted(tmp_path / "s", ends()) as (service, address), asking(address) as ours:
        assert (await failed(ours)).reason == "connect" and service.connections == 1
        assert await rcpt(ours) == DUNNO


@pytest.mark.parametrize("kept", [False, True])
async def test_a_reply_that_breaks_off_is_not_asked_for_again(tmp_path, kept):
    acts = [says(b"action=OK\n\n")] * kept
    async with scripted(tmp_path / "s", *acts, ends(b"action=REJ")) as (service, address), asking(address) as ours:
        if kept:
            await rcpt(ours)
        failure = await failed(ours)
        assert (failure.reason, str(failure)) == ("protocol", f"{address}: closes the connection within a reply: 'action=REJ'")
        assert len(service.requests) == 1 + kept and await rcpt(ours) == DUNNO and service.connections == 2


@pytest.mark.parametrize(
    "more", [b"action=REJECT\n\n", b"a", b"\n", b"UNKNOWN COMMAND\n"], ids=["an answer", "an octet", "a line", "something else"]
)
@pytest.mark.parametrize("together", [True, False])
async def test_what_nobody_waits_for_is_no_answer_to_the_next_question(tmp_path, more, together):
    act = says(b"action=OK\n\n" + more) if together else says(b"action=OK\n\n", more)
    async with scripted(tmp_path / "s", act) as (service, address), asking(address) as ours:
        if together and not more.startswith((b"action", b"a")):
            with contextlib.suppress(FilterFailure):
                assert await rcpt(ours) == DUNNO
        else:
            assert await rcpt(ours) == DUNNO
        await until(lambda: ours.open == 0)
        assert await rcpt(ours) == DUNNO and service.connections == 2


@pytest.mark.parametrize("more", [b"action=REJECT\n\n", b""], ids=["an answer", "the end"])
async def test_what_has_come_and_was_not_read_yet_is_no_answer_to_the_next_question(tmp_path, more):
    """The service says it while the loop does not look."""
    go, gone = threading.Event(), threading.Event()
    asked = []

    def serve() -> None:
        for again in (False, True):
            connection = server.accept()[0]
            with connection, contextlib.suppress(ConnectionError):  # it is closed, maybe with something unread
                asked.append(connection.recv(65536))
                connection.sendall(b"action=HOLD again\n\n" if again else b"action=OK\n\n")
                if not again:
                    go.wait(10)
                    connection.sendall(more) if more else connection.shutdown(socket.SHUT_WR)
                    gone.set()
                connection.recv(65536)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        async with asking(f"unix:{tmp_path}/s") as ours:
            assert await rcpt(ours) == DUNNO and ours.open == 1
            go.set()
            assert gone.wait(10)
            async with asyncio.timeout(10):
                assert (await rcpt(ours)).word == "HOLD"
        thread.join(10)
    assert len(asked) == 2


async def test_a_greeting_is_no_answer(tmp_path):
    async with scripted(tmp_path / "s", greeting=b"220 mx.example ESMTP\r\n") as (_, address), asking(address) as ours:
        failure = await failed(ours)
        assert failure.reason == "protocol"
        assert str(failure) in (
            f"{address}: answers, but not as a policy service: begins with '220 mx.example ESMTP'",
            f"{address}: says more than it was asked",
        )


WRONG = {
    "clamd": (b"UNKNOWN COMMAND\n", "begins with 'UNKNOWN COMMAND'"),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "begins with 'HTTP/1.1 400 Bad Request'"),
    "binary": (b"\x15\x03\x01\n\x02", "begins with '\\x15\\x03\\x01'"),
    "nothing": (b"\n", "leaves out its action"),
    "no end": (b"x" * 40_000, "has no end, and begins with '" + "x" * 64 + "'"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_another_service(tmp_path, what):
    octets, why = WRONG[what]
    async with scripted(tmp_path / "s", says(octets), says(octets)) as (service, address), asking(address) as ours:
        failure = await failed(ours)
        assert (failure.reason, str(failure)) == ("protocol", f"{address}: answers, but not as a policy service: {why}")
        await until(lambda: ours.open == 0)
        with pytest.raises(FilterFailure, match="not as a policy service"):
            await ours.prove()
        assert service.connections == 2 and await rcpt(ours) == DUNNO


async def test_a_question_that_is_given_up_closes_its_connection(tmp_path):
    async with scripted(tmp_path / "s", says(b"action=OK\n\n"), silent, silent) as (service, address), asking(address) as ours:
        assert await rcpt(ours) == DUNNO
        for asked in (2, 3):
            task = asyncio.ensure_future(rcpt(ours))
            await until(lambda asked=asked: len(service.requests) == asked)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: ours.open == service.open == 0)
        assert await rcpt(ours) == DUNNO and service.connections == 3


async def test_a_question_that_is_given_up_at_any_moment(tmp_path):
    """Whenever it is cancelled, the next has its own answer."""
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        service.answer = lambda request: b"action=HOLD " + request["recipient"].encode() + b"\n\n"
        for turns in range(40):
            task = asyncio.ensure_future(rcpt(ours, f"old{turns}@c.example"))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert (await rcpt(ours, f"new{turns}@c.example")).reason == f"new{turns}@c.example"


async def test_a_filter_that_is_closed_keeps_nothing(tmp_path):
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        await rcpt(ours)
        ours.close()
        await until(lambda: service.open == 0)
        assert await rcpt(ours) == DUNNO
        await until(lambda: service.open == 0 == ours.open)


async def test_several_addresses(tmp_path):
    nowhere = f"unix:{tmp_path}/nowhere"
    async with scripted(tmp_path / "two") as (two, second):
        async with asking(nowhere, second) as ours:
            assert await rcpt(ours) == DUNNO and two.connections == 1
            async with scripted(tmp_path / "nowhere") as (one, _):  # it is skipped for some seconds
                assert await rcpt(ours) == DUNNO and (one.connections, two.connections) == (0, 1)
        async with scripted(tmp_path / "one", says(b"action=OK\n\n"), ends()) as (one, first), asking(first, second) as ours:
            assert await rcpt(ours) == DUNNO == await rcpt(ours)  # lost, and asked again at the same
            assert (one.connections, len(one.requests), two.connections) == (2, 3, 1)
    async with asking(nowhere, second) as ours:
        failure = await failed(ours)
        assert failure.reason == "connect"
        assert str(failure) == f"{nowhere}: No such file or directory; {second}: No such file or directory"


async def test_a_probe_is_no_question(tmp_path):
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        await ours.probe()
        await until(lambda: service.connections == 1 and service.open == 0)
        assert not service.requests
    async with asking(address) as ours:
        with pytest.raises(FilterFailure, match="No such file or directory"):
            await ours.probe()


async def test_a_proof(tmp_path):
    acts = says(b"action=DUNNO\n\n"), says(b"action=450 4.7.1 later\n\n"), says(b"action=FOO\n\n"), silent
    async with scripted(tmp_path / "s", *acts) as (service, address), asking(address, stage="message", timeout=0.1) as ours:
        assert await ours.prove() == "a policy service that answers DUNNO"
        asked = service.requests[0]
        assert (asked["protocol_state"], asked["client_address"], asked["sender"]) == ("RCPT", "192.0.2.1", "")
        assert asked["recipient"] == "postmaster@relay.example"
        assert await ours.prove() == "a policy service that answers 450"
        with pytest.raises(FilterFailure, match="answers 'FOO', which is no action"):
            await ours.prove()
        with pytest.raises(FilterFailure, match=r"no answer within 0\.1 s") as raised:
            await ours.prove()
        assert raised.value.reason == "timeout"


def test_an_address_that_is_none():
    for address in ("unix:x", "nowhere", "host:port"):
        with pytest.raises(ValueError, match=address):
            Policy([address], 1.0, "relay.example", "rcpt")


# Whatever it does


def _act(chance: random.Random, service: Scripted):
    """Something that a service may do, of which at most what is right is an answer."""

    async def right(one, request, reader, writer):
        octets = service.answer(request)
        cut = chance.randrange(len(octets))
        writer.write(octets[:cut])
        await asyncio.sleep(0)
        writer.write(octets[cut:])

    async def right_and_ends(one, request, reader, writer):
        writer.write(service.answer(request))
        raise ConnectionAbortedError

    async def right_and_more(one, request, reader, writer):
        writer.write(service.answer(request) + b"action=REJECT wrong\n\n")

    return chance.choice(
        [right, right, right, right_and_ends, right_and_more, ends(), ends(b"action=RE"), says(b"UNKNOWN COMMAND\n"), silent]
    )


async def test_dialogues_at_random(tmp_path):
    """2,000 questions to services that do anything: an answer is that to the question, and a failure is one."""
    chance = random.Random(4711)
    async with scripted(tmp_path / "s") as (service, address), asking(address) as ours:
        service.answer = lambda request: b"action=HOLD " + request["recipient"].encode() + b"\r\n\r\n"
        right = wrong = late = 0

        async def one(number: int) -> None:
            nonlocal right, wrong, late
            name = f"{number}@c.example"
            try:
                async with asyncio.timeout(chance.choice([0.002, 0.02])):
                    found = await rcpt(ours, name)
            except FilterFailure as failure:
                assert failure.reason in ("protocol", "connect")
                wrong += 1
            except TimeoutError:
                late += 1
            else:
                assert (found.word, found.reason) == ("HOLD", name)
                right += 1

        for number in range(0, 2000, 4):
            service.acts += [_act(chance, service) for _ in range(chance.randrange(4))]
            await asyncio.gather(*map(one, range(number, number + chance.randrange(1, 5))))
            service.acts.clear()
            if chance.random() < 0.3:
                assert (await rcpt(ours, "next@c.example")).reason == "next@c.example"
        assert right > 500 and wrong > 50


# Real ones


async def test_postgrey():
    with postgrey(delay=1) as address:
        async with asking(address) as ours:
            await ours.probe()
            session = ours.session("192.0.2.1")
            one = replace(MAIL, user="", mechanism="")
            found = await session.rcpt(one, "c@c.example")
            assert (found.word, found.condition) == ("DEFER", "if permitted")
            assert found.reply.startswith(b"450 4.2.0 <c@c.example>: Recipient address rejected: Greylisted")
            session.reset()

            async def passes() -> bool:
                nonlocal found
                found = await session.rcpt(replace(one, ident="ID2"), "c@c.example")
                session.reset()
                return found.word == "DUNNO"

            async with asyncio.timeout(30):
                while not await passes():
                    await asyncio.sleep(0.1)
            ((edit),) = found.edits
            assert edit.name == b"X-Greylist" and edit.value.startswith(b" delayed ") and ours.open == 1
            assert (await ours.prove()).startswith("a policy service that answers D")


async def test_policyd_spf():
    with policyd_spf() as address:
        async with asking(address) as ours:
            session = ours.session("127.0.0.1")
            local = replace(MAIL, client="127.0.0.1")
            found = await session.rcpt(local, "c@c.example")
            assert found.word == "DUNNO" and not found.dropped
            session.reset()
            assert (await session.rcpt(replace(local, ident="ID2"), "c@c.example")).word == "DUNNO" and ours.open == 1
