"""All listening sockets and connections of one worker: who may come in, and for how long they may be silent."""

import asyncio
import resource
import socket
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Executor

from relaymta.accept.connection import DRAIN_REPLY, Connection
from relaymta.accept.door import Door
from relaymta.accept.intake import Client, Intake
from relaymta.accept.listening import Guarded, Listening
from relaymta.accept.turns import Turns
from relaymta.config import Config, Listener
from relaymta.proto import reply
from relaymta.shm import Limits

__all__ = ["Acceptor"]

DESCRIPTORS_KEPT = 1024  # for the spool and for delivery: clients never take the last ones
CHECK_EVERY = 2.0  # seconds between two looks at all deadlines
STRESS_SHARE = 80  # per cent of the connections or descriptors from which on there is stress
BEAT, BEATS, LATE_BEATS = 0.05, 100, 3  # seconds between two looks at the loop's lag; those that count; too many


class Acceptor:
    """All listening sockets and connections of one worker."""

    def __init__(self, config: Config, intake: Intake, door: Door, limits: Limits, threads: Executor) -> None:
        self.config = config
        self.door = door
        self._tasks: set[asyncio.Task[None]] = set()
        self.intake = intake
        self.limits = limits
        self.threads = threads
        self.loop = asyncio.get_running_loop()
        self.turns = Turns(self.loop)
        self.now = self.loop.time
        self.time = self.now()
        self.connections: set[Connection] = set()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = descriptors - min(DESCRIPTORS_KEPT, descriptors // 2)
        self._doors: list[Listening] = []
        self._resuming: asyncio.Task[None] | None = None
        self.paused = False  # out of descriptors: connections wait until others have ended
        self.stressed = False
        self._timer: asyncio.TimerHandle | None = None
        self.shedding = False  # the loop is late too often: who is here already goes first
        self._late: deque[bool] = deque(maxlen=BEATS)
        self._beat_at = self.time
        self._beat_timer = self.loop.call_later(BEAT, self._beat)
        self._check()

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run a connection's part that waits for something."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listen(self, listening: socket.socket, listener: Listener) -> Listening:
        """Accept on a bound socket, which is ours from now on."""

        def make() -> Connection:
            return Connection(self, listener)

        guarded = listener.tls == "implicit" or listener.proxy
        door = Guarded(self.loop, listening, make, self._begin) if guarded else Listening(self.loop, listening, make)
        if not self.paused:
            await door.resume()
        self._doors.append(door)
        return door

    def _begin(self, connection: Connection, sock: socket.socket, peer: str) -> None:
        self.spawn(connection.begin(sock, peer))

    def close(self, door: Listening) -> None:
        """Accept there no more."""
        self._doors.remove(door)
        door.close()

    def enter(self, client: Client) -> bytes | None:
        """Count a connection; the banner that refuses it, or None."""
        if self.intake.draining:
            return DRAIN_REPLY
        if self.shedding:
            return reply.OVERLOADED
        if len(self.connections) + 1 >= self._most:
            self._pause()
        if not self.limits.take("connections", self.config.limits.connections):
            return reply.TOO_MANY_CONNECTIONS
        if not self.limits.take("client " + client.group, client.connections):
            self.limits.give("connections")
            return reply.TOO_MANY_FROM_CLIENT
        if client.connection_rate:
            refused = self.intake.quotas.client(client.group, "connection_rate", client.connection_rate)
            if refused is not None:
                self.leave(client)
                return refused
        return None

    def leave(self, client: Client) -> None:
        """A counted connection ended."""
        self.limits.give("connections")
        self.limits.give("client " + client.group)
        if self.paused and len(self.connections) <= self._most - self._most // 20 - 1 and self._resuming is None:
            self._resuming = self.loop.create_task(self._resume())

    def _pause(self) -> None:
        """The descriptors that are left are for the spool and for delivery."""
        self.paused = True
        for door in self._doors:
            door.pause()

    async def _resume(self) -> None:
        self.paused = False
        self._resuming = None
        for door in self._doors:
            if not self.paused:
                await door.resume()

    def _check(self) -> None:
        self.time = now = self.now()
        most = self.config.limits.connections
        taken = self.limits.taken("connections")
        self.stressed = taken * 100 >= most * STRESS_SHARE or len(self.connections) * 100 >= self._most * STRESS_SHARE
        for connection in list(self.connections):
            connection.check(now)
        self.door.refresh(self.loop, self.threads)
        self._timer = self.loop.call_later(CHECK_EVERY, self._check)

    def _beat(self) -> None:
        """How late the loop comes to what it has to do at a moment."""
        now, most = self.now(), self.config.intake.shed_lag
        self._late.append(bool(most) and now - self._beat_at - BEAT > most)
        self.shedding = sum(self._late) >= LATE_BEATS
        self._beat_at = now
        self._beat_timer = self.loop.call_later(BEAT, self._beat)

    def stop_listening(self) -> None:
        """Take no new connections."""
        self.intake.draining = True
        for door in self._doors:
            door.close()
        for connection in list(self.connections):
            connection.drain()

    async def drained(self, seconds: float) -> None:
        """Wait until every connection has ended, `seconds` at most; then cut the rest."""
        until = self.now() + seconds
        while self.connections and self.now() < until:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
        self._beat_timer.cancel()
        if self._timer is not None:
            self._timer.cancel()
