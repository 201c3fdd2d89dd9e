"""Lists of addresses and of domains in the DNS (proto/dnsbl.py). The address is asked about as soon as the client is there, in
the background; what the lists say is weighed at RCPT.

State: `paused_until` of a list, set when it refuses us. The answers themselves are the resolver's to keep. A session has one task
for each question, which ends by itself, by `close`, or when the time is over.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.filter.judgement import Answer, FilterFailure, FilterSession, Mail
from relaymta.filter.signatures import claims
from relaymta.proto.address import domain_of, in_a_labels, is_host
from relaymta.proto.dnsbl import Codes, reversed_address

__all__ = ["DnsList", "Dnsbl", "Row"]

PAUSE = 600.0  # seconds for which a list is not asked that refuses us
SHOWN = 3  # lists in a reason
AUTHORS = 10  # domains of From: that are looked up

Result = Literal["listed", "clean", "refused", "failed", "paused"]


@dataclass
class DnsList:
    """A list. `domain`: of domains; `paused_until`: loop time."""

    zone: str
    codes: Codes
    score: float = 1.0
    domain: bool = False
    paused_until: float = 0.0


class Row(NamedTuple):
    """What a list says. `asked`: the name; `score`: what follows from it; `seconds`: what it took."""

    zone: str
    asked: str
    result: Result
    answers: Sequence[str]
    score: float
    seconds: float


class Dnsbl:
    """A judgement.Follower. Its words: listed, clean."""

    alone, begins = False, True
    asks = frozenset({"RCPT"})

    def __init__(
        self, lists: Sequence[DnsList], timeout: float, resolver: Resolver,
        count: Callable[[str, Result], object] = lambda zone, result: None, warn: Callable[[str], object] = lambda text: None,
    ) -> None:  # fmt: skip
        """`timeout`: seconds for all answers, from the connection on. `count(zone, result)`: a list was asked, or is paused."""
        self.lists = list(lists)
        self.looks = any(one.domain for one in lists)
        self.timeout = timeout
        self._resolver = resolver
        self._count = count
        self._warn = warn

    def session(self, client: str) -> FilterSession:
        """As in judgement.Follower."""
        return _Session(self, client)

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: of a client that is not followed."""
        session = _Session(self, mail.client)
        try:
            return await session.judge(mail)
        finally:
            session.close()

    async def probe(self) -> None:
        """As in judgement.Filter: it is never down."""

    async def prove(self) -> str:
        """As in judgement.Filter: what each list has to know (RFC 5782 5), by its codes."""
        wrong = [text for text in await asyncio.gather(*map(self._proof, self.lists)) if text]
        if wrong:
            raise FilterFailure("refused", "; ".join(wrong))
        return f"{len(self.lists)} lists that answer"

    async def _proof(self, one: DnsList) -> str:
        names = ("test", "invalid") if one.domain else ("2.0.0.127", "1.0.0.127")
        listed, clean = [await self.ask(one, name, False) for name in names]
        for row in (listed, clean):
            if row.result in ("refused", "failed"):
                what = f"answers {', '.join(row.answers)}: it refuses us" if row.answers else "does not answer"
                return f"{one.zone} {what}"
        if listed.result != "listed" and not listed.answers:
            return f"{one.zone} does not list {names[0]}, which each list does: is it one?"
        return f"{one.zone} lists {names[1]}, and so everything" if clean.answers else ""

    def close(self) -> None:
        """As in judgement.Filter: questions are those of sessions."""

    async def survey(self, client: str, helo: str, sender: str) -> list[Row]:
        """What each list says, for operators; no list is paused because of it."""
        asked = [(one, name) for one in self.lists for name in (_domains(helo, sender) if one.domain else _addresses(client))]
        return list(await asyncio.gather(*(self.ask(one, name, False) for one, name in asked)))

    async def ask(self, one: DnsList, about: str, pauses: bool = True) -> Row:
        """Ask a list, within `timeout`. `pauses`: it is not asked while it is paused, and is when it refuses us."""
        loop = asyncio.get_running_loop()
        began, name = loop.time(), f"{about}.{one.zone}"
        result: Result = "clean"
        answers: Sequence[str] = ()
        if pauses and one.paused_until > began:
            self._count(one.zone, "paused")
            return Row(one.zone, name, "paused", (), 0.0, 0.0)
        try:
            async with asyncio.timeout(self.timeout):
                answers = await self._resolver.values(name, "A")
        except (NoSuchName, NoData):
            pass
        except (DnsFailure, TimeoutError):
            result = "failed"
        else:
            found = one.codes.match(answers)
            result = "clean" if found.kind == "other" else found.kind
            if found.kind == "listed":
                answers = found.codes
        if pauses:
            self._count(one.zone, result)
        if result == "refused" and pauses and one.paused_until <= loop.time():
            one.paused_until = loop.time() + PAUSE
            self._warn(
                f"{one.zone} answers {', '.join(answers[:SHOWN])} for {name}: it refuses us, or a resolver lies; it is not asked "
                f"for {PAUSE / 60:g} minutes"
            )
        score = one.score if result == "listed" else 0.0
        return Row(one.zone, name, result, tuple(answers), score, loop.time() - began)


