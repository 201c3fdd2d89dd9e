"""Files that are read again when they change, while the relay runs; a wrong one changes nothing."""

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Watched"]

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int] | None, ...]


class Watched(Generic[T]):
    """What `load()` makes of some files. `value`: of the last time that it could (None: never yet); `problem`: why the files as
    they are now are not in use, "" when they are. `refresh` belongs on a thread, one at a time; the rest may be read anywhere."""

    def __init__(self, paths: list[str], load: Callable[[], T]) -> None:
        self.value: T | None = None
        self.problem = ""
        self._paths = paths
        self._load = load
        self._stamp: Stamp | None = None  # not looked at before: without any file, too, there is something to make

    def refresh(self) -> None:
        """Load again what has changed, or was wrong the last time."""
        stamp = tuple(_stamp(path) for path in self._paths)
        if stamp == self._stamp and not self.problem:
            return
        self._stamp = stamp
        try:
            self.value = self._load()
            self.problem = ""
        except Exception as error:  # whatever is in the file: it is somebody else's
            self.problem = str(error) or type(error).__name__


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
