"""One mail transaction of an LMTP client (RFC 2033): the message goes into the mailboxes of its recipients, past the queue, and
each recipient has a reply of their own, when that is durable.

What it is before its end, as of IncomingTransaction: a large message is streamed into the same kind of file. Then

filing      all of it is given to the mailboxes, a large one read from its file when it is its turn (filing.py).
queueing    only where the mailboxes leave a rest: addresses elsewhere that an alias leads to, and users of an alias who cannot
            have it now while others have it. For these it goes into the queue, as a message of its own.
"""

from collections.abc import Sequence
from concurrent.futures import Future

from relaymta.accept.admission import Admission
from relaymta.accept.local import Landed
from relaymta.accept.origin import Origin, Taken
from relaymta.accept.transaction import Flow, IncomingTransaction
from relaymta.errors import StoreError, store_error
from relaymta.proto import reply
from relaymta.proto.envelope import Body
from relaymta.proto.session import Session
from relaymta.queue import format_id
from relaymta.reservation import Reservation

__all__ = ["FiledTransaction"]

TEXT_MOST = 500  # characters of a reply, in which a user's script may say why: its line has 512 octets (RFC 5321 4.5.3.1.5)


class FiledTransaction(IncomingTransaction):
    """See above."""

    __slots__ = ("_landed", "_pieces", "_turn")

    def __init__(self, sender: str, smtputf8: bool, origin: Origin, session: Session, flow: Flow, admission: Admission) -> None:
        IncomingTransaction.__init__(self, sender, smtputf8, origin, session, flow, admission)
        self._turn: Reservation | None = None  # of a large message in memory
        self._pieces: list[bytes] = []  # the message, from filing on
        self._landed: Sequence[Landed] = ()  # from queueing on

    def accept(self, address: str) -> bytes | None:
        meant = address if "@" in address else self.origin.postmaster
        return self._admission.intake.accept_recipient(self.origin, meant or address, self, self._session)

    def _signs(self) -> bool:
        return False  # it has come here by a server of ours, which has signed and verified what it wants to

    # Filing

    def _finish_file(self, fields: bytes) -> None:
        assert self.large is not None
        octets = max(self.size, self.large.body_octets)  # of a body that a filter has written, too
        self._admission.filing.take(octets, lambda turn: self._try(self._read, turn))

    def _read(self, turn: Reservation) -> None:
        self._turn = turn
        assert self.large is not None
        self._on_thread(self.large.read, None, lambda future: self._try(self._was_read, future))

    def _was_read(self, future: "Future[list[bytes]]") -> None:
        error = future.exception()
        if error is not None:
            self._stored(store_error(error))
        else:
            self._submit(future.result())

    def _hand_over(self, data: list[bytes] | Body) -> None:
        local = self._admission.intake.local
        assert local is not None and isinstance(data, list)
        self._pieces = data
        meant = [address if "@" in address else self.origin.postmaster for address in self.recipients]
        local.file(self.sender, meant, data, lambda landed: self._try(self._filed, landed))

    def _filed(self, landed: Sequence[Landed] | Exception) -> None:
        if isinstance(landed, Exception):
            raise landed
        self._landed = landed
        if any(one.rest for one in landed):
            self._queue_rest()
        else:
            self._answer(None)

    # Queueing

    def _queue_rest(self) -> None:
        if self.large is None:
            self._queue(self._pieces)
        else:
            self._on_thread(self.large.finish, b"", lambda future: self._try(self._finished, future))

    def _finished(self, future: "Future[Body]") -> None:
        error = future.exception()
        if error is not None:
            self._queued(store_error(error))
        else:
            self._queue(future.result())

    def _queue(self, data: list[bytes] | Body) -> None:
        rest = list(dict.fromkeys(address for one in self._landed for address in one.rest))
        helo, octets = self._session.helo, self.octets
        self._admission.intake.admit(self._ident, self, rest, self.origin, helo, data, octets, self._queued)

    def _queued(self, error: StoreError | None) -> None:
        if error is None:
            self._keep_file()
        self._answer(error)

    # The replies

    def _answer(self, error: StoreError | None) -> None:
        """Reply to each recipient. `error`: why the queue has not taken the rest."""
        admission, intake = self._admission, self._admission.intake
        unqueued = intake.failed(error) if error is not None else b""
        answers = [
            unqueued if unqueued and one.rest and one.reply.code < 300 else self._said(address, one)
            for address, one in zip(self.recipients, self._landed, strict=True)
        ]
        if self._units is not None and any(answer.startswith(b"2") for answer in answers):
            self._units.keep()
        seconds = admission.now() - self._completed_at
        intake.accept_seconds(seconds)
        queued = error is None and any(one.rest for one in self._landed)
        taken = self._taken(answers, round(seconds, 3), queued)
        intake.landed(self._ident, self, self.origin, self._session, self.octets, taken)
        self._flow.answer(self, answers)  # not within `complete`: what files and what queues call back in turns of their own

    def _said(self, address: str, landed: Landed) -> bytes:
        said, name = landed.reply, format_id(self._ident)
        if said.code >= 300:
            return reply.format_reply(said.code, said.enhanced, f"<{address}> {said.text}"[:TEXT_MOST])
        if landed.rest and not landed.users:
            return reply.format_reply(250, "2.0.0", f"<{address}> queued as {name}")
        return reply.format_reply(said.code, said.enhanced, f"<{address}> {said.text} as {name}")

    def _taken(self, answers: list[bytes], delay: float, queued: bool) -> Taken:
        recipients, filed, users, refused = list[str](), list[str](), dict[str, None](), list[tuple[str, bytes]]()
        for address, answer, one in zip(self.recipients, answers, self._landed, strict=True):
            if not answer.startswith(b"2"):
                refused.append((address, answer))
                continue
            recipients.append(address)
            if one.users:
                filed.append(address)
                users |= dict.fromkeys(one.users)
        return Taken(recipients, filed, list(users), refused, delay, queued)

    def end(self) -> None:
        super().end()
        self._pieces = []
        if self._turn is not None:
            self._turn.give_back()
