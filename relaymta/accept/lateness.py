"""How late the event loop is, and whether new clients are turned away because of that (load shedding).

The only sign of load is that the loop gets to a timer late. It is one if that happens several times within seconds, and not while
this process does work of its own that no client has asked for (a reload): that ends by itself, and not sooner with fewer
clients. What is measured meanwhile counts neither for nor against.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["BEAT", "OWN_SECONDS", "Lateness"]

BEAT, BEATS, LATE_BEATS = 0.05, 100, 3  # seconds between measurements; how many are kept; late ones that shed load
WORST_KEPT = 0.98  # of the greatest lag, at each measurement
OWN_SECONDS = 30.0  # work of our own that takes longer hides no load: it may be stuck


class Lateness:
    """`now()`: seconds of the loop's clock; `warn(text)`: logs a warning; `observe(lag)`: for /metrics, whatever the lag is due
    to. `shedding`: new clients get 421; only `beat` changes
    it. Whoever turns a client away adds it to `turned_away`."""

    def __init__(
        self, now: Callable[[], float], warn: Callable[[str], None], observe: Callable[[float], None] = lambda lag: None
    ) -> None:
        self._observe = observe
        self.shedding = False
        self.worst = 0.0  # the greatest lag (s) lately: it is halved in some two seconds
        self.turned_away = 0  # since load shedding has begun
        self._now = now
        self._warn = warn
        self._late: deque[bool] = deque(maxlen=BEATS)
        self._beat_at = now()
        self._began = 0.0
        self._own_works, self._own_since = 0, 0.0  # under way, and since when
        self._excused = False  # one has ended since the last beat

    @contextlib.contextmanager
    def own_work(self) -> Iterator[None]:
        """While the loop may be late because of work of our own. What was late before it is forgotten, unless load is shed
        already: the supervisor's part of a reload comes first, and takes CPU, too. Load is found again within three beats."""
        if not self._own_works:
            self._own_since = self._now()
        if not self.shedding:
            self._late.clear()
        self._own_works += 1
        try:
            yield
        finally:
            self._own_works -= 1
            self._excused = True

    def beat(self, most: float) -> None:
        """Called by a timer BEAT seconds after the last call; how much later it is, is measured. `most`: the lag (s) that is not
        late yet; 0: load is not shed."""
        now = self._now()
        lag, self._beat_at = now - self._beat_at - BEAT, now
        self.worst = max(lag, self.worst * WORST_KEPT)
        self._observe(max(lag, 0.0))
        working = self._own_works > 0 and now - self._own_since < OWN_SECONDS
        own, self._excused = working or self._excused, False
        if not most:
            self._late.clear()
        elif not own:
            self._late.append(lag > most)
        shedding = sum(self._late) >= LATE_BEATS
        if shedding and not self.shedding:
            self.turned_away, self._began = 0, now
            times, seconds = LATE_BEATS, BEATS * BEAT
            self._warn(
                f"load shedding begins, new clients get 421: the event loop was later than intake.shed_lag ({most:g} s) "
                f"{times} times in {seconds:g} s, the last time by {lag:.2f} s"
            )
        elif self.shedding and not shedding:
            self._warn(f"load shedding ends: {self.turned_away} clients got 421 in {now - self._began:.0f} s")
        self.shedding = shedding
