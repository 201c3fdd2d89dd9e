"""Milters that follow a client, in the chain: each knows the message as it is, whatever another has made of it."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from relaymta.filter.judgement import Mail, Text
from relaymta.filter.milter import KEPT
from relaymta.filter.revision import Revision
from relaymta.shm import Shared
from tests.filter.test_chain import Bench, bench_of
from tests.filter.test_milter import asking, quiet
from tests.support.scripted_milter import RCPT_REJ, Script, Scripted, agreed, change, frame, scripted

HEAD = b"From: a\r\nSubject: x\r\n\r\n"


def mail(*recipients: str) -> Mail:
    return Mail("ID1", "a@b.example", list(recipients), "192.0.2.1", "h.example", "", "", Text(HEAD, b"text\r\n"))


@contextlib.asynccontextmanager
async def chained(*settings: dict[str, Any]) -> AsyncIterator[tuple[list[Scripted], Bench]]:
    """Milters with these settings, in this order."""
    async with quiet(), contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(scripted()) for _ in settings]
        bench = await stack.enter_async_context(bench_of(Shared.create()))
        rows = [{"type": "milter", "address": [address]} | one for one, (_, address) in zip(settings, found, strict=True)]
        bench.configure(*rows)
        yield [server for server, _ in found], bench


async def test_recipients_that_one_has_added_the_next_is_told_of_though_it_knows_the_others():
    async with chained({"stage": "message", "may": ["recipients"]}, {"stage": "mail"}) as ((one, two), bench):
        changes = [change("-", b"r%d@d.example" % n) for n in range(2)] + [change("+", b"new@d.example")]
        one.script = Script().at("E", *changes, frame("c"))
        chain, to = bench.chain(), [f"r{n}@d.example" for n in range(3)]
        dialogue = chain.dialogue("192.0.2.1")
        assert await dialogue.mail(mail()) is None
        for n, address in enumerate(to):
            assert await dialogue.rcpt(mail(*to[:n]), address) is None
        assert (await chain.judge(Revision(mail(*to)), dialogue)).verdict.word == "accept"
        assert two.told[0].of("R") == [b"<%b>\0" % address.encode() for address in (*to, "new@d.example")]
        dialogue.end()


async def test_what_is_said_of_a_recipient_is_logged_also_where_nothing_follows():
    """The log is all that is there of a filter that is tried out."""
    async with chained({"stage": "mail", "enforce": False}) as ((one,), bench):
        one.script = Script().at("R", frame("r")).at("R", frame("c")).at("R", frame("t"))
        chain, to = bench.chain(), [f"r{n}@d.example" for n in range(3)]
        dialogue = chain.dialogue("192.0.2.1")
        assert await dialogue.mail(mail()) is None
        for n, address in enumerate(to):
            assert await dialogue.rcpt(mail(*to[:n]), address) is None
        assert [(event["verdict"], event["action"]) for event in bench.of("filtered")] == [
            ("reject", "accept"),
            ("tempfail", "accept"),
        ]
        assert (await chain.judge(Revision(mail(*to)), dialogue)).verdict.word == "accept"
        assert len(bench.of("filtered")) == 3
        dialogue.end()


@pytest.mark.parametrize(
    "act, reply", [(frame("r"), b"550 5.7.1 <r0@d.example>: refused"), (frame("t"), b"451 4.7.1 <r0@d.example>: not")]
)
async def test_a_recipient_that_is_refused_when_it_is_told_again_is_not_forgotten(act, reply):
    """The client has heard that it is accepted: the message is refused."""
    async with chained({"stage": "mail"}) as ((one,), bench):
        chain, to = bench.chain(), [f"r{n}@d.example" for n in range(3)]
        dialogue = chain.dialogue("192.0.2.1")
        for _ in range(2):
            one.script = Script()
            assert await dialogue.mail(mail()) is None
            assert await dialogue.rcpt(mail(), to[0]) is None
            one.script = Script().at("R", act).at("R", frame("c"))
            await one.end()
            assert await dialogue.rcpt(mail(*to[:1]), to[1]) is None
            assert await dialogue.rcpt(mail(*to[:2]), to[2]) is None
            outcome = await chain.judge(Revision(mail(*to)), dialogue)
            assert outcome.reply.startswith(reply)
            dialogue.reset()
        one.script = Script()
        assert await dialogue.mail(mail()) is None
        assert await dialogue.rcpt(mail(), to[0]) is None
        assert (await chain.judge(Revision(mail(*to)), dialogue)).verdict.word == "accept"
        dialogue.end()


async def test_recipients_that_the_relay_has_refused_are_told_again_and_not_twice():
    async with asking(Script(offer=(agreed(steps=RCPT_REJ),), steps=RCPT_REJ)) as (server, ours):
        session = ours.session()
        for _ in range(2):
            await session.mail(mail())
            for n in range(2):
                session.refused(f"no{n}@d.example", b"550 5.1.1 no such user\r\n")
                assert (await session.rcpt(mail(*["r0@d.example"] * n), f"r{n}@d.example")).word == "continue"
            await server.end()
            assert (await session.judge(mail("r0@d.example", "r1@d.example"))).word == "accept"
            session.reset()
        session.close()
        every = {b"<%b%d@d.example>\0" % (what, n) for what in (b"no", b"r") for n in range(2)}
        first, second, third = (told.of("R") for told in server.told)
        assert set(first) == every and len(first) == 4
        assert set(second) == every and len(second) == 8 and len(third) == 4


async def test_of_recipients_without_number_not_all_are_kept():
    """A refusal for now costs a client nothing: it may name others for ever."""
    for steps in (0, RCPT_REJ):
        async with asking(Script(offer=(agreed(steps=steps),), steps=steps)) as (server, ours):
            session = ours.session()
            for n in range(5 * KEPT):
                session.refused(f"no{n}@d.example", b"452 4.7.1 later\r\n")
            assert len(session._refused) == KEPT
            server.script.at("R", frame("t"))
            for n in range(3 * KEPT):
                await session.rcpt(mail("r0@d.example"), f"no{n}@d.example")
            assert session._link is not None and len(session._link.told) <= KEPT + 2
            answer = await session.judge(mail("r0@d.example"))
            assert answer.word == "tempfail" and server.told[0].of("R").count(b"<r0@d.example>\0") == 1
            session.close()


async def test_where_the_envelope_stays_as_it_is_nothing_is_discarded_for_want_of_recipients():
    async with chained({"stage": "message", "may": ["recipients", "sender"]}) as ((one,), bench):
        one.script = Script().at("E", change("-", b"r0@d.example"), change("e", b"<x@y.example>"), frame("c"))
        chain = bench.chain()
        for addressed, word in ((True, "discard"), (False, "accept")):
            revision = Revision(mail("r0@d.example"), addressed=addressed)
            assert (await chain.judge(revision)).verdict.word == word
            assert revision.mail.sender == ("x@y.example" if addressed else "a@b.example")
        assert [event["text"] for event in bench.of("warning")] == ["filter f0: 2 of its changes to ID1 were not made"]
