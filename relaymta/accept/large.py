"""A large message: message data that is streamed into a file of its own."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from relaymta.filter.signing import Draft
from relaymta.proto.envelope import Body
from relaymta.queue import BigBody

if TYPE_CHECKING:
    from relaymta.filter.verify import Look

__all__ = ["Large"]

HASHED_TOGETHER = 1 << 20  # octets
ROOM = 65536  # octets reserved before the message data for fields computed from all of it: DKIM-Signature, Authentication-Results


class Large:
    """A large message while it is received. It is to be signed (`draft`), verified (`look`), or neither. `front`: the fields that
    this relay adds; `header`: that of the message, where filters may change it (`changes`), else b"". Called on threads, one at a
    time: `write` for all message data, then `take_place_of`, `read`, `finish` or `discard`; `piece` and `lend` at any time
    between, by several."""

    def __init__(
        self,
        make: Callable[[int], BigBody],
        front: list[bytes],
        draft: Draft | None = None,
        look: "Look | None" = None,
        header: bytes = b"",
        changes: bool = False,
        room: int = 0,
    ) -> None:
        """`make(room)` creates the file, with `room` octets reserved before what is written; `changes`: it is reserved whatever
        else there is, `room` more than otherwise."""
        self.draft, self.look = draft, look
        self.header = header
        self._skip = 0  # octets of the header as it was written, where another one is in `front`
        self.changes = changes
        self._room = room
        self._make = make
        self.front = front
        self._file: BigBody | None = None

    def write(self, data: list[bytes]) -> None:
        """Append pieces of message data. OSError or StoreError: the file cannot be written."""
        digest = self.draft or self.look
        if self._file is None:
            reserves = digest is not None or self.changes
            room = 2 * ROOM + self._room if self.changes else ROOM if reserves else 0  # edits.MOST is as much again
            self._file = self._make(room)
            if not reserves:  # no field will be added before ours
                self._file.write(self.front)
                self.front = []
        self._file.write(data)
        if digest is not None:
            for piece in data:
                digest.body.feed(piece)

    @property
    def body_octets(self) -> int:
        """How many octets have been written behind the header."""
        return self._file.length - len(self.header) if self._file is not None else 0

    def piece(self, at: int, most: int) -> bytes:
        """Octets behind the header. OSError."""
        assert self._file is not None
        return self._file.piece(len(self.header) + at, most)

    def lend(self) -> tuple[int, int]:
        """A descriptor to read what is behind the header from, and where that is (BigBody.lend). OSError."""
        assert self._file is not None
        return self._file.lend(len(self.header))

    def change(self, front: list[bytes]) -> None:
        """What is stored in front of the body, in place of the header and of our fields."""
        self.front, self._skip = front, len(self.header)

    def take_place_of(self, old: "Large | None", move: Callable[[BigBody], None]) -> None:
        """All of it was written: it is what the message has from now on, in place of `old`, which is discarded (None: that was in
        memory); `move(file)` gives its file the name of the message's. OSError: neither is, `discard` it."""
        assert self._file is not None
        if old is not None:
            old.discard()
        move(self._file)

    def hash_body(self, draft: Draft) -> None:
        """Feed all that is behind the header to a signature of another header. OSError."""
        at = 0
        while piece := self.piece(at, HASHED_TOGETHER):
            draft.body.feed(piece)
            at += len(piece)

    def read(self) -> list[bytes]:
        """The message so far, `front` included, in pieces. It is neither signed nor verified."""
        assert self._file is not None
        return [*self.front, *self._file.read(self._skip)]

    def finish(self, fields: bytes) -> Body:
        """Write `fields` before everything else and sync the file. Where the message data lies then."""
        assert self._file is not None
        return self._file.finish([fields, *self.front], self._skip)

    def discard(self) -> None:
        """The message was not accepted: remove the file."""
        if self._file is not None:
            self._file.discard()
