"""Filters that look at messages in the queue: those of stage "queued", and those that failed before (`on_failure = "later"`).

A message that waits for them is *unseen* (queue/unseen.py). The scanner takes as many at once as `filters.scans` allows, express
mail first and in each class the oldest first; but not those for which nothing can be done, since their filters are down. What
comes of one is one group commit: it is due as it is, or changed and signed, or held, or gone. A message over which a filter fails
rests, longer each time, and the others go on.

State, all of it changed on the loop: `_scans` (the messages that are looked at) by `_begin` and `_ended`; `_next` by these,
`_fill` and `_rest`; `_rests` by scans, `_fill` and `_run`; `_after` by `_fill`. A scan that is cancelled leaves the message
as it was, unless its commit is under way.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import msgspec

from relaymta.errors import StoreError, redacted
from relaymta.filter.chain import Chain, Chains, Outcome, reason_held
from relaymta.filter.guard import Finding
from relaymta.filter.judgement import Mail, Text, Verdict
from relaymta.filter.quarantine import of_finding
from relaymta.filter.revision import Revision
from relaymta.filter.rewritten import Rewritten
from relaymta.filter.signing import Draft, Signer, Unsignable
from relaymta.log import Log
from relaymta.proto.envelope import EIGHT_BIT, HELD, UNSEEN, Body, Envelope, Quarantine, Unseen, held_because
from relaymta.proto.header import header_end
from relaymta.queue import BigBody, Queue, format_id
from relaymta.queue.quarantine import not_judged
from relaymta.queue.unseen import FIRST, Taken
from relaymta.reservation import Reservation
from relaymta.shm import InFlight

__all__ = ["Needs", "Scanner"]

LOOK_EVERY = 0.25  # seconds, while there are unseen messages and nothing happens: whether a filter is up again
CHEAP, IDLE_SHARE = 0.005, 4  # seconds that a look may take; behind one that takes longer it waits so many times that
REST_LEAST, REST_MOST = 1.0, 60.0  # seconds that a message rests over which a filter has failed
STORE_SECONDS = 1.0  # after the store could not be read
SCANS = 4  # where there are no filters any more, but messages that wait for some
AHEAD = 32  # messages that are looked for together, beyond those that there is room for
HEAD_MOST = 2 << 20  # octets of a large message in which its header ends
ROOM = 65536  # octets in front of a large message for its signatures
MEMORY = 262144  # octets of a new body that are kept in memory
PIECE = 1 << 20


class Needs(NamedTuple):
    """What scanners of a worker use: its filters (None: there are none), its signer; `readdressed(recipients)`: for whom a
    message is queued; `rewritten(envelope, header)`: what follows from another header; `most()`: octets that a message may
    have."""

    chains: Callable[[], Chains | None]
    signer: Signer
    readdressed: Callable[[list[str]], list[str]]
    rewritten: Callable[[Envelope, bytes], None]
    most: Callable[[], int]


class Scanner:
    """See above, of one shard. `marks`: the worker's messages in flight, in shared memory; `probed`: those that were when the
    worker before this one died, and whether each is to be looked at alone (send/recovery.py)."""

    def __init__(self, queue: Queue, needs: Needs, marks: InFlight, probed: dict[int, bool], log: Log) -> None:
        self._queue = queue
        self._needs = needs
        self._marks = marks
        self._probed = probed
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._running: asyncio.Task[None] | None = None
        self._scans: dict[int, asyncio.Task[None]] = {}
        self._next: deque[int] = deque()  # those that come next, as far as they were looked for
        self._rests: dict[int, tuple[float, float]] = {}  # until when (loop time), and how long that was
        self._after = FIRST  # how far those were looked through for which nothing could be done
        self._woken = asyncio.Event()
        self._stopped = False
        self._warn_after = 0.0  # loop time

    def wake(self) -> None:
        """There may be unseen messages."""
        self._woken.set()
        if self._running is None and not self._stopped:
            self._running = self._loop.create_task(self._run())

    async def stop(self) -> None:
        """End all scans: the messages stay as they are."""
        self._stopped = True
        tasks = [task for task in (self._running, *self._scans.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        """As long as there are unseen messages."""
        while True:
            self._woken.clear()
            began, pause = self._loop.time(), 0.0  # before anything else, whoever wakes it: mail may come in at any rate
            try:
                if not await self._fill() and not self._scans and not self._woken.is_set():
                    self._running = None
                    self._rests.clear()
                    return
                spent = self._loop.time() - began
                if spent > CHEAP:  # thousands wait for filters that are down
                    pause = min(IDLE_SHARE * spent, LOOK_EVERY)
            except StoreError:  # it is told of by whoever writes
                pause = STORE_SECONDS
            except Exception as error:  # a defect: the others must not wait for ever
                self._warn(f"unseen messages could not be looked for: {_told(error)}")
                pause = STORE_SECONDS
            if pause:
                await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(max(LOOK_EVERY - pause, 0.0)):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def _fill(self) -> bool:
        """Begin scans; whether there are unseen messages."""
        chains, now = self._needs.chains(), self._loop.time()
        at_once = SCANS if chains is None else chains.scans
        down = (frozenset[str](), frozenset[str]()) if chains is None else (chains.waited_for(False), chains.waited_for(True))
        unseen, most = self._queue.unseen, at_once - len(self._scans) + AHEAD
        if most <= AHEAD:
            return True
        self._rests = {ident: rest for ident, rest in self._rests.items() if rest[0] > now - REST_MOST}
        busy = {*self._scans, *(ident for ident, (until, _) in self._rests.items() if until > now)}
        page = await unseen.page(FIRST, most, busy, down)
        self._next = deque(page.idents)
        if page.after == FIRST or len(page.idents) == most:
            self._after = FIRST
        else:  # for those in front nothing can be done now: look on, a page each time
            further = await unseen.page(max(self._after, page.after), most - len(page.idents), busy, down)
            self._next.extend(further.idents)
            self._after = further.after
        while self._next and len(self._scans) < at_once:
            self._begin()
        return not page.empty

    def _begin(self) -> None:
        """Look at the next one."""
        ident = self._next.popleft()
        if ident not in self._scans and not self._stopped:
            task = self._scans[ident] = self._loop.create_task(self._scan(ident))
            task.add_done_callback(partial(self._ended, ident))

    def _ended(self, ident: int, task: "asyncio.Task[None]") -> None:
        del self._scans[ident]
        if not task.cancelled() and (error := task.exception()) is not None:  # a defect: it must not be tried at once again
            self._warn(f"message {format_id(ident)} could not be shown to filters: {_told(error)}")
            self._rest(ident)
        if self._next:
            self._begin()
        else:
            self._woken.set()

    def _rest(self, ident: int) -> None:
        """It is not looked at for a while; and whether the others can be is looked for anew."""
        self._next.clear()
        _, before = self._rests.get(ident, (0.0, 0.0))
        seconds = min(max(2 * before, REST_LEAST), REST_MOST)
        self._rests[ident] = self._loop.time() + seconds, seconds

    def _warn(self, text: str) -> None:
        self._log.event("warning", text=text)

    def _warn_seldom(self, text: str) -> None:
        """What concerns very many messages."""
        now = self._loop.time()
        if now >= self._warn_after:
            self._warn_after = now + REST_MOST
            self._warn(text)

    # One message

    async def _scan(self, ident: int) -> None:
        """Have filters look at a message, unless somebody else has it."""
        alone = self._probed.get(ident)
        if alone is not None and not self._marks.probe(ident, alone):
            self._rest(ident)
            return
        taken: Taken | None = None
        refused = ""
        try:
            taken = await self._queue.unseen.take(ident)
            if taken is None:
                self._rest(ident)
                return
            self._probed.pop(ident, None)
            self._marks.add(ident)
            refused = await self._look(taken)
        except (OSError, StoreError) as error:
            self._warn(f"message {format_id(ident)} could not be shown to filters: {error}")
            self._rest(ident)
        finally:
            self._marks.remove(ident)
            if taken is not None:
                taken.release()
        if refused and taken is not None:
            await self._bounce(taken, refused)

    async def _bounce(self, taken: Taken, why: str) -> None:
        try:
            changed, _ = await self._queue.change_messages("bounce", [taken.ident], why)
        except StoreError as error:
            self._warn(f"message {format_id(taken.ident)} could not be bounced: {error}")
            changed = 0
        if changed:
            self._tell(taken, "bounced", why)
        else:
            self._rest(taken.ident)

    async def _look(self, taken: Taken) -> str:
        """Ask the filters, and do what they say. The reason, where it is to be bounced."""
        unseen, chains = _of(taken.envelope), self._needs.chains()
        chain = None if chains is None else chains.behind(unseen.filters, unseen.trusted)
        there = set() if chain is None else {guard.name for guard in chain.guards}
        if gone := [name for name in unseen.filters if name not in there]:
            self._warn_seldom(
                f"messages in the queue are not looked at by filter {', '.join(gone)}: it is not configured any more"
            )
        head = taken.data or await taken.piece(0, HEAD_MOST)
        at = unseen.above + unseen.front
        header = head[at : at + header_end(head[at:])]
        revision = Revision(self._mail(taken, head[: unseen.above], header), head[: unseen.above])
        try:
            if chain is None:
                return await self._settle(taken, revision, Outcome(Verdict.ACCEPT), head, header)
            found = await chain.ask(revision)
            for one in found:
                chain.told(revision.mail, one)
            return await self._settle(taken, revision, _outcome(chain, found, revision), head, header)
        finally:
            revision.discard()

    def _mail(self, taken: Taken, results: bytes, header: bytes) -> Mail:
        """As filters see it."""
        envelope, unseen, behind = taken.envelope, _of(taken.envelope), len(header) + _of(taken.envelope).front
        head, behind = results + header, len(results) + behind
        if taken.is_large:
            octets = envelope.size - behind
            text = Text(head, b"", octets, lambda at, most: taken.piece(behind + at, most), lambda: taken.lend(behind))
        else:
            text = Text(head, taken.data[behind:])
        return Mail(
            format_id(taken.ident), envelope.sender, envelope.recipients, envelope.client, envelope.helo, envelope.user,
            unseen.tls, text, mechanism=unseen.mechanism, listener=envelope.listener, parameters=tuple(unseen.parameters),
            announced=unseen.announced, protocol=unseen.protocol, rewritten=lambda: self._new_body(taken, len(head)),
        )  # fmt: skip

    def _new_body(self, taken: Taken, head: int) -> Rewritten:
        """What takes a new body from a filter."""
        room = 2 * ROOM + head + _of(taken.envelope).front
        memory = 0 if taken.is_large else MEMORY
        most = max(self._needs.most() - head, taken.envelope.size)
        own = self._queue.ident()  # until it is the message's
        return Rewritten(
            lambda: self._queue.unseen.big_body(taken, own, room), memory, most, self._thread, Reservation(lambda: None)
        )

    def _thread(self, work: Callable[..., object], *arguments: object) -> "asyncio.Future[object]":
        return self._loop.run_in_executor(None, work, *arguments)

    # What comes of it

    async def _settle(self, taken: Taken, revision: Revision, outcome: Outcome, head: bytes, header: bytes) -> str:
        """Do what the filters say, and tell. The reason, where it is to be bounced."""
        unseen, verdict, by = _of(taken.envelope), outcome.verdict, outcome.by
        why = "" if by is None else reason_held(by)
        if verdict is Verdict.REJECT and by is not None:
            refused = by.guard.refused
            if refused == "bounce" and (unseen.trusted or unseen.genuine) and taken.envelope.sender:
                return f"refused by {why}"
            verdict = Verdict.DISCARD if refused == "discard" else Verdict.HOLD
        if verdict is Verdict.DISCARD:
            await self._queue.unseen.dropped(taken)
            self._tell(taken, "discarded", why)
        elif verdict is Verdict.TEMPFAIL:
            self._rest(taken.ident)
        else:
            held = (
                of_finding(by, revision.header, self._queue.clock.now()) if verdict is Verdict.HOLD and by is not None else None
            )
            await self._store(taken, revision, why, held, [*outcome.left], head, header, outcome.route)
        return ""

    async def _store(
        self, taken: Taken, revision: Revision, why: str, quarantine: Quarantine | None, left: list[str], head: bytes,
        header: bytes, route: str,
    ) -> None:  # fmt: skip
        """It stays in the queue: due, held in the `quarantine` (`why`: as of Envelope.held_for), or waiting for the filters that
        are `left`; on another `route`, where one is given."""
        unseen, ident, queue = _of(taken.envelope), taken.ident, self._queue.unseen
        results, fields = head[: unseen.above], head[unseen.above : unseen.above + unseen.front]
        new = revision.body is not None or revision.sender is not None or revision.recipients is not None
        new = new or revision.header != header or revision.above != results or bool(route)
        draft = None
        if unseen.signs and not left and self._needs.signer:
            try:
                draft = self._needs.signer.draft(revision.above + fields, revision.header, taken.envelope.application)
            except Unsignable as error:
                await self._unsignable(taken, error)
                return
        held = held_because(why) if quarantine is not None else ""
        if new or draft is not None:
            behind = unseen.above + unseen.front + len(header)
            await self._replace(taken, revision, held, quarantine, left, fields, behind, draft, route)
        elif quarantine is not None:
            await queue.held(taken, held, quarantine, left)
        elif not left:
            await queue.passed(taken)
        elif left == unseen.filters:
            self._rest(ident)
            return
        else:
            await queue.waits(taken, left)
        self._rests.pop(ident, None)
        if held or not left:
            self._tell(taken, "held" if held else "changed" if new else "passed", held)

    async def _unsignable(self, taken: Taken, error: Unsignable) -> None:
        """It stays as it came, and is looked at again: once it can be signed, or an operator has released it. It is not sent
        unsigned, whoever releases it."""
        if error.reply.startswith(b"5"):
            held = held_because(f"it cannot be signed: {str(error)[4:]}")
            await self._queue.unseen.held(taken, held, not_judged(taken.envelope, self._queue.clock.now(), held), None)
            self._rests.pop(taken.ident, None)
            self._tell(taken, "held", held)
            return
        self._rest(taken.ident)  # a key that cannot be read concerns all that are to be signed with it
        self._warn_seldom(f"message {format_id(taken.ident)} waits in the queue, since it could not be signed: {str(error)[4:]}")

    async def _replace(
        self, taken: Taken, revision: Revision, held: str, quarantine: Quarantine | None, left: list[str], fields: bytes,
        behind: int, draft: Draft | None, route: str,
    ) -> None:  # fmt: skip
        """It has another header, body or envelope from now on; its body was `behind` so many octets."""
        before, unseen, body = taken.envelope, _of(taken.envelope), cast(Rewritten | None, revision.body)
        front = [revision.above, fields, revision.header]
        data: list[bytes] | Body
        if body is not None and body.large is not None:
            data = await self._finished(taken, cast(BigBody, body.large), front, draft)
        elif body is None and taken.is_large:
            data = await self._copied(taken, behind, front, draft)
        else:
            rest = body.body if body is not None else taken.data[behind:]
            signature = await self._signature(draft, [revision.header, rest])
            data = [signature, *front, rest]
            if not self._queue.unseen.fits(sum(map(len, data))):
                data = await self._written(taken, data)
        envelope = msgspec.structs.replace(
            before, size=data.length if isinstance(data, Body) else sum(map(len, data)), placements=[], held_for=held,
            sender=before.sender if revision.sender is None else revision.sender,
            flags=before.flags & ~UNSEEN | (HELD if held else UNSEEN if left else 0), quarantine=quarantine,
            unseen=msgspec.structs.replace(unseen, filters=left, above=len(revision.above)) if left else None,
            route=route or before.route,
        )  # fmt: skip
        if revision.recipients is not None:
            envelope.recipients = self._readdressed(before.recipients, revision.recipients)
        if body is not None and body.eight_bit:
            envelope.flags |= EIGHT_BIT
        self._needs.rewritten(envelope, revision.above + revision.header)
        await self._queue.unseen.replaced(taken, envelope, data)

    def _readdressed(self, before: list[str], now: list[str]) -> list[str]:
        """For whom a message is queued: of those who were recipients before, aliases were followed then."""
        found: list[str] = []
        for address in now:
            found += [address] if address in before else self._needs.readdressed([address])
        return list(dict.fromkeys(found))

    async def _signature(self, draft: Draft | None, data: list[bytes]) -> bytes:
        """The signatures of a message, of which this is what its draft has not been fed yet. StoreError: it cannot be signed."""
        if draft is None:
            return b""
        for piece in data:
            await self._thread(draft.body.feed, piece)
        done: asyncio.Future[bytes | Exception] = self._loop.create_future()
        self._needs.signer.finish(draft, lambda found: None if done.done() else done.set_result(found))
        found = await done
        if isinstance(found, Exception):
            raise StoreError(f"it could not be signed: {found}")
        return found

    async def _finished(self, taken: Taken, file: BigBody, front: list[bytes], draft: Draft | None) -> Body:
        """The file of a large body becomes that of a message."""
        if draft is not None:
            draft.body.feed(front[-1])
            await self._thread(_fed, file, draft)
        signature = await self._signature(draft, [])
        await self._thread(self._queue.unseen.become, taken, file)
        return cast(Body, await self._thread(file.finish, [signature, *front]))

    async def _copied(self, taken: Taken, behind: int, front: list[bytes], draft: Draft | None) -> Body:
        """As `_finished`, of a copy of what is behind the header."""
        file = await self._file(taken, ROOM + sum(map(len, front)))
        try:
            at = behind
            while piece := await taken.piece(at, PIECE):
                await self._thread(file.write, [piece])
                at += len(piece)
            return await self._finished(taken, file, front, draft)
        except BaseException:
            self._thread(file.discard)
            raise

    async def _written(self, taken: Taken, data: list[bytes]) -> Body:
        """A file of what has become too large for a segment."""
        file = await self._file(taken, 0)
        try:
            await self._thread(file.write, data)
            return await self._finished(taken, file, [], None)
        except BaseException:
            self._thread(file.discard)
            raise

    async def _file(self, taken: Taken, room: int) -> BigBody:
        return cast(BigBody, await self._thread(self._queue.unseen.big_body, taken, self._queue.ident(), room))

    def _tell(self, taken: Taken, result: str, reason: str) -> None:
        envelope = taken.envelope
        self._log.event(
            "scanned", id=format_id(taken.ident), sender=envelope.sender, recipients=envelope.recipients, result=result,
            reason=reason,
        )  # fmt: skip


def _of(envelope: Envelope) -> Unseen:
    assert envelope.unseen is not None
    return envelope.unseen


def _outcome(chain: Chain, found: list[Finding], revision: Revision) -> Outcome:
    """What is done because of what filters say of a message in the queue. What is refused for now waits, as what fails does; of
    another filter it changes nothing."""
    said = [one for one in found if not one.later and one.action is not Verdict.TEMPFAIL]
    looked = {one.guard.name for one in said}
    left = tuple(guard.name for guard in chain.guards if guard.name not in looked)
    return chain.outcome(said, revision)._replace(left=left)


def _fed(file: BigBody, draft: Draft) -> None:
    """On a thread."""
    at = 0
    while piece := file.piece(at, PIECE):
        draft.body.feed(piece)
        at += len(piece)


def _told(error: BaseException) -> str:
    return redacted(f"{type(error).__name__}: {error}")
