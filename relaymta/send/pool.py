"""The pool of one site and one source address: its ready list, its connections, and the limits on both.

`window` is the number of connections (of this worker) that the site has accepted so far: it grows by one for each round of
messages that succeeded, and is halved when the site replies 421 or times out. `learned` are limits derived from replies. Both
only tighten the limits of `shape`.

An outage is counted in *failed waves* (`is_news`). Whether a site is up or down is known as of a moment: when an attempt of
this worker to connect ended, or another worker published its result. An attempt that began before that moment and fails adds
nothing. So all attempts that are under way when the first of them fails are one wave: one failure, one step of the schedule,
one message charged, whatever their number and duration, in all workers. An attempt that began before the site was found up
again does not count as a failure at all. The window is halved once a wave, too.
"""

import asyncio
from collections import deque
from collections.abc import Mapping

from relaymta.config import Source
from relaymta.proto.smtp_client import Said
from relaymta.route.shaping import Limit, Shape
from relaymta.route.sites import Site
from relaymta.send.ready import Ready
from relaymta.send.session import Session

__all__ = ["CROWDED", "Learned", "Needy", "Pool", "pool_key"]

CROWDED = 2000  # messages that wait for one site in memory; further ones stay on disk
WINDOW_START = 5.0
# Background probes of a site that is down, seconds: the first after PROBE_LEAST; then after PROBE_SHARE of the time that it has
# been down, up to PROBE_MOST; each step of a probe times out after PROBE_TIMEOUT. Smart hosts (OURS) are probed more often than
# MX hosts (THEIRS), which belong to others.
PROBE_LEAST, PROBE_SHARE = 2.0, 0.1
PROBE_MOST_OURS, PROBE_MOST_THEIRS = 4.0, 30.0
PROBE_TIMEOUT_OURS, PROBE_TIMEOUT_THEIRS = 5.0, 10.0
SILENT_OURS, SILENT_THEIRS = 2.0, 10.0  # after so long a connection attempt may be stalled where a new one would succeed
PACE_LEAST = 0.05  # messages a second
PACE_AFTER = 0.9  # of the rate at which the site replied 421
PACE_AGAIN = 0.95  # of the learned rate, when the site replied 421 again
PACE_QUIET = 10.0  # seconds without 421 until the learned rate is raised by a step
PACE_STEP = 0.01  # the first raise; the second is twice that, and so on up to PACE_STEPS times
PACE_STEPS = 10
PACE_RATE = 2.0  # messages a second: a 421 below that is not about the rate
HOLD_SECONDS = 600.0  # how long a learned limit is in effect before one more is tried
RATE_WINDOW = 1.0
SHUTDOWN_SECONDS = 10.0  # a 421 so shortly before the host was unreachable announced a shutdown, not a rate limit
ENDED_TIMES = 3  # connections ended after the same number of messages until that counts as a limit


class Learned:
    """A limit derived from replies: its value, the reply, and until when (loop time) it is in effect."""

    __slots__ = ("reply", "until", "value")

    def __init__(self, value: float, reply: str, until: float) -> None:
        self.value = value
        self.reply = reply
        self.until = until


class Needy:
    """A delivery that waits for a connection to one host of a site (elsewhere.py). `wake`: to look again; `session`: one with
    that host, which is its own; `freed`: a connection to another host was closed for it."""

    __slots__ = ("freed", "place", "session", "wake")

    def __init__(self, place: str) -> None:
        self.place = place
        self.wake = asyncio.Event()
        self.session: Session | None = None
        self.freed = False


