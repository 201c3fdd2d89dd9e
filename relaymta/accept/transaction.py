"""One mail transaction of a client, from MAIL to the reply to its message data: what it holds, and how that ends.

receiving   RCPT by RCPT and piece by piece. What exceeds the memory for it is written to a file (`Large`) by a thread,
            meanwhile nothing is read.
completing  the session is STORING: our fields are added, the message is verified, shown to filters, signed, and handed to the
            queue. This goes on whether the client stays or not, but for the filters, and always ends with one reply
            (`Flow.answer`), which ends the session's transaction.
ended       `end`, called once by the session, whatever ended it: the file is discarded unless the queue has it, units of
            quotas that were not used are given back. If a thread still writes, that happens when it returns.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from relaymta.accept.admission import Admission
from relaymta.accept.large import Large
from relaymta.accept.once import CONTENT, FIELD, Busy, Wanted, content_of, owner_of, without_boundaries
from relaymta.accept.origin import Origin, spoken
from relaymta.accept.quota import Units
from relaymta.errors import StoreError, store_error
from relaymta.filter.judgement import Mail, Text, Verdict
from relaymta.filter.signing import Unsignable
from relaymta.proto import reply
from relaymta.proto.edits import without
from relaymta.proto.envelope import Body, Unseen
from relaymta.proto.header import HEADER_SEEN, begins_well, first_octets, header_end
from relaymta.proto.session import Question, Session
from relaymta.proto.transaction import Transaction
from relaymta.queue import BigBody, Request, format_id
from relaymta.reservation import Reservation

if TYPE_CHECKING:
    from relaymta.filter.chain import Chain, Outcome
    from relaymta.filter.dialogue import Dialogue
    from relaymta.filter.revision import Revision
    from relaymta.filter.rewritten import Rewritten
    from relaymta.filter.verify import Look, Verifier
    from relaymta.filter.verify import Verdict as Verified

__all__ = ["Flow", "IncomingTransaction"]

T = TypeVar("T")

REWRITTEN_MEMORY = 262144  # octets of a new body that are kept in memory
KEYS = (FIELD,)
SAME = bytes(CONTENT)  # of messages from a file, which the key tells
ONCE_SECONDS = 60.0  # for another message with the same idempotency key
FIELDS = 4096  # octets of `queue.big_limit` that are left for the fields added here


class Flow(Protocol):
    """What a transaction asks of its connection. `file`: what tells the file that its messages are from, of the drop or the
    pickup folder, from every other, of all times: no recipient gets it twice; "": they are from no file."""

    file: str

    def writing(self) -> None:
        """A thread writes: read nothing until `written`."""

    def written(self) -> None:
        """Go on reading."""

    def answer(self, transaction: Transaction, answer: bytes | list[bytes], closes: bool = False) -> None:
        """The reply to a complete message (see Session.finish); its transaction ends. `closes`: the connection, too."""


class IncomingTransaction(Transaction):
    """See above. `dialogue`: that of filters with this client, None: no filter follows it."""

    __slots__ = (
        "_abandoned", "_admission", "_completed_at", "_content", "_descriptor", "_flow", "_header_octets", "_ident", "_judging",
        "_left", "_over", "_session", "_units", "_verdict", "_writing",
        "dialogue", "large", "octets", "origin", "wanted",
    )  # fmt: skip

    def __init__(self, sender: str, smtputf8: bool, origin: Origin, session: Session, flow: Flow, admission: Admission) -> None:
        Transaction.__init__(self, sender, smtputf8, origin.client.limits)
        self.origin = origin
        self._session = session
        self._flow = flow
        self._admission = admission
        self._completed_at = 0.0
        self._ident = 0
        self.octets = 0  # of the message to be stored, the fields added here included
        self.large: Large | None = None
        self._descriptor: Reservation | None = None  # of `large`
        self._units: Units | None = None  # of a quota of octets
        self._writing = False  # a thread has `large`
        self._over = False
        self._judging: asyncio.Task[None] | None = None  # from its verification on, until filters have said what they say
        self._abandoned = False  # the client has hung up meanwhile
        self._verdict: Verified | None = None  # of SPF, DKIM and DMARC
        self._left: tuple[str, ...] = ()  # filters that look at it in the queue
        self.dialogue: Dialogue | None = None
        self.wanted: Wanted | None = None  # what its application wants of it
        self._content: Any = None  # what tells a message with a key from others; see content_of
        self._header_octets = -1  # of a large message, whose size without these is still to be added to `_content`

    # Receiving

    def accept(self, address: str) -> bytes | None:
        intake = self._admission.intake
        if (
            self.origin.free and "@" in address
            and self._admission.endpoint.aliases is None and intake.suppressed is None
            and (intake.local is None or not intake.is_local(address))
        ):  # fmt: skip
            return None
        return intake.accept_recipient(self.origin, address, self, self._session)

    async def asked(self, question: Question) -> bytes | None:
        """What filters that follow the client say to a command: the refusal, or None. Cancelled: no filter is left in the middle
        of it."""
        dialogue, chain, intake = self.dialogue, self.origin.chain, self._admission.intake
        assert dialogue is not None and chain is not None
        self._ident = self._ident or intake.queue.ident()
        mail = self._mail(Text(b""))
        if question.verb == "RCPT":
            found = await dialogue.rcpt(mail, question.address)
        else:
            found = await (dialogue.data(mail) if question.verb == "DATA" else dialogue.mail(mail))
        if found is None:
            return None
        answer = chain.reply(found)
        intake.not_wanted(self, self.origin, self._session, question.address, answer)
        return answer

    def rejects(self, address: str, answer: bytes) -> None:
        if self.dialogue is not None:
            self.dialogue.refused(address, answer)

    def _is_judged(self) -> bool:
        """Whether filters have something to do with the message: they look at it, or what they have said of its envelope."""
        chain, dialogue = self.origin.chain, self.dialogue
        return chain is not None and (chain.looks or dialogue is None or dialogue.has_said)

    def _mail(self, text: Text) -> Mail:
        """As filters see it."""
        origin, session = self.origin, self._session
        user, mechanism = origin.user, session.mechanism if origin.identity is not None else ""
        return Mail(
            format_id(self._ident), self.sender, self.recipients, origin.client.address, session.helo, user, session.tls, text,
            mechanism=mechanism, listener=origin.listener, parameters=tuple(self.parameters.split()),
            announced=self.announced,
            protocol=spoken(origin, session),
            dmarc="" if self._verdict is None else self._verdict.dmarc.result, application=origin.application,
            rewritten=partial(self._rewritten, len(text.head)),
        )  # fmt: skip

    def arrived(self, now: float) -> None:
        """As of `Transaction`; `now`: loop time."""
        if not self.began_at:
            self.began_at = now
        if (self.large is not None or self._is_big()) and not self.refusal:
            self._spill()

    def _is_big(self) -> bool:
        return self.size > self._admission.intake.queue.big_limit - FIELDS

    def _spill(self) -> None:
        """Pass the message data received so far to a thread, and read nothing until it is written."""
        data = self.take()
        if self.large is None:
            self._ident = self._ident or self._admission.intake.queue.ident()
            found = self._opened(b"".join(data))
            if not isinstance(found, bytes):
                self._descriptor = self._admission.file()
                if self._descriptor is None:
                    found = self._admission.intake.failed(StoreError("no file descriptor is left for it"))
            if isinstance(found, bytes):
                self.refuse(found)
                return
            self.large, data = found
        if data:
            self._on_thread(self.large.write, data, self._spilled)
            self._writing = True
            self._flow.writing()

    def _opened(self, start: bytes) -> tuple[Large, list[bytes]] | bytes:
        """A new large message whose message data begins with `start`, and that start; or the reply that rejects it."""
        intake, endpoint, ident = self._admission.intake, self._admission.endpoint, self._ident
        draft, look = None, None
        edited = intake.edited(self.origin, start, False)
        if edited is None:
            return reply.HEADER_TOO_LONG
        start = edited
        if endpoint.verifier is not None and not self.origin.may_relay:
            look = endpoint.verifier.look(start)
            if look is None:
                return reply.HEADER_TOO_LONG
            look.body.skip(look.end)
        chain = self.origin.chain if self._is_judged() else None
        if chain is not None and header_end(start) == len(start):
            return reply.HEADER_TOO_LONG  # it is shown to filters, and may be changed
        front = intake.prepend(ident, self, self.origin, self._session, start[:HEADER_SEEN])
        if isinstance(front, bytes):
            return front
        if self.key:
            end = header_end(start)
            if end == len(start):
                return reply.HEADER_TOO_LONG  # the field is to be removed
            self._content = content_of(self.sender, start[:end])
            self._header_octets = self.size - (len(start) - end)
            start = without(start[:end], KEYS) + start[end:]
        if chain is not None:
            header = start[: header_end(start)]
            return Large(lambda room: intake.queue.big_body(ident, room), front, None, look, header, True), [start]
        if self._signs():
            try:
                draft = endpoint.signer.draft(front[0], start, self.origin.application)
            except Unsignable as error:
                return error.reply
        return Large(lambda room: intake.queue.big_body(ident, room), front, draft, look), [start]

    def _spilled(self, future: "Future[None]") -> None:
        self._writing = False
        if self._over:
            self._release()
            return
        error = future.exception()
        if error is not None:
            # The reply is sent after the message data; until then that is read and discarded.
            self._release()
            self.refuse(self._admission.intake.failed(store_error(error)))
        self._flow.written()

    def refused(self, answer: bytes) -> None:
        self._admission.intake.refused(self, self.origin, self._session, answer)

    # Completing

    def complete(self) -> None:
        """All message data has arrived: store the message. From here on each step ends in the next one or in a reply."""
        self._completed_at = self._admission.now()
        self.began_at = self.began_at or self._completed_at
        try:
            if self.large is None:
                self._prepare()
            else:
                self._write_rest()
        except Exception as error:
            self._failed(error)

    def _try(self, step: Callable[..., None], *arguments: object) -> None:
        try:
            step(*arguments)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """After an internal error, too, the transaction ends with a reply."""
        self._admission.intake.not_stored(error)
        self._reject(reply.STORE_ERROR)

    def _prepare(self) -> None:
        """A message in memory: add our fields; then it is signed, verified, or neither."""
        intake, endpoint = self._admission.intake, self._admission.endpoint
        self._ident = self._ident or intake.queue.ident()
        data = self.take()
        start = data[0] if data else b""
        if self.origin.submitted or not self.origin.trusted or not begins_well(start):
            edited = intake.edited(self.origin, b"".join(data), True)
            if edited is None:
                self._reject(reply.HEADER_TOO_LONG)
                return
            data, start = [edited] if edited else [], edited
        elif len(data) > 1 and b"\r\n\r\n" not in start:
            start = first_octets(data, HEADER_SEEN)
        front = intake.prepend(self._ident, self, self.origin, self._session, start[:HEADER_SEEN])
        if isinstance(front, bytes):
            self._reject(front)
            return
        if self.key:
            data = [self._without_key(b"".join(data))]
        if self.chunked:
            self._end_line(data)
        if self.origin.chain is not None and self._is_judged():
            self._judge(self._judge_whole(self.origin.chain, front, b"".join(data)))
        elif self._signs():
            application = self.origin.application
            endpoint.signer.sign(front[0], data, application, lambda found: self._try(self._signed, front, data, found))
        elif endpoint.verifier is not None and not self.origin.may_relay:
            self._look(endpoint.verifier, front, b"".join(data))
        else:
            self._submit(front + data)

    def _without_key(self, whole: bytes) -> bytes:
        """A message in memory without its idempotency key, which would be one for the next relay, too."""
        end = header_end(whole)
        header, body = whole[:end], whole[end:]
        self._content = content_of(self.sender, header)
        if self._is_big():  # though it is in memory: its last piece was large
            self._header_octets = self.size - len(body)
        else:
            self._content.update(without_boundaries(header, body))
        return without(header, KEYS) + body

    def _end_line(self, data: list[bytes]) -> None:
        """Message data of BDAT need not end in CRLF; what is delivered by DATA must."""
        if self.size and self.tail != b"\r\n":
            data.append(b"\r\n")

    def _signs(self) -> bool:
        """Whether this client's mail is signed where there is a key for it. What a content filter gives back may be anybody's:
        ours was signed before."""
        signer, origin = self._admission.endpoint.signer, self.origin
        return bool(signer) and origin.may_relay and not origin.filtered and self.unseen is None

    def _signed(self, front: list[bytes], data: list[bytes], found: bytes | Exception) -> None:
        """The DKIM-Signature fields, or the reason why there are none: then the message is rejected, not sent unsigned."""
        if isinstance(found, Exception):
            self._not_signed(found)
        else:
            self._submit([found, *front, *data] if found else front + data)

    def _not_signed(self, error: Exception) -> None:
        if isinstance(error, Unsignable):
            self._reject(error.reply)
        else:
            self._admission.intake.not_signed(error)
            self._reject(reply.NOT_SIGNED)

    def _look(self, verifier: "Verifier", front: list[bytes], whole: bytes) -> None:
        look = verifier.look(whole)
        if look is None:
            self._reject(reply.HEADER_TOO_LONG)
        else:
            self._admission.spawn(self._verify(verifier, front, look, whole[look.end :]))

    async def _verify(self, verifier: "Verifier", front: list[bytes], look: "Look", body: bytes) -> None:
        field = await self._verified(verifier, look, body)
        if field is not None:
            self._try(self._submit, [field, *front, look.header, body])

    async def _verified(self, verifier: "Verifier", look: "Look", body: bytes) -> bytes | None:
        """Verify a message of an unauthenticated client (SPF, DKIM, DMARC). The header field with the results; None when it was
        rejected."""
        intake = self._admission.intake
        try:
            verdict = await verifier.check(self.origin.client.address, self._session.helo, self.sender, look, body)
        except BaseException as error:  # after an internal error, or when this is cancelled, the client tries again
            if not (self._abandoned and isinstance(error, asyncio.CancelledError)):
                intake.not_verified(error)
            self._reject(reply.NOT_VERIFIED)
            if not isinstance(error, Exception):
                raise
            return None
        refusal = verdict.refusal
        intake.count_dmarc(verdict.dmarc.result, refusal)
        if refusal is not None:
            self._reject(refusal)
            return None
        self._verdict = verdict
        if verdict.held:
            from relaymta.filter.quarantine import of_dmarc

            self.held = self.held or f"DMARC: {verdict.held}"
            self.quarantine = of_dmarc(verdict.held, look.header, intake.queue.clock.now())
        return verdict.field

    def _write_rest(self) -> None:
        """A large message: write the rest; then the fields that depend on all of it are computed."""
        assert self.large is not None
        data = self.take()
        if self.chunked:
            self._end_line(data)
        self._on_thread(self.large.write, data, lambda future: self._try(self._rest_written, future))

    def _rest_written(self, future: "Future[None]") -> None:
        large, endpoint, error = self.large, self._admission.endpoint, future.exception()
        assert large is not None
        if error is not None:
            self._stored(store_error(error))
        elif large.changes and self._abandoned:
            self._reject(reply.NOT_FILTERED)
        elif large.changes and self.origin.chain is not None:
            self._judge(self._judge_large(self.origin.chain, large))
        elif large.draft is not None:
            endpoint.signer.finish(large.draft, lambda found: self._try(self._large_signed, found))
        elif large.look is not None and endpoint.verifier is not None:
            self._admission.spawn(self._verify_large(endpoint.verifier, large.look))
        else:
            self._finish_file(b"")

    def _large_signed(self, found: bytes | Exception) -> None:
        if isinstance(found, Exception):
            self._not_signed(found)
        else:
            self._finish_file(found)

    async def _verify_large(self, verifier: "Verifier", look: "Look") -> None:
        field = await self._verified(verifier, look, b"")
        if field is not None:
            self._try(self._finish_file, field)

    # Filtering: verify, ask the filters, change the header, sign

    def _judge(self, work: Coroutine[object, object, None]) -> None:
        self._judging = self._admission.spawn(work)
        self._judging.add_done_callback(self._judged)

    def _judged(self, task: "asyncio.Task[None]") -> None:
        """However that has ended, also before it has begun: there is a reply."""
        self._judging = None
        if task.cancelled():
            self._reject(reply.NOT_FILTERED)
        elif (error := task.exception()) is not None:
            if isinstance(error, OSError | StoreError):
                self._stored(store_error(error))
            elif isinstance(error, Exception):
                self._failed(error)

    def abandon(self) -> None:
        """The client has hung up: it will send the message again, so that what filters are still asked about, or are to be asked
        about, is not taken. What they have let pass is stored all the same."""
        self._abandoned = True
        if self._judging is not None:
            self._judging.cancel()

    async def _judge_whole(self, chain: "Chain", front: list[bytes], whole: bytes) -> None:
        """Of a message in memory."""
        verifier, end, results = self._admission.endpoint.verifier, header_end(whole), b""
        header, body = whole[:end], whole[end:]
        if verifier is not None and not self.origin.may_relay:
            look = verifier.look(whole)
            if look is None:
                self._reject(reply.HEADER_TOO_LONG)
                return
            found = await self._verified(verifier, look, body)
            if found is None:
                return
            results = found
        revision = await self._filtered(chain, results, header, lambda head: Text(results + head, body))
        if revision is not None:
            await self._store_revised(revision, _without_empty_line(front, end), body)

    async def _judge_large(self, chain: "Chain", large: Large) -> None:
        """Of a message in a file."""
        admission, results = self._admission, b""
        endpoint = admission.endpoint
        if large.look is not None and endpoint.verifier is not None:
            found = await self._verified(endpoint.verifier, large.look, b"")
            if found is None:
                return
            results = found

        async def read(at: int, most: int) -> bytes:
            return await admission.loop.run_in_executor(admission.threads, large.piece, at, most)

        octets = large.body_octets
        revision = await self._filtered(
            chain, results, large.header, lambda head: Text(results + head, b"", octets, read, large.lend)
        )
        if revision is not None:
            await self._store_revised(revision, _without_empty_line(large.front, len(large.header)), b"")

    async def _filtered(self, chain: "Chain", results: bytes, header: bytes, shown: Callable[[bytes], Text]) -> "Revision | None":
        """Ask the filters about a message, of which `shown(header)` is what they see. As it is to be; None: it is refused or
        discarded, and that is answered. By LMTP each recipient has a reply: the envelope stays as it is."""
        from relaymta.filter.revision import Revision

        given = header
        if chain.forged:
            header = without(header, chain.forged)
        revision = Revision(self._mail(shown(header or b"\r\n")), results, not self.origin.lmtp)
        try:
            outcome = await chain.judge(revision, self.dialogue)
        except BaseException:
            revision.discard()
            raise
        if outcome.verdict is Verdict.HOLD and self.origin.lmtp:
            outcome = outcome._replace(verdict=Verdict.TEMPFAIL, reply=reply.NOT_HELD)
        if outcome.reply or outcome.verdict is Verdict.DISCARD:
            revision.discard()
            self._not_taken(outcome, revision)
            return None
        self.held, self._left, self.route = self.held or outcome.held, outcome.left, outcome.route
        if outcome.held and outcome.by is not None:
            from relaymta.filter.quarantine import of_finding

            self.quarantine = of_finding(outcome.by, revision.header, self._admission.intake.queue.clock.now())
        self._revised(revision, results, given)
        return revision

    def _not_taken(self, outcome: "Outcome", revision: "Revision") -> None:
        """Filters have refused it, or it is discarded: then the client is told as if it had been queued."""
        intake = self._admission.intake
        if outcome.reply:
            intake.count_filtered(outcome.reply)
            self._reject(outcome.reply, outcome.closes)
            return
        intake.accepted(revision.mail.text.size, len(self.recipients))
        answer = f"250 2.0.0 Ok: queued as {revision.mail.ident}\r\n".encode()
        self._admission.loop.call_soon(self._flow.answer, self, answer)

    def _revised(self, revision: "Revision", results: bytes, given: bytes) -> None:
        """What follows from the changes of filters."""
        if revision.header != given or revision.above != results:
            self._admission.intake.changed(self, revision.above + revision.header)
        if revision.body is not None and revision.body.eight_bit:
            self.eight_bit = True
        self.sender = self.sender if revision.sender is None else revision.sender
        self.recipients = self.recipients if revision.recipients is None else revision.recipients

    async def _store_revised(self, revision: "Revision", front: bytes, body: bytes) -> None:
        """Store a message that filters let pass; `front`: our fields; `body`: its own body, where it is in memory."""
        front, header, new = revision.above + front, revision.header, revision.body
        self._judging = None  # from here on it is stored, whether the client stays or not
        if new is not None:
            rewritten = cast("Rewritten", new)
            body = rewritten.body
            await self._take_over(rewritten)
        if self._left and not self._awaits(len(revision.above), front, header):
            return
        if self.large is not None:
            self.large.change([front, header])
            await self._sign_large(self.large, front, header)
        elif self._signs():
            application, signer, data = self.origin.application, self._admission.endpoint.signer, [header, body]
            signer.sign(front, data, application, lambda found: self._try(self._signed, [front], data, found))
        else:
            self._submit([front, header, body])

    def _awaits(self, above: int, front: bytes, header: bytes) -> bool:
        """Filters look at it in the queue, and it is signed then. Whether it can be, as far as its header tells; the refusal is
        sent. `above`: octets of `front`, our fields, that are those of filters and of verification."""
        signs = self._signs()
        if signs:
            try:
                self._admission.endpoint.signer.draft(front, header, self.origin.application)
            except Unsignable as error:
                self._reject(error.reply)
                return False
        mail, genuine = self._mail(Text(b"")), self._verdict is not None and self._verdict.genuine
        self.unseen = Unseen(
            list(self._left), above, len(front) - above, self.origin.may_relay, signs, genuine, mail.tls, mail.mechanism,
            list(mail.parameters), mail.announced, mail.protocol,
        )  # fmt: skip
        return True

    async def _take_over(self, new: "Rewritten") -> None:
        """The message has this body from now on. OSError or StoreError: it cannot have it."""
        old, descriptor = self.large, self._descriptor
        large = cast("Large | None", new.large)
        self.large, self._descriptor = large, new.place if large is not None else None
        try:
            if large is not None:
                await self._thread(large.take_place_of, old, self._move)
            elif old is not None:
                await self._thread(old.discard)
        finally:
            if old is not None and descriptor is not None:
                descriptor.give_back()

    async def _sign_large(self, large: Large, front: bytes, header: bytes) -> None:
        if not self._signs():
            self._finish_file(b"")
            return
        signer = self._admission.endpoint.signer
        try:
            draft = signer.draft(front, header, self.origin.application)
        except Unsignable as error:
            self._reject(error.reply)
            return
        if draft is None:
            self._finish_file(b"")
            return
        draft.body.feed(header)
        await self._thread(large.hash_body, draft)
        signer.finish(draft, lambda found: self._try(self._large_signed, found))

    def _rewritten(self, header_octets: int) -> "Rewritten":
        """What takes a new body from a filter. StoreError: no descriptor is left for its file."""
        from relaymta.filter.rewritten import Rewritten

        admission, queue = self._admission, self._admission.intake.queue
        place = admission.file()
        if place is None:
            raise StoreError("no file descriptor is left for it")
        memory = 0 if self.large is not None else REWRITTEN_MEMORY
        ident = queue.ident()  # its own, until it is the message's

        def make() -> Large:
            return Large(lambda room: queue.big_body(ident, room), [], changes=True, room=header_octets)

        most = max(self.limits.message_size - header_octets, 0)
        return Rewritten(make, memory, most, self._thread, place)

    def _move(self, file: BigBody) -> None:
        self._admission.intake.queue.become(file, self._ident)

    def _thread(self, work: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
        return self._admission.loop.run_in_executor(self._admission.threads, work, *arguments)

    def _finish_file(self, fields: bytes) -> None:
        assert self.large is not None
        self._on_thread(self.large.finish, fields, lambda future: self._try(self._file_finished, future))

    def _file_finished(self, future: "Future[Body]") -> None:
        error = future.exception()
        if error is not None:
            self._stored(store_error(error))
        else:
            self._submit(future.result())

    def _submit(self, data: list[bytes] | Body) -> None:
        """Hand the message to the queue, which calls `_stored`."""
        intake, identity = self._admission.intake, self.origin.identity
        self.octets = data.length if isinstance(data, Body) else sum(map(len, data))
        if identity is not None and "octets" in identity.quotas:
            self._units = intake.quotas.units()
            refused = self._units.account(identity, "octets", self.octets, self)
            if refused is not None:
                self._reject(refused)
                return
        self._hand_over(data)

    def _hand_over(self, data: list[bytes] | Body) -> None:
        key = self.key if self.keyed and self.key else self._flow.file
        if key and self.wanted is None:
            self._admission.spawn(self._hand_over_once(data, key))
            return
        helo, octets = self._session.helo, self.octets
        self._admission.intake.admit(
            self._ident, self, self.recipients, self.origin, helo, data, octets, self._stored, self.wanted
        )

    async def _hand_over_once(self, data: list[bytes] | Body, key: str) -> None:
        """Of a message with an idempotency key, or from a file: for those recipients for whom it was not accepted before."""
        admission = self._admission
        once, keep = admission.intake.once, admission.config.intake.idempotency_keep
        assert once is not None
        if self._header_octets >= 0 and self._content is not None:
            self._content.update(str(self.size - self._header_octets).encode())
        content = self._content.digest() if self._content is not None else SAME
        try:
            turn = await once.begin(owner_of(self.origin), key, ONCE_SECONDS)
        except Busy:
            self._reject(reply.KEY_BUSY)
            return
        except BaseException as error:
            self._stored(store_error(error))
            if not isinstance(error, Exception):
                raise
            return

        def stored(error: StoreError | None) -> None:
            turn.end()
            self._stored(error)

        try:
            if any(kept.content != content for kept in turn.kept.values()):
                turn.end()
                self._reject(reply.KEY_OTHER)
                return
            before = {address: kept.ident for kept in turn.kept.values() for address in kept.recipients}
            left = [address for address in self.recipients if address not in before]
            if not left:
                turn.end()
                self._repeated(before[self.recipients[0]])
                return
            request = Request(turn.digest, max(turn.kept, default=-1) + 1, content, left, [], int(keep * 1000))
            self.recipients, self.wanted = left, Wanted([], "", "", 0, request)
            admission.intake.admit(
                self._ident, self, left, self.origin, self._session.helo, data, self.octets, stored, self.wanted
            )
        except Exception as error:
            turn.end()
            self._failed(error)

    def _repeated(self, ident: int) -> None:
        """All recipients have the message already, by that of this id: the client is told as it was, or would have been, then."""
        self._admission.loop.call_soon(self._flow.answer, self, f"250 2.0.0 Ok: queued as {format_id(ident)}\r\n".encode())

    def _stored(self, error: StoreError | None) -> None:
        """Called by the queue: the group commit has returned, or the message could not be stored."""
        admission, intake = self._admission, self._admission.intake
        if error is not None:
            self._reject(intake.failed(error))
            return
        self._keep_file()
        if self._units is not None:
            self._units.keep()
        intake.accepted(self.octets, len(self.recipients))
        intake.accept_seconds(admission.now() - self._completed_at)
        answer = f"250 2.0.0 Ok: queued as {format_id(self._ident)}\r\n".encode()
        delay = intake.queue.delay(admission.config.intake.flow_delay)
        if delay:
            admission.loop.call_later(delay, self._flow.answer, self, answer)
        else:
            self._flow.answer(self, answer)

    def _keep_file(self) -> None:
        """The queue has the message, and owns its file."""
        if self._descriptor is not None:
            self.large = None
            self._descriptor.give_back()

    def _reject(self, answer: bytes, closes: bool = False) -> None:
        """Send a negative reply (4xx or 5xx) to the complete message, in a turn of its own: one segment may hold hundreds of
        them, which would recurse. `closes`: as of Flow.answer."""
        self._admission.loop.call_soon(self._flow.answer, self, answer, closes)

    # Ended

    def end(self) -> None:
        self._over = True
        if self.dialogue is not None:
            self.dialogue.reset()
        if not self._writing and (self.large is not None or self._units is not None):
            self._release()

    def _release(self) -> None:
        """Give up what is not stored. Called when no thread has the file; further calls do nothing."""
        if self._units is not None:
            self._units.give_back()
        large, self.large, descriptor = self.large, None, self._descriptor
        if large is not None and descriptor is not None:
            self._on_thread(large.discard, None, lambda future: descriptor.give_back())

    def _on_thread(self, work: Callable[..., Any], argument: Any, done: Callable[..., object]) -> None:
        """Do `work(argument)`, or `work()` without one, on a thread; then call `done(future)` on the loop."""
        arguments = () if argument is None else (argument,)
        self._admission.loop.run_in_executor(self._admission.threads, work, *arguments).add_done_callback(done)


def _without_empty_line(front: list[bytes], header_octets: int) -> bytes:
    """Our fields in front of a header. Where the message has none, they end with the empty line in front of its body, which
    belongs to the header that it gets."""
    fields = b"".join(front)
    return fields if header_octets else fields.removesuffix(b"\r\n")
