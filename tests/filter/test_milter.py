"""Milters: one that does as a script says, whatever that is."""

import asyncio
import contextlib
import gc
import os
import random
import re
import tracemalloc
from collections import deque
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.filter.judgement import Answer, FilterFailure, Mail, Text
from relaymta.filter.milter import Milter, _Session
from relaymta.filter.revision import Revision
from relaymta.proto import milter as module
from relaymta.proto.edits import Append, edited, shown
from relaymta.proto.header import header_end
from relaymta.proto.milter import FRAME_MOST, Conversation, Piece, Said, smtp_reply
from relaymta.shm import Shared
from tests.filter.test_chain import Bench, bench_of
from tests.queue.test_queue import until
from tests.support.prove import in_prove
from tests.support.scripted_milter import (
    CLOSE,
    LEADSPC,
    NO,
    NR,
    ORDER,
    RCPT_REJ,
    SILENT,
    SKIP,
    Hold,
    Script,
    Scripted,
    agreed,
    change,
    frame,
    lists,
    scripted,
)  # fmt: skip

PATIENCE = 60
SOON = 0.05  # seconds for a filter that says nothing
HEAD = b"From: a\r\nSubject: x\r\n\r\n"
OVERSIZED = b"UNKNOWN COMMAND\n"  # of another service: a frame of 1.4 GB
EVERY_NR = sum(NR.values())
WORDS = {b"a": "accept", b"r": "reject", b"t": "tempfail", b"d": "discard", b"4": "tempfail", b"f": "tempfail"}
CHANGES = {
    "h": change("h", b"X-A", b"1"), "i": change("i", b"X-I", b"1", at=0), "m": change("m", b"Subject", b"y", at=1),
    "b": frame("b", b"new\r\n"), "+": change("+", b"<x@y.example>"), "2": change("2", b"<x@y.example>", b"NOTIFY=NEVER"),
    "-": change("-", b"<r0@d.example>"), "e": change("e", b"<x@y.example>"), "q": change("q", b"why"),
}  # fmt: skip
NEEDS = {"h": 0x1, "i": 0x11, "m": 0x10, "b": 0x2, "+": 0x4, "2": 0x80, "-": 0x8, "e": 0x40, "q": 0x20}


class Body:
    """As of judgement.NewBody."""

    eight_bit = False

    def __init__(self) -> None:
        self.written, self.octets, self.discarded = b"", 0, 0

    async def write(self, piece: bytes) -> None:
        await asyncio.sleep(0)
        self.written += piece
        self.octets += len(piece)

    async def end(self) -> None:
        pass

    def discard(self) -> None:
        self.discarded += 1

    def text(self, head: bytes) -> Text:
        return Text(head, self.written)


def mail(n: int = 0, recipients: int = 1, body: bytes = b"text\r\n", text: Text | None = None, **more: Any) -> Mail:
    given = {"client": "192.0.2.1", "helo": "h.example", "user": "", "tls": ""} | more
    to = [f"r{one}@d.example" for one in range(recipients)]
    return Mail(f"ID{n}", f"m{n}@b.example", to, text=text or Text(HEAD, body), rewritten=Body, **given)


def seen(one: Mail, answer: Answer) -> None:
    """It is taken, and what it gets is its own."""
    assert answer.word == "accept" and answer.edits == [Append(b"X-Seen", b" " + one.ident.encode())]


@contextlib.asynccontextmanager
async def quiet() -> AsyncIterator[None]:
    """Nothing is left that fails unheard."""
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
    yield
    await asyncio.sleep(0)
    gc.collect()
    assert not unheard


@contextlib.asynccontextmanager
async def asking(script: Script | None = None) -> AsyncIterator[tuple[Scripted, Milter]]:
    """A scripted milter, and what asks it."""
    async with quiet(), scripted() as (server, address):
        if script is not None:
            server.script = script
        yield server, Milter([address], 5, "relay.example")
        await until(lambda: server.open == server.silent)


async def outcome(session: _Session, one: Mail, seconds: float = PATIENCE) -> tuple[str, Answer | None]:
    """A word, or why there is none: "!timeout" …"""
    try:
        async with asyncio.timeout(seconds):
            answer = await session.judge(one)
    except TimeoutError:
        return "!timeout", None
    except FilterFailure as failure:
        assert str(failure)
        return f"!{failure.reason}", None
    return answer.word, answer


# What the protocol allows


def answers(script: Script, events: str) -> list[object]:
    """All that it does, in order, when it is told of these events."""
    found: list[object] = []
    counts: dict[str, int] = {}
    for event in events:
        if script.steps & NO.get(event, 0):
            continue
        counts[event] = nth = counts.get(event, -1) + 1
        acts = script.acts.get(event)
        if acts is not None:
            act = acts[min(nth, len(acts) - 1)]
            found += act
            if script.ignores and any(
                isinstance(one, bytes) and one[4:5] in (*WORDS, b"y") and not (event == "R" and one[4:5] in b"rty") for one in act
            ):
                break
        elif not script.steps & NR.get(event, 0):
            found.append(frame("c"))
    return found


