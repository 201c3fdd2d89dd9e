"""Reading requests answered from the spool while no daemon runs: read-only, with each shard's lock held, as the spool's owner."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import xxhash

from relaymta.control.filters import Filter
from relaymta.control.requests import (
    REQUESTS,
    HistoryPiece,
    Messages,
    Nothing,
    OfMessage,
    Page,
    SuppressionOf,
    SuppressionPage,
    SuppressionPut,
    SuppressionRemove,
)
from relaymta.disk.clock import ShardClock
from relaymta.disk.environment import CURE
from relaymta.disk.lock import lock
from relaymta.disk.segments import FRAME, body_file, check_frame, read_frame
from relaymta.disk.shards import shard_numbers
from relaymta.disk.tree import obstacle
from relaymta.errors import RelayError, StoreError
from relaymta.history import history_files, history_piece
from relaymta.ident import format_id, parse_id
from relaymta.log import find_history
from relaymta.privileges import become, owner_of
from relaymta.proto.envelope import Body
from relaymta.queue import inspect, listing
from relaymta.queue.raw import PIECE, Found, pieces, subjects
from relaymta.queue.store import Store
from relaymta.suppression import FOLDER, Counts, Suppressions, address_of, counted, done, entries_of, row_of, rows_of
from relaymta.suppression import Page as SuppressionsPage

__all__ = ["answer", "import_all"]

T = TypeVar("T")


def answer(spool: Path, op: str, **args: Any) -> Any:
    """Answer a request of the table from the files: message data as an iterator of pieces, else as the daemon does. RelayError
    when only the daemon can answer, or an argument is wrong; SpoolBusy when a process owns a shard."""
    row = REQUESTS.get(op)
    if row is None or not row.offline:
        raise RelayError("the daemon is not running (start it with `relaymta serve`)")
    arguments = row.read(args)
    owner = owner_of(spool)
    if os.geteuid() == 0 != owner.pw_uid:  # the owner could not open lock files of root's
        import_all()
        become(owner)
    found = getattr(Spool(spool), op)(arguments)
    return found if row.merge is None else row.merge(found, arguments)


def import_all() -> None:
    """Have LMDB import what it needs to open a database, while root: the spool's owner may not be able to read our files. For the
    same reason no function of this module imports anything."""
    with contextlib.suppress(OSError, lmdb.Error), tempfile.TemporaryDirectory() as folder:
        lmdb.open(folder).close()


class Spool:
    """The files of one spool. A method for each request of the table that is answered offline; where the table merges answers, it
    returns one for each shard."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _numbers(self) -> list[int]:
        return [number for number in shard_numbers(self._path) if (self._path / f"shard-{number}" / "lmdb" / "data.mdb").exists()]

    def _opened(self, number: int, use: Callable[[Path, Store, ShardClock], Any]) -> Any:
        """`use(path, store, clock)` of one shard, opened and locked. RelayError when LMDB cannot read it."""
        path = self._path / f"shard-{number}"
        descriptor = lock(path)
        try:
            check(path / "lmdb" / "data.mdb")
            store = Store(path / "lmdb", readonly=True)
            try:
                return use(path, store, ShardClock(store.meta(b"seen")))
            finally:
                store.close()
        except lmdb.Error as error:
            raise RelayError(f"{path}: {error}") from None
        finally:
            os.close(descriptor)

    def _each(self, use: Callable[[Path, Store, ShardClock], Any]) -> list[Any]:
        return [self._opened(number, use) for number in self._numbers()]

    def _first(self, use: Callable[[Path, Store, ShardClock], Any]) -> Any:
        for number in self._numbers():
            found = self._opened(number, use)
            if found is not None:
                return found
        return None

    def shards(self, args: Nothing) -> list[int]:
        """The numbers of the shards."""
        return self._numbers()

    def summary(self, args: Nothing) -> list[Any]:
        """As `inspect.summary`, of each shard."""
        return self._each(lambda path, store, clock: inspect.summary(store, clock))

    def shape(self, args: Nothing) -> list[Any]:
        """As `inspect.shape`, of each shard."""
        return self._each(lambda path, store, clock: inspect.shape(store))

    def page(self, args: Page) -> Any:
        """As `listing.page`. RelayError for a site: only a worker knows which mail goes there."""
        wanted = Filter.of(args.chosen)
        if wanted.site:
            raise RelayError("the daemon is not running, and only the daemon knows which mail is for a site")

        def read(path: Path, store: Store, clock: ShardClock) -> dict[str, Any]:
            rows = inspect.chosen_queues(store, wanted, lambda name, site: False) if wanted.by_queue else None
            return listing.page(store, clock, None, wanted, args.after, rows)

        return self._opened(args.shard, read)

    def message(self, args: OfMessage) -> Any:
        """As `listing.message`."""
        ident = _number(args.ident)
        return self._first(lambda path, store, clock: listing.message(store, clock, None, ident))

    def raw(self, args: OfMessage) -> Iterator[bytes]:
        """The message's data in pieces; none when it is in no shard. The shard is locked until the first."""
        ident = _number(args.ident)
        return pieces(lambda: self._first(lambda path, store, clock: _find(path, store, ident)))

    def subjects(self, args: Messages) -> list[str | None]:
        """As `raw.subjects`."""
        return self._opened(args.shard, lambda path, store, clock: subjects(args.idents, partial(_find, path, store)))  # type: ignore[no-any-return]

    def history_files(self, args: Nothing) -> list[tuple[str, int]]:
        """As `history.history_files`."""
        return history_files(self._path / "history")

    def history_piece(self, args: HistoryPiece) -> bytes:
        """As `history.history_piece`."""
        return history_piece(self._path / "history", args.name, args.end)

    # The suppression list, which any process may change

    def _suppressions(self, use: Callable[[Suppressions], T], otherwise: T | None = None) -> T:
        """What `use` returns of the list; `otherwise` where there is none, which is made where that is None."""
        if otherwise is not None and not (self._path / FOLDER / "data.mdb").exists():
            return otherwise
        entries = Suppressions(self._path / FOLDER)
        try:
            return use(entries)
        finally:
            entries.close()

    def suppression_counts(self, args: Nothing) -> dict[str, Any]:
        """How many entries there are."""
        return self._suppressions(lambda entries: counted(entries.counts()), counted(Counts(0, 0, 0, {})))

    def suppression_find(self, args: SuppressionOf) -> list[dict[str, Any]]:
        """The entries of an address."""
        address = address_of(args.address)
        return self._suppressions(lambda entries: [row_of(one) for one in entries.find(address)], [])

    def suppression_page(self, args: SuppressionPage) -> dict[str, Any]:
        """A page of entries."""
        about = args.after, args.most, args.application, args.prefix, args.reason
        return self._suppressions(lambda entries: rows_of(entries.page(*about)), rows_of(SuppressionsPage([], b"")))

    def suppression_put(self, args: SuppressionPut) -> dict[str, int]:
        """Add entries."""
        added = entries_of(args.rows, "operator", {})
        return self._suppressions(lambda entries: done(entries.put(added)))

    def suppression_remove(self, args: SuppressionRemove) -> int:
        """Remove entries; how many."""
        addresses = list(map(address_of, args.addresses))
        return self._suppressions(lambda entries: entries.remove(addresses, args.application), 0)

    def history(self, args: OfMessage) -> list[dict[str, Any]]:
        """As `log.find_history`."""
        return find_history(self._path / "history", format_id(_number(args.ident)))


