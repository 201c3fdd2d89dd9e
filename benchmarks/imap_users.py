"""A part of benchmarks.imap_large: very many users."""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import lmdb
import uvloop

from benchmarks.backlog import anonymous
from benchmarks.imap_servers import Figures, Row, middle, of_ours, processes, said_by
from benchmarks.mailboxes import DOMAIN, ROUTE
from benchmarks.run import Relaymta, cpu_seconds
from relaymta.store.change import Change
from relaymta.store.directory import Directory, User
from relaymta.store.shard import Shard
from relaymta.store.writer import Target
from tests.support.daemon import free_port

__all__ = ["users"]

MESSAGES = 3  # of each user
BATCH = 1000  # users that are made together
FEW = 40  # users beside whom the many are measured
SWEPT_SECONDS = 12  # from the start, until upkeep has looked at all users (supervisor/upkeep.py)


def small_message(number: int) -> bytes:
    """A message of 1 kB of its own."""
    return b"From: Ann <ann@far.example>\r\nTo: somebody@local.example\r\nSubject: number %d\r\n\r\n%s\r\n" % (number, b"x" * 900)


async def _made(folder: Path, users: int) -> None:
    directory = Directory(folder / "directory", writable=True)
    shard = Shard(folder, 0)
    await shard.start()
    special = [(name, f"\\{name}") for name in ("Drafts", "Sent", "Junk", "Trash", "Archive")]
    serial = count()
    for first in range(0, users, BATCH):
        numbers = range(first, min(users, first + BATCH))
        idents = [directory.next_ident() for _ in numbers]
        for ident, number in zip(idents, numbers, strict=True):
            directory.add(User(ident, f"u{number}@{DOMAIN}", 0))

        def add(change: Change, idents: list[int] = idents) -> None:
            for ident in idents:
                change.add_user(ident, special, 1_700_000_000)

        await shard.task(add)
        for _ in range(MESSAGES):
            for results in await asyncio.gather(*(shard.file([small_message(next(serial))], [Target(one)]) for one in idents)):
                assert results[0].filed
    await shard.stop()
    directory.close()


def _make(folder: Path, users: int) -> None:
    lmdb.open = partial(lmdb.open, sync=False)  # type: ignore[assignment]
    os.fdatasync = lambda descriptor: None
    uvloop.run(_made(folder, users))


def make(folder: Path, users: int) -> None:
    """A spool in `folder` with so many users, made without syncs in a process of its own."""
    (folder / "spool/mail").mkdir(parents=True, mode=0o700)
    process = multiprocessing.get_context("spawn").Process(target=_make, args=(folder / "spool/mail", users))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("the users could not be made")


class WithUsers:
    """The relay with so many users, LMTP on `port`. `greeted`: seconds from its start to IMAP's greeting; `spent`: CPU seconds
    until it was ready."""

    def __init__(self, folder: Path, users: int, python: str) -> None:
        make(folder, users)
        self.users, self.folder, self.python = users, folder, python
        self.start()

    def start(self) -> None:
        self.port, imap = free_port(), free_port()
        listeners = (
            f'listener=[{{address="127.0.0.1:{self.port}",protocol="lmtp"}},'
            f'{{address="127.0.0.1:{imap}",protocol="imap",auth_in_clear=true}}]'
        )
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as other:
            greeting = other.submit(greeted, imap)
            self.relay = Relaymta(self.folder, 0, 1, (listeners, ROUTE), python=self.python)
            self.greeted, self.spent = greeting.result() - began, self.cpu()

    def cpu(self) -> float:
        return cpu_seconds(self.relay.root)

    def begun(self) -> Figures:
        """Of the start, and of the upkeep that follows it."""
        found = {"s": self.greeted, "cpu s": self.spent, "MB": self.memory()}
        time.sleep(SWEPT_SECONDS)
        return found | {"upkeep's cpu s": self.cpu() - self.spent, "MB after it": self.memory()}

    def memory(self) -> float:
        """Anonymous memory of all its processes, MB."""
        return sum(map(anonymous, processes(self.relay.root))) / 1024

    def delivery(self, users: int, messages: int, seed: int) -> Figures:
        """Deliveries to the first `users`, at random."""
        spent = self.cpu()
        command = [
            sys.executable, "-m", "benchmarks.lmtp_source", str(self.port), "--users", str(users), "--domain", DOMAIN,
            "--messages", str(messages), "--seed", str(seed),
        ]  # fmt: skip
        said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        assert said["recipients"] == messages, said
        time.sleep(0.3)  # for what is done behind the last reply
        return {"cpu us": (self.cpu() - spent) / messages * 1e6, "a second": messages / said["seconds"],
                "p50 ms": said["p50 ms"], "p99 ms": said["p99 ms"]}  # fmt: skip

    def listed(self) -> Figures:
        """`relaymta mailbox list --json`."""
        found = said_by(self.relay.spool, "mailbox", "list", "--json")
        assert found["lines"] == self.users, found
        return found

    def close(self) -> None:
        self.relay.close()


