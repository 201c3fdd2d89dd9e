"""What hooks in Python use of a worker: its routes and its log, and what is counted of them."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from relaymta.filter.means import HookMeans
from relaymta.metrics import HOOK_FAILURES, HOOKS, Counters, index

if TYPE_CHECKING:
    from relaymta.worker import Worker

__all__ = ["Hooking"]

PLACES_MOST: Final = 100  # of exceptions, until they are reported; others are one
OTHER: Final = "other"
REPORT: Final = 1.0  # seconds

FAILED = {(hook, why): index("relaymta_hook_failures_total", f"{hook} {why}") for hook in HOOKS for why in HOOK_FAILURES}
DROPPED = {hook: index("relaymta_hook_dropped_total", hook) for hook in HOOKS[-4:]}


class Hooking:
    """See above. `_raised`: exceptions by their places, until they are reported to the supervisor, which exposes them."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._counters: Counters = worker.counters
        self._took: dict[str, Callable[[float], None]] = {}
        self._raised: Counter[str] = Counter()
        self._reporting: asyncio.TimerHandle | None = None

    def means(self) -> HookMeans:
        """For filters of type python."""
        return HookMeans(
            lambda: self._worker.routes.labels, lambda text: self._worker.log.event("warning", text=text), self._note,
            self._failed, self._note_raised, lambda hook: self._count(DROPPED[hook]),
        )  # fmt: skip

    def _note(self, hook: str, seconds: float) -> None:
        observe = self._took.get(hook)
        if observe is None:
            observe = self._took[hook] = self._counters.histogram("relaymta_hook_seconds", hook)
        observe(seconds)

    def _count(self, cell: int) -> None:
        self._counters.add(cell, 1)

    def _failed(self, hook: str, why: str) -> None:
        self._count(FAILED[hook, why])

    def _note_raised(self, place: str) -> None:
        if place not in self._raised and len(self._raised) >= PLACES_MOST:
            place = OTHER
        self._raised[place] += 1
        if self._reporting is None:
            self._reporting = self._worker.loop.call_later(REPORT, self._report)

    def _report(self) -> None:
        self._reporting = None
        raised, self._raised = self._raised, Counter()
        self._worker.channel.notify("hooks_raised", places=dict(raised))