def allowed(script: Script, events: str, actions: int = 0x1FF) -> set[str]:
    """What may come of a message, by a model that reads all of that as one text."""
    due = deque(one for one in events if not (script.steps & (NO.get(one, 0) | NR.get(one, 0))))
    done = answers(script, events)
    stops = [one for one in done if one is CLOSE or one is SILENT]
    until = done.index(stops[0]) if stops else len(done)
    octets = b"".join(one for one in done[:until] if isinstance(one, bytes))
    closes = {"!connect"} if CLOSE in stops[:1] else set()
    refused: list[str] = []
    quarantined = False
    while len(octets) >= 4:
        size = int.from_bytes(octets[:4], "big")
        if not 0 < size <= FRAME_MOST or not due:
            return {"!protocol"}
        if len(octets) < 4 + size:
            break
        letter, data, octets = octets[4:5], octets[5 : 4 + size], octets[4 + size :]
        event = due[0]
        if letter == b"p" or (letter.decode("latin-1") in NEEDS and event == "E" and actions & NEEDS[letter.decode()]):
            if letter not in b"pbq" and (data[4:] if letter in b"im" else data).count(b"\0") < (2 if letter in b"him" else 1):
                return {"!protocol"}
            quarantined = quarantined or letter == b"q"
            continue
        due.popleft()
        if letter == b"c":
            if event != "E":
                continue
            word = "accept"
        elif letter == b"s" and event == "B":
            continue
        elif letter in WORDS:
            word = WORDS[letter]
        elif letter == b"y":
            word = "tempfail" if data[:1] == b"4" else "reject"
        else:
            return {"!protocol"}
        if event in "CH" and word == "discard":
            return {"!protocol"}
        if event == "R" and letter in b"rty":
            refused.append(word)
            continue
        if word == "accept":
            word = ("reject" if "reject" in refused else "tempfail") if refused else "quarantine" if quarantined else "accept"
        return {word} | closes | ({"!protocol"} if octets and not due else set())
    return closes or {"!timeout"}


# Each answer at each event

LETTERS = [
    *(frame(one) for one in "artds4fcpZO\xff\0"), frame("y", b"550 5.7.1 no\0"), frame("y", b"451 4.7.1 later\0"),
    *CHANGES.values(), frame("h", b"X-A\0no end"), frame("i", b"\0"), frame("m"), frame("-"),
]  # fmt: skip


@pytest.mark.parametrize("steps", [0, EVERY_NR, RCPT_REJ | SKIP], ids=["", "nothing is answered", "skip"])
@pytest.mark.parametrize("event", ORDER)
async def test_each_answer_to_each_event(event, steps):
    """And then the next message, of the same client and of another one, is right."""
    async with asking() as (server, ours):
        for n, octets in enumerate(LETTERS):
            goes_on = octets[4:5] in b"p" or (event == "E" and octets[4:5].decode("latin-1") in NEEDS)
            script = Script(offer=(agreed(steps=steps),), steps=steps).at(event, octets, *([frame("c")] if goes_on else []))
            may = allowed(script, "CHMRRTLLNBE")
            server.script = script
            session = ours.session()
            word, answer = await outcome(session, mail(n, 2), SOON if "!timeout" in may else PATIENCE)
            assert word in may, octets
            if answer is not None and word == "accept" and octets in CHANGES.values():
                assert answer.edits or answer.envelope or answer.body
            server.script = Script()
            if session._over is None and not (event in "CH" and steps & NR[event]):  # else it may be silent for ever
                seen(one := mail(1000 + n), await session.judge(one))
            elif session._over is not None:
                assert event in "CH" and await session.judge(mail(1000 + n)) == answer
            session.close()
            seen(one := mail(2000 + n), await ours.judge(one))


MESS = {
    "nothing, and closes": (CLOSE,),
    "closes behind it": (frame("c"), CLOSE),
    "half of a length": (b"\0\0", CLOSE),
    "half of a frame": (b"\0\0\0\5y550", CLOSE),
    "of length 0": (b"\0\0\0\0",),
    "of 1.4 GB": (OVERSIZED,),
    "of one octet too many": ((FRAME_MOST + 1).to_bytes(4, "big"),),
    "half, and no more": (b"\0\0\0\5y", SILENT),
    "nothing": (SILENT,),
    "two": (frame("c"), frame("c")),
    "three at once": (frame("c") * 3,),
    "one, and a last word": (frame("c") + frame("r"),),
    "a last word, and one": (frame("r") + frame("c"),),
}


@pytest.mark.parametrize("act", MESS.values(), ids=MESS)
async def test_what_is_no_answer_at_any_event(act):
    async with asking() as (server, ours):
        for ignores in (True, False):
            for n, event in enumerate(ORDER):
                server.script = Script(ignores=ignores).at(event, *act)
                may = allowed(server.script, "CHMRTLLNBE")
                session = ours.session()
                word, _ = await outcome(session, mail(n), SOON if "!timeout" in may else PATIENCE)
                if act[0] in (frame("c"), frame("c") * 3):
                    may |= {"!protocol"}
                assert word in may, event
                server.script = Script()
                if session._over is None:
                    seen(one := mail(100 + n), await session.judge(one))
                else:
                    assert event in "CH" and (await session.judge(mail(100 + n))).word == word
                session.close()
                seen(one := mail(200 + n), await ours.judge(one))


