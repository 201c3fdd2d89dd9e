"""The end of files to which lines are appended, and what is appended to them: files that are rotated, or follow each other."""

import contextlib
import heapq
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

__all__ = ["LINE_MOST", "Files"]

BLOCK = 1 << 16  # octets that are read at once
LINE_MOST = 4 << 20  # octets of a line; a longer one is passed over
PAUSE = 0.25  # seconds between two looks
GRACE = 10.0  # seconds for which a file that was rotated away is read: its writers may not know yet
Writers = Callable[[], list[list[Path]]]


class _Place(NamedTuple):
    """A file as it was found: which one it is, and where its last line ended then."""

    path: Path
    identity: tuple[int, int]
    end: int


class _Open:
    """A file that is followed. `left`: since when (monotonic) it has not been where it was found; 0: it is there."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = _identity(os.fstat(self._descriptor))
        self.position = 0
        self._rest = b""  # of a line that has no end yet
        self._skips = False  # that line is too long
        self.left = 0.0

    def lines(self) -> Iterator[bytes]:
        """The lines that were added. A file that is shorter than it was is read from its beginning: it was emptied."""
        if os.fstat(self._descriptor).st_size < self.position:
            self.position, self._rest, self._skips = 0, b"", False
        while data := os.pread(self._descriptor, BLOCK, self.position):
            self.position += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if not self._skips:
                    yield line
                self._skips = False
            if len(self._rest) > LINE_MOST:
                self._rest, self._skips = b"", True

    def close(self) -> None:
        os.close(self._descriptor)


class Files:
    """Lines of files. `writers()`: for each that writes, its files, the one that it writes to last; they may not be there."""

    def __init__(self, writers: Writers) -> None:
        self._writers = writers
        self._places: list[_Place] = []

    def last(self, count: int, wanted: Callable[[bytes], float | None]) -> list[bytes]:
        """The last lines that are wanted, the newest last. `wanted(line)`: the time by which lines of different writers are put
        in order, or None. No more than these lines, and a line and a block of each writer, is kept in memory. OSError."""
        everyone = [[place for path in paths if (place := _place(path))] for paths in self._writers()]
        self._places = [places[-1] for places in everyone if places]
        if not count:
            return []
        streams = [_timed(chain.from_iterable(map(_backwards, reversed(places))), wanted) for places in everyone]
        found: list[bytes] = []
        for _, line in heapq.merge(*streams, key=lambda pair: pair[0], reverse=True):
            found.append(line)
            if len(found) == count:
                break
        return found[::-1]

    def follow(self) -> Iterator[Iterable[bytes]]:
        """What is added after `last`, look by look, for ever; what several writers have added between two looks is in the order
        of the writers. OSError."""
        known: dict[tuple[int, int], _Open] = {}
        try:
            for place in self._places:
                with contextlib.suppress(FileNotFoundError):  # it has been rotated since, as below
                    self._open(known, place.path, place)
            while True:
                self._look(known)
                yield chain.from_iterable(file.lines() for file in known.values())
                time.sleep(PAUSE)
        finally:
            for file in known.values():
                file.close()

    def _look(self, known: dict[tuple[int, int], _Open]) -> None:
        """Open files that are new, and close those that have been gone for a while."""
        there = set()
        for path in (path for paths in self._writers() for path in paths[-1:]):
            with contextlib.suppress(FileNotFoundError):
                identity = _identity(path.stat())
                if identity not in known:
                    identity = self._open(known, path)
                there.add(identity)
        now = time.monotonic()
        for identity, file in list(known.items()):
            file.left = 0.0 if identity in there else file.left or now
            if file.left and now - file.left > GRACE:
                file.close()
                del known[identity]

    def _open(self, known: dict[tuple[int, int], _Open], path: Path, place: _Place | None = None) -> tuple[int, int]:
        """Follow a file: from where it ended in `last`, if it is still that one. Which one it is."""
        file = _Open(path)
        if file.identity in known:
            file.close()
        else:
            known[file.identity] = file
            if place is not None and place.identity == file.identity:
                file.position = place.end
        return file.identity


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _place(path: Path) -> _Place | None:
    """Where the last line of a file ends; None: there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(descriptor)
        identity, end = _identity(found), found.st_size
        while end:
            start = max(0, end - BLOCK)
            at = os.pread(descriptor, end - start, start).rfind(b"\n")
            if at >= 0:
                return _Place(path, identity, start + at + 1)
            end = start
        return _Place(path, identity, 0)
    finally:
        os.close(descriptor)


def _backwards(place: _Place) -> Iterator[bytes]:
    """The lines of a file, from the last one."""
    try:
        descriptor = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # removed meanwhile, as the oldest
        return
    try:
        position, rest, skips = max(0, place.end - 1), b"", False
        while position:
            start = max(0, position - BLOCK)
            first, *lines = (os.pread(descriptor, position - start, start) + rest).split(b"\n")
            if lines:
                yield from reversed(lines[:-1] if skips else lines)
                skips = False
            position, rest = start, first
            if len(rest) > LINE_MOST:
                rest, skips = b"", True
        if place.end and not skips:
            yield rest
    finally:
        os.close(descriptor)


def _timed(lines: Iterator[bytes], wanted: Callable[[bytes], float | None]) -> Iterator[tuple[float, bytes]]:
    for line in lines:
        when = wanted(line)
        if when is not None:
            yield when, line
