"""Files that are read again when they change, while the relay runs. An invalid file leaves the last valid content in use."""

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Watched", "stamp"]

T = TypeVar("T")


def _never(value: object) -> bool:
    return False


Stamp = tuple[tuple[int, int, int] | None, ...]


class Watched(Generic[T]):
    """The result of `load()`, which reads the files `paths`. `value`: of its last success (None: there was none). `problem`: why
    the current files are not in use, "" if they are; `error`: that of the last load, None if it succeeded. `again(value)`:
    whether it is loaded at each look, whatever the files show. `refresh` is called on a thread, by one caller at a time; the
    attributes may be read anywhere."""

    def __init__(self, paths: list[str], load: Callable[[], T], again: Callable[[T], bool] = _never) -> None:
        self.value: T | None = None
        self.problem = ""
        self.error: Exception | None = None
        self._paths = paths
        self._load = load
        self._again = again
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
        now = tuple(stamp(path) for path in self._paths)
        if now == self._stamp and not self.problem and (self.value is None or not self._again(self.value)):
            return
        self._stamp = now
        try:
            self.value = self._load()
            self.problem, self.error = "", None
        except Exception as error:  # any content of the files must not end the caller
            self.problem, self.error = str(error) or type(error).__name__, error.with_traceback(None)


def stamp(path: str) -> tuple[int, int, int] | None:
    """By which it is seen that a file has changed: its time of change (ns), octets and inode; None: there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
