"""All shards of the spool, as one of the processes that own them reads them: what was handed in to any of them under an
idempotency key, and what has become of a message, wherever it is.

The shards of this process are read by their stores, those of others read-only beside their owners, so that what an owner has
committed is seen at once, and also while that owner is dead. No transaction stays open.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import msgspec

from relaymta.disk.clock import wall_ms
from relaymta.disk.environment import Environment
from relaymta.disk.shards import shard_numbers
from relaymta.errors import StoreError
from relaymta.ident import shard_of
from relaymta.proto.envelope import DELIVERED, FAILED, HELD, IN_DOUBT, UNSEEN, Envelope, RecipientState, decode_envelope
from relaymta.queue import receipts
from relaymta.queue.fresh import inlined
from relaymta.queue.receipts import Ended, Kept, Receipt
from relaymta.queue.store import ID, Histories, Store

__all__ = ["Known", "Shards"]

T = TypeVar("T")
_TABLES = ("message", "recipient", "fresh", "ended", "request", "receipt", "segment", "meta")


class Known(msgspec.Struct, frozen=True):
    """What is known of a message. `receipt`: how its recipients stand (`Ended.state` is also "accepted", "scheduled",
    "attempting", "deferred", "in doubt", "held" or "filtering"); `ended`: it has left the queue; `not_before`: when it is tried
    first (ms of its queue's clock), 0: at once."""

    receipt: Receipt
    ended: bool
    not_before: int = 0

    @property
    def scheduled(self) -> bool:
        """Whether its time has not come."""
        return not self.ended and self.not_before > wall_ms()


# A reader of LMDB sees what the lock file says was committed last. A writer notes that there just behind its commit; where it was
# killed in between, what it has committed is not seen before another process has begun to write, as the next owner does.
LOOKS, LOOK_SECONDS = 25, 0.002


class _Other(Environment):
    """A shard of another process. `file`: which one it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self.file = _identity(path)
        super().__init__(path, _TABLES, readonly=True)


class Shards:
    """All methods may be called from any thread, and block."""

    def __init__(self, spool: Path, own: dict[int, Store], in_flight: Callable[[int], bool]) -> None:
        """`own`: the stores of this process, by the number of their shard; `in_flight(id)`: whether an attempt to deliver a
        message is under way."""
        self._spool = spool
        self._own = own
        self._in_flight = in_flight
        self._lock = threading.Lock()  # of the others, and of all that is read of them
        self._others: dict[int, _Other] = {}

    def kept(self, digest: bytes) -> dict[int, Kept]:
        """The messages that were accepted under a key (`receipts.digest_of`), by part. StoreError: not all shards can be read, so
        that it is not known."""
        found: dict[int, Kept] = {}
        for number in shard_numbers(self._spool):
            found |= self._in(number, lambda txn, environment: receipts.kept(txn, environment.tables, digest)) or {}
        return found

    def message(self, ident: int) -> Known | None:
        """A message; None: it is not known, or no longer. StoreError: its shard cannot be read."""
        return self._in(shard_of(ident), lambda txn, environment: self._known(txn, environment, ident))

    def close(self) -> None:
        """Close those of others."""
        with self._lock:
            for one in self._others.values():
                one.close()
            self._others.clear()

    def _in(self, number: int, read: Callable[[Any, Environment], T]) -> T | None:
        """What is read in a shard; None: there is none of this number."""
        own = self._own.get(number)
        if own is not None:
            with own.reading() as txn:
                return read(txn, own)
        with self._lock:
            try:
                other = self._other(number)
                if other is None:
                    return None
                for _ in range(LOOKS):
                    with other.reading() as txn:
                        if txn.id() >= other.env.info()["last_txnid"]:
                            return read(txn, other)
                    time.sleep(LOOK_SECONDS)
                raise StoreError(f"what the last owner of shard {number} has committed cannot be read yet")
            except lmdb.Error as error:
                raise StoreError(f"shard {number} cannot be read: {error}") from None

    def _other(self, number: int) -> _Other | None:
        """A shard of another process, opened where it is not, or is another file by now; None: there is none."""
        path = self._spool / f"shard-{number}" / "lmdb"
        known = self._others.get(number)
        try:
            if known is not None and known.file != _identity(path):
                self._others.pop(number).close()
                known = None
            if known is None:
                known = self._others[number] = _Other(path)
            known.complete()
        except FileNotFoundError:
            return None
        return known

    def _known(self, txn: Any, environment: Environment, ident: int) -> Known | None:
        ended = receipts.receipt_of(txn, environment.tables, ident)
        if ended is not None:
            return Known(ended, True)
        raw = txn.get(ID.pack(ident), db=environment.tables["message"])
        envelope = inlined(txn, environment.tables, ident) if raw is None else decode_envelope(raw)
        if envelope is None:
            return None
        states = Histories(txn.cursor(db=environment.tables["recipient"])).of(ident)
        return Known(_standing(envelope, states, self._in_flight(ident)), False, envelope.not_before)


def _identity(path: Path) -> tuple[int, int]:
    found = (path / "data.mdb").stat()
    return found.st_dev, found.st_ino


def _standing(envelope: Envelope, states: dict[int, RecipientState], in_flight: bool) -> Receipt:
    """A message that is in the queue."""
    general = "accepted"
    if envelope.flags & HELD:
        general = "held"
    elif envelope.flags & UNSEEN:
        general = "filtering"
    elif in_flight:
        general = "attempting"
    rows = [_recipient(address, states.get(index), general) for index, address in enumerate(envelope.recipients)]
    return Receipt(
        envelope.user,
        envelope.application,
        envelope.sender,
        envelope.message_id,
        envelope.tags,
        envelope.arrived,
        wall_ms(),
        rows,
    )


def _recipient(address: str, state: RecipientState | None, general: str) -> Ended:
    if state is None or not state.attempts:
        done = state is not None and state.state == DELIVERED
        return Ended(address, receipts.SENT if done else general, 0)
    last = state.attempts[-1]
    how = {DELIVERED: receipts.SENT, FAILED: receipts.BOUNCED}.get(state.state, general)
    if how == "accepted":
        how = "in doubt" if IN_DOUBT in last.text else "deferred"
    return Ended(address, how, last.time, last.whole[: receipts.REPLY_KEPT], last.peer, len(state.attempts))
