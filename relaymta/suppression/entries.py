"""The entries on disk: how they are stored, and what writers and readers of the command line do with them.

    entry   application NUL address -> reason, text, since, until, by      application "": of all mail
    text    a text -> its number                                            replies and names of operators: few, and repeated
    number  the number of a text -> the text
    count   application NUL reason -> how many entries; "limit" -> the most that there may be

An address is in the form in which addresses are compared (proto/address.py). Times are seconds UTC, of 32 bits.
"""

import functools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

import lmdb
import msgspec

from relaymta.disk.folders import make_folder, sync_folder
from relaymta.disk.tree import obstacle
from relaymta.errors import StoreError, StoreFull, store_error
from relaymta.proto.suppression import REASONS

__all__ = ["FOLDER", "MOST", "Changed", "Counts", "Entry", "Page", "Suppressions", "row_of"]

FOLDER: Final = "suppression"  # in the spool
MOST: Final = 2_000_000  # entries, unless it is said otherwise
MAP_SIZE: Final = 8 << 30  # sparse: costs address space only
READERS_MOST: Final = 1024  # of all processes at once
TEXT_MOST: Final = 100  # characters of a reply or note that are kept
BY_MOST: Final = 80  # of who has added an entry
TEXTS_MOST: Final = 10_000  # different texts that are stored once; further ones are stored with each entry
KEY_MOST: Final = 511  # octets, LMDB's
KEY_KEPT: Final = 400  # of a longer one: then comes its hash
FOREVER: Final = (1 << 32) - 1
TABLES: Final = ("entry", "text", "number", "count")
P = ParamSpec("P")
T = TypeVar("T")
_NUMBER = struct.Struct(">I")
_COUNT = struct.Struct("<q")
_DAMAGED: Final = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.IncompatibleError, lmdb.VersionMismatchError,
    lmdb.PanicError,
)  # fmt: skip
_LIMIT: Final = b"limit"  # its key in `count`: those of counts have a NUL in them


class Entry(NamedTuple):
    """One entry. `application`: whose mail alone, "": all mail; `reason`: one of REASONS; `text`: the reply, or a note; `until`:
    0: for ever; `by`: who has added it."""

    application: str
    address: str
    reason: str
    text: str
    since: int
    until: int
    by: str

    def holds(self, now: float) -> bool:
        """Whether it refuses mail at this time (seconds UTC)."""
        return not self.until or now < self.until


class Page(NamedTuple):
    """Entries in the order of their keys, and the key behind which to go on (b"": there are no more)."""

    entries: list[Entry]
    after: bytes


class Changed(NamedTuple):
    """What `put` has done with its entries. `left_out`: there was no room; `kept`: a better one was there."""

    added: int = 0
    replaced: int = 0
    kept: int = 0
    left_out: int = 0


class Counts(NamedTuple):
    """How many entries there are, expired ones that are not swept included: `each`, by (application, reason). `octets`: of the
    file."""

    entries: int
    most: int
    octets: int
    each: dict[tuple[str, str], int]

    def by_reason(self) -> dict[str, int]:
        """How many entries have each reason."""
        found = dict.fromkeys(REASONS, 0)
        for (_, reason), count in self.each.items():
            found[reason] = found.get(reason, 0) + count
        return found


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """The value of an entry. `text`, `by`: the number of a text, or the text itself; `whole`: the address, where the key has its
    hash."""

    reason: int
    text: int | str
    since: int
    until: int
    by: int | str
    whole: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Stored).decode


def row_of(entry: Entry) -> dict[str, Any]:
    """An entry as JSON has it."""
    return entry._asdict()


def key_of(application: str, address: str) -> bytes:
    """The key of an entry, of an address that is compared. One that is too long for LMDB is cut, and its hash appended: behind an
    octet that is in no UTF-8."""
    key = f"{application}\0{address}".encode("utf-8", "surrogateescape")
    return key if len(key) <= KEY_MOST else key[:KEY_KEPT] + b"\xff" + blake2b(key, digest_size=16).digest()


def read(txn: Any, tables: dict[str, Any], application: str, address: str) -> Entry | None:
    """The entry with these, within a transaction of `tables`. msgspec.DecodeError, ValueError: it is damaged."""
    raw = txn.get(key_of(application, address), db=tables["entry"])
    return None if raw is None else _entry(application, address, _decode(raw), lambda one: _text(txn, tables, one))


def _text(txn: Any, tables: dict[str, Any], stored: int | str) -> str:
    if isinstance(stored, str):
        return stored
    found = txn.get(_NUMBER.pack(stored), db=tables["number"])
    return "" if found is None else str(found, "utf-8", "replace")


