"""The suppression list in one worker: which file is read, as long as the configuration says so; and hard bounces of its mail,
which the supervisor hears of."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaymta.accept.suppressed import Suppressed
from relaymta.proto.address import compared, domain_of
from relaymta.proto.bounce_class import HARD, classify
from relaymta.proto.envelope import Attempt, Envelope
from relaymta.queue import wall_ms
from relaymta.suppression import FOLDER, Lookup

if TYPE_CHECKING:
    from relaymta.worker import Worker

__all__ = ["Suppressing"]

TOLD_SECONDS = 1.0  # until the supervisor hears of hard bounces, of all together
TOLD_TOGETHER = 500
TOLD_MOST = 10_000  # that wait to be told; further ones are not: the next bounce says it again
MAILBOX = "mailbox"  # the peer of what is filed here
LOOK_SECONDS = 1.0  # until a list that was put in place of another is noticed


class Suppressing:
    """See above. `intake.suppressed` follows it, and `bounced` of the shards' witnesses."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._lookup: Lookup | None = None
        self._looking: asyncio.Task[None] | None = None
        self._told: list[dict[str, Any]] = []
        self._ours: frozenset[str] = frozenset()

    async def start(self) -> None:
        """As `configured`; where the list is used, it is open on return."""
        self.configured()
        if self._lookup is not None:
            (await asyncio.to_thread(self._lookup.refresh))()

    def configured(self) -> None:
        """Use the list from now on, or not any more, as is configured."""
        worker, table = self._worker, self._worker.config.suppression
        assert worker.intake is not None
        self._ours = frozenset(compared(domain.rstrip(".")) for domain in worker.config.relay.domains)
        for shard in worker.shards.values():
            shard.witness.bounced = self._bounced if table.enabled and table.hard_bounces else None
        if not table.enabled:
            worker.intake.suppressed = None
            self.stop()
            return
        if self._lookup is None:
            self._lookup = Lookup(Path(worker.config.spool) / FOLDER, self._warn)
            self._looking = worker.loop.create_task(self._look(self._lookup))
        worker.intake.suppressed = Suppressed(self._lookup, table.ignore_suppression, worker.counters)

    def _bounced(self, envelope: Envelope, recipient: str, attempt: Attempt, expired: bool) -> None:
        """A recipient has failed for good. Not of interest: what an operator has decided, DSNs, whose recipients anybody may have
        made up, and addresses of ours, that may be made tomorrow."""
        hard = not expired and classify(attempt.code, attempt.enhanced, attempt.text) in HARD
        if not hard or attempt.because == "operator" or attempt.peer == MAILBOX or not envelope.sender:
            return
        if compared(domain_of(recipient)) in self._ours or len(self._told) >= TOLD_MOST:
            return
        if not self._told:
            self._worker.loop.call_later(TOLD_SECONDS, self._tell)
        self._told.append({
            "event": "bounced", "application": envelope.application, "recipient": recipient, "reply": attempt.whole,
            "time": wall_ms(), "phase": attempt.phase, "recipients": len(envelope.recipients),
        })  # fmt: skip

    def _tell(self) -> None:
        told, self._told = self._told, []
        for start in range(0, len(told), TOLD_TOGETHER):
            self._worker.channel.notify("bounced", events=told[start : start + TOLD_TOGETHER])

    def _warn(self, text: str) -> None:
        self._worker.loop.call_soon_threadsafe(lambda: self._worker.log.event("warning", text=text))

    async def _look(self, lookup: Lookup) -> None:
        """Notice when the file is another one."""
        try:
            while True:
                (await asyncio.to_thread(lookup.refresh))()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            lookup.close()

    def stop(self) -> None:
        """Read nothing more, and tell what there is to tell."""
        self._tell()
        if self._looking is not None:
            self._looking.cancel()
        self._lookup = self._looking = None
