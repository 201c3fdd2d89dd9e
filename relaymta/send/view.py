"""What delivery reports about itself: frozen copies of its state at one moment, made by `Dispatcher.view` and `seen`."""

from dataclasses import dataclass

from relaymta.node import SiteState
from relaymta.queue import Entry
from relaymta.route.shaping import Limit
from relaymta.route.sites import Site
from relaymta.route.table import RouteTable
from relaymta.send.pool import Pool
from relaymta.send.session import MESSAGE_DATA, Session

__all__ = ["Connection", "SiteView", "View", "position", "seen"]

EXACT = 1000  # positions in a ready list are exact up to this one


@dataclass(frozen=True, slots=True)
class Connection:
    """A session: its peer, the phase of the reply that is awaited ("nothing" when idle), and the messages it has carried."""

    peer: str
    awaits: str
    messages: int


@dataclass(frozen=True, slots=True)
class SiteView:
    """A pool. `reason`, `cause`: of its outage, for people and for programs; `until`: of the outage, seconds since the epoch, 0
    when it is up; `waiting`: messages in its ready list; `paced`: a rate holds them back, rather than the number of
    connections."""

    pool: str
    site: str
    hosts: list[str]
    source: str
    reason: str
    cause: str
    down: bool
    until: float
    waiting: int
    in_flight: int
    opening: int
    window: float
    rate: float
    paced: bool
    limits: dict[str, Limit]
    hosts_down: dict[str, str]
    sessions: tuple[Connection, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What delivery knows about a queue, and about one of its messages. Moments are seconds since the epoch, 0: none.

    `site`: as last known; `pools`: the site's; `suspended`: the state that suspends it, until `suspended_until`;
    `asks`: its domain is being looked up; `probed_later`: the message was in flight when a worker died, and waits to be probed;
    `lookups_failed`: in a row, and until `lookup_at` the domain is not looked up;
    `policy`: the hold policy that matches the message, until `policy_until`; `delivering`: the session that has the message;
    `position`: messages before it in the ready list, -1 when it is not there; `routes`: for tracing which route was chosen."""

    site: Site | None
    pools: tuple[SiteView, ...]
    suspended: SiteState | None
    suspended_until: float
    asks: bool
    probed_later: bool
    lookups_failed: int
    lookup_at: float
    policy: SiteState | None
    policy_until: float
    delivering: Connection | None
    position: int
    routes: RouteTable


def seen(pool: Pool, now: float, until: float, hosts_down: dict[str, str]) -> SiteView:
    """A pool as of now (loop time). `until`: the end of its outage."""
    return SiteView(
        pool.key,
        pool.shape.key,
        pool.site.names,
        pool.source.name if pool.source is not None else "",
        pool.reason,
        pool.cause,
        bool(pool.failures),
        until,
        len(pool.ready),
        sum(len(session.core.under_way()) for session in pool.sessions),
        pool.connecting,
        pool.window,
        pool.rate(now),
        bool(pool.idle or pool.pumping_at > now),
        dict(pool.binding(now)),
        hosts_down,
        tuple(_connection(session) for session in pool.sessions),
    )


def _connection(session: Session) -> Connection:
    core = session.core
    return Connection(session.peer, core.awaiting or (MESSAGE_DATA if core.streaming else "nothing"), core.messages)


def position(pools: list[Pool], entry: Entry) -> tuple[Connection | None, int]:
    """(The session that has an entry, its position in the ready list) in the pools of its site, as `View` has them."""
    for pool in pools:
        for session in pool.sessions:
            if any(mail.cargo is entry for mail in session.core.under_way()):
                return _connection(session), -1
        place = pool.ready.position(entry, EXACT)
        if place >= 0:
            return None, place
    return None, -1