class Pool:
    """A site's state in one worker. Times are loop time but for `down_until`, which is by the queue's clock."""

    __slots__ = (
        "before",
        "cause",
        "connecting",
        "down_since",
        "down_until",
        "ended_after",
        "ended_at",
        "ended_times",
        "failures",
        "foreign_until",
        "halved_at",
        "idle",
        "known_at",
        "learned",
        "limited",
        "loading",
        "needy",
        "opening_since",
        "probe_at",
        "probing",
        "pumping_at",
        "quiet",
        "ready",
        "reason",
        "refused_at",
        "resume_at",
        "second",
        "served",
        "sessions",
        "shape",
        "site",
        "skipped",
        "sleeping",
        "slow_pace",
        "slow_reply",
        "slow_until",
        "slow_window",
        "source",
        "this",
        "waiting",
        "window",
        "yielded_at",
    )  # fmt: skip

    def __init__(self, site: Site, source: Source | None, shape: Shape, weights: Mapping[str, int]) -> None:
        """`weights`: messages in each application's turn."""
        self.site = site
        self.source = source
        self.shape = shape
        self.ready = Ready(weights)
        self.idle: list[Session] = []
        self.sessions: set[Session] = set()
        self.needy: deque[Needy] = deque()  # deliveries that wait for a connection to another host than they had
        self.skipped: set[int] = set()  # queues that are not read from disk, because the ready list is long
        self.connecting = 0
        self.loading = False
        self.opening_since = 0.0  # since when attempts to connect are under way without interruption
        self.failures = 0  # failed waves in a row
        self.known_at = -1.0  # as of when `failures` is known
        self.down_since = 0.0
        self.down_until = 0
        self.reason = self.cause = ""  # for people; for programs: one of proto.envelope.CATEGORIES
        self.sleeping: set[int] = set()  # queues that sleep because it is down
        self.probe_at = 0.0  # time of the next probe, while it is down
        self.probing = False
        self.halved_at = -1.0  # when the window was halved last
        self.window = min(WINDOW_START, shape.connections.value)
        self.learned: dict[str, Learned] = {}
        self.refused_at = 0.0  # when the learned rate was exceeded or raised last
        self.quiet = 0  # raises since it was exceeded
        self.resume_at = 0.0  # nothing is sent before, so that the site's count of the last second expires
        self.ended_after = 0  # messages after which the site ended a connection last, when, and how often in a row
        self.ended_at = 0.0
        self.ended_times = 0
        self.second = 0  # messages that began in this second of the loop's time, and in the one before
        self.this = self.before = 0
        self.served = 0  # messages sent in this worker's turn
        self.pumping_at = 0.0  # when the ready list is checked again because of a rate
        self.slow_until = 0.0  # slowed down by a rule until then: pace, connections, and why
        self.slow_pace = self.slow_window = 0.0
        self.slow_reply = ""
        self.yielded_at = -1.0  # when a connection was last yielded to another worker
        self.foreign_until = 0.0  # until then no connection is yielded for a tenant that has no mail here
        self.limited = ""  # what its ready mail was last told to wait for: of metrics.THROTTLES, or its `window`
        self.waiting = 0  # its claim for a connection in shared memory (room.py); 0: none

    @property
    def key(self) -> str:
        """Its name: the site's, and the source's where there is one."""
        return pool_key(self.site, self.source)

    @property
    def paced(self) -> bool:
        """Whether a rate limit may be in effect."""
        return bool(self.learned or self.slow_until or self.shape.rate.value)

    def most_connections(self, now: float) -> int:
        """The number of connections that this worker may have now."""
        learned = self.learned.get("connections")
        if learned is not None and learned.until < now:
            learned.value, learned.until = learned.value + 1, now + HOLD_SECONDS
        most = min(self.shape.connections.value, self.window)
        if self.slow_until > now:
            most = min(most, self.slow_window)
        return max(1, int(min(most, learned.value) if learned is not None else most))

    def pace_now(self, now: float) -> float:
        """Messages a second that learned limits and rules allow; 0: no limit."""
        if self.slow_until and self.slow_until <= now:
            self.slow_until = 0.0
        learned = self.learned.get("rate")
        if learned is not None and learned.until <= now:
            del self.learned["rate"]
            learned = None
        if learned is None:
            return self.slow_pace if self.slow_until else 0.0
        return min(learned.value, self.slow_pace) if self.slow_until else learned.value

    def slow_down(self, factor: float, reply: str, now: float, until: float) -> None:
        """Apply a rule with the action `slow`: `factor` of the messages of the last second, and of the connections. `until`: loop
        time."""
        if self.slow_until > now:
            self.slow_until = max(self.slow_until, until)
            return
        self.slow_pace = max(PACE_LEAST, self.rate(now) * factor)
        self.slow_window = max(1.0, len(self.sessions) * factor)
        self.slow_until, self.slow_reply = until, reply

    def rate(self, now: float) -> float:
        """Messages started in the last second: those of this second, and of the previous one its share within the window."""
        second = int(now)
        if second - self.second > 1:
            return 0.0
        before, this = (self.before, self.this) if second == self.second else (self.this, 0)
        return before * (1 - (now - second)) + this

    def most_messages(self, now: float) -> float:
        """After how many messages a connection is closed."""
        most = self.shape.messages_per_connection.value
        learned = self.learned.get("messages_per_connection") if self.learned else None
        if learned is None:
            return most
        if learned.until < now:
            del self.learned["messages_per_connection"]
            return most
        return int(min(most, learned.value))

    def binding(self, now: float) -> list[tuple[str, Limit]]:
        """(name, limit) of all limits in effect; a learned limit replaces the one that it tightens."""
        shape = self.shape
        found = [
            ("connections", shape.connections),
            ("messages_per_connection", shape.messages_per_connection),
            ("rate", shape.rate),
            ("connection_rate", shape.connection_rate),
        ]
        for position, (name, limit) in enumerate(found):
            learned = self.learned.get(name)
            if learned is not None and (not limit.value or learned.value < limit.value):
                found[position] = (name, Limit(round(learned.value, 3), f"learned from {learned.reply!r}"))
        if self.slow_until > now:
            found[2] = ("rate", Limit(round(self.slow_pace, 3), f"slowed by a rule after {self.slow_reply!r}"))
        if self.window < found[0][1].value:
            found[0] = ("connections", Limit(float(int(self.window)), "as many as the site has accepted so far"))
        return found

    # Up and down

    def is_news(self, began: float) -> bool:
        """Whether a failed attempt to connect that began then (loop time) is of a new wave, and counts as a failure."""
        return began > self.known_at

    def down(self, failures: int, until: int, reason: str, now: float, probed: bool = True) -> None:
        """None of its hosts can be used: it is not tried until a moment of the queue's clock, and (`probed`) probed in the
        background meanwhile. `now`: loop time. The caller sets `cause`."""
        if not self.failures:
            self.down_since = now
        self.failures, self.down_until, self.reason = failures, until, reason
        self.known_at = now
        self.probe_at = now + self.probe_pause(now) if probed else float("inf")

    def up(self, now: float) -> None:
        """One of its hosts can be used."""
        self.failures, self.down_until, self.reason, self.cause = 0, 0, "", ""
        self.known_at = now

    def probe_pause(self, now: float) -> float:
        """Seconds until the next probe."""
        most = PROBE_MOST_OURS if self.site.hosts is None else PROBE_MOST_THEIRS
        since = self.down_since if self.failures else self.opening_since
        return min(most, max(PROBE_LEAST, (now - since) * PROBE_SHARE))

    @property
    def probe_timeout(self) -> float:
        """Seconds that each step of a probe may take."""
        return PROBE_TIMEOUT_OURS if self.site.hosts is None else PROBE_TIMEOUT_THEIRS

    def is_silent(self, now: float) -> bool:
        """Whether attempts to connect are under way for so long that another one should be tried."""
        silence = SILENT_OURS if self.site.hosts is None else SILENT_THEIRS
        return bool(self.connecting and not self.sessions and now - self.opening_since > silence)

    def _halve(self, began: float, now: float) -> None:
        """Halve the window, once for all attempts that were under way when it was halved last."""
        if began > self.halved_at:
            self.halved_at = now
            self.window = max(1.0, self.window / 2)

    # Events. The name of a limit that was learned is returned, so that it can be published.

    def began(self, now: float) -> None:
        """A transaction starts."""
        second = int(now)
        if second != self.second:
            self.before = self.this if second == self.second + 1 else 0
            self.second, self.this = second, 0
        self.this += 1

    def went_well(self, now: float) -> None:
        """A message was accepted for all recipients: widen the window, raise a learned rate."""
        if self.window < self.shape.connections.value:
            self.window = min(self.shape.connections.value, self.window + 1 / self.window)
        learned = self.learned.get("rate")
        if learned is not None and now - self.refused_at > PACE_QUIET:
            self.refused_at = now
            self.quiet += 1
            learned.value *= 1 + PACE_STEP * min(self.quiet, PACE_STEPS)

    def refused_connection(self, said: Said, began: float, now: float) -> str:
        """The site replied 421 to a connection attempted at `began`. Returns "connections" when that was learned, else ""."""
        self._halve(began, now)
        open_now = len(self.sessions) + self.connecting
        if not self.sessions:
            return ""
        self.learn("connections", float(open_now), said.whole, now + HOLD_SECONDS)
        return "connections"

    def refused_message(self, said: Said, session: Session, now: float, workers: int) -> str:
        """The site replied 421 to a message: its limit of messages per connection or of messages a second is reached. Returns the
        limit that was learned, "" for none. `workers`: among how many the rate is shared."""
        carried = session.core.messages
        if now - self.ended_at > RATE_WINDOW:  # connections that end at the same moment count once
            self.ended_times = self.ended_times + 1 if carried == self.ended_after else 1
            self.ended_after, self.ended_at = carried, now
        if carried > 1 and carried == self.ended_after and self.ended_times >= ENDED_TIMES:
            self.learn("messages_per_connection", float(carried), said.whole, now + HOLD_SECONDS)
            return "messages_per_connection"
        learned = self.learned.get("rate")
        if learned is not None and now - self.refused_at < RATE_WINDOW:
            return ""  # one burst changes the limit once
        peak = max(self.rate(now), self.this, self.before) * workers
        if learned is None and peak < PACE_RATE:
            return ""
        self.refused_at = now
        self.resume_at = now + RATE_WINDOW
        self.quiet = 0
        pace = learned.value * PACE_AGAIN if learned is not None else peak * PACE_AFTER
        self.learn("rate", max(PACE_LEAST, pace), said.whole, now + HOLD_SECONDS)
        return "rate"

    def learned_at_shutdown(self, now: float) -> bool:
        """Whether the learned rate comes from a 421 with which the host announced its shutdown."""
        learned = self.learned.get("rate")
        return learned is not None and now - (learned.until - HOLD_SECONDS) < SHUTDOWN_SECONDS

    def learn(self, limit: str, value: float, reply: str, until: float) -> None:
        """Set a learned limit, in effect until a moment of the loop's time."""
        self.learned[limit] = Learned(value, reply, until)

    def timed_out(self, since: float, now: float) -> None:
        """A connection timed out that had been stalled since `since` (loop time)."""
        self._halve(since, now)


def pool_key(site: Site, source: Source | None) -> str:
    """The name of a site's pool for a source address."""
    return f"{site.key} from {source.name}" if source is not None else site.key
