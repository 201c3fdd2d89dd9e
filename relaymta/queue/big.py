"""Large bodies: files of their own in `bodies/big`, named by the message's id, and who owns them.

A file belongs to its receiver from `make` to `submitted`, then to the queue: the writer removes it when the message could not be
stored, or after the commit that ended it. Whatever else happens (a receiver that was cancelled, a removal that failed), `sweep`
removes what has no message. Invariant: a file whose message is committed, or may be, is not removed.

What is written in place of a body that is still read has an id of its own, which no message gets. `become` gives it its message's
name before it is finished, and so before that message is submitted: wherever the process is killed, a file that is left has no
message, or is what its message was committed with.

What is to take the place of the body of a message that is committed has an id of its own, too, until it is known that it will:
of several that filters write one after the other the last one. Then it gets a name for that (`Segments.next_path`), and has its
generation in its frame and in the message's row. Behind the commit it is renamed; if the process is killed in between, `sweep`
does that, and removes those of which no row has the generation.
"""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from relaymta.disk.big import BigBody
from relaymta.disk.folders import remove_file
from relaymta.disk.segments import Segments
from relaymta.proto.envelope import Body, Envelope
from relaymta.queue.store import Store

__all__ = ["BigBodies"]

ORPHAN_SECONDS = 3600  # that a file has not been written to, before a sweep removes it


class BigBodies:
    """The large bodies of one shard that have no message yet."""

    def __init__(self, segments: Segments, store: Store) -> None:
        self._segments = segments
        self._store = store
        self._received: WeakValueDictionary[int, BigBody] = WeakValueDictionary()  # as long as a receiver has them
        self._submitted: set[int] = set()  # given to the writer, not committed yet
        self._naming = threading.Lock()  # of files that are to take the place of others

    def make(self, ident: int, room: int, generation: int = 1) -> BigBody:
        """A file for a large body, with `room` octets reserved in front of it; `generation`: as of BigBody. Blocks: called on a
        thread."""
        file = BigBody(self._segments.big_path(ident), ident, room, generation)
        self._received[ident] = file
        return file

    def become(self, file: BigBody, ident: int) -> None:
        """A file that was made for another id is that of `ident` from now on. Whoever had one for that has discarded it. Blocks:
        called on a thread, before the body is finished. OSError: it is not, and stays what it was."""
        self._received[ident] = file  # first: a sweep leaves it alone, and `submitted` finds it
        file.move(self._segments.big_path(ident), ident)

    def follow(self, file: BigBody, ident: int, body: Body) -> None:
        """As `become`, of what is to take the place of `body`, that of a message that is in the queue, and that its caller alone
        changes: its `generation` is the next one of that. OSError, also where that body has not got the message's name and cannot
        get it."""
        with self._naming:
            if not body.segment and self._segments.is_next(ident, body):  # its rename failed, and there is no other copy
                self._segments.rename_next(ident)
            self._received[ident] = file
            file.move(self._segments.next_path(ident), ident)

    def submitted(self, ident: int) -> None:
        """On the loop: the body is given to the writer."""
        file = self._received.get(ident)
        if file is not None:
            file.submitted = True
        self._submitted.add(ident)

    def settled(self, ident: int) -> None:
        """On the loop: its group was committed, or has failed."""
        self._submitted.discard(ident)

    def sweep(self, seconds: float = ORPHAN_SECONDS) -> None:
        """Reader thread: remove the files without a message that nobody receives or commits, and that were not written to for
        so long (0: whatever their age; at the start, when there are neither receivers nor a writer)."""
        before = time.time() - seconds
        # In this order: what is neither received nor submitted now is committed before the transaction begins, or never.
        left = [
            (ident, path)
            for ident, path in [*self._segments.big_files(), *self._segments.next_files()]
            if ident not in self._received and ident not in self._submitted and (not seconds or _written(path) < before)
        ]
        with self._store.reading() as txn:
            left = [(ident, path) for ident, path in left if self._is_astray(txn, ident, path)]
        for ident, path in left:
            with suppress(OSError):  # one that cannot be looked at may be the only copy: it stays until a later sweep
                self._put_in_order(ident, path)

    def _is_astray(self, txn: Any, ident: int, path: Path) -> bool:
        """Whether a file is not that of its message by name."""
        return path != self._segments.big_path(ident) or _large(self._store.envelope(txn, ident)) is None

    def _put_in_order(self, ident: int, path: Path) -> None:
        """Give a file the name of its message, or remove it; unless its message is getting another one now."""
        with self._naming:  # from here on nobody gives one a name
            if ident in self._received or ident in self._submitted:
                return
            with self._store.reading() as txn:
                body = _large(self._store.envelope(txn, ident))
            if body is None:
                remove_file(path)
            elif path != self._segments.big_path(ident):
                if self._segments.is_next(ident, body):
                    self._segments.take_place(ident)
                else:
                    remove_file(path)


def _large(envelope: Envelope | None) -> Body | None:
    """The body of a message, if that is a file of its own."""
    body = None if envelope is None else envelope.body
    return None if body is None or body.segment else body


def _written(path: Path) -> float:
    """When a file was written to last; in the future when it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")
