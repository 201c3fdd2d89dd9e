"""The filters that follow one client (milters): each has a session of its own with it, as long as the client's lasts.

State, all of it changed on the loop, by the one question that is under way or by `reset` and `end`: `_decided`, what a filter
has said of the whole message before it has seen it, or why it could not be asked: it is not asked again in this transaction;
`_noted`, what it has said of a recipient where no refusal follows from that.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from relaymta.filter.guard import Finding, Guard
from relaymta.filter.judgement import Answer, FilterSession, Follower, Mail, Verdict

if TYPE_CHECKING:
    from relaymta.filter.chain import Chain

__all__ = ["Dialogue"]


class Dialogue:
    """See above."""

    __slots__ = ("_chain", "_decided", "_noted", "_sessions")

    def __init__(self, chain: "Chain") -> None:
        self._chain = chain
        self._sessions: dict[Guard, FilterSession] = {}
        self._decided: dict[Guard, Finding] = {}
        self._noted: dict[Guard, Finding] = {}

    async def mail(self, mail: Mail) -> Finding | None:
        """MAIL: what refuses it, or None. As all questions here: cancelled, no filter is left in the middle of one."""
        return await self._ask(mail, lambda session: session.mail(mail))

    async def rcpt(self, mail: Mail, address: str) -> Finding | None:
        """RCPT: what refuses it, or None."""
        return await self._ask(mail, lambda session: session.rcpt(mail, address))

    async def _ask(self, mail: Mail, question: Callable[[FilterSession], Awaitable[Answer]]) -> Finding | None:
        """Ask one after the other, as they may change what they are told of; up to a refusal."""
        chain = self._chain
        until = chain.deadline()
        for guard in chain.guards:
            if not guard.asks:
                continue
            found = self._decided.get(guard)
            if found is None:
                found = await self._put(guard, question, until)
            if found is not None and found.action >= Verdict.TEMPFAIL:
                chain.told(mail, found)
                return found
        return None

    async def _put(self, guard: Guard, question: Callable[[FilterSession], Awaitable[Answer]], until: float) -> Finding | None:
        session = self._session(guard)
        found = await guard.put(lambda: question(session), self._chain.trusted, until, session)
        if found is None:
            return None
        if session.decided or found.failure:
            self._decided[guard] = found
        elif found.action < Verdict.TEMPFAIL:
            before = self._noted.get(guard)
            if before is None or found.action > before.action:
                self._noted[guard] = found
        return found

    def refused(self, address: str, answer: bytes) -> None:
        """The relay itself has refused a recipient."""
        for session in self._sessions.values():
            session.refused(address, answer)

    async def judge(self, guard: Guard, mail: Mail, trusted: bool, until: float) -> Finding:
        """As of `Guard.ask`, also for a filter that follows nobody."""
        if not guard.follows:
            return await guard.ask(mail, trusted, until)
        found = self._decided.get(guard) or await guard.ask(mail, trusted, until, self._session(guard))
        noted = self._noted.get(guard)
        if noted is None or noted.action <= found.action:
            return found
        return found._replace(word=noted.word, action=noted.action, reason=noted.reason)

    def _session(self, guard: Guard) -> FilterSession:
        session = self._sessions.get(guard)
        if session is None:
            follower: Follower = guard.filter  # type: ignore[assignment]
            session = self._sessions[guard] = follower.session()
        return session

    def reset(self) -> None:
        """The transaction is over."""
        self._decided.clear()
        self._noted.clear()
        for session in self._sessions.values():
            session.reset()

    def end(self) -> None:
        """The client has gone, or is another one. Further calls do nothing."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
