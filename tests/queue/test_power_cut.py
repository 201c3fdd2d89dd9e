"""A simulated power cut (tests/support/power_cut.py): each image must hold every acknowledged message."""

import asyncio
import hashlib
import random
from pathlib import Path

from relaymta.proto.envelope import QueueName
from relaymta.queue import Events, Null, Queue, QueueSettings, format_id
from tests.conftest import PROVE
from tests.support.power_cut import images, recorded

CUTS = 250 if PROVE else 40


async def messages_in(spool: Path) -> dict[str, str]:
    """Hash by id of every message in a spool, read as the relay reads them."""
    queue = Queue(spool, 0, QueueSettings("relay.example"), lambda *_: [(QueueName("out", ""), None)], Null(), Events())
    queue.entries.paused = True
    await queue.start()
    found = {}
    with queue.store.env.begin() as txn:
        for ident, envelope in queue.store.idents(txn, 0, queue.store.fresh.live()):
            found[format_id(ident)] = hashlib.sha256(queue.segments.read(ident, envelope.body)).hexdigest()
    await queue.stop()
    return found


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
        found = asyncio.run(messages_in(target))
        missing = {ident for ident, digest in acknowledged.items() if found.get(ident) != digest}
        assert not missing, f"{where}: {len(missing)} messages are lost"
        checked += len(acknowledged)
    assert checked > 500
    assert int(image.said[-1].removeprefix("MOVED ")) > 100
