"""Reading requests answered from the spool while no daemon runs: read-only, with each shard's lock held, as the spool's owner."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb

from relaymta.errors import RelayError
from relaymta.log import find_history
from relaymta.privileges import become, owner_of
from relaymta.queue import _lock, inspect, listing
from relaymta.queue.clock import QueueClock
from relaymta.queue.ident import format_id, parse_id
from relaymta.queue.segments import FRAME, check_frame
from relaymta.queue.store import Store

__all__ = ["answer"]


def answer(spool: Path, op: str, **args: Any) -> Any:
    """Answer a reading request `op` of the control socket from the files. SpoolBusy when a process owns a shard."""
    owner = owner_of(spool)
    if os.geteuid() == 0 != owner.pw_uid:  # the owner could not open lock files of root's
        become(owner)
    return _ANSWERS[op](spool, **args)


def _shards(spool: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("shard-")) for p in spool.glob("shard-*") if (p / "lmdb" / "data.mdb").exists())


def _opened(spool: Path, number: int, use: Callable[[Path, Store, QueueClock], Any]) -> Any:
    """`use(path, store, clock)` of one shard, opened and locked. RelayError when LMDB cannot read it."""
    path = spool / f"shard-{number}"
    lock = _lock(path)
    try:
        store = Store(path / "lmdb", readonly=True)
        try:
            return use(path, store, QueueClock(store.meta(b"seen")))
        finally:
            store.close()
    except lmdb.Error as error:
        raise RelayError(f"{path}: {error}") from None
    finally:
        os.close(lock)


def _rows(
    spool: Path,
    use: Callable[[Path, Store, QueueClock], list[dict[str, Any]]],
    join: Callable[[dict[str, Any], dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """One row for each queue, the one with the most mail first. `join(known, row)` adds the row of another shard to `known`."""
    merged: dict[str, dict[str, Any]] = {}
    for number in _shards(spool):
        for row in _opened(spool, number, use):
            known = merged.setdefault(row["queue"], row)
            if known is not row:
                join(known, row)
    return sorted(merged.values(), key=lambda row: -row["messages"])


def _summary(spool: Path) -> list[dict[str, Any]]:
    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        known |= {key: known[key] + row[key] for key in ("messages", "bytes", "deferred", "held")}
        known["next"] = min(filter(None, (known["next"], row["next"])), default=0)

    return _rows(spool, lambda path, store, clock: inspect.summary(store, clock), join)


def _shape(spool: Path) -> list[dict[str, Any]]:
    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        known["messages"] += row["messages"]
        known["ages"] = [sum(pair) for pair in zip(known["ages"], row["ages"], strict=True)]

    return _rows(spool, lambda path, store, clock: inspect.shape(store), join)


def _page(spool: Path, shard: int, after: int, chosen: dict[str, Any]) -> Any:
    wanted = inspect.Filter(**chosen)

    def read(path: Path, store: Store, clock: QueueClock) -> dict[str, Any]:
        rows = inspect.chosen_queues(store, wanted, lambda name, site: False) if wanted.by_queue else None
        return listing.page(store, clock, None, wanted, after, rows)

    return _opened(spool, shard, read)


def _message(spool: Path, ident: str) -> Any:
    for number in _shards(spool):
        found = _opened(spool, number, lambda path, store, clock: listing.message(store, clock, None, parse_id(ident)))
        if found is not None:
            return found
    return None


def _raw(spool: Path, ident: str) -> bytes | None:
    import xxhash

    number = parse_id(ident)

    def read(path: Path, store: Store, clock: QueueClock) -> bytes | None:
        with store.env.begin() as txn:
            envelope = store.envelope(txn, number)
        if envelope is None or envelope.body is None:
            return None
        body = envelope.body
        file = path / "bodies" / (f"{body.segment:08d}.seg" if body.segment else f"big/{number:016x}")
        with file.open("rb") as stream:
            stream.seek(body.offset)
            raw = stream.read(FRAME.size + body.length)
        data = raw[FRAME.size :]
        check_frame(raw[: FRAME.size], number, body, len(data), xxhash.xxh3_64_intdigest(data))
        return data

    for shard in _shards(spool):
        data: bytes | None = _opened(spool, shard, read)
        if data is not None:
            return data
    return None


def _history(spool: Path, ident: str) -> list[dict[str, Any]]:
    return find_history(spool / "history", format_id(parse_id(ident)))


_ANSWERS: dict[str, Callable[..., Any]] = {
    "summary": _summary,
    "shape": _shape,
    "shards": _shards,
    "page": _page,
    "message": _message,
    "raw": _raw,
    "history": _history,
}
