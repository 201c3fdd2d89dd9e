"""The connection of a user who reads mail, whatever the client speaks: the seat among the sessions of the user, what is written
as fast as the client reads, and how long a login may take.

`_user` and `_seat` are set by the login; `leave` gives back the seat. `_writable` is cleared by the transport alone, while the
client does not read, and set when it does, or is gone.
"""

import asyncio
from functools import partial
from typing import ClassVar, TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.client import AnySession, ClientConnection
from relaymta.accept.line import BLOCKED
from relaymta.config import Listener
from relaymta.metrics import index
from relaymta.reservation import Reservation
from relaymta.store.directory import User
from relaymta.view.access import Access

__all__ = ["LOGIN_SECONDS", "READ", "READ_OCTETS", "ReadingConnection"]

READ = index("relaymta_mailbox_messages_read_total")
READ_OCTETS = index("relaymta_mailbox_read_octets_total")

LOGIN_SECONDS = 60.0  # for the login, from the greeting or the end of TLS, whatever the client says meanwhile

S = TypeVar("S", bound=AnySession)


class ReadingConnection(ClientConnection[S]):
    """`protocol`: as log records name it."""

    protocol: ClassVar[str]

    __slots__ = ("_access", "_began", "_greeted_at", "_seat", "_user", "_writable")

    def __init__(self, access: Access, admission: Admission, listener: Listener) -> None:
        super().__init__(admission, listener)
        self._access = access
        self._user: User | None = None
        self._seat: Reservation | None = None
        self._began = 0.0  # the login (loop time)
        self._greeted_at = 0.0  # the greeting, or the end of TLS (loop time)
        self._writable = asyncio.Event()  # the client has read what was written
        self._writable.set()

    def secured(self, described: str) -> None:
        self._greeted_at = self.admission.now()
        if not self.waits & BLOCKED:  # what was written before the handshake has been read
            self._writable.set()

    def sit(self, user: User, most: int) -> bool:
        """The session of a user begins; whether the user has fewer than `most`, in all processes."""
        seat = f"{self.protocol} {user.ident}"
        if not self.admission.limits.take(seat, most):
            return False
        self._user, self._seat = user, Reservation(partial(self.admission.limits.give, seat))
        self._began = self.admission.now()
        self.admission.intake.counters.add(index("relaymta_mailbox_sessions_total", self.protocol), 1)
        return True

    def leave(self) -> None:
        """Another session may have the seat. Further calls do nothing."""
        if self._seat is not None:
            self._seat.give_back()

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

    def log_session(self, **fields: object) -> None:
        """Log the end of a session; `fields`: what it has done."""
        assert self.rights is not None and self._user is not None
        self.admission.intake.log.event(
            "session", protocol=self.protocol, client=self.rights.client.address, user=self._user.address,
            seconds=round(self.admission.now() - self._began, 3), **fields,
        )  # fmt: skip
