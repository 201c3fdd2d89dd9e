"""The filters that follow one client: each has a session of its own with it, as long as the client's lasts.

State, all of it changed on the loop, by the one question that is under way or by `reset` and `end`: `_decided`, what a filter
has said of the whole message before it has seen it, or why it could not be asked: it is not asked again in this transaction;
`_noted`, what else it has said of the envelope, as far as no refusal has followed from that; `_at_data`, of which filters the
former was said at DATA.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, cast

from relaymta.filter.guard import Finding, Guard, Judge
from relaymta.filter.judgement import Answer, FilterSession, Greeter, Mail, Verdict

if TYPE_CHECKING:
    from relaymta.filter.chain import Chain

__all__ = ["Dialogue"]

UNADDRESSED = frozenset({"CONNECT", "HELO", "AUTH", "MAIL"})  # when no recipient is known


class Dialogue:
    """See above. `client`: its address."""

    __slots__ = ("_at_data", "_chain", "_client", "_decided", "_noted", "_sessions")

    def __init__(self, chain: "Chain", client: str) -> None:
        self._chain = chain
        self._client = client
        self._sessions: dict[Guard, FilterSession] = {}
        self._decided: dict[Judge, Finding] = {}
        self._noted: dict[Judge, Finding] = {}
        self._at_data = frozenset[Judge]()
        for guard in chain.guards:
            if guard.begins:
                self._session(guard)

    async def client(self, verb: str, mail: Mail) -> Finding | None:
        """CONNECT, HELO or AUTH: what refuses the client, or None. Nothing of it counts for a message."""
        found = await self._ask(verb, mail, (), lambda session: cast(Greeter, session).client(verb, mail))
        self._decided.clear()
        self._noted.clear()
        return found

    async def mail(self, mail: Mail) -> Finding | None:
        """MAIL: what refuses it, or None. As all questions here: cancelled, no filter is left in the middle of one."""
        return await self._ask("MAIL", mail, (), lambda session: session.mail(mail))

    async def rcpt(self, mail: Mail, address: str) -> Finding | None:
        """RCPT: what refuses it, or None."""
        return await self._ask("RCPT", mail, [address], lambda session: session.rcpt(mail, address))

    async def data(self, mail: Mail) -> Finding | None:
        """DATA: what refuses it, or None. Where it was refused before, recipients may have been added since: what was said then
        does not count."""
        for guard in self._at_data:
            self._decided.pop(guard, None)
        before = frozenset(self._decided)
        try:
            return await self._ask("DATA", mail, mail.recipients, lambda session: session.data(mail))
        finally:
            self._at_data = frozenset(self._decided) - before

    async def _ask(
        self, verb: str, mail: Mail, recipients: Sequence[str], question: Callable[[FilterSession], Awaitable[Answer]]
    ) -> Finding | None:
        """Ask one after the other, as they may change what they are told of; up to a refusal that holds whatever others say."""
        chain, refusal, instead = self._chain, None, None
        until, said = chain.deadline(), list[tuple[Finding, bool]]()
        for guard in chain.guards:
            if verb not in guard.asks or not (verb in UNADDRESSED or guard.looks_at(recipients)):
                continue
            found = self._decided.get(guard)
            if found is None:
                found = await self._put(guard, question, until, said)
                if found is not None and guard not in self._decided and found.action is Verdict.ACCEPT and found.word != "accept":
                    chain.told(mail, found, [*recipients])  # nothing follows, and what is said of the message will not tell it
            if found is None:
                continue
            if found.condition == "if rejected":
                instead = instead or found
            elif found.action >= Verdict.TEMPFAIL and (refusal is None or found.action > refusal.action):
                refusal = found
                if not found.condition:
                    break
        if refusal is None:
            self._note(said)
            return None
        if instead is not None and refusal.action is Verdict.REJECT:
            refusal = instead._replace(action=Verdict.TEMPFAIL)
        chain.told(mail, refusal, [*recipients])
        return refusal

    async def _put(
        self, guard: Guard, question: Callable[[FilterSession], Awaitable[Answer]], until: float, said: list[tuple[Finding, bool]]
    ) -> Finding | None:
        """Put a question. What of the answer counts for the message only if the command is accepted is added to `said`, with
        whether the filter is not to be asked any more then."""
        session = self._session(guard)
        found = await guard.put(lambda: question(session), self._chain.trusted, until, session)
        if found is None:
            return None
        if found.failure or (session.decided and guard.looks):
            self._decided[guard] = found
        elif found.action < Verdict.TEMPFAIL and found.says:
            said.append((found, session.decided))
        return found

    def _note(self, said: Sequence[tuple[Finding, bool]]) -> None:
        """What filters have said of a command that is accepted counts for the message."""
        for found, is_decided in said:
            guard = found.guard
            if is_decided:
                self._decided[guard] = found
            else:
                before, noted = self._noted.get(guard), found._replace(condition="")
                self._noted[guard] = noted if before is None else noted.joined(before)

    def refused(self, address: str, answer: bytes) -> None:
        """The relay itself has refused a recipient."""
        for session in self._sessions.values():
            session.refused(address, answer)

    @property
    def has_said(self) -> bool:
        """Whether any of them has said something of the envelope that is to be done with the message."""
        return bool(self._noted or self._decided)

    def knows(self, guard: Guard) -> bool:
        """Whether a filter has said something that counts for the message, whoever its recipients are by now."""
        return guard in self._noted or guard in self._decided

    async def judge(self, guard: Guard, mail: Mail, trusted: bool, until: float) -> Finding:
        """As of `Guard.ask`, also for a filter that follows nobody; and for one that is asked about the envelope alone: what it
        has said of that."""
        if not guard.follows:
            return await guard.ask(mail, trusted, until)
        decided, noted = self._decided.get(guard), self._noted.get(guard)
        if guard.looks:
            found = decided or await guard.ask(mail, trusted, until, self._session(guard))
        elif decided is not None and decided.action < Verdict.TEMPFAIL:
            found = decided
        else:  # what it has refused are recipients, and they were refused
            return noted or Finding(guard, "accept", Verdict.ACCEPT)
        return found if noted is None else found.joined(noted)

    def _session(self, guard: Guard) -> FilterSession:
        session = self._sessions.get(guard)
        if session is None:
            session = self._sessions[guard] = guard.session(self._client)
        return session

    def reset(self) -> None:
        """The transaction is over."""
        self._at_data = frozenset()
        self._decided.clear()
        self._noted.clear()
        for session in self._sessions.values():
            session.reset()

    def end(self) -> None:
        """The client has gone, or is another one. Further calls do nothing."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
