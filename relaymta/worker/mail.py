"""What a worker has where mail is kept: its shards of the mailboxes, the deliveries to them, and the users who read there.
Imported there alone: a worker that only relays does without (6 MB)."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaymta.accept.acceptor import Make
from relaymta.accept.local import LocalRecipients
from relaymta.config.mailboxes import Mailboxes as MailboxSettings
from relaymta.metrics import COUNTERS, index
from relaymta.proto.address import domain_matches, domain_of
from relaymta.send.local import Store
from relaymta.shm import Shared
from relaymta.store.deliver import Delivery
from relaymta.store.mailboxes import OF_SUPERVISOR, Mailboxes
from relaymta.store.recipients import Recipients
from relaymta.store.sieving import Sieving
from relaymta.store.warning import Warnings
from relaymta.view import sessions
from relaymta.view.access import Access
from relaymta.view.imap import ImapConnection
from relaymta.view.managesieve import ManageSieveConnection
from relaymta.view.pop3 import Pop3Connection

if TYPE_CHECKING:
    from relaymta.worker import Worker

__all__ = ["Mail"]

FILED = {result: index("relaymta_mailbox_deliveries_total", result) for result in ("filed", "full", "failed")}
SIEVE = "relaymta_sieve_scripts_total"
SIEVED = {result: index(SIEVE, result) for result in COUNTERS[SIEVE][2]}
PROTOCOLS: dict[str, Callable[..., Any]] = {"imap": ImapConnection, "pop3": Pop3Connection, "managesieve": ManageSieveConnection}


class Mail:
    """The mailboxes as one worker has them. `requests`: the names of what the supervisor asks of their owner."""

    requests = OF_SUPERVISOR.keys()

    def __init__(self, worker: "Worker", owned: list[int], shared: Shared) -> None:
        """`owned`: the shards of this worker."""
        self._worker = worker
        self.mailboxes = Mailboxes(Path(worker.config.spool), owned, version=shared.directory())
        self.shards = self.mailboxes.shards
        self.recipients = Recipients(self.mailboxes, self._settings)
        event, hostname = worker.log.event, worker.config.hostname
        sieving = Sieving(
            self.mailboxes, lambda: worker.config.mailboxes.subaddress, hostname, partial(event, "sieve"), self._count_sieved
        )
        warnings = Warnings(self.mailboxes, hostname, partial(event, "quota_warning"))
        self.delivery = Delivery(self.mailboxes, self._settings, self._count_filed, sieving, warnings)
        self.access = Access(self.mailboxes)

    def _settings(self) -> MailboxSettings:
        return self._worker.config.mailboxes

    def _count_sieved(self, result: str) -> None:
        self._worker.counters.add(SIEVED[result], 1)

    def _count_filed(self, result: str) -> None:
        self._worker.counters.add(FILED[result], 1)

    def store(self) -> Store:
        """What deliveries of the queue use."""
        return Store(self.delivery.deliver, self.mailboxes.forget, self._expanded)

    def local(self) -> LocalRecipients:
        """What those use who hand mail to this relay."""
        return LocalRecipients(self.recipients.refusal, self.recipients.expanded, self.delivery.file)

    def _expanded(self, recipients: list[str]) -> list[str]:
        """Recipients of a message of our own, with aliases of addresses elsewhere replaced by these, as of accepted mail."""
        here = self._worker.config.local_domains
        return self.recipients.expanded(recipients, lambda address: domain_matches(domain_of(address), here))

    def connections(self) -> dict[str, Make]:
        """The connections of users who read, by the protocol of the listener."""
        return {protocol: partial(connection, self.access) for protocol, connection in PROTOCOLS.items()}

    # Requests

    async def answer(self, op: str, args: dict[str, Any]) -> Any:
        """The answer to one of `requests`."""
        return await OF_SUPERVISOR[op](self.mailboxes, **args)

    async def sessions(self, user: int) -> AsyncGenerator[list[dict[str, Any]], None]:
        """As `view.sessions.rows`, with the number of this worker."""
        async with aclosing(sessions.rows(self.access, user)) as pages:
            async for page in pages:
                yield [{**row, "worker": self._worker.slot} for row in page]

    async def disconnect(self, user: int) -> int:
        """As `view.sessions.disconnect`."""
        return await sessions.disconnect(self.access, user)

    # Gauges

    def set_gauges(self, gauge: Callable[[str, float], None]) -> None:
        """`gauge(name, value)`: as of Counters. Nothing here waits for the disk."""
        shards = list(self.shards.values())
        files, live, bodies = (
            (sum(column) for column in zip(*(shard.usage for shard in shards), strict=True)) if shards else (0, 0, 0)
        )
        gauge("relaymta_mailbox_segment_octets", files)
        gauge("relaymta_mailbox_segment_live_octets", live)
        gauge("relaymta_mailbox_bodies", bodies)
        gauge("relaymta_mailbox_lmdb_map_used_ratio", max((shard.disk.map_used for shard in shards), default=0.0))
        gauge("relaymta_mailbox_store_full", any(shard.disk.full for shard in shards))
        gauge("relaymta_mailbox_store_stalled", any(shard.writer.stalled for shard in shards))
        gauge("relaymta_mailbox_oldest_reader_seconds", max((shard.behind.seconds for shard in shards), default=0.0))
        for protocol in PROTOCOLS:
            gauge(f"relaymta_{protocol}_sessions", self.access.sessions[protocol])
        gauge("relaymta_mailbox_view_octets", self.access.shared.octets)

    def state(self) -> tuple[str, str]:
        """ "ok", "full" or "stalled", as of the event `store`; and why."""
        shards = self.shards.values()
        error = next((shard.writer.last_error for shard in shards if shard.writer.last_error), "")
        if any(shard.writer.stalled for shard in shards):
            return "stalled", error
        if any(shard.disk.full for shard in shards):
            return "full", error or "too little room is left on the disk, or in LMDB's map"
        return "ok", ""
