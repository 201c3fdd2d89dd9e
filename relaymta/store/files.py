"""The mailboxes of a spool, or of a backup, as they are read from their files: by the command line, whether the relay runs or
not."""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lmdb

from relaymta.disk.shards import shard_numbers
from relaymta.errors import StoreError
from relaymta.store.directory import Directory, User
from relaymta.store.reading import ShardReader

__all__ = ["MailFiles", "import_all"]

PAGE = 1000


class MailFiles:
    """The mailboxes in `folder` (SPOOL/mail, or a backup). StoreError when they cannot be read; PermissionError. All methods
    block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[int, ShardReader] = {}
        if not (folder / "directory" / "data.mdb").exists():
            with suppress(FileNotFoundError):
                next(folder.parent.iterdir(), None)  # PermissionError, rather than that it is not there
            raise StoreError(f"{folder} has no mailboxes")
        self.directory = Directory(folder / "directory", locked=_has_lock(folder / "directory"))

    def __enter__(self) -> "MailFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self.directory.close()
        for reader in self._readers.values():
            reader.close()

    def shards(self) -> list[int]:
        """The numbers of the shards."""
        return [number for number in shard_numbers(self.folder) if (self._path(number) / "lmdb" / "data.mdb").exists()]

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def shard(self, number: int) -> ShardReader:
        """A shard. StoreError."""
        reader = self._readers.get(number)
        if reader is None:
            path = self._path(number)
            try:
                reader = self._readers[number] = ShardReader(path, locked=_has_lock(path / "lmdb"))
            except lmdb.Error as error:
                raise StoreError(f"{path}: {error}") from None
        return reader

    def users(self) -> Iterator[User]:
        """All users, by id."""
        after = 0
        while page := self.directory.users(after, PAGE):
            yield from page
            after = page[-1].ident


def import_all() -> None:
    """Have LMDB import what it needs to open a database, before root is dropped."""
    with suppress(OSError, lmdb.Error), tempfile.TemporaryDirectory() as folder:
        lmdb.open(folder).close()


def _has_lock(path: Path) -> bool:
    """Whether LMDB's table of readers is there: a daemon has had the environment open, and made it as the spool's owner."""
    return (path / "lock.mdb").exists()
