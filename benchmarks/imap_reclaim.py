"""A part of benchmarks.imap_large: much that is removed."""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.dovecot import PASSWORD
from benchmarks.imap_client import Session, all_paced, at_once, delivered, delivering, logged_in
from benchmarks.imap_servers import OURS, Figures, Ours, Row, measured, message, of_ours, spread, started, user
from relaymta.disk.segments import segment_size_for
from relaymta.store.rows import MailShard

__all__ = ["reclaim"]

SOURCES = 16  # connections that deliver
BOXES = 8  # mailboxes
HELD = 50_000  # messages that are in them, together
TOGETHER = 500  # messages that one EXPUNGE removes
ALONE = 4000  # deliveries before and after
OTHERS = range(50, 54)  # users whose mail flows meanwhile
STEPS = 10  # of a run: figures are taken at the end of each


class Space:
    """What a relay's shard takes: read from its files."""

    def __init__(self, spool: Path) -> None:
        self._path = spool / "mail/shard-0"
        self._rows = MailShard(self._path / "lmdb", readonly=True)

    def look(self) -> Figures:
        """MB of bodies on disk, and of those that are live; of LMDB's file, and of its pages with rows; segments."""
        rows = self._rows.segments().values()
        files = [path.stat().st_blocks * 512 for path in (self._path / "bodies").glob("*.seg")]
        pages, _ = self._rows.used()
        return {
            "disk MB": sum(files) / 1e6, "live MB": sum(row.live_bytes for row in rows) / 1e6, "segments": len(files),
            "LMDB MB": (self._path / "lmdb/data.mdb").stat().st_size / 1e6, "rows MB": pages / 1e6,
        }  # fmt: skip

    def close(self) -> None:
        self._rows.close()


class Box:
    """A mailbox from which messages are removed, at random, by a session."""

    def __init__(self, session: Session, chance: random.Random) -> None:
        self._session, self._chance = session, chance

    async def remove(self, kept: int) -> None:
        """Remove what is more than so many messages, TOGETHER at a time."""
        answer = await self._session.command(b"UID SEARCH ALL")
        found = re.search(rb"^\* SEARCH([0-9 ]*)\r$", answer, re.MULTILINE)
        assert found
        uids = found[1].split()
        self._chance.shuffle(uids)
        for first in range(0, len(uids) - kept, TOGETHER):
            some = b",".join(uids[first : min(first + TOGETHER, len(uids) - kept)])
            await self._session.command(rb"UID STORE %s +FLAGS.SILENT (\Deleted)" % some)
            await self._session.command(b"UID EXPUNGE %s" % some)


class Flow:
    """Deliveries to the mailboxes, and what is removed from them. `kept`: messages of each."""

    def __init__(self, server: Ours, kept: int, sources: list[Session], boxes: list[Box]) -> None:
        self.server, self.kept, self.space = server, kept, Space(server.relay.spool)
        self._sources, self._boxes, self._serial = sources, boxes, count()

    @classmethod
    async def of(cls, server: Ours, kept: int) -> "Flow":
        """The mailboxes are filled."""
        chance, boxes = random.Random(1), []
        for number in range(BOXES):
            session = await logged_in(server.imap, user(number), PASSWORD)
            await session.command(b"SELECT INBOX")
            boxes.append(Box(session, chance))
        flow = cls(server, kept, [await delivering(server.lmtp) for _ in range(SOURCES)], boxes)
        await flow.deliver(BOXES * kept)
        return flow

    async def deliver(self, messages: int) -> list[float]:
        """Deliver to all mailboxes in turn: the seconds of each."""
        return await at_once(SOURCES, messages, self._deliver)

    async def _deliver(self, source: int) -> None:
        number = next(self._serial)
        await delivered(self._sources[source], user(number % BOXES), message(number))

    async def remove(self) -> None:
        """Remove what is more than is kept."""
        await asyncio.gather(*(box.remove(self.kept) for box in self._boxes))

    async def alone(self) -> Figures:
        """Deliveries while nothing is removed, which is done afterwards."""
        found = await measured(self.server, self.deliver(ALONE))
        await self.remove()
        return found

    async def step(self, messages: int) -> Figures:
        """Deliver so many, and remove as many of those that are there; what the shard takes at the end, and at most."""
        highest: Figures = {}

        async def both() -> list[float]:
            times: list[float] = []
            for begun in range(0, messages, BOXES * TOGETHER):
                removing = asyncio.ensure_future(self.remove())
                times += await self.deliver(min(messages - begun, BOXES * TOGETHER))
                await removing
                now = self.space.look()
                highest.update({key: max(value, highest.get(key, 0)) for key, value in now.items()})
            return times

        found = await measured(self.server, both())
        found |= self.space.look() | {f"highest {key}": value for key, value in highest.items()}
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found


async def flow(server: Ours, kept: int, messages: int) -> tuple[list[Figures], Figures, list[Figures]]:
    """Figures of each step, and when all is done; of others' deliveries; of deliveries alone, before and after."""
    run = await Flow.of(server, kept)
    alone, ended = [await run.alone()], False
    filing = [partial(delivered, await delivering(server.lmtp), user(number), message(number)) for number in OTHERS]
    others = asyncio.ensure_future(all_paced(filing, 10, lambda: ended))
    steps = [await run.step(max(SOURCES, messages // STEPS)) for _ in range(STEPS)]
    ended = True
    seen = spread(await others)
    await run.remove()
    await asyncio.sleep(5)  # for what is moved and freed behind the last of them
    steps.append(run.space.look())
    alone.append(await run.alone())
    run.space.close()
    return steps, seen, alone


async def reclaim(options: argparse.Namespace) -> list[Row]:
    """Messages that come and go."""
    messages, kept = int(1_000_000 * options.scale), max(TOGETHER, int(HELD / BOXES * min(1.0, options.scale * 4)))
    with started([OURS], options.python) as (server,):
        assert isinstance(server, Ours)
        segment = segment_size_for(Path(tempfile.gettempdir())) / 1e6
        (*steps, end), others, (before, after) = await flow(server, kept, messages)
    what = f"{messages:,} messages delivered and expunged, {kept * BOXES:,} held"
    highest, last = max(steps, key=lambda one: one["highest disk MB"] - 2 * one["live MB"]), steps[-1]
    rows_share = max(one["highest LMDB MB"] / one["highest rows MB"] for one in steps)
    both = last["cpu us"] / steps[1]["cpu us"]  # in the first there is nothing to be moved yet
    return [
        of_ours(f"{what}: disk, MB", highest, highest["highest disk MB"], 2 * highest["live MB"] + 16 * segment),
        of_ours(f"{what}: disk at the end, MB", end, end["disk MB"], 2 * end["live MB"] + 16 * segment),
        of_ours(f"{what}: LMDB's file, of what its rows take, at the end", end, end["LMDB MB"] / end["rows MB"], 2),
        of_ours(f"{what}: LMDB's file, of the most that its rows took", last, rows_share, 2),
        of_ours(f"{what}: CPU of a delivery and an expunge, of that of the second tenth", last, both, 1.15),
        of_ours(f"{what}: CPU of a delivery, of that of the start", after, after["cpu us"] / before["cpu us"], 1.15),
        of_ours(f"{what}: a delivery before", before),
        of_ours(f"{what}: others' deliveries", others),
    ]
