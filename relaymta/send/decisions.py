"""What is decided about sites: by operators, by rules about replies, by sites being down, and learned. Decisions are facts of
the machine (node/); this applies those that it knows to one worker's pools, and makes known those that are made here."""

import re
from collections.abc import Callable

from relaymta.config import Rule
from relaymta.log import Log
from relaymta.node import DEAD, LEARNED, SLOW, SUSPENDED, Fact, Facts
from relaymta.proto.smtp_client import Said
from relaymta.queue import wall_ms
from relaymta.route.shaping import LIMITS
from relaymta.send.pool import Pool

__all__ = ["Decisions", "Tell"]

ECHO_MS = 1000  # what we have told comes back to us, and says nothing new
# A reply that is final, or one to a login: the site is there, and has nothing to come back from.
_LOGIN = "login: "
_REFUSED = re.compile(rf"5\d\d\b|{_LOGIN}")

Tell = Callable[[Fact | None, tuple[str, str, str]], None]


class Decisions:
    """The decisions that concern one worker's pools. Moments are the queue's clock (ms, `clock`) or the loop's (s, `now`).

    `tell(fact, key)` makes a fact known to the machine (None: `key` holds no longer). `send_back(pool, until, tenant)` takes
    waiting mail (of one tenant, or all) out of a pool until then; `wake()` lets queues go on that were put to sleep, `rise(pool)`
    those that sleep because of this pool's site.
    """

    def __init__(
        self,
        facts: Facts,
        tell: Tell,
        log: Log,
        pools: dict[str, Pool],
        now: Callable[[], float],
        clock: Callable[[], int],
        send_back: Callable[[Pool, int, str | None], None],
        wake: Callable[[], None],
        rise: Callable[[Pool], None],
    ) -> None:
        self.facts = facts
        self._tell = tell
        self._log = log
        self._pools = pools
        self._now = now
        self._clock = clock
        self._send_back = send_back
        self._wake = wake
        self._rise = rise

    def asleep(self, pool: Pool, tenant: str) -> int:
        """Until when nothing of a tenant goes to a pool; 0 when it may."""
        suspended = self.facts.suspension(pool.shape.key, tenant)
        until = max(pool.down_until, self._end(suspended) if suspended is not None else 0)
        return until if until and until > self._clock() else 0

    def _end(self, fact: Fact) -> int:
        """When a fact ends, by the queue's clock."""
        return self._clock() + self.facts.left(fact)

    def recall(self, pool: Pool) -> None:
        """A new pool begins with what the machine knows about its site."""
        dead = self.facts.get(DEAD, pool.key)
        if dead is not None:  # another worker, or the one before this, found it down
            pool.down(int(dead.value), self._end(dead), dead.reason, self._now(), not _REFUSED.match(dead.reply))
        for kind, about in ((SLOW, ""), *((LEARNED, limit) for limit in LIMITS)):
            fact = self.facts.get(kind, pool.shape.key, about)
            if fact is not None:
                self._tighten(pool, fact)

    def _tighten(self, pool: Pool, fact: Fact) -> None:
        now = self._now()
        until = now + self.facts.left(fact) / 1000
        if fact.kind == SLOW:
            pool.slow_down(fact.value, fact.reply, now, until)
        else:
            pool.learn(fact.about, fact.value, fact.reply, until)

    # Made here

    def dead(self, pool: Pool, reason: str, said: Said, until_wall: int) -> None:
        """No host of a site could be reached."""
        self._log.event("site", route=pool.key, state="down", reason=reason, until=until_wall)
        now = wall_ms()
        reply = _LOGIN + said.whole if said.phase == "auth" else said.whole
        self._make(Fact(DEAD, pool.key, "", now, until_wall, "automatic", reason, reply, float(pool.failures)))

    def alive(self, pool: Pool) -> None:
        """A site that was down can be reached."""
        self._log.event("site", route=pool.key, state="up", reason="", until=0)
        self.facts.forget(DEAD, pool.key, "")
        self._tell(None, (DEAD, pool.key, ""))

    def forget_dead(self) -> None:
        """Every site may be tried again now."""
        for fact in self.facts:
            if fact.kind == DEAD:
                self.facts.forget(*fact.key)
                self._tell(None, fact.key)

    def learned(self, pool: Pool, limit: str) -> None:
        """A reply taught a limit ("": it did not)."""
        if limit:
            lesson, now = pool.learned[limit], wall_ms()
            until = now + int((lesson.until - self._now()) * 1000)
            value = round(lesson.value, 3)
            reason = f"{limit} at most {value:g}"
            self._say(Fact(LEARNED, pool.shape.key, limit, now, until, "automatic", reason, lesson.reply, value))

    def unlearned(self, pool: Pool, limit: str) -> None:
        """What was learned has turned out to be none of this site's limits."""
        pool.learned.pop(limit, None)
        self.facts.forget(LEARNED, pool.shape.key, limit)
        self._tell(None, (LEARNED, pool.shape.key, limit))

    def rules(self, pool: Pool | None, tenant: str, rules: list[tuple[Rule, str]]) -> None:
        """What rules about replies ask for beyond the message itself: suspend its site or tenant there, or slow down."""
        for rule, reply in rules if pool is not None else ():
            assert pool is not None
            kind, value = (SUSPENDED, 0.0) if rule.action == "suspend" else (SLOW, 0.5)
            now = wall_ms()
            until = now + int(rule.duration * 1000)
            reason = f"{rule.action} for {rule.duration:.0f} s"
            about = tenant if rule.scope == "tenant" else ""
            fact = Fact(kind, pool.shape.key, about, now, until, f"rule {rule.match}", reason, reply, value)
            if self.facts.get(*fact.key) is None:
                self._say(fact)

    def _say(self, fact: Fact) -> None:
        tenant = "" if fact.kind == LEARNED else fact.about
        action = f"{fact.kind}: {fact.reason}"
        self._log.event("shaping", site=fact.site, tenant=tenant, action=action, by=fact.by, reply=fact.reply, until=fact.until)
        self._make(fact)

    def _make(self, fact: Fact) -> None:
        self.facts.learn(fact)  # at once here; the others hear of it
        self._tell(fact, fact.key)

    # Made known

    def changed(self, fact: Fact | None, key: tuple[str, str, str]) -> None:
        """The machine has learned a fact, or (None) forgotten the one with this key."""
        kind, name, about = key
        if kind == SUSPENDED and fact is None:
            self._wake()
        for pool in list(self._pools.values()):
            if kind == DEAD and pool.key == name:
                self._dead_elsewhere(pool, fact)
            elif kind == SUSPENDED and fact is not None and name in ("", pool.shape.key):
                self._send_back(pool, self._end(fact), about or None)
            elif kind in (SLOW, LEARNED) and name == pool.shape.key:
                if fact is not None:
                    self._tighten(pool, fact)
                elif kind == SLOW:
                    pool.slow_until = 0.0
                else:
                    pool.learned.pop(about, None)

    def _dead_elsewhere(self, pool: Pool, fact: Fact | None) -> None:
        """Another worker found a site down, or (None) up; or an operator says that it is to be tried."""
        if pool.sessions:
            return  # we know better
        if fact is None:
            pool.up(self._now())
            self._rise(pool)
        elif self._end(fact) > pool.down_until + ECHO_MS:
            pool.down(int(fact.value), self._end(fact), fact.reason, self._now(), not _REFUSED.match(fact.reply))
            self._send_back(pool, pool.down_until, None)
