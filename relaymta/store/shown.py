"""What operators see of a user's mailboxes."""

from typing import Any

from relaymta.errors import StoreError
from relaymta.proto.header import fields, header_end
from relaymta.store.change import MISSING, Refusal
from relaymta.store.reading import Readable, data_of
from relaymta.store.rows import ANSWERED, DELETED, DRAFT, FLAGGED, SEEN, SYSTEM_FLAGS, MailboxState

__all__ = ["flags_from", "flags_of", "shown"]

MESSAGES_MOST = 10_000  # of a mailbox
SUBJECT_SHOWN = 60
_NAMES = {SEEN: "\\Seen", ANSWERED: "\\Answered", FLAGGED: "\\Flagged", DELETED: "\\Deleted", DRAFT: "\\Draft"}


def flags_from(names: list[str]) -> int:
    """The bits of system flags by their names; others do not count."""
    return sum(bit for bit, name in _NAMES.items() if name in names)


def flags_of(flags: int, state: MailboxState) -> list[str]:
    """The names of flags and keywords."""
    found = [name for bit, name in _NAMES.items() if flags & bit]
    return found + [word for number, word in enumerate(state.keywords) if flags >> (SYSTEM_FLAGS + number) & 1]


def shown(shard: Readable, user: int, messages: bool) -> dict[str, Any]:
    """A user's mailboxes, and what is used. `messages`: with the first messages of each. Blocks. Refusal: no such user."""
    rows = shard.rows
    with rows.reading() as txn:
        owner = rows.user(txn, user)
        if owner is None:
            raise Refusal(MISSING, "no such user")
        found = [(row, state) for row in rows.mailboxes(txn, user) if (state := rows.state(txn, row.mailbox)) is not None]
    mailboxes = []
    for row, state in found:
        one: dict[str, Any] = {
            "name": row.name, "special": row.special, "messages": state.messages, "unseen": state.unseen, "octets": state.octets,
        }  # fmt: skip
        if messages:
            one["list"] = _messages(shard, row.mailbox, state)
        mailboxes.append(one)
    return {"octets": owner.octets, "messages": owner.messages, "mailboxes": mailboxes}


def _messages(shard: Readable, mailbox: int, state: MailboxState) -> list[dict[str, Any]]:
    rows = shard.rows
    with rows.reading() as txn:
        records = [record for record, _ in zip(rows.index(txn, mailbox), range(MESSAGES_MOST), strict=False)]
        pairs = [(record, rows.message(txn, mailbox, record.uid)) for record in records]
    found = []
    for record, message in pairs:
        if message is None:
            continue
        try:
            data = data_of(rows, shard.bodies, message)
            subject = next((text for name, text in fields(data[: header_end(data)]) if name == b"subject"), "")
        except (StoreError, Refusal) as error:
            subject = f"({error})"
        found.append(
            {"uid": record.uid, "size": message.size, "flags": flags_of(record.flags, state), "date": message.date / 1000,
             "subject": subject[:SUBJECT_SHOWN]}
        )  # fmt: skip
    return found
