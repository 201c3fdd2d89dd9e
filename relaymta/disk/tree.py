"""A file of LMDB, read page by page without LMDB: that maps the file, and is killed by a signal where it has been cut short, or
may follow a number that the disk has made up.

Format 1 of LMDB 0.9, of a machine with this byte order: two meta pages, of which the one with the later transaction counts, and
B+trees of branch and leaf pages, whose values may be runs of pages of their own (lmdb.h, mdb.c: MDB_page, MDB_node, MDB_db,
MDB_meta).
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["damage", "obstacle"]

MAGIC, FORMAT = 0xBEEFC0DE, 1
PAGE = struct.Struct("=QHHHH")  # number, (pad), flags, lower, upper
META = struct.Struct("=IIQQ")  # magic, format, address, size of the map
TABLE = struct.Struct(
    "=IHHQQQQQ"
)  # (pad: the page size, in the first of a meta page), flags, depth, pages of 3 kinds, entries, root
LAST = struct.Struct("=QQ")  # last page, transaction
NODE = struct.Struct("=HHHH")  # of a value its size, of a branch a page (with the flags); flags; size of the key
RUN = struct.Struct("=I")  # pages of a value, where `lower` is else
NUMBER = struct.Struct("=Q")
BRANCH, LEAF, OVERFLOW = 1, 2, 4
BIG, SUB = 1, 2  # flags of a node: its value has pages of its own, or is a TABLE
NONE = (1 << 64) - 1  # the root of an empty table
SIZES = (512, 65536)
DEPTH_MOST = 64


class _Table(NamedTuple):
    name: str
    depth: int
    entries: int
    root: int


class _Damaged(Exception):
    """A sentence."""


class _File:
    """An open file. _Damaged, from the constructor, too."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.octets = os.fstat(descriptor).st_size
        metas = [found for found in (self._meta(0, None), self._meta_of_any_size()) if found is not None]
        if not metas:
            raise _Damaged("neither of its meta pages can be read: it is overwritten, cut short, or no file of LMDB")
        self.size, tables, self.last, _ = max(metas, key=lambda meta: meta[3])
        self.tables = [_Table("(free pages)", *tables[0]), _Table("(names of tables)", *tables[1])]

    def _meta_of_any_size(self) -> "tuple[int, list[tuple[int, int, int]], int, int] | None":
        size = SIZES[0]
        while size <= SIZES[1]:
            found = self._meta(size, size)
            if found is not None:
                return found
            size *= 2
        return None

    def _meta(self, at: int, size: int | None) -> "tuple[int, list[tuple[int, int, int]], int, int] | None":
        """The meta page at an offset; `size`: that its pages must have."""
        raw = os.pread(self._descriptor, 16 + META.size + 2 * TABLE.size + LAST.size, at)
        if len(raw) < 16 + META.size + 2 * TABLE.size + LAST.size:
            return None
        magic, form, _, _ = META.unpack_from(raw, 16)
        free, main = (TABLE.unpack_from(raw, 16 + META.size + n * TABLE.size) for n in (0, 1))
        last, transaction = LAST.unpack_from(raw, 16 + META.size + 2 * TABLE.size)
        page = free[0]
        if magic != MAGIC or form & 0xFFFF != FORMAT or page not in _SIZES or (size is not None and page != size):
            return None
        return page, [(one[2], one[6], one[7]) for one in (free, main)], last, transaction

    def page(self, number: int, table: str) -> tuple[bytes, int, int]:
        """A page, its flags, and how many nodes it has."""
        raw = os.pread(self._descriptor, self.size, number * self.size)
        if len(raw) < self.size:
            raise _Damaged(
                f"it is cut short: page {number} of the table {table} is missing (it has {self.octets // self.size} pages)"
            )
        found, _, flags, lower, upper = PAGE.unpack_from(raw)
        kind = flags & (BRANCH | LEAF | OVERFLOW)
        if found != number or kind not in (BRANCH, LEAF) or not PAGE.size <= lower <= upper <= self.size or lower % 2:
            raise _Damaged(f"page {number} of the table {table} is overwritten")
        return raw, kind, (lower - PAGE.size) // 2

    def run(self, number: int, octets: int, table: str) -> None:
        """Check the pages of a large value."""
        raw = os.pread(self._descriptor, PAGE.size, number * self.size)
        pages = (octets + PAGE.size + self.size - 1) // self.size
        if len(raw) < PAGE.size or (number + pages) * self.size > self.octets:
            raise _Damaged(f"it is cut short: page {number + pages - 1} of the table {table} is missing")
        if PAGE.unpack_from(raw)[0] != number or not raw[10] & OVERFLOW or RUN.unpack_from(raw, 12)[0] != pages:
            raise _Damaged(f"page {number} of the table {table} is overwritten")


