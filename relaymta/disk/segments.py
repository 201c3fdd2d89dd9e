"""Message bodies: append-only segment files, synced once for a whole group.

A segment file grows while it is filled for the first time and is then reused by overwriting: fdatasync of existing blocks costs
a third less than of new ones. (Filling segments with zeros ahead of need was tried: with a growing backlog, which reuses none,
it doubled what is written.) Each body is a *frame*: magic, segment generation, message id, length and xxh3 checksum, then the
message data. A frame is valid only when all of these match, so octets of a torn write or of an earlier use of the segment are
never taken for a message.

All methods but those that read belong to the writer thread. Appending has two steps, as the group commit has: `append`, `write`
and `sync` put the octets on disk, then `rows` returns the segment rows that LMDB commits; `settle` is called when that commit
has returned, `forget` when it failed. Invariant: space is reused only after `settle`, so after the commit that freed it.

A segment on which a write or sync failed is *sealed*: never written again, removed once it is empty. (Linux reports a
writeback error once and then marks the pages clean: a second fdatasync would report success.)
"""

import contextlib
import os
import re
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from relaymta.disk.folders import make_folder, remove_file
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body

__all__ = [
    "FRAME", "MAGIC", "Corrupt", "Place", "Segment", "Segments", "big_file", "body_file", "read_cached", "read_frames",
    "segment_file", "segment_size_for", "write_all",
]  # fmt: skip

FRAME = struct.Struct("<4sIQQQ")  # magic, generation, id, length, xxh3-64
MAGIC = b"rmB1"
MEGABYTE = 1 << 20
IOV_LIMIT = 512  # buffers per pwritev; IOV_MAX is 1024
FREE_MOST = 8  # emptied segments kept for reuse
BIG = MEGABYTE  # octets; a larger body is a file of its own
RUN, GAP = 256 << 10, 4 << 10  # octets that are read together, about, and between two bodies of them

HOT, COLD = 0, 1

T = TypeVar("T")
Place = tuple[int, int, int, int]  # of a body in a segment: segment, generation, offset, length

_IDENT = re.compile("[0-9a-f]{16}")


class Corrupt(StoreError):
    """A frame does not match the message's row: it is damaged, cut short, or another one."""


class SegmentRow(msgspec.Struct, array_like=True, gc=False):
    """A segment's row in LMDB: live bodies and their octets (frames included), and the offset at which appending goes on."""

    generation: int
    kind: int
    live: int
    live_bytes: int
    position: int
    sealed: bool = False


class Segment:
    """One open segment file; `staged` and `freed`: bodies added and released in the group under way."""

    __slots__ = ("fd", "freed", "freed_bytes", "number", "row", "staged", "staged_bytes")

    def __init__(self, number: int, fd: int, row: SegmentRow) -> None:
        self.number = number
        self.fd = fd
        self.row = row
        self.staged = self.staged_bytes = 0  # in the group under way
        self.freed = self.freed_bytes = 0


def segment_size_for(path: Path) -> int:
    """Octets of one segment on the file system of `path`: a 4096th of it, 1 to 64 MB, a power of two."""
    stats = os.statvfs(path)
    share = stats.f_frsize * stats.f_blocks // 4096
    size = MEGABYTE
    while size * 2 <= share and size < 64 * MEGABYTE:
        size *= 2
    return size


def segment_file(directory: Path, number: int) -> Path:
    """The file of a segment."""
    return directory / f"{number:08d}.seg"


def body_file(directory: Path, ident: int, body: Body) -> Path:
    """The file that a body is in. Large ones, but for the first of a message, have another name until a moment after the
    commit. OSError: as of `_has_frame`."""
    if body.segment:
        return segment_file(directory, body.segment)
    following = next_file(directory, ident)
    return following if body.generation > 1 and _has_frame(following, ident, body) else big_file(directory, ident)


def big_file(directory: Path, ident: int) -> Path:
    """The file of a large body."""
    return directory / "big" / f"{ident:016x}"


def next_file(directory: Path, ident: int) -> Path:
    """The file of a large body that is to take the place of another one of the same message."""
    return directory / "big" / f"{ident:016x}.next"


