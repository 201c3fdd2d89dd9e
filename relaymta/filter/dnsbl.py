"""Lists of addresses and of domains in the DNS (proto/dnsbl.py). The address is asked about as soon as the client is there,
in the background; what the lists say is weighed at RCPT.

State: `paused_until` of a list, set when it refuses us or was silent too often; `silent`, set by each of its answers. The answers
themselves are the resolver's to keep. A session has one task for each name that it asks about, which ends by itself in time, or
by `close`; of its answers only those that list are kept.
"""

import asyncio
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from relaymta.dns import DnsFailure, NoData, NoDescriptor, NoSuchName, Resolver
from relaymta.filter.judgement import Answer, FilterFailure, FilterSession, Mail
from relaymta.proto.address import domain_of, in_a_labels, in_dns, is_host
from relaymta.proto.dnsbl import Codes, reversed_address
from relaymta.proto.mailbox import Malformed, authors, domains

__all__ = ["DnsList", "Dnsbl", "Row"]

PAUSE = 600.0  # seconds for which a list is not asked that refuses us
SILENT, SILENT_PAUSE = 10, 30.0  # questions in a row without an answer, behind which it is not asked for so many seconds
SHOWN = 3  # lists in a reason
AUTHORS = 10  # domains of From: that are looked up
# Queries of a worker under way, above which no list is asked: c-ares numbers them with 16 bits, and when nearly all are taken it
# looks for a free number for a millisecond, on the event loop. A dead nameserver keeps a number for 10 seconds and more.
MOST_ASKED = 20_000

Result = Literal["listed", "clean", "refused", "failed", "paused"]


@dataclass
class DnsList:
    """A list. `codes`: answers that count; `score`: of what it lists, negative for an allow list; `domain`: it is one of domains,
    not of addresses; `paused_until`: loop time; `silent`: how many questions in a row it has not answered."""

    zone: str
    codes: Codes
    score: float = 1.0
    domain: bool = False
    paused_until: float = 0.0
    silent: int = 0


class Row(NamedTuple):
    """What a list says. `asked`: the name; `answers`: the codes that count (listed) or refuse us (refused), otherwise all A
    records; `score`: what follows from it; `seconds`: what it took."""

    zone: str
    asked: str
    result: Result
    answers: Sequence[str]
    score: float
    seconds: float


_Listed = tuple[tuple[int, Row], ...]  # the lists that list a name, by their index


class Dnsbl:
    """A judgement.Follower. Its words: listed, clean."""

    alone, begins = False, True
    asks = frozenset({"RCPT"})

    def __init__(
        self, lists: Sequence[DnsList], timeout: float, resolver: Resolver,
        count: Callable[[str, Result], object] = lambda zone, result: None, warn: Callable[[str], object] = lambda text: None,
    ) -> None:  # fmt: skip
        """`timeout`: seconds for the answers about an address, from the connection on, and for those about a domain, from when it
        is known. `count(zone, result)`: a list was asked, or is paused. `warn(text)`: once in each pause. Two of `lists` may have
        one zone (with other codes and another score): it is asked once, and paused as a whole."""
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
        """As in judgement.Filter: each list lists 127.0.0.2 and not 127.0.0.1, or TEST and not INVALID (RFC 5782 5), whatever the
        code. FilterFailure names those that do not."""
        wrong = [text for text in await asyncio.gather(*map(self._proof, self.lists)) if text]
        if wrong:
            raise FilterFailure("refused", "; ".join(wrong))
        return "1 list that answers" if len(self.lists) == 1 else f"{len(self.lists)} lists that answer"

    async def _proof(self, one: DnsList) -> str:
        names = ("test", "invalid") if one.domain else ("2.0.0.127", "1.0.0.127")
        listed, clean = [await self.ask(one, name, False) for name in names]
        for row in (listed, clean):
            if row.result in ("refused", "failed"):
                what = f"answers {', '.join(row.answers[:SHOWN])}: it refuses us" if row.answers else "does not answer"
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
        if pauses and one.paused_until > began:
            self._count(one.zone, "paused")
            return Row(one.zone, name, "paused", (), 0.0, 0.0)
        result, answers = await self._answer(one, name)
        if pauses:
            self._count(one.zone, result)
            if result != "failed":
                one.silent = 0
            if result == "refused":
                why = f"answers {', '.join(answers[:SHOWN])} for {name}: it refuses us, or a resolver lies"
                self._pause(one.zone, PAUSE, why)
            elif one.silent >= SILENT:
                self._pause(one.zone, SILENT_PAUSE, f"has not answered {one.silent} questions in a row")
        score = one.score if result == "listed" else 0.0
        return Row(one.zone, name, result, answers, score, loop.time() - began)

    async def _answer(self, one: DnsList, name: str) -> tuple[Result, Sequence[str]]:
        if not in_dns(name):  # too long with the zone
            return "clean", ()
        if self._resolver.asking >= MOST_ASKED:
            return "failed", ()
        try:
            async with asyncio.timeout(self.timeout):
                answers: list[str] = await self._resolver.values(name, "A")
        except (NoSuchName, NoData):
            return "clean", ()
        except NoDescriptor:  # it was not asked
            return "failed", ()
        except (DnsFailure, TimeoutError):
            one.silent += 1
            return "failed", ()
        found = one.codes.match(answers)
        return ("clean", tuple(answers)) if found.kind == "other" else (found.kind, tuple(found.codes))

    def _pause(self, zone: str, seconds: float, why: str) -> None:
        now = asyncio.get_running_loop().time()
        lists = [one for one in self.lists if one.zone == zone and one.paused_until <= now]
        for one in lists:
            one.paused_until, one.silent = now + seconds, 0
        if lists:  # not one of many answers that were under way when the first of them came
            self._warn(f"{zone} {why}; it is not asked for {_in_words(seconds)}")


