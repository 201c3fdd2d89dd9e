"""A process that is killed amid a read transaction of an LMDB environment."""

import asyncio
import sys
from pathlib import Path
from typing import Any

_READ = """
import sys, time
import lmdb
with lmdb.open(sys.argv[1], readonly=True, max_dbs=16, max_readers=1024).begin() as txn:
    txn.stat()
    print("reading", flush=True)
    time.sleep(600)
"""


async def is_forgotten(environment: Any, path: Path) -> None:
    """Kill such a process, and wait until the environment in `path`, which is open here, has no trace of it."""
    reading = await asyncio.create_subprocess_exec(sys.executable, "-c", _READ, str(path), stdout=asyncio.subprocess.PIPE)
    assert reading.stdout is not None and await reading.stdout.readline() == b"reading\n"
    reading.kill()
    await reading.wait()
    async with asyncio.timeout(60):
        while str(reading.pid) in environment.readers():
            await asyncio.sleep(0.05)