def _has_frame(path: Path, ident: int, body: Body) -> bool:
    """Whether a file has this large body, by its frame. OSError: it is there and cannot be read, such as without descriptors."""
    try:
        with path.open("rb") as file:
            magic, generation, found, length, _ = FRAME.unpack(os.pread(file.fileno(), FRAME.size, body.offset))
    except (FileNotFoundError, struct.error):
        return False
    return bool((magic, generation, found, length) == (MAGIC, body.generation, ident, body.length))


class Segments:
    """The bodies of one shard, in `directory`."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self.size = size
        self.big_limit = min(BIG, size - FRAME.size)
        self._big = directory / "big"
        make_folder(self._big)
        self._dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.lost: list[Path] = []
        self._segments: dict[int, Segment] = {}
        self._free: list[Segment] = []
        self._active: list[Segment | None] = [None, None]
        self._next = 1
        self._plan: dict[int, tuple[int, list[bytes]]] = {}  # what write() is to write: segment -> offset, buffers
        self._dirty: set[Segment] = set()  # written since the last sync
        self._changed: set[Segment] = set()  # whose LMDB row is to be written
        self._new_files = False
        self._doomed: list[Segment] = []  # emptied; removed by the next commit
        self._created: list[Segment] = []  # whose rows were in no transaction yet, not even in one that failed

    def load(self, rows: dict[int, SegmentRow]) -> None:
        """Open the segments that have a row in LMDB. Files without a row were never committed and are removed. A file that is
        lost (`lost`) costs the bodies that were in it: it is made anew, empty, and never written."""
        for number, row in rows.items():
            path = self._path(number)
            if not path.exists():
                self.lost.append(path)
                row.sealed = True
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            segment = self._segments[number] = Segment(number, fd, row)
            if row.live == 0:
                self._retire(segment)
        files = {int(path.stem): path for path in self._directory.glob("*.seg")}
        self._next = max([*rows, *files], default=0) + 1
        for number in files.keys() - rows.keys():
            remove_file(files[number])

    def close(self) -> None:
        """Close every file."""
        for segment in self._segments.values():
            os.close(segment.fd)
        os.close(self._dir_fd)

    def _path(self, number: int) -> Path:
        return segment_file(self._directory, number)

    def big_path(self, ident: int) -> Path:
        """The file of a body above 1 MB."""
        return big_file(self._directory, ident)

    def big_files(self) -> list[tuple[int, Path]]:
        """The ids and files of all bodies above 1 MB, those that are being written included."""
        return [(int(path.name, 16), path) for path in self._big.iterdir() if _IDENT.fullmatch(path.name)]

    def next_path(self, ident: int) -> Path:
        """The file of a body above 1 MB that is to take the place of another one of the same message: once that is committed."""
        return next_file(self._directory, ident)

    def next_files(self) -> list[tuple[int, Path]]:
        """The ids and files of these."""
        return [(int(path.stem, 16), path) for path in self._big.glob("*.next") if _IDENT.fullmatch(path.stem)]

    def take_place(self, ident: int) -> None:
        """What is in `next_path` is committed: it takes the place of what was there before. (Where that fails, a sweep does.)"""
        with contextlib.suppress(OSError):
            self.rename_next(ident)

    def rename_next(self, ident: int) -> None:
        """As `take_place`. OSError."""
        os.replace(self.next_path(ident), self.big_path(ident))

    def is_next(self, ident: int, body: Body) -> bool:
        """Whether `next_path` has the body that a message is committed with. OSError: it cannot be looked at."""
        return _has_frame(self.next_path(ident), ident, body)

    def remove_big(self, ident: int) -> None:
        """Remove the file of a large body that nothing points at. (One that cannot be removed is swept later.)"""
        remove_file(self.big_path(ident))

    # Writing: append -> sync -> rows -> settle | forget

    def append(self, ident: int, buffers: Sequence[bytes], length: int, kind: int) -> Body:
        """Stage a frame for `write`; where it will lie. `length`: octets of all `buffers`; `kind`: HOT or COLD. StoreError when
        it does not fit into a segment, OSError when no new one could be created."""
        need = FRAME.size + length
        segment = self._active[kind]
        if segment is None or segment.row.position + need > self.size:
            segment = self._open_segment(kind, need)
        if len(buffers) == 1:
            checksum = xxhash.xxh3_64_intdigest(buffers[0])
        else:
            digest = xxhash.xxh3_64()
            for piece in buffers:
                digest.update(piece)
            checksum = digest.intdigest()
        row = segment.row
        planned = self._plan.get(segment.number)
        if planned is None:
            planned = self._plan[segment.number] = (row.position, [])
        planned[1].append(FRAME.pack(MAGIC, row.generation, ident, length, checksum))
        planned[1].extend(buffers)
        body = Body(segment.number, row.generation, row.position, length)
        row.position += need
        segment.staged += 1
        segment.staged_bytes += need
        self._changed.add(segment)
        return body

    def write(self) -> None:
        """Write what `append` staged. OSError: the segment is sealed, and no body of the group may be committed."""
        while self._plan:
            number = next(iter(self._plan))
            offset, buffers = self._plan.pop(number)
            segment = self._segments[number]
            self._dirty.add(segment)
            try:
                for start in range(0, len(buffers), IOV_LIMIT):
                    offset += write_all(segment.fd, buffers[start : start + IOV_LIMIT], offset)
            except OSError:
                self._seal(segment)
                raise

    def sync(self) -> int:
        """Make the group's bodies, and the names of new files, durable; how many syncs it took. OSError: as of `write`."""
        syncs = 0
        while self._dirty:
            segment = self._dirty.pop()
            try:
                os.fdatasync(segment.fd)
            except OSError:
                self._seal(segment)
                raise
            syncs += 1
        if self._new_files:
            os.fsync(self._dir_fd)
            self._new_files = False
            syncs += 1
        return syncs

    def _seal(self, segment: Segment) -> None:
        """Never write to a segment again: a write or sync of it failed."""
        segment.row.sealed = True
        self._changed.add(segment)
        self._dirty.discard(segment)
        for kind in (HOT, COLD):
            if self._active[kind] is segment:
                self._active[kind] = None

    def release(self, body: Body) -> None:
        """Free a body in the group under way (not one in a file of its own)."""
        segment = self._segments[body.segment]
        segment.freed += 1
        segment.freed_bytes += FRAME.size + body.length
        self._changed.add(segment)

    def rows(self) -> list[tuple[int, SegmentRow]]:
        """(number, row) of the changed segments, as they are once this group is committed."""
        self._created.clear()
        return [
            (
                s.number,
                msgspec.structs.replace(
                    s.row,
                    live=s.row.live + s.staged - s.freed,
                    live_bytes=s.row.live_bytes + s.staged_bytes - s.freed_bytes,
                ),
            )
            for s in self._changed
        ]

    def settle(self) -> None:
        """The commit has returned: count what was staged and freed; emptied segments may be used again."""
        changed, self._changed = self._changed, set()
        for segment in changed:
            row = segment.row
            row.live += segment.staged - segment.freed
            row.live_bytes += segment.staged_bytes - segment.freed_bytes
            segment.staged = segment.staged_bytes = segment.freed = segment.freed_bytes = 0
            if row.live == 0 and segment not in self._active and segment not in self._free:
                self._retire(segment)

    def forget(self) -> None:
        """The commit failed: drop what was staged and freed (the space of bodies that were written stays used)."""
        for number, (offset, _) in self._plan.items():  # nothing of it was written: no gap, since a segment is read by its frames
            self._segments[number].row.position = offset
        self._plan = {}
        for segment in self._changed:
            segment.staged = segment.staged_bytes = segment.freed = segment.freed_bytes = 0
        # They stay in `_changed`: positions and seals are written by the next group.
        for segment in self._created:
            if segment.row.sealed:  # by its first write; or each attempt at a group would leave a file and a descriptor
                self._changed.discard(segment)
                self._dirty.discard(segment)
                del self._segments[segment.number]
                os.close(segment.fd)
                remove_file(self._path(segment.number))
        self._created = [segment for segment in self._created if not segment.row.sealed]

    def _retire(self, segment: Segment) -> None:
        """Keep an emptied segment for reuse, or remove it when it is sealed or enough are free."""
        if segment.row.sealed or len(self._free) >= FREE_MOST:
            self._doom(segment)
        else:
            self._free.append(segment)

    def _doom(self, segment: Segment) -> None:
        """From now on nothing is written about a segment but that its row is deleted, and nobody else retires it. (After a failed
        commit it may be both emptied and still changed.)"""
        self._doomed.append(segment)
        self._changed.discard(segment)
        self._dirty.discard(segment)

    def doomed(self) -> list[int]:
        """Segments whose rows this group deletes; call `unlink` after its commit."""
        return [segment.number for segment in self._doomed]

    def unlink(self) -> None:
        """Remove the files of the segments that `doomed` named; their rows are gone."""
        doomed, self._doomed = self._doomed, []
        for segment in doomed:
            del self._segments[segment.number]
            os.close(segment.fd)
            remove_file(self._path(segment.number))

    def _open_segment(self, kind: int, need: int) -> Segment:
        """Begin to append to another segment of this kind: an emptied one, or a new file."""
        if need > self.size:
            raise StoreError(f"a body of {need} octets does not fit into a segment of {self.size}")
        was = self._active[kind]
        self._active[kind] = None
        if was is not None and was.row.live == 0 and was.staged == 0 and was not in self._free:
            self._retire(was)
        if (emptied := self._reusable()) is not None:
            segment = emptied
            segment.row.generation += 1
            segment.row.position = 0
            segment.row.kind = kind
        else:
            segment = self._create_segment(kind)
        self._changed.add(segment)
        self._active[kind] = segment
        return segment

    def _reusable(self) -> Segment | None:
        """An emptied segment that may be overwritten: not one whose file has another name, which a backup has given it."""
        while self._free:
            segment = self._free.pop()
            if os.fstat(segment.fd).st_nlink == 1:
                return segment
            self._doom(segment)
        return None

    def _create_segment(self, kind: int) -> Segment:
        number = self._next
        self._next += 1
        path = self._path(number)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._new_files = True
        segment = self._segments[number] = Segment(number, fd, SegmentRow(1, kind, 0, 0, 0))
        self._created.append(segment)
        return segment

    # Reading, from any thread

    def read(self, ident: int, body: Body) -> bytes:
        """A message's data, verified. Corrupt when the frame does not match, StoreError when it cannot be read."""
        try:
            if body.segment:
                return read_frame(self._segments[body.segment].fd, ident, body)
            return self._at_its_place(ident, body, _read_file)
        except (OSError, KeyError) as error:
            raise StoreError(f"cannot read the body of {ident:016x}: {error}") from error

    def read_now(self, ident: int, body: Body) -> bytes | None:
        """As `read`, of a body in a segment; None where the disk would have to be waited for, or where it does not match."""
        segment = self._segments.get(body.segment)
        return None if segment is None else read_cached(segment.fd, ident, body)

    def read_many(self, idents: Sequence[int], places: Sequence[Place]) -> list[bytes | None]:
        """As `read_frames`."""
        return read_frames(lambda segment: self._segments[segment].fd, idents, places)

    def open_big(self, ident: int, body: Body) -> int:
        """As `open_verified`, of a large body's file."""
        try:
            return self._at_its_place(ident, body, open_verified)
        except OSError as error:
            raise StoreError(f"cannot read the body of {ident:016x}: {error}") from error

    def _at_its_place(self, ident: int, body: Body, use: Callable[[Path, int, Body], T]) -> T:
        """`use` the file of a large body; once more when it was given its name meanwhile."""
        path = self.body_path(ident, body)
        try:
            return use(path, ident, body)
        except (OSError, StoreError):
            moved = self.body_path(ident, body)
            if moved == path:
                raise
        return use(moved, ident, body)

    def body_path(self, ident: int, body: Body) -> Path:
        """As `body_file`. OSError."""
        return body_file(self._directory, ident, body)

    def movable(self, segment: Segment) -> bool:
        """Whether bodies may be moved out of a segment: it holds some, and nothing is appended to it."""
        return segment.row.live > 0 and segment not in self._active and self._segments.get(segment.number) is segment

    def closed(self) -> list[Segment]:
        """The segments that hold bodies and are not appended to."""
        return [segment for segment in list(self._segments.values()) if self.movable(segment)]

    # Totals

    def usage(self) -> tuple[int, int, int]:
        """(octets of the files, live octets, number of segments), without large bodies."""
        live = sum(s.row.live_bytes for s in list(self._segments.values()))
        return len(self._segments) * self.size, live, len(self._segments)


