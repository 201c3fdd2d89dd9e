"""The body that a filter writes in place of a message's.

It is kept in memory as long as it is small, and then in a file of its own, which takes the place of the message's in the end.
What a filter writes becomes message data: lines end with CRLF, and there is no NUL in them.

State: changed on the loop by `write`, `end` and `discard`; the file by threads, one at a time (`_using`), and by none any more
once `_gone` is set, whenever that is: a `write` whose caller was cancelled may still be under way.
"""

import asyncio
import re
import threading
from collections.abc import Callable
from typing import Any

from relaymta.accept.large import Large
from relaymta.errors import StoreError
from relaymta.filter.judgement import FilterFailure, Text
from relaymta.reservation import Reservation

__all__ = ["Rewritten"]

_LINE_END = re.compile(rb"\r\n|\r|\n")


class Rewritten:
    """A judgement.NewBody. `octets`: so far; `large`: the file, None: it is in memory; `place`: the descriptor for a file, which
    is given back where there is none."""

    def __init__(
        self, make: Callable[[], Large], memory: int, most: int, thread: Callable[..., "asyncio.Future[Any]"], place: Reservation
    ) -> None:
        """`make()` makes a file for it; up to `memory` octets it is in memory; it may have `most` octets. `thread(work,
        *arguments)` does work on a thread."""
        self.octets = 0
        self.eight_bit = False
        self.large: Large | None = None
        self.place = place
        self._make = make
        self._memory = memory
        self._most = most
        self._thread = thread
        self._pieces: list[bytes] = []
        self._cr = False  # a CR has come, and what is behind it has not
        self._last = b""  # the last octet
        self._using = threading.Lock()
        self._gone = False

    async def write(self, piece: bytes) -> None:
        """As of NewBody."""
        if self._cr:
            piece = b"\r" + piece
        self._cr = piece.endswith(b"\r")
        await self._add(_lines(piece[:-1] if self._cr else piece))

    async def end(self) -> None:
        """As of NewBody."""
        if self._cr or self._last not in (b"", b"\n"):
            await self._add(b"\r\n")
        if self.large is None:
            self.place.give_back()

    @property
    def body(self) -> bytes:
        """All of it, where it is in memory."""
        return b"".join(self._pieces)

    def text(self, head: bytes) -> Text:
        """As of NewBody."""
        return Text(head, self.body) if self.large is None else Text(head, b"", self.octets, self._read)

    def discard(self) -> None:
        """As of NewBody. Further calls do nothing."""
        if self._gone:
            return
        self._gone = True
        self._pieces.clear()
        if self.large is None:
            self.place.give_back()
        else:
            self._thread(self._remove, self.large).add_done_callback(lambda _: self.place.give_back())

    async def _add(self, octets: bytes) -> None:
        if not octets:
            return
        self.octets += len(octets)
        if self.octets > self._most:
            raise FilterFailure("protocol", f"writes a body of more than {self._most} octets")
        self.eight_bit = self.eight_bit or not octets.isascii()
        self._last = octets[-1:]
        self._pieces.append(octets)
        if self.octets > self._memory or self.large is not None:
            pieces, self._pieces = self._pieces, []
            self.large = self.large or self._make()
            await self._thread(self._write, self.large, pieces)

    async def _read(self, at: int, most: int) -> bytes:
        assert self.large is not None
        octets: bytes = await self._thread(self.large.piece, at, most)
        return octets

    # On threads

    def _write(self, large: Large, pieces: list[bytes]) -> None:
        with self._using:
            if self._gone:
                raise StoreError("it is not wanted any more")
            large.write(pieces)

    def _remove(self, large: Large) -> None:
        with self._using:
            large.discard()


def _lines(octets: bytes) -> bytes:
    """Lines that end with CRLF, whatever they ended with; without NUL."""
    if b"\0" in octets:
        octets = octets.replace(b"\0", b" ")
    ends = octets.count(b"\r\n")
    if octets.count(b"\n") == ends and octets.count(b"\r") == ends:
        return octets
    return _LINE_END.sub(b"\r\n", octets)
