"""A simulated power cut (tests/support/power_cut.py): each image must hold every acknowledged message, and the events of what is
in it, and of nothing else."""

import asyncio
import hashlib
import random
from pathlib import Path

from relaymta.disk.journal import End, JournalReader
from relaymta.proto.envelope import QueueName
from relaymta.queue import Events, Null, Queue, QueueSettings, format_id
from relaymta.queue.journal import JournalSettings, decode_records, events
from tests.conftest import PROVE
from tests.support.power_cut import images, recorded

CUTS = 250 if PROVE else 40


async def messages_in(spool: Path) -> tuple[dict[str, str], set[str], set[str]]:
    """Hash by id of every message in a spool, read as the relay reads them; and the ids of which the journal says that they were
    accepted, and delivered."""
    settings = QueueSettings("relay.example", journal=JournalSettings(8 << 20, 86_400_000))
    queue = Queue(spool, 0, settings, lambda *_: [(QueueName("out", ""), None)], Null(), Events())
    queue.entries.paused = True
    await queue.start()
    found = {}
    with queue.store.env.begin() as txn:
        for ident, envelope in queue.store.idents(txn, 0, queue.store.fresh.live()):
            found[format_id(ident)] = hashlib.sha256(queue.segments.read(ident, envelope.body)).hexdigest()
    end = End.of(queue.store.journal_rows().end)
    piece = JournalReader(queue.path / "journal").read(End(), end, 1 << 30)
    assert piece.dropped == 0 and piece.place == end
    told = [event for one in piece.records for event in events(one.number, decode_records(one.record))]
    accepted, delivered = ([one["message"] for one in told if one["event"] == word] for word in ("accepted", "delivered"))
    assert len(accepted) == len(set(accepted)) and len(delivered) == len(set(delivered))
    await queue.stop()
    return found, set(accepted), set(delivered)


def test_every_image_holds_every_acknowledged_message(tmp_path):
    root, target = tmp_path / "spool", tmp_path / "image"
    calls = recorded("tests.queue.power_cut_driver", root, "60", "7")
    acknowledged: dict[str, str] = {}
    checked = 0
    for where, image in images(calls, CUTS, root, target, random.Random(7)):
        for word, ident, *rest in map(str.split, image.take()):
            if word == "ACK":
                acknowledged[ident] = rest[0]
            elif word == "END":
                acknowledged.pop(ident, None)
        found, accepted, delivered = asyncio.run(messages_in(target))
        missing = {ident for ident, digest in acknowledged.items() if found.get(ident) != digest}
        assert not missing, f"{where}: {len(missing)} messages are lost"
        assert accepted - delivered == found.keys(), f"{where}: events are missing, or made up"
        checked += len(acknowledged)
    assert checked > 500
    assert int(image.said[-1].removeprefix("MOVED ")) > 100
