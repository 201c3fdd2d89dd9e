"""What the connections of one worker share: the rules, the threads, and the limits of what they may hold."""

import asyncio
import os
import resource
from collections.abc import Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Protocol

from relaymta.accept.endpoint import Endpoint
from relaymta.accept.filing import Filing
from relaymta.accept.intake import Intake
from relaymta.accept.lateness import Lateness
from relaymta.accept.origin import Client
from relaymta.accept.turns import Turns
from relaymta.config import Config
from relaymta.proto import reply
from relaymta.reservation import Reservation
from relaymta.shm import Limits
from relaymta.trace import Tracer

__all__ = ["DRAIN_REPLY", "Admission", "Admitted"]

DRAIN_REPLY = reply.SHUTTING_DOWN
DESCRIPTORS_KEPT = 1024  # for the spool and for delivery: clients cannot use these
LAST_SHARE = 8  # when delivery and others have used all of these but one in so many, clients wait


class Admitted(Protocol):
    """A connection that holds a place."""

    transport: asyncio.Transport | None

    def check(self, now: float) -> None:
        """Apply its deadlines."""

    def drain(self) -> None:
        """Begin to end it."""

    def engaged(self, now: float) -> bool:
        """Whether its client is in the middle of something, so that it goes on within a moment."""


class Admission:
    """Admits connections and the files of large messages, each for as long as its Reservation is held. `connections`: those that
    hold one (each adds itself before SMTP, and leaves at its end); `files`: descriptors of large messages, as a socket takes
    one; `filing`: large messages of LMTP clients."""

    def __init__(
        self,
        config: Config,
        intake: Intake,
        endpoint: Endpoint,
        limits: Limits,
        threads: Executor | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.config = config
        self.intake = intake
        self.endpoint = endpoint
        self.limits = limits
        self.threads = threads
        self.loop = loop
        self.turns = Turns(loop)
        self.now = loop.time
        self.time = self.now()  # of the last check of deadlines: near enough for those
        self.stressed = False
        self.lateness = Lateness(
            self.now, lambda text: intake.log.event("warning", text=text), intake.counters.histogram("relaymta_loop_lag_seconds")
        )
        self.connections: set[Admitted] = set()
        self.files = 0
        self.filing = Filing()
        self.tracer: Tracer | None = None
        self.most = self.last = 0
        self.read_limit()
        self._tasks: set[asyncio.Task[None]] = set()

    def read_limit(self) -> None:
        """Use the current limit of descriptors: an operator may change that of a running process (prlimit(1)). `most`: how many
        clients may use; `last`: none with this number or a higher one is used for a client, whatever has the others."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        kept = min(DESCRIPTORS_KEPT, descriptors // 2)
        self.most, self.last = descriptors - kept, descriptors - kept // LAST_SHARE

    def some_left(self) -> bool:
        """Whether a descriptor is left for a client, by the lowest number that is free: all below it are used, also those that
        nobody here counts."""
        try:
            lowest = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:
            return False
        os.close(lowest)
        return lowest < self.last

    def spawn(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run a coroutine of a connection as a task."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def enter(self, client: Client, is_client: bool = True) -> Reservation | bytes:
        """Count a connection by the limits of the machine and of its client; or the reply that rejects it (instead of the
        banner). `is_client`: false for a load balancer whose PROXY header is still to come, to which no client's connection rate
        applies."""
        if self.intake.draining:
            return DRAIN_REPLY
        if self.lateness.shedding:
            self.lateness.turned_away += 1
            return reply.OVERLOADED
        if self.descriptors_used() + 1 >= self.most:
            self.scarce()
        if not self.limits.take("connections", self.config.limits.connections):
            return reply.TOO_MANY_CONNECTIONS
        if not self.limits.take("client " + client.group, client.connections):
            self.limits.give("connections")
            return reply.TOO_MANY_FROM_CLIENT
        taken = Reservation(partial(self._leave, client.group))
        if client.connection_rate and is_client:
            refused = self.intake.quotas.client(client.group, "connection_rate", client.connection_rate)
            if refused is not None:
                taken.give_back()
                return refused
        return taken

    def _leave(self, group: str) -> None:
        self.limits.give("connections")
        self.limits.give("client " + group)
        self.freed()

    def file(self) -> Reservation | None:
        """Take a descriptor for the file of a large message. None when none is left for it."""
        if self.descriptors_used() >= self.most:
            return None
        self.files += 1
        return Reservation(self._file_closed)

    def _file_closed(self) -> None:
        self.files -= 1
        self.freed()

    def descriptors_used(self) -> int:
        """The descriptors in use for clients, and for filters that follow them."""
        chains = self.endpoint.chains
        return len(self.connections) + self.files + (chains.open if chains is not None else 0)

    def scarce(self) -> None:
        """No descriptor is left for more connections."""

    def freed(self) -> None:
        """A descriptor may be free again."""
