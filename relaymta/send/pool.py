"""One site, sent to from one address: what waits for it, its connections, and how much of both it takes at present.

`window` is the number of connections that the site has shown to take (of this worker's): one more for each round of
messages that went well, half when it says 421 or times out. `learned` are limits that its replies taught. Both only tighten
the limits of `shape`.

A *failed wave* is what an outage costs, and is defined here (`is_news`). What is known of a site, up or down, is known as of a
moment: when this worker was told so, by an attempt of its own to connect or by another worker. An attempt that began before
that moment and fails tells nothing new. So all attempts that are under way when the first of them fails are one wave: one
failure, one step of the schedule, one message charged; whatever their number, however long each takes to fail, in whichever
worker. And one that began before the site was found up again is no failure at all. The window is halved once a wave, too.
"""

from collections.abc import Mapping

from relaymta.config import Source
from relaymta.proto.smtp_client import Said
from relaymta.route.shaping import Limit, Shape
from relaymta.route.sites import Site
from relaymta.send.ready import Ready
from relaymta.send.session import Session

__all__ = ["Learned", "Pool", "pool_key"]

WINDOW_START = 5.0
# A site that is down is looked at in the background, seconds: first after LOOK_LEAST; then after LOOK_SHARE of the time that it
# has been down, up to the most; each step of a look may take so long. Smart hosts are ours, and few; MX hosts are other people's.
LOOK_LEAST, LOOK_SHARE = 2.0, 0.1
LOOK_MOST_OURS, LOOK_MOST_THEIRS = 4.0, 30.0
LOOK_TIMEOUT_OURS, LOOK_TIMEOUT_THEIRS = 5.0, 10.0
SILENT_OURS, SILENT_THEIRS = 2.0, 10.0  # a connection that takes so long may stand still where a new one does not
PACE_LEAST = 0.05  # messages a second
PACE_AFTER = 0.9  # of the rate at which it was refused
PACE_AGAIN = 0.95  # of the pace, when that was refused too
PACE_QUIET = 10.0  # seconds without a refusal until the pace rises a little
PACE_STEP = 0.01  # more, after the first of these seconds; twice that after the second, and so on
PACE_STEPS = 10
PACE_RATE = 2.0  # messages a second: what is refused below that is not refused for its rate
HOLD_SECONDS = 600.0  # how long a learned number of connections or messages stands before one more is tried
RATE_WINDOW = 1.0
FAREWELL = 10.0  # seconds before a host is gone in which 421 says that it goes, and nothing about rates
ENDED_TIMES = 3  # connections that were ended after the same number of messages, until that is taken for a limit


class Learned:
    """A limit that replies taught: its value, the reply, and until when (loop time) it stands."""

    __slots__ = ("reply", "until", "value")

    def __init__(self, value: float, reply: str, until: float) -> None:
        self.value = value
        self.reply = reply
        self.until = until


