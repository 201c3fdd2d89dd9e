"""The program that test_faults.py runs with tests/support/failing_calls.c: each call of the opening of a shard of mailboxes in
turn fails, of one that is there and of a new one; the next opening finds all that was acknowledged.

FOLDER KIND SHARE: each `share`-th call. Each opening is a process, as a worker that is started again."""

import asyncio
import errno
import json
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import lmdb

from relaymta.errors import StoreError
from relaymta.store.shard import Shard
from tests.store.fault_driver import failing_calls
from tests.store.ledger import Ledger
from tests.store.workload import Work

FAILED, OPENED, UNTOUCHED, WRONG = 0, 1, 2, 3


def process(run: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """What `run()` returns, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(asyncio.run(run()))
        except BaseException:
            traceback.print_exc()
            os._exit(WRONG)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def fill(folder: Path, facts: Path) -> int:
    """A shard with some mail, left as a crash leaves it, with files that nothing points at."""
    with facts.open("w") as file:
        shard = Shard(folder, 0)
        await shard.start()
        work = Work(shard, random.Random(3), lambda *fact: print(json.dumps(fact), file=file), large=0.2)
        await work.add_user(1)
        for _ in range(20):
            await work.some(4)
    (shard.path / "bodies/big" / ("0" * 16)).write_bytes(b"")
    (shard.path / "bodies/00000099.seg").write_bytes(b"")
    return 0


async def failing(folder: Path, number: int, kind: int) -> int:
    """Open a shard; the call with this number fails."""
    calls = failing_calls()
    calls.fail_calls(number, 1, errno.EIO, kind)
    try:
        shard = Shard(folder, 0)
        await asyncio.wait_for(shard.start(), 30)
    except (OSError, lmdb.Error, StoreError):
        return FAILED if calls.failed_calls() else WRONG
    return OPENED if calls.failed_calls() else UNTOUCHED


async def opened(folder: Path, ledger: Ledger) -> int:
    """Open it after that; it takes mail."""
    shard = Shard(folder, 0)
    await shard.start()
    ledger.check(shard)
    work = Work(shard, random.Random(1), ledger.tell)
    await work.add_user(9)
    await work.file()
    assert work.acknowledged == 2
    ledger.check(shard)
    await shard.stop()
    return 0


def sweep(before: Path, kind: int, share: int, ledger: Ledger) -> Counter[int]:
    """Open copies of a folder; how often what came of it."""
    found: Counter[int] = Counter()
    number = 1
    while not found[UNTOUCHED]:
        copy = before.parent / "mail"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(before, copy)
        result = process(lambda: failing(copy, number, kind))  # noqa: B023
        found[result] += 1
        if result == WRONG or process(lambda: opened(copy, ledger)):  # noqa: B023
            raise SystemExit(f"call {number}, kind {kind}: {result}")
        number += share
    return found


def main(folder: Path, kind: int, share: int) -> None:
    facts = folder / "facts"
    assert process(lambda: fill(folder / "full", facts)) == 0
    ledger = Ledger()
    for line in facts.read_text().splitlines():
        ledger.tell(*json.loads(line))
    assert ledger.messages > 10
    (folder / "new").mkdir()
    found = sweep(folder / "full", kind, share, ledger) + sweep(folder / "new", kind, share, Ledger())
    print(json.dumps({"failed": found[FAILED], "opened": found[OPENED]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