OFFERS = {
    "another service": ((OVERSIZED,), "!protocol"),
    "nothing": ((SILENT,), "!timeout"),
    "closes": ((CLOSE,), "!connect"),
    "half": ((agreed()[:9], CLOSE), "!connect"),
    "half, and no more": ((agreed()[:9], SILENT), "!timeout"),
    "of length 0": ((bytes(4),), "!protocol"),
    "too short": ((frame("O", bytes(11)),), "!protocol"),
    "another letter": ((frame("c"),), "!protocol"),
    "progress": ((frame("p"), agreed()), "!protocol"),
    "version 1": ((agreed(1),), "!protocol"),
    "version 7": ((agreed(7),), "!protocol"),
    "an action that was not offered": ((agreed(actions=0x200),), "!protocol"),
    "a step that was not offered": ((agreed(steps=0x200000),), "!protocol"),
    "half of a list": ((agreed(more=b"\0\0\0\0j"),), "!protocol"),
    "half of a number": ((agreed(more=b"\0\0"),), "!protocol"),
    "lists without end": ((agreed(more=b"\0\0\0\0\0" * 200_000),), "!protocol"),
}


@pytest.mark.parametrize(("offer", "word"), OFFERS.values(), ids=OFFERS)
async def test_nothing_can_be_agreed_upon(offer, word):
    async with asking(Script(offer=offer)) as (server, ours):
        session = ours.session()
        assert (await outcome(session, mail(), SOON if word == "!timeout" else PATIENCE))[0] == word
        with pytest.raises((FilterFailure, TimeoutError)):
            async with asyncio.timeout(SOON if word == "!timeout" else PATIENCE):
                await ours.probe()
        server.script = Script()
        seen(mail(), await session.judge(mail()))
        session.close()
        await ours.probe()


REAL = {
    "opendkim": 0x2 | NO["U"] | NO["T"] | SKIP | LEADSPC, "opendmarc": NO["B"] | NO["U"] | NO["T"] | SKIP,
    "clamav-milter": NO["H"] | NO["N"] | NO["U"] | NO["T"], "spamass-milter": NO["U"] | NO["T"],
    "pyspf-milter": NO["H"] | NO["R"] | NO["U"] | NO["T"] | SKIP | NR["L"] | NR["C"] | NR["N"] | NR["B"],
    "dkimpy-milter": NO["H"] | NO["R"] | NO["U"] | NO["T"] | SKIP | NR["L"] | NR["C"] | NR["N"] | NR["B"] | NR["M"],
    "rspamd_proxy": EVERY_NR | 0x20000, "mimedefang": RCPT_REJ, "nothing but the end": sum(NO.values()),
}  # fmt: skip


@pytest.mark.parametrize("version", [2, *in_prove(3, 4, 5), 6])
@pytest.mark.parametrize("steps", REAL.values(), ids=REAL)
async def test_what_is_agreed_upon_is_what_is_told(version, steps):
    async with asking(Script(offer=(agreed(version, steps=steps),), steps=steps)) as (server, ours):
        session = ours.session()
        for n in range(3):
            seen(one := mail(n, 2), await session.judge(one))
            session.reset()
        session.close()
        await until(lambda: server.told[0].letters.endswith("Q"))
        (told,) = server.told
        assert told.offer == b"\0\0\0\6\0\0\1\xff\0\x1f\xff\xff"
        events = "".join(one for one in "CH" + "MRRTLLNBE" * 3 if not steps & NO.get(one, 0) and (one != "T" or version > 3))
        assert told.letters == events + "Q"
        assert told.of("L")[:1] == ([] if steps & NO["L"] else [b"From\0" + (b" a" if steps & LEADSPC else b"a") + b"\0"])


async def test_macros_by_stage():
    async with asking(Script(offer=(agreed(more=lists(M="{auth_type}, i", R="", E="i{}")),))) as (server, ours):
        one = mail(user="u", mechanism="LOGIN", tls="using TLSv1.3 with cipher NAME (256/256 bits)", listener="192.0.2.9:25")
        await ours.judge(one)
        macros = {letter: known for letter, _, known in server.told[0].events}
        assert {"j": "relay.example", "_": "[192.0.2.1]", "{daemon_port}": "25"}.items() <= macros["C"].items()
        assert macros["H"] == {"{tls_version}": "TLSv1.3", "{cipher}": "NAME", "{cipher_bits}": "256"}
        assert macros["M"] == {"{auth_type}": "LOGIN", "i": "ID0"} and macros["R"] == macros["L"] == macros["B"] == {}
        assert macros["T"] == macros["N"] == {"i": "ID0"}


# One dialogue, several messages


async def test_an_answer_that_comes_too_late_is_nobodys():
    go = asyncio.Event()
    async with asking(Script().at("E", Hold(go), frame("r"))) as (server, ours):
        session = ours.session()
        assert (await outcome(session, mail(1), SOON))[0] == "!timeout"
        server.script = Script()
        go.set()
        for n in range(2, 5):
            seen(one := mail(n), await session.judge(one))
        session.close()
        assert len(server.told) == 2


