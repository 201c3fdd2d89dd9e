"""A journal beside a store: records that are there if and only if the change that they tell of was committed.

    journal/NNNNNNNN   a header, then frames: append-only, cut off into files of some megabytes, removed from the oldest on

The writer thread appends the records of a group before the store's transaction is committed, which records the end of the journal
(`END`, a row of the store). Nobody reads beyond that end: what a group that was not committed has left there is cut off, or
written over. A header says where the file before it ends, since a cut may have failed.

A sync for each group would cost mail a third of its throughput. So the transaction also has a copy of what was appended (the
*tail*, rows of the store beside `END`), which is durable with it; the file is synced once for many groups, and then their rows
are deleted. After a power cut the owner writes the tail into the file again, before anything else. (A process that is killed
takes nothing with it that it has written.)

Records are numbered by what they tell of (a record of several events counts for so many), whether they could be written or not:
the number goes on in the store. So whoever reads knows from a gap how many were dropped, for whatever reason: the disk was full,
the files were removed before they were read, or are damaged. A journal that cannot be written fails no group.
"""

import contextlib
import os
import re
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from relaymta.disk.folders import make_folder, remove_file, sync_folder
from relaymta.disk.segments import write_all

__all__ = ["END", "End", "Found", "JournalReader", "JournalWriter", "Piece", "Rows", "Written", "file_numbers", "remove_journal"]

FILE_MOST = 16 << 20  # octets of a file, but for one group that has more
FILE_LEAST = 64 << 10
FILES = 8  # into which what the journal may have is divided at least
AGAIN_SECONDS = 1.0  # after the disk has refused records
READ_LEAST = 64 << 10

HEADER = struct.Struct(">4sIQQQQQQ")  # magic, 0, file, its first number, born, the file before, its end, checksum of all before
FRAME = struct.Struct(">IIQQ")  # octets and count of a record, its number, xxh3-64 of it
END = struct.Struct(">QQQQQ")  # file, offset, next number; the file and offset up to which all is synced
TAIL = struct.Struct(">QQ")  # the key of a row of the tail: file, offset
ROW_OCTETS = 1900  # of the tail: LMDB keeps up to about 2,000 within a page
SYNC_OCTETS, SYNC_MS = 512 << 10, 5000  # what the tail has at most, and for how long, where there is more
MAGIC = b"rmJ1"
_NAME = re.compile("[0-9]{8,}")


class End(NamedTuple):
    """A place in a journal: what has this number and later is in this file at this offset, or in later ones. File 0: nothing was
    ever written."""

    file: int = 0
    offset: int = 0
    number: int = 0

    @classmethod
    def of(cls, row: bytes | None) -> "End":
        """From the row of a store; None: it has none."""
        return cls(*END.unpack(row)[:3]) if row else cls()


class Rows(NamedTuple):
    """What a store has of a journal: the row END, None: it has none; and the rows of its tail, by their keys."""

    end: bytes | None = None
    tail: Sequence[tuple[bytes, bytes]] = ()

    @property
    def synced(self) -> tuple[int, int]:
        """The file and offset up to which all is synced."""
        file, offset = END.unpack(self.end)[3:] if self.end else (0, 0)
        return file, offset


class Written(NamedTuple):
    """What a transaction has to do for a journal: the row END, rows of the tail to put, and keys of such to delete."""

    end: bytes
    put: list[tuple[bytes, bytes]]
    deleted: list[bytes]


class Header(NamedTuple):
    """Of a file: the number of its first record, when it was made (ms of the shard's clock), and the end of the file before."""

    number: int
    born: int
    before: int
    before_end: int


def journal_file(folder: Path, number: int) -> Path:
    """A file of a journal."""
    return folder / f"{number:08d}"