class _Session:
    """A judgement.FilterSession."""

    __slots__ = ("_address", "_asked", "_client", "_closed", "_filter", "_loop", "decided", "renew")

    def __init__(self, filter: Dnsbl, client: str) -> None:
        self.renew: Callable[[], None] = _nothing
        self.decided = False
        self._filter = filter
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._asked: dict[str, asyncio.Task[_Listed]] = {}  # by domain
        has_any = any(not one.domain for one in filter.lists)
        self._address = [self._begun(name, False) for name in _addresses(client) if has_any]

    def _begun(self, name: str, domain: bool) -> "asyncio.Task[_Listed]":
        return self._loop.create_task(_listed(self._filter, name, domain))

    async def mail(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession: it is asked about RCPT alone."""
        return Answer("continue")

    async def data(self, mail: Mail) -> Answer:
        """As `mail`."""
        return Answer("continue")

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """As in judgement.FilterSession."""
        if mail.user or _is_postmaster(address):
            return Answer("continue")
        return await self._weighed(_domains(mail.helo, mail.sender))

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: with the domains of authors. Nothing new where there is none that was not looked up."""
        if mail.user or all(map(_is_postmaster, mail.recipients)):
            return Answer("clean")
        return await self._weighed([*_domains(mail.helo, mail.sender), *_authors(mail.text.head)])

    async def _weighed(self, names: Iterable[str]) -> Answer:
        """What all lists together say about the client and these domains: those that are silent count nothing, and each of the
        others once, however many of the names it lists."""
        asked = [*self._address]
        if self._filter.looks and not self._closed:
            for name in dict.fromkeys(names):
                if name not in self._asked:
                    self._asked[name] = self._begun(name, True)
                asked.append(self._asked[name])
        waiting = [task for task in asked if not task.done()]
        if waiting:
            await asyncio.wait(waiting)
        once: dict[int, Row] = {}
        for task in asked:
            for at, row in () if task.cancelled() else task.result():
                once.setdefault(at, row)
        listed = [once[at] for at in sorted(once)]
        score = round(sum(row.score for row in listed), 6)  # 0.1 + 0.2 - 0.3 is nothing
        against = [row for row in listed if row.score > 0] if score > 0 else listed
        said = [_said(self._client, row) for row in against[:SHOWN]]
        if len(against) > SHOWN:
            said.append(f"and {len(against) - SHOWN} more")
        return Answer("listed" if score > 0 else "clean", ", ".join(said), score)

    def refused(self, address: str, answer: bytes) -> None:
        """As in judgement.FilterSession."""

    def reset(self) -> None:
        """As in judgement.FilterSession: what was asked about domains is the resolver's to know from now on."""
        for task in self._asked.values():
            task.cancel()
        self._asked.clear()

    def close(self) -> None:
        """As in judgement.FilterSession."""
        self._closed = True
        self.reset()
        for task in self._address:
            task.cancel()


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def _nothing() -> None:
    pass


async def _listed(filter: Dnsbl, name: str, domain: bool) -> _Listed:
    """Ask all lists of domains, or of addresses, about a name."""
    asked = [(at, one) for at, one in enumerate(filter.lists) if one.domain == domain]
    rows = await asyncio.gather(*(filter.ask(one, name) for _, one in asked))
    return tuple((at, row) for (at, _), row in zip(asked, rows, strict=True) if row.result == "listed")


def _is_postmaster(address: str) -> bool:
    return address.partition("@")[0].lower() == "postmaster"


def _said(client: str, row: Row) -> str:
    name = row.asked.removesuffix(f".{row.zone}")
    about = client if name in _addresses(client) else name
    return f"{about} is listed by {row.zone} ({', '.join(row.answers[:SHOWN])})"


def _addresses(client: str) -> list[str]:
    """What lists of addresses are asked about; nothing for a client whose address its proxy does not know (0.0.0.0)."""
    try:
        return [] if ipaddress.ip_address(client).is_unspecified else [reversed_address(client)]
    except ValueError:
        return []


def _domains(helo: str, sender: str) -> list[str]:
    """What lists of domains are asked about at RCPT."""
    return _hosts([helo, domain_of(sender)])


def _authors(head: bytes) -> list[str]:
    """What they are asked about besides when there is a message: the domains of From:, none where it cannot be read."""
    try:
        return _hosts(domains(authors(head)))[:AUTHORS]
    except Malformed:
        return []


def _hosts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for each in names if is_host(name := in_a_labels(each.removesuffix(".")))))
