"""A message's data as operators see it, in pieces, verified before the first of them; and the Subject of many."""

import os
import time
from collections.abc import Callable, Generator

from relaymta.disk.segments import FRAME, Segments
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.proto.header import header_end
from relaymta.proto.subject import subject
from relaymta.queue.store import Store

__all__ = ["find", "pieces", "subjects"]

PIECE = 256 << 10
SECONDS = 0.05  # for the subjects of one answer
SUBJECT_SHOWN = 500  # characters

# All of it, or where it lies: a descriptor (the caller's to close) and the offset behind which the file holds nothing else.
Found = bytes | tuple[int, int]


def find(store: Store, segments: Segments, ident: int) -> Found | None:
    """A message's data in an open shard, verified; None when it is not there. StoreError when it is damaged. Blocks."""
    body: Body | None = None
    while True:
        with store.reading() as txn:
            envelope = store.envelope(txn, ident)
        if envelope is None or envelope.body is None:
            return None
        last = envelope.body == body
        body = envelope.body
        try:
            return segments.read(ident, body) if body.segment else (segments.open_big(ident, body), body.offset + FRAME.size)
        except StoreError:
            if last:
                raise  # else it may have moved or ended meanwhile: read its row again


def pieces(search: Callable[[], Found | None]) -> Generator[bytes, None, None]:
    """The message data that `search()` finds, at least one piece; no piece when that is None. Each step blocks; StoreError when
    the file cannot be read."""
    found = search()
    if isinstance(found, bytes):
        yield from (found[start : start + PIECE] for start in range(0, max(1, len(found)), PIECE))
    elif found is not None:
        descriptor, offset = found
        try:
            piece = os.pread(descriptor, PIECE, offset)
            yield piece
            while piece:
                offset += len(piece)
                piece = os.pread(descriptor, PIECE, offset)
                if piece:
                    yield piece
        except OSError as error:
            raise StoreError(f"cannot read the message: {error.strerror}") from None
        finally:
            os.close(descriptor)


def subjects(idents: list[int], search: Callable[[int], Found | None]) -> list[str | None]:
    """The Subject of each message, as far as SECONDS reach, of one at least; None: it is not there (any more), or is damaged.
    `search(ident)`: its message data. Blocks."""
    found: list[str | None] = []
    until = time.monotonic() + SECONDS
    for ident in idents:
        found.append(_subject(lambda ident=ident: search(ident)))  # type: ignore[misc]
        if time.monotonic() > until:
            break
    return found


def _subject(search: Callable[[], Found | None]) -> str | None:
    steps = pieces(search)
    try:
        first = next(steps, None)  # a header is shorter than a piece, or nothing behind that is looked at
    except StoreError:
        return None
    finally:
        steps.close()
    return None if first is None else subject(first[: header_end(first)], SUBJECT_SHOWN)
