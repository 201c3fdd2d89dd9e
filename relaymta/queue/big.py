"""Large bodies: files of their own in `bodies/big`, named by the message's id, and who owns them.

A file belongs to its receiver from `make` to `submitted`, then to the queue: the writer removes it when the message could not be
stored, or after the commit that ended it. Whatever else happens (a receiver that was cancelled, a removal that failed), `sweep`
removes what has no message. Invariant: a file whose message is committed, or may be, is not removed.
"""

import os
import time
from pathlib import Path
from weakref import WeakValueDictionary

import xxhash

from relaymta.disk.segments import FRAME, MAGIC, MEGABYTE, Segments, digest_of
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.queue.store import Store

__all__ = ["BigBodies", "BigBody"]

SYNC_EVERY = 4 * MEGABYTE
ORPHAN_SECONDS = 3600  # that a file has not been written to, before a sweep removes it


class BigBody:
    """A large body that is streamed into a file of its own. Each method blocks: call it from a thread, one at a time."""

    def __init__(self, path: Path, ident: int, room: int = 0) -> None:
        """`room`: octets reserved in front of the body for what `finish` prepends."""
        self.path = path
        self.ident = ident
        self.length = 0
        self.submitted = False
        self._room = room
        self._synced = 0
        self._digest = xxhash.xxh3_64()
        self._fd = -1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.lseek(self._fd, room + FRAME.size, os.SEEK_SET)

    def write(self, buffers: list[bytes]) -> None:
        """Append `buffers`. OSError when they cannot be written."""
        for piece in buffers:
            self._digest.update(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(self._fd, view) :]
            self.length += len(piece)
        if self.length - self._synced > SYNC_EVERY:
            os.fdatasync(self._fd)  # a little at a time, so that the last sync does not delay the commits of others
            self._synced = self.length

    def finish(self, front: list[bytes]) -> Body:
        """Prepend `front`, sync the file and its directory; where the body lies. StoreError when `front` exceeds the room,
        OSError when it cannot be written; the file is removed then."""
        try:
            return self._finish(b"".join(front))
        except BaseException:
            self.discard()
            raise

    def _finish(self, first: bytes) -> Body:
        offset = self._room - len(first)
        if offset < 0:
            raise StoreError(f"{len(first)} octets do not fit in front of the body of {self.ident:016x}")
        os.pwrite(self._fd, first, offset + FRAME.size)
        self.length += len(first)
        checksum = self._digest.intdigest() if not first else digest_of(self._fd, offset + FRAME.size)[0]
        os.pwrite(self._fd, FRAME.pack(MAGIC, 1, self.ident, self.length, checksum), offset)
        os.fdatasync(self._fd)
        self._close()
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return Body(0, 1, offset, self.length)

    def discard(self) -> None:
        """Remove the file: the message was rejected, or its client disconnected. Once it was submitted the file is the queue's,
        and stays."""
        self._close()
        if not self.submitted:
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self._close()  # neither finished nor discarded: its receiver was cancelled


class BigBodies:
    """The large bodies of one shard that have no message yet."""

    def __init__(self, segments: Segments, store: Store) -> None:
        self._segments = segments
        self._store = store
        self._received: WeakValueDictionary[int, BigBody] = WeakValueDictionary()  # as long as a receiver has them
        self._submitted: set[int] = set()  # given to the writer, not committed yet

    def make(self, ident: int, room: int) -> BigBody:
        """A file for a large body, with `room` octets reserved in front of it. Blocks: called on a thread."""
        file = BigBody(self._segments.big_path(ident), ident, room)
        self._received[ident] = file
        return file

    def submitted(self, ident: int) -> None:
        """On the loop: the body is given to the writer."""
        file = self._received.get(ident)
        if file is not None:
            file.submitted = True
        self._submitted.add(ident)

    def settled(self, ident: int) -> None:
        """On the loop: its group was committed, or has failed."""
        self._submitted.discard(ident)

    def sweep(self, seconds: float = ORPHAN_SECONDS) -> None:
        """Reader thread: remove the files without a message that nobody receives or commits, and that were not written to for
        so long (0: whatever their age; at the start, when there are neither receivers nor a writer)."""
        before = time.time() - seconds
        # In this order: what is neither received nor submitted now is committed before the transaction begins, or never.
        left = [
            (ident, path)
            for ident, path in self._segments.big_files()
            if ident not in self._received and ident not in self._submitted and (not seconds or _written(path) < before)
        ]
        with self._store.reading() as txn:
            for ident, path in left:
                envelope = self._store.envelope(txn, ident)
                if envelope is None or envelope.body is None or envelope.body.segment:
                    path.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """When a file was written to last; in the future when it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")
