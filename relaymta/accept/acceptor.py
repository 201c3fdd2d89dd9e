"""All listening sockets and connections of one worker: admission, and deadlines.

Ownership of the counts: `enter` takes a connection's two units (the machine's and its client's) and `leave` gives them back; only
connection.py calls them, and its `counted` tells whether it holds them. `connections` has the same members. `arriving` has the
connections before SMTP, until they are evicted or their task ends. `files` is changed by `take_file` and `give_file`, which
connection.py calls for its `large`. `paused` is changed by `_pause`, and by `_resume`, which runs once at a time.
"""

import asyncio
import resource
import socket
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Executor

from relaymta.accept.connection import DRAIN_REPLY, STRESS_PATIENCE, Connection
from relaymta.accept.endpoint import Endpoint
from relaymta.accept.intake import Client, Intake
from relaymta.accept.listening import SCARCE, Guarded, Listening
from relaymta.accept.turns import Turns
from relaymta.config import Config, Listener
from relaymta.proto import reply
from relaymta.shm import Limits

__all__ = ["Acceptor"]

DESCRIPTORS_KEPT = 1024  # for the spool and for delivery: clients cannot use these
ARRIVING_SHARE = 2  # one in so many connections or descriptors may be before SMTP (PROXY header, TLS handshake),
ARRIVING = 400  # and at most this many: a stalled handshake holds 0.1 MB
ARRIVAL_SECONDS = 35.0  # seconds from accept to SMTP: PROXY header (5) and handshake (30)
CHECK_EVERY = 2.0  # seconds between two checks of all deadlines
STRESS_SHARE = 80  # per cent of the connections or descriptors above which timeouts are shortened (stress)
BEAT, BEATS, LATE_BEATS = 0.05, 100, 3  # seconds between lag measurements; how many are kept; late ones that shed load


