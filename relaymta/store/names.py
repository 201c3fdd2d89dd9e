"""The names of a user's mailboxes, by transactions: each function but `create`, which is all or nothing by itself, is for a Task,
which is undone when it is refused.

Levels are divided by "/"; a missing parent of a new mailbox is created, as a mailbox of its own. A subscription is the name's: it
stays when the mailbox goes, or gets another name (RFC 9051 6.3.6).
"""

from collections.abc import Iterator

import msgspec

from relaymta.proto import mailbox_name
from relaymta.store.change import CANNOT, EXISTS, LIMIT, Change, Refusal
from relaymta.store.collected import MAILBOXES_MOST
from relaymta.store.rows import INBOX, MailboxRow

__all__ = ["create", "delete", "rename", "subscribe"]


def create(change: Change, user: int, name: str, special: str = "") -> MailboxRow:
    """Add a mailbox, and its parents that are missing; none is subscribed. `special`: its special use. Refusal."""
    change.owner(user)
    _check_free(change, user, name)
    _check(name)
    if special and any(row.special == special for row in change.shard.mailboxes(change.txn, user)):
        raise Refusal(CANNOT, f"another mailbox is {special}")
    parents = _missing_parents(change, user, name)
    new = [one for one in (*parents, name) if change.shard.mailbox(change.txn, user, one) is None]
    change.check_names(user, len(new))  # all of them or none
    for parent in parents:
        change.create_mailbox(user, parent)
    return change.create_mailbox(user, name, special)


def create_parents(change: Change, user: int, name: str) -> None:
    """Add the parents of a mailbox that are missing. Refusal: some of them may be there."""
    for parent in _missing_parents(change, user, name):
        change.create_mailbox(user, parent)


def _missing_parents(change: Change, user: int, name: str) -> list[str]:
    levels = name.split("/")
    parents = ["/".join(levels[:count]) for count in range(1, len(levels))]
    found = {parent: change.shard.mailbox(change.txn, user, parent) for parent in parents}
    return [parent for parent, row in found.items() if row is None or not row.mailbox]


def _check(name: str) -> None:
    problem = mailbox_name.problem(name)
    if problem is not None:
        raise Refusal(CANNOT, problem)


def _check_free(change: Change, user: int, name: str) -> None:
    row = change.shard.mailbox(change.txn, user, name)
    if row is not None and row.mailbox:
        raise Refusal(EXISTS, f"there is a mailbox {name}")


def delete(change: Change, user: int, name: str, most: int) -> int:
    """Remove a mailbox; what is below it stays. At most so many rows of it go at once: 0 when these were all, else the number
    under which the rest is unfinished. Refusal."""
    change.owner(user)
    if name == INBOX:
        raise Refusal(CANNOT, f"{INBOX} cannot be deleted")
    row = change.mailbox(user, name)
    _leave(change, user, row)
    change.abandon(user, row.mailbox)
    if change.purge_mailbox(row.mailbox, most) == most:
        return row.mailbox
    change.remove_unfinished(user, row.mailbox)
    return 0


def rename(change: Change, user: int, old: str, new: str) -> None:
    """Give a mailbox that is not INBOX, and all below it, another name. Refusal."""
    change.owner(user)
    change.mailbox(user, old)
    _check_free(change, user, new)
    if new.startswith(f"{old}/"):
        raise Refusal(CANNOT, f"{new} is within {old}")
    rows = {row.name: row for row in change.shard.mailboxes(change.txn, user)}
    moved = {row.name: row for row in rows.values() if row.mailbox and (row.name == old or row.name.startswith(f"{old}/"))}
    for name, row in moved.items():
        rows[name] = msgspec.structs.replace(row, mailbox=0, special="")
    placed = {row.name: row for row in _placed(rows, moved, old, new)}
    if len({name for name, row in rows.items() if row.mailbox or row.subscribed} | placed.keys()) > MAILBOXES_MOST:
        raise Refusal(LIMIT, f"{MAILBOXES_MOST} mailboxes are the most that a user may have")
    for name in moved.keys() - placed.keys():
        _leave(change, user, rows[name])
    for row in placed.values():
        change.put_mailbox(user, row)
    create_parents(change, user, new)


def _placed(rows: dict[str, MailboxRow], moved: dict[str, MailboxRow], old: str, new: str) -> Iterator[MailboxRow]:
    """The rows of mailboxes under their new names. `rows`: the names that are there without them. Refusal."""
    for name, row in moved.items():
        target = new + name[len(old) :]
        _check(target)
        there = rows.get(target)
        if there is not None and there.mailbox:
            raise Refusal(EXISTS, f"there is a mailbox {target}")
        yield msgspec.structs.replace(row, name=target, subscribed=there is not None and there.subscribed)


def _leave(change: Change, user: int, row: MailboxRow) -> None:
    """A name has lost its mailbox."""
    if row.subscribed:
        change.put_mailbox(user, MailboxRow(row.name, 0, "", True))
    else:
        change.remove_name(user, row.name)


def subscribe(change: Change, user: int, name: str, subscribed: bool) -> None:
    """Subscribe a name, which need not be a mailbox's, or no longer. Refusal."""
    change.owner(user)
    row = change.shard.mailbox(change.txn, user, name)
    if row is None and subscribed:
        _check(name)
        change.check_names(user)
        change.put_mailbox(user, MailboxRow(name, 0, "", True))
    elif row is not None and not subscribed and not row.mailbox:
        change.remove_name(user, name)
    elif row is not None and row.subscribed != subscribed:
        change.put_mailbox(user, msgspec.structs.replace(row, subscribed=subscribed))
