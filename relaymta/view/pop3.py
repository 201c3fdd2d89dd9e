"""The connection of a POP3 client: what it does beside what all do (accept/client.py).

The maildrop of a user is one session's from login (`_open`) to its end: the seat is a unit of a limit that all workers share.
What RETR has sent becomes \\Seen, and what DELE has marked is removed at QUIT, each by the owner of the shard.
"""

from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, ClassVar

from relaymta.accept.admission import Admission
from relaymta.accept.client import ClientConnection
from relaymta.accept.line import COMMITTING
from relaymta.accept.rights import Rights
from relaymta.config import Listener
from relaymta.control import Refused
from relaymta.errors import RelayError, StoreError
from relaymta.metrics import index
from relaymta.proto import pop3_reply as reply
from relaymta.proto.pop3_maildrop import Maildrop
from relaymta.proto.pop3_server import ServerSession
from relaymta.proto.pop3_session import CLAIMED, OPENING, SENDING, TLS
from relaymta.proto.pop3_session import COMMITTING as COMMITTED
from relaymta.store.change import Refusal
from relaymta.store.directory import User
from relaymta.store.rows import INBOX
from relaymta.view.access import Access, Inbox
from relaymta.view.connection import READ, READ_OCTETS, ReadingConnection

__all__ = ["Pop3Connection"]

EXPUNGED = index("relaymta_mailbox_expunged_total")

IDLE_SECONDS = 600.0  # RFC 1939 3: at least ten minutes