@pytest.mark.parametrize("event", ORDER)
async def test_a_client_that_goes_while_it_is_asked(event):
    go = asyncio.Event()
    async with asking(Script().at(event, Hold(go))) as (server, ours):
        session = ours.session()
        task = asyncio.create_task(session.judge(mail(1)))
        await until(lambda: bool(server.told) and event in server.told[0].letters)
        session.close()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        server.script = Script()
        seen(mail(2), await ours.judge(mail(2)))


async def test_lost_once_it_is_told_all_once_more():
    go = asyncio.Event()
    async with asking(Script().at("E", Hold(go), CLOSE)) as (server, ours):
        session = ours.session()
        task = asyncio.create_task(session.judge(mail(1, 2)))
        await until(lambda: bool(server.told) and "E" in server.told[0].letters)
        server.script = Script()
        go.set()
        seen(mail(1), await task)
        assert [told.letters for told in server.told] == ["CHMRRTLLNBE"] * 2
        session.close()


async def test_closing_between_messages_costs_nothing():
    async with asking() as (server, ours):
        session = ours.session()
        for n in range(5):
            server.script = Script().at("E", change("h", b"X-Seen", b"ID%d" % n) + frame("c"), CLOSE)
            seen(one := mail(n), await session.judge(one))
        session.close()


@pytest.mark.parametrize(("event", "steps"), [("M", 0), ("R", EVERY_NR), *in_prove(("R", 0), ("M", EVERY_NR))])
async def test_questions_about_the_envelope(event, steps):
    """Each answer, as the filter follows the client; then another transaction of the same client."""
    for octets in LETTERS:
        script = Script(offer=(agreed(steps=steps),), steps=steps).at(event, octets)
        async with asking(script) as (server, ours):
            session = ours.session()
            words = []
            expected = octets[4:5] not in b"cartdfy4"
            limit = SOON if octets[4:5] == b"p" else PATIENCE
            try:
                async with asyncio.timeout(limit):
                    words.append((await session.mail(mail(0, 0))).word)
                    if not session.decided:
                        words.append((await session.rcpt(mail(0, 0), "r0@d.example")).word)
            except (FilterFailure, TimeoutError):
                words.append("!")
            if not steps:
                assert (words[-1] == "!") == expected, octets
            assert session.decided or words[-1] in ("continue", "reject", "tempfail", "!")
            session.reset()
            server.script = Script()
            seen(mail(1), await session.judge(mail(1)))
            session.close()


async def test_what_the_filter_says_unasked_behind_an_answer_is_a_failure():
    """Of what is under way, at any stage: it would be the answer to the next event."""
    for event, act in (("C", frame("d")), ("H", frame("d")), ("M", frame("c") * 2), ("R", frame("c") * 2), ("R", frame("r") * 2)):
        steps = sum(NR[one] for one in "CHMR" if one != event)
        async with asking(Script(offer=(agreed(steps=steps),), steps=steps).at(event, act)) as (_, ours):
            session = ours.session()
            with pytest.raises(FilterFailure) as raised:
                await session.mail(mail(0, 0))
                await session.rcpt(mail(0, 0), "r0@d.example")
            assert raised.value.reason == "protocol"
            session.close()
    async with asking(Script().at("E", frame("c") + frame("r"))) as (_, ours):
        with pytest.raises(FilterFailure):
            await ours.judge(mail())


async def test_recipients_that_were_refused():
    """They are told where that was agreed upon; what the filter says of them is nobody's."""
    for steps in (0, RCPT_REJ):
        async with asking(Script(offer=(agreed(steps=steps),), steps=steps)) as (server, ours):
            session = ours.session()
            await session.mail(mail(0, 0))
            session.refused("no@d.example", b"550 5.1.1 no such user\r\n")
            server.script.at("R", frame("r")).at("R", frame("c"))
            answer = await session.rcpt(mail(0, 0), "r0@d.example")
            assert answer.word == ("continue" if steps else "reject")
            server.script = Script()
            seen(mail(0), await session.judge(mail(0))) if steps else None
            told = [(data, known.get("{rcpt_mailer}")) for letter, data, known in server.told[0].events if letter == "R"]
            first = [(b"<no@d.example>\0", "error")] if steps else []
            assert told == [*first, (b"<r0@d.example>\0", "smtp")]
            session.close()


@pytest.mark.parametrize("reply", [b"554 5.7.9 no", b"554-5.7.9 no\r\n554 5.7.9 never"])
async def test_a_recipient_that_is_refused_too_late_is_named(reply):
    async with asking(Script().at("R", frame("c")).at("R", change("y", reply))) as (_, ours):
        answer = await ours.judge(mail(0, 3))
        assert answer.reply == b"554 5.7.9 <r1@d.example>: no\r\n" and answer.reason == "554 5.7.9 <r1@d.example>: no"
    async with asking(Script().at("R", frame("t")).at("R", frame("r")).at("R", frame("c"))) as (_, ours):
        assert (await ours.judge(mail(0, 3))).reply == b"550 5.7.1 <r1@d.example>: refused\r\n"


