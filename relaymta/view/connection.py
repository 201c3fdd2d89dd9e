"""The connection of a user who reads mail, whatever the client speaks: the seat among the sessions of the user, what is written
as fast as the client reads, how long a login and silence may take, and its end: also that of the sessions of a user who is
disabled, deleted or moved, which is looked for whenever the directory has changed.

`_user` and `_seat` are set by the login; `leave` gives back the seat. `_unwanted` is set by `disconnect`. `_writable` is cleared
by the transport alone, while the client does not read, and set when it does, or is gone.
"""

import asyncio
import contextlib
import time
import traceback
from functools import partial
from typing import Any, ClassVar, TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.client import STRESS_PATIENCE, AnySession, ClientConnection
from relaymta.accept.line import BLOCKED, CHECKING, COMMITTING, OUTPUT_SECONDS, SHAKING, SPILLING
from relaymta.config import Listener
from relaymta.errors import StoreError
from relaymta.metrics import index
from relaymta.reservation import Reservation
from relaymta.store.directory import User
from relaymta.view.access import Access

__all__ = ["LOGIN_SECONDS", "READ", "READ_OCTETS", "ReadingConnection"]

READ = index("relaymta_mailbox_messages_read_total")
READ_OCTETS = index("relaymta_mailbox_read_octets_total")

LOGIN_SECONDS = 60.0  # for the login, from the greeting or the end of TLS, whatever the client says meanwhile
NO_MAILBOXES = b"550 5.7.1 No mail is kept for this user\r\n"
TOO_MANY_SESSIONS = b"454 4.7.0 Too many sessions of this user; close one, or try again later\r\n"

S = TypeVar("S", bound=AnySession)