class Pop3Connection(ReadingConnection[ServerSession]):
    """`_inbox`: set by the login."""

    protocol = "pop3"
    silence = IDLE_SECONDS
    too_late = b""  # RFC 1939 3: without a reply
    shutting_down = reply.SHUTTING_DOWN
    dismissed = reply.DISMISSED

    __slots__ = ("_inbox",)

    def __init__(self, access: Access, admission: Admission, listener: Listener) -> None:
        super().__init__(access, admission, listener)
        self._inbox: Inbox | None = None

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        endpoint = self.admission.endpoint
        self._greeted_at = self.admission.now()
        return ServerSession(self.admission.intake.hostname, endpoint.offers(self.listener, False), endpoint.keys, secure)

    def refusal(self, answer: bytes) -> bytes:
        return reply.of_login(answer)

    def logged_in(self, session: ServerSession) -> bool:
        return session.maildrop is not None

    def doing(self) -> dict[str, Any]:
        maildrop = self.session.maildrop if self.session is not None else None
        return {"mailbox": INBOX, "retrieved": len(maildrop.retrieved) if maildrop is not None else 0}

    # Steps: each returns what to write

    def _begin(self, step: Callable[[ServerSession], Coroutine[Any, Any, bytes]], session: ServerSession) -> None:
        """Run a step; nothing is parsed meanwhile. It goes on when the client has gone."""
        self.waits |= COMMITTING
        self.run(self._run(step, session))
        if self.waits & COMMITTING:
            self.pause()

    async def _run(self, step: Callable[[ServerSession], Coroutine[Any, Any, bytes]], session: ServerSession) -> None:
        out = b""
        try:
            if self.logged_in(session) and not self.allowed():
                session.dismiss()
                out = reply.DISMISSED
            else:
                out = await step(session)
        except Exception as error:  # a defect: this session ends, the others go on
            self.mistaken(error)
            session.dismiss()
        finally:
            self.waits &= ~COMMITTING
            self.active_at = self.admission.now()
            if self.gone:
                self.leave()
        if not self.gone:
            self.done(session, out)

    async def _open(self, session: ServerSession) -> bytes:
        """The user has logged in: take the seat, and a snapshot of INBOX."""
        found: Maildrop | bytes = reply.UNAVAILABLE
        try:
            found = await self._maildrop()
        except (StoreError, Refusal) as error:
            self.warn(f"the maildrop cannot be opened: {error}")
        if isinstance(found, bytes):
            self.leave()
            if self.rights is not None:
                self.rights.log_out()
        return session.opened(found)

    async def _maildrop(self) -> Maildrop | bytes:
        assert self.rights is not None
        user = self._access.user(self.rights.user)
        if user is None:
            return reply.NO_MAILDROP
        if not self.sit(user, 1):
            return reply.IN_USE
        self._inbox = inbox = await self._access.inbox(user)
        return Maildrop(inbox.uidvalidity, inbox.uids, inbox.sizes)

    async def _send(self, session: ServerSession) -> bytes:
        """Send the message that is wanted, as fast as the client reads."""
        if session.wanted is None:  # the client has gone meanwhile
            return b""
        self.admission.intake.counters.add(READ, 1)
        try:
            last = await self._pieces(session)
        except (Refusal, StoreError) as error:
            return self._unsent(session, error)
        return b"" if self.gone else last + session.sent()  # to one who has gone it was not sent

    def _unsent(self, session: ServerSession, error: Refusal | StoreError) -> bytes:
        """A message could not be read: as the user may have been moved meanwhile, what is not seen here is not gone."""
        if not session.within_reply and not self.allowed():
            session.dismiss()
            return reply.DISMISSED
        if isinstance(error, Refusal):
            return session.refused(reply.MESSAGE_GONE)
        self.warn(f"a message cannot be read: {error}")
        return session.refused(reply.MESSAGE_UNAVAILABLE)

    async def _pieces(self, session: ServerSession) -> bytes:
        """Write the message but for its last piece, which is written together with what follows it. That is returned."""
        wanted, user, inbox, last = session.wanted, self._user, self._inbox, b""
        counters = self.admission.intake.counters
        assert wanted is not None and user is not None and inbox is not None
        async with aclosing(self._access.message(user, inbox.mailbox, wanted.uid, whole=wanted.lines is None)) as pieces:
            async for piece in pieces:
                if last:
                    self.write(last)
                    if not await self._written():
                        break
                counters.add(READ_OCTETS, len(piece))
                last = session.piece(piece)
                if wanted.enough:
                    break
        return last

    async def _written(self) -> bool:
        """Wait until the client has read what was written; False: it has gone."""
        if not self._writable.is_set():
            await self._writable.wait()
            self.active_at = self.admission.now()
        return not self.gone

    async def _quit(self, session: ServerSession) -> bytes:
        """QUIT: remove what is marked, in one operation. Another session may have the maildrop once the client has the reply."""
        uids, left = list(session.deletions), 0
        if uids:
            left = await self._left_by_expunge(uids)
            self.admission.intake.counters.add(EXPUNGED, len(uids) - left)
            if left < len(uids):
                self.log_change("expunge", INBOX, len(uids) - left)
        self.leave()
        return session.committed(left)

    async def _left_by_expunge(self, uids: list[int]) -> int:
        """Remove messages; how many of them are there still. What was refused has removed nothing, even where nothing of it is
        seen here (the user has been moved); after other errors it may have been done."""
        user, inbox = self._user, self._inbox
        assert user is not None and inbox is not None
        try:
            await self._access.expunge(user, inbox.mailbox, uids)
            return 0
        except (Refusal, Refused) as error:
            self.warn(f"messages could not be removed: {error}")
            return len(uids)
        except (RelayError, ConnectionError) as error:
            self.warn(f"messages could not be removed: {error}")
        try:
            return await self._access.left(user, inbox.mailbox, uids)
        except (StoreError, Refusal):
            return len(uids)

    # The end

    def connection_lost(self, exc: Exception | None) -> None:
        session = self.session
        super().connection_lost(exc)
        if not self.waits & COMMITTING:  # else the step that is under way ends with it
            self.leave()
        if session is not None and session.maildrop is not None:
            self.log_session(retrieved=len(session.maildrop.retrieved))
            retrieved = sorted(session.maildrop.retrieved)
            if retrieved and self._user is not None and self._inbox is not None:
                self.run(self._saw(self._user, self._inbox.mailbox, retrieved))

    async def _saw(self, user: User, mailbox: int, uids: list[int]) -> None:
        try:
            unseen = await self._access.unseen(user, mailbox, uids)
            if unseen:
                await self._access.see(user, mailbox, unseen)
        except (RelayError, ConnectionError) as error:
            self.warn(f"\\Seen could not be set: {error}")
        except Exception as error:
            self.mistaken(error)

    def end(self, session: ServerSession, last: bytes) -> None:
        super().end(session, b"" if session.within_reply else last)

    steps: ClassVar[dict[int, Callable[[Any, Any], None]]] = {
        TLS: ClientConnection.start_tls,
        CLAIMED: ClientConnection.log_in,
        OPENING: lambda self, session: self._begin(self._open, session),
        SENDING: lambda self, session: self._begin(self._send, session),
        COMMITTED: lambda self, session: self._begin(self._quit, session),
    }
