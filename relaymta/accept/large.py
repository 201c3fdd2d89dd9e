"""A message that is longer than memory has room for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from relaymta.filter.signing import Draft
from relaymta.proto.envelope import Body
from relaymta.queue import BigBody

if TYPE_CHECKING:
    from relaymta.filter.verify import Look

__all__ = ["Large"]

ROOM = 65536  # octets in front of a text for what is only known at its end: signatures, what was found about it


class Large:
    """One on its way to a file of its own, read no faster than the disk takes it; to be signed (`draft`), or looked at (`look`),
    or neither. `front`: fields of ours. Threads, one at a time: `write` all of its text, then `finish`, or `discard`."""

    def __init__(
        self, make: Callable[[int], BigBody], front: list[bytes], draft: Draft | None = None, look: "Look | None" = None
    ) -> None:
        """`make(room)`: its file, with so many octets left in front of what is written."""
        self.draft, self.look = draft, look
        self._make = make
        self._front = front
        self._file: BigBody | None = None

    def write(self, text: list[bytes]) -> None:
        """Append to it."""
        seen = self.draft or self.look
        if self._file is None:
            self._file = self._make(ROOM if seen is not None else 0)
            if seen is None:  # nothing will come in front of what is ours
                self._file.write(self._front)
                self._front = []
        self._file.write(text)
        if seen is not None:
            for piece in text:
                seen.body.feed(piece)

    def finish(self, fields: bytes) -> Body:
        """Put `fields` in front of all, and make it safe; where it lies."""
        assert self._file is not None
        return self._file.finish([fields, *self._front])

    def discard(self) -> None:
        """It is nobody's: remove the file."""
        if self._file is not None:
            self._file.discard()
