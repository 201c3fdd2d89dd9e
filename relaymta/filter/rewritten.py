"""The body that a filter writes in place of a message's.

It is kept in memory as long as it is small, and then in a file of its own, which takes the place of the message's in the end.
What a filter writes becomes message data: lines end with CRLF, and there is no NUL in them.

State: changed on the loop by `write`, `end` and `discard`. The file is written by one thread at a time (`_working`), which goes
on when whoever waits for it is cancelled; `discard` has the file removed when that thread has returned, never meanwhile.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from relaymta.errors import StoreError
from relaymta.filter.judgement import FilterFailure, Text
from relaymta.reservation import Reservation

__all__ = ["File", "Rewritten"]

TOGETHER = 256 << 10  # octets that are written together
PIECES = 1024  # in memory, until they are joined: each costs more memory than it may hold


class File(Protocol):
    """The file of a body. Each method is called on a thread, one at a time but for `piece` and `lend`. OSError or StoreError."""

    def write(self, data: list[bytes]) -> None:
        """Append pieces."""

    def piece(self, at: int, most: int) -> bytes:
        """Octets of it."""

    def lend(self) -> tuple[int, int]:
        """A further descriptor to read it from, and where in that it begins."""

    def discard(self) -> None:
        """It is not used: remove it."""


class Rewritten:
    """A judgement.NewBody. `octets`: so far; `large`: the file, None: it is in memory; `body`: all of it, where it is in memory,
    after `end`; `place`: the descriptor for a file, which is given back where there is none.

    A call of `write` or `end` that has failed, or was cancelled, is the last one but for `discard`: others fail, too. Whose
    `large` has been taken over is not discarded here."""

    def __init__(
        self, make: Callable[[], File], memory: int, most: int, thread: Callable[..., "asyncio.Future[Any]"], place: Reservation
    ) -> None:
        """`make()` makes a file for it, on a thread; up to `memory` octets it is in memory; it may have `most` octets.
        `thread(work, *arguments)` does work on a thread; its future is done when the work is, unless it is cancelled."""
        self.octets = 0
        self.eight_bit = False
        self.body = b""
        self.large: File | None = None
        self.place = place
        self._make = make
        self._memory = memory
        self._most = most
        self._thread = thread
        self._tail = b"\r\n"  # its last two octets; at first it is between lines
        self._pieces: list[bytes] = []  # that are in no file
        self._joined = 0  # so many of these, in front, are long enough
        self._waiting = 0  # octets of these
        self._failure: Exception | None = None  # why nothing more is taken
        self._working: asyncio.Future[Any] | None = None  # the thread that has the file, or had it last
        self._gone = False

    async def write(self, piece: bytes) -> None:
        """As of NewBody."""
        self._check()
        if not piece:
            return
        made, tail = _message_data(piece, self._tail)
        if self.octets + len(made) + len(_missing(tail)) > self._most:
            self._failure = FilterFailure("protocol", f"writes a body of more than {self._most} octets")
            raise self._failure
        self.eight_bit = self.eight_bit or not piece.isascii()
        self._add(made, tail)
        if self.octets > self._memory and self._waiting >= TOGETHER:
            await self._write()

    async def end(self) -> None:
        """As of NewBody."""
        self._check()
        missing = _missing(self._tail)
        if missing:
            self._add(missing, b"\r\n")
        if self.octets <= self._memory:
            self.body, self._pieces = b"".join(self._pieces), []
            self.place.give_back()
        elif self._pieces:
            await self._write()

    def text(self, head: bytes) -> Text:
        """As of NewBody."""
        return Text(head, self.body) if self.large is None else Text(head, b"", self.octets, self._read, self.large.lend)

    def discard(self) -> None:
        """As of NewBody. Further calls do nothing. `place` is given back when the file is gone."""
        if self._gone:
            return
        self._gone = True
        self._failure = self._failure or StoreError("it is not wanted any more")
        self.body, self._pieces = b"", []
        if self._working is not None:
            self._working.add_done_callback(self._remove)  # of one that is done it is called, too
        else:
            self.place.give_back()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _add(self, made: bytes, tail: bytes) -> None:
        """Take message data that is not empty, and ends in the two octets `tail`."""
        self._tail = tail
        self.octets += len(made)
        self._waiting += len(made)
        self._pieces.append(made)
        if len(self._pieces) - self._joined >= PIECES:
            self._pieces[self._joined :] = [b"".join(self._pieces[self._joined :])]
            self._joined += 1

    async def _write(self) -> None:
        """Write to the file what is in memory. Cancelled, the thread goes on."""
        pieces, self._pieces, self._joined, self._waiting = self._pieces, [], 0, 0
        self._failure = StoreError("some of it was not written")  # until it is
        self._working = self._thread(self._write_now, pieces)
        await asyncio.shield(self._working)
        if not self._gone:
            self._failure = None

    async def _read(self, at: int, most: int) -> bytes:
        assert self.large is not None
        octets: bytes = await self._thread(self.large.piece, at, most)
        return octets

    def _remove(self, done: "asyncio.Future[Any]") -> None:
        """No thread has the file any more."""
        if not done.cancelled():
            done.exception()  # nobody else may have asked: its caller was cancelled
        if self.large is None:  # it could not be made, or was not
            self.place.give_back()
        else:
            self._thread(self.large.discard).add_done_callback(self._removed)

    def _removed(self, done: "asyncio.Future[Any]") -> None:
        if not done.cancelled():
            done.exception()  # a sweep removes what could not be removed
        self.place.give_back()

    def _write_now(self, pieces: list[bytes]) -> None:
        """On a thread."""
        if self._gone:
            return
        if self.large is None:
            self.large = self._make()
        self.large.write(pieces)


def _missing(tail: bytes) -> bytes:
    """What is missing to a CRLF at the end of octets that end in `tail`."""
    return b"" if tail == b"\r\n" else b"\n" if tail.endswith(b"\r") else b"\r\n"


def _message_data(piece: bytes, before: bytes) -> tuple[bytes, bytes]:
    """`piece`, behind what ends in the two octets `before`, as message data, and the two octets that it ends in then. A CR at its
    end is left open: the LF of what follows, or the one that is put in front of that, completes it."""
    opened, closes = before.endswith(b"\r"), piece.endswith(b"\r")
    continues = opened and piece.startswith(b"\n")
    if opened == continues and b"\0" not in piece:
        lines = piece.count(b"\r\n")
        if piece.count(b"\n") == lines + continues and piece.count(b"\r") == lines + closes:
            return piece, (before + piece[-2:])[-2:]
    inner = piece[continues : len(piece) - closes].replace(b"\0", b" ")
    inner = inner.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    made = b"\n" * opened + inner + b"\r" * closes
    return made, (before + made[-2:])[-2:]