class Pool:
    """A site's state in one worker. Times are the loop's but for `down_until`, which is the queue's clock."""

    __slots__ = (
        "before", "connecting", "down_since", "down_until", "ended_after", "ended_at", "ended_times", "failures", "halved_at",
        "idle", "known_at", "learned", "loading", "look_at", "looking", "opening_since", "pumping_at", "quiet", "ready", "reason",
        "refused_at", "resume_at", "second", "served", "sessions", "shape", "site", "skipped", "sleeping", "slow_pace",
        "slow_reply", "slow_until", "slow_window", "source", "stranger_at", "this", "waiting", "window", "yielded_at",
    )  # fmt: skip

    def __init__(self, site: Site, source: Source | None, shape: Shape, weights: Mapping[str, int]) -> None:
        """`weights`: how many messages an application's turn is."""
        self.site = site
        self.source = source
        self.shape = shape
        self.ready = Ready(weights)
        self.idle: list[Session] = []
        self.sessions: set[Session] = set()
        self.skipped: set[int] = set()  # queues of which no more is read, because so much waits already
        self.connecting = 0
        self.loading = False
        self.opening_since = 0.0  # since when attempts to connect are under way without a break
        self.failures = 0  # failed waves in a row
        self.known_at = -1.0  # as of when we know whether it is up or down
        self.down_since = 0.0
        self.down_until = 0
        self.reason = ""
        self.sleeping: set[int] = set()  # queues that sleep because it is down
        self.look_at = 0.0  # when it is looked at next, while it is down
        self.looking = False
        self.halved_at = -1.0  # when the window was halved last
        self.window = min(WINDOW_START, shape.connections.value)
        self.learned: dict[str, Learned] = {}
        self.refused_at = 0.0  # when the rate was refused last, or rose
        self.quiet = 0  # times it rose since
        self.resume_at = 0.0  # nothing is sent before, so that its count of the last second can run out
        self.ended_after = 0  # messages after which the site ended a connection last, when, and how often in a row
        self.ended_at = 0.0
        self.ended_times = 0
        self.second = 0  # messages that began in this second of the loop's time, and in the one before
        self.this = self.before = 0
        self.served = 0  # messages since this worker took its turn, while another waits
        self.pumping_at = 0.0  # when it is looked at again because of a rate
        self.slow_until = 0.0  # slowed down by a rule until then: pace, connections, and why
        self.slow_pace = self.slow_window = 0.0
        self.slow_reply = ""
        self.yielded_at = -1.0  # when a connection's place was left to another worker
        self.stranger_at = 0.0  # until then none is left for the sake of a tenant of whom we have no mail
        self.waiting = 0  # with what it waits for a connection, as the others see it

    @property
    def key(self) -> str:
        """Its name: the site's, and the source's where there is one."""
        return pool_key(self.site, self.source)

    @property
    def paced(self) -> bool:
        """Whether a rate may have to be looked at."""
        return bool(self.learned or self.slow_until or self.shape.rate.value)

    def most_connections(self, now: float) -> int:
        """How many connections this worker may have now."""
        learned = self.learned.get("connections")
        if learned is not None and learned.until < now:
            learned.value, learned.until = learned.value + 1, now + HOLD_SECONDS
        most = min(self.shape.connections.value, self.window)
        if self.slow_until > now:
            most = min(most, self.slow_window)
        return max(1, int(min(most, learned.value) if learned is not None else most))

    def pace_now(self, now: float) -> float:
        """Messages a second that replies and rules allow; 0: any."""
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
        """A rule asks for less: `factor` of what went out in the last second, and of the connections."""
        if self.slow_until > now:
            self.slow_until = max(self.slow_until, until)
            return
        self.slow_pace = max(PACE_LEAST, self.rate(now) * factor)
        self.slow_window = max(1.0, len(self.sessions) * factor)
        self.slow_until, self.slow_reply = until, reply

    def rate(self, now: float) -> float:
        """Messages that began in the last second: those of this second, and of the one before what is still within."""
        second = int(now)
        if second - self.second > 1:
            return 0.0
        before, this = (self.before, self.this) if second == self.second else (self.this, 0)
        return before * (1 - (now - second)) + this

    def most_messages(self, now: float) -> int:
        """After how many messages a connection is closed."""
        learned = self.learned.get("messages_per_connection")
        if learned is not None and learned.until < now:
            del self.learned["messages_per_connection"]
            learned = None
        most = self.shape.messages_per_connection.value
        return int(min(most, learned.value) if learned is not None else most)

    def binding(self, now: float) -> list[tuple[str, Limit]]:
        """(name, limit) of all limits in force, learned ones in the place of those that they tighten."""
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
            found[0] = ("connections", Limit(float(int(self.window)), "what the site has shown to take so far"))
        return found

    # Up and down

    def is_news(self, began: float) -> bool:
        """Whether an attempt to connect that began then and failed tells more than is known: that it is of a new wave."""
        return began > self.known_at

    def down(self, failures: int, until: int, reason: str, now: float, looked_at: bool = True) -> None:
        """None of its hosts can be used: it is left alone until a moment of the queue's clock, and (`looked_at`) looked at in
        the background meanwhile."""
        if not self.failures:
            self.down_since = now
        self.failures, self.down_until, self.reason = failures, until, reason
        self.known_at = now
        self.look_at = now + self.look_pause(now) if looked_at else float("inf")

    def up(self, now: float) -> None:
        """One of its hosts can be used."""
        self.failures, self.down_until, self.reason = 0, 0, ""
        self.known_at = now

    def look_pause(self, now: float) -> float:
        """Seconds until it is looked at again."""
        most = LOOK_MOST_OURS if self.site.hosts is None else LOOK_MOST_THEIRS
        since = self.down_since if self.failures else self.opening_since
        return min(most, max(LOOK_LEAST, (now - since) * LOOK_SHARE))

    @property
    def look_timeout(self) -> float:
        """Seconds that each step of a look may take: the next one comes soon."""
        return LOOK_TIMEOUT_OURS if self.site.hosts is None else LOOK_TIMEOUT_THEIRS

    def is_silent(self, now: float) -> bool:
        """Whether attempts to connect are under way for so long that it is better to see whether another one gets through."""
        silence = SILENT_OURS if self.site.hosts is None else SILENT_THEIRS
        return bool(self.connecting and not self.sessions and now - self.opening_since > silence)

    def _halve(self, began: float, now: float) -> None:
        """Fewer connections, once for all that was under way when it last became fewer."""
        if began > self.halved_at:
            self.halved_at = now
            self.window = max(1.0, self.window / 2)

    # What happened. What a limit was learned from is returned, so that others can be told.

    def began(self, now: float) -> None:
        """A message begins."""
        second = int(now)
        if second != self.second:
            self.before = self.this if second == self.second + 1 else 0
            self.second, self.this = second, 0
        self.this += 1

    def went_well(self, now: float) -> None:
        """A message was taken."""
        if self.window < self.shape.connections.value:
            self.window = min(self.shape.connections.value, self.window + 1 / self.window)
        learned = self.learned.get("rate")
        if learned is not None and now - self.refused_at > PACE_QUIET:
            self.refused_at = now
            self.quiet += 1
            learned.value *= 1 + PACE_STEP * min(self.quiet, PACE_STEPS)

    def refused_connection(self, said: Said, began: float, now: float) -> str:
        """The site did not want one more connection, asked for at `began`; "connections" when that teaches how many it wants."""
        self._halve(began, now)
        open_now = len(self.sessions) + self.connecting
        if not self.sessions:
            return ""
        self.learn("connections", float(open_now), said.whole, now + HOLD_SECONDS)
        return "connections"

    def refused_message(self, said: Said, session: Session, now: float, workers: int) -> str:
        """The site said 421 instead of taking a message: it takes so many over one connection, or so many a second. Which of
        the limits was learned, "" for none."""
        carried = session.core.messages
        if now - self.ended_at > RATE_WINDOW:  # those of one moment say the same once
            self.ended_times = self.ended_times + 1 if carried == self.ended_after else 1
            self.ended_after, self.ended_at = carried, now
        if carried > 1 and carried == self.ended_after and self.ended_times >= ENDED_TIMES:
            self.learn("messages_per_connection", float(carried), said.whole, now + HOLD_SECONDS)
            return "messages_per_connection"
        learned = self.learned.get("rate")
        if learned is not None and now - self.refused_at < RATE_WINDOW:
            return ""  # one burst, one lesson
        peak = max(self.rate(now), self.this, self.before) * workers
        if learned is None and peak < PACE_RATE:
            return ""
        self.refused_at = now
        self.resume_at = now + RATE_WINDOW
        self.quiet = 0
        pace = learned.value * PACE_AGAIN if learned is not None else peak * PACE_AFTER
        self.learn("rate", max(PACE_LEAST, pace), said.whole, now + HOLD_SECONDS)
        return "rate"

    def farewell(self, now: float) -> bool:
        """Whether the rate that was learned is what a host said that is gone since: it was going down."""
        learned = self.learned.get("rate")
        return learned is not None and now - (learned.until - HOLD_SECONDS) < FAREWELL

    def learn(self, limit: str, value: float, reply: str, until: float) -> None:
        """A limit is known from now on."""
        self.learned[limit] = Learned(value, reply, until)

    def timed_out(self, since: float, now: float) -> None:
        """A connection stood still since then."""
        self._halve(since, now)


def pool_key(site: Site, source: Source | None) -> str:
    """The name of a site's pool for mail from a source."""
    return f"{site.key} from {source.name}" if source is not None else site.key
