"""Which sites /metrics shows, and the attempts at each: the counters of the other sites are one, "other".

Prometheus keeps a series for every name that it has ever seen, so it is not enough that few are shown at a time. A site stays
shown until one that is more than twice as active takes its place, which it may after STAY at the earliest, and at most SWAPS a
minute. So no more than SWAPS * 60 names an hour are new, whatever peers and domains there are.

An attempt is counted once: under its site if that is shown then, else under "other". What was counted does not move. A site
that is not shown any more keeps its counters, and goes on from there when it is shown again: a counter never falls. (They are
forgotten when KEPT others have left since.)
"""

import time
from collections.abc import Callable, Iterable
from heapq import nlargest

from relaymta.metrics import OTHER, SITE_RESULTS, SITES_SHOWN

__all__ = ["Activity"]

EVERY = 60.0  # seconds between two looks at who is shown
STAY = 900.0
SWAPS = 2
HALF_LIVES = 0.1  # of an attempt's weight in EVERY: half of it after ten minutes
CANDIDATES = 5000  # sites whose activity is remembered
KEPT = 5000  # sites that were shown, whose counters are kept


class Activity:
    """Owned by the supervisor. `now()`: monotonic seconds; `most`: sites that are shown."""

    def __init__(self, now: Callable[[], float] = time.monotonic, most: int = SITES_SHOWN) -> None:
        self._now = now
        self._most = most
        self._looked = now()
        self._score: dict[str, float] = {}
        self._since: dict[str, float] = {}  # the sites that are shown, and since when
        self._counts: dict[str, list[int]] = {}  # of these, and of those that were
        self._other = [0] * len(SITE_RESULTS)

    @property
    def shown(self) -> list[str]:
        """The sites that are shown."""
        return list(self._since)

    async def note(self, counts: list[tuple[str, list[int]]]) -> None:
        """A worker's attempts: (site, by SITE_RESULTS)."""
        for name, row in counts:
            site = "" if name == OTHER else name  # that of a route with this name
            if site:
                self._weigh(site, sum(row))
            found = self._counts[site] if site in self._since else self._other
            for place, count in enumerate(row):
                found[place] += count
        self._look()

    def loads(self, loads: Iterable[tuple[str, int]]) -> None:
        """How much mail waits for sites, in memory, and how many connections they have, now."""
        for site, load in loads:
            if load > self._score.get(site, 0.0):
                self._weigh(site, load - self._score.get(site, 0.0))
        self._look()

    def totals(self) -> dict[str, tuple[int, ...]]:
        """The attempts by site, and those at all others."""
        return {site: tuple(self._counts[site]) for site in self._since} | {OTHER: tuple(self._other)}

    def _weigh(self, site: str, weight: float) -> None:
        self._score[site] = self._score.get(site, 0.0) + weight
        if site not in self._since and len(self._since) < self._most:
            self._show(site)
        if len(self._score) >= 2 * CANDIDATES:
            self._forget_quiet()

    def _forget_quiet(self) -> None:
        best = nlargest(CANDIDATES, self._score.items(), key=lambda pair: pair[1])
        self._score = dict(best) | {site: self._score.get(site, 0.0) for site in self._since}

    def _show(self, site: str) -> None:
        self._since[site] = self._now()
        self._counts[site] = self._counts.pop(site, [0] * len(SITE_RESULTS))
        while len(self._counts) > KEPT + self._most:
            del self._counts[next(one for one in self._counts if one not in self._since)]

    def _look(self) -> None:
        """Once in EVERY: let the activity of before count less, and show those that are far more active."""
        now = self._now()
        if now - self._looked < EVERY:
            return
        factor = 0.5 ** (HALF_LIVES * (now - self._looked) / EVERY)
        self._looked = now
        self._score = {site: score * factor for site, score in self._score.items() if score > 0.01 or site in self._since}
        score = self._score
        hidden = nlargest(SWAPS, (site for site in score if site not in self._since), key=score.__getitem__)
        for site in hidden:
            old = [one for one, since in self._since.items() if now - since >= STAY]
            weakest = min(old, key=score.__getitem__, default=None)
            if weakest is None or score[site] <= 2 * score[weakest]:
                return
            del self._since[weakest]
            self._show(site)
