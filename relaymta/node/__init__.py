"""Facts that hold for the whole machine and outlive a restart: suspended and dead sites, and limits that replies taught.

The supervisor keeps them (`Store`, a small LMDB environment in the spool) and tells every worker; a worker asks for a change
by telling the supervisor, and acts on what it has been told (`Facts`). Times are wall-clock milliseconds (UTC).
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from relaymta.errors import StoreError, store_error

__all__ = [
    "BOUNCE", "DEAD", "HOLD", "LEARNED", "PROFILES", "PROFILES_BEFORE", "SLOW", "SUSPENDED", "TOKEN", "Fact", "Facts", "Store",
    "fact_row", "keep_profiles", "keep_rates", "keep_secret", "kept_rates",
]  # fmt: skip

SUSPENDED, DEAD, SLOW, LEARNED = "suspended", "dead", "slow", "learned"
HOLD, BOUNCE = "hold", "bounce"  # standing orders
TOKEN = "token"  # a refresh token that an endpoint gave in exchange: a secret, shown to nobody
RATES = "rates"
PROFILES, PROFILES_BEFORE = "providers.toml", "providers-before.toml"  # as used here, and before the last change
MOST = 50_000  # facts; beyond it those that end first go
_MAP_SIZE = 1 << 30


class Fact(msgspec.Struct, frozen=True):
    """One decision. `site`: the name under which the machine counts the site's limits, or (dead) its pool's, or (hold, bounce)
    the mail that is meant, as `field=value` words, or (token) the hash of what it stands for; `about`: the one
    application whose mail is meant ("": all), or (learned) the limit; `by`: "operator", "rule ..." or "automatic"; `reply`:
    what caused it; `value`: how often (dead), by what factor (slow), or the limit (learned)."""

    kind: str
    site: str
    about: str
    since: int
    until: int
    by: str
    reason: str
    reply: str = ""
    value: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What there can be one of."""
        return self.kind, self.site, self.about


def _wall() -> int:
    return time.time_ns() // 1_000_000


def _boot() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Facts:
    """What a process has been told. Expired facts are not there: a fact holds for the time that was left when it was
    learned, whatever the wall clock does from then on; one that seems to come from the future (the clock went back across
    a restart) holds for as long as it was to hold from its beginning."""

    def __init__(self, facts: Iterable[Fact] = ()) -> None:
        self._facts: dict[tuple[str, str, str], tuple[Fact, int]] = {}  # fact, end by CLOCK_BOOTTIME (ms)
        for fact in facts:
            self.learn(fact)

    def __iter__(self) -> Iterator[Fact]:
        now = _boot()
        return iter([fact for fact, end in self._facts.values() if end > now])

    def get(self, kind: str, site: str, about: str = "") -> Fact | None:
        """A fact that holds now."""
        found = self._facts.get((kind, site, about))
        return found[0] if found is not None and found[1] > _boot() else None

    def left(self, fact: Fact) -> int:
        """For how many more milliseconds a fact holds."""
        found = self._facts.get(fact.key)
        return max(0, found[1] - _boot()) if found is not None else 0

    def suspension(self, site: str, tenant: str) -> Fact | None:
        """Why mail of a tenant may not go to a site now."""
        if not self._facts:
            return None
        found = self.get(SUSPENDED, site)
        if found is None and tenant:
            found = self.get(SUSPENDED, site, tenant) or self.get(SUSPENDED, "", tenant)
        return found

    def learn(self, fact: Fact) -> None:
        """A fact is so from now on, in the place of one with the same key."""
        self._facts[fact.key] = (fact, _boot() + fact.until - max(_wall(), fact.since))
        if len(self._facts) > MOST:
            self.sweep()

    def forget(self, kind: str, site: str, about: str) -> Fact | None:
        """A fact holds no longer; it, if it was there."""
        found = self._facts.pop((kind, site, about), None)
        return None if found is None else found[0]

    def sweep(self) -> list[Fact]:
        """Drop what has expired, and what is beyond MOST; what was dropped."""
        now = _boot()
        by_end = sorted(self._facts.values(), key=lambda pair: pair[1], reverse=True)
        kept = [pair for pair in by_end[:MOST] if pair[1] > now]
        self._facts = {pair[0].key: pair for pair in kept}
        return [pair[0] for pair in by_end[len(kept) :]]


