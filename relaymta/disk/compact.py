"""Compaction: bodies move from nearly empty segments to cold ones, so that the disk used stays within twice the live octets and
a few segments, in whatever order bodies are freed.

One slice at a time: a reader thread reads the frames of the emptiest segment and keeps those that LMDB still points at; the
copies are written in a group commit like any other body. A reader of a body that moves meanwhile finds another frame or none
(generation, id and checksum do not match), and reads it again from the place in its row.
"""

import os
from collections.abc import Callable
from typing import Any

import xxhash

from relaymta.disk.environment import Environment
from relaymta.disk.operations import Move
from relaymta.disk.segments import FRAME, MAGIC, Segment, Segments
from relaymta.disk.writer import GroupWriter
from relaymta.proto.envelope import Body

__all__ = ["Compactor"]

SPARE = 12  # segments beyond twice the live octets before anything is moved (the design's bound is 16)
SLICE_BYTES = 1 << 20
SLICE_FRAMES = 128
PAUSE_TICKS = 200  # after a disk error
IDLE_TICKS = 10  # between two checks while there is nothing to move

Read = Callable[[Callable[[], Any], Callable[[Any], None]], None]


class Compactor:
    """Compacts one shard's segments. `points_at(transaction, ident, body)`: whether the row of `ident` points at this body.
    `read(function, then)`: runs `function` on a reader thread, `then(result)` on the loop."""

    def __init__(
        self,
        environment: Environment,
        segments: Segments,
        writer: GroupWriter[Any, Any, Any],
        points_at: Callable[[Any, int, Body], bool],
        read: Read,
    ) -> None:
        self._environment = environment
        self._points_at = points_at
        self._segments = segments
        self._writer = writer
        self._read = read
        self._busy = False
        self._pause = 0
        self._victim: Segment | None = None
        self._position = 0
        self._given_up: set[tuple[int, int]] = set()  # (segment, generation) that were read to the end

    def tick(self) -> None:
        """Move one slice when the disk used is over the bound. Called periodically on the loop."""
        if self._pause:
            self._pause -= 1
        if self._busy or self._pause or self._writer.stalled:
            return
        victim = self._victim
        if victim is None or not self._segments.movable(victim):
            victim = self._victim = self._choose()
            self._position = 0
        if victim is None:
            self._pause = IDLE_TICKS
        else:
            self._busy = True
            generation, start = victim.row.generation, self._position
            self._read(lambda: self._slice(victim, generation, start), self._sliced)

    def _choose(self) -> Segment | None:
        """The segment with the fewest live octets, when the disk used is over the bound; else None."""
        octets, live, _ = self._segments.usage()
        if octets <= 2 * live + SPARE * self._segments.size:
            return None
        known = [s for s in self._segments.closed() if (s.number, s.row.generation) not in self._given_up]
        return min(known, key=lambda s: s.row.live_bytes, default=None)

    # On a reader thread

    def _slice(self, victim: Segment, generation: int, start: int) -> tuple[list[Move], int]:
        """Copies of the live bodies of `victim` from offset `start` on, and the offset of the next slice (0: none is left)."""
        found: list[Move] = []
        taken, position, end = 0, start, victim.row.position
        with self._environment.reading() as txn:
            while position < end and taken < SLICE_BYTES and len(found) < SLICE_FRAMES:
                head = os.pread(victim.fd, FRAME.size, position)
                if len(head) < FRAME.size:
                    return found, 0
                magic, frame_generation, ident, length, checksum = FRAME.unpack(head)
                if magic != MAGIC or frame_generation != generation:
                    return found, 0
                body = Body(victim.number, generation, position, length)
                position += FRAME.size + length
                if not self._points_at(txn, ident, body):
                    continue
                data = os.pread(victim.fd, length, body.offset + FRAME.size)
                taken += length
                if len(data) == length and xxhash.xxh3_64_intdigest(data) == checksum:
                    found.append(Move(ident, body, data, self._moved))
        return found, position if position < end else 0

    # Back on the loop

    def _sliced(self, result: Any) -> None:
        self._busy = False
        if isinstance(result, Exception):  # a read error
            self._pause = PAUSE_TICKS
            return
        moves, self._position = result
        victim = self._victim
        if not self._position and victim is not None:
            # What is still live here is damaged: it stays until nothing points at it any more.
            self._given_up.add((victim.number, victim.row.generation))
            self._given_up &= {(s.number, s.row.generation) for s in self._segments.closed()}
            self._victim = None
        if moves:
            self._busy = True
            moves[-1].last = True
        for move in moves:
            self._writer.submit(move)

    def _moved(self, move: Move) -> None:
        if move.error is not None:
            self._pause = PAUSE_TICKS
            self._given_up.clear()  # it was the disk, not the segment
        if move.last:
            self._busy = False
