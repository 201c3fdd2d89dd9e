"""SORT and THREAD (RFC 5256): the messages that a search finds, with what they are sorted or threaded by, in slices on reader
threads. A message that cannot be read now is one without fields.
"""

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

from relaymta.proto.imap_command import Sort, Thread
from relaymta.proto.imap_program import Program
from relaymta.proto.imap_records import RECORD_SIZE, highest, joined, load, lower, numbers, runs, values
from relaymta.proto.imap_sort import Sorted
from relaymta.proto.imap_thread import Threads, shown
from relaymta.proto.imap_view import View
from relaymta.proto.mime_thread import thread_keys
from relaymta.store.change import LIMIT, Refusal
from relaymta.store.reading import Readable
from relaymta.view import reading, search
from relaymta.view.reader import Reader
from relaymta.view.reading import Message
from relaymta.view.selected import Selected

__all__ = ["sorted_", "threaded"]

TOGETHER: Final = 64  # messages that are read in one transaction
SECONDS: Final = 0.005  # of one slice
NODES_MOST: Final = 2_500_000  # messages of a THREAD, with those that they refer to and that are missing
PIECE: Final = 4096  # numbers of a piece of the response

Add = Callable[[Readable, Message], None]


async def sorted_(reader: Reader, selected: Selected, asked: Sort, program: Program) -> Iterable[bytes]:
    """The SORT response, in pieces. StoreError."""
    records, order = await _found(reader, selected, program), Sorted(asked.criteria)

    def add(shard: Readable, message: Message) -> None:
        described = search.described_of(shard, message) if order.needs_envelope else None
        order.add(b"" if described is None else described.envelope, message.row.date, message.row.size)

    there = await _added(reader, selected, records, add)
    modseq = highest(records) if asked.modseq else 0
    return await reader.access.search(reader.user, lambda: list(_sort_response(order, there, selected.view, asked.uid, modseq)))


def _sort_response(order: Sorted, there: bytes, view: View, by_uid: bool, modseq: int) -> Iterator[bytes]:
    names = values(there if by_uid else numbers(view.uids.data, there))
    yield b"* SORT"
    piece: list[bytes] = []
    for one in order.order():
        piece.append(b" %d" % names[one])
        if len(piece) >= PIECE:
            yield b"".join(piece)
            piece = []
    yield b"".join(piece) + (b" (MODSEQ %d)\r\n" % modseq if modseq and names else b"\r\n")  # RFC 7162 7


async def threaded(reader: Reader, selected: Selected, asked: Thread, program: Program) -> Iterable[bytes]:
    """The THREAD response, in pieces. Refusal (LIMIT), StoreError."""
    records, threads = await _found(reader, selected, program), Threads(asked.references)

    def add(shard: Readable, message: Message) -> None:
        described, keys = search.described_of(shard, message) or search.UNREADABLE, b""
        if asked.references:
            keys = described.thread or thread_keys(search.first_octets(shard, message, described.header_end) or b"")
        threads.add(described.envelope, message.row.date, keys)
        if threads.nodes > NODES_MOST:
            raise Refusal(LIMIT, "the messages refer to too many others")

    there = await _added(reader, selected, records, add)
    return await reader.access.search(reader.user, lambda: list(_thread_response(threads, there, selected.view, asked.uid)))


def _thread_response(threads: Threads, there: bytes, view: View, by_uid: bool) -> Iterator[bytes]:
    names = values(there if by_uid else numbers(view.uids.data, there))
    return shown(threads.forest(), names.__getitem__)


async def _found(reader: Reader, selected: Selected, program: Program) -> bytes:
    """The records of the messages that a search finds, packed."""
    found: list[bytes] = []
    after: int | None = 0
    while after is not None:
        matching, after = await search.slice_of(reader.access, selected, program, after)
        found += [matching] if matching else []
        await reader.pause()
    return joined(found) if found else b""


async def _added(reader: Reader, selected: Selected, records: bytes, add: Add) -> bytes:
    """Add all messages that are there, slice by slice; their UIDs, packed."""
    there = array("I")
    at = 0
    while at < len(records):
        at += await reader.access.search(reader.user, partial(_slice, selected, records, at, add, there))
        await reader.pause()
    return values(there.tobytes()).tobytes()


def _slice(selected: Selected, records: bytes, start: int, add: Add, there: "array[int]") -> int:
    """Reader thread: add messages while there is time; how many octets of the records that were."""
    until = time.monotonic() + SECONDS
    at = start
    first = True
    while at < len(records) and (first or time.monotonic() < until):
        part = records[at : at + TOGETHER * RECORD_SIZE]
        for message in reading.messages(selected.shard, selected.mailbox, runs(load([part]))):
            if not first and time.monotonic() >= until:
                return at + lower(load([part]), message.uid) * RECORD_SIZE - start
            add(selected.shard, message)
            there.append(message.uid)
            first = False
        at += len(part)
    return at - start