def fact_row(fact: Fact, facts: Facts) -> dict[str, Any]:
    """A fact for people and programs; times in seconds UTC."""
    return {
        "kind": fact.kind,
        "site": fact.site,
        "about": fact.about,
        "since": fact.since / 1000,
        "until": (_wall() + facts.left(fact)) / 1000,
        "by": fact.by,
        "reason": fact.reason,
        "reply": fact.reply,
        "value": fact.value,
    }


def keep_profiles(path: Path, text: str) -> bool:
    """Remember in `path` which provider profiles are in use, and those before; whether others were. Blocks."""
    used = path / PROFILES
    known = used.read_text(encoding="utf-8") if used.exists() else None
    if known == text:
        return False
    if known is not None:
        used.replace(path / PROFILES_BEFORE)
    _put(used, text.encode())
    return known is not None


def keep_rates(path: Path, rows: list[tuple[int, int]]) -> None:
    """Remember in `path` the rates of clients and accounts as they are now (shm.Rates.rows). Blocks; OSError."""
    _put(path / RATES, _encode((_wall(), rows)))


def _put(file: Path, octets: bytes) -> None:
    """Put a file in the place of another, at once; what is there is replaced, were it a link, and not followed."""
    fresh = file.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
        opened.write(octets)
    fresh.replace(file)


def kept_rates(path: Path) -> list[tuple[int, int]]:
    """What was remembered, less the time that has passed since: none where the clock went back. Blocks."""
    try:
        kept, rows = msgspec.msgpack.decode((path / RATES).read_bytes(), type=tuple[int, list[tuple[int, int]]])
    except (OSError, msgspec.DecodeError):  # there is none, or a power cut has left half of it: they begin anew
        return []
    passed = max(0, _wall() - kept) * 1000
    return [(mark, left - passed) for mark, left in rows if left > passed]


class Store:
    """The facts on disk, in `path`. Everything blocks (the supervisor calls it on a thread of its own), and raises StoreError
    when the disk refuses."""

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._env = lmdb.open(str(path), map_size=_MAP_SIZE, mode=0o600)
        except (lmdb.Error, OSError) as error:
            raise StoreError(f"{path}: {error}") from None

    def load(self) -> list[Fact]:
        """All facts."""
        try:
            with self._env.begin() as txn:
                return [_decode(value) for _, value in txn.cursor()]
        except (lmdb.Error, msgspec.DecodeError) as error:
            raise StoreError(f"node: {error}") from None

    def write(self, learned: list[Fact], forgotten: list[Fact]) -> None:
        """Make changes durable."""
        try:
            with self._env.begin(write=True) as txn:
                for fact in forgotten:
                    txn.delete(_key(fact))
                for fact in learned:
                    txn.put(_key(fact), _encode(fact))
        except lmdb.Error as error:
            raise store_error(error) from None

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def _key(fact: Fact) -> bytes:
    """LMDB's keys are short: a long one is cut, with its hash behind."""
    whole = "\0".join(fact.key).encode()
    return whole if len(whole) < 400 else whole[:350] + hashlib.sha256(whole).digest()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Fact).decode


def keep_secret(spool: Path) -> None:
    """Make the secret of a spool, if there is none, or a full disk or a power cut left it empty: by it all workers tell strangers
    the same of users who do not exist. OSError."""
    path = spool / "secret"
    if not path.exists() or not path.stat().st_size:
        _put(path, os.urandom(32))
