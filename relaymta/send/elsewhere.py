"""Messages that the peer at hand cannot accept (no SMTPUTF8, no 8BITMIME, SIZE too small): the other hosts of its site."""

import asyncio
from collections.abc import Callable

from relaymta.errors import US
from relaymta.proto.envelope import PERMANENT, TRANSIENT
from relaymta.queue import Entry
from relaymta.route.mx import NoRoute
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.mails import mail_of, unfit
from relaymta.send.opener import Opener
from relaymta.send.outcomes import Outcomes
from relaymta.send.parking import Parking
from relaymta.send.pool import Pool
from relaymta.send.room import Room
from relaymta.send.session import Session
from relaymta.send.sessions import Sessions

__all__ = ["Elsewhere"]

ROOM_SECONDS = 30.0  # waited for a connection to another host of a site


class Elsewhere:
    """Has no state of its own: each delivery is one coroutine, which holds its entry in flight. `now()`: loop time."""

    def __init__(
        self,
        sessions: Sessions,
        opener: Opener,
        outcomes: Outcomes,
        parking: Parking,
        room: Room,
        now: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._opener = opener
        self._outcomes = outcomes
        self._parking = parking
        self._room = room
        self._now = now

    async def deliver(self, pool: Pool, entry: Entry, unfit_peer: str, refusal: tuple[str, str]) -> None:
        """Deliver an entry in flight that the peer `unfit_peer` cannot accept, to another host of its site. When none can accept
        it, the failure is permanent (`refusal`: as of `unfit`); when one could not be reached, it is temporary."""
        failure: ConnectFailed | NoRoute | None
        try:
            session, failure = await self._one_that_takes(pool, entry, unfit_peer)
        except Exception as error:
            session, failure = None, self._sessions.failure(error)
        except BaseException:
            self._parking.put_back(entry)
            raise
        if session is not None:
            session.send(mail_of(entry, pool.site.route.rewrite_sender))
        elif failure is None:
            self._outcomes.charge(entry, PERMANENT, "mail", unfit_peer, 0, *refusal)
        else:
            phase = failure.phase if isinstance(failure, ConnectFailed) else "route"
            self._outcomes.charge(entry, TRANSIENT, phase, "", 0, "4.4.1", failure)

    async def _one_that_takes(
        self, pool: Pool, entry: Entry, unfit_peer: str
    ) -> tuple[Session | None, ConnectFailed | NoRoute | None]:
        """A connection to a host of a site, other than `unfit_peer`, that can accept a message; None when there is none, and why
        one could not be reached."""
        failure: ConnectFailed | NoRoute | None = None
        tried = {unfit_peer}
        peers: list[Peer] = []
        try:
            peers = await self._opener.peers(pool.site)
        except NoRoute as error:  # temporary: the names resolved a moment ago
            failure = error
        for peer in peers:
            if peer.name in tried:
                continue
            tried.add(peer.name)
            try:
                session = await self._connect(pool, peer)
            except ConnectFailed as error:
                failure = error
                continue
            except NoRoute:  # this host itself: others of the list may take the mail
                continue
            if not self._sessions.adopt(pool, session):
                failure = ConnectFailed("ehlo", f"{peer.name}: the peer closed the connection")
            elif unfit(entry, session.core.features) is None:
                return session, None
            else:
                session.take_more()
        return None, failure

    async def _connect(self, pool: Pool, peer: Peer) -> Session:
        """A connection to one host of a site, as soon as the limits allow it. ConnectFailed when it fails, or the limits do not
        allow it within ROOM_SECONDS."""
        until = self._now() + ROOM_SECONDS
        while not self._room.take(pool):
            if self._now() > until:
                raise ConnectFailed("connect", f"{peer.name}: no free connection to this site", fault=US)
            await asyncio.sleep(0.1)
        try:
            return await self._opener.to(pool.site, peer, pool.source)
        except BaseException:
            self._room.give(pool)
            raise