def file_numbers(folder: Path) -> list[int]:
    """The numbers of a journal's files, in order; also where there is no journal. OSError."""
    try:
        return sorted(int(name) for name in os.listdir(folder) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []


def remove_journal(folder: Path) -> None:
    """Remove all files of a journal, as far as that works."""
    with contextlib.suppress(OSError):
        for file in file_numbers(folder):
            remove_file(journal_file(folder, file))


def _packed(file: int, header: Header) -> bytes:
    fields = struct.pack(">4sIQQQQQ", MAGIC, 0, file, *header)
    return fields + xxhash.xxh3_64_digest(fields)


def read_header(folder: Path, file: int) -> Header | None:
    """A file's header; None: it is gone or damaged. OSError."""
    try:
        with journal_file(folder, file).open("rb") as opened:
            raw = opened.read(HEADER.size)
    except FileNotFoundError:
        return None
    if len(raw) < HEADER.size or raw[:4] != MAGIC or xxhash.xxh3_64_digest(raw[:-8]) != raw[-8:]:
        return None
    _, _, found, *fields, _ = HEADER.unpack(raw)
    return Header(*fields) if found == file else None


def _checksum(number: int, count: int, record: bytes) -> int:
    return xxhash.xxh3_64_intdigest(record, seed=(number << 20 ^ count) & (1 << 64) - 1)


class JournalWriter:
    """The write side, which belongs to the writer thread: `add` within a transaction, then `write` and, when its row is
    committed, `settle`, else `forget`; `sweep` now and then. Nothing here raises because of the disk.

    `rows`: as the store has them; `most`: octets that all files may have; `keep_ms`: for how long records are kept, by the
    shard's clock; `brim()`: whether nothing is to be written that can be spared. `dropped`: how many could not be written since
    the start, `error`: why the last could not. With a `most` of 0 records are only numbered, so that who reads later knows how
    many it lacks (these are not `dropped`)."""

    def __init__(
        self, folder: Path, rows: Rows, now: int, most: int, keep_ms: int, brim: Callable[[], bool] = lambda: False
    ) -> None:
        self._folder = folder
        self._brim = brim
        self.end = End.of(rows.end)
        self._synced = rows.synced
        self._tail = [key for key, _ in rows.tail]  # the keys of what is in the store
        self._unsynced = sum(len(value) for _, value in rows.tail)  # octets of these
        self._last_sync = now
        self._written = Written(b"", [], [])  # by the group under way
        self._syncs = False  # the group under way has synced the file
        self.dropped = 0
        self.error = ""
        self._next = self.end  # of the group under way
        self._lost = 0  # in the group under way
        self._staged: list[tuple[int, bytes]] = []
        self._fd = -1
        self._open = 0  # the file that is open
        self._made = 0  # the file that the group under way has made
        self._sealed = 0  # a file that is never written again, since a write or sync of it has failed
        self._again = 0.0  # when the disk is tried again (monotonic)
        self._born: dict[int, int] = {}  # files, in order: when they were made
        self._octets: dict[int, int] = {}
        self._last = now  # when there were records last
        self.configure(most, keep_ms)
        self._load(now)
        self._recover(rows)

    def configure(self, most: int, keep_ms: int) -> None:
        """Other bounds."""
        self._most, self._keep_ms = most, keep_ms
        self._file_most = max(FILE_LEAST, min(FILE_MOST, most // FILES))

    @property
    def keeps(self) -> bool:
        """Whether records are written, and not only numbered."""
        return self._most > 0

    def _load(self, now: int) -> None:
        """Look at the files, and remove those that were never committed."""
        with contextlib.suppress(OSError):
            for file in file_numbers(self._folder):
                if file > self.end.file:
                    remove_file(journal_file(self._folder, file))
                    continue
                header = read_header(self._folder, file)
                self._born[file] = min(now, header.born) if header is not None else now
                self._octets[file] = journal_file(self._folder, file).stat().st_size

    def _recover(self, rows: Rows) -> None:
        """Write the tail again: a power cut may have left anything in its place. It stays until the next sync. (Where this fails,
        who reads finds that it is damaged.)"""
        with contextlib.suppress(OSError):
            if self.end.file and self._reopened(rows.synced[1]):
                for key, value in rows.tail:
                    file, offset = TAIL.unpack(key)
                    if file == self._open and offset < self.end.offset:
                        write_all(self._fd, [value], offset)
                self._octets[self._open] = os.fstat(self._fd).st_size

    @property
    def octets(self) -> int:
        """Of all files."""
        return sum(self._octets.values())

    # A group

    def add(self, record: bytes, count: int = 1) -> None:
        """Stage a record that tells of `count` things."""
        self._staged.append((count, record))

    def mark(self) -> int:
        """What is staged so far, for `undo`."""
        return len(self._staged)

    def undo(self, mark: int) -> None:
        """Forget what was staged behind a mark."""
        del self._staged[mark:]

    def write(self, now: int) -> Written | None:
        """Write what is staged; what the transaction has to do, None: nothing was staged. Where the disk refuses it, it is
        dropped, and END says only how many there were."""
        staged, self._staged = self._staged, []
        if not staged:
            return None
        if not self.keeps:
            return self._numbered(sum(count for count, _ in staged))
        file, offset, number = self.end
        buffers = list[bytes]()
        for count, record in staged:
            buffers += [FRAME.pack(len(record), count, number, _checksum(number, count, record)), record]
            number += count
        data, self._syncs = b"".join(buffers), False
        synced, put, deleted = self._synced, list[tuple[bytes, bytes]](), list[bytes]()
        try:
            file, offset = self._put(data, now)
            if self._syncs:
                synced, deleted = (file, offset), self._tail
            else:
                starts = range(0, len(data), ROW_OCTETS)
                first = offset - len(data)
                put = [(TAIL.pack(file, first + at), data[at : at + ROW_OCTETS]) for at in starts]
        except OSError as error:
            self.error = error.strerror or str(error)
            self._lost = number - self.end.number
            self._syncs = False
            self._refused()
        self._next = End(file, offset, number)
        self._last = now
        self._written = Written(END.pack(*self._next, *synced), put, deleted)
        return self._written

    def _numbered(self, count: int) -> Written:
        """As `write`: so many are not kept."""
        self._next, self._syncs = self.end._replace(number=self.end.number + count), False
        self._written = Written(END.pack(*self._next, *self._synced), [], [])
        return self._written

    def _put(self, data: bytes, now: int) -> tuple[int, int]:
        """Write these octets, and sync the file if it is time; the file, and the offset behind them. OSError."""
        octets = len(data) + HEADER.size  # of a new file, if there is one
        if time.monotonic() < self._again:
            raise OSError(0, self.error)
        if self._brim():
            raise OSError(0, "the disk is nearly full")
        if octets > self._most // 2:
            raise OSError(0, "more at once than half of what the journal may have")
        self._make_room(octets)
        file, offset, _ = self.end
        fits = offset + octets <= self._file_most + HEADER.size or offset == HEADER.size
        if not (fits and file != self._sealed and self._reopened()):
            offset = self._begin_file(now)
            file = self._open
        offset += write_all(self._fd, [data], offset)
        if self._made or self._unsynced + len(data) >= SYNC_OCTETS or now - self._last_sync >= SYNC_MS:
            os.fdatasync(self._fd)
            self._syncs, self._last_sync = True, now
        if self._made:
            sync_folder(self._folder)
        self._octets[file] = offset
        return file, offset

    def _reopened(self, least: int = -1) -> bool:
        """Have the file that is written open; False: it is gone, or has less than `least` octets (-1: all that was committed)."""
        file, offset, _ = self.end
        if self._fd >= 0 and self._open == file:
            return True
        self._close()
        try:
            self._fd = os.open(journal_file(self._folder, file), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._open = file
        size = os.fstat(self._fd).st_size
        if size < (offset if least < 0 else least):
            self._close()
            return False
        if size > offset:
            os.ftruncate(self._fd, offset)
        return True

    def _begin_file(self, now: int) -> int:
        """Make the next file; the offset behind its header. OSError."""
        if self._tail and self.end.file != self._sealed and self._reopened():
            os.fdatasync(self._fd)  # the tail is deleted with this group
        self._close()
        file = self.end.file + 1
        make_folder(self._folder)
        self._fd = os.open(journal_file(self._folder, file), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._open = self._made = file
        self._born[file] = now
        self._octets[file] = HEADER.size
        return write_all(self._fd, [_packed(file, Header(self.end.number, now, self.end.file, self.end.offset))], 0)

    def _refused(self) -> None:
        """The disk has refused records: what was written of them is cut off. A file on which a write or sync has failed is not
        written again: Linux reports a writeback error once, and then marks the pages clean."""
        if time.monotonic() < self._again:
            return
        self._again = time.monotonic() + AGAIN_SECONDS
        if not self._made:
            self._sealed = self._open
        self._cut()
        self._remove_oldest()

    def settle(self) -> None:
        """What `write` has returned is committed."""
        self.end = self._next
        written, self._written = self._written, Written(b"", [], [])
        if self._syncs:
            self._tail, self._unsynced, self._syncs = [], 0, False
            self._synced = self.end.file, self.end.offset
        for key, value in written.put:
            self._tail.append(key)
            self._unsynced += len(value)
        self.dropped += self._lost
        self._lost = self._made = 0

    def forget(self, rows: Rows) -> None:
        """The commit has failed; the store has these rows now."""
        self._staged.clear()
        self._lost, self._syncs, self._written = 0, False, Written(b"", [], [])
        self._next = self.end = End.of(rows.end)
        self._synced, self._tail = rows.synced, [key for key, _ in rows.tail]
        self._unsynced = sum(len(value) for _, value in rows.tail)
        self._cut()

    def _cut(self) -> None:
        """Cut off what is not committed. (Where that fails, it is written over, or the next file's header tells the end.)"""
        if self._made and self._made > self.end.file:
            self._close()
            remove_file(journal_file(self._folder, self._made))
            self._born.pop(self._made, None)
            self._octets.pop(self._made, None)
        elif self._fd >= 0 and self._open == self.end.file:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.end.offset)
            self._octets[self._open] = self.end.offset
        self._made = 0

    # Bounds

    def _make_room(self, octets: int) -> None:
        while self._octets and self.octets + octets > self._most and self._remove_oldest():
            pass

    def _remove_oldest(self) -> bool:
        """Remove the oldest file, unless it is written."""
        file = next(iter(self._octets), self.end.file)
        if file >= self.end.file:
            return False
        remove_file(journal_file(self._folder, file))
        del self._octets[file], self._born[file]
        return True

    def sweep(self, now: int, spare: bool = False) -> None:
        """Remove the files whose records all are older than they are to be kept; `spare`: and one more, since there is no room on
        the disk. Also the file that is written, whose records are in no other: the next record begins a new one."""
        born = [*self._born.values()][1:]
        for until in born:
            if until > now - self._keep_ms or not self._remove_oldest():
                break
        if spare:
            self._remove_oldest()
        if len(self._octets) == 1 and self._last <= now - self._keep_ms:
            self.remove()
        self._make_room(0)

    def remove(self) -> None:
        """Remove all files. The numbers go on."""
        self._close()
        remove_journal(self._folder)
        self._born.clear()
        self._octets.clear()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._open = -1, 0

    def close(self) -> None:
        """Close the file that is open."""
        self._close()


class Found(NamedTuple):
    """A record: its number, how many `events` it counts for, where its frame is, and that frame's octets."""

    number: int
    events: int
    record: bytes
    file: int
    offset: int
    size: int

    def place(self, taken: int) -> End:
        """The place behind `taken` of the things that it tells of."""
        if taken < self.events:
            return End(self.file, self.offset, self.number + taken)
        return End(self.file, self.offset + self.size, self.number + self.events)


class Piece(NamedTuple):
    """`records`: in order; the first may begin before the place that was asked for. `place`: behind them. `dropped`: how many are
    there no more, or were never written, in all; `gaps`: by the number of the record before which (or of `place`). `start`: where
    reading began."""

    records: list[Found]
    place: End
    dropped: int
    gaps: dict[int, int]
    start: End


class JournalReader:
    """Reads the journal in a folder, in any process. Blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def oldest(self) -> End:
        """The first place that there is; End(): there are no files. OSError."""
        for file in file_numbers(self._folder):
            header = read_header(self._folder, file)
            if header is not None:
                return End(file, HEADER.size, header.number)
        return End()

    def starts(self, end: End) -> list[End]:
        """The first place of each file up to the committed `end`. OSError."""
        found = []
        for file in file_numbers(self._folder):
            header = read_header(self._folder, file) if file <= end.file else None
            if header is not None:
                found.append(End(file, HEADER.size, header.number))
        return found

    def read(self, place: End, end: End, most: int = 1 << 20, synced: tuple[int, int] = (1 << 63, 0)) -> Piece:
        """Records from `place` on, up to the committed `end`: about `most` octets, one at least where there is any. A place
        behind the end is of a journal that is there no more, such as after a backup was restored: reading begins with the oldest
        record that there is. What is damaged behind `synced` is waited for: its owner writes it again. OSError."""
        records: list[Found] = []
        gaps: dict[int, int] = {}
        if place.number > end.number or place.file > end.file:
            oldest = self.oldest()
            place = oldest if oldest.file and oldest.number < end.number else end
        start = place
        octets = 0
        while place.number < end.number and octets < most:
            found = self._frames(place, end, most - octets)
            for one in found:
                if one.number > place.number:
                    gaps[one.number] = one.number - place.number
                place = one.place(one.events)
                octets += one.size
            records += found
            if found:
                continue
            if (
                (place.file, place.offset) >= synced
                and place.file == end.file
                and place.offset < end.offset
                and self._is_there(place)
            ):
                break
            following = self._behind(place.file, end)
            number = end.number if following is None else max(following.number, place.number)
            if number > place.number:
                gaps[number] = gaps.get(number, 0) + number - place.number
            place = end if following is None else following._replace(number=number)
        return Piece(records, place, sum(gaps.values()), gaps, start)

    def _is_there(self, place: End) -> bool:
        return journal_file(self._folder, place.file).exists()

    def _behind(self, file: int, end: End) -> End | None:
        """The first place of the next file behind this one; None: there is none up to the end."""
        return next((one for one in self.starts(end) if one.file > file), None)

    def _limit(self, file: int, end: End) -> int:
        """The offset at which what was committed of a file ends."""
        if file == end.file:
            return end.offset
        following = next((number for number in file_numbers(self._folder) if file < number <= end.file), 0)
        header = read_header(self._folder, following) if following else None
        return header.before_end if header is not None and header.before == file else 1 << 62

    def _frames(self, place: End, end: End, most: int) -> list[Found]:
        """Whole frames from a place on, in its file; none at the end of that, and where it is gone or damaged. OSError."""
        limit = self._limit(place.file, end)
        if place.offset >= limit or not place.file:
            return []
        try:
            descriptor = os.open(journal_file(self._folder, place.file), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            data = os.pread(descriptor, min(limit - place.offset, max(most, READ_LEAST)), place.offset)
            if len(data) >= FRAME.size:
                whole = FRAME.size + FRAME.unpack_from(data)[0]
                if len(data) < whole <= limit - place.offset:
                    data = os.pread(descriptor, min(whole, os.fstat(descriptor).st_size), place.offset)
        finally:
            os.close(descriptor)
        return list(_parsed(data, place))


def _parsed(data: bytes, place: End) -> list[Found]:
    """The whole frames at the beginning of what lies at a place."""
    at, found, expected = 0, list[Found](), place.number
    while at + FRAME.size <= len(data):
        length, count, number, checksum = FRAME.unpack_from(data, at)
        record = data[at + FRAME.size : at + FRAME.size + length]
        if len(record) < length or number + count <= expected or _checksum(number, count, record) != checksum:
            break
        size = FRAME.size + length
        found.append(Found(number, count, record, place.file, place.offset + at, size))
        at, expected = at + size, number + count
    return found
