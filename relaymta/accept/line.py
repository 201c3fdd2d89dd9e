"""The transport of one connection: back-pressure in both directions.

Output has bounds and a deadline as input has: above UNSENT octets of unsent replies nothing is read or parsed, and a client that
does not read them within OUTPUT_SECONDS is disconnected, whatever it sends meanwhile.
"""

import asyncio

from relaymta.accept.admission import Admission
from relaymta.trace import Incoming

__all__ = ["LINGER", "OUTPUT_SECONDS", "UNSENT", "Line"]

UNSENT, UNSENT_LOW = 16384, 4096  # octets of unsent replies above which reading stops, and below which it resumes
OUTPUT_SECONDS = 300.0  # seconds for a client to read its replies until they are below UNSENT_LOW; at most the command timeout
LINGER = 5.0  # seconds for a client to read the last replies, once its connection is being closed
LINGER_OCTETS = 64 << 20  # octets that are read and dropped of a client that still sends meanwhile: a message and some more
DECRYPTED = 65536  # octets that TLS buffers while reading is paused

# Flags of `waits`:
COMMITTING = 1  # a complete message is signed, verified or committed
CHECKING = 2  # a login attempt is checked, or a reply is delayed
SPILLING = 4  # a thread writes message data
BLOCKED = 8  # the client does not read its replies
BEHIND = 16  # more input than is parsed in one turn: `turns` schedules the rest
SHAKING = 32  # the TLS handshake after STARTTLS
ASKING = 64  # filters are asked about a command


class Line(asyncio.Protocol):
    """The transport of one connection. `waits`: what is waited for; while that is not 0 nothing is parsed."""

    __slots__ = ("active_at", "admission", "blocked_at", "closed_at", "dropped", "lingers", "paused", "tap", "transport", "waits")

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.transport: asyncio.Transport | None = None
        self.waits = 0
        self.paused = False  # nothing is read
        self.active_at = 0.0  # when the client last sent, or was last made to wait (loop time): timeouts count from it
        self.blocked_at = 0.0  # when it became BLOCKED (loop time), 0.0 once it has read its replies
        self.closed_at = 0.0  # when the connection was first found being closed (loop time)
        self.lingers = False  # it is being closed, and what the client still sends is dropped
        self.dropped = 0  # octets of that
        self.tap: Incoming | None = None

    def go_on(self, reason: int) -> None:
        """Clear a flag of `waits`; if none is left, parse what came meanwhile and resume reading."""
        raise NotImplementedError

    @property
    def gone(self) -> bool:
        """Whether the connection is closed or being closed."""
        return self.lingers or self.transport is None or self.transport.is_closing()

    def set_buffer_limits(self) -> None:
        """Limit the unsent replies, and what TLS buffers while reading is paused."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.set_write_buffer_limits(UNSENT, UNSENT_LOW)
            if transport.get_extra_info("ssl_object") is not None:
                transport.set_read_buffer_limits(DECRYPTED)  # type: ignore[attr-defined]

    def pause(self) -> None:
        """Read nothing."""
        if not self.paused and self.transport is not None and not self.gone:
            self.transport.pause_reading()
            self.paused = True

    def resume(self) -> None:
        """Read again, unless something is still waited for."""
        if self.paused and not self.waits and self.transport is not None and not self.gone:
            self.transport.resume_reading()
            self.paused = False

    def write(self, data: bytes | memoryview) -> None:
        """Send replies."""
        if self.transport is not None and data:
            if self.tap is not None:
                self.tap.said(bytes(data))
            self.transport.write(data)

    def pause_writing(self) -> None:
        """The transport holds more than UNSENT octets of replies: stop parsing and reading until the client has read them."""
        self.waits |= BLOCKED
        self.blocked_at = self.admission.now()
        self.pause()

    def resume_writing(self) -> None:
        """The client has read nearly all replies: go on in a turn of its own."""
        self.blocked_at = 0.0
        self.active_at = self.admission.now()
        self.admission.turns.wait(self._unblocked)

    def _unblocked(self) -> None:
        if not self.blocked_at:  # not blocked again meanwhile
            self.go_on(BLOCKED)

    def close(self) -> None:
        """Close the connection after what is written; `check_output` aborts it if the client does not read that."""
        if self.transport is not None:
            self.transport.close()

    def linger(self) -> None:
        """Close the connection of a client that may be sending, as `close`: it is told of the end at once, and what it sends is
        read and dropped until it closes, for LINGER seconds and LINGER_OCTETS at most. Without that the kernel would reset the
        connection, and the client lose the last reply. (TLS reads until the client's close_notify by itself.)"""
        transport = self.transport
        if transport is None or self.gone:
            return
        if not transport.can_write_eof() or self.admission.intake.draining:  # a shutdown does not wait for clients
            transport.close()
            return
        transport.write_eof()
        if self.paused:
            transport.resume_reading()
        self.lingers = True

    def drop(self, data: bytes) -> None:
        """Octets of a client whose connection lingers."""
        self.dropped += len(data)
        if self.dropped > LINGER_OCTETS and self.transport is not None:
            self.transport.close()

    def check_output(self, now: float, patience: float) -> bool:
        """Abort the connection of a client that has not read for `patience` seconds, or LINGER where it is being closed. Whether
        there is nothing else to check."""
        transport = self.transport
        if transport is None:
            return True
        if self.gone:
            if not self.closed_at:
                self.closed_at = now
            elif now - self.closed_at > LINGER:
                transport.abort()
            return True
        if self.blocked_at and not self.waits & SHAKING:
            if now - self.blocked_at > patience:
                transport.abort()
            return True
        return False