def digest_of(descriptor: int, offset: int) -> tuple[int, int]:
    """The checksum of a file's octets from `offset` on, and how many they are."""
    digest, length = xxhash.xxh3_64(), 0
    while piece := os.pread(descriptor, MEGABYTE, offset + length):
        digest.update(piece)
        length += len(piece)
    return digest.intdigest(), length


def write_all(fd: int, buffers: list[bytes], offset: int) -> int:
    """Write all of `buffers` at `offset` (on a nearly full disk a write may be short); how many octets they are. OSError."""
    total = sum(map(len, buffers))
    done = os.pwritev(fd, buffers, offset)
    if done != total:
        rest = memoryview(b"".join(buffers))
        while done < total:
            done += os.pwrite(fd, rest[done:], offset + done)
    return total


def _read_file(path: Path, ident: int, body: Body) -> bytes:
    with path.open("rb") as file:
        return read_frame(file.fileno(), ident, body)


def open_verified(path: Path, ident: int, body: Body) -> int:
    """A descriptor of a large body's file, which is read and verified first (message data begins at the body's offset +
    FRAME.size). Corrupt when it does not match, StoreError when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"cannot read the body of {ident:016x}: {error}") from error
    try:
        digest, length = digest_of(descriptor, body.offset + FRAME.size)
        check_frame(os.pread(descriptor, FRAME.size, body.offset), ident, body, length, digest)
    except OSError as error:
        os.close(descriptor)
        raise StoreError(f"cannot read the body of {ident:016x}: {error}") from error
    except Corrupt:
        os.close(descriptor)
        raise
    return descriptor


def read_frame(descriptor: int, ident: int, body: Body) -> bytes:
    """The message data of a body, verified, from its file. Corrupt when the frame does not match, OSError."""
    head = os.pread(descriptor, FRAME.size, body.offset)
    data = os.pread(descriptor, body.length, body.offset + FRAME.size)
    check_frame(head, ident, body, len(data), xxhash.xxh3_64_intdigest(data))
    return data


def read_cached(descriptor: int, ident: int, body: Body) -> bytes | None:
    """The message data of a body, verified, where the page cache has it (some microseconds); None where it has not, where the
    file system cannot tell, or where the frame does not match."""
    frame = bytearray(FRAME.size + body.length)
    try:
        if os.preadv(descriptor, [frame], body.offset, os.RWF_NOWAIT) != len(frame):
            return None
        data = bytes(memoryview(frame)[FRAME.size :])
        check_frame(frame[: FRAME.size], ident, body, len(data), xxhash.xxh3_64_intdigest(data))
    except (OSError, Corrupt):
        return None
    return data


def read_frames(descriptor_of: Callable[[int], int], idents: Sequence[int], places: Sequence[Place]) -> list[bytes | None]:
    """The message data of bodies in segments, verified; None where it cannot be read, or where the frame does not match. Those
    that lie behind each other are read together. `descriptor_of(segment)`: OSError, KeyError: there is none."""
    found: list[bytes | None] = []
    while (first := len(found)) < len(places):
        segment, _, start, length = places[first]
        last, end = first + 1, start + FRAME.size + length
        for other, _, offset, length in islice(places, last, None):
            if other != segment or not end <= offset <= end + GAP or end - start > RUN:
                break
            last, end = last + 1, offset + FRAME.size + length
        try:
            run = os.pread(descriptor_of(segment), end - start, start)
        except (OSError, KeyError):
            run = b""
        for ident, (_, generation, offset, length) in zip(idents[first:last], islice(places, first, last), strict=True):
            at = offset - start
            data = run[at + FRAME.size : at + FRAME.size + length]
            frame = FRAME.pack(MAGIC, generation, ident, length, xxhash.xxh3_64_intdigest(data))
            found.append(data if run.startswith(frame, at) else None)
    return found


def check_frame(raw: bytes | bytearray, ident: int, body: Body, length: int, checksum: int) -> None:
    """Raise Corrupt unless the frame header `raw` belongs to this message and matches its data's length and checksum."""
    if len(raw) != FRAME.size:
        raise Corrupt(f"the body of {ident:016x} is cut short")
    magic, generation, owner, announced, expected = FRAME.unpack(raw)
    if magic != MAGIC or generation != body.generation or owner != ident:
        raise Corrupt(f"the body of {ident:016x} is not where its row says")
    if announced != length or expected != checksum:
        raise Corrupt(f"the body of {ident:016x} does not match its checksum")
