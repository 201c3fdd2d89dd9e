"""Greylisting: who is new is deferred once, since most programs that send spam do not try again (RFC 6647).

What is known are triplets: a client's group, the sender, a recipient. The group is the domain for which SPF passes, else the
client's network: the pool of a large sender, and its two families, are one. The message is judged as a whole, at DATA: where one
of its recipients is known all are, and nobody gets it apart from the others.

State: a table that all workers share (triplets.py). The row of a triplet that waits has the times of its first attempt and of the
last; that of one that has come through 1, and when it did last; that of a group, how many of its triplets have, and when one did
last. Between two calls another worker may have changed the same row: then what that one wrote stays.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from relaymta.dns import Resolver
from relaymta.filter import spf
from relaymta.filter.judgement import Answer, FilterSession, Mail
from relaymta.filter.networks import network_of
from relaymta.proto import reply
from relaymta.proto.address import compared, domain_of

__all__ = ["Greylist", "Times", "stale"]

SPF_SECONDS = 5.0  # without an answer, the network is the group
COUNTS = 1 << 20  # a row whose first number is less has no time there, but a count
REFRESH = 3600  # seconds after which a triplet that is known is noted anew
_DIGITS = re.compile(r"\d+")
_BATV = re.compile(r"prvs=[0-9a-f]{6,20}=", re.I)  # a tag that is another one each day
_EXEMPT = ("postmaster", "abuse")  # have to be reachable (RFC 5321 4.5.1, RFC 2142)


class Times(NamedTuple):
    """Of greylisting, seconds. `known_after`: so many triplets make a group known; 0: none is."""

    delay: int
    retry_window: int
    max_age: int
    known_after: int


class Table(Protocol):
    """As of triplets.Triplets."""

    def key(self, *parts: str) -> int:
        """The key of a row."""

    def get(self, key: int) -> tuple[int, int]:
        """Its two times, (0, 0): there is no such row."""

    def put(self, key: int, was: tuple[int, int], now: tuple[int, int]) -> bool:
        """Set them, unless they are not `was` any more."""


def stale(times: Times, first: int, last: int, now: int) -> bool:
    """Whether a row says nothing any more."""
    return now - last > times.max_age if first < COUNTS else now - first > times.retry_window


class _Found(NamedTuple):
    """What is known of a message. `word`: known, passed (it has waited, and is known from now on), early or new; `left`: seconds
    that it still has to wait."""

    word: str
    left: int = 0


class Greylist:
    """A judgement.Follower. Its words: known, new, early."""

    alone, begins, looks = False, False, False
    asks = frozenset({"DATA"})

    def __init__(
        self, times: Times, table: Table, resolver: Resolver, count: Callable[[str], object] = lambda word: None,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`count(word)` is called with known, passed, early or new for each message; `now()`: the wall clock, seconds."""
        self._times = times
        self._table = table
        self._resolver = resolver
        self._count = count
        self._now = now

    def session(self, client: str) -> FilterSession:
        """As in judgement.Follower."""
        return _Session(self, network_of(client))

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: the envelope."""
        return await self.of(mail, network_of(mail.client))

    async def of(self, mail: Mail, network: str) -> Answer:
        """As `judge`, of a client in this network."""
        found = await self._found(mail, network)
        self._count(found.word)
        if not found.left:
            return Answer("known")
        text = f"Greylisted: try again in {found.left} seconds"
        return Answer(found.word, f"{found.word}: {found.left} s left", reply=reply.format_reply(451, "4.7.1", text))

    async def probe(self) -> None:
        """As in judgement.Filter: nobody is asked."""

    async def prove(self) -> str:
        """As in judgement.Filter."""
        return f"greylisting: new senders wait {self._times.delay} s"

    def close(self) -> None:
        """As in judgement.Filter."""

    async def _found(self, mail: Mail, network: str) -> _Found:
        # One such recipient beside a thousand others lets nobody through: all of them can wait.
        if all(address.partition("@")[0].lower() in _EXEMPT for address in mail.recipients):
            return _Found("known")
        now, sender = int(self._now()), _without_numbers(mail.sender)
        recipients = [compared(address) for address in mail.recipients]
        found = self._of_group(network, sender, recipients, now)
        if not found.left:
            return found
        domain = await self._domain(mail)
        group = domain or network
        if domain:
            found = self._of_group(domain, sender, recipients, now)
            if not found.left:  # by its network it is found without the DNS the next time
                self._pass(network, sender, recipients, now)
                return found
        for key in self._keys(group, sender, recipients):
            times = self._table.get(key)
            if self._state(times, now) == "new":
                self._table.put(key, times, (now, now))
        return found

    async def _domain(self, mail: Mail) -> str:
        """That for which SPF passes, or ""."""
        if not domain_of(mail.sender) and "." not in mail.helo:
            return ""
        if asyncio.current_task() is None:  # what has a time-out has to be a task (accept/eager.py)
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(SPF_SECONDS):
                found = await spf.check(self._resolver, mail.client, mail.sender, mail.helo)
        except TimeoutError:
            return ""
        return found.domain.lower() if found.result == "pass" else ""

    def _of_group(self, group: str, sender: str, recipients: Sequence[str], now: int) -> _Found:
        """What is known of a message whose client is of this group. What comes through is noted."""
        table, times = self._table, self._times
        count, last = table.get(table.key("group", group))
        if times.known_after and count >= times.known_after and now - last <= times.max_age:
            if now - last > REFRESH:
                table.put(table.key("group", group), (count, last), (count, now))
            return _Found("known")
        left, word = times.delay, "new"
        for key in self._keys(group, sender, recipients):
            found = table.get(key)
            state = self._state(found, now)
            if state == "known":
                if now - found[1] > REFRESH or len(recipients) > 1:
                    self._pass(group, sender, recipients, now)
                return _Found("known")
            if state == "passed":
                self._pass(group, sender, recipients, now)
                self._add(group, now)
                return _Found("passed")
            if state == "early":
                left, word = min(left, times.delay - (now - found[0])), "early"
        return _Found(word, left)

    def _state(self, found: tuple[int, int], now: int) -> str:
        """Of a triplet: known, passed, early or new."""
        (first, last), times = found, self._times
        if first < COUNTS:
            return "known" if last and now - last <= times.max_age else "new"
        waited = now - first
        if waited < 0 or waited > times.retry_window:  # below 0: the clock was set back
            return "new"
        return "early" if waited < times.delay else "passed"

    def _pass(self, group: str, sender: str, recipients: Sequence[str], now: int) -> None:
        """They are known from now on, as far as they were not a short time ago."""
        for key in self._keys(group, sender, recipients):
            found = self._table.get(key)
            if found[0] >= COUNTS or now - found[1] > REFRESH:
                self._table.put(key, found, (1, now))

    def _add(self, group: str, now: int) -> None:
        """One more triplet of a group has come through."""
        key = self._table.key("group", group)
        count, last = found = self._table.get(key)
        if last and now - last > self._times.max_age:
            count = 0
        self._table.put(key, found, (min(count + 1, COUNTS - 1), now))

    def _keys(self, group: str, sender: str, recipients: Sequence[str]) -> list[int]:
        return [self._table.key(group, sender, recipient) for recipient in recipients]


class _Session:
    """A judgement.FilterSession."""

    decided = False

    def __init__(self, filter: Greylist, network: str) -> None:
        self._filter = filter
        self._network = network
        self.renew: Callable[[], None] = lambda: None

    async def mail(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession: it is asked about DATA alone."""
        return Answer("continue")

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """As `mail`."""
        return Answer("continue")

    async def data(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession."""
        return await self._filter.of(mail, self._network)

    async def judge(self, mail: Mail) -> Answer:
        """As `mail`."""
        return Answer("continue")

    def refused(self, address: str, answer: bytes) -> None:
        """As in judgement.FilterSession."""

    def reset(self) -> None:
        """As in judgement.FilterSession."""

    def close(self) -> None:
        """As in judgement.FilterSession."""


def _without_numbers(sender: str) -> str:
    """What all messages of a list, or of a program that numbers its senders (VERP), have in common."""
    return _DIGITS.sub("#", _BATV.sub("", sender.lower(), 1))
