"""Parts of benchmarks.imap: many messages in a mailbox, many sessions in IDLE."""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import cycle, takewhile
from typing import NamedTuple

from benchmarks.dovecot import PASSWORD
from benchmarks.imap_client import Refused, Session, all_paced, at_once, delivered, delivering, logged_in, paced
from benchmarks.imap_servers import (
    OURS,
    TWO,
    Figures,
    Row,
    Server,
    beside,
    fill,
    holders,
    judged,
    measured,
    memory,
    message,
    middle,
    spread,
    started,
    user,
)

__all__ = ["idle", "large"]

LARGE, EMPTY = 0, 99  # users whose INBOX is large, and empty
TEXTS = 64  # the messages are of so many
VARIANT = 4  # one of them, without MIME, which is searched for
FETCHED = 1000  # messages of one FETCH
ITEMS = b"(FLAGS INTERNALDATE RFC822.SIZE ENVELOPE BODYSTRUCTURE)"
STORES = b"UID STORE 1:* +FLAGS.SILENT ($x)", b"UID STORE 1:* -FLAGS.SILENT ($x)"
SELECT, STORE, BODY, TEXT = "SELECT", "UID STORE 1:* +FLAGS.SILENT", "UID SEARCH BODY", "UID SEARCH TEXT"
DELIVERIES, VIEWS = f"others' deliveries during {STORE}", "ten sessions on it, all together"
INTO_LARGE, INTO_EMPTY = "delivery into it", "delivery into an empty one"
SECONDS = 5.0  # in which others' commands are looked at


class Step(NamedTuple):
    """Commands to the large mailbox. `right`: whether an answer is; `share`: of Dovecot's CPU, at most."""

    name: str
    commands: list[bytes]
    right: Callable[[bytes], bool]
    share: float


def phrases() -> tuple[bytes, bytes]:
    """The subject of the messages of VARIANT, and words of a line of theirs."""
    header, body = message(VARIANT).split(b"\r\n\r\n", 1)
    subject = re.search(rb"Subject: (.*)\r\n", header)
    assert subject
    return subject[1], b" ".join(body.split(b"\r\n")[5].split()[1:6])


def steps(messages: int) -> list[Step]:
    """In this order: what comes first is first."""
    subject, words = phrases()
    found = sum(number % TEXTS == VARIANT for number in range(messages))
    firsts = range(1, min(messages, 10 * FETCHED), FETCHED)
    fetch = [b"FETCH %d:%d %s" % (first, min(messages, first + FETCHED - 1), ITEMS) for first in firsts]
    by_subject = b'UID SEARCH SUBJECT "%s"' % subject

    def fetched(answer: bytes) -> bool:
        return answer.count(b"BODYSTRUCTURE (") in {FETCHED, messages % FETCHED}

    def searched(answer: bytes) -> bool:
        numbers = re.search(rb"^\* SEARCH ([0-9 ]+)\r$", answer, re.MULTILINE)  # "* OK Searched 20%" may come before
        return numbers is not None and len(numbers[1].split()) == found

    return [
        Step(SELECT, [b"SELECT INBOX"] * 50, lambda answer: b"* %d EXISTS" % messages in answer, 1.0),
        Step("UID FETCH 1:* (FLAGS)", [b"UID FETCH 1:* (FLAGS)"] * 10, lambda a: a.count(b" FETCH (") == messages, 1 / 5),
        Step("FETCH of 1,000 x ENVELOPE, BODYSTRUCTURE ..., first", fetch, fetched, 1 / 5),
        Step("FETCH of 1,000 x ENVELOPE, BODYSTRUCTURE ..., again", fetch, fetched, 2 / 3),
        Step("UID SEARCH SUBJECT, first", [by_subject], searched, 1 / 8),
        Step("UID SEARCH SUBJECT, again", [by_subject] * 3, searched, 2 / 3),
        Step(BODY, [b'UID SEARCH BODY "%s"' % words] * 2, searched, 1 / 6),
        Step(TEXT, [b'UID SEARCH TEXT "%s"' % words] * 2, searched, 1 / 6),
        Step(STORE, [*STORES, *STORES], lambda answer: True, 2.0),
    ]


async def each(session: Session, commands: Iterable[bytes], right: Callable[[bytes], bool] = bool) -> list[float]:
    """Some commands, one behind the other: the seconds of each."""
    times = []
    for command in commands:
        began = time.perf_counter()
        answer = await session.command(command)
        times.append(time.perf_counter() - began)
        if not right(answer):
            raise Refused(f"{command!r}: {len(answer)} octets: {answer[:200]!r} ... {answer[-200:]!r}")
    return times


async def meanwhile(session: Session, commands: Iterable[bytes], works: Iterable[Callable[[], Awaitable[object]]]) -> Figures:
    """How long others' `works` take, each done 50 times a second, while the session gives commands for SECONDS."""
    until = time.perf_counter() + SECONDS
    load = asyncio.ensure_future(each(session, takewhile(lambda _: time.perf_counter() < until, cycle(commands))))
    times = await all_paced(works, 50, load.done)
    return {"commands": len(await load), **spread(times)}


