"""Messages that one host of a site does not take, and another may: it cannot accept them (no SMTPUTF8, no 8BITMIME, SIZE too
small), or it has refused them for now (4xx, 421, a connection that ended before the message was sent). RFC 5321 5.1: the other
hosts are tried in order, in the same attempt."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from relaymta.errors import US
from relaymta.log import Log
from relaymta.proto.envelope import PERMANENT, SUCCESS, TRANSIENT
from relaymta.queue import Entry, format_id
from relaymta.route.mx import NoRoute
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.mails import mail_of, unfit
from relaymta.send.opener import Opener
from relaymta.send.outcomes import Outcomes
from relaymta.send.parking import Parking
from relaymta.send.pool import Needy, Pool
from relaymta.send.room import Room
from relaymta.send.session import Session
from relaymta.send.sessions import Sessions
from relaymta.send.tasks import Tasks
from relaymta.send.trail import HOSTS, Trail

__all__ = ["Elsewhere"]

ROOM_SECONDS = 30.0  # waited for a connection to another host of a site
TAKEN_SECONDS = 10.0  # for all of it, where a host has taken the message for some recipients: that is not recorded meanwhile
RECHECK_SECONDS = 0.1  # between two checks whether another worker has released a connection
AVOID_SECONDS = 2.0  # a host that could not be reached is not tried for other messages so long
AVOIDED = 1000  # hosts remembered

Failed = ConnectFailed | NoRoute


class Elsewhere:
    """Each delivery is one coroutine, which holds its entry in flight, and what the attempt has come to (`Trail`). Owns which
    hosts could not be connected to a moment ago, and of every pool `needy`: the deliveries that wait for a connection, in order.
    While a pool has no connection to a host, one delivery at a time tries to open one: else all of them would take the site's
    connections from the hosts that take mail, for one that is silent.

    `stops(pool, entry)`: whether nothing new is begun for this entry (a stop, a suspension, a disk that refuses outcomes);
    `now()`: loop time."""

    def __init__(
        self,
        sessions: Sessions,
        opener: Opener,
        outcomes: Outcomes,
        parking: Parking,
        room: Room,
        tasks: Tasks,
        log: Log,
        stops: Callable[[Pool, Entry], bool],
        now: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._opener = opener
        self._outcomes = outcomes
        self._parking = parking
        self._room = room
        self._tasks = tasks
        self._log = log
        self._stops = stops
        self._now = now
        # By pool and place: until when a host is not tried, and why (arguments of ConnectFailed); and who opens a connection.
        self._avoided: dict[tuple[str, str], tuple[float, tuple[Any, ...]]] = {}
        self._opening: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        outcomes.go_on = self.go_on

    def go_on(self, pool: Pool, entry: Entry, trail: Trail) -> bool:
        """Ask another host of the site, if there is one, to take what is left of an entry in flight; False where that is not
        allowed, and the caller ends the attempt."""
        if trail.asked >= HOSTS or not trail.left(entry.recipients) or self._stops(pool, entry):
            return False
        self._tasks.spawn(self._deliver(pool, entry, trail))
        return True

    async def deliver(self, pool: Pool, entry: Entry, unfit_peer: str, refusal: tuple[str, str]) -> None:
        """Deliver an entry in flight that the peer `unfit_peer` cannot accept, to another host of its site. When none can accept
        it, the failure is permanent (`refusal`: as of `unfit`); when one could not be reached, it is temporary."""
        await self._deliver(pool, entry, Trail(tried={unfit_peer}), unfit_peer, refusal)

    async def _deliver(
        self, pool: Pool, entry: Entry, trail: Trail, unfit_peer: str = "", refusal: tuple[str, str] = ("", "")
    ) -> None:
        """Give an entry to a host that can accept it, or end its attempt with what it has come to."""
        failure: Failed | None
        taken = any(attempt.kind == SUCCESS for attempt in trail.results.values())
        try:
            async with asyncio.timeout(TAKEN_SECONDS if taken else None):
                session, failure = await self._one_that_takes(pool, entry, trail)
        except TimeoutError:
            session, failure = None, ConnectFailed("connect", "no other host could be connected to in time", fault=US)
        except Exception as error:
            session, failure = None, self._sessions.failure(error)
        except BaseException:
            if trail.results:  # what hosts have answered stays answered
                self._outcomes.end(entry, trail)
            else:
                self._parking.put_back(entry)
            raise
        if session is not None:
            self._tell(entry, trail)
            session.send(mail_of(entry, pool.site.route, trail))
        elif trail.results:
            if failure is not None:
                trail.note(str(failure))
            self._outcomes.end(entry, trail)
        elif failure is None:
            self._outcomes.charge(entry, PERMANENT, "mail", unfit_peer, 0, *refusal)
        else:
            phase = failure.phase if isinstance(failure, ConnectFailed) else "route"
            said = failure.said if isinstance(failure, ConnectFailed) else None
            code, enhanced = (said.code, said.enhanced) if said is not None else (0, "4" + failure.enhanced[1:])
            self._outcomes.charge(entry, TRANSIENT, phase, "", code, enhanced, failure)

    def _tell(self, entry: Entry, trail: Trail) -> None:
        """Log what the hosts asked before have said."""
        said: dict[tuple[str, str, str], list[str]] = {}
        for index, address in trail.left(entry.recipients):
            attempt = trail.results.get(index)
            if attempt is not None:
                said.setdefault((attempt.peer, attempt.phase, attempt.cause), []).append(address)
        for (peer, phase, reply), recipients in said.items():
            self._log.event(
                "next_host", id=format_id(entry.ident), recipients=recipients, route=entry.name.label, phase=phase, peer=peer,
                reply=reply, attempt=entry.attempts + 1,
                **({"traceparent": entry.envelope.traceparent} if entry.envelope.traceparent else {}),
            )  # fmt: skip

    # A connection to another host

    async def _one_that_takes(self, pool: Pool, entry: Entry, trail: Trail) -> tuple[Session | None, Failed | None]:
        """A session with a host that was not tried, and can accept a message; None when there is none, and why one could not be
        reached."""
        failure: Failed | None = None
        peers: list[Peer] = []
        try:
            peers = await self._opener.peers(pool.site)
        except NoRoute as error:  # temporary: the names resolved a moment ago
            failure = error
        for peer in peers:
            if peer.name in trail.tried or peer.place in trail.tried:
                continue
            if self._stops(pool, entry):
                return None, failure or ConnectFailed("connect", f"{peer.name}: not tried now", fault=US)
            trail.tried.add(peer.place)
            try:
                session = await self._session(pool, peer)
            except ConnectFailed as error:
                failure = error
            except NoRoute:  # this host itself
                if pool.site.hosts is not None:  # those that follow are not preferred to it (RFC 5321 5.1)
                    break
            else:
                if unfit(entry, session.core.features) is None:
                    return session, None
                session.take_more()
        return None, failure

    async def _session(self, pool: Pool, peer: Peer) -> Session:
        """A session with one host of a site that can take a message: an idle one, or a new one as soon as the limits allow it.
        ConnectFailed when it fails, or the limits do not allow it within ROOM_SECONDS."""
        if any(session.place == peer.place for session in pool.sessions):
            return await self._open(pool, peer)
        key = (pool.key, peer.place)
        turn = self._opening.get(key)
        if turn is None:
            turn = self._opening[key] = asyncio.Lock()
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await turn.acquire()
        except TimeoutError:
            raise _crowded(peer) from None
        try:
            return await self._open(pool, peer)
        finally:
            turn.release()

    async def _open(self, pool: Pool, peer: Peer) -> Session:
        self._check_avoided(pool, peer)
        session = self._idle(pool, peer.place) or await self._room_for(pool, peer)
        if session is not None:
            return session
        try:
            self._check_avoided(pool, peer)  # it may have failed while this has waited
            session = await self._opener.to(pool.site, peer, pool.source)
        except BaseException as error:
            self._room.give(pool)
            if isinstance(error, ConnectFailed) and error.phase == "connect" and not error.scarce:
                self._avoid((pool.key, peer.place), error)
            raise
        if not self._sessions.adopt(pool, session):
            raise ConnectFailed("ehlo", f"{peer.name}: the peer closed the connection")
        return session

    def _check_avoided(self, pool: Pool, peer: Peer) -> None:
        """ConnectFailed, a new one, where a host could not be connected to a moment ago."""
        until, why = self._avoided.get((pool.key, peer.place), (0.0, ()))
        if self._now() < until:
            raise ConnectFailed(*why)

    def _avoid(self, key: tuple[str, str], error: ConnectFailed) -> None:
        if len(self._avoided) >= AVOIDED:
            self._avoided.clear()
        why = ("connect", error.public, error.cause, error.said, error.fault, error.category)
        self._avoided[key] = self._now() + AVOID_SECONDS, why

    @staticmethod
    def _idle(pool: Pool, place: str = "") -> Session | None:
        """Take an idle session with a host ("": any) from a pool."""
        for session in pool.idle:
            if not session.ended and place in (session.place, ""):
                pool.idle.remove(session)
                session.waiting = False
                return session
        return None

    async def _room_for(self, pool: Pool, peer: Peer) -> Session | None:
        """Take a unit of `room` for a connection to a host; or (not None) a session with it, which became idle meanwhile."""
        needy = Needy(peer.place)
        until = self._now() + ROOM_SECONDS
        pool.needy.append(needy)
        try:
            while not (pool.needy[0] is needy and self._take_room(pool, needy)):
                if self._now() > until:
                    raise _crowded(peer)
                with suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_SECONDS):
                        await needy.wake.wait()
                needy.wake.clear()
                if needy.session is not None and not needy.session.ended:
                    session, needy.session = needy.session, None
                    return session
                needy.session = None
            return None
        finally:
            pool.needy.remove(needy)
            if needy.session is not None and not needy.session.ended:
                needy.session.take_more()
            if pool.needy:
                pool.needy[0].wake.set()

    def _take_room(self, pool: Pool, needy: Needy) -> bool:
        """Take a unit of `room`; one idle session is closed for it, where there is none."""
        if self._room.take(pool):
            return True
        idle = None if needy.freed else self._idle(pool)
        if idle is None:
            return False
        needy.freed = True
        self._sessions.retire(idle)
        return self._room.take(pool)

    def claims(self, pool: Pool, session: Session) -> bool:
        """Whether a delivery that waits for a connection has this session, which could take a message: it gets the session when
        that is idle, where it is with its host, or else its place. (Called where `pool.needy` is not empty.)"""
        first = pool.needy[0]
        its = next((needy for needy in pool.needy if needy.place == session.place and needy.session is None), None)
        if its is None and first.freed:
            return False  # its connection was closed for it before
        if session.core.idle:
            if its is not None:
                its.session = session
                its.wake.set()
            else:
                first.freed = True
                self._sessions.retire(session)
                first.wake.set()
        return True


def _crowded(peer: Peer) -> ConnectFailed:
    return ConnectFailed("connect", f"{peer.name}: no free connection to this site", fault=US)
