"""What the stages of delivery take: histograms (`metrics.PHASES`). All durations are differences of a clock that is never set."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from relaymta.metrics import CLASSES, PHASES, Counters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relaymta.proto.smtp_client import Mail
    from relaymta.queue import Entry

__all__ = ["MarkedStages", "Stages", "Stopwatch", "Timed", "untimed"]

Timed = Callable[[str, float], None]  # (phase, seconds)
# The phases (of replies, as smtp_client has them) that a transaction has been through, by that of its last reply.
_UNTIL = {
    "mail": ("mail",), "rcpt": ("mail", "rcpt"), "data": ("mail", "rcpt", "data"), "final": ("mail", "rcpt", "data", "final"),
}  # fmt: skip
_BDAT = {"final": ("mail", "rcpt", "final")}  # no reply is waited for in front of the data
_SHOWN = {"final": "dot"}


def untimed(phase: str, seconds: float) -> None:
    """Nobody wants to know."""


class Stages:
    """Observes what one worker's deliveries take, in `counters`."""

    def __init__(self, counters: Counters) -> None:
        phases = {phase: counters.histogram("relaymta_attempt_phase_seconds", phase) for phase in PHASES}
        self._phases = phases
        self._until, self._bdat = (
            {last: [(one, phases[_SHOWN.get(one, one)]) for one in through] for last, through in table.items()}
            for table in (_UNTIL, _UNTIL | _BDAT)
        )
        self._first = {name: counters.histogram("relaymta_first_attempt_seconds", name) for name in CLASSES}

    def took(self, phase: str, seconds: float) -> None:
        """A phase of an attempt, one of PHASES, has ended after so long."""
        self._phases[phase](seconds)

    def begun(self, entry: "Entry", now: int) -> None:
        """An attempt begins; `now`: by the queue's clock. What is tried again counts for the first time only."""
        if not entry.attempts and not entry.lost:
            self._first[entry.name.priority]((now - entry.due) / 1000)

    def failed_since(self, entry: "Entry", began: float) -> None:
        """No connection could be opened, which was begun for this entry and others at `began` (loop time)."""

    def replied(self, mail: "Mail", chunking: bool) -> None:
        """All replies to a message are there; of one in several transactions: with the waits of all."""
        waited = mail.waited
        for phase, observe in (self._bdat if chunking else self._until).get(mail.reached, ()):
            observe(waited.get(phase, 0.0))

    def lost(self, awaiting: str, seconds: float) -> None:
        """The connection ended while the reply of a phase (as smtp_client has it) was awaited, for so long."""
        observe = self._phases.get(_SHOWN.get(awaiting, awaiting))
        if observe is not None:
            observe(seconds)


class MarkedStages(Stages):
    """As Stages; it also marks when attempts begin, for their spans. `traced(entry)`: whether its message has any."""

    def __init__(self, counters: Counters, traced: "Callable[[Entry], bool]") -> None:
        super().__init__(counters)
        self._traced = traced

    def begun(self, entry: "Entry", now: int) -> None:
        """As of Stages. What goes on at another connection, since a reused one was lost, is the same attempt."""
        super().begun(entry, now)
        if not (entry.lost and entry.began) and self._traced(entry):
            entry.began = time.monotonic()

    def failed_since(self, entry: "Entry", began: float) -> None:
        """As of Stages."""
        if self._traced(entry):
            entry.began = began


class Stopwatch:
    """Measures phases, one after the other."""

    def __init__(self, timed: Timed) -> None:
        self._timed = timed
        self._phase = ""
        self._since = 0.0

    def begin(self, phase: str) -> None:
        """The phase before this one, if any, has ended; "": none begins."""
        now = time.monotonic()
        if self._phase:
            self._timed(self._phase, now - self._since)
        self._phase, self._since = phase, now

    @contextmanager
    def phase(self, phase: str) -> "Iterator[None]":
        """One phase, however it ends."""
        self.begin(phase)
        try:
            yield
        finally:
            self.begin("")