# Large texts


def file_of(octets: int, pause: asyncio.Event | None = None) -> Text:
    async def read(at: int, most: int) -> bytes:
        if at and pause is not None:
            await pause.wait()
        await asyncio.sleep(0)
        return b"x" * min(most, octets - at)

    return Text(HEAD, octets=octets, read=read)


@pytest.mark.parametrize("answers_on", [False, True])
@pytest.mark.parametrize("word", ["a", "r", "t", "d"])
async def test_a_last_word_while_the_text_is_still_read(word, answers_on):
    """All that was told is answered: nothing is due then. The next message does not get the answer to what is told behind it."""
    more, heard = asyncio.Event(), asyncio.Event()
    async with asking(Script(ignores=not answers_on).at("B", frame(word)).at("B", frame("c"))) as (server, ours):
        session = ours.session()
        task = asyncio.create_task(session.judge(mail(1, text=file_of(300_000, more))))
        await until(lambda: session._link is not None and session._link.talk.last is not None)
        heard.set()
        more.set()
        assert (await task).word == WORDS[word.encode()]
        session.reset()
        server.script = Script().at("E", frame("r"))
        assert (await session.judge(mail(2))).word == "reject"
        server.script = Script()
        seen(mail(3), await session.judge(mail(3)))
        session.close()


async def test_a_last_word_in_front_of_a_large_text():
    """However many recipients are answered before, and though the filter reads nothing behind it."""
    go = asyncio.Event()
    async with asking(Script().at("R", frame("c")).at("T", Hold(go), frame("r"), SILENT)) as (_, ours):
        session = ours.session()
        task = asyncio.create_task(session.judge(mail(1, 20, body=b"x" * 5_000_000)))
        await until(lambda: session._link is not None and len(session._link._events) == 20)
        go.set()
        async with asyncio.timeout(PATIENCE):
            assert (await task).word == "reject"
        session.close()


async def test_a_filter_that_reads_nothing_more_has_its_connection_closed():
    """What is not written yet does not keep it."""
    steps, go = EVERY_NR & ~NR["T"], asyncio.Event()
    async with asking(Script(offer=(agreed(steps=steps),), steps=steps).at("T", Hold(go), frame("r"), SILENT)) as (_, ours):
        session = ours.session()
        task = asyncio.create_task(session.judge(mail(1, body=b"x" * 3_000_000)))
        await until(lambda: session._link is not None and session._link._full)
        go.set()
        assert (await task).word == "reject"
        descriptors = len(os.listdir("/proc/self/fd"))
        session.close()
        await until(lambda: len(os.listdir("/proc/self/fd")) < descriptors)


async def test_a_new_body_of_many_pieces_and_none_at_all():
    pieces = [b"%06d\r\n" % n * 100 for n in range(2000)]
    act = b"".join(frame("b", one) for one in pieces) + frame("c")
    async with asking(Script().at("E", act)) as (server, ours):
        answer = await ours.judge(mail())
        assert answer.body.written == b"".join(pieces)  # type: ignore[union-attr]
        server.script = Script().at("E", frame("b") + frame("c"))
        assert (await ours.judge(mail())).body.written == b""  # type: ignore[union-attr]
        server.script = Script().at("E", act[:-5], CLOSE)
        with pytest.raises(FilterFailure):
            await ours.judge(mail())


async def test_progress_within_the_time_of_all_filters(monkeypatch):
    """It is given more time each time, and never a moment too late."""
    async with asking(Script().at("E", *[frame("p")] * 50, change("h", b"X-Seen", b"ID0") + frame("c"))) as (_, ours):
        session, times = ours.session(), []
        session.renew = lambda: times.append(1)
        seen(mail(), await session.judge(mail()))
        assert len(times) == 50
        session.close()


# What it writes

RAW = st.binary(max_size=40) | st.sampled_from([
    b"", b"X-A", b"Bcc", b"x\r\nX-Evil: 1", b"a\nb\rc", b"\r\n\r\nbody", b" ", b"\t", b"\n", b"a:b", b"\xff\xfe", b"y" * 1200,
    b"z " * 900,
])  # fmt: skip
FRAMES = st.lists(
    st.builds(lambda letter, texts: change(letter, *texts), st.sampled_from("h+-e2q"), st.lists(RAW, min_size=1, max_size=3))
    | st.builds(lambda letter, at, texts: change(letter, *texts, at=at), st.sampled_from("im"), st.integers(0, 0xFFFFFFFF),
                st.lists(RAW, min_size=1, max_size=3))
    | st.builds(lambda data: frame("b", data), RAW),
    max_size=8,
)  # fmt: skip
SMTP = re.compile(
    rb"(?:([245])[0-5][0-9]-[245]\.\d{1,3}\.\d{1,3} [ -~]+\r\n)*([245])[0-5][0-9] [245]\.\d{1,3}\.\d{1,3} [ -~]+\r\n"
)


