"""Which sites are down, for /metrics. The state of a site that is down ends when it is tried again, and the next one begins when
that has failed; what is shown here does not end in between."""

import time
from collections.abc import Callable, Iterable
from heapq import nlargest
from typing import Any

from relaymta.node import DEAD, SiteState

__all__ = ["Outages"]

SWAPS = 2  # sites of others that are shown a minute, where they are not yet; see `activity`
GRACE = 600.0  # seconds that an attempt after the end of a state may take until it fails (connecting, then the greeting)
SHOWN = 50
MOST = 50_000  # sites


class Outages:
    """Owned by `Machine`, which reports every change of a state. `states`: those at the start; `now()`: monotonic seconds."""

    def __init__(self, states: Iterable[SiteState] = (), now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._shown: dict[str, str] = {}  # sites of others that have a row, and the cause in it
        self._places, self._counted = float(SHOWN), now()  # how many may get one
        self._down: dict[str, tuple[SiteState, float]] = {}  # by site: its last state, and until when it is believed
        for state in states:
            self.changed(state, state.key)

    def changed(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """A state was set, or (None) the one with this key removed."""
        kind, site, _ = key
        if kind != DEAD:
            return
        known = self._down.pop(site, None)
        if state is None:
            return
        if known is None and len(self._down) >= MOST:
            self._forget(MOST * 9 // 10)  # many at a time: it looks at all of them
        lasts = max(0, state.until - max(state.since, time.time_ns() // 1_000_000)) / 1000
        self._down[site] = (state, self._now() + lasts + GRACE)

    def _forget(self, most: int) -> None:
        """Remove those that are not believed any more, and the oldest beyond `most`."""
        now = self._now()
        self._down = {site: known for site, known in self._down.items() if known[1] > now}
        while len(self._down) > most:
            del self._down[next(iter(self._down))]

    def rows(self, smart: Callable[[str], bool]) -> tuple[int, list[dict[str, Any]]]:
        """(How many sites are down; rows for `metrics.down_families`: of smart hosts first, then of others, SHOWN at most). Of
        others those with most failures in a row get a row, SWAPS of them a minute, and keep it while they are down.
        `smart(site)`: whether it is that of a route's smart hosts."""
        self._forget(MOST)
        states = [state for state, _ in self._down.values()]
        ours = [state for state in states if smart(state.site)][:SHOWN]
        found = [{"site": state.site, "cause": state.cause, "hosts": "smart"} for state in ours]
        self._show([state for state in states if not smart(state.site)], SHOWN - len(ours))
        found += [{"site": site, "cause": cause, "hosts": "mx"} for site, cause in self._shown.items()]
        return len(self._down), found

    def _show(self, theirs: list[SiteState], most: int) -> None:
        """Which sites of others have a row; the cause is that of the time at which they got it."""
        now = self._now()
        self._places, self._counted = min(float(SHOWN), self._places + SWAPS * (now - self._counted) / 60), now
        down = {state.site for state in theirs}
        self._shown = {site: cause for site, cause in self._shown.items() if site in down}
        while len(self._shown) > most:
            self._shown.popitem()
        free = min(int(self._places), most - len(self._shown))
        for state in nlargest(free, (one for one in theirs if one.site not in self._shown), key=lambda one: one.value or 0):
            self._shown[state.site] = state.cause
            self._places -= 1
