"""Large mailboxes, many users, much that is removed: `python -m benchmarks.imap_large [--only PART] [--scale X]`.

million  a mailbox of 1,000,000 messages: SELECT, FLAGS, memory of one session and of ten, delivery into it; verify, backup
bulk     one of 100,000: SORT, THREAD (CPU and memory), STORE and EXPUNGE of all, and others' deliveries meanwhile
users    100,000 users with 3 messages each: the start, memory, deliveries at random; mailbox list, verify (imap_users)
reclaim  1,000,000 messages are delivered to mailboxes, and expunged, while others' mail flows: disk, LMDB, CPU (imap_reclaim)

The relay alone, with one worker. (100,000 messages in a mailbox, beside Dovecot: `benchmarks.imap --only large`.) CPU is that of
the whole tree of processes, and what is judged where the machine is not ours alone; times are upper bounds then. The mailbox of
1,000,000 is made of 1,000 messages of 4 kB by COPY; the users' are filled without the relay, and without syncs.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvloop

from benchmarks.dovecot import PASSWORD
from benchmarks.imap import table
from benchmarks.imap_client import Session, all_paced, delivered, delivering, logged_in
from benchmarks.imap_many import INTO_EMPTY, INTO_LARGE, LARGE, each, filled
from benchmarks.imap_reclaim import reclaim
from benchmarks.imap_servers import (
    OURS,
    Figures,
    Ours,
    Row,
    Server,
    fill,
    measured,
    memory,
    message,
    middle,
    of_ours,
    peak,
    said_by,
    spread,
    started,
    user,
)
from benchmarks.imap_users import users

OTHERS = range(50, 62)  # users whose mail flows meanwhile
QUIET_SECONDS = 3.0  # in which others' deliveries are looked at before
FLAGS = b"UID FETCH 1:* (FLAGS)"


@contextmanager
def relay(python: str) -> Iterator[Ours]:
    """The relay alone."""
    with started([OURS], python) as (server,):
        assert isinstance(server, Ours)
        yield server


async def large(server: Server) -> Session:
    """A session of the user with the large mailbox."""
    return await logged_in(server.imap, user(LARGE), PASSWORD)


async def end(session: Session) -> None:
    session.close()
    await session.gone


# A mailbox of a million


async def copied(server: Server, messages: int) -> Figures:
    """Fill the large mailbox up by COPY of what is there."""
    spent, began = server.cpu(), time.perf_counter()
    session, there = await large(server), min(1000, messages)
    await fill(session, b"INBOX", there)
    await session.command(b"SELECT INBOX")
    while there < messages:
        more = min(there, messages - there)
        await session.command(b"COPY 1:%d INBOX" % more)
        await session.command(b"NOOP")
        there += more
    await end(session)
    return {"seconds": time.perf_counter() - began, "cpu us a message": (server.cpu() - spent) / messages * 1e6}


async def views(server: Server, sessions: int) -> tuple[list[Session], float]:
    """So many sessions with the large mailbox; MB that they take."""
    made = [await large(server) for _ in range(sessions)]
    before = memory(server)
    for session in made:
        await session.command(b"SELECT INBOX")
    await asyncio.sleep(0.3)
    return made, (memory(server) - before) / 1024


async def alone(server: Server) -> Figures:
    """SELECT by a session while nobody else has the mailbox, so that nothing of it is in memory."""
    times = []
    for _ in range(10):
        session = await large(server)
        times.append(await measured(server, each(session, [b"SELECT INBOX"])))
        await end(session)
    return middle(times) | {"p50 ms": sorted(one["p50 ms"] for one in times)[len(times) // 2]}


async def million(options: argparse.Namespace) -> list[Row]:
    """A mailbox with very many messages."""
    messages = int(1_000_000 * options.scale)
    what, exists = f"{messages:,} messages", b"* %d EXISTS" % messages
    with relay(options.python) as server:
        copying = await copied(server, messages)
        server.restart()
        await end(await large(server))  # what is allocated once
        (session,), one = await views(server, 1)
        more, nine = await views(server, 9)
        shared = await measured(server, each(session, [b"SELECT INBOX"] * 20, lambda answer: exists in answer))
        for other in (session, *more):
            await end(other)
        select = await alone(server)
        session = await large(server)
        await session.command(b"SELECT INBOX")
        flags, fetching = await peak(
            server, measured(server, each(session, [FLAGS] * 3, lambda answer: answer.count(b" FETCH (") == messages))
        )
        await end(session)
        verify = said_by(server.relay.spool, "mailbox", "verify")
        with tempfile.TemporaryDirectory(dir=server.relay.spool.parent) as folder:
            backup = said_by(server.relay.spool, "mailbox", "backup", str(Path(folder) / "new"))
        into = await filled(server, max(100, int(2000 * min(1.0, options.scale * 4))))
    ratio = into[INTO_LARGE]["cpu us"] / into[INTO_EMPTY]["cpu us"]
    return [
        of_ours(f"{what}: made by COPY", copying),
        of_ours(f"{what}: SELECT, p50 ms", select, select["p50 ms"], 100),
        of_ours(f"{what}: SELECT, CPU ms", select, select["cpu us"] / 1000, 100),
        of_ours(f"{what}: SELECT, where another session has it", shared),
        of_ours(f"{what}: UID FETCH 1:* (FLAGS)", flags),
        of_ours(f"{what}: UID FETCH 1:* (FLAGS), MB more meanwhile", {"MB": fetching}, fetching, 64),
        of_ours(f"{what}: one session, MB", {"MB": one}, one, 8),
        of_ours(f"{what}: nine sessions more, MB", {"MB": nine}, nine, 1),
        of_ours(f"{what}: {INTO_EMPTY}", into[INTO_EMPTY]),
        of_ours(f"{what}: {INTO_LARGE}, of the CPU into an empty one", into[INTO_LARGE], ratio, 1.1),
        of_ours(f"{what}: mailbox verify, MB", verify, verify["MB"], 128),
        of_ours(f"{what}: mailbox backup, MB", backup, backup["MB"], 64),
    ]


# Commands about all of 100,000

ORDERS = {
    "SORT (SUBJECT)": b"UID SORT (SUBJECT) UTF-8 ALL",
    "SORT (FROM REVERSE DATE)": b"UID SORT (FROM REVERSE DATE) UTF-8 ALL",
    "THREAD ORDEREDSUBJECT": b"UID THREAD ORDEREDSUBJECT UTF-8 ALL",
    "THREAD REFERENCES": b"UID THREAD REFERENCES UTF-8 ALL",
}


async def ordered(server: Ours, messages: int) -> list[Row]:
    """SORT and THREAD, each in a memory of its own."""
    rows = []
    for name, command in ORDERS.items():
        server.restart()
        session = await large(server)
        await session.command(b"SELECT INBOX")
        figures, more = await peak(server, measured(server, each(session, [command] * 2, lambda answer: len(answer) > messages)))
        octets = more * (1 << 20) / messages
        found = {"cpu us a message": figures["cpu us"] / messages, "octets a message": octets, "p50 ms": figures["p50 ms"]}
        rows.append(of_ours(f"{messages:,} messages: {name}, octets a message", found, octets, 350))
        await end(session)
    return rows


async def beside(sources: list[Callable[[], Awaitable[object]]], work: Awaitable[object]) -> Figures:
    """Others' deliveries, 10 a second for each, while some work is done."""
    doing = asyncio.ensure_future(work)
    times = await all_paced(sources, 10, doing.done)
    await doing
    return spread(times)


