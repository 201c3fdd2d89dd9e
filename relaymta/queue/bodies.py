"""Message data for delivery, read from disk on the reader threads and counted in the window's budget."""

import asyncio
import os
from collections.abc import AsyncIterator
from itertools import zip_longest

from relaymta.disk.segments import FRAME, Segments
from relaymta.errors import StoreError
from relaymta.ident import format_id
from relaymta.proto.envelope import Body
from relaymta.queue.entry import Entry
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.readers import Readers

__all__ = ["Bodies"]

STREAM_PIECE = 256 * 1024


class Bodies:
    """Reads the message data of entries. Both methods are called on the loop."""

    def __init__(self, segments: Segments, readers: Readers, entries: Lifecycle) -> None:
        self._segments = segments
        self._readers = readers
        self._entries = entries

    async def read(self, entries: list[Entry]) -> list[list[bytes] | StoreError | None]:
        """The message data of entries in pieces, verified, from memory or disk. It is kept in `Entry.data` and counted while the
        entry is in memory. StoreError in place of one that is damaged or gone; None in place of one for which there is no room
        in `window_bytes` now (never the first)."""
        wanted = self._entries.reserve(entries)
        found: list[list[bytes] | StoreError | None] = []
        try:
            found += await self._from_disk(wanted)
        finally:
            for entry, data in zip_longest(wanted, found):
                self._entries.keep(entry, data if isinstance(data, list) else None)
        return found + [None] * (len(entries) - len(found))

    async def _from_disk(self, entries: list[Entry]) -> list[list[bytes] | StoreError]:
        found: list[list[bytes] | StoreError] = []
        bodies = [entry.envelope.body for entry in entries]
        results = await self._readers.run(self._read, entries, bodies)
        for entry, body, result in zip(entries, bodies, results, strict=True):
            if isinstance(result, StoreError) and entry.envelope.body != body:  # compaction moved it meanwhile
                found += await self._from_disk([entry])
            else:
                found.append(result)
        return found

    def _read(self, entries: list[Entry], bodies: list[Body | None]) -> list[list[bytes] | StoreError]:
        """Reader thread."""
        found: list[list[bytes] | StoreError] = []
        for entry, body in zip(entries, bodies, strict=True):
            data = entry.data
            try:
                if body is None:
                    raise StoreError(f"message {format_id(entry.ident)} has no body")
                found.append(data if data is not None else [self._segments.read(entry.ident, body)])
            except StoreError as error:
                found.append(error)
        return found

    async def stream(self, entry: Entry) -> AsyncIterator[bytes]:
        """The message data of a large message (its body is a file of its own), piece by piece, verified before the first one.
        StoreError when it is damaged or gone."""
        ident, body = entry.ident, entry.envelope.body
        if body is None or body.segment:
            raise StoreError(f"message {format_id(ident)} has no file of its own")
        opening = self._readers.submit(self._segments.open_big, ident, body)
        try:
            descriptor = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the thread still opens the file: close it then
            opening.add_done_callback(_close_opened)
            raise
        try:
            offset = body.offset + FRAME.size
            while piece := await self._readers.run(os.pread, descriptor, STREAM_PIECE, offset):
                offset += len(piece)
                yield piece
        finally:
            os.close(descriptor)


def _close_opened(opening: "asyncio.Future[int]") -> None:
    """Close the descriptor that a reader thread opened after its caller was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
