"""Background probes of sites that are down, or that do not answer attempts to connect."""

from collections.abc import Callable

from relaymta.route.mx import NoRoute
from relaymta.send.connect import ConnectFailed
from relaymta.send.decisions import Decisions
from relaymta.send.pool import Pool
from relaymta.send.room import Room
from relaymta.send.sessions import Sessions
from relaymta.send.tasks import Tasks

__all__ = ["Probes", "worth_probing"]

AT_A_TIME = 50  # probes


class Probes:
    """Owns the number of probes under way, and of every pool `probing` and, between probes, `probe_at`."""

    def __init__(
        self,
        pools: dict[str, Pool],
        sessions: Sessions,
        decisions: Decisions,
        room: Room,
        tasks: Tasks,
        pump: Callable[[Pool], None],
        now: Callable[[], float],
    ) -> None:
        """`pump(pool)`: gives its ready entries to sessions; `now()`: loop time."""
        self._pools = pools
        self._sessions = sessions
        self._pump = pump
        self._decisions = decisions
        self._room = room
        self._tasks = tasks
        self._now = now
        self._under_way = 0

    def tick(self, now: float, clock: int) -> None:
        """Start the probes that are due: of sites that are down and have sleeping mail, or do not answer attempts to connect."""
        due = [
            pool for pool in self._pools.values()
            if (pool.connecting or pool.failures) and not pool.probing and pool.probe_at <= now
            and (pool.is_silent(now) if pool.connecting else pool.sleeping and pool.down_until > clock)
        ]  # fmt: skip
        for pool in sorted(due, key=lambda pool: pool.probe_at):
            if self._under_way >= AT_A_TIME:
                break
            if self._decisions.states.suspension(pool.shape.key, "") is not None:
                continue
            # Beyond the window: it may be full of attempts that are stalled.
            if self._room.may_probe(pool, pool.probe_pause(now)) and self._room.take(pool, beyond=1):
                self._under_way += 1
                pool.probing = True
                self._sessions.begin(pool)
                self._tasks.spawn(self._probe(pool))

    async def _probe(self, pool: Pool) -> None:
        """Probe a site that is down. The probe is a connection like any other (TLS, AUTH), so that it fails for the same reasons
        as delivery; but no message is charged for it."""
        try:
            session = await self._sessions.connect(pool, pool.probe_timeout)
        except Exception as error:
            pool.probe_at = self._now() + pool.probe_pause(self._now())
            if not worth_probing(self._sessions.failure(error)):
                pool.probe_at = float("inf")
            self._pump(pool)  # it may be due meanwhile
        else:
            if self._sessions.adopt(pool, session):
                session.take_more()
        finally:
            pool.probing = False
            self._under_way -= 1


def worth_probing(error: ConnectFailed | NoRoute) -> bool:
    """Whether a site that failed is worth probing. One that rejects connections or the login permanently (5xx) is up: probing it
    again and again does not help, and locks accounts."""
    said = error.said if isinstance(error, ConnectFailed) else None
    return said is None or not (said.code >= 500 or said.phase == "auth")