async def bulk(options: argparse.Namespace) -> list[Row]:
    """Commands that concern very many messages."""
    messages = int(100_000 * options.scale)
    half, name = messages // 2, f"{messages:,} messages"
    with relay(options.python) as server:
        session = await large(server)
        await fill(session, b"INBOX", messages)
        await end(session)
        rows = await ordered(server, messages)
        session = await large(server)
        await session.command(b"SELECT INBOX")
        sources = [partial(delivered, await delivering(server.lmtp), user(number), message(number)) for number in OTHERS]
        quiet = await beside(sources, asyncio.sleep(QUIET_SECONDS))
        store = await measured(server, each(session, [b"UID STORE 1:* +FLAGS.SILENT ($x)", b"UID STORE 1:* -FLAGS.SILENT ($x)"]))
        marks = [rb"UID STORE 1:* +FLAGS.SILENT (\Deleted)", rb"UID STORE 1:* -FLAGS.SILENT (\Deleted)"]
        storing = await beside(sources, each(session, [*marks, *marks, marks[0]]))
        first, *rest = b"UID EXPUNGE 1:%d" % half, b"EXPUNGE"
        expunge = await measured(server, each(session, [first], lambda answer: answer.count(b" EXPUNGE") == half))
        expunging = await beside(sources, each(session, rest))
    each_us = {"store": store["cpu us"] / messages, "expunge": expunge["cpu us"] / half}
    return [
        *rows,
        of_ours(f"{name}: others' deliveries before", quiet),
        of_ours(f"{name}: UID STORE 1:*, CPU us a message", store, each_us["store"], 1),
        of_ours(f"{name}: others' deliveries during UID STORE 1:*, p99 ms", storing, storing["p99 ms"], quiet["p99 ms"] + 50),
        of_ours(f"{name}: EXPUNGE of half of them, CPU us a message", expunge, each_us["expunge"], 40),
        of_ours(f"{name}: others' deliveries during EXPUNGE, p99 ms", expunging, expunging["p99 ms"], quiet["p99 ms"] + 50),
    ]


PARTS: dict[str, Callable[[argparse.Namespace], Coroutine[None, None, list[Row]]]] = {
    "million": million, "bulk": bulk, "users": users, "reclaim": reclaim,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the numbers of messages and users")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of another build of the relay")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))  # and the relay with it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = {name: uvloop.run(part(options)) for name, part in PARTS.items() if options.only in (None, name)}
    print(table([row for rows in found.values() for row in rows]), file=sys.stderr)
    print(json.dumps({"cores": os.cpu_count(), "scale": options.scale, **found}, indent=1))


if __name__ == "__main__":
    main()
