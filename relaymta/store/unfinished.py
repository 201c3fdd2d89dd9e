"""What is done in several transactions and is all or nothing all the same (COPY, MULTIAPPEND): a row says what has been filed so
far, and keeps what is reserved of the user's quota for the rest. When it does not come to its end, it is taken back.
"""

import msgspec

from relaymta.store.change import MOVING, Change, Limits, Refusal
from relaymta.store.rows import UnfinishedRow, runs_of

__all__ = ["begin", "end", "filed", "take_back"]


def begin(change: Change, user: int, number: int, name: str, limits: Limits, messages: int, octets: int) -> int:
    """Reserve for so many messages in a mailbox, under a number of one's own; the mailbox's id. Refusal."""
    owner = change.owner(user)
    mailbox = change.mailbox(user, name).mailbox
    if messages:
        change.check_room(owner, limits, messages, octets)
    owner.messages += messages
    owner.octets += octets
    change.put_unfinished(user, number, UnfinishedRow(mailbox, False, [], messages, octets))
    return mailbox


def filed(change: Change, user: int, number: int, uids: list[int], octets: int) -> None:
    """Some of the messages (UIDs in order) have been filed in this transaction. Refusal: it has been taken back meanwhile."""
    row = _row(change, user, number)
    owner = change.owner(user)
    owner.messages -= len(uids)
    owner.octets -= octets
    runs = runs_of(uids)
    if row.uids and runs and row.uids[-1][1] + 1 == runs[0][0]:  # nobody else has filed anything since
        runs[0] = row.uids.pop()[0], runs[0][1]
    left = msgspec.structs.replace(row, uids=row.uids + runs, messages=row.messages - len(uids), octets=row.octets - octets)
    change.put_unfinished(user, number, left)


def end(change: Change, user: int, number: int) -> None:
    """All have been filed: what is reserved still is given back. Refusal: it has been taken back meanwhile."""
    change.owner(user)
    _give_back(change, user, number, _row(change, user, number))


def _row(change: Change, user: int, number: int) -> UnfinishedRow:
    row = change.shard.unfinished_row(change.txn, user, number)
    if row is None:
        raise Refusal(MOVING, "this was undone meanwhile; try again")
    return row


def _give_back(change: Change, user: int, number: int, row: UnfinishedRow) -> None:
    owner = change.user(user)
    owner.messages -= row.messages
    owner.octets -= row.octets
    change.remove_unfinished(user, number)


def take_back(change: Change, user: int, number: int, most: int) -> bool:
    """Undo it, also of a frozen user, or purge a mailbox that was removed; at most so many messages or rows. Whether that was
    all."""
    row = change.shard.unfinished_row(change.txn, user, number)
    if row is None:
        return True
    if row.removed:
        if change.purge_mailbox(row.mailbox, most) == most:
            return False
        change.remove_unfinished(user, number)
        return True
    uids, row.uids = _split(row.uids, most)
    if change.shard.state(change.txn, row.mailbox) is not None:  # it may have been removed meanwhile
        change.expunge_as(change.user(user), row.mailbox, uids)
    if row.uids:
        change.put_unfinished(user, number, row)
        return False
    _give_back(change, user, number, row)
    return True


def _split(runs: list[tuple[int, int]], most: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The first UIDs of runs, at most so many; the runs of the others."""
    uids: list[int] = []
    for place, (first, last) in enumerate(runs):
        middle = min(first + most - len(uids), last + 1)
        uids += range(first, middle)
        if middle <= last:
            return uids, [(middle, last), *runs[place + 1 :]]
    return uids, []