class ReadingConnection(ClientConnection[S]):
    """`protocol`: as log records name it; `silence`: seconds after which a user who says nothing is logged out; `too_late`,
    `shutting_down`, `dismissed`: what the client is told then, when we shut down, and when the user may not go on."""

    protocol: ClassVar[str]
    silence: ClassVar[float]
    too_late: ClassVar[bytes]
    shutting_down: ClassVar[bytes]
    dismissed: ClassVar[bytes]

    __slots__ = ("_access", "_began", "_greeted_at", "_looks", "_seat", "_unwanted", "_user", "_version", "_writable")

    def __init__(self, access: Access, admission: Admission, listener: Listener) -> None:
        super().__init__(admission, listener)
        self._access = access
        self._user: User | None = None
        self._seat: Reservation | None = None
        self._began = 0.0  # the login (loop time)
        self._unwanted = False  # it ends with the command under way
        self._version = -1  # of the directory by which the user may go on
        self._looks = False  # it is about to be looked up whether the user may
        self._greeted_at = 0.0  # the greeting, or the end of TLS (loop time)
        self._writable = asyncio.Event()  # the client has read what was written
        self._writable.set()

    def secured(self, described: str) -> None:
        self._greeted_at = self.admission.now()
        if not self.waits & BLOCKED:  # what was written before the handshake has been read
            self._writable.set()

    def logged_in(self, session: S) -> bool:
        """Whether a user has logged in."""
        raise NotImplementedError

    def seated(self) -> User | bytes:
        """The user who logs in, and who may have another session; or the reply of SMTP that refuses that."""
        assert self.rights is not None
        user = self._access.user(self.rights.user)
        if user is None:
            return NO_MAILBOXES
        return user if self.sit(user, self.admission.config.limits.sessions_per_user) else TOO_MANY_SESSIONS

    def sit(self, user: User, most: int) -> bool:
        """The session of a user begins; whether the user has fewer than `most`, in all processes."""
        seat = f"{self.protocol} {user.ident}"
        if not self.admission.limits.take(seat, most):
            return False
        self._version = -1  # it may have changed since the user was looked up
        self._user, self._seat = user, Reservation(partial(self._rise, seat))
        self._access.sessions[self.protocol] += 1
        self._access.open[self] = None
        self._began = self.admission.now()
        self.admission.intake.counters.add(index("relaymta_mailbox_sessions_total", self.protocol), 1)
        return True

    def _rise(self, seat: str) -> None:
        self._access.sessions[self.protocol] -= 1
        self._access.open.pop(self, None)
        self.admission.limits.give(seat)

    def leave(self) -> None:
        """Another session may have the seat. Further calls do nothing."""
        if self._seat is not None:
            self._seat.give_back()

    def linger(self) -> None:
        """As of Line: nothing is done for the client any more, so that another session need not wait."""
        super().linger()
        if not self.waits & (COMMITTING | SPILLING):  # else what is under way ends with it
            self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._writable.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writable.clear()

    def go_on(self, reason: int) -> None:
        if reason == BLOCKED:
            self._writable.set()
        super().go_on(reason)

    def warn(self, text: str) -> None:
        """Log what the user's session could not do."""
        user = self._user.address if self._user is not None else ""
        self.admission.intake.log.event("warning", text=f"{self.protocol.upper()} session of {user}: {text}")

    def mistaken(self, error: Exception) -> None:
        """Log a defect of ours, with the place of it."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.warn(f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})")

    def log_change(self, action: str, mailbox: str, messages: int = 0, into: str = "") -> None:
        """Log what the user has done with a mailbox: with so many messages, or (0) with the mailbox itself."""
        assert self.rights is not None and self._user is not None
        self.admission.intake.log.event(
            "changed", protocol=self.protocol, client=self.rights.client.address, user=self._user.address, action=action,
            mailbox=mailbox, into=into, messages=messages,
        )  # fmt: skip

    def log_session(self, **fields: object) -> None:
        """Log the end of a session; `fields`: what it has done."""
        assert self.rights is not None and self._user is not None
        self.admission.intake.log.event(
            "session", protocol=self.protocol, client=self.rights.client.address, user=self._user.address,
            seconds=round(self.admission.now() - self._began, 3), **fields,
        )  # fmt: skip

    # For operators

    @property
    def owner(self) -> int:
        """The id of the user who has logged in; 0: nobody has."""
        return self._user.ident if self._user is not None else 0

    def shown(self) -> dict[str, Any]:
        """The session as operators see it; once somebody has logged in. `since`: the login (seconds UTC); `silent`: seconds since
        the client last sent something, or read what it was sent."""
        assert self.rights is not None and self._user is not None
        now, tls = self.admission.now(), None
        if self.transport is not None:
            tls = self.transport.get_extra_info("ssl_object")
        return {
            "user": self._user.address, "protocol": self.protocol, "client": self.rights.client.address,
            "tls": (tls.version() or "") if tls is not None else "", "since": round(time.time() - (now - self._began), 3),
            "silent": round(max(0.0, now - self.active_at), 1), "state": "command" if self.waits & COMMITTING else "waits",
            "mailbox": "", "commands": 0, "retrieved": 0, "program": "", **self.doing(),
        }  # fmt: skip

    def doing(self) -> dict[str, Any]:
        """What is not of all protocols in `shown`."""
        return {}

    def disconnect(self) -> None:
        """End the session: at once, or once the command under way has ended. A command of which a part has not come yet is not
        under way, as when we shut down."""
        self._unwanted = True
        session = self.session
        if session is not None and not self.gone and not self.waits & (COMMITTING | SHAKING | SPILLING):
            out, self.delayed = self.delayed, b""
            self.write(out)
            self.end(session, self.dismissed)

    def done(self, session: S, out: bytes) -> None:
        """A command has ended, with the reply `out`: go on, or (`disconnect`) end the session."""
        if self._unwanted and not session.closing:
            self.write(out)
            self.end(session, self.dismissed)
        else:
            self.more(session, out)

    # Deadlines, and the end

    def check(self, now: float) -> None:
        patience = STRESS_PATIENCE if self.admission.stressed else 1.0
        if self.check_output(now, OUTPUT_SECONDS * patience):
            return
        if self.admission.intake.draining:
            self.drain()
        elif self._unwanted:
            self.disconnect()
        session = self.session
        if self.gone or session is None or self.waits & (COMMITTING | CHECKING | SHAKING | SPILLING):
            return
        if self.logged_in(session):
            late = now - self.active_at > self.silence
        else:
            late = now - self._greeted_at > LOGIN_SECONDS * patience
        if late:
            self.end(session, self.too_late)
        else:
            self.look_after(session, now)
            self._look(session)

    def _look(self, session: S) -> None:
        """Look whether the user may go on, where the directory has changed: one connection in each turn of the loop."""
        version = self._access.version
        if self.logged_in(session) and not self._looks and (version != self._version or version < 0):
            self._looks = True
            self.admission.turns.wait(self._look_up)

    def _look_up(self) -> None:
        self._looks = False
        session, version = self.session, self._access.version
        if self.gone or session is None or not self.logged_in(session) or self.waits & (COMMITTING | CHECKING | SPILLING):
            return
        with contextlib.suppress(StoreError):  # looked up again
            if self.allowed():
                self._version = version
            else:
                self.end(session, self.dismissed)

    def allowed(self) -> bool:
        """Whether the user who has logged in may go on: False when the directory says disabled, deleted, or moved since the
        login. Looked up where the directory has changed since it was last. StoreError."""
        assert self._user is not None
        version = self._access.version  # before the look: what is changed meanwhile is looked up again
        if version == self._version and version >= 0:
            return True
        if self._access.stayed(self._user) is None:
            return False
        self._version = version
        return True

    def look_after(self, session: S, now: float) -> None:
        """Called with the deadlines, of which none has passed, while nothing is waited for."""

    def drain(self) -> None:
        session = self.session
        if session is None or self.gone or self.waits & (COMMITTING | SHAKING | SPILLING):
            return
        out, self.delayed = self.delayed, b""
        self.end(session, out + self.shutting_down)

    def end(self, session: S, last: bytes) -> None:
        """Close the connection, with a last word."""
        if not self.gone:
            self.write(last)
            session.close()
            self.linger()