def at_the_end(steps: int = 0) -> Conversation:
    """One in which only the end of a message is due."""
    talk = Conversation()
    talk.negotiate()
    talk.feed(agreed(steps=steps | EVERY_NR))
    for one in (
        talk.connect("h", "192.0.2.1", 0, {}),
        talk.helo("h", {}),
        talk.mail("", (), {}),
        talk.rcpt("a@b.example", (), {}),
    ):
        assert one
    talk.end({})
    assert talk.terms is not None and list(talk.due) == ["E"]
    return talk


@given(FRAMES, st.booleans(), st.lists(st.integers(0, 400), max_size=3))
def test_what_it_writes_is_a_field_an_address_or_nothing(frames, spaces, cuts):
    """And in whatever parts it comes."""
    octets = b"".join(frames) + frame("c")
    whole, parts = at_the_end(LEADSPC * spaces), at_the_end(LEADSPC * spaces)
    events = whole.feed(octets)
    bounds = [0, *sorted(min(one, len(octets)) for one in cuts), len(octets)]
    in_parts = [one for a, b in pairwise(bounds) for one in parts.feed(octets[a:b])]
    assert (events, whole.changes, str(whole.error)) == (in_parts, parts.changes, str(parts.error))
    changes = whole.changes
    above, header, _ = edited(HEAD, changes.edits)
    made = above + header
    assert (header_end(made) == len(made) and made.endswith(b"\r\n\r\n")) or made in (b"\r\n", b"")
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\0", made) and not re.search(rb"\r\n[ \t]*\r\n.", made, re.S)
    assert len(shown(made)) == len(re.findall(rb"(?m)^(?![ \t\r])", made)) - (made[-1:] == b"\n")
    assert {name.lower() for name, _ in shown(made)} <= {b"from", b"subject", *(one.name.lower() for one in changes.edits)}
    addresses = [*(one for one, _ in changes.added), *changes.removed, *([changes.sender[0]] if changes.sender else [])]
    for one in addresses:
        assert "@" in one or one.lower() in ("", "postmaster"), one
        assert not re.search(r"[\x00-\x1f\x7f]", one)
    assert changes.quarantine is None or changes.quarantine.isprintable()
    assert all(isinstance(one, Said | Piece) for one in events)


LINES = st.lists(
    st.builds(
        lambda *parts: b"".join(parts), st.sampled_from([b"550", b"451", b"554", b"250", b"421", b"599", b"55", b""]),
        st.sampled_from([b" ", b"-", b""]), st.sampled_from([b"5.7.1 ", b"4.7.1 ", b"2.0.0 ", b"5.7.1", b""]),
        st.binary(max_size=60) | st.sampled_from([b"%%", b"100%", b"x" * 2000, b"\r\n250 ok", b"\r221 x", b"\n"]),
    ),
    max_size=30,
)  # fmt: skip


@given(LINES, st.sampled_from([b"\r\n", b"\n"]))
def test_whatever_it_wants_to_be_said_is_a_reply(lines, end):
    text = end.join(lines).replace(b"\0", b"")
    for word, answer in (smtp_reply(text), _of_a_y(text)):
        match = SMTP.fullmatch(answer)
        assert match is not None and all(len(line) <= 510 for line in answer.split(b"\r\n"))
        codes = {line[:3] for line in answer.split(b"\r\n") if line}
        assert len(codes) == 1 and codes.pop()[:1] == (b"5" if word == "reject" else b"4")
        assert {line[4:5] for line in answer.split(b"\r\n") if line} == {answer[:1]}


def _of_a_y(text: bytes) -> tuple[str, bytes]:
    talk = at_the_end()
    (said,) = talk.feed(change("y", text))
    assert isinstance(said, Said) and talk.last is said
    return said.word, said.reply


# Dialogues