def check(file: Path) -> None:
    """StoreError when a file of LMDB that nobody writes is damaged so that LMDB would end the process."""
    why = obstacle(file)
    if why:
        raise StoreError(f"{file} is damaged: {why}: {CURE}")


def _number(ident: str) -> int:
    try:
        return parse_id(ident)
    except ValueError as error:
        raise RelayError(str(error)) from None


def _find(path: Path, store: Store, ident: int) -> Found | None:
    """As `raw.find`, without opening the shard's segments."""
    with store.env.begin() as txn:
        envelope = store.envelope(txn, ident)
    if envelope is None or envelope.body is None:
        return None
    body = envelope.body
    file = body_file(path / "bodies", ident, body)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from None
    try:
        return _verified(descriptor, ident, body)
    except BaseException:
        os.close(descriptor)
        raise


def _verified(descriptor: int, ident: int, body: Body) -> Found:
    if body.segment:
        data = read_frame(descriptor, ident, body)
        os.close(descriptor)
        return data
    head = os.pread(descriptor, FRAME.size, body.offset)
    start = body.offset + FRAME.size
    digest, length = xxhash.xxh3_64(), 0
    while piece := os.pread(descriptor, PIECE, start + length):
        digest.update(piece)
        length += len(piece)
    check_frame(head, ident, body, length, digest.intdigest())
    return descriptor, start
