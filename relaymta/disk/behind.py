"""For how long readers have kept pages from being used again that the commits since have freed: the file grows meanwhile."""

import time
from collections.abc import Callable

__all__ = ["Behind"]


class Behind:
    """`readers()`: as Environment.readers_behind. `seconds`: how long the one has been behind who has been so for longest; `look`
    alone changes it."""

    def __init__(self, readers: Callable[[], list[str]]) -> None:
        self._readers = readers
        self._since: dict[str, float] = {}
        self.seconds = 0.0

    def look(self) -> None:
        """On one thread at a time, each second."""
        now = time.monotonic()
        self._since = {reader: self._since.get(reader, now) for reader in self._readers()}
        self.seconds = now - min(self._since.values(), default=now)