class Dice:
    """Dialogues by chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def offer(self) -> tuple[tuple[object, ...], int, int]:
        """What is done about the offer, and the actions and steps that are meant."""
        one = self._random
        if one.random() < 0.04:
            return one.choice([offer for offer, word in OFFERS.values() if word != "!timeout"]), 0x1FF, 0
        actions = one.choice([0x1FF, 0x1FF, 0x1, 0, one.randrange(0x200)])
        steps = one.choice([0, EVERY_NR, one.choice([*REAL.values()]), one.choice([*REAL.values()])])
        if one.random() < 0.3:
            steps = sum(bit for bit in (*NO.values(), *NR.values(), SKIP, LEADSPC, RCPT_REJ) if one.random() < 0.3)
        more = lists(M=one.choice(["i", "", "{auth_type} i"])) if one.random() < 0.3 else b""
        version = one.choice([6, 6, 2, 3, 4, 5])
        return (agreed(version, actions, steps, more),), actions, steps | (NO["T"] if version < 4 else 0)

    def act(self, event: str) -> tuple[object, ...]:
        one = self._random
        kind = one.random()
        if event == "E" and kind < 0.4:
            wanted = [one.choice([*CHANGES.values()]) for _ in range(one.randrange(4))]
            return (*wanted, frame(one.choice("cccartd")))
        if kind < 0.5:
            return (one.choice(LETTERS),)
        if kind < 0.9:
            return one.choice([act for act in MESS.values() if SILENT not in act])
        if kind < 0.93:
            return one.choice([*MESS.values()])
        return (frame("p"), frame("c"))

    def script(self, offer: tuple[object, ...], steps: int, first: "Script | None") -> Script:
        one = self._random
        made = Script(offer=offer, steps=steps, ignores=one.random() < 0.6, says=lambda ident: b"")
        if first is not None:
            made.acts = {event: acts for event, acts in first.acts.items() if event in "CH"}
        for event in ORDER if first is None else ORDER[2:]:
            for _ in range(one.choice([1, 1, 2])):
                if one.random() < (0.3 if event == "E" else 0.08):
                    made.at(event, *self.act(event))
        return made

    def number(self, most: int) -> int:
        return 1 + self._random.randrange(most)


def _may(script: Script, recipients: int, actions: int, alone: bool) -> set[str]:
    """As `allowed`: of a message that is `alone`, or one that may be told over a connection that is there already."""
    offered = next((word for offer, word in OFFERS.values() if offer == script.offer), None)
    events = "M" + "R" * recipients + "TLLNBE"
    found = {offered} if offered else allowed(script, "CH" + events, actions)
    if not alone:
        found = found | allowed(script, events, actions)
    return found


def _lies(script: Script) -> bool:
    """Whether it answers more than it has said that it would: what of that comes before the next message, nobody can know."""
    for event, acts in script.acts.items():
        if script.steps & NR.get(event, 0):
            return True
        answers = [sum(isinstance(one, bytes) and one[4:5] not in b"phimbe+2-q" for one in act) for act in acts]
        if any(count > 1 for count in answers) or frame("c") * 3 in [one for act in acts for one in act]:
            return True
    return False


async def _dialogue(server: Scripted, ours: Milter, dice: Dice) -> list[str]:
    """One; what has come of its messages."""
    offer, actions, steps = dice.offer()
    session, first, over, words = ours.session(), None, set[str](), []
    lies = False
    for n in range(dice.number(3)):
        server.script = script = dice.script(offer, steps, first)
        first = first or script
        one = mail(n, dice.number(3))
        may = _may(script, len(one.recipients), actions, n == 0) | over
        word, answer = await outcome(session, one, SOON if lies or "!timeout" in may else PATIENCE)
        assert lies or word in may, (script, word, may)
        words.append(word)
        lies = lies or _lies(script)
        if session._over is not None:
            over = {session._over[1].word}
        if answer is not None and answer.body is not None:
            assert answer.body.written.startswith(b"new\r\n")  # type: ignore[attr-defined]
        session.reset()
    server.script = Script(says=lambda ident: b"")
    word, answer = await outcome(session, mail(8), SOON if lies else PATIENCE)
    assert lies or (word in (over or {"accept"}) and (over or answer is None or not answer.edits)), (script, word)
    session.close()
    server.script = Script()
    seen(one := mail(9), await ours.judge(one))
    return words


def resident() -> int:
    """Octets of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("seed", [0, 1, *in_prove(2, 3)])
async def test_two_thousand_dialogues(seed):
    dice, counts = Dice(seed), dict[str, int]()
    async with asking() as (server, ours):
        before = 0
        for n in range(500):
            if n == 100:
                gc.collect()
                before = resident()
            for word in await _dialogue(server, ours, dice):
                counts[word] = counts.get(word, 0) + 1
            server.told.clear()
        gc.collect()
        assert resident() - before <= 10_000_000
    assert {"accept", "reject", "tempfail", "discard", "!protocol", "!connect", "!timeout"} <= set(counts), counts


async def test_no_memory_for_a_frame_that_is_announced():
    talk = at_the_end()
    tracemalloc.start()
    talk.feed(OVERSIZED[:4])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert talk.error is not None and "UNKN" in str(talk.error) and most < 100_000


LONG = {
    "a reply of lines": change("y", b"aa\n" * 300_000), "a reply of one": change("y", b"550 " + b"%" * 1_000_000),
    "a reason": change("q", b"\xff" * 250_000), "an address": change("+", b"a." * 125_000),
    "a sender": change("e", b"a." * 125_000),
    "parameters": change("e", b"<a@b.example>", b"\xff" * 250_000), "a value": change("h", b"X-A", b"x" * 250_000),
    "a name": change("h", b"x" * 250_000, b"1"),
}  # fmt: skip


@pytest.mark.parametrize("octets", LONG.values(), ids=LONG)
def test_a_long_text_takes_a_few_times_its_own_length(octets):
    talk = at_the_end()
    tracemalloc.start()
    talk.feed(octets)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert talk.error is None and most < 5 * len(octets)
    assert (talk.changes.added, talk.changes.sender and talk.changes.sender[0]) in (([], None), ([], "a@b.example"))


@pytest.mark.parametrize("octets", [change("-", b""), change("+", b"a@b.example"), change("h", b"A", b"")])
def test_changes_without_number_are_soon_not_read_any_more(octets, monkeypatch):
    talk, read = at_the_end(), 0
    needed, change = module._CHANGES[letter := chr(octets[4])]

    def counted(talk: Conversation, data: bytes) -> bool:
        nonlocal read
        read += 1
        return change(talk, data)

    monkeypatch.setitem(module._CHANGES, letter, (needed, counted))
    talk.feed(octets * 50_000 + frame("c"))
    assert talk.last is not None and 1000 < read < 10_000 and talk.changes.dropped >= 40_000


