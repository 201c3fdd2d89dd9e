"""All listening sockets and connections of one worker: who may come in, and for how long they may be silent.

Who changes a count: `enter` takes a connection's two units (the machine's, its client's) and `leave` gives them back, both for
connection.py alone, which knows by `counted` whether it holds them. `connections` goes with that. Into `arriving` comes who has
arrived, and out goes who is turned out or whose task has ended. `files` is changed by `take_file` and `give_file`, for
connection.py, too, whose `large` each stands for. `paused` is changed by `_pause`, and by `_resume`, which runs
once at a time.
"""

import asyncio
import resource
import socket
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Executor

from relaymta.accept.connection import DRAIN_REPLY, STRESS_PATIENCE, Connection
from relaymta.accept.door import Door
from relaymta.accept.intake import Client, Intake
from relaymta.accept.listening import SCARCE, Guarded, Listening
from relaymta.accept.turns import Turns
from relaymta.config import Config, Listener
from relaymta.proto import reply
from relaymta.shm import Limits

__all__ = ["Acceptor"]

DESCRIPTORS_KEPT = 1024  # for the spool and for delivery: clients never take the last ones
ARRIVING_SHARE = 2  # one connection of so many, or one descriptor, may be somebody's with whom SMTP has not begun,
ARRIVING = 400  # and so many in all: a handshake that stands still holds 0.1 MB
ARRIVAL_SECONDS = 35.0  # from accept to SMTP: for a PROXY header (5), and for the handshake (30)
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
        self.files = 0  # open for large texts of theirs: each is a descriptor as their sockets are
        self.arriving: dict[Connection, asyncio.Task[None]] = {}  # before SMTP: a PROXY header, or TLS; who came first is first
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
        door = (
            Guarded(self.loop, listening, make, self._arrived, self._pause) if guarded else Listening(self.loop, listening, make)
        )
        self._doors.append(door)
        try:
            if not self.paused:
                await door.resume()
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self._pause()
        return door

    def _arrived(self, connection: Connection, sock: socket.socket, peer: str) -> None:
        """A socket on which something comes before SMTP. It is counted now, and whatever becomes of its task, that it has ended
        gives back what is not a session's."""
        if not connection.arrive(sock, peer):
            sock.close()
            return
        share = min(self._most, self.config.limits.connections // self.limits.workers) // ARRIVING_SHARE
        if len(self.arriving) >= max(1, min(share, ARRIVING)):  # who waits longest is the likeliest to wait for nothing
            self._turn_out(next(iter(self.arriving)))
        task = self.arriving[connection] = self.loop.create_task(connection.begin(sock, peer))

        def over(task: asyncio.Task[None]) -> None:
            self.arriving.pop(connection, None)
            connection.begun(sock)

        task.add_done_callback(over)

    def _turn_out(self, connection: Connection) -> None:
        """End what comes before SMTP; its place is free at once."""
        if self.arriving.pop(connection).cancel() and connection.session is None:
            connection.give_back()

    def close(self, door: Listening) -> None:
        """Accept there no more."""
        self._doors.remove(door)
        door.close()

    def enter(self, client: Client, speaks: bool = True) -> bytes | None:
        """Count a connection; the banner that refuses it, or None. `speaks`: it is the client itself, not yet a load balancer who
        will say for whom it is, and whose rate is not one client's."""
        if self.intake.draining:
            return DRAIN_REPLY
        if self.shedding:
            return reply.OVERLOADED
        if self._held() + 1 >= self._most:
            self._pause()
        if not self.limits.take("connections", self.config.limits.connections):
            return reply.TOO_MANY_CONNECTIONS
        if not self.limits.take("client " + client.group, client.connections):
            self.limits.give("connections")
            return reply.TOO_MANY_FROM_CLIENT
        if client.connection_rate and speaks:
            refused = self.intake.quotas.client(client.group, "connection_rate", client.connection_rate)
            if refused is not None:
                self.leave(client)
                return refused
        return None

    def leave(self, client: Client) -> None:
        """A counted connection ended."""
        self.limits.give("connections")
        self.limits.give("client " + client.group)
        self._let_in()

    def take_file(self) -> bool:
        """Whether there is a descriptor for one more large text."""
        room = self._held() < self._most
        self.files += room
        return room

    def give_file(self) -> None:
        """A large text is the queue's, or nobody's."""
        self.files -= 1
        self._let_in()

    def _held(self) -> int:
        """The descriptors that clients hold."""
        return len(self.connections) + self.files

    def _pause(self) -> None:
        """The descriptors that are left are for the spool and for delivery."""
        self.paused = True
        for door in self._doors:
            door.pause()

    def _let_in(self) -> None:
        """Accept again, where that is paused and there is room. May be called at any time: it is under way once at most."""
        room = self._held() < self._most - self._most // 20
        if self.paused and room and self._resuming is None and not self.intake.draining:
            self._resuming = self.loop.create_task(self._resume())

    async def _resume(self) -> None:
        try:
            self.paused = False
            for door in list(self._doors):
                if self.paused:  # again: who has paused it has seen to the doors that were open
                    return
                await door.resume()
        except OSError:  # out of descriptors still: `_check` tries again
            self._pause()
        finally:
            self._resuming = None

    def _check(self) -> None:
        self.time = now = self.now()
        most = self.config.limits.connections
        taken = self.limits.taken("connections")
        self.stressed = taken * 100 >= most * STRESS_SHARE or self._held() * 100 >= self._most * STRESS_SHARE
        for connection in list(self.connections):
            connection.check(now)
        patience = ARRIVAL_SECONDS * (STRESS_PATIENCE if self.stressed else 1)
        for connection in [one for one in self.arriving if now - one.arrived > patience]:
            self._turn_out(connection)
        self._let_in()  # what was out of descriptors may have no connection of ours whose end would say so
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
        for connection in list(self.arriving):
            self._turn_out(connection)
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