class Acceptor:
    """All listening sockets and connections of one worker."""

    def __init__(self, config: Config, intake: Intake, endpoint: Endpoint, limits: Limits, threads: Executor) -> None:
        self.config = config
        self.endpoint = endpoint
        self._tasks: set[asyncio.Task[None]] = set()
        self.intake = intake
        self.limits = limits
        self.threads = threads
        self.loop = asyncio.get_running_loop()
        self.turns = Turns(self.loop)
        self.now = self.loop.time
        self.time = self.now()
        self.connections: set[Connection] = set()
        self.files = 0  # open files of large messages: each takes a descriptor, as a socket does
        self.arriving: dict[Connection, asyncio.Task[None]] = {}  # before SMTP (PROXY header, TLS), oldest first
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = descriptors - min(DESCRIPTORS_KEPT, descriptors // 2)
        self._sockets: list[Listening] = []
        self._resuming: asyncio.Task[None] | None = None
        self.paused = False  # out of descriptors: new connections wait in the backlog
        self.stressed = False
        self._timer: asyncio.TimerHandle | None = None
        self.shedding = False  # the loop is late too often: new clients get 421
        self._late: deque[bool] = deque(maxlen=BEATS)
        self._beat_at = self.time
        self._beat_timer = self.loop.call_later(BEAT, self._beat)
        self._check()

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run a coroutine of a connection as a task."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listen(self, bound: socket.socket, listener: Listener) -> Listening:
        """Accept on a bound socket, which the acceptor owns from now on."""

        def make() -> Connection:
            return Connection(self, listener)

        guarded = listener.tls == "implicit" or listener.proxy
        listening = Guarded(self.loop, bound, make, self._arrived, self._pause) if guarded else Listening(self.loop, bound, make)
        self._sockets.append(listening)
        try:
            if not self.paused:
                await listening.resume()
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self._pause()
        return listening

    def _arrived(self, connection: Connection, sock: socket.socket, peer: str) -> None:
        """A client has connected to a socket where something comes before SMTP. It is counted now; the end of its task releases
        what no session has taken over."""
        if not connection.arrive(sock, peer):
            sock.close()
            return
        share = min(self._most, self.config.limits.connections // self.limits.workers) // ARRIVING_SHARE
        if len(self.arriving) >= max(1, min(share, ARRIVING)):  # the oldest is the least likely to complete
            self._evict(next(iter(self.arriving)))
        task = self.arriving[connection] = self.loop.create_task(connection.begin(sock, peer))

        def over(task: asyncio.Task[None]) -> None:
            self.arriving.pop(connection, None)
            connection.begun(sock)

        task.add_done_callback(over)

    def _evict(self, connection: Connection) -> None:
        """End a connection before SMTP, and release its place at once."""
        if self.arriving.pop(connection).cancel() and connection.session is None:
            connection.release()

    def close(self, listening: Listening) -> None:
        """Stop listening on a socket."""
        self._sockets.remove(listening)
        listening.close()

    def enter(self, client: Client, is_client: bool = True) -> bytes | None:
        """Count a connection; the reply that rejects it (instead of the banner), or None. `is_client`: false for a load balancer
        whose PROXY header is still to come, to which no client's connection rate applies."""
        if self.intake.draining:
            return DRAIN_REPLY
        if self.shedding:
            return reply.OVERLOADED
        if self._descriptors_used() + 1 >= self._most:
            self._pause()
        if not self.limits.take("connections", self.config.limits.connections):
            return reply.TOO_MANY_CONNECTIONS
        if not self.limits.take("client " + client.group, client.connections):
            self.limits.give("connections")
            return reply.TOO_MANY_FROM_CLIENT
        if client.connection_rate and is_client:
            refused = self.intake.quotas.client(client.group, "connection_rate", client.connection_rate)
            if refused is not None:
                self.leave(client)
                return refused
        return None

    def leave(self, client: Client) -> None:
        """Give back the units of a counted connection."""
        self.limits.give("connections")
        self.limits.give("client " + client.group)
        self._try_resume()

    def take_file(self) -> bool:
        """Take a descriptor for the file of a large message. False when none is left for it."""
        room = self._descriptors_used() < self._most
        self.files += room
        return room

    def give_file(self) -> None:
        """The file of a large message was passed to the queue or discarded."""
        self.files -= 1
        self._try_resume()

    def _descriptors_used(self) -> int:
        """The descriptors in use for clients."""
        return len(self.connections) + self.files

    def _pause(self) -> None:
        """Stop accepting: the descriptors that are left are reserved for the spool and for delivery."""
        self.paused = True
        for listening in self._sockets:
            listening.pause()

    def _try_resume(self) -> None:
        """Accept again if that is paused and descriptors are free. May be called at any time; does nothing while a resume is
        under way."""
        room = self._descriptors_used() < self._most - self._most // 20
        if self.paused and room and self._resuming is None and not self.intake.draining:
            self._resuming = self.loop.create_task(self._resume())

    async def _resume(self) -> None:
        try:
            self.paused = False
            for listening in list(self._sockets):
                if self.paused:  # paused again meanwhile, which has paused the sockets resumed here
                    return
                await listening.resume()
        except OSError:  # still out of descriptors: `_check` tries again
            self._pause()
        finally:
            self._resuming = None

    def _check(self) -> None:
        self.time = now = self.now()
        most = self.config.limits.connections
        taken = self.limits.taken("connections")
        self.stressed = taken * 100 >= most * STRESS_SHARE or self._descriptors_used() * 100 >= self._most * STRESS_SHARE
        for connection in list(self.connections):
            connection.check(now)
        patience = ARRIVAL_SECONDS * (STRESS_PATIENCE if self.stressed else 1)
        for connection in [one for one in self.arriving if now - one.arrived > patience]:
            self._evict(connection)
        self._try_resume()  # descriptors may have been freed elsewhere than in a connection
        self.endpoint.refresh(self.loop, self.threads)
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)

    def _beat(self) -> None:
        """Measure the event loop's lag, and decide on load shedding."""
        now, most = self.now(), self.config.intake.shed_lag
        self._late.append(bool(most) and now - self._beat_at - BEAT > most)
        self.shedding = sum(self._late) >= LATE_BEATS
        self._beat_at = now
        self._beat_timer = self.loop.call_later(BEAT, self._beat)

    def stop_listening(self) -> None:
        """Begin to drain: accept no new connections, end those before SMTP, and drain the others."""
        self.intake.draining = True
        for listening in self._sockets:
            listening.close()
        for connection in list(self.arriving):
            self._evict(connection)
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
