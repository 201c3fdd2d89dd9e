"""Large bodies: each in a file of its own, named by the id of what it is the body of (Segments.big_path)."""

import errno
import os
import threading
from pathlib import Path
from typing import NamedTuple

import xxhash

from relaymta.disk.folders import remove_file, sync_folder
from relaymta.disk.segments import FRAME, MAGIC, MEGABYTE, Corrupt, check_frame, digest_of, read_frame, write_all
from relaymta.errors import StoreError, store_error
from relaymta.proto.envelope import Body

__all__ = ["BigBody", "BigFile", "copy_big", "opened_again", "read_big"]

SYNC_EVERY = 4 * MEGABYTE


class BigFile(NamedTuple):
    """A large body where it lies: the file, the id of what it is the body of, and the Body."""

    path: str
    ident: int
    body: Body


def read_big(source: BigFile) -> bytes:
    """The data of a large body, verified. Blocks. StoreError."""
    try:
        descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_frame(descriptor, source.ident, source.body)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(f"cannot read the body of {source.ident:016x}: {error}") from error


def copy_big(source: BigFile, path: Path, ident: int) -> Body:
    """Copy a large body into a file of another store, where it is the body of `ident`; without reading it into memory, and on a
    file system that can share octets between files without copying them. It is verified and synced. Blocks. StoreError: there is
    no copy."""
    try:
        descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"cannot read the body of {source.ident:016x}: {error}") from error
    try:
        return _copied(descriptor, source, path, ident)
    except FileExistsError as error:  # not made here
        raise store_error(error) from None
    except OSError as error:
        remove_file(path)
        raise store_error(error) from None
    except StoreError:
        remove_file(path)
        raise
    finally:
        os.close(descriptor)


def _copied(source: int, what: BigFile, path: Path, ident: int) -> Body:
    head, length = os.pread(source, FRAME.size, what.body.offset), what.body.length
    new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        place = 0
        while place < length:
            place += _copy_range(source, new, length - place, what.body.offset + FRAME.size + place, FRAME.size + place)
        checksum, found = digest_of(new, FRAME.size)
        check_frame(head, what.ident, what.body, found, checksum)
        write_all(new, [FRAME.pack(MAGIC, 1, ident, length, checksum)], 0)
        os.fdatasync(new)
    finally:
        os.close(new)
    sync_folder(path.parent)
    return Body(0, 1, 0, length)


def _copy_range(source: int, new: int, octets: int, offset: int, place: int) -> int:
    try:
        done = os.copy_file_range(source, new, octets, offset, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        done = os.pwrite(new, os.pread(source, min(octets, MEGABYTE), offset), place)
    if not done:
        raise Corrupt("a body is cut short")
    return done


def opened_again(descriptor: int) -> int:
    """A further descriptor of the same file, by which it can only be read. OSError."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


class BigBody:
    """A large body that is streamed into a file of its own. Each method blocks: call it from a thread, one at a time. Where
    `discard` is called in the middle of another one all the same, it waits, and what comes behind it is an OSError: nothing is
    written to a descriptor whose number another file may have by then."""

    def __init__(self, path: Path, ident: int, room: int = 0, generation: int = 1) -> None:
        """`room`: octets reserved in front of the body for what `finish` prepends; `generation`: which of the bodies that `ident`
        has one after the other."""
        self._generation = generation
        self.path = path
        self.ident = ident
        self.length = 0
        self.submitted = False
        self._room = room
        self._synced = 0
        self._digest = xxhash.xxh3_64()
        self._using = threading.Lock()  # of the descriptor, while others may close it; and of the name
        self._owns = True  # the file at `path`
        self._fd = -1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.lseek(self._fd, room + FRAME.size, os.SEEK_SET)

    def write(self, buffers: list[bytes]) -> None:
        """Append `buffers`. OSError when they cannot be written, also once it is closed."""
        with self._using:
            self._require_open()
            for piece in buffers:
                self._digest.update(piece)
                view = memoryview(piece)
                while view:
                    view = view[os.write(self._fd, view) :]
                self.length += len(piece)
            if self.length - self._synced > SYNC_EVERY:
                os.fdatasync(self._fd)  # a little at a time, so that the last sync does not delay the commits of others
                self._synced = self.length

    def piece(self, at: int, most: int) -> bytes:
        """At most `most` octets of what was written, from `at` on; before `finish`, from any thread and several at a time.
        OSError, also once it is closed."""
        with self._using:
            self._require_open()
            return os.pread(self._fd, max(min(most, self.length - at), 0), self._room + FRAME.size + at)

    def lend(self, at: int = 0) -> tuple[int, int]:
        """A further descriptor of the file, to read from only, which is the caller's to close, and where in it what was written
        begins, from `at` on; before `finish`, from any thread. OSError."""
        with self._using:
            self._require_open()
            return opened_again(self._fd), self._room + FRAME.size + at

    def read(self, skip: int = 0) -> list[bytes]:
        """All that was written, but for the first `skip` octets, in pieces; before `finish`. OSError."""
        pieces: list[bytes] = []
        place, left = self._room + FRAME.size + skip, self.length - skip
        while left:
            piece = os.pread(self._fd, min(left, MEGABYTE), place)
            if not piece:
                raise OSError(errno.EIO, f"{self.path} ends early")
            pieces.append(piece)
            place, left = place + len(piece), left - len(piece)
        return pieces

    def move(self, path: Path, ident: int) -> None:
        """From now on it is the file `path`, in the same folder, of the body of `ident`; what had that name is replaced. Before
        `finish`, which makes the name durable. OSError: it stays what it was."""
        with self._using:
            self._require_open()
            os.rename(self.path, path)
            self.path, self.ident = path, ident

    def finish(self, front: list[bytes], skip: int = 0) -> Body:
        """Write `front` in place of the first `skip` octets, sync the file and its directory; where the body lies. StoreError
        when `front` exceeds these and the room, OSError when it cannot be written; the file is removed then."""
        try:
            with self._using:
                self._require_open()
                return self._finish(b"".join(front), skip)
        except BaseException:
            self.discard()
            raise

    def _finish(self, first: bytes, skip: int) -> Body:
        offset = self._room + skip - len(first)
        if offset < 0:
            raise StoreError(f"{len(first)} octets do not fit in front of the body of {self.ident:016x}")
        write_all(self._fd, [first], offset + FRAME.size)
        self.length += len(first) - skip
        checksum = self._digest.intdigest() if not first and not skip else digest_of(self._fd, offset + FRAME.size)[0]
        write_all(self._fd, [FRAME.pack(MAGIC, self._generation, self.ident, self.length, checksum)], offset)
        os.fdatasync(self._fd)
        self._close()
        sync_folder(self.path.parent)
        return Body(0, self._generation, offset, self.length)

    def discard(self) -> None:
        """Remove the file: the message was rejected, or its client disconnected. Once it was submitted the file is the queue's,
        and stays. Further calls do nothing: what has its name by then is another body."""
        with self._using:
            self._close()
            if self._owns and not self.submitted:
                self._owns = False
                remove_file(self.path)

    def _require_open(self) -> None:
        if self._fd < 0:
            raise OSError(errno.EBADF, f"{self.path} is closed")

    def _close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self._close()  # neither finished nor discarded: its receiver was cancelled
