"""What the machine's limits allow a site's pool: connections, their rate, messages a second; and whose turn a connection is."""

from collections.abc import Callable

import xxhash

from relaymta.send.pool import Pool
from relaymta.send.session import Session
from relaymta.shm import Limits, Rates

__all__ = ["Room"]

LOOK_SECONDS = 0.05  # between two looks whether another worker has let go of a connection
YIELD_SECONDS = 0.15  # a place that was given up is left to others
TENANT_BITS = 48
TENANTS = 100  # looked at, at most
STRANGER_SECONDS = 0.2  # between two times that a connection goes to another worker for a tenant's sake
TURN = 10  # messages until a connection goes to another worker that waits with mail of the same class and the same tenants
LONG_TURN = 100  # with any mail of the same class


class Room:
    """One worker's part in the limits. `connections`: of the whole machine, to all sites. `later(pool, seconds)` has the pool
    looked at again; `now()`: seconds that only go forward."""

    def __init__(
        self, limits: Limits, rates: Rates, connections: int, later: Callable[[Pool, float], None], now: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._rates = rates
        self.connections = connections
        self._later = later
        self._now = now

    @property
    def workers(self) -> int:
        """Among how many the rates are shared."""
        return self._rates.workers

    def take(self, pool: Pool, beyond: int = 0) -> bool:
        """Take the place of one more connection; False when there is none now. `beyond`: so many more than the site has shown to
        take (never more than its limit)."""
        now = self._now()
        most = pool.most_connections(now) + beyond
        if len(pool.sessions) + pool.connecting >= most or now < pool.yielded_at + YIELD_SECONDS:
            return False
        if not self._limits.take("out", self.connections):
            return False
        shape = pool.shape
        if not self._limits.take("site " + shape.key, int(shape.connections.value)):
            self._limits.give("out")
            return False
        rate = shape.connection_rate.value
        wait = self._rates.take("connect " + shape.key, rate) if rate else 0.0
        if wait:
            self.give(pool)
            self._later(pool, wait)
            return False
        return True

    def may_look(self, pool: Pool, pause: float) -> bool:
        """Whether it is this worker that looks at a site that is down: one does, once in `pause` seconds."""
        return not self._rates.take("look " + pool.key, 1 / pause)

    def give(self, pool: Pool) -> None:
        """A connection has ended."""
        self._limits.give("out")
        self._limits.give("site " + pool.shape.key)

    def wait(self, pool: Pool) -> None:
        """Tell the other workers that the pool would like a connection, and look again soon."""
        self._claim(pool, pool.ready.highest() << TENANT_BITS | _marks(pool))
        self._later(pool, LOOK_SECONDS)

    def arrived(self, pool: Pool) -> None:
        """The pool has a new connection. Where another worker waits for one, those go first whom it has no mail of."""
        self.wait_no_longer(pool)
        theirs = self._others(pool)[1]
        if theirs:
            pool.ready.prefer(lambda name: not _mark(name) & theirs)

    def _others(self, pool: Pool) -> tuple[int, int]:
        """The highest class with which another worker waits for a connection (0: none does), and the marks of its tenants."""
        return divmod(self._limits.waiting("site " + pool.shape.key), 1 << TENANT_BITS)

    def wait_no_longer(self, pool: Pool) -> None:
        """The pool has what it needs."""
        self._claim(pool, 0)

    def _claim(self, pool: Pool, claim: int) -> None:
        """`claim`, as the other workers see it: the class, then the marks of the tenants whose mail waits."""
        if claim != pool.waiting:
            pool.waiting = claim
            self._limits.wait("site " + pool.shape.key, claim)

    def take_message(self, pool: Pool) -> bool:
        """Whether a message may begin now, by the rates; when not, the pool is looked at again when one may."""
        pause = pool.resume_at - self._now()
        if pause > 0:  # it has just said that it was too much
            self._later(pool, pause)
            return False
        rate = pool.shape.rate.value
        wait = self._rates.take("rate " + pool.shape.key, rate) if rate else 0.0
        pace = 0.0 if wait else pool.pace_now(self._now())
        if pace:
            wait = self._rates.take("pace " + pool.shape.key, pace)
        if wait:
            self._later(pool, wait)
        return not wait

    def yields(self, pool: Pool, session: Session) -> bool:
        """Whether another worker shall have this connection's place: it waits with mail of a higher class; or of the same, and
        of a tenant of whom we have none, or we have had our turn. Then the place is left free for a moment."""
        pool.served += 1
        if len(pool.sessions) < pool.shape.connections.value and pool.served < TURN:
            return False
        (rank, theirs), own = self._others(pool), pool.ready.highest()
        if rank and (rank > own or (rank == own and self._turn_is_over(pool, theirs))):
            pool.served = 0
            pool.yielded_at = self._now()
            session.leaving = True
        elif not rank and pool.served >= TURN:
            pool.served = 0
        return session.leaving

    def _turn_is_over(self, pool: Pool, theirs: int) -> bool:
        """Whether mail of the same class and of tenants with these marks goes before ours."""
        ours, now = _marks(pool), self._now()
        if theirs & ~ours and now > pool.stranger_at:
            pool.stranger_at = now + STRANGER_SECONDS
            return True
        return pool.served >= (LONG_TURN if ours & ~theirs else TURN)


def _marks(pool: Pool) -> int:
    """The tenants that have mail of the highest class, as bits: two may share one."""
    marks = 0
    for name in pool.ready.tenants()[:TENANTS]:
        marks |= _mark(name)
    return marks


def _mark(tenant: str) -> int:
    return 1 << xxhash.xxh32_intdigest(tenant.encode()) % TENANT_BITS
