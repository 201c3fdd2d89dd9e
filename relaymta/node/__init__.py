"""What the machine keeps across restarts: site states (suspended and dead sites, learned limits), policies, refreshed tokens,
rates of clients, triplets of greylisting, the provider profiles in use.

The supervisor owns the site states: it stores them (`Store`, a small LMDB environment in the spool) and sends every change to all
workers. A worker sends a change that it wants to the supervisor, and uses its own copy (`SiteStates`). Times are milliseconds of
the wall clock (UTC).
"""

import hashlib
import os
import struct
import time
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import xxhash

from relaymta.errors import RelayError, StoreError, store_error

__all__ = [
    "ABUSE",
    "BOUNCE",
    "DEAD",
    "HOLD",
    "LEARNED",
    "PROFILES",
    "PROFILES_BEFORE",
    "SLOW",
    "SUSPENDED",
    "TOKEN",
    "SiteState",
    "SiteStates",
    "Store",
    "check_storable",
    "keep_profiles",
    "keep_rates",
    "keep_secret",
    "keep_table",
    "kept_rates",
    "kept_table",
    "site_state_row",
]  # fmt: skip

SUSPENDED, DEAD, SLOW, LEARNED = "suspended", "dead", "slow", "learned"
HOLD, BOUNCE = "hold", "bounce"  # policies
ABUSE = "abuse"  # an account whose mail is not as usual
TOKEN = "token"  # a refresh token that an OAuth endpoint has replaced ours by: a secret, never shown
RATES = "rates"
PROFILES, PROFILES_BEFORE = "providers.toml", "providers-before.toml"  # in use, and in use before the last change
MOST = 50_000  # states; beyond that, those that end first are dropped
_MAP_SIZE = 1 << 30
_TABLE = struct.Struct("<8sLQQ")  # what it is, version, octets that follow, their hash (XXH3)
_VERSION, _TABLE_MOST = 1, 1 << 26