def _entry(application: str, address: str, stored: _Stored, text: Callable[[int | str], str]) -> Entry:
    reason = REASONS[stored.reason] if 0 <= stored.reason < len(REASONS) else "manual"
    address = stored.whole or address
    return Entry(application, address, reason, text(stored.text), stored.since, stored.until, text(stored.by))


def _damage_told(method: Callable[Concatenate["Suppressions", P], T]) -> Callable[Concatenate["Suppressions", P], T]:
    """A method whose StoreError says what to do where rows or pages are damaged."""

    @functools.wraps(method)
    def told(self: "Suppressions", /, *args: P.args, **named: P.kwargs) -> T:
        try:
            return method(self, *args, **named)
        except (*_DAMAGED, msgspec.DecodeError, struct.error) as error:
            raise self.damaged(error) from None
        except lmdb.Error as error:
            raise _failure(error) from None

    return told


class Suppressions:
    """The list, to be read and written. Methods block, and may be called by one thread at a time; other processes may have it
    open. StoreError when the disk fails; from the constructor also where it is damaged. `most`: entries, from now on (0: as was
    said last)."""

    def __init__(self, path: Path, most: int = 0, map_size: int = MAP_SIZE) -> None:
        self._path = path
        file = path / "data.mdb"
        created = not file.exists()
        why = "" if created else obstacle(file)
        if why and obstacle(file):  # twice: another process may have written meanwhile
            raise StoreError(f"{file} is damaged: {why}: move this folder away, and import what was exported")
        try:
            make_folder(path)
            self._env = lmdb.open(
                str(path), map_size=map_size, max_dbs=len(TABLES), max_readers=READERS_MOST, mode=0o600, metasync=True, sync=True
            )  # fmt: skip
        except lmdb.Error as error:
            raise store_error(error) from None
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from None
        try:
            self._begin(created, most)
        except BaseException as error:
            self._env.close()  # else it could not be opened again in this process
            if isinstance(error, StoreError) or not isinstance(error, Exception):
                raise
            if isinstance(error, OSError):
                raise StoreError(f"{path}: {error.strerror or error}") from None
            if isinstance(error, lmdb.Error) and not isinstance(error, _DAMAGED):
                raise _failure(error) from None
            raise self.damaged(error) from None

    def _begin(self, created: bool, most: int) -> None:
        """Look at what was opened. Of a damaged list any exception."""
        self._env.reader_check()
        self._tables = {name: self._env.open_db(name.encode()) for name in TABLES}
        self._file = _identity(self._path)
        if created:
            sync_folder(self._path)
        if most not in (0, self.most):
            self.limit(most)

    def damaged(self, error: Exception) -> StoreError:
        """The error for rows or pages that cannot be read."""
        why = f"{self._path / 'data.mdb'} is damaged, or no suppression list ({error})"
        return StoreError(f"{why}: move this folder away, and import what was exported")

    def close(self) -> None:
        """Close it."""
        self._env.close()

    @property
    def replaced(self) -> bool:
        """Whether the file is not the one at its path any more: it was moved away, or another put in its place."""
        try:
            return _identity(self._path) != self._file
        except OSError:
            return True

    def limit(self, most: int) -> None:
        """There may be so many entries from now on; those that are there stay."""
        if self.most != most:
            with self._writing() as txn:
                txn.put(_LIMIT, _COUNT.pack(most), db=self._tables["count"])

    @property
    def most(self) -> int:
        """How many entries there may be."""
        with self._env.begin(db=self._tables["count"]) as txn:
            raw = txn.get(_LIMIT)
        return MOST if raw is None else int(_COUNT.unpack(raw)[0])

    def _writing(self) -> "_Writing":
        return _Writing(self._env)

    # Changes

    @_damage_told
    def put(self, entries: Sequence[Entry], yields: Callable[[Entry, Entry], bool] = lambda there, new: True) -> Changed:
        """Add entries, or replace those of the same application and address where `yields(there, new)`; in one transaction, which
        is on the disk on return. Addresses as of
        `listed`, reasons and times as of Entry. Beyond `most` entries new ones are left
        out; StoreFull: the map or the disk is full, and nothing is changed."""
        added = replaced = kept = left_out = 0
        with self._writing() as txn:
            table, change = self._tables["entry"], _Change(txn, self._tables)
            room = self.most_in(txn) - txn.stat(table)["entries"]
            for entry in entries:
                key = key_of(entry.application, entry.address)
                before = txn.get(key, db=table)
                if before is None and room <= 0:
                    left_out += 1
                    continue
                if before is not None:
                    there = change.entry(entry.application, entry.address, before)
                    if not yields(there, entry):
                        kept += 1
                        continue
                    change.count(there, -1)
                    replaced += 1
                else:
                    room -= 1
                    added += 1
                txn.put(key, change.stored(key, entry), db=table)
                change.count(entry, 1)
            change.finish()
        return Changed(added, replaced, kept, left_out)

    def most_in(self, txn: Any) -> int:
        """As `most`, within a transaction."""
        raw = txn.get(_LIMIT, db=self._tables["count"])
        return MOST if raw is None else int(_COUNT.unpack(raw)[0])

    @_damage_told
    def remove(self, addresses: Iterable[str], application: str | None = None) -> int:
        """Remove the entries of these addresses (as of `listed`): of an application ("": those about all mail), or (None) all.
        How many there were."""
        removed = 0
        with self._writing() as txn:
            change = _Change(txn, self._tables)
            names = self._applications(txn) if application is None else [application]
            for address in addresses:
                for name in names:
                    key = key_of(name, address)
                    raw = txn.pop(key, db=self._tables["entry"])
                    if raw is not None:
                        change.count(change.entry(name, address, raw), -1)
                        removed += 1
            change.finish()
        return removed

    @_damage_told
    def sweep(self, after: bytes, now: float, most: int) -> tuple[int, bytes]:
        """Remove the expired entries among `most` behind the key `after`: (how many, the key behind which to go on; b"": that was
        the last). It takes the lock for writers only where there is something to remove."""
        expired: list[bytes] = []
        looked, last = 0, b""
        with self._env.begin(db=self._tables["entry"]) as txn:
            for key, raw in _behind(txn.cursor(), after):
                looked, last = looked + 1, key
                if 0 < _decode(raw).until <= now:
                    expired.append(key)
                if looked == most:
                    break
        if expired:
            with self._writing() as txn:
                change = _Change(txn, self._tables)
                for key in expired:
                    raw = txn.get(key, db=self._tables["entry"])
                    if raw is not None and 0 < _decode(raw).until <= now:  # it may have been renewed meanwhile
                        txn.delete(key, db=self._tables["entry"])
                        change.count(change.entry(*_parted(key), raw), -1)
                change.finish()
        return len(expired), last if looked == most else b""

    def forget_dead_readers(self) -> None:
        """Let go of what processes that were killed while they read would have seen still."""
        self._env.reader_check()

    # Reading

    @_damage_told
    def find(self, address: str) -> list[Entry]:
        """The entries of an address (as of `listed`), of all applications, also expired ones."""
        with self._env.begin() as txn:
            found = (read(txn, self._tables, name, address) for name in self._applications(txn))
            return [entry for entry in found if entry is not None]

    @_damage_told
    def page(
        self, after: bytes, most: int, application: str | None = None, prefix: str = "", reason: str = "", looked_at: int = 20_000
    ) -> Page:
        """At most `most` entries behind the key `after`: of an application ("": those about all mail; None: any), of addresses
        that begin with `prefix` (in lower case), with this reason ("": any). It looks at `looked_at` entries at most: a page may
        be empty and not the last."""
        texts: dict[int, str] = {}
        found: list[Entry] = []
        with self._env.begin() as txn:

            def text(stored: int | str) -> str:
                if isinstance(stored, str):
                    return stored
                known = texts.get(stored)
                if known is None:
                    known = texts[stored] = _text(txn, self._tables, stored)
                return known

            names = self._applications(txn) if application is None else [application]
            at = 0
            for name in names:
                begin = f"{name}\0{prefix}".encode("utf-8", "surrogateescape")
                if after and not after.startswith(begin) and after > begin:
                    continue
                for key, raw in _behind(txn.cursor(db=self._tables["entry"]), after if after.startswith(begin) else b"", begin):
                    at += 1
                    entry = _entry(*_parted(key), _decode(raw), text)
                    if not reason or entry.reason == reason:
                        found.append(entry)
                    if len(found) == most or at == looked_at:
                        return Page(found, key)
        return Page(found, b"")

    @_damage_told
    def counts(self) -> Counts:
        """How many entries there are."""
        each: dict[tuple[str, str], int] = {}
        with self._env.begin() as txn:
            for key, raw in txn.cursor(db=self._tables["count"]):
                if key != _LIMIT and (count := _COUNT.unpack(raw)[0]):
                    name, _, reason = key.rpartition(b"\0")
                    each[name.decode("utf-8", "surrogateescape"), reason.decode()] = count
            entries = txn.stat(self._tables["entry"])["entries"]
        return Counts(entries, self.most, (self._path / "data.mdb").stat().st_size, each)

    def _applications(self, txn: Any) -> list[str]:
        """Those that have entries, "" first, in the order of their keys."""
        found, cursor, at = [], txn.cursor(db=self._tables["entry"]), b""
        while cursor.set_range(at):
            name = cursor.key().partition(b"\0")[0]
            found.append(name.decode("utf-8", "surrogateescape"))
            at = name + b"\1"
        return found


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path / "data.mdb")
    return found.st_dev, found.st_ino


