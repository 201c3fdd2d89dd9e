"""Large mailboxes, many users, much that is removed: `python -m benchmarks.imap_large [--only PART] [--scale X]`.

million  a mailbox of 1,000,000 messages: SELECT, FLAGS, memory of one session and of ten, delivery into it
users    100,000 users with 3 messages each: the start, memory, deliveries at random, `relaymta mailbox list`
reclaim  1,000,000 messages are delivered to some mailboxes, and expunged, while others' mail flows: disk, LMDB, CPU

The relay alone, with one worker. (100,000 messages in a mailbox, beside Dovecot: `benchmarks.imap --only large`.) CPU is that of
the whole tree of processes, and what is judged where the machine is not ours alone; times are upper bounds then. The mailbox of
1,000,000 is made of 1,000 messages of 4 kB by COPY; the users' are filled without the relay, and without syncs.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import count
from pathlib import Path

import lmdb
import uvloop

from benchmarks.backlog import anonymous
from benchmarks.dovecot import PASSWORD
from benchmarks.imap import table
from benchmarks.imap_client import Session, all_paced, at_once, delivered, delivering, logged_in
from benchmarks.imap_many import INTO_EMPTY, INTO_LARGE, LARGE, each, filled
from benchmarks.imap_servers import (
    OURS,
    Figures,
    Row,
    Server,
    fill,
    judged,
    measured,
    memory,
    message,
    processes,
    spread,
    started,
    user,
)
from benchmarks.mailboxes import DOMAIN, ROUTE
from benchmarks.run import Relaymta, cpu_seconds
from relaymta.disk.environment import Environment
from relaymta.store.change import Change
from relaymta.store.directory import Directory, User
from relaymta.store.rows import MailShard
from relaymta.store.shard import Shard
from relaymta.store.writer import Target

MESSAGES = 3  # of each of many users
BATCH = 1000  # users that are made together
FEW = 40  # users beside whom the many are measured
SOURCES = 16  # connections that deliver
KEPT = 2000  # messages in each of the mailboxes that others are removed from
BOXES = 8  # such mailboxes
TOGETHER = 500  # messages that one EXPUNGE removes
OTHERS = range(50, 54)  # users whose mail flows meanwhile
STEPS = 10  # of a run: figures are taken at the end of each


def one_of_ours(value: float | None, what: str, most: float, figures: Figures) -> Row:
    """A row about the relay alone."""
    return judged(what, {OURS: figures}, value, most)


# A mailbox of a million


async def copied(session: Session, messages: int) -> float:
    """Fill INBOX up by COPY of what is there; seconds."""
    began = time.perf_counter()
    there = min(1000, messages)
    await fill(session, b"INBOX", there)
    await session.command(b"SELECT INBOX")
    while there < messages:
        more = min(there, messages - there)
        await session.command(b"COPY 1:%d INBOX" % more)
        await session.command(b"NOOP")
        there += more
    return time.perf_counter() - began


async def views(server: Server, sessions: int) -> tuple[list[Session], float]:
    """So many sessions with the large mailbox; MB that they take."""
    made = [await logged_in(server.imap, user(LARGE), PASSWORD) for _ in range(sessions)]
    before = memory(server)
    for session in made:
        await session.command(b"SELECT INBOX")
    await asyncio.sleep(0.3)
    return made, (memory(server) - before) / 1024


async def million(options: argparse.Namespace) -> list[Row]:
    """A mailbox with very many messages."""
    messages = int(1_000_000 * options.scale)
    with started([OURS], options.python) as (server,):
        session = await logged_in(server.imap, user(LARGE), PASSWORD)
        spent, seconds = server.cpu(), await copied(session, messages)
        copying = {"seconds": seconds, "cpu us a message": (server.cpu() - spent) / messages * 1e6}
        session.close()
        await session.gone
        first, one = await views(server, 1)
        nine, more = await views(server, 9)
        for other in nine:
            other.close()
        (session,) = first
        exists = b"* %d EXISTS" % messages
        select = await measured(server, each(session, [b"SELECT INBOX"] * 20, lambda answer: exists in answer))
        session.close()
        await session.gone
        (cold,), _ = await views(server, 0), None
        times = []
        for _ in range(10):  # nobody else has it: nothing is shared
            alone = await logged_in(server.imap, user(LARGE), PASSWORD)
            times.append(await measured(server, each(alone, [b"SELECT INBOX"])))
            alone.close()
            await alone.gone
        cold = sorted(times, key=lambda figures: figures["p50 ms"])[len(times) // 2]
        session = await logged_in(server.imap, user(LARGE), PASSWORD)
        await session.command(b"SELECT INBOX")
        flags = await measured(server, each(session, [b"UID FETCH 1:* (FLAGS)"] * 3, lambda a: a.count(b" FETCH (") == messages))
        session.close()
        into = await filled(server, int(1000 * min(1.0, options.scale * 4)))
    what = f"{messages:,} messages"
    ratio = into[INTO_LARGE]["cpu us"] / into[INTO_EMPTY]["cpu us"]
    return [
        judged(f"{what}: made by COPY", {OURS: copying}, None, None),
        one_of_ours(cold["p50 ms"], f"{what}: SELECT, p50 ms", 100, cold),
        one_of_ours(cold["cpu us"] / 1000, f"{what}: SELECT, CPU ms", 100, cold),
        judged(f"{what}: SELECT, where another session has it", {OURS: select}, None, None),
        judged(f"{what}: UID FETCH 1:* (FLAGS)", {OURS: flags}, None, None),
        one_of_ours(one, f"{what}: one session, MB", 8, {"MB": one}),
        one_of_ours(more, f"{what}: nine sessions more, MB", 1, {"MB": more}),
        judged(f"{what}: {INTO_EMPTY}", {OURS: into[INTO_EMPTY]}, None, None),
        one_of_ours(ratio, f"{what}: {INTO_LARGE}, of the CPU into an empty one", 1.1, into[INTO_LARGE]),
    ]