class SiteState(msgspec.Struct, frozen=True):
    """One decision. `site`: the name that the site's limits are counted by; or (dead) the name of its pool; (hold, bounce) the
    mail that the policy matches, as `field=value` words, (abuse) the account, likewise; (token) the hash of the settings that the
    token belongs to. `about`: the application that it is limited to ("": all mail), (learned) the name of the limit, or (abuse)
    of the check. `since`, `until`: ms of the wall clock. `by`: "operator", "rule ...", "abuse ..." or "automatic". `reply`: the
    reply that caused it (token: the token; abuse: what is done, "": nothing). `value`: failures (dead), factor (slow), limit
    (learned), or what was found (abuse). `cause`: the cause for programs (dead; `proto.envelope.CATEGORIES`)."""

    kind: str
    site: str
    about: str
    since: int
    until: int
    by: str
    reason: str
    reply: str = ""
    value: float = 0.0
    cause: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The identity of a state: a new one replaces that with the same key."""
        return self.kind, self.site, self.about


def _wall() -> int:
    return time.time_ns() // 1_000_000


def _boot() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class SiteStates:
    """One process' copy of the states. Expired ones are left out. A state holds for the time that was left when it was learned,
    measured by CLOCK_BOOTTIME: later changes of the wall clock do not matter. A state that begins in the future (the clock was
    set back across a restart) holds for its whole duration. What one costs does not depend on their number."""

    def __init__(self, states: Iterable[SiteState] = ()) -> None:
        # of each kind, by site and about: state, end by CLOCK_BOOTTIME (ms)
        self._states: dict[str, dict[tuple[str, str], tuple[SiteState, int]]] = {}
        self._count = 0
        self._ends: list[tuple[int, str, str, str]] = []  # heap: end and key; also of states that were replaced or forgotten
        for state in states:
            self.learn(state)

    def __iter__(self) -> Iterator[SiteState]:
        return iter(self.of(*self._states))

    def of(self, *kinds: str) -> list[SiteState]:
        """The states of some kinds."""
        now = _boot()
        return [state for kind in kinds for state, end in self._states.get(kind, {}).values() if end > now]

    def get(self, kind: str, site: str, about: str = "") -> SiteState | None:
        """The state with this key, if it holds now."""
        found = self._states.get(kind, {}).get((site, about))
        return found[0] if found is not None and found[1] > _boot() else None

    def left(self, state: SiteState) -> int:
        """The milliseconds for which a state still holds."""
        found = self._states.get(state.kind, {}).get((state.site, state.about))
        return max(0, found[1] - _boot()) if found is not None else 0

    def suspension(self, site: str, tenant: str) -> SiteState | None:
        """The suspension that keeps a tenant's mail from a site now, if there is one."""
        if not self._states.get(SUSPENDED):
            return None
        found = self.get(SUSPENDED, site)
        if found is None and tenant:
            found = self.get(SUSPENDED, site, tenant) or self.get(SUSPENDED, "", tenant)
        return found

    def learn(self, state: SiteState) -> list[SiteState]:
        """Add a state, or replace the one with the same key. Returns the states that were dropped because there are MOST."""
        kept = self._states.setdefault(state.kind, {})
        self._count += (state.site, state.about) not in kept
        end = _boot() + state.until - max(_wall(), state.since)
        kept[state.site, state.about] = (state, end)
        heappush(self._ends, (end, *state.key))
        if len(self._ends) > 2 * self._count + 1000:
            self._ends = [(end, *state.key) for kept in self._states.values() for state, end in kept.values()]
            heapify(self._ends)
        return self._drop(None) if self._count > MOST else []

    def forget(self, kind: str, site: str, about: str) -> SiteState | None:
        """Remove the state with this key; returns it, if there was one."""
        found = self._states.get(kind, {}).pop((site, about), None)
        self._count -= found is not None
        return None if found is None else found[0]

    def sweep(self) -> list[SiteState]:
        """Remove expired states; returns them."""
        return self._drop(_boot())

    def _drop(self, until: int | None) -> list[SiteState]:
        """Remove the states that end until then, and those that end first of more than MOST."""
        dropped = []
        while self._ends and (self._count > MOST or (until is not None and self._ends[0][0] <= until)):
            end, *key = heappop(self._ends)
            kind, site, about = key
            found = self._states.get(kind, {}).get((site, about))
            if found is not None and found[1] == end:  # else it was replaced
                self.forget(kind, site, about)
                dropped.append(found[0])
        return dropped


def site_state_row(state: SiteState, states: SiteStates) -> dict[str, Any]:
    """A state as the command line shows it; times in seconds (UTC)."""
    return {
        "kind": state.kind,
        "site": state.site,
        "about": state.about,
        "since": state.since / 1000,
        "until": (_wall() + states.left(state)) / 1000,
        "by": state.by,
        "reason": state.reason,
        "reply": state.reply,
        "value": state.value,
    }


def keep_profiles(path: Path, text: str) -> bool:
    """Store the provider profiles in use (`text`) in `path`, and those in use before; whether they have changed. Blocks;
    OSError."""
    used = path / PROFILES
    known = used.read_text(encoding="utf-8") if used.exists() else None
    if known == text:
        return False
    if known is not None:
        used.replace(path / PROFILES_BEFORE)
    _put(used, text.encode())
    return known is not None


def keep_rates(path: Path, rows: list[tuple[int, int]]) -> None:
    """Store the rates of clients and accounts (shm.Rates.rows) in `path`. Blocks; OSError."""
    _put(path / RATES, _encode((_wall(), rows)))


def keep_table(path: Path, name: str, octets: bytes) -> None:
    """Store a table, such as the triplets of greylisting ("triplets"), in `path`, durably. `name`: 8 characters at most. Blocks;
    OSError, after which what was stored before is still there."""
    head = _TABLE.pack(name.encode(), _VERSION, len(octets), xxhash.xxh3_64_intdigest(octets))
    try:
        _put(path / name, head, octets, sync=True)
    except OSError:
        (path / name).with_suffix(".new").unlink(missing_ok=True)  # many octets, and the disk may be full
        raise


