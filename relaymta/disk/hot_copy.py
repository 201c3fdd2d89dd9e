"""A copy of a shard that its owner goes on to use, as it is at one moment: LMDB's compacting copy beside hard links to the files
with the bodies that it names. A segment whose file has another name is not overwritten any more (segments.py), and what is
appended to it lies behind what the copy names; so what the copy names stays.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from relaymta.disk.environment import Environment
from relaymta.disk.segments import FRAME, MAGIC, SegmentRow, body_file, segment_file
from relaymta.errors import StoreError, store_error
from relaymta.proto.envelope import Body

__all__ = ["copy_shard"]

TRIES = 10
E = TypeVar("E", bound=Environment)


def copy_shard(
    environment: Environment, bodies: Path, folder: Path, opened: Callable[[Path], E],
    named: Callable[[E, Any], Iterator[tuple[int, Body]]],
) -> None:  # fmt: skip
    """Copy a shard, as it is at one moment, into `folder`, which is made. `opened(path)`: the copy, to be read; `named(copy,
    transaction)`: all bodies that it has, by the ids of what they are the bodies of. Blocks, on any thread. StoreError."""
    try:
        (folder / "bodies" / "big").mkdir(mode=0o700, parents=True)
        for _ in range(TRIES):
            _link_all(bodies, folder / "bodies")  # first: what is emptied from now on stays
            _copy_rows(environment, bodies, folder)
            if _complete(folder, bodies, opened, named):
                return
    except (OSError, lmdb.Error) as error:
        raise store_error(error) from None
    raise StoreError(f"{bodies}: the bodies were moved {TRIES} times while they were copied; try again")


def _link_all(bodies: Path, folder: Path) -> None:
    for pattern in ("*.seg", "big/*"):
        for path in bodies.glob(pattern):
            _link(path, folder / path.relative_to(bodies))


def _link(path: Path, new: Path) -> bool:
    """Give a file a second name; False when it is gone."""
    try:
        os.link(path, new)
    except FileExistsError:
        if new.stat().st_ino != path.stat().st_ino:  # its number was given again
            new.unlink()
            os.link(path, new)
    except FileNotFoundError:
        return False
    return True


def _copy_rows(environment: Environment, bodies: Path, folder: Path) -> None:
    shutil.rmtree(folder / "lmdb", ignore_errors=True)
    (folder / "lmdb").mkdir(mode=0o700)
    with environment.reading() as txn:
        _link_all(bodies, folder / "bodies")  # again: segments that were begun until then
        environment.env.copy(str(folder / "lmdb"), compact=True, txn=txn)


def _complete(
    folder: Path, bodies: Path, opened: Callable[[Path], E], named: Callable[[E, Any], Iterator[tuple[int, Body]]]
) -> bool:
    """Whether all that the copy names is there, and was not used again before it got its second name; what it does not name is
    removed then."""
    here = folder / "bodies"
    wanted: set[Path] = set()
    copy = opened(folder / "lmdb")
    try:
        with copy.reading() as txn:
            segments = {segment_file(here, number): row for number, row in copy.segment_rows(txn)}
            wanted.update(segments)
            for ident, body in named(copy, txn):
                if not body.segment:
                    path = body_file(here, ident, body)
                    if path not in wanted and not path.exists():
                        _link(bodies / path.relative_to(here), path)
                    if not _has(path, ident, body):
                        return False
                    wanted.add(path)
    finally:
        copy.close()
    for path, row in segments.items():
        if not path.exists() and not _link(bodies / path.relative_to(here), path):
            return False
        if not _is_of(path, row):
            return False
    for pattern in ("*.seg", "big/*"):
        for path in here.glob(pattern):
            if path not in wanted:
                path.unlink()
    return True


def _has(path: Path, ident: int, body: Body) -> bool:
    """Whether a file has this large body, by its frame."""
    try:
        with path.open("rb") as file:
            head = os.pread(file.fileno(), FRAME.size, body.offset)
    except FileNotFoundError:
        return False
    return len(head) == FRAME.size and FRAME.unpack(head)[:4] == (MAGIC, body.generation, ident, body.length)


def _is_of(path: Path, row: SegmentRow) -> bool:
    """Whether a segment's file is of the generation that its row says."""
    if not row.position or not row.live:
        return True
    with path.open("rb") as file:
        head = file.read(FRAME.size)
    return len(head) == FRAME.size and FRAME.unpack(head)[1] == row.generation