def _behind(cursor: Any, after: bytes, begin: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """The rows behind a key (b"": all) whose keys begin so."""
    there = cursor.set_range(after or begin) if after or begin else cursor.first()
    if there and after and cursor.key() == after:
        there = cursor.next()
    while there and cursor.key().startswith(begin):
        yield cursor.key(), cursor.value()
        there = cursor.next()


def _parted(key: bytes) -> tuple[str, str]:
    """(application, address) of a key; of one with a hash the address is the row's (`_Stored.whole`)."""
    application, _, address = key.partition(b"\0")
    return application.decode("utf-8", "surrogateescape"), address.decode("utf-8", "replace")


class _Writing:
    """A write transaction within `with`. StoreError; StoreFull when the map or the disk is full."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __enter__(self) -> Any:
        try:
            self._txn = self._env.begin(write=True)
        except lmdb.MapResizedError:  # another program has a larger map
            self._env.set_mapsize(0)
            self._txn = self._env.begin(write=True)
        except lmdb.Error as error:
            raise _failure(error) from None
        return self._txn

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            try:
                self._txn.commit()
            except lmdb.Error as failed:
                self._txn.abort()
                raise _failure(failed) from None
            return
        self._txn.abort()
        if isinstance(error, lmdb.Error) and not isinstance(error, _DAMAGED):
            raise _failure(error) from None


def _failure(error: lmdb.Error) -> StoreError:
    return StoreFull("the map of the suppression list is full") if isinstance(error, lmdb.MapFullError) else store_error(error)


class _Change:
    """Part of a write transaction: texts by their numbers, and counts."""

    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn = txn
        self._tables = tables
        self._numbers: dict[str, int | str] = {}
        self._texts: dict[int, str] = {}
        self._counted: dict[bytes, int] = {}

    def entry(self, application: str, address: str, raw: bytes) -> Entry:
        """A stored entry."""
        return _entry(application, address, _decode(raw), self._text)

    def _text(self, stored: int | str) -> str:
        if isinstance(stored, str):
            return stored
        if stored not in self._texts:
            self._texts[stored] = _text(self._txn, self._tables, stored)
        return self._texts[stored]

    def stored(self, key: bytes, entry: Entry) -> bytes:
        """The value of an entry."""
        text, by = self._number(cut(entry.text, TEXT_MOST)), self._number(cut(entry.by, BY_MOST))
        since, until = min(max(entry.since, 0), FOREVER), min(max(entry.until, 0), FOREVER)
        return _encode(_Stored(REASONS.index(entry.reason), text, since, until, by, entry.address if b"\xff" in key else ""))

    def _number(self, text: str) -> int | str:
        """The number of a text, which it may get here; the text itself, where that is shorter or there are too many."""
        if not text:
            return ""
        known = self._numbers.get(text)
        if known is None:
            known = self._numbers[text] = self._numbered(text)
        return known

    def _numbered(self, text: str) -> int | str:
        octets = text.encode("utf-8", "replace")
        raw = self._txn.get(octets, db=self._tables["text"])
        if raw is not None:
            return int(_NUMBER.unpack(raw)[0])
        number = self._txn.stat(self._tables["text"])["entries"]
        if number >= TEXTS_MOST:
            return octets.decode()
        self._txn.put(octets, _NUMBER.pack(number), db=self._tables["text"])
        self._txn.put(_NUMBER.pack(number), octets, db=self._tables["number"])
        return int(number)

    def count(self, entry: Entry, more: int) -> None:
        """There are so many more entries like this one."""
        key = f"{entry.application}\0{entry.reason}".encode("utf-8", "surrogateescape")
        self._counted[key] = self._counted.get(key, 0) + more

    def finish(self) -> None:
        """Write the counts."""
        for key, more in self._counted.items():
            raw = self._txn.get(key, db=self._tables["count"])
            self._txn.put(key, _COUNT.pack(more + (0 if raw is None else _COUNT.unpack(raw)[0])), db=self._tables["count"])


def cut(text: str, most: int) -> str:
    """A text on one line, of at most so many characters, all of which can be printed."""
    clean = "".join(one if one.isprintable() else " " for one in text[: 4 * most])
    clean = " ".join(clean.split())
    return clean if len(clean) <= most else clean[: most - 3] + "..."
