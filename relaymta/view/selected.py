"""The mailbox that an IMAP session has selected: what the store has of it, and what the client was told (proto/imap_view.py).

The view changes in three places alone, all of the one command (or the notice in IDLE) that is under way: `sync`, and where FETCH
and STORE note what they have told. Whoever waits meanwhile is not disturbed: no two of them run at once.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain

from relaymta.proto.imap_records import LAST_UID, values
from relaymta.proto.imap_response import mailboxid
from relaymta.proto.imap_view import Changes, Desynchronized, Mailbox, View
from relaymta.store.directory import User
from relaymta.store.reading import Readable
from relaymta.store.rows import MailboxState
from relaymta.view import reading
from relaymta.view.access import Access

__all__ = ["ALL", "Selected", "mailbox_id"]

ALL = (1).to_bytes(4, "little") + LAST_UID.to_bytes(4, "little")  # packed ranges: every UID


def mailbox_id(user: User, state: MailboxState) -> str:
    """MAILBOXID (RFC 8474 4): no other mailbox of the user, also none that was deleted, has had this UIDVALIDITY; and it stays
    when the mailbox is renamed, or the user moved."""
    return f"M{user.ident}-{state.uidvalidity}"


class Selected:
    """`mailbox`: its number in the user's shard; `view`: what the client was told; `claims`: messages that it is told
    of first are \\Recent (RFC 3501 2.3.2)."""

    __slots__ = ("_access", "_known", "_looked", "claims", "ident", "mailbox", "name", "shard", "user", "view")

    def __init__(self, access: Access, user: User, shard: Readable, opened: reading.Opened, view: View) -> None:
        self._access = access
        self.user = user
        self.shard = shard
        self.name = opened.row.name
        self.mailbox = opened.row.mailbox
        self.ident = mailbox_id(user, opened.state)
        self.view = view
        self._known = self._looked = b""  # rows of the mailbox's state that `view` has, and that was seen last; b"": not yet
        self.claims = not (view.read_only or view.rev2)

    @classmethod
    async def open(
        cls, access: Access, user: User, name: str, *, read_only: bool, rev2: bool, condstore: bool, qresync: bool
    ) -> "tuple[Selected, bytes]":
        """Select a mailbox; and the untagged responses that say what it has. Refusal (MISSING), Removed, StoreError."""
        shard = access.shard(user)

        def known(mailbox: int, modseq: int) -> bytes | None:
            there = access.shared.get((user.shard, mailbox), modseq)
            return None if there is None else there.data

        opened = await access.read_some(partial(reading.opened, shard, user.ident, name, known, not rev2))
        state = opened.state
        recent = state.uidnext
        if not rev2 and state.recent < state.uidnext:
            recent = await access.claim_recent(user, opened.row.mailbox, 0, state.uidnext, keep=read_only)
        shown = Mailbox(state.uidvalidity, state.uidnext, state.modseq, state.keywords, recent)
        view = View(
            access.shared, (user.shard, opened.row.mailbox), shown, opened.uids, condstore=condstore, qresync=qresync, rev2=rev2,
            read_only=read_only,
        )  # fmt: skip
        selected = cls(access, user, shard, opened, view)
        ident = b"* OK [%b] Mailbox id\r\n" % mailboxid(selected.ident)
        return selected, view.opened(opened.unseen) + ident

    def unchanged(self, raw: bytes | None = None) -> bool:
        """Whether there is nothing to tell: the mailbox's state is, octet for octet, what it was when `sync` looked last. `raw`:
        its row, where that has just been read. StoreError."""
        if raw is None:
            raw = self._access.read_here(partial(reading.raw_state, self.shard, self.mailbox))
        if raw is not None and raw == self._known and not self.view.holds:
            return True
        self._looked = raw or b""
        return False

    async def sync(self, may_expunge: bool) -> Iterator[bytes]:
        """What the client has to be told to know the mailbox as it is now; behind `unchanged`. Refusal (MISSING): it is gone;
        StoreError."""
        view, looked = self.view, self._looked
        changes = await self._changes(False)
        if changes.modseq == view.modseq and not view.holds:
            self._known = looked
            return iter(())
        if self.claims and changes.uidnext > view.uidnext:
            behind = 0 if view.recent == view.until else view.until
            first = await self._access.claim_recent(self.user, self.mailbox, behind, changes.uidnext)
            view.take_recent(first, changes.uidnext)
        try:
            told = view.advance(changes, may_expunge)
        except Desynchronized:
            changes = await self._changes(True)
            told = view.advance(changes, may_expunge)
        self._known = looked  # at last: what was not told because something failed is told the next time
        return told

    async def _changes(self, whole: bool) -> Changes:
        view = self.view
        return await self._access.read_some(
            partial(reading.changes, self.shard, self.mailbox, view.modseq, view.uidnext, whole, view.covers)
        )

    def enabled(self, condstore: bool, qresync: bool, rev2: bool) -> bytes:
        """What the client has enabled by now; what to write."""
        view, out = self.view, b""
        if condstore and not view.condstore:
            out = view.enable_condstore()
        view.qresync = view.qresync or qresync
        if rev2 and not view.rev2:
            view.rev2, view.recent, self.claims = True, view.until, False
        return out

    async def since(self, modseq: int) -> tuple[bytes, list[tuple[int, int]] | None]:
        """The records of messages above a MODSEQ, and the UIDs expunged above it (None: not all are remembered)."""

        def read(most: int) -> Changes:
            return reading.changes(self.shard, self.mailbox, modseq, LAST_UID, False, lambda modseq: False, most)

        changes = await self._access.read_some(read)
        return changes.records, None if changes.expunged is None else list(chain(changes.expunged))

    async def marked(self, ranges: bytes) -> list[int]:
        """The UIDs of messages with \\Deleted in packed ranges. Refusal (MISSING), StoreError."""
        return values(await self._access.read_some(partial(reading.marked, self.shard, self.mailbox, ranges))).tolist()
