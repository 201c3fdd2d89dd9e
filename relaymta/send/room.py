"""The machine's limits on a site's pool (connections, their rate, messages a second), and how workers share its connections."""

from collections.abc import Callable

import xxhash

from relaymta.send.pool import Pool
from relaymta.send.session import Session
from relaymta.shm import Limits, Rates

__all__ = ["Room"]

RECHECK_SECONDS = 0.05  # between two checks whether another worker has released a connection
YIELD_SECONDS = 0.15  # a yielded connection is left to other workers so long
TENANT_BITS = 48
TENANTS = 100  # that a claim marks, at most
FOREIGN_SECONDS = 0.2  # between two connections yielded for tenants that have no mail here
TURN = 10  # messages until a connection is yielded to a worker that waits with mail of the same class and tenants
LONG_TURN = 100  # until it is yielded for any mail of the same class


class Room:
    """One worker's view of the limits in shared memory. `connections`: of the whole machine, to all sites. `later(pool, seconds)`
    has the pool's ready list checked again; `now()`: monotonic seconds."""

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
        """The number of workers that share the rates."""
        return self._rates.workers

    def take(self, pool: Pool, beyond: int = 0) -> bool:
        """Count one more connection; False when a limit is reached. `beyond`: how many more than the pool's window are allowed
        (never more than the site's limit)."""
        now = self._now()
        most = pool.most_connections(now) + beyond
        if len(pool.sessions) + pool.connecting >= most or now < pool.yielded_at + YIELD_SECONDS:
            pool.limited = "window"
            return False
        if not self._limits.take("out", self.connections):
            pool.limited = "machine"
            return False
        shape = pool.shape
        if not self._limits.take("site " + shape.key, int(shape.connections.value)):
            self._limits.give("out")
            pool.limited = "connections"
            return False
        rate = shape.connection_rate.value
        wait = self._rates.take("connect " + shape.key, rate) if rate else 0.0
        if wait:
            pool.limited = "connection_rate"
            self.give(pool)
            self._later(pool, wait)
            return False
        pool.limited = ""
        return True

    def may_probe(self, pool: Pool, pause: float) -> bool:
        """Whether this worker probes a site that is down now: of all workers one does, once in `pause` seconds."""
        return not self._rates.take("probe " + pool.key, 1 / pause)

    def give(self, pool: Pool) -> None:
        """Release a connection that has ended."""
        self._limits.give("out")
        self._limits.give("site " + pool.shape.key)

    def wait(self, pool: Pool) -> None:
        """Publish to the other workers that the pool waits for a connection, and check again soon."""
        self._claim(pool, pool.ready.highest() << TENANT_BITS | _marks(pool))
        self._later(pool, RECHECK_SECONDS)

    def arrived(self, pool: Pool) -> None:
        """The pool has a new connection. Where another worker waits for one, tenants that have no mail there are preferred."""
        self.wait_no_longer(pool)
        theirs = self._others(pool)[1]
        if theirs:
            pool.ready.prefer(lambda name: not _mark(name) & theirs)

    def _others(self, pool: Pool) -> tuple[int, int]:
        """(Highest class with which another worker waits for a connection, 0: none does; the marks of its tenants)."""
        return divmod(self._limits.waiting("site " + pool.shape.key), 1 << TENANT_BITS)

    def wait_no_longer(self, pool: Pool) -> None:
        """Withdraw the pool's claim for a connection."""
        self._claim(pool, 0)

    def _claim(self, pool: Pool, claim: int) -> None:
        """Write the claim to shared memory: the class, then the marks of the tenants whose mail waits; 0: none."""
        if claim != pool.waiting:
            pool.waiting = claim
            self._limits.wait("site " + pool.shape.key, claim)

    def take_message(self, pool: Pool) -> bool:
        """Whether the rates allow a message now; when not, the pool is checked again when they do."""
        pause = pool.resume_at - self._now()
        if pause > 0:  # the site has just replied 421
            pool.limited = "learned"
            self._later(pool, pause)
            return False
        rate = pool.shape.rate.value
        wait = self._rates.take("rate " + pool.shape.key, rate) if rate else 0.0
        pace = 0.0 if wait else pool.pace_now(self._now())
        if pace:
            wait = self._rates.take("pace " + pool.shape.key, pace)
        if wait:
            pool.limited = "learned" if pace else "rate"
            self._later(pool, wait)
        return not wait

    def throttle(self, pool: Pool) -> str:
        """The limit (metrics.THROTTLES) that mail waits for in a pool which was pumped just now; "": for none, only for what is
        under way."""
        if pool.limited != "window":
            return pool.limited
        now = self._now()
        own = now < pool.yielded_at + YIELD_SECONDS or pool.most_connections(now) >= int(pool.shape.connections.value)
        return "connections" if own else "learned"

    def yields(self, pool: Pool, session: Session) -> bool:
        """Whether this connection is yielded to another worker, which waits with mail of a higher class, or of the same class and
        of a tenant that has none here, or this worker's turn is over. It is then left free for YIELD_SECONDS."""
        if self._rates.workers == 1:
            return False  # there is no other
        pool.served += 1
        if len(pool.sessions) < pool.shape.connections.value and pool.served < TURN:
            return False
        rank, theirs = self._others(pool)
        if rank:
            own = pool.ready.highest()
            if rank > own or (rank == own and self._turn_is_over(pool, theirs)):
                pool.served = 0
                pool.yielded_at = self._now()
                session.leaving = True
        elif pool.served >= TURN:
            pool.served = 0
        return session.leaving

    def _turn_is_over(self, pool: Pool, theirs: int) -> bool:
        """Whether mail of the same class and of tenants with these marks goes before this worker's."""
        ours, now = _marks(pool), self._now()
        if theirs & ~ours and now > pool.foreign_until:
            pool.foreign_until = now + FOREIGN_SECONDS
            return True
        return pool.served >= (LONG_TURN if ours & ~theirs else TURN)


def _marks(pool: Pool) -> int:
    """The tenants that have mail of the highest class, as bits; two tenants may share a bit."""
    marks = 0
    for name in pool.ready.tenants()[:TENANTS]:
        marks |= _mark(name)
    return marks


def _mark(tenant: str) -> int:
    return 1 << xxhash.xxh32_intdigest(tenant.encode()) % TENANT_BITS
