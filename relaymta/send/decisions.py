"""Decisions about sites: by operators, by rules about replies, by failed connections, and learned from replies. A decision is a
site state of the machine (node/): states that are published are applied to one worker's pools, and those decided here are
published."""

import re
from collections.abc import Callable

from relaymta.config import Rule
from relaymta.errors import Failure
from relaymta.log import Log
from relaymta.node import DEAD, LEARNED, SLOW, SUSPENDED, SiteState, SiteStates
from relaymta.proto.smtp_client import Said
from relaymta.queue import wall_ms
from relaymta.route.shaping import LIMITS
from relaymta.send.pool import Pool

__all__ = ["Decisions", "Publish"]

ECHO_MS = 1000  # a state that this worker published itself comes back: an end that is later by less than this is not new
# A permanent reply, or a reply to AUTH: the site is up, and is not probed.
_LOGIN = "login: "
_REFUSED = re.compile(rf"5\d\d\b|{_LOGIN}")

Publish = Callable[[SiteState | None, tuple[str, str, str]], None]


class Decisions:
    """The decisions that concern one worker's pools. Moments are of the queue's clock (ms, `clock`) or loop time (s, `now`).

    `publish(state, key)` sends a state to all workers (None: the one with `key` is removed). `send_back(pool, until, tenant)`
    puts entries (of one tenant, or all) of a pool back into queues that sleep until then; `wake()` wakes all sleeping queues,
    `wake_pool(pool)` those that sleep because of this pool's site.
    """

    def __init__(
        self,
        states: SiteStates,
        publish: Publish,
        log: Log,
        pools: dict[str, Pool],
        now: Callable[[], float],
        clock: Callable[[], int],
        send_back: Callable[[Pool, int, str | None], None],
        wake: Callable[[], None],
        wake_pool: Callable[[Pool], None],
    ) -> None:
        self.states = states
        self._publish = publish
        self._log = log
        self._pools = pools
        self._now = now
        self._clock = clock
        self._send_back = send_back
        self._wake = wake
        self._wake_pool = wake_pool
        self._by_shape: dict[str, set[str]] = {}  # the names of the pools whose limits are counted by a name; also of past ones
        self._named = 0  # names in it, at most

    def asleep(self, pool: Pool, tenant: str) -> int:
        """Until when no mail of a tenant is delivered through a pool (queue clock); 0 when it may be."""
        until, suspended = pool.down_until, self.states.suspension(pool.shape.key, tenant)
        if suspended is not None:
            until = max(until, self._end(suspended))
        return until if until and until > self._clock() else 0

    def _end(self, state: SiteState) -> int:
        """When a state ends, by the queue's clock."""
        return self._clock() + self.states.left(state)

    def recall(self, pool: Pool) -> None:
        """Apply the machine's states of its site to a new pool, and to come. Called before the pool is used."""
        self._by_shape.setdefault(pool.shape.key, set()).add(pool.key)
        self._named += 1
        if self._named > 2 * len(self._pools) + 1000:  # without the pools that are gone
            self._by_shape = {}
            for one in (*self._pools.values(), pool):
                self._by_shape.setdefault(one.shape.key, set()).add(one.key)
            self._named = len(self._pools) + 1
        self.apply(pool)

    def apply(self, pool: Pool) -> None:
        """Give a new pool what is known about its site."""
        dead = self.states.get(DEAD, pool.key)
        if dead is not None:  # found down by another worker, or before a restart
            pool.down(int(dead.value), self._end(dead), dead.reason, self._now(), not _REFUSED.match(dead.reply))
            pool.cause = dead.cause
        for kind, about in ((SLOW, ""), *((LEARNED, limit) for limit in LIMITS)):
            state = self.states.get(kind, pool.shape.key, about)
            if state is not None:
                self._tighten(pool, state)

    def _tighten(self, pool: Pool, state: SiteState) -> None:
        now = self._now()
        until = now + self.states.left(state) / 1000
        if state.kind == SLOW:
            pool.slow_down(state.value, state.reply, now, until)
        else:
            pool.learn(state.about, state.value, state.reply, until)

    # Decided in this worker

    def dead(self, pool: Pool, why: Failure, said: Said, until_wall: int) -> None:
        """No host of a site could be reached: log it, and publish the state. `until_wall`: ms since the epoch."""
        reason = str(why)
        self._log.event(
            "site", route=pool.key, state="down", reason=reason, fault=why.fault, cause=why.category, until=until_wall,
            ends=until_wall / 1000,
        )  # fmt: skip
        now = wall_ms()
        reply = _LOGIN + said.whole if said.phase == "auth" else said.whole
        failures = float(pool.failures)
        self._learn(SiteState(DEAD, pool.key, "", now, until_wall, "automatic", reason, reply, failures, why.category))

    def alive(self, pool: Pool) -> None:
        """A site that was down can be reached: log it, and remove the state."""
        self._log.event("site", route=pool.key, state="up", reason="", fault="", cause="", until=0, ends=0)
        self.states.forget(DEAD, pool.key, "")
        self._publish(None, (DEAD, pool.key, ""))

    def forget_dead(self) -> None:
        """Remove the states of all sites that are down: all may be tried now."""
        for state in self.states.of(DEAD):
            self.states.forget(*state.key)
            self._publish(None, state.key)

    def learned(self, pool: Pool, limit: str) -> None:
        """Publish a limit that the pool learned from a reply ("": none)."""
        if limit:
            found, now = pool.learned[limit], wall_ms()
            until = now + int((found.until - self._now()) * 1000)
            value = round(found.value, 3)
            reason = f"{limit} at most {value:g}"
            self._announce(SiteState(LEARNED, pool.shape.key, limit, now, until, "automatic", reason, found.reply, value))

    def unlearned(self, pool: Pool, limit: str) -> None:
        """Remove a learned limit that was none."""
        pool.learned.pop(limit, None)
        self.states.forget(LEARNED, pool.shape.key, limit)
        self._publish(None, (LEARNED, pool.shape.key, limit))

    def rules(self, pool: Pool | None, tenant: str, rules: list[tuple[Rule, str]]) -> None:
        """Apply the rules' actions that go beyond the message: suspend its site, or its tenant there, or slow the site down."""
        for rule, reply in rules if pool is not None else ():
            assert pool is not None
            kind, value = (SUSPENDED, 0.0) if rule.action == "suspend" else (SLOW, 0.5)
            now = wall_ms()
            until = now + int(rule.duration * 1000)
            reason = f"{rule.action} for {rule.duration:.0f} s"
            about = tenant if rule.scope == "tenant" else ""
            state = SiteState(kind, pool.shape.key, about, now, until, f"rule {rule.match}", reason, reply, value)
            if self.states.get(*state.key) is None:
                self._announce(state)

    def _announce(self, state: SiteState) -> None:
        tenant = "" if state.kind == LEARNED else state.about
        action = f"{state.kind}: {state.reason}"
        self._log.event(
            "shaping", site=state.site, tenant=tenant, action=action, by=state.by, reply=state.reply, until=state.until,
            ends=state.until / 1000,
        )  # fmt: skip
        self._learn(state)

    def _learn(self, state: SiteState) -> None:
        self.states.learn(state)  # in effect here at once; the other workers are notified
        self._publish(state, state.key)

    # Published by the machine

    def changed(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """Called when a state was published on the machine, or (None) the one with this key removed."""
        kind, name, about = key
        if kind == SUSPENDED and state is None:
            self._wake()
        for pool in self._concerned(kind, name):
            if kind == DEAD:
                self._dead_elsewhere(pool, state)
            elif kind == SUSPENDED and state is not None:
                self._send_back(pool, self._end(state), about or None)
            elif kind in (SLOW, LEARNED):
                if state is not None:
                    self._tighten(pool, state)
                elif kind == SLOW:
                    pool.slow_until = 0.0
                else:
                    pool.learned.pop(about, None)

    def _concerned(self, kind: str, name: str) -> list[Pool]:
        """The pools that a state with this kind and site is about."""
        if kind == SUSPENDED and not name:
            return list(self._pools.values())
        names = [name] if kind == DEAD else self._by_shape.get(name, ())
        pools = [self._pools[one] for one in names if one in self._pools]
        return pools if kind == DEAD else [pool for pool in pools if pool.shape.key == name]

    def _dead_elsewhere(self, pool: Pool, state: SiteState | None) -> None:
        """Another worker found a site down, or (None) up; or an operator wants it tried."""
        if pool.sessions:
            return  # it is up: this worker has a connection
        if state is None:
            pool.up(self._now())
            self._wake_pool(pool)
        elif self._end(state) > pool.down_until + ECHO_MS:
            pool.down(int(state.value), self._end(state), state.reason, self._now(), not _REFUSED.match(state.reply))
            pool.cause = state.cause
            self._send_back(pool, pool.down_until, None)
