"""The connection of a POP3 client: what it does beside what all do (accept/client.py).

The maildrop of a user is one session's from login (`_open`) to its end: the seat is a unit of a limit that all workers share.
What RETR has sent becomes \\Seen, and what DELE has marked is removed at QUIT, each by the owner of the shard.
"""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar

from relaymta.accept.admission import Admission
from relaymta.accept.client import STRESS_PATIENCE, ClientConnection
from relaymta.accept.line import BLOCKED, CHECKING, COMMITTING, OUTPUT_SECONDS, SHAKING
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
from relaymta.reservation import Reservation
from relaymta.store.change import Refusal
from relaymta.store.directory import User
from relaymta.view.access import Access, Inbox

__all__ = ["Pop3Connection"]

SESSIONS = index("relaymta_mailbox_sessions_total", "pop3")
READ = index("relaymta_mailbox_messages_read_total")
READ_OCTETS = index("relaymta_mailbox_read_octets_total")
EXPUNGED = index("relaymta_mailbox_expunged_total")

IDLE_SECONDS = 600.0  # RFC 1939 3: at least ten minutes
LOGIN_SECONDS = 60.0  # for the login, from the greeting or the end of TLS, whatever the client says meanwhile


class Pop3Connection(ClientConnection[ServerSession]):
    """`_user`, `_inbox`, `_seat`: set by the login; `_leave` gives back the seat."""

    __slots__ = ("_access", "_began", "_greeted_at", "_inbox", "_seat", "_user", "_writable")

    def __init__(self, access: Access, admission: Admission, listener: Listener) -> None:
        super().__init__(admission, listener)
        self._access = access
        self._user: User | None = None
        self._inbox: Inbox | None = None
        self._seat: Reservation | None = None
        self._began = 0.0  # the login (loop time)
        self._greeted_at = 0.0  # the greeting, or the end of TLS (loop time)
        self._writable = asyncio.Event()  # the client has read what was written
        self._writable.set()

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        endpoint = self.admission.endpoint
        self._greeted_at = self.admission.now()
        return ServerSession(self.admission.intake.hostname, endpoint.offers(self.listener, False), endpoint.keys, secure)

    def refusal(self, answer: bytes) -> bytes:
        return reply.of_login(answer)

    def secured(self, described: str) -> None:
        self._greeted_at = self.admission.now()
        if not self.waits & BLOCKED:  # what was written before the handshake has been read
            self._writable.set()

    # Steps: each returns what to write

    def _begin(self, step: Callable[[ServerSession], Coroutine[Any, Any, bytes]], session: ServerSession) -> None:
        """Run a step that takes long; nothing is parsed meanwhile. It goes on when the client has gone."""
        self.waits |= COMMITTING
        self.pause()
        self.admission.spawn(self._run(step, session))

    async def _run(self, step: Callable[[ServerSession], Coroutine[Any, Any, bytes]], session: ServerSession) -> None:
        out = b""
        try:
            out = await step(session)
        except Exception as error:  # a defect: this session ends, the others go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._warn(f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})")
            session.close()
        finally:
            self.waits &= ~COMMITTING
            self.active_at = self.admission.now()
            if self.gone:
                self._leave()
        if not self.gone:
            self.more(session, out)

    async def _open(self, session: ServerSession) -> bytes:
        """The user has logged in: take the seat, and a snapshot of INBOX."""
        found: Maildrop | bytes = reply.UNAVAILABLE
        try:
            found = await self._maildrop()
        except (StoreError, Refusal) as error:
            self._warn(f"the maildrop cannot be opened: {error}")
        if isinstance(found, bytes):
            self._leave()
            if self.rights is not None:
                self.rights.log_out()
        return session.opened(found)

    async def _maildrop(self) -> Maildrop | bytes:
        assert self.rights is not None
        self._user = user = self._access.user(self.rights.user)
        if user is None:
            return reply.NO_MAILDROP
        seat = f"pop3 {user.ident}"
        if not self.admission.limits.take(seat, 1):
            return reply.IN_USE
        self._seat = Reservation(partial(self.admission.limits.give, seat))
        self._inbox = inbox = await self._access.inbox(user)
        self._began = self.admission.now()
        self.admission.intake.counters.add(SESSIONS, 1)
        return Maildrop(inbox.uidvalidity, inbox.uids, inbox.sizes)

    async def _send(self, session: ServerSession) -> bytes:
        """Send the message that is wanted, as fast as the client reads."""
        if session.wanted is None:  # the client has gone meanwhile
            return b""
        counters = self.admission.intake.counters
        counters.add(READ, 1)
        try:
            octets = await self._pieces(session)
        except Refusal:
            return session.refused(reply.MESSAGE_GONE)
        except StoreError as error:
            self._warn(f"a message cannot be read: {error}")
            return session.refused(reply.MESSAGE_UNAVAILABLE)
        counters.add(READ_OCTETS, octets)
        return session.sent()

    async def _pieces(self, session: ServerSession) -> int:
        wanted, user, inbox, octets = session.wanted, self._user, self._inbox, 0
        assert wanted is not None and user is not None and inbox is not None
        async with aclosing(self._access.message(user, inbox.mailbox, wanted.uid, whole=wanted.lines is None)) as pieces:
            async for piece in pieces:
                octets += len(piece)
                self.write(session.piece(piece))
                if wanted.enough:
                    break
                await self._writable.wait()
                self.active_at = self.admission.now()
                if self.gone:
                    break
        return octets

    async def _quit(self, session: ServerSession) -> bytes:
        """QUIT: remove what is marked, in one operation. Another session may have the maildrop once the client has the reply."""
        uids, left = list(session.deletions), 0
        if uids:
            left = await self._left_by_expunge(uids)
            self.admission.intake.counters.add(EXPUNGED, len(uids) - left)
        self._leave()
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
            self._warn(f"messages could not be removed: {error}")
            return len(uids)
        except (RelayError, ConnectionError) as error:
            self._warn(f"messages could not be removed: {error}")
        try:
            return await self._access.left(user, inbox.mailbox, uids)
        except (StoreError, Refusal):
            return len(uids)

    # The end

    def connection_lost(self, exc: Exception | None) -> None:
        session = self.session
        super().connection_lost(exc)
        self._writable.set()
        if session is not None and session.maildrop is not None:
            self._log(session, session.maildrop)
            retrieved = sorted(session.maildrop.retrieved)
            if retrieved and self._user is not None and self._inbox is not None:
                self.admission.spawn(self._saw(self._user, self._inbox.mailbox, retrieved))
        if not self.waits & COMMITTING:  # else the step that is under way ends with it
            self._leave()

    def _leave(self) -> None:
        """The maildrop is free for another session. Further calls do nothing."""
        if self._seat is not None:
            self._seat.give_back()

    async def _saw(self, user: User, mailbox: int, uids: list[int]) -> None:
        try:
            await self._access.see(user, mailbox, uids)
        except (RelayError, ConnectionError) as error:
            self._warn(f"\\Seen could not be set: {error}")

    def _log(self, session: ServerSession, maildrop: Maildrop) -> None:
        assert self.rights is not None and self._user is not None
        self.admission.intake.log.event(
            "session", protocol="pop3", client=self.rights.client.address, user=self._user.address,
            seconds=round(self.admission.now() - self._began, 3), retrieved=len(maildrop.retrieved),
        )  # fmt: skip

    def _warn(self, text: str) -> None:
        user = self._user.address if self._user is not None else ""
        self.admission.intake.log.event("warning", text=f"POP3 session of {user}: {text}")

    # Deadlines

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writable.clear()

    def go_on(self, reason: int) -> None:
        if reason == BLOCKED:
            self._writable.set()
        super().go_on(reason)

    def check(self, now: float) -> None:
        session, patience = self.session, STRESS_PATIENCE if self.admission.stressed else 1.0
        if self.check_output(now, OUTPUT_SECONDS * patience):
            return
        if self.admission.intake.draining:
            self.drain()
        if self.gone or session is None or self.waits & (COMMITTING | CHECKING | SHAKING):
            return
        if session.maildrop is not None:
            late = now - self.active_at > IDLE_SECONDS
        else:
            late = now - self._greeted_at > LOGIN_SECONDS * patience
        if late:
            self._close(session)  # without a reply (RFC 1939 3)

    def _close(self, session: ServerSession, answer: bytes = b"") -> None:
        if not session.within_reply:
            self.write(answer)
        session.close()
        self.close()

    def drain(self) -> None:
        session = self.session
        if session is None or self.gone or self.waits & (COMMITTING | SHAKING):
            return
        out, self.delayed = self.delayed, b""
        self._close(session, out + reply.SHUTTING_DOWN)

    steps: ClassVar[dict[int, Callable[[Any, Any], None]]] = {
        TLS: ClientConnection.start_tls,
        CLAIMED: ClientConnection.log_in,
        OPENING: lambda self, session: self._begin(self._open, session),
        SENDING: lambda self, session: self._begin(self._send, session),
        COMMITTED: lambda self, session: self._begin(self._quit, session),
    }
