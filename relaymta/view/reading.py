"""What IMAP sessions read of a mailbox. Each function reads in one transaction and blocks as long as that takes: on the loop for
little, on a reader thread for much. `most`: how many index records may be read; TooMuch beyond that.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any, NamedTuple

from relaymta.proto.imap_records import (
    LAST_UID,
    RECORD,
    RECORD_SIZE,
    changed,
    chosen,
    first,
    load,
    pairs,
    pick,
    select,
)
from relaymta.proto.imap_view import Changes
from relaymta.store.blocks import Blocks
from relaymta.store.change import MISSING, Refusal
from relaymta.store.reading import Readable
from relaymta.store.rows import DELETED, SEEN, MailboxRow, MailboxState, MessageRow, ObjectRow

__all__ = [
    "Message", "Opened", "Removed", "TooMuch", "after", "changes", "deleted_octets", "expunged", "marked", "messages",
    "messages_now", "named", "names", "opened", "raw_state", "records", "records_now",
]  # fmt: skip

TOGETHER = 64  # blocks
NEW_MOST = 1000  # new messages of which is told without a look at the whole index


class TooMuch(Exception):
    """More index records than may be read on the loop."""


class Removed(Exception):
    """The shard does not have the user (any more): deleted, or moved to another shard."""


class Opened(NamedTuple):
    """A mailbox when it is selected. `uids`: packed; `unseen`: the UID of the first message that is not seen, or 0."""

    row: MailboxRow
    state: MailboxState
    uids: bytes
    unseen: int


class Message(NamedTuple):
    """A message with its rows."""

    uid: int
    flags: int
    modseq: int
    row: MessageRow
    object: ObjectRow


def named(shard: Readable, user: int, name: str) -> tuple[MailboxRow, MailboxState]:
    """A user's mailbox by its name. Refusal (MISSING), Removed."""
    with shard.rows.reading() as txn:
        return _named(shard, txn, user, name)


def _named(shard: Readable, txn: Any, user: int, name: str) -> tuple[MailboxRow, MailboxState]:
    row = shard.rows.mailbox(txn, user, name)
    state = shard.rows.state(txn, row.mailbox) if row is not None and row.mailbox else None
    if row is None or state is None:
        if shard.rows.user(txn, user) is None:
            raise Removed
        raise Refusal(MISSING, "there is no such mailbox")
    return row, state


def names(shard: Readable, user: int) -> list[tuple[MailboxRow, MailboxState | None]]:
    """All names of a user; None with those that are only subscribed. Removed."""
    with shard.rows.reading() as txn:
        if shard.rows.user(txn, user) is None:
            raise Removed
        rows = shard.rows
        return [(row, rows.state(txn, row.mailbox) if row.mailbox else None) for row in rows.mailboxes(txn, user)]


def opened(shard: Readable, user: int, name: str, known: Callable[[int, int], bytes | None], unseen: bool, most: int) -> Opened:
    """A mailbox that is being selected. `known(mailbox, modseq)`: its packed UIDs at that MODSEQ, where they are in memory;
    `unseen`: the first message that is not seen is asked for. Refusal (MISSING), Removed, TooMuch."""
    with shard.rows.reading() as txn:
        row, state = _named(shard, txn, user, name)
        uids = known(row.mailbox, state.modseq)
        look = unseen and state.unseen > 0
        if uids is None or look:
            _check(state, most)
        found, where = BytesIO(), 0  # which gives what it has without a copy
        for piece in _pieces(shard.rows.index(txn, row.mailbox)) if uids is None or look else ():
            where = where or (first(piece, 0, SEEN) if look else 0)
            if uids is None:
                found.write(load(piece))
            elif where:
                break
    return Opened(row, state, found.getvalue() if uids is None else uids, where)


def _pieces(index: Blocks) -> Iterator[list[bytes]]:
    """All blocks, some together: those of a large mailbox are many megabytes, which a process would not give back."""
    piece: list[bytes] = []
    for _, block in index.blocks():
        piece.append(block)
        if len(piece) == TOGETHER:
            yield piece
            piece = []
    if piece:
        yield piece


def _check(state: MailboxState, most: int) -> None:
    if state.messages > most:
        raise TooMuch


def raw_state(shard: Readable, mailbox: int) -> bytes | None:
    """The row of a mailbox's state, which is another whenever anything has changed; None: it is gone."""
    with shard.rows.reading() as txn:
        return shard.rows.raw_state(txn, mailbox)


def changes(
    shard: Readable, mailbox: int, modseq: int, uidnext: int, whole: bool, covers: Callable[[int], bool], most: int
) -> Changes:
    """What has happened in a mailbox above a MODSEQ, at which its next UID was `uidnext`. `whole`: with the UIDs of all messages;
    `covers(modseq)`: whether all changes up to that MODSEQ are known anyway. Refusal (MISSING): it is gone; TooMuch."""
    with shard.rows.reading() as txn:
        state = shard.rows.state(txn, mailbox)
        if state is None:
            raise Refusal(MISSING, "the mailbox has been deleted")
        found = Changes(state.modseq, state.uidnext, state.messages, state.keywords)
        if not whole and (state.modseq == modseq or covers(state.modseq)):
            return found
        index = shard.rows.index(txn, mailbox)
        if not whole and state.modseq - modseq == state.uidnext - uidnext <= NEW_MOST:
            # Each new message has got a MODSEQ of its own, and each other change another one: there was none.
            return found._replace(records=changed([block for _, block in index.blocks(uidnext)], modseq))
        _check(state, most)
        if min(state.modseq - modseq, state.vanished) > most:  # each of them may be a row of what was expunged
            raise TooMuch
        gone = None if whole else _expunged(shard, txn, mailbox, state, modseq)
        records, everything = BytesIO(), BytesIO()
        for piece in _pieces(index):
            records.write(changed(piece, modseq))
            if gone is None:
                everything.write(load(piece))
        uids = everything.getvalue() if gone is None else None
        return found._replace(records=records.getvalue(), expunged=gone, uids=uids)