class _Session:
    """A judgement.FilterSession."""

    decided = False

    def __init__(self, filter: Dnsbl, client: str) -> None:
        self.renew: Callable[[], None] = lambda: None
        self._filter = filter
        self._loop = asyncio.get_running_loop()
        self._asked: dict[tuple[str, str], asyncio.Task[Row]] = {}  # by zone and name
        self._address = self._of(_addresses(client), False)

    def _of(self, names: Iterable[str], domain: bool) -> list["asyncio.Task[Row]"]:
        """The questions about some names, of which those that are new begin now."""
        found = []
        for name in names:
            for one in self._filter.lists:
                if one.domain != domain:
                    continue
                key = one.zone, name
                if key not in self._asked:
                    self._asked[key] = self._loop.create_task(self._filter.ask(one, name))
                found.append(self._asked[key])
        return found

    async def mail(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession: it is asked about RCPT alone."""
        return Answer("continue")

    async def data(self, mail: Mail) -> Answer:
        """As `mail`."""
        return Answer("continue")

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """As in judgement.FilterSession."""
        if mail.user or address.partition("@")[0].lower() == "postmaster":
            return Answer("continue")
        return await self._weighed(mail.client, [*self._address, *self._of(_domains(mail.helo, mail.sender), True)])

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: with the domains of authors. Nothing new where there is none that was not looked up."""
        authors = claims(mail.text.head).authors[:AUTHORS]
        domains = [name for one in authors if is_host(name := in_a_labels(one))]
        asked = [*self._address, *self._of([*_domains(mail.helo, mail.sender), *domains], True)]
        if mail.user or all(address.partition("@")[0].lower() == "postmaster" for address in mail.recipients):
            return Answer("clean")
        return await self._weighed(mail.client, asked)

    async def _weighed(self, client: str, asked: Sequence["asyncio.Task[Row]"]) -> Answer:
        """What all of these say together: those that are silent count nothing. Each of them ends in time by itself."""
        waiting = [task for task in asked if not task.done()]
        if waiting:
            await asyncio.wait(waiting)
        rows = {row.asked: row for task in asked if not task.cancelled() for row in (task.result(),)}
        listed = [row for row in rows.values() if row.result == "listed"]
        score = sum(row.score for row in listed)
        against = [row for row in listed if row.score > 0] if score > 0 else listed
        said = [_said(client, row) for row in against[:SHOWN]]
        if len(against) > SHOWN:
            said.append(f"and {len(against) - SHOWN} more")
        return Answer("listed" if score > 0 else "clean", ", ".join(said), score)

    def refused(self, address: str, answer: bytes) -> None:
        """As in judgement.FilterSession."""

    def reset(self) -> None:
        """As in judgement.FilterSession: what was asked about domains is the resolver's to know from now on."""
        for key, task in list(self._asked.items()):
            if task not in self._address:
                task.cancel()
                del self._asked[key]

    def close(self) -> None:
        """As in judgement.FilterSession."""
        for task in self._asked.values():
            task.cancel()
        self._asked.clear()


def _said(client: str, row: Row) -> str:
    name = row.asked.removesuffix(f".{row.zone}")
    about = client if name in _addresses(client) else name
    return f"{about} is listed by {row.zone} ({', '.join(row.answers[:SHOWN])})"


def _addresses(client: str) -> list[str]:
    """What lists of addresses are asked about; nothing for a client whose address its proxy does not know."""
    try:
        return [reversed_address(client)]
    except ValueError:
        return []


def _domains(helo: str, sender: str) -> list[str]:
    """What lists of domains are asked about at RCPT."""
    found = (in_a_labels(name) for name in (helo, domain_of(sender)))
    return list(dict.fromkeys(name for name in found if is_host(name)))
