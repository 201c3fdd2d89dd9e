"""Files that are read again when they change, while the relay runs. An invalid file leaves the last valid content in use."""

import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Stamp", "Watched", "stamp"]

T = TypeVar("T")


def _never(value: object) -> bool:
    return False


Stamp = tuple[tuple[int, int, int] | None, ...]


def _stamps(paths: list[str]) -> Stamp:
    return tuple(stamp(path) for path in paths)


class Watched(Generic[T]):
    """The result of `load()`, which reads the files `paths`. `value`: of its last success (None: there was none). `problem`: why
    the current files are not in use, "" if they are; `error`: that of the last load, None if it succeeded. `again(value)`:
    whether it is loaded at each look, whatever the files show. `look(paths)`: the stamps of files that may not answer. `rest`:
    how many times the CPU time of a load passes before the next, where others decide how often, and how much, there is to read.
    `refresh` is called on a thread, by one caller at a time; the attributes may be read anywhere."""

    def __init__(
        self, paths: list[str], load: Callable[[], T], again: Callable[[T], bool] = _never,
        look: Callable[[list[str]], Stamp] | None = None, rest: float = 0.0,
    ) -> None:  # fmt: skip
        self.value: T | None = None
        self.problem = ""
        self.error: Exception | None = None
        self._paths = paths
        self._load = load
        self._again = again
        self._look = look or _stamps
        self._rest, self._rests_until = rest, 0.0
        self._stamp: Stamp | None = None  # not loaded yet: `load` is called once even without files

    @property
    def trouble(self) -> str:
        """The problem, and what is in use instead; "" without one."""
        if not self.problem:
            return ""
        instead = "there is no earlier version to use" if self.value is None else "what was read before stays in use"
        return f"{self.problem}; {instead}"

    def refresh(self) -> None:
        """Load the files again if they have changed, or could not be loaded the last time. Blocks."""
        if self._rest and time.monotonic() < self._rests_until:
            return
        now = self._look(self._paths)
        if now == self._stamp and not self.problem and (self.value is None or not self._again(self.value)):
            return
        self._stamp = now
        began = time.thread_time()
        try:
            self.value = self._load()
            self.problem, self.error = "", None
        except Exception as error:  # any content of the files must not end the caller
            self.problem, self.error = str(error) or type(error).__name__, error.with_traceback(None)
        self._rests_until = time.monotonic() + self._rest * (time.thread_time() - began)


def stamp(path: str) -> tuple[int, int, int] | None:
    """By which it is seen that a file has changed: its time of change (ns), octets and inode; None: there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
