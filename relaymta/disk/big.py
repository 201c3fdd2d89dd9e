"""Large bodies: each in a file of its own, named by the id of what it is the body of (Segments.big_path)."""

import os
from pathlib import Path

import xxhash

from relaymta.disk.segments import FRAME, MAGIC, MEGABYTE, digest_of
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body

__all__ = ["BigBody"]

SYNC_EVERY = 4 * MEGABYTE


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