# In the chain


@contextlib.asynccontextmanager
async def chained(**settings: Any) -> AsyncIterator[tuple[Scripted, Bench]]:
    async with quiet(), scripted() as (server, address), bench_of(Shared.create()) as bench:
        bench.configure({"name": "m", "type": "milter", "address": [address], "stage": "message"} | settings)
        yield server, bench


@pytest.mark.parametrize("on_failure", ["accept", "tempfail", "hold", "disconnect"])
async def test_what_an_insane_filter_costs(on_failure):
    """Each message what was configured, and the one behind it nothing."""
    expected = {"accept": b"", "hold": b"", "tempfail": b"451 4.7.1 ", "disconnect": b"421 4.7.1 "}[on_failure]
    async with chained(on_failure=on_failure, timeout=PATIENCE) as (server, bench):
        for n, act in enumerate(one for one in MESS.values() if SILENT not in one):
            for event in "CMTE":
                server.script = Script().at(event, *act)
                may = allowed(server.script, "CHMRTLNBE") | ({"!protocol"} if act[0] in (frame("c"), frame("c") * 3) else set())
                await bench.judge()
                (told,) = bench.of("filtered")
                word = f"!{told['reason'].partition(':')[0]}" if told["verdict"] == "failed" else told["verdict"]
                assert word in may, (n, event)
                bench.events.clear()
                server.script = Script().at("E", frame("y", b"550 5.7.1 own words\0"))
                assert (await bench.judge()).reply == b"550 5.7.1 own words\r\n"
                bench.events.clear()
        server.script = Script().at("E", OVERSIZED)
        outcome = await bench.judge()
        assert outcome.reply.startswith(expected) and bool(outcome.reply) == bool(expected)
        assert outcome.closes == (on_failure == "disconnect") and bool(outcome.held) == (on_failure == "hold")


@pytest.mark.parametrize("follows", [True, False], ids=["a client", "nobody"])
async def test_in_time_by_progress_and_not_beyond_the_budget(follows):
    async with chained(timeout=0.5) as (server, bench):
        pauses = [asyncio.Event() for _ in range(8)]
        script = Script().at("E", *[act for pause in pauses for act in (Hold(pause), frame("p"))], frame("c"))
        server.script = script
        chain = bench.chain()
        dialogue, revision = chain.dialogue("192.0.2.1") if follows else None, Revision(mail())
        task = asyncio.create_task(chain.judge(revision, dialogue))
        for pause in pauses:
            await asyncio.sleep(0.1)
            pause.set()
        assert (await task).verdict.word == "accept"
        if dialogue is not None:
            dialogue.end()
        await until(lambda: not server.open)


class Late:
    """A session that says that it is still at work when its time is up already."""

    decided = False

    async def judge(self, mail: Mail) -> Answer:
        try:
            await asyncio.Event().wait()
        finally:
            self.renew()  # type: ignore[attr-defined]
        raise AssertionError


async def test_progress_in_the_moment_in_which_time_is_up():
    """It is told on the loop, where no failure may come of it."""
    async with chained(timeout=0.01) as (_, bench):
        finding = await bench.chain().guards[0].ask(mail(), False, asyncio.get_running_loop().time() + PATIENCE, Late())
        assert finding.failure == "timeout"


async def test_changes_are_made_of_what_it_may():
    async with chained(may=["header"]) as (server, bench):
        act = b"".join(CHANGES[one] for one in "him+-eb") + change("h", b"Bad Name", b"x") + frame("a")
        server.script = Script().at("E", act)
        assert (await bench.judge()).verdict.word == "accept"
        head = bench.revision.mail.text.head
        assert head.startswith(b"X-I: 1\r\n") and b"X-A: 1\r\n" in head and b"Subject: y\r\n" in head and b"Bad" not in head
        assert (bench.revision.recipients, bench.revision.sender, bench.revision.body) == (None, None, None)


async def test_quarantine_holds_what_is_accepted_and_nothing_that_is_refused():
    """Case 9: a quarantine that was turned into an accept."""
    async with chained() as (server, bench):
        for words, held, reply in (
            ([b"one", b"two\r\n\x1b[m"], "filter m: two", b""), ([b"one"], "", b"554 5.7.1 no\r\n"),
        ):  # fmt: skip
            last = frame("y", b"554 5.7.1 no\0") if reply else frame("a")
            server.script = Script().at("E", *[change("q", one) for one in words], last)
            outcome = await bench.judge()
            assert outcome.held.startswith(held) and bool(outcome.held) == bool(held) and outcome.reply == reply
            assert outcome.held.isprintable()


async def test_the_descriptors_of_its_connections_are_counted():
    async with asking() as (_, ours):
        sessions = [ours.session("192.0.2.1") for _ in range(3)]
        for session in sessions:
            await session.mail(mail())
        assert ours.open == 3
        sessions[0].close()
        assert ours.open == 2
        for session in sessions[1:]:
            session.close()
        assert ours.open == 0