def greeted(port: int) -> float:
    """When (time.perf_counter) a server on a port says something."""
    until = time.perf_counter() + 60
    while time.perf_counter() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as sock:
                if sock.recv(100):
                    return time.perf_counter()
        except OSError:
            time.sleep(0.01)
    sys.exit("the relay has not greeted")


def used(relay: WithUsers, messages: int) -> dict[str, Figures]:
    """What is measured with so many users."""
    found = {"start": relay.begun(), "list": relay.listed()}
    trials: dict[int, list[Figures]] = {users: [] for users in (FEW, relay.users) if users <= relay.users}
    for trial in range(4):
        for users, those in trials.items():
            figures = relay.delivery(users, messages, trial)
            if trial:  # the first was for warmth
                those.append(figures)
    found |= {f"{users} users": middle(those) for users, those in trials.items()}
    return found | {"afterwards": {"MB": relay.memory()}}


async def users(options: argparse.Namespace) -> list[Row]:
    """Very many users beside few."""
    many, messages = int(100_000 * options.scale), max(400, int(8000 * options.scale))
    found: list[dict[str, Figures]] = []
    for number in (10, many):
        with tempfile.TemporaryDirectory() as folder:
            relay = WithUsers(Path(folder), number, options.python)
            try:
                found.append(used(relay, messages))
                relay.close()
                found[-1]["verify"] = said_by(relay.relay.spool, "mailbox", "verify")
                relay.start()  # again, on a shard that has been used
                found[-1]["start again"] = relay.begun()
            finally:
                relay.close()
    ten, all_ = found
    what, every, few = f"{many:,} users", all_[f"{many} users"], all_[f"{FEW} users"]
    start, listed = min((all_["start"], all_["start again"]), key=lambda figures: figures["s"]), all_["list"]

    def more(part: str, key: str) -> float:
        return all_[part][key] - ten[part][key]

    return [
        of_ours(f"{what}: from the start to a greeting, s", start, start["s"], 2),
        of_ours(f"{what}: CPU of the start, s more than with 10", all_["start again"], more("start again", "cpu s"), 0.2),
        of_ours(f"{what}: CPU of the upkeep behind it, s more", all_["start again"], more("start again", "upkeep's cpu s"), 2),
        of_ours(f"{what}: MB more than with 10, at the start", all_["start again"], more("start again", "MB after it"), 20),
        of_ours(f"{what}: MB more, after deliveries to all", all_["afterwards"], more("afterwards", "MB"), 20),
        of_ours(f"{what}: delivery to {FEW} of them", few),
        of_ours(f"{what}: delivery to all, of the CPU to {FEW}", every, every["cpu us"] / few["cpu us"], 1.25),
        of_ours("10 users: mailbox list --json", ten["list"]),
        of_ours(f"{what}: mailbox list --json, CPU ms more to a line", listed, more("list", "first line cpu ms"), 100),
        of_ours(f"{what}: mailbox verify, CPU us a user", all_["verify"], more("verify", "cpu s") / many * 1e6, 200),
        of_ours(f"{what}: mailbox verify, MB more", all_["verify"], more("verify", "MB"), 64),
        of_ours(f"{what}: mailbox list --json, MB more", listed, more("list", "MB"), 5),
    ]
