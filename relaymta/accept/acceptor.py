"""All listening sockets of one worker, what comes before SMTP on them, and the deadlines of all connections.

`arriving` has the connections before SMTP, until they are evicted or their task ends. `paused` is changed by `scarce` and by
`freed`.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any

from relaymta.accept.admission import Admission
from relaymta.accept.arrival import Arrival
from relaymta.accept.client import ENGAGED, STRESS_PATIENCE, ClientConnection
from relaymta.accept.connection import Connection
from relaymta.accept.endpoint import Endpoint
from relaymta.accept.intake import Intake
from relaymta.accept.lateness import BEAT
from relaymta.accept.listening import Listening
from relaymta.accept.user import UserConnection
from relaymta.config import Config, Listener
from relaymta.shm import Limits

__all__ = ["Acceptor", "Make"]

ARRIVING_SHARE = 2  # one in so many connections or descriptors may be before SMTP (PROXY header, TLS handshake),
ARRIVING = 400  # and at most this many: a stalled handshake holds 0.1 MB
ARRIVAL_SECONDS = 35.0  # seconds from accept to SMTP: PROXY header (5) and handshake (30)
CHECK_EVERY = 2.0  # seconds between two checks of all deadlines
STRESS_SHARE = 80  # per cent of the connections or descriptors above which timeouts are shortened (stress)

Make = Callable[[Admission, Listener], ClientConnection[Any]]


class Acceptor(Admission):
    """All listening sockets and connections of one worker."""

    def __init__(
        self,
        config: Config,
        intake: Intake,
        endpoint: Endpoint,
        limits: Limits,
        threads: Executor | None,
        others: Mapping[str, Make] | None = None,
    ) -> None:
        """`others`: how connections of other protocols than SMTP and LMTP are made."""
        self._others = others or {}
        super().__init__(config, intake, endpoint, limits, threads, asyncio.get_running_loop())
        self.arriving: dict[Arrival, asyncio.Task[None]] = {}  # before SMTP (PROXY header, TLS), oldest first
        self._sockets: list[Listening] = []
        self.paused = False  # out of descriptors: new connections wait in the backlog
        self._timer: asyncio.TimerHandle | None = None
        self._beat_timer = self.loop.call_later(BEAT, self._beat)
        self._check()

    def listen(self, bound: socket.socket, listener: Listener) -> Listening:
        """Accept on a bound socket, which the acceptor owns from now on."""
        guarded = listener.tls == "implicit" or listener.proxy
        arrived = partial(self._arrived, listener) if guarded else partial(self._begun, self._maker(listener))
        listening = Listening(self.loop, bound, arrived, self.scarce)
        self._sockets.append(listening)
        if not self.paused:
            listening.resume()
        return listening

    def _maker(self, listener: Listener) -> Callable[[], ClientConnection[Any]]:
        """Makes the connections of a listener."""
        made = UserConnection if listener.is_local else self._others.get(listener.protocol, Connection)
        return partial(made, self, listener)

    def _begun(self, make: Callable[[], ClientConnection[Any]], sock: socket.socket, peer: str) -> None:
        """A client has connected to a socket where SMTP begins at once."""
        if sock.fileno() >= self.last:
            self.scarce()
        self.spawn(self._connected(make, sock))

    async def _connected(self, make: Callable[[], ClientConnection[Any]], sock: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(make, sock)
        except OSError:  # it has disconnected
            sock.close()

    def _arrived(self, listener: Listener, sock: socket.socket, peer: str) -> None:
        """A client has connected to a socket where something comes before SMTP. It is counted now; the end of its task releases
        what no session has taken over."""
        if sock.fileno() >= self.last:
            self.scarce()
        arrival = Arrival(self._maker(listener)(), sock, peer)
        if not arrival.admit():
            sock.close()
            return
        share = min(self.most, self.config.limits.connections // self.limits.workers) // ARRIVING_SHARE
        if len(self.arriving) >= max(1, min(share, ARRIVING)):  # the oldest is the least likely to complete
            self._evict(next(iter(self.arriving)))
        task = self.arriving[arrival] = self.loop.create_task(arrival.run())

        def over(task: asyncio.Task[None]) -> None:
            self.arriving.pop(arrival, None)
            arrival.over()

        task.add_done_callback(over)

    def _evict(self, arrival: Arrival) -> None:
        """End a connection before SMTP, and release its place at once."""
        if self.arriving.pop(arrival).cancel():
            arrival.release()

    def close(self, listening: Listening) -> None:
        """Stop listening on a socket."""
        self._sockets.remove(listening)
        listening.close()

    def scarce(self) -> None:
        """Stop accepting: the descriptors that are left are reserved for the spool and for delivery."""
        self.paused = True
        for listening in self._sockets:
            listening.pause()

    def freed(self) -> None:
        """Accept again if that is paused and descriptors are free. May be called at any time."""
        if not self.paused or self.intake.draining or self.descriptors_used() >= self.most - self.most // 20:
            return
        if self.some_left():
            self.paused = False
            for listening in self._sockets:
                listening.resume()

    def _count_descriptors(self) -> None:
        """Pause when others have used up the descriptors, or the limit was lowered; accept again when some are free."""
        self.read_limit()
        if self.paused:
            self.freed()
        elif self.descriptors_used() >= self.most or not self.some_left():
            self.scarce()

    def _check(self) -> None:
        self.time = now = self.now()
        most = self.config.limits.connections
        taken = self.limits.taken("connections")
        self.stressed = taken * 100 >= most * STRESS_SHARE or self.descriptors_used() * 100 >= self.most * STRESS_SHARE
        for connection in list(self.connections):
            connection.check(now)
        patience = ARRIVAL_SECONDS * (STRESS_PATIENCE if self.stressed else 1)
        for arrival in [one for one in self.arriving if now - one.since > patience]:
            self._evict(arrival)
        self._count_descriptors()
        self.endpoint.refresh(self.loop, self.threads)
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)

    def _beat(self) -> None:
        """Measure the event loop's lag, and decide on load shedding."""
        self.lateness.beat(self.config.intake.shed_lag)
        self._beat_timer = self.loop.call_later(BEAT, self._beat)

    def stop_accepting(self) -> None:
        """Accept no new connections, for good."""
        for listening in self._sockets:
            listening.close()

    async def disengaged(self, seconds: float) -> None:
        """Wait until no client is in the middle of something, `seconds` at most."""
        begun = self.now()
        while self.connections or self.arriving:
            self.time = now = self.now()  # what arrives from now on is dated by it
            if now - begun > seconds or (now - begun > ENGAGED and not any(one.engaged(now) for one in self.connections)):
                return
            await asyncio.sleep(0.01)

    def stop_listening(self) -> None:
        """Begin to drain: accept no new connections, end those before SMTP, and drain the others."""
        self.intake.draining = True
        self.stop_accepting()
        for arrival in list(self.arriving):
            self._evict(arrival)
        for connection in list(self.connections):
            connection.drain()

    async def drained(self, seconds: float) -> None:
        """Wait until every connection has ended, `seconds` at most; then abort the rest."""
        until = self.now() + seconds
        while self.connections and self.now() < until:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
        self._beat_timer.cancel()
        if self._timer is not None:
            self._timer.cancel()