async def others(server: Server, session: Session, messages: int) -> dict[str, Figures]:
    """What others see while the session with the large mailbox searches, or sets flags."""
    readers = [await logged_in(server.imap, user(number), PASSWORD) for number in range(1, 5)]
    for reader in readers:
        await fill(reader, b"INBOX", 5)
        await reader.command(b"SELECT INBOX")
    reading = [partial(reader.command, b"UID FETCH 1:5 (FLAGS)") for reader in readers]
    sources = [await delivering(server.lmtp) for _ in range(2)]
    filing = [partial(delivered, source, user(5 + number), message(number)) for number, source in enumerate(sources)]
    searches = {step.name: step.commands for step in steps(messages) if step.name in (BODY, TEXT)}
    found = {
        f"others' commands during {name}": await meanwhile(session, commands, reading) for name, commands in searches.items()
    }
    found |= {DELIVERIES: await meanwhile(session, STORES, filing)}
    for client in (*readers, *sources):
        client.close()
    return found


async def viewed(server: Server) -> Figures:
    """Memory of ten sessions with the large mailbox, together; nobody has opened it before."""
    sessions = [await logged_in(server.imap, user(LARGE), PASSWORD) for _ in range(10)]
    before = memory(server)
    for session in sessions:
        await session.command(b"SELECT INBOX")
    found = {"MB": (memory(server) - before) / 1024}
    for session in sessions:
        session.close()
    return found


async def filled(server: Server, count: int) -> dict[str, Figures]:
    """Delivery into the large mailbox, and into one that was empty, in turn."""
    sources = [await delivering(server.lmtp) for _ in range(8)]

    async def deliver(to: str, number: int) -> None:
        await delivered(sources[number], to, message(number))

    trials: dict[str, list[Figures]] = {INTO_LARGE: [], INTO_EMPTY: []}
    for trial in range(4):
        for name, to in ((INTO_LARGE, user(LARGE)), (INTO_EMPTY, user(EMPTY))):
            figures = await measured(server, at_once(8, count, partial(deliver, to)))
            if trial:  # the first was for warmth
                trials[name].append(figures)
    for source in sources:
        source.close()
    return {name: middle(found) for name, found in trials.items()}


async def in_large(server: Server, options: argparse.Namespace) -> dict[str, Figures]:
    """All that is measured with a large mailbox on one server."""
    messages = options.messages
    session = await logged_in(server.imap, user(LARGE), PASSWORD)
    await fill(session, b"INBOX", messages)
    session.close()
    found = {VIEWS: await viewed(server)}
    session = await logged_in(server.imap, user(LARGE), PASSWORD)
    await each(session, [b"SELECT INBOX"] * 2)
    for step in steps(messages):
        found[step.name] = await measured(server, each(session, step.commands, step.right))
        print(server.name, step.name, json.dumps(found[step.name]), file=sys.stderr, flush=True)
    found |= await others(server, session, messages)
    session.close()
    return found | await filled(server, int(1000 * options.scale))


async def large(options: argparse.Namespace) -> list[Row]:
    """A mailbox with many messages."""
    with started(options.servers, options.python) as servers:
        every = {server.name: await in_large(server, options) for server in servers}

    def of(what: str) -> dict[str, Figures]:
        return {name: found[what] for name, found in every.items()}

    def ours(what: str, key: str) -> float | None:
        return every[OURS][what][key] if OURS in every else None

    stores = of(STORE)
    rows = [judged("SELECT, p50 ms", of(SELECT), ours(SELECT, "p50 ms"), 10)]
    rows += [beside(step.name, of(step.name), step.share) for step in steps(options.messages) if step.name not in (SELECT, STORE)]
    beside_mdbox = stores[OURS]["cpu us"] / stores["mdbox"]["cpu us"] if {OURS, "mdbox"} <= set(stores) else None
    rows.append(judged(f"{STORE}, of mdbox's CPU", stores, beside_mdbox, 2))
    for name, most in ((BODY, 20), (TEXT, 20)):
        what = f"others' commands during {name}"
        rows.append(judged(f"{what}, p99 ms", of(what), ours(what, "p99 ms"), most))
    rows.append(judged(f"{DELIVERIES}, p99 ms", of(DELIVERIES), ours(DELIVERIES, "p99 ms"), 50))
    rows.append(judged(f"{VIEWS}, MB", of(VIEWS), ours(VIEWS, "MB"), 8))
    into, empty = ours(INTO_LARGE, "cpu us"), ours(INTO_EMPTY, "cpu us")
    rows += [judged(INTO_EMPTY, of(INTO_EMPTY), None, None)]
    return [*rows, judged(f"{INTO_LARGE}, of the CPU into an empty one", of(INTO_LARGE), into and empty and into / empty, 1.1)]


