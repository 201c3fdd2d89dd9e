"""A worker process, without its supervisor."""

import asyncio
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from relaymta.accept.tickets import OCTETS
from relaymta.config import Config
from relaymta.node import keep_secret
from relaymta.shm import Shared
from relaymta.worker import Worker


async def test_a_worker_that_cannot_listen_ends_in_order(tmp_path):
    """Its shards are closed, so that what has been committed is all there is."""
    config = Config.model_validate({
        "spool": str(tmp_path), "listener": [{"address": "127.0.0.1:1"}], "log": {"file": str(tmp_path / "log"), "history": 0},
        "metrics": {"listen": "off"},
    })  # fmt: skip
    keep_secret(tmp_path)
    shared = Shared.create()
    ours, theirs = socket.socketpair()
    no_socket = os.open(tmp_path, os.O_RDONLY)
    worker = Worker(theirs)
    with pytest.raises(OSError, match="socket"):
        await worker.start(
            config=config.to_json(), slot=0, workers=1, shards=[0], probed=[], culprit=0, states=[], tickets=bytes(OCTETS),
            mail=None, descriptors=[os.dup(shared.descriptor), no_socket],
        )  # fmt: skip
    worker.stopping.set()
    async with asyncio.timeout(60):
        await worker.run()
    with pytest.raises(OSError):
        os.fstat(worker.shards[0].queue._lock)
    os.close(no_socket)
    ours.close()


def test_a_worker_that_only_relays_has_nothing_of_mailboxes_in_memory():
    code = "import sys, relaymta.worker; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [one for one in found.stdout.split() if one.startswith(("relaymta.store", "relaymta.view"))] == []


async def test_complaints_that_come_together_are_noted_in_one_group_commit():
    class Gathering:
        """Commits when all have come."""

        def __init__(self) -> None:
            self.told: list[str] = []
            self.all = asyncio.Event()

        def ident(self) -> int:
            return len(self.told)

        async def complained(self, ident, envelope, addresses, more) -> None:
            self.told += addresses
            if len(self.told) == 3:
                self.all.set()
            await self.all.wait()

    queue = Gathering()
    worker = SimpleNamespace(shards={0: SimpleNamespace(queue=queue)})
    rows = [(f"u{number}@d.example", "", "") for number in range(3)]
    await asyncio.wait_for(Worker._complained(worker, [], rows), 5)
    assert queue.told == [row[0] for row in rows]