_SIZES = {512 << n for n in range(8)}


def _walk(file: _File, table: _Table, leaves: bool) -> Iterator[_Table]:
    """Check the pages of a table; the tables whose roots are in it. `leaves`: the leaf pages, too (they always are of a table of
    tables). _Damaged."""
    if table.root == NONE:
        if table.entries:
            raise _Damaged(f"the table {table.name} has {table.entries} rows and no page")
        return
    entries, waiting = 0, [(table.root, 1)]
    while waiting:
        number, depth = waiting.pop()
        if depth > min(table.depth, DEPTH_MOST):
            raise _Damaged(f"page {number} of the table {table.name} is where none should be")
        raw, kind, nodes = file.page(number, table.name)
        if (kind == LEAF) != (depth == table.depth):
            raise _Damaged(f"page {number} of the table {table.name} is overwritten")
        for at in struct.unpack_from(f"={nodes}H", raw, PAGE.size):
            if not PAGE.size + 2 * nodes <= at <= file.size - NODE.size:
                raise _Damaged(f"page {number} of the table {table.name} is overwritten")
            low, high, flags, key = NODE.unpack_from(raw, at)
            value = at + NODE.size + key
            if kind == BRANCH:
                child = low | high << 16 | flags << 32
                if leaves or depth + 1 < table.depth:
                    waiting.append((child, depth + 1))
                elif (child + 1) * file.size > file.octets:
                    raise _Damaged(f"it is cut short: page {child} of the table {table.name} is missing")
                continue
            entries += 1
            octets = low | high << 16
            inside = NUMBER.size if flags & BIG else octets
            if value + inside > file.size:
                raise _Damaged(f"page {number} of the table {table.name} is overwritten")
            if flags & BIG:
                file.run(NUMBER.unpack_from(raw, value)[0], octets, table.name)
            elif flags & SUB and octets == TABLE.size:
                found = TABLE.unpack_from(raw, value)
                name = raw[at + NODE.size : value].decode("ascii", "replace")
                yield _Table(name, found[2], found[6], found[7])
    if leaves and entries != table.entries:
        raise _Damaged(f"the table {table.name} has {entries} rows, and should have {table.entries}")


def _check(path: Path, leaves: bool, always: bool) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file = _File(descriptor)
        if not always and (file.last + 1) * file.size <= file.octets:
            return ""
        free, main = file.tables
        tables = list(_walk(file, main, True))
        list(_walk(file, free, leaves))
        for table in tables:
            list(_walk(file, table, leaves))
    except _Damaged as error:
        return str(error)
    finally:
        os.close(descriptor)
    return ""


def obstacle(path: Path) -> str:
    """Why a file of LMDB cannot be opened without harm, as a sentence: its meta pages are damaged, or it is cut short in front of
    a page that its tables have. "": it can be, as far as that is seen without reading all of it. OSError."""
    return _check(path, False, False)


def damage(path: Path) -> str:
    """As `obstacle`, of a file that nobody writes, each page of which is looked at: what is damaged first. OSError."""
    return _check(path, True, True)