def expunged(shard: Readable, mailbox: int, modseq: int) -> list[tuple[int, int]] | None:
    """UIDs that were expunged above a MODSEQ, as ranges in any order; None when not all of them are remembered. Refusal
    (MISSING)."""
    with shard.rows.reading() as txn:
        state = shard.rows.state(txn, mailbox)
        if state is None:
            raise Refusal(MISSING, "the mailbox has been deleted")
        return _expunged(shard, txn, mailbox, state, modseq)


def _expunged(shard: Readable, txn: Any, mailbox: int, state: MailboxState, modseq: int) -> list[tuple[int, int]] | None:
    if modseq < state.forgotten:
        return None
    return [run for _, runs in shard.rows.expunged(txn, mailbox, modseq) for run in runs]


def records(shard: Readable, mailbox: int, ranges: bytes) -> bytes:
    """The index records of the messages in packed ranges of UIDs."""
    with shard.rows.reading() as txn:
        found = _found(shard, txn, mailbox, ranges)
    return chosen(found, ranges)


def records_now(shard: Readable, mailbox: int, ranges: bytes) -> tuple[bytes, bytes | None]:
    """The same, and as of `raw_state`."""
    with shard.rows.reading() as txn:
        found, state = _found(shard, txn, mailbox, ranges), shard.rows.raw_state(txn, mailbox)
    return chosen(found, ranges), state


def _found(shard: Readable, txn: Any, mailbox: int, ranges: bytes) -> bytes:
    """The blocks that hold messages of these ranges."""
    if ranges[:4] == ranges[4:]:  # one message
        return shard.rows.index(txn, mailbox).block(int.from_bytes(ranges[:4], "little"))
    return b"".join(_blocks(shard, txn, mailbox, ranges))


def _blocks(shard: Readable, txn: Any, mailbox: int, ranges: bytes) -> Iterator[bytes]:
    """The blocks that hold messages of these ranges, each once."""
    index, taken, end = shard.rows.index(txn, mailbox), 0, 0
    for low, high in pairs(ranges):
        if high <= end:
            continue
        for start, block in index.blocks(max(low, end + 1)):
            if start > high:
                break
            if start > taken:
                taken, end = start, RECORD.unpack_from(block, len(block) - RECORD_SIZE)[0]
                yield block


def after(shard: Readable, mailbox: int, uid: int, most: int) -> bytes:
    """Index records of a mailbox behind a UID, some `most` of them; none: there are no more."""
    found: list[bytes] = []
    octets = 0
    with shard.rows.reading() as txn:
        for _, block in shard.rows.index(txn, mailbox).blocks(uid + 1):
            found.append(block)
            octets += len(block)
            if octets >= most * RECORD_SIZE:
                break
    data = b"".join(found)
    return chosen(data, _range(uid + 1, LAST_UID)) if uid and data else data


def _range(low: int, high: int) -> bytes:
    return low.to_bytes(4, "little") + high.to_bytes(4, "little")


def marked(shard: Readable, mailbox: int, ranges: bytes, most: int) -> bytes:
    """The packed UIDs of those messages in packed ranges that have \\Deleted. Refusal (MISSING), TooMuch."""
    with shard.rows.reading() as txn:
        state = shard.rows.state(txn, mailbox)
        if state is None:
            raise Refusal(MISSING, "the mailbox has been deleted")
        if not state.deleted:
            return b""
        _check(state, most)
        found = b"".join(map(_deleted, _blocks(shard, txn, mailbox, ranges)))
    return load([chosen(found, ranges)])


def _deleted(block: bytes) -> bytes:
    """The records of a block that have \\Deleted."""
    return pick(block, select(block, DELETED, 0, 0, 0))


def deleted_octets(shard: Readable, mailbox: int) -> int:
    """The sizes of all messages with \\Deleted in a mailbox."""
    with shard.rows.reading() as txn:
        found = b"".join(_deleted(block) for _, block in shard.rows.index(txn, mailbox).blocks())
        rows = (shard.rows.message(txn, mailbox, uid) for uid, _, _, _ in RECORD.iter_unpack(found))
        return sum(row.size for row in rows if row is not None)


def messages(shard: Readable, mailbox: int, ranges: bytes) -> list[Message]:
    """The messages in packed ranges of UIDs, with their rows."""
    with shard.rows.reading() as txn:
        return _messages(shard, txn, mailbox, ranges)


def messages_now(shard: Readable, mailbox: int, ranges: bytes) -> tuple[list[Message], bytes | None]:
    """The same, and as of `raw_state`."""
    with shard.rows.reading() as txn:
        return _messages(shard, txn, mailbox, ranges), shard.rows.raw_state(txn, mailbox)


def _messages(shard: Readable, txn: Any, mailbox: int, ranges: bytes) -> list[Message]:
    found, rows, out = _found(shard, txn, mailbox, ranges), shard.rows, []
    for uid, _, flags, modseq in RECORD.iter_unpack(chosen(found, ranges)):
        row = rows.message(txn, mailbox, uid)
        body = rows.object(txn, row.object) if row is not None else None
        if row is not None and body is not None:
            out.append(Message(uid, flags, modseq, row, body))
    return out
