"""A shard as any process reads it: rows by LMDB, bodies from their files. No owner is asked.

A body may move while it is read (compaction), or its place may be used again: the frame does not match then, and the row is asked
once more. No read transaction is open while a file is read.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Protocol

from relaymta.disk.segments import Place, big_file, body_file, read_cached, read_frame, read_frames, segment_file
from relaymta.errors import StoreError
from relaymta.proto.envelope import Body
from relaymta.store.blocks import LAST_UID, Record
from relaymta.store.change import MISSING, Refusal
from relaymta.store.rows import MailShard, MessageRow

__all__ = ["Bodies", "Files", "Readable", "ShardReader", "body_of", "data_of", "pages"]

PAGE = 500  # messages of one read transaction


class Bodies(Protocol):
    """Where bodies are read from: the owner's open segments, or their files."""

    def read(self, ident: int, body: Body) -> bytes:
        """A message's data, verified. StoreError."""

    def read_now(self, ident: int, body: Body) -> bytes | None:
        """The same of a body in a segment, where nothing has to be waited for; else None."""

    def read_many(self, idents: Sequence[int], places: Sequence[Place]) -> list[bytes | None]:
        """The data of messages in segments, verified; None where it cannot be read there."""

    def big_path(self, ident: int) -> Path:
        """The file of a large body."""


class Files:
    """The files of a shard's bodies, whoever owns them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, ident: int, body: Body) -> bytes:
        """As of Bodies."""
        try:
            with body_file(self._directory, ident, body).open("rb", buffering=0) as file:
                return read_frame(file.fileno(), ident, body)
        except OSError as error:
            raise StoreError(f"cannot read the body of {ident:016x}: {error}") from error

    def read_now(self, ident: int, body: Body) -> bytes | None:
        """As of Bodies."""
        try:
            descriptor = os.open(body_file(self._directory, ident, body), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return read_cached(descriptor, ident, body)
        finally:
            os.close(descriptor)

    def read_many(self, idents: Sequence[int], places: Sequence[Place]) -> list[bytes | None]:
        """As of Bodies."""
        with ExitStack() as stack:

            @cache
            def descriptor_of(segment: int) -> int:
                path = segment_file(self._directory, segment)
                return stack.enter_context(path.open("rb", buffering=0)).fileno()

            return read_frames(descriptor_of, idents, places)

    def big_path(self, ident: int) -> Path:
        """As of Bodies."""
        return big_file(self._directory, ident)


class Readable(Protocol):
    """A shard that can be read: that of another process (ShardReader), or of this one (shard.Shard)."""

    rows: MailShard
    bodies: Bodies


class ShardReader:
    """The shard in `path`, which another process may own. `locked`: as of disk.environment.Environment. All methods block."""

    def __init__(self, path: Path, locked: bool = True) -> None:
        self.rows = MailShard(path / "lmdb", readonly=True, locked=locked)
        self.bodies: Bodies = Files(path / "bodies")

    def close(self) -> None:
        """Close the environment."""
        self.rows.close()


def data_of(rows: MailShard, bodies: Bodies, message: MessageRow) -> bytes:
    """A message, its prefix in front. Refusal when it is gone, StoreError when it cannot be read."""
    return message.prefix + body_of(rows, bodies, message.object)


def body_of(rows: MailShard, bodies: Bodies, ident: int) -> bytes:
    """The data of an object. Errors as of `data_of`."""
    before = None
    while True:
        with rows.reading() as txn:
            found = rows.object(txn, ident)
        if found is None:
            raise Refusal(MISSING, "the message has been expunged")
        try:
            return bodies.read(ident, found.body)
        except StoreError:
            if found.body == before:  # it was read where it lies
                raise
            before = found.body


def pages(rows: MailShard, mailbox: int, size: int = PAGE) -> Iterator[list[tuple[Record, MessageRow]]]:
    """The messages of a mailbox in the order of their UIDs, so many from one transaction. What is filed or expunged meanwhile is
    seen, or not."""
    after = 0
    while True:
        with rows.reading() as txn:
            records = list(islice(rows.index(txn, mailbox).range(after + 1, LAST_UID), size))
            found = [(record, row) for record in records if (row := rows.message(txn, mailbox, record.uid)) is not None]
        if not records:
            return
        yield found
        after = records[-1].uid
