"""One configured filter, as one worker asks it: within its time, on one of its places, and not at all while it is down.

Circuit: three failures in a row within 10 seconds, and what their time-outs take (no answer, or one that makes no sense), and the
filter is *down* for this worker: nobody waits for it, what `on_failure` says is done at once. Once a second it is probed; as soon
as it answers it is asked again. One that answers probes and no messages is probed ever more seldom.

State, all of it changed on the loop: `_failed_at`, `_relapses` and `_down` by `_note_failure` and `_note_answer`; `_probing` by
these and `close`.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from relaymta.errors import StoreError, redacted
from relaymta.filter.judgement import (
    Answer,
    Condition,
    Filter,
    FilterFailure,
    FilterSession,
    Follower,
    Mail,
    NewBody,
    NewEnvelope,
    Verdict,
)
from relaymta.filter.places import Places
from relaymta.log import Log
from relaymta.metrics import FilterCounters
from relaymta.proto.address import domain_matches, domain_of
from relaymta.proto.edits import Edit
from relaymta.shm import Limits

if TYPE_CHECKING:
    from relaymta.config import Filter as Settings

__all__ = ["Finding", "Guard"]

EDITS_MOST = 100  # of one filter, where it is asked more than once about a message
FAILURES, WITHIN = 3, 10.0  # in a row, within so many seconds
PROBE_EVERY, PROBE_MOST, RELAPSES = 1.0, 30.0, 5  # seconds; twice as many with each relapse, of which so many count
NOTHING: frozenset[str] = frozenset()
OF_MESSAGES = frozenset({"MAIL", "RCPT", "DATA"})
WAITED_FOR = ("later", "tempfail", "disconnect")  # of on_failure: what a message in the queue waits for
_FAILED = {"disconnect": Verdict.TEMPFAIL, "later": Verdict.ACCEPT}  # other words are verdicts
WARN_EVERY = 10.0  # seconds between two warnings about what a filter says


class Judge(Protocol):
    """Whose word a finding is: a Guard, or a rule about mail. `title`: as a reason names it; `enforce`, `refused`: as
    configured."""

    name: str
    title: str
    enforce: bool
    refused: str

    def warn(self, text: str) -> None:
        """Log what is wrong with what it says."""


class Finding(NamedTuple):
    """What has come of asking one filter. `word`: its verdict, "failed", or "skipped" for a message that is too large for it;
    `action`: what follows from that; `failure`: the reason as FilterFailure has it, or ""; `closes`: the client is disconnected;
    `seconds`: what it took; `later`: it is to look at the message later, before which that is not delivered. The others as of
    Answer: changes are those that are to be made."""

    guard: Judge
    word: str
    action: Verdict
    reason: str = ""
    score: float | None = None
    edits: Sequence[Edit] = ()
    failure: str = ""
    closes: bool = False
    seconds: float = 0.0
    body: NewBody | None = None
    envelope: NewEnvelope | None = None
    dropped: int = 0
    reply: bytes = b""
    condition: Condition = ""
    later: bool = False
    route: str = ""

    def joined(self, before: "Finding") -> "Finding":
        """With what the same filter has said before, of another part of the same message: the stricter word, all changes. Of
        fields that it puts on top the first stays there."""
        edits, envelope = [*self.edits, *before.edits], before.envelope
        if self.envelope is not None:
            envelope = self.envelope if envelope is None else envelope.joined(self.envelope)
        word = before if before.action > self.action else self
        return word._replace(
            edits=edits[-EDITS_MOST:], envelope=envelope, body=self.body, seconds=before.seconds + self.seconds, route=self.route,
            dropped=before.dropped + self.dropped + max(len(edits) - EDITS_MOST, 0),
        )  # fmt: skip

    @property
    def says(self) -> bool:
        """Whether something follows from it."""
        return self.action is not Verdict.ACCEPT or bool(self.edits or self.envelope or self.body or self.dropped)

    @property
    def follows(self) -> str:
        """What follows from it, as it is logged."""
        return "later" if self.later else self.action.word

    @property
    def is_sure(self) -> bool:
        """Whether nothing that another filter says can change what is done."""
        return self.action is Verdict.REJECT


class Guard:
    """See above. `settings`: as configured; `filter`: what speaks to it; `follows`: it is a judgement.Follower, by whose session
    it is asked; `alone`, `asks`, `begins`, `looks`: as of that; `tags`: it may say so; `is_queued`: it looks at messages that are
    in the queue."""

    def __init__(
        self,
        settings: "Settings",
        asked: Filter,
        limits: Limits,
        counters: FilterCounters,
        log: Log,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.settings = settings
        self.name, self.title = settings.name, f"filter {settings.name}"
        self.enforce = settings.enforce
        self.refused: str = settings.refused
        self.filter = asked
        self._meaning = {word: Verdict[verdict.upper()] for word, verdict in settings.meaning.items()}
        self._scores = sorted((one.at, Verdict[one.verdict.upper()]) for one in settings.score)
        self._follower = cast(Follower, asked) if hasattr(asked, "session") else None
        self._longest = float(getattr(asked, "longest", 0.0))  # of what bounds its own time
        self.shape()
        self._places = Places(settings.name, settings.concurrency, limits, loop, self._show)
        self._counters = counters
        self._log = log
        self._loop = loop
        self._failed_at: deque[tuple[float, bool]] = deque(maxlen=FAILURES)  # with whether the question was the last
        self._relapses = 0  # how often it was up again without an answer to such a question
        self._down: tuple[float, str] | None = None  # since when (loop time), and why
        self._probing: asyncio.Task[None] | None = None
        self._warn_after = 0.0
        self._closed = False
        self.is_queued = settings.is_queued

    def shape(self) -> None:
        """What it is asked, as the filter has it now: hooks may be others since their file was written."""
        one = self._follower
        self.alone, self.asks = (False, NOTHING) if one is None else (one.alone, one.asks)
        self.begins, self.looks = (False, True) if one is None else (one.begins, one.looks)
        self.tags = Verdict.TAG in (*self._meaning.values(), *(verdict for _, verdict in self._scores))
        self.tags = self.tags and (self.looks or bool(self.asks & OF_MESSAGES))
        self.follows = one is not None and (bool(self.asks) or (one.alone and self.looks))

    def begin(self) -> None:
        """The configuration that has it is in use from now on."""
        self._show()
        begin = getattr(self.filter, "begin", None)
        if begin is not None:
            begin()

    def close(self) -> None:
        """No configuration has it any more. What asks it now, from sessions that began before, gets its answer; it is never down,
        since nothing would find that it is up again."""
        self._closed = True
        if self._probing is not None:
            self._probing.cancel()
        self._down = self._probing = None
        self.filter.close()

    def stop(self) -> None:
        """As `close`; the process ends, and so does what the filter has begun."""
        if not self._closed:
            self.close()
        stop = getattr(self.filter, "stop", None)
        if stop is not None:
            stop()

    @property
    def idle(self) -> bool:
        """Whether there is nothing that it is asked."""
        return not (self.looks or self.follows or self.tags)

    @property
    def open(self) -> int:
        """Descriptors that its connections have, as far as they are kept: others are few."""
        return int(getattr(self.filter, "open", 0))

    def state(self) -> dict[str, object]:
        """For operators: whether it is down for this worker, for how many seconds and why, and how many messages wait."""
        down = self._down
        return {
            "name": self.name, "type": self.settings.type, "up": down is None, "waiting": self._places.waiting,
            "enforce": self.enforce, "down for": 0 if down is None else round(self._loop.time() - down[0]),
            "why": "" if down is None else down[1],
        }  # fmt: skip

    def told(self) -> str:
        """For operators: what it does now."""
        if self._down is None:
            return f"filter {self.name}"
        since = datetime.fromtimestamp(time.time() - (self._loop.time() - self._down[0]), UTC)
        return f"filter {self.name}, down since {since:%Y-%m-%d %H:%M:%SZ}: {self._down[1]}"

    def session(self, client: str) -> FilterSession:
        """With a client, where the filter `follows` it."""
        assert self._follower is not None
        return self._follower.session(client)

    def looks_at(self, recipients: Sequence[str]) -> bool:
        """Whether it is asked about mail to these."""
        wanted = self.settings.recipient_domain
        return not wanted or any(domain_matches(domain_of(address), wanted) for address in recipients)

    async def ask(self, mail: Mail, trusted: bool, until: float, session: FilterSession | None = None) -> Finding:
        """Ask it about a message, until a loop time at most. `trusted`: the client may relay; `session`: by which it follows the
        client. OSError or StoreError: the message itself cannot be read or written; any other failure is in what is returned."""
        settings = self.settings
        if mail.text.size > settings.max_size and settings.sees_text:
            if settings.oversize != "head":
                return self._oversize()
            mail = mail.head(settings.max_size)
        asked = self.filter if session is None else session
        return await self._put(lambda: asked.judge(mail), trusted, until, session, True)

    async def put(
        self, question: Callable[[], Awaitable[Answer]], trusted: bool, until: float, session: FilterSession
    ) -> Finding | None:
        """A question about the envelope; None: it has nothing against it so far."""
        found = await self._put(question, trusted, until, session, not self.looks)
        return None if found.word == "continue" else found

    async def _put(
        self, question: Callable[[], Awaitable[Answer]], trusted: bool, until: float, session: FilterSession | None, whole: bool
    ) -> Finding:
        """Put a question, until a loop time at most, when there is a place for it. `whole`: the last one about a message."""
        settings = self.settings
        if self._down is not None:
            return self._failed(trusted, FilterFailure("connect", f"down: {self._down[1]}"), 0.0)
        if not settings.address:  # it is no program elsewhere: it has no places, and bounds its own time
            late = until if until < self._loop.time() + self._longest else None
            if late is not None and asyncio.current_task() is None:
                await asyncio.sleep(0)
            return await self._asked(question, trusted, late, until, session, whole)
        if asyncio.current_task() is None:  # what has a time-out has to be a task (accept/eager.py)
            await asyncio.sleep(0)
        began = self._loop.time()
        deadline = min(began + settings.timeout, until)
        if not self._places.take_now():
            try:
                async with asyncio.timeout_at(deadline):
                    await self._places.take()
            except TimeoutError:
                return self._failed(trusted, FilterFailure("timeout", "no place was free in time"), self._loop.time() - began)
        try:
            return await self._asked(question, trusted, deadline, until, session, whole)
        finally:
            self._places.give()

    async def _asked(
        self, question: Callable[[], Awaitable[Answer]], trusted: bool, deadline: float | None, until: float,
        session: FilterSession | None, whole: bool,
    ) -> Finding:  # fmt: skip
        """Ask it, now that there is a place."""
        began, settings = self._loop.time(), self.settings
        answer = None
        try:
            if deadline is None:
                answer = await question()
            else:
                async with asyncio.timeout_at(deadline) as timer:
                    if session is not None:
                        session.renew = partial(self._renew, timer, until)
                    answer = await question()
            if answer.word == "continue":
                self._note_answer(whole)
                return Finding(self, answer.word, Verdict.ACCEPT)
            verdict = self._verdict(answer)
        except TimeoutError:
            failure = FilterFailure("timeout", f"no answer in {self._loop.time() - began:.1f} s")
        except FilterFailure as error:
            failure = error
        except (OSError, StoreError):  # of the message's own file
            raise
        except Exception as error:  # a defect of ours costs no more than the filter's failure
            failure = FilterFailure("protocol", redacted(f"{type(error).__name__}: {error}"))
        else:
            self._note_answer(whole)
            seconds = self._loop.time() - began
            self._counters.took(seconds)
            self._counters.verdict(verdict.word)
            return self._found(answer, verdict, seconds)
        if answer is not None and answer.body is not None:
            answer.body.discard()
        seconds = self._loop.time() - began
        self._counters.took(seconds)
        if failure.own:  # it has answered: crafted messages do not take it from the others
            self._note_answer(whole)
        else:
            self._note_failure(failure, whole)
        if failure.reason == "oversize" and settings.oversize != "head":
            return self._oversize(seconds)
        return self._failed(trusted, failure, seconds)

    def _renew(self, timer: asyncio.Timeout, until: float) -> None:
        """It is still at work: its time begins anew."""
        with contextlib.suppress(RuntimeError):  # time is up in this very turn
            timer.reschedule(min(self._loop.time() + self.settings.timeout, until))

    def _found(self, answer: Answer, verdict: Verdict, seconds: float) -> Finding:
        """What follows from an answer: without `enforce` nothing, and of the changes what it may do."""
        found = Finding(
            self, verdict.word, verdict, answer.reason, answer.score, answer.edits, seconds=seconds, body=answer.body,
            envelope=answer.envelope, dropped=answer.dropped, reply=answer.reply, condition=answer.condition, route=answer.route,
        )  # fmt: skip
        if answer.note:
            self.warn(answer.note)
        if self.settings.enforce and verdict < Verdict.TEMPFAIL:
            return self._allowed(found)
        if found.body is not None:
            found.body.discard()
        if not self.settings.enforce:
            found = found._replace(action=Verdict.ACCEPT, condition="")
        return found._replace(edits=(), body=None, envelope=None, dropped=0, route="")

    def _allowed(self, found: Finding) -> Finding:
        """A finding without the changes that the filter may not make."""
        may, dropped, body, envelope = self.settings.may, found.dropped, found.body, found.envelope
        if body is not None and "body" not in may:
            body.discard()
            found, dropped = found._replace(body=None), dropped + 1
        if found.edits and "header" not in may:
            found, dropped = found._replace(edits=()), dropped + len(found.edits)
        if envelope is not None and "recipients" not in may:
            dropped += len(envelope.added) + len(envelope.removed) + (envelope.only is not None)
            envelope = envelope._replace(added=(), removed=(), only=None)
        if envelope is not None and "sender" not in may:
            dropped += envelope.sender is not None
            envelope = envelope._replace(sender=None)
        return found._replace(envelope=envelope, dropped=dropped)

    def _verdict(self, answer: Answer) -> Verdict:
        """What its word means, or, where there are verdicts by score, its score."""
        verdict = self._meaning.get(answer.word)
        if verdict is None:
            raise FilterFailure("protocol", f"it says {answer.word[:64]!r}")
        if not self._scores or answer.score is None or verdict is Verdict.TEMPFAIL:
            return verdict
        reached = [found for at, found in self._scores if answer.score >= at]
        return reached[-1] if reached else Verdict.ACCEPT

    def warn(self, text: str) -> None:
        """Log what is wrong with its answers, unless that was done a moment ago."""
        now = self._loop.time()
        if now >= self._warn_after:
            self._warn_after = now + WARN_EVERY
            self._log.event("warning", text=f"filter {self.name}: {text}")

    # What follows where there is no verdict

    def _oversize(self, seconds: float = 0.0) -> Finding:
        """The message is larger than it takes, by its own word or by `max_size`."""
        self._counters.failure("oversize")
        action = {"hold": Verdict.HOLD, "reject": Verdict.REJECT}.get(self.settings.oversize, Verdict.ACCEPT)
        if not self.settings.enforce:
            action = Verdict.ACCEPT
        return Finding(self, "skipped", action, "the message is too large for it", failure="oversize", seconds=seconds)

    def _failed(self, trusted: bool, failure: FilterFailure, seconds: float) -> Finding:
        settings = self.settings
        self._counters.failure(failure.reason)
        what = settings.failing(trusted) if settings.enforce else "accept"
        action = _FAILED[what] if what in _FAILED else Verdict[what.upper()]
        return Finding(
            self, "failed", action, str(failure), failure=failure.reason, closes=what == "disconnect", seconds=seconds,
            later=what == "later",
        )  # fmt: skip

    def waits(self, trusted: bool) -> bool:
        """Whether it is down, so that a message in the queue waits for it."""
        return self._down is not None and self.settings.enforce and self.settings.failing(trusted) in WAITED_FOR

    # The circuit

    def _note_answer(self, whole: bool) -> None:
        if not whole:  # one that answers at RCPT may be silent about each message
            self._failed_at = deque([one for one in self._failed_at if one[1]], FAILURES)
            return
        self._failed_at.clear()
        self._relapses = 0
        if self._down is not None:  # asked before it went down
            self._up()

    def _note_failure(self, failure: FilterFailure, whole: bool) -> None:
        now = self._loop.time()
        if failure.reason == "protocol":
            self.warn(f"an answer that makes no sense: {failure}")
        self._failed_at.append((now, whole))
        within = WITHIN if failure.reason != "timeout" else WITHIN + (FAILURES - 1) * self.settings.seconds
        if self._down is None and len(self._failed_at) == FAILURES and now - self._failed_at[0][0] <= within and not self._closed:
            self._down = now, f"{failure.reason}: {failure}"
            self._log.event("filter", filter=self.name, state="down", reason=self._down[1])
            self._probing = self._loop.create_task(self._probe())
            self._show()

    async def _probe(self) -> None:
        """Until it answers."""
        while self._down is not None:
            await asyncio.sleep(min(PROBE_EVERY * 2**self._relapses, PROBE_MOST))
            try:
                async with asyncio.timeout(self.settings.timeout):
                    await self.filter.probe()
            except (FilterFailure, OSError) as failure:  # TimeoutError is one
                since = self._down[0] if self._down is not None else self._loop.time()
                self._down = since, str(failure) or "no answer in time"
            except Exception as error:  # a defect: it stays down, and says why
                self._down = self._loop.time(), redacted(f"{type(error).__name__}: {error}")
            else:
                self._relapses = min(self._relapses + 1, RELAPSES)
                self._up()

    def _up(self) -> None:
        if self._down is None:
            return
        since, self._down = self._down[0], None
        probing, self._probing = self._probing, None
        if probing is not None and probing is not asyncio.current_task():
            probing.cancel()
        self._failed_at.clear()
        seconds = round(self._loop.time() - since, 1)
        self._log.event("filter", filter=self.name, state="up", reason=f"it was down for {seconds} s")
        self._show()

    def _show(self) -> None:
        if not self._closed:  # another guard of this name may show its state now
            self._counters.set_state(self._down is not None, self._places.waiting)
