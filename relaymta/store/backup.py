"""A backup of the mailboxes: every shard as it was at one moment, LMDB's compacting copy beside hard links to the files with the
bodies that it names. A segment whose file has another name is not overwritten any more (disk/segments.py), so what the copy names
stays.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import lmdb

from relaymta.disk.segments import FRAME, SegmentRow, body_file, segment_file
from relaymta.errors import StoreError, store_error
from relaymta.proto.envelope import encode
from relaymta.store.rows import ID, STATE, MailShard, UserRow

__all__ = ["copy_shard", "renumber"]

TRIES = 10
SLICE = 1000  # users of one transaction


def copy_shard(rows: MailShard, bodies: Path, folder: Path) -> None:
    """Copy a shard, as it is at one moment, into `folder`, which is made. Blocks, on any thread. StoreError."""
    try:
        (folder / "bodies" / "big").mkdir(mode=0o700, parents=True)
        for _ in range(TRIES):
            _link_all(bodies, folder / "bodies")  # first: what is emptied from now on stays
            _copy_rows(rows, bodies, folder)
            if _complete(folder, bodies):
                return
    except (OSError, lmdb.Error) as error:
        raise store_error(error) from None
    raise StoreError(f"{bodies}: the bodies were moved {TRIES} times while they were backed up; try again")


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


def _copy_rows(rows: MailShard, bodies: Path, folder: Path) -> None:
    shutil.rmtree(folder / "lmdb", ignore_errors=True)
    (folder / "lmdb").mkdir(mode=0o700)
    with rows.reading() as txn:
        _link_all(bodies, folder / "bodies")  # again: segments that were begun until then
        rows.env.copy(str(folder / "lmdb"), compact=True, txn=txn)


def _complete(folder: Path, bodies: Path) -> bool:
    """Whether all that the copy names is there, and was not used again before it got its second name; what it does not name is
    removed then."""
    copy = MailShard(folder / "lmdb", readonly=True, locked=False)
    try:
        with copy.reading() as txn:
            segments = {segment_file(folder / "bodies", number): row for number, row in copy.segment_rows(txn)}
            named = set(segments)
            for ident, row in copy.objects(txn):
                if not row.body.segment:
                    named.add(body_file(folder / "bodies", ident, row.body))
    finally:
        copy.close()
    for path in named:
        if not path.exists() and not _link(bodies / path.relative_to(folder / "bodies"), path):
            return False
    if not all(_is_of(path, row) for path, row in segments.items()):
        return False
    for pattern in ("*.seg", "big/*"):
        for path in (folder / "bodies").glob(pattern):
            if path not in named:
                path.unlink()
    return True


def _is_of(path: Path, row: SegmentRow) -> bool:
    """Whether a segment's file is of the generation that its row says."""
    if not row.position or not row.live:
        return True
    with path.open("rb") as file:
        head = file.read(FRAME.size)
    return len(head) == FRAME.size and FRAME.unpack(head)[1] == row.generation


def renumber(path: Path, uidvalidity: int) -> None:
    """Give all mailboxes of a shard that nobody else has open UIDVALIDITYs above those that they had, from `uidvalidity` (s, wall
    clock) on: their UIDs may have been given to other messages since the backup. StoreError."""
    rows = MailShard(path / "lmdb")
    try:
        with rows.reading() as txn:
            users = list(rows.users(txn))
        for start in range(0, len(users), SLICE):
            with rows.env.begin(write=True) as txn:
                for user, row in users[start : start + SLICE]:
                    _renumber(rows, txn, user, row, uidvalidity)
    except lmdb.Error as error:
        raise store_error(error) from None
    finally:
        rows.close()


def _renumber(rows: MailShard, txn: Any, user: int, row: UserRow, uidvalidity: int) -> None:
    row.uidvalidity = max(uidvalidity, row.uidvalidity)
    for mailbox in list(rows.mailboxes(txn, user)):
        state = rows.state(txn, mailbox.mailbox)
        if state is not None:
            state.uidvalidity = row.uidvalidity
            row.uidvalidity += 1
            txn.put(STATE.pack(mailbox.mailbox, 0), encode(state), db=rows.tables["mail"])
    txn.put(ID.pack(user), encode(row), db=rows.tables["user"])
