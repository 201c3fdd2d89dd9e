"""A simulated power cut (tests/support/power_cut.py) of the owner of a shard of mailboxes: each image holds every message that
was filed, under its UID; nothing that was expunged is back, and no (UIDVALIDITY, UID) is given to another message."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from relaymta.store.shard import Shard
from tests.conftest import PROVE
from tests.store.ledger import Ledger
from tests.store.workload import Work
from tests.support.power_cut import images, recorded

CUTS = 250 if PROVE else 40
SEEDS = range(7, 15) if PROVE else [7]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_image_holds_what_was_acknowledged(tmp_path, seed):
    root, target = tmp_path / "mail", tmp_path / "image"
    calls = recorded("tests.store.power_cut_driver", root, "60", str(seed))
    ledger = Ledger()
    checked = 0
    for where, image in images(calls, CUTS, root, target, random.Random(seed)):
        for line in image.take():
            word, *fact = json.loads(line)
            if word != "moved":
                ledger.tell(word, *fact)
        try:
            asyncio.run(opened(target, ledger))
        except Exception as error:
            error.add_note(where)
            raise
        checked += ledger.messages
    assert checked > 500
    assert json.loads(image.said[-1])[1] > 100


async def opened(folder: Path, ledger: Ledger) -> None:
    """Open an image, compare it, and file more: what is given out then is above all that was given out before."""
    shard = Shard(folder, 0)
    await shard.start()
    try:
        await compared(shard, ledger)
    finally:
        await shard.stop()


async def compared(shard: Shard, ledger: Ledger) -> None:
    ledger.check(shard)
    highest = shard.rows.meta(b"highest")
    filed: list[list[int]] = []

    def tell(word: str, *fact: Any) -> None:
        if word == "filed":
            filed.append(fact[2])

    work = Work(shard, random.Random(0), tell)
    work.users = sorted({box.user for box in ledger.boxes.values()})
    for _ in range(5):
        await work.file()
    assert filed and not work.refused
    for mailbox, _, uid, modseq in filed:
        box = ledger.boxes.get(mailbox)
        assert box is None or (uid >= box.uidnext and modseq > box.modseq), (uid, modseq, box)
    assert shard.rows.meta(b"highest") > highest
