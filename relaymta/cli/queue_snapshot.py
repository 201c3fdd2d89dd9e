"""`relaymta queue snapshot`: the whole queue at one moment, while the relay runs or not.

The copy is made in the spool, with the rights of its owner, from where its files get names in the folder that the operator has
named, or are copied where that is on another file system.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from relaymta import __version__
from relaymta.cli.console import say, say_json
from relaymta.cli.mail_files import as_owner, check_empty, check_writable, collect, sync_file
from relaymta.cli.options import Configuration
from relaymta.cli.peer import answered, counted, spool_of
from relaymta.disk.shards import shard_numbers
from relaymta.errors import StoreError
from relaymta.queue import snapshot
from relaymta.queue.snapshot import remove_stale

__all__ = ["take"]

MARK = "relaymta-snapshot.json"  # its last file


def take(read: Configuration, folder: Path, as_json: bool) -> None:
    """Take a snapshot into a new folder."""
    _, spool = spool_of(read)
    folder = folder.absolute()
    check_empty(folder, "a snapshot needs a new one")
    check_writable(folder)
    with as_owner(spool):
        remove_stale(spool)
        made, descriptor = answered(lambda: snapshot.begin(spool))
    try:
        with as_owner(spool):
            numbers = answered(lambda: _copied(spool, made))
        began = time.time()
        answered(lambda: collect(spool, made, folder, "shard-0" if 0 in numbers else f"shard-{numbers[0]}"))
    finally:
        with as_owner(spool):
            shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)
    counts = answered(lambda: {number: snapshot.check(folder / f"shard-{number}") for number in numbers})
    found: dict[str, Any] = {"version": __version__, "created": round(began), "shards": counts, "messages": sum(counts.values())}
    answered(lambda: _mark(folder, found))
    if as_json:
        say_json(found)
    else:
        shards = counted(len(numbers), "shard", "shards")
        say(f"{folder} is a snapshot of {counted(found['messages'], 'message', 'messages')} in {shards}; all are complete")


def _copied(spool: Path, made: Path) -> list[int]:
    numbers = [number for number in shard_numbers(spool) if (spool / f"shard-{number}" / "lmdb" / "data.mdb").exists()]
    if not numbers:
        raise StoreError(f"{spool} has no queue")
    try:
        for number in numbers:
            snapshot.copy_shard(spool / f"shard-{number}", made / f"shard-{number}")
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return numbers


def _mark(folder: Path, found: dict[str, Any]) -> None:
    try:
        mark = folder / MARK
        mark.write_text(json.dumps(found) + "\n")
        sync_file(mark)
        sync_file(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror}") from None
