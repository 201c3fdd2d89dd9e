"""The sessions of all pools: one is opened, is in a pool, and leaves it. `Sessions` alone counts them."""

import asyncio
from collections.abc import Iterator

from relaymta.errors import US
from relaymta.metrics import Counters, index
from relaymta.route.mx import NoRoute
from relaymta.send.connect import ConnectFailed
from relaymta.send.decisions import Decisions
from relaymta.send.opener import Opener
from relaymta.send.parking import Parking
from relaymta.send.pool import Pool
from relaymta.send.room import Room
from relaymta.send.session import Session
from relaymta.send.tasks import Tasks

__all__ = ["Sessions"]

CLOSING_SECONDS = 2.0  # for the peer to close TLS after QUIT
OPENED = index("relaymta_sessions_total", "opened")


class Sessions:
    """Owns which session is in which pool (`_pool_of`, and of every pool `sessions` and `connecting`).

    Invariant: each connection that is open or being opened has one unit of `room`. Whoever opens one takes the unit first;
    `connect` gives it back when it fails, `release` when the session has ended. `pools`: those that new mail uses."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pools: dict[str, Pool],
        room: Room,
        opener: Opener,
        decisions: Decisions,
        parking: Parking,
        tasks: Tasks,
        counters: Counters,
    ) -> None:
        self._loop = loop
        self._pools = pools
        self._room = room
        self._opener = opener
        self._decisions = decisions
        self._parking = parking
        self._tasks = tasks
        self._counters = counters
        self._pool_of: dict[Session, Pool] = {}
        self.pool_of = self._pool_of.get  # the pool of a session; None when it has left it

    def __len__(self) -> int:
        return len(self._pool_of)

    def __iter__(self) -> Iterator[tuple[Session, Pool]]:
        """(Session, its pool), of those in a pool now."""
        return iter(list(self._pool_of.items()))

    def in_flight(self) -> int:
        """Messages in flight."""
        return sum(len(session.core.under_way()) for session in self._pool_of)

    def begin(self, pool: Pool) -> None:
        """Count a connection that is about to be opened by `connect`; its unit of `room` has been taken."""
        if not pool.connecting:
            pool.opening_since = self._loop.time()
        pool.connecting += 1

    async def connect(self, pool: Pool, timeout: float = 0.0) -> Session:
        """Open a connection for which `begin` was called. Raises ConnectFailed or NoRoute. `timeout`: as for `Opener.open`."""
        session = None
        try:
            session = await self._opener.open(pool.site, pool.source, timeout)
            return session
        finally:
            pool.connecting -= 1
            if session is None:
                self._room.give(pool)

    def failure(self, error: Exception) -> ConnectFailed | NoRoute:
        """Why a connection could not be opened, from an exception."""
        if isinstance(error, ConnectFailed | NoRoute):
            return error
        return ConnectFailed("connect", *self._tasks.unexpected(error), fault=US)

    def adopt(self, pool: Pool, session: Session) -> bool:
        """Add a new connection to the pool, which shows that its site is up; whether it is still open."""
        if session.ended:
            self._room.give(pool)
            return False
        if pool.failures:
            self._decisions.alive(pool)
        pool.up(self._loop.time())
        self._parking.wake_pool(pool)
        pool.served = 0
        self._room.arrived(pool)
        self._counters.add(OPENED, 1)
        session.leaving = self._pools.get(pool.key) is not pool  # replaced by a reload
        pool.sessions.add(session)
        self._pool_of[session] = pool
        return True

    def release(self, session: Session) -> Pool | None:
        """Take a session that has ended out of its pool, and return the pool; None when it has left it before."""
        pool = self._pool_of.pop(session, None)
        if pool is not None:
            pool.sessions.discard(session)
            if session in pool.idle:
                pool.idle.remove(session)
            self._room.give(pool)
            self._counters.observe("relaymta_messages_per_session", session.core.messages)
        return pool

    def retire(self, session: Session) -> None:
        """Close an idle session. A peer that leaves TLS open is not waited for (uvloop would for 30 s): its connection does not
        count any more, and must not stay."""
        session.quit()
        if session.secure:
            self._loop.call_later(CLOSING_SECONDS, session.cut)
        self.release(session)
