"""Site lookups: which entries wait until their domain's hosts are known, and which domains cannot be looked up at present."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from relaymta.errors import US
from relaymta.proto.envelope import PERMANENT, QueueName
from relaymta.proto.smtp_client import Said
from relaymta.queue import Entry, Queue
from relaymta.queue.schedule import retry_delay
from relaymta.route.mx import NoRoute
from relaymta.route.sites import Site, Sites
from relaymta.send.outcomes import Outcomes
from relaymta.send.parking import Parking
from relaymta.send.tasks import Tasks
from relaymta.send.timing import Stopwatch

__all__ = ["Lookups"]

AT_A_TIME = 200  # domains
KEPT_UNRESOLVED = 50_000  # domains
SCARCE_MS = 1000  # until a domain is looked up again that no descriptor was left for


@dataclass(frozen=True, slots=True)
class _Unresolved:
    """A domain that could not be looked up: consecutive failures, until when it is not looked up again (queue clock), and when it
    failed last (loop time)."""

    failures: int
    until: int
    known_at: float


class Lookups:
    """Owns the entries that wait for a lookup, and the domains whose last lookup failed. `arrive(site, entry)`: delivers an entry
    whose site is known; `now()`: loop time."""

    queue: Queue

    def __init__(
        self,
        outcomes: Outcomes,
        parking: Parking,
        tasks: Tasks,
        arrive: Callable[[Site, Entry], None],
        now: Callable[[], float],
    ) -> None:
        self._outcomes = outcomes
        self._parking = parking
        self._tasks = tasks
        self._arrive = arrive
        self._now = now
        self._waiting: dict[tuple[str, str, str], list[Entry]] = {}  # by route, domain and application
        self._unresolved: dict[tuple[str, str], _Unresolved] = {}  # by route and domain
        self._room = asyncio.Semaphore(AT_A_TIME)

    def configure(self, sites: Sites, first_retry_ms: int) -> None:
        """Apply a new configuration."""
        self._sites = sites
        self._first_retry_ms = first_retry_ms

    def look_up(self, entry: Entry) -> None:
        """Let an entry wait until its domain's hosts are known; all entries of its queue share one lookup."""
        name = entry.name
        _, until = self.unresolved(name)
        if until > self.queue.clock.now():
            self._parking.put_back(entry)
            self._parking.park(entry.queue, until)
            return
        key = (name.route, name.domain, name.application)
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(entry)
            return
        self._waiting[key] = [entry]
        self._tasks.spawn(self._find(key, name, self._now()))

    def unresolved(self, name: QueueName) -> tuple[int, int]:
        """(Consecutive failed lookups of a domain, until when it is not looked up again by the queue's clock)."""
        known = self._unresolved.get((name.route, name.domain))
        return (0, 0) if known is None else (known.failures, known.until)

    def asks(self, name: QueueName) -> bool:
        """Whether a domain is being looked up."""
        return (name.route, name.domain, name.application) in self._waiting

    def forget(self) -> None:
        """Forget which domains could not be looked up: an operator wants another attempt now."""
        self._unresolved.clear()

    async def _find(self, key: tuple[str, str, str], name: QueueName, began: float) -> None:
        site: Site | None = None
        failure: NoRoute | None = None
        asked: Sites | None = None
        try:
            async with self._room:
                while asked is not self._sites:  # again after a reload: the site has the route of its configuration
                    asked, site, failure = self._sites, None, None
                    try:
                        with Stopwatch(self._outcomes.stages.took).phase("dns"):
                            site = await asked.find(name)
                    except NoRoute as error:
                        failure = error
                    except Exception as error:
                        failure = NoRoute(False, "4.3.0", *self._tasks.unexpected(error), fault=US)
        finally:
            entries = [entry for entry in self._waiting.pop(key) if entry.waiting]
            if site is None and failure is None:  # cancelled
                for entry in entries:
                    self._parking.put_back(entry)
        if failure is not None:
            self._failed(name, entries, failure, began)
        elif site is not None:
            if self._unresolved:
                self._unresolved.pop((name.route, name.domain), None)
            for entry in entries:
                self._arrive(site, entry)

    def _failed(self, name: QueueName, entries: list[Entry], error: NoRoute, began: float) -> None:
        """A domain has no host, permanently or temporarily. As with sites (pool.py), lookups that are under way for other tenants
        or classes when one of them fails count as the same failure."""
        if error.permanent:
            for entry in entries:
                self._outcomes.charge(entry, PERMANENT, "route", "", 0, error.enhanced, error)
            return
        if error.scarce:  # nothing was asked: no failure of the domain
            for entry in entries:
                self._parking.put_back(entry)
                self._parking.park(entry.queue, self.queue.clock.now() + SCARCE_MS)
            return
        known = self._unresolved.get((name.route, name.domain))
        if known is not None and began <= known.known_at:
            for entry in entries:
                self.look_up(entry)
            return
        failures = known.failures + 1 if known is not None else 1
        until = self.queue.clock.now() + retry_delay(failures, self._first_retry_ms)
        if len(self._unresolved) >= KEPT_UNRESOLVED:
            self._unresolved.clear()
        self._unresolved[name.route, name.domain] = _Unresolved(failures, until, self._now())
        self._outcomes.charge_one(entries, until, "route", Said(0, b"", "route"), error.enhanced, error)
