"""A backup of the mailboxes: every shard as it was at one moment (disk/hot_copy.py)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from relaymta.disk import hot_copy
from relaymta.errors import store_error
from relaymta.proto.envelope import Body, encode
from relaymta.store.rows import ID, STATE, MailShard, UserRow

__all__ = ["copy_shard", "renumber"]

SLICE = 1000  # users of one transaction


def copy_shard(rows: MailShard, bodies: Path, folder: Path) -> None:
    """As of `hot_copy`."""

    def opened(path: Path) -> MailShard:
        return MailShard(path, readonly=True, locked=False)

    def named(copy: MailShard, txn: Any) -> Iterator[tuple[int, Body]]:
        return ((ident, row.body) for ident, row in copy.objects(txn))

    hot_copy.copy_shard(rows, bodies, folder, opened, named)


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