async def held(server: Server, count: int, secure: bool) -> Figures:
    """Memory of so many sessions in IDLE, each."""

    async def one(number: int) -> Session:
        port, trust = (server.imaps, server.trust) if secure else (server.imap, None)
        session = await logged_in(port, user(number), PASSWORD, trust)
        await session.command(b"SELECT INBOX")
        await session.idle(lambda number: None)
        return session

    first = await one(0)  # what is allocated once
    first.close()
    await asyncio.sleep(1)
    before, sessions = memory(server), []
    for start in range(0, count, 50):
        sessions += await asyncio.gather(*map(one, range(start, min(count, start + 50))))
    await asyncio.sleep(1)
    each = (memory(server) - before) / count
    for session in sessions:
        session.close()
        await session.gone
    return {"sessions": count, "kB each": each}


class Ear:
    """A session in IDLE that notes when it is told how many messages there are: `heard`, (time.perf_counter, messages)."""

    def __init__(self, session: Session, messages: int) -> None:
        self.session, self.messages = session, messages  # at the start
        self.heard: list[tuple[float, int]] = []

    @classmethod
    async def of(cls, server: Server, number: int) -> "Ear":
        session = await logged_in(server.imap, user(number), PASSWORD)
        answer = await session.command(b"SELECT INBOX")
        exists = re.search(rb"\* ([0-9]+) EXISTS", answer)
        assert exists
        ear = cls(session, int(exists[1]))
        await session.idle(lambda messages: ear.heard.append((time.perf_counter(), messages)))
        return ear

    def when(self, more: int) -> float | None:
        """When it was first told of so many messages more than at the start; None when it was not."""
        at = bisect_left(self.heard, self.messages + more, key=lambda pair: pair[1])
        return self.heard[at][0] if at < len(self.heard) else None


async def until_heard(ears: list[Ear], more: int, seconds: float) -> None:
    """Wait until all have been told of so many messages more than at the start, not longer than `seconds`."""
    until = time.perf_counter() + seconds
    while any(ear.when(more) is None for ear in ears) and time.perf_counter() < until:
        await asyncio.sleep(0.005)


async def told(server: Server, deliveries: int) -> Figures:
    """From the end of a message's data to EXISTS, in sessions of another process than the one that the message came to: one
    delivery at a time, to one of 8 users with 4 sessions each."""
    ears = [[await Ear.of(server, number) for _ in range(4)] for number in range(8)]
    sources = [await delivering(server.lmtp) for _ in range(4)]
    where, chance, times, filed = holders(server), random.Random(1), [], [0] * 8
    for number in range(deliveries):
        to, source = chance.randrange(8), chance.choice(sources)
        filed[to] += 1
        sent_at = await delivered(source, user(to), message(number))
        await until_heard(ears[to], filed[to], 10)
        for ear in ears[to]:
            if where[ear.session.port] != where[source.port]:
                times.append((ear.when(filed[to]) or sent_at + 10) - sent_at)
    for session in (*sources, *(ear.session for some in ears for ear in some)):
        session.close()
    return {"told": len(times), **spread(times)}


async def crowd(server: Server, seconds: float) -> Figures:
    """100 sessions on one mailbox, 100 deliveries a second into it: which have not heard of all, and when each heard of each."""
    ears = [await Ear.of(server, 8) for _ in range(100)]
    source, count = await delivering(server.lmtp), int(100 * seconds)
    sent_at: list[float] = []

    async def deliver() -> None:
        sent_at.append(await delivered(source, user(8), message(len(sent_at))))

    found = await measured(server, paced(deliver, 100, lambda: len(sent_at) >= count))
    await until_heard(ears, count, 10)
    heard = [(ear.when(number + 1), at) for ear in ears for number, at in enumerate(sent_at)]
    for session in (source, *(ear.session for ear in ears)):
        session.close()
    return {
        "deliveries": count, "deliveries a second": found["a second"], "cpu us a delivery": found["cpu us"],
        "sessions that have not heard of all": sum(ear.when(count) is None for ear in ears),
        **spread([when - at for when, at in heard if when is not None]),
    }  # fmt: skip


async def idle(options: argparse.Namespace) -> list[Row]:
    """Sessions in IDLE: memory, with one worker; how soon, and whether, they hear of deliveries, with two."""
    rows = []
    for secure, most in ((False, 200), (True, 50)):  # Dovecot has processes for so many
        count = options.sessions // 10 if secure else options.sessions
        with started(options.servers, options.python) as servers:  # new ones: no memory of sessions that have ended
            found = {one.name: await held(one, count if one.name == OURS else min(count, most), secure) for one in servers}
        each = found[OURS]["kB each"] if OURS in found else None
        rows.append(judged(f"IDLE{' over TLS' if secure else ''}: kB a session", found, each, None if secure else 24))
    with started([TWO if name == OURS else name for name in options.servers], options.python) as servers:
        found = {one.name: await told(one, int((400 if one.name == TWO else 40) * options.scale) + 8) for one in servers}
        for key, most in (("p50 ms", 10), ("p99 ms", 50)):
            rows.append(judged(f"from a delivery to EXISTS, {key}", found, found[TWO][key] if TWO in found else None, most))
        found = {one.name: await crowd(one, max(1, 5 * options.scale)) for one in servers}
        deaf = found[TWO]["sessions that have not heard of all"] if TWO in found else None
        rows.append(judged("100 deliveries a second, of 100 sessions: not told of all", found, deaf, 0))
    return rows