def kept_table(path: Path, name: str) -> bytes:
    """The octets stored by `keep_table`; none if there is no such file, or it is not as it was stored. Blocks."""
    try:
        with (path / name).open("rb") as file:
            kind, version, size, checksum = _TABLE.unpack(file.read(_TABLE.size))
            is_one = kind.rstrip(b"\0") == name.encode() and version == _VERSION and size <= _TABLE_MOST
            octets = file.read(size + 1) if is_one else b""
    except (OSError, struct.error):
        return b""
    return octets if len(octets) == size and xxhash.xxh3_64_intdigest(octets) == checksum else b""


def _put(file: Path, *parts: bytes, sync: bool = False) -> None:
    """Replace a file atomically. A link in its place is replaced, not followed. `sync`: its octets are on the disk before."""
    fresh = file.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
        for octets in parts:
            opened.write(octets)
        if sync:
            opened.flush()
            os.fsync(opened.fileno())
    fresh.replace(file)


def kept_rates(path: Path) -> list[tuple[int, int]]:
    """The rates stored by `keep_rates`, less the time that has passed since then (none if the clock was set back). Blocks."""
    try:
        kept, rows = msgspec.msgpack.decode((path / RATES).read_bytes(), type=tuple[int, list[tuple[int, int]]])
    except (OSError, msgspec.DecodeError):  # no file, or half of one after a power cut: all rates are free
        return []
    passed = max(0, _wall() - kept) * 1000
    return [(mark, left - passed) for mark, left in rows if left > passed]


class Store:
    """The states on disk, in `path`. All methods block (the supervisor calls `write` on a thread) and raise StoreError when the
    disk fails."""

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._env = lmdb.open(str(path), map_size=_MAP_SIZE, mode=0o600)
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from None

    def load(self) -> list[SiteState]:
        """All states."""
        try:
            with self._env.begin() as txn:
                return [_decode(value) for _, value in txn.cursor()]
        except (lmdb.Error, msgspec.DecodeError) as error:
            raise StoreError(f"node: {error}") from None

    def write(self, learned: list[SiteState], forgotten: list[SiteState]) -> None:
        """Commit changes, durably: the states learned meanwhile, in their order, and those forgotten. One that is in both was
        forgotten after it was learned."""
        gone = {id(state) for state in forgotten}
        try:
            with self._env.begin(write=True) as txn:
                for state in forgotten:
                    txn.delete(_key(state))
                for state in {state.key: state for state in learned}.values():
                    if id(state) not in gone:
                        txn.put(_key(state), _encode(state))
        except lmdb.Error as error:
            raise store_error(error) from None

    def close(self) -> None:
        """Close the LMDB environment."""
        self._env.close()


def check_storable(state: SiteState) -> None:
    """RelayError when a state has text or a number that cannot be stored."""
    try:
        _key(state)
        _encode(state)
    except (ValueError, TypeError, OverflowError) as error:  # such as half of a surrogate pair
        raise RelayError(f"this site state cannot be stored: {error}") from None


def _key(state: SiteState) -> bytes:
    """The key in LMDB, which has at most 511 octets: a long one is cut, and its hash appended."""
    whole = "\0".join(state.key).encode()
    return whole if len(whole) < 400 else whole[:350] + hashlib.sha256(whole).digest()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SiteState).decode


def keep_secret(spool: Path) -> None:
    """Create the secret of a spool if it is missing, or was left empty by a full disk or a power cut. All workers derive from it
    what SCRAM answers for unknown users, so that these cannot be told from known ones. OSError."""
    path = spool / "secret"
    if not path.exists() or not path.stat().st_size:
        _put(path, os.urandom(32))
