"""What the owner of a shard of mailboxes was told, and what a shard must hold and must not hold after that."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from relaymta.store.shard import Shard
from relaymta.store.verify import contradictions

__all__ = ["Box", "Ledger", "digest_of"]

Fact = list[Any]  # a word, and what it is about


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Box:
    """One mailbox, by what was acknowledged."""

    user: int
    name: str
    uidvalidity: int
    uidnext: int = 1
    modseq: int = 1
    messages: dict[int, str] = field(default_factory=dict)  # UID: digest
    doubtful: set[int] = field(default_factory=set)  # an expunge of these was asked for and not acknowledged
    gone: set[int] = field(default_factory=set)
    leaving: bool = False  # its removal was asked for and not acknowledged


class Ledger:
    """Facts, and what follows from them. A fact that ends in "?" is told before the change is asked for (from then on it may have
    happened), any other once it was acknowledged."""

    def __init__(self) -> None:
        self.boxes: dict[int, Box] = {}  # by the mailbox's id, which is never used again
        self.removed: set[int] = set()
        self.offered: set[str] = set()  # digests of all messages that may be there
        self.done: set[tuple[int, int, int]] = set()
        self.forgotten: set[int] = set()  # queue ids
        self.identity: dict[tuple[int, int, int], str] = {}  # the digest of each (user, UIDVALIDITY, UID) that was ever seen

    def tell(self, word: str, *what: Any) -> None:
        """Take a fact."""
        getattr(self, f"_{word.replace('?', '_asked')}")(*what)

    def _offered(self, digests: list[str]) -> None:
        self.offered.update(digests)

    def _mailbox(self, user: int, name: str, mailbox: int, uidvalidity: int) -> None:
        if mailbox not in self.removed:
            self.boxes.setdefault(mailbox, Box(user, name, uidvalidity))

    def _filed(self, user: int, name: str, place: list[int], digest: str) -> None:
        mailbox, uidvalidity, uid, modseq = place
        self._name(user, uidvalidity, uid, digest)
        if mailbox in self.removed:
            return
        box = self.boxes.setdefault(mailbox, Box(user, name, uidvalidity))
        assert box.uidvalidity == uidvalidity and uid not in box.messages, "a UID was given twice"
        box.uidnext, box.modseq = max(box.uidnext, uid + 1), max(box.modseq, modseq)
        if uid not in box.gone:
            box.messages[uid] = digest

    def _name(self, user: int, uidvalidity: int, uid: int, digest: str) -> None:
        assert self.identity.setdefault((user, uidvalidity, uid), digest) == digest, "one (UIDVALIDITY, UID) of two messages"

    def _expunged_asked(self, mailbox: int, uids: list[int]) -> None:
        if mailbox in self.boxes:
            self.boxes[mailbox].doubtful.update(uids)

    def _expunged(self, mailbox: int, uids: list[int], modseq: int) -> None:
        if mailbox in self.removed:
            return
        box = self.boxes[mailbox]
        box.gone.update(uids)
        box.modseq = max(box.modseq, modseq)
        for uid in uids:
            box.messages.pop(uid, None)

    def _removed_asked(self, mailbox: int) -> None:
        if mailbox in self.boxes:
            self.boxes[mailbox].leaving = True

    def _removed(self, mailbox: int) -> None:
        self.boxes.pop(mailbox, None)
        self.removed.add(mailbox)

    def _done(self, queue_id: int, recipient: int, user: int) -> None:
        if queue_id not in self.forgotten:
            self.done.add((queue_id, recipient, user))

    def _forgotten_asked(self, queue_id: int) -> None:
        self.forgotten.add(queue_id)
        self.done = {row for row in self.done if row[0] != queue_id}

    @property
    def messages(self) -> int:
        """How many messages must be there."""
        return sum(len(box.messages.keys() - box.doubtful) for box in self.boxes.values() if not box.leaving)

    # What a shard has to be like

    def check(self, shard: Shard) -> None:
        """A shard that has been opened holds what was acknowledged, nothing that must be gone, and no contradiction."""
        wrong = [*contradictions(shard.rows, shard.segments), *self._wrong(shard)]
        assert not wrong, wrong[:5]

    def _wrong(self, shard: Shard) -> Iterator[str]:
        rows = shard.rows
        with rows.reading() as txn:
            for mailbox in self.removed:
                if rows.state(txn, mailbox) is not None:
                    yield f"mailbox {mailbox} was removed and is there"
            names = {row.mailbox: (user, row.name) for user, _ in rows.users(txn) for row in rows.mailboxes(txn, user)}
            states = {mailbox: rows.state(txn, mailbox) for mailbox in names if mailbox}
            messages = {mailbox: list(rows.messages(txn, mailbox)) for mailbox in states}
            yield from (f"{row} was filed, and may be filed again" for row in self.done if not rows.is_done(txn, *row))
        for mailbox, state in states.items():
            found = {uid: digest_of(shard.data(row)[len(row.prefix) :]) for uid, row in messages[mailbox]}
            for uid, digest in found.items():
                self._name(names[mailbox][0], state.uidvalidity, uid, digest)
                if digest not in self.offered:
                    yield f"mailbox {mailbox}: UID {uid} is a message that nobody has filed"
            box = self.boxes.get(mailbox)
            if box is not None:
                yield from (f"mailbox {mailbox}: {what}" for what in _differences(box, names[mailbox], state, found))
        yield from (f"{box} is lost" for mailbox, box in self.boxes.items() if not box.leaving and mailbox not in states)
        validities = Counter((names[mailbox][0], state.uidvalidity) for mailbox, state in states.items())
        yield from (f"two mailboxes of user {user} have UIDVALIDITY {v}" for (user, v), count in validities.items() if count > 1)


def _differences(box: Box, name: tuple[int, str], state: Any, found: dict[int, str]) -> Iterator[str]:
    if (name, state.uidvalidity) != ((box.user, box.name), box.uidvalidity):
        yield f"it was {box.name} of user {box.user}, UIDVALIDITY {box.uidvalidity}, and is {name}, {state.uidvalidity}"
    if state.uidnext < box.uidnext or state.modseq < box.modseq:
        yield f"UIDNEXT {state.uidnext} and MODSEQ {state.modseq} were {box.uidnext} and {box.modseq}"
    if box.gone & found.keys():
        yield f"the UIDs {sorted(box.gone & found.keys())} were expunged and are back"
    for uid, digest in box.messages.items():
        if found.get(uid, "" if uid in box.doubtful or box.leaving else "lost") not in (digest, ""):
            yield f"UID {uid} is lost, or another message"
