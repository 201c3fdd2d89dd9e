"""The connection of an IMAP client: what it does beside what all do (accept/client.py, connection.py).

A command is run up to where it first waits (`run`), so that most need no task. Until its end (`waits & COMMITTING`) nothing is
parsed, and it alone uses `_reader` and writes; what is told in IDLE does the same. What the client is told is collected, and
written in slices, each once the client has read the one before.
"""

import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.client import ClientConnection
from relaymta.accept.line import COMMITTING, SPILLING
from relaymta.accept.rights import Rights
from relaymta.config import Listener
from relaymta.disk.big import BigBody
from relaymta.errors import RelayError, StoreError
from relaymta.metrics import index
from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Append, Command
from relaymta.proto.imap_server import ServerSession
from relaymta.proto.imap_session import APPENDED, CANCELLED, CLAIMED, COMMAND, IDLE, LITERAL, MESSAGE, TLS
from relaymta.proto.imap_verbs import VERBS
from relaymta.reservation import Reservation
from relaymta.view import imap_append, imap_mailboxes, imap_messages
from relaymta.view.access import PIECE, SLICE, Access
from relaymta.view.connection import ReadingConnection
from relaymta.view.fetch import FilePart, Making, Piece, read_at
from relaymta.view.incoming import Incoming
from relaymta.view.reader import MISTAKES, Done, Gone, Reader, answer_to
from relaymta.view.reading import Removed

__all__ = ["ImapConnection"]

T = TypeVar("T")

SILENCE_SECONDS = 1800.0  # without a command (RFC 9051 5.4)
STILL_HERE_SECONDS = 120.0  # between two signs of life in IDLE
LONG = 0.002  # seconds after which a command lets others run

COMMANDS: dict[str, Callable[[Reader, Command], Awaitable[Done]]] = {
    **imap_mailboxes.COMMANDS,
    **imap_messages.COMMANDS,
    **imap_append.COMMANDS,
}


class Row(NamedTuple):
    """A command. `expunges`, `writes`: as of Verb; `counter`: the metric of its verb."""

    run: Callable[[Reader, Command], Awaitable[Done]]
    expunges: bool
    writes: bool
    counter: int


ROWS = {
    name: Row(run, VERBS[name].expunges, VERBS[name].writes, index("relaymta_imap_commands_total", name.removeprefix("UID ")))
    for name, run in COMMANDS.items()
}
RESULTS = {status: index("relaymta_imap_results_total", status.lower()) for status in ("OK", "NO", "BAD", "failed")}
DISMISSED = response.bye("The session has ended; log in again", response.UNAVAILABLE)


