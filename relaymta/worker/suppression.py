"""The suppression list in one worker: which file is read, as long as the configuration says so."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from relaymta.accept.suppressed import Suppressed
from relaymta.suppression import FOLDER, Lookup

if TYPE_CHECKING:
    from relaymta.worker import Worker

__all__ = ["Suppressing"]

LOOK_SECONDS = 1.0  # until a list that was put in place of another is noticed


class Suppressing:
    """See above. `intake.suppressed` follows it."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._lookup: Lookup | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """As `configured`; where the list is used, it is open on return."""
        self.configured()
        if self._lookup is not None:
            (await asyncio.to_thread(self._lookup.refresh))()

    def configured(self) -> None:
        """Use the list from now on, or not any more, as is configured."""
        worker, table = self._worker, self._worker.config.suppression
        assert worker.intake is not None
        if not table.enabled:
            worker.intake.suppressed = None
            self.stop()
            return
        if self._lookup is None:
            self._lookup = Lookup(Path(worker.config.spool) / FOLDER, self._warn)
            self._looking = worker.loop.create_task(self._look(self._lookup))
        worker.intake.suppressed = Suppressed(self._lookup, table.ignore_suppression, worker.counters)

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
        """Read nothing more."""
        if self._looking is not None:
            self._looking.cancel()
        self._lookup = self._looking = None
