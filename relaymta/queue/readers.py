"""The queue's reader threads, and what a read of entries has to be marked with."""

import asyncio
from collections.abc import Callable
from typing import Any

from relaymta.disk import readers
from relaymta.queue.lifecycle import Lifecycle

__all__ = ["Readers"]


class Readers(readers.Readers):
    """Runs functions on the reader threads. All methods are called on the loop. `last_error`: why the last read failed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, entries: Lifecycle) -> None:
        super().__init__(loop, "queue-reader")
        self._entries = entries
        self.last_error = ""

    def read_rows(
        self, function: Callable[[], Any], then: Callable[[Any, int], None], refused: Callable[[], None] = lambda: None
    ) -> None:
        """Run `function`, then `then(result, mark)` on the loop, or `refused()` when it raised. `mark`: of this read, for
        `Lifecycle.seize` and `add_read`, which reject what is outdated."""
        mark = self._entries.begin_reading()

        def done(result: Any) -> None:
            try:
                if isinstance(result, Exception):
                    self.last_error = str(result)
                    refused()
                else:
                    then(result, mark)
            finally:
                self._entries.end_reading(mark)

        self.start(function, done)
