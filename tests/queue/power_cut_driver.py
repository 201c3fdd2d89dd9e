"""The program that test_power_cut.py traces: stores messages in a spool and reports on standard output which are acknowledged."""

import asyncio
import hashlib
import os
import random
import sys
from pathlib import Path

from relaymta.disk import compact, journal
from relaymta.proto.envelope import TRANSIENT, Attempt, Envelope, QueueName
from relaymta.queue import Events, Null, Queue, QueueSettings, format_id, wall_ms
from relaymta.queue.journal import JournalSettings

ENOUGH = 100  # bodies that moved


class Collects(Null):
    def __init__(self, offered: list) -> None:
        super().__init__()
        self.offer = offered.append  # type: ignore[method-assign]

    def awake(self, name: QueueName) -> bool:
        return True


async def main(spool: Path, groups: int) -> None:
    """`groups` groups of messages, and more until enough bodies have moved; some are delivered, some deferred, others wait on."""
    offered: list = []
    journal.FILE_LEAST = journal.FILE_MOST = 1 << 14
    journal.SYNC_OCTETS = 1 << 13  # so that its files change, and are synced now and then
    settings = QueueSettings("relay.example", first_retry_ms=3_600_000, journal=JournalSettings(8 << 20, 86_400_000))
    queue = Queue(spool, 0, settings, lambda envelope, attempts: [(QueueName("out", ""), None)], Collects(offered), Events())
    queue.segments.size = 1 << 17  # so that segments change and are used again
    compact.SPARE = 0  # and bodies move
    moves = 0
    relocate = queue.entries.moved

    def moved(*arguments) -> None:
        nonlocal moves
        moves += 1
        relocate(*arguments)

    queue.entries.moved = moved  # type: ignore[method-assign]
    await queue.start()
    for number in range(20 * groups):
        if number >= groups:
            if moves > ENOUGH:
                break
            await asyncio.sleep(0.01)  # let the thread that reads the bodies to move catch up
        waiting = []
        for _ in range(random.randint(1, 8)):
            ident = queue.ident()
            data = b"Subject: x\r\n\r\n" + random.randbytes(random.randint(10, 6000)) + b"\r\n"
            future = asyncio.get_running_loop().create_future()
            queue.submit(ident, Envelope("", ["c@d"], len(data), 0, wall_ms(), queue.deadline()), [data], future.set_result)
            waiting.append((future, ident, data))
        for future, ident, data in waiting:
            assert await future is None
            os.write(1, f"ACK {format_id(ident)} {hashlib.sha256(data).hexdigest()}\n".encode())
        await asyncio.sleep(0)
        for entry in offered:
            kind = random.choice(["deliver", "deliver", "defer", "wait"])
            if kind == "deliver":
                os.write(1, f"END {format_id(entry.ident)}\n".encode())  # from here on it may be missing
                queue.finish(entry, None)
            elif kind == "defer":
                queue.finish(entry, {0: Attempt(wall_ms(), TRANSIENT, "rcpt", "", 451, "", "later")})
        offered.clear()
        queue.compactor.tick()
    os.write(1, f"MOVED {moves}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    random.seed(int(sys.argv[3]))
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
