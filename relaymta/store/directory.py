"""Who has a mailbox: users, the addresses and aliases that lead to them, and the shard in which each is kept.

    user     id             User
    address  address        Address: of a user, or an alias of other addresses; "@domain" is a catch-all
    own      user, address  the addresses of a user
    meta     word           schema, highest id

One process writes (the supervisor), each change in a synced transaction of its own; every process reads. Addresses are as
`proto.address.comparable` writes them: lower case, domains in A-labels. Invariant: a user's own address leads to that user, and
an address is there once.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import lmdb
import msgspec

from relaymta.disk.folders import make_folder
from relaymta.errors import Exists, NoSuch, RelayError, StoreError, near, store_error
from relaymta.proto.address import comparable, domain_of

__all__ = ["REMOVING", "Address", "Directory", "Found", "User", "Version", "row_of"]

SCHEMA = 1
_MAP_SIZE = 8 << 30
REMOVING = 1  # User.deleted of one who does not come back
DEEPEST = 10  # aliases of aliases
TARGETS_MOST = 1000  # addresses of one alias
ADDRESSES_MOST = 5000  # that an alias leads to in all, aliases on the way included
FOUND_MOST = 20_000  # looked up addresses in memory
LIKE_MOST = 10_000  # addresses that a wrong one is compared with
_KEY_MOST = 500  # octets of an address: LMDB's keys have 511
_ID = struct.Struct(">Q")


class User(msgspec.Struct, array_like=True, frozen=True):
    """A user. `address`: the name to log in with, which is one of the addresses. `octets`, `messages`: quota, 0: that of the
    configuration, -1: none. `secret`: as of `auth.passwords`, "": an authentication back end knows it. `deleted`: since when
    (ms, wall clock), 0: it is not. `moving`: the shard to which it is being moved, -1: none. `moves`: how often it has been
    moved: the mailboxes have other numbers then, also where it is back in a shard."""

    ident: int
    address: str
    shard: int
    octets: int = 0
    messages: int = 0
    secret: str = ""
    disabled: bool = False
    deleted: int = 0
    moving: int = -1
    moves: int = 0


def row_of(user: User) -> dict[str, Any]:
    """A user as the command line shows one."""
    state = "deleted" if user.deleted else "disabled" if user.disabled else "moving" if user.moving >= 0 else "active"
    return {
        "id": user.ident, "user": user.address, "state": state, "shard": user.shard, "quota": user.octets,
        "messages quota": user.messages, "login": "password" if user.secret else "back end",
    }  # fmt: skip


class Address(msgspec.Struct, array_like=True, frozen=True):
    """What an address leads to: a user, or (0) other addresses."""

    user: int
    targets: list[str] = []


class Found(msgspec.Struct, frozen=True):
    """Where mail for an address goes: to users, and to addresses that others keep."""

    users: list[User]
    others: list[str]


_encode = msgspec.msgpack.Encoder().encode
_decode_user = msgspec.msgpack.Decoder(User).decode
_decode_address = msgspec.msgpack.Decoder(Address).decode
_NO_USER: Final = 0  # the octet behind the array's first of an Address without a user (MessagePack)


class Version(Protocol):
    """The number of changes of the directory, in memory that all processes share (shm)."""

    def get(self, index: int) -> int:
        """Cell 0."""

    def add(self, index: int, n: int) -> int:
        """Add to cell 0."""


class Directory:
    """The directory in `path`. `writable`: this is the one process that changes it; `locked`: as of disk.environment.Environment;
    `version`: raised by each change, so that what others have in memory is looked up again. All methods block: some microseconds
    where they read, until the disk has it where they write. StoreError."""

    def __init__(self, path: Path, writable: bool = False, locked: bool = True, version: Version | None = None) -> None:
        self._version = version
        self._found: dict[tuple[str, str], Found | None] = {}  # by `find` since the version `_found_at`
        self._found_at = -1
        try:
            if writable:
                make_folder(path)
            self._env = lmdb.open(
                str(path), map_size=_MAP_SIZE, max_dbs=4, max_readers=1024, mode=0o600, readonly=not writable, lock=locked
            )
            if locked:
                self._env.reader_check()
            self._users, self._addresses, self._own, self._meta = (
                self._env.open_db(name, create=writable) for name in (b"user", b"address", b"own", b"meta")
            )
            self._check_schema(path, writable)
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from None

    def _check_schema(self, path: Path, writable: bool) -> None:
        with self._env.begin(write=writable) as txn:
            schema = int(txn.get(b"schema", b"0", db=self._meta))
            if schema > SCHEMA:
                raise StoreError(f"{path} was written by a newer relaymta (directory schema {schema}, not {SCHEMA})")
            if writable and schema != SCHEMA:
                txn.put(b"schema", str(SCHEMA).encode(), db=self._meta)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def copy(self, folder: Path) -> None:
        """Copy the directory, as it is at one moment, into a folder that is not there."""
        try:
            folder.mkdir(mode=0o700, parents=True)
            self._env.copy(str(folder), compact=True)
        except (OSError, lmdb.Error) as error:
            raise store_error(error) from None

    # Reading

    @property
    def version(self) -> int:
        """The number of changes so far; -1 where that is not known."""
        return self._version.get(0) if self._version is not None else -1

    def find(self, recipient: str, separator: str = "") -> Found | None:
        """As `look_up`, from memory where nothing has changed since the last time."""
        if self._version is None:
            return self.look_up(recipient, separator)
        now = self._version.get(0)  # before the look: what is committed meanwhile is looked up again
        if now != self._found_at or len(self._found) > FOUND_MOST:
            self._found.clear()
            self._found_at = now
        key = recipient, separator
        if key not in self._found:
            self._found[key] = self.look_up(recipient, separator)
        return self._found[key]

    def look_up(self, recipient: str, separator: str = "") -> Found | None:
        """Where mail for a recipient goes; None when nobody has the address. Looked for in this order: the address itself;
        without the detail behind `separator`; the catch-all of its domain. RelayError when an alias leads to nobody, too deep or
        to too many."""
        address = comparable(recipient)
        users: dict[int, User] = {}
        others: dict[str, None] = {}
        try:
            with self._env.begin() as txn:
                self._walk(txn, address, separator, users, others)
        except lmdb.Error as error:
            raise store_error(error) from None
        if address in others:
            return None
        if not users and not others:
            raise RelayError(f"the alias {address} leads to nobody")
        return Found(list(users.values()), list(others))

    def _walk(self, txn: Any, address: str, separator: str, users: dict[int, User], others: dict[str, None]) -> list[str]:
        """Add the users and other addresses that an address leads to, level by level, each address once. The path on which it
        leads back to itself; empty when it does not. RelayError beyond the bounds."""
        start = self._match(txn, address, separator)
        parents, level = {address: ""}, [address]
        circle: list[str] = []
        for _ in range(DEEPEST + 1):
            below: list[str] = []
            for one in level:
                found = start if one == address else self._match(txn, one, separator)
                if found is None:
                    others[one] = None
                elif one != address and start is not None and found[0] == start[0]:
                    circle = circle or _path(parents, one)
                elif found[1].user:
                    user = self._user(txn, found[1].user)
                    if user is not None:
                        users[user.ident] = user
                else:
                    if address in found[1].targets:
                        circle = circle or _path(parents, one)
                    new = [target for target in found[1].targets if target not in parents]
                    parents |= dict.fromkeys(new, one)
                    below += new
            if len(parents) > ADDRESSES_MOST:
                raise RelayError(f"the alias {address} leads to more than {ADDRESSES_MOST} addresses")
            if not below:
                return circle
            level = below
        raise RelayError(f"the alias {address} leads to others more than {DEEPEST} deep")

    def _match(self, txn: Any, address: str, separator: str) -> tuple[bytes, Address] | None:
        """The row that mail for an address finds, and its key."""
        local, at, domain = address.rpartition("@")
        tried = [address]
        if separator and separator in local.lstrip(separator):
            tried.append(local[: local.index(separator, 1)] + at + domain)
        tried.append(at + domain)
        for form in tried:
            key = form.encode("utf-8", "surrogateescape")
            raw = txn.get(key, db=self._addresses) if key and len(key) <= _KEY_MOST else None
            if raw is not None:
                return key, _decode_address(raw)
        return None

    def _user(self, txn: Any, ident: int) -> User | None:
        raw = txn.get(_ID.pack(ident), db=self._users)
        return None if raw is None else _decode_user(raw)

    def user(self, ident: int) -> User | None:
        """A user by id."""
        with self._env.begin() as txn:
            return self._user(txn, ident)

    def known(self, address: str) -> User:
        """A user by name. NoSuch."""
        with self._env.begin() as txn:
            user = self._named(txn, comparable(address))
            if user is None:
                raise self._unknown(txn, comparable(address))
            return user

    def named(self, address: str) -> User | None:
        """A user by the address that is the user's name: not by an alias or a catch-all."""
        with self._env.begin() as txn:
            return self._named(txn, comparable(address))

    def _named(self, txn: Any, address: str) -> User | None:
        found = self._address(txn, address)
        user = self._user(txn, found.user) if found is not None and found.user else None
        return user if user is not None and user.address == address else None

    def _address(self, txn: Any, address: str) -> Address | None:
        key = address.encode()
        raw = txn.get(key, db=self._addresses) if 0 < len(key) <= _KEY_MOST else None
        return None if raw is None else _decode_address(raw)

    def owner(self, address: str) -> tuple[User, tuple[str, ...]] | None:
        """The user who has an address (not by way of other addresses, a detail or a catch-all), and all addresses of the user."""
        with self._env.begin() as txn:
            found = self._address(txn, comparable(address))
            user = self._user(txn, found.user) if found is not None and found.user else None
            return None if user is None else (user, tuple(self._owned(txn, user.ident)))

    def users(self, after: int = 0, most: int = 1000) -> list[User]:
        """A page of the users behind the id `after`, in the order of their ids."""
        with self._env.begin() as txn:
            cursor = txn.cursor(db=self._users)
            found: list[User] = []
            if cursor.set_range(_ID.pack(after + 1)):
                for raw in cursor.iternext(keys=False):
                    found.append(_decode_user(raw))
                    if len(found) == most:
                        break
            return found

    def known_idents(self, idents: Iterable[int]) -> set[int]:
        """Those of some ids that are users'."""
        with self._env.begin() as txn:
            return {ident for ident in idents if txn.get(_ID.pack(ident), db=self._users) is not None}

    def addresses(self, after: str = "", most: int = 1000) -> list[tuple[str, Address]]:
        """A page of the addresses behind `after`, in their order."""
        with self._env.begin() as txn:
            cursor = txn.cursor(db=self._addresses)
            found: list[tuple[str, Address]] = []
            if cursor.set_range(after.encode() + b"\0"):
                for key, raw in cursor:
                    found.append((key.decode(), _decode_address(raw)))
                    if len(found) == most:
                        break
            return found

    def count(self) -> int:
        """The number of users."""
        with self._env.begin() as txn:
            return int(txn.stat(self._users)["entries"])

    # Writing

    def _write(self, change: Callable[[Any], Any]) -> Any:
        try:
            with self._env.begin(write=True) as txn:
                return change(txn)
        except lmdb.Error as error:
            raise store_error(error) from None
        finally:
            if self._version is not None:
                self._version.add(0, 1)

    def highest(self) -> int:
        """The highest id of a user so far."""
        with self._env.begin() as txn:
            return int(txn.get(b"highest", b"0", db=self._meta))

    def raise_uidvalidity(self, least: int) -> int:
        """The UIDVALIDITY of a new user's first mailbox: `least` or higher, and higher than all that removed users have had."""

        def change(txn: Any) -> int:
            found = max(least, int(txn.get(b"uidvalidity", b"0", db=self._meta)))
            txn.put(b"uidvalidity", str(found).encode(), db=self._meta)
            return found

        return int(self._write(change))

    def give(self, ident: int, address: str) -> None:
        """Let an address that nobody has lead to a user. RelayError when it is taken."""
        address = comparable(address)

        def change(txn: Any) -> None:
            self._free(txn, address)
            self._give(txn, ident, address)

        self._write(change)

    def next_ident(self) -> int:
        """A new user's id, which is never given again."""

        def change(txn: Any) -> int:
            ident = int(txn.get(b"highest", b"0", db=self._meta)) + 1
            txn.put(b"highest", str(ident).encode(), db=self._meta)
            return ident

        return int(self._write(change))

    def add(self, user: User) -> None:
        """Add a user, and the address. RelayError when the address is taken."""

        def change(txn: Any) -> None:
            self._free(txn, user.address)
            self._put(txn, user)
            self._give(txn, user.ident, user.address)

        self._write(change)

    def check_free(self, address: str) -> None:
        """RelayError when an address is taken."""
        with self._env.begin() as txn:
            self._free(txn, comparable(address))

    def _free(self, txn: Any, address: str) -> None:
        """RelayError when an address is taken, or cannot be stored."""
        if len(address.encode()) > _KEY_MOST:
            raise RelayError(f"{address[:80]}...: an address has at most {_KEY_MOST} octets")
        found = self._address(txn, address)
        if found is None:
            return
        if not found.user:
            raise Exists(f"{address} is an alias of {', '.join(found.targets)}")
        owner = self._user(txn, found.user)
        if owner is not None and owner.deleted:
            back = "`relaymta mailbox enable` brings the user back, `relaymta mailbox delete --now` frees the address"
            whose = f" belongs to {owner.address}, who" if owner.address != address else ""
            raise Exists(f"{address}{whose} was deleted: {back}")
        if owner is not None and owner.address != address:
            raise Exists(f"{address} is an address of {owner.address}")
        raise Exists(f"{address} exists already")

    def _give(self, txn: Any, ident: int, address: str) -> None:
        """Let an address lead to a user."""
        txn.put(address.encode(), _encode(Address(ident)), db=self._addresses)
        txn.put(_ID.pack(ident) + address.encode(), b"", db=self._own)

    def _put(self, txn: Any, user: User) -> None:
        txn.put(_ID.pack(user.ident), _encode(user), db=self._users)

    def replace(self, address: str, change: Callable[[User], User]) -> User:
        """Change the user of this name; the new row. NoSuch."""
        address = comparable(address)

        def run(txn: Any) -> User:
            user = self._named(txn, address)
            if user is None:
                raise self._unknown(txn, address)
            new = change(user)
            self._put(txn, new)
            return new

        return self._write(run)  # type: ignore[no-any-return]

    def update(self, ident: int, change: Callable[[User], User]) -> User:
        """Change a user by id; the new row. NoSuch; what `change` raises, and then nothing is changed."""

        def run(txn: Any) -> User:
            user = self._user(txn, ident)
            if user is None:
                raise NoSuch("mailbox user", str(ident))
            new = change(user)
            self._put(txn, new)
            return new

        return self._write(run)  # type: ignore[no-any-return]

    def _unknown(self, txn: Any, address: str) -> NoSuch:
        """That there is no such user, with a name that is like it."""
        found = self._address(txn, address)
        owner = self._user(txn, found.user) if found is not None else None
        if owner is not None:
            return NoSuch("mailbox user", f"{address} (it is an address of {owner.address})")
        if found is not None and found.targets:
            return NoSuch("mailbox user", f"{address} (it is an alias of {', '.join(found.targets[:3])})")
        return NoSuch("mailbox user", address, self._like(txn, address))

    def _like(self, txn: Any, address: str) -> list[str]:
        """Addresses of the same domain that begin with the same character; not more than can be compared soon."""
        domain = "@" + domain_of(address)
        cursor = txn.cursor(db=self._addresses)
        known: list[str] = []
        if cursor.set_range(address[:1].encode()):
            for key in cursor.iternext(values=False):
                name = key.decode()
                if name[:1] != address[:1] or len(known) == LIKE_MOST:
                    break
                if name.endswith(domain):
                    known.append(name)
        return known

    def remove(self, ident: int) -> None:
        """Remove a user for good, with all addresses."""

        def change(txn: Any) -> None:
            for address in self._owned(txn, ident):
                txn.delete(address.encode(), db=self._addresses)
                txn.delete(_ID.pack(ident) + address.encode(), db=self._own)
            txn.delete(_ID.pack(ident), db=self._users)

        self._write(change)

    def rename(self, address: str, new: str) -> User:
        """Give a user another name; the old address remains one of the user's."""
        address, new = comparable(address), comparable(new)

        def change(txn: Any) -> User:
            user = self._named(txn, address)
            if user is None:
                raise self._unknown(txn, address)
            known = self._address(txn, new)
            if known is None or known.user != user.ident:
                self._free(txn, new)
                self._give(txn, user.ident, new)
            user = msgspec.structs.replace(user, address=new)
            self._put(txn, user)
            return user

        return self._write(change)  # type: ignore[no-any-return]

    def set_alias(self, address: str, targets: Iterable[str], kept_here: Callable[[str], bool], separator: str = "") -> None:
        """Let an address ("@domain": a catch-all) lead to others, or (no targets) remove it. `kept_here(domain)`: whether mail of
        that domain is kept here, so that an address there has to exist. RelayError when a target is nowhere, when the address
        would lead back to itself, or others by way of it too deep or to too many."""
        address = comparable(address)
        wanted = list(dict.fromkeys(map(comparable, targets)))

        def change(txn: Any) -> None:
            before = self._address(txn, address)
            dangling = set(self._dangling(txn, kept_here, separator))
            if not wanted:
                self._remove_alias(txn, address, before)
            else:
                self._put_alias(txn, address, before, wanted, separator)
            self._check_aliases(txn, address, dangling, kept_here, separator)

        self._write(change)

    def _remove_alias(self, txn: Any, address: str, before: Address | None) -> None:
        if before is not None and before.user and self._named(txn, address) is not None:
            raise NoSuch("alias", f"{address} (it is a user)")
        if before is None:
            raise NoSuch("alias", address, (name for name, _ in self._aliases(txn)))
        txn.delete(address.encode(), db=self._addresses)
        txn.delete(_ID.pack(before.user) + address.encode(), db=self._own)

    def _put_alias(self, txn: Any, address: str, before: Address | None, wanted: list[str], separator: str) -> None:
        if before is not None and before.user and self._named(txn, address) is None:  # not by this name: it may lead elsewhere
            txn.delete(_ID.pack(before.user) + address.encode(), db=self._own)
        elif before is None or before.user:
            user = self._named(txn, address)
            if user is not None and not user.deleted:
                raise Exists(f"{address} is a user, and so no alias: mail for it goes to the user's mailboxes")
            self._free(txn, address)
        if len(wanted) > TARGETS_MOST:
            raise RelayError(f"{len(wanted)} addresses: an alias has at most {TARGETS_MOST}")
        one = self._named(txn, wanted[0]) if len(wanted) == 1 else None
        if one is not None and not one.deleted:
            self._give(txn, one.ident, address)
        else:
            txn.put(address.encode(), _encode(Address(0, wanted)), db=self._addresses)

    def _dangling(self, txn: Any, kept_here: Callable[[str], bool], separator: str) -> Iterator[tuple[str, str]]:
        """(alias, target) of the targets that nobody has."""
        for name, row in self._aliases(txn):
            for target in row.targets:
                if not self._leads(txn, target, separator) and kept_here(domain_of(target)):
                    yield name, target

    def _check_aliases(
        self, txn: Any, address: str, before: set[tuple[str, str]], kept_here: Callable[[str], bool], separator: str
    ) -> None:
        """All aliases after a change of one: RelayError undoes it. That one first, so that a problem names it. `before`: what was
        dangling then, which is not this change's fault."""
        for name, target in sorted(self._dangling(txn, kept_here, separator), key=lambda pair: pair[0] != address):
            if (name, target) not in before or name == address:
                raise RelayError(f"nobody has {target}{near(target, self._like(txn, target))}, and {name} leads there")
        for name, row in sorted(self._aliases(txn), key=lambda row: row[0] != address):
            if name in row.targets:
                raise RelayError(f"{name} would be an alias of itself")
            circle = self._walk(txn, name, separator, {}, {})
            if circle:
                raise RelayError(f"{name} would lead back to itself: {' -> '.join(circle)}")

    def _leads(self, txn: Any, target: str, separator: str) -> bool:
        """Whether an address is one of a user who is there, or an alias."""
        found = self._match(txn, target, separator)
        user = self._user(txn, found[1].user) if found is not None and found[1].user else None
        return found is not None and (not found[1].user or (user is not None and not user.deleted))

    def delete(self, address: str, since: int, separator: str) -> User:
        """Mark a user as deleted since then (ms), or as one who is being removed (REMOVING). NoSuch; RelayError: an alias leads
        to the user, or the user is being moved."""

        def change(txn: Any) -> User:
            user = self._named(txn, comparable(address))
            if user is None:
                raise self._unknown(txn, comparable(address))
            if user.moving >= 0:
                raise RelayError(f"{user.address} is being moved to shard {user.moving}; try again, or move the user back")
            leading = [name for name, row in self._aliases(txn) if self._one_leads_to(txn, row.targets, user.ident, separator)]
            if leading and not user.deleted:
                raise RelayError(f"{', '.join(leading)} would lead to nobody: change it first (`relaymta mailbox alias`)")
            new = msgspec.structs.replace(user, deleted=since if since == REMOVING else user.deleted or since)
            self._put(txn, new)
            return new

        return self._write(change)  # type: ignore[no-any-return]

    def _one_leads_to(self, txn: Any, targets: list[str], ident: int, separator: str) -> bool:
        matches = (self._match(txn, target, separator) for target in targets)
        return any(found is not None and found[1].user == ident for found in matches)

    def _aliases(self, txn: Any) -> list[tuple[str, Address]]:
        """The addresses that lead to others."""
        rows = ((key, raw) for key, raw in txn.cursor(db=self._addresses) if raw[1] == _NO_USER)  # most are users': not decoded
        return [(key.decode(), _decode_address(raw)) for key, raw in rows]

    def owned(self, ident: int) -> list[str]:
        """The addresses of a user, in their order."""
        with self._env.begin() as txn:
            return self._owned(txn, ident)

    def _owned(self, txn: Any, ident: int) -> list[str]:
        cursor, prefix, found = txn.cursor(db=self._own), _ID.pack(ident), []
        if cursor.set_range(prefix):
            for key in cursor.iternext(values=False):
                if key[:8] != prefix:
                    break
                found.append(key[8:].decode())
        return found


def _path(parents: dict[str, str], last: str) -> list[str]:
    """The addresses from the first to `last`."""
    found = [last]
    while parents[found[-1]]:
        found.append(parents[found[-1]])
    return found[::-1]