class ImapConnection(ReadingConnection[ServerSession]):
    """`_reader`: from the login to the end; `_unwatch`: while in IDLE with a mailbox that is selected."""

    protocol = "imap"
    silence = SILENCE_SECONDS
    too_late = response.TIMEOUT
    shutting_down = response.SHUTTING_DOWN
    dismissed = DISMISSED

    __slots__ = (
        "_commands", "_late_news", "_news", "_octets", "_out", "_reader", "_said_at", "_since", "_unwatch",
    )  # fmt: skip

    def __init__(self, access: Access, admission: Admission, listener: Listener) -> None:
        super().__init__(access, admission, listener)
        self._reader: Reader | None = None
        self._unwatch: Callable[[], None] | None = None
        self._news = False  # in IDLE: there is something new that was not told
        self._late_news = False  # telling it has failed: it is tried again
        self._out: list[bytes | memoryview] = []  # what is told, and not written yet
        self._octets = 0  # of it
        self._said_at = 0.0  # in IDLE: when something was written (loop time)
        self._since = 0.0  # when the command under way began, or has let others run (loop time)
        self._commands = 0  # of the session

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        admission, endpoint = self.admission, self.admission.endpoint
        self._greeted_at = admission.now()
        config = admission.config
        return ServerSession(
            admission.intake.hostname, endpoint.offers(self.listener, False), endpoint.keys, secure,
            frozenset(config.imap.hide), config.limits.message_size, self.mistaken,
        )  # fmt: skip

    def refusal(self, answer: bytes) -> bytes:
        """A refusal of SMTP as BYE."""
        text = answer.decode("utf-8", "replace").strip().partition(" ")[2].partition(" ")[2]
        return response.bye(text, response.UNAVAILABLE)

    def admit_login(self) -> bytes | None:
        assert self.session is not None
        user = self.seated()
        if isinstance(user, bytes):
            return user
        self._reader = Reader(
            self._access, user, self.session, self.admission, self._tell, self._pause, self.warn, self.log_change
        )  # fmt: skip
        return None

    def logged_in(self, session: ServerSession) -> bool:
        return self._reader is not None

    def doing(self) -> dict[str, Any]:
        reader = self._reader
        if reader is None:
            return {}
        selected, program = reader.selected, reader.session.client.get("name") or ""
        found = {
            "mailbox": selected.name if selected is not None else "", "commands": self._commands,
            "program": program.encode("utf-8", "replace").decode(),
        }  # fmt: skip
        return found | ({"state": "idle"} if reader.session.state == IDLE else {})

    def allowed(self) -> bool:
        return self._reader is None or self._reader.refresh()

    # Commands

    def _execute(self, session: ServerSession) -> None:
        self._stop_watching()
        self._begin(self._command(session))

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run what ends in `_ended`. Nothing is parsed until then."""
        self.waits |= COMMITTING
        self.run(coroutine)
        if self.waits & COMMITTING:
            self.pause()

    def _ended(self, session: ServerSession) -> None:
        """Parse again. Where nothing was waited for, `advance` goes on, which has begun it."""
        self.active_at = self.admission.now()
        if self._unwanted and not self.gone:
            self.end(session, DISMISSED)
        if self.eager:
            self.waits &= ~COMMITTING
        else:
            self.go_on(COMMITTING)
        if self.gone:
            self._forget()

    async def _command(self, session: ServerSession) -> None:
        """A command, from its beginning to its tagged response."""
        command, reader = session.command, self._reader
        if command is not None and reader is not None:  # the client is still there
            self._since = began = self.admission.now()
            row, result = ROWS[command.name], "failed"
            try:
                done = await self._answer(reader, session, command, row)
                if self._octets > SLICE:
                    await self._flush()
                self._end_command(session.done(done.status, done.text, done.code))
                result = done.status
            except Gone:
                self._drop_output()
            except Exception as error:  # a defect: this command fails, the session and the others go on
                self.mistaken(error)
                self.write(session.failed())
            self._commands += 1
            counters = self.admission.intake.counters
            counters.add(row.counter, 1)
            counters.add(RESULTS[result], 1)
            counters.observe("relaymta_imap_command_seconds", self.admission.now() - began)
        self._ended(session)

    def _drop_output(self) -> None:
        self._out, self._octets = [], 0

    def mistaken(self, error: Exception) -> None:
        """Log a defect; what was told and is not written yet is not written."""
        self._drop_output()
        super().mistaken(error)

    async def _answer(self, reader: Reader, session: ServerSession, command: Command, row: Row) -> Done:
        """Run a command; what its end says. Errors that are none of ours are answered."""
        reader.looked = None
        try:
            if not reader.refresh():
                return self._dismissed(session)
            if said := reader.enabled():
                await reader.tell([said])
            done = await row.run(reader, command)
            if not row.writes and not reader.refresh():  # moved meanwhile: some of what was read may have been gone already
                return self._dismissed(session)
        except (RelayError, ConnectionError, *MISTAKES) as error:
            done = answer_to(error)
            if done.code == response.UNAVAILABLE:
                self.warn(f"{command.name}: {error or type(error).__name__}")
            return self._dismissed(session) if done.code == response.NONEXISTENT and not reader.refresh() else done
        if done.fresh:
            return done
        expunges = row.expunges and done.expunges
        try:
            if reader.behind(reader.looked if self.eager else None):
                await reader.sync(expunges)
        except (RelayError, ConnectionError, Removed) as error:  # what the command has done is done; the next one tells the news
            self.warn(f"news behind {command.name}: {error or type(error).__name__}")
        # The client has numbers of messages that are gone.
        if not expunges and reader.holds and done.status == "OK" and not done.code:
            done = done._replace(code=response.EXPUNGEISSUED)
        return done

    def _dismissed(self, session: ServerSession) -> Done:
        """The user may not be here any more (disabled, deleted, or moved to another shard): the session ends."""
        self._dismiss(session)
        return Done("NO", "The session has ended", response.UNAVAILABLE)

    def _dismiss(self, session: ServerSession) -> None:
        """End the session behind what is being done now."""
        self.admission.loop.call_soon(self.end, session, DISMISSED)

    # Output

    async def _tell(self, pieces: Iterable[Piece | Making]) -> None:
        """Write untagged responses, as fast as the client reads. Gone."""
        assert self._reader is not None
        for piece in pieces:
            if isinstance(piece, bytes | memoryview):
                self._out.append(piece)
                self._octets += len(piece)
                if self._octets >= SLICE:
                    await self._flush()
            elif isinstance(piece, FilePart):
                await self._stream(piece)
            else:
                await self._pause()
                await self._tell(await self._amid(self._access.work(self._reader.user, piece)))

    async def _amid(self, reading: Awaitable[T]) -> T:
        """What is read amid a response: where it cannot be read the connection ends. Gone."""
        try:
            return await reading
        except StoreError as error:
            self.warn(f"a message cannot be read: {error}")
            if self.transport is not None:
                self.transport.abort()
            raise Gone from None

    def _end_command(self, last: bytes) -> None:
        """Write what was told, and the tagged response."""
        self._out.append(last)
        self.write(b"".join(self._out))
        self._drop_output()

    async def _flush(self) -> None:
        """Write what was told, and wait until the client has read it. Gone."""
        out = self._out
        self._drop_output()
        large = out.pop() if out and len(out[-1]) > SLICE else b""
        self.write(b"".join(out))
        view = memoryview(large)
        for start in range(0, len(view), SLICE):
            await self._written()
            self.write(view[start : start + SLICE])
        await self._written()

    async def _written(self) -> None:
        """Wait until the client has read what was written. Gone."""
        if not self._writable.is_set():
            await self._writable.wait()
            self.active_at = self._since = self.admission.now()
        if self.gone:
            raise Gone

    async def _stream(self, part: FilePart) -> None:
        """Write octets of a large message. Gone."""
        await self._flush()
        place, left = part.start, part.length
        while left:
            data = await self._amid(self._access.read(partial(read_at, part.path, place, min(PIECE, left))))
            place, left = place + len(data), left - len(data)
            await self._tell([data.replace(b"\0", b"\x80") if part.text else data])

    async def _pause(self) -> None:
        """Let others run, when the command has taken long since it began, or waited. Gone."""
        if self.admission.now() - self._since > LONG:
            await self.admission.turns.turn()  # one session in each turn of the loop, however many have long commands
            self._since = self.admission.now()
        if self.gone:
            raise Gone

    # APPEND

    def _file(self) -> tuple[BigBody, Reservation] | None:
        """A file for a large message, in the queue's folder of such: it is emptied at each start."""
        place = self.admission.file()
        if place is None:
            return None
        queue = self.admission.intake.queue
        try:
            return queue.big_body(queue.ident()), place
        except OSError:
            place.give_back()
            raise

    def _announced(self, session: ServerSession) -> None:
        """A message of APPEND begins."""
        append, reader = session.append, self._reader
        assert append is not None and reader is not None
        if reader.incoming is None:
            reader.incoming = Incoming(self._file)
        refused = self._refused(session, reader, append, reader.incoming)
        if refused is None:
            self.write(session.go_ahead())
            self._acknowledge()
            return
        self._drop_incoming()
        self.write(session.refuse(refused.text, refused.code))

    def _refused(self, session: ServerSession, reader: Reader, append: Append, incoming: Incoming) -> Done | None:
        """Why a message is not taken: known before it comes."""
        try:
            if not reader.refresh():
                return self._dismissed(session)
            return imap_append.refusal(reader, append, incoming)
        except (RelayError, ConnectionError, *MISTAKES) as error:
            return answer_to(error)
        except Exception as error:
            self.mistaken(error)
            return Done("NO", "Internal error; it has been logged", response.SERVERBUG)

    def _acknowledge(self) -> None:
        """Acknowledge the message's first segment at once: some clients (imaplib) send its end only then (Nagle's algorithm)."""
        sock = self.transport.get_extra_info("socket") if self.transport is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _arrived(self, session: ServerSession) -> None:
        """Octets of a message of APPEND have come."""
        incoming = self._reader.incoming if self._reader is not None else None
        assert incoming is not None
        if incoming.take(session.take()):
            self._spill(session, incoming.write, lambda: None)

    def _whole(self, session: ServerSession) -> None:
        """All of a message of APPEND has come."""
        incoming = self._reader.incoming if self._reader is not None else None
        assert incoming is not None
        incoming.take(session.take())
        if incoming.in_file:
            self._spill(session, incoming.end, session.taken)
        else:
            incoming.end()
            session.taken()

    def _spill(self, session: ServerSession, write: Callable[[], None], then: Callable[[], None]) -> None:
        """Write to the file of a message on a thread, then call `then`; nothing is read meanwhile."""
        self.waits |= SPILLING
        self.pause()
        self.admission.spawn(self._spilled(session, write, then))

    async def _spilled(self, session: ServerSession, write: Callable[[], None], then: Callable[[], None]) -> None:
        out = b""
        try:
            await self._access.read(write)
        except StoreError as error:
            self.warn(f"a message could not be written: {error}")
            self._drop_incoming()
            out = session.refuse("The message cannot be stored now; try again", response.UNAVAILABLE)
        if not out:
            incoming = self._reader.incoming if self._reader is not None else None
            if incoming is not None:
                incoming.written()
            then()
        self.write(out)
        self.go_on(SPILLING)
        if self.gone:
            self._forget()

    def _cancelled(self, session: ServerSession) -> None:
        """APPEND does not come to its end."""
        self._drop_incoming()
        self.write(session.cancelled())

    def _drop_incoming(self) -> None:
        reader = self._reader
        if reader is not None and reader.incoming is not None:
            reader.incoming.discard()
            reader.incoming = None

    # IDLE

    def _idle(self, session: ServerSession) -> None:
        """IDLE has begun, or goes on: what is new since the last command is told, and what comes from now on."""
        reader = self._reader
        if self._unwatch is None:
            self._said_at = self.admission.now()
            if reader is not None and reader.selected is not None:
                self._news = True
                self._unwatch = self._access.watch(reader.user, reader.selected.mailbox, self._noticed)
        if self._news and not self.waits:
            self._begin(self._tell_news(session))

    def _noticed(self, modseq: int) -> None:
        """The mailbox that is selected has changed. While something is waited for, it is told behind that."""
        self._news = True
        if self.session is not None and self.session.state == IDLE and not self.waits:
            self._begin(self._tell_news(self.session))

    async def _tell_news(self, session: ServerSession) -> None:
        self._since = self.admission.now()
        try:
            while self._news and self._reader is not None:
                self._news = self._late_news = False
                if not self._reader.refresh():
                    self._dismiss(session)
                    break
                if said := self._reader.enabled():
                    await self._tell([said])
                if self._reader.behind():
                    await self._reader.sync(True)
                await self._flush()
        except Gone:
            self._drop_output()
        except (RelayError, ConnectionError, Removed) as error:
            self.warn(f"IDLE: {error or type(error).__name__}")
            self._late_news = True  # `check` tries again
        except Exception as error:
            self.mistaken(error)
        self._said_at = self.admission.now()
        self._ended(session)

    def _stop_watching(self) -> None:
        unwatch, self._unwatch = self._unwatch, None
        self._news = self._late_news = False
        if unwatch is not None:
            unwatch()

    # The end, and what is due

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()
        reader = self._reader
        if not self.waits & (COMMITTING | SPILLING):  # else what is under way ends with it
            self._forget()
        if reader is not None:
            self.log_session(commands=self._commands, program=reader.session.client.get("name") or "")

    def _forget(self) -> None:
        """The session is over, and nothing of it is under way. Further calls do nothing."""
        self._drop_incoming()
        self._reader = None
        self.leave()

    def look_after(self, session: ServerSession, now: float) -> None:
        if session.state != IDLE:
            return
        if self._late_news and self._unwatch is not None:
            self._noticed(0)
        elif now - self._said_at > STILL_HERE_SECONDS and self._reader is not None:
            self._said_at = now
            if self._reader.refresh():
                self.write(session.write(response.STILL_HERE))
            else:
                self.end(session, DISMISSED)

    steps: ClassVar[dict[int, Callable[[Any, Any], None]]] = {
        TLS: ClientConnection.start_tls,
        CLAIMED: ClientConnection.log_in,
        COMMAND: _execute,
        LITERAL: _announced,
        MESSAGE: _arrived,
        APPENDED: _whole,
        CANCELLED: _cancelled,
        IDLE: _idle,
    }
